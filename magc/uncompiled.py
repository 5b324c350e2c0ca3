"""Code that `torch.compile` must not trace: a grid's calls, which plan, measure and keep books between the layers.

Layers that were compiled themselves stay so inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function as it is, also where a model around it is compiled.

    As ``torch.compiler.disable``, but that imports a compiler (a second of time) where it is written, and this where the
    function is first called, as torch's optimizers do.
    """
    return cast(Any, torch)._disable_dynamo(function)
