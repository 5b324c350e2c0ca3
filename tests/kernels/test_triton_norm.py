"""The Triton norms against float64: in the interpreter without a GPU, on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, triton_test  # isort: skip  (before Triton)

from magc_kernels.norm import autograd, reference
from magc_kernels.norm._config import NormConfig
from tests.kernels.compare import assert_close, randn


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test():
        yield


def evaluate(
    function: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Outputs and all gradients. The residual and the weight are float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        n: t.to(DEVICE, wide if n in ("weight", "residual") else dtype).requires_grad_() for n, t in inputs.items()
    }
    arguments = {n: None for n in ("z", "residual") if n in function.__code__.co_varnames[:3]}
    outputs = function(**{**arguments, **leaves}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((out.double() * randn(90 + i, *out.shape).to(DEVICE)).sum() for i, out in enumerate(outputs))
    grads = torch.autograd.grad(total, list(leaves.values()))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype
    named = {str(i): out.detach() for i, out in enumerate(outputs)}
    return {**named, **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def check(name: str, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    actual = evaluate(getattr(autograd, name), inputs, dtype, **options)
    expected = evaluate(getattr(reference, name), inputs, torch.float64, **options)
    for key in expected:
        assert_close(actual[key], expected[key], 1e-6 if dtype == torch.float32 else 6e-3, key)


def make_inputs(features: int, *others: str, rows: tuple[int, ...] = (2, 9)) -> dict[str, Tensor]:
    inputs = {"x": randn(1, *rows, features), "weight": randn(2, features)}
    return {**inputs, **{name: randn(3, *rows, features) for name in others}}


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 8, 24])
@pytest.mark.parametrize("gate", [False, True])
def test_gated_norm_equals_float64(gate: bool, group_size: int | None, norm_before_gate: bool) -> None:
    inputs = make_inputs(24, *(["z"] if gate else []))
    check("gated_rms_norm", inputs, group_size=group_size, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_norm_equals_float64(residual: bool, residual_in_fp32: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(20, *(["residual"] if residual else []))
    check("add_rms_norm", inputs, dtype, residual_in_fp32=residual_in_fp32)


@pytest.mark.parametrize("rows", [(1,), (16,), (3, 11)])
def test_any_number_of_rows(rows: tuple[int, ...]) -> None:
    check("rms_norm", make_inputs(16, rows=rows), eps=1e-3)
    check("gated_rms_norm", make_inputs(17, "z", rows=rows), torch.float16)


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    values = {n: t.float().to(DEVICE) for n, t in make_inputs(72, "z", rows=(40,)).items()}
    x, z, weight = values["x"], values["z"], values["weight"]
    gated, (normal, _) = autograd.gated_forward(x, z, weight), autograd.add_forward(x, z, weight)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert torch.equal(autograd.gated_forward(x[rows], z[rows], weight), gated[rows])
        assert torch.equal(autograd.add_forward(x[rows], z[rows], weight)[0], normal[rows])


@pytest.mark.parametrize(
    "config", [NormConfig(1, 1, backward_programs=3), NormConfig(3, 2, forward_rows=4, backward_stages=1)]
)
@pytest.mark.parametrize("name", ["gated", "add"])
def test_explicit_configurations(name: str, config: NormConfig) -> None:
    values = {n: t.float().to(DEVICE) for n, t in make_inputs(40, "z", rows=(11,)).items()}
    x, z, weight = values["x"], values["z"], values["weight"]
    forward, vjp = getattr(autograd, name + "_forward"), getattr(autograd, name + "_vjp")
    for function, arguments in ((forward, (x, z, weight)), (vjp, (x, z, weight, x))):
        actual, expected = function(*arguments, config=config), function(*arguments)
        pairs = zip(*(vars(r).values() if function is vjp else (r[0],) for r in (actual, expected)), strict=True)
        for a, e in pairs:
            assert a is e is None or assert_close(a, e, 1e-6) is None


def test_configurations_reach_the_autograd_functions() -> None:
    config = NormConfig(3, 2, forward_rows=4, backward_programs=2)
    inputs = make_inputs(40, "z")
    for name, other in (("gated_rms_norm", "z"), ("add_rms_norm", "residual")):
        renamed = {other if n == "z" else n: t for n, t in inputs.items()}
        expected = evaluate(getattr(reference, name), renamed, torch.float64)
        for key, actual in evaluate(getattr(autograd, name), renamed, torch.float32, config=config).items():
            assert_close(actual, expected[key], 1e-6, key)


def test_a_configuration_that_cannot_run_is_refused() -> None:
    x, weight = torch.ones(2, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    with pytest.raises(ValueError, match="NormConfig: pieces 0 is not from 1 to 8; warps 3 is not"):
        autograd.gated_forward(x, x, weight, config=NormConfig(0, 3))


def test_strided_gate_and_gradient_and_the_output_again() -> None:
    """Z is a slice of a projection, and its gradient is written into a slice of the projection's."""
    values = {n: t.float().to(DEVICE) for n, t in make_inputs(16, "z").items()}
    x, weight, z = values["x"], values["weight"], values["z"]
    wide = torch.randn(2, 9, 40, device=DEVICE)
    wide[..., 8:24] = z
    dy = torch.randn(2, 9, 16, device=DEVICE)
    buffer = torch.zeros_like(wide)
    expected = autograd.gated_vjp(x, z, weight, dy)
    actual = autograd.gated_vjp(x, wide[..., 8:24], weight, dy, dz_out=buffer[..., 8:24], output=True)
    assert torch.equal(actual.x, expected.x)
    assert expected.z is not None
    assert torch.equal(buffer[..., 8:24], expected.z)
    assert not buffer[..., :8].any()
    assert not buffer[..., 24:].any()
    assert actual.y is not None
    assert torch.equal(actual.y, autograd.gated_forward(x, z, weight))


