"""Processes that run a function as the ranks of a group; a hang is an error."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import spawn

RANKS = 2
SECONDS = 120.0
"""How long a function may take; a machine under load starts a process in a good part of it."""


class Ranks:
    """As many processes as there are ranks, started once and used by one test after another.

    Args:
        folder: where they meet.
        backend: of their group.
        ranks: how many there are.
    """

    def __init__(self, folder: Path, backend: str = "gloo", ranks: int = RANKS) -> None:
        context = multiprocessing.get_context("spawn")
        self.broken = False
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, backend, str(folder), there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """``work(rank, *args)`` on every rank.

        Args:
            work: a function of a module.
            args: what can be pickled.

        Returns:
            What each rank returned.

        Raises:
            AssertionError: a rank raised, or did not return in time.
        """
        for pipe in self._pipes:
            pipe.send((work, args))
        answers: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.close()
                raise AssertionError(f"rank {rank} hangs")
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        if failed:
            self.close()  # the other ranks may be anywhere
            raise AssertionError("\n".join(failed))
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        self.broken = True
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, ranks: int, backend: str, folder: str, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=SECONDS / 3),
    )
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * SECONDS)  # a rank that hangs tells where
        try:
            pipe.send((True, work(rank, *args)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        finally:
            faulthandler.cancel_dump_traceback_later()


def run_processes(work: Callable[..., None], *args: Any, seconds: float) -> None:
    """``work(rank, *args)`` in processes that end afterwards; they make a group themselves.

    Args:
        work: a function of a module.
        args: what can be pickled.
        seconds: how long it may take.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised.
        AssertionError: the ranks did not end in time.
    """
    context = spawn(work, args=args, nprocs=RANKS, join=False)
    end = time.monotonic() + seconds
    while not context.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() < end:
            continue
        for process in context.processes:
            process.kill()
        raise AssertionError(f"{work.__name__} has not ended after {seconds:g} s")
