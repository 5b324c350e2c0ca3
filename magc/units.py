"""Sizes and counts as people write and read them: ``"24GiB"`` to bytes, bytes to ``"5.3 GiB"``."""

from __future__ import annotations

import re
from decimal import Decimal

from magc.errors import PlanError

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_EXAMPLES = "Write a positive size such as '24GiB', '500 MB', '1.5GiB' or 25769803776 (bytes)"


def parse_bytes(size: str | int) -> int:
    """Number of bytes meant by ``size``.

    Args:
        size: a whole number of bytes, or a decimal number with a unit, in any case and with or without a
            space: ``B``, ``KiB``/``MiB``/``GiB``/``TiB`` (powers of 1024) or ``kB``/``MB``/``GB``/``TB``
            (powers of 1000). A string without a unit means bytes. Fractions of a byte are dropped.

    Raises:
        PlanError: ``size`` is not of that form, or is less than one byte. A bare ``"24G"`` is refused
            because its readers disagree on what it means (24GB or 24GiB, 7 % apart).
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise PlanError(f"cannot read {size!r} as a number of bytes. {_EXAMPLES}.")
        nbytes = int(Decimal(match[1]) * factor)
    elif type(size) is int:
        nbytes = size
    else:
        raise PlanError(f"cannot read {size!r} ({type(size).__name__}) as a number of bytes. {_EXAMPLES}.")
    if nbytes < 1:
        raise PlanError(f"{size!r} is less than one byte. {_EXAMPLES}.")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """``nbytes`` to one decimal in units of powers of 1024: ``"5.3 GiB"``; below 1 KiB, ``"512 B"``."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), ".1f")


def format_count(count: float) -> str:
    """``count`` to three digits with a suffix for powers of 1000: ``"12.3k"``, ``"1.05M"``, ``"640"``."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P"), ".3g").replace(" ", "")


def _scaled(value: float, base: int, units: tuple[str, ...], spec: str) -> str:
    if abs(value) < base:
        return f"{round(value)} {units[0]}" if abs(round(value)) < base else f"{1:{spec}} {units[1]}"
    scaled = float(value)
    for unit in units[1:]:
        scaled /= base
        text = f"{scaled:{spec}}"
        # The rounded figure decides: 1023.96 MiB must read "1.0 GiB", not "1024.0 MiB".
        if abs(float(text)) < base or unit == units[-1]:
            return f"{text} {unit}"
    raise AssertionError("unreachable: the last unit always returns")
