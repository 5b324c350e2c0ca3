"""`magc bench`: the command line, and results as tables and pictures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magc import Plan, cli
from magc.bench.cases import Case, Method, length_name, parse_lengths
from magc.bench.figures import draw
from magc.bench.presets import PRESETS
from magc.bench.report import as_markdown
from magc.bench.result import Facts, Record, Result, Status
from magc.bench.settings import Settings, parse
from magc.bench.spec import parse_plan, plan_text
from magc.errors import InputError, MagcError

GB = 10**9
CASE = Case(model="mamba2-2.7b", tokens=1 << 14, method=Method.NONE)
CUT = replace(CASE, method=Method.PLAN, plan="tokens=2048")


def row(case: Case, peak: float = 5, speed: float = 20_000, **values: Any) -> Record:
    """A record of a peak in GB and a speed in tokens per second."""
    facts = Facts("a GPU", {"torch": "2"}, "abc", "2026-01-01T00:00:00+00:00", "magc bench --preset flat")
    ok = {"peak_bytes": round(peak * GB), "seconds": (case.tokens / speed,), "plan": "some plan"}
    if values.get("status", Status.OK) is not Status.OK:
        ok = {}
    return Record(Result(**{"case": case, "status": Status.OK, **ok, **values}), facts)


def arguments(*given: str) -> Settings:
    return parse(["--device", "cpu", *given])


# ---------------------------------------------------------------------- the command line
@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("tokens=2^11,states=host", Plan(tokens=2048, states="host")),  # pyright: ignore[reportArgumentType]
        ("layers=8, tokens=1024, keep=all, snapshots=0", Plan(layers=8, tokens=1024, keep="all", snapshots=0)),
        ("borders=rebuild,keep=3", Plan(borders="rebuild", keep=3)),
    ],
)
def test_plans_are_read_and_written(text: str, plan: Plan) -> None:
    assert parse_plan(text) == plan
    assert parse_plan(plan_text(plan)) == plan


@pytest.mark.parametrize(
    "text", ["2048", "tokens=", "tokens=1,tokens=2", "width=4", "tokens=2048;keep=4", "states=tape"]
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(MagcError, match=r"in the plan|number of tokens|states="):
        parse_plan(text)


def test_lengths() -> None:
    assert parse_lengths("2^12,2^10..2^13,1000") == (1000, 1024, 2048, 4096, 8192)
    assert [length_name(count) for count in (1000, 1024, 1 << 22)] == ["1,000", "2^10", "2^22"]
    with pytest.raises(InputError, match="end before they begin"):
        parse_lengths("2^12..2^10")


def test_methods_without_what_they_need_are_left_out_unless_named() -> None:
    found = {case.method for case in arguments("--models", "tiny").cases}
    assert found == set(Method) - {Method.AUTO, Method.PLAN}
    assert {case.method for case in arguments("--plan", "tokens=256").cases} == {Method.PLAN}
    with pytest.raises(InputError, match="'auto' needs a budget"):
        arguments("--methods", "auto")
    with pytest.raises(InputError, match="'plan' needs a plan"):
        arguments("--methods", "plan")


def test_options_are_combined_and_a_models_cases_come_together() -> None:
    settings = arguments(
        *("--models", "tiny,130m", "--lengths", "2^10,2^11", "--methods", "none,auto", "--budget", "1GiB,2GiB"),
        *("--head", "last,full", "--keep", "states,outputs"),
    )
    assert len(settings.cases) == len(set(settings.cases)) == 2 * 2 * 2 * 2 * 3
    models = [(case.model, case.keep) for case in settings.cases]
    assert len(list(itertools.groupby(models))) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_cases(name: str) -> None:
    settings = parse(["--device", "cpu", "--preset", name, "--runner", "eager"])
    assert settings.cases
    assert len(list(itertools.groupby(case.model for case in settings.cases))) == len({c.model for c in settings.cases})


def test_options_change_a_preset() -> None:
    settings = arguments("--preset", "flat", "--models", "tiny", "--lengths", "2^10", "--budget", "2MiB")
    assert {(case.model, case.tokens, case.budget) for case in settings.cases} == {("tiny", 1024, 2 << 20)}


def test_the_table_of_the_paper_is_asked_for_in_full() -> None:
    found = [case for case in arguments("--preset", "table3").cases if case.budget == "paper"]
    assert {(case.model.removeprefix("mamba2-"), case.tokens) for case in found} == {
        (model, 1 << power) for model in ("370m", "1.3b", "2.7b") for power in range(10, 22)
    }


def test_the_command_is_kept_without_folders(tmp_path: Path) -> None:
    settings = arguments("--models", "tiny", "--out", "/home/me/x", f"--disk={tmp_path}", "--plan", "tokens=256,keep=2")
    assert settings.command == "magc bench --device cpu --models tiny --disk DIR --plan tokens=256,keep=2"


@pytest.mark.parametrize(
    "wrong",
    [
        ("--models", "5b"),
        ("--methods", "magic"),
        ("--runner", "cuda-graph"),
        ("--device", "tpu"),
        ("--steps", "0"),
        ("--minutes", "0"),
        ("--preset", "none"),
        ("--report", "no/such/file"),
        ("--disk", "no/such/folder"),
        ("--profile",),
        ("--budgets", "1GiB"),
        ("--budget", "24G"),
        ("--slowdown", "0.5"),
    ],
    ids=" ".join,
)
def test_mistakes_on_the_command_line_are_told(wrong: tuple[str, ...]) -> None:
    with pytest.raises(MagcError, match=wrong[-1].lstrip("-") if wrong[0] != "--runner" else "CUDA graphs need a GPU"):
        arguments(*wrong)


def test_a_mistake_is_one_line_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "tpu"]) == 2
    assert capsys.readouterr().err == "magc: error: --device tpu: give auto, cpu or cuda\n"


def test_help_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(preset.question in shown for preset in PRESETS.values())


# ---------------------------------------------------------------------- tables
def test_no_results() -> None:
    assert "No results." in as_markdown([])


def test_out_of_memory_is_a_dash_with_its_reason_below() -> None:
    longer = replace(CASE, tokens=1 << 15)
    text = as_markdown([row(CASE, 45.0), row(longer, status=Status.OUT_OF_MEMORY, message="CUDA out of memory")])
    assert "| 2^15 | - |" in text
    assert "- 2^15, none: out of memory (CUDA out of memory)" in text


def test_what_was_not_measured_did_not_run_out_of_memory() -> None:
    small, large = (replace(CASE, method=Method.AUTO, budget=size << 30) for size in (3, 6))
    text = as_markdown([row(small, 2.9), row(large, 4.2), row(replace(large, tokens=1 << 15), 5.5)])
    assert "| 2^15 | 6.9 |  | 5.5 |" in text


def test_the_papers_table_stands_beside() -> None:
    auto = replace(CASE, method=Method.AUTO, budget=6 << 30)
    text = as_markdown(
        [row(auto, 4.2), row(replace(auto, tokens=1 << 15), 7.5), row(replace(auto, tokens=1 << 20), 6.0)]
    )
    assert "| tokens | MA-GC (paper) | auto, 6 GiB |" in text
    assert "| 2^14 | 4.2 | 4.2 |" in text
    assert "| 2^20 | - | 6.0 |" in text
    assert "- auto, 6 GiB: no more than MA-GC at 1 of 2 lengths, and 1 where the paper ran out of memory" in text


def test_predictions_stand_beside_measurements() -> None:
    text = as_markdown(
        [row(CASE, 1.024, 16_384, predicted_bytes=1_126_400_000, predicted_seconds=0.9, host_bytes=2**30)]
    )
    assert "| 2^14 | none | 1.0 GiB | 976.6 MiB | +10.0% | 900 ms | 1 s | -10.0% | 1.0 GiB | some plan |" in text


def test_growth_with_length() -> None:
    cut = [replace(CUT, tokens=1 << power) for power in (14, 16, 20)]
    text = as_markdown([row(cut[0], 4.0, 22_000), row(cut[1], 4.1, 20_000), row(cut[2], 4.2, 21_000), row(CASE)])
    part = text.partition("### With length")[2].partition("###")[0]
    assert "| tokens=2048 | 2^14 | 2^20 | 3.7 GiB | 3.9 GiB | +5.0% | 20k | 22k |" in part
    assert "none" not in part


def test_runners_are_compared() -> None:
    text = as_markdown([row(CUT, speed=5000), row(replace(CUT, runner="cuda-graph"), speed=20_000), row(CASE)])
    assert "### Eager and CUDA graphs" in text
    assert "| 2^14 | tokens=2048 | 5k | 20k | 4.00 x | 4.7 GiB | 4.7 GiB | some plan |" in text


def test_the_frontier_holds_all_methods_by_memory() -> None:
    auto = replace(CASE, method=Method.AUTO, budget=1)
    text = as_markdown([row(replace(auto, budget=8 << 30), 8), row(replace(auto, budget=4 << 30), 4), row(CUT, 6)])
    part = text.partition("### Memory against speed at 2^14 tokens")[2]
    assert [line.split(" | ")[0] for line in part.splitlines() if " GiB | " in line] == [
        "| auto, 4 GiB", "| tokens=2048", "| auto, 8 GiB",
    ]  # fmt: skip


def test_commands_and_cells_that_ran_eagerly_are_told() -> None:
    text = as_markdown([row(replace(CUT, runner="cuda-graph"), message="layer 3 runs eagerly: its cell waits")])
    assert "    magc bench --preset flat" in text
    assert "- layer 3 runs eagerly: its cell waits" in text


def test_pictures(tmp_path: Path) -> None:
    auto = replace(CASE, method=Method.AUTO, budget=6 << 30)
    records = [row(replace(CASE, tokens=1 << power), 2.0**power / 1000) for power in (10, 12, 14)]
    assert draw(records, tmp_path) == ["memory.png", "throughput.png"]
    records += [row(auto, 5), row(replace(auto, budget=8 << 30), 7), row(replace(auto, budget="paper"), 4)]
    assert draw(records, tmp_path) == ["memory.png", "throughput.png", "frontier.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
