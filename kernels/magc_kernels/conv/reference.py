"""Causal depthwise convolution with state, in plain PyTorch.

    y[t, c] = act(bias[c] + sum_j weight[c, W-1-j] x[t-j, c]),        j = 0 .. W-1,

where the W - 1 tokens before the segment come from the state.

Shape letters: B batch, L length, C channels, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._packing import document_runs
from magc_kernels._precision import autocast_off, compute_dtype

Activation = Literal["silu"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve a segment of any length, also one shorter than the state, and return the state after it.

    Computes in float32, in float64 if `x` is float64, also under autocast.

    Args:
        x: `(batch, length, channels)`.
        weight: `(channels, width)`, width 2 to 4; the last column meets the current token.
        bias: `(channels,)`.
        activation: "silu" or None.
        initial_state: the `width - 1` inputs before the segment, oldest first, `(batch, width - 1, channels)`
            in the type of `x`; None for zeros.
        seq_idx: document of each token in packed sequences, `(batch, length)` integers: no token sees another
            document's.
        prev_seq_idx: `(batch,)`: document of the token before the segment, to which the state belongs. None:
            that of the segment's first token.

    Returns:
        The output, shaped and typed as `x`, and the state after the last token, shaped and typed as
        `initial_state`. Its rows from documents other than the last token's are zero, so that one document id
        speaks for all of it.

    Raises:
        ValueError: a shape or the activation is wrong.
        TypeError: `x` is not floating-point, or the state is of another type.
    """
    check(x, weight, bias, activation, initial_state)
    if prev_seq_idx is not None and seq_idx is None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
    if seq_idx is not None and seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx must have shape {tuple(x.shape[:2])}, got {tuple(seq_idx.shape)}")
    batch, length, channels = x.shape
    width = weight.shape[1]
    dtype = compute_dtype(x.dtype)
    state = x.new_zeros(batch, width - 1, channels) if initial_state is None else initial_state
    runs_BL = None if seq_idx is None else document_runs(seq_idx, prev_seq_idx)
    # The rows of the state belong to run 0.
    runs = None if runs_BL is None else functional.pad(runs_BL, (width - 1, 0))

    window = torch.cat([state, x], dim=1)
    with autocast_off(x.device):
        y = _convolve(window.to(dtype), weight.to(dtype), bias, runs)
        y = functional.silu(y) if activation == "silu" else y
    # A slice would keep the whole segment alive through the state.
    new_state = window[:, length:].clone()
    if runs is not None:
        foreign = runs[:, length:] != runs[:, -1:]
        new_state = new_state.masked_fill(foreign[..., None], 0.0)
    return y.to(x.dtype), new_state


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: Activation | None = None
) -> tuple[Tensor, Tensor]:
    """One token; equals `causal_conv1d` on a segment of length one.

    Args:
        x: `(batch, channels)`.
        weight: as in `causal_conv1d`.
        bias: as in `causal_conv1d`.
        state: `(batch, width - 1, channels)`, not written to.
        activation: as in `causal_conv1d`.

    Returns:
        The output `(batch, channels)` and the new state, both in the type of `x`.

    Raises:
        ValueError, TypeError: as `causal_conv1d`.
    """
    if x.ndim != 2:
        raise ValueError(f"causal_conv1d_step takes x (batch, channels), got {tuple(x.shape)}")
    check(x[:, None], weight, bias, activation, state)
    dtype = compute_dtype(x.dtype)
    window = torch.cat([state, x[:, None]], dim=1)
    with autocast_off(x.device):
        y = (window.to(dtype) * weight.to(dtype).T).sum(1)
        y = y if bias is None else y + bias.to(dtype)
        y = functional.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[:, 1:].clone()


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor | None) -> Tensor:
    width = weight.shape[1]
    length = window.shape[1] - width + 1
    y = window[:, width - 1 :] * weight[:, -1]
    for tap in range(width - 1):
        term = window[:, tap : tap + length] * weight[:, tap]
        if runs is not None:
            # Masking the product, not its factor, leaves nothing but the mask to keep for backward.
            foreign = runs[:, tap : tap + length] != runs[:, width - 1 :]
            term = term.masked_fill(foreign[..., None], 0.0)
        y = y + term
    return y if bias is None else y + bias.to(y.dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None) -> None:
    """Refuse what the operator cannot work on: shapes and options."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, length >= 1, channels), got {tuple(x.shape)}")
    batch, _, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"weight must have shape ({channels}, width) with width 2 to 4, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if state is not None:
        expected = (batch, weight.shape[1] - 1, channels)
        if tuple(state.shape) != expected:
            raise ValueError(f"the state must have shape {expected}, got {tuple(state.shape)}")
        if state.dtype != x.dtype:
            raise TypeError(f"the state must be of the type of x, {x.dtype}, got {state.dtype}")
