"""Results as tables in markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from magc.bench.cases import Case, Method, length_name
from magc.bench.result import Record, Result, Status, latest
from magc.paper import PAPER_TABLE_3, PAPER_TABLE_8
from magc.units import format_bytes, format_count

PAPER_NAMES = {"gc-off": "GC off", "gc-on": "GC on", "sqrt-gc": "Sqrt-GC", "ma-gc": "MA-GC"}
"""The paper's methods by their keys in `magc.paper`."""

_COUNTERPARTS = {Method.NONE: "gc-off", Method.PER_LAYER: "gc-on", Method.SQRT: "sqrt-gc"}
_PAPER_POWER = 10
_ENDED = {
    Status.OUT_OF_MEMORY: "-",
    Status.NO_PLAN: "no plan fits",
    Status.TOO_SLOW: "too slow",
    Status.SKIPPED: "-",
    Status.FAILED: "failed",
}
_NOTES = """\
- peak: most bytes allocated at a time in forward and backward, over weights and gradient buffers, the memory of CUDA graphs
  included; "-" is out of memory.
- tokens/s: of forward and backward, by the median step.
- predicted: by the planner, of the same, from measurements of single layers."""


@dataclass(frozen=True, slots=True)
class Section:
    """The results of one model and head on one device, the last of each case.

    Attributes:
        device, model, head: of all of them.
        results: by series in the order of the methods, then by length.
    """

    device: str
    model: str
    head: str
    results: tuple[Result, ...]

    @property
    def title(self) -> str:
        """A heading."""
        loss = "loss of the last token" if self.head == "last" else "loss of every token"
        return f"{self.model}, {loss}"

    @property
    def series(self) -> list[Case]:
        """Each series once."""
        return list(dict.fromkeys(result.case.series for result in self.results))

    @property
    def lengths(self) -> list[int]:
        """Ascending."""
        return sorted({result.case.tokens for result in self.results})

    def of(self, series: Case) -> list[Result]:
        """A series' results by length."""
        return [result for result in self.results if result.case.series == series]

    def at(self, series: Case, tokens: int) -> Result | None:
        """One of them."""
        return next((result for result in self.of(series) if result.case.tokens == tokens), None)


def sections(records: Iterable[Record]) -> list[Section]:
    """Results by device, model and head, as they come first; of a case that was repeated, the last."""
    grouped: dict[tuple[str, str, str], list[Result]] = {}
    for record in latest(records):
        case = record.result.case
        grouped.setdefault((record.facts.device, case.model, case.head), []).append(record.result)
    methods = list(Method)

    def order(result: Result) -> tuple[object, ...]:
        case = result.case
        budget = case.budget if isinstance(case.budget, int) else 0
        return methods.index(case.method), budget, case.label, case.tokens

    return [Section(*key, tuple(sorted(results, key=order))) for key, results in grouped.items()]


def paper_peaks(model: str, method: Method) -> dict[int, float]:
    """The paper's Table 3 for a model and the method's counterpart in it: GB by length."""
    row = PAPER_TABLE_3[counterpart(method)].get(model.removeprefix("mamba2-"), ())
    return {1 << power: gigabytes for power, gigabytes in enumerate(row, _PAPER_POWER)}


def counterpart(method: Method) -> str:
    """The paper's method that one is to be compared with."""
    return _COUNTERPARTS.get(method, "ma-gc")


def as_markdown(records: Sequence[Record], pictures: Sequence[str] = ()) -> str:
    """The report.

    Args:
        records: of any number of runs.
        pictures: files beside it.
    """
    parts = ["# magc bench"]
    facts = dict.fromkeys(str(record.facts) for record in latest(records))
    parts.append("\n".join(f"- {fact}" for fact in facts) or "No results.")
    commands = dict.fromkeys(record.facts.command for record in latest(records) if record.facts.command)
    if commands:
        parts.append("Measured by:\n\n" + "\n".join(f"    {command}" for command in commands))
    parts.append(_NOTES)
    parts.extend(f"![{name.partition('.')[0]}]({name})" for name in pictures)
    found = sections(records)
    several = len({section.device for section in found}) > 1
    for section in found:
        parts.append(f"## {section.title}{f' ({section.device})' if several else ''}")
        parts.extend(_section(section))
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    series = section.series
    heads = ("tokens", *(one.label for one in series))
    for title, cell in (("Peak memory", _peak), ("Tokens per second", _speed)):
        yield f"### {title}"
        yield _table(heads, (_row(section, tokens, cell) for tokens in section.lengths))
    if growth := list(_growth(section)):
        yield "### With length"
        yield _table(("method", "from", "to", "peak", "", "growth", "slowest, tokens/s", "fastest"), growth)
    if section.model == "mamba2-2.7b":
        speeds = "; ".join(
            f"{PAPER_NAMES[key]} {speed:,.0f} at {length_name(tokens)}"
            for key, (tokens, speed) in PAPER_TABLE_8.items()
        )
        yield f"The paper's Table 8 (A100 80GB), tokens per second: {speeds}."
    if lines := list(_beside_the_paper(section)):
        yield "### Beside the paper's Table 3"
        yield from lines
    measured = [result for result in section.results if result.status is Status.OK]
    if measured:
        yield "### Predicted and measured"
        columns = (
            "tokens",
            "method",
            "peak predicted",
            "measured",
            "",
            "step predicted",
            "measured",
            "",
            "host",
            "plan",
        )
        yield _table(columns, map(_predicted, measured))
    if pairs := list(_runner_pairs(section)):
        yield "### Eager and CUDA graphs"
        columns = ("tokens", "method", "tokens/s eager", "graphs", "", "peak eager", "graphs", "plan")
        yield _table(columns, pairs)
    for tokens in section.lengths:
        here = sorted((r for r in measured if r.case.tokens == tokens), key=lambda result: result.peak_bytes or 0)
        if sum(result.case.budget is not None for result in here) > 1:
            yield f"### Memory against speed at {length_name(tokens)} tokens"
            rows = ((result.case.label, _peak(result), _speed(result), result.plan) for result in here)
            yield _table(("method", "peak", "tokens/s", "plan"), rows)
    if notes := list(dict.fromkeys(result.message for result in measured if result.message)):
        yield "\n".join(f"- {_one_line(note)}" for note in notes)
    ended = [result for result in section.results if result.status is not Status.OK]
    if ended:
        yield "### Not measured"
        yield "\n".join(
            f"- {length_name(result.case.tokens)}, {result.case.label}: {result.status}"
            + (f" ({_one_line(result.message)})" if result.message else "")
            for result in ended
        )


