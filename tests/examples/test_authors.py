"""Folders in the layout of the authors' published code: loaded, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig

from tests.examples.tiny import make_config, make_model, make_tokenizer, talk
from video_ma2mba.data.batch import VideoTokens
from video_ma2mba.data.frames import HostFrames
from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.model.authors import inspect_authors, load_authors
from video_ma2mba.model.folder import load_pretrained, save_pretrained
from video_ma2mba.model.model import VideoMa2mba

PREFIXES = {
    "language.backbone.": "backbone.",
    "language.lm_head.": "lm_head.",
    "projector.": "mm_model.mm_projector.",
    "vision.model.": "mm_model.vision_tower.vision_tower.vision_model.",
}
TOWER = dict(make_config().vision.tower)
EMBEDDING, HEAD, PROJECTOR = "backbone.embedding.weight", "lm_head.weight", "mm_model.mm_projector.0.weight"
SETTINGS = {
    "model_type": "llava_mamba",
    "architectures": ["LlavaMambaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    "mm_spatial_pool_mode": "bilinear",
    "mm_hidden_size": 8,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
}


def their_weights(model: VideoMa2mba) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        old, new = next((old, new) for old, new in PREFIXES.items() if name.startswith(old))
        renamed[new + name.removeprefix(old)] = tensor.clone()
    return renamed


def write(
    folder: Path,
    model: VideoMa2mba,
    weights: Mapping[str, Tensor] | None = None,
    *,
    tower: str | None = None,
    **settings: Any,
) -> Path:
    """A checkpoint, and beside it the configuration of its tower."""
    folder.mkdir()
    (SiglipVisionConfig if model.config.vision.kind == "siglip" else CLIPVisionConfig)(**TOWER).save_pretrained(
        folder.parent / "vision"
    )
    named = str(folder.parent / "vision") if tower is None else tower
    data = {**model.config.language.to_mamba_ssm(), **SETTINGS, "mm_vision_tower": named, **settings}
    (folder / "config.json").write_text(json.dumps(data))
    save_file(dict(their_weights(model) if weights is None else weights), folder / "model.safetensors")
    return folder


def logits(model: VideoMa2mba) -> Tensor:
    """Of a question about two frames."""
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    tokens = model.encoder(make_tokenizer()).question(talk("1", Path("v"), "What?").turns, [2])
    with torch.no_grad():
        return model(VideoTokens([tokens], [HostFrames(pixels)]).segment(0, len(tokens)))[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_are_those_of_the_own_format(tmp_path: Path, kind: Any, tied: bool) -> None:
    model = make_model(make_config(kind, tied=tied)).eval()
    weights = their_weights(model)
    if tied:
        del weights[HEAD]
    if kind == "siglip":  # the authors cut off the last layer and the pooling head
        weights = {name: each for name, each in weights.items() if ".layers.2." not in name or "vision" not in name}
        weights = {name: each for name, each in weights.items() if ".vision_model.head." not in name}
    folder = write(tmp_path / "theirs", model, weights)
    found = inspect_authors(folder)
    assert {each.name for each in found.weights.values()} == weights.keys()
    assert (len(found.idle) > 0) == (kind == "siglip")
    assert all(".layers.2." in name or ".head." in name for name in found.idle)
    assert (found.tower, found.unread) == (None, ())
    again = load_authors(folder)
    assert again.config.language == model.config.language
    assert (again.language.lm_head.weight is again.language.stem.weight) == tied
    assert not again.training
    save_pretrained(model, tmp_path / "own")
    assert torch.equal(logits(again), logits(load_pretrained(tmp_path / "own")))
    save_pretrained(again, tmp_path / "converted")
    assert torch.equal(logits(load_pretrained(tmp_path / "converted")), logits(model))


def test_in_parts_and_in_another_type(tmp_path: Path) -> None:
    model = make_model().eval()
    folder = write(tmp_path / "theirs", model)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name, place in places.items() if place == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert torch.equal(logits(load_authors(folder)), logits(model))
    assert {each.dtype for each in load_authors(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}

    index.write_text(json.dumps({"weight_map": {name: each for name, each in places.items() if name != PROJECTOR}}))
    with pytest.raises(FormatError, match=rf"differ in 1 weights, {PROJECTOR} first"):
        inspect_authors(folder)
    index.write_text(json.dumps({"weight_map": {**places, "more": "../other.safetensors"}}))
    with pytest.raises(FormatError, match="must lie in the same folder"):
        inspect_authors(folder)
    index.write_text(json.dumps({"weight_map": {**places, "more": "gone.safetensors"}}))
    with pytest.raises(FormatError, match=r"gone\.safetensors does not exist"):
        inspect_authors(folder)
    index.write_text("{}")
    with pytest.raises(FormatError, match="weight_map"):
        inspect_authors(folder)
    index.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is not read: save it as safetensors"):
        inspect_authors(folder)


def test_a_head_in_the_file_is_a_head_of_its_own(tmp_path: Path) -> None:
    """The published sizes need one, and the authors' class shares nothing, whatever the configuration says."""
    model = make_model(make_config(tied=False)).eval()
    again = load_authors(write(tmp_path / "theirs", model, tie_embeddings=True))
    assert not again.config.language.tie_embeddings
    assert torch.equal(logits(again), logits(model))


