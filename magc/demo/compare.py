"""The usual strategies and magc's on one sequence that is short enough for all: memory, speed, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

import magc
from magc.cost import CostModel
from magc.demo.model import EXAMPLE_TOKENS, Step, forecast, forecast_of
from magc.demo.settings import Settings
from magc.errors import BudgetError
from magc.estimate import estimate
from magc.nn import Mamba2LM
from magc.paper import PaperCosts
from magc.plan import Plan
from magc.planner import Planner

_REPEATS = 2
_FARTHEST = 1 << 34
"""Longest sequence looked at, in tokens."""

Rule = Callable[[int], Plan]
"""The plan for a sequence of so many tokens; raises BudgetError where there is none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy, measured.

    Attributes:
        name: of the strategy.
        plan: its plan, in words.
        measured_bytes: peak of a warm forward and backward, by `magc.MemoryMeter`.
        predicted_bytes: the peak that `magc.forecast` predicts.
        forwards_per_cell: 1 is no recomputation.
        tokens_per_second: forward and backward.
        gradient_difference: largest over parameters of ``|g - g0| / |g0|``, g0 without checkpointing.
        loss_difference: of the loss in nats, from that without checkpointing.
        longest: longest sequence in tokens that the budget is predicted to hold, None if there is no end to it.
    """

    name: str
    plan: str
    measured_bytes: int
    predicted_bytes: int
    forwards_per_cell: float
    tokens_per_second: float
    gradient_difference: float
    loss_difference: float
    longest: int | None

    @property
    def ratio(self) -> float:
        """Predicted over measured peak."""
        return self.predicted_bytes / self.measured_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "predicted_over_measured": self.ratio}


@dataclass(frozen=True, slots=True)
class Comparison:
    """All strategies on the same sequence.

    Attributes:
        tokens: its length.
        rows: one for each strategy, that without checkpointing first.
        growth: predicted peak bytes by strategy at each of ``lengths``, None where there is no plan.
        lengths: in tokens.
    """

    tokens: int
    rows: tuple[Row, ...]
    growth: dict[str, tuple[int | None, ...]]
    lengths: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tokens": self.tokens, "rows": [row.as_dict() for row in self.rows]}


def compare(
    settings: Settings, model: Mamba2LM, ids: Tensor, targets: Tensor, progress: Callable[[str], None]
) -> Comparison:
    """Measure every strategy.

    Args:
        settings: of the run.
        model: gets gradients, and is left without any.
        ids: shape ``(1, tokens)``, on the device.
        targets: the same.
        progress: told what is being measured.
    """
    progress("measuring layers")
    example = ids[:, :EXAMPLE_TOKENS]
    _, costs = forecast(Plan.none(), model, example, targets[:, :EXAMPLE_TOKENS], max(ids.shape[1], settings.seq_len))
    rules = strategies(settings, costs)
    rows: list[Row] = []
    reference: list[Tensor] | None = None
    first_loss = 0.0
    for name, rule in rules.items():
        progress(name)
        plan, _ = forecast(rule(ids.shape[1]), model, ids, targets)
        step = Step(model, magc.GridCheckpoint(model.layers, plan=plan), ids, targets)
        loss = float(step.run())
        gradients = _gradients(model)
        if reference is None:
            reference, first_loss = gradients, loss
        seconds = step.seconds(_REPEATS)
        _, peak = step.metered()
        rows.append(
            Row(
                name=name,
                plan=str(plan),
                measured_bytes=peak,
                predicted_bytes=forecast_of(plan).peak_bytes,
                forwards_per_cell=forecast_of(plan).estimate.forwards_per_cell,
                tokens_per_second=ids.shape[1] / seconds,
                gradient_difference=_largest_difference(gradients, reference),
                loss_difference=abs(loss - first_loss),
                longest=_longest(rule, costs, settings.budget),
            )
        )
    model.zero_grad(set_to_none=True)
    lengths = tuple(_lengths(settings, ids.shape[1]))
    growth = {name: tuple(_peak(rule, costs, length) for length in lengths) for name, rule in rules.items()}
    return Comparison(ids.shape[1], tuple(rows), growth, lengths)


def strategies(settings: Settings, costs: CostModel) -> dict[str, Rule]:
    """Plans by name for every length."""
    layers = settings.n_layer
    paper = PaperCosts.from_mamba2(settings.d_model, d_state=settings.d_state, headdim=settings.headdim)
    return {
        "none": lambda tokens: Plan.none(),
        "per layer": lambda tokens: Plan.per_layer(),
        "sqrt(L)": lambda tokens: Plan.sqrt(layers),
        "MA-GC, paper": lambda tokens: Plan.multi_axis(layers, tokens, paper),
        "MA-GC, planned": lambda tokens: Planner(costs, tokens).plan(settings.budget),
    }


# ---------------------------------------------------------------------- gradients
def _gradients(model: Mamba2LM) -> list[Tensor]:
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


def _largest_difference(gradients: list[Tensor], reference: list[Tensor]) -> float:
    def relative(grad: Tensor, wanted: Tensor) -> float:
        norm = float(wanted.double().square().sum().sqrt())
        return float((grad.double() - wanted.double()).square().sum().sqrt()) / (norm or 1.0)

    return max(relative(grad, wanted) for grad, wanted in zip(gradients, reference, strict=True))


# ---------------------------------------------------------------------- how far a budget reaches
def _peak(rule: Rule, costs: CostModel, tokens: int) -> int | None:
    try:
        return estimate(rule(tokens), costs, tokens).peak_bytes
    except BudgetError:
        return None


def _longest(rule: Rule, costs: CostModel, budget: int) -> int | None:
    """Longest sequence within a budget, to two digits."""

    def fits(tokens: int) -> bool:
        peak = _peak(rule, costs, tokens)
        return peak is not None and peak <= budget

    low = 1
    if not fits(low):
        return 0
    while fits(2 * low):
        low *= 2
        if low >= _FARTHEST:
            return None
    high = 2 * low
    while high - low > low / 100:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _lengths(settings: Settings, tokens: int) -> Iterator[int]:
    """Powers of two around the sequences of this run."""
    shortest = max(64, min(tokens, settings.seq_len) // 16)
    length = 1 << (shortest.bit_length() - 1)
    while length <= 64 * settings.seq_len:
        yield length
        length *= 2
