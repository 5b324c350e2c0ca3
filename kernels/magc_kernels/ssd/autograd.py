"""Mamba-2 scan on Triton kernels: forward, recompute and vector-Jacobian product, and autograd on top.

`ssd` takes and returns what `reference.ssd` does. `forward`, `recompute` and `vjp` do the work and know nothing
of autograd: an engine that recomputes segments calls them directly, and all three can be captured in a CUDA
graph. Requires the package `triton`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magc_kernels._packing import document_runs
from magc_kernels._triton import cdiv, check_supported, launch, on_device, refuse_double_backward
from magc_kernels._triton import rows as strided
from magc_kernels.ssd import _kernel_backward as backward_kernels
from magc_kernels.ssd import kernel
from magc_kernels.ssd._config import SSDConfig, heads_per_program, ssd_config
from magc_kernels.ssd.reference import check as check_arguments

_STEP_HEADS = 8
"""Heads per program of the two kernels on steps."""


@dataclass(frozen=True)
class SSDInputs:
    """Inputs of one segment. Shapes as in `reference.ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    seq_idx: Tensor | None = None
    prev_seq_idx: Tensor | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int | None = None


@dataclass(frozen=True)
class SSDSaved:
    """What `vjp` needs of a forward or recompute besides the inputs."""

    inputs: SSDInputs
    config: SSDConfig
    step: Tensor
    """`(batch, heads, chunks * chunk)` float32."""
    cumulative: Tensor
    """Running sums of `step * A * log2(e)` in each chunk, shaped as `step`."""
    runs: Tensor | None
    """`(batch, 1 + chunks * chunk)` int32: number of document changes so far, 0 first."""
    states: Tensor
    """State before each chunk, `(batch, chunks, heads, headdim, d_state)` in the type of `x`."""
    ungated: Tensor | None
    """The output before the gate; None without one."""


@dataclass(frozen=True)
class SSDGradients:
    """Gradients of `SSDInputs`, typed and shaped as the inputs; `initial_state` is float32 and always there."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor


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


def vjp(
    saved: SSDSaved,
    dy: Tensor,
    dfinal_state: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> SSDGradients:
    """Gradients of all inputs.

    Args:
        saved: of the recompute.
        dy: gradient of the output, shaped as `x`.
        dfinal_state: gradient of the final state, `(batch, heads, headdim, d_state)`; None for zeros.
        out: where to write the gradients of `x`, `B` and `C`, with stride 1 in the last axis, for example three
            views of one buffer; None to allocate.
    """
    inputs, config = saved.inputs, saved.config
    x, B, C = strided(inputs.x), strided(inputs.B), strided(inputs.C)
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks = saved.states.shape[1]
    tokens = chunks * config.chunk
    ratio = heads // groups
    rows = config.chunk // config.rows
    slices = d_state // config.sweep_backward_columns
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
        dacross = torch.empty(batch, chunks, heads, slices * headdim, **float32)
        launch(
            backward_kernels.sweep_backward, batch * heads * slices,
            C, saved.cumulative, saved.runs, dy, saved.states,
            None if dfinal_state is None else dfinal_state.contiguous(),
            dstates, dinitial, dacross,
            length, heads, ratio, chunks, *C.stride()[:3], *dy.stride()[:3],
            P=headdim, N=d_state, BN=config.sweep_backward_columns, L=config.chunk,
            HAS_DFINAL=dfinal_state is not None, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, STAGES=config.sweep_backward_stages,
            num_warps=config.sweep_backward_warps,
        )  # fmt: skip

        per_role = rows * (rows + 1) // 2 + 3 * rows
        per_program = heads_per_program(ratio, batch * chunks * groups * per_role)
        splits = -(-ratio // per_program)
        rank = 0 if inputs.D is None else inputs.D.ndim
        dB_parts = torch.empty(splits, batch, tokens, groups, d_state, **float32)
        dC_parts = torch.empty_like(dB_parts)
        dscore = torch.empty(splits, batch, chunks, groups, config.chunk, config.chunk, **float32)
        dstep = torch.empty_like(saved.step)
        dcum = torch.empty(rows + 3, *saved.step.shape, **float32)
        dskip = torch.empty(batch * chunks * rows, heads, *(headdim,) * (rank - 1), **float32)
        launch(
            backward_kernels.roles, batch * chunks * groups * splits * per_role,
            x, B, C, saved.step, saved.cumulative, saved.runs, saved.states, dstates, dy, inputs.D,
            dx, dB_parts, dC_parts, dscore, dstep, dcum, dskip,
            batch, length, heads, ratio, chunks, per_program,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3], *dx.stride()[:3],
            P=headdim, N=d_state, L=config.chunk, BM=config.rows, D_RANK=rank, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, STAGES=config.roles_stages, num_warps=config.roles_warps,
        )  # fmt: skip
        launch(
            backward_kernels.finish_projections, batch * chunks * groups * rows * 2,
            B, C, dscore, dB_parts, dC_parts, dB, dC, batch, length, groups, chunks, splits,
            *B.stride()[:3], *C.stride()[:3], *dB.stride()[:3], *dC.stride()[:3],
            N=d_state, L=config.chunk, BM=config.rows, PRECISION=config.precision,
            num_warps=8 if d_state > 128 else 4,
        )  # fmt: skip

        low, high = inputs.dt_limit
        ddt = torch.empty(inputs.dt.shape, dtype=inputs.dt.dtype, device=x.device)
        dA_parts = torch.empty(batch * chunks, heads, **float32)
        dbias_parts = torch.empty_like(dA_parts) if inputs.dt_bias is not None else None
        launch(
            backward_kernels.finish_steps, batch * chunks * cdiv(heads, _STEP_HEADS),
            inputs.dt, inputs.A, inputs.dt_bias, saved.step, dstep, dcum, dacross,
            ddt, dA_parts, dbias_parts,
            batch, length, heads, chunks, *inputs.dt.stride(), low, high,
            L=config.chunk, BH=_STEP_HEADS, ROWS=rows, ACROSS=slices * headdim,
            HAS_BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.dt_softplus, CLAMP=_clamps(inputs),
        )  # fmt: skip
        return SSDGradients(
            x=dx,
            dt=ddt,
            A=dA_parts.sum(0).to(inputs.A.dtype),
            B=dB,
            C=dC,
            D=None if inputs.D is None else dskip.sum(0).to(inputs.D.dtype),
            z=dz,
            dt_bias=None if dbias_parts is None else dbias_parts.sum(0).to(_type(inputs.dt_bias)),
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
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`, differentiable once, with these limits on its arguments.

    `x`, `B` and `C` are of one type, float32, float16 or bfloat16, and on a CUDA device; headdim is 16, 32, 64
    or 128 and d_state 16, 32, 64, 128 or 256. `chunk_size` is rounded down to a power of two.

    Matrix products take operands in the type of `x` and add up in float32 (float32 operands: three TF32 products,
    about float32 precision); states travel from chunk to chunk in float32.

    Raises:
        ValueError, TypeError: as `reference.ssd`, or for what lies outside these limits.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    options = (seq_idx, prev_seq_idx, dt_softplus, dt_limit, chunk_size)
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
    x, dt, A, B, C, D, z, dt_bias, initial_state = tensors
    seq_idx, prev_seq_idx, dt_softplus, dt_limit, chunk_size = options
    return SSDInputs(
        x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, prev_seq_idx, dt_softplus, dt_limit, chunk_size
    )


