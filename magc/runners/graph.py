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

from torch import Tensor, nn

from magc.runners.boxes import (
    Boxes,
    copied_grads,
    copied_outputs,
    copy_into,
    fill_inputs,
    signature,
)
from magc.runners.cache import CapturedPair, CapturedRun, GraphCache
from magc.runners.capture import CaptureError, Replay
from magc.runners.cell import CellGrads, CellInputs, CellNeeds, CellOutputs
from magc.runners.eager import EagerRunner
from magc.runners.eager import Tape as EagerTape
from magc.stack import Stage
from magc.tree import flatten


@dataclass(slots=True, weakref_slot=True)
class GraphTape:
    """A recorded cell: by the pair that holds it, or by the eager runner.

    Attributes:
        watched: the stages, if its backward is the first of its kind.
    """

    outputs: CellOutputs
    pair: CapturedPair | None
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
            forward = cache.forwards[key] = CapturedRun(captured[0], boxes, captured[1])
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
    ) -> CapturedPair | None:
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
        pair = CapturedPair(
            recorded[0], replayed[0], boxes, recorded[1], grad_y, grad_states, replayed[1], given, shared
        )
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


def _release(cache: GraphCache, pair: CapturedPair) -> None:
    pair.busy = False
    if cache.shared_tape is pair:
        cache.shared_tape = None
