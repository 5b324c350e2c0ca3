"""The processes of a run, and the few things they tell each other."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from video_ma2mba.errors import ConfigError

BUCKET = 1 << 26
"""Elements that are reduced at once."""


@dataclass(frozen=True)
class Ranks:
    """One process among all of the run.

    Attributes:
        rank: the number of this process.
        world: how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files of all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64; the same bits on each."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, added in at least float32."""
        if self.world == 1:
            return
        waiting: list[Tensor] = []
        count = 0
        for tensor in tensors:
            if waiting and (count + tensor.numel() > BUCKET or tensor.dtype != waiting[0].dtype):
                _reduce(waiting)
                waiting, count = [], 0
            waiting.append(tensor)
            count += tensor.numel()
        if waiting:
            _reduce(waiting)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def joined(device: str | None, *, group: bool = False) -> Generator[Ranks]:
    """The ranks that torchrun started, or this process alone; a process group that is there already is used.

    Args:
        device: None is the GPU if there is one; under torchrun every rank takes its own.
        group: whether a process alone needs a group too.

    Raises:
        ConfigError: there are more ranks than GPUs on this machine.
    """
    if distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), _device(device))
        return
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    place = _device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    how: dict[str, Any] = {"backend": "nccl", "device_id": place} if place.type == "cuda" else {"backend": "gloo"}
    if started:
        distributed.init_process_group(**how)
    elif group:
        store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group(**how, store=store, rank=0, world_size=1)
    else:
        yield Ranks(0, 1, place)
        return
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), place)
    finally:
        distributed.destroy_process_group()


def _device(wanted: str | None) -> torch.device:
    place = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type != "cuda" or place.index is not None:
        return place
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local} has no GPU of its own: there are {torch.cuda.device_count()}; start as many processes"
        )
    return torch.device("cuda", local)


def _reduce(tensors: Sequence[Tensor]) -> None:
    precise = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = torch.cat([tensor.flatten().to(precise) for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
