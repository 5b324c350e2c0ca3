"""Without gradients a grid is prefill and streaming: bounded memory, states carried, nothing kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from magc import GridCheckpoint, Plan, grid_checkpoint
from magc.meter import MemoryMeter
from magc.schedule import Action, Run
from tests.magc.layers import (
    WIDTH,
    Decay,
    assert_same_bits,
    assert_same_gradients,
    floating,
    gradients,
    make_stack,
    objective,
    parameters,
    plain,
)

KINDS = ("cell", "mamba2", "mamba2", "lstm", "mlp", "gru")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "plan", [Plan(), Plan(layers=2, tokens=3), Plan(tokens=1, borders="disk", states="disk")], ids=str
)
def test_prefill_is_the_whole(mode: Any, plan: Plan, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = make_stack(KINDS)
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    seen: list[Action] = []
    with mode():
        y, states = grid_checkpoint(layers, x, plan=plan, disk_dir=str(tmp_path), observer=seen.append)
        bounds = list(plan.grid(len(layers), 10).tokens.all_bounds())
        assert_same_bits((y, list(states)), plain(layers, x, bounds=bounds))
        assert_same_gradients(floating((y, states)), floating(plain(layers, x)))
    assert not y.requires_grad
    assert {type(action) for action in seen} == {Run}
    assert not list(tmp_path.iterdir())


def test_streaming_token_by_token() -> None:
    torch.manual_seed(0)
    layers = make_stack(KINDS)
    grid = GridCheckpoint(layers, Plan(tokens=4))
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        whole, final = grid(x)
        y, states = grid(x[:, :7])
        parts = [y]
        for token in range(7, 10):
            y, states = grid(x[:, token : token + 1], states)
            parts.append(y)
    assert_same_gradients([torch.cat(parts, 1), *floating(states)], [whole, *floating(final)])


def test_prefill_then_training() -> None:
    """A state made without gradients starts a differentiable call."""
    torch.manual_seed(0)
    layers = make_stack(("cell", "mamba2", "mamba2"))
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=3))
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        _, states = grid(x[:, :6])
    kept = pytree.tree_map_only(torch.Tensor, torch.clone, states)
    y, final = grid(x[:, 6:], states)
    actual = gradients(objective(y, final), parameters(layers))
    assert_same_gradients(actual, gradients(objective(*plain(layers, x[:, 6:], states)), parameters(layers)))
    assert_same_bits(states, kept)


def test_truncated_backpropagation() -> None:
    layers = make_stack(("cell", "lstm"))
    grid = GridCheckpoint(layers, Plan(tokens=2))
    x = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    state = None
    for part in x.split(4, 1):
        y, state = grid(part, state)
        objective(y).backward()
        state = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    grads = [parameter.grad for parameter in grid.parameters()]
    y0, states = plain(layers, x[:, :4])
    y1, _ = plain(layers, x[:, 4:], pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, states))
    assert_same_gradients(grads, gradients(objective(y0) + objective(y1), list(grid.parameters())))


def test_memory_without_gradients_does_not_grow_with_the_sequence() -> None:
    layers = [Decay(16), Decay(16)]
    grid = GridCheckpoint(layers, Plan(tokens=64))
    peaks: list[int] = []
    for tokens in (512, 4096):
        x = torch.randn(1, tokens, 16)
        with torch.no_grad(), MemoryMeter("cpu") as meter:
            grid(x)
        peaks.append(meter.peak_bytes - x.nbytes)  # the output is as large as x
    assert peaks[1] <= peaks[0] < 0.1 * x.nbytes


def test_evaluation_mode() -> None:
    layers = make_stack(("cell", "dropout", "lstm"), dropout=0.5)
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=3)).eval()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    y, states = grid(x)
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    assert_same_gradients(gradients(objective(y, states), parameters(layers)), expected)
    grid.train()
    assert not torch.equal(grid(x)[0], y)
