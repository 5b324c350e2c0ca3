"""The training comparison: the same losses on the grid and without, no memory left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.train_lm import main


def test_both_runs_are_the_same_training(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = "--model tiny --tokens 2^9 --steps 5 --segment 128 --device cpu --out"
    main([*settings.split(), str(tmp_path)])
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found["largest_difference"] < 1e-5
    assert found["peak_bytes"]["on the grid"] < found["peak_bytes"]["no checkpointing"]
    assert found["left_bytes"] == {"on the grid": 0, "no checkpointing": 0}
    assert (tmp_path / "losses.png").stat().st_size > 10_000
