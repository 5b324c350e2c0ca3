"""mamba-ssm's models on the grid, against transformers' code with the same parameters."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from magc import Plan, grid_checkpoint
from magc.errors import InputError, LayerContractError
from magc.integrations.mamba_ssm import mixer_layer
from magc.integrations.wrap import find, unwrap, wrap, wrapped
from magc.plan import PlanOrRule
from tests.autotuning import take_smallest_candidates
from tests.integrations.grouped_norm import norm_in_groups
from tests.integrations.mamba_ssm_modules import Mamba, Mamba2, MambaLMHeadModel
from tests.integrations.models import PLANS, VOCABULARY, assert_same, batch, labels_of, mamba, mamba2


def pair(kind: str) -> tuple[Any, Any]:
    """A model of transformers, and one of mamba-ssm's with its parameters."""
    theirs = (mamba2 if kind == "mamba2" else mamba)(tie_word_embeddings=True)
    if kind == "mamba2":
        theirs = norm_in_groups(theirs)
        mixers: list[nn.Module] = [Mamba2(8, headdim=4, d_state=3, ngroups=2) for _ in range(3)]
    else:
        mixers = [Mamba(8, d_state=3, dt_rank=2) for _ in range(3)]
    model = MambaLMHeadModel(VOCABULARY, 8, mixers)
    model.load_state_dict({renamed(name): value for name, value in theirs.state_dict().items()})
    return theirs, model.train()


def renamed(name: str) -> str:
    return name.replace("embeddings", "embedding")


def assert_same_gradients(model: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    expected = {renamed(name): parameter.grad for name, parameter in theirs.named_parameters()}
    expected = {name: grad for name, grad in expected.items() if name != "lm_head.weight"}  # tied
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert_same(grad, expected[name], tolerance, name)


both = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


@both
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_logits_and_gradients(kind: str, plan: PlanOrRule) -> None:
    theirs, model = pair(kind)
    wrap(model, plan=plan)
    expected, actual = theirs(**batch()).logits, model(**batch()).logits
    assert_same(actual, expected, 1e-5)
    for logits in (expected, actual):
        logits.square().sum().backward()
    assert_same_gradients(model, theirs)


@both
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_loss_by_labels(kind: str, plan: PlanOrRule) -> None:
    theirs, model = pair(kind)
    wrap(model, plan=plan)
    inputs = batch()
    expected, output = theirs(**inputs, labels=labels_of(inputs)).loss, model(**inputs, labels=labels_of(inputs))
    assert output.logits is None
    assert_same(output.loss, expected, 1e-5)
    expected.backward()
    output.loss.backward()
    assert_same_gradients(model, theirs)
    with torch.no_grad():
        assert_same(model(**inputs, labels=labels_of(inputs)).loss, expected, 1e-5)


@both
def test_packed_rows(kind: str) -> None:
    theirs, model = pair(kind)
    wrap(model, plan=PLANS["ragged"])
    ids = batch()["input_ids"][:1]
    logits = model(ids, seq_idx=torch.tensor([[0] * 4 + [1] * 7])).logits
    assert_same(logits, torch.cat([theirs(ids[:, :4]).logits, theirs(ids[:, 4:]).logits], 1), 1e-5)


@both
def test_parameters_may_be_replaced_afterwards(kind: str) -> None:
    theirs, model = pair(kind)
    wrap(model, plan=PLANS["ragged"])
    names = list(model.state_dict())
    for each in (theirs, model):
        each.load_state_dict({name: 0.9 * value for name, value in each.state_dict().items()}, assign=True)
    model.lm_head.weight = model.backbone.embedding.weight
    theirs.tie_weights()
    ids = batch()["input_ids"]
    theirs(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    assert_same_gradients(model, theirs)
    assert list(model.state_dict()) == names


@both
def test_a_copy_is_its_own_and_unwrap_undoes(kind: str) -> None:
    _, model = pair(kind)
    wrap(model, plan=PLANS["ragged"])
    twin = copy.deepcopy(model)
    ids = batch()["input_ids"]
    twin(ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert wrapped(twin).model is twin
    assert find(unwrap(model)) is None
    assert "forward" not in vars(model.backbone)


@both
def test_a_mixer_as_a_layer(kind: str) -> None:
    _, model = pair(kind)
    mixers = [block.mixer for block in model.backbone.layers]
    layers = [mixer_layer(mixer) for mixer in mixers]
    x = torch.randn(2, 9, 8)
    whole, _ = grid_checkpoint(layers, x, plan=Plan())
    parts, _ = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=2))
    assert_same(parts, whole, 1e-6)
    parts.sum().backward()
    assert all(parameter.grad is not None for mixer in mixers for parameter in mixer.parameters())


def test_refused_with_a_remedy() -> None:
    _, model = pair("mamba2")
    ids = batch()["input_ids"]
    with pytest.raises(InputError, match="leave labels out"):
        wrap(model, plan=Plan(), logits=True)
    wrap(model, plan=Plan())
    with pytest.raises(InputError, match=r"cu_seqlens in a training forward; its grid serves input_ids and seq_idx"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 11]))
    with pytest.raises(InputError, match="leave out num_last_tokens"):
        model(ids, labels=ids, num_last_tokens=1)
    mixer = copy.deepcopy(model.backbone.layers[0].mixer)
    mixer.process_group = object()
    with pytest.raises(LayerContractError, match="split over processes"):
        mixer_layer(mixer)
    with pytest.raises(InputError, match="Linear is a mixer that magc does not know"):
        mixer_layer(nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_mamba_ssm_itself(monkeypatch: pytest.MonkeyPatch, layer: str, dtype: torch.dtype) -> None:
    """Gradients are off from those of a float32 model by no more than mamba-ssm's own, or by rounding in float32.

    Where its compiled extensions are missing, its own PyTorch reference of the Mamba-1 scan and its path of Mamba-2
    without them run.
    """
    mixer_seq = pytest.importorskip("mamba_ssm.models.mixer_seq_simple")
    take_smallest_candidates(monkeypatch)
    scans = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    if not hasattr(scans.selective_scan_cuda, "fwd"):
        monkeypatch.setattr("mamba_ssm.modules.mamba_simple.selective_scan_fn", scans.selective_scan_ref)
    config_mamba = pytest.importorskip("mamba_ssm.models.config_mamba")
    more: dict[str, Any] = {"headdim": 16, "chunk_size": 64} if layer == "Mamba2" else {}
    if layer == "Mamba2" and importlib.util.find_spec("causal_conv1d") is None:
        more["use_mem_eff_path"] = False
    config = config_mamba.MambaConfig(
        d_model=64,
        n_layer=3,
        vocab_size=128,
        ssm_cfg={"layer": layer, "d_state": 16, **more},
        pad_vocab_size_multiple=1,
    )
    torch.manual_seed(0)
    truth = mixer_seq.MambaLMHeadModel(config, device="cuda", dtype=torch.float32)
    ids = torch.randint(0, 128, (2, 200), device="cuda")

    def gradients(model: Any) -> list[torch.Tensor]:
        logits = model(ids).logits.float()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return [parameter.grad.double() for parameter in model.parameters()]

    def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5

    plain, ours = copy.deepcopy(truth).to(dtype), wrap(copy.deepcopy(truth).to(dtype), plan=Plan(layers=2, tokens=48))
    expected = gradients(truth)
    size = sum(float(grad.square().sum()) for grad in expected) ** 0.5
    assert error(gradients(ours), expected) <= max(1.5 * error(gradients(plain), expected), 1e-3 * size)
