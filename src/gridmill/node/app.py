"""The node's composition root: the one place that builds its parts and decides how the program ends.

Exit codes: 0 stopped as asked, 1 unexpected, 2 wrong usage, 3 the network refuses this node or its address can never
work, 4 the model cannot be loaded. Whatever ends the program is one sentence in the log on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gridmill import __version__
from gridmill.node.agent import agent_on
from gridmill.node.engines.base import Engine
from gridmill.node.engines.echo import EchoEngine
from gridmill.node.hardware import Device, DeviceError, pick_device
from gridmill.node.hub import write_whole
from gridmill.node.loading import ExactRefused, load_native_engine
from gridmill.node.models import LocalModel, ModelError, resolve
from gridmill.node.outbox import Outbox, OutboxUnusable
from gridmill.node.progress import ProgressBar
from gridmill.node.settings import NodeSettings
from gridmill.wire.identity import Identity, IdentityError, certify, node_id_of
from gridmill.wire.link import Arrived, Closed, Event, NodeSide, Opened, Reason
from gridmill.wire.messages import Listed
from gridmill.wire.transport import Conversation, DialError, keep_dialled, link_address

log = logging.getLogger("gridmill.node")

EXIT_DONE, EXIT_USAGE, EXIT_NETWORK, EXIT_MODEL = 0, 2, 3, 4
ORPHAN_DRAIN_SECONDS = 2.0  # when the program that started us is gone, nobody waits for our answers

Ready = Callable[[dict[str, Any]], None]
T = TypeVar("T")


class _CannotRun(Exception):
    """Why this program ends, in one sentence, and with which exit code."""

    def __init__(self, exit_code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


async def run_node(settings: NodeSettings, *, ready: Ready, stop: asyncio.Event) -> int:
    """Serves one model on one network until `stop` is set, redialling for as long as that can help.

    `ready({"base_url", "model", "node_id"})` is called once, when the network has let this node in for the first time
    and was told what it serves. Returns an exit code. Cancelling it stops at once.
    """
    try:
        with _only_node_on(settings.data):
            return await _run(settings, ready, _Asked(settings, stop))
    except _CannotRun as problem:
        log.error("%s", problem)
        return problem.exit_code


async def _run(settings: NodeSettings, ready: Ready, asked: _Asked) -> int:
    try:
        address, _ = link_address(settings.network, insecure=settings.insecure)
    except DialError as problem:
        raise _CannotRun(EXIT_USAGE, str(problem)) from problem
    pins = NetworkKeys(settings.data / "networks.json")
    side = _side(settings, pins.get(address))
    outbox = Outbox(settings.data / "receipts.sqlite", side.identity, wall_clock=time.time)
    try:
        outbox.open()
    except OutboxUnusable as problem:
        raise _CannotRun(EXIT_USAGE, str(problem)) from problem
    try:
        engine = await asked.unless_stopped(_engine(settings))
        if engine is None:
            return EXIT_DONE
        try:
            serving = _Serving(settings, address, pins, engine, outbox, ready, asked)
            return await serving.run(side)
        finally:
            await engine.close()
    finally:
        await outbox.close()


# ---------------------------------------------------------------- what is served


async def _engine(settings: NodeSettings) -> Engine:
    """Finds the model and loads it. Raises _CannotRun."""
    progress = ProgressBar(bar=False if settings.json else None)
    pick = functools.cache(lambda: pick_device(settings.device))
    if settings.engine_kind == "native":
        log.info("loading torch and the model, and measuring both: some seconds to a minute")
    try:
        try:
            local, engine = await _loaded(settings, settings.exact, pick, progress)
        except ExactRefused as refusal:
            if settings.exact:
                raise
            # Nobody asked for it: it was only this model's default.
            log.warning("%s", refusal)
            local, engine = await _loaded(settings, False, pick, progress)
    except (ModelError, DeviceError) as problem:
        raise _CannotRun(EXIT_MODEL, str(problem)) from problem
    finally:
        progress.close()
    log.info(
        "serving %s with the %s engine%s",
        local.name,
        engine.kind,
        f" on {pick().label}" if settings.engine_kind == "native" else "",
        extra={"class": local.model_class.class_id[:8], "arithmetic": local.model_class.arithmetic},
    )
    return engine


async def _loaded(
    settings: NodeSettings, exact: bool | None, pick: Callable[[], Device], progress: ProgressBar
) -> tuple[LocalModel, Engine]:
    local = await resolve(
        settings.model,
        data=settings.data,
        engine=settings.engine_kind,
        name=settings.name,
        revision=settings.revision,
        dtype=settings.dtype,
        exact=exact,
        device=lambda: pick().kind,
        context_tokens=settings.context_tokens,
        trust_remote_code=settings.trust_remote_code,
        hub_url=settings.hub_url,
        hub_token=settings.hub_token,
        progress=progress,
    )
    for note in local.notes:
        log.warning("%s", note)
    if settings.engine_kind == "echo":
        return local, EchoEngine(
            local.served,
            slots=settings.slots,
            tokens_per_second=settings.echo_tokens_per_second,
            first_token_delay_seconds=settings.echo_delay_seconds,
            ids_per_step=settings.echo_ids_per_step,
        )
    return local, await _in_thread(
        lambda: load_native_engine(
            local,
            pick(),
            data=settings.data,
            slots=settings.slots,
            kv_bytes=settings.kv_memory,
            threads=settings.threads,
            trust_remote_code=settings.trust_remote_code,
            progress=progress.fraction,
        )
    )


async def _in_thread(work: Callable[[], T]) -> T:
    """Like asyncio.to_thread, in a thread that does not keep the program alive: loading cannot be interrupted."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 - it is raised again where it was asked for
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=body, name="gridmill-load", daemon=True).start()
    return await done


