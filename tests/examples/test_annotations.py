"""Annotation files in their published formats, read into samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from magc.errors import MissingExtraError
from video_ma2mba.data.llava import group_by_media, read_llava, read_llava_video_178k
from video_ma2mba.data.records import Media, Record, Sample, Turn, read_records
from video_ma2mba.data.scenewalk import read_scenewalk_v1, read_scenewalk_v2
from video_ma2mba.errors import FormatError


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def chat(name: str, medium: str | None, *texts: str) -> Sample:
    parts = [(text,) for text in texts]
    if medium is not None:
        parts[0] = (Media(Path("/m") / medium), *parts[0])
    turns = tuple(Turn(("user", "assistant")[index % 2], each) for index, each in enumerate(parts))
    return Sample(name, turns)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava(tmp_path: Path, suffix: str) -> None:
    records = [
        {"id": "1", "image": "a/b.jpg", "conversations": talk("<image>\nWhat?", "A cat.")},
        {"id": "2", "video": "c.mp4", "conversations": talk("Why?\n<video>", "So.", "And?", "No.")},
        {"id": 3, "conversations": talk("Hello", "Hi")},
        {"id": "4", "video": "d.mp4", "conversations": talk("No placeholder", "Yes")},
    ]
    found = list(read_llava(write(tmp_path / f"x{suffix}", records), "/m"))
    assert found[0] == chat("1", "a/b.jpg", "What?", "A cat.")
    assert found[1].turns[0].parts == ("Why?", Media(Path("/m/c.mp4")))
    assert [turn.text for turn in found[1].turns] == ["Why?", "So.", "And?", "No."]
    assert found[2] == chat("3", None, "Hello", "Hi")
    assert found[3] == chat("4", "d.mp4", "No placeholder", "Yes")


def test_llava_with_several_images(tmp_path: Path) -> None:
    record = {"id": "1", "image": ["a.jpg", "b.jpg"], "conversations": talk("<image><image>\nSame?", "No.")}
    (sample,) = read_llava(write(tmp_path / "x.json", [record]), "/m")
    assert sample.turns[0].parts == (Media(Path("/m/a.jpg")), Media(Path("/m/b.jpg")), "Same?")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "1"}, "lacks 'conversations'"),
        ({"conversations": []}, "empty conversation"),
        ({"conversations": talk("a", "b")[::-1]}, "must alternate"),
        ({"conversations": [{"from": "dog", "value": "x"}]}, "one of human"),
        ({"conversations": [{"from": "human"}]}, "lacks 'value'"),
        ({"video": 3, "conversations": talk("a", "b")}, "must be a file name"),
        ({"video": "v.mp4", "conversations": talk("<video><video>", "b")}, "1 media but 2 placeholders"),
        ({"conversations": talk("<image>", "b")}, "0 media but 1 placeholders"),
        ({"image": "a.jpg", "conversations": talk("draw", "<image>")}, "an answer shows an image"),
        ("text", "must be an object"),
    ],
)
def test_malformed_llava(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "x.json", [record])
    with pytest.raises(FormatError, match=message) as caught:
        list(read_llava(path, "/m"))
    assert "record 0" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{", "not valid JSON"),
        ("x.json", "{}", "must hold a list"),
        ("x.jsonl", "{}\n{", "line 2 is not valid JSON"),
        ("x.jsonl", b"{}\n\xff\xfe\n", "line 2 is not valid JSON"),
        ("x.json", b"[\xff]", "not valid JSON"),
        ("x.csv", "", "not a format"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=message):
        list(read_records(tmp_path / name))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        list(read_records(tmp_path / "none.json"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"id": "1", "n": {"a": 1}}, {"id": "2", "n": {"a": 2}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert list(read_records(tmp_path / "x.parquet")) == rows


def test_malformed_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"nope")
    with pytest.raises(FormatError, match="not a valid parquet file"):
        list(read_records(tmp_path / "x.parquet"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"video"):
        list(read_records(tmp_path / "x.parquet"))


def test_llava_video_178k(tmp_path: Path) -> None:
    def record(name: str) -> dict[str, Any]:
        return {"id": name, "video": f"v/{name}.mp4", "conversations": talk("<image>\nQ", "A"), "data_source": "x"}

    source = tmp_path / "0_30_s_academic_v0_1"
    write(source / "0_30_s_academic_v0_1_cap_processed.json", [record("cap")])
    write(source / "0_30_s_academic_mc_v0_1_qa_processed.json", [record("mc")])
    write(tmp_path / "0_30_s_nextqa" / "0_30_s_nextqa_oe_qa_processed.json", [record("oe")])
    found = list(read_llava_video_178k(tmp_path))
    assert [sample.id for sample in found] == ["mc", "cap", "oe"]
    assert found[0].media == (Media(source / "v/mc.mp4"),)
    assert [sample.id for sample in read_llava_video_178k(tmp_path, kinds=["oe"])] == ["oe"]
    assert next(read_llava_video_178k(tmp_path, "/m")).media == (Media(Path("/m/v/mc.mp4")),)
    with pytest.raises(FormatError, match="unpack LLaVA-Video-178K"):
        next(read_llava_video_178k(tmp_path / "0_30_s_nextqa"))


def test_grouping_per_video() -> None:
    samples = [
        chat("1", "a.mp4", "q1", "r1"),
        chat("2", "b.mp4", "q2", "r2"),
        chat("3", "a.mp4", "q3", "r3", "q4", "r4"),
        chat("4", None, "q5", "r5"),
        chat("5", "a.mp4", "q6", "r6"),
    ]
    grouped = group_by_media(samples)
    assert [sample.id for sample in grouped] == ["1", "2", "4"]
    assert [turn.text for turn in grouped[0].turns] == ["q1", "r1", "q3", "r3", "q4", "r4", "q6", "r6"]
    assert grouped[0].media == (Media(Path("/m/a.mp4")),)
    assert [len(sample.turns) for sample in group_by_media(samples, max_turns=6)] == [6, 2, 2, 2]


V2 = {
    "id": "abc",
    "video": "videos/yt_01/abc.mp4",
    "total_time": 30.0,
    "clip_num": 2,
    "scenes": [
        {"start_frame": 0, "start_fps": 25, "end_frame": 100, "end_fps": 25},
        {"start_time": "00:00:04.000", "end_time": "00:01:10.500"},
    ],
    "conversations": talk("<image>\nDescribe.", "A dog.", "<image>", "It runs."),
}


def test_scenewalk_v2(tmp_path: Path) -> None:
    (sample,) = read_scenewalk_v2(write(tmp_path / "train.jsonl", [V2]), "/m")
    video = Path("/m/videos/yt_01/abc.mp4")
    assert sample.id == "abc"
    assert sample.form == "interleaved"
    assert [turn.parts for turn in sample.turns] == [
        (Media(video, 0.0, 4.0), "Describe."),
        ("A dog.",),
        (Media(video, 4.0, 70.5),),
        ("It runs.",),
    ]


def v1_row(url: str, start: int, stop: int, caption: str) -> dict[str, Any]:
    stamp = {"start_frame": start, "start_fps": 10, "end_frame": stop, "end_fps": 10, "duration": 1}
    return {"id": f"{url}{start}", "url": url, "time_stamp": stamp, "conversations": talk("<image>", caption)}


def test_scenewalk_v1(tmp_path: Path) -> None:
    one, two = "https://www.youtube.com/watch?v=abcDEF-_123", "https://example.org/film/scene.mkv"
    rows = [v1_row(one, 50, 90, "later"), v1_row(two, 0, 10, "other"), v1_row(one, 0, 50, "first")]
    found = list(read_scenewalk_v1(write(tmp_path / "train.jsonl", rows), "/m"))
    assert [sample.id for sample in found] == ["abcDEF-_123", "scene"]
    assert found[0].media == (Media(Path("/m/abcDEF-_123.mp4"), 0, 5), Media(Path("/m/abcDEF-_123.mp4"), 5, 9))
    assert [turn.text for turn in found[0].turns] == ["", "first", "", "later"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenes": V2["scenes"][:1]}, "1 scenes but 4 turns"),
        ({"scenes": [{"start_frame": 3}] * 2}, "lacks start_frame with start_fps"),
        ({"scenes": [{"start_time": "soon", "end_time": "00:01"}] * 2}, "'soon' is not a time"),
        ({"scenes": [{"start_time": 5, "end_time": 5}] * 2}, "holds nothing"),
    ],
)
def test_malformed_scenewalk(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        list(read_scenewalk_v2(write(tmp_path / "x.jsonl", [{**V2, **change}]), "/m"))


def test_malformed_records_are_left_out_and_told(tmp_path: Path) -> None:
    told: list[tuple[Any, str]] = []

    def tell(record: Record, error: FormatError) -> None:
        told.append((record.get("id"), str(error)))

    good = {"id": "good", "conversations": talk("q", "a")}
    system = [{"from": "system", "value": "s"}, *talk("q", "a")]
    bad = [
        {"id": "empty", "conversations": []},
        {"id": "system", "conversations": system},
        {"id": "shown", "image": "a.jpg", "conversations": talk("q", "<image>")},
    ]
    found = list(read_llava(write(tmp_path / "x.json", [bad[0], good, *bad[1:]]), "/m", on_malformed=tell))
    assert found == [chat("good", None, "q", "a")]
    assert [name for name, _ in told] == ["empty", "system", "shown"]
    assert [f"record {number}" in text for number, (_, text) in zip((0, 2, 3), told, strict=True)] == [True] * 3

    url = "https://www.youtube.com/watch?v=abc"
    rows = [v1_row(url, 0, 50, "first"), v1_row(url, 50, 50, "nothing"), v1_row(url, 50, 90, "later")]
    (sample,) = read_scenewalk_v1(write(tmp_path / "train.jsonl", rows), "/m", on_malformed=tell)
    assert [turn.text for turn in sample.turns] == ["", "first", "", "later"]
    assert "row 1: a scene from second 5.000 to 5.000 holds nothing" in told[-1][1]

    records = [{**V2, "id": "bad", "scenes": [3, 4]}, V2]
    (sample,) = read_scenewalk_v2(write(tmp_path / "two.jsonl", records), "/m", on_malformed=tell)
    assert sample.id == "abc"
    assert told[-1][0] == "bad"
    assert "scenes[0] must be an object" in told[-1][1]


def test_names_in_urls_stay_in_their_folder(tmp_path: Path) -> None:
    rows = [v1_row("https://www.youtube.com/watch?v=../../etc/passwd", 0, 10, "x")]
    with pytest.raises(FormatError, match="no video's name"):
        list(read_scenewalk_v1(write(tmp_path / "train.jsonl", rows), "/m"))
