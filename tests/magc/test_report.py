"""What `Plan.explain` says: every figure from the forecast, which budget binds, what would help."""

from __future__ import annotations

import re

import pytest
import torch

import magc
from magc import Plan
from magc.errors import PlanError
from magc.forecast import Forecast
from magc.nn import Mamba2Block
from magc.planner import Planner
from magc.planning import with_forecast, with_notes
from magc.report import GAIN, WIDTH, next_faster
from magc.simulate import Term
from magc.units import format_bytes
from tests.magc.linear_costs import linear_costs

SEQ_LEN = 4096


def planned(budget: int, host: int = 0, **options: bool) -> Plan:
    costs = linear_costs(**options)
    return Planner(costs, SEQ_LEN, host=host > 0).plan(budget, host)


def forecast_of(plan: Plan) -> Forecast:
    assert plan.forecast is not None
    return plan.forecast


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


GOLDEN = """\
plan         2 layers x 128 tokens per cell: 4 groups x 32 segments = 128 cells of 8 layers and 4,096 tokens
             activations between groups are kept on the device
             states are kept on the device at every boundary that is recomputed from: 31 segment boundaries
             the last cell keeps its activations, the other 127 are recomputed
memory       3.2 MiB predicted peak on the device, beyond what is allocated before the call; the plan was not
               made for a budget
at the peak     1.2 MiB   37%  states
                1.1 MiB   35%  borders
              400.0 KiB   12%  output, final states and input gradient
              259.8 KiB    8%  activations of recorded cells
              156.2 KiB    5%  gradients of parameters
               50.0 KiB    2%  working memory of the running cell
               39.1 KiB    1%  gradients of borders and states
             binds: states (less with longer segments, fewer snapshots, or states kept elsewhere)
time         327 ms predicted for one forward and backward: 12.5k tokens/s of each sequence in the batch
             1.99 forwards per cell (1 is no recompute)
measured     segments of 64, 256 tokens
             layer 4 keeps 1020 B for each token that is recorded (all sequences of the batch); its state
               takes 4.9 KiB
notes        a note"""


def test_the_whole_text() -> None:
    plan = with_forecast(Plan(layers=2, tokens=128), linear_costs(), SEQ_LEN, notes=("a note",))
    text = plan.explain()
    # What would help is the planner's business and may become better.
    assert text[: text.index("limits")] + text[text.index("measured") :] == GOLDEN
    assert all(len(line) <= WIDTH for line in text.splitlines())


@pytest.mark.parametrize(
    ("plan", "phrases"),
    [
        (Plan.none(), ["all 8 layers x all 4,096 tokens", "1 cell of", "nothing is recomputed", "1.00 forwards"]),
        (Plan.per_layer(), ["1 layer x all 4,096 tokens", "8 groups x 1 segment", "the other 7 are recomputed"]),
        (Plan(tokens=(96, 4000)), ["96 to 4,000 tokens", "1 group x 2 segments", "the other one is recomputed"]),
        (Plan(layers=4, tokens=64, borders="rebuild"), ["made again by one more run"]),
        (Plan(layers=4, tokens=64, borders="host", states="disk"), ["in host memory", "on disk at every"]),
        (Plan(tokens=64, snapshots=4), ["at 4 of 62 segment boundaries at a time", "binomial"]),
        (Plan(tokens=64, snapshots=1000), ["at every boundary"]),
        (Plan(layers=4, tokens=1024, keep=4), ["last 4 cells keep their activations, the other 4 are"]),
    ],
)  # fmt: skip
def test_strategies_in_words(plan: Plan, phrases: list[str]) -> None:
    text = flat(with_forecast(plan, linear_costs(), SEQ_LEN).explain())
    for phrase in phrases:
        assert phrase in text


