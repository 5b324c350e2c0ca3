"""Samples of a run from its sources, and decoded media that stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

import torch

from video_ma2mba.data.frames import Frames
from video_ma2mba.data.llava import group_by_media, read_llava, read_llava_video_178k
from video_ma2mba.data.media import MediaOptions, open_media
from video_ma2mba.data.records import Media, Sample
from video_ma2mba.data.scenewalk import read_scenewalk_v1, read_scenewalk_v2
from video_ma2mba.errors import ConfigError
from video_ma2mba.training.config import DataConfig, SourceConfig


def read_samples(data: DataConfig, seed: int) -> list[Sample]:
    """All samples of the sources; media are not looked for.

    Args:
        data: says where.
        seed: of random choices.

    Raises:
        ConfigError: there is no source. FormatError: annotations are missing or malformed.
    """
    if not data.sources:
        raise ConfigError("there is nothing to learn: give data.sources")
    found = [sample for number, source in enumerate(data.sources) for sample in _chosen(source, seed + number)]
    return group_by_media(found, max_turns=data.max_turns) if data.group_by_media else found


def _chosen(source: SourceConfig, seed: int) -> Sequence[Sample]:
    samples = list(_read(source))
    if source.samples is None:
        return samples
    if source.samples > len(samples):
        raise ConfigError(f"{source.path} has {len(samples)} samples, fewer than samples={source.samples}")
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[: source.samples]
    return [samples[index] for index in chosen.sort().values.tolist()]


def _read(source: SourceConfig) -> Iterator[Sample]:
    beside = source.path.parent if source.media is None else source.media
    match source.format:
        case "llava":
            return read_llava(source.path, beside)
        case "llava_video_178k":
            return read_llava_video_178k(source.path, source.media, kinds=source.kinds)
        case "scenewalk_v1":
            return read_scenewalk_v1(source.path, beside, form=source.form)
        case "scenewalk_v2":
            return read_scenewalk_v2(source.path, beside, form=source.form)


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
