"""Everything around a layer that its result depends on: random numbers, autocast, deterministic flags.

A recompute is the same function of the same inputs only if these are what they were. ``is_recomputing`` tells a layer
which pass it is in.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


class _Pass(threading.local):
    recomputing: bool = False
    unread: object = None


_PASS = _Pass()


def is_recomputing() -> bool:
    """Whether the calling thread is recomputing a cell for its backward (True) or running it for the first time."""
    return _PASS.recomputing


@contextmanager
def recomputing() -> Generator[None]:
    """Mark the calling thread as recomputing."""
    before, _PASS.recomputing = _PASS.recomputing, True
    try:
        yield
    finally:
        _PASS.recomputing = before


def is_output_needed(layer: object) -> bool:
    """Whether anybody will read the values of what a layer returns as its output.

    False for the last layer of a cell that is recomputed for its backward: the output was handed on long ago, and only
    gradients will pass through it. The layer may then skip what only its output needs and return a tensor of the right
    shape and type with any values. New states are not needed either.

    Args:
        layer: the one that asks, usually ``self``. True for a module inside a layer: what is around it may compute
            with its output, and only the layer of the stack knows; see `output_unneeded`.
    """
    return _PASS.unread is None or _PASS.unread is not layer


@contextmanager
def output_unneeded(layer: object) -> Generator[None]:
    """Mark the output of a layer as one that nobody will read.

    For the grid, and for a layer that passes the output of one inside of it on as its own.
    """
    before, _PASS.unread = _PASS.unread, layer
    try:
        yield
    finally:
        _PASS.unread = before


@dataclass(frozen=True, slots=True)
class RngState:
    """States of torch's random number generators: the CPU's and the stack's device's."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """The states now."""
        return cls(
            torch.get_rng_state(),
            None if device.type in ("cpu", "meta") else _module(device).get_rng_state(device),
        )

    def restore(self, device: torch.device) -> None:
        """Make the generators continue from here."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            _module(device).set_rng_state(self.device, device)

    def equals(self, other: RngState) -> bool:
        """Whether the next random numbers would be the same."""
        same_device = self.device is None or (other.device is not None and torch.equal(self.device, other.device))
        return same_device and torch.equal(self.cpu, other.cpu)


class RngTape:
    """Random number states before each cell of a forward; layers without randomness cost one entry in all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: list[RngState] = []
        self._cells: dict[tuple[int, int], int] = {}

    def record(self, cell: tuple[int, int]) -> None:
        """Remember the state now as the one before ``cell``."""
        now = RngState.capture(self._device)
        if not self._states or not self._states[-1].equals(now):
            self._states.append(now)
        self._cells[cell] = len(self._states) - 1

    def restore(self, cell: tuple[int, int]) -> None:
        """Set the generators as they were before ``cell``."""
        self._states[self._cells[cell]].restore(self._device)

    def __len__(self) -> int:
        """Number of distinct states held (about 5 KB each on the CPU)."""
        return len(self._states)


@dataclass(frozen=True, slots=True)
class Ambient:
    """Autocast and deterministic settings of a forward.

    Attributes:
        autocast: per device type, whether autocast is on and to which dtype.
        deterministic: `torch.use_deterministic_algorithms` and its ``warn_only``.
    """

    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    deterministic: tuple[bool, bool]

    @classmethod
    def capture(cls, device: torch.device) -> Ambient:
        """The settings now."""
        types = dict.fromkeys((device.type, "cpu")) if device.type != "meta" else {"cpu": None}
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types),
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
        )

    @property
    def casts(self) -> bool:
        """Whether any autocast is on."""
        return any(enabled for _, enabled, _ in self.autocast)

    @contextmanager
    def restored(self) -> Generator[None]:
        """Run a block under these settings."""
        now = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if now != self.deterministic:
                torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
                stack.callback(torch.use_deterministic_algorithms, now[0], warn_only=now[1])
            yield

    def forget_casts(self) -> None:
        """Clear autocast's cache of weight casts after a stage of a cell.

        A cached cast is one node shared by all cells: their gradients would meet there in low precision before they
        reach the fp32 parameter, and a cast made without grad mode would cut the parameter off a later graph.
        """
        if self.casts:
            torch.clear_autocast_cache()


def _module(device: torch.device):
    return torch.get_device_module(device)
