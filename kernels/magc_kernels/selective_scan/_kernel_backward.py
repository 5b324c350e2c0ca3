"""Triton kernels of the selective scan, backward. Conventions as in `kernel`.

Given the states before each chunk, which the recompute kept, three launches:

1. `added_gradients`: what each chunk adds to the gradient of the state before it, if that of the state after it were
   0; and the steps, for the next but one;
2. `kernel.pass_states` in reverse: the gradient of the state after every chunk;
3. `scan_backward`: everything else. States are recomputed in order and read in reverse, so a program first walks
   through its chunk and puts aside the state before every T tokens, then takes these blocks from the last to the
   first, with the T states of one at a time in registers.

With a the decay, u = step * x and g the gradient of the state after token t, r that of the state before it:

    g_t = r_{t+1} + dy_t C_t        dC_t = sum over channels of dy_t h_t       dx_t = step_t (g_t . B_t) + D dy_t
    r_t = a_t g_t                   dB_t = sum over channels of g_t u_t        dstep_t = x_t (g_t . B_t) + A . p_t
    p_t = r_t h_{t-1}               dA = sum over t of step_t p_t
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# The bodies are Triton, not Python: `tl.range` is a loop, and a constexpr condition decides what exists.

import triton
import triton.language as tl

from magc_kernels.selective_scan.kernel import SIZES, decay, load_step, own_channels, own_states
from magc_kernels.ssd.kernel import sigmoid

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=SIZES)
def added_gradients(
    DT, C, RATE, BIAS, RUNS, Z, DY, ADDED, STEPS, STEP,
    length, channels, ratio, chunks, panels, pitch, sdb, sdl, scb, scl, scg, szb, szl, syb, syl,
    N: tl.constexpr, R: tl.constexpr, W: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """STEP `(b, t, channel)` float32, contiguous."""
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
    dt_base = DT + (b * sdb + t0 * sdl + g * ratio)
    z_base = Z + (b * szb + t0 * szl + g * ratio) if GATED else Z
    y_base = DY + (b * syb + t0 * syl + g * ratio)
    c_base = C + (b * scb + t0 * scl + g * scg) + on
    step_base = STEP + ((b * length + t0) * channels + g * ratio)
    runs = RUNS + (b * (length + 1) + t0) if PACKED else RUNS
    grad = tl.zeros([N, R, W], tl.float32)
    steps = tl.zeros([R, W], tl.float32)
    count = tl.cdiv(tokens, T)
    for k in tl.range(0, count):
        t = (count - 1 - k) * T
        step = ()
        dy = ()
        for i in tl.static_range(T):
            mask = known & (t + i < tokens)
            step += (load_step(dt_base + (t + i) * sdl + oc, bias, mask, HAS_BIAS, SOFTPLUS),)
            dy_t = tl.load(y_base + (t + i) * syl + oc, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                z = tl.load(z_base + (t + i) * szl + oc, mask=mask, other=0.0).to(tl.float32)
                dy_t *= z * sigmoid(z)
            dy += (dy_t,)
        for i in tl.static_range(T - 1, -1, -1):
            C_t = tl.load(c_base + tl.minimum(t + i, tokens - 1) * scl)
            left = decay(step[i], rate, runs, t + i, tokens, PACKED)
            grad = (grad + dy[i][None, :, :] * C_t[:, None, None]) * left
            steps += step[i]
        for i in tl.static_range(T):
            tl.store(step_base + (t + i) * channels + oc, step[i], mask=known & (t + i < tokens))
    tl.store(ADDED + place + tile, grad)
    tl.store(STEPS + (bc * groups + g) * panels * 32 + oc, steps)


@triton.jit
def _scan_backward_tile(
    X, DT, B, C, RATE, BIAS, RUNS, D, Z, DY, STEP, STATES, DSTATES, ASIDE,
    DX, DDT, DZ, DB, DC, DRATE, DSKIP, DBIAS,
    b, bc, g, t0, tokens, block, first, length, channels, ratio, panels, pitch,
    sxb, sxl, sdb, sdl, sbb, sbl, sbg, scb, scl, scg, szb, szl, syb, syl,
    N: tl.constexpr, R: tl.constexpr, W: tl.constexpr, L: tl.constexpr, T: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile of channels in one chunk. DB and DC of the chunk's first token receive sums over the tile's channels:
    set if `first`, otherwise added to.
    """
    oc, known = own_channels(block, ratio, R, W)
    on = tl.arange(0, N)
    tile = own_states(N, R, W)
    own = (g * panels + block * (R * W) // 32) * pitch + block * (R * W) % 32
    place = bc * (channels // ratio) * panels * pitch + own
    steps = (bc * (channels // ratio) + g) * panels * 32 + oc
    aside = ASIDE + tile
    SLOT: tl.constexpr = N * (R * W if R * W > 32 else 32)
    rate = tl.load(RATE + own + tile)
    bias = tl.load(BIAS + g * ratio + oc, mask=known, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    skip = tl.load(D + g * ratio + oc, mask=known, other=0.0).to(tl.float32) if SKIP else 0.0
    x_base = X + (b * sxb + t0 * sxl + g * ratio) + oc
    dt_base = DT + (b * sdb + t0 * sdl + g * ratio) + oc
    z_base = Z + (b * szb + t0 * szl + g * ratio) + oc if GATED else Z
    y_base = DY + (b * syb + t0 * syl + g * ratio) + oc
    b_base = B + (b * sbb + t0 * sbl + g * sbg) + on
    c_base = C + (b * scb + t0 * scl + g * scg) + on
    token = (b * length + t0) * channels + g * ratio
    runs = RUNS + (b * (length + 1) + t0) if PACKED else RUNS
    projections = ((b * length + t0) * (channels // ratio) + g) * N + on
    db_base = DB + projections
    dc_base = DC + projections
    per_token = channels // ratio * N
    step_base = STEP + token + oc
    dx_base = DX + token + oc
    ddt_base = DDT + token + oc
    dz_base = DZ + token + oc if GATED else DZ
    count = tl.cdiv(tokens, T)

    state = tl.load(STATES + place + tile)
    tl.store(aside, state)
    for k in tl.range(1, count):
        t = (k - 1) * T
        for i in tl.static_range(T):
            step_t = tl.load(step_base + (t + i) * channels, mask=known, other=0.0)
            x_t = tl.load(x_base + (t + i) * sxl, mask=known, other=0.0).to(tl.float32)
            B_t = tl.load(b_base + (t + i) * sbl)
            left_t = decay(step_t, rate, runs, t + i, tokens, PACKED)
            state = state * left_t + (step_t * x_t)[None, :, :] * B_t[:, None, None]
        tl.store(aside + k * SLOT, state)
    tl.debug_barrier()

    grad = tl.load(DSTATES + place + tile)
    drate = tl.zeros([N, R, W], tl.float32)
    dskip = tl.zeros([R, W], tl.float32)
    dbias = tl.zeros([R, W], tl.float32)
    for k in tl.range(0, count):
        s = count - 1 - k
        t = s * T
        # No load may wait for a store, whose target it could be for all the compiler knows: all loads come first,
        # that of a tile of states before the others: from the first one Triton takes the layout of what follows.
        before = (tl.load(aside + s * SLOT),)
        step = ()
        x = ()
        dy = ()
        z = ()
        raw = ()
        dB = ()
        dC = ()
        for i in tl.static_range(T):
            inside = t + i < tokens
            mask = known & inside
            step += (tl.load(step_base + (t + i) * channels, mask=mask, other=0.0),)
            x += (tl.load(x_base + (t + i) * sxl, mask=mask, other=0.0).to(tl.float32),)
            dy += (tl.load(y_base + (t + i) * syl, mask=mask, other=0.0).to(tl.float32),)
            if GATED:
                z += (tl.load(z_base + (t + i) * szl, mask=mask, other=0.0).to(tl.float32),)
            if SOFTPLUS:
                raw += (tl.load(dt_base + (t + i) * sdl, mask=mask, other=0.0).to(tl.float32),)
            dB += (tl.load(db_base + (t + i) * per_token, mask=inside & (first == 0), other=0.0),)
            dC += (tl.load(dc_base + (t + i) * per_token, mask=inside & (first == 0), other=0.0),)
        left = ()
        for i in tl.static_range(T):
            B_t = tl.load(b_base + tl.minimum(t + i, tokens - 1) * sbl)
            left += (decay(step[i], rate, runs, t + i, tokens, PACKED),)
            before += (before[i] * left[i] + (step[i] * x[i])[None, :, :] * B_t[:, None, None],)
        # In the order in which they come, from the last token to the first.
        dx = ()
        ddt = ()
        dz = ()
        dB_sum = ()
        dC_sum = ()
        for i in tl.static_range(T - 1, -1, -1):
            last = tl.minimum(t + i, tokens - 1)
            B_t = tl.load(b_base + last * sbl)
            C_t = tl.load(c_base + last * scl)
            dy_t = dy[i]
            if GATED:
                y = tl.sum(before[i + 1] * C_t[:, None, None], 0)
                if SKIP:
                    y += skip * x[i]
                gate = sigmoid(z[i])
                dz += (dy_t * y * gate * (1.0 + z[i] * (1.0 - gate)),)
                dy_t *= z[i] * gate
            after = grad + dy_t[None, :, :] * C_t[:, None, None]
            dC_sum += (dC[i] + tl.sum(tl.sum(before[i + 1] * dy_t[None, :, :], 1), 1),)
            dB_sum += (dB[i] + tl.sum(tl.sum(after * (step[i] * x[i])[None, :, :], 1), 1),)
            dinput = tl.sum(after * B_t[:, None, None], 0)
            grad = after * left[i]
            drate_t = grad * before[i]
            dstep = x[i] * dinput + LN2 * tl.sum(drate_t * rate, 0)
            drate += drate_t * step[i][None, :, :]
            dx_t = step[i] * dinput
            if SKIP:
                dx_t += skip * dy_t
                dskip += dy_t * x[i]
            if SOFTPLUS:
                dstep *= sigmoid(raw[i] + bias)
            dx += (dx_t,)
            ddt += (dstep,)
        for i in tl.static_range(T):
            inside = t + i < tokens
            mask = known & inside
            if HAS_BIAS:
                dbias += tl.where(mask, ddt[T - 1 - i], 0.0)
            tl.store(dx_base + (t + i) * channels, dx[T - 1 - i].to(DX.dtype.element_ty), mask=mask)
            tl.store(ddt_base + (t + i) * channels, ddt[T - 1 - i].to(DDT.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(dz_base + (t + i) * channels, dz[T - 1 - i].to(DZ.dtype.element_ty), mask=mask)
            tl.store(db_base + (t + i) * per_token, dB_sum[T - 1 - i], mask=inside)
            tl.store(dc_base + (t + i) * per_token, dC_sum[T - 1 - i], mask=inside)
    tl.store(DRATE + place + tile, drate)
    if SKIP:
        tl.store(DSKIP + steps, dskip)
    if HAS_BIAS:
        tl.store(DBIAS + steps, dbias)


@triton.jit(do_not_specialize=SIZES)
def scan_backward(
    X, DT, B, C, RATE, BIAS, RUNS, D, Z, DY, STEP, STATES, DSTATES, ASIDE,
    DX, DDT, DZ, DB, DC, DRATE, DSKIP, DBIAS,
    items, size, room, length, channels, ratio, chunks, panels, pitch, splits,
    sxb, sxl, sdb, sdl, sbb, sbl, sbg, scb, scl, scg, szb, szl, syb, syl,
    N: tl.constexpr, R: tl.constexpr, W: tl.constexpr, L: tl.constexpr, T: tl.constexpr, SHARE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """An item is one chunk and SHARE tiles of a group's channels; a program takes every `programs`-th.

    DX, DDT, DZ are contiguous; ASIDE `(program, room)`. Partial sums: DB, DC `(split, b, t, group, n)`, a
    split of `size` numbers; DRATE as states, DSKIP and DBIAS as STEPS. DRATE is the gradient of A.
    """
    groups = channels // ratio
    blocks = tl.cdiv(ratio, R * W)
    aside = ASIDE + tl.program_id(0).to(tl.int64) * room
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % splits
        rest = (item // splits).to(tl.int64)
        g = rest % groups
        bc = rest // groups
        b = bc // chunks
        t0 = bc % chunks * L
        tokens = tl.minimum(length - t0, L).to(tl.int32)
        for block in tl.range(split * SHARE, tl.minimum(split * SHARE + SHARE, blocks)):
            # What other threads wrote for the tile before: the states put aside, dB and dC.
            tl.debug_barrier()
            _scan_backward_tile(
                X, DT, B, C, RATE, BIAS, RUNS, D, Z, DY, STEP, STATES, DSTATES, aside,
                DX, DDT, DZ, DB + split.to(tl.int64) * size, DC + split.to(tl.int64) * size, DRATE, DSKIP, DBIAS,
                b, bc, g, t0, tokens, block, block == split * SHARE, length, channels, ratio, panels, pitch,
                sxb, sxl, sdb, sdl, sbb, sbl, sbg, scb, scl, scg, szb, szl, syb, syl,
                N, R, W, L, T, HAS_BIAS, SOFTPLUS, SKIP, GATED, PACKED,
            )  # fmt: skip
