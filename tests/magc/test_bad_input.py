"""Input that cannot work is refused by message, before any layer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import GridCheckpoint, Plan, grid_checkpoint, stateless
from magc.errors import InputError, LayerContractError, PlanError, StateError, StoreError
from tests.magc.layers import RNN, WIDTH, Cell


class Untouched(nn.Module):
    """Fails the test if it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, state: Any = None, **side: Tensor) -> Any:
        raise AssertionError("work started")


def head(y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("work started")


X = torch.ones(2, 6, WIDTH)
NAN = X.clone()
NAN[1, 3, 2] = torch.nan
INF = torch.zeros(2, WIDTH)
INF[0, 1] = -torch.inf


class Source:
    """Yields segments of a tensor, one token short if asked to."""

    def __init__(self, value: Tensor, short: int = 0) -> None:
        self.value, self.short = value, short

    def __len__(self) -> int:
        return self.value.shape[1]

    def segment(self, start: int, stop: int) -> Tensor:
        return self.value[:, start : stop - self.short]


CALLS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no sequence axis": (
        InputError,
        r"x has shape \(6,\), which has no axis 1; the sequence axis is seq_dim=1",
        {"x": X[0, :, 0]},
    ),
    "no sequence axis in a part": (InputError, r"x\['b'\] has shape \(2,\)", {"x": {"a": X, "b": X[:, 0, 0]}}),
    "empty sequence": (InputError, r"x has 0 tokens along axis 1; a sequence needs at least one", {"x": X[:, :0]}),
    "no tensor": (InputError, "x holds no tensor", {"x": ()}),
    "not a tensor": (InputError, r"x holds a int \(3\); every leaf must be a tensor or None", {"x": (X, 3)}),
    "ragged x": (
        InputError,
        r"ragged lengths along axis 1 \(x\[0\]: 6, x\[1\]: 5\); pad to one length",
        {"x": (X, X[:, 1:])},
    ),
    "side input too short": (InputError, "mask has 5 tokens along axis 1 but x has 6", {"mask": X[:, 1:]}),
    "side input needs a gradient": (
        InputError,
        "mask requires a gradient, but none flows to side inputs and targets",
        {"mask": X.clone().requires_grad_()},
    ),
    "side input is a number": (InputError, r"mask holds a float \(0.5\)", {"mask": 0.5}),
    "x on another device": (
        InputError,
        r"x is \(2, 6, 4\) float32 on meta but the layers are on cpu; move one to the other",
        {"x": X.to("meta")},
    ),
    "too few states": (StateError, "the initial state is 1 states, but there are 2 layers", {"state": [None]}),
    "one state for all": (StateError, "the initial state is a Tensor, but there are 2 layers", {"state": X[:, 0]}),
    "state on another device": (
        StateError,
        r"the initial state\['h'\] of layer 0 \(Untouched\) is \(2, 4\) float32 on meta but the layers are on cpu",
        {"state": [{"h": X[:, 0].to("meta")}, None]},
    ),
    "state is a number": (
        InputError,
        r"the initial state of layer 1 \(Untouched\) holds a float \(0.0\)",
        {"state": [None, 0.0]},
    ),
    "NaN in x": (InputError, r"x holds nan at \(1, 3, 2\) \(1 values of 48 are not finite\)", {"x": NAN}),
    "infinity in a state": (
        InputError,
        r"the initial state of layer 1 holds -inf at \(0, 1\)",
        {"state": [None, INF]},
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_calls(name: str, grad: bool) -> None:
    error, message, arguments = CALLS[name]
    grid = GridCheckpoint([Untouched(), Untouched()], Plan(tokens=2), check_finite=True)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        grid(**{"x": X, **arguments})


LOSSES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "ragged targets": (
        InputError,
        "targets has 5 tokens along axis 1 but x has 6",
        {"targets": torch.zeros(2, 5, dtype=torch.int64)},
    ),
    "no targets": (InputError, "a head and targets go together: give both, or neither", {"targets": None}),
    "no head": (InputError, "a head and targets go together", {"head": None}),
    "unknown reduction": (InputError, "reduction='none': give 'mean' or 'sum'", {"reduction": "none"}),
    "targets need a gradient": (
        InputError,
        "targets requires a gradient",
        {"targets": torch.zeros(2, 6, requires_grad=True)},
    ),
    "empty inputs of a stem": (
        InputError,
        "inputs has 0 tokens along axis 1",
        {"inputs": torch.zeros(2, 0, dtype=torch.int64), "stem": nn.Embedding(3, WIDTH)},
    ),
    "head is no callable": (
        LayerContractError,
        "head is a str, which cannot be called; give an nn.Module",
        {"head": "ce"},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    error, message, arguments = LOSSES[name]
    targets = torch.zeros(2, 6, dtype=torch.int64)
    grid = GridCheckpoint([Untouched()], Plan(tokens=2))
    with pytest.raises(error, match=message):
        grid.loss(**{"inputs": X, "targets": targets, "head": head, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y, t: y.sum(), r"head \(function\) returned \(\) float32 on cpu, but a head returns \(summed loss"),
        (lambda y, t: (y, 3), r"returned tuple, but a head returns"),
        (lambda y, t: (3.0, 3), r"returned tuple, but a head returns"),
        (lambda y, t: None, r"returned NoneType, but a head returns"),
    ],
)
def test_heads_that_return_something_else(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GridCheckpoint([Cell()], Plan(tokens=2)).loss(X, X, head=make)


def test_no_target_counted() -> None:
    grid = GridCheckpoint([Cell()], Plan(tokens=2))
    with pytest.raises(InputError, match=r"the head counted no target in the whole sequence, .*reduction='sum'"):
        grid.loss(X, X, head=lambda y, t: (y.sum() * 0, 0))
    assert grid.loss(X, X, head=lambda y, t: (y.sum() * 0, 0), reduction="sum") == 0


CONSTRUCTIONS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "neither plan nor budget": (PlanError, "give either a plan, or a budget such as budget='24GiB'", {}),
    "both": (PlanError, "give either a plan, or a budget", {"plan": Plan(), "budget": "1GiB"}),
    "budget without a unit": (PlanError, "'24G'", {"budget": "24G"}),
    "plan by name": (PlanError, r"plan='sqrt' is a str; give a magc\.Plan, or a rule", {"plan": "sqrt"}),
    "integer sums": (
        InputError,
        r"accumulate=torch.int32: give a floating-point dtype",
        {"plan": Plan(), "accumulate": torch.int32},
    ),
    "no layers": (
        LayerContractError,
        "a stack needs at least one layer, got an empty list",
        {"layers": [], "plan": Plan()},
    ),
    "a function": (
        LayerContractError,
        r"layer 1 is a function, but GridCheckpoint holds nn\.Modules; .*use magc\.grid_checkpoint",
        {"layers": [Cell(), lambda x, state: (x, x)], "plan": Plan()},
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_constructions(name: str) -> None:
    error, message, arguments = CONSTRUCTIONS[name]
    with pytest.raises(error, match=message):
        GridCheckpoint(**{"layers": [Cell()], **arguments})


FUNCTIONAL: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no layers": (LayerContractError, "at least one layer", {"layers": []}),
    "no callable": (LayerContractError, "layer 0 is a int, which cannot be called", {"layers": [3]}),
    "sizes of tokens": (
        PlanError,
        r"sizes \(2, 3\) of the plan's tokens sum to 5, but there are 6 tokens",
        {"plan": Plan(tokens=(2, 3))},
    ),
    "sizes of layers": (
        PlanError,
        r"sizes \(1, 1\) of the plan's layers sum to 2, but there are 1",
        {"plan": Plan(layers=(1, 1))},
    ),
    "rule without a plan": (
        PlanError,
        r"the plan rule .* returned a NoneType; it must return a magc\.Plan",
        {"plan": lambda n, s: None},
    ),
    "plan by name": (PlanError, "plan='sqrt' is a str", {"plan": "sqrt"}),
    "negative sequence axis": (InputError, "seq_dim=-2: count the sequence axis from the front", {"seq_dim": -2}),
    "disk folder missing": (
        StoreError,
        "disk_dir '/no/such/folder' is no existing directory",
        {"disk_dir": "/no/such/folder"},
    ),
    "integer sums": (InputError, "accumulate=torch.int64", {"accumulate": torch.int64}),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_form(name: str) -> None:
    error, message, arguments = FUNCTIONAL[name]
    with pytest.raises(error, match=message):
        grid_checkpoint(**{"layers": [Untouched()], "x": X, "plan": Plan(tokens=2), **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, r"Plan\(layers=0\): give a positive int, a tuple of positive ints, or None"),
        ({"layers": 2.0}, r"Plan\(layers=2.0\)"),
        ({"layers": True}, r"Plan\(layers=True\)"),
        ({"tokens": ()}, r"Plan\(tokens=\(\)\)"),
        ({"tokens": (3, 0)}, r"Plan\(tokens=\(3, 0\)\)"),
        ({"tokens": [3, 3]}, r"Plan\(tokens=\[3, 3\]\)"),
        ({"tokens": "3"}, r"Plan\(tokens='3'\)"),
        ({"borders": "gpu"}, r"Plan\(borders='gpu'\): give one of \['device', 'host', 'disk', 'rebuild'\]"),
        ({"states": "rebuild"}, r"Plan\(states='rebuild'\): give one of \['device', 'host', 'disk'\]"),
        ({"keep": 0}, r"Plan\(keep=0\): keep at least 1 trailing cell, or 'all'"),
        ({"keep": "none"}, r"Plan\(keep='none'\)"),
        ({"snapshots": -1}, r"Plan\(snapshots=-1\): give 0 or more, or None for every boundary"),
        ({"snapshots": "all"}, r"Plan\(snapshots='all'\)"),
    ],
)
def test_plan_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(**fields)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"h": torch.zeros(1, WIDTH), "count": torch.tensor(0)}, r"was given state\['h'\] as \(1, 4\) float32"),
        ({"h": torch.zeros(2, WIDTH).double(), "count": torch.tensor(0)}, r"Float|dtype"),
        (
            {"h": torch.zeros(2, WIDTH), "count": torch.tensor(0), "more": torch.zeros(1)},
            r"was given a state of structure",
        ),
    ],
)
def test_states_unlike_those_of_the_layer(state: Any, message: str) -> None:
    kept = {name: leaf.clone() for name, leaf in state.items()}
    with pytest.raises((LayerContractError, RuntimeError), match=message):
        grid_checkpoint([Cell()], X, [state], plan=Plan(tokens=2))
    assert all(torch.equal(state[name], leaf) for name, leaf in kept.items())


