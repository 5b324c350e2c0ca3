"""Triton kernels of the selective scan, forward. What they compute is defined in `reference`.

A recurrence per channel and state has no matrix products; its cost is one exponential for each token, channel and
state, and waiting for the token before. The sequence is therefore cut into chunks of `L` tokens that run side by side:

1. `added_states`: what each chunk adds to a state of zero, and the sum of its steps;
2. `pass_states`: the state before every chunk. What one chunk hands to the next is a float32 fold in their order, so
   a segment boundary between two chunks changes no bit of the result;
3. `scan`: the outputs of each chunk, from the state before it.

Conventions of all kernels here and in `_kernel_backward`:

- x, dt, z, y `(b, t, channel)` and B, C `(b, t, group, n)` float32 with any strides but 1 in the last axis;
  RATE = `A * log2(e)` `(panel, n, 32)`, states `(b, chunk, panel, n, 32)` and STEPS `(b, chunk, panel, 32)` float32;
  runs `(b, 1 + t)` int32 with the run of the token before the segment (0) first.
- A panel is 32 neighbouring channels of a group, the last ones padded: a tile of states is then one pointer and
  offsets known at compile time, where a pointer for each of its elements would fill the registers. A group has
  `panels` of them, whole tiles of every kernel.
- A program is one warp and owns a tile `(N, R, W)` of states: R * W channels of one group.
- Tokens come T at a time: their loads are in flight together, and no store lies between. Those past the end read as 0
  and have step 0, which leaves a state as it is.
- Offsets of a program are int64 scalars; offsets inside a tile are int32.
- No atomics; every sum has a fixed order.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# The bodies are Triton, not Python: `tl.range` is a loop, and a constexpr condition decides what exists.

import triton
import triton.language as tl

from magc_kernels.ssd.kernel import sigmoid, softplus

SIZES = ("length", "channels", "ratio", "chunks", "panels", "pitch", "items", "size", "splits", "room")
"""Arguments whose values must not choose between compiled variants, which could differ in rounding. Besides, Triton
must not know by what offsets are divisible: it would spread a thread's loads over neighbouring channels, and then
exchange them between threads for every token."""


@triton.jit
def own_channels(block, ratio, R: tl.constexpr, W: tl.constexpr):
    """Channels of a tile, counted in their group, and which of them exist: `(R, W)`."""
    offsets = block * (R * W) + tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    return offsets, offsets < ratio


@triton.jit
def own_states(N: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Offsets of a tile in its panels, `(N, R, W)`."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    return tl.arange(0, N)[:, None, None] * 32 + (offsets // 32 * (N * 32) + offsets % 32)[None, :, :]


@triton.jit
def load_step(pointers, bias, mask, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Steps of one token, 0 where masked out."""
    step = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += bias
    if SOFTPLUS:
        step = softplus(step)
    return tl.where(mask, step, 0.0)


@triton.jit
def decay(step, rate, runs, t, tokens, PACKED: tl.constexpr):
    """What is left of the state before token `t` after it, `(N, R, W)`; nothing if a document begins there."""
    left = tl.exp2(step[None, :, :] * rate)
    if PACKED:
        same = tl.load(runs + tl.minimum(t, tokens)) == tl.load(runs + tl.minimum(t + 1, tokens))
        left = tl.where(same, left, 0.0)
    return left


