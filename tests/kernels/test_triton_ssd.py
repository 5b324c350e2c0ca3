"""The Triton scan against float64: in the interpreter without a GPU, on the GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

from magc_kernels.ssd import autograd, reference
from magc_kernels.ssd._config import heads_per_program, ssd_config
from tests.kernels.compare import assert_close, packed_ids, randn

PER_TOKEN = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test():
        yield


def make_inputs(
    seed: int,
    length: int,
    *,
    batch: int = 2,
    groups: int = 1,
    ratio: int = 2,
    headdim: int = 16,
    d_state: int = 16,
    skip: str = "head",
    gate: bool = False,
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    """Float64 inputs on the CPU; steps and rates of the size that Mamba-2 has them in."""
    heads = groups * ratio
    inputs = {
        "x": randn(seed, batch, length, heads, headdim),
        "dt": randn(seed + 1, batch, length, heads) - 1.0,
        "A": -randn(seed + 2, heads).abs() - 0.1,
        "B": randn(seed + 3, batch, length, groups, d_state),
        "C": randn(seed + 4, batch, length, groups, d_state),
    }
    if skip != "none":
        inputs["D"] = randn(seed + 5, *((heads, headdim) if skip == "channel" else (heads,)))
    if gate:
        inputs["z"] = randn(seed + 6, batch, length, heads, headdim)
    if bias:
        inputs["dt_bias"] = randn(seed + 7, heads)
    if initial:
        inputs["initial_state"] = randn(seed + 8, batch, heads, headdim, d_state)
    return inputs


def cast(inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device = DEVICE) -> dict[str, Tensor]:
    """Leaves of `dtype`; parameters and the state in float32, as a layer has them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to(device, dtype if n in PER_TOKEN else wide).detach().requires_grad_() for n, t in inputs.items()}


