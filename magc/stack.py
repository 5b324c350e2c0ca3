"""What a grid runs: stages in a row (an optional stem, the layers, an optional head) and their parameters."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from magc.contract import is_stateless
from magc.errors import LayerContractError
from magc.walk import modules_of, own_parameters


class StageKind(enum.StrEnum):
    """The role of a stage."""

    STEM = "stem"
    LAYER = "layer"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class ParamSlot:
    """One place in a module that holds a trainable parameter (a shared parameter has several)."""

    module: nn.Module
    name: str
    index: int  # into Stack.params


@dataclass(frozen=True, slots=True)
class Stage:
    """One callable of the stack.

    Attributes:
        kind: stem ``inputs -> x``, layer ``(x, state) -> (y, state)``, or head ``(y, targets) -> (summed loss, count)``.
        name: how errors name it.
        call: the callable.
        slots: where its trainable parameters live.
        modules: of the callable, itself included; none if it is no module.
        stateless: a layer wrapped by `magc.stateless`.
        rounds_by_grad_mode: its forward may round differently with and without grad mode.
    """

    kind: StageKind
    name: str
    call: Callable[..., Any]
    slots: tuple[ParamSlot, ...]
    modules: tuple[nn.Module, ...] = ()
    stateless: bool = False
    rounds_by_grad_mode: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """The stages of a grid and the parameters that get gradients.

    Attributes:
        layers: the layer stages.
        stem: runs before the first layer, inside the first group's cells.
        head: runs after the last layer, inside the last group's cells.
        params: trainable parameters of all stages, each once.
        seq_dim: the sequence axis of every input, output and side tensor.
        memory: what earlier calls learnt about the layers; see `StackMemory`.
    """

    layers: tuple[Stage, ...]
    stem: Stage | None
    head: Stage | None
    params: tuple[nn.Parameter, ...]
    seq_dim: int
    memory: StackMemory

    def group(self, start: int, stop: int) -> tuple[Stage, ...]:
        """The stages of the group of layers ``start`` to ``stop``, stem and head included at the ends."""
        stages = self.layers[start:stop]
        if start == 0 and self.stem is not None:
            stages = (self.stem, *stages)
        if stop == len(self.layers) and self.head is not None:
            stages = (*stages, self.head)
        return stages

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in order."""
        return self.group(0, len(self.layers))

    def modes(self) -> tuple[bool, ...]:
        """Training mode of every module: a recompute in another mode would not be the same function."""
        return tuple(module.training for stage in self.stages for module in stage.modules)


@dataclass(slots=True)
class StackMemory:
    """What calls learn about the layers of one stack, so that checks cost something only once.

    Attributes:
        writes_input: (first layer, number of stages) of a group -> whether it writes into its input (then it gets a copy).
        keeps_state: names of layers that were seen not to write into the state they are given.
        verified: names of stages whose graph was searched for unknown parameters.
        keeps_buffers: names of stages that were seen not to change their buffers.
    """

    writes_input: dict[tuple[int, int], bool] = field(default_factory=dict[tuple[int, int], bool])
    keeps_state: set[str] = field(default_factory=set[str])
    verified: set[str] = field(default_factory=set[str])
    keeps_buffers: set[str] = field(default_factory=set[str])


