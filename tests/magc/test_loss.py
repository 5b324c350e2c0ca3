"""The loss of stem, layers and head over a grid is that of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import GridCheckpoint, Plan, Segmented
from magc.meter import MemoryMeter
from magc.nn import Mamba2Config, Mamba2LM
from tests.magc.layers import (
    WIDTH,
    Cell,
    assert_same_bits,
    assert_same_gradients,
    floating,
    gradients,
    make_stack,
    objective,
    parameters,
    plain,
)

TOKENS, VOCABULARY = 11, 17
PLANS = [
    Plan(),
    Plan(tokens=4),
    Plan(layers=1, tokens=3),
    Plan(layers=2, tokens=(1, 4, 6), borders="rebuild", snapshots=0),
    Plan(layers=1, tokens=2, borders="disk", states="disk", keep=5),
    Plan(tokens=3, keep="all"),
]


def small_lm(*, tied: bool = True, vocabulary: int = VOCABULARY) -> Mamba2LM:
    torch.manual_seed(0)
    config = Mamba2Config(
        d_model=4, n_layer=3, vocab_size=vocabulary, d_state=3, headdim=2, chunk_size=3, tie_embeddings=tied
    )
    return Mamba2LM(config, dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator)
    targets = torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator)
    targets[0, :5] = -100
    return ids, targets


def whole_loss(model: Mamba2LM, ids: Tensor, targets: Tensor, reduction: str) -> Tensor:
    y, _ = plain(model.layers, model.stem(ids))
    return functional.cross_entropy(
        model.head.logits(y).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction
    )


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model(plan: Plan, reduction: Any, tied: bool) -> None:
    model = small_lm(tied=tied)
    ids, targets = batch()
    expected = whole_loss(model, ids, targets, reduction)
    grid = GridCheckpoint(model.layers, plan)
    loss = grid.loss(ids, targets, head=model.head, stem=model.stem, reduction=reduction)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = parameters([model])
    assert_same_gradients(gradients(loss, wanted), gradients(expected, wanted))


def test_packed_documents() -> None:
    model = small_lm()
    ids, targets = batch()
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2], dtype=torch.int32)
    y, _ = plain(model.layers, model.stem(ids), seq_idx=documents)
    total, count = model.head(y, targets)
    loss = GridCheckpoint(model.layers, Plan(layers=2, tokens=3)).loss(
        ids, targets, head=model.head, stem=model.stem, seq_idx=documents
    )
    torch.testing.assert_close(loss, total / count, rtol=1e-12, atol=1e-12)
    wanted = parameters([model])
    assert_same_gradients(gradients(loss, wanted), gradients(total / count, wanted))


class Slices(Segmented):
    """Yields segments of a tensor and notes which."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.whole.shape[1]

    def segment(self, start: int, stop: int) -> Tensor:
        self.asked.append((start, stop))
        return self.whole[:, start:stop].clone()


def test_sources_of_segments() -> None:
    model = small_lm()
    ids, targets = batch()
    expected = whole_loss(model, ids, targets, "mean")
    inputs, wanted_targets = Slices(ids), Slices(targets)
    grid = GridCheckpoint(model.layers, Plan(tokens=4))
    loss = grid.loss(inputs, wanted_targets, head=model.head, stem=model.stem)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = parameters([model])
    assert_same_gradients(gradients(loss, wanted), gradients(expected, wanted))
    assert set(inputs.asked) == set(wanted_targets.asked) == {(0, 4), (4, 8), (8, 11)}


def test_source_without_a_stem() -> None:
    layers = make_stack(("cell", "gru"))
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=4))
    y, states = grid(Slices(x))
    expected = plain(layers, x)
    assert_same_gradients(floating((y, states)), floating(expected))
    actual = gradients(objective(y, states), parameters(layers))
    assert_same_gradients(actual, gradients(objective(*expected), parameters(layers)))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_loss_and_state_go_on(plan: Plan) -> None:
    """Two halves with the state handed on, gradients flowing through it, are the whole."""
    model = small_lm()
    ids, targets = batch()
    expected = whole_loss(model, ids, targets, "sum")
    parts = {"head": model.head, "stem": model.stem, "reduction": "sum"}
    rule = plan if not isinstance(plan.tokens, tuple) else Plan(layers=2, tokens=2, borders="rebuild", snapshots=0)
    grid = GridCheckpoint(model.layers, rule)
    first, state = grid.loss_and_state(ids[:, :6], targets[:, :6], **parts)
    second, _ = grid.loss_and_state(ids[:, 6:], targets[:, 6:], state=state, **parts)
    loss = first + second
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = parameters([model])
    assert_same_gradients(gradients(loss, wanted), gradients(expected, wanted))


