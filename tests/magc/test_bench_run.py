"""`magc bench`: the process that measures, whole runs, and what becomes of cases that fail."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magc.bench import main
from magc.bench.cases import Case, Method
from magc.bench.result import ResultsFile, Status
from magc.bench.work import Effort
from magc.bench.worker import Worker

CPU = torch.device("cpu")
SHORT = Case(model="tiny", tokens=256, method=Method.NONE)
ENDLESS = replace(SHORT, tokens=1 << 50)
"""Its token ids alone are more than any address space."""


# ---------------------------------------------------------------------- the process that measures
@pytest.fixture(scope="module")
def worker() -> Generator[Worker]:
    with Worker(CPU) as made:
        yield made


def _quiet(news: str) -> None:
    del news


def test_the_same_process_goes_on_after_a_case_without_memory(worker: Worker) -> None:
    assert worker.measure(ENDLESS, Effort(), _quiet).status is Status.OUT_OF_MEMORY
    news: list[str] = []
    assert worker.measure(SHORT, Effort(steps=1), news.append).status is Status.OK
    assert worker.started == 1
    assert "planning" in news


def test_an_error_is_a_result_and_another_process_goes_on(worker: Worker) -> None:
    before = worker.started
    broken = replace(SHORT, runner="cuda-graph", method=Method.PLAN, plan="tokens=64")  # there is no GPU
    result = worker.measure(broken, Effort(), _quiet)
    assert result.status is Status.FAILED
    assert result.message.startswith("InputError: runner='cuda-graph' needs the layers on a CUDA device")
    assert worker.pid is None
    killed = worker.measure(SHORT, Effort(), lambda news: _kill(worker) if news == "planning" else None)
    assert killed.status is Status.FAILED
    assert "SIGKILL" in killed.message
    assert worker.started == before + 1


def _kill(worker: Worker) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


def test_a_case_is_stopped_when_the_time_is_up(worker: Worker) -> None:
    worker.facts()
    start = time.monotonic()
    long = replace(SHORT, tokens=1 << 14)
    result = worker.measure(long, Effort(seconds_left=0.5), lambda news: None)
    assert result.status is Status.POSTPONED
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------------- a run
def run(out: Path, *more: str) -> int:
    chosen = ("--models", "tiny", "--device", "cpu", "--out", str(out), "--steps", "1")
    return main([*chosen, "--lengths", "256,512", *more])


METHODS = ("--methods", "none,auto", "--budget", "1MiB,4MiB")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "results"
    assert run(folder, *METHODS) == 0
    return folder


def test_a_run_leaves_results_tables_and_pictures(out: Path) -> None:
    names = {"results.jsonl", "report.md", "memory.png", "throughput.png", "frontier.png"}
    assert {path.name for path in out.iterdir()} == names
    for picture in out.glob("*.png"):
        assert picture.stat().st_size > 10_000
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["case"]["method"], row["case"]["tokens"], row["status"]) for row in rows] == [
        (method, tokens, "ok") for method in ("none", "auto", "auto") for tokens in (256, 512)
    ]
    report = (out / "report.md").read_text()
    assert "| tokens | none | auto, 1 MiB | auto, 4 MiB |" in report
    assert "### Memory against speed at 512 tokens" in report


def test_results_say_how_they_came_to_be_and_name_no_machine(out: Path) -> None:
    row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    facts = row["facts"]
    assert set(facts) == {"device", "versions", "commit", "date", "command"}
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["command"].startswith("magc bench --models tiny --device cpu --steps 1 --lengths 256,512")
    assert str(out) not in json.dumps(row)


def test_the_same_command_goes_on(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = out / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:50])  # as if the run had been cut off while it wrote
    assert run(out, *METHODS) == 0
    shown = capsys.readouterr().out
    assert "4 of 6 cases are in" in shown
    assert "the last line was cut off and is left out" in shown
    again = file.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4]
    assert [json.loads(line)["case"] for line in again] == [json.loads(line)["case"] for line in lines]


def test_a_run_without_time_leaves_the_cases_for_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--methods", "none,per-layer", "--minutes", "1e-9") == 0
    assert "4 cases are left: the same command goes on with tiny, 256 tokens" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()


def test_longer_cases_of_a_series_without_memory_are_left_out(tmp_path: Path) -> None:
    sizes = ("--lengths", "256,2^50,2^51")
    assert main(["--models", "tiny", "--methods", "none", "--device", "cpu", "--out", str(tmp_path), *sizes]) == 0
    records, _ = ResultsFile(tmp_path / "results.jsonl").read()
    assert [record.result.status for record in records] == [Status.OK, Status.OUT_OF_MEMORY, Status.SKIPPED]
    report = (tmp_path / "report.md").read_text()
    assert "| 2^50 | - |" in report
    assert "| 2^51 | - |" in report
