"""The Mamba-2 layer in plain PyTorch: Dao and Gu, arXiv 2405.21060, section 7, in mamba-ssm's arrangement."""

from __future__ import annotations

import torch
from torch.nn import functional

from magc_kernels._precision import compute_dtype
from magc_kernels.conv.reference import causal_conv1d
from magc_kernels.mamba2.values import Mamba2Inputs, Mamba2Outputs, check
from magc_kernels.norm.reference import add_rms_norm, gated_rms_norm
from magc_kernels.ssd.reference import PREFERRED_CHUNK_SIZE, ssd


def mamba2(inputs: Mamba2Inputs) -> Mamba2Outputs:
    """Residual addition and norm if there is one, projection, convolution, scan, gated norm, projection.

    Raises:
        ValueError, TypeError: as `values.check` and the operators.
    """
    check(inputs)
    weights, sizes = inputs.weights, inputs.sizes
    hidden, residual = inputs.hidden, None
    if weights.block_norm is not None:
        hidden, residual = add_rms_norm(
            hidden,
            inputs.residual,
            weights.block_norm,
            eps=sizes.block_norm_eps,
            residual_in_fp32=sizes.residual_in_fp32,
        )
    projection = functional.linear(hidden, weights.in_proj, weights.in_bias)
    z_mlp, x_mlp, z, xBC, dt = projection.split(sizes.split(weights), dim=-1)
    xBC, conv_state = causal_conv1d(
        xBC,
        weights.conv.squeeze(1),
        weights.conv_bias,
        activation="silu",
        initial_state=inputs.conv_state,
        seq_idx=inputs.seq_idx,
        prev_seq_idx=inputs.prev_seq_idx,
    )
    x, B, C = xBC.split(sizes.split_conv(weights), dim=-1)
    heads = (weights.dt_bias.shape[0], sizes.headdim)
    y, ssm_state = ssd(
        x.unflatten(-1, heads),
        dt,
        -torch.exp(weights.A_log.to(compute_dtype(weights.A_log.dtype))),
        B.unflatten(-1, (sizes.groups, sizes.d_state)),
        C.unflatten(-1, (sizes.groups, sizes.d_state)),
        D=weights.D if weights.D.numel() == heads[0] else weights.D.view(heads),
        z=z.unflatten(-1, heads) if weights.norm is None else None,
        dt_bias=weights.dt_bias,
        dt_softplus=True,
        dt_limit=sizes.dt_limit,
        initial_state=inputs.ssm_state,
        seq_idx=inputs.seq_idx,
        prev_seq_idx=inputs.prev_seq_idx,
        chunk_size=min(sizes.chunk_size or PREFERRED_CHUNK_SIZE, PREFERRED_CHUNK_SIZE),
    )
    y = y.flatten(-2)
    if weights.norm is not None:
        y = gated_rms_norm(
            y,
            z,
            weights.norm,
            eps=sizes.norm_eps,
            group_size=weights.norm.shape[0] // sizes.groups,
            norm_before_gate=sizes.norm_before_gate,
        )
    if z_mlp.shape[-1]:
        y = torch.cat([functional.silu(z_mlp) * x_mlp, y], dim=-1)
    return Mamba2Outputs(functional.linear(y, weights.out_proj, weights.out_bias), residual, conv_state, ssm_state)
