"""What a run of the benchmark does, and the command line that says so."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from magc.bench.cases import (
    HEADS,
    KEEPS,
    RUNNERS,
    SLOWDOWN,
    Budget,
    Case,
    Choice,
    Method,
    cases,
    model_name,
    parse_lengths,
)
from magc.bench.presets import PRESETS
from magc.bench.spec import parse_plan, plan_text
from magc.bench.work import Effort
from magc.errors import InputError
from magc.runners.choice import Runner
from magc.units import parse_bytes

_DESCRIPTION = """\
Measures training steps of published Mamba-2 sizes with random weights: peak memory over weights and gradient buffers, and
tokens per second, by length and method, beside the planner's predictions and the paper's numbers. Every case is written to
results.jsonl when it is done; the same command again goes on where it stopped. report.md, memory.png, throughput.png and
frontier.png are made in the end. Cases run in a process of their own: one that runs out of memory, or fails, is a row."""

_EPILOG = """\
presets:
{presets}

examples:
  magc bench --preset flat --minutes 9          # and again, until it says that nothing is left
  magc bench --models 2.7b --lengths 2^14..2^20 --methods auto,none --budget 6GiB --out results/
  magc bench --models 2.7b --lengths 2^21,2^22 --methods auto --budget 8GiB --host-budget 112GiB
  magc bench --models 1.3b --lengths 2^16 --plan tokens=2048,states=host --runner eager,cuda-graph
  magc bench --models 2.7b --lengths 2^15 --plan tokens=2048 --profile
  magc bench --preset smoke --device cpu
  magc bench --report magc-bench/results.jsonl
"""

_Word = TypeVar("_Word", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run.

    Attributes:
        out: folder for the results.
        file: of results.
        cases: to measure, in order; empty to render only.
        device: where.
        effort: how much time.
        seconds: after which no case is begun, and the one at work is stopped; infinity for no end.
        command: without folders, for the record.
        again: measure what the file already has.
        any_commit: results of other commits count as what the file has.
        all: measure what is longer than what ran out of memory.
        profile: record what the GPU does in each case, in place of measuring it.
    """

    out: Path
    file: Path
    cases: tuple[Case, ...]
    device: torch.device
    effort: Effort
    seconds: float
    command: str
    again: bool
    any_commit: bool
    all: bool
    profile: bool


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as magc's other errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see magc bench --help")


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the command line.

    Raises:
        InputError, PlanError: an unknown option or a value that cannot work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    effort = Effort(options.steps, options.patience, options.limit, options.disk)
    if effort.steps < 1:
        raise InputError(f"--steps {effort.steps}: give at least 1")
    if options.disk is not None and not Path(options.disk).is_dir():
        raise InputError(f"--disk {options.disk}: there is no such folder; make it first")
    if options.minutes is not None and not options.minutes > 0:
        raise InputError(f"--minutes {options.minutes:g}: give more than 0")
    found: dict[Case, None] = {}
    device = torch.device("cpu")
    if options.report is not None:
        file = Path(options.report)
        if not file.is_file():
            raise InputError(f"--report {file}: there is no such file")
        out = file.parent if options.out is None else Path(options.out)
    else:
        out = Path(options.out or "magc-bench")
        file = out / "results.jsonl"
        device = _device(options.device)
        for part in _preset(options.preset):
            found.update(dict.fromkeys(cases(_choice(parser.parse_args([*part, *arguments]), device))))
    if options.profile and device.type != "cuda":
        raise InputError(f"--profile: a profile is of a GPU, and this runs on {device}; give --device cuda")
    return Settings(
        out=out,
        file=file,
        cases=_by_model(found),
        device=device,
        effort=effort,
        seconds=math.inf if options.minutes is None else 60 * options.minutes,
        command=_command(arguments),
        again=options.again,
        any_commit=options.any_commit,
        all=options.all,
        profile=options.profile,
    )


def _by_model(found: Iterable[Case]) -> tuple[Case, ...]:
    """The same cases with those of a model together, else in order: making one takes longer than many a case."""
    together: dict[tuple[str, str], list[Case]] = {}
    for case in found:
        together.setdefault((case.model, case.keep), []).append(case)
    return tuple(case for group in together.values() for case in group)


def _preset(name: str | None) -> tuple[tuple[str, ...], ...]:
    """The options of a preset, part by part; one empty part without a preset.

    Raises:
        InputError: there is no such preset.
    """
    if name is None:
        return ((),)
    if name not in PRESETS:
        raise InputError(f"--preset {name}: give one of {', '.join(PRESETS)}")
    return PRESETS[name].parts


