"""The mathematics of transformers' state-space mixers on magc's operators, with a state in and out.

Functions over the modules' own parameters. transformers' mixers themselves write their state into a cache object, or
drop it, so no gradient flows through it; the numbers are the same. Projections are called as modules, so LoRA and
quantisation of them stay in effect.

Shape letters: B batch, L length, D hidden size, E channels of the mixer, H heads, N state size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from magc.errors import LayerContractError
from magc.integrations.transformers import fused
from magc.integrations.transformers.tokens import Tokens
from magc.nn.fused import hooked, is_plain, taps_of
from magc.nn.mamba import TRITON_D_STATES as SELECTIVE_D_STATES
from magc.nn.mamba import MambaState
from magc.nn.mamba2 import TRITON_D_STATES as SSD_D_STATES
from magc.nn.mamba2 import TRITON_HEADDIMS
from magc.nn.mamba2_values import Mamba2State
from magc.nn.norm import MAX_GROUP_SIZE
from magc.nn.operators import Impl, Operators, operators
from magc.nn.segments import last_document
from magc_kernels.linear.autograd import linear

Norm = Callable[[Tensor], Tensor]
CONV_WIDTHS = (2, 3, 4)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; a plain linear layer adds its weight's gradient to the grid's sum inside the product."""
    if type(module) is nn.Linear and not hooked(module):
        return linear(x, module.weight, module.bias)
    return cast(Tensor, module(x))


