"""`magc bench`: single cases, and the file of results."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from magc import Plan
from magc.bench.app import in_words
from magc.bench.cases import Case, Method, paper_budget
from magc.bench.choose import without_gradients
from magc.bench.result import Facts, Record, Result, ResultsFile, Status, latest
from magc.bench.work import Effort, Workbench, is_out_of_memory
from magc.errors import InputError, StoreError

CPU = torch.device("cpu")
SHORT = Case(model="tiny", tokens=256, method=Method.NONE)
ENDLESS = replace(SHORT, tokens=1 << 50)
"""Its token ids alone are more than any address space."""


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench(CPU)


# ---------------------------------------------------------------------- one case
@pytest.mark.parametrize(
    "case",
    [
        SHORT,
        replace(SHORT, method=Method.SQRT),
        replace(SHORT, method=Method.PAPER, tokens=1024),
        replace(SHORT, method=Method.PLAN, plan="tokens=64", tokens=1024),
        replace(SHORT, method=Method.PLAN, plan="layers=2,tokens=64,states=disk,keep=3", head="full"),
    ],
    ids=str,
)
def test_a_case_is_measured_as_predicted(workbench: Workbench, case: Case, tmp_path: Path) -> None:
    result = workbench.measure(case, Effort(steps=1, disk_dir=str(tmp_path)))
    assert result.status is Status.OK
    assert result.predicted_bytes == pytest.approx(result.peak_bytes, rel=0.03)
    assert result.predicted_gross_bytes == pytest.approx(result.gross_bytes, rel=0.03)
    assert result.tokens_per_second is not None
    assert len(result.seconds) == 1


def test_plans_of_methods(workbench: Workbench) -> None:
    wanted = {Method.NONE: Plan.none(), Method.PER_LAYER: Plan.per_layer(), Method.SQRT: Plan.sqrt(4)}
    for method, plan in wanted.items():
        with workbench.prepared(replace(SHORT, method=method)) as step:
            assert step.plan == plan


def test_peak_leaves_out_gradients_that_exist(workbench: Workbench) -> None:
    """Segments so small that gradient sums are most of the memory."""
    case = replace(SHORT, method=Method.PLAN, plan="layers=1,tokens=16,borders=rebuild")
    result = workbench.measure(case, Effort(steps=1))
    with workbench.prepared(case) as step:
        sums = 4 * sum(parameter.numel() for parameter in step.model.parameters())
    assert result.gradient_bytes == sums
    assert result.peak_bytes is not None
    assert result.gross_bytes is not None
    assert result.gross_bytes - sums <= result.peak_bytes < result.gross_bytes


def test_auto_stays_within_its_budget(workbench: Workbench) -> None:
    for budget in (1 << 20, 4 << 20):
        result = workbench.measure(replace(SHORT, method=Method.AUTO, tokens=512, budget=budget), Effort(steps=1))
        assert result.peak_bytes is not None
        assert budget / 3 < result.peak_bytes <= budget


def test_a_budget_that_nothing_fits_says_what_would(workbench: Workbench) -> None:
    result = workbench.measure(replace(SHORT, method=Method.AUTO, budget=5000))
    assert result.status is Status.NO_PLAN
    assert result.message.startswith("needs ")
    assert "over weights and gradient buffers" in result.message


def test_minimum_takes_less_the_slower_it_may_be(workbench: Workbench) -> None:
    peaks: list[int] = []
    fastest = 0.0
    for slowdown in (1.0, 2.5, None):
        with workbench.prepared(replace(SHORT, method=Method.MINIMUM, slowdown=slowdown)) as step:
            peaks.append(step.predicted_over)
            seconds = step.forecast.estimate.seconds
            fastest = fastest or seconds
            assert slowdown is None or seconds <= slowdown * fastest
    assert peaks[0] > 1.5 * peaks[1] > 2 * peaks[2]


def test_costs_without_gradients_predict_what_is_over_them(workbench: Workbench) -> None:
    with workbench.prepared(replace(SHORT, method=Method.PLAN, plan="layers=1,tokens=16")) as step:
        costs = step.forecast.costs
        sums = sum(stage.grad_bytes for stage in costs.stages)
        assert sums > 0
        assert not any(stage.grad_bytes for stage in without_gradients(costs).stages)
        gross = step.forecast.peak_bytes + step.ids.nbytes + step.targets.nbytes
        assert gross - 2 * sums < step.predicted_over < gross


def test_a_case_that_would_take_too_long_is_not_run(workbench: Workbench) -> None:
    slow = workbench.measure(SHORT, Effort(limit=1e-6))
    assert slow.status is Status.TOO_SLOW
    assert slow.expected_seconds is not None
    assert slow.expected_seconds > 1e-6
    assert workbench.measure(SHORT, Effort(seconds_left=1e-6)).status is Status.POSTPONED


def test_steps_are_timed_until_patience_ends(workbench: Workbench) -> None:
    assert len(workbench.measure(SHORT, Effort(steps=4)).seconds) == 4
    assert len(workbench.measure(SHORT, Effort(steps=4, patience=0)).seconds) == 1


def test_host_memory_that_cannot_be_pinned_is_no_memory(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workbench, case: Case, effort: Effort, progress: Any) -> Result:
        del self, case, effort, progress
        raise StoreError("cannot pin 1 GiB of host memory") from RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Workbench, "_measure", refuse)
    result = workbench.measure(SHORT)
    assert result.status is Status.OUT_OF_MEMORY
    assert "cannot pin" in result.message


def test_memory_errors_are_told_from_others(workbench: Workbench) -> None:
    assert workbench.measure(ENDLESS).status is Status.OUT_OF_MEMORY
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


# ---------------------------------------------------------------------- the file
def made(case: Case, status: Status = Status.OK, **values: Any) -> Record:
    facts = Facts("a GPU", {"torch": "2"}, "abc", "2026-01-01T00:00:00+00:00", "magc bench")
    return Record(Result(case=case, status=status, **values), facts)


def test_records_survive_json() -> None:
    for case in (
        replace(SHORT, method=Method.AUTO, budget=1 << 30, host_budget=1 << 31, disk=True, head="full"),
        Case(model="mamba2-2.7b", tokens=1 << 14, method=Method.AUTO, budget="paper", runner="cuda-graph"),
        replace(SHORT, method=Method.MINIMUM, slowdown=3.0, keep="outputs"),
    ):
        record = made(case, seconds=(1.0, 2.0), peak_bytes=7)
        assert Record.from_json(record.as_json()) == record


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.jsonl")
    file.append(made(SHORT))
    file.path.write_text("{}\n" + file.path.read_text())
    with pytest.raises(InputError, match=r"line 1: not a result .* remove the line"):
        file.read()


def test_of_a_repeated_case_the_last_result_counts() -> None:
    first, second = made(SHORT, peak_bytes=1), made(SHORT, peak_bytes=2)
    assert latest([first, made(replace(SHORT, tokens=512)), second])[0] is second


def test_results_of_another_commit_count_only_when_asked() -> None:
    facts = made(SHORT).facts
    other = replace(facts, commit="def")
    assert not facts.is_same_run(other)
    assert facts.is_same_run(other, any_commit=True)
    assert not facts.is_same_run(replace(other, device="another GPU"), any_commit=True)


def test_a_result_in_words() -> None:
    good = made(SHORT, peak_bytes=1 << 30, seconds=(0.5, 0.25, 1.0), plan="p").result
    assert in_words(good) == "1.0 GiB, 512 tokens/s (500 ms a step), p"
    bad = made(SHORT, Status.FAILED, message="a\n b").result
    assert in_words(bad) == "failed: a b"


# ---------------------------------------------------------------------- the paper's numbers
@pytest.mark.parametrize(
    ("model", "power", "gigabytes"),
    [("mamba2-2.7b", 10, 0.7), ("mamba2-2.7b", 19, 42.2), ("mamba2-2.7b", 22, 42.2), ("mamba2-370m", 21, 40.2)],
)
def test_the_papers_memory_as_a_budget(model: str, power: int, gigabytes: float) -> None:
    assert paper_budget(model, 1 << power) == round(gigabytes * 1e9)
    case = Case(model=model, tokens=1 << power, method=Method.AUTO, budget="paper")
    assert case.budget_bytes == round(gigabytes * 1e9)


@pytest.mark.parametrize(("model", "tokens"), [("tiny", 1024), ("mamba2-2.7b", 512), ("mamba2-2.7b", 5000)])
def test_the_paper_has_no_such_budget(model: str, tokens: int) -> None:
    with pytest.raises(InputError, match="the paper's Table 3 has"):
        Case(model=model, tokens=tokens, method=Method.AUTO, budget="paper")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"model": "huge"},
        {"budget": 5},
        {"method": Method.AUTO},
        {"method": Method.PLAN},
        {"plan": "tokens=5"},
        {"method": Method.PLAN, "plan": "tokens=nothing"},
        {"slowdown": 2.0},
        {"method": Method.MINIMUM, "slowdown": 0.5},
    ],
    ids=str,
)
def test_a_case_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(SHORT, **wrong)


# ---------------------------------------------------------------------- on a GPU
def _quiet(news: str) -> None:
    del news


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["eager", "cuda-graph"])
def test_a_case_on_a_gpu(runner: str) -> None:
    case = Case(
        model="mamba2-130m",
        tokens=1 << 13,
        method=Method.PLAN,
        plan="tokens=1024",
        runner=runner,  # pyright: ignore
    )
    result = Workbench(torch.device("cuda")).measure(case, Effort(steps=2))
    assert (result.status, result.message) == (Status.OK, "")
    assert result.peak_bytes is not None
    assert result.peak_bytes > 10 << 20
    assert len(result.seconds) == 2


@pytest.mark.gpu
def test_host_memory_is_pinned_before_a_step_is_timed() -> None:
    plan = "tokens=1024,states=host"
    case = Case(model="mamba2-130m", tokens=1 << 15, method=Method.PLAN, plan=plan)
    result = Workbench(torch.device("cuda")).measure(case, Effort(steps=3, patience=0))
    assert result.status is Status.OK
    assert result.host_bytes > 1 << 29
    assert result.pinned_bytes >= result.host_bytes
    assert len(result.seconds) == 1


@pytest.mark.gpu
def test_memory_comes_back_after_a_case_without_any() -> None:
    workbench = Workbench(torch.device("cuda"))
    endless = Case(model="mamba2-130m", tokens=1 << 24, method=Method.NONE)
    assert workbench.measure(endless, Effort(limit=math.inf)).status is Status.OUT_OF_MEMORY
    assert workbench.is_clean()


@pytest.mark.gpu
def test_a_profile_of_a_replayed_step() -> None:
    from magc.bench.profiling import record

    case = Case(model="mamba2-130m", tokens=1 << 14, method=Method.PLAN, plan="tokens=1024", runner="cuda-graph")
    found = record(Workbench(torch.device("cuda")), case, None, _quiet)
    assert sum(found.categories.values()) == pytest.approx(1)
    assert found.categories["matrix products"] > 0.1
    assert 0 <= found.loop.idle_share < 0.5
