"""The video benchmark takes whole steps of the trainer, and its rows say of them what they claim to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from benchmarks.bench_video import main
from benchmarks.video_case import TowerWork, VideoBench, tower_work
from benchmarks.video_report import Row
from benchmarks.video_setup import ANSWER, QUESTION, make_batch, model_config, random_frames, stage2
from magc.plan import Plan
from magc.schedule import Schedule
from video_ma2mba.data.chat import IGNORED
from video_ma2mba.train import parse
from video_ma2mba.training.config import MemoryConfig
from video_ma2mba.training.ranks import joined

CONFIGS = Path(__file__).parents[2] / "examples" / "video_ma2mba" / "configs"
SETTINGS = ["--model", "tiny", "--multiple", "64", "--device", "cpu", "--frame-chunk", "4"]


def measured(out: Path, *arguments: str) -> tuple[dict[str, Any], list[Row]]:
    main([*SETTINGS, *arguments, "--out", str(out)])
    record = json.loads((out / "video.json").read_text())
    return record, [Row.from_dict(values) for values in record["rows"]]


@pytest.fixture(scope="module")
def by_budget(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Row]]:
    out = tmp_path_factory.mktemp("video")
    return out, *measured(out, "--minutes", "1,0.25", "--budget", "3MiB")


def test_sizes_are_those_of_the_model_and_the_optimizer(
    by_budget: tuple[Path, dict[str, Any], list[Row]],
) -> None:
    _, record, rows = by_budget
    trained = record["trained"]
    assert "12 bytes a parameter" in record["optimizer"]
    for row in rows:
        steps = row.optimizer - 12 * trained  # one counter for each tensor
        assert 0 < steps < 4 * 200
        assert (row.sums, row.delivered) == (4 * trained, 2 * trained)
        assert row.weights >= 2 * trained
        assert row.over > 0
        assert row.peak["passes"] >= row.over + row.weights + row.optimizer
        # Whatever an update needs, weights, gradients and optimizer are there.
        assert row.peak["update"] >= row.weights + row.delivered + row.optimizer


def test_lengths_are_those_of_the_videos(by_budget: tuple[Path, dict[str, Any], list[Row]]) -> None:
    _, _, rows = by_budget
    assert [row.frames for row in rows] == [15, 60]
    chat = model_config("tiny").chat
    text = [chat.system_tag, chat.system, chat.user_tag, chat.before_frames, chat.after_frames, chat.assistant_tag]
    ends = 3  # of the system's, the user's and the assistant's turn
    for row in rows:
        frames = 4 * row.frames + len(chat.between_frames) * (row.frames - 1)
        assert row.tokens == frames + sum(map(len, text)) + ends + QUESTION + ANSWER - 1
        assert row.padded == -(-row.tokens // 64) * 64


def test_memory_stays_within_the_budget(by_budget: tuple[Path, dict[str, Any], list[Row]]) -> None:
    _, _, rows = by_budget
    assert all(row.budget == 3 << 20 and row.over <= row.budget for row in rows)


def test_parts_add_up_and_losses_are_a_random_models(by_budget: tuple[Path, dict[str, Any], list[Row]]) -> None:
    _, record, rows = by_budget
    for row, values in zip(rows, record["rows"], strict=True):
        assert all(seconds >= 0 for seconds in row.parts.values())
        assert sum(row.parts.values()) == pytest.approx(row.step_seconds)
        assert values["step_seconds"] == row.step_seconds
        assert row.vision["backward"] > row.vision["forward"] > 0
        assert row.encoded > 1.5 * row.frames  # once in each pass, but for the last segment's
        assert row.loss == pytest.approx(math.log(256), rel=0.1)


def test_draws_again_what_was_measured(
    by_budget: tuple[Path, dict[str, Any], list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, rows = by_budget
    assert (out / "video.png").stat().st_size > 10_000
    main(["--draw", str(out / "video.json"), "--out", str(tmp_path)])
    assert (tmp_path / "video.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.splitlines()[2:] == list(map(str, rows))


def test_a_step_changes_all_parts(tmp_path: Path) -> None:
    config = stage2(MemoryConfig(segment=64), frame_chunk=4, multiple=64, device="cpu")
    with joined("cpu") as ranks:
        bench = VideoBench("tiny", config, ranks)
        before = {name: each.detach().clone() for name, each in bench.model.named_parameters()}
        row = bench.measure(0.1)
        assert row.budget is None
        assert row.plan.startswith("all layers x 64 tokens")
        after = dict(bench.model.named_parameters())
        for part in ("language", "vision", "projector"):
            names = [name for name in after if name.startswith(part)]
            assert any(not torch.equal(before[name], after[name]) for name in names), part
        assert all(each.grad is None for each in after.values())


def test_no_step_is_taken_when_the_loss_is_not_finite() -> None:
    config = stage2(MemoryConfig(segment=64), frame_chunk=4, multiple=64, device="cpu")
    with joined("cpu") as ranks:
        bench = VideoBench("tiny", config, ranks)
        with torch.no_grad():
            next(bench.model.projector.parameters()).fill_(math.nan)
        with pytest.raises(FloatingPointError, match="no step can be taken"):
            bench.measure(0.1)


def test_the_configuration_is_stage_2s() -> None:
    mine, theirs = stage2(MemoryConfig()), parse(["--config", str(CONFIGS / "stage2.yaml")])
    for name in ("rates", "optimizer", "schedule", "parallel", "precision"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.data.multiple == theirs.data.multiple
    assert mine.start.frame_chunk == theirs.start.frame_chunk
    assert replace(mine, global_batch=theirs.global_batch).micro_batches(8) == theirs.micro_batches(8)


def test_frames_are_counted_as_the_tower_sees_them() -> None:
    """Tokens of two frames, 4 and a line's end each, cut after the first two of the second one."""
    _, tokens = make_batch(model_config("tiny"), 2, 1)
    first = int((tokens.frame == 0).nonzero()[0])
    cut = first + 7
    plan = Plan(layers=2, tokens=(cut, len(tokens) - cut))
    schedule = Schedule(plan, plan.grid(4, len(tokens)))
    assert tower_work(schedule.forward(), schedule.grid, tokens) == TowerWork(3, 0)
    assert tower_work(schedule.backward(), schedule.grid, tokens) == TowerWork(3, 3)
    whole = Schedule(Plan.none(), Plan.none().grid(4, len(tokens)))
    assert tower_work(whole.forward(), whole.grid, tokens) == TowerWork(2, 0)
    assert tower_work(whole.backward(), whole.grid, tokens) == TowerWork(0, 2)


def test_only_the_answer_is_learnt_and_no_two_frames_are_alike() -> None:
    batch, tokens = make_batch(model_config("tiny"), 70, 64)
    learnt = (batch.targets[0] != IGNORED).nonzero().flatten()
    assert learnt.tolist() == list(range(len(tokens) - ANSWER - 1, len(tokens)))  # and the token that ends it
    assert batch.inputs.frames == 70
    assert len(random_frames(70, 28).flatten(1).unique(dim=0)) == 70


@pytest.mark.parametrize(("name", "trained"), [("0.7b", 0.67e9), ("1.8b", 1.75e9), ("3.1b", 3.14e9)])
def test_sizes_are_the_papers(name: str, trained: float) -> None:
    from video_ma2mba.model.model import VideoMa2mba

    model = VideoMa2mba.random(model_config(name), device="meta", dtype=torch.bfloat16)
    model.train_only(("language", "vision", "projector"))
    count = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert count == pytest.approx(trained, rel=0.02)
    assert model.config.vision.tokens_per_frame == 144
