"""The CUDA-graph cell runner: cells of one kind are captured once and replayed for every segment.

A deep cell of few tokens launches thousands of kernels, which takes the host several times as long as the GPU takes to
run them. All cells of a kind (the same layers and shapes) run the same kernels, so they are captured as CUDA graphs that
work on buffers of their own: inputs are copied in, outputs out. One graph runs a cell; a pair of graphs records it and
back-propagates it, the tape between them lying in the graphs' memory.

The first cell of each kind runs eagerly, which compiles and sets up whatever does so at its first use; the second is
captured. Random numbers are those of the eager runner: a replay takes its offsets from the generator's state.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from magc.accumulate import make_proxies
from magc.ambient import Ambient
from magc.errors import LayerContractError
from magc.runners.cell import CellGrads, CellInputs, CellNeeds, CellOutputs
from magc.runners.eager import EagerRunner
from magc.runners.eager import Tape as EagerTape
from magc.stack import Stack, Stage
from magc.tree import Flat, duplicate, flatten, is_differentiable


class GraphCache:
    """Captured cells of one stack, kept from call to call, and the sums that they add parameter gradients to.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forwards: dict[object, _Forward] = {}
        self.pairs: dict[object, list[_Pair]] = {}
        self.seen: set[object] = set()
        self.refused: dict[str, str] = {}
        self.sums: dict[int, Tensor] = {}
        self.proxies: list[nn.Parameter] = []
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.shared_tape: _Pair | None = None
        self._params: tuple[nn.Parameter, ...] = ()
        self._dtype = torch.float32
        self._surroundings: object = None

    def prepare(self, stack: Stack, ambient: Ambient, accumulate: torch.dtype) -> None:
        """Drop everything captured if it would not be the same function any more.

        Graphs hold addresses: of parameters and buffers. They hold decisions too: training mode, autocast, deterministic
        algorithms, which parameters are frozen.
        """
        tensors = [
            (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
            for stage in stack.stages
            for module in stage.modules
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        ]
        calls = tuple(id(stage.call) for stage in stack.stages)
        now = (calls, stack.modes(), tuple(tensors), ambient, accumulate)
        if now != self._surroundings:
            self.clear()
            self._surroundings = now
            self._params, self._dtype = stack.params, accumulate
            self.proxies = make_proxies(stack.params, self)

    def clear(self) -> None:
        """Let go of all graphs, their memory and the sums."""
        for held in (self.forwards, self.pairs, self.seen, self.sums, self.refused):
            held.clear()
        self.proxies = []
        self.shared_tape = None
        self.pool = torch.cuda.graph_pool_handle()

    def start_backward(self) -> None:
        """Set all sums to zero."""
        for total in self.sums.values():
            total.zero_()

    # What proxies need (`magc.accumulate.GradSink`).
    def add(self, index: int, grad: Tensor) -> None:
        """Add a gradient that autograd made."""
        self.total(index).add_(grad)

    def total(self, index: int) -> Tensor:
        """The sum of a parameter's gradients; stays where it is as long as the graphs do."""
        if index not in self.sums:
            param = self._params[index]
            dtype = torch.promote_types(param.dtype, self._dtype)
            self.sums[index] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return self.sums[index]

    def notes(self) -> tuple[str, ...]:
        """What could not be captured, and why."""
        return tuple(f"{name} runs eagerly: {reason}" for name, reason in self.refused.items())


@dataclass(slots=True)
class _Buffers:
    """The inputs that a graph reads."""

    x: Flat
    states: tuple[Flat | None, ...]
    side: dict[str, Flat]
    targets: Flat | None

    @classmethod
    def like(cls, inputs: CellInputs) -> _Buffers:
        x, states, side, targets = _flat(inputs)
        return cls(
            x.map(duplicate),
            tuple(None if state is None else state.map(duplicate) for state in states),
            {name: flat.map(duplicate) for name, flat in side.items()},
            None if targets is None else targets.map(duplicate),
        )

    def fill(self, inputs: CellInputs) -> None:
        x, states, side, targets = _flat(inputs)
        pairs = [(self.x, x), *((self.side[name], flat) for name, flat in side.items())]
        pairs += [
            (old, new) for old, new in zip(self.states, states, strict=True) if old is not None and new is not None
        ]
        if self.targets is not None and targets is not None:
            pairs.append((self.targets, targets))
        for buffer, value in pairs:
            _copy(buffer.leaves, value.leaves)

    def inputs(self) -> CellInputs:
        side = {name: flat.tree() for name, flat in self.side.items()}
        return CellInputs(self.x, self.states, side, None if self.targets is None else self.targets.tree())


@dataclass(slots=True)
class _Forward:
    """A captured run of a cell."""

    graph: torch.cuda.CUDAGraph
    buffers: _Buffers
    outputs: CellOutputs


@dataclass(slots=True)
class _Pair:
    """A captured recording of a cell and its captured backward.

    Attributes:
        shared: its memory is that of all graphs in the cache, so nothing else may be replayed between the two.
        busy: a recorded cell waits for its backward.
    """

    record: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    buffers: _Buffers
    outputs: CellOutputs
    grad_y: tuple[Tensor | None, ...]
    grad_states: tuple[tuple[Tensor | None, ...], ...]
    grads: CellGrads
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
        key = ("run", first, len(stages), _signature(inputs), loss, proxies is None)

        def eager(given: CellInputs, own: Sequence[nn.Parameter] | None) -> CellOutputs:
            return self._eager.run(first, stages, given, loss=loss, proxies=own)

        if self._is_new(key):
            with self._noticing_waits(stages):
                return eager(inputs, proxies)
        if self._is_refused(stages) or cache.shared_tape is not None:
            return eager(inputs, proxies)
        forward = cache.forwards.get(key)
        if forward is None:
            buffers = _Buffers.like(inputs)
            own = None if proxies is None else cache.proxies

            def body() -> CellOutputs:
                outputs = eager(buffers.inputs(), own)
                return CellOutputs(outputs.y.map(Tensor.detach), tuple(s.map(Tensor.detach) for s in outputs.states))

            captured = self._capture(stages, cache.pool, body)
            if captured is None:
                return eager(inputs, proxies)
            forward = cache.forwards[key] = _Forward(captured[0], buffers, captured[1])
        forward.buffers.fill(inputs)
        forward.graph.replay()
        return _copied(forward.outputs)

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
        """As `EagerRunner.record`, bit for bit."""
        cache = self._cache
        key = ("record", first, len(stages), _signature(inputs), needs, output_needed)
        is_new = self._is_new(key)
        pair = None
        if not is_new and not self._is_refused(stages):
            pair = self._free_pair(key, first, stages, inputs, needs, output_needed)
        if pair is None:
            with self._noticing_waits(stages) if is_new else nullcontext():
                tape = self._eager.record(first, stages, inputs, needs, proxies, output_needed=output_needed)
            return GraphTape(tape.outputs, None, tape, stages if is_new else ())
        pair.buffers.fill(inputs)
        pair.record.replay()
        pair.busy = True
        if pair.shared:
            cache.shared_tape = pair
        outputs = _copied(pair.outputs) if output_needed else pair.outputs
        tape = GraphTape(outputs, pair, None)
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
        _copy(pair.grad_y, grad_y)
        for buffers, grads in zip(pair.grad_states, grad_states, strict=True):
            _copy(buffers, grads)
        pair.backward.replay()
        grads = CellGrads(_clones(pair.grads.x), tuple(_clones(state) for state in pair.grads.states))
        if tape.release is not None:
            tape.release()
        return grads

    # ------------------------------------------------------------------ capture
    def _is_new(self, key: object) -> bool:
        """Whether a cell is the first of its kind."""
        new = key not in self._cache.seen
        self._cache.seen.add(key)
        return new

    def _is_refused(self, stages: Sequence[Stage]) -> bool:
        return any(stage.name in self._cache.refused for stage in stages)

    @contextmanager
    def _noticing_waits(self, stages: Sequence[Stage]) -> Generator[None]:
        """Run a block eagerly and refuse the stages if it makes the host wait for the GPU, which no graph can hold.

        Found out before, because a capture that fails leaves torch's allocator in a state that cannot be mended.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                self._refuse(stages, "it waits for a value from the GPU")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

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
        wants_shared = cache.shared_tape is None
        for pair in pairs:
            if not pair.busy and pair.shared == wants_shared:
                return pair
        for index in {slot.index for stage in stages for slot in stage.slots}:
            cache.total(index)  # made now: what is made in a capture lies in the graph's memory
        buffers = _Buffers.like(inputs)
        pool = cache.pool if wants_shared else torch.cuda.graph_pool_handle()

        def recording() -> EagerTape:
            return self._eager.record(
                first, stages, buffers.inputs(), needs, cache.proxies, output_needed=output_needed
            )

        recorded = self._capture(stages, pool, recording)
        if recorded is None:
            return None
        record, tape = recorded
        grad_y = tuple(_grad_buffer(leaf) for leaf in tape.outputs.y.leaves)
        grad_states = tuple(tuple(_grad_buffer(leaf) for leaf in state.leaves) for state in tape.outputs.states)
        outputs = CellOutputs(
            tape.outputs.y.map(Tensor.detach), tuple(state.map(Tensor.detach) for state in tape.outputs.states)
        )
        replayed = self._capture(stages, pool, lambda: self._eager.backward(tape, grad_y, grad_states))
        if replayed is None:
            return None
        pair = _Pair(record, replayed[0], buffers, outputs, grad_y, grad_states, replayed[1], wants_shared)
        pairs.append(pair)
        return pair

    def _capture(
        self, stages: Sequence[Stage], pool: Any, body: Callable[[], Any]
    ) -> tuple[torch.cuda.CUDAGraph, Any] | None:
        """Capture `body`; None, with the reason noted, if it does what a graph cannot hold."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._cache.stream, capture_error_mode="thread_local"):
                result = body()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, LayerContractError):
                raise
            torch.cuda.synchronize(self._cache.device)
            self._refuse(stages, str(error).strip().splitlines()[0])
            # The failed capture may still own the pool; graphs that are in it keep it for themselves.
            self._cache.pool = torch.cuda.graph_pool_handle()
            return None
        return graph, result


