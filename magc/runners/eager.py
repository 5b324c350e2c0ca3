"""The eager cell runner: runs a cell's stages one after another, anywhere torch runs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from magc.ambient import Ambient, output_unneeded
from magc.contract import call_layer
from magc.errors import InputError, LayerContractError
from magc.runners.cell import CellGrads, CellInputs, CellNeeds, CellOutputs
from magc.stack import Stack, Stage, StageKind, swapped
from magc.tree import Flat, PyTree, compact, describe, duplicate, flatten, version
from magc.walk import own_buffers


@dataclass(slots=True)
class Tape:
    """A recorded cell: its graph from leaves to outputs."""

    x: tuple[Tensor | None, ...]
    states: tuple[tuple[Tensor | None, ...], ...]
    outputs: CellOutputs

    def take_outputs(self) -> CellOutputs:
        """See `magc.runners.cell.Recorded`; the graph begins at these."""
        return self.outputs


class EagerRunner:
    """Runs, records and back-propagates cells with torch's autograd."""

    def __init__(self, stack: Stack, ambient: Ambient) -> None:
        self._stack = stack
        self._ambient = ambient

    # ------------------------------------------------------------------ forward
    def run(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        *,
        loss: bool = True,
        proxies: Sequence[nn.Parameter] | None = None,
    ) -> CellOutputs:
        """Run without recording.

        Args:
            first: index of the cell's first layer, by which the stack remembers what it learns about the group.
            stages: the cell's stages.
            inputs: what it runs on, without a gradient history; never written into.
            loss: whether to run the head, where the cell has one; without it ``y`` is the head's input.
            proxies: leaves standing for the stack's parameters, None when nothing will be back-propagated. With them a
                stage that rounds differently in grad mode (oneDNN's LSTM) runs in it, so that the recorded values will
                have the same bits; so does every stage the first time, when its graph is searched for parameters that
                are not its own. That graph goes before the next stage runs.

        Raises:
            LayerContractError: as `record`.
        """
        if not loss:
            stages = [stage for stage in stages if stage.kind is not StageKind.HEAD]
        if proxies is None:
            with torch.no_grad():
                return self._call(first, stages, inputs)
        with torch.no_grad(), swapped(stages, proxies):
            return self._call(first, stages, inputs, cut=proxies)

    def record(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        needs: CellNeeds,
        proxies: Sequence[nn.Parameter],
        *,
        output_needed: bool = True,
    ) -> Tape:
        """Run and keep the graph.

        Args:
            first: index of the cell's first layer.
            stages: the cell's stages.
            inputs: what it runs on; never written into.
            needs: which of them need gradients.
            proxies: leaves standing for the stack's parameters.
            output_needed: whether the values of the border that comes out matter; see `magc.ambient.is_output_needed`.

        Raises:
            LayerContractError: the graph reaches a tensor that needs a gradient but belongs neither to the cell's
                inputs nor to its registered parameters.
        """
        x = _leaves(inputs.x.leaves, needs.x)
        states = tuple(
            () if state is None else _leaves(state.leaves, need)
            for state, need in zip(inputs.states, needs.states, strict=True)
        )
        leaves = CellInputs(
            inputs.x.with_leaves(x),
            tuple(
                None if old is None else old.with_leaves(new) for old, new in zip(inputs.states, states, strict=True)
            ),
            inputs.side,
            inputs.targets,
        )
        with torch.enable_grad(), swapped(stages, proxies):
            outputs = self._call(first, stages, leaves, output_needed=output_needed)
        self._verify(stages, outputs, [*x, *(leaf for state in states for leaf in state)], proxies)
        return Tape(x, states, outputs)

    # ------------------------------------------------------------------ backward
    def backward(
        self, tape: Tape, grad_y: Sequence[Tensor | None], grad_states: Sequence[Sequence[Tensor | None]]
    ) -> CellGrads:
        """Back-propagate a recorded cell; parameter gradients go to the proxies' accumulator. Uses the tape up."""
        outputs = [*tape.outputs.y.leaves, *(leaf for state in tape.outputs.states for leaf in state.leaves)]
        grads = [*grad_y, *(grad for state in grad_states for grad in state)]
        roots = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if output is not None and output.requires_grad and grad is not None
        ]
        tape.outputs = CellOutputs(tape.outputs.y.with_leaves([None] * len(tape.outputs.y.leaves)), ())
        del outputs, grads
        # What comes out as it went in (an nn.Identity for a stem) has no graph. Its gradient is complete, and from torch
        # would come with a warning that it crosses streams in a capture.
        inputs = {
            id(leaf) for leaf in (*tape.x, *(leaf for state in tape.states for leaf in state)) if leaf is not None
        }
        made = [pair for pair in roots if id(pair[0]) not in inputs]
        if made:
            torch.autograd.backward([root for root, _ in made], [grad for _, grad in made])
        for leaf, grad in roots:
            if id(leaf) in inputs:
                leaf.grad = grad.clone() if leaf.grad is None else leaf.grad + grad
        return CellGrads(
            tuple(_take_grad(leaf) for leaf in tape.x),
            tuple(tuple(_take_grad(leaf) for leaf in state) for state in tape.states),
        )

    # ------------------------------------------------------------------ the stages
    def _verify(
        self,
        stages: Sequence[Stage],
        outputs: CellOutputs,
        leaves: Sequence[Tensor | None],
        proxies: Sequence[nn.Parameter],
    ) -> None:
        """Search the graph of these stages for unknown parameters, unless it was searched before."""
        names = {stage.name for stage in stages}
        if not names <= self._stack.memory.verified:
            _refuse_unknown_leaves(stages, outputs, [*leaves, *proxies])
            self._stack.memory.verified |= names

    def _call(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        cut: Sequence[nn.Parameter] | None = None,
        *,
        output_needed: bool = True,
    ) -> CellOutputs:
        key = (first, len(stages))
        writes_input = self._stack.memory.writes_input.get(key)
        x_flat = inputs.x
        if writes_input is not False:
            # Until the group is known to leave its input alone it works on a copy: the input is a checkpoint, or the
            # caller's own tensor.
            x_flat = x_flat.map(duplicate)
        versions = [None if leaf is None else version(leaf) for leaf in x_flat.leaves]
        outputs = self._call_stages(stages, inputs, x_flat.tree(), cut, output_needed)
        wrote = any(
            leaf is not None and before != version(leaf) for leaf, before in zip(x_flat.leaves, versions, strict=True)
        )
        if writes_input is None:
            self._stack.memory.writes_input[key] = wrote
        elif wrote and not writes_input:
            raise LayerContractError(
                f"{stages[0].name} wrote into its input although it did not when it was first run, so a checkpoint may "
                f"be damaged. Write into a copy (x.clone()) or use the out-of-place form of the operation"
            )
        return outputs

    def _call_stages(
        self,
        stages: Sequence[Stage],
        inputs: CellInputs,
        x: PyTree,
        cut: Sequence[nn.Parameter] | None,
        output_needed: bool,
    ) -> CellOutputs:
        """Call stages in a row; with ``cut``, the leaves of their graphs, a stage's graph is let go of at once."""
        new_states: list[Flat] = []
        states = iter(inputs.states)
        for stage in stages:
            watched = [] if stage.name in self._stack.memory.keeps_buffers else _buffer_versions(stage)
            in_grad_mode = cut is not None and (
                stage.rounds_by_grad_mode or stage.name not in self._stack.memory.verified
            )
            with _noting(stage), torch.set_grad_enabled(in_grad_mode or torch.is_grad_enabled()):
                if stage.kind is StageKind.STEM:
                    x = stage.call(x)
                elif stage.kind is StageKind.HEAD:
                    x = _call_head(stage, x, inputs.targets)
                else:
                    state = next(states)
                    if state is not None and stage.name not in self._stack.memory.keeps_state:
                        # It is a checkpoint, or the caller's own: an error alone would come too late for it.
                        state = state.map(duplicate)
                    unread = not output_needed and stage is stages[-1]
                    with output_unneeded(stage.call) if unread else nullcontext():
                        x, new_state = call_layer(
                            stage.name, stage.call, x, state, inputs.side, stateless_layer=stage.stateless
                        )
                    if state is not None:
                        self._stack.memory.keeps_state.add(stage.name)
                    new_states.append(new_state)
            if cut is not None and in_grad_mode:
                y = flatten("the output of the layers", x)
                made = new_states[-1:] if stage.kind is StageKind.LAYER else []
                self._verify((stage,), CellOutputs(y, tuple(made)), (), cut)
                x = y.map(Tensor.detach).tree()
                new_states[len(new_states) - len(made) :] = [state.map(Tensor.detach) for state in made]
            _refuse_written_buffers(stage, watched)
            self._stack.memory.keeps_buffers.add(stage.name)
            self._ambient.forget_casts()
        return CellOutputs(flatten("the output of the layers", x), tuple(new_states))


