"""Benchmarks in their published formats: prompts, extraction, marks, resuming and reports, checked by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_annotations import write
from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.errors import ConfigError, FormatError, MediaError, ProblemKind
from video_ma2mba.evaluate import make_benchmark, make_judge
from video_ma2mba.evaluation.choices import MVBENCH_TASKS, LongVideoBench, MVBench, VideoMME
from video_ma2mba.evaluation.extract import first_letter, first_letter_or_guess, standalone_letter
from video_ma2mba.evaluation.identity import ModelIdentity
from video_ma2mba.evaluation.judges import ExactJudge
from video_ma2mba.evaluation.open_ended import ActivityNetQA, VideoChatGPT
from video_ma2mba.evaluation.questions import Benchmark, clustered_mean, means_of
from video_ma2mba.evaluation.report import ABLATION, PAPER, markdown
from video_ma2mba.evaluation.run import Result, check_run, evaluate

VIDEOS = Path("/v")
MODEL = ModelIdentity("5eed" * 16, "float32")


# ---------------------------------------------------------------------- letters
@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" C. red", "C"),
        ("(D)", "D"),
        ("red ( B )", "B"),
        ("The best answer is A.", "A"),
        ("The correct answer is: C", "C"),
        ("Best answer: A", "A"),
        ("the cat", ""),
        ("", ""),
        ("E", ""),
        ("I cannot tell from this video what the man is doing at all", ""),
    ],
)
def test_first_letter(response: str, letter: str) -> None:
    assert first_letter(response, "ABCD") == letter


def test_guesses_are_the_same_every_time() -> None:
    assert first_letter_or_guess("D. A book", "ABCDE", 5, "q") == "D"
    guesses = {seed: first_letter_or_guess("none", "ABCDE", 3, seed) for seed in map(str, range(50))}
    assert set(guesses.values()) == {"A", "B", "C"}
    assert all(first_letter_or_guess("", "ABCDE", 3, seed) == guess for seed, guess in guesses.items())


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("A. Ate the medicine.", "A"),
        ("b. red", "B"),
        ("(C) Put down the cup.", "C"),
        ("B) red", "B"),
        ("Best option:(D) the last", "D"),
        ("The answer is C", "C"),
        ("It is E, not f", "E"),
        ("nothing of it", "nothing of it"),
        ("Yes, 1,000 times", "yes 1000 times"),
        ("", ""),
    ],
)
def test_standalone_letter(response: str, letter: str) -> None:
    assert standalone_letter(response) == letter


# ---------------------------------------------------------------------- Video-MME
def mme(number: int, video: str, duration: str, answer: str) -> dict[str, Any]:
    return {
        "video_id": video,
        "duration": duration,
        "domain": "Knowledge",
        "sub_category": "Law",
        "url": "https://www.youtube.com/watch?v=x",
        "videoID": f"yt{video}",
        "question_id": f"{video}-{number}",
        "task_type": "Counting Problem",
        "question": "How many?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": answer,
    }


MME = [mme(1, "001", "short", "A"), mme(2, "001", "short", "B"), mme(1, "002", "long", "C"), mme(2, "002", "long", "D")]


def test_videomme_questions(tmp_path: Path) -> None:
    benchmark = VideoMME(write(tmp_path / "test.json", MME), VIDEOS)
    question = benchmark.questions()[0]
    assert question.media == Media(VIDEOS / "yt001.mp4")
    assert question.prompt == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
        "(A, B, C, or D) of the correct option.\nHow many?\nA. One.\nB. Two.\nC. Three.\nD. Four.\nThe best answer is:"
    )
    assert (question.answer, question.max_new_tokens, question.groups["duration"]) == ("A", 16, "short")
    harness = VideoMME(benchmark.annotations, VIDEOS, "lmms-eval").questions()[0].prompt
    assert "based on the video and the subtitles." in harness
    assert harness.endswith("\nD. Four.\nAnswer with the option's letter from the given choices directly.")


def test_videomme_official_json(tmp_path: Path) -> None:
    per_question = ("question_id", "task_type", "question", "options", "answer")
    record = {key: value for key, value in MME[0].items() if key not in per_question}
    record["questions"] = [{key: each[key] for key in per_question} for each in MME[:2]]
    found = VideoMME(write(tmp_path / "official.json", [record]), VIDEOS).questions()
    assert [(question.id, question.answer) for question in found] == [("001-1", "A"), ("001-2", "B")]
    assert found[0].media == Media(VIDEOS / "yt001.mp4")


def test_videomme_marks(tmp_path: Path) -> None:
    benchmark = VideoMME(write(tmp_path / "test.json", MME), VIDEOS)
    responses = {"001-1": "A", "001-2": "B. Two.", "002-1": "The best answer is C", "002-2": "no idea"}
    marks = benchmark.mark(benchmark.questions(), responses, ExactJudge())
    means = means_of(marks)
    assert benchmark.columns(means) == {"Short": 100, "Long": 50, "Avg.": 75}
    assert means["accuracy"]["task=Counting Problem"].count == 4
    assert means["accuracy_answered"]["overall"].value == 1


# ---------------------------------------------------------------------- LongVideoBench
LVB: dict[str, Any] = {
    "id": "x_0",
    "video_path": "x.mp4",
    "question": "What next?",
    "correct_choice": 1,
    "duration_group": 3600,
    "question_category": "E3E",
    "subtitle_path": "x_en.json",
    "duration": 1000.0,
}


@pytest.mark.parametrize(
    "options",
    [
        {"candidates": ["Mix", "Pour"]},
        {"option0": "Mix", "option1": "Pour", **{f"option{i}": "N/A" for i in (2, 3, 4)}},
    ],
)
def test_longvideobench(tmp_path: Path, options: dict[str, Any]) -> None:
    benchmark = LongVideoBench(write(tmp_path / "lvb_val.json", [{**LVB, **options}]), VIDEOS)
    (question,) = benchmark.questions()
    assert question.prompt == (
        "What next?\nA. Mix\nB. Pour\nAnswer with the option's letter from the given choices directly.\n"
    )
    assert (question.answer, question.options, question.max_new_tokens) == ("B", ("Mix", "Pour"), 32)
    assert question.media == Media(VIDEOS / "x.mp4")
    means = means_of(benchmark.mark([question], {"x_0": "B. Pour"}, ExactJudge()))
    assert benchmark.columns(means) == {"900-3600s": 100, "valset": 100}


def test_longvideobench_without_key(tmp_path: Path) -> None:
    record = {key: value for key, value in LVB.items() if key != "correct_choice"}
    benchmark = LongVideoBench(write(tmp_path / "test.json", [{**record, "candidates": ["a", "b"]}]), VIDEOS)
    (question,) = benchmark.questions()
    assert question.answer is None
    (mark,) = benchmark.mark([question], {question.id: "The answer is B"}, ExactJudge())
    assert (mark.id, mark.parsed, mark.values) == ("x_0", "B", {})


def test_a_submission(tmp_path: Path) -> None:
    """Questions without a key are answered in `submission.json`, and counted apart."""
    rows = [{**LVB, "id": name, "candidates": ["a", "b"]} for name in ("x_0", "x_1", "x_2")]
    del rows[1]["correct_choice"]
    rows[2]["correct_choice"] = -1
    benchmark = LongVideoBench(write(tmp_path / "lvb_test_wo_gt.json", rows), VIDEOS)
    result = evaluate(benchmark, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)
    assert json.loads((tmp_path / "out" / "submission.json").read_text()) == {"x_1": "A", "x_2": "A"}
    assert (result.questions, result.without_key, result.means["accuracy"]["overall"].count) == (1, 2, 1)
    assert "2 questions have no public key: their answers are in submission.json." in markdown([result])
    keyless = LongVideoBench(write(tmp_path / "all.json", rows[1:]), VIDEOS)
    result = evaluate(keyless, Parrot(), ExactJudge(), tmp_path / "all", identity=MODEL)
    assert (result.questions, result.without_key, result.columns) == (0, 2, {})
    assert "| parrot | - |" in markdown([result])
    evaluate(
        LongVideoBench(write(tmp_path / "val.json", rows[:1]), VIDEOS),
        Parrot(),
        ExactJudge(),
        tmp_path / "val",
        identity=MODEL,
    )
    assert not (tmp_path / "val" / "submission.json").exists()


# ---------------------------------------------------------------------- MVBench
def test_mvbench(tmp_path: Path) -> None:
    sequence = {
        "video": "a.mp4",
        "question": "What?",
        "candidates": ["Ate.", "Ran."],
        "answer": "Ran.",
        "start": 1.5,
        "end": 9,
    }
    write(tmp_path / "action_sequence.json", [sequence])
    write(tmp_path / "moving_count.json", [{"video": "b.mp4", "question": "N?", "candidates": [1, 2], "answer": 2}])
    benchmark = MVBench(tmp_path, tmp_path / "videos")
    first, second = benchmark.questions()
    assert first.prompt == "Question:What?\nOption:\n(A) Ate.\n(B) Ran.\nOnly give the best option.\n"
    assert first.media == Media(tmp_path / "videos/star/Charades_v1_480/a.mp4", 1.5, 9.0)
    assert (second.answer, second.groups) == ("B", {"task": "moving_count"})
    cut = tmp_path / "videos/star/Charades_segment/a.mp4"
    cut.parent.mkdir(parents=True)
    cut.touch()
    assert benchmark.questions()[0].media == Media(cut)
    marks = benchmark.mark([first, second], {first.id: "(B) Ran.", second.id: ""}, ExactJudge())
    means = means_of(marks)
    assert benchmark.columns(means) == {"MVBench": 50}
    assert means["accuracy_answered"]["overall"].value == 1
    assert means["accuracy"]["task=action_sequence"].value == 1
    assert MVBench(tmp_path, tmp_path, "official").questions()[0].prefill == "Best option:("
    assert len(MVBENCH_TASKS) == 20


# ---------------------------------------------------------------------- open answers
def test_activitynetqa(tmp_path: Path) -> None:
    write(tmp_path / "test_q.json", [{"video_name": "abc", "question": "is he old", "question_id": "v_abc_1"}])
    write(tmp_path / "test_a.json", [{"answer": "no", "type": 3, "question_id": "v_abc_1"}])
    benchmark = ActivityNetQA(tmp_path, VIDEOS)
    (question,) = benchmark.questions()
    assert question.prompt == "is he old? Answer the question using a single word or phrase."
    assert (question.media, question.max_new_tokens) == (Media(VIDEOS / "v_abc.mp4"), 64)
    rows = write(
        tmp_path / "rows.jsonl", [{**json.loads((tmp_path / f"test_{each}.json").read_text())[0]} for each in "q"]
    )
    merged = {**json.loads(rows.read_text()), "answer": "no", "type": 3}
    assert ActivityNetQA(write(tmp_path / "rows.json", [merged]), VIDEOS).questions() == [question]
    means = means_of(benchmark.mark([question], {question.id: "No."}, ExactJudge()))
    assert benchmark.columns(means) == {"ActNet-QA Acc.": 100, "ActNet-QA Score": 5}
    assert means["score"]["type=3"].value == 5


@pytest.mark.parametrize("published", [True, False])
def test_videochatgpt(tmp_path: Path, published: bool) -> None:
    if published:
        one = {"video_name": "v1", "question": "Q", "answer": "yes"}
        pair = [
            {"video_name": "v1", "question_1": "P", "question_2": "None", "answer": "yes"},
            {"video_name": "v1", "question_1": "None", "question_2": "R", "answer": "yes"},
        ]
        for name, rows in (("Generic", [one]), ("Temporal", [one]), ("Consistency", pair)):
            write(tmp_path / f"{name}.jsonl", rows)
    else:
        one = {"video_name": "v1", "Q": "Q", "A": "yes"}
        write(tmp_path / "generic_qa.json", [one])
        write(tmp_path / "temporal_qa.json", [one])
        write(tmp_path / "consistency_qa.json", [{"video_name": "v1", "Q1": "P", "Q2": "R", "A": "yes"}])
    benchmark = VideoChatGPT(tmp_path, VIDEOS)
    questions = benchmark.questions()
    assert [question.prompt for question in questions] == ["Q", "Q", "P", "R"]
    assert {question.max_new_tokens for question in questions} == {1024}
    responses = dict(zip([question.id for question in questions], ["Yes", "no", "yes", "yes!"], strict=True))
    means = means_of(benchmark.mark(questions, responses, ExactJudge()))
    assert {aspect: groups["overall"].value for aspect, groups in means.items()} == {
        "correctness": 5,
        "detail": 5,
        "context": 5,
        "temporal": 0,
        "consistency": 5,
    }
    assert benchmark.columns(means) == {"VCG": 4}


def test_inconsistent_answers(tmp_path: Path) -> None:
    for name in ("generic", "temporal"):
        write(tmp_path / f"{name}_qa.json", [])
    write(tmp_path / "consistency_qa.json", [{"video_name": "v1", "Q1": "P", "Q2": "R", "A": "yes"}])
    benchmark = VideoChatGPT(tmp_path, VIDEOS)
    questions = benchmark.questions()
    (mark,) = benchmark.mark(questions, {"consistency/0/1": "yes", "consistency/0/2": "no"}, ExactJudge())
    assert mark.values == {"consistency": 0}


# ---------------------------------------------------------------------- malformed files
@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("videomme", {**MME[0], "answer": "E"}, "none of 4 options"),
        ("videomme", {key: value for key, value in MME[0].items() if key != "options"}, "lacks 'options'"),
        ("longvideobench", LVB, "neither candidates nor option0"),
        ("longvideobench", {**LVB, "candidates": ["a"]}, "correct_choice 1 is none of 1"),
        ("activitynetqa", {"question": "q", "video_name": "v", "question_id": "1"}, "lacks 'answer'"),
    ],
)
def test_malformed(tmp_path: Path, name: Any, record: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        make_benchmark(name, write(tmp_path / "x.json", [record]), VIDEOS).questions()


def test_missing_parts(tmp_path: Path) -> None:
    for name, message in (("mvbench", "none of MVBench's 20"), ("videochatgpt", "neither generic_qa")):
        with pytest.raises(FormatError, match=message):
            make_benchmark(name, tmp_path, VIDEOS).questions()
    write(tmp_path / "test_q.json", [{"video_name": "v", "question": "q", "question_id": "1"}])
    write(tmp_path / "test_a.json", [])
    with pytest.raises(FormatError, match="has no answer to 1"):
        make_benchmark("activitynetqa", tmp_path, VIDEOS).questions()
    with pytest.raises(ConfigError, match="one set of prompts"):
        make_benchmark("activitynetqa", tmp_path, VIDEOS, "official")


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("gpt", {}, "judge='gpt': choose 'exact', 'minilm:FOLDER' or 'replay:FILE', or give judge_url"),
        ("minilm:", {}, "names no file"),
        ("exact", {"threshold": 0.5}, "judge_threshold=0.5 is for judge='minilm:FOLDER', not for 'exact'"),
        ("exact", {"url": "http://x"}, "judge_url is for a model behind an endpoint, not for judge='exact'"),
        ("replay:x", {"templates": Path("x")}, "judge_templates is for a model behind an endpoint"),
    ],
)
def test_judges_that_are_refused(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_judge(name, **more)


# ---------------------------------------------------------------------- means
def test_standard_error_counts_videos_not_questions() -> None:
    """Ten equal answers about one video tell no more than one answer."""
    single = clustered_mean([("a", 1), ("b", 0), ("c", 1), ("d", 0)])
    assert (single.value, single.error) == (0.5, 0.25)
    tenfold = clustered_mean(
        [(video, value) for video, value in [("a", 1), ("b", 0), ("c", 1), ("d", 0)] for _ in range(10)]
    )
    assert (tenfold.value, tenfold.error, tenfold.count) == (0.5, 0.25, 40)


# ---------------------------------------------------------------------- runs
class KilledError(Exception):
    """Stands for a run that ends in the middle."""


class Parrot:
    """Answers with the first letter it is offered, and can be made to fail."""

    def __init__(self, *, dies_after: int | None = None, broken: frozenset[str] = frozenset()) -> None:
        self.name = "parrot"
        self.asked: list[tuple[Media, str]] = []
        self._dies_after, self._broken = dies_after, broken

    def answer(self, media: Media, prompts: Sequence[Prompt]) -> Iterator[str]:
        if media.path.stem in self._broken:
            raise MediaError(ProblemKind.MISSING, media.path, "gone")
        for prompt in prompts:
            if len(self.asked) == self._dies_after:
                raise KilledError
            self.asked.append((media, prompt.text))
            yield "A"


@pytest.fixture
def small(tmp_path: Path) -> Benchmark:
    return VideoMME(write(tmp_path / "test.json", MME), VIDEOS)


def test_a_run(tmp_path: Path, small: Benchmark) -> None:
    told: list[tuple[int, int]] = []
    result = evaluate(
        small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL, progress=lambda *each: told.append(each)
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (result.columns, result.questions, result.judge) == ({"Short": 50, "Long": 0, "Avg.": 25}, 4, "none")
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["columns"] == result.columns
    assert saved["means"]["accuracy"]["overall"]["count"] == 4


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on(tmp_path: Path, small: Benchmark, torn: bool) -> None:
    whole = evaluate(small, Parrot(), ExactJudge(), tmp_path / "whole", identity=MODEL)
    with pytest.raises(KilledError):
        evaluate(small, Parrot(dies_after=3), ExactJudge(), tmp_path / "out", identity=MODEL)
    if torn:
        with (tmp_path / "out" / "responses.jsonl").open("a") as file:
            file.write('{"id": "002-2", "resp')
    second = Parrot()
    assert evaluate(small, second, ExactJudge(), tmp_path / "out", identity=MODEL) == whole
    assert len(second.asked) == 1
    third = Parrot()
    assert evaluate(small, third, ExactJudge(), tmp_path / "out", identity=MODEL) == whole
    assert third.asked == []


def test_a_folder_of_another_run_is_refused(tmp_path: Path, small: Benchmark) -> None:
    evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)
    other = VideoMME(tmp_path / "test.json", VIDEOS, "lmms-eval")
    with pytest.raises(ConfigError, match=r"holds another run .*protocol was"):
        evaluate(other, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)


@pytest.mark.parametrize(
    "other", [replace(MODEL, digest="c0de" * 16), replace(MODEL, dtype="bfloat16"), replace(MODEL, max_frames=8)]
)
def test_answers_of_another_model_are_refused(tmp_path: Path, small: Benchmark, other: ModelIdentity) -> None:
    """Whatever the models are called; nothing of the first run is touched."""
    evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for begin in (check_run, lambda *each: evaluate(small, Parrot(), ExactJudge(), each[-1], identity=other)):
        with pytest.raises(ConfigError, match="holds another run") as caught:
            begin(small, "parrot", other, tmp_path / "out")
        assert str(MODEL.to_json()) in str(caught.value)
        assert str(other.to_json()) in str(caught.value)
        assert f"give another folder (--out), or delete {tmp_path / 'out'}" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_model_under_another_name_goes_on(tmp_path: Path, small: Benchmark) -> None:
    evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)
    renamed = Parrot()
    renamed.name = "macaw"
    result = evaluate(small, renamed, ExactJudge(), tmp_path / "out", identity=MODEL)
    assert (result.model, renamed.asked) == ("macaw", [])


def test_a_folder_without_answers_is_taken_over(tmp_path: Path, small: Benchmark) -> None:
    with pytest.raises(MediaError):
        evaluate(small, Parrot(broken=frozenset({"yt001"})), ExactJudge(), tmp_path / "out", identity=MODEL)
    other = replace(MODEL, digest="c0de" * 16)
    assert evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=other).identity == other


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"model": "parrot"}, "has no digest of its model, so that the answers may be of another than 'parrot'"),
        (None, "holds answers, but run.json does not say whose"),
    ],
)
def test_runs_that_do_not_say_whose_they_are(tmp_path: Path, small: Benchmark, run: Any, message: str) -> None:
    evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)
    path = tmp_path / "out" / "run.json"
    path.unlink()
    if run is not None:
        path.write_text(json.dumps(run))
    with pytest.raises((ConfigError, FormatError), match=message + ".*or delete "):
        evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)


def test_videos_that_cannot_be_used(tmp_path: Path, small: Benchmark) -> None:
    with pytest.raises(MediaError):
        evaluate(small, Parrot(broken=frozenset({"yt002"})), ExactJudge(), tmp_path / "stop", identity=MODEL)
    result = evaluate(
        small, Parrot(broken=frozenset({"yt002"})), ExactJudge(), tmp_path / "skip", identity=MODEL, on_problem="skip"
    )
    assert result.questions == 2
    assert set(result.left_out) == {"002-1", "002-2"}
    assert "**2 questions were left out**, e.g.: missing file: /v/yt002.mp4: gone" in markdown([result])
    mended = evaluate(small, Parrot(), ExactJudge(), tmp_path / "skip", identity=MODEL, on_problem="skip")
    assert (mended.questions, mended.left_out) == (4, {})


def test_a_run_without_any_video(tmp_path: Path, small: Benchmark) -> None:
    none = Parrot(broken=frozenset({"yt001", "yt002"}))
    with pytest.raises(
        ConfigError, match=r"none of 4 questions of Video-MME could be asked, e.g. missing file: /v/yt001"
    ):
        evaluate(small, none, ExactJudge(), tmp_path / "out", identity=MODEL, on_problem="skip")
    assert not (tmp_path / "out" / "result.json").exists()
    empty = VideoMME(write(tmp_path / "none.json", []), VIDEOS)
    with pytest.raises(FormatError, match="hold no question"):
        evaluate(empty, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)


def test_questions_with_the_same_name(tmp_path: Path) -> None:
    benchmark = VideoMME(write(tmp_path / "test.json", [MME[0], MME[0]]), VIDEOS)
    with pytest.raises(FormatError, match="same name"):
        evaluate(benchmark, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)


# ---------------------------------------------------------------------- reports
def test_report_beside_the_paper(tmp_path: Path, small: Benchmark) -> None:
    text = markdown([evaluate(small, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)])
    assert "| model | Short | Medium | Long | Avg. |" in text
    assert "| Video-Ma²mba-3.1B (paper) | 57.6 | 42.7 | 35.4 | 45.2 |" in text
    assert "| parrot | 50.0 | - | 0.0 | 25.0 |" in text
    assert "| yes | 1 fps | 1 fps | 57.6 | 42.7 | 35.4 | 45.2 |" in text
    assert "| accuracy | duration=short | 50.00 ± " in text
    assert "parrot (5eed5eed, float32): 4 questions, no subtitles, official prompt." in text


def test_report_names_the_judge(tmp_path: Path) -> None:
    record = {"video_name": "v", "question": "q", "question_id": "1", "answer": "A", "type": 0}
    benchmark = ActivityNetQA(write(tmp_path / "x.json", [record]), VIDEOS)
    result = evaluate(benchmark, Parrot(), ExactJudge(), tmp_path / "out", identity=MODEL)
    assert result.judge == "exact"
    text = markdown([result])
    assert "| parrot | exact | 100.0 | 5.0 |" in text
    assert "| Video-Ma²mba-3.1B (paper) | gpt-3.5-turbo-0125 | 51.7 | 3.4 |" in text


def test_the_papers_tables_agree() -> None:
    """Table 1's 3.1B is the last row of table 4; averages are the means of the three lengths, but for rounding (0.13 in the
    paper's row of the 1.8B).
    """
    assert ABLATION[True, "1 fps", "1 fps"] == PAPER["Video-MME"]["Video-Ma²mba-3.1B"]
    for row in (*ABLATION.values(), *PAPER["Video-MME"].values()):
        assert abs(sum(row[name] for name in ("Short", "Medium", "Long")) / 3 - row["Avg."]) < 0.14


def test_results_of_several_benchmarks() -> None:
    def result(name: str, columns: dict[str, float]) -> Result:
        return Result(name, "p", "m", MODEL, "exact", 1, 0, {}, {}, columns)

    text = markdown([result("MVBench", {"MVBench": 50}), result("VideoChatGPT", {"VCG": 3.03})])
    assert text.index("## MVBench") < text.index("## VideoChatGPT")
    assert "| m | exact | 3.03 |" in text
