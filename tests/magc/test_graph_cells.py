"""The logic of captured cells on any device: a stand-in for capture calls the function again instead of replaying it.

What is captured must only read and write boxes, parameters and sums, or a second call would differ from the first as a
replay would. That CUDA graphs themselves give the same bits is tested in ``test_graph_runner.py``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from magc import GridCheckpoint, MemoryMeter, Plan
from magc.nn import Mamba2Block
from magc.planning import with_forecast
from magc.profile import profile
from magc.request import Request
from magc.runners.cache import GraphCache
from magc.runners.capture import CaptureError, CudaCapturer, Replay
from tests.magc.layers import WIDTH, floating, gradients, make_stack, objective
from tests.magc.strategies import Case, cases
from tests.magc.test_graph_runner import PLANS, Noisy, assert_same, step


class CallsAgain:
    """Captures without effect, as a GPU does, and replays by calling again."""

    def __init__(self, refuse: int = -1) -> None:
        self.cache: GraphCache | None = None
        self.captures = 0
        self.replays = 0
        self.reserves: list[tuple[object, int]] = []
        self._refuse = refuse

    def new_pool(self) -> object:
        return object()

    def capture(self, body: Callable[[], None], pool: object, reserve: int = 0) -> Replay:
        self.reserves.append((pool, reserve))
        if self.captures == self._refuse:
            self._refuse = -1
            raise CaptureError("it may not")
        self.captures += 1
        assert self.cache is not None
        before = {index: total.clone() for index, total in self.cache.sums.items()}
        with torch.random.fork_rng(devices=[]):
            body()
        for index, total in self.cache.sums.items():
            total.copy_(before[index])

        def replay() -> None:
            self.replays += 1
            body()

        return replay

    @contextlib.contextmanager
    def waits(self) -> Iterator[list[str]]:
        yield []


class Graphed(GridCheckpoint):
    """A grid whose cells run from a cache of captured ones."""

    def __init__(self, made: list[nn.Module], plan: Plan | None, capturer: CallsAgain, **options: Any) -> None:
        super().__init__(made, plan, **options)
        self.cache = capturer.cache = GraphCache(torch.device("cpu"), capturer)

    def _request(self, *args: Any, **kwargs: Any) -> Request:
        return replace(super()._request(*args, **kwargs), graphs=self.cache)


def layers(count: int = 4, features: int = 16) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Noisy(features) for _ in range(count)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_call_is_the_eager_one(plan: Plan) -> None:
    made, capturer = layers(), CallsAgain()
    eager, graphed = GridCheckpoint(made, plan), Graphed(made, plan, capturer)
    for call in range(3):
        x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(call))
        assert_same(step(graphed, x, call), step(eager, x, call))
    assert capturer.replays


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_stack_and_plan(case: Case) -> None:
    torch.manual_seed(case.seed)
    made = make_stack(case.kinds, dtype=torch.float32, dropout=0.2)
    capturer = CallsAgain()
    eager, graphed = GridCheckpoint(made, case.plan), Graphed(made, case.plan, capturer)
    x = torch.randn(case.batch, case.tokens, WIDTH)
    for call in range(3):
        results = []
        for grid in (eager, graphed):
            torch.manual_seed(call)
            leaf = x.clone().requires_grad_()
            outputs = floating(grid(leaf))
            wanted = [leaf, *(param for param in grid.parameters() if param.requires_grad)]
            results.append([*(y.detach() for y in outputs), *gradients(objective(outputs), wanted)])
        assert_same(*results)


def test_groups_share_their_boxes() -> None:
    """Four groups of two layers need as many boxes as two groups do (the first has the stack's own input)."""
    sizes = []
    for count in (4, 8):
        graphed = Graphed(layers(count), Plan(layers=2, tokens=8), CallsAgain())
        for call in range(2):
            step(graphed, torch.randn(2, 64, 16), call)
        sizes.append(graphed.cache.boxes.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_cells_that_wait_for_their_backward_share_no_box() -> None:
    """A box of a graph's memory may lie where another's tape is, which nothing may write to before its backward."""
    capturer = CallsAgain()
    graphed = Graphed(layers(), Plan(layers=2, tokens=8, keep=5), capturer)
    for call in range(3):
        step(graphed, torch.randn(2, 64, 16), call)

    def places(found: Any) -> set[int]:
        cells = (found.inputs.x, *found.inputs.states, found.outputs.y, *found.outputs.states)
        leaves = [leaf for flat in cells if flat is not None for leaf in flat.leaves]
        leaves += [*found.grad_y, *found.grads.x]
        leaves += [leaf for state in (*found.grad_states, *found.grads.states) for leaf in state]
        return {leaf.data_ptr() for leaf in leaves if leaf is not None}

    made = [found for pairs in graphed.cache.pairs.values() for found in pairs]
    alone = [found for found in made if not found.shared]
    assert len(alone) >= 4
    for index, found in enumerate(alone):
        others = [*alone[:index], *alone[index + 1 :], *(one for one in made if one.shared)]
        assert not places(found) & set().union(*map(places, others))


@pytest.mark.parametrize("batch", [1, 2])
def test_each_kind_is_captured_once(batch: int) -> None:
    """In a batch of one, strides of the batch's axis may be anything, and make no other kind."""
    torch.manual_seed(0)
    made: list[nn.Module] = [Mamba2Block(32, d_state=16, headdim=16, chunk_size=16) for _ in range(4)]
    capturer = CallsAgain()
    graphed = Graphed(made, Plan(layers=2, tokens=16), capturer)
    counts: list[int] = []
    for _ in range(4):
        y, _ = graphed(torch.randn(batch, 64, 32))
        sum(leaf.sum() for leaf in y).backward()
        counts.append(capturer.captures)
    assert counts[1] == counts[2] == counts[3]
    # Each group runs from no state and from one; each is recorded after both, and once with its output.
    assert len(graphed.cache.forwards) == 4
    assert len(graphed.cache.pairs) <= 6


def test_nothing_outlives_the_grid() -> None:
    """Cells that were captured to be timed are let go before the call, and those of a grid with it."""
    graphed = Graphed(layers(), None, CallsAgain(), budget="1GiB")
    before = weakref.WeakSet[object](found for found in gc.get_objects() if type(found) is GraphCache)
    step(graphed, torch.randn(2, 64, 16))
    gc.collect()
    assert {id(found) for found in gc.get_objects() if type(found) is GraphCache} <= {id(found) for found in before}
    cache = weakref.ref(graphed.cache)
    del graphed
    gc.collect()
    before.clear()
    assert cache() is None


@pytest.mark.parametrize("refused", range(8))
def test_a_capture_that_fails_changes_nothing_but_speed(refused: int) -> None:
    made, capturer = layers(), CallsAgain(refused)
    eager = GridCheckpoint(made, Plan(layers=2, tokens=8))
    graphed = Graphed(made, Plan(layers=2, tokens=8), capturer)
    for call in range(3):
        x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(call))
        assert_same(step(graphed, x, call), step(eager, x, call))
    reasons = graphed.cache.notes()
    assert len(reasons) == 2  # the layers of the group that was refused
    assert "runs eagerly: its cell cannot be captured (it may not)" in reasons[0]


def test_a_training_loop_is_the_same_loop() -> None:
    results: list[list[Tensor]] = []
    for graphed in (False, True):
        made = copy.deepcopy(layers())
        plan = Plan(layers=2, tokens=8)
        grid = Graphed(made, plan, CallsAgain()) if graphed else GridCheckpoint(made, plan)
        optimizer = torch.optim.AdamW(grid.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for _ in range(3):
            for _ in range(2):
                y, _ = grid(torch.randn(2, 40, 16))
                y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in grid.parameters()])
    assert_same(*results)


