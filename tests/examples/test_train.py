"""The training loop against a plain one; what it freezes, reads, writes and refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn import functional

from magc.errors import BudgetError, MissingExtraError
from tests.examples.clips import RATE, damage, moving_frames, write_clip
from tests.examples.runs import RATES, lines, make_run, record, weights, write_world
from tests.examples.tiny import make_tokenizer
from video_ma2mba.data.encode import write_video
from video_ma2mba.data.frames import Frames
from video_ma2mba.data.llava import read_llava
from video_ma2mba.data.loader import Loader, Preparation
from video_ma2mba.data.media import MediaOptions, open_media
from video_ma2mba.data.records import Media
from video_ma2mba.errors import ConfigError, FormatError, MediaError, ProblemKind
from video_ma2mba.model.folder import load_pretrained
from video_ma2mba.train import parse, run
from video_ma2mba.training import sources
from video_ma2mba.training.checkpoint import checkpoints
from video_ma2mba.training.config import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LogConfig,
    MemoryConfig,
    OptimizerConfig,
    RatesConfig,
    ScheduleConfig,
    SourceConfig,
    StartConfig,
)
from video_ma2mba.training.guard import Guard, TrainingStoppedError
from video_ma2mba.training.train import OnStep, train

CONFIGS = Path(__file__).parents[2] / "examples" / "video_ma2mba" / "configs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def plain_training(world: Path, steps: int, rates: RatesConfig, optimizer: OptimizerConfig) -> dict[str, torch.Tensor]:
    """The same written out: plain forward, torch's AdamW, a mean over the tokens of four samples, a cosine by hand."""
    model = load_pretrained(world / "base")
    model.train_only(rates.trained)
    prepare = Preparation(model.encoder(make_tokenizer()), model.media_options())
    samples = list(read_llava(world / "train.json", world / "videos"))
    batches = islice(Loader(samples, prepare), 4 * steps)
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    adamw = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "initial": rates.trained[name.split(".")[0]],  # type: ignore[index]
                "weight_decay": optimizer.weight_decay if parameter.dim() > 1 else 0.0,
            }
            for name, parameter in named
        ],
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    for step in range(steps):
        losses = []
        for batch in islice(batches, 4):
            logits, _ = model(batch.inputs.segment(0, len(batch.inputs)))
            loss = functional.cross_entropy(logits[0], batch.targets[0], ignore_index=-100, reduction="none")
            losses.append(loss[batch.targets[0] != -100])
        torch.cat(losses).mean().backward()
        for _, parameter in named:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = torch.cat([parameter.grad.flatten() for _, parameter in named]).norm()
        for _, parameter in named:
            parameter.grad.mul_(min(1.0, (optimizer.clip or 1e9) / norm))
        # Ten steps, of which one warms up.
        factor = [1.0, 1.0, 0.9698463103929542, 0.8830222215594891][step]
        for group in adamw.param_groups:
            group["lr"] = group["initial"] * factor
        adamw.step()
        adamw.zero_grad()
    return model.state_dict()


def interrupt_after(steps: int) -> OnStep:
    """Ends a run after so many steps."""

    def end(done: int, _: Any) -> None:
        if done == steps:
            raise InterruptedError

    return end


@pytest.mark.parametrize("rates", [RATES, RatesConfig(projector=1e-2), RatesConfig(language=1e-2, vision=3e-3)])
@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(segment=40)])
def test_training_is_the_plain_one(world: Path, tmp_path: Path, rates: RatesConfig, memory: MemoryConfig) -> None:
    optimizer = OptimizerConfig(weight_decay=0.3, clip=0.5)
    config = make_run(world, tmp_path / "out", rates=rates, optimizer=optimizer, steps=10, memory=memory)
    config = replace(config, checkpoints=CheckpointConfig(every=4, keep=9))
    with pytest.raises(InterruptedError):
        train(config, on_step=interrupt_after(4))
    expected = plain_training(world, 4, rates, optimizer)
    found = weights(checkpoints(tmp_path / "out")[0])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("rates", [RatesConfig(projector=1e-2), RatesConfig(vision=1e-2), RATES])
