"""transformers' Falcon-H1: a Mamba-2 mixer and attention side by side in every layer, with a gated MLP behind them."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.attention import KVState, attend_module
from magc.integrations.transformers.causal_lm import Input
from magc.integrations.transformers.hybrid import AttentionDecoderLayer, Block, Hybrid, adapt_hybrid
from magc.integrations.transformers.mixers import ssd_mixer, ssd_obstacle
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba2_values import Mamba2State
from magc.nn.operators import Choice, Impl, choose

_MODULE = "transformers.models.falcon_h1.modeling_falcon_h1"


class FalconH1State(NamedTuple):
    """What a layer carries from one segment to the next."""

    mamba: Mamba2State
    attention: KVState


class FalconH1Layer(AttentionDecoderLayer):
    """A `FalconH1DecoderLayer` as a layer of the contract."""

    def mix(self, x_BLD: Tensor, state: FalconH1State | None, tokens: Tokens) -> tuple[Tensor, FalconH1State]:
        """Both mixers over a segment, each with its multipliers."""
        block: Any = self.block
        mixer = block.mamba
        mamba_state, kv_state = (None, None) if state is None else state
        scales = (mixer.ssm_in_multiplier, mixer.mup_vector)
        y_BLD, mamba_state = ssd_mixer(mixer, x_BLD, mamba_state, tokens, self.impl, scales=scales)
        attended_BLD, kv_state = attend_module(
            block.self_attn,
            self.rotary,
            self.rotate,
            x_BLD * block.attention_in_multiplier,
            kv_state,
            tokens,
            key_scale=block.self_attn.key_multiplier,
        )
        y_BLD = y_BLD * block.ssm_out_multiplier + attended_BLD * block.attn_out_multiplier
        return y_BLD, FalconH1State(mamba_state, kv_state)

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        block: Any = self.block
        return choose(self.impl, device, dtype, ssd_obstacle(block.mamba))


def _block(trunk: Any, block: Any, index: int, impl: Impl, norm: nn.Module | None) -> Block:
    classes: Any = importlib.import_module(_MODULE)
    layer = FalconH1Layer(block, impl, norm, trunk.rotary_emb, classes.apply_rotary_pos_emb)
    parts: dict[str, type[nn.Module]] = {"mamba": classes.FalconH1Mixer, "self_attn": classes.FalconH1Attention}
    return Block(layer, parts, (*parts, *FalconH1Layer.norms))


_FAMILY = Hybrid(
    _MODULE,
    "FalconH1",
    _block,
    "convolution, scan and gated norm of FalconH1Mixer run on magc's operators with the model's own parameters; projections "
    "and MLPs are called as modules",
    takes_in=lambda trunk: Input(attends=True, scale=trunk.embedding_multiplier),
    logits_scale=lambda model: model.model.lm_head_multiplier,
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `FalconH1Model` or `FalconH1ForCausalLM` on a grid; see `adapt_hybrid`."""
    return adapt_hybrid(model, settings, _FAMILY)
