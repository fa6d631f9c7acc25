"""What store.py promises, on both databases: the same SQL, the same values, the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from databases import Database
from gridmill.network import operator
from gridmill.network.store import Action, Store, StoreUnusable, Transaction

TABLES = """
CREATE TABLE boxes (
    box_id TEXT PRIMARY KEY,
    amount BIGINT NOT NULL CHECK (amount >= 0),
    content BLOB,
    weight DOUBLE PRECISION
) WITHOUT ROWID;
CREATE INDEX boxes_by_amount ON boxes (amount);
"""
MORE_TABLES = "CREATE TABLE labels (word TEXT NOT NULL);\nINSERT INTO labels (word) SELECT box_id FROM boxes;\n"

Body = Callable[[Store], Awaitable[None]]


def with_store(database: Database, body: Body, migrations: tuple[str, ...] = (TABLES,), **options: Any) -> None:
    async def run() -> None:
        store = database.store(**options)
        await store.open(migrations)
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(run())


async def nothing(store: Store) -> None:
    """Opening and closing is the whole test."""


def put(*boxes: tuple[Any, ...]) -> Action[None]:
    async def action(tx: Transaction) -> None:
        await tx.append("boxes", ("box_id", "amount", "content", "weight"), boxes)

    return action


def ask(sql: str, *values: Any) -> Action[list[tuple[Any, ...]]]:
    async def action(tx: Transaction) -> list[tuple[Any, ...]]:
        return await tx.all(sql, *values)

    return action


def test_values_come_back_as_they_went_in(database: Database) -> None:
    boxes = [
        ("a", 2**63 - 1, b"\x00\xff", 0.1),
        ("b", 0, None, None),
        ("c ' ? $1 \U0001f600\n\\", 1, b"", -1e300),
        ("d", True, bytes(range(256)), 3),
    ]

    async def body(store: Store) -> None:
        await store.run(put(*boxes))
        found = await store.run(ask("SELECT box_id, amount, content, weight FROM boxes ORDER BY box_id"))
        assert found == boxes
        assert [type(value) for value in found[3]] == [str, int, bytes, float]
        for box in boxes:
            assert await store.run(ask("SELECT amount FROM boxes WHERE box_id = ?", box[0])) == [(box[1],)]

        async def one_by_one(tx: Transaction) -> None:
            await tx.do("DELETE FROM boxes")
            sql = "INSERT INTO boxes (box_id, amount, content, weight) VALUES (?, ?, ?, ?)"
            await tx.do(sql, *boxes[0])
            await tx.do_many(sql, boxes[1:])

        await store.run(one_by_one)
        assert await store.run(ask("SELECT box_id, amount, content, weight FROM boxes ORDER BY box_id")) == boxes

    with_store(database, body)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_a_number_too_large_for_a_column_is_an_overflow(database: Database, number: int) -> None:
    async def body(store: Store) -> None:
        with pytest.raises(OverflowError):
            await store.run(put(("a", number, None, None)))
        with pytest.raises(OverflowError):
            await store.run(ask("SELECT box_id FROM boxes WHERE amount = ?", number))
        assert await store.run(ask("SELECT box_id FROM boxes")) == []

    with_store(database, body)


def test_sums_and_counts_are_whole_numbers(database: Database) -> None:
    async def body(store: Store) -> None:
        await store.run(put(("a", 2**53 + 1, None, 0.5), ("b", 2, None, 0.25)))
        ((total, number, weight),) = await store.run(ask("SELECT SUM(amount), COUNT(*), SUM(weight) FROM boxes"))
        assert (total, number, weight) == (2**53 + 3, 2, 0.75)
        assert (type(total), type(number)) == (int, int)

    with_store(database, body)


def test_text_sorts_by_its_characters_whatever_the_language(database: Database) -> None:
    names = ["B", "a", "Z", "_", "é", "1", "a-b", "ab", "\U0001f600", "\uffee"]

    async def body(store: Store) -> None:
        await store.run(put(*((name, 0, None, None) for name in names)))
        assert [row[0] for row in await store.run(ask("SELECT box_id FROM boxes ORDER BY box_id"))] == sorted(names)

    with_store(database, body)


def test_a_question_mark_in_quotes_is_not_a_value(database: Database) -> None:
    async def body(store: Store) -> None:
        await store.run(put(("?", 1, None, None), ("b", 2, None, None)))
        sql = "SELECT box_id, 'it''s ?' AS \"why?\" FROM boxes WHERE box_id = '?' AND amount = ?"
        assert await store.run(ask(sql, 1)) == [("?", "it's ?")]

    with_store(database, body)


def test_one_gives_the_first_row_or_none_and_do_counts_the_rows_it_changed(database: Database) -> None:
    async def body(store: Store) -> None:
        async def action(tx: Transaction) -> list[Any]:
            await tx.append("boxes", ("box_id", "amount"), [])
            await tx.append("boxes", ("box_id", "amount"), [("a", 1), ("b", 2)])
            return [
                await tx.one("SELECT amount FROM boxes WHERE box_id = ?", "b"),
                await tx.one("SELECT amount FROM boxes WHERE box_id = ?", "c"),
                await tx.one("UPDATE boxes SET amount = amount + ? WHERE box_id = ? RETURNING amount", 5, "a"),
                await tx.do("UPDATE boxes SET amount = amount + ?", 1),
                await tx.do("INSERT INTO boxes (box_id, amount) VALUES (?, ?) ON CONFLICT DO NOTHING", "a", 9),
                await tx.do("INSERT INTO boxes (box_id, amount) VALUES (?, ?) ON CONFLICT DO NOTHING", "c", 9),
                await tx.do("DELETE FROM boxes WHERE amount > ?", 100),
            ]

        assert await store.run(action) == [(2,), None, (6,), 2, 0, 1, 0]

    with_store(database, body)


def test_an_action_that_fails_undoes_itself_alone(database: Database) -> None:
    class Refused(Exception):
        pass

    def put_or_refuse(number: int) -> Action[int]:
        async def action(tx: Transaction) -> int:
            await tx.do("INSERT INTO boxes (box_id, amount) VALUES (?, ?)", f"{number:03}", number)
            if number % 3 == 0:
                raise Refused(number)
            return number

        return action

    async def body(store: Store) -> None:
        results = await asyncio.gather(*(store.run(put_or_refuse(n)) for n in range(60)), return_exceptions=True)
        for number, result in enumerate(results):
            assert isinstance(result, Refused) if number % 3 == 0 else result == number
        kept = [row[0] for row in await store.run(ask("SELECT amount FROM boxes ORDER BY box_id"))]
        assert kept == [number for number in range(60) if number % 3]

    with_store(database, body)


@pytest.mark.parametrize("boxes", [[("a", 1, None, None)], [("b", -1, None, None)]], ids=["key", "check"])
def test_a_key_that_exists_or_a_check_that_fails_undoes_the_whole_action(database: Database, boxes: list[Any]) -> None:
    async def body(store: Store) -> None:
        await store.run(put(("a", 7, None, None)))

        async def action(tx: Transaction) -> None:
            await tx.do("UPDATE boxes SET amount = 8")
            await put(*boxes)(tx)

        with pytest.raises(Exception, match=r"(?i)unique|check"):
            await store.run(action)
        assert await store.run(ask("SELECT box_id, amount FROM boxes")) == [("a", 7)]

    with_store(database, body)


@pytest.mark.parametrize("lock", [False, True])
@pytest.mark.parametrize("asked", [0, 1, 3, 700, 1500])
def test_among_finds_every_row_that_is_there_once(database: Database, asked: int, lock: bool) -> None:
    async def body(store: Store) -> None:
        await store.run(put(*((f"{n:05}", n, None, None) for n in range(0, 2000, 2))))

        async def action(tx: Transaction) -> list[tuple[Any, ...]]:
            wanted = [f"{n:05}" for n in range(asked)]
            return await tx.among("SELECT box_id, amount FROM boxes WHERE box_id IN (??)", wanted, lock=lock)

        assert sorted(await store.run(action)) == [(f"{n:05}", n) for n in range(0, asked, 2)]

        async def by_number(tx: Transaction) -> list[tuple[Any, ...]]:
            return await tx.among("SELECT b.box_id FROM boxes b WHERE b.amount IN (??)", [4, 5], lock=lock)

        assert await store.run(by_number) == [("00004",)]

    with_store(database, body)


def test_the_clock_is_the_one_that_a_test_sets(database: Database) -> None:
    async def now(tx: Transaction) -> int:
        return await tx.now_ms()

    async def body(store: Store) -> None:
        assert await store.run(now) == 1500

    with_store(database, body, wall_clock=lambda: 1.5)


def test_announcements_are_heard_in_order_after_their_commit_and_those_of_a_failure_never(database: Database) -> None:
    async def body(store: Store) -> None:
        heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        store.listen(lambda topic, subject: heard.put_nowait((topic, subject)))

        def announce(topic: str, *, fail: bool = False) -> Action[None]:
            async def action(tx: Transaction) -> None:
                await tx.announce(topic, "first")
                await tx.announce(topic)
                if fail:
                    raise ValueError(topic)

            return action

        await store.run(announce("keys"))
        with pytest.raises(ValueError, match="lost"):
            await store.run(announce("lost", fail=True))
        await store.run(announce("prices"))
        async with asyncio.timeout(10):
            told = [await heard.get() for _ in range(4)]
        assert told == [("keys", "first"), ("keys", ""), ("prices", "first"), ("prices", "")]
        assert heard.empty()

    with_store(database, body)


def test_a_caller_who_stops_waiting_does_not_undo_the_action(database: Database) -> None:
    async def body(store: Store) -> None:
        impatient = asyncio.ensure_future(store.run(put(("a", 1, None, None))))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        await store.close()

    with_store(database, body)

    async def look(store: Store) -> None:
        assert await store.run(ask("SELECT box_id FROM boxes")) == [("a",)]

    with_store(database, look)


def test_close_finishes_what_was_handed_in_and_may_be_called_twice(database: Database) -> None:
    async def body(store: Store) -> None:
        pending = [asyncio.ensure_future(store.run(put((str(n), n, None, None)))) for n in range(50)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*pending)

    with_store(database, body)

    async def look(store: Store) -> None:
        assert await store.run(ask("SELECT COUNT(*) FROM boxes")) == [(50,)]

    with_store(database, look)


def test_what_was_written_is_there_after_opening_again_with_more_migrations(database: Database) -> None:
    async def write(store: Store) -> None:
        await store.run(put(("a", 1, None, None)))

    async def look(store: Store) -> None:
        assert await store.run(ask("SELECT word FROM labels")) == [("a",)]

    with_store(database, write)
    with_store(database, look, (TABLES, MORE_TABLES))
    with_store(database, look, (TABLES, MORE_TABLES))


def test_a_migration_that_fails_leaves_the_database_as_it_was(database: Database) -> None:
    with_store(database, nothing)
    with pytest.raises(StoreUnusable, match="cannot be used"):
        with_store(
            database, nothing, (TABLES, "INSERT INTO boxes (box_id, amount) VALUES ('x', 1);\nDROP TABLE none;\n")
        )

    async def look(store: Store) -> None:
        assert await store.run(ask("SELECT box_id FROM boxes")) == []

    with_store(database, look)


def test_a_database_from_a_newer_version_is_refused(database: Database) -> None:
    with_store(database, nothing, (TABLES, MORE_TABLES))
    with pytest.raises(StoreUnusable, match=r"newer Gridmill \(schema 2, this one knows 1\)"):
        with_store(database, nothing)


def test_the_tables_of_the_network_can_be_made(database: Database) -> None:
    with_store(database, nothing, operator.MIGRATIONS)
    with_store(database, nothing, operator.MIGRATIONS)


def test_a_read_sees_one_picture_while_others_write_and_may_not_write_itself(database: Database) -> None:
    async def body(store: Store) -> None:
        await store.run(put(("a", 1, None, None)))
        with pytest.raises(Exception, match=r"read-?only"):
            await store.read(put(("b", 1, None, None)))

        async def twice(tx: Transaction) -> tuple[int, int]:
            first = len(await tx.all("SELECT box_id FROM boxes"))
            asyncio.run_coroutine_threadsafe(store.run(put(("c", 1, None, None))), loop).result(10)
            return first, len(await tx.all("SELECT box_id FROM boxes"))

        async def twice_here(tx: Transaction) -> tuple[int, int]:
            first = len(await tx.all("SELECT box_id FROM boxes"))
            await store.run(put(("c", 1, None, None)))
            return first, len(await tx.all("SELECT box_id FROM boxes"))

        loop = asyncio.get_running_loop()
        assert await store.read(twice if database.kind == "sqlite" else twice_here) == (1, 1)
        assert len(await store.read(ask("SELECT box_id FROM boxes"))) == 2

    with_store(database, body)
