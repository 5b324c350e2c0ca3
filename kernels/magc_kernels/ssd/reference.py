"""Mamba-2 scan (SSD) in plain PyTorch.

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6.

Per head, with a step `dt_t >= 0` and a rate `A <= 0`,

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,        y_t = h_t C_t + D x_t,

where `h_t` is `(headdim, d_state)`. The sequence is cut into chunks: inside a chunk the recurrence is a
masked matrix product (all chunks at once); from chunk to chunk only the state passes. Time and memory are
linear in the length, and no `(length, headdim, d_state)` tensor exists.

Shape letters: B batch, L length, H heads, P headdim, G groups, R heads per group, N d_state, K chunks, Q
chunk size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._chunks import chunk_decay, pad
from magc_kernels._packing import document_runs
from magc_kernels._precision import autocast_off, compute_dtype

PREFERRED_CHUNK_SIZE = 64
"""Backward keeps about `2 * heads * chunk_size` elements per token for the intra-chunk matrices and
`heads * headdim * d_state / chunk_size` for the states: near the least at headdim 64, d_state 128."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    chunk_size: int = PREFERRED_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Scan a segment of any length from a given state and return the state after it.

    Computes in float32, in float64 if `x` is float64, also under autocast.

    Args:
        x: `(batch, length, heads, headdim)`.
        dt: step of each token and head before bias and softplus, `(batch, length, heads)`.
        A: rate of each head, `(heads,)`, not positive.
        B: input projection, `(batch, length, groups, d_state)`; `groups` divides `heads`.
        C: output projection, shaped as `B`.
        D: skip weight `(heads,)` or `(heads, headdim)`.
        z: gate, shaped as `x`: the output is multiplied by `silu(z)`.
        dt_bias: `(heads,)`, added to `dt` first.
        dt_softplus: apply softplus to the biased step.
        dt_limit: bounds the step is clamped to in the end; the lower one is not negative.
        initial_state: `(batch, heads, headdim, d_state)`; None for zeros.
        seq_idx: document of each token in packed sequences, `(batch, length)` integers. The state starts
            afresh where it changes.
        prev_seq_idx: `(batch,)`: the document `initial_state` belongs to, that of the token before the
            segment. None: the document of the segment's first token. Handing on the last token's id makes
            any segmentation of a packed row equal to the whole.
        chunk_size: most tokens in a chunk. It changes speed, memory (the intra-chunk matrices hold
            `length * chunk_size * heads` elements) and rounding, nothing else.

    Returns:
        The output, shaped and typed as `x`, and the state after the last token, shaped as `initial_state`,
        in float32 (float64 if `x` is float64).

    Raises:
        ValueError: a shape, `dt_limit` or `chunk_size` is wrong.
        TypeError: `x` is not floating-point.
    """
    check(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if prev_seq_idx is not None and seq_idx is None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
    if seq_idx is not None and seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx must have shape {tuple(x.shape[:2])}, got {tuple(seq_idx.shape)}")
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    ratio = heads // groups
    dtype = compute_dtype(x.dtype)
    size = min(chunk_size, length)
    count = -(-length // size)
    tail = count * size - length

    with autocast_off(x.device):
        step_BLH = _step(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
        x_BLHP = x.to(dtype)
        # The tail of a ragged last chunk has step 0: it neither decays the state nor adds to it.
        input_BLHP = pad(x_BLHP * step_BLH[..., None], tail)
        rate_BLH = pad(step_BLH * A.to(dtype), tail)
        input_BKGQRP = input_BLHP.reshape(batch, count, size, groups, ratio, headdim).transpose(2, 3)
        B_BKGQN = pad(B.to(dtype), tail).reshape(batch, count, size, groups, d_state).transpose(2, 3)
        C_BKGQN = pad(C.to(dtype), tail).reshape(batch, count, size, groups, d_state).transpose(2, 3)
        decay = chunk_decay(
            rate_BLH.reshape(batch, count, size, groups, ratio).permute(0, 1, 3, 2, 4),
            None if seq_idx is None else document_runs(seq_idx, prev_seq_idx),
        )

        # Inside each chunk, the diagonal blocks: (decay * C B^T) x.
        score_BKGQQ = C_BKGQN @ B_BKGQN.transpose(-1, -2)
        mixing_BKGRQQ = score_BKGQQ[:, :, :, None] * decay.within
        y_BKGRQP = mixing_BKGRQQ @ input_BKGQRP.transpose(3, 4)

        # What each chunk adds to the state by its end.
        weighted_BKGQRP = input_BKGQRP * decay.to_end[..., None]
        added_BKGRPN = (weighted_BKGQRP.flatten(4).transpose(-1, -2) @ B_BKGQN).unflatten(3, (ratio, headdim))

        # From chunk to chunk. Reading the output here, state by state, keeps one copy of the states for
        # backward.
        if initial_state is None:
            state_BGRPN = x_BLHP.new_zeros(batch, groups, ratio, headdim, d_state)
        else:
            state_BGRPN = initial_state.to(dtype).reshape(batch, groups, ratio, headdim, d_state)
        carried: list[Tensor] = []
        for C_BGQN, added_BGRPN, across_BGR in zip(
            C_BKGQN.unbind(1), added_BKGRPN.unbind(1), decay.across.unbind(1), strict=True
        ):
            carried.append(C_BGQN @ state_BGRPN.flatten(2, 3).transpose(-1, -2))
            state_BGRPN = state_BGRPN * across_BGR[..., None, None] + added_BGRPN
        carried_BKGQRP = torch.stack(carried, 1).unflatten(-1, (ratio, headdim))

        y_BKGQRP = y_BKGRQP.transpose(3, 4) + carried_BKGQRP * decay.from_start[..., None]
        y_BLHP = y_BKGQRP.transpose(2, 3).reshape(batch, count * size, heads, headdim)[:, :length]
        y_BLHP = _skip_and_gate(y_BLHP, x_BLHP, D, z)
    return y_BLHP.to(x.dtype), state_BGRPN.reshape(batch, heads, headdim, d_state)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; equals `ssd` on a segment of length one.

    Args:
        x: `(batch, heads, headdim)`.
        dt: `(batch, heads)`.
        A: as in `ssd`.
        B: `(batch, groups, d_state)`.
        C: `(batch, groups, d_state)`.
        state: `(batch, heads, headdim, d_state)`, not written to.
        D: as in `ssd`.
        z: gate, shaped as `x`.
        dt_bias: as in `ssd`.
        dt_softplus: as in `ssd`.
        dt_limit: as in `ssd`.

    Returns:
        The output, as `x`, and the new state in float32 (float64 if `x` is float64).

    Raises:
        ValueError, TypeError: as `ssd`.
    """
    if x.ndim != 3 or dt.ndim != 2 or B.ndim != 3 or C.ndim != 3:
        raise ValueError(
            "ssd_step takes x (batch, heads, headdim), dt (batch, heads) and B, C (batch, groups, d_state); "
            f"got x {tuple(x.shape)}, dt {tuple(dt.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
    check(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        None if z is None else z[:, None],
        dt_bias,
        dt_limit,
        state,
    )
    dtype = compute_dtype(x.dtype)
    ratio = x.shape[1] // B.shape[1]
    with autocast_off(x.device):
        step_BH = _step(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
        decay_BH = torch.exp(step_BH * A.to(dtype))
        x_BHP = x.to(dtype)
        B_BHN = B.to(dtype).repeat_interleave(ratio, dim=1)
        C_BHN = C.to(dtype).repeat_interleave(ratio, dim=1)
        added_BHPN = (x_BHP * step_BH[..., None])[..., None] * B_BHN[:, :, None]
        new_state = state.to(dtype) * decay_BH[..., None, None] + added_BHPN
        y_BHP = (new_state @ C_BHN[..., None]).squeeze(-1)
        y_BHP = _skip_and_gate(y_BHP, x_BHP, D, z)
    return y_BHP.to(x.dtype), new_state


def _step(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    low, high = dt_limit
    if dt_softplus and low == 0.0 and high == math.inf:
        return dt
    return dt.clamp(low, high)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None]).to(x.dtype)
    if z is not None:
        y = y * functional.silu(z.to(y.dtype))
    return y


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    state: Tensor | None,
) -> None:
    """Refuse what the operator cannot work on: shapes, types and options."""
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, length >= 1, heads, headdim), got {tuple(x.shape)}")
    batch, length, heads, headdim = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, length) or B.shape[2] == 0 or heads % B.shape[2]:
        raise ValueError(
            f"B must have shape ({batch}, {length}, groups, d_state), groups dividing {heads} heads; "
            f"got {tuple(B.shape)}"
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "C": (C, tuple(B.shape)),
        "D": (D, (heads, headdim) if D is not None and D.ndim == 2 else (heads,)),
        "z": (z, tuple(x.shape)),
        "dt_bias": (dt_bias, (heads,)),
        "the state": (state, (batch, heads, headdim, B.shape[3])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    low, high = dt_limit
    if not 0.0 <= low <= high:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
