"""The network's database: one small contract, SQLite here, PostgreSQL in store_postgres.py.

Three rules. A write is an action, an `async` function over a Transaction that awaits nothing but that transaction; its
caller resumes only after the commit that holds it is on disk. Actions have no effect outside the database, because a
PostgreSQL store runs one again when it lost a race. SQL lives with the noun that owns it, in the subset that both
databases run: `?` for values, BIGINT, TEXT, BLOB and DOUBLE PRECISION columns, ON CONFLICT, RETURNING.

SQLite runs in WAL mode with one writer thread, which commits many actions at once (group commit); the transaction's
methods never really wait there, so the thread runs an action from end to end.
"""

from __future__ import annotations

import asyncio
import queue
import shutil
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

GROUP_COMMIT_WRITES_MAX = 512  # beyond this a single slow disk flush would make the oldest caller wait too long
PENDING_WRITES_MAX = 10_000  # a disk that hangs must turn into an error, not into memory
AMONG_VALUES_MAX = 512  # values in one IN list; more are asked for in several statements
APPEND_VALUES_MAX = 999  # in one INSERT: what every SQLite takes

Migration = str
Row = tuple[Any, ...]
Changed = Callable[[str, str], None]


class StoreUnusable(Exception):
    """The database cannot be used; the message says what to do."""


class Transaction(Protocol):
    """What an action may do. Every method is a plain round trip to the database."""

    async def all(self, sql: str, *values: Any) -> list[Row]:
        """All rows of a SELECT, or of a statement with RETURNING."""
        ...

    async def one(self, sql: str, *values: Any) -> Row | None:
        """The first row, or None."""
        ...

    async def do(self, sql: str, *values: Any) -> int:
        """Runs a statement; returns how many rows it changed."""
        ...

    async def do_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement for each row of values."""
        ...

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Inserts rows that are new, the fastest way there is. A key that exists fails the whole action."""
        ...

    async def among(self, sql: str, values: Sequence[Any], *, lock: bool = False) -> list[Row]:
        """A SELECT with `IN (??)` for any number of values. `lock` holds the rows until the commit, in the order of
        the values: sort them, so that two transactions never wait for each other."""
        ...

    async def reads_everything(self) -> None:
        """What follows reads whole tables: the database need not look for rows by their keys."""
        ...

    async def now_ms(self) -> int:
        """Milliseconds since 1970 by the one clock that all gateways of this database share."""
        ...

    async def announce(self, topic: str, subject: str = "") -> None:
        """After the commit every gateway on this database hears of it within a second (`Store.listen`)."""
        ...


Action = Callable[[Transaction], Coroutine[Any, Any, T]]


class Store(Protocol):
    """A database that is open."""

    async def open(self, migrations: Sequence[Migration]) -> None:
        """Applies the migrations that are missing and keeps a copy from before. Raises StoreUnusable when the database
        is newer than this program, cannot be reached, or is none."""
        ...

    async def run(self, action: Action[T]) -> T:
        """Runs `action` and returns its result after the commit that covers it.

        An exception of `action` undoes that action alone and is raised here. Cancelling the caller does not undo it.
        """
        ...

    async def read(self, action: Action[T]) -> T:
        """Runs an action that only reads, on one unchanging picture of the database, without holding up writes."""
        ...

    def listen(self, changed: Changed) -> None:
        """`changed(topic, subject)` is called in the event loop for each announcement, those of this program included,
        and as `changed("*", "")` when some may have been missed."""
        ...

    async def close(self) -> None:
        """Finishes what was handed in, then closes. Safe to call twice."""
        ...


