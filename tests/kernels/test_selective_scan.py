"""The chunked selective scan against a token-by-token recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from magc_kernels.selective_scan.reference import selective_scan, selective_scan_step
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, relative_error, splits

PER_TOKEN = ("x", "dt", "B", "C", "z")


def naive_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    prev_seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down, in the type of `x`."""
    batch, length, channels = x.shape
    repeats = channels // B.shape[2]
    state = x.new_zeros(batch, channels, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    previous = None if seq_idx is None else (seq_idx[:, 0] if prev_seq_idx is None else prev_seq_idx)
    for t in range(length):
        if seq_idx is not None and previous is not None:
            state = torch.where((seq_idx[:, t] == previous)[:, None, None], state, 0.0)
            previous = seq_idx[:, t]
        step = dt[:, t] if dt_bias is None else dt[:, t] + dt_bias
        step = functional.softplus(step) if dt_softplus else step
        B_t, C_t = B[:, t].repeat_interleave(repeats, 1), C[:, t].repeat_interleave(repeats, 1)
        state = torch.exp(step[..., None] * A) * state + (step * x[:, t])[..., None] * B_t
        y = (state * C_t).sum(-1)
        if D is not None:
            y = y + x[:, t] * D
        if z is not None:
            y = y * functional.silu(z[:, t])
        outputs.append(y)
    return torch.stack(outputs, 1), state


def make_inputs(
    seed: int,
    length: int,
    *,
    batch: int = 2,
    groups: int = 1,
    ratio: int = 3,
    d_state: int = 4,
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    initial: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    channels = groups * ratio
    inputs = {
        "x": randn(seed, batch, length, channels),
        "dt": randn(seed + 1, batch, length, channels),
        "A": -randn(seed + 2, channels, d_state).abs() - 0.1,
        "B": randn(seed + 3, batch, length, groups, d_state),
        "C": randn(seed + 4, batch, length, groups, d_state),
    }
    if skip:
        inputs["D"] = randn(seed + 5, channels)
    if gate:
        inputs["z"] = randn(seed + 6, batch, length, channels)
    if bias:
        inputs["dt_bias"] = randn(seed + 7, channels)
    if initial:
        inputs["initial_state"] = randn(seed + 8, batch, channels, d_state)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    seed = draw(st.integers(0, 1000))
    length = draw(st.integers(1, 19))
    batch = draw(st.integers(1, 2))
    inputs = make_inputs(
        seed,
        length,
        batch=batch,
        groups=draw(st.integers(1, 2)),
        ratio=draw(st.integers(1, 3)),
        d_state=draw(st.integers(1, 4)),
        skip=draw(st.booleans()),
        gate=draw(st.booleans()),
        bias=draw(st.booleans()),
        initial=draw(st.booleans()),
    )
    options: dict[str, Any] = {"dt_softplus": draw(st.booleans())}
    if draw(st.booleans()):
        options["seq_idx"] = packed_ids(seed, batch, length, documents=draw(st.integers(2, 4)))
        if draw(st.booleans()):
            options["prev_seq_idx"] = packed_ids(seed + 1, batch, 1)[:, 0]
    return inputs, options, draw(st.integers(1, 24))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(cases())
def test_output_state_and_all_gradients_equal_the_recurrence(
    case: tuple[dict[str, Tensor], dict[str, Any], int],
) -> None:
    inputs, options, chunk_size = case
    actual = selective_scan(**inputs, **options, chunk_size=chunk_size)
    expected = naive_selective_scan(**inputs, **options)
    for name, a, e in zip(("y", "state"), actual, expected, strict=True):
        assert_close(a, e, 1e-12, name)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert_close(gradient, truth[name], 1e-11, name)


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool) -> None:
    inputs = make_inputs(3, 5, batch=1)
    options = {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])} if packed else {}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, dt_softplus=True, chunk_size=2, **options)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(2, 17),
    packed=st.booleans(),
    mean=st.sampled_from([1.01, 3.0]),
)
def test_any_segmentation_equals_the_whole(seed: int, length: int, packed: bool, mean: float) -> None:
    inputs = make_inputs(seed, length, groups=2)
    seq_idx = packed_ids(seed, 2, length) if packed else None
    prev = packed_ids(seed + 5, 2, 1)[:, 0] if packed else None
    options: dict[str, Any] = {"dt_softplus": True, "chunk_size": 4}
    whole = selective_scan(**inputs, **options, seq_idx=seq_idx, prev_seq_idx=prev)

    state, outputs, start = inputs["initial_state"], [], 0
    for size in splits(seed, length, mean):
        segment = {n: t[:, start : start + size] if n in PER_TOKEN else t for n, t in inputs.items()}
        segment["initial_state"] = state
        ids = None if seq_idx is None else seq_idx[:, start : start + size]
        y, state = selective_scan(**segment, **options, seq_idx=ids, prev_seq_idx=prev)
        prev = None if ids is None else ids[:, -1]
        outputs.append(y)
        start += size
    parts = torch.cat(outputs, 1), state
    truth = gradients(whole, inputs)
    for a, e in zip(parts, whole, strict=True):
        assert_close(a, e, 1e-12)
    for name, gradient in gradients(parts, inputs).items():
        assert_close(gradient, truth[name], 1e-11, name)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_step_equals_a_segment_of_one_token(skip: bool, gate: bool) -> None:
    inputs = make_inputs(11, 1, groups=2, skip=skip, gate=gate)
    expected = selective_scan(**inputs, dt_softplus=True)
    token = {n: t.squeeze(1) if n in PER_TOKEN else t for n, t in inputs.items()}
    state = token.pop("initial_state")
    y, new_state = selective_scan_step(**token, state=state, dt_softplus=True)
    actual = y[:, None], new_state
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-13)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert_close(gradient, truth[name], 1e-12, name)


