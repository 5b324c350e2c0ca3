"""Backward Triton kernel of the causal depthwise convolution; tiles, walks and their copies as in `kernel`."""

import triton
import triton.language as tl

from magc_kernels._sigmoid import sigmoid
from magc_kernels.conv.kernel import SIZES, convolve, has_change, if_same, load_row, load_tap, next_run


@triton.jit
def _backward_row(
    DX, DSTATE, DNEW_STATE, offsets, position, length, oc, known, C, sul, r, dy,
    x0, x1, x2, x3, r0, r1, r2, r3, g1, g2, g3, w0, w1, w2, w3, bias, dw0, dw1, dw2, dw3, dbias,
    W: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DNEW_STATE: tl.constexpr,
    OWN: tl.constexpr, EDGE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # dy reads as 0 outside the segment, so that g is 0 there.
    g0 = dy
    if SILU:
        y = convolve(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias, W, PACKED)
        gate = sigmoid(y)
        g0 = dy * (gate * (1.0 + y * (1.0 - gate)))
    if OWN:
        dbias += g0
        dw0 += g0 * x0
        dw1 += g0 * if_same(x1, r1, r0, PACKED)
        if W > 2:
            dw2 += g0 * if_same(x2, r2, r0, PACKED)
        if W > 3:
            dw3 += g0 * if_same(x3, r3, r0, PACKED)
    if W == 2:
        dx = w0 * g1 + w1 * if_same(g0, r1, r0, PACKED)
        run = r1
    elif W == 3:
        dx = w0 * g2 + w1 * if_same(g1, r2, r1, PACKED) + w2 * if_same(g0, r2, r0, PACKED)
        run = r2
    else:
        dx = w0 * g3 + w1 * if_same(g2, r3, r2, PACKED) + w2 * if_same(g1, r3, r1, PACKED)
        dx += w3 * if_same(g0, r3, r0, PACKED)
        run = r3
    if EDGE:
        p = position + (r - (W - 1))
        if HAS_DNEW_STATE:
            row = p - length + (W - 1)
            dnew = tl.load(DNEW_STATE + row * C + oc, mask=known & (row >= 0) & (p < length), other=0.0)
            # Positions from the length on count to the last token's document, and r0 is of one of them.
            dx += if_same(dnew.to(tl.float32), run, r0, PACKED)
        if HAS_STATE:
            state_row = DSTATE + (p + (W - 1)) * C + oc
            tl.store(state_row, dx.to(DSTATE.dtype.element_ty), mask=known & (p < 0))
        known = known & (p < length)
    # The rows before a lane's first are another's.
    tl.store(DX + (r - (W - 1)) * sul + offsets, dx.to(DX.dtype.element_ty), mask=known & (r >= W - 1))
    return g0, dw0, dw1, dw2, dw3, dbias


@triton.jit
def _backward_walk(
    X, STATE, IDS, PREVIOUS, DY, DNEW_STATE, DX, DSTATE, position, length, channels, sxl, syl, sul, sil, oc, known,
    w0, w1, w2, w3, bias,
    W: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_DNEW_STATE: tl.constexpr, EDGE: tl.constexpr, PACKED: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
):  # fmt: skip
    x_at = position * sxl + oc
    y_at = position * syl + oc
    u_at = position * sul + oc
    x1 = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, -1, W, EDGE, HAS_STATE)
    g1 = tl.zeros_like(x1)
    g2 = tl.zeros_like(x1)
    g3 = tl.zeros_like(x1)
    dw0 = tl.zeros_like(x1)
    dw1 = tl.zeros_like(x1)
    dw2 = tl.zeros_like(x1)
    dw3 = tl.zeros_like(x1)
    dbias = tl.zeros_like(x1)
    x2 = tl.zeros_like(x1)
    x3 = tl.zeros_like(x1)
    if W > 2:
        x2 = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, -2, W, EDGE, HAS_STATE)
    if W > 3:
        x3 = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, -3, W, EDGE, HAS_STATE)
    r3 = tl.zeros_like(position).to(tl.int32)
    r2 = next_run(r3, IDS, PREVIOUS, position - 2, length, sil, PACKED, HAS_PREVIOUS)
    r1 = next_run(r2, IDS, PREVIOUS, position - 1, length, sil, PACKED, HAS_PREVIOUS)
    for k in tl.range(RUN // 4, num_stages=STAGES):
        r = 4 * k
        a = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, r, W, EDGE, HAS_STATE)
        e = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, r + 1, W, EDGE, HAS_STATE)
        i = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, r + 2, W, EDGE, HAS_STATE)
        o = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, r + 3, W, EDGE, HAS_STATE)
        da = load_row(DY, DY, y_at, position, length, syl, oc, known, channels, r, W, EDGE, False)
        de = load_row(DY, DY, y_at, position, length, syl, oc, known, channels, r + 1, W, EDGE, False)
        di = load_row(DY, DY, y_at, position, length, syl, oc, known, channels, r + 2, W, EDGE, False)
        do = load_row(DY, DY, y_at, position, length, syl, oc, known, channels, r + 3, W, EDGE, False)
        ra = next_run(r1, IDS, PREVIOUS, position + r, length, sil, PACKED, HAS_PREVIOUS)
        re = next_run(ra, IDS, PREVIOUS, position + r + 1, length, sil, PACKED, HAS_PREVIOUS)
        ri = next_run(re, IDS, PREVIOUS, position + r + 2, length, sil, PACKED, HAS_PREVIOUS)
        ro = next_run(ri, IDS, PREVIOUS, position + r + 3, length, sil, PACKED, HAS_PREVIOUS)
        ga, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DX, DSTATE, DNEW_STATE, u_at, position, length, oc, known, channels, sul, r, da,
            a, x1, x2, x3, ra, r1, r2, r3, g1, g2, g3, w0, w1, w2, w3, bias, dw0, dw1, dw2, dw3, dbias,
            W, SILU, HAS_STATE, HAS_DNEW_STATE, True, EDGE, PACKED,
        )  # fmt: skip
        ge, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DX, DSTATE, DNEW_STATE, u_at, position, length, oc, known, channels, sul, r + 1, de,
            e, a, x1, x2, re, ra, r1, r2, ga, g1, g2, w0, w1, w2, w3, bias, dw0, dw1, dw2, dw3, dbias,
            W, SILU, HAS_STATE, HAS_DNEW_STATE, True, EDGE, PACKED,
        )  # fmt: skip
        gi, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DX, DSTATE, DNEW_STATE, u_at, position, length, oc, known, channels, sul, r + 2, di,
            i, e, a, x1, ri, re, ra, r1, ge, ga, g1, w0, w1, w2, w3, bias, dw0, dw1, dw2, dw3, dbias,
            W, SILU, HAS_STATE, HAS_DNEW_STATE, True, EDGE, PACKED,
        )  # fmt: skip
        go, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DX, DSTATE, DNEW_STATE, u_at, position, length, oc, known, channels, sul, r + 3, do,
            o, i, e, a, ro, ri, re, ra, gi, ge, ga, w0, w1, w2, w3, bias, dw0, dw1, dw2, dw3, dbias,
            W, SILU, HAS_STATE, HAS_DNEW_STATE, True, EDGE, PACKED,
        )  # fmt: skip
        x1, x2, x3 = o, i, e
        g1, g2, g3 = go, gi, ge
        if PACKED:
            r1, r2, r3 = ro, ri, re
    # The gradients of a lane's last rows need the activations of the W - 1 tokens after them.
    for j in tl.static_range(W - 1):
        x0 = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, RUN + j, W, EDGE, HAS_STATE)
        dy = load_row(DY, DY, y_at, position, length, syl, oc, known, channels, RUN + j, W, EDGE, False)
        r0 = next_run(r1, IDS, PREVIOUS, position + (RUN + j), length, sil, PACKED, HAS_PREVIOUS)
        g0, dw0, dw1, dw2, dw3, dbias = _backward_row(
            DX, DSTATE, DNEW_STATE, u_at, position, length, oc, known, channels, sul, RUN + j, dy,
            x0, x1, x2, x3, r0, r1, r2, r3, g1, g2, g3, w0, w1, w2, w3, bias, dw0, dw1, dw2, dw3, dbias,
            W, SILU, HAS_STATE, HAS_DNEW_STATE, False, EDGE, PACKED,
        )  # fmt: skip
        x1, x2, x3 = x0, x1, x2
        g1, g2, g3 = g0, g1, g2
        r1, r2, r3 = r0, r1, r2
    return dw0, dw1, dw2, dw3, dbias


