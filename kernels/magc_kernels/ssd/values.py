"""What the Mamba-2 scan's kernels take, keep for their backward and give. See `autograd`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from magc_kernels.ssd._config import SSDConfig


@dataclass(frozen=True)
class SSDInputs:
    """Inputs of one segment. Shapes as in `reference.ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    seq_idx: Tensor | None = None
    prev_seq_idx: Tensor | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int | None = None
    config: SSDConfig | None = None
    """Launch configuration; None for the shipped one."""


@dataclass(frozen=True)
class SSDSaved:
    """What `vjp` needs of a forward or recompute besides the inputs."""

    inputs: SSDInputs
    config: SSDConfig
    step: Tensor
    """`(batch, heads, chunks * chunk)` float32."""
    cumulative: Tensor
    """Running sums of `step * A * log2(e)` in each chunk, shaped as `step`."""
    runs: Tensor | None
    """`(batch, 1 + chunks * chunk)` int32: number of document changes so far, 0 first."""
    states: Tensor
    """State before each chunk, `(batch, chunks, heads, headdim, d_state)` in the type of `x`."""
    ungated: Tensor | None
    """The output before the gate; None without one."""


@dataclass(frozen=True)
class SSDGradients:
    """Gradients of the tensors of `SSDInputs`, shaped and, unless asked otherwise, typed as these; `initial_state`
    is float32 and always there.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor
