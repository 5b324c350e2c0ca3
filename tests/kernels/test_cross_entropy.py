"""Projection and cross entropy in one operator, against PyTorch's own in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from magc_kernels.cross_entropy import autograd, reference
from tests.kernels.compare import assert_close, randn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.2, "z_loss": 0.1},
    {"l2_warp": torch.tensor(0.3, dtype=torch.float64)},
    {"label_smoothing": 0.2, "z_loss": 0.1, "l2_warp": torch.tensor(0.3)},
]


def problem(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Leaves and targets of 2 x 9 rows, a vocabulary of 23; some targets are ignored."""
    leaves = {"x": randn(0, 2, 9, 12), "weight": randn(1, 23, 12), "bias": randn(2, 23)}
    moved = {name: value.to(device, dtype).requires_grad_() for name, value in leaves.items()}
    targets = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0))
    targets[0, 3:5] = -100
    return moved, targets.to(device)


def gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(3.0 * total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_is_pytorchs_cross_entropy_and_the_z_loss(options: dict[str, Any]) -> None:
    leaves, targets = problem()
    total, count = reference.linear_cross_entropy(leaves["x"], leaves["weight"], targets, leaves["bias"], **options)
    logits = functional.linear(leaves["x"], leaves["weight"], leaves["bias"])
    expected = functional.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        reduction="sum",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    expected = expected + options.get("z_loss", 0.0) * logits.logsumexp(-1)[targets != -100].square().sum()
    assert_close(total, expected, 1e-13)
    assert int(count) == 16


def test_the_warp_changes_gradients_as_squares_would_and_not_the_sum() -> None:
    leaves, targets = problem()
    arguments = (leaves["x"], leaves["weight"], targets, leaves["bias"])
    strength = torch.tensor(0.3, dtype=torch.float64)
    total, _ = autograd.linear_cross_entropy(*arguments, l2_warp=strength)
    plain, _ = reference.linear_cross_entropy(*arguments)
    assert_close(total, plain, 1e-13)
    assert torch.equal(reference.linear_cross_entropy(*arguments, l2_warp=strength)[0], plain)
    logits = functional.linear(leaves["x"], leaves["weight"], leaves["bias"])
    truth = gradients(plain + 0.5 * strength * logits.amax(-1).square().sum(), leaves)
    for name, grad in gradients(total, leaves).items():
        assert_close(grad, truth[name], 1e-13, name)


@pytest.mark.parametrize("operator", [autograd.linear_cross_entropy, reference.linear_cross_entropy])
def test_of_equal_greatest_logits_the_first_is_warped(operator: Any) -> None:
    x = torch.eye(2, dtype=torch.float64)[None].requires_grad_()
    weight = torch.tensor([[1.0, -2], [3, -1], [3, -1], [2, -1]], dtype=torch.float64)
    strength = torch.tensor(0.5, dtype=torch.float64)
    targets = torch.full((1, 2), -100)  # neither row counts
    total, count = operator(x, weight, targets, torch.zeros(4, dtype=torch.float64), l2_warp=strength)
    assert (float(total.detach()), int(count)) == (0.0, 0)
    (dx,) = torch.autograd.grad(total, x)
    assert_close(dx, 0.5 * torch.stack([3 * weight[1], -weight[1]])[None], 1e-15)


@pytest.mark.parametrize("block", [23, 5 * 23, 1 << 20])
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradients_equal_the_reference_whatever_the_block(
    options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "BLOCK_ELEMENTS", block)
    leaves, targets = problem()
    arguments = (leaves["x"], leaves["weight"], targets, leaves["bias"])
    expected, expected_count = reference.linear_cross_entropy(*arguments, **options)
    total, count = autograd.linear_cross_entropy(*arguments, **options)
    assert_close(total, expected, 1e-13)
    assert int(count) == int(expected_count)
    truth = gradients(expected, leaves)
    for name, grad in gradients(total, leaves).items():
        assert_close(grad, truth[name], 1e-13, name)
    with torch.no_grad():
        assert torch.equal(autograd.linear_cross_entropy(*arguments, **options)[0], total)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [None, 0.3])
def test_low_precision_is_as_good_as_the_references(dtype: torch.dtype, device: str, strength: float | None) -> None:
    exact, targets = problem()
    leaves, moved = problem(dtype, device)
    arguments = (leaves["x"], leaves["weight"], moved, leaves["bias"])
    options: Any = {} if strength is None else {"l2_warp": torch.tensor(strength, dtype=torch.float64, device=device)}
    cpu: Any = {name: value.cpu() for name, value in options.items()}
    truth_total, _ = reference.linear_cross_entropy(exact["x"], exact["weight"], targets, exact["bias"], **cpu)
    truth = gradients(truth_total, exact)
    plain = gradients(reference.linear_cross_entropy(*arguments, **options)[0], leaves)
    total, _ = autograd.linear_cross_entropy(*arguments, **options)
    assert total.dtype == torch.float32
    for name, grad in gradients(total, leaves).items():
        error, bound = ((g.cpu().double() - truth[name]).norm() for g in (grad, plain[name]))
        assert float(error) <= 1.3 * float(bound) + 1e-6, name


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_the_weights_gradient_goes_into_its_float32_sum(device: str) -> None:
    class Summed(torch.nn.Parameter):
        total: Tensor

        def grad_sum(self) -> Tensor:
            return self.total

    leaves, targets = problem(torch.float32, device)
    weight = Summed(leaves["weight"].detach())
    weight.total = torch.ones_like(weight.detach())
    with torch.autocast(device, dtype=torch.bfloat16):
        total, _ = autograd.linear_cross_entropy(leaves["x"], weight, targets)
        expected, _ = reference.linear_cross_entropy(leaves["x"], leaves["weight"], targets)
    assert_close(total, expected, 1e-6)
    total.backward()
    grad = torch.autograd.grad(expected, leaves["weight"])[0]
    assert weight.grad is None
    assert_close(weight.total - 1, grad, 2e-2)
    assert leaves["x"].grad is not None
    assert leaves["x"].grad.dtype == torch.float32


def test_rows_without_a_target_get_no_gradient_and_none_at_all_is_zero() -> None:
    leaves, targets = problem()
    total, _ = autograd.linear_cross_entropy(leaves["x"], leaves["weight"], targets)
    (dx,) = torch.autograd.grad(total, leaves["x"])
    assert not dx[0, 3:5].any()
    assert dx[0, 0].any()
    total, count = autograd.linear_cross_entropy(leaves["x"], leaves["weight"], torch.full_like(targets, -100))
    assert (float(total.detach()), int(count)) == (0.0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(23, 11)}, ValueError, "weight must be"),
        ({"targets": torch.zeros(2, 8, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"targets": torch.zeros(2, 9)}, TypeError, "targets must be integers"),
        ({"bias": torch.zeros(22)}, ValueError, "bias must have shape"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be"),
        ({"l2_warp": torch.ones(2)}, ValueError, "l2_warp must be a scalar"),
        ({"l2_warp": torch.tensor(1.0, requires_grad=True)}, ValueError, "detach"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    leaves, targets = problem()
    arguments: dict[str, Any] = {**leaves, "targets": targets, **change}
    with pytest.raises(error, match=message):
        autograd.linear_cross_entropy(**arguments)


def test_gradients_of_gradients_are_refused() -> None:
    leaves, targets = problem()
    total, _ = autograd.linear_cross_entropy(leaves["x"], leaves["weight"], targets)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(total, leaves["x"], create_graph=True)
