"""Layers made of torch.nn's recurrent modules against the modules themselves, in float64."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc.errors import InputError, LayerContractError, StateError
from magc.integrations.torch_rnn import RNNLayer, RNNState, from_torch_state, split_rnn, to_torch_state

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BATCH, TOKENS, FEATURES, HIDDEN, LAYERS = 3, 7, 5, 6, 3
MODULES: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm-proj": (nn.LSTM, {"proj_size": 4}),
    "lstm-no-bias": (nn.LSTM, {"bias": False}),
    "lstm-proj-no-bias": (nn.LSTM, {"proj_size": 4, "bias": False}),
    "gru": (nn.GRU, {}),
    "gru-no-bias": (nn.GRU, {"bias": False}),
    "rnn-tanh": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
}
SEGMENTATIONS = [(7,), (3, 4), (1, 5, 1), (1,) * 7]


def make(name: str, **options: Any) -> nn.RNNBase:
    kind, own = MODULES[name]
    torch.manual_seed(0)
    return kind(FEATURES, HIDDEN, LAYERS, dtype=torch.float64, **{"batch_first": True, **own, **options})


def make_input(module: nn.RNNBase) -> Tensor:
    shape = (BATCH, TOKENS, FEATURES) if module.batch_first else (TOKENS, BATCH, FEATURES)
    return torch.randn(shape, dtype=torch.float64)


def make_state(module: nn.RNNBase) -> Tensor | tuple[Tensor, Tensor]:
    h = torch.randn(LAYERS, BATCH, module.proj_size or HIDDEN, dtype=torch.float64)
    return (h, torch.randn(LAYERS, BATCH, HIDDEN, dtype=torch.float64)) if module.mode == "LSTM" else h


def tensors(state: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    return () if state is None else state if isinstance(state, tuple) else (state,)


def run_segments(
    layers: list[RNNLayer], x: Tensor, states: list[RNNState] | list[None], lengths: tuple[int, ...]
) -> tuple[Tensor, list[RNNState | None]]:
    """Segment by segment, and in each layer by layer."""
    held: list[RNNState | None] = list(states)
    outputs = list[Tensor]()
    for segment in torch.split(x, list(lengths), dim=layers[0].seq_dim):
        for index, layer in enumerate(layers):
            segment, held[index] = layer(segment, held[index])
        outputs.append(segment)
    return torch.cat(outputs, dim=layers[0].seq_dim), held


def gradients(module: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss that weighs every output differently."""
    torch.manual_seed(2)
    # Not randn_like: it fills memory in the order of strides, which differ.
    losses = [(output * torch.randn(output.shape, dtype=output.dtype)).sum() for output in outputs]
    loss = torch.stack(losses).sum()
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


@pytest.mark.parametrize("lengths", SEGMENTATIONS, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "h0"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["BTD", "TBD"])
@pytest.mark.parametrize("name", MODULES)
def test_any_segmentation_equals_the_module(
    name: str, batch_first: bool, with_state: bool, lengths: tuple[int, ...]
) -> None:
    module = make(name, batch_first=batch_first)
    x = make_input(module).requires_grad_()
    h0 = make_state(module) if with_state else None
    for tensor in tensors(h0):
        tensor.requires_grad_()
    inputs = [x, *tensors(h0)]

    y_ref, h_ref = module(x, h0)
    expected = [y_ref, *tensors(h_ref)]
    y, states = run_segments(split_rnn(module), x, from_torch_state(module, h0), lengths)
    got = [y, *tensors(to_torch_state([state for state in states if state is not None]))]

    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        if len(lengths) == 1:
            assert torch.equal(a, b)
    for a, b in zip(gradients(module, inputs, got), gradients(module, inputs, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False], ids=["BTD", "TBD"])
