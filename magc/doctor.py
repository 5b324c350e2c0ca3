"""What `magc doctor` finds: versions, devices, what runs natively, optional parts, places for checkpoints; and its
self-test of the Triton kernels' launch configurations.
"""

from __future__ import annotations

import os
import pkgutil
import platform
import re
import shutil
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import magc_kernels
from magc.errors import MagcError
from magc.nn.operators import operators
from magc.report import paragraph
from magc.units import format_bytes

if TYPE_CHECKING:
    from magc_kernels.configs import Shape

Status = Literal["ok", "absent", "problem"]

_MARKS = {"ok": "ok", "absent": "--", "problem": "!!"}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([\w-]+)['\"]")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what it belongs to.
        name: what it is.
        status: ``"absent"`` is no fault, ``"problem"`` is one.
        detail: what was found, and the remedy if there is one.
    """

    topic: str
    name: str
    status: Status
    detail: str


def examine() -> list[Finding]:
    """Look at everything; changes nothing and allocates next to nothing."""
    return [*_versions(), *_devices(), *_implementations(), *_extras(), *_known_faults(), *_places()]


def as_text(findings: list[Finding]) -> str:
    """The findings, a paragraph for each topic, and a line that counts the problems."""
    topics: defaultdict[str, list[str]] = defaultdict(list)
    for finding in findings:
        topics[finding.topic].append(f"{_MARKS[finding.status]} {finding.name}: {finding.detail}")
    problems = sum(finding.status == "problem" for finding in findings)
    verdict = "no problems found" if not problems else f"{problems} problem{'s' * (problems > 1)}, marked !!"
    return "\n".join([*(paragraph(topic, lines) for topic, lines in topics.items()), paragraph("verdict", [verdict])])


@dataclass(frozen=True, slots=True)
class Failure:
    """What is wrong with one result of a configuration's self-test.

    Attributes:
        configuration: operator and class of shapes.
        name: the output or gradient; or ``"bits"`` that differ from run to run, or why the kernels did not ``"run"``.
        error: relative error against float64, or in words what happened.
        bound: the largest error that passes; empty after words.
    """

    configuration: str
    name: str
    error: str
    bound: str = ""


def self_test(progress: Callable[[str], object]) -> tuple[int, list[Failure]]:
    """Test every launch configuration that is shipped for GPUs like the current one; see `magc_kernels.selftest`.

    Args:
        progress: called with a line of text after each configuration.

    Returns:
        How many were tested, and everything that failed.

    Raises:
        MagcError: Triton or a GPU is missing.
    """
    if lacking := _why_no_triton():
        raise MagcError(f"the self-test runs Triton kernels on an NVIDIA GPU, and here {lacking}")
    from magc_kernels import selftest

    refusal = import_module("triton.errors").TritonError
    device = torch.device("cuda")
    entries = selftest.shipped((selftest.device_class(device),))
    failures: list[Failure] = []
    for number, entry in enumerate(entries, 1):
        label = _label(entry.shape)
        try:
            result = selftest.run(entry, device)
        except refusal as error:
            wrong = [Failure(label, "run", textwrap.shorten(f"{type(error).__name__}: {error}", 200))]
        else:
            errors, bounds = result.errors, result.bounds
            wrong = [Failure(label, n, f"{errors[n]:.2e}", f"{bounds[n]:.2e}") for n in result.failures]
            if not result.repeats:
                wrong.append(Failure(label, "bits", "differ from run to run"))
        failures += wrong
        progress(f"{number}/{len(entries)} {label}: {'FAILED' if wrong else 'passed'}")
    return len(entries), failures


def self_test_as_text(tested: int, failures: list[Failure]) -> str:
    """A line that counts, and a table of what failed."""
    failed = len({failure.configuration for failure in failures})
    summary = paragraph("self-test", [f"{tested - failed} of {tested} launch configurations passed"])
    if not failures:
        return summary
    table = [Failure("configuration", "result", "error", "bound"), *failures]
    wide, narrow = max(len(row.configuration) for row in table), max(len(row.name) for row in table)
    rows = (f"{row.configuration:<{wide}}  {row.name:<{narrow}}  {row.error:<8}  {row.bound}".rstrip() for row in table)
    return "\n".join([summary, *rows])


def version() -> str:
    """The version of the installed distribution.

    Raises:
        importlib.metadata.PackageNotFoundError: magc runs from a folder without being installed.
    """
    return metadata.version("magc")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------- topics
def _versions() -> Iterator[Finding]:
    own = _installed("magc")
    where = Path(__file__).parent
    if own is None:
        yield Finding("versions", "magc", "problem", f"runs from {where} and is not installed; pip install -e . there")
    else:
        yield Finding("versions", "magc", "ok", f"{own} in {where}")
    yield Finding(
        "versions", "Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("versions", "torch", "ok", f"{torch.__version__}, {cuda}")
    yield Finding("versions", "numpy", "ok", metadata.version("numpy"))
    triton = _installed("triton")
    if triton is None:
        yield Finding("versions", "triton", "absent", "not installed; comes with CUDA builds of torch")
    else:
        yield Finding("versions", "triton", "ok", triton)


def _devices() -> Iterator[Finding]:
    cores, threads = os.cpu_count(), torch.get_num_threads()
    simd = torch.backends.cpu.get_cpu_capability()
    memory = f", {format_bytes(_physical_memory())} of memory" if _physical_memory() else ""
    yield Finding("devices", "cpu", "ok", f"{cores} cores, {threads} used by torch, {simd}{memory}")
    if not torch.cuda.is_available():
        yield Finding("devices", "cuda", "absent", f"no GPU is available{_why_no_cuda()}; everything runs on the CPU")
        return
    cuda: Any = torch.cuda  # what it returns has no type
    for index in range(torch.cuda.device_count()):
        properties = cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            "devices",
            f"cuda:{index}",
            "ok",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, {format_bytes(free)} of "
            f"{format_bytes(total)} free",
        )


def _implementations() -> Iterator[Finding]:
    """For every operator what there is, then what ``impl="auto"`` takes on each device."""
    lacking = _why_no_triton()
    for package in pkgutil.iter_modules(magc_kernels.__path__):
        if not package.ispkg:
            continue
        module = import_module(f"magc_kernels.{package.name}")
        inside = {part.name for part in pkgutil.iter_modules(module.__path__)}
        yield Finding("operators", f"{package.name} 'reference'", "ok", "plain PyTorch, runs natively on every device")
        if "kernel" not in inside:
            yield Finding(
                "operators", f"{package.name} kernel", "absent", "needs none: PyTorch's or the others' serve it"
            )
        elif lacking:
            yield Finding("operators", f"{package.name} kernel", "absent", f"does not run here: {lacking}")
        else:
            yield Finding("operators", f"{package.name} kernel", "ok", "Triton, runs natively on the GPU")
    if not lacking:
        yield from _configurations()
    for kind in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        yield Finding(
            "operators", f"impl='auto' on {kind}", "ok", f"takes {operators('auto', torch.device(kind)).name!r}"
        )


def _configurations() -> Iterator[Finding]:
    from magc_kernels.selftest import device_class

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        kind = "generic" if device_class(device) is None else "own"
        detail = f"compute capability {major}.{minor}: {kind}; magc doctor --self-test tests them"
        yield Finding("operators", f"configurations on {device}", "ok", detail)


def _extras() -> Iterator[Finding]:
    """The distribution's own list of what each extra needs."""
    try:
        requirements = metadata.requires("magc") or []
    except metadata.PackageNotFoundError:
        yield Finding("extras", "all", "problem", "unknown, since magc is not installed; pip install -e . first")
        return
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match is not None and match[1] != "magc" and match[2] != "dev":
            wanted[match[2]].append(match[1])
    for extra, names in wanted.items():
        missing = [name for name in names if _installed(name) is None]
        if missing:
            detail = f"lacks {', '.join(missing)}; pip install 'magc[{extra}]'"
            yield Finding("extras", extra, "absent", detail)
        else:
            yield Finding("extras", extra, "ok", ", ".join(f"{name} {_installed(name)}" for name in names))


def _known_faults() -> Iterator[Finding]:
    """Faults of installed packages that show in training only."""
    if find_spec("fla") is None or find_spec("triton") is None or not torch.cuda.is_available():
        return
    triton = tuple(int(part) for part in re.findall(r"\d+", metadata.version("triton"))[:3])
    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper and (3, 4, 0) <= triton < (3, 7, 1) and find_spec("tilelang") is None:
        yield Finding(
            "extras",
            "flash-linear-attention",
            "problem",
            f"refuses the backward of its scalar-gated layers (Gated DeltaNet, Comba, simple GLA and what is built on them) "
            f"on this GPU with Triton {metadata.version('triton')}, which miscompiles it; install Triton 3.7.1 or newer, or "
            f"pip install tilelang",
        )


def _places() -> Iterator[Finding]:
    folder = tempfile.gettempdir()
    free = format_bytes(shutil.disk_usage(folder).free)
    kind = _file_system(folder)
    if not os.access(folder, os.W_OK):
        yield Finding("checkpoints", "disk", "problem", f"{folder} is not writable; set TMPDIR, or pass disk_dir=")
    elif kind in _IN_MEMORY:
        detail = f"{free} free in {folder}, but that is {kind}: memory, not a disk; set TMPDIR, or pass disk_dir="
        yield Finding("checkpoints", "disk", "problem", detail)
    else:
        yield Finding("checkpoints", "disk", "ok", f"{free} free in {folder}{f' ({kind})' if kind else ''}")
    if not torch.cuda.is_available():
        yield Finding("checkpoints", "pinned host", "absent", "not used without a GPU: host memory is the device's own")
        return
    try:
        torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        yield Finding("checkpoints", "pinned host", "problem", f"cannot be had ({reason}); raise the memlock limit")
    else:
        yield Finding("checkpoints", "pinned host", "ok", "can be had")


# ---------------------------------------------------------------------- helpers
def _label(shape: Shape) -> str:
    from magc_kernels.configs import operator_of

    sizes = (f"{name}={str(value).removeprefix('torch.')}" for name, value in asdict(shape).items())
    return f"{operator_of(shape)} {' '.join(sizes)}"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return " (this torch is built without CUDA)"
    return " (torch sees none: no driver, or CUDA_VISIBLE_DEVICES hides it)"


def _why_no_triton() -> str:
    reasons = ["triton is not installed (pip install 'magc[triton]')"] if find_spec("triton") is None else []
    if not torch.cuda.is_available():
        reasons.append(f"no GPU is available{_why_no_cuda()}")
    return ", ".join(reasons)


def _physical_memory() -> int:
    """Bytes of memory of the machine, 0 where the system does not say."""
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _file_system(folder: str) -> str:
    """Type of the file system that holds a folder; empty where the system does not say."""
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return ""
    path = Path(folder).resolve()
    found = ""
    longest = -1
    for line in mounts.read_text(errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= longest:
            found, longest = kind, len(point)
    return found
