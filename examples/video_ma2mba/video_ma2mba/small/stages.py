"""The three stages of training on the small run's files, through the training loop of the full model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.model.folder import load_pretrained, save_pretrained
from video_ma2mba.model.stem import Projector
from video_ma2mba.small.dataset import Data
from video_ma2mba.small.settings import Settings, Stage
from video_ma2mba.training.config import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LogConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
)
from video_ma2mba.training.train import TrainResult, train

Progress = Callable[[int, str], None]
"""Told how many more steps were done, and news."""


def new_start(base: Path, folder: Path, seed: int) -> Path:
    """The base with a projector of random weights: what its language model sees of videos is noise yet.

    Args:
        base: the folder of the shipped model.
        folder: where the model goes.
        seed: of the projector.

    Returns:
        The model's folder.
    """
    model = load_pretrained(base)
    _forget(model.projector, torch.Generator().manual_seed(seed))
    save_pretrained(model, folder, BpeTokenizer.from_folder(base))
    return folder


@torch.no_grad()
def _forget(projector: Projector, generator: torch.Generator) -> None:
    """Random weights that keep the size of features and give outputs about as large as words, without any offset.

    With outputs a third of that, every third or so seed learns nothing in stage 1.
    """
    for layer, gain in zip((projector[0], projector[2]), (1.0, 0.6), strict=True):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)


def config_of(stage: Stage, settings: Settings, data: Data, start: Path, out: Path, seed: int) -> TrainConfig:
    """A stage as a run of `video_ma2mba.training`."""
    source = {
        "1": SourceConfig("llava", data.clips, data.videos),
        "1.5": SourceConfig("scenewalk_v2", data.scenes, data.videos),
        "2": SourceConfig("llava", data.instructions, data.videos),
    }[stage.name]
    return TrainConfig(
        out,
        StartConfig(folder=start, frame_chunk=1024),
        stage.rates,
        global_batch=stage.batch,
        data=DataConfig(
            (source,),
            max_frames=settings.max_frames,
            batch_size=stage.batch,
            cache="1GiB",
            workers=1,
            on_problem="stop",
        ),
        steps=stage.steps,
        checkpoints=CheckpointConfig(every=0, keep=1),
        log=LogConfig(progress=False),
        # Losses of what is learnt by heart are so near zero that a single mistake is many times their median.
        guard=GuardConfig(spike=None),
        device=settings.device,
        seed=seed,
    )


def run_stage(
    stage: Stage, settings: Settings, data: Data, start: Path, out: Path, seed: int, progress: Progress
) -> TrainResult:
    """Train a stage; the result's folder is where the next one starts."""
    config = config_of(stage, settings, data, start, out, seed)
    return train(config, on_step=lambda done, record: progress(1, f"loss {record['loss']:.3f}"))
