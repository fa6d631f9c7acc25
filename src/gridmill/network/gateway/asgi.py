"""The little of HTTP that every public API here needs, on raw ASGI.

- A body is read under a size limit and a time limit; a caller that breaks either is told so and nothing is kept.
- `Client.present` notices a caller that leaves, or that takes nothing, while its answer is being made. uvicorn's `send`
  returns silently after a disconnect, so the connection itself tells, through an extension of `HttpProtocol`.
- Errors have OpenAI's shape whatever the API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
BODY_BYTES_PER_SECOND_MIN = 16 << 10  # a slower body is not a slow line but somebody holding a place
CONNECTION_EXTENSION = "gridmill.connection"
HEAD_BYTES_MAX = 64 << 10  # with the URL; proxies stop at 8 to 32 KiB, and it is kept before anybody is known
PIPELINED_REQUESTS_MAX = 16  # waiting behind the one being answered; hardly a client sends even one ahead
LEFTOVER_BYTES_MAX = 64 << 20  # thrown away after an early answer, so that a caller still sending gets to read it
CORK_BYTES_MAX = 64 << 10  # what one turn may hold back; as much as a transport buffers before it pauses its writer

_encode = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that is an error. `param` is the parameter at fault; `headers` go out with it.

    `facts` are numbers for programs, under `gridmill` in the error object.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        headers: Headers | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers or []
        self.facts = facts

    def body(self) -> bytes:
        """OpenAI's error object."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.facts is not None:
            error["gridmill"] = self.facts
        return _encode({"error": error})


_ERROR_TYPES = {402: "insufficient_quota", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}


class ClientGone(Exception):
    """Nobody is there to answer: the caller left, or took nothing for too long."""


class Client:
    """The far end of one exchange that `HttpProtocol` serves."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        clock: Callable[[], float],
        stall_timeout_seconds: float,
    ) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._clock = clock
        self.stall_timeout_seconds = stall_timeout_seconds
        self._sends_waiting = 0
        self._progress_at = 0.0
        self.complete = False  # the whole answer was given to the transport, or is being given to it

    async def send_head(self, status: int, headers: Headers) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_body(self, data: bytes, *, more: bool = True) -> None:
        """Returns once the transport took the bytes, which is the back-pressure of a slow reader."""
        if not self._sends_waiting:
            self._progress_at = self._clock()
        self._sends_waiting += 1
        self.complete = self.complete or not more
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self._sends_waiting -= 1
            if self._sends_waiting:
                self._progress_at = self._clock()

    async def answer(self, status: int, body: bytes, content_type: bytes, headers: Headers) -> None:
        length = str(len(body)).encode()
        await self.send_head(status, [(b"content-type", content_type), (b"content-length", length), *headers])
        await self.send_body(body, more=False)

    def stalls_in(self) -> float:
        """Seconds until a caller that goes on taking nothing is given up."""
        if not self._sends_waiting:
            return self.stall_timeout_seconds
        return self.stall_timeout_seconds - (self._clock() - self._progress_at)

    def present(self) -> Presence:
        """`with client.present():` is left with ClientGone as soon as the caller leaves or stalls.

        To be entered once the request body has been read. Once the answer is complete nobody has to stay.
        """
        return Presence(self)

    async def read_body(self, bytes_max: int, timeout_seconds: float) -> bytes:
        """The whole body. Raises ApiError (413, 408) or ClientGone.

        `timeout_seconds` is for the first byte; each byte after it earns 1/BODY_BYTES_PER_SECOND_MIN more.
        """
        declared = header(self.scope, b"content-length")
        if declared and declared.isdigit() and (len(declared) > 18 or int(declared) > bytes_max):
            raise _too_large(bytes_max)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout_at(deadline) as limit:
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone("left before its request was complete")
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > bytes_max:
                        raise _too_large(bytes_max)
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
                    limit.reschedule(deadline + size / BODY_BYTES_PER_SECOND_MIN)
        except TimeoutError:
            raise ApiError(
                408,
                "body_timeout",
                f"the request body did not arrive in time: {size} bytes came",
                headers=[(b"connection", b"close")],
            ) from None


class Presence:
    """Cancels the task inside when its caller is gone, and turns that into ClientGone, as `asyncio.timeout` does.

    No task of its own: it costs each request a timer and an entry in a set.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connection: HttpProtocol = client.scope["extensions"][CONNECTION_EXTENSION]
        self._gone_because: str | None = None
        self._cancelled = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "only a task can be cancelled"
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        if not self._connection.watch(self._left):
            raise ClientGone("left")
        self._timer = self._loop.call_later(self._client.stall_timeout_seconds, self._look_for_stall)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.unwatch(self._left)
        self._timer.cancel()
        # What else failed while the caller left, failed because of that; a cancellation from outside is not ours.
        if self._cancelled and self._task.uncancel() <= self._cancelling and error is not None:
            raise ClientGone(self._gone_because) from error

    def _left(self) -> None:
        if self._gone_because is None:
            if self._client.complete:
                return  # everything was said, and the connection may end
            self._gone_because = "left"
        self._cancelled = True
        self._task.cancel()

    def _look_for_stall(self) -> None:
        stall_in = self._client.stalls_in()
        if stall_in > 0:
            self._timer = self._loop.call_later(stall_in, self._look_for_stall)
            return
        self._gone_because = f"took nothing for {self._client.stall_timeout_seconds:g} s"
        # Without waiting for its buffer, which such a reader would never empty. The lost connection then calls `_left`.
        self._connection.transport.abort()


