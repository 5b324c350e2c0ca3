"""Tensors as bytes, to be copied elsewhere and brought back with the same bits, shape, strides and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tensor is besides its bytes. Strides are dense: the elements lie one after another in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def laid_out(tensor: Tensor) -> tuple[Layout, Tensor]:
    """The layout of a tensor and its bytes in memory order, ``(nbytes,) uint8``; no copy if it is dense."""
    tensor = tensor.resolve_conj().resolve_neg()
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    layout = Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.nbytes)
    return layout, _raw(tensor)


def allocated(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """A new tensor of that layout, and its bytes in memory order."""
    tensor = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=device)
    return tensor, _raw(tensor)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is strided memory and nothing else (not sparse, quantized or a wrapper subclass)."""
    if is_traceable_wrapper_subclass(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


def compact(tensor: Tensor) -> Tensor:
    """The tensor, cloned if it keeps alive a storage with more than its own bytes."""
    if is_plain(tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()
    return tensor


def held_bytes(tensor: Tensor) -> int:
    """Bytes of memory that a reference to a compact tensor keeps alive."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes()) if is_plain(tensor) else tensor.nbytes


def pieces(raw: Tensor, nbytes: int) -> Iterator[Tensor]:
    """Views of at most ``nbytes`` bytes that make up ``raw``, a ``(bytes,) uint8`` tensor."""
    for start in range(0, raw.numel(), nbytes):
        yield raw[start : start + nbytes]
