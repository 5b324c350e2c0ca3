"""How a grid behaves as a part of autograd: in-place layers, shared weights, hooks, second backwards, errors, leaks."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import GridCheckpoint, Plan, grid_checkpoint, is_recomputing, stateless
from magc.errors import DoubleBackwardError, LayerContractError, RecomputeError, StoreError
from tests.magc.layers import (
    RNN,
    WIDTH,
    Cell,
    Decay,
    Mlp,
    assert_same_bits,
    assert_same_gradients,
    floating,
    gradients,
    make_stack,
    objective,
    parameters,
    plain,
)

PLANS = [Plan(), Plan(layers=1, tokens=3), Plan(tokens=3, snapshots=0), Plan(layers=2, tokens=4, borders="rebuild")]


def example(tokens: int = 8, *, needs_grad: bool = False) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=needs_grad)


# ---------------------------------------------------------------------- writing in place
class MayWrite(nn.Module):
    """Computes the same with and without writing in place."""

    in_place = True


class AddsToInput(MayWrite):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.add_(1.0) if self.in_place else x + 1.0
        y = (x * self.weight).tanh()
        return y, y[:, -1]


class Relu(MayWrite):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(x) if self.in_place else torch.relu(x)


class WritesIntoOutput(MayWrite):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, first = self.linear(x), 1.0 if state is None else state
        if self.in_place:
            y[:, 0] += first
            return y.mul_(2.0), y[:, -1]
        y = torch.cat([y[:, :1] + (first if state is None else state.unsqueeze(1)), y[:, 1:]], 1) * 2.0
        return y, y[:, -1]


class PassesThrough(MayWrite):
    """Hands its input on as its output; its state is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.sum(1) * self.weight + (0.0 if state is None else state)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_writing_in_place_harms_no_checkpoint(plan: Plan, needs_grad: bool) -> None:
    torch.manual_seed(0)
    linear = stateless(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
    layers = [PassesThrough(), AddsToInput(), linear, stateless(Relu()), WritesIntoOutput(), AddsToInput()]
    x = example(needs_grad=needs_grad)
    kept = x.detach().clone()
    wanted = [*([x] if needs_grad else []), *parameters(layers)]
    grid = GridCheckpoint(layers, plan)

    def write(in_place: bool) -> None:
        for module in grid.modules():
            if isinstance(module, MayWrite):
                module.in_place = in_place

    write(False)
    expected_y, expected_states = plain(layers, x, bounds=list(plan.grid(6, 8).tokens.all_bounds()))
    expected = gradients(objective(expected_y, expected_states), wanted)
    write(True)
    for _ in range(2):  # once learning what writes, once knowing it
        y, states = grid(x)
        assert_same_bits((y, list(states)), (expected_y, expected_states))
        assert_same_gradients(gradients(objective(y, states), wanted), expected)
        assert torch.equal(x, kept)
    with torch.no_grad():
        assert_same_bits(grid(x)[0], expected_y)
    assert torch.equal(x, kept)


def test_what_is_learnt_of_one_grouping_does_not_hold_for_another() -> None:
    def rule(n_layers: int, tokens: int) -> Plan:
        return Plan(layers=1 if tokens == 8 else 2)

    grid = GridCheckpoint([PassesThrough(), AddsToInput()], rule)
    grid(example())
    x = example(7)
    kept = x.clone()
    grid(x)
    assert torch.equal(x, kept)


def test_a_layer_that_starts_to_write_is_refused() -> None:
    class Sometimes(nn.Module):
        writes = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2.0) if self.writes else x * 2.0

    layer = Sometimes()
    grid = GridCheckpoint([stateless(layer)], Plan())
    grid(example())
    layer.writes = True
    with pytest.raises(LayerContractError, match="wrote into its input although it did not when it was first run"):
        grid(example())