@contextmanager
def _noting(stage: Stage) -> Generator[None]:
    """Add to an exception which stage raised it."""
    try:
        yield
    except LayerContractError:
        raise
    except Exception as error:
        error.add_note(f"raised while magc ran {stage.name}")
        raise


def _call_head(stage: Stage, y: PyTree, targets: PyTree) -> tuple[Tensor, Tensor | None]:
    result: object = stage.call(y, targets)
    pair = cast(tuple[object, ...], result) if isinstance(result, tuple) else ()
    if len(pair) != 2 or not isinstance(pair[0], Tensor) or pair[0].dim() != 0:
        got = describe(result) if isinstance(result, Tensor) else type(cast(object, result)).__name__
        raise InputError(
            f"{stage.name} returned {got}, but a head returns (summed loss of the segment as a 0-dim tensor, count)"
        )
    loss, count = pair[0], pair[1]
    if not isinstance(count, Tensor):
        count = torch.tensor(float(cast(float, count)), device=loss.device)
    return loss, count.detach()


def _leaves(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def _take_grad(leaf: Tensor | None) -> Tensor | None:
    if leaf is None or not leaf.requires_grad:
        return None
    grad, leaf.grad = leaf.grad, None
    # A state's gradient is often a few rows of a gradient of the whole segment, which it must not keep alive.
    return None if grad is None else compact(grad)


def _buffer_versions(stage: Stage) -> list[tuple[nn.Module, str, Tensor, int]]:
    return [(module, name, buffer, version(buffer)) for module in stage.modules for name, buffer in own_buffers(module)]


def _refuse_written_buffers(stage: Stage, before: list[tuple[nn.Module, str, Tensor, int]]) -> None:
    for module, name, buffer, old in before:
        if getattr(module, name, None) is not buffer or version(buffer) != old:
            raise LayerContractError(
                f"{stage.name} changed its buffer {name!r} ({type(module).__name__}) while it ran. A recompute would "
                f"change it once more: carry it in the layer's state, or switch its update off (e.g. .eval())"
            )


def _refuse_unknown_leaves(stages: Sequence[Stage], outputs: CellOutputs, known: Sequence[Tensor | None]) -> None:
    """Walk the recorded graph to its leaves: a gradient that flows elsewhere would be added in place, cell by cell."""
    known_ids = {id(leaf) for leaf in known if leaf is not None}
    tensors = [leaf for flat in (outputs.y, *outputs.states) for leaf in flat.tensors]
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known_ids:
            names = stages[0].name if len(stages) == 1 else f"{stages[0].name} to {stages[-1].name}"
            raise LayerContractError(
                f"{names}: the graph reaches a tensor ({describe(leaf)}) that needs a gradient but is neither an input, "
                f"a state, nor a registered parameter of these modules. Register it as an nn.Parameter of the layer "
                f"(pass the module itself, not a lambda around it), or pass it in as part of x or of the state"
            )
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