# ---------------------------------------------------------------- the link, for as long as it takes


class _Serving:
    """One engine on one network: dials, redials, and leaves politely."""

    def __init__(
        self,
        settings: NodeSettings,
        address: str,
        pins: NetworkKeys,
        engine: Engine,
        outbox: Outbox,
        ready: Ready,
        asked: _Asked,
    ) -> None:
        self._settings = settings
        self._address = address
        self._pins = pins
        self._engine = engine
        self._outbox = outbox
        self._price = settings.asked_price
        self._region = settings.region or ""
        self._ready: Ready | None = ready
        self._asked = asked
        self._between_links = asyncio.Event()
        self._between_links.set()

    async def run(self, side: NodeSide) -> int:
        dialling = asyncio.create_task(self._dial(side), name="link")
        leaving = asyncio.create_task(self._stop_dialling(dialling), name="leave")
        try:
            await asyncio.wait((dialling,))
        finally:
            for task in (dialling, leaving):
                task.cancel()
            await asyncio.wait((dialling, leaving))
        if dialling.cancelled():
            return EXIT_DONE
        try:
            closed = dialling.result()
        except DialError as problem:
            raise _CannotRun(EXIT_NETWORK, str(problem)) from problem
        if closed.permanent:
            raise _CannotRun(EXIT_NETWORK, self._remedy(closed))
        return EXIT_DONE

    async def _dial(self, side: NodeSide) -> Closed:
        return await keep_dialled(
            self._settings.network,
            side,
            self._talk,
            ca_file=self._settings.ca_file,
            insecure=self._settings.insecure,
        )

    async def _stop_dialling(self, dialling: asyncio.Task[Closed]) -> None:
        """A live link says goodbye by itself; between links there is only a pause to be cut short."""
        await self._asked.wait()
        await self._between_links.wait()
        dialling.cancel()

    async def _talk(self, conversation: Conversation) -> Closed:
        self._between_links.clear()
        try:
            async with (
                agent_on(
                    [self._engine], conversation, outbox=self._outbox, price=self._price, region=self._region
                ) as agent,
                asyncio.TaskGroup() as group,
            ):
                conversation.link.telemetry = agent.telemetry

                async def leave() -> None:
                    await self._asked.wait()
                    await agent.drain(self._asked.drain_seconds)
                    conversation.close(Reason.DRAINED)

                def on_event(event: Event) -> None:
                    agent.on_event(event)
                    if isinstance(event, Opened):
                        self._opened(event)
                    elif isinstance(event, Arrived) and isinstance(event.message, Listed):
                        # Only now can users ask for the model: the network has fetched and checked its text files.
                        self._listed(conversation)

                leaving = group.create_task(leave(), name="leave")
                closed = await conversation.run(on_event)
                leaving.cancel()
            return closed
        finally:
            self._between_links.set()

    def _opened(self, opened: Opened) -> None:
        try:
            self._pins.pin(self._address, opened.network_key)
        except OSError as problem:
            log.warning("the network's key could not be kept in %s: %s", self._pins.path, problem)

    def _listed(self, conversation: Conversation) -> None:
        opened = conversation.link.opened
        if self._ready is not None and opened is not None:
            ready, self._ready = self._ready, None
            ready(
                {
                    "base_url": _base_url(self._address),
                    "model": self._engine.served.name,
                    "node_id": opened.node_id,
                }
            )

    def _remedy(self, closed: Closed) -> str:
        if closed.reason is Reason.WRONG_NETWORK_KEY and not closed.by_peer:
            return (
                f"{self._address} answers with another key than at the first join ({closed.detail}). Ask its operator; "
                "if the change is right, give the new key with --network-key, or remove the address from "
                f"{self._pins.path}"
            )
        return f"{self._address} does not take this node: {closed}"


