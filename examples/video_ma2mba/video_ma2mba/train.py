"""Training from the command line: `python -m video_ma2mba.train --help`, or under torchrun."""

from __future__ import annotations

import os
from typing import Any, cast

from jsonargparse import auto_cli

from video_ma2mba.command import errors_as_lines
from video_ma2mba.training.config import TrainConfig
from video_ma2mba.training.train import train


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """A run as the command line says, whose options may come from YAML files (`--config`)."""
    return cast(TrainConfig, auto_cli(_made, args=arguments, as_positional=False))


def run(arguments: list[str] | None = None) -> None:
    """Train as the command line says."""
    with errors_as_lines():
        result = train(parse(arguments))
    if os.environ.get("RANK", "0") == "0":
        print(f"{result.steps} steps done; the model is {result.folder}")


def _made(**options: Any) -> TrainConfig:
    """Train a stage, or go on with it from its last checkpoint."""
    # jsonargparse follows the options to the class, and takes its methods for commands when it is given the class.
    return TrainConfig(**options)


if __name__ == "__main__":
    run()
