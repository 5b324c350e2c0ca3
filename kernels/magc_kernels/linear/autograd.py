"""Linear layer whose weight gradient is added to a float32 sum inside the matrix product that makes it.

Without a sum to add to (see `magc_kernels._accumulate`) this is PyTorch's own linear layer. The products are cuBLAS's in
either case, on any device PyTorch runs on; no Triton is needed. Adding in the product costs a read and a write of the
sum, where a gradient that is made first and added after is written and read twice besides being rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._accumulate import deliver, deliver_product, wants_sum
from magc_kernels._precision import autocast_off, autocast_type


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear`. Differentiable once where the weight or the bias has a sum to add its gradient to."""
    if torch.is_grad_enabled() and (
        (weight.requires_grad and wants_sum(weight)) or (bias is not None and bias.requires_grad and wants_sum(bias))
    ):
        return _Linear.apply(x, weight, bias)
    return functional.linear(x, weight, bias)


def weight_vjp(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and the bias, None for one that was added to its sum.

    Args:
        x: `(..., in)`, as it entered the product.
        weight: `(out, in)`; only its type and its sum matter.
        bias: `(out,)` likewise, or None.
        dy: gradient of the output, `(..., out)`, typed as `x`.
    """
    x_RI, dy_RO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dweight = deliver_product(weight, dy_RO, x_RI) if weight.requires_grad else None
    if bias is None or not bias.requires_grad:
        return dweight, None
    return dweight, deliver(bias, dy_RO.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = autocast_type(x)
        ctx.x_dtype = x.dtype
        # The cast weight is not kept: over a deep stack that would be a second copy of the model.
        x = cast(x, dtype)
        ctx.save_for_backward(x, weight)
        ctx.parameters = (weight, bias)
        with autocast_off(x.device):
            return functional.linear(x, cast(weight, dtype), None if bias is None else cast(bias, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a linear layer that adds its weight gradient to a sum has no gradients of gradients (create_graph=True)"
            )
        (dy,) = grads
        x, weight = ctx.saved_tensors
        own_weight, own_bias = ctx.parameters  # these, not what saving made of them, know their sums
        with autocast_off(dy.device):
            dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
            return (dx, *weight_vjp(x, own_weight, own_bias, dy))


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` in the type of a product; None leaves it, so that a mismatch is an error."""
    return x if dtype is None else x.to(dtype)
