"""The small run's stories, questions and pictures: what is asked is what happens, and nothing gives an answer away."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from video_ma2mba.data.frames import read_video
from video_ma2mba.data.transform import FrameTransform
from video_ma2mba.small.questions import KINDS, ask, scenes
from video_ma2mba.small.render import RATE, SIZE, Look, frames, write_story
from video_ma2mba.small.standins import describe
from video_ma2mba.small.world import COLOURS, EVENTS, SHAPES, THINGS, Event, Story, Thing, make_story

RED, BLUE, GREEN, WHITE = (
    Thing("red", "circle"),
    Thing("blue", "square"),
    Thing("green", "triangle"),
    Thing("white", "square"),
)
STORY = Story(
    16,
    (
        Event(RED, "left", 1, 3, 0.5),
        Event(BLUE, "up", 5, 2, 0.5),
        Event(GREEN, "right", 7, 2, 0.5),
        Event(WHITE, "down", 12, 3, 0.5),
    ),
    30,
)
ANSWERS = {
    "Which shape came first?": "red circle",
    "Which shape came last?": "white square",
    "Which shape came right after the red circle?": "blue square",
    "Which shape came right after the blue square?": "green triangle",
    "Which shape came right after the green triangle?": "white square",
    "How many shapes came?": "4",
    "Which way did the red circle move?": "left",
    "Which way did the blue square move?": "up",
    "Which way did the green triangle move?": "right",
    "Which way did the white square move?": "down",
    "What colour was the circle?": "red",
    "What colour was the triangle?": "green",
}


def stories(count: int, seconds: int, **options: bool) -> list[Story]:
    draw = random.Random(seconds)
    return [make_story(draw, seconds, **options) for _ in range(count)]


@pytest.mark.parametrize("seconds", [2, 4, 12, 16, 64])
def test_events_follow_each_other_within_the_video(seconds: int) -> None:
    for story in stories(100, seconds):
        bounds = [bound for event in story.events for bound in (event.start, event.stop)]
        assert bounds == sorted(bounds)
        assert bounds[0] >= 0
        assert bounds[-1] <= seconds


def test_no_thing_comes_twice() -> None:
    for story in stories(200, 16):
        assert len({event.thing for event in story.events}) == len(story.events)


def test_every_number_of_events_is_as_likely() -> None:
    counts = Counter(len(story.events) for story in stories(1200, 16))
    assert sorted(counts) == list(range(EVENTS[0], EVENTS[1] + 1))
    assert min(counts.values()) > 240


def test_orders_are_held_out_or_not() -> None:
    kept, shown = stories(100, 16, held_out=True), stories(300, 16, held_out=False)
    orders = [{tuple(event.thing for event in story.events) for story in each} for each in (kept, shown)]
    assert not orders[0] & orders[1]
    assert all(story.held_out for story in kept)


@pytest.mark.parametrize(("way", "reverse"), [("left", "right"), ("up", "down")])
@pytest.mark.parametrize("seconds", [2, 3])
def test_a_way_and_its_reverse_show_the_same_frames_in_another_order(way: str, reverse: str, seconds: int) -> None:
    there, back = (
        [event.centre(second) for second in range(5, event.stop)]
        for event in (Event(RED, direction, 5, seconds, 0.4) for direction in (way, reverse))
    )
    np.testing.assert_allclose(there, back[::-1])


def test_answers_are_what_happens() -> None:
    draw = random.Random(0)
    found = {
        asked.question: asked.options[asked.right]
        for _ in range(100)
        for kind in KINDS
        if (asked := ask(draw, STORY, kind)) is not None
    }
    assert found == ANSWERS


@pytest.mark.parametrize("kind", KINDS)
def test_options_differ_and_every_letter_is_right_as_often(kind: str) -> None:
    draw = random.Random(1)
    letters: Counter[int] = Counter()
    for story in stories(800, 16):
        asked = ask(draw, story, kind)
        if asked is not None:
            assert len(set(asked.options)) == 4
            letters[asked.right] += 1
    assert min(letters.values()) > 0.2 * letters.total()


@pytest.mark.parametrize("kind", ["first", "last"])
def test_wrong_options_are_shown_too_where_there_are_enough(kind: str) -> None:
    draw = random.Random(2)
    for story in stories(100, 16):
        asked = ask(draw, story, kind)
        assert asked is not None
        names = {event.thing.name for event in story.events}
        assert len(set(asked.options) & names) == min(4, len(names))


def test_scenes_cut_a_video_without_gaps_and_hold_one_event_each() -> None:
    for story in stories(100, 32):
        cut = scenes(story)
        assert [start for start, _, _ in cut] + [story.seconds] == [0] + [stop for _, stop, _ in cut]
        for (start, stop, text), event in zip(cut, story.events, strict=True):
            assert start <= event.start < event.stop <= stop
            assert event.thing.name in text
            assert event.direction in text


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_show_the_thing_where_it_is(shape: str) -> None:
    story = Story(3, (Event(Thing("yellow", shape), "right", 0, 3, 0.3),), 20)
    for index, picture in enumerate(frames(story, 0)):
        x, y = (int(SIZE * part) for part in story.events[0].centre(index / RATE))
        assert np.abs(picture[y, x].astype(int) - COLOURS["yellow"]).max() < 40
        assert picture[-1, -1].max() < 60


def test_shuffled_videos_show_the_same_seconds_in_another_order() -> None:
    plain, shuffled = ([np.mean(each) for each in frames(STORY, 3, look)] for look in (Look.PLAIN, Look.SHUFFLED))
    seconds = [np.reshape(means, (STORY.seconds, RATE)) for means in (plain, shuffled)]
    ordered = [each[np.argsort(each[:, 0])] for each in seconds]
    np.testing.assert_allclose(*ordered, atol=1.5)  # the noise differs
    assert np.abs(seconds[0] - seconds[1]).max() > 5


def test_blind_videos_show_nothing_of_the_story() -> None:
    other = Story(STORY.seconds, (Event(BLUE, "up", 2, 3, 0.5),), 50)
    np.testing.assert_array_equal(list(frames(STORY, 4, Look.BLIND)), list(frames(other, 4, Look.BLIND)))


def test_a_written_video_has_one_sampled_frame_a_second(tmp_path: Path) -> None:
    write_story(tmp_path / "story.mp4", STORY, 5)
    read = read_video(tmp_path / "story.mp4", FrameTransform(SIZE))
    assert len(read) == STORY.seconds
    drawn = torch.stack([torch.from_numpy(each) for each in list(frames(STORY, 5))[::RATE]])
    # x264 loses some colour at edges.
    assert (read.read(0, 16).float() - drawn.float()).abs().mean() < 4


def test_descriptions_say_what_is_shown_at_each_second() -> None:
    things, middles = describe([STORY])
    for second in range(STORY.seconds):
        event = STORY.shown(second)
        if event is None:
            assert things[0, second] == -1
        else:
            assert THINGS[things[0, second]] == event.thing
            expected = [2 * part - 1 for part in event.centre(second)]
            assert middles[0, second].tolist() == pytest.approx(expected, abs=1e-6)
