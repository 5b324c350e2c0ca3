"""Which parameters are trained, at which rate, and which of them decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from video_ma2mba.model.model import Part, VideoMa2mba
from video_ma2mba.training.config import RatesConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share rate and weight decay.

    Attributes:
        part: which part of the model they belong to.
        rate: learning rate at its highest.
        weight_decay: of AdamW.
        names: in the model.
        count: numbers in them.
    """

    part: Part
    rate: float
    weight_decay: float
    names: tuple[str, ...]
    count: int


def parameter_groups(model: VideoMa2mba, rates: RatesConfig, weight_decay: float) -> list[ParameterGroup]:
    """Freeze the parts without a rate, and group what is trained.

    Matrices, convolutions and embeddings decay. Vectors (norms, biases, D, A_log, dt_bias, the tower's class token) and
    what is marked `_no_weight_decay` do not.
    """
    model.train_only(rates.trained)
    groups: list[ParameterGroup] = []
    for part, rate in rates.trained.items():
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.startswith(f"{part}.") and parameter.requires_grad
        }
        for decays in (True, False):
            names = tuple(name for name, parameter in trained.items() if _decays(parameter) is decays)
            if names:
                count = sum(trained[name].numel() for name in names)
                groups.append(ParameterGroup(part, rate, weight_decay if decays else 0.0, names, count))
    return groups


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and not cast(bool, getattr(parameter, "_no_weight_decay", False))
