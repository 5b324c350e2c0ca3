"""The gated delta rule against its recurrence and against transformers' own chunked form."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from magc.integrations.delta_rule import gated_delta_rule, l2_normalised
from tests.integrations.models import InDouble

SIZES = {"batch": 2, "length": 11, "key_heads": 2, "heads": 4, "d_k": 3, "d_v": 5}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, g, beta and a state, each with a gradient."""
    generator = torch.Generator().manual_seed(1)
    batch, length, key_heads, heads, d_k, d_v = SIZES.values()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        draw(batch, length, key_heads, d_k),
        draw(batch, length, key_heads, d_k),
        draw(batch, length, heads, d_v),
    ]
    tensors += [
        -draw(batch, length, heads).exp() / 4,
        draw(batch, length, heads).sigmoid(),
        draw(batch, heads, d_k, d_v),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Token by token."""
    ratio = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(ratio, 2) * scale, k.repeat_interleave(ratio, 2)
    outputs = []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        wrong = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def gradients(results: tuple[Tensor, Tensor], given: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weighted = [(out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in results]
    return list(torch.autograd.grad(sum(weighted, start=torch.zeros((), dtype=results[0].dtype)), given))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 11, 64])
def test_equals_the_recurrence(chunk_size: int) -> None:
    given = inputs()
    expected = recurrence(*given, 0.3)
    actual = gated_delta_rule(*given[:5], scale=0.3, initial_state=given[5], chunk_size=chunk_size)
    assert_close(actual, expected)
    assert_close(gradients(actual, given), gradients(expected, given))


def test_equals_transformers_own() -> None:
    modeling = cast(Any, pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next"))
    given = inputs()
    ratio = given[2].shape[2] // given[1].shape[2]
    q, k = (heads.repeat_interleave(ratio, 2) for heads in given[:2])  # 5.17's function leaves that to who calls it
    with InDouble():
        expected = modeling.torch_chunk_gated_delta_rule(
            q,
            k,
            *given[2:5],
            chunk_size=4,
            initial_state=given[5],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    actual = gated_delta_rule(
        l2_normalised(given[0]),
        l2_normalised(given[1]),
        *given[2:5],
        scale=3**-0.5,
        initial_state=given[5],
        chunk_size=3,
    )
    assert_close(actual, expected)
    assert_close(gradients(actual, given), gradients(expected, given))


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_segments_equal_the_whole(cut: int) -> None:
    given = inputs()
    whole = gated_delta_rule(*given[:5], scale=1.0, initial_state=given[5], chunk_size=4)
    first, state = gated_delta_rule(*(t[:, :cut] for t in given[:5]), scale=1.0, initial_state=given[5], chunk_size=4)
    rest, state = gated_delta_rule(*(t[:, cut:] for t in given[:5]), scale=1.0, initial_state=state, chunk_size=4)
    pieces = (torch.cat([first, rest], 1), state)
    assert_close(pieces, whole)
    assert_close(gradients(pieces, given), gradients(whole, given))


@pytest.mark.parametrize("cut", [None, 2, 5, 8])
def test_documents_are_sequences_of_their_own(cut: int | None) -> None:
    given = inputs()
    seq_idx = torch.tensor([[3] * 5 + [1] * 4 + [3] * 2, [0] * 11], dtype=torch.int32)
    state = given[5]
    alone = [
        recurrence(*(t[:1, a:b] for t in given[:5]), state[:1] * (a == 0), 1.0) for a, b in ((0, 5), (5, 9), (9, 11))
    ]
    second = recurrence(*(t[1:] for t in given[:5]), state[1:], 1.0)
    first = torch.cat([y for y, _ in alone], 1)
    expected = (torch.cat([first, second[0]]), torch.cat([alone[-1][1], second[1]]))
    before, parts = None, []
    for part in [slice(None)] if cut is None else [slice(cut), slice(cut, None)]:
        y, state = gated_delta_rule(
            *(t[:, part] for t in given[:5]),
            scale=1.0,
            initial_state=state,
            seq_idx=seq_idx[:, part],
            prev_seq_idx=before,
            chunk_size=4,
        )
        before = seq_idx[:, part][:, -1]
        parts.append(y)
    actual = (torch.cat(parts, 1), state)
    assert_close(actual, expected)
    assert_close(gradients(actual, given), gradients(expected, given))


def test_half_precision_computes_in_single() -> None:
    given = inputs(torch.bfloat16)
    y, state = gated_delta_rule(*given[:5], scale=0.3, initial_state=given[5].float())
    expected = recurrence(*(t.double() for t in given), 0.3)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close([state.double()], [expected[1]], 1e-5)


def test_strong_decays_do_not_overflow() -> None:
    given = [t.detach() for t in inputs(torch.float32)]
    given[3] = torch.full_like(given[3], -60.0)
    y, state = gated_delta_rule(*given[:5], scale=1.0, initial_state=given[5])
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()
