"""Fixed launch configurations of the scan's Triton kernels, one per class of shapes."""

from __future__ import annotations

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
    sweep_columns: int
    """Columns of the state that a program of `sweep_forward` owns."""
    sweep_backward_columns: int
    precision: str
    """Of float32 operands in matrix products; half-precision operands are exact in all of them."""
    sweep_warps: int = 4
    sweep_stages: int = 3
    scan_warps: int = 4
    scan_stages: int = 2
    sweep_backward_warps: int = 4
    sweep_backward_stages: int = 2
    roles_warps: int = 4
    roles_stages: int = 1


def ssd_config(dtype: torch.dtype, headdim: int, d_state: int, chunk_size: int | None) -> SSDConfig:
    """The configuration for a shape class.

    Args:
        dtype: of `x`, `B` and `C`.
        headdim: 16, 32, 64 or 128.
        d_state: 16, 32, 64, 128 or 256.
        chunk_size: most tokens in a chunk, at least 16; None for the fastest.

    Raises:
        ValueError: a size the kernels do not take. TypeError: likewise a type.
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
    narrow = min(d_state, 32)
    if dtype == torch.float32:
        config = SSDConfig(64, 32, narrow, narrow, precision="tf32x3", sweep_stages=2, scan_stages=1)
    else:
        # float16 has more bits than one TF32 product keeps of the float32 sums in `finish_projections`.
        precision = "tf32x3" if dtype == torch.float16 else "tf32"
        config = SSDConfig(128, 64, min(d_state, 64), narrow, precision=precision)
    if headdim * d_state > 64 * 128:
        config = replace(config, sweep_columns=narrow, sweep_stages=2, scan_stages=1, scan_warps=8, roles_warps=8)
    if chunk_size is not None and chunk_size < config.chunk:
        chunk = 1 << (chunk_size.bit_length() - 1)
        config = replace(config, chunk=chunk, rows=max(16, min(config.rows, chunk // 2)))
    return config


def heads_per_program(ratio: int, others: int) -> int:
    """How many of the `ratio` heads of a group one program loops over: many, so that what the heads share is
    computed once, but few enough for a launch of some waves.

    The choice changes no output of the forward: heads are computed apart.

    Args:
        ratio: heads per group.
        others: programs in the launch per split of a group's heads.
    """
    splits = min(ratio, max(-(-ratio // 32), -(-1056 // others)))
    return -(-ratio // splits)
