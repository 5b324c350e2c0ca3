"""Mamba-3 token by token, with complex numbers: the truth for its scan and its layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rotated(v: Tensor, theta: Tensor, pairs: str) -> Tensor:
    """`v` `(batch, rank, heads, d_state)` turned by `theta` `(batch, heads, angles)`: a product of complex numbers."""
    count, half = theta.shape[-1], v.shape[-1] // 2
    for i in range(count):
        a, b = (2 * i, 2 * i + 1) if pairs == "neighbours" else (i, half + i)
        turned = (
            torch.complex(v[..., a], v[..., b]) * torch.polar(torch.ones_like(theta[..., i]), theta[..., i])[:, None]
        )
        columns = list(v.unbind(-1))
        columns[a], columns[b] = turned.real, turned.imag
        v = torch.stack(columns, -1)
    return v


def naive_mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    *,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_out: Tensor | None = None,
    turns: Tensor | None = None,
    ssm: Tensor | None = None,
    last_B: Tensor | None = None,
    last_x: Tensor | None = None,
    pairs: str = "neighbours",
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The recurrence as it is written down, in the type of `x`: output, angle in turns, state, last B, last x."""
    batch, length, heads, headdim = x.shape
    rank, groups, d_state = B.shape[2:]

    def start(given: Tensor | None, *shape: int) -> Tensor:
        return x.new_zeros(batch, *shape) if given is None else given

    theta = 2 * math.pi * start(turns, heads, angles.shape[-1])
    state = start(ssm, heads, headdim, d_state)
    B_before, x_before = start(last_B, rank, heads, d_state), start(last_x, heads, headdim)
    up = x.new_ones(heads, rank, headdim) if mimo_x is None else mimo_x
    outputs = []
    previous = None if seq_idx is None else (seq_idx[:, 0] if prev_seq_idx is None else prev_seq_idx)
    for t in range(length):
        if seq_idx is not None and previous is not None:
            keep = seq_idx[:, t] == previous
            theta = torch.where(keep[:, None, None], theta, 0.0)
            state, B_before = (torch.where(keep[:, None, None, None], s, 0.0) for s in (state, B_before))
            previous = seq_idx[:, t]
        theta = theta + math.pi * dt[:, t, :, None] * torch.tanh(angles[:, t, None])
        B_t, C_t = (
            rotated(v[:, t].repeat_interleave(heads // groups, 2) + bias.transpose(0, 1), theta, pairs)
            for v, bias in ((B, B_bias), (C, C_bias))
        )
        decay, share = torch.exp(dt[:, t] * A[:, t]), torch.sigmoid(trap[:, t])
        now = torch.einsum("bhp,hrp,brhn->bhpn", x[:, t], up, B_t)
        before = torch.einsum("bhp,hrp,brhn->bhpn", x_before, up, B_before)
        alpha, beta, gamma = decay, (1 - share) * dt[:, t] * decay, share * dt[:, t]
        state = sum(c[..., None, None] * s for c, s in ((alpha, state), (beta, before), (gamma, now)))
        y = torch.einsum("bhpn,brhn->brhp", state, C_t)
        if D is not None:
            y = y + D[:, None] * torch.einsum("bhp,hrp->brhp", x[:, t], up)
        if z is not None:
            gate = z[:, t, None] if mimo_z is None else torch.einsum("bhp,hrp->brhp", z[:, t], mimo_z)
            y = y * functional.silu(gate)
        if mimo_out is not None:
            y = torch.einsum("brhp,hrp->bhp", y, mimo_out)
        elif mimo_x is None:
            y = y[:, 0]
        outputs.append(y)
        B_before, x_before = B_t, x[:, t]
    return torch.stack(outputs, 1), torch.remainder(theta / (2 * math.pi), 1.0), state, B_before, x_before


def naive_mixer(mixer: Any, u: Tensor, *, groups: int, angles: int, seq_idx: Tensor | None = None) -> Tensor:
    """Output of a mixer with the names of mamba-ssm's `Mamba3` for `u` `(batch, length, d_model)`, from the start."""
    heads, rank, d_state = mixer.B_bias.shape
    headdim = mixer.out_proj.in_features // heads
    sizes = [heads * headdim] * 2 + [rank * groups * d_state] * 2 + [heads] * 3 + [angles]
    z, x, B, C, dt, A, trap, theta = torch.split(u @ mixer.in_proj.weight.T, sizes, dim=-1)
    x, z = (v.unflatten(-1, (heads, headdim)) for v in (x, z))
    B, C = (
        rms(v.unflatten(-1, (rank, groups, d_state))) * norm.weight
        for v, norm in ((B, mixer.B_norm), (C, mixer.C_norm))
    )
    normed = mixer.is_outproj_norm
    weights = {} if not mixer.is_mimo else {"mimo_x": mixer.mimo_x}
    if mixer.is_mimo and not normed:
        weights |= {"mimo_z": mixer.mimo_z, "mimo_out": mixer.mimo_o}
    y, *_ = naive_mamba3(
        x,
        functional.softplus(dt + mixer.dt_bias),
        -functional.softplus(A).clamp(min=mixer.A_floor),
        B,
        C,
        trap,
        theta,
        B_bias=mixer.B_bias,
        C_bias=mixer.C_bias,
        D=mixer.D,
        z=None if normed else z,
        pairs="halves" if mixer.is_mimo else "neighbours",
        seq_idx=seq_idx,
        **weights,
    )
    if normed:
        gate = torch.einsum("blhp,hrp->blrhp", z, mixer.mimo_z) if mixer.is_mimo else z
        y = rms(y) * mixer.norm.weight.unflatten(0, (heads, headdim)) * functional.silu(gate)
        y = torch.einsum("blrhp,hrp->blhp", y, mixer.mimo_o) if mixer.is_mimo else y
    return y.flatten(-2) @ mixer.out_proj.weight.T


def rms(x: Tensor) -> Tensor:
    """`x` over its root mean square along the last axis."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
