"""What a measurement found, and the file that holds all of them."""

from __future__ import annotations

import enum
import json
import os
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from magc.bench.cases import Case
from magc.demo.report import Machine
from magc.errors import InputError


class Status(enum.StrEnum):
    """How a measurement ended."""

    OK = "ok"
    OUT_OF_MEMORY = "out of memory"
    NO_PLAN = "no plan fits"
    TOO_SLOW = "too slow"
    SKIPPED = "skipped"
    FAILED = "failed"
    POSTPONED = "postponed"
    """There is no time for it in this run; never in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a measurement found; without a peak and seconds where it did not end well.

    Attributes:
        case: what was measured.
        status: how it ended.
        message: more of that; for ``ok`` which cells could not run as CUDA graphs, and why.
        peak_bytes: over weights and gradient buffers (`magc.bench.peak.Peak.over_gradients`).
        gross_bytes: the same with gradient buffers.
        gradient_bytes: gradient buffers.
        delivered_bytes: over weights, the delivery of gradients included.
        seconds: of each timed step.
        predicted_bytes: what the planner says of ``peak_bytes``, for any plan.
        predicted_gross_bytes: the same of ``gross_bytes``.
        predicted_seconds: of a step.
        expected_seconds: of a step that was too slow to run.
        host_bytes, disk_bytes: what the planner says of checkpoints in host memory and on disk.
        pinned_bytes: host memory that was pinned, for earlier cases too.
        plan: in words.
    """

    case: Case
    status: Status
    message: str = ""
    peak_bytes: int | None = None
    gross_bytes: int | None = None
    gradient_bytes: int | None = None
    delivered_bytes: int | None = None
    seconds: tuple[float, ...] = ()
    predicted_bytes: int | None = None
    predicted_gross_bytes: int | None = None
    predicted_seconds: float | None = None
    expected_seconds: float | None = None
    host_bytes: int = 0
    disk_bytes: int = 0
    pinned_bytes: int = 0
    plan: str = ""

    @property
    def median_seconds(self) -> float | None:
        """Of a step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """By the median step."""
        return self.case.tokens / seconds if (seconds := self.median_seconds) else None


@dataclass(frozen=True, slots=True)
class Facts:
    """Where and when a measurement was made; nothing that names the machine.

    Attributes:
        device: its name.
        versions: of what bears on the numbers, by name.
        commit: of the checkout that the package runs from, with a ``+`` if files differ; None elsewhere.
        date: in UTC.
        command: that measured it, folders left out.
    """

    device: str
    versions: dict[str, str]
    commit: str | None
    date: str
    command: str = ""

    @classmethod
    def here(cls, device: torch.device) -> Facts:
        """Those of this process."""
        machine = Machine.here(device)
        versions = {"python": machine.python, "torch": machine.torch}
        if torch.version.cuda is not None:
            versions["cuda"] = torch.version.cuda
        for name in ("triton", "magc"):
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        if device.type == "cpu":
            versions["threads"] = str(machine.threads)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(machine.device, versions, _commit(Path(__file__).parents[1]), now)

    def is_same_run(self, other: Facts, *, any_commit: bool = False) -> bool:
        """Whether the other's results are those that one would measure here: the same device and commit."""
        return self.device == other.device and (any_commit or self.commit == other.commit)

    def __str__(self) -> str:
        """One line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device}; {versions}; commit {self.commit or 'unknown'}; {self.date[:10]}"


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's checkout.
    if not git("ls-files", "--", str(folder / "__init__.py")):
        return None
    commit = git("rev-parse", "--short=10", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the file."""

    result: Result
    facts: Facts

    def as_json(self) -> str:
        """One line."""
        values = {**asdict(self.result), "facts": asdict(self.facts)}
        return json.dumps({"case": self.result.case.as_dict(), **{k: v for k, v in values.items() if k != "case"}})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Back from `as_json`.

        Raises:
            ValueError: it is not such a line.
        """
        try:
            values: dict[str, Any] = json.loads(line)
            facts = Facts(**values.pop("facts"))
            case = Case.from_dict(values.pop("case"))
            status, seconds = Status(values.pop("status")), tuple(values.pop("seconds"))
            return cls(Result(case=case, status=status, seconds=seconds, **values), facts)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a result ({error})") from error


class ResultsFile:
    """A file of results, a line each: it only grows, so a run that is cut off loses at most the case at work.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[list[Record], str | None]:
        """All results, and what there is to say of the file: a last line that was cut off is left out.

        Raises:
            InputError: the file cannot be read, or another line is no result.
        """
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return [], None
        except OSError as error:
            raise InputError(f"cannot read {self.path} ({error.strerror})") from error
        records: list[Record] = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(Record.from_json(line))
            except ValueError as error:
                if number < len(lines):
                    raise InputError(
                        f"{self.path}, line {number}: {error}; remove the line, or give another file"
                    ) from error
                return records, f"{self.path}: the last line was cut off and is left out"
        return records, None

    def append(self, record: Record) -> None:
        """Add a result, and have it on the disk when this returns; a last line that was cut off is replaced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                tail = data[len(whole) :]
                file.truncate(len(whole))
                if _is_result(tail):
                    file.write(tail + b"\n")
            file.write(record.as_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _is_result(line: bytes) -> bool:
    try:
        Record.from_json(line.decode())
    except ValueError:
        return False
    return True


def latest(records: Iterable[Record]) -> list[Record]:
    """The last result of every case and device, in the order of first appearance."""
    found: dict[tuple[str, Case], Record] = {}
    for record in records:
        found[record.facts.device, record.result.case] = record
    return list(found.values())


def ran_out_of_memory(results: Sequence[Result], case: Case) -> int | None:
    """The shortest length below the case's at which its series ran out of memory."""
    lengths = [
        result.case.tokens
        for result in results
        if result.status is Status.OUT_OF_MEMORY and result.case.series == case.series
    ]
    return min((length for length in lengths if length < case.tokens), default=None)
