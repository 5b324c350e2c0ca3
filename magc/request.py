"""One call of a grid: its inputs checked and put together, and the schedule that a plan makes for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from magc.accumulate import GradAccumulator
from magc.errors import InputError, StateError
from magc.pinned import PinnedPool
from magc.plan import Plan
from magc.runners.cache import GraphCache
from magc.schedule import Action, Schedule
from magc.source import SegmentSource, is_segmented
from magc.stack import Stack
from magc.tree import Flat, PyTree, describe, flatten, is_differentiable
from magc.walk import own_tensors

Observer = Callable[[Action], None]
"""Called with each action after it was carried out."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a grid.

    Attributes:
        stack: the stages.
        inputs: the stack's input (or the stem's), cut into segments on demand.
        side: per-token side inputs.
        targets: the head's targets; None without a head.
        states: initial state of each layer, None for the start of a sequence.
        needs_x: leaf by leaf, whether the input needs a gradient.
        needs_states: the same for each initial state.
        device: where cells run.
        accumulate: dtype in which parameter gradients are summed over cells.
        disk_dir: where the disk store makes its directory; None for the system's temporary folder.
        observer: sees every action.
        pool: pinned memory to reuse; None lets each call pin its own.
        graphs: captured cells to replay and add to; None runs every cell eagerly.
        accumulator: what makes the sums of parameter gradients.
        grad: whether grad mode was on in the call.
    """

    stack: Stack
    inputs: SegmentSource
    side: Mapping[str, SegmentSource]
    targets: SegmentSource | None
    states: tuple[Flat | None, ...]
    needs_x: tuple[bool, ...]
    needs_states: tuple[tuple[bool, ...], ...]
    device: torch.device
    accumulate: torch.dtype
    disk_dir: str | None = None
    observer: Observer | None = None
    pool: PinnedPool | None = None
    graphs: GraphCache | None = None
    accumulator: Callable[..., GradAccumulator] = GradAccumulator
    grad: bool = True


def make_request(
    stack: Stack,
    x: PyTree,
    state: Sequence[PyTree] | None,
    side: Mapping[str, PyTree],
    *,
    targets: PyTree = None,
    accumulate: torch.dtype = torch.float32,
    disk_dir: str | None = None,
    check_finite: bool = False,
    observer: Observer | None = None,
) -> Request:
    """Check a call's inputs and put it together.

    Raises:
        InputError: lengths, devices or values that cannot work.
        StateError: not one state per layer, or on another device.
    """
    if (stack.head is None) != (targets is None):
        raise InputError("a head and targets go together: give both, or neither")
    device = _device_of(stack, x)
    # Inputs of a stem or beside a head may stay on the host; x itself is an activation and must be where it is used.
    moves = device if stack.stem is not None or is_segmented(x) else None
    inputs = SegmentSource("inputs" if stack.stem is not None else "x", x, stack.seq_dim, moves)
    sides = {
        name: SegmentSource(name, value, stack.seq_dim, device) for name, value in side.items() if value is not None
    }
    wanted = None if targets is None else SegmentSource("targets", targets, stack.seq_dim, device)
    for other in (*sides.values(), *(() if wanted is None else (wanted,))):
        if other.length != inputs.length:
            raise InputError(
                f"{other.what} has {other.length} tokens along axis {stack.seq_dim} but {inputs.what} has "
                f"{inputs.length}; they are cut into the same segments, so give one entry per token"
            )
        if any(leaf.requires_grad for leaf in other.flat.tensors):
            raise InputError(
                f"{other.what} requires a gradient, but none flows to side inputs and targets; pass it as part of x, or "
                f"detach() it"
            )
    if stack.stem is None:
        for path, leaf in zip(inputs.flat.paths(), inputs.flat.leaves, strict=True):
            if leaf is not None and leaf.device != device:
                raise InputError(
                    f"x{path} is {describe(leaf)} but the layers are on {device}; move one to the other, or give "
                    f"what makes x to `loss` with a stem, whose inputs are moved segment by segment"
                )
    states = _check_states(stack, state, device)
    if check_finite:
        _refuse_nonfinite(inputs, states)
    grad = torch.is_grad_enabled()
    needs_x = tuple(
        grad and leaf is not None and leaf.requires_grad and is_differentiable(leaf) for leaf in inputs.flat.leaves
    )
    needs_states = tuple(
        () if flat is None else tuple(grad and leaf is not None and leaf.requires_grad for leaf in flat.leaves)
        for flat in states
    )

    return Request(
        stack,
        inputs,
        sides,
        wanted,
        states,
        needs_x,
        needs_states,
        device,
        accumulate,
        disk_dir,
        observer,
        grad=grad,
    )


def make_schedule(request: Request, plan: Plan) -> Schedule:
    """The schedule of a plan for a request; without grad mode, or with nothing that needs a gradient, forward only.

    Raises:
        PlanError: the plan's sizes do not fit the stack or the sequence.
    """
    grid = plan.grid(len(request.stack.layers), request.inputs.length)
    lowest = grid.groups
    if torch.is_grad_enabled():
        lowest = _lowest_group(request.stack, list(grid.layers.all_bounds()), request.needs_x, request.needs_states)
    return Schedule(plan, grid, lowest)


def _lowest_group(
    stack: Stack,
    bounds: Sequence[tuple[int, int]],
    needs_x: Sequence[bool],
    needs_states: Sequence[Sequence[bool]],
) -> int:
    """The lowest group that has a parameter, an initial state or an input that needs a gradient."""
    if any(needs_x):
        return 0
    for group, (start, stop) in enumerate(bounds):
        trains = any(stage.slots for stage in stack.group(start, stop))
        if trains or any(any(needs) for needs in needs_states[start:stop]):
            return group
    return len(bounds)


def _device_of(stack: Stack, x: PyTree) -> torch.device:
    for stage in stack.stages:
        for module in stage.modules:
            for _, tensor in own_tensors(module):
                return tensor.device
    tensors = () if is_segmented(x) else flatten("x", x).tensors
    return tensors[0].device if tensors else torch.device("cpu")


def _check_states(stack: Stack, given: object, device: torch.device) -> tuple[Flat | None, ...]:
    if given is None:
        return (None,) * len(stack.layers)
    state = cast(Sequence[PyTree], given) if isinstance(given, Sequence) else None
    if state is None or len(state) != len(stack.layers):
        got = f"a {type(cast(object, given)).__name__}" if state is None else f"{len(state)} states"
        raise StateError(
            f"the initial state is {got}, but there are {len(stack.layers)} layers; pass a sequence with one state per "
            f"layer as an earlier call returned it, or None for the start of a sequence"
        )
    flats: list[Flat | None] = []
    for stage, value in zip(stack.layers, state, strict=True):
        flat = None if value is None else flatten(f"the initial state of {stage.name}", value)
        for path, leaf in zip(flat.paths(), flat.leaves, strict=True) if flat is not None else ():
            if leaf is not None and leaf.device != device:
                raise StateError(
                    f"the initial state{path} of {stage.name} is {describe(leaf)} but the layers are on {device}; "
                    f"move it with .to({str(device)!r})"
                )
        flats.append(flat)
    return tuple(flats)


def _refuse_nonfinite(inputs: SegmentSource, states: Sequence[Flat | None]) -> None:
    named = [(inputs.what, inputs.flat)]
    named += [(f"the initial state of layer {index}", flat) for index, flat in enumerate(states) if flat is not None]
    for what, flat in named:
        for path, leaf in zip(flat.paths(), flat.leaves, strict=True):
            if leaf is None or not is_differentiable(leaf):
                continue
            finite = torch.isfinite(leaf)
            if not bool(finite.all()):
                where = tuple(int(i) for i in (~finite).nonzero()[0])
                raise InputError(
                    f"{what}{path} holds {float(leaf[where])} at {where} ({int((~finite).sum())} values of {leaf.numel()} "
                    f"are not finite); clean the data before training on it"
                )


def shape_key(request: Request) -> object:
    """Equal for requests that one plan serves."""

    def shape(source: SegmentSource) -> object:
        return tuple(
            None if leaf is None else (leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in source.flat.leaves
        )

    return (
        request.inputs.length,
        shape(request.inputs),
        tuple((name, shape(source)) for name, source in request.side.items()),
        tuple(id(stage.call) for stage in request.stack.stages),
        tuple((param.shape, param.dtype) for param in request.stack.params),
        tuple(state is None for state in request.states),
        request.stack.modes(),
        tuple(torch.is_autocast_enabled(kind) for kind in {request.device.type, "cpu"} - {"meta"}),
        request.device,
    )
