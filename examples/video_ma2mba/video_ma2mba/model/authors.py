"""Checkpoints of the paper's authors, as far as their published code tells the layout.

The code is that of ReFoCUS (github.com/interlive-team/ReFoCUS), whose frame selector starts from such checkpoints: settings
of mamba-ssm and LLaVA side by side in `config.json`, weights under `backbone.`, `lm_head.` and `mm_model.`. It reads SigLIP
towers; that CLIP towers lie in the same place is LLaVA's custom. No checkpoint itself could be tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from magc.errors import InputError
from magc.nn import Mamba2Config, Mamba2LM
from magc.nn.operators import Impl
from video_ma2mba.data.chat import ChatSchema
from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.model.config import AUTHORS_MODEL_TYPES, VideoMa2mbaConfig, VisionConfig
from video_ma2mba.model.folder import finished, load_tower, read_json, tower_config
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.model.shards import StoredWeight, find_weights, read_weights
from video_ma2mba.model.stem import Projector
from video_ma2mba.model.vision import VisionTower

_TOWER = "mm_model.vision_tower."
_HEAD, _EMBEDDING = "language.lm_head.weight", "language.backbone.embedding.weight"

# Their prefix, ours. The innermost name of a tower is missing in files that transformers 5 wrote.
_PREFIXES = (
    ("backbone.", "language.backbone."),
    ("lm_head.", "language.lm_head."),
    ("mm_model.mm_projector.", "projector."),
    ("mm_model.vision_tower.vision_tower.vision_model.", "vision.model."),
    ("mm_model.vision_tower.vision_tower.", "vision.model."),
)
_PARTS = (
    ("language.", "the language model", "backbone.*, lm_head.*"),
    ("projector.", "the projector", "mm_model.mm_projector.*"),
    ("vision.", "the vision tower", "mm_model.vision_tower.*"),
)

_KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig.clip_l_336,
    "siglip-so400m-patch14-384": VisionConfig.siglip_so400m_384,
}

_LANGUAGE = (
    *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
    *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
)
# Setting, what its absence means, the one value that this model is.
_REQUIRED: tuple[tuple[str, object, object], ...] = (
    ("mm_projector_type", "linear", "mlp2x_gelu"),
    ("mm_patch_merge_type", "flat", "flat"),
    ("mm_spatial_pool_mode", "bilinear", "bilinear"),
    ("mm_spatial_pool_stride", 2, 2),
)
_READ = {"mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size", "hidden_size"}
# How the file was written, how training went, how many frames go through the tower at once.
_WITHOUT_EFFECT = {
    *("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("use_mm_proj", "vision_tower_pretrained", "unfreeze_mm_vision_tower", "mm_tunable_parts", "delay_load"),
    *("vision_encode_chunk_size", "use_cache"),
}


@dataclass(frozen=True)
class AuthorsFolder:
    """What a folder holds, checked against the model it makes; no weight has been read.

    Attributes:
        path: the folder.
        config: of the model.
        weights: where each of the model's weights lies, by this package's names.
        tower: folder that gives the vision tower's weights; None if the checkpoint itself holds them.
        idle: weights of the tower after the layer that is used, which the checkpoint does not hold: the authors cut
            these layers off. They become zeros, and never run.
        unread: settings of `config.json` that are not known, and had no effect.
    """

    path: Path
    config: VideoMa2mbaConfig
    weights: Mapping[str, StoredWeight]
    tower: Path | None
    idle: tuple[str, ...]
    unread: tuple[str, ...]


def load_authors(
    folder: str | PathLike[str],
    *,
    vision: str | PathLike[str] | None = None,
    chat: ChatSchema | None = None,
    fps: float = 1.0,
    frame_chunk: int = 32,
    impl: Impl = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> VideoMa2mba:
    """Load a checkpoint of the authors; `save_pretrained` makes it a folder of this package.

    Settings that are not known are named in a warning; whatever else does not fit is an error.

    Args:
        folder: see `inspect_authors`.
        vision: see `inspect_authors`.
        chat: see `inspect_authors`.
        fps: frames a second.
        frame_chunk: see `VideoMa2mba`.
        impl: of Mamba-2's operators.
        device: of the parameters.
        dtype: of the parameters; None is each weight's own.

    Raises:
        ConfigError, FormatError: as of `inspect_authors`, or a file cannot be read.
    """
    found = inspect_authors(folder, vision=vision, chat=chat, fps=fps)
    if found.unread:
        warnings.warn(
            f"{found.path / 'config.json'} has settings that are not known and had no effect: {', '.join(found.unread)}",
            stacklevel=2,
        )
    weights = read_weights(found.weights)
    fill = weights["projector.0.weight"].dtype
    if found.tower is not None:
        tower = load_tower(found.tower, found.config.vision.layer, fill)
    else:
        tower = VisionTower(found.config.vision, dtype=fill)  # not on the meta device: has buffers that no file holds
    with torch.device("meta"):
        language = Mamba2LM(found.config.language, impl=impl)
        projector = Projector(found.config.vision.width, found.config.language.d_model)
    model = VideoMa2mba(found.config, language, tower, projector, frame_chunk=frame_chunk)
    state = {**model.state_dict(), **weights}
    state |= {name: torch.zeros_like(state[name]) for name in found.idle}
    if found.config.language.tie_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return finished(model, device)


def inspect_authors(
    folder: str | PathLike[str],
    *,
    vision: str | PathLike[str] | None = None,
    chat: ChatSchema | None = None,
    fps: float = 1.0,
) -> AuthorsFolder:
    """Find out what a folder of the authors holds. Every weight in it is used or named in the error.

    A head with a weight of its own keeps it, whatever `tie_embeddings` says: the authors' class does not share them.

    Args:
        folder: holds `config.json`, and `model.safetensors` or its parts and their index.
        vision: folder of the vision tower, for its sizes, and for its weights if the checkpoint holds none of them. By
            default what `mm_vision_tower` says: a folder, or the name of one of the towers whose sizes are known.
        chat: the text around frames, questions and answers; the checkpoints do not hold it. By default the paper's.
        fps: frames a second.

    Raises:
        ConfigError: the configuration is not the authors', or of a model with other parts than this one.
        FormatError: a file is missing or unreadable; weights are unknown, missing or of another shape.
    """
    path = Path(folder)
    data = {name: value for name, value in read_json(path / "config.json").items() if value is not None}
    where = path / "config.json"
    language = _language(where, data)
    tower, vision_config = _vision(where, data, vision)
    for name, meant, needed in _REQUIRED:
        if (value := data.get(name, meant)) != needed:
            raise ConfigError(
                f"{where}: {name} is {value!r}; this model has {needed!r}, and nothing else can be loaded"
            )
    for name, expected in (("hidden_size", language.d_model), ("mm_hidden_size", vision_config.width)):
        if (value := data.get(name, expected)) != expected:
            raise ConfigError(f"{where}: {name} is {value!r}, but its parts are {expected} wide")
    stored = find_weights(path)
    if "lm_head.weight" in stored and "backbone.embedding.weight" in stored:
        language = replace(language, tie_embeddings=False)
    config = VideoMa2mbaConfig(language, vision_config, chat or ChatSchema(), fps)
    if any(name.startswith(_TOWER) for name in stored):
        tower = None
    weights, idle = _matched(path, stored, config, tower)
    known = {*_LANGUAGE, *(name for name, _, _ in _REQUIRED), *_READ, *_WITHOUT_EFFECT}
    return AuthorsFolder(path, config, weights, tower, idle, tuple(sorted(set(data) - known)))


def _language(where: Path, data: Mapping[str, Any]) -> Mamba2Config:
    kind = data.get("model_type")
    if kind == "refocus":
        raise ConfigError(f"{where}: model_type is 'refocus', a model that chooses frames and answers nothing")
    if kind not in AUTHORS_MODEL_TYPES:
        raise ConfigError(f"{where}: model_type is {kind!r}; the authors' are {' and '.join(AUTHORS_MODEL_TYPES)}")
    try:
        return Mamba2Config.from_mamba_ssm({name: data[name] for name in _LANGUAGE if name in data})
    except InputError as error:
        raise ConfigError(f"{where}: {error}") from error


def _vision(
    where: Path, data: Mapping[str, Any], given: str | PathLike[str] | None
) -> tuple[Path | None, VisionConfig]:
    """The folder of the vision tower, if there is one, and the tower's configuration."""
    named = data.get("mm_vision_tower")
    if not isinstance(named, str):
        raise ConfigError(f"{where}: mm_vision_tower is {named!r}; a model without a vision tower cannot be loaded")
    places = [Path(given)] if given is not None else [Path(named), where.parent / named]
    folder = next((place for place in places if place.is_dir()), None)
    if given is not None and folder is None:
        raise FormatError(f"vision={str(given)!r} is no folder; give that of {named}")
    known = _KNOWN_TOWERS.get(Path(named).name)
    if folder is not None:
        config = tower_config(folder, -2)
    elif known is not None:
        config = known()
    else:
        raise FormatError(f"{where}: mm_vision_tower is {named!r}, no folder here; give its folder with vision=")
    if config.kind == "siglip":
        return folder, config  # of SigLIP the authors' code takes the last layer but one, whatever the settings say
    if (feature := data.get("mm_vision_select_feature", "patch")) != "patch":
        raise ConfigError(f"{where}: mm_vision_select_feature is {feature!r}; this model has 'patch'")
    return folder, replace(config, layer=int(data.get("mm_vision_select_layer", -2)))


