"""Where Triton kernels are tested: on the GPU, or in Triton's interpreter on a machine without one.

``tests/conftest.py`` switches the interpreter on before anything imports Triton. It computes in NumPy, exactly enough
for float32 and float16; bfloat16 products are wrong in it (triton-lang/triton issue 11584), so those are tested on a GPU
only.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


@contextlib.contextmanager
def triton_test() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, and let the interpreter work with NumPy 2.4 and later."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            _take_loop_bounds_from_tensors(patch)
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
