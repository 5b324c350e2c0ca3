"""Answers of the model: the video is read once, questions fork the state, and answers end as they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from magc.meter import MemoryMeter
from tests.examples.clips import write_clip
from tests.examples.test_annotations import write
from tests.examples.test_evaluation import mme
from tests.examples.tiny import make_config, make_model, make_tokenizer
from video_ma2mba.data.batch import VideoTokens
from video_ma2mba.data.media import open_media
from video_ma2mba.data.records import Media, Prompt, Turn
from video_ma2mba.errors import ConfigError, MediaError
from video_ma2mba.evaluate import run
from video_ma2mba.model.answer import VideoAnswerer, repeats
from video_ma2mba.model.device import usable_device
from video_ma2mba.model.folder import save_pretrained
from video_ma2mba.model.model import VideoMa2mba

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 5)


def greedy(model: VideoMa2mba, media: Media, prompt: Prompt) -> str:
    """The answer without states: the whole sequence is read again for every token."""
    frames = open_media(media, model.media_options())
    turn = Turn("user", (media, prompt.text))
    tokens = model.encoder(TOKENIZER).question([turn], [len(frames)], prefill=prompt.prefill)
    found: list[int] = []
    with torch.no_grad():
        for _ in range(prompt.max_new_tokens):
            segment = VideoTokens([tokens], [frames]).segment(0, len(tokens))
            segment["ids"] = torch.cat([segment["ids"], torch.tensor([found], dtype=torch.int64)], 1)
            text = torch.zeros(1, len(found), dtype=torch.int64)
            segment["frame"] = torch.cat([segment["frame"], text - 1], 1)
            segment["patch"] = torch.cat([segment["patch"], text], 1)
            logits, _ = model(segment, num_last_tokens=1)
            token = int(logits[0, -1, :257].argmax())
            if token == TOKENIZER.end:
                break
            found.append(token)
            if repeats(found, 5):
                del found[-5:]
                break
    return TOKENIZER.decode(found).strip()


def sharpened() -> VideoMa2mba:
    """A random model whose answers differ from question to question."""
    model = make_model().eval()
    with torch.no_grad():
        model.language.stem.weight.mul_(50)
    return model


@pytest.mark.parametrize("segment", [1, 7, 4096])
@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_those_of_the_whole_sequence(clip: Path, segment: int, stream: bool) -> None:
    model, media = sharpened(), Media(clip)
    prompts = [Prompt("What?"), Prompt("Who is it?", max_new_tokens=9), Prompt("What?", prefill="A "), Prompt("What?")]
    found = list(VideoAnswerer(model, TOKENIZER, segment=segment, stream=stream).answer(media, prompts))
    assert found == [greedy(model, media, prompt) for prompt in prompts]
    assert found[0] == found[3]
    assert len(set(found)) > 1


def test_a_video_is_read_once(clip: Path) -> None:
    told: list[tuple[int, int]] = []
    answerer = VideoAnswerer(sharpened(), TOKENIZER, segment=20, progress=lambda *each: told.append(each))
    list(answerer.answer(Media(clip), [Prompt("What?")] * 3))
    total = told[-1][1]
    assert told == [(min(done, total), total) for done in range(20, total + 20, 20)]


def test_a_limited_number_of_frames(clip: Path) -> None:
    told: list[tuple[int, int]] = []
    model = sharpened()
    answerer = VideoAnswerer(model, TOKENIZER, name="m", max_frames=2, progress=lambda *each: told.append(each))
    list(answerer.answer(Media(clip), [Prompt("What?")]))
    assert answerer.name == "m (2 frm)"
    expected = model.encoder(TOKENIZER).question([Turn("user", (Media(clip), "What?"))], [2])
    assert told == [(expected.frames_end, expected.frames_end)]


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    peaks: list[int] = []
    for seconds in (10, 100):
        path = write_clip(tmp_path / f"{seconds}.mp4", seconds)
        answerer = VideoAnswerer(make_model(), TOKENIZER, segment=30)
        with MemoryMeter("cpu") as meter:
            list(answerer.answer(Media(path), [Prompt("What?")]))
        peaks.append(meter.peak_bytes)
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3] * 2, True),
        ([1, 2, 3, 4], False),
        ([1, 2, 3, 9, 2, 3, 1], False),
        ([7, 7, 7, 7], True),
        ([1, 2, 3], False),
    ],
)
def test_repetition(tokens: list[int], expected: bool) -> None:
    assert repeats(tokens, 3) is expected


def test_a_repeating_answer_ends(clip: Path) -> None:
    """A head that always says "B" says it once: after the sixth, the last five stood there before."""
    model = make_model(make_config(tied=False)).eval()
    (letter,) = TOKENIZER.encode("B")

    def always(*_: object, **__: object) -> tuple[torch.Tensor, None]:
        return torch.eye(272)[letter].view(1, 1, -1), None

    model.language.forward = always
    (answer,) = VideoAnswerer(model, TOKENIZER).answer(Media(clip), [Prompt("What?", max_new_tokens=100)])
    assert answer == "B"
    (short,) = VideoAnswerer(model, TOKENIZER, repetition=50).answer(Media(clip), [Prompt("What?", max_new_tokens=7)])
    assert short == "B" * 7


def test_unusable_videos(tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        list(VideoAnswerer(make_model(), TOKENIZER).answer(Media(tmp_path / "none.mp4"), [Prompt("What?")]))


@pytest.mark.parametrize("limit", ["segment", "repetition", "max_frames"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_limits_that_make_no_sense(limit: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{limit}={value}: give a whole number, at least 1"):
        VideoAnswerer(make_model(), TOKENIZER, **{limit: value})


def test_devices() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device='{name}' cannot be used here .*give another, e.g. cpu"):
            usable_device(name)


def test_benchmark_from_the_command_line(tmp_path: Path) -> None:
    save_pretrained(make_model(dtype=torch.float32), tmp_path / "tiny", TOKENIZER)
    for video in ("001", "002"):
        write_clip(tmp_path / "videos" / f"yt{video}.mp4", 3)
    rows = write(
        tmp_path / "test.json", [mme(1, "001", "short", "A"), mme(2, "001", "short", "B"), mme(1, "002", "long", "C")]
    )
    arguments: dict[str, Any] = {
        "benchmark": "videomme",
        "annotations": rows,
        "videos": tmp_path / "videos",
        "model": tmp_path / "tiny",
        "out": tmp_path / "out",
        "dtype": "float32",
        "device": "cpu",
    }
    run([f"--{name}={value}" for name, value in arguments.items()])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["model"], result["questions"]) == (f"{tmp_path.name}/tiny", 3)
    assert f"| {tmp_path.name}/tiny |" in (tmp_path / "out" / "result.md").read_text()
    lines = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["001-1", "001-2", "002-1"]
