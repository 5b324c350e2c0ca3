"""What a Mamba-2 layer computes with, shared by all implementations of `magc_kernels.mamba2`.

Shape letters: B batch, L length, D d_model, C conv channels, W conv width, H heads, P headdim, G groups, N d_state,
M channels of the gated MLP beside the scan (usually none).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from magc_kernels._packing import check_seq_idx

if TYPE_CHECKING:
    from magc_kernels.configs import KernelConfigs

Keep = Literal["projection", "states", "outputs"]
"""How much a recompute keeps for its backward: see `magc_kernels.mamba2.autograd`."""


@dataclass(frozen=True)
class Mamba2Weights:
    """Parameters, with the names that mamba-ssm's state dict has for them."""

    in_proj: Tensor
    """`(2 M + 2 H P + 2 G N + H, D)`: z and x of the MLP, then z, x, B, C, dt."""
    conv: Tensor
    """`(C, 1, W)`, C = H P + 2 G N."""
    dt_bias: Tensor
    """`(H,)`."""
    A_log: Tensor
    """`(H,)`: A = -exp(A_log), in at least float32."""
    D: Tensor
    """`(H,)`, or `(H P,)` for one per channel."""
    out_proj: Tensor
    """`(D, M + H P)`."""
    in_bias: Tensor | None = None
    conv_bias: Tensor | None = None
    norm: Tensor | None = None
    """Of the gated RMSNorm, `(H P,)`; None: the gate is applied alone."""
    out_bias: Tensor | None = None
    block_norm: Tensor | None = None
    """Of the RMSNorm in front of the layer, `(D,)`; None: the input comes normalised, and there is no residual."""


@dataclass(frozen=True)
class Mamba2Sizes:
    """Sizes and settings that the weights' shapes do not tell."""

    headdim: int
    groups: int
    d_state: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int | None = None
    norm_eps: float = 1e-5
    norm_before_gate: bool = False
    block_norm_eps: float = 1e-5
    residual_in_fp32: bool = True

    def split(self, weights: Mamba2Weights) -> list[int]:
        """Columns of the projection: z and x of the MLP, z of the scan, input of the convolution, dt."""
        heads = weights.dt_bias.shape[0]
        scan = heads * self.headdim
        mlp = weights.out_proj.shape[1] - scan
        return [mlp, mlp, scan, scan + 2 * self.groups * self.d_state, heads]

    def split_conv(self, weights: Mamba2Weights) -> list[int]:
        """Columns of the convolution's output: x, B, C."""
        return [weights.dt_bias.shape[0] * self.headdim, *[self.groups * self.d_state] * 2]


@dataclass(frozen=True)
class Mamba2Inputs:
    """One segment's inputs."""

    hidden: Tensor
    """`(B, L, D)`."""
    weights: Mamba2Weights
    sizes: Mamba2Sizes
    residual: Tensor | None = None
    """`(B, L, D)`: what to add `hidden` to, in front of a norm; None at the start of the stream."""
    conv_state: Tensor | None = None
    """`(B, W - 1, C)`; None for zeros."""
    ssm_state: Tensor | None = None
    """`(B, H, P, N)` float32; None for zeros."""
    seq_idx: Tensor | None = None
    """`(B, L)` integers: document of each token of packed sequences."""
    prev_seq_idx: Tensor | None = None
    """`(B,)`: document of the token before the segment."""
    configs: KernelConfigs | None = None
    """Launch configurations of the Triton kernels; None, and shapes that are not in it, for the shipped ones."""


@dataclass(frozen=True)
class Mamba2Outputs:
    """One segment's results; `y` and `residual` are shaped as `hidden`."""

    y: Tensor
    residual: Tensor | None
    """The sum that the norm in front of the layer saw; None without one."""
    conv_state: Tensor
    ssm_state: Tensor


def check(inputs: Mamba2Inputs) -> None:
    """Refuse what no implementation can work on.

    Raises:
        ValueError: shapes of the input, the residual or `seq_idx` do not fit.
    """
    hidden, weights = inputs.hidden, inputs.weights
    width = weights.in_proj.shape[1]
    if hidden.ndim != 3 or hidden.shape[-1] != width or 0 in hidden.shape:
        raise ValueError(f"hidden must be (batch, length >= 1, {width}), got {tuple(hidden.shape)}")
    if inputs.residual is not None and weights.block_norm is None:
        raise ValueError("a residual was given to a layer without block_norm in front; add it to hidden first")
    if inputs.residual is not None and inputs.residual.shape != hidden.shape:
        raise ValueError(
            f"residual must be shaped as hidden, {tuple(hidden.shape)}, got {tuple(inputs.residual.shape)}"
        )
    columns = sum(inputs.sizes.split(weights))
    if weights.in_proj.shape[0] != columns:
        raise ValueError(f"in_proj must have {columns} rows for these sizes, got {weights.in_proj.shape[0]}")
    if inputs.seq_idx is not None:
        check_seq_idx(inputs.seq_idx, inputs.prev_seq_idx)
