"""Choice of the implementation behind a layer: `impl=` names it, and nothing else is ever taken instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from magc.errors import InputError, MissingExtraError
from magc_kernels.conv import reference as conv_reference
from magc_kernels.norm import reference as norm_reference
from magc_kernels.selective_scan import reference as selective_scan_reference
from magc_kernels.ssd import reference as ssd_reference

Impl = Literal["auto", "reference", "triton"]
"""`"reference"`: plain PyTorch, any device. `"triton"`: Triton kernels, CUDA devices only. `"auto"`: Triton on a CUDA
device where it is installed and takes the layer's sizes and type, the reference elsewhere (see `choose`)."""

_KNOWN = ("auto", "reference", "triton")
_TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The implementation that an `impl` stands for somewhere, and why not a faster one."""

    name: Literal["reference", "triton"]
    reason: str = ""


@dataclass(frozen=True)
class Operators:
    """The operators of a Mamba layer in one implementation; signatures as in `magc_kernels.*.reference`."""

    name: str
    ssd: Callable[..., tuple[Tensor, Tensor]]
    ssd_step: Callable[..., tuple[Tensor, Tensor]]
    selective_scan: Callable[..., tuple[Tensor, Tensor]]
    selective_scan_step: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d_step: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    max_chunk_size: int
    """Largest SSD chunk that pays: a longer one changes nothing but speed, memory and rounding."""


TRITON = (3, 6)
"""The oldest Triton that the kernels are tested with."""

_REFERENCE = Operators(
    name="reference",
    ssd=ssd_reference.ssd,
    ssd_step=ssd_reference.ssd_step,
    selective_scan=selective_scan_reference.selective_scan,
    selective_scan_step=selective_scan_reference.selective_scan_step,
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


def choose(impl: Impl, device: torch.device, dtype: torch.dtype | None = None, obstacle: str = "") -> Choice:
    """What `impl` stands for.

    Args:
        impl: the name. Other names than `"auto"` are taken at their word: an operator that cannot work says so itself.
        device: where the layer's input is.
        dtype: what it computes in; None if that is not known yet.
        obstacle: why the Triton kernels do not take the layer's sizes; empty if they do.

    Raises:
        InputError: there is no such implementation.
    """
    if check_impl(impl) != "auto":
        return Choice("triton" if impl == "triton" else "reference")
    if device.type != "cuda":
        return Choice("reference")
    if (missing := _missing_triton()) is not None:
        return Choice("reference", missing)
    if dtype is not None and dtype not in _TRITON_TYPES:
        return Choice("reference", f"no Triton kernels for {dtype}")
    return Choice("reference", obstacle) if obstacle else Choice("triton")


def operators(impl: Impl, device: torch.device, dtype: torch.dtype | None = None, obstacle: str = "") -> Operators:
    """The operators that `impl` stands for; arguments as of `choose`.

    Raises:
        InputError: there is no such implementation.
        MissingExtraError: `impl="triton"` without the package `triton`.
    """
    return _triton() if choose(impl, device, dtype, obstacle).name == "triton" else _REFERENCE


def _missing_triton() -> str | None:
    """Why there is no Triton that the kernels were made and tested with; None if there is."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return _too_old()


@functools.cache
def _too_old() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return None  # a build without a record of itself, which says nothing of its age
    if tuple(int(part) for part in found.split(".")[:2]) >= TRITON:
        return None
    return f"triton {found} is older than {'.'.join(map(str, TRITON))}, which the kernels are for"


@functools.cache
def _triton() -> Operators:
    try:
        from magc_kernels.conv import autograd as conv_triton
        from magc_kernels.norm import autograd as norm_triton
        from magc_kernels.selective_scan import autograd as selective_scan_triton
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
        selective_scan=selective_scan_triton.selective_scan,
        selective_scan_step=selective_scan_reference.selective_scan_step,
        causal_conv1d=conv_triton.causal_conv1d,
        causal_conv1d_step=conv_reference.causal_conv1d_step,
        gated_rms_norm=norm_triton.gated_rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        max_chunk_size=128,
    )
