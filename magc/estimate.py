"""Peak bytes and seconds of a plan in time independent of the sequence's length.

Columns (all cells of one segment) of a schedule repeat: run ones in the first forward, then kept ones, then the same
backwards. A short schedule with a few columns of each kind is simulated, phase by phase; each further column adds to a
phase what one column adds. The result is that of simulating the whole schedule; with snapshots it is at least that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from magc import revolve
from magc.cost import CellCost, CostModel
from magc.grid import Grid, make_axis
from magc.plan import REBUILD, Plan
from magc.schedule import Action, Backward, Record, Schedule
from magc.simulate import Breakdown, Ledger, Term, copies_block
from magc.tiers import Tier

_RUN_COLUMNS = 3
_KEPT_COLUMNS = 4
_SNAPSHOTS = 2
_TERMS = tuple(Term)
_BORDERS, _STATES = _TERMS.index(Term.BORDERS), _TERMS.index(Term.STATES)
_OUTPUT = _TERMS.index(Term.OUTPUT)
_CAPTURED = _TERMS.index(Term.CAPTURED)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan costs; the fields mean what `Simulation`'s do."""

    peak_bytes: int
    breakdown: Breakdown
    host_bytes: int
    disk_bytes: int
    seconds: float
    forwards_per_cell: float


def schedule_of(plan: Plan, costs: CostModel, seq_len: int, lowest_layer: int = 0) -> Schedule:
    """The schedule of a plan for layers of which those below ``lowest_layer`` need no gradient."""
    grid = plan.grid(costs.n_layers, seq_len)
    lowest = next((group for group, (_, stop) in enumerate(grid.layers.all_bounds()) if stop > lowest_layer), 0)
    return Schedule(plan, grid, lowest)


def estimate(plan: Plan, costs: CostModel, seq_len: int, lowest_layer: int = 0) -> Estimate:
    """Predict a plan.

    Args:
        plan: the plan.
        costs: of the stack.
        seq_len: tokens.
        lowest_layer: the lowest layer that needs a gradient, 0 when the input or the stem does.

    Raises:
        PlanError: the plan does not fit the stack or the sequence.
    """
    full = schedule_of(plan, costs, seq_len, lowest_layer)
    grid = full.grid
    kept_columns, partial = divmod(plan.kept_cells(grid), grid.groups)
    run_columns = grid.segments - kept_columns - bool(partial)
    snapshots = _snapshots(full)
    if isinstance(grid.tokens.size, tuple):
        short_run, short_kept = run_columns, kept_columns
    else:
        short_run = min(run_columns, _RUN_COLUMNS if snapshots is None else 2 * _SNAPSHOTS + 3)
        short_kept = min(kept_columns, _KEPT_COLUMNS)
    columns = short_run + short_kept + bool(partial)
    short = full
    if columns < grid.segments:
        tokens, tail = grid.tokens.part_length(0), grid.tokens.part_length(grid.segments - 1)
        short_plan = replace(
            plan,
            keep=max(1, short_kept * grid.groups + partial),
            snapshots=None if snapshots is None else min(snapshots, _SNAPSHOTS),
        )
        short_grid = Grid(grid.layers, make_axis("tokens", (columns - 1) * tokens + tail, tokens))
        short = Schedule(short_plan, short_grid, full.lowest)
    phases = _Phases(short, costs)
    phases.stretch(full, run_columns - short_run, kept_columns - short_kept)
    seconds, forwards = _time(full, costs, kept_columns, partial)
    peak, terms = max(zip(phases.peaks, phases.terms, strict=True), key=lambda phase: phase[0])
    return Estimate(
        peak_bytes=peak,
        breakdown={term: terms[index] for index, term in enumerate(_TERMS)},
        host_bytes=phases.other[Tier.HOST],
        disk_bytes=phases.other[Tier.DISK],
        seconds=seconds,
        forwards_per_cell=forwards,
    )


def _snapshots(schedule: Schedule) -> int | None:
    """How many snapshots the schedule makes do with, None when every boundary keeps its states."""
    return None if schedule.snapshot_positions() is None else schedule.plan.snapshots


