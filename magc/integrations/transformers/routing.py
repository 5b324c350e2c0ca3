"""The auxiliary loss of routers, exactly and inside the grid.

The loss is a product of two sums over all tokens and layers, how often each expert was chosen and how probable it was, so
no segment knows its share of it. Each layer therefore carries its sums in its state; the loss is computed from the final
states, and its gradient comes back through them.

Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equations (4) to (6), as transformers computes it.

Shape letters: B batch, L length, R rows (tokens of a segment), E experts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.errors import InputError


class RouterSums(NamedTuple):
    """What a layer's router did so far."""

    probabilities: Tensor
    """Sum over tokens of each expert's probability, `(experts,)`, at least float32."""
    chosen: Tensor
    """How many tokens went to each expert, likewise."""
    tokens: Tensor
    """How many tokens there were, a scalar."""


class RoutedState(NamedTuple):
    """The state of a layer with a router, when its loss is asked for."""

    mixer: Any
    sums: RouterSums


@contextmanager
def router_logits(router: nn.Module) -> Generator[list[Tensor]]:
    """The logits that a router of transformers computes while this is entered, each `(R, E)`.

    Raises:
        InputError: from the router's call, if none of its outputs is known to be logits.
    """
    seen: list[Tensor] = []
    handle = router.register_forward_hook(lambda module, _args, out: seen.append(_logits_among(module, out)))
    try:
        yield seen
    finally:
        handle.remove()


def _logits_among(router: Any, outputs: tuple[Tensor, ...]) -> Tensor:
    # Logits, weights, indices; Granite's in transformers 5.17: indices, weights, logits.
    logits = outputs[0] if outputs[0].is_floating_point() else outputs[-1]
    if not logits.is_floating_point() or logits.shape[-1] != router.num_experts:
        kinds = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in outputs)
        raise InputError(
            f"{type(router).__name__} returned {kinds}, of which neither the first nor the last are logits of "
            f"{router.num_experts} experts, so the routers' loss is not known. Leave out output_router_logits, and set "
            f"config.output_router_logits=False"
        )
    return logits


def add_to_sums(before: RouterSums | None, logits_RE: Tensor, counted_BL: Tensor, chosen: int) -> RouterSums:
    """The sums after a segment.

    Args:
        before: the sums before it; None at the start.
        logits_RE: of the segment's tokens.
        counted_BL: 1 for tokens, 0 for padding.
        chosen: experts per token.
    """
    dtype = torch.promote_types(logits_RE.dtype, torch.float32)
    probabilities_RE = functional.softmax(logits_RE.to(dtype), dim=-1)
    counted_R1 = counted_BL.to(dtype).reshape(-1, 1)
    picked_RE = torch.zeros_like(probabilities_RE).scatter_(
        1, probabilities_RE.detach().topk(chosen, dim=-1).indices, 1.0
    )
    sums = RouterSums((probabilities_RE * counted_R1).sum(0), (picked_RE * counted_R1).sum(0), counted_R1.sum())
    return sums if before is None else RouterSums(*(old + new for old, new in zip(before, sums, strict=True)))


def load_balancing_loss(states: Sequence[Any]) -> Tensor:
    """The loss of all layers that have a router, from their final states.

    Raises:
        InputError: no layer has one.
    """
    sums = [state.sums for state in states if isinstance(state, RoutedState)]
    if not sums:
        raise InputError(
            "output_router_logits=True asks for a loss of routers, but no layer has experts. Leave it out, and set "
            "config.output_router_logits=False"
        )
    tokens = torch.stack([each.tokens for each in sums]).sum()
    chosen_E = torch.stack([each.chosen for each in sums]).sum(0) / tokens
    probabilities_E = torch.stack([each.probabilities for each in sums]).sum(0) / tokens
    return (chosen_E * probabilities_E).sum() * chosen_E.shape[0]
