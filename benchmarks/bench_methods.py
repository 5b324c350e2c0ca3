"""Memory and speed of the usual strategies and of the planner's choices, on a small Mamba-2 and an LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, forwards, lstm, mamba2, peak_bytes
from magc import Plan
from magc.cost import CostModel
from magc.estimate import estimate
from magc.planner import Planner

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "cpu": {
        "mamba2": {"width": 64, "layers": 8, "seq_len": 2048},
        "lstm": {"width": 64, "layers": 8, "seq_len": 1024, "batch": 4},
    },
    "cuda": {
        "mamba2": {"width": 512, "layers": 16, "seq_len": 16384},
        "lstm": {"width": 512, "layers": 8, "seq_len": 4096, "batch": 8},
    },
}
MAKERS: dict[str, Callable[..., Case]] = {"mamba2": mamba2, "lstm": lstm}
SEGMENTS = (64, 128, 256, 512)


@dataclass(slots=True)
class Subject:
    """A model, its costs, and the peak of the plan that recomputes nothing."""

    case: Case
    costs: CostModel
    most: int = field(init=False)

    def __post_init__(self) -> None:
        self.most = estimate(Plan.none(), self.costs, self.case.seq_len).peak_bytes


@pytest.fixture(scope="module", params=list(MAKERS))
def subject(request: pytest.FixtureRequest, device: torch.device) -> Subject:
    """Each model in turn, measured once."""
    case = MAKERS[request.param](device, **SIZES[device.type][request.param])
    return Subject(case, case.costs(SEGMENTS))


def _planner(share: int) -> Callable[[Subject], Plan]:
    return lambda subject: Planner(subject.costs, subject.case.seq_len).plan(subject.most // share)


METHODS: dict[str, Callable[[Subject], Plan | None]] = {
    "plain torch": lambda subject: None,
    "none": lambda subject: Plan.none(),
    "per layer": lambda subject: Plan.per_layer(),
    "sqrt": lambda subject: Plan.sqrt(len(subject.case.layers)),
    "multi-axis": lambda subject: Plan.multi_axis(len(subject.case.layers), subject.case.seq_len),
    "sequence": lambda subject: Plan.sequence(256),
    "planner 1/2": _planner(2),
    "planner 1/4": _planner(4),
    "planner 1/8": _planner(8),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_method(benchmark: Any, subject: Subject, method: str) -> None:
    """One training step; the peak is of another run than the time."""
    case, plan = subject.case, METHODS[method](subject)
    benchmark.group = f"methods: {case.name}"
    step = case.step(plan)
    counted = 1.0 if plan is None else forwards(step, case)
    peak = peak_bytes(step, case.device)
    benchmark.pedantic(step, rounds=2, iterations=1)
    tokens = case.inputs.numel()
    benchmark.extra_info.update(
        kind="method",
        model=case.name,
        method=method,
        seq_len=case.seq_len,
        batch=case.inputs.shape[0],
        layers=len(case.layers),
        peak_bytes=peak,
        forwards=round(counted, 3),
    )
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.min, 1)
    if plan is not None:
        found = estimate(plan, subject.costs, case.seq_len)
        benchmark.extra_info.update(
            plan=str(plan),
            predicted_peak_bytes=found.peak_bytes,
            predicted_forwards=round(found.forwards_per_cell, 3),
            predicted_seconds=found.seconds,
        )
