"""The small run's files: videos, and annotations in the formats of the real training sets and of Video-MME."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from video_ma2mba.evaluation.questions import letter_of
from video_ma2mba.small.questions import KINDS, Asked, ask, caption, listing, scenes
from video_ma2mba.small.render import RATE, Look, write_story
from video_ma2mba.small.texts import DESCRIBE, LIST, prompt_of
from video_ma2mba.small.world import Story, make_story

CLIP_SECONDS = 4
LIST_SECONDS = (10, 20)
_DURATIONS = ("short", "medium", "long")
Record = dict[str, Any]
Progress = Callable[[int, str], None]
"""Told how many more videos were written, and news."""


class Trained(StrEnum):
    """Video-MME's "domain" of a row here: whether videos of its length are trained on."""

    YES = "trained length"
    NO = "longer than trained"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is.

    Attributes:
        clips: videos of stage 1, half of them with one event to describe, half with several to name in order.
        stories: videos of each trained length.
        asked: questions of each kind about each of them.
        held_out: videos for evaluation of each length.
        lengths: in seconds, that are trained on.
        longer: in seconds, that are only evaluated.
    """

    clips: int = 400
    stories: int = 60
    asked: int = 2
    held_out: int = 24
    lengths: tuple[int, ...] = (16, 32, 64)
    longer: tuple[int, ...] = (128,)

    @property
    def videos(self) -> int:
        """Files that `write_data` encodes."""
        return self.clips + self.stories * len(self.lengths) + len(Look) * self.held_out * len(self.all_lengths)

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """Of the evaluation."""
        return (*self.lengths, *self.longer)


@dataclass(frozen=True, slots=True)
class Data:
    """Where the files are.

    Attributes:
        folder: of all.
        stories: by name, those of the evaluation.
    """

    folder: Path
    stories: dict[str, Story]

    @property
    def clips(self) -> Path:
        """Stage 1: LLaVA's JSON, short videos with captions."""
        return self.folder / "clips.json"

    @property
    def scenes(self) -> Path:
        """Stage 1.5: SceneWalk v2."""
        return self.folder / "scenes.jsonl"

    @property
    def instructions(self) -> Path:
        """Stage 2: LLaVA's JSON, a question each."""
        return self.folder / "instructions.json"

    @property
    def benchmark(self) -> Path:
        """Held-out questions as Video-MME's rows."""
        return self.folder / "videomme.json"

    @property
    def videos(self) -> Path:
        """What training files refer to."""
        return self.folder / "videos"

    def held_out(self, look: Look) -> Path:
        """The benchmark's videos: as they are, or one of the baselines'."""
        return self.folder / f"held-out-{look}"


def write_data(folder: Path, sizes: Sizes, seed: int, progress: Progress) -> Data:
    """Render and encode all videos, and write the annotations.

    Orders of things in the evaluation's videos are none of those in training.

    Args:
        folder: where to; made if missing.
        sizes: how much.
        seed: of everything.
        progress: see `Progress`.
    """
    draw = random.Random(f"small run {seed}")
    data = Data(folder, {})
    for path in (data.videos, *(data.held_out(look) for look in Look)):
        path.mkdir(parents=True, exist_ok=True)
    names = _Names(data.videos, draw, progress)
    clips = [make_story(draw, CLIP_SECONDS, events=1) for _ in range(sizes.clips - sizes.clips // 2)]
    clips += [make_story(draw, draw.randint(*LIST_SECONDS)) for _ in range(sizes.clips // 2)]
    _write_json(data.clips, [_clip_record(*names.write("clip", story)) for story in clips])
    told = [
        names.write(f"{seconds}s", make_story(draw, seconds)) for seconds in sizes.lengths for _ in range(sizes.stories)
    ]
    data.scenes.write_text("".join(json.dumps(_scenes_record(*each)) + "\n" for each in told), encoding="utf-8")
    _write_json(data.instructions, [each for name, story in told for each in _instructions(draw, sizes, name, story)])
    _write_json(data.benchmark, list(_benchmark(draw, data, sizes, progress)))
    return data


@dataclass
class _Names:
    """Writes videos under numbered names."""

    folder: Path
    draw: random.Random
    progress: Progress
    count: int = 0

    def write(self, kind: str, story: Story) -> tuple[str, Story]:
        name = f"{kind}-{self.count:05}"
        self.count += 1
        write_story(self.folder / f"{name}.mp4", story, self.draw.randrange(1 << 30))
        self.progress(1, name)
        return name, story


def _clip_record(name: str, story: Story) -> Record:
    if len(story.events) == 1:
        return _llava_record(name, name, DESCRIBE, caption(story.events[0]))
    return _llava_record(name, name, LIST, listing(story))


def _llava_record(identity: str, name: str, question: str, answer: str) -> Record:
    turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, "video": f"{name}.mp4", "conversations": turns}


def _scenes_record(name: str, story: Story) -> Record:
    bounds = [_bounds(start, stop) for start, stop, _ in scenes(story)]
    turns = [
        {"from": speaker, "value": value}
        for _, _, text in scenes(story)
        for speaker, value in (("human", f"<video>\n{DESCRIBE}"), ("gpt", text))
    ]
    return {
        "id": name,
        "video": f"{name}.mp4",
        "total_time": story.seconds,
        "clip_num": len(bounds),
        "scenes": bounds,
        "conversations": turns,
    }


def _bounds(start: int, stop: int) -> Record:
    return {"start_frame": start * RATE, "start_fps": RATE, "end_frame": stop * RATE, "end_fps": RATE}


def _instructions(draw: random.Random, sizes: Sizes, name: str, story: Story) -> Iterator[Record]:
    for kind in KINDS:
        for number in range(sizes.asked):
            asked = ask(draw, story, kind)
            if asked is not None:
                yield _llava_record(f"{name}-{kind}-{number}", name, prompt_of(asked), asked.answer)


def _benchmark(draw: random.Random, data: Data, sizes: Sizes, progress: Progress) -> Iterator[Record]:
    for place, seconds in enumerate(sizes.all_lengths):
        duration = _DURATIONS[min(place, len(_DURATIONS) - 1)]
        for number in range(sizes.held_out):
            story = make_story(draw, seconds, held_out=True)
            name = f"{seconds}s-{number:03}"
            data.stories[name] = story
            seed = draw.randrange(1 << 30)
            for look in Look:
                write_story(data.held_out(look) / f"{name}.mp4", story, seed, look)
                progress(1, name)
            for kind in KINDS:
                asked = ask(draw, story, kind)
                if asked is not None:
                    yield _row(f"{name}-{kind}", name, seconds, duration, asked, seconds in sizes.lengths)


def _row(identity: str, name: str, seconds: int, duration: str, asked: Asked, trained: bool) -> Record:
    return {
        "video_id": name,
        "videoID": name,
        "duration": duration if trained else "longer",
        "domain": Trained.YES if trained else Trained.NO,
        "sub_category": cell(seconds, asked.kind),
        "task_type": asked.kind,
        "question_id": identity,
        "question": asked.question,
        "options": asked.lettered,
        "answer": letter_of(asked.right),
    }


def cell(seconds: int, kind: str) -> str:
    """Video-MME's "sub_category" of a row here: the kind at a length."""
    return f"{kind} at {seconds} s"


def _write_json(path: Path, records: Sequence[Record]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
