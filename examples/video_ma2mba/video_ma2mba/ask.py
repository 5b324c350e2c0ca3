"""Questions about a video: `python -m video_ma2mba.ask VIDEO "question" --model FOLDER`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from video_ma2mba.command import errors_as_lines
from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.data.media import IMAGES
from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.data.video import probe
from video_ma2mba.errors import ConfigError, MediaError, ProblemKind
from video_ma2mba.model.answer import VideoAnswerer, check_limits
from video_ma2mba.model.device import usable_device
from video_ma2mba.model.folder import load_pretrained


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m video_ma2mba.ask",
        description="Ask about a video. It is read once, in memory that does not grow with it; every question goes on from "
        "the state after it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("video", type=Path, help="a video, an image, or a folder of frames")
    options.add_argument("questions", nargs="*", help="each is answered by itself; none: they are read line by line")
    options.add_argument("--model", type=Path, required=True, help="a folder that training saved")
    options.add_argument("--start", type=float, help="of the clip, in seconds")
    options.add_argument("--stop", type=float, help="of the clip, in seconds")
    options.add_argument("--max_new_tokens", type=int, default=256, help="length of an answer at most")
    options.add_argument("--max_frames", type=int, help="most frames, evenly spread; all at the model's rate otherwise")
    options.add_argument("--segment", type=int, default=4096, help="tokens read at once; bounds memory")
    options.add_argument(
        "--repetition", type=int, default=5, help="an answer ends before so many tokens that stood in it before"
    )
    options.add_argument("--device", help="the GPU if there is one, otherwise the CPU")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the parameters")
    return options


def run(arguments: list[str] | None = None) -> None:
    """Answer on the standard output; progress goes to the standard error."""
    options = parser().parse_args(arguments)
    with errors_as_lines():
        _ask(options)


def _ask(options: argparse.Namespace) -> None:
    device = _check(options)
    model = load_pretrained(options.model, device=device, dtype=getattr(torch, options.dtype))
    tokenizer = BpeTokenizer.from_folder(options.model)
    with tqdm(unit=" tokens", unit_scale=True, desc=f"reading {options.video.name}") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        answerer = VideoAnswerer(
            model,
            tokenizer,
            segment=options.segment,
            max_frames=options.max_frames,
            repetition=options.repetition,
            progress=progress,
        )
        media = Media(options.video, options.start, options.stop)
        asked: list[str] = []
        for answer in answerer.answer(media, _prompts(options, asked)):
            if len(options.questions) > 1:
                print(f"{asked[-1]}\n  {answer}", flush=True)
            else:
                print(answer, flush=True)


def _prompts(options: argparse.Namespace, asked: list[str]) -> Iterator[Prompt]:
    """Questions, noted in `asked` when they are taken."""
    for question in options.questions or _typed():
        asked.append(question)
        yield Prompt(question, max_new_tokens=options.max_new_tokens)


def _typed() -> Iterable[str]:
    """Lines of the standard input; an empty one is passed over."""
    shown = sys.stdin.isatty()
    while True:
        if shown:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _check(options: argparse.Namespace) -> torch.device:
    """Find out before the model is loaded that an option makes no sense or that there is nothing to ask about."""
    names = ("max_new_tokens", "max_frames", "segment", "repetition")
    check_limits(**{name: getattr(options, name) for name in names})
    start, stop = options.start, options.stop
    if start is not None and not 0 <= start < math.inf:
        raise ConfigError(f"start={start}: give seconds, 0 or more")
    if stop is not None and not (start or 0.0) < stop < math.inf:
        raise ConfigError(f"stop={stop}: give seconds after the start, {start or 0.0:g}")
    video: Path = options.video
    if not video.exists():
        raise MediaError(ProblemKind.MISSING, video, "there is no such file or folder")
    if video.is_file() and video.suffix.lower() not in IMAGES:
        probe(video)
    return usable_device(options.device)


if __name__ == "__main__":
    run()
