"""What transformers' recurrent language models share: a trunk of blocks on a grid, and the loss over it.

The trunk is the module that maps ids or embeddings to the last hidden state (`Mamba2Model`). A language model's own
forward calls its trunk, so without labels it stays as it is and returns logits as usual. With labels, the head and the
cross-entropy run inside the grid, segment by segment.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.errors import InputError
from magc.integrations.forward import GridForward, ModelGrid
from magc.integrations.transformers.mixers import project

IGNORED = -100
_CAPTURING = "transformers.utils.output_capturing"
_LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


class Stem(nn.Module):
    """Token ids to embeddings, inside the grid."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids_BL: Tensor) -> Tensor:
        """`(batch, length)` ids to `(batch, length, hidden)`."""
        x_BLD: Tensor = self.embeddings(ids_BL)
        # `enable_input_require_grads` has a hook make frozen embeddings ask for a gradient, which nobody would read.
        return x_BLD if x_BLD.grad_fn is not None else x_BLD.detach()


class Head(nn.Module):
    """Hidden states and targets to the summed cross-entropy of a segment."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, y_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The sum in float32 over targets other than `IGNORED`, and their number."""
        weight = getattr(self.projection, "weight", None)
        y_BLD = y_BLD if weight is None else y_BLD.to(weight.dtype)
        logits_BLV = project(self.projection, y_BLD).float()
        total = functional.cross_entropy(
            logits_BLV.flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total, (targets_BL != IGNORED).sum()


class HookedForward(GridForward):
    """A forward in a model of transformers, which leaves hooks of its own on modules."""

    def hooked(self, module: nn.Module) -> bool:
        """Whether a bypassed module has hooks that would not run; those that capture hidden states are idle here."""
        hooks: dict[int, Any] = vars(module)["_forward_hooks"]
        idle = [hook for hook in hooks.values() if getattr(hook, "__module__", "") == _CAPTURING]
        others = sum(
            len(vars(module)[kind]) for kind in ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
        return len(hooks) + others > len(idle)


class TrunkForward(HookedForward):
    """The forward of a trunk.

    Args:
        trunk: the module.
        grid: of its layers; the last one applies the trunk's final norm too.
        bypassed: as of `GridForward`.
        output: class of what the trunk returns.
    """

    def __init__(self, trunk: Any, grid: ModelGrid, bypassed: dict[str, nn.Module], output: Any) -> None:
        super().__init__(trunk, bypassed)
        self.grid = grid
        self.output = output

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether a call trains without a cache.

        Raises:
            InputError: it trains, with an argument that the grid cannot serve.
        """
        trunk: Any = self.module
        if not caches(trunk, call):
            # Some language models hand the arguments of their loss to the trunk too.
            known = ("input_ids", "inputs_embeds", "attention_mask", "use_cache", "return_dict", *_LOSS_ARGUMENTS)
            refuse_unknown(trunk, call, known)
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
        stem, inputs = inputs_of(trunk, call)
        x_BLD = inputs if stem is None else stem(inputs)
        hidden, _ = self.grid(x_BLD, **self.side(call, x_BLD))
        return self.output(last_hidden_state=hidden) if returns_dict(trunk, call) else (hidden,)

    def side(self, call: dict[str, Any], inputs: Tensor) -> dict[str, Tensor | None]:
        """Side inputs of the layers for a call; ``inputs`` are its ids or embeddings."""
        return {"attention_mask": padding(call)}


class LMForward(HookedForward):
    """The forward of a language model.

    Args:
        model: the module; ``model.lm_head`` maps the trunk's output to logits.
        trunk: the forward of its trunk.
        output: class of what the model returns.
        logits: whether logits are wanted beside a loss.
    """

    def __init__(self, model: Any, trunk: TrunkForward, output: Any, *, logits: bool) -> None:
        super().__init__(model, {"the trunk": trunk.module, **trunk.bypassed})
        self.trunk = trunk
        self.output = output
        self.logits = logits
        self.stem = Stem(model.get_input_embeddings())
        self.head = Head(model.lm_head)

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether a call's loss is computed inside the grid; otherwise the trunk decides for itself.

        Raises:
            InputError: as `TrunkForward.takes`, or the loss is not transformers' own.
        """
        if self.logits or "labels" not in call:
            return False
        beside = ("labels", *_LOSS_ARGUMENTS)
        if not self.trunk.takes({name: value for name, value in call.items() if name not in beside}):
            return False
        self._require_own_loss()
        return True

    @property
    def note(self) -> str:
        """How the loss is computed, for the report."""
        if self.logits:
            return "the loss is computed from whole logits, outside the grid and the budget (logits=True)"
        return "with labels, head and cross-entropy run inside the grid, and the output's logits are None"

    def run(self, call: dict[str, Any]) -> Any:
        """The loss, without logits."""
        model: Any = self.module
        # Embeddings and head may have been replaced since (resized, tied anew, given LoRA).
        self.stem.embeddings, self.head.projection = model.get_input_embeddings(), model.lm_head
        stem, inputs = inputs_of(self.trunk.module, call)
        items = call.get("num_items_in_batch")
        side: dict[str, Any] = self.trunk.side(call, inputs)
        loss = self.trunk.grid.loss(
            inputs,
            targets(call),
            stem=None if stem is None else self.stem,
            head=self.head,
            reduction="mean" if items is None else "sum",
            **side,
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return self.output(loss=loss) if returns_dict(model, call) else (loss,)

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
    if "cache_params" in call or "past_key_values" in call:
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


def padding(call: dict[str, Any]) -> Tensor | None:
    """The attention mask, `(batch, length)`; None if nothing is padded.

    Raises:
        InputError: a mask of another form.
    """
    mask = call.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask must be (batch, length), 1 for tokens and 0 for padding; got {shape}")
    return None if bool((mask == 1).all()) else mask


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
