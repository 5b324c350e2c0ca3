"""Walks over modules that every call of a grid takes, while the GPU has nothing to do.

``nn.Module.modules`` and ``named_parameters`` are generators of generators: over the 600 modules of 64 layers a walk with
them takes milliseconds, and a call needs several. These read the tables that a module keeps.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def modules_of(root: nn.Module) -> tuple[nn.Module, ...]:
    """A module and all inside it, each once, in the order of ``nn.Module.modules``."""
    found: dict[nn.Module, None] = {}
    pending: list[nn.Module] = [root]
    while pending:
        module = pending.pop()
        if module in found:
            continue
        found[module] = None
        children: list[nn.Module | None] = list(vars(module)["_modules"].values())
        pending.extend(child for child in reversed(children) if child is not None)
    return tuple(found)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a module without those inside it."""
    for name, param in vars(module)["_parameters"].items():
        if param is not None:
            yield name, param


def own_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and buffers of a module without those inside it."""
    for name, buffer in vars(module)["_buffers"].items():
        if buffer is not None:
            yield name, buffer


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, then the buffers."""
    yield from own_parameters(module)
    yield from own_buffers(module)
