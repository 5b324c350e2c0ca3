"""A plan: which checkpoints are kept, where, and how much is recomputed. A frozen value; nothing is executed here.

One vocabulary covers the usual strategies: no checkpointing is a grid of one cell; per-layer and sqrt(L) checkpointing
(Chen et al. 2016, arXiv 1604.06174) cut only the layer axis; a sequence-only plan cuts only the token axis; multi-axis
gradient checkpointing (Lee et al. 2024, arXiv 2411.19460, section 3.2) cuts both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from magc.errors import PlanError
from magc.grid import Grid, make_axis
from magc.tiers import Tier

if TYPE_CHECKING:
    from pathlib import Path

    from magc.forecast import Forecast
    from magc.paper import PaperCosts

REBUILD: Final = "rebuild"
ALL: Final = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a stack of layers is cut into cells and what is kept of each.

    Attributes:
        layers: layers per group; a tuple gives every group's size; None puts all layers into one group.
        tokens: tokens per segment (the last may be shorter); a tuple gives every segment's length; None is the whole
            sequence.
        borders: where activations between groups are kept from the first forward, or ``"rebuild"``: only those of the
            segment at work are kept, and made again by one more run through the segment.
        states: where recurrent states between segments are kept.
        keep: how many trailing cells keep their activations in the forward and are not recomputed; ``"all"`` for all.
            At least 1: the last cell's forward is its recompute, so keeping it costs nothing.
        snapshots: how many segment boundaries may hold states at once. None: every boundary. Fewer than there are
            boundaries: the states in between are computed again by the binomial schedule of Griewank & Walther (2000).
        forecast: what the planner predicts for this plan; not part of the plan's identity.
    """

    layers: int | tuple[int, ...] | None = None
    tokens: int | tuple[int, ...] | None = None
    borders: Tier | Literal["rebuild"] = Tier.DEVICE
    states: Tier = Tier.DEVICE
    keep: int | Literal["all"] = 1
    snapshots: int | None = None
    forecast: Forecast | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check every field on its own; the fit to a stack is checked by `grid`."""
        for name, value in (("layers", self.layers), ("tokens", self.tokens)):
            sizes: tuple[object, ...] = value if isinstance(value, tuple) else () if value is None else (value,)
            if value == () or not all(type(size) is int and size >= 1 for size in sizes):
                raise PlanError(f"Plan({name}={value!r}): give a positive int, a tuple of positive ints, or None")
        object.__setattr__(self, "states", _tier("states", self.states))
        if self.borders != REBUILD:
            object.__setattr__(self, "borders", _tier("borders", self.borders))
        if self.keep != ALL and (type(self.keep) is not int or self.keep < 1):
            raise PlanError(f"Plan(keep={self.keep!r}): keep at least 1 trailing cell, or 'all'")
        if self.snapshots is not None and (type(self.snapshots) is not int or self.snapshots < 0):
            raise PlanError(f"Plan(snapshots={self.snapshots!r}): give 0 or more, or None for every boundary")

    # ------------------------------------------------------------------ the usual strategies by name
    @classmethod
    def none(cls) -> Plan:
        """No checkpointing: one cell, nothing recomputed."""
        return cls()

    @classmethod
    def per_layer(cls) -> Plan:
        """Every layer's input is kept, every layer but the last is recomputed."""
        return cls(layers=1)

    @classmethod
    def sqrt(cls, n_layers: int) -> Plan:
        """Groups of about as many layers as there are groups (Chen et al. 2016)."""
        return cls(layers=max(1, round(math.sqrt(n_layers))))

    @classmethod
    def sequence(cls, tokens: int, *, states: Tier | str = Tier.DEVICE, snapshots: int | None = None) -> Plan:
        """Cut the sequence only: all layers of one segment at a time."""
        return cls(tokens=tokens, states=_tier("states", states), snapshots=snapshots)

    @classmethod
    def multi_axis(cls, n_layers: int, seq_len: int, costs: PaperCosts | None = None) -> Plan:
        """Cells of the paper's size: Eq. 5-8 with unit constants, or the minimum of Eq. 12-16 with ``costs``."""
        from magc import paper

        if costs is not None:
            layers, tokens = paper.choose(n_layers, seq_len, costs)
            return cls(layers=layers, tokens=tokens)
        best = paper.unit_optimum(n_layers, seq_len)
        return cls(layers=max(1, round(best.layers)), tokens=max(1, round(best.tokens)))

    # ------------------------------------------------------------------ use
    def grid(self, n_layers: int, seq_len: int) -> Grid:
        """The grid that this plan makes of ``n_layers`` layers and ``seq_len`` tokens.

        Raises:
            PlanError: explicit sizes do not sum to the numbers given, or a number is not positive.
        """
        return Grid(make_axis("layers", n_layers, self.layers), make_axis("tokens", seq_len, self.tokens))

    def kept_cells(self, grid: Grid) -> int:
        """Number of trailing cells of ``grid`` that keep their activations."""
        return grid.cells if self.keep == ALL else min(self.keep, grid.cells)

    def tiers(self) -> frozenset[Tier]:
        """Tiers that this plan stores checkpoints on."""
        return frozenset({self.states} | ({self.borders} if isinstance(self.borders, Tier) else {Tier.DEVICE}))

    def with_forecast(self, forecast: Forecast) -> Plan:
        """The same plan carrying a forecast."""
        return replace(self, forecast=forecast)

    def __str__(self) -> str:
        """One line, e.g. ``8 layers x 1024 tokens, borders device, states host, 1 cell kept``."""
        layers = "all layers" if self.layers is None else "1 layer" if self.layers == 1 else f"{self.layers} layers"
        tokens = "all" if self.tokens is None else str(self.tokens)
        kept = "all cells kept" if self.keep == ALL else f"{self.keep} cell{'s' if self.keep > 1 else ''} kept"
        parts = [
            f"{layers} x {tokens} tokens",
            f"borders {self.borders}",
            f"states {self.states}",
            kept,
        ]
        if self.snapshots is not None:
            parts.append(f"{self.snapshots} state snapshots")
        return ", ".join(parts)

    def explain(self) -> str:
        """What the plan costs and which term binds, as text.

        Raises:
            PlanError: the plan carries no forecast (it was written by hand).
        """
        return _forecast_of(self).explain(self)

    def plot(self, path: str | Path) -> Path:
        """Draw memory over the schedule and the memory/recompute trade-off with this plan marked.

        Raises:
            PlanError: the plan carries no forecast.
            MissingExtraError: matplotlib is not installed.
        """
        _forecast_of(self)
        from magc.plot import plot_plan

        return plot_plan(self, path)


def _tier(name: str, value: object) -> Tier:
    try:
        return Tier(value)
    except ValueError:
        valid = [str(tier) for tier in Tier] + ([REBUILD] if name == "borders" else [])
        raise PlanError(f"Plan({name}={value!r}): give one of {valid}") from None


def _forecast_of(plan: Plan) -> Forecast:
    if plan.forecast is None:
        raise PlanError(
            "this plan was written by hand and carries no forecast; magc.forecast(plan, layers, example) measures the "
            "layers and returns the plan with one"
        )
    return plan.forecast


PlanOrRule = Plan | Callable[[int, int], Plan]
"""A plan, or a rule that makes one from the number of layers and of tokens."""
