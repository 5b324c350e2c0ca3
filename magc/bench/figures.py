"""Results as pictures: memory and throughput by length, and memory against speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from magc.bench.cases import Case, Method, length_name
from magc.bench.report import Section, paper_peaks, sections
from magc.bench.result import Record, Result, Status
from magc.plot import make_figure
from magc.units import format_bytes, format_count

Axes = Any
"""matplotlib's stubs leave its keyword arguments unknown, which strict type checking takes for errors."""

_COLORS = {
    Method.NONE: "#7b8794",
    Method.PER_LAYER: "#c77c2e",
    Method.SQRT: "#8e63b0",
    Method.PAPER: "#1b9e8a",
    Method.AUTO: "#2f6db3",
    Method.MINIMUM: "#c0392b",
    Method.PLAN: "#3e4c59",
}
_DRAWN_FOR = (Method.NONE, Method.PER_LAYER, Method.SQRT, Method.PAPER)
"""Methods that the paper has numbers of."""
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP"
_INK, _FAINT = "#1f2933", "#7b8794"


def draw(records: Sequence[Record], folder: Path) -> list[str]:
    """Draw what there is.

    Args:
        records: of any number of runs.
        folder: gets ``memory.png``, ``throughput.png`` and, where ``auto`` ran with several budgets, ``frontier.png``.

    Returns:
        The names of the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = sections(records)
    pictures: tuple[tuple[str, list[Section], Callable[[Axes, Section], None]], ...] = (
        ("memory.png", [section for section in found if _measured(section)], _draw_memory),
        ("throughput.png", [section for section in found if _measured(section)], _draw_throughput),
        ("frontier.png", [section for section in found if _frontiers(section)], _draw_frontier),
    )
    drawn: list[str] = []
    for name, shown, draw_one in pictures:
        if not shown:
            continue
        figure = make_figure(folder / name)
        figure.set_size_inches(6.6 * len(shown), 5.2)
        for axes, section in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            draw_one(axes, section)
        figure.savefig(folder / name)
        drawn.append(name)
    return drawn


def _measured(section: Section) -> list[Result]:
    return [result for result in section.results if result.status is Status.OK]


def _draw_memory(axes: Axes, section: Section) -> None:
    """The paper's Figure 1, its own numbers beside ours."""
    for index, one in enumerate(section.series):
        _line(axes, section, one, index, lambda result: float(result.peak_bytes or 0))
    for method in dict.fromkeys(one.method for one in section.series):
        theirs = paper_peaks(section.model, method)
        if theirs and method in _DRAWN_FOR:
            peaks = [gigabytes * 1e9 for gigabytes in theirs.values()]
            axes.plot(list(theirs), peaks, "x", color=_COLORS[method], markersize=6, alpha=0.7)
    if any(line.get_marker() == "x" for line in axes.get_lines()):
        axes.plot([], [], "x", color=_FAINT, label="the paper's Table 3 (A100 80GB)")
    axes.set_yscale("log", base=2)
    _byte_ticks(axes.yaxis)
    axes.set_ylabel("peak over weights and gradients")
    _finish(axes, section)


def _draw_throughput(axes: Axes, section: Section) -> None:
    for index, one in enumerate(section.series):
        _line(axes, section, one, index, lambda result: result.tokens_per_second or 0.0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_count)
    axes.set_ylabel("tokens per second")
    _finish(axes, section)


def _line(axes: Axes, section: Section, one: Case, index: int, value: Callable[[Result], float]) -> None:
    alike = [other for other in section.series if other.method is one.method].index(one)
    results = [result for result in section.of(one) if result.status is Status.OK]
    axes.plot(
        [result.case.tokens for result in results],
        [value(result) for result in results],
        _STYLES[alike % len(_STYLES)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5,
        linewidth=1.8,
        color=_COLORS[one.method],
        label=one.label,
    )


def _frontiers(section: Section) -> dict[Case, list[Result]]:
    """Results of ``auto`` at a length where there are several budgets, by their peaks; by case, its budget left open."""
    found: dict[Case, list[Result]] = {}
    for result in _measured(section):
        if isinstance(result.case.budget, int):
            found.setdefault(replace(result.case, budget=0), []).append(result)
    return {
        case: sorted(results, key=lambda result: result.peak_bytes or 0)
        for case, results in found.items()
        if len(results) > 1
    }


def _draw_frontier(axes: Axes, section: Section) -> None:
    """Lines of ``auto``, and the other methods as points of the same shape at the same length."""
    found = _frontiers(section)
    lengths = sorted({case.tokens for case in found})
    for index, (case, results) in enumerate(found.items()):
        label = f"auto{', graphs' if case.runner != 'eager' else ''}, {length_name(case.tokens)} tokens"
        marker = _MARKERS[lengths.index(case.tokens) % len(_MARKERS)]
        style = _STYLES[index % len(_STYLES)]
        axes.plot(*_xy(results), style, marker=marker, color=_COLORS[Method.AUTO], label=label)
    labelled: set[Method] = set()
    for other in _measured(section):
        case = other.case
        if case.tokens not in lengths or case.method is Method.AUTO:
            continue
        marker = _MARKERS[lengths.index(case.tokens) % len(_MARKERS)]
        label = None if case.method in labelled else str(case.method)
        labelled.add(case.method)
        axes.plot(*_xy([other]), marker, color=_COLORS[case.method], markersize=7, label=label)
    axes.set_xscale("log", base=2)
    _byte_ticks(axes.xaxis)
    axes.set_xlabel("peak over weights and gradients")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_count)
    axes.set_ylabel("tokens per second")
    _plain(axes, section)


def _xy(results: Iterable[Result]) -> tuple[list[float], list[float]]:
    shown = list(results)
    return [float(one.peak_bytes or 0) for one in shown], [one.tokens_per_second or 0.0 for one in shown]


def _finish(axes: Axes, section: Section) -> None:
    lengths = section.lengths
    axes.set_xscale("log", base=2)
    ticks = lengths[:: max(1, math.ceil(len(lengths) / 8))]
    axes.set_xticks(ticks, [length_name(tokens) for tokens in ticks])
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.minorticks_off()
    axes.set_xlabel("sequence length (tokens)")
    _plain(axes, section)


def _byte_ticks(axis: Any) -> None:
    axis.set_major_formatter(_bytes)


def _bytes(nbytes: float, position: int | None) -> str:
    del position
    return format_bytes(nbytes).replace(".0 ", " ")


def _count(count: float, position: int | None) -> str:
    del position
    return format_count(count)


def _plain(axes: Axes, section: Section) -> None:
    axes.set_title(f"{section.title}, {section.device}", loc="left", fontsize=10, color=_INK)
    axes.set_axisbelow(True)
    axes.grid(axis="both", color="#e4e7eb", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8.5, frameon=False)
