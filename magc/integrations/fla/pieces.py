"""A segment cut where documents begin, and the pieces put together again.

flash-linear-attention's layers know one sequence per row, so each piece is a call of its own. Rows that are cut alike share
theirs.

Shape letters: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from magc.tree import PyTree, flatten


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one document in a segment.

    Attributes:
        start: the first, counted in the segment.
        stop: behind the last.
        continues: the document began in a segment before.
        seen: tokens of the document before the piece; None where rows of a group differ in it.
    """

    start: int
    stop: int
    continues: bool
    seen: int | None


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are cut alike, in order, and their pieces."""

    rows: tuple[int, ...]
    pieces: tuple[Piece, ...]


def cut(positions_BL: Tensor, *, apart: bool) -> list[Group]:
    """Cut a segment where documents begin. The host waits for a GPU that holds the positions.

    Args:
        positions_BL: index of each token in its document, integers.
        apart: whether rows of a group must agree in the tokens seen before the segment.
    """
    positions = positions_BL.cpu()
    batch, length = positions.shape
    starts: list[list[int]] = [[] for _ in range(batch)]
    begins = (positions[:, 1:] == 0).nonzero()
    for row, index in cast(list[list[int]], begins.tolist()):  # pyright: ignore[reportUnknownMemberType]
        starts[row].append(index + 1)
    groups: dict[tuple[bool, int, tuple[int, ...]], list[int]] = {}
    before = cast(list[int], positions[:, 0].tolist())  # pyright: ignore[reportUnknownMemberType]
    for row, seen in enumerate(before):
        groups.setdefault((seen > 0, seen if apart else 0, tuple(starts[row])), []).append(row)
    made: list[Group] = []
    for (continues, _, inside), rows in groups.items():
        edges = (0, *inside, length)
        alike = len({before[row] for row in rows}) == 1
        first = Piece(0, edges[1], continues, before[rows[0]] if alike else None)
        rest = (Piece(start, stop, False, 0) for start, stop in pairwise(edges[1:]))
        made.append(Group(tuple(rows), (first, *rest)))
    return made


def rows_of(tree: PyTree, rows: Sequence[int], batch: int) -> PyTree:
    """Some rows of every tensor, `(batch, ...)`; the tree itself if it is all of them, in order."""
    if len(rows) == batch and list(rows) == list(range(batch)):
        return tree
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return flatten("rows", tree).map(lambda each: each.narrow(0, first, count)).tree()
    # Not by an index tensor: it would have to be copied to the GPU.
    return flatten("rows", tree).map(lambda each: torch.cat([each.narrow(0, row, 1) for row in rows])).tree()


def tokens_of(tree: PyTree, piece: Piece) -> PyTree:
    """The tokens of a piece of every tensor, `(batch, length, ...)`."""
    return flatten("tokens", tree).map(lambda each: each[:, piece.start : piece.stop]).tree()


def joined(parts: Sequence[PyTree], dim: int) -> PyTree:
    """Trees of one structure, their tensors joined along an axis."""
    if len(parts) == 1:
        return parts[0]
    flats = [flatten("a piece", part) for part in parts]
    columns = zip(*(flat.leaves for flat in flats), strict=True)
    leaves: list[Tensor | None] = []
    for column in columns:
        tensors = [leaf for leaf in column if leaf is not None]
        leaves.append(torch.cat(tensors, dim) if tensors else None)
    return flats[0].with_leaves(leaves).tree()


def rows_joined(parts: Sequence[PyTree], groups: Sequence[Group]) -> PyTree:
    """What groups of rows made, all rows in order."""
    held = [row for group in groups for row in group.rows]
    return rows_of(joined(parts, 0), [held.index(row) for row in range(len(held))], len(held))
