"""Databases for tests: the same test on SQLite and on PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gridmill.network.store import Store, store_at
from gridmill.network.store_postgres import PostgresStore

Kind = Literal["sqlite", "postgres"]


@dataclass(frozen=True)
class Database:
    """A database that is empty until a store opens it. `url` is what `store_at` takes: a path or a URL."""

    kind: Kind
    url: str

    @property
    def shared(self) -> bool:
        """Whether several stores may be open at once, as several gateways are."""
        return self.kind == "postgres"

    def store(self, *, wall_clock: Callable[[], float] | None = None) -> Store:
        """A new store, not open yet. `wall_clock` (Unix seconds) replaces the clock of the database, PostgreSQL's own
        too, so that tests can decide what time it is."""
        if self.kind == "postgres":
            return PostgresStore(self.url, wall_clock=wall_clock)
        return store_at(self.url, wall_clock=wall_clock or time.time)
