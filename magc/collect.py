"""Whole-sequence tensors put together from segments: the output, the loss, the gradient of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from magc.errors import LayerContractError
from magc.grid import Grid
from magc.source import SegmentSource
from magc.stack import Stack
from magc.tree import Flat, describe, storage_id


class OutputCollector(Protocol):
    """Takes the output of the last group's cells, segment by segment."""

    def add(self, bounds: tuple[int, int], y: Flat) -> None:
        """Take the output of the segment of tokens ``bounds``."""
        ...

    def result(self) -> Flat:
        """The output of the whole sequence."""
        ...


class TokenOutput:
    """The layers' output, written segment by segment into one tensor (a second copy never exists)."""

    def __init__(self, grid: Grid, stack: Stack, inputs: SegmentSource) -> None:
        self._grid, self._stack, self._inputs = grid, stack, inputs
        self._y: Flat | None = None

    def add(self, bounds: tuple[int, int], y: Flat) -> None:
        """Take a segment's output.

        Raises:
            LayerContractError: it has another length than the segment, or another form than the segments before.
        """
        start, stop = bounds
        axis, last = self._stack.seq_dim, self._stack.stages[-1].name
        if self._y is not None and y.spec != self._y.spec:
            raise LayerContractError(
                f"{last} returned an output of structure {y.spec} for tokens {start} to {stop} but {self._y.spec} before"
            )
        for path, leaf in zip(y.paths(), y.leaves, strict=True):
            if leaf is not None and (leaf.dim() <= axis or leaf.shape[axis] != stop - start):
                raise LayerContractError(
                    f"{last} was given {stop - start} tokens but its output{path} is {describe(leaf)}: along axis "
                    f"{axis} it must have as many tokens as came in"
                )
        if self._grid.segments == 1:
            # Without a copy, but never the caller's own tensor under another name.
            theirs = {storage_id(leaf) for leaf in self._inputs.flat.tensors}
            self._y = y.map(lambda leaf: leaf.detach().clone() if storage_id(leaf) in theirs else leaf.detach())
            return
        if self._y is None:
            self._y = y.map(self._empty)
        for path, whole, part in zip(y.paths(), self._y.leaves, y.leaves, strict=True):
            room = None if whole is None else whole.narrow(axis, start, stop - start)
            if room is not None and part is not None and (room.shape, room.dtype) == (part.shape, part.dtype):
                room.copy_(part.detach())
            elif room is not None or part is not None:
                # copy_ would broadcast and convert.
                raise LayerContractError(
                    f"{last} returned output{path} as {describe(part)} for tokens {start} to {stop}, where segments before "
                    f"make {describe(room)} of it; shape and dtype must stay the same in every segment"
                )

    def _empty(self, part: Tensor) -> Tensor:
        shape = list(part.shape)
        shape[self._stack.seq_dim] = self._grid.tokens.length
        return torch.empty(shape, dtype=part.dtype, device=part.device)

    def result(self) -> Flat:
        """The whole output."""
        assert self._y is not None
        return self._y


class LossOutput:
    """The head's summed loss and count, added up over segments in at least fp32."""

    def __init__(self) -> None:
        self._y: Flat | None = None

    def add(self, bounds: tuple[int, int], y: Flat) -> None:
        """Add a segment's (loss, count)."""
        parts = [leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in y.tensors]
        if self._y is not None:
            parts = [total + part for total, part in zip(self._y.tensors, parts, strict=True)]
        self._y = y.with_leaves(parts)

    def result(self) -> Flat:
        """(summed loss, count) of the sequence."""
        assert self._y is not None
        return self._y


class GradInput:
    """The gradient of the stack's input, written segment by segment."""

    def __init__(self, grid: Grid, seq_dim: int, inputs: SegmentSource, needs: Sequence[bool]) -> None:
        self._single = grid.segments == 1
        self._seq_dim = seq_dim
        self._inputs = inputs.flat.leaves
        self._needs = needs
        self._grads: list[Tensor | None] = [None] * len(needs)

    def add(self, bounds: tuple[int, int], grads: Sequence[Tensor | None]) -> None:
        """Take a segment's gradients, None meaning zero."""
        if not any(self._needs):
            return
        start, stop = bounds
        for index, (leaf, grad, need) in enumerate(zip(self._inputs, grads, self._needs, strict=True)):
            if not need or leaf is None:
                continue
            if self._single and grad is not None:
                self._grads[index] = grad.to(leaf.device)
                continue
            whole = self._grads[index]
            if whole is None:
                whole = self._grads[index] = torch.empty_like(leaf, memory_format=torch.contiguous_format)
            part = whole.narrow(self._seq_dim, start, stop - start)
            _ = part.zero_() if grad is None else part.copy_(grad)

    def result(self) -> list[Tensor | None]:
        """The gradients, None for leaves that need none."""
        return self._grads
