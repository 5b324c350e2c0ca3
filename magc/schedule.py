"""A schedule: the typed actions that execute a plan, in order.

The forward visits segments in order and, within a segment, groups in order. The backward visits cells in reverse: it
brings back a cell's input and state, records it, back-propagates it. When states were not kept at every boundary, the
missing ones are computed again on the way (binomial checkpointing, Griewank & Walther 2000, ``magc.revolve``).

Values that actions speak of: ``border (g, t)`` is the input of group g for segment t (g = 0 is the stack's input, which
is never stored); ``state (g, t)`` is the state of group g before segment t (t = 0 is the initial state, never stored).
A value is *live* while an action still needs it at hand; a store keeps it longer. What lies away from the device is
brought back one cell ahead of its use, so that the copy runs beside the work on that cell.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from magc import revolve
from magc.grid import Grid
from magc.plan import REBUILD, Plan
from magc.tiers import Tier


class Kind(enum.StrEnum):
    """What a checkpoint holds."""

    BORDER = "border"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class Run:
    """Run the cell without recording: takes its live border and state, makes the next border and the next state live."""

    group: int
    segment: int


@dataclass(frozen=True, slots=True)
class Record:
    """Run the cell and keep what its backward needs. In the forward it also makes the next border and state live."""

    group: int
    segment: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Back-propagate the recorded cell; makes gradients of its border and state, adds gradients of its parameters."""

    group: int
    segment: int


@dataclass(frozen=True, slots=True)
class Save:
    """Put the live value into the store on ``tier``; it stays live."""

    kind: Kind
    group: int
    segment: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Fetch:
    """Begin to bring the stored value back to the device; its Load comes one cell later."""

    kind: Kind
    group: int
    segment: int


@dataclass(frozen=True, slots=True)
class Load:
    """Make the stored value live; it stays in the store."""

    kind: Kind
    group: int
    segment: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove the value from the store; it stays live if it is."""

    kind: Kind
    group: int
    segment: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The live value is not needed any more."""

    kind: Kind
    group: int
    segment: int


Action = Run | Record | Backward | Save | Fetch | Load | Drop | Forget


