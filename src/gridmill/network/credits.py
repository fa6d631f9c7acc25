"""Credits as people write them: decimal text outside, whole nanocredits inside, never a float in between."""

from __future__ import annotations

import re

NANOCREDITS = 1_000_000_000  # in one credit
NANOCREDITS_MAX = (1 << 63) - 1  # what a BIGINT column holds

_AMOUNT = re.compile(r"([+-]?)([0-9]{1,10})(?:\.([0-9]{1,9}))?", re.ASCII)


def parse_credits(text: str) -> int:
    """Nanocredits of a decimal text such as "2.5". Raises ValueError with a sentence."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text[:40]!r} is no amount of credits: write it like 2.5, with at most 9 places")
    sign, whole, places = found.groups()
    nanocredits = int(whole) * NANOCREDITS + int((places or "").ljust(9, "0"))
    if nanocredits > NANOCREDITS_MAX:
        raise ValueError(f"{text[:40]} credits are too many: at most {NANOCREDITS_MAX // NANOCREDITS}")
    return -nanocredits if sign == "-" else nanocredits


def show_credits(nanocredits: int) -> str:
    """The shortest text that `parse_credits` reads back as the same amount."""
    whole, places = divmod(abs(nanocredits), NANOCREDITS)
    text = f"{whole}.{places:09d}".rstrip("0").rstrip(".")
    return "-" + text if nanocredits < 0 else text
