"""transformers' Bamba: Mamba-2 and attention layers in turn, each with a gated MLP behind it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from magc.errors import InputError
from magc.integrations.forward import Adapted, GridForward, Settings
from magc.integrations.transformers.attention import KVState, Rotate, attend, places_of
from magc.integrations.transformers.causal_lm import LMForward, TrunkForward, padding, require_part
from magc.integrations.transformers.mixers import require_conv, rms_norm, ssd_mixer, ssd_obstacle
from magc.nn.mamba2_values import Mamba2State
from magc.nn.operators import Choice, Impl, choose

_MODULE = "transformers.models.bamba.modeling_bamba"


class BambaLayer(nn.Module):
    """A `BambaDecoderLayer` as a layer of the contract: norm, mixer, norm, MLP, with residual additions.

    Args:
        block: the decoder layer.
        impl: see `magc.nn.operators.Impl`.
        final_norm: applied behind the block: the trunk's, on its last block.
    """

    def __init__(self, block: nn.Module, impl: Impl, final_norm: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.impl: Impl = impl
        self.final_norm = final_norm

    def mix(self, x_BLD: Tensor, state: Any, mask_BL: Tensor | None, places_2L: Tensor) -> tuple[Tensor, Any]:
        """The mixer over a segment: its output and the new state."""
        raise NotImplementedError

    def forward(
        self, x_BLD: Tensor, state: Any = None, *, places: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Run a segment.

        Args:
            x_BLD: `(batch, length, hidden)`.
            state: of the mixer.
            places: see `places_of`.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding; None without padding.

        Returns:
            The residual stream behind the block, normed behind the last one, and the new state.
        """
        block: Any = self.block
        hidden, new_state = self.mix(rms_norm(block.input_layernorm, x_BLD, self.impl), state, attention_mask, places)
        x_BLD = x_BLD + hidden
        x_BLD = x_BLD + block.feed_forward(rms_norm(block.pre_ff_layernorm, x_BLD, self.impl))
        return x_BLD if self.final_norm is None else rms_norm(self.final_norm, x_BLD, self.impl), new_state


class BambaMambaLayer(BambaLayer):
    """One with a Mamba-2 mixer."""

    def mix(
        self, x_BLD: Tensor, state: Mamba2State | None, mask_BL: Tensor | None, places_2L: Tensor
    ) -> tuple[Tensor, Mamba2State]:
        """See `ssd_mixer`."""
        block: Any = self.block
        return ssd_mixer(block.mamba, x_BLD, state, mask_BL, self.impl)

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        block: Any = self.block
        return choose(self.impl, device, dtype, ssd_obstacle(block.mamba))


class BambaAttentionLayer(BambaLayer):
    """One with attention.

    Args:
        block, impl, final_norm: as of `BambaLayer`.
        rotary: the trunk's rotary embeddings.
        rotate: the family's function that applies them.
    """

    def __init__(
        self, block: nn.Module, impl: Impl, final_norm: nn.Module | None, rotary: nn.Module, rotate: Rotate
    ) -> None:
        super().__init__(block, impl, final_norm)
        self.rotary = rotary
        self.rotate = rotate

    def mix(
        self, x_BLD: Tensor, state: KVState | None, mask_BL: Tensor | None, places_2L: Tensor
    ) -> tuple[Tensor, KVState]:
        """See `attend`."""
        block: Any = self.block
        return attend(block.self_attn, self.rotary, self.rotate, x_BLD, state, mask_BL, places_2L)


class BambaTrunkForward(TrunkForward):
    """The forward of a `BambaModel`, whose attention layers are told where a segment is."""

    def side(self, call: dict[str, Any], inputs: Tensor) -> dict[str, Tensor | None]:
        """Side inputs of the layers.

        Raises:
            InputError: padding on the left with attention that is written out.
        """
        mask = padding(call)
        trunk: Any = self.module
        if trunk.config._attn_implementation == "eager" and mask is not None and bool((mask[:, 0] == 0).any()):
            raise InputError(
                'attn_implementation="eager" lets padded tokens in front attend to every token, later ones too. Pad on the '
                'right, or use model.set_attn_implementation("sdpa")'
            )
        return {"attention_mask": mask, "places": places_of(inputs)}


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `BambaModel` or `BambaForCausalLM` on a grid.

    Raises:
        InputError: a part is not what Bamba has in its place.
        LayerContractError: a convolution that the operators cannot run.
    """
    classes: Any = importlib.import_module(_MODULE)
    trunk = model if isinstance(model, classes.BambaModel) else model.model
    bypassed: dict[str, nn.Module] = {"final_layernorm": trunk.final_layernorm}
    layers: list[nn.Module] = []
    for index, block in enumerate(trunk.layers):
        name = f"layers.{index}"
        require_part(name, block, classes.BambaDecoderLayer)
        bypassed |= {name: block, f"{name}.input_layernorm": block.input_layernorm}
        bypassed |= {f"{name}.pre_ff_layernorm": block.pre_ff_layernorm}
        norm = trunk.final_layernorm if index == len(trunk.layers) - 1 else None
        if block.block_type == "full_attention":
            require_part(f"{name}.self_attn", block.self_attn, classes.BambaAttention)
            bypassed |= {f"{name}.self_attn": block.self_attn}
            rotate: Rotate = classes.apply_rotary_pos_emb
            layers.append(BambaAttentionLayer(block, settings.impl, norm, trunk.rotary_emb, rotate))
        else:
            require_part(f"{name}.mamba", block.mamba, classes.BambaMixer)
            require_conv(f"{name}.mamba", block.mamba)
            bypassed |= {f"{name}.mamba": block.mamba, f"{name}.mamba.conv1d": block.mamba.conv1d}
            layers.append(BambaMambaLayer(block, settings.impl, norm))
    grid = settings.grid(layers)
    outputs: Any = importlib.import_module("transformers.modeling_outputs")
    forward = BambaTrunkForward(trunk, grid, bypassed, outputs.BaseModelOutputWithPast)
    forwards: tuple[GridForward, ...] = (forward,)
    notes = [
        "convolution, scan and gated norm of BambaMixer run on magc's operators with the model's own parameters; "
        "projections and MLPs are called as modules",
        "the state of an attention layer is its keys and values, with room for the whole sequence at every boundary; "
        "attention is torch's scaled_dot_product_attention; predicted times take every segment for the first, while later "
        "ones attend to more",
    ]
    if trunk is not model:
        head = LMForward(model, forward, outputs.CausalLMOutputWithPast, logits=settings.logits)
        forwards += (head,)
        notes.append(head.note)
    return Adapted(grid, forwards, tuple(notes))
