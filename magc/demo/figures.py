"""The demo's pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from magc.demo.compare import Comparison
from magc.demo.settings import Settings
from magc.demo.train import Evaluation, Training
from magc.units import format_bytes, format_count

Axes = Any
"""matplotlib's stubs leave its keyword arguments unknown, which strict type checking takes for errors."""

_COLORS = ("#7b8794", "#c77c2e", "#8e63b0", "#1b9e8a", "#2f6db3")
_INK, _FAINT, _BUDGET = "#1f2933", "#7b8794", "#c0392b"
_MIB = 1 << 20


def draw_memory(path: Path, settings: Settings, comparison: Comparison, training_peak: int) -> None:
    """Peaks of every strategy: measured beside predicted at one length, and predicted over all lengths."""
    figure, (left, right) = _figure(2, (12.5, 4.9), (1, 1.25))
    _bars(left, settings, comparison)
    _growth(right, settings, comparison, training_peak)
    figure.savefig(path)


def _bars(axes: Axes, settings: Settings, comparison: Comparison) -> None:
    rows = comparison.rows
    for index, (row, color) in enumerate(zip(rows, _COLORS, strict=True)):
        y = len(rows) - 1 - index
        axes.barh(y + 0.19, row.measured_bytes / _MIB, 0.36, color=color)
        axes.barh(y - 0.19, row.predicted_bytes / _MIB, 0.36, color=color, alpha=0.42)
        speed = row.tokens_per_second / rows[0].tokens_per_second
        axes.annotate(
            f"{format_bytes(row.measured_bytes)}\n{speed:.0%} speed",
            (max(row.measured_bytes, row.predicted_bytes) / _MIB, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
        )
    axes.barh(0, 0, color=_FAINT, label="measured")
    axes.barh(0, 0, color=_FAINT, alpha=0.42, label="predicted")
    axes.axvline(settings.budget / _MIB, color=_BUDGET, linewidth=1.3, label=f"budget {format_bytes(settings.budget)}")
    axes.set_yticks(range(len(rows)), [_wrapped(row.name) for row in reversed(rows)])
    axes.set_xlim(0, 1.32 * max(row.measured_bytes for row in rows) / _MIB)
    axes.set_xlabel("peak memory of forward and backward (MiB)")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _plain(axes, f"{comparison.tokens:,} tokens, every strategy")


def _growth(axes: Axes, settings: Settings, comparison: Comparison, training_peak: int) -> None:
    for row, color in zip(comparison.rows, _COLORS, strict=True):
        points = [
            (length, peak)
            for length, peak in zip(comparison.lengths, comparison.growth[row.name], strict=True)
            if peak is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], color=color, linewidth=1.8)
        axes.plot(comparison.tokens, row.measured_bytes, "o", color=color, markersize=5.5)
        x, y = points[-1]
        axes.annotate(
            _wrapped(row.name),
            (x, y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=color,
            annotation_clip=False,
        )
    axes.plot(settings.seq_len, training_peak, "*", color=_COLORS[-1], markersize=13, markeredgecolor="white")
    axes.annotate(
        f"trained: {settings.seq_len:,} tokens\n{format_bytes(training_peak)} measured",
        (settings.seq_len, training_peak),
        xytext=(10, 26),
        textcoords="offset points",
        ha="left",
        va="center",
        arrowprops={"arrowstyle": "-", "color": _COLORS[-1], "shrinkB": 5, "relpos": (0, 0.5)},
        fontsize=8.5,
        color=_COLORS[-1],
    )
    axes.plot([], [], color=_FAINT, linewidth=1.8, label="predicted")
    axes.plot([], [], "o", color=_FAINT, markersize=5.5, label="measured")
    axes.axhline(settings.budget, color=_BUDGET, linewidth=1.3, label=f"budget {format_bytes(settings.budget)}")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(comparison.lengths[0], comparison.lengths[-1])
    axes.xaxis.set_major_locator(LogLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(_power))
    axes.yaxis.set_major_locator(LogLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(_bytes))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
    axes.set_xlabel("sequence length (tokens)")
    _plain(axes, "Peak memory by sequence length")


def draw_loss(path: Path, settings: Settings, training: Training, before: Evaluation, after: Evaluation) -> None:
    """Training loss by step, and the loss on held-out files before and after."""
    figure, (axes,) = _figure(1, (7.6, 4.2), (1,))
    bits = [loss / math.log(2) for loss in training.losses]
    axes.plot(range(len(bits)), bits, color=_COLORS[-1], linewidth=1.8, label="training sequences")
    ends = [(0, before.bits_per_byte), (len(bits), after.bits_per_byte)]
    axes.plot(
        [x for x, _ in ends],
        [y for _, y in ends],
        "D",
        color=_COLORS[1],
        markersize=8,
        label=f"held-out files ({after.files})",
        clip_on=False,
        zorder=3,
    )
    for (x, y), align, shift in zip(ends, ("left", "right"), (10, -10), strict=True):
        axes.annotate(
            f"{y:.2f}", (x, y), xytext=(shift, 7), textcoords="offset points", ha=align, fontsize=10, color=_COLORS[1]
        )
    axes.set_ylim(0, 1.1 * max(*bits, before.bits_per_byte))
    axes.set_xlim(0, len(bits))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"training steps of {settings.seq_len:,} bytes")
    axes.set_ylabel("loss (bits per byte)")
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    sizes = f"{settings.n_layer} layers of width {settings.d_model}"
    _plain(axes, f"Mamba-2 ({sizes}) on Python source, in {format_bytes(training.peak_bytes)}")
    figure.savefig(path)


def _figure(columns: int, size: tuple[float, float], ratios: tuple[float, ...]) -> tuple[Any, Any]:
    figure: Any = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, width_ratios=ratios, squeeze=False)[0]


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n")


def _bytes(nbytes: float, position: int | None) -> str:
    del position
    return format_bytes(nbytes).replace(".0 ", " ")


def _power(tokens: float, position: int | None) -> str:
    """``4096`` as ``4Ki``: lengths are powers of two."""
    del position
    for factor, suffix in ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if tokens >= factor:
            return f"{tokens / factor:g}{suffix}"
    return format_count(tokens)
