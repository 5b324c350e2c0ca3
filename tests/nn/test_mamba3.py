"""The Mamba-3 layer: the recurrence, segmentation, state, names, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from magc import GridCheckpoint, Plan
from magc.errors import InputError, StateError
from magc.nn import Mamba3
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, splits
from tests.kernels.mamba3_recurrence import naive_mixer
from tests.nn.helpers import in_segments, perturbed

SIZES: dict[str, Any] = {"d_model": 8, "d_state": 6, "headdim": 4, "chunk_size": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "one input": {},
    "norm": {"is_outproj_norm": True, "rope_fraction": 1.0, "ngroups": 2},
    "three inputs": {"is_mimo": True, "mimo_rank": 3, "ngroups": 2},
    "two inputs and norm": {"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True, "rope_fraction": 1.0},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def small_mamba3(dtype: torch.dtype = torch.float64, **changes: Any) -> Mamba3:
    torch.manual_seed(0)
    layer = perturbed(Mamba3(**{**SIZES, "A_floor": 0.5, **changes}, dtype=dtype))
    with torch.no_grad():
        layer.dt_bias += 3.0  # steps large enough for every term to count
    return layer


@variants
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_equal_the_recurrence(variant: dict[str, Any], packed: bool) -> None:
    layer = small_mamba3(**variant)
    x = randn(0, 2, 11, 8).requires_grad_()
    seq_idx = packed_ids(0, 2, 11) if packed else None
    wanted = {"x": x, **dict(layer.named_parameters())}
    expected = naive_mixer(layer, x, groups=layer.ngroups, angles=layer.num_angles, seq_idx=seq_idx)
    actual, _ = layer(x, seq_idx=seq_idx)
    assert_close(actual, expected, 1e-12)
    truth = gradients([expected], wanted)
    for name, gradient in gradients([actual], wanted).items():
        assert truth[name].abs().max() > 0, name
        assert_close(gradient, truth[name], 1e-11, name)


@variants
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mean", [1.01, 3.0])
def test_any_segmentation_equals_the_whole(variant: dict[str, Any], packed: bool, mean: float) -> None:
    layer = small_mamba3(**variant)
    for seed, length in ((0, 2), (1, 7), (2, 13)):
        x = randn(seed, 2, length, 8).requires_grad_()
        seq_idx = packed_ids(seed, 2, length) if packed else None
        wanted = {"x": x, **dict(layer.named_parameters())}
        whole, state = layer(x, seq_idx=seq_idx)
        parts, last = in_segments(layer, x, splits(seed, length, mean), seq_idx=seq_idx)
        assert_close(torch.cat(parts, 1), whole, 1e-12)
        expected = gradients([whole, *state[:4]], wanted)
        for name, gradient in gradients([torch.cat(parts, 1), *last[:4]], wanted).items():
            assert_close(gradient, expected[name], 1e-10, name)


def test_gradients_through_a_grid_equal_those_of_the_whole() -> None:
    layers = [small_mamba3(**variant) for variant in VARIANTS.values()]
    x = randn(0, 2, 23, 8).requires_grad_()
    h = x
    for layer in layers:
        h, state = layer(h)
    wanted = {"x": x, **{f"{i}.{n}": p for i, layer in enumerate(layers) for n, p in layer.named_parameters()}}
    expected = gradients([h, *state[:4]], wanted)
    y, final = GridCheckpoint(layers, Plan(layers=1, tokens=5))(x)
    assert_close(y, h, 1e-12)
    for name, gradient in gradients([y, *final[-1][:4]], wanted).items():
        assert_close(gradient, expected[name], 1e-10, name)


@variants
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 6])
def test_zero_state_is_the_same_as_none(variant: dict[str, Any], packed: bool, length: int) -> None:
    layer = small_mamba3(**variant)
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


@pytest.mark.parametrize("length", [1, 9])
def test_state_is_a_value(length: int) -> None:
    layer = small_mamba3()
    _, state = layer(randn(0, 2, 5, 8), seq_idx=packed_ids(0, 2, 5))
    before = [tensor.detach().clone() for tensor in state]
    _, new = layer(randn(1, 2, length, 8), state, seq_idx=packed_ids(1, 2, length))
    for old, kept, fresh in zip(before, state, new, strict=True):
        assert torch.equal(old, kept)
        assert fresh.untyped_storage().nbytes() == fresh.nbytes
        assert fresh.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()


def test_state_dict_has_the_names_and_shapes_of_mamba_ssm() -> None:
    layer = Mamba3(40, d_state=16, headdim=20, ngroups=2, is_mimo=True, mimo_rank=3, is_outproj_norm=True)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "dt_bias": (4,),
        "B_bias": (4, 3, 16),
        "C_bias": (4, 3, 16),
        "mimo_x": (4, 3, 20),
        "mimo_z": (4, 3, 20),
        "mimo_o": (4, 3, 20),
        "D": (4,),
        "in_proj.weight": (2 * 80 + 2 * 96 + 3 * 4 + 4, 40),
        "B_norm.weight": (16,),
        "C_norm.weight": (16,),
        "norm.weight": (80,),
        "out_proj.weight": (40, 80),
    }
    plain = Mamba3(40, d_state=16, headdim=20, rope_fraction=1.0)
    assert not {"mimo_x", "mimo_z", "mimo_o", "norm.weight"} & set(plain.state_dict())
    assert plain.in_proj.out_features == 2 * 80 + 2 * 16 + 3 * 4 + 8


def test_initialisation_is_that_of_mamba_ssm() -> None:
    torch.manual_seed(0)
    layer = Mamba3(512, d_state=4, headdim=4, dt_min=0.01, dt_max=0.2, is_mimo=True, dtype=torch.bfloat16)
    dt = functional.softplus(layer.dt_bias)
    assert 0.0098 < dt.min() < 0.012
    assert 0.17 < dt.max() < 0.204
    assert all((p == 1).all() for p in (layer.B_bias, layer.C_bias, layer.D, layer.mimo_z))
    assert all((p == 0.25).all() for p in (layer.mimo_x, layer.mimo_o))
    own = (layer.dt_bias, layer.B_bias, layer.C_bias, layer.D, layer.mimo_x, layer.mimo_z, layer.mimo_o)
    assert all(p.dtype == torch.float32 for p in own)
    assert layer.in_proj.weight.dtype == layer.B_norm.weight.dtype == torch.bfloat16
    assert all(p._no_weight_decay for p in (layer.dt_bias, layer.D))


@variants
def test_meta_device_runs_and_to_empty_then_reset_gives_a_trainable_layer(variant: dict[str, Any]) -> None:
    with torch.device("meta"):
        layer = Mamba3(**SIZES, **variant)
        _, state = layer(torch.zeros(2, 7, 8), None, seq_idx=torch.zeros(2, 7, dtype=torch.int32))
        y, state = layer(torch.zeros(2, 1, 8), state, seq_idx=torch.zeros(2, 1, dtype=torch.int32))
    assert y.device.type == state.ssm.device.type == "meta"
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@variants
def test_bfloat16_layer_is_no_worse_than_rounding_its_inputs_and_intermediates(variant: dict[str, Any]) -> None:
    """Yardstick: the float64 layer on the same weights with what passes between operators rounded."""
    layer = small_mamba3(dtype=torch.bfloat16, **{**variant, "d_model": 32, "d_state": 8})
    exact = copy.deepcopy(layer).double()
    x = randn(0, 2, 64, 32).bfloat16()
    truth, truth_state = exact(x.double())
    y, state = layer(x)
    assert y.dtype == state.x.dtype == torch.bfloat16
    assert state.turns.dtype == state.ssm.dtype == state.B.dtype == torch.float32

    def rounded(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.bfloat16().double()

    yardstick = copy.deepcopy(exact)
    for part in (yardstick.in_proj, yardstick.B_norm, yardstick.C_norm, yardstick.norm, yardstick.out_proj):
        if part is not None:
            part.register_forward_hook(rounded)
    naive, naive_state = yardstick(x.double())
    assert (y.double() - truth).norm() <= 1.5 * (naive - truth).norm()
    assert (state.ssm.double() - truth_state.ssm).norm() <= 2.0 * (naive_state.ssm - truth_state.ssm).norm()


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_state_contract(variant: dict[str, Any], dtype: torch.dtype) -> None:
    layer = small_mamba3(dtype=torch.float32, **variant)
    x = randn(0, 2, 6, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole, _ = layer(x)
        outputs, state = in_segments(layer, x, [2, 1, 3])
    assert state.x.dtype == dtype
    assert state.ssm.dtype == torch.float32
    assert_close(torch.cat(outputs, 1), whole, 2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_state": 0}, "d_state must be at least 1"),
        ({"d_state": 5}, "d_state=5 must be even"),
        ({"d_state": 2, "rope_fraction": 0.5}, "leave a pair that rotates"),
        ({"headdim": 3}, "headdim=3 must divide"),
        ({"ngroups": 3}, "ngroups=3 must divide the number of heads"),
        ({"rope_fraction": 0.25}, r"rope_fraction must be 0\.5 or 1"),
        ({"is_mimo": True, "mimo_rank": 0}, "mimo_rank must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"A_floor": -1.0}, "A_floor must not be negative"),
        ({"impl": "cuda"}, "impl='cuda' is not available; choose one of 'auto', 'reference'"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mamba3(**{**SIZES, **change})


def test_wrong_inputs_are_refused() -> None:
    layer = small_mamba3()
    with pytest.raises(InputError, match=r"d_model=8.*got \(2, 3, 7\)"):
        layer(torch.zeros(2, 3, 7).double())
    with pytest.raises(InputError, match="length >= 1"):
        layer(torch.zeros(2, 0, 8).double())
    with pytest.raises(InputError, match="seq_idx must be integers"):
        layer(torch.zeros(2, 3, 8).double(), seq_idx=torch.zeros(2, 3))


@pytest.mark.parametrize("length", [1, 3])
def test_wrong_states_are_refused(length: int) -> None:
    layer = small_mamba3()
    x = torch.zeros(2, length, 8).double()
    good = layer.initial_state(2)
    ids = torch.zeros(2, length, dtype=torch.int32)
    with pytest.raises(StateError, match=r"state\.ssm must be torch\.float64"):
        layer(x, good._replace(ssm=good.ssm.float()))
    with pytest.raises(StateError, match=r"state\.turns must be"):
        layer(x, layer.initial_state(3))
    with pytest.raises(StateError, match=r"state\.B must be"):
        layer(x, good._replace(B=good.B[..., :-1]))
    with pytest.raises(StateError, match="the segment has a seq_idx and the state has none"):
        layer(x, good, seq_idx=ids)
    with pytest.raises(StateError, match="the state has a seq_idx and the segment has none"):
        layer(x, layer.initial_state(2, packed=True))
    with pytest.raises(StateError, match=r"state\.seq_idx must have shape"):
        layer(x, layer.initial_state(2, packed=True)._replace(seq_idx=torch.zeros(3)), seq_idx=ids)
