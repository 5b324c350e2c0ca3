"""RMSNorm, gated RMSNorm and add + RMSNorm on Triton kernels, with autograd on top.

`rms_norm`, `gated_rms_norm` and `add_rms_norm` take and return what their namesakes in `reference` do. The
functions `gated_forward`, `gated_vjp`, `add_forward` and `add_vjp` know nothing of autograd. Requires the package
`triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magc_kernels._sums import sum_parts
from magc_kernels._triton import (
    capability,
    cdiv,
    check_supported,
    launch,
    next_power_of_2,
    on_device,
    refuse_double_backward,
)
from magc_kernels.norm import kernel
from magc_kernels.norm._config import NormConfig, norm_config
from magc_kernels.norm.reference import check as check_weight

MAX_GROUP_SIZE = 16384
"""Most features normalised together: they are held in registers."""


def gated_forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    config: NormConfig | None = None,
) -> Tensor:
    """Output, contiguous. Raises as `reference.gated_rms_norm`; TypeError also for float64, ValueError also for more
    than `MAX_GROUP_SIZE` features in a group.
    """
    size = _check_gated(x, z, weight, group_size)
    groups = weight.shape[0] // size
    x_RF, z_RF = _matrix(x), None if z is None else _matrix(z)
    config = norm_config(x.dtype, size, capability=capability(x.device), config=config)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x.device):
        launch(
            kernel.gated_forward, cdiv(x_RF.shape[0], config.forward_rows) * groups,
            x_RF, z_RF, weight, y, x_RF.shape[0], config.forward_rows, groups,
            x_RF.stride(0), 0 if z_RF is None else z_RF.stride(0), eps,
            SIZE=size, **_pieces(size, config), GATED=z is not None, NORM_FIRST=norm_before_gate,
            STAGES=config.forward_stages, num_warps=config.warps,
        )  # fmt: skip
    return y


@dataclass(frozen=True)
class GatedGradients:
    """Gradients of the inputs of `gated_rms_norm`, shaped and typed as they; `y` is the output if asked for."""

    x: Tensor
    z: Tensor | None
    weight: Tensor
    y: Tensor | None


def gated_vjp(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    dy: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    dz_out: Tensor | None = None,
    output: bool = False,
    float32_weights: bool = False,
    config: NormConfig | None = None,
) -> GatedGradients:
    """Gradients of all inputs.

    Args:
        x: input of the forward; likewise `z`, `weight`, `eps`, `group_size`, `norm_before_gate`.
        z: gate.
        weight: `(features,)`.
        dy: gradient of the output, shaped as `x`.
        eps: added to the mean square.
        group_size: features normalised together.
        norm_before_gate: as in the forward.
        dz_out: where to write the gradient of `z`: shaped as `z`, viewable as a matrix `(rows, features)` with
            stride 1 in a row, for example a slice of the projection's gradient. None to allocate.
        output: compute the forward's output again in the same pass, for whoever did not keep it.
        float32_weights: leave the weight's gradient in float32, in which it is summed, instead of rounding it to
            the weight's type, for whoever adds up several.
        config: launch configuration; None for the shipped one.
    """
    size = _check_gated(x, z, weight, group_size)
    features = weight.shape[0]
    groups = features // size
    x_RF, z_RF, dy_RF = _matrix(x), None if z is None else _matrix(z), _matrix(dy)
    rows = x_RF.shape[0]
    config = norm_config(x.dtype, size, capability=capability(x.device), config=config)
    per_program = cdiv(rows, config.backward_programs)
    programs = cdiv(rows, per_program)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device) if dz_out is None else dz_out
    dz_RF = None if dz is None else dz.view(rows, features)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if output else None
    parts = torch.empty(programs, 1, features, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        launch(
            kernel.gated_backward, programs * groups,
            x_RF, z_RF, weight, dy_RF, dx, dz, parts, y, rows, per_program, groups,
            x_RF.stride(0), 0 if z_RF is None else z_RF.stride(0), dy_RF.stride(0),
            features, 0 if dz_RF is None else dz_RF.stride(0), eps,
            SIZE=size, **_pieces(size, config), GATED=z is not None, NORM_FIRST=norm_before_gate,
            WRITE_Y=output, STAGES=config.backward_stages,
            num_warps=config.warps,
        )  # fmt: skip
    dweight, _ = sum_parts(parts, weight, None, float32=float32_weights)
    return GatedGradients(dx, dz, dweight, y)


def add_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual_in_fp32: bool = True,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and new residual, contiguous. Raises as `reference.add_rms_norm` and as `gated_forward`."""
    _check_add(x, residual, weight)
    x_RF, residual_RF = _matrix(x), None if residual is None else _matrix(residual)
    config = norm_config(x.dtype, weight.shape[0], capability=capability(x.device), config=config)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.float32 if residual_in_fp32 else x.dtype, device=x.device)
    with on_device(x.device):
        launch(
            kernel.add_forward, cdiv(x_RF.shape[0], config.forward_rows),
            x_RF, residual_RF, weight, y, total, x_RF.shape[0], config.forward_rows,
            x_RF.stride(0), 0 if residual_RF is None else residual_RF.stride(0), eps,
            SIZE=weight.shape[0], **_pieces(weight.shape[0], config),
            HAS_RESIDUAL=residual is not None, STAGES=config.forward_stages, num_warps=config.warps,
        )  # fmt: skip
    return y, total


