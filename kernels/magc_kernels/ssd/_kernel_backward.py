"""Triton kernels of the Mamba-2 scan, backward. Conventions as in `kernel`.

Given the states before each chunk, which the recompute kept, four launches:

1. `sweep_backward`: the gradient of the state after every chunk, in reverse, as `sweep_forward`;
2. `roles`: everything that needs a loop over heads. Four kinds of programs, adjacent in the launch for one
   chunk and split so that they share x, dy and the states in L2; a single one holding all four results would
   spill registers;
3. `finish_projections`: sums over splits and the two products that no head enters, dB and dC;
4. `finish_steps`: from gradients of running sums to those of dt, A and the bias.

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

from magc_kernels.ssd.kernel import SIZES, decay_between, load_rows, sigmoid, softplus


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
    C, CUM, RUNS, DY, STATES, DFINAL, DSTATES, DINITIAL, DACROSS,
    length, heads, ratio, chunks, scb, scl, scg, syb, syl, syh,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr,
    HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DSTATES: gradient of the state after every chunk. DACROSS `(b, chunk, head, slice, p)`: the part of the
    gradient of a chunk's last running sum that comes through the state it hands on.
    """
    SLICES: tl.constexpr = N // BN
    pid = tl.program_id(0)
    piece = pid % SLICES
    on = piece * BN + tl.arange(0, BN)
    bh = (pid // SLICES).to(tl.int64)
    b = bh // heads
    h = bh % heads
    ol = tl.arange(0, L)
    op = tl.arange(0, P)
    tile = op[:, None] * N + on[None, :]
    grad = tl.load(DFINAL + bh * (P * N) + tile).to(tl.float32) if HAS_DFINAL else tl.zeros([P, BN], tl.float32)
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
        C_t = (C_t.to(tl.float32) * weight[:, None]).to(dy.dtype)
        where = (b * chunks + c) * heads + h
        tl.store(DSTATES + where * (P * N) + tile, grad.to(DSTATES.dtype.element_ty))
        state = tl.load(STATES + where * (P * N) + tile).to(tl.float32)
        tl.store(DACROSS + (where * SLICES + piece) * P + op, tl.sum(state * grad, 1) * across)
        grad = tl.dot(tl.trans(dy), C_t, grad * across, input_precision=PRECISION)
    tl.store(DINITIAL + bh * (P * N) + tile, grad)


@triton.jit
def _scores_role(
    X, B, C, STEP, CUM, RUNS, DY, DSCORE, DCUM,
    b, c, g, split, first, count, j, i, batch, length, heads, ratio, chunks,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G transposed for the tokens of blocks j <= i of a chunk, summed over the split's heads, and the part of
    the running sums' gradient that comes through E.
    """
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    op = tl.arange(0, P)
    tj = c * L + j * BM
    ti = c * L + i * BM
    B_j = load_rows(B + (b * sbb + g * sbg + tj * sbl) + om[:, None] * sbl + on[None, :], om, tj, length, RAGGED)
    C_i = load_rows(C + (b * scb + g * scg + ti * scl) + om[:, None] * scl + on[None, :], om, ti, length, RAGGED)
    # The transposed score is formed as such: transposing an accumulator is what Triton 3.4 to 3.7 get wrong on
    # Hopper (fla-org/flash-linear-attention issue 640).
    score = tl.dot(B_j, tl.trans(C_i), input_precision=PRECISION)
    visible = (j * BM + om)[:, None] <= (i * BM + om)[None, :]
    if PACKED:
        runs = RUNS + b * (chunks * L + 1)
        visible = visible & (tl.load(runs + (tj + 1) + om)[:, None] == tl.load(runs + (ti + 1) + om)[None, :])
    total = tl.zeros([BM, BM], tl.float32)
    tokens = chunks * L
    plane = batch * heads * tokens
    # Each token gets rows 0 .. L / BM of DCUM exactly once: its own block b receives sums over j in rows 0 .. b
    # and sums over i in rows b + 1 .. L / BM.
    down = DCUM + j * plane
    right = DCUM + (i + 1) * plane
    for k in tl.range(0, count, num_stages=STAGES):
        h = first + k
        row = (b * heads + h) * tokens
        cum_j = tl.load(CUM + row + tj + om)
        cum_i = tl.load(CUM + row + ti + om)
        step_j = tl.load(STEP + row + tj + om)
        x = load_rows(X + (b * sxb + tj * sxl + h * sxh) + om[:, None] * sxl + op[None, :], om, tj, length, RAGGED)
        dy = load_rows(DY + (b * syb + ti * syl + h * syh) + om[:, None] * syl + op[None, :], om, ti, length, RAGGED)
        part = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        part *= tl.where(visible, decay_between(cum_i[None, :], cum_j[:, None]) * step_j[:, None], 0.0)
        total += part
        part *= score
        tl.store(down + row + ti + om, tl.sum(part, 0))
        tl.store(right + row + tj + om, -tl.sum(part, 1))
    where = ((split * batch + b) * chunks + c) * (heads // ratio) + g
    tl.store(DSCORE + where * (L * L) + (j * BM + om)[:, None] * L + (i * BM + om)[None, :], total)


@triton.jit
def _input_role(
    X, B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX, DSTEP, DCUM, DSKIP,
    b, c, g, first, count, batch, length, heads, chunks,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
    ROW: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, the direct part of the step's gradient, and the skip weight's, for block ROW of a chunk. DCUM's last
    row receives what each token's decay to the chunk's end contributes.
    """
    ROWS: tl.constexpr = L // BM
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    op = tl.arange(0, P)
    tokens = chunks * L
    t0 = c * L
    tj = t0 + ROW * BM
    tn = tj + BM
    c_base = C + (b * scb + g * scg) + om[:, None] * scl + on[None, :]
    B_j = load_rows(B + (b * sbb + g * sbg + tj * sbl) + om[:, None] * sbl + on[None, :], om, tj, length, RAGGED)
    C_j = load_rows(c_base + tj * scl, om, tj, length, RAGGED)
    score = tl.dot(B_j, tl.trans(C_j), input_precision=PRECISION)
    score = tl.where(om[:, None] <= om[None, :], score, 0.0)
    if ROW + 1 < ROWS:
        C_n = load_rows(c_base + tn * scl, om, tn, length, RAGGED)
        score_n = tl.dot(B_j, tl.trans(C_n), input_precision=PRECISION)
    if PACKED:
        runs = RUNS + b * (tokens + 1)
        run_j = tl.load(runs + (tj + 1) + om)
        score = tl.where(run_j[:, None] == run_j[None, :], score, 0.0)
        if ROW + 1 < ROWS:
            score_n = tl.where(run_j[:, None] == tl.load(runs + (tn + 1) + om)[None, :], score_n, 0.0)
        lasts = run_j == tl.load(runs + t0 + L)
    plane = batch * heads * tokens
    for k in tl.range(0, count, num_stages=STAGES):
        h = first + k
        row = (b * heads + h) * tokens
        cum = tl.load(CUM + row + tj + om)
        step = tl.load(STEP + row + tj + om)
        last = tl.load(CUM + row + t0 + (L - 1))
        grad = tl.load(DSTATES + ((b * chunks + c) * heads + h) * (P * N) + op[:, None] * N + on[None, :])
        x = load_rows(X + (b * sxb + tj * sxl + h * sxh) + om[:, None] * sxl + op[None, :], om, tj, length, RAGGED)
        dy = load_rows(DY + (b * syb + tj * syl + h * syh) + om[:, None] * syl + op[None, :], om, tj, length, RAGGED)
        if ROW + 1 < ROWS:
            cum_n = tl.load(CUM + row + tn + om)
            dy_n = load_rows(
                DY + (b * syb + tn * syl + h * syh) + om[:, None] * syl + op[None, :], om, tn, length, RAGGED
            )
        if D_RANK == 1:
            skip = tl.load(D + h).to(tl.float32)
        if D_RANK == 2:
            skip = tl.load(D + h * P + op).to(tl.float32)[None, :]
        to_end = decay_between(last, cum)
        if PACKED:
            to_end = tl.where(lasts, to_end, 0.0)
        du = tl.dot(B_j, tl.trans(grad), input_precision=PRECISION) * to_end[:, None]
        x32 = x.to(tl.float32)
        tl.store(DCUM + (ROWS + 2) * plane + row + tj + om, tl.sum(du * x32, 1) * step)
        if ROW + 1 < ROWS:
            mixing = score_n * decay_between(cum_n[None, :], cum[:, None])
            du = tl.dot(mixing.to(dy.dtype), dy_n, du, input_precision=PRECISION)
        mixing = score * decay_between(cum[None, :], cum[:, None])
        du = tl.dot(mixing.to(dy.dtype), dy, du, input_precision=PRECISION)
        tl.store(DSTEP + row + tj + om, tl.sum(du * x32, 1))
        dx = du * step[:, None]
        if D_RANK > 0:
            dy32 = dy.to(tl.float32)
            dx += dy32 * skip
            where = ((b * chunks + c) * ROWS + ROW) * heads + h
            if D_RANK == 1:
                tl.store(DSKIP + where, tl.sum(tl.sum(dy32 * x32, 1), 0))
            else:
                tl.store(DSKIP + where * P + op, tl.sum(dy32 * x32, 0))
        pointers = DX + (b * sub + tj * sul + h * suh) + om[:, None] * sul + op[None, :]
        if RAGGED:
            tl.store(pointers, dx.to(DX.dtype.element_ty), mask=(tj + om < length)[:, None])
        else:
            tl.store(pointers, dx.to(DX.dtype.element_ty))


@triton.jit
def _projection_role(
    V, K, STEP, CUM, RUNS, S, DK, DCUM,
    b, c, g, split, first, count, r, batch, length, heads, ratio, chunks,
    svb, svl, svh, skb, skl, skg,
    IS_B: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The part of dB (V = x, S = gradient of the state after the chunk) or dC (V = dy, S = state before the
    chunk, K = C) that comes through states, summed over the split's heads, for block r of a chunk.
    """
    ROWS: tl.constexpr = L // BM
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    op = tl.arange(0, P)
    tokens = chunks * L
    plane = batch * heads * tokens
    t0 = c * L
    tb = t0 + r * BM
    if not IS_B:
        C_i = load_rows(K + (b * skb + g * skg + tb * skl) + om[:, None] * skl + on[None, :], om, tb, length, RAGGED)
    if PACKED:
        runs = RUNS + b * (tokens + 1)
        edge = tl.load(runs + t0 + (L if IS_B else 0))
        counts = tl.load(runs + (tb + 1) + om) == edge
    total = tl.zeros([BM, N], tl.float32)
    for k in tl.range(0, count, num_stages=STAGES):
        h = first + k
        row = (b * heads + h) * tokens
        cum = tl.load(CUM + row + tb + om)
        if IS_B:
            last = tl.load(CUM + row + t0 + (L - 1))
            step = tl.load(STEP + row + tb + om)
        v = load_rows(V + (b * svb + tb * svl + h * svh) + om[:, None] * svl + op[None, :], om, tb, length, RAGGED)
        s = tl.load(S + ((b * chunks + c) * heads + h) * (P * N) + op[:, None] * N + on[None, :])
        weight = decay_between(last, cum) * step if IS_B else tl.exp2(cum)
        if PACKED:
            weight = tl.where(counts, weight, 0.0)
        if not IS_B:
            seen = tl.dot(C_i, tl.trans(s), input_precision=PRECISION)
            tl.store(DCUM + (ROWS + 1) * plane + row + tb + om, tl.sum(seen * v.to(tl.float32), 1) * weight)
        total = tl.dot((v.to(tl.float32) * weight[:, None]).to(v.dtype), s, total, input_precision=PRECISION)
    where = ((split * batch + b) * tokens + tb) * (heads // ratio) + g
    tl.store(DK + where * N + om[:, None] * (heads // ratio * N) + on[None, :], total)


@triton.jit(do_not_specialize=SIZES)
def roles(
    X, B, C, STEP, CUM, RUNS, STATES, DSTATES, DY, D,
    DX, DB, DC, DSCORE, DSTEP, DCUM, DSKIP,
    batch, length, heads, ratio, chunks, per_program,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one role, one block of tokens, `per_program` heads of one group.

    DB, DC `(split, b, t, group, n)` and DSCORE `(split, b, chunk, group, j, i)` are partial sums. DCUM
    `(L / BM + 3, b, head, t)`: the first rows and the one before the last add up to the gradient of the running
    sum; the last enters with a minus at its token and a plus at the chunk's last token.
    """
    ROWS: tl.constexpr = L // BM
    tl.static_assert(ROWS <= 2)
    TILES: tl.constexpr = ROWS * (ROWS + 1) // 2
    ROLES: tl.constexpr = TILES + 3 * ROWS
    splits = tl.cdiv(ratio, per_program)
    groups = heads // ratio
    role = tl.program_id(0) % ROLES
    rest = (tl.program_id(0) // ROLES).to(tl.int64)
    split = rest % splits
    g = rest // splits % groups
    c = rest // (splits * groups) % chunks
    b = rest // (splits * groups) // chunks
    first = g * ratio + split * per_program
    count = tl.minimum(ratio - split * per_program, per_program).to(tl.int32)
    if role < TILES:
        # Tiles 0, 1, 2 are the block pairs (j, i) = (0, 0), (0, 1), (1, 1).
        _scores_role(
            X, B, C, STEP, CUM, RUNS, DY, DSCORE, DCUM,
            b, c, g, split, first, count, role // 2, (role + 1) // 2, batch, length, heads, ratio, chunks,
            sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh,
            P, N, L, BM, PACKED, RAGGED, PRECISION, STAGES,
        )  # fmt: skip
    elif role < TILES + ROWS:
        if ROWS == 1:
            _input_role(
                X, B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX, DSTEP, DCUM, DSKIP,
                b, c, g, first, count, batch, length, heads, chunks,
                sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
                0, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, STAGES,
            )  # fmt: skip
        else:
            if role == TILES:
                _input_role(
                    X, B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX, DSTEP, DCUM, DSKIP,
                    b, c, g, first, count, batch, length, heads, chunks,
                    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
                    0, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, STAGES,
                )  # fmt: skip
            else:
                _input_role(
                    X, B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX, DSTEP, DCUM, DSKIP,
                    b, c, g, first, count, batch, length, heads, chunks,
                    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
                    1, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, STAGES,
                )  # fmt: skip
    elif role < TILES + 2 * ROWS:
        _projection_role(
            X, B, STEP, CUM, RUNS, DSTATES, DB, DCUM,
            b, c, g, split, first, count, role - TILES - ROWS, batch, length, heads, ratio, chunks,
            sxb, sxl, sxh, sbb, sbl, sbg,
            True, P, N, L, BM, PACKED, RAGGED, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _projection_role(
            DY, C, STEP, CUM, RUNS, STATES, DC, DCUM,
            b, c, g, split, first, count, role - TILES - 2 * ROWS, batch, length, heads, ratio, chunks,
            syb, syl, syh, scb, scl, scg,
            False, P, N, L, BM, PACKED, RAGGED, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def finish_projections(
    B, C, DSCORE, DB_PARTS, DC_PARTS, DB, DC,
    batch, length, groups, chunks, splits,
    sbb, sbl, sbg, scb, scl, scg, tbb, tbl, tbg, tcb, tcl, tcg,
    N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DB or dC of BM tokens of one group: the sum over splits of both parts."""
    ROWS: tl.constexpr = L // BM
    pid = tl.program_id(0)
    r = pid // 2 % ROWS
    rest = (pid // (2 * ROWS)).to(tl.int64)
    g = rest % groups
    c = rest // groups % chunks
    b = rest // groups // chunks
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    t0 = c * L
    tb = t0 + r * BM
    inside = (tb + om < length)[:, None]
    part = ((b * chunks * L + tb) * groups + g) * N + om[:, None] * (groups * N) + on[None, :]
    part_stride = (batch * chunks * L).to(tl.int64) * groups * N
    score = DSCORE + ((b * chunks + c) * groups + g) * (L * L)
    score_stride = (batch * chunks).to(tl.int64) * groups * (L * L)
    total = tl.zeros([BM, N], tl.float32)
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


@triton.jit(do_not_specialize=SIZES)
def finish_steps(
    DT, A, BIAS, STEP, DSTEP, DCUM, DACROSS, DDT, DA_PARTS, DBIAS_PARTS,
    batch, length, heads, chunks, sdb, sdl, sdh, low, high,
    L: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Gradients of dt (contiguous) and, per chunk, of A and the bias, for one chunk and BH heads."""
    blocks = tl.cdiv(heads, BH)
    pid = tl.program_id(0)
    h = (pid % blocks) * BH + tl.arange(0, BH)
    bc = (pid // blocks).to(tl.int64)
    b = bc // chunks
    t0 = bc % chunks * L
    ol = tl.arange(0, L)
    known = h < heads
    rows = (b * heads * chunks * L + t0) + h.to(tl.int64)[:, None] * (chunks * L) + ol[None, :]
    plane = (batch * heads).to(tl.int64) * chunks * L
    dcum = tl.zeros([BH, L], tl.float32)
    for slot in tl.static_range(ROWS + 2):
        dcum += tl.load(DCUM + slot * plane + rows, mask=known[:, None], other=0.0)
    to_end = tl.load(DCUM + (ROWS + 2) * plane + rows, mask=known[:, None], other=0.0)
    oa = tl.arange(0, ACROSS)
    across = tl.load(DACROSS + (bc * heads + h)[:, None] * ACROSS + oa[None, :], mask=known[:, None], other=0.0)
    # Every earlier token's rate enters the last running sum.
    at_end = tl.sum(across, 1) + tl.sum(to_end, 1)
    drate = tl.cumsum(dcum - to_end, 1, reverse=True) + at_end[:, None]
    step = tl.load(STEP + rows, mask=known[:, None], other=0.0)
    rate = tl.load(A + h, mask=known, other=0.0).to(tl.float32)
    dstep = tl.load(DSTEP + rows, mask=known[:, None], other=0.0) + drate * rate[:, None]
    tl.store(DA_PARTS + bc * heads + h, tl.sum(drate * step, 1), mask=known)

    inside = known[:, None] & (t0 + ol < length)[None, :]
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
        tl.store(DBIAS_PARTS + bc * heads + h, tl.sum(dstep, 1), mask=known)
    out = (b * length + t0) * heads + h[:, None] + ol[None, :] * heads
    tl.store(DDT + out, dstep.to(DDT.dtype.element_ty), mask=inside)
