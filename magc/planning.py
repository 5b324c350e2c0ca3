"""Plan for the user's own layers: measure them on an example, then decide within budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from magc.cost import CostModel
from magc.distributed.fsdp import gathered
from magc.errors import BudgetError, InputError
from magc.estimate import estimate
from magc.forecast import Forecast
from magc.plan import Plan
from magc.planner import Planner
from magc.profile import profile, sample_lengths
from magc.request import Request, make_request, make_schedule
from magc.runners.cache import GraphCache
from magc.runners.choice import Runner, require_runner
from magc.stack import Stage, build_stack
from magc.tree import PyTree
from magc.units import format_bytes, parse_bytes

Layer = Callable[..., Any]
Progress = Callable[[str], None]


def plan(
    layers: Sequence[Layer],
    example: PyTree,
    seq_len: int | None = None,
    *,
    budget: int | str,
    host_budget: int | str | None = None,
    disk: bool = False,
    stem: Layer | None = None,
    head: Layer | None = None,
    targets: PyTree = None,
    seq_dim: int = 1,
    accumulate: torch.dtype = torch.float32,
    runner: Runner = "eager",
    progress: Progress | None = None,
    **side: PyTree,
) -> Plan:
    """The fastest plan for training ``layers`` within a memory budget.

    Args:
        layers: ``y, new_state = layer(x, state, **side)``, in the training mode, dtype and device they will train in.
        example: an input with the right batch size and any length, a few hundred tokens or more (longer segments are
            extrapolated); ``requires_grad`` as in training. With a stem, the stem's input.
        seq_len: tokens to plan for; None is the example's length.
        budget: device memory of one forward and backward beyond what is allocated before (see `GridCheckpoint`).
        host_budget: host memory for offloaded checkpoints; None for none.
        disk: whether checkpoints may go to disk.
        stem: as in `GridCheckpoint.loss`.
        head: as in `GridCheckpoint.loss`; give ``targets`` for the example with it.
        targets: the example's targets.
        seq_dim: the sequence axis.
        accumulate: dtype in which parameter gradients are summed over cells.
        runner: of cells, as in `GridCheckpoint`: with ``"cuda-graph"`` replays are timed, and what captured cells take is
            counted.
        progress: told what is being measured.
        side: per-token inputs of the layers, for the example.

    Returns:
        The plan, with its forecast: ``print(plan)``, ``plan.explain()``, ``plan.plot(path)``.

    Raises:
        BudgetError: nothing fits; says the smallest budget that would.
        InputError, LayerContractError: as for a call.
    """
    with gathered((stem, *layers, head), layers) as parameters:
        request = _example_request(layers, example, side, stem, head, targets, seq_dim, accumulate, runner)
        held = parameters.gathered_bytes
        tokens = seq_len or request.inputs.length
        return _plan(request, tokens, parse_bytes(budget) - held, _host(host_budget), disk, progress, held)


def forecast(
    given: Plan,
    layers: Sequence[Layer],
    example: PyTree,
    seq_len: int | None = None,
    *,
    stem: Layer | None = None,
    head: Layer | None = None,
    targets: PyTree = None,
    seq_dim: int = 1,
    accumulate: torch.dtype = torch.float32,
    runner: Runner = "eager",
    progress: Progress | None = None,
    **side: PyTree,
) -> Plan:
    """A plan of your own, with a prediction of its memory and time on your layers.

    The layers are measured at the plan's own segment lengths where the example is long enough. Arguments as in `plan`.

    Returns:
        The plan with a forecast.

    Raises:
        PlanError: the plan does not fit the layers or the length.
    """
    with gathered((stem, *layers, head), layers):
        request = _example_request(layers, example, side, stem, head, targets, seq_dim, accumulate, runner)
        return _forecast(given, request, seq_len or request.inputs.length, progress)


def _forecast(given: Plan, request: Request, length: int, progress: Progress | None) -> Plan:
    axis = given.grid(len(request.stack.layers), length).tokens
    wanted = {axis.part_length(0), axis.part_length(axis.parts - 1)}
    if isinstance(axis.size, tuple):
        wanted = set(axis.size)
    lengths = {tokens for tokens in wanted if tokens <= request.inputs.length}
    if lengths != wanted:
        lengths |= set(sample_lengths(request.inputs.length, request.device))
    costs = profile(request, sorted(lengths), progress=progress)
    return with_forecast(given, costs, length, lowest_layer(request), notes=stack_notes(request))


def with_forecast(given: Plan, costs: CostModel, seq_len: int, lowest: int = 0, *, notes: tuple[str, ...] = ()) -> Plan:
    """A plan with the prediction of a cost model."""
    found = estimate(given, costs, seq_len, lowest)
    return given.with_forecast(Forecast(costs, seq_len, lowest, found, notes=notes))


def with_notes(given: Plan, notes: tuple[str, ...]) -> Plan:
    """A plan whose forecast, if it has one, says more of its numbers."""
    if given.forecast is None:
        return given
    return given.with_forecast(replace(given.forecast, notes=(*given.forecast.notes, *notes)))


def stack_notes(request: Request) -> tuple[str, ...]:
    """The runner of a request's cells, and the implementations behind the layers that say which they use."""
    used = Counter(name for stage in request.stack.layers for name in set(_implementations(stage, request.device)))
    layers = len(request.stack.layers)
    shown = ", ".join(f"{name} in {count} of {layers} layers" for name, count in used.items())
    how = "cells run eagerly" if request.graphs is None else "cells are replayed as CUDA graphs"
    return (how, *([f"implementation of magc.nn's operators: {shown}"] if used else []))


