"""Small videos for tests: every frame says its own number, by its grey."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_ma2mba.data.encode import write_video

RATE = 4


def grey(second: int) -> int:
    """The grey of all frames of a second."""
    return 30 + 17 * second % 200


def grey_frames(seconds: float, height: int = 32, width: int = 48) -> Iterator[NDArray[np.uint8]]:
    """Frames at `RATE` a second."""
    for index in range(round(seconds * RATE)):
        yield np.full((height, width, 3), grey(index // RATE), np.uint8)


def write_clip(path: Path, seconds: float, height: int = 32, width: int = 48, **options: Any) -> Path:
    """Encode a clip and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, grey_frames(seconds, height, width), rate=RATE, **options)
    return path


def moving_frames(count: int, height: int = 64, width: int = 96) -> Iterator[NDArray[np.uint8]]:
    """Noise that moves, which takes bytes to encode: damage anywhere in a file hits a picture."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for index in range(count):
        yield np.roll(noise, 3 * index, axis=1)


def damage(path: Path, first: float, last: float) -> None:
    """Overwrite the bytes of a file between two shares of its length."""
    content = bytearray(path.read_bytes())
    start, stop = (round(share * len(content)) for share in (first, last))
    content[start:stop] = random.Random(1).randbytes(stop - start)
    path.write_bytes(content)


def seconds_of(pixels: Tensor, count: int) -> list[int]:
    """Which of the first `count` seconds each frame shows, `(frames, size, size, 3)`."""
    levels = torch.tensor([grey(second) for second in range(count)], dtype=torch.float32)
    means = pixels.float().mean((1, 2, 3))
    nearest = (means[:, None] - levels).abs()
    assert nearest.min(1).values.max() < 4  # nothing but a codec's rounding
    return nearest.argmin(1).tolist()
