"""The benchmark from the command line to its report."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec

from magc.bench.cases import Case, length_name
from magc.bench.report import as_markdown, format_seconds
from magc.bench.result import Facts, Record, Result, ResultsFile, Status, ran_out_of_memory
from magc.bench.settings import Settings, parse
from magc.bench.worker import Worker
from magc.errors import InputError, MissingExtraError
from magc.units import format_bytes, format_count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0; 130 when interrupted: what was measured is in the file, and the same command goes on.

    Raises:
        MagcError: arguments or a file that cannot work.
    """
    settings = parse(argv)
    deadline = time.monotonic() + settings.seconds
    screen = _Screen()
    file = ResultsFile(settings.file)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {settings.out}: cannot make this folder ({error.strerror})") from error
    records, notice = file.read()
    if notice is not None:
        screen.line(notice)
    try:
        if settings.cases:
            with Worker(settings.device) as worker:
                facts = replace(worker.facts(), command=settings.command)
                screen.line(str(facts))
                if settings.profile:
                    _profile(settings, screen, worker, facts, deadline)
                    return 0
                _measure(settings, screen, file, records, worker, facts, deadline)
    except KeyboardInterrupt:
        print(f"magc bench: interrupted; {file.path} has what was measured, the same command goes on", file=sys.stderr)
        return 130
    _render(settings, screen, records)
    return 0


def _measure(
    settings: Settings,
    screen: _Screen,
    file: ResultsFile,
    records: list[Record],
    worker: Worker,
    facts: Facts,
    deadline: float,
) -> None:
    """Measure what is missing; results are added to the file and to ``records``."""
    known: list[Result] = []
    if not settings.again:
        # Of a case that was repeated the last result counts.
        for record in records:
            if facts.is_same_run(record.facts, any_commit=settings.any_commit):
                known = [result for result in known if result.case != record.result.case] + [record.result]
    done = {result.case for result in known if _is_final(result, settings)}
    missing = [case for case in settings.cases if case not in done]
    if len(missing) < len(settings.cases):
        screen.line(f"{len(settings.cases) - len(missing)} of {len(settings.cases)} cases are in {file.path}")
    put_off: list[Case] = []
    for index, case in enumerate(missing, 1):
        place = f"[{index}/{len(missing)}] {case}"
        shorter = None if settings.all else ran_out_of_memory(known, case)
        if any(other.series == case.series for other in put_off) or deadline <= time.monotonic():
            put_off.append(case)
            continue
        if shorter is not None:
            message = f"ran out of memory at {length_name(shorter)} tokens"
            result = Result(case=case, status=Status.SKIPPED, message=message)
        else:
            effort = replace(settings.effort, seconds_left=deadline - time.monotonic())
            with screen.working(place) as progress:
                result = worker.measure(case, effort, progress)
        screen.line(f"{place}: {in_words(result)}")
        if result.status is Status.POSTPONED:
            put_off.append(case)
            continue
        record = Record(result, replace(facts, date=_now()))
        file.append(record)
        records.append(record)
        known.append(result)
    if put_off:
        screen.line(f"{len(put_off)} cases are left: the same command goes on with {put_off[0]}")


def _profile(settings: Settings, screen: _Screen, worker: Worker, facts: Facts, deadline: float) -> None:
    """Write ``profile-CASE.json`` and ``.md`` for each case."""
    for index, case in enumerate(settings.cases, 1):
        place = f"[{index}/{len(settings.cases)}] {case}"
        effort = replace(settings.effort, seconds_left=deadline - time.monotonic())
        with screen.working(place) as progress:
            found = worker.profile(case, effort, progress)
        if isinstance(found, Result):
            screen.line(f"{place}: {in_words(found)}")
            continue
        path = settings.out / f"profile-{re.sub('[^a-z0-9.]+', '-', str(case).lower().replace('^', ''))}"
        values = {"case": case.as_dict(), "facts": asdict(replace(facts, date=_now())), **found.as_dict()}
        path.with_name(f"{path.name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        path.with_name(f"{path.name}.md").write_text(f"{found.as_markdown()}\n{facts}\n", encoding="utf-8")
        idle = (
            f"GPU idle {found.loop.idle_share:.1%} in the loop over segments ({found.idle_by_clock:.1%} by the clock)"
        )
        screen.line(
            f"{place}: {idle}, {', '.join(f'{name} {share:.0%}' for name, share in found.categories.items())}; {path}.json, .md"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_final(result: Result, settings: Settings) -> bool:
    """Whether a rerun would not measure it again."""
    match result.status:
        case Status.FAILED:
            return False
        case Status.SKIPPED:
            return not settings.all
        case Status.TOO_SLOW:
            return (result.expected_seconds or 0) > settings.effort.limit
        case _:
            return True


def in_words(result: Result) -> str:
    """One line."""
    peak, speed, seconds = result.peak_bytes, result.tokens_per_second, result.median_seconds
    if peak is None or speed is None or seconds is None:
        return f"{result.status}: {' '.join(result.message.split())}"
    return f"{format_bytes(peak)}, {format_count(speed)} tokens/s ({format_seconds(seconds)} a step), {result.plan}"


def _render(settings: Settings, screen: _Screen, records: Sequence[Record]) -> None:
    pictures: list[str] = []
    try:
        from magc.bench.figures import draw

        pictures = draw(records, settings.out)
    except MissingExtraError as error:
        screen.line(f"no pictures: {error}")
    report = settings.out / "report.md"
    report.write_text(as_markdown(records, pictures), encoding="utf-8")
    made = [str(report), *(str(settings.out / name) for name in pictures)]
    screen.line(f"results: {settings.file}; {', '.join(made)}")


class _Screen:
    """Lines, and on a terminal with rich what is being done."""

    def __init__(self) -> None:
        self._rich = None
        if sys.stdout.isatty() and find_spec("rich") is not None:
            from magc.demo.screen import Screen

            self._rich = Screen()

    def line(self, text: str) -> None:
        """A line."""
        if self._rich is None:
            print(text, flush=True)
        else:
            self._rich.line(text)

    @contextmanager
    def working(self, what: str) -> Generator[Callable[[str], None]]:
        """While something runs; yields what to tell news to."""
        if self._rich is None:
            yield lambda news: None
        else:
            with self._rich.working(what) as told:
                yield told
