"""Checkpoints: whole or not there, the last few kept, exact to go on from.

A checkpoint is a model's folder (`config.json`, `model.safetensors`, `tokenizer.json`), so it can be asked, evaluated and
trained on from; beside them lie `training.json` and one `rank-NNNN.pt` per process. All ranks write into one folder,
which must be the same for all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.training.config import TrainConfig
from video_ma2mba.training.ranks import Ranks

_META = "training.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    found = [path for path in (out / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def latest(out: Path) -> Path | None:
    """The last whole checkpoint, or None."""
    found = checkpoints(out)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """How many steps were done.

    Raises:
        FormatError: the folder is not named as a checkpoint's.
    """
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise FormatError(f"{checkpoint} is not a checkpoint's folder; those are named step-00000500 and so on")
    return int(match[1])


def save(
    config: TrainConfig,
    ranks: Ranks,
    step: int,
    state: Mapping[str, Any],
    write_model: Callable[[Path], None],
) -> Path:
    """Write a checkpoint and delete those that are too old; all ranks call it.

    Args:
        config: of the run.
        ranks: those that write.
        step: steps done.
        state: of this rank, tensors and plain values.
        write_model: writes the model into a folder; called on every rank, since its weights may be sharded.

    Returns:
        Its folder.
    """
    folder = config.out / "checkpoints" / f"step-{step:08d}"

    def write(partial: Path) -> None:
        write_model(partial)
        torch.save({**state, "random": random_state(ranks.device)}, partial / _rank_file(ranks.rank))
        if ranks.first:
            meta = {"format": _FORMAT, "step": step, "world": ranks.world, "config": config.identity()}
            (partial / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    write_whole(folder, ranks, write)
    if ranks.first:
        for old in checkpoints(config.out)[: -config.checkpoints.keep]:
            _remove(old)
    return folder


def load(config: TrainConfig, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """State of this rank: what `save` was given, and `random`.

    Raises:
        ConfigError: the checkpoint is of another run. FormatError: it is damaged.
    """
    meta = _meta(folder)
    identity = config.identity()
    before = dict(meta["config"])
    changed = {
        name: (before.get(name), identity.get(name))
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    }
    if changed:
        shown = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(
            f"{folder} is of another run: {shown}. Go on with the same settings, or give another out; start.folder={folder} "
            f"begins a new run with these weights"
        )
    if meta["world"] != ranks.world:
        raise ConfigError(
            f"{folder} was written by {meta['world']} ranks, this run has {ranks.world}; start as many processes, or begin "
            f"a new run with start.folder={folder} and another out"
        )
    return _torch_file(folder / _rank_file(ranks.rank))


def write_whole(folder: Path, ranks: Ranks, write: Callable[[Path], None]) -> None:
    """Let all ranks write into a folder, which takes the place of `folder` when all of it is on the disk."""
    partial = folder.with_name(f".{folder.name}.partial")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait()
    write(partial)
    ranks.wait()
    if ranks.first:
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _remove(folder)
        partial.rename(folder)
        _sync(folder.parent)
    ranks.wait()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators of the CPU and, if that is a GPU, of the device."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / _META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise FormatError(f"{path} has format {meta['format']}; this version reads {_FORMAT}")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} cannot be read ({error}); delete {folder} to go on from the one before") from error


def _torch_file(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = type(error).__name__  # its text tells how to load untrusted files
        raise FormatError(
            f"{path} cannot be read ({reason}); delete {path.parent} to go on from the one before"
        ) from error


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


def _remove(folder: Path) -> None:
    """Delete a folder; a kill in the middle leaves nothing that looks whole."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
