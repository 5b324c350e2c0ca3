"""The chunked scan of Mamba-3 against a token-by-token recurrence with complex states in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from magc_kernels.mamba3.reference import mamba3
from magc_kernels.mamba3.values import Mimo, ScanState
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, relative_error, splits
from tests.kernels.mamba3_recurrence import naive_mamba3

PER_TOKEN = ("x", "dt", "A", "B", "C", "trap", "angles", "z")
STATE = ("turns", "ssm", "last_B", "last_x")
MIMO = ("mimo_x", "mimo_z", "mimo_out")


def scan(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """`mamba3` with the arguments and results of the recurrence."""
    named = {name: t for name, t in inputs.items() if name not in (*STATE, *MIMO)}
    if "mimo_x" in inputs:
        options["mimo"] = Mimo(*(inputs.get(name) for name in MIMO))
    if "ssm" in inputs:
        options["initial_state"] = ScanState(*(inputs[name] for name in STATE))
    y, state = mamba3(**named, **options)
    return y, *state


def make_inputs(
    seed: int,
    length: int,
    *,
    batch: int = 2,
    groups: int = 1,
    ratio: int = 2,
    rank: int = 1,
    headdim: int = 3,
    d_state: int = 6,
    angles: int = 2,
    skip: bool = True,
    gate: bool = False,
    mimo: str = "none",
    initial: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    heads = groups * ratio
    shapes = {
        "x": (batch, length, heads, headdim),
        "dt": (batch, length, heads),
        "A": (batch, length, heads),
        "B": (batch, length, rank, groups, d_state),
        "C": (batch, length, rank, groups, d_state),
        "trap": (batch, length, heads),
        "angles": (batch, length, angles),
        "B_bias": (heads, rank, d_state),
        "C_bias": (heads, rank, d_state),
    }
    if skip:
        shapes["D"] = (heads,)
    if gate:
        shapes["z"] = (batch, length, heads, headdim)
    if mimo != "none":
        shapes["mimo_x"] = (heads, rank, headdim)
        if gate:
            shapes["mimo_z"] = (heads, rank, headdim)
        if mimo == "summed":
            shapes["mimo_out"] = (heads, rank, headdim)
    if initial:
        shapes |= {
            "turns": (batch, heads, angles),
            "ssm": (batch, heads, headdim, d_state),
            "last_B": (batch, rank, heads, d_state),
            "last_x": (batch, heads, headdim),
        }
    inputs = {name: randn(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    inputs["dt"] = inputs["dt"].abs()
    inputs["A"] = -inputs["A"].abs()
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, e in zip(("y", *STATE), actual, expected, strict=True):
        if name == "turns":  # 0 and 1 are the same angle
            a, e = (torch.polar(torch.ones_like(v), 2 * math.pi * v).resolve_conj() for v in (a.detach(), e.detach()))
            a, e = torch.view_as_real(a), torch.view_as_real(e)
        assert_close(a, e, tolerance, name)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    seed = draw(st.integers(0, 1000))
    length = draw(st.integers(1, 19))
    batch = draw(st.integers(1, 2))
    d_state = draw(st.sampled_from([2, 4, 6]))
    mimo = draw(st.sampled_from(["none", "apart", "summed"]))
    inputs = make_inputs(
        seed,
        length,
        batch=batch,
        groups=draw(st.integers(1, 2)),
        ratio=draw(st.integers(1, 2)),
        rank=1 if mimo == "none" else draw(st.integers(1, 3)),
        headdim=draw(st.integers(1, 3)),
        d_state=d_state,
        angles=draw(st.integers(1, d_state // 2)),
        skip=draw(st.booleans()),
        gate=draw(st.booleans()),
        mimo=mimo,
        initial=draw(st.booleans()),
    )
    options: dict[str, Any] = {"pairs": draw(st.sampled_from(["neighbours", "halves"]))}
    if draw(st.booleans()):
        options["seq_idx"] = packed_ids(seed, batch, length, documents=draw(st.integers(2, 4)))
        if draw(st.booleans()):
            options["prev_seq_idx"] = packed_ids(seed + 1, batch, 1)[:, 0]
    return inputs, options, draw(st.integers(1, 24))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(cases())
def test_output_state_and_all_gradients_equal_the_recurrence(
    case: tuple[dict[str, Tensor], dict[str, Any], int],
) -> None:
    inputs, options, chunk_size = case
    actual = scan(inputs, **options, chunk_size=chunk_size)
    expected = naive_mamba3(**inputs, **options)
    assert_same(actual, expected, 1e-12)
    truth = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert_close(gradient, truth[name], 1e-11, name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_gradcheck(rank: int, packed: bool) -> None:
    inputs = make_inputs(3, 5, batch=1, rank=rank, gate=True, mimo="none" if rank == 1 else "summed")
    options = {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])} if packed else {}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return scan(dict(zip(inputs, tensors, strict=True)), chunk_size=2, **options)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


def in_segments(inputs: dict[str, Tensor], sizes: list[int], **options: Any) -> tuple[Tensor, ...]:
    """Segment after segment, each from the state of the one before."""
    fixed = {name: t for name, t in inputs.items() if name not in (*PER_TOKEN, *STATE)}
    state = {name: inputs[name] for name in STATE if name in inputs}
    seq_idx, prev = options.pop("seq_idx", None), options.pop("prev_seq_idx", None)
    outputs, start = [], 0
    for size in sizes:
        segment = {name: inputs[name][:, start : start + size] for name in PER_TOKEN if name in inputs}
        ids = None if seq_idx is None else seq_idx[:, start : start + size]
        y, *parts = scan({**segment, **fixed, **state}, seq_idx=ids, prev_seq_idx=prev, **options)
        state = dict(zip(STATE, parts, strict=True))
        prev = None if ids is None else ids[:, -1]
        outputs.append(y)
        start += size
    return torch.cat(outputs, 1), *state.values()


def compositions(length: int) -> list[list[int]]:
    """All ways to cut a sequence into segments."""
    if length == 0:
        return [[]]
    return [[first, *rest] for first in range(1, length + 1) for rest in compositions(length - first)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mimo", ["none", "summed"])
def test_every_segmentation_equals_the_whole(mimo: str, packed: bool) -> None:
    length = 6
    inputs = make_inputs(31, length, rank=1 if mimo == "none" else 2, gate=True, mimo=mimo)
    options: dict[str, Any] = {"chunk_size": 2}
    if packed:
        options |= {
            "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 0], [3, 4, 4, 4, 4, 4]]),
            "prev_seq_idx": torch.tensor([0, 0]),
        }
    whole = scan(inputs, **options)
    truth = gradients(whole, inputs)
    for sizes in compositions(length):
        parts = in_segments(inputs, sizes, **options)
        assert_same(parts, whole, 1e-12)
        for name, gradient in gradients(parts, inputs).items():
            assert_close(gradient, truth[name], 1e-11, f"{name} {sizes}")


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(7, 23),
    packed=st.booleans(),
    mean=st.sampled_from([1.01, 3.0]),
)
def test_any_segmentation_of_a_longer_sequence(seed: int, length: int, packed: bool, mean: float) -> None:
    inputs = make_inputs(seed, length, groups=2, gate=True)
    options: dict[str, Any] = {"chunk_size": 4}
    if packed:
        options |= {"seq_idx": packed_ids(seed, 2, length), "prev_seq_idx": packed_ids(seed + 5, 2, 1)[:, 0]}
    whole, parts = scan(inputs, **options), in_segments(inputs, splits(seed, length, mean), **options)
    assert_same(parts, whole, 1e-12)
    truth = gradients(whole, inputs)
    for name, gradient in gradients(parts, inputs).items():
        assert_close(gradient, truth[name], 1e-11, name)


def test_documents_of_a_row_are_sequences_of_their_own() -> None:
    """Ids 0, 1, 0: each document equals the same tokens alone, states and gradients too."""
    inputs = make_inputs(5, 9, batch=1, initial=False)
    y, *state = scan(inputs, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0]]), chunk_size=4)
    parts = []
    for tokens in (slice(0, 3), slice(3, 5), slice(5, 9)):
        parts.append(scan({n: t[:, tokens] if n in PER_TOKEN else t for n, t in inputs.items()}, chunk_size=4))
    alone = torch.cat([part[0] for part in parts], 1), *parts[-1][1:]
    assert_same((y, *state), alone, 1e-12)
    truth = gradients(alone, inputs)
    for name, gradient in gradients((y, *state), inputs).items():
        assert_close(gradient, truth[name], 1e-11, name)


def test_a_state_of_another_document_gets_no_gradient() -> None:
    inputs = make_inputs(5, 5)
    outputs = scan(inputs, seq_idx=torch.ones(2, 5, dtype=torch.int32), prev_seq_idx=torch.zeros(2, dtype=torch.int32))
    found = gradients(outputs, inputs)
    for name in STATE:
        assert not found[name].any(), name


@pytest.mark.parametrize(("scale", "tolerance"), [(1e-4, 1e-6), (30.0, 1e-4), (1e4, 1e-1)])
def test_extreme_steps_stay_finite(scale: float, tolerance: float) -> None:
    """No overflow and no NaN gradient, with steps from nothing at all to a full reset per token.

    A decay is the exponential of a difference of running sums, so its error grows with the sums' magnitude, and so does
    that of an angle.
    """
    inputs = make_inputs(7, 33, dtype=torch.float32)
    inputs = {**inputs, "dt": (inputs["dt"].detach() * scale).requires_grad_()}
    outputs = scan(inputs, chunk_size=16)
    expected = naive_mamba3(**{n: t.detach().double() for n, t in inputs.items()})
    for i in (0, 2):
        assert relative_error(outputs[i].detach(), expected[i]) < tolerance
    assert all(torch.isfinite(g).all() for g in gradients(outputs, inputs).values())


def test_angles_stay_precise_in_a_long_sequence() -> None:
    """Hundreds of whole turns, in float32."""
    inputs = {n: t.detach() for n, t in make_inputs(37, 4000, batch=1, ratio=1, initial=False).items()}
    inputs["angles"] = inputs["angles"].abs() + 1.0
    single = {n: t.float() for n, t in inputs.items()}
    truth = torch.remainder(0.5 * (single["dt"].double() * torch.tanh(single["angles"].double())).sum(1), 1.0)
    turns = scan(single)[1][:, 0]
    difference = (turns.double() - truth + 0.5).remainder(1.0) - 0.5
    assert float(difference.abs().max()) < 2e-5


def test_bfloat16_error_is_that_of_rounding_the_inputs_and_output() -> None:
    inputs = {n: t.detach() for n, t in make_inputs(17, 200, headdim=8, d_state=16, angles=4, gate=True).items()}
    inputs["dt"] = inputs["dt"] * 0.1
    kept = ("turns", "ssm", "last_B", "dt", "A", "B_bias", "C_bias", "D")
    half = {n: t.float() if n in kept else t.to(torch.bfloat16) for n, t in inputs.items()}
    y, turns, ssm, last_B, last_x = scan(half)
    assert (y.dtype, last_x.dtype) == (torch.bfloat16, torch.bfloat16)
    assert turns.dtype == ssm.dtype == last_B.dtype == torch.float32
    # The best any implementation can do: exact arithmetic on the rounded inputs, output rounded once.
    best = naive_mamba3(**{n: t.double() for n, t in half.items()})
    truth = naive_mamba3(**inputs)
    assert relative_error(y, truth[0]) <= 1.05 * relative_error(best[0].to(torch.bfloat16), truth[0]) + 1e-5
    assert relative_error(ssm, truth[2]) <= 1.05 * relative_error(best[2], truth[2]) + 1e-5


class _FloatCumsum(TorchDispatchMode):
    """Refuses the operator that torch.use_deterministic_algorithms refuses on CUDA."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        assert func is not torch.ops.aten.cumsum.default or not args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_runs_in_deterministic_mode() -> None:
    inputs = make_inputs(29, 20, gate=True)
    with _FloatCumsum():
        outputs = scan(inputs, seq_idx=packed_ids(0, 2, 20))
        assert len(gradients(outputs, inputs)) == len(inputs)


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = {n: t.detach() for n, t in make_inputs(19, 20, rank=2, mimo="summed", dtype=torch.float32).items()}
    plain = scan(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scan(inputs)
    assert all(torch.equal(a, e) for a, e in zip(inside, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 7, 64, 70])
def test_meta_tensors_give_shapes_and_types(length: int, dtype: torch.dtype) -> None:
    inputs = {n: t.detach().to("meta") for n, t in make_inputs(0, length, gate=True, dtype=dtype).items()}
    y, *state = scan(inputs, seq_idx=torch.zeros(2, length, dtype=torch.int32, device="meta"))
    assert (y.shape, y.dtype) == (inputs["x"].shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [(part.shape, part.dtype) for part in state] == [
        (inputs[name].shape, dtype if name == "last_x" else wide) for name in STATE
    ]


def test_state_is_a_value() -> None:
    """Not written to, not a view of anything larger, and the same bits from the same segment."""
    inputs = {n: t.detach() for n, t in make_inputs(23, 21).items()}
    before = {name: inputs[name].clone() for name in STATE}
    outputs, again = scan(inputs, chunk_size=8), scan(inputs, chunk_size=8)
    assert all(torch.equal(inputs[name], before[name]) for name in STATE)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in outputs[1:])
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def kept_bytes(length: int, chunk_size: int) -> int:
    """Bytes that backward keeps, inputs included."""
    inputs = make_inputs(0, length, batch=1, headdim=32, d_state=32, angles=8, dtype=torch.float32)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(inputs, chunk_size=chunk_size)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_memory_is_linear_in_the_length_and_holds_no_state_per_token() -> None:
    assert kept_bytes(512, 16) < 2.1 * kept_bytes(256, 16)
    states_of_all_tokens = 512 * 2 * 32 * 32 * 4
    assert kept_bytes(512, 16) < 0.5 * states_of_all_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, 2, 3)}, "length >= 1"),
        ({"B": torch.zeros(2, 4, 1, 3, 6)}, "groups dividing"),
        ({"B": torch.zeros(2, 4, 1, 1, 5)}, "d_state even"),
        ({"B": torch.zeros(2, 4, 2, 1, 6)}, "B has 2 ranks; pass mimo"),
        ({"C": torch.zeros(2, 4, 1, 1, 4)}, "C must have shape"),
        ({"dt": torch.zeros(2, 4, 1)}, "dt must have shape"),
        ({"A": torch.zeros(2)}, "A must have shape"),
        ({"trap": torch.zeros(2, 3, 2)}, "trap must have shape"),
        ({"angles": torch.zeros(2, 4, 4)}, "angles must have shape"),
        ({"B_bias": torch.zeros(2, 6)}, "B_bias must have shape"),
        ({"C_bias": torch.zeros(1, 1, 6)}, "C_bias must have shape"),
        ({"D": torch.zeros(3)}, "D must have shape"),
        ({"z": torch.zeros(2, 4, 2)}, "z must have shape"),
        ({"turns": torch.zeros(2, 2, 3)}, r"initial_state\.turns must have shape"),
        ({"ssm": torch.zeros(2, 2, 6, 3)}, r"initial_state\.ssm must have shape"),
        ({"last_B": torch.zeros(2, 2, 6)}, r"initial_state\.B must have shape"),
        ({"last_x": torch.zeros(2, 3)}, r"initial_state\.x must have shape"),
        ({"mimo_x": torch.zeros(2, 2, 3)}, r"mimo\.x must have shape"),
        ({"mimo_x": torch.zeros(2, 1, 3), "mimo_z": torch.zeros(2, 1, 3)}, "pass both or neither"),
        ({"seq_idx": torch.zeros(2, 3, dtype=torch.int32)}, "seq_idx must have shape"),
        ({"seq_idx": torch.zeros(2, 4)}, "seq_idx must be integers"),
        ({"prev_seq_idx": torch.zeros(2, dtype=torch.int32)}, "without seq_idx"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"pairs": "thirds"}, "is not one of 'neighbours', 'halves'"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = {n: t.detach() for n, t in make_inputs(0, 4, dtype=torch.float32).items()}
    options = {name: value for name, value in change.items() if not isinstance(value, Tensor) or "seq_idx" in name}
    with pytest.raises(ValueError, match=message):
        scan({**inputs, **{name: value for name, value in change.items() if name not in options}}, **options)


def test_integer_input_is_refused() -> None:
    inputs = {n: t.detach() for n, t in make_inputs(0, 4).items()}
    with pytest.raises(TypeError, match="floating-point"):
        scan({**inputs, "x": inputs["x"].long()})
