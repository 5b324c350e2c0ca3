"""Mamba-1 selective scan on Triton kernels: forward, recompute and vector-Jacobian product, and autograd on top.

`selective_scan` takes and returns what `reference.selective_scan` does. `forward`, `recompute` and `vjp` do the work
and know nothing of autograd: an engine that recomputes segments calls them directly, and all three can be captured in
a CUDA graph. Requires the package `triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._packing import document_runs
from magc_kernels._triton import capability, cdiv, check_supported, launch, on_device, refuse_double_backward
from magc_kernels._triton import rows as strided
from magc_kernels.selective_scan import _kernel_backward as backward_kernels
from magc_kernels.selective_scan import kernel
from magc_kernels.selective_scan._config import SelectiveScanConfig, selective_scan_config
from magc_kernels.selective_scan.reference import check as check_arguments

_LOG2E = 1.4426950408889634
_PASS_BLOCK = 128
"""States per program of `pass_states`."""


@dataclass(frozen=True)
class SelectiveScanInputs:
    """Inputs of one segment. Shapes as in `reference.selective_scan`."""

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
    config: SelectiveScanConfig | None = None
    """None: the shipped one, `selective_scan_config`."""


@dataclass(frozen=True)
class SelectiveScanSaved:
    """What `vjp` needs of a recompute besides the inputs."""

    inputs: SelectiveScanInputs
    config: SelectiveScanConfig
    runs: Tensor | None
    """`(batch, 1 + length)` int32: number of document changes so far, 0 first."""
    states: Tensor
    """State before each chunk, `(batch, chunks, groups, panels, d_state, 32)` float32: `panels` times 32 channels of
    each group, the last ones padding."""


@dataclass(frozen=True)
class SelectiveScanGradients:
    """Gradients of `SelectiveScanInputs`, typed and shaped as the inputs but for `float32_weights`; `initial_state` is
    float32 and always there.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor


def forward(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    """Output, typed as `x`, and final state, float32. Raises as `reference.selective_scan`, and as
    `selective_scan_config`.
    """
    y, final_state, _ = recompute(inputs)
    assert y is not None
    return y, final_state


def recompute(inputs: SelectiveScanInputs, *, output: bool = True) -> tuple[Tensor | None, Tensor, SelectiveScanSaved]:
    """As `forward`, bit for bit, keeping what `vjp` needs.

    Args:
        inputs: the inputs of the forward.
        output: False skips the output, half of the work, and returns None for it.
    """
    _check(inputs)
    x, dt, z = strided(inputs.x), strided(inputs.dt), _strided(inputs.z)
    batch, length, channels = x.shape
    groups, d_state = inputs.B.shape[2:]
    ratio = channels // groups
    config = selective_scan_config(d_state, capability=capability(x.device), config=inputs.config)
    chunks = cdiv(length, config.chunk)
    rows = batch * chunks * groups
    float32 = {"dtype": torch.float32, "device": x.device}

    with on_device(x.device):
        runs = _runs(inputs.seq_idx, inputs.prev_seq_idx) if inputs.seq_idx is not None else None
        B, rate = _rows32(inputs.B), _rate(inputs.A, groups, config.width)
        sizes = (rate.shape[1], rate.stride(1))
        states = torch.empty(batch, chunks, *rate.shape, **float32)
        steps = torch.empty(batch, chunks, *rate.shape[:2], 32, **float32)
        launch(
            kernel.added_states, rows * sizes[0] * 32 // (config.added_rows * config.lanes),
            x, dt, B, rate, inputs.dt_bias, runs, states, steps,
            length, channels, ratio, chunks, *sizes, *x.stride()[:2], *dt.stride()[:2], *B.stride()[:3],
            N=d_state, R=config.added_rows, W=config.lanes, L=config.chunk, T=config.added_tokens,
            HAS_BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.dt_softplus, PACKED=runs is not None, num_warps=1,
        )  # fmt: skip
        final_state = torch.empty(batch, channels, d_state, **float32)
        _pass(config, states, steps, rate, runs, inputs.initial_state, final_state, length, ratio, reverse=False)
        y = None
        if output:
            C = _rows32(inputs.C)
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            launch(
                kernel.scan, rows * cdiv(ratio, config.rows * config.lanes),
                x, dt, B, C, rate, inputs.dt_bias, runs, states, inputs.D, z, y,
                length, channels, ratio, chunks, *sizes, *x.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3],
                *_strides(z), *y.stride()[:2],
                N=d_state, R=config.rows, W=config.lanes, L=config.chunk, T=config.tokens,
                HAS_BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.dt_softplus, SKIP=inputs.D is not None,
                GATED=z is not None, PACKED=runs is not None, num_warps=1,
            )  # fmt: skip
    return y, final_state, SelectiveScanSaved(inputs, config, runs, states)


