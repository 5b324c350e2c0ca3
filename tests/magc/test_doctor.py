"""What the doctor finds, and what it says where something is missing."""

from __future__ import annotations

import shutil
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from magc import doctor
from magc.cli import main
from magc.doctor import Finding, as_text, examine, self_test, self_test_as_text
from magc.errors import MagcError


def found(topic: str, name: str) -> Finding:
    [finding] = [finding for finding in examine() if (finding.topic, finding.name) == (topic, name)]
    return finding


def test_here() -> None:
    findings = examine()
    assert {finding.topic for finding in findings} == {"versions", "devices", "operators", "extras", "checkpoints"}
    assert torch.__version__ in found("versions", "torch").detail
    assert found("devices", "cpu").status == "ok"
    for name in ("ssd", "conv", "norm"):
        assert found("operators", f"{name} 'reference'").status == "ok"
    assert "'reference'" in found("operators", "impl='auto' on cpu").detail


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"dev"}
    assert {finding.name for finding in examine() if finding.topic == "extras"} == extras


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2", 'no-such-thing>=3; extra == "video"'])
    [finding] = [finding for finding in examine() if finding.topic == "extras"]
    assert finding.status == "absent"
    assert finding.detail == "lacks no-such-thing; pip install 'magc[video]'"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "magc":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert found("versions", "magc").status == "problem"
    assert "1 problem, marked !!" in as_text(examine())


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 << 30, 0, 3 << 30))
    monkeypatch.setattr(doctor, "_file_system", lambda _: "ext4")
    assert found("checkpoints", "disk").detail == f"3.0 GiB free in {tmp_path} (ext4)"
    monkeypatch.setattr(doctor, "_file_system", lambda _: "tmpfs")
    assert found("checkpoints", "disk").status == "problem"
    assert "memory, not a disk" in found("checkpoints", "disk").detail


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "everything runs on the CPU" in found("devices", "cuda").detail
    assert found("checkpoints", "pinned host").status == "absent"


@pytest.mark.gpu
def test_with_a_gpu() -> None:
    assert found("devices", "cuda:0").status == "ok"
    assert found("checkpoints", "pinned host").status == "ok"


@pytest.fixture
def selftest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The self-test of a norm and a convolution, which pass, on what claims to be a GPU."""
    module = pytest.importorskip("magc_kernels.selftest", exc_type=ImportError)
    entries = [
        module.Entry(None, shape, module.shipped_config(shape, None))
        for shape in (module.NormShape(torch.float32, 64), module.ConvShape(torch.bfloat16, 4))
    ]
    monkeypatch.setattr(doctor, "_why_no_triton", lambda: "")
    monkeypatch.setattr(module, "device_class", lambda _: None)
    monkeypatch.setattr(module, "shipped", lambda classes: entries if classes == (None,) else [])
    monkeypatch.setattr(module, "run", lambda entry, _: module.Result(entry, {"y": 1e-3}, {"y": 2e-3}, True))
    return module


def test_self_test_that_passes(selftest: Any) -> None:
    lines: list[str] = []
    tested, failures = self_test(lines.append)
    assert (tested, failures) == (2, [])
    assert lines == ["1/2 norm dtype=float32 group_size=64: passed", "2/2 conv dtype=bfloat16 width=4: passed"]
    assert self_test_as_text(tested, failures).endswith("  2 of 2 launch configurations passed")


def test_self_test_that_fails(selftest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors")

    def run(entry: Any, _: torch.device) -> Any:
        if isinstance(entry.shape, selftest.ConvShape):
            raise errors.OutOfResources(300, 200, "shared memory")
        return selftest.Result(entry, {"y": 1e-3, "dx": float("nan")}, {"y": 5e-4, "dx": 1.0}, False)

    monkeypatch.setattr(selftest, "run", run)
    lines: list[str] = []
    text = self_test_as_text(*self_test(lines.append))
    assert [line.split()[-1] for line in lines] == ["FAILED", "FAILED"]
    summary, *rows = (line.split() for line in text.splitlines())
    assert summary[1:4] == ["0", "of", "2"]
    norm, conv = ["norm", "dtype=float32", "group_size=64"], ["conv", "dtype=bfloat16", "width=4"]
    assert rows[:4] == [
        ["configuration", "result", "error", "bound"],
        [*norm, "y", "1.00e-03", "5.00e-04"],
        [*norm, "dx", "nan", "1.00e+00"],
        [*norm, "bits", "differ", "from", "run", "to", "run"],
    ]
    assert rows[4][:8] == [*conv, "run", "OutOfResources:", "out", "of", "resource:"]


def test_self_test_without_triton_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    with pytest.raises(MagcError, match=r"triton is not installed \(pip install .*, no GPU is available"):
        self_test(print)


@pytest.mark.parametrize(("capability", "kind"), [((9, 0), "own"), ((8, 9), "generic")])
def test_class_of_configurations(capability: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("magc_kernels.selftest", exc_type=ImportError)
    monkeypatch.setattr(doctor, "_why_no_triton", lambda: "")
    monkeypatch.setattr(module, "capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    [finding] = doctor._configurations()
    assert (finding.topic, finding.name) == ("operators", "configurations on cuda:0")
    assert finding.detail.startswith(f"compute capability {capability[0]}.{capability[1]}: {kind};")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for topic in ("versions", "devices", "operators", "extras", "checkpoints", "verdict"):
        assert f"\n{topic} " in f"\n{text}"
