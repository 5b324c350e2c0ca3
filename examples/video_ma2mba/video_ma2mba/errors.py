"""What can go wrong with files, as types and values."""

from __future__ import annotations

from enum import StrEnum
from os import PathLike


class VideoMa2mbaError(Exception):
    """Base class of the errors of this package. Every message restates the input and says the remedy."""


class FormatError(VideoMa2mbaError, ValueError):
    """An annotation file, configuration or checkpoint is not in the format it should have."""


class ConfigError(VideoMa2mbaError, ValueError):
    """Settings that contradict each other or the data."""


class MissingPackageError(VideoMa2mbaError, ImportError):
    """A package that no extra of this one installs is missing, or too old.

    Args:
        module: what cannot be imported.
        requirement: what pip installs.
        purpose: what needs it.
    """

    def __init__(self, module: str, requirement: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {module!r}, which is not installed, or is too old. "
            f"Install it with: pip install '{requirement}'"
        )


class ProblemKind(StrEnum):
    """Why a sample cannot be used."""

    MISSING = "missing file"
    UNREADABLE = "unreadable file"
    NO_VIDEO = "no video stream"
    EMPTY = "no frame"
    DECODE = "decoding error"
    TRUNCATED = "truncated"
    RANGE = "clip outside the video"
    MALFORMED = "malformed record"
    TOO_LONG = "too long"
    NOTHING_TO_LEARN = "no answer"


class MediaError(VideoMa2mbaError):
    """A sample's file cannot be used.

    Args:
        kind: why.
        path: the file.
        detail: what was found.
    """

    def __init__(self, kind: ProblemKind, path: str | PathLike[str], detail: str) -> None:
        super().__init__(f"{kind}: {path}: {detail}")
        self.kind = kind
        self.path = str(path)
        self.detail = detail
