"""`gridmill up`: a network in this process and one node as its child, over a real link on loopback.

Two processes on purpose: what runs on one machine is exactly what runs on many, and the node's compute thread never
holds the gateway's interpreter lock. The child watches its standard input and ends when this process does, however.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from gridmill.client import read_credentials, save_credentials
from gridmill.network.app import run_network
from gridmill.network.operator import Operations
from gridmill.network.settings import NetworkSettings
from gridmill.wire.identity import Identity, node_id_of

log = logging.getLogger("gridmill.up")

RESTART_SECONDS_MAX = 30.0
STOP_SECONDS = 15.0  # what a node may take to end after its streams have; then it is killed


class NodeFailed(Exception):
    """The node ended before it was ever ready, with this exit code. Its own log says why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the node ended with exit code {exit_code} before it was ready; its message is above")
        self.exit_code = exit_code


async def run_up(
    settings: NetworkSettings,
    node_arguments: Sequence[str],
    *,
    ready: Callable[[dict[str, Any]], None],
    stop: asyncio.Event,
) -> int:
    """Network and node until `stop`. Raises NodeFailed when the node cannot start at all."""
    node_data = settings.data / "node"
    node_data.mkdir(parents=True, exist_ok=True, mode=0o700)
    own_node = node_id_of(Identity.load_or_create(node_data / "node.key").public)
    child = _Child(node_arguments, settings.drain_timeout_seconds + STOP_SECONDS)
    # The node leaves first, politely, while its network still listens; then the network stops.
    network_stop = asyncio.Event()
    first_failure: list[NodeFailed] = []
    watchers: list[asyncio.Task[None]] = []

    async def network_ready(facts: dict[str, Any], operations: Operations) -> None:
        api_key = await _own_key(settings.data, facts["base_url"], operations)

        def node_ready(node: dict[str, Any]) -> None:
            ready({**facts, "api_key": api_key, "model": node["model"], "node_id": node["node_id"]})

        async def supervise() -> None:
            try:
                await child.keep_running(operations.local_url, node_ready, stop)
            except NodeFailed as failed:
                first_failure.append(failed)
            finally:
                network_stop.set()

        watchers.append(asyncio.create_task(supervise(), name="node"))

    try:
        code = await run_network(settings, ready=network_ready, stop=network_stop, own_nodes=(own_node,))
    finally:
        for watcher in watchers:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
    if first_failure:
        raise first_failure[0]
    return code


async def _own_key(data: Path, base_url: str, operations: Operations) -> str:
    """The key from last time when it still works, else a new one; kept in client.json for this user alone."""
    api_key = read_credentials(data).get("api_key", "")
    if not api_key or not operations.knows(api_key):
        api_key = (await operations.keys_create("gridmill up"))["api_key"]
    save_credentials(data, base_url, api_key)
    return api_key


class _Child:
    """The node's process: started again with growing pauses when it dies, ended politely when we stop."""

    def __init__(self, arguments: Sequence[str], drain_seconds: float) -> None:
        self._arguments = arguments
        self._drain_seconds = drain_seconds

    async def keep_running(self, local_url: str, ready: Callable[[dict[str, Any]], None], stop: asyncio.Event) -> None:
        """Until `stop`, then until the node has left. Raises NodeFailed when it ends before it was ever ready."""
        was_ready = False
        pause = 0.5
        while not stop.is_set():
            async with _started(local_url, self._arguments) as process:
                assert process.stdout is not None
                asking = asyncio.create_task(self._ask_to_leave(process, stop))
                try:
                    line = await process.stdout.readline()
                    if line:
                        facts = json.loads(line)
                        pause = 0.5
                        if not was_ready:
                            was_ready = True
                            ready(facts)
                    code = await process.wait()
                finally:
                    asking.cancel()
            if stop.is_set():
                return
            if not was_ready:
                raise NodeFailed(code)
            log.warning("the node ended and is started again", extra={"exit_code": code, "pause_seconds": pause})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                    await stop.wait()
            pause = min(pause * 2, RESTART_SECONDS_MAX)

    async def _ask_to_leave(self, process: asyncio.subprocess.Process, stop: asyncio.Event) -> None:
        await stop.wait()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            await asyncio.sleep(self._drain_seconds)
            process.kill()


@contextlib.asynccontextmanager
async def _started(local_url: str, arguments: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gridmill",
        "node",
        "--network",
        local_url,
        "--insecure",  # from this machine to itself, whichever of its addresses the network listens on
        "--json",
        "--exit-with-parent",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is ours to handle: the node ends when its stdin does
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
