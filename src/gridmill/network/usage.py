"""What each key used, by model and day: the running totals behind `GET /v1/usage`.

A row is added to in the transaction that settles its works, so that usage and money never tell different stories. Days
are UTC, counted from 1970-01-01 inside and written as in 2026-11-21 outside.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from gridmill.network.store import Transaction

MIGRATION = """
CREATE TABLE usage_days (
    account_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    day BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    charge_nanocredits BIGINT NOT NULL,
    PRIMARY KEY (account_id, day, key_id, model)
);
"""

GROUPS = ("day", "account", "model", "key")
DAYS_SHOWN = 30
DAY_SECONDS = 86_400
_ORDINAL_1970 = datetime.date(1970, 1, 1).toordinal()
_COUNTS = ("requests", "input_tokens", "cached_tokens", "output_tokens", "charge_nanocredits")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Span(msgspec.Struct, frozen=True):
    """Days from `since` to `until`, both included."""

    since: int
    until: int

    @classmethod
    def parse(cls, since: str | None, until: str | None, now: float) -> Span:
        """Of two days as people write them; by default the last DAYS_SHOWN. Raises ValueError with a sentence."""
        last = day_of(now) if until is None else parse_day(until)
        first = last - DAYS_SHOWN + 1 if since is None else parse_day(since)
        if first > last:
            raise ValueError(f"{day_text(first)} comes after {day_text(last)}: the first day goes first")
        return cls(first, last)


EVERY_DAY = Span(0, 3_000_000)  # since 1970, for eight thousand years


class UsageRow(msgspec.Struct, frozen=True):
    """Totals of one key, model and day. `cached_tokens` is a part of `input_tokens`."""

    account_id: str
    key_id: str
    model: str
    day: int
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    charge_nanocredits: int


async def add(transaction: Transaction, rows: Iterable[UsageRow]) -> None:
    """Adds to the totals. One statement for each key, model and day, however many works there were."""
    totals: dict[tuple[str, int, str, str], list[int]] = {}
    for row in rows:
        numbers = (row.requests, row.input_tokens, row.cached_tokens, row.output_tokens, row.charge_nanocredits)
        known = totals.setdefault((row.account_id, row.day, row.key_id, row.model), [0, 0, 0, 0, 0])
        for place, number in enumerate(numbers):
            known[place] += number
    if not totals:
        return
    await transaction.do_many(
        "INSERT INTO usage_days (account_id, day, key_id, model,"
        " requests, input_tokens, cached_tokens, output_tokens, charge_nanocredits)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (account_id, day, key_id, model) DO UPDATE SET"
        " requests = usage_days.requests + excluded.requests,"
        " input_tokens = usage_days.input_tokens + excluded.input_tokens,"
        " cached_tokens = usage_days.cached_tokens + excluded.cached_tokens,"
        " output_tokens = usage_days.output_tokens + excluded.output_tokens,"
        " charge_nanocredits = usage_days.charge_nanocredits + excluded.charge_nanocredits",
        # In one order everywhere, so that two gateways never wait for each other's rows.
        [(*key, *numbers) for key, numbers in sorted(totals.items())],
    )


async def read(transaction: Transaction, account_id: str | None, span: Span) -> list[UsageRow]:
    """The totals of an account, or of all, in order of days."""
    whose, values = ("account_id = ? AND", [account_id]) if account_id is not None else ("", [])
    rows = await transaction.all(
        "SELECT account_id, key_id, model, day, requests, input_tokens, cached_tokens, output_tokens,"
        f" charge_nanocredits FROM usage_days WHERE {whose} day >= ? AND day <= ?"
        " ORDER BY day, account_id, model, key_id",
        *values,
        span.since,
        span.until,
    )
    return [UsageRow(*row) for row in rows]


def grouped(rows: Iterable[UsageRow], group: Collection[str]) -> list[dict[str, Any]]:
    """Totals for each different value of the parts that `group` names, as JSON objects, in the order of `rows`."""
    totals: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        parts = {
            name: value
            for name, value in (
                ("day", day_text(row.day)),
                ("account", row.account_id),
                ("model", row.model),
                ("key", row.key_id),
            )
            if name in group
        }
        total = totals.setdefault(tuple(parts.values()), {**parts, **dict.fromkeys(_COUNTS, 0)})
        for name in _COUNTS:
            total[name] += getattr(row, name)
    return list(totals.values())


def parse_group(text: str) -> frozenset[str]:
    """The parts in a comma list. Raises ValueError with a sentence."""
    parts = frozenset(part.strip() for part in text.split(",") if part.strip())
    if not parts <= set(GROUPS):
        raise ValueError(f"{text[:40]!r} names no parts of usage: group by any of {', '.join(GROUPS)}")
    return parts


class Earned(msgspec.Struct, frozen=True):
    """What a node served and earned with one class in one period. `countersigned`: the node has signed all of it."""

    node_id: str
    class_id: str
    period_start_seconds: int
    period_seconds: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    pay_nanocredits: int
    countersigned: bool


async def earned(transaction: Transaction, account_id: str, span: Span) -> list[Earned]:
    """Of all nodes that joined with keys of this account, in periods that began within these days."""
    rows = await transaction.all(
        "SELECT c.node_id, c.class_id, c.period_start_seconds, c.period_seconds, c.input_tokens, c.cached_tokens,"
        " c.output_tokens, c.pay_nanocredits, c.countersigned_seq >= c.seq"
        " FROM node_keys n JOIN receipt_counters c ON c.node_id = n.node_id"
        " WHERE n.account_id = ? AND c.period_start_seconds >= ? AND c.period_start_seconds < ?"
        " ORDER BY c.period_start_seconds, c.node_id, c.class_id",
        account_id,
        span.since * DAY_SECONDS,
        (span.until + 1) * DAY_SECONDS,
    )
    return [
        Earned(node_id, class_id, start, length, tokens_in, cached, tokens_out, pay, bool(signed))
        for node_id, class_id, start, length, tokens_in, cached, tokens_out, pay, signed in rows
    ]


def day_of(seconds: float) -> int:
    """The UTC day of a moment in Unix seconds."""
    return int(seconds // DAY_SECONDS)


def day_text(day: int) -> str:
    return datetime.date.fromordinal(_ORDINAL_1970 + day).isoformat()


def parse_day(text: str) -> int:
    """Raises ValueError with a sentence."""
    try:
        return datetime.date.fromisoformat(text if _DAY.fullmatch(text) else "").toordinal() - _ORDINAL_1970
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no day: write it like 2026-12-31") from None
