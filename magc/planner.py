"""The planner: the fastest plan whose predicted peak fits the budgets.

It looks at every combination of cell size, tiers and snapshots from a fixed list that does not depend on the budget, so
more budget never gives a slower plan. Cheap lower bounds order the combinations; few are worked out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from magc import revolve
from magc.cost import CostModel
from magc.errors import BudgetError, PlanError
from magc.estimate import Estimate, estimate, schedule_of
from magc.forecast import Candidate, Forecast
from magc.plan import ALL, REBUILD, Plan
from magc.tiers import Tier
from magc.units import format_bytes

MARGIN = 0.02
"""Share of each budget left free: the cost model interpolates, allocators round up."""
_SHORTEST = 16
_MOST_SEGMENTS = 1 << 16
_SNAPSHOT_COUNTS = (None, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


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


def search(costs: CostModel, seq_len: int, budgets: Budgets, *, lowest_layer: int = 0) -> Plan:
    """The fastest plan that fits.

    Args:
        costs: of the stack.
        seq_len: tokens.
        budgets: what may be used.
        lowest_layer: the lowest layer that needs a gradient.

    Returns:
        The plan, carrying its forecast.

    Raises:
        BudgetError: no plan fits; says the smallest device budget that would.
    """
    bases = list(_bases(costs, seq_len, budgets))
    bounds = _Bounds(costs, seq_len, lowest_layer)
    rows = [(bounds.seconds(base, budgets), index, base) for index, base in enumerate(bases)]
    rows = [row for row in rows if bounds.bytes(row[2]) <= budgets.device * (1 - MARGIN)]
    best: Candidate | None = None
    for least_seconds, _, base in sorted(rows, key=lambda row: row[:2]):
        if best is not None and least_seconds > best.estimate.seconds:
            break
        found = _best_keep(base, costs, seq_len, budgets, lowest_layer)
        if found is not None and (best is None or _rank(found) < _rank(best)):
            best = found
    if best is None:
        raise BudgetError(_no_fit(bases, bounds, costs, seq_len, budgets, lowest_layer))
    return best.plan.with_forecast(
        Forecast(costs, seq_len, lowest_layer, best.estimate, budgets.device, budgets.host, budgets.disk)
    )


def _rank(candidate: Candidate) -> tuple[float, int]:
    return candidate.estimate.seconds, candidate.estimate.peak_bytes


def frontier(costs: CostModel, seq_len: int, budgets: Budgets, *, lowest_layer: int = 0, points: int = 24) -> list[Candidate]:
    """The planner's choice for budgets from the least that works to where nothing is recomputed.

    The trade-off between memory and recomputation: each further candidate takes more memory and less time.
    """
    plenty = replace(budgets, device=1 << 62)
    most = search(costs, seq_len, plenty, lowest_layer=lowest_layer)
    least = minimum(costs, seq_len, plenty, lowest_layer=lowest_layer)
    assert most.forecast is not None
    low, high = least.estimate.peak_bytes / (1 - MARGIN), most.forecast.estimate.peak_bytes / (1 - MARGIN)
    chosen: list[Candidate] = []
    for budget in np.geomspace(low + 1, max(high, low) + 2, points):
        plan = search(costs, seq_len, replace(budgets, device=math.ceil(budget)), lowest_layer=lowest_layer)
        assert plan.forecast is not None
        if not chosen or plan != chosen[-1].plan:
            chosen.append(Candidate(plan, plan.forecast.estimate))
    return chosen


def minimum(costs: CostModel, seq_len: int, budgets: Budgets, *, lowest_layer: int = 0) -> Candidate:
    """The plan that takes the least device memory, whatever its time, within the host budget."""
    bounds = _Bounds(costs, seq_len, lowest_layer)
    rows = sorted(
        ((bounds.bytes(base), index, base) for index, base in enumerate(_bases(costs, seq_len, budgets))),
        key=lambda row: row[:2],
    )
    best: Candidate | None = None
    for least, _, base in rows:
        if best is not None and least >= best.estimate.peak_bytes:
            break
        found = Candidate(base, estimate(base, costs, seq_len, lowest_layer))
        if found.estimate.host_bytes <= budgets.host and (
            best is None or found.estimate.peak_bytes < best.estimate.peak_bytes
        ):
            best = found
    assert best is not None  # plans on the device alone are always among them
    return best


def _no_fit(
    bases: Sequence[Plan], bounds: _Bounds, costs: CostModel, seq_len: int, budgets: Budgets, lowest_layer: int
) -> str:
    least = minimum(costs, seq_len, budgets, lowest_layer=lowest_layer)
    needed = math.ceil(least.estimate.peak_bytes / (1 - MARGIN)) + 1
    terms = sorted(least.estimate.breakdown.items(), key=lambda row: -row[1])[:3]
    shown = ", ".join(f"{format_bytes(nbytes)} {term}" for term, nbytes in terms if nbytes)
    more = "" if budgets.host or costs.host_is_device else " A host_budget would let checkpoints leave the device."
    return (
        f"no plan for {costs.n_layers} layers x {seq_len} tokens fits a budget of {format_bytes(budgets.device)}. The "
        f"smallest that would is {format_bytes(needed)} (budget={needed}), with {least.plan} ({shown}).{more}"
    )


# ---------------------------------------------------------------------- combinations
def _layer_sizes(n_layers: int) -> list[int]:
    sizes = {1, max(1, round(math.sqrt(n_layers)))}
    size = n_layers
    while size > 1:
        sizes.add(size)
        size = -(-size // 2)
    return sorted(sizes)


def _token_sizes(seq_len: int) -> list[int]:
    least = max(1, min(_SHORTEST, seq_len // 4), seq_len // _MOST_SEGMENTS)
    return sorted({size for size in (1 << power for power in range(40)) if least <= size < seq_len} | {seq_len})


def _bases(costs: CostModel, seq_len: int, budgets: Budgets) -> Iterator[Plan]:
    """Every combination, keeping only the last cell."""
    offload = [Tier.HOST] if budgets.host and not costs.host_is_device else []
    offload += [Tier.DISK] if budgets.disk else []
    for tokens in _token_sizes(seq_len):
        segments = -(-seq_len // tokens)
        for layers in _layer_sizes(costs.n_layers):
            for states in [Tier.DEVICE, *offload] if segments > 1 else [Tier.DEVICE]:
                borders: list[Tier | Literal["rebuild"]] = [Tier.DEVICE]
                if layers < costs.n_layers:
                    borders += ([states] if states is not Tier.DEVICE else []) + ([REBUILD] if segments > 1 else [])
                    borders += offload if segments == 1 else []
                for border in dict.fromkeys(borders):
                    for snapshots in _SNAPSHOT_COUNTS:
                        if snapshots is None or snapshots < segments - 2:
                            yield Plan(
                                layers=layers, tokens=tokens, borders=border, states=states, snapshots=snapshots
                            )


class _Bounds:
    """Lower bounds on a base plan's bytes and seconds, from sums over layers."""

    def __init__(self, costs: CostModel, seq_len: int, lowest_layer: int) -> None:
        self._costs, self._seq_len, self._lowest = costs, seq_len, lowest_layer
        self._columns: dict[int, tuple[float, float, float, float, int, int, int]] = {}
        self._grads = sum(stage.grad_bytes for stage in costs.group(0, costs.n_layers))

    def _column(self, tokens: int) -> tuple[float, float, float, float, int, int, int]:
        if tokens not in self._columns:
            costs = self._costs
            whole = costs.cell(0, costs.n_layers, tokens)
            trained = costs.cell(self._lowest, costs.n_layers, tokens)
            self._columns[tokens] = (
                whole.run_seconds,
                trained.record_seconds,
                trained.backward_seconds,
                whole.record_seconds,
                trained.tape_bytes,
                trained.state_bytes,
                max(costs.sample(stage, tokens).kept_bytes for stage in costs.stages[self._lowest :]),
            )
        return self._columns[tokens]

    def seconds(self, base: Plan, budgets: Budgets) -> float:
        """Least time with as many cells kept as could fit."""
        tokens = base.tokens
        assert isinstance(tokens, int)
        run, record, backward, record_all, tape, _, _ = self._column(tokens)
        segments = self._seq_len / tokens
        if base.snapshots is not None:
            steps = math.ceil(segments) - 1
            again = revolve.optimal_advances(steps, base.snapshots) - (steps - 1) if steps >= 1 else 0
            kept = 0.0
        else:
            again = 0
            kept = segments if tape <= 0 else min(segments, budgets.device / tape)
        fewer = max(0.0, segments - kept - 1)
        rebuilt = run / 2 * fewer if base.borders == REBUILD and base.layers == 1 else 0.0
        # The last column's recording stands for its run; every other one that is not kept is run and recorded.
        return fewer * (min(run, record_all) + record) + (segments - fewer) * min(run, record) + segments * backward + (
            again * run * (1 - self._lowest / self._costs.n_layers) * 0.5 + rebuilt * 0.5
        )

    def bytes(self, base: Plan) -> int:
        """Least bytes at the peak."""
        tokens = base.tokens
        assert isinstance(tokens, int)
        tape, states, one = self._column(tokens)[4:]
        stored = 0
        segments = self._seq_len // tokens
        on_device = base.states is Tier.DEVICE or (base.states is Tier.HOST and self._costs.host_is_device)
        if segments > 2 and on_device:
            count = segments - 2 if base.snapshots is None else base.snapshots
            stored = min(states, tape) * count if base.snapshots is None else states * count
        assert isinstance(base.layers, int)
        cell = tape if base.layers >= self._costs.n_layers else one
        return stored + cell + (self._grads if segments > 1 else 0)


