"""Kernels of others without the search for their fastest configuration, which takes minutes and changes no result."""

from __future__ import annotations

import math
from typing import Any

import pytest


def take_smallest_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's autotuner takes the candidate with the smallest tiles of those that suit a call, and times none.

    Needs Triton. The smallest, for the others may want more shared memory than there is.
    """
    from triton.runtime.autotuner import Autotuner

    suitable: Any = Autotuner.prune_configs

    def size(config: Any) -> tuple[float, int]:
        tiles = [value for value in config.kwargs.values() if isinstance(value, int) and value > 0]
        return math.prod(tiles) * config.num_stages, config.num_warps

    def smallest(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        return [min(suitable(self, kwargs), key=size)]

    monkeypatch.setattr(Autotuner, "prune_configs", smallest)
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **kwargs: [0.0, 0.0, 0.0])
