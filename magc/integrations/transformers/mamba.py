"""transformers' Mamba: `MambaModel` and `MambaForCausalLM`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.block import BlockLayer, Family, adapt_blocks
from magc.integrations.transformers.mixers import selective_mixer, selective_obstacle
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba import MambaState


class MambaLayer(BlockLayer):
    """A `MambaBlock` as a layer of the contract."""

    def mix(
        self, x_BLD: Tensor, state: MambaState | None, tokens: Tokens, *, output_needed: bool
    ) -> tuple[Tensor, MambaState]:
        """See `selective_mixer`."""
        block: Any = self.block
        return selective_mixer(block.mixer, x_BLD, state, tokens, self.impl)

    def obstacle(self) -> str:
        """See `selective_obstacle`."""
        block: Any = self.block
        return selective_obstacle(block.mixer)


_FAMILY = Family("transformers.models.mamba.modeling_mamba", "Mamba", MambaLayer, "convolution and selective scan")


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a model on a grid; see `adapt_blocks`."""
    return adapt_blocks(model, settings, _FAMILY)
