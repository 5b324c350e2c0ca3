"""The grid as one autograd function: parameters go in, their gradients come out once, after all cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from magc.distributed.fsdp import UNGATHERED, Gathered
from magc.engine import Execution, ForwardResult
from magc.errors import DoubleBackwardError
from magc.request import Request
from magc.schedule import Schedule
from magc.tree import Flat, is_differentiable


class _Grid(torch.autograd.Function):
    """Inputs: the tensors of x, of the initial states, then the parameters, where FSDP reduces their gradients the tokens
    of its units instead. Outputs: the tensors of y, then of final states.
    """

    @staticmethod
    def forward(
        ctx: Any, request: Request, schedule: Schedule, gathered: Gathered, forms: list[Flat], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        execution = Execution(request, schedule)
        result = execution.forward()
        ctx.execution, ctx.request, ctx.gathered = execution, request, gathered
        # Their versions are checked when the backward unpacks them: a parameter updated in between is an error.
        ctx.save_for_backward(*tensors)
        ctx.tokens = len(gathered.tokens)
        ctx.set_materialize_grads(False)
        forms.extend((result.y, *result.states))
        outputs = tuple(tensor for form in forms for tensor in form.tensors)
        constant = [tensor for tensor in outputs if not is_differentiable(tensor)]
        if request.stack.head is not None:
            constant += result.y.tensors[1:]  # the count
        ctx.mark_non_differentiable(*constant)
        ctx.masks = [_mask(form) for form in forms]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "gradients of gradients (create_graph=True) do not exist through a grid checkpoint: its backward "
                "recomputes without building a graph. Use plain layers for the part that needs them"
            )
        request: Request = ctx.request
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        execution: Execution = ctx.execution
        gathered: Gathered = ctx.gathered
        gathered.gather()
        with gathered.quiet():
            if execution.spent:
                # retain_graph=True: the checkpoints are gone, the inputs are not.
                execution.require_unchanged()
                execution = execution.rewind()
            per_form = _split(ctx.masks, grads)
            result = execution.backward(per_form[0], per_form[1:])
        x_grads = [grad for leaf, grad in zip(request.inputs.flat.leaves, result.x, strict=True) if leaf is not None]
        state_grads = [
            grad
            for state, state_grad in zip(request.states, result.states, strict=True)
            if state is not None
            for leaf, grad in zip(state.leaves, state_grad, strict=True)
            if leaf is not None
        ]
        gathered.hand_over(request.stack.params, result.params)
        owned = gathered.owned()
        own_grads = [
            grad for param, grad in zip(request.stack.params, result.params, strict=True) if id(param) not in owned
        ]
        return (
            None,
            None,
            None,
            None,
            *x_grads,
            *state_grads,
            *own_grads,
            *map(torch.zeros_like, saved[len(saved) - ctx.tokens :]),
        )


def _mask(form: Flat) -> tuple[bool, ...]:
    """Which leaves are tensors."""
    return tuple(leaf is not None for leaf in form.leaves)


def _split(masks: list[tuple[bool, ...]], tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    """Deal positional tensors to leaves, None where a leaf is none."""
    source = iter(tensors)
    return [tuple(next(source) if present else None for present in mask) for mask in masks]


def apply_grid(request: Request, schedule: Schedule, gathered: Gathered = UNGATHERED) -> ForwardResult:
    """Run a request whose parameters are gathered; differentiable when its schedule has a backward."""
    if schedule.lowest >= schedule.grid.groups:
        with torch.no_grad():
            execution = Execution(request, schedule)
            try:
                return execution.forward()
            finally:
                execution.close()
    forms: list[Flat] = []
    states = [tensor for state in request.states if state is not None for tensor in state.tensors]
    apply = cast(Callable[..., tuple[Tensor, ...]], _Grid.apply)  # pyright: ignore[reportUnknownMemberType]
    owned = gathered.owned()
    own = [param for param in request.stack.params if id(param) not in owned]
    outputs = apply(request, schedule, gathered, forms, *request.inputs.flat.tensors, *states, *own, *gathered.tokens)
    dealt = _split([_mask(form) for form in forms], outputs)
    flats = [form.with_leaves(leaves) for form, leaves in zip(forms, dealt, strict=True)]
    return ForwardResult(flats[0], tuple(flats[1:]))
