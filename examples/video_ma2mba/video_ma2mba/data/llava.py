"""Annotations in LLaVA's JSON, for images and videos, LLaVA-Video-178K among them; turns grouped per video.

A record is `{"id", "image" | "video", "conversations": [{"from": "human" | "gpt", "value"}]}`; where a medium comes in, the
value says `<image>` or `<video>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

from video_ma2mba.data.records import (
    Media,
    OnMalformed,
    Record,
    Role,
    Sample,
    Turn,
    check_turns,
    field,
    made,
    read_records,
)
from video_ma2mba.errors import FormatError

_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_llava(
    path: str | PathLike[str], media_root: str | PathLike[str], *, on_malformed: OnMalformed | None = None
) -> Iterator[Sample]:
    """Samples of a LLaVA file.

    Args:
        path: a `.json` list or `.jsonl`.
        media_root: the folder that the records' `image` and `video` are relative to.
        on_malformed: told of malformed records, which are left out; None raises.

    Raises:
        FormatError: the file cannot be read, or a record is malformed; media are not looked for.
    """
    for number, record in enumerate(read_records(path)):
        make = partial(llava_sample, f"{path}: record {number}", record, Path(media_root))
        sample = made(make, record, on_malformed)
        if sample is not None:
            yield sample


def read_llava_video_178k(
    root: str | PathLike[str],
    media_root: str | PathLike[str] | None = None,
    *,
    kinds: Iterable[str] = ("cap", "oe", "mc"),
    on_malformed: OnMalformed | None = None,
) -> Iterator[Sample]:
    """Samples of a local copy of LLaVA-Video-178K, with the NeXT-QA, ActivityNetQA and PerceptionTest that come with it.

    Args:
        root: holds one folder per source, each with files named `*_{kind}*_processed.json`.
        media_root: where the archives were unpacked; None is each source's own folder.
        kinds: captions ("cap"), open-ended questions ("oe"), multiple choice ("mc").
        on_malformed: as in `read_llava`.

    Raises:
        FormatError: there is no such file, or a record is malformed.
    """
    wanted = set(kinds)
    files = [
        path
        for path in sorted(Path(root).glob("*/*_processed.json"))
        if wanted & set(re.split(r"[_\W]+", path.stem.lower()))
    ]
    if not files:
        raise FormatError(
            f"{root} holds no */*_processed.json of the kinds {sorted(wanted)}; unpack LLaVA-Video-178K there"
        )
    for path in files:
        yield from read_llava(path, path.parent if media_root is None else media_root, on_malformed=on_malformed)


def llava_sample(where: str, record: Record, media_root: Path) -> Sample:
    """One record as a sample; media without a placeholder come first.

    Raises:
        FormatError: a field is missing or malformed, or placeholders and media differ in number.
    """
    media = [Media(media_root / name) for name in _media_names(where, record)]
    values = conversation(where, record)
    slots = sum(len(_PLACEHOLDER.findall(value)) for _, value in values)
    if slots == 0 and media:
        values[0] = values[0][0], "<image>\n" * len(media) + values[0][1]
    elif slots != len(media):
        raise FormatError(f"{where} has {len(media)} media but {slots} placeholders (<image>, <video>)")
    waiting = iter(media)
    turns = tuple(Turn(role, _parts(value, waiting)) for role, value in values)
    return Sample(str(record.get("id", where)), check_turns(where, turns))


def conversation(where: str, record: Record) -> list[tuple[Role, str]]:
    """A record's `conversations` as (role, value).

    Raises:
        FormatError: it is missing, empty, or has unknown speakers.
    """
    found: list[tuple[Role, str]] = []
    for index, entry in enumerate(field(where, record, "conversations", list)):
        here = f"{where}, conversations[{index}]"
        if not isinstance(entry, dict):
            raise FormatError(f"{here} must be an object, got {entry!r:.60}")
        speaker = field(here, entry, "from", str)
        if speaker not in _ROLES:
            raise FormatError(f"{here}: 'from' must be one of {', '.join(_ROLES)}, got {speaker!r}")
        found.append((_ROLES[speaker], field(here, entry, "value", str)))
    if not found:
        raise FormatError(f"{where} has an empty conversation")
    return found


def without_placeholders(value: str) -> str:
    """The text of a turn alone."""
    return _PLACEHOLDER.sub("", value)


def group_by_media(samples: Iterable[Sample], *, max_turns: int | None = None) -> list[Sample]:
    """Conversations about the same medium as one, so that it is decoded and read once (paper, appendix B).

    Only samples whose media all come in their first turn are joined, in their order; the others stay as they are.

    Args:
        samples: any.
        max_turns: most turns, questions and answers together, of one group; further ones start another.
    """
    groups: dict[tuple[Media, ...], int] = {}
    grouped: list[Sample] = []
    for sample in samples:
        first, key = sample.turns[0], sample.media
        if sample.form != "chat" or not key or first.media != key:
            grouped.append(sample)
            continue
        place = groups.get(key)
        if place is None or (max_turns is not None and len(grouped[place].turns) + len(sample.turns) > max_turns):
            groups[key] = len(grouped)
            grouped.append(sample)
            continue
        later = (replace(first, parts=(first.text,)), *sample.turns[1:])
        grouped[place] = replace(grouped[place], turns=grouped[place].turns + later)
    return grouped


def _media_names(where: str, record: Record) -> list[str]:
    names: list[str] = []
    for key in ("image", "video"):
        value = record.get(key)
        if value is None:
            continue
        given = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name for name in given):
            raise FormatError(f"{where}: {key!r} must be a file name or a list of them, got {value!r:.60}")
        names.extend(given)
    return names


def _parts(value: str, media: Iterator[Media]) -> tuple[Media | str, ...]:
    texts = _PLACEHOLDER.split(value)
    parts: list[Media | str] = []
    for index, text in enumerate(texts):
        if index:
            parts.append(next(media))
        if text:
            parts.append(text)
    return tuple(parts)
