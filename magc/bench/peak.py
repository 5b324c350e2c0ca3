"""Peak memory of a training step over weights and gradient buffers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magc.accumulate import GradAccumulator, LentSums
from magc.checkpoint import GridCheckpoint
from magc.meter import MemoryMeter

MakesSums = Callable[..., GradAccumulator]

_BLOCK = 512
"""Bytes that the CUDA allocator rounds up to."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Most bytes of a step, up to the moment when the gradients are complete.

    Attributes:
        over_gradients: over weights and gradient buffers: the most, over time, of what is allocated less the weights and
            less the gradient buffers that exist at that time (the grid's sums; a gradient that is made once, by one cell,
            from when it is complete). What exists later is not subtracted.
        with_gradients: over weights: what the planner predicts.
        gradients: the gradient buffers in the end, before they are delivered as ``.grad``.
        delivered: over weights, delivery included, in which the sums are copied to ``.grad``, one by one or, where the sums
            outlive the step, all of them. That holds gradient buffers and nothing else, so it counts in none of the above.
    """

    over_gradients: int
    with_gradients: int
    gradients: int
    delivered: int


def measure_peak(
    step: Callable[[MakesSums], None], parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]
) -> Peak:
    """Run a step of a `GridCheckpoint` and watch its memory. There must be no ``.grad`` yet.

    On CUDA everything counts that the process has allocated on the device, token ids and the work space of libraries
    included, and what the memory pools of CUDA graphs hold beyond the tensors in them, which replays use and nobody
    else can. On the CPU, what `MemoryMeter` sees, and the token ids.

    Args:
        step: forward and backward, with sums of gradients that are made by what it is given (`Request.accumulator`).
        parameters: the weights, not counted.
        inputs: counted on the CPU, where the meter does not know of them.
    """
    device = parameters[0].device
    if device.type == "cuda":
        weights = sum(-(-parameter.nbytes // _BLOCK) * _BLOCK for parameter in parameters)
        before = torch.cuda.memory_allocated(device) - weights
    else:
        before = sum(tensor.nbytes for tensor in inputs)
    with MemoryMeter(device) as meter:
        watch = _Watch(meter, before)
        step(partial(_WatchedSums, watch))
        watch.note()
    idle = idle_graph_bytes(device)
    return Peak(watch.over + idle, watch.gross + idle, watch.gradients, watch.delivered + idle)


@contextmanager
def sums_made_by(grid: GridCheckpoint, accumulator: MakesSums) -> Generator[None]:
    """Let a grid's calls make their sums of gradients so, as the step of `measure_peak` is to."""
    before, grid.accumulator = grid.accumulator, accumulator
    try:
        yield
    finally:
        grid.accumulator = before


def idle_graph_bytes(device: torch.device) -> int:
    """What the memory pools of CUDA graphs hold beyond the tensors in them."""
    if device.type != "cuda":
        return 0
    index = torch.empty(0, device=device).device.index  # "cuda" has none
    cuda: Any = torch.cuda  # partly untyped
    segments: list[dict[str, Any]] = cuda.memory_snapshot()
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


class _Watch:
    """Peaks between the moments at which gradient buffers come to be."""

    def __init__(self, meter: MemoryMeter, before: int) -> None:
        self._meter, self._before = meter, before
        self._done = False
        self.gradients = self.over = self.gross = self.delivered = 0

    def note(self) -> None:
        """Take the peak since the last time, in which the gradient buffers were those known now."""
        height = self._before + self._meter.peak_bytes
        self.delivered = max(self.delivered, height)
        if not self._done:
            self.gross = max(self.gross, height)
            self.over = max(self.over, height - self.gradients)
        self._meter.reset_peak()

    def finish(self) -> None:
        """The gradients are complete."""
        self.note()
        self._done = True


class _WatchedSums(GradAccumulator):
    """Tells a watch before and after each sum is made, and when all are complete."""

    def __init__(
        self,
        watch: _Watch,
        params: Sequence[nn.Parameter],
        dtype: torch.dtype,
        single: Sequence[bool],
        lent: LentSums | None = None,
    ) -> None:
        super().__init__(params, dtype, single, lent)
        self._watch = watch
        watch.gradients = sum(self._nbytes(index) for index in range(len(params)))

    def _nbytes(self, index: int) -> int:
        held = self._sums[index] if self._lent is None else self._lent.held(index)
        return 0 if held is None else held.nbytes

    def add(self, index: int, grad: Tensor) -> None:
        """As the base class."""
        with self._growing(index):
            super().add(index, grad)

    def total(self, index: int) -> Tensor | None:
        """As the base class."""
        with self._growing(index):
            return super().total(index)

    @contextmanager
    def _growing(self, index: int) -> Generator[None]:
        if self._nbytes(index):
            yield
            return
        self._watch.note()
        yield
        self._watch.gradients += self._nbytes(index)

    def deliver(self) -> list[Tensor | None]:
        """As the base class."""
        self._watch.finish()
        return super().deliver()
