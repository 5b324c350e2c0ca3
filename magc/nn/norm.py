"""RMSNorm modules that hold the `norm.weight` of mamba-ssm checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magc.nn.operators import Impl, check_impl, operators

MAX_GROUP_SIZE = 16384
"""Most features normalised together by the Triton norms (`magc_kernels.norm.autograd.MAX_GROUP_SIZE`)."""


class AddRMSNorm(nn.Module):
    """Add to the residual stream, then RMSNorm: the start of a pre-norm block.

    Args:
        features: size of the last axis.
        eps: added to the mean square.
        residual_in_fp32: keep the stream in float32 whatever the type of the activations (float64 stays
            float64).
        impl: see `magc.nn.operators.Impl`.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.impl: Impl = check_impl(impl)
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum, typed as `x`, and the sum. Both are shaped as `x` `(..., features)`."""
        return operators(self.impl, x.device, x.dtype, _obstacle(self.weight.shape[0])).add_rms_norm(
            x, residual, self.weight, eps=self.eps, residual_in_fp32=self.residual_in_fp32
        )


class GatedRMSNorm(nn.Module):
    """RMSNorm of a gated signal (mamba-ssm's `RMSNormGated`).

    Args:
        features: size of the last axis.
        eps: added to the mean square.
        group_size: features normalised together; None: all.
        norm_before_gate: True gives `norm(x) * silu(z)`, False `norm(x * silu(z))`.
        impl: see `magc.nn.operators.Impl`.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.impl: Impl = check_impl(impl)
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the normalised `x` gated by `z`, or not gated without; all shaped `(..., features)`."""
        obstacle = _obstacle(self.group_size or self.weight.shape[0])
        return operators(self.impl, x.device, x.dtype, obstacle).gated_rms_norm(
            x,
            z,
            self.weight,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )


def _obstacle(group_size: int) -> str:
    return f"{group_size} features in a group are too many for the Triton norms" if group_size > MAX_GROUP_SIZE else ""
