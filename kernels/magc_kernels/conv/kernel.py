"""Triton kernels of the causal depthwise convolution. What they compute is defined in `reference`.

A program owns BC channels of BT tokens and walks over them in order with the last W - 1 rows in registers, so
that each row is read once (but for a halo of W - 1 rows, twice that in backward) and each activation is computed
once. It takes four rows at a time, whose loads are in flight together, and by then the three rows before the next
four are among them. All arithmetic is float32.

Positions count from the segment's first token; the rows of the state are positions -(W - 1) .. -1. RUNS
`(b, W - 1 + length)` holds the run of each position, that of the state's rows being 0. Offsets are int64 scalars
plus int32 offsets within a row. No atomics.

Triton takes a variable for constant in a loop if the loop's body gives it another variable's initial value and the
two began as one object. Each variable carried from row to row therefore begins as an object of its own.
"""

import triton
import triton.language as tl

SIZES = ("batch", "length", "blocks")
"""Arguments whose values must not choose between compiled variants, which could differ in rounding."""


@triton.jit
def sigmoid(x):
    """Without the overflow of exp(-x) far below zero."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, t) / (1.0 + t)


@triton.jit
def load_position(X, STATE, t, length, sxl, oc, known, C, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The input at position `t`: a token, a row of the state, or 0 outside both."""
    row = tl.load(X + t * sxl + oc, mask=known & (t >= 0) & (t < length), other=0.0).to(tl.float32)
    if HAS_STATE:
        row += tl.load(STATE + (t + (W - 1)) * C + oc, mask=known & (t < 0) & (t >= 1 - W), other=0.0).to(tl.float32)
    return row


