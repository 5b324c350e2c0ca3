"""Sizes: what is read, what is refused, what is written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magc.errors import PlanError
from magc.units import format_bytes, format_count, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        (" 2 tib ", 2 * 2**40),
        ("3TB", 3 * 10**12),
        ("7kB", 7000),
        ("7KiB", 7168),
        ("0.3GiB", 322122547),
        ("12", 12),
        ("12 B", 12),
        (1, 1),
        (2**50, 2**50),
    ],
)
def test_parse_bytes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["24G", "GiB", "", "24 GiB/s", "1e9", "1,5GB", "nan", None, 1.5, True, b"1GB"])
def test_refuses_what_is_no_size(text: Any) -> None:
    with pytest.raises(PlanError, match=r"cannot read .* '24GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["-3GB", "0", "0GiB", "0.5B", 0, -1])
def test_refuses_less_than_a_byte(text: str | int) -> None:
    with pytest.raises(PlanError, match=r"less than one byte.* '24GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (int(5.3 * 2**30), "5.3 GiB"),
        (1023.96 * 2**20, "1.0 GiB"),
        (-5 * 2**30, "-5.0 GiB"),
        (3 * 2**60, "3072.0 PiB"),
    ],
)
def test_format_bytes(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (999_999, "1M"), (2**20, "1.05M")]
)
def test_format_count(count: int, text: str) -> None:
    assert format_count(count) == text


@given(st.integers(1, 2**55))
def test_formatted_bytes_parse_back_to_their_rounding(nbytes: int) -> None:
    text = format_bytes(nbytes)
    if not text.endswith("PiB"):
        assert abs(parse_bytes(text) - nbytes) <= 0.05 * nbytes
