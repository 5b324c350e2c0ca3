"""Packed sequences: several documents one after another in a row, told apart by `seq_idx`.

The recurrent state starts afresh wherever `seq_idx` differs from the token before. Comparing neighbours, and
not ids at a distance, means that an id may be used again later in the row without joining the two documents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_runs(seq_idx_BL: Tensor, prev_seq_idx_B: Tensor | None) -> Tensor:
    """Number the documents of a segment so that the initial state always belongs to number 0.

    Args:
        seq_idx_BL: document id of each token, `(batch, length)`, integers.
        prev_seq_idx_B: id of the token just before the segment, `(batch,)`. None: the segment's first token
            continues the document of the initial state.

    Returns:
        `(batch, length)` int64, non-decreasing along the length: the number of document changes up to and
        including each token, counting the change at the segment's start.
    """
    check_seq_idx(seq_idx_BL, prev_seq_idx_B)
    before = seq_idx_BL[:, :1] if prev_seq_idx_B is None else prev_seq_idx_B[:, None]
    previous_BL = torch.cat([before.to(seq_idx_BL.dtype), seq_idx_BL[:, :-1]], dim=1)
    return torch.cumsum(seq_idx_BL != previous_BL, dim=1)


def keep_if(keep_B: Tensor, state: Tensor) -> Tensor:
    """The rows of `state` `(batch, ...)` where `keep_B` `(batch,)` holds, zeros elsewhere."""
    return torch.where(keep_B.reshape(-1, *(1 for _ in state.shape[1:])), state, torch.zeros_like(state))


def check_seq_idx(seq_idx_BL: Tensor, prev_seq_idx_B: Tensor | None) -> None:
    """Raise ValueError unless both are integers of matching shape."""
    if seq_idx_BL.ndim != 2 or seq_idx_BL.dtype.is_floating_point:
        raise ValueError(
            f"seq_idx must be integers of shape (batch, length), got {seq_idx_BL.dtype} {tuple(seq_idx_BL.shape)}"
        )
    if prev_seq_idx_B is not None and (
        prev_seq_idx_B.shape != seq_idx_BL.shape[:1] or prev_seq_idx_B.dtype.is_floating_point
    ):
        raise ValueError(
            f"prev_seq_idx must be integers of shape {tuple(seq_idx_BL.shape[:1])}, "
            f"got {prev_seq_idx_B.dtype} {tuple(prev_seq_idx_B.shape)}"
        )
