"""The small run as a whole, in a few seconds, and how its answers become figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from video_ma2mba.small import ablation, report
from video_ma2mba.small.app import FILES, run
from video_ma2mba.small.dataset import Data
from video_ma2mba.small.measure import Answer, accuracy
from video_ma2mba.small.pipeline import BASELINES, FINAL, SeedResult
from video_ma2mba.small.settings import STAGES, Settings, Stage
from video_ma2mba.small.stages import config_of


def answer(video: str, seconds: int, kind: str, *, right: bool) -> Answer:
    letter = "A" if right else "B"
    return Answer(f"{video} {kind}", video, seconds, kind, "", ("A. x", "B. y"), "A", "x (A)", letter)


def result(seed: int, correct: dict[str, list[bool]]) -> SeedResult:
    """One question about first at every length; `correct` by what was asked."""
    answers = {
        name: [
            answer(f"{seed}-{seconds}", seconds, "first", right=right)
            for seconds, right in zip((16, 32, 64, 128), rights, strict=True)
        ]
        for name, rights in correct.items()
    }
    return SeedResult(seed, Data(Path(), {}), {}, answers, {"all": 1.0})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(["--out", str(out), "--quick", "true", "--device", "cpu"])
    return out


def test_a_run_writes_its_results(done: Path) -> None:
    assert all((done / name).stat().st_size > 0 for name in FILES)


def test_a_run_asks_about_the_videos_and_the_baselines(done: Path) -> None:
    found = json.loads((done / "result.json").read_text())
    assert list(found["accuracy"]) == [FINAL, *BASELINES.values()]
    assert set(found["accuracy"][FINAL]["cells"]) == {"16 s", "32 s", "48 s"}


def test_a_run_trains_the_three_stages(done: Path) -> None:
    losses = json.loads((done / "result.json").read_text())["seeds"][0]["losses"]
    assert {name: len(values) for name, values in losses.items()} == {"1": 3, "1.5": 3, "2": 3}


def test_a_run_leaves_a_model_and_real_annotations(done: Path) -> None:
    assert (done / "seed-0" / "stage-2" / "model" / "model.safetensors").is_file()
    rows = json.loads((done / "seed-0" / "data" / "videomme.json").read_text())
    assert {"videoID", "duration", "task_type", "question_id", "options", "answer"} <= set(rows[0])


def test_a_folder_in_use_is_refused(done: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: out=.* is not empty"):
        run(["--out", str(done), "--quick", "true"])


def test_seeds_must_differ(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: seeds=.*different"):
        run(["--out", str(tmp_path / "out"), "--seeds", "[1, 1]"])


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: device='cuda:99' cannot be used here"):
        run(["--out", str(tmp_path / "out"), "--device", "cuda:99"])
    assert not (tmp_path / "out").exists()


def test_accuracy_counts_videos_as_clusters() -> None:
    answers = [answer("a", 16, kind, right=True) for kind in ("first", "last")]
    answers += [answer("b", 16, kind, right=False) for kind in ("first", "last")]
    mean = accuracy(answers)
    # Two clusters with residual sums of +1 and -1 over four answers.
    assert (mean.value, mean.error, mean.count) == (0.5, pytest.approx(2**0.5 / 4), 4)


def test_accuracy_takes_lengths_and_kinds() -> None:
    answers = [answer("a", 16, "first", right=True), answer("b", 128, "first", right=False)]
    answers.append(answer("a", 16, "last", right=False))
    assert accuracy(answers, seconds=[16], kinds=["first"]).value == 1.0
    assert accuracy(answers, seconds=[128]).value == 0.0


def test_verdicts_are_over_all_seeds() -> None:
    good = {FINAL: [True] * 4, **dict.fromkeys(BASELINES.values(), [False] * 4)}
    bad = good | {FINAL: [True, False, False, False]}
    settings = Settings(Path())
    assert all(passed for _, passed in report.verdicts(settings, [result(0, good)]))
    # Four of six are right at trained lengths, one of two beyond.
    found = [passed for _, passed in report.verdicts(settings, [result(0, good), result(1, bad)])]
    assert found == [True, False, True, True, True]


def test_a_baseline_that_comes_near_is_told() -> None:
    near = {FINAL: [True] * 4, "shuffled": [True] * 4, "grey": [False] * 4}
    found = dict(report.verdicts(Settings(Path()), [result(0, near)]))
    assert [text for text, passed in found.items() if not passed] == ["shuffled at least 15% below: 100.0%"]


def test_the_ablation_is_shaped_like_the_papers() -> None:
    mean = accuracy([answer("a", 16, "first", right=True)])
    rows = [
        ablation.Row(variant, limit, {16: mean}, mean) for variant in ablation.VARIANTS for limit in ablation.LIMITS
    ]
    head, cells = ablation.as_table(rows, [16])
    assert head == ["stage 1.5", "train", "infer", "16 s", "all"]
    assert cells[0] == ["no", "8 frm", "8 frm", "100.0 ± 0.0", "100.0 ± 0.0"]
    assert [row[:2] for row in cells[:: len(ablation.LIMITS)]] == [["no", "8 frm"], ["no", "1 fps"], ["yes", "1 fps"]]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stages_train_the_papers_parts(stage: Stage, tmp_path: Path) -> None:
    config = config_of(stage, Settings(tmp_path), Data(tmp_path, {}), tmp_path, tmp_path / "out", 0)
    every = {"language", "vision", "projector"}
    assert set(config.rates.trained) == ({"projector"} if stage.name == "1" else every)


@pytest.mark.slow
def test_the_ablation_runs(tmp_path: Path) -> None:
    ablation.main(tmp_path / "out", device="cpu", quick=True)
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    assert len(rows) == len(ablation.VARIANTS) * len(ablation.LIMITS)
