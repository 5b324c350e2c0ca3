"""Asks a model all questions of a benchmark, goes on where it was stopped, and writes what came out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.errors import ConfigError, FormatError, MediaError
from video_ma2mba.evaluation.jsonl import append_line, read_lines
from video_ma2mba.evaluation.judges import Judge, SavedVerdicts
from video_ma2mba.evaluation.questions import Benchmark, Means, Question, means_of

Progress = Callable[[int, int], None]
"""Told how many questions of how many are answered."""
_RUN, _RESPONSES, _VERDICTS, _RESULT = "run.json", "responses.jsonl", "verdicts.jsonl", "result.json"


class Answerer(Protocol):
    """A model that answers questions about a video."""

    @property
    def name(self) -> str:
        """As results call it."""
        ...

    def answer(self, media: Media, prompts: Sequence[Prompt]) -> Iterator[str]:
        """Answers, one for each prompt, in order; the video is read once.

        Raises:
            MediaError: it cannot be.
        """
        ...


@dataclass(frozen=True)
class Result:
    """What a model reached on a benchmark.

    Attributes:
        benchmark, protocol, model, judge: what was measured, how, of whom, and by whom.
        questions: number of questions that count.
        left_out: questions whose video could not be used, with the reason.
        means: see `Means`.
        columns: the figures the paper prints.
    """

    benchmark: str
    protocol: str
    model: str
    judge: str
    questions: int
    left_out: Mapping[str, str]
    means: Means
    columns: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The contents of `result.json`."""
        return asdict(self)


def evaluate(
    benchmark: Benchmark,
    answerer: Answerer,
    judge: Judge,
    folder: str | os.PathLike[str],
    *,
    on_problem: Literal["stop", "skip"] = "stop",
    progress: Progress | None = None,
) -> Result:
    """Run a benchmark; a run that was stopped goes on in its folder.

    Args:
        benchmark: what is asked.
        answerer: who is asked.
        judge: who decides on open answers.
        folder: gets `responses.jsonl`, `verdicts.jsonl` and `result.json`.
        on_problem: when a video cannot be used, "stop" raises; "skip" leaves its questions out, and the result says so.
        progress: told how far it is.

    Returns:
        The result.

    Raises:
        ConfigError: the folder holds another run.
        MediaError: a video cannot be used. JudgeError: the judge cannot be asked. What was done is kept.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    questions = benchmark.questions()
    if len({question.id for question in questions}) != len(questions):
        raise FormatError(f"{benchmark.name}: some questions have the same name")
    _claim(path / _RUN, _identity(benchmark, answerer, questions))
    responses, problems = _ask(questions, answerer, path / _RESPONSES, on_problem, progress)
    usable = [question for question in questions if question.id in responses]
    marks = benchmark.mark(usable, responses, SavedVerdicts(judge, path / _VERDICTS))
    means = means_of(marks)
    needs_judge = (path / _VERDICTS).is_file()
    result = Result(
        benchmark.name,
        benchmark.protocol,
        answerer.name,
        judge.name if needs_judge else "none",
        len(marks),
        problems,
        means,
        benchmark.columns(means),
    )
    _write(path / _RESULT, result.to_json())
    return result


def _identity(benchmark: Benchmark, answerer: Answerer, questions: Sequence[Question]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question.id}\0{question.prompt}\0{question.prefill}\0".encode())
    return {
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        "model": answerer.name,
        "questions": digest.hexdigest(),
    }


def _claim(path: Path, identity: Mapping[str, Any]) -> None:
    if not path.is_file():
        _write(path, identity)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := {name: (before.get(name), value) for name, value in identity.items() if before.get(name) != value}:
        shown = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(f"{path.parent} holds another run ({shown}); give another folder")


def _ask(
    questions: Sequence[Question],
    answerer: Answerer,
    path: Path,
    on_problem: Literal["stop", "skip"],
    progress: Progress | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Responses and problems by question: those in the file, and then the missing ones, video by video."""
    responses = {str(line["id"]): str(line["response"]) for line in read_lines(path)}
    problems: dict[str, str] = {}
    waiting: dict[Media, list[Question]] = {}
    for question in questions:
        if question.id not in responses:
            waiting.setdefault(question.media, []).append(question)
    for media, asked in waiting.items():
        prompts = [Prompt(question.prompt, question.prefill, question.max_new_tokens) for question in asked]
        try:
            for question, response in zip(asked, answerer.answer(media, prompts), strict=True):
                responses[question.id] = response
                append_line(path, {"id": question.id, "response": response})
                if progress is not None:
                    progress(len(responses), len(questions))
        except MediaError as error:
            if on_problem == "stop":
                raise
            problems.update({question.id: str(error) for question in asked if question.id not in responses})
    return responses, problems


def _write(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
