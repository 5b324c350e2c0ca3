"""Triton kernels of the Mamba-2 scan, backward. Conventions as in `kernel`.

Given the states before each chunk, which the recompute kept, four launches:

1. `sweep_backward`: the gradient of the state after every chunk, in reverse, as `sweep_forward`;
2. `input_gradient` and
3. `roles`, both in `_kernel_roles`: everything that needs a loop over heads;
4. `finish`: sums over splits and the two products that no head enters, for dB and dC; and from sums over rows and
   columns to the gradients of dt, A and the bias.

With s the running sum in a chunk, i >= j tokens of it, E_ij = exp(s_i - s_j), h the state before the chunk and
g the gradient of the state after it:

    G_ij  = sum over heads of (dy_i . x_j) E_ij dt_j           dC_i = sum_j G_ij B_j + sum_heads exp(s_i) dy_i h
    du_j  = sum_i (C_i . B_j) E_ij dy_i + exp(s_L - s_j) g B_j       dB_j = sum_i G_ij C_i
    dx_j  = dt_j du_j                                                 + sum_heads exp(s_L - s_j) dt_j x_j g
    ddt_j = du_j . x_j + A ds-part

The gradient of s gets the row sums minus the column sums of one and the same float32 tile, whose cancellation
is exact where a difference of two separately rounded totals would not be.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# The bodies are Triton, not Python: `tl.range` is a loop, and a constexpr condition decides what exists.

import triton
import triton.language as tl

from magc_kernels.ssd.kernel import SIZES, dot_wide, load_rows, sigmoid, softplus


@triton.jit(do_not_specialize=SIZES)
def ungate(
    DY, Z, UNGATED, DUNGATED, DZ, length, heads, syb, syl, syh, szb, szl, szh, P: tl.constexpr, BLOCK: tl.constexpr
):
    """Through `y = ungated * silu(z)`, for BLOCK tokens of one head; outputs contiguous."""
    pid = tl.program_id(0)
    h = pid % heads
    rest = (pid // heads).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    b = rest // blocks
    t0 = rest % blocks * BLOCK
    ot = tl.arange(0, BLOCK)
    op = tl.arange(0, P)
    inside = (t0 + ot < length)[:, None]
    out = ((b * length + t0) * heads + h) * P + ot[:, None] * (heads * P) + op[None, :]
    dy = tl.load(DY + (b * syb + t0 * syl + h * syh) + ot[:, None] * syl + op[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    z = tl.load(Z + (b * szb + t0 * szl + h * szh) + ot[:, None] * szl + op[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    y = tl.load(UNGATED + out, mask=inside, other=0.0).to(tl.float32)
    gate = sigmoid(z)
    tl.store(DUNGATED + out, (dy * z * gate).to(DUNGATED.dtype.element_ty), mask=inside)
    tl.store(DZ + out, (dy * y * gate * (1.0 + z * (1.0 - gate))).to(DZ.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sweep_backward(
    C, CUM, RUNS, DY, DFINAL, DSTATES, DINITIAL,
    length, heads, ratio, chunks, scb, scl, scg, syb, syl, syh,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, L: tl.constexpr,
    HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DSTATES: gradient of the state after every chunk, for one head and BP of its rows, as in `sweep_forward`."""
    SLICES: tl.constexpr = P // BP
    pid = tl.program_id(0)
    op = pid % SLICES * BP + tl.arange(0, BP)
    bh = (pid // SLICES).to(tl.int64)
    b = bh // heads
    h = bh % heads
    ol = tl.arange(0, L)
    on = tl.arange(0, N)
    tile = on[:, None] + op[None, :] * N
    grad = tl.load(DFINAL + bh * (P * N) + tile).to(tl.float32) if HAS_DFINAL else tl.zeros([N, BP], tl.float32)
    row = bh * chunks * L
    y_base = DY + (b * syb + h * syh)
    c_base = C + (b * scb + h // ratio * scg)
    if PACKED:
        runs = RUNS + b * (chunks * L + 1)
    ahead = row + (chunks - 1) * L
    # One chunk ahead, as in `sweep_forward`.
    last = tl.load(CUM + ahead + (L - 1))
    cum = tl.load(CUM + ahead + ol)
    for k in tl.range(0, chunks, num_stages=STAGES):
        c = bh * 0 + (chunks - 1 - k)
        t0 = c * L
        across = tl.exp2(last)
        weight = tl.exp2(cum)
        if PACKED:
            before = tl.load(runs + t0)
            across = tl.where(tl.load(runs + t0 + L) == before, across, 0.0)
            weight = tl.where(tl.load(runs + (t0 + 1) + ol) == before, weight, 0.0)
        ahead = row + tl.maximum(t0 - L, 0)
        last = tl.load(CUM + ahead + (L - 1))
        cum = tl.load(CUM + ahead + ol)
        dy = load_rows(y_base + t0 * syl + ol[:, None] * syl + op[None, :], ol, t0, length, RAGGED)
        C_t = load_rows(c_base + t0 * scl + ol[:, None] * scl + on[None, :], ol, t0, length, RAGGED)
        tl.store(DSTATES + ((b * chunks + c) * heads + h) * (P * N) + tile, grad.to(DSTATES.dtype.element_ty))
        grad = dot_wide(tl.trans(C_t), dy.to(tl.float32) * weight[:, None], grad * across, PRECISION)
    tl.store(DINITIAL + bh * (P * N) + tile, grad)


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
    total = tl.zeros([BM, BN], tl.float32)
    if pid % 2 == 0:
        for s in range(splits):
            total += tl.load(DB_PARTS + s * part_stride + part)
        for i in range(r, ROWS):
            weight = tl.zeros([BM, BM], tl.float32)
            for s in range(splits):
                weight += tl.load(score + s * score_stride + (r * BM + om)[:, None] * L + (i * BM + om)[None, :])
            ti = t0 + i * BM
            value = tl.load(
                C + (b * scb + g * scg + ti * scl) + om[:, None] * scl + on[None, :],
                mask=(ti + om < length)[:, None], other=0.0,
            )  # fmt: skip
            total = tl.dot(weight, value.to(tl.float32), total, input_precision=PRECISION)
        out = DB + (b * tbb + g * tbg + tb * tbl) + om[:, None] * tbl + on[None, :]
        tl.store(out, total.to(DB.dtype.element_ty), mask=inside)
    else:
        for s in range(splits):
            total += tl.load(DC_PARTS + s * part_stride + part)
        for j in range(r + 1):
            weight = tl.zeros([BM, BM], tl.float32)
            for s in range(splits):
                weight += tl.load(score + s * score_stride + (j * BM + om)[None, :] * L + (r * BM + om)[:, None])
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
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What is left after `roles`, in one launch: dB and dC, and everything that concerns steps. DWEIGHTS
    `(3, b, chunk, head)`: parts of the gradients of A, the bias and the skip weight.
    """
    pid = tl.program_id(0)
    projections = batch * chunks * groups * (2 * (L // BM) * (N // BN))
    if pid < projections:
        _finish_projections(
            B, C, DSCORE, DB_PARTS, DC_PARTS, DB, DC, pid, batch, length, groups, chunks, splits,
            sbb, sbl, sbg, scb, scl, scg, tbb, tbl, tbg, tcb, tcl, tcg, N, BN, L, BM, PRECISION,
        )  # fmt: skip
    else:
        _finish_steps(
            DT, A, BIAS, STEP, CUM, RUNS, SUMS, DACROSS, DSKIP, DDT, DWEIGHTS,
            pid - projections, batch, length, heads, chunks, sdb, sdl, sdh, sgb, sgl, low, high,
            L, BH, L // BM, HAS_SKIP, HAS_BIAS, SOFTPLUS, CLAMP, PACKED,
        )  # fmt: skip