@dataclass(frozen=True, slots=True)
class Schedule:
    """The actions of a plan on a grid.

    Attributes:
        plan: the plan.
        grid: the grid that the plan makes.
        lowest: the lowest group that needs a gradient; groups below it are not back-propagated. ``grid.groups``
            when nothing needs one: the forward then stores nothing and there is no backward.
    """

    plan: Plan
    grid: Grid
    lowest: int = 0

    # ------------------------------------------------------------------ derived numbers
    @property
    def _first_kept(self) -> int:
        """Index, in forward order, of the first cell that keeps its activations."""
        return self.grid.cells - self.plan.kept_cells(self.grid)

    def keeps(self, group: int, segment: int) -> bool:
        """Whether the cell is recorded in the forward."""
        return group >= self.lowest and segment * self.grid.groups + group >= self._first_kept

    @property
    def turning(self) -> int:
        """The last segment with a cell to recompute; -1 when there is none.

        Its state is kept aside from the forward beyond the plan's snapshots: the forward passes it on its way.
        """
        if self.lowest >= self.grid.groups:
            return -1
        return -(-(self._first_kept - self.lowest) // self.grid.groups) - 1

    @property
    def base(self) -> int:
        """The group from which a segment is run again: rebuilt borders start at the stack's input."""
        return 0 if self.plan.borders == REBUILD else min(self.lowest, self.grid.groups)

    def snapshot_positions(self) -> frozenset[int] | None:
        """Segments before which the forward keeps states, besides the turning one; None for all up to it."""
        if self.plan.snapshots is None or self.plan.snapshots >= self.turning - 1:
            return None
        return frozenset(revolve.first_sweep(self.turning + 1, self.plan.snapshots))

    # ------------------------------------------------------------------ forward
    def forward(self) -> Iterator[Action]:
        """The actions of the forward pass."""
        groups, turning = self.grid.groups, self.turning
        positions = self.snapshot_positions()
        stored_borders = self.plan.borders if isinstance(self.plan.borders, Tier) else None
        for segment in range(self.grid.segments):
            saves_state = 0 < segment <= turning and (positions is None or segment in positions or segment == turning)
            for group in range(groups):
                kept = self.keeps(group, segment)
                # A rebuilt segment runs again from its first group, also where that group's own cell needs no gradient.
                if saves_state and group >= self.base and not kept:
                    yield Save(Kind.STATE, group, segment, self.plan.states)
                if stored_borders is not None and group >= max(1, self.lowest) and not kept:
                    yield Save(Kind.BORDER, group, segment, stored_borders)
                yield Record(group, segment) if kept else Run(group, segment)

    # ------------------------------------------------------------------ backward
    def backward(self) -> Iterator[Action]:
        """The actions of the backward pass."""
        away = {
            kind
            for kind, tier in ((Kind.STATE, self.plan.states), (Kind.BORDER, self.plan.borders))
            if tier in (Tier.HOST, Tier.DISK)
        }
        return fetched_ahead(self._backward(), away) if away else self._backward()

    def _backward(self) -> Iterator[Action]:
        groups, turning = self.grid.groups, self.turning
        for segment in range(self.grid.segments - 1, -1, -1):
            for group in range(groups - 1, self.lowest - 1, -1):
                if not self.keeps(group, segment):
                    break
                yield Backward(group, segment)
            else:
                continue
            break
        if turning < 0:
            return
        if self.snapshot_positions() is None:
            for segment in range(turning, -1, -1):
                yield from self._reverse(segment, stored=segment > 0)
            return
        yield from self._revolve(turning + 1)

    def _revolve(self, steps: int) -> Iterator[Action]:
        """Follow the binomial schedule; its first sweep was the forward pass."""
        assert self.plan.snapshots is not None
        actions = revolve.reversal(steps, self.plan.snapshots)
        restored = -1
        swept = False
        for action in actions:
            match action:
                case revolve.Reverse(step):
                    if not swept:
                        swept = True
                        yield from self._reverse(step, stored=step > 0)
                    else:
                        yield from self._reverse(step, stored=restored == step and step > 0, drop=False)
                    restored = -1
                case _ if not swept:
                    continue
                case revolve.Restore(position):
                    restored = position
                case revolve.Advance(start, stop):
                    for segment in range(start, stop):
                        stored = segment == restored and segment > 0
                        yield from self._advance(segment, stored)
                    restored = -1
                case revolve.Snapshot(position):
                    for group in range(self.base, self.grid.groups):
                        yield Save(Kind.STATE, group, position, self.plan.states)
                case revolve.Release(position):
                    if position > 0:
                        for group in range(self.base, self.grid.groups):
                            yield Drop(Kind.STATE, group, position)

    def _advance(self, segment: int, stored: bool) -> Iterator[Action]:
        """Run one segment again for the sake of the next segment's states."""
        for group in range(self.base, self.grid.groups):
            if stored:
                yield Load(Kind.STATE, group, segment)
            if group == self.base and group > 0:
                yield Load(Kind.BORDER, group, segment)
            yield Run(group, segment)

    def _reverse(self, segment: int, *, stored: bool, drop: bool = True) -> Iterator[Action]:
        """Record and back-propagate the segment's cells that were not kept, last group first.

        Args:
            segment: the segment.
            stored: its states are in the store (else they are live, or the segment is the first).
            drop: remove its states from the store on the way.
        """
        top = self.grid.groups - 1
        while self.keeps(top, segment):
            top -= 1
        rebuild = self.plan.borders == REBUILD
        if rebuild and top > 0:
            if segment > 0 and not stored:
                # Advanced to, not loaded: the run below uses the states up, and the recording needs them once more.
                for group in range(top + 1):
                    yield Save(Kind.STATE, group, segment, Tier.DEVICE)
                stored = True
                drop = True
                loads_now = False
            else:
                loads_now = stored
            for group in range(top):
                if loads_now:
                    yield Load(Kind.STATE, group, segment)
                yield Run(group, segment)
                yield Forget(Kind.STATE, group, segment + 1)
                if group + 1 >= self.lowest:
                    yield Save(Kind.BORDER, group + 1, segment, Tier.DEVICE)
        for group in range(top, self.lowest - 1, -1):
            if stored:
                yield Load(Kind.STATE, group, segment)
                if drop:
                    yield Drop(Kind.STATE, group, segment)
            if group > 0:
                yield Load(Kind.BORDER, group, segment)
                yield Drop(Kind.BORDER, group, segment)
            yield Record(group, segment)
            yield Backward(group, segment)
        if rebuild and stored and drop:
            for group in range(min(self.lowest, top + 1)):
                yield Drop(Kind.STATE, group, segment)


def fetched_ahead(actions: Iterable[Action], away: set[Kind]) -> Iterator[Action]:
    """The actions with a `Fetch` for each `Load` of what is kept away from the device, before the work of the cell before.

    Args:
        actions: of a backward pass.
        away: which kinds of values the plan keeps away from the device. (What is saved on the way may be on it.)
    """
    at_hand: set[tuple[Kind, int, int]] = set()
    before: list[Action] = []
    for step in _steps(actions):
        preparation = list(takewhile(_prepares, step))
        saved = {_key(action) for action in preparation if isinstance(action, Save)}
        at_hand |= {_key(action) for action in preparation if isinstance(action, Save) and action.tier is Tier.DEVICE}
        loads = [action for action in preparation if isinstance(action, Load) and action.kind in away]
        fetches = [Fetch(*_key(load)) for load in loads if _key(load) not in saved | at_hand]
        work = len(list(takewhile(_prepares, before)))
        yield from before[:work]
        if before:
            yield from fetches
        yield from before[work:]
        at_hand -= {_key(action) for action in preparation if isinstance(action, Drop)}
        before = step
    yield from before


def _steps(actions: Iterable[Action]) -> Iterator[list[Action]]:
    """Each cell's work, which ends with its run or its backward, and what is done before it."""
    step: list[Action] = []
    for action in actions:
        step.append(action)
        if isinstance(action, Run | Backward):
            yield step
            step = []
    if step:
        yield step


def _prepares(action: Action) -> bool:
    return not isinstance(action, Run | Record | Backward)


def _key(action: Save | Load | Drop) -> tuple[Kind, int, int]:
    return action.kind, action.group, action.segment
