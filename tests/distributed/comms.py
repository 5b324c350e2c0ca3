"""Counts what processes say to each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Lists the collectives that are issued, by name and in order."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.issued.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> dict[str, int]:
        """How many there were of each."""
        return dict(Counter(self.issued))
