"""What a linear layer computes, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`.

    Returns:
        `(..., out)`, typed as the inputs; under autocast in its type.
    """
    return functional.linear(x, weight, bias)
