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
