"""Questions from the command line."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.clips import write_clip
from tests.examples.tiny import make_model, make_tokenizer
from video_ma2mba.ask import run
from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.model import answer
from video_ma2mba.model.answer import VideoAnswerer
from video_ma2mba.model.folder import load_pretrained, save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ask")
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        model.language.stem.weight.mul_(50)  # answers differ from question to question
    save_pretrained(model, folder / "model", make_tokenizer())
    write_clip(folder / "clip.mp4", 4)
    (folder / "bad.mp4").write_bytes(b"nothing")
    return folder


def options(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--dtype", "float32", "--device", "cpu", "--max_new_tokens", "12"]


def expected(folder: Path, questions: list[str], clip: Media | None = None) -> list[str]:
    answerer = VideoAnswerer(load_pretrained(folder / "model"), make_tokenizer())
    media = Media(folder / "clip.mp4") if clip is None else clip
    return list(answerer.answer(media, [Prompt(question, max_new_tokens=12) for question in questions]))


def test_one_question(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run([str(folder / "clip.mp4"), "What?", *options(folder)])
    out, err = capfd.readouterr()
    assert out == expected(folder, ["What?"])[0] + "\n"
    assert "reading clip.mp4: 100%" in err


def test_several_questions_read_the_video_once(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    original = answer.open_media
    monkeypatch.setattr(answer, "open_media", lambda media, how: opened.append(media.path) or original(media, how))
    run([str(folder / "clip.mp4"), "What?", "Who is it?", *options(folder), "--segment", "7"])
    first, second = expected(folder, ["What?", "Who is it?"])
    assert capfd.readouterr().out == f"What?\n  {first}\nWho is it?\n  {second}\n"
    assert opened[:-1] == [folder / "clip.mp4"]  # the last one is this test's own


def test_typed_questions(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n\nWho is it?"))
    run([str(folder / "clip.mp4"), *options(folder)])
    assert capfd.readouterr().out == "".join(f"{each}\n" for each in expected(folder, ["What?", "Who is it?"]))


def test_a_clip(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run([str(folder / "clip.mp4"), "What?", *options(folder), "--start", "1", "--stop", "3"])
    clip = Media(folder / "clip.mp4", 1.0, 3.0)
    assert capfd.readouterr().out == expected(folder, ["What?"], clip)[0] + "\n"


@pytest.mark.parametrize(
    ("video", "model", "message"),
    [
        ("none.mp4", "model", "error: missing file: .*none.mp4: there is no such file or folder"),
        ("bad.mp4", "model", "error: unreadable file: .*bad.mp4: FFmpeg cannot open it"),
        ("clip.mp4", "nothing", "error: .*nothing/config.json does not exist; give a model's folder"),
    ],
)
def test_errors(folder: Path, video: str, model: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run([str(folder / video), "What?", *options(folder), "--model", str(folder / model)])


def test_a_clip_outside_the_video(folder: Path) -> None:
    with pytest.raises(SystemExit, match="error: clip outside the video"):
        run([str(folder / "clip.mp4"), "What?", *options(folder), "--start", "9"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max_frames", "0", "max_frames=0: give a whole number, at least 1"),
        ("--max_frames", "-2", "max_frames=-2: give"),
        ("--max_new_tokens", "0", "max_new_tokens=0: give"),
        ("--segment", "0", "segment=0: give"),
        ("--repetition", "0", "repetition=0: give"),
        ("--start", "-1", "start=-1.0: give seconds, 0 or more"),
        ("--start", "nan", "start=nan: give"),
        ("--stop", "0", "stop=0.0: give seconds after the start, 0"),
        ("--stop", "inf", "stop=inf: give"),
        ("--device", "cuda:99", "device='cuda:99' cannot be used here"),
    ],
)
def test_options_are_refused_before_the_model_is_loaded(folder: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run([str(folder / "clip.mp4"), "What?", *options(folder), "--model", "no-such-model", option, value])
