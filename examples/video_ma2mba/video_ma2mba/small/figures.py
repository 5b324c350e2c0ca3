"""The small run's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from video_ma2mba.data.frames import read_video
from video_ma2mba.data.transform import FrameTransform
from video_ma2mba.evaluation.questions import Mean
from video_ma2mba.small.measure import Answer, accuracy
from video_ma2mba.small.pipeline import BASELINES, FINAL, SeedResult
from video_ma2mba.small.render import SIZE, Look
from video_ma2mba.small.report import CHANCE, pooled
from video_ma2mba.small.settings import Settings

_INK, _FAINT, _RIGHT, _WRONG = "#1f2933", "#7b8794", "#1b7f5c", "#c0392b"
_COLORS = {FINAL: "#2f6db3", **dict(zip(BASELINES.values(), ("#c77c2e", "#8e63b0"), strict=True))}
_PER_ROW = 16


def draw_contact_sheet(path: Path, settings: Settings, result: SeedResult) -> None:
    """A held-out video of the middle trained length, second by second, and what was asked and answered about it."""
    lengths = settings.sizes.lengths
    name = next(name for name, story in result.data.stories.items() if story.seconds == lengths[len(lengths) // 2])
    answers = [answer for answer in result.answers[FINAL] if Path(answer.video).stem == name]
    sheet = _sheet(result.data.held_out(Look.PLAIN) / f"{name}.mp4")
    rows = len(sheet) // (SIZE + 1)
    figure, (top, below) = _figure((11, 0.75 * rows + 0.42 * len(answers) + 0.9), [0.75 * rows, 0.42 * len(answers)])
    top.imshow(sheet, interpolation="nearest", extent=(0, _PER_ROW, rows, 0))
    top.set_xticks(np.arange(_PER_ROW) + 0.5, [str(second) for second in range(_PER_ROW)])
    top.set_yticks(np.arange(rows) + 0.5, [f"{_PER_ROW * row} s +" for row in range(rows)])
    top.tick_params(length=0, labelsize=8, colors=_FAINT)
    top.set_title("A held-out video at one frame a second, and the answers to its questions", loc="left", fontsize=11)
    below.axis("off")
    for place, answer in enumerate(answers):
        _line(below, 1 - (place + 0.5) / len(answers), answer)
    figure.savefig(path)


def _line(axes: Any, y: float, answer: Answer) -> None:
    options = "   ".join(answer.options)
    color = _RIGHT if answer.correct else _WRONG
    style: dict[str, Any] = {"va": "center", "transform": axes.transAxes}
    axes.text(0.0, y, answer.asked, fontsize=9.5, color=_INK, **style)
    axes.text(0.36, y, options, fontsize=8.5, color=_FAINT, **style)
    axes.text(0.99, y, f"{answer.response}   right: {answer.right}", fontsize=9.5, color=color, ha="right", **style)


def _sheet(video: Path) -> Any:
    """The frames, row by row, with a line between them."""
    frames = read_video(video, FrameTransform(SIZE))
    pixels = frames.read(0, len(frames)).numpy()
    pixels = np.pad(pixels, ((0, -len(pixels) % _PER_ROW), (0, 1), (0, 1), (0, 0)), constant_values=255)
    side = SIZE + 1
    grid = pixels.reshape(-1, _PER_ROW, side, side, 3).swapaxes(1, 2)
    return grid.reshape(-1, _PER_ROW * side, 3)


def draw_losses(path: Path, settings: Settings, results: Sequence[SeedResult]) -> None:
    """Loss of every step, a panel for each stage, a line for each seed."""
    figure, panels = _figure((10.5, 3.6), [1] * len(settings.stages), across=True)
    for axes, stage in zip(panels, settings.stages, strict=True):
        for index, result in enumerate(results):
            axes.plot(
                result.losses[stage.name], linewidth=1.2, color=_COLORS[FINAL], alpha=0.9 - 0.5 * index / len(results)
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"steps of {stage.batch} sequences")
        _plain(axes, f"Stage {stage.name}: {', '.join(stage.rates.trained)}")
    panels[0].set_ylabel("loss (nats per learnt token)")
    figure.savefig(path)


def draw_lengths(path: Path, settings: Settings, results: Sequence[SeedResult]) -> None:
    """Accuracy by length with standard errors: the last model and the baselines."""
    figure, (axes,) = _figure((7.2, 4.2), [1])
    sizes = settings.sizes
    for name, color in _COLORS.items():
        means = [accuracy(pooled(results, name), seconds=[seconds]) for seconds in sizes.all_lengths]
        axes.errorbar(
            sizes.all_lengths,
            [100 * mean.value for mean in means],
            [100 * mean.error for mean in means],
            color=color,
            marker="o",
            capsize=3,
            linewidth=1.8 if name == FINAL else 1.2,
            label=name,
        )
    axes.axhline(100 * CHANCE, color=_FAINT, linewidth=1, linestyle=":", label="chance")
    axes.axvspan(sizes.lengths[-1] * 1.2, sizes.longer[-1] * 1.2, color=_FAINT, alpha=0.12, linewidth=0)
    axes.annotate("longer than trained", (sizes.longer[0], 2), ha="center", fontsize=8.5, color=_FAINT)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes.all_lengths, [str(seconds) for seconds in sizes.all_lengths])
    axes.set_ylim(0, 100)
    axes.set_xlabel("length of the video (seconds)")
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize=9)
    _plain(axes, "Held-out videos")
    figure.savefig(path)


def draw_limits(path: Path, variants: Sequence[tuple[str, Sequence[tuple[str, Mean]]]]) -> None:
    """Accuracy by the limit of frames in evaluation, a line for each way to train."""
    figure, (axes,) = _figure((7.2, 4.2), [1])
    for (name, points), color in zip(variants, _COLORS.values(), strict=False):
        values, errors = (
            [100 * value for value in each] for each in zip(*((m.value, m.error) for _, m in points), strict=True)
        )
        axes.errorbar(range(len(points)), values, errors, color=color, marker="o", capsize=3, linewidth=1.6, label=name)
    axes.axhline(100 * CHANCE, color=_FAINT, linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(variants[0][1])), [limit for limit, _ in variants[0][1]])
    axes.set_ylim(0, 100)
    axes.set_xlabel("frames of a video in evaluation")
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize=9, title="frames of a video in training", title_fontsize=9)
    _plain(axes, "Held-out videos of all lengths")
    figure.savefig(path)


def _figure(size: tuple[float, float], ratios: Sequence[float], *, across: bool = False) -> tuple[Any, Any]:
    figure: Any = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if across:
        return figure, figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    return figure, figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