def evaluate(function: Any, inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Outputs and, under the inputs' names prefixed by "d", all gradients."""
    options = {n: o.to(DEVICE) if isinstance(o, Tensor) else o for n, o in options.items()}
    leaves = cast(inputs, dtype)
    y, state = function(**leaves, **options)
    assert y.dtype == dtype
    total = (y.double() * randn(98, *y.shape).to(DEVICE)).sum() + (
        state.double() * randn(99, *state.shape).to(DEVICE)
    ).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype
    return {"y": y.detach(), "state": state.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def truth(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    options = {n: o for n, o in options.items() if n != "chunk_size"}
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for an environment variable
    try:
        return evaluate(reference.ssd, inputs, dtype, **options)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        # dA is a difference of large sums: the float32 reference errs by as much.
        assert_close(actual[name], expected[name], 10 * tolerance if name == "dA" else tolerance, name)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # One chunk in two blocks, ragged in the second; in the first; exactly full.
    ({"length": 27, "batch": 1}, {"dt_softplus": True, "chunk_size": 32}),
    ({"length": 5, "batch": 1}, {"dt_softplus": True, "chunk_size": 32}),
    ({"length": 32}, {"dt_softplus": True, "chunk_size": 32}),
    # Several chunks, groups, each kind of skip weight, the gate.
    ({"length": 40, "batch": 1, "groups": 2, "skip": "channel", "gate": True}, {"dt_softplus": True, "chunk_size": 16}),
    ({"length": 70, "batch": 1, "groups": 2, "ratio": 1, "skip": "none"}, {"dt_softplus": True, "chunk_size": 32}),
    ({"length": 70, "batch": 1, "ratio": 3}, {"chunk_size": 37}),
    # No bias, no state, no softplus; limits that bite.
    ({"length": 30, "batch": 1, "bias": False, "initial": False}, {"dt_limit": (0.05, 0.9), "chunk_size": 16}),
    ({"length": 30, "batch": 1}, {"dt_softplus": True, "dt_limit": (0.1, 0.5), "chunk_size": 16}),
    # The shipped tile sizes, and sizes of head and state.
    ({"length": 130, "batch": 1, "ratio": 1, "headdim": 32, "d_state": 64}, {"dt_softplus": True}),
    ({"length": 65, "batch": 1, "ratio": 1, "headdim": 64, "d_state": 128}, {"dt_softplus": True}),
    ({"length": 33, "batch": 1, "ratio": 1, "headdim": 128, "d_state": 256}, {"dt_softplus": True, "chunk_size": 16}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_outputs_and_all_gradients_equal_float64(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    inputs = make_inputs(1, **sizes)
    assert_all_close(evaluate(autograd.ssd, inputs, torch.float32, **options), truth(inputs, **options), 2e-5)


@pytest.mark.parametrize("previous", [None, (1, 0)])
def test_packed_sequences_with_an_initial_state(previous: tuple[int, int] | None) -> None:
    inputs = make_inputs(2, 45, gate=True)
    options: dict[str, Any] = {"dt_softplus": True, "seq_idx": packed_ids(1, 2, 45, mean=9.0), "chunk_size": 32}
    if previous is not None:
        options["prev_seq_idx"] = torch.tensor(previous)
    assert_all_close(evaluate(autograd.ssd, inputs, torch.float32, **options), truth(inputs, **options), 2e-5)


@pytest.mark.parametrize("per_program", [1, 2, 3])
def test_any_split_of_a_groups_heads(per_program: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(3, 20, batch=1, groups=2, ratio=3)
    monkeypatch.setattr(autograd, "heads_per_program", lambda *_: per_program)
    options = {"dt_softplus": True, "chunk_size": 16}
    assert_all_close(evaluate(autograd.ssd, inputs, torch.float32, **options), truth(inputs, **options), 2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_whole_chunks_equal_the_whole_to_the_bit(packed: bool) -> None:
    inputs = cast(make_inputs(4, 48, batch=1, gate=True), torch.float32)
    ids = packed_ids(4, 1, 48, mean=9.0).to(DEVICE) if packed else None
    options: dict[str, Any] = {"dt_softplus": True, "chunk_size": 16}
    y, final = autograd.ssd(**inputs, **options, seq_idx=ids)
    outputs, state, previous = [], inputs["initial_state"], None
    for start, end in ((0, 32), (32, 48)):
        segment = {n: t[:, start:end] if n in PER_TOKEN else t for n, t in inputs.items()}
        segment["initial_state"] = state
        seq_idx = None if ids is None else ids[:, start:end]
        part, state = autograd.ssd(**segment, **options, seq_idx=seq_idx, prev_seq_idx=previous)
        previous = None if ids is None else ids[:, end - 1]
        outputs.append(part)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(state, final)
    # The order in which a chunk's dB and dC are summed depends on the launch's size, that of A, D and the bias too.
    weights = [randn(7, *t.shape).float().to(DEVICE) for t in (y, final)]
    whole = torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), list(inputs.values()))
    parts = (torch.cat(outputs, 1) * weights[0]).sum() + (state * weights[1]).sum()
    for name, a, e in zip(inputs, torch.autograd.grad(parts, list(inputs.values())), whole, strict=True):
        assert_close(a, e, 1e-6, name)


def test_any_segmentation_equals_float64() -> None:
    inputs = make_inputs(5, 37, batch=1)
    leaves = cast(inputs, torch.float32)
    outputs, state, start = [], leaves["initial_state"], 0
    for size in (1, 17, 3, 16):
        segment = {n: t[:, start : start + size] if n in PER_TOKEN else t for n, t in leaves.items()}
        part, state = autograd.ssd(**{**segment, "initial_state": state}, dt_softplus=True, chunk_size=16)
        outputs.append(part)
        start += size
    y = torch.cat(outputs, 1)
    total = (y.double() * randn(98, *y.shape).to(DEVICE)).sum() + (
        state.double() * randn(99, *state.shape).to(DEVICE)
    ).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    actual = {"y": y.detach(), "state": state.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}
    assert_all_close(actual, truth(inputs, dt_softplus=True), 2e-5)


def test_views_of_one_projection_and_gradients_written_into_one_buffer() -> None:
    """x, B and C as a layer has them: slices of the convolution's output; the gate and dt of the projection's."""
    heads, headdim, d_state, length = 2, 16, 16, 20
    inputs = cast(make_inputs(6, length, gate=True), torch.float32)
    plain = {n: t.detach() for n, t in inputs.items()}
    joined = torch.cat([plain["x"].flatten(2), plain["B"].flatten(2), plain["C"].flatten(2)], -1)
    sizes = [heads * headdim, d_state, d_state]

    def views(buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = buffer.split(sizes, -1)
        return x.unflatten(-1, (heads, headdim)), B.unsqueeze(2), C.unsqueeze(2)

    wide = torch.cat([plain["z"].flatten(2), plain["dt"]], -1)
    x, B, C = views(joined)
    strided = {
        **plain,
        "x": x,
        "B": B,
        "C": C,
        "z": wide[..., : sizes[0]].unflatten(-1, (heads, headdim)),
        "dt": wide[..., sizes[0] :],
    }
    dy = randn(7, *x.shape).float().to(DEVICE)
    results = []
    for values in (plain, strided):
        y, final, saved = autograd.recompute(autograd.SSDInputs(**values, dt_softplus=True, chunk_size=16))
        buffer = torch.empty_like(joined)
        d = autograd.vjp(saved, dy, final, out=views(buffer) if values is strided else None)
        results.append((y, final, d, buffer))
    (y, final, d, _), (y_s, final_s, d_s, buffer) = results
    assert torch.equal(y, y_s)
    assert torch.equal(final, final_s)
    for name, gradient in vars(d).items():
        assert torch.equal(gradient, getattr(d_s, name)), name
    assert torch.equal(buffer, torch.cat([d.x.flatten(2), d.B.flatten(2), d.C.flatten(2)], -1))


def test_steps_gradient_is_written_into_a_view_and_nothing_beside_it() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(20, 20), torch.float32).items()}
    y, _, saved = autograd.recompute(autograd.SSDInputs(**inputs, dt_softplus=True, chunk_size=16))
    assert y is not None
    wide = torch.full((2, 20, 7), 3.0, device=DEVICE)
    d = autograd.vjp(saved, y, ddt_out=wide[..., 3:5])
    assert torch.equal(wide[..., 3:5], autograd.vjp(saved, y).dt)
    assert d.dt.data_ptr() == wide[..., 3:5].data_ptr()
    assert (wide[..., :3] == 3.0).all()
    assert (wide[..., 5:] == 3.0).all()


def test_gradients_of_low_precision_weights_may_be_had_in_float32() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(21, 20), torch.float32).items()}
    inputs.update({n: inputs[n].half() for n in ("A", "D", "dt_bias")})
    y, _, saved = autograd.recompute(autograd.SSDInputs(**inputs, dt_softplus=True, chunk_size=16))
    assert y is not None
    typed, wide = autograd.vjp(saved, y), autograd.vjp(saved, y, float32_weights=True)
    for name in ("A", "D", "dt_bias"):
        assert getattr(typed, name).dtype == torch.float16
        assert getattr(wide, name).dtype == torch.float32
        assert torch.equal(getattr(wide, name).half(), getattr(typed, name)), name


def test_a_given_configuration_is_used_and_kept() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(22, 40), torch.float32).items()}
    given = replace(ssd_config(torch.float32, 16, 16, None), chunk=16, rows=16)
    y, _, saved = autograd.recompute(autograd.SSDInputs(**inputs, dt_softplus=True, config=given))
    assert saved.config == given
    assert_close(y, reference.ssd(**inputs, dt_softplus=True)[0], 2e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"sweep_backward_rows": 64, "sweep_backward_columns": 16},
        {"finish_rows": 16, "finish_columns": 16},
        {"rows": 64, "finish_rows": 64},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_other_tiles(change: dict[str, Any], packed: bool) -> None:
    inputs = make_inputs(23, 70, batch=1, headdim=64, d_state=32)
    options: dict[str, Any] = {"dt_softplus": True}
    if packed:
        options["seq_idx"] = packed_ids(1, 1, 70, mean=20.0)
    config = replace(ssd_config(torch.float32, 64, 32, None), **change)
    actual = evaluate(autograd.ssd, inputs, torch.float32, config=config, **options)
    assert_all_close(actual, truth(inputs, **options), 2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 48}, "chunk 48"),
        ({"rows": 8}, "rows 8"),
        ({"sweep_rows": 256}, "sweep_rows 256"),
        ({"precision": "tf16"}, "precision 'tf16'"),
        ({"roles_warps": 3}, "roles_warps 3"),
        ({"finish_rows": 48}, "finish_rows 48"),
        ({"scan_stages": 0}, "scan_stages 0"),
    ],
)
def test_a_configuration_the_kernels_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    config = replace(ssd_config(torch.bfloat16, 64, 128, None), **change)
    with pytest.raises(ValueError, match=message):
        ssd_config(torch.bfloat16, 64, 128, None, config=config)


