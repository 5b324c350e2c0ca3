"""Where the gradient of a parameter goes: back to autograd, or straight into a running sum.

A parameter that wants its gradients summed (over the segments of a long sequence, say) has a method `grad_sum()` that
returns the tensor to add to, in at least float32, or None. Whoever computes a gradient then adds to it in place, in
the matrix product itself where there is one, and hands autograd nothing: no gradient in the parameter's own, lower
precision ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wants_sum(parameter: Tensor | None) -> bool:
    """Whether `parameter` may have a sum to add to; asking does not create one."""
    return hasattr(parameter, "grad_sum")


def grad_sum(parameter: Tensor) -> Tensor | None:
    """The sum to add gradients of `parameter` to, None if autograd takes them."""
    method = getattr(parameter, "grad_sum", None)
    return None if method is None else method()


def deliver(parameter: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Add a gradient to the parameter's sum and return None, or return it shaped and typed as the parameter."""
    if parameter is None or grad is None:
        return None
    grad = grad.reshape(parameter.shape)
    total = grad_sum(parameter)
    if total is None:
        return grad.to(parameter.dtype)
    total.add_(grad)
    return None


def deliver_product(parameter: Tensor, left_RM: Tensor, right_RN: Tensor) -> Tensor | None:
    """As `deliver` for the gradient `left^T right` of a matrix `(M, N)`, summed over rows inside the product.

    Products of float16 and bfloat16 rows go into a float32 sum without a rounding in between.
    """
    total = grad_sum(parameter)
    if total is None:
        return (left_RM.T @ right_RN).to(parameter.dtype)
    if total.dtype == left_RM.dtype:
        total.addmm_(left_RM.T, right_RN)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left_RM.T, right_RN, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left_RM.T.to(total.dtype), right_RN.to(total.dtype))
    return None
