"""Plans for published Mamba-2 sizes without their weights: traced on the meta device, nothing is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn

from magc.cost import CostModel
from magc.errors import InputError
from magc.nn import Mamba2Config, Mamba2LM
from magc.nn.block import Stream
from magc.nn.lm import LMHead
from magc.plan import Plan
from magc.planner import Planner
from magc.planning import stack_notes, with_forecast, with_notes
from magc.profile import META_FLOPS, META_LAUNCH_SECONDS, profile
from magc.request import make_request
from magc.stack import build_stack

Head = Literal["full", "last"]
"""`"full"`: the loss of every token, as in language modelling. `"last"`: logits of a segment's last token only."""

DTYPES: Final = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Parameter and activation types by their short names."""

LENGTHS: Final = (64, 256, 1024, 4096)
"""Segment lengths that are traced."""

_COUNT = re.compile(r"(\d+)(?:\^(\d+)|\s*(ki|mi|gi|k|m|g)?)", re.IGNORECASE)
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_tokens(text: str) -> int:
    """Number of tokens meant by ``"1048576"``, ``"1_048_576"``, ``"2^20"``, ``"1Mi"`` (2^20) or ``"1M"`` (10^6).

    Raises:
        InputError: it is of another form, or not positive.
    """
    match = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if match is not None and (match[2] is None or int(match[2]) <= 64):
        count = int(match[1]) ** int(match[2]) if match[2] else int(match[1]) * _SUFFIXES[(match[3] or "").lower()]
        if count >= 1:
            return count
    raise InputError(
        f"cannot read {text!r} as a number of tokens. Write 1048576, 2^20, 1Mi (powers of 1024) or 1M (powers of 1000)."
    )


class LastToken(nn.Module):
    """A language-model head on the last token of each segment only.

    Args:
        head: the head.
    """

    def __init__(self, head: LMHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Stream, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of the last token and its count; arguments as in `LMHead.forward`."""
        last = x[:, -1:] if isinstance(x, Tensor) else (x[0][:, -1:], x[1][:, -1:])
        return self.head(last, targets[:, -1:])


@dataclass(frozen=True, slots=True)
class SizedModel:
    """A published model, traced.

    Attributes:
        name: the model's.
        config: its sizes.
        batch: sequences at a time.
        costs: of its layers, stem and head, as on a GPU: host memory is another tier.
        parameters: how many it has.
        weight_bytes: what they take.
        notes: what to know of the numbers.
    """

    name: str
    config: Mamba2Config
    batch: int
    costs: CostModel
    parameters: int
    weight_bytes: int
    notes: tuple[str, ...]

    def plan(self, seq_len: int, *, budget: int, host_budget: int = 0, disk: bool = False) -> Plan:
        """The fastest plan within budgets in bytes, with its forecast.

        Raises:
            BudgetError: nothing fits; says the smallest budget that would.
        """
        planner = Planner(self.costs, seq_len, host=host_budget > 0, disk=disk)
        return with_notes(planner.plan(budget, host_budget), self.notes)

    def forecast(self, plan: Plan, seq_len: int) -> Plan:
        """A plan of your own with its forecast.

        Raises:
            PlanError: it does not fit the model or the length.
        """
        return with_forecast(plan, self.costs, seq_len, notes=self.notes)


def trace(
    name: str,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    head: Head = "full",
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[str], None] | None = None,
) -> SizedModel:
    """Trace a published model at a few segment lengths, in seconds and without its weights.

    Args:
        name: as in `Mamba2Config.named`.
        batch: sequences at a time.
        dtype: of parameters and activations.
        head: which tokens have a loss.
        lengths: segment lengths in tokens; in between bytes are interpolated.
        progress: told what is being traced.

    Raises:
        InputError: there is no such model, or a number is not positive.
    """
    config = Mamba2Config.named(name)
    if batch < 1 or not lengths or min(lengths) < 1:
        raise InputError(f"batch={batch}, lengths={tuple(lengths)}: give positive numbers")
    with torch.device("meta"):
        model = Mamba2LM(config, dtype=dtype)
        tokens = torch.zeros(batch, max(lengths), dtype=torch.int64)
    end = model.head if head == "full" else LastToken(model.head)
    with torch.enable_grad():
        request = make_request(build_stack(model.layers, stem=model.stem, head=end), tokens, None, {}, targets=tokens)
    costs = profile(request, lengths, progress=progress)
    parameters = list(model.parameters())
    notes = (
        *stack_notes(request),
        "bytes are those of this implementation, traced on torch's meta device; kernels that keep less for the "
        "backward need less, so plan again where you train (magc.plan on the layers themselves)",
        f"times are estimates from operation counts ({META_FLOPS / 1e12:.0f} TFLOP/s and "
        f"{META_LAUNCH_SECONDS * 1e3:.0f} ms of host work for each layer of a cell and pass); nothing was timed",
    )
    return SizedModel(
        name=name,
        config=config,
        batch=batch,
        costs=replace(costs, host_is_device=False, input_is_view=False),
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        notes=notes,
    )
