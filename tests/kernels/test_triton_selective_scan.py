"""The Triton selective scan against float64: in the interpreter without a GPU, on the GPU where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE, ON_GPU, triton_test  # isort: skip  (before Triton)

from magc_kernels.selective_scan import autograd, reference
from magc_kernels.selective_scan._config import selective_scan_config
from tests.kernels.compare import assert_close, packed_ids, randn

PER_TOKEN = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with triton_test():
        yield


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, blocks, programs and shares of channels from few tokens and channels."""
    monkeypatch.setattr(
        autograd,
        "selective_scan_config",
        lambda d_state, **_: replace(
            selective_scan_config(d_state), chunk=8, added_tokens=2, block=4, rows=1, lanes=32, share=2, programs=3
        ),
    )


def make_inputs(
    seed: int,
    length: int,
    *,
    batch: int = 1,
    groups: int = 1,
    ratio: int = 5,
    d_state: int = 4,
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    """Float64 inputs on the CPU; steps and rates of the size that Mamba has them in."""
    channels = groups * ratio
    inputs = {
        "x": randn(seed, batch, length, channels),
        "dt": randn(seed + 1, batch, length, channels) - 1.0,
        "A": -randn(seed + 2, channels, d_state).abs() - 0.1,
        "B": randn(seed + 3, batch, length, groups, d_state),
        "C": randn(seed + 4, batch, length, groups, d_state),
    }
    if skip:
        inputs["D"] = randn(seed + 5, channels)
    if gate:
        inputs["z"] = randn(seed + 6, batch, length, channels)
    if bias:
        inputs["dt_bias"] = randn(seed + 7, channels)
    if initial:
        inputs["initial_state"] = randn(seed + 8, batch, channels, d_state)
    return inputs


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves of `dtype`; parameters and the state in float32, as a layer has them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to(DEVICE, dtype if n in PER_TOKEN else wide).detach().requires_grad_() for n, t in inputs.items()}


