"""Draw a plan: device memory over its schedule, and where it lies on the curve of memory against time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magc.errors import MissingExtraError, PlanError
from magc.estimate import estimate, schedule_of, stored_per_column
from magc.forecast import Candidate, Forecast
from magc.grid import Grid
from magc.plan import ALL, Plan
from magc.planner import Planner
from magc.schedule import Action, Schedule
from magc.simulate import Ledger, Term
from magc.tiers import Tier
from magc.units import format_bytes, format_count

Axes = Any
"""matplotlib's stubs leave its keyword arguments unknown, which strict type checking takes for errors."""

MOST_CELLS = 6000
"""Cells that are simulated for a drawing; of a plan with more, a shorter sequence's schedule is drawn."""

_MOST_POINTS = 1200
_BINS = 240
_COLORS = {
    Term.PARAMETERS: "#9aa5b1",
    Term.OUTPUT: "#cbd2d9",
    Term.BORDERS: "#2f6db3",
    Term.STATES: "#1b9e8a",
    Term.ACTIVATIONS: "#e8a33d",
    Term.GRADIENTS: "#8e63b0",
    Term.WORKING: "#d9583b",
    Term.CAPTURED: "#5d6b7a",
}
_SHORT = {
    Term.PARAMETERS: "parameter gradients",
    Term.OUTPUT: "output, final states, input gradient",
    Term.BORDERS: "borders",
    Term.STATES: "states",
    Term.ACTIVATIONS: "activations of recorded cells",
    Term.GRADIENTS: "gradients of borders and states",
    Term.WORKING: "working memory",
    Term.CAPTURED: "captured cells",
}
_INK, _FAINT, _BUDGET = "#1f2933", "#7b8794", "#c0392b"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Device bytes over a schedule.

    Attributes:
        seconds: predicted time at each point, increasing.
        terms: bytes of every term, ``(len(Term), points)``, in `Term`'s order; a point is the highest of its span.
        turn: when the backward begins.
        segments: how many segments were simulated.
        stretch: how many segments of the plan each of them stands for.
    """

    seconds: NDArray[np.float64]
    terms: NDArray[np.float64]
    turn: float
    segments: int
    stretch: float


def timeline(plan: Plan, forecast: Forecast, *, most_cells: int = MOST_CELLS) -> Timeline:
    """Simulate a plan's schedule, or that of as many of its segments as ``most_cells`` allows.

    Each of fewer segments stands for several: its time, output, stored checkpoints and kept activations count that many
    times. States stored by the binomial schedule do not grow so, and count as in the shorter sequence.

    Raises:
        PlanError: the plan does not fit the forecast's stack or sequence.
    """
    full = forecast.schedule(plan)
    schedule = _shortened(full, forecast, most_cells)
    stretch = full.grid.segments / schedule.grid.segments
    cells = [
        forecast.costs.cell(start, stop, full.grid.tokens.part_length(0))
        for start, stop in full.grid.layers.all_bounds()
    ]
    more = np.zeros(len(Term))
    for index, tier, nbytes in stored_per_column(schedule, cells):
        binomial = full.snapshot_positions() is not None and index == list(Term).index(Term.STATES)
        if not binomial and (tier is Tier.DEVICE or (tier is Tier.HOST and forecast.costs.host_is_device)):
            more[index] = nbytes * (stretch - 1)
    tapes = np.zeros(len(Term))
    tapes[list(Term).index(Term.ACTIVATIONS)] = (stretch - 1) * sum(cell.tape_bytes for cell in cells[full.lowest :])
    whole = np.ones(len(Term))
    whole[list(Term).index(Term.OUTPUT)] = stretch
    turning = schedule.turning  # the last segment with a cell that is not kept
    ledger = Ledger(schedule, forecast.costs)
    seconds: list[float] = []
    rows: list[NDArray[np.float64]] = []

    def carry_out(actions: Iterable[Action]) -> None:
        for action in actions:
            ledger.reset_peak()
            before = ledger.seconds
            ledger.run((action,))
            if ledger.seconds > before:  # what takes no time has no width
                seconds.append(ledger.seconds * stretch)
                segment = action.segment
                stored = more * min(segment, turning + 1) + tapes * max(0, segment - turning - 1)
                rows.append(np.array(ledger.breakdown) * whole + stored)

    carry_out(schedule.forward())
    turn = ledger.seconds * stretch
    ledger.begin_backward()
    carry_out(schedule.backward())
    return _decimated(np.array(seconds), np.array(rows, dtype=np.float64).T, turn, schedule.grid.segments, stretch)


def _shortened(full: Schedule, forecast: Forecast, most_cells: int) -> Schedule:
    segments = max(4, most_cells // full.grid.groups)
    if full.grid.segments <= segments:
        return full
    plan, tokens = full.plan, full.plan.tokens
    if isinstance(tokens, tuple):
        tokens = tokens[:segments]
    keep = plan.keep
    if keep != ALL and keep > full.grid.groups:
        # As large a share of the cells as in the whole.
        keep = max(1, round(plan.kept_cells(full.grid) / full.grid.cells * segments)) * full.grid.groups
    length = sum(tokens) if isinstance(tokens, tuple) else segments * full.grid.tokens.part_length(0)
    short = replace(plan, tokens=tokens, keep=keep, forecast=None)
    return schedule_of(short, forecast.costs, length, forecast.lowest_layer)


def _decimated(
    seconds: NDArray[np.float64], terms: NDArray[np.float64], turn: float, segments: int, stretch: float
) -> Timeline:
    """At most `_MOST_POINTS`, or else `_BINS`, each the highest within its span of time.

    So few that a span holds whole cells: finer ones would draw patterns that are not there.
    """
    if len(seconds) > _MOST_POINTS:
        spans: NDArray[np.float64] = np.linspace(0, float(seconds[-1]), _BINS + 1)[1:]
        edges = np.searchsorted(seconds, spans, side="left")
        starts = np.unique(np.append(0, np.minimum(edges, len(seconds) - 1)))
        totals = terms.sum(0)
        stops = np.append(starts[1:], len(seconds))
        chosen = [
            start + int(np.argmax(totals[start:stop]))
            for start, stop in zip(starts, stops, strict=True)
            if stop > start
        ]
        seconds, terms = seconds[stops - 1], terms[:, chosen]
    return Timeline(seconds, terms, turn, segments, stretch)


def named_plans(plan: Plan, forecast: Forecast) -> dict[str, Candidate]:
    """The usual strategies on the forecast's stack, by name, estimated; alike ones share an entry."""
    layers, seq_len = forecast.costs.n_layers, forecast.seq_len
    tokens = forecast.schedule(plan).grid.tokens.part_length(0)
    sequence = tokens if tokens < seq_len else max(1, round(math.sqrt(seq_len)))
    usual = {
        "no checkpointing": Plan.none(),
        "per layer": Plan.per_layer(),
        "sqrt(L) layers": Plan.sqrt(layers),
        f"sequence only ({format_count(sequence)} tokens)": Plan.sequence(sequence),
        "multi-axis (Eq. 5-8)": Plan.multi_axis(layers, seq_len),
    }
    names: dict[Grid, list[str]] = {}
    plans: dict[Grid, Plan] = {}
    for name, given in usual.items():
        grid = given.grid(layers, seq_len)
        names.setdefault(grid, []).append(name)
        plans[grid] = given
    return {
        " = ".join(names[grid]): Candidate(given, estimate(given, forecast.costs, seq_len, forecast.lowest_layer))
        for grid, given in plans.items()
    }


