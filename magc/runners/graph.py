"""The CUDA-graph cell runner: cells of one kind are captured once and replayed for every segment.

A deep cell of few tokens launches thousands of kernels, which takes the host several times as long as the GPU takes to
run them. All cells of a kind (the same layers and shapes) run the same kernels, so they are captured as CUDA graphs that
work on boxes of their own (`magc.runners.boxes`): inputs are copied in, outputs out. One graph runs a cell; a pair of
graphs records it and back-propagates it, the tape between them lying in the graphs' memory.

The first cell of each kind runs eagerly, which compiles and sets up whatever does so at its first use; the second is
captured. Random numbers are those of the eager runner: a replay takes its offsets from the generator's state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from magc.accumulate import Proxies
from magc.ambient import Ambient
from magc.runners.boxes import (
    Boxes,
    Grads,
    copied_grads,
    copied_outputs,
    copy_into,
    fill_inputs,
    signature,
)
from magc.runners.capture import CaptureError, Capturer, CudaCapturer, Replay
from magc.runners.cell import CellGrads, CellInputs, CellNeeds, CellOutputs
from magc.runners.eager import EagerRunner
from magc.runners.eager import Tape as EagerTape
from magc.stack import Stack, Stage
from magc.tree import flatten
from magc.walk import own_tensors


class GraphCache:
    """Captured cells of one stack, kept from call to call, and the sums that they add parameter gradients to.

    Args:
        device: where the cells run.
        capturer: how they are captured; None for `CudaCapturer`.
    """

    def __init__(self, device: torch.device, capturer: Capturer | None = None) -> None:
        self.device = device
        self.capturer = CudaCapturer(device) if capturer is None else capturer
        self.forwards: dict[object, _Forward] = {}
        self.pairs: dict[object, list[_Pair]] = {}
        self.seen: set[tuple[object, ...]] = set()
        self.refused: dict[str, str] = {}
        self.sums: dict[int, Tensor] = {}
        self.whole: dict[int, Tensor] = {}
        self.given: set[int] = set()
        self.proxies: Sequence[nn.Parameter] = ()
        self.boxes = Boxes()
        self.renew_pool()
        self.shared_tape: _Pair | None = None
        self._expected = 0
        self._recorded = False
        self._single: tuple[bool, ...] = ()
        self._params: tuple[nn.Parameter, ...] = ()
        self._dtype = torch.float32
        self._surroundings: object = None

    def prepare(
        self,
        stack: Stack,
        ambient: Ambient,
        accumulate: torch.dtype,
        *,
        single: Sequence[bool] | None = None,
        expected: int = 0,
    ) -> None:
        """Drop everything captured if it would not be the same function any more.

        Args:
            stack: that is about to run.
            ambient: what it runs under.
            accumulate: dtype of sums.
            single: of each parameter, whether one cell alone makes its gradient, which then is in its own dtype; None for
                none.
            expected: bytes of shared memory that the cells will need, 0 if that is not known.

        Graphs hold addresses: of parameters and buffers. They hold decisions too: training mode, autocast, deterministic
        algorithms, which parameters are frozen.
        """
        tensors = [
            (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
            for stage in stack.stages
            for module in stage.modules
            for _, tensor in own_tensors(module)
        ]
        calls = tuple(id(stage.call) for stage in stack.stages)
        now = (calls, stack.modes(), tuple(tensors), ambient, accumulate)
        self._expected = expected
        self._single = (False,) * len(stack.params) if single is None else tuple(single)
        if now != self._surroundings:
            self.clear()
            self._surroundings = now
            self._params, self._dtype = stack.params, accumulate
            # Not by a strong reference: Python does not find cycles through a tensor's hooks, so nothing would be freed.
            self.proxies = Proxies(stack.params, weakref.proxy(self))
        self._recorded = any(kind == "record" for kind, *_ in self.seen)

    def clear(self) -> None:
        """Let go of all graphs, their memory and the sums."""
        for held in (self.forwards, self.pairs, self.seen, self.sums, self.whole, self.given, self.refused):
            held.clear()
        self.proxies = ()
        self.boxes.clear()
        self.shared_tape = None
        self.renew_pool()

    def take_reserve(self) -> int:
        """Bytes to begin the shared memory with at the first pair of graphs in it, the largest that it will hold; else 0.

        What runs cells was captured before and lies in memory of its own, which is let go: it is captured anew. Begun any
        earlier, all that memory would lie idle beside the first pair's eager run.
        """
        if self._reserved or not self._expected:
            return 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forwards.clear()
        self.boxes.clear()
        self.renew_pool()
        self._reserved = True
        return self._expected

    def take_reserve_for_run(self) -> int:
        """The same before what runs cells is captured, if pairs ran eagerly in an earlier call, else 0.

        Where each cell is the only one of its kind, a second call captures everything: taken at its first pair, the reserve
        would drop what that call has captured, and a third would capture it again.
        """
        return self.take_reserve() if self._recorded else 0

    def renew_pool(self) -> None:
        """Capture in other memory from now on; graphs that are in the pool keep it for themselves."""
        self.pool, self._reserved = self.capturer.new_pool(), False

    def single_of(self, stages: Sequence[Stage]) -> frozenset[int]:
        """The stages' parameters of which one cell alone makes the gradient."""
        return frozenset(slot.index for stage in stages for slot in stage.slots if self._single[slot.index])

    # What proxies and the accumulator need (`magc.accumulate.LentSums`).
    def start_backward(self, single: Sequence[bool]) -> None:
        """Set the sums to zero and forget the gradients that cells made.

        ``single`` is as in `prepare`, which a call of another plan may have called since.
        """
        self._single = tuple(single)
        self.given.clear()
        for index, total in self.sums.items():
            if not self._single[index]:
                total.zero_()

    def add(self, index: int, grad: Tensor) -> None:
        """Take a gradient that autograd made."""
        room = self.room(index)
        if self._single[index]:
            room.copy_(grad)
            self.given.add(index)
        else:
            room.add_(grad)

    def total(self, index: int) -> Tensor | None:
        """The sum of a parameter's gradients; None if one cell alone makes it."""
        return None if self._single[index] else self.room(index)

    def held(self, index: int) -> Tensor | None:
        """Memory for a parameter's gradient, if there is any yet."""
        return (self.whole if self._single[index] else self.sums).get(index)

    def result(self, index: int) -> Tensor | None:
        """A parameter's gradient; None if none was made."""
        return None if self._single[index] and index not in self.given else self.held(index)

    def room(self, index: int) -> Tensor:
        """Memory for a parameter's gradient; stays where it is as long as the graphs do."""
        held = self.held(index)
        if held is None:
            param = self._params[index]
            if self._single[index]:
                held = self.whole[index] = torch.empty_like(param, requires_grad=False)
            else:
                dtype = torch.promote_types(param.dtype, self._dtype)
                held = self.sums[index] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return held

    def replays(self) -> tuple[Replay, Replay, Replay] | None:
        """Run, record and backward of the cell that was captured first, to be timed; None if none was."""
        forwards, pairs = list(self.forwards.values()), [pair for made in self.pairs.values() for pair in made]
        return (forwards[0].replay, pairs[0].record, pairs[0].backward) if forwards and pairs else None

    def notes(self) -> tuple[str, ...]:
        """What could not be captured, and why."""
        return tuple(f"{name} runs eagerly: {reason}" for name, reason in self.refused.items())


