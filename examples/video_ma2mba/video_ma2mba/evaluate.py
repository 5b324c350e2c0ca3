"""Benchmarks from the command line: `python -m video_ma2mba.evaluate --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from video_ma2mba.command import errors_as_lines
from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.evaluation.choices import LongVideoBench, MVBench, Prompts, VideoMME
from video_ma2mba.evaluation.identity import ModelIdentity, readable_name
from video_ma2mba.evaluation.judges import DEFAULT_TEMPLATES, ExactJudge, Judge, OpenAIJudge, ReplayJudge
from video_ma2mba.evaluation.minilm import MiniLMJudge
from video_ma2mba.evaluation.open_ended import ActivityNetQA, VideoChatGPT
from video_ma2mba.evaluation.questions import Benchmark
from video_ma2mba.evaluation.report import markdown
from video_ma2mba.evaluation.run import check_run, evaluate
from video_ma2mba.model.answer import VideoAnswerer, check_limits, name_with_frames
from video_ma2mba.model.device import usable_device
from video_ma2mba.model.folder import load_pretrained

BenchmarkName = Literal["videomme", "longvideobench", "mvbench", "activitynetqa", "videochatgpt"]


def make_benchmark(name: BenchmarkName, annotations: Path, videos: Path, prompts: Prompts | None = None) -> Benchmark:
    """A benchmark in its local copy; prompts None are the benchmark's default."""
    choice: dict[str, Prompts] = {} if prompts is None else {"prompts": prompts}
    match name:
        case "videomme":
            return VideoMME(annotations, videos, **choice)
        case "mvbench":
            return MVBench(annotations, videos, **choice)
        case _ if choice:
            raise ConfigError(f"{name} has one set of prompts; leave prompts={prompts!r} out")
        case "longvideobench":
            return LongVideoBench(annotations, videos)
        case "activitynetqa":
            return ActivityNetQA(annotations, videos)
        case "videochatgpt":
            return VideoChatGPT(annotations, videos)


def make_judge(
    name: str, *, url: str | None = None, templates: Path | None = None, threshold: float | None = None
) -> Judge:
    """A judge: "exact", "minilm:FOLDER", "replay:FILE" or, with a url, the name of a model behind it.

    Raises:
        ConfigError: there is no such judge, or an option is another judge's. FormatError: its file or folder is not one.
    """
    kind, _, rest = name.partition(":")
    if threshold is not None and kind != "minilm":
        raise ConfigError(f"judge_threshold={threshold} is for judge='minilm:FOLDER', not for {name!r}; leave it out")
    if name == "exact" or kind in ("minilm", "replay"):
        if given := [each for each, value in (("judge_url", url), ("judge_templates", templates)) if value is not None]:
            raise ConfigError(f"{' and '.join(given)} is for a model behind an endpoint, not for judge={name!r}")
        if name == "exact":
            return ExactJudge()
        if not rest:
            raise ConfigError(f"judge={name!r} names no file; give 'minilm:FOLDER' or 'replay:FILE'")
        if kind == "replay":
            return ReplayJudge(rest)
        return MiniLMJudge(rest) if threshold is None else MiniLMJudge(rest, threshold)
    if url is None:
        raise ConfigError(
            f"judge={name!r}: choose 'exact', 'minilm:FOLDER' or 'replay:FILE', or give judge_url for a model's name"
        )
    prompts = DEFAULT_TEMPLATES
    if templates is not None:
        try:
            prompts = {str(aspect): str(text) for aspect, text in json.loads(templates.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise FormatError(f"{templates} must hold an object of prompts by aspect ({error})") from error
    return OpenAIJudge(url, name, templates=prompts)


def main(
    benchmark: BenchmarkName,
    annotations: Path,
    videos: Path,
    model: Path,
    out: Path,
    name: str | None = None,
    prompts: Prompts | None = None,
    judge: str = "exact",
    judge_url: str | None = None,
    judge_templates: Path | None = None,
    judge_threshold: float | None = None,
    max_frames: int | None = None,
    segment: int = 4096,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    on_problem: Literal["stop", "skip"] = "stop",
) -> None:
    """Run a benchmark on a model; the same command goes on with a run that was stopped.

    Args:
        benchmark: which one.
        annotations: its questions: a file, or a folder for mvbench, videochatgpt and activitynetqa's own JSON.
        videos: the folder of its videos.
        model: a folder that `save_pretrained` wrote, with its tokenizer.
        out: a folder for responses, verdicts and results of this model; one that holds another's is refused.
        name: of the model in the results; None is the last two parts of its folder, "stage2/model".
        prompts: of videomme and mvbench.
        judge: of open answers: exact, minilm:FOLDER, replay:FILE, or a model's name with judge_url.
        judge_url: an OpenAI-compatible endpoint for chat completions.
        judge_templates: JSON of prompts by aspect; None uses this package's own.
        judge_threshold: similarity from which minilm:FOLDER takes an answer for right; None is its default, 0.75.
        max_frames: most frames of a video.
        segment: tokens read at once.
        device: None is the GPU if there is one.
        dtype: of the parameters.
        on_problem: stop at a video that cannot be used, or skip its questions.
    """
    check_limits(segment=segment, max_frames=max_frames)
    place = usable_device(device)
    asked = make_benchmark(benchmark, annotations, videos, prompts)
    asked_judge = make_judge(judge, url=judge_url, templates=judge_templates, threshold=judge_threshold)
    identity, shown = ModelIdentity.of_folder(model, dtype=dtype, max_frames=max_frames), name or readable_name(model)
    check_run(asked, name_with_frames(shown, max_frames), identity, out, on_problem)
    answerer = VideoAnswerer(
        load_pretrained(model, device=place, dtype=getattr(torch, dtype)),
        BpeTokenizer.from_folder(model),
        name=shown,
        segment=segment,
        max_frames=max_frames,
    )
    with tqdm(unit=" questions", desc=benchmark) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = evaluate(
            asked,
            answerer,
            asked_judge,
            out,
            identity=identity,
            on_problem=on_problem,
            progress=progress,
        )
    text = markdown([result])
    (out / "result.md").write_text(text, encoding="utf-8")
    print(text)


def run(arguments: list[str] | None = None) -> None:
    """`main` with arguments of the command line, which may come from a YAML file (`--config`)."""
    with errors_as_lines():
        auto_cli(main, args=arguments, as_positional=False)


if __name__ == "__main__":
    run()
