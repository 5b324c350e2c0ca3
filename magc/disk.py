"""Checkpoints on disk: the bytes of tensors in one file each, in a directory that is removed afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from magc.errors import StoreError
from magc.pinned import PIECE_BYTES, PinnedPool
from magc.rawbytes import Layout, allocated, laid_out, pieces
from magc.tiers import Tier
from magc.units import format_bytes


class CheckpointDirectory:
    """A temporary directory, made when its first file is."""

    def __init__(self, parent: str | os.PathLike[str] | None) -> None:
        self.parent = Path(tempfile.gettempdir() if parent is None else parent)
        if not self.parent.is_dir():
            raise StoreError(f"disk_dir {str(self.parent)!r} is no existing directory: make it, or pass another.")
        self._path: Path | None = None
        self._files = 0
        self._owner = os.getpid()

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

    def is_ours(self) -> bool:
        """False in a forked child (a data loader's worker, say): its copy of the store owns no file."""
        return os.getpid() == self._owner

    def remove(self) -> None:
        if self._path is not None and self.is_ours():
            shutil.rmtree(self._path, ignore_errors=True)


class DiskCheckpoint:
    """Tensors written to a file: their bytes one after another, without a header."""

    tier = Tier.DISK

    def __init__(
        self,
        name: str,
        path: Path,
        layouts: list[Layout | None],
        directory: CheckpointDirectory,
        pool: PinnedPool | None,
    ) -> None:
        self.nbytes = sum(layout.nbytes for layout in layouts if layout is not None)
        self._name = name
        self._path = path
        self._layouts = layouts
        self._directory = directory
        self._pool = pool

    @classmethod
    def write(
        cls, name: str, tensors: list[Tensor | None], directory: CheckpointDirectory, pool: PinnedPool | None
    ) -> DiskCheckpoint:
        nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        layouts: list[Layout | None] = []
        path: Path | None = None
        try:
            path = directory.new_file()
            with path.open("xb") as file, _Staging(pool, nbytes) as staging:
                for tensor in tensors:
                    if tensor is None:
                        layouts.append(None)
                        continue
                    layout, raw = laid_out(tensor)
                    layouts.append(layout)
                    for piece in staging.pieces(raw):
                        file.write(staging.to_host(piece).numpy().data)
        except BaseException as error:
            if path is not None:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StoreError(
                    f"cannot write checkpoint {name} of {format_bytes(nbytes)} ({nbytes} bytes) to "
                    f"{path or directory.parent}: {error.strerror or error}; {directory.free()} free there. "
                    "Pass another disk_dir, or use a plan with fewer checkpoints on disk."
                ) from error
            raise
        return cls(name, path, layouts, directory, pool)

    def load(self, device: torch.device) -> list[Tensor | None]:
        tensors: list[Tensor | None] = []
        try:
            with self._path.open("rb") as file, _Staging(self._pool, self.nbytes) as staging:
                for layout in self._layouts:
                    if layout is None:
                        tensors.append(None)
                        continue
                    tensor, raw = allocated(layout, device)
                    tensors.append(tensor)
                    for piece in staging.pieces(raw):
                        buffer = staging.buffer(piece)
                        if file.readinto(buffer.numpy().data) < piece.nbytes:
                            raise OSError("the file is shorter than what was written to it")
                        staging.to_device(buffer, piece)
        except OSError as error:
            raise StoreError(
                f"cannot read checkpoint {self._name} of {format_bytes(self.nbytes)} back from {self._path}: "
                f"{error.strerror or error}. Something else may have changed the file: pass a disk_dir that "
                "nothing cleans up."
            ) from error
        return tensors

    def discard(self) -> None:
        if self._directory.is_ours():
            self._path.unlink(missing_ok=True)


class _Staging:
    """Between files and tensors: nothing for CPU tensors, a pinned buffer for GPU tensors."""

    def __init__(self, pool: PinnedPool | None, nbytes: int) -> None:
        self._pool = pool
        self._block = None if pool is None else pool.take(min(nbytes, PIECE_BYTES), for_host=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None and self._block is not None:
            self._pool.give_back(self._block)

    def pieces(self, raw: Tensor) -> Iterator[Tensor]:
        if self._block is not None:
            yield from pieces(raw, PIECE_BYTES)
        elif raw.nbytes:
            yield raw

    def buffer(self, piece: Tensor) -> Tensor:
        return piece if self._block is None else self._block.memory[: piece.nbytes]

    def to_host(self, piece: Tensor) -> Tensor:
        return piece if self._block is None else self.buffer(piece).copy_(piece)

    def to_device(self, buffer: Tensor, piece: Tensor) -> None:
        if self._block is not None:
            piece.copy_(buffer)
