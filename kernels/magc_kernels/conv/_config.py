"""Fixed launch configurations of the convolution's Triton kernels, one per class of devices and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ConvTile:
    """What a program owns: `channels` of `lanes * run` tokens, each lane walking over `run` of them."""

    lanes: int
    run: int
    channels: int
    warps: int
    stages: int = 1
    """Steps of the walk whose loads are under way at a time, counting the one at work."""
    registers: int | None = None
    """Most registers of a thread; None for as many as the compiler takes."""


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of the two kernels. An output is computed alike in any tile: no choice changes the forward by a bit."""

    forward: ConvTile
    backward: ConvTile


def conv_config(
    dtype: torch.dtype,
    width: int,
    *,
    capability: tuple[int, int] | None = None,
    config: ConvConfig | None = None,
) -> ConvConfig:
    """The configuration for a shape class; the length is no part of it.

    Args:
        dtype: of `x`.
        width: of the convolution.
        capability: compute capability of the device; None for the interpreter.
        config: take this one, not the shipped one.

    Raises:
        ValueError: the kernels cannot run `config`.
    """
    if config is not None:
        for name in ("forward", "backward"):
            _check(name, getattr(config, name))
        return config
    shipped = _SHIPPED.get(capability, _DEFAULT) if capability is not None else _DEFAULT
    return shipped


_DEFAULT = ConvConfig(forward=ConvTile(4, 16, 128, 4), backward=ConvTile(8, 32, 32, 2, stages=4, registers=168))

_SHIPPED: dict[tuple[int, int], ConvConfig] = {(9, 0): _DEFAULT}
"""By compute capability; others get the default."""


def _check(name: str, tile: ConvTile) -> None:
    def power_of_two(value: int, low: int, high: int) -> bool:
        return low <= value <= high and value & (value - 1) == 0

    wrong = []
    for field, low, high in (("lanes", 1, 64), ("run", 4, 256), ("channels", 16, 1024), ("warps", 1, 16)):
        if not power_of_two(getattr(tile, field), low, high):
            wrong.append(f"{field} {getattr(tile, field)} is not a power of two from {low} to {high}")
    if not 1 <= tile.stages <= 8:
        wrong.append(f"stages {tile.stages} is not from 1 to 8")
    if tile.registers is not None and not 32 <= tile.registers <= 255:
        wrong.append(f"registers {tile.registers} is not from 32 to 255")
    if wrong:
        raise ValueError(f"the convolution cannot run with this {name} tile: {'; '.join(wrong)}")
