"""Small layers and models, and running them segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from magc.nn import Mamba2, Mamba2Config, Mamba2LM

M = TypeVar("M", bound=nn.Module)

SMALL: dict[str, Any] = {"d_model": 8, "d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 4}


def small_config(**changes: Any) -> Mamba2Config:
    return Mamba2Config(**{**SMALL, "n_layer": 2, "vocab_size": 29, **changes})


def perturbed(module: M, seed: int = 0) -> M:
    """Random values for all parameters, so that no gradient is zero and no norm weight is one by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.2 * noise).to(parameter.dtype))
    return module


def small_mamba2(dtype: torch.dtype = torch.float64, **changes: Any) -> Mamba2:
    torch.manual_seed(0)
    return perturbed(Mamba2(**{**SMALL, **changes}, dtype=dtype))


def small_lm(dtype: torch.dtype = torch.float64, **changes: Any) -> Mamba2LM:
    torch.manual_seed(0)
    return perturbed(Mamba2LM(small_config(**changes), dtype=dtype))


def in_segments(
    layer: Callable[..., tuple[Any, Any]],
    x: Tensor,
    sizes: Sequence[int],
    state: Any = None,
    seq_idx: Tensor | None = None,
) -> tuple[list[Any], Any]:
    """Outputs of the segments and the last state."""
    outputs, start = [], 0
    for size in sizes:
        ids = None if seq_idx is None else seq_idx[:, start : start + size]
        y, state = layer(x[:, start : start + size], state, seq_idx=ids)
        outputs.append(y)
        start += size
    assert start == x.shape[1]
    return outputs, state
