"""The Mamba-2 layer on Triton kernels with a lean recompute, and autograd on top. Requires the package `triton`.

A layer made of separate operators keeps every operator's inputs for its backward. Here the backward gets by with the
projection's output, the chunk states of the scan and the float32 residual (which is the next layer's input anyway); it
runs the norm, the convolution and the scan's output again, each of which costs little beside the four products:

    kept, bytes per token at the shape of Mamba-2 2.7B, bf16    projection 21,152   residual 10,240
    "projection"   nothing else
    "states"       chunk states and steps of the scan           + 10,880
    "outputs"      and the outputs of convolution and scan      + 20,992

`forward`, `recompute` and `vjp` know nothing of autograd and can be captured in a CUDA graph. The normalised inputs of
both projections come out of the norms' backward kernels in passing, in time for the weight gradients, which are added to
float32 sums inside the products (see `magc_kernels._accumulate`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels._accumulate import deliver
from magc_kernels._precision import autocast_off, autocast_type
from magc_kernels._triton import refuse_double_backward
from magc_kernels.configs import ConvShape, NormShape, SSDShape
from magc_kernels.conv import autograd as conv
from magc_kernels.linear.autograd import cast, weight_vjp
from magc_kernels.mamba2.values import Keep, Mamba2Inputs, Mamba2Outputs, Mamba2Sizes, Mamba2Weights, check
from magc_kernels.norm import autograd as norm
from magc_kernels.norm._config import NormConfig
from magc_kernels.ssd import autograd as ssd


@dataclass(frozen=True)
class ScanKept:
    """The part of `ssd.SSDSaved` that is not the scan's inputs; see there."""

    config: ssd.SSDConfig
    step: Tensor
    cumulative: Tensor
    runs: Tensor | None
    states: Tensor
    ungated: Tensor | None


@dataclass(frozen=True)
class Mamba2Saved:
    """What `vjp` needs of a recompute."""

    inputs: Mamba2Inputs
    """With a `total`, only the types and shapes of `hidden` and `residual` matter."""
    dtype: torch.dtype | None
    """Of the products, under autocast."""
    projection: Tensor
    total: Tensor | None
    """What the norm in front saw, in float32; None without one, or where it is no float32 sum."""
    scan: ScanKept | None
    conv_output: Tensor | None
    scan_output: Tensor | None


@dataclass(frozen=True)
class Mamba2Gradients:
    """Gradients of `Mamba2Inputs`; None where there is none to have, or where it was added to the weight's sum."""

    hidden: Tensor | None
    residual: Tensor | None
    conv_state: Tensor | None
    ssm_state: Tensor | None
    weights: dict[str, Tensor | None]


def forward(inputs: Mamba2Inputs) -> Mamba2Outputs:
    """One segment. Raises as `reference.mamba2` and the Triton operators."""
    outputs, _ = recompute(inputs, keep=None)
    return outputs


def recompute(
    inputs: Mamba2Inputs, *, keep: Keep | None = "states", output: bool = True
) -> tuple[Mamba2Outputs, Mamba2Saved]:
    """As `forward`, bit for bit, keeping what `vjp` needs.

    Args:
        inputs: the inputs of the forward.
        keep: how much to keep; None for nothing, when there is no `vjp` to come.
        output: False skips what only the output needs, that is the gated norm, the last product and, unless it is
            kept, the scan's output; `y` is then NaN everywhere, without memory of its own.
    """
    check(inputs)
    weights, sizes, dtype = inputs.weights, inputs.sizes, autocast_type(inputs.hidden)
    with torch.no_grad(), autocast_off(inputs.hidden.device):
        normed, residual = inputs.hidden, None
        if weights.block_norm is not None:
            normed, residual = norm.add_forward(
                inputs.hidden,
                inputs.residual,
                weights.block_norm,
                eps=sizes.block_norm_eps,
                residual_in_fp32=sizes.residual_in_fp32,
                config=_block_norm_config(inputs),
            )
        projection = _linear(normed, weights.in_proj, weights.in_bias, dtype)
        del normed
        z_mlp, x_mlp, z, _, _ = projection.split(sizes.split(weights), dim=-1)
        xBC, conv_state = conv.forward(_conv_inputs(inputs, projection))
        scan_inputs = _scan_inputs(inputs, projection, xBC)
        scan = None
        if keep is None:
            y, ssm_state = ssd.forward(scan_inputs)
        else:
            scan_needed = output or keep == "outputs"
            scan_inputs = scan_inputs if scan_needed else replace(scan_inputs, z=None)
            y, ssm_state, scan = ssd.recompute(scan_inputs, output=scan_needed)
        hidden = projection.new_full((), torch.nan).expand(inputs.hidden.shape)
        if output:
            assert y is not None
            inner = _mlp(z_mlp, x_mlp, _gate(inputs, y.flatten(-2), z))
            hidden = _linear(inner, weights.out_proj, weights.out_bias, dtype)
        float32_total = residual is not None and residual.dtype == torch.float32
        return Mamba2Outputs(hidden, residual, conv_state, ssm_state), Mamba2Saved(
            inputs,
            dtype,
            projection,
            total=residual if float32_total else None,
            scan=None if scan is None or keep == "projection" else _kept(scan, ungated=keep == "outputs"),
            conv_output=xBC if keep == "outputs" else None,
            scan_output=y if keep == "outputs" else None,
        )


