"""The planner on paper: estimates equal simulations, plans fit, more budget is never slower."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magc.cost import Bandwidths, CostModel, StageCost, StageSample
from magc.errors import BudgetError, PlanError
from magc.estimate import estimate, schedule_of, stored_per_column
from magc.plan import Plan
from magc.planner import MARGIN, Planner
from magc.simulate import Term, simulate
from magc.table import PlanTable
from magc.tiers import Tier

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def stage_costs(draw: st.DrawFn, *, state: bool = True) -> StageCost:
    """A stage whose numbers hang together: what it keeps includes its output, peaks include what they leave."""
    output, extra = draw(st.integers(1, 50)), draw(st.integers(0, 200))
    state_bytes = draw(st.integers(1, 3000)) if state else 0
    passed = draw(st.booleans())
    workings = [draw(st.integers(0, 3000)) for _ in range(3)]
    samples = []
    for tokens in (16, 64):
        kept = (output + extra) * tokens + state_bytes
        samples.append(
            StageSample(
                tokens=tokens,
                output_bytes=output * tokens,
                kept_bytes=kept,
                passed_bytes=output * tokens if passed else 0,
                run_peak=output * tokens + state_bytes + workings[0],
                record_peak=kept + workings[1],
                backward_peak=workings[2],
                run_seconds=1e-3 * tokens + 2e-3,
                record_seconds=1.2e-3 * tokens + 3e-3,
                backward_seconds=2e-3 * tokens + 5e-3,
            )
        )
    many = draw(st.integers(0, 2000))
    return StageCost(tuple(samples), state_bytes, many, many // 2)


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    return CostModel(
        stages=tuple(draw(st.lists(stage_costs(), min_size=1, max_size=6))),
        stem=draw(st.none() | stage_costs(state=False)),
        head=draw(st.none() | stage_costs(state=False)),
        input_bytes_per_token=draw(st.sampled_from([8.0, 40.0])),
        input_is_view=draw(st.booleans()),
        needs_input_grad=draw(st.booleans()),
        host_is_device=draw(st.booleans()),
        cell_seconds=draw(st.sampled_from([0.0, 0.01, 5.0])),
        captured=draw(st.booleans()),
        bandwidths=Bandwidths(draw(st.sampled_from([20e9, 3e5, 1e4])), draw(st.sampled_from([1e9, 1e5, 1e3]))),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        layers=draw(st.sampled_from([None, 1, 2, 3])),
        tokens=draw(st.sampled_from([None, 16, 17, 64])),
        borders=draw(st.sampled_from(["device", "host", "disk", "rebuild"])),
        states=draw(st.sampled_from(["device", "host", "disk"])),
        keep=draw(st.sampled_from([1, 2, 5, 9, 20, 40, "all"])),
        snapshots=draw(st.sampled_from([None, None, 0, 1, 2, 3, 7])),
    )


@SETTINGS
@given(cost_models(), plans(), st.integers(1, 900), st.integers(0, 3))
def test_the_estimate_is_the_simulation(costs: CostModel, plan: Plan, seq_len: int, lowest: int) -> None:
    lowest = 0 if costs.needs_input_grad else min(lowest, costs.n_layers - 1)
    schedule = schedule_of(plan, costs, seq_len, lowest)
    quick, slow = estimate(plan, costs, seq_len, lowest), simulate(schedule, costs)
    assert quick.peak_bytes >= slow.peak_bytes
    assert sum(quick.breakdown.values()) == quick.peak_bytes
    assert sum(slow.breakdown.values()) == slow.peak_bytes
    assert quick.forwards_per_cell == pytest.approx(slow.forwards_per_cell, rel=1e-12)
    if schedule.snapshot_positions() is None:
        # What a gradient of the input would take is counted from the first back-propagated cell on.
        slack = costs.input_bytes_per_token * seq_len if costs.needs_input_grad else 0
        assert quick.peak_bytes <= slow.peak_bytes + slack
        assert (quick.host_bytes, quick.disk_bytes) == (slow.host_bytes, slow.disk_bytes)
        # Copies run beside the work: only at the ends of the passes are they waited for.
        cells = [costs.cell(start, stop, 64) for start, stop in schedule.grid.layers.all_bounds()]
        speeds = {Tier.DEVICE: math.inf, Tier.HOST: costs.bandwidths.host, Tier.DISK: costs.bandwidths.disk}
        column = sum(nbytes / speeds[tier] for _, tier, nbytes in stored_per_column(schedule, cells))
        assert quick.seconds == pytest.approx(slow.seconds, rel=1e-4, abs=3 * column)
    else:
        assert quick.peak_bytes <= 1.5 * slow.peak_bytes
        assert quick.host_bytes >= slow.host_bytes
        assert quick.disk_bytes >= slow.disk_bytes
        fast = replace(costs, bandwidths=Bandwidths())
        assert estimate(plan, fast, seq_len, lowest).seconds == pytest.approx(simulate(schedule, fast).seconds, rel=0.1)


@settings(SETTINGS, max_examples=40)
@given(cost_models(), st.integers(1, 3000), st.booleans(), st.booleans(), st.integers(0, 3))
def test_every_candidate_fits_what_the_table_says(
    costs: CostModel, seq_len: int, host: bool, disk: bool, lowest: int
) -> None:
    lowest = 0 if costs.needs_input_grad else min(lowest, costs.n_layers - 1)
    table = PlanTable(costs, seq_len, lowest, host=host, disk=disk)
    _, least = table.smallest(math.inf)
    for factor in (1.0, 1.3, 2.0, 8.0):
        budget = least * factor
        for plan, _ in zip(table.best(budget, math.inf), range(12), strict=False):
            found = estimate(plan, costs, seq_len, lowest)
            assert found.peak_bytes <= budget, (plan, found, budget)


@settings(SETTINGS, max_examples=60)
@given(cost_models(), st.integers(1, 5000), st.sampled_from([0, 2000, 100_000]), st.booleans())
def test_more_budget_is_never_slower_and_never_exceeded(costs: CostModel, seq_len: int, host: int, disk: bool) -> None:
    planner = Planner(costs, seq_len, host=host > 0, disk=disk)
    least = planner.smallest(host).estimate.peak_bytes
    seconds = math.inf
    for factor in (1.0, 1.1, 1.25, 1.5, 2, 3, 5, 10, 40, 1000):
        budget = math.ceil(least * factor * 1.2 / (1 - MARGIN))
        try:
            plan = planner.plan(budget, host)
        except BudgetError:
            assert seconds == math.inf
            continue
        assert plan.forecast is not None
        found = plan.forecast.estimate
        assert found.peak_bytes <= budget
        assert found.host_bytes <= host
        assert found.disk_bytes == 0 or disk
        assert found.seconds <= seconds * (1 + 1e-9)
        seconds = found.seconds
        exact = simulate(plan.forecast.schedule(plan), costs)
        assert exact.peak_bytes <= budget
    assert seconds < math.inf


@settings(SETTINGS, max_examples=40)
@given(cost_models(), st.integers(1, 5000))
def test_the_smallest_budget_of_the_error_works(costs: CostModel, seq_len: int) -> None:
    planner = Planner(costs, seq_len)
    with pytest.raises(BudgetError, match=r"no plan for .* fits a budget of .*smallest that would is") as raised:
        planner.plan(1)
    needed = int(str(raised.value).split("(budget=")[1].split(")")[0])
    plan = planner.plan(needed)
    assert plan.forecast is not None
    assert plan.forecast.peak_bytes <= needed


def test_nothing_is_recomputed_when_memory_is_plenty() -> None:
    stage = StageCost((StageSample(16, 16, 320, 0, 40, 330, 20, 1e-3, 1e-3, 2e-3),), 8, 100, 50)
    plan = Planner(CostModel((stage,) * 8), 4096).plan(1 << 40)
    assert plan.forecast is not None
    assert plan.forecast.estimate.forwards_per_cell == 1.0


def test_speed_rises_smoothly_with_the_budget() -> None:
    sample = StageSample(64, 640, 12_800, 0, 2000, 13_000, 900, 1e-3, 1e-3, 2e-3)
    costs = CostModel((StageCost((sample,), 100, 50, 50),) * 8, needs_input_grad=False)
    frontier = Planner(costs, 1 << 14).frontier(points=40)
    seconds = [candidate.estimate.seconds for candidate in frontier]
    peaks = [candidate.estimate.peak_bytes for candidate in frontier]
    assert seconds == sorted(seconds, reverse=True)
    assert peaks == sorted(peaks)
    steps = [before / after for before, after in itertools.pairwise(seconds)]
    # From recomputing everything twice down to nothing in many small steps.
    assert len(frontier) > 12
    assert seconds[0] / seconds[-1] > 1.2
    assert max(steps[3:]) < 1.15


@pytest.mark.parametrize("captured", [False, True])
def test_some_cells_of_a_column_are_kept(captured: bool) -> None:
    """Where short segments are slow, there is something between the last cell of a column and all of it."""
    samples = tuple(
        StageSample(
            tokens,
            10 * tokens,
            200 * tokens,
            0,
            30 * tokens,
            210 * tokens,
            15 * tokens,
            *(seconds + 1e-6 * tokens,) * 3,
        )
        for tokens, seconds in ((64, 1e-2), (4096, 1e-2))
    )
    costs = CostModel((StageCost(samples, 100, 50, 50),) * 8, host_is_device=False, captured=captured)
    planner = Planner(costs, 4096)
    whole = next(planner._table.best(math.inf, 0))
    most = estimate(whole, costs, 4096).peak_bytes
    plans = [planner.plan(int(most * share)) for share in (0.4, 0.7, 0.95)]
    assert all(plan.tokens == 4096 for plan in plans)
    assert plans[-1].keep > 1
    forwards = [estimate(plan, costs, 4096).forwards_per_cell for plan in plans]
    assert 2 > forwards[0] > forwards[1] > forwards[2] > 1


def test_offload_is_used_only_when_allowed() -> None:
    sample = StageSample(64, 6400, 128_000, 0, 20_000, 130_000, 9000, 1e-3, 1e-3, 2e-3)
    costs = CostModel((StageCost((sample,), 50_000, 5000, 5000),) * 8, host_is_device=False)
    tight = Planner(costs, 1 << 15).smallest().estimate.peak_bytes
    alone = Planner(costs, 1 << 15).plan(2 * tight)
    assert alone.tiers() == {Tier.DEVICE}
    helped = Planner(costs, 1 << 15, host=True).plan(2 * tight, 1 << 40)
    assert Tier.HOST in helped.tiers()
    assert helped.forecast is not None
    assert alone.forecast is not None
    assert helped.forecast.estimate.seconds < alone.forecast.estimate.seconds


def test_terms_name_what_binds() -> None:
    sample = StageSample(64, 640, 12_800, 0, 2000, 13_000, 900, 1e-3, 1e-3, 2e-3)
    costs = CostModel((StageCost((sample,), 100, 50, 50),) * 8)
    found = estimate(Plan(), costs, 4096)
    assert max(found.breakdown, key=lambda term: found.breakdown[term]) is Term.ACTIVATIONS


def test_a_length_of_zero_is_refused() -> None:
    sample = StageSample(64, 640, 12_800, 0, 2000, 13_000, 900, 1e-3, 1e-3, 2e-3)
    with pytest.raises(PlanError, match="seq_len=0: a sequence has at least one token"):
        Planner(CostModel((StageCost((sample,), 1, 1, 1),)), 0)
