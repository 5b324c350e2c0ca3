"""`magc demo`: its results hold what was measured, and mistakes are told in one line."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from magc.demo import main
from magc.demo.corpus import SEPARATOR, Corpus, tokens_of, windows
from magc.demo.model import make_model
from magc.demo.settings import parse
from magc.demo.train import evaluate, learning_rate_factor, make_plan, train
from magc.errors import InputError
from magc.nn import Mamba2Config, Mamba2LM

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Generator[None]:
    """Operators this small gain nothing from threads, which on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "results"
    assert main(["--quick", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_writes_the_results_and_nothing_else(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        "report.md",
        "memory.png",
        "loss.png",
        "plan.png",
        "results.json",
    }
    for picture in out.glob("*.png"):
        data = picture.read_bytes()
        assert data.startswith(PNG)
        assert len(data) > 10_000


def test_the_model_learns(results: dict[str, Any]) -> None:
    before, after = results["held_out"]["before"], results["held_out"]["after"]
    assert before["nats_per_byte"] == pytest.approx(5.6, abs=0.3)  # log(257) and what random weights add
    assert after["nats_per_byte"] < before["nats_per_byte"] - 1
    assert after["tokens"] == before["tokens"] > 4096
    losses = results["training"]["losses"]
    assert len(losses) == results["settings"]["steps"]
    assert losses[-1] < losses[0] - 1


def test_training_stays_in_a_budget_that_plain_training_exceeds(results: dict[str, Any]) -> None:
    training, budget = results["training"], results["settings"]["budget"]
    assert training["predicted_bytes_without_checkpoints"] > 4 * budget
    assert 0 < training["peak_bytes"] <= budget
    assert training["predicted_bytes"] == pytest.approx(training["peak_bytes"], rel=0.05)


def test_strategies_are_measured(results: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in results["comparison"]["rows"]}
    none = rows["none"]
    assert none["forwards_per_cell"] == 1
    assert none["gradient_difference"] == 0
    for name in ("per layer", "sqrt(L)", "MA-GC, paper", "MA-GC, planned"):
        row = rows[name]
        assert row["measured_bytes"] < none["measured_bytes"]
        assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.05)
        assert row["forwards_per_cell"] > 1
        assert row["gradient_difference"] < 1e-4
        assert row["tokens_per_second"] > 0
        assert row["longest"] > none["longest"]
    assert rows["MA-GC, planned"]["measured_bytes"] <= results["settings"]["budget"] < none["measured_bytes"]
    assert rows["MA-GC, planned"]["longest"] > results["settings"]["seq_len"]


def test_the_report_says_what_was_measured(out: Path, results: dict[str, Any]) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    assert f"| after | {results['held_out']['after']['nats_per_byte']:.3f} |" in text
    for row in results["comparison"]["rows"]:
        assert f"| {row['name']} | {row['measured_bytes'] / 2**20:.1f} MiB |" in text
    for name in ("memory.png", "loss.png", "plan.png"):
        assert f"({name})" in text


# ---------------------------------------------------------------------- corpus
def small_corpus(root: Path, files: int = 12, size: int = 50) -> Path:
    for index in range(files):
        path = root / f"part{index % 3}" / f"m{index:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * (size + index))
    return root


def test_runs_repeat_to_the_bit_with_given_segments(tmp_path: Path) -> None:
    root = small_corpus(tmp_path)
    options = ["--quick", "--steps", "3", "--seq-len", "128", "--segment", "50", "--device", "cpu", "--seed", "3"]
    settings = parse([*options, "--corpus", str(root)])

    def losses() -> tuple[float, ...]:
        corpus = Corpus.find(settings.corpus, settings.seed)
        examples = windows(corpus.training_tokens(3 * 128 + 1), 128, 3)
        model = make_model(settings)
        torch.randn(1)  # nothing else that draws random numbers matters
        plan = make_plan(settings, model, *examples[0], lambda news: None)
        return train(settings, model, plan.plan, examples, lambda loss, speed: None).losses

    assert losses() == losses()


def test_split_does_not_depend_on_the_seed_and_covers_everything_once(tmp_path: Path) -> None:
    root = small_corpus(tmp_path)
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text("x")
    (root / "part0" / "empty.py").touch()
    first, second = Corpus.find(root, 0), Corpus.find(root, 1)
    assert first.held_out == second.held_out
    assert first.train != second.train
    assert set(first.train) == set(second.train)
    assert not set(first.train) & set(first.held_out)
    assert sorted(path.name for path in (*first.train, *first.held_out)) == [f"m{index:02}.py" for index in range(12)]


def test_tokens_are_a_separator_and_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(bytes(range(256)))
    assert tokens_of(path).tolist() == [SEPARATOR, *range(256)]
    path.write_bytes(b"")
    assert tokens_of(path).tolist() == [SEPARATOR]


def test_windows_follow_one_another_and_start_again() -> None:
    made = windows(torch.arange(21), 8, 3)
    assert [ids[0, 0].item() for ids, _ in made] == [0, 8, 0]
    for ids, targets in made:
        assert ids.shape == targets.shape == (1, 8)
        assert torch.equal(targets, ids + 1)
    with pytest.raises(InputError, match="too few"):
        windows(torch.arange(8), 8, 1)


def test_evaluation_streams_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces with carried states give the loss of the whole file at once."""
    torch.manual_seed(0)
    config = Mamba2Config(d_model=32, n_layer=2, vocab_size=257, d_state=8, headdim=16)
    model = Mamba2LM(config).double()
    path = tmp_path / "a.py"
    path.write_bytes(bytes(torch.randint(0, 256, (300,)).tolist()))
    ids = tokens_of(path)[None]
    with torch.no_grad():
        logits, _ = model(ids)
    targets = torch.cat([ids[0, 1:], torch.tensor([SEPARATOR])])
    whole = torch.nn.functional.cross_entropy(logits[0], targets)
    monkeypatch.setattr("magc.demo.train._PIECE", 77)
    monkeypatch.setattr("magc.demo.train._SEGMENT", 32)
    done: list[int] = []
    found = evaluate(model, [path], done.append)
    assert found.nats_per_byte == pytest.approx(float(whole), rel=1e-12)
    assert found.tokens == found.longest == sum(done) == 301


def test_learning_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 40) for step in range(40)]
    assert max(factors) == factors[4] == 1
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert all(0 < learning_rate_factor(0, steps) <= 1 for steps in (1, 2, 9))


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "24G"], "24G"),
        (["--budget", "1KiB"], "smallest that would"),
        (["--seq-len", "many"], "'many'"),
        (["--seq-len", "8"], "--seq-len 8"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "few"], "few"),
        (["--seed", "-1"], "--seed -1"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "tpu"], "--device tpu"),
        (["--segment", "2048"], "segments of 2048 tokens need"),
        (["--corpus", "no/such/folder"], "no such folder"),
        (["--colour"], "--colour"),
        (["--seq-len", "2^33"], "too few"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = [] if "--corpus" in options else ["--corpus", str(small_corpus(tmp_path / "corpus", size=300))]
    assert main(["--quick", "--device", "cpu", "--out", str(out), *small, *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_unusable_folder_for_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--quick", "--out", str(tmp_path / "file")]) == 2
    assert "cannot make this folder" in capsys.readouterr().err


def test_missing_extras_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magc.demo.app.find_spec", lambda name: None if name == "rich" else object())
    assert main(["--quick", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'magc[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moment", "threads"),
    [("magc.demo.train.make_plan", "2"), ("magc.demo.train.evaluate", "1"), ("magc.demo.figures.draw_loss", "1")],
)
def test_an_interrupted_run_leaves_nothing(
    moment: str, threads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, interrupted)
    root = small_corpus(tmp_path / "corpus")
    options = ["--quick", "--steps", "1", "--seq-len", "64", "--threads", threads, "--corpus", str(root)]
    assert main([*options, "--out", str(tmp_path / "out")]) == 130
    assert torch.get_num_threads() == 1
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_defaults_are_those_of_the_help() -> None:
    settings = parse([])
    assert settings.seq_len == 2**15
    assert settings.budget == 64 * 2**20
    assert settings.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert parse(["--budget", "1048576"]).budget == 2**20
