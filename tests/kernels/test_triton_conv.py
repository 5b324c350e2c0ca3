"""The Triton convolution against float64: in the interpreter without a GPU, on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, ON_GPU, triton_test  # isort: skip  (before Triton)

from magc_kernels.conv import autograd, reference
from tests.kernels.compare import assert_close, packed_ids, randn

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test(), pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:  # the interpreter's time goes with the number of tokens that programs walk over
            patch.setattr(autograd, "CONFIG", autograd.ConvConfig(forward_tokens=8, backward_tokens=6, channels=32))
        yield


def make_inputs(
    seed: int, length: int, *, width: int = 4, batch: int = 2, channels: int = 20, bias: bool = True, state: bool = True
) -> dict[str, Tensor]:
    inputs = {"x": randn(seed, batch, length, channels), "weight": randn(seed + 1, channels, width)}
    if bias:
        inputs["bias"] = randn(seed + 2, channels)
    if state:
        inputs["initial_state"] = randn(seed + 3, batch, width - 1, channels)
    return inputs


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    types = {"weight": wide, "bias": wide}
    return {n: t.to(DEVICE, types.get(n, dtype)).requires_grad_() for n, t in inputs.items()}


def evaluate(function: Any, inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Outputs and, under the inputs' names prefixed by "d", all gradients."""
    options = {n: o.to(DEVICE) if isinstance(o, Tensor) else o for n, o in options.items()}
    leaves = cast(inputs, dtype)
    outputs = function(**leaves, **options)
    assert all(out.dtype == dtype for out in outputs)
    total = sum((out.double() * randn(90 + i, *out.shape).to(DEVICE)).sum() for i, out in enumerate(outputs))
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    gradients = {"d" + n: g for n, g in zip(leaves, grads, strict=True)}
    return {"y": outputs[0].detach(), "state": outputs[1].detach(), **gradients}


def check(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    actual = evaluate(autograd.causal_conv1d, inputs, dtype, **options)
    expected = evaluate(reference.causal_conv1d, inputs, torch.float64, **options)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-5 if dtype == torch.float32 else 6e-3, name)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 21])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_outputs_and_all_gradients_equal_float64(width: int, length: int) -> None:
    odd = bool(length % 2)
    inputs = make_inputs(1, length, width=width, bias=odd, state=not odd)
    check(inputs, activation="silu" if odd else None)
    check(make_inputs(2, length, width=width), activation="silu")


@pytest.mark.parametrize("previous", [None, (1, 0)])
@pytest.mark.parametrize("length", [1, 2, 4, 19])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_packed_sequences_with_a_state(width: int, length: int, previous: tuple[int, int] | None) -> None:
    options = {} if previous is None else {"prev_seq_idx": torch.tensor(previous)}
    inputs = make_inputs(3, length, width=width)
    check(inputs, activation="silu", seq_idx=packed_ids(3, 2, length), **options)


def test_more_channels_than_one_program_takes() -> None:
    check(make_inputs(4, 5, batch=1, channels=300), activation="silu")


def test_float16() -> None:
    check(make_inputs(5, 12), torch.float16, activation="silu")


@pytest.mark.parametrize("packed", [False, True])
def test_any_segmentation_equals_the_whole_to_the_bit(packed: bool) -> None:
    leaves = cast(make_inputs(6, 25), torch.float32)
    ids = packed_ids(6, 2, 25).to(DEVICE) if packed else None
    y, final = autograd.causal_conv1d(**leaves, activation="silu", seq_idx=ids)
    parts, state, previous, start = [], leaves["initial_state"], None, 0
    for size in (1, 2, 14, 8):
        segment = {**leaves, "x": leaves["x"][:, start : start + size], "initial_state": state}
        seq_idx = None if ids is None else ids[:, start : start + size]
        part, state = autograd.causal_conv1d(**segment, activation="silu", seq_idx=seq_idx, prev_seq_idx=previous)
        previous = None if ids is None else ids[:, start + size - 1]
        parts.append(part)
        start += size
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, final)
    weight = randn(7, *y.shape).float().to(DEVICE)
    names = list(leaves)
    whole = torch.autograd.grad((y * weight).sum() + final.square().sum(), [leaves[n] for n in names])
    split = torch.autograd.grad((torch.cat(parts, 1) * weight).sum() + state.square().sum(), [leaves[n] for n in names])
    for name, a, e in zip(names, split, whole, strict=True):
        assert_close(a, e, 1e-5, name)


def test_strided_input_and_gradient() -> None:
    """X is a slice of a projection, and its gradient is written into a slice of the projection's."""
    inputs = {n: t.detach() for n, t in cast(make_inputs(8, 15), torch.float32).items()}
    wide = torch.randn(2, 15, 50, device=DEVICE)
    wide[..., 10:30] = inputs["x"]
    dy = torch.randn(2, 15, 20, device=DEVICE)
    plain = autograd.ConvInputs(**inputs, activation="silu")
    strided = autograd.ConvInputs(**{**inputs, "x": wide[..., 10:30]}, activation="silu")
    for a, e in zip(autograd.forward(strided), autograd.forward(plain), strict=True):
        assert torch.equal(a, e)
    buffer = torch.zeros_like(wide)
    expected = autograd.vjp(plain, dy)
    actual = autograd.vjp(strided, dy, out=buffer[..., 10:30])
    assert torch.equal(buffer[..., 10:30], expected.x)
    assert not buffer[..., :10].any()
    assert not buffer[..., 30:].any()
    assert torch.equal(actual.weight, expected.weight)


def test_arguments_outside_the_kernels_limits_are_refused() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(9, 4), torch.float32).items()}
    with pytest.raises(TypeError, match="float64"):
        autograd.causal_conv1d(**{n: t.double() for n, t in inputs.items()})
    with pytest.raises(ValueError, match="one CUDA device"):
        autograd.causal_conv1d(**{**inputs, "bias": inputs["bias"].to("meta")})
    with pytest.raises(ValueError, match="weight must have shape"):
        autograd.causal_conv1d(**{**inputs, "weight": inputs["weight"][:3]})
    with pytest.raises(ValueError, match="pass both or neither"):
        autograd.causal_conv1d(**inputs, prev_seq_idx=torch.zeros(2, dtype=torch.int32, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_on_the_gpu_is_that_of_rounding_inputs_and_outputs(dtype: torch.dtype, packed: bool) -> None:
    inputs = make_inputs(10, 1000, channels=600)
    options: dict[str, Any] = {"activation": "silu"}
    if packed:
        options["seq_idx"] = packed_ids(3, 2, 1000, mean=50.0)
    expected = evaluate(reference.causal_conv1d, inputs, torch.float64, **options)
    plain = evaluate(reference.causal_conv1d, inputs, dtype, **options)
    actual = evaluate(autograd.causal_conv1d, inputs, dtype, **options)
    again = evaluate(autograd.causal_conv1d, inputs, dtype, **options)
    for name, e in expected.items():
        error, bound = ((t.double() - e).norm() / e.norm() for t in (actual[name], plain[name]))
        assert error <= 1.1 * bound + (1e-6 if dtype == torch.float32 else 0.0), name
        assert torch.equal(actual[name], again[name]), name
