"""`magc.check` passes layers that keep the contract and says what is wrong with those that do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import stateless
from magc.check import check
from magc.errors import InputError, LayerContractError, StateError
from tests.magc.layers import RNN, WIDTH, Cell, Decay, Mlp, make_stack


def example(tokens: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kinds", [("cell",), ("lstm",), ("gru", "mlp"), ("mamba2", "mamba2", "cell")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_good_layers_pass(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    report = check(make_stack(kinds, dtype=dtype), example(dtype=dtype))
    assert report.tokens == 9
    assert report.segmentations == ((1, 8), (5, 4), (3, 3, 3))
    assert report.worst.relative <= report.rtol
    names = [difference.name for difference in report.differences]
    assert "gradient of x" in names
    assert any(name.startswith("final state") for name in names)


def test_report_names_every_tensor() -> None:
    layer = Cell(dtype=torch.float64)
    report = check(layer, example(), {"h": torch.randn(2, WIDTH).double(), "count": torch.tensor(2)})
    assert [difference.name for difference in report.differences] == [
        "output",
        "final state['h']",
        "final state['count']",
        "gradient of x",
        "gradient of the initial state['h']",
        "gradient of inner.weight",
        "gradient of inner.bias",
        "gradient of outer.weight",
    ]
    assert "1 + 8; 5 + 4; 3 + 3 + 3" in str(report)
    assert "gradient of outer.weight" in str(report)


def test_parameters_of_a_sequence_are_named_with_their_layer() -> None:
    report = check([Cell(), Cell()], example(dtype=torch.float32), segments=4)
    assert "gradient of inner.bias of layer 1" in [difference.name for difference in report.differences]
    assert report.segmentations == ((4, 4, 1),)


def test_other_sequence_axis_and_side_inputs() -> None:
    check(Cell(seq_dim=0, dtype=torch.float64), example().transpose(0, 1), seq_dim=0)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2, dtype=torch.int32)
    check(make_stack(("mamba2",)), example(), seq_idx=documents)


def test_everything_is_left_as_it_was() -> None:
    layers = nn.ModuleList([Cell(dtype=torch.float64), RNN(nn.LSTM, dtype=torch.float64)])
    layers[1].eval()
    x = example().requires_grad_()
    state = [{"h": torch.randn(2, WIDTH).double(), "count": torch.tensor(2)}, None]
    kept = x.detach().clone(), state[0]["h"].clone()
    hooked: list[Tensor] = []
    layers[0].inner.weight.register_hook(hooked.append)
    parameters = list(layers.parameters())
    before = torch.get_rng_state()
    with torch.no_grad():
        check(layers, x, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(new is old for new, old in zip(layers.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert x.grad is None
    assert torch.equal(x, kept[0])
    assert torch.equal(state[0]["h"], kept[1])
    assert not hooked
    assert layers[0].training
    assert not layers[1].training


# ---------------------------------------------------------------------- layers that break the contract
class Broken(nn.Module):
    """A running sum with one thing wrong."""

    def __init__(self, body: Callable[[Tensor, Tensor], tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x = x * self.weight
        return self.body(x, x.new_zeros(x.shape[0], WIDTH) if state is None else state)


def running(x: Tensor, state: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(1) + state.unsqueeze(1))


def last(x: Tensor, state: Tensor) -> Tensor:
    return state + x.sum(1)


def looks_ahead(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return running(x, state) + torch.cat([x[:, 1:], x[:, :1] * 0], 1), last(x, state)


def normalises_over_the_sequence(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return x.softmax(1), last(x, state)


def forgets_the_last_input(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return running(x, state) + torch.cat([x[:, :1] * 0, x[:, :-1]], 1), last(x, state)


def ignores_its_state(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return running(x, state * 0), last(x, state * 0)


def detaches_its_state(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return running(x, state), last(x, state).detach()


def returns_an_early_state(x: Tensor, state: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    whole = state if isinstance(state, Tensor) else state[0]
    return running(x, whole), (last(x, whole), x[:, 0])


def writes_into_its_state(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y = running(x, state.clone())
    return y, state.add_(x.sum(1)).clone()


def writes_behind_torchs_back(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, new_state = running(x, state.clone()), last(x, state.clone())
    state.data.add_(1.0)
    return y, new_state


def makes_nan(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log(x - 100), last(x, state)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (looks_ahead, r"the output differs .* segments of 1 \+ 8 tokens from token 0 on .*looks ahead"),
        (normalises_over_the_sequence, r"the output differs .*the layer looks ahead .*or uses the length"),
        (forgets_the_last_input, r"the output differs .*from token 1 on .*the state lacks something"),
        (ignores_its_state, r"the output differs .*from token 1 on .*or the layer ignores the state"),
        (detaches_its_state, r"the gradient of x differs .*although outputs and states agree.*detach\(\)"),
        (returns_an_early_state, r"the final state\[1\] differs .*although the outputs agree"),
        (writes_into_its_state, r"wrote into the state it was given \(state, \(2, 4\) float64 on cpu\)"),
        (writes_behind_torchs_back, r"wrote into the state .*behind torch's back \(\.data"),
        (makes_nan, r"the output \(\(2, 9, 4\) float64 on cpu\) of the whole example is nan at \(0, 0, 0\)"),
        (lambda x, state: running(x, state), r"returned a Tensor, but a layer returns \(y, new_state\)"),
        (lambda x, state: (running(x, state), None), r"returned no state"),
    ],
)
def test_broken_layers_are_refused_with_the_cause(body: Any, message: str) -> None:
    with pytest.raises(LayerContractError, match=message):
        check(Broken(body), example())


def test_the_place_and_the_numbers_are_given() -> None:
    place = r"from token 4 on \(largest difference \d\.\d+ at \(\d, 4, \d\), expected -?\d.*, got -?\d.*, allowed \d"
    with pytest.raises(LayerContractError, match=place):
        check(Broken(looks_ahead), example(), segments=(5, 4))


def test_bidirectional_rnn_looks_ahead() -> None:
    class Bidirectional(RNN):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            return self.rnn(x, state)

    layer = Bidirectional(nn.GRU, bidirectional=True, dtype=torch.float64)
    with pytest.raises(LayerContractError, match="looks ahead"):
        check(layer, example())


def test_memory_outside_the_state() -> None:
    count = itertools.count()
    with pytest.raises(LayerContractError, match=r"differs between two runs .*keeps something between calls"):
        check(Broken(lambda x, state: (running(x, state) + next(count), last(x, state))), example())


def test_write_into_the_input_behind_torchs_back() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
            y = x * 2
            x.data.zero_()
            return y, y[:, -1]

    with pytest.raises(LayerContractError, match="wrote into its input behind torch's back"):
        check([Decay(dtype=torch.float64), Writes()], example())


def test_dropout_is_refused_and_passes_in_evaluation_mode() -> None:
    layer = Cell(dropout=0.5, dtype=torch.float64)
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=r"draws random numbers .*call layer.eval\(\) first"):
        check(layer, example())
    assert torch.equal(torch.get_rng_state(), before)
    check(layer.eval(), example())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((1, 4, WIDTH), torch.nan)}, r"x holds nan at \(0, 0, 0\)"),
        ({"x": torch.zeros(1, 1, WIDTH)}, "x has 1 token, which cannot be cut"),
        ({"x": torch.zeros(1, 0, WIDTH)}, "x has 0 tokens along axis 1"),
        ({"segments": (4, 4)}, r"segments=\(4, 4\): give two or more positive lengths that sum to 9"),
        ({"segments": (9,)}, "give two or more positive lengths"),
        ({"segments": 9}, "segments=9: give fewer tokens"),
        ({"mask": torch.zeros(1, 8)}, "mask has 8 tokens along axis 1 but x has 9"),
    ],
)
def test_examples_that_cannot_work(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": example(dtype=torch.float32), **change}
    with pytest.raises(InputError, match=message):
        check(Cell(), **arguments)


def test_wrong_number_of_states() -> None:
    with pytest.raises(StateError, match="1 states, but there are 2 layers"):
        check([Cell(), Cell()], example(), [None])


def test_own_tolerances() -> None:
    drift = Broken(lambda x, state: (running(x, state) + 1e-6 * x.shape[1], last(x, state)))
    with pytest.raises(LayerContractError, match="the output differs"):
        check(drift, example())
    assert check(drift, example(), rtol=1e-3).rtol == 1e-3
    assert check(drift, example(), atol=1e-4).atol == 1e-4


def test_stateless_layer_that_mixes_tokens() -> None:
    check(stateless(Mlp().double()), example())
    with pytest.raises(LayerContractError, match="the output differs"):
        check(stateless(lambda x: x.cumsum(1)), example())


@pytest.mark.gpu
def test_cuda() -> None:
    layers = [layer.cuda() for layer in make_stack(("lstm", "mamba2"), dtype=torch.float32)]
    check(layers, example(dtype=torch.float32).cuda())
