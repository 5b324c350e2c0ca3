"""What the commands have in common: what goes wrong is a line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from magc.errors import MagcError
from video_ma2mba.errors import VideoMa2mbaError


@contextmanager
def errors_as_lines() -> Generator[None]:
    """End the process with `error: ...` and exit status 1 where this package or magc raises an error of its own."""
    try:
        yield
    except (VideoMa2mbaError, MagcError) as error:
        sys.exit(f"error: {error}")
