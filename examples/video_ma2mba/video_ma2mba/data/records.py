"""What annotation files say, in one form: turns of a conversation with the media that come up in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from magc.errors import MissingExtraError
from video_ma2mba.errors import FormatError

Role = Literal["user", "assistant"]
Form = Literal["chat", "interleaved"]
Record = Mapping[str, Any]
OnMalformed = Callable[[Record, FormatError], None]
"""Told of a record that cannot be used and what is wrong with it; the reader leaves it out."""
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Media:
    """An image, a video or a clip of one.

    Attributes:
        path: an image or video file, or a folder of numbered frames.
        start, stop: the clip in seconds; None is the start or the end of the video.
    """

    path: Path
    start: float | None = None
    stop: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: media and text in order."""

    role: Role
    parts: tuple[Media | str, ...]

    @property
    def text(self) -> str:
        """The text without the media."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> tuple[Media, ...]:
        """The media without the text."""
        return tuple(part for part in self.parts if isinstance(part, Media))


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence.

    Attributes:
        id: names it in reports.
        turns: alternating, the user's first.
        form: "chat" is the conversation in the chat schema; "interleaved" is clip, caption, clip, caption and so on
            without the schema's roles (stage 1.5).
    """

    id: str
    turns: tuple[Turn, ...]
    form: Form = "chat"

    @property
    def media(self) -> tuple[Media, ...]:
        """All media, in order of appearance."""
        return tuple(media for turn in self.turns for media in turn.media)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked about a video.

    Attributes:
        text: the question with its instructions.
        prefill: the first words of the answer.
        max_new_tokens: length of the answer at most.
    """

    text: str
    prefill: str = ""
    max_new_tokens: int = 16


def check_turns(where: str, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns, if they alternate, begin with the user, and only the user shows media.

    Raises:
        FormatError: otherwise, naming `where`.
    """
    roles = [turn.role for turn in turns]
    if not roles or roles != [("user", "assistant")[index % 2] for index in range(len(roles))]:
        raise FormatError(f"{where}: turns must alternate and begin with the user's, got {roles}")
    if any(turn.media for turn in turns if turn.role == "assistant"):
        raise FormatError(f"{where}: an answer shows an image or a video, which the model cannot")
    return turns


def read_records(path: str | PathLike[str]) -> Iterator[Record]:
    """The records of a `.json` list, a `.jsonl` file or a `.parquet` file.

    Raises:
        FormatError: the file is missing, of another kind, or holds something else than objects.
        MissingExtraError: pyarrow, which reads `.parquet`, is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist; give an annotation file (.json, .jsonl or .parquet)")
    match path.suffix:
        case ".jsonl":
            found = _json_lines(path)
        case ".json":
            found = iter(_json_list(path))
        case ".parquet":
            found = _parquet_rows(path)
        case suffix:
            raise FormatError(
                f"{path}: {suffix or 'no suffix'} is not a format of annotations (.json, .jsonl, .parquet)"
            )
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise FormatError(f"{path}: record {number} must be an object, got a {type(record).__name__}")
        yield cast(Record, record)


def made(make: Callable[[], Made], record: Record, on_malformed: OnMalformed | None) -> Made | None:
    """What is made of a record, or None if it is malformed and someone was told.

    Raises:
        FormatError: it is malformed and there is no one to tell.
    """
    try:
        return make()
    except FormatError as error:
        if on_malformed is None:
            raise
        on_malformed(record, error)
        return None


def field(where: str, record: Record, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field that must be there.

    Raises:
        FormatError: it is missing or of another type.
    """
    if name not in record:
        raise FormatError(f"{where} lacks {name!r}; it has {', '.join(sorted(record))}")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise FormatError(f"{where}: {name!r} must be {kinds}, got {type(value).__name__} ({value!r:.60})")
    return value


def _json_list(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, list):
        raise FormatError(f"{path} must hold a list of records, got a {type(data).__name__}")
    return data


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise FormatError(f"{path}: line {number} is not valid JSON ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
        from pyarrow.lib import ArrowException  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("pyarrow", "video", f"reading {path}") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise FormatError(f"{path} is not a valid parquet file ({error})") from error
