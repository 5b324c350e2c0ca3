"""Carry out a schedule on paper: bytes held after and during every action, and seconds, without running anything.

The ledger follows the executor's bookkeeping object by object (a border or state that a store and a recorded cell hold
at once counts once), so the simulated peak is the executed one up to what the cost model does not know.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from magc.cost import CellCost, CostModel
from magc.errors import PlanError
from magc.schedule import Action, Backward, Drop, Fetch, Forget, Kind, Load, Record, Run, Save, Schedule
from magc.tiers import Tier


class Term(enum.StrEnum):
    """What bytes are for."""

    BORDERS = "borders"
    STATES = "states"
    ACTIVATIONS = "activations of recorded cells"
    WORKING = "working memory of the running cell"
    GRADIENTS = "gradients of borders and states"
    PARAMETERS = "gradients of parameters"
    OUTPUT = "output, final states and input gradient"
    CAPTURED = "boxes of captured cells, and gradients beside their sums"


Breakdown = dict[Term, int]


@dataclass(frozen=True, slots=True)
class Step:
    """One action on the timeline: device bytes after it and at most during it."""

    action: Action
    live_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a schedule costs.

    Attributes:
        peak_bytes: most device bytes at a time, beyond those before the call.
        forward_peak_bytes: the same within the forward.
        breakdown: the terms at the peak; they sum to ``peak_bytes``.
        host_bytes, disk_bytes: most bytes on the other tiers.
        runs, records, backwards: how many cells were run, recorded, back-propagated.
        seconds: time of all actions; copies to and from other tiers run beside the work, and take time where they do not
            keep up with it.
        timeline: every action, when it was asked for.
    """

    peak_bytes: int
    forward_peak_bytes: int
    breakdown: Breakdown
    host_bytes: int
    disk_bytes: int
    runs: int
    records: int
    backwards: int
    seconds: float
    timeline: tuple[Step, ...] = ()

    @property
    def recomputed(self) -> int:
        """Cells run or recorded beyond the first time."""
        return self.runs + self.records - self.backwards

    @property
    def forwards_per_cell(self) -> float:
        """How many times a back-propagated cell was run or recorded, on average; 1 is no recompute."""
        return (self.runs + self.records) / self.backwards if self.backwards else 1.0


def simulate(schedule: Schedule, costs: CostModel, *, timeline: bool = False) -> Simulation:
    """Carry out the forward and the backward of a schedule on paper.

    Args:
        schedule: the schedule.
        costs: of its stack.
        timeline: keep every step; a long sequence has very many.

    Raises:
        PlanError: the schedule is for another number of layers, or an action uses what is not there.
    """
    ledger = Ledger(schedule, costs, timeline=timeline)
    ledger.run(schedule.forward())
    forward_peak = ledger.peak
    ledger.begin_backward()
    ledger.run(schedule.backward())
    return ledger.result(forward_peak)


