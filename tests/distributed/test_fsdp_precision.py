"""Mixed precision under FSDP2: by its own policy, and by autocast."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from magc import GridCheckpoint, Plan
from tests.distributed.ranks import RANKS, Ranks
from tests.distributed.stacks import InTurn, OnGrid, batches, loss_of, sharded, whole_gradients
from tests.magc.layers import WIDTH, assert_same_bits, parameters

TOKENS = 64
POLICY = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)


class Sum(nn.Module):
    """Low precision inside, a state in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = 0.1 * self.mix(x).float().cumsum(1)
        if state is not None:
            self.seen.add((x.dtype, state.dtype))
            total = total + state.unsqueeze(1)
        return x + total.tanh().to(x.dtype), total[:, -1]


def make_sums() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Sum() for _ in range(3)]


def grid_gradients(layers: Sequence[nn.Module], plan: Plan, x: Tensor) -> list[Tensor]:
    """Of one rank's loss, in one process."""
    grid = GridCheckpoint(layers, plan)
    loss_of(grid(x)[0]).backward()
    return [parameter.grad for parameter in parameters([grid]) if parameter.grad is not None]


# ---------------------------------------------------------------------- FSDP's policy
def whole_pass(rank: int) -> None:
    """One cell: the policy's casts are all that can differ."""
    x = batches(torch.float32, TOKENS)
    models = [
        InTurn(sharded(make_sums(), mp_policy=POLICY)),
        OnGrid(sharded(make_sums(), mp_policy=POLICY), Plan()),
    ]
    outputs: list[Tensor] = []
    for model in models:
        fully_shard(model, mp_policy=POLICY)
        outputs.append(model(x[rank]))
        loss_of(outputs[-1]).backward()
    assert outputs[0].dtype == torch.float32
    assert_same_bits(outputs[1], outputs[0])
    assert_same_bits(whole_gradients(models[1]), whole_gradients(models[0]))


def test_values_are_cast_as_the_policy_says(ranks: Ranks) -> None:
    ranks.run(whole_pass)


def summed(rank: int) -> None:
    """Sums over 64 segments reach the reduction in float32."""
    x, plan = batches(torch.float32, TOKENS).bfloat16(), Plan(layers=1, tokens=1)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    layers = sharded(make_sums(), mp_policy=policy)
    grid = GridCheckpoint(layers, plan)
    loss_of(grid(x[rank])[0]).backward()
    once = whole_gradients(grid)

    grid.zero_grad()
    for last in (False, True):  # two micro-batches, reduced together
        for layer in layers:
            layer.set_requires_gradient_sync(last)
        loss_of(grid(x[rank])[0]).backward()
    assert_same_bits(whole_gradients(grid), [2 * grad for grad in once])

    alone: list[list[Tensor]] = []
    for mine in x:
        layers = [layer.bfloat16() for layer in make_sums()]
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad_dtype = torch.float32
        alone.append(grid_gradients(layers, plan, mine))
    assert_same_bits(once, [(one + other) / RANKS for one, other in zip(*alone, strict=True)])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="before torch 2.10 sums are rounded once")
def test_sums_of_segments_are_reduced_in_float32(ranks: Ranks) -> None:
    ranks.run(summed)


def stateful(rank: int) -> None:
    layers = make_sums()
    grid = GridCheckpoint(sharded(layers, mp_policy=POLICY), Plan(layers=2, tokens=16))
    _, states = grid(batches(torch.float32, TOKENS)[rank])
    assert [state.dtype for state in states] == [torch.float32] * 3
    assert [layer.seen for layer in layers] == [{(torch.bfloat16, torch.float32)}] * 3


def test_states_are_not_cast(ranks: Ranks) -> None:
    ranks.run(stateful)


# ---------------------------------------------------------------------- autocast
def autocasting(rank: int) -> None:
    x, plan = batches(torch.float32, TOKENS), Plan(layers=1, tokens=4)
    layers = make_sums()
    grid = GridCheckpoint(sharded(copy.deepcopy(layers)), plan)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(grid(x[rank])[0]).backward()
        alone = [grid_gradients(copy.deepcopy(layers), plan, mine) for mine in x]
    assert_same_bits(whole_gradients(grid), [(one + other) / RANKS for one, other in zip(*alone, strict=True)])


def test_autocast(ranks: Ranks) -> None:
    ranks.run(autocasting)