def test_float_inputs_get_gradients_through_the_stem() -> None:
    torch.manual_seed(0)
    stem, head_layer = nn.Linear(3, WIDTH, dtype=torch.float64), nn.Linear(WIDTH, 2, dtype=torch.float64)
    layers = make_stack(("cell", "lstm"))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = head_layer

        def forward(self, y: Tensor, targets: Tensor) -> tuple[Tensor, int]:
            return (self.linear(y) - targets).square().sum(), targets.numel()

    x = torch.randn(2, TOKENS, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(2, TOKENS, 2, dtype=torch.float64)
    expected = (head_layer(plain(layers, stem(x))[0]) - targets).square().mean()
    loss = GridCheckpoint(layers, Plan(layers=1, tokens=4)).loss(x, targets, head=Head(), stem=stem)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *parameters([stem, *layers, head_layer])]
    assert_same_gradients(gradients(loss, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("frozen", ["stem", "stem and layers", "layers", "head"])
def test_frozen_parts(frozen: str) -> None:
    model = small_lm(tied=False)
    if "stem" in frozen:
        model.stem.requires_grad_(False)
    if "layers" in frozen:
        model.backbone.layers.requires_grad_(False)
    if frozen == "head":
        model.head.requires_grad_(False)
    ids, targets = batch()
    wanted = parameters([model])
    expected = gradients(whole_loss(model, ids, targets, "mean"), wanted)
    for plan in PLANS:
        loss = GridCheckpoint(model.layers, plan).loss(ids, targets, head=model.head, stem=model.stem)
        assert_same_gradients(gradients(loss, wanted), expected)


def test_low_precision_loss_is_summed_in_fp32() -> None:
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return self.weight * targets.sum(), torch.tensor(targets.numel(), dtype=torch.bfloat16)

    head, x = Ones(), torch.ones(1, 1001, WIDTH, dtype=torch.bfloat16)
    targets = torch.ones(1, 1001, dtype=torch.bfloat16)
    grid = GridCheckpoint([Cell(dtype=torch.bfloat16)], Plan(tokens=1))
    loss = grid.loss(x, targets, head=head, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss == 1001
    loss.backward()
    assert head.weight.grad == torch.tensor(1001.0).bfloat16()
    assert grid.loss(x, targets, head=head) == 1


def test_without_gradients() -> None:
    model = small_lm()
    ids, targets = batch()
    grid = GridCheckpoint(model.layers, Plan(layers=1, tokens=4))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, states = grid.loss_and_state(ids, targets, head=model.head, stem=model.stem)
            expected = whole_loss(model, ids, targets, "mean")
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert len(states) == 3


def test_no_logits_of_the_whole_sequence_ever_exist() -> None:
    model = small_lm(vocabulary=400)
    ids = torch.zeros(1, 512, dtype=torch.int64)
    grid = GridCheckpoint(model.layers, Plan(tokens=16))
    with MemoryMeter("cpu") as meter:
        grid.loss(ids, ids, head=model.head, stem=model.stem).backward()
    assert meter.peak_bytes < 512 * 400 * 8 / 2


def test_gradient_of_a_scaled_loss() -> None:
    model = small_lm()
    ids, targets = batch()
    wanted = parameters([model])
    loss = GridCheckpoint(model.layers, Plan(tokens=4)).loss(ids, targets, head=model.head, stem=model.stem)
    first = gradients(loss * 3, wanted, retain_graph=True)
    assert_same_gradients(first, [3 * grad for grad in gradients(loss, wanted)])


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cuda_with_inputs_on_the_host(plan: Plan) -> None:
    model = small_lm().cuda()
    ids, targets = batch()
    wanted = parameters([model])
    expected = gradients(whole_loss(model, ids.cuda(), targets.cuda(), "mean"), wanted)
    grid = GridCheckpoint(model.layers, plan)
    for inputs in (ids, ids.pin_memory(), ids.cuda(), Slices(ids)):
        loss = grid.loss(inputs, targets, head=model.head, stem=model.stem)
        assert loss.is_cuda
        assert_same_gradients(gradients(loss, wanted), expected)
    if plan.tokens is None:
        assert_same_bits(loss, grid.loss(ids, targets, head=model.head, stem=model.stem))
