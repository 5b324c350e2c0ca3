"""Does a layer keep the contract? Runs it whole and in segments and compares every number that comes out.

Cheap (a few forwards and backwards on an example) and never needed: the engine refuses what it can see at no cost. Only
a comparison shows a layer that looks ahead, a state that forgets something, or a state without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from magc.ambient import RngState
from magc.checkpoint import grid_checkpoint
from magc.contract import call_layer
from magc.errors import InputError, LayerContractError
from magc.plan import Plan
from magc.request import Request, make_request
from magc.stack import Stack, build_stack, swapped
from magc.tree import Flat, PyTree, describe, flatten, is_differentiable, version

_RTOL = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FLOOR = 1e-3  # tensors far smaller than their kind are compared at the scale of their kind: cancellation leaves noise


@dataclass(frozen=True, slots=True)
class Difference:
    """How much one tensor differs between the whole run and a segmented one.

    Attributes:
        name: the tensor.
        absolute: largest difference of two elements over all segmentations.
        relative: the same divided by the largest element of the whole run.
    """

    name: str
    absolute: float
    relative: float


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found out about layers that keep the contract.

    Attributes:
        tokens: length of the example.
        segmentations: the segment lengths that were compared with the whole.
        rtol, atol: a tensor may differ by ``atol + rtol *`` its largest element.
        differences: one entry per output, final state and gradient.
    """

    tokens: int
    segmentations: tuple[tuple[int, ...], ...]
    rtol: float
    atol: float
    differences: tuple[Difference, ...]

    @property
    def worst(self) -> Difference:
        """The tensor with the largest relative difference."""
        return max(self.differences, key=lambda difference: difference.relative)

    def __str__(self) -> str:
        """A table of the differences."""
        cuts = "; ".join(" + ".join(map(str, lengths)) for lengths in self.segmentations)
        width = max(len(difference.name) for difference in self.differences)
        lines = [
            f"{self.tokens} tokens whole and as {cuts}: equal within {self.rtol:.0e} of each tensor's largest element"
        ]
        lines += [f"  {each.name:<{width}}  {each.relative:.1e}" for each in self.differences]
        return "\n".join(lines)


def check(
    layer: Callable[..., Any] | Sequence[Callable[..., Any]],
    x: PyTree,
    state: PyTree = None,
    *,
    segments: int | Sequence[int] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seq_dim: int = 1,
    **side: PyTree,
) -> CheckReport:
    """Run a layer, or layers in a row, over an example whole and in segments, forward and backward, and compare.

    Modes, parameters, their gradients and the random number generators are left as they are. A layer that draws random
    numbers is refused, since its whole run and its segmented one would draw differently: call ``layer.eval()`` first.

    Args:
        layer: ``y, new_state = layer(x, state, **side)``, or a sequence of such layers.
        x: an example input: a tensor or pytree of tensors with at least two tokens along ``seq_dim``; not modified.
        state: its initial state (for a sequence of layers, one per layer); None for the start of a sequence.
        segments: tokens per segment, or the lengths of all segments; None tries a first segment of one token, two
            uneven halves, and segments of about a third.
        rtol: allowed difference relative to a tensor's largest element. None: 1e-9 in float64, 1e-4 in float32, 1e-2
            in float16, 5e-2 in bfloat16, by the least precise of the tensors involved.
        atol: allowed absolute difference; None is 0.
        seq_dim: the sequence axis.
        side: per-token side inputs.

    Returns:
        The largest difference of every tensor.

    Raises:
        LayerContractError: it breaks the contract; the message names the tensor, the place and the likely cause.
        InputError: an example that cannot work: NaN, fewer than two tokens, a layer that draws random numbers.
    """
    layers: Sequence[Callable[..., Any]] = [cast("Callable[..., Any]", layer)]
    states = None if state is None else [state]
    if isinstance(layer, Sequence | nn.ModuleList):
        layers, states = cast("Sequence[Callable[..., Any]]", layer), state
    with torch.enable_grad():
        return _Check(layers, x, states, side, seq_dim, segments, rtol, atol).run()


