"""The grid: layers in groups on one axis, tokens in segments on the other; a cell is one group of one segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from magc.errors import PlanError


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the grid, ``length`` items cut into parts.

    Attributes:
        length: number of layers or of tokens, at least 1.
        size: items per part (the last part may be shorter), or the sizes of all parts, which then sum to ``length``.
    """

    length: int
    size: int | tuple[int, ...]

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.size) if isinstance(self.size, tuple) else -(-self.length // self.size)

    def bounds(self, index: int) -> tuple[int, int]:
        """First item of part ``index`` and the item after its last."""
        if isinstance(self.size, tuple):
            start = sum(self.size[:index])
            return start, start + self.size[index]
        start = index * self.size
        return start, min(start + self.size, self.length)

    def all_bounds(self) -> Iterator[tuple[int, int]]:
        """Bounds of every part in order."""
        if isinstance(self.size, tuple):
            stops = list(accumulate(self.size))
            yield from zip([0, *stops], stops, strict=False)
        else:
            for start in range(0, self.length, self.size):
                yield start, min(start + self.size, self.length)

    def part_length(self, index: int) -> int:
        """Number of items in part ``index``."""
        start, stop = self.bounds(index)
        return stop - start


@dataclass(frozen=True, slots=True)
class Grid:
    """Groups of layers x segments of tokens."""

    layers: Axis
    tokens: Axis

    @property
    def groups(self) -> int:
        """Number of layer groups."""
        return self.layers.parts

    @property
    def segments(self) -> int:
        """Number of sequence segments."""
        return self.tokens.parts

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.groups * self.segments


def make_axis(what: str, length: int, size: int | tuple[int, ...] | None) -> Axis:
    """Cut ``length`` items into parts of ``size``; None is one part, a size beyond the length too.

    Raises:
        PlanError: the length or a size is not positive, or explicit sizes do not sum to the length.
    """
    if length < 1:
        raise PlanError(f"a grid needs at least one of its {what}, got {length}")
    if size is None:
        return Axis(length, length)
    if isinstance(size, tuple):
        if any(part < 1 for part in size) or sum(size) != length:
            raise PlanError(
                f"sizes {size} of the plan's {what} sum to {sum(size)}, but there are {length} {what}; "
                f"give positive sizes that sum to {length}, or one size for all parts"
            )
        return Axis(length, size)
    if size < 1:
        raise PlanError(f"{what} per cell must be positive, got {size}")
    return Axis(length, min(size, length))
