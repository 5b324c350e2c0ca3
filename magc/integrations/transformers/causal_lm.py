"""What transformers' recurrent language models share: a trunk of blocks on a grid, and the loss over it.

The trunk is the module that maps ids or embeddings to the last hidden state (`Mamba2Model`). A language model's own
forward calls its trunk, so without labels it stays as it is and returns logits as usual. With labels, the head and the
cross-entropy run inside the grid, segment by segment.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.errors import InputError
from magc.integrations.forward import GridForward, ModelGrid
from magc.integrations.transformers.head import IGNORED, Head, Loss, Stem, Warped
from magc.integrations.transformers.routing import load_balancing_loss
from magc.integrations.transformers.tokens import PACKING_ARGUMENTS, side_inputs

_CACHES = ("cache", "cache_params", "past_key_values")
"""What transformers calls its cache: the first since 5.24, the others before."""
_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "use_cache", "return_dict")
_CAPTURING = "transformers.utils.output_capturing"
_LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


@dataclass(frozen=True, slots=True)
class Input:
    """What a trunk does with its input.

    Attributes:
        attends: there are attention layers, which must know where a segment is.
        scale: of embeddings.
        scales_given: it multiplies inputs_embeds too.
    """

    attends: bool = False
    scale: float = 1.0
    scales_given: bool = False


class HookedForward(GridForward):
    """A forward in a model of transformers, which leaves hooks of its own on modules."""

    def misses(self, hook: object) -> bool:
        """Whether a hook on a bypassed module would be missed; those that capture hidden states are idle here."""
        return super().misses(hook) and getattr(hook, "__module__", "") != _CAPTURING


class TrunkForward(HookedForward):
    """The forward of a trunk.

    Args:
        trunk: the module.
        grid: of its layers; the last one applies the trunk's final norm too.
        bypassed: as of `GridForward`.
        output: class of what the trunk returns.
        takes_in: what the trunk does with its input.
        parts: as of `GridForward`.
    """

    def __init__(
        self,
        trunk: Any,
        grid: ModelGrid,
        bypassed: dict[str, nn.Module],
        output: Any,
        takes_in: Input,
        parts: dict[str, nn.Module],
    ) -> None:
        super().__init__(trunk, bypassed, parts)
        self.grid = grid
        self.output = output
        self.takes_in = takes_in
        self.handed: dict[str, Any] = {}

    @contextmanager
    def handing(self, arguments: dict[str, Any]) -> Generator[None]:
        """Calls of the trunk get these arguments too: some language models keep them for themselves."""
        self.handed = arguments
        try:
            yield
        finally:
            self.handed = {}

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """See `GridForward.bind`."""
        return {**super().bind(args, kwargs), **self.handed}

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether a call trains without a cache.

        Raises:
            InputError: it trains, with an argument that the grid cannot serve.
        """
        trunk: Any = self.module
        if not caches(trunk, call):
            # Some language models hand the arguments of their loss to the trunk too.
            refuse_unknown(trunk, call, (*_KNOWN, *PACKING_ARGUMENTS, *_LOSS_ARGUMENTS))
            return True
        if trunk.training:
            raise InputError(
                f"{type(trunk).__name__} was called with a cache (or use_cache=True) in a training forward, but a "
                f"cache is overwritten in place and carries no gradients. Pass use_cache=False; to generate, call it "
                f"under torch.no_grad() or after model.eval()"
            )
        return False

    def run(self, call: dict[str, Any]) -> Any:
        """The last hidden state."""
        trunk: Any = self.module
        embeddings, inputs = self.inputs(call)
        side = self.side(call, inputs)
        x_BLD = inputs if embeddings is None else Stem(embeddings, self.takes_in.scale)(inputs)
        hidden, _ = self.grid(x_BLD, **side)
        return self.output(last_hidden_state=hidden) if returns_dict(trunk, call) else (hidden,)

    def inputs(self, call: dict[str, Any]) -> tuple[nn.Module | None, Tensor]:
        """What makes embeddings of the input, None if these were given, and the input.

        Raises:
            InputError: not exactly one of input_ids and inputs_embeds was given.
        """
        embeddings, inputs = inputs_of(self.module, call)
        scale = self.takes_in.scale if self.takes_in.scales_given else 1.0
        return embeddings, inputs if embeddings is not None or scale == 1.0 else inputs * scale

    def side(self, call: dict[str, Any], inputs: Tensor) -> dict[str, Tensor | None]:
        """Side inputs of the layers for a call; ``inputs`` are its ids or embeddings.

        Raises:
            InputError: as `side_inputs`, or padding on the left of attention that is written out.
        """
        trunk: Any = self.module
        side = side_inputs(call, inputs, attends=self.takes_in.attends)
        mask = side["attention_mask"]
        written_out = self.takes_in.attends and trunk.config._attn_implementation == "eager"
        if written_out and mask is not None and bool((mask[:, 0] == 0).any()):
            raise InputError(
                'attn_implementation="eager" lets padded tokens in front attend to every token, later ones too. Pad on the '
                'right, or use model.set_attn_implementation("sdpa")'
            )
        return side


