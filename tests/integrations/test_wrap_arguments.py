"""Arguments and outputs of a wrapped model's training forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from magc import Plan
from magc.errors import InputError, LayerContractError
from magc.integrations.wrap import wrap, wrapped
from tests.integrations.models import (
    CHECKPOINTING,
    TOKENS,
    VOCABULARY,
    assert_same,
    assert_same_gradients,
    bamba,
    batch,
    cache_name,
    labels_of,
    mamba,
    mamba2,
    wrapped_copy,
)

PLAN = Plan(layers=2, tokens=4)


def pair(**options: Any) -> tuple[Any, Any]:
    """A model and its wrapped twin."""
    model = mamba2()
    return model, wrapped_copy(model, PLAN, **options)


def assert_same_training(call: dict[str, Any], **options: Any) -> Any:
    """Both give the same loss and gradients; the wrapped one's output is returned."""
    model, twin = pair(**options)
    expected, actual = model(**call), twin(**call)
    assert type(actual) is type(expected)
    assert_same(actual.loss, expected.loss, 1e-5)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(twin, model, 1e-5)
    return actual


def test_loss_comes_without_logits() -> None:
    inputs = batch()
    output = assert_same_training({**inputs, "labels": inputs["input_ids"]})
    assert output.logits is None
    assert getattr(output, cache_name(mamba2())) is None
    assert list(output.keys()) == ["loss"]


def test_no_tensor_of_all_logits_exists() -> None:
    model = wrap(mamba2(vocab_size=397), plan=Plan(layers=1, tokens=2))
    ids = batch()["input_ids"]
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: sizes.append(out.shape[1]))
    model(ids, labels=ids).loss.backward()
    assert max(sizes) == 2
    assert sum(sizes) >= TOKENS


def test_logits_beside_the_loss_on_request() -> None:
    inputs = batch("left")
    model, _ = pair()
    output = assert_same_training({**inputs, "labels": labels_of(inputs)}, logits=True)
    assert_same(output.logits, model(**inputs).logits, 1e-5)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_number_of_items_in_the_batch(items: Any) -> None:
    inputs = batch()
    assert_same_training({**inputs, "labels": labels_of(inputs), "num_items_in_batch": items})


def test_ignore_index() -> None:
    inputs = batch("right")
    assert_same_training({**inputs, "labels": inputs["input_ids"], "ignore_index": 0})


def test_labels_shifted_by_the_caller() -> None:
    inputs = batch()
    shifted = inputs["input_ids"].flip(1)
    assert_same_training({**inputs, "labels": inputs["input_ids"], "shift_labels": shifted})


def test_positional_arguments_in_the_models_own_order() -> None:
    model = mamba()  # its second argument is the mask, Mamba-2's is the embeddings
    inputs = batch("left")
    expected = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert_same(wrapped_copy(model, PLAN)(inputs["input_ids"], inputs["attention_mask"]).logits, expected, 1e-5)


@pytest.mark.parametrize("labels", [False, True])
def test_embeddings_as_input(labels: bool) -> None:
    model, twin = pair()
    inputs = batch("left")
    results = []
    for each in (model, twin):
        x = torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(4)).requires_grad_()
        call = {"inputs_embeds": x, "attention_mask": inputs["attention_mask"]}
        out = each(**call, labels=labels_of(inputs)).loss if labels else each(**call).logits
        out.square().sum().backward()
        results.append((out, x.grad))
    assert_same(results[1][0], results[0][0], 1e-5)
    assert_same(results[1][1], results[0][1], 1e-4)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 5])], ids=["one", "three", "indices"])
def test_logits_of_some_tokens(keep: Any) -> None:
    model, twin = pair()
    assert_same(twin(**batch(), logits_to_keep=keep).logits, model(**batch(), logits_to_keep=keep).logits, 1e-5)


@pytest.mark.parametrize("labels", [False, True])
def test_tuples(labels: bool) -> None:
    model, twin = pair()
    inputs = batch()
    call = {**inputs, "return_dict": False, **({"labels": inputs["input_ids"]} if labels else {})}
    expected, actual = model(**call), twin(**call)
    assert isinstance(actual, tuple)
    assert len(actual) == 1
    assert_same(actual[0], expected[0], 1e-5)


