"""Triton kernels of gated RMSNorm and add + RMSNorm. What they compute is defined in `reference`.

A program normalises `per_program` rows (or one group of features of each) one after another, each wholly in
registers: every input is read once and every output written once. A row is held in PIECES pieces of PIECE features,
a power of two, which leaves fewer registers empty than one power of two for the whole row. Backward recomputes the
scale of a row, so that nothing but the inputs is kept, with the arithmetic of the forward. All arithmetic is
float32. Tensors are matrices `(rows, features)` with stride 1 in a row; row offsets are int64. No atomics: the
weight's gradient comes as one partial sum per program.
"""

# Triton has `+` of tuples, and no unpacking into one.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from magc_kernels._sigmoid import INTERPRETED, sigmoid

SIZES = ("rows", "per_program")
"""Arguments whose values must not choose between compiled variants, which could differ in rounding."""


@triton.jit
def load_pieces(ROW, SIZE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """SIZE numbers from ROW on as float32 pieces, 0 beyond."""
    row = ()
    for i in tl.static_range(PIECES):
        offsets = i * PIECE + tl.arange(0, PIECE)
        row = row + (tl.load(ROW + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32),)
    return row


@triton.jit
def store_piece(ROW, value, i, SIZE: tl.constexpr, PIECE: tl.constexpr):
    offsets = i * PIECE + tl.arange(0, PIECE)
    tl.store(ROW + offsets, value.to(ROW.dtype.element_ty), mask=offsets < SIZE)


@triton.jit
def add_pieces(a, b, PIECES: tl.constexpr):
    total = ()
    for i in tl.static_range(PIECES):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def zero_pieces(PIECE: tl.constexpr, PIECES: tl.constexpr):
    row = ()
    for _ in tl.static_range(PIECES):
        row = row + (tl.zeros([PIECE], tl.float32),)
    return row


@triton.jit
def inner_product(a, b, PIECES: tl.constexpr):
    total = a[0] * b[0]
    for i in tl.static_range(1, PIECES):
        total += a[i] * b[i]
    return tl.sum(total, 0)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def two_inner_products(a, b, c, PIECES: tl.constexpr):
    """Of `a` and of `b` with `c`, each added up as `inner_product` does, with one wait of the warps for both."""
    first = a[0] * c[0]
    second = b[0] * c[0]
    for i in tl.static_range(1, PIECES):
        first += a[i] * c[i]
        second += b[i] * c[i]
    if INTERPRETED:
        return tl.sum(first, 0), tl.sum(second, 0)
    else:
        return tl.reduce((first, second), 0, _both)


@triton.jit(do_not_specialize=SIZES)
def gated_forward(
    X, Z, WEIGHT, Y, rows, per_program, groups, sx, sz, eps,
    SIZE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, NORM_FIRST: tl.constexpr,
):  # fmt: skip
    """SIZE features are normalised together."""
    pid = tl.program_id(0)
    column = pid % groups * SIZE
    first = (pid // groups).to(tl.int64) * per_program
    weight = load_pieces(WEIGHT + column, SIZE, PIECE, PIECES)
    for k in tl.range(tl.minimum(per_program, rows - first).to(tl.int32), num_stages=STAGES):
        row = first + k
        u = load_pieces(X + row * sx + column, SIZE, PIECE, PIECES)
        if GATED:
            z = load_pieces(Z + row * sz + column, SIZE, PIECE, PIECES)
            if not NORM_FIRST:
                x = u
                u = ()
                for i in tl.static_range(PIECES):
                    u = u + (x[i] * (z[i] * sigmoid(z[i])),)
        scale = tl.rsqrt(inner_product(u, u, PIECES) / SIZE + eps)
        for i in tl.static_range(PIECES):
            y = u[i] * scale * weight[i]
            if GATED and NORM_FIRST:
                y *= z[i] * sigmoid(z[i])
            store_piece(Y + row * (groups * SIZE) + column, y, i, SIZE, PIECE)


@triton.jit(do_not_specialize=SIZES)
def gated_backward(
    X, Z, WEIGHT, DY, DX, DZ, PARTS, Y, rows, per_program, groups, sx, sz, sy, tx, tz, eps,
    SIZE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, NORM_FIRST: tl.constexpr, WRITE_Y: tl.constexpr,
):  # fmt: skip
    """PARTS `(program, features)`. WRITE_Y: also write the output again, for which everything is at hand."""
    pid = tl.program_id(0)
    column = pid % groups * SIZE
    first = (pid // groups).to(tl.int64) * per_program
    weight = load_pieces(WEIGHT + column, SIZE, PIECE, PIECES)
    dweight = zero_pieces(PIECE, PIECES)
    for k in tl.range(tl.minimum(per_program, rows - first).to(tl.int32), num_stages=STAGES):
        row = first + k
        x = load_pieces(X + row * sx + column, SIZE, PIECE, PIECES)
        dy = load_pieces(DY + row * sy + column, SIZE, PIECE, PIECES)
        u = x
        if GATED:
            z = load_pieces(Z + row * sz + column, SIZE, PIECE, PIECES)
            half = ()
            for i in tl.static_range(PIECES):
                half = half + (sigmoid(z[i]),)
            if not NORM_FIRST:
                u = ()
                for i in tl.static_range(PIECES):
                    u = u + (x[i] * (z[i] * half[i]),)
        dnormal = ()
        for i in tl.static_range(PIECES):
            d = dy[i] * weight[i]
            if GATED and NORM_FIRST:
                d *= z[i] * half[i]
            dnormal = dnormal + (d,)
        square, along = two_inner_products(u, dnormal, u, PIECES)
        scale = tl.rsqrt(square / SIZE + eps)
        along = along * scale / SIZE
        sums = ()
        for i in tl.static_range(PIECES):
            normal = u[i] * scale
            du = (dnormal[i] - normal * along) * scale
            y = normal * weight[i]
            dw = dy[i] * normal
            if GATED:
                gate = z[i] * half[i]
                slope = half[i] * (1.0 + z[i] * (1.0 - half[i]))
                if NORM_FIRST:
                    dz = dy[i] * y * slope
                    dw *= gate
                    y *= gate
                else:
                    dz = du * x[i] * slope
                    du *= gate
                store_piece(DZ + row * tz + column, dz, i, SIZE, PIECE)
            store_piece(DX + row * tx + column, du, i, SIZE, PIECE)
            if WRITE_Y:
                store_piece(Y + row * (groups * SIZE) + column, y, i, SIZE, PIECE)
            sums = sums + (dweight[i] + dw,)
        dweight = sums
    for i in tl.static_range(PIECES):
        store_piece(PARTS + (pid // groups) * (groups * SIZE) + column, dweight[i], i, SIZE, PIECE)


@triton.jit(do_not_specialize=SIZES)
def add_forward(
    X, RESIDUAL, WEIGHT, Y, TOTAL, rows, per_program, sx, sr, eps,
    SIZE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * per_program
    weight = load_pieces(WEIGHT, SIZE, PIECE, PIECES)
    for k in tl.range(tl.minimum(per_program, rows - first).to(tl.int32), num_stages=STAGES):
        row = first + k
        total = load_pieces(X + row * sx, SIZE, PIECE, PIECES)
        if HAS_RESIDUAL:
            total = add_pieces(total, load_pieces(RESIDUAL + row * sr, SIZE, PIECE, PIECES), PIECES)
        scale = tl.rsqrt(inner_product(total, total, PIECES) / SIZE + eps)
        for i in tl.static_range(PIECES):
            store_piece(Y + row * SIZE, total[i] * scale * weight[i], i, SIZE, PIECE)
            store_piece(TOTAL + row * SIZE, total[i], i, SIZE, PIECE)


@triton.jit(do_not_specialize=SIZES)
def add_backward(
    X, RESIDUAL, WEIGHT, DY, DTOTAL, DX, DRESIDUAL, PARTS, Y, rows, per_program, sx, sr, sy, st, eps,
    SIZE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_DTOTAL: tl.constexpr, WRITE_RESIDUAL: tl.constexpr, WRITE_Y: tl.constexpr,
):  # fmt: skip
    """X and RESIDUAL add up to the normalised sum; PARTS `(program, features)`; WRITE_Y as in `gated_backward`."""
    first = tl.program_id(0).to(tl.int64) * per_program
    weight = load_pieces(WEIGHT, SIZE, PIECE, PIECES)
    dweight = zero_pieces(PIECE, PIECES)
    for k in tl.range(tl.minimum(per_program, rows - first).to(tl.int32), num_stages=STAGES):
        row = first + k
        total = load_pieces(X + row * sx, SIZE, PIECE, PIECES)
        if HAS_RESIDUAL:
            total = add_pieces(total, load_pieces(RESIDUAL + row * sr, SIZE, PIECE, PIECES), PIECES)
        dy = load_pieces(DY + row * sy, SIZE, PIECE, PIECES)
        if HAS_DTOTAL:
            dtotal = load_pieces(DTOTAL + row * st, SIZE, PIECE, PIECES)
        dnormal = ()
        for i in tl.static_range(PIECES):
            dnormal = dnormal + (dy[i] * weight[i],)
        square, along = two_inner_products(total, dnormal, total, PIECES)
        scale = tl.rsqrt(square / SIZE + eps)
        along = along * scale / SIZE
        sums = ()
        for i in tl.static_range(PIECES):
            normal = total[i] * scale
            d = (dnormal[i] - normal * along) * scale
            if HAS_DTOTAL:
                d += dtotal[i]
            store_piece(DX + row * SIZE, d, i, SIZE, PIECE)
            if WRITE_RESIDUAL:
                store_piece(DRESIDUAL + row * SIZE, d, i, SIZE, PIECE)
            if WRITE_Y:
                store_piece(Y + row * SIZE, normal * weight[i], i, SIZE, PIECE)
            sums = sums + (dweight[i] + dy[i] * normal,)
        dweight = sums
    for i in tl.static_range(PIECES):
        store_piece(PARTS + tl.program_id(0) * SIZE, dweight[i], i, SIZE, PIECE)
