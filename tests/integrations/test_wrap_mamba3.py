"""mamba-ssm's models with Mamba-3 mixers on the grid, against the recurrence token by token in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import Plan, grid_checkpoint
from magc.errors import InputError, LayerContractError
from magc.integrations.mamba_ssm import mixer_layer
from magc.integrations.wrap import find, unwrap, wrap, wrapped
from magc.plan import PlanOrRule
from tests.autotuning import take_smallest_candidates
from tests.integrations.mamba_ssm_modules import Mamba2, Mamba3, MambaLMHeadModel
from tests.integrations.models import PLANS, VOCABULARY, assert_same, batch, labels_of
from tests.kernels.mamba3_recurrence import naive_mixer, rms

VARIANTS: dict[str, dict[str, Any]] = {
    "one input": {"A_floor": 0.6},
    "norm": {"is_outproj_norm": True, "rope_fraction": 1.0, "ngroups": 2, "headdim": 8},
    "two inputs": {"is_mimo": True, "ngroups": 2},
    "three inputs and norm": {"is_mimo": True, "mimo_rank": 3, "is_outproj_norm": True, "rope_fraction": 1.0},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def model_of(variant: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    mixers: list[nn.Module] = [Mamba3(8, **{"d_state": 6, "headdim": 4, **variant}) for _ in range(3)]
    model = MambaLMHeadModel(VOCABULARY, 8, mixers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def naive_logits(model: Any, ids: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    stream = model.backbone.embedding(ids)
    for block in model.backbone.layers:
        mixer = block.mixer
        stream = stream + naive_mixer(
            mixer,
            rms(stream) * block.norm.weight,
            groups=mixer.num_bc_heads,
            angles=mixer.num_rope_angles,
            seq_idx=seq_idx,
        )
    return rms(stream) * model.backbone.norm_f.weight @ model.lm_head.weight.T


def naive_loss(model: Any, ids: Tensor, labels: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    logits = naive_logits(model, ids, seq_idx)[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def assert_same_gradients(model: Any, truth: Any, tolerance: float = 1e-5) -> None:
    expected = {name: parameter.grad for name, parameter in truth.named_parameters()}
    for name, parameter in model.named_parameters():
        assert expected[name].abs().max() > 0, name
        assert_same(parameter.grad, expected[name].to(parameter.dtype), tolerance, name)


@variants
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_logits_and_gradients(variant: dict[str, Any], plan: PlanOrRule) -> None:
    model = model_of(variant)
    truth = double(model)
    wrap(model, plan=plan)
    ids = batch()["input_ids"]
    expected, actual = naive_logits(truth, ids), model(ids).logits
    assert_same(actual, expected.float(), 1e-5)
    for logits in (expected, actual):
        functional.silu(logits).sum().backward()
    assert_same_gradients(model, truth)


@variants
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_loss_by_labels(variant: dict[str, Any], plan: PlanOrRule) -> None:
    model = model_of(variant)
    truth = double(model)
    wrap(model, plan=plan)
    inputs = batch()
    labels = labels_of(inputs)
    expected, output = naive_loss(truth, inputs["input_ids"], labels), model(**inputs, labels=labels)
    assert output.logits is None
    assert_same(output.loss, expected.float(), 1e-5)
    expected.backward()
    output.loss.backward()
    assert_same_gradients(model, truth)


@variants
def test_gradients_in_float64(variant: dict[str, Any]) -> None:
    model = double(model_of(variant))
    truth = double(model)
    wrap(model, plan=Plan(layers=1, tokens=3), accumulate=torch.float64)
    ids = batch()["input_ids"]
    for logits in (naive_logits(truth, ids), model(ids).logits):
        functional.silu(logits).sum().backward()
    assert_same_gradients(model, truth, 1e-11)


@variants
def test_packed_rows(variant: dict[str, Any]) -> None:
    model = model_of(variant)
    truth = double(model)
    wrap(model, plan=PLANS["ragged"])
    ids = batch()["input_ids"][:1]
    seq_idx = torch.tensor([[0] * 4 + [1] * 7])
    apart = torch.cat([naive_logits(truth, ids[:, :4]), naive_logits(truth, ids[:, 4:])], 1)
    assert_same(model(ids, seq_idx=seq_idx).logits, apart.float(), 1e-5)
    naive_loss(truth, ids, ids, seq_idx).backward()
    model(ids, labels=ids, seq_idx=seq_idx).loss.backward()
    assert_same_gradients(model, truth)


@variants
def test_parameters_may_be_replaced_afterwards(variant: dict[str, Any]) -> None:
    model = model_of(variant)
    wrap(model, plan=PLANS["ragged"])
    names = list(model.state_dict())
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True)
    model.lm_head.weight = model.backbone.embedding.weight
    truth = double(unwrap(copy.deepcopy(model)))
    ids = batch()["input_ids"]
    naive_loss(truth, ids, ids).backward()
    model(ids, labels=ids).loss.backward()
    assert_same_gradients(model, truth)
    assert list(model.state_dict()) == names


def test_a_copy_is_its_own_and_unwrap_undoes() -> None:
    model = model_of({})
    wrap(model, plan=PLANS["ragged"])
    twin = copy.deepcopy(model)
    ids = batch()["input_ids"]
    twin(ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert wrapped(twin).model is twin
    assert "the scan of Mamba-3 runs in plain PyTorch" in " ".join(wrapped(model).explain().split())
    assert find(unwrap(model)) is None
    assert "forward" not in vars(model.backbone)


@variants
def test_a_mixer_as_a_layer(variant: dict[str, Any]) -> None:
    mixers = [block.mixer for block in model_of(variant).backbone.layers]
    layers = [mixer_layer(mixer) for mixer in mixers]
    x = torch.randn(2, 9, 8)
    whole, _ = grid_checkpoint(layers, x, plan=Plan())
    parts, _ = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=2))
    assert_same(parts, whole, 1e-5)
    parts.sum().backward()
    assert all(parameter.grad is not None for mixer in mixers for parameter in mixer.parameters())


def test_mixers_of_different_kinds_in_one_model() -> None:
    torch.manual_seed(0)
    mixers = [Mamba2(8, headdim=4, d_state=3, ngroups=2), Mamba3(8, d_state=6, headdim=4)]
    model = MambaLMHeadModel(VOCABULARY, 8, mixers)
    other = copy.deepcopy(model)
    ids = batch()["input_ids"]
    for each, plan in ((model, Plan()), (other, Plan(layers=1, tokens=3))):
        wrap(each, plan=plan)(ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same(b.grad, a.grad, 1e-5, name)


def test_refused_with_a_remedy() -> None:
    model = model_of({})
    mixer = model.backbone.layers[0].mixer
    wrap(model, plan=Plan())
    ids = batch()["input_ids"]
    with pytest.raises(InputError, match=r"cu_seqlens in a training forward; its grid serves input_ids and seq_idx"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 11]))
    mixer.B_norm.register_forward_hook(lambda *_: None)
    with pytest.raises(LayerContractError, match=r"layers\.0\.mixer\.B_norm \(Norm\) has hooks"):
        model(ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("D", nn.Parameter(torch.ones(16))),
        ("B_bias", None),
        ("conv1d", nn.Conv1d(8, 8, 4)),
        ("in_proj", nn.Linear(8, 71)),
    ],
)
def test_a_mixer_of_another_make_is_refused(name: str, value: Any) -> None:
    mixer = Mamba3(8, d_state=6, headdim=4)
    setattr(mixer, name, value)
    with pytest.raises(InputError, match=rf"not the one of mamba-ssm 2\.3: .*{name}.* differ"):
        mixer_layer(mixer)


@pytest.mark.gpu
def test_beside_mamba_ssm_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm rounds what its kernels read to bfloat16; apart from that it is the recurrence, and so is magc's layer."""
    module = pytest.importorskip("mamba_ssm.modules.mamba3")
    take_smallest_candidates(monkeypatch)
    torch.manual_seed(0)
    mixer = module.Mamba3(64, d_state=32, headdim=32, ngroups=2, device="cuda")
    x = torch.randn(2, 150, 64, device="cuda")
    weight = torch.randn(2, 150, 64, device="cuda")

    def gradients(mixer: Any, output: Tensor) -> list[Tensor]:
        found = torch.autograd.grad((output * weight).sum(), list(mixer.parameters()))
        return [grad.double() for grad in found]

    def error(found: list[Tensor], expected: list[Tensor]) -> float:
        size = sum(float(grad.square().sum()) for grad in expected)
        return (sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)) / size) ** 0.5

    truth = double(mixer)
    expected = gradients(truth, naive_mixer(truth, x.double(), groups=2, angles=mixer.num_rope_angles))
    ours, _ = grid_checkpoint([mixer_layer(mixer)], x, plan=Plan(layers=1, tokens=48))
    assert error(gradients(mixer, mixer(x)), expected) < 0.02
    assert error(gradients(mixer, ours), expected) < 1e-4
