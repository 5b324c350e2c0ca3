"""The whole Mamba-2 layer at a real size in low precision on a GPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

from magc_kernels.mamba2 import autograd as fused
from magc_kernels.mamba2 import reference
from magc_kernels.mamba2.values import Mamba2Inputs, Mamba2Outputs, Mamba2Sizes, Mamba2Weights
from tests.kernels.compare import randn

pytestmark = pytest.mark.gpu

NAMES = ("hidden", "residual", "conv_state", "ssm_state")
WEIGHTS = tuple(field.name for field in fields(Mamba2Weights))
D, H, P, N = 256, 8, 64, 128


@pytest.fixture(autouse=True)
def _poisoned() -> Any:
    with triton_test():
        yield


def block(length: int, dtype: torch.dtype) -> Mamba2Inputs:
    """A block of moderate size with realistic weights; states and the residual are float32 as always."""
    scan, channels = H * P, H * P + 2 * N
    columns = scan + channels + H

    def draw(seed: int, *shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (scale * randn(seed, *shape)).to(DEVICE, kind)

    weights = Mamba2Weights(
        in_proj=draw(0, columns, D, scale=D**-0.5),
        conv=draw(1, channels, 1, 4, scale=0.5),
        dt_bias=draw(2, H) - 3.0,
        A_log=draw(3, H, scale=0.3) + 1.0,
        D=draw(4, H),
        out_proj=draw(5, D, scan, scale=scan**-0.5),
        conv_bias=draw(6, channels, scale=0.1),
        norm=1.0 + draw(7, scan, scale=0.1),
        block_norm=1.0 + draw(8, D, scale=0.1),
    )
    return Mamba2Inputs(
        draw(9, 1, length, D),
        weights,
        Mamba2Sizes(P, 1, N),
        residual=draw(10, 1, length, D, kind=torch.float32),
        conv_state=draw(11, 1, 3, channels),
        ssm_state=draw(12, 1, H, P, N, kind=torch.float32),
    )


def leaves(inputs: Mamba2Inputs, dtype: torch.dtype | None) -> Mamba2Inputs:
    """Fresh leaves, in `dtype` if given."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_()

    weights = Mamba2Weights(**{name: leaf(getattr(inputs.weights, name)) for name in WEIGHTS})
    return replace(inputs, weights=weights, **{name: leaf(getattr(inputs, name)) for name in NAMES})


def everything(result: Mamba2Outputs, inputs: Mamba2Inputs) -> dict[str, Tensor]:
    """All results, and gradients of a random linear function of them."""
    made = {field.name: getattr(result, field.name) for field in fields(result)}
    wanted = {name: getattr(inputs, name) for name in NAMES} | {
        name: getattr(inputs.weights, name) for name in WEIGHTS if getattr(inputs.weights, name) is not None
    }
    weights = [
        randn(100 + i, *x.shape).to(x.device).to(torch.bfloat16).to(x.dtype) for i, x in enumerate(made.values())
    ]
    grads = torch.autograd.grad(list(made.values()), list(wanted.values()), weights)
    return made | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def error(actual: Tensor, truth: Tensor) -> float:
    """Root of the mean square, relative."""
    actual, truth = actual.detach().double(), truth.detach()
    return float((actual - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [512, 1000])
def test_low_precision_is_as_good_as_the_references(dtype: torch.dtype, length: int) -> None:
    inputs = block(length, dtype)
    exact, plain, kernels = leaves(inputs, torch.float64), leaves(inputs, None), leaves(inputs, None)
    truth = everything(reference.mamba2(exact), exact)
    expected = everything(reference.mamba2(plain), plain)
    actual = everything(fused.mamba2(kernels), kernels)
    for name, value in truth.items():
        # Of a few numbers the rounding of the result alone, up to half a unit in the last place, may go either way.
        rounding = torch.finfo(dtype).eps / 2 if value.numel() <= 64 else 1e-7
        assert error(actual[name], value) <= 1.25 * error(expected[name], value) + rounding, name


def test_same_bits_every_time_and_whatever_is_kept() -> None:
    inputs = block(777, torch.bfloat16)
    runs = []
    for keep in ("projection", "states", "outputs", "states"):
        own = leaves(inputs, None)
        runs.append(everything(fused.mamba2(own, keep=keep), own))
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(run[name], value), name


def test_all_passes_can_be_captured_and_replayed_on_new_inputs() -> None:
    inputs = leaves(block(512, torch.bfloat16), None)
    dy = torch.randn_like(inputs.hidden)
    dresidual = torch.randn(inputs.hidden.shape, device=DEVICE)

    def passes() -> tuple[Any, ...]:
        y = fused.forward(inputs)
        _, saved = fused.recompute(inputs, output=False)
        grads = fused.vjp(saved, dy, dresidual)
        return y.y, y.ssm_state, grads.hidden, grads.residual, grads.ssm_state, *grads.weights.values()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        passes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes()
    with torch.no_grad():
        inputs.hidden.normal_()
        dy.normal_()
    graph.replay()
    for replayed, fresh in zip(captured, passes(), strict=True):
        assert (replayed is None) == (fresh is None)
        if fresh is not None:
            assert torch.equal(replayed, fresh)
