"""Fixed launch configurations of the scan's Triton kernels, one per class of devices and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SSDConfig:
    """Tile sizes, warps and pipeline stages. Only the type and the sizes of one token's data choose it, never
    the length: a recomputed segment must repeat its forward to the bit.
    """

    chunk: int
    """Tokens in a chunk."""
    rows: int
    """Tokens in a tile of `scan` and `roles`: the chunk, or half of it."""
    sweep_rows: int
    """Rows of the state that a program of `sweep_forward` owns."""
    sweep_backward_rows: int
    precision: str
    """Of float32 operands in matrix products; half-precision operands are exact in all of them."""
    sweep_warps: int = 8
    sweep_stages: int = 2
    scan_warps: int = 4
    scan_stages: int = 2
    sweep_backward_warps: int = 8
    sweep_backward_stages: int = 2
    sweep_backward_columns: int = 256
    """Most columns of the state that a program of `sweep_backward` owns."""
    input_warps: int = 4
    input_stages: int = 2
    roles_warps: int = 4
    roles_registers: int | None = None
    """Most registers of a thread of `roles`; None for the compiler's choice."""
    scores_stages: int = 3
    projection_stages: int = 2
    finish_rows: int = 32
    """Most tokens for whose dB or dC a program of `finish` adds up."""
    finish_columns: int = 128
    """Most columns of dB or dC for which it does."""
    finish_warps: int = 4


