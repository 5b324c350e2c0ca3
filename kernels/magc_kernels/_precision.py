"""Arithmetic type of the reference operators: at least float32, and never changed by autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type to compute in for inputs of `dtype`: float64 for float64, float32 for every other floating
    type.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"expected a floating-point input, got {dtype}")
    return torch.promote_types(dtype, torch.float32)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast on `device`, whose matrix products would otherwise round to a lower precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_type(x: torch.Tensor) -> torch.dtype | None:
    """Type in which autocast runs matrix products of `x`; None where it is off, or leaves `x` alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
