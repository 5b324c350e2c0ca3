"""A case's step under torch.profiler."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from magc.bench.cases import Case, length_name
from magc.bench.trace import Profile, read_events, summarize
from magc.bench.work import Progress, Workbench
from magc.errors import InputError

MOST_SEGMENTS = 16
"""Of those that are recomputed. What they do repeats, and a trace has 300 bytes for each of thousands of kernels in one."""


def record(workbench: Workbench, case: Case, disk_dir: str | None, progress: Progress) -> Profile:
    """Profile a warm step of a case, or its last segments where it has more than `MOST_SEGMENTS`.

    Args:
        workbench: on a GPU.
        case: what to profile.
        disk_dir: for checkpoints on disk.
        progress: told what is being done.

    Raises:
        InputError: the workbench is not on a GPU.
        BudgetError: no plan fits.
    """
    if workbench.device.type != "cuda":
        raise InputError(f"a profile needs a GPU, and this runs on {workbench.device}; give --device cuda")
    with workbench.prepared(case, disk_dir, progress) as step:
        progress("warming up")
        step.warm_up()
        tokens = step.part(MOST_SEGMENTS)
        step.run(tokens)
        start = time.perf_counter()
        step.run(tokens)
        wall_us = (time.perf_counter() - start) * 1e6
        progress("profiling a step")
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            step.run(tokens)
        progress("reading the trace")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            events = read_events(json.loads(file.read_text(encoding="utf-8", errors="replace")))
        shown = "" if tokens is None else f", the last {length_name(tokens)} tokens"
        return summarize(
            f"{case}{shown}; {step.plan}", events, wall_us, tokens=tokens or case.tokens, layers=len(step.model.layers)
        )
