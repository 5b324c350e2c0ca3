"""Mamba-1 selective scan in plain PyTorch.

Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2.

Per channel, with a step `dt_t` and a rate `A` for each of its states,

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,        y_t = h_t . C_t + D x_t,

where `h_t`, `A`, `B_t` and `C_t` have `d_state` entries. The sequence is cut into chunks that advance side by side,
token by token: once from zero for what each chunk adds to the state, then, after the states have passed from chunk to
chunk, from these for the outputs. No decay is ever divided out, so any step and rate is exact.

Shape letters: B batch, L length, D channels, G groups, R channels per group, N d_state, K chunks, Q chunk size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._packing import document_runs
from magc_kernels._precision import autocast_off, compute_dtype

PREFERRED_CHUNK_SIZE = 64
"""A pass takes as many steps as a chunk has tokens, each on one state per chunk: long chunks cost time, short ones
memory."""


def selective_scan(
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
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    chunk_size: int = PREFERRED_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Scan a segment of any length from a given state and return the state after it.

    Computes in float32, in float64 if `x` is float64, also under autocast.

    Args:
        x: `(batch, length, channels)`.
        dt: step of each token and channel before bias and softplus, shaped as `x`.
        A: rate of each state, `(channels, d_state)`, not positive.
        B: input projection, `(batch, length, groups, d_state)`; `groups` divides `channels`.
        C: output projection, shaped as `B`.
        D: skip weight, `(channels,)`.
        z: gate, shaped as `x`: the output is multiplied by `silu(z)`.
        dt_bias: `(channels,)`, added to `dt` first.
        dt_softplus: apply softplus to the biased step.
        initial_state: `(batch, channels, d_state)`; None for zeros.
        seq_idx: document of each token in packed sequences, `(batch, length)` integers. The state starts
            afresh where it changes.
        prev_seq_idx: `(batch,)`: the document `initial_state` belongs to, that of the token before the
            segment. None: the document of the segment's first token. Handing on the last token's id makes
            any segmentation of a packed row equal to the whole.
        chunk_size: most tokens in a chunk. It changes speed, memory and rounding, nothing else.

    Returns:
        The output, shaped and typed as `x`, and the state after the last token, shaped as `initial_state`,
        in float32 (float64 if `x` is float64).

    Raises:
        ValueError: a shape or `chunk_size` is wrong.
        TypeError: `x` is not floating-point.
    """
    check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, prev_seq_idx)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length, channels = x.shape
    groups, d_state = B.shape[2:]
    ratio = channels // groups
    dtype = compute_dtype(x.dtype)
    count = -(-length // chunk_size)
    size = -(-length // count)
    count = -(-length // size)
    tail = count * size - length

    def chunks(tensor: Tensor) -> Tensor:
        """`(batch, length, ...)` to `(batch, chunks, size, ...)`, zeros after the last token."""
        return functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, tail)).unflatten(1, (count, size))

    with autocast_off(x.device):
        x_BLD = x.to(dtype)
        step_BLD = _step(dt.to(dtype), dt_bias, dt_softplus)
        # The tail of a ragged last chunk has step 0: it neither decays the state nor adds to it.
        step_BKQGR = chunks(step_BLD).unflatten(-1, (groups, ratio))
        input_BKQGR = chunks(x_BLD * step_BLD).unflatten(-1, (groups, ratio))
        B_BKQGN, C_BKQGN = chunks(B.to(dtype)), chunks(C.to(dtype))
        A_GRN = A.to(dtype).unflatten(0, (groups, ratio))
        fresh_BKQ = None if seq_idx is None else chunks(_starts(seq_idx, prev_seq_idx))

        def advance(state: Tensor, i: int) -> Tensor:
            """From before to after token `i`, for as many of the first chunks as `state` `(batch, chunks, ...)` has."""
            part = slice(state.shape[1])
            decay = torch.exp(step_BKQGR[:, part, i, :, :, None] * A_GRN)
            if fresh_BKQ is not None:
                decay = decay.masked_fill(fresh_BKQ[:, part, i, None, None, None], 0.0)
            return state * decay + input_BKQGR[:, part, i, :, :, None] * B_BKQGN[:, part, i, :, None]

        if initial_state is None:
            start_BGRN = x_BLD.new_zeros(batch, groups, ratio, d_state)
        else:
            start_BGRN = initial_state.to(dtype).reshape(batch, groups, ratio, d_state)
        starts = [start_BGRN]
        if count > 1:
            added_BKGRN = x_BLD.new_zeros(batch, count - 1, groups, ratio, d_state)
            for i in range(size):
                added_BKGRN = advance(added_BKGRN, i)
            across_BKGRN = torch.exp(step_BKQGR[:, :-1].sum(2)[..., None] * A_GRN)
            if fresh_BKQ is not None:
                across_BKGRN = across_BKGRN.masked_fill(fresh_BKQ[:, :-1].any(2)[:, :, None, None, None], 0.0)
            for across_BGRN, added_BGRN in zip(across_BKGRN.unbind(1), added_BKGRN.unbind(1), strict=True):
                starts.append(starts[-1] * across_BGRN + added_BGRN)

        state_BKGRN = torch.stack(starts, 1)
        outputs: list[Tensor] = []
        for i in range(size):
            state_BKGRN = advance(state_BKGRN, i)
            outputs.append((state_BKGRN @ C_BKQGN[:, :, i, :, :, None]).squeeze(-1))
        y_BLD = torch.stack(outputs, 2).reshape(batch, count * size, channels)[:, :length]
        y_BLD = _skip_and_gate(y_BLD, x_BLD, D, z)
        # A copy, so that the state does not keep those of all chunks alive.
        final_BDN = state_BKGRN[:, -1].reshape(batch, channels, d_state).clone()
    return y_BLD.to(x.dtype), final_BDN


def selective_scan_step(
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
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; equals `selective_scan` on a segment of length one.

    Args:
        x: `(batch, channels)`.
        dt: shaped as `x`.
        A: as in `selective_scan`.
        B: `(batch, groups, d_state)`.
        C: `(batch, groups, d_state)`.
        state: `(batch, channels, d_state)`, not written to.
        D: as in `selective_scan`.
        z: gate, shaped as `x`.
        dt_bias: as in `selective_scan`.
        dt_softplus: as in `selective_scan`.

    Returns:
        The output, as `x`, and the new state in float32 (float64 if `x` is float64).

    Raises:
        ValueError, TypeError: as `selective_scan`.
    """
    if x.ndim != 2 or dt.ndim != 2 or B.ndim != 3 or C.ndim != 3:
        raise ValueError(
            "selective_scan_step takes x and dt (batch, channels) and B, C (batch, groups, d_state); "
            f"got x {tuple(x.shape)}, dt {tuple(dt.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
    gate = None if z is None else z[:, None]
    check(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, state, None, None)
    dtype = compute_dtype(x.dtype)
    ratio = x.shape[1] // B.shape[1]
    with autocast_off(x.device):
        x_BD = x.to(dtype)
        step_BD = _step(dt.to(dtype), dt_bias, dt_softplus)
        decay_BDN = torch.exp(step_BD[..., None] * A.to(dtype))
        B_BDN = B.to(dtype).repeat_interleave(ratio, dim=1)
        C_BDN = C.to(dtype).repeat_interleave(ratio, dim=1)
        new_state = state.to(dtype) * decay_BDN + (x_BD * step_BD)[..., None] * B_BDN
        y_BD = _skip_and_gate((new_state * C_BDN).sum(-1), x_BD, D, z)
    return y_BD.to(x.dtype), new_state


def _step(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return functional.softplus(dt) if dt_softplus else dt


def _starts(seq_idx: Tensor, prev_seq_idx: Tensor | None) -> Tensor:
    """Whether a document begins at each token, `(batch, length)`."""
    runs_BL = document_runs(seq_idx, prev_seq_idx)
    return runs_BL != functional.pad(runs_BL[:, :-1], (1, 0))


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x * D.to(x.dtype)
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
    state: Tensor | None,
    seq_idx: Tensor | None,
    prev_seq_idx: Tensor | None,
) -> None:
    """Refuse what the operator cannot work on."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, length >= 1, channels), got {tuple(x.shape)}")
    batch, length, channels = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, length) or B.shape[2] == 0 or channels % B.shape[2]:
        raise ValueError(
            f"B must have shape ({batch}, {length}, groups, d_state), groups dividing {channels} channels; "
            f"got {tuple(B.shape)}"
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, B.shape[3])),
        "C": (C, tuple(B.shape)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "the state": (state, (batch, channels, B.shape[3])),
        "seq_idx": (seq_idx, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if prev_seq_idx is not None and seq_idx is None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
