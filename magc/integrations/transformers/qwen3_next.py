"""transformers' Qwen3-Next: gated delta rule and gated attention in turn, each with an MLP or experts behind it."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.integrations.delta_rule import gated_delta_rule, l2_normalised
from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.attention import KVState, Rotate, attend, options_of, segment_heads
from magc.integrations.transformers.hybrid import AttentionDecoderLayer, Block, DecoderLayer, Hybrid, adapt_hybrid
from magc.integrations.transformers.mixers import convolve, masked, project, rates
from magc.integrations.transformers.tokens import Tokens
from magc.nn.norm import MAX_GROUP_SIZE
from magc.nn.operators import Impl, operators
from magc.nn.segments import last_document

_MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"


class DeltaState(NamedTuple):
    """What a gated delta rule layer carries from one segment to the next."""

    conv: Tensor
    """Last inputs of the convolution, `(batch, width - 1, channels)`."""
    memory: Tensor
    """`(batch, heads, d_k, d_v)`, float32 (float64 for float64 activations)."""
    seq_idx: Tensor | None
    """Document of the last token, `(batch,)` int32; None unless rows are packed."""


class Qwen3NextLayer(DecoderLayer):
    """What both kinds of layers share."""

    norms = ("input_layernorm", "post_attention_layernorm")

    def norm(self, norm: nn.Module, x_BLD: Tensor) -> Tensor:
        """A `Qwen3NextRMSNorm`, whose weight is what it is more than one."""
        return one_centred_norm(norm, x_BLD, self.impl)

    def feed(self, x_BLD: Tensor) -> Tensor:
        """The MLP or the experts."""
        block: Any = self.block
        return block.mlp(x_BLD)

    def router(self) -> tuple[nn.Module, int] | None:
        """See `DecoderLayer.router`."""
        gate = getattr(getattr(self.block, "mlp", None), "gate", None)
        return None if gate is None else (gate, gate.top_k)


class Qwen3NextDeltaLayer(Qwen3NextLayer):
    """One with a gated delta rule."""

    def mix(self, x_BLD: Tensor, state: DeltaState | None, tokens: Tokens) -> tuple[Tensor, DeltaState]:
        """See `delta_mixer`."""
        block: Any = self.block
        return delta_mixer(block.linear_attn, x_BLD, state, tokens, self.impl)


class Qwen3NextAttentionLayer(Qwen3NextLayer, AttentionDecoderLayer):
    """One with attention, whose output is gated."""

    def mix(self, x_BLD: Tensor, state: KVState | None, tokens: Tokens) -> tuple[Tensor, KVState]:
        """Attention over a segment, with norms on the heads of queries and keys."""
        block: Any = self.block
        attention: Any = block.self_attn
        size = attention.head_dim
        q_BHLP, gate_BHLP = segment_heads(project(attention.q_proj, x_BLD), 2 * size).chunk(2, dim=-1)
        k_BKLP = segment_heads(project(attention.k_proj, x_BLD), size)
        v_BKLP = segment_heads(project(attention.v_proj, x_BLD), size)
        q_BHLP = one_centred_norm(attention.q_norm, q_BHLP, self.impl)
        k_BKLP = one_centred_norm(attention.k_norm, k_BKLP, self.impl)
        rotary: Any = self.rotary
        rotate: Rotate = importlib.import_module(_MODULE).apply_rotary_pos_emb
        q_BHLP, k_BKLP = rotate(q_BHLP, k_BKLP, *rotary(x_BLD, tokens.positions))
        y_BLE, new_state = attend(q_BHLP, k_BKLP, v_BKLP, state, tokens, options_of(attention))
        y_BLE = y_BLE * torch.sigmoid(gate_BHLP.transpose(1, 2).flatten(-2))
        return project(attention.o_proj, y_BLE), new_state


def delta_mixer(
    mixer: Any, x_BLD: Tensor, state: DeltaState | None, tokens: Tokens, impl: Impl
) -> tuple[Tensor, DeltaState]:
    """A `Qwen3NextGatedDeltaNet`.

    Args:
        mixer: the module.
        x_BLD: `(batch, length, hidden)`.
        state: of the token before; None at the start.
        tokens: which are padding, and which belong together.
        impl: of convolution and norm, see `magc.nn.operators.Impl`; the delta rule runs in plain PyTorch.

    Returns:
        The output, shaped as ``x_BLD``, and the state after the segment.
    """
    x_BLD = masked(x_BLD, tokens.mask)
    # The projections keep what belongs to one head of keys together.
    heads: int = mixer.num_k_heads
    d_k: int = mixer.head_k_dim
    d_v: int = mixer.head_v_dim
    q, k, v, z = torch.split(_split_heads(project(mixer.in_proj_qkvz, x_BLD), heads), _sizes(mixer), dim=-1)
    b, a = _split_heads(project(mixer.in_proj_ba, x_BLD), heads).chunk(2, dim=-1)
    run = operators(impl, q.device, q.dtype)
    before = None if state is None else state.seq_idx
    qkv_BLE, conv_state = convolve(
        run,
        mixer,
        torch.cat([q.flatten(-2), k.flatten(-2), v.flatten(-2)], dim=-1),
        None if state is None else state.conv,
        tokens,
        before,
    )
    q, k, v = torch.split(qkv_BLE, [mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    step_BLH = a.flatten(-2).to(torch.promote_types(a.dtype, torch.float32)) + mixer.dt_bias
    y_BLHV, memory = gated_delta_rule(
        l2_normalised(_split_heads(q, -1, d_k)),
        l2_normalised(_split_heads(k, -1, d_k)),
        _split_heads(v, -1, d_v),
        rates(mixer) * functional.softplus(step_BLH),
        b.flatten(-2).sigmoid(),
        scale=d_k**-0.5,
        initial_state=None if state is None else state.memory,
        seq_idx=tokens.documents,
        prev_seq_idx=before,
    )
    z_BLHV = z.reshape(y_BLHV.shape)
    norm = mixer.norm
    y_BLHV = run.gated_rms_norm(y_BLHV, z_BLHV, norm.weight, eps=norm.variance_epsilon, norm_before_gate=True)
    return project(mixer.out_proj, y_BLHV.flatten(-2)), DeltaState(conv_state, memory, last_document(tokens.documents))


def one_centred_norm(norm: Any, x: Tensor, impl: Impl) -> Tensor:
    """An RMSNorm over the last axis whose weight is what it is more than one."""
    width = norm.weight.shape[0]
    obstacle = "" if width <= MAX_GROUP_SIZE else f"{width} features are too many for the Triton norms"
    run = operators(impl, x.device, x.dtype, obstacle)
    # In half precision the sum would be rounded.
    weight = 1.0 + norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32))
    return run.gated_rms_norm(x, None, weight, eps=norm.eps)


def _split_heads(x_BLE: Tensor, heads: int, size: int = -1) -> Tensor:
    """`(batch, length, features)` to `(batch, length, heads, features of one)`."""
    return x_BLE.view(*x_BLE.shape[:2], heads, size)


def _sizes(mixer: Any) -> list[int]:
    """Of queries, keys, values and gates of one head of keys."""
    values = mixer.num_v_heads // mixer.num_k_heads * mixer.head_v_dim
    return [mixer.head_k_dim, mixer.head_k_dim, values, values]


def _block(trunk: Any, block: Any, index: int, impl: Impl, norm: nn.Module | None) -> Block:
    classes: Any = importlib.import_module(_MODULE)
    parts: dict[str, type[nn.Module]] = {}
    if isinstance(block.mlp, classes.Qwen3NextSparseMoeBlock):
        parts["mlp.gate"] = classes.Qwen3NextTopKRouter
    if block.block_type == "linear_attention":
        layer = Qwen3NextDeltaLayer(block, impl, norm)
        parts["linear_attn"] = classes.Qwen3NextGatedDeltaNet
        return Block(layer, parts, ("linear_attn", "linear_attn.norm", *Qwen3NextLayer.norms))
    attention = Qwen3NextAttentionLayer(block, impl, norm, trunk.rotary_emb)
    parts["self_attn"] = classes.Qwen3NextAttention
    return Block(attention, parts, ("self_attn", "self_attn.q_norm", "self_attn.k_norm", *Qwen3NextLayer.norms))


_FAMILY = Hybrid(
    _MODULE,
    "Qwen3Next",
    _block,
    "convolution and gated norm of Qwen3NextGatedDeltaNet run on magc's operators, its gated delta rule in plain PyTorch, with "
    "the model's own parameters; projections, MLPs and experts are called as modules",
    final_norm="norm",
    routers=True,
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `Qwen3NextModel` or `Qwen3NextForCausalLM` on a grid; see `adapt_hybrid`."""
    return adapt_hybrid(model, settings, _FAMILY)
