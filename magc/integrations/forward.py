"""What `magc.wrap` sets on a model: forwards that run on a grid, and the record of it.

For those who teach `wrap` a class of their own: an adapter gets a model and `Settings` and returns `Adapted`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from magc.checkpoint import GridCheckpoint
from magc.distributed.fsdp import is_fsdp_hook
from magc.errors import LayerContractError
from magc.nn.fused import hooks_of
from magc.nn.operators import Impl
from magc.plan import Plan, PlanOrRule
from magc.planning import with_notes
from magc.report import paragraph
from magc.request import Request
from magc.runners.choice import Runner
from magc.uncompiled import uncompiled
from magc.units import format_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is to run; the arguments of `wrap`."""

    plan: PlanOrRule | None = None
    budget: int | str | None = None
    host_budget: int | str | None = None
    disk_dir: str | None = None
    accumulate: torch.dtype = torch.float32
    runner: Runner = "eager"
    logits: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    impl: Impl = "auto"
    plan_group: ProcessGroup | None = None

    def grid(self, layers: Iterable[nn.Module], *, seq_dim: int = 1) -> ModelGrid:
        """A grid of layers with these settings."""
        return ModelGrid(
            layers,
            self.plan,
            budget=self.budget,
            host_budget=self.host_budget,
            disk_dir=self.disk_dir,
            seq_dim=seq_dim,
            accumulate=self.accumulate,
            runner=self.runner,
            plan_group=self.plan_group,
        )


class ModelGrid(GridCheckpoint):
    """A `GridCheckpoint` that remembers the plan of its latest call."""

    latest: Plan | None = None

    def _plan_of(self, request: Request, gathered_bytes: int) -> Plan:
        self.latest = super()._plan_of(request, gathered_bytes)
        return self.latest

    def __getstate__(self) -> dict[str, Any]:
        """As `GridCheckpoint`: copies and pickles start afresh."""
        return {**super().__getstate__(), "latest": None}


Part = nn.Module | tuple[nn.Module, ...]
"""A module, or the members of a list of them."""