@triton.jit
def load_run(RUNS, t, length, W: tl.constexpr, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(RUNS + t, mask=(t >= 1 - W) & (t < length), other=0)
    else:
        return 0


@triton.jit
def load_tap(WEIGHT, BACK: tl.constexpr, oc, known, W: tl.constexpr):
    """The weight that meets the token BACK tokens before the current one; unused ones are 0."""
    if BACK < W:
        return tl.load(WEIGHT + oc * W + (W - 1 - BACK), mask=known, other=0.0).to(tl.float32)
    else:
        return oc.to(tl.float32) * 0.0


@triton.jit
def if_same(value, run, other, PACKED: tl.constexpr):
    """`value`, or 0 if the runs differ."""
    if PACKED:
        return tl.where(run == other, value, 0.0)
    else:
        return value


@triton.jit
def convolve(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias, W: tl.constexpr, PACKED: tl.constexpr):
    y = bias + w0 * x0 + if_same(w1 * x1, r1, r0, PACKED)
    if W > 2:
        y += if_same(w2 * x2, r2, r0, PACKED)
    if W > 3:
        y += if_same(w3 * x3, r3, r0, PACKED)
    return y


@triton.jit
def _forward_row(
    Y, NEW_STATE, b, t, t0, length, channels, oc, known, final,
    x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias,
    W: tl.constexpr, BT: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    y = convolve(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias, W, PACKED)
    if SILU:
        y *= sigmoid(y)
    inside = (t < length) & (t < t0 + BT)
    tl.store(Y + (b * length + t) * channels + oc, y.to(Y.dtype.element_ty), mask=known & inside & (t >= t0))
    # A position belongs to the block it lies in; the state's rows to the first.
    kept = inside & (t >= length - (W - 1)) & ((t >= t0) | (t0 == 0))
    tl.store(
        NEW_STATE + (b * (W - 1) + t - (length - (W - 1))) * channels + oc,
        if_same(x0, r0, final, PACKED).to(NEW_STATE.dtype.element_ty), mask=known & kept,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    X, WEIGHT, BIAS, STATE, RUNS, Y, NEW_STATE,
    length, blocks, channels, sxb, sxl,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, BC)
    oc = pid % parts * BC + tl.arange(0, BC)
    known = oc < channels
    rest = (pid // parts).to(tl.int64)
    t0 = rest % blocks * BT
    b = rest // blocks
    x_base = X + b * sxb
    state_base = STATE + b * ((W - 1) * channels) if HAS_STATE else STATE
    runs = RUNS + b * (length + (W - 1)) + (W - 1) if PACKED else RUNS
    final = load_run(runs, length - 1, length, W, PACKED)
    w0 = load_tap(WEIGHT, 0, oc, known, W)
    w1 = load_tap(WEIGHT, 1, oc, known, W)
    w2 = load_tap(WEIGHT, 2, oc, known, W)
    w3 = load_tap(WEIGHT, 3, oc, known, W)
    bias = tl.load(BIAS + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BC], tl.float32)
    x1 = tl.zeros([BC], tl.float32)
    x2 = tl.zeros([BC], tl.float32)
    x3 = tl.zeros([BC], tl.float32)
    start = t0 - (W - 1)
    r1 = load_run(runs, start - 1, length, W, PACKED)
    r2 = load_run(runs, start - 2, length, W, PACKED)
    r3 = load_run(runs, start - 3, length, W, PACKED)
    for k in range((BT + W - 1 + 3) // 4):
        t = start + 4 * k
        a = load_position(x_base, state_base, t, length, sxl, oc, known, channels, W, HAS_STATE)
        e = load_position(x_base, state_base, t + 1, length, sxl, oc, known, channels, W, HAS_STATE)
        i = load_position(x_base, state_base, t + 2, length, sxl, oc, known, channels, W, HAS_STATE)
        o = load_position(x_base, state_base, t + 3, length, sxl, oc, known, channels, W, HAS_STATE)
        ra = load_run(runs, t, length, W, PACKED)
        re = load_run(runs, t + 1, length, W, PACKED)
        ri = load_run(runs, t + 2, length, W, PACKED)
        ro = load_run(runs, t + 3, length, W, PACKED)
        _forward_row(
            Y, NEW_STATE, b, t, t0, length, channels, oc, known, final,
            a, x1, x2, x3, ra, r1, r2, r3, w0, w1, w2, w3, bias, W, BT, SILU, PACKED,
        )  # fmt: skip
        _forward_row(
            Y, NEW_STATE, b, t + 1, t0, length, channels, oc, known, final,
            e, a, x1, x2, re, ra, r1, r2, w0, w1, w2, w3, bias, W, BT, SILU, PACKED,
        )  # fmt: skip
        _forward_row(
            Y, NEW_STATE, b, t + 2, t0, length, channels, oc, known, final,
            i, e, a, x1, ri, re, ra, r1, w0, w1, w2, w3, bias, W, BT, SILU, PACKED,
        )  # fmt: skip
        _forward_row(
            Y, NEW_STATE, b, t + 3, t0, length, channels, oc, known, final,
            o, i, e, a, ro, ri, re, ra, w0, w1, w2, w3, bias, W, BT, SILU, PACKED,
        )  # fmt: skip
        x1, x2, x3 = o, i, e
        if PACKED:
            r1, r2, r3 = ro, ri, re


@triton.jit
def _backward_row(
    DNEW_STATE, DX, DSTATE, b, t, t0, length, channels, oc, known, final, sub, sul,
    x0, x1, x2, x3, r0, r1, r2, r3, g1, g2, g3, dy, w0, w1, w2, w3, bias,
    dw0, dw1, dw2, dw3, dbias,
    W: tl.constexpr, BT: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_DNEW_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # dy reads as 0 outside the segment, so that g is 0 there.
    g0 = dy
    if SILU:
        y = convolve(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias, W, PACKED)
        gate = sigmoid(y)
        g0 = dy * gate * (1.0 + y * (1.0 - gate))
    mine = (t >= t0) & (t < t0 + BT)
    own = tl.where(mine, g0, 0.0)
    dbias += own
    dw0 += own * x0
    dw1 += own * if_same(x1, r1, r0, PACKED)
    if W == 2:
        dx = w0 * g1 + if_same(w1 * g0, r1, r0, PACKED)
        run = r1
    if W == 3:
        dw2 += own * if_same(x2, r2, r0, PACKED)
        dx = w0 * g2 + if_same(w1 * g1, r2, r1, PACKED) + if_same(w2 * g0, r2, r0, PACKED)
        run = r2
    if W == 4:
        dw2 += own * if_same(x2, r2, r0, PACKED)
        dw3 += own * if_same(x3, r3, r0, PACKED)
        dx = w0 * g3 + if_same(w1 * g2, r3, r2, PACKED)
        dx += if_same(w2 * g1, r3, r1, PACKED) + if_same(w3 * g0, r3, r0, PACKED)
        run = r3
    mine = mine & (t < length + (W - 1))
    if HAS_DNEW_STATE:
        dnew = tl.load(
            DNEW_STATE + (b * (W - 1) + t - length) * channels + oc, mask=known & mine & (t >= length), other=0.0
        ).to(tl.float32)
        dx += if_same(dnew, run, final, PACKED)
    position = t - (W - 1)
    tl.store(DX + (b * sub + position * sul) + oc, dx.to(DX.dtype.element_ty), mask=known & mine & (position >= 0))
    if HAS_STATE:
        tl.store(
            DSTATE + (b * (W - 1) + t) * channels + oc, dx.to(DSTATE.dtype.element_ty),
            mask=known & mine & (position < 0),
        )  # fmt: skip
    return g0, dw0, dw1, dw2, dw3, dbias


@triton.jit(do_not_specialize=SIZES)
def conv_backward(
    X, WEIGHT, BIAS, STATE, RUNS, DY, DNEW_STATE, DX, DSTATE, DWEIGHT, DBIAS,
    length, blocks, channels, sxb, sxl, syb, syl, sub, sul,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_DNEW_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Blocks cut the window, the state's rows followed by the tokens. At token t, whose gradient g before the
    activation is new, the gradient of position t - (W - 1), which is entry t of the window, is complete.

    DWEIGHT `(b, block, tap, channel)` and DBIAS `(b, block, channel)` are partial sums; tap j meets the token j
    back.
    """
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, BC)
    oc = pid % parts * BC + tl.arange(0, BC)
    known = oc < channels
    rest = (pid // parts).to(tl.int64)
    t0 = rest % blocks * BT
    b = rest // blocks
    x_base = X + b * sxb
    y_base = DY + b * syb
    state_base = STATE + b * ((W - 1) * channels) if HAS_STATE else STATE
    runs = RUNS + b * (length + (W - 1)) + (W - 1) if PACKED else RUNS
    final = load_run(runs, length - 1, length, W, PACKED)
    w0 = load_tap(WEIGHT, 0, oc, known, W)
    w1 = load_tap(WEIGHT, 1, oc, known, W)
    w2 = load_tap(WEIGHT, 2, oc, known, W)
    w3 = load_tap(WEIGHT, 3, oc, known, W)
    bias = tl.load(BIAS + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BC], tl.float32)
    x1 = tl.zeros([BC], tl.float32)
    x2 = tl.zeros([BC], tl.float32)
    x3 = tl.zeros([BC], tl.float32)
    g1 = tl.zeros([BC], tl.float32)
    g2 = tl.zeros([BC], tl.float32)
    g3 = tl.zeros([BC], tl.float32)
    dw0 = tl.zeros([BC], tl.float32)
    dw1 = tl.zeros([BC], tl.float32)
    dw2 = tl.zeros([BC], tl.float32)
    dw3 = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)
    start = t0 - 2 * (W - 1)
    r1 = load_run(runs, start - 1, length, W, PACKED)
    r2 = load_run(runs, start - 2, length, W, PACKED)
    r3 = load_run(runs, start - 3, length, W, PACKED)
    for k in range((BT + 2 * (W - 1) + 3) // 4):
        t = start + 4 * k
        a = load_position(x_base, state_base, t, length, sxl, oc, known, channels, W, HAS_STATE)
        e = load_position(x_base, state_base, t + 1, length, sxl, oc, known, channels, W, HAS_STATE)
        i = load_position(x_base, state_base, t + 2, length, sxl, oc, known, channels, W, HAS_STATE)
        o = load_position(x_base, state_base, t + 3, length, sxl, oc, known, channels, W, HAS_STATE)
        da = load_position(y_base, y_base, t, length, syl, oc, known, channels, W, False)
        de = load_position(y_base, y_base, t + 1, length, syl, oc, known, channels, W, False)
        di = load_position(y_base, y_base, t + 2, length, syl, oc, known, channels, W, False)
        do = load_position(y_base, y_base, t + 3, length, syl, oc, known, channels, W, False)
        ra = load_run(runs, t, length, W, PACKED)
        re = load_run(runs, t + 1, length, W, PACKED)
        ri = load_run(runs, t + 2, length, W, PACKED)
        ro = load_run(runs, t + 3, length, W, PACKED)
        ga, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DNEW_STATE, DX, DSTATE, b, t, t0, length, channels, oc, known, final, sub, sul,
            a, x1, x2, x3, ra, r1, r2, r3, g1, g2, g3, da, w0, w1, w2, w3, bias,
            dw0, dw1, dw2, dw3, dbias, W, BT, SILU, HAS_STATE, HAS_DNEW_STATE, PACKED,
        )  # fmt: skip
        ge, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DNEW_STATE, DX, DSTATE, b, t + 1, t0, length, channels, oc, known, final, sub, sul,
            e, a, x1, x2, re, ra, r1, r2, ga, g1, g2, de, w0, w1, w2, w3, bias,
            dw0, dw1, dw2, dw3, dbias, W, BT, SILU, HAS_STATE, HAS_DNEW_STATE, PACKED,
        )  # fmt: skip
        gi, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DNEW_STATE, DX, DSTATE, b, t + 2, t0, length, channels, oc, known, final, sub, sul,
            i, e, a, x1, ri, re, ra, r1, ge, ga, g1, di, w0, w1, w2, w3, bias,
            dw0, dw1, dw2, dw3, dbias, W, BT, SILU, HAS_STATE, HAS_DNEW_STATE, PACKED,
        )  # fmt: skip
        go, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DNEW_STATE, DX, DSTATE, b, t + 3, t0, length, channels, oc, known, final, sub, sul,
            o, i, e, a, ro, ri, re, ra, gi, ge, ga, do, w0, w1, w2, w3, bias,
            dw0, dw1, dw2, dw3, dbias, W, BT, SILU, HAS_STATE, HAS_DNEW_STATE, PACKED,
        )  # fmt: skip
        x1, x2, x3 = o, i, e
        g1, g2, g3 = go, gi, ge
        if PACKED:
            r1, r2, r3 = ro, ri, re
    where = rest * W * channels + oc
    tl.store(DWEIGHT + where, dw0, mask=known)
    tl.store(DWEIGHT + where + channels, dw1, mask=known)
    if W > 2:
        tl.store(DWEIGHT + where + 2 * channels, dw2, mask=known)
    if W > 3:
        tl.store(DWEIGHT + where + 3 * channels, dw3, mask=known)
    if HAS_BIAS:
        tl.store(DBIAS + rest * channels + oc, dbias, mask=known)
