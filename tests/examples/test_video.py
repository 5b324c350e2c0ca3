"""Frames of video files: which, how many, how much memory, and what is said of bad files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from magc.meter import MemoryMeter
from tests.examples.clips import RATE, damage, grey, moving_frames, seconds_of, write_clip
from video_ma2mba.data.encode import write_video
from video_ma2mba.data.frames import HostFrames, JoinedFrames, StreamedFrames, read_video
from video_ma2mba.data.transform import FrameTransform
from video_ma2mba.data.video import frames_at, probe, sample_chunks, sample_times, spread
from video_ma2mba.errors import MediaError, ProblemKind

SMALL = FrameTransform(16)


def problem(path: Path) -> ProblemKind:
    with pytest.raises(MediaError) as caught:
        read_video(path, SMALL)
    assert caught.value.path == str(path)
    return caught.value.kind


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 7.5)


def test_one_frame_a_second(clip: Path) -> None:
    frames = read_video(clip, SMALL)
    assert seconds_of(frames.read(0, len(frames)), 8) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_probe(clip: Path) -> None:
    info = probe(clip)
    assert (info.width, info.height, info.rate, info.duration) == (48, 32, RATE, 7.5)
    assert info.samples(1.0) == 8
    assert info.samples(2.0) == 15


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "libx264"), (".webm", "libvpx"), (".avi", "mpeg4")])
def test_other_containers(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_clip(tmp_path / f"clip{suffix}", 4, codec=codec)
    assert seconds_of(read_video(path, SMALL).read(0, 4), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("fps", [0.5, 1.0, 3.0, 8.0])
def test_rates(clip: Path, fps: float) -> None:
    frames = read_video(clip, SMALL, fps=fps)
    count = round(7.5 * fps + 0.49)
    assert seconds_of(frames.read(0, len(frames)), 8) == [int(index / fps) for index in range(count)]


@pytest.mark.parametrize(("start", "stop", "expected"), [(2.0, 5.0, [2, 3, 4]), (2.5, 4.0, [2, 3]), (6, None, [6, 7])])
def test_clip_by_time(clip: Path, start: float, stop: float | None, expected: list[int]) -> None:
    frames = read_video(clip, SMALL, start=start, stop=stop)
    assert seconds_of(frames.read(0, len(frames)), 8) == expected


@pytest.mark.parametrize("options", [{"g": "400"}, {"g": "8"}, {"g": "250", "bf": "3"}])
def test_seeking_finds_the_same_frames(tmp_path: Path, options: dict[str, str]) -> None:
    path = write_clip(tmp_path / "long.mp4", 60, options=options)
    whole = read_video(path, SMALL).read(0, 60)
    for start in (11, 37, 59):
        assert torch.equal(read_video(path, SMALL, start=start).read(0, 60 - start), whole[start:])
    apart = [time for time, _ in frames_at(path, [3.0, 30.0, 59.0], SMALL)]
    assert apart == [3.0, 30.0, 59.0]
    assert torch.equal(torch.stack([frame for _, frame in frames_at(path, apart, SMALL)]), whole[[3, 30, 59]])


def test_limited_number_of_frames(clip: Path) -> None:
    assert sample_times(clip, max_frames=3) == [0.0, 4.0, 7.0]
    assert seconds_of(read_video(clip, SMALL, max_frames=3).read(0, 3), 8) == [0, 4, 7]
    assert spread(8, 8) == list(range(8))
    assert spread(9, 1) == [4]


def test_chunks(clip: Path) -> None:
    chunks = list(sample_chunks(clip, SMALL, chunk=3))
    assert [chunk.times for chunk in chunks] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert [tuple(chunk.pixels.shape) for chunk in chunks] == [(3, 16, 16, 3), (3, 16, 16, 3), (2, 16, 16, 3)]


def test_long_videos_are_decoded_as_a_stream(tmp_path: Path) -> None:
    """Torch memory while streaming is a chunk, not the video."""
    path = write_clip(tmp_path / "long.mp4", 120)
    with MemoryMeter("cpu") as meter:
        count = sum(len(chunk.times) for chunk in sample_chunks(path, FrameTransform(64), chunk=4))
    assert count == 120
    assert meter.peak_bytes < 20 * 64 * 64 * 3


@pytest.mark.parametrize(("height", "width"), [(33, 47), (17, 99), (120, 2), (1, 1)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    path = write_clip(tmp_path / "odd.mkv", 2, height, width, codec="ffv1", pixel_format="yuv444p")
    for fit in ("crop", "stretch"):
        pixels = read_video(path, FrameTransform(16, fit)).read(0, 2)
        assert pixels.shape == (2, 16, 16, 3)
        assert seconds_of(pixels, 2) == [0, 1]


def test_crop_keeps_the_centre_and_stretch_keeps_all() -> None:
    frame = np.zeros((32, 96, 3), np.uint8)
    frame[:, 32:64] = 200
    assert (FrameTransform(16)(frame)[:, 2:14] == 200).all()
    stretched = FrameTransform(16, "stretch")(frame)
    assert (stretched[:, :4] == 0).all()
    assert (stretched[:, 7:9] == 200).all()
    assert (stretched[:, 12:] == 0).all()


def test_resizing_is_that_of_image_processors() -> None:
    image = pytest.importorskip("PIL.Image")
    frame = np.random.default_rng(0).integers(0, 256, (50, 91, 3), dtype=np.uint8)
    expected = np.asarray(image.fromarray(frame).resize((36, 20), image.Resampling.BICUBIC))[:, 8:28]
    assert np.abs(FrameTransform(20)(frame).numpy().astype(int) - expected.astype(int)).max() <= 1


def test_frames_are_turned_as_the_file_says(tmp_path: Path) -> None:
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[:16] = 255  # white above
    write_video(tmp_path / "up.mp4", [frame] * RATE, rate=RATE)
    write_video(tmp_path / "turned.mp4", [np.rot90(frame, -1)] * RATE, rate=RATE, rotation=90)
    expected = read_video(tmp_path / "up.mp4", SMALL).read(0, 1).int()
    assert (read_video(tmp_path / "turned.mp4", SMALL).read(0, 1).int() - expected).abs().max() < 8


def test_missing(tmp_path: Path) -> None:
    assert problem(tmp_path / "none.mp4") is ProblemKind.MISSING


@pytest.mark.parametrize("content", [b"", b"not a video", bytes(range(256)) * 40])
def test_unreadable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    assert problem(path) is ProblemKind.UNREADABLE


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert problem(path) is ProblemKind.NO_VIDEO


def test_no_frame(tmp_path: Path) -> None:
    path = tmp_path / "empty.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    assert problem(path) in (ProblemKind.EMPTY, ProblemKind.UNREADABLE)


def test_damaged(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "damaged.mp4", 30, 64, 64, codec="mpeg4", options={"g": "400"})
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 300] = bytes(300)
    path.write_bytes(content)
    assert problem(path) in (ProblemKind.DECODE, ProblemKind.EMPTY, ProblemKind.TRUNCATED)


def test_cut_off(tmp_path: Path) -> None:
    """The header, in front, states 40 seconds; the file ends after some of them."""
    whole, cut = write_clip(tmp_path / "whole.mp4", 40, 64, 64), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"movflags": "faststart"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    cut.write_bytes(cut.read_bytes()[: -cut.stat().st_size // 3])
    assert probe(cut).duration == 40
    assert problem(cut) in (ProblemKind.TRUNCATED, ProblemKind.DECODE)
    with pytest.raises(MediaError):
        StreamedFrames(cut, SMALL).read(0, 40)


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".ts", "libx264"), (".avi", "mpeg4")]
)
@pytest.mark.parametrize(("first", "last"), [(0.35, 0.4), (0.5, 0.52)])
def test_damaged_in_the_middle(tmp_path: Path, suffix: str, codec: str, first: float, last: float) -> None:
    """By default decoders patch such pictures up and say nothing."""
    path = tmp_path / f"clip{suffix}"
    write_video(path, moving_frames(80), rate=RATE, codec=codec)
    assert len(read_video(path, SMALL)) == 20
    damage(path, first, last)
    assert problem(path) is ProblemKind.DECODE


def test_a_damaged_first_key_frame(tmp_path: Path) -> None:
    """Frames before the first key frame may be missing, but not that one, though later ones can be decoded."""
    path = tmp_path / "clip.mp4"
    write_video(path, moving_frames(80), rate=RATE, options={"g": "8"})
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    assert problem(path) is ProblemKind.DECODE
    assert len(read_video(path, SMALL, start=15)) == 5


def test_cut_off_matroska(tmp_path: Path) -> None:
    """It states no duration of its pictures, but where the file ends."""
    path = tmp_path / "clip.mkv"
    write_video(path, moving_frames(80), rate=RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert probe(path).duration == 20
    assert problem(path) is ProblemKind.TRUNCATED
    assert len(read_video(path, SMALL, stop=8)) == 8


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize(("begins", "sound"), [(0, 9), (3, 9), (0, 2)])
def test_sound_of_another_length(tmp_path: Path, suffix: str, begins: int, sound: int) -> None:
    """Pictures from second `begins` on for 5 seconds, in a file whose sound is shorter or longer."""
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        stream, track = container.add_stream("libx264", rate=RATE), container.add_stream("aac", rate=8000)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        track.layout = "mono"
        for index, pixels in enumerate(moving_frames(5 * RATE)):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = begins * RATE + index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for index in range(sound * 8000 // 1000):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, 1000 * index, Fraction(1, 8000)
            container.mux(track.encode(samples))
        container.mux(track.encode())
    assert probe(path).duration == pytest.approx(5, abs=0.05)
    assert len(read_video(path, SMALL)) == 5


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_frames_at_uneven_times(tmp_path: Path, suffix: str) -> None:
    path, times = tmp_path / f"clip{suffix}", [0, 1, 2, 24, 25, 44]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), grey(number), np.uint8))
            frame.pts, frame.time_base = time, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = read_video(path, SMALL)
    assert seconds_of(found.read(0, len(found)), 6) == [0, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]


OPEN_GOP = {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}


def test_seeking_before_pictures_that_lack_references(tmp_path: Path) -> None:
    path = tmp_path / "open.mp4"
    write_video(path, moving_frames(30 * RATE), rate=RATE, options=OPEN_GOP)
    whole = read_video(path, SMALL).read(0, 30)
    for start in range(11, 30):
        assert torch.equal(read_video(path, SMALL, start=start, stop=start + 1).read(0, 1)[0], whole[start])


@pytest.mark.parametrize("options", [{"g": "4"}, {"x264-params": "open-gop=1:keyint=4:bframes=2:scenecut=0"}])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_recordings_that_begin_between_key_frames(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    whole, path = tmp_path / "whole.mp4", tmp_path / f"late{suffix}"
    write_video(whole, moving_frames(80), rate=RATE, options=options)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is not None and number >= 2:
                packet.stream = copy
                target.mux(packet)
    assert len(read_video(path, SMALL)) in (19, 20)


def test_clip_outside_the_video(clip: Path) -> None:
    with pytest.raises(MediaError, match=r"seconds 9\.0 to 12\.0 .* has 7\.500") as caught:
        read_video(clip, SMALL, start=9.0, stop=12.0)
    assert caught.value.kind is ProblemKind.RANGE


def test_streamed_frames_are_the_decoded_ones(clip: Path) -> None:
    held, streamed = read_video(clip, SMALL), StreamedFrames(clip, SMALL)
    assert len(streamed) == len(held) == 8
    for start, stop in [(0, 2), (1, 4), (4, 8), (6, 8), (2, 3), (0, 8), (3, 5)]:
        assert torch.equal(streamed.read(start, stop), held.read(start, stop))


def test_joined_frames() -> None:
    parts = [HostFrames(torch.full((count, 2, 2, 3), count, dtype=torch.uint8)) for count in (2, 1, 3)]
    joined = JoinedFrames(parts)
    assert len(joined) == 6
    for start, stop in [(0, 6), (1, 2), (1, 4), (2, 3), (5, 6)]:
        assert joined.read(start, stop)[:, 0, 0, 0].tolist() == [2, 2, 1, 3, 3, 3][start:stop]
    with pytest.raises(IndexError):
        joined.read(4, 7)