@dataclass(frozen=True, slots=True)
class _Numbers:
    """All that a run gives: name -> tensor."""

    outputs: Mapping[str, Tensor]
    states: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


class _Check:
    def __init__(
        self,
        layers: Sequence[Callable[..., Any]],
        x: PyTree,
        states: Sequence[PyTree] | None,
        side: Mapping[str, PyTree],
        seq_dim: int,
        segments: int | Sequence[int] | None,
        rtol: float | None,
        atol: float | None,
    ) -> None:
        self._layers = layers
        self._stack: Stack = build_stack(layers, seq_dim=seq_dim)
        self._side = {name: _detached(flatten(name, value)).tree() for name, value in side.items()}
        request = make_request(
            self._stack,
            _detached(flatten("x", x)).tree(),
            states,
            self._side,
            check_finite=True,
        )
        self._x = request.inputs.flat
        self._states = request.states
        self._seq_dim = seq_dim
        self._request: Request = request
        self._tokens = request.inputs.length
        self._segmentations = _segmentations(self._tokens, segments)
        self._single = len(layers) == 1
        floats = [tensor for tensor in self._floats() if tensor.dtype in _RTOL]
        self._rtol = max((_RTOL[tensor.dtype] for tensor in floats), default=1e-9) if rtol is None else rtol
        self._atol = 0.0 if atol is None else atol
        self._proxies = [nn.Parameter(param.detach()) for param in self._stack.params]
        self._param_names = self._name_parameters()

    def _floats(self) -> Iterator[Tensor]:
        yield from (leaf for leaf in self._x.tensors if leaf.is_floating_point())
        yield from (
            leaf for flat in self._states if flat is not None for leaf in flat.tensors if leaf.is_floating_point()
        )
        yield from self._stack.params

    def _layer(self, index: int) -> str:
        return "" if self._single else f" of layer {index}"

    def _name_parameters(self) -> list[str]:
        names: dict[int, str] = {}
        for index, layer in enumerate(self._layers):
            if isinstance(layer, nn.Module):
                for name, param in layer.named_parameters():
                    names.setdefault(id(param), f"{name}{self._layer(index)}")
        return [names[id(param)] for param in self._stack.params]

    # ------------------------------------------------------------------ the steps
    def run(self) -> CheckReport:
        device = self._request.device
        before = RngState.capture(device)
        try:
            self._refuse_writes()
            whole = self._numbers(None)
            if not RngState.capture(device).equals(before):
                raise InputError(
                    "the layer draws random numbers (dropout?), so that its run over the whole example and over "
                    "segments cannot agree; call layer.eval() first, or set its dropout to 0"
                )
            self._refuse_nonfinite(whole)
            self._refuse_differences(whole, self._numbers(None), None)
            worst: dict[str, Difference] = {}
            for lengths in self._segmentations:
                for found in self._refuse_differences(whole, self._numbers(lengths), lengths):
                    known = worst.get(found.name)
                    if known is None or found.relative > known.relative:
                        worst[found.name] = found
        finally:
            before.restore(device)
        return CheckReport(self._tokens, self._segmentations, self._rtol, self._atol, tuple(worst.values()))

    def _refuse_writes(self) -> None:
        """Look at the values that a layer is given: a write through ``.data`` moves no version counter."""
        start = self._segmentations[0][0]
        states = self._states
        for bounds in ((0, start), (start, self._tokens)):
            x: PyTree = self._request.inputs.segment(*bounds).map(Tensor.clone).tree()
            side = {name: source.segment(*bounds).tree() for name, source in self._request.side.items()}
            new_states: list[Flat | None] = []
            for stage, state in zip(self._stack.layers, states, strict=True):
                given = flatten("x", x)
                kept = given.map(Tensor.clone)
                versions = [version(leaf) for leaf in given.tensors]
                own = None if state is None else state.map(lambda leaf: leaf.detach().clone())
                with torch.no_grad():
                    x, new_state = call_layer(stage.name, stage.call, x, own, side, stateless_layer=stage.stateless)
                if state is not None and own is not None:
                    for path, old, now in zip(state.paths(), state.leaves, own.leaves, strict=True):
                        if old is not None and now is not None and not _same_bits(old, now):
                            raise LayerContractError(
                                f"{stage.name} wrote into the state it was given (state{path}, {describe(old)}) behind "
                                f"torch's back (.data, NumPy, a custom kernel). A state is a value: make a new tensor "
                                f"and return that"
                            )
                unnoticed = versions == [version(leaf) for leaf in given.tensors]
                if unnoticed and not all(map(_same_bits, kept.tensors, given.tensors)):
                    raise LayerContractError(
                        f"{stage.name} wrote into its input behind torch's back (.data, NumPy, a custom kernel), which "
                        f"may be a checkpoint. Write into a copy (x.clone())"
                    )
                new_states.append(new_state)
            states = tuple(new_states)

    def _numbers(self, lengths: tuple[int, ...] | None) -> _Numbers:
        """Run forward and backward; None for the whole example in one call."""
        x = self._x.map(_leaf)
        states = [None if flat is None else flat.map(_leaf) for flat in self._states]
        with swapped(self._stack.layers, self._proxies):
            y_tree, final_trees = grid_checkpoint(
                self._layers,
                x.tree(),
                [None if flat is None else flat.tree() for flat in states],
                plan=Plan(tokens=lengths),
                seq_dim=self._seq_dim,
                **self._side,
            )
            y = flatten("the output", y_tree)
            outputs = {f"output{path}": leaf for path, leaf in _named(y)}
            finals = {
                f"final state{path}{self._layer(index)}": leaf
                for index, tree in enumerate(final_trees)
                for path, leaf in _named(flatten("the final state", tree))
            }
            leaves = {f"gradient of x{path}": leaf for path, leaf in _named(x)}
            for index, flat in enumerate(states):
                if flat is not None:
                    named = _named(flat)
                    leaves |= {f"gradient of the initial state{path}{self._layer(index)}": leaf for path, leaf in named}
            leaves |= {
                f"gradient of {name}": proxy for name, proxy in zip(self._param_names, self._proxies, strict=True)
            }
            leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            gradients = _gradients([*outputs.values(), *finals.values()], leaves)
        return _Numbers(_values(outputs), _values(finals), gradients)

    def _refuse_nonfinite(self, whole: _Numbers) -> None:
        for name, tensor in (*whole.outputs.items(), *whole.states.items(), *whole.gradients.items()):
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                index = _index(bad.flatten().int().argmax(), tensor)
                raise LayerContractError(
                    f"the {name} ({describe(tensor)}) of the whole example is {tensor[index].item()} at {index} though "
                    f"all inputs are finite; nothing can be compared"
                )

    # ------------------------------------------------------------------ comparison
    def _refuse_differences(
        self, whole: _Numbers, other: _Numbers, lengths: tuple[int, ...] | None
    ) -> list[Difference]:
        found: list[Difference] = []
        for kind in ("outputs", "states", "gradients"):
            expected: Mapping[str, Tensor] = getattr(whole, kind)
            actual: Mapping[str, Tensor] = getattr(other, kind)
            if expected.keys() != actual.keys():
                raise LayerContractError(
                    f"run over segments {lengths}, the layer gives {sorted(actual)}, but over the whole "
                    f"{sorted(expected)}"
                )
            scale = max((_largest(tensor) for tensor in expected.values()), default=0.0)
            for name, want in expected.items():
                got = actual[name]
                if (want.shape, want.dtype) != (got.shape, got.dtype):
                    raise LayerContractError(
                        f"the {name} is {describe(got)} over segments {lengths}, but {describe(want)} over the whole"
                    )
                difference = (got.double() - want.double()).abs()
                largest = _largest(difference)
                allowed = self._atol + self._rtol * max(_largest(want), _FLOOR * scale)
                if not largest <= allowed:
                    raise LayerContractError(self._explain(kind, name, want, got, difference, allowed, lengths))
                found.append(Difference(name, largest, largest / max(_largest(want), _FLOOR * scale, 1e-300)))
        return found

    def _explain(
        self,
        kind: str,
        name: str,
        want: Tensor,
        got: Tensor,
        difference: Tensor,
        allowed: float,
        lengths: tuple[int, ...] | None,
    ) -> str:
        worst = _index(difference.flatten().nan_to_num(torch.inf).argmax(), difference)
        by_token = name.startswith(("output", "gradient of x"))
        token = 0
        if by_token:
            wrong = ~(difference <= allowed)
            token = int(wrong.movedim(self._seq_dim, 0).flatten(1).any(1).int().argmax())
        where = f" from token {token} on" if by_token else ""
        numbers = (
            f"largest difference {difference[worst].item():.3g} at {worst}, expected {want[worst].item():.6g}, got "
            f"{got[worst].item():.6g}, allowed {allowed:.2g}"
        )
        if lengths is None:
            return (
                f"the {name} differs between two runs over the same example{where} ({numbers}). The layer is not "
                f"deterministic, or keeps something between calls outside its state: carry it in the state"
            )
        head = (
            f"the {name} differs between the whole example and segments of {_shown(lengths)} tokens{where} ({numbers})"
        )
        if kind == "gradients":
            return (
                f"{head}, although outputs and states agree. Probably the state it returns carries no gradient: look "
                f"for detach(), .data, .item() or no_grad on the way to new_state"
            )
        if kind == "states":
            return f"{head}, although the outputs agree. Probably new_state does not cover the segment's last tokens"
        if token < lengths[0]:
            return (
                f"{head}. Token {token} lies in the first segment, so its output depends on tokens after "
                f"{lengths[0] - 1}: the layer looks ahead (is not causal), or uses the length of what it is given (a "
                f"norm, mean or position counted over the sequence)"
            )
        return (
            f"{head}. Probably the state lacks something that later tokens need (a convolution's last inputs, a "
            f"position, a running sum), or the layer ignores the state it is given"
        )


