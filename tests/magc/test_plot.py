"""What is drawn of a plan: the simulated schedule, stretched where it is long, and the usual strategies."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from magc import Plan
from magc.errors import MissingExtraError, PlanError
from magc.forecast import Forecast
from magc.planner import Planner
from magc.planning import with_forecast
from magc.plot import named_plans, plot_plan, timeline
from magc.simulate import Term
from tests.magc.linear_costs import linear_costs

SEQ_LEN = 4096
PLANS = [
    Plan.none(),
    Plan.per_layer(),
    Plan(layers=2, tokens=128),
    Plan(layers=2, tokens=128, borders="rebuild", states="host"),
    Plan(tokens=100, snapshots=3),
    Plan(layers=4, tokens=256, keep=6),
    Plan(layers=(3, 5), tokens=(96, 4000)),
]


def drawn(plan: Plan) -> tuple[Plan, Forecast]:
    made = with_forecast(plan, linear_costs(), SEQ_LEN)
    assert made.forecast is not None
    return made, made.forecast


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_timeline_is_the_simulation(plan: Plan) -> None:
    made, forecast = drawn(plan)
    line = timeline(made, forecast)
    simulated = forecast.simulate(made, timeline=True)
    assert line.stretch == 1
    assert line.terms.sum(0).max() == simulated.peak_bytes
    at_peak = line.terms[:, np.argmax(line.terms.sum(0))]
    assert dict(zip(Term, at_peak, strict=True)) == simulated.breakdown
    assert line.seconds[-1] == pytest.approx(simulated.seconds)
    assert (np.diff(line.seconds) > 0).all()
    assert 0 < line.turn < line.seconds[-1]


@pytest.mark.parametrize(
    "plan",
    [Plan(layers=2, tokens=32), Plan(tokens=32, states="disk"), Plan(layers=4, tokens=16, keep=200), Plan(tokens=16)],
    ids=str,
)
def test_a_long_schedule_is_stretched_to_the_right_height_and_time(plan: Plan) -> None:
    made, forecast = drawn(plan)
    line = timeline(made, forecast, most_cells=64)
    assert line.stretch > 1
    assert line.segments <= 64
    assert line.terms.sum(0).max() == pytest.approx(forecast.peak_bytes, rel=0.12)
    assert line.seconds[-1] == pytest.approx(forecast.estimate.seconds, rel=0.02)


def test_stretching_leaves_out_what_the_binomial_schedule_stores() -> None:
    made, forecast = drawn(Plan(layers=2, tokens=16, snapshots=4, borders="rebuild"))
    line = timeline(made, forecast, most_cells=200)
    assert line.terms.sum(0).max() == pytest.approx(forecast.peak_bytes, rel=0.12)


def test_many_points_are_thinned_without_losing_the_peak() -> None:
    made, forecast = drawn(Plan(layers=1, tokens=16))
    line = timeline(made, forecast)
    assert len(line.seconds) <= 1200
    assert line.terms.sum(0).max() == forecast.simulate(made).peak_bytes


def test_usual_strategies() -> None:
    made, forecast = drawn(Plan(layers=2, tokens=128))
    named = named_plans(made, forecast)
    assert [name.split(" (")[0] for name in named] == [
        "no checkpointing", "per layer", "sqrt(L) layers", "sequence only", "multi-axis",
    ]  # fmt: skip
    assert named["no checkpointing"].estimate.forwards_per_cell == 1
    assert named["per layer"].estimate.peak_bytes < named["no checkpointing"].estimate.peak_bytes
    # Of 8 layers and 4096 tokens the paper's unit costs take all layers and 64 tokens: the same cells.
    made, forecast = drawn(Plan(tokens=64))
    assert "sequence only (64 tokens) = multi-axis (Eq. 5-8)" in named_plans(made, forecast)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files(tmp_path: Path, suffix: str) -> None:
    plan = Planner(linear_costs(), SEQ_LEN).plan(2_000_000)
    path = tmp_path / f"plan.{suffix}"
    before = "matplotlib.pyplot" in sys.modules
    assert plan.plot(path) == path
    start = path.read_bytes()[:400]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in start or b"<?xml" in start
    assert ("matplotlib.pyplot" in sys.modules) == before  # no global state of figures is touched


def test_plans_without_budget_and_with_one_cell(tmp_path: Path) -> None:
    made, _ = drawn(Plan.none())
    assert plot_plan(made, tmp_path / "one.png").stat().st_size > 10_000


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="forecast"):
        plot_plan(Plan.none(), tmp_path / "x.png")
    made, _ = drawn(Plan.none())
    with pytest.raises(PlanError, match=r"\.png, \.svg or \.pdf"):
        plot_plan(made, tmp_path / "x.xlsx")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"magc\[demo\]"):
        plot_plan(made, tmp_path / "x.png")