def test_layers_on_the_meta_device() -> None:
    with pytest.raises(InputError, match="cannot store checkpoints of device 'meta': use a CPU or CUDA device"):
        grid_checkpoint([Cell().to("meta")], X.to("meta"), plan=Plan(tokens=2))


def test_sources_that_give_other_tokens_than_asked_for() -> None:
    with pytest.raises(InputError, match=r"x\.segment\(0, 4\) gave \(2, 3, 4\) .*not 4 tokens along axis 1"):
        grid_checkpoint([Untouched()], Source(X, short=1), plan=Plan(tokens=4))
    with pytest.raises(InputError, match=r"x\.segment\(0, 4\) gave a tensor that requires a gradient"):
        grid_checkpoint([stateless(nn.Linear(WIDTH, 1))], Source(X.clone().requires_grad_()), plan=Plan(tokens=4))
    with pytest.raises(InputError, match="x has 0 tokens"):
        grid_checkpoint([Untouched()], Source(X[:, :0]), plan=Plan(tokens=4))


def test_errors_of_a_layer_name_it() -> None:
    with pytest.raises(RuntimeError, match=r"input\.size") as caught:
        grid_checkpoint([Cell(), RNN(nn.GRU, WIDTH + 1)], X, plan=Plan(tokens=2))
    assert caught.value.__notes__ == ["raised while magc ran layer 1 (RNN)"]


def test_disk_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="is no existing directory"):
        GridCheckpoint([Untouched()], Plan(tokens=2), disk_dir=str(file))(X)


@pytest.mark.gpu
def test_tensors_on_two_devices() -> None:
    with pytest.raises(InputError, match=r"x is .* on cpu but the layers are on cuda:0"):
        grid_checkpoint([Untouched().cuda()], X, plan=Plan(tokens=2))
    with pytest.raises(StateError, match=r"the initial state of layer 0 .* on cpu but the layers are on cuda:0"):
        grid_checkpoint([Untouched().cuda()], X.cuda(), [X[:, 0]], plan=Plan(tokens=2))
