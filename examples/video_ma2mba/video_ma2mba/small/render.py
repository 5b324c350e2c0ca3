"""Stories as pictures and mp4 files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import StrEnum
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from video_ma2mba.data.encode import write_video
from video_ma2mba.small.world import COLOURS, RADIUS, Story, Thing

SIZE = 32
"""Side of the pictures in pixels."""
RATE = 2
"""Frames a second in the files; the model sees every second one."""
_FINER = 4
_GRAIN = 6.0
_GREY = 128.0


def draw(thing: Thing, centre: tuple[float, float], background: int) -> NDArray[np.float32]:
    """A thing in front of its background, `(SIZE, SIZE, 3)` from 0 to 255; edges are smooth."""
    fine = SIZE * _FINER
    y, x = np.mgrid[0:fine, 0:fine].astype(np.float32) / fine + 0.5 / fine
    inside = _inside(thing.shape, (x - centre[0]) / RADIUS, (y - centre[1]) / RADIUS)
    cover = inside.reshape(SIZE, _FINER, SIZE, _FINER).mean((1, 3), dtype=np.float32)[..., None]
    return cover * np.asarray(COLOURS[thing.colour], np.float32) + (1 - cover) * background


class Look(StrEnum):
    """How a story is shown: as it is; with its seconds in random order; or grey, which tells nothing."""

    PLAIN = "plain"
    SHUFFLED = "shuffled"
    BLIND = "blind"


def frames(story: Story, seed: int, look: Look = Look.PLAIN) -> Iterator[NDArray[np.uint8]]:
    """The pictures of a story's video, `(SIZE, SIZE, 3)` uint8 RGB, with a little noise."""
    noise = np.random.default_rng(seed)
    seconds = list(range(story.seconds))
    if look is Look.SHUFFLED:
        random.Random(seed).shuffle(seconds)
    for second in seconds:
        for part in range(RATE):
            picture = _picture(story, second + part / RATE, look)
            grain = noise.normal(0.0, _GRAIN, (SIZE, SIZE, 1)).astype(np.float32)
            yield (picture + grain).clip(0, 255).round().astype(np.uint8)


def write_story(path: str | PathLike[str], story: Story, seed: int, look: Look = Look.PLAIN) -> None:
    """Encode a story's video with x264."""
    # With its macroblock tree in vector instructions, x264 now and then writes another file of the same pictures.
    options = {"preset": "veryfast", "crf": "20", "threads": "1", "mbtree": "0"}
    write_video(path, frames(story, seed, look), rate=RATE, options=options)


def _picture(story: Story, second: float, look: Look) -> NDArray[np.float32]:
    event = None if look is Look.BLIND else story.shown(second)
    if event is not None:
        return draw(event.thing, event.centre(second), story.background)
    return np.full((SIZE, SIZE, 3), _GREY if look is Look.BLIND else story.background, np.float32)


def _inside(shape: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points lie in a shape; it reaches from -1 to 1."""
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.85
        case "triangle":
            return (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1)
        case _:
            raise ValueError(f"{shape!r} is none of the shapes")
