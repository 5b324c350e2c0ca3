"""Measure a stack's own layers: bytes and seconds of every stage at a few segment lengths.

Alike stages in a row are measured twice (the first, and one after its like) however many there are. Two measurements
per length: all stages recorded in a row, as in a cell, for what each keeps; then each alone, for its working peaks and
times. Random numbers, gradients and the stack's memory are as before afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from magc.accumulate import Proxies
from magc.alike import Chosen
from magc.ambient import Ambient, RngState
from magc.contract import call_layer
from magc.cost import Bandwidths, CostModel, StageCost, StageSample
from magc.engine import Execution
from magc.meter import MemoryMeter
from magc.plan import Plan
from magc.request import Request
from magc.runners.cache import GraphCache
from magc.runners.cell import CellInputs, CellNeeds, CellOutputs, differentiable_mask
from magc.runners.eager import EagerRunner
from magc.runners.graph import GraphRunner
from magc.schedule import Schedule
from magc.source import SegmentSource
from magc.stack import Stack, StackMemory, Stage, StageKind, build_stack, swapped
from magc.tree import Flat, PyTree, is_differentiable, nbytes

META_FLOPS = 400e12
"""Floating-point operations per second assumed for the meta device, where nothing can be timed (bf16 on an H100)."""
META_LAUNCH_SECONDS = 1e-3
"""Seconds of host work per stage and pass assumed for the meta device."""
PROFILE_SECONDS = 20.0
"""No segment length is measured that is expected to take the stages' own time beyond this. What is compiled at a first call
takes as long at any length, so it does not count: to measure less would not save it."""
_REPLAYS = 4
_LOADED_SECONDS = 0.1
_MOST_REPLAYS = 100
"""A GPU is timed under load that lasts: within tens of milliseconds its clock comes down by a tenth."""
_RUNS, _RECORDS, _BACKWARDS = 4, 4, 3
"""How often a stage is run, recorded and back-propagated at a length that takes long."""


def sample_lengths(seq_len: int, device: torch.device) -> list[int]:
    """Segment lengths to measure for a sequence: powers of 4 up to 1024 (4096 on a GPU), or to the sequence's end."""
    longest = min(seq_len, 1024 if device.type == "cpu" else 4096)
    lengths = [length for length in (1, 4, 16, 64, 256, 1024, 4096) if length < longest]
    return [*lengths[-5:], longest]


