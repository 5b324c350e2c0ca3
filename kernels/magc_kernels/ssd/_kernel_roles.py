"""Triton kernels of the Mamba-2 scan's backward: everything that needs a loop over heads.

`input_gradient` makes dx as `scan` makes y. `roles` makes what is summed over heads, and the sums that dt's gradient
needs. Its programs are of three kinds, adjacent in the launch for one chunk and split so that they share x, dy and
the states in L2; a single program holding all results would spill registers, and `input_gradient` is apart because
it takes so many that fewer programs of all kinds would fit a processor. Notation as in `_kernel_backward`.

Sums over a token's row or column go to planes of SUMS `(3 + L / BM, b, head, t)`, from which `finish` makes the
gradients of step and running sum. With Q_ij = (dy_i . x_j) E_ij (C_i . B_j), and both tokens in the same block of BM:

0. sum over j of Q_ij dt_j at i;
1. sum over i of Q_ij at j;
2. exp(s_i) dy_i . (h C_i), through the state before the chunk, at i;
3. exp(s_L - s_j) x_j . (g B_j), through the state after the chunk, at j;
4. the sums for tokens i of the second block and j of the first: at i as plane 0, at j as plane 1.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# The bodies are Triton, not Python: `tl.range` is a loop, and a constexpr condition decides what exists.

import triton
import triton.language as tl

from magc_kernels.ssd.kernel import SIZES, decay_between, load_rows

DIAGONAL = tl.constexpr(0)
LATER = tl.constexpr(1)


@triton.jit
def placed(heads, ratio, chunks, per_program, KINDS: tl.constexpr):
    """Which kind of program this is, and its split, group, chunk, row, first head and number of heads."""
    splits = tl.cdiv(ratio, per_program)
    groups = heads // ratio
    rest = (tl.program_id(0) // KINDS).to(tl.int64)
    split = rest % splits
    g = rest // splits % groups
    c = rest // (splits * groups) % chunks
    b = rest // (splits * groups) // chunks
    first = g * ratio + split * per_program
    count = tl.minimum(ratio - split * per_program, per_program).to(tl.int32)
    return tl.program_id(0) % KINDS, split, g, c, b, first, count


@triton.jit
def _scores_role(
    X, B, C, STEP, CUM, RUNS, DY, DSCORE, SUMS, DSKIP,
    b, c, g, split, first, count, j, batch, length, heads, ratio, chunks,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh,
    TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G transposed, summed over the split's heads, for the tokens of block j and those of the same (TILE DIAGONAL)
    or the next block (TILE LATER); planes 0 and 1, with the skip weight's gradient, or 4.
    """
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    op = tl.arange(0, P)
    i = j + TILE
    tj = c * L + j * BM
    ti = c * L + i * BM
    B_j = load_rows(B + (b * sbb + g * sbg + tj * sbl) + om[:, None] * sbl + on[None, :], om, tj, length, RAGGED)
    C_i = load_rows(C + (b * scb + g * scg + ti * scl) + om[:, None] * scl + on[None, :], om, ti, length, RAGGED)
    # The transposed score is formed as such: transposing an accumulator is what Triton 3.4 to 3.7 get wrong on
    # Hopper (fla-org/flash-linear-attention issue 640).
    score = tl.dot(B_j, tl.trans(C_i), input_precision=PRECISION)
    if PACKED:
        runs = RUNS + b * (chunks * L + 1)
        same = tl.load(runs + (tj + 1) + om)[:, None] == tl.load(runs + (ti + 1) + om)[None, :]
        score = tl.where(same, score, 0.0)
    if TILE == DIAGONAL:
        score = tl.where(om[:, None] <= om[None, :], score, 0.0)
    total = tl.zeros([BM, BM], tl.float32)
    tokens = chunks * L
    plane = (batch * heads).to(tl.int64) * tokens
    at_i = SUMS + (0 if TILE == DIAGONAL else 4) * plane
    at_j = SUMS + (1 if TILE == DIAGONAL else 4) * plane
    for k in tl.range(0, count, num_stages=STAGES):
        h = first + k
        row = (b * heads + h) * tokens
        cum_j = tl.load(CUM + row + tj + om)
        cum_i = tl.load(CUM + row + ti + om)
        step_j = tl.load(STEP + row + tj + om)
        x = load_rows(X + (b * sxb + tj * sxl + h * sxh) + om[:, None] * sxl + op[None, :], om, tj, length, RAGGED)
        dy = load_rows(DY + (b * syb + ti * syl + h * syh) + om[:, None] * syl + op[None, :], om, ti, length, RAGGED)
        if TILE == LATER:
            # A decay past the border between the blocks is a product of two vectors, each at most 1.
            border = tl.load(CUM + row + ti - 1)
        part = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        if TILE == DIAGONAL:
            where = ((b * chunks + c) * (L // BM) + j) * heads + h
            if D_RANK == 1:
                products = tl.where(om[:, None] == om[None, :], part, 0.0)
                tl.store(DSKIP + where, tl.sum(tl.sum(products, 1), 0))
            if D_RANK == 2:
                tl.store(DSKIP + where * P + op, tl.sum(x.to(tl.float32) * dy.to(tl.float32), 0))
        # What is above the diagonal stays finite, and is cut off from `total` at the end.
        if TILE == LATER:
            part *= decay_between(cum_i, border)[None, :]
            before = decay_between(border, cum_j)
            scale = before * step_j
        else:
            part *= decay_between(cum_i[None, :], cum_j[:, None])
            scale = step_j
        total += part * scale[:, None]
        part *= score
        over_i = tl.sum(part, 1)
        if TILE == LATER:
            over_i *= before
        tl.store(at_j + row + tj + om, over_i)
        tl.store(at_i + row + ti + om, tl.sum(part * scale[:, None], 0))
    if PACKED:
        total = tl.where(same, total, 0.0)
    if TILE == DIAGONAL:
        total = tl.where(om[:, None] <= om[None, :], total, 0.0)
    where = ((split * batch + b) * chunks + c) * (heads // ratio) + g
    tl.store(DSCORE + where * (L * L) + (j * BM + om)[:, None] * L + (i * BM + om)[None, :], total)


@triton.jit
def _input_block(
    B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX,
    b, c, g, first, count, length, heads, chunks,
    sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
    ROW: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
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
    for k in tl.range(0, count, num_stages=STAGES):
        h = first + k
        row = (b * heads + h) * tokens
        cum = tl.load(CUM + row + tj + om)
        step = tl.load(STEP + row + tj + om)
        last = tl.load(CUM + row + t0 + (L - 1))
        grad = tl.load(DSTATES + ((b * chunks + c) * heads + h) * (P * N) + op[:, None] * N + on[None, :])
        dy = load_rows(DY + (b * syb + tj * syl + h * syh) + om[:, None] * syl + op[None, :], om, tj, length, RAGGED)
        if ROW + 1 < ROWS:
            border = tl.load(CUM + row + (tn - 1))
            cum_n = tl.load(CUM + row + tn + om)
            dy_n = load_rows(
                DY + (b * syb + tn * syl + h * syh) + om[:, None] * syl + op[None, :], om, tn, length, RAGGED
            )
        if D_RANK == 1:
            skip = tl.load(D + h).to(tl.float32)
        if D_RANK == 2:
            skip = tl.load(D + h * P + op).to(tl.float32)[None, :]
        if ROW + 1 < ROWS:
            # The decay from a token to the border between the blocks is common to all that is behind it.
            to_border = decay_between(border, cum)
            end = tl.zeros([BM], tl.float32) + decay_between(last, border)
        else:
            end = decay_between(last, cum)
        if PACKED:
            end = tl.where(lasts, end, 0.0)
        du = tl.dot(B_j, tl.trans(grad), input_precision=PRECISION) * end[:, None]
        if ROW + 1 < ROWS:
            mixing = score_n * decay_between(cum_n, border)[None, :]
            du = tl.dot(mixing.to(dy.dtype), dy_n, du, input_precision=PRECISION)
            du *= to_border[:, None]
        mixing = score * decay_between(cum[None, :], cum[:, None])
        du = tl.dot(mixing.to(dy.dtype), dy, du, input_precision=PRECISION)
        dx = du * step[:, None]
        if D_RANK > 0:
            dx += dy.to(tl.float32) * skip
        pointers = DX + (b * sub + tj * sul + h * suh) + om[:, None] * sul + op[None, :]
        if RAGGED:
            tl.store(pointers, dx.to(DX.dtype.element_ty), mask=(tj + om < length)[:, None])
        else:
            tl.store(pointers, dx.to(DX.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def input_gradient(
    B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX,
    length, heads, ratio, chunks, per_program,
    sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of x for BM tokens and `per_program` heads of one group."""
    ROWS: tl.constexpr = L // BM
    tl.static_assert(ROWS <= 2)
    row, _, g, c, b, first, count = placed(heads, ratio, chunks, per_program, ROWS)
    # One loop for each row of blocks: a branch inside the loop would keep its loads from being pipelined.
    if row == 0:
        _input_block(
            B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX, b, c, g, first, count, length, heads, chunks,
            sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
            0, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, STAGES,
        )  # fmt: skip
    else:
        if ROWS > 1:
            _input_block(
                B, C, STEP, CUM, RUNS, DSTATES, DY, D, DX, b, c, g, first, count, length, heads, chunks,
                sbb, sbl, sbg, scb, scl, scg, syb, syl, syh, sub, sul, suh,
                1, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, STAGES,
            )  # fmt: skip


@triton.jit
def _projection_role(
    V, K, STEP, CUM, RUNS, S, DK, SUMS,
    b, c, g, split, first, count, r, batch, length, heads, ratio, chunks,
    svb, svl, svh, skb, skl, skg,
    IS_B: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The part of dB (V = x, K = B, S = gradient of the state after the chunk) or dC (V = dy, K = C, S = state
    before the chunk) that comes through states, summed over the split's heads, for block r of a chunk; plane 3 or 2.
    """
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    op = tl.arange(0, P)
    tokens = chunks * L
    sums = SUMS + (3 if IS_B else 2) * (batch * heads).to(tl.int64) * tokens
    t0 = c * L
    tb = t0 + r * BM
    K_r = load_rows(K + (b * skb + g * skg + tb * skl) + om[:, None] * skl + on[None, :], om, tb, length, RAGGED)
    K_r = K_r.to(tl.float32)
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
        decay = decay_between(last, cum) if IS_B else tl.exp2(cum)
        if PACKED:
            decay = tl.where(counts, decay, 0.0)
        # One product of what was loaded, as it was loaded, gives both results: weights enter afterwards in float32.
        # Weighting an operand first would send it through registers and round it once more, and the sums over n
        # would need a second product, with K.
        seen = tl.dot(v, s, input_precision=PRECISION)
        tl.store(sums + row + tb + om, tl.sum(seen * K_r, 1) * decay)
        weight = decay * step if IS_B else decay
        total += seen * weight[:, None]
    where = ((split * batch + b) * tokens + tb) * (heads // ratio) + g
    tl.store(DK + where * N + om[:, None] * (heads // ratio * N) + on[None, :], total)


@triton.jit
def _across_role(
    STATES, DSTATES, DACROSS, b, c, first, count, heads, chunks,
    P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Inner products of the state before a chunk and the gradient of the state after it."""
    # Two whole states of the largest size would not fit into shared memory.
    PIECES: tl.constexpr = (P * N + 64 * 128 - 1) // (64 * 128)
    SLICE: tl.constexpr = N // PIECES
    op = tl.arange(0, P)
    on = tl.arange(0, SLICE)
    for k in tl.range(0, count, num_stages=STAGES):
        where = (b * chunks + c) * heads + first + k
        tile = where * (P * N) + op[:, None] * N + on[None, :]
        products = tl.zeros([P, P], tl.float32)
        for piece in tl.static_range(PIECES):
            state = tl.load(STATES + tile + piece * SLICE)
            grad = tl.load(DSTATES + tile + piece * SLICE)
            # The trace of a matrix product: cheaper than unpacking both operands.
            products = tl.dot(state, tl.trans(grad), products, input_precision=PRECISION)
        products = tl.where(op[:, None] == op[None, :], products, 0.0)
        tl.store(DACROSS + where, tl.sum(tl.sum(products, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def roles(
    X, B, C, STEP, CUM, RUNS, STATES, DSTATES, DY,
    DB, DC, DSCORE, SUMS, DACROSS, DSKIP,
    batch, length, heads, ratio, chunks, per_program,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    SCORES_STAGES: tl.constexpr, PROJECTION_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one role, one block of tokens, `per_program` heads of one group.

    DB, DC `(split, b, t, group, n)` and DSCORE `(split, b, chunk, group, j, i)` are partial sums; DACROSS
    `(b, chunk, head)`: inner product of the state before a chunk and the gradient of the state after it; DSKIP
    `(b, chunk, L / BM, head, ...)`.
    """
    ROWS: tl.constexpr = L // BM
    tl.static_assert(ROWS <= 2)
    # The scores in the blocks and, of two, between them; dB and dC of every block; the inner products.
    SCORES: tl.constexpr = 2 * ROWS - 1
    role, split, g, c, b, first, count = placed(heads, ratio, chunks, per_program, SCORES + 2 * ROWS + 1)
    if role < ROWS:
        _scores_role(
            X, B, C, STEP, CUM, RUNS, DY, DSCORE, SUMS, DSKIP,
            b, c, g, split, first, count, role, batch, length, heads, ratio, chunks,
            sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh,
            DIAGONAL, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, SCORES_STAGES,
        )  # fmt: skip
    elif role < SCORES:
        if ROWS > 1:
            _scores_role(
                X, B, C, STEP, CUM, RUNS, DY, DSCORE, SUMS, DSKIP,
                b, c, g, split, first, count, 0, batch, length, heads, ratio, chunks,
                sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, syb, syl, syh,
                LATER, P, N, L, BM, D_RANK, PACKED, RAGGED, PRECISION, SCORES_STAGES,
            )  # fmt: skip
    elif role < SCORES + ROWS:
        _projection_role(
            X, B, STEP, CUM, RUNS, DSTATES, DB, SUMS,
            b, c, g, split, first, count, role - SCORES, batch, length, heads, ratio, chunks,
            sxb, sxl, sxh, sbb, sbl, sbg,
            True, P, N, L, BM, PACKED, RAGGED, PRECISION, PROJECTION_STAGES,
        )  # fmt: skip
    elif role < SCORES + 2 * ROWS:
        _projection_role(
            DY, C, STEP, CUM, RUNS, STATES, DC, SUMS,
            b, c, g, split, first, count, role - SCORES - ROWS, batch, length, heads, ratio, chunks,
            syb, syl, syh, scb, scl, scg,
            False, P, N, L, BM, PACKED, RAGGED, PRECISION, PROJECTION_STAGES,
        )  # fmt: skip
    else:
        _across_role(STATES, DSTATES, DACROSS, b, c, first, count, heads, chunks, P, N, PRECISION, PROJECTION_STAGES)
