"""Sequence axes, pytrees, strides, dtypes: what x, states and side inputs may look like."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from magc import Plan, grid_checkpoint
from magc.tree import duplicate
from tests.magc.layers import (
    RNN,
    WIDTH,
    Cell,
    assert_same_bits,
    assert_same_gradients,
    floating,
    gradients,
    objective,
    parameters,
    plain,
    segment_bounds,
)

PLANS = [Plan(), Plan(layers=1, tokens=3), Plan(layers=2, tokens=(1, 5, 2), borders="rebuild", snapshots=0)]


@pytest.mark.parametrize("seq_dim", [0, 1, 2])
@pytest.mark.parametrize("plan", [*PLANS, Plan(layers=1, tokens=3, borders="disk", states="disk")], ids=str)
def test_sequence_axis(seq_dim: int, plan: Plan) -> None:
    torch.manual_seed(0)
    layers = [Cell(seq_dim=seq_dim, dtype=torch.float64) for _ in range(3)]
    x_BLD = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    x = x_BLD.movedim(1, seq_dim).contiguous().requires_grad_()
    wanted = [x, *parameters(layers)]
    expected = plain(layers, x, seq_dim=seq_dim)
    y, states = grid_checkpoint(layers, x, plan=plan, seq_dim=seq_dim)
    assert y.shape == x.shape
    loop = plain(layers, x, bounds=segment_bounds(plan, layers, 8), seq_dim=seq_dim)
    assert_same_bits((y, list(states)), loop)
    assert_same_gradients(gradients(objective(y, states), wanted), gradients(objective(*expected), wanted))


def test_time_major_rnn() -> None:
    layers = [RNN(nn.LSTM, batch_first=False, dtype=torch.float64), RNN(nn.GRU, batch_first=False, dtype=torch.float64)]
    x = torch.randn(8, 2, WIDTH, dtype=torch.float64)
    expected = gradients(objective(*plain(layers, x, seq_dim=0)), parameters(layers))
    y, states = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=3), seq_dim=0)
    assert_same_gradients(gradients(objective(y, states), parameters(layers)), expected)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "flipped memory"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_strides(layout: str, plan: Plan) -> None:
    torch.manual_seed(0)
    layers = [Cell(dtype=torch.float64), RNN(nn.LSTM, dtype=torch.float64)]
    base = torch.randn(8, 2, 2 * WIDTH, dtype=torch.float64)
    x = (
        {
            "expanded": base[:1, :, :WIDTH].transpose(0, 1).expand(2, 8, WIDTH),
            "transposed": base[:, :, :WIDTH].contiguous().transpose(0, 1),
            "strided": base[:, :, ::2].transpose(0, 1),
            "flipped memory": base[:, :, :WIDTH].permute(2, 1, 0).contiguous().permute(1, 2, 0),
        }[layout]
        .detach()
        .requires_grad_()
    )
    wanted = [x, *parameters(layers)]
    expected = gradients(objective(*plain(layers, x)), wanted)
    y, states = grid_checkpoint(layers, x, plan=plan)
    assert_same_gradients(gradients(objective(y, states), wanted), expected)


class Frames(NamedTuple):
    """Features, a mask and integer positions."""

    features: Tensor
    mask: Tensor | None
    positions: Tensor


class Masked(nn.Module):
    """A recurrence over named tensors; its state has integers, complex numbers, a None and a nested list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.phase = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: Frames, state: Any = None, *, scale: Any = None) -> tuple[Frames, Any]:
        features = x.features if x.mask is None else x.features * x.mask
        if scale is not None:
            features = features * scale["factor"]
        h = torch.zeros(features.shape[0], WIDTH, dtype=torch.complex128) if state is None else state["deep"][0]
        seen = torch.zeros((), dtype=torch.int64) if state is None else state["seen"]
        outputs: list[Tensor] = []
        for step, position in zip(features.unbind(1), x.positions.unbind(1), strict=True):
            h = h * self.phase / self.phase.abs() * 0.9 + step * self.weight + position.unsqueeze(1) * 0.01
            outputs.append(h.real + h.imag + seen)
        new_state = {"deep": [h], "nothing": None, "seen": seen + 1 - 1}
        return Frames(torch.stack(outputs, 1).tanh(), x.mask, x.positions), new_state


