"""Models that are changed after `magc.wrap`: what the grid cannot see any more is refused, and wrapping again takes it up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from magc import Plan
from magc.errors import LayerContractError
from magc.integrations.wrap import wrap, wrapped
from tests.integrations.models import FAMILIES, assert_same, assert_same_gradients, batch, mamba, mamba2

PLAN = Plan(layers=2, tokens=4)


def loss_of(model: Any) -> torch.Tensor:
    ids = batch()["input_ids"]
    return model(input_ids=ids, labels=ids).loss


def trunk_of(model: Any) -> Any:
    return model.backbone if hasattr(model, "backbone") else model.model


def other_norm(model: Any) -> str:
    trunk = trunk_of(model)
    name = next(name for name in ("norm_f", "final_layernorm", "norm") if hasattr(trunk, name))
    setattr(trunk, name, copy.deepcopy(getattr(trunk, name)))
    return name


def fewer_layers(model: Any) -> str:
    trunk_of(model).layers = trunk_of(model).layers[:1]
    return "layers"


def another_block(model: Any) -> str:
    layers = trunk_of(model).layers
    layers[1] = copy.deepcopy(layers[1])
    return r"layers"


def another_trunk(model: Any) -> str:
    name = "backbone" if hasattr(model, "backbone") else "model"
    setattr(model, name, copy.deepcopy(trunk_of(model)))
    return name


@pytest.mark.parametrize("change", [other_norm, fewer_layers, another_block, another_trunk])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_was_replaced_is_refused(family: str, change: Callable[[Any], str]) -> None:
    model = wrap(FAMILIES[family](), plan=PLAN)
    name = change(model)
    with pytest.raises(LayerContractError, match=rf"{name} of this .* was replaced after magc\.wrap"):
        loss_of(model)


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_wrapping_again_takes_it_up(family: str) -> None:
    model = FAMILIES[family]()
    wrap(model, plan=PLAN)
    name = other_norm(model)
    with torch.no_grad():
        getattr(trunk_of(model), name).weight.mul_(2)
    wrap(model, plan=PLAN)
    plain = copy.deepcopy(model)
    for forward in wrapped(plain).forwards:
        del vars(forward.module)["forward"]
    for each in (model, plain):
        loss_of(each).backward()
    assert_same_gradients(model, plain, 1e-5)


def test_a_block_that_was_compiled_is_refused() -> None:
    """The grid calls what is in the block, so its compiled code would not run, and nobody would know."""
    model = wrap(mamba2(), plan=PLAN)
    model.backbone.layers[0].compile(backend="eager")
    with pytest.raises(LayerContractError, match=r"layers\.0 .* was compiled"):
        loss_of(model)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_may_be_compiled_around_the_grid(in_place: bool) -> None:
    model = wrap(mamba2(), plan=PLAN)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled: Any = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
    for each, call in ((model, compiled), (plain, plain)):
        loss_of(call).backward()
        assert_same(call(batch()["input_ids"]).logits, each(batch()["input_ids"]).logits, 1e-5)
    assert_same_gradients(model, plain, 1e-5)


class Adapted(nn.Module):
    """A linear layer with a trainable part beside it, as LoRA makes them; its weight is that of the layer alone."""

    def __init__(self, base: nn.Linear | nn.Conv1d) -> None:
        super().__init__()
        self.base = base
        torch.manual_seed(7)
        self.more = nn.Parameter(0.1 * torch.randn_like(base.weight))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def kernel_size(self) -> Any:
        return self.base.kernel_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + nn.functional.linear(x, self.more)


def test_an_adapter_on_the_step_projection() -> None:
    """It counts, as if it were merged into the weight."""
    model = mamba()
    merged = copy.deepcopy(model)
    for block, other in zip(model.backbone.layers, merged.backbone.layers, strict=True):
        block.mixer.dt_proj = Adapted(block.mixer.dt_proj)
        with torch.no_grad():
            other.mixer.dt_proj.weight.add_(block.mixer.dt_proj.more)
    wrap(model, plan=PLAN)
    loss_of(model).backward()
    loss_of(merged).backward()
    for block, other in zip(model.backbone.layers, merged.backbone.layers, strict=True):
        step = block.mixer.dt_proj
        assert_same(step.more.grad, other.mixer.dt_proj.weight.grad, 1e-5)
        assert_same(step.base.weight.grad, other.mixer.dt_proj.weight.grad, 1e-5)
        assert_same(step.base.bias.grad, other.mixer.dt_proj.bias.grad, 1e-5)


def test_an_adapter_on_the_convolution_is_refused() -> None:
    model = mamba2()
    model.backbone.layers[0].mixer.conv1d = Adapted(model.backbone.layers[0].mixer.conv1d)
    with pytest.raises(
        LayerContractError, match=r"layers\.0\.mixer\.conv1d is a Adapted.*LoRA belongs on the projections"
    ):
        wrap(model, plan=PLAN)
