"""Small training runs: videos, annotations and a model to begin with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.examples.clips import write_clip
from tests.examples.tiny import make_model, make_tokenizer
from video_ma2mba.model.folder import load_pretrained, save_pretrained
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.training.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    RatesConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
)

SECONDS = (2, 3, 2, 1)
RATES = RatesConfig(language=1e-2, vision=1e-3, projector=1e-2)


def write_world(folder: Path, *, model: VideoMa2mba | None = None) -> Path:
    """A model in `base/`, and LLaVA annotations of four clips and two texts without any."""
    save_pretrained(model or make_model(), folder / "base", make_tokenizer())
    records: list[dict[str, Any]] = []
    for number, seconds in enumerate(SECONDS):
        write_clip(folder / "videos" / f"{number}.mp4", seconds)
        records.append(record(f"v{number}", f"How long is {number}?", f"{seconds} seconds.", video=f"{number}.mp4"))
    records += [record(f"t{number}", f"{number} and 1?", str(number + 1)) for number in range(2)]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def record(name: str, question: str, answer: str, **media: str) -> dict[str, Any]:
    """A LLaVA record."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **media, "conversations": turns}


def make_run(world: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run over the world; `data` changes are those of `DataConfig`."""
    data = DataConfig((SourceConfig("llava", world / "train.json", world / "videos"),))
    config = TrainConfig(
        out,
        StartConfig(folder=world / "base"),
        RATES,
        global_batch=4,
        data=replace(data, **changes.pop("data", {})),
        steps=5,
        precision="float64",
        checkpoints=CheckpointConfig(every=2),
        log=LogConfig(progress=False),
        device="cpu",
    )
    return replace(config, **changes)


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a model's folder."""
    return load_pretrained(folder).state_dict()


def lines(out: Path, event: str) -> list[dict[str, Any]]:
    """Of a run's log."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]
