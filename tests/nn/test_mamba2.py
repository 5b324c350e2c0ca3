"""The Mamba-2 layer: segmentation, state, names, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from magc.errors import InputError, StateError
from magc.nn import Mamba2, Mamba2Block, Mamba2State
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, splits
from tests.nn.helpers import SMALL, in_segments, perturbed, small_mamba2

VARIANTS: list[dict[str, Any]] = [
    {},
    {"D_has_hdim": True, "bias": True, "conv_bias": False, "d_conv": 2},
    {"rmsnorm": False, "ngroups": 1, "dt_limit": (0.01, 0.5)},
    {"norm_before_gate": True, "d_ssm": 8, "d_conv": 3},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), length=st.integers(2, 13), mean=st.sampled_from([1.01, 3.0]))
def test_any_segmentation_equals_the_whole(
    variant: dict[str, Any], packed: bool, seed: int, length: int, mean: float
) -> None:
    layer = small_mamba2(**variant)
    x = randn(seed, 2, length, 8).requires_grad_()
    zero = layer.initial_state(2, packed=packed)
    conv, ssm = randn(1, *zero.conv.shape).requires_grad_(), randn(2, *zero.ssm.shape).requires_grad_()
    state = Mamba2State(conv, ssm, zero.seq_idx)
    seq_idx = packed_ids(seed, 2, length) if packed else None
    inputs = {"x": x, "conv": conv, "ssm": ssm, **dict(layer.named_parameters())}

    y, last = layer(x, state, seq_idx=seq_idx)
    outputs, last_of_parts = in_segments(layer, x, splits(seed, length, mean), state, seq_idx)
    whole, parts = [y, last.conv, last.ssm], [torch.cat(outputs, 1), last_of_parts.conv, last_of_parts.ssm]
    for a, e in zip(parts, whole, strict=True):
        assert_close(a, e, 1e-12)
    truth = gradients(whole, inputs)
    for name, gradient in gradients(parts, inputs).items():
        assert_close(gradient, truth[name], 1e-10, name)
    assert (last.seq_idx is None) == (not packed)
    if seq_idx is not None:
        assert torch.equal(last.seq_idx, seq_idx[:, -1])
        assert torch.equal(last_of_parts.seq_idx, seq_idx[:, -1])


def test_packed_documents_equal_separate_ones() -> None:
    layer = small_mamba2()
    x = randn(0, 1, 11, 8)
    seq_idx = torch.tensor([[5] * 4 + [2] + [5] * 6])
    y, state = layer(x, seq_idx=seq_idx)
    parts = [layer(part) for part in x.split([4, 1, 6], dim=1)]
    assert_close(y, torch.cat([part[0] for part in parts], 1), 1e-13)
    assert_close(state.ssm, parts[-1][1].ssm, 1e-13)
    assert_close(state.conv, parts[-1][1].conv, 1e-13)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_zero_state_is_the_same_as_none(packed: bool, length: int) -> None:
    layer = small_mamba2()
    x = randn(0, 2, length, 8)
    seq_idx = packed_ids(1, 2, length) + 3 if packed else None
    zero = layer.initial_state(2, packed=packed)
    a, b = layer(x, zero, seq_idx=seq_idx), layer(x, None, seq_idx=seq_idx)
    assert torch.equal(a[0], b[0])
    assert pytree.tree_structure(a[1]) == pytree.tree_structure(b[1]) == pytree.tree_structure(zero)
    for new, old in zip(a[1], zero, strict=True):
        assert (new is None) == (old is None)
        if new is not None:
            assert (new.shape, new.dtype) == (old.shape, old.dtype)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_state_is_a_value(length: int) -> None:
    layer = small_mamba2()
    _, state = layer(randn(0, 2, 5, 8), seq_idx=packed_ids(0, 2, 5))
    before = [tensor.detach().clone() for tensor in state]
    seq_idx = packed_ids(1, 2, length)
    _, new = layer(randn(1, 2, length, 8), state, seq_idx=seq_idx)
    for old, kept, fresh in zip(before, state, new, strict=True):
        assert torch.equal(old, kept)
        assert fresh.untyped_storage().nbytes() == fresh.nbytes
        assert fresh.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()


def test_state_dict_has_the_names_and_shapes_of_mamba_ssm() -> None:
    shapes = {name: tuple(t.shape) for name, t in Mamba2(64, bias=True).state_dict().items()}
    assert shapes == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "in_proj.weight": (2 * 128 + 2 * 128 + 2, 64),
        "in_proj.bias": (2 * 128 + 2 * 128 + 2,),
        "conv1d.weight": (128 + 2 * 128, 1, 4),
        "conv1d.bias": (128 + 2 * 128,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
        "out_proj.bias": (64,),
    }


def test_initialisation_follows_the_ranges() -> None:
    torch.manual_seed(0)
    layer = Mamba2(256, d_state=4, headdim=1, dt_min=0.01, dt_max=0.2, A_init_range=(2.0, 3.0), conv_init=0.1)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0.0099 < dt.min() < 0.012
    assert 0.17 < dt.max() < 0.201
    A = layer.A_log.exp()
    assert 2.0 <= A.min() < 2.05
    assert 2.95 < A.max() <= 3.0001
    assert layer.conv1d.weight.abs().max() <= 0.1
    assert (layer.D == 1).all()
    assert all(p._no_weight_decay for p in (layer.dt_bias, layer.A_log, layer.D))


def test_meta_device_runs_and_to_empty_then_reset_gives_a_trainable_layer() -> None:
    with torch.device("meta"):
        layer = Mamba2Block(**SMALL)
        _, state = layer(torch.zeros(2, 7, 8), None, seq_idx=torch.zeros(2, 7, dtype=torch.int32))
        (hidden, residual), state = layer(torch.zeros(2, 1, 8), state, seq_idx=torch.zeros(2, 1, dtype=torch.int32))
    assert hidden.device.type == residual.device.type == state.ssm.device.type == "meta"
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


def test_bfloat16_layer_is_no_worse_than_rounding_its_inputs_and_intermediates() -> None:
    """Yardstick: the float64 layer on the same weights with what passes between operators rounded."""
    layer = small_mamba2(dtype=torch.bfloat16, d_model=32, headdim=8, d_state=8)
    exact = copy.deepcopy(layer).double()
    x = randn(0, 2, 64, 32).bfloat16()
    truth, truth_state = exact(x.double())
    y, state = layer(x)
    assert y.dtype == torch.bfloat16
    assert state.conv.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32

    def rounded(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.bfloat16().double()

    yardstick = copy.deepcopy(exact)
    for part in (yardstick.in_proj, yardstick.norm, yardstick.out_proj):
        part.register_forward_hook(rounded)
    naive, _ = yardstick(x.double())
    assert (y.double() - truth).norm() <= 1.5 * (naive - truth).norm()
    assert (state.ssm.double() - truth_state.ssm).norm() < 0.01 * truth_state.ssm.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_state_contract(dtype: torch.dtype) -> None:
    layer = small_mamba2(dtype=torch.float32)
    x = randn(0, 2, 6, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole, _ = layer(x)
        outputs, state = in_segments(layer, x, [2, 1, 3])
    assert state.conv.dtype == dtype
    assert state.ssm.dtype == torch.float32
    assert_close(torch.cat(outputs, 1), whole, 2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_block_any_segmentation_equals_the_whole(residual_in_fp32: bool) -> None:
    block = perturbed(Mamba2Block(**SMALL, residual_in_fp32=residual_in_fp32, dtype=torch.float64))
    hidden, residual = (randn(i, 2, 9, 8).requires_grad_() for i in range(2))
    inputs = {"hidden": hidden, "residual": residual, **dict(block.named_parameters())}
    whole, last = block((hidden, residual))
    parts, state = [], None
    for start, stop in [(0, 1), (1, 4), (4, 9)]:
        y, state = block((hidden[:, start:stop], residual[:, start:stop]), state)
        parts.append(y)
    joined = [torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)]
    truth = gradients([*whole, last.ssm, last.conv], inputs)
    for a, e in zip(joined, whole, strict=True):
        assert_close(a, e, 1e-12)
    for name, gradient in gradients([*joined, state.ssm, state.conv], inputs).items():
        assert_close(gradient, truth[name], 1e-10, name)


def test_block_adds_then_normalises_and_keeps_the_residual_in_float32() -> None:
    block = Mamba2Block(**SMALL, dtype=torch.bfloat16)
    x = randn(0, 2, 5, 8).bfloat16()
    (hidden, residual), _ = block(x)
    assert hidden.dtype == torch.bfloat16
    assert residual.dtype == torch.float32
    assert torch.equal(residual, x.float())
    (_, second), _ = block((hidden, residual))
    assert torch.equal(second, hidden.float() + residual)
    (_, low), _ = Mamba2Block(**SMALL, residual_in_fp32=False, dtype=torch.bfloat16)((hidden, x))
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": 5}, "multiple of headdim"),
        ({"d_ssm": 20}, "at most expand"),
        ({"ngroups": 3}, "ngroups=3 must divide"),
        ({"d_conv": 5}, "d_conv must be 2, 3 or 4"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"A_init_range": (0.0, 1.0)}, "A_init_range"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit"),
        ({"impl": "cuda"}, "impl='cuda' is not available; choose one of 'auto', 'reference'"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mamba2(**{**SMALL, **change})


def test_wrong_inputs_are_refused() -> None:
    layer = small_mamba2()
    with pytest.raises(InputError, match=r"d_model=8.*got \(2, 3, 7\)"):
        layer(torch.zeros(2, 3, 7).double())
    with pytest.raises(InputError, match="length >= 1"):
        layer(torch.zeros(2, 0, 8).double())
    with pytest.raises(InputError, match="seq_idx must be integers"):
        layer(torch.zeros(2, 3, 8).double(), seq_idx=torch.zeros(2, 3))


@pytest.mark.parametrize("length", [1, 3])
def test_wrong_states_are_refused(length: int) -> None:
    layer = small_mamba2()
    x = torch.zeros(2, length, 8).double()
    good = layer.initial_state(2)
    ids = torch.zeros(2, length, dtype=torch.int32)
    with pytest.raises(StateError, match=r"state\.ssm must be torch\.float64"):
        layer(x, good._replace(ssm=good.ssm.float()))
    with pytest.raises(StateError, match=r"state\.conv must be"):
        layer(x, layer.initial_state(3))
    with pytest.raises(StateError, match="the segment has a seq_idx and the state has none"):
        layer(x, good, seq_idx=ids)
    with pytest.raises(StateError, match="the state has a seq_idx and the segment has none"):
        layer(x, layer.initial_state(2, packed=True))
    with pytest.raises(StateError, match=r"state\.seq_idx must have shape"):
        layer(x, layer.initial_state(2, packed=True)._replace(seq_idx=torch.zeros(3)), seq_idx=ids)
