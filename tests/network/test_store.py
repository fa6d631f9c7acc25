"""The store commits what it says it committed, and refuses files that are not its own."""

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gridmill.network.store import Store, StoreUnusable

TABLE = "CREATE TABLE facts (number INTEGER PRIMARY KEY)"


def opened(path: Path, migrations: tuple[str, ...] = (TABLE,)) -> Store:
    store = Store(path)
    store.open(migrations)
    return store


def insert(number: int) -> Callable[[sqlite3.Connection], int]:
    def action(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO facts (number) VALUES (?)", (number,))
        return number

    return action


def numbers(path: Path) -> list[int]:
    with sqlite3.connect(path) as connection:
        return [row[0] for row in connection.execute("SELECT number FROM facts ORDER BY number")]


def run(work: Awaitable[object]) -> object:
    async def body() -> object:
        return await work

    return asyncio.run(body())


def test_a_write_is_on_disk_when_its_caller_resumes(tmp_path: Path) -> None:
    store = opened(tmp_path / "a.sqlite")
    assert run(store.run(insert(7))) == 7
    assert numbers(tmp_path / "a.sqlite") == [7]  # read by another connection while the store is open
    store.close()


def test_many_writers_share_commits_and_a_failing_one_undoes_only_itself(tmp_path: Path) -> None:
    store = opened(tmp_path / "a.sqlite")

    async def body() -> list[object]:
        wanted = [insert(n) for n in range(300)] + [insert(5)]
        return await asyncio.gather(*(store.run(action) for action in wanted), return_exceptions=True)

    results = asyncio.run(body())
    store.close()
    assert results[:300] == list(range(300))
    assert isinstance(results[300], sqlite3.IntegrityError)
    assert numbers(tmp_path / "a.sqlite") == list(range(300))


def test_close_finishes_what_was_handed_in_and_may_be_called_twice(tmp_path: Path) -> None:
    store = opened(tmp_path / "a.sqlite")

    async def body() -> None:
        pending = [asyncio.ensure_future(store.run(insert(n))) for n in range(50)]
        await asyncio.sleep(0)
        await asyncio.to_thread(store.close)
        await asyncio.gather(*pending)

    asyncio.run(body())
    store.close()
    assert len(numbers(tmp_path / "a.sqlite")) == 50


def test_migrations_run_once_each_and_leave_a_copy_of_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    opened(path).close()
    store = opened(path, (TABLE, "CREATE TABLE more (word TEXT);\nINSERT INTO facts VALUES (1)"))
    store.close()
    opened(path, (TABLE, "CREATE TABLE more (word TEXT);\nINSERT INTO facts VALUES (1)")).close()
    assert numbers(path) == [1]
    assert numbers(tmp_path / "a.before-2.sqlite") == []


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    opened(path).close()
    with pytest.raises(StoreUnusable):
        opened(path, (TABLE, "INSERT INTO facts VALUES (1);\nINSERT INTO nowhere VALUES (1)"))
    assert numbers(path) == []
    opened(path).close()


def test_a_file_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    opened(path, (TABLE, "CREATE TABLE more (word TEXT)")).close()
    with pytest.raises(StoreUnusable, match="newer Gridmill"):
        opened(path)


def test_a_file_that_is_no_database_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"this is not a database, but it is long enough to be taken for one" * 50)
    with pytest.raises(StoreUnusable, match="cannot be used"):
        opened(path)


def test_the_database_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    opened(tmp_path / "a.sqlite").close()
    assert (tmp_path / "a.sqlite").stat().st_mode & 0o077 == 0


def test_a_database_that_another_program_locks_fails_that_write_and_serves_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    store = opened(path)

    async def body() -> None:
        await store.run(lambda connection: connection.execute("PRAGMA busy_timeout = 50").fetchall())
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnusable, match="could not be written"):
            await store.run(insert(1))
        other.execute("ROLLBACK")
        other.close()
        assert await store.run(insert(2)) == 2

    asyncio.run(body())
    store.close()
    assert numbers(path) == [2]


def test_a_caller_who_stops_waiting_does_not_stop_the_writer(tmp_path: Path) -> None:
    store = opened(tmp_path / "a.sqlite")
    started, released = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        started.set()
        released.wait(10)
        connection.execute("INSERT INTO facts (number) VALUES (1)")

    async def body() -> None:
        impatient = asyncio.ensure_future(store.run(slow))
        await asyncio.to_thread(started.wait, 10)
        impatient.cancel()
        await asyncio.sleep(0)
        released.set()
        assert await store.run(insert(2)) == 2

    asyncio.run(body())
    store.close()
    assert numbers(tmp_path / "a.sqlite") == [1, 2]
