"""What `bench_video.py` writes: a row for each length of video, its table and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from magc.units import format_bytes

OPTIMIZER = (
    "AdamW (MasterAdamW): a float32 master copy of each bf16 weight and two float32 moments, 12 bytes a parameter, all of it "
    "on the one device; there before the measured step begins"
)
HEADER = (
    "| model | minutes | frames | tokens | over weights, gradients, optimizer | peak | reserved | forward | backward | norm "
    "| update | step | tokens/s | plan |\n" + "| --- " * 14 + "|"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One whole training step. Sizes in bytes of the device, times in seconds.

    Attributes:
        model: "3.1b", ...
        minutes: of video, at one frame a second.
        frames: of the video.
        tokens: of the sequence, before padding.
        padded: of the sequence, as it ran.
        runner: of magc's cells.
        budget: of one forward and backward over gradient sums; None for a plan by hand.
        plan: how the step ran.
        eager: which cells could not be captured, and why; empty if all could or none was to be.
        weights: of all parameters.
        optimizer: the state of AdamW, see `OPTIMIZER`.
        sums: float32 sums of the gradients over cells.
        delivered: gradients that the optimizer was given.
        peak: most bytes allocated at a time, by part of the step: "passes" (forward and backward), "update" (norm,
            clipping and update).
        reserved: most that the process had reserved of the device at the ends of the parts; 0 on the CPU.
        over: the most, over forward and backward, of what is allocated less weights, optimizer and the gradient buffers
            that exist at that time (`magc.bench.peak.Peak.over_gradients`).
        pinned: host memory for checkpoints.
        seconds: of the step's parts: "forward" and "backward" of the grid, "norm", "update" with clipping.
        encoded: frames that go forward through the tower in the step, recomputing in the grid's backward included.
        vision: of tower and projector, estimated from a few frames timed apart: their share of "forward" and "backward".
        planning: seconds that measuring the layers and planning took before, once per length.
        loss: mean over the answer's tokens, nats, before the update.
        norm: of the gradient of that loss.
    """

    model: str
    minutes: float
    frames: int
    tokens: int
    padded: int
    runner: str
    budget: int | None
    plan: str
    eager: str
    weights: int
    optimizer: int
    sums: int
    delivered: int
    peak: dict[str, int]
    reserved: int
    over: int
    pinned: int
    seconds: dict[str, float]
    encoded: int
    vision: dict[str, float]
    planning: float
    loss: float
    norm: float

    @property
    def step_seconds(self) -> float:
        """Of the whole step."""
        return sum(self.seconds.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the whole step by part, what is estimated of the tower taken out of forward and backward."""
        seen = {name: min(self.vision[name], self.seconds[name]) for name in ("forward", "backward")}
        return {
            "vision forward": seen["forward"],
            "language forward": self.seconds["forward"] - seen["forward"],
            "vision backward": seen["backward"],
            "language backward": self.seconds["backward"] - seen["backward"],
            "norm": self.seconds["norm"],
            "update": self.seconds["update"],
        }

    def __str__(self) -> str:
        """A row of a markdown table."""
        cells: list[object] = [self.model, f"{self.minutes:g}", f"{self.frames:,}", f"{self.tokens:,}"]
        cells += map(format_bytes, (self.over, max(self.peak.values()), self.reserved))
        cells += (f"{self.seconds[name]:.2f} s" for name in ("forward", "backward", "norm", "update"))
        cells += (f"{self.step_seconds:.2f} s", f"{self.tokens / self.step_seconds:,.0f}", self.plan)
        return f"| {' | '.join(map(str, cells))} |"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the sums of parts that a reader would want."""
        return {**asdict(self), "step_seconds": self.step_seconds, "parts": self.parts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Back from JSON."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def draw(rows: Sequence[Row], path: Path) -> None:
    """Memory over weights, gradients and optimizer by minutes of video, and the seconds of a step by part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, time = figure.subplots(1, 2)
    ordered = sorted(rows, key=lambda row: (row.model, row.runner, row.minutes))
    for series in dict.fromkeys((row.model, row.runner) for row in ordered):
        mine = [row for row in ordered if (row.model, row.runner) == series]
        label = f"{series[0].upper()}, {series[1]}"
        memory.plot([row.minutes for row in mine], [row.over / 2**30 for row in mine], "o-", label=label)
    memory.set(xlabel="minutes of video at 1 frame/s", ylabel="GiB over weights, gradients and optimizer")
    memory.set_xlim(left=0)
    memory.set_ylim(0, 1.25 * max(row.over for row in rows) / 2**30)
    memory.legend()
    names = [f"{row.model.upper()}\n{row.minutes:g} min" for row in ordered]
    below = [0.0] * len(ordered)
    for part in ordered[0].parts:
        heights = [row.parts[part] for row in ordered]
        time.bar(range(len(ordered)), heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    time.set_xticks(range(len(ordered)), names)
    time.set(ylabel="seconds of a training step", title="vision: estimated from frames timed apart")
    time.legend()
    figure.savefig(path, dpi=150)