@pytest.mark.parametrize("y_dtype", [None, torch.float16])
def test_backward_of_add_norm_gives_the_output_again(y_dtype: torch.dtype | None) -> None:
    values = {n: t.float().to(DEVICE) for n, t in make_inputs(20, "residual").items()}
    y, total = autograd.add_forward(**values)
    d = autograd.add_vjp(total, None, values["weight"], torch.ones_like(y), output=True, y_dtype=y_dtype)
    assert d.y is not None
    assert d.y.dtype == (y_dtype or torch.float32)
    assert torch.equal(d.y, y.to(d.y.dtype))


def test_gradients_of_half_precision_weights_can_be_kept_in_float32() -> None:
    values = {n: t.half().to(DEVICE) for n, t in make_inputs(20, "z").items()}
    x, z, weight = values["x"], values["z"], values["weight"]
    dy = torch.ones_like(x)
    for vjp, other in ((autograd.gated_vjp, z), (autograd.add_vjp, z)):
        wide = vjp(x, other, weight, dy, float32_weights=True).weight
        expected = vjp(x.float(), other.float(), weight.float(), dy.float()).weight
        assert wide.dtype == torch.float32
        assert_close(wide, expected, 1e-6)
        assert torch.equal(vjp(x, other, weight, dy).weight, wide.half())


def test_either_output_of_add_norm_may_go_unused() -> None:
    inputs = make_inputs(12, "residual")
    for used in (0, 1):
        grads = []
        for function, dtype in ((autograd.add_rms_norm, torch.float32), (reference.add_rms_norm, torch.float64)):
            leaves = {n: t.to(DEVICE, dtype).requires_grad_() for n, t in inputs.items()}
            out = function(**leaves)[used]
            total = (out.double() * randn(9, *out.shape).to(DEVICE)).sum()
            grads.append(torch.autograd.grad(total, [leaves["x"], leaves["residual"]]))
        for a, e in zip(*grads, strict=True):
            assert_close(a, e, 1e-6)


def test_arguments_outside_the_kernels_limits_are_refused() -> None:
    values = {n: t.float().to(DEVICE) for n, t in make_inputs(16, "z").items()}
    with pytest.raises(TypeError, match="float64"):
        autograd.gated_rms_norm(**{n: t.double() for n, t in values.items()})
    with pytest.raises(ValueError, match="group_size must divide"):
        autograd.gated_rms_norm(**values, group_size=5)
    with pytest.raises(ValueError, match="z must have the shape"):
        autograd.gated_rms_norm(values["x"], values["z"][:1], values["weight"])
    with pytest.raises(ValueError, match="residual must have the shape"):
        autograd.add_rms_norm(values["x"], values["z"][:1], values["weight"])
    with pytest.raises(ValueError, match="one CUDA device"):
        autograd.rms_norm(values["x"], values["weight"].to("meta"))
    with pytest.raises(ValueError, match="at most 16384"):
        autograd.rms_norm(torch.ones(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("name", "other", "options"),
    [
        ("gated_rms_norm", "z", {}),
        ("gated_rms_norm", "z", {"group_size": 640, "norm_before_gate": True}),
        ("add_rms_norm", "residual", {}),
        ("add_rms_norm", "residual", {"residual_in_fp32": False}),
    ],
)
def test_error_on_the_gpu_is_that_of_rounding_inputs_and_outputs(
    name: str, other: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    inputs = make_inputs(5120, other, rows=(2, 333))
    expected = evaluate(getattr(reference, name), inputs, torch.float64, **options)
    plain = evaluate(getattr(reference, name), inputs, dtype, **options)
    actual = evaluate(getattr(autograd, name), inputs, dtype, **options)
    again = evaluate(getattr(autograd, name), inputs, dtype, **options)
    for key, e in expected.items():
        error, bound = ((t.double() - e).norm() / e.norm() for t in (actual[key], plain[key]))
        assert error <= 1.1 * bound + (1e-6 if dtype == torch.float32 else 0.0), key
        assert torch.equal(actual[key], again[key]), key
