"""Settings of all tests: no CUDA, no GPU tests; hypothesis draws the same examples every time."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before anything imports Triton: its own library is made for the interpreter, or not, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")
torch.set_num_threads(1)  # small tensors; threads would only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
