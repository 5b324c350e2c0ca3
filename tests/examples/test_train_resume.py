"""A run that is killed and gone on with is the run that never was: same weights, to the bit, and same log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import magc
from magc import Plan
from tests.examples.runs import lines, make_run, weights, write_world
from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.training.checkpoint import checkpoints, latest
from video_ma2mba.training.config import CheckpointConfig, MemoryConfig, RatesConfig, TrainConfig
from video_ma2mba.training.train import TrainResult, train


class KilledError(Exception):
    """Stands for a process that ends in the middle."""


def run_killed(config: TrainConfig, after: int) -> None:
    """Train until so many steps are done."""

    def kill(done: int, _: Any) -> None:
        if done == after:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, on_step=kill)


def assert_same_weights(actual: Path, expected: Path) -> None:
    found, wanted = weights(actual), weights(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def told(out: Path) -> list[dict[str, Any]]:
    """The log but for times, folders and starts."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [line for line in found if line["event"] not in ("start", "checkpoint", "end")]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in kept]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


VARIANTS: dict[str, dict[str, Any]] = {
    "bf16 with masters": {"precision": "bfloat16"},
    "threads": {"data": {"workers": 2}},
    "segments": {"memory": MemoryConfig(segment=32)},
    "projector only": {"rates": RatesConfig(projector=1e-2)},
    "batches of two": {"data": {"batch_size": 2, "cache": "1MiB"}},
}


@pytest.fixture(scope="module")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run in one go."""
    return train(make_run(world, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact(world: Path, tmp_path: Path, variant: str) -> None:
    whole = train(make_run(world, tmp_path / "whole", **VARIANTS[variant]))
    config = make_run(world, tmp_path / "killed", **VARIANTS[variant])
    run_killed(config, 3)
    assert_same_weights(train(config).folder, whole.folder)


def test_plans_are_not_made_anew(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans come from measured times, and another plan rounds otherwise."""
    budget: dict[str, Any] = {"memory": MemoryConfig(budget="64MiB"), "data": {"multiple": 128}}
    monkeypatch.setattr(magc, "plan", lambda *args, **options: Plan.sequence(60))
    whole = train(make_run(world, tmp_path / "whole", **budget))
    config = make_run(world, tmp_path / "killed", **budget)
    run_killed(config, 3)
    monkeypatch.setattr(magc, "plan", lambda *args, **options: Plan.sequence(61))
    assert_same_weights(train(config).folder, whole.folder)
    assert [line["plan"] for line in lines(tmp_path / "killed", "plan")] == [str(Plan.sequence(60))]


