"""What benchmarks have in common: questions about videos, and what the answers earned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from video_ma2mba.data.records import Media
from video_ma2mba.evaluation.judges import Judge

VIDEO_SUFFIXES = (".mp4", ".MP4", ".webm", ".mkv", ".avi")


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
        id: unique in its benchmark.
        media: the video.
        prompt: what the model is asked.
        answer: the right letter or a reference text; None where the key is not public.
        groups: what results are broken down by, e.g. `{"duration": "short"}`.
        options: the choices, without their letters; empty for open questions.
        prefill: first words of the answer, given to the model.
        max_new_tokens: length of the answer at most.
        asked: the bare question, for a judge.
    """

    id: str
    media: Media
    prompt: str
    answer: str | None
    groups: Mapping[str, str]
    options: tuple[str, ...] = ()
    prefill: str = ""
    max_new_tokens: int = 16
    asked: str = ""


@dataclass(frozen=True)
class Mark:
    """What an answer earned.

    Attributes:
        id: of the question.
        video: answers about the same video are not independent.
        groups: of the question.
        values: metric to value; empty where the key is not public.
        parsed: what was read out of the answer.
    """

    id: str
    video: str
    groups: Mapping[str, str]
    values: Mapping[str, float]
    parsed: str = ""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over marks.

    Attributes:
        value: the mean.
        error: its standard error, with answers about the same video counted as one cluster.
        count: number of marks.
    """

    value: float
    error: float
    count: int


Means = Mapping[str, Mapping[str, Mean]]
"""Metric to group ("overall", "duration=short") to mean."""


class Benchmark(Protocol):
    """A benchmark in its local copy."""

    @property
    def name(self) -> str:
        """As results call it."""
        ...

    @property
    def protocol(self) -> str:
        """Which variant of prompts and rules, as results state it."""
        ...

    def questions(self) -> list[Question]:
        """All questions."""
        ...

    def mark(self, questions: Sequence[Question], responses: Mapping[str, str], judge: Judge) -> list[Mark]:
        """What the answers earned; those to questions without a public key are read, and earn no value."""
        ...

    def columns(self, means: Means) -> dict[str, float]:
        """The figures that the paper prints of this benchmark, by its column names."""
        ...


def means_of(marks: Sequence[Mark]) -> dict[str, dict[str, Mean]]:
    """Means of every metric, overall and for each group."""
    cells: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for mark in marks:
        names = ["overall", *(f"{key}={value}" for key, value in mark.groups.items())]
        for metric, value in mark.values.items():
            for name in names:
                cells.setdefault(metric, {}).setdefault(name, []).append((mark.video, value))
    return {
        metric: {name: clustered_mean(values) for name, values in groups.items()} for metric, groups in cells.items()
    }


def clustered_mean(values: Sequence[tuple[str, float]]) -> Mean:
    """The mean of (cluster, value) pairs, and its cluster-robust standard error."""
    count = len(values)
    mean = sum(value for _, value in values) / count
    residuals: dict[str, float] = {}
    for cluster, value in values:
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    return Mean(mean, sum(each**2 for each in residuals.values()) ** 0.5 / count, count)


def find_video(folder: Path, name: str) -> Path:
    """The file of a name whose suffix may be any of a video's; the first guess if there is none."""
    candidates = [folder / name] if Path(name).suffix in VIDEO_SUFFIXES else []
    candidates += [folder / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def lettered(options: Sequence[str], template: str) -> str:
    """Options on lines of their own, `template` filled with `letter` and `option`."""
    return "\n".join(template.format(letter=letter_of(index), option=option) for index, option in enumerate(options))


def letter_of(index: int) -> str:
    """A for 0, B for 1, and so on."""
    return chr(ord("A") + index)


@dataclass(frozen=True)
class Tally:
    """Marks of multiple-choice answers."""

    marks: list[Mark] = field(default_factory=list)

    def add(self, question: Question, parsed: str, *, answered: bool = True) -> None:
        """Mark an answer by its letter; no value without a key."""
        if question.answer is None:
            self.marks.append(Mark(question.id, str(question.media.path), question.groups, {}, parsed))
            return
        correct = float(parsed == question.answer)
        values = {"accuracy": correct, **({"accuracy_answered": correct} if answered else {})}
        self.marks.append(Mark(question.id, str(question.media.path), question.groups, values, parsed))
