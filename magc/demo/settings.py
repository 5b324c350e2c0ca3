"""What a run of the demo does, and the command line that says so."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from magc.errors import InputError
from magc.sizes import parse_tokens
from magc.units import format_bytes, parse_bytes

_DESCRIPTION = """\
Trains a small byte-level Mamba-2 language model on the source files of Python's standard library, in sequences whose
training would not fit the memory budget without magc. Compares the usual checkpointing strategies with magc's on a
shorter sequence: predicted and measured memory, speed, gradients. Writes report.md, memory.png, loss.png, plan.png and
results.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of the demo.

    Attributes:
        out: folder for the results.
        corpus: folder whose ``*.py`` files are read; None is the standard library.
        device: where the model trains.
        budget: device memory of one forward and backward in bytes (see `magc.GridCheckpoint`).
        seq_len: bytes of text in one training step, one sequence.
        steps: training steps.
        segment: tokens per segment, all layers at once, in place of the planner's choice, which depends on timings.
        threads: of operators on the CPU; None tries what is fastest.
        seed: of initial weights and of the order of files.
        compare_len: bytes of the sequence on which all strategies are compared; short enough to run without any.
        eval_bytes: held-out files are drawn until they have this many bytes.
        lr: peak learning rate.
        d_model, n_layer, d_state, headdim: sizes of the model.
    """

    out: Path
    corpus: Path | None
    device: torch.device
    budget: int
    seq_len: int
    steps: int
    segment: int | None
    threads: int | None
    seed: int
    compare_len: int
    eval_bytes: int
    lr: float
    d_model: int
    n_layer: int
    d_state: int
    headdim: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path | torch.device) else value for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What ``--quick`` changes."""

    budget: int
    seq_len: int
    steps: int
    compare_len: int
    eval_bytes: int
    n_layer: int


_FULL = _Defaults(64 << 20, 1 << 15, 32, 1 << 13, 128 << 10, 4)
_QUICK = _Defaults(12 << 20, 1 << 11, 6, 1 << 10, 8 << 10, 4)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as magc's other errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see magc demo --help")


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the command line.

    Raises:
        InputError, PlanError: an unknown option or a value that cannot work.
    """
    options = _parser().parse_args(argv)
    chosen = _QUICK if options.quick else _FULL
    seq_len = chosen.seq_len if options.seq_len is None else parse_tokens(options.seq_len)
    segment = None if options.segment is None else parse_tokens(options.segment)
    settings = Settings(
        out=Path(options.out),
        corpus=None if options.corpus is None else Path(options.corpus),
        device=_device(options.device),
        budget=chosen.budget if options.budget is None else parse_bytes(_size(options.budget)),
        seq_len=seq_len,
        steps=chosen.steps if options.steps is None else options.steps,
        segment=segment,
        threads=options.threads,
        seed=options.seed,
        compare_len=min(chosen.compare_len, seq_len),
        eval_bytes=chosen.eval_bytes,
        lr=0.02,
        d_model=64,
        n_layer=chosen.n_layer,
        d_state=32,
        headdim=32,
    )
    for name, value, least in (
        ("--steps", settings.steps, 1),
        ("--threads", settings.threads, 1),
        ("--seed", settings.seed, 0),
        ("--seq-len", settings.seq_len, 64),
    ):
        if value is not None and value < least:
            raise InputError(f"{name} {value}: give at least {least}")
    return settings


def _size(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; give auto or cpu"
        )
    return device


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="magc demo", description=_DESCRIPTION)
    option = parser.add_argument
    option("--out", default="magc-demo", metavar="DIR", help="folder for the results (magc-demo)")
    option("--corpus", metavar="DIR", help="folder whose *.py files are read, in place of the standard library")
    option("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    option(
        "--budget",
        metavar="SIZE",
        help=f"memory of one forward and backward, beyond weights and optimizer ({format_bytes(_FULL.budget)})",
    )
    option("--seq-len", metavar="N", help=f"bytes of text in one step, one sequence, e.g. 2^15 ({_FULL.seq_len})")
    option("--steps", type=int, metavar="N", help=f"training steps ({_FULL.steps})")
    option(
        "--segment",
        metavar="N",
        help="cut into segments of N tokens in place of the planner's choice, which depends on timings; with it "
        "and --threads, runs on a CPU repeat to the bit",
    )
    option("--threads", type=int, metavar="N", help="of operators on the CPU (tries what is fastest)")
    option("--seed", type=int, default=0, metavar="N", help="of initial weights and of the order of files (0)")
    option("--quick", action="store_true", help="a few seconds: short sequences, few steps")
    return parser
