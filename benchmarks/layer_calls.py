"""The whole Mamba-2 layer at the 2.7B shape, as `bench_kernels` times it, and the least time that it can take.

The floor adds up the operators: each takes the larger of its bytes (inputs read once, outputs written once) over the
copy bandwidth and its tensor operations over the rate of a large matrix product, both measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import torch
from beside_mamba_ssm import D_MODEL, D_STATE, HEADDIM, HEADS

from magc_kernels.mamba2 import autograd as mamba2
from magc_kernels.mamba2.values import Keep, Mamba2Inputs, Mamba2Sizes, Mamba2Weights

D_INNER = HEADS * HEADDIM
CHANNELS = D_INNER + 2 * D_STATE
PROJECTION = D_INNER + CHANNELS + HEADS
_WIDTH = 2
"""Bytes of a bfloat16."""


def matrix_rate(time: Callable[[Callable[[], object]], float], size: int = 8192) -> float:
    """Operations per second of a large bfloat16 product of random matrices; `time` gives milliseconds of a call."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    return 2 * size**3 / (time(lambda: a @ b) / 1e3)


def floors(tokens: int, bandwidth: float, rate: float) -> dict[str, float]:
    """Least seconds of the layer's forward, recompute (which writes its chunk states) and backward."""
    inner, conv, steps = _WIDTH * D_INNER, _WIDTH * CHANNELS, _WIDTH * HEADS
    states = _WIDTH * HEADS * HEADDIM * D_STATE / 128

    def product(rows: int, columns: int) -> float:
        weights = _WIDTH * rows * columns / tokens
        return max((_WIDTH * (rows + columns) + weights) / bandwidth, 2 * rows * columns / rate)

    products = product(D_MODEL, PROJECTION) + product(D_INNER, D_MODEL)
    forward = products + (2 * conv + (conv + steps + inner) + 3 * inner) / bandwidth
    backward = 2 * products + (3 * conv + 2 * (conv + steps) + inner + states + 5 * inner) / bandwidth
    return {
        "forward": tokens * forward,
        "recompute": tokens * (forward + states / bandwidth),
        "backward": tokens * backward,
    }


def calls(length: int, batch: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Names, the floor they have, and calls: the layer, and the block with residual addition and norm around it."""
    torch.manual_seed(0)

    def rand(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (scale * torch.randn(*shape, device="cuda")).to(dtype)

    def parameter(data: torch.Tensor) -> torch.Tensor:
        return data.requires_grad_()

    f32 = torch.float32
    weights = Mamba2Weights(
        in_proj=parameter(rand(PROJECTION, D_MODEL, scale=D_MODEL**-0.5)),
        conv=parameter(rand(CHANNELS, 1, 4, scale=0.3)),
        dt_bias=parameter(torch.full((HEADS,), -4.0, device="cuda")),
        A_log=parameter(torch.rand(HEADS, device="cuda") * 2.7),
        D=parameter(torch.ones(HEADS, device="cuda")),
        out_proj=parameter(rand(D_MODEL, D_INNER, scale=D_INNER**-0.5)),
        conv_bias=parameter(rand(CHANNELS, scale=0.1)),
        norm=parameter(torch.ones(D_INNER, device="cuda")),
    )
    shape = (batch, length, D_MODEL)
    layer = Mamba2Inputs(
        rand(*shape),
        weights,
        Mamba2Sizes(HEADDIM, 1, D_STATE),
        conv_state=rand(batch, 3, CHANNELS),
        ssm_state=rand(batch, HEADS, HEADDIM, D_STATE, dtype=f32),
    )
    block_norm = parameter(torch.ones(D_MODEL, device="cuda"))
    block = replace(layer, weights=replace(weights, block_norm=block_norm), residual=rand(*shape, dtype=f32))
    dy, dresidual, dconv = rand(*shape), rand(*shape, dtype=f32), torch.randn_like(layer.conv_state)  # type: ignore[arg-type]
    dstate = torch.randn_like(layer.ssm_state)  # type: ignore[arg-type]
    for name, inputs, residual in (("layer", layer, None), ("block", block, dresidual)):
        yield f"{name} forward", "forward", lambda inputs=inputs: mamba2.forward(inputs)
        for keep in get_args(Keep):
            options: dict[str, Any] = {"keep": keep}
            yield (
                f"{name} recompute, keep {keep}",
                "recompute",
                lambda inputs=inputs, options=options: mamba2.recompute(inputs, **options),
            )
            saved = mamba2.recompute(inputs, **options)[1]
            yield (
                f"{name} backward, keep {keep}",
                "backward",
                lambda saved=saved, residual=residual: mamba2.vjp(saved, dy, residual, dconv, dstate),
            )
            del saved