def test_one_token() -> None:
    model, twin = pair()
    ids = batch()["input_ids"][:, :1]
    assert_same(twin(ids).logits, model(ids).logits, 1e-5)


def test_a_mask_of_ones_is_no_mask() -> None:
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    assert_same_training({**inputs, "attention_mask": mask, "labels": inputs["input_ids"]})


def test_evaluation_mode_without_a_cache_runs_on_the_grid() -> None:
    model, twin = pair()
    ids = batch()["input_ids"]
    output = twin.eval()(ids, labels=ids, use_cache=False)
    assert output.logits is None
    assert_same(output.loss, model(ids, labels=ids).loss, 1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states .* what the grid does not keep"),
    "a cache in training": ({"use_cache": True}, "use_cache=False"),
    "something unknown": ({"token_type_ids": torch.zeros(2, TOKENS)}, "given token_type_ids .* magc.unwrap"),
    "some logits beside the loss": ({"logits_to_keep": 2}, "wrap with logits=True"),
    "a square mask": ({"attention_mask": torch.ones(2, 1, TOKENS, TOKENS)}, r"must be \(batch, length\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_remedy(case: str) -> None:
    more, message = REFUSED[case]
    _, twin = pair()
    ids = batch()["input_ids"]
    with pytest.raises(InputError, match=message):
        twin(ids, labels=ids, **more)


def test_flags_that_are_off_are_not_refused() -> None:
    inputs = batch()
    off = {"output_hidden_states": False, "output_attentions": False, "logits_to_keep": 0, "use_cache": False}
    assert_same_training({**inputs, "labels": inputs["input_ids"], **off})


def test_hidden_states_by_the_configuration_are_refused() -> None:
    _, twin = pair()
    twin.config.output_hidden_states = True
    with pytest.raises(InputError, match="output_hidden_states=True"):
        twin(**batch())


def test_ids_and_embeddings_exclude_each_other() -> None:
    _, twin = pair()
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        twin(batch()["input_ids"], inputs_embeds=torch.zeros(2, TOKENS, 8))


def test_another_loss_needs_logits() -> None:
    def half(logits: Any, labels: Any, vocab_size: int, **_: Any) -> Any:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) / 2

    model, twin = pair()
    twin.loss_function = half
    ids = batch()["input_ids"]
    with pytest.raises(InputError, match="logits=True"):
        twin(ids, labels=ids)
    wrap(twin, plan=PLAN, logits=True)
    model.loss_function = half
    assert_same(twin(ids, labels=ids).loss, model(ids, labels=ids).loss, 1e-5)


def test_a_loss_on_logits_besides_needs_logits() -> None:
    ids = batch()["input_ids"]
    model = bamba(z_loss_coefficient=0.1)
    with pytest.raises(InputError, match=r"z_loss_coefficient=0\.1.* logits=True"):
        wrapped_copy(model, PLAN)(ids, labels=ids)
    twin = wrapped_copy(model, PLAN, logits=True)
    assert_same(
        twin(ids, labels=ids, num_items_in_batch=9).loss, model(ids, labels=ids, num_items_in_batch=9).loss, 1e-5
    )


def test_padding_in_front_of_attention_that_is_written_out() -> None:
    twin = wrapped_copy(bamba(attn_implementation="eager"), PLAN)
    with pytest.raises(InputError, match=r"Pad on the right.*sdpa"):
        twin(**batch("left"))


def test_a_cache_in_training_by_any_of_its_names() -> None:
    transformers = pytest.importorskip("transformers")
    twin = wrapped_copy(bamba(), PLAN)
    name = "cache" if cache_name(twin) == "cache" else "past_key_values"
    with pytest.raises(InputError, match="use_cache=False"):
        twin(**batch(), **{name: transformers.DynamicCache(config=twin.config)})


@pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
def test_a_cache_in_training_by_its_deprecated_name() -> None:
    transformers = pytest.importorskip("transformers")
    twin = wrapped_copy(bamba(), PLAN)
    with pytest.raises(InputError, match="use_cache=False"):
        twin(**batch(), past_key_values=transformers.DynamicCache(config=twin.config))


def test_labels_of_another_length() -> None:
    _, twin = pair()
    ids = batch()["input_ids"]
    with pytest.raises(InputError, match="one entry per token"):
        twin(ids, labels=ids[:, 1:])


# ---------------------------------------------------------------------- models that are refused
def test_an_unknown_model() -> None:
    with pytest.raises(
        InputError, match=r"does not know torch.*Sequential.*GridCheckpoint.*It takes .*Mamba2ForCausalLM"
    ):
        wrap(nn.Sequential(nn.Linear(2, 2)), plan=PLAN)


def test_an_unknown_model_around_a_known_one() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mamba2().backbone

    with pytest.raises(InputError, match=r"magc\.wrap\(model\.body, \.\.\.\) wraps the part"):
        wrap(Classifier(), plan=PLAN)


def test_a_subclass_with_a_forward_of_its_own() -> None:
    parent = type(mamba2())

    class Own(parent):  # type: ignore[valid-type, misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = mamba2()
    model.__class__ = Own
    with pytest.raises(InputError, match="Own has a forward of its own"):
        wrap(model, plan=PLAN)


def test_a_subclass_with_the_same_forward() -> None:
    parent = type(mamba2())

    class Named(parent):  # type: ignore[valid-type, misc]
        pass

    model = mamba2()
    model.__class__ = Named
    ids = batch()["input_ids"]
    assert wrap(model, plan=PLAN)(ids, labels=ids).logits is None


@pytest.mark.parametrize("kind", ["recurrent", "encoder", "encoder-decoder"])
def test_a_model_that_looks_ahead(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    model: nn.Module
    if kind == "recurrent":
        model = nn.Sequential(nn.LSTM(4, 4, bidirectional=True))
    elif kind == "encoder":
        model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=2))
    else:
        model = transformers.T5Model(transformers.T5Config(vocab_size=VOCABULARY, d_model=8, d_ff=8, num_layers=1))
    with pytest.raises(LayerContractError, match=r"is not causal: .* depend on later tokens"):
        wrap(model, plan=PLAN)


