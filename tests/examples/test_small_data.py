"""The small run's files are read by the readers of the real ones, and its words are single tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.data.llava import read_llava
from video_ma2mba.data.scenewalk import read_scenewalk_v2
from video_ma2mba.data.video import probe
from video_ma2mba.evaluation.choices import VideoMME
from video_ma2mba.evaluation.extract import first_letter
from video_ma2mba.small.dataset import CLIP_SECONDS, LIST_SECONDS, Data, Sizes, write_data
from video_ma2mba.small.questions import KINDS
from video_ma2mba.small.render import Look
from video_ma2mba.small.texts import DESCRIBE, LIST, train_tokenizer
from video_ma2mba.small.world import COLOURS, DIRECTIONS, SHAPES

SIZES = Sizes(clips=3, stories=2, asked=1, held_out=2, lengths=(12, 16), longer=(24,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("small"), SIZES, 0, lambda count, news: None)


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return train_tokenizer()


def test_progress_counts_every_video(tmp_path: Path) -> None:
    told: list[int] = []
    write_data(tmp_path, SIZES, 0, lambda count, news: told.append(count))
    assert sum(told) == SIZES.videos == len(list(tmp_path.glob("*/*.mp4")))


def test_clips_are_llava_samples_with_captions(data: Data) -> None:
    samples = list(read_llava(data.clips, data.videos))
    assert len(samples) == SIZES.clips
    told: dict[str, list[float]] = {DESCRIBE: [], LIST: []}
    for sample in samples:
        question, answer = (turn.text for turn in sample.turns)
        assert answer.startswith("a ") == (question == DESCRIBE)
        told[question].append(probe(sample.media[0].path).duration)
    assert told[DESCRIBE] == pytest.approx([CLIP_SECONDS] * 2)
    assert len(told[LIST]) == 1
    assert LIST_SECONDS[0] <= told[LIST][0] <= LIST_SECONDS[1]


def test_scenes_are_scenewalk_samples_that_cover_their_videos(data: Data) -> None:
    samples = list(read_scenewalk_v2(data.scenes, data.videos))
    assert len(samples) == SIZES.stories * len(SIZES.lengths)
    for sample in samples:
        media = sample.media
        assert [each.start for each in media][1:] == [each.stop for each in media][:-1]
        assert media[-1].stop == pytest.approx(probe(media[0].path).duration)


def test_instructions_ask_in_the_benchmarks_words(data: Data) -> None:
    benchmark = VideoMME(data.benchmark, data.held_out(Look.PLAIN)).questions()
    opening = benchmark[0].prompt.partition("\n")[0]
    for sample in read_llava(data.instructions, data.videos):
        assert sample.turns[0].text.startswith(opening)
        assert sample.turns[0].media[0].path.is_file()
        assert first_letter(sample.turns[1].text, "ABCD") == sample.turns[1].text[-2]


@pytest.mark.parametrize("look", Look)
def test_the_benchmark_finds_its_videos_at_every_length(data: Data, look: Look) -> None:
    questions = VideoMME(data.benchmark, data.held_out(look)).questions()
    seconds = {data.stories[question.media.path.stem].seconds for question in questions}
    assert seconds == {12, 16, 24}
    assert {question.groups["task"] for question in questions} == set(KINDS)
    assert all(question.media.path.is_file() for question in questions)


def test_the_benchmark_tells_trained_lengths_from_longer_ones(data: Data) -> None:
    for row in json.loads(data.benchmark.read_text()):
        longer = data.stories[row["videoID"]].seconds == 24
        assert (row["domain"], row["duration"] == "longer") == (
            "longer than trained" if longer else "trained length",
            longer,
        )


def test_evaluated_stories_are_held_out(data: Data) -> None:
    assert len(data.stories) == SIZES.held_out * 3
    assert all(story.held_out for story in data.stories.values())


def test_the_same_seed_writes_the_same_annotations(data: Data, tmp_path: Path) -> None:
    again = write_data(tmp_path, SIZES, 0, lambda count, news: None)
    for name in ("clips", "scenes", "instructions", "benchmark"):
        assert getattr(again, name).read_text() == getattr(data, name).read_text()


@pytest.mark.parametrize("word", [*COLOURS, *SHAPES, *DIRECTIONS, "nothing", "3", "6"])
def test_words_are_one_token_each(tokenizer: BpeTokenizer, word: str) -> None:
    assert len(tokenizer.encode(word)) == 1
    assert tokenizer.encode(f"the {word}")[-1:] == tokenizer.encode(word)


def test_any_text_comes_back(tokenizer: BpeTokenizer) -> None:
    text = "Wörter, die <|endoftext|> niemand lernte: 你好\n1 + 1 = 2"
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