def masked(x_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """``x`` with zeros at padded tokens."""
    return x_BLE if mask_BL is None else (x_BLE * mask_BL[:, :, None]).to(x_BLE.dtype)


def rms_norm(norm: Any, x_BLD: Tensor, impl: Impl) -> Tensor:
    """One of transformers' RMSNorms, by its weight and ``variance_epsilon``."""
    width = norm.weight.shape[0]
    obstacle = "" if width <= MAX_GROUP_SIZE else f"{width} features are too many for the Triton norms"
    run = operators(impl, x_BLD.device, x_BLD.dtype, obstacle)
    return run.gated_rms_norm(x_BLD, None, norm.weight, eps=norm.variance_epsilon)


def selective_mixer(
    mixer: Any,
    x_BLD: Tensor,
    state: MambaState | None,
    tokens: Tokens,
    impl: Impl,
    norms: Sequence[Norm] = (),
) -> tuple[Tensor, MambaState]:
    """A Mamba-1 mixer.

    Args:
        mixer: the module (`MambaMixer` and its like).
        x_BLD: `(batch, length, hidden)`.
        state: of the token before; None at the start.
        tokens: which are padding, and which belong together.
        impl: see `magc.nn.operators.Impl`.
        norms: applied to the step's low-rank input, B and C (Falcon Mamba), none otherwise.

    Returns:
        The output, shaped as ``x_BLD``, and the state after the segment.
    """
    x_BLE, z_BLE = project(mixer.in_proj, masked(x_BLD, tokens.mask)).chunk(2, dim=-1)
    N = mixer.ssm_state_size
    run = operators(impl, x_BLE.device, x_BLE.dtype, selective_obstacle(mixer))
    before = None if state is None else state.seq_idx
    x_BLE, conv_state = convolve(run, mixer, x_BLE, None if state is None else state.conv, tokens, before)
    x_BLE = masked(x_BLE, tokens.mask)
    parts = torch.split(project(mixer.x_proj, x_BLE), [mixer.time_step_rank, N, N], dim=-1)
    if norms:
        parts = [norm(part) for norm, part in zip(norms, parts, strict=True)]
    low_rank, B_BLN, C_BLN = parts
    step = mixer.dt_proj
    plain = is_plain(step)  # else a module (LoRA), which adds its bias itself
    y_BLE, ssm_state = run.selective_scan(
        x_BLE,
        linear(low_rank, step.weight) if plain else step(low_rank),
        rates(mixer),
        B_BLN.unsqueeze(2),
        C_BLN.unsqueeze(2),
        D=mixer.D,
        z=z_BLE,
        dt_bias=step.bias if plain else None,
        dt_softplus=True,
        initial_state=None if state is None else state.ssm,
        seq_idx=tokens.documents,
        prev_seq_idx=before,
    )
    return project(mixer.out_proj, y_BLE), MambaState(conv_state, ssm_state, last_document(tokens.documents))


def ssd_mixer(
    mixer: Any,
    x_BLD: Tensor,
    state: Mamba2State | None,
    tokens: Tokens,
    impl: Impl,
    *,
    output_needed: bool = True,
    scales: tuple[float, Tensor] | None = None,
) -> tuple[Tensor, Mamba2State]:
    """A Mamba-2 mixer; returns what `selective_mixer` does.

    Without padding, and where nothing hangs on the modules inside, Triton runs it as one operator.

    Args:
        mixer: the module (`Mamba2Mixer` and its like).
        x_BLD: as of `selective_mixer`.
        state: as of `selective_mixer`.
        tokens: as of `selective_mixer`.
        impl: as of `selective_mixer`.
        output_needed: False lets the one operator leave out what only the output needs.
        scales: of the input, and of each channel that the first projection makes (Falcon-H1); None: no such scales.
    """
    obstacle = ssd_obstacle(mixer)
    if tokens.mask is None and scales is None and fused.runs_fused(mixer, x_BLD, impl, obstacle):
        return fused.run(mixer, x_BLD, state, tokens.documents, output_needed=output_needed)
    H, P, G, N = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    x_BLD = masked(x_BLD, tokens.mask)
    projected = project(mixer.in_proj, x_BLD if scales is None else x_BLD * scales[0])
    projected = projected if scales is None else projected * scales[1]
    z_BLE, xBC_BLE, dt_BLH = torch.split(projected, [H * P, mixer.conv_dim, H], dim=-1)
    run = operators(impl, projected.device, projected.dtype, obstacle)
    before = None if state is None else state.seq_idx
    xBC_BLE, conv_state = convolve(run, mixer, xBC_BLE, None if state is None else state.conv, tokens, before)
    x, B, C = torch.split(masked(xBC_BLE, tokens.mask), [H * P, G * N, G * N], dim=-1)
    norm = gated_norm(mixer)
    y_BLHP, ssm_state = run.ssd(
        x.unflatten(-1, (H, P)),
        dt_BLH,
        rates(mixer),
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        D=mixer.D,
        z=z_BLE.unflatten(-1, (H, P)) if norm is None else None,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
        dt_limit=tuple(mixer.time_step_limit),
        initial_state=None if state is None else state.ssm,
        seq_idx=tokens.documents,
        prev_seq_idx=before,
        chunk_size=min(mixer.chunk_size, run.max_chunk_size),
    )
    y_BLE = y_BLHP.flatten(-2)
    if norm is not None:
        y_BLE = run.gated_rms_norm(y_BLE, z_BLE, mixer.norm.weight, **norm)
    return project(mixer.out_proj, y_BLE), Mamba2State(conv_state, ssm_state, last_document(tokens.documents))


def gated_norm(mixer: Any) -> dict[str, Any] | None:
    """Options of the norm behind a Mamba-2 scan, as `gated_rms_norm` takes them; None if there is a gate only."""
    norm = mixer.norm
    if isinstance(norm, nn.Identity):
        return None
    # Releases of transformers say how many groups, or how large, or, where the norm has one only, neither.
    size = getattr(norm, "group_size", None)
    return {
        "eps": norm.variance_epsilon,
        "group_size": norm.weight.shape[0] // getattr(norm, "n_groups", 1) if size is None else size,
        "norm_before_gate": getattr(norm, "norm_before_gate", False),
    }


def rates(mixer: Any) -> Tensor:
    """``-exp(A_log)`` in the precision of the scan: a half-precision exp could overflow."""
    return -torch.exp(mixer.A_log.to(torch.promote_types(mixer.A_log.dtype, torch.float32)))


def selective_obstacle(mixer: Any) -> str:
    """Why the Triton kernels do not take a Mamba-1 mixer's sizes; empty if they do."""
    return _obstacle("state_size", mixer.ssm_state_size, SELECTIVE_D_STATES)


def ssd_obstacle(mixer: Any) -> str:
    """Why the Triton kernels do not take a Mamba-2 mixer's sizes; empty if they do."""
    norm = gated_norm(mixer)
    if norm is not None and norm["group_size"] > MAX_GROUP_SIZE:
        return f"{norm['group_size']} features in a group are too many for the Triton norms"
    if mixer.chunk_size < 16:
        return "the Triton scan takes no chunk_size under 16"
    head = _obstacle("head_dim", mixer.head_dim, TRITON_HEADDIMS)
    return head or _obstacle("state_size", mixer.ssm_state_size, SSD_D_STATES)


def require_conv(name: str, mixer: Any) -> None:
    """Refuse a convolution that the operators cannot run.

    Raises:
        LayerContractError: naming the mixer, and the widths there are or what is in the convolution's place.
    """
    width = taps_of(mixer.conv1d, f"{name}.conv1d")[0].shape[1]
    if width not in CONV_WIDTHS:
        raise LayerContractError(
            f"{name} has a convolution of width {width}; magc's operators take {', '.join(map(str, CONV_WIDTHS))}. Use "
            f"conv_kernel=4, or leave the model unwrapped"
        )


def convolve(
    run: Operators, mixer: Any, x_BLE: Tensor, state: Tensor | None, tokens: Tokens, before_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A mixer's causal convolution and the activation behind it; ``before_B`` is the document of the token before."""
    inside = mixer.activation in ("silu", "swish")
    y_BLE, new_state = run.causal_conv1d(
        x_BLE,
        *taps_of(mixer.conv1d),
        activation="silu" if inside else None,
        initial_state=state,
        seq_idx=tokens.documents,
        prev_seq_idx=before_B,
    )
    return y_BLE if inside else activation(mixer)(y_BLE), new_state


def activation(mixer: Any) -> Callable[[Tensor], Tensor]:
    """The function behind a mixer's convolution."""
    act = getattr(mixer, "act", None)
    if act is not None:
        return cast(Callable[[Tensor], Tensor], act)
    return cast(Any, importlib.import_module("transformers.activations")).ACT2FN[mixer.activation]


def _obstacle(name: str, size: int, sizes: Sequence[int]) -> str:
    return "" if size in sizes else f"the Triton scan takes no {name} {size}"
