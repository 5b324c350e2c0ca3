"""Launch configurations as values: JSON and back, what is refused, and the search for faster ones."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

from magc_kernels import selftest, tune
from magc_kernels.configs import (
    ConvShape,
    KernelConfigs,
    NormShape,
    SelectiveScanShape,
    SSDShape,
    check_config,
    shipped_config,
)
from magc_kernels.conv import _config as conv_configs
from magc_kernels.conv._config import ConvConfig, ConvTile
from magc_kernels.norm import _config as norm_configs
from magc_kernels.norm._config import NormConfig
from magc_kernels.selective_scan import _config as selective_scan_configs
from magc_kernels.selective_scan._config import selective_scan_config
from magc_kernels.ssd import _config as ssd_configs

BF16 = torch.bfloat16
SHAPE = NormShape(torch.float32, 16)
CONFIGS = KernelConfigs(
    ssd={SSDShape(BF16, 64, 128): ssd_configs.ssd_config(BF16, 64, 128, None)},
    conv={ConvShape(BF16, 4): ConvConfig(ConvTile(8, 8, 64, 2), ConvTile(4, 16, 32, 1, registers=128))},
    norm={NormShape(BF16, 5120): NormConfig(5, 4), NormShape(torch.float32, 64): NormConfig(1, 1)},
    selective_scan={SelectiveScanShape(BF16, 16): replace(selective_scan_config(16), tokens=4, share=3)},
    gpu="some GPU",
    triton="3.6.0",
)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test():
        yield


def test_json_holds_all_of_it() -> None:
    assert KernelConfigs.from_json(CONFIGS.to_json()) == CONFIGS
    assert KernelConfigs.from_json(KernelConfigs().to_json()) == KernelConfigs()


def test_they_are_copied_and_pickled_with_a_layer() -> None:
    assert copy.deepcopy(CONFIGS) == CONFIGS
    assert pickle.loads(pickle.dumps(CONFIGS)) == CONFIGS


def change(*path: Any, to: Any) -> Callable[[Any], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("format", to=7), "format 7 is not the known one"),
        (change("gpu", to=3), "gpu must be text or null"),
        (change("entries", to={}), "entries must be a list"),
        (change("more", to=1), "the file: missing or unknown: more"),
        (change("entries", 1, to=[]), "entry 1 must be an object, got list"),
        (
            change("entries", 0, "operator", to="rnn"),
            "entry 0: operator 'rnn' is none of ssd, conv, norm, selective_scan",
        ),
        (change("entries", 0, "shape", "dtype", to="int8"), "entry 0, shape: dtype must be one of bfloat16"),
        (change("entries", 0, "config", "chunk", to=96), "entry 0: .*chunk 96 is not a power of two"),
        (change("entries", 0, "config", "warps", to=4), "entry 0, config: missing or unknown: warps"),
        (change("entries", 1, "config", "forward", "run", to=2), "entry 1: .*run 2 is not a power of two from 4"),
        (
            change("entries", 1, "config", "backward", "registers", to="all"),
            "entry 1, config, backward: registers must",
        ),
        (change("entries", 2, "config", "warps", to=True), "entry 2, config: warps must be of type int, got True"),
        (change("entries", 2, "config", "pieces", to=9), "entry 2: .*pieces 9 is not from 1 to 8"),
        (change("entries", 3, "shape", to={"dtype": "bfloat16", "group_size": 5120}), "entry 3: .* came before"),
        (change("entries", 4, "config", "block", to=3), "entry 4: .*block 3 is not a power of two from 1 to 8"),
        (change("entries", 4, "shape", "d_state", to=12), "entry 4: .*power of two up to 256, got 12"),
    ],
)
def test_other_json_is_refused_with_the_place(edit: Callable[[Any], None], message: str) -> None:
    data = json.loads(CONFIGS.to_json())
    edit(data)
    with pytest.raises(ValueError, match=message):
        KernelConfigs.from_json(json.dumps(data))


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        KernelConfigs.from_json("{")


def test_a_configuration_must_fit_its_shape() -> None:
    with pytest.raises(TypeError, match="NormConfig does not configure a ConvShape"):
        KernelConfigs(conv={ConvShape(BF16, 4): NormConfig(1, 1)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="'bfloat16' is no class of shapes"):
        KernelConfigs(norm={"bfloat16": NormConfig(1, 1)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a ConvShape is no shape of norm"):
        KernelConfigs(norm={ConvShape(BF16, 4): CONFIGS.conv[ConvShape(BF16, 4)]})  # pyright: ignore
    with pytest.raises(ValueError, match="pieces 9 is not"):
        KernelConfigs(norm={SHAPE: NormConfig(9, 1)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 48}, "chunk 48 is not a power of two from 8 to 256"),
        ({"lanes": 64}, "lanes 64 is not a power of two from 1 to 32"),
        ({"tokens": 0}, "tokens 0 is not a power of two from 1 to 8"),
        ({"block": 3, "share": 0}, "block 3 is not .*; share 0 is not from 1 to"),
        ({"programs": 0}, "programs 0 is not from 1 to"),
        ({"rows": 16}, r"rows \* lanes \* d_state is 8192, at most 4096 fit"),
        ({"backward_rows": 8, "block": 4}, r"block \* backward_rows \* backward_lanes \* d_state is 8192"),
    ],
)
def test_selective_scans_that_cannot_run_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot run with this SelectiveScanConfig: .*{message}"):
        selective_scan_config(16, config=replace(selective_scan_config(16), **changes))


def test_shipped_configurations_are_ones_that_may_be_passed() -> None:
    for entry in selftest.shipped():
        check_config(entry.shape, entry.config)


def test_classes_of_devices_are_those_with_configurations_of_their_own() -> None:
    modules = (ssd_configs, conv_configs, norm_configs, selective_scan_configs)
    own = {capability for module in modules for capability in module._SHIPPED}
    assert {*selftest.CLASSES} == {*own, None}


def search(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[NormConfig], float], passes: Callable[[NormConfig], bool]
) -> tuple[NormConfig, list[str]]:
    """Tune a norm, by the times and the results of the self-test that are given instead of real ones."""
    called: list[Any] = []
    monkeypatch.setattr(tune, "_TOKENS", 3)
    monkeypatch.setattr(selftest, "call_kernels", lambda _, config, __: called.append(config))
    monkeypatch.setattr(selftest, "run", lambda entry, _: selftest.Result(entry, {}, {}, passes(entry.config)))

    def measure(call: Callable[[], object]) -> float:
        call()
        return seconds(called[-1])

    lines: list[str] = []
    values: Any = {NormConfig: {"warps": (1, 2, 3), "forward_rows": (1, 2, 3), "backward_programs": (2,)}}
    found = tune.tune([SHAPE], DEVICE, lines.append, measure=measure, alternatives=values)
    assert found.triton is not None
    assert found.norm.keys() == {SHAPE}
    return found.norm[SHAPE], lines


def test_tuning_takes_the_fastest_value_of_each_field(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(config: NormConfig) -> float:
        return 9.0 - config.forward_rows + config.warps + 0.1 * config.backward_programs

    found, lines = search(monkeypatch, seconds, lambda _: True)
    shipped = shipped_config(SHAPE, None)
    assert isinstance(shipped, NormConfig)
    assert found == replace(shipped, warps=1, forward_rows=3, backward_programs=2)
    assert any("warps=3 not usable" in line for line in lines)


def test_tuning_passes_over_what_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = search(monkeypatch, lambda c: 9.0 - c.forward_rows, lambda c: c.forward_rows != 3)
    assert found.forward_rows == 2


def test_every_alternative_is_of_a_known_field_and_some_can_run() -> None:
    shapes = (SSDShape(BF16, 64, 128), ConvShape(BF16, 4), NormShape(BF16, 5120), SelectiveScanShape(BF16, 16))
    for shape in shapes:
        shipped = shipped_config(shape, None)
        for name, values in tune._ALTERNATIVES[type(shipped)].items():
            runnable = 0
            for value in values:
                with contextlib.suppress(ValueError):
                    check_config(shape, replace(shipped, **{name: value}))
                    runnable += 1
            assert runnable > 1, (shape, name)


def test_tuning_stops_if_the_shipped_configuration_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shipped configuration fails the self-test"):
        search(monkeypatch, lambda _: 1.0, lambda _: False)


@pytest.mark.gpu
def test_tuning_on_the_gpu() -> None:
    shape = NormShape(BF16, 1024)
    found = tune.tune([shape], DEVICE, alternatives={NormConfig: {"forward_rows": (1, 4)}})
    assert found.gpu == torch.cuda.get_device_name()
    assert selftest.run(selftest.Entry(None, shape, found.norm[shape]), DEVICE).passed
