"""A process of its own that measures cases, so that a case that brings it down is a result and the rest goes on.

One process measures as many cases as it can: starting it, making a model and measuring its layers take longer than most
cases do. A new one is started after an error, and after a case ran out of memory that did not come back.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

import torch

from magc.bench.cases import Case
from magc.bench.profiling import record
from magc.bench.result import Facts, Result, Status
from magc.bench.trace import Profile
from magc.bench.work import Effort, Progress, Workbench
from magc.errors import MagcError

_CLOSING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked for: a case measured, or profiled."""

    case: Case
    effort: Effort
    profile: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What it found.

    Attributes:
        result: of the case; of a profile only if there is none.
        healthy: whether the process can go on.
        profile: if it was asked for.
    """

    result: Result | None
    healthy: bool
    profile: Profile | None = None


def serve(link: Connection, device: str) -> None:
    """The process: says where it runs, then answers tasks until there are no more. News go out as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    where = torch.device(device)
    workbench = Workbench(where)
    link.send(Facts.here(where))
    while True:
        try:
            task: Task = link.recv()
        except EOFError:
            return
        link.send(_answer(workbench, task, link.send))


def _end_with_parent() -> None:
    """Not to go on with a long case for nobody, and hold the GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(workbench: Workbench, task: Task, progress: Progress) -> Answer:
    try:
        if task.profile:
            return Answer(None, True, record(workbench, task.case, task.effort.disk_dir, progress))
        result = workbench.measure(task.case, task.effort, progress)
    except Exception as error:
        # Whatever it is: the other cases are measured nevertheless, and this one's row says why not.
        if not isinstance(error, MagcError):
            traceback.print_exc()
        message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return Answer(Result(case=task.case, status=Status.FAILED, message=message), healthy=False)
    healthy = result.status is not Status.FAILED and (result.status is not Status.OUT_OF_MEMORY or workbench.is_clean())
    return Answer(result, healthy)


class Worker:
    """Measures cases in another process, which is started when it is needed.

    Args:
        device: where models run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: BaseProcess | None = None
        self._link: Connection | None = None
        self._facts: Facts | None = None
        self.started = 0
        """Processes so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kill=kind is not None)

    @property
    def pid(self) -> int | None:
        """Of the process, if one runs."""
        return None if self._process is None else self._process.pid

    def facts(self) -> Facts:
        """Where it runs.

        Raises:
            RuntimeError: the process ended before it could say.
        """
        self._start()
        assert self._facts is not None
        return self._facts

    def measure(self, case: Case, effort: Effort, progress: Progress) -> Result:
        """Measure a case; any end of it is a result. One that takes longer than ``effort.seconds_left`` is stopped."""
        answer = self._ask(Task(case, effort), progress)
        assert answer.result is not None
        return answer.result

    def profile(self, case: Case, effort: Effort, progress: Progress) -> Profile | Result:
        """Profile a case; a result if that did not work."""
        answer = self._ask(Task(case, effort, profile=True), progress)
        found = answer.profile or answer.result
        assert found is not None
        return found

    def close(self, *, kill: bool = False) -> None:
        """End the process; at once, or when it has nothing more to do."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            if not kill:
                self._process.join(_CLOSING_SECONDS)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
        self._process = self._link = None

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._link, theirs = context.Pipe()
        process = self._process = context.Process(target=serve, args=(theirs, str(self._device)), daemon=True)
        process.start()
        theirs.close()
        self.started += 1
        try:
            self._facts = self._link.recv()
        except EOFError:
            raise RuntimeError(f"the process that measures could not start: it {self._ended()}") from None

    def _ask(self, task: Task, progress: Progress) -> Answer:
        deadline = time.monotonic() + task.effort.seconds_left
        self._start()
        assert self._link is not None
        try:
            self._link.send(replace(task, effort=replace(task.effort, seconds_left=deadline - time.monotonic())))
            while self._wait(deadline):
                news: str | Answer = self._link.recv()
                if isinstance(news, Answer):
                    if not news.healthy:
                        self.close(kill=True)
                    return news
                progress(news)
        except (EOFError, ConnectionError):
            message = f"the process that measured it {self._ended()}"
            return Answer(Result(case=task.case, status=Status.FAILED, message=message), healthy=False)
        self.close(kill=True)
        return Answer(Result(case=task.case, status=Status.POSTPONED, message="stopped: the time is up"), healthy=False)

    def _wait(self, deadline: float) -> bool:
        """Wait for news; whether there are any before the deadline."""
        assert self._link is not None
        return self._link.poll(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))

    def _ended(self) -> str:
        """How the process ended."""
        process = self._process
        assert process is not None
        process.join()
        code = process.exitcode or 0
        self.close(kill=True)
        if code >= 0:
            return f"ended with exit status {code}"
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (", which is what a host without memory sends" if name == "SIGKILL" else "")
