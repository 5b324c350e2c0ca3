"""Which cell runner a user asks for."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from magc.errors import InputError

Runner = Literal["eager", "cuda-graph"]


def require_runner(runner: object, device: torch.device | None = None) -> None:
    """Refuse a runner that does not exist or, where the device is known, cannot run there.

    Raises:
        InputError: says what to give instead.
    """
    if runner not in get_args(Runner):
        raise InputError(f"runner={runner!r}: give 'eager' or 'cuda-graph'")
    if runner == "cuda-graph" and device is not None and device.type != "cuda":
        raise InputError(
            f"runner='cuda-graph' needs the layers on a CUDA device, but they are on {device}; move them there, or give "
            f"runner='eager'"
        )
