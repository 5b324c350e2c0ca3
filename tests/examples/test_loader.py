"""The loader: batches, order, resuming, and samples that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.clips import RATE, damage, moving_frames, seconds_of, write_clip
from tests.examples.tiny import make_tokenizer, talk
from video_ma2mba.data.batch import Batch, Example, VideoTokens, collate, pack_frames, unpack_frames
from video_ma2mba.data.chat import IGNORED, NO_FRAME, ChatEncoder
from video_ma2mba.data.encode import write_video
from video_ma2mba.data.frames import HostFrames
from video_ma2mba.data.loader import Loader, Preparation
from video_ma2mba.data.media import MediaOptions, open_media
from video_ma2mba.data.records import Media, Sample
from video_ma2mba.data.transform import FrameTransform
from video_ma2mba.errors import ConfigError, MediaError, ProblemKind

PATCHES, SIZE = 3, 8
ENCODER = ChatEncoder(make_tokenizer(), PATCHES)
PREPARE = Preparation(ENCODER, MediaOptions(FrameTransform(SIZE)))


def texts(count: int) -> list[Sample]:
    return [talk(f"s{index}", "question" * (index + 1), "answer") for index in range(count)]


def names(loader: Loader, count: int) -> list[tuple[str, ...]]:
    return [batch.ids for batch in islice(loader, count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "three.mp4", 3)
    write_clip(folder / "five.mp4", 5)
    (folder / "bad.mp4").write_bytes(b"nothing")
    return folder


def test_order_of_an_epoch() -> None:
    loader = Loader(texts(10), PREPARE, batch_size=2, seed=1)
    first, second = names(loader, 10)[:5], names(Loader(texts(10), PREPARE, batch_size=2, seed=1), 10)[5:]
    for epoch in (first, second):
        assert sorted(name for batch in epoch for name in batch) == sorted(sample.id for sample in texts(10))
    assert first != second
    assert loader.batches_per_epoch == 5
    assert names(Loader(texts(10), PREPARE, batch_size=2, seed=2), 5) != first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 3, 7])
def test_resuming_goes_on_exactly(after: int, workers: int) -> None:
    def make() -> Loader:
        return Loader(texts(7), PREPARE, batch_size=2, seed=3, workers=workers)

    expected = names(make(), 12)
    killed = make()
    assert names(killed, after) == expected[:after]
    resumed = make()
    resumed.load_state_dict(killed.state_dict())
    assert names(resumed, 12 - after) == expected[after:]


def test_ranks_share_the_batches_of_one() -> None:
    whole = names(Loader(texts(8), PREPARE, batch_size=4, seed=5), 4)
    ranks = [names(Loader(texts(8), PREPARE, batch_size=2, seed=5, rank=rank, world=2), 4) for rank in range(2)]
    assert [(*one, *two) for one, two in zip(*ranks, strict=True)] == whole


def test_similar_lengths_share_a_batch() -> None:
    samples = texts(40)
    lengths = [index % 20 for index in range(40)]
    loader = Loader(samples, PREPARE, batch_size=2, seed=0, lengths=lengths)
    length_of = {sample.id: length for sample, length in zip(samples, lengths, strict=True)}
    batches = names(loader, 20)
    assert all(len({length_of[name] for name in batch}) == 1 for batch in batches)
    assert sorted(name for batch in batches for name in batch) == sorted(length_of)
    order = [length_of[batch[0]] for batch in batches]
    assert order != sorted(order)


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 2}, {"samples": texts(3)}, {"lengths": [1, 2, 3, 4]}])
def test_a_state_of_another_run_is_refused(change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"samples": texts(4), "prepare": PREPARE, "seed": 0}
    state = Loader(**options).state_dict()
    with pytest.raises(ConfigError, match="of another run"):
        Loader(**{**options, **change}).load_state_dict(state)


def videos(folder: Path) -> list[Sample]:
    return [
        talk("good", folder / "three.mp4", "Q", "A"),
        talk("bad", folder / "bad.mp4", "Q", "A"),
        talk("gone", folder / "none.mp4", "Q", "A"),
        talk("fine", folder / "five.mp4", "Q", "A"),
    ]


@pytest.mark.parametrize("workers", [0, 3])
def test_unusable_samples_are_replaced_and_reported(folder: Path, workers: int) -> None:
    loader = Loader(videos(folder), PREPARE, workers=workers)
    assert {batch.ids for batch in islice(loader, 8)} == {("good",), ("fine",)}
    found = {(problem.sample, problem.kind) for problem in loader.problems}
    assert found == {("bad", ProblemKind.UNREADABLE), ("gone", ProblemKind.MISSING)}
    assert "2 of 4 samples could not be used" in loader.report()
    assert f"1 x missing file, e.g. sample gone: {folder / 'none.mp4'}" in loader.report()


def test_unusable_samples_stop_the_run(folder: Path) -> None:
    loader = Loader(videos(folder), PREPARE, on_problem="stop")
    with pytest.raises(MediaError) as caught:
        list(islice(loader, 4))
    assert caught.value.kind in (ProblemKind.UNREADABLE, ProblemKind.MISSING)
    assert "on_problem='skip'" in caught.value.__notes__[0]


def test_nothing_usable(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no sample can be used: 2 of 2"):
        next(iter(Loader(videos(folder)[1:3], PREPARE)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [2, 5])
def test_one_usable_sample_is_found_from_every_place(count: int, workers: int) -> None:
    """The rest of an epoch and the start of the next, as many places as samples, may well lack it."""

    def prepare(sample: Sample) -> Example:
        if sample.id != "s1":
            raise MediaError(ProblemKind.MISSING, sample.id, "there is no such file")
        return PREPARE(sample)

    for seed in range(20):
        loader = Loader(texts(count), prepare, seed=seed, workers=workers)
        assert names(loader, 3 * count) == [("s1",)] * (3 * count)
        assert {problem.sample for problem in loader.problems} == {each.id for each in texts(count)} - {"s1"}
        resumed = Loader(texts(count), prepare, seed=seed, workers=workers)
        resumed.load_state_dict({**loader.state_dict(), "batches": count - 1})
        assert names(resumed, 2) == [("s1",)] * 2


@pytest.mark.parametrize(
    ("prepare", "sample", "kind"),
    [
        (Preparation(ENCODER, PREPARE.media, max_tokens=20), talk("1", "Q", "A"), ProblemKind.TOO_LONG),
        (PREPARE, talk("1", "Q"), ProblemKind.NOTHING_TO_LEARN),
    ],
)
def test_unusable_sequences(prepare: Preparation, sample: Sample, kind: ProblemKind) -> None:
    with pytest.raises(MediaError) as caught:
        prepare(sample)
    assert caught.value.kind is kind


def test_no_samples() -> None:
    with pytest.raises(ConfigError, match="no sample"):
        Loader([], PREPARE)


def test_batch_of_videos(folder: Path) -> None:
    samples = videos(folder)
    batch = collate([PREPARE(samples[0]), PREPARE(samples[3])], pad=0)
    rows = [PREPARE(samples[index]).tokens for index in (0, 3)]
    assert len(batch.inputs) == batch.targets.shape[1] == max(len(row) for row in rows) - 1
    for index, row in enumerate(rows):
        assert batch.targets[index, : len(row) - 1].tolist() == row.labels[1:].tolist()
        assert (batch.targets[index, len(row) - 1 :] == IGNORED).all()
    segment = batch.inputs.segment(0, len(batch.inputs))
    pixels = unpack_frames(segment["pixels"], SIZE)
    assert seconds_of(pixels, 5) == [0, 1, 2, 0, 1, 2, 3, 4]
    assert segment["frame"][1][rows[1].frame[:-1] == 0].tolist() == [3] * PATCHES


def test_padding_to_a_multiple() -> None:
    rows = [PREPARE(sample) for sample in texts(2)]
    plain, padded = collate(rows), collate(rows, multiple=32)
    length = len(plain.inputs)
    assert len(padded.inputs) == padded.targets.shape[1] == -(-length // 32) * 32 > length
    assert torch.equal(padded.targets[:, :length], plain.targets)
    assert (padded.targets[:, length:] == IGNORED).all()
    batch = next(iter(Loader(texts(2), PREPARE, multiple=32)))
    assert len(batch.inputs) % 32 == 0
    with pytest.raises(ConfigError, match="multiple=0"):
        Loader(texts(2), PREPARE, multiple=0)


def every_segment(tokens: VideoTokens) -> Iterator[tuple[int, int]]:
    for start in range(len(tokens)):
        for stop in range(start + 1, len(tokens) + 1):
            yield start, stop


def test_a_segment_has_the_frames_it_touches(folder: Path) -> None:
    """Whatever the borders: each of its tokens finds its own frame's pixels and its own patch."""
    encoder = ChatEncoder(make_tokenizer(), PATCHES)
    tokens = encoder.question(talk("1", folder / "three.mp4", "Q").turns, [3])
    _, tokens = tokens.split(len(tokens) - 45)
    frames = HostFrames(torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3).contiguous())
    source = VideoTokens([tokens], [frames])
    for start, stop in every_segment(source):
        segment = source.segment(start, stop)
        assert {leaf.shape[1] for leaf in segment.values()} == {stop - start}
        pixels = unpack_frames(segment["pixels"], 2)
        wanted = tokens.frame[start:stop]
        assert pixels.shape[0] == len(set(wanted.tolist()) - {NO_FRAME})
        for place, frame in enumerate(wanted.tolist()):
            local = int(segment["frame"][0, place])
            assert (local == NO_FRAME) == (frame == NO_FRAME)
            assert frame == NO_FRAME or (pixels[local] == frame).all()
        assert segment["patch"][0].tolist() == tokens.patch[start:stop].tolist()


