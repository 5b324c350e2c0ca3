"""What a GPU did in a training step: shares of matrix products, copies and the rest, and of doing nothing.

Pure functions over events; recording them is `magc.bench.profiling`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

PRODUCTS, COPIES, OTHER = "matrix products", "copies and fills", "other"
SCAN, CONVOLUTION, GATED, ADDED = "scan", "convolution", "gated norm", "addition and norm"

_GPU = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "copy"}
_GAP_US = 1.0
"""Shorter pauses between kernels count as idle, but are not told apart."""

_OURS = {
    **dict.fromkeys(("chunk_steps", "sweep_forward", "scan", "sweep_backward", "roles"), SCAN),
    **dict.fromkeys(("input_gradient", "finish", "pass_states", "scan_backward", "added_gradients"), SCAN),
    **dict.fromkeys(("conv_forward", "conv_backward"), CONVOLUTION),
    **dict.fromkeys(("gated_forward", "gated_backward"), GATED),
    **dict.fromkeys(("add_forward", "add_backward"), ADDED),
}
"""Kernels of `magc_kernels` by their names."""

_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (PRODUCTS, ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv", "xmma")),
    (COPIES, ("memcpy", "memset", "copy_kernel", "copy_device", "fillfunctor", "catarray", "copybatched")),
)
"""Parts of the names of other kernels, in lower case; the first that matches decides."""


class GpuEvent(NamedTuple):
    """Something that a GPU did.

    Attributes:
        name: of the kernel or copy.
        kind: ``"kernel"`` or ``"copy"``.
        start, duration: microseconds.
    """

    name: str
    kind: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """Microseconds."""
        return self.start + self.duration


@dataclass(frozen=True, slots=True)
class Busy:
    """How busy a GPU was in a span of time.

    Attributes:
        span_us: its length in microseconds.
        busy_us: when at least one kernel or copy ran.
        gaps: pauses of a microsecond and more.
        longest_gap_us: of these.
    """

    span_us: float
    busy_us: float
    gaps: int
    longest_gap_us: float

    @property
    def idle_share(self) -> float:
        """Share of the span in which nothing ran."""
        return 1 - self.busy_us / self.span_us if self.span_us else 0.0


@dataclass(frozen=True, slots=True)
class KernelTotal:
    """All runs of one kernel.

    Attributes:
        name: the kernel's.
        category: what it is counted as.
        count: runs.
        us: microseconds of all of them.
        share: of all kernels' and copies' time.
    """

    name: str
    category: str
    count: int
    us: float
    share: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A step's.

    Attributes:
        what: was profiled, in words.
        tokens: of the step.
        layers: of the model.
        wall_us: the same step without the profiler, which slows CUDA graphs down.
        step: from the first kernel to the last.
        loop: the same without the start and the end, a tenth of the time each: the loop over segments.
        events: kernels and copies.
        event_us: time of all of them, those at the same time both counted.
        categories: share of kernels' and copies' time by category, largest first.
        kernels: that took most, largest first.
    """

    what: str
    tokens: int
    layers: int
    wall_us: float
    step: Busy
    loop: Busy
    events: int
    event_us: float
    categories: dict[str, float]
    kernels: tuple[KernelTotal, ...]

    @property
    def idle_by_clock(self) -> float:
        """Share of the step without the profiler in which nothing ran, its kernels taken to be as fast as under it."""
        return max(0.0, 1 - self.step.busy_us / self.wall_us)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = {**asdict(self), "idle_by_clock": self.idle_by_clock}
        for name, busy in (("step", self.step), ("loop", self.loop)):
            values[name]["idle_share"] = busy.idle_share
        return values

    def as_markdown(self) -> str:
        """For people."""
        rows = [("whole step", self.step), ("loop over segments", self.loop)]
        lines = [f"# Profile: {self.what}", "", "| span | ms | GPU idle | pauses from 1 us | longest |"]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        lines += [
            f"| {name} | {busy.span_us / 1e3:,.1f} | {busy.idle_share:.1%} | {busy.gaps:,} | {busy.longest_gap_us:,.0f} us |"
            for name, busy in rows
        ]
        lines += [
            "",
            f"Without the profiler the step takes {self.wall_us / 1e3:,.1f} ms: GPU idle {self.idle_by_clock:.1%}.",
        ]
        lines += ["", "| what | share of kernels' and copies' time | us per token and layer |", "| --- | ---: | ---: |"]
        each = self.event_us / (self.tokens * self.layers)
        lines += [f"| {name} | {share:.1%} | {share * each:.3f} |" for name, share in self.categories.items()]
        lines += [
            "",
            "| kernel | counted as | runs | ms | mean us | share |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {_short(kernel.name)} | {kernel.category} | {kernel.count:,} | {kernel.us / 1e3:,.1f} | "
            f"{kernel.us / kernel.count:,.1f} | {kernel.share:.1%} |"
            for kernel in self.kernels
        ]
        return "\n".join(lines) + "\n"


