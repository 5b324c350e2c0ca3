"""Answering questions about a video: the video is read once, as a stream, and each question forks the state after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from magc.nn.lm import LMState
from video_ma2mba.data.batch import VideoTokens
from video_ma2mba.data.chat import BpeTokenizer, Tokens
from video_ma2mba.data.frames import Frames
from video_ma2mba.data.media import open_media
from video_ma2mba.data.records import Media, Prompt, Turn
from video_ma2mba.errors import ConfigError
from video_ma2mba.model.model import VideoMa2mba

Progress = Callable[[int, int], None]
"""Told how many tokens of how many are read."""


class VideoAnswerer:
    """Greedy answers of a model.

    Memory does not grow with the video: segments are read one after another, and only the state is carried.

    Args:
        model: on the device where it is to run.
        tokenizer: its tokenizer.
        name: as results call it.
        segment: tokens read at once; bounds memory, changes nothing else.
        max_frames: most frames of a video, evenly spread; None for all at the model's rate.
        stream: decode while reading instead of before; then the host holds no more than a segment's frames.
        repetition: an answer ends before this many tokens in a row that came up in it before (the paper's rule).
        progress: told how far a video is read.

    Raises:
        ConfigError: sizes that make no sense.
    """

    def __init__(
        self,
        model: VideoMa2mba,
        tokenizer: BpeTokenizer,
        *,
        name: str = "model",
        segment: int = 4096,
        max_frames: int | None = None,
        stream: bool = True,
        repetition: int = 5,
        progress: Progress | None = None,
    ) -> None:
        check_limits(segment=segment, repetition=repetition, max_frames=max_frames)
        self.name = name_with_frames(name, max_frames)
        self._model, self._tokenizer = model, tokenizer
        self._segment, self._repetition, self._progress = segment, repetition, progress
        self._encoder = model.encoder(tokenizer)
        self._options = model.media_options(max_frames=max_frames, stream=stream)

    @torch.no_grad()
    def answer(self, media: Media, prompts: Iterable[Prompt]) -> Iterator[str]:
        """Answers, one for each prompt, in order; a prompt is asked for when the answer before it has been taken.

        Raises:
            MediaError: the video cannot be used.
        """
        frames = open_media(media, self._options)
        state: LMState | None = None
        for prompt in prompts:
            turn = Turn("user", (media, prompt.text))
            tokens = self._encoder.question([turn], [len(frames)], prefill=prompt.prefill)
            video, question = tokens.split(tokens.frames_end)
            if state is None:
                state = self._read(video, frames)
            yield self._generate(question.ids, state, prompt.max_new_tokens)

    def _read(self, video: Tokens, frames: Frames) -> LMState:
        """The state after the video."""
        source = VideoTokens([video], [frames])
        state: Any = None
        for start in range(0, len(source), self._segment):
            stop = min(start + self._segment, len(source))
            x, states = self._model.stem(self._model.segment_of(source, start, stop)), []
            for index, layer in enumerate(self._model.layers):
                x, new_state = layer(x, None if state is None else state[index])
                states.append(new_state)
            state = tuple(states)
            if self._progress is not None:
                self._progress(stop, len(source))
        return state

    def _generate(self, ids: Tensor, state: LMState, limit: int) -> str:
        """The greedy answer; the state is a value, so that it serves the next question too."""
        language = self._model.language
        ids = ids.to(language.stem.weight.device)
        found: list[int] = []
        for _ in range(limit):
            logits, state = language(ids[None], state, num_last_tokens=1)
            token = int(logits[0, -1, : language.config.vocab_size].argmax())
            if token == self._tokenizer.end:
                break
            found.append(token)
            if repeats(found, self._repetition):
                del found[-self._repetition :]
                break
            ids = ids.new_tensor([token])
        return self._tokenizer.decode(found).strip()


def check_limits(**limits: int | None) -> None:
    """Check numbers of frames or tokens by the names of their options; None is no limit.

    Raises:
        ConfigError: one is not a whole number from 1 on.
    """
    for name, limit in limits.items():
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"{name}={limit!r}: give a whole number, at least 1")


def name_with_frames(name: str, max_frames: int | None) -> str:
    """A model's name in results: models with another limit of frames are others."""
    return name if max_frames is None else f"{name} ({max_frames} frm)"


def repeats(tokens: Sequence[int], count: int) -> bool:
    """Whether the last `count` tokens stand in this order somewhere before (an overlap with themselves counts)."""
    if len(tokens) <= count:
        return False
    last = list(tokens[-count:])
    return any(list(tokens[start : start + count]) == last for start in range(len(tokens) - count))