def vjp(
    saved: Mamba2Saved,
    dy: Tensor | None,
    dresidual: Tensor | None = None,
    dconv_state: Tensor | None = None,
    dssm_state: Tensor | None = None,
    *,
    input_grads: bool = True,
) -> Mamba2Gradients:
    """Gradients of all inputs and of the weights that require one.

    Args:
        saved: of the recompute.
        dy: gradient of the output, `(B, L, D)`; likewise for the others. None for zeros.
        dresidual: of the residual.
        dconv_state: of the new convolution state.
        dssm_state: of the new state of the scan.
        input_grads: False leaves out those of `hidden` and `residual` where they cost something.
    """
    inputs, weights, sizes = saved.inputs, saved.inputs.weights, saved.inputs.sizes
    projection = saved.projection
    with torch.no_grad(), autocast_off(projection.device):
        dy = torch.zeros_like(inputs.hidden, dtype=projection.dtype) if dy is None else dy.to(projection.dtype)
        parts = sizes.split(weights)
        z_mlp, x_mlp, z, _, _ = projection.split(parts, dim=-1)
        dprojection = torch.empty_like(projection)
        dz_mlp, dx_mlp, dz, dxBC_in, ddt = dprojection.split(parts, dim=-1)
        grads: dict[str, Tensor | None] = {}

        scan_output, scan, conv_inputs = _scan_again(saved)
        dinner = dy @ cast(weights.out_proj, saved.dtype)
        dscan = dinner[..., parts[0] :]
        if weights.norm is not None:
            gated = norm.gated_vjp(
                scan_output.flatten(-2), z, weights.norm, dscan, **_norm_options(inputs, z.dtype), dz_out=dz, output=True,
                float32_weights=True,
            )  # fmt: skip
            grads["norm"] = _deliver(weights.norm, gated.weight)
            dscan, inner = gated.x, gated.y
        else:
            inner = scan_output.flatten(-2)
        assert inner is not None
        inner = _mlp(z_mlp, x_mlp, inner)
        if parts[0]:
            _mlp_vjp(z_mlp, x_mlp, dinner[..., : parts[0]], dz_mlp, dx_mlp)
        grads["out_proj"], grads["out_bias"] = weight_vjp(inner, weights.out_proj, weights.out_bias, dy)
        del inner, scan_output, dinner

        dxBC = torch.empty(conv_inputs.x.shape, dtype=projection.dtype, device=projection.device)
        dx, dB, dC = dxBC.split(sizes.split_conv(weights), dim=-1)
        through = ssd.vjp(
            scan,
            dscan.unflatten(-1, (-1, sizes.headdim)),
            dssm_state,
            out=(dx.unflatten(-1, (-1, sizes.headdim)), _by_group(sizes, dB), _by_group(sizes, dC)),
            ddt_out=ddt,
            float32_weights=True,
        )
        if through.z is not None:
            dz.copy_(through.z.flatten(-2))
        grads["A_log"] = _deliver(weights.A_log, through.A * scan.inputs.A)  # dA/dA_log = A
        grads["D"] = _deliver(weights.D, through.D)
        grads["dt_bias"] = _deliver(weights.dt_bias, through.dt_bias)
        del dscan, scan

        before = conv.vjp(conv_inputs, dxBC, dconv_state, out=dxBC_in, float32_weights=True)
        grads["conv"] = _deliver(weights.conv, before.weight)
        grads["conv_bias"] = _deliver(weights.conv_bias, before.bias)
        del dxBC

        hidden, residual, normed = None, None, inputs.hidden
        if weights.block_norm is not None:
            added = _add_vjp(saved, dprojection @ cast(weights.in_proj, saved.dtype), dresidual)
            grads["block_norm"] = _deliver(weights.block_norm, added.weight)
            hidden, residual, normed = added.x, added.residual, added.y
        elif input_grads:
            hidden = dprojection @ cast(weights.in_proj, saved.dtype)
        assert normed is not None
        grads["in_proj"], grads["in_bias"] = weight_vjp(
            cast(normed, saved.dtype), weights.in_proj, weights.in_bias, dprojection
        )
        return Mamba2Gradients(
            None if hidden is None else hidden.to(inputs.hidden.dtype),
            residual if inputs.residual is not None else None,
            before.initial_state,
            through.initial_state,
            grads,
        )


