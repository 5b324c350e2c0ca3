"""The small run's words: prompts, captions, and the tokenizer that is made for them."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from video_ma2mba.data.chat import BpeTokenizer, ChatSchema
from video_ma2mba.evaluation.choices import VideoMME
from video_ma2mba.small.questions import KINDS, Asked, ask, caption
from video_ma2mba.small.world import make_story

END = "<|endoftext|>"
SCHEMA = ChatSchema(between_frames="")
"""The authors' later form: frames one after the other, without a token between."""
DESCRIBE = "Describe the video."
LIST = "Name all shapes in order."
_VIDEO_MME = VideoMME(Path(), Path())


def prompt_of(asked: Asked) -> str:
    """A question as Video-MME puts it."""
    return _VIDEO_MME.prompt(asked.question, asked.lettered)


def train_tokenizer() -> BpeTokenizer:
    """Byte-level BPE, as GPT-NeoX's, in which each word of the small run is one token and any text can be written."""
    draw = random.Random(0)
    texts = [
        f"{SCHEMA.system_tag}{SCHEMA.system}",
        f"{SCHEMA.user_tag}{SCHEMA.assistant_tag}",
        DESCRIBE,
        LIST,
        "nothing",
    ]
    for _ in range(400):
        story = make_story(draw, 48, held_out=None)
        texts += [caption(event) for event in story.events]
        texts += [
            text for kind in KINDS if (asked := ask(draw, story, kind)) for text in (prompt_of(asked), asked.answer)
        ]
    tokenizer = Tokenizer(BPE())
    # Words have one token each, whether they begin a text or stand within it.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts * 2, trainer)
    return BpeTokenizer(tokenizer)
