"""Files that grow by a JSON line at a time and survive a kill in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from video_ma2mba.errors import FormatError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none if there is no file; a last line that a kill left unfinished is cut off.

    Raises:
        FormatError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}: line {number} is not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise FormatError(f"{path}: line {number} must be an object, got a {type(record).__name__}")
        found.append(record)
    return found


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
