"""Open answers, decided by a judge: ActivityNet-QA and VideoChatGPT's generative benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_ma2mba.data.records import Media, Record, field, read_records
from video_ma2mba.errors import FormatError
from video_ma2mba.evaluation.judges import Case, Judge
from video_ma2mba.evaluation.questions import Mark, Means, Question, find_video

GENERIC_ASPECTS = ("correctness", "detail", "context")
ASPECTS = (*GENERIC_ASPECTS, "temporal", "consistency")


@dataclass
class ActivityNetQA:
    """ActivityNet-QA's test split (arXiv 1906.02467), answers of a word or a phrase.

    Args:
        annotations: the folder with the authors' `test_q.json` and `test_a.json`, or rows with question and answer
            together (`.parquet`, `.json`, `.jsonl`).
        videos: holds `v_{video_name}.mp4`.
    """

    annotations: Path
    videos: Path
    name: str = "ActivityNet-QA"
    protocol: str = "lmms-eval prompt"

    def questions(self) -> list[Question]:
        """See `Benchmark`.

        Raises:
            FormatError: a record is malformed, or a question has no answer.
        """
        return [self._question(where, record) for where, record in self._rows()]

    def _rows(self) -> Iterator[tuple[str, Record]]:
        if not self.annotations.is_dir():
            for number, record in enumerate(read_records(self.annotations)):
                yield f"{self.annotations}: record {number}", record
            return
        asked, answered = self.annotations / "test_q.json", self.annotations / "test_a.json"
        answers = {str(field(str(answered), each, "question_id", str)): each for each in read_records(answered)}
        for number, record in enumerate(read_records(asked)):
            where = f"{asked}: record {number}"
            name = field(where, record, "question_id", str)
            if name not in answers:
                raise FormatError(f"{where}: {answered} has no answer to {name}")
            yield where, {**answers[name], **record}

    def _question(self, where: str, record: Record) -> Question:
        asked = field(where, record, "question", str)
        video = field(where, record, "video_name", str)
        return Question(
            id=str(field(where, record, "question_id", (str, int))),
            media=Media(find_video(self.videos, video if video.startswith("v_") else f"v_{video}")),
            prompt=f"{asked}? Answer the question using a single word or phrase.",
            answer=str(field(where, record, "answer", (str, int))),
            groups={"type": str(field(where, record, "type", (str, int)))},
            max_new_tokens=64,
            asked=asked,
        )

    def mark(self, questions: Sequence[Question], responses: Mapping[str, str], judge: Judge) -> list[Mark]:
        """See `Benchmark`."""
        marks: list[Mark] = []
        for question in questions:
            response = responses[question.id]
            verdict = judge.decide(Case(question.id, "match", question.asked, question.answer or "", response))
            values = {"accuracy": float(verdict.correct), "score": verdict.score}
            marks.append(Mark(question.id, str(question.media.path), question.groups, values, response))
        return marks

    def columns(self, means: Means) -> dict[str, float]:
        """See `Benchmark`."""
        if not means:
            return {}
        return {
            "ActNet-QA Acc.": 100 * means["accuracy"]["overall"].value,
            "ActNet-QA Score": means["score"]["overall"].value,
        }


@dataclass
class VideoChatGPT:
    """VideoChatGPT's benchmark (arXiv 2306.05424): five aspects, each judged from 0 to 5.

    Args:
        annotations: the folder with `generic_qa.json`, `temporal_qa.json` and `consistency_qa.json`, or the published
            rows as `Generic`, `Temporal` and `Consistency` (`.parquet`, `.json`, `.jsonl`, or folders of `test-*`).
        videos: holds `{video_name}.mp4`.
    """

    annotations: Path
    videos: Path
    name: str = "VideoChatGPT"
    protocol: str = "bare questions"

    def questions(self) -> list[Question]:
        """See `Benchmark`.

        Raises:
            FormatError: a file is missing, or a record is malformed.
        """
        found: list[Question] = []
        for part in ("generic", "temporal", "consistency"):
            for number, (where, record) in enumerate(self._rows(part)):
                found.extend(self._questions(part, number, where, record))
        return found

    def _rows(self, part: str) -> Iterator[tuple[str, Record]]:
        stems = (f"{part}_qa", part, part.capitalize())
        files = [self.annotations / f"{stem}{suffix}" for stem in stems for suffix in (".json", ".jsonl", ".parquet")]
        files += sorted((self.annotations / part.capitalize()).glob("test-*"))
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise FormatError(f"{self.annotations} holds neither {part}_qa.json nor {part.capitalize()}/test-*")
        rows = [(f"{path}: record {number}", record) for number, record in enumerate(read_records(path))]
        yield from (_paired(rows) if part == "consistency" else rows)

    def _questions(self, part: str, number: int, where: str, record: Record) -> Iterator[Question]:
        asked = _asked(part, where, record)
        video = field(where, record, "video_name", str)
        answer = _either(where, record, "A", "answer")
        for index, text in enumerate(asked):
            yield Question(
                id=f"{part}/{number}" + (f"/{index + 1}" if len(asked) > 1 else ""),
                media=Media(find_video(self.videos, video)),
                prompt=text,
                answer=answer,
                groups={"part": part},
                max_new_tokens=1024,
                asked=text,
            )

    def mark(self, questions: Sequence[Question], responses: Mapping[str, str], judge: Judge) -> list[Mark]:
        """See `Benchmark`; the two ways of asking are one mark, which needs both answers."""
        by_id = {question.id: question for question in questions}
        marks: list[Mark] = []
        for question in questions:
            part = question.groups["part"]
            if part == "consistency":
                other = by_id.get(f"{question.id[:-1]}2")
                if question.id.endswith("/2") or other is None:
                    continue
                case = Case(question.id, part, question.asked, question.answer or "", responses[question.id])
                cases = [_with_second(case, other.asked, responses[other.id])]
            else:
                aspects = GENERIC_ASPECTS if part == "generic" else ("temporal",)
                response = responses[question.id]
                cases = [Case(question.id, each, question.asked, question.answer or "", response) for each in aspects]
            values = {case.aspect: judge.decide(case).score for case in cases}
            marks.append(Mark(question.id, str(question.media.path), question.groups, values, responses[question.id]))
        return marks

    def columns(self, means: Means) -> dict[str, float]:
        """See `Benchmark`: the mean of the five aspects, each over its own questions."""
        if set(ASPECTS) - set(means):
            return {}
        return {"VCG": sum(means[aspect]["overall"].value for aspect in ASPECTS) / len(ASPECTS)}


def _with_second(case: Case, asked: str, response: str) -> Case:
    return Case(case.key, case.aspect, case.question, case.reference, case.prediction, asked, response)


def _asked(part: str, where: str, record: Record) -> list[str]:
    if part != "consistency":
        return [_either(where, record, "Q", "question")]
    return [_either(where, record, "Q1", "question_1"), _either(where, record, "Q2", "question_2")]


def _either(where: str, record: Record, official: str, published: str) -> str:
    return str(field(where, record, official if official in record else published, str))


def _paired(rows: Sequence[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Rows with both ways of asking: the published ones have one each and "None" for the other, two rows per pair."""
    waiting: dict[str, tuple[str, Record]] = {}
    for where, record in rows:
        missing = [name for name in ("question_1", "question_2") if record.get(name, "") in (None, "None")]
        if not missing:
            yield where, record
            continue
        video = str(record.get("video_name"))
        if video not in waiting:
            waiting[video] = where, record
            continue
        first: Any = waiting.pop(video)[1]
        both = {name: text for each in (first, record) for name, text in each.items() if text not in (None, "None")}
        yield where, both
    if waiting:
        where, _ = next(iter(waiting.values()))
        raise FormatError(f"{where} has one way of asking, and no other row of the video has the second")
