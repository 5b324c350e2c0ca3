"""Test of launch configurations on the device at hand: outputs, states and all gradients against float64.

    for entry in shipped():
        result = run(entry, torch.device("cuda"))
        print(entry, result.passed, result.failures)

Requires the package `triton`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magc_kernels.configs import Config, ConvShape, NormShape, Shape, SSDShape
from magc_kernels.conv import autograd as conv
from magc_kernels.conv import reference as conv_reference
from magc_kernels.conv._config import ConvConfig, conv_config
from magc_kernels.norm import autograd as norm
from magc_kernels.norm import reference as norm_reference
from magc_kernels.norm._config import norm_config
from magc_kernels.ssd import autograd as ssd
from magc_kernels.ssd import reference as ssd_reference
from magc_kernels.ssd._config import SSDConfig, ssd_config

Capability = tuple[int, int]
CLASSES: tuple[Capability | None, ...] = ((9, 0), (8, 0), None)
"""Compute capabilities with configurations of their own; None for all others."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GROUP_SIZES = (64, 256, 768, 1024, 1536, 2048, 2560, 4096, 5120, 8192, 16384)
_SSD_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
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


def shipped(capabilities: tuple[Capability | None, ...] = CLASSES) -> list[Entry]:
    """Every shipped configuration once per class of devices, for the largest of the shapes that it is taken for."""
    entries: dict[object, Entry] = {}
    for capability in capabilities:
        for shape in _shapes():
            config = shipped_config(shape, capability)
            width = shape.width if isinstance(shape, ConvShape) else None
            entries[capability, type(shape), shape.dtype, width, config] = Entry(capability, shape, config)
    return list(entries.values())


def shipped_config(shape: Shape, capability: Capability | None) -> Config:
    """What an operator runs with if it is given no configuration."""
    if isinstance(shape, SSDShape):
        return ssd_config(shape.dtype, shape.headdim, shape.d_state, None, capability=capability)
    if isinstance(shape, ConvShape):
        return conv_config(shape.dtype, shape.width, capability=capability)
    return norm_config(shape.dtype, shape.group_size, capability=capability)


def run(entry: Entry, device: torch.device) -> Result:
    """Run one configuration forward and backward on a small problem, whose length is no multiple of any tile.

    Raises:
        triton.errors.TritonError: it cannot be compiled, or asks for more than the device has.
    """
    shape, config = entry.shape, entry.config
    exact = problem(shape, *_small(config), torch.float64, device)
    rounded = _cast(exact, shape.dtype)
    actual = call_kernels(shape, config, rounded)
    again = call_kernels(shape, config, rounded)
    plain = _reference(shape, rounded)
    errors, bounds = {}, {}
    for name, truth in _reference(shape, exact).items():
        errors[name] = _distance(actual[name], truth)
        # Operands of the kernels' matrix products are rounded once more than the reference's, and a parameter's
        # gradient is a few numbers whose errors are luck.
        factor = 2.5 if name in _PARAMETERS else 1.5
        bounds[name] = factor * _distance(plain[name], truth) + 2e-5
    return Result(entry, errors, bounds, all(torch.equal(t, again[name]) for name, t in actual.items()))


