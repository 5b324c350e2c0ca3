"""State and options of a Mamba-2 layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

from torch import Tensor

from magc_kernels.mamba2.values import Keep

if TYPE_CHECKING:
    from magc_kernels.configs import KernelConfigs


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer carries from one segment to the next."""

    conv: Tensor
    """Last inputs of the convolution, oldest first, `(batch, d_conv - 1, channels)`, in the input's type."""
    ssm: Tensor
    """State of the scan, `(batch, heads, headdim, d_state)`, float32 (float64 for float64 activations)."""
    seq_idx: Tensor | None = None
    """Document of the last token, `(batch,)` int32; None unless sequences are packed."""


class Mamba2Options(TypedDict, total=False):
    """Keyword options of `Mamba2`, for layers that build one."""

    d_state: int
    d_conv: int
    conv_init: float | None
    expand: int
    headdim: int
    d_ssm: int | None
    ngroups: int
    A_init_range: tuple[float, float]
    D_has_hdim: bool
    rmsnorm: bool
    norm_before_gate: bool
    dt_min: float
    dt_max: float
    dt_init_floor: float
    dt_limit: tuple[float, float]
    bias: bool
    conv_bias: bool
    chunk_size: int
    keep: Keep
    configs: KernelConfigs | None
