"""Decoder layers of transformers' hybrids as layers of the contract, and a model of such layers on a grid.

The families differ in names, norms and multipliers, and in which mixer a layer has. What they share is here: a residual
block around a mixer and an MLP, attention that is told where a segment is, experts whose routers may be summed over.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magc.contract import Stateless
from magc.integrations.forward import Adapted, GridForward, Settings
from magc.integrations.transformers.attention import Rotate, attend_module, require_rotary
from magc.integrations.transformers.causal_lm import Input, LMForward, TrunkForward, require_part
from magc.integrations.transformers.head import Loss
from magc.integrations.transformers.mixers import require_conv, rms_norm, ssd_mixer, ssd_obstacle
from magc.integrations.transformers.routing import RoutedState, add_to_sums, router_logits
from magc.integrations.transformers.tokens import Tokens
from magc.nn.mamba2_values import Mamba2State
from magc.nn.operators import Choice, Impl, choose

ATTENTION_NOTE = (
    "the state of an attention layer is its keys and values, with room for the whole sequence at every boundary; attention is "
    "torch's scaled_dot_product_attention; predicted times take every segment for the first, while later ones attend to more"
)
ROUTER_NOTE = "a loss of the routers is summed up in the layers' states, so it is that of the whole sequence"


class DecoderLayer(nn.Module):
    """A decoder layer as a layer of the contract: norm, mixer, norm, MLP, with residual additions.

    Args:
        block: the decoder layer.
        impl: see `magc.nn.operators.Impl`.
        final_norm: applied behind the block: the trunk's, on its last block.
    """

    norms = ("input_layernorm", "pre_ff_layernorm")
    """Names of the norms in front of the mixer and of the MLP."""

    def __init__(self, block: nn.Module, impl: Impl, final_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.impl: Impl = impl
        self.final_norm = final_norm

    def mix(self, x_BLD: Tensor, state: Any, tokens: Tokens) -> tuple[Tensor, Any]:
        """The mixer over a segment: its output and the new state."""
        raise NotImplementedError

    def feed(self, x_BLD: Tensor) -> Tensor:
        """The MLP."""
        block: Any = self.block
        return block.feed_forward(x_BLD)

    def norm(self, norm: nn.Module, x_BLD: Tensor) -> Tensor:
        """One of the family's norms."""
        return rms_norm(norm, x_BLD, self.impl)

    def router(self) -> tuple[nn.Module, int] | None:
        """The layer's router, and how many experts it chooses per token; None without experts."""
        return None

    @property
    def residual_scale(self) -> float:
        """Of what is added to the residual stream."""
        return 1.0

    def forward(
        self,
        x_BLD: Tensor,
        state: Any = None,
        *,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        places: Tensor | None = None,
        positions: Tensor | None = None,
        routed: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Run a segment.

        Args:
            x_BLD: `(batch, length, hidden)`.
            state: of the mixer.
            attention_mask: see `Tokens.mask`.
            documents: see `Tokens`.
            places: see `Tokens`.
            positions: see `Tokens`.
            routed: which tokens the routers' loss counts, `(batch, length)`; None unless it is asked for.

        Returns:
            The residual stream behind the block, normed behind the last one, and the new state.
        """
        tokens = Tokens(attention_mask, documents, places, positions)
        router = None if routed is None else self.router()
        if routed is None or router is None:
            x_BLD, new_state = self._block(x_BLD, state, tokens)
            return x_BLD, new_state
        module, chosen = router
        before = None if state is None else state.sums
        with router_logits(module) as seen:
            x_BLD, new_state = self._block(x_BLD, None if state is None else state.mixer, tokens)
        return x_BLD, RoutedState(new_state, add_to_sums(before, torch.cat(seen), routed, chosen))

    def _block(self, x_BLD: Tensor, state: Any, tokens: Tokens) -> tuple[Tensor, Any]:
        first, second = (getattr(self.block, name) for name in self.norms)
        hidden, new_state = self.mix(self.norm(first, x_BLD), state, tokens)
        x_BLD = x_BLD + hidden * self.residual_scale
        x_BLD = x_BLD + self.feed(self.norm(second, x_BLD)) * self.residual_scale
        return x_BLD if self.final_norm is None else self.norm(self.final_norm, x_BLD), new_state


class Mamba2DecoderLayer(DecoderLayer):
    """One with a Mamba-2 mixer, ``block.mamba``."""

    def mix(self, x_BLD: Tensor, state: Mamba2State | None, tokens: Tokens) -> tuple[Tensor, Mamba2State]:
        """See `ssd_mixer`."""
        block: Any = self.block
        return ssd_mixer(block.mamba, x_BLD, state, tokens, self.impl)

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        block: Any = self.block
        return choose(self.impl, device, dtype, ssd_obstacle(block.mamba))


class AttentionDecoderLayer(DecoderLayer):
    """One with attention, ``block.self_attn``.

    Args:
        block, impl, final_norm: as of `DecoderLayer`.
        rotary: the trunk's rotary embeddings; None without.
        rotate: the family's function that applies them.
    """

    def __init__(
        self,
        block: nn.Module,
        impl: Impl,
        final_norm: nn.Module | None = None,
        rotary: nn.Module | None = None,
        rotate: Rotate | None = None,
    ) -> None:
        super().__init__(block, impl, final_norm)
        self.rotary = rotary
        self.rotate = rotate

    def mix(self, x_BLD: Tensor, state: Any, tokens: Tokens) -> tuple[Tensor, Any]:
        """See `attend_module`."""
        block: Any = self.block
        return attend_module(block.self_attn, self.rotary, self.rotate, x_BLD, state, tokens)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a hybrid.

    Attributes:
        layer: the block as a layer of the contract.
        parts: what must be plain modules of these classes for its mathematics to be known, by name in the block.
        bypassed: names in the block of modules whose forward the grid does not call; the block itself is one.
    """

    layer: DecoderLayer | Stateless
    parts: dict[str, type[nn.Module]]
    bypassed: Sequence[str]


@dataclass(frozen=True, slots=True)
class Hybrid:
    """What tells one of transformers' hybrids from another.

    Attributes:
        module: where its classes are.
        prefix: what their names begin with.
        block_class: names of classes of its blocks, behind the prefix.
        final_norm: name of the trunk's norm.
        blocks: ``blocks(trunk, block, index, impl, norm)``: a block of the trunk; ``norm`` is the trunk's on the last one.
        note: what runs on magc's operators.
        takes_in: what the trunk does with its input.
        logits_scale: of a language model's logits.
        routers: whether it may have experts.
    """

    module: str
    prefix: str
    blocks: Callable[[Any, Any, int, Impl, nn.Module | None], Block]
    note: str
    block_class: tuple[str, ...] = ("DecoderLayer",)
    final_norm: str = "final_layernorm"
    takes_in: Callable[[Any], Input] = lambda trunk: Input(attends=True)
    logits_scale: Callable[[Any], float] = lambda model: 1.0
    routers: bool = False


def output_classes(module: Any) -> tuple[Any, Any]:
    """The classes of what a hybrid's trunk and language model return.

    Releases of transformers differ (Nemotron-H's have room for routers since some release behind 5.17), and a module imports
    those for models with routers only to return them.
    """
    if hasattr(module, "MoeModelOutputWithPast"):
        return module.MoeModelOutputWithPast, module.MoeCausalLMOutputWithPast
    return module.BaseModelOutputWithPast, module.CausalLMOutputWithPast


def adapt_hybrid(model: Any, settings: Settings, family: Hybrid) -> Adapted:
    """Put a trunk of blocks, or a language model of ``model`` and ``lm_head``, on a grid.

    Raises:
        InputError: a part is not what the family has in its place, so its mathematics is not known.
        LayerContractError: a convolution that the operators cannot run.
    """
    classes: Any = importlib.import_module(family.module)
    trunk = model if isinstance(model, getattr(classes, f"{family.prefix}Model")) else model.model
    loss = None if trunk is model else Loss.of(settings, family.logits_scale(model))
    known = tuple(getattr(classes, family.prefix + name) for name in family.block_class)
    require_rotary(getattr(trunk, "rotary_emb", None))
    norm: nn.Module = getattr(trunk, family.final_norm)
    bypassed: dict[str, nn.Module] = {family.final_norm: norm}
    layers: list[nn.Module] = []
    for index, block in enumerate(trunk.layers):
        name = f"layers.{index}"
        require_part(name, block, next((cls for cls in known if isinstance(block, cls)), known[0]))
        last = index == len(trunk.layers) - 1
        made = family.blocks(trunk, block, index, settings.impl, norm if last else None)
        bypassed[name] = block
        for path, wanted in made.parts.items():
            part = block.get_submodule(path)
            require_part(f"{name}.{path}", part, wanted)
            if hasattr(part, "conv1d"):
                require_conv(f"{name}.{path}", part)
                bypassed[f"{name}.{path}.conv1d"] = part.conv1d
        bypassed |= {f"{name}.{path}": block.get_submodule(path) for path in made.bypassed}
        layers.append(made.layer)
    grid = settings.grid(layers)
    trunk_output, model_output = output_classes(classes)
    taken = {"layers": trunk.layers, **bypassed}
    if getattr(trunk, "rotary_emb", None) is not None:
        taken["rotary_emb"] = trunk.rotary_emb
    forward = TrunkForward(trunk, grid, bypassed, trunk_output, family.takes_in(trunk), taken)
    forwards: tuple[GridForward, ...] = (forward,)
    notes = [family.note, ATTENTION_NOTE, *([ROUTER_NOTE] if family.routers else [])]
    if loss is not None:
        forwards += (LMForward(model, forward, model_output, loss),)
        notes.append(loss.note)
    return Adapted(grid, forwards, tuple(notes), has_loss=loss is not None)