def ssd_config(
    dtype: torch.dtype,
    headdim: int,
    d_state: int,
    chunk_size: int | None,
    *,
    capability: tuple[int, int] | None = None,
    config: SSDConfig | None = None,
) -> SSDConfig:
    """The configuration for a shape class.

    Args:
        dtype: of `x`, `B` and `C`.
        headdim: 16, 32, 64 or 128.
        d_state: 16, 32, 64, 128 or 256.
        chunk_size: most tokens in a chunk, at least 16; None for the fastest.
        capability: compute capability of the device; None for the interpreter.
        config: take this one, not the shipped one.

    Raises:
        ValueError: a size the kernels do not take, or a `config` they cannot run. TypeError: likewise a type.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"the Triton scan takes float32, float16 or bfloat16, got {dtype}; use impl='reference' for others"
        )
    if headdim not in (16, 32, 64, 128) or d_state not in (16, 32, 64, 128, 256):
        raise ValueError(
            "the Triton scan takes headdim 16, 32, 64 or 128 and d_state 16, 32, 64, 128 or 256; "
            f"got headdim {headdim} and d_state {d_state}; use impl='reference' for others"
        )
    if chunk_size is not None and chunk_size < 16:
        raise ValueError(
            f"the Triton scan takes a chunk_size of at least 16 or None, got {chunk_size}; "
            "use impl='reference' for smaller chunks"
        )
    if config is not None:
        _check(config, headdim, chunk_size)
        return config
    shipped = _SHIPPED.get(capability, _default) if capability is not None else _default
    config = shipped(dtype, headdim, d_state)
    if chunk_size is not None and chunk_size < config.chunk:
        chunk = 1 << (chunk_size.bit_length() - 1)
        config = replace(config, chunk=chunk, rows=max(16, min(config.rows, chunk // 2)))
    return config


def _default(dtype: torch.dtype, headdim: int, d_state: int) -> SSDConfig:
    narrow = min(headdim, 32)
    large = headdim * d_state > 64 * 128
    if dtype == torch.float32:
        return SSDConfig(
            64,
            32,
            narrow,
            narrow,
            precision="tf32x3",
            sweep_warps=4,
            sweep_backward_warps=4,
            scan_warps=8 if large else 4,
            scan_stages=1,
            input_warps=8 if large else 4,
            input_stages=1,
            roles_warps=8 if large else 4,
            scores_stages=1,
            projection_stages=1,
        )
    # float16 has more bits than one TF32 product keeps of the float32 sums in `finish`.
    precision = "tf32x3" if dtype == torch.float16 else "tf32"
    warps = 8 if d_state >= 128 else 4
    config = SSDConfig(
        128,
        64,
        narrow,
        narrow,
        precision=precision,
        sweep_warps=warps,
        sweep_backward_warps=warps,
        roles_warps=8 if d_state == 256 else 4,
    )
    if large:
        config = replace(
            config,
            sweep_stages=1,
            sweep_backward_stages=1,
            scan_stages=1,
            scan_warps=8,
            input_stages=1,
            input_warps=8,
            roles_warps=8,
            scores_stages=1,
            projection_stages=1,
        )
    return config


def _hopper(dtype: torch.dtype, headdim: int, d_state: int) -> SSDConfig:
    config = _default(dtype, headdim, d_state)
    if dtype == torch.float32:
        return config
    if headdim * d_state > 64 * 128:
        return replace(config, sweep_stages=2, sweep_backward_stages=2)
    rows = min(headdim, 64)
    config = replace(
        config,
        sweep_rows=rows,
        sweep_backward_rows=rows,
        sweep_stages=3,
        sweep_backward_stages=3,
        projection_stages=3,
    )
    if rows == 64:
        config = replace(config, sweep_backward_columns=64, sweep_backward_warps=4)
    return config


_SHIPPED: dict[tuple[int, int], Callable[[torch.dtype, int, int], SSDConfig]] = {(9, 0): _hopper}
"""By compute capability; others get the default."""


def _check(config: SSDConfig, headdim: int, chunk_size: int | None) -> None:
    def power_of_two(value: int, low: int, high: int) -> bool:
        return low <= value <= high and value & (value - 1) == 0

    wrong = []
    if not power_of_two(config.chunk, 16, 256):
        wrong.append(f"chunk {config.chunk} is not a power of two from 16 to 256")
    if chunk_size is not None and config.chunk > chunk_size:
        wrong.append(f"chunk {config.chunk} exceeds chunk_size {chunk_size}")
    if config.rows < 16 or config.rows not in (config.chunk, config.chunk // 2):
        wrong.append(f"rows {config.rows} is not the chunk {config.chunk} or half of it, and at least 16")
    for name in ("sweep_backward_columns", "finish_rows", "finish_columns"):
        if not power_of_two(getattr(config, name), 16, 256):
            wrong.append(f"{name} {getattr(config, name)} is not a power of two from 16 to 256")
    for name in ("sweep_rows", "sweep_backward_rows"):
        if not power_of_two(getattr(config, name), 16, headdim):
            wrong.append(f"{name} {getattr(config, name)} is not a power of two from 16 to headdim {headdim}")
    if config.precision not in ("tf32", "tf32x3", "ieee"):
        wrong.append(f"precision {config.precision!r} is not tf32, tf32x3 or ieee")
    if config.roles_registers is not None and not 24 <= config.roles_registers <= 255:
        wrong.append(f"roles_registers {config.roles_registers} is not None or from 24 to 255")
    for name, value in vars(config).items():
        if name.endswith("_warps") and not power_of_two(value, 1, 16):
            wrong.append(f"{name} {value} is not a power of two from 1 to 16")
        if name.endswith("_stages") and not 1 <= value <= 8:
            wrong.append(f"{name} {value} is not from 1 to 8")
    if wrong:
        raise ValueError(f"the scan cannot run with this SSDConfig: {'; '.join(wrong)}")


def heads_per_program(ratio: int, others: int, least: int, most: int) -> int:
    """How many of the `ratio` heads of a group one program loops over: many, so that what the heads share is
    computed once, but few enough for a launch of some waves.

    The choice changes no output of the forward: heads are computed apart.

    Args:
        ratio: heads per group.
        others: programs in the launch per split of a group's heads.
        least: fewer heads than this are not worth what a program does once, however short the input.
        most: heads, however long the input.
    """
    splits = min(ratio, max(-(-ratio // most), -(-1056 // others)))
    return max(-(-ratio // splits), min(ratio, least))
