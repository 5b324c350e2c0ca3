"""A grid under DistributedDataParallel: every parameter's gradient is reduced once, and is that of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from magc import GridCheckpoint, Plan
from tests.distributed.ranks import RANKS, Ranks
from tests.magc.layers import WIDTH, assert_same_gradients, gradients, make_stack, parameters, plain


def make_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    layers = make_stack(("cell", "mlp", "lstm"))
    layers[1].module.norm.requires_grad_(False)
    return layers


def batches() -> Tensor:
    """Two micro-batches for every rank; `(micro-batch, rank, batch, tokens, width)`."""
    return torch.randn(2, RANKS, 2, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def steps(rank: int) -> None:
    """A step, then a step over two micro-batches of which the first is not reduced."""
    grid = GridCheckpoint(make_layers(), Plan(layers=1, tokens=2, borders="disk", states="disk"))
    model = DistributedDataParallel(grid)
    fired: list[int] = []
    for index, parameter in enumerate(parameters([grid])):
        parameter.register_post_accumulate_grad_hook(lambda parameter, index=index: fired.append(index))
    layers, x = make_layers(), batches()
    whole = [plain(layers, micro.flatten(0, 1))[0].square().mean() for micro in x]

    model(x[0, rank])[0].square().mean().backward()
    assert sorted(fired) == list(range(len(parameters([grid]))))
    expected = gradients(whole[0], parameters(layers), retain_graph=True)
    assert_same_gradients([parameter.grad for parameter in parameters([grid])], expected)

    model.zero_grad()
    with model.no_sync():
        model(x[0, rank])[0].square().mean().backward()
    alone = gradients(plain(list(grid.layers), x[0, rank])[0].square().mean(), parameters([grid]))
    assert_same_gradients([parameter.grad for parameter in parameters([grid])], alone)
    model(x[1, rank])[0].square().mean().backward()
    expected = gradients(whole[0] + whole[1], parameters(layers))
    assert_same_gradients([parameter.grad for parameter in parameters([grid])], expected)


def test_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    ranks.run(steps)
