"""The layer contract, ``y, new_state = layer(x, state)``, and what refuses a layer that breaks it.

A state of None means the start of the sequence. Running segments one after another, passing the state on, must equal
running the whole sequence at once. States are values: a layer returns a new one and never writes into the one it got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from magc.errors import LayerContractError
from magc.tree import Flat, PyTree, compact, describe, flatten, storage_id, version


class Stateless(nn.Module):
    """A layer without state (a norm, an MLP, dropout) in the form of the contract; made by `stateless`."""

    def __init__(self, module: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: PyTree, state: PyTree = None, **side: PyTree) -> tuple[PyTree, tuple[()]]:
        """``(module(x), ())``; side inputs are for layers that use them and are not passed on."""
        return self.module(x), ()


def stateless(module: Callable[..., Any]) -> Stateless:
    """Adapt ``module(x) -> y``, which treats every token on its own, to the layer contract.

    Args:
        module: a module or function of x alone. It must not mix tokens: nothing would carry what it saw before.

    Returns:
        A layer that returns ``(module(x), ())``.
    """
    return Stateless(module)


def is_stateless(layer: object) -> bool:
    """Whether a layer says that it has no state."""
    # torch.compile wraps a module in one that keeps it under this name.
    return isinstance(getattr(layer, "_orig_mod", layer), Stateless)


def call_layer(
    name: str,
    call: Callable[..., Any],
    x: PyTree,
    state: Flat | None,
    side: Mapping[str, PyTree],
    *,
    stateless_layer: bool,
) -> tuple[PyTree, Flat]:
    """Call a layer and hold it to the contract.

    Args:
        name: how errors name the layer.
        call: the layer.
        x: its input.
        state: its state, None at the start of the sequence.
        side: per-token side inputs.
        stateless_layer: whether it may return a state without tensors.

    Returns:
        Its output, and its new state; tensors of the state own their memory and share none with the output, the input or
        the given state.

    Raises:
        LayerContractError: the layer returned something else than a pair, wrote into its state, or dropped it.
    """
    versions = None if state is None else [None if t is None else version(t) for t in state.leaves]
    result: object = call(x, None if state is None else state.tree(), **side)
    pair = cast(tuple[object, ...], result) if isinstance(result, tuple) else ()
    if len(pair) != 2:
        got = f"a tuple of {len(pair)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise LayerContractError(
            f"{name} returned {got}, but a layer returns (y, new_state). Return the state to resume from; if the layer "
            f"treats every token on its own, wrap it with magc.stateless(layer)"
        )
    y, new_tree = pair
    if state is not None and versions is not None:
        for leaf, before, path in zip(state.leaves, versions, state.paths(), strict=True):
            if leaf is not None and before != version(leaf):
                raise LayerContractError(
                    f"{name} wrote into the state it was given (state{path}, {describe(leaf)}). A state is a value: "
                    f"recomputing a segment needs it as it was. Make a new tensor (state * decay + update, "
                    f"torch.where, .clone()) and return that"
                )
    new_state = flatten(f"the state that {name} returned", new_tree)
    if not new_state.tensors and not stateless_layer:
        verb = "dropped the state it was given" if state is not None and state.tensors else "returned no state"
        raise LayerContractError(
            f"{name} {verb} (new_state is {new_tree!r}), so the next segment could not resume. Return the new state; "
            f"if the layer treats every token on its own, wrap it with magc.stateless(layer)"
        )
    if state is not None:
        _require_same_form(name, state, new_state)
    others = [*flatten(f"the output of {name}", y).tensors, *flatten("x", x).tensors]
    others += [] if state is None else state.tensors
    shared = {storage_id(leaf) for leaf in others}

    def own(tensor: Tensor) -> Tensor:
        # The next layer may write into y and the user into the final state, while the input and the state before are
        # checkpoints; and a view would keep the segment's activations alive with the state.
        return tensor.clone() if storage_id(tensor) in shared else compact(tensor)

    return y, new_state.map(own)


def _require_same_form(name: str, given: Flat, returned: Flat) -> None:
    if given.spec != returned.spec:
        raise LayerContractError(
            f"{name} was given a state of structure {given.spec} but returned {returned.spec}; the structure must stay "
            f"the same in every segment. If you passed an initial state, pass one as the layer returns it"
        )
    for path, old, new in zip(given.paths(), given.leaves, returned.leaves, strict=True):
        if (old is None) != (new is None) or (
            old is not None
            and new is not None
            and (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device)
        ):
            raise LayerContractError(
                f"{name} was given state{path} as {describe(old)} but returned it as {describe(new)}; shape, dtype and "
                f"device must stay the same in every segment. If you passed an initial state, pass one as the layer "
                f"returns it (for an earlier sequence of the same batch)"
            )
