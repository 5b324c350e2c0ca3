"""Pinned host memory that is reused: pinning costs about 0.4 s per GiB, so it should happen once.

PyTorch rounds each pinned allocation up to a power of two. Blocks are therefore packed into slabs that are
powers of two, and large tensors are cut into pieces, so that little is lost at the end of a slab.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from magc.errors import InputError, StoreError
from magc.ranges import FreeRanges, Range
from magc.units import format_bytes

PIECE_BYTES = 32 << 20
"""Largest block worth asking for."""

_SMALLEST_SLAB_BYTES = 2 << 20
_LARGEST_SLAB_BYTES = 256 << 20
_ALIGNMENT = 512

Uses = dict[torch.cuda.Stream, tuple[int, torch.cuda.Event]]
"""The last copy to or from a block on each stream: a number that grows with time, and its event."""


class PinnedPool:
    """Pinned host memory for one GPU, shared by the checkpoints of any number of stores.

    Memory is pinned when first needed and kept until the pool is garbage. What comes back is one piece with what is free
    beside it, so that checkpoints of other sizes find room in the memory that others have left.

    Args:
        device: the CUDA device whose streams copy to and from this memory.

    Raises:
        InputError: the device is not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = indexed(device)
        if self.device.type != "cuda":
            raise InputError(f"host memory is pinned for CUDA devices only, not for {str(device)!r}.")
        self._lock = threading.Lock()
        self._slabs: list[Tensor] = []
        self._free = FreeRanges[torch.cuda.Stream, torch.cuda.Event]()
        self._serials = count()
        # Blocks come back from finalizers too, which run at any moment: only this queue may be touched then.
        self._returned: deque[PinnedBlock] = deque()

    @cached_property
    def out(self) -> torch.cuda.Stream:
        """For copies to the host."""
        return torch.cuda.Stream(self.device)

    @cached_property
    def back(self) -> torch.cuda.Stream:
        """For copies to the device."""
        return torch.cuda.Stream(self.device)

    @property
    def reserved_bytes(self) -> int:
        """Bytes pinned, in use or not."""
        return sum(slab.nbytes for slab in self._slabs)

    def take(self, nbytes: int, *, for_host: bool = False) -> PinnedBlock:
        """A block of at least ``nbytes`` that the current stream may write to, or the host at once if ``for_host``.

        Raises:
            StoreError: no more memory can be pinned.
        """
        size = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            while self._returned:
                block = self._returned.popleft()
                self._free.give_back(Range(block.slab, block.start, block.memory.nbytes, block.uses))
            found = self._free.take(size) or self._free.take(self._pin(size))
            assert found is not None
        stream = torch.cuda.current_stream(self.device)
        for used_on, (_, event) in found.uses.items():
            if for_host:
                event.synchronize()
            elif used_on != stream:
                stream.wait_event(event)
        # With its old uses: given back unused, it is as it was. Those of whoever uses it come after them.
        return PinnedBlock(self._slabs[found.piece][found.start : found.stop], found.piece, found.start, found.uses)

    def give_back(self, block: PinnedBlock) -> None:
        """Return a block; its ``uses`` say what must be over before it is used again."""
        self._returned.append(block)

    def record_use(self, stream: torch.cuda.Stream) -> tuple[int, torch.cuda.Event]:
        """What is done on a stream up to now, as a block's ``uses`` hold it."""
        event = torch.cuda.Event()
        event.record(stream)
        return next(self._serials), event

    def _pin(self, size: int) -> int:
        """Pin a slab that holds ``size`` bytes; returns ``size``."""
        grown = min(max(self.reserved_bytes, _SMALLEST_SLAB_BYTES), _LARGEST_SLAB_BYTES)
        nbytes = 1 << (max(size, grown) - 1).bit_length()
        try:
            slab = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise StoreError(
                f"cannot pin {format_bytes(nbytes)} of host memory beside "
                f"{format_bytes(self.reserved_bytes)} pinned already ({error}). Use a plan with fewer "
                "checkpoints on the host, or a smaller host budget."
            ) from error
        self._slabs.append(slab)
        self._free.add(nbytes)
        return size


@dataclass(slots=True)
class PinnedBlock:
    """A part of a slab, with the last copy to or from it on each stream."""

    memory: Tensor
    slab: int
    start: int
    uses: Uses = field(default_factory=Uses)


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as the tensors on it name it."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