def _run(inputs: SSDInputs, *, output: bool, keep: bool) -> tuple[Tensor | None, Tensor, SSDSaved]:
    _check(inputs)
    x, B, C = strided(inputs.x), strided(inputs.B), strided(inputs.C)
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    config = ssd_config(x.dtype, headdim, d_state, inputs.chunk_size)
    chunks = -(-length // config.chunk)
    tokens = chunks * config.chunk
    ratio = heads // groups
    ragged = tokens != length
    packed = inputs.seq_idx is not None
    slices = d_state // config.sweep_columns
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
            kernel.sweep_forward, batch * heads * slices,
            x, B, step, cumulative, runs, None if initial is None else initial.contiguous(),
            states, final_state,
            length, heads, ratio, chunks, *x.stride()[:3], *B.stride()[:3],
            P=headdim, N=d_state, BN=config.sweep_columns, L=config.chunk,
            HAS_INITIAL=initial is not None, PACKED=packed, RAGGED=ragged,
            PRECISION=config.precision, STAGES=config.sweep_stages, num_warps=config.sweep_warps,
        )  # fmt: skip
        y, ungated = None, None
        if output or (keep and inputs.z is not None):
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            z = None if inputs.z is None else strided(inputs.z)
            ungated = torch.empty_like(y) if keep and z is not None else None
            rows = config.chunk // config.rows
            per_program = heads_per_program(ratio, batch * chunks * groups * rows)
            launch(
            kernel.scan, batch * chunks * groups * -(-ratio // per_program) * rows,
                x, B, C, step, cumulative, runs, states, inputs.D, z, y, ungated,
                length, heads, ratio, chunks, per_program,
                *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *((0, 0, 0) if z is None else z.stride()[:3]),
                P=headdim, N=d_state, L=config.chunk, BM=config.rows,
                D_RANK=0 if inputs.D is None else inputs.D.ndim, GATED=z is not None,
                KEEP_UNGATED=ungated is not None, PACKED=packed, RAGGED=ragged,
                PRECISION=config.precision, STAGES=config.scan_stages, num_warps=config.scan_warps,
            )  # fmt: skip
    saved = SSDSaved(inputs, config, step, cumulative, runs, states, ungated)
    return (y if output else None), final_state, saved


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


def _type(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype
