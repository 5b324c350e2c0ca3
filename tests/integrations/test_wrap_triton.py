"""transformers' Mamba models on Triton kernels: the same numbers, as one operator per mixer where that is possible."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

import magc_kernels.mamba2.autograd as fused_operator
from magc import Plan
from magc.integrations.transformers.fused import runs_fused
from magc.integrations.wrap import wrap
from tests.integrations import mamba_ssm_modules
from tests.integrations.models import (
    VOCABULARY,
    InDouble,
    assert_same,
    assert_same_gradients,
    bamba,
    batch,
    falcon_mamba,
    mamba2,
    qwen3_next,
)

PLAN = Plan(layers=1, tokens=(1, 5))
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "num_hidden_layers": 2,
    "conv_kernel": 2,
}
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with triton_test(small_tiles=True):
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the output was needed, for each run of the operator that is a whole mixer."""
    seen: list[bool] = []
    operator = fused_operator.mamba2

    def noting(inputs: Any, **options: Any) -> Any:
        seen.append(options["output_needed"])
        return operator(inputs, **options)

    monkeypatch.setattr(fused_operator, "mamba2", noting)
    return seen


def short(padding: str | None) -> dict[str, Tensor]:
    """A batch of six tokens, of which the interpreter does not need long."""
    return {name: value[:1, :6] if padding is None else value[:1, 2:8] for name, value in batch(padding).items()}


def compare(model: Any, inputs: dict[str, Tensor], *, labels: bool) -> None:
    """A wrapped copy on Triton against transformers' own code in float64."""
    wrapped = wrap(copy.deepcopy(model).to(DEVICE), plan=PLAN, impl="triton")
    truth = copy.deepcopy(model).double()
    here = {name: value.to(DEVICE) for name, value in inputs.items()}
    with InDouble():
        expected = truth(**inputs, labels=inputs["input_ids"]).loss if labels else truth(**inputs).logits
        expected.square().sum().backward()
    actual = wrapped(**here, labels=here["input_ids"]).loss if labels else wrapped(**here).logits
    actual.square().sum().backward()
    assert_same(actual.cpu(), expected.float(), TOLERANCE)
    assert_same_gradients(wrapped.cpu().double(), truth, TOLERANCE)


@pytest.mark.parametrize("labels", [False, True])
def test_a_mixer_is_one_operator(labels: bool, runs: list[bool]) -> None:
    compare(mamba2(**SIZES), short(None), labels=labels)
    assert len(runs) > 0
    # The last block norms its output, so that is needed in a recompute too; the border of the first group is not.
    assert not all(runs)


def test_packed_rows_are_one_operator_too(runs: list[bool]) -> None:
    model = mamba2(**SIZES)
    ids = short(None)["input_ids"]
    wrapped = wrap(copy.deepcopy(model).to(DEVICE), plan=PLAN, impl="triton")
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]], device=DEVICE)
    truth = copy.deepcopy(model).double()
    with InDouble():
        expected = torch.cat([truth(ids[:, :2]).logits, truth(ids[:, 2:]).logits], dim=1)
        expected.square().sum().backward()
    actual = wrapped(ids.to(DEVICE), seq_idx=documents).logits
    actual.square().sum().backward()
    assert len(runs) > 0
    assert_same(actual.cpu(), expected.float(), TOLERANCE)
    assert_same_gradients(wrapped.cpu().double(), truth, TOLERANCE)


def test_padding_takes_separate_operators(runs: list[bool]) -> None:
    compare(mamba2(**SIZES), short("left"), labels=True)
    assert runs == []


def test_hooks_on_a_projection_take_separate_operators() -> None:
    mixer = mamba2(**SIZES).backbone.layers[0].mixer
    x = torch.zeros(1, 3, 16)
    assert runs_fused(mixer, x, "triton", "")
    mixer.out_proj.register_forward_hook(lambda *_: None)
    assert not runs_fused(mixer, x, "triton", "")


def test_selective_scan() -> None:
    compare(falcon_mamba(hidden_size=4, state_size=2, num_hidden_layers=2), short("right"), labels=True)


def test_attention_beside_it() -> None:
    sizes = {"hidden_size": 16, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
    more = {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_chunk_size": 16, "num_attention_heads": 2}
    compare(bamba(**sizes, **more, num_key_value_heads=1), short(None), labels=True)


def test_the_norms_of_a_delta_rule() -> None:
    sizes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
    compare(qwen3_next(**sizes, linear_conv_kernel_dim=2), short("right"), labels=True)


def test_models_of_mamba_ssm() -> None:
    """The last block norms its mixer's output, and blocks with an MLP go on with it."""
    mixers = [mamba_ssm_modules.Mamba2(16, headdim=16, d_state=16, ngroups=1) for _ in range(3)]
    model = mamba_ssm_modules.MambaLMHeadModel(VOCABULARY, 16, mixers)
    model.backbone.layers[0].mlp, model.backbone.layers[0].norm2 = torch.nn.Linear(16, 16), torch.nn.RMSNorm(16, 1e-5)
    for mixer in mixers:
        mixer.chunk_size = 16
    ids = short(None)["input_ids"].to(DEVICE)
    found: list[Any] = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        twin = copy.deepcopy(model).to(DEVICE, dtype).train()
        loss = wrap(twin, plan=PLAN, impl=impl)(ids, labels=ids).loss
        loss.backward()
        found.append((loss, twin))
    assert_same(found[0][0], found[1][0].float(), TOLERANCE)
    assert_same_gradients(found[0][1].double(), found[1][1], TOLERANCE)
