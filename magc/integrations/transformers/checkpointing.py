"""transformers' own switch for checkpointing, with magc behind it.

After `install`, ``model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"method": "magc", "budget": "24GiB"})``
wraps the model, and so do the training arguments of the same names, for programs that are driven by a configuration file.
transformers hands these settings to `torch.utils.checkpoint` and has no place to register another method, so `install`
replaces the methods on `PreTrainedModel`. Where the model is at hand, ``magc.wrap(model, budget=...)`` does the same.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

from magc.errors import InputError
from magc.integrations.wrap import find, unwrap, wrap
from magc.plan import Plan

_STEMS = ("activation_checkpointing", "gradient_checkpointing")  # the second is the older name of the first
_ORIGINAL = "__magc_original__"


def install() -> None:
    """Let transformers' checkpointing switches know ``"method": "magc"``; other methods work as before.

    The settings beside ``method`` are those of `magc.wrap`; ``plan`` may be a dict of `Plan`'s fields, and
    ``use_reentrant``, which is about torch's own checkpointing, changes nothing. Switching
    checkpointing off unwraps the model. Calling this twice changes nothing.
    """
    base = _base()
    for stem in _STEMS:
        for name, replace in ((f"{stem}_enable", _enable), (f"{stem}_disable", _disable)):
            original: Any = getattr(base, name, None)
            if original is not None and not hasattr(original, _ORIGINAL):
                replacement = replace(original, f"{stem}_kwargs")
                setattr(replacement, _ORIGINAL, original)
                setattr(base, name, replacement)


def uninstall() -> None:
    """Undo `install`. Wrapped models stay wrapped."""
    base = _base()
    for stem in _STEMS:
        for name in (f"{stem}_enable", f"{stem}_disable"):
            original: Any = getattr(getattr(base, name, None), _ORIGINAL, None)
            if original is not None:
                setattr(base, name, original)


def _base() -> Any:
    return cast(Any, importlib.import_module("transformers.modeling_utils")).PreTrainedModel


def _enable(original: Callable[..., Any], argument: str) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def enable(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        settings = dict(arguments.get(argument) or {})
        if settings.pop("method", None) != "magc":
            return original(self, *args, **kwargs)
        beside = {**arguments, **arguments.get("kwargs", {})}
        if beside.get("every_n_layers", 1) != 1 or beside.get("offload", False):
            raise InputError(
                'every_n_layers and offload are settings of transformers\' own checkpointing; with {"method": "magc"} '
                "give a budget (and a host_budget to offload), from which magc plans what is kept and where"
            )
        settings.pop("use_reentrant", None)  # boilerplate of many programs; of torch's checkpointing alone
        if isinstance(settings.get("plan"), dict):
            settings["plan"] = Plan(**settings["plan"])
        wrap(self, **settings)
        return None

    return enable


def _disable(original: Callable[..., Any], argument: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def disable(self: Any) -> Any:
        if find(self) is not None:
            unwrap(self)
        return original(self)

    return disable
