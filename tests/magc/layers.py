"""Layers to test the engine with, and what it is compared with: plain loops and their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from magc import Plan, stateless
from magc.nn import Mamba2Block

WIDTH = 4
T = TypeVar("T")


class Cell(nn.Module):
    """A nonlinear recurrence written out token by token; its state is a dict with a tensor and an integer count."""

    def __init__(self, width: int = WIDTH, *, seq_dim: int = 1, dropout: float = 0.0, dtype: Any = None) -> None:
        super().__init__()
        self.seq_dim = seq_dim
        self.inner = nn.Linear(width, width, dtype=dtype)
        self.outer = nn.Linear(width, width, bias=False, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        x_BLD = x.movedim(self.seq_dim, 1)
        if state is None:
            h, count = (
                x_BLD.new_zeros(x_BLD.shape[0], x_BLD.shape[2]),
                torch.zeros((), dtype=torch.int64, device=x.device),
            )
        else:
            h, count = state["h"], state["count"]
        outputs: list[Tensor] = []
        for step in x_BLD.unbind(1):
            count = count + 1
            h = torch.tanh(self.inner(step) + self.outer(h))
            outputs.append(h + step / count)
        return self.dropout(torch.stack(outputs, 1)).movedim(1, self.seq_dim), {"h": h, "count": count}


class RNN(nn.Module):
    """torch's LSTM or GRU as a layer; its state is what torch returns."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], width: int = WIDTH, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(width, width, **{"batch_first": True, **options})

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, new_state = self.rnn(x, state)
        return x + y, new_state


class Merge(nn.Module):
    """Adds the pair that Mamba-2 blocks hand on."""

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return x if isinstance(x, Tensor) else (x[0] + x[1]).to(x[0].dtype)


class Mlp(nn.Module):
    """A residual MLP with a norm; treats every token on its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Decay(nn.Module):
    """``y_t = sum over s <= t of a^(t-s) * x_s * w``, cheap: a cumulative sum without a loop over tokens."""

    def __init__(self, width: int = WIDTH, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=dtype))
        self.mix = nn.Linear(width, width, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed = torch.tanh(self.mix(x)) * self.weight
        total = mixed.cumsum(1) * 0.1 if state is None else mixed.cumsum(1) * 0.1 + state.unsqueeze(1)
        return x + total, total[:, -1]


KINDS = ("cell", "lstm", "gru", "mamba2", "mlp", "dropout")


def make_layer(kind: str, *, dropout: float = 0.0) -> nn.Module:
    """A small layer by name; "mamba2" hands on a pair."""
    match kind:
        case "cell":
            return Cell()
        case "lstm":
            return RNN(nn.LSTM)
        case "gru":
            return RNN(nn.GRU)
        case "mamba2":
            return Mamba2Block(WIDTH, d_state=3, headdim=2, chunk_size=3)
        case "mlp":
            return stateless(Mlp())
        case "dropout":
            return stateless(nn.Dropout(dropout))
        case _:
            raise AssertionError(kind)


def make_stack(kinds: Sequence[str], *, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> list[nn.Module]:
    """Layers by name; a merge where something else follows Mamba-2 blocks."""
    layers: list[nn.Module] = []
    for before, kind in zip([None, *kinds], kinds, strict=False):
        if before == "mamba2" and kind != "mamba2":
            layers.append(stateless(Merge()))
        layers.append(make_layer(kind, dropout=dropout))
    for layer in layers:
        layer.to(dtype)
        for parameter in layer.parameters():
            # None of the usual zeros and ones: a gradient that is wrong there would go unseen.
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layers


# ---------------------------------------------------------------------- plain runs
def segment_bounds(plan: Plan, layers: Sequence[object], seq_len: int) -> list[tuple[int, int]]:
    """Token bounds of a plan's segments."""
    return list(plan.grid(len(layers), seq_len).tokens.all_bounds())


def narrow(tree: T, axis: int, start: int, stop: int) -> T:
    """Tokens ``start`` to ``stop`` of every tensor."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.narrow(axis, start, stop - start), tree)


def plain(
    layers: Sequence[Any],
    x: Any,
    state: Sequence[Any] | None = None,
    bounds: Iterable[tuple[int, int]] | None = None,
    *,
    seq_dim: int = 1,
    **side: Any,
) -> tuple[Any, list[Any]]:
    """Run layers by a plain loop over segments, or over the whole sequence at once.

    Returns:
        The output of the whole sequence and the final states.
    """
    states = [None] * len(layers) if state is None else list(state)
    length = pytree.tree_leaves(x)[0].shape[seq_dim]
    outputs: list[Any] = []
    for start, stop in [(0, length)] if bounds is None else bounds:
        h = narrow(x, seq_dim, start, stop)
        for index, layer in enumerate(layers):
            h, states[index] = layer(h, states[index], **narrow(side, seq_dim, start, stop))
        outputs.append(h)
    flat = [pytree.tree_flatten(output) for output in outputs]
    joined = [
        None if parts[0] is None else torch.cat(parts, seq_dim)
        for parts in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(joined, flat[0][1]), states


# ---------------------------------------------------------------------- gradients
def parameters(layers: Iterable[Any]) -> list[nn.Parameter]:
    """Trainable parameters, each once."""
    found = {
        id(parameter): parameter
        for layer in layers
        if isinstance(layer, nn.Module)
        for parameter in layer.parameters()
        if parameter.requires_grad
    }
    return list(found.values())


def floating(tree: Any) -> list[Tensor]:
    """The floating-point tensors in a pytree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def objective(*trees: Any) -> Tensor:
    """A scalar that depends on every element in its own way, nonlinearly."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for leaf in floating(trees):
        weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        total = total.to(leaf.device) + (leaf.double() * weight).sum() + 0.5 * leaf.double().square().mean()
    return total


def gradients(loss: Tensor, inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Gradients, zeros where there is none."""
    made = torch.autograd.grad(loss, inputs, allow_unused=True, **options)
    return [torch.zeros_like(of) if grad is None else grad for of, grad in zip(inputs, made, strict=True)]


def assert_same_gradients(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10, floor: float = 1e-12
) -> None:
    """Every gradient's largest error is below ``tolerance`` times its largest element (or ``floor``)."""
    assert len(actual) == len(expected)
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        if want.numel():
            error = (got.double() - want.double()).abs().max().item()
            scale = want.double().abs().max().item()
            assert error <= max(tolerance * scale, floor), f"gradient {index}: error {error:.2e} at scale {scale:.2e}"


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Two pytrees hold the same bits."""
    got, want = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other), (one - other).abs().max()
