"""The plan of a case."""

from __future__ import annotations

import math
from dataclasses import replace

from magc.bench.cases import Case, Method
from magc.bench.spec import parse_plan
from magc.cost import CostModel, StageCost
from magc.errors import BudgetError
from magc.nn.config import Mamba2Config
from magc.paper import PaperCosts
from magc.plan import Plan
from magc.planner import MARGIN, Planner
from magc.planning import with_forecast
from magc.units import format_bytes

_ID_BYTES = 16
"""Of a token on the device: its id and its target."""
_UNBOUNDED = 1 << 60
_CLOSE = 1.01


def make_plan(case: Case, costs: CostModel, config: Mamba2Config, taken: int = 0) -> Plan:
    """The plan of a case, with a forecast.

    Args:
        case: what is measured.
        costs: of its model.
        config: the model's sizes.
        taken: bytes of the case's budget that are allocated already, by libraries.

    Raises:
        BudgetError: nothing fits; says what would be needed.
    """
    match case.method:
        case Method.NONE:
            plan = Plan.none()
        case Method.PER_LAYER:
            plan = Plan.per_layer()
        case Method.SQRT:
            plan = Plan.sqrt(config.n_layer)
        case Method.PAPER:
            plan = Plan.multi_axis(config.n_layer, case.tokens, paper_costs(config))
        case Method.PLAN:
            plan = parse_plan(case.plan or "")
        case Method.AUTO | Method.MINIMUM:
            plan = _planned(case, costs, taken)
    return with_forecast(plan, costs, case.tokens)


def paper_costs(config: Mamba2Config) -> PaperCosts:
    """The paper's constants for a model."""
    return PaperCosts.from_mamba2(
        config.d_model, config.d_state, config.expand, config.d_conv, config.ngroups, config.headdim
    )


def without_gradients(costs: CostModel) -> CostModel:
    """The same without the memory of parameter gradients: what it predicts is over weights and gradient buffers."""

    def lighter(stage: StageCost) -> StageCost:
        return replace(stage, grad_bytes=0, grad_bytes_single=0)

    return replace(
        costs,
        stages=tuple(map(lighter, costs.stages)),
        stem=None if costs.stem is None else lighter(costs.stem),
        head=None if costs.head is None else lighter(costs.head),
    )


def _planned(case: Case, costs: CostModel, taken: int) -> Plan:
    planner = Planner(without_gradients(costs), case.tokens, host=case.host_budget > 0, disk=case.disk)
    if case.budget_bytes is None:
        return _least(planner, case.host_budget, case.slowdown)
    taken += _ID_BYTES * case.tokens
    try:
        return planner.plan(case.budget_bytes - taken, case.host_budget)
    except BudgetError:
        smallest = planner.smallest(case.host_budget)
        needed = math.ceil(smallest.estimate.peak_bytes / (1 - MARGIN)) + 1 + taken
        raise BudgetError(f"needs {format_bytes(needed)} over weights and gradient buffers ({smallest.plan})") from None


def _least(planner: Planner, host: int, slowdown: float | None) -> Plan:
    """The plan of least memory that is at most so many times as slow as the fastest."""
    smallest = planner.smallest(host)
    fastest = planner.plan(_UNBOUNDED, host)
    assert fastest.forecast is not None
    limit = math.inf if slowdown is None else slowdown * fastest.forecast.estimate.seconds
    if smallest.estimate.seconds <= limit:
        return smallest.plan
    # More budget never gives a slower plan, so the least budget that is fast enough is found by halving.
    low, high, found = smallest.estimate.peak_bytes, fastest.forecast.peak_bytes, fastest
    while high > low * _CLOSE:
        middle = math.isqrt(low * high)
        try:
            plan = planner.plan(math.ceil(middle / (1 - MARGIN)) + 1, host)
        except BudgetError:
            low = middle
            continue
        assert plan.forecast is not None
        if plan.forecast.estimate.seconds <= limit:
            high, found = middle, plan
        else:
            low = middle
    return found