def make_figure(path: Path) -> Any:
    """An empty matplotlib figure that can be saved under a name.

    Raises:
        PlanError: the suffix is of no known format.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "demo", "plotting a plan") from error
    figure = Figure(figsize=(13, 5.4), dpi=120, layout="constrained")
    if path.suffix.lstrip(".") not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise PlanError(f"cannot write a plot to {str(path)!r}: end the name in .png, .svg or .pdf")
    return figure


def plot_plan(plan: Plan, path: str | Path) -> Path:
    """Draw a plan with its forecast into a file.

    Left: device memory over the simulated schedule, term by term, with the budget and the start of the backward. Right:
    the planner's choices from the least memory to no recompute, with this plan and the usual strategies.

    Args:
        plan: with a forecast.
        path: the file; its suffix says the format (png, svg, pdf).

    Returns:
        The path.

    Raises:
        PlanError: the plan has no forecast, or the suffix is of no known format.
        MissingExtraError: matplotlib is not installed.
    """
    if plan.forecast is None:
        raise PlanError(f"the plan ({plan}) has no forecast to draw; magc.forecast(plan, layers, example) makes one")
    path = Path(path)
    figure = make_figure(path)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_timeline(left, plan, plan.forecast)
    _draw_tradeoff(right, plan, plan.forecast)
    stack = f"{plan.forecast.costs.n_layers} layers x {plan.forecast.seq_len:,} tokens"
    figure.suptitle(f"{stack}, in cells of {plan}", fontsize=11, color=_INK)
    figure.savefig(path)
    return path


# ---------------------------------------------------------------------- left
def _draw_timeline(axes: Axes, plan: Plan, forecast: Forecast) -> None:
    drawn = timeline(plan, forecast)
    unit, name = _byte_unit(max(forecast.peak_bytes, forecast.budget or 0))
    clock, clock_name = _clock(float(drawn.seconds[-1]))
    order = [term for term in _COLORS if drawn.terms[list(Term).index(term)].any()]
    edges = np.append(0.0, drawn.seconds) * clock
    base = np.zeros(len(drawn.seconds))
    for term in order:
        top = base + drawn.terms[list(Term).index(term)] / unit
        axes.fill_between(
            edges,
            np.append(base, base[-1]),
            np.append(top, top[-1]),
            step="post",
            color=_COLORS[term],
            linewidth=0,
            label=_SHORT[term],
        )
        base = top
    turn = drawn.turn * clock
    axes.axvline(turn, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xlim(0, edges[-1])
    limit = forecast.budget
    top = max(forecast.peak_bytes, limit if limit is not None and limit < 3 * forecast.peak_bytes else 0) / unit
    axes.set_ylim(0, top * 1.16)
    _hline(axes, forecast.peak_bytes / unit, f"predicted peak {format_bytes(forecast.peak_bytes)}", _INK, "left")
    if limit is not None and limit < 3 * forecast.peak_bytes:
        _hline(axes, limit / unit, f"budget {format_bytes(limit)}", _BUDGET, "right")
    for x, text, side in ((turn, "forward ", "right"), (turn, " backward", "left")):
        axes.text(x, 0.985, text, transform=axes.get_xaxis_transform(), ha=side, va="top", fontsize=9, color=_INK)
    axes.set_ylabel(f"device memory ({name})")
    note = (
        f"\nsimulated for {drawn.segments:,} segments, each drawn as {drawn.stretch:.3g}" if drawn.stretch > 1 else ""
    )
    axes.set_xlabel(f"predicted time ({clock_name}){note}")
    axes.set_title("Memory over the schedule", loc="left", fontsize=11, color=_INK)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17 if not note else -0.21),
        ncols=3,
        fontsize=8.5,
        frameon=False,
    )
    _plain(axes)


def _hline(axes: Axes, y: float, text: str, color: str, side: str) -> None:
    axes.axhline(y, color=color, linewidth=1.2, linestyle="--" if side == "left" else "-")
    axes.annotate(
        text,
        (0 if side == "left" else 1, y),
        xycoords=("axes fraction", "data"),
        xytext=(6 if side == "left" else -2, 3),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=9,
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )


# ---------------------------------------------------------------------- right
def _draw_tradeoff(axes: Axes, plan: Plan, forecast: Forecast) -> None:
    planner = Planner(
        forecast.costs,
        forecast.seq_len,
        lowest_layer=forecast.lowest_layer,
        host=forecast.host_budget > 0,
        disk=forecast.disk,
    )
    curve = planner.frontier(forecast.host_budget)
    usual = named_plans(plan, forecast)
    chosen = Candidate(plan, forecast.estimate)
    clock, clock_name = _clock(forecast.estimate.seconds)

    def xy(*points: Candidate) -> tuple[list[float], list[float]]:
        peaks = [float(point.estimate.peak_bytes) for point in points]
        return peaks, [point.estimate.seconds * clock for point in points]

    # The least memory may take so long that nothing else could be told apart: the curve leaves at the top.
    least = min(point.estimate.seconds for point in (*curve, *usual.values()))
    shown = [point.estimate.seconds for point in usual.values() if point.estimate.seconds < 6 * least]
    top = 1.3 * max(*shown, least, forecast.estimate.seconds)

    blue = _COLORS[Term.BORDERS]
    axes.plot(*xy(*curve), color=blue, drawstyle="steps-post", linewidth=1.8, label="the planner's choices by budget")
    axes.plot(*xy(*curve), "o", color=blue, markersize=3.5)
    for (label, candidate), marker in zip(usual.items(), "sD^vP", strict=False):
        if candidate.estimate.seconds > top:
            label += f", beyond the scale: {candidate.estimate.seconds * clock:.3g} {clock_name}"
        axes.plot(*xy(candidate), marker, markersize=7.5, color="white", markeredgecolor=_INK, label=label)
    label = (
        f"this plan ({format_bytes(forecast.peak_bytes)}, {forecast.estimate.forwards_per_cell:.2f} forwards per cell)"
    )
    yellow = _COLORS[Term.ACTIVATIONS]
    axes.plot(*xy(chosen), "*", markersize=16, color=yellow, markeredgecolor=_INK, label=label)
    if forecast.budget is not None:
        axes.axvline(forecast.budget, color=_BUDGET, linewidth=1.2)
        axes.annotate(
            f"budget {format_bytes(forecast.budget)}",
            (forecast.budget, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 6),
            textcoords="offset points",
            rotation=90,
            va="bottom",
            ha="left",
            fontsize=9,
            color=_BUDGET,
        )
    axes.set_xscale("log", base=2)
    low, high = (round(math.log2(limit)) for limit in axes.get_xlim())
    ticks = [2.0**power for power in range(low, high + 1, max(1, -(-(high - low) // 6)))]
    axes.set_xticks(ticks, [format_bytes(tick).replace(".0 ", " ") for tick in ticks])
    axes.set_xlabel("predicted peak on the device (log scale)")
    axes.set_ylabel(f"predicted time of forward and backward ({clock_name})")
    axes.set_ylim(0, top * clock)
    axes.set_title("Memory against time", loc="left", fontsize=11, color=_INK)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=8.5, frameon=False)
    axes.grid(axis="both", color="#e4e7eb", linewidth=0.7)
    _plain(axes)


# ---------------------------------------------------------------------- helpers
def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)


def _byte_unit(nbytes: float) -> tuple[int, str]:
    unit = next((1 << power for power in (40, 30, 20, 10) if nbytes >= 1 << power), 1)
    return unit, _unit_name(unit)


def _unit_name(unit: int) -> str:
    return format_bytes(unit).split()[1]


def _clock(seconds: float) -> tuple[float, str]:
    """Factor from seconds, and the unit."""
    if seconds < 1:
        return 1e3, "ms"
    return (1.0, "s") if seconds < 600 else (1 / 60, "min")
