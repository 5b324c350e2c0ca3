"""A grid of layers under FSDP2: gradients are exact, and parameters travel as often as without a grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

import magc
from magc import GridCheckpoint, Plan
from magc.distributed import fsdp
from magc.errors import BudgetError, InputError
from tests.distributed.comms import Collectives
from tests.distributed.ranks import Ranks
from tests.distributed.stacks import (
    KINDS,
    PLANS,
    InTurn,
    OnGrid,
    batches,
    expected,
    loss_of,
    make_layers,
    sharded,
    whole_gradients,
)
from tests.magc.layers import WIDTH, assert_same_bits, assert_same_gradients, gradients, parameters, plain


# ---------------------------------------------------------------------- exact, and as many collectives
def settings(name: str) -> dict[str, Any]:
    """Arguments of fully_shard by name; some exist in the ranks' processes only."""
    match name:
        case "kept after the forward":
            return {"reshard_after_forward": False}
        case "kept in smaller groups after the forward":
            return {"reshard_after_forward": 1}
        case "replicated over shards":
            return {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))}
        case "replicated":
            return {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))}
        case "offloaded":
            return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
        case "cut along the last axis":
            return {"shard_placement_fn": lambda parameter: Shard(parameter.dim() - 1)}
        case _:
            return {}


def compare(rank: int, plan: Plan, root: bool, name: str = "") -> None:
    x, options = batches(), settings(name)
    in_turn, on_grid = InTurn(sharded(make_layers(), **options)), OnGrid(sharded(make_layers(), **options), plan)
    if root:
        fully_shard(in_turn)
        fully_shard(on_grid)
    for _ in range(2):
        counts: list[dict[str, int]] = []
        for model in (in_turn, on_grid):
            model.zero_grad()
            with Collectives() as collectives:
                loss_of(model(x[rank])).backward()
            counts.append(collectives.counts)
        assert counts[0] == counts[1]
        assert len(KINDS) in counts[1].values()
        assert_same_gradients(whole_gradients(on_grid), expected(make_layers(), x))
    assert all(isinstance(parameter, DTensor) for parameter in on_grid.parameters())


@pytest.mark.parametrize("name", PLANS)
def test_gradients_and_collectives_are_those_without_a_grid(ranks: Ranks, name: str) -> None:
    ranks.run(compare, PLANS[name], True)


def test_layers_without_a_root(ranks: Ranks) -> None:
    ranks.run(compare, PLANS["layers x segments"], False)


@pytest.mark.parametrize(
    "name",
    [
        "kept after the forward",
        "kept in smaller groups after the forward",
        "replicated over shards",
        "replicated",
        "offloaded",
        "cut along the last axis",
    ],
)
def test_settings_are_fsdps(ranks: Ranks, name: str) -> None:
    ranks.run(compare, PLANS["layers x segments"], True, name)


def kept_gathered(rank: int) -> None:
    """Parameters stay from step to step, as for accumulated gradients."""
    x = batches()
    model = OnGrid(sharded(make_layers(), reshard_after_forward=False), PLANS["layers x segments"])
    fully_shard(model)
    model.set_reshard_after_backward(False)
    loss_of(model(x[rank])).backward()
    with Collectives() as collectives:
        loss_of(model(x[rank])).backward()
    assert collectives.counts == {"_reduce_scatter_base_": len(KINDS)}
    for layer in model.grid.layers:
        layer.reshard()
    assert_same_gradients(whole_gradients(model), [2 * grad for grad in expected(make_layers(), x)])


def test_parameters_may_stay_gathered(ranks: Ranks) -> None:
    ranks.run(kept_gathered)


def differing(rank: int) -> None:
    """Ranks differ in lengths, segments, groups and what they keep."""
    xs = [batches(tokens=9)[0], batches(tokens=5)[1], batches(tokens=2)[0]]
    plans = [Plan(layers=1, tokens=2), Plan(layers=3, tokens=4, keep=2), Plan()]
    model = OnGrid(sharded(make_layers()), plans[rank])
    fully_shard(model)
    for first in (0, 1):
        model.zero_grad()
        model.grid.plan = plans[first + rank]
        mine = xs[first : first + 2]
        loss_of(model(mine[rank])).backward()
        assert_same_gradients(whole_gradients(model), expected(make_layers(), mine))


def test_ranks_may_differ_in_lengths_and_plans(ranks: Ranks) -> None:
    ranks.run(differing)


