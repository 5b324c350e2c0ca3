"""What `bench_video.py` trains: a model's sizes, stage 2's configuration, and a made-up video with a question."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "examples" / "video_ma2mba"))  # the example is run from its own folder

from magc.bench.cases import TINY, config_of
from video_ma2mba.data.batch import Batch, Example, collate
from video_ma2mba.data.chat import ChatEncoder, Tokens
from video_ma2mba.data.frames import HostFrames
from video_ma2mba.data.records import Media, Sample, Turn
from video_ma2mba.model.config import VideoMa2mbaConfig, VisionConfig
from video_ma2mba.training.config import (
    DataConfig,
    MemoryConfig,
    OptimizerConfig,
    RatesConfig,
    ScheduleConfig,
    StartConfig,
    TrainConfig,
)

QUESTION, ANSWER = 64, 64
"""Tokens."""
_TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
}


def model_config(name: str) -> VideoMa2mbaConfig:
    """One of the paper's sizes, "0.7b", "1.8b" or "3.1b", or "tiny": 28 x 28 pixels, 4 tokens a frame, four layers.

    Raises:
        ConfigError: there is no such size.
    """
    if name == TINY:
        return VideoMa2mbaConfig(replace(config_of(TINY), tie_embeddings=False), VisionConfig.of("clip", _TINY_TOWER))
    return VideoMa2mbaConfig.named(name.upper())


def stage2(
    memory: MemoryConfig, *, frame_chunk: int = 32, multiple: int = 4096, device: str | None = None
) -> TrainConfig:
    """`configs/stage2.yaml` with one sequence a step, random weights and no data.

    Args:
        memory: how magc runs a step.
        frame_chunk: frames that go through the tower at once.
        multiple: of tokens, to which sequences are padded.
        device: where the model is.
    """
    return TrainConfig(
        out=Path("nowhere"),
        start=StartConfig(folder=Path("random-weights"), frame_chunk=frame_chunk),
        rates=RatesConfig(language=4e-5, vision=4e-6, projector=4e-5),
        global_batch=1,
        data=DataConfig(multiple=multiple),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.05, clip=1.0),
        schedule=ScheduleConfig(kind="cosine", warmup=0.1),
        memory=memory,
        parallel="zero1",
        precision="bfloat16",
        device=device,
    )


class RandomIds:
    """A tokenizer that draws an id for each character.

    Args:
        vocabulary: number of tokens; 0 ends turns and is not drawn.
    """

    end: int = 0

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self._drawn = vocabulary, random.Random(0)

    def encode(self, text: str) -> list[int]:
        """As many ids as there are characters."""
        return [self._drawn.randrange(1, self._vocabulary) for _ in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids))


def random_frames(count: int, size: int) -> Tensor:
    """`(count, size, size, 3)` uint8 on the host: a few random frames again and again, no two the same."""
    block = torch.randint(
        256, (min(count, 32), size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels = torch.empty((count, size, size, 3), dtype=torch.uint8)
    for offset, part in enumerate(pixels.split(len(block))):
        torch.add(block[: len(part)], offset % 256, out=part)  # bytes wrap around
    return pixels


def make_batch(config: VideoMa2mbaConfig, frames: int, multiple: int) -> tuple[Batch, Tokens]:
    """A video, a question about it and the answer, which alone is learnt, as the trainer's loader would give them.

    Args:
        config: of the model.
        frames: of the video.
        multiple: of tokens, to which the sequence is padded.

    Returns:
        The batch of one sequence, on the host, and the tokens of its input without padding.
    """
    turns = (Turn("user", (Media(Path("random")), "q" * QUESTION)), Turn("assistant", ("a" * ANSWER,)))
    encoder = ChatEncoder(RandomIds(config.language.vocab_size), config.vision.tokens_per_frame, config.chat)
    tokens = encoder.sample(Sample("random", turns), [frames])
    pixels = HostFrames(random_frames(frames, config.vision.image_size))
    return collate([Example("random", tokens, pixels)], multiple=multiple), tokens.split(len(tokens) - 1)[0]
