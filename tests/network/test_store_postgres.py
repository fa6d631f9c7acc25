"""What only a server has: several gateways at once, lost races, lost connections, and a clock of its own."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from databases import Database
from gridmill.network import store_postgres
from gridmill.network.store import Action, Store, StoreUnusable, Transaction, store_at
from postgres_server import OwnServer

COUNTERS = """
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    content BLOB,
    value BIGINT NOT NULL DEFAULT 0
) WITHOUT ROWID;
"""
SECONDS_MAX = 30.0  # a crowded machine may take this long; nothing is measured by it


def with_stores(
    database: Database, body: Callable[..., Awaitable[None]], count: int = 1, migrations: tuple[str, ...] = (COUNTERS,)
) -> None:
    """Each store stands for a gateway. When they are closed no task of theirs may be left."""

    async def run() -> None:
        stores = [database.store() for _ in range(count)]
        for store in stores:
            await store.open(migrations)
        try:
            async with asyncio.timeout(SECONDS_MAX):
                await body(*stores)
        finally:
            for store in stores:
                await store.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@asynccontextmanager
async def connected(database: Database) -> AsyncIterator[Any]:
    """A connection that is no store's."""
    connection = await asyncpg.connect(database.url)
    try:
        yield connection
    finally:
        await connection.close()


