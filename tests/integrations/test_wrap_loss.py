"""Losses inside the grid beside the plain one: smoothed labels, z-loss, the routers' auxiliary loss."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import Plan
from magc.errors import InputError
from magc.integrations.transformers.routing import router_logits
from magc.integrations.wrap import wrap, wrapped
from magc.plan import PlanOrRule
from tests.integrations.models import (
    FAMILIES,
    PLANS,
    InDouble,
    assert_same,
    assert_same_gradients,
    batch,
    falcon_h1,
    granite,
    labels_of,
    mamba2,
    qwen3_next,
    wrapped_copy,
)

transformers: Any = pytest.importorskip("transformers")

PLAN = Plan(layers=2, tokens=4)
ROUTED = {"granite": granite, "qwen3_next": qwen3_next}
both = pytest.mark.parametrize("padding", [None, "left", "right"])
all_routed = pytest.mark.parametrize("family", ROUTED)


def by_hand(model: Any, inputs: dict[str, Tensor], smoothing: float, z_loss: float) -> Tensor:
    """The mean loss over targets, from whole logits."""
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    targets = labels_of(inputs)[:, 1:].flatten()
    loss = functional.cross_entropy(logits, targets, ignore_index=-100, label_smoothing=smoothing)
    return loss + z_loss * logits.logsumexp(-1).square()[targets != -100].mean()


@pytest.mark.parametrize("options", [(0.1, 0.0), (0.0, 0.01), (0.2, 0.05)], ids=["smoothing", "z-loss", "both"])
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "granite"])
def test_smoothing_and_z_loss(family: str, options: tuple[float, float]) -> None:
    model = FAMILIES[family]()
    twin = wrapped_copy(model, PLAN, label_smoothing=options[0], z_loss=options[1])
    inputs = batch("right")
    expected = by_hand(model, inputs, *options)
    actual = twin(**inputs, labels=labels_of(inputs)).loss
    assert_same(actual, expected, 1e-5)
    expected.backward()
    actual.backward()
    assert_same_gradients(twin, model, 1e-5)


def test_with_a_head_that_is_called() -> None:
    """A head with hooks is not plain, and makes logits of a segment."""
    model = falcon_h1()
    twin = wrapped_copy(model, PLAN, label_smoothing=0.1, z_loss=0.05)
    seen: list[int] = []
    twin.lm_head.register_forward_hook(lambda _module, _args, out: seen.append(out.shape[1]))
    inputs = batch()
    expected = by_hand(model, inputs, 0.1, 0.05)
    actual = twin(**inputs, labels=labels_of(inputs)).loss
    assert_same(actual, expected, 1e-5)
    expected.backward()
    actual.backward()
    assert_same_gradients(twin, model, 1e-5)
    assert max(seen) == 4


def test_the_report_says_so() -> None:
    report = wrapped(wrap(mamba2(), plan=PLAN, label_smoothing=0.1, z_loss=1e-4)).explain()
    assert "label smoothing 0.1 and z-loss 0.0001" in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.1, "logits": True}, "Leave out logits=True"),
        ({"label_smoothing": 1.0}, "less than 1"),
        ({"z_loss": -1.0}, "at least 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrap(mamba2(), plan=PLAN, **options)


@pytest.mark.parametrize("make", [lambda: mamba2().backbone, lambda: nn.LSTM(3, 4, batch_first=True)])
def test_a_model_without_a_loss(make: Any) -> None:
    model = make()
    with pytest.raises(InputError, match="computes none"):
        wrap(model, plan=Plan(), label_smoothing=0.1)
    assert "forward" not in vars(model)


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A few rows, padded on the right."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs = {name: value[index % 2] for name, value in batch("right").items()}
        return {**inputs, "labels": labels_of(batch("right"))[index % 2]}


def test_the_trainers_own_smoothing(tmp_path: Path) -> None:
    """It asks for logits and smoothes outside the grid: as without magc; `wrap`'s smoothing does the same inside."""

    def train(model: Any, smoothing: float) -> dict[str, Tensor]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            label_smoothing_factor=smoothing,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=Sequences()).train()
        return model.state_dict()

    expected = train(mamba2(), 0.1)
    outside = train(wrap(mamba2(), plan=PLAN), 0.1)
    inside = train(wrap(mamba2(), plan=PLAN, label_smoothing=0.1), 0.0)
    for name, value in expected.items():
        assert_same(outside[name], value, 1e-4, name)
        assert_same(inside[name], value, 1e-4, name)


# ---------------------------------------------------------------------- routers
ROUTERS_OF_GRANITE_UNRECORDED = "'int' object has no attribute 'to'"
"""What GraniteMoeHybrid of transformers 5.17 raises for `labels` with `output_router_logits`, with or without magc: it records
no logits of its routers, so its loss of them is the number 0, which it treats as a tensor."""


def by_parts(model: Any, call: dict[str, Any]) -> Any:
    """The model's output from its own parts: its loss without routers, and its own function of what its routers say."""
    experts, chosen = model.num_experts, model.num_experts_per_tok
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    seen: list[Tensor] = []

    def see(_module: Any, _args: Any, outputs: tuple[Tensor, ...]) -> None:
        (logits,) = (each for each in outputs if each.shape[-1] == experts)  # weights and indices are of fewer
        seen.append(logits)

    handles = [router.register_forward_hook(see) for router in routers]
    output = model(**{**call, "output_router_logits": False, "return_dict": True})
    for handle in handles:
        handle.remove()
    assert len(seen) == len(routers) > 0
    balance = importlib.import_module(type(model).__module__).load_balancing_loss_func
    output.aux_loss = balance(tuple(seen), experts, chosen, call.get("attention_mask"))
    output.loss = output.loss + model.router_aux_loss_coef * output.aux_loss
    return output if call.get("return_dict", True) else (output.loss, output.aux_loss, output.logits)


