"""The model on magc's grid is the model: the same loss and gradients, wherever segments are cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import GridCheckpoint, Plan
from magc.meter import MemoryMeter
from tests.examples.tiny import make_config, make_model, make_tokenizer, talk
from video_ma2mba.data.batch import Batch, Example, collate
from video_ma2mba.data.chat import NO_FRAME, Tokens
from video_ma2mba.data.frames import HostFrames
from video_ma2mba.errors import ConfigError
from video_ma2mba.model.config import VideoMa2mbaConfig, VisionConfig
from video_ma2mba.model.model import Part, VideoMa2mba
from video_ma2mba.model.vision import VisionTower

VIDEO = Path("nothing opens it")
PLANS = [
    Plan(),
    Plan(tokens=1, layers=1),
    Plan(tokens=7),
    Plan(tokens=10, layers=1),
    Plan(tokens=23, layers=2, borders="rebuild", snapshots=0),
    Plan(tokens=31, keep="all"),
]


def pixels(frames: int, size: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size, size, 3), generator=generator, dtype=torch.uint8)


def examples(model: VideoMa2mba, *, second_row: bool) -> list[Example]:
    encoder = model.encoder(make_tokenizer())
    rows = [(talk("1", VIDEO, "Q?", "Yes.", "R?", "No."), 5)]
    if second_row:
        rows.append((talk("2", VIDEO, "Why?", "So."), 2))
    return [
        Example(sample.id, encoder.sample(sample, [count]), HostFrames(pixels(count, seed=count)))
        for sample, count in rows
    ]


def plain_loss(model: VideoMa2mba, batch: list[Example]) -> Tensor:
    """The loss written out with transformers' and torch's own operations, each row by itself."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in batch:
        tokens: Tokens = example.tokens
        x = model.language.stem(tokens.ids)
        vision = model.config.vision
        frames = example.frames.read(0, len(example.frames)).permute(0, 3, 1, 2).double() / 255
        mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (vision.mean, vision.std))
        found: Any = model.vision.model(pixel_values=(frames - mean) / std, output_hidden_states=True)
        hidden = found.hidden_states[vision.layer]
        hidden = hidden[:, 1:] if vision.kind == "clip" else hidden
        grid = hidden.transpose(1, 2).unflatten(2, (vision.side, vision.side))
        pooled = functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        seen = model.projector(pooled).flatten(0, 1)
        mask = tokens.frame != NO_FRAME
        x = x.masked_scatter(mask[:, None], seen)[None, :-1]
        for layer in model.layers:
            x, _ = layer(x, None)
        logits = model.head.logits(x)[0]
        total = total + functional.cross_entropy(logits, tokens.labels[1:], ignore_index=-100, reduction="sum")
        count += int((tokens.labels[1:] != -100).sum())
    return total / count


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert (got is None or not got.any()) if wanted is None else got is not None, name
        if wanted is not None:
            torch.testing.assert_close(
                got, wanted, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


def grid_loss(model: VideoMa2mba, batch: Batch, plan: Plan) -> Tensor:
    return GridCheckpoint(model.layers, plan).loss(batch.inputs, batch.targets, stem=model.stem, head=model.head)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("second_row", [False, True])
def test_exact_with_everything_trained(plan: Plan, second_row: bool) -> None:
    model = make_model()
    rows = examples(model, second_row=second_row)
    batch = collate(rows)
    expected = plain_loss(model, rows)
    loss = grid_loss(model, batch, plan)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    found = gradients(expected, model)
    assert all(found[name] is not None for name in found)
    assert_same(gradients(loss, model), found)


@pytest.mark.parametrize(("kind", "layer"), [("clip", -1), ("clip", -2), ("clip", -3), ("siglip", -2), ("siglip", -3)])
@pytest.mark.parametrize("tied", [True, False])
def test_exact_for_every_tower(kind: Any, layer: int, tied: bool) -> None:
    model = make_model(make_config(kind, layer=layer, tied=tied))
    rows = examples(model, second_row=True)
    loss = grid_loss(model, collate(rows), Plan(tokens=13, layers=2))
    assert_same(gradients(loss, model), gradients(plain_loss(model, rows), model))


def test_last_layer_of_siglip_is_normed() -> None:
    """There the last hidden state that transformers collects is the one before the norm."""
    tower = VisionTower(make_config("siglip", layer=-1).vision, dtype=torch.float64)
    x = (pixels(2).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    found: Any = tower.model(pixel_values=x)
    pooled = functional.avg_pool2d(found.last_hidden_state.transpose(1, 2).unflatten(2, (6, 6)), 2)
    torch.testing.assert_close(tower(pixels(2)), pooled.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("parts", [["projector"], ["projector", "language"], ["vision"], ["language"]])
def test_exact_with_parts_frozen(parts: list[Part]) -> None:
    model = make_model()
    model.train_only(parts)
    rows = examples(model, second_row=False)
    expected = gradients(plain_loss(model, rows), model)
    assert {name.split(".")[0] for name in expected} == set(parts)
    for plan in PLANS:
        assert_same(gradients(grid_loss(model, collate(rows), plan), model), expected)


def test_planned_by_budget() -> None:
    model = make_model(dtype=torch.float32)
    rows = examples(model, second_row=False)
    batch = collate(rows)
    grid = GridCheckpoint(model.layers, budget="64MiB")
    loss = grid.loss(batch.inputs, batch.targets, stem=model.stem, head=model.head)
    torch.testing.assert_close(loss, grid_loss(model, batch, Plan()))
    loss.backward()
    assert model.projector[0].weight.grad is not None


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_frame_chunks_change_nothing(chunk: int) -> None:
    model = make_model(frame_chunk=chunk)
    rows = examples(model, second_row=False)
    loss = grid_loss(model, collate(rows), Plan(tokens=40))
    assert_same(gradients(loss, model), gradients(plain_loss(model, rows), model))


def test_plain_forward_in_pieces() -> None:
    model = make_model()
    (row,) = examples(model, second_row=False)
    inputs = collate([row]).inputs
    with torch.no_grad():
        whole, _ = model(model.segment_of(inputs, 0, len(inputs)))
        state, parts = None, []
        for start in range(0, len(inputs), 11):
            logits, state = model(model.segment_of(inputs, start, min(start + 11, len(inputs))), state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_embeddings_of_a_whole_video_never_exist() -> None:
    """Ten times the video, the same memory (what grows with it, borders and states, is on disk here)."""
    peaks: list[int] = []
    for count in (12, 120):
        model = make_model()
        encoder = model.encoder(make_tokenizer())
        tokens = encoder.sample(talk("1", VIDEO, "Q?", "A."), [count])
        batch = collate([Example("1", tokens, HostFrames(pixels(count)))])
        loss_of = GridCheckpoint(model.layers, Plan(tokens=50, borders="disk", states="disk"))
        with MemoryMeter("cpu") as meter:
            loss_of.loss(batch.inputs, batch.targets, stem=model.stem, head=model.head).backward()
        peaks.append(meter.peak_bytes)
    assert peaks[1] < 1.2 * peaks[0]


def test_a_segment_keeps_inputs_of_layers_and_one_layers_activations_of_a_chunk() -> None:
    config = make_config()
    deep = replace(config, vision=VisionConfig.of("clip", {**config.vision.tower, "num_hidden_layers": 12}))
    frames = pixels(30)

    def peak(chunk: int, monkeypatch: pytest.MonkeyPatch | None = None) -> int:
        model = make_model(deep, frame_chunk=chunk)
        if monkeypatch is not None:
            monkeypatch.setattr(VisionTower, "_through", lambda tower, layer, hidden: layer(hidden, None))
        with MemoryMeter("cpu") as meter:
            model.stem.frames(frames).sum().backward()
        return meter.peak_bytes

    one, all_at_once = peak(1), peak(30)
    with pytest.MonkeyPatch.context() as patch:
        plain = peak(30, patch)
    assert one < 0.6 * all_at_once
    assert all_at_once < 0.3 * plain


def test_unused_parts_of_the_tower_stay_frozen() -> None:
    tower = VisionTower(make_config().vision)
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert not any("layers.2." in name or "post_layernorm" in name for name in trained)
    assert any("layers.1." in name for name in trained)
    tower.requires_grad_(False)
    assert not tower.trains


def test_pooling_of_an_odd_grid() -> None:
    """27 x 27 patches become 14 x 14, as in the authors' later code."""
    vision = VisionConfig.siglip_so400m_384()
    assert (vision.side, vision.tokens_per_frame, vision.transform.fit) == (27, 196, "stretch")
    tower = VisionTower(VisionConfig.of("siglip", {**make_config().vision.tower, "image_size": 10}))
    assert tower(pixels(2, size=10)).shape == (2, 9, 8)


@pytest.mark.parametrize(("size", "billions"), [("0.7B", 0.674), ("1.8B", 1.757), ("3.1B", 3.144)])
def test_published_sizes(size: str, billions: float) -> None:
    config = VideoMa2mbaConfig.named(size)
    assert config.vision.tokens_per_frame == 144
    with torch.device("meta"):
        model = VideoMa2mba.random(config, device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions


def test_wrong_parts() -> None:
    with pytest.raises(ConfigError, match="no part head"):
        make_model().train_only(["head"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="no model is named"):
        VideoMa2mbaConfig.named("7B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "vit"}, "choose one of clip, siglip"),
        ({"tower": {"image_size": 3}}, "lacks hidden_size"),
        ({"layer": 0}, "choose -1 to -24"),
        ({"pool": 0}, "at least 1"),
    ],
)
def test_wrong_towers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**change)


def test_mixed_precision() -> None:
    """Under autocast the grid and the plain model differ by what autocast itself costs."""
    model = make_model(dtype=torch.float32)
    (row,) = examples(model, second_row=False)
    batch = collate([row])
    exact = gradients(grid_loss(model, batch, Plan()), model)
    with torch.autocast("cpu", torch.bfloat16):
        whole = gradients(grid_loss(model, batch, Plan()), model)
        cut = gradients(grid_loss(model, batch, Plan(tokens=19, layers=1)), model)
    for name, wanted in exact.items():
        one, other = whole[name], cut[name]
        assert wanted is not None
        assert one is not None
        assert other is not None
        assert (other - wanted).norm() <= 2 * (one - wanted).norm() + 1e-2 * wanted.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cuda_with_frames_on_the_host(plan: Plan) -> None:
    on_host = make_model()
    rows = examples(on_host, second_row=True)
    expected = gradients(plain_loss(on_host, rows), on_host)
    model = make_model().cuda()
    loss = grid_loss(model, collate(rows), plan)
    assert loss.is_cuda
    found = gradients(loss, model)
    assert_same({name: None if grad is None else grad.cpu() for name, grad in found.items()}, expected)
