"""Rotation of Mamba-3's input and output projections: arXiv 2603.15569, section 3.2.

A state with complex decays is a real one that turns in planes of two coordinates. Turning `B_t` and `C_t` by the angle
summed up so far, instead of the state, is the same: only differences of angles reach an output.

Angles are in turns of 2 pi. Whole turns can then be dropped without rounding, so an angle is as precise after a million
tokens as after one.

Shape letters: B batch, L length, R rank, H heads, S angles, N d_state, K chunks, Q chunk size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._chunks import pad
from magc_kernels.mamba3.values import Pairs


def accumulated_turns(rate_BLHS: Tensor, initial_BHS: Tensor | None, runs_BL: Tensor | None, chunk_size: int) -> Tensor:
    """Angle of each token, in turns: the sum of all rates of its document up to and including its own, modulo 1.

    Args:
        rate_BLHS: turns by which each token rotates.
        initial_BHS: angle of the token before the segment, which is of run 0; None for zero.
        runs_BL: document of each token, as `magc_kernels._packing.document_runs` numbers them; None for one document.
        chunk_size: tokens summed up side by side. It changes rounding, nothing else.

    Returns:
        As `rate_BLHS`, from 0 to 1.
    """
    batch, length, heads, angles = rate_BLHS.shape
    count = -(-length // chunk_size)
    tail = count * chunk_size - length
    rate_BKQHS = pad(rate_BLHS, tail).reshape(batch, count, chunk_size, heads, angles)
    runs_BKQ = end_BK = before_BK = None
    if runs_BL is not None:
        runs_BKQ = torch.cat([runs_BL, runs_BL[:, -1:].expand(-1, tail)], dim=1).reshape(batch, count, chunk_size)
        end_BK = functional.pad(runs_BKQ[..., -1], (1, 0))
        before_BK = end_BK[:, :-1]

    inside_BKQHS = _sum_of_run(rate_BKQHS, runs_BKQ)
    start_BHS = rate_BLHS.new_zeros(batch, heads, angles) if initial_BHS is None else initial_BHS
    ends_BKHS = torch.cat([start_BHS[:, None], inside_BKQHS[:, :, -1]], dim=1)
    before_BKHS = _sum_of_run(_wrap(ends_BKHS), end_BK, modulo=True)[:, :-1]
    carried_BKQHS = before_BKHS[:, :, None]
    if runs_BKQ is not None and before_BK is not None:
        carried_BKQHS = carried_BKQHS * (runs_BKQ == before_BK[..., None])[..., None, None]
    turns_BKQHS = _wrap(inside_BKQHS + carried_BKQHS)
    return turns_BKQHS.reshape(batch, count * chunk_size, heads, angles)[:, :length]


def rotate(x_BLRHN: Tensor, turns_BLHS: Tensor, pairs: Pairs) -> Tensor:
    """Turn the first S pairs of coordinates; the others stay.

    Args:
        x_BLRHN: vectors; N is even and at least 2 S.
        turns_BLHS: angles in turns, the same for every rank.
        pairs: which coordinates turn together.
    """
    angle = turns_BLHS[:, :, None] * (2 * math.pi)
    cos, sin = torch.cos(angle), torch.sin(angle)
    count, half = turns_BLHS.shape[-1], x_BLRHN.shape[-1] // 2
    if pairs == "neighbours":
        first, second = x_BLRHN[..., : 2 * count : 2], x_BLRHN[..., 1 : 2 * count : 2]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
        return torch.cat([turned, x_BLRHN[..., 2 * count :]], dim=-1)
    first, second = x_BLRHN[..., :count], x_BLRHN[..., half : half + count]
    parts = [
        first * cos - second * sin,
        x_BLRHN[..., count:half],
        first * sin + second * cos,
        x_BLRHN[..., half + count :],
    ]
    return torch.cat(parts, dim=-1)


def _sum_of_run(x: Tensor, runs: Tensor | None, *, modulo: bool = False) -> Tensor:
    """Running sum of `x` `(..., T, H, S)` over T, begun anew where `runs` `(..., T)`, which never falls, rises.

    Without whole turns at every addition if `modulo`: the sum over a long sequence would leave few digits for the angle.
    """
    size = x.shape[-3]
    shift = 1
    while shift < size:
        earlier = x[..., : size - shift, :, :]
        if runs is not None:
            same = runs[..., shift:] == runs[..., : size - shift]
            earlier = earlier * same[..., None, None]
        x = x + functional.pad(earlier, (0, 0, 0, 0, shift, 0))
        x = _wrap(x) if modulo else x
        shift *= 2
    return x


def _wrap(turns: Tensor) -> Tensor:
    """Without whole turns; the gradient is that of the identity."""
    return turns - turns.detach().floor()
