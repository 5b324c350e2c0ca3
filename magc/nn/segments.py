"""What the Mamba layers share: checks of a segment and its state, the document it ends in, the steps at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from magc.errors import InputError, StateError


def check_segment(layer: str, x: Tensor, d_model: int, seq_idx: Tensor | None) -> None:
    """Refuse a segment that is not `(batch, length >= 1, d_model)`, or documents that do not fit it.

    Raises:
        InputError: naming the layer and the shape it takes.
    """
    if x.ndim != 3 or x.shape[-1] != d_model or x.shape[1] == 0:
        raise InputError(f"{layer} takes x of shape (batch, length >= 1, d_model={d_model}), got {tuple(x.shape)}")
    if seq_idx is not None and (seq_idx.shape != x.shape[:2] or seq_idx.dtype.is_floating_point):
        raise InputError(
            f"seq_idx must be integers of shape {tuple(x.shape[:2])}, the batch and length of x; "
            f"got {seq_idx.dtype} {tuple(seq_idx.shape)}"
        )


def check_state(
    parts: Mapping[str, tuple[Tensor, tuple[int, ...], torch.dtype]],
    device: torch.device,
    batch: int,
    last_seq_idx: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Refuse a state that does not fit its layer, the input, or the use of `seq_idx`.

    Args:
        parts: by name, a tensor of the state and the shape and type it must have.
        device: where it must be.
        batch: rows of the input.
        last_seq_idx: document of the state's token, if the sequence is packed.
        seq_idx: documents of the segment, if it is packed.

    Raises:
        StateError: naming the part, what it must be and what it is.
    """
    if (last_seq_idx is None) != (seq_idx is None):
        given, missing = ("the state", "the segment") if seq_idx is None else ("the segment", "the state")
        raise StateError(
            f"{given} has a seq_idx and {missing} has none; give seq_idx for every segment of a "
            "sequence or for none (initial_state(batch_size, packed=True) makes a packed zero state)"
        )
    for name, (tensor, shape, dtype) in parts.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            raise StateError(
                f"state.{name} must be {dtype} {shape} on {device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if last_seq_idx is not None and tuple(last_seq_idx.shape) != (batch,):
        raise StateError(f"state.seq_idx must have shape ({batch},), got {tuple(last_seq_idx.shape)}")


def last_document(seq_idx: Tensor | None) -> Tensor | None:
    """Document of the last token, `(batch,)` int32, a copy: a view would keep the whole segment alive."""
    return None if seq_idx is None else seq_idx[:, -1].to(torch.int32, copy=True)


def draw_step_bias(count: int, low: float, high: float, floor: float, device: torch.device) -> Tensor:
    """Biases whose softplus is a step drawn log-uniformly from `low` to `high` and at least `floor`, float32."""
    unit = torch.rand(count, device=device, dtype=torch.float32)
    step = torch.exp(unit * math.log(high / low) + math.log(low)).clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))
