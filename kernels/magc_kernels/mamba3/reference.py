"""Mamba-3 scan in plain PyTorch.

Source: Lahoti et al., "Mamba-3", arXiv 2603.15569: section 3.1 (exponential-trapezoidal steps), 3.2 (complex states as
rotations), 3.3 (several inputs and outputs per head, MIMO). What is not in the paper is as in mamba-ssm 2.3.

Per head, with a step `dt_t >= 0`, a rate `A_t <= 0` and a share `s_t` in (0, 1), the state `h_t` `(headdim, d_state)` is

    h_t = exp(dt_t A_t) (h_{t-1} + (1 - s_t) dt_t u_{t-1}) + s_t dt_t u_t,        u_t = sum_r x_tr b_tr^T,
    y_tr = h_t c_tr + D x_tr,

where `x_tr` is `x_t`, scaled per channel and rank if there are several, and `b_tr`, `c_tr` are `B_t`, `C_t` with their biases,
turned by the angle `theta_t = theta_{t-1} + pi dt_t tanh(angles_t)`.

Since `u_{t-1}` decays like `h_{t-1}`, a token enters all later outputs with the one weight
`s_t dt_t + (1 - s_{t+1}) dt_{t+1}`, and its own output with `s_t dt_t`. The sequence is cut into chunks: inside a chunk the
recurrence is a masked matrix product (all chunks at once); from chunk to chunk only the state passes. Time and memory are
linear in the length, and no `(length, headdim, d_state)` tensor exists.

Shape letters: B batch, L length, R rank, H heads, P headdim, G groups, N d_state, S angles, K chunks, Q chunk size,
E = Q R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._chunks import chunk_decay, pad
from magc_kernels._packing import document_runs
from magc_kernels._precision import autocast_off, compute_dtype
from magc_kernels.mamba3._check import check
from magc_kernels.mamba3._rotation import accumulated_turns, rotate
from magc_kernels.mamba3.values import Mimo, Pairs, ScanState

PREFERRED_CHUNK_SIZE = 64
"""For one input per head; 64 divided by the rank for several: the matrices inside a chunk have `(Q R)^2` elements."""


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    *,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo: Mimo | None = None,
    pairs: Pairs = "neighbours",
    initial_state: ScanState | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    chunk_size: int = PREFERRED_CHUNK_SIZE,
) -> tuple[Tensor, ScanState]:
    """Scan a segment of any length from a given state and return the state after it.

    Computes in float32, in float64 if `x` is float64, also under autocast.

    Args:
        x: `(batch, length, heads, headdim)`.
        dt: step of each token and head, `(batch, length, heads)`, not negative.
        A: rate of each token and head, shaped as `dt`, not positive.
        B: input projection, `(batch, length, rank, groups, d_state)`; `groups` divides `heads`, and `d_state` is even.
        C: output projection, shaped as `B`.
        trap: share of the token itself in its step, before the sigmoid, shaped as `dt`; the rest is the share of the token
            before.
        angles: rates of rotation before tanh, `(batch, length, angles)`, the same for all heads; at most `d_state / 2`.
        B_bias: added to `B`, `(heads, rank, d_state)`.
        C_bias: added to `C`, likewise.
        D: skip weight, `(heads,)`.
        z: gate, shaped as `x`: the output is multiplied by `silu(z)`, or by `silu(z * mimo.z)` per rank.
        mimo: weights of the ranks; None for one input per head, `rank` 1.
        pairs: which coordinates of `B` and `C` turn together.
        initial_state: of the token before the segment; None at the start of the sequence.
        seq_idx: document of each token in packed sequences, `(batch, length)` integers. The state starts afresh where it
            changes.
        prev_seq_idx: `(batch,)`: the document `initial_state` belongs to, that of the token before the segment. None: the
            document of the segment's first token. Handing on the last token's id makes any segmentation of a packed row
            equal to the whole.
        chunk_size: most tokens in a chunk. It changes speed, memory (the intra-chunk matrices hold
            `length * chunk_size * rank^2 * heads` elements) and rounding, nothing else.

    Returns:
        The output, shaped and typed as `x` (`(batch, length, rank, heads, headdim)` if `mimo` has no `out`), and the state
        after the last token; its parts are float32 (float64 if `x` is float64), but `x` is in the type of `x`.

    Raises:
        ValueError: a shape, `pairs` or `chunk_size` is wrong, or `mimo.z` and `z` are not given together.
        TypeError: `x` is not floating-point.
    """
    check(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, z, mimo, pairs, initial_state, seq_idx, prev_seq_idx)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length, heads, _ = x.shape
    rank = B.shape[2]
    dtype = compute_dtype(x.dtype)
    size = min(chunk_size, length)
    count = -(-length // size)
    tail = count * size - length
    runs_BL = None if seq_idx is None else document_runs(seq_idx, prev_seq_idx)

    def chunks(x_BLRHF: Tensor) -> Tensor:
        """To BKHEF, zeros after the last token."""
        x_BKQRHF = pad(x_BLRHF, tail).unflatten(1, (count, size))
        return x_BKQRHF.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    def per_token(x_BLH: Tensor) -> Tensor:
        """To BKHQ, zeros after the last token."""
        return pad(x_BLH, tail).unflatten(1, (count, size)).transpose(2, 3)

    with autocast_off(x.device):
        step_BLH = dt.to(dtype)
        own_BLH, before_BLH = _shares(step_BLH, trap.to(dtype), runs_BL)
        later_BLH = functional.pad(before_BLH[:, 1:], (0, 0, 0, 1))

        rate_BLHS = 0.5 * step_BLH[..., None] * torch.tanh(angles.to(dtype))[:, :, None]
        turns_BLHS = accumulated_turns(
            rate_BLHS, None if initial_state is None else initial_state.turns.to(dtype), runs_BL, size
        )
        B_BLRHN = rotate(_per_head(B.to(dtype), B_bias), turns_BLHS, pairs)
        C_BLRHN = rotate(_per_head(C.to(dtype), C_bias), turns_BLHS, pairs)
        x_BLRHP = _per_rank(x.to(dtype), mimo)

        B_BKHEN, C_BKHEN, x_BKHEP = chunks(B_BLRHN), chunks(C_BLRHN), chunks(x_BLRHP)
        # The tail of a ragged last chunk has step 0: it neither decays the state nor adds to it.
        own_BKHQ, weight_BKHQ = per_token(own_BLH), per_token(own_BLH + later_BLH)
        decay = chunk_decay(per_token(step_BLH * A.to(dtype))[..., None], runs_BL)

        # Inside each chunk: a token reads earlier ones with their weight for good, itself with its own share.
        diagonal_QQ = torch.eye(size, dtype=torch.bool, device=x.device)
        factor_BKHQQ = torch.where(
            diagonal_QQ, own_BKHQ[..., None], decay.within.squeeze(3) * weight_BKHQ[..., None, :]
        )
        mixing_BKHEE = _per_pair(C_BKHEN @ B_BKHEN.transpose(-1, -2), factor_BKHQQ, rank)
        y_BKHEP = mixing_BKHEE @ x_BKHEP

        # What each chunk adds to the state by its end.
        to_end_BKHE = (weight_BKHQ * decay.to_end.squeeze(-1)).repeat_interleave(rank, dim=-1)
        added_BKHPN = (x_BKHEP * to_end_BKHE[..., None]).transpose(-1, -2) @ B_BKHEN

        # From chunk to chunk. Reading the output here, state by state, keeps one copy of the states for backward.
        if initial_state is None:
            state_BHPN = x_BLRHP.new_zeros(batch, heads, x.shape[-1], B.shape[-1])
        else:
            state_BHPN = _resumed(initial_state, before_BLH[:, 0], mimo, dtype)
        carried: list[Tensor] = []
        for C_BHEN, added_BHPN, across_BH in zip(
            C_BKHEN.unbind(1), added_BKHPN.unbind(1), decay.across.squeeze(-1).unbind(1), strict=True
        ):
            carried.append(C_BHEN @ state_BHPN.transpose(-1, -2))
            state_BHPN = state_BHPN * across_BH[..., None, None] + added_BHPN
        from_start_BKHE = decay.from_start.squeeze(-1).repeat_interleave(rank, dim=-1)
        y_BKHEP = y_BKHEP + torch.stack(carried, 1) * from_start_BKHE[..., None]

        y_BKQRHP = y_BKHEP.unflatten(3, (size, rank)).permute(0, 1, 3, 4, 2, 5)
        y_BLRHP = y_BKQRHP.reshape(batch, count * size, rank, heads, -1)[:, :length]
        y = _skip_and_gate(y_BLRHP, x_BLRHP, D, z, mimo)
        # Copies: a view would keep the whole segment alive.
        state = ScanState(turns_BLHS[:, -1].clone(), state_BHPN, B_BLRHN[:, -1].clone(), x[:, -1].clone())
    return y.to(x.dtype), state


def _shares(step_BLH: Tensor, trap_BLH: Tensor, runs_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of each token and of the one before it in the token's step; the first of a document has none before it."""
    before_BLH = step_BLH * torch.sigmoid(-trap_BLH)
    if runs_BL is not None:
        # The token before the segment is of run 0.
        first_BL = runs_BL != functional.pad(runs_BL[:, :-1], (1, 0))
        before_BLH = before_BLH.masked_fill(first_BL[..., None], 0.0)
    return step_BLH * torch.sigmoid(trap_BLH), before_BLH


