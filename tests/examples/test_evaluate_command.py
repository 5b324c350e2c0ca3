"""Benchmarks from the command line, on a model and a video."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.clips import write_clip
from tests.examples.test_annotations import write
from tests.examples.test_evaluation import MME
from tests.examples.tiny import make_model, make_tokenizer
from video_ma2mba.errors import FormatError
from video_ma2mba.evaluate import run
from video_ma2mba.evaluation.identity import ModelIdentity, digest_of_files, readable_name
from video_ma2mba.model.folder import MODEL_FILES, save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages whose models differ in their weights alone, and Video-MME's rows on two clips."""
    folder = tmp_path_factory.mktemp("evaluate")
    for stage in (1, 2):
        model = make_model(dtype=torch.float32)
        with torch.no_grad():
            model.language.stem.weight.mul_(50 * stage)
        save_pretrained(model, folder / f"stage{stage}" / "model", make_tokenizer())
    (folder / "videos").mkdir()
    for video in ("yt001", "yt002"):
        write_clip(folder / "videos" / f"{video}.mp4", 2)
    write(folder / "mme.json", MME)
    return folder


def options(folder: Path, out: Path, stage: int = 1, **more: Any) -> list[str]:
    given: dict[str, Any] = {
        "benchmark": "videomme",
        "annotations": folder / "mme.json",
        "videos": folder / "videos",
        "model": folder / f"stage{stage}" / "model",
        "out": out,
        "device": "cpu",
        "dtype": "float32",
        **more,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_results_are_of_the_model_that_was_asked(folder: Path, tmp_path: Path) -> None:
    """Training calls every stage's result `model`: the second is not taken for the first."""
    run(options(folder, tmp_path / "1"))
    result = json.loads((tmp_path / "1" / "result.json").read_text())
    assert result["model"] == "stage1/model"
    assert result["identity"] == ModelIdentity.of_folder(folder / "stage1" / "model", dtype="float32").to_json()
    with pytest.raises(SystemExit, match=r"error: .*holds another run .*'stage1/model', is 'stage2/model'.*--out"):
        run(options(folder, tmp_path / "1", 2))
    run(options(folder, tmp_path / "2", 2, name="the second", max_frames=1))
    second = json.loads((tmp_path / "2" / "result.json").read_text())
    assert second["model"] == "the second (1 frm)"
    assert second["identity"]["digest"] != result["identity"]["digest"]
    assert second["identity"]["max_frames"] == 1
    run(options(folder, tmp_path / "1"))  # goes on, with nothing left to ask
    assert json.loads((tmp_path / "1" / "result.json").read_text()) == result


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    contents = {"a": b"one", "b": b"two"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    by_hand = "".join(f"{name}\0{hashlib.sha256(content).hexdigest()}\0" for name, content in contents.items())
    found = digest_of_files(tmp_path, ("a", "b"))
    assert found == hashlib.sha256(by_hand.encode()).hexdigest()
    assert digest_of_files(tmp_path, ("b", "a")) != found
    with pytest.raises(FormatError, match=r"c does not exist; give a model's folder, which holds a, c"):
        digest_of_files(tmp_path, ("a", "c"))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_every_file_of_a_model_counts(folder: Path, tmp_path: Path, name: str) -> None:
    for each in MODEL_FILES:
        (tmp_path / each).write_bytes((folder / "stage1" / "model" / each).read_bytes())
    before = ModelIdentity.of_folder(tmp_path, dtype="float32")
    assert before == ModelIdentity.of_folder(folder / "stage1" / "model", dtype="float32")
    with (tmp_path / name).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert ModelIdentity.of_folder(tmp_path, dtype="float32").digest != before.digest


def test_readable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert readable_name("runs/stage2/model/") == "stage2/model"
    assert readable_name("model") == f"{tmp_path.name}/model"
    assert readable_name("/model") == "model"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"videos": "nowhere"}, r"missing file: nowhere/yt001.mp4: 2 of 2 videos of Video-MME are not there; check"),
        ({"videos": "nowhere", "on_problem": "skip"}, r"2 of 2 videos .*, e.g. nowhere/yt001.mp4; check .*--videos"),
        ({"annotations": "none.json"}, r"none.json does not exist"),
        ({"model": "no-model"}, r"no-model/config.json does not exist; give a model's folder"),
        ({"judge": "embed"}, r"judge='embed': choose 'exact', 'minilm:FOLDER'"),
        ({"judge": "replay:none.jsonl"}, r"none.jsonl does not exist; give a file of saved verdicts"),
        ({"judge": "minilm:no-model"}, r"no-model/config.json does not exist"),
        ({"max_frames": 0}, r"max_frames=0: give a whole number, at least 1"),
        ({"segment": -1}, r"segment=-1: give"),
        ({"device": "cuda:99"}, r"device='cuda:99' cannot be used here"),
    ],
)
def test_errors_before_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("video_ma2mba.evaluate.load_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(options(folder, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match=r"error: .*out is a file; give a folder"):
        run(options(folder, tmp_path / "out"))


def test_some_videos_are_not_there(folder: Path, tmp_path: Path) -> None:
    """Stop says so at once; skip asks about the others; what is answered needs no video."""
    videos = tmp_path / "videos"
    write_clip(videos / "yt001.mp4", 2)
    with pytest.raises(SystemExit, match=r"yt002.mp4: 1 of 2 videos of Video-MME are not there"):
        run(options(folder, tmp_path / "out", videos=videos))
    run(options(folder, tmp_path / "out", videos=videos, on_problem="skip"))
    first = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (first["questions"], set(first["left_out"])) == (2, {"002-1", "002-2"})
    (videos / "yt001.mp4").rename(videos / "yt002.mp4")
    run(options(folder, tmp_path / "out", videos=videos))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["questions"] == 4
