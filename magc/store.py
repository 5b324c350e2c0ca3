"""Checkpoint store: keeps tensors from the forward to the backward on the device, in host memory or on disk.

A store belongs to one forward and backward and owns all it holds; whatever way it ends (``close``, an
error, garbage collection, the end of the interpreter), its files are gone. Host memory for a GPU is pinned,
which takes about 0.4 s per GiB, so it comes from a ``PinnedPool`` that can outlive the store.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from magc.disk import CheckpointDirectory, DiskCheckpoint
from magc.errors import InputError, StoreError
from magc.offload import PinnedTensors, make_room
from magc.pinned import PinnedPool, indexed
from magc.rawbytes import compact, held_bytes, is_plain
from magc.tiers import Tier
from magc.tree import describe, version

__all__ = ["CheckpointStore", "PinnedPool"]


class CheckpointStore:
    """Checkpoints (lists of tensors) under keys, each on a tier. Not for use by several threads at a time.

    A checkpoint is a value: what ``put`` is given must not be written to while it is held, nor what ``get``
    returns. Gradients do not flow through the store. Bits, shape and dtype come back exactly, and strides
    too unless the tensor has gaps or overlaps (an expanded tensor, say), which comes back contiguous from
    the host and the disk.

    ``Tier.DEVICE`` keeps references, except that a tensor that is a view of part of a larger storage is
    cloned, so that it does not keep the larger one alive.

    ``Tier.HOST`` on a GPU copies to pinned memory and back on the current stream without blocking the host.
    A ``get`` on another stream than the ``put`` waits for it on the device; tensors that ``get`` returns
    belong to the stream it was called on. On a CPU the host *is* the device: as ``Tier.DEVICE``.

    ``Tier.DISK`` writes each checkpoint to a file of its own in a temporary directory, and blocks until
    that is done.

    Args:
        device: where checkpoints come from and return to; a CPU or CUDA device.
        disk_dir: an existing directory under which to make the temporary directory, best on a fast local
            disk with room. None means the system's (``tempfile.gettempdir()``), which may itself be memory.
        pool: pinned memory to use and return; None means a pool of the store's own. CUDA only.

    Raises:
        InputError: the device is neither CPU nor CUDA, or the pool is for another device.
        StoreError: ``disk_dir`` is not an existing directory; in methods: as they say, and after ``close``.
    """

    def __init__(
        self,
        device: torch.device,
        disk_dir: str | os.PathLike[str] | None = None,
        *,
        pool: PinnedPool | None = None,
    ) -> None:
        self.device = indexed(device)
        if self.device.type not in ("cpu", "cuda"):
            raise InputError(f"cannot store checkpoints of device {str(device)!r}: use a CPU or CUDA device.")
        if pool is not None and pool.device != self.device:
            raise InputError(f"got a pinned pool for {pool.device} and a store for {self.device}: use one device.")
        self._pool = pool
        self._directory = CheckpointDirectory(disk_dir)
        self._held: dict[Hashable, _Checkpoint] = {}
        self._bytes = dict.fromkeys(Tier, 0)
        self._finalizer = weakref.finalize(self, _discard_all, self._held, self._directory)

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device. A tensor held in several checkpoints counts each time."""
        return self._bytes[Tier.DEVICE]

    @property
    def host_bytes(self) -> int:
        """Bytes held in host memory, without what the pinned pool has to spare."""
        return self._bytes[Tier.HOST]

    @property
    def disk_bytes(self) -> int:
        """Bytes held on disk."""
        return self._bytes[Tier.DISK]

    def put(self, key: Hashable, tensors: Sequence[Tensor | None], tier: Tier) -> None:
        """Hold ``tensors`` under ``key`` on ``tier``.

        Raises:
            StoreError: the key is held already; a tensor is not on the store's device, is sparse, or is a
                subclass that only the device tier can hold; host memory cannot be pinned; the disk is full
                or fails (no part of a file stays).
        """
        self._check_open()
        tier = Tier(tier)
        if key in self._held:
            raise StoreError(f"checkpoint {key!r} is held already: drop it before it is put again.")
        for tensor in tensors:
            if tensor is not None:
                _refuse_unsuited(key, tensor, tier, self.device)
        values = [None if tensor is None else tensor.detach() for tensor in tensors]
        checkpoint: _Checkpoint
        if tier is Tier.DISK:
            checkpoint = DiskCheckpoint(repr(key), values, self._directory, self._staging_pool())
        elif tier is Tier.HOST and self.device.type == "cuda":
            checkpoint = _Pinned(values, self._host_pool())
        else:
            checkpoint = _Referenced(tier, [None if value is None else compact(value) for value in values])
        self._held[key] = checkpoint
        self._bytes[tier] += checkpoint.nbytes

    def fetch(self, key: Hashable) -> None:
        """Begin to bring the tensors under ``key`` back to the device; `get` returns them.

        The copy runs beside the work that is given to the current stream from now on (beside the caller, for files and
        a CPU). Nothing happens if the checkpoint is on the device, or was fetched already.

        Raises:
            StoreError: the key is not held.
        """
        self._find(key).fetch(self.device)

    def get(self, key: Hashable) -> list[Tensor | None]:
        """The tensors under ``key``, on ``device``; the checkpoint stays.

        Raises:
            StoreError: the key is not held, or its file cannot be read back.
        """
        return self._find(key).load(self.device)

    def pop(self, key: Hashable) -> list[Tensor | None]:
        """``get``, then ``drop``."""
        tensors = self.get(key)
        self.drop(key)
        return tensors

    def drop(self, key: Hashable) -> None:
        """Let go of the checkpoint under ``key`` and delete its file.

        Raises:
            StoreError: the key is not held.
        """
        checkpoint = self._find(key)
        del self._held[key]
        self._bytes[checkpoint.tier] -= checkpoint.nbytes
        checkpoint.discard()

    def close(self) -> None:
        """Let go of everything, and delete the files and their directory. May be called again."""
        self._finalizer()
        self._bytes = dict.fromkeys(Tier, 0)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, key: Hashable) -> _Checkpoint:
        self._check_open()
        try:
            return self._held[key]
        except KeyError:
            raise StoreError(
                f"no checkpoint {key!r} is held (of {len(self._held)}): it was never put, or was dropped."
            ) from None

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise StoreError("the checkpoint store is closed: make a new one for each forward and backward.")

    def _host_pool(self) -> PinnedPool:
        if self._pool is None:
            self._pool = PinnedPool(self.device)
        return self._pool

    def _staging_pool(self) -> PinnedPool | None:
        return self._host_pool() if self.device.type == "cuda" else None