def _segmentations(tokens: int, segments: int | Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
    if tokens < 2:
        raise InputError(f"x has {tokens} token, which cannot be cut; check a layer on at least two, better ten")
    if segments is None:
        third = max(1, round(tokens / 3))
        uneven = tokens // 2 + (1 if tokens > 2 else 0)
        chosen = [(1, tokens - 1), (uneven, tokens - uneven), _cut(tokens, third)]
    elif isinstance(segments, int):
        if not 1 <= segments < tokens:
            raise InputError(f"segments={segments}: give fewer tokens than the example's {tokens}, at least 1")
        chosen = [_cut(tokens, segments)]
    else:
        chosen = [tuple(segments)]
        if sum(chosen[0]) != tokens or any(length < 1 for length in chosen[0]) or len(chosen[0]) < 2:
            raise InputError(f"segments={segments!r}: give two or more positive lengths that sum to {tokens}")
    return tuple(dict.fromkeys(chosen))


def _cut(tokens: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, tokens - start) for start in range(0, tokens, size))


def _shown(lengths: tuple[int, ...]) -> str:
    return " + ".join(map(str, lengths)) if len(lengths) <= 8 else f"{lengths[0]} (x {len(lengths)})"


def _detached(flat: Flat) -> Flat:
    return flat.map(Tensor.detach)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(is_differentiable(tensor))


def _named(flat: Flat) -> list[tuple[str, Tensor]]:
    return [(path, leaf) for path, leaf in zip(flat.paths(), flat.leaves, strict=True) if leaf is not None]


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _gradients(outputs: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one random combination of all outputs, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    roots: list[Tensor] = []
    weights: list[Tensor] = []
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            roots.append(output)
            weights.append(weight.to(output.device, output.dtype))
    if not roots:
        return {}
    grad = cast(Callable[..., Sequence[Tensor | None]], torch.autograd.grad)
    made = grad(roots, list(leaves.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if found is None else found.detach()
        for (name, leaf), found in zip(leaves.items(), made, strict=True)
    }


def _largest(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach(), other.detach())


def _index(flat_index: Tensor, tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat_index, tensor.shape))
