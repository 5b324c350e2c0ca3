"""The norms against their formulas in float64, and their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels.norm.reference import add_rms_norm, gated_rms_norm, rms_norm
from tests.kernels.compare import assert_close, gradients, randn

EPS = 1e-3


def inputs_of(*names: str) -> dict[str, Tensor]:
    shapes = {"x": (2, 3, 12), "z": (2, 3, 12), "residual": (2, 3, 12), "weight": (12,)}
    return {name: randn(i, *shapes[name]).requires_grad_() for i, name in enumerate(names)}


def test_rms_norm_equals_torch() -> None:
    inputs = inputs_of("x", "weight")
    expected = functional.rms_norm(inputs["x"], (12,), inputs["weight"], EPS)
    actual = rms_norm(**inputs, eps=EPS)
    assert_close(actual, expected, 1e-14)
    truth = gradients([expected], inputs)
    for name, gradient in gradients([actual], inputs).items():
        assert_close(gradient, truth[name], 1e-13, name)


@pytest.mark.parametrize("group_size", [None, 12, 4, 1])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_rms_norm_equals_the_formula_group_by_group(group_size: int | None, norm_before_gate: bool) -> None:
    inputs = inputs_of("x", "z", "weight")
    x, z, weight = inputs.values()
    size = group_size or 12
    gate = z * torch.sigmoid(z)
    source = x if norm_before_gate else x * gate
    parts = [
        functional.rms_norm(source[..., i : i + size], (size,), weight[i : i + size], EPS) for i in range(0, 12, size)
    ]
    expected = torch.cat(parts, -1) * (gate if norm_before_gate else 1.0)
    actual = gated_rms_norm(**inputs, eps=EPS, group_size=group_size, norm_before_gate=norm_before_gate)
    assert_close(actual, expected, 1e-13)
    truth = gradients([expected], inputs)
    for name, gradient in gradients([actual], inputs).items():
        assert_close(gradient, truth[name], 1e-12, name)


def test_gated_rms_norm_without_gate_is_rms_norm() -> None:
    inputs = inputs_of("x", "weight")
    assert torch.equal(gated_rms_norm(inputs["x"], None, inputs["weight"]), rms_norm(**inputs))


@pytest.mark.parametrize("first", [False, True])
def test_add_rms_norm_returns_the_sum_and_its_norm(first: bool) -> None:
    inputs = inputs_of("x", "weight") if first else inputs_of("x", "weight", "residual")
    residual = inputs.get("residual")
    total = inputs["x"] if residual is None else inputs["x"] + residual
    expected = functional.rms_norm(total, (12,), inputs["weight"], EPS), total
    actual = add_rms_norm(inputs["x"], residual, inputs["weight"], eps=EPS)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-14)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert_close(gradient, truth[name], 1e-13, name)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_add_rms_norm_normalises_the_sum_before_it_is_rounded(residual_in_fp32: bool) -> None:
    x, residual, weight = (randn(i, *s) for i, s in enumerate([(64, 32), (64, 32), (32,)]))
    x, weight = x.bfloat16(), weight.bfloat16()
    residual = residual.float() if residual_in_fp32 else residual.bfloat16()
    y, total = add_rms_norm(x, residual, weight, residual_in_fp32=residual_in_fp32)
    exact, exact_total = add_rms_norm(x.double(), residual.double(), weight.double())
    assert y.dtype == torch.bfloat16
    assert total.dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
    ulp = 2**-8
    assert ((y.double() - exact).abs() <= ulp * exact.abs() + 1e-6).all()
    bound = 1e-6 if residual_in_fp32 else ulp * exact_total.abs() + 1e-6
    assert ((total.double() - exact_total).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_and_does_not_overflow(dtype: torch.dtype) -> None:
    x, z, weight = randn(0, 16, 64).to(dtype) * 300, randn(1, 16, 64).to(dtype), randn(2, 64).to(dtype)
    y = gated_rms_norm(x, z, weight, group_size=16)
    exact = gated_rms_norm(x.double(), z.double(), weight.double(), group_size=16)
    ulp = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= ulp * exact.abs() + 1e-6).all()


def test_wrong_arguments_are_refused() -> None:
    x, weight = torch.zeros(2, 12), torch.ones(12)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(x, torch.ones(11))
    with pytest.raises(ValueError, match="group_size must divide"):
        gated_rms_norm(x, None, weight, group_size=5)
    with pytest.raises(ValueError, match="z must have the shape of x"):
        gated_rms_norm(x, torch.zeros(2, 11), weight)
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        add_rms_norm(x, torch.zeros(1, 12), weight)
    with pytest.raises(TypeError, match="floating-point"):
        rms_norm(x.long(), weight)
