"""Triton kernels of gated RMSNorm and add + RMSNorm. What they compute is defined in `reference`.

A program normalises `per_program` rows (or one group of features of each) one after another, each wholly in
registers: every input is read once and every output written once. Backward recomputes the scale of a row, so
that nothing but the inputs is kept. All arithmetic is float32. Tensors are matrices `(rows, features)` with
stride 1 in a row; row offsets are int64. No atomics: the weight's gradient comes as one partial sum per program.
"""

import triton
import triton.language as tl

SIZES = ("rows", "per_program")
"""Arguments whose values must not choose between compiled variants, which could differ in rounding."""


@triton.jit
def sigmoid(x):
    """Without the overflow of exp(-x) far below zero."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, t) / (1.0 + t)


@triton.jit(do_not_specialize=SIZES)
def gated_forward(
    X, Z, WEIGHT, Y, rows, per_program, groups, sx, sz, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, NORM_FIRST: tl.constexpr,
):  # fmt: skip
    """SIZE features are normalised together."""
    pid = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE
    feature = pid % groups * SIZE + offsets
    first = (pid // groups).to(tl.int64) * per_program
    weight = tl.load(WEIGHT + feature, mask=inside, other=0.0).to(tl.float32)
    for k in range(tl.minimum(per_program, rows - first).to(tl.int32)):
        row = first + k
        x = tl.load(X + row * sx + feature, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            z = tl.load(Z + row * sz + feature, mask=inside, other=0.0).to(tl.float32)
            gate = z * sigmoid(z)
            if not NORM_FIRST:
                x *= gate
        y = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
        if GATED and NORM_FIRST:
            y *= gate
        tl.store(Y + row * (groups * SIZE) + feature, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gated_backward(
    X, Z, WEIGHT, DY, DX, DZ, DWEIGHT, Y, rows, per_program, groups, sx, sz, sy, tx, tz, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, NORM_FIRST: tl.constexpr,
    WRITE_Y: tl.constexpr,
):  # fmt: skip
    """DWEIGHT `(program, features)`. WRITE_Y: also write the output again, for which everything is at hand."""
    pid = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE
    feature = pid % groups * SIZE + offsets
    first = (pid // groups).to(tl.int64) * per_program
    weight = tl.load(WEIGHT + feature, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.minimum(per_program, rows - first).to(tl.int32)):
        row = first + k
        x = tl.load(X + row * sx + feature, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * sy + feature, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            z = tl.load(Z + row * sz + feature, mask=inside, other=0.0).to(tl.float32)
            half = sigmoid(z)
            gate = z * half
            slope = half * (1.0 + z * (1.0 - half))
        u = x
        if GATED and not NORM_FIRST:
            u = x * gate
        scale = tl.rsqrt(tl.sum(u * u, 0) / SIZE + eps)
        normal = u * scale
        dnormal = dy * weight
        if GATED and NORM_FIRST:
            dnormal *= gate
            dweight += dy * gate * normal
        else:
            dweight += dy * normal
        du = (dnormal - normal * (tl.sum(dnormal * normal, 0) / SIZE)) * scale
        if WRITE_Y:
            y = normal * weight
            if GATED and NORM_FIRST:
                y *= gate
            tl.store(Y + row * (groups * SIZE) + feature, y.to(Y.dtype.element_ty), mask=inside)
        if GATED:
            if NORM_FIRST:
                dz = dy * normal * weight * slope
            else:
                dz = du * x * slope
                du *= gate
            tl.store(DZ + row * tz + feature, dz.to(DZ.dtype.element_ty), mask=inside)
        tl.store(DX + row * tx + feature, du.to(DX.dtype.element_ty), mask=inside)
    tl.store(DWEIGHT + (pid // groups) * (groups * SIZE) + feature, dweight, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def add_forward(
    X, RESIDUAL, WEIGHT, Y, TOTAL, rows, per_program, sx, sr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE
    first = tl.program_id(0).to(tl.int64) * per_program
    weight = tl.load(WEIGHT + offsets, mask=inside, other=0.0).to(tl.float32)
    for k in range(tl.minimum(per_program, rows - first).to(tl.int32)):
        row = first + k
        total = tl.load(X + row * sx + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total += tl.load(RESIDUAL + row * sr + offsets, mask=inside, other=0.0).to(tl.float32)
        y = total * tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps) * weight
        tl.store(Y + row * SIZE + offsets, y.to(Y.dtype.element_ty), mask=inside)
        tl.store(TOTAL + row * SIZE + offsets, total.to(TOTAL.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def add_backward(
    X, RESIDUAL, WEIGHT, DY, DTOTAL, DX, DRESIDUAL, DWEIGHT, rows, per_program, sx, sr, sy, st, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DTOTAL: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """X and RESIDUAL add up to the normalised sum; DWEIGHT `(program, features)`."""
    offsets = tl.arange(0, BLOCK)
    inside = offsets < SIZE
    first = tl.program_id(0).to(tl.int64) * per_program
    weight = tl.load(WEIGHT + offsets, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.minimum(per_program, rows - first).to(tl.int32)):
        row = first + k
        total = tl.load(X + row * sx + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total += tl.load(RESIDUAL + row * sr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * sy + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_DTOTAL:
            dtotal = tl.load(DTOTAL + row * st + offsets, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps)
        normal = total * scale
        dnormal = dy * weight
        dweight += dy * normal
        d = (dnormal - normal * (tl.sum(dnormal * normal, 0) / SIZE)) * scale
        if HAS_DTOTAL:
            d += dtotal
        tl.store(DX + row * SIZE + offsets, d.to(DX.dtype.element_ty), mask=inside)
        if WRITE_RESIDUAL:
            tl.store(DRESIDUAL + row * SIZE + offsets, d.to(DRESIDUAL.dtype.element_ty), mask=inside)
    tl.store(DWEIGHT + tl.program_id(0) * SIZE + offsets, dweight, mask=inside)
