"""`database` gives a test a fresh database, once of each kind; `postgres_database` only one of PostgreSQL.

The server starts when the first test asks for it and ends with the tests (see postgres_server.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from databases import Database
from postgres_server import NoPostgres, OwnServer, Server, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One server for all tests: ask it for databases, do not stop it."""
    try:
        with postgres_server() as server:
            yield server
    except NoPostgres as absent:
        pytest.fail(str(absent), pytrace=False)


@pytest.fixture
def stoppable_postgres() -> Iterator[OwnServer]:
    """A server of this test's own, to stop and start."""
    try:
        server = OwnServer()
    except NoPostgres as absent:
        pytest.fail(str(absent), pytrace=False)
    yield server
    server.close()


@pytest.fixture
def postgres_database(postgres: Server) -> Iterator[Database]:
    url = postgres.create_database()
    yield Database("postgres", url)
    postgres.drop_database(url)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    if request.param == "sqlite":
        return Database("sqlite", str(tmp_path / "network.sqlite"))
    found: Database = request.getfixturevalue("postgres_database")
    return found
