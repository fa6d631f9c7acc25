"""The little of HTTP that every public API here needs, on raw ASGI.

- A body is read under a size limit and a time limit; a caller that breaks either is told so and nothing is kept.
- `Client` notices a caller that leaves, or that takes nothing, while its answer is being made. uvicorn's `send` returns
  silently after a disconnect, so only `receive` tells.
- Errors have OpenAI's shape whatever the API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
BODY_BYTES_PER_SECOND_MIN = 16 << 10  # a slower body is not a slow line but somebody holding a place
ABORT_EXTENSION = "gridmill.abort"
CORK_BYTES_MAX = 64 << 10  # what one turn may hold back; as much as a transport buffers before it pauses its writer

_encode = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that is an error. `param` is the parameter at fault; `headers` go out with it."""

    def __init__(
        self, status: int, code: str | None, message: str, *, param: str | None = None, headers: Headers | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers or []

    def body(self) -> bytes:
        """OpenAI's error object."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return _encode({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})


_ERROR_TYPES = {403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}


class ClientGone(Exception):
    """Nobody is there to answer: the caller left, or took nothing for too long."""


class Client:
    """The far end of one exchange. One task waits in `gone` while others send."""

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
        self._stall_timeout_seconds = stall_timeout_seconds
        self._sends_waiting = 0
        self._progress_at = 0.0
        self._complete = False

    async def send_head(self, status: int, headers: Headers) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_body(self, data: bytes, *, more: bool = True) -> None:
        """Returns once the transport took the bytes, which is the back-pressure of a slow reader."""
        if not self._sends_waiting:
            self._progress_at = self._clock()
        self._sends_waiting += 1
        self._complete = self._complete or not more
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

    async def gone(self) -> None:
        """Raises ClientGone when the caller leaves or stalls; returns when its answer is complete.

        To be awaited once the request body has been read.
        """
        while True:
            stall_in = self._stall_timeout_seconds
            if self._sends_waiting:
                stall_in -= self._clock() - self._progress_at
            if stall_in <= 0:
                await self._abort()
                raise ClientGone(f"took nothing for {self._stall_timeout_seconds:g} s")
            try:
                async with asyncio.timeout(stall_in):
                    message = await self._receive()
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                if self._complete:
                    return  # ASGI has the same word for both.
                raise ClientGone("left")

    async def _abort(self) -> None:
        """Closes the connection without waiting for its buffer, which such a reader would never empty."""
        extension = (self.scope.get("extensions") or {}).get(ABORT_EXTENSION)
        if extension is not None:
            extension["abort"]()
            while (await self._receive())["type"] != "http.disconnect":
                pass

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
    """uvicorn's HTTP/1.1 with one ASGI extension: `gridmill.abort` closes the connection at once.

    ASGI has no such thing, and closing politely waits for a buffer that a stalled reader never empties.
    Give it to uvicorn as `Config(http=HttpProtocol)`.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(CorkedTransport(transport, asyncio.get_running_loop()))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}
