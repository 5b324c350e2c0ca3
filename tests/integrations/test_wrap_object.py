"""A wrapped model is the same object: its state dict, files, generation and copies are what they were."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from magc import Plan
from magc.errors import InputError, LayerContractError, PlanError
from magc.integrations import forward, registry
from magc.integrations.wrap import unwrap, wrap, wrapped
from tests.integrations.models import (
    FAMILIES,
    assert_same,
    assert_same_gradients,
    batch,
    cache_name,
    gradients,
    mamba,
    mamba2,
)

PLAN = Plan(layers=2, tokens=4)
all_families = pytest.mark.parametrize("family", FAMILIES)


def loss_of(model: Any) -> torch.Tensor:
    ids = batch()["input_ids"]
    return model(ids, labels=ids).loss


def runs_on_grid(model: Any) -> bool:
    """Whether a call with labels does: only then are there no logits."""
    ids = batch()["input_ids"]
    return model(ids, labels=ids).logits is None


@all_families
def test_is_the_same_object(family: str) -> None:
    model = FAMILIES[family]()
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    assert wrap(model, plan=PLAN) is model
    assert runs_on_grid(model)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(model.named_modules(), modules, strict=True))
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(model.named_parameters(), parameters, strict=True))


def test_unwrap_restores_everything() -> None:
    model = mamba2()
    before, trunk_before = dict(vars(model)), dict(vars(model.backbone))
    expected = model(**batch()).logits
    assert unwrap(wrap(model, plan=PLAN)) is model
    assert vars(model) == before
    assert vars(model.backbone) == trunk_before
    assert torch.equal(model(**batch()).logits, expected)


@all_families
def test_generation_runs_the_models_own_code(family: str) -> None:
    model = FAMILIES[family]()
    expected = model.generate(**batch("left"), max_new_tokens=4, do_sample=False)
    wrap(model, plan=PLAN)
    assert torch.equal(model.generate(**batch("left"), max_new_tokens=4, do_sample=False), expected)
    assert wrapped(model).plan is None


def test_without_grad_mode_the_models_own_code_runs() -> None:
    model = mamba2()
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids, labels=ids, output_hidden_states=True)
        actual = wrap(model, plan=PLAN)(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True))


def test_evaluation_with_a_cache_runs_the_models_own_code() -> None:
    model = wrap(mamba2().eval(), plan=PLAN)
    first = model(batch()["input_ids"])
    name = cache_name(model)
    assert first[name] is not None
    assert model(batch()["input_ids"][:, :1], **{name: first[name]}).logits.shape[1] == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: _through_pickle(m)], ids=["deepcopy", "pickle"])
@all_families
def test_a_copy_is_wrapped_and_its_own(family: str, duplicate: Any) -> None:
    model = wrap(FAMILIES[family](), plan=PLAN)
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert wrapped(twin).model is twin
    assert all(each.module in set(twin.modules()) for each in wrapped(twin).forwards)
    loss_of(twin).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss_of(model).backward()
    assert_same_gradients(twin, model, 1e-6)
    unwrap(twin)
    assert runs_on_grid(model)


def _through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@all_families
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "plain")
    wrap(model, plan=PLAN).save_pretrained(tmp_path / "wrapped")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "wrapped").iterdir()) == names
    for name in names:
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "wrapped").train()
    assert_same(loss_of(loaded), loss_of(model), 1e-5)
    model.load_state_dict(loaded.state_dict())


def test_parameters_may_be_replaced_afterwards() -> None:
    model = mamba2(tie_word_embeddings=False)
    plain = copy.deepcopy(model)
    wrap(model, plan=PLAN)
    for each in (model, plain):
        each.load_state_dict({name: 0.9 * value for name, value in each.state_dict().items()}, assign=True)
        torch.manual_seed(3)
        each.resize_token_embeddings(23)
        each.double().float()
        loss_of(each).backward()
    assert_same_gradients(model, plain, 1e-5)


class LowRank(nn.Module):
    """A projection with a trainable low-rank part, as LoRA makes them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias  # transformers' own code names them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_low_rank_parts_on_a_frozen_model() -> None:
    model = mamba2()
    model.requires_grad_(False)
    for layer in model.backbone.layers:
        layer.mixer.in_proj = LowRank(layer.mixer.in_proj)
        layer.mixer.out_proj = LowRank(layer.mixer.out_proj)
    plain = copy.deepcopy(model)
    wrap(model, plan=PLAN)
    model.enable_input_require_grads()  # what transformers and peft do beside checkpointing
    loss_of(model).backward()
    loss_of(plain).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in trained:
        assert_same(model.get_parameter(name).grad, plain.get_parameter(name).grad, 1e-5, name)


