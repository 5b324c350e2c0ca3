"""Text that every machine has: the source files of Python's standard library, as bytes."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from magc.errors import InputError

SEPARATOR = 256
"""The token between files; bytes are tokens 0 to 255."""
VOCABULARY = 257

_HELD_OUT_EVERY = 10
# Not the library itself; and tables of code points, which are hardly text.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files split into those trained on and those held out.

    Attributes:
        root: the folder.
        train: files to train on, in the order of training.
        held_out: the others, never trained on.
    """

    root: Path
    train: tuple[Path, ...]
    held_out: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path | None, seed: int) -> Corpus:
        """The ``*.py`` files below ``root`` (None: the standard library), every tenth by name held out.

        The split does not depend on the seed, the order of training does.

        Raises:
            InputError: there is no such folder, or fewer than two files in it.
        """
        own = root is None
        root = Path(sysconfig.get_path("stdlib")) if root is None else root
        remedy = "give a folder of *.py files with --corpus DIR"
        if not root.is_dir():
            what = "Python's standard library is not a folder here" if own else "there is no such folder"
            raise InputError(f"{root}: {what}; {remedy}")
        files = sorted(_source_files(root), key=lambda path: path.relative_to(root).as_posix())
        if len(files) < 2:
            raise InputError(f"{root}: found {len(files)} source files, need at least 2, one to hold out; {remedy}")
        train = [path for index, path in enumerate(files) if index % _HELD_OUT_EVERY]
        random.Random(seed).shuffle(train)
        return cls(root, tuple(train), tuple(files[::_HELD_OUT_EVERY]))

    def training_tokens(self, count: int) -> Tensor:
        """The first ``count`` tokens of the training files, a separator before each; fewer if there are not so many.

        Returns:
            Shape ``(tokens,)``, int64.
        """
        parts: list[Tensor] = []
        total = 0
        for path in self.train:
            if total >= count:
                break
            parts.append(tokens_of(path))
            total += len(parts[-1])
        return torch.cat(parts)[:count]

    def draw_held_out(self, total_bytes: int) -> list[Path]:
        """Whole held-out files, drawn until they have ``total_bytes`` together; the same ones every time."""
        files = list(self.held_out)
        random.Random(0).shuffle(files)
        drawn: list[Path] = []
        size = 0
        for path in files:
            if size >= total_bytes:
                break
            drawn.append(path)
            size += path.stat().st_size
        return drawn

    def names(self, paths: Sequence[Path]) -> list[str]:
        """Relative to the folder."""
        return [path.relative_to(self.root).as_posix() for path in paths]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file() and path.stat().st_size:
                yield path


def tokens_of(path: Path) -> Tensor:
    """A separator, then the file's bytes.

    Returns:
        Shape ``(bytes + 1,)``, int64.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a readable folder with --corpus DIR") from error
    tokens = torch.empty(len(data) + 1, dtype=torch.int64)
    tokens[0] = SEPARATOR
    if data:
        tokens[1:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tokens


def windows(tokens: Tensor, seq_len: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` training examples one after another through the text, from its start again where it ends.

    Args:
        tokens: shape ``(length,)``.
        seq_len: tokens of an example.
        count: number of examples.

    Returns:
        Inputs and targets, each a view of ``tokens`` of shape ``(1, seq_len)``; a target is the next token.

    Raises:
        InputError: the text is too short for one example.
    """
    whole = (len(tokens) - 1) // seq_len
    if whole < 1:
        raise InputError(
            f"the corpus has {len(tokens)} bytes to train on, too few for a sequence of {seq_len} and its next byte; "
            f"give a smaller --seq-len or a larger --corpus"
        )
    starts = [index % whole * seq_len for index in range(count)]
    return [(tokens[start : start + seq_len][None], tokens[start + 1 : start + seq_len + 1][None]) for start in starts]
