"""Language models of flash-linear-attention on a grid: their blocks run as they are, segment by segment."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from magc.errors import InputError
from magc.integrations.fla.layer import FLALayer
from magc.integrations.forward import Adapted, GridForward, Settings
from magc.integrations.transformers.causal_lm import Input, LMForward, TrunkForward
from magc.integrations.transformers.head import Loss
from magc.integrations.transformers.tokens import side_inputs

FIRST_VALUES = ("RWKV7Model",)
"""Trunks whose blocks take the first layer's values."""


class FLATrunkForward(TrunkForward):
    """The forward of a trunk, `GLAModel` or its like."""

    def side(self, call: dict[str, Any], inputs: Tensor) -> dict[str, Tensor | None]:
        """Where each token is.

        Raises:
            InputError: rows are padded in front of or between tokens, or packed.
        """
        side = side_inputs(call, inputs, attends=True)
        if side["attention_mask"] is not None:
            raise InputError(
                "flash-linear-attention takes padding out of a batch, which a segment cannot. Pad on the right and leave out "
                "the attention_mask: what comes later changes nothing before it, and labels of -100 keep it out of the loss"
            )
        if side["documents"] is not None:
            raise InputError(
                "packed rows are not served for models of flash-linear-attention: give each document a row of its own, padded "
                "on the right, without an attention_mask"
            )
        return {"places": side["places"]}


class FLALMForward(LMForward):
    """The forward of a language model, `GLAForCausalLM` or its like."""

    def _require_own_loss(self) -> None:
        model: Any = self.module
        if getattr(model, "criterion", None) is not None or getattr(model.config, "use_l2warp", False):
            raise InputError(
                f"{type(model).__name__} has a criterion of its own or use_l2warp=True, and the grid computes the plain "
                f"cross-entropy. Wrap with logits=True: the loss is then computed outside the grid"
            )


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a model of flash-linear-attention, or its trunk, on a grid.

    Raises:
        InputError: it has attention layers with keys and values, or residual connections across layers.
    """
    trunk = model if hasattr(model, "layers") else model.model
    if getattr(trunk, "use_attnres", False):
        raise InputError(
            "attnres_block_size lets a layer read the outputs of all before it, which do not travel along the grid. Set it to "
            "None, or write layers for magc.GridCheckpoint"
        )
    layers: list[nn.Module] = []
    last = len(trunk.layers) - 1
    for index, block in enumerate(trunk.layers):
        if type(block.attn).__name__ == "Attention":
            raise InputError(
                f"layers.{index} of this {type(model).__name__} is attention, whose cache of keys and values grows; magc takes "
                f"the recurrent layers of flash-linear-attention. Build the model with config.attn=None"
            )
        norm = trunk.norm if index == last else None
        takes_first = type(trunk).__name__ in FIRST_VALUES
        layers.append(FLALayer(block, norm, takes_first=takes_first, is_first=index == 0))
    outputs: Any = importlib.import_module("transformers.modeling_outputs")
    forward = FLATrunkForward(trunk, settings.grid(layers), {}, outputs.BaseModelOutputWithPast, Input(attends=True))
    forwards: tuple[GridForward, ...] = (forward,)
    notes = [
        "blocks run as flash-linear-attention's own modules and kernels, which take and give states with gradients"
    ]
    if trunk is model:
        return Adapted(forward.grid, forwards, tuple(notes))
    loss = Loss.of(settings)
    forwards += (FLALMForward(model, forward, outputs.CausalLMOutputWithPast, loss),)
    return Adapted(forward.grid, forwards, (*notes, loss.note), has_loss=True)