def test_wrapping_again_takes_the_new_plan() -> None:
    model = wrap(wrap(mamba2(), plan=PLAN), plan=Plan(tokens=5))
    loss_of(model).backward()
    assert wrapped(model).plan == Plan(tokens=5)
    assert "forward" not in vars(unwrap(model))


def test_a_failed_attempt_leaves_the_model_as_it_was() -> None:
    model = wrap(mamba2(), plan=PLAN)
    with pytest.raises(PlanError):
        wrap(model)
    loss_of(model).backward()
    assert wrapped(model).plan == PLAN


def test_the_trunk_of_a_wrapped_model_is_unwrapped_with_it() -> None:
    model = wrap(mamba2(), plan=PLAN)
    with pytest.raises(InputError, match="as part of a Mamba2ForCausalLM"):
        unwrap(model.backbone)


def test_unwrapping_what_is_not_wrapped() -> None:
    with pytest.raises(InputError, match="is not wrapped"):
        unwrap(mamba2())


def test_a_forward_set_on_the_instance_is_refused() -> None:
    model = mamba2()
    model.forward = model.forward
    with pytest.raises(InputError, match="set on this instance"):
        wrap(model, plan=PLAN)


def test_a_forward_set_afterwards_is_seen_through_but_not_undone() -> None:
    model = wrap(mamba2(), plan=PLAN)
    inner = model.forward

    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    outer.__wrapped__ = inner  # type: ignore[attr-defined]
    model.forward = outer
    assert wrapped(model).model is model
    with pytest.raises(InputError, match="was replaced after"):
        unwrap(model)


def test_hooks_that_would_not_run_are_refused() -> None:
    model = wrap(mamba2(), plan=PLAN)
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda *_: None)
    with pytest.raises(LayerContractError, match=r"layers\.1\.mixer \(Mamba2Mixer\) has hooks"):
        loss_of(model)
    handle.remove()
    seen: list[tuple[int, ...]] = []
    model.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape))
    loss_of(model).backward()
    assert (2, 4, 8) in seen


def test_hooks_that_capture_hidden_states_may_stay() -> None:
    model = FAMILIES["bamba"]()
    ids = batch()["input_ids"]
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # transformers leaves its hooks on the layers
    wrap(model, plan=PLAN)
    assert model(ids, labels=ids).logits is None
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(LayerContractError, match=r"layers\.0 \(BambaDecoderLayer\) has hooks"):
        model(ids, labels=ids)


def test_budget_and_plan_exclude_each_other() -> None:
    with pytest.raises(PlanError, match="either a plan, or a budget"):
        wrap(mamba2())


def test_the_report_says_what_runs_where() -> None:
    model = wrap(mamba2(), budget="1MiB")
    assert "made at the first training forward, for a budget of 1.0 MiB" in wrapped(model).explain()
    loss_of(model)
    report = wrapped(model).explain()
    assert "Mamba2ForCausalLM, 3 layers in a grid" in report
    assert "predicted peak" in report
    assert "run on magc's operators with the model's own" in report
    assert "the output's logits are None" in report


def test_the_report_of_a_plan_by_hand() -> None:
    model = wrap(mamba(), plan=PLAN, logits=True)
    loss_of(model)
    report = wrapped(model).explain()
    assert str(PLAN) in report
    assert "convolution and selective scan of MambaMixer" in report
    assert "computed from whole logits" in report


class Recurrent(nn.Module):
    """A layer of the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h = x.new_zeros(x.shape[0], 4) if state is None else state
        ys = [h := torch.tanh(self.mix(step) + h) for step in x.unbind(1)]
        return torch.stack(ys, 1), h


class Stack(nn.Module):
    """Somebody's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


class StackForward(forward.GridForward):
    """Its forward on a grid."""

    def takes(self, call: dict[str, Any]) -> bool:
        return True

    def run(self, call: dict[str, Any]) -> Any:
        assert self.wrapping is not None
        return self.wrapping.grid(call["x"])[0]


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    def adapt(model: Any, settings: forward.Settings) -> forward.Adapted:
        return forward.Adapted(settings.grid(model.layers), (StackForward(model, {}),))

    model = Stack()
    plain = copy.deepcopy(model)
    with pytest.raises(InputError, match="does not know"):
        wrap(model, plan=PLAN)
    registry.register(Stack, adapt)
    wrap(model, plan=PLAN)
    x = torch.randn(2, 7, 4)
    expected, actual = plain(x), model(x)
    assert_same(actual, expected, 1e-6)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert gradients(model).keys() == gradients(plain).keys()
    assert_same_gradients(model, plain, 1e-5)
