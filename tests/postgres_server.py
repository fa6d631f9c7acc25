"""A PostgreSQL server of one's own, for tests and measurements. `python tests/postgres_server.py` starts one and says
where it is, until its input ends.

The server that GRIDMILL_TEST_POSTGRES names is used as it is. Otherwise one from the system's packages runs in a
temporary folder, listens on a Unix socket in there, and ends with this program however this program ends: a shell
holds the other end of a pipe, stops the server when that closes, and removes the folder.
"""

from __future__ import annotations

import asyncio
import glob
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

T = TypeVar("T")

VARIABLE = "GRIDMILL_TEST_POSTGRES"
BINARIES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")  # where Debian and Red Hat keep several versions
START_SECONDS_MAX = 60.0  # a quiet machine needs one; a crowded one must not fail the tests for it
CONNECTIONS_MAX = 200  # several stores at once, each with a pool

# Waits for a word ("stop") or for the end of the pipe, which also removes everything.
KEEPER = """
"$@" >>server.log 2>&1 </dev/null &
server=$!
if read -r word; then
    kill -QUIT "$server"; wait "$server"
else
    kill -QUIT "$server"; wait "$server"; cd /; rm -rf "$0"
fi
"""


class NoPostgres(Exception):
    """There is no server and none can be started; the message is one line that says what to do."""


class Server:
    """A server that runs. Its methods work with and without an event loop."""

    def __init__(self, url: str) -> None:
        self.url = url

    def create_database(self) -> str:
        """The URL of a new and empty database."""
        name = f"gridmill_test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def drop_database(self, url: str) -> None:
        """Whoever is still connected is thrown out."""
        self.execute(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")

    def execute(self, sql: str, url: str | None = None) -> list[tuple[Any, ...]]:
        return _finish(_execute(url or self.url, sql))


class OwnServer(Server):
    """One in a temporary folder, which can be stopped and started again."""

    def __init__(self) -> None:
        programs = _programs()
        self._user = _user_for_postgres()
        self._folder = Path(tempfile.mkdtemp(prefix="gridmill-pg-", dir=_reachable_folder()))
        self._keeper: subprocess.Popen[bytes] | None = None
        self._postgres = programs / "postgres"
        super().__init__(f"postgresql://gridmill@/postgres?host={self._folder}")
        try:
            if self._user is not None:
                os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
            version = subprocess.run([self._postgres, "--version"], capture_output=True, text=True, check=True).stdout
            # Text sorts by language unless a column says otherwise: what most people's databases do.
            newer = int((re.findall(r"\d+", version) or ["0"])[0]) >= 15
            locale = ["--locale-provider=icu", "--icu-locale=en-US"] if newer else []
            initdb = [programs / "initdb", "-D", self._folder / "data", "-U", "gridmill", "-A", "trust", "--no-sync"]
            initdb += ["--encoding=UTF8", "--locale=C", *locale]
            made = subprocess.run(initdb, capture_output=True, text=True, **self._as_user())
            if made.returncode != 0:
                raise NoPostgres(f"initdb failed: {' '.join(made.stderr.split())[-500:]}")
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "max_connections": str(CONNECTIONS_MAX),
            "shared_buffers": "32MB",
            "fsync": "on",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._keeper = subprocess.Popen(
            ["sh", "-c", KEEPER, self._folder, self._postgres, "-D", self._folder / "data", *options],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the tests, which may still need the server to clean up
            **self._as_user(),
        )
        ends = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                self.execute("SELECT 1")
                return
            except (OSError, asyncpg.CannotConnectNowError) as problem:
                if time.monotonic() > ends:
                    log = (self._folder / "server.log").read_text(errors="replace")
                    raise NoPostgres(f"PostgreSQL did not start: {' '.join(log.split())[-500:]}") from problem
                time.sleep(0.02)

    def stop(self) -> None:
        """At once, as a crash would: the next start recovers what was committed."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.communicate(b"stop\n")

    def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)  # the keeper did, unless the server was stopped before

    def _as_user(self) -> dict[str, Any]:
        user = {} if self._user is None else {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return {"cwd": self._folder, **user}


@contextmanager
def postgres_server() -> Iterator[Server]:
    """The server to use here. Raises NoPostgres."""
    if named := os.environ.get(VARIABLE):
        yield Server(named)
        return
    server = OwnServer()
    try:
        yield server
    finally:
        server.close()


def _programs() -> Path:
    if not (found := _installed_programs()) and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "postgresql"]
        quiet: dict[str, Any] = {
            "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            "capture_output": True,
            "stdin": subprocess.DEVNULL,
        }
        if subprocess.run(install, **quiet).returncode != 0:
            subprocess.run(["apt-get", "update", "-qq"], **quiet)
            subprocess.run(install, **quiet)
        found = _installed_programs()
    if not found:
        raise NoPostgres(
            f"PostgreSQL is not installed: install it (on Debian: apt-get install postgresql), or name a server in"
            f" {VARIABLE}=postgresql://user:password@host/database"
        )
    return found


def _installed_programs() -> Path | None:
    """The folder that holds initdb and postgres, of the newest version."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    installed = [Path(folder) for pattern in BINARIES for folder in glob.glob(pattern)]
    folders += sorted(installed, key=lambda folder: [int(n) for n in re.findall(r"\d+", str(folder))], reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def _user_for_postgres() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root; None means as ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgres(f"PostgreSQL refuses to run as root, and there is no user postgres: name a server in {VARIABLE}")


def _reachable_folder() -> str:
    """A temporary folder that another user can enter, with a name short enough for a Unix socket."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        path = Path(candidate).resolve()
        if len(str(path)) < 60 and path.is_dir() and all(p.stat().st_mode & 0o001 for p in (path, *path.parents)):
            return str(path)
    return tempfile.gettempdir()


async def _execute(url: str, sql: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """In a thread of its own, because the caller's may run an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


if __name__ == "__main__":
    try:
        with postgres_server() as running:
            print(running.url, flush=True)
            sys.stdin.read()
    except NoPostgres as absent:
        sys.exit(str(absent))
    except KeyboardInterrupt:
        pass  # that is how it is stopped
