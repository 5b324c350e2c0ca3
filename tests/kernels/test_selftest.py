"""The self-test of launch configurations: it passes for what is shipped and fails for what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

from magc_kernels import selftest
from magc_kernels.configs import ConvShape, NormShape, SelectiveScanShape, SSDShape, shipped_config
from magc_kernels.conv._config import ConvConfig, ConvTile
from magc_kernels.norm._config import NormConfig
from magc_kernels.selective_scan._config import SelectiveScanConfig
from magc_kernels.ssd._config import SSDConfig

CPU_SHAPES = [
    SSDShape(torch.float32, 64, 16),  # few heads
    ConvShape(torch.float32, 3),
    NormShape(torch.float32, 40),
    SelectiveScanShape(torch.float32, 16),
]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test():
        yield


def entry_for(shape: Any) -> selftest.Entry:
    return selftest.Entry(None, shape, shipped_config(shape, None))


def small_conv() -> selftest.Entry:
    tile = ConvTile(2, 4, 16, 1)
    return selftest.Entry(None, ConvShape(torch.float32, 4), ConvConfig(tile, tile))


def test_every_operator_and_class_of_devices_is_listed_once() -> None:
    entries = selftest.shipped()
    kinds = {(e.capability, type(e.shape), e.shape.dtype) for e in entries}
    assert len(kinds) == 3 * 4 * 3
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_shipped_configurations_pass(shape: Any) -> None:
    entry = entry_for(shape)
    # The interpreter runs one program after another, and one token after another.
    if isinstance(entry.config, ConvConfig):
        forward, backward = entry.config.forward, entry.config.backward
        tiles = ConvConfig(replace(forward, run=8, channels=32), replace(backward, run=8))
        entry = replace(entry, config=tiles)
    if isinstance(entry.config, NormConfig):
        entry = replace(entry, config=replace(entry.config, backward_programs=3))
    if isinstance(entry.config, SelectiveScanConfig):
        entry = replace(entry, config=replace(entry.config, chunk=8, share=1))
    if isinstance(entry.config, SSDConfig):
        entry = replace(entry, config=replace(entry.config, chunk=32, rows=16))
    result = selftest.run(entry, DEVICE)
    assert result.passed, (result.failures, result.errors)
    gradients = {name for name in result.errors if name.startswith("d")}
    assert {"dx", "dweight"} <= gradients or {"dx", "dB", "dstate"} <= gradients


@pytest.mark.parametrize("name", ["y", "dbias", "drows"])
def test_a_wrong_result_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = selftest.call_kernels

    def call(shape: Any, config: Any, tensors: Any) -> Any:
        results = original(shape, config, tensors)
        results[name].view(-1)[0] += 0.1
        return results

    monkeypatch.setattr(selftest, "call_kernels", call)
    result = selftest.run(small_conv(), DEVICE)
    assert result.failures == (name,)
    assert not result.passed


def test_a_number_that_is_none_is_a_failure() -> None:
    result = selftest.run(small_conv(), DEVICE)
    assert result.passed
    assert replace(result, errors={**result.errors, "y": float("nan")}).failures == ("y",)
    assert not replace(result, repeats=False).passed


@pytest.mark.parametrize(("own", "expected"), [((9, 0), (9, 0)), ((8, 9), None), (None, None)])
def test_a_device_without_configurations_of_its_own_is_of_the_generic_class(
    own: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "capability", lambda _: own)
    assert selftest.device_class(DEVICE) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("entry", selftest.shipped((selftest.device_class(DEVICE),)), ids=str)
def test_shipped_configurations_pass_on_the_gpu(entry: selftest.Entry) -> None:
    result = selftest.run(entry, DEVICE)
    assert result.passed, (result.failures, result.errors, result.bounds)
