"""Model folders: a vision tower's and a language model's as they are published, and this package's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from magc.nn import Mamba2LM
from magc.nn.operators import Impl
from video_ma2mba.data.chat import BpeTokenizer, ChatSchema
from video_ma2mba.errors import FormatError
from video_ma2mba.model.config import VideoMa2mbaConfig, VisionConfig, VisionKind
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.model.stem import Projector
from video_ma2mba.model.vision import VisionTower

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
MODEL_FILES = (_CONFIG, _WEIGHTS, "tokenizer.json")
"""What decides a model's answers."""
_TIED = ("language.lm_head.weight", "language.backbone.embedding.weight")


def save_pretrained(
    model: VideoMa2mba,
    folder: str | PathLike[str],
    tokenizer: BpeTokenizer | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and, if given, `tokenizer.json`.

    The weights are written beside their place and then moved to it: a folder holds whole files or none.

    Args:
        model: its configuration and, by default, its weights are written.
        folder: made if it is not there.
        tokenizer: the model's.
        weights: the state dict of a model whose weights are elsewhere (sharded over ranks).
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if model.config.language.tie_embeddings:
        del weights[_TIED[0]]
    partial = path / f"{_WEIGHTS}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(path / _WEIGHTS)
    (path / _CONFIG).write_text(json.dumps(model.config.to_json(), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(path)


def load_pretrained(
    folder: str | PathLike[str],
    *,
    frame_chunk: int = 32,
    impl: Impl = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> VideoMa2mba:
    """Load what `save_pretrained` wrote; the tokenizer is `BpeTokenizer.from_folder(folder)`.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        frame_chunk: see `VideoMa2mba`.
        impl: of Mamba-2's operators.
        device: of the parameters.
        dtype: of the parameters; None is each weight's own.

    Raises:
        FormatError: a file is missing or unreadable, or the weights do not fit the configuration.
        ConfigError: the configuration is of another kind of model, or wrong.
    """
    path = Path(folder)
    config = VideoMa2mbaConfig.from_json(read_json(path / _CONFIG))
    weights = _weights(path / _WEIGHTS)
    if config.language.tie_embeddings and _TIED[1] in weights:
        weights[_TIED[0]] = weights[_TIED[1]]
    # On the meta device nothing is drawn at random for the weights to be overwritten at once.
    with torch.device("meta"):
        language = Mamba2LM(config.language, impl=impl)
        projector = Projector(config.vision.width, config.language.d_model)
    vision = VisionTower(config.vision)  # has buffers that no file holds
    model = VideoMa2mba(config, language, vision, projector, frame_chunk=frame_chunk)
    _check_weights(path, weights, {name: tensor.shape for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in weights.items()}, assign=True)
    return finished(model, device)


def load_parts(
    vision: str | PathLike[str],
    language: str | PathLike[str],
    *,
    untie: bool = False,
    layer: int = -2,
    chat: ChatSchema | None = None,
    fps: float = 1.0,
    frame_chunk: int = 32,
    impl: Impl = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoMa2mba:
    """A model to begin training with: a vision tower, a language model, and a random projector.

    Args:
        vision: folder of a CLIP or SigLIP model, or of its vision half alone, in transformers' layout.
        language: folder of a Mamba-2 model in the layout of `state-spaces/mamba2-*`.
        untie: give the head a weight of its own, at first a copy of the embedding's.
        layer: whose features are used.
        chat: the text around frames, questions and answers.
        fps: frames a second.
        frame_chunk: see `VideoMa2mba`.
        impl: of Mamba-2's operators.
        device: of all parameters.
        dtype: of all parameters.

    Raises:
        FormatError: a folder is not in its layout. magc.errors.InputError: the language model's is not.
    """
    model = Mamba2LM.from_pretrained(language, impl=impl, dtype=dtype)
    if untie and model.config.tie_embeddings:
        model.config = replace(model.config, tie_embeddings=False)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    tower = load_tower(Path(vision), layer, dtype)
    config = VideoMa2mbaConfig(model.config, tower.config, chat or ChatSchema(), fps)
    projector = Projector(tower.config.width, model.config.d_model, dtype=dtype)
    return finished(VideoMa2mba(config, model, tower, projector, frame_chunk=frame_chunk), device)


def finished(model: VideoMa2mba, device: torch.device | str) -> VideoMa2mba:
    """A model whose weights have just been put in place: on its device, tied, marked and ready to answer."""
    model.to(device)
    model.language.tie_weights()
    for layer in model.layers:
        layer.mixer.mark_no_weight_decay()
    return model.eval()


def tower_config(folder: Path, layer: int) -> VisionConfig:
    """The configuration of the vision tower in a folder of CLIP or SigLIP, or of its vision half alone.

    Args:
        folder: holds `config.json`, and `preprocessor_config.json` for the pixels' mean and deviation if it is there.
        layer: whose features are used.

    Raises:
        FormatError: it is of another kind of model, or cannot be read.
    """
    family = str(read_json(folder / _CONFIG).get("model_type", ""))
    kinds: dict[str, VisionKind] = {"clip": "clip", "siglip": "siglip"}
    kind = kinds.get(family.removesuffix("_vision_model"))
    if kind is None:
        raise FormatError(f"{folder / _CONFIG}: model_type {family!r} is neither CLIP's nor SigLIP's")
    source = SiglipVisionConfig if kind == "siglip" else CLIPVisionConfig
    try:
        loaded = source.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{folder / _CONFIG} cannot be read as a {source.__name__} ({error})") from error
    config = replace(VisionConfig.of(kind, _tower_fields(loaded)), layer=layer)
    return _with_pixels_of(folder, config)


def load_tower(folder: Path, layer: int, dtype: torch.dtype) -> VisionTower:
    """The vision tower in a folder of CLIP or SigLIP, or of its vision half alone.

    Args:
        folder: in transformers' layout.
        layer: whose features are used.
        dtype: of the parameters.

    Raises:
        FormatError: it is of another kind of model, or cannot be read.
    """
    config = tower_config(folder, layer)
    source = SiglipVisionModel if config.kind == "siglip" else CLIPVisionModel
    try:
        loaded = cast(Any, source.from_pretrained(folder, local_files_only=True, dtype=dtype))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"{folder} cannot be loaded as a {source.__name__} ({error})") from error
    tower = VisionTower(config, dtype=dtype)
    tower.model.load_state_dict(loaded.state_dict())
    return tower


def _tower_fields(config: Any) -> dict[str, Any]:
    """The numbers and names that make a tower, without transformers' own bookkeeping."""
    names = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
        *("num_channels", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim", "vision_use_head"),
    )
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _with_pixels_of(folder: Path, config: VisionConfig) -> VisionConfig:
    """The mean and deviation that the folder's image processor states, if it has one."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return config
    data = read_json(path)
    found = {
        ours: tuple(float(value) for value in data[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if theirs in data
    }
    return replace(config, **found)


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
        FormatError: it is missing or holds no object.
    """
    if not path.is_file():
        raise FormatError(f"{path} does not exist; give a model's folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold an object, got a {type(data).__name__}")
    return data


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist; the folder is not a whole model")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read ({error})") from error


def _check_weights(folder: Path, weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise FormatError(f"{folder / _WEIGHTS} does not match {_CONFIG} beside it: {'; '.join(problems[:6])}{more}")
