"""Causal depthwise convolution on Triton kernels: forward and vector-Jacobian product, and autograd on top.

`causal_conv1d` takes and returns what `reference.causal_conv1d` does. `forward` and `vjp` know nothing of
autograd; nothing but the inputs is kept between them. Requires the package `triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magc_kernels._packing import check_seq_idx
from magc_kernels._sums import sum_parts
from magc_kernels._triton import capability, cdiv, check_supported, launch, on_device, refuse_double_backward
from magc_kernels._triton import rows as strided
from magc_kernels.conv import _kernel_backward, kernel
from magc_kernels.conv._config import ConvConfig, conv_config
from magc_kernels.conv.reference import Activation
from magc_kernels.conv.reference import check as check_arguments

_FARTHEST = 1 << 22
"""Stride from token to token whose multiples within a lane's walk fit 32 bits."""


@dataclass(frozen=True)
class ConvInputs:
    """Inputs of one segment. Shapes as in `reference.causal_conv1d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    initial_state: Tensor | None = None
    seq_idx: Tensor | None = None
    prev_seq_idx: Tensor | None = None
    activation: Activation | None = None
    config: ConvConfig | None = None
    """None: the shipped one, `conv_config`. No choice changes the forward by a bit."""


@dataclass(frozen=True)
class ConvGradients:
    """Gradients of `ConvInputs`, shaped and typed as the inputs; None where the input is."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None


def forward(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """Output, contiguous, and new state. Raises as `reference.causal_conv1d`; TypeError also for float64."""
    _check(inputs)
    x = _near(inputs.x)
    batch, length, channels = x.shape
    width = inputs.weight.shape[1]
    tile = _config(inputs).forward
    blocks = cdiv(length, tile.lanes * tile.run)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_state = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=x.device)
    state, ids, previous = inputs.initial_state, inputs.seq_idx, inputs.prev_seq_idx
    with on_device(x.device):
        launch(
            kernel.conv_forward, batch * blocks * cdiv(channels, tile.channels),
            x, inputs.weight.contiguous(), inputs.bias, None if state is None else state.contiguous(),
            ids, None if previous is None else previous.contiguous(), y, new_state,
            length, blocks, channels, *x.stride()[:2], *((0, 0) if ids is None else ids.stride()),
            W=width, LANES=tile.lanes, RUN=tile.run, BC=tile.channels, STAGES=tile.stages,
            HAS_BIAS=inputs.bias is not None, SILU=inputs.activation == "silu", HAS_STATE=state is not None,
            PACKED=ids is not None, HAS_PREVIOUS=previous is not None, num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip
    return y, new_state


def vjp(
    inputs: ConvInputs,
    dy: Tensor,
    dnew_state: Tensor | None = None,
    *,
    out: Tensor | None = None,
    float32_weights: bool = False,
) -> ConvGradients:
    """Gradients of all inputs.

    Args:
        inputs: of the forward.
        dy: gradient of the output, shaped as `x`.
        dnew_state: gradient of the new state, `(batch, width - 1, channels)`; None for zeros.
        out: where to write the gradient of `x`, with stride 1 in the last axis and at most 2^22 from token to
            token, for example a view of the projection's gradient; None to allocate.
        float32_weights: leave the gradients of weight and bias in float32, in which they are summed, instead of
            rounding them to their types, for whoever adds up several.
    """
    x, dy = _near(inputs.x), _near(dy)
    batch, length, channels = x.shape
    width = inputs.weight.shape[1]
    tile = _config(inputs).backward
    blocks = cdiv(length, tile.lanes * tile.run)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if dx.stride(1) > _FARTHEST:
        raise ValueError(f"out has tokens {dx.stride(1)} elements apart, at most {_FARTHEST} are taken")
    state, bias, ids, previous = inputs.initial_state, inputs.bias, inputs.seq_idx, inputs.prev_seq_idx
    dstate = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    columns = width + (bias is not None)
    parts = torch.empty(batch * blocks, columns, channels, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        launch(
            _kernel_backward.conv_backward, batch * blocks * cdiv(channels, tile.channels),
            x, inputs.weight.contiguous(), bias, None if state is None else state.contiguous(),
            ids, None if previous is None else previous.contiguous(),
            dy, None if dnew_state is None else dnew_state.contiguous(), dx, dstate, parts,
            length, blocks, channels, *x.stride()[:2], *dy.stride()[:2], *dx.stride()[:2],
            *((0, 0) if ids is None else ids.stride()),
            W=width, LANES=tile.lanes, RUN=tile.run, BC=tile.channels, STAGES=tile.stages,
            HAS_BIAS=bias is not None, SILU=inputs.activation == "silu", HAS_STATE=state is not None,
            HAS_DNEW_STATE=dnew_state is not None, PACKED=ids is not None, HAS_PREVIOUS=previous is not None,
            num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip
    dweight, dbias = sum_parts(parts, inputs.weight, bias, float32=float32_weights)
    return ConvGradients(dx, dweight, dbias, dstate)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.causal_conv1d`, differentiable once, on a CUDA device and for float32, float16 and bfloat16.

    Raises:
        ValueError, TypeError: as `reference.causal_conv1d`, or for another device or type.
    """
    tensors = (x, weight, bias, initial_state)
    options = (seq_idx, prev_seq_idx, activation, config)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Conv.apply(options, *tensors)
    return forward(ConvInputs(*tensors, *options))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return forward(ConvInputs(*tensors, *options))  # pyright: ignore[reportArgumentType]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        dy, dnew_state = grads
        inputs = ConvInputs(*ctx.saved_tensors, *ctx.options)
        d = vjp(inputs, torch.zeros_like(inputs.x) if dy is None else dy, dnew_state)
        return (None, d.x, d.weight, d.bias, d.initial_state)


def _near(x: Tensor) -> Tensor:
    """`x` with stride 1 in its last axis and `_FARTHEST` at most from token to token; a copy only if need be."""
    return strided(x) if x.stride(1) <= _FARTHEST else x.contiguous()


def _config(inputs: ConvInputs) -> ConvConfig:
    x = inputs.x
    return conv_config(x.dtype, inputs.weight.shape[1], capability=capability(x.device), config=inputs.config)


def _check(inputs: ConvInputs) -> None:
    x = inputs.x
    check_arguments(x, inputs.weight, inputs.bias, inputs.activation, inputs.initial_state)
    if inputs.prev_seq_idx is not None and inputs.seq_idx is None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
    if inputs.seq_idx is not None and inputs.seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx must have shape {tuple(x.shape[:2])}, got {tuple(inputs.seq_idx.shape)}")
    if inputs.seq_idx is not None:
        check_seq_idx(inputs.seq_idx, inputs.prev_seq_idx)
    check_supported("convolution", x.dtype, vars(inputs).values())