def _resumed(state: ScanState, before_BH: Tensor, mimo: Mimo | None, dtype: torch.dtype) -> Tensor:
    """The state with the share that the first token's step gives to the token before the segment."""
    x_BRHP = _per_rank(state.x.to(dtype)[:, None], mimo).squeeze(1)
    input_BHPN = torch.einsum("brhp,brhn->bhpn", x_BRHP * before_BH[:, None, :, None], state.B.to(dtype))
    return state.ssm.to(dtype) + input_BHPN


def _per_head(x_BLRGN: Tensor, bias_HRN: Tensor) -> Tensor:
    """BLRHN: a group's projection plus the bias of each of its heads."""
    heads, groups = bias_HRN.shape[0], x_BLRGN.shape[3]
    grouped = bias_HRN.to(x_BLRGN.dtype).transpose(0, 1).unflatten(1, (groups, heads // groups))
    return (x_BLRGN[..., None, :] + grouped).flatten(3, 4)


def _per_rank(x_BLHP: Tensor, mimo: Mimo | None) -> Tensor:
    """BLRHP: the input of each rank."""
    x_BLRHP = x_BLHP[:, :, None]
    return x_BLRHP if mimo is None else x_BLRHP * mimo.x.to(x_BLHP.dtype).transpose(0, 1)


def _per_pair(score_BKHEE: Tensor, factor_BKHQQ: Tensor, rank: int) -> Tensor:
    """Scores of ranks times the factor of their tokens."""
    if rank == 1:
        return score_BKHEE * factor_BKHQQ
    size = factor_BKHQQ.shape[-1]
    score = score_BKHEE.unflatten(-1, (size, rank)).unflatten(-3, (size, rank))
    return (score * factor_BKHQQ[..., :, None, :, None]).flatten(-2).flatten(-3, -2)


def _skip_and_gate(y_BLRHP: Tensor, x_BLRHP: Tensor, D: Tensor | None, z: Tensor | None, mimo: Mimo | None) -> Tensor:
    if D is not None:
        y_BLRHP = y_BLRHP + x_BLRHP * D[:, None].to(x_BLRHP.dtype)
    if z is not None:
        z_BLRHP = z.to(y_BLRHP.dtype)[:, :, None]
        if mimo is not None and mimo.z is not None:
            z_BLRHP = z_BLRHP * mimo.z.to(z_BLRHP.dtype).transpose(0, 1)
        y_BLRHP = y_BLRHP * functional.silu(z_BLRHP)
    if mimo is None:
        return y_BLRHP.squeeze(2)
    return y_BLRHP if mimo.out is None else torch.einsum("blrhp,hrp->blhp", y_BLRHP, mimo.out.to(y_BLRHP.dtype))
