"""Random numbers, autocast and deterministic flags are the same in a recompute as in the first run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import GridCheckpoint, Plan, grid_checkpoint, is_recomputing, stateless
from magc.ambient import RngTape
from tests.magc.layers import (
    RNN,
    WIDTH,
    Cell,
    Mlp,
    assert_same_bits,
    assert_same_gradients,
    gradients,
    make_stack,
    objective,
    parameters,
    plain,
    segment_bounds,
)

PLANS = [
    Plan(tokens=3),
    Plan(layers=1, tokens=3),
    Plan(layers=1, tokens=2, keep=4),
    Plan(layers=2, tokens=2, borders="rebuild"),
    Plan(layers=1, tokens=2, borders="disk", states="disk", snapshots=0),
    Plan(layers=1, tokens=1, borders="rebuild", snapshots=1),
]


def example(tokens: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- random numbers
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_dropout(plan: Plan) -> None:
    torch.manual_seed(0)
    layers = [Cell(dropout=0.3, dtype=torch.float64), *make_stack(("dropout", "gru", "dropout"), dropout=0.5)]
    x = example().requires_grad_()
    wanted = [x, *parameters(layers)]

    torch.manual_seed(5)
    expected = plain(layers, x, bounds=segment_bounds(plan, layers, 8))
    after_forward = torch.get_rng_state()
    expected_grads = gradients(objective(*expected), wanted)
    after_backward = torch.get_rng_state()

    torch.manual_seed(5)
    y, states = grid_checkpoint(layers, x, plan=plan)
    assert torch.equal(torch.get_rng_state(), after_forward)
    assert_same_bits((y, list(states)), expected)
    torch.rand(3)  # what is drawn in between changes nothing
    between = torch.get_rng_state()
    assert_same_gradients(gradients(objective(y, states), wanted), expected_grads)
    assert torch.equal(torch.get_rng_state(), between)
    assert torch.equal(after_forward, after_backward)


def test_random_numbers_of_frozen_groups() -> None:
    torch.manual_seed(0)
    layers = [Cell(dropout=0.3, dtype=torch.float64) for _ in range(3)]
    layers[0].requires_grad_(False)
    for plan in PLANS:
        torch.manual_seed(5)
        expected = plain(layers, example(), bounds=segment_bounds(plan, layers, 8))
        torch.manual_seed(5)
        y, states = grid_checkpoint(layers, example(), plan=plan)
        actual = gradients(objective(y, states), parameters(layers))
        assert_same_gradients(actual, gradients(objective(*expected), parameters(layers)))


def test_without_randomness_one_state_is_kept_in_all() -> None:
    tape = RngTape(torch.device("cpu"))
    for segment in range(50):
        tape.record((0, segment))
    assert len(tape) == 1
    torch.rand(1)
    tape.record((0, 50))
    assert len(tape) == 2
    now = torch.get_rng_state()
    tape.restore((0, 3))
    assert not torch.equal(torch.get_rng_state(), now)
    tape.restore((0, 50))
    assert torch.equal(torch.get_rng_state(), now)


# ---------------------------------------------------------------------- autocast
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(plan: Plan, inside: bool) -> None:
    torch.manual_seed(0)
    layers = [Cell(), stateless(Mlp()), Cell(), RNN(nn.GRU)]
    x = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(layers, x, bounds=segment_bounds(plan, layers, 8))
        expected_loss = objective(*expected)
    expected_grads = gradients(expected_loss, parameters(layers))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, states = grid_checkpoint(layers, x, plan=plan)
        loss = objective(y, states)
        assert_same_bits((y, list(states)), expected)
        if inside:
            grads = gradients(loss, parameters(layers))
    if not inside:
        grads = gradients(loss, parameters(layers))
    assert y.dtype == expected[0].dtype
    # The reference adds the segments' gradients of the casts in bf16; those of the grid are added in fp32.
    assert_same_gradients(grads, expected_grads, tolerance=2e-2)


def test_autocast_gradients_are_those_of_each_segment_added_in_fp32() -> None:
    torch.manual_seed(0)
    layers = [stateless(Mlp()), stateless(Mlp())]
    x, plan = example(dtype=torch.float32), Plan(layers=1, tokens=2)
    total: list[Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = grid_checkpoint(layers, x, plan=plan)
    actual = gradients(y.float().square().sum(), parameters(layers))
    for start in range(6, -1, -2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            part, _ = plain(layers, x[:, start : start + 2])
        grads = gradients(part.float().square().sum(), parameters(layers))
        total = grads if not total else [one + other for one, other in zip(total, grads, strict=True)]
    assert_same_bits(actual, total)


@pytest.mark.parametrize("train_before", [True, False])
def test_the_autocast_cache_holds_no_casts_of_the_grid(train_before: bool) -> None:
    torch.manual_seed(0)
    shared, other = nn.Linear(WIDTH, WIDTH), Cell()
    x = example(dtype=torch.float32)

    def loss(run: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = shared(x).float().sum() if train_before else torch.zeros(())
            with torch.no_grad():
                run([stateless(shared), other], x)
            y, _ = run([stateless(shared), other], x)
            after = shared(x)
            assert after.requires_grad
            return before + y.float().sum() + after.float().sum()

    wanted = [shared.weight, *other.parameters()]
    actual = gradients(loss(lambda layers, x: grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=2))), wanted)
    with torch.autocast("cpu", cache_enabled=False):
        expected = gradients(loss(plain), wanted)
    assert_same_gradients(actual, expected, tolerance=3e-2)


def test_autocast_off_inside_a_region() -> None:
    torch.manual_seed(0)
    layers = make_stack(("cell", "gru"), dtype=torch.float32)
    x = example(dtype=torch.float32)
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y, states = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=3))
        loss = objective(y, states)
        actual = gradients(loss, parameters(layers))
    assert y.dtype == torch.float32
    assert_same_gradients(actual, expected, tolerance=1e-5)


# ---------------------------------------------------------------------- flags
@contextmanager
def deterministic(mode: bool, *, warn_only: bool = False) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Notes(nn.Module):
    """Notes something at every call."""

    def __init__(self, look: Callable[[], Any]) -> None:
        super().__init__()
        self.weight, self.look, self.seen = nn.Parameter(torch.ones(WIDTH)), look, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((is_recomputing(), self.look()))
        return x * self.weight


def test_deterministic_flag() -> None:
    layer = Notes(torch.are_deterministic_algorithms_enabled)
    with deterministic(True, warn_only=True):
        y, _ = grid_checkpoint([stateless(layer)], torch.ones(1, 4, WIDTH), plan=Plan(tokens=2))
    with deterministic(False):
        y.sum().backward()
        assert not torch.are_deterministic_algorithms_enabled()
    assert layer.seen == [(False, True), (False, True), (True, True)]


def test_no_graph_is_made_without_gradients() -> None:
    layer = Notes(torch.is_grad_enabled)
    with torch.no_grad():
        grid_checkpoint([stateless(layer)], torch.ones(1, 6, WIDTH), plan=Plan(tokens=2))
    assert layer.seen == [(False, False)] * 3


def test_kernels_that_differ_in_grad_mode_run_in_it_both_times() -> None:
    """The LSTM of oneDNN rounds differently in inference."""
    torch.manual_seed(0)
    layers = [RNN(nn.LSTM, 8), RNN(nn.LSTM, 8)]
    x, plan = torch.randn(2, 40, 8), Plan(layers=1, tokens=10)
    grid = GridCheckpoint(layers, plan)
    expected = plain(layers, x, bounds=segment_bounds(plan, layers, 40))
    for _ in range(2):
        y, states = grid(x)
        assert_same_bits((y, list(states)), expected)
    with torch.no_grad():
        y, states = grid(x)
        assert_same_bits((y, list(states)), plain(layers, x, bounds=segment_bounds(plan, layers, 40)))


def test_is_recomputing_is_per_thread() -> None:
    seen: list[bool] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: seen.append(is_recomputing()))
        thread.start()
        thread.join()

    layer = Notes(look)
    y, _ = grid_checkpoint([stateless(layer)], torch.ones(1, 4, WIDTH), plan=Plan(tokens=2))
    y.sum().backward()
    assert [recomputing for recomputing, _ in layer.seen] == [False, False, True]
    assert seen == [False, False, False]


# ---------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cuda_dropout(plan: Plan) -> None:
    torch.manual_seed(0)
    layers = [Cell(dropout=0.3, dtype=torch.float64), *make_stack(("dropout", "gru", "dropout"), dropout=0.5)]
    layers = [layer.cuda() for layer in layers]
    x = example().cuda().requires_grad_()
    wanted = [x, *parameters(layers)]
    torch.manual_seed(5)
    expected = plain(layers, x, bounds=segment_bounds(plan, layers, 8))
    after_forward = torch.cuda.get_rng_state()
    expected_grads = gradients(objective(*expected), wanted)
    torch.manual_seed(5)
    y, states = grid_checkpoint(layers, x, plan=plan)
    assert torch.equal(torch.cuda.get_rng_state(), after_forward)
    assert_same_bits((y, list(states)), expected)
    torch.rand(3, device="cuda")
    between = torch.cuda.get_rng_state()
    assert_same_gradients(gradients(objective(y, states), wanted), expected_grads)
    assert torch.equal(torch.cuda.get_rng_state(), between)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [Plan(tokens=16), Plan(layers=1, tokens=16, borders="host", states="host")], ids=str)
def test_cuda_autocast(plan: Plan, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [layer.cuda() for layer in (Cell(), stateless(Mlp()), RNN(nn.LSTM), RNN(nn.GRU))]
    x = example(40, dtype=torch.float32).cuda()
    with torch.autocast("cuda", dtype=dtype):
        expected = plain(layers, x, bounds=segment_bounds(plan, layers, 40))
        y, states = grid_checkpoint(layers, x, plan=plan)
    assert_same_bits((y, list(states)), expected)
    actual = gradients(objective(y, states), parameters(layers))
    assert_same_gradients(actual, gradients(objective(*expected), parameters(layers)), tolerance=2e-2)
