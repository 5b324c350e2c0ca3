"""Low precision: gradients summed over many segments are as good as those of one; memory that does not grow."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import GridCheckpoint, Plan, grid_checkpoint, stateless
from magc.accumulate import GradAccumulator
from magc.meter import MemoryMeter
from tests.magc.layers import gradients, parameters

TOKENS, SEGMENTS, FEATURES = 1024, 512, 32


class RunningMean(nn.Module):
    """Linear, a sum over time with its state in at least fp32 (as state-space layers keep it), linear."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = self.into(x)
        total = u.to(torch.promote_types(u.dtype, torch.float32)).cumsum(1) * 0.05
        total = total if state is None else total + state.unsqueeze(1)
        return x + self.out(torch.tanh(total).to(x.dtype)), total[:, -1]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 2 * FEATURES), nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def make_layers() -> list[nn.Module]:
    return [RunningMean(), stateless(Mlp()), RunningMean()]


def run(layers: Sequence[nn.Module], x: Tensor, weight: Tensor, plan: Plan, **options: Any) -> list[Tensor]:
    y, _ = grid_checkpoint(layers, x, plan=plan, **options)
    return gradients((y.float() * weight).sum(), parameters(layers))


@functools.cache
def errors(setting: str, segments: int, accumulate: torch.dtype = torch.float32) -> Tensor:
    """Relative error of every parameter's gradient, ``|g - g64| / |g64|``, for three seeds: (seeds, parameters).

    ``g64`` is the gradient in float64 of the same model with the values of the low-precision parameters and inputs, so
    the error is that of all low-precision arithmetic, forward and backward, of which accumulation is a part.
    """
    found: list[list[float]] = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = nn.ModuleList(make_layers())
        x, weight = torch.randn(1, TOKENS, FEATURES), torch.randn(1, TOKENS, FEATURES)
        if setting == "bf16 parameters":
            layers, x = layers.bfloat16(), x.bfloat16()
        exact = run(copy.deepcopy(layers).double(), x.double(), weight, Plan(tokens=256))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            grads = run(layers, x, weight, Plan(tokens=TOKENS // segments), accumulate=accumulate)
        assert {grad.dtype for grad in grads} == {torch.float32 if setting == "autocast" else torch.bfloat16}
        pairs = zip(grads, exact, strict=True)
        found.append([((grad.double() - true).norm() / true.norm()).item() for grad, true in pairs])
    return torch.tensor(found)


def size(error: Tensor) -> float:
    """Root mean square over seeds and parameters."""
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("setting", ["bf16 parameters", "autocast"])
def test_512_segments_are_as_precise_as_one(setting: str) -> None:
    one, many = errors(setting, 1), errors(setting, SEGMENTS)
    assert size(many) <= 1.2 * size(one)
    # No parameter is left behind. One whose only error in a single segment is the rounding of the result may get
    # sqrt(2) times that: every segment's gradient reaches the sum rounded to bf16 by the layer's own backward.
    assert (many.mean(0) <= 1.5 * one.mean(0)).all()


def test_sums_in_bf16_are_much_worse() -> None:
    many = errors("bf16 parameters", SEGMENTS)
    low = errors("bf16 parameters", SEGMENTS, torch.bfloat16)
    assert size(low) > 2 * size(many)


def test_accumulator() -> None:
    low, high = nn.Parameter(torch.zeros(3).bfloat16()), nn.Parameter(torch.zeros(3).double())
    accumulator = GradAccumulator([low, high, low, low], torch.float32, [False, False, True, False])
    alone = torch.full((3,), 0.1).bfloat16()
    for _ in range(1000):
        accumulator.add(0, torch.full((3,), 1.0).bfloat16())
        accumulator.add(1, torch.full((3,), 1e-9, dtype=torch.float64))
    accumulator.add(2, alone)
    sums = accumulator.deliver()
    assert torch.equal(sums[0], torch.full((3,), 1000.0).bfloat16())
    torch.testing.assert_close(sums[1], torch.full((3,), 1e-6, dtype=torch.float64), rtol=1e-12, atol=0)
    assert sums[2] is alone
    assert sums[3] is None
    assert accumulator.deliver() == [None] * 4


def test_accumulated_gradients_do_not_alias() -> None:
    one, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    accumulator = GradAccumulator([one, other], torch.float32, [False, False])
    shared = torch.ones(3)
    for _ in range(2):
        accumulator.add(0, shared)
        accumulator.add(1, shared)
    assert torch.equal(shared, torch.ones(3))
    assert [total.tolist() for total in accumulator.deliver()] == [[2.0] * 3] * 2


# ---------------------------------------------------------------------- memory
class Head(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.projection = nn.Linear(FEATURES, vocabulary)

    def forward(self, y: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        logits = self.projection(y).flatten(0, 1)
        return functional.cross_entropy(logits, targets.flatten(), reduction="sum"), targets.numel()


@pytest.mark.parametrize("snapshots", [None, 4])
def test_memory_does_not_grow_with_the_sequence(snapshots: int | None, tmp_path: Path) -> None:
    """A sequence-only plan with stem, head and states on disk: only token ids grow."""
    torch.manual_seed(0)
    stem, head = nn.Embedding(50, FEATURES), Head(50)
    grid = GridCheckpoint(make_layers(), Plan.sequence(512, states="disk", snapshots=snapshots), disk_dir=str(tmp_path))
    peaks: list[int] = []
    for tokens in (2**12, 2**16):
        ids = torch.randint(0, 50, (1, tokens + 1))
        with MemoryMeter("cpu") as meter:
            grid.loss(ids[:, :-1], ids[:, 1:], head=head, stem=stem).backward()
        peaks.append(meter.peak_bytes)
        for parameter in (*grid.parameters(), *stem.parameters(), *head.parameters()):
            parameter.grad = None
    assert peaks[1] < 1.05 * peaks[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("states", ["host", "disk"])
def test_cuda_memory_does_not_grow_with_the_sequence(states: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stem, head = nn.Embedding(50, FEATURES).cuda(), Head(50).cuda()
    grid = GridCheckpoint(make_layers(), Plan.sequence(512, states=states), disk_dir=str(tmp_path)).cuda()
    peaks: list[int] = []
    for tokens in (2**12, 2**12, 2**16):  # the first call sets up libraries' workspaces
        ids = torch.randint(0, 50, (1, tokens + 1))
        with MemoryMeter("cuda") as meter:
            grid.loss(ids[:, :-1], ids[:, 1:], head=head, stem=stem).backward()
        peaks.append(meter.peak_bytes)
        for parameter in (*grid.parameters(), *stem.parameters(), *head.parameters()):
            parameter.grad = None
    assert peaks[2] < 1.05 * peaks[1]
