"""What a projection followed by a cross entropy computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._precision import autocast_off, compute_dtype


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    l2_warp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of `softmax(x W^T + b)`.

    Args:
        x: `(..., features)`.
        weight: `(vocabulary, features)`.
        targets: `(...)` integers: the right entry of the vocabulary, or `ignore_index` where there is none.
        bias: `(vocabulary,)`.
        ignore_index: marks rows that do not count.
        label_smoothing: share of the probability that is spread evenly over the vocabulary, 0 to 1.
        z_loss: weight of the square of the log of the softmax's denominator (PaLM, arXiv 2204.02311, section 5), added
            to the loss of each row.
        l2_warp: a scalar, constant to autograd. The gradient becomes that of the sum plus half of it times the square of
            each row's greatest logit (the first of equal ones), also of rows that do not count; the sum stays as it is
            (``L2Wrap`` of github.com/BlinkDL/RWKV-LM).

    Returns:
        The sum over counted rows, a scalar in float32 (float64 for float64 logits), and their number, int64.

    Raises:
        ValueError: shapes do not fit, or an option is out of range. TypeError: targets are no integers.
    """
    check(x, weight, targets, bias, label_smoothing, l2_warp)
    logits = functional.linear(x, weight, bias)
    with autocast_off(x.device):
        logits = logits.to(compute_dtype(logits.dtype)).flatten(0, -2)
        rows = targets.flatten()
        counted = rows != ignore_index
        log_sum = logits.logsumexp(-1)
        picked = logits.gather(-1, torch.where(counted, rows, 0)[:, None]).squeeze(-1)
        loss = log_sum - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1) + z_loss * log_sum.square()
        total = torch.where(counted, loss, 0.0).sum()
        return total if l2_warp is None else total + warped_zero(logits, l2_warp), counted.sum()


def warped_zero(logits: Tensor, l2_warp: Tensor) -> Tensor:
    """0 with the gradient of `linear_cross_entropy`'s ``l2_warp``, for finite logits `(rows, vocabulary)`."""
    greatest = logits.max(-1).values
    fixed = greatest.detach()
    return (l2_warp * fixed * (greatest - fixed)).sum()


def check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    l2_warp: Tensor | None = None,
) -> None:
    """Refuse what no implementation can work on; see `linear_cross_entropy`."""
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must be (vocabulary, features) for x (..., features), got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(x.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.dtype.is_floating_point:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
    if l2_warp is not None and (l2_warp.ndim != 0 or l2_warp.requires_grad):
        raise ValueError(
            f"l2_warp must be a scalar that requires no gradient, got shape {tuple(l2_warp.shape)} and "
            f"requires_grad={l2_warp.requires_grad}; detach() it"
        )
