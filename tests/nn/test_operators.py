"""What `impl=` stands for on a device, and that users are told."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import magc
from magc.errors import InputError
from magc.nn import Mamba2, Mamba2Block
from magc.nn.operators import _too_old, choose, operators

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were installed."""
    monkeypatch.setattr("magc.nn.operators.find_spec", lambda name: object())
    monkeypatch.setattr("magc.nn.operators._too_old", lambda: None)


def test_names_are_taken_at_their_word() -> None:
    assert choose("reference", GPU).name == "reference"
    assert choose("triton", CPU, torch.float64, "too large").name == "triton"
    with pytest.raises(InputError, match="impl='cuda' is not available"):
        choose("cuda", GPU)  # pyright: ignore[reportArgumentType]


def test_auto_is_the_reference_on_the_cpu() -> None:
    assert choose("auto", CPU).name == "reference"
    assert operators("auto", CPU).name == "reference"


@pytest.mark.usefixtures("with_triton")
def test_auto_is_triton_on_a_gpu_for_what_the_kernels_take() -> None:
    assert choose("auto", GPU).name == "triton"
    assert choose("auto", GPU, torch.bfloat16).name == "triton"
    double = choose("auto", GPU, torch.float64)
    assert (double.name, double.reason) == ("reference", "no Triton kernels for torch.float64")
    odd = Mamba2(24, headdim=24).implementation(GPU)
    assert (odd.name, odd.reason) == ("reference", "the Triton scan takes no headdim 24")
    assert Mamba2(64, headdim=64).implementation(GPU, torch.float32).name == "triton"


def test_auto_says_when_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magc.nn.operators.find_spec", lambda name: None)
    choice = choose("auto", GPU)
    assert (choice.name, choice.reason) == ("reference", "the package triton is not installed")


def test_auto_says_when_triton_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magc.nn.operators.find_spec", lambda name: object())
    monkeypatch.setattr("magc.nn.operators.version", lambda name: "3.5.1")
    _too_old.cache_clear()
    choice = choose("auto", GPU)
    _too_old.cache_clear()
    assert (choice.name, choice.reason) == ("reference", "triton 3.5.1 is older than 3.6, which the kernels are for")


def test_a_plan_tells_what_its_layers_run_on() -> None:
    layers = [Mamba2Block(16, headdim=8, d_state=8, chunk_size=8) for _ in range(2)]
    plan = magc.plan(layers, torch.zeros(1, 16, 16), budget="64MiB")
    assert "'reference' (plain PyTorch) in 2 of 2 layers" in plan.explain()


@pytest.mark.gpu
def test_a_plan_on_a_gpu_tells_of_triton() -> None:
    layers = [Mamba2Block(32, headdim=16, d_state=16, device="cuda") for _ in range(2)]
    plan = magc.plan(layers, torch.zeros(1, 64, 32, device="cuda"), budget="1GiB")
    assert "'triton' in 2 of 2 layers" in plan.explain()


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_triton_by_name_without_triton_says_what_to_install() -> None:
    from magc.errors import MissingExtraError

    with pytest.raises(MissingExtraError, match="triton"):
        Mamba2(16, headdim=16, d_state=16, impl="triton")(torch.zeros(1, 4, 16))
