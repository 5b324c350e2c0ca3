"""transformers' Granite 4 hybrids: Mamba-2 and attention layers in turn, each with an MLP and, if any, experts behind it."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.causal_lm import Input
from magc.integrations.transformers.hybrid import (
    AttentionDecoderLayer,
    Block,
    DecoderLayer,
    Hybrid,
    Mamba2DecoderLayer,
    adapt_hybrid,
)
from magc.nn.operators import Impl

_MODULE = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"


class GraniteLayer(DecoderLayer):
    """What both kinds of layers share."""

    norms = ("input_layernorm", "post_attention_layernorm")

    def feed(self, x_BLD: Tensor) -> Tensor:
        """The shared MLP, and the experts."""
        block: Any = self.block
        y_BLD = block.shared_mlp(x_BLD)
        return block.block_sparse_moe(x_BLD) + y_BLD if block.has_experts else y_BLD

    def router(self) -> tuple[nn.Module, int] | None:
        """See `DecoderLayer.router`."""
        block: Any = self.block
        return (block.block_sparse_moe.router, block.block_sparse_moe.router.top_k) if block.has_experts else None

    @property
    def residual_scale(self) -> float:
        """See `DecoderLayer.residual_scale`."""
        block: Any = self.block
        return block.residual_multiplier


class GraniteMambaLayer(GraniteLayer, Mamba2DecoderLayer):
    """One with a Mamba-2 mixer."""


class GraniteAttentionLayer(GraniteLayer, AttentionDecoderLayer):
    """One with attention."""


def _block(trunk: Any, block: Any, index: int, impl: Impl, norm: nn.Module | None) -> Block:
    classes: Any = importlib.import_module(_MODULE)
    parts: dict[str, type[nn.Module]] = {}
    if block.has_experts:
        parts["block_sparse_moe.router"] = classes.GraniteMoeHybridTopKRouter
    if block.mamba is not None:
        layer = GraniteMambaLayer(block, impl, norm)
        return Block(layer, {**parts, "mamba": classes.GraniteMoeHybridMambaLayer}, ("mamba", *GraniteLayer.norms))
    attention = GraniteAttentionLayer(block, impl, norm, trunk.rotary_emb, classes.apply_rotary_pos_emb)
    parts["self_attn"] = classes.GraniteMoeHybridAttention
    return Block(attention, parts, ("self_attn", *GraniteLayer.norms))


_FAMILY = Hybrid(
    _MODULE,
    "GraniteMoeHybrid",
    _block,
    "convolution, scan and gated norm of GraniteMoeHybridMambaLayer run on magc's operators with the model's own parameters; "
    "projections, MLPs and experts are called as modules",
    final_norm="norm",
    takes_in=lambda trunk: Input(attends=True, scale=trunk.embedding_multiplier, scales_given=True),
    logits_scale=lambda model: 1.0 / model.config.logits_scaling,
    routers=True,
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `GraniteMoeHybridModel` or `GraniteMoeHybridForCausalLM` on a grid; see `adapt_hybrid`."""
    return adapt_hybrid(model, settings, _FAMILY)
