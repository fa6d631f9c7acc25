"""What each key used, by model and day: the running totals behind `GET /v1/usage`.

A row is added to in the transaction that settles its works, so that usage and money never tell different stories. Days
are UTC, counted from 1970-01-01 inside and written as in 2026-11-21 outside.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable

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

GROUPS = ("day", "model", "key")
DAY_SECONDS = 86_400
_ORDINAL_1970 = datetime.date(1970, 1, 1).toordinal()
DAY_MAX = datetime.date.max.toordinal() - _ORDINAL_1970
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


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


async def read(transaction: Transaction, account_id: str, since: int = 0, until: int = DAY_MAX) -> list[UsageRow]:
    """All totals of an account from the day `since` to the day `until`, both included, in order of days."""
    rows = await transaction.all(
        "SELECT account_id, key_id, model, day, requests, input_tokens, cached_tokens, output_tokens,"
        " charge_nanocredits FROM usage_days WHERE account_id = ? AND day >= ? AND day <= ?"
        " ORDER BY day, model, key_id",
        account_id,
        since,
        until,
    )
    return [UsageRow(*row) for row in rows]


class Total(msgspec.Struct, frozen=True):
    """Usage added up over everything that its group does not name."""

    day: str = ""
    model: str = ""
    key_id: str = ""
    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    charge_nanocredits: int = 0


def grouped(rows: Iterable[UsageRow], group: Iterable[str]) -> list[Total]:
    """One total for each different value of the named parts, `day`, `model` and `key`, in the order of `rows`."""
    wanted = set(group)
    totals: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        key = (
            day_text(row.day) if "day" in wanted else "",
            row.model if "model" in wanted else "",
            row.key_id if "key" in wanted else "",
        )
        numbers = (row.requests, row.input_tokens, row.cached_tokens, row.output_tokens, row.charge_nanocredits)
        known = totals.setdefault(key, [0, 0, 0, 0, 0])
        for place, number in enumerate(numbers):
            known[place] += number
    return [Total(*key, *numbers) for key, numbers in totals.items()]


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


async def earned(
    transaction: Transaction, account_id: str, since_seconds: int = 0, until_seconds: int = 1 << 62
) -> list[Earned]:
    """Of all nodes that joined with keys of this account, in periods that began from `since` on and before `until`."""
    rows = await transaction.all(
        "SELECT c.node_id, c.class_id, c.period_start_seconds, c.period_seconds, c.input_tokens, c.cached_tokens,"
        " c.output_tokens, c.pay_nanocredits, c.seq, c.countersigned_seq"
        " FROM node_keys n JOIN receipt_counters c ON c.node_id = n.node_id"
        " WHERE n.account_id = ? AND c.period_start_seconds >= ? AND c.period_start_seconds < ?"
        " ORDER BY c.period_start_seconds, c.node_id, c.class_id",
        account_id,
        since_seconds,
        until_seconds,
    )
    return [Earned(*row[:8], countersigned=row[9] >= row[8]) for row in rows]


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
