"""A Lightning callback: the model of a LightningModule trains on the grid, from `fit`'s beginning to its end."""

from __future__ import annotations

from typing import Any

from torch import nn

from magc.errors import InputError, MissingExtraError
from magc.integrations.wrap import find, unwrap, wrap

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError("lightning", "lightning", "magc.integrations.lightning") from error


class GridCheckpointing(Callback):
    """Wraps a part of the LightningModule while it is fitted (`magc.wrap`) and unwraps it afterwards.

    Checkpoints, strategies and the module's own code see the same objects, names and outputs as without it.

    Args:
        part: the module to wrap, by its name in the LightningModule, as `nn.Module.get_submodule` takes it.
        settings: of `magc.wrap`, such as ``budget="24GiB"``.
    """

    def __init__(self, part: str = "model", **settings: Any) -> None:
        super().__init__()
        self._part = part
        self._settings = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap, before `fit` makes optimizers.

        Raises:
            InputError: there is no such part, or `magc.wrap` does not know it.
        """
        if stage == "fit":
            wrap(self._find(pl_module), **self._settings)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unwrap, after `fit`, also one that failed."""
        if stage == "fit" and find(part := self._find(pl_module)) is not None:
            unwrap(part)

    def _find(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self._part)
        except AttributeError as error:
            there = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise InputError(
                f"GridCheckpointing(part={self._part!r}): {type(pl_module).__name__} has no such module; its own are: {there}"
            ) from error
