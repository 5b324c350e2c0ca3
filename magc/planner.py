"""The planner: the fastest plan whose predicted peak fits the budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from magc.cost import CostModel
from magc.errors import BudgetError, PlanError
from magc.estimate import Estimate, estimate
from magc.forecast import Candidate, Forecast
from magc.plan import Plan
from magc.table import PlanTable
from magc.units import format_bytes

MARGIN = 0.02
"""Share of a device budget left free: the cost model interpolates, allocators round up."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that a call may take on each tier.

    Attributes:
        device: beyond what is allocated when it starts.
        host: pinned host memory for checkpoints, 0 for none.
        disk: whether checkpoints may go to disk.
    """

    device: int
    host: int = 0
    disk: bool = False

    def fit(self, costs: Estimate) -> bool:
        """Whether an estimate fits, with the margin to spare."""
        return costs.peak_bytes <= self.device * (1 - MARGIN) and costs.host_bytes <= self.host


class Planner:
    """Plans for one stack and sequence length, under any budget.

    Every plan is chosen from one list that does not depend on the budget, so more budget never gives a slower plan.

    Args:
        costs: of the stack.
        seq_len: tokens.
        lowest_layer: the lowest layer that needs a gradient.
        host: whether host memory may be used.
        disk: whether the disk may be used.

    Raises:
        PlanError: ``seq_len`` is not positive.
    """

    def __init__(
        self, costs: CostModel, seq_len: int, *, lowest_layer: int = 0, host: bool = False, disk: bool = False
    ) -> None:
        if seq_len < 1:
            raise PlanError(f"seq_len={seq_len}: a sequence has at least one token")
        self._costs, self._seq_len, self._lowest_layer = costs, seq_len, lowest_layer
        self._table = PlanTable(costs, seq_len, lowest_layer, host=host, disk=disk)
        self._disk = disk

    def plan(self, device: int, host: int = 0) -> Plan:
        """The fastest plan within ``device`` and ``host`` bytes, carrying its forecast.

        Raises:
            BudgetError: no plan fits; says the smallest device budget that would.
        """
        budgets = Budgets(device, host, self._disk)
        for plan in self._table.best(device * (1 - MARGIN), host):
            found = self._estimate(plan)
            if budgets.fit(found):
                return self._with_forecast(plan, found, budgets)
        raise BudgetError(self._no_fit(budgets))

    def smallest(self, host: int = 0) -> Candidate:
        """The plan that takes the least device memory, whatever its time."""
        plan, _ = self._table.smallest(host)
        return Candidate(plan, self._estimate(plan))

    def smallest_budget(self, host: int = 0) -> int:
        """The smallest device budget in bytes that `plan` finds a plan for."""
        _, peak = self._table.smallest(host)
        return math.ceil(peak / (1 - MARGIN)) + 1

    def frontier(self, host: int = 0, points: int = 24) -> list[Candidate]:
        """The choices for budgets from the least that works to where nothing is recomputed, each faster than the last."""
        _, low = self._table.smallest(host)
        most = next(self._table.best(math.inf, host))
        high = max(self._estimate(most).peak_bytes, low) * 1.1
        chosen: list[Candidate] = []
        for budget in np.geomspace(low, high, points):
            try:
                plan = self.plan(math.ceil(budget / (1 - MARGIN)) + 1, host)
            except BudgetError:
                continue
            if plan.forecast is not None and (not chosen or plan != chosen[-1].plan):
                chosen.append(Candidate(plan, plan.forecast.estimate))
        return chosen

    def _estimate(self, plan: Plan) -> Estimate:
        return estimate(plan, self._costs, self._seq_len, self._lowest_layer)

    def _with_forecast(self, plan: Plan, found: Estimate, budgets: Budgets) -> Plan:
        return plan.with_forecast(
            Forecast(
                self._costs,
                self._seq_len,
                self._lowest_layer,
                found,
                budgets.device,
                budgets.host,
                budgets.disk,
            )
        )

    def _no_fit(self, budgets: Budgets) -> str:
        plan, _ = self._table.smallest(budgets.host)
        needed = self.smallest_budget(budgets.host)
        terms = sorted(self._estimate(plan).breakdown.items(), key=lambda row: -row[1])[:3]
        shown = ", ".join(f"{format_bytes(nbytes)} {term}" for term, nbytes in terms if nbytes)
        more = "" if budgets.host or self._costs.host_is_device else " A host_budget lets checkpoints leave the device."
        return (
            f"no plan for {self._costs.n_layers} layers x {self._seq_len} tokens fits a budget of "
            f"{format_bytes(budgets.device)}. The smallest that would is {format_bytes(needed)} (budget={needed}), "
            f"with {plan} ({shown}).{more}"
        )
