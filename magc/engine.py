"""The executor: carries out a schedule's actions on tensors, nothing more and in that order.

Deciding is elsewhere (``magc.planner``, ``magc.schedule``). A first-time run and its recomputation go through the same
runner under the same random numbers and autocast, so the recomputed values are the first ones, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magc.accumulate import Proxies
from magc.ambient import Ambient, RngState, RngTape, recomputing
from magc.collect import GradInput, LossOutput, OutputCollector, TokenOutput
from magc.errors import LayerContractError, RecomputeError
from magc.request import Request
from magc.runners.cell import CellInputs, CellNeeds, CellOutputs, Recorded, Runner, differentiable_mask
from magc.runners.eager import EagerRunner
from magc.runners.graph import GraphRunner
from magc.schedule import Action, Backward, Drop, Fetch, Forget, Kind, Load, Record, Run, Save, Schedule
from magc.store import CheckpointStore
from magc.tree import Flat, compact, describe, version
from magc.walk import own_tensors


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Output of the whole sequence (summed loss and count under a head) and each layer's final state."""

    y: Flat
    states: tuple[Flat, ...]


@dataclass(frozen=True, slots=True)
class BackwardResult:
    """Gradients of the input's leaves, of each initial state's leaves, and of the stack's parameters."""

    x: list[Tensor | None]
    states: list[tuple[Tensor | None, ...]]
    params: list[Tensor | None]


