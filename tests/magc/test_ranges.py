"""Ranges of pinned memory: none is handed out twice, and what comes back is of use for other sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from magc.ranges import FreeRanges, Range

Ranges = FreeRanges[str, str]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=4), st.data())
def test_no_byte_is_handed_out_twice_and_all_come_back_as_one(pieces: list[int], data: st.DataObject) -> None:
    ranges = Ranges()
    for size in pieces:
        ranges.add(size)
    held: list[Range[str, str]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            ranges.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            size = data.draw(st.integers(1, 64))
            taken = ranges.take(size)
            if taken is None:
                # Then no free range is as large, however the held ones lie.
                gaps = [gap for piece, length in enumerate(pieces) for gap in _gaps(piece, length, held)]
                largest = max(gaps, default=0)
                assert largest < size
                continue
            assert taken.size == size
            held.append(taken)
        bytes_held = [(one.piece, byte) for one in held for byte in range(one.start, one.stop)]
        assert len(set(bytes_held)) == len(bytes_held)
        assert all(byte < pieces[piece] for piece, byte in bytes_held)
        assert ranges.nbytes == sum(pieces) - len(bytes_held)
    for one in held:
        ranges.give_back(one)
    assert len(ranges) == len(pieces)


def _gaps(piece: int, size: int, held: list[Range[str, str]]) -> list[int]:
    """Lengths of what is free between the held ranges of a piece."""
    edges = sorted((one.start, one.stop) for one in held if one.piece == piece)
    starts = [0, *(stop for _, stop in edges)]
    stops = [*(start for start, _ in edges), size]
    return [stop - start for start, stop in zip(starts, stops, strict=True) if stop > start]


def test_the_last_use_in_each_place_counts() -> None:
    ranges = Ranges()
    ranges.add(12)
    first, second, third = (ranges.take(4) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    first.uses = {"out": (3, "c"), "back": (4, "d")}
    second.uses = {"out": (5, "e")}
    third.uses = {"out": (1, "a"), "back": (6, "f")}
    for one in (first, third, second):
        ranges.give_back(one)
    whole = ranges.take(10)
    assert whole is not None
    assert whole.uses == {"out": (5, "e"), "back": (6, "f")}
    rest = ranges.take(2)
    assert rest is not None
    assert rest.uses == whole.uses


def test_a_long_sequence_after_another_use_of_the_memory() -> None:
    """Borders and states of eight groups of eight layers at the 2.7B shape, in slabs that were full of other blocks."""
    mib = 1 << 20
    border = [32 * mib, 8 * mib, 32 * mib, 32 * mib, 16 * mib]
    states = [80 * 64 * 128 * 4, 3 * 5376 * 2] * 8
    slab, segments, groups = 256 * mib, 63, 8
    ranges = Ranges()
    slabs = 0

    def take(size: int) -> Range[str, str]:
        nonlocal slabs
        found = ranges.take(-(-size // 512) * 512)
        if found is None:
            ranges.add(slab)
            slabs += 1
            return take(size)
        return found

    wanted = segments * groups * (sum(border) + sum(states))
    for one in [take(32 * mib) for _ in range(wanted // (32 * mib))]:
        ranges.give_back(one)
    for _ in range(3):
        held = [take(size) for _ in range(segments * groups) for size in (*border, *states)]
        assert slabs * slab < 1.01 * wanted + slab
        for one in reversed(held):
            ranges.give_back(one)
