"""Cells as CUDA graphs: the same bits as the eager runner's, whatever the plan and whatever happens between calls."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magc
from magc import GridCheckpoint, Plan
from magc.errors import InputError
from magc.integrations.torch_rnn import split_rnn
from magc.nn import Mamba2Config, Mamba2LM
from tests.magc.layers import Decay

needs_gpu = pytest.mark.gpu


class Noisy(nn.Module):
    """A recurrent layer with dropout."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(features, features)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x[:, 0]) if state is None else state
        h = torch.tanh(self.mix(self.drop(x)).mean(1) + h)
        return x + self.drop(torch.relu(self.mix(x + h[:, None]))), h


def layers(count: int = 4, features: int = 16) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Noisy(features).cuda() for _ in range(count)]


def step(grid: GridCheckpoint, x: Tensor, seed: int = 0) -> list[Tensor]:
    """Output, states and all gradients of one call."""
    torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_()
    y, states = grid(leaf)
    params = list(grid.parameters())
    grads = torch.autograd.grad(
        y.square().mean() + sum(state.sum() for state in states), [leaf, *params], allow_unused=False
    )
    return [y.detach(), *(state.detach() for state in states), *grads]


def step_of_rnn(grid: GridCheckpoint, x: Tensor, seed: int) -> list[Tensor]:
    """As `step`, for layers whose state is a pair."""
    torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_()
    y, states = grid(leaf)
    total = y.square().mean() + sum(part.sum() for state in states for part in state)
    grads = torch.autograd.grad(total, [leaf, *grid.parameters()])
    return [y.detach(), *(part.detach() for state in states for part in state), *grads]


def pair(plan: Plan, made: list[nn.Module] | None = None, **options: Any) -> tuple[GridCheckpoint, GridCheckpoint]:
    """The same layers under both runners."""
    made = layers() if made is None else made
    eager = GridCheckpoint(made, plan, **options)
    return eager, GridCheckpoint(made, plan, runner="cuda-graph", **options)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


PLANS = {
    "segments": Plan(layers=4, tokens=8),
    "groups x segments": Plan(layers=2, tokens=8),
    "ragged": Plan(layers=4, tokens=9),
    "three cells kept": Plan(layers=4, tokens=8, keep=3),
    "groups, five cells kept": Plan(layers=2, tokens=8, keep=5),
    "snapshots": Plan(layers=4, tokens=4, snapshots=3),
    "borders rebuilt": Plan(layers=2, tokens=8, borders="rebuild"),
    "states in host memory": Plan(layers=4, tokens=8, states="host"),
    "one cell": Plan(layers=4, tokens=64),
}


@needs_gpu
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_bits_are_those_of_the_eager_runner_in_every_call(plan: Plan) -> None:
    eager, graphs = pair(plan)
    for call in range(4):  # the first runs eagerly, later ones capture and replay
        x = torch.randn(2, 64, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(call))
        assert_same(step(graphs, x, call), step(eager, x, call))
    captured = next(iter(graphs._graphs.values()))
    assert captured.forwards or captured.pairs


@needs_gpu
def test_a_training_loop_is_the_same_loop() -> None:
    made = layers()
    results: list[list[Tensor]] = []
    for runner in ("eager", "cuda-graph"):
        stack = GridCheckpoint(copy.deepcopy(made), Plan(layers=2, tokens=8), runner=runner)
        optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for _ in range(5):
            for _ in range(2):  # micro-batches
                y, _ = stack(torch.randn(2, 40, 16, device="cuda"))
                y.square().mean().backward()
            torch.nn.utils.clip_grad_norm_(stack.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in stack.parameters()])
    assert_same(*results)


@needs_gpu
def test_graphs_are_captured_anew_when_they_would_be_another_function() -> None:
    eager, graphs = pair(Plan(layers=4, tokens=8))
    x = torch.randn(2, 64, 16, device="cuda")
    for change in ("", "eval", "frozen", "thawed", "moved", "autocast"):
        if change == "eval":
            eager.eval(), graphs.eval()
        if change in ("frozen", "thawed"):
            eager.layers[0].mix.weight.requires_grad_(change == "thawed")
        if change == "moved":
            eager.layers[1].mix.weight.data = eager.layers[1].mix.weight.data.clone()
        for _ in range(3):
            results = []
            for grid in (graphs, eager):
                torch.manual_seed(3)
                leaf = x.clone().requires_grad_()
                with torch.autocast("cuda", torch.bfloat16, enabled=change == "autocast"):
                    y, _ = grid(leaf)
                wanted = [leaf, *(p for p in grid.parameters() if p.requires_grad)]
                results.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), wanted)])
            assert_same(*results)


@needs_gpu
def test_two_forwards_before_their_backwards_do_not_disturb_each_other() -> None:
    eager, graphs = pair(Plan(layers=4, tokens=8))
    inputs = [torch.randn(2, 64, 16, device="cuda") for _ in range(2)]
    for _ in range(3):
        results = []
        for grid in (graphs, eager):
            torch.manual_seed(5)
            outputs = [grid(x)[0] for x in inputs]
            results.append(
                [g for y in outputs for g in torch.autograd.grad(y.square().mean(), list(grid.parameters()))]
            )
        assert_same(*results)


