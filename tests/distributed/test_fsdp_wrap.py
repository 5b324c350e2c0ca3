"""Wrapped models of transformers under FSDP2."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from magc import Plan
from magc.integrations.wrap import wrap, wrapped
from tests.distributed.comms import Collectives
from tests.distributed.ranks import RANKS, Ranks

pytest.importorskip("transformers")

from tests.integrations.models import FAMILIES, TOKENS, VOCABULARY, assert_same, gradients

PLAN = Plan(layers=2, tokens=4)


def batches() -> Tensor:
    """One micro-batch for every rank; `(rank, batch, tokens)`."""
    return torch.randint(3, VOCABULARY, (RANKS, 2, TOKENS), generator=torch.Generator().manual_seed(1))


def sharded(model: Any) -> Any:
    trunk = model.model if hasattr(model, "model") else model.backbone
    for block in trunk.layers:
        fully_shard(block)
    return fully_shard(model)


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, int]]:
    with Collectives() as collectives:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return loss.detach(), collectives.counts


def compare(rank: int, family: str, wrap_first: bool) -> None:
    ids = batches()
    unwrapped = FAMILIES[family]()
    for rows in ids:
        (unwrapped(input_ids=rows, labels=rows).loss / RANKS).backward()
    want = gradients(unwrapped)

    own = FAMILIES[family]()
    model = sharded(wrap(own, plan=PLAN)) if wrap_first else wrap(sharded(own), plan=PLAN)
    loss, counts = step(model, ids[rank])
    plain_loss, plain_counts = step(sharded(FAMILIES[family]()), ids[rank])
    assert_same(loss, plain_loss, 1e-5)
    assert counts == plain_counts
    for name, grad in gradients(model).items():
        assert isinstance(grad, DTensor)
        assert_same(grad.full_tensor(), want[name], 1e-5, name)


# FSDP itself refuses blocks that share parameters, as Zamba2's do.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "zamba2"])
def test_gradients_and_collectives_are_those_of_the_unwrapped_model(ranks: Ranks, family: str) -> None:
    ranks.run(compare, family, False)


def test_wrapped_before_it_is_sharded(ranks: Ranks) -> None:
    ranks.run(compare, "mamba2", True)


def only_the_root(rank: int) -> None:
    """All parameters in one group; the blocks have none of their own."""
    ids = batches()
    own = FAMILIES["mamba2"]()
    for rows in ids:
        (own(input_ids=rows, labels=rows).loss / RANKS).backward()
    model = wrap(fully_shard(FAMILIES["mamba2"]()), plan=PLAN)
    _, counts = step(model, ids[rank])
    assert counts == {"_allgather_base_": 1, "_reduce_scatter_base_": 1}
    for name, grad in gradients(model).items():
        assert isinstance(grad, DTensor)
        assert_same(grad.full_tensor(), gradients(own)[name], 1e-5, name)


def test_one_group_for_the_whole_model(ranks: Ranks) -> None:
    ranks.run(only_the_root)


def planned(rank: int) -> tuple[str, str]:
    """Ranks with different lengths and budgets; and a copy of a wrapped model."""
    group = distributed.group.WORLD
    model = wrap(FAMILIES["mamba2"](), budget=("1MiB", "2MiB")[rank], plan_group=group)
    copied = copy.deepcopy(model)
    plans: list[str] = []
    for one in (model, copied):
        ids = torch.randint(3, VOCABULARY, (1, (300, 200)[rank]), generator=torch.Generator().manual_seed(rank))
        one(input_ids=ids, labels=ids).loss.backward()
        plans.append(str(wrapped(one).plan))
    return plans[0], plans[1]


def test_ranks_agree_on_the_plan_of_a_wrapped_model(ranks: Ranks) -> None:
    one, other = ranks.run(planned)
    # Of each of the two: what the copy measures can tell the planner otherwise than what the first did.
    assert one == other


def without_labels(rank: int) -> None:
    ids = batches()
    model = wrap(sharded(FAMILIES["mamba2"]()), plan=PLAN)
    own = FAMILIES["mamba2"]()
    assert_same(model(input_ids=ids[rank]).logits, own(input_ids=ids[rank]).logits, 1e-5)


def test_logits(ranks: Ranks) -> None:
    ranks.run(without_labels)