def accumulating(rank: int) -> None:
    x = batches()
    model = OnGrid(sharded(make_layers()), PLANS["layers x segments"])
    fully_shard(model)
    with Collectives() as collectives:
        model.set_requires_gradient_sync(False)
        loss_of(model(x[rank])).backward()
        assert "_reduce_scatter_base_" not in collectives.counts
        model.set_requires_gradient_sync(True)
        loss_of(model(x[1 - rank])).backward()
    assert collectives.counts["_reduce_scatter_base_"] == len(KINDS)
    assert_same_gradients(whole_gradients(model), [2 * grad for grad in expected(make_layers(), x)])


def test_gradients_accumulate_without_communication(ranks: Ranks) -> None:
    ranks.run(accumulating)


def nested(rank: int) -> None:
    """A parameter group inside a layer, and one over two layers."""
    x = batches()
    layers = make_layers()
    fully_shard(layers[1].module.up)
    fully_shard(layers[1])
    fully_shard([layers[2], layers[3]])
    fully_shard(layers[0])
    model = OnGrid(layers, PLANS["layers x segments"])
    fully_shard(model)
    with Collectives() as collectives:
        loss_of(model(x[rank])).backward()
    assert collectives.counts == {"_allgather_base_": 8, "_reduce_scatter_base_": 4}
    assert_same_gradients(whole_gradients(model), expected(make_layers(), x))


def test_groups_inside_and_across_layers(ranks: Ranks) -> None:
    ranks.run(nested)


def frozen(rank: int) -> None:
    x = batches()

    def layers() -> list[nn.Module]:
        made = make_layers()
        made[0].requires_grad_(False)
        made[1].module.up.requires_grad_(False)
        made[3].requires_grad_(False)
        return made

    model = OnGrid(sharded(layers()), PLANS["layers x segments"])
    fully_shard(model)
    with Collectives() as collectives:
        loss_of(model(x[rank])).backward()
    assert collectives.counts["_reduce_scatter_base_"] == 2
    assert_same_gradients(whole_gradients(model), expected(layers(), x))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_frozen_parameters_stay_out(ranks: Ranks) -> None:
    ranks.run(frozen)


def twice(rank: int) -> None:
    x = batches()
    model = OnGrid(sharded(make_layers()), PLANS["layers x segments"])
    fully_shard(model)
    loss = loss_of(model(x[rank]))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same_gradients(whole_gradients(model), [2 * grad for grad in expected(make_layers(), x)])


def test_a_graph_that_is_kept_can_be_used_again(ranks: Ranks) -> None:
    ranks.run(twice)


def streaming(rank: int) -> None:
    """The sequence in two calls; gradients pass through the state between them."""
    x = batches()
    model = GridCheckpoint(sharded(make_layers()), Plan(layers=2, tokens=2))
    fully_shard(model)
    first, state = model(x[rank][:, :4])
    second, _ = model(x[rank][:, 4:], state)
    loss_of(torch.cat([first, second], 1)).backward()
    assert_same_gradients(whole_gradients(model), expected(make_layers(), x))


def test_a_sequence_in_two_calls(ranks: Ranks) -> None:
    ranks.run(streaming)


