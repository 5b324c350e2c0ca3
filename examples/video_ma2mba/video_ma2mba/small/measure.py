"""Held-out questions put to a model by the benchmark code of the full one, and accuracies of the answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.evaluation.choices import VideoMME
from video_ma2mba.evaluation.identity import ModelIdentity
from video_ma2mba.evaluation.jsonl import read_lines
from video_ma2mba.evaluation.judges import ExactJudge
from video_ma2mba.evaluation.questions import Mean, clustered_mean
from video_ma2mba.evaluation.run import evaluate
from video_ma2mba.model.answer import VideoAnswerer
from video_ma2mba.model.folder import load_pretrained
from video_ma2mba.small.dataset import Data
from video_ma2mba.small.render import Look

Progress = Callable[[int, str], None]
"""Told how many more questions were answered, and news."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said.

    Attributes:
        question: its name.
        video: the video's; unique over seeds.
        seconds: the video's length.
        kind: of the question.
        asked: in words.
        options: with their letters.
        right: the right letter.
        response: in the model's words.
        letter: read out of them.
    """

    question: str
    video: str
    seconds: int
    kind: str
    asked: str
    options: tuple[str, ...]
    right: str
    response: str
    letter: str

    @property
    def correct(self) -> bool:
        """Whether it is right."""
        return self.letter == self.right


def measure(
    model: Path,
    data: Data,
    out: Path,
    *,
    look: Look = Look.PLAIN,
    max_frames: int | None = None,
    device: str = "cpu",
    progress: Progress,
) -> list[Answer]:
    """Ask a model all held-out questions.

    Args:
        model: its folder.
        data: the files.
        out: folder for responses and results.
        look: of the videos.
        max_frames: most frames of a video.
        device: where the model runs.
        progress: see `Progress`.
    """
    answerer = VideoAnswerer(
        load_pretrained(model, device=device, frame_chunk=1024),
        BpeTokenizer.from_folder(model),
        max_frames=max_frames,
        stream=False,
    )
    benchmark = VideoMME(data.benchmark, data.held_out(look))
    with _threads(1):  # at a token a time they would wait for each other longer than they work
        evaluate(
            benchmark,
            answerer,
            ExactJudge(),
            out,
            identity=ModelIdentity.of_folder(model, dtype="as stored", max_frames=max_frames),
            progress=lambda done, total: progress(1, ""),
        )
    questions = benchmark.questions()
    responses = {str(line["id"]): str(line["response"]) for line in read_lines(out / "responses.jsonl")}
    marks = {mark.id: mark for mark in benchmark.mark(questions, responses, ExactJudge())}
    return [
        Answer(
            question.id,
            str(question.media.path),
            data.stories[question.media.path.stem].seconds,
            question.groups["task"],
            question.asked,
            question.options,
            str(question.answer),
            responses[question.id],
            marks[question.id].parsed,
        )
        for question in questions
    ]


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(
    answers: Iterable[Answer], *, seconds: Iterable[int] | None = None, kinds: Iterable[str] | None = None
) -> Mean:
    """Accuracy on some lengths and kinds, None for all, with its standard error clustered by video."""
    lengths, wanted = (None if each is None else set(each) for each in (seconds, kinds))
    return clustered_mean(
        [
            (answer.video, float(answer.correct))
            for answer in answers
            if (lengths is None or answer.seconds in lengths) and (wanted is None or answer.kind in wanted)
        ]
    )
