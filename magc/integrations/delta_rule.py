"""The gated delta rule with a state in and out, in plain PyTorch.

Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464, section 3; the chunked form is that of Yang et al.,
"Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484, section 3.2.

Per head, with a decay `g_t <= 0` in log space and a rate `beta_t`, the state `S_t` `(d_k, d_v)` follows

    S' = exp(g_t) S_{t-1},        S_t = S' + k_t beta_t (v_t - k_t S')^T,        o_t = q_t S_t.

The sequence is cut into chunks. Inside a chunk the corrections `beta_t (v_t - k_t S')` of all tokens solve one triangular
system; from chunk to chunk only the state passes.

Shape letters: B batch, L length, H heads, K head size of keys, V of values, C chunks, Q chunk size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._packing import document_runs
from magc_kernels._precision import autocast_off, compute_dtype

CHUNK_SIZE = 64


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Run a segment of any length from a given state and return the state after it.

    Computes in float32, in float64 if ``v`` is float64, also under autocast.

    Args:
        q: queries, `(batch, length, heads of keys, d_k)`.
        k: keys, likewise.
        v: values, `(batch, length, heads, d_v)`; each head of keys serves as many consecutive ones.
        g: log of the decay, `(batch, length, heads)`, not positive.
        beta: rate, likewise.
        scale: of the queries.
        initial_state: `(batch, heads, d_k, d_v)`; None for zeros.
        seq_idx: document of each token in packed sequences, `(batch, length)` integers. The state starts afresh where it
            changes.
        prev_seq_idx: `(batch,)`: the document of the token before the segment. None: that of the segment's first token.
        chunk_size: most tokens in a chunk. It changes speed, memory and rounding, nothing else.

    Returns:
        The output, shaped and typed as ``v``, and the state after the last token, in float32 (float64 if ``v`` is float64).
    """
    batch, length, heads, d_v = v.shape
    dtype = compute_dtype(v.dtype)
    size = min(chunk_size, length)
    count = -(-length // size)
    tail = count * size - length

    def chunks(x_BLHE: Tensor) -> Tensor:
        """`(batch, length, heads, features)` to `(batch, heads, chunks, size, features)`, zeros after the last token."""
        x_BLHE = x_BLHE.to(dtype)
        if x_BLHE.shape[2] != heads:
            x_BLHE = x_BLHE.repeat_interleave(heads // x_BLHE.shape[2], dim=2)
        x_BLHE = functional.pad(x_BLHE, (0, 0, 0, 0, 0, tail))
        return x_BLHE.reshape(batch, count, size, heads, -1).permute(0, 3, 1, 2, 4)

    with autocast_off(v.device):
        q_BHCQK, k_BHCQK, v_BHCQV = chunks(q) * scale, chunks(k), chunks(v)
        beta_BHCQ1 = chunks(beta[..., None])
        sum_BHCQ1 = chunks(g[..., None]).cumsum(dim=3)
        last_BHC11 = sum_BHCQ1[:, :, :, -1:]
        within_BHCQQ = sum_BHCQ1 - sum_BHCQ1.transpose(-1, -2)
        later = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
        from_start_BHCQ1, to_end_BHCQ1, through_BHC11 = (
            sum_BHCQ1.exp(),
            (last_BHC11 - sum_BHCQ1).exp(),
            last_BHC11.exp(),
        )
        if seq_idx is not None:
            runs_BCQ = document_runs(seq_idx, prev_seq_idx)
            # The tail belongs to the last document, or the state would not reach the end.
            runs_BCQ = torch.cat([runs_BCQ, runs_BCQ[:, -1:].expand(-1, tail)], dim=1).view(batch, count, size)
            # The run of the token before each chunk; before the first, that of the state.
            before_BC1 = functional.pad(runs_BCQ[:, :-1, -1:], (0, 0, 1, 0))
            later = later | (runs_BCQ[..., None] != runs_BCQ[:, :, None])[:, None]
            from_start_BHCQ1 = _where(runs_BCQ == before_BC1, from_start_BHCQ1)
            to_end_BHCQ1 = _where(runs_BCQ == runs_BCQ[..., -1:], to_end_BHCQ1)
            through_BHC11 = _where(runs_BCQ[..., -1:] == before_BC1, through_BHC11)
        within_BHCQQ = within_BHCQQ.masked_fill(later, -torch.inf).exp()

        # The corrections are a part of the values, less a part of what the state before the chunk predicts.
        rate_BHCQK = k_BHCQK * beta_BHCQ1
        system_BHCQQ = (rate_BHCQK @ k_BHCQK.transpose(-1, -2)) * within_BHCQQ
        sides = torch.cat([v_BHCQV * beta_BHCQ1, rate_BHCQK * from_start_BHCQ1], dim=-1)
        solve = cast(Callable[..., Tensor], cast(Any, torch.linalg).solve_triangular)
        solved = solve(system_BHCQQ, sides, upper=False, unitriangular=True)
        own_BHCQV, reads_BHCQK = solved[..., :d_v], solved[..., d_v:]
        score_BHCQQ = (q_BHCQK @ k_BHCQK.transpose(-1, -2)) * within_BHCQQ
        q_BHCQK = q_BHCQK * from_start_BHCQ1
        writes_BHCQK = k_BHCQK * to_end_BHCQ1

        state = v.new_zeros(batch, heads, k.shape[-1], d_v, dtype=dtype) if initial_state is None else initial_state
        state = state.to(dtype)
        outputs: list[Tensor] = []
        for index in range(count):
            correction_BHQV = own_BHCQV[:, :, index] - reads_BHCQK[:, :, index] @ state
            outputs.append(q_BHCQK[:, :, index] @ state + score_BHCQQ[:, :, index] @ correction_BHQV)
            state = state * through_BHC11[:, :, index] + writes_BHCQK[:, :, index].transpose(-1, -2) @ correction_BHQV
        y_BHLV = torch.cat(outputs, dim=2)[:, :, :length]
        return y_BHLV.transpose(1, 2).to(v.dtype), state


def l2_normalised(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x`` over the root of the sum of squares of its last axis and ``eps``, in at least float32."""
    with autocast_off(x.device):
        x = x.to(compute_dtype(x.dtype))
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _where(keep_BCQ: Tensor, x_BHCQ1: Tensor) -> Tensor:
    """``x`` where it is to be kept, for every head, and zeros elsewhere."""
    return x_BHCQ1.masked_fill(~keep_BCQ[:, None, :, :, None], 0.0)
