"""Training stacks around a grid on two ranks: DDP, ZeRO-1, compiled layers, LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from magc import GridCheckpoint, Plan
from tests.distributed.comms import Collectives
from tests.distributed.ranks import Ranks
from tests.distributed.stacks import PLANS, batches, expected, loss_of, make_layers, sharded, whole_gradients
from tests.magc.layers import assert_same_gradients, parameters, plain

PLAN = PLANS["layers x segments"]


def steps(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, xs: Sequence[Tensor]) -> None:
    for x in xs:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()


# ---------------------------------------------------------------------- DDP
def accumulating(rank: int) -> None:
    """Three micro-batches, of which the last is reduced."""
    xs = [batches(tokens=tokens) for tokens in (9, 4, 7)]
    grid = GridCheckpoint(make_layers(), PLAN)
    model = DistributedDataParallel(grid)
    with Collectives() as collectives:
        with model.no_sync():
            for x in xs[:-1]:
                loss_of(model(x[rank])[0]).backward()
        assert collectives.counts == {}
        loss_of(model(xs[-1][rank])[0]).backward()
    assert collectives.counts == {"allreduce_": 1}
    sums = [sum(grads) for grads in zip(*(expected(make_layers(), x) for x in xs), strict=True)]
    assert_same_gradients(whole_gradients(grid), sums)


def test_ddp_accumulates_without_communication(ranks: Ranks) -> None:
    ranks.run(accumulating)


def unequal(rank: int) -> None:
    xs = [batches(tokens=13)[0], batches(tokens=2)[1]]
    grid = GridCheckpoint(make_layers(), Plan(layers=1 + rank, tokens=2))
    model = DistributedDataParallel(grid, gradient_as_bucket_view=True)
    loss_of(model(xs[rank])[0]).backward()
    assert_same_gradients(whole_gradients(grid), expected(make_layers(), xs))


def test_ddp_ranks_may_differ_in_lengths_and_plans(ranks: Ranks) -> None:
    ranks.run(unequal)


# ---------------------------------------------------------------------- ZeRO-1
def sharded_optimizer(rank: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer

    x = [batches(tokens=tokens) for tokens in (9, 5, 7)]
    whole = make_layers()
    optimizer = torch.optim.Adam(parameters(whole), lr=0.01)
    steps(lambda xs: torch.stack([plain(whole, mine)[0] for mine in xs]), optimizer, x)

    grid = GridCheckpoint(make_layers(), PLAN)
    model = DistributedDataParallel(grid)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    steps(lambda mine: model(mine)[0], zero, [mine[rank] for mine in x])
    assert_same_gradients(list(grid.parameters()), parameters(whole), 1e-8)
    held = sum(tensor.numel() for state in zero.optim.state.values() for tensor in state.values())
    full = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values())
    assert held < 0.8 * full


def test_zero_redundancy_optimizer(ranks: Ranks) -> None:
    ranks.run(sharded_optimizer)


def sharded_training(rank: int) -> None:
    """Steps of an optimizer over sharded parameters, with clipped gradients."""
    x = [batches(tokens=tokens) for tokens in (9, 5, 7)]
    whole = make_layers()
    optimizer = torch.optim.AdamW(parameters(whole), lr=0.01)
    steps(lambda xs: torch.stack([plain(whole, mine)[0] for mine in xs]), optimizer, x)
    grid = GridCheckpoint(sharded(make_layers()), PLAN)
    fully_shard(grid)
    own = torch.optim.AdamW(grid.parameters(), lr=0.01)
    steps(lambda mine: grid(mine)[0], own, [mine[rank] for mine in x])
    trained = [parameter.full_tensor() for parameter in grid.parameters()]
    assert_same_gradients(trained, parameters(whole), 1e-8)


def test_training_sharded_parameters(ranks: Ranks) -> None:
    ranks.run(sharded_training)


# ---------------------------------------------------------------------- torch.compile
class Gated(nn.Module):
    """A layer that compiles quickly: a decaying sum over the segment, gated."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = 0.1 * self.mix(x).cumsum(1)
        if state is not None:
            total = total + state.unsqueeze(1)
        return x + total * self.gate(x).sigmoid(), total[:, -1]


def gated() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Gated().double() for _ in range(4)]


def compiled(rank: int, how: str, parallel: str) -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    x = batches(tokens=8)
    torch._dynamo.reset()
    layers = gated()
    if how == "in place":
        for layer in layers:
            layer.compile(backend=backend)
    else:
        layers = [torch.compile(layer, backend=backend) for layer in layers]
    if parallel == "fsdp":
        sharded(layers)
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=2))
    model = DistributedDataParallel(grid) if parallel == "ddp" else grid
    made: list[int] = []
    with torch._dynamo.config.patch(recompile_limit=16):
        for _ in range(3):
            model.zero_grad()
            loss_of(model(x[rank])[0]).backward()
            made.append(len(graphs))
    assert_same_gradients(whole_gradients(grid), expected(gated(), x))
    # First and other layers, with and without a state, with and without grad mode; not once per layer, segment or step.
    assert made[0] <= made[1] == made[2] == 10


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_layers(ranks: Ranks, how: str, parallel: str) -> None:
    ranks.run(compiled, how, parallel)
