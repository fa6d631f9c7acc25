"""Amounts survive being written and read to the last nanocredit, and nothing that is no amount is taken for one."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.network.credits import NANOCREDITS_MAX, parse_credits, show_credits


@settings(max_examples=300, deadline=None)
@given(st.integers(-NANOCREDITS_MAX, NANOCREDITS_MAX))
def test_every_amount_that_is_shown_is_read_back(nanocredits: int) -> None:
    text = show_credits(nanocredits)
    assert parse_credits(text) == nanocredits
    assert Decimal(text) * 10**9 == nanocredits, "and means what it says"


@settings(max_examples=300, deadline=None)
@given(st.decimals(Decimal("-9000000000"), Decimal("9000000000"), places=9))
def test_every_decimal_is_read_exactly(amount: Decimal) -> None:
    assert parse_credits(format(amount, "f")) == int(amount * 10**9)


@pytest.mark.parametrize(
    ("text", "nanocredits"),
    [("2.5", 2_500_000_000), ("0", 0), ("-0.000000001", -1), ("+1", 10**9), (" 007.10 ", 7_100_000_000), ("-0", 0)],
)
def test_examples(text: str, nanocredits: int) -> None:
    assert parse_credits(text) == nanocredits


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1.",
        ".5",
        "1e3",
        "NaN",
        "inf",
        "1_000",
        "1,5",
        "0.0000000001",
        "٣",
        "--1",
        "1 0",
        "9223372037",
        "1" * 99,
    ],
)
def test_what_is_no_amount_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="credits"):
        parse_credits(text)


def test_amounts_are_shown_without_needless_zeros() -> None:
    shown = [show_credits(n) for n in (0, 1, -1, 10**9, 2_500_000_000, -10_000_000_000, 1_000_000_010)]
    assert shown == ["0", "0.000000001", "-0.000000001", "1", "2.5", "-10", "1.00000001"]
