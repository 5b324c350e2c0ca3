"""`GridCheckpoint`: a stack of recurrent layers that trains in bounded memory, and its functional form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from magc.accumulate import GradAccumulator
from magc.distributed.fsdp import gathered
from magc.errors import InputError, LayerContractError, PlanError
from magc.function import apply_grid
from magc.pinned import PinnedPool
from magc.plan import Plan, PlanOrRule
from magc.request import Observer, Request, make_request, make_schedule, shape_key
from magc.runners.cache import GraphCache
from magc.runners.choice import Runner, require_runner
from magc.stack import StackMemory, build_stack
from magc.tree import Flat, PyTree
from magc.uncompiled import uncompiled
from magc.units import parse_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from magc.distributed.agree import Agreement

Layer = Callable[..., Any]
"""``y, new_state = layer(x, state, **side)``."""


class GridCheckpoint(nn.Module):
    """Layers run one after another over a sequence cut into segments; gradients are those of the whole sequence.

    Same numbers as ``for layer in layers: x, s = layer(x, s)`` over the same segments, in a fraction of the memory: only
    what crosses cell borders is kept, everything else is recomputed in the backward (Lee et al. 2024, arXiv 2411.19460,
    section 3.2).

    Args:
        layers: modules with ``y, new_state = layer(x, state, **side)``; see `magc.stateless` for those without state.
        plan: what to keep and what to recompute: a `Plan`, or a rule ``(n_layers, seq_len) -> Plan``. None lets the
            planner decide from ``budget``, once per input shape.
        budget: device memory that one forward and backward may take beyond what is allocated when it starts (parameters,
            optimizer state and inputs are there already; checkpoints, activations, gradients and the output come on
            top), in bytes or e.g. ``"24GiB"``. Needed when ``plan`` is None.
        host_budget: host memory for offloaded checkpoints; None offloads nothing to the host.
        disk_dir: a folder for checkpoints on disk; None lets the planner use no disk, and plans that do, the system's
            temporary folder.
        seq_dim: the sequence axis of inputs, outputs and side inputs.
        accumulate: dtype in which parameter gradients are summed over cells.
        check_finite: refuse inputs with NaN or infinity before work starts; costs a pass over them and, on a GPU, a
            wait.
        runner: ``"eager"``, or ``"cuda-graph"``: cells of one kind are captured once and replayed for every segment,
            which spares the host thousands of launches. Layers must then do the same work whatever the values are
            (no ``.item()``, no Python random numbers); one that cannot be captured runs eagerly and `plan_for` says why.
            Graphs, their memory and the gradient sums they add to stay until `release_graphs`, or until layers, shapes
            or modes change.
        plan_group: ranks of torch.distributed that use one plan, made for the smallest of their budgets and the longest of
            their sequences. Every training call then waits for the group's others; None lets each rank plan alone.

    Attributes:
        accumulator: what makes the sums of parameter gradients of each call; benchmarks set one that watches them.

    Raises:
        PlanError: neither plan nor budget given, or both.
        InputError: ``accumulate`` is no floating-point dtype, or there is no such runner.
        LayerContractError: a layer is not a module, or there is none.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        plan: PlanOrRule | None = None,
        *,
        budget: int | str | None = None,
        host_budget: int | str | None = None,
        disk_dir: str | None = None,
        seq_dim: int = 1,
        accumulate: torch.dtype = torch.float32,
        check_finite: bool = False,
        runner: Runner = "eager",
        plan_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if (plan is None) == (budget is None):
            raise PlanError(
                f"GridCheckpoint(plan={plan!r}, budget={budget!r}): give either a plan, or a budget such as "
                f"budget='24GiB' from which one is made"
            )
        if plan is not None:
            _require_plan_or_rule(plan)
        _require_accumulate(accumulate)
        require_runner(runner)
        self.runner: Runner = runner
        self.layers = layers if isinstance(layers, nn.ModuleList) else _module_list(layers)
        self.plan = plan
        self.budget = None if budget is None else parse_bytes(budget)
        self.host_budget = None if host_budget is None else parse_bytes(host_budget)
        self.disk_dir = disk_dir
        self.seq_dim = seq_dim
        self.accumulate = accumulate
        self.check_finite = check_finite
        self.accumulator: Callable[..., GradAccumulator] = GradAccumulator
        if plan_group is not None and plan is not None:
            raise PlanError("plan_group is for plans made from a budget, but a plan was given; leave one of them out")
        self._agreement = None if plan_group is None else _agreement(plan_group)
        self._forget()

    def _forget(self) -> None:
        """Start without what calls learn or make: facts about the layers, plans, pinned memory, graphs."""
        self._memories: dict[tuple[bool, ...], StackMemory] = {}
        self._plans: dict[object, Plan] = {}
        self._pools: dict[torch.device, PinnedPool] = {}
        self._graphs: dict[torch.device, GraphCache] = {}

    def release_graphs(self) -> None:
        """Let go of captured cells, their memory and the gradient sums that they add to."""
        for graphs in self._graphs.values():
            graphs.clear()
        self._graphs.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start afresh."""
        return {**self.__dict__, "_memories": {}, "_plans": {}, "_pools": {}, "_graphs": {}}

    @uncompiled
    def forward(
        self, x: PyTree, state: Sequence[PyTree] | None = None, **side: PyTree
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        """Run the layers over a sequence; under ``torch.no_grad`` nothing is kept (prefill, streaming).

        Args:
            x: a tensor, or a pytree of tensors, with the sequence axis ``seq_dim``.
            state: one state per layer as returned by an earlier call, None for the start of a sequence.
            side: per-token inputs of every layer (``seq_idx``, masks), cut into segments with x; no gradients flow to them,
                and one that is None is left out.

        Returns:
            The output, like the last layer's over the whole sequence, and a tuple of final states, one per layer. Both
            carry gradients.

        Raises:
            InputError, StateError: shapes, lengths, devices or values that cannot work; raised before work starts.
            LayerContractError: a layer breaks the contract.
        """
        result = self._run(x, state, side)
        return result[0].tree(), tuple(final.tree() for final in result[1])

    def loss(
        self,
        inputs: PyTree,
        targets: PyTree,
        *,
        head: Layer,
        stem: Layer | None = None,
        state: Sequence[PyTree] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        **side: PyTree,
    ) -> Tensor:
        """Stem, layers and head over the grid: neither embeddings nor logits of the whole sequence ever exist.

        Args:
            inputs: what the stem turns into x (token ids), or x itself without a stem; may stay on the host. A
                `magc.Segmented` object is asked for one segment at a time.
            targets: the head's targets, a pytree with the sequence axis, or a `magc.Segmented` object.
            head: ``head(y, targets) -> (summed loss as a 0-dim tensor, count)`` of a segment. A module, so that its
                parameters get gradients.
            stem: ``stem(inputs) -> x`` of a segment; treats every token on its own.
            state: one initial state per layer, None for the start of a sequence.
            reduction: divide the summed loss by the summed count, or not.
            side: as in `forward`.

        Returns:
            A 0-dim tensor in at least fp32.

        Raises:
            InputError: also when lengths differ, or, on the CPU, all counts are zero (a GPU would have to wait: NaN).
        """
        loss, _ = self.loss_and_state(inputs, targets, head=head, stem=stem, state=state, reduction=reduction, **side)
        return loss

    @uncompiled
    def loss_and_state(
        self,
        inputs: PyTree,
        targets: PyTree,
        *,
        head: Layer,
        stem: Layer | None = None,
        state: Sequence[PyTree] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        **side: PyTree,
    ) -> tuple[Tensor, tuple[PyTree, ...]]:
        """`loss`, and the final states to go on from."""
        if reduction not in ("mean", "sum"):
            raise InputError(f"reduction={reduction!r}: give 'mean' or 'sum'")
        # fully_shard(grid) hooks its forward; a method that is not registered as one enters FSDP here.
        entered = any(name in vars(self) for name in ("loss", "loss_and_state"))
        y, states = self._run(
            inputs, state, side, targets=targets, stem=stem, head=head, root=None if entered else self
        )
        total, count = y.tensors
        if reduction == "mean" and count.device.type == "cpu" and not bool(count):
            raise InputError(
                "the head counted no target in the whole sequence, so the mean loss is 0 / 0; skip such a batch, or give "
                "reduction='sum'"
            )
        return total / count if reduction == "mean" else total, tuple(final.tree() for final in states)

    def plan_for(self, x: PyTree, **side: PyTree) -> Plan:
        """The plan that `forward` uses for such an input; measures and plans if it is the first of its shape.

        Its `explain` also names layers that were found not to be capturable, if cells run as CUDA graphs. Under FSDP2
        parameters are gathered for it: call it on all ranks.
        """
        with gathered(self.layers, self.layers, self) as parameters:
            request = self._request(x, None, side)
            plan = self._plan_of(request, parameters.gathered_bytes)
        if request.graphs is None or plan.forecast is None:
            return plan
        from magc.planning import with_notes

        return with_notes(plan, request.graphs.notes())

    # ------------------------------------------------------------------ one call
    def _run(
        self,
        x: PyTree,
        state: Sequence[PyTree] | None,
        side: Mapping[str, PyTree],
        *,
        targets: PyTree = None,
        stem: Layer | None = None,
        head: Layer | None = None,
        root: nn.Module | None = None,
    ) -> tuple[Flat, tuple[Flat, ...]]:
        with gathered((stem, *self.layers, head), self.layers, root) as parameters:
            request = self._request(x, state, side, targets=targets, stem=stem, head=head)
            if parameters.units and request.graphs is not None:
                raise InputError(
                    "runner='cuda-graph' cannot run layers under FSDP2: captured cells hold the addresses of parameters, and "
                    "gathered ones move; give runner='eager', or use DistributedDataParallel"
                )
            plan = self._plan_of(request, parameters.gathered_bytes)
            result = apply_grid(request, make_schedule(request, plan), parameters)
        return result.y, result.states

    def _request(
        self,
        x: PyTree,
        state: Sequence[PyTree] | None,
        side: Mapping[str, PyTree],
        *,
        targets: PyTree = None,
        stem: Layer | None = None,
        head: Layer | None = None,
    ) -> Request:
        stack = build_stack(list(self.layers), stem=stem, head=head, seq_dim=self.seq_dim)
        memory = self._memories.setdefault(stack.modes(), stack.memory)
        request = make_request(
            replace(stack, memory=memory),
            x,
            state,
            side,
            targets=targets,
            accumulate=self.accumulate,
            disk_dir=self.disk_dir,
            check_finite=self.check_finite,
        )
        request = replace(request, accumulator=self.accumulator)
        require_runner(self.runner, request.device)
        if request.device.type != "cuda":
            return request
        # Pinning takes 0.4 s per GiB: one pool serves all calls, and grows to what the largest needs.
        pool = self._pools.setdefault(request.device, PinnedPool(request.device))
        graphs = None
        if self.runner == "cuda-graph":
            graphs = self._graphs.setdefault(request.device, GraphCache(request.device))
        return replace(request, pool=pool, graphs=graphs)

    def _plan_of(self, request: Request, gathered_bytes: int) -> Plan:
        """The given plan, or the planner's: measured once per input shape, parameter set and mode.

        Args:
            request: the call.
            gathered_bytes: what FSDP took of the budget for parameters when the call started.
        """
        if self.plan is not None:
            return _resolve(self.plan, request)
        from magc.planning import plan_request

        assert self.budget is not None
        left = self.budget - gathered_bytes

        def make(budget: int, seq_len: int) -> Plan:
            return plan_request(
                request,
                budget=budget,
                host_budget=self.host_budget,
                use_disk=self.disk_dir is not None,
                seq_len=seq_len,
                gathered_bytes=gathered_bytes,
            )

        if self._agreement is not None and request.grad:
            return self._agreement.plan(request, left, make)
        key = shape_key(request)
        if key not in self._plans:
            self._plans[key] = make(left, request.inputs.length)
        return self._plans[key]

    def extra_repr(self) -> str:
        """The plan or the budget."""
        return f"plan={self.plan}" if self.plan is not None else f"budget={self.budget}"


@uncompiled
def grid_checkpoint(
    layers: Sequence[Layer],
    x: PyTree,
    state: Sequence[PyTree] | None = None,
    *,
    plan: PlanOrRule,
    seq_dim: int = 1,
    accumulate: torch.dtype = torch.float32,
    disk_dir: str | None = None,
    observer: Observer | None = None,
    **side: PyTree,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """The functional form of `GridCheckpoint`, for one call.

    Args:
        layers: callables with ``y, new_state = layer(x, state, **side)``. Those with parameters must be modules.
        x: as in `GridCheckpoint.forward`.
        state: as in `GridCheckpoint.forward`.
        plan: a `Plan` or a rule ``(n_layers, seq_len) -> Plan``.
        seq_dim: the sequence axis.
        accumulate: dtype in which parameter gradients are summed over cells.
        disk_dir: a folder for checkpoints on disk.
        observer: called with each action after it was carried out.
        side: per-token inputs of every layer.

    Returns:
        The output and a tuple of final states.

    Raises:
        InputError, StateError, LayerContractError, PlanError: as `GridCheckpoint.forward`.
    """
    _require_plan_or_rule(plan)
    _require_accumulate(accumulate)
    with gathered(layers, layers) as parameters:
        stack = build_stack(layers, seq_dim=seq_dim)
        request = make_request(stack, x, state, side, accumulate=accumulate, disk_dir=disk_dir, observer=observer)
        result = apply_grid(request, make_schedule(request, _resolve(plan, request)), parameters)
    return result.y.tree(), tuple(final.tree() for final in result.states)


def _agreement(group: ProcessGroup) -> Agreement:
    from magc.distributed.agree import Agreement

    return Agreement(group)


def _module_list(layers: Iterable[nn.Module]) -> nn.ModuleList:
    given: list[object] = list(layers)
    for index, layer in enumerate(given):
        if not isinstance(layer, nn.Module):
            raise LayerContractError(
                f"layer {index} is a {type(layer).__name__}, but GridCheckpoint holds nn.Modules; wrap a function in one, or "
                f"use magc.grid_checkpoint"
            )
    if not given:
        raise LayerContractError("a stack needs at least one layer, got an empty list")
    return nn.ModuleList(layer for layer in given if isinstance(layer, nn.Module))


def _require_plan_or_rule(plan: object) -> None:
    if not isinstance(plan, Plan) and not callable(plan):
        raise PlanError(
            f"plan={plan!r} is a {type(plan).__name__}; give a magc.Plan, or a rule (n_layers, seq_len) -> Plan such as "
            f"Plan.multi_axis"
        )


def _require_accumulate(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"accumulate={dtype!r}: give a floating-point dtype such as torch.float32")


def _resolve(plan: PlanOrRule, request: Request) -> Plan:
    if isinstance(plan, Plan):
        return plan
    made = cast(object, plan(len(request.stack.layers), request.inputs.length))
    if not isinstance(made, Plan):
        raise PlanError(f"the plan rule {plan!r} returned a {type(made).__name__}; it must return a magc.Plan")
    return made