async def until(query: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """PostgreSQL tells nobody that a session waits, so it has to be asked again and again."""
    while not await query():
        await asyncio.sleep(0.01)


async def waits_for_a_lock(connection: Any, sessions: int = 1) -> None:
    sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    async def enough() -> bool:
        await connection.execute("SELECT pg_stat_clear_snapshot()")  # in a transaction it would see the same for ever
        return int(await connection.fetchval(sql)) >= sessions

    await until(enough)


def insert(name: str, value: int = 0) -> Action[None]:
    async def action(tx: Transaction) -> None:
        await tx.do("INSERT INTO counters (name, value) VALUES (?, ?)", name, value)

    return action


async def counters(tx: Transaction) -> list[tuple[Any, ...]]:
    return await tx.all("SELECT name, value FROM counters ORDER BY name")


def test_a_write_is_seen_by_others_when_its_caller_resumes(postgres_database: Database) -> None:
    async def body(store: Store) -> None:
        async with connected(postgres_database) as other:
            for number in range(20):
                await store.run(insert(str(number)))
                assert await other.fetchval("SELECT count(*) FROM counters") == number + 1

    with_stores(postgres_database, body)


def test_increments_of_two_gateways_under_locks_add_up_and_none_runs_twice(postgres_database: Database) -> None:
    names = [f"name-{n}" for n in range(8)]
    runs: list[int] = []

    def add_to_several(first: int) -> Action[None]:
        chosen = [names[(first + n) % 8] for n in range(4)]  # overlapping, and in every order

        async def action(tx: Transaction) -> None:
            runs.append(first)
            sql = "SELECT name, value FROM counters WHERE name IN (??)"
            found = await tx.among(sql, chosen, lock=True)
            await tx.do_many("UPDATE counters SET value = ? WHERE name = ?", [(v + 1, n) for n, v in found])

        return action

    async def body(one: Store, other: Store) -> None:
        for name in names:
            await one.run(insert(name))
        await asyncio.gather(*((one, other)[n % 2].run(add_to_several(n)) for n in range(200)))
        assert await one.run(counters) == [(name, 100) for name in names]
        assert len(runs) == 200  # nobody was the victim of a deadlock

    with_stores(postgres_database, body, 2)


def test_a_deadlock_has_a_winner_and_the_other_runs_again(postgres_database: Database) -> None:
    runs: list[str] = []

    async def body(one: Store, other: Store) -> None:
        await one.run(insert("a"))
        await one.run(insert("b"))
        both_hold_one = asyncio.Barrier(2)

        def update(names: str) -> Action[None]:
            async def action(tx: Transaction) -> None:
                runs.append(names)
                await tx.do("UPDATE counters SET value = value + 1 WHERE name = ?", names[0])
                if runs.count(names) == 1:
                    await both_hold_one.wait()
                await tx.do("UPDATE counters SET value = value + 1 WHERE name = ?", names[1])

            return action

        await asyncio.gather(one.run(update("ab")), other.run(update("ba")))
        assert await one.run(counters) == [("a", 2), ("b", 2)]
        assert len(runs) > 2

    with_stores(postgres_database, body, 2)


def test_who_loses_a_race_for_a_key_runs_again_and_sees_the_winner(postgres_database: Database) -> None:
    runs: list[int] = []

    async def insert_or_read(tx: Transaction) -> int:
        runs.append(1)
        if (row := await tx.one("SELECT value FROM counters WHERE name = ?", "a")) is None:
            await tx.do("INSERT INTO counters (name, value) VALUES (?, ?)", "a", 1)
            return 1
        return int(row[0])

    async def body(store: Store) -> None:
        async with connected(postgres_database) as winner:
            await winner.execute("BEGIN")
            await winner.execute("INSERT INTO counters (name, value) VALUES ('a', 7)")
            loser = asyncio.ensure_future(store.run(insert_or_read))
            await waits_for_a_lock(winner)
            await winner.execute("COMMIT")
            assert await loser == 7
            assert len(runs) == 2

    with_stores(postgres_database, body)


def test_a_key_that_stays_taken_is_an_error_after_a_few_runs(postgres_database: Database) -> None:
    runs: list[int] = []

    async def insert_again(tx: Transaction) -> None:
        runs.append(1)
        await insert("a")(tx)

    async def body(store: Store) -> None:
        await store.run(insert("a", 7))
        with pytest.raises(asyncpg.UniqueViolationError):
            await store.run(insert_again)
        assert len(runs) == store_postgres.UNIQUE_VIOLATIONS_MAX
        assert await store.run(counters) == [("a", 7)]

    with_stores(postgres_database, body)


def test_a_connection_lost_before_the_commit_costs_a_second_run(postgres_database: Database) -> None:
    runs: list[int] = []

    async def dies_once(tx: Transaction) -> None:
        runs.append(1)
        await insert("a", len(runs))(tx)
        if len(runs) == 1:
            await tx.all("SELECT pg_terminate_backend(pg_backend_pid())")

    async def body(store: Store) -> None:
        await store.run(dies_once)
        assert await store.run(counters) == [("a", 2)]

    with_stores(postgres_database, body)


def test_a_connection_that_is_always_lost_ends_in_a_sentence(postgres_database: Database) -> None:
    async def dies(tx: Transaction) -> None:
        await tx.all("SELECT pg_terminate_backend(pg_backend_pid())")

    async def body(store: Store) -> None:
        with pytest.raises(StoreUnusable, match=r"keeps ending its connections .*: nothing was kept"):
            await store.run(dies)
        await store.run(insert("a"))

    with_stores(postgres_database, body)


def test_a_connection_lost_during_the_commit_is_reported_as_unknown_and_not_tried_again(
    postgres_database: Database,
) -> None:
    runs: list[int] = []
    dies_at_commit = """
        CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$
    """

    async def action(tx: Transaction) -> None:
        runs.append(1)
        await insert("a")(tx)

    async def body(store: Store) -> None:
        async with connected(postgres_database) as other:
            await other.execute(dies_at_commit)
            await other.execute(
                "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON counters"
                " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()"
            )
            with pytest.raises(StoreUnusable, match="whether it was kept is unknown"):
                await store.run(action)
            assert len(runs) == 1
            await other.execute("DROP TRIGGER at_commit ON counters")
        await store.run(action)

    with_stores(postgres_database, body)


def test_an_action_that_goes_on_after_a_failed_statement_is_not_taken_for_committed(
    postgres_database: Database,
) -> None:
    async def swallows(tx: Transaction) -> None:
        await insert("a")(tx)
        with pytest.raises(asyncpg.PostgresError):
            await tx.do("SELECT 1 / 0")

    async def body(store: Store) -> None:
        with pytest.raises(RuntimeError, match="undid all of it"):
            await store.run(swallows)
        assert await store.run(counters) == []

    with_stores(postgres_database, body)


def test_a_caller_who_is_cancelled_in_the_middle_does_not_undo_the_transaction(postgres_database: Database) -> None:
    async def body(store: Store) -> None:
        await store.run(insert("a"))

        async def add(tx: Transaction) -> None:
            await tx.do("UPDATE counters SET value = value + 1")

        async with connected(postgres_database) as other:
            await other.execute("BEGIN")
            await other.execute("SELECT value FROM counters FOR UPDATE")
            impatient = asyncio.ensure_future(store.run(add))
            await waits_for_a_lock(other)
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            closing = asyncio.ensure_future(store.close())
            await asyncio.sleep(0)
            await other.execute("COMMIT")
            await closing
            assert await other.fetchval("SELECT value FROM counters") == 1
        with pytest.raises(StoreUnusable, match="is closed"):
            await store.run(add)

    with_stores(postgres_database, body)


def test_the_clock_is_the_servers_and_goes_on_during_a_transaction(postgres_database: Database) -> None:
    async def twice(tx: Transaction) -> list[int]:
        first = await tx.now_ms()
        await tx.all("SELECT pg_sleep(0.01)")
        return [first, await tx.now_ms()]

    async def body(store: Store) -> None:
        before = time.time()
        first, second = await store.run(twice)
        assert before - 1 <= first / 1000 <= time.time() + 1  # the same machine's clock, if read elsewhere
        assert second > first

    with_stores(postgres_database, body)


def test_migrations_leave_a_copy_of_the_older_tables(postgres_database: Database) -> None:
    async def write(store: Store) -> None:
        await store.run(insert("a", 7))

    async def look(store: Store) -> None:
        async with connected(postgres_database) as other:
            assert await other.fetch("SELECT name, value FROM gridmill_before_3.counters") == [("a", 7)]
            schemas = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'gridmill%'"
            assert await other.fetch(schemas) == [("gridmill_before_3",)]
            assert await other.fetchval("SELECT version FROM gridmill_schema") == 3
        assert await store.run(counters) == [("a", 0)]

    later = (COUNTERS, "CREATE TABLE more (word TEXT);\n", "UPDATE counters SET value = 0;\n")
    with_stores(postgres_database, write)
    with_stores(postgres_database, look, migrations=later)
    with_stores(postgres_database, look, migrations=later)


def test_gateways_that_start_at_once_migrate_once(postgres_database: Database) -> None:
    async def run() -> None:
        stores = [postgres_database.store() for _ in range(4)]
        await asyncio.gather(
            *(store.open((COUNTERS, "INSERT INTO counters (name) VALUES ('a');\n")) for store in stores)
        )
        assert await stores[3].run(counters) == [("a", 0)]
        await asyncio.gather(*(store.close() for store in stores))

    asyncio.run(run())


def test_columns_become_what_postgresql_has_for_them(postgres_database: Database) -> None:
    later = (
        "ALTER TABLE counters ADD COLUMN note TEXT;\nCREATE TABLE x (n INTEGER, word TEXT DEFAULT CAST(1 AS TEXT));\n"
    )

    async def body(store: Store) -> None:
        async with connected(postgres_database) as other:
            columns = await other.fetch(
                "SELECT column_name, data_type, collation_name FROM information_schema.columns"
                " WHERE table_name IN ('counters', 'x') ORDER BY column_name"
            )
        assert [tuple(column) for column in columns] == [
            ("content", "bytea", None),
            ("n", "bigint", None),
            ("name", "text", "C"),
            ("note", "text", "C"),
            ("value", "bigint", None),
            ("word", "text", "C"),
        ]

    with_stores(postgres_database, body, migrations=(COUNTERS, later))


def test_every_gateway_hears_every_announcement_once_and_in_the_same_order(postgres_database: Database) -> None:
    def announce(subject: str) -> Action[None]:
        async def action(tx: Transaction) -> None:
            await tx.announce("keys", subject)

        return action

    async def body(*stores: Store) -> None:
        heard: list[list[str]] = [[] for _ in stores]
        all_heard = asyncio.Event()

        def hear(place: int) -> Callable[[str, str], None]:
            def changed(topic: str, subject: str) -> None:
                assert topic == "keys"
                heard[place].append(subject)
                if all(len(subjects) >= 120 for subjects in heard):
                    all_heard.set()

            return changed

        for place, store in enumerate(stores):
            store.listen(hear(place))
        subjects = [f"{number:03}" for number in range(120)]
        await asyncio.gather(*(stores[n % 3].run(announce(subject)) for n, subject in enumerate(subjects)))
        await all_heard.wait()
        assert sorted(heard[0]) == subjects
        assert heard[0] == heard[1] == heard[2]

    with_stores(postgres_database, body, 3)


def test_a_wake_up_that_got_lost_is_made_up_for_by_looking(postgres_database: Database) -> None:
    async def body(store: Store) -> None:
        heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        store.listen(lambda *change: heard.put_nowait(change))
        async with connected(postgres_database) as other:
            await other.execute("INSERT INTO changes (topic, subject, at_ms) VALUES ('keys', 'quiet', 9e12)")
        assert await heard.get() == ("keys", "quiet")

    with_stores(postgres_database, body)


def test_a_listener_that_lost_its_connection_is_told_to_look_at_everything(postgres_database: Database) -> None:
    async def body(store: Store) -> None:
        heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        store.listen(lambda *change: heard.put_nowait(change))

        async def announce(tx: Transaction) -> None:
            await tx.announce("keys", "later")

        async with connected(postgres_database) as other:

            async def listener_ended() -> bool:
                return bool(
                    await other.fetchval(
                        "SELECT bool_or(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                        " AND datname = current_database() AND query LIKE 'SELECT number%'"
                    )
                )

            await until(listener_ended)
        assert await heard.get() == ("*", "")
        await store.run(announce)
        assert await heard.get() == ("keys", "later")

    with_stores(postgres_database, body)


def test_a_listener_that_raises_is_reported_and_stops_nobody(postgres_database: Database) -> None:
    async def body(store: Store) -> None:
        heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        def raises(topic: str, subject: str) -> None:
            raise ZeroDivisionError(topic)

        store.listen(raises)
        store.listen(lambda *change: heard.put_nowait(change))

        async def announce(tx: Transaction) -> None:
            await tx.announce("keys")

        for _ in range(2):
            await store.run(announce)
            assert await heard.get() == ("keys", "")
        assert [type(context["exception"]) for context in reported] == [ZeroDivisionError] * 2

    with_stores(postgres_database, body)


def test_changes_older_than_a_day_are_removed(postgres_database: Database) -> None:
    async def body(store: Store) -> None:
        async with connected(postgres_database) as other:
            await other.execute("INSERT INTO changes (topic, subject, at_ms) VALUES ('old', '', 1), ('new', '', 9e12)")
            store.listen(lambda *change: None)

            async def removed() -> bool:
                return await other.fetch("SELECT topic FROM changes") == [("new",)]

            await until(removed)

    with_stores(postgres_database, body)


def test_a_server_that_stops_is_a_sentence_and_one_that_comes_back_is_used_again(stoppable_postgres: OwnServer) -> None:
    database = Database("postgres", stoppable_postgres.create_database())

    async def body(store: Store) -> None:
        heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        store.listen(lambda *change: heard.put_nowait(change))
        await asyncio.gather(*(store.run(insert(str(n))) for n in range(20)))  # the pool has several connections
        await asyncio.to_thread(stoppable_postgres.stop)
        for _ in range(3):
            with pytest.raises(StoreUnusable, match=r"cannot be reached .*: nothing was kept"):
                await store.run(insert("never"))
        await asyncio.to_thread(stoppable_postgres.start)
        assert len(await store.run(counters)) == 20
        await asyncio.gather(*(store.run(insert(f"{n} again")) for n in range(20)))
        assert await heard.get() == ("*", "")

    with_stores(database, body)


def test_a_store_can_be_closed_while_its_server_is_away(stoppable_postgres: OwnServer) -> None:
    async def body(store: Store) -> None:
        store.listen(lambda *change: None)
        await store.run(insert("a"))
        await asyncio.to_thread(stoppable_postgres.stop)
        await store.close()

    with_stores(Database("postgres", stoppable_postgres.create_database()), body)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://me:secret@127.0.0.1:1/ledger", "database ledger on 127.0.0.1 cannot be reached"),
        ("postgresql://me:secret@no-such-host.invalid/ledger", "cannot be reached"),
        ("postgres://me:secret@127.0.0.1:port/ledger", "cannot be reached"),
    ],
)
def test_an_address_that_does_not_work_is_refused_in_a_sentence_without_the_password(url: str, sentence: str) -> None:
    with pytest.raises(StoreUnusable, match=sentence) as caught:
        asyncio.run(store_at(url, wall_clock=time.time).open(()))
    assert "secret" not in str(caught.value)


def test_a_database_that_does_not_exist_is_refused_in_a_sentence(postgres_database: Database) -> None:
    with pytest.raises(StoreUnusable, match=r"cannot be reached \(database .* does not exist\)"):
        asyncio.run(store_at(postgres_database.url.replace("gridmill_test_", "no_"), wall_clock=time.time).open(()))


def test_a_database_that_holds_something_else_is_refused_and_left_alone(postgres_database: Database) -> None:
    async def run() -> None:
        async with connected(postgres_database) as other:
            await other.execute("CREATE TABLE counters (theirs TEXT)")
            with pytest.raises(StoreUnusable, match="cannot be used"):
                await postgres_database.store().open((COUNTERS,))
            assert await other.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("counters",)]

    asyncio.run(run())


def test_without_its_library_postgresql_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gridmill.network.store_postgres")
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(StoreUnusable, match=r"install gridmill\[postgres\]"):
        store_at("postgresql://me@example.com/ledger", wall_clock=time.time)
