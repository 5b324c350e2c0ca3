"""Reading and writing model folders in the layout of `state-spaces/mamba2-*`."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from magc.errors import InputError, MissingExtraError
from magc.nn.config import Mamba2Config

_CONFIG = "config.json"
_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"


def load_config(folder: str | PathLike[str]) -> Mamba2Config:
    """Read `config.json` in `folder`.

    Raises:
        InputError: it is missing, no JSON object, or not of a pure Mamba-2 model.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a folder with {_CONFIG} and {_SAFETENSORS} or {_PICKLE}")
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); download or write it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(data).__name__}")
    try:
        return Mamba2Config.from_mamba_ssm(cast(dict[str, Any], data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_weights(
    folder: str | PathLike[str], expected: Mapping[str, torch.Size], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """Read the weights in `folder` into host memory.

    Args:
        folder: holds `model.safetensors`, which goes first, or `pytorch_model.bin`.
        expected: name and shape of every weight.
        tied: names that share another's weight. They may be absent from the file; if present they must be
            equal.

    Raises:
        InputError: no file, an unreadable one, or weights that are missing, unexpected or of another shape.
        MissingExtraError: the file needs safetensors, which is not installed.
    """
    path, weights = _read(Path(folder))
    for name, source in tied.items():
        if source in weights and not torch.equal(weights.setdefault(name, weights[source]), weights[source]):
            raise InputError(f"{path}: {name} differs from {source}, but the configuration ties them")
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InputError(f"{path} does not match {_CONFIG} beside it: {shown}")
    return weights


def save_model(folder: str | PathLike[str], config: Mamba2Config, weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `pytorch_model.bin`.

    Raises:
        InputError: the folder holds a `model.safetensors`, which readers would prefer to what is written.
    """
    path = Path(folder)
    if (path / _SAFETENSORS).exists():
        raise InputError(f"{path / _SAFETENSORS} exists and readers prefer it; save to another folder")
    path.mkdir(parents=True, exist_ok=True)
    (path / _CONFIG).write_text(json.dumps(config.to_mamba_ssm(), indent=2) + "\n", encoding="utf-8")
    torch.save(dict(weights), path / _PICKLE)


def _read(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = folder / _SAFETENSORS
    if path.is_file():
        try:
            safetensors: Any = importlib.import_module("safetensors.torch")
        except ImportError as error:
            raise MissingExtraError("safetensors", "transformers", f"reading {path}") from error
        return path, dict(safetensors.load_file(path))
    path = folder / _PICKLE
    if not path.is_file():
        raise InputError(f"{folder} holds neither {_SAFETENSORS} nor {_PICKLE}; download the weights first")
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a dict of tensors ({error})") from error
    if not isinstance(weights, dict):
        raise InputError(f"{path} must hold a dict of tensors, got {type(weights).__name__}")
    weights = cast(dict[str, Any], weights)
    if strange := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"{path} must hold a dict of tensors; {strange[0]!r} is a {type(weights[strange[0]]).__name__}"
        )
    return path, cast(dict[str, Tensor], weights)