def test_a_layer_that_reuses_its_output_buffer_is_refused() -> None:
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
            self.out: list[Tensor] = []

        def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if not self.out:
                self.out = [torch.empty_like(x)]
            with torch.no_grad():
                y = self.out[0].copy_(x)
            return y, y[:, -1].clone()

    y, _ = grid_checkpoint([Reuses(), Cell(dtype=torch.float64)], example(), plan=Plan(layers=1, tokens=4))
    with pytest.raises(StoreError, match=r"modified in place while it was held by reference: a layer keeps"):
        y.sum().backward()


def test_results_share_no_memory_with_inputs_or_checkpoints() -> None:
    class KeepsInput(nn.Module):
        """One token is its own state; the other state passes through."""

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            return x, (x if x.shape[1] == 1 else x[:, -1:], x.new_ones(2) if state is None else state[1])

    layers = [Cell(dtype=torch.float64), KeepsInput(), stateless(nn.Identity()), KeepsInput()]
    x = example(3, needs_grad=True)
    states = [None, (torch.zeros(2, 1, WIDTH).double(), torch.zeros(2).double()), (), None]
    for plan in (Plan(layers=1, tokens=1), Plan(layers=2), Plan()):
        expected = gradients(objective(*plain(layers, x, states)), [x])
        y, final = grid_checkpoint(layers, x, states, plan=plan)
        loss = objective(y.clone(), [leaf.clone() for leaf in floating(final)])
        with torch.no_grad():
            for leaf in (final[1][0], final[1][1], final[3][0], final[3][1]):
                leaf.zero_()
        assert torch.equal(states[1][1], torch.zeros(2))
        assert_same_gradients(gradients(loss, [x]), expected)
    y, final = grid_checkpoint([KeepsInput()], x[:, :1].detach(), plan=Plan())
    assert y.data_ptr() != x.data_ptr() != final[0][0].data_ptr()


def test_given_states_are_never_modified() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, state.add_(1.0)

    for needs_grad in (True, False):
        state = torch.zeros(2, requires_grad=needs_grad)
        with pytest.raises(LayerContractError, match="wrote into the state it was given"):
            grid_checkpoint([Writes()], torch.zeros(2, 4, 1), [state], plan=Plan(tokens=2))
        assert torch.equal(state, torch.zeros(2))


# ---------------------------------------------------------------------- parameters
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_same_layer_twice(plan: Plan) -> None:
    torch.manual_seed(0)
    cell, rnn = Cell(dtype=torch.float64), RNN(nn.LSTM, dtype=torch.float64)
    layers = [cell, rnn, cell, rnn, cell]
    before = [*cell.parameters(), *rnn.parameters()]
    x = example()
    expected = gradients(objective(*plain(layers, x)), before)
    y, states = grid_checkpoint(layers, x, plan=plan)
    objective(y, states).backward()
    after = [*cell.parameters(), *rnn.parameters()]
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert all(flat is own for flat, own in zip(rnn.rnn._flat_weights, rnn.parameters(), strict=True))
    assert_same_gradients([parameter.grad for parameter in before], expected)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_shared_and_reused_parameters(plan: Plan) -> None:
    class Twice(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.one, self.other = weight, weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.one) @ self.other

    torch.manual_seed(0)
    cells = [Cell(dtype=torch.float64) for _ in range(3)]
    cells[2].outer.weight = cells[0].inner.weight
    layers = [cells[0], stateless(Twice(cells[1].inner.weight)), cells[1], cells[2]]
    x = example(needs_grad=True)
    wanted = [x, *parameters(layers)]
    expected = gradients(objective(*plain(layers, x)), wanted)
    assert_same_gradients(gradients(objective(*grid_checkpoint(layers, x, plan=plan)), wanted), expected)


def test_parametrized_weights() -> None:
    torch.manual_seed(0)
    layers = [Cell(dtype=torch.float64), Cell(dtype=torch.float64)]
    nn.utils.parametrizations.weight_norm(layers[0].inner)
    nn.utils.parametrizations.orthogonal(layers[1].outer)
    x = example()
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    y, states = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=3))
    assert_same_gradients(gradients(objective(y, states), parameters(layers)), expected)


