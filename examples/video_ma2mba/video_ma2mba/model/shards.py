"""Weights of a folder in safetensors, in one file or several: found with their shapes, read later."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from video_ma2mba.errors import FormatError

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies.

    Attributes:
        path: the file.
        name: its name in the file.
        shape: its shape.
    """

    path: Path
    name: str
    shape: torch.Size


def find_weights(folder: Path) -> dict[str, StoredWeight]:
    """Names, places and shapes of all weights in a folder; none is read.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.

    Raises:
        FormatError: no such file, an unreadable one, or an index that its files contradict.
    """
    if (folder / _ONE).is_file():
        return _found(folder / _ONE)
    if not (folder / _INDEX).is_file():
        pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        hint = f"; {pickled} is not read: save it as safetensors" if pickled else "; the folder is not a whole model"
        raise FormatError(f"{folder} holds neither {_ONE} nor {_INDEX}{hint}")
    places = _index(folder / _INDEX)
    found: dict[str, StoredWeight] = {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            raise FormatError(f"{folder / file} does not exist, but {_INDEX} beside it names it; copy it there")
        held = _found(folder / file)
        stated = {name for name, place in places.items() if place == file}
        if different := sorted(stated ^ held.keys()):
            raise FormatError(
                f"{folder / file} and {_INDEX} beside it differ in {len(different)} weights, {different[0]} first; "
                "they are not of the same model"
            )
        found.update(held)
    return found


def read_weights(weights: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """Read weights into host memory, file by file.

    Args:
        weights: by the names that the result is to have.

    Raises:
        FormatError: a file cannot be read.
    """
    by_file: defaultdict[Path, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        by_file[weight.path].append(name)
    read: dict[str, Tensor] = {}
    for path, names in by_file.items():
        try:
            with _open(path) as file:
                read.update({name: file.get_tensor(weights[name].name) for name in names})
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error})") from error
    return read


def _found(path: Path) -> dict[str, StoredWeight]:
    try:
        with _open(path) as file:
            return {
                name: StoredWeight(path, name, torch.Size(file.get_slice(name).get_shape()))
                for name in list(file.keys())
            }
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error})") from error


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _index(path: Path) -> Mapping[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON ({error})") from error
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise FormatError(f'{path} must hold an object whose "weight_map" says in which file each weight is')
    # A name with folders in it could leave the folder.
    if strange := [file for file in places.values() if Path(file).name != file]:
        raise FormatError(f"{path} names {strange[0]!r}; weights must lie in the same folder")
    return places
