"""Questions about a story with four options each, and its captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from video_ma2mba.evaluation.questions import letter_of
from video_ma2mba.small.world import COLOURS, DIRECTIONS, EVENTS, SHAPES, THINGS, Event, Story

OPTIONS = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """A question.

    Attributes:
        kind: see `KINDS`.
        question: in words.
        options: in words, without letters.
        right: which option is.
    """

    kind: str
    question: str
    options: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """What the model learns to say: the words first, which turns the letter into a look-up."""
        return f"{self.options[self.right]} ({letter_of(self.right)})"

    @property
    def lettered(self) -> list[str]:
        """The options with their letters, as Video-MME's rows have them."""
        return [f"{letter_of(index)}. {option}" for index, option in enumerate(self.options)]


def _first(draw: random.Random, story: Story) -> Asked:
    return _thing(draw, story, "first", "Which shape came first?", 0, ())


def _last(draw: random.Random, story: Story) -> Asked:
    return _thing(draw, story, "last", "Which shape came last?", len(story.events) - 1, ())


def _after(draw: random.Random, story: Story) -> Asked | None:
    if len(story.events) < 2:
        return None
    place = draw.randrange(len(story.events) - 1)
    name = story.events[place].thing.name
    return _thing(draw, story, "after", f"Which shape came right after the {name}?", place + 1, (place,))


def _count(draw: random.Random, story: Story) -> Asked | None:
    counts = [str(count) for count in range(EVENTS[0], EVENTS[1] + 1)]
    right = str(len(story.events))
    if right not in counts:
        return None
    return _shuffled(draw, "count", "How many shapes came?", right, [count for count in counts if count != right])


def _direction(draw: random.Random, story: Story) -> Asked:
    event = draw.choice(story.events)
    others = [direction for direction in DIRECTIONS if direction != event.direction]
    return _shuffled(draw, "direction", f"Which way did the {event.thing.name} move?", event.direction, others)


def _colour(draw: random.Random, story: Story) -> Asked | None:
    shapes = [event.thing.shape for event in story.events]
    alone = [event.thing for event in story.events if shapes.count(event.thing.shape) == 1]
    if not alone:
        return None
    thing = draw.choice(alone)
    seen = [event.thing.colour for event in story.events]
    others = _filled(draw, seen, COLOURS, {thing.colour})
    return _shuffled(draw, "colour", f"What colour was the {thing.shape}?", thing.colour, others)


KINDS: dict[str, Callable[[random.Random, Story], Asked | None]] = {
    "first": _first,
    "last": _last,
    "after": _after,
    "count": _count,
    "direction": _direction,
    "colour": _colour,
}
"""Kinds of questions. A shuffled video still answers "colour", and half of "direction"."""

assert len(SHAPES) >= OPTIONS
assert EVENTS[1] - EVENTS[0] + 1 == OPTIONS


def ask(draw: random.Random, story: Story, kind: str) -> Asked | None:
    """A question of a kind; None where the story has no answer to it."""
    return KINDS[kind](draw, story)


def caption(event: Event) -> str:
    """What happens in an event's scene."""
    return f"a {event.thing.name} moves {event.direction}."


def listing(story: Story) -> str:
    """All things of a story in order."""
    return ", ".join(event.thing.name for event in story.events) + "."


def scenes(story: Story) -> list[tuple[int, int, str]]:
    """A story cut into one scene for each event: first and last second, and what happens."""
    cuts = [0, *((a.stop + b.start) // 2 for a, b in pairwise(story.events)), story.seconds]
    return [(start, stop, caption(event)) for event, (start, stop) in zip(story.events, pairwise(cuts), strict=True)]


def _thing(draw: random.Random, story: Story, kind: str, question: str, right: int, asked: Sequence[int]) -> Asked:
    """A question whose answer is one of the story's things; as many of the others as can be are wrong options."""
    names = [event.thing.name for event in story.events]
    taken = {names[right], *(names[place] for place in asked)}
    others = _filled(draw, names, [thing.name for thing in THINGS], taken)
    return _shuffled(draw, kind, question, names[right], others)


def _filled(draw: random.Random, seen: Sequence[str], all_: Iterable[str], taken: set[str]) -> list[str]:
    """Wrong options: what the video shows before what it does not, since absence would give an option away."""
    near = [name for name in dict.fromkeys(seen) if name not in taken]
    far = [name for name in all_ if name not in taken and name not in near]
    near = draw.sample(near, min(len(near), OPTIONS - 1))
    return near + draw.sample(far, OPTIONS - 1 - len(near))


def _shuffled(draw: random.Random, kind: str, question: str, right: str, others: Sequence[str]) -> Asked:
    options = [right, *others]
    draw.shuffle(options)
    return Asked(kind, question, tuple(options), options.index(right))
