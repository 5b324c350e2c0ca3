"""One grid per group of layers under FSDP2: only one group's parameters are gathered at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from magc import GridCheckpoint, Plan
from tests.distributed.comms import Collectives
from tests.distributed.ranks import RANKS, Ranks
from tests.distributed.stacks import batches, expected, loss_of, make_layers, whole_gradients
from tests.magc.layers import assert_same_gradients


class Rows(nn.Module):
    """Grids one behind the other, each of two layers."""

    def __init__(self, layers: list[nn.Module], tokens: int) -> None:
        super().__init__()
        pairs = [layers[index : index + 2] for index in range(0, len(layers), 2)]
        self.rows = nn.ModuleList(GridCheckpoint(pair, Plan(tokens=tokens)) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for row in self.rows:
            x, _ = row(x)
        return x


def compare(rank: int) -> int:
    """Returns the largest number of rows that were gathered while a layer ran in the forward."""
    xs = [batches(tokens=9)[0], batches(tokens=4)[1]]  # ranks differ in segments
    model = Rows(make_layers(), tokens=2)
    for row in model.rows:
        fully_shard(row)
    fully_shard(model)
    gathered: list[int] = []

    def count(*_: Any) -> None:
        if not torch.is_grad_enabled():  # a forward, not a recording
            gathered.append(
                sum(not any(isinstance(parameter, DTensor) for parameter in row.parameters()) for row in model.rows)
            )

    for row in model.rows:
        row.layers[0].register_forward_pre_hook(count)
    for _ in range(2):
        model.zero_grad()
        with Collectives() as collectives:
            loss_of(model(xs[rank])).backward()
        rows = len(model.rows)
        assert collectives.counts == {"_allgather_base_": 2 * rows, "_reduce_scatter_base_": rows}
        assert_same_gradients(whole_gradients(model), expected(make_layers(), xs))
    return max(gathered)


def test_one_row_is_gathered_at_a_time(ranks: Ranks) -> None:
    assert ranks.run(compare) == [1] * RANKS
