"""The Triton convolution against float64: in the interpreter without a GPU, on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, ON_GPU, triton_test  # isort: skip  (before Triton)

from magc_kernels.conv import _config, autograd, reference
from magc_kernels.conv._config import ConvConfig, ConvTile
from tests.kernels.compare import assert_close, packed_ids, randn

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test(), pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:  # the interpreter's time goes with the number of tokens that programs walk over
            small = ConvConfig(forward=ConvTile(2, 4, 32, 1), backward=ConvTile(2, 4, 16, 1))
            patch.setattr(_config, "_DEFAULT", small)
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


def test_documents_longer_than_a_tile() -> None:
    """Some tiles hold one document only and lie away from both ends, some where two meet."""
    inputs = make_inputs(12, 60, batch=1)
    ids = torch.tensor([0] * 21 + [3] * 20 + [0] * 19)[None]
    check(inputs, activation="silu", seq_idx=ids, prev_seq_idx=torch.tensor([0]))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_activation_far_from_zero() -> None:
    """The exponential in it overflows, on the GPU silently, and its gradient must be 0, not a NaN."""
    inputs = make_inputs(13, 6)
    check({**inputs, "bias": 200.0 * inputs["bias"]}, activation="silu")


@pytest.mark.parametrize("packed", [False, True])
def test_no_tile_changes_the_forward_by_a_bit(packed: bool) -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(14, 45, batch=1), torch.float32).items()}
    options: dict[str, Any] = {"activation": "silu"}
    if packed:
        options["seq_idx"] = packed_ids(14, 1, 45, mean=12.0).to(DEVICE)
    y, state = autograd.causal_conv1d(**inputs, **options)
    expected = evaluate(reference.causal_conv1d, make_inputs(14, 45, batch=1), torch.float64, **options)
    for tile in (ConvTile(4, 4, 16, 2), ConvTile(1, 16, 32, 1)):
        config = ConvConfig(tile, tile)
        for a, e in zip(autograd.causal_conv1d(**inputs, **options, config=config), (y, state), strict=True):
            assert torch.equal(a, e)
        actual = evaluate(
            partial(autograd.causal_conv1d, config=config), make_inputs(14, 45, batch=1), torch.float32, **options
        )
        for name in expected:
            assert_close(actual[name], expected[name], 1e-5, name)


def test_a_configuration_that_cannot_run_is_refused() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(9, 4), torch.float32).items()}
    tile = ConvTile(2, 4, 16, 1)
    with pytest.raises(ValueError, match="backward tile: run 6 is not a power of two from 4"):
        autograd.causal_conv1d(**inputs, config=ConvConfig(tile, replace(tile, run=6)))


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


def test_tokens_far_apart_are_copied_and_refused_as_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(16, 5), torch.float32).items()}
    far = torch.empty(2, 5, 40, device=DEVICE)[..., :20].copy_(inputs["x"])
    monkeypatch.setattr(autograd, "_FARTHEST", 30)
    y, _ = autograd.forward(autograd.ConvInputs(**{**inputs, "x": far}))
    assert torch.equal(y, autograd.forward(autograd.ConvInputs(**inputs))[0])
    with pytest.raises(ValueError, match="tokens 40 elements apart"):
        autograd.vjp(autograd.ConvInputs(**inputs), y, out=far)


def test_gradients_of_half_precision_weights_can_be_kept_in_float32() -> None:
    inputs = {n: t.to(DEVICE, torch.float16) for n, t in make_inputs(11, 15).items()}
    dy = torch.ones_like(inputs["x"])
    half = autograd.vjp(autograd.ConvInputs(**inputs), dy)
    wide = autograd.vjp(autograd.ConvInputs(**inputs), dy, float32_weights=True)
    expected = autograd.vjp(autograd.ConvInputs(**{n: t.float() for n, t in inputs.items()}), dy.float())
    for name in ("weight", "bias"):
        sums = getattr(wide, name)
        assert sums.dtype == torch.float32
        assert_close(sums, getattr(expected, name), 1e-6)
        assert torch.equal(getattr(half, name), sums.half())


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_segmentation_equals_the_whole_to_the_bit_on_the_gpu(dtype: torch.dtype, packed: bool) -> None:
    leaves = {n: t.detach() for n, t in cast(make_inputs(15, 2000, channels=264), dtype).items()}
    ids = packed_ids(15, 2, 2000, mean=300.0).to(DEVICE) if packed else None
    y, final = autograd.causal_conv1d(**leaves, activation="silu", seq_idx=ids)
    parts, state, previous, start = [], leaves["initial_state"], None, 0
    for size in (333, 1, 1000, 2, 664):
        segment = {**leaves, "x": leaves["x"][:, start : start + size], "initial_state": state}
        seq_idx = None if ids is None else ids[:, start : start + size]
        part, state = autograd.causal_conv1d(**segment, activation="silu", seq_idx=seq_idx, prev_seq_idx=previous)
        previous = None if ids is None else ids[:, start + size - 1]
        parts.append(part)
        start += size
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, final)


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
