"""Plans written on a command line: ``tokens=2048,states=host,keep=4``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from magc.errors import InputError
from magc.plan import ALL, Plan
from magc.sizes import parse_tokens

_FIELDS = ("layers", "tokens", "borders", "states", "keep", "snapshots")


def parse_plan(text: str) -> Plan:
    """The plan meant by ``"tokens=2^11,states=host"``: fields of `Plan` with commas between them, the others as usual.

    Raises:
        InputError: it is of another form, or names a field twice or one that is none.
        PlanError: a value cannot work.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or name not in _FIELDS or name in found:
            raise InputError(
                f"cannot read {part.strip()!r} in the plan {text!r}; write fields such as tokens=2048,states=host,keep=4 "
                f"(of {', '.join(_FIELDS)}), each once"
            )
        found[name] = _value(name, value)
    return Plan(**found)


def plan_text(plan: Plan) -> str:
    """What `parse_plan` reads as this plan; the same for equal plans. Sizes must not be tuples."""
    usual = {field.name: field.default for field in fields(Plan)}
    return ",".join(f"{name}={getattr(plan, name)}" for name in _FIELDS if getattr(plan, name) != usual[name])


def _value(name: str, text: str) -> str | int:
    if name in ("borders", "states") or (name == "keep" and text == ALL):
        return text
    if name == "snapshots" and text == "0":
        return 0
    return parse_tokens(text)
