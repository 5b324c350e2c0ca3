"""SceneWalk: long videos cut into scenes, each with a dense caption, as clips and captions in turn (stage 1.5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from video_ma2mba.data.llava import conversation, without_placeholders
from video_ma2mba.data.records import (
    Form,
    Media,
    OnMalformed,
    Record,
    Sample,
    Turn,
    check_turns,
    field,
    made,
    read_records,
)
from video_ma2mba.errors import FormatError

Scene = tuple[float, float, str, str]
"""Start and end in seconds, what was asked, and the caption."""


def read_scenewalk_v1(
    path: str | PathLike[str],
    videos: str | PathLike[str],
    *,
    form: Form = "interleaved",
    suffix: str = ".mp4",
    on_malformed: OnMalformed | None = None,
) -> Iterator[Sample]:
    """Samples of the first release (IVLLab/SceneWalk): one row per clip, rows of a video anywhere in the file.

    Args:
        path: a file, or a folder of `train-*.parquet`.
        videos: holds `{YouTube's name of the video}{suffix}`; for other sources the last part of the url without suffix.
        form: see `Sample`.
        suffix: of the video files.
        on_malformed: told of malformed rows, which are left out of their videos; None raises.

    Raises:
        FormatError: a file cannot be read, or a row is malformed.
    """
    scenes: dict[str, list[Scene]] = {}
    files = sorted(Path(path).glob("train-*")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise FormatError(f"{path} holds no train-* files")
    for file in files:
        for number, row in enumerate(read_records(file)):
            found = made(partial(_scene, f"{file}: row {number}", row), row, on_malformed)
            if found is not None:
                scenes.setdefault(found[0], []).append(found[1])
    for name, clips in scenes.items():
        clips.sort(key=lambda scene: scene[:2])
        yield _sample(name, Path(videos) / f"{name}{suffix}", clips, form)


def read_scenewalk_v2(
    path: str | PathLike[str],
    root: str | PathLike[str],
    *,
    form: Form = "interleaved",
    on_malformed: OnMalformed | None = None,
) -> Iterator[Sample]:
    """Samples of the second release (interlive/scenewalk): one record per video.

    Args:
        path: `data/train.jsonl`.
        root: the folder that `video` is relative to.
        form: see `Sample`.
        on_malformed: told of malformed records, which are left out; None raises.

    Raises:
        FormatError: the file cannot be read, or a record is malformed or has not one question and one caption per scene.
    """
    for number, record in enumerate(read_records(path)):
        make = partial(_whole_video, f"{path}: record {number}", record, str(number), Path(root), form)
        sample = made(make, record, on_malformed)
        if sample is not None:
            yield sample


def _scene(where: str, row: Record) -> tuple[str, Scene]:
    """A row of the first release: its video's name, and the scene."""
    start, stop = _bounds(where, field(where, row, "time_stamp", dict))
    turns = conversation(where, row)
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise FormatError(f"{where}: a clip has one question and one caption, got {len(turns)} turns")
    return _video_name(where, row), (start, stop, turns[0][1], turns[1][1])


def _whole_video(where: str, record: Record, number: str, root: Path, form: Form) -> Sample:
    """A record of the second release."""
    bounds: list[tuple[float, float]] = []
    for index, scene in enumerate(field(where, record, "scenes", list)):
        here = f"{where}, scenes[{index}]"
        if not isinstance(scene, dict):
            raise FormatError(f"{here} must be an object, got {scene!r:.60}")
        bounds.append(_bounds(here, scene))
    turns = conversation(where, record)
    if len(turns) != 2 * len(bounds):
        raise FormatError(f"{where} has {len(bounds)} scenes but {len(turns)} turns; two are expected for each")
    texts = [text for _, text in turns]
    scenes = [(*each, texts[2 * i], texts[2 * i + 1]) for i, each in enumerate(bounds)]
    return _sample(str(record.get("id", number)), root / field(where, record, "video", str), scenes, form)


def _sample(name: str, video: Path, scenes: list[Scene], form: Form) -> Sample:
    turns: list[Turn] = []
    for start, stop, question, caption in scenes:
        asked = without_placeholders(question)
        turns.append(Turn("user", (Media(video, start, stop), *([asked] if asked else []))))
        turns.append(Turn("assistant", (without_placeholders(caption),)))
    return Sample(name, check_turns(name, tuple(turns)), form)


def _bounds(where: str, scene: Record) -> tuple[float, float]:
    """A scene's seconds: from frame numbers, as the authors read them, else from its written times."""
    bounds: list[float] = []
    for end in ("start", "end"):
        frame, rate, written = (scene.get(f"{end}_{what}") for what in ("frame", "fps", "time"))
        if isinstance(frame, int | float) and isinstance(rate, int | float) and rate > 0:
            bounds.append(frame / rate)
        elif written is not None:
            bounds.append(_seconds(where, written))
        else:
            raise FormatError(
                f"{where} lacks {end}_frame with {end}_fps, and {end}_time; it has {', '.join(sorted(scene))}"
            )
    if not 0 <= bounds[0] < bounds[1]:
        raise FormatError(f"{where}: a scene from second {bounds[0]:.3f} to {bounds[1]:.3f} holds nothing")
    return bounds[0], bounds[1]


def _seconds(where: str, written: object) -> float:
    if isinstance(written, int | float):
        return float(written)
    match = re.fullmatch(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", str(written))
    if match is None:
        raise FormatError(f"{where}: {written!r} is not a time; hours:minutes:seconds is expected")
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def _video_name(where: str, row: Record) -> str:
    url = urlparse(field(where, row, "url", str))
    name = parse_qs(url.query).get("v", [""])[0] or Path(url.path).stem
    if not name or "/" in name or name.startswith("."):
        raise FormatError(f"{where}: no video's name can be read from the url {row['url']!r}")
    return name