def _growth(section: Section) -> Iterator[tuple[str, ...]]:
    """Series of several lengths: how much more memory the longest takes than the shortest, and the speeds."""
    for one in section.series:
        found = [result for result in section.of(one) if result.status is Status.OK]
        if len(found) < 2:
            continue
        first, last = found[0], found[-1]
        growth = (last.peak_bytes or 0) / (first.peak_bytes or 1) - 1
        lengths = (length_name(first.case.tokens), length_name(last.case.tokens))
        speeds = [result.tokens_per_second or 0 for result in found]
        peaks = (_peak(first), _peak(last), f"{growth:+.1%}")
        yield (one.label, *lengths, *peaks, format_count(min(speeds)), format_count(max(speeds)))


def _runner_pairs(section: Section) -> Iterator[tuple[str, ...]]:
    """Cases that were measured with both runners."""
    measured = {result.case: result for result in section.results if result.status is Status.OK}
    for case, eager in measured.items():
        graphs = measured.get(replace(case, runner="cuda-graph")) if case.runner == "eager" else None
        if graphs is None:
            continue
        plan = eager.plan if eager.plan == graphs.plan else f"{eager.plan}; graphs: {graphs.plan}"
        ratio = f"{(graphs.tokens_per_second or 0) / (eager.tokens_per_second or math.inf):.2f} x"
        peaks = (_peak(eager), _peak(graphs))
        yield (length_name(case.tokens), case.label, _speed(eager), _speed(graphs), ratio, *peaks, plan)


def _row(section: Section, tokens: int, cell: Callable[[Result], str]) -> tuple[str, ...]:
    found = (section.at(one, tokens) for one in section.series)
    return (length_name(tokens), *("" if result is None else cell(result) for result in found))


def _peak(result: Result) -> str:
    return _ENDED.get(result.status) or format_bytes(result.peak_bytes or 0)


def _speed(result: Result) -> str:
    return _ENDED.get(result.status) or format_count(result.tokens_per_second or 0)


def _beside_the_paper(section: Section) -> Iterator[str]:
    """Each of its methods with the counterparts measured here, and at how many lengths these take no more."""
    columns: list[tuple[str, dict[int, str], str]] = []
    wins: list[str] = []
    for key, name in PAPER_NAMES.items():
        series = [one for one in section.series if counterpart(one.method) == key]
        if not series:
            continue
        theirs = paper_peaks(section.model, series[0].method)
        if not theirs:
            return
        columns.append((f"{name} (paper)", {tokens: f"{peak:.1f}" for tokens, peak in theirs.items()}, "-"))
        for one in series:
            ours = {result.case.tokens: result for result in section.of(one)}
            columns.append((one.label, {tokens: _gigabytes(result) for tokens, result in ours.items()}, ""))
            shared = [tokens for tokens, result in ours.items() if result.peak_bytes is not None and tokens in theirs]
            if shared:
                fewer = sum((ours[tokens].peak_bytes or 0) / 1e9 <= theirs[tokens] + 0.05 for tokens in shared)
                more = sum(result.peak_bytes is not None and tokens not in theirs for tokens, result in ours.items())
                beyond = f", and {more} where the paper ran out of memory" if more else ""
                wins.append(f"- {one.label}: no more than {name} at {fewer} of {len(shared)} lengths{beyond}")
    lengths = [tokens for tokens in section.lengths if tokens >= 1 << _PAPER_POWER and not tokens & (tokens - 1)]
    if not lengths:
        return
    yield 'GB (10^9 bytes) without weights and gradients; the paper\'s are of an A100 80GB, "-" is out of memory.'
    rows = ((length_name(tokens), *(cells.get(tokens, other) for _, cells, other in columns)) for tokens in lengths)
    yield _table(("tokens", *(name for name, _, _ in columns)), rows)
    if wins:
        yield "\n".join(wins)


def _gigabytes(result: Result) -> str:
    return _ENDED.get(result.status) or f"{(result.peak_bytes or 0) / 1e9:.1f}"


def _predicted(result: Result) -> tuple[str, ...]:
    """A row: bytes and seconds, each predicted, measured, and how much the prediction is above."""
    cells = [length_name(result.case.tokens), result.case.label]
    peak, seconds = result.peak_bytes or 0, result.median_seconds or 0.0
    for predicted, measured, show in (
        (result.predicted_bytes, peak, format_bytes),
        (result.predicted_seconds, seconds, format_seconds),
    ):
        known = predicted is not None and measured
        cells += ["" if predicted is None else show(predicted), show(measured)]
        cells.append(f"{predicted / measured - 1:+.1%}" if known and predicted is not None else "")
    return (*cells, format_bytes(result.host_bytes) if result.host_bytes else "", result.plan)


def format_seconds(seconds: float) -> str:
    """``1.23 s``, below one second ``123 ms``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *body))