def test_unused_parameters_get_no_gradient() -> None:
    layer = Cell(dtype=torch.float64)
    layer.unused = nn.Parameter(torch.ones(3))
    y, _ = grid_checkpoint([layer], example(), plan=Plan(tokens=3))
    y.sum().backward()
    assert layer.unused.grad is None
    assert layer.inner.weight.grad is not None


def test_sparse_gradients() -> None:
    ids = torch.randint(0, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    grads: list[Tensor] = []
    for plan in (Plan(), Plan(layers=1, tokens=3)):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, WIDTH, sparse=True, dtype=torch.float64)
        y, _ = grid_checkpoint([stateless(embedding), Cell(dtype=torch.float64)], ids, plan=plan)
        objective(y).backward()
        assert embedding.weight.grad.is_sparse
        grads.append(embedding.weight.grad.to_dense())
    assert_same_gradients(grads[1:], grads[:1])


def test_gradients_accumulate_over_calls() -> None:
    layers = make_stack(("cell", "lstm"))
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=3))
    one, other = example(), example(5) + 1
    grid(one)[0].sum().backward()
    grid(other)[0].sum().backward()
    expected = gradients(plain(layers, one)[0].sum() + plain(layers, other)[0].sum(), parameters(layers))
    assert_same_gradients([parameter.grad for parameter in grid.parameters()], expected)


def test_two_calls_before_their_backwards() -> None:
    layers = make_stack(("cell", "gru"))
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=3))
    x = example(needs_grad=True)
    y, states = grid(x)
    z, final = grid(y, states)
    wanted = [x, *parameters(layers)]
    y0, states0 = plain(layers, x)
    assert_same_gradients(
        gradients(objective(z, final), wanted), gradients(objective(*plain(layers, y0, states0)), wanted)
    )


def test_a_grid_inside_a_grid() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid = GridCheckpoint(make_stack(("cell", "lstm")), Plan(layers=1, tokens=2))

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            return self.grid(x, state)

    torch.manual_seed(0)
    layers = [Inner(), Cell(dtype=torch.float64), Inner()]
    x = example(needs_grad=True)
    wanted = [x, *parameters(layers)]
    expected = gradients(objective(*plain(layers, x)), wanted)
    y, states = grid_checkpoint(layers, x, plan=Plan(layers=2, tokens=3))
    assert_same_gradients(gradients(objective(y, states), wanted), expected)


def test_a_layer_that_differentiates_inside_itself() -> None:
    class Descends(nn.Module):
        """Its state is a weight that each segment's tokens move by gradient descent."""

        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.full((), 0.1, dtype=torch.float64))

        def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            weight = torch.eye(WIDTH, dtype=x.dtype) if state is None else state
            outputs: list[Tensor] = []
            for step in x.unbind(1):
                moved = torch.func.grad(lambda w, step=step: ((step @ w - step.roll(1, -1)) ** 2).sum())(weight)
                weight = weight - self.rate * moved
                outputs.append(step @ weight)
            return torch.stack(outputs, 1), weight

    torch.manual_seed(0)
    layers = [Cell(dtype=torch.float64), Descends()]
    x = example(6)
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    for plan in (Plan(tokens=2), Plan(layers=1, tokens=2, borders="rebuild", snapshots=0)):
        y, states = grid_checkpoint(layers, x, plan=plan)
        assert_same_gradients(gradients(objective(y, states), parameters(layers)), expected)


