"""Tiny random models of flash-linear-attention, and plain PyTorch in place of its kernels, so that they run on a CPU.

The modules are its own; each recurrence is one loop over tokens, with a state in and out, as its kernels have.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from magc.integrations.delta_rule import gated_delta_rule, l2_normalised
from tests.integrations.models import VOCABULARY

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "intermediate_size": 24}
PLAIN: dict[str, Any] = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "pad_token_id": 0}
MORE: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 2, "expand_k": 0.5, "use_short_conv": True},
    "gated_deltanet": {"num_heads": 2, "head_dim": 4, "expand_v": 2},
}
TINY: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 2},
    "gsa": {"num_heads": 2, "num_slots": 4, "use_short_conv": True},
    "kda": {"num_heads": 2, "head_dim": 4},
    "linear_attn": {"num_heads": 2, "norm_feature_map": True, "feature_map": "identity"},
    "retnet": {"num_heads": 2},
    "rwkv7": {"head_dim": 8, "norm_eps": 1e-2} | {f"{name}_low_rank_dim": 4 for name in ("decay", "gate", "a", "v")},
}
"""What kernels would not take."""
PREFIXES = {
    "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet",
    "gla": "GLA",
    "gsa": "GSA",
    "kda": "KDA",
    "linear_attn": "LinearAttention",
    "retnet": "RetNet",
    "rwkv7": "RWKV7",
}


def fla(name: str) -> Any:
    pytest.importorskip("fla", exc_type=ImportError)
    return importlib.import_module(name)


def make(family: str, **changes: Any) -> Any:
    modeling = fla(f"fla.models.{family}")
    prefix = PREFIXES[family]
    config = getattr(modeling, f"{prefix}Config")(**{**SIZES, **PLAIN, **MORE.get(family, {}), **changes})
    torch.manual_seed(0)
    model = getattr(modeling, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def tiny(family: str, **changes: Any) -> Any:
    """A model for `use_plain_kernels`."""
    return make(family, **{**TINY.get(family, {}), **changes})


# ---------------------------------------------------------------------- parts of its blocks
def rms_norm(norm: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def gated_norm(norm: Any, x: Tensor, gate: Tensor) -> Tensor:
    gate = gate.sigmoid() if norm.activation == "sigmoid" else functional.silu(gate)
    return rms_norm(norm, x) * gate


def norm_linear(x: Tensor, scale: Tensor, _: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(functional.rms_norm(x, x.shape[-1:], scale), weight, bias)


def convolve(
    module: Any, x: Tensor, cache: Tensor | None = None, output_final_state: bool = False, **_: Any
) -> tuple[Tensor, Tensor | None]:
    width = module.kernel_size[0]
    before = x.new_zeros(x.shape[0], x.shape[2], width) if cache is None else cache
    row = torch.cat([before, x.transpose(1, 2)], -1)
    y = functional.conv1d(row[..., 1:], module.weight, module.bias, groups=module.groups)
    return functional.silu(y).transpose(1, 2), row[..., -width:] if output_final_state else None


def shift(
    x: Tensor, cu_seqlens: None = None, *, cache: Tensor | None = None, output_cache: bool
) -> tuple[Tensor, Tensor]:
    before = torch.zeros_like(x[:, 0]) if cache is None else cache
    return torch.cat([before[:, None], x[:, :-1]], 1) - x, x[:, -1]


def rotate(rotary: Any, q: Tensor, k: Tensor, *, seqlen_offset: int, **_: Any) -> tuple[Tensor, ...]:
    angles = (torch.arange(q.shape[1]) + seqlen_offset)[:, None, None] * rotary.inv_freq
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    return turned(q), turned(k)


# ---------------------------------------------------------------------- its recurrences
def decaying(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """State `(batch, heads, K, V)`, which ``g``, `(batch, length, heads, K or 1 or V beside a last axis)`, lets decay."""
    h = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    ys: list[Tensor] = []
    for t in range(q.shape[1]):
        h = h * g[:, t].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append(scale * (q[:, t, :, :, None] * h).sum(-2))
    return torch.stack(ys, 1), h


def gla(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, **more: Any) -> Any:
    decay = more["gk"] if "gk" in more else more["g"]
    return decaying(q, k, v, decay[..., None], initial_state, q.shape[-1] ** -0.5)


def gsa(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *, initial_state: Any, scale: float, **_: Any) -> Any:
    keys, values = (None, None) if initial_state is None else initial_state
    o, keys = decaying(q, k, s, g[..., None, :], keys, scale)
    o, values = decaying(o.softmax(-1), s, v, g[..., None], values)
    return o, (keys, values)


def linear(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, normalize: bool, **_: Any) -> Any:
    assert normalize
    before, total = (None, None) if initial_state is None else initial_state
    none = q.new_zeros(*q.shape[:3], 1, 1)
    o, after = decaying(q, k, v, none, before, q.shape[-1] ** -0.5)
    sums = k.cumsum(1) if total is None else k.cumsum(1) + total
    return o / (1 + (q * sums).sum(-1, keepdim=True).square()), (after, sums[:, -1:])


def retention(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, **_: Any) -> Any:
    rates = torch.log(1 - 2.0 ** (-5 - torch.arange(q.shape[2])))
    decay = rates[:, None, None].expand(*q.shape[:3], 1, 1)
    return decaying(q, k, v, decay, initial_state, q.shape[-1] ** -0.5)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """Its delta rules, token by token; `magc.integrations.delta_rule` has tests of its own."""
    beta, g = more["beta"], more.get("g")
    beta = beta.sigmoid() if more.get("use_beta_sigmoid_in_kernel") else beta
    g = torch.zeros_like(beta) if g is None else g
    if more.get("use_gate_in_kernel"):
        g = -more["A_log"].exp() * functional.softplus(g + more["dt_bias"])
    q, k = l2_normalised(q), l2_normalised(k)
    return gated_delta_rule(q, k, v, g, beta, scale=q.shape[-1] ** -0.5, initial_state=initial_state)


def kda(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: Any, **more: Any) -> Any:
    g = -more["A_log"].exp()[:, None] * functional.softplus(g + more["dt_bias"].view(g.shape[2:]))
    q, k = l2_normalised(q), l2_normalised(k)
    b = -beta.sigmoid()[..., None] * k
    return diagonal_plus_low_rank(q, -b, v, g.exp() * k, b, g, initial_state, q.shape[-1] ** -0.5)


def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, initial_state: Any, scale: float, **_: Any
) -> Any:
    return diagonal_plus_low_rank(r, k, v, a, b, w, initial_state, scale)


def diagonal_plus_low_rank(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """State `(batch, heads, K, V)`: it decays, what lies along ``a`` comes back along ``b``, and ``k v`` is added."""
    h = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    ys: list[Tensor] = []
    for t in range(q.shape[1]):
        along = (a[:, t, :, :, None] * h).sum(-2)
        h = h * g[:, t, :, :, None].exp() + b[:, t, :, :, None] * along[:, :, None]
        h = h + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append(scale * (q[:, t, :, :, None] * h).sum(-2))
    return torch.stack(ys, 1), h


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention with plain PyTorch in place of its kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms, conv, mlp = fla("fla.modules.layernorm"), fla("fla.modules.causal_conv1d.ops"), fla("fla.modules.mlp")
        layers = {
            name: fla(f"fla.layers.{name}")
            for name in (
                "delta_net",
                "gated_deltanet",
                "gla",
                "gsa",
                "kda",
                "linear_attn",
                "multiscale_retention",
                "rwkv7",
            )
        }
        fla("fla.models")
    kernels: dict[str, tuple[Any, ...]] = {
        "delta_net": (delta_rule, "fused_recurrent_delta_rule", "chunk_delta_rule"),
        "gated_deltanet": (delta_rule, "chunk_gated_delta_rule"),
        "gla": (gla, "fused_recurrent_gla", "chunk_gla"),
        "gsa": (gsa, "fused_recurrent_gsa", "chunk_gsa"),
        "kda": (kda, "chunk_kda"),
        "linear_attn": (linear, "chunk_linear_attn", "fused_recurrent_linear_attn"),
        "multiscale_retention": (retention, "chunk_retention", "fused_recurrent_retention"),
        "rwkv7": (rwkv7, "chunk_rwkv7"),
    }
    for layer, (function, *names) in kernels.items():
        for name in names:
            monkeypatch.setattr(layers[layer], name, function)
    monkeypatch.setattr(norms.RMSNorm, "forward", rms_norm)
    monkeypatch.setattr(layers["kda"].FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(layers["gsa"], "rms_norm_linear", norm_linear)
    monkeypatch.setattr(conv.ShortConvolution, "forward", convolve)
    monkeypatch.setattr(mlp, "swiglu", lambda gate, y: functional.silu(gate) * y)
    monkeypatch.setitem(layers["gla"].ACT2FN, "swish", functional.silu)
    monkeypatch.setattr(layers["gsa"].SwishFeatureMap, "forward", lambda _, x: functional.silu(x))
    monkeypatch.setattr(layers["multiscale_retention"].RotaryEmbedding, "forward", rotate)
    monkeypatch.setattr(layers["gated_deltanet"].GatedDeltaNet, "_use_fused_qkv_conv", lambda *_, **__: False)
    modeling, rwkv = fla("fla.models.rwkv7.modeling_rwkv7"), layers["rwkv7"]
    monkeypatch.setattr(modeling, "token_shift", shift)
    monkeypatch.setattr(rwkv, "token_shift", shift)
    monkeypatch.setattr(rwkv, "fused_addcmul_rwkv7", fla("fla.ops.rwkv7.fused_addcmul").torch_addcmul_rwkv7)
    monkeypatch.setattr(rwkv, "fused_k_rwkv7", lambda k, a, k_a: k + k * (a - 1) * k_a)
    correction = fla("fla.ops.rwkv7.gate_output_correction").gate_output_correction_ref
    monkeypatch.setattr(rwkv, "gate_output_correction", correction)
    monkeypatch.setitem(modeling.ACT2FN, "sqrelu", lambda x: functional.relu(x).square())
