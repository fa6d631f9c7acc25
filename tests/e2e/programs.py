"""Real processes and real sockets for the end-to-end tests: start, wait until ready, stop in every way there is."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

READY_SECONDS = 120
STOP_SECONDS = 60


class Program:
    """One `gridmill …` process. `facts` is its line of JSON."""

    def __init__(self, *arguments: str | Path, log: Path, **environment: str) -> None:
        self.log = log
        self._log_file = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gridmill", *map(str, arguments), "--json"],
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            stdin=subprocess.DEVNULL,
            env={**clean_environment(), **environment},
            start_new_session=True,
        )
        self.facts: dict[str, Any] = {}

    def ready(self) -> Program:
        assert self.process.stdout is not None
        seen, _, _ = select.select([self.process.stdout], [], [], READY_SECONDS)
        line = self.process.stdout.readline() if seen else b""
        assert line, f"not ready; its log:\n{self.log.read_text()[-4000:]}"
        self.facts = json.loads(line)
        return self

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def interrupt(self) -> int:
        """Ctrl-C, and the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.interrupt()
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log_file.close()


class Place:
    """A folder with a space in its name, and the programs that a test started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a data folder"
        self.folder.mkdir()
        self._programs: list[Program] = []

    def start(self, *arguments: str | Path, name: str = "program", **environment: str) -> Program:
        program = Program(*arguments, log=self.folder / f"{name}.log", **environment)
        self._programs.append(program)
        return program

    def network(self, *more: str, port: int = 0) -> Program:
        data = self.folder / "network"
        return self.start("network", "--port", str(port), "--data", data, *more, name="network").ready()

    def node(self, network: Program, *more: str, name: str = "node") -> Program:
        data = self.folder / name
        address = network.facts["base_url"]
        return self.start("node", "--network", address, "--data", data, *more, name=name).ready()

    def key(self, name: str = "tester", scope: str = "inference") -> str:
        made = gridmill("keys", "create", name, "--scope", scope, "--json", "--data", self.folder / "network")
        return str(json.loads(made)["api_key"])

    def status(self, data: Path | None = None) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(gridmill("status", "--json", "--data", data or self.folder / "network"))
        return made

    def close(self) -> None:
        for program in reversed(self._programs):
            program.close()


@contextlib.contextmanager
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    try:
        yield made
    finally:
        made.close()


def gridmill(*arguments: str | Path, **environment: str) -> str:
    """Runs a short command and returns what it printed."""
    done = run(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gridmill", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**clean_environment(), **environment},
        stdin=subprocess.DEVNULL,
        timeout=READY_SECONDS,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRIDMILL_", "HF_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def until(wanted: Callable[[], T], seconds: float = 30.0) -> T:
    """Waits until `wanted()` is true or fails with what it last was."""
    deadline = time.monotonic() + seconds
    while not (found := wanted()):
        assert time.monotonic() < deadline, f"still {found!r} after {seconds} s"
        time.sleep(0.05)
    return found


class Stream:
    """A streaming request on a raw connection, read event by event, so that the test decides when to read."""

    def __init__(self, base_url: str, api_key: str, **body: Any) -> None:
        host = base_url.split("://")[1].split("/")[0]
        self.connection = http.client.HTTPConnection(host, timeout=60)
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
        self.connection.request("POST", path, json.dumps({"stream": True, **body}), headers)
        self.response = self.connection.getresponse()

    def event(self) -> dict[str, Any] | None:
        """The next event; None at [DONE] or at the end."""
        while line := self.response.readline():
            if line.startswith(b"data: "):
                payload = line[6:].strip()
                return None if payload == b"[DONE]" else json.loads(payload)
        return None

    def events(self) -> list[dict[str, Any]]:
        return list(iter(self.event, None))

    def text(self) -> str:
        return "".join(text_of(event) for event in self.events())

    def close(self) -> None:
        self.connection.close()


def text_of(event: dict[str, Any]) -> str:
    assert "error" not in event, event
    return "".join(
        choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in event["choices"]
    )
