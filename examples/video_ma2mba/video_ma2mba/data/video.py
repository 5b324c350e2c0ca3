"""Frames of a video file at given times, decoded as a stream: never more than one full-size frame at once."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import cast

import av
import av.error
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from video_ma2mba.data.transform import FrameTransform, upright
from video_ma2mba.errors import MediaError, ProblemKind

SEEK_SECONDS = 10.0
"""Frames further apart than this are sought; nearer ones are reached by decoding on."""
SLACK_SECONDS = 1.0
"""How far a file's stated duration may reach beyond its last frame before it counts as truncated."""
STRICT = {"err_detect": "explode"}
"""Decoders fail at what breaks their format; by default they patch it up and hand out a wrong picture."""
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a file says of its video stream.

    Attributes:
        width, height: in pixels, as coded.
        rate: frames a second, on average.
        duration: seconds from the first frame to the end of the last.
    """

    width: int
    height: int
    rate: float
    duration: float

    def samples(self, fps: float) -> int:
        """How many frames there are at `fps` frames a second; one at least."""
        return max(1, math.ceil(self.duration * fps - _EPSILON))


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Some frames in a row.

    Attributes:
        times: seconds from the start of the video at which they were asked for.
        pixels: `(frames, size, size, 3)` uint8.
    """

    times: tuple[float, ...]
    pixels: Tensor


def probe(path: str | PathLike[str]) -> VideoInfo:
    """Read a file's header; where it states no duration, its packets too. Nothing is decoded.

    Raises:
        MediaError: the file is missing or unreadable, or has no video or no frame.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        duration = _duration(path, container, stream)
        return VideoInfo(stream.codec_context.width, stream.codec_context.height, float(rate or 0.0), duration)


def frames_at(
    path: str | PathLike[str], times: Sequence[float], transform: FrameTransform
) -> Generator[tuple[float, Tensor]]:
    """For each time, the frame shown then.

    Args:
        path: the file.
        times: ascending, in seconds from the start of the video.
        transform: to the tower's size.

    Yields:
        The time, and the frame `(size, size, 3)` uint8.

    Raises:
        MediaError: as `probe`; also a decoding error, or a video that ends before the times do.
    """
    for run in _runs(times):
        with _opened(path) as (container, stream):
            yield from _decode_run(path, container, stream, run, transform)


def sample_chunks(
    path: str | PathLike[str],
    transform: FrameTransform,
    *,
    fps: float = 1.0,
    start: float = 0.0,
    stop: float | None = None,
    max_frames: int | None = None,
    chunk: int = 32,
) -> Generator[FrameChunk]:
    """Frames at a steady rate, chunk by chunk, in memory that does not grow with the video.

    Args:
        path: the file.
        transform: to the tower's size.
        fps: frames a second.
        start: first time, in seconds.
        stop: end of the clip in seconds, not included; None is the end of the video.
        max_frames: of more, as many are taken, evenly spread from the first to the last.
        chunk: frames a chunk has at most.

    Raises:
        MediaError: as `frames_at`; also a clip that starts after the video ends.
    """
    times = sample_times(path, fps=fps, start=start, stop=stop, max_frames=max_frames)
    pending: list[tuple[float, Tensor]] = []
    for item in frames_at(path, times, transform):
        pending.append(item)
        if len(pending) == chunk:
            yield _chunk(pending)
            pending = []
    if pending:
        yield _chunk(pending)


def sample_times(
    path: str | PathLike[str],
    *,
    fps: float = 1.0,
    start: float = 0.0,
    stop: float | None = None,
    max_frames: int | None = None,
) -> list[float]:
    """The times `sample_chunks` asks for; arguments and errors as there."""
    duration = probe(path).duration
    end = duration if stop is None else min(stop, duration)
    if start >= duration or end <= start:
        raise MediaError(
            ProblemKind.RANGE, path, f"seconds {start} to {stop} were asked for, but the video has {duration:.3f}"
        )
    count = max(1, math.ceil((end - start) * fps - _EPSILON))
    return [start + index / fps for index in spread(count, max_frames)]


def spread(count: int, limit: int | None) -> list[int]:
    """All of `count` indices, or `limit` of them evenly from the first to the last."""
    if limit is None or count <= limit:
        return list(range(count))
    if limit == 1:
        return [count // 2]
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]


def _chunk(items: Sequence[tuple[float, Tensor]]) -> FrameChunk:
    return FrameChunk(tuple(time for time, _ in items), torch.stack([frame for _, frame in items]))


def _runs(times: Sequence[float]) -> list[list[float]]:
    """Times split where seeking is cheaper than decoding on."""
    runs: list[list[float]] = [[times[0]]] if times else []
    for before, time in pairwise(times):
        if time - before > SEEK_SECONDS:
            runs.append([])
        runs[-1].append(time)
    return runs


# ---------------------------------------------------------------------- the file
@contextmanager
def _opened(path: str | PathLike[str]) -> Generator[tuple[InputContainer, VideoStream]]:
    if not Path(path).is_file():
        raise MediaError(ProblemKind.MISSING, path, "there is no such file")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(ProblemKind.UNREADABLE, path, f"FFmpeg cannot open it ({error})") from error
    with container:
        # FFmpeg's choice passes over cover pictures.
        stream = container.streams.best("video")
        if stream is None:
            raise MediaError(ProblemKind.NO_VIDEO, path, "the file has no video stream")
        video = cast(VideoStream, stream)
        video.thread_type = "AUTO"
        video.codec_context.options = STRICT
        yield container, video


def _duration(path: str | PathLike[str], container: InputContainer, stream: VideoStream) -> float:
    base = float(stream.time_base or 1)
    if stream.duration:
        return stream.duration * base
    # Matroska states the end of its longest stream, often the sound: the picture's is its last packet's.
    end, last, packets = 0.0, 0.0, 0
    try:
        for packet in container.demux():
            if not packet.size:
                continue
            stop = None
            if packet.pts is not None and packet.time_base is not None:
                stop = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                last = max(last, stop)
            if packet.stream_index == stream.index:
                packets += 1
                end = end if stop is None else max(end, stop - _origin(stream))
    except av.error.FFmpegError as error:
        raise MediaError(ProblemKind.UNREADABLE, path, f"reading its packets failed ({error})") from error
    if not packets:
        raise MediaError(ProblemKind.EMPTY, path, "the video stream has no packet")
    stated = _stated_end(container)
    if stated > last + SLACK_SECONDS:
        # No stream reaches it: the file was cut off. Who asks for frames beyond the cut is told so.
        end = max(end, stated - _origin(stream))
    rate = stream.average_rate or stream.guessed_rate
    return end or (packets / float(rate) if rate else 1.0)


def _stated_end(container: InputContainer) -> float:
    """The second at which a header says that the file ends; 0 where FFmpeg only estimates it from what is there."""
    if container.duration is None or "matroska" not in container.format.name:
        return 0.0
    return container.duration / av.time_base


def _origin(stream: VideoStream) -> float:
    return (stream.start_time or 0) * float(stream.time_base or 1)


def _decode_run(
    path: str | PathLike[str],
    container: InputContainer,
    stream: VideoStream,
    times: Sequence[float],
    transform: FrameTransform,
) -> Iterator[tuple[float, Tensor]]:
    """Frames of neighbouring times: a frame is shown from its own time until the next one's."""
    shown: VideoFrame | None = None
    shown_until = 0.0
    index = 0
    ready: Tensor | None = None  # of `shown`, made when the first time wants it
    reformatter = VideoReformatter()  # a new one for every picture, with threads of its own, takes 100 times as long
    for time, frame in _timed_frames(path, container, stream, times[0]):
        while shown is not None and index < len(times) and times[index] < time - _EPSILON:
            ready = _picture(shown, transform, reformatter) if ready is None else ready
            yield times[index], ready
            index += 1
        if index == len(times):
            return
        shown, ready = frame, None
        shown_until = time + float((frame.duration or 0) * (frame.time_base or 0))
    if shown is None:
        raise MediaError(ProblemKind.EMPTY, path, "not one frame could be decoded")
    for time in times[index:]:
        if time > shown_until + SLACK_SECONDS:
            raise MediaError(
                ProblemKind.TRUNCATED,
                path,
                f"its last frame ends at {shown_until:.3f} s, but it should reach {time:.3f} s",
            )
        ready = _picture(shown, transform, reformatter) if ready is None else ready
        yield time, ready


