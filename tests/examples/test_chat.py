"""The chat schema: the text a sequence stands for, what is learnt, and where frames go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tests.examples.tiny import make_tokenizer, talk
from video_ma2mba.data.chat import IGNORED, NO_FRAME, BpeTokenizer, ChatEncoder, ChatSchema, Tokens
from video_ma2mba.data.records import Media, Sample, Turn
from video_ma2mba.errors import ConfigError, FormatError

PATCHES = 3
VIDEO = Path("v.mp4")
SYSTEM = "<|system|>You are a helpful assistant.<END>"


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(make_tokenizer(), PATCHES)


def shown(encoder: ChatEncoder, tokens: Tokens, *, learnt: bool = False) -> str:
    """The sequence as text: `<END>` for the end token, `[n]` for a whole frame."""
    text = ""
    pending: list[int] = []

    def flush() -> None:
        nonlocal text
        text += encoder.tokenizer.decode(pending)
        pending.clear()

    for id_, label, frame, patch in zip(*(each.tolist() for each in _columns(tokens)), strict=True):
        assert label in (IGNORED, id_)
        if learnt and label == IGNORED:
            continue
        if frame != NO_FRAME:
            flush()
            text += f"[{frame}]" if patch == PATCHES - 1 else ""
        elif id_ == encoder.tokenizer.end:
            flush()
            text += "<END>"
        else:
            pending.append(id_)
    flush()
    return text


def _columns(tokens: Tokens) -> tuple[object, ...]:
    return tokens.ids, tokens.labels, tokens.frame, tokens.patch


def test_conversation_about_a_video(encoder: ChatEncoder) -> None:
    tokens = encoder.sample(talk("1", VIDEO, "What?", "A cat.", "Where?", "Here."), [2])
    assert shown(encoder, tokens) == (
        f"{SYSTEM}<|user|>\n[0]\n[1]\nWhat?<END><|assistant|>A cat.<END><|user|>Where?<END><|assistant|>Here.<END>"
    )
    assert shown(encoder, tokens, learnt=True) == "A cat.<END>Here.<END>"


def test_frames_flat(encoder: ChatEncoder) -> None:
    flat = replace(encoder, schema=ChatSchema(before_frames="", between_frames=""))
    tokens = flat.sample(talk("1", VIDEO, "What?", "A cat."), [2])
    assert shown(encoder, tokens) == f"{SYSTEM}<|user|>[0][1]\nWhat?<END><|assistant|>A cat.<END>"


def test_text_alone(encoder: ChatEncoder) -> None:
    assert shown(encoder, encoder.sample(talk("1", "Hi", "Ho"), [])) == (f"{SYSTEM}<|user|>Hi<END><|assistant|>Ho<END>")


def test_several_media_are_numbered_on(encoder: ChatEncoder) -> None:
    tokens = encoder.sample(talk("1", VIDEO, VIDEO, "Same?", "No.", VIDEO, "Now?", "Yes."), [1, 2, 1])
    assert "<|user|>\n[0]\n\n[1]\n[2]\nSame?<END>" in shown(encoder, tokens)
    assert "<|user|>\n[3]\nNow?<END>" in shown(encoder, tokens)


def test_patches_are_counted_in_every_frame(encoder: ChatEncoder) -> None:
    tokens = encoder.sample(talk("1", VIDEO, "What?", "A cat."), [2])
    for frame in (0, 1):
        assert tokens.patch[tokens.frame == frame].tolist() == [0, 1, 2]
    assert (tokens.patch[tokens.frame == NO_FRAME] == 0).all()


def test_interleaved_clips_and_captions(encoder: ChatEncoder) -> None:
    turns = (
        Turn("user", (Media(VIDEO, 0, 2), "Describe.")),
        Turn("assistant", ("A dog.",)),
        Turn("user", (Media(VIDEO, 2, 3),)),
        Turn("assistant", ("It runs.",)),
    )
    tokens = encoder.sample(Sample("1", turns, "interleaved"), [2, 1])
    assert shown(encoder, tokens) == "[0]\n[1]\nA dog.<END>[2]\nIt runs.<END>"
    assert shown(encoder, tokens, learnt=True) == "A dog.<END>It runs.<END>"


def test_a_question_is_how_its_sample_begins(encoder: ChatEncoder) -> None:
    sample = talk("1", VIDEO, "What?", "A cat.")
    whole = encoder.sample(sample, [2])
    question = encoder.question(sample.turns[:1], [2])
    begun, _ = whole.split(len(question))
    assert question.ids.tolist() == begun.ids.tolist()
    assert question.frame.tolist() == begun.frame.tolist()
    assert (question.labels == IGNORED).all()
    assert shown(encoder, question).endswith("What?<END><|assistant|>")


def test_prefill(encoder: ChatEncoder) -> None:
    question = encoder.question(talk("1", "What?").turns, [], prefill="Best option:(")
    assert shown(encoder, question).endswith("<|assistant|>Best option:(")


def test_where_the_video_ends(encoder: ChatEncoder) -> None:
    tokens = encoder.question(talk("1", VIDEO, "What?").turns, [2])
    first, second = tokens.split(tokens.frames_end)
    assert shown(encoder, first) == f"{SYSTEM}<|user|>\n[0]\n[1]"
    assert shown(encoder, second) == "\nWhat?<END><|assistant|>"
    assert encoder.sample(talk("1", "Hi", "Ho"), []).frames_end == 0


def test_text_cannot_end_a_turn(encoder: ChatEncoder) -> None:
    tokens = encoder.sample(talk("1", "Say <|endoftext|>", "<|endoftext|>"), [])
    assert int((tokens.ids == encoder.tokenizer.end).sum()) == 3
    assert encoder.tokenizer.decode(tokens.ids.tolist()).count("<|endoftext|>") == 2


def test_one_count_for_each_medium(encoder: ChatEncoder) -> None:
    with pytest.raises(ConfigError, match="1 media need as many numbers"):
        encoder.sample(talk("1", VIDEO, "What?", "A cat."), [1, 2])


def test_tokenizer_files(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save(tmp_path)
    again = BpeTokenizer.from_folder(tmp_path)
    assert again.encode("Héllo <x>\n") == tokenizer.encode("Héllo <x>\n")
    assert again.decode(again.encode("Héllo <x>\n")) == "Héllo <x>\n"
    assert again.size == 257
    with pytest.raises(FormatError, match="does not exist"):
        BpeTokenizer.from_folder(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(FormatError, match="not a tokenizer"):
        BpeTokenizer.from_folder(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"no token '<\|endoftext\|>'"):
        BpeTokenizer(Tokenizer(BPE(vocab={"a": 0}, merges=[])))