@dataclass(frozen=True)
class AddGradients:
    """Gradients of the inputs of `add_rms_norm`, shaped and typed as they; `y` is the output if asked for."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    y: Tensor | None


def add_vjp(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    dy: Tensor,
    dtotal: Tensor | None = None,
    *,
    residual_dtype: torch.dtype | None = None,
    x_dtype: torch.dtype | None = None,
    eps: float = 1e-5,
    output: bool = False,
    y_dtype: torch.dtype | None = None,
    float32_weights: bool = False,
    config: NormConfig | None = None,
) -> AddGradients:
    """Gradients of all inputs.

    Args:
        x: input of the forward, or the float32 sum it returned, which is less to read; then without `residual`.
        residual: input of the forward.
        weight: `(features,)`.
        dy: gradient of the output.
        dtotal: gradient of the new residual; None for zeros.
        residual_dtype: type of the residual's gradient if `x` is the sum; None for no such gradient.
        x_dtype: type of the gradient of `x` if `x` is the sum.
        eps: added to the mean square.
        output: compute the normalised output again in the same pass, for whoever did not keep it.
        y_dtype: type of that output; None for that of the gradient of `x`.
        float32_weights: as in `gated_vjp`.
        config: as in `gated_vjp`.
    """
    _check_add(x, residual, weight)
    residual_dtype = residual.dtype if residual is not None else residual_dtype
    x_RF, residual_RF, dy_RF = _matrix(x), None if residual is None else _matrix(residual), _matrix(dy)
    dtotal_RF = None if dtotal is None else _matrix(dtotal)
    rows, features = x_RF.shape
    dx_dtype = x_dtype or x.dtype
    config = norm_config(dx_dtype, features, capability=capability(x.device), config=config)
    per_program = cdiv(rows, config.backward_programs)
    programs = cdiv(rows, per_program)
    dx = torch.empty(x.shape, dtype=dx_dtype, device=x.device)
    # One tensor serves both where their types agree.
    separate = residual_dtype is not None and residual_dtype != dx.dtype
    dresidual = torch.empty(x.shape, dtype=residual_dtype, device=x.device) if separate else None
    y = torch.empty(x.shape, dtype=y_dtype or dx.dtype, device=x.device) if output else None
    parts = torch.empty(programs, 1, features, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        launch(
            kernel.add_backward, programs,
            x_RF, residual_RF, weight, dy_RF, dtotal_RF, dx, dresidual, parts, y, rows, per_program,
            x_RF.stride(0), 0 if residual_RF is None else residual_RF.stride(0), dy_RF.stride(0),
            0 if dtotal_RF is None else dtotal_RF.stride(0), eps,
            SIZE=features, **_pieces(features, config), HAS_RESIDUAL=residual is not None,
            HAS_DTOTAL=dtotal is not None, WRITE_RESIDUAL=separate, WRITE_Y=output, STAGES=config.backward_stages,
            num_warps=config.warps,
        )  # fmt: skip
    if residual_dtype is not None and not separate:
        dresidual = dx
    dweight, _ = sum_parts(parts, weight, None, float32=float32_weights)
    return AddGradients(dx, dresidual, dweight, y)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, config: NormConfig | None = None) -> Tensor:
    """As `reference.rms_norm`, with the limits of `gated_rms_norm`."""
    return gated_rms_norm(x, None, weight, eps=eps, config=config)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    config: NormConfig | None = None,
) -> Tensor:
    """As `reference.gated_rms_norm`, differentiable once, on a CUDA device, for float32, float16 and bfloat16 and
    groups of at most `MAX_GROUP_SIZE` features.

    Raises:
        ValueError, TypeError: as `reference.gated_rms_norm`, or for what lies outside these limits.
    """
    tensors = (x, z, weight)
    options = {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate, "config": config}
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Gated.apply(options, *tensors)
    return gated_forward(*tensors, **options)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual_in_fp32: bool = True,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`, with the limits of `gated_rms_norm`."""
    tensors = (x, residual, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Add.apply(eps, residual_in_fp32, config, *tensors)
    return add_forward(*tensors, eps=eps, residual_in_fp32=residual_in_fp32, config=config)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], x: Tensor, z: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.options = options
        return gated_forward(x, z, weight, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, z, weight = ctx.saved_tensors
        d = gated_vjp(x, z, weight, grads[0], **ctx.options)
        return (None, d.x, d.z, d.weight)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        residual_in_fp32: bool,
        config: NormConfig | None,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, total = add_forward(x, residual, weight, eps=eps, residual_in_fp32=residual_in_fp32, config=config)
        ctx.set_materialize_grads(False)
        ctx.options = {"eps": eps, "config": config}
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.x_dtype = x.dtype
        ctx.holds_total = total.dtype == torch.float32
        ctx.save_for_backward(*((total, None) if ctx.holds_total else (x, residual)), weight)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        dy, dtotal = grads
        x, residual, weight = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros(x.shape, dtype=ctx.x_dtype, device=x.device)
        d = add_vjp(
            x, residual, weight, dy, dtotal, residual_dtype=ctx.residual_dtype, x_dtype=ctx.x_dtype, **ctx.options
        )
        return (None, None, None, d.x, d.residual, d.weight)


def _check_gated(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int | None) -> int:
    check_weight(x, weight)
    features = weight.shape[0]
    size = features if group_size is None else group_size
    if size < 1 or features % size:
        raise ValueError(f"group_size must divide the {features} features, got {group_size}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}")
    _check_limits(size, x, z, weight)
    return size


def _check_add(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    check_weight(x, weight)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    _check_limits(weight.shape[0], x, residual, weight)


def _check_limits(size: int, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            check_supported("norms", tensor.dtype, tensors)
    if size > MAX_GROUP_SIZE:
        raise ValueError(
            f"the Triton norms take at most {MAX_GROUP_SIZE} features in a group, got {size}; use impl='reference'"
        )


def _pieces(size: int, config: NormConfig) -> dict[str, int]:
    return {"PIECE": next_power_of_2(cdiv(size, config.pieces)), "PIECES": config.pieces}


def _matrix(x: Tensor) -> Tensor:
    """`x` as `(rows, features)` with stride 1 in a row; a copy only where no view is."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
