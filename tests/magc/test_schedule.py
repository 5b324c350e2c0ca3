"""Schedules are valid action by action, as short as the literature says, and what the engine executes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magc import Plan, Tier, grid_checkpoint, revolve
from magc.schedule import Action, Backward, Drop, Fetch, Forget, Kind, Load, Record, Run, Save, Schedule
from tests.magc.layers import WIDTH, Cell
from tests.magc.strategies import plans


def shown(actions: Iterable[Action]) -> str:
    """Actions in short, e.g. ``run 0,0  save state 1,2 disk``."""
    words: list[str] = []
    for action in actions:
        match action:
            case Run(group, segment) | Record(group, segment) | Backward(group, segment):
                words.append(f"{type(action).__name__.lower()} {group},{segment}")
            case Save(kind, group, segment, tier):
                words.append(f"save {kind} {group},{segment} {tier}")
            case (
                Fetch(kind, group, segment)
                | Load(kind, group, segment)
                | Drop(kind, group, segment)
                | Forget(kind, group, segment)
            ):
                words.append(f"{type(action).__name__.lower()} {kind} {group},{segment}")
    return "  ".join(words)


def schedule(plan: Plan, n_layers: int, tokens: int, lowest: int = 0) -> Schedule:
    return Schedule(plan, plan.grid(n_layers, tokens), lowest)


# ---------------------------------------------------------------------- by hand
def test_the_papers_two_by_two_grid() -> None:
    made = schedule(Plan(layers=1, tokens=1, states="host"), 2, 2)
    assert shown(made.forward()) == (
        "run 0,0  save border 1,0 device  run 1,0  save state 0,1 host  run 0,1  record 1,1"
    )
    assert shown(made.backward()) == (
        "fetch state 0,1  backward 1,1  "
        "load state 0,1  drop state 0,1  record 0,1  backward 0,1  "
        "load border 1,0  drop border 1,0  record 1,0  backward 1,0  "
        "record 0,0  backward 0,0"
    )


def test_rebuilt_borders() -> None:
    made = schedule(Plan(layers=1, tokens=1, borders="rebuild"), 2, 2)
    assert shown(made.forward()) == "run 0,0  run 1,0  save state 0,1 device  run 0,1  record 1,1"
    assert shown(made.backward()) == (
        "backward 1,1  "
        "load state 0,1  drop state 0,1  record 0,1  backward 0,1  "
        "run 0,0  forget state 0,1  save border 1,0 device  "
        "load border 1,0  drop border 1,0  record 1,0  backward 1,0  "
        "record 0,0  backward 0,0"
    )


def test_one_snapshot_on_disk() -> None:
    made = schedule(Plan(tokens=1, states="disk", snapshots=1), 1, 5)
    assert shown(made.forward()) == (
        "run 0,0  run 0,1  save state 0,2 disk  run 0,2  save state 0,3 disk  run 0,3  record 0,4"
    )
    assert shown(made.backward()) == (
        "fetch state 0,3  backward 0,4  "
        "load state 0,3  drop state 0,3  fetch state 0,2  record 0,3  backward 0,3  "
        "load state 0,2  record 0,2  backward 0,2  drop state 0,2  "
        "run 0,0  record 0,1  backward 0,1  record 0,0  backward 0,0"
    )


def test_frozen_groups_are_neither_stored_nor_recorded() -> None:
    made = schedule(Plan(layers=1, tokens=1), 3, 2, lowest=2)
    assert shown(made.forward()) == ("run 0,0  run 1,0  save border 2,0 device  run 2,0  run 0,1  run 1,1  record 2,1")
    assert shown(made.backward()) == "backward 2,1  load border 2,0  drop border 2,0  record 2,0  backward 2,0"


def test_nothing_to_train() -> None:
    made = schedule(Plan(layers=1, tokens=1, keep="all"), 2, 2, lowest=2)
    assert shown(made.forward()) == "run 0,0  run 1,0  run 0,1  run 1,1"
    assert shown(made.backward()) == ""


# ---------------------------------------------------------------------- how much is recomputed
def counts(made: Schedule) -> tuple[int, int]:
    """Cells run or recorded in the forward and in the backward."""

    def count(actions: Iterable[Action]) -> int:
        return sum(isinstance(action, Run | Record) for action in actions)

    return count(made.forward()), count(made.backward())


@pytest.mark.parametrize(
    ("plan", "cells", "recomputed"),
    [
        (Plan.none(), 1, 0),
        (Plan.per_layer(), 16, 15),
        (Plan.sqrt(16), 4, 3),
        (Plan.sequence(8), 8, 7),
        (Plan(layers=4, tokens=8), 32, 31),
        (Plan(layers=4, tokens=8, keep=10), 32, 22),
        (Plan(layers=4, tokens=8, keep="all"), 32, 0),
        (Plan(layers=4, tokens=8, borders="rebuild"), 32, 31 + 7 * 3 + 2),
    ],
    ids=str,
)
def test_recomputed_cells_of_the_usual_strategies(plan: Plan, cells: int, recomputed: int) -> None:
    assert counts(schedule(plan, 16, 64)) == (cells, recomputed)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("snapshots", range(6))
@pytest.mark.parametrize("segments", [1, 2, 3, 7, 20, 33])
def test_binomial_checkpointing_takes_the_fewest_advances(groups: int, snapshots: int, segments: int) -> None:
    made = schedule(Plan(layers=1, tokens=1, snapshots=snapshots), groups, segments)
    advances = sum(isinstance(action, Run) for action in made.backward())
    steps = made.turning + 1
    first_sweep = steps - 1  # the forward pass does it
    least = revolve.optimal_advances(steps, snapshots) - first_sweep if steps else 0
    assert advances == groups * least


def test_more_snapshots_never_recompute_more() -> None:
    recomputed = [counts(schedule(Plan(tokens=1, snapshots=kept), 1, 40))[1] for kept in range(40)]
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[0] == 39 * 38 // 2 + 39 - 38
    assert recomputed[-1] == counts(schedule(Plan(tokens=1), 1, 40))[1] == 39


# ---------------------------------------------------------------------- validity
@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    n_layers, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    plan = draw(plans(n_layers, tokens))
    grid = plan.grid(n_layers, tokens)
    return Schedule(plan, grid, draw(st.just(0) | st.integers(0, grid.groups)))


@given(schedules())
@settings(max_examples=300)
def test_schedules_are_valid(made: Schedule) -> None:
    """Carry out the actions on names of values: everything used is there, nothing is put twice or left over."""
    grid, plan = made.grid, made.plan
    live: set[tuple[Kind, int, int]] = set()
    stored: dict[tuple[Kind, int, int], Tier] = {}
    puts: Counter[tuple[Kind, int, int]] = Counter()
    fetched: set[tuple[Kind, int, int]] = set()
    recorded: set[tuple[int, int]] = set()
    done: list[tuple[int, int]] = []
    backward = False

    def use(kind: Kind, group: int, segment: int) -> None:
        if (group if kind is Kind.BORDER else segment) > 0:  # else it is an input of the call
            live.remove((kind, group, segment))

    def make(group: int, segment: int) -> None:
        live.add((Kind.STATE, group, segment + 1))
        if group + 1 < grid.groups:
            live.add((Kind.BORDER, group + 1, segment))

    def carry_out(actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Run(group, segment) | Record(group, segment):
                    use(Kind.BORDER, group, segment)
                    use(Kind.STATE, group, segment)
                    if isinstance(action, Record):
                        assert (group, segment) not in recorded
                        recorded.add((group, segment))
                    if isinstance(action, Run) or not backward:
                        make(group, segment)
                case Backward(group, segment):
                    assert (group, segment) in recorded
                    done.append((segment, group))
                case Save(kind, group, segment, tier):
                    key = (kind, group, segment)
                    assert key in live
                    assert key not in stored
                    stored[key] = tier
                    puts[key] += 1
                case Fetch(kind, group, segment):
                    assert stored[kind, group, segment] in (Tier.HOST, Tier.DISK)
                    assert (kind, group, segment) not in fetched
                    fetched.add((kind, group, segment))
                case Load(kind, group, segment):
                    assert (kind, group, segment) in stored
                    fetched.discard((kind, group, segment))
                    live.add((kind, group, segment))
                case Drop(kind, group, segment):
                    del stored[kind, group, segment]
                case Forget(kind, group, segment):
                    live.remove((kind, group, segment))
            if plan.snapshots is not None:
                # The turning state is kept beside the snapshots; rebuilding keeps the states of the segment at work.
                held = {segment for kind, _, segment in stored if kind is Kind.STATE}
                assert len(held) <= plan.snapshots + 1

    carry_out(made.forward())
    finals = {(Kind.STATE, group, grid.segments) for group in range(grid.groups)}
    assert live == finals
    live -= finals
    backward = True
    carry_out(made.backward())
    assert not stored
    assert not fetched
    assert not live
    cells = [(segment, group) for segment in range(grid.segments) for group in range(made.lowest, grid.groups)]
    assert done == cells[::-1]
    assert recorded == {(group, segment) for segment, group in cells}
    if plan.snapshots is None:
        assert set(puts.values()) <= {1}
    kept = {(Kind.STATE, plan.states)} | ({(Kind.BORDER, plan.borders)} if plan.borders != "rebuild" else set())
    for action in made.forward():
        if isinstance(action, Save):
            assert (action.kind, action.tier) in kept


@given(schedules())
@settings(max_examples=60)
def test_the_engine_executes_the_schedule(made: Schedule) -> None:
    torch.manual_seed(0)
    n_layers, tokens = made.grid.layers.length, made.grid.tokens.length
    layers = [Cell() for _ in range(n_layers)]
    bounds = list(made.grid.layers.all_bounds())
    frozen = n_layers if made.lowest >= len(bounds) else bounds[made.lowest][0]
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    seen: list[Action] = []
    y, _ = grid_checkpoint(layers, torch.ones(1, tokens, WIDTH), plan=made.plan, observer=seen.append)
    assert seen == list(made.forward())
    seen.clear()
    if y.requires_grad:
        y.sum().backward()
    assert seen == list(made.backward())
