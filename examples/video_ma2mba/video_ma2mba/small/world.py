"""What the small run's videos show: shapes that cross the picture one after another, with pauses between."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (40, 185, 60),
    "blue": (60, 90, 245),
    "yellow": (240, 215, 50),
    "white": (245, 245, 245),
    "purple": (190, 60, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EVENTS = (3, 6)
"""Fewest and most events of a video."""
EVENT_SECONDS = (2, 3)
RADIUS = 0.19
"""Half the side of a shape, as a part of the picture's."""
_MARGIN = 0.22
_HELD_OUT_PART = 8


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape of a colour."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True, slots=True)
class Event:
    """A thing crosses the picture.

    Attributes:
        thing: what is seen.
        direction: where it goes.
        start: second at which it appears.
        seconds: how long it is there.
        lane: where it crosses, as a part of the side that it does not move along.
    """

    thing: Thing
    direction: str
    start: int
    seconds: int
    lane: float

    @property
    def stop(self) -> int:
        """Second at which it is gone."""
        return self.start + self.seconds

    def centre(self, second: float) -> tuple[float, float]:
        """Its middle (x, y) as parts of the picture's side, y downwards.

        Whole seconds, at which frames are taken, lie evenly around the middle of the way: what they show does not tell
        a way from its reverse but by their order.
        """
        way = _MARGIN + (1 - 2 * _MARGIN) * min(1.0, (second - self.start + 0.5) / self.seconds)
        dx, dy = DIRECTIONS[self.direction]
        along = way if dx + dy > 0 else 1 - way
        return (along, self.lane) if dx else (self.lane, along)


@dataclass(frozen=True, slots=True)
class Story:
    """What happens in one video.

    Attributes:
        seconds: its length.
        events: in order of time, each of another thing.
        background: grey level behind them.
    """

    seconds: int
    events: tuple[Event, ...]
    background: int

    def shown(self, second: float) -> Event | None:
        """The event at a time."""
        return next((event for event in self.events if event.start <= second < event.stop), None)

    @property
    def held_out(self) -> bool:
        """Whether this order of things is kept for evaluation; one in eight is, decided by the names alone."""
        names = ",".join(event.thing.name for event in self.events)
        return hashlib.sha256(names.encode()).digest()[0] % _HELD_OUT_PART == 0


def make_story(draw: random.Random, seconds: int, *, events: int | None = None, held_out: bool | None = False) -> Story:
    """A random story.

    Args:
        draw: where chance comes from.
        seconds: length of the video; too short ones have fewer events than `EVENTS` says.
        events: how many; None draws the number.
        held_out: whether its order of things is one that is kept for evaluation; None for any.
    """
    while True:
        story = _any_story(draw, seconds, draw.randint(*EVENTS) if events is None else events)
        if held_out is None or story.held_out == held_out:
            return story


def _any_story(draw: random.Random, seconds: int, wanted: int) -> Story:
    count = max(1, min(wanted, seconds // EVENT_SECONDS[0]))
    lengths = [draw.randint(*EVENT_SECONDS) for _ in range(count)]
    while sum(lengths) > seconds:
        lengths[lengths.index(max(lengths))] -= 1
    pauses = _shared(draw, seconds - sum(lengths), count + 1)
    events: list[Event] = []
    second = 0
    for thing, length, pause in zip(draw.sample(THINGS, count), lengths, pauses, strict=False):
        second += pause
        events.append(Event(thing, draw.choice(list(DIRECTIONS)), second, length, draw.uniform(0.25, 0.75)))
        second += length
    return Story(seconds, tuple(events), draw.randint(0, 50))


def _shared(draw: random.Random, total: int, parts: int) -> Sequence[int]:
    """A total as parts of random sizes, zero included."""
    cuts = sorted(draw.randint(0, total) for _ in range(parts - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]