@pytest.mark.parametrize("plan", [*PLANS, Plan(layers=1, tokens=3, borders="disk", states="disk")], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_pytrees(plan: Plan, masked: bool) -> None:
    torch.manual_seed(0)
    layers = [Masked(), Masked(), Masked()]
    features = torch.randn(2, 8, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 8, 1, dtype=torch.float64, requires_grad=True) if masked else None
    x = Frames(features, mask, torch.arange(16).view(2, 8))
    side = {"scale": {"factor": torch.rand(2, 8, 1, dtype=torch.float64)}}
    wanted = [features, *([mask] if mask is not None else []), *parameters(layers)]
    expected = plain(layers, x, bounds=segment_bounds(plan, layers, 8), **side)
    y, states = grid_checkpoint(layers, x, plan=plan, **side)
    assert isinstance(y, Frames)
    assert (y.mask is None) != masked
    assert_same_bits((y, list(states)), expected)

    def loss(y: Frames, states: Any) -> Tensor:
        return objective(y.features, y.mask, [torch.view_as_real(state["deep"][0]) for state in states])

    whole = gradients(loss(*plain(layers, x, **side)), wanted)
    for one, other in zip(gradients(loss(y, states), wanted), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_some_inputs_need_gradients() -> None:
    layers = [Masked(), Masked()]
    features = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    mask = torch.rand(2, 8, 1, dtype=torch.float64, requires_grad=True)
    x = Frames(features, mask, torch.arange(16).view(2, 8))
    expected = gradients(objective(plain(layers, x)[0].features), [mask])
    y, _ = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=3))
    assert_same_gradients(gradients(objective(y.features), [mask]), expected)


def test_unused_outputs_need_no_gradient() -> None:
    layers = [Masked(), Cell(dtype=torch.float64)]

    class Picks(nn.Module):
        def forward(self, x: Any, state: Any = None) -> Any:
            return (x.features, {"state": x.features[:, -1]})

    stack = [layers[0], Picks(), layers[1]]
    x = Frames(torch.randn(1, 6, WIDTH, dtype=torch.float64), None, torch.arange(6).view(1, 6))
    x_masked = x._replace(mask=torch.ones(1, 6, 1, dtype=torch.float64))
    for uses in (lambda y, s: y, lambda y, s: s[1], lambda y, s: s[2]["h"], lambda y, s: y[:, 0]):
        expected = gradients(objective(uses(*plain(stack, x_masked))), [layers[0].weight])
        for plan in PLANS:
            if plan.tokens is not None and not isinstance(plan.tokens, int):
                continue
            y, states = grid_checkpoint(stack, x_masked, plan=plan)
            assert_same_gradients(gradients(objective(uses(y, states)), [layers[0].weight]), expected)


def test_batch_of_none() -> None:
    y, states = grid_checkpoint([Cell()], torch.ones(0, 5, WIDTH), plan=Plan(tokens=2))
    assert y.shape == (0, 5, WIDTH)
    assert [leaf.shape for leaf in floating(states)] == [(0, WIDTH)]


def test_many_segments_of_many_sizes() -> None:
    torch.manual_seed(0)
    layers = [Cell(dtype=torch.float64), Cell(dtype=torch.float64)]
    x = torch.randn(1, 37, WIDTH, dtype=torch.float64)
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    for tokens in [*range(1, 40), (36, 1), (1, 36), (5, 30, 2)]:
        y, states = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=tokens))
        assert_same_gradients(gradients(objective(y, states), parameters(layers)), expected)


def test_a_layers_first_input_is_laid_out_like_the_next_ones() -> None:
    """Until a layer is known not to write into its input it gets a copy, for which operators must round alike."""
    base = torch.randn(3, 10, 5)
    for tensor in (
        base,
        base[:, 2:5],
        base[:, 2:3],
        base[:, 3],
        base.transpose(0, 1)[1:4],
        base[..., ::2],
        base[..., 1:4],
        base.permute(2, 0, 1)[:, :2],
        base[:1].expand(3, 10, 5),
        base.double()[:, 1:4],
        base.bfloat16()[1:, 1:4],
        base[:, :, 0],
        torch.randn(()),
        torch.empty(0, 3),
    ):
        copy = duplicate(tensor)
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous() == tensor.is_contiguous()
        if tensor.numel() and 0 not in tensor.stride():
            assert copy.data_ptr() != tensor.data_ptr()
            assert copy.untyped_storage().nbytes() <= 2 * base.nbytes + 64 * (1 + tensor.numel())
            for index in itertools.product(*(range(size) for size in tensor.shape)):
                assert (copy[index].data_ptr() - tensor[index].data_ptr()) % 64 == 0
    leaf = torch.randn(2, 5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(duplicate(leaf[:, 1:3]).sum(), leaf)
    assert grad.sum() == 12


@pytest.mark.parametrize("width", [3, 5, 8, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_widths_have_the_bits_of_a_plain_loop(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [RNN(nn.LSTM, width, dtype=dtype), Cell(width, dtype=dtype), RNN(nn.GRU, width, dtype=dtype)]
    x = torch.randn(3, 11, width, dtype=dtype)
    for plan in (Plan(tokens=1), Plan(layers=1, tokens=4), Plan(tokens=(3, 8))):
        y, states = grid_checkpoint(layers, x, plan=plan)
        assert_same_bits((y, list(states)), plain(layers, x, bounds=segment_bounds(plan, layers, 11)))
