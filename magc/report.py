"""A plan and its forecast as text: what is kept, what it costs, which term and which budget bind, what would help."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from magc.errors import BudgetError
from magc.forecast import Candidate, Forecast
from magc.grid import Grid
from magc.plan import ALL, REBUILD, Plan
from magc.planner import MARGIN, Planner
from magc.schedule import Schedule
from magc.simulate import Term
from magc.tiers import Tier
from magc.units import format_bytes, format_count

WIDTH = 110
"""Columns that the text is wrapped to."""

GAIN = 0.02
"""A plan counts as faster when it saves at least this share of the time."""

_LABEL = 11
_REMEDIES = {
    Term.BORDERS: "larger groups of layers, or borders that are rebuilt or kept elsewhere",
    Term.STATES: "longer segments, fewer snapshots, or states kept elsewhere",
    Term.ACTIVATIONS: "smaller cells, or fewer cells kept",
    Term.WORKING: "shorter segments",
    Term.GRADIENTS: "shorter segments",
    Term.PARAMETERS: "accumulate= in a narrower dtype; no plan does",
    Term.CAPTURED: "smaller groups of layers, or runner='eager'",
    Term.OUTPUT: "a head inside the grid (GridCheckpoint.loss), so that the whole output never exists",
}


def explain(plan: Plan, forecast: Forecast) -> str:
    """The prediction for a plan, line by line.

    Args:
        plan: the plan.
        forecast: of this plan.

    Returns:
        Lines of at most `WIDTH` columns, each paragraph with a label in front. The last paragraphs look for faster
        plans within larger budgets, which takes a fraction of a second.
    """
    schedule = forecast.schedule(plan)
    paragraphs = [
        ("plan", list(_in_words(plan, schedule, forecast))),
        ("memory", list(_memory(forecast))),
        ("at the peak", list(_terms(forecast))),
        ("time", list(_time(forecast))),
        ("limits", list(_limits(plan, forecast))),
        ("measured", list(_measured(schedule.grid, forecast))),
        ("notes", list(forecast.notes)),
    ]
    return "\n".join(paragraph(label, lines) for label, lines in paragraphs if lines)


def next_faster(planner: Planner, forecast: Forecast, *, gain: float = GAIN) -> tuple[Candidate, int] | None:
    """The plan at the smallest device budget that saves ``gain`` of the forecast's time, and that budget to 0.5 %.

    Args:
        planner: of the same stack and sequence.
        forecast: the plan to be faster than; made for a budget.
        gain: share of its seconds to save.

    Returns:
        None when no budget gives such a plan.
    """
    goal = forecast.estimate.seconds * (1 - gain)

    def at(budget: int) -> Candidate | None:
        try:
            found = planner.plan(budget, forecast.host_budget)
        except BudgetError:
            return None
        assert found.forecast is not None
        return Candidate(found, found.forecast.estimate) if found.forecast.estimate.seconds <= goal else None

    low = forecast.budget or forecast.peak_bytes
    high, best = low, None
    while best is None and high < 1 << 56:
        low, high = high, 2 * high
        best = at(high)
    if best is None:
        return None
    while high / low > 1.005:
        middle = round(math.sqrt(low * high))
        found = at(middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    return best, high


# ---------------------------------------------------------------------- paragraphs
def _in_words(plan: Plan, schedule: Schedule, forecast: Forecast) -> Iterator[str]:
    grid = schedule.grid
    yield (
        f"{_sizes(plan.layers, grid.layers.length, 'layer')} x {_sizes(plan.tokens, grid.tokens.length, 'token')} per "
        f"cell: {_count(grid.groups, 'group')} x {_count(grid.segments, 'segment')} = {_count(grid.cells, 'cell')} of "
        f"{_count(grid.layers.length, 'layer')} and {_count(grid.tokens.length, 'token')}"
    )
    kept = plan.kept_cells(grid)
    if grid.groups > 1 and kept < grid.cells:
        yield {
            REBUILD: "activations between groups are kept for one segment at a time, made again by one more run of it",
            Tier.DEVICE: "activations between groups are kept on the device",
            Tier.HOST: "activations between groups are kept in host memory",
            Tier.DISK: "activations between groups are kept on disk",
        }[plan.borders]
    if schedule.turning > 0:
        where = {Tier.DEVICE: "on the device", Tier.HOST: "in host memory", Tier.DISK: "on disk"}[plan.states]
        boundaries = _count(schedule.turning, "segment boundary", "segment boundaries")
        if schedule.snapshot_positions() is None:
            yield f"states are kept {where} at every boundary that is recomputed from: {boundaries}"
        else:
            yield (
                f"states are kept {where} at {plan.snapshots} of {boundaries} at a time, those between are computed "
                f"again (binomial checkpointing)"
            )
    if plan.keep == ALL or kept >= grid.cells:
        yield "every cell keeps its activations: nothing is recomputed"
    else:
        last = "the last cell keeps its activations" if kept == 1 else f"the last {kept:,} cells keep their activations"
        rest = grid.cells - kept
        yield f"{last}, the other {'one is' if rest == 1 else f'{rest:,} are'} recomputed"
    if forecast.lowest_layer:
        yield f"the lowest {_count(forecast.lowest_layer, 'layer')} need no gradient and are run once"


def _memory(forecast: Forecast) -> Iterator[str]:
    estimate = forecast.estimate
    peak = f"{format_bytes(estimate.peak_bytes)} predicted peak on the device, beyond what is allocated before the call"
    if forecast.budget is None:
        yield peak + "; the plan was not made for a budget"
    else:
        share = estimate.peak_bytes / forecast.budget
        yield f"{peak}: {share:.0%} of the budget of {format_bytes(forecast.budget)}"
    if forecast.host_budget or estimate.host_bytes:
        of = f" of the host budget of {format_bytes(forecast.host_budget)}" if forecast.host_budget else ""
        yield f"{format_bytes(estimate.host_bytes)} of checkpoints in host memory{of}"
    if forecast.disk or estimate.disk_bytes:
        yield f"{format_bytes(estimate.disk_bytes)} of checkpoints on disk"


def _terms(forecast: Forecast) -> Iterator[str]:
    terms = sorted(forecast.estimate.breakdown.items(), key=lambda row: -row[1])
    total = max(1, forecast.estimate.peak_bytes)
    for term, nbytes in terms:
        if nbytes:
            yield f"{format_bytes(nbytes):>10}  {nbytes / total:>4.0%}  {term}"
    binding = terms[0][0]
    yield f"binds: {binding} (less with {_REMEDIES[binding]})"
    if binding is Term.PARAMETERS and len(terms) > 1 and terms[1][1]:
        yield f"next: {terms[1][0]} (less with {_REMEDIES[terms[1][0]]})"


def _time(forecast: Forecast) -> Iterator[str]:
    estimate = forecast.estimate
    yield (
        f"{_seconds(estimate.seconds)} predicted for one forward and backward: "
        f"{format_count(forecast.tokens_per_second)} tokens/s of each sequence in the batch"
    )
    yield f"{estimate.forwards_per_cell:.2f} forwards per cell (1 is no recompute)"


def _limits(plan: Plan, forecast: Forecast) -> Iterator[str]:
    """Which budget binds: what more of each would give."""
    host, budget = forecast.host_budget, forecast.budget
    planner = _planner(forecast, host=host > 0, disk=forecast.disk)
    if budget is None:
        yield from _planned_instead(plan, forecast, planner)
        return
    helped = False
    faster = next_faster(planner, forecast)
    if faster is not None:
        candidate, needed = faster
        more = f"{format_bytes(needed)} ({needed / budget - 1:.1%} more, budget={needed})"
        yield f"device budget: with {more} {_versus(candidate, forecast)}"
        helped = True
    if not forecast.costs.host_is_device:
        more = _planned(_planner(forecast, host=True, disk=forecast.disk), budget, 1 << 60)
        if more is not None and _is_faster(more, forecast):
            needed = more.estimate.host_bytes
            yield f"host budget: with {format_bytes(needed)} (host_budget={needed}) {_versus(more, forecast)}"
            helped = True
    if not forecast.disk:
        more = _planned(_planner(forecast, host=host > 0, disk=True), budget, host)
        if more is not None and _is_faster(more, forecast):
            on_disk = f"{format_bytes(more.estimate.disk_bytes)} of checkpoints"
            yield f"disk: with {on_disk} allowed there {_versus(more, forecast)}"
            helped = True
    if not helped:
        yield f"none: no larger budget gives a plan that saves {GAIN:.0%} of the time"


def _planned_instead(plan: Plan, forecast: Forecast, planner: Planner) -> Iterator[str]:
    """For a plan that was not made by the planner: what the planner would do in the same memory."""
    budget = math.ceil(forecast.peak_bytes / (1 - MARGIN)) + 1
    found = _planned(planner, budget, 0)
    if found is None or found.plan == plan or not _is_faster(found, forecast):
        yield f"in the same memory the planner finds no plan that saves {GAIN:.0%} of the time"
    else:
        yield f"in the same memory (budget={budget}) {_versus(found, forecast)}"


def _measured(grid: Grid, forecast: Forecast) -> Iterator[str]:
    costs = forecast.costs
    lengths = sorted({sample.tokens for stage in costs.stages for sample in stage.samples})
    yield f"segments of {', '.join(f'{length:,}' for length in lengths)} tokens"
    index = len(costs.stages) // 2
    middle = costs.stages[index]
    kept = middle.samples[-1].kept_bytes / middle.samples[-1].tokens
    yield (
        f"layer {index} keeps {format_bytes(kept)} for each token that is recorded (all sequences of the batch); its "
        f"state takes {format_bytes(middle.state_bytes)}"
    )
    longest = max(grid.tokens.size) if isinstance(grid.tokens.size, tuple) else grid.tokens.part_length(0)
    if longest > lengths[-1]:
        yield (
            f"WARNING: segments of {longest:,} tokens are longer than any measured; bytes and seconds are extrapolated "
            f"from {lengths[-1]:,} tokens. Plan on a longer example to be sure"
        )


# ---------------------------------------------------------------------- helpers
def _planner(forecast: Forecast, *, host: bool, disk: bool) -> Planner:
    return Planner(forecast.costs, forecast.seq_len, lowest_layer=forecast.lowest_layer, host=host, disk=disk)


def _planned(planner: Planner, budget: int, host: int) -> Candidate | None:
    try:
        found = planner.plan(budget, host)
    except BudgetError:
        return None
    assert found.forecast is not None
    return Candidate(found, found.forecast.estimate)


def _is_faster(candidate: Candidate, forecast: Forecast) -> bool:
    return candidate.estimate.seconds <= forecast.estimate.seconds * (1 - GAIN)


def _versus(candidate: Candidate, forecast: Forecast) -> str:
    saved = 1 - candidate.estimate.seconds / forecast.estimate.seconds
    return f"the plan would be {candidate.plan}, taking {saved:.0%} less time"


def _sizes(size: int | tuple[int, ...] | None, length: int, what: str) -> str:
    if isinstance(size, tuple):
        return f"{min(size):,} to {max(size):,} {what}s"
    if size is None or size >= length:
        return f"all {_count(length, what)}" if length > 1 else _count(length, what)
    return _count(size, what)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def paragraph(label: str, lines: list[str]) -> str:
    """Lines beside a label, wrapped with a hanging indent."""
    out: list[str] = []
    for index, line in enumerate(lines):
        head = f"{label if index == 0 else '':<{_LABEL}}  "
        wrapped = textwrap.wrap(
            line,
            WIDTH,
            initial_indent=head,
            subsequent_indent=" " * (_LABEL + 4),
            drop_whitespace=True,
            break_long_words=False,
            break_on_hyphens=False,
        )
        out.extend(wrapped or [head.rstrip()])
    return "\n".join(out)
