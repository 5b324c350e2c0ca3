"""Fixed launch configurations of the norms' Triton kernels, one per class of devices and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from magc_kernels._triton import cdiv, next_power_of_2


@dataclass(frozen=True)
class NormConfig:
    """How a program holds a row, and how many rows it takes.

    `pieces` and `warps` decide in which order a row's squares are added up; forward and backward share them, so
    that backward's scale of a row, and the output it can give again, are the forward's to the bit. Nothing else
    here touches a forward's rounding: no row's arithmetic depends on how many rows there are.
    """

    pieces: int
    """Equal powers of two that together hold the features."""
    warps: int
    forward_rows: int = 1
    """Rows of a forward program, one after another."""
    forward_stages: int = 2
    """Rows whose loads are under way at a time, counting the one at work; likewise in backward."""
    backward_programs: int = 128
    """Most programs of a backward: each leaves a partial sum of the weight's gradient."""
    backward_stages: int = 3


def norm_config(
    dtype: torch.dtype,
    group_size: int,
    *,
    capability: tuple[int, int] | None = None,
    config: NormConfig | None = None,
) -> NormConfig:
    """The configuration for a shape class; the number of rows is no part of it.

    Args:
        dtype: of the output.
        group_size: features normalised together.
        capability: compute capability of the device; None for the interpreter.
        config: take this one, not the shipped one.

    Raises:
        ValueError: the kernels cannot run `config`.
    """
    if config is not None:
        _check(config)
        return config
    programs, shared_memory = _SHIPPED.get(capability, _DEFAULT) if capability is not None else _DEFAULT
    pieces = min(range(1, 9), key=lambda n: n * next_power_of_2(cdiv(group_size, n)))
    held = pieces * next_power_of_2(cdiv(group_size, pieces))
    warps = 16 if held > 5120 else 8 if held > 2048 else 4 if held > 512 else 1
    # At most two operands of this type and two in float32 are under way for each stage but the first.
    stage = held * (2 * dtype.itemsize + 8)
    stages = min(3, 1 + shared_memory // stage)
    return NormConfig(pieces, warps, backward_programs=programs, forward_stages=min(2, stages), backward_stages=stages)


_SHIPPED = {(9, 0): (132, 200 << 10), (8, 0): (108, 140 << 10)}
"""By compute capability: programs of a backward, one for each multiprocessor, and bytes of shared memory to use."""

_DEFAULT = (128, 80 << 10)


def _check(config: NormConfig) -> None:
    wrong = []
    if not 1 <= config.pieces <= 8:
        wrong.append(f"pieces {config.pieces} is not from 1 to 8")
    if config.warps not in (1, 2, 4, 8, 16, 32):
        wrong.append(f"warps {config.warps} is not a power of two from 1 to 32")
    for name in ("forward_rows", "backward_programs"):
        if getattr(config, name) < 1:
            wrong.append(f"{name} {getattr(config, name)} is not positive")
    for name in ("forward_stages", "backward_stages"):
        if not 1 <= getattr(config, name) <= 8:
            wrong.append(f"{name} {getattr(config, name)} is not from 1 to 8")
    if wrong:
        raise ValueError(f"the norms cannot run with this NormConfig: {'; '.join(wrong)}")
