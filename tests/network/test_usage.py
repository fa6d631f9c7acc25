"""Usage adds up to what was settled, whatever the order, and an account sees its own alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gridmill.network import usage
from gridmill.network.store import SqliteStore, Store
from gridmill.network.usage import Span, UsageRow


def used(key: str = "k1", model: str = "demo", day: int = 20_778, account: str = "a1", n: int = 1) -> UsageRow:
    return UsageRow(account, key, model, day, n, 10 * n, 3 * n, 5 * n, 100 * n)


def with_store(path: Path, body: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        store = SqliteStore(path / "a.sqlite", wall_clock=lambda: 0.0)
        await store.open((usage.MIGRATION,))
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_usage_of_one_day_adds_up_within_and_over_transactions(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        for rows in ([used(), used(n=2), used("k2")], [used(n=4)], []):
            await store.run(lambda tx, rows=rows: usage.add(tx, rows))  # type: ignore[misc]
        assert await store.run(lambda tx: usage.read(tx, "a1", Span(0, 30_000))) == [used(n=7), used("k2")]

    with_store(tmp_path, body)


def test_an_account_sees_its_own_usage_between_two_days_both_included(tmp_path: Path) -> None:
    async def body(store: Store) -> None:
        days = [20, 21, 51, 52]
        rows = [used(day=day, account=account) for day in days for account in ("a1", "a2")]
        await store.run(lambda tx: usage.add(tx, rows))
        found = await store.run(lambda tx: usage.read(tx, "a1", Span(21, 51)))
        assert found == [used(day=day) for day in days[1:3]]
        assert len(await store.run(lambda tx: usage.read(tx, "a1", Span(0, 30_000)))) == 4
        assert len(await store.run(lambda tx: usage.read(tx, None, Span(0, 30_000)))) == 8

    with_store(tmp_path, body)


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