def test_parameter_hooks_fire_once_with_the_whole_gradient() -> None:
    layers = make_stack(("cell", "lstm"))
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=1))
    expected = gradients(objective(*plain(layers, example())), [layers[0].inner.weight])
    seen: dict[str, list[Tensor]] = {"hook": [], "after": []}
    weight = layers[0].inner.weight
    weight.register_hook(lambda grad: seen["hook"].append(grad.clone()))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen["after"].append(parameter.grad.clone()))
    y, states = grid(example())
    objective(y, states).backward()
    assert_same_gradients(seen["hook"], expected)
    assert_same_gradients(seen["after"], expected)


def test_module_hooks_and_is_recomputing() -> None:
    layers = make_stack(("cell", "cell"))
    seen: list[tuple[int, bool]] = []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, inputs, index=index: seen.append((index, is_recomputing())))
        layer.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
    x = example()
    y, states = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=4))
    assert seen == [(0, False), (1, False)] * 2
    seen.clear()
    grads = gradients(objective(y, states), parameters(layers))
    assert seen == [(0, True), (1, True), (0, True)]
    assert not is_recomputing()
    assert_same_gradients(grads, gradients(objective(*plain(layers, x)), parameters(layers)))


# ---------------------------------------------------------------------- backward once more, or not at all
@pytest.mark.parametrize("plan", [*PLANS, Plan(layers=1, tokens=3, borders="disk", keep=3)], ids=str)
def test_retain_graph(plan: Plan) -> None:
    layers = make_stack(("cell", "dropout", "mamba2"), dropout=0.4)
    x = example(needs_grad=True)
    y, states = grid_checkpoint(layers, x, plan=plan)
    wanted = [x, *parameters(layers)]
    loss = objective(y, states)
    first = gradients(loss, wanted, retain_graph=True)
    rng = torch.get_rng_state()
    second = gradients(loss, wanted, retain_graph=True)
    assert torch.equal(torch.get_rng_state(), rng)
    last = gradients(loss, wanted)
    assert_same_bits(second, first)
    assert_same_bits(last, first)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, wanted)


def test_second_backward_raises_torchs_error() -> None:
    y, _ = grid_checkpoint(make_stack(("cell",)), example(), plan=Plan(tokens=3))
    loss = y.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"Trying to backward through the graph a second time"):
        loss.backward()


def test_create_graph_is_refused() -> None:
    y, _ = grid_checkpoint(make_stack(("cell",)), example(), plan=Plan(tokens=3))
    with pytest.raises(DoubleBackwardError, match=r"gradients of gradients \(create_graph=True\) do not exist"):
        y.sum().backward(create_graph=True)


def test_backward_under_no_grad_and_for_some_inputs_only() -> None:
    layers = make_stack(("cell", "gru"))
    x = example(needs_grad=True)
    expected = gradients(objective(*plain(layers, x)), [x])
    y, states = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=3))
    loss = objective(y, states)
    with torch.no_grad():
        actual = gradients(loss, [x], retain_graph=True)
    assert_same_gradients(actual, expected)
    loss.backward(inputs=[x])
    assert_same_gradients([x.grad], expected)
    assert all(parameter.grad is None for parameter in parameters(layers))


@pytest.mark.parametrize("what", ["parameter", "x", "state"])
def test_modified_tensor_raises_torchs_error(what: str) -> None:
    layers = make_stack(("cell", "gru"))
    x = example()
    states: list[Any] = [{"h": torch.zeros(2, WIDTH).double(), "count": torch.tensor(1)}, None]
    y, _ = grid_checkpoint(layers, x, states, plan=Plan(layers=1, tokens=3))
    with torch.no_grad():
        {"parameter": layers[0].inner.weight, "x": x, "state": states[0]["h"]}[what].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("what", ["frozen parameter", "buffer", "side input"])
