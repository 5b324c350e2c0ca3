"""Captured cells of one stack, and the memory that they add gradients to: kept from call to call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from magc.accumulate import Proxies
from magc.ambient import Ambient
from magc.runners.boxes import Boxes, Grads
from magc.runners.capture import Capturer, CudaCapturer, Replay
from magc.runners.cell import CellGrads, CellInputs, CellOutputs
from magc.stack import Stack, Stage
from magc.walk import own_tensors


@dataclass(slots=True)
class CapturedRun:
    """A captured run of a cell."""

    replay: Replay
    inputs: CellInputs
    outputs: CellOutputs


@dataclass(slots=True)
class CapturedPair:
    """A captured recording of a cell and its captured backward.

    Attributes:
        inputs: boxes; these and those below are the pair's own unless it is shared.
        outputs: boxes; what is of no use is not in them.
        grad_y, grad_states: boxes for the gradients to back-propagate.
        grads: boxes with what comes of it.
        given: parameters of which it makes the gradient alone.
        shared: its memory is that of all graphs in the cache, so nothing else may be replayed between the two.
        busy: a recorded cell waits for its backward.
    """

    record: Replay
    backward: Replay
    inputs: CellInputs
    outputs: CellOutputs
    grad_y: Grads
    grad_states: tuple[Grads, ...]
    grads: CellGrads
    given: frozenset[int]
    shared: bool
    busy: bool = False


class GraphCache:
    """Captured cells of one stack, kept from call to call, and the sums that they add parameter gradients to.

    Args:
        device: where the cells run.
        capturer: how they are captured; None for `CudaCapturer`.
    """

    def __init__(self, device: torch.device, capturer: Capturer | None = None) -> None:
        self.device = device
        self.capturer = CudaCapturer(device) if capturer is None else capturer
        self.forwards: dict[object, CapturedRun] = {}
        self.pairs: dict[object, list[CapturedPair]] = {}
        self.seen: set[tuple[object, ...]] = set()
        self.refused: dict[str, str] = {}
        self.sums: dict[int, Tensor] = {}
        self.whole: dict[int, Tensor] = {}
        self.given: set[int] = set()
        self.proxies: Sequence[nn.Parameter] = ()
        self.boxes = Boxes()
        self.renew_pool()
        self.shared_tape: CapturedPair | None = None
        self._expected = 0
        self._recorded = False
        self._single: tuple[bool, ...] = ()
        self._params: tuple[nn.Parameter, ...] = ()
        self._dtype = torch.float32
        self._surroundings: object = None

    def prepare(
        self,
        stack: Stack,
        ambient: Ambient,
        accumulate: torch.dtype,
        *,
        single: Sequence[bool] | None = None,
        expected: int = 0,
    ) -> None:
        """Drop everything captured if it would not be the same function any more.

        Args:
            stack: that is about to run.
            ambient: what it runs under.
            accumulate: dtype of sums.
            single: of each parameter, whether one cell alone makes its gradient, which then is in its own dtype; None for
                none.
            expected: bytes of shared memory that the cells will need, 0 if that is not known.

        Graphs hold addresses: of parameters and buffers. They hold decisions too: training mode, autocast, deterministic
        algorithms, which parameters are frozen.
        """
        tensors = [
            (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
            for stage in stack.stages
            for module in stage.modules
            for _, tensor in own_tensors(module)
        ]
        calls = tuple(id(stage.call) for stage in stack.stages)
        now = (calls, stack.modes(), tuple(tensors), ambient, accumulate)
        self._expected = expected
        self._single = (False,) * len(stack.params) if single is None else tuple(single)
        if now != self._surroundings:
            self.clear()
            self._surroundings = now
            self._params, self._dtype = stack.params, accumulate
            # Not by a strong reference: Python does not find cycles through a tensor's hooks, so nothing would be freed.
            self.proxies = Proxies(stack.params, weakref.proxy(self))
        self._recorded = any(kind == "record" for kind, *_ in self.seen)

    def clear(self) -> None:
        """Let go of all graphs, their memory and the sums."""
        for held in (self.forwards, self.pairs, self.seen, self.sums, self.whole, self.given, self.refused):
            held.clear()
        self.proxies = ()
        self.boxes.clear()
        self.shared_tape = None
        self.renew_pool()

    def take_reserve(self) -> int:
        """Bytes to begin the shared memory with at the first pair of graphs in it, the largest that it will hold; else 0.

        What runs cells was captured before and lies in memory of its own, which is let go: it is captured anew. Begun any
        earlier, all that memory would lie idle beside the first pair's eager run.
        """
        if self._reserved or not self._expected:
            return 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forwards.clear()
        self.boxes.clear()
        self.renew_pool()
        self._reserved = True
        return self._expected

    def take_reserve_for_run(self) -> int:
        """The same before what runs cells is captured, if pairs ran eagerly in an earlier call, else 0.

        Where each cell is the only one of its kind, a second call captures everything: taken at its first pair, the reserve
        would drop what that call has captured, and a third would capture it again.
        """
        return self.take_reserve() if self._recorded else 0

    def renew_pool(self) -> None:
        """Capture in other memory from now on; graphs that are in the pool keep it for themselves."""
        self.pool, self._reserved = self.capturer.new_pool(), False

    def single_of(self, stages: Sequence[Stage]) -> frozenset[int]:
        """The stages' parameters of which one cell alone makes the gradient."""
        return frozenset(slot.index for stage in stages for slot in stage.slots if self._single[slot.index])

    # What proxies and the accumulator need (`magc.accumulate.LentSums`).
    def start_backward(self, single: Sequence[bool]) -> None:
        """Set the sums to zero and forget the gradients that cells made.

        ``single`` is as in `prepare`, which a call of another plan may have called since.
        """
        self._single = tuple(single)
        self.given.clear()
        for index, total in self.sums.items():
            if not self._single[index]:
                total.zero_()

    def add(self, index: int, grad: Tensor) -> None:
        """Take a gradient that autograd made."""
        room = self.room(index)
        if self._single[index]:
            room.copy_(grad)
            self.given.add(index)
        else:
            room.add_(grad)

    def total(self, index: int) -> Tensor | None:
        """The sum of a parameter's gradients; None if one cell alone makes it."""
        return None if self._single[index] else self.room(index)

    def held(self, index: int) -> Tensor | None:
        """Memory for a parameter's gradient, if there is any yet."""
        return (self.whole if self._single[index] else self.sums).get(index)

    def result(self, index: int) -> Tensor | None:
        """A parameter's gradient; None if none was made."""
        return None if self._single[index] and index not in self.given else self.held(index)

    def room(self, index: int) -> Tensor:
        """Memory for a parameter's gradient; stays where it is as long as the graphs do."""
        held = self.held(index)
        if held is None:
            param = self._params[index]
            if self._single[index]:
                held = self.whole[index] = torch.empty_like(param, requires_grad=False)
            else:
                dtype = torch.promote_types(param.dtype, self._dtype)
                held = self.sums[index] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return held

    def replays(self) -> tuple[Replay, Replay, Replay] | None:
        """Run, record and backward of the cell that was captured first, to be timed; None if none was."""
        forwards, pairs = list(self.forwards.values()), [pair for made in self.pairs.values() for pair in made]
        return (forwards[0].replay, pairs[0].record, pairs[0].backward) if forwards and pairs else None

    def notes(self) -> tuple[str, ...]:
        """What could not be captured, and why."""
        return tuple(f"{name} runs eagerly: {reason}" for name, reason in self.refused.items())
