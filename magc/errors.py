"""Exceptions of magc. Every message restates the input and says the remedy."""

from __future__ import annotations


class MagcError(Exception):
    """Base class of all errors that magc raises on its own account."""


class PlanError(MagcError, ValueError):
    """A plan is malformed, or does not fit the stack or the sequence it is used with."""


class BudgetError(PlanError):
    """No plan fits the memory budget; the message says the smallest budget that would."""


class InputError(MagcError, ValueError):
    """An input has the wrong shape, dtype, device, length or value."""


class StateError(InputError):
    """A recurrent state does not match what the layer returns (count, structure, shape, dtype or device)."""


class LayerContractError(MagcError, RuntimeError):
    """A layer breaks ``y, new_state = layer(x, state)``: it mutates, drops or never returns its state, or looks ahead."""


class RecomputeError(MagcError, RuntimeError):
    """Something needed by the recomputation changed between forward and backward."""


class DoubleBackwardError(MagcError, RuntimeError):
    """Gradients of gradients were asked for; the grid's backward is not differentiable."""


class StoreError(MagcError, RuntimeError):
    """A checkpoint could not be written to or read from its store (host memory or disk)."""


class MissingExtraError(MagcError, ImportError):
    """An optional part is not installed; the message names the extra to install."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'magc[{extra}]'"
        )