class Ledger:
    """Bytes and seconds of the actions so far."""

    def __init__(self, schedule: Schedule, costs: CostModel, *, timeline: bool = False) -> None:
        if schedule.grid.layers.length != costs.n_layers:
            raise PlanError(
                f"the schedule is for {schedule.grid.layers.length} layers, the cost model for {costs.n_layers}"
            )
        self._schedule, self._costs = schedule, costs
        grid = schedule.grid
        self._groups, self._segments = grid.groups, grid.segments
        self._cells = {
            tokens: [costs.cell(start, stop, tokens) for start, stop in grid.layers.all_bounds()]
            for tokens in {stop - start for start, stop in grid.tokens.all_bounds()}
        }
        self._single = grid.segments == 1
        self._terms = [0] * len(Term)
        self._held: dict[tuple[Kind, int, int], int] = {}
        self._live: set[tuple[Kind, int, int]] = set()
        self._stored: dict[tuple[Kind, int, int], Tier] = {}
        self._arrivals: dict[tuple[Kind, int, int], float] = {}
        self._copies_end: dict[tuple[Tier, bool], float] = {}
        self._recorded: dict[tuple[int, int], list[tuple[Kind, int, int]]] = {}
        self._kept_outputs: dict[tuple[int, int], list[tuple[Kind, int, int]]] = {}
        self._output_cell: tuple[int, int] | None = None
        self._apart: set[tuple[int, int]] = set()
        self._one_waits = False
        self._touched: set[int] = set()
        self._first_pass = True
        self._output_made = self._input_grad_made = False
        self._steps: list[Step] | None = [] if timeline else None
        self._other = dict.fromkeys(Tier, 0)
        self._other_peak = dict.fromkeys(Tier, 0)
        self.counts: Counter[type[Action]] = Counter()
        self.live = self.peak = 0
        self.seconds = 0.0
        self.breakdown = list(self._terms)
        self._add(_CAPTURED, costs.captured_bytes(self._cells.values()))

    # ------------------------------------------------------------------ totals
    def terms(self) -> list[int]:
        """Bytes held now, term by term."""
        return list(self._terms)

    def peak_on(self, tier: Tier) -> int:
        """Most bytes held at a time on a tier other than the device."""
        return self._other_peak[tier]

    def reset_peak(self) -> None:
        """Let the peak start again from the bytes held now."""
        self.peak = self.live
        self.breakdown = list(self._terms)

    # ------------------------------------------------------------------ bytes
    def _add(self, term: int, nbytes: int) -> None:
        self._terms[term] += nbytes
        self.live += nbytes
        if self.live > self.peak:
            self.peak = self.live
            self.breakdown = list(self._terms)

    def _work(self, nbytes: int, recorded: int = 0) -> int:
        """Note a passing peak, up to ``recorded`` bytes of it of activations kept; returns its height."""
        height = self.live + nbytes
        if height > self.peak:
            self.peak = height
            self.breakdown = list(self._terms)
            self.breakdown[_ACTIVATIONS] += min(nbytes, recorded)
            self.breakdown[_WORKING] += max(0, nbytes - recorded)
        return height

    def _hold(self, key: tuple[Kind, int, int], nbytes: int) -> None:
        held = self._held.get(key, 0)
        self._held[key] = held + 1
        if not held:
            self._add(_term(key), nbytes)

    def _release(self, key: tuple[Kind, int, int], nbytes: int) -> None:
        held = self._held[key] - 1
        if held:
            self._held[key] = held
        else:
            del self._held[key]
            self._add(_term(key), -nbytes)

    def _cell(self, group: int, segment: int) -> CellCost:
        return self._cells[self._schedule.grid.tokens.part_length(segment)][group]

    def _bytes(self, key: tuple[Kind, int, int]) -> int:
        kind, group, segment = key
        cell = self._cell(group, min(segment, self._segments - 1))
        return cell.input_bytes if kind is Kind.BORDER else cell.state_bytes

    def _tier(self, tier: Tier) -> Tier:
        return Tier.DEVICE if tier is Tier.HOST and self._costs.host_is_device else tier

    # ------------------------------------------------------------------ actions
    def run(self, actions: Iterable[Action]) -> None:
        """Carry out actions in order."""
        for action in actions:
            height = self._do(action)
            self.counts[type(action)] += 1
            if self._steps is not None:
                self._steps.append(Step(action, self.live, max(height, self.live)))

    def begin_backward(self) -> None:
        """The forward has returned."""
        self._first_pass = False

    def _do(self, action: Action) -> int:
        match action:
            case Run(group, segment):
                return self._run(group, segment)
            case Record(group, segment):
                return self._record(group, segment)
            case Backward(group, segment):
                return self._backward(group, segment)
            case Save(kind, group, segment, tier):
                self._save((kind, group, segment), self._tier(tier))
            case Fetch(kind, group, segment):
                self._fetch((kind, group, segment))
            case Load(kind, group, segment):
                self._load((kind, group, segment))
            case Drop(kind, group, segment):
                self._drop((kind, group, segment))
            case Forget(kind, group, segment):
                key = (kind, group, segment)
                if key in self._live:
                    self._live.discard(key)
                    self._release(key, self._bytes(key))
        return self.live

    def _save(self, key: tuple[Kind, int, int], tier: Tier) -> None:
        if key not in self._live or key in self._stored:
            raise PlanError(f"schedule error: cannot save {key}, which is not live or is stored already")
        self._stored[key] = tier
        nbytes = self._bytes(key)
        if tier is Tier.DEVICE:
            self._hold(key, nbytes)
        else:
            self._other[tier] += nbytes
            self._other_peak[tier] = max(self._other_peak[tier], self._other[tier])
            written = self._copy(tier, nbytes, out=True)
            if copies_block(tier, self._costs):
                self.seconds = written

    def _fetch(self, key: tuple[Kind, int, int]) -> None:
        """The value has room on the device from now on, and is there when its copy has come."""
        if key not in self._stored:
            raise PlanError(f"schedule error: cannot fetch {key}, which is not stored")
        tier = self._stored[key]
        if tier is not Tier.DEVICE and key not in self._arrivals:
            self._arrivals[key] = self._copy(tier, self._bytes(key), out=False)
            self._add(_term(key), self._bytes(key))

    def _load(self, key: tuple[Kind, int, int]) -> None:
        if key not in self._stored:
            raise PlanError(f"schedule error: cannot load {key}, which is not stored")
        nbytes = self._bytes(key)
        if self._stored[key] is not Tier.DEVICE:
            self._fetch(key)
            self.seconds = max(self.seconds, self._arrivals.pop(key))
            self._add(_term(key), -nbytes)
        if key not in self._live:
            self._live.add(key)
            self._hold(key, nbytes)

    def _drop(self, key: tuple[Kind, int, int]) -> None:
        if key not in self._stored:
            raise PlanError(f"schedule error: cannot drop {key}, which is not stored")
        tier = self._stored.pop(key)
        if tier is Tier.DEVICE:
            self._release(key, self._bytes(key))
        else:
            self._other[tier] -= self._bytes(key)

    def _copy(self, tier: Tier, nbytes: int, *, out: bool) -> float:
        """When a copy that is begun now will be over: copies to a tier run one after another, as do those from it."""
        bandwidths = self._costs.bandwidths
        begin = max(self.seconds, self._copies_end.get((tier, out), 0.0))
        if not out:
            begin = max(begin, self._copies_end.get((tier, True), 0.0))
        end = begin + nbytes / (bandwidths.disk if tier is Tier.DISK else bandwidths.host)
        self._copies_end[tier, out] = end
        return end

    def _enter(self, group: int, segment: int) -> list[tuple[Kind, int, int]]:
        """Take the cell's live inputs; returns those that take memory. They are held until released."""
        keys: list[tuple[Kind, int, int]] = []
        for key in ((Kind.BORDER, group, segment), (Kind.STATE, group, segment)):
            if key in self._live:
                self._live.discard(key)
                keys.append(key)
            elif (group if key[0] is Kind.BORDER else segment) > 0:
                raise PlanError(f"schedule error: {key} is needed but not live")
        if group == 0:
            key = (Kind.BORDER, 0, segment)
            self._hold(key, self._bytes(key))
            keys.append(key)
        return keys

    def _leave(self, keys: list[tuple[Kind, int, int]]) -> None:
        for key in keys:
            self._release(key, self._bytes(key))

    def _produce(self, group: int, segment: int, cell: CellCost) -> None:
        """Make the cell's outputs live."""
        state = (Kind.STATE, group, segment + 1)
        self._live.add(state)
        self._hold(state, cell.state_bytes)
        if group + 1 < self._groups:
            border = (Kind.BORDER, group + 1, segment)
            self._live.add(border)
            self._hold(border, cell.output_bytes)
        elif self._first_pass:
            self._collect(cell)

    def _collect(self, cell: CellCost) -> None:
        """Write the last group's output into the whole one."""
        if self._costs.head is not None or self._output_made:
            return
        self._output_made = True
        if self._single:
            self._add(_OUTPUT, cell.output_bytes)
        else:
            grid = self._schedule.grid
            last = self._groups - 1
            lengths = Counter(stop - start for start, stop in grid.tokens.all_bounds())
            whole = sum(self._cells[tokens][last].output_bytes * count for tokens, count in lengths.items())
            self._work(whole + cell.output_bytes)
            self._add(_OUTPUT, whole)

    def _run(self, group: int, segment: int) -> int:
        cell = self._cell(group, segment)
        keys = self._enter(group, segment)
        height = self._work(cell.run_peak)
        self.seconds += cell.run_seconds
        self._leave(keys)
        self._produce(group, segment, cell)
        return height

    def _record(self, group: int, segment: int) -> int:
        cell = self._cell(group, segment)
        if self._costs.captured and self._first_pass:
            if self._one_waits:
                return self._record_apart(group, segment, cell)
            self._one_waits = True
        self._recorded[group, segment] = self._enter(group, segment)
        height = self._work(cell.record_peak, cell.tape_bytes)
        self.seconds += cell.record_seconds
        self._add(_ACTIVATIONS, cell.tape_bytes)
        if self._first_pass:
            # The outputs are the recorded graph's own tensors: counted with it until it goes.
            state = (Kind.STATE, group, segment + 1)
            self._live.add(state)
            self._add(_ACTIVATIONS, -cell.state_bytes)
            self._hold(state, cell.state_bytes)
            self._hold(state, cell.state_bytes)
            outputs: list[tuple[Kind, int, int]] = [state]
            if group + 1 < self._groups:
                border = (Kind.BORDER, group + 1, segment)
                self._live.add(border)
                self._add(_ACTIVATIONS, -cell.output_bytes)
                self._hold(border, cell.output_bytes)
                self._hold(border, cell.output_bytes)
                outputs.append(border)
            else:
                self._collect_recorded(cell, (group, segment))
            self._kept_outputs[group, segment] = outputs
        return height

    def _record_apart(self, group: int, segment: int, cell: CellCost) -> int:
        """Record a captured cell while another waits for its backward: its graphs have memory of their own."""
        keys = self._enter(group, segment)
        self._add(_CAPTURED, self._costs.apart_bytes(cell))
        self._apart.add((group, segment))
        self.seconds += cell.record_seconds
        self._leave(keys)
        self._produce(group, segment, cell)
        return self.live

    def _collect_recorded(self, cell: CellCost, where: tuple[int, int]) -> None:
        if self._single and self._costs.head is None:
            # The output is the graph's own tensor; it outlives the graph.
            self._output_made = True
            self._output_cell = where
            self._add(_ACTIVATIONS, -cell.output_bytes)
            self._add(_OUTPUT, cell.output_bytes)
        else:
            self._collect(cell)

    def _backward(self, group: int, segment: int) -> int:
        cell = self._cell(group, segment)
        first = group not in self._touched
        touched = (cell.grad_bytes_single if self._single else cell.grad_bytes) if first else 0
        self._touched.add(group)
        if group == 0 and self._costs.needs_input_grad and not self._input_grad_made:
            self._input_grad_made = True
            if not self._single:
                self._add(_OUTPUT, int(self._costs.input_bytes_per_token * self._schedule.grid.tokens.length))
        apart = (group, segment) in self._apart
        if apart:
            height = self.live
        elif not first:
            height = self._work(cell.backward_peak)
        else:
            height = self._work(cell.first_backward_peak_single if self._single else cell.first_backward_peak)
        self.seconds += cell.backward_seconds
        if not apart:
            self._add(_ACTIVATIONS, -cell.tape_bytes)
        self._add(_PARAMETERS, touched)
        for key in self._kept_outputs.pop((group, segment), []):
            nbytes = self._bytes(key)
            self._add(_ACTIVATIONS, nbytes)
            self._release(key, nbytes)
        if (group, segment) == self._output_cell:
            self._add(_ACTIVATIONS, cell.output_bytes)
        if not apart:
            self._leave(self._recorded.pop((group, segment)))
        if group + 1 < self._groups:
            self._add(_GRADIENTS, -cell.output_bytes)
        if segment + 1 < self._segments:
            self._add(_GRADIENTS, -cell.state_bytes)
        if group > self._schedule.lowest:
            self._add(_GRADIENTS, cell.input_bytes)
        elif group == 0 and self._single and self._costs.needs_input_grad:
            self._add(_OUTPUT, int(self._costs.input_bytes_per_token * self._schedule.grid.tokens.length))
        if segment > 0:
            self._add(_GRADIENTS, cell.state_bytes)
        return height

    # ------------------------------------------------------------------ result
    def result(self, forward_peak: int) -> Simulation:
        """The totals."""
        return Simulation(
            peak_bytes=self.peak,
            forward_peak_bytes=forward_peak,
            breakdown={term: self.breakdown[index] for index, term in enumerate(Term)},
            host_bytes=self._other_peak[Tier.HOST],
            disk_bytes=self._other_peak[Tier.DISK],
            runs=self.counts[Run],
            records=self.counts[Record],
            backwards=self.counts[Backward],
            seconds=self.seconds,
            timeline=tuple(self._steps or ()),
        )


def copies_block(tier: Tier, costs: CostModel) -> bool:
    """Whether what is saved to a tier is waited for: a CPU writes to the disk itself."""
    return tier is Tier.DISK and costs.host_is_device


def _term(key: tuple[Kind, int, int]) -> int:
    return _BORDERS if key[0] is Kind.BORDER else _STATES


_BORDERS, _STATES, _ACTIVATIONS, _WORKING, _GRADIENTS, _PARAMETERS, _OUTPUT, _CAPTURED = range(len(Term))
