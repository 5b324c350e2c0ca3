"""Forward Triton kernel of the causal depthwise convolution, and what backward shares with it. What they compute is
defined in `reference`.

A program owns BC channels of LANES * RUN tokens: a tile of LANES rows, each of which walks over its RUN tokens in
order with the last W - 1 rows in registers, so that each activation is computed once, but for a halo of W - 1 rows
in backward. The walk takes four rows at a time, whose loads are in flight together. All arithmetic is float32.

Most programs lie inside one document and away from both ends of the segment, and walk with no mask but that of the
channels. The others take further copies of the walk with the same arithmetic, down to the fused multiply-adds: at an
end (EDGE) one that knows of the state and of the end, and where documents meet (PACKED) one that tells them apart.

Positions count from the segment's first token; the rows of the state are positions -(W - 1) .. -1. Offsets are
int64. No atomics.

Triton takes a variable for constant in a loop if the loop's body gives it another variable's initial value and the
two began as one object. Each variable carried from row to row therefore begins as an object of its own.
"""

import triton
import triton.language as tl

from magc_kernels._sigmoid import sigmoid

SIZES = ("length", "blocks")
"""Arguments whose values must not choose between compiled variants, which could differ in rounding."""


@triton.jit
def load_row(
    X, STATE, offsets, position, length, sxl, oc, known, C, r,
    W: tl.constexpr, EDGE: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Row `r` of each lane, the lane's row 0 being at `position`: a token, a row of the state, or 0 outside both."""
    token = X + r * sxl + offsets
    if EDGE:
        p = position + r
        row = tl.load(token, mask=known & (p >= 0) & (p < length), other=0.0).to(tl.float32)
        if HAS_STATE:
            mask = known & (p < 0) & (p >= 1 - W)
            row += tl.load(STATE + (p + (W - 1)) * C + oc, mask=mask, other=0.0).to(tl.float32)
        return row
    else:
        return tl.load(token, mask=known, other=0.0).to(tl.float32)


@triton.jit
def load_tap(WEIGHT, BACK: tl.constexpr, oc, known, W: tl.constexpr):
    """The weight that meets the token BACK tokens before the current one; unused ones are 0."""
    if BACK < W:
        return tl.load(WEIGHT + oc * W + (W - 1 - BACK), mask=known, other=0.0).to(tl.float32)
    else:
        return oc.to(tl.float32) * 0.0


@triton.jit
def load_document(IDS, PREVIOUS, p, length, sil, HAS_PREVIOUS: tl.constexpr):
    """The document at position `p`: before the segment that of the state, after it the last token's."""
    ids = tl.load(IDS + tl.minimum(tl.maximum(p, 0), length - 1) * sil)
    if HAS_PREVIOUS:
        ids = tl.where(p < 0, tl.load(PREVIOUS).to(ids.dtype), ids)
    return ids


@triton.jit
def next_run(run, IDS, PREVIOUS, p, length, sil, PACKED: tl.constexpr, HAS_PREVIOUS: tl.constexpr):
    """The number of document changes up to and including position `p`; `run` is that up to the one before."""
    if PACKED:
        here = load_document(IDS, PREVIOUS, p, length, sil, HAS_PREVIOUS)
        return run + (here != load_document(IDS, PREVIOUS, p - 1, length, sil, HAS_PREVIOUS)).to(tl.int32)
    else:
        return run


@triton.jit
def has_change(IDS, first, last, length, sil, SPAN: tl.constexpr):
    """Whether a document ends among the positions `first .. last`, at most SPAN and inside the segment."""
    p = first + tl.arange(0, SPAN)
    mask = (p > 0) & (p <= last) & (p < length)
    change = tl.load(IDS + p * sil, mask=mask, other=0) != tl.load(IDS + (p - 1) * sil, mask=mask, other=0)
    return tl.max(change.to(tl.int32), 0) > 0


@triton.jit
def if_same(value, run, other, PACKED: tl.constexpr):
    """`value`, or 0 if the runs differ."""
    if PACKED:
        return tl.where(run == other, value, 0.0)
    else:
        return value


@triton.jit
def convolve(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias, W: tl.constexpr, PACKED: tl.constexpr):
    # Masking the factor, not the product, leaves the same fused multiply-adds with documents as without.
    y = bias + w0 * x0 + w1 * if_same(x1, r1, r0, PACKED)
    if W > 2:
        y += w2 * if_same(x2, r2, r0, PACKED)
    if W > 3:
        y += w3 * if_same(x3, r3, r0, PACKED)
    return y


@triton.jit
def _forward_row(
    Y, offsets, position, length, known, C, r,
    x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias,
    W: tl.constexpr, SILU: tl.constexpr, EDGE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    y = convolve(x0, x1, x2, x3, r0, r1, r2, r3, w0, w1, w2, w3, bias, W, PACKED)
    if SILU:
        y *= sigmoid(y)
    if EDGE:
        known = known & (position + r < length)
    tl.store(Y + r * C + offsets, y.to(Y.dtype.element_ty), mask=known)


@triton.jit
def _forward_walk(
    X, STATE, IDS, PREVIOUS, Y, position, length, channels, sxl, sil, oc, known, w0, w1, w2, w3, bias,
    W: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    EDGE: tl.constexpr, PACKED: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
):  # fmt: skip
    x_at = position * sxl + oc
    y_at = position * channels + oc
    x1 = load_row(X, STATE, x_at, position, length, sxl, oc, known, channels, -1, W, EDGE, HAS_STATE)
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
        ra = next_run(r1, IDS, PREVIOUS, position + r, length, sil, PACKED, HAS_PREVIOUS)
        re = next_run(ra, IDS, PREVIOUS, position + r + 1, length, sil, PACKED, HAS_PREVIOUS)
        ri = next_run(re, IDS, PREVIOUS, position + r + 2, length, sil, PACKED, HAS_PREVIOUS)
        ro = next_run(ri, IDS, PREVIOUS, position + r + 3, length, sil, PACKED, HAS_PREVIOUS)
        _forward_row(
            Y, y_at, position, length, known, channels, r,
            a, x1, x2, x3, ra, r1, r2, r3, w0, w1, w2, w3, bias, W, SILU, EDGE, PACKED,
        )  # fmt: skip
        _forward_row(
            Y, y_at, position, length, known, channels, r + 1,
            e, a, x1, x2, re, ra, r1, r2, w0, w1, w2, w3, bias, W, SILU, EDGE, PACKED,
        )  # fmt: skip
        _forward_row(
            Y, y_at, position, length, known, channels, r + 2,
            i, e, a, x1, ri, re, ra, r1, w0, w1, w2, w3, bias, W, SILU, EDGE, PACKED,
        )  # fmt: skip
        _forward_row(
            Y, y_at, position, length, known, channels, r + 3,
            o, i, e, a, ro, ri, re, ra, w0, w1, w2, w3, bias, W, SILU, EDGE, PACKED,
        )  # fmt: skip
        x1, x2, x3 = o, i, e
        if PACKED:
            r1, r2, r3 = ro, ri, re


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    X, WEIGHT, BIAS, STATE, IDS, PREVIOUS, Y, NEW_STATE,
    length, blocks, channels, sxb, sxl, sib, sil,
    W: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = LANES * RUN
    pid = tl.program_id(0)
    parts = tl.cdiv(channels, BC)
    oc = (pid % parts * BC + tl.arange(0, BC))[None]
    known = oc < channels
    rest = (pid // parts).to(tl.int64)
    t0 = rest % blocks * BT
    b = rest // blocks
    x_base = X + b * sxb
    y_base = Y + b * length * channels
    state_base = STATE + b * ((W - 1) * channels) if HAS_STATE else STATE
    ids = IDS + b * sib if PACKED else IDS
    previous = PREVIOUS + b if HAS_PREVIOUS else PREVIOUS
    w0 = load_tap(WEIGHT, 0, oc, known, W)
    w1 = load_tap(WEIGHT, 1, oc, known, W)
    w2 = load_tap(WEIGHT, 2, oc, known, W)
    w3 = load_tap(WEIGHT, 3, oc, known, W)
    bias = tl.load(BIAS + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([1, BC], tl.float32)
    position = t0 + (tl.arange(0, LANES) * RUN)[:, None]
    mixed = has_change(ids, t0 - (W - 2), t0 + BT - 1, length, sil, 2 * BT) if PACKED else False
    if (t0 == 0) | (t0 + BT > length):
        _forward_walk(
            x_base, state_base, ids, previous, y_base, position, length, channels, sxl, sil, oc, known,
            w0, w1, w2, w3, bias, W, RUN, 1, SILU, HAS_STATE, True, PACKED, HAS_PREVIOUS,
        )  # fmt: skip
    elif mixed:
        _forward_walk(
            x_base, state_base, ids, previous, y_base, position, length, channels, sxl, sil, oc, known,
            w0, w1, w2, w3, bias, W, RUN, STAGES, SILU, HAS_STATE, False, PACKED, HAS_PREVIOUS,
        )  # fmt: skip
    else:
        _forward_walk(
            x_base, state_base, ids, previous, y_base, position, length, channels, sxl, sil, oc, known,
            w0, w1, w2, w3, bias, W, RUN, STAGES, SILU, HAS_STATE, False, False, HAS_PREVIOUS,
        )  # fmt: skip
    if t0 + BT >= length:
        # The last block keeps the window's last rows, those of the last token's document.
        run = tl.zeros_like(length)
        for back in tl.static_range(1, W):
            p = length - back + tl.zeros_like(oc).to(tl.int64)
            if back > 1:
                run = next_run(run, ids, previous, length - back + 1, length, sil, PACKED, HAS_PREVIOUS)
            row = load_row(x_base, state_base, p * sxl + oc, p, length, sxl, oc, known, channels, 0, W, True, HAS_STATE)
            tl.store(
                NEW_STATE + (b * (W - 1) + (W - 1 - back)) * channels + oc,
                if_same(row, run, 0, PACKED).to(NEW_STATE.dtype.element_ty), mask=known,
            )  # fmt: skip
