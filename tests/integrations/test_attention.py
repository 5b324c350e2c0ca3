"""Attention over segments with a state of keys and values: windows, documents, what the state holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from magc.errors import InputError
from magc.integrations.transformers.attention import Attention, KVState, attend
from magc.integrations.transformers.tokens import Tokens
from magc.integrations.wrap import wrap
from tests.integrations.models import PLANS, bamba

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 2, 11, 4, 2, 3
SEGMENTS = {"whole": (11,), "segments": (4, 4, 3), "ragged": (1, 2, 5, 3)}
DOCUMENTS = torch.tensor([[1] * 5 + [6] * 4 + [10] * 2, [1] * 11], dtype=torch.int32)
MASK = torch.tensor([[1] * 9 + [0] * 2, [1] * 11])


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    shapes = [(BATCH, n, LENGTH, SIZE) for n in heads]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def tokens(part: slice, **more: Any) -> Tokens:
    index = torch.arange(LENGTH)
    places = torch.stack([index, torch.full_like(index, LENGTH)])[:, part]
    return Tokens(places=places, **{name: value[:, part] for name, value in more.items()})


def run(qkv: list[Tensor], lengths: tuple[int, ...], window: int | None, **more: Any) -> tuple[Tensor, KVState]:
    state, ys, start = None, [], 0
    for length in lengths:
        part = slice(start, start + length)
        y, state = attend(*(t[:, :, part] for t in qkv), state, tokens(part, **more), Attention(0.5, window=window))
        ys.append(y)
        start += length
    assert state is not None
    return torch.cat(ys, 1), state


def whole(qkv: list[Tensor], window: int | None, allowed: Tensor | None = None) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    mask = (distance >= 0) & (distance < (window or LENGTH))
    mask = mask[None, None] if allowed is None else mask & allowed[:, None]
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in qkv[1:])
    scores = (qkv[0] @ k.transpose(-1, -2) * 0.5).masked_fill(~mask, -torch.inf)
    return (functional.softmax(scores, -1) @ v).transpose(1, 2).flatten(-2)


CASES: dict[str, tuple[dict[str, Tensor], Tensor | None]] = {
    "plain": ({}, None),
    "documents": ({"documents": DOCUMENTS}, DOCUMENTS[:, :, None] == DOCUMENTS[:, None]),
    "padding": ({"mask": MASK}, MASK[:, None].bool().expand(-1, LENGTH, -1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 3, 7, 20])
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
def test_segments_equal_the_whole(case: str, window: int | None, lengths: tuple[int, ...]) -> None:
    more, allowed = CASES[case]
    qkv = inputs()
    expected, (actual, _) = whole(qkv, window, allowed), run(qkv, lengths, window, **more)
    rows = torch.ones_like(MASK) if case != "padding" else MASK
    weights = (
        torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * rows[..., None]
    )
    assert torch.allclose(actual * rows[..., None], torch.nan_to_num(expected) * rows[..., None], atol=1e-12)
    theirs = torch.autograd.grad((torch.where(rows[..., None] == 1, expected, 0.0) * weights).sum(), qkv)
    for ours, their in zip(torch.autograd.grad((actual * weights).sum(), qkv), theirs, strict=True):
        assert torch.allclose(ours, torch.nan_to_num(their), atol=1e-12)


def test_a_window_keeps_no_more_than_itself() -> None:
    qkv = inputs()
    _, state = run(qkv, (4, 4, 3), 4)
    assert state.keys.shape == (BATCH, 3, KEY_HEADS, SIZE)
    assert torch.equal(state.keys, qkv[1][:, :, -3:].transpose(1, 2))
    assert torch.equal(state.values, qkv[2][:, :, -3:].transpose(1, 2))
    _, without = run(qkv, (4, 4, 3), None)
    assert without.keys.shape[1] == LENGTH


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = bamba(rope_parameters=rope, num_attention_heads=2)
    with pytest.raises(InputError, match=r"'dynamic' depend on the longest position"):
        wrap(model, plan=PLANS["ragged"])
