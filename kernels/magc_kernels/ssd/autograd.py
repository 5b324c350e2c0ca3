"""Mamba-2 scan on Triton kernels: forward, recompute and vector-Jacobian product, and autograd on top.

`ssd` takes and returns what `reference.ssd` does. `forward`, `recompute` and `vjp` do the work and know nothing
of autograd: an engine that recomputes segments calls them directly, and all three can be captured in a CUDA
graph. Requires the package `triton`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magc_kernels._packing import document_runs
from magc_kernels._triton import cdiv, check_supported, launch, on_device, refuse_double_backward
from magc_kernels._triton import rows as strided
from magc_kernels.ssd import _kernel_backward as backward_kernels
from magc_kernels.ssd import _kernel_roles as roles_kernels
from magc_kernels.ssd import kernel
from magc_kernels.ssd._config import SSDConfig, heads_per_program, ssd_config
from magc_kernels.ssd._kernel_finish import finish
from magc_kernels.ssd.reference import check as check_arguments
from magc_kernels.ssd.values import SSDGradients, SSDInputs, SSDSaved

_STEP_HEADS = 16
"""Heads per program of the two kernels on steps."""
_LEAST_HEADS, _MOST_HEADS = 5, 32
_LEAST_ROLES_HEADS, _MOST_ROLES_HEADS = 10, 24
"""Likewise of `roles`: not fewer, for each of its programs writes sums that `finish` has to add up; nor more, for its
programs differ in cost, and the last to end would be waited for longer.
"""


def forward(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """Output, typed as `x`, and final state, float32. Raises as `reference.ssd`, and as `ssd_config`."""
    y, final_state, _ = _run(inputs, output=True, keep=False)
    assert y is not None
    return y, final_state


def recompute(inputs: SSDInputs, *, output: bool = True) -> tuple[Tensor | None, Tensor, SSDSaved]:
    """As `forward`, bit for bit, keeping what `vjp` needs.

    Args:
        inputs: the inputs of the forward.
        output: False skips the output (unless a gate makes the backward need it) and returns None for it.
    """
    return _run(inputs, output=output, keep=True)


def output(saved: SSDSaved) -> tuple[Tensor, SSDSaved]:
    """The output again, bit for bit, from a recompute's states, for whoever kept those and not the output.

    Returns:
        The output, and `saved` with all that `vjp` needs, even if it was without `ungated`.
    """
    with on_device(saved.step.device):
        y, ungated = _scan(saved, keep_ungated=True)
    return y, replace(saved, ungated=ungated)


def vjp(
    saved: SSDSaved,
    dy: Tensor,
    dfinal_state: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    ddt_out: Tensor | None = None,
    float32_weights: bool = False,
) -> SSDGradients:
    """Gradients of all inputs.

    Args:
        saved: of the recompute.
        dy: gradient of the output, shaped as `x`.
        dfinal_state: gradient of the final state, `(batch, heads, headdim, d_state)`; None for zeros.
        out: where to write the gradients of `x`, `B` and `C`, with stride 1 in the last axis, for example three
            views of one buffer; None to allocate.
        ddt_out: where to write the gradient of `dt`, with stride 1 in the last axis; None to allocate.
        float32_weights: gradients of `A`, `D` and `dt_bias` in float32, as they were added up, whatever the
            types of these.
    """
    inputs, config = saved.inputs, saved.config
    x, B, C = strided(inputs.x), strided(inputs.B), strided(inputs.C)
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks = saved.states.shape[1]
    tokens = chunks * config.chunk
    ratio = heads // groups
    rows = config.chunk // config.rows
    ragged = tokens != length
    packed = saved.runs is not None
    dx, dB, dC = out or (_like(inputs.x), _like(inputs.B), _like(inputs.C))
    dz = None
    float32 = {"dtype": torch.float32, "device": x.device}

    with on_device(x.device):
        dy = strided(dy)
        if inputs.z is not None:
            assert saved.ungated is not None
            z = strided(inputs.z)
            dungated, dz = torch.empty_like(saved.ungated), _like(z)
            block = 32
            launch(
            backward_kernels.ungate, batch * cdiv(length, block) * heads,
                dy, z, saved.ungated, dungated, dz, length, heads, *dy.stride()[:3], *z.stride()[:3],
                P=headdim, BLOCK=block,
            )  # fmt: skip
            dy = dungated

        dstates = torch.empty_like(saved.states)
        dinitial = torch.empty(batch, heads, headdim, d_state, **float32)
        columns = min(d_state, config.sweep_backward_columns)
        launch(
            backward_kernels.sweep_backward,
            batch * heads * (headdim // config.sweep_backward_rows) * (d_state // columns),
            C, saved.cumulative, saved.runs, dy, None if dfinal_state is None else dfinal_state.contiguous(),
            dstates, dinitial,
            length, heads, ratio, chunks, *C.stride()[:3], *dy.stride()[:3],
            P=headdim, N=d_state, BP=config.sweep_backward_rows, BN=columns, L=config.chunk,
            HAS_DFINAL=dfinal_state is not None, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, STAGES=config.sweep_backward_stages,
            num_warps=config.sweep_backward_warps,
        )  # fmt: skip

        rank = 0 if inputs.D is None else inputs.D.ndim
        per_program = heads_per_program(ratio, batch * chunks * groups * rows, _LEAST_HEADS, _MOST_HEADS)
        launch(
            roles_kernels.input_gradient, batch * chunks * groups * -(-ratio // per_program) * rows,
            B, C, saved.step, saved.cumulative, saved.runs, dstates, dy, inputs.D, dx,
            length, heads, ratio, chunks, per_program,
            *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3], *dx.stride()[:3],
            P=headdim, N=d_state, L=config.chunk, BM=config.rows, D_RANK=rank, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, STAGES=config.input_stages, num_warps=config.input_warps,
        )  # fmt: skip

        kinds = 4 * rows
        per_program = heads_per_program(ratio, batch * chunks * groups * kinds, _LEAST_ROLES_HEADS, _MOST_ROLES_HEADS)
        splits = -(-ratio // per_program)
        dB_parts = torch.empty(splits, batch, tokens, groups, d_state, **float32)
        dC_parts = torch.empty_like(dB_parts)
        dscore = torch.empty(splits, batch, chunks, groups, config.chunk, config.chunk, **float32)
        sums = torch.empty(3 + rows, *saved.step.shape, **float32)
        dacross = torch.empty(batch * chunks, heads, **float32)
        dskip = torch.empty(batch * chunks * rows, heads, *(headdim,) * (rank - 1), **float32)
        launch(
            roles_kernels.roles, batch * chunks * groups * splits * kinds,
            x, B, C, saved.step, saved.cumulative, saved.runs, saved.states, dstates, dy,
            dB_parts, dC_parts, dscore, sums, dacross, dskip,
            batch, length, heads, ratio, chunks, per_program,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3],
            P=headdim, N=d_state, L=config.chunk, BM=config.rows, D_RANK=rank, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, SCORES_STAGES=config.scores_stages,
            PROJECTION_STAGES=config.projection_stages, num_warps=config.roles_warps, maxnreg=config.roles_registers,
        )  # fmt: skip

        low, high = inputs.dt_limit
        ddt = _like(inputs.dt) if ddt_out is None else ddt_out
        dweights = torch.empty(3, batch * chunks, heads, **float32)
        finish_rows, columns = min(config.rows, config.finish_rows), min(d_state, config.finish_columns)
        tiles = config.chunk // finish_rows * (d_state // columns)
        launch(
            finish, batch * chunks * (groups * 2 * tiles + cdiv(heads, _STEP_HEADS)),
            B, C, dscore, dB_parts, dC_parts, dB, dC,
            inputs.dt, inputs.A, inputs.dt_bias, saved.step, saved.cumulative, saved.runs, sums, dacross, dskip,
            ddt, dweights,
            batch, length, heads, groups, chunks, splits,
            *B.stride()[:3], *C.stride()[:3], *dB.stride()[:3], *dC.stride()[:3],
            *inputs.dt.stride(), *ddt.stride()[:2], low, high,
            N=d_state, BN=columns, L=config.chunk, FM=finish_rows, BM=config.rows, PRECISION=config.precision,
            BH=_STEP_HEADS, HAS_SKIP=rank == 1, HAS_BIAS=inputs.dt_bias is not None,
            SOFTPLUS=inputs.dt_softplus, CLAMP=_clamps(inputs), PACKED=packed, num_warps=config.finish_warps,
        )  # fmt: skip
        dA, dbias, dD = dweights.sum(1)
        if rank == 2:
            dD = dskip.sum(0)

        def weight(total: Tensor, of: Tensor | None) -> Tensor | None:
            return None if of is None else total if float32_weights else total.to(of.dtype)

        return SSDGradients(
            x=dx,
            dt=ddt,
            A=dA if float32_weights else dA.to(inputs.A.dtype),
            B=dB,
            C=dC,
            D=weight(dD, inputs.D),
            z=dz,
            dt_bias=weight(dbias, inputs.dt_bias),
            initial_state=dinitial,
        )


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    config: SSDConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`, differentiable once, with these limits on its arguments. `config` is as in `SSDInputs`.

    `x`, `B` and `C` are of one type, float32, float16 or bfloat16, and on a CUDA device; headdim is 16, 32, 64
    or 128 and d_state 16, 32, 64, 128 or 256. `chunk_size` is rounded down to a power of two.

    Matrix products take operands in the type of `x` and add up in float32 (float32 operands: three TF32 products,
    about float32 precision); states travel from chunk to chunk in float32.

    Raises:
        ValueError, TypeError: as `reference.ssd`, or for what lies outside these limits.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    options = (seq_idx, prev_seq_idx, dt_softplus, dt_limit, chunk_size, config)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _SSD.apply(options, *tensors)
    return forward(_inputs(tensors, options))


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final_state, saved = recompute(_inputs(tensors, options))
        assert y is not None
        kept = (saved.step, saved.cumulative, saved.runs, saved.states, saved.ungated)
        ctx.save_for_backward(*tensors, *kept)
        ctx.config = saved.config
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        dy, dfinal_state = grads
        *tensors, step, cumulative, runs, states, ungated = ctx.saved_tensors
        inputs = _inputs(tensors, ctx.options)
        saved = SSDSaved(inputs, ctx.config, step, cumulative, runs, states, ungated)
        d = vjp(saved, torch.zeros_like(inputs.x) if dy is None else dy, dfinal_state)
        state = inputs.initial_state
        dstate = None if state is None else d.initial_state.to(state.dtype)
        return (None, d.x, d.dt, d.A, d.B, d.C, d.D, d.z, d.dt_bias, dstate)


def _inputs(tensors: Any, options: Any) -> SSDInputs:
    return SSDInputs(*tensors, *options)


def _run(inputs: SSDInputs, *, output: bool, keep: bool) -> tuple[Tensor | None, Tensor, SSDSaved]:
    _check(inputs)
    x, B = strided(inputs.x), strided(inputs.B)
    batch, length, heads, headdim = x.shape
    d_state = B.shape[3]
    config = ssd_config(
        x.dtype,
        headdim,
        d_state,
        inputs.chunk_size,
        capability=torch.cuda.get_device_capability(x.device) if x.is_cuda else None,
        config=inputs.config,
    )
    chunks = -(-length // config.chunk)
    tokens = chunks * config.chunk
    ratio = heads // B.shape[2]
    ragged = tokens != length
    packed = inputs.seq_idx is not None
    low, high = inputs.dt_limit

    with on_device(x.device):
        runs = _runs(inputs.seq_idx, inputs.prev_seq_idx, tokens) if inputs.seq_idx is not None else None
        step = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
        cumulative = torch.empty_like(step)
        launch(
            kernel.chunk_steps, batch * chunks * cdiv(heads, _STEP_HEADS),
            inputs.dt, inputs.A, inputs.dt_bias, step, cumulative,
            length, heads, chunks, *inputs.dt.stride(), low, high,
            L=config.chunk, BH=_STEP_HEADS, HAS_BIAS=inputs.dt_bias is not None,
            SOFTPLUS=inputs.dt_softplus, CLAMP=_clamps(inputs),
        )  # fmt: skip
        states = torch.empty(batch, chunks, heads, headdim, d_state, dtype=x.dtype, device=x.device)
        final_state = torch.empty(batch, heads, headdim, d_state, dtype=torch.float32, device=x.device)
        initial = inputs.initial_state
        launch(
            kernel.sweep_forward, batch * heads * (headdim // config.sweep_rows),
            x, B, step, cumulative, runs, None if initial is None else initial.contiguous(),
            states, final_state,
            length, heads, ratio, chunks, *x.stride()[:3], *B.stride()[:3],
            P=headdim, N=d_state, BP=config.sweep_rows, L=config.chunk,
            HAS_INITIAL=initial is not None, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, STAGES=config.sweep_stages, num_warps=config.sweep_warps,
        )  # fmt: skip
        saved = SSDSaved(inputs, config, step, cumulative, runs, states, None)
        if not output and (not keep or inputs.z is None):
            return None, final_state, saved
        y, ungated = _scan(saved, keep_ungated=keep)
    return (y if output else None), final_state, replace(saved, ungated=ungated)


def _scan(saved: SSDSaved, *, keep_ungated: bool) -> tuple[Tensor, Tensor | None]:
    """The output from the states, and before the gate, if there is one and that is wanted."""
    inputs, config = saved.inputs, saved.config
    x, B, C = strided(inputs.x), strided(inputs.B), strided(inputs.C)
    z = None if inputs.z is None else strided(inputs.z)
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks = saved.states.shape[1]
    ratio = heads // groups
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ungated = torch.empty_like(y) if keep_ungated and z is not None else None
    rows = config.chunk // config.rows
    per_program = heads_per_program(ratio, batch * chunks * groups * rows, _LEAST_HEADS, _MOST_HEADS)
    launch(
        kernel.scan, batch * chunks * groups * -(-ratio // per_program) * rows,
        x, B, C, saved.step, saved.cumulative, saved.runs, saved.states, inputs.D, z, y, ungated,
        length, heads, ratio, chunks, per_program,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *((0, 0, 0) if z is None else z.stride()[:3]),
        P=headdim, N=d_state, L=config.chunk, BM=config.rows,
        D_RANK=0 if inputs.D is None else inputs.D.ndim, GATED=z is not None,
        KEEP_UNGATED=ungated is not None, PACKED=saved.runs is not None, RAGGED=chunks * config.chunk != length,
        PRECISION=config.precision, STAGES=config.scan_stages, num_warps=config.scan_warps,
    )  # fmt: skip
    return y, ungated


def _runs(seq_idx: Tensor, prev_seq_idx: Tensor | None, tokens: int) -> Tensor:
    runs_BL = document_runs(seq_idx, prev_seq_idx)
    padded = runs_BL.new_zeros(runs_BL.shape[0], 1 + tokens, dtype=torch.int32)
    padded[:, 1 : 1 + runs_BL.shape[1]] = runs_BL
    padded[:, 1 + runs_BL.shape[1] :] = runs_BL[:, -1:]
    return padded


def _check(inputs: SSDInputs) -> None:
    x, B, C = inputs.x, inputs.B, inputs.C
    check_arguments(
        x, inputs.dt, inputs.A, B, C, inputs.D, inputs.z, inputs.dt_bias, inputs.dt_limit, inputs.initial_state
    )
    if inputs.seq_idx is None and inputs.prev_seq_idx is not None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
    if inputs.seq_idx is not None and inputs.seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx must have shape {tuple(x.shape[:2])}, got {tuple(inputs.seq_idx.shape)}")
    if B.dtype != x.dtype or C.dtype != x.dtype:
        raise TypeError(f"x, B and C must be of one type, got {x.dtype}, {B.dtype} and {C.dtype}; cast them first")
    check_supported("scan", x.dtype, vars(inputs).values())


def _clamps(inputs: SSDInputs) -> bool:
    return not (inputs.dt_softplus and inputs.dt_limit == (0.0, math.inf))


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
