"""Test of launch configurations on the device at hand: outputs, states and all gradients against float64.

    for entry in shipped():
        result = run(entry, torch.device("cuda"))
        print(entry, result.passed, result.failures)

Requires the package `triton`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magc_kernels._triton import capability
from magc_kernels.configs import (
    Capability,
    Config,
    ConvShape,
    NormShape,
    SelectiveScanShape,
    Shape,
    SSDShape,
    shipped_config,
)
from magc_kernels.conv import autograd as conv
from magc_kernels.conv import reference as conv_reference
from magc_kernels.conv._config import ConvConfig
from magc_kernels.norm import autograd as norm
from magc_kernels.norm import reference as norm_reference
from magc_kernels.norm._config import NormConfig
from magc_kernels.selective_scan import autograd as selective_scan
from magc_kernels.selective_scan import reference as selective_scan_reference
from magc_kernels.selective_scan._config import SelectiveScanConfig
from magc_kernels.ssd import autograd as ssd
from magc_kernels.ssd import reference as ssd_reference

Tensors = dict[str, Tensor]
Randn = Callable[..., Tensor]
CLASSES: tuple[Capability | None, ...] = ((9, 0), (8, 0), None)
"""Compute capabilities with configurations of their own; None for all others."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GROUP_SIZES = (64, 256, 768, 1024, 1536, 2048, 2560, 4096, 5120, 8192, 16384)
_SCAN_NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
_FLOAT32 = ("A", "D", "dt_bias", "state", "dfinal_state", "weight", "bias", "residual", "dtotal")
"""What a layer keeps in float32 beside half-precision activations."""
_PARAMETERS = ("dA", "dD", "ddt_bias", "dweight", "dbias", "add dweight")


@dataclass(frozen=True)
class Entry:
    """One configuration, for a class of devices and of shapes."""

    capability: Capability | None
    shape: Shape
    config: Config


@dataclass(frozen=True)
class Result:
    """Relative errors (of norms) of the outputs and, under the inputs' names prefixed by "d", of all gradients."""

    entry: Entry
    errors: dict[str, float]
    bounds: dict[str, float]
    """From the errors of the plain PyTorch reference in the same type."""
    repeats: bool
    """A second run gave the same bits."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Names whose error exceeds its bound, or is not a number."""
        return tuple(name for name, error in self.errors.items() if not error <= self.bounds[name])

    @property
    def passed(self) -> bool:
        return self.repeats and not self.failures


def shipped(classes: tuple[Capability | None, ...] = CLASSES) -> list[Entry]:
    """Every shipped configuration once per class of devices, for the largest of the shapes that it is taken for."""
    entries: dict[object, Entry] = {}
    for device, dtype, operator in itertools.product(classes, _DTYPES, _OPERATORS.values()):
        for shape in operator.shapes(dtype):
            config = shipped_config(shape, device)
            width = shape.width if isinstance(shape, ConvShape) else None
            entries[device, type(shape), dtype, width, config] = Entry(device, shape, config)
    return list(entries.values())


def device_class(device: torch.device) -> Capability | None:
    """Which of `CLASSES` a device belongs to."""
    own = capability(device)
    return own if own in CLASSES else None


def run(entry: Entry, device: torch.device) -> Result:
    """Run one configuration forward and backward on a small problem, whose length is no multiple of any tile.

    Raises:
        triton.errors.TritonError: it cannot be compiled, or asks for more than the device has.
    """
    shape, config = entry.shape, entry.config
    operator = _OPERATORS[type(shape)]
    exact = problem(shape, *operator.small(config), torch.float64, device)
    rounded = _cast(exact, shape.dtype)
    actual = call_kernels(shape, config, rounded)
    again = call_kernels(shape, config, rounded)
    plain = operator.reference(_leaves(rounded))
    errors, bounds = {}, {}
    for name, truth in operator.reference(_leaves(exact)).items():
        errors[name] = _distance(actual[name], truth)
        # Operands of the kernels' matrix products are rounded once more than the reference's, and a parameter's
        # gradient is a few numbers whose errors are luck.
        factor = 2.5 if name in _PARAMETERS else 1.5
        bounds[name] = factor * _distance(plain[name], truth) + 2e-5
    return Result(entry, errors, bounds, all(torch.equal(t, again[name]) for name, t in actual.items()))


