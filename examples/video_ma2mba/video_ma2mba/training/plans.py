"""magc's plan for every length of sequence; made once, kept in checkpoints, so that a resumed run repeats every rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import magc
from magc import Plan
from video_ma2mba.data.batch import Batch
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.training.config import MemoryConfig

Told = Callable[[int, str], None]
"""Told a length and the plan made for it."""


class Plans:
    """The rule that `magc.GridCheckpoint` asks for a plan.

    Args:
        memory: how plans are made.
        told: told of new plans.
    """

    def __init__(self, memory: MemoryConfig, told: Told | None = None) -> None:
        self._memory, self._told = memory, told
        self._made: dict[int, Plan] = {}

    def __call__(self, n_layers: int, length: int) -> Plan:
        """The plan for a length."""
        if self._memory.budget is not None:
            return self._made[length]
        return Plan.none() if self._memory.segment is None else Plan.sequence(self._memory.segment)

    def prepare(self, model: VideoMa2mba, batch: Batch) -> None:
        """Measure and plan if the batch's length is new.

        Raises:
            magc.errors.BudgetError: nothing fits; says the smallest budget that would.
        """
        length, memory = len(batch.inputs), self._memory
        if memory.budget is None or length in self._made:
            return
        device = model.language.stem.weight.device
        # A resumed run does not measure again, so measuring must leave no trace in the random numbers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            plan = magc.plan(
                model.layers,
                batch.inputs,
                budget=memory.budget,
                host_budget=memory.host_budget,
                stem=model.stem,
                head=model.head,
                targets=batch.targets,
                runner=memory.runner,
            )
        self._made[length] = plan
        if self._told is not None:
            self._told(length, str(plan))

    def state_dict(self) -> dict[str, Any]:
        """The plans made so far, and how."""
        plans = {
            length: {name: getattr(plan, name) for name in ("layers", "tokens", "keep", "snapshots")}
            | {"borders": str(plan.borders), "states": str(plan.states)}
            for length, plan in self._made.items()
        }
        return {"memory": self._key(), "plans": plans}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Use the plans of a checkpoint, unless budgets have changed since."""
        if state["memory"] == self._key():
            self._made = {length: Plan(**fields) for length, fields in state["plans"].items()}

    def _key(self) -> list[str | None]:
        return [self._memory.budget, self._memory.host_budget, self._memory.runner]