def test_a_mixer_that_was_replaced() -> None:
    model = mamba2()
    model.backbone.layers[1].mixer = nn.Identity()
    with pytest.raises(InputError, match=r"layers\.1\.mixer is a Identity"):
        wrap(model, plan=PLAN)


def test_a_convolution_that_is_too_wide() -> None:
    with pytest.raises(LayerContractError, match="width 5"):
        wrap(mamba2(conv_kernel=5), plan=PLAN)


def test_an_unknown_implementation() -> None:
    with pytest.raises(InputError, match="impl='cuda'"):
        wrap(mamba2(), plan=PLAN, impl=copy.copy("cuda"))  # type: ignore[arg-type]


def test_a_batch_without_targets() -> None:
    _, twin = pair()
    ids = batch()["input_ids"]
    nothing = torch.full_like(ids, -100)
    with pytest.raises(InputError, match="counted no target"):
        twin(ids, labels=nothing)
    assert twin(ids, labels=nothing, num_items_in_batch=5).loss == 0


def test_transformers_own_checkpointing_may_stay_switched_on() -> None:
    model, twin = pair()
    getattr(twin, f"{CHECKPOINTING[0]}_enable")()
    assert getattr(twin, f"is_{CHECKPOINTING[0]}")
    inputs = batch("left")
    for each in (model, twin):
        each(**inputs, labels=labels_of(inputs)).loss.backward()
    assert_same_gradients(twin, model, 1e-5)


def test_settings_reach_the_grid() -> None:
    settings: dict[str, Any] = {"host_budget": "1GiB", "disk_dir": "elsewhere", "accumulate": torch.float64}
    grid = wrapped(wrap(mamba2(), budget="1MiB", **settings)).grid
    assert (grid.host_budget, grid.disk_dir, grid.accumulate) == (1 << 30, "elsewhere", torch.float64)
    model = wrap(mamba2(), plan=PLAN, runner="cuda-graph")
    with pytest.raises(InputError, match="needs the layers on a CUDA device"):
        model(**batch())