def _implementations(stage: Stage, device: torch.device) -> Iterator[str]:
    """What the stage's modules say of themselves (`magc.nn.Mamba2.implementation`)."""
    for module in stage.modules:
        if type(module).__module__.startswith("magc.nn.") and hasattr(module, "implementation"):
            choice = cast(Any, module).implementation(device)
            why = f", since {choice.reason}" if choice.reason else ""
            yield f"{choice.name!r}{' (plain PyTorch' + why + ')' if choice.name == 'reference' else ''}"


def plan_request(
    request: Request, *, budget: int, host_budget: int | None, use_disk: bool, seq_len: int, gathered_bytes: int
) -> Plan:
    """A plan for one call, measured on its own inputs (`GridCheckpoint` without a plan).

    ``budget`` is what is left beside the ``gathered_bytes`` of parameters that FSDP gathered for the call.
    """
    return _plan(request, seq_len, budget, host_budget or 0, use_disk, None, gathered_bytes)


def lowest_layer(request: Request) -> int:
    """The lowest layer that needs a gradient; 0 also when the input or the stem does."""
    with torch.enable_grad():
        return min(make_schedule(request, Plan(layers=1)).lowest, len(request.stack.layers) - 1)


def _plan(
    request: Request, seq_len: int, budget: int, host: int, disk: bool, progress: Progress | None, gathered_bytes: int
) -> Plan:
    if seq_len < 1:
        raise InputError(f"seq_len={seq_len}: a sequence has at least one token")
    held = f"{format_bytes(gathered_bytes)} of parameters that FSDP gathers for a pass"
    if gathered_bytes and budget <= 0:
        raise BudgetError(
            f"a budget of {format_bytes(budget + gathered_bytes)} leaves nothing beside the {held}; give more"
        )
    notes = (*stack_notes(request), *([f"beside the budget: {held}"] if gathered_bytes else []))
    return with_notes(_measured_plan(request, seq_len, budget, host, disk, progress), notes)


def _measured_plan(
    request: Request, seq_len: int, budget: int, host: int, disk: bool, progress: Progress | None
) -> Plan:
    """Measure and plan; before a budget is refused, also with longer segments measured than fit into it.

    A plan whose segments are longer than what was measured is extrapolated, and what grows faster than in proportion would
    exceed it: its length is measured too, in steps, as far as a profile's time allows, and the choice made again.
    """
    limit, longest, lowest = budget, 0, lowest_layer(request)
    lengths: list[int] | None = None
    while True:
        costs = profile(request, lengths, limit_bytes=limit if lengths is None else None, progress=progress)
        planner = Planner(costs, seq_len, lowest_layer=lowest, host=host > 0, disk=disk)
        try:
            found = planner.plan(budget, host)
        except BudgetError:
            if costs.longest_sample == longest:
                raise
            longest, limit = costs.longest_sample, planner.smallest_budget(host)
            continue
        tokens = found.grid(costs.n_layers, seq_len).tokens.part_length(0)
        stopped = lengths is not None and costs.longest_sample < lengths[-1]
        if stopped or not costs.longest_sample < tokens <= request.inputs.length:
            return found
        lengths = [*(sample.tokens for sample in costs.stages[0].samples), *_steps(costs.longest_sample, tokens)]


def _steps(longest: int, wanted: int) -> list[int]:
    """Lengths to measure on the way from the longest so far to one that is wanted, which is the last."""
    between = (longest << 2 * k for k in range(1, wanted.bit_length()))
    return [*(step for step in between if step < wanted), wanted]


def _host(host_budget: int | str | None) -> int:
    return 0 if host_budget is None else parse_bytes(host_budget)


def _example_request(
    layers: Sequence[Layer],
    example: PyTree,
    side: dict[str, PyTree],
    stem: Layer | None,
    head: Layer | None,
    targets: PyTree,
    seq_dim: int,
    accumulate: torch.dtype,
    runner: Runner,
) -> Request:
    stack = build_stack(layers, stem=stem, head=head, seq_dim=seq_dim)
    with torch.enable_grad():
        request = make_request(stack, example, None, side, targets=targets, accumulate=accumulate)
    require_runner(runner, request.device)
    return replace(request, graphs=GraphCache(request.device)) if runner == "cuda-graph" else request
