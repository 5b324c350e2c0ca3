"""Boxes: tensors that stay where they are, by which captured cells are given their inputs and give their outputs.

A graph reads and writes fixed addresses. Cells that are never under way at the same time share the boxes of their kind,
so a stack of many groups needs no more of them than one of its groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magc.runners.cell import CellGrads, CellInputs, CellOutputs
from magc.tree import Flat, duplicate, flatten, is_differentiable

Grads = tuple[Tensor | None, ...]


class Boxes:
    """Boxes by what they are for, the place among their like, shape, strides and type."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all boxes."""
        return sum(box.numel() * box.element_size() for box in self._held.values())

    def clear(self) -> None:
        """Let go of all of them."""
        self._held.clear()

    def inputs(self, inputs: CellInputs) -> CellInputs:
        """Boxes for a cell's inputs, filled with them."""
        boxes = CellInputs(
            self._like("x", inputs.x),
            tuple(None if s is None else self._like(f"state {i}", s) for i, s in enumerate(inputs.states)),
            {name: self._like(f"side {name}", flatten(name, tree)).tree() for name, tree in inputs.side.items()},
            None if inputs.targets is None else self._like("targets", flatten("targets", inputs.targets)).tree(),
        )
        fill_inputs(boxes, inputs)
        return boxes

    def gradients(self, outputs: CellOutputs) -> tuple[Grads, tuple[Grads, ...]]:
        """Boxes for the gradients of a cell's outputs; None for what can have none."""
        states = (self._gradients(f"state gradient {i}", state.leaves) for i, state in enumerate(outputs.states))
        return self._gradients("gradient", outputs.y.leaves), tuple(states)

    def take_outputs(self, outputs: CellOutputs) -> CellOutputs:
        """Copy a cell's outputs into boxes."""
        states = (
            state.with_leaves(self._filled(f"new state {i}", state.leaves)) for i, state in enumerate(outputs.states)
        )
        return CellOutputs(outputs.y.with_leaves(self._filled("y", outputs.y.leaves)), tuple(states))

    def take_grads(self, grads: CellGrads) -> CellGrads:
        """Copy a cell's gradients into boxes."""
        states = (self._filled(f"passed state gradient {i}", state) for i, state in enumerate(grads.states))
        return CellGrads(self._filled("passed gradient", grads.x), tuple(states))

    def _like(self, what: str, flat: Flat) -> Flat:
        return flat.with_leaves(self._boxes(what, flat.leaves))

    def _gradients(self, what: str, leaves: Sequence[Tensor | None]) -> Grads:
        return self._boxes(what, [leaf if leaf is not None and _wants_grad(leaf) else None for leaf in leaves])

    def _boxes(self, what: str, leaves: Sequence[Tensor | None]) -> Grads:
        return tuple(None if leaf is None else self._box((what, place), leaf)[0] for place, leaf in enumerate(leaves))

    def _filled(self, what: str, leaves: Sequence[Tensor | None]) -> Grads:
        boxes: list[Tensor | None] = []
        for place, leaf in enumerate(leaves):
            box, is_full = (None, True) if leaf is None else self._box((what, place), leaf)
            if not is_full:
                copy_into((box,), (leaf,))
            boxes.append(box)
        return tuple(boxes)

    def _box(self, what: object, leaf: Tensor) -> tuple[Tensor, bool]:
        """The box for a leaf, and whether it was made, and so filled, just now."""
        key = (what, form(leaf))
        if key in self._held:
            return self._held[key], False
        box = duplicate(leaf)
        # A tensor whose elements share memory has no duplicate that could be written to.
        self._held[key] = leaf.detach().contiguous().clone() if box is leaf else box
        return self._held[key], True


def fill_inputs(boxes: CellInputs, inputs: CellInputs) -> None:
    """Copy a cell's inputs into boxes made for their like."""
    copy_into(boxes.x.leaves, inputs.x.leaves)
    for box, state in zip(boxes.states, inputs.states, strict=True):
        if box is not None and state is not None:
            copy_into(box.leaves, state.leaves)
    for name, tree in inputs.side.items():
        copy_into(flatten(name, boxes.side[name]).leaves, flatten(name, tree).leaves)
    if inputs.targets is not None:
        copy_into(flatten("targets", boxes.targets).leaves, flatten("targets", inputs.targets).leaves)


def copy_into(boxes: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Copy leaf by leaf; a value that is None counts as zeros."""
    with torch.no_grad():
        for box, value in zip(boxes, values, strict=True):
            if box is None:
                continue
            if value is None:
                box.zero_()
            else:
                box.copy_(value)


def copied_outputs(outputs: CellOutputs) -> CellOutputs:
    """What is in the boxes of outputs."""
    return CellOutputs(outputs.y.map(torch.clone), tuple(state.map(torch.clone) for state in outputs.states))


def copied_grads(grads: CellGrads) -> CellGrads:
    """What is in the boxes of gradients."""

    def clones(leaves: Grads) -> Grads:
        return tuple(None if leaf is None else leaf.clone() for leaf in leaves)

    return CellGrads(clones(grads.x), tuple(clones(state) for state in grads.states))


def signature(inputs: CellInputs) -> object:
    """Equal for inputs that the same boxes hold."""
    side = tuple((name, _shape(flatten(name, tree))) for name, tree in inputs.side.items())
    targets = None if inputs.targets is None else flatten("targets", inputs.targets)
    return _shape(inputs.x), tuple(_shape(state) for state in inputs.states), side, _shape(targets)


def form(leaf: Tensor) -> object:
    """Equal for tensors that one box holds: what strides say of axes of size 1 (a batch of one) does not matter."""
    strides = tuple(step if size > 1 else 0 for size, step in zip(leaf.shape, leaf.stride(), strict=True))
    return tuple(leaf.shape), strides, leaf.dtype


def _shape(flat: Flat | None) -> object:
    if flat is None:
        return None
    return str(flat.spec), tuple(None if leaf is None else form(leaf) for leaf in flat.leaves)


def _wants_grad(leaf: Tensor) -> bool:
    return leaf.requires_grad and is_differentiable(leaf)