class _Checkpoint(Protocol):
    """A held checkpoint."""

    @property
    def tier(self) -> Tier: ...
    @property
    def nbytes(self) -> int: ...
    def fetch(self, device: torch.device) -> None: ...
    def load(self, device: torch.device) -> list[Tensor | None]: ...
    def discard(self) -> None: ...


class _Referenced:
    """Tensors held by reference."""

    def __init__(self, tier: Tier, tensors: list[Tensor | None]) -> None:
        self.tier = tier
        self.nbytes = sum(held_bytes(tensor) for tensor in tensors if tensor is not None)
        self._tensors = tensors
        self._versions = [None if tensor is None else version(tensor) for tensor in tensors]

    def fetch(self, device: torch.device) -> None:
        """It is there."""

    def load(self, device: torch.device) -> list[Tensor | None]:
        for tensor, before in zip(self._tensors, self._versions, strict=True):
            if tensor is not None and version(tensor) != before:
                raise StoreError(
                    f"a checkpoint ({describe(tensor)}) was modified in place while it was held by reference: a layer keeps "
                    "a tensor that it returned and writes into it later (a preallocated output, say). Return a copy of "
                    "it, or keep checkpoints on the disk tier."
                )
        return list(self._tensors)

    def discard(self) -> None:
        self._tensors = []


class _Pinned:
    """Tensors copied to pinned memory."""

    tier = Tier.HOST

    def __init__(self, tensors: list[Tensor | None], pool: PinnedPool) -> None:
        self._pinned = PinnedTensors.copy(tensors, pool)
        self._arriving: tuple[list[Tensor | None], torch.cuda.Event] | None = None
        self.nbytes = sum(layout.nbytes for layout in self._pinned.layouts if layout is not None)

    def fetch(self, device: torch.device) -> None:
        if self._arriving is None:
            # Room on the current stream: what is let go of later is then used anew in that stream's order.
            tensors, raws = make_room(self._pinned.layouts, device)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
            self._arriving = tensors, self._pinned.copy_back(raws, ready)

    def load(self, device: torch.device) -> list[Tensor | None]:
        self.fetch(device)
        assert self._arriving is not None
        (tensors, there), self._arriving = self._arriving, None
        torch.cuda.current_stream(device).wait_event(there)
        return tensors

    def discard(self) -> None:
        self._arriving = None
        self._pinned.discard()


def _refuse_unsuited(key: Hashable, tensor: Tensor, tier: Tier, device: torch.device) -> None:
    if tensor.device != device:
        raise StoreError(
            f"checkpoint {key!r} has a tensor on {tensor.device}, the store is for {device}: move the tensor "
            "there, or keep it out of the checkpoint."
        )
    if tensor.layout is not torch.strided:
        raise StoreError(f"checkpoint {key!r} has a tensor of layout {tensor.layout}: make it dense first.")
    if tier is not Tier.DEVICE and not is_plain(tensor):
        raise StoreError(
            f"checkpoint {key!r} has a {type(tensor).__name__}, of which only references can be held: put it "
            f"on the device tier, not on the {tier} tier."
        )


def _discard_all(held: dict[Hashable, _Checkpoint], directory: CheckpointDirectory) -> None:
    for checkpoint in held.values():
        checkpoint.discard()
    held.clear()
    directory.remove()
