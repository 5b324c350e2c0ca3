"""Text generation with any model ``logits, state = model(input_ids, state, num_last_tokens=1)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from magc.errors import InputError


@torch.no_grad()
def generate(
    model: Callable[..., tuple[Tensor, Any]],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    vocab_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: int | None,
    generator: torch.Generator | None,
    prefill_segment: int,
) -> Tensor:
    """Continue `input_ids`; see `magc.nn.Mamba2LM.generate`. Only ids below `vocab_size` are produced."""
    _check(input_ids, max_new_tokens, temperature, top_k, top_p, eos, vocab_size, prefill_segment)
    if max_new_tokens == 0:
        return input_ids.clone()
    state: Any = None
    logits = torch.empty(0)
    for segment in torch.split(input_ids, prefill_segment, dim=1):
        logits, state = model(segment, state, num_last_tokens=1)
    tokens = [input_ids]
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        token_B = sample(
            logits[:, -1, :vocab_size], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        ).to(input_ids.dtype)
        if eos is not None:
            token_B = token_B.masked_fill(finished, eos)
            finished = finished | (token_B == eos)
        tokens.append(token_B[:, None])
        if step + 1 == max_new_tokens or (eos is not None and bool(finished.all())):
            break
        logits, state = model(token_B[:, None], state, num_last_tokens=1)
    return torch.cat(tokens, dim=1)


def sample(
    logits_BV: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token per row, `(batch,)` int64: the likeliest at temperature 0, otherwise drawn.

    Args:
        logits_BV: `(batch, vocabulary)`.
        temperature: logits are divided by it.
        top_k: keep the k likeliest.
        top_p: of these, keep the fewest whose probability reaches p (Holtzman et al., arXiv 1904.09751).
        generator: source of randomness.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    sorted_BV, index_BV = (logits_BV.float() / temperature).sort(-1, descending=True)
    if top_k is not None:
        sorted_BV = sorted_BV[:, :top_k]
    probability_BV = sorted_BV.softmax(-1)
    if top_p is not None:
        mass_before_BV = probability_BV.cumsum(-1) - probability_BV
        mass_before_BV[:, 0] = 0.0  # the likeliest token stays, whatever the rounding
        probability_BV = probability_BV.masked_fill(mass_before_BV >= top_p, 0.0)
    choice_B1 = torch.multinomial(probability_BV, 1, generator=generator)
    return index_BV.gather(-1, choice_B1).squeeze(-1)


def _check(
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: int | None,
    vocab_size: int,
    prefill_segment: int,
) -> None:
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(f"input_ids must have shape (batch, length >= 1), got {tuple(input_ids.shape)}")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if prefill_segment < 1:
        raise InputError(f"prefill_segment must be at least 1, got {prefill_segment}")
    if temperature < 0.0:
        raise InputError(f"temperature must not be negative, got {temperature}; 0 takes the likeliest token")
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise InputError("top_k and top_p have no effect at temperature 0; set a temperature or leave them out")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")
    if eos is not None and not 0 <= eos < vocab_size:
        raise InputError(f"eos must be a token id below {vocab_size}, got {eos}")
