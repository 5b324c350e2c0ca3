"""mamba-ssm's Mamba-2 kernels and layer, timed and checked in the same process as ours; used by `bench_kernels`.

Their sources are taken from the installed package or from a folder that holds `mamba_ssm/`, without running its
`__init__`, which wants compiled extensions that Mamba-2 does not use. Their kernels are autotuned at first use;
compiling all candidates one after another takes minutes, so several processes compile a share each into Triton's
disk cache before.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import multiprocessing
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from magc_kernels.conv import autograd as conv
from magc_kernels.ssd import autograd as ssd
from magc_kernels.ssd import reference

D_MODEL, HEADS, HEADDIM, D_STATE = 2560, 80, 64, 128
CHUNK = 256
"""mamba-ssm's default."""
WARM_LENGTH = 4096
"""Long enough that every number which Triton specialises on is as for longer inputs."""


@dataclass(frozen=True)
class MambaSSM:
    """What is compared."""

    scan_forward: Callable[..., Any]
    scan_backward: Callable[..., Any]
    layer: type[torch.nn.Module]
    own_conv: bool
    """Whether the package causal_conv1d is there; else our convolution stands in for it."""


def load(path: str | None) -> MambaSSM:
    """Import from the folder `path`, or from the installed package.

    Raises:
        ImportError: mamba-ssm or something it needs is missing.
    """
    if path is None:
        found = importlib.util.find_spec("mamba_ssm")
        if found is None or not found.submodule_search_locations:
            raise ImportError("mamba_ssm is not installed; name a folder that holds its sources")
        places = list(found.submodule_search_locations)
    else:
        places = [str(Path(path) / "mamba_ssm")]
    package = types.ModuleType("mamba_ssm")
    package.__path__ = places
    sys.modules["mamba_ssm"] = package
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    layer: Any = importlib.import_module("mamba_ssm.modules.mamba2")
    own_conv = layer.causal_conv1d_fn is not None
    if not own_conv:
        layer.causal_conv1d_fn = _our_conv
    return MambaSSM(
        combined._mamba_chunk_scan_combined_fwd, combined._mamba_chunk_scan_combined_bwd, layer.Mamba2, own_conv
    )


def _our_conv(x_BCL: Tensor, weight: Tensor, *, bias: Tensor, activation: Literal["silu"], seq_idx: None) -> Tensor:
    return conv.causal_conv1d(x_BCL.transpose(1, 2), weight, bias, activation=activation)[0].transpose(1, 2)


