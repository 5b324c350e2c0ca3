"""What Mamba-3's scan takes and returns beside tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Pairs = Literal["neighbours", "halves"]
"""Coordinates of `B` and `C` that turn together: 2i and 2i + 1, or i and i + d_state / 2."""


class ScanState(NamedTuple):
    """What the recurrence carries from a token to the next: all parts in the precision it computes in, but `x`."""

    turns: Tensor
    """Angle in turns of 2 pi, from 0 to 1, `(batch, heads, angles)`."""
    ssm: Tensor
    """`h`, `(batch, heads, headdim, d_state)`."""
    B: Tensor
    """The last token's input projections with their biases, turned, `(batch, rank, heads, d_state)`."""
    x: Tensor
    """The last token's input, `(batch, heads, headdim)`, in the input's type."""


@dataclass(frozen=True)
class Mimo:
    """Weights of each rank and channel, `(heads, rank, headdim)`, for several inputs and outputs per head."""

    x: Tensor
    """Of the input."""
    z: Tensor | None = None
    """Of the gate; None without one."""
    out: Tensor | None = None
    """Of the outputs, which are added up; None leaves them apart."""