def read_events(trace: Mapping[str, Any]) -> list[GpuEvent]:
    """What the GPU did by a trace that torch.profiler exported (Chrome's trace event format), by start."""
    found = [
        GpuEvent(event["name"], _GPU[event["cat"]], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _GPU
    ]
    return sorted(found, key=lambda event: (event.start, event.end))


def category(event: GpuEvent) -> str:
    """What an event is counted as, by its name."""
    if event.kind == "copy":
        return COPIES
    if event.name in _OURS:
        return _OURS[event.name]
    name = event.name.lower()
    return next((counted for counted, signs in _SIGNS if any(sign in name for sign in signs)), OTHER)


def busy(events: Iterable[GpuEvent], start: float, end: float) -> Busy:
    """How busy a GPU was between two times.

    Args:
        events: by start; may overlap.
        start: microseconds.
        end: microseconds.
    """
    covered, longest, gaps = 0.0, 0.0, 0
    reached = start
    for event in events:
        begin, stop = max(event.start, start), min(event.end, end)
        if stop <= reached:
            continue
        if (pause := begin - reached) >= _GAP_US:
            gaps, longest = gaps + 1, max(longest, pause)
        covered += stop - max(begin, reached)
        reached = stop
    if (pause := end - reached) >= _GAP_US:
        gaps, longest = gaps + 1, max(longest, pause)
    return Busy(end - start, covered, gaps, longest)


def summarize(
    what: str,
    events: Sequence[GpuEvent],
    wall_us: float,
    *,
    tokens: int,
    layers: int,
    top: int = 20,
    trim: float = 0.1,
) -> Profile:
    """The profile of a step.

    Args:
        what: it is of, in words.
        events: by start, at least one.
        wall_us: microseconds of the same step without the profiler.
        tokens: of the step.
        layers: of the model.
        top: so many kernels are listed.
        trim: share of the time at the start and at the end that is not counted to the loop over segments.

    Raises:
        ValueError: there are no events.
    """
    if not events:
        raise ValueError(f"{what}: the trace has no kernels or copies of a GPU")
    start, end = events[0].start, max(event.end for event in events)
    edge = trim * (end - start)
    total = sum(event.duration for event in events) or 1.0
    by_category: dict[str, float] = {}
    by_kernel: dict[tuple[str, str], list[float]] = {}
    for event in events:
        counted = category(event)
        by_category[counted] = by_category.get(counted, 0.0) + event.duration
        by_kernel.setdefault((event.name, counted), []).append(event.duration)
    kernels = [
        KernelTotal(name, counted, len(times), sum(times), sum(times) / total)
        for (name, counted), times in by_kernel.items()
    ]
    return Profile(
        what=what,
        tokens=tokens,
        layers=layers,
        wall_us=wall_us,
        step=busy(events, start, end),
        loop=busy(events, start + edge, end - edge),
        events=len(events),
        event_us=total,
        categories={name: us / total for name, us in sorted(by_category.items(), key=lambda item: -item[1])},
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.us)[:top]),
    )


def _short(name: str, length: int = 90) -> str:
    """A kernel's name in one cell of a table."""
    name = name.replace("|", "/")
    return name if len(name) <= length else f"{name[: length - 1]}…"