@pytest.mark.parametrize("length", [1, 2, 7, 12, 100])
def test_packed_frames(length: int) -> None:
    pixels = torch.randint(0, 256, (5, 2, 2, 3), dtype=torch.uint8)
    packed = pack_frames(pixels, length)
    assert packed.shape[:2] == (5, length)
    assert torch.equal(unpack_frames(packed, 2), pixels)


def test_missing_frames_are_refused() -> None:
    tokens = ENCODER.question(talk("1", Path("v"), "Q").turns, [2])
    with pytest.raises(ConfigError, match="refer to frame 1, but there are 1"):
        VideoTokens([tokens], [HostFrames(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))])


def test_images(tmp_path: Path) -> None:
    write_clip(tmp_path / "picture.png", 0.25, codec="png", pixel_format="rgb24")
    options = MediaOptions(FrameTransform(SIZE))
    frames = open_media(Media(tmp_path / "picture.png"), options)
    assert seconds_of(frames.read(0, len(frames)), 1) == [0]
    (tmp_path / "bad.jpg").write_bytes(b"x")
    for name, kind in (("bad.jpg", ProblemKind.UNREADABLE), ("none.png", ProblemKind.MISSING)):
        with pytest.raises(MediaError) as caught:
            open_media(Media(tmp_path / name), options)
        assert caught.value.kind is kind


