"""What a run tells: a JSON line per event, a progress bar, optional TensorBoard files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from magc.errors import MissingExtraError
from video_ma2mba.data.loader import Problem
from video_ma2mba.errors import ProblemKind
from video_ma2mba.evaluation.jsonl import append_line, read_lines
from video_ma2mba.training.config import LogConfig


class RunLog(AbstractContextManager["RunLog"]):
    """The log of a run, on the rank that writes it; elsewhere it is silent.

    Every line has an `event` and the number of steps that were done: `start`, `plan`, `problem`, `step`, `checkpoint`,
    `stop`, `end`. A run that goes on from a checkpoint takes back the lines after it, so the file reads as one run.

    Args:
        folder: of the run.
        config: what is told.
        steps: of the whole run.
        done: steps done before; later lines are taken back.
        speaks: whether this rank writes.

    Raises:
        MissingExtraError: TensorBoard is wanted but not installed.
    """

    def __init__(self, folder: Path, config: LogConfig, *, steps: int, done: int, speaks: bool) -> None:
        self._path = folder / "log.jsonl"
        self._speaks, self._shows = speaks, speaks and config.progress
        self._told: set[Problem] = set()
        self._board = _board(folder / "tensorboard", done) if config.tensorboard and speaks else None
        self._folder, self._steps, self._done = folder, steps, done

    def __enter__(self) -> RunLog:
        self._bar = tqdm(
            total=self._steps, initial=self._done, unit=" steps", desc=self._folder.name, disable=not self._shows
        )
        if self._speaks:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_back(self._done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def event(self, name: str, step: int, **values: Any) -> None:
        """Write a line."""
        if self._speaks:
            append_line(self._path, {"event": name, "step": step, **values})

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a step's line, and show it."""
        self.event("step", step, **values)
        self._bar.update()
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", norm=f"{values['norm']:.3g}")
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, step)

    def problems(self, step: int, found: Iterable[Problem]) -> None:
        """Write samples that could not be used, each once."""
        for problem in found:
            if self._speaks and problem not in self._told:
                self._told.add(problem)
                self.event(
                    "problem",
                    step,
                    sample=problem.sample,
                    kind=str(problem.kind),
                    path=problem.path,
                    detail=problem.detail,
                    index=problem.index,
                )
                if self._shows:
                    tqdm.write(f"left out: sample {problem.sample}: {problem.kind}: {problem.path}: {problem.detail}")

    def _take_back(self, done: int) -> None:
        # Without a checkpoint a run begins anew, and so does its log.
        before = read_lines(self._path) if done else []
        lines = [line for line in before if line["step"] <= done and line["event"] not in ("stop", "end")]
        self._told = {
            Problem(line["sample"], ProblemKind(line["kind"]), line["path"], line["detail"], line.get("index"))
            for line in lines
            if line["event"] == "problem"
        }
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(self._path)


def step_losses(folder: Path) -> tuple[float, ...]:
    """The losses of all steps of a run, from its log."""
    return tuple(line["loss"] for line in read_lines(folder / "log.jsonl") if line["event"] == "step")


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "log.tensorboard=true") from error
    return SummaryWriter(folder, purge_step=done + 1)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        else:
            found.append((prefix + name, float(value)))
    return found