class GridForward:
    """Stands in for the ``forward`` of one module; subclasses say when and how it runs on the grid.

    Args:
        module: the module whose forward this becomes.
        bypassed: modules whose own forward the grid does not call, by name: hooks on them would not run.
        parts: modules of ``module`` that the grid has taken over, by their paths in it: others in their places would be
            bypassed. Of a list it is the path of the list, and its members count.

    Attributes:
        wrapping: what `wrap` did, once it is done.
    """

    # An object rather than a bound method: a copy or a pickle of the module copies it, with the grid it runs on.

    def __init__(
        self, module: nn.Module, bypassed: dict[str, nn.Module], parts: Mapping[str, Part] | None = None
    ) -> None:
        self.module = module
        self.bypassed = bypassed
        self.parts: dict[str, Part] = {
            path: tuple(part) if isinstance(part, nn.ModuleList) else part for path, part in (parts or {}).items()
        }
        self.wrapping: Wrapped | None = None
        self.__func__ = Unbound(self)

    @property
    def own(self) -> Callable[..., Any]:
        """The module's own forward."""
        return MethodType(type(self.module).forward, self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward."""
        return inspect.signature(self.own)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the grid what trains, and everything else as before."""
        if torch.is_grad_enabled():
            call = self.bind(args, kwargs)
            if self.takes(call):
                self.require_as_wrapped()
                return self.run(call)
        return self.own(*args, **kwargs)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, without those that are None; ``**kwargs`` of the signature among the others.

        Raises:
            TypeError: as the module's own forward, for arguments that it does not take.
        """
        bound = self.__signature__.bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            many = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named.update(value if many else {name: value})
        return {name: value for name, value in named.items() if value is not None}

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether this call runs on the grid; raises for one that should but cannot."""
        raise NotImplementedError

    def run(self, call: dict[str, Any]) -> Any:
        """The output of a call on the grid, of the type that the module's own forward returns."""
        raise NotImplementedError

    def hooked(self, module: nn.Module) -> bool:
        """Whether a bypassed module has hooks that would not run."""
        return any(self.misses(hook) for hook in hooks_of(module))

    def misses(self, hook: object) -> bool:
        """Whether a hook on a bypassed module would be missed; what FSDP's do, the grid does for its layers."""
        return not is_fsdp_hook(hook)

    def parts_as(self, place: str) -> dict[str, Part]:
        """The module and its parts by their paths in the one around it, which has it at ``place``."""
        return {place: self.module, **{f"{place}.{path}": part for path, part in self.parts.items()}}

    def require_as_wrapped(self) -> None:
        """Refuse a call that would not do what the modules say now.

        Raises:
            LayerContractError: a part was replaced since `wrap`, or has hooks, or was compiled, that would not run.
        """
        self.require_parts()
        self._refuse_hooks()

    def require_parts(self) -> None:
        """Refuse parts that were replaced since `wrap`.

        Raises:
            LayerContractError: naming the first.
        """
        for path, part in self.parts.items():
            now = _part(self.module, path)
            if now is part or (isinstance(part, tuple) and isinstance(now, nn.ModuleList) and tuple(now) == part):
                continue
            raise LayerContractError(
                f"{path} of this {type(self.module).__name__} was replaced after magc.wrap (by peft's modules_to_save, for "
                f"instance), and the grid still has the one before. Wrap again, magc.wrap(model, ...) on the same "
                f"{type(self.module if self.wrapping is None else self.wrapping.model).__name__}, when all is in place"
            )

    def _refuse_hooks(self) -> None:
        for name, module in self.bypassed.items():
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise LayerContractError(
                    f"{name} ({type(module).__name__}) was compiled, which would not count in the grid: it computes with the "
                    f"module's parameters. Compile the grid's layers: for layer in magc.wrapped(model).grid.layers: "
                    f"layer.compile()"
                )
            if self.hooked(module):
                raise LayerContractError(
                    f"{name} ({type(module).__name__}) has hooks, which would not run in the grid: it computes with the "
                    f"module's parameters. Remove them, or register them on a projection inside (in_proj, out_proj), "
                    f"which is called as a module"
                )


def _part(module: nn.Module, path: str) -> object:
    """What is at a path in a module, None if nothing is."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


class Unbound:
    """A `GridForward` as the function behind a bound method.

    accelerate takes forwards for bound methods: it wraps their ``__func__``, and undoes that by binding it anew.
    """

    def __init__(self, bound: GridForward) -> None:
        self.bound = bound

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, the module itself included."""
        return inspect.signature(type(self.bound.module).forward)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's call; a copy whose forward was bound before it was made runs its own code."""
        if module is self.bound.module:
            return self.bound(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """What `wrap` did to a model.

    Attributes:
        model: the model.
        grid: the grid that runs its layers.
        notes: what runs where, in sentences.
        forwards: the forwards that were replaced, of the model and of modules in it.
    """

    model: nn.Module
    grid: ModelGrid
    notes: tuple[str, ...]
    forwards: tuple[GridForward, ...]

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest training forward, with a forecast if the planner made it; None before the first."""
        latest = self.grid.latest
        return None if latest is None else with_notes(latest, self.notes)

    def explain(self) -> str:
        """What runs on the grid, on whose mathematics, and by which plan."""
        layers = len(self.grid.layers)
        lines = [paragraph("model", [f"{type(self.model).__name__}, {layers} layers in a grid"])]
        plan = self.plan
        if plan is not None and plan.forecast is not None:
            return "\n".join([*lines, plan.explain()])  # the notes are among the forecast's
        if plan is not None:
            text = f"{plan} (written by hand)"
        elif self.grid.budget is not None:
            text = f"made at the first training forward, for a budget of {format_bytes(self.grid.budget)}"
        else:
            text = str(self.grid.plan)
        return "\n".join([*lines, paragraph("plan", [text]), paragraph("notes", list(self.notes))])


@dataclass(frozen=True, slots=True)
class Adapted:
    """What an adapter makes of a model.

    Attributes:
        grid: of its layers.
        forwards: to set, that of the model last.
        notes: for the report.
        has_loss: whether the model computes a loss inside the grid, which heeds `Settings.label_smoothing` and ``z_loss``.
    """

    grid: ModelGrid
    forwards: tuple[GridForward, ...]
    notes: tuple[str, ...] = field(default=())
    has_loss: bool = False


Adapter = Callable[[Any, Settings], Adapted]
