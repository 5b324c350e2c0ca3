"""The demo's results as tables, as markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from magc.demo.compare import Comparison, Row
from magc.demo.settings import Settings
from magc.demo.train import Evaluation, Training, TrainingPlan
from magc.units import format_bytes, format_count

COLUMNS = ("strategy", "measured", "predicted", "ratio", "forwards", "tokens/s", "grad. diff.")
REACH_COLUMNS = ("strategy", "longest sequence (tokens)")
LOSS_COLUMNS = ("loss on held-out files", "nats per byte", "bits per byte")
TRAINING_COLUMNS = ("memory of one step", "")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the demo ran."""

    device: str
    cores: int
    threads: int
    torch: str
    python: str
    system: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """The machine at work."""
        cuda = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
            system=platform.system(),
        )

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.device}, {self.cores} cores, {self.threads} threads, torch {self.torch}, Python {self.python}, "
            f"{self.system}"
        )


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a run found out.

    Attributes:
        settings: of the run.
        machine: where it ran.
        parameters: of the model.
        held_out: files, relative to the corpus.
        comparison: of the strategies.
        plan: of the training.
        training: what happened.
        before: on the held-out files.
        after: the same.
        seconds: the whole run.
    """

    settings: Settings
    machine: Machine
    parameters: int
    held_out: tuple[str, ...]
    comparison: Comparison
    plan: TrainingPlan
    training: Training
    before: Evaluation
    after: Evaluation
    seconds: float

    def as_json(self) -> str:
        """For programs."""
        values: dict[str, Any] = {
            "settings": self.settings.as_dict(),
            "machine": asdict(self.machine),
            "parameters": self.parameters,
            "held_out": {
                "files": list(self.held_out),
                "before": self.before.as_dict(),
                "after": self.after.as_dict(),
            },
            "comparison": self.comparison.as_dict(),
            "training": {
                "plan": str(self.plan.plan),
                "predicted_bytes": self.plan.peak_bytes,
                "predicted_bytes_without_checkpoints": self.plan.plain_bytes,
                **self.training.as_dict(),
            },
            "seconds": self.seconds,
        }
        return json.dumps(values, indent=2) + "\n"

    def as_markdown(self) -> str:
        """For people."""
        settings, training, plan = self.settings, self.training, self.plan
        rows = [cells(row) for row in self.comparison.rows]
        reach = reach_rows(self.comparison)
        text = f"""\
# magc demo

A byte-level Mamba-2 language model ({self.parameters:,} parameters, {settings.n_layer} layers of width \
{settings.d_model}) trained on Python source files for {settings.steps} steps of one sequence of \
{settings.seq_len:,} bytes, within a budget of {format_bytes(settings.budget)} for forward and backward.

Machine: {self.machine}. The whole run took {self.seconds:.0f} s.

## Training

{_markdown(TRAINING_COLUMNS, training_rows(settings, plan, training))}

Plan: {plan.plan}. {format_count(training.tokens_per_second)} tokens/s.

{_markdown(LOSS_COLUMNS, loss_rows(self.before, self.after))}

Held out and never trained on: {self.after.tokens:,} bytes in {self.after.files} file(s), each one sequence (the \
longest has {self.after.longest:,} bytes), streamed piece by piece with the states carried on.

![training loss](loss.png)

![plan](plan.png)

## Strategies compared

Forward and backward of one sequence of {self.comparison.tokens:,} bytes, which all of them can run.

{_markdown(COLUMNS, rows)}

"none" is training without checkpoints; "per layer" keeps every layer's input, "sqrt(L)" that of every \
{round(settings.n_layer**0.5)} layers (Chen et al. 2016); "MA-GC, paper" cuts layers and tokens into cells of the size \
that Eq. 12-16 of Lee et al. 2024 give; "MA-GC, planned" is the fastest plan that magc finds within the budget.

- measured, predicted: peak bytes of live tensors beyond what there was before the call (weights, inputs), by \
`magc.MemoryMeter` at the second call or later, and by `magc.forecast`; the ratio is predicted over measured.
- forwards: how often a cell is run forward, 1 without recomputation.
- tokens/s: forward and backward, timed without the meter.
- grad. diff.: the largest relative difference of a parameter's gradient from that of "none", by norm; float32 sums \
taken in another order differ by about 1e-6.

Longest sequence that {format_bytes(settings.budget)} holds, as predicted:

{_markdown(REACH_COLUMNS, reach)}

![memory](memory.png)
"""
        return text


def cells(row: Row) -> tuple[str, ...]:
    """A row of the comparison under `COLUMNS`."""
    return (
        row.name,
        format_bytes(row.measured_bytes),
        format_bytes(row.predicted_bytes),
        f"{row.ratio:.3f}",
        f"{row.forwards_per_cell:.2f}",
        format_count(row.tokens_per_second),
        f"{row.gradient_difference:.1e}" if row.gradient_difference else "0",
    )


def reach_of(row: Row) -> str:
    """The longest sequence within the budget."""
    return "no end found" if row.longest is None else format_count(row.longest)


def reach_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """How far the budget reaches by strategy, under `REACH_COLUMNS`."""
    return [(row.name, reach_of(row)) for row in comparison.rows]


def training_rows(settings: Settings, plan: TrainingPlan, training: Training | None) -> list[tuple[str, str]]:
    """What a training step takes, and what it would take."""
    times = plan.plain_bytes / settings.budget
    rows = [
        ("without checkpoints (predicted)", f"{format_bytes(plan.plain_bytes)}, {times:.1f} x the budget"),
        ("budget", format_bytes(settings.budget)),
        ("with magc, predicted", format_bytes(plan.peak_bytes)),
    ]
    if training is not None:
        rows.append(("with magc, measured", format_bytes(training.peak_bytes)))
    return rows


def loss_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    """Loss on held-out files."""
    return [
        (when, f"{found.nats_per_byte:.3f}", f"{found.bits_per_byte:.3f}")
        for when, found in (("before", before), ("after", after))
    ]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, marks, *rows))
