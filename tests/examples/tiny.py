"""A tokenizer, samples and models small enough for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from magc.nn import Mamba2Config
from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.data.records import Media, Sample, Turn
from video_ma2mba.model.config import VideoMa2mbaConfig, VisionConfig, VisionKind
from video_ma2mba.model.model import VideoMa2mba


def make_tokenizer() -> BpeTokenizer:
    """Bytes, with `<|endoftext|>` as token 0."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index + 1 for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    # An added token takes the next free id; as part of the vocabulary it keeps its own.
    vocabulary = {"<|endoftext|>": 0, **{symbol: index + 1 for index, symbol in enumerate(alphabet)}}
    tokenizer.model = BPE(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return BpeTokenizer(tokenizer)


def talk(name: str, *parts: Path | str) -> Sample:
    """A sample from its turns' texts; a path comes before the next text."""
    turns: list[Turn] = []
    media: list[Media | str] = []
    for part in parts:
        if isinstance(part, Path):
            media.append(Media(part))
        else:
            turns.append(Turn(("user", "assistant")[len(turns) % 2], (*media, part)))
            media = []
    return Sample(name, tuple(turns))


def make_config(kind: VisionKind = "clip", *, layer: int = -2, tied: bool = True) -> VideoMa2mbaConfig:
    """Frames of 12 x 12 pixels, 6 x 6 patches, 3 x 3 tokens; three layers of Mamba-2."""
    tower = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 2,
    }
    language = Mamba2Config(
        d_model=8, n_layer=3, vocab_size=257, d_state=4, headdim=4, chunk_size=8, tie_embeddings=tied
    )
    return VideoMa2mbaConfig(language, replace(VisionConfig.of(kind, tower), layer=layer))


def make_model(
    config: VideoMa2mbaConfig | None = None, *, frame_chunk: int = 2, dtype: torch.dtype = torch.float64
) -> VideoMa2mba:
    """A random model in float64."""
    torch.manual_seed(0)
    return VideoMa2mba.random(make_config() if config is None else config, frame_chunk=frame_chunk, dtype=dtype)
