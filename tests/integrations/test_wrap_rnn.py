"""``torch.nn.LSTM``, ``GRU`` and ``RNN`` wrapped: the same outputs, states and gradients as torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import Plan
from magc.errors import InputError, LayerContractError
from magc.integrations.wrap import unwrap, wrap, wrapped

PLAN = Plan(layers=(2, 1), tokens=(1, 5, 4))
KINDS: dict[str, Any] = {
    "LSTM": lambda: nn.LSTM(4, 6, num_layers=3, batch_first=True),
    "LSTM with projection": lambda: nn.LSTM(4, 6, num_layers=3, batch_first=True, proj_size=3),
    "GRU, sequence first": lambda: nn.GRU(4, 6, num_layers=3),
    "RNN without bias": lambda: nn.RNN(4, 6, num_layers=3, batch_first=True, bias=False, nonlinearity="relu"),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]().double()


def inputs(module: Any) -> Tensor:
    x = torch.randn(2, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (x if module.batch_first else x.transpose(0, 1).contiguous()).requires_grad_()


def state_for(module: Any) -> Any:
    h = torch.randn(3, 2, module.proj_size or 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if module.mode != "LSTM":
        return h.requires_grad_()
    c = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return h.requires_grad_(), c.requires_grad_()


def tensors(result: Any) -> list[Tensor]:
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


@all_kinds
@pytest.mark.parametrize("given", [False, True])
def test_outputs_states_and_gradients(kind: str, given: bool) -> None:
    module = make(kind)
    results: list[list[Tensor]] = []
    for each in (module, wrap(copy.deepcopy(module), plan=PLAN)):
        x, state = inputs(each), state_for(each) if given else None
        out = tensors(each(x, state) if given else each(x))
        leaves = [x, *each.parameters(), *(() if state is None else state if isinstance(state, tuple) else (state,))]
        results.append([*out, *torch.autograd.grad(sum(t.square().sum() for t in out), leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_evaluation_runs_torchs_own_code() -> None:
    module = make("LSTM")
    x = inputs(module)
    expected = module(x)[0]
    wrap(module, plan=PLAN)
    with torch.no_grad():
        assert torch.equal(module(x)[0], expected)
    assert wrapped(module).plan is None


@pytest.mark.parametrize("kind", ["LSTM", "GRU, sequence first"])
@pytest.mark.parametrize("given", [False, True])
def test_one_sequence_without_a_batch_axis(kind: str, given: bool) -> None:
    module = make(kind)
    batched = inputs(module)
    x = batched[0] if module.batch_first else batched[:, 0]
    state: Any = None
    if given:
        h = torch.randn(module.num_layers, 6, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        state = (h, 0.5 * h) if module.mode == "LSTM" else h
    plain = copy.deepcopy(module)
    wrap(module, plan=PLAN)
    for expected, actual in zip(tensors(plain(x, state)), tensors(module(x, state)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert wrapped(module).plan == PLAN


def test_parameters_that_are_handed_in_are_refused() -> None:
    module = wrap(make("LSTM"), plan=PLAN)
    handed = {name: parameter.detach() for name, parameter in module.named_parameters()}
    with pytest.raises(LayerContractError, match=r"weight_ih_l0 of this LSTM is no parameter any more"):
        torch.func.functional_call(module, handed, (inputs(module),))


def test_replaced_parameters_are_followed() -> None:
    module = wrap(make("GRU, sequence first"), plan=PLAN)
    module.load_state_dict({name: 0.5 * value for name, value in module.state_dict().items()}, assign=True)
    plain = unwrap(copy.deepcopy(module))
    x = inputs(module)
    torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=1e-11, atol=1e-11)
    module(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_part_of_a_larger_model() -> None:
    model = nn.ModuleDict({"rnn": make("LSTM"), "head": nn.Linear(6, 1).double()})
    wrap(model["rnn"], plan=PLAN)
    model["head"](model["rnn"](inputs(model["rnn"]))[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert wrapped(model["rnn"]).plan == PLAN


def test_wrapping_again() -> None:
    module = wrap(wrap(make("LSTM"), plan=PLAN), plan=Plan(tokens=3))
    module(inputs(module))
    assert wrapped(module).plan == Plan(tokens=3)


def test_bidirectional_is_refused() -> None:
    with pytest.raises(LayerContractError, match=r"is not causal: .* bidirectional=True.* depend on later tokens"):
        wrap(nn.LSTM(4, 6, bidirectional=True), plan=PLAN)


def test_a_packed_sequence_is_refused() -> None:
    module = wrap(make("LSTM"), plan=PLAN)
    packed = nn.utils.rnn.pack_padded_sequence(inputs(module), torch.tensor([10, 7]), batch_first=True)
    with pytest.raises(InputError, match="pad_packed_sequence"):
        module(packed)
