"""The benchmarks can be collected and run, and a result file becomes tables and a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks.summarize import as_markdown, draw

ROOT = Path(__file__).parents[2]


def test_two_benchmarks(tmp_path: Path) -> None:
    """All files are imported to find the two; one that cannot be fails the run."""
    results, picture = tmp_path / "results.json", tmp_path / "picture.png"
    chosen = "test_length and 4096 and disk or test_method and lstm and sequence"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", chosen, "-q", "-p", "no:cacheprovider"]
    command += ["--device", "cpu", "--benchmark-only", f"--benchmark-json={results}"]
    # Arguments and plugins of the run that this test is in are not for the one that it starts.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"  # small tensors; threads would only wait for each other
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed, 42 deselected" in run.stdout
    data = json.loads(results.read_text())
    infos = {benchmark["extra_info"]["kind"]: benchmark["extra_info"] for benchmark in data["benchmarks"]}
    assert set(infos) == {"method", "length"}
    assert infos["method"]["predicted_peak_bytes"] == pytest.approx(infos["method"]["peak_bytes"], rel=0.1)
    assert infos["method"]["forwards"] == infos["method"]["predicted_forwards"] == 1.75
    assert set(data["machine_info"]) == {
        "python", "system", "architecture", "torch", "device", "simd", "cores", "threads",
    }  # fmt: skip
    text = as_markdown(results)
    assert "### lstm, 8 layers, 4 x 1,024 tokens" in text
    assert "| 4,096 | states on disk | " in text
    draw(results, picture)
    assert picture.stat().st_size > 10_000


def test_a_long_sequence(tmp_path: Path) -> None:
    """One case of the benchmark of long sequences."""
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_longseq.py", "-k", "paper-1", "-q"]
    command += ["-p", "no:cacheprovider", "--device", "cpu", "--benchmark-only", f"--benchmark-json={results}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (benchmark,) = json.loads(results.read_text())["benchmarks"]
    info = benchmark["extra_info"]
    assert (info["kind"], info["method"], info["seq_len"]) == ("longseq", "paper", 1024)
    assert info["predicted_peak_bytes"] == pytest.approx(info["peak_bytes"], rel=0.05)
    assert info["tokens_per_second"] > 0


def test_stored_results_name_no_machine() -> None:
    stored = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert stored
    for path in stored:
        data = json.loads(path.read_text())
        names = {"node", "release", "hostname"}
        if "machine_info" not in data:
            # Not pytest-benchmark's: the results of magc demo and of bench_kernels.py.
            assert not names & set(data)
            assert not names & set(data.get("machine", {}))
            continue
        assert not names & set(data["machine_info"])
        assert set(data["commit_info"]) <= {"id", "dirty"}
        assert as_markdown(path).startswith(data["datetime"][:10])