def test_the_tower_from_its_own_folder(tmp_path: Path) -> None:
    model = make_model().eval()
    weights = {name: each for name, each in their_weights(model).items() if "vision_tower" not in name}
    folder = write(tmp_path / "theirs", model, weights, tower="openai/clip-vit-large-patch14-336")
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).to(torch.float64)
    tower.load_state_dict(model.vision.model.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    found = inspect_authors(folder, vision=tmp_path / "tower")
    assert (found.tower, found.idle) == (tmp_path / "tower", ())
    assert torch.equal(logits(load_authors(folder, vision=tmp_path / "tower")), logits(model))


def test_towers_whose_sizes_are_known(tmp_path: Path) -> None:
    """The name alone gives sizes, not weights: the tiny tower does not fit, shapes are compared before anything is read."""
    folder = write(tmp_path / "theirs", make_model(), tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024)
    with pytest.raises(
        FormatError, match=r"patch_embedding\.weight has shape \(8, 3, 2, 2\), expected \(1024, 3, 14, 14\)"
    ):
        inspect_authors(folder)
    weights = {name: each for name, each in their_weights(make_model()).items() if "vision_tower" not in name}
    folder = write(tmp_path / "without", make_model(), weights, tower="siglip-so400m-patch14-384", mm_hidden_size=1152)
    with pytest.raises(FormatError, match=r"missing the vision tower \(mm_model\.vision_tower\.\*\).*vision="):
        inspect_authors(folder)
    folder = write(tmp_path / "other", make_model(), tower="some/tower")
    with pytest.raises(FormatError, match=r"'some/tower', no folder here; give its folder with vision="):
        inspect_authors(folder)
    with pytest.raises(FormatError, match="is no folder; give that of some/tower"):
        inspect_authors(folder, vision=tmp_path / "none")


def without(weights: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {name: each for name, each in weights.items() if not name.startswith(starts)}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_model()
    whole = their_weights(model)
    used = "mm_model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
    for number, (weights, message) in enumerate(
        (
            ({**whole, "mm_model.image_newline": torch.ones(8)}, r"unknown weights: mm_model\.image_newline$"),
            (
                {**whole, "backbone.layers.9.norm.weight": torch.ones(8)},
                r"unknown weights: backbone\.layers\.9\.norm\.w",
            ),
            (without(whole, "mm_model.mm_projector."), r"missing the projector \(mm_model\.mm_projector\.\*\)$"),
            (without(whole, "backbone.", "lm_head."), r"missing the language model \(backbone\.\*, lm_head\.\*\)$"),
            (
                without(whole, "mm_model.mm_projector.2.bias"),
                r"missing of the projector: mm_model\.mm_projector\.2\.bias",
            ),
            (without(whole, used), rf"missing of the vision tower: {used}$"),
            ({**whole, PROJECTOR: torch.ones(8, 9)}, rf"{PROJECTOR} has shape \(8, 9\), expected \(8, 8\)"),
            (
                {**whole, used.replace("vision_model.", ""): whole[used].clone()},
                r"fc1\.bias and .*fc1\.bias are the same weight",
            ),
            ({f"model.{name}": each for name, each in whole.items()}, r"unknown weights: .* and \d+ more"),
        )
    ):
        folder = write(tmp_path / str(number), model, weights)
        with pytest.raises(FormatError, match=message):
            load_authors(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "refocus"}, "chooses frames and answers nothing"),
        ({"model_type": "llava"}, "model_type is 'llava'; the authors' are llava_mamba and mamba2"),
        ({"d_model": None}, "lacks d_model"),
        ({"ssm_cfg": {}}, "'Mamba1' are not supported"),
        ({"mm_vision_tower": None}, "mm_vision_tower is None"),
        ({"mm_projector_type": None}, "mm_projector_type is 'linear'; this model has 'mlp2x_gelu'"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode is 'max'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but its parts are 8 wide"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_vision_select_layer": -9}, "vision.layer=-9"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inspect_authors(write(tmp_path / "theirs", make_model(), **settings))


def test_settings_that_are_not_known_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", make_model(), mm_newline_position="grid", add_faster_video=False)
    with pytest.warns(UserWarning, match="had no effect: add_faster_video, mm_newline_position$"):
        load_authors(folder)


def test_the_layer_that_the_settings_say(tmp_path: Path) -> None:
    model = make_model(make_config(layer=-3)).eval()
    again = load_authors(write(tmp_path / "theirs", model, mm_vision_select_layer=-3, model_type="mamba2"))
    assert again.config.vision.layer == -3
    assert torch.equal(logits(again), logits(model))


def test_the_own_loader_points_to_this_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", make_model())
    with pytest.raises(ConfigError, match=r"got 'llava_mamba'; load the authors' checkpoints with .*load_authors"):
        load_pretrained(folder)
