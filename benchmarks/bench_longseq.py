"""Training steps of Mamba-2 by length and method, through pytest-benchmark: single cases of `magc bench`.

`magc bench` measures all sizes and lengths, survives what runs out of memory, and sets the results beside the paper's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from magc.bench.cases import Case, Method
from magc.bench.work import Workbench

CASES = {
    "cpu": (Case(model="tiny", tokens=1024, method=Method.NONE), 4 << 20),
    "cuda": (Case(model="mamba2-370m", tokens=1 << 14, method=Method.NONE), 4 << 30),
}
"""By device: the case that others are made of, and the budget of ``auto`` in bytes."""


@pytest.fixture(scope="module")
def workbench(device: torch.device) -> Workbench:
    """Keeps the model, and what was measured of its layers."""
    return Workbench(device)


def make_case(device: torch.device, method: Method, times: int) -> Case:
    """A method's case, so many times as long as the shortest."""
    case, budget = CASES[device.type]
    runner = "cuda-graph" if device.type == "cuda" and method.cuts_sequences else "eager"
    planned = budget if method is Method.AUTO else None
    slowdown = 4.0 if method is Method.MINIMUM else None
    return replace(case, tokens=times * case.tokens, method=method, runner=runner, budget=planned, slowdown=slowdown)


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("method", [method for method in Method if method is not Method.PLAN])
def test_step(benchmark: Any, workbench: Workbench, method: Method, times: int) -> None:
    """Forward and backward; the peak is of another step than the times."""
    case = make_case(workbench.device, method, times)
    benchmark.group = f"long sequences: {case.model}, {case.tokens:,} tokens"
    with workbench.prepared(case) as step:
        step.warm_up()
        peak, _ = step.metered()
        benchmark.pedantic(step.run, rounds=2, iterations=1)
        benchmark.extra_info.update(
            kind="longseq",
            model=case.model,
            method=str(method),
            seq_len=case.tokens,
            runner=case.runner,
            plan=str(step.plan),
            peak_bytes=peak.over_gradients,
            gradient_bytes=peak.gradients,
            predicted_peak_bytes=step.predicted_over,
            predicted_seconds=step.forecast.estimate.seconds,
        )
        if benchmark.stats is not None:
            benchmark.extra_info["tokens_per_second"] = round(case.tokens / benchmark.stats.stats.min, 1)
