"""Language models of flash-linear-attention on a grid: their blocks run as they are, segment by segment."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from magc.errors import InputError
from magc.integrations.fla.documents import Positions, positions_of
from magc.integrations.fla.layer import FLALayer
from magc.integrations.forward import Adapted, GridForward, Settings
from magc.integrations.transformers.causal_lm import Input, LMForward, TrunkForward, targets
from magc.integrations.transformers.head import IGNORED, Loss, Warped
from magc.integrations.transformers.tokens import padding, side_inputs

FIRST_VALUES = ("RWKV7Model",)
"""Trunks whose blocks take the first layer's values."""
L2_WARP = 1e-4
"""With ``config.use_l2warp``, RWKV-7's default, the gradient of each token's greatest logit gets this times that logit,
divided by the number of all tokens with or without a target, times the gradient of the loss (``fla.modules.l2warp``)."""
_NAMES = {"cu_seqlens": "cu_seq_lens_q"}


class FLATrunkForward(TrunkForward):
    """The forward of a trunk, `GLAModel` or its like."""

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """See `GridForward.bind`."""
        return _renamed(super().bind(args, kwargs))

    def side(self, call: dict[str, Any], inputs: Tensor) -> dict[str, Any]:
        """Where each token is, in its row and, in rows that are packed or padded on the left, in its document.

        Raises:
            InputError: as `side_inputs`, or padding between tokens.
        """
        side = side_inputs(call, inputs, attends=True)
        positions = positions_of(side)
        if positions is None:
            return {"places": side["places"]}
        rotates = any(cast(FLALayer, layer).rotates for layer in self.grid.layers)
        return {"places": side["places"], "positions": Positions(positions, everywhere=rotates)}


class FLALMForward(LMForward):
    """The forward of a language model, `GLAForCausalLM` or its like."""

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """See `GridForward.bind`."""
        return _renamed(super().bind(args, kwargs))

    def _require_own_loss(self) -> None:
        model: Any = self.module
        if getattr(model, "criterion", None) is not None:
            raise InputError(
                f"{type(model).__name__} has a criterion of its own, and the grid computes the plain cross-entropy. Wrap "
                f"with logits=True: the loss is then computed outside the grid"
            )

    def wanted(self, call: dict[str, Any]) -> Tensor | Warped:
        """See `LMForward.wanted`; warped if the configuration says so.

        Raises:
            InputError: warped rows are padded: flash-linear-attention warps the padding's logits too, and the grid's are
                not those of its own code.
        """
        wanted_BL = targets(call)
        config: Any = self.module.config
        if not getattr(config, "use_l2warp", False):
            return wanted_BL
        if padding(call) is not None:
            raise InputError(
                "config.use_l2warp=True changes gradients at padded tokens too, whose hidden states are others in the grid. "
                "Pack rows instead of padding them (magc.data.PackingCollator), or set model.config.use_l2warp = False"
            )
        # The grid divides the summed loss by the count of targets, unless the call says what to divide by.
        count = 1.0 if "num_items_in_batch" in call else (wanted_BL != IGNORED).sum()
        one_1L = torch.ones(1, wanted_BL.shape[1], dtype=torch.float64, device=wanted_BL.device)
        return Warped(wanted_BL, one_1L * (L2_WARP / wanted_BL.numel()) * count)


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments with flash-linear-attention's ``cu_seqlens`` as transformers calls it; with both, it stays unknown."""
    return call if "cu_seq_lens_q" in call else {_NAMES.get(name, name): value for name, value in call.items()}


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
    parts = {"layers": trunk.layers, "norm": trunk.norm}
    forward = FLATrunkForward(
        trunk, settings.grid(layers), {}, outputs.BaseModelOutputWithPast, Input(attends=True), parts
    )
    forwards: tuple[GridForward, ...] = (forward,)
    notes = [
        "blocks run as flash-linear-attention's own modules and kernels, which take and give states with gradients; "
        "a segment in which documents begin is cut there, one call for each, and is not captured as a CUDA graph"
    ]
    if trunk is model:
        return Adapted(forward.grid, forwards, tuple(notes))
    loss = Loss.of(settings)
    forwards += (FLALMForward(model, forward, outputs.CausalLMOutputWithPast, loss),)
    return Adapted(forward.grid, forwards, (*notes, loss.note), has_loss=True)
