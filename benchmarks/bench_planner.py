"""How long planning takes once the layers are measured: the 2.7B Mamba-2's 64 layers, two million tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from magc.cost import CostModel
from magc.planner import Planner
from magc.sizes import trace
from magc.table import PlanTable

SEQ_LEN = 2**21
BUDGET, HOST_BUDGET = 40 << 30, 256 << 30
LIMIT_SECONDS = 0.05


@pytest.fixture(scope="module")
def costs() -> CostModel:
    """Costs of ``mamba2-2.7b``, traced."""
    return trace("mamba2-2.7b", lengths=(256, 1024)).costs


def _fresh(costs: CostModel) -> CostModel:
    """The same costs without what an earlier plan has worked out."""
    return replace(costs)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host and disk"])
def test_plan(benchmark: Any, costs: CostModel, offload: bool) -> None:
    """Table and choice: all that `magc.plan` does after measuring."""

    def plan() -> None:
        Planner(_fresh(costs), SEQ_LEN, host=offload, disk=offload).plan(BUDGET, HOST_BUDGET if offload else 0)

    benchmark.group = "planner"
    benchmark.extra_info.update(kind="planner", what=f"plan, {'host and disk' if offload else 'device only'}")
    benchmark.pedantic(plan, rounds=15, iterations=1, warmup_rounds=1)
    if benchmark.stats is not None:
        assert benchmark.stats.stats.min < LIMIT_SECONDS


def test_table(benchmark: Any, costs: CostModel) -> None:
    """The table of all candidates."""
    benchmark.group = "planner"
    benchmark.extra_info.update(kind="planner", what="table of candidates")
    benchmark.pedantic(
        lambda: PlanTable(_fresh(costs), SEQ_LEN, 0, host=True, disk=True), rounds=15, iterations=1, warmup_rounds=1
    )


def test_frontier(benchmark: Any, costs: CostModel) -> None:
    """24 plans from the least memory to no recompute, as `Plan.plot` draws them."""
    planner = Planner(costs, SEQ_LEN, host=True, disk=True)
    benchmark.group = "planner"
    benchmark.extra_info.update(kind="planner", what="frontier of 24 plans")
    benchmark.pedantic(lambda: planner.frontier(HOST_BUDGET), rounds=5, iterations=1, warmup_rounds=1)