def vjp(
    saved: SelectiveScanSaved, dy: Tensor, dfinal_state: Tensor | None = None, *, float32_weights: bool = False
) -> SelectiveScanGradients:
    """Gradients of all inputs.

    Args:
        saved: of the recompute.
        dy: gradient of the output, shaped as `x`.
        dfinal_state: gradient of the final state, `(batch, channels, d_state)`; None for zeros.
        float32_weights: gradients of `A`, `D` and `dt_bias` in float32, as they were added up, whatever the types of
            these.
    """
    inputs, config, runs = saved.inputs, saved.config, saved.runs
    x, dt, z, dy = strided(inputs.x), strided(inputs.dt), _strided(inputs.z), strided(dy)
    batch, length, channels = x.shape
    groups, d_state = inputs.B.shape[2:]
    ratio = channels // groups
    chunks = saved.states.shape[1]
    options = {
        "HAS_BIAS": inputs.dt_bias is not None,
        "SOFTPLUS": inputs.dt_softplus,
        "GATED": z is not None,
        "PACKED": runs is not None,
    }
    float32 = {"dtype": torch.float32, "device": x.device}

    with on_device(x.device):
        B, C, rate = _rows32(inputs.B), _rows32(inputs.C), _rate(inputs.A, groups, config.width)
        sizes = (rate.shape[1], rate.stride(1))
        dstates = torch.empty_like(saved.states)
        steps = torch.empty(batch, chunks, *rate.shape[:2], 32, **float32)
        step = torch.empty(batch, length, channels, **float32)
        launch(
            backward_kernels.added_gradients,
            batch * chunks * groups * sizes[0] * 32 // (config.added_rows * config.lanes),
            dt, C, rate, inputs.dt_bias, runs, z, dy, dstates, steps, step,
            length, channels, ratio, chunks, *sizes, *dt.stride()[:2], *C.stride()[:3], *_strides(z), *dy.stride()[:2],
            N=d_state, R=config.added_rows, W=config.lanes, L=config.chunk, T=config.added_tokens, num_warps=1, **options,
        )  # fmt: skip
        dinitial = torch.empty(batch, channels, d_state, **float32)
        _pass(config, dstates, steps, rate, runs, dfinal_state, dinitial, length, ratio, reverse=True)

        width = config.backward_rows * config.backward_lanes
        splits = cdiv(cdiv(ratio, width), config.share)
        items = batch * chunks * groups * splits
        programs = min(items, config.programs)
        aside = torch.empty(programs, config.chunk // config.block * d_state * max(32, width), **float32)
        dx, ddt = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, dt))
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
        dB_parts = torch.empty(splits, *B.shape, **float32)
        dC_parts = torch.empty_like(dB_parts)
        drate_parts = torch.empty_like(saved.states)
        dskip_parts = torch.empty_like(steps) if inputs.D is not None else None
        dbias_parts = torch.empty_like(steps) if inputs.dt_bias is not None else None
        launch(
            backward_kernels.scan_backward, programs,
            x, dt, B, C, rate, inputs.dt_bias, runs, inputs.D, z, dy, step, saved.states, dstates, aside,
            dx, ddt, dz, dB_parts, dC_parts, drate_parts, dskip_parts, dbias_parts,
            items, B.numel(), aside.shape[1], length, channels, ratio, chunks, *sizes, splits,
            *x.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3], *_strides(z), *dy.stride()[:2],
            N=d_state, R=config.backward_rows, W=config.backward_lanes, L=config.chunk, T=config.block,
            SHARE=config.share, SKIP=inputs.D is not None, num_warps=1, **options,
        )  # fmt: skip
        dA = _channels(drate_parts.sum((0, 1)).transpose(2, 3), ratio)

        def weight(parts: Tensor | None, of: Tensor | None) -> Tensor | None:
            if parts is None or of is None:
                return None
            total = _channels(parts.sum((0, 1)), ratio)
            return total if float32_weights else total.to(of.dtype)

        return SelectiveScanGradients(
            x=dx,
            dt=ddt,
            A=dA if float32_weights else dA.to(inputs.A.dtype),
            B=dB_parts.sum(0).to(inputs.B.dtype),
            C=dC_parts.sum(0).to(inputs.C.dtype),
            D=weight(dskip_parts, inputs.D),
            z=dz,
            dt_bias=weight(dbias_parts, inputs.dt_bias),
            initial_state=dinitial,
        )