def test_reused_document_id_does_not_join_documents() -> None:
    """Ids 0, 1, 0: the third document must not see the first, nor the state before the segment."""
    inputs = make_inputs(5, 9)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0]] * 2)
    distinct = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]] * 2)
    for chunk_size in (2, 16):
        a = selective_scan(**inputs, seq_idx=seq_idx, chunk_size=chunk_size)
        e = selective_scan(**inputs, seq_idx=distinct, chunk_size=chunk_size)
        assert torch.equal(a[0], e[0])
        assert torch.equal(a[1], e[1])


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_extreme_steps_are_as_precise_as_others(scale: float) -> None:
    """Steps from nothing at all to a full reset per token: no difference of running sums is ever taken."""
    inputs = make_inputs(7, 33, dtype=torch.float32)
    inputs = {**inputs, "dt": (inputs["dt"].detach() * scale).requires_grad_()}
    outputs = selective_scan(**inputs, dt_softplus=True, chunk_size=16)
    expected = naive_selective_scan(**{n: t.detach().double() for n, t in inputs.items()}, dt_softplus=True)
    for a, e in zip(outputs, expected, strict=True):
        assert relative_error(a, e) < 2e-6
    assert all(torch.isfinite(g).all() for g in gradients(outputs, inputs).values())


def test_bfloat16_error_is_that_of_rounding_the_inputs_and_output() -> None:
    inputs = {n: t.detach() for n, t in make_inputs(17, 200, ratio=8, d_state=16).items()}
    truth, truth_state = naive_selective_scan(**inputs, dt_softplus=True)
    half = {n: t.to(torch.bfloat16) if n != "initial_state" else t.float() for n, t in inputs.items()}
    y, state = selective_scan(**half, dt_softplus=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    # The best any implementation can do: exact arithmetic on the rounded inputs, output rounded once.
    best, best_state = naive_selective_scan(**{n: t.double() for n, t in half.items()}, dt_softplus=True)
    assert relative_error(y, truth) <= 1.05 * relative_error(best.to(torch.bfloat16), truth) + 1e-5
    assert relative_error(state, truth_state) <= 1.05 * relative_error(best_state, truth_state) + 1e-5


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = {n: t.detach() for n, t in make_inputs(19, 20, dtype=torch.float32).items()}
    plain = selective_scan(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = selective_scan(**inputs)
    assert all(torch.equal(a, e) for a, e in zip(inside, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 7, 64, 70])
def test_meta_tensors_give_shapes_and_types(length: int, dtype: torch.dtype) -> None:
    inputs = {n: t.detach().to("meta") for n, t in make_inputs(0, length, dtype=dtype).items()}
    seq_idx = torch.zeros(2, length, dtype=torch.int32, device="meta")
    y, state = selective_scan(**inputs, seq_idx=seq_idx)
    assert (y.shape, y.dtype) == (inputs["x"].shape, dtype)
    assert state.shape == inputs["initial_state"].shape
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("chunk_size", [8, 64])
def test_state_is_a_value(chunk_size: int) -> None:
    """Not written to, not a view of anything larger, and the same bits from the same segment."""
    inputs = {n: t.detach() for n, t in make_inputs(23, 21).items()}
    before = inputs["initial_state"].clone()
    y, state = selective_scan(**inputs, chunk_size=chunk_size)
    y_again, state_again = selective_scan(**inputs, chunk_size=chunk_size)
    assert torch.equal(inputs["initial_state"], before)
    assert state.untyped_storage().nbytes() == state.nbytes
    assert torch.equal(y, y_again)
    assert torch.equal(state, state_again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, 3)}, "length >= 1"),
        ({"B": torch.zeros(2, 4, 2, 4)}, "groups dividing"),
        ({"C": torch.zeros(2, 4, 1, 5)}, "C must have shape"),
        ({"dt": torch.zeros(2, 4, 1)}, "dt must have shape"),
        ({"A": torch.zeros(3)}, "A must have shape"),
        ({"D": torch.zeros(2)}, "D must have shape"),
        ({"z": torch.zeros(2, 4, 2)}, "z must have shape"),
        ({"dt_bias": torch.zeros(1)}, "dt_bias must have shape"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "the state must have shape"),
        ({"seq_idx": torch.zeros(2, 3, dtype=torch.int32)}, "seq_idx must have shape"),
        ({"seq_idx": torch.zeros(2, 4)}, "seq_idx must be integers"),
        ({"prev_seq_idx": torch.zeros(2, dtype=torch.int32)}, "without seq_idx"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = {n: t.detach() for n, t in make_inputs(0, 4, dtype=torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **change})


def test_integer_input_and_misshaped_step_are_refused() -> None:
    inputs = {n: t.detach() for n, t in make_inputs(0, 4).items()}
    with pytest.raises(TypeError, match="floating-point"):
        selective_scan(**{**inputs, "x": inputs["x"].long()})
    state = inputs.pop("initial_state")
    with pytest.raises(ValueError, match="selective_scan_step takes"):
        selective_scan_step(**inputs, state=state)
