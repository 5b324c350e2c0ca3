"""Stories without pictures: frames made of words, from which the small base's language model learns to remember.

A frame is one token, as the small vision tower gives it. Its stand-in is the sum of the embeddings of the words that say
what is seen: a colour, a shape, and "left", "right", "up", "down" as far as the thing is on that side; or "nothing".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from video_ma2mba.data.chat import TextTokenizer
from video_ma2mba.small.world import COLOURS, SHAPES, THINGS, Story

SIDES = ("left", "right", "up", "down")
_THING_INDEX = {thing: index for index, thing in enumerate(THINGS)}


def describe(stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
    """What the frames of stories of one length show, at one frame a second.

    Args:
        stories: all of the same number of seconds.

    Returns:
        `(stories, frames)` int64, the thing's place in `THINGS`, -1 where there is none; and `(stories, frames, 2)`, its
        middle from -1 (left, up) to 1 (right, down).
    """
    things = torch.full((len(stories), stories[0].seconds), -1)
    middles = torch.zeros(len(stories), stories[0].seconds, 2)
    for row, story in enumerate(stories):
        for event in story.events:
            for second in range(event.start, event.stop):
                things[row, second] = _THING_INDEX[event.thing]
                middles[row, second] = 2 * torch.tensor(event.centre(second)) - 1
    return things, middles


@dataclass(frozen=True)
class Disguise:
    """How far stand-ins are from sums of words.

    A projector that has learnt to name single things still gives all frames a common part of twice the size of a word, and
    empty ones nothing like "nothing" [measured after stage 1]. A language model that has seen sums of words alone loses
    count over a minute of such frames.

    Attributes:
        noise: standard deviation of what is added to each frame, as a part of the embedding's own; as are the next two.
        offset: most of what is added to all frames of a story.
        empty: most of what is added to its frames without a thing.
        gain: standard deviation of the logarithm of the factor by which a story's things are stronger than words.
    """

    noise: float = 0.3
    offset: float = 1.5
    empty: float = 1.0
    gain: float = 0.3

    def scaled(self, share: float) -> Disguise:
        """So much of it, but all of the noise."""
        return Disguise(self.noise, share * self.offset, share * self.empty, share * self.gain)


PLAIN = Disguise(0.0, 0.0, 0.0, 0.0)


class StandIns:
    """Embeddings of described frames.

    Args:
        tokenizer: every colour, shape and side, and "nothing", must be one token.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._colours = _single(tokenizer, COLOURS)
        self._shapes = _single(tokenizer, SHAPES)
        self._sides = _single(tokenizer, SIDES)
        self._nothing = _single(tokenizer, ("nothing",))
        # The last entry, which -1 finds, stands for no thing.
        self._colour_of = torch.tensor([list(COLOURS).index(thing.colour) for thing in THINGS])
        self._shape_of = torch.tensor([SHAPES.index(thing.shape) for thing in THINGS])

    def embed(
        self, weight: Tensor, things: Tensor, middles: Tensor, *, disguise: Disguise, generator: torch.Generator
    ) -> Tensor:
        """Stand-ins of frames.

        Args:
            weight: the language model's embedding `(vocabulary, d_model)`.
            things: of `describe`.
            middles: of `describe`.
            disguise: what is added to the words.
            generator: where that comes from.

        Returns:
            `(stories, frames, d_model)`.
        """
        things, middles = things.to(weight.device), middles.to(weight.device)
        colours, shapes, sides = (weight[ids] for ids in (self._colours, self._shapes, self._sides))
        named = colours[self._colour_of] + shapes[self._shape_of]
        x, y = (1.5 * middles).unbind(-1)
        strengths = torch.stack([-x, x, -y, y], -1).clamp(0, 1)
        seen = named[things] + strengths @ sides
        spread = weight.detach().std()
        stories, d_model = len(things), weight.shape[1]

        def drawn(most: float) -> Tensor:
            """A direction for each story, of a length up to `most`."""
            lengths = most * torch.rand(stories, 1, 1, generator=generator)
            return spread * (lengths * torch.randn(stories, 1, d_model, generator=generator)).to(weight.device)

        gain = torch.exp(disguise.gain * torch.randn(stories, 1, 1, generator=generator)).to(weight.device)
        empty = weight[self._nothing] + drawn(disguise.empty)
        frames = torch.where((things < 0)[..., None], empty, gain * seen) + drawn(disguise.offset)
        return frames + spread * disguise.noise * torch.randn(frames.shape, generator=generator).to(weight.device)


def _single(tokenizer: TextTokenizer, words: Iterable[str]) -> Tensor:
    found = {word: tokenizer.encode(word) for word in words}
    assert all(len(ids) == 1 for ids in found.values()), f"not one token each: {found}"
    return torch.tensor([ids[0] for ids in found.values()])
