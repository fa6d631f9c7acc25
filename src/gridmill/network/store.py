"""The network's database on one machine: SQLite in WAL mode, one writer thread with group commit.

Three rules. Writes are functions handed to the one writer thread, which commits many of them at once: a caller resumes
only after the commit that holds its write is on disk. Reads run on the same thread between commits, since this database
is small and the hot path never reads it. SQL text lives with the noun that owns it; this file knows none but the
migrations' own table.
"""

from __future__ import annotations

import asyncio
import queue
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

GROUP_COMMIT_WRITES_MAX = 512  # beyond this a single slow disk flush would make the oldest caller wait too long
PENDING_WRITES_MAX = 10_000  # a disk that hangs must turn into an error, not into memory

Migration = str
_Write = tuple[Callable[[sqlite3.Connection], Any], Future[Any]]


class StoreUnusable(Exception):
    """The database cannot be used; the message says what to do."""


class Store:
    """`open` applies the migrations that are missing and keeps a copy of the file from before it did."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inbox: queue.Queue[_Write | None] = queue.Queue(maxsize=PENDING_WRITES_MAX)
        self._thread: threading.Thread | None = None

    def open(self, migrations: Sequence[Migration]) -> None:
        """Raises StoreUnusable when the file is newer than this program, or not a database."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        existed = self._path.exists()
        connection = sqlite3.connect(self._path, isolation_level=None)
        try:
            _set_up(connection)
            applied = _schema_version(connection)
            if applied > len(migrations):
                raise StoreUnusable(
                    f"{self._path} was written by a newer Gridmill (schema {applied}, this one knows "
                    f"{len(migrations)}): upgrade Gridmill, or use another --data folder"
                )
            if existed and 0 < applied < len(migrations):
                shutil.copy2(self._path, self._path.with_suffix(f".before-{len(migrations)}.sqlite"))
            for number in range(applied, len(migrations)):
                connection.execute("BEGIN EXCLUSIVE")
                for statement in migrations[number].split(";\n"):
                    if statement.strip():
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise StoreUnusable(
                f"{self._path} cannot be used ({error}): move it away, or use another --data folder"
            ) from error
        finally:
            connection.close()
        self._path.chmod(0o600)
        self._thread = threading.Thread(target=self._write_forever, name="gridmill-store", daemon=True)
        self._thread.start()

    async def run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `action` in the writer thread and returns its result after the commit that covers it.

        An exception of `action` undoes that action alone and is raised here.
        """
        future: Future[T] = Future()
        try:
            self._inbox.put_nowait((action, future))
        except queue.Full:
            raise StoreUnusable(
                f"over {PENDING_WRITES_MAX} writes wait for the disk under {self._path.parent}: it is too slow or full"
            ) from None
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finishes what was handed in, then closes the file. Safe to call twice."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            thread.join()

    def _write_forever(self) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None)
        _set_up(connection)
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
                _commit_group(connection, group)
        finally:
            connection.close()


def _commit_group(connection: sqlite3.Connection, group: Sequence[_Write]) -> None:
    """Every future of the group ends here, whatever the disk does: a writer thread that died would hang all callers."""
    done: list[tuple[Future[Any], Any]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for action, future in group:
            connection.execute("SAVEPOINT one")
            try:
                result = action(connection)
            except Exception as error:  # whatever the caller's own function raises is the caller's to see
                if not connection.in_transaction:
                    raise  # A full disk: SQLite itself has undone the whole group.
                connection.execute("ROLLBACK TO one")
                _fail(future, error)
            else:
                done.append((future, result))
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for _, future in group:
            _fail(future, StoreUnusable(f"the database could not be written ({error}): nothing of this was kept"))
        return
    for future, result in done:
        if future.set_running_or_notify_cancel():
            future.set_result(result)


def _fail(future: Future[Any], error: BaseException) -> None:
    """A caller that stopped waiting has cancelled its future already."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA busy_timeout = 5000")


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
