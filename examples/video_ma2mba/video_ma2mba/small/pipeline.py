"""A seed of the small run: videos, three stages, and what the model knows after them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from video_ma2mba.small.dataset import Data, write_data
from video_ma2mba.small.measure import Answer, measure
from video_ma2mba.small.render import Look
from video_ma2mba.small.settings import Settings
from video_ma2mba.small.stages import new_start, run_stage

Advance = Callable[[int, str], None]


class Screen(Protocol):
    """What shows progress; `magc.demo.screen.Screen` does."""

    def steps(self, what: str, total: int, *, lines: int = 9) -> AbstractContextManager[Advance]:
        """While so many steps run."""
        ...


@dataclass(frozen=True, slots=True)
class SeedResult:
    """What came out with one seed.

    Attributes:
        seed: which.
        data: the files.
        losses: of every step, by stage.
        answers: `FINAL`, and the baselines of `BASELINES`, which are the same model's on other videos.
        seconds: by part of the work.
    """

    seed: int
    data: Data
    losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


FINAL = "after stage 2"
BASELINES = {Look.SHUFFLED: "shuffled", Look.BLIND: "grey"}


def run_seed(settings: Settings, seed: int, folder: Path, screen: Screen) -> SeedResult:
    """Everything, into a folder."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - clock
        clock = now

    with screen.steps("videos", settings.sizes.videos, lines=1) as advance:
        data = write_data(folder / "data", settings.sizes, seed, advance)
    lap("videos")
    result = SeedResult(seed, data, seconds=seconds)
    questions = len(json.loads(data.benchmark.read_text(encoding="utf-8")))

    def ask(name: str, model: Path, look: Look = Look.PLAIN) -> None:
        with screen.steps(name, questions, lines=1) as advance:
            out = folder / "answers" / name.replace(" ", "-")
            result.answers[name] = measure(model, data, out, look=look, device=device_of(settings), progress=advance)
        lap("questions")

    model = new_start(settings.base, folder / "start", seed)
    for stage in settings.stages:
        with screen.steps(f"stage {stage.name}", stage.steps, lines=4) as advance:
            trained = run_stage(stage, settings, data, model, folder / f"stage-{stage.name}", seed, advance)
        model, result.losses[stage.name] = trained.folder, trained.losses
        lap(f"stage {stage.name}")
    ask(FINAL, model)
    for look, name in BASELINES.items():
        ask(name, model, look)
    return result


def device_of(settings: Settings) -> str:
    """Where the model runs."""
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
