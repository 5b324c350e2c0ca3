"""Sums of the partial sums that programs leave, in a fixed order. Requires the package `triton`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magc_kernels._triton import cdiv, launch, on_device

_ROWS, _COLUMNS = 32, 32


@triton.jit
def column_sums(PARTS, rows, pitch, columns, known, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the rows of PARTS, float32 of row pitch `pitch`, in the COLUMNS given; `known` masks them."""
    offsets = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(tl.cdiv(rows, ROWS)):
        row = (k * ROWS + offsets)[:, None]
        total += tl.load(PARTS + row.to(tl.int64) * pitch + columns[None], mask=(row < rows) & known[None], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=("rows",))
def finish(
    PARTS, FIRST, SECOND, rows, channels,
    TAPS: tl.constexpr, HAS_SECOND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """FIRST `(channels, TAPS)` and SECOND `(channels,)` are the sums of PARTS `(rows, TAPS [+ 1], channels)`."""
    entries = TAPS + 1 if HAS_SECOND else TAPS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = column_sums(PARTS, rows, entries * channels, column, column < entries * channels, ROWS, COLUMNS)
    tap, channel = column // channels, column % channels
    tl.store(FIRST + channel * TAPS + tap, total.to(FIRST.dtype.element_ty), mask=tap < TAPS)
    if HAS_SECOND:
        tl.store(SECOND + channel, total.to(SECOND.dtype.element_ty), mask=tap == TAPS)


def sum_parts(parts: Tensor, weight: Tensor, bias: Tensor | None, *, float32: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight `(channels, [taps])` and, if there is one, a bias `(channels,)`.

    Args:
        parts: partial sums, `(parts, taps [+ 1 for the bias], channels)` float32, contiguous.
        weight: whose shape and type the gradient takes.
        bias: likewise.
        float32: leave both in float32, in which they are summed.
    """
    taps = parts.shape[1] - (bias is not None)
    dweight = torch.empty(weight.shape, dtype=torch.float32 if float32 else weight.dtype, device=parts.device)
    dbias = None
    if bias is not None:
        dbias = torch.empty(bias.shape, dtype=torch.float32 if float32 else bias.dtype, device=parts.device)
    with on_device(parts.device):
        launch(
            finish, cdiv(parts.shape[1] * parts.shape[2], _COLUMNS), parts, dweight, dbias, parts.shape[0],
            parts.shape[2], TAPS=taps, HAS_SECOND=bias is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return dweight, dbias
