"""Linear layers whose weight gradients go into a sum, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magc_kernels.linear import reference
from magc_kernels.linear.autograd import linear
from tests.kernels.compare import assert_close, randn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Summed(torch.nn.Parameter):
    """A parameter whose gradients go into a sum; it counts how often the sum was asked for."""

    total: Tensor | None
    asked = 0

    def grad_sum(self) -> Tensor | None:
        self.asked += 1
        return self.total


def summed(data: Tensor, dtype: torch.dtype | None) -> Summed:
    parameter = Summed(data)
    parameter.total = None if dtype is None else torch.zeros_like(data, dtype=dtype)
    return parameter


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_sums_are_exact_to_float32_where_gradients_in_the_weights_type_are_not(device: str, dtype: torch.dtype) -> None:
    data, bias_data = randn(0, 24, 16).to(device, dtype), randn(1, 24).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = summed(data, wide), summed(bias_data, wide)
    truth = torch.zeros(24, 16, dtype=torch.float64)
    bias_truth = torch.zeros(24, dtype=torch.float64)
    for step in range(8):
        x = randn(2 + step, 3, 5, 16).to(device, dtype).requires_grad_()
        dy = randn(20 + step, 3, 5, 24).to(device, dtype)
        y = linear(x, weight, bias)
        assert torch.equal(y, reference.linear(x, data, bias_data))
        y.backward(dy)
        rows = dy.flatten(0, 1).double().cpu()
        truth += rows.T @ x.detach().flatten(0, 1).double().cpu()
        bias_truth += rows.sum(0)
        expected = dy.double() @ data.double()
        assert x.grad is not None
        assert_close(x.grad, expected, 4 * torch.finfo(dtype).eps)
    assert weight.grad is None
    assert bias.grad is None
    assert weight.total is not None
    assert bias.total is not None
    tolerance = 1e-6 if wide == torch.float32 else 1e-14
    assert_close(weight.total.cpu(), truth, tolerance)
    assert_close(bias.total.cpu(), bias_truth, tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_nothing_is_rounded_on_the_way_to_the_sum(device: str) -> None:
    weight = summed(randn(0, 24, 16).float().to(device), torch.float32)
    x, dy = randn(1, 7, 16).float().to(device).requires_grad_(), randn(2, 7, 24).bfloat16().to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.linear(x.bfloat16(), weight.detach().bfloat16()))
    y.backward(dy)
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert weight.total is not None
    assert_close(weight.total, dy.double().T @ x.detach().bfloat16().double(), 1e-6)


def test_a_parameter_without_a_sum_gets_its_gradient_from_autograd() -> None:
    plain = torch.nn.Parameter(randn(0, 4, 3))
    single = summed(plain.detach().clone(), None)
    x = randn(1, 5, 3)
    for parameter in (plain, single):
        linear(x, parameter).square().sum().backward()
    assert plain.grad is not None
    assert single.grad is not None
    assert_close(single.grad, plain.grad, 1e-14)


def test_the_sum_is_not_asked_for_before_the_backward() -> None:
    weight = summed(randn(0, 4, 3), torch.float64)
    y = linear(randn(1, 5, 3), weight)
    assert weight.asked == 0
    y.sum().backward()
    assert weight.asked == 1


def test_a_frozen_weight_gets_nothing_and_passes_gradients_on() -> None:
    weight = summed(randn(0, 4, 3), torch.float64)
    bias = summed(randn(1, 4), torch.float64)
    weight.requires_grad_(False)
    x = randn(2, 5, 3).requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert weight.total is not None
    assert bias.total is not None
    assert not weight.total.any()
    assert_close(bias.total, torch.full((4,), 5.0), 1e-14)
    assert x.grad is not None


def test_gradients_of_gradients_are_refused_where_there_is_a_sum() -> None:
    x = randn(1, 5, 3).requires_grad_()
    y = linear(x, summed(randn(0, 4, 3), torch.float64))
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
