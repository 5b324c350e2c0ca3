"""Wrapped models under transformers' Trainer, and transformers' own switch for checkpointing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from magc import Plan
from magc.errors import InputError
from magc.integrations.wrap import find, unwrap, wrap, wrapped
from tests.integrations.models import CHECKPOINTING, VOCABULARY, assert_same, assert_same_gradients, batch, mamba2

transformers: Any = pytest.importorskip("transformers")
accelerate: Any = pytest.importorskip("accelerate")

from magc.integrations.transformers import install, uninstall  # noqa: E402 - after what it needs was found

STEPS = 20
SWITCH = CHECKPOINTING[0]
MAGC = {"method": "magc", "plan": {"layers": 2, "tokens": 5}}


@pytest.fixture
def installed() -> Iterator[None]:
    install()
    yield
    uninstall()


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random ids of different lengths, padded on the right."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        length = int(torch.randint(6, 13, (), generator=generator))
        mask = (torch.arange(12) < length).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: Any, folder: Path, **arguments: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of 20 steps, each of two accumulated batches, and the weights afterwards."""
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **arguments,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Sequences())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, model.state_dict()


def assert_same_training(actual: tuple[list[float], Any], expected: tuple[list[float], Any]) -> None:
    assert expected[0][-1] < expected[0][0] - 0.05  # it learns something
    assert actual[0] == pytest.approx(expected[0], abs=1e-4)
    for name, value in expected[1].items():
        assert_same(actual[1][name], value, 1e-3, name)


def test_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    expected = train(mamba2(), tmp_path)
    model = wrap(mamba2(), plan=Plan(layers=2, tokens=5))
    assert_same_training(train(model, tmp_path), expected)
    assert wrapped(model).plan == Plan(layers=2, tokens=5)


def test_trainer_evaluates_and_saves(tmp_path: Path) -> None:
    model = wrap(mamba2(), plan=Plan(tokens=5))
    settings = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model=model, args=settings, eval_dataset=Sequences())
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("installed")
def test_trainer_with_the_method_in_its_arguments(tmp_path: Path) -> None:
    expected = train(mamba2(), tmp_path)
    model = mamba2()
    arguments = {SWITCH: True, f"{SWITCH}_kwargs": MAGC}
    assert_same_training(train(model, tmp_path, **arguments), expected)
    assert wrapped(model).plan == Plan(layers=2, tokens=5)


@pytest.mark.usefixtures("installed")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_disable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_switching_on_and_off(name: str) -> None:
    model = mamba2()
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"method": "magc", "budget": "1MiB"}})
    assert wrapped(model).grid.budget == 1 << 20
    assert not getattr(model, f"is_{SWITCH}")
    getattr(model, f"{name}_disable")()
    assert find(model) is None


@pytest.mark.usefixtures("installed")
def test_other_methods_work_as_before() -> None:
    model, plain = mamba2(), mamba2()
    ids = batch()["input_ids"]
    plain(ids, labels=ids).loss.backward()
    getattr(model, f"{SWITCH}_enable")(**{f"{SWITCH}_kwargs": {"use_reentrant": False}})
    assert getattr(model, f"is_{SWITCH}")
    assert find(model) is None
    model(ids, labels=ids).loss.backward()
    assert_same_gradients(model, plain, 1e-6)


@pytest.mark.usefixtures("installed")
def test_settings_of_the_other_method_are_refused() -> None:
    with pytest.raises(InputError, match="every_n_layers and offload"):
        getattr(mamba2(), f"{SWITCH}_enable")(**{f"{SWITCH}_kwargs": MAGC}, offload=True)


def test_installing_twice_and_undoing_it() -> None:
    base = transformers.PreTrainedModel
    before = dict(vars(base))
    install()
    once = dict(vars(base))
    assert once != before
    install()
    assert dict(vars(base)) == once
    uninstall()
    assert dict(vars(base)) == before


@pytest.fixture
def mixed() -> Iterator[Any]:
    """An accelerator in mixed precision; accelerate allows one setting in a process unless its state is forgotten."""
    state: Any = accelerate.state.AcceleratorState
    state._reset_state(True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    state._reset_state(True)


def test_accelerate_prepares_and_unwraps_a_wrapped_model(mixed: Any) -> None:
    model = wrap(mamba2(), plan=Plan(layers=2, tokens=5))
    ids = batch()["input_ids"]
    signature = inspect.signature(model.forward)
    prepared = mixed.prepare_model(model)
    assert inspect.signature(prepared.forward) == signature
    output = prepared(ids, labels=ids)
    assert output.logits is None
    mixed.backward(output.loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert wrapped(prepared).model is model
    with pytest.raises(InputError, match="was replaced after"):
        unwrap(model)
    assert mixed.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    assert wrapped(model).model is model
    assert model(ids, labels=ids).logits is None
    assert inspect.signature(model.forward) == signature
    assert (
        copy.deepcopy(model)(ids, labels=ids).logits is not None
    )  # its forward is bound: only the model runs on the grid
    assert "forward" not in vars(unwrap(model))
