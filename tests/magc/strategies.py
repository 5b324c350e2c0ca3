"""Hypothesis strategies: stacks, plans and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import strategies as st

from magc import Plan, Tier
from tests.magc.layers import KINDS


@dataclass(frozen=True)
class Case:
    """A drawn stack, its plan and its input."""

    kinds: tuple[str, ...]
    plan: Plan
    tokens: int
    batch: int
    with_state: bool
    frozen: int
    x_needs_grad: bool
    uses: str
    seed: int


@st.composite
def compositions(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """Positive sizes that sum to ``total``."""
    cuts = draw(st.sets(st.integers(1, total - 1))) if total > 1 else set()
    edges = [0, *sorted(cuts), total]
    return tuple(stop - start for start, stop in pairwise(edges))


def sizes(total: int) -> st.SearchStrategy[int | tuple[int, ...] | None]:
    """How an axis is cut: one size (also beyond its end), all sizes, or not at all."""
    return st.none() | st.integers(1, total + 2) | compositions(total)


@st.composite
def plans(draw: st.DrawFn, n_layers: int, tokens: int) -> Plan:
    """Any plan for a grid of that size."""
    return Plan(
        layers=draw(sizes(n_layers)),
        tokens=draw(sizes(tokens)),
        borders=draw(st.sampled_from([*Tier, "rebuild"])),
        states=draw(st.sampled_from(list(Tier))),
        keep=draw(st.just(1) | st.integers(1, n_layers * tokens) | st.just("all")),
        snapshots=draw(st.none() | st.integers(0, 3)),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A stack of up to five layers over up to nine tokens."""
    kinds = tuple(draw(st.lists(st.sampled_from(KINDS[:-1]), min_size=1, max_size=4)))
    merges = sum(one == "mamba2" and other != "mamba2" for one, other in pairwise(kinds))
    n_layers, tokens = len(kinds) + merges, draw(st.integers(1, 9))
    return Case(
        kinds,
        draw(plans(n_layers, tokens)),
        tokens,
        batch=draw(st.integers(1, 2)),
        with_state=draw(st.booleans()),
        frozen=draw(st.just(0) | st.integers(0, n_layers - 1)),
        x_needs_grad=draw(st.booleans()),
        uses=draw(st.sampled_from(["all", "all", "output", "states"])),
        seed=draw(st.integers(0, 3)),
    )
