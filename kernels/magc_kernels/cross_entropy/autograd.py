"""Linear layer and cross entropy in one: float32 logits exist for a few rows at a time, and none are kept.

The forward overwrites each block of logits with its gradient, in the type of the product, which is what the backward of
separate operators would arrive at; that is kept. The backward is then two products, the weight's straight into its sum
(see `magc_kernels._accumulate`). Plain PyTorch on any device, without a wait for it: CUDA graphs can capture it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magc_kernels._accumulate import deliver, deliver_product
from magc_kernels._precision import autocast_off, autocast_type, compute_dtype
from magc_kernels.cross_entropy.reference import check
from magc_kernels.linear.autograd import cast

BLOCK_ELEMENTS = 1 << 24
"""Logits that exist in float32 at a time: 64 MiB."""
Options = tuple[int, float, float, Tensor | None]
"""``ignore_index``, ``label_smoothing``, ``z_loss`` and ``l2_warp``."""


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
    """As `reference.linear_cross_entropy`, differentiable once."""
    check(x, weight, targets, bias, label_smoothing, l2_warp)
    options = (ignore_index, label_smoothing, z_loss, l2_warp)
    given = (x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        total, count = _LinearCrossEntropy.apply(options, targets, *given)
        return total, count
    total, count, _ = _forward(x, weight, bias, targets, options, keep=False)
    return total, count


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The summed loss, the count, and the gradient of the sum with respect to the logits `(rows, vocabulary)`."""
    ignore_index, smoothing, z_loss, l2_warp = options
    dtype = autocast_type(x)
    with torch.no_grad(), autocast_off(x.device):
        x_RD = cast(x, dtype).flatten(0, -2)
        w_DV = cast(weight, dtype).T
        b_V = None if bias is None else cast(bias, dtype)
        rows, vocabulary = x_RD.shape[0], weight.shape[0]
        wide = compute_dtype(x_RD.dtype)
        targets_R = targets.flatten()
        counted_R = targets_R != ignore_index
        index_R = torch.where(counted_R, targets_R, 0)
        losses_R = torch.empty(rows, dtype=wide, device=x.device)
        gradient = torch.empty(rows, vocabulary, dtype=x_RD.dtype, device=x.device) if keep else None
        block = max(1, BLOCK_ELEMENTS // vocabulary)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            product = x_RD[part] @ w_DV if b_V is None else torch.addmm(b_V, x_RD[part], w_DV)
            logits, index, counted = product.to(wide), index_R[part, None], counted_R[part]
            log_sum = logits.logsumexp(-1)
            loss = log_sum - (1 - smoothing) * logits.gather(-1, index).squeeze(-1)
            if smoothing:
                loss = loss - smoothing * logits.mean(-1)
            if z_loss:
                loss = loss + z_loss * log_sum.square()
            losses_R[part] = torch.where(counted, loss, 0.0)
            if gradient is not None:
                warp = None if l2_warp is None else _warp(logits, l2_warp)
                # Of float64 logits `to` made no copy, but then the product is nobody else's either.
                d = logits.sub_(log_sum[:, None]).exp_()
                if z_loss:
                    d.mul_(1 + 2 * z_loss * log_sum[:, None])
                if smoothing:
                    d.sub_(smoothing / vocabulary)
                d.scatter_add_(-1, index, torch.full_like(index, smoothing - 1, dtype=wide))
                d = torch.where(counted[:, None], d, 0.0)
                if warp is not None:
                    d.scatter_add_(-1, *warp)
                gradient[part] = d
        return losses_R.sum(), counted_R.sum(), gradient


def _warp(logits: Tensor, l2_warp: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row of `(rows, vocabulary)` is greatest, and what its gradient gets there, both `(rows, 1)`."""
    greatest = logits.max(-1, keepdim=True)
    return greatest.indices, greatest.values * l2_warp


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, targets: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total, count, gradient = _forward(x, weight, bias, targets, options, keep=True)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, weight, gradient)
        ctx.parameters = (weight, bias)
        return total, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no gradients of gradients (create_graph=True); use reference.linear_cross_entropy"
            )
        scale = grads[0]
        x, weight, gradient = ctx.saved_tensors
        own_weight, own_bias = ctx.parameters  # these, not what saving made of them, know their sums
        with autocast_off(x.device):
            dx = dweight = dbias = None
            if ctx.needs_input_grad[2]:
                dx = ((gradient @ weight.to(gradient.dtype)) * scale).to(x.dtype).view(x.shape)
            if ctx.needs_input_grad[3]:
                scaled = (x.flatten(0, -2) * scale).to(gradient.dtype)
                dweight = deliver_product(own_weight, gradient, scaled)
            if own_bias is not None and ctx.needs_input_grad[4]:
                dbias = deliver(own_bias, gradient.sum(0, dtype=compute_dtype(gradient.dtype)) * scale)
            return None, None, dx, dweight, dbias
