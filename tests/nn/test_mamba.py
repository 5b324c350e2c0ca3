"""The Mamba-1 layer: segmentation, state, names, equality with transformers, errors."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils import _pytree as pytree

from magc import GridCheckpoint, Plan
from magc.errors import InputError, StateError
from magc.nn import Mamba, MambaState
from magc.nn import mamba as mamba_module
from magc.nn.operators import operators
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, relative_error, splits
from tests.nn.helpers import in_segments, perturbed

SIZES: dict[str, Any] = {"d_model": 8, "d_state": 4}


def small_mamba(dtype: torch.dtype = torch.float64, **changes: Any) -> Mamba:
    torch.manual_seed(0)
    return perturbed(Mamba(**{**SIZES, **changes}, dtype=dtype))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", [{}, {"bias": True, "conv_bias": False, "d_conv": 2, "dt_rank": 3, "expand": 1}])
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), length=st.integers(2, 13), mean=st.sampled_from([1.01, 3.0]))
def test_any_segmentation_equals_the_whole(
    variant: dict[str, Any], packed: bool, seed: int, length: int, mean: float
) -> None:
    layer = small_mamba(**variant)
    x = randn(seed, 2, length, 8).requires_grad_()
    zero = layer.initial_state(2, packed=packed)
    conv, ssm = randn(1, *zero.conv.shape).requires_grad_(), randn(2, *zero.ssm.shape).requires_grad_()
    state = MambaState(conv, ssm, zero.seq_idx)
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
    layer = small_mamba()
    x = randn(0, 1, 11, 8)
    seq_idx = torch.tensor([[5] * 4 + [2] + [5] * 6])
    y, state = layer(x, seq_idx=seq_idx)
    parts = [layer(part) for part in x.split([4, 1, 6], dim=1)]
    assert_close(y, torch.cat([part[0] for part in parts], 1), 1e-13)
    assert_close(state.ssm, parts[-1][1].ssm, 1e-13)
    assert_close(state.conv, parts[-1][1].conv, 1e-13)


def test_gradients_through_a_grid_equal_those_of_the_whole() -> None:
    layers = [small_mamba(), small_mamba(d_conv=3)]
    x = randn(0, 2, 23, 8).requires_grad_()
    h = x
    for layer in layers:
        h, state = layer(h)
    wanted = {"x": x, **{f"{i}.{n}": p for i, layer in enumerate(layers) for n, p in layer.named_parameters()}}
    expected = gradients([h, state.ssm], wanted)
    y, final = GridCheckpoint(layers, Plan(layers=1, tokens=5))(x)
    assert_close(y, h, 1e-12)
    for name, gradient in gradients([y, final[-1].ssm], wanted).items():
        assert_close(gradient, expected[name], 1e-10, name)


def test_output_and_gradients_equal_transformers() -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(hidden_size=8, state_size=4, expand=2, conv_kernel=4, num_hidden_layers=1)
    layer = small_mamba(dtype=torch.float32)
    theirs = mamba.MambaMixer(config, layer_idx=0)
    theirs.load_state_dict(layer.state_dict())
    x = randn(0, 2, 21, 8).float()
    y, _ = layer(x)
    expected = theirs(x)
    assert relative_error(y, expected) < 1e-5
    cotangent = randn(1, *y.shape).float()
    ((y * cotangent).sum() + (expected * cotangent).sum()).backward()
    for name, parameter in theirs.named_parameters():
        assert relative_error(layer.get_parameter(name).grad, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_zero_state_is_the_same_as_none(packed: bool, length: int) -> None:
    layer = small_mamba()
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
    layer = small_mamba()
    _, state = layer(randn(0, 2, 5, 8), seq_idx=packed_ids(0, 2, 5))
    before = [tensor.detach().clone() for tensor in state]
    _, new = layer(randn(1, 2, length, 8), state, seq_idx=packed_ids(1, 2, length))
    for old, kept, fresh in zip(before, state, new, strict=True):
        assert torch.equal(old, kept)
        assert fresh.untyped_storage().nbytes() == fresh.nbytes
        assert fresh.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()


def test_state_dict_has_the_names_and_shapes_of_mamba_ssm() -> None:
    shapes = {name: tuple(t.shape) for name, t in Mamba(40, bias=True).state_dict().items()}
    assert shapes == {
        "A_log": (80, 16),
        "D": (80,),
        "in_proj.weight": (160, 40),
        "in_proj.bias": (160,),
        "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,),
        "x_proj.weight": (3 + 2 * 16, 80),
        "dt_proj.weight": (80, 3),
        "dt_proj.bias": (80,),
        "out_proj.weight": (40, 80),
        "out_proj.bias": (40,),
    }


@pytest.mark.parametrize("dt_init", ["random", "constant"])
def test_initialisation_is_that_of_mamba_ssm(dt_init: Any) -> None:
    torch.manual_seed(0)
    layer = Mamba(256, d_state=4, dt_min=0.01, dt_max=0.2, dt_init=dt_init, dt_scale=2.0, dtype=torch.bfloat16)
    size = 2.0 * 16**-0.5
    weight = layer.dt_proj.weight.abs()
    assert 0.99 * size < weight.max() <= size
    assert (weight.min() < 0.01 * size) == (dt_init == "random")
    dt = functional.softplus(layer.dt_proj.bias.float())
    assert 0.0098 < dt.min() < 0.012
    assert 0.17 < dt.max() < 0.204
    assert_close(layer.A_log.exp(), torch.arange(1.0, 5.0).expand(512, 4), 1e-6)
    assert (layer.D == 1).all()
    assert layer.A_log.dtype == layer.D.dtype == torch.float32
    assert all(p._no_weight_decay for p in (layer.A_log, layer.D))


def test_meta_device_runs_and_to_empty_then_reset_gives_a_trainable_layer() -> None:
    with torch.device("meta"):
        layer = Mamba(**SIZES)
        _, state = layer(torch.zeros(2, 7, 8), None, seq_idx=torch.zeros(2, 7, dtype=torch.int32))
        y, state = layer(torch.zeros(2, 1, 8), state, seq_idx=torch.zeros(2, 1, dtype=torch.int32))
    assert y.device.type == state.ssm.device.type == "meta"
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


def test_bfloat16_layer_is_no_worse_than_rounding_its_inputs_and_intermediates() -> None:
    """Yardstick: the float64 layer on the same weights with what passes between operators rounded."""
    layer = small_mamba(dtype=torch.bfloat16, d_model=32, d_state=8)
    exact = copy.deepcopy(layer).double()
    x = randn(0, 2, 64, 32).bfloat16()
    truth, truth_state = exact(x.double())
    y, state = layer(x)
    assert y.dtype == state.conv.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32

    def rounded(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.bfloat16().double()

    yardstick = copy.deepcopy(exact)
    for part in (yardstick.in_proj, yardstick.x_proj, yardstick.out_proj):
        part.register_forward_hook(rounded)
    naive, naive_state = yardstick(x.double())
    assert (y.double() - truth).norm() <= 1.5 * (naive - truth).norm()
    assert (state.ssm.double() - truth_state.ssm).norm() <= 2.0 * (naive_state.ssm - truth_state.ssm).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_state_contract(dtype: torch.dtype) -> None:
    layer = small_mamba(dtype=torch.float32)
    x = randn(0, 2, 6, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole, _ = layer(x)
        outputs, state = in_segments(layer, x, [2, 1, 3])
    assert state.conv.dtype == dtype
    assert state.ssm.dtype == torch.float32
    assert_close(torch.cat(outputs, 1), whole, 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_auto_falls_back_by_name_where_the_kernels_take_no_such_state_size() -> None:
    cuda = torch.device("cuda")
    assert Mamba(8, d_state=12).implementation(cuda).name == "reference"
    assert Mamba(8, d_state=16).implementation(torch.device("cpu")).name == "reference"
    assert Mamba(8, d_state=12, impl="triton").implementation(cuda).name == "triton"


def made_for(configs: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[Any]:
    """What the Triton convolution and scan of a layer with `configs` would be given, None included."""
    reference, given = operators("reference", torch.device("cpu")), []

    def spy(operator: Any) -> Any:
        return lambda *args, config, **options: (given.append(config), operator(*args, **options))[1]

    run = replace(
        reference,
        name="triton",
        causal_conv1d=spy(reference.causal_conv1d),
        selective_scan=spy(reference.selective_scan),
    )
    monkeypatch.setattr(mamba_module, "operators", lambda *_: run)
    small_mamba(dtype, configs=configs)(randn(0, 1, 5, 8).to(dtype))
    return given


def test_the_triton_operators_get_the_configurations_of_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = pytest.importorskip("magc_kernels.configs", exc_type=ImportError)
    conv, scan = configs.ConvShape(torch.float32, 4), configs.SelectiveScanShape(torch.float32, 4)
    given = configs.KernelConfigs(
        conv={conv: configs.shipped_config(conv, None)},
        selective_scan={scan: configs.shipped_config(scan, None)},
    )
    assert made_for(given, monkeypatch, torch.float32) == [given.conv[conv], given.selective_scan[scan]]
    assert made_for(given, monkeypatch, torch.bfloat16) == [None, None]


def test_the_reference_operators_get_no_configurations() -> None:
    configs = pytest.importorskip("magc_kernels.configs", exc_type=ImportError)
    x = randn(0, 1, 5, 8)
    layer = small_mamba(configs=configs.KernelConfigs())
    assert torch.equal(copy.deepcopy(layer)(x)[0], small_mamba()(x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_state": 0}, "d_state must be at least 1"),
        ({"dt_rank": 0}, "dt_rank must be at least 1"),
        ({"d_conv": 5}, "d_conv must be 2, 3 or 4"),
        ({"dt_min": 0.2}, "dt_min"),
        ({"dt_init": "uniform"}, "dt_init must be 'random' or 'constant'"),
        ({"impl": "cuda"}, "impl='cuda' is not available; choose one of 'auto', 'reference'"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mamba(**{**SIZES, **change})


def test_wrong_inputs_are_refused() -> None:
    layer = small_mamba()
    with pytest.raises(InputError, match=r"d_model=8.*got \(2, 3, 7\)"):
        layer(torch.zeros(2, 3, 7).double())
    with pytest.raises(InputError, match="length >= 1"):
        layer(torch.zeros(2, 0, 8).double())
    with pytest.raises(InputError, match="seq_idx must be integers"):
        layer(torch.zeros(2, 3, 8).double(), seq_idx=torch.zeros(2, 3))


@pytest.mark.parametrize("length", [1, 3])
def test_wrong_states_are_refused(length: int) -> None:
    layer = small_mamba()
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