def _too_large(bytes_max: int) -> ApiError:
    # The connection stays open and the rest of the body is discarded as it comes: closing it now would reset it under a
    # client that is still sending, and the client would never see why.
    return ApiError(413, "body_too_large", f"the request body is over the limit of {bytes_max} bytes")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def send_bytes(send: Send, status: int, body: bytes, content_type: bytes, headers: Headers | None = None) -> None:
    """One complete small answer."""
    length = str(len(body)).encode()
    head = [(b"content-type", content_type), (b"content-length", length), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class CorkedTransport(asyncio.Transport):
    """Writes of one turn of the loop leave in one system call: a head with its body, the events of several frames.

    uvloop writes at once, and on a busy gateway those calls are most of what an answer costs. A WebSocket that grew out
    of the connection is corked too.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._pending: list[bytes | bytearray | memoryview] = []
        self._pending_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes > CORK_BYTES_MAX:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if pending and not self._transport.is_closing():
            self._transport.write(pending[0] if len(pending) == 1 else b"".join(pending))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._pending, self._pending_bytes = [], 0
        self._transport.abort()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def get_write_buffer_size(self) -> int:
        return self._pending_bytes + self._transport.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with limits on what a stranger may make it keep, and a word for who waits for its end.

    - Nothing but a body may grow: heads, trailers, pipelined requests and what follows an early answer have limits.
    - An offer to upgrade to anything but WebSocket is ignored, as RFC 9110 §7.8 allows; the request keeps its body.
    - `watch` calls when the connection is lost. ASGI tells of that only to a task that waits in `receive`, and knows no
      way to close a connection at once: closing politely waits for a buffer that a stalled reader never empties.

    Give it to uvicorn as `Config(http=HttpProtocol)`.
    """

    head_timeout_seconds = 20.0  # for a whole head, from its first byte or from the connection
    leftover_timeout_seconds = 30.0  # for what still comes after an answer that did not wait for it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(CorkedTransport(transport, asyncio.get_running_loop()))
        self.flow = _Flow(self.transport)
        self._watchers: set[Callable[[], None]] = set()
        self._lost = False
        self._in_head = False
        self._in_body = False
        self._progressed = False  # the parser had something to show for the bytes it was given
        self._fruitless_bytes = 0  # fed since it last had: a part of a head, a chunk extension, a trailer
        self._refused = False
        self._leftover_bytes = 0
        self._leftover_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(self.head_timeout_seconds, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost = True
        self._stop_timers()
        for watcher in tuple(self._watchers):
            watcher()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._leftover_timer is not None:
            self._leftover_bytes += len(data)
            if self._leftover_bytes > LEFTOVER_BYTES_MAX:
                self.transport.abort()
                return
        if self._refused:
            return
        while self._fruitless_bytes + len(data) > HEAD_BYTES_MAX:
            cut = HEAD_BYTES_MAX + 1 - self._fruitless_bytes
            if not self._feed(data[:cut]):
                return
            data = data[cut:]
        if not self._feed(data):
            return
        # A head that came whole, as nearly all do, costs no timer.
        if self._head_timer is None and (self._in_head or (self._fruitless_bytes and not self._in_body)):
            self._head_timer = self.loop.call_later(self.head_timeout_seconds, self._head_late)

    def _feed(self, data: bytes) -> bool:
        """False when this connection takes no more HTTP."""
        self._progressed = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self.transport.is_closing():
                self.logger.warning("Invalid HTTP request received.")
                self._refuse(400, "invalid_http", "this is not valid HTTP/1.1")
            return False
        self._fruitless_bytes = 0 if self._progressed else self._fruitless_bytes + len(data)
        if self._fruitless_bytes > HEAD_BYTES_MAX:
            self._refuse(431, "head_too_large", f"the request head is over the limit of {HEAD_BYTES_MAX} bytes")
            return False
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self.scope["extensions"] = {CONNECTION_EXTENSION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._progressed = True
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._unset_keepalive_if_required()
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode("ascii")
            return  # `_upgrade` goes on
        self._in_body = True
        super().on_headers_complete()
        self.headers = []  # the request has its own; trailers are nobody's
        if len(self.pipeline) > PIPELINED_REQUESTS_MAX:
            self._refused = True
            self.transport.abort()
            raise ConnectionAbortedError("too many requests were sent ahead")  # so that the parser stops here

    def on_body(self, body: bytes) -> None:
        self._progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._progressed = True
        self._in_body = False
        super().on_message_complete()
        if self._leftover_timer is not None:
            self._leftover_timer.cancel()
            self._leftover_timer = None
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._head_timer is not None:
            # A next head begun meanwhile has its whole time from here: reading may have been paused until now.
            self._head_timer.cancel()
            self._head_timer = self.loop.call_later(self.head_timeout_seconds, self._head_late)
        if self._in_body and self.cycle.response_complete and not self.transport.is_closing():
            self._leftover_bytes = 0
            self._leftover_timer = self.loop.call_later(self.leftover_timeout_seconds, self.transport.abort)

    def _should_upgrade(self) -> bool:
        return self.scope["method"] == "GET" and super()._should_upgrade()

    def _upgrade(self, rest: bytes) -> bool:
        """What follows a head at which the parser stopped: a WebSocket, or the body of an ordinary request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an upgrade ends the HTTP of a connection, and an answer is still being made
            return False
        if self._should_upgrade():
            self.handle_websocket_upgrade()
            return False
        if self.scope["method"] == "CONNECT":
            self._refuse(405, "method_not_allowed", "this is not a proxy: there is no CONNECT here")
            return False
        # A parser that stopped has forgotten how long the body is. A new one reads the head again without the offer.
        head = [self.scope["method"].encode(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [b"\r\n", name, b": ", value]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        self._fruitless_bytes = 0
        return self._feed(b"".join(head) + b"\r\n\r\n") and self._feed(rest)

    def _head_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # The next request's head, while an answer is being made and reading may be paused: that is no delay yet.
            self._head_timer = self.loop.call_later(self.head_timeout_seconds, self._head_late)
        elif self._in_head or self._fruitless_bytes:
            self._refuse(408, "head_timeout", "the request head did not arrive in time")
        else:
            self.transport.close()  # nothing was asked

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answers for the application and takes nothing more. The connection ends when the caller has seen it."""
        self._refused = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # nothing can be said in the middle of another answer
            return
        body = ApiError(status, code, message).body()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        # Closing at once would reset the connection under a caller that is still sending, and lose the answer.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._leftover_bytes = 0
        self._leftover_timer = self.loop.call_later(self.leftover_timeout_seconds, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._leftover_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._leftover_timer = None

    def watch(self, watcher: Callable[[], None]) -> bool:
        """Calls `watcher` when the connection is lost; False when it is lost already."""
        if not self._lost:
            self.flow.resume_reading()  # only who reads sees the end
            self._watchers.add(watcher)
        return not self._lost

    def unwatch(self, watcher: Callable[[], None]) -> None:
        self._watchers.discard(watcher)


class _Flow(FlowControl):
    """Reads nothing more from a caller that does not take its answers."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._reading_waits = False

    def pause_reading(self) -> None:
        self._reading_waits = False
        super().pause_reading()

    def resume_reading(self) -> None:
        if self.write_paused:
            self._reading_waits = self.read_paused
        else:
            super().resume_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_waits:
            self._reading_waits = False
            self.resume_reading()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, whose binary messages are a stream of bytes: all that one read brought arrive as one.

    A busy node sends several messages while the network is at something else, and each costs as much as what is in it.
    Give it to uvicorn as `Config(ws=WebSocketProtocol)`.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._gathered: list[bytes] = []

    def handle_events(self) -> None:
        super().handle_events()
        self._deliver()

    def handle_text(self, event: Frame) -> None:
        self._deliver()
        super().handle_text(event)

    def handle_close(self, event: Frame) -> None:
        self._deliver()
        super().handle_close(event)

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" or self.close_sent:
            super().send_receive_event_to_app()
            return
        self._gathered += self.frames
        self.frames = []

    def _deliver(self) -> None:
        if not self._gathered:
            return
        data = self._gathered[0] if len(self._gathered) == 1 else b"".join(self._gathered)
        self._gathered = []
        self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
