"""A wrapped model under DistributedDataParallel: gradients are those of the whole batch in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from magc import Plan
from magc.integrations.wrap import wrap
from tests.integrations.models import TOKENS, VOCABULARY, assert_same, gradients, mamba2

RANKS = 2


def batches() -> Tensor:
    """Two micro-batches for every rank; `(micro-batch, rank, batch, tokens)`."""
    return torch.randint(3, VOCABULARY, (2, RANKS, 2, TOKENS), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def work(rank: int, folder: str) -> None:
    """One rank: two micro-batches, of which the first is not reduced."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        model = DistributedDataParallel(wrap(mamba2(), plan=Plan(layers=2, tokens=4)))
        ids = batches()[:, rank]
        with model.no_sync():
            loss_of(model, ids[0]).backward()
        loss_of(model, ids[1]).backward()
        torch.save(gradients(model.module), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    model, ids = mamba2(), batches()
    for micro in ids:
        loss_of(model, micro.flatten(0, 1)).backward()
    expected = gradients(model)
    for rank in range(RANKS):
        for name, actual in torch.load(tmp_path / f"{rank}.pt").items():
            assert_same(actual, expected[name], 1e-5, name)
