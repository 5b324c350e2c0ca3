"""`wrap`: a model keeps its class, signature, outputs and state dict, and its training forward runs on a grid.

Only instances change: a `GridForward` is set as the ``forward`` of the model (and of the part of it that holds the
layers), and taken away by `unwrap`. No module is renamed or replaced and no parameter is copied, so optimizers, state
dicts and ``save_pretrained`` see what they saw before. A copy or a pickle of a wrapped model is wrapped too, and plans
afresh.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from magc.errors import InputError
from magc.integrations.forward import Adapted, GridForward, Settings, Unbound, Wrapped
from magc.integrations.registry import adapter_of
from magc.nn.operators import Impl, check_impl
from magc.plan import PlanOrRule
from magc.runners.choice import Runner

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    *,
    budget: int | str | None = None,
    plan: PlanOrRule | None = None,
    host_budget: int | str | None = None,
    disk_dir: str | None = None,
    accumulate: torch.dtype = torch.float32,
    runner: Runner = "eager",
    logits: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: Impl = "auto",
    plan_group: ProcessGroup | None = None,
) -> Model:
    """Let a model's training forward run on a grid; everything else of it stays as it is.

    A call runs on the grid when grad mode is on and no cache is in use; under ``torch.no_grad()``, with a cache, and in
    ``generate`` the model's own code runs. With ``labels`` the head and the cross-entropy are part of the grid: the
    output's loss is exact and its ``logits`` are None, since the logits of the whole sequence never exist.

    Args:
        model: an instance of a class that `magc.integrations.registry.supported` names. One that is wrapped already is
            wrapped anew.
        budget: as in `GridCheckpoint`; give this or ``plan``.
        plan: as in `GridCheckpoint`.
        host_budget: as in `GridCheckpoint`.
        disk_dir: as in `GridCheckpoint`.
        accumulate: as in `GridCheckpoint`.
        runner: as in `GridCheckpoint`.
        logits: return logits beside a loss. They, and what the loss keeps of them, are outside the grid and the budget.
        label_smoothing: of the loss inside the grid: the share of the probability that is spread evenly over the
            vocabulary, 0 to 1. The model's own code, in evaluation say, knows nothing of it.
        z_loss: weight of a term of the loss inside the grid: the square of the log of the softmax's denominator, of each
            target's row (PaLM, arXiv 2204.02311, section 5).
        impl: implementation of the layers' operators, see `magc.nn.operators.Impl`.
        plan_group: as in `GridCheckpoint`.

    Returns:
        The same object.

    Raises:
        InputError: no adapter for this class, its forward was replaced by something else, or there is no such
            ``impl`` or ``runner``, or the model has no loss that ``label_smoothing`` or ``z_loss`` could be part of.
        LayerContractError: the model is bidirectional, or parts of it are not what the adapter knows.
        PlanError: neither plan nor budget given, or both.
    """
    settings = Settings(
        plan=plan,
        budget=budget,
        host_budget=host_budget,
        disk_dir=disk_dir,
        accumulate=accumulate,
        runner=runner,
        logits=logits,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        impl=check_impl(impl),
        plan_group=plan_group,
    )
    before = find(model)
    if before is not None:
        unwrap(model)
    try:
        adapted = _adapt(model, settings)
    except Exception:
        for forward in () if before is None else before.forwards:
            vars(forward.module)["forward"] = forward
        raise
    wrapping = Wrapped(model, adapted.grid, adapted.notes, adapted.forwards)
    for forward in adapted.forwards:
        forward.wrapping = wrapping
        vars(forward.module)["forward"] = forward
    return model


def unwrap(model: Model) -> Model:
    """Undo `wrap`: the instance's forward is its class's again.

    Returns:
        The same object.

    Raises:
        InputError: the model is not wrapped, is part of a model that is, or had its forward replaced afterwards.
    """
    wrapping = wrapped(model)
    if wrapping.model is not model:
        raise InputError(
            f"this {type(model).__name__} was wrapped as part of a {type(wrapping.model).__name__}; unwrap that"
        )
    for forward in wrapping.forwards:
        now = vars(forward.module).get("forward")
        if now is not forward and getattr(now, "__func__", None) is not forward.__func__:
            raise InputError(
                f"the forward of {type(forward.module).__name__} was replaced after magc.wrap (by accelerate, for instance); "
                f"undo that first, e.g. with accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            )
    for forward in wrapping.forwards:
        del vars(forward.module)["forward"]
    return model


def wrapped(model: nn.Module) -> Wrapped:
    """What `wrap` did to a model: its grid, plan and report (`Wrapped.explain`).

    Raises:
        InputError: the model is not wrapped.
    """
    wrapping = find(model)
    if wrapping is None:
        raise InputError(f"this {type(model).__name__} is not wrapped; magc.wrap(model, budget=...) does it")
    return wrapping


def find(model: nn.Module) -> Wrapped | None:
    """As `wrapped`, None if the model is not wrapped; sees through forwards that others set on top."""
    forward: object = vars(model).get("forward")
    while forward is not None and not isinstance(forward, GridForward):
        if isinstance(forward, Unbound):
            forward = forward.bound
        else:
            forward = forward.__func__ if isinstance(forward, MethodType) else getattr(forward, "__wrapped__", None)
    return None if forward is None else forward.wrapping


def _adapt(model: nn.Module, settings: Settings) -> Adapted:
    adapter = adapter_of(model)
    if "forward" not in vars(model):
        adapted = adapter(model, settings)
        replaced = [forward.module for forward in adapted.forwards if "forward" in vars(forward.module)]
        if not replaced:
            if (settings.label_smoothing or settings.z_loss) and not adapted.has_loss:
                raise InputError(
                    f"label_smoothing and z_loss are parts of a language model's loss, and a {type(model).__name__} computes "
                    f"none. Wrap the model around it that takes labels, or leave them out"
                )
            return adapted
    raise InputError(
        f"{type(model).__name__}, or a part of it, has a forward that was set on this instance (by accelerate's hooks or "
        f"another wrapper). Undo that and wrap first; what comes after may set its own on top"
    )
