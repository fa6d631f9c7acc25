"""The only I/O of the wire: a Conversation pumps one WebSocket through one Link.

Sending never blocks: it queues in the link and wakes the pump, which writes everything queued in one socket send and
awaits the socket, so that a slow reader slows the pump and nothing else. Reading calls `on_event` per event, in order.
The node dials (`dial`, `keep_dialled`); the network answers inside its HTTP server (`serve_asgi_websocket`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import random as random_module
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from gridmill.wire.codec import FRAME_BYTES_MAX
from gridmill.wire.link import SEND_BYTES_MAX, Arrived, Closed, Event, Link, NodeSide, Opened, Reason, State
from gridmill.wire.messages import AnyMessage

LINK_PATH = "/link"
DIAL_SECONDS_MAX = 15.0  # TCP, TLS and the HTTP upgrade, over a bad line
FAREWELL_SECONDS_MAX = 2.0  # how long a goodbye may take to leave before the socket is closed over it
WEBSOCKET_MESSAGE_BYTES_MAX = 1 << 20  # a take is at most SEND_BYTES_MAX and two frames; servers must allow this much
REDIAL_SECONDS_FIRST = 0.5  # a network that restarts is back within a second or two
REDIAL_SECONDS_MAX = 30.0  # a node earns nothing while it waits; ten thousand nodes make 700 dials a second at most
STABLE_SECONDS = 60.0  # a link that lived this long starts the back-off afresh

assert SEND_BYTES_MAX + 2 * (FRAME_BYTES_MAX + 64) <= WEBSOCKET_MESSAGE_BYTES_MAX

log = logging.getLogger("gridmill.link")

Clock = Callable[[], float]
Entropy = Callable[[int], bytes]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class DialError(Exception):
    """No conversation came about; one sentence says why. `permanent`: dialling again cannot help."""

    def __init__(self, sentence: str, permanent: bool = False) -> None:
        super().__init__(sentence)
        self.permanent = permanent


class Socket(Protocol):
    """A WebSocket as the pump sees it: binary messages whose borders mean nothing."""

    async def send_bytes(self, data: bytes) -> None:
        """Waits while the other side does not read. Raises ConnectionError when it is gone."""
        ...

    async def receive_bytes(self) -> bytes | None:
        """The next piece, or None at the end."""
        ...

    async def close(self) -> None: ...


class Conversation:
    """One link on one socket. Everything but `run` and `bulk_below` is synchronous and may be called at any time."""

    def __init__(self, link: Link, socket: Socket, clock: Clock = time.monotonic) -> None:
        self.link = link
        self._socket = socket
        self._clock = clock
        self._output_due = True  # a node's link was born with its Hello
        self._writer: asyncio.Future[None] | None = None
        self._deadline_moved = asyncio.Event()
        self._closed = asyncio.Event()
        self._bulk_senders: list[asyncio.Future[None]] = []
        self._on_event: Callable[[Event], None] = _ignore
        self._sending = False  # left True when a send was interrupted: its bytes may or may not have gone out
        link.wall_minus_now = time.time() - clock()
        link.wake = self._wake

    def send(self, message: AnyMessage) -> None:
        """Queues a message; see `Link.send` for what it raises. Nothing happens once the link is closed."""
        self.link.send(message)

    def admit(self) -> None:
        """Network, after Proven: lets the node in."""
        self.link.admit(self._clock())

    def refuse(self, reason: Reason, detail: str = "") -> None:
        self.link.refuse(reason, detail)

    def close(self, reason: Reason, detail: str = "") -> None:
        """Says goodbye after what is queued; `run` then returns."""
        self.link.close(reason, detail)

    async def bulk_below(self, size: int) -> None:
        """Waits until fewer than `size` bytes of file chunks are queued, or the link is closed.

        A sender of files awaits this before each Chunk, so that a file lies in memory once and not twice.
        """
        while self.link.bulk_bytes >= size and self.link.state is not State.CLOSED:
            sender: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._bulk_senders.append(sender)
            await sender

    async def run(self, on_event: Callable[[Event], None]) -> Closed:
        """Pumps until the link is closed; Closed is both the last event and what is returned.

        `on_event` is called one event at a time and must not block. When `run` is cancelled it says goodbye with
        Reason.STOPPING first. What `on_event` raises ends the conversation and comes out of here in an ExceptionGroup.
        """
        self._on_event = on_event
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read())
                timekeeper = group.create_task(self._keep_time())
                writer = group.create_task(self._write())
                await self._closed.wait()
                reader.cancel()
                timekeeper.cancel()
                # The goodbye is on its way out; a socket that takes nothing must not hold us.
                await asyncio.wait((writer,), timeout=FAREWELL_SECONDS_MAX)
                writer.cancel()
        finally:
            try:
                self.link.close(Reason.STOPPING)  # does nothing when it is closed already
                self._deliver(self.link.take_events())
            finally:
                await self._leave()
        assert self.link.closed is not None
        return self.link.closed

    def _wake(self) -> None:
        self._rouse_writer()
        if self.link.state is State.CLOSED:
            self._closed.set()  # the writer, who would deliver this, may be waiting for a socket that takes nothing

    async def _read(self) -> None:
        while True:
            try:
                data = await self._socket.receive_bytes()
            except ConnectionError:
                data = None
            if data is None:
                self._deliver(self.link.eof(self._clock()))
                return
            self._deliver(self.link.receive(data, self._clock()))
            if self.link.has_bytes:
                self._rouse_writer()

    async def _write(self) -> None:
        # One bare future and no Event or Condition: this runs once per frame.
        link, loop = self.link, asyncio.get_running_loop()
        while True:
            if not self._output_due:
                self._writer = loop.create_future()
                await self._writer
            self._output_due = False
            self._deliver(link.take_events())
            while link.has_bytes and (data := link.take_bytes()):
                self._sending = True
                try:
                    await self._socket.send_bytes(data)
                except ConnectionError:
                    self._deliver(self.link.eof(self._clock()))
                    return
                self._sending = False
                if self._bulk_senders:
                    self._rouse_bulk_senders()
            if link.state is State.CLOSED:
                return

    def _rouse_writer(self) -> None:
        self._output_due = True
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _rouse_bulk_senders(self) -> None:
        senders, self._bulk_senders = self._bulk_senders, []
        for sender in senders:
            if not sender.done():
                sender.set_result(None)

    async def _keep_time(self) -> None:
        while True:
            self._deadline_moved.clear()
            delay = self.link.next_deadline(self._clock()) - self._clock()
            if delay > 0:
                try:
                    async with asyncio.timeout(delay if math.isfinite(delay) else None):
                        await self._deadline_moved.wait()
                except TimeoutError:
                    pass  # it is time
            self._deliver(self.link.tick(self._clock()))
            if self.link.has_bytes:
                self._rouse_writer()

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if type(event) is Arrived:
                pass  # by far the most, and none of this file's business
            elif isinstance(event, Opened):
                self._deadline_moved.set()
                log.info("link open: %s, %s, protocol version %d", event.node_id, event.software, event.version)
            elif isinstance(event, Closed):
                self._wake()
            self._on_event(event)

    async def _leave(self) -> None:
        """Sends what is left to say and closes the socket, within a time limit."""
        try:
            async with asyncio.timeout(FAREWELL_SECONDS_MAX):
                while not self._sending and (data := self.link.take_bytes()):
                    await self._socket.send_bytes(data)
                await self._socket.close()
        except (ConnectionError, TimeoutError):
            pass  # the other side is gone, and so are its questions
        self._rouse_bulk_senders()


def _ignore(event: Event) -> None:
    """Before `run` there is nobody to tell."""


# ---------------------------------------------------------------- the node dials


@asynccontextmanager
async def dial(
    url: str,
    side: NodeSide,
    *,
    ca_file: Path | str | None = None,
    insecure: bool = False,
    clock: Clock = time.monotonic,
    entropy: Entropy = os.urandom,
) -> AsyncIterator[Conversation]:
    """Connects to the network at `url` and yields the conversation, which the caller runs.

    The greeting's host is taken from the URL, whatever `side.host` says. Raises DialError.
    """
    address, host = link_address(url, insecure=insecure)
    context = _tls_context(ca_file) if address.startswith("wss:") else None
    async with aiohttp.ClientSession() as session:
        try:
            async with asyncio.timeout(DIAL_SECONDS_MAX):
                websocket = await session.ws_connect(
                    address,
                    ssl=context if context is not None else True,
                    compress=0,  # ids do not compress, and a compressor's memory is a gift to an attacker
                    max_msg_size=WEBSOCKET_MESSAGE_BYTES_MAX,
                    timeout=aiohttp.ClientWSTimeout(ws_close=FAREWELL_SECONDS_MAX),
                )
        except aiohttp.ClientConnectorCertificateError as error:
            sentence = (
                f"the certificate of {host} is not trusted ({error.certificate_error}); give its CA with --ca-file"
            )
            raise DialError(sentence, permanent=True) from error
        except aiohttp.WSServerHandshakeError as error:
            raise DialError(
                f"{address} answers {error.status} instead of a link; is that a Gridmill network?"
            ) from error
        except TimeoutError as error:
            raise DialError(f"{address} did not answer within {DIAL_SECONDS_MAX:.0f} seconds") from error
        except (aiohttp.ClientError, OSError) as error:
            raise DialError(f"cannot reach {address}: {error}") from error
        socket = _ClientSocket(websocket)
        try:
            yield Conversation(Link(replace(side, host=host), entropy=entropy, now=clock()), socket, clock)
        finally:
            await socket.close()


async def keep_dialled(
    url: str,
    side: NodeSide,
    talk: Callable[[Conversation], Awaitable[Closed]],
    *,
    ca_file: Path | str | None = None,
    insecure: bool = False,
    clock: Clock = time.monotonic,
    entropy: Entropy = os.urandom,
    random: Callable[[], float] = random_module.random,
    delay_seconds_max: float = REDIAL_SECONDS_MAX,
) -> Closed:
    """Dials, lets `talk` run each conversation to its end, and dials again; one line in the log per change.

    Returns when redialling cannot help, or when our own side closed with Reason.DRAINED or STOPPING. Raises DialError
    when the first dial shows that the address can never work. The network's key is pinned from the first success on.
    Delays are drawn evenly from 0 to a bound that doubles (full jitter: nodes that lost the same network do not return
    in step).
    """
    attempts = 0
    told = ""
    ever_opened = False
    while True:
        began = clock()
        closed: Closed | None = None
        opened = False
        try:
            async with dial(
                url, side, ca_file=ca_file, insecure=insecure, clock=clock, entropy=entropy
            ) as conversation:
                closed = await talk(conversation)
                if conversation.link.opened is not None:
                    opened = ever_opened = True
                    side = replace(side, pinned_network_key=conversation.link.opened.network_key)
            now_told = str(closed)
        except DialError as error:
            if error.permanent and not ever_opened:  # later it may be a café's router, or a certificate renewed late
                raise
            now_told = str(error)
        if closed is not None:
            if closed.permanent or (not closed.by_peer and closed.reason in (Reason.DRAINED, Reason.STOPPING)):
                level = logging.ERROR if closed.permanent else logging.INFO
                log.log(level, "link to %s ended, not dialling again: %s", url, now_told)
                return closed
            if opened and clock() - began >= STABLE_SECONDS:
                attempts = 0
        if opened or now_told != told:
            log.warning("link to %s: %s; dialling again", url, now_told)
            told = now_told
        delay = random() * min(delay_seconds_max, REDIAL_SECONDS_FIRST * 2.0 ** min(attempts, 30))
        attempts += 1
        await asyncio.sleep(delay)


def link_address(url: str, *, insecure: bool = False) -> tuple[str, str]:
    """(WebSocket address, host[:port] as signed in the greeting) of a network's URL, with or without /v1.

    Raises DialError for what can never work, above all plain ws:// to another machine.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    scheme = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}.get(parts.scheme.lower())
    if scheme is None:
        raise DialError(f"{url} is no network address: it must begin with https://, wss://, http:// or ws://", True)
    try:
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise DialError(f"{url} is no network address: {error}", True) from error
    if not name:
        raise DialError(f"{url} is no network address: it names no host", True)
    if parts.username is not None or parts.query or parts.fragment:
        raise DialError(f"{url} is no network address: no user, query or fragment belongs there", True)
    if scheme == "ws" and not insecure and not is_loopback(name):
        raise DialError(
            f"refusing to dial {url}: without TLS others can read prompts and answers on the way. "
            "Use https://, or --insecure if you know the line",
            True,
        )
    name = f"[{name}]" if ":" in name else name
    host = name if port is None or port == {"ws": 80, "wss": 443}[scheme] else f"{name}:{port}"
    path = parts.path.rstrip("/").removesuffix(LINK_PATH).removesuffix("/v1")
    return f"{scheme}://{host}{path}{LINK_PATH}", host