@dataclass(slots=True)
class _Forward:
    """A captured run of a cell."""

    replay: Replay
    inputs: CellInputs
    outputs: CellOutputs


@dataclass(slots=True)
class _Pair:
    """A captured recording of a cell and its captured backward.

    Attributes:
        inputs: boxes; these and those below are the pair's own unless it is shared.
        outputs: boxes; what is of no use is not in them.
        grad_y, grad_states: boxes for the gradients to back-propagate.
        grads: boxes with what comes of it.
        given: parameters of which it makes the gradient alone.
        shared: its memory is that of all graphs in the cache, so nothing else may be replayed between the two.
        busy: a recorded cell waits for its backward.
    """

    record: Replay
    backward: Replay
    inputs: CellInputs
    outputs: CellOutputs
    grad_y: Grads
    grad_states: tuple[Grads, ...]
    grads: CellGrads
    given: frozenset[int]
    shared: bool
    busy: bool = False


@dataclass(slots=True, weakref_slot=True)
class GraphTape:
    """A recorded cell: by the pair that holds it, or by the eager runner.

    Attributes:
        watched: the stages, if its backward is the first of its kind.
    """

    outputs: CellOutputs
    pair: _Pair | None
    eager: EagerTape | None
    watched: Sequence[Stage] = ()
    release: weakref.finalize[Any, Any] | None = field(default=None)

    def take_outputs(self) -> CellOutputs:
        """See `magc.runners.cell.Recorded`; those of a pair are copies, which it does not need."""
        outputs = self.outputs
        if self.pair is not None:
            self.outputs = _NOTHING
        return outputs


