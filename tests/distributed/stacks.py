"""Stacks of layers for two ranks: sharded and whole, with the gradients of the whole batch in one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from magc import GridCheckpoint, Plan
from tests.distributed.ranks import RANKS
from tests.magc.layers import WIDTH, gradients, make_stack, parameters, plain

KINDS = ("cell", "mlp", "lstm", "cell")
TOKENS = 9
PLANS = {
    "one cell": Plan(),
    "layers x segments": Plan(layers=1, tokens=2),
    "kept and ragged": Plan(layers=(3, 1), tokens=(4, 1, 4), keep=3),
    "rebuilt": Plan(layers=2, tokens=2, borders="rebuild", snapshots=1),
}


def make_layers(kinds: Sequence[str] = KINDS, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """The same layers on every rank."""
    torch.manual_seed(0)
    return make_stack(kinds, dtype=dtype)


def batches(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> Tensor:
    """One micro-batch for each rank; `(rank, batch, tokens, width)`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(RANKS, 2, tokens, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def expected(layers: Sequence[nn.Module], xs: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of the mean of the ranks' losses, by plain autograd in one process."""
    losses = [loss_of(plain(layers, x)[0]) for x in xs]
    return gradients(torch.stack(losses).mean(), parameters(layers))


def sharded(layers: Sequence[nn.Module], **options: Any) -> Sequence[nn.Module]:
    """The layers, each a parameter group of its own."""
    for layer in layers:
        fully_shard(layer, **options)
    return layers


def whole_gradients(module: nn.Module) -> list[Tensor]:
    """Gradients of a module's trainable parameters, put together from all ranks."""
    whole: list[Tensor] = []
    for parameter in parameters([module]):
        assert parameter.grad is not None
        grad = parameter.grad
        whole.append(grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return whole


class InTurn(nn.Module):
    """Layers called once each, over the whole sequence: what a grid is compared with."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* returned a view tensor")  # the layers' states
            for layer in self.layers:
                x, _ = layer(x, None)
        return x.clone()


class OnGrid(nn.Module):
    """The same layers on a grid inside a larger module."""

    def __init__(self, layers: Iterable[nn.Module], plan: Plan) -> None:
        super().__init__()
        self.grid = GridCheckpoint(layers, plan)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid(x)[0]
