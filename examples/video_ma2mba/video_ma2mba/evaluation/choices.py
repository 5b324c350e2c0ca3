"""Multiple choice: Video-MME, LongVideoBench and MVBench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from video_ma2mba.data.records import Media, Record, field, read_records
from video_ma2mba.errors import FormatError
from video_ma2mba.evaluation.extract import first_letter, first_letter_or_guess, standalone_letter
from video_ma2mba.evaluation.judges import Judge
from video_ma2mba.evaluation.questions import Mark, Means, Question, Tally, find_video, letter_of, lettered

Prompts = Literal["official", "lmms-eval"]
_DIRECTLY = "Answer with the option's letter from the given choices directly."


@dataclass
class VideoMME:
    """Video-MME without subtitles (arXiv 2405.21075): three lengths, four options.

    Args:
        annotations: the published rows (`.parquet`, or the same as `.json`/`.jsonl`), or the official evaluation's JSON
            with one record per video and a list of its questions.
        videos: holds `{videoID}.mp4`.
        prompts: "official" asks as the benchmark's own page does; "lmms-eval" as that harness does, which speaks of
            subtitles even without them.
    """

    annotations: Path
    videos: Path
    prompts: Prompts = "official"
    name: str = "Video-MME"

    @property
    def protocol(self) -> str:
        """See `Benchmark`."""
        return f"no subtitles, {self.prompts} prompt"

    def questions(self) -> list[Question]:
        """See `Benchmark`.

        Raises:
            FormatError: a record is malformed.
        """
        return [self._question(where, record) for where, record in self._rows()]

    def _rows(self) -> Iterator[tuple[str, Record]]:
        for number, record in enumerate(read_records(self.annotations)):
            where = f"{self.annotations}: record {number}"
            if "questions" in record:
                for each in field(where, record, "questions", list):
                    yield where, {**{"videoID": record.get("video_id")}, **record, **each}
            else:
                yield where, record

    def _question(self, where: str, record: Record) -> Question:
        options = field(where, record, "options", list)
        answer = str(field(where, record, "answer", str)).strip().upper()
        if answer not in [letter_of(index) for index in range(len(options))]:
            raise FormatError(f"{where}: the answer {answer!r} is none of {len(options)} options")
        names = {"duration": "duration", "domain": "domain", "sub_category": "sub_category", "task": "task_type"}
        asked = field(where, record, "question", str)
        return Question(
            id=str(field(where, record, "question_id", (str, int))),
            media=Media(find_video(self.videos, str(field(where, record, "videoID", (str, int))))),
            prompt=self.prompt(asked, options),
            answer=answer,
            groups={ours: str(field(where, record, theirs, str)) for ours, theirs in names.items()},
            options=tuple(str(option) for option in options),
            asked=asked,
        )

    def prompt(self, asked: str, options: Sequence[str]) -> str:
        """The question as the benchmark puts it to a model."""
        sources = "video" if self.prompts == "official" else "video and the subtitles"
        lines = [
            f"Select the best answer to the following multiple-choice question based on the {sources}. Respond with only the "
            "letter (A, B, C, or D) of the correct option.",
            asked,
            *options,  # they come with their letters
            "The best answer is:" if self.prompts == "official" else _DIRECTLY,
        ]
        return "\n".join(lines)

    def mark(self, questions: Sequence[Question], responses: Mapping[str, str], judge: Judge) -> list[Mark]:
        """See `Benchmark`; no judge is asked."""
        tally = Tally()
        for question in questions:
            parsed = first_letter(responses[question.id], "ABCD")
            tally.add(question, parsed, answered=bool(parsed))
        return tally.marks

    def columns(self, means: Means) -> dict[str, float]:
        """See `Benchmark`."""
        names = {"Short": "duration=short", "Medium": "duration=medium", "Long": "duration=long", "Avg.": "overall"}
        return _percent(means, names)


@dataclass
class LongVideoBench:
    """LongVideoBench (arXiv 2407.15754): videos of 8 seconds to an hour, up to five options.

    Args:
        annotations: `lvb_val.json`, `lvb_test_wo_gt.json` (without answers: letters are read, and nothing is scored), or the
            published rows as `.parquet`.
        videos: the folder that `video_path` is relative to.
    """

    annotations: Path
    videos: Path
    name: str = "LongVideoBench"
    protocol: str = "no subtitles, lmms-eval prompt, seeded guesses"

    def questions(self) -> list[Question]:
        """See `Benchmark`.

        Raises:
            FormatError: a record is malformed.
        """
        return [
            self._question(f"{self.annotations}: record {number}", record)
            for number, record in enumerate(read_records(self.annotations))
        ]

    def _question(self, where: str, record: Record) -> Question:
        options = self._options(where, record)
        key = record.get("correct_choice")
        if key is not None and (not isinstance(key, int) or key >= len(options)):
            raise FormatError(f"{where}: correct_choice {key!r} is none of {len(options)} options")
        asked = field(where, record, "question", str)
        return Question(
            id=str(field(where, record, "id", (str, int))),
            media=Media(self.videos / field(where, record, "video_path", str)),
            prompt=f"{asked}\n{lettered(options, '{letter}. {option}')}\n{_DIRECTLY}\n",
            answer=None if key is None or key < 0 else letter_of(key),
            groups={
                "duration": str(field(where, record, "duration_group", (str, int))),
                "category": str(field(where, record, "question_category", str)),
            },
            options=tuple(options),
            max_new_tokens=32,
            asked=asked,
        )

    def _options(self, where: str, record: Record) -> list[str]:
        given = record.get("candidates")
        if given is None:
            given = [record.get(f"option{index}", "N/A") for index in range(5)]
        options = [str(option) for option in given if option not in (None, "N/A")]
        if not options:
            raise FormatError(f"{where} has neither candidates nor option0 to option4")
        return options

    def mark(self, questions: Sequence[Question], responses: Mapping[str, str], judge: Judge) -> list[Mark]:
        """See `Benchmark`; no judge is asked."""
        tally = Tally()
        for question in questions:
            response = responses[question.id]
            parsed = first_letter_or_guess(response, "ABCDE", len(question.options), question.id)
            tally.add(question, parsed, answered=bool(first_letter(response, "ABCDE")))
        return tally.marks

    def columns(self, means: Means) -> dict[str, float]:
        """See `Benchmark`."""
        names = {"8-15s": "15", "15-60s": "60", "180-600s": "600", "900-3600s": "3600"}
        found = {column: f"duration={group}" for column, group in names.items()}
        return _percent(means, {**found, "valset": "overall"})


# Where each task's videos are: in lmms-eval's copy, then in the authors' own, and whether only a part of the video counts
# there (lmms-eval's copy is cut already).
MVBENCH_TASKS: dict[str, tuple[str, str, bool]] = {
    "action_sequence": ("star/Charades_segment", "star/Charades_v1_480", True),
    "action_prediction": ("star/Charades_segment", "star/Charades_v1_480", True),
    "action_antonym": ("ssv2_video_mp4", "ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", "Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", "FunQA_test/test", False),
    "object_existence": ("clevrer/video_validation", "clevrer/video_validation", False),
    "object_interaction": ("star/Charades_segment", "star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", "perception/videos", False),
    "moving_direction": ("clevrer/video_validation", "clevrer/video_validation", False),
    "action_localization": ("sta/sta_video_segment", "sta/sta_video", True),
    "scene_transition": ("scene_qa/video", "scene_qa/video", False),
    "action_count": ("perception/videos", "perception/videos", False),
    "moving_count": ("clevrer/video_validation", "clevrer/video_validation", False),
    "moving_attribute": ("clevrer/video_validation", "clevrer/video_validation", False),
    "state_change": ("perception/videos", "perception/videos", False),
    "fine_grained_pose": ("nturgbd_convert", "nturgbd", False),
    "character_order": ("perception/videos", "perception/videos", False),
    "egocentric_navigation": ("vlnqa", "vlnqa", False),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq", True),
    "counterfactual_inference": ("clevrer/video_validation", "clevrer/video_validation", False),
}


@dataclass
class MVBench:
    """MVBench (arXiv 2311.17005): 20 tasks of 200 questions.

    Args:
        annotations: the folder with `{task}.json`; tasks without a file are left out.
        videos: holds the folders of `MVBENCH_TASKS`.
        prompts: "lmms-eval" asks for the best option; "official" does, and gives "Best option:(" to begin with.
    """

    annotations: Path
    videos: Path
    prompts: Prompts = "lmms-eval"
    name: str = "MVBench"

    @property
    def protocol(self) -> str:
        """See `Benchmark`."""
        return f"{self.prompts} prompt"

    def questions(self) -> list[Question]:
        """See `Benchmark`.

        Raises:
            FormatError: there is no task's file, or a record is malformed.
        """
        files = {task: self.annotations / f"{task}.json" for task in MVBENCH_TASKS}
        found = {task: path for task, path in files.items() if path.is_file()}
        if not found:
            raise FormatError(
                f"{self.annotations} holds none of MVBench's {len(files)} files, e.g. action_sequence.json"
            )
        return [
            self._question(task, number, f"{path}: record {number}", record)
            for task, path in found.items()
            for number, record in enumerate(read_records(path))
        ]

    def _question(self, task: str, number: int, where: str, record: Record) -> Question:
        options = [str(option) for option in field(where, record, "candidates", list)]
        answer = str(field(where, record, "answer", (str, int, float)))
        if answer not in options:
            raise FormatError(f"{where}: the answer {answer!r} is none of the candidates {options}")
        asked = field(where, record, "question", str)
        official = self.prompts == "official"
        return Question(
            id=f"{task}/{number}",
            media=self._media(task, field(where, record, "video", str), record),
            prompt=f"Question:{asked}\nOption:\n{lettered(options, '({letter}) {option}')}\nOnly give the best option.\n",
            answer=letter_of(options.index(answer)),
            groups={"task": task},
            options=tuple(options),
            prefill="Best option:(" if official else "",
            asked=asked,
        )

    def _media(self, task: str, video: str, record: Record) -> Media:
        cut, whole, bounded = MVBENCH_TASKS[task]
        path = self.videos / cut / video
        if path.exists() or not bounded:
            return Media(path if path.exists() else self.videos / whole / video)
        start, stop = record.get("start"), record.get("end")
        return Media(self.videos / whole / video, None if start is None else float(start), stop and float(stop))

    def mark(self, questions: Sequence[Question], responses: Mapping[str, str], judge: Judge) -> list[Mark]:
        """See `Benchmark`; no judge is asked. lmms-eval's figure is `accuracy_answered`, without empty answers."""
        tally = Tally()
        for question in questions:
            response = responses[question.id]
            tally.add(question, standalone_letter(response), answered=response != "")
        return tally.marks

    def columns(self, means: Means) -> dict[str, float]:
        """See `Benchmark`."""
        return _percent(means, {"MVBench": "overall"})


def _percent(means: Means, names: Mapping[str, str]) -> dict[str, float]:
    found = means.get("accuracy", {})
    return {column: 100 * found[group].value for column, group in names.items() if group in found}
