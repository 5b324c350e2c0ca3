"""Opt-in search for launch configurations: the result is a value that is passed on explicitly.

    configs = tune([ConvShape(torch.bfloat16, 4), NormShape(torch.bfloat16, 5120)], torch.device("cuda"), print)
    Path("h200.json").write_text(configs.to_json())

Requires the package `triton` and, but for another way of measuring, an NVIDIA GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
import triton
from triton.errors import TritonError

from magc_kernels import selftest
from magc_kernels._triton import capability, on_device
from magc_kernels.configs import Config, KernelConfigs, Shape, check_config, operator_of, shipped_config
from magc_kernels.conv._config import ConvConfig, ConvTile
from magc_kernels.norm._config import NormConfig
from magc_kernels.selective_scan._config import SelectiveScanConfig
from magc_kernels.ssd._config import SSDConfig

_TOKENS, _CHANNELS = 8192, 4096

_BY_SUFFIX: dict[str, tuple[Any, ...]] = {
    "_warps": (2, 4, 8),
    "_stages": (1, 2, 3, 4),
    "_registers": (None, 128, 168),
    "_rows": (16, 32, 64),
    "_columns": (32, 64, 128),
}

# Neither a chunk, from which follows what a layer keeps in memory, nor a precision.
_ALTERNATIVES: dict[type[Config], dict[str, tuple[Any, ...]]] = {
    SSDConfig: {f.name: v for f in fields(SSDConfig) for suffix, v in _BY_SUFFIX.items() if f.name.endswith(suffix)},
    ConvConfig: {
        "forward": tuple(
            ConvTile(*tile, stages=stages)
            for tile in ((4, 16, 128, 4), (4, 32, 128, 4), (2, 32, 128, 2), (8, 16, 64, 4))
            for stages in (1, 4)
        ),
        "backward": tuple(
            ConvTile(*tile, stages=stages, registers=168)
            for tile in ((8, 32, 32, 2), (8, 32, 64, 4), (8, 64, 32, 2), (8, 16, 64, 4))
            for stages in (3, 4)
        ),
    },
    NormConfig: {
        "warps": (1, 2, 4, 8, 16),
        "forward_rows": (1, 2, 4, 8),
        "backward_programs": (132, 264, 528, 1056),
        "backward_stages": (1, 2, 3),
    },
    SelectiveScanConfig: {
        "rows": (1, 2, 4),
        "lanes": (8, 16, 32),
        "tokens": (1, 2, 4, 8),
        "added_rows": (1, 2),
        "added_tokens": (2, 4, 8),
        "backward_rows": (1, 2, 4, 8),
        "backward_lanes": (2, 4, 8, 16, 32),
        "block": (1, 2, 4),
        "share": (4, 8, 16),
        "programs": (528, 1056, 2112),
    },
}


def tune(
    shapes: Iterable[Shape],
    device: torch.device,
    progress: Callable[[str], object] = lambda _: None,
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
    alternatives: dict[type[Config], dict[str, tuple[Any, ...]]] = _ALTERNATIVES,
) -> KernelConfigs:
    """The fastest configurations found, each of which passes the self-test.

    Starting from the shipped configuration, each field in turn takes its alternatives while the others stay. What
    the kernels cannot run, the device has no room for or the self-test fails is passed over.

    Args:
        shapes: to tune for; a minute or more each.
        device: to tune on.
        progress: called with a line of text for each candidate and each result.
        measure: seconds that a call takes; None: replays of a CUDA graph.
        alternatives: values to try, by configuration type and field.

    Raises:
        RuntimeError: even the shipped configuration of a shape fails the self-test.
    """
    found: dict[Shape, Config] = {}
    with on_device(device):
        for shape in shapes:
            found[shape] = _tune(shape, device, progress, measure or graph_seconds, alternatives)
    kinds: dict[str, dict[Any, Any]] = {}
    for shape, config in found.items():
        kinds.setdefault(operator_of(shape), {})[shape] = config
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return KernelConfigs(**kinds, gpu=gpu, triton=triton.__version__)


def graph_seconds(call: Callable[[], object], replays: int = 15) -> float:
    """Median time of one call on the current CUDA device, replayed from a CUDA graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _tune(
    shape: Shape,
    device: torch.device,
    progress: Callable[[str], object],
    measure: Callable[[Callable[[], object]], float],
    alternatives: dict[type[Config], dict[str, tuple[Any, ...]]],
) -> Config:
    device_class = capability(device)
    best = shipped_config(shape, device_class)
    tensors = selftest.problem(shape, _TOKENS, _CHANNELS, shape.dtype, device)

    def time(config: Config) -> float | None:
        """None unless the configuration runs and passes."""
        try:
            check_config(shape, config)
            if not selftest.run(selftest.Entry(device_class, shape, config), device).passed:
                return None
            return measure(lambda: selftest.call_kernels(shape, config, tensors))
        except (ValueError, TritonError):
            return None

    least = time(best)
    if least is None:
        raise RuntimeError(f"the shipped configuration fails the self-test: {shape}, {best}")
    progress(f"{shape}: shipped {least * 1e6:.1f} us")
    for name, value in _candidates(alternatives[type(best)]):
        candidate = replace(best, **{name: value})
        if candidate == best:
            continue
        seconds = time(candidate)
        progress(f"{shape}: {name}={value} {'not usable' if seconds is None else f'{seconds * 1e6:.1f} us'}")
        if seconds is not None and seconds < least:
            best, least = candidate, seconds
    progress(f"{shape}: {best} {least * 1e6:.1f} us")
    return best


def _candidates(alternatives: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, values in alternatives.items() for value in values)
