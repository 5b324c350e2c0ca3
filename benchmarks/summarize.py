"""Turn a result file of pytest-benchmark into tables and a picture.

python -m benchmarks.summarize RESULTS.json [--plot PICTURE.png]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from magc.units import format_bytes, format_count

Row = dict[str, Any]


def rows(path: Path, kind: str) -> list[Row]:
    """What one suite recorded for each benchmark, with its least time as ``seconds``."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [
        {**benchmark["extra_info"], "seconds": benchmark["stats"]["min"]}
        for benchmark in benchmarks
        if benchmark["extra_info"].get("kind") == kind
    ]


def as_markdown(path: Path) -> str:
    """The tables of a result file and the machine that it is of."""
    data = json.loads(path.read_text())
    machine = ", ".join(f"{key} {value}" for key, value in data["machine_info"].items())
    commit = data["commit_info"]
    dirty = " with changes" if commit.get("dirty") else ""
    parts = [f"{data['datetime'][:10]}, commit {str(commit.get('id'))[:10]}{dirty}. {machine}."]
    by_model: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows(path, "method"):
        title = f"{row['model']}, {row['layers']} layers, {row['batch']} x {row['seq_len']:,} tokens"
        by_model[title].append(row)
    for title, of_model in by_model.items():
        parts.append(f"### {title}")
        parts.append(_table(("method", "peak", "predicted", "forwards", "tokens/s", "plan"), map(_method, of_model)))
    if lengths := rows(path, "length"):
        parts.append(f"### Sequence-only plans, segments of {lengths[0]['segment']} tokens")
        parts.append(_table(("tokens", "method", "peak", "tokens/s"), map(_length, lengths)))
    if planner := rows(path, "planner"):
        parts.append("### Planning 64 layers x 2^21 tokens, layers measured before")
        parts.append(_table(("what", "time"), ((row["what"], f"{row['seconds'] * 1e3:.1f} ms") for row in planner)))
    return "\n\n".join(parts) + "\n"


def _method(row: Row) -> tuple[str, ...]:
    predicted = row.get("predicted_peak_bytes")
    return (
        row["method"],
        format_bytes(row["peak_bytes"]),
        "" if predicted is None else f"{format_bytes(predicted)} ({predicted / row['peak_bytes'] - 1:+.1%})",
        f"{row['forwards']:.2f}",
        format_count(row["tokens_per_second"]),
        row.get("plan", ""),
    )


def _length(row: Row) -> tuple[str, ...]:
    peak, speed = format_bytes(row["peak_bytes"]), format_count(row["tokens_per_second"])
    return f"{row['seq_len']:,}", row["method"], peak, speed


def _table(head: tuple[str, ...], body: Any) -> str:
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, picture: Path) -> None:
    """Memory by method for each model, measured and predicted, and memory by length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_model: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows(path, "method"):
        by_model[row["model"]].append(row)
    lengths = rows(path, "length")
    figure: Any = Figure(figsize=(5 * (len(by_model) + bool(lengths)), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(by_model) + bool(lengths), squeeze=False)[0]
    for axes, (model, of_model) in zip(panels, by_model.items(), strict=False):
        names = [row["method"] for row in of_model]
        axes.barh(names, [row["peak_bytes"] / 2**20 for row in of_model], color="#2f6db3", label="measured")
        predicted = [(row["method"], row["predicted_peak_bytes"]) for row in of_model if "predicted_peak_bytes" in row]
        axes.plot(
            [nbytes / 2**20 for _, nbytes in predicted], [name for name, _ in predicted], "|", color="#e8a33d",
            markersize=16, markeredgewidth=3, label="predicted",
        )  # fmt: skip
        for name, row in zip(names, of_model, strict=True):
            axes.annotate(
                f"{format_count(row['tokens_per_second'])} tokens/s", (row["peak_bytes"] / 2**20, name),
                xytext=(7, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(row["peak_bytes"] for row in of_model) / 2**20)
        axes.set_xlabel("peak of a training step (MiB)")
        axes.set_title(f"{model}: {of_model[0]['layers']} layers, {of_model[0]['seq_len']:,} tokens", fontsize=10)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    if lengths:
        axes = panels[-1]
        for name in dict.fromkeys(row["method"] for row in lengths):
            points = sorted((row["seq_len"], row["peak_bytes"] / 2**20) for row in lengths if row["method"] == name)
            axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.1 * max(row["peak_bytes"] for row in lengths) / 2**20)
        axes.set_xlabel("tokens")
        axes.set_ylabel("peak of a training step (MiB)")
        axes.set_title(f"sequence-only plan, segments of {lengths[0]['segment']}", fontsize=10)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def main() -> None:
    """Read the arguments, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PICTURE")
    options = parser.parse_args()
    print(as_markdown(options.results), end="")
    if options.plot is not None:
        draw(options.results, options.plot)


if __name__ == "__main__":
    main()
