"""transformers' Zamba2: Mamba-2 layers, some of them behind a shared transformer block that also sees the embeddings.

The blocks' weights are shared: layers of the grid hold the same parameters, whose gradients add up. The embeddings travel
beside the residual stream as far as the last layer that reads them.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.attention import KVState, attend, options_of, segment_heads
from magc.integrations.transformers.hybrid import Block, DecoderLayer, Hybrid, adapt_hybrid
from magc.integrations.transformers.mixers import project, ssd_mixer, ssd_obstacle
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba2_values import Mamba2State
from magc.nn.operators import Choice, Impl, choose

_MODULE = "transformers.models.zamba2.modeling_zamba2"

Stream = Tensor | tuple[Tensor, Tensor]
"""The residual stream, `(batch, length, hidden)`, or it and the embeddings."""


class Zamba2State(NamedTuple):
    """What a layer carries from one segment to the next."""

    mamba: Mamba2State
    attention: KVState | None
    """None without a transformer block."""


class Zamba2Layer(DecoderLayer):
    """A layer of a `Zamba2Model` as a layer of the contract.

    Args:
        block: a `Zamba2HybridLayer` or a `Zamba2MambaDecoderLayer`.
        impl, final_norm: as of `DecoderLayer`.
        index: of the layer in the model.
        rotary: the trunk's rotary embeddings; None without.
        passes_on: whether a later layer reads the embeddings.
    """

    def __init__(
        self,
        block: nn.Module,
        impl: Impl,
        final_norm: nn.Module | None,
        index: int,
        rotary: nn.Module | None,
        passes_on: bool,
    ) -> None:
        super().__init__(block, impl, final_norm)
        self.index = index
        self.rotary = rotary
        self.passes_on = passes_on

    @property
    def mamba_block(self) -> Any:
        """The `Zamba2MambaDecoderLayer`."""
        return getattr(self.block, "mamba_decoder", self.block)

    def _block(self, x_BLD: Any, state: Zamba2State | None, tokens: Tokens) -> tuple[Any, Zamba2State]:
        given: Stream = x_BLD
        # The first layer gets the embeddings alone.
        x_BLD, embeddings_BLD = given if isinstance(given, tuple) else (given, given)
        mamba_state, kv_state = (None, None) if state is None else state
        hidden = x_BLD
        if self.mamba_block is not self.block:
            block: Any = self.block
            attended_BLD, kv_state = self._transform(
                block.shared_transformer, torch.cat([x_BLD, embeddings_BLD], dim=-1), kv_state, tokens
            )
            hidden = x_BLD + project(block.linear, attended_BLD)
        mamba = self.mamba_block
        hidden = self.norm(mamba.input_layernorm, hidden)
        hidden, mamba_state = ssd_mixer(mamba.mamba, hidden, mamba_state, tokens, self.impl)
        x_BLD = x_BLD + hidden
        x_BLD = x_BLD if self.final_norm is None else self.norm(self.final_norm, x_BLD)
        return (x_BLD, embeddings_BLD) if self.passes_on else x_BLD, Zamba2State(mamba_state, kv_state)

    def _transform(self, shared: Any, x_BLE: Tensor, state: KVState | None, tokens: Tokens) -> tuple[Tensor, KVState]:
        """A `Zamba2AttentionDecoderLayer` on the residual stream beside the embeddings."""
        attention = shared.self_attn
        x_BLE = self.norm(shared.input_layernorm, x_BLE)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        parts = [project(projection, x_BLE) for projection in projections]
        if attention.config.use_shared_attention_adapter:
            slot = attention.layer_dic[self.index]
            lists = (attention.linear_q_adapter_list, attention.linear_k_adapter_list, attention.linear_v_adapter_list)
            parts = [part + adapters[slot](x_BLE) for part, adapters in zip(parts, lists, strict=True)]
        q_BHLP, k_BKLP, v_BKLP = (segment_heads(part, attention.head_dim) for part in parts)
        if self.rotary is not None:
            rotate: Any = importlib.import_module(_MODULE).apply_rotary_pos_emb
            q_BHLP, k_BKLP = rotate(q_BHLP, k_BKLP, *self.rotary(x_BLE, tokens.positions))
        y_BLE, new_state = attend(q_BHLP, k_BKLP, v_BKLP, state, tokens, options_of(attention))
        y_BLD = self.norm(shared.pre_ff_layernorm, project(attention.o_proj, y_BLE))
        return shared.feed_forward(y_BLD, self.index), new_state

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        return choose(self.impl, device, dtype, ssd_obstacle(self.mamba_block.mamba))


def _block(trunk: Any, block: Any, index: int, impl: Impl, norm: nn.Module | None) -> Block:
    classes: Any = importlib.import_module(_MODULE)
    hybrids = [i for i, each in enumerate(trunk.layers) if isinstance(each, classes.Zamba2HybridLayer)]
    passes_on = bool(hybrids) and index < hybrids[-1]
    layer = Zamba2Layer(block, impl, norm, index, getattr(trunk, "rotary_emb", None), passes_on)
    if index not in hybrids:
        return Block(layer, {"mamba": classes.Zamba2MambaMixer}, ("mamba", "input_layernorm"))
    parts = {
        "mamba_decoder": classes.Zamba2MambaDecoderLayer,
        "mamba_decoder.mamba": classes.Zamba2MambaMixer,
        "shared_transformer": classes.Zamba2AttentionDecoderLayer,
        "shared_transformer.self_attn": classes.Zamba2Attention,
    }
    norms = ["mamba_decoder.input_layernorm"]
    norms += [f"shared_transformer.{name}" for name in DecoderLayer.norms]
    return Block(layer, parts, (*parts, *norms))


_FAMILY = Hybrid(
    _MODULE,
    "Zamba2",
    _block,
    "convolution, scan and gated norm of Zamba2MambaMixer run on magc's operators with the model's own parameters; "
    "projections, adapters and MLPs are called as modules; the embeddings travel beside the residual stream as far as the "
    "last shared block",
    block_class=("MambaDecoderLayer", "HybridLayer"),
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `Zamba2Model` or `Zamba2ForCausalLM` on a grid; see `adapt_hybrid`."""
    return adapt_hybrid(model, settings, _FAMILY)
