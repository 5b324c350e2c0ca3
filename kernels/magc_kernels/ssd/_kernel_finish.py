"""Triton kernel that ends the Mamba-2 scan's backward: sums over splits and steps. Notation as in `_kernel_backward`."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# The bodies are Triton, not Python: `tl.range` is a loop, and a constexpr condition decides what exists.

import triton
import triton.language as tl

from magc_kernels.ssd.kernel import SIZES, sigmoid, softplus


@triton.jit
def _sum(pointers, stride, splits, total):
    """`total` plus the tiles at `pointers + s * stride`, in order. Four loads are under way at a time: one after the
    other, their latencies would make up most of `finish`.
    """
    for s in range(0, splits, 4):
        base = pointers + s * stride
        more = splits - s
        p0 = tl.load(base)
        p1 = tl.load(base + stride, mask=more > 1, other=0.0)
        p2 = tl.load(base + 2 * stride, mask=more > 2, other=0.0)
        p3 = tl.load(base + 3 * stride, mask=more > 3, other=0.0)
        total += p0
        total += p1
        total += p2
        total += p3
    return total


@triton.jit
def _finish_projections(
    B, C, DSCORE, DB_PARTS, DC_PARTS, DB, DC,
    pid, batch, length, groups, chunks, splits,
    sbb, sbl, sbg, scb, scl, scg, tbb, tbl, tbg, tcb, tcl, tcg,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DB or dC of BM tokens of one group and BN columns: the sum over splits of both parts."""
    ROWS: tl.constexpr = L // BM
    SLICES: tl.constexpr = N // BN
    r = pid // 2 % ROWS
    on = pid // (2 * ROWS) % SLICES * BN + tl.arange(0, BN)
    rest = (pid // (2 * ROWS * SLICES)).to(tl.int64)
    g = rest % groups
    c = rest // groups % chunks
    b = rest // groups // chunks
    om = tl.arange(0, BM)
    t0 = c * L
    tb = t0 + r * BM
    inside = (tb + om < length)[:, None]
    part = ((b * chunks * L + tb) * groups + g) * N + om[:, None] * (groups * N) + on[None, :]
    part_stride = (batch * chunks * L).to(tl.int64) * groups * N
    score = DSCORE + ((b * chunks + c) * groups + g) * (L * L)
    score_stride = (batch * chunks).to(tl.int64) * groups * (L * L)
    if pid % 2 == 0:
        total = _sum(DB_PARTS + part, part_stride, splits, tl.zeros([BM, BN], tl.float32))
        for i in range(r, ROWS):
            weight = _sum(
                score + (r * BM + om)[:, None] * L + (i * BM + om)[None, :], score_stride, splits,
                tl.zeros([BM, BM], tl.float32),
            )  # fmt: skip
            ti = t0 + i * BM
            value = tl.load(
                C + (b * scb + g * scg + ti * scl) + om[:, None] * scl + on[None, :],
                mask=(ti + om < length)[:, None], other=0.0,
            )  # fmt: skip
            total = tl.dot(weight, value.to(tl.float32), total, input_precision=PRECISION)
        out = DB + (b * tbb + g * tbg + tb * tbl) + om[:, None] * tbl + on[None, :]
        tl.store(out, total.to(DB.dtype.element_ty), mask=inside)
    else:
        total = _sum(DC_PARTS + part, part_stride, splits, tl.zeros([BM, BN], tl.float32))
        for j in range(r + 1):
            weight = _sum(
                score + (j * BM + om)[None, :] * L + (r * BM + om)[:, None], score_stride, splits,
                tl.zeros([BM, BM], tl.float32),
            )  # fmt: skip
            tj = t0 + j * BM
            value = tl.load(
                B + (b * sbb + g * sbg + tj * sbl) + om[:, None] * sbl + on[None, :],
                mask=(tj + om < length)[:, None], other=0.0,
            )  # fmt: skip
            total = tl.dot(weight, value.to(tl.float32), total, input_precision=PRECISION)
        out = DC + (b * tcb + g * tcg + tb * tcl) + om[:, None] * tcl + on[None, :]
        tl.store(out, total.to(DC.dtype.element_ty), mask=inside)


@triton.jit
def _finish_steps(
    DT, A, BIAS, STEP, CUM, RUNS, SUMS, DACROSS, DSKIP, DDT, DWEIGHTS,
    pid, batch, length, heads, chunks, sdb, sdl, sdh, sgb, sgl, low, high,
    L: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of dt and, per chunk, of A, the bias and one skip weight per head, for one chunk and BH heads."""
    blocks = tl.cdiv(heads, BH)
    h = (pid % blocks) * BH + tl.arange(0, BH)
    bc = (pid // blocks).to(tl.int64)
    b = bc // chunks
    t0 = bc % chunks * L
    ol = tl.arange(0, L)
    known = h < heads
    every = known[:, None]
    rows = (b * heads * chunks * L + t0) + h.to(tl.int64)[:, None] * (chunks * L) + ol[None, :]
    plane = (batch * heads).to(tl.int64) * chunks * L
    step = tl.load(STEP + rows, mask=every, other=0.0)
    over_j = tl.load(SUMS + rows, mask=every, other=0.0)
    over_i = tl.load(SUMS + plane + rows, mask=every, other=0.0)
    if ROWS == 2:
        between = tl.load(SUMS + 4 * plane + rows, mask=every, other=0.0)
        earlier = (ol < L // 2)[None, :]
        over_j += tl.where(earlier, 0.0, between)
        over_i += tl.where(earlier, between, 0.0)
    to_end = tl.load(SUMS + 3 * plane + rows, mask=every, other=0.0)
    dstep = over_i + to_end
    to_end *= step
    dcum = over_j - over_i * step + tl.load(SUMS + 2 * plane + rows, mask=every, other=0.0)
    across = tl.load(DACROSS + bc * heads + h, mask=known, other=0.0)
    across *= tl.exp2(tl.load(CUM + (b * heads + h) * (chunks * L) + (t0 + L - 1), mask=known, other=0.0))
    if PACKED:
        runs = RUNS + b * (chunks * L + 1) + t0
        across = tl.where(tl.load(runs) == tl.load(runs + L), across, 0.0)
    # Every earlier token's rate enters the last running sum.
    at_end = across + tl.sum(to_end, 1)
    drate = tl.cumsum(dcum - to_end, 1, reverse=True) + at_end[:, None]
    rate = tl.load(A + h, mask=known, other=0.0).to(tl.float32)
    dstep += drate * rate[:, None]
    parts = (batch * chunks).to(tl.int64) * heads
    tl.store(DWEIGHTS + bc * heads + h, tl.sum(drate * step, 1), mask=known)

    inside = every & (t0 + ol < length)[None, :]
    raw = tl.load(DT + (b * sdb + t0 * sdl) + h[:, None] * sdh + ol[None, :] * sdl, mask=inside, other=0.0)
    raw = raw.to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(BIAS + h, mask=known, other=0.0).to(tl.float32)[:, None]
    if CLAMP:
        value = softplus(raw) if SOFTPLUS else raw
        dstep = tl.where((value >= low) & (value <= high), dstep, 0.0)
    if SOFTPLUS:
        dstep *= sigmoid(raw)
    dstep = tl.where(inside, dstep, 0.0)
    if HAS_BIAS:
        tl.store(DWEIGHTS + parts + bc * heads + h, tl.sum(dstep, 1), mask=known)
    if HAS_SKIP:
        skip = tl.load(DSKIP + bc * ROWS * heads + h, mask=known, other=0.0)
        if ROWS == 2:
            skip += tl.load(DSKIP + (bc * ROWS + 1) * heads + h, mask=known, other=0.0)
        tl.store(DWEIGHTS + 2 * parts + bc * heads + h, skip, mask=known)
    out = (b * sgb + t0 * sgl) + h[:, None] + ol[None, :] * sgl
    tl.store(DDT + out, dstep.to(DDT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def finish(
    B, C, DSCORE, DB_PARTS, DC_PARTS, DB, DC,
    DT, A, BIAS, STEP, CUM, RUNS, SUMS, DACROSS, DSKIP, DDT, DWEIGHTS,
    batch, length, heads, groups, chunks, splits,
    sbb, sbl, sbg, scb, scl, scg, tbb, tbl, tbg, tcb, tcl, tcg, sdb, sdl, sdh, sgb, sgl, low, high,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, FM: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What is left after `roles`, in one launch: dB and dC, and everything that concerns steps.

    DWEIGHTS `(3, b, chunk, head)`: parts of the gradients of A, the bias and the skip weight. FM: tokens of a program
    for dB or dC, at most BM; BM: those of a tile of `roles`, which tells what SUMS and DSCORE hold.
    """
    pid = tl.program_id(0)
    projections = batch * chunks * groups * (2 * (L // FM) * (N // BN))
    if pid < projections:
        _finish_projections(
            B, C, DSCORE, DB_PARTS, DC_PARTS, DB, DC, pid, batch, length, groups, chunks, splits,
            sbb, sbl, sbg, scb, scl, scg, tbb, tbl, tbg, tcb, tcl, tcg, N, BN, L, FM, PRECISION,
        )  # fmt: skip
    else:
        _finish_steps(
            DT, A, BIAS, STEP, CUM, RUNS, SUMS, DACROSS, DSKIP, DDT, DWEIGHTS,
            pid - projections, batch, length, heads, chunks, sdb, sdl, sdh, sgb, sgl, low, high,
            L, BH, L // BM, HAS_SKIP, HAS_BIAS, SOFTPLUS, CLAMP, PACKED,
        )  # fmt: skip