def build_stack(
    layers: Sequence[Callable[..., Any]],
    *,
    stem: Callable[..., Any] | None = None,
    head: Callable[..., Any] | None = None,
    seq_dim: int = 1,
    memory: StackMemory | None = None,
) -> Stack:
    """Collect stages and their trainable parameters.

    Raises:
        LayerContractError: there is no layer, or one is not callable, or not with a state.
    """
    if not len(layers):
        raise LayerContractError("a stack needs at least one layer, got an empty list")
    params: dict[int, int] = {}
    unique: list[nn.Parameter] = []

    def stage(kind: StageKind, name: str, call: Callable[..., Any]) -> Stage:
        if not callable(call):
            raise LayerContractError(f"{name} is a {type(call).__name__}, which cannot be called; give an nn.Module")
        if kind is StageKind.LAYER:
            _require_state_argument(name, call)
        slots: list[ParamSlot] = []
        modules = modules_of(call) if isinstance(call, nn.Module) else ()
        for module in modules:
            for key, param in own_parameters(module):
                if not param.requires_grad:
                    continue
                if id(param) not in params:
                    params[id(param)] = len(unique)
                    unique.append(param)
                slots.append(ParamSlot(module, key, params[id(param)]))
        label = f"{name} ({type(call).__name__})"
        return Stage(kind, label, call, tuple(slots), modules, is_stateless(call), _rounds_by_grad_mode(modules))

    return Stack(
        stem=None if stem is None else stage(StageKind.STEM, "stem", stem),
        layers=tuple(stage(StageKind.LAYER, f"layer {index}", layer) for index, layer in enumerate(layers)),
        head=None if head is None else stage(StageKind.HEAD, "head", head),
        params=tuple(unique),
        seq_dim=seq_dim,
        memory=StackMemory() if memory is None else memory,
    )


def _require_state_argument(name: str, call: Callable[..., Any]) -> None:
    """Refuse a layer that cannot be called as ``layer(x, state)``, as far as its signature can be read."""
    function = call.forward if isinstance(call, nn.Module) else call
    if inspect.ismethod(function):
        refused = _refused_signature(
            function.__func__, bound=True
        )  # not of the method, which would keep the layer alive
    else:
        refused = _refused_signature.__wrapped__(function, bound=False)
    if refused is not None:
        raise LayerContractError(
            f"{name} ({type(call).__name__}) takes {refused}, but a layer is called as layer(x, state) and returns "
            f"(y, new_state). If it treats every token on its own, wrap it with magc.stateless(layer)"
        )


@lru_cache(256)
def _refused_signature(function: Callable[..., Any], *, bound: bool) -> str | None:
    """The signature of a function, or of a method without the object, that takes no x and state; None if it does."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # scripted and built-in callables have none
    parameters = list(signature.parameters.values())
    if bound and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        signature = signature.replace(parameters=parameters[1:])
    try:
        signature.bind_partial(None, None)  # side inputs may be required keywords
    except TypeError:
        return str(signature)
    return None


def _rounds_by_grad_mode(modules: Sequence[nn.Module]) -> bool:
    """Torch's fused RNNs pick another kernel for inference; a layer built on them may say so by this attribute."""
    # Looked up in the class and the object, since nn.Module answers for what it lacks with an error, which takes longer.
    name = "rounds_by_grad_mode"
    return any(
        isinstance(module, nn.RNNBase) or getattr(type(module), name, False) or vars(module).get(name, False)
        for module in modules
    )


@contextmanager
def swapped(stages: Sequence[Stage], proxies: Sequence[nn.Parameter]) -> Generator[None]:
    """Let the stages' modules hold ``proxies`` instead of their trainable parameters for a while.

    A proxy shares its parameter's memory but is a leaf of its own, so that back-propagating one cell neither touches
    ``param.grad`` nor fires hooks that wait for the whole gradient (DDP, optimizers in backward).
    """
    originals: list[tuple[ParamSlot, nn.Parameter]] = []
    try:
        for stage in stages:
            for slot in stage.slots:
                originals.append((slot, getattr(slot.module, slot.name)))
                _set_parameter(slot, proxies[slot.index])
        yield
    finally:
        # Last in, first out: a module that is in the stack twice has its slots listed twice, the second time as swapped.
        for slot, original in reversed(originals):
            _set_parameter(slot, original)


def _set_parameter(slot: ParamSlot, param: nn.Parameter) -> None:
    if isinstance(slot.module, nn.RNNBase):
        # torch's RNNs keep a second list of their weights, which setting the attribute brings up to date.
        setattr(slot.module, slot.name, param)
    else:
        # As torch.func.functional_call does: setting attributes costs milliseconds over a deep stack.
        vars(slot.module)["_parameters"][slot.name] = param
