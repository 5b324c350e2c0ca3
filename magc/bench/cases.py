"""What is measured: a training step of a model at a length, by one method."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, Literal, Self, get_args

from magc.bench.spec import parse_plan
from magc.errors import InputError
from magc.nn import Mamba2Config
from magc.paper import PAPER_TABLE_3
from magc.runners.choice import Runner
from magc.sizes import Head, parse_tokens
from magc.units import format_bytes
from magc_kernels.mamba2.values import Keep

Budget = int | Literal["paper"]

TINY = "tiny"
"""Four narrow layers, so that the whole of a benchmark can be tried in seconds."""

SLOWDOWN = 4.0
"""How many times as slow as the fastest plan ``minimum`` may be, unless one says otherwise."""

_SHORTEST = 10
"""Of the paper's Table 3, as a power of two."""


class Method(enum.StrEnum):
    """How memory is bounded."""

    NONE = "none"
    PER_LAYER = "per-layer"
    SQRT = "sqrt"
    PAPER = "paper"
    AUTO = "auto"
    MINIMUM = "minimum"
    PLAN = "plan"

    @property
    def is_planned(self) -> bool:
        """Whether magc's planner decides."""
        return self in (Method.AUTO, Method.MINIMUM)

    @property
    def cuts_sequences(self) -> bool:
        """Whether there may be cells enough to replay as CUDA graphs."""
        return self.is_planned or self in (Method.PAPER, Method.PLAN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        model: a published Mamba-2 size, ``"mamba2-2.7b"``, or `TINY`.
        tokens: of the sequence, one at a time.
        method: ``none``, ``per-layer`` and ``sqrt`` as `Plan` has them; ``paper``: the cells that Eq. 12-16 of Lee et al.
            2024 choose; ``auto``: the planner's within ``budget``; ``minimum``: the planner's that takes the least memory
            and is not slower than ``slowdown`` allows; ``plan``: that of ``plan``.
        head: ``"last"``: the loss of the sequence's last token; ``"full"``: of every token.
        budget: of ``auto``, bytes over weights and gradient buffers, or ``"paper"``: what the paper's own method took
            (`paper_budget`); None for other methods.
        slowdown: of ``minimum``, how many times as long as the fastest plan's a step may be predicted to take; None for
            any time.
        plan: of ``plan``, as `parse_plan` reads it; None for other methods.
        host_budget: host memory for checkpoints in planned methods, bytes.
        disk: whether planned methods may put checkpoints on disk.
        runner: of cells (`GridCheckpoint`).
        keep: what each layer keeps for its backward (`magc.nn.Mamba2`).
    """

    model: str
    tokens: int
    method: Method
    head: Head = "last"
    budget: Budget | None = None
    slowdown: float | None = None
    plan: str | None = None
    host_budget: int = 0
    disk: bool = False
    runner: Runner = "eager"
    keep: Keep = "states"

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        config_of(self.model)
        if self.tokens < 1:
            raise InputError(f"{self.tokens} tokens: give at least one")
        if (self.budget is None) == (self.method is Method.AUTO):
            raise InputError(f"method {self.method} with a budget of {self.budget}: 'auto' needs one, others have none")
        if self.budget == "paper":
            paper_budget(self.model, self.tokens)
        if (self.plan is None) == (self.method is Method.PLAN):
            raise InputError(f"method {self.method} with the plan {self.plan}: 'plan' needs one, others have none")
        if self.plan is not None:
            parse_plan(self.plan)
        if self.slowdown is not None and not (self.slowdown >= 1 and self.method is Method.MINIMUM):
            raise InputError(f"method {self.method}, slowdown {self.slowdown}: 'minimum' has one, of at least 1")

    @property
    def budget_bytes(self) -> int | None:
        """Of ``auto``."""
        return paper_budget(self.model, self.tokens) if self.budget == "paper" else self.budget

    @property
    def series(self) -> Case:
        """Equal for cases that differ in their length only."""
        return replace(self, tokens=1 << _SHORTEST)

    @property
    def label(self) -> str:
        """The method and its options, those that are as usual left out."""
        parts = [str(self.method) if self.plan is None else self.plan.replace(",", " ")]
        if self.budget == "paper":
            parts.append("paper's memory")
        elif self.budget is not None:
            parts.append(format_bytes(self.budget).replace(".0 ", " "))
        if self.method is Method.MINIMUM and self.slowdown != SLOWDOWN:
            parts.append("at any speed" if self.slowdown is None else f"{self.slowdown:g} times as slow")
        if self.host_budget:
            parts.append(f"host {format_bytes(self.host_budget).replace('.0 ', ' ')}")
        if self.disk:
            parts.append("disk")
        if self.runner != "eager":
            parts.append("graphs")
        if self.keep != "states":
            parts.append(f"keep {self.keep}")
        return ", ".join(parts)

    def __str__(self) -> str:
        """One line."""
        return f"{self.model}, {length_name(self.tokens)} tokens, {self.head} head: {self.label}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Back from JSON; fields that a file of an earlier version lacks are as usual.

        Raises:
            InputError: a field is unknown or missing.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown or not {"model", "tokens", "method"} <= set(values) or values["method"] not in set(Method):
            raise InputError(f"{values} is no case of this version's benchmark")
        given: dict[str, Any] = {**values, "method": Method(values["method"])}
        return cls(**given)


def paper_budget(model: str, tokens: int) -> int:
    """Bytes that the paper's MA-GC took for a length by its Table 3, which has powers of two; beyond its end, the most.

    Raises:
        InputError: the table has no such model or length.
    """
    row = PAPER_TABLE_3["ma-gc"].get(model.removeprefix("mamba2-"), ())
    power = tokens.bit_length() - 1
    if not row or tokens != 1 << power or power < _SHORTEST:
        raise InputError(
            f"a budget of 'paper' for {model} and {length_name(tokens)} tokens: the paper's Table 3 has 370m, 1.3b and "
            f"2.7b at powers of two from 2^{_SHORTEST} tokens on; give a size such as 6GiB"
        )
    return round(row[min(power - _SHORTEST, len(row) - 1)] * 1e9)


def config_of(model: str) -> Mamba2Config:
    """The sizes of a model by its name in `Case`.

    Raises:
        InputError: there is no such model.
    """
    if model == TINY:
        return Mamba2Config(d_model=32, n_layer=4, vocab_size=256, d_state=16, headdim=16, chunk_size=64)
    return Mamba2Config.named(model)


def model_name(text: str) -> str:
    """``"2.7b"`` or ``"mamba2-2.7b"`` as `Case` wants it.

    Raises:
        InputError: there is no such model.
    """
    name = text if text == TINY or text.startswith("mamba2-") else f"mamba2-{text}"
    config_of(name)
    return name


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths meant by ``"2^14..2^20"`` (each twice the last, up to the end), ``"1000,2^14"``, or both mixed; ascending.

    Raises:
        InputError: it is of another form, or a range ends before it begins.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        length = parse_tokens(first)
        end = parse_tokens(last) if dots else length
        if end < length:
            raise InputError(f"the lengths {part!r} end before they begin; write the shorter one first")
        while length <= end:
            found.add(length)
            length *= 2
    return tuple(sorted(found))


def length_name(tokens: int) -> str:
    """``2^20`` for a power of two from 2^10 on, else ``1,000``."""
    power = tokens.bit_length() - 1
    return f"2^{power}" if power >= 10 and tokens == 1 << power else f"{tokens:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `cases` combines.

    Attributes:
        models, lengths, methods, heads, keeps: all combined.
        budgets: one case of ``auto`` for each.
        plans: one case of ``plan`` for each.
        slowdown: of ``minimum``.
        runners: of methods that cut the sequence (`Method.cuts_sequences`); the others run eagerly.
        host_budget, disk: of planned methods.
    """

    models: Sequence[str]
    lengths: Sequence[int]
    methods: Sequence[Method]
    heads: Sequence[Head] = ("last",)
    budgets: Sequence[Budget] = ()
    plans: Sequence[str] = ()
    slowdown: float | None = SLOWDOWN
    host_budget: int = 0
    disk: bool = False
    runners: Sequence[Runner] = ("eager",)
    keeps: Sequence[Keep] = ("states",)


def cases(choice: Choice) -> Iterator[Case]:
    """All combinations, each series from its shortest length on, a model's together.

    Raises:
        InputError: ``auto`` without a budget, or ``plan`` without a plan.
    """
    if Method.AUTO in choice.methods and not choice.budgets:
        raise InputError("the method 'auto' needs a budget, such as --budget 6GiB")
    if Method.PLAN in choice.methods and not choice.plans:
        raise InputError("the method 'plan' needs a plan, such as --plan tokens=2048,states=host")
    for model, keep, head, method in product(choice.models, choice.keeps, choice.heads, choice.methods):
        budgets = choice.budgets if method is Method.AUTO else (None,)
        plans = choice.plans if method is Method.PLAN else (None,)
        runners: Sequence[Runner] = choice.runners if method.cuts_sequences else ("eager",)
        for budget, plan, runner, tokens in product(budgets, plans, runners, sorted(choice.lengths)):
            yield Case(
                model=model,
                tokens=tokens,
                method=method,
                head=head,
                budget=budget,
                slowdown=choice.slowdown if method is Method.MINIMUM else None,
                plan=plan,
                host_budget=choice.host_budget if method.is_planned else 0,
                disk=choice.disk and method.is_planned,
                runner=runner,
                keep=keep,
            )


KEEPS: tuple[Keep, ...] = get_args(Keep)
HEADS: tuple[Head, ...] = get_args(Head)
RUNNERS: tuple[Runner, ...] = get_args(Runner)
