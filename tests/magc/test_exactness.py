"""The numbers of a grid are those of plain autograd over the whole sequence, whatever the plan."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from magc import GridCheckpoint, Plan, Tier, grid_checkpoint, stateless
from tests.magc.layers import (
    WIDTH,
    Cell,
    Merge,
    Mlp,
    assert_same_bits,
    assert_same_gradients,
    floating,
    gradients,
    make_stack,
    objective,
    parameters,
    plain,
    segment_bounds,
)
from tests.magc.strategies import Case, cases


def make_states(layers: list[nn.Module], batch: int) -> list[Any]:
    """Final states of another sequence, as leaves that need gradients."""
    _, states = plain(layers, torch.randn(batch, 2, WIDTH, dtype=torch.float64))
    return pytree.tree_map_only(
        Tensor, lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()), states
    )


def used(case_uses: str, y: Any, states: Any) -> Tensor:
    return objective(*([] if case_uses == "states" else [y]), *([] if case_uses == "output" else [states]))


@given(cases())
@settings(max_examples=120)
def test_gradients_are_those_of_the_whole_sequence(case: Case) -> None:
    torch.manual_seed(case.seed)
    layers = make_stack(case.kinds)
    for layer in layers[: case.frozen]:
        layer.requires_grad_(False)
    x = torch.randn(case.batch, case.tokens, WIDTH, dtype=torch.float64, requires_grad=case.x_needs_grad)
    states = make_states(layers, case.batch) if case.with_state else None
    wanted = [*([x] if case.x_needs_grad else []), *floating(states), *parameters(layers)]
    whole, whole_states = plain(layers, x, states)
    loss = used(case.uses, whole, whole_states)
    y_loop, states_loop = plain(layers, x, states, segment_bounds(case.plan, layers, case.tokens))

    y, final = grid_checkpoint(layers, x, states, plan=case.plan)

    assert_same_bits(y, y_loop)
    assert_same_bits(final, states_loop)
    if loss.requires_grad:
        assert_same_gradients(gradients(used(case.uses, y, final), wanted), gradients(loss, wanted))
    else:
        assert not used(case.uses, y, final).requires_grad or case.uses == "states"


MIXED = ("cell", "mamba2", "mamba2", "lstm", "mlp", "gru")


@pytest.mark.parametrize("borders", [*Tier, "rebuild"])
@pytest.mark.parametrize(("states", "snapshots"), [(Tier.DEVICE, None), (Tier.DISK, 1), (Tier.HOST, 0)])
@pytest.mark.parametrize("frozen", [0, 3])
def test_every_tier_with_a_mixed_stack(borders: Any, states: Tier, snapshots: int | None, frozen: int) -> None:
    torch.manual_seed(0)
    layers = make_stack(MIXED)
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    wanted = parameters(layers)
    expected = gradients(objective(*plain(layers, x)), wanted)
    for keep in (1, 4, 9):
        plan = Plan(layers=2, tokens=3, borders=borders, states=states, keep=keep, snapshots=snapshots)
        assert_same_gradients(gradients(objective(*grid_checkpoint(layers, x, plan=plan)), wanted), expected)


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_all_small_grids_with_frozen_layers(frozen: int) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Cell(dtype=torch.float64) for _ in range(3)]
    layers.insert(1, stateless(Mlp().double()))
    layers += [Cell(dtype=torch.float64)]
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    states: list[Any] = [None] * 5
    states[0 if frozen < 5 else 4] = {
        "h": torch.randn(1, WIDTH, dtype=torch.float64, requires_grad=frozen != 2),
        "count": torch.tensor(3),
    }
    wanted = [*parameters(layers), *(leaf for leaf in floating(states) if leaf.requires_grad)]
    expected = gradients(objective(*plain(layers, x, states)), wanted)
    for group, tokens, borders, keep, snapshots in itertools.product(
        (1, 2, 4), (1, 2, 6), ("device", "rebuild"), (1, 4, "all"), (None, 0, 1)
    ):
        plan = Plan(layers=group, tokens=tokens, borders=borders, keep=keep, snapshots=snapshots)
        actual = gradients(objective(*grid_checkpoint(layers, x, states, plan=plan)), wanted)
        assert_same_gradients(actual, expected)


class Parametrized(nn.Module):
    """A cell whose recurrent weight is part of its state, so that gradcheck can vary a parameter as an input."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, weight = state
        outputs: list[Tensor] = []
        for step in x.unbind(1):
            h = torch.tanh(step + h @ weight)
            outputs.append(h)
        return torch.stack(outputs, 1), (h, weight)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    layers = [*make_stack(("cell", "mamba2")), stateless(Merge()), Parametrized(), *make_stack(("lstm",))]
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    states: list[Any] = [None] * 5
    h, weight = torch.randn(1, WIDTH, dtype=torch.float64), torch.randn(WIDTH, WIDTH, dtype=torch.float64)

    def function(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        plan = Plan(layers=2, tokens=2, snapshots=0)
        return tuple(floating(grid_checkpoint(layers, x, [*states[:3], (h, weight), None], plan=plan)))

    assert torch.autograd.gradcheck(function, (x, h.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("plan", [Plan(), Plan(layers=1, tokens=1), Plan(tokens=100), Plan(layers=9, tokens=(1,))])
def test_one_token(plan: Plan) -> None:
    torch.manual_seed(0)
    layers = make_stack(("cell", "lstm"))
    x = torch.randn(2, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters(layers)]
    expected = gradients(objective(*plain(layers, x)), wanted)
    assert_same_gradients(gradients(objective(*grid_checkpoint(layers, x, plan=plan)), wanted), expected)


def test_only_the_initial_state_needs_a_gradient() -> None:
    torch.manual_seed(0)
    layers = make_stack(("cell", "gru", "lstm"))
    for layer in layers:
        layer.requires_grad_(False)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    states = make_states(layers, 2)
    states[0]["h"].requires_grad_(False)
    states[2][1].requires_grad_(False)
    wanted = [leaf for leaf in floating(states) if leaf.requires_grad]
    assert len(wanted) == 2
    expected = gradients(objective(*plain(layers, x, states)), wanted)
    for group, borders in itertools.product((1, 2, 3), ("device", "disk", "rebuild")):
        y, final = grid_checkpoint(layers, x, states, plan=Plan(layers=group, tokens=2, borders=borders))
        assert_same_gradients(gradients(objective(y, final), wanted), expected)


def test_nothing_needs_a_gradient() -> None:
    layers = make_stack(("cell", "lstm"))
    for layer in layers:
        layer.requires_grad_(False)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    y, final = grid_checkpoint(layers, x, plan=Plan(layers=1, tokens=2))
    assert not y.requires_grad
    assert not any(leaf.requires_grad for leaf in floating(final))
    expected = plain(layers, x, bounds=[(0, 2), (2, 4), (4, 5)])
    assert_same_bits((y, list(final)), expected)


@pytest.mark.parametrize("kinds", [("lstm", "lstm"), ("gru", "cell"), ("mamba2", "mamba2"), ("mlp", "cell", "mlp")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_outputs_have_the_bits_of_a_plain_loop(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = make_stack(kinds, dtype=dtype)
    x = torch.randn(2, 37, WIDTH, dtype=dtype)
    for plan in (Plan(layers=1, tokens=10), Plan(tokens=8), Plan(layers=1, tokens=37, borders="disk")):
        expected = plain(layers, x, bounds=segment_bounds(plan, layers, 37))
        y, final = grid_checkpoint(layers, x, plan=plan)
        assert_same_bits((y, list(final)), expected)
        wanted = parameters(layers)
        single = dtype == torch.float32
        assert_same_gradients(
            gradients(objective(y, final), wanted),
            gradients(objective(*expected), wanted),
            tolerance=2e-6 if single else 5e-2,
            floor=1e-6 if single else 1e-2,
        )


def test_module_form_equals_functional_form() -> None:
    torch.manual_seed(0)
    layers = make_stack(("cell", "mamba2"))
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    plan = Plan(layers=1, tokens=4)
    grid = GridCheckpoint(layers, plan)
    y, final = grid(x)
    assert_same_bits((y, final), grid_checkpoint(layers, x, plan=plan))
    objective(y, final).backward()
    expected = gradients(objective(*plain(layers, x)), parameters(layers))
    assert_same_gradients([parameter.grad for parameter in grid.parameters()], expected)


def test_plan_rule_sees_layers_and_tokens() -> None:
    seen: list[tuple[int, int]] = []

    def rule(n_layers: int, tokens: int) -> Plan:
        seen.append((n_layers, tokens))
        return Plan(layers=1, tokens=tokens // 2)

    grid_checkpoint(make_stack(("cell", "cell", "gru")), torch.randn(1, 8, WIDTH, dtype=torch.float64), plan=rule)
    assert seen == [(3, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("cell", "lstm", "gru"), ("mamba2", "mamba2", "mlp", "lstm")])
@pytest.mark.parametrize(
    ("borders", "states"), [("host", "host"), ("disk", "disk"), ("rebuild", "host"), ("device", "disk")]
)
@pytest.mark.parametrize("snapshots", [None, 1])
def test_cuda(kinds: tuple[str, ...], borders: Any, states: Any, snapshots: int | None) -> None:
    torch.manual_seed(0)
    layers = [layer.cuda() for layer in make_stack(kinds)]
    x = torch.randn(3, 29, WIDTH, dtype=torch.float64, device="cuda", requires_grad=True)
    plan = Plan(layers=2, tokens=5, borders=borders, states=states, snapshots=snapshots, keep=2)
    y, final = grid_checkpoint(layers, x, plan=plan)
    assert_same_bits((y, list(final)), plain(layers, x, bounds=segment_bounds(plan, layers, 29)))
    wanted = [x, *parameters(layers)]
    assert_same_gradients(gradients(objective(y, final), wanted), gradients(objective(*plain(layers, x)), wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
# torch does not flatten the weights of RNNs in bfloat16 and warns when they run, with magc or without.
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
def test_cudnn_outputs_have_the_bits_of_a_plain_loop(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [layer.cuda() for layer in make_stack((kind, kind), dtype=dtype)]
    x = torch.randn(4, 65, WIDTH, dtype=dtype, device="cuda")
    plan = Plan(layers=1, tokens=16, borders="host", states="host")
    y, final = grid_checkpoint(layers, x, plan=plan)
    expected = plain(layers, x, bounds=segment_bounds(plan, layers, 65))
    assert_same_bits((y, list(final)), expected)
    wanted = parameters(layers)
    assert_same_gradients(
        gradients(objective(y, final), wanted),
        gradients(objective(*expected), wanted),
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        floor=1e-6,
    )