def problem(shape: Shape, length: int, channels: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
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

    if isinstance(shape, SSDShape):
        heads = channels // shape.headdim
        x, state = (1, length, heads, shape.headdim), (1, heads, shape.headdim, shape.d_state)
        tensors = {
            "x": randn(*x),
            "dt": randn(1, length, heads) - 1.0,
            "A": -randn(heads).abs() - 0.1,
            "B": randn(1, length, 1, shape.d_state),
            "C": randn(1, length, 1, shape.d_state),
            "D": randn(heads),
            "dt_bias": randn(heads),
            "state": randn(*state),
            "dy": randn(*x),
            "dfinal_state": randn(*state),
        }
    elif isinstance(shape, ConvShape):
        tensors = {
            "x": randn(1, length, channels),
            "weight": randn(channels, shape.width),
            "bias": randn(channels),
            "rows": randn(1, shape.width - 1, channels),
            "dy": randn(1, length, channels),
            "dnew_rows": randn(1, shape.width - 1, channels),
        }
    else:
        names = ("x", "z", "residual", "dy", "dtotal")
        tensors = {name: randn(length, shape.group_size) for name in names}
        tensors["weight"] = randn(shape.group_size)
    return _cast(tensors, dtype)


def call_kernels(shape: Shape, config: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and all gradients of a `problem` from the kernels."""
    if isinstance(shape, SSDShape):
        tensors: dict[str, Any] = {n: t[n] for n in _SSD_NAMES}
        y, state, saved = ssd.recompute(
            ssd.SSDInputs(**tensors, initial_state=t["state"], dt_softplus=True, config=config)
        )
        assert y is not None
        d = ssd.vjp(saved, t["dy"], t["dfinal_state"])
        gradients = {"d" + n: getattr(d, n) for n in _SSD_NAMES}
        return {"y": y, "final_state": state, **gradients, "dstate": d.initial_state}
    if isinstance(shape, ConvShape):
        inputs = conv.ConvInputs(t["x"], t["weight"], t["bias"], t["rows"], activation="silu", config=config)
        y, state = conv.forward(inputs)
        d = conv.vjp(inputs, t["dy"], t["dnew_rows"])
        gradients = {"dx": d.x, "dweight": d.weight, "dbias": d.bias, "drows": d.initial_state}
        return {"y": y, "new_rows": state, **{n: g for n, g in gradients.items() if g is not None}}
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


def _shapes() -> Iterator[Shape]:
    for dtype in _DTYPES:
        for headdim, d_state in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256)):
            yield SSDShape(dtype, headdim, d_state)
        for width in (2, 3, 4):
            yield ConvShape(dtype, width)
        for size in _GROUP_SIZES:
            yield NormShape(dtype, size)


def _small(config: Config) -> tuple[int, int]:
    """Length and channels of a problem of several ragged tiles."""
    if isinstance(config, SSDConfig):
        return 2 * config.chunk + config.chunk // 2 + 3, 256
    if isinstance(config, ConvConfig):
        tiles = (config.forward, config.backward)
        return 3 * max(tile.lanes * tile.run for tile in tiles) + 3, max(tile.channels for tile in tiles) + 8
    return config.backward_programs + 5, 0


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to(wide if n in _FLOAT32 else dtype) for n, t in tensors.items()}


def _reference(shape: Shape, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `call_kernels`, from plain PyTorch."""
    t = {n: v.detach().requires_grad_() for n, v in t.items()}
    if isinstance(shape, SSDShape):
        tensors: dict[str, Any] = {n: t[n] for n in _SSD_NAMES}
        y, state = ssd_reference.ssd(**tensors, initial_state=t["state"], dt_softplus=True)
        gradients = _gradients((y, state), (t["dy"], t["dfinal_state"]), {**tensors, "state": t["state"]})
        return {"y": y, "final_state": state, **gradients}
    if isinstance(shape, ConvShape):
        tensors = {n: t[n] for n in ("x", "weight", "bias", "rows")}
        y, state = conv_reference.causal_conv1d(
            t["x"], t["weight"], t["bias"], initial_state=t["rows"], activation="silu"
        )
        return {"y": y, "new_rows": state, **_gradients((y, state), (t["dy"], t["dnew_rows"]), tensors)}
    x, z, residual, weight = (t[n] for n in ("x", "z", "residual", "weight"))
    y = norm_reference.gated_rms_norm(x, z, weight)
    gated = _gradients((y,), (t["dy"],), {"x": x, "z": z, "weight": weight})
    normal, total = norm_reference.add_rms_norm(x, residual, weight)
    added = _gradients((normal, total), (t["dy"], t["dtotal"]), {"x": x, "residual": residual, "weight": weight})
    return {"y": y, **gated, "normal": normal, "total": total, **{"add " + n: g for n, g in added.items()}}


def _gradients(
    outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return {"d" + name: grad for name, grad in zip(inputs, grads, strict=True)}


def _distance(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())
