"""A layer that breaks ``y, new_state = layer(x, state)`` is refused with an error that names it and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import GridCheckpoint, Plan, grid_checkpoint, stateless
from magc.contract import call_layer
from magc.errors import InputError, LayerContractError
from magc.tree import flatten
from tests.magc.layers import RNN, WIDTH, Cell, assert_same_bits


class Layer(nn.Module):
    """A layer made of a function of (x, state, number of calls so far)."""

    def __init__(self, body: Callable[[Tensor, Any, int], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.body, self.calls = body, 0

    def forward(self, x: Tensor, state: Any = None) -> Any:
        self.calls += 1
        return self.body(x * self.weight, state, self.calls - 1)


def run(layer: Callable[..., Any], **options: Any) -> tuple[Tensor, Any]:
    plan = Plan(layers=1, tokens=2)
    return grid_checkpoint([Cell(), layer, Cell()], torch.ones(2, 5, WIDTH), plan=plan, **options)


BROKEN: dict[str, tuple[Callable[[Tensor, Any, int], Any], str]] = {
    "returns y alone": (
        lambda x, state, call: x,
        r"layer 1 \(Layer\) returned a Tensor, but a layer returns \(y, new_state\)\. .*wrap it with magc\.stateless",
    ),
    "returns three values": (
        lambda x, state, call: (x, x[:, -1], x[:, 0]),
        r"layer 1 \(Layer\) returned a tuple of 3, but a layer returns",
    ),
    "returns a list": (lambda x, state, call: [x, x[:, -1]], r"returned a list, but a layer returns"),
    "returns no state": (
        lambda x, state, call: (x, None),
        r"layer 1 \(Layer\) returned no state \(new_state is None\), so the next segment could not resume",
    ),
    "returns an empty state": (lambda x, state, call: (x, ()), r"returned no state \(new_state is \(\)\)"),
    "drops its state": (
        lambda x, state, call: (x, x[:, -1] if call == 0 else None),
        r"dropped the state it was given \(new_state is None\)",
    ),
    "state is a number": (
        lambda x, state, call: (x, (x[:, -1], 3)),
        r"the state that layer 1 \(Layer\) returned holds a int \(3\); every leaf must be a tensor or None",
    ),
    "writes into its state": (
        lambda x, state, call: (x, x[:, -1].clone() if state is None else state.mul_(0.5)),
        r"wrote into the state it was given \(state, \(2, 4\) float32 on cpu\)\. A state is a value",
    ),
    "writes into a part of its state": (
        lambda x, state, call: (x, {"h": x[:, -1] if state is None else state["h"].mul_(0.5).clone()}),
        r"wrote into the state it was given \(state\['h'\]",
    ),
    "changes the structure of its state": (
        lambda x, state, call: (x, x[:, -1] if call == 0 else (x[:, -1],)),
        r"was given a state of structure \* but returned .*the structure must stay the same in every segment",
    ),
    "changes the shape of its state": (
        lambda x, state, call: (x, x.clone()),
        r"was given state as \(2, 2, 4\) float32 on cpu but returned it as \(2, 1, 4\) float32 on cpu",
    ),
    "changes the dtype of its state": (
        lambda x, state, call: (x, x[:, -1] if call == 0 else x[:, -1].double()),
        r"was given state as \(2, 4\) float32 on cpu but returned it as \(2, 4\) float64",
    ),
    "loses a part of its state": (
        lambda x, state, call: (x, (x[:, -1], x[:, -1] if call == 0 else None)),
        r"was given state\[1\] as \(2, 4\) float32 on cpu but returned it as None",
    ),
    "changes the structure of its output": (
        lambda x, state, call: (x if call == 0 else (x,), x[:, -1]),
        r"layer 1 \(Layer\) returned an output of structure .* but \* before",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_layers_are_refused(name: str) -> None:
    body, message = BROKEN[name]
    with pytest.raises((LayerContractError, InputError), match=message):
        run(Layer(body))
    with pytest.raises((LayerContractError, InputError), match=message), torch.no_grad():
        run(Layer(body))


LAST: dict[str, tuple[Callable[[Tensor, Any, int], Any], str]] = {
    "drops a token": (
        lambda x, state, call: (x[:, 1:], x[:, -1]),
        r"layer 0 \(Layer\) was given 2 tokens but its output is \(2, 1, 4\) .*it must have as many tokens",
    ),
    "drops the sequence axis": (
        lambda x, state, call: (x.sum((1, 2)), x[:, -1]),
        r"was given 2 tokens but its output is \(2,\)",
    ),
    "a part of the output has another length": (
        lambda x, state, call: ((x, x[:, :1]), x[:, -1]),
        r"was given 2 tokens but its output\[1\] is \(2, 1, 4\)",
    ),
    "changes the structure": (
        lambda x, state, call: (x if call == 0 else (x,), x[:, -1]),
        r"layer 0 \(Layer\) returned an output of structure .* for tokens 2 to 4 but \* before",
    ),
    "changes the width": (
        lambda x, state, call: (x if call == 0 else x[:, :, :1], x[:, -1]),
        r"returned output as \(2, 2, 1\) float32 on cpu for tokens 2 to 4, where segments before make \(2, 2, 4\)",
    ),
    "changes the dtype": (
        lambda x, state, call: (x if call == 0 else x.double(), x[:, -1]),
        r"returned output as \(2, 2, 4\) float64 .*shape and dtype must stay the same in every segment",
    ),
    "leaves a part out": (
        lambda x, state, call: ((x, x if call == 0 else None), x[:, -1]),
        r"returned output\[1\] as None",
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_outputs_that_do_not_fit_together_are_refused(name: str) -> None:
    body, message = LAST[name]
    with pytest.raises(LayerContractError, match=message):
        grid_checkpoint([Layer(body)], torch.ones(2, 5, WIDTH), plan=Plan(tokens=2))


def test_changed_buffers_are_refused() -> None:
    norm = stateless(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(WIDTH), nn.Unflatten(0, (2, 5))))
    message = r"layer 0 \(Stateless\) changed its buffer '\w+' \(BatchNorm1d\) .*carry it in the layer's state"
    with pytest.raises(LayerContractError, match=message):
        grid_checkpoint([norm], torch.ones(2, 5, WIDTH), plan=Plan())
    norm.eval()
    grid_checkpoint([norm], torch.ones(2, 5, WIDTH), plan=Plan())


def test_replaced_buffer_is_refused_and_a_cache_made_at_first_use_is_not() -> None:
    class Counts(nn.Module):
        def __init__(self, first: Tensor | None) -> None:
            super().__init__()
            self.register_buffer("cache", first)

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None or not self.cache.any():
                self.cache = torch.ones(WIDTH)
            return x * self.cache

    grid_checkpoint([stateless(Counts(None))], torch.ones(2, 5, WIDTH), plan=Plan(tokens=2))
    with pytest.raises(LayerContractError, match="changed its buffer 'cache'"):
        grid_checkpoint([stateless(Counts(torch.zeros(WIDTH)))], torch.ones(2, 5, WIDTH), plan=Plan(tokens=2))


@pytest.mark.parametrize("plan", [Plan(), Plan(layers=1, tokens=2)], ids=str)
@pytest.mark.parametrize("others_train", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_unknown_parameters_are_refused_in_the_forward(plan: Plan, others_train: bool, place: int) -> None:
    hidden = nn.Linear(WIDTH, WIDTH)
    layers: list[Any] = [Cell().requires_grad_(others_train)]
    layers.insert(place, lambda x, state=None: (hidden(x), x[:, -1]))
    message = r"needs a gradient but is neither an input, a state, nor a registered parameter .*Register it as"
    with pytest.raises(LayerContractError, match=message):
        grid_checkpoint(layers, torch.ones(2, 5, WIDTH), plan=plan)
    with torch.no_grad():
        grid_checkpoint(layers, torch.ones(2, 5, WIDTH), plan=plan)
    hidden.requires_grad_(False)
    y, _ = grid_checkpoint(layers, torch.ones(2, 5, WIDTH), plan=plan)
    assert y.requires_grad == others_train


def test_functions_are_layers() -> None:
    def shift(x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = x[:, :1] * 0 if state is None else state
        return torch.cat([before, x[:, :-1]], 1), x[:, -1:]

    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    y, (state,) = grid_checkpoint([shift], x, plan=Plan(tokens=2))
    assert torch.equal(y[:, 1:], x[:, :-1])
    assert torch.equal(state, x[:, -1:])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ones_like(x).index_fill(1, torch.tensor([4]), 0.0))


def test_stateless_passes_no_side_inputs_on() -> None:
    documents = torch.zeros(2, 5, dtype=torch.int32)
    mlp = nn.Linear(WIDTH, WIDTH)
    y, states = grid_checkpoint([stateless(mlp)], torch.ones(2, 5, WIDTH), plan=Plan(tokens=2), seq_idx=documents)
    assert_same_bits(y, mlp(torch.ones(2, 5, WIDTH)))
    assert states == ((),)


@pytest.mark.parametrize("make", ["last of y", "last of x", "y", "x", "state"])
def test_states_are_compact_and_own_their_memory(make: str) -> None:
    x, given = torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)

    def layer(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, {"last of y": y[:, -1], "last of x": x[:, -1], "y": y, "x": x, "state": state}[make]

    state = flatten("state", x.clone() if make in ("x", "y") else given)
    y, new_state = call_layer("layer", layer, x, state, {}, stateless_layer=False)
    (leaf,) = new_state.tensors
    assert isinstance(y, Tensor)
    assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    assert leaf.data_ptr() not in (x.data_ptr(), y.data_ptr(), given.data_ptr())


def test_rnn_modules_need_an_adapter_or_a_matching_state() -> None:
    y, states = run(RNN(nn.LSTM))
    assert y.shape == (2, 5, WIDTH)
    assert len(states) == 3
    grid = GridCheckpoint([nn.LSTM(WIDTH, WIDTH, batch_first=True)], Plan(tokens=2))
    assert_same_bits(grid(torch.ones(2, 5, WIDTH))[0], grid.layers[0](torch.ones(2, 5, WIDTH))[0])


def test_a_layer_without_a_state_argument_is_refused_before_it_runs() -> None:
    with pytest.raises(LayerContractError, match=r"layer 1 \(Linear\) takes \(input.*wrap it with magc.stateless"):
        grid_checkpoint([nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)], torch.randn(1, 3, 4), plan=Plan())