# ---------------------------------------------------------------------- the grid as the root; loss inside the grid
class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 5, dtype=torch.float64)

    def forward(self, y: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        logits = self.out(y).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum"), targets.numel()


def ends() -> tuple[nn.Module, Head]:
    torch.manual_seed(3)
    return nn.Embedding(7, WIDTH, dtype=torch.float64), Head()


def lossy(rank: int, registered: bool) -> None:
    ids = torch.randint(0, 7, (2, 2, 9), generator=torch.Generator().manual_seed(2))
    layers, (stem, head) = make_layers(), ends()
    losses = [head(plain(layers, stem(rows))[0], rows % 5)[0] / rows.numel() for rows in ids]
    want = gradients(torch.stack(losses).mean(), parameters([*layers, stem, head]))

    stem, head = ends()
    grid = GridCheckpoint(sharded(make_layers()[:-1]) + make_layers()[-1:], PLANS["layers x segments"])
    fully_shard(stem)
    fully_shard(head)
    fully_shard(grid)  # the last layer's parameters are its own
    if registered:
        register_fsdp_forward_method(grid, "loss")
    for _ in range(2):
        for module in (grid, stem, head):
            module.zero_grad()
        with Collectives() as collectives:
            loss = grid.loss(ids[rank], ids[rank] % 5, stem=stem, head=head)
            loss.backward()
        assert collectives.counts["_reduce_scatter_base_"] == len(KINDS) + 2
        assert_same_gradients([grad for module in (grid, stem, head) for grad in whole_gradients(module)], want)


@pytest.mark.parametrize("registered", [False, True])
def test_loss_of_a_sharded_grid(ranks: Ranks, registered: bool) -> None:
    ranks.run(lossy, registered)


def evaluating(rank: int) -> None:
    x = batches()
    model = OnGrid(sharded(make_layers()), PLANS["layers x segments"])
    fully_shard(model)
    with torch.no_grad():
        y = model(x[rank])
    assert_same_bits(y, plain(make_layers(), x[rank], bounds=[(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)])[0])
    loss_of(model(x[rank])).backward()
    assert_same_gradients(whole_gradients(model), expected(make_layers(), x))


def test_inference(ranks: Ranks) -> None:
    ranks.run(evaluating)


# ---------------------------------------------------------------------- budgets
def planning(rank: int) -> None:
    x = batches()
    grid = fully_shard(GridCheckpoint(sharded(make_layers()), budget="1MiB"))
    whole = GridCheckpoint(make_layers(), budget="1MiB")
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    plan, reference = grid.plan_for(x[rank]), whole.plan_for(x[rank])
    assert plan.forecast is not None
    assert reference.forecast is not None
    assert (reference.forecast.budget, plan.forecast.budget) == (2**20, 2**20 - nbytes)
    assert "parameters that FSDP gathers" in plan.explain()
    by_hand = magc.plan(sharded(make_layers()), x[rank], budget="1MiB")
    assert by_hand.forecast is not None
    assert by_hand.forecast.budget == plan.forecast.budget
    assert magc.forecast(Plan(tokens=2), sharded(make_layers()), x[rank]).forecast is not None
    loss_of(grid(x[rank])[0]).backward()
    assert_same_gradients(whole_gradients(grid), expected(make_layers(), x))
    with pytest.raises(BudgetError, match=r"leaves nothing beside the .* of parameters that FSDP gathers"):
        GridCheckpoint(sharded(make_layers()), budget="2KiB")(x[rank])


def test_gathered_parameters_are_part_of_the_budget(ranks: Ranks) -> None:
    ranks.run(planning)


# ---------------------------------------------------------------------- errors
class Fails(nn.Module):
    """A layer that raises when it is told to."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.fails = False

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if self.fails:
            raise ValueError("no")
        return self.layer(x, state)


def failing(rank: int) -> None:
    x = batches()
    layers = [Fails(layer) for layer in make_layers(("cell", "cell"))]
    grid = GridCheckpoint(sharded(layers), PLANS["layers x segments"])
    layers[1].fails = True
    with pytest.raises(ValueError, match="no"):
        grid(x[rank])
    layers[1].fails = False
    loss_of(grid(x[rank])[0]).backward()
    assert_same_gradients(whole_gradients(grid), expected(make_layers(("cell", "cell")), x))


def test_the_next_step_works_after_an_error(ranks: Ranks) -> None:
    ranks.run(failing)


def outside(rank: int) -> None:
    model = OnGrid(make_layers(), Plan())
    fully_shard(model)
    with pytest.raises(InputError, match="register_fsdp_forward_method"):
        model.grid(batches()[rank])


def test_a_grid_outside_its_roots_forward_is_refused(ranks: Ranks) -> None:
    ranks.run(outside)


def wrapped_layers(rank: int) -> None:
    layers = make_layers()
    layers[1].module.up = nn.parallel.DistributedDataParallel(layers[1].module.up)
    with pytest.raises(InputError, match="DistributedDataParallel is inside the grid"):
        GridCheckpoint(layers, Plan())(batches()[rank])


def test_layers_under_ddp_one_by_one_are_refused(ranks: Ranks) -> None:
    ranks.run(wrapped_layers)


def test_layers_under_fsdp1_are_refused() -> None:
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)  # the rest of it wants a GPU
    layers = make_layers()
    layers[1].module.more = wrapper
    with pytest.raises(InputError, match="FullyShardedDataParallel is inside the grid"):
        GridCheckpoint(layers, Plan())(batches()[0])


def unknown(rank: int) -> None:
    layers = sharded(make_layers())
    names, fsdp._NEEDED = fsdp._NEEDED, ("_pre_forward", "_renamed")
    try:
        with pytest.raises(InputError, match=r"FSDP2 of torch .* has no _renamed"):
            GridCheckpoint(layers, Plan())(batches()[rank])
    finally:
        fsdp._NEEDED = names


def test_a_torch_with_another_fsdp_is_refused(ranks: Ranks) -> None:
    ranks.run(unknown)
