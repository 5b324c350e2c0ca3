"""The causal convolution against a token-by-token definition in float64."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from magc_kernels.conv.reference import causal_conv1d, causal_conv1d_step
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, splits


def naive_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One buffer of the last inputs per row, emptied where the document changes."""
    width = weight.shape[1]
    rows, states = [], []
    for b in range(x.shape[0]):
        empty = x.new_zeros(width - 1, x.shape[2])
        buffer = empty if initial_state is None else initial_state[b]
        previous = None
        if seq_idx is not None:
            previous = seq_idx[b, 0] if prev_seq_idx is None else prev_seq_idx[b]
        outputs = []
        for t in range(x.shape[1]):
            if seq_idx is not None:
                buffer = buffer if seq_idx[b, t] == previous else empty
                previous = seq_idx[b, t]
            window = torch.cat([buffer, x[b, t : t + 1]])
            y = torch.einsum("wc,cw->c", window, weight)
            outputs.append(y if bias is None else y + bias)
            buffer = window[1:]
        rows.append(torch.stack(outputs))
        states.append(buffer)
    y = torch.stack(rows)
    return functional.silu(y) if activation == "silu" else y, torch.stack(states)


def make_inputs(
    seed: int,
    length: int,
    width: int,
    *,
    batch: int = 2,
    channels: int = 3,
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    inputs = {"x": randn(seed, batch, length, channels), "weight": randn(seed + 1, channels, width)}
    if bias:
        inputs["bias"] = randn(seed + 2, channels)
    if initial:
        inputs["initial_state"] = randn(seed + 3, batch, width - 1, channels)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 9),
    width=st.integers(2, 4),
    bias=st.booleans(),
    initial=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    packed=st.booleans(),
    known=st.booleans(),
)
def test_output_state_and_all_gradients_equal_the_definition(
    seed: int,
    length: int,
    width: int,
    bias: bool,
    initial: bool,
    activation: Literal["silu"] | None,
    packed: bool,
    known: bool,
) -> None:
    inputs = make_inputs(seed, length, width, bias=bias, initial=initial)
    options: dict[str, Any] = {"activation": activation}
    if packed:
        options["seq_idx"] = packed_ids(seed, 2, length, documents=2)
        options["prev_seq_idx"] = packed_ids(seed + 1, 2, 1)[:, 0] if known else None
    actual, expected = causal_conv1d(**inputs, **options), naive_conv(**inputs, **options)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-13)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert_close(gradient, truth[name], 1e-12, name)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(2, 12),
    width=st.integers(2, 4),
    packed=st.booleans(),
    mean=st.sampled_from([1.01, 2.0, 4.0]),
)
def test_any_segmentation_equals_the_whole(seed: int, length: int, width: int, packed: bool, mean: float) -> None:
    """Also with segments shorter than the state, and documents shorter than it."""
    inputs = make_inputs(seed, length, width)
    seq_idx = packed_ids(seed, 2, length, documents=2, mean=2.0) if packed else None
    prev = packed_ids(seed + 5, 2, 1)[:, 0] if packed else None
    whole = causal_conv1d(**inputs, activation="silu", seq_idx=seq_idx, prev_seq_idx=prev)
    state, outputs, start = inputs["initial_state"], [], 0
    for size in splits(seed, length, mean):
        ids = None if seq_idx is None else seq_idx[:, start : start + size]
        y, state = causal_conv1d(
            inputs["x"][:, start : start + size],
            inputs["weight"],
            inputs["bias"],
            activation="silu",
            initial_state=state,
            seq_idx=ids,
            prev_seq_idx=prev,
        )
        prev = None if ids is None else ids[:, -1]
        outputs.append(y)
        start += size
    parts = torch.cat(outputs, 1), state
    for a, e in zip(parts, whole, strict=True):
        assert_close(a, e, 1e-13)
    truth = gradients(whole, inputs)
    for name, gradient in gradients(parts, inputs).items():
        assert_close(gradient, truth[name], 1e-12, name)


def test_equals_the_convolution_of_torch() -> None:
    inputs = make_inputs(4, 11, 4, initial=False)
    y, _ = causal_conv1d(**inputs)
    expected = functional.conv1d(
        functional.pad(inputs["x"].transpose(1, 2), (3, 0)),
        inputs["weight"][:, None],
        inputs["bias"],
        groups=3,
    ).transpose(1, 2)
    assert_close(y, expected, 1e-13)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_step_equals_a_segment_of_one_token(width: int, bias: bool) -> None:
    inputs = make_inputs(6, 1, width, bias=bias)
    expected = causal_conv1d(**inputs, activation="silu")
    y, state = causal_conv1d_step(
        inputs["x"].squeeze(1),
        inputs["weight"],
        inputs.get("bias"),
        inputs["initial_state"],
        activation="silu",
    )
    actual = y[:, None], state
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-14)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert_close(gradient, truth[name], 1e-13, name)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_state_is_a_value_in_the_input_type(length: int) -> None:
    x = randn(0, 2, length, 3).to(torch.bfloat16)
    initial = randn(1, 2, 3, 3).to(torch.bfloat16)
    before = initial.clone()
    y, state = causal_conv1d(x, randn(2, 3, 4).bfloat16(), initial_state=initial, activation="silu")
    assert y.dtype == state.dtype == torch.bfloat16
    assert torch.equal(initial, before)
    assert state.untyped_storage().nbytes() == state.nbytes
    assert torch.equal(state, torch.cat([initial, x], 1)[:, -3:])


def test_bfloat16_is_rounded_once() -> None:
    x, weight, bias = (t.to(torch.bfloat16) for t in (randn(0, 2, 50, 8), randn(1, 8, 4), randn(2, 8)))
    y, _ = causal_conv1d(x, weight, bias, activation="silu")
    exact, _ = causal_conv1d(x.double(), weight.double(), bias.double(), activation="silu")
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_meta_tensors_give_shapes() -> None:
    x = torch.zeros(2, 5, 3, device="meta")
    seq_idx = torch.zeros(2, 5, dtype=torch.int32, device="meta")
    y, state = causal_conv1d(x, torch.zeros(3, 4, device="meta"), seq_idx=seq_idx)
    assert y.shape == x.shape
    assert state.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 0, 3)}, ValueError, "length >= 1"),
        ({"weight": torch.zeros(3, 5)}, ValueError, "width 2 to 4"),
        ({"weight": torch.zeros(3, 1)}, ValueError, "width 2 to 4"),
        ({"weight": torch.zeros(4, 4)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"activation": "gelu"}, ValueError, "activation must be"),
        ({"initial_state": torch.zeros(2, 4, 3)}, ValueError, "the state must have shape"),
        ({"initial_state": torch.zeros(2, 3, 3).double()}, TypeError, "type of x"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.int32)}, ValueError, "seq_idx must have shape"),
        ({"prev_seq_idx": torch.zeros(2, dtype=torch.int32)}, ValueError, "without seq_idx"),
        (
            {"seq_idx": torch.zeros(2, 4, dtype=torch.int32), "prev_seq_idx": torch.zeros(2)},
            ValueError,
            "prev_seq_idx must be integers",
        ),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 4, 3), "weight": torch.zeros(3, 4), **change}
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments)


def test_step_refuses_a_sequence() -> None:
    with pytest.raises(ValueError, match="causal_conv1d_step takes"):
        causal_conv1d_step(torch.zeros(2, 1, 3), torch.zeros(3, 4), None, torch.zeros(2, 3, 3))
