"""Choice of the implementation behind a layer: `impl=` names it, and nothing else is ever taken instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from magc.errors import InputError, MissingExtraError
from magc_kernels.conv import reference as conv_reference
from magc_kernels.norm import reference as norm_reference
from magc_kernels.ssd import reference as ssd_reference

Impl = Literal["auto", "reference", "triton"]
"""`"reference"`: plain PyTorch, any device. `"triton"`: Triton kernels, CUDA devices only. `"auto"`: at present the
reference everywhere."""

_KNOWN = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Operators:
    """The operators of a Mamba-2 layer in one implementation; signatures as in `magc_kernels.*.reference`."""

    name: str
    ssd: Callable[..., tuple[Tensor, Tensor]]
    ssd_step: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d_step: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    max_chunk_size: int
    """Largest SSD chunk that pays: a longer one changes nothing but speed, memory and rounding."""


_REFERENCE = Operators(
    name="reference",
    ssd=ssd_reference.ssd,
    ssd_step=ssd_reference.ssd_step,
    causal_conv1d=conv_reference.causal_conv1d,
    causal_conv1d_step=conv_reference.causal_conv1d_step,
    gated_rms_norm=norm_reference.gated_rms_norm,
    add_rms_norm=norm_reference.add_rms_norm,
    max_chunk_size=ssd_reference.PREFERRED_CHUNK_SIZE,
)


def check_impl(impl: str) -> Impl:
    """Return `impl`; raise InputError, naming the choices, if there is no such implementation."""
    if impl not in _KNOWN:
        raise InputError(f"impl={impl!r} is not available; choose one of {', '.join(map(repr, _KNOWN))}")
    return impl


def operators(impl: Impl, device: torch.device) -> Operators:
    """The operators that `impl` stands for on `device`.

    Raises:
        InputError: there is no such implementation.
        MissingExtraError: `impl="triton"` without the package `triton`.
    """
    del device  # "auto" does not choose by device yet
    return _triton() if check_impl(impl) == "triton" else _REFERENCE


@functools.cache
def _triton() -> Operators:
    try:
        from magc_kernels.conv import autograd as conv_triton
        from magc_kernels.norm import autograd as norm_triton
        from magc_kernels.ssd import autograd as ssd_triton
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise MissingExtraError("triton", "triton", 'impl="triton"') from error
    return Operators(
        name="triton",
        ssd=ssd_triton.ssd,
        # One token is a few small products, which PyTorch does as well.
        ssd_step=ssd_reference.ssd_step,
        causal_conv1d=conv_triton.causal_conv1d,
        causal_conv1d_step=conv_reference.causal_conv1d_step,
        gated_rms_norm=norm_triton.gated_rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        max_chunk_size=128,
    )
