"""Training on sequences that need magc, and evaluation on whole files by streaming."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import magc
from magc.demo.corpus import SEPARATOR, tokens_of
from magc.demo.model import EXAMPLE_TOKENS, Step, forecast, forecast_of, timed
from magc.demo.settings import Settings
from magc.errors import BudgetError
from magc.nn import Mamba2LM
from magc.plan import Plan
from magc.units import format_bytes

_PIECE = 4096
_SEGMENT = 1024
_WARM_UP = 256
_METERED_STEP = 1
"""The second step: the first one's caches are made, and its gradients freed."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How the training sequences are run.

    Attributes:
        plan: with its forecast.
        plain_bytes: predicted peak of the same step without checkpointing.
    """

    plan: Plan
    plain_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Predicted."""
        return forecast_of(self.plan).peak_bytes


@dataclass(frozen=True, slots=True)
class Training:
    """What happened.

    Attributes:
        losses: nats per byte of each step, before its update.
        seconds: of all steps.
        tokens_per_second: of a step without the meter, its optimizer included.
        peak_bytes: metered, of one step.
    """

    losses: tuple[float, ...]
    seconds: float
    tokens_per_second: float
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss on files never trained on.

    Attributes:
        nats_per_byte: mean over all bytes of all files.
        files: number of files.
        tokens: bytes in them, separators included.
        longest: tokens of the longest one, evaluated as one sequence.
    """

    nats_per_byte: float
    files: int
    tokens: int
    longest: int

    @property
    def bits_per_byte(self) -> float:
        """The same in bits."""
        return self.nats_per_byte / math.log(2)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bits_per_byte": self.bits_per_byte}


def make_plan(
    settings: Settings, model: Mamba2LM, ids: Tensor, targets: Tensor, progress: Callable[[str], None]
) -> TrainingPlan:
    """Plan for training within the budget, and predict what it would take without checkpointing.

    Args:
        settings: of the run.
        model: is measured.
        ids: a training sequence, shape ``(1, seq_len)``.
        targets: the same.
        progress: told what is being measured.

    Raises:
        BudgetError: nothing fits; says the smallest budget that would.
    """
    ids, targets = ids[:, :EXAMPLE_TOKENS].to(settings.device), targets[:, :EXAMPLE_TOKENS].to(settings.device)
    # At their first use libraries such as cuBLAS take memory that they keep: it belongs to no step.
    first = slice(None), slice(_WARM_UP)
    Step(model, magc.GridCheckpoint(model.layers, plan=Plan.none()), ids[first], targets[first]).run()
    model.zero_grad(set_to_none=True)
    if settings.segment is None:
        plan = magc.plan(
            model.layers,
            ids,
            settings.seq_len,
            budget=settings.budget,
            stem=model.stem,
            head=model.head,
            targets=targets,
            progress=progress,
        )
    else:
        plan, _ = forecast(Plan.sequence(settings.segment), model, ids, targets, settings.seq_len)
        if (needed := forecast_of(plan).peak_bytes) > settings.budget:
            raise BudgetError(
                f"segments of {settings.segment} tokens need {format_bytes(needed)} of a budget of "
                f"{format_bytes(settings.budget)}; give a smaller --segment, a larger --budget, or no --segment"
            )
    progress("predicting the same without checkpoints")
    plain, _ = forecast(Plan.none(), model, ids, targets, settings.seq_len)
    return TrainingPlan(plan, forecast_of(plain).peak_bytes)


def train(
    settings: Settings,
    model: Mamba2LM,
    plan: Plan,
    examples: Sequence[tuple[Tensor, Tensor]],
    progress: Callable[[float, float], None],
) -> Training:
    """Train in place.

    Args:
        settings: of the run.
        model: changed.
        plan: for every step.
        examples: inputs and targets, each ``(1, seq_len)``; they may stay on the host.
        progress: told each step's loss in nats per byte and its tokens per second.
    """
    stack = magc.GridCheckpoint(model.layers, plan=plan)
    # No weight decay: far too few steps for it to matter.
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    plain_seconds: list[float] = []
    seconds = 0.0
    peak = 0
    metered = min(_METERED_STEP, len(examples) - 1)
    for index, (ids, targets) in enumerate(examples):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate_factor(index, len(examples))
        step = Step(model, stack, ids, targets)

        def update(step: Step = step, meter: bool = index == metered) -> Tensor:
            nonlocal peak
            if meter:
                loss, peak = step.metered()
            else:
                loss = step.run()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss

        loss, took = timed(update, settings.device)
        losses.append(float(loss))
        seconds += took
        if index != metered:
            plain_seconds.append(took)
        progress(losses[-1], settings.seq_len / took)
    model.zero_grad(set_to_none=True)
    per_step = sorted(plain_seconds or [seconds])[len(plain_seconds) // 2]
    return Training(tuple(losses), seconds, settings.seq_len / per_step, peak)


def learning_rate_factor(step: int, steps: int) -> float:
    """Rises over the first tenth of the steps, then falls to a tenth along a cosine."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def evaluate(model: Mamba2LM, files: Sequence[Path], progress: Callable[[int], None]) -> Evaluation:
    """Loss on whole files, each one sequence from its first byte to its last.

    A file is run piece by piece and the recurrent states are carried from one to the next, so the device's memory does
    not grow with its length.

    Args:
        model: left as it is.
        files: of any length.
        progress: told how many tokens were done.
    """
    stack = magc.GridCheckpoint(model.layers, plan=Plan.sequence(_SEGMENT))
    total = 0.0
    tokens = longest = 0
    with torch.no_grad():
        for path in files:
            text = tokens_of(path)[None]
            targets = torch.cat([text[:, 1:], torch.full((1, 1), SEPARATOR)], dim=1)
            state = None
            for ids, wanted in zip(torch.split(text, _PIECE, dim=1), torch.split(targets, _PIECE, dim=1), strict=True):
                loss, state = stack.loss_and_state(
                    ids, wanted, stem=model.stem, head=model.head, state=state, reduction="sum"
                )
                total += float(loss)
                progress(ids.shape[1])
            tokens += text.shape[1]
            longest = max(longest, text.shape[1])
    return Evaluation(total / tokens, len(files), tokens, longest)
