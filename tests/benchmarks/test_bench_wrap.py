"""The benchmark of wrapped models runs, and wrapping bounds the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_wrap import main


def test_wrapped_models_stay_within_their_budgets(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    main(["--device", "cpu", "--small", "--out", str(tmp_path)])
    plain, *wrapped = json.loads((tmp_path / "wrap.json").read_text())["rows"]
    assert plain["budget"] is None
    assert [row["tokens"] for row in wrapped] == [512, 1024, 1024]
    assert all(row["peak_bytes"] <= row["budget"] and row["plan"] for row in wrapped)
    assert wrapped[0]["peak_bytes"] < plain["peak_bytes"] / 6
    assert wrapped[1]["peak_bytes"] < plain["peak_bytes"] / 6
