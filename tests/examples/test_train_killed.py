"""A process that the system kills while it trains, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.examples.conftest import EXAMPLE
from tests.examples.runs import RATES, lines, make_run, weights, write_world
from video_ma2mba.training.checkpoint import latest
from video_ma2mba.training.train import train


@pytest.mark.slow
def test_killed_by_the_system(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    whole = train(make_run(world, tmp_path / "whole", steps=16))
    sources = [{"format": "llava", "path": str(world / "train.json"), "media": str(world / "videos")}]
    options = {
        "--out": tmp_path / "killed",
        "--start.folder": world / "base",
        "--data.sources": json.dumps(sources),
        "--global_batch": 4,
        "--steps": 16,
        "--precision": "float64",
        "--checkpoints.every": 2,
        "--log.progress": "false",
        "--device": "cpu",
        **{f"--rates.{part}": rate for part, rate in RATES.trained.items()},
    }
    command = [sys.executable, "-m", "video_ma2mba.train", *(str(each) for pair in options.items() for each in pair)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parents[2]
    log = tmp_path / "killed" / "log.jsonl"
    with subprocess.Popen(command, env=environment, cwd=root) as process:
        while process.poll() is None and (not log.is_file() or log.read_text().count('"event": "step"') < 5):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert latest(tmp_path / "killed") is not None
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16 steps done" in done.stdout
    assert lines(tmp_path / "killed", "start")[-1]["step"] >= 4
    found, wanted = weights(tmp_path / "killed" / "model"), weights(whole.folder)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
