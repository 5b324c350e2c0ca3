"""Binomial checkpointing along a chain of steps: the fewest recomputed steps for a given number of snapshots.

A chain of ``steps`` steps takes the state at position 0 to the state at position ``steps``. To reverse it,
each step must be recorded from the state before it, last step first, while only a few states can be kept.
The schedule here is that of Griewank & Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical
Software 26 (2000), after Griewank, "Achieving logarithmic growth of temporal and spatial complexity in
reverse automatic differentiation", Optimization Methods and Software 1 (1992). It is optimal among all
schedules, and pure arithmetic: no table is built.

Convention. The state at position 0 is always available here and is *not* counted in ``snapshots``. The
literature counts it: its number of snapshots is ``snapshots + 1``, written ``c`` below. With ``beta(c, r) =
binomial(c + r, c)`` and ``r`` the smallest integer with ``steps <= beta(c, r)`` (no step is then advanced
more than ``r`` times), the least number of advances is ``r * steps - beta(c + 1, r - 1)`` (Griewank &
Walther, Proposition 1).

Only *advances* (steps run without recording) are minimised and counted. Each step is also run once more,
recorded, just before it is back-propagated; a whole reversal therefore runs ``optimal_advances(steps,
snapshots) + steps`` steps forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

from magc.errors import PlanError


@dataclass(frozen=True, slots=True)
class Advance:
    """Run steps ``start`` to ``stop - 1`` without recording: takes the state at ``start`` to ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Keep the current state, which is the one at ``position``. It stays current."""

    position: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Make the kept state at ``position`` current; it stays kept. The one at 0 is the initial state."""

    position: int


@dataclass(frozen=True, slots=True)
class Release:
    """The kept state at ``position`` is not needed any more."""

    position: int


@dataclass(frozen=True, slots=True)
class Reverse:
    """Record step ``step`` from the current state, which is the one at ``step``, and back-propagate it."""

    step: int


Action = Advance | Snapshot | Restore | Release | Reverse


def optimal_advances(steps: int, snapshots: int) -> int:
    """Least number of steps run without recording to reverse ``steps`` steps (Griewank & Walther 2000,
    Proposition 1).

    Args:
        steps: length of the chain, at least 1.
        snapshots: how many states can be kept at a time besides the one at position 0, at least 0.

    Raises:
        PlanError: ``steps < 1`` or ``snapshots < 0``.
    """
    _check(steps, snapshots)
    kept = snapshots + 1
    repeats = _repeats(steps, kept)
    return repeats * steps - _beta(kept + 1, repeats - 1)


def first_sweep(steps: int, snapshots: int) -> tuple[int, ...]:
    """Positions of the snapshots that ``reversal`` keeps before its first ``Reverse``, in increasing order.

    The actions of ``reversal`` up to the first ``Reverse`` advance from 0 to ``steps - 1`` and keep exactly
    these states; a forward pass that keeps them may stand in for those actions.

    Raises:
        PlanError: ``steps < 1`` or ``snapshots < 0``.
    """
    _check(steps, snapshots)
    positions: list[int] = []
    start, kept = 0, snapshots + 1
    while steps - start > 1:
        start += _split(steps - start, kept)
        kept -= 1
        if steps - start > 1:
            positions.append(start)
    return tuple(positions)


def reversal(steps: int, snapshots: int) -> Iterator[Action]:
    """The actions that reverse a chain with the fewest advances, made one at a time.

    The chain starts with the state at position 0 current. ``Reverse`` comes for ``steps - 1`` down to 0;
    the number of advanced steps is ``optimal_advances(steps, snapshots)``, and at most ``snapshots`` states
    are kept at any time. With ``snapshots >= steps - 2`` nothing is advanced again after the first sweep.
    The state needed by a ``Reverse`` directly after an ``Advance`` is not kept first.

    Args:
        steps: length of the chain, at least 1.
        snapshots: how many states can be kept at a time besides the one at position 0, at least 0.

    Raises:
        PlanError: ``steps < 1`` or ``snapshots < 0`` (at the call, not at the first action).
    """
    _check(steps, snapshots)
    return _actions(steps, snapshots)


def _actions(steps: int, snapshots: int) -> Iterator[Action]:
    # Kept states, the deepest last; `stop` ends the part of the chain still to be reversed above the last
    # of them.
    kept = [0]
    stop = steps
    current = 0
    while stop > 0:
        start = kept[-1]
        if current != start:
            yield Restore(start)
            current = start
        while stop - current > 1:
            position = current + _split(stop - current, snapshots + 2 - len(kept))
            yield Advance(current, position)
            current = position
            if stop - position > 1:
                yield Snapshot(position)
                kept.append(position)
        stop -= 1
        yield Reverse(stop)
        current = stop + 1  # the state before the step is used up
        if kept[-1] == stop and stop > 0:
            yield Release(kept.pop())


def _split(length: int, kept: int) -> int:
    """Where to place the next snapshot in ``length > 1`` steps, given ``kept`` states including the one at
    the start.

    The split is optimal if the left part has between ``beta(kept, r - 2)`` and ``beta(kept, r - 1)`` steps
    and the right part between ``beta(kept - 1, r - 1)`` and ``beta(kept - 1, r)`` (Griewank & Walther,
    section 3). The longest such left part is taken.
    """
    if kept == 1:
        return length - 1
    repeats = _repeats(length, kept)
    return min(_beta(kept, repeats - 1), length - _beta(kept - 1, repeats - 1))


def _repeats(length: int, kept: int) -> int:
    """Smallest ``r`` with ``length <= beta(kept, r)``."""
    if kept == 1:
        return length - 1
    repeats, reach = 0, 1
    while reach < length:
        repeats += 1
        reach = reach * (kept + repeats) // repeats
    return repeats


def _beta(kept: int, repeats: int) -> int:
    """Longest chain that ``kept`` states reverse while no step is advanced more than ``repeats`` times."""
    return comb(kept + repeats, kept) if repeats >= 0 else 0


def _check(steps: int, snapshots: int) -> None:
    if steps < 1:
        raise PlanError(f"a chain needs at least one step, got steps={steps}.")
    if snapshots < 0:
        raise PlanError(f"got snapshots={snapshots}; use 0 to keep no state besides the initial one.")
