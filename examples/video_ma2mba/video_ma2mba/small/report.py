"""The small run's results as tables, markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from video_ma2mba.evaluation.questions import Mean
from video_ma2mba.small.measure import Answer, accuracy
from video_ma2mba.small.pipeline import BASELINES, FINAL, SeedResult
from video_ma2mba.small.questions import KINDS, OPTIONS
from video_ma2mba.small.settings import Settings

CHANCE = 1 / OPTIONS
FIRST_BAR, TRAINED_BAR, LONGER_BAR, BASELINE_GAP = 0.60, 0.60, 0.55, 0.15
"""What a run should reach; baselines stay at least the gap below at trained lengths."""


def pooled(results: Sequence[SeedResult], name: str) -> list[Answer]:
    """Answers of all seeds."""
    return [answer for result in results for answer in result.answers[name]]


def length_rows(settings: Settings, results: Sequence[SeedResult]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: accuracy by length; "trained" is over the trained lengths."""
    sizes = settings.sizes
    head = [
        "",
        *(f"{each} s" for each in sizes.lengths),
        "trained",
        *(f"{each} s, unseen" for each in sizes.longer),
    ]
    rows: list[list[str]] = []
    for name in results[0].answers:
        answers = pooled(results, name)
        parts = [(each,) for each in sizes.lengths] + [sizes.lengths] + [(each,) for each in sizes.longer]
        rows.append([name, *(shown(accuracy(answers, seconds=part)) for part in parts)])
    return head, rows


def kind_rows(settings: Settings, results: Sequence[SeedResult]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: kinds of questions at trained lengths and beyond, and the baselines at trained ones."""
    sizes = settings.sizes
    head = ["kind", "trained", "unseen", *BASELINES.values()]
    final = pooled(results, FINAL)
    rows: list[list[str]] = []
    for kind in KINDS:
        found = [accuracy(final, seconds=part, kinds=[kind]) for part in (sizes.lengths, sizes.longer)]
        found += [accuracy(pooled(results, name), seconds=sizes.lengths, kinds=[kind]) for name in BASELINES.values()]
        rows.append([kind, *map(shown, found)])
    return head, rows


def seed_rows(settings: Settings, results: Sequence[SeedResult]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the run's figures for each seed."""
    sizes = settings.sizes
    head = ["seed", "trained", "unseen", "first", *BASELINES.values(), "seconds"]
    rows: list[list[str]] = []
    for result in results:
        final = result.answers[FINAL]
        found = [
            accuracy(final, seconds=sizes.lengths),
            accuracy(final, seconds=sizes.longer),
            accuracy(final, seconds=sizes.lengths, kinds=["first"]),
            *(accuracy(result.answers[name], seconds=sizes.lengths) for name in BASELINES.values()),
        ]
        rows.append([str(result.seed), *map(shown, found), f"{sum(result.seconds.values()):.0f}"])
    return head, rows


def verdicts(settings: Settings, results: Sequence[SeedResult]) -> list[tuple[str, bool]]:
    """What the run should reach, and whether it did, over all seeds."""
    sizes = settings.sizes
    final = pooled(results, FINAL)
    trained, longer = (accuracy(final, seconds=part).value for part in (sizes.lengths, sizes.longer))
    first = accuracy(final, seconds=sizes.lengths, kinds=["first"]).value
    found = [
        (f"trained lengths at least {TRAINED_BAR:.0%}: {trained:.1%}", trained >= TRAINED_BAR),
        (f"unseen length at least {LONGER_BAR:.0%}: {longer:.1%}", longer >= LONGER_BAR),
        (f"which came first at least {FIRST_BAR:.0%}: {first:.1%}", first >= FIRST_BAR),
    ]
    for name in BASELINES.values():
        value = accuracy(pooled(results, name), seconds=sizes.lengths).value
        found.append((f"{name} at least {BASELINE_GAP:.0%} below: {value:.1%}", value <= trained - BASELINE_GAP))
    return found


def shown(mean: Mean) -> str:
    """A mean in percent with its standard error."""
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f}"


def as_markdown(settings: Settings, results: Sequence[SeedResult], model: str) -> str:
    """`result.md`."""
    seeds = ", ".join(str(result.seed) for result in results)
    parts = [
        "# Video-Ma²mba, the small run",
        f"{model} Seeds {seeds}; accuracy in percent ± standard error, clustered by video; chance is {CHANCE:.0%}.",
        markdown_table(*length_rows(settings, results)),
        "Kinds of questions after stage 2, at the trained lengths and at the unseen one, and the baselines at the trained ones:",
        markdown_table(*kind_rows(settings, results)),
        "Seeds, after stage 2; the kind and the baselines at the trained lengths:",
        markdown_table(*seed_rows(settings, results)),
        "\n".join(f"- {'reached' if passed else '**missed**'}: {text}" for text, passed in verdicts(settings, results)),
        "![A held-out video, questions and answers](contact-sheet.png)",
        "![Losses of the three stages](losses.png)",
        "![Accuracy by length](lengths.png)",
    ]
    return "\n\n".join(parts) + "\n"


def as_json(settings: Settings, results: Sequence[SeedResult]) -> str:
    """`result.json`: settings, losses, times, accuracies, and every answer."""
    sizes = settings.sizes
    summary = {
        name: {
            "trained": asdict(accuracy(pooled(results, name), seconds=sizes.lengths)),
            "longer": asdict(accuracy(pooled(results, name), seconds=sizes.longer)),
            "cells": _cells(pooled(results, name), sizes.all_lengths),
        }
        for name in results[0].answers
    }
    seeds = [
        {
            "seed": result.seed,
            "seconds": result.seconds,
            "losses": result.losses,
            "answers": {name: [_answer(each) for each in answers] for name, answers in result.answers.items()},
        }
        for result in results
    ]
    reached = [{"what": text, "reached": passed} for text, passed in verdicts(settings, results)]
    return json.dumps(
        {"settings": settings.to_json(), "reached": reached, "accuracy": summary, "seeds": seeds}, indent=1
    )


def _cells(answers: Sequence[Answer], lengths: Iterable[int]) -> dict[str, dict[str, Any]]:
    return {
        f"{seconds} s": {kind: asdict(accuracy(answers, seconds=[seconds], kinds=[kind])) for kind in KINDS}
        for seconds in lengths
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {"question": answer.question, "right": answer.right, "response": answer.response, "letter": answer.letter}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))
