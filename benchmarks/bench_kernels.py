"""Speed of the Triton kernels and the layer made of them at the Mamba-2 2.7B shape, beside the time their bytes must take.

    python benchmarks/bench_kernels.py [--lengths 1024 4096 16384] [--batch 1] [--beside PATH] [--json FILE]

Each time is the median of replays of a CUDA graph that holds the call as often as makes up half a millisecond, which
leaves out the gaps between launches and the start of a replay. The floor counts each input read once and each output
written once, at the bandwidth of a large copy measured in the same process; a SSD backward reads the chunk states that
its recompute kept, and the layer's floor adds its matrix products. `--beside` adds mamba-ssm's scan and layer, from the
folder PATH that holds `mamba_ssm/`, or as installed where PATH is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import beside_mamba_ssm
import layer_calls
import torch
import triton
from beside_mamba_ssm import D_MODEL, D_STATE, HEADDIM, HEADS

from magc_kernels.conv import autograd as conv
from magc_kernels.norm import autograd as norm
from magc_kernels.ssd import autograd as ssd

D_INNER = HEADS * HEADDIM
CONV_CHANNELS = D_INNER + 2 * D_STATE
PROJECTION = 2 * D_INNER + 2 * D_STATE + HEADS


@dataclass(frozen=True)
class Row:
    """One timed call."""

    name: str
    length: int
    microseconds: float
    floor_microseconds: float


def graph_time(run: Callable[[], object], replays: int = 25) -> float:
    """Median milliseconds of one call, replayed from a CUDA graph."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    once = _replayed(run, 1, 5)
    count = max(1, min(32, round(0.5 / once)))
    return once if once > 5 else _replayed(run, count, replays)


def _replayed(run: Callable[[], object], count: int, replays: int) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a large element-wise copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seconds = graph_time(lambda: torch.neg(source, out=target)) / 1e3
    return 2 * source.numel() * source.element_size() / seconds


def measure(length: int, batch: int, bandwidth: float) -> list[Row]:
    """Every operator once, bfloat16 activations and float32 parameters, inputs as views as a layer has them."""
    torch.manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    f32 = torch.float32
    projection = rand(batch, length, PROJECTION)
    z, xBC, dt = projection.split([D_INNER, CONV_CHANNELS, HEADS], -1)
    x, B, C = rand(batch, length, CONV_CHANNELS).split([D_INNER, D_STATE, D_STATE], -1)
    scan = ssd.SSDInputs(
        x.unflatten(-1, (HEADS, HEADDIM)),
        dt,
        -torch.rand(HEADS, device="cuda") * 15 - 1,
        B.unsqueeze(2),
        C.unsqueeze(2),
        D=torch.ones(HEADS, device="cuda"),
        dt_bias=torch.full((HEADS,), -4.0, device="cuda"),
        initial_state=rand(batch, HEADS, HEADDIM, D_STATE, dtype=f32),
        dt_softplus=True,
    )
    y, final_state, saved = ssd.recompute(scan)
    assert y is not None
    dy = rand(*y.shape)
    conv_inputs = conv.ConvInputs(
        xBC,
        rand(CONV_CHANNELS, 4, dtype=f32),
        rand(CONV_CHANNELS, dtype=f32),
        initial_state=rand(batch, 3, CONV_CHANNELS),
        activation="silu",
    )
    dconv = rand(batch, length, CONV_CHANNELS)
    wide, narrow = rand(D_INNER, dtype=f32), rand(D_MODEL, dtype=f32)
    flat, dflat = y.flatten(-2), dy.flatten(-2)
    hidden, dhidden = rand(batch, length, D_MODEL), rand(batch, length, D_MODEL)
    residual, dresidual = (rand(batch, length, D_MODEL, dtype=f32) for _ in range(2))

    inner, conv_row, model = 2 * D_INNER, 2 * CONV_CHANNELS, 2 * D_MODEL
    small = 2 * HEADS
    states = 2 * HEADS * HEADDIM * D_STATE / saved.config.chunk
    calls: list[tuple[str, float, Callable[[], object]]] = [
        ("ssd forward", conv_row + small + inner, lambda: ssd.forward(scan)),
        ("ssd recompute, states only", conv_row + small + states, lambda: ssd.recompute(scan, output=False)),
        ("ssd backward", 2 * (conv_row + small) + inner + states, lambda: ssd.vjp(saved, dy, final_state)),
        ("conv forward", 2 * conv_row, lambda: conv.forward(conv_inputs)),
        ("conv backward", 3 * conv_row, lambda: conv.vjp(conv_inputs, dconv)),
        ("gated norm forward", 3 * inner, lambda: norm.gated_forward(flat, z, wide)),
        ("gated norm backward", 5 * inner, lambda: norm.gated_vjp(flat, z, wide, dflat)),
        ("add norm forward", 6 * model, lambda: norm.add_forward(hidden, residual, narrow)),
        (
            "add norm backward",
            8 * model,
            lambda: norm.add_vjp(
                residual, None, narrow, dhidden, dresidual, residual_dtype=f32, x_dtype=torch.bfloat16
            ),
        ),
    ]
    tokens = batch * length
    return [
        Row(name, length, graph_time(run) * 1e3, tokens * bytes_per_token / bandwidth * 1e6)
        for name, bytes_per_token, run in calls
    ]


def measure_layer(length: int, batch: int, bandwidth: float, rate: float) -> list[Row]:
    """The whole layer, and the block around it."""
    floors = layer_calls.floors(batch * length, bandwidth, rate)
    return [
        Row(name, length, graph_time(run) * 1e3, floors[floor] * 1e6)
        for name, floor, run in layer_calls.calls(length, batch)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--beside", nargs="?", const="", metavar="PATH", help="compare with mamba-ssm")
    parser.add_argument("--json", help="write all rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    bandwidth = copy_bandwidth()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    rate = layer_calls.matrix_rate(graph_time)
    speeds = f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 products {rate / 1e12:.0f} TFLOP/s"
    print(f"{torch.cuda.get_device_name()}, {versions}, {speeds}")
    rows = [row for length in arguments.lengths for row in measure(length, arguments.batch, bandwidth)]
    for length in arguments.lengths:
        rows += measure_layer(length, arguments.batch, bandwidth, rate)
    print(f"{'call':<36}{'length':>8}{'us':>10}{'ns/token':>10}{'floor us':>10}{'of floor':>10}")
    for row in rows:
        per_token = row.microseconds * 1e3 / row.length / arguments.batch
        share = row.floor_microseconds / row.microseconds
        print(
            f"{row.name:<36}{row.length:>8}{row.microseconds:>10.1f}{per_token:>10.1f}"
            f"{row.floor_microseconds:>10.1f}{share:>10.0%}"
        )
    beside = None
    if arguments.beside is not None:
        beside = beside_mamba_ssm.compare(
            arguments.beside or None, [max(arguments.lengths)], arguments.batch, graph_time
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            header = {"device": torch.cuda.get_device_name(), "versions": versions, "copy": bandwidth, "products": rate}
            json.dump(
                {**header, "batch": arguments.batch, "rows": [asdict(row) for row in rows], "beside": beside},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