def test_two_forwards_before_their_backwards_do_not_disturb_each_other() -> None:
    made = layers()
    grids = (GridCheckpoint(made, Plan(layers=2, tokens=8)), Graphed(made, Plan(layers=2, tokens=8), CallsAgain()))
    inputs = [torch.randn(2, 64, 16) for _ in range(2)]
    for _ in range(3):
        results = []
        for grid in grids:
            torch.manual_seed(5)
            outputs = [grid(x)[0] for x in inputs]
            params = list(grid.parameters())
            results.append([g for y in outputs for g in torch.autograd.grad(y.square().mean(), params)])
        assert_same(*results)


class Sometimes(Noisy):
    """Uses its first parameter or its second, as it is told."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.other = nn.Linear(features, features)
        self.chosen = 0

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (self.mix, self.other)[self.chosen](x), torch.zeros_like(x[:, 0])


def test_what_one_cell_makes_alone_is_no_sum() -> None:
    """In the parameter's own type, whichever plan was last captured or is under way; None where there is no gradient."""
    torch.manual_seed(0)
    made: list[nn.Module] = [
        Mamba2Block(32, d_state=16, headdim=16, chunk_size=16, dtype=torch.bfloat16) for _ in range(4)
    ]
    capturer = CallsAgain()
    grids = (GridCheckpoint(made, Plan(layers=2, tokens=64)), Graphed(made, Plan(layers=2, tokens=64), capturer))
    inputs = [torch.randn(1, length, 32, dtype=torch.bfloat16) for length in (64, 192, 64, 192)]

    def gradients_of(grid: GridCheckpoint) -> list[Tensor]:
        losses = [sum(leaf.float().sum() for leaf in grid(x)[0]) for x in inputs]
        params = list(grid.parameters())
        return [g for loss in (losses[1], losses[0], *losses[2:]) for g in torch.autograd.grad(loss, params)]

    for _ in range(3):
        assert_same(*(gradients_of(grid) for grid in grids))
    cache = grids[1].cache
    assert {held.dtype for held in cache.whole.values()} >= {torch.bfloat16}
    assert {held.dtype for held in cache.sums.values()} == {torch.float32}
    assert len(cache.whole) == len(cache.sums) == len(list(grids[1].parameters()))


