"""Ranges of memory handed out from larger pieces, best fit first; those that come back become one with free neighbours.

Bookkeeping alone: numbers of bytes, no memory. Each range carries its uses: what must be over before it is used again, by
where that happens (a stream). What happens in one place is over in the order of serial numbers, so the last counts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Place = TypeVar("Place")
Use = TypeVar("Use")


@dataclass(slots=True)
class Range(Generic[Place, Use]):
    """``size`` bytes from ``start`` on of the piece ``piece``, and the last use in each place: its serial number and itself."""

    piece: int
    start: int
    size: int
    uses: dict[Place, tuple[int, Use]] = field(default_factory=dict[Place, tuple[int, Use]])

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.size


class FreeRanges(Generic[Place, Use]):
    """Free ranges of any number of pieces."""

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int, int]] = []
        self._by_start: dict[tuple[int, int], Range[Place, Use]] = {}
        self._by_stop: dict[tuple[int, int], Range[Place, Use]] = {}
        self._pieces = 0

    @property
    def nbytes(self) -> int:
        """Free bytes."""
        return sum(size for size, _, _ in self._by_size)

    def __len__(self) -> int:
        return len(self._by_size)

    def add(self, nbytes: int) -> int:
        """A new piece, all free; its number."""
        piece, self._pieces = self._pieces, self._pieces + 1
        self.give_back(Range(piece, 0, nbytes))
        return piece

    def take(self, nbytes: int) -> Range[Place, Use] | None:
        """The smallest free range that holds so many bytes, or the start of it; None if none does."""
        found = bisect_left(self._by_size, (nbytes, -1, -1))
        if found == len(self._by_size):
            return None
        _, piece, start = self._by_size[found]
        taken = self._remove(self._by_start[piece, start])
        if taken.size > nbytes:
            self._insert(Range(piece, start + nbytes, taken.size - nbytes, dict(taken.uses)))
            taken.size = nbytes
        return taken

    def give_back(self, free: Range[Place, Use]) -> None:
        """Take a range back, whose uses are those since it was taken."""
        for neighbour in (self._by_stop.get((free.piece, free.start)), self._by_start.get((free.piece, free.stop))):
            if neighbour is not None:
                self._remove(neighbour)
                start = min(free.start, neighbour.start)
                free = Range(free.piece, start, free.size + neighbour.size, _later(free.uses, neighbour.uses))
        self._insert(free)

    def _insert(self, free: Range[Place, Use]) -> None:
        insort(self._by_size, (free.size, free.piece, free.start))
        self._by_start[free.piece, free.start] = free
        self._by_stop[free.piece, free.stop] = free

    def _remove(self, free: Range[Place, Use]) -> Range[Place, Use]:
        del self._by_size[bisect_left(self._by_size, (free.size, free.piece, free.start))]
        del self._by_start[free.piece, free.start]
        del self._by_stop[free.piece, free.stop]
        return free


def _later(a: dict[Place, tuple[int, Use]], b: dict[Place, tuple[int, Use]]) -> dict[Place, tuple[int, Use]]:
    merged = dict(a)
    for place, use in b.items():
        if place not in merged or merged[place][0] < use[0]:
            merged[place] = use
    return merged
