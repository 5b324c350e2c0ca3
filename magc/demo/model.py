"""The demo's model, and what one call of it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import magc
from magc.cost import CostModel
from magc.demo.corpus import VOCABULARY
from magc.demo.settings import Settings
from magc.forecast import Forecast
from magc.nn import Mamba2Config, Mamba2LM
from magc.plan import Plan

_TRIES = 7
EXAMPLE_TOKENS = 4096
"""Tokens on which layers are measured to plan for longer sequences."""


def make_model(settings: Settings) -> Mamba2LM:
    """The model with initial weights of the seed; torch's own random numbers are left as they were."""
    devices = [settings.device] if settings.device.type == "cuda" else []
    random: Any = torch.random  # partly untyped
    with random.fork_rng(devices=devices):
        random.manual_seed(settings.seed)
        config = Mamba2Config(
            d_model=settings.d_model,
            n_layer=settings.n_layer,
            vocab_size=VOCABULARY,
            d_state=settings.d_state,
            headdim=settings.headdim,
        )
        return Mamba2LM(config).to(settings.device)


@contextmanager
def threads(settings: Settings, model: Mamba2LM, ids: Tensor, targets: Tensor) -> Generator[int]:
    """While operators on the CPU use the number of threads that the settings say, or that a step is fastest with.

    So small a model gains little from threads, and loses much where other processes want the same cores: a thread that
    must wait for its turn keeps all others waiting, at every operator.

    Args:
        settings: of the run.
        model: is timed; left without gradients.
        ids: what it is timed on, shape ``(1, tokens)``.
        targets: the same.
    """
    before = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        elif settings.device.type == "cpu":
            step = Step(model, magc.GridCheckpoint(model.layers, plan=Plan.none()), ids, targets)
            torch.set_num_threads(_fastest(step, before))
            model.zero_grad(set_to_none=True)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _fastest(step: Step, most: int) -> int:
    """The fewest threads with which a step takes at most a tenth more than with any other number."""
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]
    if len(counts) == 1:
        return 1
    medians: dict[int, float] = {}
    for count in counts:
        torch.set_num_threads(count)
        medians[count] = statistics.median(step.seconds(1) for _ in range(_TRIES))
    return next(count for count in counts if medians[count] <= 1.1 * min(medians.values()))


def forecast_of(plan: Plan) -> Forecast:
    """The forecast that `magc.plan` and `magc.forecast` attach."""
    assert plan.forecast is not None
    return plan.forecast


def forecast(
    plan: Plan, model: Mamba2LM, ids: Tensor, targets: Tensor, seq_len: int | None = None
) -> tuple[Plan, CostModel]:
    """`magc.forecast` of a plan for a training step of the model, and the costs it measured."""
    given = magc.forecast(plan, model.layers, ids, seq_len, stem=model.stem, head=model.head, targets=targets)
    return given, forecast_of(given).costs


@dataclass(slots=True)
class Step:
    """Forward and backward of one sequence under one plan.

    Attributes:
        model: whose gradients are made.
        stack: its layers under the plan.
        ids: shape ``(1, tokens)``.
        targets: the same. Both may stay on the host.
    """

    model: Mamba2LM
    stack: magc.GridCheckpoint
    ids: Tensor
    targets: Tensor

    def run(self) -> Tensor:
        """Make gradients afresh; returns the loss in nats per byte."""
        self.model.zero_grad(set_to_none=True)
        loss = self.stack.loss(self.ids, self.targets, stem=self.model.stem, head=self.model.head)
        torch.autograd.backward([loss])
        return loss.detach()

    def metered(self) -> tuple[Tensor, int]:
        """`run`, and its peak in bytes beyond what was there before."""
        self.model.zero_grad(set_to_none=True)
        with magc.MemoryMeter(self._device) as meter:
            loss = self.run()
        return loss, meter.peak_bytes

    def seconds(self, repeats: int) -> float:
        """The shortest of several runs, without a meter, which would slow them."""
        return min(timed(self.run, self._device)[1] for _ in range(repeats))

    @property
    def _device(self) -> torch.device:
        return self.model.stem.weight.device


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What ``work`` returns, and its seconds."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
