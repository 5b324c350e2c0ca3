"""Samples of a run from its sources, and decoded media that stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

import torch

from video_ma2mba.data.frames import Frames
from video_ma2mba.data.llava import group_by_media, read_llava, read_llava_video_178k
from video_ma2mba.data.loader import Problem
from video_ma2mba.data.media import MediaOptions, open_media
from video_ma2mba.data.records import Media, OnMalformed, Record, Sample
from video_ma2mba.data.scenewalk import read_scenewalk_v1, read_scenewalk_v2
from video_ma2mba.errors import ConfigError, FormatError, ProblemKind
from video_ma2mba.training.config import DataConfig, SourceConfig


def read_samples(data: DataConfig, seed: int) -> tuple[list[Sample], tuple[Problem, ...]]:
    """All samples of the sources, and the malformed records that were left out; media are not looked for.

    Args:
        data: says where, and whether malformed records are left out or stop.
        seed: of random choices.

    Raises:
        ConfigError: there is no source. FormatError: annotations are missing, a file cannot be read, no record can be used,
            or one is malformed and `data.on_problem` is "stop".
    """
    if not data.sources:
        raise ConfigError("there is nothing to learn: give data.sources")
    found: list[Sample] = []
    malformed: list[Problem] = []
    for number, source in enumerate(data.sources):
        found += _chosen(source, seed + number, malformed if data.on_problem == "skip" else None)
    if malformed and not found:
        raise FormatError(f"all {len(malformed)} records are malformed; the first: {malformed[0].detail}")
    return group_by_media(found, max_turns=data.max_turns) if data.group_by_media else found, tuple(malformed)


def _chosen(source: SourceConfig, seed: int, malformed: list[Problem] | None) -> Sequence[Sample]:
    def left_out(record: Record, error: FormatError) -> None:
        assert malformed is not None
        name = str(record.get("id", "without id"))
        malformed.append(Problem(name, ProblemKind.MALFORMED, str(source.path), str(error)))

    samples = list(_read(source, None if malformed is None else left_out))
    if source.samples is None:
        return samples
    if source.samples > len(samples):
        raise ConfigError(f"{source.path} has {len(samples)} samples, fewer than samples={source.samples}")
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[: source.samples]
    return [samples[index] for index in chosen.sort().values.tolist()]


def _read(source: SourceConfig, on_malformed: OnMalformed | None) -> Iterator[Sample]:
    beside = source.path.parent if source.media is None else source.media
    match source.format:
        case "llava":
            return read_llava(source.path, beside, on_malformed=on_malformed)
        case "llava_video_178k":
            return read_llava_video_178k(source.path, source.media, kinds=source.kinds, on_malformed=on_malformed)
        case "scenewalk_v1":
            return read_scenewalk_v1(source.path, beside, form=source.form, on_malformed=on_malformed)
        case "scenewalk_v2":
            return read_scenewalk_v2(source.path, beside, form=source.form, on_malformed=on_malformed)


class KeptMedia:
    """Opens media; their frames stay in memory, first come first kept, until they fill it.

    Args:
        limit: bytes of frames.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._kept: dict[tuple[Media, MediaOptions], Frames] = {}
        self._lock = Lock()

    def __call__(self, media: Media, options: MediaOptions) -> Frames:
        """As `open_media`, with options that hold frames in memory (`stream=False`)."""
        key = media, options
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        frames = open_media(media, options)
        nbytes = len(frames) * 3 * options.transform.size**2
        with self._lock:
            if nbytes <= self._free and key not in self._kept:
                self._kept[key] = frames
                self._free -= nbytes
        return frames