def _side(settings: NodeSettings, pinned: bytes | None) -> NodeSide:
    """Who this node is. Raises _CannotRun."""
    try:
        identity = Identity.load_or_create(settings.data / "node.key")
        log.info("this node is %s", node_id_of(identity.public))
        side = NodeSide(
            identity,
            host="",  # taken from the address that is dialled
            software=f"gridmill/{__version__} ({sys.platform})",
            join_token=settings.join_token or "",
            pinned_network_key=settings.pinned_network_key or pinned,
        )
        if settings.owner is None:
            return side
        if not settings.owner.exists():
            log.warning("%s does not exist: a new owner key is made there; keep it, it is who earns", settings.owner)
        owner = Identity.load_or_create(settings.owner)
    except (IdentityError, OSError) as problem:
        raise _CannotRun(EXIT_USAGE, str(problem)) from problem
    return dataclasses.replace(side, owner_key=owner.public, owner_signature=certify(owner, identity.public))


class NetworkKeys:
    """Which key answered at which address at the first join (DATA/networks.json): address → 64 hex digits.

    Raises _CannotRun on a file that is none: a pin that cannot be read must not become a pin that is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            known = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
            self._known = {address: bytes.fromhex(key) for address, key in known.items()}
        except FileNotFoundError:
            self._known = {}
        except (OSError, ValueError) as problem:
            raise _CannotRun(EXIT_USAGE, f"{path} cannot be read ({problem}); repair or remove it") from problem

    def get(self, address: str) -> bytes | None:
        return self._known.get(address)

    def pin(self, address: str, key: bytes) -> None:
        if self._known.get(address) != key:
            self._known[address] = key
            shown = {address: key.hex() for address, key in self._known.items()}
            write_whole(self.path, msgspec.json.format(msgspec.json.encode(shown)))


def _base_url(address: str) -> str:
    """The API beside a link: ws://host:port/link → http://host:port/v1."""
    return "http" + address.removeprefix("ws").removesuffix("/link") + "/v1"


# ---------------------------------------------------------------- being asked to stop, and being alone


class _Asked:
    """Whether this program was asked to stop: by `stop`, or by the end of its parent where it is to watch that."""

    def __init__(self, settings: NodeSettings, stop: asyncio.Event) -> None:
        self._stop = stop
        self.drain_seconds = settings.drain_timeout_seconds
        if settings.exit_with_parent:
            loop = asyncio.get_running_loop()
            # It ends with stdin or with the program; nothing but a thread can wait for every kind of stdin.
            threading.Thread(target=self._read_stdin, args=(loop,), name="gridmill-parent", daemon=True).start()

    async def wait(self) -> None:
        await self._stop.wait()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None when stopping was asked for first; then `work` is cancelled."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.wait((working, stopping))

    def _read_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):  # no stdin at all is an end, too
            while os.read(0, 4096):
                pass  # a parent may say what it likes; only its end matters
        with contextlib.suppress(RuntimeError):  # the loop is closed: we stopped before our parent did
            loop.call_soon_threadsafe(self._orphaned)

    def _orphaned(self) -> None:
        self.drain_seconds = min(self.drain_seconds, ORPHAN_DRAIN_SECONDS)
        self._stop.set()


@contextlib.contextmanager
def _only_node_on(data: Path) -> Iterator[None]:
    """Holds DATA/node.lock: two nodes with one key would throw each other off the network for ever."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = data / "node.lock"
    with path.open("a+") as file:
        try:
            _lock(file.fileno())
        except OSError:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise _CannotRun(
                EXIT_USAGE,
                f"another node (process {holder}) runs on {data}; stop it, or give this one a --data folder of its own",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield  # closing the file gives the lock back, also when the program is killed


def _lock(descriptor: int) -> None:
    """Raises OSError when somebody else holds it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