def test_folder_of_frames(tmp_path: Path) -> None:
    for index in range(9):
        image = tmp_path / "frames" / f"{index:05d}.png"
        write_clip(image, 0.25, 8 + index, 8, codec="png", pixel_format="rgb24")
    options = MediaOptions(FrameTransform(SIZE), folder_fps=3.0)
    assert len(open_media(Media(tmp_path / "frames"), options)) == 3
    assert len(open_media(Media(tmp_path / "frames", 1.0, 2.0), options)) == 1
    assert len(open_media(Media(tmp_path / "frames"), MediaOptions(FrameTransform(SIZE), max_frames=2))) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(MediaError, match="holds no picture"):
        open_media(Media(tmp_path / "none"), options)
    with pytest.raises(MediaError, match="hold nothing"):
        open_media(Media(tmp_path / "frames", 5.0), options)


def test_streamed_media(folder: Path) -> None:
    held = open_media(Media(folder / "five.mp4", 1.0, 4.0), PREPARE.media)
    streamed = open_media(Media(folder / "five.mp4", 1.0, 4.0), MediaOptions(FrameTransform(SIZE), stream=True))
    assert torch.equal(held.read(0, 3), streamed.read(0, 3))


def test_streamed_media_are_checked_before_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "damaged.mp4"
    write_video(path, moving_frames(80), rate=RATE)
    damage(path, 0.5, 0.55)
    options = MediaOptions(FrameTransform(SIZE), stream=True)
    late = open_media(Media(path), options)
    assert len(late.read(0, 5)) == 5
    with pytest.raises(MediaError, match="decoding error"):
        late.read(5, 20)
    with pytest.raises(MediaError, match="decoding error"):
        open_media(Media(path), replace(options, check=True))


def test_batches_are_the_same_with_threads(folder: Path) -> None:
    def take(workers: int) -> list[Batch]:
        return list(islice(Loader(videos(folder), PREPARE, batch_size=2, workers=workers), 4))

    for one, other in zip(take(0), take(3), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.targets, other.targets)
        for name, leaf in one.inputs.segment(0, len(one.inputs)).items():
            assert torch.equal(leaf, other.inputs.segment(0, len(other.inputs))[name])