def test_only_parts_with_a_rate_change(world: Path, tmp_path: Path, rates: RatesConfig) -> None:
    result = train(make_run(world, tmp_path / "out", rates=rates))
    before, after = weights(world / "base"), weights(result.folder)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(rates.trained)
    assert set(lines(tmp_path / "out", "start")[0]["trained"]) == changed


def test_what_the_log_says(world: Path, tmp_path: Path) -> None:
    told: list[tuple[int, Any]] = []
    result = train(make_run(world, tmp_path / "out"), on_step=lambda done, values: told.append((done, values)))
    steps = lines(tmp_path / "out", "step")
    assert [{"event": "step", "step": done, **values} for done, values in told] == steps
    assert tuple(step["loss"] for step in steps) == result.losses
    # Five steps, of which one warms up: then the cosine at 0, 1/4, 2/4 and 3/4.
    assert [step["rates"]["vision"] / RATES.trained["vision"] for step in steps] == pytest.approx(
        [1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    )
    assert set(steps[0]["seconds"]) == {"data", "compute", "reduce", "update"}
    first = [lines(tmp_path / "out", "start")[0][name] for name in ("samples", "steps", "world", "micro_batches")]
    assert first == [6, 5, 1, 4]
    assert lines(tmp_path / "out", "end")[0]["data"] == "all samples could be used"
    assert result.losses[-1] < result.losses[0]


def test_tensorboard(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is a number in the log is a curve; a run that goes on takes back what came after its checkpoint."""
    board = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    train(make_run(world, tmp_path / "out", log=LogConfig(progress=False, tensorboard=True)))
    board.SummaryWriter.assert_called_once_with(tmp_path / "out" / "tensorboard", purge_step=1)
    curves = [call.args for call in board.SummaryWriter.return_value.add_scalar.call_args_list]
    steps = lines(tmp_path / "out", "step")
    assert [(value, step) for name, value, step in curves if name == "loss"] == [(s["loss"], s["step"]) for s in steps]
    assert {"norm", "learnt", "rates/vision", "seconds/compute"} <= {name for name, _, _ in curves}
    board.SummaryWriter.return_value.close.assert_called_once()


def test_random_numbers_of_the_caller_stay(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(make_run(world, tmp_path / "out", steps=1))
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------- data that cannot be used
def test_unusable_samples_are_in_the_log(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    (world / "videos" / "1.mp4").write_bytes(b"nothing")
    result = train(make_run(world, tmp_path / "out"))
    (problem,) = lines(tmp_path / "out", "problem")
    assert (problem["sample"], problem["kind"]) == ("v1", "unreadable file")
    assert [each.sample for each in result.problems] == ["v1"]
    assert lines(tmp_path / "out", "end")[0]["data"].startswith("1 of 6 samples could not be used\n")
    with pytest.raises(MediaError):
        train(make_run(world, tmp_path / "stopped", data={"on_problem": "stop"}))
    assert "unreadable file" in lines(tmp_path / "stopped", "stop")[0]["reason"]


def test_malformed_records_are_left_out(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    records = json.loads((world / "train.json").read_text())
    bad = {"id": "v0", "conversations": []}
    (world / "train.json").write_text(json.dumps([*records, bad, bad]))
    out = tmp_path / "run"
    result = train(make_run(world, out, steps=2))
    assert [(problem.sample, problem.kind) for problem in result.problems] == [("v0", ProblemKind.MALFORMED)] * 2
    assert [line["detail"].split(": ")[1][:8] for line in lines(out, "problem")] == ["record 6", "record 7"]
    assert lines(out, "start")[0]["malformed"] == 2
    assert lines(out, "end")[0]["data"].startswith("2 malformed records were left out, e.g. ")
    with pytest.raises(FormatError, match="record 6 has an empty conversation"):
        train(make_run(world, tmp_path / "strict", data={"on_problem": "stop"}))
    (world / "train.json").write_text(json.dumps([bad]))
    with pytest.raises(FormatError, match=r"all 1 records are malformed; the first: .* empty conversation"):
        train(make_run(world, tmp_path / "none"))


def test_problems_of_samples_with_one_id_are_told_apart(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    records = json.loads((world / "train.json").read_text())
    records += [record("same", "q", "a", video="none.mp4") for _ in range(2)]
    (world / "train.json").write_text(json.dumps(records))
    out = tmp_path / "run"
    config = make_run(world, out, steps=4)

    def kill(step: int, _: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=kill)
    train(config)
    assert sorted(line["index"] for line in lines(out, "problem")) == [6, 7]
    assert lines(out, "problem")[0]["sample"] == lines(out, "problem")[1]["sample"] == "same"


def test_streamed_videos_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    write_video(world / "videos" / "0.mp4", moving_frames(80), rate=RATE)
    damage(world / "videos" / "0.mp4", 0.5, 0.55)
    result = train(make_run(world, tmp_path / "run", data={"stream": True}))
    assert [(problem.sample, problem.kind) for problem in result.problems] == [("v0", ProblemKind.DECODE)]
    with pytest.raises(MediaError, match=r"decoding error: .*0\.mp4"):
        train(make_run(world, tmp_path / "strict", data={"stream": True, "on_problem": "stop"}))


def test_sources(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    scene = {"start_time": 0, "end_time": 1}
    turns = [{"from": who, "value": text} for who, text in (("human", "<image>\nWhat?"), ("gpt", "Grey."))]
    (world / "scenes.jsonl").write_text(
        json.dumps({"id": "s", "video": "0.mp4", "scenes": [scene], "conversations": turns})
    )
    part = SourceConfig("llava", world / "train.json", world / "videos", samples=3)
    scenes = SourceConfig("scenewalk_v2", world / "scenes.jsonl", world / "videos")
    train(make_run(world, tmp_path / "out", data={"sources": (part, scenes)}))
    assert lines(tmp_path / "out", "start")[0]["samples"] == 4
    with pytest.raises(ConfigError, match="has 6 samples, fewer than samples=7"):
        train(make_run(world, tmp_path / "many", data={"sources": (replace(part, samples=7),)}))
    with pytest.raises(ConfigError, match=r"nothing to learn: give data\.sources"):
        train(make_run(world, tmp_path / "none", data={"sources": ()}))


def test_a_video_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache: however many samples and epochs ask for it, as long as there is room."""
    world = write_world(tmp_path)
    records = [record(f"q{number}", f"Q{number}?", "A", video=f"{number % 2}.mp4") for number in range(4)]
    (world / "train.json").write_text(json.dumps(records))
    opened: list[str] = []

    def counted(media: Media, options: MediaOptions) -> Frames:
        opened.append(media.path.name)
        return open_media(media, options)

    monkeypatch.setattr(sources, "open_media", counted)
    frame = 3 * 12 * 12
    train(make_run(world, tmp_path / "out", data={"cache": str(5 * frame)}))
    assert sorted(opened) == ["0.mp4", "1.mp4"]
    opened.clear()
    train(make_run(world, tmp_path / "small", data={"cache": str(2 * frame)}))
    assert (opened.count("0.mp4"), opened.count("1.mp4")) == (1, 10)


def test_questions_about_a_video_are_one_sample(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    write_clip(world / "videos" / "0.mp4", 1)
    records = [record(f"q{number}", f"Q{number}?", "A", video="0.mp4") for number in range(4)]
    (world / "train.json").write_text(json.dumps(records))
    train(make_run(world, tmp_path / "out", data={"group_by_media": True, "max_turns": 6}))
    assert lines(tmp_path / "out", "start")[0]["samples"] == 2


# ---------------------------------------------------------------------- runs that go wrong
def test_nan_stops_before_the_update(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "out")
    with pytest.raises(InterruptedError):
        train(config, on_step=interrupt_after(3))
    (kept,) = checkpoints(config.out)
    state = torch.load(kept / "rank-0000.pt", weights_only=True)
    for values in state["optimizer"].values():
        values["exp_avg"].fill_(float("nan"))
    torch.save(state, kept / "rank-0000.pt")
    with pytest.raises(TrainingStoppedError) as stopped:
        train(config)
    message = str(stopped.value)
    assert "step 4 of 5: the loss is nan, the gradient's norm nan. Losses before: 5.6" in message
    assert "rates: language 0.005, vision 0.0005" in message
    assert f"The last good checkpoint is {kept}: look at those samples" in message
    assert checkpoints(config.out) == [kept]
    assert lines(config.out, "stop")[0]["reason"] == message
    assert [line["step"] for line in lines(config.out, "step")] == [1, 2, 3]


def test_spikes_stop_and_spare_the_checkpoint(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "out", steps=40, checkpoints=CheckpointConfig(every=1, keep=1))
    config = replace(
        config,
        rates=RatesConfig(language=2.0),
        optimizer=OptimizerConfig(clip=None),
        schedule=ScheduleConfig(kind="constant", warmup=0.5),
        guard=GuardConfig(spike=1.05, window=2, patience=2),
    )
    with pytest.raises(TrainingStoppedError, match=r"for the 2\. time in a row more than 1\.05 times the median"):
        train(config)
    losses = [line["loss"] for line in lines(config.out, "step")]
    (kept,) = checkpoints(config.out)
    assert lines(config.out, "checkpoint")[-1]["folder"] == str(kept)
    assert lines(config.out, "checkpoint")[-1]["step"] == len(losses) - 1


def test_what_is_refused_before_work_starts(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch=4 cannot be dealt to 1 ranks .* multiple of 3"):
        train(make_run(world, tmp_path / "out", data={"batch_size": 3}))
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        train(make_run(world, tmp_path / "out", start=StartConfig(folder=tmp_path)))
    with pytest.raises(BudgetError, match="smallest"):
        train(make_run(world, tmp_path / "out", memory=MemoryConfig(budget="1KiB")))
    with pytest.raises(MissingExtraError, match="tensorboard"):
        train(make_run(world, tmp_path / "out", log=LogConfig(progress=False, tensorboard=True)))


# ---------------------------------------------------------------------- the command line
def test_stages_from_yaml(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three shipped files, with small data and few steps: each begins with what the one before saved."""
    small = ["--steps", "2", "--precision", "float32", "--memory.budget", "64MiB", "--log.progress", "false"]
    small += ["--device", "cpu", "--data.multiple", "64", "--data.workers", "0", "--data.batch_size", "1"]
    data = tmp_path / "data"
    data.mkdir()
    records = json.loads((world / "train.json").read_text())
    (data / "LLaVA-Video-178K" / "part").mkdir(parents=True)
    (data / "LLaVA-Video-178K" / "part" / "x_oe_processed.json").write_text(json.dumps(records))
    scenes = [{"start_time": 0, "end_time": 1}, {"start_time": 1, "end_time": 2}]
    turns = [{"from": who, "value": text} for who, text in (("human", "<image>\nWhat?"), ("gpt", "Grey."))] * 2
    (data / "scenes.jsonl").write_text(
        json.dumps({"id": "s", "video": "0.mp4", "scenes": scenes, "conversations": turns})
    )
    media = str(world / "videos")
    before = str(world / "base")
    given: dict[str, dict[str, str]] = {
        "stage1": {"format": "llava", "path": str(world / "train.json"), "media": media},
        "stage1_5": {"format": "scenewalk_v2", "path": str(data / "scenes.jsonl"), "media": media},
        "stage2": {"format": "llava_video_178k", "path": str(data / "LLaVA-Video-178K"), "media": media},
    }
    parts = ["vision", "language", "tokenizer", "untie"]
    for stage, source in given.items():
        begin = [f"--start.{part}" for part in parts if stage == "stage1"]
        begin = [word for option in begin for word in (option, "false" if option.endswith("untie") else "null")]
        out = str(tmp_path / stage)
        start = ["--start.folder", before, "--out", out, "--global_batch", "2"]
        run(
            ["--config", str(CONFIGS / f"{stage}.yaml"), *small, *begin, *start, "--data.sources", json.dumps([source])]
        )
        before = f"{out}/model"
        assert f"2 steps done; the model is {before}" in capsys.readouterr().out
    trained = [set(lines(tmp_path / stage, "start")[0]["trained"]) for stage in given]
    assert trained == [{"projector"}, {"language", "vision", "projector"}, {"language", "vision", "projector"}]
    assert load_pretrained(before).config == load_pretrained(world / "base").config


def test_the_shipped_files_are_table_6() -> None:
    """Rates of language model (in stage 1 of the projector, all that is trained) and tower, batch, warm-up and so on."""
    stages = [parse(["--config", str(CONFIGS / f"{stage}.yaml")]) for stage in ("stage1", "stage1_5", "stage2")]
    assert [stage.rates.projector for stage in stages] == [1e-3, 4e-5, 4e-5]
    assert [stage.rates.language for stage in stages] == [None, 4e-5, 4e-5]
    assert [stage.rates.vision for stage in stages] == [None, 4e-6, 4e-6]
    assert [stage.global_batch for stage in stages] == [512, 32, 32]
    for stage in stages:
        assert stage.optimizer == OptimizerConfig((0.9, 0.95), 1e-8, 0.05, 1.0)
        assert stage.schedule == ScheduleConfig("cosine", 0.1, 0.0)
        assert (stage.precision, stage.parallel) == ("bfloat16", "zero1")


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--global_batch", "4", "--rates.projector", "1e-3"]
    with pytest.raises(SystemExit, match=r"error: no model to begin with: give start\.folder, or else start\.vision"):
        run(options)
    with pytest.raises(SystemExit, match=r"error: nothing is trained"):
        run([*options[:4], "--start.folder", str(tmp_path)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StartConfig(folder=Path("a"), vision=Path("b")), "start.folder=a is a whole model; leave vision out"),
        (lambda: StartConfig(vision=Path("b")), "start.language, start.tokenizer"),
        (lambda: DataConfig(batch_size=0), "data.batch_size=0 must be at least 1"),
        (lambda: DataConfig(cache="1GiB", stream=True), "holds none: choose"),
        (lambda: DataConfig(max_frames=0), "data.max_frames=0 must be at least 1"),
        (lambda: DataConfig(max_frames=-3), "data.max_frames=-3 must be at least 1"),
        (lambda: DataConfig(max_turns=0), "data.max_turns=0 must be at least 1"),
        (lambda: RatesConfig(language=-1.0), "above 0, or null for a frozen part"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"betas lie in \[0, 1\)"),
        (lambda: OptimizerConfig(clip=0.0), "optimizer.clip=0.0 must be above 0"),
        (lambda: ScheduleConfig(warmup=2), "shares from 0 to 1"),
        (lambda: MemoryConfig(budget="1GiB", segment=2), "give one of them"),
        (lambda: MemoryConfig(host_budget="1GiB"), "needs memory.budget"),
        (lambda: CheckpointConfig(keep=0), "checkpoints.keep=0 must be at least 1"),
        (lambda: GuardConfig(spike=1.0), "guard.spike=1.0 must be above 1"),
        (lambda: SourceConfig("llava", Path("x"), samples=0), "source x.samples=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ---------------------------------------------------------------------- guard
def troubles(config: GuardConfig, losses: list[float]) -> list[bool]:
    guard = Guard(config)
    return [guard.trouble(loss, 1.0) is not None for loss in losses]


def test_guard() -> None:
    config = GuardConfig(spike=2.0, window=4, patience=2)
    assert not any(troubles(config, [4, 9, 4, 4, 9, 4, 9, 4]))  # the first ones are free, single spikes allowed
    assert troubles(config, [4, 4, 9, 9]) == [False, False, False, True]
    assert troubles(config, [9, 9, 4, 4, 4, 4, 9, 9])[-1]  # the window forgets
    assert not any(troubles(replace(config, spike=None), [1, 1, 99, 99, 99]))
    guard = Guard(config)
    assert [guard.trouble(*each) is not None for each in [(float("nan"), 1), (1, float("inf")), (1, 1)]] == [
        True,
        True,
        False,
    ]


# ---------------------------------------------------------------------- schedule
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig("cosine", 0.0), [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        (ScheduleConfig("cosine", 0.5), [0.5, 1, 1, 0.5]),
        (ScheduleConfig("linear", 0.25, 0.4), [1, 1, 0.8, 0.6]),
        (ScheduleConfig("constant", 0.5), [0.5, 1, 1, 1]),
        (ScheduleConfig("cosine", 1.0), [0.25, 0.5, 0.75, 1]),
    ],
)
def test_schedule(config: ScheduleConfig, expected: list[float]) -> None:
    assert [config.factor(step, 4) for step in range(4)] == pytest.approx(expected)


def test_number_of_steps(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path, steps=None)
    assert config.total_steps(8) == 2
    assert config.total_steps(9) == 3
    assert replace(config, epochs=2.0).total_steps(9) == 5
    assert replace(config, epochs=0.1).total_steps(9) == 1
    assert replace(config, steps=7).total_steps(9) == 7
