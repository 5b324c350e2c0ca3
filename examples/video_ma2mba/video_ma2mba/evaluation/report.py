"""Results as markdown, set beside what the paper reports (arXiv 2411.19460, tables 1, 2 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from video_ma2mba.evaluation.run import Result

# Tables 1 and 2. LongVideoBench's durations there are of the test set.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "Video-MME": {
        "Video-Ma²mba-0.7B": {"Short": 37.4, "Medium": 35.0, "Long": 26.8, "Avg.": 33.1},
        "Video-Ma²mba-1.8B": {"Short": 49.4, "Medium": 39.2, "Long": 31.9, "Avg.": 40.3},
        "Video-Ma²mba-3.1B": {"Short": 57.6, "Medium": 42.7, "Long": 35.4, "Avg.": 45.2},
    },
    "LongVideoBench": {
        name: dict(zip(("8-15s", "15-60s", "180-600s", "900-3600s", "testset", "valset"), values, strict=True))
        for name, values in {
            "Video-Ma²mba-0.7B": (43.3, 45.4, 33.3, 28.5, 34.2, 34.0),
            "Video-Ma²mba-1.8B": (48.4, 49.5, 39.6, 34.1, 39.8, 38.0),
            "Video-Ma²mba-3.1B": (55.4, 55.6, 42.4, 38.5, 44.2, 43.0),
        }.items()
    },
    "ActivityNet-QA": {
        "Video-Ma²mba-0.7B": {"ActNet-QA Acc.": 43.8, "ActNet-QA Score": 3.2},
        "Video-Ma²mba-1.8B": {"ActNet-QA Acc.": 50.0, "ActNet-QA Score": 3.1},
        "Video-Ma²mba-3.1B": {"ActNet-QA Acc.": 51.7, "ActNet-QA Score": 3.4},
    },
    "VideoChatGPT": {
        "Video-Ma²mba-0.7B": {"VCG": 2.69},
        "Video-Ma²mba-1.8B": {"VCG": 2.76},
        "Video-Ma²mba-3.1B": {"VCG": 3.03},
    },
    "MVBench": {
        "Video-Ma²mba-0.7B": {"MVBench": 41.1},
        "Video-Ma²mba-1.8B": {"MVBench": 44.4},
        "Video-Ma²mba-3.1B": {"MVBench": 48.3},
    },
}
PAPER_JUDGE = "gpt-3.5-turbo-0125"
_JUDGED = ("ActivityNet-QA", "VideoChatGPT")

# Table 4, Video-MME with Video-Ma²mba-3.1B: stage 1.5, frames in training, frames at inference.
ABLATION: dict[tuple[bool, str, str], dict[str, float]] = {
    key: dict(zip(("Short", "Medium", "Long", "Avg."), values, strict=True))
    for key, values in {
        (False, "16 frm", "8 frm"): (49.0, 38.7, 33.8, 40.5),
        (False, "16 frm", "16 frm"): (50.0, 40.7, 34.6, 41.7),
        (False, "1 fps", "8 frm"): (47.7, 37.9, 32.2, 39.3),
        (False, "1 fps", "16 frm"): (50.6, 39.4, 33.2, 41.1),
        (False, "1 fps", "32 frm"): (52.7, 40.8, 33.9, 42.4),
        (False, "1 fps", "1 fps"): (54.4, 41.4, 34.4, 43.4),
        (True, "1 fps", "8 frm"): (53.3, 39.3, 32.2, 41.6),
        (True, "1 fps", "16 frm"): (55.9, 41.3, 33.9, 43.7),
        (True, "1 fps", "32 frm"): (57.9, 41.9, 33.9, 44.6),
        (True, "1 fps", "1 fps"): (57.6, 42.7, 35.4, 45.2),
    }.items()
}


def markdown(results: Sequence[Result]) -> str:
    """Results of any benchmarks, a section each, with the paper's figures and the breakdown by group."""
    names = dict.fromkeys(result.benchmark for result in results)
    return "\n".join(_section(name, [result for result in results if result.benchmark == name]) for name in names)


def _section(name: str, results: Sequence[Result]) -> str:
    paper = PAPER.get(name, {})
    shown = [column for row in (*paper.values(), *(result.columns for result in results)) for column in row]
    columns = list(dict.fromkeys(shown))
    rows = [
        [f"{each} (paper)", PAPER_JUDGE if name in _JUDGED else "", *_cells(row, columns)]
        for each, row in paper.items()
    ]
    rows += [
        [result.model, result.judge if name in _JUDGED else "", *_cells(result.columns, columns)] for result in results
    ]
    head = ["model", "judge", *columns]
    if name not in _JUDGED:
        head, rows = _without(head, 1), [_without(row, 1) for row in rows]
    lines = [f"## {name}", "", *_table(head, rows), ""]
    if name == "Video-MME":
        lines += ["Paper, table 4 (3.1B), by stage 1.5, frames in training and at inference:", "", *_ablation(), ""]
    for result in results:
        lines += [
            f"{result.model} ({result.identity.short}): {result.questions} questions, {result.protocol}.",
            "",
        ]
        if result.without_key:
            lines += [f"{result.without_key} questions have no public key: their answers are in submission.json.", ""]
        if result.left_out:
            first = next(iter(result.left_out.values()))
            lines += [f"**{len(result.left_out)} questions were left out**, e.g.: {first}", ""]
        if result.means:
            lines += [*_breakdown(result), ""]
    return "\n".join(lines)


def _ablation() -> list[str]:
    rows = [
        ["yes" if staged else "no", trained, asked, *(f"{value:.1f}" for value in values.values())]
        for (staged, trained, asked), values in ABLATION.items()
    ]
    return _table(["stage 1.5", "train", "infer", "Short", "Medium", "Long", "Avg."], rows)


def _breakdown(result: Result) -> list[str]:
    rows: list[list[str]] = []
    for metric, groups in result.means.items():
        scale = 100 if metric.startswith("accuracy") else 1
        for group, mean in groups.items():
            rows.append([metric, group, f"{scale * mean.value:.2f} ± {scale * mean.error:.2f}", str(mean.count)])
    return _table(["metric", "group", "mean ± standard error", "n"], rows)


def _cells(row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{row[column]:.2f}".removesuffix("0") if column in row else "-" for column in columns]


def _without(row: Sequence[str], index: int) -> list[str]:
    return [cell for place, cell in enumerate(row) if place != index]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]
