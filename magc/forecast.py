"""What the planner predicts for a plan, and the figures behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from magc.cost import CostModel
from magc.estimate import Estimate, schedule_of
from magc.schedule import Schedule
from magc.simulate import Simulation, simulate

if TYPE_CHECKING:
    from magc.plan import Plan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and its estimate."""

    plan: Plan
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Forecast:
    """Prediction for one plan on one stack and sequence length.

    Attributes:
        costs: the measured cost model.
        seq_len: tokens.
        lowest_layer: the lowest layer that needs a gradient.
        estimate: predicted peak bytes, their terms, seconds.
        budget: the device budget in bytes, None if the plan was not made for one.
        host_budget: the host budget in bytes.
        disk: whether checkpoints were allowed on disk.
        notes: what else to know of the numbers: the runner, the implementation behind the layers, how times were had.
    """

    costs: CostModel
    seq_len: int
    lowest_layer: int
    estimate: Estimate
    budget: int | None = None
    host_budget: int = 0
    disk: bool = False
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Predicted peak on the device, beyond what is allocated when the call starts."""
        return self.estimate.peak_bytes

    @property
    def tokens_per_second(self) -> float:
        """Predicted throughput of forward and backward, for each sequence of the batch."""
        return self.seq_len / self.estimate.seconds if self.estimate.seconds else float("inf")

    def schedule(self, plan: Plan) -> Schedule:
        """The plan's schedule."""
        return schedule_of(plan, self.costs, self.seq_len, self.lowest_layer)

    def replay_bytes(self, plan: Plan) -> int:
        """What the memory that captured cells share has to hold; 0 if none are captured."""
        if not self.costs.captured:
            return 0
        grid = plan.grid(self.costs.n_layers, self.seq_len)
        layers = list(grid.layers.all_bounds())
        lengths = {grid.tokens.part_length(0), grid.tokens.part_length(grid.segments - 1)}
        return self.costs.replay_bytes([self.costs.cell(*bounds, tokens) for bounds in layers] for tokens in lengths)

    def simulate(self, plan: Plan, *, timeline: bool = False) -> Simulation:
        """Carry the plan's schedule out on paper, action by action."""
        return simulate(self.schedule(plan), self.costs, timeline=timeline)

    def explain(self, plan: Plan) -> str:
        """The prediction as text."""
        from magc.report import explain

        return explain(plan, self)