def problem(shape: Shape, length: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Inputs and output gradients of one segment, in `dtype` but for what a layer keeps in float32.

    Args:
        shape: class of shapes.
        length: tokens.
        channels: in all heads together, or of the convolution; a norm has the group's.
        dtype: of the activations.
        device: where they are.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64, device=device)

    return _cast(_OPERATORS[type(shape)].problem(shape, length, channels, randn), dtype)


def call_kernels(shape: Shape, config: Config, tensors: Tensors) -> Tensors:
    """Outputs and all gradients of a `problem` from the kernels."""
    return _OPERATORS[type(shape)].kernels(config, tensors)


# ---------------------------------------------------------------------- the two scans
def _ssd_problem(shape: SSDShape, length: int, channels: int, randn: Randn) -> Tensors:
    heads, P, N = channels // shape.headdim, shape.headdim, shape.d_state
    return _scan_problem((1, length, heads, P), (1, length, heads), (heads,), (1, heads, P, N), randn)


def _selective_scan_problem(shape: SelectiveScanShape, length: int, channels: int, randn: Randn) -> Tensors:
    x, N = (1, length, channels), shape.d_state
    return {**_scan_problem(x, x, (channels, N), (1, channels, N), randn), "z": randn(*x)}


def _scan_problem(
    x: tuple[int, ...], dt: tuple[int, ...], A: tuple[int, ...], state: tuple[int, ...], randn: Randn
) -> Tensors:
    """From the shapes of `x`, `dt`, `A` and the state."""
    projection = (*x[:2], 1, state[-1])
    return {
        "x": randn(*x),
        "dt": randn(*dt) - 1.0,
        "A": -randn(*A).abs() - 0.1,
        "B": randn(*projection),
        "C": randn(*projection),
        "D": randn(A[0]),
        "dt_bias": randn(A[0]),
        "state": randn(*state),
        "dy": randn(*x),
        "dfinal_state": randn(*state),
    }


def _selective_scan_small(config: SelectiveScanConfig) -> tuple[int, int]:
    """Two programs share a group's channels in the backward."""
    tile = config.backward_rows * config.backward_lanes
    return 2 * config.chunk + config.chunk // 2 + 3, config.share * tile + tile // 2 + 3


def _scan_kernels(operator: Any, make_inputs: Callable[..., Any], config: Config, t: Tensors) -> Tensors:
    tensors: Any = {n: t[n] for n in _SCAN_NAMES if n in t}
    inputs = make_inputs(**tensors, initial_state=t["state"], dt_softplus=True, config=config)
    y, state, saved = operator.recompute(inputs)
    d = operator.vjp(saved, t["dy"], t["dfinal_state"])
    gradients = {"d" + n: getattr(d, n) for n in tensors}
    return {"y": y, "final_state": state, **gradients, "dstate": d.initial_state}


def _scan_reference(operator: Callable[..., tuple[Tensor, Tensor]], t: Tensors) -> Tensors:
    tensors = {n: t[n] for n in _SCAN_NAMES if n in t}
    y, state = operator(**tensors, initial_state=t["state"], dt_softplus=True)
    gradients = _gradients((y, state), (t["dy"], t["dfinal_state"]), {**tensors, "state": t["state"]})
    return {"y": y, "final_state": state, **gradients}


# ---------------------------------------------------------------------- the convolution
def _conv_problem(shape: ConvShape, length: int, channels: int, randn: Randn) -> Tensors:
    return {
        "x": randn(1, length, channels),
        "weight": randn(channels, shape.width),
        "bias": randn(channels),
        "rows": randn(1, shape.width - 1, channels),
        "dy": randn(1, length, channels),
        "dnew_rows": randn(1, shape.width - 1, channels),
    }


def _conv_small(config: ConvConfig) -> tuple[int, int]:
    tiles = (config.forward, config.backward)
    return 3 * max(tile.lanes * tile.run for tile in tiles) + 3, max(tile.channels for tile in tiles) + 8


def _conv_kernels(config: ConvConfig, t: Tensors) -> Tensors:
    inputs = conv.ConvInputs(t["x"], t["weight"], t["bias"], t["rows"], activation="silu", config=config)
    y, state = conv.forward(inputs)
    d = conv.vjp(inputs, t["dy"], t["dnew_rows"])
    gradients = {"dx": d.x, "dweight": d.weight, "dbias": d.bias, "drows": d.initial_state}
    return {"y": y, "new_rows": state, **{n: g for n, g in gradients.items() if g is not None}}


