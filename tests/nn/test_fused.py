"""Layers of `magc.nn` as one Triton operator: which run so, and that it changes nothing but memory and speed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magc
from magc import Plan
from magc.errors import InputError, StateError
from magc.nn import Mamba2, Mamba2Block, Mamba2State
from magc.nn.fused import runs_fused
from tests.kernels.compare import assert_close, packed_ids, randn
from tests.kernels.triton_device import DEVICE, triton_test
from tests.nn.helpers import perturbed

SIZES: dict[str, Any] = {"d_model": 16, "d_state": 16, "headdim": 16, "ngroups": 1, "chunk_size": 16}
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with triton_test(small_tiles=True):
        yield


def make(cls: Callable[..., Any] = Mamba2Block, **changes: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(cls(**{**SIZES, **changes}, impl="triton", dtype=torch.float32)).to(DEVICE)


def as_reference(module: Any) -> Any:
    """The same in float64 on plain PyTorch."""
    plain = copy.deepcopy(module).double()
    for part in plain.modules():
        if hasattr(part, "impl"):
            part.impl = "reference"
    return plain


def segment(seed: int, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    return randn(seed, batch, length, SIZES["d_model"]).to(DEVICE, dtype)


def gradients(module: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    weights = [randn(50 + i, *x.shape).to(x.device, x.dtype) for i, x in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, list(module.parameters()), weights)
    return {name: grad.cpu() for (name, _), grad in zip(module.named_parameters(), grads, strict=True)}


@pytest.mark.parametrize("packed", [False, True])
def test_block_equals_the_reference_over_segments(packed: bool) -> None:
    block = make()
    plain = as_reference(block)
    results: dict[str, list[Tensor]] = {}
    for name, layer, dtype in (("triton", block, torch.float32), ("reference", plain, torch.float64)):
        state, collected = None, []
        for start, length in ((0, 16), (16, 9), (25, 1), (26, 4)):
            hidden, residual = (
                segment(seed, 2, 30, dtype).requires_grad_()[:, start : start + length] for seed in (0, 1)
            )
            ids = packed_ids(3, 2, 30, mean=7.0).to(DEVICE)[:, start : start + length] if packed else None
            (y, total), state = layer((hidden, residual), state, seq_idx=ids)
            collected += [y, total]
        results[name] = [*collected, state.conv, state.ssm]
    for actual, expected in zip(results["triton"], results["reference"], strict=True):
        assert_close(actual, expected, TOLERANCE)
    truth = gradients(plain, results["reference"])
    for name, grad in gradients(block, results["triton"]).items():
        assert_close(grad, truth[name], 10 * TOLERANCE, name)


def test_grid_of_blocks_equals_the_reference_without_one() -> None:
    torch.manual_seed(1)
    blocks = nn.ModuleList([make(), make(ngroups=2, rmsnorm=False)])
    plain = as_reference(blocks)
    x = segment(0, 1, 40, torch.float32)
    grid = magc.GridCheckpoint(list(blocks), Plan(layers=1, tokens=16))
    y, states = grid(x)
    out: Any = x.double()
    expected_states = []
    for layer in plain:
        out, state = layer(out)
        expected_states += [state.conv, state.ssm]
    flat = [*y, *(leaf for state in states for leaf in (state.conv, state.ssm))]
    expected = [*out, *expected_states]
    for actual, value in zip(flat, expected, strict=True):
        assert_close(actual, value, TOLERANCE)
    truth = gradients(plain, expected)
    for name, grad in gradients(blocks, flat).items():
        assert_close(grad, truth[name], 10 * TOLERANCE, name)


def test_recomputed_cells_skip_their_last_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from magc_kernels.mamba2 import autograd

    seen: list[bool] = []
    original = autograd.recompute

    def watch(inputs: Any, **options: Any) -> Any:
        if options.get("keep") is not None:
            seen.append(options["output"])
        return original(inputs, **options)

    monkeypatch.setattr(autograd, "recompute", watch)
    grid = magc.GridCheckpoint([make(), make()], Plan(layers=2, tokens=8))
    (hidden, residual), _ = grid(segment(0, 1, 16, torch.float32))
    seen.clear()
    (hidden.sum() + residual.sum()).backward()
    # The second segment's cell was recorded in the forward; the first one's output left it then.
    assert seen == [True, False]


class Around(nn.Module):
    """A layer of somebody else's whose gradients need what the Mamba-2 layer inside returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.inner(x, state)
        return x + y.sigmoid(), state


def test_a_layer_inside_another_never_skips_its_output() -> None:
    layers = nn.ModuleList([Around(make(Mamba2)), Around(make(Mamba2))])
    plain = as_reference(layers)
    x = segment(0, 1, 24, torch.float32)
    y, _ = magc.GridCheckpoint(list(layers), Plan(layers=1, tokens=8))(x)
    out = x.double()
    for layer in plain:
        out, _ = layer(out)
    truth = gradients(plain, [out])
    for name, grad in gradients(layers, [y]).items():
        assert_close(grad, truth[name], 10 * TOLERANCE, name)


def test_a_hook_on_a_part_keeps_the_parts_apart_and_runs() -> None:
    block = make()
    x = segment(0, 1, 16, torch.float32)
    whole, _ = block(x)
    assert runs_fused(block.mixer, x, block.norm)
    calls: list[str] = []
    for name in ("norm", "mixer.in_proj", "mixer.out_proj", "mixer.norm"):
        handle = block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        parts, _ = block(x)
        handle.remove()
        for a, b in zip(parts, whole, strict=True):
            assert_close(a, b, 1e-5)
    assert calls == ["norm", "mixer.in_proj", "mixer.out_proj", "mixer.norm"]


def test_a_replaced_projection_is_used() -> None:
    layer = make(Mamba2)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = segment(0, 1, 16, torch.float32)
    before, _ = layer(x)
    other = Doubled(layer.d_inner, layer.d_model, bias=False, device=DEVICE)
    other.weight = layer.out_proj.weight
    layer.out_proj = other
    after, _ = layer(x)
    assert_close(after, 2 * before, 1e-5)


def test_one_token_takes_the_recurrent_step() -> None:
    layer = make(Mamba2)
    assert not runs_fused(layer, segment(0, 1, 1, torch.float32))
    y, state = layer(segment(0, 1, 1, torch.float32))
    expected, expected_state = as_reference(layer)(segment(0, 1, 1, torch.float64))
    assert_close(y, expected, TOLERANCE)
    assert_close(state.ssm, expected_state.ssm, TOLERANCE)


def test_bad_states_and_inputs_are_refused_as_by_the_reference() -> None:
    layer = make(Mamba2)
    x = segment(0, 2, 16, torch.float32)
    state = layer.initial_state(2)
    with pytest.raises(InputError, match="d_model=16"):
        layer(x[..., 1:])
    with pytest.raises(StateError, match=r"state\.ssm"):
        layer(x, Mamba2State(state.conv, state.ssm[:1]))
    with pytest.raises(StateError, match="seq_idx"):
        layer(x, state, seq_idx=torch.zeros(2, 16, dtype=torch.int32, device=DEVICE))


def test_an_unknown_keep_is_refused() -> None:
    with pytest.raises(InputError, match="keep='all' is not one of 'projection', 'states', 'outputs'"):
        Mamba2(64, keep="all")  # pyright: ignore[reportArgumentType]
