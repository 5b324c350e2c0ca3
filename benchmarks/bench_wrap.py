"""What `magc.wrap` gives to models of others: peak over weights and gradients, and speed, wrapped and not.

    python benchmarks/bench_wrap.py --out bench-wrap                    # on a GPU
    python benchmarks/bench_wrap.py --device cpu --small --out bench-wrap

``lstm``: ``torch.nn.LSTM`` of 8 layers of 1024 at the greatest length that runs without magc; wrapped, with an eighth of the
memory that took; and the same stack on 2^18 tokens within as little, its input in host memory. ``mamba2``: transformers'
Mamba-2 at the 2.7B shape, 2^18 tokens, loss in the grid, within 8 GiB. Writes ``wrap.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import magc
from magc import GridCheckpoint
from magc.bench.peak import MakesSums, measure_peak, sums_made_by
from magc.bench.work import is_out_of_memory
from magc.integrations.torch_rnn import split_rnn
from magc.integrations.wrap import find, unwrap, wrapped
from magc.runners.choice import Runner
from magc.units import format_bytes, parse_bytes

LSTM_RUNS = (1 << 18, 1 << 17, (1 << 16) - 1, 1 << 15, 1 << 14)
"""Tokens to try without magc; 65,535 is the most that cuDNN takes."""
_STEPS = 3
_PATIENCE = 10.0
"""Seconds; no further step is timed when those before took more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        case: which model, wrapped or not.
        tokens: of the sequence.
        peak_bytes: over weights and gradients.
        seconds: of a training step, the median.
        budget: over weights alone; what `magc.wrap` is given, but for whole sequences outside the grid. None without.
        plan: that it chose.
        runner: of its cells, "" without.
    """

    case: str
    tokens: int
    peak_bytes: int
    seconds: float
    budget: int | None = None
    plan: str = ""
    runner: str = ""

    def __str__(self) -> str:
        """A row of a markdown table."""
        speed = f"{self.tokens / self.seconds:,.0f}"
        return f"| {self.case} | {self.tokens:,} | {format_bytes(self.peak_bytes)} | {speed} | {self.runner} | {self.plan} |"


@dataclass(frozen=True, slots=True)
class Effort:
    """Where and how to measure.

    Attributes:
        device: of the models.
        runner: of wrapped ones.
        small: tiny models, to try it.
    """

    device: torch.device
    runner: Runner
    small: bool


def measure(
    model: nn.Module, step: Callable[[], None], warm_up: Callable[[], object], effort: Effort
) -> tuple[int, float]:
    """Peak over weights and gradients, and seconds, of a step.

    Args:
        model: with no gradients; wrapped, a grid, or neither.
        step: forward and backward.
        warm_up: what compiles, plans and sets up.
        effort: where.
    """
    warm_up()
    parameters = list(model.parameters())
    seconds: list[float] = []

    wrapping = find(model)
    grid = model if wrapping is None else wrapping.grid

    def watched(makes_sums: MakesSums) -> None:
        with sums_made_by(grid, makes_sums) if isinstance(grid, GridCheckpoint) else nullcontext():
            seconds.append(_timed(model, step, effort.device))

    # On a GPU the allocator counts and takes no time; on a CPU the meter slows the step down.
    peak = measure_peak(watched, parameters, ())
    over = peak.over_gradients
    if not peak.gradients:
        over -= sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    if effort.device.type != "cuda":
        seconds.clear()
    while not seconds or (len(seconds) < _STEPS and sum(seconds) < _PATIENCE):
        seconds.append(_timed(model, step, effort.device))
    model.zero_grad(set_to_none=True)
    return over, statistics.median(seconds)


def _timed(model: nn.Module, step: Callable[[], None], device: torch.device) -> float:
    model.zero_grad(set_to_none=True)
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


class MeanSquare(nn.Module):
    """A head: the squared error of what it is given, and the count."""

    def forward(self, y: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and count of a segment."""
        return (y - targets).square().sum(), torch.full((), y.numel(), device=y.device)