def test_another_budget_is_planned_for(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(world, tmp_path / "out", memory=MemoryConfig(budget="64MiB"), data={"multiple": 128})
    monkeypatch.setattr(magc, "plan", lambda *args, **options: Plan.sequence(60))
    run_killed(config, 3)
    monkeypatch.setattr(magc, "plan", lambda *args, **options: Plan.sequence(61))
    train(replace(config, memory=MemoryConfig(budget="65MiB")))
    assert [line["plan"] for line in lines(tmp_path / "out", "plan")] == [str(Plan.sequence(n)) for n in (60, 61)]


def test_a_budget_is_planned_for_and_kept(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "out", memory=MemoryConfig(budget="64MiB"), data={"multiple": 128})
    run_killed(config, 3)
    train(config)
    assert len(lines(tmp_path / "out", "plan")) == 1


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_whenever_it_is_killed(world: Path, plain: TrainResult, tmp_path: Path, after: int) -> None:
    config = make_run(world, tmp_path / "killed")
    run_killed(config, after)
    resumed = train(config)
    assert_same_weights(resumed.folder, plain.folder)
    assert resumed.losses == plain.losses
    assert told(tmp_path / "killed") == told(plain.folder.parent)
    last = lines(tmp_path / "killed", "start")[-1]
    assert (last["step"], last["resumed"] is None) == (5 if after == 5 else after // 2 * 2, after < 2)


def test_a_finished_run_is_left_as_it_is(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "out")
    first = train(config)
    assert train(config) == first
    assert len(lines(tmp_path / "out", "step")) == 5


def test_the_last_checkpoints_are_kept(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "out", checkpoints=CheckpointConfig(every=1, keep=3))
    train(config)
    names = [path.name for path in checkpoints(tmp_path / "out")]
    assert names == ["step-00000003", "step-00000004", "step-00000005"]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob(".*")] == []


def test_half_a_checkpoint_is_no_checkpoint(
    world: Path, plain: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while one is written leaves the one before."""
    config, written = make_run(world, tmp_path / "out"), torch.save

    def save(value: Any, path: Path) -> None:
        written(value, path)
        if "step-00000004" in str(path):
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(KilledError):
            train(config)
    assert [path.name for path in checkpoints(config.out)] == ["step-00000002"]
    assert_same_weights(train(config).folder, plain.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": RatesConfig(language=1e-3)}, "rates.language was 0.01, is 0.001; .*rates.vision was 0.001, is None"),
        ({"global_batch": 2}, "global_batch was 4, is 2"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"data": {"max_frames": 1}}, "data.max_frames was None, is 1"),
        ({"parallel": "ddp"}, "parallel was 'zero1', is 'ddp'"),
    ],
)
def test_another_run_is_refused(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run_killed(make_run(world, tmp_path / "out"), 3)
    with pytest.raises(ConfigError, match=f"is of another run: .*{message}.*another out"):
        train(make_run(world, tmp_path / "out", **changes))


def test_what_may_change(world: Path, plain: TrainResult, tmp_path: Path) -> None:
    """Threads, memory, checkpoints and logs do not decide where a run ends up."""
    config = make_run(world, tmp_path / "out")
    run_killed(config, 3)
    data = replace(config.data, workers=2, cache="1MiB", on_problem="stop")
    found = train(replace(config, data=data, memory=MemoryConfig(segment=40), checkpoints=CheckpointConfig(0)))
    torch.testing.assert_close(weights(found.folder), weights(plain.folder), rtol=1e-9, atol=1e-12)


def test_other_data_are_refused(world: Path, tmp_path: Path) -> None:
    other = write_world(tmp_path / "world")
    run_killed(make_run(other, tmp_path / "out"), 3)
    records = json.loads((other / "train.json").read_text())
    (other / "train.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(ConfigError, match="of another run: samples was"):
        train(make_run(other, tmp_path / "out"))


def test_edited_annotations_are_refused(world: Path, tmp_path: Path) -> None:
    """Same ids, another answer."""
    other = write_world(tmp_path / "world")
    run_killed(make_run(other, tmp_path / "out"), 3)
    text = (other / "train.json").read_text()
    (other / "train.json").write_text(text.replace("3 seconds.", "4 seconds."))
    with pytest.raises(ConfigError, match="of another run: samples was"):
        train(make_run(other, tmp_path / "out"))
    (other / "train.json").write_text(text)
    train(make_run(other, tmp_path / "out"))


@pytest.mark.parametrize("name", ["training.json", "rank-0000.pt"])
def test_damaged_checkpoints(world: Path, tmp_path: Path, name: str) -> None:
    config = make_run(world, tmp_path / "out")
    run_killed(config, 3)
    (checkpoints(config.out)[0] / name).write_bytes(b"{")
    with pytest.raises(FormatError, match=r"cannot be read .*delete .*step-00000002 to go on"):
        train(config)


def test_another_number_of_ranks(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "out")
    run_killed(config, 3)
    meta = checkpoints(config.out)[0] / "training.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "world": 8}))
    with pytest.raises(ConfigError, match="written by 8 ranks, this run has 1; start as many"):
        train(config)


def test_a_checkpoint_begins_a_new_run(world: Path, tmp_path: Path) -> None:
    run_killed(make_run(world, tmp_path / "out"), 3)
    config = make_run(world, tmp_path / "new", rates=RatesConfig(projector=1e-3))
    begun = replace(config, start=replace(config.start, folder=latest(tmp_path / "out")))
    before: dict[str, Tensor] = weights(checkpoints(tmp_path / "out")[0])
    after = weights(train(begun).folder)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector"}