class LMForward(HookedForward):
    """The forward of a language model.

    Args:
        model: the module; ``model.lm_head`` maps the trunk's output to logits.
        trunk: the forward of its trunk.
        output: class of what the model returns.
        loss: how the loss is computed.
    """

    def __init__(self, model: Any, trunk: TrunkForward, output: Any, loss: Loss) -> None:
        [place] = [name for name, part in model.named_children() if part is trunk.module]
        super().__init__(model, {"the trunk": trunk.module, **trunk.bypassed}, trunk.parts_as(place))
        self.trunk = trunk
        self.output = output
        self.loss = loss
        self.stem = Stem(model.get_input_embeddings(), trunk.takes_in.scale)
        self.head = Head(model.lm_head, loss)

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether a call's loss is computed inside the grid, or the trunk must be told of packed rows.

        Otherwise the model's own code runs, and the trunk decides for itself.

        Raises:
            InputError: as `TrunkForward.takes`, or the loss is not transformers' own.
        """
        if not self.computes_loss(call):
            if caches(self.trunk.module, call):
                return False
            if self.balances(call):
                # The trunk refuses too, but not in every release of transformers is it told.
                refuse_unknown(self.module, {"output_router_logits": True}, ())
            return any(name in call for name in PACKING_ARGUMENTS)
        beside = ("labels", *_LOSS_ARGUMENTS, *(("output_router_logits",) if self.routes else ()))
        if not self.trunk.takes({name: value for name, value in call.items() if name not in beside}):
            return False
        self._require_own_loss()
        return True

    @property
    def routes(self) -> bool:
        """Whether the model can add a loss of its routers."""
        return hasattr(self.module, "router_aux_loss_coef")

    def balances(self, call: dict[str, Any]) -> bool:
        """Whether a call asks for a loss of the routers, or their logits."""
        model: Any = self.module
        return self.routes and bool(call.get("output_router_logits", model.config.output_router_logits))

    def computes_loss(self, call: dict[str, Any]) -> bool:
        """Whether a call is one for a loss without logits."""
        return "labels" in call and not self.loss.logits

    def run(self, call: dict[str, Any]) -> Any:
        """The loss, without logits; or what the model's own code makes of the trunk's output."""
        model: Any = self.module
        if not self.computes_loss(call):
            packing = {name: call.pop(name) for name in PACKING_ARGUMENTS if name in call}
            with self.trunk.handing(packing):
                return self.own(**call)
        # Embeddings and head may have been replaced since (resized, tied anew, given LoRA).
        self.stem.embeddings, self.head.projection = model.get_input_embeddings(), model.lm_head
        embeddings, inputs = self.trunk.inputs(call)
        items = call.get("num_items_in_batch")
        side: dict[str, Any] = self.trunk.side(call, inputs)
        balances = self.balances(call)
        if balances:
            # Its presence has layers with routers keep sums.
            mask = side["attention_mask"]
            side["routed"] = torch.ones(inputs.shape[:2], device=inputs.device) if mask is None else mask
        loss, states = self.trunk.grid.loss_and_state(
            inputs,
            self.wanted(call),
            stem=None if embeddings is None else self.stem,
            head=self.head,
            reduction="mean" if items is None else "sum",
            **side,
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        more: dict[str, Tensor] = {}
        if balances:
            more["aux_loss"] = load_balancing_loss(states)
            loss = loss + model.router_aux_loss_coef * more["aux_loss"]
        return self.output(loss=loss, **more) if returns_dict(model, call) else (loss, *more.values())

    def wanted(self, call: dict[str, Any]) -> Tensor | Warped:
        """The head's targets for a call with labels."""
        return targets(call)

    def _require_own_loss(self) -> None:
        own: Any = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
        used: Any = self.module.loss_function
        more = getattr(self.module, "z_loss_coefficient", 0)
        if used is not own or more:
            name = f"z_loss_coefficient={more}" if more else getattr(used, "__name__", used)
            raise InputError(
                f"{type(self.module).__name__} computes its loss by {name}, and the grid only knows "
                f"transformers' ForCausalLMLoss. Wrap with logits=True: the loss is then computed outside the grid"
            )


