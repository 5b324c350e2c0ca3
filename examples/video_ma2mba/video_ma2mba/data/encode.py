"""Writing frames to a video file."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from os import PathLike
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray


def write_video(
    path: str | PathLike[str],
    frames: Iterable[NDArray[np.uint8]],
    *,
    rate: int | Fraction,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int = 0,
) -> None:
    """Encode frames; the container follows from the file's suffix.

    Args:
        path: where to.
        frames: `(height, width, 3)` uint8 RGB, all of one size.
        rate: frames a second.
        codec: an encoder of FFmpeg.
        pixel_format: "yuv420p" needs even sizes, "yuv444p" does not.
        options: of the encoder, such as `{"crf": "18", "g": "25"}`.
        rotation: degrees counter-clockwise by which a player should turn the frames.
    """
    with av.open(str(path), "w") as container:
        stream: Any = None
        for pixels in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                assert isinstance(stream, VideoStream)
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = pixel_format
                if rotation:
                    stream.set_display_rotation(rotation)
            container.mux(stream.encode(VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