def selective_scan(
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
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    config: SelectiveScanConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, differentiable once, with these limits on its arguments.

    `x` is float32, float16 or bfloat16 and on a CUDA device, and d_state a power of two up to 256. All arithmetic is
    float32. There is no `chunk_size`: the kernels have one of their own, in `config` (None: the shipped one).

    Raises:
        ValueError, TypeError: as `reference.selective_scan`, or for what lies outside these limits.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    options = (seq_idx, prev_seq_idx, dt_softplus, config)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _SelectiveScan.apply(options, *tensors)
    return forward(SelectiveScanInputs(*tensors, *options))


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        y, final_state, saved = recompute(SelectiveScanInputs(*tensors, *options))
        assert y is not None
        ctx.save_for_backward(*tensors, saved.runs, saved.states)
        ctx.config = saved.config
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        dy, dfinal_state = grads
        *tensors, runs, states = ctx.saved_tensors
        inputs = SelectiveScanInputs(*tensors, *ctx.options)
        saved = SelectiveScanSaved(inputs, ctx.config, runs, states)
        d = vjp(saved, torch.zeros_like(inputs.x) if dy is None else dy, dfinal_state)
        state = inputs.initial_state
        dstate = None if state is None else d.initial_state.to(state.dtype)
        return (None, d.x, d.dt, d.A, d.B, d.C, d.D, d.z, d.dt_bias, dstate)


def _pass(
    config: SelectiveScanConfig,
    states: Tensor,
    steps: Tensor,
    rate: Tensor,
    runs: Tensor | None,
    first: Tensor | None,
    last: Tensor,
    length: int,
    ratio: int,
    *,
    reverse: bool,
) -> None:
    batch, chunks = states.shape[:2]
    channels, d_state = last.shape[1:]
    launch(
        kernel.pass_states, batch * cdiv(rate.numel(), _PASS_BLOCK),
        states, steps, rate, runs, None if first is None else first.contiguous(), last,
        length, channels, ratio, chunks, rate.shape[1],
        N=d_state, L=config.chunk, BLOCK=_PASS_BLOCK,
        HAS_FIRST=first is not None, REVERSE=reverse, PACKED=runs is not None,
    )  # fmt: skip


def _runs(seq_idx: Tensor, prev_seq_idx: Tensor | None) -> Tensor:
    runs_BL = document_runs(seq_idx, prev_seq_idx)
    return torch.cat([runs_BL.new_zeros(runs_BL.shape[0], 1), runs_BL], 1).to(torch.int32)


def _rate(A: Tensor, groups: int, width: int) -> Tensor:
    """`(groups, panels, d_state, 32)`, in units of log2, so that a decay is one `exp2`. Zeros pad a group's channels to
    a multiple of `width`.
    """
    A_GRN = (A.to(torch.float32) * _LOG2E).unflatten(0, (groups, -1))
    padded = functional.pad(A_GRN, (0, 0, 0, -A_GRN.shape[1] % width))
    return padded.unflatten(1, (-1, 32)).transpose(2, 3).contiguous()


def _channels(panels: Tensor, ratio: int) -> Tensor:
    """From `(groups, panels, 32, ...)` to `(channels, ...)`, without the padding."""
    return panels.flatten(1, 2)[:, :ratio].flatten(0, 1)


def _rows32(x: Tensor) -> Tensor:
    """Float32: B and C are a small part of the inputs, but all channels read them."""
    return strided(x.to(torch.float32))


def _strided(x: Tensor | None) -> Tensor | None:
    return None if x is None else strided(x)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def _check(inputs: SelectiveScanInputs) -> None:
    check_arguments(
        inputs.x,
        inputs.dt,
        inputs.A,
        inputs.B,
        inputs.C,
        inputs.D,
        inputs.z,
        inputs.dt_bias,
        inputs.initial_state,
        inputs.seq_idx,
        inputs.prev_seq_idx,
    )
    check_supported("selective scan", inputs.x.dtype, vars(inputs).values())
