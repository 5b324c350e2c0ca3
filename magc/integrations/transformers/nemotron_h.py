"""transformers' Nemotron-H: layers of one part each, a Mamba-2 mixer, attention, an MLP or experts."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from magc.contract import stateless
from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.attention import KVState, attend_module
from magc.integrations.transformers.hybrid import Block, DecoderLayer, Hybrid, adapt_hybrid
from magc.integrations.transformers.mixers import rms_norm, ssd_mixer, ssd_obstacle
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba2_values import Mamba2State
from magc.nn.operators import Choice, Impl, choose

_MODULE = "transformers.models.nemotron_h.modeling_nemotron_h"


class NemotronHLayer(DecoderLayer):
    """A `NemotronHBlock` with a state as a layer of the contract."""

    def _block(self, x_BLD: Tensor, state: Any, tokens: Tokens) -> tuple[Tensor, Any]:
        block: Any = self.block
        hidden, new_state = self.mix(self.norm(block.norm, x_BLD.to(block.norm.weight.dtype)), state, tokens)
        x_BLD = x_BLD + hidden
        return x_BLD if self.final_norm is None else self.norm(self.final_norm, x_BLD), new_state


class NemotronHMambaLayer(NemotronHLayer):
    """One with a Mamba-2 mixer."""

    def mix(self, x_BLD: Tensor, state: Mamba2State | None, tokens: Tokens) -> tuple[Tensor, Mamba2State]:
        """See `ssd_mixer`."""
        block: Any = self.block
        return ssd_mixer(block.mixer, x_BLD, state, tokens, self.impl)

    def implementation(self, device: Any, dtype: Any = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        block: Any = self.block
        return choose(self.impl, device, dtype, ssd_obstacle(block.mixer))


class NemotronHAttentionLayer(NemotronHLayer):
    """One with attention, which knows no positions."""

    def mix(self, x_BLD: Tensor, state: KVState | None, tokens: Tokens) -> tuple[Tensor, KVState]:
        """See `attend_module`."""
        block: Any = self.block
        return attend_module(block.mixer, None, None, x_BLD, state, tokens)


class NemotronHFeedForward(nn.Module):
    """A `NemotronHBlock` with an MLP or experts, which treat every token on its own.

    Args:
        block, impl, final_norm: as of `DecoderLayer`.
    """

    def __init__(self, block: nn.Module, impl: Impl, final_norm: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.impl: Impl = impl
        self.final_norm = final_norm

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The residual stream behind the block, `(batch, length, hidden)`."""
        block: Any = self.block
        x_BLD = x_BLD + block.mixer(rms_norm(block.norm, x_BLD.to(block.norm.weight.dtype), self.impl))
        return x_BLD if self.final_norm is None else rms_norm(self.final_norm, x_BLD, self.impl)


def _block(trunk: Any, block: Any, index: int, impl: Impl, norm: nn.Module | None) -> Block:
    classes: Any = importlib.import_module(_MODULE)
    if block.block_type == "linear_attention":
        layer = NemotronHMambaLayer(block, impl, norm)
        return Block(layer, {"mixer": classes.NemotronHMamba2Mixer}, ("mixer", "norm"))
    if block.block_type == "full_attention":
        attention = NemotronHAttentionLayer(block, impl, norm)
        return Block(attention, {"mixer": classes.NemotronHAttention}, ("mixer", "norm"))
    return Block(stateless(NemotronHFeedForward(block, impl, norm)), {}, ("norm",))


_FAMILY = Hybrid(
    _MODULE,
    "NemotronH",
    _block,
    "convolution, scan and gated norm of NemotronHMamba2Mixer run on magc's operators with the model's own parameters; "
    "projections, MLPs and experts are called as modules",
    block_class=("Block",),
    final_norm="norm_f",
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `NemotronHModel` or `NemotronHForCausalLM` on a grid; see `adapt_hybrid`."""
    return adapt_hybrid(model, settings, _FAMILY)
