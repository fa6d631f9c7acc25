"""The local door of a running program: `DIR/control.sock`, mode 0600, one JSON line in and one out.

Whoever can open the socket file owns the data folder, which is why there is no other password. A folder whose program
does not run is changed directly, under the same exclusive lock that a running program holds.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from gridmill.network.store import StoreUnusable

LINE_BYTES_MAX = 1 << 20  # a status of ten thousand nodes; commands themselves are tiny
CALL_TIMEOUT_SECONDS = 30.0

Command = Callable[..., Awaitable[Any]]


class ControlError(Exception):
    """The command was understood and refused; the message is for the person who typed it."""


class NotRunning(Exception):
    """No program listens on this data folder."""


class FolderLock:
    """The exclusive right to a data folder's database, for as long as the process lives or until `release`."""

    def __init__(self, path: Path, holder: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ControlError(
                f"{path.parent} is in use by another {holder}: stop that one, or give this one its own --data folder"
            ) from None

    def release(self) -> None:
        os.close(self._file)


class ControlServer:
    """Answers commands while the program runs."""

    def __init__(self, folder: Path, commands: Mapping[str, Command]) -> None:
        self._folder = folder
        self._commands = commands
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        path = self._folder / "control.sock"
        path.unlink(missing_ok=True)  # left by a killed program: the folder's lock says that none runs now
        with _Short(self._folder) as short:
            previous = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(self._answer, short, limit=LINE_BYTES_MAX)
            finally:
                os.umask(previous)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            (self._folder / "control.sock").unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                answer = await self._run(await reader.readline())
        except (
            ControlError,
            StoreUnusable,
            TimeoutError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as problem:
            answer = {"error": str(problem) or type(problem).__name__}
        try:
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            pass  # The person pressed Ctrl-C before the answer came.
        finally:
            writer.close()

    async def _run(self, line: bytes) -> dict[str, Any]:
        request = json.loads(line)
        name = request.get("command") if isinstance(request, dict) else None
        if not isinstance(name, str):
            raise ControlError("a command is one JSON object with `command` and `arguments`")
        command = self._commands.get(name)
        if command is None:
            raise ControlError(f"this program knows no command {name!r}; is it another version?")
        return {"result": await command(**request.get("arguments", {}))}


def call(folder: Path, command: str, **arguments: Any) -> Any:
    """Runs one command in the program that holds `folder`. Raises NotRunning or ControlError."""
    if not (folder / "control.sock").exists():
        raise NotRunning(str(folder))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _Short(folder) as short:
        connection.settimeout(CALL_TIMEOUT_SECONDS)
        try:
            connection.connect(short)
        except (ConnectionRefusedError, FileNotFoundError):
            raise NotRunning(str(folder)) from None
        except PermissionError:
            raise ControlError(f"{folder / 'control.sock'} belongs to another user: run this as that user") from None
        connection.sendall(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
        with connection.makefile("rb") as answer:
            line = answer.readline(LINE_BYTES_MAX)
    if not line:
        raise ControlError("the program closed the connection without an answer; see its log")
    reply = json.loads(line)
    if "error" in reply:
        raise ControlError(reply["error"])
    return reply["result"]


class _Short:
    """A name of DIR/control.sock that fits the 107 bytes a socket address holds, however deep DIR lies."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "control.sock")
        self._folder = folder
        self._descriptor = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= 100:
            return self._path
        if not Path("/proc/self/fd").is_dir():
            raise ControlError(f"{self._folder} is too long a path for a socket: choose a shorter --data folder")
        self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._descriptor}/control.sock"

    def __exit__(self, *exc_info: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
