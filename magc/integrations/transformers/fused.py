"""A Mamba-2 mixer of transformers as one Triton operator, which keeps little for its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from magc.nn.fused import is_plain
from magc.nn.mamba2_values import Mamba2State
from magc.nn.operators import Impl, choose
from magc.nn.segments import last_document
from magc_kernels._precision import autocast_type
from magc_kernels.mamba2.values import Mamba2Inputs, Mamba2Sizes, Mamba2Weights


def runs_fused(mixer: Any, x_BLD: Tensor, impl: Impl, obstacle: str) -> bool:
    """Whether a segment without padding runs as one operator; ``obstacle`` is why Triton does not take its sizes."""
    return (
        choose(impl, x_BLD.device, autocast_type(x_BLD) or x_BLD.dtype, obstacle).name == "triton"
        and mixer.activation in ("silu", "swish")
        and isinstance(getattr(mixer.norm, "group_size", None), int)
        and mixer.norm.group_size * mixer.n_groups == mixer.num_heads * mixer.head_dim
        and is_plain(mixer.in_proj, mixer.conv1d, mixer.out_proj)
    )


def run(
    mixer: Any, x_BLD: Tensor, state: Mamba2State | None, documents_BL: Tensor | None, *, output_needed: bool
) -> tuple[Tensor, Mamba2State]:
    """Run a segment; see `magc_kernels.mamba2.autograd`."""
    from magc_kernels.mamba2.autograd import mamba2

    weights = Mamba2Weights(
        in_proj=mixer.in_proj.weight,
        conv=mixer.conv1d.weight,
        dt_bias=mixer.dt_bias,
        A_log=mixer.A_log,
        D=mixer.D,
        out_proj=mixer.out_proj.weight,
        in_bias=mixer.in_proj.bias,
        conv_bias=mixer.conv1d.bias,
        norm=mixer.norm.weight,
        out_bias=mixer.out_proj.bias,
    )
    low, high = mixer.time_step_limit
    sizes = Mamba2Sizes(
        mixer.head_dim,
        mixer.n_groups,
        mixer.ssm_state_size,
        (float(low), float(high)),
        mixer.chunk_size,
        norm_eps=mixer.norm.variance_epsilon,
    )
    states = (None, None, None) if state is None else state
    inputs = Mamba2Inputs(
        x_BLD,
        weights,
        sizes,
        conv_state=states[0],
        ssm_state=states[1],
        seq_idx=documents_BL,
        prev_seq_idx=states[2],
    )
    out = mamba2(inputs, output_needed=output_needed)
    return out.y, Mamba2State(out.conv_state, out.ssm_state, last_document(documents_BL))
