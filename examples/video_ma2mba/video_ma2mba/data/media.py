"""Opening a sample's media: videos, clips, images and folders of frames, all as numbered frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import torch

from video_ma2mba.data.frames import Frames, HostFrames, StreamedFrames, read_video
from video_ma2mba.data.records import Media
from video_ma2mba.data.transform import FrameTransform, upright
from video_ma2mba.data.video import spread
from video_ma2mba.errors import MediaError, ProblemKind

IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How media become frames.

    Attributes:
        transform: to the tower's size.
        fps: frames a second.
        max_frames: most frames of one medium, evenly spread; None for all.
        stream: decode videos when their frames are asked for, instead of holding them in host memory. Errors inside a
            video then show up late.
        check: decode such a video once more when it is opened, so that they show up then.
        folder_fps: rate of the frames in a folder (MVBench's TVQA has 3 a second).
    """

    transform: FrameTransform
    fps: float = 1.0
    max_frames: int | None = None
    stream: bool = False
    check: bool = False
    folder_fps: float = 3.0


def open_media(media: Media, options: MediaOptions) -> Frames:
    """The frames of a medium.

    Raises:
        MediaError: it cannot be used.
    """
    if media.path.is_dir():
        return _folder(media, options)
    if media.path.suffix.lower() in IMAGES:
        return HostFrames(read_image(media.path, options.transform)[None])
    read = StreamedFrames if options.stream else read_video
    frames = read(
        media.path,
        options.transform,
        fps=options.fps,
        start=media.start or 0.0,
        stop=media.stop,
        max_frames=options.max_frames,
    )
    if options.check and isinstance(frames, StreamedFrames):
        frames.check()
    return frames


def read_image(path: Path, transform: FrameTransform) -> torch.Tensor:
    """Decode an image, `(size, size, 3)` uint8.

    Raises:
        MediaError: it is missing or cannot be decoded.
    """
    if not path.is_file():
        raise MediaError(ProblemKind.MISSING, path, "there is no such file")
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                return transform(upright(frame.to_ndarray(format="rgb24"), frame.rotation))
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise MediaError(ProblemKind.UNREADABLE, path, f"FFmpeg cannot decode it ({error})") from error
    raise MediaError(ProblemKind.EMPTY, path, "the file holds no picture")


def _folder(media: Media, options: MediaOptions) -> HostFrames:
    files = sorted(path for path in media.path.iterdir() if path.suffix.lower() in IMAGES)
    if not files:
        raise MediaError(ProblemKind.EMPTY, media.path, "the folder holds no picture")
    seconds = len(files) / options.folder_fps
    start, stop = media.start or 0.0, min(seconds, seconds if media.stop is None else media.stop)
    if start >= stop:
        raise MediaError(ProblemKind.RANGE, media.path, f"seconds {start} to {stop} of {seconds:.3f} hold nothing")
    count = max(1, math.ceil((stop - start) * options.fps - 1e-6))
    times = [start + index / options.fps for index in spread(count, options.max_frames)]
    chosen = [files[min(len(files) - 1, int(time * options.folder_fps + 1e-6))] for time in times]
    return HostFrames(torch.stack([read_image(path, options.transform) for path in chosen]))
