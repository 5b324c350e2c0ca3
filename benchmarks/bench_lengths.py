"""Peak memory against sequence length: constant when only the sequence is cut and states go to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import mamba2, peak_bytes
from magc import Plan

LENGTHS = [2**power for power in range(12, 17)]
TOKENS = 512
PLANS = {
    "states on disk": Plan.sequence(TOKENS, states="disk"),
    "states on the device": Plan.sequence(TOKENS),
}


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("name", list(PLANS))
def test_length(benchmark: Any, device: torch.device, tmp_path: Path, name: str, seq_len: int) -> None:
    """One training step; the peak is of another run than the time."""
    case = mamba2(device, width=32, layers=2, seq_len=seq_len)
    step = case.step(PLANS[name], disk_dir=str(tmp_path))
    step(2 * TOKENS)
    peak = peak_bytes(step, device)
    benchmark.group = "lengths"
    benchmark.pedantic(step, rounds=1, iterations=1)
    benchmark.extra_info.update(kind="length", method=name, seq_len=seq_len, segment=TOKENS, peak_bytes=peak)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = round(seq_len / benchmark.stats.stats.min, 1)
