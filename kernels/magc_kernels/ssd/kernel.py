"""Triton kernels of the Mamba-2 scan, forward. What they compute is defined in `reference`.

The sequence is cut into chunks of `L` tokens (arXiv 2405.21060, section 6). Three launches:

1. `chunk_steps`: step sizes and the running sum of `step * A * log2(e)` inside each chunk;
2. `sweep_forward`: the state before every chunk. A program owns one head and some rows of its state and walks
   over the chunks in order, the state in float32 registers: what one chunk hands to the next is never rounded,
   so a segment boundary between two chunks changes no bit of the result;
3. `scan`: the outputs of a block of tokens. `C B^T` stays in registers for all heads of a group's split.

Conventions of all kernels here and in `_kernel_backward`:

- x, y `(b, t, head, p)` and B, C `(b, t, group, n)` with any strides but 1 in the last axis; step and running
  sum `(b, head, t)` float32, states `(b, chunk, head, p, n)`, runs `(b, 1 + t)` with the run of the token
  before the segment (0) first; the `t` of these three is padded to whole chunks.
- Offsets of a program are int64 scalars; offsets inside a tile are int32.
- No atomics; every sum has a fixed order.
- Running sums are in units of log2, so that a decay is one `exp2`. Rounding can make a running sum of
  non-positive terms rise, hence the clamp of every exponent at 0.
- Packed sequences mask, they never add large negative rates: those would ruin the running sum.
- RAGGED: the last chunk is not full. Its missing tokens read as 0 and have step 0.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# The bodies are Triton, not Python: `tl.range` is a loop, and a constexpr condition decides what exists.

import triton
import triton.language as tl

SIZES = ("batch", "length", "heads", "ratio", "groups", "chunks", "per_program", "splits")
"""Arguments whose values must not choose between compiled variants, which could differ in rounding."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p_unit(t):
    """log(1 + t) for 0 <= t <= 1 to float32 precision, which the hardware's log2 does not reach near 1."""
    s = t / (2.0 + t)  # log(1 + t) = 2 artanh(s), s <= 1/3
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0 + q * (1.0 / 17.0))
    series = 1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q * series))
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * series))
    return 2.0 * s * series


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """Without the overflow of exp(-x) far below zero."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, t) / (1.0 + t)


@triton.jit
def decay_between(later, earlier):
    """exp2 of a difference of running sums, at most 1."""
    return tl.exp2(tl.minimum(later - earlier, 0.0))


@triton.jit
def load_rows(pointers, offsets, first, length, RAGGED: tl.constexpr):
    """A tile of tokens `first + offsets`; those from `length` on read as 0."""
    if RAGGED:
        return tl.load(pointers, mask=(first + offsets < length)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def split_high(a, dtype: tl.constexpr):
    """Of a float32 tile, still in float32, as much as the narrower `dtype` holds."""
    if dtype == tl.bfloat16:
        # Cut, not rounded: two instructions, and the rest takes up the difference.
        return (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        return a.to(dtype).to(tl.float32)


@triton.jit
def dot_wide(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` for a float32 `b`: in half precision as the sum of two operands, which together keep about
    twice the bits of one. A state is a sum over the whole past; rounding its terms once would be its largest error.
    """
    if a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        high = split_high(b, a.dtype)
        acc = tl.dot(a, high.to(a.dtype), acc)
        acc = tl.dot(a, (b - high).to(a.dtype), acc)
    return acc