def _choice(options: argparse.Namespace, device: torch.device) -> Choice:
    budgets: list[Budget] = [
        "paper" if text == "paper" else parse_bytes(_size(text)) for text in _parts(options.budget or "")
    ]
    plans = [plan_text(parse_plan(text)) for text in options.plan or ()]
    if options.methods is not None:
        methods = _words("--methods", options.methods, tuple(Method))
    elif plans and not budgets:
        methods = [Method.PLAN]
    else:
        left_out = {Method.AUTO} if not budgets else set[Method]()
        methods = [method for method in Method if method not in left_out | ({Method.PLAN} if not plans else set())]
    return Choice(
        models=[model_name(text) for text in _parts(options.models)],
        lengths=parse_lengths(options.lengths),
        methods=methods,
        heads=_words("--head", options.head, HEADS),
        budgets=budgets,
        plans=plans,
        slowdown=options.slowdown or None,
        host_budget=0 if options.host_budget is None else parse_bytes(_size(options.host_budget)),
        disk=options.disk is not None,
        runners=_runners(options.runner, device),
        keeps=_words("--keep", options.keep, KEEPS),
    )


_FOLDERS = ("--out", "--disk", "--report")


def _command(arguments: Sequence[str]) -> str:
    """The command, without names of folders, which are nobody else's."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif (option := argument.partition("=")[0]) in _FOLDERS:
            skip = option == argument
            if option == "--disk":
                kept += [option, "DIR"]
        else:
            kept.append(argument)
    return shlex.join(["magc", "bench", *kept])


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _size(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _words(option: str, text: str, known: Sequence[_Word]) -> list[_Word]:
    """A list of known words.

    Raises:
        InputError: one is not known, or there is none.
    """
    by_name = {str(word): word for word in known}
    parts = _parts(text)
    if not parts or not set(parts) <= set(by_name):
        raise InputError(f"{option} {text}: give one or several of {', '.join(by_name)}, with commas between them")
    return [by_name[part] for part in dict.fromkeys(parts)]


def _runners(text: str | None, device: torch.device) -> list[Runner]:
    if text is None:
        return ["cuda-graph" if device.type == "cuda" else "eager"]
    runners = _words("--runner", text, RUNNERS)
    if "cuda-graph" in runners and device.type != "cuda":
        raise InputError(f"--runner {text}: CUDA graphs need a GPU, and this runs on {device}; give eager")
    return runners


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; give auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="magc bench",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(presets="\n".join(f"  {name:<10}{one.question}" for name, one in PRESETS.items())),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--preset", metavar="NAME", help=f"a set of cases: {', '.join(PRESETS)}; other options change it")
    option("--models", default="2.7b", metavar="LIST", help="130m, 370m, 780m, 1.3b, 2.7b, or tiny (2.7b)")
    option(
        "--lengths", default="2^14..2^20", metavar="LIST", help="tokens, such as 2^14..2^20 or 1000,2^14 (2^14..2^20)"
    )
    option(
        "--methods",
        metavar="LIST",
        help="of none, per-layer, sqrt, paper, auto, minimum, plan (all that the other options allow)",
    )
    option("--head", default="last", metavar="LIST", help="loss of the last token or of all: last, full (last)")
    option(
        "--budget",
        metavar="LIST",
        help="of auto: memory over weights and gradient buffers, e.g. 6GiB or 4GiB,6GiB, or paper",
    )
    option(
        "--plan", action="append", metavar="PLAN", help="a plan of your own, e.g. tokens=2048,states=host; repeatable"
    )
    option(
        "--slowdown",
        type=float,
        default=SLOWDOWN,
        metavar="N",
        help=f"of minimum: may be N times as slow as the fastest plan, 0 for any time ({SLOWDOWN:g})",
    )
    option("--host-budget", metavar="SIZE", help="of auto and minimum: host memory for checkpoints; none without this")
    option("--disk", metavar="DIR", help="of auto and minimum: a folder for checkpoints on disk; none without this")
    option("--runner", metavar="LIST", help="of paper, auto, minimum and plan: eager, cuda-graph (cuda-graph on a GPU)")
    option("--keep", default="states", metavar="LIST", help="what layers keep: projection, states, outputs (states)")
    option("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    option("--out", metavar="DIR", help="folder for the results (magc-bench)")
    option("--minutes", type=float, metavar="N", help="stop after so many minutes; the same command goes on")
    option("--steps", type=int, default=3, metavar="N", help="timed steps at most, of which the median counts (3)")
    option("--patience", type=float, default=10.0, metavar="SECONDS", help="no more steps are timed after these (10)")
    option(
        "--limit", type=float, default=600.0, metavar="SECONDS", help="leave out a case whose step takes longer (600)"
    )
    option("--profile", action="store_true", help="record what the GPU does in each case, in place of measuring it")
    option("--again", action="store_true", help="measure also what the file has from this device and commit")
    option("--any-commit", action="store_true", help="leave out also what the file has from other commits")
    option("--all", action="store_true", help="measure also what is longer than what ran out of memory")
    option("--report", metavar="FILE", help="measure nothing: make tables and pictures of a file of results")
    return parser