def profile(
    request: Request,
    lengths: Sequence[int] | None = None,
    *,
    limit_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> CostModel:
    """Measure the stages of a request on its own inputs.

    Args:
        request: the call whose stack, device, inputs and autocast are measured.
        lengths: segment lengths in tokens, at most the sequence; None for `sample_lengths`.
        limit_bytes: stop before a length that would need more working memory than this.
        progress: told what is being measured.

    Returns:
        The cost model.
    """
    device = request.device
    wanted = sorted(set(lengths or sample_lengths(request.inputs.length, device)))
    stack = replace(request.stack, memory=StackMemory())
    stages = Chosen.of(stack)
    before = RngState.capture(device)
    samples: dict[int, list[StageSample]] = {}
    spent = 0.0
    try:
        for length in wanted:
            # Of one length alone nothing is known about another: what a stage keeps may be all state, or all activation.
            if len(samples) > 1 and (
                spent + _seconds(_expected(samples, length), device) > PROFILE_SECONDS
                or (limit_bytes is not None and _peak(samples, length) > limit_bytes)
            ):
                break
            if progress is not None:
                progress(f"measuring {len(stages.picked)} stages at {length} tokens")
            samples[length] = _Measurement(request, stack, stages.picked, length).samples()
            spent += _seconds(samples[length], device)
        state_bytes = _Measurement(request, stack, stages.picked, wanted[0]).state_bytes
    finally:
        before.restore(device)
    return _build(request, stack, stages, samples, state_bytes)


def _expected(samples: dict[int, list[StageSample]], length: int) -> list[StageSample]:
    """What measuring a length would find, from the lengths so far."""
    by_stage = zip(*(row for _, row in sorted(samples.items())), strict=True)
    return [StageCost(stage, 0, 0, 0).at(length) for stage in by_stage]


def _peak(samples: dict[int, list[StageSample]], length: int) -> float:
    """Bytes that measuring a length would take."""
    return sum(sample.kept_bytes + sample.backward_peak for sample in _expected(samples, length))


def _seconds(row: Sequence[StageSample], device: torch.device) -> float:
    """Time that measuring a length takes, at least; on the meta device, where seconds are assumed, next to none."""
    if device.type == "meta":
        return 0.0
    return sum(
        _RUNS * sample.run_seconds + _RECORDS * sample.record_seconds + _BACKWARDS * sample.backward_seconds
        for sample in row
    )


# ---------------------------------------------------------------------- one length
class _Discard:
    """A sink for gradients nobody wants."""

    def __init__(self, params: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._params = params
        self._dtype = dtype
        self._scratch: dict[torch.dtype, Tensor] = {}

    def add(self, index: int, grad: Tensor) -> None:
        """Drop it."""

    def total(self, index: int) -> Tensor | None:
        """One piece of memory for all sums, as large as the largest: what they hold is no matter."""
        param = self._params[index]
        dtype = torch.promote_types(param.dtype, self._dtype)
        scratch = self._scratch.get(dtype)
        if scratch is None or scratch.numel() < param.numel():
            scratch = self._scratch[dtype] = torch.zeros(param.numel(), dtype=dtype, device=param.device)
        return scratch[: param.numel()].view(param.shape)


@dataclass(slots=True)
class _Alone:
    """Numbers of one stage measured alone."""

    run_peak: int
    record_peak: int
    backward_peak: int
    seconds: tuple[float, float, float]


class _Measurement:
    """The chosen stages at one segment length, with the states they have in the middle of a sequence."""

    def __init__(self, request: Request, stack: Stack, stages: Sequence[Stage], tokens: int) -> None:
        self._device, self._stages = request.device, stages
        self._ambient = Ambient.capture(request.device)
        self._runner = EagerRunner(stack, self._ambient)
        self._stack, self._accumulate, self._graphs = stack, request.accumulate, request.graphs
        self._proxies = Proxies(stack.params, _Discard(stack.params, request.accumulate))
        self._side: dict[str, PyTree] = {
            name: source.segment(0, tokens).tree() for name, source in request.side.items()
        }
        self._targets = None if request.targets is None else request.targets.segment(0, tokens).tree()
        self._tokens = tokens
        self._inputs: list[Flat] = []
        self._states: list[Flat | None] = []
        self._outputs: list[CellOutputs] = []
        x = request.inputs.segment(0, tokens)
        for index, stage in enumerate(stages):
            # The second run starts from the first one's state, has its shapes settled and nothing left to set up.
            first = self._runner.run(self._key(index), (stage,), self._cell(stage, x, None), proxies=self._proxies)
            state = first.states[0] if first.states else None
            cell = self._cell(stage, x, state)
            outputs = self._runner.run(self._key(index), (stage,), cell, proxies=self._proxies)
            # Workspaces of the backward's operators (cuBLAS's, say) are made once and stay: not the stage's cost.
            tape = self._runner.record(self._key(index), (stage,), cell, self._needs(cell), self._proxies)
            self._runner.backward(tape, *self._gradients(stage, outputs))
            self._inputs.append(x)
            self._states.append(state)
            self._outputs.append(outputs)
            x = outputs.y

    @staticmethod
    def _key(index: int) -> int:
        return -1 - index  # not a layer's index: the stage stands for several

    def _cell(self, stage: Stage, x: Flat, state: Flat | None) -> CellInputs:
        return CellInputs(x, (state,) if stage.kind is StageKind.LAYER else (), self._side, self._targets)

    @staticmethod
    def _needs(cell: CellInputs) -> CellNeeds:
        states = tuple(() if state is None else differentiable_mask(state) for state in cell.states)
        return CellNeeds(differentiable_mask(cell.x), states)

    @staticmethod
    def _gradients(stage: Stage, outputs: CellOutputs) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
        """Gradients of a stage's outputs to back-propagate: ones; a head's count has none."""
        grad_y = [_gradient(leaf) for leaf in outputs.y.leaves]
        if stage.kind is StageKind.HEAD:
            grad_y = [*grad_y[:1], *(None for _ in grad_y[1:])]
        return grad_y, [[_gradient(leaf) for leaf in new.leaves] for new in outputs.states]

    @property
    def state_bytes(self) -> list[int]:
        """Bytes of each stage's state."""
        return [sum(nbytes(state.leaves) for state in outputs.states) for outputs in self._outputs]

    def samples(self) -> list[StageSample]:
        """Measure."""
        kept = self._in_a_row()
        samples: list[StageSample] = []
        for index, (own, passed) in enumerate(kept):
            alone = self._alone(index)
            samples.append(
                StageSample(
                    self._tokens,
                    nbytes(self._outputs[index].y.leaves),
                    own,
                    passed,
                    alone.run_peak,
                    alone.record_peak,
                    alone.backward_peak,
                    *alone.seconds,
                )
            )
        return samples

    def _in_a_row(self) -> list[tuple[int, int]]:
        """For each stage, what it keeps when recorded after the others, and what of its output the next lets go."""
        kept: list[int] = []
        passed: list[int] = []
        x = self._inputs[0].map(_leaf)
        states = [None if state is None else state.map(_leaf) for state in self._states]
        outputs: list[Flat] = []
        with MemoryMeter(self._device) as meter, torch.enable_grad():
            current: PyTree = x.tree()
            total = 0
            for stage, state in zip(self._stages, states, strict=True):
                with swapped((stage,), self._proxies):
                    if stage.kind is StageKind.STEM:
                        made = stage.call(current)
                    elif stage.kind is StageKind.HEAD:
                        made = stage.call(current, self._targets)
                    else:
                        made, new = call_layer(
                            stage.name,
                            stage.call,
                            current,
                            state,
                            self._side,
                            stateless_layer=stage.stateless,
                        )
                        outputs.append(new)
                self._ambient.forget_casts()
                with_input = meter.live_bytes
                current = made
                del made
                now = meter.live_bytes
                if kept:
                    passed.append(with_input - now)
                kept.append(now - total)
                total = now
        passed.append(0)
        return list(zip(kept, passed, strict=True))

    def _alone(self, index: int) -> _Alone:
        stage, x, state, outputs = (
            self._stages[index],
            self._inputs[index],
            self._states[index],
            self._outputs[index],
        )
        cell = self._cell(stage, x, state)
        needs = self._needs(cell)
        grad_y, grad_states = self._gradients(stage, outputs)
        key = self._key(index)

        with MemoryMeter(self._device) as meter:
            made = self._runner.run(key, (stage,), cell, proxies=self._proxies)
            run_peak = meter.peak_bytes
            del made
            meter.reset_peak()
            entry = meter.live_bytes
            tape = self._runner.record(key, (stage,), cell, needs, self._proxies)
            record_peak = meter.peak_bytes - entry
            meter.reset_peak()
            entry = meter.live_bytes
            grads = self._runner.backward(tape, grad_y, grad_states)
            backward_peak = meter.peak_bytes - entry
            del grads, tape

        replayed = None if self._graphs is None else self._replayed(key, stage, cell, needs, outputs)
        if replayed is not None:
            return _Alone(run_peak, record_peak, backward_peak, replayed)

        def passes() -> Iterator[tuple[float, float, float]]:
            while True:
                with self._timed() as run:
                    self._runner.run(key, (stage,), cell, proxies=self._proxies)
                with self._timed() as record:
                    tape = self._runner.record(key, (stage,), cell, needs, self._proxies)
                with self._timed() as backward:
                    self._runner.backward(tape, grad_y, grad_states)
                yield run[0], record[0], backward[0]

        timed = passes()
        seconds = next(timed)
        if sum(seconds) < 0.2:
            again = next(timed)
            seconds = (min(seconds[0], again[0]), min(seconds[1], again[1]), min(seconds[2], again[2]))
        return _Alone(run_peak, record_peak, backward_peak, seconds)

    def _replayed(
        self, key: int, stage: Stage, cell: CellInputs, needs: CellNeeds, outputs: CellOutputs
    ) -> tuple[float, float, float] | None:
        """Seconds of the stage's replays; None if it cannot be captured."""
        assert self._graphs is not None
        cache = GraphCache(self._device, self._graphs.capturer)
        cache.prepare(self._stack, self._ambient, self._accumulate)
        runner = GraphRunner(cache, self._runner)
        gradients = self._gradients(stage, outputs)
        for _ in range(2):  # the first runs eagerly, the second captures
            runner.run(key, (stage,), cell, proxies=cache.proxies)
            tape = runner.record(key, (stage,), cell, needs, cache.proxies)
            runner.backward(tape, *gradients)
            del tape
        captured = cache.replays()
        if captured is None:
            return None
        run, record, backward = captured

        def both() -> None:
            record()
            backward()

        seconds: list[float] = []
        for replay in (run, record, both):
            with self._timed() as took:
                replay()
            count = _REPLAYS
            if self._device.type == "cuda":
                count = min(_MOST_REPLAYS, max(_REPLAYS, math.ceil(_LOADED_SECONDS / took[0])))
            with self._timed() as took:
                for _ in range(count):
                    replay()
            seconds.append(took[0] / count)
        return seconds[0], seconds[1], max(0.0, seconds[2] - seconds[1])

    @contextmanager
    def _timed(self) -> Generator[list[float]]:
        result: list[float] = []
        if self._device.type == "meta":
            with FlopCounterMode(display=False) as counter:
                yield result
            result.append(META_LAUNCH_SECONDS + counter.get_total_flops() / META_FLOPS)
            return
        _wait(self._device)
        start = time.perf_counter()
        yield result
        _wait(self._device)
        result.append(time.perf_counter() - start)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(is_differentiable(tensor))


def _gradient(leaf: Tensor | None) -> Tensor | None:
    return torch.ones_like(leaf) if leaf is not None and is_differentiable(leaf) else None


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)


# ---------------------------------------------------------------------- the model
def _build(
    request: Request,
    stack: Stack,
    chosen: Chosen,
    samples: dict[int, list[StageSample]],
    state_bytes: list[int],
) -> CostModel:
    grads = _grad_bytes(request, stack)
    made: dict[tuple[object, ...], StageCost] = {}
    costs: list[StageCost] = []
    for own, passed, grad in zip(chosen.own, chosen.passed, grads, strict=True):
        key = (own, passed, grad)
        if key not in made:
            rows = [replace(row[own], passed_bytes=row[passed].passed_bytes) for _, row in sorted(samples.items())]
            made[key] = StageCost(tuple(rows), state_bytes[own], *grad)
        costs.append(made[key])
    stem = costs.pop(0) if stack.stem is not None else None
    head = costs.pop() if stack.head is not None else None
    tensors = request.inputs.flat.tensors or request.inputs.segment(0, 1).tensors
    length = request.inputs.length if request.inputs.flat.tensors else 1
    return CostModel(
        stages=tuple(costs),
        stem=stem,
        head=head,
        input_bytes_per_token=nbytes(tensors) / length,
        input_is_view=bool(request.inputs.flat.tensors) and all(leaf.device == request.device for leaf in tensors),
        needs_input_grad=any(request.needs_x),
        host_is_device=request.device.type in ("cpu", "meta"),
        cell_seconds=_cell_seconds(request.device),
        captured=request.graphs is not None,
        bandwidths=Bandwidths(),
        longest_sample=max(samples),
    )


class _Nothing(nn.Module):
    """The cheapest layer there is: what a grid of it costs, cells cost."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One addition."""
        y = x + 1
        return y, y[:, -1]


def _cell_seconds(device: torch.device, cells: int = 64) -> float:
    """Host time per action on a cell: the best of three grids of next to nothing."""
    if device.type == "meta":
        return META_LAUNCH_SECONDS
    stack = build_stack([_Nothing()])
    x = torch.zeros(1, cells, 1, device=device, requires_grad=True)
    source = SegmentSource("x", x, 1, None)
    request = Request(stack, source, {}, None, (None,), (True,), ((),), device, torch.float32)
    schedule = Schedule(Plan(tokens=1), Plan(tokens=1).grid(1, cells))
    best = math.inf
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        execution = Execution(request, schedule)
        result = execution.forward()
        execution.backward([torch.ones_like(leaf) for leaf in result.y.tensors], [(None,)])
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best / (3 * cells)


def _grad_bytes(request: Request, stack: Stack) -> list[tuple[int, int]]:
    """For every stage, bytes of the accumulators that the backward touches first there: (many cells, one cell)."""
    users = [0] * len(stack.params)
    for stage in stack.stages:
        for index in {slot.index for slot in stage.slots}:
            users[index] += 1
    seen: set[int] = set()
    rows: list[tuple[int, int]] = []
    for stage in reversed(stack.stages):
        many = one = 0
        for index in {slot.index for slot in stage.slots} - seen:
            param = stack.params[index]
            wide = param.numel() * torch.promote_types(param.dtype, request.accumulate).itemsize
            many += wide
            one += param.numel() * param.element_size() if users[index] == 1 else wide
            seen.add(index)
        rows.append((many, one))
    return rows[::-1]
