"""Decays inside and across the chunks of a scan whose state a scalar per head and token scales.

Shape letters: B batch, L length, K chunks, G groups, Q chunk size, R heads per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ChunkDecay:
    """Decay factors in [0, 1]; zero where a document border lies between."""

    within: Tensor
    """BKGRQQ: From token to token inside the chunk, zero above the diagonal."""
    to_end: Tensor
    """BKGQR: From each token to the end of its chunk."""
    from_start: Tensor
    """BKGQR: From the state before the chunk to each token."""
    across: Tensor
    """BKGR: From the state before the chunk to the state after it."""


def chunk_decay(rate_BKGQR: Tensor, runs_BL: Tensor | None) -> ChunkDecay:
    """Decay factors of each chunk.

    Args:
        rate_BKGQR: log of what each token multiplies the state by, not positive.
        runs_BL: document of each token, as `magc_kernels._packing.document_runs` numbers them; None for one document.
    """
    cumulative = _running_sum(rate_BKGQR)
    # Rounding may make a running sum of non-positive terms rise. Removing that here, as a constant, makes
    # every exponent below non-positive without keeping a clamp mask per pair of tokens for backward.
    values = cumulative.detach()
    cumulative = cumulative - (values - values.cummin(dim=3).values)
    last = cumulative[:, :, :, -1:]
    size = rate_BKGQR.shape[3]

    rows = cumulative.transpose(3, 4)
    hidden = torch.ones(size, size, dtype=torch.bool, device=rate_BKGQR.device).triu(1)
    exponent = rows[..., :, None] - rows[..., None, :]
    to_end, from_start, across = (
        torch.exp(last - cumulative),
        torch.exp(cumulative),
        torch.exp(last.squeeze(3)),
    )
    if runs_BL is not None:
        batch, count = rate_BKGQR.shape[:2]
        tail = count * size - runs_BL.shape[1]
        runs_BKQ = torch.cat([runs_BL, runs_BL[:, -1:].expand(-1, tail)], dim=1).reshape(batch, count, size)
        # The state before the segment belongs to run 0.
        before_BK = functional.pad(runs_BKQ[:, :-1, -1], (1, 0))
        other_BKQQ = runs_BKQ[..., :, None] != runs_BKQ[..., None, :]
        hidden = hidden | other_BKQQ[:, :, None, None]
        to_end = to_end.masked_fill((runs_BKQ != runs_BKQ[..., -1:])[:, :, None, :, None], 0.0)
        from_start = from_start.masked_fill((runs_BKQ != before_BK[..., None])[:, :, None, :, None], 0.0)
        across = across.masked_fill((runs_BKQ[..., -1] != before_BK)[:, :, None, None], 0.0)
    within = exponent.masked_fill_(hidden, -math.inf).exp_()
    return ChunkDecay(within, to_end, from_start, across)


def pad(x: Tensor, tail: int) -> Tensor:
    """Zeros after the last token of `x` `(batch, length, ...)`."""
    return functional.pad(x, (0, 0) * (x.ndim - 2) + (0, tail)) if tail else x


def _running_sum(x_BKGQR: Tensor) -> Tensor:
    """Cumulative sum over Q in log2(Q) additions; torch's has no deterministic form on CUDA."""
    size = x_BKGQR.shape[3]
    shift = 1
    while shift < size:
        x_BKGQR = x_BKGQR + functional.pad(x_BKGQR[:, :, :, : size - shift], (0, 0, shift, 0))
        shift *= 2
    return x_BKGQR