def _timed_frames(
    path: str | PathLike[str], container: InputContainer, stream: VideoStream, first: float
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times from the start of the video, beginning at or before `first`."""
    if first > SEEK_SECONDS:
        _seek(container, stream, first)
        frames = _stamped(path, container, stream)
        head = None
        with suppress(MediaError):  # found again from the start, if it is damage
            head = next(frames, None)
        if head is not None and head[1].pts is not None and head[0] <= first + _EPSILON:
            yield head
            yield from frames
            return
        _seek(container, stream, 0.0)  # an index that leads past the goal or into it, or frames without time stamps
    frames = _stamped(path, container, stream)
    head = next(frames, None)
    if head is not None:
        if head[0] > SLACK_SECONDS:
            raise MediaError(ProblemKind.DECODE, path, f"before second {head[0]:.3f} no picture is whole")
        yield head
    yield from frames


def _seek(container: InputContainer, stream: VideoStream, seconds: float) -> None:
    with suppress(av.error.FFmpegError):  # what cannot be sought is read from where it stands
        container.seek(int((seconds + _origin(stream)) / (stream.time_base or 1)), stream=stream)


def _stamped(
    path: str | PathLike[str], container: InputContainer, stream: VideoStream
) -> Iterator[tuple[float, VideoFrame]]:
    origin, step = _origin(stream), 1 / float(stream.average_rate or stream.guessed_rate or 25)
    time = -step
    try:
        for frame in _whole_frames(container, stream):
            # Frames without a time stamp follow at the average rate.
            time = time + step if frame.time is None else float(frame.time) - origin
            yield time, frame
    except (av.error.FFmpegError, _DamageError) as error:
        raise MediaError(ProblemKind.DECODE, path, f"after second {max(time, 0.0):.3f}: {error}") from error


class _DamageError(Exception):
    """What the decoder passes over and would hand out a wrong picture for."""


def _whole_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Frames from the first key frame on.

    Recordings begin anywhere, and so does a video after seeking: pictures that come before the first key frame, or are
    shown before it, lack what they refer to, and that is no damage.

    Raises:
        FFmpegError, _DamageError: the key frame or what follows it is damaged.
    """
    key: Packet | None = None
    for packet in container.demux(stream):
        key = packet if key is None and packet.is_keyframe else key
        if packet.size and (key is None or _earlier(packet, key)):
            continue
        if packet.size and packet.is_corrupt:
            raise _DamageError("a packet is damaged or lacks a part")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise _DamageError("a picture is damaged")
            yield frame


def _earlier(packet: Packet, key: Packet) -> bool:
    return packet.pts is not None and key.pts is not None and packet.pts < key.pts


def _picture(frame: VideoFrame, transform: FrameTransform, reformatter: VideoReformatter) -> Tensor:
    picture = reformatter.reformat(frame, format="rgb24", threads=1)
    return transform(upright(picture.to_ndarray(), frame.rotation))