def mamba2(inputs: Mamba2Inputs, *, keep: Keep = "states", output_needed: bool = True) -> Mamba2Outputs:
    """As `reference.mamba2`, differentiable once, with the limits of the Triton operators.

    Args:
        inputs: one segment's inputs.
        keep: how much to keep for the backward.
        output_needed: False says that nobody will read `y`, only back-propagate through it.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be one of {', '.join(map(repr, get_args(Keep)))}, got {keep!r}")
    tensors = _tensors(inputs)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return forward(inputs)
    y, residual, conv_state, ssm_state = _Mamba2.apply(inputs, keep, output_needed, *tensors)
    return Mamba2Outputs(y, residual, conv_state, ssm_state)


_WEIGHTS = tuple(field.name for field in fields(Mamba2Weights))
_SCAN_TENSORS = tuple(field.name for field in fields(ScanKept) if field.name != "config")


class _Mamba2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Mamba2Inputs, keep: Keep, output_needed: bool, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        outputs, saved = recompute(inputs, keep=keep, output=output_needed)
        stream = tensors[:2]
        if saved.total is not None:
            stream = (_placeholder(inputs.hidden), _placeholder(inputs.residual))
        scan = () if saved.scan is None else tuple(getattr(saved.scan, name) for name in _SCAN_TENSORS)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *stream, *tensors[2:], inputs.seq_idx, inputs.prev_seq_idx,
            saved.projection, saved.total, saved.conv_output, saved.scan_output, *scan,
        )  # fmt: skip
        ctx.weights, ctx.sizes, ctx.configs, ctx.dtype = inputs.weights, inputs.sizes, inputs.configs, saved.dtype
        ctx.config = None if saved.scan is None else saved.scan.config
        return outputs.y, outputs.residual, outputs.conv_state, outputs.ssm_state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        # Saving the weights has their versions checked; the parameters themselves know their sums.
        hidden, residual, conv_state, ssm_state, *rest = ctx.saved_tensors
        seq_idx, prev_seq_idx, projection, total, conv_output, scan_output, *scan = rest[len(_WEIGHTS) :]
        inputs = Mamba2Inputs(
            hidden, ctx.weights, ctx.sizes, residual, conv_state, ssm_state, seq_idx, prev_seq_idx, ctx.configs
        )
        kept = None if ctx.config is None else ScanKept(ctx.config, *scan)
        need_hidden, need_residual, need_conv, need_ssm = ctx.needs_input_grad[3:7]
        d = vjp(
            Mamba2Saved(inputs, ctx.dtype, projection, total, kept, conv_output, scan_output),
            *grads,
            input_grads=need_hidden or need_residual,
        )
        return (
            None, None, None, d.hidden, d.residual, d.conv_state if need_conv else None,
            d.ssm_state if need_ssm else None, *(d.weights.get(name) for name in _WEIGHTS),
        )  # fmt: skip


def _tensors(inputs: Mamba2Inputs) -> list[Tensor | None]:
    weights = [getattr(inputs.weights, name) for name in _WEIGHTS]
    return [inputs.hidden, inputs.residual, inputs.conv_state, inputs.ssm_state, *weights]


def _placeholder(x: Tensor | None) -> Tensor | None:
    """NaN of the shape and type of `x`, without memory of its own."""
    return None if x is None else x.new_full((), torch.nan).expand(x.shape)


def _kept(scan: ssd.SSDSaved, *, ungated: bool) -> ScanKept:
    return ScanKept(scan.config, scan.step, scan.cumulative, scan.runs, scan.states, scan.ungated if ungated else None)


def _scan_again(saved: Mamba2Saved) -> tuple[Tensor, ssd.SSDSaved, conv.ConvInputs]:
    """The scan's output, what its backward needs, and the inputs of the convolution before it."""
    conv_inputs = _conv_inputs(saved.inputs, saved.projection)
    xBC = conv.forward(conv_inputs)[0] if saved.conv_output is None else saved.conv_output
    inputs = _scan_inputs(saved.inputs, saved.projection, xBC)
    if saved.scan is None:
        y, _, scan = ssd.recompute(inputs)
        assert y is not None
        return y, scan, conv_inputs
    kept = saved.scan
    scan = ssd.SSDSaved(inputs, kept.config, kept.step, kept.cumulative, kept.runs, kept.states, kept.ungated)
    if saved.scan_output is not None:
        return saved.scan_output, scan, conv_inputs
    return *ssd.output(scan), conv_inputs