@triton.jit(do_not_specialize=SIZES)
def chunk_steps(
    DT, A, BIAS, STEP, CUM,
    length, heads, chunks, sdb, sdl, sdh, low, high,
    L: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Step sizes and running sums of one chunk and BH heads."""
    blocks = tl.cdiv(heads, BH)
    pid = tl.program_id(0)
    h = (pid % blocks) * BH + tl.arange(0, BH)
    bc = (pid // blocks).to(tl.int64)
    b = bc // chunks
    t0 = bc % chunks * L
    ol = tl.arange(0, L)
    known = h < heads
    inside = known[:, None] & (t0 + ol < length)[None, :]
    raw = tl.load(DT + (b * sdb + t0 * sdl) + h[:, None] * sdh + ol[None, :] * sdl, mask=inside, other=0.0)
    step = raw.to(tl.float32)
    if HAS_BIAS:
        step += tl.load(BIAS + h, mask=known, other=0.0).to(tl.float32)[:, None]
    if SOFTPLUS:
        step = softplus(step)
    if CLAMP:
        step = tl.minimum(tl.maximum(step, low), high)
    step = tl.where(inside, step, 0.0)
    rate = tl.load(A + h, mask=known, other=0.0).to(tl.float32) * LOG2E
    out = (b * heads * chunks * L + t0) + h.to(tl.int64)[:, None] * (chunks * L) + ol[None, :]
    tl.store(STEP + out, step, mask=known[:, None])
    tl.store(CUM + out, tl.cumsum(step * rate[:, None], 1), mask=known[:, None])


@triton.jit(do_not_specialize=SIZES)
def sweep_forward(
    X, B, STEP, CUM, RUNS, INITIAL, STATES, FINAL,
    length, heads, ratio, chunks, sxb, sxl, sxh, sbb, sbl, sbg,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, L: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and after the last, for one head and BP of its rows.

    The state is held transposed, `(n, p)`: its many rows then spread over many warps, and the operand that is
    weighted, x, is the smaller one. What bounds the speed is how long one chunk takes, for there are few programs.
    """
    SLICES: tl.constexpr = P // BP
    pid = tl.program_id(0)
    op = pid % SLICES * BP + tl.arange(0, BP)
    bh = (pid // SLICES).to(tl.int64)
    b = bh // heads
    h = bh % heads
    ol = tl.arange(0, L)
    on = tl.arange(0, N)
    tile = on[:, None] + op[None, :] * N
    state = tl.load(INITIAL + bh * (P * N) + tile).to(tl.float32) if HAS_INITIAL else tl.zeros([N, BP], tl.float32)
    row = bh * chunks * L
    x_base = X + (b * sxb + h * sxh)
    b_base = B + (b * sbb + h // ratio * sbg)
    if PACKED:
        runs = RUNS + b * (chunks * L + 1)
    # Loaded one chunk ahead: nothing else hides the latency of so small a load.
    last = tl.load(CUM + row + (L - 1))
    cum = tl.load(CUM + row + ol)
    step = tl.load(STEP + row + ol)
    for c in tl.range(0, chunks, num_stages=STAGES):
        t0 = bh * 0 + c * L
        weight = decay_between(last, cum) * step
        across = tl.exp2(last)
        if PACKED:
            end = tl.load(runs + t0 + L)
            weight = tl.where(tl.load(runs + (t0 + 1) + ol) == end, weight, 0.0)
            across = tl.where(end == tl.load(runs + t0), across, 0.0)
        ahead = row + tl.minimum(t0 + L, (chunks - 1) * L)
        last = tl.load(CUM + ahead + (L - 1))
        cum = tl.load(CUM + ahead + ol)
        step = tl.load(STEP + ahead + ol)
        x = load_rows(x_base + t0 * sxl + ol[:, None] * sxl + op[None, :], ol, t0, length, RAGGED)
        B_t = load_rows(b_base + t0 * sbl + ol[:, None] * sbl + on[None, :], ol, t0, length, RAGGED)
        tl.store(STATES + ((b * chunks + c) * heads + h) * (P * N) + tile, state.to(STATES.dtype.element_ty))
        state = dot_wide(tl.trans(B_t), x.to(tl.float32) * weight[:, None], state * across, PRECISION)
    tl.store(FINAL + bh * (P * N) + tile, state)


@triton.jit
def _scan_block(
    X, B, C, STEP, CUM, RUNS, STATES, D, Z, Y, UNGATED,
    b, c, g, first, count, length, heads, chunks,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, szb, szl, szh,
    ROW: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, GATED: tl.constexpr, KEEP_UNGATED: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    om = tl.arange(0, BM)
    on = tl.arange(0, N)
    op = tl.arange(0, P)
    t0 = c * L
    ti = t0 + ROW * BM
    b_base = B + (b * sbb + g * sbg) + om[:, None] * sbl + on[None, :]
    C_i = load_rows(C + (b * scb + g * scg + ti * scl) + om[:, None] * scl + on[None, :], om, ti, length, RAGGED)
    B_i = load_rows(b_base + ti * sbl, om, ti, length, RAGGED)
    score = tl.dot(C_i, tl.trans(B_i), input_precision=PRECISION)
    score = tl.where(om[:, None] >= om[None, :], score, 0.0)
    if ROW > 0:
        B_0 = load_rows(b_base + t0 * sbl, om, t0, length, RAGGED)
        score_0 = tl.dot(C_i, tl.trans(B_0), input_precision=PRECISION)
    if PACKED:
        runs = RUNS + b * (chunks * L + 1)
        run_i = tl.load(runs + (ti + 1) + om)
        score = tl.where(run_i[:, None] == run_i[None, :], score, 0.0)
        if ROW > 0:
            score_0 = tl.where(run_i[:, None] == tl.load(runs + (t0 + 1) + om)[None, :], score_0, 0.0)
        continues = run_i == tl.load(runs + t0)
    for k in tl.range(0, count, num_stages=STAGES):
        # All loads come first: one wait for memory in an iteration, not one after each product.
        h = first + k
        row = (b * heads + h) * chunks * L
        state = tl.load(STATES + ((b * chunks + c) * heads + h) * (P * N) + op[:, None] * N + on[None, :])
        cum = tl.load(CUM + row + ti + om)
        step = tl.load(STEP + row + ti + om)
        x = load_rows(X + (b * sxb + ti * sxl + h * sxh) + om[:, None] * sxl + op[None, :], om, ti, length, RAGGED)
        if ROW > 0:
            border = tl.load(CUM + row + (ti - 1))
            cum_0 = tl.load(CUM + row + t0 + om)
            step_0 = tl.load(STEP + row + t0 + om)
            x_0 = load_rows(
                X + (b * sxb + t0 * sxl + h * sxh) + om[:, None] * sxl + op[None, :], om, t0, length, RAGGED
            )
        if D_RANK == 1:
            skip = tl.load(D + h).to(tl.float32)
        if D_RANK == 2:
            skip = tl.load(D + h * P + op).to(tl.float32)[None, :]
        if GATED:
            z = load_rows(
                Z + (b * szb + ti * szl + h * szh) + om[:, None] * szl + op[None, :], om, ti, length, RAGGED
            ).to(tl.float32)
        # Decays past the border between the blocks are products of two factors, each at most 1: the one from the
        # border to a token of this block is common to the state and the block before.
        start = tl.zeros([BM], tl.float32) + tl.exp2(border) if ROW > 0 else tl.exp2(cum)
        if PACKED:
            start = tl.where(continues, start, 0.0)
        y = tl.dot(C_i, tl.trans(state), input_precision=PRECISION) * start[:, None]
        if ROW > 0:
            mixing = score_0 * (decay_between(border, cum_0) * step_0)[None, :]
            y = tl.dot(mixing.to(x.dtype), x_0, y, input_precision=PRECISION)
            y *= decay_between(cum, border)[:, None]
        mixing = score * decay_between(cum[:, None], cum[None, :]) * step[None, :]
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision=PRECISION)
        if D_RANK > 0:
            y += x.to(tl.float32) * skip
        out = ((b * length + ti) * heads + h) * P + om[:, None] * (heads * P) + op[None, :]
        inside = (ti + om < length)[:, None]
        if GATED:
            if KEEP_UNGATED:
                tl.store(UNGATED + out, y.to(Y.dtype.element_ty), mask=inside)
            y *= z * sigmoid(z)
        if RAGGED:
            tl.store(Y + out, y.to(Y.dtype.element_ty), mask=inside)
        else:
            tl.store(Y + out, y.to(Y.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def scan(
    X, B, C, STEP, CUM, RUNS, STATES, D, Z, Y, UNGATED,
    length, heads, ratio, chunks, per_program,
    sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, szb, szl, szh,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BM: tl.constexpr,
    D_RANK: tl.constexpr, GATED: tl.constexpr, KEEP_UNGATED: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of BM tokens for `per_program` heads of one group; Y and UNGATED are contiguous."""
    ROWS: tl.constexpr = L // BM
    tl.static_assert(ROWS <= 2)
    splits = tl.cdiv(ratio, per_program)
    groups = heads // ratio
    pid = tl.program_id(0)
    rest = (pid // ROWS).to(tl.int64)
    split = rest % splits
    g = rest // splits % groups
    c = rest // (splits * groups) % chunks
    b = rest // (splits * groups) // chunks
    first = g * ratio + split * per_program
    count = tl.minimum(ratio - split * per_program, per_program).to(tl.int32)
    if ROWS == 1:
        _scan_block(
            X, B, C, STEP, CUM, RUNS, STATES, D, Z, Y, UNGATED,
            b, c, g, first, count, length, heads, chunks,
            sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, szb, szl, szh,
            0, P, N, L, BM, D_RANK, GATED, KEEP_UNGATED, PACKED, RAGGED, PRECISION, STAGES,
        )  # fmt: skip
    else:
        # One loop for each row of blocks: a branch inside the loop would keep its loads from being pipelined.
        if pid % ROWS == 0:
            _scan_block(
                X, B, C, STEP, CUM, RUNS, STATES, D, Z, Y, UNGATED,
                b, c, g, first, count, length, heads, chunks,
                sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, szb, szl, szh,
                0, P, N, L, BM, D_RANK, GATED, KEEP_UNGATED, PACKED, RAGGED, PRECISION, STAGES,
            )  # fmt: skip
        else:
            _scan_block(
                X, B, C, STEP, CUM, RUNS, STATES, D, Z, Y, UNGATED,
                b, c, g, first, count, length, heads, chunks,
                sxb, sxl, sxh, sbb, sbl, sbg, scb, scl, scg, szb, szl, szh,
                1, P, N, L, BM, D_RANK, GATED, KEEP_UNGATED, PACKED, RAGGED, PRECISION, STAGES,
            )  # fmt: skip