def lstm(effort: Effort) -> Iterator[Row]:
    """As long as it runs; then wrapped, with an eighth of the memory; then as a stack on a longer sequence, with as little.

    A wrapped LSTM takes and returns whole sequences, as its class does. In the longer one the input is in host memory and the
    loss is part of the grid, so neither is ever on the device as a whole.
    """
    layers, width, runs, long = (4, 32, (512, 256), 1024) if effort.small else (8, 1024, LSTM_RUNS, 1 << 18)
    torch.manual_seed(0)
    model = nn.LSTM(width, width, layers, batch_first=True).to(effort.device)
    sums = sum(parameter.numel() * 4 for parameter in model.parameters())
    for tokens in runs:
        x = torch.randn(1, tokens, width, device=effort.device)

        def step(x: torch.Tensor = x) -> None:
            model(x)[0].square().mean().backward()

        try:
            peak, seconds = measure(model, step, partial(step, x[:, :4096]), effort)
        except RuntimeError as error:
            if not is_out_of_memory(error) and "CUDNN_STATUS_NOT_SUPPORTED" not in str(error):
                raise
            model.zero_grad(set_to_none=True)
            _free(effort.device)
            continue
        break
    else:
        raise SystemExit("the LSTM ran out of memory at every length")
    yield Row("LSTM", tokens, peak, seconds)
    budget = peak // 8 + sums
    # Whole sequences outside the grid: the input, the loss's gradient of the output and what that is made from.
    inside = budget - 3 * x.nbytes
    magc.wrap(model, budget=inside, runner=effort.runner)
    again, seconds = measure(model, step, partial(wrapped(model).grid.plan_for, x), effort)
    yield Row("LSTM, wrapped", tokens, again, seconds, budget, _plan(model), effort.runner)
    unwrap(model)
    _free(effort.device)

    stack = GridCheckpoint(split_rnn(model), budget=budget, host_budget="64GiB", runner=effort.runner)
    x_host, targets = torch.randn(1, long, width), torch.zeros(1, long, 1)
    stem, head = nn.Identity(), MeanSquare()

    def stacked() -> None:
        stack.loss(x_host, targets, stem=stem, head=head).backward()

    peak, seconds = measure(stack, stacked, stacked, effort)
    [plan] = stack._plans.values()
    yield Row("LSTM, a stack on the host's input", long, peak, seconds, budget, str(plan), effort.runner)


def mamba2(effort: Effort) -> Iterator[Row]:
    """Wrapped only: without, its intermediates take hundreds of kilobytes for each token and layer."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes: dict[str, Any] = (
        {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 16, "state_size": 16, "vocab_size": 256}
        if effort.small
        else {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "head_dim": 64, "vocab_size": 50277}
    )
    tokens, budget = (2**10, "16MiB") if effort.small else (2**18, "8GiB")
    config = Mamba2Config(**{"state_size": 128, "n_groups": 1, "expand": 2, **sizes})
    dtype = torch.bfloat16 if effort.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with effort.device:
        model: nn.Module = Mamba2ForCausalLM(config)
    model.to(dtype=dtype).train()
    # Gradients are summed in float32 and the budget counts them; the aim is over weights and gradients.
    sums = sum(parameter.numel() * 4 for parameter in model.parameters())
    given = parse_bytes(budget) + sums
    magc.wrap(model, budget=given, host_budget=None if effort.small else "64GiB", runner=effort.runner)
    ids = torch.randint(3, config.vocab_size, (1, tokens), device=effort.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    peak, seconds = measure(model, step, step, effort)
    yield Row("transformers' Mamba-2, wrapped", tokens, peak, seconds, given, _plan(model), effort.runner)


CASES = {"lstm": lstm, "mamba2": mamba2}


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runner", choices=("eager", "cuda-graph"), help="of wrapped models (cuda-graph on a GPU)")
    parser.add_argument("--small", action="store_true", help="tiny models, to try it")
    parser.add_argument("--out", default="bench-wrap", help="folder for the results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    runner = options.runner or ("cuda-graph" if device.type == "cuda" else "eager")
    rows: list[Row] = []
    print("| case | tokens | peak | tokens/s | runner | plan |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.cases.split(","):
        for row in CASES[name](Effort(device, runner, options.small)):
            print(row, flush=True)
            rows.append(row)
            _write(Path(options.out), device, rows)
        _free(device)


def _write(out: Path, device: torch.device, rows: list[Row]) -> None:
    """After every row, so that a run that is cut off leaves what it measured."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    (out / "wrap.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _plan(model: nn.Module) -> str:
    lines = wrapped(model).explain().splitlines()
    return next(line.removeprefix("plan").strip() for line in lines if line.startswith("plan"))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