def is_loopback(host: str) -> bool:
    """Whether a host name or address (no port, no brackets) means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls_context(ca_file: Path | str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file) if ca_file is not None else None)
    except (OSError, ssl.SSLError) as error:
        raise DialError(f"cannot read the CA file {ca_file}: {error}", True) from error


class _ClientSocket:
    """aiohttp's client WebSocket as a Socket. It bounds what it reads ahead and awaits the writer's buffer."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self._websocket = websocket

    async def send_bytes(self, data: bytes) -> None:
        await self._websocket.send_bytes(data)  # raises aiohttp's ClientConnectionResetError, a ConnectionError

    async def receive_bytes(self) -> bytes | None:
        message = await self._websocket.receive()
        # Anything but a binary message is either the end or no business of ours.
        return message.data if message.type is aiohttp.WSMsgType.BINARY else None

    async def close(self) -> None:
        await self._websocket.close()


# ---------------------------------------------------------------- the network answers


async def serve_asgi_websocket(
    scope: Scope,
    receive: Receive,
    send: Send,
    make_link: Callable[[], Link],
    on_conversation: Callable[[Conversation], Awaitable[None]],
    *,
    clock: Clock = time.monotonic,
) -> None:
    """Takes an ASGI websocket scope to its end: accepts, lets `on_conversation` run the conversation, closes.

    The server must allow messages of WEBSOCKET_MESSAGE_BYTES_MAX and should leave compression and its own pings off.
    """
    assert scope["type"] == "websocket"
    first = await receive()
    if first["type"] != "websocket.connect":
        return
    await send({"type": "websocket.accept"})
    socket = _AsgiSocket(receive, send)
    link = make_link()
    try:
        await on_conversation(Conversation(link, socket, clock))
    finally:
        await socket.close()
        if link.closed is not None:
            who = link.opened.node_id if link.opened is not None else f"a node at {_client_of(scope)}"
            level = logging.INFO if link.closed.reason in (Reason.DRAINED, Reason.STOPPING) else logging.WARNING
            log.log(level, "link to %s: %s", who, link.closed)


def _client_of(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "an unknown address"


class _AsgiSocket:
    """An accepted ASGI websocket as a Socket. uvicorn pauses reading until the last message is taken."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._ended = False

    async def send_bytes(self, data: bytes) -> None:
        if self._ended:
            raise ConnectionResetError("the WebSocket is closed")
        try:
            await self._send({"type": "websocket.send", "bytes": data})
        except OSError as error:  # uvicorn's ClientDisconnected is one
            self._ended = True
            raise ConnectionResetError(str(error)) from error

    async def receive_bytes(self) -> bytes | None:
        if self._ended:
            return None
        message = await self._receive()
        if message["type"] == "websocket.receive" and message.get("bytes") is not None:
            data: bytes = message["bytes"]
            return data
        self._ended = message["type"] == "websocket.disconnect"
        return None

    async def close(self) -> None:
        if not self._ended:
            self._ended = True
            try:
                await self._send({"type": "websocket.close", "code": 1000})
            except OSError:
                pass  # it went away by itself
