"""Which model a run's answers are of: by what its files hold, not by what its folder is called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from video_ma2mba.errors import FormatError
from video_ma2mba.model.folder import MODEL_FILES


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What decides a model's answers, the questions apart. Two models of one identity are the same model.

    Attributes:
        digest: of the model's files, see `digest_of_files`.
        dtype: of the parameters, in words.
        max_frames: most frames of a video; None for all.
    """

    digest: str
    dtype: str
    max_frames: int | None = None

    @classmethod
    def of_folder(cls, folder: str | PathLike[str], *, dtype: str, max_frames: int | None = None) -> Self:
        """The identity of a model in a folder: of its configuration, weights and tokenizer, every byte of them.

        Raises:
            FormatError: a file is missing.
        """
        return cls(digest_of_files(folder, MODEL_FILES), dtype, max_frames)

    @property
    def short(self) -> str:
        """For a report."""
        return f"{self.digest[:8]}, {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """As `run.json` and `result.json` hold it."""
        return asdict(self)


def digest_of_files(folder: str | PathLike[str], names: Sequence[str]) -> str:
    """SHA-256 over files of a folder, names and whole contents, in hexadecimal.

    Files are read in pieces, in memory that does not grow with them, at about 1 GB a second and core: 5 s for the 3.1B in
    bfloat16.

    Raises:
        FormatError: a file is missing.
    """
    whole = hashlib.sha256()
    for name in names:
        path = Path(folder) / name
        if not path.is_file():
            raise FormatError(f"{path} does not exist; give a model's folder, which holds {', '.join(names)}")
        with path.open("rb") as file:
            # A digest of each file by itself, so that no file can pass for the end of the one before.
            whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return whole.hexdigest()


def readable_name(folder: str | PathLike[str]) -> str:
    """The last two parts of a folder's path, "stage2/model": training calls every result `model`."""
    parts = Path(folder).resolve().parts[1:]
    return "/".join(parts[-2:])
