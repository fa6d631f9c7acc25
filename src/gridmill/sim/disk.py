"""The network's database without its thread: the real transactions and commits, when virtual time says so.

A `Disk` outlives programs, and several may share it, as gateways share a PostgreSQL. What a program handed in is
committed a little later, many at once, and the program hears of it later still: killed in between, it never knew. Told
to fail, a commit is undone, or kept although it seems undone.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from random import Random
from typing import Any, Literal, TypeVar

from gridmill.network.store import (
    GROUP_COMMIT_WRITES_MAX,
    Action,
    Changed,
    Migration,
    StoreUnusable,
    Transaction,
    _commit_group,
    _run_at_once,
    _SqliteTransaction,
    statements_of,
)
from gridmill.sim.clock import Program, VirtualLoop

T = TypeVar("T")

Trouble = Literal["undone", "kept"]


class Disk:
    """The file. `wall_clock` is Unix seconds."""

    def __init__(self, migrations: Sequence[Migration], wall_clock: Callable[[], float]) -> None:
        self.wall_clock = wall_clock
        self.connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=512)
        self.connection.deserialize(_fresh(tuple(migrations)))
        self.connection.execute("PRAGMA foreign_keys = ON")
        self.commits = 0
        self.stores: list[MemoryStore] = []

    def read(self, action: Action[T]) -> T:
        """For checks: at once, from outside of all programs."""
        return _run_at_once(action(_SqliteTransaction(self.connection, self.wall_clock)))

    def write(self, action: Action[T]) -> T:
        """For whoever sets the scene."""
        future: Future[T] = Future()
        _commit_group(self.connection, self.wall_clock, [(action, future)])
        return future.result(timeout=0)

    def close(self) -> None:
        self.connection.close()


@functools.lru_cache(maxsize=4)
def _fresh(migrations: tuple[Migration, ...]) -> bytes:
    """The bytes of a database that has its tables: making them takes longer than most seeds."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for migration in migrations:
        for statement in statements_of(migration):
            connection.execute(statement)
    data = connection.serialize()
    connection.close()
    return data


class MemoryStore:
    """One program's store on a disk; meets `network.store.Store`."""

    def __init__(
        self,
        disk: Disk,
        loop: VirtualLoop,
        random: Random,
        delay_seconds: float = 0.002,
        program: Program | None = None,
    ) -> None:
        self._disk = disk
        self._loop = loop
        self._random = random
        self._delay_seconds = delay_seconds
        self._waiting: list[tuple[Action[Any], asyncio.Future[Any]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._listeners: list[Changed] = []
        self._context = program.context.copy() if program is not None else contextvars.copy_context()
        disk.stores.append(self)
        self.trouble: Callable[[], Trouble | None] = _none

    async def open(self, migrations: Sequence[Migration]) -> None:
        """It was made open."""

    async def run(self, action: Action[T]) -> T:
        reply: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append((action, reply))
        if self._timer is None:
            self._timer = self._loop.call_later(self._some(), self._commit)
        return await reply

    async def read(self, action: Action[T]) -> T:
        await asyncio.sleep(self._some())
        return self._disk.read(action)

    def listen(self, changed: Changed) -> None:
        self._listeners.append(changed)

    async def close(self) -> None:
        async def nothing(transaction: Transaction) -> None:
            """Commits come in order: after this one, all before it are done."""

        await self.run(nothing)

    def _some(self) -> float:
        return self._delay_seconds * (0.25 + self._random.random())

    def _commit(self) -> None:
        self._timer = None
        group, self._waiting = self._waiting[:GROUP_COMMIT_WRITES_MAX], self._waiting[GROUP_COMMIT_WRITES_MAX:]
        if self._waiting:
            self._timer = self._loop.call_later(self._some(), self._commit)
        trouble = self.trouble()
        if trouble == "undone":
            self._loop.call_later(self._some(), self._fail, group)
            return
        disk = self._disk
        done: list[tuple[asyncio.Future[Any], Future[Any]]] = [(reply, Future()) for _, reply in group]
        writes = [(action, future) for (action, _), (_, future) in zip(group, done, strict=True)]
        announcements = _commit_group(disk.connection, disk.wall_clock, writes)
        disk.commits += 1
        if trouble == "kept":
            self._loop.call_later(self._some(), self._fail, group)
        else:
            self._loop.call_later(self._some(), self._tell, done)
        if announcements:
            for store in disk.stores:
                self._loop.call_later(self._some(), store._hear, announcements, context=store._context)

    def _tell(self, done: Sequence[tuple[asyncio.Future[Any], Future[Any]]]) -> None:
        for reply, future in done:
            if reply.done():
                continue
            error = future.exception(timeout=0)
            if error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(future.result(timeout=0))

    def _fail(self, group: Sequence[tuple[Action[Any], asyncio.Future[Any]]]) -> None:
        for _, reply in group:
            if not reply.done():
                reply.set_exception(StoreUnusable("the simulated disk failed"))

    def _hear(self, announcements: Sequence[tuple[str, str]]) -> None:
        for topic, subject in announcements:
            for changed in self._listeners:
                changed(topic, subject)


def _none() -> Trouble | None:
    return None