def _release(cache: GraphCache, pair: _Pair) -> None:
    pair.busy = False
    if cache.shared_tape is pair:
        cache.shared_tape = None


# ---------------------------------------------------------------------- values
def _flat(inputs: CellInputs) -> tuple[Flat, tuple[Flat | None, ...], dict[str, Flat], Flat | None]:
    side = {name: flatten(name, tree) for name, tree in inputs.side.items()}
    return inputs.x, inputs.states, side, None if inputs.targets is None else flatten("targets", inputs.targets)


def _signature(inputs: CellInputs) -> object:
    """Equal for inputs that one graph serves."""
    x, states, side, targets = _flat(inputs)
    named = tuple((name, _shape(flat)) for name, flat in side.items())
    return _shape(x), tuple(_shape(state) for state in states), named, _shape(targets)


def _shape(flat: Flat | None) -> object:
    if flat is None:
        return None
    leaves = tuple(None if leaf is None else (tuple(leaf.shape), leaf.dtype) for leaf in flat.leaves)
    return str(flat.spec), leaves


def _grad_buffer(leaf: Tensor | None) -> Tensor | None:
    """Zeros to copy an output's gradient into; None if it can have none."""
    wanted = leaf is not None and leaf.requires_grad and is_differentiable(leaf)
    return torch.zeros_like(leaf, requires_grad=False) if leaf is not None and wanted else None


def _copy(buffers: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        if buffer is None:
            continue
        if value is None:
            buffer.zero_()
        else:
            buffer.copy_(value)


def _clones(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.clone() for tensor in tensors)


def _copied(outputs: CellOutputs) -> CellOutputs:
    return CellOutputs(outputs.y.map(torch.clone), tuple(state.map(torch.clone) for state in outputs.states))