def _best_keep(base: Plan, costs: CostModel, seq_len: int, budgets: Budgets, lowest_layer: int) -> Candidate | None:
    """The base plan with as many trailing columns kept as fit; None when it does not fit with the last cell alone."""

    def candidate(columns: int) -> Candidate:
        keep: int | Literal["all"] = 1 if columns == 0 else ALL if columns == segments else columns * groups
        plan = base if columns == 0 else replace(base, keep=keep)
        return Candidate(plan, estimate(plan, costs, seq_len, lowest_layer))

    schedule = schedule_of(base, costs, seq_len, lowest_layer)
    groups, segments = schedule.grid.groups, schedule.grid.segments
    best = candidate(0)
    if not budgets.fit(best.estimate):
        return None
    if base.snapshots is not None:
        return best
    # Keeping more takes more memory, so the most that fits is found by bisection, from a guess by proportion.
    low, high = 0, segments
    everything = candidate(segments)
    if budgets.fit(everything.estimate):
        return everything
    while high - low > 1:
        middle = (low + high) // 2
        if low == 0 or high == segments:
            grown = everything.estimate.peak_bytes - best.estimate.peak_bytes
            share = (budgets.device * (1 - MARGIN) - best.estimate.peak_bytes) / max(1, grown)
            middle = min(high - 1, max(low + 1, int(segments * share) + (low > 0)))
        trial = candidate(middle)
        if budgets.fit(trial.estimate):
            low, best = middle, trial
        else:
            high = middle
    return best


def check_seq_len(seq_len: int) -> int:
    """The length, if it can be planned for.

    Raises:
        PlanError: it is not positive.
    """
    if seq_len < 1:
        raise PlanError(f"seq_len={seq_len}: a sequence has at least one token")
    return seq_len
