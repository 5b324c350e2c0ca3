"""Comparison of outputs and gradients with a plain float64 truth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def packed_ids(seed: int, batch: int, length: int, documents: int = 4, mean: float = 3.0) -> Tensor:
    """Document ids that change at random places and, with few `documents`, come back later in the row."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(batch, length, generator=generator) < 1 / mean
    return (changes.cumsum(1) % documents).to(torch.int32)


def splits(seed: int, length: int, mean: float = 3.0) -> list[int]:
    """Random segment lengths that add up to `length`."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.rand(length - 1, generator=generator) < 1 / mean).nonzero().flatten().add(1).tolist()
    borders = [0, *cuts, length]
    return [b - a for a, b in itertools.pairwise(borders)]


def gradients(outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], seed: int = 99) -> dict[str, Tensor]:
    """Gradients of a random linear function of all outputs with respect to each input."""
    total = sum((out * randn(seed + i, *out.shape).to(out.dtype)).sum() for i, out in enumerate(outputs))
    grads = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(inputs, grads, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude (at least 1e-30)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max().clamp(min=1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Largest difference at most `tolerance`, relative to the largest magnitude if that exceeds one."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert torch.isfinite(actual).all(), name
    difference = (
        (actual.detach().double() - expected.detach().double()).abs().max() if actual.numel() else torch.zeros(())
    )
    bound = tolerance * expected.detach().double().abs().max().clamp(min=1.0) if actual.numel() else tolerance
    assert difference <= bound, f"{name}: difference {float(difference):.2e}, bound {float(bound):.2e}"
