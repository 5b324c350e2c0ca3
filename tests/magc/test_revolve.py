"""Binomial checkpointing: optimal, valid action by action, and equal to published figures."""

from __future__ import annotations

import functools
import time

import pytest

from magc.errors import PlanError
from magc.revolve import (
    Advance,
    Release,
    Restore,
    Reverse,
    Snapshot,
    first_sweep,
    optimal_advances,
    reversal,
)


@functools.cache
def least_advances(steps: int, snapshots: int) -> int:
    """The optimum by dynamic programming over the position of the first snapshot."""
    if steps == 1:
        return 0
    if snapshots == 0:
        return steps * (steps - 1) // 2
    return min(
        first + least_advances(steps - first, snapshots - 1) + least_advances(first, snapshots)
        for first in range(1, steps)
    )


def run_symbolically(steps: int, snapshots: int) -> tuple[int, list[int]]:
    """Execute the actions on positions instead of states; returns the advanced steps and the first sweep."""
    current: int | None = 0
    kept = {0}
    advanced, left, sweep, sweeping = 0, steps, list[int](), True
    for action in reversal(steps, snapshots):
        match action:
            case Advance(start, stop):
                assert current == start < stop < left
                current = stop
                advanced += stop - start
            case Snapshot(position):
                assert current == position
                assert position not in kept
                kept.add(position)
                assert len(kept) - 1 <= snapshots
                if sweeping:
                    sweep.append(position)
            case Restore(position):
                assert position in kept
                current = position
            case Release(position):
                assert position > 0
                kept.remove(position)
            case Reverse(step):
                assert current == step == left - 1
                left, current, sweeping = step, None, False
    assert left == 0
    assert kept == {0}
    return advanced, sweep


@pytest.mark.parametrize("snapshots", range(9))
def test_every_small_chain_is_reversed_validly_and_optimally(snapshots: int) -> None:
    for steps in range(1, 41):
        optimum = least_advances(steps, snapshots)
        assert optimal_advances(steps, snapshots) == optimum
        advanced, sweep = run_symbolically(steps, snapshots)
        assert advanced == optimum
        assert first_sweep(steps, snapshots) == tuple(sweep)


def test_exact_actions_of_a_small_chain() -> None:
    assert list(reversal(4, 1)) == [
        Advance(0, 2),
        Snapshot(2),
        Advance(2, 3),
        Reverse(3),
        Restore(2),
        Reverse(2),
        Release(2),
        Restore(0),
        Advance(0, 1),
        Reverse(1),
        Restore(0),
        Reverse(0),
    ]
    assert list(reversal(1, 0)) == [Reverse(0)]


@pytest.mark.parametrize(
    ("steps", "snapshots", "forwards_per_step"),
    [(64, 4, 4.13), (64, 8, 3.14), (64, 16, 2.72), (256, 16, 3.33)],
)
def test_published_figures_count_the_initial_state_as_a_snapshot(
    steps: int, snapshots: int, forwards_per_step: float
) -> None:
    advances = optimal_advances(steps, snapshots - 1)
    assert (advances + steps) / steps == pytest.approx(forwards_per_step, abs=0.0051)


@pytest.mark.parametrize("steps", [2, 3, 10, 33])
def test_enough_snapshots_advance_nothing_twice(steps: int) -> None:
    for snapshots in (steps - 2, steps - 1, steps, 10 * steps):
        assert optimal_advances(steps, snapshots) == steps - 1
        assert first_sweep(steps, snapshots) == tuple(range(1, steps - 1))
    if steps > 2:
        assert optimal_advances(steps, steps - 3) > steps - 1


def test_more_snapshots_never_advance_more() -> None:
    for steps in (5, 64, 1000):
        counts = [optimal_advances(steps, snapshots) for snapshots in range(steps)]
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("snapshots", [2, 17, 2**17])
def test_long_chains_are_fast_and_optimal(snapshots: int) -> None:
    steps = 2**17
    started = time.perf_counter()
    advanced = sum(action.stop - action.start for action in reversal(steps, snapshots) if isinstance(action, Advance))
    assert advanced == optimal_advances(steps, snapshots)
    assert time.perf_counter() - started < 10


def test_actions_are_made_lazily() -> None:
    actions = reversal(10**12, 3)
    assert isinstance(next(actions), Advance)
    assert isinstance(next(actions), Snapshot)


@pytest.mark.parametrize(("steps", "snapshots"), [(0, 1), (-1, 1), (1, -1)])
def test_refuses_what_is_no_chain_at_the_call(steps: int, snapshots: int) -> None:
    for function in (reversal, first_sweep, optimal_advances):
        with pytest.raises(PlanError, match=r"at least one step|use 0"):
            function(steps, snapshots)
