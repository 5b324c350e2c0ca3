"""The state that the Mamba layers carry, by its parts: zeros at the start, and a check of one that is given."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from magc.nn import segments
from magc.nn.linear import Linear

S = TypeVar("S", bound=tuple[Any, ...])
StateParts = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each part of a state by its name, in the order of the state's fields, `seq_idx` left out."""


class CarriesState(nn.Module, Generic[S]):
    """A layer whose state is a named tuple of tensors with `seq_idx` as its last field."""

    in_proj: Linear

    @abstractmethod
    def state_parts(self, batch: int, dtype: torch.dtype) -> StateParts:
        """The parts of the state for so many rows of activations of a type."""

    @abstractmethod
    def make_state(self, *parts: Tensor, seq_idx: Tensor | None) -> S:
        """A state of its parts, in order."""

    def initial_state(
        self,
        batch_size: int,
        *,
        packed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S:
        """Zeros: the state that None stands for, of the same structure as every later state.

        Args:
            batch_size: rows.
            packed: whether segments come with `seq_idx`.
            device: of the state; None: that of the parameters.
            dtype: of the activations; None: that of the parameters.
        """
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        shapes = self.state_parts(batch_size, weight.dtype if dtype is None else dtype).values()
        return self.make_state(
            *(torch.zeros(shape, device=device, dtype=part_dtype) for shape, part_dtype in shapes),
            seq_idx=torch.zeros(batch_size, device=device, dtype=torch.int32) if packed else None,
        )

    def check_state(
        self, state: S | None, batch: int, device: torch.device, dtype: torch.dtype, seq_idx: Tensor | None
    ) -> None:
        """Raise StateError unless a state fits the layer, activations of this kind, and the use of `seq_idx`."""
        if state is None:
            return
        *tensors, last_document = state
        expected = self.state_parts(batch, dtype)
        parts = {name: (tensor, *expected[name]) for name, tensor in zip(expected, tensors, strict=True)}
        segments.check_state(parts, device, batch, last_document, seq_idx)