def scan_inputs(length: int, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[ssd.SSDInputs, Tensor, Tensor]:
    """Inputs of a scan as a Mamba-2 2.7B layer has them, and gradients of its outputs."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float64, generator=generator)

    wide = torch.promote_types(dtype, torch.float32)
    inner = HEADS * HEADDIM
    x, B, C = rand(batch, length, inner + 2 * D_STATE).to(dtype).split([inner, D_STATE, D_STATE], -1)
    steps = torch.exp(torch.linspace(-6.9, -2.3, HEADS, device="cuda", dtype=torch.float64))  # 0.001 to 0.1
    inputs = ssd.SSDInputs(
        x.unflatten(-1, (HEADS, HEADDIM)),
        rand(batch, length, HEADS).to(dtype),
        -torch.linspace(1.0, 16.0, HEADS, device="cuda", dtype=wide),
        B.unsqueeze(2),
        C.unsqueeze(2),
        D=rand(HEADS).to(wide),
        dt_bias=torch.log(torch.expm1(steps)).to(wide),
        initial_state=rand(batch, HEADS, HEADDIM, D_STATE).to(wide),
        dt_softplus=True,
    )
    return inputs, rand(batch, length, HEADS, HEADDIM).to(dtype), rand(batch, HEADS, HEADDIM, D_STATE).to(wide)


NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def ours(inputs: ssd.SSDInputs, dy: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of our kernels."""
    y, final, saved = ssd.recompute(inputs)
    assert y is not None
    d = ssd.vjp(saved, dy, dfinal)
    return {"y": y, "final": final, **{"d" + n: getattr(d, n) for n in NAMES}}


def theirs(package: MambaSSM, inputs: ssd.SSDInputs, dy: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of mamba-ssm's."""
    arguments = (inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C)
    options: dict[str, Any] = {
        "D": inputs.D,
        "dt_bias": inputs.dt_bias,
        "initial_states": inputs.initial_state,
        "dt_softplus": True,
    }
    y, _, _, _, _, final = package.scan_forward(*arguments, CHUNK, **options)
    dx, ddt, dA, dB, dC, dD, _, dbias, dinitial, *_ = package.scan_backward(
        dy, *arguments, y, CHUNK, dfinal_states=dfinal, **options
    )
    gradients = dict(zip(NAMES, (dx, ddt, dA, dB, dC, dD, dbias, dinitial), strict=True))
    return {"y": y, "final": final, **{"d" + n: g for n, g in gradients.items()}}


def plain(inputs: ssd.SSDInputs, dy: Tensor, dfinal: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the plain reference with all tensors taken to `dtype`, or as they are."""
    tensors = {n: getattr(inputs, n).detach().to(dtype=dtype).requires_grad_() for n in NAMES}
    y, final = reference.ssd(**tensors, dt_softplus=True)
    grads = torch.autograd.grad((y, final), list(tensors.values()), (dy.to(y.dtype), dfinal.to(final.dtype)))
    return {"y": y.detach(), "final": final.detach(), **{"d" + n: g for n, g in zip(NAMES, grads, strict=True)}}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def errors(package: MambaSSM, length: int) -> list[tuple[str, float, float]]:
    """Relative errors of ours and theirs against float64 on the same bfloat16 inputs, by tensor."""
    inputs, dy, dfinal = scan_inputs(length, 1, torch.bfloat16)
    truth = plain(inputs, dy, dfinal, torch.float64)
    our, their = ours(inputs, dy, dfinal), theirs(package, inputs, dy, dfinal)
    return [(name, relative_l2(our[name], e), relative_l2(their[name], e)) for name, e in truth.items()]


def layer_calls(package: MambaSSM, length: int, batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward with backward, of their layer: float32 weights under bfloat16 autocast."""
    layer = package.layer(D_MODEL, use_mem_eff_path=package.own_conv, chunk_size=CHUNK, device="cuda")
    hidden = torch.randn(batch, length, D_MODEL, device="cuda", dtype=torch.bfloat16)
    leaf = hidden.clone().requires_grad_()
    grad = torch.randn_like(hidden)
    wanted = [leaf, *layer.parameters()]

    def forward() -> object:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return layer(hidden)

    def both() -> object:
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(leaf)
        return torch.autograd.grad(out, wanted, grad.to(out.dtype))

    return forward, both


def compare(
    path: str | None,
    lengths: list[int],
    batch: int,
    time: Callable[[Callable[[], object]], float],
    *,
    processes: int = 12,
    error_length: int = WARM_LENGTH,
) -> dict[str, Any]:
    """Time and check mamba-ssm beside our scan, print it, and return it for a results file.

    Args:
        path: see `load`.
        lengths: tokens in a row.
        batch: rows.
        time: milliseconds of a call.
        processes: that compile their kernels beforehand.
        error_length: tokens in the input on which errors are taken.
    """
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(partial(_compile_share, path, processes), range(processes), chunksize=1)
    package = load(path)
    rows = []
    for length in lengths:
        inputs, dy, dfinal = scan_inputs(length, batch, torch.bfloat16)
        _, _, saved = ssd.recompute(inputs, output=False)
        arguments = (inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C)
        options: dict[str, Any] = {"D": inputs.D, "dt_bias": inputs.dt_bias, "initial_states": inputs.initial_state}
        options["dt_softplus"] = True
        y = package.scan_forward(*arguments, CHUNK, **options)[0]

        def their_backward(
            arguments: Any = arguments, options: Any = options, y: Tensor = y, dy: Tensor = dy, dfinal: Tensor = dfinal
        ) -> object:
            return package.scan_backward(dy, *arguments, y, CHUNK, dfinal_states=dfinal, **options)

        def our_backward(inputs: ssd.SSDInputs = inputs, dy: Tensor = dy, dfinal: Tensor = dfinal) -> object:
            return ssd.vjp(ssd.recompute(inputs, output=False)[2], dy, dfinal)

        calls: list[tuple[str, Callable[[], object] | None, Callable[[], object]]] = [
            (
                "scan forward",
                partial(ssd.forward, inputs),
                partial(package.scan_forward, *arguments, CHUNK, **options),
            ),
            ("scan backward, states kept", partial(ssd.vjp, saved, dy, dfinal), their_backward),
            ("scan backward, states redone", our_backward, their_backward),
        ]
        forward, both = layer_calls(package, length, batch)
        calls += [("their layer forward", None, forward), ("their layer forward and backward", None, both)]
        for name, our, their in calls:
            rows.append((name, length, None if our is None else time(our) * 1e3, time(their) * 1e3))
    print(f"\n{'beside mamba-ssm':<36}{'length':>8}{'ours us':>10}{'theirs us':>11}{'ratio':>8}")
    for name, length, our_us, their_us in rows:
        shown = f"{'':>10}" if our_us is None else f"{our_us:>10.1f}"
        ratio = "" if our_us is None else f"{their_us / our_us:.2f}"
        print(f"{name:<36}{length:>8}{shown}{their_us:>11.1f}{ratio:>8}")
    if not package.own_conv:
        print("causal_conv1d is not installed: our convolution stands in for it in their layer")
    checked = errors(package, error_length)
    print(f"\n{'relative error, ' + str(error_length) + ' tokens':<36}{'ours':>10}{'theirs':>11}{'ratio':>8}")
    for name, our_error, their_error in checked:
        print(f"{name:<36}{our_error:>10.2e}{their_error:>11.2e}{our_error / their_error:>8.2f}")
    return {"times": rows, "errors": checked, "own_conv": package.own_conv}


def _compile_share(path: str | None, shares: int, share: int) -> None:
    """Compile every `shares`-th candidate of their kernels, and run none."""
    from triton.runtime.autotuner import Autotuner

    package = load(path)
    turn = itertools.count()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.best_config = config
            if next(turn) % shares == share:
                self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})

    Autotuner.run = run
    inputs, dy, dfinal = scan_inputs(WARM_LENGTH, 1, torch.bfloat16)
    theirs(package, inputs, dy, dfinal)
    # A layer's scan starts from no state and its inputs are parts of one projection.
    for call in layer_calls(package, WARM_LENGTH, 1):
        call()
