"""What the small base's language model learns from: stories told in stand-ins of frames, and questions about them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from video_ma2mba.data.chat import IGNORED, NO_FRAME, BpeTokenizer, ChatEncoder, Tokens
from video_ma2mba.data.records import Media, Sample, Turn
from video_ma2mba.small.questions import KINDS, Asked, ask, caption, listing, scenes
from video_ma2mba.small.standins import Disguise, StandIns, describe
from video_ma2mba.small.texts import DESCRIBE, LIST, SCHEMA, prompt_of
from video_ma2mba.small.world import COLOURS, DIRECTIONS, SHAPES, Story, make_story

_VIDEO = Media(Path("video"))
# What is harder comes more often.
_KIND_WEIGHTS = {"first": 2, "last": 1, "after": 4, "count": 1, "direction": 4, "colour": 2}
_PART_INTERLEAVED, _PART_IN_FULL = 0.15, 0.4


@dataclass(frozen=True, slots=True)
class Level:
    """How hard the lessons are.

    Attributes:
        longest: most frames of a story.
        options: whether questions come with options to choose from, or are open.
    """

    longest: int
    options: bool


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch.

    Attributes:
        stories: of one length.
        rows: of each story: all of its tokens, or, with turns, those up to its last frame.
        turns: the same number of questions and answers for each story, story by story, without the video.
    """

    stories: list[Story]
    rows: list[Tokens]
    turns: list[Tokens]


