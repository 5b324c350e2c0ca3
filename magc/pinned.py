"""Pinned host memory that is reused: pinning costs about 0.4 s per GiB, so it should happen once.

PyTorch rounds each pinned allocation up to a power of two. Blocks are therefore packed into slabs that are
powers of two, and large tensors are cut into pieces, so that little is lost at the end of a slab.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from magc.errors import InputError, StoreError
from magc.units import format_bytes

PIECE_BYTES = 32 << 20
"""Largest block worth asking for."""

_SMALLEST_SLAB_BYTES = 2 << 20
_LARGEST_SLAB_BYTES = 256 << 20
_ALIGNMENT = 512


class PinnedPool:
    """Pinned host memory for one GPU, shared by the checkpoints of any number of stores.

    Memory is pinned when first needed and kept until the pool is garbage. Blocks are handed out by exact
    size (rounded up to 512 bytes), since the checkpoints of a grid have few sizes; when all blocks are
    back, other sizes start afresh.

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
        self._slabs: list[_Slab] = []
        self._free: defaultdict[int, list[PinnedBlock]] = defaultdict(list)
        self._handed_out = 0
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
        return sum(slab.memory.nbytes for slab in self._slabs)

    def take(self, nbytes: int, *, for_host: bool = False) -> PinnedBlock:
        """A block of ``nbytes`` that the current stream may write to, or the host at once if ``for_host``.

        Raises:
            StoreError: no more memory can be pinned.
        """
        size = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            while self._returned:
                block = self._returned.popleft()
                self._free[block.memory.nbytes].append(block)
                self._handed_out -= 1
            if not self._free[size] and self._handed_out == 0:
                self._start_afresh()
            block = self._free[size].pop() if self._free[size] else PinnedBlock(self._carve(size))
            self._handed_out += 1
        stream = torch.cuda.current_stream(self.device)
        for used_on, event in block.uses.items():
            if for_host:
                event.synchronize()
            elif used_on != stream:
                stream.wait_event(event)
        block.uses = {}
        return block

    def give_back(self, block: PinnedBlock) -> None:
        """Return a block; its ``uses`` say what must be over before it is used again."""
        self._returned.append(block)

    def _start_afresh(self) -> None:
        for blocks in self._free.values():
            for block in blocks:
                for event in block.uses.values():
                    event.synchronize()
        self._free.clear()
        for slab in self._slabs:
            slab.used = 0

    def _carve(self, size: int) -> Tensor:
        for slab in self._slabs:
            if slab.used + size <= slab.memory.nbytes:
                break
        else:
            grown = min(max(self.reserved_bytes, _SMALLEST_SLAB_BYTES), _LARGEST_SLAB_BYTES)
            nbytes = 1 << (max(size, grown) - 1).bit_length()
            try:
                slab = _Slab(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                raise StoreError(
                    f"cannot pin {format_bytes(nbytes)} of host memory beside "
                    f"{format_bytes(self.reserved_bytes)} pinned already ({error}). Use a plan with fewer "
                    "checkpoints on the host, or a smaller host budget."
                ) from error
            self._slabs.append(slab)
        slab.used += size
        return slab.memory[slab.used - size : slab.used]


@dataclass(slots=True)
class _Slab:
    """Pinned memory, handed out from its start."""

    memory: Tensor
    used: int = 0


@dataclass(slots=True)
class PinnedBlock:
    """A part of a slab, with the last copy to or from it on each stream."""

    memory: Tensor
    uses: dict[torch.cuda.Stream, torch.cuda.Event] = field(default_factory=dict[torch.cuda.Stream, torch.cuda.Event])


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as the tensors on it name it."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
