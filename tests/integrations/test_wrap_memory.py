"""What wrapping is for: a training step of a model within a budget that its own code exceeds many times."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from magc.integrations.wrap import wrap, wrapped
from magc.meter import MemoryMeter
from tests.integrations.models import FAMILIES, assert_same_gradients

BUDGET = 3 << 20
VOCABULARY = 2000
SIZES = {"hidden_size": 16, "vocab_size": VOCABULARY, "num_hidden_layers": 4}
ATTENDING = ("bamba", "falcon_h1", "granite", "nemotron_h", "qwen3_next", "zamba2")
MORE: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"num_hidden_layers": 2},
    "granite": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    "zamba2": {
        "num_hidden_layers": 2,
        "layers_block_type": ["hybrid", "mamba"],
        "num_key_value_heads": 1,
        "use_shared_attention_adapter": False,
    },
}


def peak_of_a_step(model: Any, ids: torch.Tensor) -> int:
    with MemoryMeter("cpu") as meter:
        model(ids, labels=ids).loss.backward()
    return meter.peak_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_stays_within_its_budget(family: str) -> None:
    model = FAMILIES[family](**{**SIZES, **MORE.get(family, {})})
    ids = torch.randint(3, VOCABULARY, (2, 384), generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(model)
    wrap(model, budget=BUDGET)
    model(ids, labels=ids)  # measures and plans
    assert ids.numel() * VOCABULARY * 4 > BUDGET  # the logits alone would exceed it
    assert peak_of_a_step(plain, ids) > 6 * BUDGET
    peak = peak_of_a_step(model, ids)
    assert peak <= BUDGET
    plan = wrapped(model).plan
    assert plan is not None
    assert plan.forecast is not None
    # A layer with attention takes least in its first segment and most in its last; the forecast counts what it can keep.
    assert peak == pytest.approx(plan.forecast.peak_bytes, rel=0.2 if family in ATTENDING else 0.1)
    assert_same_gradients(model, plain, 1e-5)
