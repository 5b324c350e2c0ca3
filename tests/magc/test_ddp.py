"""A grid under DistributedDataParallel: every parameter's gradient is reduced once, and is that of the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from magc import GridCheckpoint, Plan
from tests.magc.layers import WIDTH, assert_same_gradients, gradients, make_stack, parameters, plain

RANKS = 2


def make_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    layers = make_stack(("cell", "mlp", "lstm"))
    layers[1].module.norm.requires_grad_(False)
    return layers


def batches() -> Tensor:
    """Two micro-batches for every rank; `(micro-batch, rank, batch, tokens, width)`."""
    return torch.randn(2, RANKS, 2, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def work(rank: int, folder: str) -> None:
    """One rank: a step, then a step over two micro-batches of which the first is not reduced."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        grid = GridCheckpoint(make_layers(), Plan(layers=1, tokens=2, borders="disk", states="disk"))
        model = DistributedDataParallel(grid)
        fired: list[int] = []
        for index, parameter in enumerate(parameters([grid])):
            parameter.register_post_accumulate_grad_hook(lambda parameter, index=index: fired.append(index))
        x = batches()[:, rank]

        model(x[0])[0].square().mean().backward()
        assert sorted(fired) == list(range(len(parameters([grid]))))
        step = [parameter.grad.clone() for parameter in parameters([grid])]

        model.zero_grad()
        with model.no_sync():
            model(x[0])[0].square().mean().backward()
        alone = gradients(plain(list(grid.layers), x[0])[0].square().mean(), parameters([grid]))
        assert_same_gradients([parameter.grad for parameter in parameters([grid])], alone)
        model(x[1])[0].square().mean().backward()
        both = [parameter.grad.clone() for parameter in parameters([grid])]
        torch.save((step, both), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    layers, x = make_layers(), batches()
    micro = [plain(layers, x[index].flatten(0, 1))[0].square().mean() for index in range(2)]
    step = gradients(micro[0], parameters(layers), retain_graph=True)
    both = gradients(micro[0] + micro[1], parameters(layers))
    for rank in range(RANKS):
        actual_step, actual_both = torch.load(tmp_path / f"{rank}.pt")
        assert_same_gradients(actual_step, step)
        assert_same_gradients(actual_both, both)
