"""The whole Mamba-2 layer on Triton kernels against its reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, ON_GPU, triton_test  # isort: skip  (before Triton)

from magc_kernels.mamba2 import autograd as fused
from magc_kernels.mamba2 import reference
from magc_kernels.mamba2.values import Keep, Mamba2Inputs, Mamba2Outputs, Mamba2Sizes, Mamba2Weights
from tests.kernels.compare import assert_close, packed_ids, randn

TOLERANCE = 2e-4 if ON_GPU else 2e-5


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with triton_test(small_tiles=True):
        yield


@dataclass(frozen=True)
class Case:
    """A layer and one segment for it."""

    d_model: int = 24
    heads: int = 4
    headdim: int = 16
    groups: int = 2
    d_state: int = 16
    mlp: int = 0
    batch: int = 2
    length: int = 21
    norm: bool = True
    block_norm: bool = True
    residual: bool = True
    bias: bool = False
    conv_bias: bool = True
    per_channel_skip: bool = False
    states: bool = True
    packed: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_before_gate: bool = False
    residual_in_fp32: bool = True

    def inputs(self) -> Mamba2Inputs:
        """In float64 on the CPU."""
        scan = self.heads * self.headdim
        channels = scan + 2 * self.groups * self.d_state
        columns = 2 * self.mlp + scan + channels + self.heads
        seeds = iter(range(100))

        def draw(*shape: int, scale: float = 1.0, wanted: bool = True) -> Tensor | None:
            return scale * randn(next(seeds), *shape) if wanted else None

        weights: dict[str, Any] = {
            "in_proj": draw(columns, self.d_model, scale=self.d_model**-0.5),
            "conv": draw(channels, 1, 4, scale=0.5),
            "dt_bias": draw(self.heads),
            "A_log": draw(self.heads, scale=0.5),
            "D": draw(scan if self.per_channel_skip else self.heads),
            "out_proj": draw(self.d_model, self.mlp + scan, scale=scan**-0.5),
            "in_bias": draw(columns, wanted=self.bias),
            "conv_bias": draw(channels, wanted=self.conv_bias),
            "norm": draw(scan, wanted=self.norm),
            "out_bias": draw(self.d_model, wanted=self.bias),
            "block_norm": draw(self.d_model, wanted=self.block_norm),
        }
        hidden = draw(self.batch, self.length, self.d_model)
        assert hidden is not None
        return Mamba2Inputs(
            hidden,
            Mamba2Weights(**weights),
            Mamba2Sizes(
                self.headdim,
                self.groups,
                self.d_state,
                dt_limit=self.dt_limit,
                chunk_size=16,
                norm_before_gate=self.norm_before_gate,
                residual_in_fp32=self.residual_in_fp32,
            ),
            residual=draw(*hidden.shape, wanted=self.block_norm and self.residual),
            conv_state=draw(self.batch, 3, channels, wanted=self.states),
            ssm_state=draw(self.batch, self.heads, self.headdim, self.d_state, wanted=self.states),
            seq_idx=packed_ids(7, self.batch, self.length, mean=6.0) if self.packed else None,
            prev_seq_idx=torch.zeros(self.batch, dtype=torch.int32) if self.packed else None,
        )


NAMES = ("hidden", "residual", "conv_state", "ssm_state")
WEIGHTS = tuple(field.name for field in fields(Mamba2Weights))


def convert(inputs: Mamba2Inputs, dtype: torch.dtype, device: torch.device) -> Mamba2Inputs:
    """Fresh leaves of another type."""

    def move(x: Tensor | None) -> Tensor | None:
        if x is None or not x.dtype.is_floating_point:
            return None if x is None else x.to(device)
        return x.detach().to(device, dtype, copy=True).requires_grad_()

    weights = Mamba2Weights(**{name: move(getattr(inputs.weights, name)) for name in WEIGHTS})
    moved: dict[str, Any] = {name: move(getattr(inputs, name)) for name in (*NAMES, "seq_idx", "prev_seq_idx")}
    return replace(inputs, weights=weights, **moved)


def leaves(inputs: Mamba2Inputs) -> dict[str, Tensor]:
    """Everything that gets a gradient."""
    found = {name: getattr(inputs, name) for name in NAMES} | {name: getattr(inputs.weights, name) for name in WEIGHTS}
    return {name: x for name, x in found.items() if x is not None}


def outputs(result: Mamba2Outputs) -> dict[str, Tensor]:
    """The results that exist."""
    found = {field.name: getattr(result, field.name) for field in fields(result)}
    return {name: x for name, x in found.items() if x is not None}


def gradients(result: Mamba2Outputs, inputs: Mamba2Inputs) -> dict[str, Tensor]:
    """Of a random linear function of all results."""
    made = outputs(result)
    weights = [randn(200 + i, *x.shape).to(x.dtype).to(x.device) for i, x in enumerate(made.values())]
    wanted = leaves(inputs)
    grads = torch.autograd.grad(list(made.values()), list(wanted.values()), weights)
    return dict(zip(wanted, grads, strict=True))


CASES = {
    "block": Case(),
    "start of the stream and of the sequence": Case(residual=False, states=False),
    "mixer alone": Case(block_norm=False, batch=1),
    "no gated norm, biases": Case(norm=False, bias=True, conv_bias=False, batch=1),
    "gated MLP beside the scan, skip per channel": Case(mlp=8, per_channel_skip=True, length=16, batch=1),
    "packed, limits of dt": Case(packed=True, dt_limit=(0.1, 1.0)),
    "norm before gate, residual in the input's type": Case(norm_before_gate=True, residual_in_fp32=False, length=1),
}


# What is kept changes no bit (a test of its own), but the gate without a norm has another way back.
KEPT: list[tuple[str, Keep]] = [(name, "states") for name in CASES]
KEPT += [("no gated norm, biases", "projection"), ("no gated norm, biases", "outputs")]


@pytest.mark.parametrize(("name", "keep"), KEPT)
def test_results_and_all_gradients_are_those_of_the_reference(name: str, keep: Keep) -> None:
    case = CASES[name]
    exact = convert(case.inputs(), torch.float64, torch.device("cpu"))
    inputs = convert(case.inputs(), torch.float32, DEVICE)
    expected, result = reference.mamba2(exact), fused.mamba2(inputs, keep=keep)
    for name, value in outputs(expected).items():
        assert_close(getattr(result, name).cpu(), value, TOLERANCE, name)
    expected_grads, grads = gradients(expected, exact), gradients(result, inputs)
    for name, value in expected_grads.items():
        assert_close(grads[name].cpu(), value, 10 * TOLERANCE, name)


SMALL = Case(batch=1, heads=2, groups=1, length=18)


def test_what_is_kept_changes_no_bit() -> None:
    inputs = convert(SMALL.inputs(), torch.float32, DEVICE)
    runs = [fused.mamba2(inputs, keep=keep) for keep in ("projection", "states", "outputs")]
    plain = fused.forward(inputs)
    grads = [gradients(run, inputs) for run in runs]
    for run, found in zip(runs, grads, strict=True):
        for name, value in outputs(plain).items():
            assert torch.equal(getattr(run, name), value), name
        for name, value in grads[0].items():
            assert torch.equal(found[name], value), name


def test_bytes_kept_are_those_the_level_names() -> None:
    length = 32
    case = Case(d_model=48, length=length, batch=1)
    inputs = convert(case.inputs(), torch.float32, DEVICE)
    scan, channels = 64, 64 + 2 * 2 * 16
    projection = 4 * (2 * scan + 2 * 2 * 16 + 4) * length
    total = 4 * 48 * length
    states = 4 * (length // 16) * 4 * 16 * 16 + 2 * 4 * 4 * length
    expected = {
        "projection": projection + total,
        "states": projection + total + states,
        "outputs": projection + total + states + 4 * (channels + scan) * length,
    }
    given = {x.untyped_storage().data_ptr() for x in leaves(inputs).values()}
    for keep, nbytes in expected.items():
        held: dict[int, int] = {}

        def hold(x: Tensor, held: dict[int, int] = held) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in given and storage.nbytes() > x.element_size():
                held[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            result = fused.mamba2(inputs, keep=keep)
        del result
        assert sum(held.values()) == nbytes, keep


def test_output_that_nobody_reads_is_skipped_and_the_gradients_stay() -> None:
    inputs = convert(SMALL.inputs(), torch.float32, DEVICE)
    whole, lean = fused.mamba2(inputs), fused.mamba2(inputs, output_needed=False)
    assert lean.y.isnan().all()
    assert lean.y.untyped_storage().nbytes() == 4
    for name in ("residual", "conv_state", "ssm_state"):
        assert torch.equal(getattr(whole, name), getattr(lean, name)), name
    first, second = gradients(whole, inputs), gradients(lean, inputs)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_two_segments_are_the_whole() -> None:
    inputs = convert(replace(SMALL, length=24).inputs(), torch.float32, DEVICE)
    whole = fused.mamba2(inputs)
    assert inputs.residual is not None
    head = replace(inputs, hidden=inputs.hidden[:, :16], residual=inputs.residual[:, :16])
    first = fused.mamba2(head)
    tail = replace(
        inputs,
        hidden=inputs.hidden[:, 16:],
        residual=inputs.residual[:, 16:],
        conv_state=first.conv_state,
        ssm_state=first.ssm_state,
    )
    second = fused.mamba2(tail)
    assert first.residual is not None
    assert second.residual is not None
    joined = Mamba2Outputs(
        torch.cat([first.y, second.y], 1),
        torch.cat([first.residual, second.residual], 1),
        second.conv_state,
        second.ssm_state,
    )
    for name, value in outputs(whole).items():
        assert_close(getattr(joined, name), value, 1e-5, name)
    expected, grads = gradients(whole, inputs), gradients(joined, inputs)
    for name, value in expected.items():
        assert_close(grads[name], value, 2e-4, name)


class _Summed(torch.nn.Parameter):
    """A parameter whose gradients go into a sum."""

    total: Tensor

    def grad_sum(self) -> Tensor:
        return self.total


def test_weight_gradients_go_into_the_sums_of_parameters_that_have_one() -> None:
    case = replace(SMALL, bias=True)
    plain = convert(case.inputs(), torch.float32, DEVICE)
    expected = gradients(fused.mamba2(plain), plain)
    summed: dict[str, Any] = {}
    for name in WEIGHTS:
        summed[name] = _Summed(getattr(plain.weights, name).detach())
        summed[name].total = torch.ones_like(summed[name].detach())
    inputs = replace(convert(case.inputs(), torch.float32, DEVICE), weights=Mamba2Weights(**summed))
    result = outputs(fused.mamba2(inputs))
    torch.autograd.backward(
        list(result.values()),
        [randn(200 + i, *x.shape).to(x.dtype).to(x.device) for i, x in enumerate(result.values())],
    )
    for name, parameter in summed.items():
        assert parameter.grad is None, name
        assert_close(parameter.total, 1 + expected[name], 1e-5, name)


def test_frozen_weights_and_inputs_get_nothing() -> None:
    inputs = convert(SMALL.inputs(), torch.float32, DEVICE)
    frozen = replace(inputs, hidden=inputs.hidden.detach(), residual=None, conv_state=None, ssm_state=None)
    inputs.weights.in_proj.requires_grad_(False)
    inputs.weights.norm.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
    result = fused.mamba2(frozen)
    result.y.square().sum().backward()
    assert inputs.weights.in_proj.grad is None
    assert inputs.weights.norm.grad is None  # pyright: ignore[reportOptionalMemberAccess]
    assert inputs.weights.out_proj.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 0, 24)}, "hidden must be"),
        ({"hidden": torch.zeros(2, 5, 23)}, "hidden must be"),
        ({"residual": torch.zeros(2, 20, 24)}, "residual must be shaped as hidden"),
        ({"prev_seq_idx": torch.zeros(2), "seq_idx": torch.zeros(2, 21, dtype=torch.int32)}, "prev_seq_idx must be"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, Tensor], message: str) -> None:
    inputs = convert(SMALL.inputs(), torch.float32, DEVICE)
    moved: dict[str, Any] = {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        fused.mamba2(replace(inputs, **moved))


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="keep must be one of 'projection', 'states', 'outputs'"):
        fused.mamba2(convert(SMALL.inputs(), torch.float32, DEVICE), keep="all")  # pyright: ignore[reportArgumentType]


def test_gradients_of_gradients_are_refused() -> None:
    inputs = convert(Case(batch=1, length=16).inputs(), torch.float32, DEVICE)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(fused.mamba2(inputs).y.sum(), inputs.hidden, create_graph=True)
