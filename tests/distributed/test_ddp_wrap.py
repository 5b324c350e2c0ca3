"""A wrapped model under DistributedDataParallel: gradients are those of the whole batch in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from magc import Plan
from magc.integrations.wrap import wrap
from tests.distributed.ranks import RANKS, Ranks

pytest.importorskip("transformers")

from tests.integrations.models import TOKENS, VOCABULARY, assert_same, gradients, mamba2


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def accumulating(rank: int) -> None:
    """Two micro-batches, of which the first is not reduced."""
    # (micro-batch, rank, batch, tokens)
    ids = torch.randint(3, VOCABULARY, (2, RANKS, 2, TOKENS), generator=torch.Generator().manual_seed(1))
    model = DistributedDataParallel(wrap(mamba2(), plan=Plan(layers=2, tokens=4)))
    with model.no_sync():
        loss_of(model, ids[0, rank]).backward()
    loss_of(model, ids[1, rank]).backward()
    whole = mamba2()
    for micro in ids:
        loss_of(whole, micro.flatten(0, 1)).backward()
    expected = gradients(whole)
    for name, actual in gradients(model.module).items():
        assert_same(actual, expected[name], 1e-5, name)


def test_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    ranks.run(accumulating)