@triton.jit(do_not_specialize=SIZES)
def added_states(
    X, DT, B, RATE, BIAS, RUNS, ADDED, STEPS,
    length, channels, ratio, chunks, panels, pitch, sxb, sxl, sdb, sdl, sbb, sbl, sbg,
    N: tl.constexpr, R: tl.constexpr, W: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The state after each chunk if it were 0 before, and the chunk's sum of steps."""
    blocks = panels * 32 // (R * W)  # padding too, which others read
    groups = channels // ratio
    pid = tl.program_id(0)
    rest = (pid // blocks).to(tl.int64)
    g = rest % groups
    bc = rest // groups
    b = bc // chunks
    t0 = bc % chunks * L
    tokens = tl.minimum(length - t0, L).to(tl.int32)
    oc, known = own_channels(pid % blocks, ratio, R, W)
    on = tl.arange(0, N)
    tile = own_states(N, R, W)
    first = pid % blocks * (R * W)
    own = (g * panels + first // 32) * pitch + first % 32
    place = bc * groups * panels * pitch + own
    rate = tl.load(RATE + own + tile)
    bias = tl.load(BIAS + g * ratio + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    x_base = X + (b * sxb + t0 * sxl + g * ratio)
    dt_base = DT + (b * sdb + t0 * sdl + g * ratio)
    b_base = B + (b * sbb + t0 * sbl + g * sbg) + on
    runs = RUNS + (b * (length + 1) + t0) if PACKED else RUNS
    state = tl.zeros([N, R, W], tl.float32)
    steps = tl.zeros([R, W], tl.float32)
    for t in tl.range(0, tokens, T):
        step = ()
        x = ()
        for i in tl.static_range(T):
            mask = known & (t + i < tokens)
            step += (load_step(dt_base + (t + i) * sdl + oc, bias, mask, HAS_BIAS, SOFTPLUS),)
            x += (tl.load(x_base + (t + i) * sxl + oc, mask=mask, other=0.0).to(tl.float32),)
        for i in tl.static_range(T):
            B_t = tl.load(b_base + tl.minimum(t + i, tokens - 1) * sbl)
            left = decay(step[i], rate, runs, t + i, tokens, PACKED)
            state = state * left + (step[i] * x[i])[None, :, :] * B_t[:, None, None]
            steps += step[i]
    tl.store(ADDED + place + tile, state)
    tl.store(STEPS + (bc * groups + g) * panels * 32 + oc, steps)


@triton.jit(do_not_specialize=SIZES)
def pass_states(
    STATES, STEPS, RATE, RUNS, FIRST, LAST, length, channels, ratio, chunks, panels,
    N: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """In place: from what each chunk adds to the state before it, and LAST after all. REVERSE goes from the last chunk
    to the first. FIRST and LAST are `(b, channel, n)`.
    """
    padded = channels // ratio * panels * 32
    size = padded * N
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    e = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    panel = e // (N * 32)
    channel = panel % panels * 32 + e % 32
    known = inside & (channel < ratio)
    outside = (b * channels + panel // panels * ratio + channel) * N + e // 32 % N
    own_step = panel * 32 + e % 32
    rate = tl.load(RATE + e, mask=inside, other=0.0)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        state += tl.load(FIRST + outside, mask=known, other=0.0).to(tl.float32)
    runs = RUNS + b * (length + 1) if PACKED else RUNS
    # Loaded one chunk ahead: nothing else hides the latency.
    ahead = b * chunks + (chunks - 1 if REVERSE else 0)
    added = tl.load(STATES + ahead * size + e, mask=inside, other=0.0)
    steps = tl.load(STEPS + ahead * padded + own_step, mask=inside, other=0.0)
    for k in range(chunks):
        c = chunks - 1 - k if REVERSE else k
        across = tl.exp2(steps * rate)
        if PACKED:
            t0 = b * 0 + c * L
            same = tl.load(runs + t0) == tl.load(runs + tl.minimum(t0 + L, length))
            across = tl.where(same, across, 0.0)
        after = state * across + added
        ahead = b * chunks + (tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, chunks - 1))
        added = tl.load(STATES + ahead * size + e, mask=inside, other=0.0)
        steps = tl.load(STEPS + ahead * padded + own_step, mask=inside, other=0.0)
        tl.store(STATES + (b * chunks + c) * size + e, state, mask=inside)
        state = after
    tl.store(LAST + outside, state, mask=known)


@triton.jit(do_not_specialize=SIZES)
def scan(
    X, DT, B, C, RATE, BIAS, RUNS, STATES, D, Z, Y,
    length, channels, ratio, chunks, panels, pitch, sxb, sxl, sdb, sdl, sbb, sbl, sbg, scb, scl, scg, szb, szl,
    syb, syl,
    N: tl.constexpr, R: tl.constexpr, W: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk."""
    blocks = tl.cdiv(ratio, R * W)
    groups = channels // ratio
    pid = tl.program_id(0)
    rest = (pid // blocks).to(tl.int64)
    g = rest % groups
    bc = rest // groups
    b = bc // chunks
    t0 = bc % chunks * L
    tokens = tl.minimum(length - t0, L).to(tl.int32)
    oc, known = own_channels(pid % blocks, ratio, R, W)
    on = tl.arange(0, N)
    tile = own_states(N, R, W)
    first = pid % blocks * (R * W)
    own = (g * panels + first // 32) * pitch + first % 32
    place = bc * groups * panels * pitch + own
    rate = tl.load(RATE + own + tile)
    bias = tl.load(BIAS + g * ratio + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    skip = tl.load(D + g * ratio + oc, mask=known, other=0.0).to(tl.float32) if SKIP else 0.0
    x_base = X + (b * sxb + t0 * sxl + g * ratio)
    dt_base = DT + (b * sdb + t0 * sdl + g * ratio)
    z_base = Z + (b * szb + t0 * szl + g * ratio) if GATED else Z
    y_base = Y + (b * syb + t0 * syl + g * ratio)
    b_base = B + (b * sbb + t0 * sbl + g * sbg) + on
    c_base = C + (b * scb + t0 * scl + g * scg) + on
    runs = RUNS + (b * (length + 1) + t0) if PACKED else RUNS
    state = tl.load(STATES + place + tile)
    for t in tl.range(0, tokens, T):
        step = ()
        x = ()
        z = ()
        y = ()
        for i in tl.static_range(T):
            mask = known & (t + i < tokens)
            step += (load_step(dt_base + (t + i) * sdl + oc, bias, mask, HAS_BIAS, SOFTPLUS),)
            x += (tl.load(x_base + (t + i) * sxl + oc, mask=mask, other=0.0).to(tl.float32),)
            if GATED:
                z += (tl.load(z_base + (t + i) * szl + oc, mask=mask, other=0.0).to(tl.float32),)
        for i in tl.static_range(T):
            last = tl.minimum(t + i, tokens - 1)
            B_t = tl.load(b_base + last * sbl)
            C_t = tl.load(c_base + last * scl)
            left = decay(step[i], rate, runs, t + i, tokens, PACKED)
            state = state * left + (step[i] * x[i])[None, :, :] * B_t[:, None, None]
            y_t = tl.sum(state * C_t[:, None, None], 0)
            if SKIP:
                y_t += skip * x[i]
            if GATED:
                y_t *= z[i] * sigmoid(z[i])
            y += (y_t,)
        for i in tl.static_range(T):
            tl.store(
                y_base + (t + i) * syl + oc, y[i].to(Y.dtype.element_ty), mask=known & (t + i < tokens)
            )  # fmt: skip