def store_at(url_or_path: str | Path, *, wall_clock: Callable[[], float]) -> Store:
    """A store, not open yet: a file for SQLite, or `postgresql://user:password@host/database`.

    `wall_clock` (Unix seconds) is SQLite's only: PostgreSQL has a clock of its own, which all its gateways share.
    """
    if not str(url_or_path).startswith(("postgresql://", "postgres://")):
        return SqliteStore(Path(url_or_path), wall_clock=wall_clock)
    try:
        from gridmill.network.store_postgres import PostgresStore
    except ModuleNotFoundError as missing:
        if missing.name != "asyncpg":
            raise
        raise StoreUnusable("PostgreSQL needs a library: install gridmill[postgres]") from None
    return PostgresStore(str(url_or_path))


_Write = tuple[Action[Any], Future[Any]]


class SqliteStore:
    """One file, one program. `wall_clock` is Unix seconds."""

    def __init__(self, path: Path, *, wall_clock: Callable[[], float]) -> None:
        self._path = path
        self._wall_clock = wall_clock
        self._inbox: queue.Queue[_Write | None] = queue.Queue(maxsize=PENDING_WRITES_MAX)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: list[Changed] = []

    async def open(self, migrations: Sequence[Migration]) -> None:
        self._loop = asyncio.get_running_loop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        existed = self._path.exists()
        # The writer thread's from the end of this on: that thread begins with nothing that can fail.
        connection = sqlite3.connect(self._path, isolation_level=None, cached_statements=256, check_same_thread=False)
        try:
            _set_up(connection)
            applied = _schema_version(connection)
            if applied > len(migrations):
                raise StoreUnusable(
                    f"{self._path} was written by a newer Gridmill (schema {applied}, this one knows "
                    f"{len(migrations)}): upgrade Gridmill, or use another --data folder"
                )
            if existed and 0 < applied < len(migrations):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the copy is of one file
                shutil.copy2(self._path, self._path.with_suffix(f".before-{len(migrations)}.sqlite"))
            for number in range(applied, len(migrations)):
                connection.execute("BEGIN EXCLUSIVE")
                for statement in statements_of(migrations[number]):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
            self._path.chmod(0o600)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise StoreUnusable(
                f"{self._path} cannot be used ({error}): move it away, or use another --data folder"
            ) from error
        except BaseException:
            connection.close()
            raise
        self._thread = threading.Thread(
            target=self._write_forever, args=(connection,), name="gridmill-store", daemon=True
        )
        self._thread.start()

    async def run(self, action: Action[T]) -> T:
        future: Future[T] = Future()
        try:
            self._inbox.put_nowait((action, future))
        except queue.Full:
            raise StoreUnusable(
                f"over {PENDING_WRITES_MAX} writes wait for the disk under {self._path.parent}: it is too slow or full"
            ) from None
        return await asyncio.wrap_future(future)

    async def read(self, action: Action[T]) -> T:
        return await asyncio.to_thread(self._read, action)

    def _read(self, action: Action[T]) -> T:
        try:
            connection = sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise StoreUnusable(f"{self._path} cannot be read ({error})") from error
        try:
            connection.execute("PRAGMA busy_timeout = 5000")
            connection.execute("BEGIN")
            return _run_at_once(action(_SqliteTransaction(connection, self._wall_clock)))
        finally:
            connection.close()

    def listen(self, changed: Changed) -> None:
        self._listeners.append(changed)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(thread.join)

    def _write_forever(self, connection: sqlite3.Connection) -> None:
        try:
            while (first := self._inbox.get()) is not None:
                group = [first]
                while len(group) < GROUP_COMMIT_WRITES_MAX:
                    try:
                        following = self._inbox.get_nowait()
                    except queue.Empty:
                        break
                    if following is None:
                        self._inbox.put(None)
                        break
                    group.append(following)
                self._tell(_commit_group(connection, self._wall_clock, group))
        finally:
            connection.close()

    def _tell(self, announcements: Sequence[tuple[str, str]]) -> None:
        if announcements and self._listeners and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._tell_all, list(announcements))
            except RuntimeError:
                pass  # the loop has ended, and with it everybody who listened

    def _tell_all(self, announcements: list[tuple[str, str]]) -> None:
        for topic, subject in announcements:
            for changed in self._listeners:
                changed(topic, subject)


