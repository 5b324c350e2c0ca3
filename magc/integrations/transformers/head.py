"""The ends of a language model inside the grid: ids to embeddings, and hidden states to a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.errors import InputError
from magc.integrations.forward import Settings
from magc.integrations.transformers.mixers import project
from magc.nn.fused import is_plain
from magc_kernels.cross_entropy.autograd import linear_cross_entropy
from magc_kernels.cross_entropy.reference import warped_zero

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Loss:
    """How a language model's loss is computed; see `wrap`.

    Attributes:
        logits: outside the grid, by the model itself.
        label_smoothing: share of the probability that is spread evenly over the vocabulary.
        z_loss: weight of the square of the log of the softmax's denominator.
        scale: of the logits, as the model multiplies them.
    """

    logits: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, settings: Settings, scale: float = 1.0) -> Loss:
        """The loss that settings ask for.

        Raises:
            InputError: an option is out of range, or does not go with logits.
        """
        if not 0.0 <= settings.label_smoothing < 1.0 or settings.z_loss < 0.0:
            raise InputError(
                f"label_smoothing={settings.label_smoothing}, z_loss={settings.z_loss}: the first must be at least 0 and "
                f"less than 1, the second at least 0"
            )
        if settings.logits and (settings.label_smoothing or settings.z_loss):
            raise InputError(
                "label_smoothing and z_loss are those of the loss inside the grid, but with logits=True the model's own "
                "loss_function computes it. Leave out logits=True, or add them to a loss of your own over the logits"
            )
        return cls(settings.logits, settings.label_smoothing, settings.z_loss, scale)

    @property
    def note(self) -> str:
        """For the report."""
        if self.logits:
            return "the loss is computed from whole logits, outside the grid and the budget (logits=True)"
        extras = [f"label smoothing {self.label_smoothing:g}"] if self.label_smoothing else []
        extras += [f"z-loss {self.z_loss:g}"] if self.z_loss else []
        more = f" with {' and '.join(extras)}" if extras else ""
        return f"with labels, head and cross-entropy{more} run inside the grid, and the output's logits are None"


class Stem(nn.Module):
    """Token ids to embeddings, inside the grid."""

    def __init__(self, embeddings: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.scale = scale

    def forward(self, ids_BL: Tensor) -> Tensor:
        """`(batch, length)` ids to `(batch, length, hidden)`."""
        x_BLD: Tensor = self.embeddings(ids_BL)
        # `enable_input_require_grads` has a hook make frozen embeddings ask for a gradient, which nobody would read.
        x_BLD = x_BLD if x_BLD.grad_fn is not None else x_BLD.detach()
        return x_BLD if self.scale == 1.0 else x_BLD * self.scale


class Warped(NamedTuple):
    """Targets, and what the gradient of each token's greatest logit is to have besides that of the loss."""

    targets: Tensor
    """`(batch, length)`, `IGNORED` where there is none."""
    strength: Tensor
    """``l2_warp`` of `magc_kernels.cross_entropy.reference.linear_cross_entropy` for the sum over all segments;
    `(1, length)`, the same for every token, so that each segment has it."""


class Head(nn.Module):
    """Hidden states and targets to the summed cross-entropy of a segment."""

    def __init__(self, projection: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.projection = projection
        self.loss = loss

    def forward(self, y_BLD: Tensor, targets: Tensor | Warped) -> tuple[Tensor, Tensor]:
        """The sum in float32 over targets other than `IGNORED`, and their number.

        Args:
            y_BLD: hidden states.
            targets: `(batch, length)`, with or without a warp.
        """
        projection, loss = self.projection, self.loss
        targets_BL = targets if isinstance(targets, Tensor) else targets.targets
        l2_warp = None if isinstance(targets, Tensor) else targets.strength[0, 0]
        weight = getattr(projection, "weight", None)
        y_BLD = y_BLD if weight is None else y_BLD.to(weight.dtype)
        if type(projection) is nn.Linear and is_plain(projection):
            bias = cast("Tensor | None", projection.bias)
            return linear_cross_entropy(
                y_BLD if loss.scale == 1.0 else y_BLD * loss.scale,
                projection.weight,
                targets_BL,
                bias if bias is None or loss.scale == 1.0 else bias * loss.scale,
                ignore_index=IGNORED,
                label_smoothing=loss.label_smoothing,
                z_loss=loss.z_loss,
                l2_warp=l2_warp,
            )
        logits_BLV = project(projection, y_BLD)
        logits_RV = (logits_BLV * loss.scale).to(torch.promote_types(logits_BLV.dtype, torch.float32)).flatten(0, 1)
        total = functional.cross_entropy(
            logits_RV,
            targets_BL.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=loss.label_smoothing,
        )
        counted_BL = targets_BL != IGNORED
        if loss.z_loss:
            squares_R = logits_RV.logsumexp(-1).square()
            total = total + loss.z_loss * torch.where(counted_BL.flatten(), squares_R, 0.0).sum()
        return total if l2_warp is None else total + warped_zero(logits_RV, l2_warp), counted_BL.sum()
