"""The paper's interaction schema (Table 5) as token ids: what is learnt, and where frames go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from video_ma2mba.data.records import Media, Sample, Turn
from video_ma2mba.errors import ConfigError, FormatError

IGNORED = -100
"""Label of a token that is not learnt."""
NO_FRAME = -1
"""Frame number of a text token."""


class TextTokenizer(Protocol):
    """Text to token ids and back."""

    end: int

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text; nothing in it is taken for a special token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        ...


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library; Mamba-2's is GPT-NeoX's.

    Args:
        tokenizer: the tokenizer; it is copied.
        end: the token that ends every turn.

    Raises:
        ConfigError: there is no such token.
    """

    def __init__(self, tokenizer: Tokenizer, end: str = "<|endoftext|>") -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        # A caption that quotes "<|endoftext|>" must not end its turn.
        self._tokenizer.encode_special_tokens = True
        found = self._tokenizer.token_to_id(end)
        if found is None:
            raise ConfigError(f"the tokenizer has no token {end!r}, with which turns end")
        self.end: int = found

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], end: str = "<|endoftext|>") -> BpeTokenizer:
        """Read `tokenizer.json` of a folder, or the file itself.

        Raises:
            FormatError: it is missing or cannot be read.
        """
        path = Path(folder)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FormatError(f"{path} does not exist; Mamba-2 needs EleutherAI/gpt-neox-20b's tokenizer.json")
        try:
            return cls(Tokenizer.from_file(str(path)), end)
        except ConfigError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise FormatError(f"{path} is not a tokenizer's file ({error})") from error

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `tokenizer.json` into a folder."""
        self._tokenizer.save(str(Path(folder) / "tokenizer.json"))

    @property
    def size(self) -> int:
        """Number of tokens, the added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """See `TextTokenizer`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `TextTokenizer`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class ChatSchema:
    """The text around frames, questions and answers.

    The defaults are the printed table's: every frame on a line of its own. The authors' later code puts frames one after
    the other: `between_frames=""`, `before_frames=""`.
    """

    system: str = "You are a helpful assistant."
    system_tag: str = "<|system|>"
    user_tag: str = "<|user|>"
    assistant_tag: str = "<|assistant|>"
    before_frames: str = "\n"
    between_frames: str = "\n"
    after_frames: str = "\n"


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence of text and frames.

    Attributes:
        ids: `(length,)` int64; the end token's where a frame is.
        labels: `(length,)` int64: the id where it is learnt, else `IGNORED`.
        frame: `(length,)` int32: the number of the frame, counted over all media of the sequence, else `NO_FRAME`.
        patch: `(length,)` int32: which of the frame's tokens, 0 where there is none.
    """

    ids: Tensor
    labels: Tensor
    frame: Tensor
    patch: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def split(self, position: int) -> tuple[Tokens, Tokens]:
        """The tokens before a position, and those from it on."""
        parts = [(each[:position], each[position:]) for each in (self.ids, self.labels, self.frame, self.patch)]
        first, second = zip(*parts, strict=True)
        return Tokens(*first), Tokens(*second)

    @property
    def frames_end(self) -> int:
        """The position after the last frame's last token; 0 without frames."""
        places = (self.frame != NO_FRAME).nonzero()
        return int(places[-1]) + 1 if places.numel() else 0


@dataclass
class _Builder:
    tokenizer: TextTokenizer
    tokens_per_frame: int
    pieces: list[tuple[list[int], bool, int]] = field(default_factory=list)
    """Ids, whether they are learnt, and the frame number or `NO_FRAME`."""
    frames: int = 0

    def text(self, text: str, *, learn: bool = False, end: bool = False) -> None:
        ids = self.tokenizer.encode(text) if text else []
        self.pieces.append(([*ids, self.tokenizer.end] if end else ids, learn, NO_FRAME))

    def frame(self) -> None:
        self.pieces.append(([self.tokenizer.end] * self.tokens_per_frame, False, self.frames))
        self.frames += 1

    def finish(self) -> Tokens:
        ids = torch.tensor([id_ for piece, _, _ in self.pieces for id_ in piece], dtype=torch.int64)
        counts = torch.tensor([len(piece) for piece, _, _ in self.pieces])
        learn = torch.tensor([learn for _, learn, _ in self.pieces]).repeat_interleave(counts)
        frame = torch.tensor([frame for _, _, frame in self.pieces], dtype=torch.int32).repeat_interleave(counts)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        patch = torch.where(frame == NO_FRAME, 0, torch.arange(len(ids)) - starts).to(torch.int32)
        return Tokens(ids, torch.where(learn, ids, IGNORED), frame, patch)