def _conv_inputs(inputs: Mamba2Inputs, projection: Tensor) -> conv.ConvInputs:
    shape = ConvShape(projection.dtype, inputs.weights.conv.shape[-1])
    config = None if inputs.configs is None else inputs.configs.conv.get(shape)
    return conv.ConvInputs(
        projection.split(inputs.sizes.split(inputs.weights), dim=-1)[3],
        inputs.weights.conv.detach().squeeze(1),
        None if inputs.weights.conv_bias is None else inputs.weights.conv_bias.detach(),
        inputs.conv_state,
        inputs.seq_idx,
        inputs.prev_seq_idx,
        "silu",
        config,
    )


def _scan_inputs(inputs: Mamba2Inputs, projection: Tensor, xBC: Tensor) -> ssd.SSDInputs:
    weights, sizes = inputs.weights, inputs.sizes
    _, _, z, _, dt = projection.split(sizes.split(weights), dim=-1)
    x, B, C = xBC.split(sizes.split_conv(weights), dim=-1)
    heads = (weights.dt_bias.shape[0], sizes.headdim)
    shape = SSDShape(projection.dtype, sizes.headdim, sizes.d_state)
    return ssd.SSDInputs(
        x.unflatten(-1, heads),
        dt,
        -torch.exp(weights.A_log.detach().to(torch.float32)),
        _by_group(sizes, B),
        _by_group(sizes, C),
        D=weights.D.detach() if weights.D.numel() == heads[0] else weights.D.detach().view(heads),
        z=z.unflatten(-1, heads) if weights.norm is None else None,
        dt_bias=weights.dt_bias.detach(),
        initial_state=inputs.ssm_state,
        seq_idx=inputs.seq_idx,
        prev_seq_idx=inputs.prev_seq_idx,
        dt_softplus=True,
        dt_limit=sizes.dt_limit,
        chunk_size=sizes.chunk_size,
        config=None if inputs.configs is None else inputs.configs.ssd.get(shape),
    )


def _by_group(sizes: Mamba2Sizes, x: Tensor) -> Tensor:
    return x.unflatten(-1, (sizes.groups, sizes.d_state))


def _norm_options(inputs: Mamba2Inputs, dtype: torch.dtype) -> dict[str, Any]:
    assert inputs.weights.norm is not None
    group_size = inputs.weights.norm.shape[0] // inputs.sizes.groups
    return {
        "eps": inputs.sizes.norm_eps,
        "group_size": group_size,
        "norm_before_gate": inputs.sizes.norm_before_gate,
        "config": None if inputs.configs is None else inputs.configs.norm.get(NormShape(dtype, group_size)),
    }


def _block_norm_config(inputs: Mamba2Inputs) -> NormConfig | None:
    shape = NormShape(inputs.hidden.dtype, inputs.hidden.shape[-1])
    return None if inputs.configs is None else inputs.configs.norm.get(shape)


def _gate(inputs: Mamba2Inputs, y: Tensor, z: Tensor) -> Tensor:
    weight = inputs.weights.norm
    return y if weight is None else norm.gated_forward(y, z, weight, **_norm_options(inputs, y.dtype))


def _mlp(z: Tensor, x: Tensor, inner: Tensor) -> Tensor:
    """The scan's part of the last product's input, behind that of the MLP, if there is one."""
    return torch.cat([functional.silu(z) * x, inner], dim=-1) if z.shape[-1] else inner


def _mlp_vjp(z: Tensor, x: Tensor, dy: Tensor, dz: Tensor, dx: Tensor) -> None:
    gate = torch.sigmoid(z)
    torch.mul(dy, gate * z, out=dx)
    torch.mul(dy * x, gate * (1 + z * (1 - gate)), out=dz)


def _add_vjp(saved: Mamba2Saved, dnormed: Tensor, dresidual: Tensor | None) -> norm.AddGradients:
    inputs = saved.inputs
    weight = inputs.weights.block_norm
    assert weight is not None
    options: dict[str, Any] = {
        "eps": inputs.sizes.block_norm_eps,
        "output": True,
        "y_dtype": inputs.hidden.dtype,
        "float32_weights": True,
        "config": _block_norm_config(inputs),
    }
    if saved.total is None:
        return norm.add_vjp(inputs.hidden, inputs.residual, weight, dnormed, dresidual, **options)
    return norm.add_vjp(
        saved.total,
        None,
        weight,
        dnormed,
        dresidual,
        residual_dtype=None if inputs.residual is None else inputs.residual.dtype,
        x_dtype=inputs.hidden.dtype,
        **options,
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return functional.linear(cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))


def _deliver(weight: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return deliver(weight, grad) if weight is not None and weight.requires_grad else None
