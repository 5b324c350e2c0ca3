"""A wrapped model's logits, loss and gradients are those of transformers' own code, which no one here wrote."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from magc.integrations.wrap import wrap
from magc.plan import PlanOrRule
from tests.integrations.models import (
    FAMILIES,
    PLANS,
    InDouble,
    assert_same,
    assert_same_gradients,
    batch,
    gradients,
    labels_of,
    wrapped_copy,
)

TOLERANCE = 1e-5
both = pytest.mark.parametrize("padding", [None, "left", "right"])
all_plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
all_families = pytest.mark.parametrize("family", FAMILIES)


@all_families
@all_plans
@both
def test_loss_and_gradients(family: str, plan: PlanOrRule, padding: str | None) -> None:
    model = FAMILIES[family]()
    wrapped = wrapped_copy(model, plan)
    inputs = batch(padding)
    expected, actual = (each(**inputs, labels=labels_of(inputs)) for each in (model, wrapped))
    assert type(actual) is type(expected)
    assert_same(actual.loss, expected.loss, TOLERANCE)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(wrapped, model, TOLERANCE)


@all_families
@all_plans
@both
def test_logits_and_gradients(family: str, plan: PlanOrRule, padding: str | None) -> None:
    model = FAMILIES[family]()
    wrapped = wrapped_copy(model, plan)
    inputs = batch(padding)
    expected, actual = model(**inputs).logits, wrapped(**inputs).logits
    assert_same(actual, expected, TOLERANCE)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert_same_gradients(wrapped, model, TOLERANCE)


@all_families
@both
def test_in_double_precision(family: str, padding: str | None) -> None:
    model = FAMILIES[family]().double()
    wrapped = wrapped_copy(model, PLANS["ragged"])
    inputs = batch(padding)
    with InDouble():
        expected = model(**inputs, labels=labels_of(inputs)).loss
        actual = wrapped(**inputs, labels=labels_of(inputs)).loss
        assert_same(actual, expected, 1e-12)
        expected.backward()
        actual.backward()
    assert_same_gradients(wrapped, model, 1e-12)


@all_families
def test_trunk_alone(family: str) -> None:
    trunk = FAMILIES[family]().base_model
    wrapped = wrapped_copy(trunk, PLANS["ragged"])
    inputs = batch("left")
    expected, actual = trunk(**inputs), wrapped(**inputs)
    assert type(actual) is type(expected)
    assert_same(actual.last_hidden_state, expected.last_hidden_state, TOLERANCE)
    expected.last_hidden_state.square().sum().backward()
    actual.last_hidden_state.square().sum().backward()
    assert_same_gradients(wrapped, trunk, 1e-4)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied head": ("mamba2", {"tie_word_embeddings": False}),
    "biases": ("mamba2", {"use_bias": True}),
    "no bias in the convolution": ("mamba2", {"use_conv_bias": False}),
    "another activation": ("mamba2", {"hidden_act": "gelu"}),
    "limited steps": ("mamba2", {"time_step_limit": (0.002, 0.05)}),
    "residual in the weights' type": ("mamba2", {"residual_in_fp32": False}),
    "narrow convolution": ("mamba2", {"conv_kernel": 2}),
    "attention with biases, one head of keys each": (
        "bamba",
        {"attention_bias": True, "mamba_proj_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "attention written out": ("bamba", {"attn_implementation": "eager"}),
    "attention only": ("bamba", {"attn_layer_indices": [0, 1, 2]}),
    "a norm on groups, in front of the gate": ("falcon_h1", {"mamba_rms_norm": True}),
    "a norm behind the gate": ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "no experts": ("granite", {"num_local_experts": 0}),
    "rotary embeddings": ("granite", {"position_embedding_type": "rope"}),
    "attention only, no Mamba": ("granite", {"layer_types": ["attention"] * 3}),
    "experts in a latent space": ("nemotron_h", {"moe_latent_size": 8}),
    "an MLP in front, attention behind": ("nemotron_h", {"layers_block_type": ["mlp", "mamba", "attention"]}),
    "all experts": ("qwen3_next", {"mlp_only_layers": [], "norm_topk_prob": False}),
    "heads of values as many as of keys": ("qwen3_next", {"linear_num_value_heads": 2}),
    "attention with biases": ("qwen3_next", {"attention_bias": True}),
    "two shared blocks": (
        "zamba2",
        {"num_mem_blocks": 2, "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"]},
    ),
    "shared blocks without positions and adapters": (
        "zamba2",
        {"use_mem_rope": False, "use_shared_attention_adapter": False, "add_bias_linear": True},
    ),
    "biases, Mamba-1": ("mamba", {"use_bias": True, "use_conv_bias": False}),
    "another activation, Mamba-1": ("mamba", {"hidden_act": "relu"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations(variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = FAMILIES[family](**changes)
    wrapped = wrapped_copy(model, PLANS["ragged"])
    inputs = batch("right" if "attn_implementation" in changes else "left")
    expected = model(**inputs, labels=labels_of(inputs)).loss
    actual = wrapped(**inputs, labels=labels_of(inputs)).loss
    assert_same(actual, expected, TOLERANCE)
    expected.backward()
    actual.backward()
    assert_same_gradients(wrapped, model, TOLERANCE)


@all_families
def test_bfloat16_is_as_close_to_the_truth(family: str) -> None:
    model = FAMILIES[family]()
    inputs = batch("left")
    labels = labels_of(inputs)
    model(**inputs, labels=labels).loss.backward()
    rounded = copy.deepcopy(model).bfloat16()
    rounded.zero_grad()
    wrapped = wrapped_copy(rounded, PLANS["ragged"])
    rounded(**inputs, labels=labels).loss.backward()
    wrapped(**inputs, labels=labels).loss.backward()

    def error(other: Any) -> float:
        pairs = zip(other.parameters(), model.parameters(), strict=True)
        return sum(float((p.grad.double() - q.grad.double()).square().sum()) for p, q in pairs) ** 0.5

    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in wrapped.parameters())
    assert error(wrapped) <= 1.5 * error(rounded)


@pytest.mark.parametrize("products", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["granite", "nemotron_h", "qwen3_next"])
def test_other_products_of_experts(family: str, products: str) -> None:
    model = FAMILIES[family]()
    model.set_experts_implementation(products)
    wrapped = wrapped_copy(model, PLANS["ragged"])
    inputs = batch("right")
    expected = model(**inputs, labels=labels_of(inputs)).loss
    actual = wrapped(**inputs, labels=labels_of(inputs)).loss
    assert_same(actual, expected, TOLERANCE)
    expected.backward()
    actual.backward()
    assert_same_gradients(wrapped, model, TOLERANCE)


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_autocast(family: str) -> None:
    """The bound is transformers' own error: what its autocast makes of the gradients of float32."""
    whole = FAMILIES[family]()
    models = [copy.deepcopy(whole), wrapped_copy(whole, PLANS["one cell"]), wrapped_copy(whole, PLANS["ragged"])]
    inputs = batch()
    exact = whole(**inputs, labels=inputs["input_ids"]).loss
    exact.backward()
    true = torch.cat([grad.flatten() for grad in gradients(whole).values()])
    errors: list[float] = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        assert loss.dtype == torch.float32
        assert_same(loss, exact, 2e-2)
        loss.backward()
        found = torch.cat([grad.flatten() for grad in gradients(model).values()])
        errors.append(float((found - true).norm() / true.norm()))
    own, one, split = errors
    assert own > 1e-3
    assert max(one, split) < 1.25 * own


@all_families
def test_budget(family: str) -> None:
    model = FAMILIES[family]()
    wrapped = wrap(copy.deepcopy(model), budget="1MiB")
    inputs = batch("right")
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    wrapped(**inputs, labels=labels_of(inputs)).loss.backward()
    assert_same_gradients(wrapped, model, TOLERANCE)


def test_gradient_accumulates_over_calls() -> None:
    model = FAMILIES["mamba"]()
    wrapped = wrapped_copy(model, PLANS["layers x segments"])
    for padding in (None, "left"):
        inputs = batch(padding)
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        wrapped(**inputs, labels=labels_of(inputs)).loss.backward()
    assert_same_gradients(wrapped, model, TOLERANCE)
