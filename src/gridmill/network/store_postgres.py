"""The network's database on PostgreSQL, for several gateways on one ledger. The contract is store.py's.

Transactions are READ COMMITTED; what they read in order to write it they lock first, in sorted order (`among` with
`lock`), and CHECK constraints hold the rest. SERIALIZABLE would add nothing but retries: every settlement touches the
row of the network's fees, so any two of them conflict anyway, and waiting for a lock is cheaper than starting again.

A transaction that lost a race or its connection runs again, as often as the constants say. Only a connection that ends
while COMMIT is on its way leaves a doubt, and then the caller is told so: the same ids a second time do no harm.

Announcements are rows in `changes`, numbered in the order of their commits, because each takes one lock last of all;
NOTIFY only wakes those who wait. A listener that missed a wake-up looks twice a second, so it finds them anyway.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

from gridmill.network.store import (
    PENDING_WRITES_MAX,
    Action,
    Changed,
    Migration,
    Row,
    StoreUnusable,
    statements_of,
)

T = TypeVar("T")

POOL_CONNECTIONS = 8  # more transactions at once only wait for each other's locks; the server's default holds 100
CONNECT_SECONDS_MAX = 10.0
WAIT_SECONDS_MAX = 30.0  # for a connection of the pool: whoever waits longer is behind a database that stands still
STATEMENT_SECONDS_MAX = 60.0  # a lock held this long is held by a program that hangs
MIGRATION_SECONDS_MAX = 900.0  # a large table is copied and rewritten; another gateway may be doing it
RACES_MAX = 20  # a deadlock has a winner each time, so this is reached only by code that locks out of order
RACE_PAUSE_SECONDS = 0.01  # the winner has to wake up and take the lock, or the two meet in the same deadlock again
UNIQUE_VIOLATIONS_MAX = 5  # the second run sees the row that the first collided with; a true duplicate stays one
LOST_CONNECTIONS_MAX = POOL_CONNECTIONS + 1  # a restarted server has closed each of the pool's

POLL_SECONDS = 0.5
LISTENER_SECONDS_MAX = 5.0  # an answer that takes longer means that the connection is dead
RECONNECT_SECONDS_FIRST, RECONNECT_SECONDS_MAX = 0.1, 5.0
CHANGES_AT_ONCE = 1000
CHANGES_KEPT_MS = 24 * 3600 * 1000  # for a person who asks what happened; listeners are never this far behind
PRUNE_SECONDS = 3600.0

CHANNEL = "gridmill_changes"
OUR_LOCKS, MIGRATION_LOCK, ANNOUNCEMENT_LOCK = 0x67726D6C, 1, 2  # advisory locks of this database: ours, and which one

BOOKKEEPING = """
CREATE TABLE IF NOT EXISTS gridmill_schema (version BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS changes (
    number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic TEXT NOT NULL,
    subject TEXT NOT NULL,
    at_ms BIGINT NOT NULL
);
"""
CLOCK_MS = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"

QUOTED_OR_MARK = re.compile(r"'[^']*'|\"[^\"]*\"|\?")
IN_LIST = re.compile(r"([\w.]+)\s+IN\s*\(\s*\?\?\s*\)", re.IGNORECASE)
# A name and TEXT, where a column is defined: not in CAST(x AS TEXT).
TEXT_COLUMN = re.compile(r"((?:^|[(,]|\bADD\s+COLUMN)[ \t]*\w+[ \t]+)TEXT\b", re.MULTILINE)

# A server that stops, a network that breaks. Whether a transaction had got through is known from where it stood.
ENDED = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,  # its own state is muddled, which a server that kills sessions can bring about
    OSError,
)
# It refuses for a while, and has undone what it refused: a full disk, a server that became a replica, a cancel by hand.
REFUSED_FOR_NOW = (
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.QueryCanceledError,
    asyncpg.LockNotAvailableError,
)
UNREACHABLE = (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError)

log = logging.getLogger("gridmill.network.store")


class _ConnectionLost(Exception):
    """Before COMMIT was sent: nothing was kept, so that it may be tried again."""


class PostgresStore:
    """One database, any number of programs. `wall_clock` (Unix seconds) replaces the server's clock in tests."""

    def __init__(self, url: str, *, wall_clock: Callable[[], float] | None = None) -> None:
        self._url = url
        self._wall_clock = wall_clock
        self._name = _without_password(url)
        self._pool: Any = None
        self._running: set[asyncio.Task[Any]] = set()
        self._listeners: list[Changed] = []
        self._listening: asyncio.Task[None] | None = None
        self._heard = 0  # the number of the last change that listeners were told

    async def open(self, migrations: Sequence[Migration]) -> None:
        connection = await self._connect(MIGRATION_SECONDS_MAX)
        try:
            await self._migrate(connection, migrations)
            self._heard = await _last_change(connection)
            await connection.close()
        except UNREACHABLE as error:
            raise StoreUnusable(
                f"{self._name} cannot be used ({_reason(error)}): give Gridmill a database that is empty or its own,"
                " and whose owner it is"
            ) from error
        finally:
            _terminate(connection)
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=POOL_CONNECTIONS,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=STATEMENT_SECONDS_MAX,
            statement_cache_size=512,
            init=_prepare_connection,
            reset=_leave_as_it_is,
            server_settings=_server_settings(),
        )
        self._start_listening()

    async def run(self, action: Action[T]) -> T:
        if self._pool is None:
            raise StoreUnusable(f"{self._name} is closed")
        if len(self._running) >= PENDING_WRITES_MAX:
            raise StoreUnusable(
                f"over {PENDING_WRITES_MAX} writes wait for {self._name}: it is too slow or stands still"
            )
        # A task of its own, because a caller that stops waiting must not cut a transaction off.
        running = asyncio.create_task(self._run(action, self._pool))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    async def read(self, action: Action[T]) -> T:
        if self._pool is None:
            raise StoreUnusable(f"{self._name} is closed")
        return await self._run(action, self._pool, "REPEATABLE READ READ ONLY")

    def listen(self, changed: Changed) -> None:
        """What was announced since `open` is heard as well."""
        self._listeners.append(changed)
        self._start_listening()

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        if pool is not None:
            while self._running:
                await asyncio.wait(self._running)
            try:
                async with asyncio.timeout(CONNECT_SECONDS_MAX):
                    await pool.close()
            except UNREACHABLE:
                pool.terminate()  # there is nobody left to say goodbye to

    async def _run(self, action: Action[T], pool: Any, isolation: str = "READ COMMITTED") -> T:
        races = unique_violations = lost = 0
        while True:
            try:
                return await self._attempt(action, pool, isolation)
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
                races += 1
                if races >= RACES_MAX:
                    raise
                await asyncio.sleep(RACE_PAUSE_SECONDS)
            except asyncpg.UniqueViolationError:
                unique_violations += 1
                if unique_violations >= UNIQUE_VIOLATIONS_MAX:
                    raise
            except _ConnectionLost as error:
                lost += 1
                if lost >= LOST_CONNECTIONS_MAX:
                    raise StoreUnusable(
                        f"{self._name} keeps ending its connections ({error}): nothing was kept"
                    ) from error

    async def _attempt(self, action: Action[T], pool: Any, isolation: str) -> T:
        try:
            connection = await pool.acquire(timeout=WAIT_SECONDS_MAX)
        except UNREACHABLE as error:
            raise StoreUnusable(f"{self._name} cannot be reached ({_reason(error)}): nothing was kept") from error
        committing = False
        try:
            await connection.execute(f"BEGIN ISOLATION LEVEL {isolation}")
            transaction = _PostgresTransaction(connection, self._wall_clock)
            result = await action(transaction)
            await transaction.write_announcements()
            committing = True
            ended = await connection.execute("COMMIT")
            if ended != "COMMIT":
                raise RuntimeError("an action went on after a statement had failed: PostgreSQL undid all of it")
            return result
        except BaseException as error:
            if isinstance(error, ENDED) or (isinstance(error, asyncpg.InterfaceError) and _is_closed(connection)):
                _terminate(connection)
                if committing:
                    raise StoreUnusable(
                        f"{self._name} was lost during a commit ({_reason(error)}): whether it was kept is unknown;"
                        " the same with the same ids may be asked again"
                    ) from error
                if isinstance(error, TimeoutError):
                    raise StoreUnusable(
                        f"{self._name} did not answer within {STATEMENT_SECONDS_MAX:.0f} s: nothing was kept"
                    ) from error
                raise _ConnectionLost(_reason(error)) from error
            await _roll_back(connection, error)
            if isinstance(error, REFUSED_FOR_NOW):
                raise StoreUnusable(f"{self._name} refuses this now ({_reason(error)}): nothing was kept") from error
            raise
        finally:
            await pool.release(connection)

    async def _connect(self, seconds_max: float) -> Any:
        try:
            return await asyncpg.connect(
                self._url,
                timeout=CONNECT_SECONDS_MAX,
                command_timeout=seconds_max,
                server_settings=_server_settings(),
            )
        except UNREACHABLE as error:
            raise StoreUnusable(
                f"{self._name} cannot be reached ({_reason(error)}): start it, or correct its address"
            ) from error

    async def _migrate(self, connection: Any, migrations: Sequence[Migration]) -> None:
        """All that is missing, and the copy from before, in one transaction: the database is old or new, never between.

        The lock makes a second program wait that starts at the same moment; then it finds nothing left to do."""
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", OUR_LOCKS, MIGRATION_LOCK)
            await connection.execute(_in_postgres(BOOKKEEPING))
            applied = int(await connection.fetchval("SELECT coalesce(max(version), 0) FROM gridmill_schema"))
            if applied > len(migrations):
                raise StoreUnusable(
                    f"{self._name} was written by a newer Gridmill (schema {applied}, this one knows "
                    f"{len(migrations)}): upgrade Gridmill, or use another database"
                )
            if applied == len(migrations):
                return
            if applied > 0:
                await _copy_tables(connection, f"gridmill_before_{len(migrations)}")
            for migration in migrations[applied:]:
                for statement in statements_of(_in_postgres(migration)):
                    await connection.execute(statement)
            await connection.execute("DELETE FROM gridmill_schema")
            await connection.execute("INSERT INTO gridmill_schema (version) VALUES ($1)", len(migrations))

    def _start_listening(self) -> None:
        if self._pool is not None and self._listeners and self._listening is None:
            self._listening = asyncio.create_task(self._listen_forever())

    async def _listen_forever(self) -> None:
        """Ends by being cancelled in `close`."""
        missed = False
        pause_seconds = RECONNECT_SECONDS_FIRST
        while True:
            try:
                connection = await self._connect(LISTENER_SECONDS_MAX)
            except StoreUnusable as error:
                log.warning("changes by other gateways are not heard: %s", error)
            else:
                pause_seconds = RECONNECT_SECONDS_FIRST
                try:
                    await self._hear(connection, missed=missed)
                except UNREACHABLE as error:
                    log.warning("changes by other gateways are not heard, connecting again: %s", _reason(error))
                finally:
                    connection.terminate()
            missed = True
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, RECONNECT_SECONDS_MAX)

    async def _hear(self, connection: Any, *, missed: bool) -> None:
        """Tells the listeners until the connection breaks."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        connection.add_termination_listener(lambda _: woken.set())
        await connection.add_listener(CHANNEL, lambda *_: woken.set())
        if missed:
            self._heard = await _last_change(connection)  # the server may have come back from an older copy
            self._tell("*", "")
        prune_at = loop.time()
        while True:
            woken.clear()
            rows = await connection.fetch(
                "SELECT number, topic, subject FROM changes WHERE number > $1 ORDER BY number LIMIT $2",
                self._heard,
                CHANGES_AT_ONCE,
            )
            for number, topic, subject in rows:
                self._heard = number
                self._tell(topic, subject)
            if loop.time() >= prune_at:
                await connection.execute(f"DELETE FROM changes WHERE at_ms < {CLOCK_MS} - $1", CHANGES_KEPT_MS)
                prune_at = loop.time() + PRUNE_SECONDS
            if not rows:
                try:
                    async with asyncio.timeout(POLL_SECONDS):
                        await woken.wait()
                except TimeoutError:
                    pass  # the poll, for a wake-up that got lost

    def _tell(self, topic: str, subject: str) -> None:
        """Through the loop, so that a listener that raises is reported there and stops nobody else."""
        loop = asyncio.get_running_loop()
        for changed in self._listeners:
            loop.call_soon(changed, topic, subject)


class _PostgresTransaction:
    def __init__(self, connection: Any, wall_clock: Callable[[], float] | None) -> None:
        self._connection = connection
        self._wall_clock = wall_clock
        self._announcements: list[tuple[str, str]] = []

    async def all(self, sql: str, *values: Any) -> list[Row]:
        with _as_sqlite_says_it():
            return [tuple(row) for row in await self._connection.fetch(_numbered(sql), *values)]

    async def one(self, sql: str, *values: Any) -> Row | None:
        rows = await self.all(sql, *values)
        return rows[0] if rows else None

    async def do(self, sql: str, *values: Any) -> int:
        with _as_sqlite_says_it():
            status: str = await self._connection.execute(_numbered(sql), *values)
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() else -1  # what SQLite says of a statement that changes no rows

    async def do_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        with _as_sqlite_says_it():
            await self._connection.executemany(_numbered(sql), rows)

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            with _as_sqlite_says_it():
                await self._connection.copy_records_to_table(table, records=rows, columns=columns)

    async def among(self, sql: str, values: Sequence[Any], *, lock: bool = False) -> list[Row]:
        if not values:
            return []
        with _as_sqlite_says_it():
            return [tuple(row) for row in await self._connection.fetch(_of_array(sql, lock), values)]

    async def reads_everything(self) -> None:
        await self._connection.execute("SET LOCAL enable_seqscan = on")

    async def now_ms(self) -> int:
        if self._wall_clock is not None:
            return int(self._wall_clock() * 1000)
        return int(await self._connection.fetchval(f"SELECT {CLOCK_MS}"))

    async def announce(self, topic: str, subject: str = "") -> None:
        self._announcements.append((topic, subject))

    async def write_announcements(self) -> None:
        """Last of all, because from here to the commit no other transaction can announce: that is what makes the
        numbers go up in the order of the commits."""
        if self._announcements:
            await self._connection.execute(
                "SELECT pg_advisory_xact_lock($1, $2), pg_notify($3, '')", OUR_LOCKS, ANNOUNCEMENT_LOCK, CHANNEL
            )
            await self._connection.executemany(
                f"INSERT INTO changes (topic, subject, at_ms) VALUES ($1, $2, {CLOCK_MS})", self._announcements
            )


@lru_cache(maxsize=2048)
def _numbered(sql: str) -> str:
    """`?` outside of quotes becomes $1, $2, …"""
    numbers = count(1)
    return QUOTED_OR_MARK.sub(lambda found: f"${next(numbers)}" if found[0] == "?" else found[0], sql)


@lru_cache(maxsize=2048)
def _of_array(sql: str, lock: bool) -> str:
    """`x IN (??)` becomes `x = ANY($1)`. Rows are locked in the order of `x`, so that two transactions with the same
    rows never wait for each other, whatever the order of their values."""
    parts = IN_LIST.split(sql)
    assert len(parts) == 3, "among() takes a SELECT with one `column IN (??)`"
    before, column, after = parts
    locking = f" ORDER BY {column} FOR UPDATE" if lock else ""
    return f"{before}{column} = ANY($1){after}{locking}"


def _in_postgres(migration: Migration) -> Migration:
    """Text compares by its bytes, as in SQLite and in Python, whatever language the database was made for."""
    migration = TEXT_COLUMN.sub(r'\1TEXT COLLATE "C"', migration)
    migration = re.sub(r"\bBLOB\b", "BYTEA", migration)
    migration = re.sub(r"\bINTEGER\b", "BIGINT", migration)
    return re.sub(r"\s+WITHOUT\s+ROWID\b", "", migration)


async def _copy_tables(connection: Any, schema: str) -> None:
    """Data only: it is there to look things up, or to put them back by hand."""
    tables = await connection.fetch(
        "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename"
    )
    await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    await connection.execute(f"CREATE SCHEMA {schema}")
    for (table,) in tables:
        await connection.execute(f"CREATE TABLE {schema}.{table} AS TABLE {table}")


async def _last_change(connection: Any) -> int:
    return int(await connection.fetchval("SELECT coalesce(max(number), 0) FROM changes"))


async def _prepare_connection(connection: Any) -> None:
    """SUM of BIGINT is NUMERIC here: without this, sums would come as Decimal."""
    await connection.set_type_codec("numeric", schema="pg_catalog", encoder=str, decoder=_number, format="text")


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


async def _leave_as_it_is(connection: Any) -> None:
    """Transactions change nothing about a connection, so nothing has to be reset, which would cost a round trip."""


async def _roll_back(connection: Any, why: BaseException) -> None:
    if not isinstance(why, Exception):
        _terminate(connection)  # the program ends: no time to be polite
        return
    try:
        await connection.execute("ROLLBACK")
    except UNREACHABLE:
        _terminate(connection)  # which undoes it too; what the action raised is what its caller wants to know


def _is_closed(connection: Any) -> bool:
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:
        return True  # the pool has taken it back already, which it does with those that broke


def _terminate(connection: Any) -> None:
    if not _is_closed(connection):
        connection.terminate()


@contextmanager
def _as_sqlite_says_it() -> Iterator[None]:
    """A number too large for a column is an OverflowError there."""
    try:
        yield
    except asyncpg.DataError as error:
        if isinstance(error.__cause__, OverflowError):
            raise OverflowError(str(error)) from error
        raise


def _server_settings() -> dict[str, str]:
    """A gateway that vanishes without a word must not keep its locks for the two hours that TCP allows.

    What we ask for, we ask for by key. PostgreSQL would read whole tables for it while its statistics are those of
    empty ones, and a young network's settlements would take ever longer (measured: 75 ms over 27 000 transfers).
    """
    return {
        "enable_seqscan": "off",
        "application_name": "gridmill",
        "idle_in_transaction_session_timeout": f"{STATEMENT_SECONDS_MAX:.0f}s",
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "4",
    }


def _without_password(url: str) -> str:
    """Enough of the address to recognise it in a log."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or "this machine"
        return f"the PostgreSQL database {parts.path.removeprefix('/') or '(unnamed)'} on {host}"
    except ValueError:
        return "the PostgreSQL database"


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__
