"""Token sequences and their frames in the form magc's grid asks for them: one segment at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from video_ma2mba.data.chat import IGNORED, NO_FRAME, Tokens
from video_ma2mba.data.frames import Frames, JoinedFrames
from video_ma2mba.errors import ConfigError


class Segment(TypedDict):
    """What the stem gets of the tokens of one segment; every tensor has the segment's length in axis 1, as magc asks.

    ids: `(batch, length)` int64.
    frame: `(batch, length)` int64: which of the segment's frames, `NO_FRAME` for text.
    patch: `(batch, length)` int64: which of the frame's tokens.
    pixels: `(frames, length, bytes)` uint8: the frames that the segment touches, see `pack_frames`.
    """

    ids: Tensor
    frame: Tensor
    patch: Tensor
    pixels: Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """A sample, ready to be learnt."""

    id: str
    tokens: Tokens
    frames: Frames


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of a training step.

    Attributes:
        ids: of the samples.
        inputs: all tokens but the last.
        targets: `(batch, length)` int64: the token to predict at each position, or `IGNORED`.
    """

    ids: tuple[str, ...]
    inputs: VideoTokens
    targets: Tensor


class VideoTokens:
    """Token ids with the frames they refer to, as a `magc.Segmented`.

    A segment holds the frames that its tokens touch, whole, as bytes: a frame whose tokens a border cuts is in both
    segments. On the device that is 2,352 bytes a token at 336 x 336 pixels, less than half of an embedding of 2,560
    numbers in bf16; no more than a segment's frames are ever there.

    Args:
        rows: sequences of equal or different lengths; the shorter ones are padded at their ends.
        frames: of each row.
        pad: id of padding.
        multiple: the length is padded to a multiple of this.
    """

    def __init__(self, rows: Sequence[Tokens], frames: Sequence[Frames], *, pad: int = 0, multiple: int = 1) -> None:
        if not rows or len(rows) != len(frames):
            raise ConfigError(
                f"a batch needs rows, and frames for each; got {len(rows)} rows and {len(frames)} of frames"
            )
        numbered: list[Tensor] = []
        count = 0
        for row, source in zip(rows, frames, strict=True):
            last = int(row.frame.max()) if len(row) else NO_FRAME
            if last >= len(source):
                raise ConfigError(f"the tokens refer to frame {last}, but there are {len(source)}")
            numbered.append(torch.where(row.frame == NO_FRAME, NO_FRAME, row.frame + count))
            count += len(source)
        self._ids = _padded([row.ids for row in rows], pad, multiple)
        self._frame = _padded(numbered, NO_FRAME, multiple)
        self._patch = _padded([row.patch for row in rows], 0, multiple)
        self._frames = frames[0] if len(frames) == 1 else JoinedFrames(frames)

    def __len__(self) -> int:
        return self._ids.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._ids.shape[0]

    @property
    def frames(self) -> int:
        """Number of frames of all sequences."""
        return len(self._frames)

    def segment(self, start: int, stop: int) -> Segment:
        """See `Segment`."""
        frame = self._frame[:, start:stop].to(torch.int64)
        used = frame.unique()
        used = used[used != NO_FRAME]
        local = torch.searchsorted(used, frame) if used.numel() else torch.zeros_like(frame)
        return Segment(
            ids=self._ids[:, start:stop],
            frame=torch.where(frame == NO_FRAME, NO_FRAME, local),
            patch=self._patch[:, start:stop].to(torch.int64),
            pixels=pack_frames(self._read(used), stop - start),
        )

    def _read(self, numbers: Tensor) -> Tensor | None:
        """The frames of ascending numbers, read in runs of neighbours."""
        wanted = numbers.tolist()
        pieces: list[Tensor] = []
        first = 0
        for index in range(1, len(wanted) + 1):
            if index == len(wanted) or wanted[index] != wanted[index - 1] + 1:
                pieces.append(self._frames.read(wanted[first], wanted[index - 1] + 1))
                first = index
        return torch.cat(pieces) if pieces else None


def pack_frames(pixels: Tensor | None, length: int) -> Tensor:
    """Frames as a tensor that has `length` entries in axis 1, which magc asks of all inputs of a segment.

    Args:
        pixels: `(frames, size, size, 3)` uint8, or None for no frame.
        length: tokens of the segment.

    Returns:
        `(frames, length, bytes)` uint8: a frame's bytes in order, with zeros to fill up the last rows.
    """
    if pixels is None:
        return torch.empty((0, length, 1), dtype=torch.uint8)
    flat = pixels.flatten(1)
    width = -(-flat.shape[1] // length)
    return functional.pad(flat, (0, width * length - flat.shape[1])).view(len(flat), length, width)


def unpack_frames(packed: Tensor, size: int) -> Tensor:
    """The `(frames, size, size, 3)` uint8 that `pack_frames` was given; a view where it can be."""
    if not len(packed):
        return packed.new_empty((0, size, size, 3))
    return packed.flatten(1)[:, : size * size * 3].unflatten(1, (size, size, 3))


def collate(examples: Sequence[Example], *, pad: int = 0, multiple: int = 1) -> Batch:
    """Examples as the inputs and targets of a training step: at each position the next token is to be predicted.

    Args:
        examples: of any lengths.
        pad: id of padding.
        multiple: lengths are padded to a multiple of this, so that few different ones occur: `magc.GridCheckpoint` with
            a budget measures and plans once for each.
    """
    inputs = VideoTokens(
        [example.tokens.split(len(example.tokens) - 1)[0] for example in examples],
        [example.frames for example in examples],
        pad=pad,
        multiple=multiple,
    )
    targets = _padded([example.tokens.labels[1:] for example in examples], IGNORED, multiple)
    return Batch(tuple(example.id for example in examples), inputs, targets)


def _padded(rows: Sequence[Tensor], value: int, multiple: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up at their ends."""
    whole = pad_sequence(list(rows), batch_first=True, padding_value=value)
    return functional.pad(whole, (0, -whole.shape[1] % multiple), value=value)
