"""What goes into a cell and comes out of it, and what every cell runner can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from magc.stack import Stage
from magc.tree import Flat, PyTree, is_differentiable


@dataclass(frozen=True, slots=True)
class CellInputs:
    """What a cell runs on.

    Attributes:
        x: its border, or the stack's input for the first group.
        states: the state of each of its layers, None at the start of the sequence.
        side: per-token side inputs of the segment.
        targets: the head's targets of the segment; None where the cell has no head or its loss is not wanted.
    """

    x: Flat
    states: tuple[Flat | None, ...]
    side: Mapping[str, PyTree]
    targets: PyTree = None


@dataclass(frozen=True, slots=True)
class CellOutputs:
    """What a cell makes: the next border (or the summed loss and count, under a head) and its layers' new states."""

    y: Flat
    states: tuple[Flat, ...]


@dataclass(frozen=True, slots=True)
class CellNeeds:
    """Which inputs of a cell need gradients, leaf by leaf."""

    x: tuple[bool, ...]
    states: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class CellGrads:
    """Gradients of a cell's border and of each of its states; None where there is none."""

    x: tuple[Tensor | None, ...]
    states: tuple[tuple[Tensor | None, ...], ...]


class Recorded(Protocol):
    """A recorded cell, to be back-propagated once by the runner that recorded it."""

    def take_outputs(self) -> CellOutputs:
        """What the cell made; to be asked for once."""
        ...


T = TypeVar("T", bound=Recorded)


class Runner(Protocol[T]):
    """Runs, records and back-propagates cells; arguments and errors as of `magc.runners.eager.EagerRunner`."""

    def run(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        *,
        loss: bool = True,
        proxies: Sequence[nn.Parameter] | None = None,
    ) -> CellOutputs:
        """Run without recording."""
        ...

    def record(
        self,
        first: int,
        stages: Sequence[Stage],
        inputs: CellInputs,
        needs: CellNeeds,
        proxies: Sequence[nn.Parameter],
        *,
        output_needed: bool = True,
    ) -> T:
        """Run and keep what the backward needs."""
        ...

    def backward(
        self, tape: T, grad_y: Sequence[Tensor | None], grad_states: Sequence[Sequence[Tensor | None]]
    ) -> CellGrads:
        """Back-propagate a recorded cell; parameter gradients go to the accumulator. Uses the tape up."""
        ...


def differentiable_mask(flat: Flat) -> tuple[bool, ...]:
    """For each leaf, whether a gradient of it makes sense."""
    return tuple(is_differentiable(leaf) for leaf in flat.leaves)