class _Phases:
    """A schedule simulated in four phases: run columns, kept columns, their backward, the recomputed rest."""

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        self._schedule, self._costs = schedule, costs
        self._ledger = Ledger(schedule, costs)
        self.peaks: list[int] = []
        self.terms: list[list[int]] = []
        self._column_ends: list[list[int]] = []
        forward, backward = list(schedule.forward()), list(schedule.backward())
        runs = list(takewhile(lambda action: not isinstance(action, Record), forward))
        unkeeps = list(takewhile(lambda action: isinstance(action, Backward), backward))
        self._phase(runs)
        self._phase(forward[len(runs) :])
        self._ledger.begin_backward()
        self._phase(unkeeps)
        self._phase(backward[len(unkeeps) :])
        self.other = {tier: self._ledger.peak_on(tier) for tier in Tier}

    def _phase(self, actions: Iterable[Action]) -> None:
        ledger = self._ledger
        ledger.reset_peak()
        top = self._schedule.grid.groups - 1
        for action in actions:
            ledger.run((action,))
            if isinstance(action, Record) and action.group == top and len(self.peaks) == 1:
                self._column_ends.append(ledger.terms())
        self.peaks.append(ledger.peak)
        self.terms.append(ledger.breakdown)

    def stretch(self, full: Schedule, more_run: int, more_kept: int) -> None:
        """Add what the columns that were left out add to each phase."""
        costs = self._costs
        cells = _cells(full, costs, full.grid.tokens.part_length(0))
        run = [0] * len(_TERMS)
        short_of_snapshots = self._schedule is not full
        if short_of_snapshots and _snapshots(full) is not None:
            # To spare: a longer chain may be advancing, states in hand, where the short one had run out of columns.
            run[_STATES] += sum(cell.state_bytes for cell in cells)
        for index, tier, nbytes in stored_per_column(full, cells):
            count = more_run
            if index == _STATES and (snapshots := _snapshots(full)) is not None:
                count = max(0, snapshots - _SNAPSHOTS) if short_of_snapshots else 0
            if _on_device(tier, costs):
                run[index] += nbytes * count
            else:
                self.other[tier] += nbytes * count
        kept = [0] * len(_TERMS)
        if more_kept:
            # Two in the middle: the first may be another's, with graphs, and the last one ragged.
            before, after = self._column_ends[-3:-1]
            kept = [(b - a) * more_kept for a, b in zip(before, after, strict=True)]
        more_tokens = full.grid.tokens.length - self._schedule.grid.tokens.length
        per_token = 0.0 if costs.head is not None else cells[-1].output_bytes / full.grid.tokens.part_length(0)
        output = int(per_token * more_tokens)
        grad_input = int(costs.input_bytes_per_token * more_tokens) if costs.needs_input_grad else 0
        for phase, (keeps, extra) in enumerate(
            ((False, output), (True, output), (True, output + grad_input), (False, output + grad_input))
        ):
            # What cells of their own memory took stays.
            growth = [
                a + (b if keeps or index == _CAPTURED else 0)
                for index, (a, b) in enumerate(zip(run, kept, strict=True))
            ]
            if phase == 0:
                growth[_CAPTURED] = 0
            growth[_OUTPUT] += extra
            self.terms[phase] = [a + b for a, b in zip(self.terms[phase], growth, strict=True)]
            self.peaks[phase] += sum(growth)


def _on_device(tier: Tier, costs: CostModel) -> bool:
    return tier is Tier.DEVICE or (tier is Tier.HOST and costs.host_is_device)


def _cells(schedule: Schedule, costs: CostModel, tokens: int) -> list[CellCost]:
    return [costs.cell(start, stop, tokens) for start, stop in schedule.grid.layers.all_bounds()]


