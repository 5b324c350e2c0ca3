"""Where Triton kernels are tested: on the GPU, or in Triton's interpreter on a machine without one.

``tests/conftest.py`` switches the interpreter on before anything imports Triton. It computes in NumPy, exactly enough
for float32 and float16; bfloat16 products are wrong in it (triton-lang/triton issue 11584), so those are tested on a GPU
only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from magc.nn.operators import TRITON

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2]) < TRITON:
    pytest.skip("Triton is older than the kernels are for", allow_module_level=True)


@contextlib.contextmanager
def triton_test(*, small_tiles: bool = False) -> Iterator[None]:
    """Fill every uninitialised tensor with NaN; let the interpreter work with NumPy 2.4 and later, and faster.

    Args:
        small_tiles: of the convolution, in the interpreter only: it walks over a whole tile, however few tokens are in it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            _take_loop_bounds_from_tensors(patch)
            _patch_once_a_launch(patch)
            if small_tiles:
                _take_small_tiles(patch)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)


def _take_loop_bounds_from_tensors(patch: pytest.MonkeyPatch) -> None:
    """The interpreter holds a kernel's scalars as arrays of one element, which NumPy no longer takes for an int."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(interpreter, "_patch_lang_tensor", patched)


def _take_small_tiles(patch: pytest.MonkeyPatch) -> None:
    from magc_kernels.conv import _config

    tile = _config.ConvTile(lanes=4, run=4, channels=64, warps=1)
    patch.setattr(_config, "_DEFAULT", _config.ConvConfig(tile, tile))


def _patch_once_a_launch(patch: pytest.MonkeyPatch) -> None:
    """The interpreter puts its own functions into Triton's language at a launch, and once more at every call of a
    function in a kernel, which takes a third of its time and changes nothing.
    """
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    launch: Any = None
    done: set[int] = set()

    @functools.cache
    def languages(fn: Any) -> set[int]:
        return {id(value) for value in fn.__globals__.values() if value is language or value is language.core}

    def patched(fn: Any) -> Any:
        nonlocal launch
        running = launch is not None and launch._changes  # they are undone at the launch's end
        if running and languages(fn) <= done:
            return interpreter._LangPatchScope()
        scope = original(fn)
        if not running:
            launch = scope
            done.clear()
        done.update(languages(fn))
        return scope

    patch.setattr(interpreter, "_patch_lang", patched)
