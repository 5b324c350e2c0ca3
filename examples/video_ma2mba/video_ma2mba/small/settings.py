"""What one small run is, as frozen values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from video_ma2mba.small.dataset import Sizes
from video_ma2mba.training.config import RatesConfig

BASE = Path(__file__).parents[2] / "base"
"""The model that the small run begins with; `python -m video_ma2mba.small.base` makes it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the paper's three stages, at its tiny size.

    Attributes:
        name: as the paper has it.
        rates: learning rates by part; the paper's own are for models a thousand times larger.
        batch: sequences of a step.
        steps: how many.
    """

    name: str
    rates: RatesConfig
    batch: int
    steps: int


STAGES = (
    Stage("1", RatesConfig(projector=2e-3), 16, 200),
    Stage("1.5", RatesConfig(language=2e-4, vision=3e-5, projector=3e-4), 8, 24),
    Stage("2", RatesConfig(language=2e-4, vision=3e-5, projector=3e-4), 16, 40),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """A run, or one for each seed.

    Attributes:
        out: folder of all files.
        seeds: of videos, questions, the projector's first weights and the order of training.
        sizes: of the data.
        stages: what is trained.
        base: the model to begin with.
        max_frames: most frames of a video in training; None is one for every second.
        device: None is the GPU if there is one.
    """

    out: Path
    seeds: tuple[int, ...] = (0,)
    sizes: Sizes = field(default_factory=Sizes)
    stages: tuple[Stage, ...] = STAGES
    base: Path = BASE
    max_frames: int | None = None
    device: str | None = None

    def quick(self) -> Settings:
        """The same in a few seconds: every part runs, little is learnt."""
        sizes = Sizes(clips=8, stories=4, asked=1, held_out=2, lengths=(16, 32), longer=(48,))
        return replace(self, sizes=sizes, stages=tuple(replace(stage, batch=4, steps=3) for stage in self.stages))

    def to_json(self) -> dict[str, Any]:
        """For `result.json`."""
        values = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