@triton.jit(do_not_specialize=SIZES)
def conv_backward(
    X, WEIGHT, BIAS, STATE, IDS, PREVIOUS, DY, DNEW_STATE, DX, DSTATE, PARTS,
    length, blocks, channels, sxb, sxl, syb, syl, sub, sul, sib, sil,
    W: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DNEW_STATE: tl.constexpr,
    PACKED: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
):  # fmt: skip
    """At token t, whose gradient g before the activation is new, the gradient of position t - (W - 1) is complete.

    PARTS `(b, block, column, channel)` are partial sums of the gradients of the weight's W columns and the bias.
    """
    BT: tl.constexpr = LANES * RUN
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, BC)
    oc = (pid % parts * BC + tl.arange(0, BC))[None]
    known = oc < channels
    rest = (pid // parts).to(tl.int64)
    t0 = rest % blocks * BT
    b = rest // blocks
    x_base = X + b * sxb
    y_base = DY + b * syb
    u_base = DX + b * sub
    state_base = STATE + b * ((W - 1) * channels) if HAS_STATE else STATE
    dstate_base = DSTATE + b * ((W - 1) * channels) if HAS_STATE else DSTATE
    dnew_base = DNEW_STATE + b * ((W - 1) * channels) if HAS_DNEW_STATE else DNEW_STATE
    ids = IDS + b * sib if PACKED else IDS
    previous = PREVIOUS + b if HAS_PREVIOUS else PREVIOUS
    w0 = load_tap(WEIGHT, 0, oc, known, W)
    w1 = load_tap(WEIGHT, 1, oc, known, W)
    w2 = load_tap(WEIGHT, 2, oc, known, W)
    w3 = load_tap(WEIGHT, 3, oc, known, W)
    bias = tl.load(BIAS + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([1, BC], tl.float32)
    position = t0 + (tl.arange(0, LANES) * RUN)[:, None]
    mixed = has_change(ids, t0 - (W - 2), t0 + (BT + W - 2), length, sil, 2 * BT) if PACKED else False
    if (t0 == 0) | (t0 + (BT + W - 1) > length):
        dw0, dw1, dw2, dw3, dbias = _backward_walk(
            x_base, state_base, ids, previous, y_base, dnew_base, u_base, dstate_base, position,
            length, channels, sxl, syl, sul, sil, oc, known, w0, w1, w2, w3, bias,
            W, RUN, 1, SILU, HAS_STATE, HAS_DNEW_STATE, True, PACKED, HAS_PREVIOUS,
        )  # fmt: skip
    elif mixed:
        dw0, dw1, dw2, dw3, dbias = _backward_walk(
            x_base, state_base, ids, previous, y_base, dnew_base, u_base, dstate_base, position,
            length, channels, sxl, syl, sul, sil, oc, known, w0, w1, w2, w3, bias,
            W, RUN, STAGES, SILU, HAS_STATE, HAS_DNEW_STATE, False, PACKED, HAS_PREVIOUS,
        )  # fmt: skip
    else:
        dw0, dw1, dw2, dw3, dbias = _backward_walk(
            x_base, state_base, ids, previous, y_base, dnew_base, u_base, dstate_base, position,
            length, channels, sxl, syl, sul, sil, oc, known, w0, w1, w2, w3, bias,
            W, RUN, STAGES, SILU, HAS_STATE, HAS_DNEW_STATE, False, False, HAS_PREVIOUS,
        )  # fmt: skip
    # The last column meets the current token.
    part = PARTS + rest * ((W + 1 if HAS_BIAS else W) * channels) + oc
    tl.store(part + (W - 1) * channels, tl.sum(dw0, 0)[None], mask=known)
    tl.store(part + (W - 2) * channels, tl.sum(dw1, 0)[None], mask=known)
    if W > 2:
        tl.store(part + (W - 3) * channels, tl.sum(dw2, 0)[None], mask=known)
    if W > 3:
        tl.store(part, tl.sum(dw3, 0)[None], mask=known)
    if HAS_BIAS:
        tl.store(part + W * channels, tl.sum(dbias, 0)[None], mask=known)
