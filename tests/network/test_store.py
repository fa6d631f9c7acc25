"""The SQLite store commits what it says it committed, and refuses files that are not its own."""

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gridmill.network.store import Action, SqliteStore, StoreUnusable, Transaction

TABLE = "CREATE TABLE facts (number INTEGER PRIMARY KEY)"
WITH_MORE = (TABLE, "CREATE TABLE more (word TEXT);\nINSERT INTO facts VALUES (1)")


def with_store(
    path: Path, body: Callable[[SqliteStore], Awaitable[None]], migrations: tuple[str, ...] = (TABLE,)
) -> None:
    async def run() -> None:
        store = SqliteStore(path, wall_clock=lambda: 1.5)
        await store.open(migrations)
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(run())


async def nothing(store: SqliteStore) -> None:
    """Opening and closing is the whole test."""


def insert(number: int) -> Action[int]:
    async def action(transaction: Transaction) -> int:
        await transaction.do("INSERT INTO facts (number) VALUES (?)", number)
        return number

    return action


def numbers(path: Path) -> list[int]:
    with sqlite3.connect(path) as connection:
        return [row[0] for row in connection.execute("SELECT number FROM facts ORDER BY number")]


def test_a_write_is_on_disk_when_its_caller_resumes(tmp_path: Path) -> None:
    async def body(store: SqliteStore) -> None:
        assert await store.run(insert(7)) == 7
        assert numbers(tmp_path / "a.sqlite") == [7]  # read by another connection while the store is open

    with_store(tmp_path / "a.sqlite", body)


def test_many_writers_share_commits_and_a_failing_one_undoes_only_itself(tmp_path: Path) -> None:
    async def body(store: SqliteStore) -> None:
        wanted = [insert(n) for n in range(300)] + [insert(5)]
        results = await asyncio.gather(*(store.run(action) for action in wanted), return_exceptions=True)
        assert results[:300] == list(range(300))
        assert isinstance(results[300], sqlite3.IntegrityError)

    with_store(tmp_path / "a.sqlite", body)
    assert numbers(tmp_path / "a.sqlite") == list(range(300))


def test_close_finishes_what_was_handed_in_and_may_be_called_twice(tmp_path: Path) -> None:
    async def body(store: SqliteStore) -> None:
        pending = [asyncio.ensure_future(store.run(insert(n))) for n in range(50)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*pending)

    with_store(tmp_path / "a.sqlite", body)
    assert len(numbers(tmp_path / "a.sqlite")) == 50


def test_migrations_run_once_each_and_leave_a_copy_of_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"

    async def write(store: SqliteStore) -> None:
        await store.run(insert(9))

    with_store(path, write)
    with_store(path, nothing, WITH_MORE)
    with_store(path, nothing, WITH_MORE)
    assert numbers(path) == [1, 9]
    assert numbers(tmp_path / "a.before-2.sqlite") == [9]


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with_store(path, nothing)
    with pytest.raises(StoreUnusable):
        with_store(path, nothing, (TABLE, "INSERT INTO facts VALUES (1);\nINSERT INTO nowhere VALUES (1)"))
    assert numbers(path) == []
    with_store(path, nothing)


def test_a_file_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with_store(path, nothing, (TABLE, "CREATE TABLE more (word TEXT)"))
    with pytest.raises(StoreUnusable, match="newer Gridmill"):
        with_store(path, nothing)


def test_a_file_that_is_no_database_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"this is not a database, but it is long enough to be taken for one" * 50)
    with pytest.raises(StoreUnusable, match="cannot be used"):
        with_store(path, nothing)


def test_the_database_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    with_store(tmp_path / "a.sqlite", nothing)
    assert (tmp_path / "a.sqlite").stat().st_mode & 0o077 == 0


def test_a_database_that_another_program_locks_fails_that_write_and_serves_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"

    async def body(store: SqliteStore) -> None:
        async def impatient(transaction: Transaction) -> None:
            await transaction.all("PRAGMA busy_timeout = 50")

        await store.run(impatient)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnusable, match="could not be written"):
            await store.run(insert(1))
        other.execute("ROLLBACK")
        other.close()
        assert await store.run(insert(2)) == 2

    with_store(path, body)
    assert numbers(path) == [2]


def test_a_caller_who_stops_waiting_does_not_stop_the_writer(tmp_path: Path) -> None:
    started, released = threading.Event(), threading.Event()

    async def slow(transaction: Transaction) -> None:
        started.set()
        released.wait(10)
        await transaction.do("INSERT INTO facts (number) VALUES (1)")

    async def body(store: SqliteStore) -> None:
        impatient = asyncio.ensure_future(store.run(slow))
        await asyncio.to_thread(started.wait, 10)
        impatient.cancel()
        await asyncio.sleep(0)
        released.set()
        assert await store.run(insert(2)) == 2

    with_store(tmp_path / "a.sqlite", body)
    assert numbers(tmp_path / "a.sqlite") == [1, 2]


def test_an_action_that_awaits_something_else_fails_alone(tmp_path: Path) -> None:
    async def body(store: SqliteStore) -> None:
        async def sleepy(transaction: Transaction) -> None:
            await transaction.do("INSERT INTO facts (number) VALUES (1)")
            await asyncio.sleep(0)

        with pytest.raises(RuntimeError, match="not its transaction"):
            await store.run(sleepy)
        assert await store.run(insert(2)) == 2

    with_store(tmp_path / "a.sqlite", body)
    assert numbers(tmp_path / "a.sqlite") == [2]
