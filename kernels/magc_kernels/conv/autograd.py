"""Causal depthwise convolution on Triton kernels: forward and vector-Jacobian product, and autograd on top.

`causal_conv1d` takes and returns what `reference.causal_conv1d` does. `forward` and `vjp` know nothing of
autograd; nothing but the inputs is kept between them. Requires the package `triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magc_kernels._packing import document_runs
from magc_kernels._triton import cdiv, check_supported, launch, on_device, refuse_double_backward
from magc_kernels._triton import rows as strided
from magc_kernels.conv import kernel
from magc_kernels.conv.reference import Activation
from magc_kernels.conv.reference import check as check_arguments


@dataclass(frozen=True)
class ConvConfig:
    """Tokens and channels of one program, and its warps."""

    forward_tokens: int = 64
    backward_tokens: int = 64
    channels: int = 128
    warps: int = 1


CONFIG = ConvConfig()


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
    x = strided(inputs.x)
    batch, length, channels = x.shape
    width = inputs.weight.shape[1]
    blocks = cdiv(length, CONFIG.forward_tokens)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_state = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=x.device)
    state = inputs.initial_state
    with on_device(x.device):
        runs = _runs(inputs)
        launch(
            kernel.conv_forward, batch * blocks * cdiv(channels, CONFIG.channels),
            x, inputs.weight.contiguous(), inputs.bias, None if state is None else state.contiguous(), runs,
            y, new_state, length, blocks, channels, *x.stride()[:2],
            W=width, BT=CONFIG.forward_tokens, BC=CONFIG.channels,
            HAS_BIAS=inputs.bias is not None, SILU=inputs.activation == "silu", HAS_STATE=state is not None,
            PACKED=runs is not None, num_warps=CONFIG.warps,
        )  # fmt: skip
    return y, new_state


def vjp(
    inputs: ConvInputs, dy: Tensor, dnew_state: Tensor | None = None, *, out: Tensor | None = None
) -> ConvGradients:
    """Gradients of all inputs.

    Args:
        inputs: of the forward.
        dy: gradient of the output, shaped as `x`.
        dnew_state: gradient of the new state, `(batch, width - 1, channels)`; None for zeros.
        out: where to write the gradient of `x`, with stride 1 in the last axis, for example a view of the
            projection's gradient; None to allocate.
    """
    x, dy = strided(inputs.x), strided(dy)
    batch, length, channels = x.shape
    width = inputs.weight.shape[1]
    blocks = cdiv(length + width - 1, CONFIG.backward_tokens)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    state, bias = inputs.initial_state, inputs.bias
    dstate = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    dweight = torch.empty(batch * blocks, width, channels, dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty(batch * blocks, channels, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        runs = _runs(inputs)
        launch(
            kernel.conv_backward, batch * blocks * cdiv(channels, CONFIG.channels),
            x, inputs.weight.contiguous(), bias, None if state is None else state.contiguous(), runs,
            dy, None if dnew_state is None else dnew_state.contiguous(), dx, dstate, dweight, dbias,
            length, blocks, channels, *x.stride()[:2], *dy.stride()[:2], *dx.stride()[:2],
            W=width, BT=CONFIG.backward_tokens, BC=CONFIG.channels,
            HAS_BIAS=bias is not None, SILU=inputs.activation == "silu", HAS_STATE=state is not None,
            HAS_DNEW_STATE=dnew_state is not None, PACKED=runs is not None, num_warps=CONFIG.warps,
        )  # fmt: skip
        return ConvGradients(
            x=dx,
            weight=dweight.sum(0).T.flip(1).to(inputs.weight.dtype).contiguous(),
            bias=None if dbias is None or bias is None else dbias.sum(0).to(bias.dtype),
            initial_state=dstate,
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.causal_conv1d`, differentiable once, on a CUDA device and for float32, float16 and bfloat16.

    Raises:
        ValueError, TypeError: as `reference.causal_conv1d`, or for another device or type.
    """
    tensors = (x, weight, bias, initial_state)
    options = (seq_idx, prev_seq_idx, activation)
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


def _runs(inputs: ConvInputs) -> Tensor | None:
    """The run of each row of the window, 0 for the state's."""
    if inputs.seq_idx is None:
        return None
    runs_BL = document_runs(inputs.seq_idx, inputs.prev_seq_idx)
    return torch.nn.functional.pad(runs_BL, (inputs.weight.shape[1] - 1, 0)).to(torch.int32)


def _check(inputs: ConvInputs) -> None:
    x = inputs.x
    check_arguments(x, inputs.weight, inputs.bias, inputs.activation, inputs.initial_state)
    if inputs.prev_seq_idx is not None and inputs.seq_idx is None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
    if inputs.seq_idx is not None and inputs.seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx must have shape {tuple(x.shape[:2])}, got {tuple(inputs.seq_idx.shape)}")
    check_supported("convolution", x.dtype, vars(inputs).values())
