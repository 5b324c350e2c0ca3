"""The shape of the paper's table 4 in miniature: `python -m video_ma2mba.small.ablation --out ablation`.

Trained on few frames of each video or on all, with and without stage 1.5, and asked with several limits of frames.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from jsonargparse import auto_cli

from magc.errors import MissingExtraError
from video_ma2mba.command import errors_as_lines
from video_ma2mba.errors import ConfigError
from video_ma2mba.evaluation.questions import Mean
from video_ma2mba.small.dataset import Data, write_data
from video_ma2mba.small.measure import Answer, accuracy, measure
from video_ma2mba.small.pipeline import device_of
from video_ma2mba.small.report import markdown_table, shown
from video_ma2mba.small.settings import BASE, Settings
from video_ma2mba.small.stages import new_start, run_stage

FEW = 8
LIMITS = (8, 16, 32, None)
ALL = "1 fps"
FILES = ("ablation.md", "ablation.json", "ablation.png")
In = TypeVar("In")
Out = TypeVar("Out")
Asked = dict[int | None, list[Answer]]
"""Answers by the limit of frames."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to train.

    Attributes:
        interleaved: with stage 1.5.
        max_frames: of a video in training; None is all.
    """

    interleaved: bool
    max_frames: int | None

    @property
    def name(self) -> str:
        """In words."""
        return f"{frames_of(self.max_frames)}, {'with' if self.interleaved else 'without'} stage 1.5"


VARIANTS = (Variant(False, FEW), Variant(False, None), Variant(True, None))
"""Those of the paper: what it trains on few frames, it trains without stage 1.5."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does."""

    settings: Settings
    data: Data
    seed: int
    variant: Variant

    @property
    def folder(self) -> Path:
        """Of its models and answers."""
        return self.settings.out / f"seed-{self.seed}" / self.variant.name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        variant: how the model was trained.
        limit: frames of a video in evaluation; None is all.
        lengths: accuracy by seconds.
        overall: over all lengths.
    """

    variant: Variant
    limit: int | None
    lengths: dict[int, Mean]
    overall: Mean


def main(
    out: Path = Path("small-ablation"),
    seeds: list[int] = [0],  # noqa: B006 (jsonargparse shows it)
    base: Path = BASE,
    device: str | None = None,
    workers: int = 1,
    quick: bool = False,
) -> None:
    """Train every variant with every seed, and evaluate each with every limit of frames.

    Args:
        out: a new folder for videos, models, answers and results.
        seeds: of videos, questions, the projector's first weights and the order of training.
        base: the model to begin with.
        device: None is the GPU if there is one.
        workers: processes that share variants and seeds; the machine's cores are dealt to them.
        quick: a few seconds: every part runs, little is learnt.
    """
    for module in ("rich", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "demo", "the ablation")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out={out} is not empty; give a new folder, or remove this one")
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    from magc.demo.screen import Screen
    from video_ma2mba.small.figures import draw_limits

    started = time.perf_counter()
    settings = Settings(out, tuple(seeds), base=base, device=device)
    settings = settings.quick() if quick else settings
    screen = Screen()
    with ExitStack() as stack:
        run_all = _runner(workers, stack)
        with screen.steps("videos", len(seeds), lines=1) as advance:
            data = list(_told(run_all(_write, [(settings, seed) for seed in seeds]), advance))
        jobs = [
            Job(settings, each, seed, variant) for seed, each in zip(seeds, data, strict=True) for variant in VARIANTS
        ]
        with screen.steps("trained and asked", len(jobs), lines=len(jobs)) as advance:
            asked = list(_told(run_all(_train_and_ask, jobs), advance))
    rows = rows_of([(job.variant, each) for job, each in zip(jobs, asked, strict=True)], settings.sizes.all_lengths)
    head, cells = as_table(rows, settings.sizes.all_lengths)
    screen.table(head, cells)
    seconds = round(time.perf_counter() - started)
    told = (
        f"Seeds {', '.join(map(str, seeds))}; accuracy in percent ± standard error, clustered by video; on {_name(settings)}, "
        f"{seconds} s with {workers} processes."
    )
    screen.line(told)
    draw_limits(out / "ablation.png", [(variant.name, of_variant(rows, variant)) for variant in VARIANTS])
    (out / "ablation.md").write_text(f"{told}\n\n{markdown_table(head, cells)}\n", encoding="utf-8")
    result = {"settings": settings.to_json(), "seconds": seconds, "rows": [asdict(row) for row in rows]}
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def rows_of(found: Iterable[tuple[Variant, Asked]], lengths: Sequence[int]) -> list[Row]:
    """The table's lines, over all seeds."""
    found = list(found)
    rows: list[Row] = []
    for variant in VARIANTS:
        for limit in LIMITS:
            answers = [answer for each, asked in found if each == variant for answer in asked[limit]]
            by_length = {seconds: accuracy(answers, seconds=[seconds]) for seconds in lengths}
            rows.append(Row(variant, limit, by_length, accuracy(answers)))
    return rows


def of_variant(rows: Iterable[Row], variant: Variant) -> list[tuple[str, Mean]]:
    """Accuracies over all lengths by limit."""
    return [(frames_of(row.limit), row.overall) for row in rows if row.variant == variant]


def as_table(rows: Sequence[Row], lengths: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as the paper has them."""
    head = ["stage 1.5", "train", "infer", *(f"{seconds} s" for seconds in lengths), "all"]
    cells = [
        [
            "yes" if row.variant.interleaved else "no",
            frames_of(row.variant.max_frames),
            frames_of(row.limit),
            *(shown(row.lengths[seconds]) for seconds in lengths),
            shown(row.overall),
        ]
        for row in rows
    ]
    return head, cells


def frames_of(limit: int | None) -> str:
    """A limit of frames in the paper's words."""
    return ALL if limit is None else f"{limit} frm"


def _runner(workers: int, stack: ExitStack) -> Callable[[Callable[[In], Out], Sequence[In]], Iterator[Out]]:
    """What applies a function to values, in this process or in several."""
    if workers == 1:
        return map
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spawned, since a forked process cannot use a GPU that this one has touched.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,))
    return stack.enter_context(pool).map


def _told(values: Iterable[Out], advance: Callable[[int, str], None]) -> Iterator[Out]:
    for value in values:
        yield value
        advance(1, "")


def _write(job: tuple[Settings, int]) -> Data:
    settings, seed = job
    return write_data(settings.out / f"seed-{seed}" / "data", settings.sizes, seed, lambda count, news: None)


def _train_and_ask(job: Job) -> Asked:
    settings = replace(job.settings, max_frames=job.variant.max_frames)
    model = new_start(settings.base, job.folder / "start", job.seed)
    for stage in settings.stages:
        if stage.name != "1.5" or job.variant.interleaved:
            out = job.folder / f"stage-{stage.name}"
            model = run_stage(stage, settings, job.data, model, out, job.seed, lambda count, news: None).folder
    return {
        limit: measure(
            model,
            job.data,
            job.folder / f"answers-{frames_of(limit).replace(' ', '-')}",
            max_frames=limit,
            device=device_of(settings),
            progress=lambda count, news: None,
        )
        for limit in LIMITS
    }


def _name(settings: Settings) -> str:
    device = device_of(settings)
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    with errors_as_lines():
        auto_cli(main, as_positional=False)
