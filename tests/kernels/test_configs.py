"""Launch configurations as values: JSON and back, what is refused, and the search for faster ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

from magc_kernels import selftest, tune
from magc_kernels.configs import ConvShape, KernelConfigs, NormShape, SSDShape, check_config
from magc_kernels.conv._config import ConvConfig, ConvTile, conv_config
from magc_kernels.norm._config import NormConfig, norm_config
from magc_kernels.ssd._config import ssd_config

BF16 = torch.bfloat16
SHAPE = NormShape(torch.float32, 16)
CONFIGS = KernelConfigs(
    ssd={SSDShape(BF16, 64, 128): ssd_config(BF16, 64, 128, None)},
    conv={ConvShape(BF16, 4): ConvConfig(ConvTile(8, 8, 64, 2), ConvTile(4, 16, 32, 1, registers=128))},
    norm={NormShape(BF16, 5120): NormConfig(5, 4), NormShape(torch.float32, 64): NormConfig(1, 1)},
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
        (change("entries", 0, "operator", to="rnn"), "entry 0: operator 'rnn' is none of ssd, conv, norm"),
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
    with pytest.raises(ValueError, match="pieces 9 is not"):
        KernelConfigs(norm={SHAPE: NormConfig(9, 1)})


def test_shipped_configurations_are_ones_that_may_be_passed() -> None:
    for entry in selftest.shipped():
        shape, config = entry.shape, entry.config
        if isinstance(shape, ConvShape):
            assert conv_config(shape.dtype, shape.width, config=config) is config  # pyright: ignore[reportArgumentType]
        elif isinstance(shape, NormShape):
            assert norm_config(shape.dtype, shape.group_size, config=config) is config  # pyright: ignore


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
    shipped = selftest.shipped_config(SHAPE, None)
    assert isinstance(shipped, NormConfig)
    assert found == replace(shipped, warps=1, forward_rows=3, backward_programs=2)
    assert any("warps=3 not usable" in line for line in lines)


def test_tuning_passes_over_what_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = search(monkeypatch, lambda c: 9.0 - c.forward_rows, lambda c: c.forward_rows != 3)
    assert found.forward_rows == 2


def test_every_alternative_is_of_a_known_field_and_some_can_run() -> None:
    shapes = (SSDShape(BF16, 64, 128), ConvShape(BF16, 4), NormShape(BF16, 5120))
    for shape in shapes:
        shipped = selftest.shipped_config(shape, None)
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
