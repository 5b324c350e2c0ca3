"""RMSNorm and its two fused forms in plain PyTorch: Zhang and Sennrich, arXiv 1910.07467.

All compute in float32 (float64 for float64 inputs), also under autocast, and round once, at the output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._precision import autocast_off, compute_dtype


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis.

    Args:
        x: `(..., features)`.
        weight: `(features,)`.
        eps: added to the mean square.

    Returns:
        Shaped and typed as `x`.

    Raises:
        ValueError: `weight` does not fit `x`. TypeError: `x` is not floating-point.
    """
    check(x, weight)
    with autocast_off(x.device):
        return _normalise(x.to(compute_dtype(x.dtype)), weight, eps, weight.shape[0]).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMSNorm with a SiLU gate (arXiv 2405.21060, section 7.1), optionally over groups of features.

    Args:
        x: `(..., features)`.
        z: gate, shaped as `x`; None for no gate.
        weight: `(features,)`.
        eps: added to the mean square.
        group_size: features normalised together; it divides `features`. None: all.
        norm_before_gate: True gives `norm(x) * silu(z)`, False `norm(x * silu(z))`.

    Returns:
        Shaped and typed as `x`.

    Raises:
        ValueError: shapes or `group_size` do not fit. TypeError: `x` is not floating-point.
    """
    check(x, weight)
    features = weight.shape[0]
    group_size = features if group_size is None else group_size
    if group_size < 1 or features % group_size:
        raise ValueError(f"group_size must divide the {features} features, got {group_size}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}")
    with autocast_off(x.device):
        y = x.to(compute_dtype(x.dtype))
        gate = None if z is None else functional.silu(z.to(y.dtype))
        if gate is not None and not norm_before_gate:
            y = y * gate
        y = _normalise(y, weight, eps, group_size)
        if gate is not None and norm_before_gate:
            y = y * gate
        return y.to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual_in_fp32: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then normalise the sum.

    Args:
        x: `(..., features)`.
        residual: the stream so far, shaped as `x`; None at its start.
        weight: `(features,)`.
        eps: added to the mean square.
        residual_in_fp32: keep the stream in float32 (float64 for float64 `x`) instead of the type of `x`.

    Returns:
        The normalised sum in the type of `x`, and the sum itself. The norm sees the sum before it is rounded.

    Raises:
        ValueError: shapes do not fit. TypeError: `x` is not floating-point.
    """
    check(x, weight)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    dtype = compute_dtype(x.dtype)
    with autocast_off(x.device):
        total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
        y = _normalise(total, weight, eps, weight.shape[0])
        return y.to(x.dtype), total.to(dtype if residual_in_fp32 else x.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    grouped = x.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (grouped * scale).flatten(-2) * weight.to(x.dtype)


def check(x: Tensor, weight: Tensor) -> None:
    """Refuse what the operator cannot work on: the sizes of x and weight."""
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"weight must have shape (features,) for x (..., features), got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
