"""Ranks of a plan group use one plan, whatever they were given."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from magc import GridCheckpoint, Plan
from magc.errors import BudgetError, PlanError
from tests.distributed.comms import Collectives
from tests.distributed.ranks import Ranks
from tests.distributed.stacks import batches, expected, loss_of, make_layers, sharded, whole_gradients
from tests.magc.layers import Decay, assert_same_gradients


def group() -> distributed.ProcessGroup:
    found = distributed.group.WORLD
    assert found is not None
    return found


def step(grid: GridCheckpoint, x: torch.Tensor) -> None:
    loss_of(grid(x)[0]).backward()


def decays() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Decay(16) for _ in range(6)]


def differing(rank: int) -> tuple[str, int]:
    """The plan, and the budget that it was made for."""
    grid = GridCheckpoint(decays(), budget=("1MiB", "300KiB")[rank], plan_group=group())
    x = torch.randn(2, (1024, 700)[rank], 16)
    step(grid, x)
    plan = grid.plan_for(x)
    assert plan.forecast is not None
    assert plan.forecast.seq_len == 1024
    assert plan.forecast.budget is not None
    return str(plan), plan.forecast.budget


def test_the_smallest_budget_and_the_longest_sequence(ranks: Ranks) -> None:
    one, other = ranks.run(differing)
    assert one == other
    assert one[1] == 300 * 2**10


def largest(rank: int) -> int:
    """A larger batch on rank 1; returns bytes of a state, which tell whose layers were measured."""
    grid = GridCheckpoint(decays(), budget="4MiB", plan_group=group())
    x = torch.randn((1, 4)[rank], (512, 64)[rank], 16)
    plan = grid.plan_for(x)
    assert plan.forecast is not None
    assert plan.forecast.seq_len == 512
    return plan.forecast.costs.stages[0].state_bytes


def test_the_largest_batch_plans(ranks: Ranks) -> None:
    assert ranks.run(largest) == [4 * 16 * 4] * 2


def again(rank: int) -> list[dict[str, int]]:
    """Collectives of two calls alike and one that is new on one rank only."""
    grid = GridCheckpoint(decays(), budget="1MiB", plan_group=group())
    counts: list[dict[str, int]] = []
    for tokens in (256, 256, (256, 128)[rank]):
        with Collectives() as collectives:
            step(grid, torch.randn(2, tokens, 16))
        counts.append(collectives.counts)
    return counts


def test_an_agreed_plan_is_kept(ranks: Ranks) -> None:
    for first, second, third in ranks.run(again):
        assert second == {"allgather_": 1}
        assert first == third
        assert first["broadcast_"] > 0


def impossible(rank: int) -> None:
    grid = GridCheckpoint(decays(), budget=("1MiB", "1KiB")[rank], plan_group=group())
    with pytest.raises(BudgetError, match=r"The smallest that would is"):
        step(grid, torch.randn(2, 512, 16))


def test_a_refusal_reaches_all_ranks(ranks: Ranks) -> None:
    ranks.run(impossible)


def evaluating(rank: int) -> None:
    grid = GridCheckpoint(decays(), budget="1MiB", plan_group=group())
    if rank == 0:
        with torch.no_grad():
            grid(torch.randn(2, 100, 16))
    distributed.barrier()


def test_inference_on_one_rank_asks_nobody(ranks: Ranks) -> None:
    ranks.run(evaluating)


def under_fsdp(rank: int) -> str:
    """Ranks with different lengths and budgets plan together, and reduce once."""
    grid = GridCheckpoint(sharded(make_layers()), budget=("1MiB", "700KiB")[rank], plan_group=group())
    xs = [batches(tokens=40)[0], batches(tokens=23)[1]]
    step(grid, xs[rank])
    assert_same_gradients(whole_gradients(grid), expected(make_layers(), xs))
    return str(grid.plan_for(xs[rank]))


def test_with_sharded_parameters(ranks: Ranks) -> None:
    one, other = ranks.run(under_fsdp)
    assert one == other


def test_a_given_plan_needs_no_group() -> None:
    with pytest.raises(PlanError, match="plan_group"):
        GridCheckpoint(decays(), Plan(), plan_group=object())