def stored_per_column(schedule: Schedule, cells: Sequence[CellCost]) -> list[tuple[int, Tier, int]]:
    """What the forward stores for each run column: (index of the term, tier, bytes)."""
    plan = schedule.plan
    rows = [(_STATES, plan.states, sum(cell.state_bytes for cell in cells[schedule.base :]))]
    if isinstance(plan.borders, Tier):
        borders = sum(cell.input_bytes for cell in cells[max(1, schedule.lowest) :])
        rows.append((_BORDERS, plan.borders, borders))
    return rows


def _time(schedule: Schedule, costs: CostModel, kept_columns: int, partial: int) -> tuple[float, float]:
    """Seconds of the whole schedule, and forwards per back-propagated cell."""
    grid, plan, lowest = schedule.grid, schedule.plan, schedule.lowest
    groups = grid.groups
    if isinstance(grid.tokens.size, tuple):
        lengths = [stop - start for start, stop in grid.tokens.all_bounds()]
    else:
        lengths = [grid.tokens.part_length(0), grid.tokens.part_length(grid.segments - 1)]
    seconds = 0.0
    cells_forward = cells_backward = 0
    extra_runs = 0
    bandwidth = {Tier.HOST: costs.bandwidths.host, Tier.DISK: costs.bandwidths.disk}
    snapshots = _snapshots(schedule)

    def column(tokens: int, count: int, kept_from: int) -> None:
        """``count`` columns whose groups from ``kept_from`` on are kept."""
        nonlocal seconds, cells_forward, cells_backward, extra_runs
        cells = _cells(schedule, costs, tokens)
        keep = max(kept_from, lowest)
        forward = sum(cell.run_seconds for cell in cells[:keep]) + sum(cell.record_seconds for cell in cells[keep:])
        backward = sum(cell.record_seconds for cell in cells[lowest:keep])
        backward += sum(cell.backward_seconds for cell in cells[lowest:])
        if plan.borders == REBUILD and keep > lowest:
            backward += sum(cell.run_seconds for cell in cells[: keep - 1])
            extra_runs += count * (keep - 1)
        copies: dict[Tier, float] = {}
        if keep > lowest:
            for index, tier, nbytes in stored_per_column(schedule, cells):
                if not _on_device(tier, costs) and (index == _BORDERS or (snapshots is None and grid.segments > 1)):
                    copy = nbytes / bandwidth[tier] * (keep - lowest) / max(1, groups - lowest)
                    copies[tier] = copies.get(tier, 0.0) + copy
        # They run beside the work; what is rebuilt takes its states twice, but for the last group.
        forward += sum(copy for tier, copy in copies.items() if copies_block(tier, costs))
        twice = 1 + (groups - 1) / groups if plan.borders == REBUILD else 1
        once = max(forward, *copies.values(), 0.0) + max(backward, *(twice * copy for copy in copies.values()), 0.0)
        seconds += once * count
        cells_forward += count * (groups + max(0, keep - lowest))
        cells_backward += count * (groups - lowest)

    run_columns = grid.segments - kept_columns - bool(partial)
    spans = [(run_columns, groups), (int(bool(partial)), groups - partial), (kept_columns, 0)]
    position = 0
    for count, kept_from in spans:
        if isinstance(grid.tokens.size, tuple):
            for tokens in lengths[position : position + count]:
                column(tokens, 1, kept_from)
        elif count:
            tail = int(position + count == grid.segments)
            column(lengths[0], count - tail, kept_from)
            column(lengths[1], tail, kept_from)
        position += count
    if snapshots is not None:
        steps = schedule.turning + 1
        again = revolve.optimal_advances(steps, snapshots) - (steps - 1)
        cells = _cells(schedule, costs, lengths[0])[schedule.base :]
        seconds += again * sum(cell.run_seconds for cell in cells)
        extra_runs += again * len(cells)
        states = sum(cell.state_bytes for cell in cells)
        if not _on_device(plan.states, costs):
            # Every advance starts from a snapshot and most end in a new one.
            seconds += 2 * states * (again / max(1, steps // max(1, snapshots)) + snapshots) / bandwidth[plan.states]
    return seconds, (cells_forward + extra_runs) / cells_backward if cells_backward else 1.0
