"""Triton kernels of the Mamba-2 scan, backward. Conventions as in `kernel`.

Given the states before each chunk, which the recompute kept, four launches:

1. `sweep_backward`: the gradient of the state after every chunk, in reverse, as `sweep_forward`;
2. `input_gradient` and
3. `roles`, both in `_kernel_roles`: everything that needs a loop over heads;
4. `finish`, in `_kernel_finish`: sums over splits and the two products that no head enters, for dB and dC; and from
   sums over rows and columns to the gradients of dt, A and the bias.

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

from magc_kernels.ssd.kernel import SIZES, dot_wide, load_rows, sigmoid, split_high


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
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, L: tl.constexpr,
    HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DSTATES: gradient of the state after every chunk, for one head, BP of its rows and BN of its columns.

    Of at least 64 rows, the gradient is held as `(p, n)`: the operand that is weighted, dy, is then the left one, which
    goes from registers into the product, not once more through shared memory. Fewer rows would not fill a warp group's
    product; then it is held as in `sweep_forward`.
    """
    UPRIGHT: tl.constexpr = BP >= 64
    SLICES: tl.constexpr = P // BP
    COLUMNS: tl.constexpr = N // BN
    pid = tl.program_id(0)
    on = pid % COLUMNS * BN + tl.arange(0, BN)
    op = pid // COLUMNS % SLICES * BP + tl.arange(0, BP)
    bh = (pid // (COLUMNS * SLICES)).to(tl.int64)
    b = bh // heads
    h = bh % heads
    ol = tl.arange(0, L)
    if UPRIGHT:
        tile = op[:, None] * N + on[None, :]
        grad = tl.zeros([BP, BN], tl.float32)
    else:
        tile = on[:, None] + op[None, :] * N
        grad = tl.zeros([BN, BP], tl.float32)
    if HAS_DFINAL:
        grad += tl.load(DFINAL + bh * (P * N) + tile).to(tl.float32)
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
        C_t = load_rows(c_base + t0 * scl + ol[:, None] * scl + on[None, :], ol, t0, length, RAGGED)
        if UPRIGHT:
            # Loaded as its transpose, which the shared memory's swizzle gives for nothing.
            pointers = y_base + t0 * syl + ol[None, :] * syl + op[:, None]
            dy = tl.load(pointers, mask=(t0 + ol < length)[None, :], other=0.0) if RAGGED else tl.load(pointers)
        else:
            dy = load_rows(y_base + t0 * syl + ol[:, None] * syl + op[None, :], ol, t0, length, RAGGED)
        tl.store(DSTATES + ((b * chunks + c) * heads + h) * (P * N) + tile, grad.to(DSTATES.dtype.element_ty))
        grad *= across
        if UPRIGHT:
            weighted = dy.to(tl.float32) * weight[None, :]
            if C_t.dtype == tl.float32:
                grad = tl.dot(weighted, C_t, grad, input_precision=PRECISION)
            else:
                high = split_high(weighted, C_t.dtype)
                low = (weighted - high).to(C_t.dtype)
                grad = tl.dot(high.to(C_t.dtype), C_t, grad)
                grad = tl.dot(low, C_t, grad)
        else:
            grad = dot_wide(tl.trans(C_t), dy.to(tl.float32) * weight[:, None], grad, PRECISION)
    tl.store(DINITIAL + bh * (P * N) + tile, grad)
