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
from video_ma2mba.errors import ConfigError, FormatError, MediaError, ProblemKind
from video_ma2mba.evaluation.identity import ModelIdentity
from video_ma2mba.evaluation.jsonl import append_line, read_lines
from video_ma2mba.evaluation.judges import Judge, SavedVerdicts
from video_ma2mba.evaluation.questions import Benchmark, Means, Question, means_of

Progress = Callable[[int, int], None]
"""Told how many questions of how many are answered."""
_RUN, _RESPONSES, _VERDICTS = "run.json", "responses.jsonl", "verdicts.jsonl"
_SUBMISSION, _RESULT = "submission.json", "result.json"


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
        identity: the model's; its name is for readers.
        questions: number of questions that count.
        without_key: number of questions answered whose key is not public; what was read out of the answers is in
            `submission.json`.
        left_out: questions whose video could not be used, with the reason.
        means: see `Means`.
        columns: the figures the paper prints.
    """

    benchmark: str
    protocol: str
    model: str
    identity: ModelIdentity
    judge: str
    questions: int
    without_key: int
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
    identity: ModelIdentity,
    on_problem: Literal["stop", "skip"] = "stop",
    progress: Progress | None = None,
) -> Result:
    """Run a benchmark; a run that was stopped goes on in its folder.

    Args:
        benchmark: what is asked.
        answerer: who is asked.
        judge: who decides on open answers.
        folder: gets `run.json`, `responses.jsonl`, `verdicts.jsonl` and `result.json`; where keys are not public
            `submission.json` too, an object of letters by the names of questions.
        identity: the answerer's model's. A run of another model is not gone on with, whatever the names are.
        on_problem: when a video cannot be used, "stop" raises; "skip" leaves its questions out, and the result says so.
        progress: told how far it is.

    Returns:
        The result.

    Raises:
        ConfigError: the folder holds another run, or, with "skip", no video can be used.
        FormatError: there are no questions, or they are malformed.
        MediaError: a video cannot be used. JudgeError: the judge cannot be asked. What was done is kept.
    """
    path, questions = Path(folder), _questions(benchmark)
    contents = _run_of(benchmark, answerer.name, identity, questions)
    _compare(path, contents)
    path.mkdir(parents=True, exist_ok=True)
    _write(path / _RUN, contents)
    responses, problems = _ask(questions, answerer, path / _RESPONSES, on_problem, progress)
    usable = [question for question in questions if question.id in responses]
    marks = benchmark.mark(usable, responses, SavedVerdicts(judge, path / _VERDICTS))
    if not marks:
        reason = next(iter(problems.values()), "no question has all its answers")
        raise ConfigError(
            f"none of {len(questions)} questions of {benchmark.name} could be asked, e.g. {reason}; check the folder of "
            "videos (--videos)"
        )
    submitted = {mark.id: mark.parsed for mark in marks if not mark.values}
    if submitted:
        _write(path / _SUBMISSION, submitted)
    means = means_of(marks)
    needs_judge = (path / _VERDICTS).is_file()
    result = Result(
        benchmark.name,
        benchmark.protocol,
        answerer.name,
        identity,
        judge.name if needs_judge else "none",
        len(marks) - len(submitted),
        len(submitted),
        problems,
        means,
        benchmark.columns(means),
    )
    _write(path / _RESULT, result.to_json())
    return result


def check_run(
    benchmark: Benchmark,
    name: str,
    identity: ModelIdentity,
    folder: str | os.PathLike[str],
    on_problem: Literal["stop", "skip"] = "stop",
) -> None:
    """Find out, before a model is loaded, that a run cannot begin, go on or end.

    Args:
        benchmark: what is asked.
        name: of the model, for readers.
        identity: of the model.
        folder: of the run; it need not be there.
        on_problem: see `evaluate`. Videos of questions that are answered already are not looked for.

    Raises:
        FormatError: the benchmark's questions are malformed, or there are none.
        ConfigError: the folder holds another run or is a file, or, with "skip", none of the videos is there.
        MediaError: with "stop", some videos are not there.
    """
    path, questions = Path(folder), _questions(benchmark)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; give a folder (--out)")
    _compare(path, _run_of(benchmark, name, identity, questions))
    answered = {str(line["id"]) for line in read_lines(path / _RESPONSES)}
    wanted = {question.media.path for question in questions if question.id not in answered}
    missing = sorted(each for each in wanted if not each.exists())
    counted = f"{len(missing)} of {len(wanted)} videos of {benchmark.name} are not there"
    if missing and on_problem == "stop":
        remedy = "check the folder of videos (--videos), or leave their questions out with --on_problem skip"
        raise MediaError(ProblemKind.MISSING, missing[0], f"{counted}; {remedy}")
    if not answered and len(missing) == len(wanted):
        raise ConfigError(f"{counted}, e.g. {missing[0]}; check the folder of videos (--videos)")


def _questions(benchmark: Benchmark) -> list[Question]:
    questions = benchmark.questions()
    if not questions:
        raise FormatError(f"{benchmark.name}: the annotations hold no question; give other annotations")
    if len({question.id for question in questions}) != len(questions):
        raise FormatError(f"{benchmark.name}: some questions have the same name")
    return questions


def _run_of(benchmark: Benchmark, name: str, identity: ModelIdentity, questions: Sequence[Question]) -> dict[str, Any]:
    """The contents of `run.json`."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question.id}\0{question.prompt}\0{question.prefill}\0".encode())
    return {
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        "model": name,
        "identity": identity.to_json(),
        "questions": digest.hexdigest(),
    }


def _compare(folder: Path, contents: Mapping[str, Any]) -> None:
    """Refuse answers of another run. The name of a model may change, and so may anything while there are no answers."""
    if not (folder / _RESPONSES).is_file():
        return
    path, remedy = folder / _RUN, f"give another folder (--out), or delete {folder}"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder} holds answers, but {_RUN} does not say whose ({error}); {remedy}") from error
    if not isinstance(before, dict) or "identity" not in before:
        raise ConfigError(
            f"{path} has no digest of its model, so that the answers may be of another than {contents['model']!r} "
            f"({contents['identity']}); {remedy}"
        )
    changed = {name: (before.get(name), value) for name, value in contents.items() if before.get(name) != value}
    if changed.keys() - {"model"}:
        shown = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(f"{folder} holds another run ({shown}); {remedy}")


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
