"""transformers' Mamba-2: `Mamba2Model` and `Mamba2ForCausalLM`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.block import BlockLayer, Family, adapt_blocks
from magc.integrations.transformers.mixers import ssd_mixer, ssd_obstacle
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba2_values import Mamba2State


class Mamba2Layer(BlockLayer):
    """A `Mamba2Block` as a layer of the contract."""

    def mix(
        self, x_BLD: Tensor, state: Mamba2State | None, tokens: Tokens, *, output_needed: bool
    ) -> tuple[Tensor, Mamba2State]:
        """See `ssd_mixer`."""
        block: Any = self.block
        return ssd_mixer(block.mixer, x_BLD, state, tokens, self.impl, output_needed=output_needed)

    def obstacle(self) -> str:
        """See `ssd_obstacle`."""
        block: Any = self.block
        return ssd_obstacle(block.mixer)


_FAMILY = Family(
    "transformers.models.mamba2.modeling_mamba2", "Mamba2", Mamba2Layer, "convolution, scan and gated norm"
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a model on a grid; see `adapt_blocks`."""
    return adapt_blocks(model, settings, _FAMILY)
