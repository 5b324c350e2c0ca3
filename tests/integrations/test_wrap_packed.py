"""Packed rows: a wrapped model gives what transformers' own code gives for each document alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from magc import Plan
from magc.data import PackingCollator
from magc.errors import InputError
from magc.integrations.wrap import wrap
from magc.plan import PlanOrRule
from tests.integrations.models import (
    FAMILIES,
    PLANS,
    VOCABULARY,
    InDouble,
    assert_same,
    assert_same_gradients,
    bamba,
    mamba2,
    wrapped_copy,
)

transformers: Any = pytest.importorskip("transformers")

LENGTHS = (4, 6, 1, 3, 5, 2)
all_families = pytest.mark.parametrize("family", FAMILIES)


def documents() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]


def alone(model: Any, items: int) -> Tensor:
    """The loss of each document in a row of its own, by the model's own code, divided by the number of targets."""
    losses = []
    for document in documents():
        ids = torch.tensor([document["input_ids"]])
        if ids.shape[1] > 1:  # one token predicts nothing
            losses.append(model(input_ids=ids, labels=ids, num_items_in_batch=items).loss)
    return torch.stack(losses).sum()


def items_of(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != -100).sum())


@all_families
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_packed_rows_equal_separate_ones(family: str, plan: PlanOrRule) -> None:
    model = FAMILIES[family]().double()
    wrapped = wrapped_copy(model, plan)
    batch = PackingCollator(tokens=11)(documents())
    assert batch["input_ids"].shape == (2, 11)
    items = items_of(batch)
    with InDouble():
        expected, actual = alone(model, items), wrapped(**batch, num_items_in_batch=items).loss
        assert_same(actual, expected, 1e-12)
        expected.backward()
        actual.backward()
    assert_same_gradients(wrapped, model, 1e-12)


@all_families
def test_logits_of_packed_rows(family: str) -> None:
    model = FAMILIES[family]()
    batch = PackingCollator()(documents())
    del batch["labels"]
    logits = wrapped_copy(model, PLANS["layers x segments"])(**batch).logits
    for document, part in zip(documents(), logits[0].split(LENGTHS), strict=True):
        assert_same(part[None], model(input_ids=torch.tensor([document["input_ids"]])).logits, 1e-5)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "positions": {},
    "positions and seq_idx": {"return_seq_idx": True},
    "seq_idx alone": {"return_seq_idx": True, "return_position_ids": False},
    "everything": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
    "cumulative lengths alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_batches_of_transformers_own_collator(family: str, case: str) -> None:
    batch = transformers.DataCollatorWithFlattening(**ARGUMENTS[case])(documents())
    model = FAMILIES[family]()
    wrapped = wrapped_copy(model, PLANS["ragged"])
    items = items_of(batch)
    expected, actual = alone(model, items), wrapped(**batch, num_items_in_batch=items).loss
    assert_same(actual, expected, 1e-5)
    expected.backward()
    actual.backward()
    assert_same_gradients(wrapped, model, 1e-5)


def test_trainer_packs(tmp_path: Any) -> None:
    """Two epochs over packed batches, as over one row per document."""

    def train(model: Any, collator: Any, rows: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=6 // rows,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=documents(), data_collator=collator)
        trainer.train()
        return model.state_dict()

    def one(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = torch.tensor([features[0]["input_ids"]])
        return {"input_ids": ids, "labels": ids.clone()}

    expected = train(bamba(), one, rows=1)
    actual = train(wrap(bamba(), plan=Plan(layers=1, tokens=4)), PackingCollator(tokens=12), rows=6)
    for name, value in expected.items():
        assert_same(actual[name], value, 1e-3, name)


@all_families
def test_positions_that_go_on_are_one_document(family: str) -> None:
    model = FAMILIES[family]()
    ids = PackingCollator()(documents())["input_ids"]
    batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] + 2}
    assert_same(wrapped_copy(model, PLANS["ragged"])(**batch).logits, model(**batch).logits, 1e-5)


def test_positions_beside_padding() -> None:
    model = bamba()
    ids = PackingCollator()(documents())["input_ids"][:, :11]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)}
    assert_same(wrapped_copy(model, PLANS["ragged"])(**batch).logits, model(**batch).logits, 1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packed and padded": (
        {"attention_mask": torch.tensor([[1] * 9 + [0] * 2]), "seq_idx": torch.tensor([[0] * 4 + [1] * 7])},
        "cannot be both.*PackingCollator",
    ),
    "two opinions": (
        {"position_ids": torch.arange(11)[None], "seq_idx": torch.tensor([[0] * 4 + [1] * 7])},
        "seq_idx and position_ids tell of different documents",
    ),
    "another length": ({"seq_idx": torch.zeros(1, 4)}, "one entry for each of 11 tokens"),
    "cumulative lengths of another row": ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "one row of 9 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_remedy(case: str) -> None:
    more, message = REFUSED[case]
    ids = torch.full((1, 11), 5)
    with pytest.raises(InputError, match=message):
        wrap(mamba2(), plan=PLANS["ragged"])(input_ids=ids, labels=ids, **more)


def test_nothing_leaks_across_documents() -> None:
    model = wrap(bamba(), plan=PLANS["layers x segments"])
    batch = PackingCollator()(documents())
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    del batch["labels"]
    logits = model(inputs_embeds=embeddings, **batch).logits
    logits[0, 4:10].square().sum().backward()  # the second document
    assert embeddings.grad is not None
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached[4:10].all()
    assert not reached[:4].any()
    assert not reached[10:].any()


def test_a_copy_of_the_batch_is_left_alone() -> None:
    batch = transformers.DataCollatorWithFlattening(return_seq_idx=True)(documents())
    before = copy.deepcopy(batch)
    wrap(mamba2(), plan=PLANS["ragged"])(**batch).loss.backward()
    assert all(torch.equal(batch[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_packed_rows_with_logits_beside_the_loss(family: str) -> None:
    model = FAMILIES[family]()
    twin = wrapped_copy(model, PLANS["ragged"], logits=True)
    batch = PackingCollator()(documents())
    items = items_of(batch)
    expected, actual = alone(model, items), twin(**batch, num_items_in_batch=items)
    assert_same(actual.loss, expected, 1e-5)
    assert actual.logits.shape[:2] == batch["input_ids"].shape
    expected.backward()
    actual.loss.backward()
    assert_same_gradients(twin, model, 1e-5)
