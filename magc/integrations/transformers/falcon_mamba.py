"""transformers' Falcon Mamba: Mamba with norms on the step, B and C."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from magc.integrations.forward import Adapted, Settings
from magc.integrations.transformers.block import Family, adapt_blocks
from magc.integrations.transformers.mamba import MambaLayer
from magc.integrations.transformers.mixers import selective_mixer
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba import MambaState


class FalconMambaLayer(MambaLayer):
    """A `FalconMambaBlock` as a layer of the contract."""

    def mix(
        self, x_BLD: Tensor, state: MambaState | None, tokens: Tokens, *, output_needed: bool
    ) -> tuple[Tensor, MambaState]:
        """See `selective_mixer`."""
        block: Any = self.block
        mixer = block.mixer
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        return selective_mixer(mixer, x_BLD, state, tokens, self.impl, norms)


_FAMILY = Family(
    "transformers.models.falcon_mamba.modeling_falcon_mamba",
    "FalconMamba",
    FalconMambaLayer,
    "convolution and selective scan",
)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a model on a grid; see `adapt_blocks`."""
    return adapt_blocks(model, settings, _FAMILY)