class Execution:
    """One forward over a grid, and its backward."""

    def __init__(self, request: Request, schedule: Schedule) -> None:
        self._request = request
        self._schedule = schedule
        self._grid = schedule.grid
        self._ambient = Ambient.capture(request.device)
        self._bounds = list(self._grid.layers.all_bounds())
        self._groups = [request.stack.group(start, stop) for start, stop in self._bounds]
        single = self._single_use()
        self._runner: Runner[Any] = EagerRunner(request.stack, self._ambient)
        if request.graphs is not None:
            plan = schedule.plan
            expected = 0 if plan.forecast is None else plan.forecast.replay_bytes(plan)
            request.graphs.prepare(request.stack, self._ambient, request.accumulate, single=single, expected=expected)
            self._runner = GraphRunner(request.graphs, self._runner)
        self._modes = request.stack.modes()
        self._watched = list(_unsaved(request)) if schedule.lowest < schedule.grid.groups else []
        self._rng = RngTape(request.device)
        self._rng_start = RngState.capture(request.device)
        self._store = CheckpointStore(request.device, request.disk_dir, pool=request.pool)
        self._initial = tuple(None if state is None else state.map(Tensor.detach) for state in request.states)
        self._accumulator = request.accumulator(request.stack.params, request.accumulate, single, request.graphs)
        self._proxies: Sequence[nn.Parameter] | None = None
        self._borders: dict[tuple[int, int], Flat] = {}
        self._states: dict[tuple[int, int], tuple[Flat | None, ...]] = {}
        self._specs: dict[int, Flat] = {}
        self._state_specs: dict[int, tuple[Flat | None, ...]] = {}
        self._tapes: dict[tuple[int, int], Recorded] = {}
        self._grad_y: Sequence[Tensor | None] = ()
        self._grad_border: dict[int, tuple[Tensor | None, ...]] = {}
        self._grad_states: dict[int, tuple[tuple[Tensor | None, ...], ...]] = {}
        self._first_pass = True
        self._y: OutputCollector | None = None
        self._grad_x: GradInput | None = None
        self.spent = False

    def _single_use(self) -> list[bool]:
        """For each parameter, whether only one cell uses it."""
        users, segments = [0] * len(self._request.stack.params), self._grid.segments
        for stages in self._groups:
            for index in {slot.index for stage in stages for slot in stage.slots}:
                users[index] += segments
        return [count == 1 for count in users]

    # ------------------------------------------------------------------ passes
    def forward(self) -> ForwardResult:
        """Carry out the forward actions.

        Raises:
            LayerContractError, InputError, StoreError: as they occur; what was stored is removed.
        """
        request = self._request
        self._y = TokenOutput(self._grid, request.stack, request.inputs) if request.stack.head is None else LossOutput()
        if request.grad:
            self._proxies = Proxies(request.stack.params, self._accumulator)
        self._do(self._schedule.forward())
        states: list[Flat] = []
        for group in range(self._grid.groups):
            finals = self._states.pop((group, self._grid.segments))
            states.extend(final.map(compact) for final in finals if final is not None)
        result = ForwardResult(self._y.result(), tuple(states))
        self._y = None
        return result

    def require_unchanged(self) -> None:
        """Refuse a backward whose recompute would be another function than the forward was.

        Raises:
            RecomputeError: a module was switched between training and evaluation since the forward, or a buffer, a
                frozen parameter, a side input or the targets were written into. (Trainable parameters, x and initial
                states are saved tensors, which torch checks.)
        """
        if self._request.stack.modes() != self._modes:
            raise RecomputeError(
                "a layer was switched between train() and eval() after the forward, so its recompute would be another "
                "function; call backward() before switching"
            )
        for what, tensor, before in self._watched:
            if version(tensor) != before:
                raise RecomputeError(
                    f"{what} ({describe(tensor)}) was modified in place after the forward, so a recompute would be "
                    f"another function; call backward() before modifying it, or give the forward a copy"
                )

    def rewind(self) -> Execution:
        """A fresh execution of the same request whose forward was carried out again (for a second backward)."""
        with self._ambient.restored():
            again = Execution(self._request, self._schedule)
        again._modes, again._watched = self._modes, self._watched
        before = RngState.capture(self._request.device)
        self._rng_start.restore(self._request.device)
        try:
            with recomputing(), torch.no_grad(), self._ambient.restored():
                again.forward()
        finally:
            before.restore(self._request.device)
        return again

    def backward(
        self, grad_y: Sequence[Tensor | None], grad_states: Sequence[tuple[Tensor | None, ...]]
    ) -> BackwardResult:
        """Carry out the backward actions.

        Args:
            grad_y: gradients of the output's leaves (of the summed loss under a head).
            grad_states: gradients of each layer's final state.

        Raises:
            RecomputeError: as `require_unchanged`.
        """
        request, grid = self._request, self._grid
        self.require_unchanged()
        self.spent = True
        self._first_pass = False
        self._grad_y = grad_y
        self._accumulator.start()
        self._grad_x = GradInput(grid, request.stack.seq_dim, request.inputs, request.needs_x)
        for group, (start, stop) in enumerate(self._bounds):
            self._grad_states[group] = tuple(grad_states[start:stop])
        before = RngState.capture(request.device)
        try:
            with recomputing(), self._ambient.restored():
                self._do(self._schedule.backward())
            return BackwardResult(
                self._grad_x.result(),
                [grads for group in range(grid.groups) for grads in self._initial_grads(group)],
                self._accumulator.deliver(),
            )
        finally:
            before.restore(request.device)
            self.close()

    def _initial_grads(self, group: int) -> tuple[tuple[Tensor | None, ...], ...]:
        if group >= self._schedule.lowest:
            return self._grad_states.pop(group)
        start, stop = self._bounds[group]
        return tuple((None,) * len(needs) for needs in self._request.needs_states[start:stop])

    def close(self) -> None:
        """Let go of all checkpoints; files are removed."""
        self._store.close()
        for held in (self._borders, self._states, self._tapes, self._grad_border, self._grad_states):
            held.clear()
        self._proxies = None
        self._grad_x = None

    def _do(self, actions: Iterable[Action]) -> None:
        observer = self._request.observer
        try:
            for action in actions:
                match action:
                    case Run(group, segment):
                        self._run(group, segment)
                    case Record(group, segment):
                        self._record(group, segment)
                    case Backward(group, segment):
                        self._backward(group, segment)
                    case Save(kind, group, segment, tier):
                        self._store.put((kind, group, segment), self._live(kind, group, segment), tier)
                    case Fetch(kind, group, segment):
                        self._store.fetch((kind, group, segment))
                    case Load(kind, group, segment):
                        self._make_live(kind, group, segment, self._store.get((kind, group, segment)))
                    case Drop(kind, group, segment):
                        self._store.drop((kind, group, segment))
                    case Forget(kind, group, segment):
                        (self._borders if kind is Kind.BORDER else self._states).pop((group, segment), None)
                if observer is not None:
                    observer(action)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ live values
    def _live(self, kind: Kind, group: int, segment: int) -> list[Tensor | None]:
        if kind is Kind.BORDER:
            return list(self._borders[group, segment].leaves)
        return [leaf for state in self._states[group, segment] if state is not None for leaf in state.leaves]

    def _make_live(self, kind: Kind, group: int, segment: int, tensors: list[Tensor | None]) -> None:
        if kind is Kind.BORDER:
            self._borders[group, segment] = self._specs[group].with_leaves(tensors)
            return
        states: list[Flat | None] = []
        for spec in self._state_specs[group]:
            count = 0 if spec is None else len(spec.leaves)
            states.append(None if spec is None else spec.with_leaves(tensors[:count]))
            tensors = tensors[count:]
        self._states[group, segment] = tuple(states)

    def _take_inputs(self, group: int, segment: int, *, loss: bool) -> CellInputs:
        request = self._request
        start, stop = self._grid.tokens.bounds(segment)
        x = request.inputs.segment(start, stop) if group == 0 else self._borders.pop((group, segment))
        first, last = self._bounds[group]
        states = self._initial[first:last] if segment == 0 else self._states.pop((group, segment))
        side = {name: source.segment(start, stop).tree() for name, source in request.side.items()}
        wants_targets = request.targets is not None and loss and group == self._grid.groups - 1
        targets = request.targets.segment(start, stop).tree() if request.targets is not None and wants_targets else None
        return CellInputs(x, states, side, targets)

    def _give_outputs(self, group: int, segment: int, outputs: CellOutputs) -> None:
        if group + 1 < self._grid.groups:
            border = outputs.y.map(Tensor.detach)
            self._borders[group + 1, segment] = border
            spec = self._specs.setdefault(group + 1, border.with_leaves([None] * len(border.leaves))).spec
            if border.spec != spec:
                raise LayerContractError(
                    f"{self._groups[group][-1].name} returned an output of structure {border.spec} for segment "
                    f"{segment} but {spec} before; the structure must stay the same in every segment"
                )
        elif self._first_pass and self._y is not None:
            self._y.add(self._grid.tokens.bounds(segment), outputs.y)
        states = tuple(state.map(Tensor.detach) for state in outputs.states)
        self._states[group, segment + 1] = states
        self._state_specs.setdefault(group, tuple(state.with_leaves([None] * len(state.leaves)) for state in states))

    # ------------------------------------------------------------------ cells
    def _run(self, group: int, segment: int) -> None:
        self._set_rng(group, segment)
        inputs = self._take_inputs(group, segment, loss=self._first_pass)
        outputs = self._runner.run(
            self._bounds[group][0], self._groups[group], inputs, loss=self._first_pass, proxies=self._proxies
        )
        self._give_outputs(group, segment, outputs)

    def _record(self, group: int, segment: int) -> None:
        self._set_rng(group, segment)
        assert self._proxies is not None
        inputs = self._take_inputs(group, segment, loss=True)
        tape = self._runner.record(
            self._bounds[group][0],
            self._groups[group],
            inputs,
            self._needs(group, segment, inputs),
            self._proxies,
            output_needed=self._first_pass,
        )
        self._tapes[group, segment] = tape
        if self._first_pass:
            self._give_outputs(group, segment, tape.take_outputs())

    def _needs(self, group: int, segment: int, inputs: CellInputs) -> CellNeeds:
        request = self._request
        first, last = self._bounds[group]
        if group == 0:
            x = request.needs_x or (False,) * len(inputs.x.leaves)  # none are known of a source that is not tensors
        else:
            x = tuple(need and group > self._schedule.lowest for need in differentiable_mask(inputs.x))
        if segment == 0:
            states = request.needs_states[first:last]
        else:
            states = tuple(() if state is None else differentiable_mask(state) for state in inputs.states)
        return CellNeeds(x, states)

    def _set_rng(self, group: int, segment: int) -> None:
        if self._first_pass:
            self._rng.record((group, segment))
        else:
            self._rng.restore((group, segment))

    def _backward(self, group: int, segment: int) -> None:
        grid, request = self._grid, self._request
        tape = self._tapes.pop((group, segment))
        if group + 1 < grid.groups:
            grad_y = self._grad_border.pop(group + 1)
        elif request.stack.head is not None:
            grad_y = tuple(self._grad_y)
        else:
            start, stop = grid.tokens.bounds(segment)
            grad_y = tuple(
                None if grad is None else grad.narrow(request.stack.seq_dim, start, stop - start)
                for grad in self._grad_y
            )
        grads = self._runner.backward(tape, grad_y, self._grad_states.pop(group))
        self._grad_states[group] = grads.states
        if group == 0 and self._grad_x is not None:
            self._grad_x.add(grid.tokens.bounds(segment), grads.x)
        elif group > self._schedule.lowest:
            self._grad_border[group] = grads.x


def _unsaved(request: Request) -> Iterator[tuple[str, Tensor, int]]:
    """What a recompute reads beside the tensors that autograd saves: a name, the tensor, its version now."""
    for stage in request.stack.stages:
        for module in stage.modules:
            for name, tensor in own_tensors(module):
                if not tensor.requires_grad:
                    yield f"{name!r} of {stage.name}", tensor, version(tensor)
    for source in (*request.side.values(), *(() if request.targets is None else (request.targets,))):
        for path, leaf in zip(source.flat.paths(), source.flat.leaves, strict=True):
            if leaf is not None:
                yield f"{source.what}{path}", leaf, version(leaf)
