"""Tensors copied to pinned host memory and back, on streams of their own beside the work on the current one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from magc.pinned import PIECE_BYTES, PinnedBlock, PinnedPool, Uses
from magc.rawbytes import Layout, allocated, laid_out, pieces

Layouts = Sequence[Layout | None]


class PinnedTensors:
    """Tensors in pinned memory: their bytes one after another, each from a block's start.

    Nothing here makes the host wait but `host_pieces`; events keep copies in order with each other and with the work.
    """

    def __init__(self, layouts: Layouts, blocks: list[PinnedBlock], pool: PinnedPool) -> None:
        self.layouts = layouts
        self._blocks = blocks
        self._pool = pool
        self._uses: Uses = {}

    @classmethod
    def copy(cls, tensors: Sequence[Tensor | None], pool: PinnedPool) -> PinnedTensors:
        """Begin to copy tensors out, when the current stream has come to here. They may be let go of at once.

        Raises:
            StoreError: no more memory can be pinned.
        """
        pool.out.wait_stream(torch.cuda.current_stream(pool.device))
        layouts: list[Layout | None] = []
        blocks: list[PinnedBlock] = []
        made = cls(layouts, blocks, pool)
        try:
            with torch.cuda.stream(pool.out):
                for tensor in tensors:
                    if tensor is None:
                        layouts.append(None)
                        continue
                    layout, raw = laid_out(tensor)
                    layouts.append(layout)
                    for piece in pieces(raw, PIECE_BYTES):
                        blocks.append(pool.take(piece.nbytes))
                        blocks[-1].memory[: piece.nbytes].copy_(piece, non_blocking=True)
                    tensor.record_stream(pool.out)  # its memory is not used anew before the copy is over
        except BaseException:
            made._mark_use(pool.out)
            made.discard()
            raise
        made._mark_use(pool.out)
        return made

    @classmethod
    def room(cls, layouts: Layouts, pool: PinnedPool) -> PinnedTensors:
        """Pinned memory for tensors of these layouts, which the host may write to."""
        blocks: list[PinnedBlock] = []
        made = cls(layouts, blocks, pool)
        try:
            for layout in layouts:
                for nbytes in _piece_sizes(layout):
                    blocks.append(pool.take(nbytes, for_host=True))
        except BaseException:
            made.discard()
            raise
        return made

    def host_pieces(self) -> Iterator[Tensor]:
        """The bytes, piece by piece, once all copies are over."""
        for _, event in self._uses.values():
            event.synchronize()
        sizes = (nbytes for layout in self.layouts for nbytes in _piece_sizes(layout))
        for block, nbytes in zip(self._blocks, sizes, strict=True):
            yield block.memory[:nbytes]

    def copy_back(self, raws: Sequence[Tensor], ready: torch.cuda.Event) -> torch.cuda.Event:
        """Begin to copy everything to the device.

        Args:
            raws: bytes of the tensors on the device, `(nbytes,) uint8` each.
            ready: when their memory may be written to.

        Returns:
            When they are there.
        """
        back = self._pool.back
        back.wait_event(ready)
        for stream, (_, event) in self._uses.items():
            if stream != back:
                back.wait_event(event)
        blocks = iter(self._blocks)
        with torch.cuda.stream(back):
            for raw in raws:
                for piece in pieces(raw, PIECE_BYTES):
                    piece.copy_(next(blocks).memory[: piece.nbytes], non_blocking=True)
                raw.record_stream(back)  # should it be let go of before it was waited for
        return self._mark_use(back)

    def discard(self) -> None:
        """Give the memory back; it is used anew when all copies are over. May be called again."""
        for block in self._blocks:
            block.uses = self._uses
            self._pool.give_back(block)
        self._blocks = []

    def _mark_use(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        self._uses[stream] = self._pool.record_use(stream)
        return self._uses[stream][1]


def make_room(layouts: Layouts, device: torch.device) -> tuple[list[Tensor | None], list[Tensor]]:
    """Uninitialised tensors of these layouts on a device, and the bytes of those that are not None."""
    tensors: list[Tensor | None] = []
    raws: list[Tensor] = []
    for layout in layouts:
        if layout is None:
            tensors.append(None)
            continue
        tensor, raw = allocated(layout, device)
        tensors.append(tensor)
        raws.append(raw)
    return tensors, raws


def _piece_sizes(layout: Layout | None) -> Iterator[int]:
    if layout is not None:
        for start in range(0, layout.nbytes, PIECE_BYTES):
            yield min(PIECE_BYTES, layout.nbytes - start)
