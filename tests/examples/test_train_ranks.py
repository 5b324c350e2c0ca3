"""Two ranks end with the weights of one, whatever they share; and go on exactly from their checkpoints."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import distributed

from tests.distributed.ranks import RANKS, run_processes
from tests.examples.runs import lines, make_run, weights, write_world
from video_ma2mba.training.config import MemoryConfig, Parallel, RatesConfig
from video_ma2mba.training.train import TrainResult, train

ROUNDED: tuple[Parallel, ...] = ("zero1", "fsdp2")
PART = RatesConfig(projector=1e-2)
STRATEGIES: tuple[Parallel, ...] = get_args(Parallel)


class KilledError(Exception):
    """Stands for a process that ends in the middle."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def work(rank: int, folder: str, world: str, port: int) -> None:
    """One rank: whole runs, and runs that are killed after three of five steps and gone on with."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(make_run(Path(world), Path(folder, "torchrun")))
    assert not distributed.is_initialized()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)

    def kill(done: int, _: Any) -> None:
        if done == 3:
            raise KilledError

    try:
        for parallel in STRATEGIES:
            train(make_run(Path(world), Path(folder, parallel), parallel=parallel))
            killed = make_run(Path(world), Path(folder, f"{parallel}-killed"), parallel=parallel)
            with pytest.raises(KilledError):
                train(killed, on_step=kill)
            train(killed)
        for parallel in ROUNDED:
            train(
                make_run(
                    Path(world), Path(folder, f"{parallel}-bf16"), parallel=parallel, precision="bfloat16", steps=3
                )
            )
        train(make_run(Path(folder, "damaged"), Path(folder, "problems"), steps=2))
        train(make_run(Path(world), Path(folder, "fsdp2-part"), parallel="fsdp2", rates=PART))
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_world(folder / "damaged")
    for number in (0, 1):
        (folder / "damaged" / "videos" / f"{number}.mp4").write_bytes(b"nothing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        run_processes(work, str(folder), str(world), free_port(), seconds=400)
    return folder


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run of one process."""
    return train(make_run(world, tmp_path_factory.mktemp("alone"), parallel="ddp"))


@pytest.fixture(scope="module")
def alone_in_bf16(world: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The same in low precision."""
    return train(make_run(world, tmp_path_factory.mktemp("bf16"), precision="bfloat16", steps=3))


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_two_ranks_are_one(runs: Path, alone: TrainResult, parallel: Parallel) -> None:
    expected, found = weights(alone.folder), weights(runs / parallel / "model")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    steps = lines(runs / parallel, "step")
    assert [step["loss"] for step in steps] == pytest.approx(alone.losses, rel=1e-10)
    assert [step["norm"] for step in steps] == pytest.approx(
        [each["norm"] for each in lines(alone.folder.parent, "step")]
    )


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_killed_ranks_go_on_exactly(runs: Path, parallel: Parallel) -> None:
    expected, found = weights(runs / parallel / "model"), weights(runs / f"{parallel}-killed" / "model")
    assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())
    assert [line["loss"] for line in lines(runs / f"{parallel}-killed", "step")] == [
        line["loss"] for line in lines(runs / parallel, "step")
    ]


@pytest.mark.parametrize(("parallel", "share"), [("ddp", 1.0), ("zero1", 0.5), ("fsdp2", 0.5)])
def test_shares_of_the_optimizer(runs: Path, parallel: Parallel, share: float) -> None:
    """Of all moments a rank holds all, those of its parameters, or its shards of all."""
    folder = runs / parallel / "checkpoints" / "step-00000005"
    states = [torch.load(folder / f"rank-{rank:04d}.pt", weights_only=True)["optimizer"] for rank in range(RANKS)]
    counts = [sum(each["exp_avg"].numel() for each in state.values()) for state in states]
    trained = sum(lines(runs / parallel, "start")[0]["trained"].values())
    assert sum(counts) == trained * (2 if parallel == "ddp" else 1)
    assert counts == pytest.approx([share * trained] * RANKS, rel=0.2)
    common = states[0].keys() & states[1].keys()
    assert bool(common) is (parallel != "zero1")


def test_ranks_that_torchrun_starts(runs: Path) -> None:
    expected, found = weights(runs / "zero1" / "model"), weights(runs / "torchrun" / "model")
    assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())


def test_problems_of_all_ranks_are_in_the_log(runs: Path) -> None:
    assert {line["sample"] for line in lines(runs / "problems", "problem")} == {"v0", "v1"}
    assert len(lines(runs / "problems", "problem")) == 2


def test_a_part_is_trained_on_shards(world: Path, runs: Path, tmp_path: Path) -> None:
    alone = train(make_run(world, tmp_path / "one", rates=PART))
    torch.testing.assert_close(weights(runs / "fsdp2-part" / "model"), weights(alone.folder), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parallel", ROUNDED)
def test_bf16_on_two_ranks(runs: Path, alone_in_bf16: TrainResult, parallel: Parallel) -> None:
    """Gradients are added in float32, but which of them round otherwise is chance, so single weights may differ."""
    expected, found = weights(alone_in_bf16.folder), weights(runs / f"{parallel}-bf16" / "model")
    kept = torch.float32 if parallel == "fsdp2" else torch.bfloat16
    assert {tensor.dtype for tensor in found.values()} == {kept}
    mine, other = (torch.cat([each[name].flatten().float() for name in expected]) for each in (found, expected))
    assert (mine - other).norm() < 0.01 * other.norm()
    losses = [line["loss"] for line in lines(runs / f"{parallel}-bf16", "step")]
    assert losses == pytest.approx(alone_in_bf16.losses, rel=1e-2)


def test_one_process_on_shards(world: Path, tmp_path: Path) -> None:
    """FSDP without torchrun, planned by budget."""
    expected = train(make_run(world, tmp_path / "plain"))
    memory = MemoryConfig(budget="64MiB")
    found = train(make_run(world, tmp_path / "fsdp2", parallel="fsdp2", memory=memory, data={"multiple": 128}))
    torch.testing.assert_close(weights(found.folder), weights(expected.folder), rtol=1e-9, atol=1e-12)
    assert len(lines(tmp_path / "fsdp2", "plan")) == 1
    assert not distributed.is_initialized()
