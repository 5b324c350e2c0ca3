"""Checkpoints on disk: the bytes of tensors in one file each, in a directory that is removed afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from magc.errors import StoreError
from magc.offload import PinnedTensors, make_room
from magc.pinned import PinnedPool
from magc.rawbytes import laid_out
from magc.tiers import Tier
from magc.units import format_bytes

T = TypeVar("T")

_WRITES_BEHIND = 2


class CheckpointDirectory:
    """A temporary directory, made when its first file is."""

    def __init__(self, parent: str | os.PathLike[str] | None) -> None:
        self.parent = Path(tempfile.gettempdir() if parent is None else parent)
        if not self.parent.is_dir():
            raise StoreError(f"disk_dir {str(self.parent)!r} is no existing directory: make it, or pass another.")
        self._path: Path | None = None
        self._files = 0
        self._owner = os.getpid()
        self._thread: ThreadPoolExecutor | None = None
        self._writes: deque[Future[None]] = deque()

    def new_file(self) -> Path:
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="magc-", dir=self.parent))
        self._files += 1
        return self._path / f"{self._files}.bin"

    def free(self) -> str:
        try:
            return format_bytes(shutil.disk_usage(self.parent).free)
        except OSError:
            return "an unknown number of bytes"

    def read(self, job: Callable[[], T]) -> Future[T]:
        """Let the thread do this after what it was given before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="magc-disk")
        return self._thread.submit(job)

    def write(self, job: Callable[[], None]) -> Future[None]:
        """As `read`, but wait while the thread is `_WRITES_BEHIND` jobs behind: what it will write takes pinned memory.

        Raises:
            StoreError: an earlier one of these failed.
        """
        while len(self._writes) >= _WRITES_BEHIND or (self._writes and self._writes[0].done()):
            self._writes.popleft().result()
        self._writes.append(self.read(job))
        return self._writes[-1]

    def is_ours(self) -> bool:
        """False in a forked child (a data loader's worker, say): its copy of the store owns no file."""
        return os.getpid() == self._owner

    def remove(self) -> None:
        if self._thread is not None and self.is_ours():
            self._thread.shutdown(cancel_futures=True)
        if self._path is not None and self.is_ours():
            shutil.rmtree(self._path, ignore_errors=True)


class DiskCheckpoint:
    """Tensors written to a file: their bytes one after another, without a header.

    A thread reads files. Tensors of a CPU are written by the caller; those of a GPU go to pinned memory beside the work,
    and the thread writes them from there.
    """

    tier = Tier.DISK

    def __init__(
        self,
        name: str,
        tensors: list[Tensor | None],
        directory: CheckpointDirectory,
        pool: PinnedPool | None,
    ) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self._name = name
        self._directory = directory
        self._pool = pool
        self._arriving: tuple[list[Tensor | None], Future[torch.cuda.Event | None]] | None = None
        self._written: Future[None] | None = None
        try:
            self._path = directory.new_file()
        except OSError as error:
            raise self._cannot_write(directory.parent, error) from error
        if pool is None:
            laid = [None if tensor is None else laid_out(tensor) for tensor in tensors]
            self._layouts = [None if each is None else each[0] for each in laid]
            self._write([each[1] for each in laid if each is not None])
        else:
            pinned = PinnedTensors.copy(tensors, pool)
            self._layouts = pinned.layouts
            self._written = directory.write(lambda: self._write(pinned.host_pieces()))
            self._written.add_done_callback(lambda _: pinned.discard())

    def _write(self, pieces: Iterable[Tensor]) -> None:
        try:
            with self._path.open("xb") as file:
                for piece in pieces:
                    file.write(piece.numpy().data)
        except BaseException as error:
            self._path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._cannot_write(self._path, error) from error
            raise

    def fetch(self, device: torch.device) -> None:
        if self._arriving is not None:
            return
        tensors, raws = make_room(self._layouts, device)
        ready = None
        if self._pool is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        self._arriving = tensors, self._directory.read(lambda: self._read(raws, ready))

    def load(self, device: torch.device) -> list[Tensor | None]:
        if self._written is not None and self._written.done():
            self._written.result()
        self.fetch(device)
        assert self._arriving is not None
        (tensors, reading), self._arriving = self._arriving, None
        there = reading.result()
        if there is not None:
            torch.cuda.current_stream(device).wait_event(there)
        return tensors

    def _read(self, raws: list[Tensor], ready: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Fill the room that was made, as soon as it is ready; returns when a GPU's will be full."""
        try:
            if self._written is not None:
                self._written.result()
            if self._pool is None or ready is None:
                self._read_into(raws)
                return None
            pinned = PinnedTensors.room(self._layouts, self._pool)
            try:
                self._read_into(pinned.host_pieces())
                return pinned.copy_back(raws, ready)
            finally:
                pinned.discard()
        finally:
            raws.clear()  # the thread may hold this job a moment longer than its caller holds the tensors

    def _read_into(self, pieces: Iterable[Tensor]) -> None:
        try:
            with self._path.open("rb") as file:
                for piece in pieces:
                    if piece.nbytes and file.readinto(piece.numpy().data) < piece.nbytes:
                        raise OSError("the file is shorter than what was written to it")
        except OSError as error:
            raise StoreError(
                f"cannot read checkpoint {self._name} of {format_bytes(self.nbytes)} back from {self._path}: "
                f"{error.strerror or error}. Something else may have changed the file: pass a disk_dir that "
                "nothing cleans up."
            ) from error

    def discard(self) -> None:
        if not self._directory.is_ours():
            return
        reading = None if self._arriving is None else self._arriving[1]
        for begun in (self._written, reading):
            if begun is not None and not begun.cancel():
                begun.exception()  # waits
        self._arriving = None
        self._path.unlink(missing_ok=True)

    def _cannot_write(self, where: Path, error: OSError) -> StoreError:
        return StoreError(
            f"cannot write checkpoint {self._name} of {format_bytes(self.nbytes)} ({self.nbytes} bytes) to "
            f"{where}: {error.strerror or error}; {self._directory.free()} free there. "
            "Pass another disk_dir, or use a plan with fewer checkpoints on disk."
        )