def test_forward_and_recompute_agree_to_the_bit_and_may_skip_the_output() -> None:
    inputs = autograd.SSDInputs(
        **{n: t.detach() for n, t in cast(make_inputs(8, 20), torch.float32).items()}, dt_softplus=True
    )
    y, final = autograd.forward(inputs)
    y_again, final_again, saved = autograd.recompute(inputs)
    nothing, final_only, saved_only = autograd.recompute(inputs, output=False)
    assert nothing is None
    assert torch.equal(y, y_again)
    assert torch.equal(final, final_again)
    assert torch.equal(final, final_only)
    dy = torch.ones_like(y)
    for a, b in zip(vars(autograd.vjp(saved, dy)).values(), vars(autograd.vjp(saved_only, dy)).values(), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_either_output_may_go_unused() -> None:
    inputs = make_inputs(9, 10, batch=1)
    for used in (0, 1):
        leaves, leaves64 = cast(inputs, torch.float32), cast(inputs, torch.float64)
        actual = autograd.ssd(**leaves, dt_softplus=True, chunk_size=16)[used]
        expected = reference.ssd(**leaves64, dt_softplus=True)[used]
        names = ["x", "dt", "A", "B", "initial_state"]
        weight = randn(9, *actual.shape).to(DEVICE)
        for name, a, e in zip(
            names,
            torch.autograd.grad((actual * weight.float()).sum(), [leaves[n] for n in names]),
            torch.autograd.grad((expected * weight).sum(), [leaves64[n] for n in names]),
            strict=True,
        ):
            assert_close(a, e, 2e-5, name)


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_extreme_steps_stay_finite(scale: float) -> None:
    """A decay is the exponential of a difference of running sums, so its error grows with the sums' magnitude."""
    inputs = make_inputs(10, 20, batch=1)
    inputs["dt"] = (inputs["dt"] + 1.0) * scale
    options = {"dt_softplus": True, "chunk_size": 16}
    actual, expected = evaluate(autograd.ssd, inputs, torch.float32, **options), truth(inputs, **options)
    assert all(torch.isfinite(t).all() for t in actual.values())
    for name in ("y", "state"):
        assert_close(actual[name], expected[name], 1e-5 if scale < 100 else 1e-2, name)


def test_small_steps_keep_their_relative_precision() -> None:
    """Softplus far below zero, where `log(1 + exp(dt))` in float32 is coarse or zero."""
    dt = torch.linspace(-20.0, 3.0, 64)[None, :, None]
    ones = torch.ones(1, 64, 1, 16)
    values = {
        "x": ones[..., None, 0].expand(1, 64, 1, 16).contiguous(),
        "dt": dt,
        "A": torch.zeros(1),
        "B": ones,
        "C": ones,
    }
    inputs = autograd.SSDInputs(**{n: t.to(DEVICE) for n, t in values.items()}, dt_softplus=True)
    _, _, saved = autograd.recompute(inputs, output=False)
    expected = torch.nn.functional.softplus(dt.double()).flatten()
    error = (saved.step.flatten()[:64].double().cpu() - expected) / expected
    assert error.abs().max() < 3e-6


def test_float16_in_both() -> None:
    inputs = make_inputs(11, 20, batch=1)
    options = {"dt_softplus": True, "chunk_size": 16}
    assert_all_close(evaluate(autograd.ssd, inputs, torch.float16, **options), truth(inputs, **options), 6e-3)


def test_arguments_outside_the_kernels_limits_are_refused() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(12, 4), torch.float32).items()}
    with pytest.raises(ValueError, match="impl='reference'"):
        autograd.ssd(**{**inputs, "x": inputs["x"][..., :3], "initial_state": inputs["initial_state"][:, :, :3]})
    with pytest.raises(TypeError, match="float64"):
        autograd.ssd(**{n: t.double() for n, t in inputs.items()})
    with pytest.raises(TypeError, match="one type"):
        autograd.ssd(**{**inputs, "B": inputs["B"].half()})
    with pytest.raises(ValueError, match="chunk_size"):
        autograd.ssd(**inputs, chunk_size=8)
    with pytest.raises(ValueError, match="dt must have shape"):
        autograd.ssd(**{**inputs, "dt": inputs["dt"][:, :3]})
    with pytest.raises(ValueError, match="one CUDA device"):
        autograd.ssd(**{**inputs, "dt": inputs["dt"].to("meta")})


