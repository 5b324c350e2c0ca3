"""Running a Mamba-2 layer, and the block around it, as one operator that keeps little for its backward.

That is only possible where nothing hangs on the modules inside: whoever hooks, parametrises or replaces one of them
(LoRA, say) gets the layer made of separate operators, which are the same kernels and keep more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from magc.errors import LayerContractError
from magc.nn import segments
from magc.nn.linear import Linear
from magc.nn.mamba2_values import Mamba2State
from magc.nn.norm import AddRMSNorm, GatedRMSNorm
from magc.nn.operators import operators
from magc_kernels._precision import autocast_type
from magc_kernels.mamba2.values import Mamba2Inputs, Mamba2Sizes, Mamba2Weights

if TYPE_CHECKING:
    from magc.nn.mamba2 import Mamba2

_PLAIN = frozenset({Linear, nn.Linear, nn.Conv1d, AddRMSNorm, GatedRMSNorm})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[object]:
    """Hooks that calling the module would run."""
    return [hook for kind in _HOOKS for hook in vars(module)[kind].values()]


def hooked(module: nn.Module) -> bool:
    """Whether calling the module would run hooks of its own."""
    return any(vars(module).get(hooks) for hooks in _HOOKS)


def taps_of(conv: nn.Module, name: str = "conv1d") -> tuple[Tensor, Tensor | None]:
    """Weight `(channels, width)` and bias of a depthwise convolution, which operators take in place of the module.

    Args:
        conv: the module.
        name: how errors name it.

    Raises:
        LayerContractError: it is something else (LoRA around a convolution, say), of which this would be a part only.
    """
    if not isinstance(conv, nn.Conv1d):
        raise LayerContractError(
            f"{name} is a {type(conv).__name__}, of which the operators would take the weight and nothing else. Leave it an "
            f"nn.Conv1d: LoRA belongs on the projections (in_proj, x_proj, dt_proj, out_proj)"
        )
    return conv.weight.squeeze(1), conv.bias


def is_plain(*modules: nn.Module | None) -> bool:
    """Whether modules are of the classes that the operator stands for, and have no hooks."""
    return all(type(module) in _PLAIN and not hooked(module) for module in modules if module is not None)


def runs_fused(layer: Mamba2, x: Tensor, *around: nn.Module) -> bool:
    """Whether a segment of a layer runs as one operator; `around` are further modules it would stand for."""
    return (
        x.shape[1] > 1
        and layer.implementation(x.device, autocast_type(x) or x.dtype).name == "triton"
        and is_plain(layer.in_proj, layer.conv1d, layer.norm, layer.out_proj, *around)
    )


def run(
    layer: Mamba2,
    hidden: Tensor,
    state: Mamba2State | None,
    seq_idx: Tensor | None,
    block: tuple[AddRMSNorm, Tensor | None] | None = None,
    *,
    output_needed: bool,
) -> tuple[Tensor, Tensor | None, Mamba2State]:
    """Run one segment on the Triton kernels; see `magc_kernels.mamba2.autograd`.

    Args:
        layer: the layer.
        hidden: `(batch, length, d_model)`.
        state: as in `Mamba2.forward`.
        seq_idx: as in `Mamba2.forward`.
        block: the norm in front of the layer and the residual that it adds, if it is part of this.
        output_needed: see `magc.ambient.is_output_needed`.

    Returns:
        The output, the residual that comes out of the norm in front, and the new state.

    Raises:
        InputError, StateError: as `Mamba2.forward`. MissingExtraError: without the package `triton`.
    """
    operators("triton", hidden.device)  # says what to install if Triton is missing
    from magc_kernels.mamba2.autograd import mamba2

    segments.check_segment("Mamba2", hidden, layer.d_model, seq_idx)
    layer.check_state(state, hidden.shape[0], hidden.device, autocast_type(hidden) or hidden.dtype, seq_idx)
    norm, residual = (None, None) if block is None else block
    out = mamba2(
        Mamba2Inputs(
            hidden,
            _weights(layer, norm),
            _sizes(layer, norm),
            residual,
            None if state is None else state.conv,
            None if state is None else state.ssm,
            seq_idx,
            None if state is None else state.seq_idx,
            layer.configs,
        ),
        keep=layer.keep,
        output_needed=output_needed,
    )
    return out.y, out.residual, Mamba2State(out.conv_state, out.ssm_state, segments.last_document(seq_idx))


def _weights(layer: Mamba2, norm: AddRMSNorm | None) -> Mamba2Weights:
    return Mamba2Weights(
        in_proj=layer.in_proj.weight,
        conv=layer.conv1d.weight,
        dt_bias=layer.dt_bias,
        A_log=layer.A_log,
        D=layer.D,
        out_proj=layer.out_proj.weight,
        in_bias=layer.in_proj.bias,
        conv_bias=layer.conv1d.bias,
        norm=None if layer.norm is None else layer.norm.weight,
        out_bias=layer.out_proj.bias,
        block_norm=None if norm is None else norm.weight,
    )


def _sizes(layer: Mamba2, norm: AddRMSNorm | None) -> Mamba2Sizes:
    sizes = Mamba2Sizes(layer.headdim, layer.ngroups, layer.d_state, layer.dt_limit, layer.chunk_size)
    if layer.norm is not None:
        sizes = replace(sizes, norm_eps=layer.norm.eps, norm_before_gate=layer.norm.norm_before_gate)
    if norm is not None:
        sizes = replace(sizes, block_norm_eps=norm.eps, residual_in_fp32=norm.residual_in_fp32)
    return sizes