class GraphRunner:
    """Replays what is captured, captures what was seen before, and runs the rest eagerly; see `magc.runners.cell.Runner`."""

    def __init__(self, cache: GraphCache, eager: EagerRunner) -> None:
        self._cache = cache
        self._eager = eager

    def run(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        *,
        loss: bool = True,
        proxies: Sequence[nn.Parameter] | None = None,
    ) -> CellOutputs:
        """As `EagerRunner.run`, bit for bit."""
        cache = self._cache
        key = ("run", first, len(stages), signature(inputs), loss, proxies is None)

        def eager(given: CellInputs, own: Sequence[nn.Parameter] | None) -> CellOutputs:
            return self._eager.run(first, stages, given, loss=loss, proxies=own)

        if self._is_new(key):
            with self._noticing_waits(stages):
                return eager(inputs, proxies)
        if self._is_refused(stages) or cache.shared_tape is not None:
            return eager(inputs, proxies)
        forward = cache.forwards.get(key)
        if forward is None:
            reserve = cache.take_reserve_for_run()
            boxes = cache.boxes.inputs(inputs)
            own = None if proxies is None else cache.proxies
            captured = self._capture(stages, cache.pool, lambda: cache.boxes.take_outputs(eager(boxes, own)), reserve)
            if captured is None:
                return eager(inputs, proxies)
            forward = cache.forwards[key] = _Forward(captured[0], boxes, captured[1])
        fill_inputs(forward.inputs, inputs)
        forward.replay()
        return copied_outputs(forward.outputs)

    def record(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        needs: CellNeeds,
        proxies: Sequence[nn.Parameter],
        *,
        output_needed: bool = True,
    ) -> GraphTape:
        """As `EagerRunner.record`, bit for bit; the outputs are left out where they are not needed."""
        cache = self._cache
        key = ("record", first, len(stages), signature(inputs), needs, output_needed, cache.single_of(stages))
        is_new = self._is_new(key)
        pair = None
        if not is_new and not self._is_refused(stages):
            pair = self._free_pair(key, first, stages, inputs, needs, output_needed)
        if pair is None:
            with self._noticing_waits(stages) if is_new else nullcontext():
                tape = self._eager.record(first, stages, inputs, needs, proxies, output_needed=output_needed)
            return GraphTape(tape.outputs, None, tape, stages if is_new else ())
        fill_inputs(pair.inputs, inputs)
        pair.record()
        pair.busy = True
        if pair.shared:
            cache.shared_tape = pair
        tape = GraphTape(copied_outputs(pair.outputs), pair, None)
        tape.release = weakref.finalize(tape, _release, cache, pair)
        return tape

    def backward(
        self, tape: GraphTape, grad_y: Sequence[Tensor | None], grad_states: Sequence[Sequence[Tensor | None]]
    ) -> CellGrads:
        """As `EagerRunner.backward`; gradients that are None count as zeros."""
        if tape.eager is not None:
            with self._noticing_waits(tape.watched) if tape.watched else nullcontext():
                return self._eager.backward(tape.eager, grad_y, grad_states)
        pair = tape.pair
        assert pair is not None
        copy_into(pair.grad_y, grad_y)
        for boxes, grads in zip(pair.grad_states, grad_states, strict=True):
            copy_into(boxes, grads)
        pair.backward()
        self._cache.given |= pair.given
        grads = copied_grads(pair.grads)
        if tape.release is not None:
            tape.release()
        return grads

    # ------------------------------------------------------------------ capture
    def _is_new(self, key: tuple[object, ...]) -> bool:
        """Whether a cell is the first of its kind."""
        new = key not in self._cache.seen
        self._cache.seen.add(key)
        return new

    def _is_refused(self, stages: Sequence[Stage]) -> bool:
        return any(stage.name in self._cache.refused for stage in stages)

    @contextmanager
    def _noticing_waits(self, stages: Sequence[Stage]) -> Generator[None]:
        """Run a block eagerly and refuse the stages if it makes the host wait for the device, which no graph can hold.

        Found out before, because a capture that fails leaves torch's allocator in a state that cannot be mended.
        """
        with self._cache.capturer.waits() as found:
            yield
        if found:
            self._refuse(stages, "it waits for a value from the GPU")

    def _refuse(self, stages: Sequence[Stage], reason: str) -> None:
        for stage in stages:
            self._cache.refused.setdefault(stage.name, f"its cell cannot be captured ({reason})")

    def _free_pair(
        self,
        key: object,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        needs: CellNeeds,
        output_needed: bool,
    ) -> _Pair | None:
        """A pair of graphs that holds no tape; None if there can be none."""
        cache = self._cache
        pairs = cache.pairs.setdefault(key, [])
        shared = cache.shared_tape is None
        for pair in pairs:
            if not pair.busy and pair.shared == shared:
                return pair
        reserve = cache.take_reserve() if shared else 0
        for index in {slot.index for stage in stages for slot in stage.slots}:
            cache.room(index)  # made now: what is made in a capture lies in the graph's memory
        # What the backward reads must lie still until then, whatever runs in between. A box made in a capture lies in that
        # graph's memory, it may be where a tape was: only graphs that never run between a record and its backward, those
        # that share the memory, may share boxes.
        held = cache.boxes if shared else Boxes()
        boxes = held.inputs(inputs)
        pool = cache.pool if shared else cache.capturer.new_pool()
        tapes: list[EagerTape] = []

        def record() -> CellOutputs:
            tape = self._eager.record(first, stages, boxes, needs, cache.proxies, output_needed=output_needed)
            tapes[:] = [tape]
            return held.take_outputs(tape.outputs) if output_needed else _NOTHING

        recorded = self._capture(stages, pool, record, reserve)
        if recorded is None:
            return None
        grad_y, grad_states = held.gradients(tapes[0].outputs)

        def backward() -> CellGrads:
            return held.take_grads(self._eager.backward(tapes.pop(), grad_y, grad_states))

        before, cache.given = cache.given, set()
        replayed = self._capture(stages, pool, backward)
        given, cache.given = frozenset(cache.given), before
        if replayed is None:
            return None
        pair = _Pair(recorded[0], replayed[0], boxes, recorded[1], grad_y, grad_states, replayed[1], given, shared)
        pairs.append(pair)
        return pair

    def _capture(
        self, stages: Sequence[Stage], pool: object, body: Callable[[], Any], reserve: int = 0
    ) -> tuple[Replay, Any] | None:
        """Capture `body`; its replay and result. None, with the reason noted, if it does what a graph cannot hold."""
        results: list[Any] = []

        def captured() -> None:
            results[:] = [body()]

        try:
            replay = self._cache.capturer.capture(captured, pool, reserve)
        except CaptureError as error:
            self._refuse(stages, str(error))
            # The failed capture may still own the pool.
            self._cache.renew_pool()
            return None
        return replay, results[0]


_NOTHING = CellOutputs(flatten("nothing", ()), ())


def _release(cache: GraphCache, pair: _Pair) -> None:
    pair.busy = False
    if cache.shared_tape is pair:
        cache.shared_tape = None
