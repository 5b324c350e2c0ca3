"""Frames by number, as the model's stem asks for them: held in host memory, or decoded when they are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Sequence
from itertools import accumulate
from os import PathLike
from typing import Protocol

import torch
from torch import Tensor

from video_ma2mba.data.transform import FrameTransform
from video_ma2mba.data.video import frames_at, sample_times
from video_ma2mba.errors import ConfigError


class Frames(Protocol):
    """Numbered frames of one size, as bytes."""

    def __len__(self) -> int:
        """How many."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Frames `start` to `stop`, `(stop - start, size, size, 3)` uint8 on the host; the same every time."""
        ...


class HostFrames:
    """Frames in host memory: 2.4 GB for two hours at one frame a second and 336 x 336 pixels.

    Args:
        pixels: `(frames, size, size, 3)` uint8.
    """

    def __init__(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ConfigError(
                f"frames must be (frames, height, width, 3) uint8, got {pixels.dtype} {tuple(pixels.shape)}"
            )
        self._pixels = pixels

    def __len__(self) -> int:
        return self._pixels.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """See `Frames`."""
        _check_range(start, stop, len(self))
        return self._pixels[start:stop]


class StreamedFrames:
    """Frames decoded on demand. Reading on costs what decoding costs; reading back seeks and decodes again.

    Only the frames of the last call are held, since a frame cut by a segment's border is asked for twice.

    Args:
        path: the video.
        transform: to the tower's size.
        fps, start, stop, max_frames: as in `sample_chunks`.

    Raises:
        MediaError: the file cannot be opened, or the clip is not in it. `read` raises what decoding raises.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        transform: FrameTransform,
        *,
        fps: float = 1.0,
        start: float = 0.0,
        stop: float | None = None,
        max_frames: int | None = None,
    ) -> None:
        self._path, self._transform = path, transform
        self._times = sample_times(path, fps=fps, start=start, stop=stop, max_frames=max_frames)
        self._stream: Generator[tuple[float, Tensor]] | None = None
        self._next = 0  # number of the frame that the stream yields next
        self._held: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._times)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Frames`."""
        _check_range(start, stop, len(self))
        kept = self._kept(start, stop)
        position = start + len(kept)
        if position < stop and (self._stream is None or self._next != position):
            self._stream = frames_at(self._path, self._times[position:], self._transform)
            self._next = position
        while position < stop and self._stream is not None:
            kept.append(next(self._stream)[1])
            position = self._next = position + 1
        pixels = torch.stack(kept)
        self._held = start, pixels
        return pixels

    def check(self) -> None:
        """Decode all frames once and hold none, so that damage shows up before they are used.

        Raises:
            MediaError: as `read`.
        """
        for _ in frames_at(self._path, self._times, self._transform):
            pass

    def _kept(self, start: int, stop: int) -> list[Tensor]:
        """Those of the frames from `start` on that the last call left."""
        if self._held is None:
            return []
        first, pixels = self._held
        if not first <= start < first + len(pixels):
            return []
        return list(pixels[start - first : stop - first])


class JoinedFrames:
    """The frames of several media, numbered on."""

    def __init__(self, parts: Sequence[Frames]) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """See `Frames`."""
        _check_range(start, stop, len(self))
        pieces: list[Tensor] = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            part, offset = self._parts[index], self._starts[index]
            end = min(stop, self._starts[index + 1])
            if end > start:
                pieces.append(part.read(start - offset, end - offset))
            start, index = end, index + 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def read_video(
    path: str | PathLike[str],
    transform: FrameTransform,
    *,
    fps: float = 1.0,
    start: float = 0.0,
    stop: float | None = None,
    max_frames: int | None = None,
) -> HostFrames:
    """Decode a video, or a clip of it, into host memory at the tower's size; see `sample_chunks`."""
    times = sample_times(path, fps=fps, start=start, stop=stop, max_frames=max_frames)
    # Made once at its full size: hours of video would not bear a second copy.
    pixels = torch.empty((len(times), transform.size, transform.size, 3), dtype=torch.uint8)
    for index, (_, frame) in enumerate(frames_at(path, times, transform)):
        pixels[index] = frame
    return HostFrames(pixels)


def _check_range(start: int, stop: int, count: int) -> None:
    if not 0 <= start < stop <= count:
        raise IndexError(f"frames {start} to {stop} of {count}")