def _matched(
    path: Path, stored: Mapping[str, StoredWeight], config: VideoMa2mbaConfig, tower: Path | None
) -> tuple[dict[str, StoredWeight], tuple[str, ...]]:
    """The file's weights by this package's names, and the names of the tower's idle weights that nothing holds.

    Raises:
        FormatError: not all of them fit.
    """
    model = VideoMa2mba.random(config, device="meta")
    idle = {f"vision.{name}" for name, each in model.vision.named_parameters() if not each.requires_grad}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights: dict[str, StoredWeight] = {}
    problems: list[str] = []
    unknown: list[str] = []
    for theirs, weight in stored.items():
        ours = _renamed(theirs)
        if ours is None or ours not in expected:
            unknown.append(theirs)
        elif ours in weights:
            problems.append(f"{theirs} and {weights[ours].name} are the same weight")
        elif weight.shape != expected[ours]:
            problems.append(f"{theirs} has shape {tuple(weight.shape)}, expected {tuple(expected[ours])}")
            weights[ours] = weight
        else:
            weights[ours] = weight
    if config.language.tie_embeddings:
        # Of two names for one weight a file may hold either.
        for name, other in ((_HEAD, _EMBEDDING), (_EMBEDDING, _HEAD)):
            if other in weights:
                weights.setdefault(name, weights[other])
    idle = {name for name in idle if name not in weights} if tower is None else set()
    needed = [name for name in expected if name not in idle and (tower is None or not name.startswith("vision."))]
    lacking, hint = _lacking(needed, weights), ""
    if tower is None and not any(name.startswith("vision.") for name in weights):
        hint = "; a vision tower that the checkpoint does not hold can come from its own folder, vision="
    if problems := [*lacking, *_listed("unknown weights", unknown), *problems]:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise FormatError(f"{path} is not as the authors' published code has it: {'; '.join(problems[:8])}{more}{hint}")
    return weights, tuple(sorted(idle))


def _renamed(theirs: str) -> str | None:
    return next((ours + theirs.removeprefix(prefix) for prefix, ours in _PREFIXES if theirs.startswith(prefix)), None)


def _theirs(ours: str) -> str:
    return next(theirs + ours.removeprefix(prefix) for theirs, prefix in _PREFIXES if ours.startswith(prefix))


def _lacking(needed: list[str], weights: Mapping[str, StoredWeight]) -> list[str]:
    """Missing weights under their names; a part of which there is nothing, as a part."""
    found: list[str] = []
    for prefix, part, names in _PARTS:
        whole = [name for name in needed if name.startswith(prefix)]
        lost = [name for name in whole if name not in weights]
        if lost and lost == whole:
            found.append(f"missing {part} ({names})")
        else:
            found += _listed(f"missing of {part}", [_theirs(name) for name in lost])
    return found


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return [f"{what}: {', '.join(names[:6])}{more}"] if names else []