def caches(module: Any, call: dict[str, Any]) -> bool:
    """Whether a call uses a cache, as transformers decides it: without a word, in evaluation only."""
    if not call.keys().isdisjoint(_CACHES):
        return True
    return bool(call.get("use_cache", module.config.use_cache and not module.training))


def refuse_unknown(module: nn.Module, call: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse arguments that the grid would drop silently.

    Raises:
        InputError: naming them and what to do.
    """
    # A flag that is off, or logits_to_keep=0, asks for nothing.
    unknown = sorted(
        name for name, value in call.items() if name not in known and not (type(value) in (bool, int) and not value)
    )
    if getattr(cast(Any, module).config, "output_hidden_states", False) and "output_hidden_states" not in call:
        unknown.append("config.output_hidden_states=True")
    if not unknown:
        return
    remedies = {
        "output_hidden_states": "hidden states of every layer are what the grid does not keep",
        "output_router_logits": "the routers' logits of every token are what the grid does not keep; with labels, and "
        "without logits=True, their loss is computed inside it",
        "logits_to_keep": "with labels no logits exist; leave it out, or wrap with logits=True",
    }
    why = "; ".join(remedies[name] for name in unknown if name in remedies)
    raise InputError(
        f"{type(module).__name__}, wrapped by magc, was given {', '.join(unknown)} in a training forward"
        f"{f' ({why})' if why else ', which its grid does not serve'}. Leave it out, call under torch.no_grad(), or "
        f"magc.unwrap(model)"
    )


def inputs_of(trunk: Any, call: dict[str, Any]) -> tuple[nn.Module | None, Tensor]:
    """What makes embeddings of the input, None if these were given, and the input.

    Raises:
        InputError: not exactly one of input_ids and inputs_embeds was given.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if isinstance(ids, Tensor) and embeds is None:
        return trunk.get_input_embeddings(), ids
    if isinstance(embeds, Tensor) and ids is None:
        return None, embeds
    raise InputError("give exactly one of input_ids and inputs_embeds, as a tensor")


def targets(call: dict[str, Any]) -> Tensor:
    """The token to predict at each position, `(batch, length)`, `IGNORED` where there is none."""
    ignored = call.get("ignore_index", IGNORED)
    wanted = call.get("shift_labels")
    if wanted is None:
        wanted = functional.pad(call["labels"], (0, 1), value=ignored)[..., 1:]
    return wanted if ignored == IGNORED else torch.where(wanted == ignored, IGNORED, wanted)


def returns_dict(module: Any, call: dict[str, Any]) -> bool:
    """Whether an output object is wanted rather than a tuple."""
    return bool(call.get("return_dict", module.config.return_dict))


def require_part(name: str, part: nn.Module, wanted: type[nn.Module]) -> None:
    """Refuse a part of a model whose mathematics is not known.

    Raises:
        InputError: naming the part, what it is and what it must be.
    """
    if not isinstance(part, wanted) or "forward" in vars(part):
        what = "has a forward of its own" if isinstance(part, wanted) else f"is a {type(part).__name__}"
        raise InputError(
            f"{name} {what}, where magc.wrap knows the mathematics of a plain {wanted.__name__}. Put that in its place (LoRA "
            f"and quantisation belong on the projections inside), or write layers for magc.GridCheckpoint"
        )