def test_gradients_of_gradients_are_refused() -> None:
    inputs = cast(make_inputs(13, 4), torch.float32)
    y, _ = autograd.ssd(**inputs)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad((y * y).sum(), [inputs["x"]], create_graph=True)


def test_configuration_never_depends_on_the_length_and_splits_cover_all_heads() -> None:
    assert ssd_config(torch.bfloat16, 64, 128, 256) == ssd_config(torch.bfloat16, 64, 128, None)
    assert ssd_config(torch.bfloat16, 64, 128, 100).chunk == 64
    hopper = ssd_config(torch.bfloat16, 64, 128, None, capability=(9, 0))
    assert hopper != ssd_config(torch.bfloat16, 64, 128, None, capability=(8, 6))
    assert hopper == ssd_config(torch.bfloat16, 64, 128, None, config=hopper)
    for ratio in (1, 7, 80):
        for others in (1, 100, 10_000):
            assert 1 <= heads_per_program(ratio, others, 5, 32) <= min(ratio, 32)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


GPU_SIZES: list[dict[str, Any]] = [
    {"length": 1000, "groups": 2, "ratio": 4, "headdim": 64, "d_state": 128},
    {"length": 1024, "groups": 1, "ratio": 24, "headdim": 64, "d_state": 128, "batch": 1, "initial": False},
    {"length": 700, "ratio": 4, "headdim": 32, "d_state": 16, "skip": "channel"},
    {"length": 700, "ratio": 4, "headdim": 128, "d_state": 64, "gate": True},
    {"length": 700, "ratio": 4, "headdim": 64, "d_state": 256},
    {"length": 700, "ratio": 2, "headdim": 128, "d_state": 256},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", GPU_SIZES)
def test_error_on_the_gpu_is_near_that_of_rounding_inputs_and_outputs(
    sizes: dict[str, Any], packed: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(14, **sizes)
    options: dict[str, Any] = {"dt_softplus": True}
    if packed:
        options["seq_idx"] = packed_ids(3, inputs["x"].shape[0], sizes["length"], mean=200.0)
    expected = truth(inputs, **options)
    plain = truth(inputs, dtype, **options)
    actual = evaluate(autograd.ssd, inputs, dtype, **options)
    again = evaluate(autograd.ssd, inputs, dtype, **options)
    for name, e in expected.items():
        error, bound = relative_l2(actual[name], e), relative_l2(plain[name], e)
        # The reference rounds inputs and outputs only; operands of the kernels' matrix products are rounded once
        # more, and so is the gradient that comes through a gate. The parameters' gradients are a few numbers each,
        # whose errors are luck.
        state = 1.25 if "gate" in sizes else 1.1
        factor = state if "state" in name else 2.5 if name in ("dA", "dD", "ddt_bias") else 1.2
        assert error <= factor * bound + (1e-5 if dtype == torch.float32 else 0.0), (name, error, bound)
    assert all(torch.equal(a, again[n]) for n, a in actual.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_segments_equal_the_whole_to_the_bit_on_the_gpu(dtype: torch.dtype) -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(15, 1024, ratio=4, headdim=64, d_state=128), dtype).items()}
    y, final = autograd.ssd(**inputs, dt_softplus=True)
    first = {n: t[:, :384] if n in PER_TOKEN else t for n, t in inputs.items()}
    second = {n: t[:, 384:] if n in PER_TOKEN else t for n, t in inputs.items()}
    y_1, state = autograd.ssd(**first, dt_softplus=True)
    y_2, state = autograd.ssd(**{**second, "initial_state": state}, dt_softplus=True)
    assert torch.equal(torch.cat([y_1, y_2], 1), y)
    assert torch.equal(state, final)


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """The last tokens of a sequence whose rows lie 2.8 billion elements apart from its first, as a view."""
    heads, headdim, d_state, length = 2, 64, 128, 1 << 18
    wide = torch.empty(length, 10752, dtype=torch.bfloat16, device=DEVICE)
    x = wide[:, : heads * headdim].view(1, length, heads, headdim)
    x.copy_(randn(16, 1, length, heads, headdim))
    B = wide[:, 128 : 128 + d_state].view(1, length, 1, d_state)
    B.copy_(randn(17, *B.shape))
    C = wide[:, 256 : 256 + d_state].view(1, length, 1, d_state)
    C.copy_(randn(18, *C.shape))
    dt = wide[:, 384 : 384 + heads].view(1, length, heads)
    dt.copy_(randn(19, *dt.shape) - 1)
    A = torch.tensor([-0.5, -2.0], device=DEVICE)
    strided = autograd.SSDInputs(x, dt, A, B, C, dt_softplus=True)
    dense = autograd.SSDInputs(x.contiguous(), dt.contiguous(), A, B.contiguous(), C.contiguous(), dt_softplus=True)
    y, final, saved = autograd.recompute(strided)
    y_dense, final_dense, saved_dense = autograd.recompute(dense)
    assert torch.equal(y, y_dense)
    assert torch.equal(final, final_dense)
    d, d_dense = autograd.vjp(saved, y), autograd.vjp(saved_dense, y)
    assert torch.equal(d.x, d_dense.x)
    assert torch.equal(d.B, d_dense.B)
    assert torch.equal(d.dt, d_dense.dt)
    assert math.isfinite(float(d.A.sum()))
