"""FSDP2 (``torch.distributed.fsdp.fully_shard``) under a grid: every parameter group is gathered once per pass.

FSDP gathers a group's parameters when its module is called and reduces their gradients when the module's backward is
over. A grid calls a module once per segment, and once more to recompute, so FSDP's hooks would communicate per cell, and
inside the grid's own backward they would reduce half a gradient. Here they run around the whole pass instead:

- the forward enters all groups, in the order in which the stack uses them, runs all cells, and leaves them;
- the backward gathers all groups, in reverse, before its first cell, and runs all cells;
- then each group's summed gradients go through a node of autograd's graph (`_Tap`) that stands where the module's
  backward would stand, so FSDP itself reduces them, once, with its own settings (types, factors, accumulation).

That order depends on the modules alone, never on the plan or the number of segments: ranks may differ in both.

While cells run, the modules' hooks of FSDP are replaced by what they do to values: the casts of a
``MixedPrecisionPolicy``. A grid's states are left as they are; rounding them between segments would lose what a layer
carries in float32.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from magc.errors import InputError
from magc.tree import nbytes
from magc.walk import modules_of, own_parameters

TESTED = "2.9, 2.13 and 2.15"
"""Versions of torch whose FSDP2 this was tested with."""

_FSDP = "torch.distributed.fsdp"
# FSDP2 has no public names for these: its two halves around a forward, and the dtypes it was given.
_NEEDED = ("_pre_forward", "_post_forward", "_mp_policy", "_modules")
_PRE_HOOKS, _HOOKS = "_forward_pre_hooks", "_forward_hooks"


@dataclass(eq=False, slots=True)
class Unit:
    """What one ``fully_shard`` call manages, between entering its forward and leaving it.

    Attributes:
        modules: the modules that it was called on.
        state: FSDP's own record of them.
        entered: as the modules' input, tells FSDP that their backward is over.
        token: as the modules' output, tells FSDP that their backward begins; None without grad mode.
        params: the gathered parameters.
        grads: their summed gradients, on the way from the grid's backward to FSDP.
        gathered_bytes: memory that gathering them took.
    """

    modules: tuple[nn.Module, ...]
    state: Any
    entered: Tensor | None = None
    token: Tensor | None = None
    params: tuple[nn.Parameter, ...] = ()
    grads: list[Tensor | None] = field(default_factory=list[Tensor | None])
    gathered_bytes: int = 0

    def enter(self) -> None:
        """Gather the parameters, as FSDP does before a module's forward."""
        before = [id(param) for param in self._own_params()]
        token = torch.zeros((), device=_device_of(self._own_params()), requires_grad=torch.is_grad_enabled())
        (self.entered,), _ = self.state._pre_forward(self.modules[0], (token,), {})
        own = self._own_params()
        self.params = tuple({id(param): param for param in own}.values())
        if [id(param) for param in own] != before:
            self.gathered_bytes = nbytes(self.params)

    def tap(self) -> None:
        """Put the node into autograd's graph that hands gradients to FSDP."""
        if not torch.is_grad_enabled():
            return
        _widen_gradients(self.params, self.state._mp_policy)
        trained = [param for param in self.params if param.requires_grad]
        apply = cast(Callable[..., Tensor], _Tap.apply)  # pyright: ignore[reportUnknownMemberType]
        self.token = apply(self, self.entered, *trained)

    def leave(self) -> None:
        """Let the parameters go if FSDP is to, as it does after a module's forward."""
        self.state._post_forward(self.modules[0], (self.entered,), self.token)
        self.entered = self.token = None  # or the graph would hold itself

    def gather(self) -> None:
        """Gather the parameters for a backward, if they were let go."""
        cast(Any, self.modules[0]).unshard()

    def _own_params(self) -> list[nn.Parameter]:
        """Parameters of the modules that no ``fully_shard`` call on a module inside manages."""
        return [
            param for module in self.modules for part in _own_parts(module) for param in part.parameters(recurse=False)
        ]


