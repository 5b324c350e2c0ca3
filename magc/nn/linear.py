"""Linear layer for a grid: `nn.Linear` in everything but where its weight gradient is added up."""

from __future__ import annotations

from torch import Tensor, nn

from magc_kernels.linear.autograd import linear


class Linear(nn.Linear):
    """`nn.Linear` whose weight gradient, in a grid, is added to the float32 sum inside the matrix product.

    Outside a grid it is `nn.Linear` exactly; names, initialisation and state dict are the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return linear(input, self.weight, self.bias)