def test_terms_sum_to_the_peak_and_the_largest_binds() -> None:
    plan = planned(1_500_000)
    forecast = forecast_of(plan)
    terms = forecast.estimate.breakdown
    assert sum(terms.values()) == forecast.peak_bytes
    text = flat(plan.explain())
    for term, nbytes in terms.items():
        if nbytes:
            assert f"{format_bytes(nbytes)} {nbytes / forecast.peak_bytes:.0%} {term}" in text
    assert f"binds: {max(terms, key=lambda term: terms[term])} " in text
    assert f"{forecast.peak_bytes / 1_500_000:.0%} of the budget of 1.4 MiB" in text


def test_the_next_faster_plan_needs_the_budget_that_is_named() -> None:
    plan = planned(1_500_000)
    match = re.search(
        r"device budget: with .*?more, budget=(\d+)\) the plan would be (.*?), taking", flat(plan.explain())
    )
    assert match is not None
    faster = planned(int(match[1]))
    assert str(faster) == match[2]
    seconds = forecast_of(plan).estimate.seconds
    assert forecast_of(faster).estimate.seconds <= seconds * (1 - GAIN)
    # A little less than the budget that is named does not do.
    less = planned(int(int(match[1]) * 0.99))
    assert forecast_of(less).estimate.seconds > seconds * (1 - GAIN)


def test_no_budget_helps_where_nothing_is_recomputed() -> None:
    plan = planned(1 << 40)
    assert next_faster(Planner(linear_costs(), SEQ_LEN), forecast_of(plan)) is None
    assert "limits none: no larger budget" in flat(plan.explain())


def test_host_memory_and_disk_are_offered_where_they_help() -> None:
    text = flat(planned(1_500_000).explain())
    match = re.search(r"host budget: with .*?\(host_budget=(\d+)\)", text)
    assert match is not None
    with_host = planned(1_500_000, int(match[1]))
    assert forecast_of(with_host).estimate.seconds < forecast_of(planned(1_500_000)).estimate.seconds
    assert forecast_of(with_host).estimate.host_bytes <= int(match[1])
    assert "checkpoints in host memory of the host budget" in flat(with_host.explain())
    assert "host budget" not in planned(1_500_000, host_is_device=True).explain()


def test_a_plan_by_hand_is_set_against_the_planners() -> None:
    text = flat(with_forecast(Plan(layers=1, tokens=16), linear_costs(), SEQ_LEN).explain())
    assert "the plan was not made for a budget" in text
    assert re.search(r"in the same memory (\(budget=\d+\) the plan would be|the planner finds no plan)", text)


def test_extrapolated_segments_are_warned_of() -> None:
    costs = linear_costs()
    assert "WARNING: segments of 512 tokens" in flat(with_forecast(Plan(tokens=512), costs, SEQ_LEN).explain())
    assert "WARNING" not in with_forecast(Plan(tokens=256), costs, SEQ_LEN).explain()
    assert "segments of 64, 256 tokens" in with_forecast(Plan(tokens=256), costs, SEQ_LEN).explain()


def test_real_layers_say_how_they_run() -> None:
    layers = [Mamba2Block(16, d_state=8, headdim=8) for _ in range(3)]
    plan = magc.plan(layers, torch.randn(1, 64, 16), budget="64MiB")
    text = flat(plan.explain())
    assert "notes cells run eagerly" in text
    assert "'reference' (plain PyTorch) in 3 of 3 layers" in text
    by_hand = magc.forecast(Plan(tokens=32), [torch.nn.LSTM(4, 4, batch_first=True)], torch.randn(1, 64, 4))
    assert forecast_of(by_hand).notes == ("cells run eagerly",)


def test_recording_counts_as_activations() -> None:
    forecast = forecast_of(with_forecast(Plan.none(), linear_costs(), SEQ_LEN))
    activations = forecast.estimate.breakdown[Term.ACTIVATIONS]
    assert activations > 0.8 * forecast.peak_bytes


def test_without_a_forecast() -> None:
    with pytest.raises(PlanError, match="written by hand"):
        Plan.none().explain()
    assert with_notes(Plan.none(), ("x",)) == Plan.none()