def test_modified_tensor_that_autograd_does_not_save(what: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
            self.frozen = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64), requires_grad=False)
            self.register_buffer("scale", torch.ones(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor, state: Any = None, *, mask: Tensor) -> tuple[Tensor, Tensor]:
            y = x * self.weight * self.frozen * self.scale * mask
            return y, y[:, -1]

    layer, mask = Scaled(), torch.ones(2, 8, 1, dtype=torch.float64)
    y, _ = grid_checkpoint([layer], example(), plan=Plan(tokens=3), mask=mask)
    with torch.no_grad():
        {"frozen parameter": layer.frozen, "buffer": layer.scale, "side input": mask}[what].mul_(2.0)
    message = {"frozen parameter": "'frozen' of layer 0", "buffer": "'scale' of layer 0", "side input": "mask"}[what]
    with pytest.raises(RecomputeError, match=rf"{message}.* was modified in place after the forward"):
        y.sum().backward()


def test_switched_mode_is_refused() -> None:
    layers = make_stack(("cell", "dropout"), dropout=0.5)
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=3))
    y, _ = grid(example())
    grid.eval()
    with pytest.raises(RecomputeError, match=r"switched between train\(\) and eval\(\) after the forward"):
        y.sum().backward(retain_graph=True)
    grid.train()
    y.sum().backward()
    assert layers[0].inner.weight.grad is not None


# ---------------------------------------------------------------------- leaks and errors
@pytest.mark.parametrize("borders", ["device", "disk", "rebuild"])
def test_a_forward_without_backward_leaves_nothing(borders: Any, tmp_path: Path) -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Watches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell(dtype=torch.float64)

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            y, state = self.cell(x, state)
            kept.append(weakref.ref(y.untyped_storage()))
            return y, state

    plan = Plan(layers=1, tokens=2, borders=borders, states="disk", keep=3)
    y, states = grid_checkpoint([Watches(), Watches(), Watches()], example(), plan=plan, disk_dir=str(tmp_path))
    assert list(tmp_path.iterdir())
    del y, states
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert len(kept) == 12
    assert all(reference() is None for reference in kept)


def test_nothing_is_left_after_a_backward(tmp_path: Path) -> None:
    plan = Plan(layers=1, tokens=2, borders="disk", states="disk")
    y, states = grid_checkpoint(make_stack(("cell", "lstm")), example(), plan=plan, disk_dir=str(tmp_path))
    assert list(tmp_path.iterdir())
    objective(y, states).backward()
    assert not list(tmp_path.iterdir())


class Fails(nn.Module):
    """Raises at one of its calls."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.cell, self.calls, self.when = Cell(dtype=torch.float64), 0, when

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.calls += 1
        if self.calls == self.when:
            raise ValueError("out of luck")
        return self.cell(x, state)


@pytest.mark.parametrize("when", [1, 3, 5, 6])
def test_an_error_inside_a_layer(when: int, tmp_path: Path) -> None:
    layers = [Cell(dtype=torch.float64), Fails(when), Cell(dtype=torch.float64)]
    before = parameters(layers)
    grid = GridCheckpoint(layers, Plan(layers=1, tokens=2, borders="disk", states="disk"), disk_dir=str(tmp_path))

    def step() -> None:
        y, states = grid(example())
        assert when > 4
        objective(y, states).backward()

    with pytest.raises(ValueError, match="out of luck") as caught:
        step()
    assert caught.value.__notes__ == ["raised while magc ran layer 1 (Fails)"]
    assert not list(tmp_path.iterdir())
    assert not is_recomputing()
    assert all(new is old for new, old in zip(parameters(layers), before, strict=True))
    y, states = grid(example())
    assert_same_gradients(
        gradients(objective(y, states), before), gradients(objective(*plain(layers, example())), before)
    )


def test_a_compiled_layer() -> None:
    torch.manual_seed(0)
    layers = [Decay(dtype=torch.float64), stateless(Mlp().double())]
    compiled = [torch.compile(layer, backend="eager") for layer in layers]
    x = example()
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    y, states = grid_checkpoint(compiled, x, plan=Plan(layers=1, tokens=4))
    assert_same_gradients(gradients(objective(y, states), parameters(layers)), expected)