@needs_gpu
def test_a_forward_that_is_thrown_away_frees_its_tape() -> None:
    eager, graphs = pair(Plan(layers=4, tokens=8))
    x = torch.randn(2, 64, 16, device="cuda")
    for _ in range(3):
        step(graphs, x)
    result = graphs(x.clone().requires_grad_())
    captured = next(iter(graphs._graphs.values()))
    assert captured.shared_tape is not None
    del result
    gc.collect()
    assert captured.shared_tape is None
    assert_same(step(graphs, x), step(eager, x))


class Waits(Noisy):
    """A layer that asks the GPU for a value."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = 1.0 if float(x.detach().sum()) > 0 else 2.0
        y, h = super().forward(x, state)
        return y * scale, h


@needs_gpu
def test_what_cannot_be_captured_runs_eagerly_and_the_plan_says_why() -> None:
    torch.manual_seed(0)
    made: list[nn.Module] = [Noisy(16).cuda(), Waits(16).cuda()]
    x = torch.randn(2, 64, 16, device="cuda")
    eager, graphs = pair(Plan(layers=1, tokens=8), made)
    for _ in range(3):
        assert_same(step(graphs, x), step(eager, x))
    captured = next(iter(graphs._graphs.values()))
    assert list(captured.refused) == ["layer 1 (Waits)"]
    planned = GridCheckpoint(made, budget="64MiB", runner="cuda-graph")
    planned._graphs[x.device] = captured
    assert "layer 1 (Waits) runs eagerly: its cell cannot be captured" in planned.plan_for(x).explain()


@needs_gpu
def test_a_language_model_with_stem_head_and_packed_documents() -> None:
    torch.manual_seed(0)
    config = Mamba2Config(d_model=64, n_layer=3, vocab_size=61, d_state=16, headdim=16)
    model = Mamba2LM(config, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 61, (2, 129), device="cuda")
    seq_idx = (torch.arange(128, device="cuda") // 40).expand(2, -1).to(torch.int32)
    plan = Plan(layers=3, tokens=32)
    results = []
    for runner in ("eager", "cuda-graph"):
        stack = GridCheckpoint(model.layers, plan, runner=runner)
        for _ in range(3):
            loss = stack.loss(ids[:, :-1], ids[:, 1:], stem=model.stem, head=model.head, seq_idx=seq_idx)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), *grads])
    assert_same(*results)


class Squares(nn.Module):
    """A head: the sum of squares."""

    def forward(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (y - targets).square().sum(), torch.full((), y.numel(), device=y.device)


@needs_gpu
def test_a_stem_that_returns_its_input() -> None:
    """Its cell has no graph, and torch nothing to warn of."""
    made = layers()
    results: list[list[Tensor]] = []
    for runner in ("eager", "cuda-graph"):
        grid = GridCheckpoint(made, Plan(layers=2, tokens=8), runner=runner)
        for _ in range(3):
            x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
            torch.manual_seed(1)
            loss = grid.loss(x, torch.zeros(2, 64, 1, device="cuda"), stem=nn.Identity(), head=Squares())
            found = list(torch.autograd.grad(loss, [x, *grid.parameters()]))
        results.append(found)
    assert_same(*results)


@needs_gpu
def test_layers_of_a_torch_lstm() -> None:
    """Kernels of cuDNN, thousands for a cell, and weights that are put together anew in each."""
    torch.manual_seed(0)
    made: list[nn.Module] = [*split_rnn(nn.LSTM(16, 32, 3, batch_first=True, device="cuda"))]
    x = torch.randn(2, 100, 16, device="cuda")
    eager, captured = pair(Plan(layers=3, tokens=16, keep=1), made)
    for seed in range(3):
        assert_same(step_of_rnn(captured, x, seed), step_of_rnn(eager, x, seed))
    planned = GridCheckpoint(made, budget="1GiB", runner="cuda-graph")
    assert "cannot be captured" not in planned.plan_for(x).explain()


@needs_gpu
def test_releasing_graphs_returns_their_memory() -> None:
    _, graphs = pair(Plan(layers=4, tokens=512), layers(features=256))
    x = torch.randn(1, 4096, 256, device="cuda")
    for _ in range(3):
        step(graphs, x)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphs.release_graphs()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


def test_graphs_need_a_gpu() -> None:
    grid = GridCheckpoint([Decay(4)], Plan(tokens=2), runner="cuda-graph")
    with pytest.raises(InputError, match="needs the layers on a CUDA device"):
        grid(torch.zeros(1, 4, 4))


@needs_gpu
def test_a_plan_made_before_counts_captured_cells() -> None:
    made = layers(features=256)
    x = torch.randn(2, 512, 256, device="cuda")
    eager, graphs = (magc.plan(made, x, budget="64MiB", runner=runner) for runner in ("eager", "cuda-graph"))
    assert graphs.forecast is not None
    assert graphs.forecast.costs.captured
    assert eager.forecast is not None
    assert not eager.forecast.costs.captured


def test_planning_for_graphs_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="needs the layers on a CUDA device"):
        magc.plan([Decay(4)], torch.zeros(1, 4, 4), budget="1MiB", runner="cuda-graph")


def test_an_unknown_runner_is_refused() -> None:
    with pytest.raises(InputError, match="runner='graph': give 'eager' or 'cuda-graph'"):
        GridCheckpoint([Decay(4)], Plan(tokens=2), runner="graph")  # pyright: ignore[reportArgumentType]
