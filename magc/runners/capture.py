"""Capturing what a function launches as a CUDA graph."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch

from magc.errors import MagcError

Replay = Callable[[], None]


class CaptureError(Exception):
    """A function does what no graph can hold. The message is the reason."""


class Capturer(Protocol):
    """Turns calls into replays."""

    def new_pool(self) -> object:
        """Memory for graphs that are never replayed between another's capture and its last replay."""
        ...

    def capture(self, body: Callable[[], None], pool: object, reserve: int = 0) -> Replay:
        """Call `body` once without effect; the result repeats its effect.

        Args:
            body: what to capture.
            pool: memory for it.
            reserve: bytes that the pool is given first in one piece, if there are as many.

        Raises:
            CaptureError: that is not possible. The pool must not be used any more.
        """
        ...

    def waits(self) -> Any:
        """A context that yields a list, which afterwards holds what in it made the host wait for the device."""
        ...


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The one stream of a device that graphs are captured on: cuBLAS keeps a workspace for every stream it has seen."""
    stream = torch.cuda.Stream(index)
    with torch.cuda.stream(stream):
        # Made here, the workspace is not part of a graph's memory, which it would outlive and keep.
        some = torch.zeros(16, 16, dtype=torch.bfloat16, device=stream.device)
        torch.mm(some, some)
    stream.synchronize()
    return stream


def _pieces_can_be_split() -> bool:
    """Whether torch's allocator takes a tensor's memory from a larger piece, which an option of it limits."""
    options = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return not any("max_split_size_mb" in option for option in options)


class CudaCapturer:
    """Captures on one device.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_pool(self) -> object:
        """A private pool of torch's allocator."""
        return torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None], pool: object, reserve: int = 0) -> Replay:
        """See `Capturer.capture`."""
        stream = _capture_stream(torch.empty(0, device=self._device).device.index)
        # A graph cannot use what eager runs have left in the allocator's cache: its memory would come on top.
        torch.cuda.empty_cache()
        if reserve > torch.cuda.mem_get_info(stream.device)[0] or not _pieces_can_be_split():
            reserve = 0
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # pyright: ignore[reportArgumentType]
                if reserve:
                    # Let go of at once, it is where the pool's tensors will lie. A pool that grows tensor by tensor ends
                    # with gaps of their many sizes.
                    torch.empty(reserve, dtype=torch.uint8, device=stream.device)
                body()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, MagcError | torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize(self._device)
            raise CaptureError(str(error).strip().splitlines()[0]) from error
        return graph.replay

    @contextmanager
    def waits(self) -> Generator[list[str]]:
        """See `Capturer.waits`. Other warnings pass."""
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            # First, since setting the mode warns too: that PyTorch calls it a prototype is no news to who trains.
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                found.append(str(warning.message))
            elif "Synchronization debug mode is a prototype" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
