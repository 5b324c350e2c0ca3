"""The command line: plans for published sizes, one-line errors, commands that are loaded when asked for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from magc import Plan, doctor, sizes
from magc.cli import main
from magc.doctor import Failure, version
from magc.errors import InputError

SMALL = (32, 64)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace few and short segments."""
    monkeypatch.setattr(sizes.trace, "__kwdefaults__", {**sizes.trace.__kwdefaults__, "lengths": SMALL})


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return re.sub(r"\s+", " ", shown.out)


@pytest.mark.usefixtures("quick")
def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    text = run(
        capsys, "plan", "--model", "mamba2-130m", "--seq-len", "2^16", "--budget", "6GiB", "--host-budget", "8 GiB",
        "--paper", "--plot", str(plot),
    )  # fmt: skip
    assert "mamba2-130m, 1 x 65,536 tokens: 128,989,632 parameters, 246.0 MiB of weights in bf16" in text
    assert "of 24 layers and 65,536 tokens" in text
    assert "of the budget of 6.0 GiB" in text
    assert "host budget of 8.0 GiB" in text
    assert "times are estimates from operation counts" in text
    assert "nothing was timed" in text
    assert "'reference' (plain PyTorch) in 24 of 24 layers" in text
    assert "C_L 768, C_S 201,984, C_grid 4,888, C_state 198,400" in text
    assert re.search(r"cells of \d+ layers x [\d,]+ tokens, [\d.]+ .iB by Eq\. 12-16", text)
    assert "measured in the paper" not in text  # it has no 130m
    assert plot.stat().st_size > 10_000
    assert str(plot) in text


@pytest.mark.usefixtures("quick")
def test_paper_figures_of_a_model_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "plan", "--model", "mamba2-370m", "--seq-len", "262144", "--budget", "12GiB", "--paper")
    assert "C_L 1,024, C_S 269,056, C_grid 6,432, C_state 264,448" in text
    assert "(Table 3, A100 80GB, without weights and gradients): 8.8 GB" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mamba2-3b"], "no published model is named 'mamba2-3b'"),
        (["--seq-len", "many"], "cannot read 'many' as a number of tokens"),
        (["--budget", "24G"], "cannot read '24G' as a number of bytes"),
        (["--budget", "1KiB"], "The smallest that would is"),
        (["--batch", "0"], "give positive numbers"),
        (["--plot", "plan.docx"], "cannot write a plot to 'plan.docx'"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_errors_take_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    base = {"--model": "mamba2-130m", "--seq-len": "1024", "--budget": "8GiB"}
    base[arguments[0]] = arguments[1]
    assert main(["plan", *(part for pair in base.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("magc: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_usage_errors_are_argparses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nothing"], ["plan"], ["plan", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "usage: magc" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], f"magc {version()}"),
        (["--help"], "demo"),
        (["plan", "--help"], "--paper"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("magc.demo")
    got: list[list[str]] = []
    module.__dict__["main"] = lambda argv: got.append(argv) or 3
    monkeypatch.setitem(sys.modules, "magc.demo", module)
    assert main(["demo", "--tokens", "100", "-h"]) == 3
    assert got == [["--tokens", "100", "-h"]]


@pytest.mark.parametrize("failures", [[], [Failure("conv width=4", "dx", "1.00e-03", "5.00e-04")]])
def test_self_test_of_the_doctor(
    failures: list[Failure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda progress: (progress("1/1 conv width=4"), (1, failures))[1])
    assert main(["doctor", "--self-test"]) == len(failures)
    shown = capsys.readouterr()
    assert shown.err == "1/1 conv width=4\n"
    assert f"{1 - len(failures)} of 1 launch configurations passed" in shown.out
    assert ("dx" in shown.out) == bool(failures)


def test_self_test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--self-test"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("magc: error: the self-test runs Triton kernels on an NVIDIA GPU, and here ")
    assert "no GPU is available" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1048576", 2**20), ("2^20", 2**20), ("1Mi", 2**20), ("1M", 10**6), ("16k", 16_000), ("1_000", 1000)],
)
def test_token_counts(text: str, tokens: int) -> None:
    assert sizes.parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "2^", "2^1000000", "1.5M", "1T", "x"])
def test_not_token_counts(text: str) -> None:
    with pytest.raises(InputError, match="as a number of tokens"):
        sizes.parse_tokens(text)


def test_a_traced_model() -> None:
    full = sizes.trace("mamba2-130m", batch=2, dtype=torch.float32, lengths=SMALL)
    last = sizes.trace("mamba2-130m", batch=2, dtype=torch.float32, head="last", lengths=SMALL)
    assert full.parameters == 128_989_632
    assert full.weight_bytes == 4 * full.parameters
    assert full.costs.n_layers == 24
    assert not full.costs.host_is_device
    assert full.costs.head is not None
    assert last.costs.head is not None
    # float32 logits of 64 tokens of 2 sequences, against those of one token each.
    assert full.costs.head.at(64).record_peak > 64 * 2 * 50_288 * 4
    assert last.costs.head.at(64).record_peak < 8 * 2 * 50_288 * 4
    plan = full.forecast(Plan.per_layer(), 1024)
    assert plan.forecast is not None
    assert plan.forecast.notes == full.notes
    for wrong in ({"batch": 0}, {"lengths": ()}, {"lengths": (0, 4)}):
        with pytest.raises(InputError):
            sizes.trace("mamba2-130m", **wrong)