@dataclass(frozen=True)
class ChatEncoder:
    """Samples and questions to tokens.

    Attributes:
        tokenizer: of the language model.
        tokens_per_frame: of the vision tower after pooling.
        schema: the text around them.
    """

    tokenizer: TextTokenizer
    tokens_per_frame: int
    schema: ChatSchema = field(default_factory=ChatSchema)

    def sample(self, sample: Sample, frame_counts: Sequence[int]) -> Tokens:
        """Tokens of a training sample; answers, with the token that ends them, are learnt.

        Args:
            sample: the sample.
            frame_counts: number of frames of each of its media, in order.

        Raises:
            ConfigError: not one count for each medium.
        """
        counts = _counts(sample.media, frame_counts)
        build = self._builder()
        if sample.form == "chat":
            build.text(self.schema.system_tag + self.schema.system, end=True)
        for turn in sample.turns:
            if sample.form == "interleaved":
                self._interleaved(build, turn, counts)
            else:
                self._turn(build, turn, counts)
        return build.finish()

    def question(self, turns: Sequence[Turn], frame_counts: Sequence[int], *, prefill: str = "") -> Tokens:
        """Tokens up to where the model's next answer begins; nothing is learnt.

        Args:
            turns: the conversation so far, a user's turn last.
            frame_counts: as in `sample`.
            prefill: the first words of the answer, given to the model.

        Raises:
            ConfigError: not one count for each medium.
        """
        counts = _counts([media for turn in turns for media in turn.media], frame_counts)
        build = self._builder()
        build.text(self.schema.system_tag + self.schema.system, end=True)
        for turn in turns:
            self._turn(build, turn, counts)
        build.text(self.schema.assistant_tag)
        build.text(prefill)
        tokens = build.finish()
        return Tokens(tokens.ids, torch.full_like(tokens.labels, IGNORED), tokens.frame, tokens.patch)

    def _builder(self) -> _Builder:
        return _Builder(self.tokenizer, self.tokens_per_frame)

    def _turn(self, build: _Builder, turn: Turn, counts: list[int]) -> None:
        """Tag and content are encoded apart: at inference the tag is where the prompt ends."""
        if turn.role == "assistant":
            build.text(self.schema.assistant_tag)
            build.text(turn.text, learn=True, end=True)
            return
        pending = self.schema.user_tag
        for part in turn.parts:
            if isinstance(part, Media):
                build.text(pending + self.schema.before_frames)
                self._frames(build, counts.pop(0))
                pending = self.schema.after_frames
            else:
                pending += part
        build.text(pending, end=True)

    def _interleaved(self, build: _Builder, turn: Turn, counts: list[int]) -> None:
        """A clip's frames, then its caption and the end token; what was asked is left out."""
        if turn.role == "assistant":
            build.text(turn.text, learn=True, end=True)
            return
        for _ in turn.media:
            self._frames(build, counts.pop(0))
            build.text(self.schema.after_frames)

    def _frames(self, build: _Builder, count: int) -> None:
        for index in range(count):
            if index:
                build.text(self.schema.between_frames)
            build.frame()


def _counts(media: Sequence[Media], frame_counts: Sequence[int]) -> list[int]:
    if len(media) != len(frame_counts):
        raise ConfigError(f"{len(media)} media need as many numbers of frames, got {list(frame_counts)}")
    return list(frame_counts)
