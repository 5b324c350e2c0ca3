"""LoRA on a wrapped model with a frozen base, in one process and on two ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from magc import Plan
from magc.integrations.wrap import wrap
from tests.distributed.ranks import RANKS, Ranks

pytest.importorskip("transformers")

from tests.integrations.models import FAMILIES, TOKENS, VOCABULARY, assert_same

peft = pytest.importorskip("peft")

PLAN = Plan(layers=2, tokens=4)


def batches() -> Tensor:
    """One micro-batch for every rank; `(rank, batch, tokens)`."""
    return torch.randint(3, VOCABULARY, (RANKS, 2, TOKENS), generator=torch.Generator().manual_seed(1))


def adapted(family: str, **plan: Plan) -> Any:
    """A model with adapters that do something, wrapped if a plan is given.

    Its parameters are float64, for gradients of adapters are small differences of large numbers. Some of what transformers
    computes is float32 nonetheless.
    """
    model = FAMILIES[family]()
    if plan:
        wrap(model, **plan)
    targets = ["in_proj"] if family != "bamba" else ["q_proj", "v_proj", "gate_proj"]
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
        return peft.get_peft_model(model, config).double()


def adapters(model: Any) -> dict[str, Tensor]:
    """Gradients of the adapters; everything else is frozen and has none."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        assert ("lora_" in name) == (parameter.grad is not None), name
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def expected(family: str) -> dict[str, Tensor]:
    model = adapted(family)
    for rows in batches():
        (model(input_ids=rows, labels=rows).loss / RANKS).backward()
    return adapters(model)


def compare(actual: dict[str, Tensor], family: str) -> None:
    want = expected(family)
    assert actual.keys() == want.keys()
    for name, grad in actual.items():
        assert want[name].abs().max() > 0, name
        assert_same(grad, want[name], 1e-5, name)


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
@pytest.mark.parametrize("inputs_require_grads", [False, True])
def test_gradients_of_adapters(family: str, inputs_require_grads: bool) -> None:
    model = adapted(family, plan=PLAN)
    if inputs_require_grads:
        model.enable_input_require_grads()
    for rows in batches():
        (model(input_ids=rows, labels=rows).loss / RANKS).backward()
    compare(adapters(model), family)


def test_a_model_that_has_adapters_is_wrapped() -> None:
    model = adapted("mamba2")
    wrap(model.get_base_model(), plan=PLAN)
    for rows in batches():
        (model(input_ids=rows, labels=rows).loss / RANKS).backward()
    compare(adapters(model), "mamba2")


def on_ranks(rank: int, parallel: str) -> None:
    rows = batches()[rank]
    model = adapted("mamba2", plan=PLAN)
    if parallel == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in model.get_base_model().backbone.layers:
            fully_shard(block)
        fully_shard(model)
    model(input_ids=rows, labels=rows).loss.backward()
    compare(adapters(model), "mamba2")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks(ranks: Ranks, parallel: str) -> None:
    ranks.run(on_ranks, parallel)