def named_gradients(y: Tensor, state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and, under the inputs' names prefixed by "d", all gradients."""
    total = (y.double() * randn(98, *y.shape).to(DEVICE)).sum() + (
        state.double() * randn(99, *state.shape).to(DEVICE)
    ).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
    return {"y": y.detach(), "state": state.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def evaluate(function: Any, inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    options = {n: o.to(DEVICE) if isinstance(o, Tensor) else o for n, o in options.items()}
    leaves = cast(inputs, dtype)
    y, state = function(**leaves, **options)
    assert y.dtype == dtype
    return named_gradients(y, state, leaves)


def truth(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for an environment variable
    try:
        return evaluate(reference.selective_scan, inputs, dtype, **options)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, name)


def segments(inputs: dict[str, Tensor], bounds: list[int], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs and final state of the segments between `bounds`, one after another."""
    outputs, state, previous = [], inputs.get("initial_state"), None
    for start, end in itertools.pairwise(bounds):
        segment = {n: t[:, start:end] if n in PER_TOKEN else t for n, t in inputs.items()}
        seq_idx = None if ids is None else ids[:, start:end]
        y, state = autograd.selective_scan(
            **{**segment, "initial_state": state}, dt_softplus=True, seq_idx=seq_idx, prev_seq_idx=previous
        )
        previous = None if ids is None else ids[:, end - 1]
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # One token; one chunk, ragged in its second block; exactly full.
    ({"length": 1}, {"dt_softplus": True}),
    ({"length": 7}, {"dt_softplus": True}),
    ({"length": 8}, {"dt_softplus": True}),
    # Several chunks, rows, groups; several programs' shares of channels, the last tile not full.
    ({"length": 21, "batch": 2, "groups": 2}, {"dt_softplus": True}),
    ({"length": 10, "ratio": 70}, {"dt_softplus": True}),
    # Without each of the options.
    ({"length": 10, "bias": False, "initial": False}, {}),
    ({"length": 10, "skip": False, "gate": False}, {}),
    ({"length": 10, "gate": False}, {"dt_softplus": True}),
    # Sizes of the state.
    ({"length": 10, "d_state": 1}, {"dt_softplus": True}),
    ({"length": 10, "d_state": 16}, {"dt_softplus": True}),
    ({"length": 10, "d_state": 64}, {"dt_softplus": True}),
]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_outputs_and_all_gradients_equal_float64(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    inputs = make_inputs(1, **sizes)
    actual = evaluate(autograd.selective_scan, inputs, torch.float32, **options)
    assert_all_close(actual, truth(inputs, **options), 2e-6)


@pytest.mark.parametrize("d_state", [16, 256])
def test_the_shipped_tile_sizes(d_state: int) -> None:
    inputs = make_inputs(1, 66 if d_state == 16 else 5, ratio=20, d_state=d_state)
    actual = evaluate(autograd.selective_scan, inputs, torch.float32, dt_softplus=True)
    assert_all_close(actual, truth(inputs, dt_softplus=True), 2e-6)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("previous", [None, (1, 0)])
def test_packed_sequences_with_an_initial_state(previous: tuple[int, int] | None) -> None:
    inputs = make_inputs(2, 21, batch=2)
    options: dict[str, Any] = {"dt_softplus": True, "seq_idx": packed_ids(1, 2, 21, mean=5.0)}
    if previous is not None:
        options["prev_seq_idx"] = torch.tensor(previous)
    actual = evaluate(autograd.selective_scan, inputs, torch.float32, **options)
    assert_all_close(actual, truth(inputs, **options), 2e-6)


@pytest.mark.usefixtures("short_chunks")
def test_a_document_of_the_last_token_only() -> None:
    """What follows the last token of a ragged chunk must not start another document."""
    inputs = make_inputs(2, 10)
    options = {"dt_softplus": True, "seq_idx": torch.tensor([[0] * 9 + [1]])}
    actual = evaluate(autograd.selective_scan, inputs, torch.float32, **options)
    assert_all_close(actual, truth(inputs, **options), 2e-6)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_whole_chunks_equal_the_whole_to_the_bit(packed: bool) -> None:
    inputs = cast(make_inputs(4, 20, batch=2), torch.float32)
    ids = packed_ids(4, 2, 20, mean=9.0).to(DEVICE) if packed else None
    y, final = autograd.selective_scan(**inputs, dt_softplus=True, seq_idx=ids)
    y_parts, final_parts = segments(inputs, [0, 16, 20], ids)
    assert torch.equal(y_parts, y)
    assert torch.equal(final_parts, final)
    whole, parts = named_gradients(y, final, inputs), named_gradients(y_parts, final_parts, inputs)
    assert_all_close(parts, whole, 1e-6)


@pytest.mark.usefixtures("short_chunks")
def test_any_segmentation_equals_float64() -> None:
    inputs = make_inputs(5, 21)
    leaves = cast(inputs, torch.float32)
    actual = named_gradients(*segments(leaves, [0, 1, 12, 15, 21]), leaves)
    assert_all_close(actual, truth(inputs, dt_softplus=True), 2e-6)


@pytest.mark.usefixtures("short_chunks")
def test_views_of_wider_tensors_give_the_same_bits() -> None:
    """x, z, dt, B and C as slices of the projections they come from."""
    inputs = {n: t.detach() for n, t in cast(make_inputs(6, 10, batch=2), torch.float32).items()}
    wide = {n: torch.nn.functional.pad(inputs[n], (3, 2), value=torch.nan)[..., 3:-2] for n in PER_TOKEN}
    assert not any(t.is_contiguous() for t in wide.values())
    results = []
    for values in (inputs, {**inputs, **wide}):
        scan = autograd.SelectiveScanInputs(**values, dt_softplus=True)
        y, final, saved = autograd.recompute(scan)
        dy = randn(7, *y.shape).float().to(DEVICE)
        d = autograd.vjp(saved, dy if values is inputs else dy.repeat(1, 1, 2)[..., :5], final)
        results.append({"y": y, "final": final, **vars(d)})
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.usefixtures("short_chunks")
def test_forward_and_recompute_agree_to_the_bit_and_may_skip_the_output() -> None:
    values = {n: t.detach() for n, t in cast(make_inputs(8, 10), torch.float32).items()}
    inputs = autograd.SelectiveScanInputs(**values, dt_softplus=True)
    y, final = autograd.forward(inputs)
    y_again, final_again, saved = autograd.recompute(inputs)
    nothing, final_only, saved_only = autograd.recompute(inputs, output=False)
    assert nothing is None
    assert torch.equal(y, y_again)
    assert torch.equal(final, final_again)
    assert torch.equal(final, final_only)
    dy = torch.ones_like(y)
    for a, b in zip(vars(autograd.vjp(saved, dy)).values(), vars(autograd.vjp(saved_only, dy)).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used: int) -> None:
    inputs = make_inputs(9, 10, skip=False, gate=False)
    leaves, leaves64 = cast(inputs, torch.float32), cast(inputs, torch.float64)
    actual = autograd.selective_scan(**leaves, dt_softplus=True)[used]
    expected = reference.selective_scan(**leaves64, dt_softplus=True)[used]
    names = ["x", "dt", "A", "B", "initial_state"]
    weight = randn(9, *actual.shape).to(DEVICE)
    for name, a, e in zip(
        names,
        torch.autograd.grad((actual * weight.float()).sum(), [leaves[n] for n in names]),
        torch.autograd.grad((expected * weight).sum(), [leaves64[n] for n in names]),
        strict=True,
    ):
        assert_close(a, e, 2e-6, name)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_extreme_steps_are_as_precise_as_others(scale: float) -> None:
    """From nothing at all to a full reset per token: no difference of running sums is ever taken."""
    inputs = make_inputs(10, 10)
    inputs["dt"] = (inputs["dt"] + 1.0) * scale
    actual = evaluate(autograd.selective_scan, inputs, torch.float32, dt_softplus=True)
    expected = truth(inputs, dt_softplus=True)
    assert all(torch.isfinite(t).all() for t in actual.values())
    for name in ("y", "state", "dx", "dB", "dC"):
        assert_close(actual[name], expected[name], 5e-6, name)


@pytest.mark.usefixtures("short_chunks")
def test_float16_inputs() -> None:
    inputs = make_inputs(11, 10)
    actual = evaluate(autograd.selective_scan, inputs, torch.float16, dt_softplus=True)
    assert_all_close(actual, truth(inputs, dt_softplus=True), 3e-3)


def test_arguments_outside_the_kernels_limits_are_refused() -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(12, 4), torch.float32).items()}
    odd = {n: t[..., :3] if n in ("A", "B", "C", "initial_state") else t for n, t in inputs.items()}
    with pytest.raises(ValueError, match=r"power of two up to 256, got 3; use impl='reference'"):
        autograd.selective_scan(**odd)
    with pytest.raises(TypeError, match="float64"):
        autograd.selective_scan(**{n: t.double() for n, t in inputs.items()})
    with pytest.raises(ValueError, match="dt must have shape"):
        autograd.selective_scan(**{**inputs, "dt": inputs["dt"][:, :3]})
    with pytest.raises(ValueError, match="one CUDA device"):
        autograd.selective_scan(**{**inputs, "dt": inputs["dt"].to("meta")})


@pytest.mark.usefixtures("short_chunks")
def test_gradients_of_gradients_are_refused() -> None:
    inputs = cast(make_inputs(13, 4), torch.float32)
    y, _ = autograd.selective_scan(**inputs)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad((y * y).sum(), [inputs["x"]], create_graph=True)


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        # Wider tiles in one kernel than in the others; fewer lanes than a panel has; blocks of one token.
        ({"rows": 1, "lanes": 32, "added_rows": 4, "backward_rows": 1, "backward_lanes": 8, "tokens": 1}, 37),
        ({"rows": 1, "lanes": 8, "backward_rows": 4, "backward_lanes": 32, "block": 1, "share": 1, "programs": 1}, 37),
        (
            {
                "rows": 4,
                "lanes": 2,
                "added_tokens": 1,
                "backward_rows": 2,
                "backward_lanes": 2,
                "tokens": 8,
                "block": 8,
                "share": 2,
            },
            13,
        ),
    ],
)
def test_a_configuration_of_the_callers(changes: dict[str, int], ratio: int) -> None:
    config = replace(selective_scan_config(4), chunk=8, **changes)
    inputs = make_inputs(20, 11, ratio=ratio)
    actual = evaluate(autograd.selective_scan, inputs, torch.float32, dt_softplus=True, config=config)
    assert_all_close(actual, truth(inputs, dt_softplus=True), 2e-6)


def test_a_recompute_keeps_the_configuration_that_it_ran_with() -> None:
    values = {n: t.detach() for n, t in cast(make_inputs(21, 4), torch.float32).items()}
    config = replace(selective_scan_config(4), chunk=8)
    inputs = autograd.SelectiveScanInputs(**values)
    assert autograd.recompute(replace(inputs, config=config))[2].config is config
    assert autograd.recompute(inputs)[2].config == selective_scan_config(4)


def test_gradients_of_parameters_may_stay_in_float32() -> None:
    """They are what is rounded otherwise."""
    config = replace(selective_scan_config(4), chunk=8)
    values = {n: t.detach() for n, t in cast(make_inputs(22, 10), torch.float16).items()}
    parameters = {n: values[n].half() for n in ("A", "D", "dt_bias")}
    inputs = autograd.SelectiveScanInputs(**{**values, **parameters}, dt_softplus=True, config=config)
    y, _, saved = autograd.recompute(inputs)
    assert y is not None
    rounded, unrounded = autograd.vjp(saved, y), autograd.vjp(saved, y, float32_weights=True)
    for name, gradient in vars(unrounded).items():
        assert gradient.dtype == (torch.float32 if name in (*parameters, "initial_state") else torch.float16), name
        assert torch.equal(gradient.to(getattr(rounded, name).dtype), getattr(rounded, name)), name
    assert rounded.A.dtype == torch.float16


@pytest.mark.parametrize("d_state", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_tiles_are_whole_numbers_of_blocks_and_threads(d_state: int) -> None:
    config = selective_scan_config(d_state)
    assert config.chunk % config.block == 0
    assert config.chunk % config.tokens == 0
    assert config.lanes * d_state >= 32
    assert config.rows * config.lanes * d_state <= 1024
    assert config.backward_rows * config.backward_lanes * d_state <= 512


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


GPU_SIZES: list[dict[str, Any]] = [
    {"length": 1000, "batch": 2, "ratio": 200, "d_state": 16},
    {"length": 1024, "ratio": 512, "d_state": 16, "initial": False},
    {"length": 700, "groups": 2, "ratio": 40, "d_state": 8, "gate": False},
    {"length": 300, "ratio": 100, "d_state": 64, "skip": False},
    {"length": 150, "ratio": 30, "d_state": 256},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", GPU_SIZES)
def test_error_on_the_gpu_is_near_that_of_rounding_inputs_and_outputs(
    sizes: dict[str, Any], packed: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(14, **sizes)
    options: dict[str, Any] = {"dt_softplus": True}
    if packed:
        options["seq_idx"] = packed_ids(3, inputs["x"].shape[0], sizes["length"], mean=100.0)
    expected = truth(inputs, **options)
    plain = truth(inputs, dtype, **options)
    actual = evaluate(autograd.selective_scan, inputs, dtype, **options)
    again = evaluate(autograd.selective_scan, inputs, dtype, **options)
    for name, e in expected.items():
        error, bound = relative_l2(actual[name], e), relative_l2(plain[name], e)
        # Both compute in float32 and round inputs and outputs only.
        assert error <= 1.1 * bound + (2e-6 if dtype == torch.float32 else 0.0), (name, error, bound)
    assert all(torch.equal(a, again[n]) for n, a in actual.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_segments_equal_the_whole_to_the_bit_on_the_gpu(dtype: torch.dtype) -> None:
    inputs = {n: t.detach() for n, t in cast(make_inputs(15, 1000, batch=2, ratio=300, d_state=16), dtype).items()}
    y, final = autograd.selective_scan(**inputs, dt_softplus=True)
    y_parts, final_parts = segments(inputs, [0, 384, 1000])
    assert torch.equal(y_parts, y)
    assert torch.equal(final_parts, final)


@pytest.mark.gpu
def test_all_three_run_in_a_cuda_graph() -> None:
    values = {n: t.detach() for n, t in cast(make_inputs(16, 200, ratio=70, d_state=16), torch.bfloat16).items()}
    inputs = autograd.SelectiveScanInputs(**values, dt_softplus=True)

    def run() -> list[Tensor]:
        y, final, saved = autograd.recompute(inputs)
        assert y is not None
        return [*autograd.forward(inputs), y, final, *vars(autograd.vjp(saved, y, final)).values()]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """The last tokens of a sequence whose rows lie 2.8 billion elements apart from its first, as views; and dense
    tensors of as many elements.
    """
    channels, d_state, length = 40, 16, 1 << 18
    wide = torch.empty(length, 10752, dtype=torch.bfloat16, device=DEVICE)

    def view(seed: int, start: int, width: int, shift: float = 0.0) -> Tensor:
        part = wide[:, start : start + width]
        part.copy_(randn(seed, length, width) + shift)
        return part[None]

    x, dt, z = view(17, 0, channels), view(18, 64, channels, -1.0), view(19, 128, channels)
    B, C = view(20, 192, d_state).unsqueeze(2), view(21, 256, d_state).unsqueeze(2)
    A = -torch.rand(channels, d_state, device=DEVICE) - 0.1
    strided = autograd.SelectiveScanInputs(x, dt, A, B, C, z=z, dt_softplus=True)
    dense = replace(strided, **{n: getattr(strided, n).contiguous() for n in PER_TOKEN})
    y, final, saved = autograd.recompute(strided)
    y_dense, final_dense, saved_dense = autograd.recompute(dense)
    assert torch.equal(y, y_dense)
    assert torch.equal(final, final_dense)
    d, d_dense = autograd.vjp(saved, y), autograd.vjp(saved_dense, y)
    for name, gradient in vars(d).items():
        assert gradient is None or torch.equal(gradient, getattr(d_dense, name)), name


@pytest.mark.gpu
@pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_properties(0).total_memory < 60 << 30, reason="needs 60 GB of GPU memory"
)
def test_tensors_of_more_than_32_bits_of_elements() -> None:
    """The end of a long sequence equals the same tokens scanned on their own from the state before them."""
    channels, d_state = 1024, 4
    length, start = (1 << 21) + 100, 1 << 21
    generator = torch.Generator(DEVICE).manual_seed(22)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    x, dt = rand(1, length, channels), rand(1, length, channels)
    B, C = rand(1, length, 1, d_state), rand(1, length, 1, d_state)
    A = -torch.rand(channels, d_state, device=DEVICE) - 0.1
    whole = autograd.SelectiveScanInputs(x, dt, A, B, C, dt_softplus=True)
    y, final, saved = autograd.recompute(whole)
    before = saved.states[:, start // saved.config.chunk].transpose(-1, -2).flatten(1, 3)
    end = replace(whole, initial_state=before, **{n: getattr(whole, n)[:, start:] for n in ("x", "dt", "B", "C")})
    y_end, final_end, saved_end = autograd.recompute(end)
    assert torch.equal(y_end, y[:, start:])
    assert torch.equal(final_end, final)
    d_end = autograd.vjp(saved_end, y[:, start:])
    del y_end
    d = autograd.vjp(saved, y)
    assert torch.equal(d_end.x, d.x[:, start:])
    assert torch.equal(d_end.dt, d.dt[:, start:])
    assert torch.equal(d_end.B, d.B[:, start:])
