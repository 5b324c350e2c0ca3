"""What the doctor finds, and what it says where something is missing."""

from __future__ import annotations

import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from magc import doctor
from magc.cli import main
from magc.doctor import Finding, as_text, examine


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


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for topic in ("versions", "devices", "operators", "extras", "checkpoints", "verdict"):
        assert f"\n{topic} " in f"\n{text}"
