"""transformers' Bamba: Mamba-2 and attention layers in turn, each with a gated MLP behind it."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.hybrid import (
    AttentionDecoderLayer,
    Block,
    Hybrid,
    Mamba2DecoderLayer,
    adapt_hybrid,
)
from magc.nn.operators import Impl

_MODULE = "transformers.models.bamba.modeling_bamba"


def _block(trunk: Any, block: Any, index: int, impl: Impl, norm: nn.Module | None) -> Block:
    classes: Any = importlib.import_module(_MODULE)
    norms = Mamba2DecoderLayer.norms
    if block.block_type != "full_attention":
        layer = Mamba2DecoderLayer(block, impl, norm)
        return Block(layer, {"mamba": classes.BambaMixer}, ("mamba", *norms))
    attention = AttentionDecoderLayer(block, impl, norm, trunk.rotary_emb, classes.apply_rotary_pos_emb)
    return Block(attention, {"self_attn": classes.BambaAttention}, ("self_attn", *norms))


_FAMILY = Hybrid(
    _MODULE,
    "Bamba",
    _block,
    "convolution, scan and gated norm of BambaMixer run on magc's operators with the model's own parameters; projections and "
    "MLPs are called as modules",
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `BambaModel` or `BambaForCausalLM` on a grid; see `adapt_hybrid`."""
    return adapt_hybrid(model, settings, _FAMILY)
