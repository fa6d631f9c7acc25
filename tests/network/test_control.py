"""Commands reach a running program through its socket, and a stopped one's files under its lock."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gridmill.network.control import ControlError, ControlServer, FolderLock, NotRunning, call
from gridmill.network.operator import operate
from gridmill.wire.identity import Identity


async def double(number: int) -> int:
    if number < 0:
        raise ControlError("give a number above 0")
    return number * 2


def while_serving(folder: Path, body: Callable[[], Any]) -> Any:
    async def run() -> Any:
        server = ControlServer(folder, {"double": double})
        await server.start()
        try:
            return await asyncio.to_thread(body)
        finally:
            await server.stop()

    return asyncio.run(run())


def test_a_command_is_answered(tmp_path: Path) -> None:
    assert while_serving(tmp_path, lambda: call(tmp_path, "double", number=21)) == 42


def test_the_socket_is_for_its_owner_alone_and_gone_afterwards(tmp_path: Path) -> None:
    assert while_serving(tmp_path, lambda: (tmp_path / "control.sock").stat().st_mode & 0o077) == 0
    assert not (tmp_path / "control.sock").exists()


def test_a_folder_deeper_than_a_socket_address_is_long_works(tmp_path: Path) -> None:
    deep = tmp_path / ("a folder with a long name " * 4) / ("and another one " * 6)
    deep.mkdir(parents=True)
    assert len(os.fsencode(str(deep))) > 108
    assert while_serving(deep, lambda: call(deep, "double", number=1)) == 2


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("double", {"number": -1}, "above 0"),
        ("triple", {"number": 1}, "knows no command"),
        ("double", {"wrong": 1}, "unexpected keyword"),
    ],
)
def test_a_refusal_is_a_sentence(tmp_path: Path, command: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ControlError, match=said):
        while_serving(tmp_path, lambda: call(tmp_path, command, **arguments))


def test_nonsense_on_the_socket_gets_an_error_and_the_next_caller_an_answer(tmp_path: Path) -> None:
    def body() -> int:
        for nonsense in (
            b"\n",
            b"not json\n",
            b"null\n",
            b'"x"\n',
            b"[" * 9000 + b"\n",
            b"[1,2]\n",
            b'{"command": {}}\n',
            b"x" * 3_000_000,
        ):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(str(tmp_path / "control.sock"))
                try:
                    connection.sendall(nonsense)
                    connection.shutdown(socket.SHUT_WR)
                    answer = connection.makefile("rb").readline()
                except ConnectionError:
                    continue  # Cut off in the middle of three megabytes: as good an answer.
                assert not answer or "error" in json.loads(answer)
        return int(call(tmp_path, "double", number=4))

    assert while_serving(tmp_path, body) == 8


def test_a_folder_whose_program_was_killed_counts_as_not_running(tmp_path: Path) -> None:
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(tmp_path / "control.sock"))
    left_over.close()
    with pytest.raises(NotRunning):
        call(tmp_path, "double", number=1)
    assert while_serving(tmp_path, lambda: call(tmp_path, "double", number=2)) == 4


def test_a_second_program_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "network.lock", "gridmill network")
    program = (
        "from pathlib import Path; from gridmill.network.control import FolderLock\n"
        f"FolderLock(Path({str(tmp_path)!r}) / 'network.lock', 'gridmill network')"
    )
    refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "in use by another gridmill network" in refused.stderr
    lock.release()
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_stopped_network_whose_books_are_elsewhere_gets_no_second_ones(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path / "network.key")
    with pytest.raises(ControlError, match="--database"):
        operate(tmp_path, "ledger.check")
    assert not (tmp_path / "network.sqlite").exists()


def test_keys_can_be_made_listed_and_revoked_while_nothing_runs(tmp_path: Path) -> None:
    made = operate(tmp_path, "keys.create", name="alice", scope="inference")
    assert made["api_key"].startswith("gm-")
    assert [row["name"] for row in operate(tmp_path, "keys.list")] == ["alice"]
    assert operate(tmp_path, "keys.revoke", key="alice")[0]["revoked_seconds"]
    with pytest.raises(ControlError, match="no live key"):
        operate(tmp_path, "keys.revoke", key="alice")
    assert operate(tmp_path, "status")["running"] is False