@pytest.mark.parametrize("name", ["lstm", "lstm-proj", "gru", "rnn-tanh"])
def test_dropout_draws_the_masks_of_the_module(name: str, batch_first: bool) -> None:
    module = make(name, batch_first=batch_first, dropout=0.4)
    layers = split_rnn(module)
    x = make_input(module).requires_grad_()
    torch.manual_seed(1)
    y_ref, h_ref = module(x)
    torch.manual_seed(1)
    y, states = run_segments(layers, x, [None] * LAYERS, (TOKENS,))
    assert torch.equal(y, y_ref)
    for a, b in zip(gradients(module, [x], [y]), gradients(module, [x], [y_ref]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # States are those before dropout, as in torch.nn.
    for a, b in zip(tensors(to_torch_state([s for s in states if s is not None])), tensors(h_ref), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_reproducible_over_segments_and_only_in_training() -> None:
    module = make("lstm", dropout=0.5)
    layers = split_rnn(module)
    assert [layer.dropout for layer in layers] == [0.5, 0.5, 0.0]
    x = make_input(module)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run_segments(layers, x, [None] * LAYERS, (3, 4))[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    nn.ModuleList(layers).eval()
    assert torch.equal(run(1), run(2))
    assert torch.equal(run(1), run_segments(split_rnn(make("lstm").eval()), x, [None] * LAYERS, (3, 4))[0])
    assert not split_rnn(module.eval())[0].training


def test_parameters_are_the_modules_own() -> None:
    module = make("lstm-proj")
    layers = nn.ModuleList(split_rnn(module))
    assert {id(p) for p in layers.parameters()} == {id(p) for p in module.parameters()}
    assert len(list(layers.parameters())) == len(list(module.parameters()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = make_input(module)
    y, _ = run_segments(list(layers), x, [None] * LAYERS, (TOKENS,))  # pyright: ignore[reportArgumentType]
    y.sum().backward()
    optimizer.step()
    stepped, _ = run_segments(list(layers), x, [None] * LAYERS, (TOKENS,))  # pyright: ignore[reportArgumentType]
    assert not torch.equal(stepped, y)
    assert torch.equal(stepped, module(x)[0])
    module.load_state_dict(make("lstm-proj").state_dict())
    assert torch.equal(run_segments(list(layers), x, [None] * LAYERS, (TOKENS,))[0], y)  # pyright: ignore


def test_parameters_are_read_at_each_call() -> None:
    """A grid engine collects gradients on detached parameters put in the place of the module's own."""
    module = make("gru")
    layer = split_rnn(module)[1]
    x = torch.randn(BATCH, TOKENS, HIDDEN, dtype=torch.float64)
    own = dict(layer.named_parameters())
    stand_ins = {name: nn.Parameter(parameter.detach()) for name, parameter in own.items()}
    for name, stand_in in stand_ins.items():
        layer._parameters[name] = stand_in
    layer(x)[0].sum().backward()
    layer._parameters.update(own)
    assert all(parameter.grad is None for parameter in module.parameters())
    collected = {name: stand_in.grad for name, stand_in in stand_ins.items()}
    layer(x)[0].sum().backward()
    for name, parameter in own.items():
        assert torch.equal(collected[name], parameter.grad)  # pyright: ignore[reportArgumentType]


def test_states_are_new_values_of_their_own_size() -> None:
    for name in MODULES:
        module = make(name)
        x, h0 = make_input(module), make_state(module)
        for layer, state in zip(split_rnn(module), from_torch_state(module, h0), strict=True):
            before = [tensor.clone() for tensor in tensors(state)]
            x, new_state = layer(x, state)
            for tensor, old, copy in zip(tensors(new_state), tensors(state), before, strict=True):
                assert torch.equal(old, copy)
                assert tensor.shape == old.shape
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
                assert old.untyped_storage().nbytes() == old.nbytes
                assert tensor.data_ptr() != old.data_ptr()


def test_state_conversions_are_inverse() -> None:
    for name in ("lstm-proj", "gru"):
        module = make(name)
        h0 = make_state(module)
        states = from_torch_state(module, h0)
        back = to_torch_state([state for state in states if state is not None])
        assert all(torch.equal(a, b) for a, b in zip(tensors(back), tensors(h0), strict=True))
    assert from_torch_state(make("gru"), None) == [None] * LAYERS


def test_layers_pickle_and_print() -> None:
    layer = split_rnn(make("lstm-proj-no-bias", dropout=0.1))[1]
    assert repr(layer) == "RNNLayer(LSTM, 4, 6, proj_size=4, dropout=0.1, batch_first=True, bias=False)"
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    copy = pickle.loads(pickle.dumps(layer)).eval()
    assert torch.equal(copy(x)[0], layer.eval()(x)[0])


# ---------------------------------------------------------------------- what is refused


def test_refuses_modules_whose_layers_would_differ() -> None:
    with pytest.raises(LayerContractError, match=r"bidirectional: its outputs depend on later tokens.*flipped"):
        split_rnn(nn.LSTM(2, 3, bidirectional=True))
    with pytest.raises(InputError, match=r"nn\.LSTM, nn\.GRU or nn\.RNN, got Linear"):
        split_rnn(nn.Linear(2, 3))

    class Own(nn.GRU):
        def forward(self, input: Tensor) -> Tensor:
            return input

    with pytest.raises(LayerContractError, match="Own has a forward of its own"):
        split_rnn(Own(2, 3))
    hooked = nn.GRU(2, 3)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(LayerContractError, match="has hooks"):
        split_rnn(hooked)
    normed = nn.utils.parametrizations.weight_norm(nn.GRU(2, 3), "weight_hh_l0")
    with pytest.raises(LayerContractError, match="weight_hh_l0 instead of holding it as a parameter"):
        split_rnn(normed)


def test_refuses_bad_inputs_and_states() -> None:
    lstm, gru = split_rnn(nn.LSTM(2, 3, batch_first=True))[0], split_rnn(nn.GRU(2, 3))[0]
    x = torch.randn(4, 5, 2)
    with pytest.raises(InputError, match=r"\(5, 2\) is not batched; .* \(batch, tokens, features\)"):
        lstm(x[0])
    with pytest.raises(InputError, match=r"\(tokens, batch, features\) with 2 features .* got \(4, 5, 1\)"):
        gru(x[..., :1])
    with pytest.raises(InputError, match="some token"):
        lstm(x[:, :0])
    with pytest.raises(InputError, match="PackedSequence"):
        lstm(nn.utils.rnn.pack_sequence([x[0]]))
    with pytest.raises(InputError, match="must be a tensor, got list"):
        lstm([x])
    for layer, state in (
        (lstm, torch.zeros(4, 3)),
        (lstm, (torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))),
        (lstm, (torch.zeros(5, 3), torch.zeros(5, 3))),
        (gru, (torch.zeros(5, 3), torch.zeros(5, 3))),
        (gru, torch.zeros(4, 3)),
    ):
        with pytest.raises(StateError, match=r"must have the shapes \[\(.*from_torch_state"):
            layer(x, state)
    with pytest.raises(StateError, match=r"is a pair \(h0, c0\), got Tensor"):
        from_torch_state(nn.LSTM(2, 3), torch.zeros(1, 4, 3))
    with pytest.raises(StateError, match="is one tensor h0, got tuple"):
        from_torch_state(nn.GRU(2, 3), (torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)))
    with pytest.raises(StateError, match=r"must be \(2, batch, hidden\), got \(1, 4, 3\)"):
        from_torch_state(nn.GRU(2, 3, 2), torch.zeros(1, 4, 3))


# ---------------------------------------------------------------------- cuDNN


DTYPES = (torch.float32, torch.float16, torch.float64, torch.bfloat16)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_cudnn_runs_without_a_warning_and_equals_the_module(
    name: str, layers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    kind, options = MODULES[name]
    torch.manual_seed(0)
    module = kind(16, 32, layers, batch_first=True, device="cuda", dtype=dtype, **options)
    x = torch.randn(4, 20, 16, device="cuda", dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = run_segments(split_rnn(module), x, [None] * layers, (7, 7, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn warns for bfloat16 itself
        y_ref, _ = module(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(y, y_ref, rtol=0, atol=tolerance)
    got = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    expected = torch.autograd.grad(y_ref.square().sum(), [x, *module.parameters()])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * max(1.0, b.norm().item())


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_longer_than_cudnn_takes(name: str, batch: int) -> None:
    module = MODULES[name][0](4, 8, 1, batch_first=True, device="cuda")
    x = torch.randn(batch, 70_000, 4, device="cuda", requires_grad=True)
    whole, parts = (run_segments(split_rnn(module), x, [None], cut) for cut in ((70_000,), (1 << 15, 1 << 15, 4464)))
    assert torch.equal(whole[0], parts[0])
    grads = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y, _ in (whole, parts)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_cuda_runs_without_a_warning(dtype: torch.dtype) -> None:
    module = nn.LSTM(16, 32, 3, batch_first=True, device="cuda")
    x = torch.randn(4, 20, 16, device="cuda")
    with warnings.catch_warnings(), torch.autocast("cuda", dtype):
        warnings.simplefilter("error")
        y, _ = run_segments(split_rnn(module), x, [None] * 3, (7, 13))
        y_ref, _ = module(x)
    assert y.dtype == y_ref.dtype
    torch.testing.assert_close(y, y_ref, rtol=0, atol=3e-2)
