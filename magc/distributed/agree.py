"""Plans that ranks agree on: one plan for all, from the smallest budget, for the longest sequence and the largest batch.

Ranks do not need this to be correct: nothing that a grid communicates depends on its plan. It makes them alike: each
would measure its own times and choose by its own budget, and the slowest choice would hold up all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from magc.errors import BudgetError, PlanError
from magc.plan import Plan
from magc.request import Request, shape_key

Make = Callable[[int, int], Plan]
"""Makes a plan from a budget in bytes and a number of tokens."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a rank says of its call, in numbers.

    Attributes:
        tokens: length of its sequence.
        width: elements of its input per token, over the batch.
        budget: bytes that it may take.
        shape: equal for its calls that one plan serves.
    """

    tokens: int
    width: int
    budget: int
    shape: int

    @classmethod
    def of(cls, request: Request, budget: int) -> Call:
        """The call of a request."""
        elements = sum(leaf.numel() for leaf in request.inputs.flat.tensors)
        tokens = request.inputs.length
        return cls(tokens, elements // max(tokens, 1), budget, hash(shape_key(request)))


class Agreement:
    """Plans agreed among the ranks of a group, kept by what all of them asked for.

    Every rank asks at the same time; it costs an all-gather of four numbers. Under NCCL that makes the host wait for the
    GPU, a group with the backend gloo does not.

    Args:
        group: the ranks.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._plans: dict[tuple[Call, ...], Plan] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Agreement:
        """The same ranks, without what they agreed on: plans are made for a copy's own layers."""
        return Agreement(self.group)

    def plan(self, request: Request, budget: int, make: Make) -> Plan:
        """The group's plan; made by the rank with the largest batch if its calls are new.

        Raises:
            BudgetError: nothing fits the smallest budget; on all ranks.
            PlanError: the rank that plans cannot; on all ranks.
        """
        calls = self._gather(Call.of(request, budget))
        if calls not in self._plans:
            planner = max(range(len(calls)), key=lambda rank: (calls[rank].width, calls[rank].tokens, -rank))
            smallest, longest = min(call.budget for call in calls), max(call.tokens for call in calls)
            self._plans[calls] = self._make(planner, lambda: make(smallest, longest))
        return self._plans[calls]

    def _gather(self, mine: Call) -> tuple[Call, ...]:
        ranks = distributed.get_world_size(self.group)
        row = torch.tensor([mine.tokens, mine.width, mine.budget, mine.shape], dtype=torch.int64, device=self._device())
        rows = [torch.empty_like(row) for _ in range(ranks)]
        distributed.all_gather(rows, row, group=self.group)  # pyright: ignore[reportUnknownMemberType]
        return tuple(Call(*_ints(row)) for row in rows)

    def _make(self, planner: int, make: Callable[[], Plan]) -> Plan:
        """Have one rank plan; a refusal reaches all of them, or they would wait for ever."""
        answer: list[Plan | tuple[bool, str]] = [(False, "")]
        failed: Exception | None = None
        if distributed.get_rank(self.group) == planner:
            try:
                answer = [make()]
            except Exception as error:
                failed, answer = error, [(isinstance(error, BudgetError), str(error))]
        distributed.broadcast_object_list(answer, group_src=planner, group=self.group, device=self._device())
        if failed is not None:
            raise failed
        if isinstance(answer[0], Plan):
            return answer[0]
        over_budget, message = answer[0]
        raise (BudgetError if over_budget else PlanError)(f"rank {planner} of the group plans for all: {message}")

    def _device(self) -> torch.device:
        """Where the group's backend wants its tensors."""
        return torch.device("cpu") if "gloo" in distributed.get_backend(self.group) else torch.device("cuda")


def _ints(row: Tensor) -> list[int]:
    return cast(list[int], row.tolist())  # pyright: ignore[reportUnknownMemberType]
