"""The cost model: bytes and seconds of a cell, put together from measurements of single stages.

Every number is measured on the user's own layers (``magc.profile``), at several segment lengths; between two lengths a
number is interpolated, beyond the longest it grows as between the last two. Nothing here touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from magc.errors import PlanError


@dataclass(frozen=True, slots=True)
class StageSample:
    """One stage at one segment length. Bytes on the device, seconds of wall time.

    Attributes:
        tokens: segment length.
        output_bytes: its output.
        kept_bytes: growth of live bytes by recording it after the stages before it, its output and new state included.
        passed_bytes: the part of its output that the next stage's graph does not keep.
        run_peak: most bytes above those at entry while it runs without recording; output and new state included.
        record_peak: the same while it is recorded.
        backward_peak: the same while it is back-propagated; its own recorded bytes are there at entry.
        run_seconds: time to run it.
        record_seconds: time to record it.
        backward_seconds: time to back-propagate it.
    """

    tokens: int
    output_bytes: int
    kept_bytes: int
    passed_bytes: int
    run_peak: int
    record_peak: int
    backward_peak: int
    run_seconds: float
    record_seconds: float
    backward_seconds: float


_BYTES = ("output_bytes", "kept_bytes", "passed_bytes", "run_peak", "record_peak", "backward_peak")
_SECONDS = ("run_seconds", "record_seconds", "backward_seconds")


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage at any segment length.

    Attributes:
        samples: measurements in increasing segment length, at least one.
        state_bytes: its state.
        grad_bytes: accumulators of the parameters that the backward meets first in this stage.
        grad_bytes_single: the same when every parameter is used by one cell only.
    """

    samples: tuple[StageSample, ...]
    state_bytes: int
    grad_bytes: int
    grad_bytes_single: int

    def at(self, tokens: int) -> StageSample:
        """Interpolate to a segment length."""
        samples = self.samples
        upper = next((i for i, sample in enumerate(samples) if sample.tokens >= tokens), len(samples))
        if upper < len(samples) and samples[upper].tokens == tokens:
            return samples[upper]
        if len(samples) == 1:
            low, high = StageSample(0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0), samples[0]
        else:
            upper = min(max(upper, 1), len(samples) - 1)
            low, high = samples[upper - 1], samples[upper]
        weight = (tokens - low.tokens) / (high.tokens - low.tokens)

        def mix(name: str) -> float:
            a, b = getattr(low, name), getattr(high, name)
            return max(0.0, a + (b - a) * weight)

        return StageSample(
            tokens, *(math.ceil(mix(name)) for name in _BYTES), *(mix(name) for name in _SECONDS)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CellCost:
    """One cell. Bytes on the device above those at entry, seconds.

    Attributes:
        input_bytes: its border (for the first group: the input's copy on the device, 0 if it is a view).
        output_bytes: the next border, or the output.
        state_bytes: the states of its layers.
        tape_bytes: what recording leaves behind, outputs and new states included.
        run_peak, record_peak, backward_peak: working peaks.
        first_backward_peak, first_backward_peak_single: the backward's when it also makes the accumulators below.
        grad_bytes, grad_bytes_single: parameter gradient accumulators that it is the first to touch.
        run_seconds, record_seconds, backward_seconds: times.
    """

    input_bytes: int
    output_bytes: int
    state_bytes: int
    tape_bytes: int
    run_peak: int
    record_peak: int
    backward_peak: int
    first_backward_peak: int
    first_backward_peak_single: int
    grad_bytes: int
    grad_bytes_single: int
    run_seconds: float
    record_seconds: float
    backward_seconds: float


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes per second of copies between the device and the other tiers, and within the device."""

    host: float = 20e9
    disk: float = 1e9
    device: float = 1.3e12


@dataclass(frozen=True)
class CostModel:
    """Costs of a stack.

    Attributes:
        stages: the layers' costs in order.
        stem: the stem's, if there is one.
        head: the head's, if there is one.
        input_bytes_per_token: bytes of the stack's input per token.
        input_is_view: the input is on the device already, so that a segment of it takes no memory.
        needs_input_grad: a gradient of the whole input is made.
        host_is_device: the device is the CPU, so that host memory is device memory.
        cell_seconds: host time that running, recording or back-propagating a cell costs whatever is in it.
        captured: cells are replayed as CUDA graphs: their times are those of replays, host time shows only where it is
            longer, and they need boxes.
        bandwidths: of copies to and from other tiers.
        longest_sample: the longest segment measured; beyond it numbers are extrapolated.
    """

    stages: tuple[StageCost, ...]
    stem: StageCost | None = None
    head: StageCost | None = None
    input_bytes_per_token: float = 0.0
    input_is_view: bool = True
    needs_input_grad: bool = False
    host_is_device: bool = True
    cell_seconds: float = 0.0
    captured: bool = False
    bandwidths: Bandwidths = Bandwidths()
    longest_sample: int = 0
    _samples: dict[tuple[int, int], StageSample] = field(
        default_factory=dict[tuple[int, int], StageSample], init=False, repr=False, compare=False
    )
    _cells: dict[tuple[object, ...], CellCost] = field(
        default_factory=dict[tuple[object, ...], CellCost], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check that there is something to model."""
        if not self.stages:
            raise PlanError("a cost model needs at least one layer")

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles start with empty caches: those are keyed by the identity of the stages here."""
        return {**self.__dict__, "_samples": {}, "_cells": {}}

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.stages)

    def sample(self, stage: StageCost, tokens: int) -> StageSample:
        """A stage at a segment length, interpolated once."""
        key = (id(stage), tokens)
        if key not in self._samples:
            self._samples[key] = stage.at(tokens)
        return self._samples[key]

    def group(self, start: int, stop: int) -> tuple[StageCost, ...]:
        """Costs of the stages of a group of layers, stem and head included at the ends."""
        stages = self.stages[start:stop]
        if start == 0 and self.stem is not None:
            stages = (self.stem, *stages)
        if stop == len(self.stages) and self.head is not None:
            stages = (*stages, self.head)
        return stages

    def input_bytes(self, start: int, tokens: int) -> int:
        """Bytes that the input of the group from layer ``start`` takes for ``tokens`` tokens."""
        if start > 0:
            return self.sample(self.stages[start - 1], tokens).output_bytes
        return 0 if self.input_is_view else math.ceil(self.input_bytes_per_token * tokens)

    def cell(self, start: int, stop: int, tokens: int) -> CellCost:
        """The cell of layers ``start`` to ``stop`` and ``tokens`` tokens."""
        before = self.stages[start - 1] if start > 0 else None
        stages = self.group(start, stop)
        key = (id(before), tokens, *map(id, stages))
        if key not in self._cells:
            before_sample = None if before is None else self.sample(before, tokens)
            samples = [self.sample(stage, tokens) for stage in stages]
            made = _compose(self.input_bytes(start, tokens), before_sample, stages, samples)
            self._cells[key] = self._replayed(made) if self.captured else self._with_host_time(made)
        return self._cells[key]

    def _with_host_time(self, cell: CellCost) -> CellCost:
        return replace(cell, **{name: self.cell_seconds + getattr(cell, name) for name in _SECONDS})

    def _replayed(self, cell: CellCost) -> CellCost:
        """Inputs go into boxes, and outputs into boxes and out; the host launches it all ahead of the device."""
        into, out = cell.input_bytes + cell.state_bytes, cell.output_bytes + cell.state_bytes
        copied = {"run_seconds": into + 2 * out, "record_seconds": into, "backward_seconds": out + 2 * into}
        copies = {name: nbytes / self.bandwidths.device for name, nbytes in copied.items()}
        return replace(cell, **{name: max(self.cell_seconds, getattr(cell, name) + copies[name]) for name in _SECONDS})

    def captured_bytes(self, columns: Iterable[Sequence[CellCost]]) -> int:
        """What captured cells take beside their working memory: boxes, and gradients beside the sums that stay.

        Args:
            columns: the cells of one segment, for each segment length that occurs.
        """
        if not self.captured:
            return 0
        columns = list(columns)
        borders = sum(
            2 * max(cell.input_bytes for cell in cells) + 2 * max(cell.output_bytes for cell in cells)
            for cells in columns
        )
        states = 4 * max(cell.state_bytes for cells in columns for cell in cells)
        return borders + states + sum(cell.grad_bytes_single for cell in columns[0])

    def replay_bytes(self, columns: Iterable[Sequence[CellCost]]) -> int:
        """What the memory that captured cells share has to hold: working memory, and boxes of what they make.

        Args:
            columns: as in `captured_bytes`.
        """
        cells = [cell for column in columns for cell in column]
        work = max(max(cell.run_peak, cell.record_peak, cell.tape_bytes + cell.backward_peak) for cell in cells)
        boxes = max(cell.input_bytes for cell in cells) + max(cell.output_bytes for cell in cells)
        return work + boxes + 2 * max(cell.state_bytes for cell in cells)

    @staticmethod
    def apart_bytes(cell: CellCost) -> int:
        """What a captured cell takes that waits for its backward beside another: boxes and memory of its own, which stay."""
        boxes = 2 * (cell.input_bytes + cell.output_bytes) + 4 * cell.state_bytes
        return boxes + max(cell.record_peak, cell.tape_bytes + cell.backward_peak)


def _compose(
    input_bytes: int,
    before: StageSample | None,
    stages: Sequence[StageCost],
    samples: Sequence[StageSample],
) -> CellCost:
    """Put a cell together from its stages.

    While a cell runs, new states pile up and only the current activation lives. While it is recorded, what each stage
    keeps piles up; the cell's input is held by its border, so the part of it that no graph keeps counts here. While it
    is back-propagated, the stages' recordings go, last first, and gradients of states pile up.
    """
    last = len(samples) - 1
    border_kept_elsewhere = 0 if before is None else before.passed_bytes
    run_peak = record_peak = 0
    backward_peaks = [0, 0, 0]
    states = kept = 0
    for index, (stage, sample) in enumerate(zip(stages, samples, strict=True)):
        activation = samples[index - 1].output_bytes if index else 0
        run_peak = max(run_peak, states + activation + sample.run_peak)
        record_peak = max(record_peak, kept + sample.record_peak)
        states += stage.state_bytes
        kept += sample.kept_bytes + (border_kept_elsewhere if index == 0 else 0)
    tape = kept
    produced = grads = grads_single = 0
    for index in range(last, -1, -1):
        stage, sample = stages[index], samples[index]
        own_output = 0 if index == last else samples[last].output_bytes + sample.output_bytes
        grads += stage.grad_bytes
        grads_single += stage.grad_bytes_single
        peak = kept - tape + produced + own_output + sample.backward_peak
        backward_peaks = [
            max(old, peak + made) for old, made in zip(backward_peaks, (0, grads, grads_single), strict=True)
        ]
        kept -= sample.kept_bytes
        # The caller still holds the new state; the gradient of the old one has come on top.
        produced += 2 * stage.state_bytes
    return CellCost(
        input_bytes=input_bytes,
        output_bytes=samples[last].output_bytes,
        state_bytes=states,
        tape_bytes=tape,
        run_peak=run_peak,
        record_peak=record_peak,
        backward_peak=backward_peaks[0],
        first_backward_peak=backward_peaks[1],
        first_backward_peak_single=backward_peaks[2],
        grad_bytes=grads,
        grad_bytes_single=grads_single,
        run_seconds=sum(sample.run_seconds for sample in samples),
        record_seconds=sum(sample.record_seconds for sample in samples),
        backward_seconds=sum(sample.backward_seconds for sample in samples),
    )