class _Tap(torch.autograd.Function):
    """Stands where the backward of a unit's modules would stand, and hands over the gradients that the grid summed."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, entered: Tensor, *params: Tensor) -> Tensor:
        ctx.unit = unit
        return torch.zeros_like(entered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        unit: Unit = ctx.unit
        handed, unit.grads = unit.grads, []
        return (None, grads[0], *handed)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The units of a grid during one call; empty without FSDP.

    Attributes:
        units: in the order in which their forwards end.
        layers: the layers of the contract, whose states no policy casts.
        root: the module around the stages that was entered too, None for none.
    """

    units: tuple[Unit, ...] = ()
    layers: tuple[nn.Module, ...] = ()
    root: nn.Module | None = None

    @property
    def gathered_bytes(self) -> int:
        """Memory that gathering the stages' parameters took; a root's are there before its forward calls a grid."""
        return sum(unit.gathered_bytes for unit in self.units if self.root not in unit.modules)

    @property
    def tokens(self) -> list[Tensor]:
        """What the grid's outputs depend on in place of the units' parameters."""
        return [unit.token for unit in self.units if unit.token is not None]

    def owned(self) -> set[int]:
        """Identities of the parameters whose gradients go through the units."""
        return {id(param) for unit in self.units for param in unit.params}

    def gather(self) -> None:
        """Gather all parameters for a backward."""
        for unit in reversed(self.units):
            unit.gather()

    def hand_over(self, params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        """Give the units the summed gradients of their parameters."""
        by_param = dict(zip(map(id, params), grads, strict=True))
        for unit in self.units:
            unit.grads = [by_param.get(id(param)) for param in unit.params if param.requires_grad]

    @contextmanager
    def quiet(self) -> Generator[None]:
        """While cells run: modules cast as their policies say, and communicate nothing."""
        kept: list[tuple[nn.Module, str, Any]] = []
        try:
            for unit in self.units:
                policy = unit.state._mp_policy
                for module in unit.modules:
                    pre, post = _casts(policy, is_layer=any(module is layer for layer in self.layers))
                    for table, cast_hook in ((_PRE_HOOKS, pre), (_HOOKS, post)):
                        kept.append((module, table, vars(module)[table]))
                        vars(module)[table] = _replaced(vars(module)[table], cast_hook)
            yield
        finally:
            for module, table, hooks in reversed(kept):
                vars(module)[table] = hooks


UNGATHERED = Gathered()
"""Without FSDP."""


@contextmanager
def gathered(
    stages: Iterable[Callable[..., Any] | None], layers: Iterable[Callable[..., Any]], root: nn.Module | None = None
) -> Generator[Gathered]:
    """The parameters of a stack's stages, gathered while the context lasts.

    Args:
        stages: stem, layers and head in order; None where there is none.
        layers: those of them that are layers of the contract.
        root: a module around them that FSDP is to treat as called too, None for none.

    Raises:
        InputError: a stage is wrapped for several processes by something else than ``fully_shard``, this version of torch
            has another FSDP2, or parameters are sharded by a ``fully_shard`` of a module around the grid whose forward is
            not running.
    """
    modules = [stage for stage in stages if isinstance(stage, nn.Module)]
    parts = [part for module in modules for part in modules_of(module)]
    _require_no_wrappers(parts)
    if not _is_sharded(parts, root):
        yield UNGATHERED
        return
    entered: list[Unit] = []
    left: list[Unit] = []
    try:
        for entering, unit in _visits(modules, root):
            if entering:
                unit.enter()
                entered.append(unit)
            else:
                unit.tap()
                left.append(unit)
        _require_gathered(parts, {id(param) for unit in left for param in unit.params})
        contract = tuple(layer for layer in layers if isinstance(layer, nn.Module))
        parameters = Gathered(tuple(left), contract, root)
        with parameters.quiet():
            yield parameters
    finally:
        # Also after an error, or FSDP would take the next forward for the same one.
        for unit in [*left, *(unit for unit in reversed(entered) if unit not in left)]:
            unit.leave()


def is_fsdp_hook(hook: object) -> bool:
    """Whether a module's hook is FSDP2's."""
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


# ---------------------------------------------------------------------- which units
def _visits(modules: Iterable[nn.Module], root: nn.Module | None) -> Iterator[tuple[bool, Unit]]:
    """Units in the order in which their forwards would begin (True) and end (False)."""
    from torch.distributed.fsdp import FSDPModule

    units: dict[int, Unit] = {}
    open_modules: dict[int, int] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, inside: Iterable[nn.Module]) -> Iterator[tuple[bool, Unit]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        unit = None
        if isinstance(module, FSDPModule):
            state = _state_of(module)
            unit = units.get(id(state))
            if unit is None:
                unit = units[id(state)] = Unit(tuple(state._modules), state)
                open_modules[id(unit)] = len(unit.modules)
                yield True, unit
        for part in inside:
            yield from visit(part, part.children())
        if unit is not None:
            open_modules[id(unit)] -= 1
            if not open_modules[id(unit)]:
                yield False, unit

    if root is not None:
        yield from visit(root, modules)
    else:
        for module in modules:
            yield from visit(module, module.children())
    # Of a unit on several modules some may be no part of the stack.
    yield from ((False, unit) for unit in units.values() if open_modules[id(unit)] > 0)


def _state_of(module: nn.Module) -> Any:
    state = cast(Any, module)._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    missing = [name for name in _NEEDED if not hasattr(state, name)]
    if missing:
        raise InputError(
            f"FSDP2 of torch {torch.__version__} has no {', '.join(missing)}, by which a grid gathers parameters once per "
            f"pass; it was tested with torch {TESTED}. Install such a version, or use DistributedDataParallel"
        )
    return state


def _own_parts(module: nn.Module) -> Iterator[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parts(child)


def _device_of(params: Iterable[nn.Parameter]) -> torch.device:
    return next((param.device for param in params), torch.device("cpu"))


def _is_sharded(parts: Iterable[nn.Module], root: nn.Module | None) -> bool:
    """Whether ``fully_shard`` was called on any of the modules, on one around them, or on the root."""
    if _FSDP not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(root, FSDPModule) or any(map(_is_managed, parts))


def _is_managed(module: nn.Module) -> bool:
    # Not by getattr, which goes through a module's tables and an error where there is none.
    return bool(vars(module).get("_is_fsdp_managed_module", False))


def _require_no_wrappers(parts: Iterable[nn.Module]) -> None:
    """Refuse stages wrapped one by one: their wrappers would communicate in the middle of the grid's backward."""
    kinds: list[type[nn.Module]] = [nn.parallel.DistributedDataParallel]
    if _FSDP in sys.modules:
        kinds.append(sys.modules[_FSDP].FullyShardedDataParallel)
    refused = tuple(kinds)
    for module in parts:
        if isinstance(module, refused):
            raise InputError(
                f"a {type(module).__name__} is inside the grid, where it would reduce gradients cell by cell. Put the grid "
                f"into DistributedDataParallel, or shard the layers with torch.distributed.fsdp.fully_shard"
            )


def _require_gathered(parts: Iterable[nn.Module], owned: set[int]) -> None:
    """Refuse parameters that are still sharded; ``owned`` are identities of those that were gathered."""
    from torch.distributed.tensor import DTensor

    for module in filter(_is_managed, parts):
        for name, param in own_parameters(module):
            if id(param) in owned or not isinstance(param, DTensor):
                continue
            if any(placement.is_shard() for placement in param.placements):
                raise InputError(
                    f"{name!r} of a {type(module).__name__} in the grid is sharded by fully_shard of a module around "
                    f"it, whose forward is not running. Call the grid inside that module's forward; for another "
                    f"method of it, such as 'loss', torch.distributed.fsdp.register_fsdp_forward_method(module, "
                    f"'loss')"
                )


# ---------------------------------------------------------------------- types
def _widen_gradients(params: Iterable[nn.Parameter], policy: Any) -> None:
    """Let gradients keep the precision of the grid's sums on their way to a reduction in higher precision."""
    for param in params:
        if not param.requires_grad or not hasattr(param, "grad_dtype"):
            continue  # before torch 2.10 the sum is rounded once, to the parameter's type
        reduced = policy.reduce_dtype or param.dtype
        cast(Any, param).grad_dtype = torch.promote_types(param.dtype, reduced)


def _casts(policy: Any, *, is_layer: bool) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """Hooks before and after a forward that cast as a ``MixedPrecisionPolicy`` says, a layer's states excepted."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        own = slice(0, 1) if is_layer else slice(None)
        return (*_cast(args[own], policy.param_dtype), *args[len(args[own]) :]), _cast(kwargs, policy.param_dtype)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        if is_layer and isinstance(output, tuple) and len(cast(tuple[Any, ...], output)) == 2:
            y, state = cast(tuple[Any, Any], output)
            return _cast(y, policy.output_dtype), state
        return _cast(output, policy.output_dtype)

    return (
        before if policy.cast_forward_inputs and policy.param_dtype is not None else None,
        after if policy.output_dtype is not None else None,
    )


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def _replaced(hooks: dict[int, Any], cast_hook: Callable[..., Any] | None) -> dict[int, Any]:
    """A module's hooks with FSDP's taken out, or replaced; keys say how a hook is called, so they stay."""
    replaced: OrderedDict[int, Any] = OrderedDict()
    for key, hook in hooks.items():
        if not is_fsdp_hook(hook):
            replaced[key] = hook
        elif cast_hook is not None:
            replaced[key] = cast_hook
    return replaced