def test_a_parameter_that_is_not_used_this_time_has_no_gradient() -> None:
    torch.manual_seed(0)
    layer = Sometimes(16)
    # The capture is refused, as it is where a layer decides on the host: cells run eagerly on the graphs' memory.
    graphed = Graphed([layer, Noisy(16)], Plan(layers=2, tokens=64), CallsAgain(0))
    for call in range(4):
        layer.chosen = call % 2
        graphed.zero_grad()
        graphed(torch.randn(2, 64, 16))[0].sum().backward()
        used, unused = (layer.mix, layer.other)[:: 1 if layer.chosen == 0 else -1]
        assert used.weight.grad is not None
        assert unused.weight.grad is None


@pytest.mark.parametrize("plan", [Plan(layers=2, tokens=64), Plan(tokens=128), Plan(layers=1, tokens=64, keep=3)])
def test_the_predicted_peak_counts_boxes(plan: Plan) -> None:
    torch.manual_seed(0)
    made: list[nn.Module] = [Mamba2Block(32, d_state=16, headdim=16, chunk_size=32) for _ in range(4)]
    x = torch.randn(1, 512, 32, requires_grad=True)
    graphed = Graphed(made, plan, CallsAgain())
    costs = profile(graphed._request(x, None, {}), [64, 128])
    assert costs.captured
    predicted = with_forecast(plan, costs, 512).forecast
    with MemoryMeter("cpu") as meter:
        for _ in range(2):  # of the second call are the pairs of kept cells
            y, _ = graphed(x)
            sum(leaf.sum() for leaf in y).backward()
            del y
            graphed.zero_grad()
    assert predicted is not None
    assert meter.peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.1)


def test_shared_memory_is_given_in_one_piece_of_what_is_predicted() -> None:
    """Once for each pool that cells share, before its first capture; without a prediction not at all."""
    torch.manual_seed(0)
    made: list[nn.Module] = [Mamba2Block(32, d_state=16, headdim=16, chunk_size=32) for _ in range(4)]
    x = torch.randn(1, 512, 32, requires_grad=True)
    plan = Plan(layers=2, tokens=64, keep=3)
    for predicted in (False, True):
        capturer = CallsAgain()
        graphed = Graphed(made, plan, capturer)
        if predicted:
            graphed = Graphed(made, with_forecast(plan, profile(graphed._request(x, None, {}), [64]), 512), capturer)
            capturer.reserves.clear()
        forecast = graphed.plan_for(x).forecast
        expected = 0 if forecast is None else forecast.replay_bytes(plan)
        assert (expected > 0) == predicted
        for _ in range(2):
            graphed(x)[0][0].sum().backward()
            graphed.zero_grad()
        shared = [reserve for pool, reserve in capturer.reserves if pool is graphed.cache.pool]
        assert shared[0] == expected
        assert not any(shared[1:])
        assert not any(reserve for pool, reserve in capturer.reserves if pool is not graphed.cache.pool)
        graphed.release_graphs()


@pytest.mark.parametrize(("layers_per_group", "tokens"), [(1, 64), (2, 128), (1, 512)])
def test_two_calls_capture_all_that_further_ones_replay(layers_per_group: int, tokens: int) -> None:
    """With memory reserved, too, and where each cell of a call is the only one of its kind: a third would be timed."""
    torch.manual_seed(0)
    made: list[nn.Module] = [Mamba2Block(32, d_state=16, headdim=16, chunk_size=32) for _ in range(4)]
    x = torch.randn(1, tokens, 32, requires_grad=True)
    plan, capturer = Plan(layers=layers_per_group, tokens=64, keep=1), CallsAgain()
    costs = profile(Graphed(made, plan, capturer)._request(x, None, {}), [64])
    graphed = Graphed(made, with_forecast(plan, costs, tokens), capturer)
    capturer.reserves.clear()
    for call in range(4):
        before = capturer.captures
        graphed(x)[0][0].sum().backward()
        graphed.zero_grad()
        assert (capturer.captures > before) == (call == 1 or (call == 0 and tokens == 512))
    assert [reserve > 0 for _, reserve in capturer.reserves].count(True) == 1


def test_a_budget_holds_and_replays_are_timed() -> None:
    torch.manual_seed(0)
    made: list[nn.Module] = [Mamba2Block(32, d_state=16, headdim=16, chunk_size=32) for _ in range(4)]
    x = torch.randn(1, 512, 32, requires_grad=True)
    capturer = CallsAgain()
    graphed = Graphed(made, None, capturer, budget="3MiB")
    plan = graphed.plan_for(x)
    assert capturer.replays
    assert plan.forecast is not None
    assert plan.forecast.peak_bytes <= 3 * 2**20
    assert "cells are replayed as CUDA graphs" in plan.explain()
    with MemoryMeter("cpu") as meter:
        y, _ = graphed(x)
        sum(leaf.sum() for leaf in y).backward()
    assert meter.peak_bytes <= 3 * 2**20


def test_noticing_waits_needs_no_leave_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns where its mode is switched on, and the switch goes back even if a warning is an error."""
    modes = ["default"]

    def switch(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    with CudaCapturer(torch.device("cuda")).waits() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert found == ["called a synchronizing CUDA operation"]
    assert modes == ["default", "warn", "default"]
