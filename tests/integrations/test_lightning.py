"""A LightningModule's model trains on the grid and is what it was afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from magc import Plan
from magc.errors import InputError
from magc.integrations.wrap import find
from tests.integrations.models import VOCABULARY, mamba2

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer

from magc.integrations.lightning import GridCheckpointing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's own use of torch
]


class Language(LightningModule):
    """Trains a tiny model and notes losses and whether the grid was there."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self.wrapped: list[bool] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        self.wrapped.append(find(self.model) is not None)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(module: Language, folder: Path, *callbacks: Any) -> None:
    data = torch.randint(3, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))


def test_fitted_as_without_it(tmp_path: Path) -> None:
    plain = Language(mamba2())
    module = Language(copy.deepcopy(plain.model))
    fit(plain, tmp_path)
    fit(module, tmp_path, GridCheckpointing(plan=Plan(layers=2, tokens=4)))
    assert module.wrapped == [True] * 6
    assert plain.wrapped == [False] * 6
    assert find(module.model) is None
    assert module.losses == pytest.approx(plain.losses, rel=1e-5)
    for own, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"part='net'.*Language has no such module; its own are: model"):
        fit(Language(mamba2()), tmp_path, GridCheckpointing("net", plan=Plan(tokens=4)))
