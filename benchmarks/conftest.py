"""Device selection, and what a result file says of the machine: what bears on the numbers, nothing that names it."""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest
import torch

collect_ignore = ["bench_kernels.py"]  # a script: it times CUDA graphs itself, and needs a GPU and Triton


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--device``."""
    parser.addoption("--device", default=None, help="device of the benchmarks: cpu or cuda (cuda if there is one)")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device to benchmark on."""
    return _device(request.config)


def _device(config: pytest.Config) -> torch.device:
    chosen = config.getoption("--device")
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace the plugin's description, which holds the host's name, by one that anyone may read."""
    device = _device(config)
    machine_info.clear()
    machine_info.update(
        python=platform.python_version(),
        system=platform.system(),
        architecture=platform.machine(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        simd=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keep what says which code was measured."""
    for key in set(commit_info) - {"id", "dirty"}:
        del commit_info[key]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep the result file small enough to store."""
    for benchmark in output_json["benchmarks"]:
        stats = benchmark["stats"]
        benchmark["stats"] = {key: stats[key] for key in ("min", "max", "mean", "median", "stddev", "rounds")}
        del benchmark["options"]
