"""Launching of Triton kernels, and what they ask of their arguments. Requires the package `triton`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run `programs` programs of a Triton kernel on the current device."""
    kernel[(programs,)](*arguments, **constants, num_warps=num_warps)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability, which chooses among the shipped configurations; None in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def check_supported(what: str, dtype: torch.dtype, tensors: Iterable[object]) -> None:
    """Check the type that an operator computes with, and where its inputs are.

    Args:
        what: name of the operator in messages.
        dtype: of its main input.
        tensors: all inputs; what is not a tensor is passed over.

    Raises:
        TypeError: `dtype` is not float32, float16 or bfloat16.
        ValueError: the tensors are not all on one CUDA device (or, in Triton's interpreter, on the CPU).
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"the Triton {what} takes float32, float16 or bfloat16, got {dtype}; use impl='reference' for others"
        )
    devices = {t.device for t in tensors if isinstance(t, Tensor)}
    if len(devices) != 1 or not (next(iter(devices)).type == "cuda" or knobs.runtime.interpret):
        raise ValueError(
            f"the Triton {what} takes all its inputs on one CUDA device, got "
            f"{', '.join(sorted(map(str, devices)))}; use impl='reference' elsewhere"
        )


def refuse_double_backward() -> None:
    """Call first in the backward of an autograd function that cannot itself be differentiated.

    Raises:
        RuntimeError: gradients of gradients are being asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the Triton operators have no gradients of gradients (create_graph=True); use impl='reference' for those"
        )


def rows(x: Tensor) -> Tensor:
    """`x` with stride 1 in its last axis, as the kernels address it; a copy only if need be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n >= 1`."""
    return 1 << (n - 1).bit_length()
