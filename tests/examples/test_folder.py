"""Model folders: written, read, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from magc.nn import Mamba2LM
from tests.examples.tiny import make_config, make_model, make_tokenizer
from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.model.config import VideoMa2mbaConfig
from video_ma2mba.model.folder import load_parts, load_pretrained, save_pretrained

PIXELS = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
TOWER = dict(make_config().vision.tower)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_own_folder(tmp_path: Path, tied: bool, kind: Any) -> None:
    model, tokenizer = make_model(make_config(kind, tied=tied)), make_tokenizer()
    save_pretrained(model, tmp_path, tokenizer)
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_weights(again, model)
    torch.testing.assert_close(again.stem.frames(PIXELS), model.stem.frames(PIXELS), rtol=0, atol=1e-14)
    assert (again.language.lm_head.weight is again.language.stem.weight) == tied
    assert BpeTokenizer.from_folder(tmp_path).encode("abc") == tokenizer.encode("abc")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_own_folder_in_another_type(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert not again.training
    assert {id(p) for p in again.parameters() if getattr(p, "_no_weight_decay", False)}


def test_configurations_survive_json() -> None:
    for config in (VideoMa2mbaConfig.named("3.1B"), make_config("siglip", tied=False)):
        assert VideoMa2mbaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def save_vision(kind: str, folder: Path) -> nn.Module:
    torch.manual_seed(1)
    if kind == "clip":
        model: Any = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER))
    else:
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 10}, vision_config=TOWER))
    model.save_pretrained(folder)
    return model.vision_model if kind == "both halves" else model


@pytest.mark.parametrize("kind", ["clip", "siglip", "both halves"])
@pytest.mark.parametrize("untie", [True, False])
def test_from_published_parts(tmp_path: Path, kind: str, untie: bool) -> None:
    vision = save_vision(kind, tmp_path / "vision")
    torch.manual_seed(2)
    language = Mamba2LM(make_config().language)
    language.save_pretrained(tmp_path / "language")
    model = load_parts(tmp_path / "vision", tmp_path / "language", untie=untie)
    assert model.config.vision.kind == ("siglip" if kind == "siglip" else "clip")
    assert_same_weights(model.vision.model, vision)
    assert_same_weights(model.language, language)
    assert model.config.language.tie_embeddings is not untie
    assert (model.language.lm_head.weight is model.language.stem.weight) is not untie
    assert model.stem.frames(PIXELS).shape == (3, 9, 8)
    save_pretrained(model, tmp_path / "own")
    assert_same_weights(load_pretrained(tmp_path / "own"), model)


def test_pixels_as_the_image_processor_says(tmp_path: Path) -> None:
    save_vision("clip", tmp_path / "vision")
    Mamba2LM(make_config().language).save_pretrained(tmp_path / "language")
    data = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(data))
    vision = load_parts(tmp_path / "vision", tmp_path / "language").config.vision
    assert (vision.mean, vision.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path)
    save_pretrained(make_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "projector.0.bias"
    for change, message in (
        ({}, f"missing {name}"),
        ({name: weights[name], "strange": torch.ones(1)}, "unexpected strange"),
        ({name: weights[name][:3].clone()}, r"has shape \(3,\), expected \(8,\)"),
    ):
        kept = {key: value for key, value in weights.items() if key != name}
        save_file({**kept, **change}, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match=message):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(FormatError, match="cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="not a whole model"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type must be"),
        ({"vision": None}, "incomplete or wrong"),
        ({"chat": {"colour": "red"}}, "ChatSchema has no colour"),
        ({"language": {"d_model": 8}}, "lacks n_layer"),
    ],
)
def test_wrong_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoMa2mbaConfig.from_json({**make_config().to_json(), **change})


def test_vision_folder_of_another_kind(tmp_path: Path) -> None:
    Mamba2LM(make_config().language).save_pretrained(tmp_path / "language")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(FormatError, match="neither CLIP's nor SigLIP's"):
        load_parts(tmp_path, tmp_path / "language")
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(FormatError, match="cannot be loaded as a CLIPVisionModel"):
        load_parts(tmp_path, tmp_path / "language")
