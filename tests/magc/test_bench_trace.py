"""What `magc bench --profile` makes of a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from magc.bench.cases import Case, Method
from magc.bench.profiling import record
from magc.bench.trace import COPIES, OTHER, PRODUCTS, SCAN, GpuEvent, busy, category, read_events, summarize
from magc.bench.work import Workbench
from magc.errors import InputError


def kernel(start: float, duration: float, name: str = "k") -> GpuEvent:
    return GpuEvent(name, "kernel", start, duration)


def test_time_in_which_several_kernels_run_counts_once() -> None:
    found = busy([kernel(0, 10), kernel(2, 3), kernel(8, 4)], 0, 20)
    assert (found.span_us, found.busy_us) == (20, 12)
    assert found.idle_share == pytest.approx(0.4)


def test_pauses_are_counted_from_a_microsecond_on() -> None:
    found = busy([kernel(0, 10), kernel(10.5, 9.5), kernel(25, 5)], 0, 32)
    assert (found.gaps, found.longest_gap_us) == (2, 5)
    assert found.busy_us == pytest.approx(24.5)


def test_events_outside_the_span_are_cut() -> None:
    found = busy([kernel(0, 10), kernel(15, 10), kernel(40, 1)], 5, 20)
    assert (found.busy_us, found.gaps) == (10, 1)


def test_nothing_but_a_pause() -> None:
    found = busy([], 0, 7)
    assert (found.idle_share, found.gaps, found.longest_gap_us) == (1, 1, 7)


@pytest.mark.parametrize(
    ("name", "kind", "counted"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "kernel", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "kernel", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(...)", "kernel", PRODUCTS),
        ("Memcpy HtoD (Pinned -> Device)", "copy", COPIES),
        ("void at::native::elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "kernel", COPIES),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "kernel", COPIES),
        ("sweep_backward", "kernel", SCAN),
        ("conv_backward", "kernel", "convolution"),
        ("gated_forward", "kernel", "gated norm"),
        ("add_backward", "kernel", "addition and norm"),
        ("void at::native::tensor_kernel_scan_innermost_dim<long>", "kernel", OTHER),
        ("void at::native::(anonymous namespace)::embedding_backward_kernel<int>", "kernel", OTHER),
    ],
)
def test_categories(name: str, kind: str, counted: str) -> None:
    assert category(GpuEvent(name, kind, 0, 1)) == counted


def test_a_trace_is_read_in_order_and_without_what_the_host_did() -> None:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": "b", "ts": 5.5, "dur": 2, "args": {"stream": 7}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 100},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 1.5, "dur": 0.5},
        {"ph": "M", "name": "process_name"},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1},
    ]
    assert read_events({"traceEvents": events}) == [
        GpuEvent("Memset (Device)", "copy", 1.5, 0.5),
        GpuEvent("b", "kernel", 5.5, 2),
    ]


def test_a_step_in_sum() -> None:
    events = [kernel(i * 10, 8, "nvjet") for i in range(10)] + [kernel(100, 20, "roles"), kernel(121, 0.5, "own")]
    found = summarize("a step", events, 130, tokens=10, layers=2, top=2)
    assert found.events == 12
    assert found.step.span_us == 121.5
    assert found.step.busy_us == 100.5
    assert found.idle_by_clock == pytest.approx(1 - 100.5 / 130)
    assert list(found.categories) == [PRODUCTS, SCAN, OTHER]
    assert sum(found.categories.values()) == pytest.approx(1)
    assert [(one.name, one.count, one.us) for one in found.kernels] == [("nvjet", 10, 80), ("roles", 1, 20)]
    assert found.as_dict()["loop"]["idle_share"] == found.loop.idle_share


def test_the_loop_is_the_step_without_its_ends() -> None:
    """A slow start does not count to the loop."""
    events = [kernel(0, 1), *(kernel(10 + i, 1) for i in range(90))]
    found = summarize("a step", events, 100, tokens=1, layers=1)
    assert found.step.idle_share == pytest.approx(0.09)
    assert found.loop.idle_share == 0


def test_as_markdown() -> None:
    text = summarize(
        "tiny", [kernel(0, 8, "a|b" + "x" * 200), kernel(10, 90, "nvjet")], 110, tokens=10, layers=2
    ).as_markdown()
    assert text.startswith("# Profile: tiny\n")
    assert "| whole step | 0.1 | 2.0% | 1 | 2 us |" in text
    assert "Without the profiler the step takes 0.1 ms: GPU idle 10.9%." in text
    assert "| matrix products | 91.8% | 4.500 |" in text
    assert "| nvjet | matrix products | 1 | 0.1 | 90.0 | 91.8% |" in text
    assert "| a/bxxx" in text
    assert max(map(len, text.splitlines())) < 160


def test_a_trace_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace has no kernels"):
        summarize("a step", [], 1, tokens=1, layers=1)


def test_a_trace_of_torch_is_of_the_form_that_is_read(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(4).add(1)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any(event.get("cat") == "cpu_op" and event["dur"] >= 0 for event in trace["traceEvents"])
    assert read_events(trace) == []


def test_a_profile_without_a_gpu_is_refused() -> None:
    case = Case(model="tiny", tokens=256, method=Method.NONE)
    with pytest.raises(InputError, match="a profile needs a GPU, and this runs on cpu"):
        record(Workbench(torch.device("cpu")), case, None, lambda news: None)