def routed(model: Any, call: dict[str, Any]) -> Any:
    """The output of the model's own code, or `by_parts` where that fails for a known reason."""
    try:
        return model(**call)
    except AttributeError as error:
        if str(error) != ROUTERS_OF_GRANITE_UNRECORDED:
            raise
        return by_parts(model, call)


@all_routed
@both
def test_the_parts_of_the_truth_are_the_models_own(family: str, padding: str | None) -> None:
    model = ROUTED[family](router_aux_loss_coef=0.5)
    call = {**batch(padding), "labels": labels_of(batch(padding)), "output_router_logits": True}
    try:
        expected = model(**call)
    except AttributeError as error:
        if str(error) != ROUTERS_OF_GRANITE_UNRECORDED:
            raise
        pytest.skip(f"{type(model).__name__} itself, unwrapped, raises AttributeError: {error}")
    actual = by_parts(model, call)
    assert type(actual) is type(expected)
    assert_same(actual.aux_loss, expected.aux_loss, 1e-6)
    assert_same(actual.loss, expected.loss, 1e-6)


class Router(nn.Module):
    """Returns what it was made with."""

    num_experts = 4

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self) -> tuple[Tensor, ...]:
        return self.outputs


LOGITS, WEIGHTS, INDICES = torch.randn(3, 4), torch.rand(3, 2), torch.ones(3, 2, dtype=torch.int64)


@pytest.mark.parametrize("outputs", [(LOGITS, WEIGHTS, INDICES), (INDICES, WEIGHTS, LOGITS)], ids=["first", "last"])
def test_logits_of_routers_of_any_release(outputs: tuple[Tensor, ...]) -> None:
    router = Router(*outputs)
    with router_logits(router) as seen:
        router()
    assert len(seen) == 1
    assert seen[0] is LOGITS


@pytest.mark.parametrize("outputs", [(WEIGHTS, LOGITS, INDICES), (INDICES, LOGITS, WEIGHTS), (INDICES, INDICES)])
def test_routers_without_known_logits_are_refused(outputs: tuple[Tensor, ...]) -> None:
    router = Router(*outputs)
    with router_logits(router), pytest.raises(InputError, match=r"Router returned .*Leave out output_router_logits"):
        router()


@all_routed
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@both
def test_loss_of_the_routers(family: str, plan: PlanOrRule, padding: str | None) -> None:
    model = ROUTED[family](router_aux_loss_coef=0.5)
    twin = wrapped_copy(model, plan)
    call = {**batch(padding), "labels": labels_of(batch(padding)), "output_router_logits": True}
    expected, actual = routed(model, call), twin(**call)
    assert type(actual) is type(expected)
    assert_same(actual.aux_loss, expected.aux_loss, 1e-5)
    assert_same(actual.loss, expected.loss, 1e-5)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(twin, model, 1e-5)


@all_routed
def test_loss_of_the_routers_in_double_precision(family: str) -> None:
    model = ROUTED[family](router_aux_loss_coef=0.5).double()
    twin = wrapped_copy(model, PLANS["ragged"])
    call = {**batch(), "labels": labels_of(batch()), "output_router_logits": True}
    with InDouble():
        expected, actual = routed(model, call), twin(**call)
        assert_same(actual.aux_loss, expected.aux_loss, 1e-12)
        expected.loss.backward()
        actual.loss.backward()
    assert_same_gradients(twin, model, 1e-12)


@all_routed
def test_loss_of_the_routers_by_the_configuration(family: str) -> None:
    model = ROUTED[family](output_router_logits=True)
    twin = wrapped_copy(model, PLAN)
    inputs = batch()
    call = {**inputs, "labels": labels_of(inputs), "num_items_in_batch": 9, "return_dict": False}
    expected, actual = routed(model, call), twin(**call)
    assert len(actual) == 2
    assert_same(actual[0], expected[0], 1e-5)
    assert_same(actual[1], expected[1], 1e-5)
    assert_same(
        twin(**{**call, "output_router_logits": False})[0], model(**{**call, "output_router_logits": False})[0], 1e-5
    )


@all_routed
def test_logits_of_routers_are_refused(family: str) -> None:
    twin = wrapped_copy(ROUTED[family](), PLAN)
    refused = pytest.raises(InputError, match=r"output_router_logits .*with labels")
    with refused:
        twin(**batch(), output_router_logits=True)
    inputs = batch()
    wrap(twin, plan=PLAN, logits=True)
    with refused:
        twin(**inputs, labels=labels_of(inputs), output_router_logits=True)
    twin.config.output_router_logits = True
    with refused:
        twin(**inputs)
    assert twin(**inputs, output_router_logits=False).logits is not None
    with torch.no_grad():
        assert twin(**inputs).logits is not None


def test_a_loss_of_routers_without_routers() -> None:
    twin = wrapped_copy(granite(num_local_experts=0), PLAN)
    inputs = batch()
    with pytest.raises(InputError, match="no layer has experts"):
        twin(**inputs, labels=labels_of(inputs), output_router_logits=True)


def test_routers_keep_no_hooks() -> None:
    model = wrap(copy.deepcopy(qwen3_next()), plan=PLAN)
    inputs = batch()
    model(**inputs, labels=labels_of(inputs), output_router_logits=True).loss.backward()
    assert not any(vars(module)["_forward_hooks"] for module in model.modules())
