"""Usage adds up to what was settled, whatever the order, and an account sees its own alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from databases import Database
from gridmill.network import usage
from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import Store, Transaction
from gridmill.network.usage import Earned, Span, UsageRow

EVER = Span(0, 30_000)


def used(key: str = "k1", model: str = "demo", day: int = 20_778, account: str = "a1", n: int = 1) -> UsageRow:
    return UsageRow(account, key, model, day, n, 10 * n, 3 * n, 5 * n, 100 * n)


def with_store(database: Database, body: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        store = database.store()
        await store.open(MIGRATIONS)
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_usage_of_one_day_adds_up_within_and_over_transactions(database: Database) -> None:
    async def body(store: Store) -> None:
        for rows in ([used(), used(n=2), used("k2")], [used(n=4)], []):
            await store.run(lambda tx, rows=rows: usage.add(tx, rows))  # type: ignore[misc]
        assert await store.run(lambda tx: usage.read(tx, "a1", EVER)) == [used(n=7), used("k2")]

    with_store(database, body)


def test_an_account_sees_its_own_usage_between_two_days_both_included(database: Database) -> None:
    async def body(store: Store) -> None:
        days = [20, 21, 51, 52]
        rows = [used(day=day, account=account) for day in days for account in ("a1", "a2")]
        await store.run(lambda tx: usage.add(tx, rows))
        found = await store.run(lambda tx: usage.read(tx, "a1", Span(21, 51)))
        assert found == [used(day=day) for day in days[1:3]]
        assert len(await store.run(lambda tx: usage.read(tx, "a1", EVER))) == 4
        assert len(await store.run(lambda tx: usage.read(tx, None, EVER))) == 8

    with_store(database, body)


def test_an_account_sees_what_nodes_earned_that_joined_with_its_keys(database: Database) -> None:
    async def body(store: Store) -> None:
        async def prepare(tx: Transaction) -> None:
            for node, account in (("node-1", "a1"), ("node-2", "a2"), ("node-3", "a1")):
                await tx.do("INSERT INTO node_keys VALUES (?, ?, 'key-1', 5)", node, account)
            columns = (
                *("chain", "node_id", "class_id", "period_start_seconds", "period_seconds", "network_key", "node_key"),
                *("seq", "input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits", "head"),
                "countersigned_seq",
            )
            await tx.append(
                "receipt_counters",
                columns,
                [
                    (b"1", "node-1", "c", 86_400, 86_400, b"", b"", 7, 10, 3, 5, 100, b"", 7),
                    (b"2", "node-2", "c", 86_400, 86_400, b"", b"", 7, 10, 3, 5, 100, b"", 7),
                    (b"3", "node-3", "c", 86_400, 86_400, b"", b"", 7, 20, 6, 10, 200, b"", 6),
                    (b"4", "node-3", "c", 3 * 86_400, 86_400, b"", b"", 7, 20, 6, 10, 200, b"", 7),
                ],
            )

        await store.run(prepare)
        assert await store.run(lambda tx: usage.earned(tx, "a1", Span(1, 2))) == [
            Earned("node-1", "c", 86_400, 86_400, 10, 3, 5, 100, True),
            Earned("node-3", "c", 86_400, 86_400, 20, 6, 10, 200, False),
        ]
        assert len(await store.run(lambda tx: usage.earned(tx, "a1", Span(1, 3)))) == 3

    with_store(database, body)


@pytest.mark.parametrize(
    ("group", "totals"),
    [
        ("", [{"requests": 7}]),
        ("model", [{"model": "demo", "requests": 3}, {"model": "big", "requests": 4}]),
        (" key ,", [{"key": "k1", "requests": 5}, {"key": "k2", "requests": 2}]),
        ("account,day", [{"day": "2026-11-21", "account": "a1", "requests": 7}]),
    ],
)
def test_totals_are_of_everything_that_the_group_does_not_name(group: str, totals: list[dict[str, object]]) -> None:
    rows = [used("k1", "demo"), used("k2", "demo", n=2), used("k1", "big", n=4)]
    found = usage.grouped(rows, usage.parse_group(group))
    for total, expected in zip(found, totals, strict=True):
        n = expected["requests"]
        assert isinstance(n, int)
        counts = {"input_tokens": 10 * n, "cached_tokens": 3 * n, "output_tokens": 5 * n, "charge_nanocredits": 100 * n}
        assert total == {**expected, **counts}


def test_usage_cannot_be_grouped_by_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="day, account, model, key"):
        usage.parse_group("day,colour")


def test_a_span_is_thirty_days_unless_both_ends_are_named() -> None:
    now = 20_778 * 86_400 + 5.0
    assert Span.parse(None, None, now) == Span(20_749, 20_778)
    assert Span.parse("2026-11-21", None, now) == Span(20_778, 20_778)
    assert Span.parse(None, "1970-01-30", now) == Span(0, 29)
    with pytest.raises(ValueError, match="comes after"):
        Span.parse("2026-11-22", None, now)


def test_days_are_utc_and_checked() -> None:
    assert [usage.day_of(moment) for moment in (0, 86_399.9, 86_400)] == [0, 0, 1]
    assert [usage.day_text(day) for day in (0, 20_778)] == ["1970-01-01", "2026-11-21"]
    assert usage.parse_day("2026-11-21") == 20_778
    for wrong in ("", "2026-02-29", "20260228", "2026-2-28", "yesterday", "2026-W01-1"):
        with pytest.raises(ValueError, match="no day"):
            usage.parse_day(wrong)