class Lessons:
    """Draws batches.

    Args:
        tokenizer: of the model.
        seed: of everything.
        tokens: about how many a batch has.
        shortest: fewest frames of a story.
    """

    def __init__(self, tokenizer: BpeTokenizer, *, seed: int, tokens: int, shortest: int = 2) -> None:
        self._encoder = ChatEncoder(tokenizer, 1, SCHEMA)
        self._draw = random.Random(f"lessons {seed}")
        self._tokens, self._shortest = tokens, shortest

    def draw(self, level: Level) -> Lesson:
        """A batch of a level: questions that fork the state after a story, or scenes and captions in turn."""
        seconds = round(math.exp(self._draw.uniform(math.log(self._shortest), math.log(level.longest))))
        turns, tokens_of_turn = (4, 64) if level.options else (6, 24)
        count = max(2, self._tokens // (seconds + turns * tokens_of_turn))
        stories = [make_story(self._draw, seconds) for _ in range(count)]
        if self._draw.random() < _PART_INTERLEAVED:
            return Lesson(stories, [self._interleaved(story) for story in stories], [])
        # Without the instructions, which are the same every time, questions cost half as much.
        in_full = self._draw.random() < _PART_IN_FULL
        asked = [self._turn(story, level, in_full) for story in stories for _ in range(turns)]
        return Lesson(stories, [self.video(seconds)] * count, asked)

    def video(self, seconds: int) -> Tokens:
        """The tokens of a chat up to the last frame of a video."""
        tokens = self._encoder.question([Turn("user", (_VIDEO,))], [seconds])
        return tokens.split(tokens.frames_end)[0]

    def turn(self, prompt: str, answer: str) -> Tokens:
        """The tokens of a question and its answer, after the video."""
        sample = Sample("", (Turn("user", (_VIDEO, prompt)), Turn("assistant", (answer,))))
        tokens = self._encoder.sample(sample, [1])
        return tokens.split(tokens.frames_end)[1]

    def _turn(self, story: Story, level: Level, in_full: bool) -> Tokens:
        part = self._draw.random()
        if part < (0.08 if level.options else 0.15):
            return self.turn(LIST, listing(story))
        if part < (0.16 if level.options else 0.4):
            return self.turn(DESCRIBE, " ".join(caption(event) for event in story.events))
        asked = self._asked(story)
        if not level.options or part < 0.25:
            return self.turn(asked.question, asked.options[asked.right])
        prompt = prompt_of(asked)
        return self.turn(prompt if in_full else prompt.partition("\n")[2], asked.answer)

    def _asked(self, story: Story) -> Asked:
        while True:
            kind = self._draw.choices(list(_KIND_WEIGHTS), list(_KIND_WEIGHTS.values()))[0]
            asked = ask(self._draw, story, kind)
            if asked is not None:
                return asked

    def _interleaved(self, story: Story) -> Tokens:
        turns: list[Turn] = []
        counts: list[int] = []
        for start, stop, text in scenes(story):
            turns += [Turn("user", (_VIDEO,)), Turn("assistant", (text,))]
            counts.append(stop - start)
        return self._encoder.sample(Sample("", tuple(turns), "interleaved"), counts)


def held_out_turns(lessons: Lessons, seconds: int, count: int, kind: str) -> Lesson:
    """Questions of a kind as the benchmark asks them, about orders of things that lessons never show."""
    draw = random.Random(f"held out {seconds}")
    found: list[tuple[Story, Tokens]] = []
    while len(found) < count:
        story = make_story(draw, seconds, held_out=True)
        asked = ask(draw, story, kind)
        if asked is not None:
            found.append((story, lessons.turn(prompt_of(asked), asked.answer)))
    return Lesson([story for story, _ in found], [lessons.video(seconds)] * count, [turn for _, turn in found])


@dataclass(frozen=True, slots=True)
class Batch:
    """A lesson as tensors, which a worker makes: a few large ones, since each costs the same to hand over.

    Attributes:
        ids, labels: `(stories, length)` int64 of the rows.
        frame: `(stories, length)` int64, the number of the frame in its story, else `NO_FRAME`.
        things, middles: of `describe`.
        probed: of `probed`.
        turn_ids, turn_labels: `(turns, longest)` int64; empty without turns.
    """

    ids: Tensor
    labels: Tensor
    frame: Tensor
    things: Tensor
    middles: Tensor
    probed: Tensor
    turn_ids: Tensor
    turn_labels: Tensor

    @classmethod
    def of(cls, lesson: Lesson) -> Batch:
        """The batch of a lesson."""
        frame = pad_sequence([row.frame for row in lesson.rows], batch_first=True, padding_value=NO_FRAME).long()
        things, middles = describe(lesson.stories)
        none = torch.zeros(0, 0, dtype=torch.int64)
        turns = _padded(lesson.turns) if lesson.turns else (none, none)
        return cls(*_padded(lesson.rows), frame, things, middles, probed(lesson.stories), *turns)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, part.name).to(device) for part in fields(self)))

    @property
    def turns(self) -> int:
        """Of all stories."""
        return len(self.turn_ids)

    def embed(self, weight: Tensor, standins: StandIns, disguise: Disguise, generator: torch.Generator) -> Tensor:
        """`(stories, length, d_model)` of the rows: words, and stand-ins where frames are.

        Args:
            weight: the language model's embedding.
            standins: make the frames.
            disguise: see `StandIns.embed`.
            generator: the same.
        """
        seen = standins.embed(weight, self.things, self.middles, disguise=disguise, generator=generator)
        place = self.frame.clamp(min=0)[..., None].expand(-1, -1, seen.shape[-1])
        return torch.where((self.frame == NO_FRAME)[..., None], weight[self.ids], seen.gather(1, place))


def _padded(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Ids and labels of rows of text."""
    ids = pad_sequence([row.ids for row in rows], batch_first=True)
    return ids, pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED)


def probed(stories: Sequence[Story]) -> Tensor:
    """What the probes ask, `(4, stories, frames)` int64; 0 is none."""
    found = torch.zeros(4, len(stories), stories[0].seconds, dtype=torch.int64)
    for row, story in enumerate(stories):
        for number, event in enumerate(story.events):
            found[0, row, event.start :] = number + 1
            if number:
                before = story.events[number - 1].thing
                found[1, row, event.start :] = 1 + list(COLOURS).index(before.colour)
                found[2, row, event.start :] = 1 + SHAPES.index(before.shape)
            found[3, row, event.start] = 0  # one frame tells no direction
            found[3, row, event.start + 1 :] = 1 + list(DIRECTIONS).index(event.direction)
    return found


assert set(_KIND_WEIGHTS) == set(KINDS)