class _SqliteTransaction:
    def __init__(self, connection: sqlite3.Connection, wall_clock: Callable[[], float]) -> None:
        self._connection = connection
        self._wall_clock = wall_clock
        self.announcements: list[tuple[str, str]] = []

    async def all(self, sql: str, *values: Any) -> list[Row]:
        return self._connection.execute(sql, values).fetchall()

    async def one(self, sql: str, *values: Any) -> Row | None:
        rows = self._connection.execute(sql, values).fetchall()
        return rows[0] if rows else None

    async def do(self, sql: str, *values: Any) -> int:
        return self._connection.execute(sql, values).rowcount

    async def do_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(sql, rows)

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        # Many rows in each statement, because the module lets go of Python's lock for every one: a thread that has to
        # win it back for each row stands still while the event loop is busy (measured: 320 µs a row instead of 5).
        insert, marks = f"INSERT INTO {table} ({','.join(columns)}) VALUES ", f"({','.join('?' * len(columns))})"
        start, room = 0, 1 << (APPEND_VALUES_MAX // len(columns)).bit_length() - 1
        while start < len(rows):
            # Few different lengths share prepared statements.
            while room > len(rows) - start:
                room >>= 1
            values = [value for row in rows[start : start + room] for value in row]
            self._connection.execute(insert + ",".join([marks] * room), values)
            start += room

    async def among(self, sql: str, values: Sequence[Any], *, lock: bool = False) -> list[Row]:
        found: list[Row] = []  # there is one writer, so every row is ours until the commit
        for start in range(0, len(values), AMONG_VALUES_MAX):
            part = list(values[start : start + AMONG_VALUES_MAX])
            # Lists of few different lengths share prepared statements; repeating a value changes nothing.
            room = 1 << (len(part) - 1).bit_length()
            part += part[-1:] * (room - len(part))
            found += self._connection.execute(sql.replace("??", ",".join("?" * room)), part).fetchall()
        return found

    async def reads_everything(self) -> None:
        pass  # SQLite looks for the best way each time

    async def now_ms(self) -> int:
        return int(self._wall_clock() * 1000)

    async def announce(self, topic: str, subject: str = "") -> None:
        self.announcements.append((topic, subject))


def _commit_group(
    connection: sqlite3.Connection, wall_clock: Callable[[], float], group: Sequence[_Write]
) -> list[tuple[str, str]]:
    """Every future of the group ends here, whatever the disk does: a writer thread that died would hang all callers."""
    done: list[tuple[Future[Any], Any]] = []
    announcements: list[tuple[str, str]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for action, future in group:
            connection.execute("SAVEPOINT one")
            transaction = _SqliteTransaction(connection, wall_clock)
            try:
                result = _run_at_once(action(transaction))
            except Exception as error:  # whatever the caller's own function raises is the caller's to see
                if not connection.in_transaction:
                    raise  # A full disk: SQLite itself has undone the whole group.
                connection.execute("ROLLBACK TO one")
                _fail(future, error)
            else:
                done.append((future, result))
                announcements += transaction.announcements
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for _, future in group:
            _fail(future, StoreUnusable(f"the database could not be written ({error}): nothing of this was kept"))
        return []
    for future, result in done:
        if future.set_running_or_notify_cancel():
            future.set_result(result)
    return announcements


def _run_at_once(action: Coroutine[Any, Any, T]) -> T:
    """Runs an action in this thread, without an event loop: SQLite's transaction never waits."""
    try:
        action.send(None)
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]
    action.close()
    raise RuntimeError("an action awaited something that is not its transaction")


def _fail(future: Future[Any], error: BaseException) -> None:
    """A caller that stopped waiting has cancelled its future already."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)


def statements_of(migration: Migration) -> list[str]:
    """The statements of a migration, each of which ends with a semicolon at the end of a line."""
    return [statement for statement in migration.split(";\n") if statement.strip()]


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA busy_timeout = 5000")


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