def _conv_reference(t: Tensors) -> Tensors:
    tensors = {n: t[n] for n in ("x", "weight", "bias", "rows")}
    y, state = conv_reference.causal_conv1d(t["x"], t["weight"], t["bias"], initial_state=t["rows"], activation="silu")
    return {"y": y, "new_rows": state, **_gradients((y, state), (t["dy"], t["dnew_rows"]), tensors)}


# ---------------------------------------------------------------------- the norms
def _norm_problem(shape: NormShape, length: int, _: int, randn: Randn) -> Tensors:
    tensors = {name: randn(length, shape.group_size) for name in ("x", "z", "residual", "dy", "dtotal")}
    return {**tensors, "weight": randn(shape.group_size)}


def _norm_kernels(config: NormConfig, t: Tensors) -> Tensors:
    x, z, residual, weight = (t[n] for n in ("x", "z", "residual", "weight"))
    y = norm.gated_forward(x, z, weight, config=config)
    g = norm.gated_vjp(x, z, weight, t["dy"], config=config)
    normal, total = norm.add_forward(x, residual, weight, config=config)
    a = norm.add_vjp(x, residual, weight, t["dy"], t["dtotal"], config=config)
    assert g.z is not None
    assert a.residual is not None
    gated = {"y": y, "dx": g.x, "dz": g.z, "dweight": g.weight}
    added = {"add dx": a.x, "add dresidual": a.residual, "add dweight": a.weight}
    return {**gated, "normal": normal, "total": total, **added}


def _norm_reference(t: Tensors) -> Tensors:
    x, z, residual, weight = (t[n] for n in ("x", "z", "residual", "weight"))
    y = norm_reference.gated_rms_norm(x, z, weight)
    gated = _gradients((y,), (t["dy"],), {"x": x, "z": z, "weight": weight})
    normal, total = norm_reference.add_rms_norm(x, residual, weight)
    added = _gradients((normal, total), (t["dy"], t["dtotal"]), {"x": x, "residual": residual, "weight": weight})
    return {"y": y, **gated, "normal": normal, "total": total, **{"add " + n: g for n, g in added.items()}}


class _Operator(NamedTuple):
    shapes: Callable[[torch.dtype], Iterable[Shape]]
    small: Callable[[Any], tuple[int, int]]
    """Length and channels of a problem of several ragged tiles."""
    problem: Callable[[Any, int, int, Randn], Tensors]
    kernels: Callable[[Any, Tensors], Tensors]
    """Outputs and, under the inputs' names prefixed by "d", gradients."""
    reference: Callable[[Tensors], Tensors]
    """The same from plain PyTorch."""


_OPERATORS: dict[type[Shape], _Operator] = {
    SSDShape: _Operator(
        lambda dtype: (SSDShape(dtype, p, n) for p in (16, 32, 64, 128) for n in (16, 32, 64, 128, 256)),
        lambda config: (2 * config.chunk + config.chunk // 2 + 3, 256),
        _ssd_problem,
        partial(_scan_kernels, ssd, ssd.SSDInputs),
        partial(_scan_reference, ssd_reference.ssd),
    ),
    SelectiveScanShape: _Operator(
        lambda dtype: (SelectiveScanShape(dtype, 1 << power) for power in range(9)),
        _selective_scan_small,
        _selective_scan_problem,
        partial(_scan_kernels, selective_scan, selective_scan.SelectiveScanInputs),
        partial(_scan_reference, selective_scan_reference.selective_scan),
    ),
    ConvShape: _Operator(
        lambda dtype: (ConvShape(dtype, width) for width in (2, 3, 4)),
        _conv_small,
        _conv_problem,
        _conv_kernels,
        _conv_reference,
    ),
    NormShape: _Operator(
        lambda dtype: (NormShape(dtype, size) for size in _GROUP_SIZES),
        lambda config: (config.backward_programs + 5, 0),
        _norm_problem,
        _norm_kernels,
        _norm_reference,
    ),
}


def _leaves(tensors: Tensors) -> Tensors:
    return {n: t.detach().requires_grad_() for n, t in tensors.items()}


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to(wide if n in _FLOAT32 else dtype) for n, t in tensors.items()}


def _gradients(outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], inputs: Tensors) -> Tensors:
    grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return {"d" + name: grad for name, grad in zip(inputs, grads, strict=True)}


def _distance(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())
