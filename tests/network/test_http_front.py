"""What a stranger can make the HTTP front keep, over real sockets; and upgrades that are none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from gridmill.network.gateway import asgi
from gridmill.network.gateway.asgi import HEAD_BYTES_MAX, PIPELINED_REQUESTS_MAX, HttpProtocol, WebSocketProtocol

PATIENCE_SECONDS = 10  # for what would otherwise hang
NEVER = 3600.0
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Echo:
    """Answers with the body it got; `/refuse` answers before any body, `/wait` not before `go`."""

    def __init__(self) -> None:
        self.heads: list[dict[bytes, bytes]] = []
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        self.heads.append(dict(scope["headers"]))
        if scope["path"] == "/refuse":
            await asgi.send_bytes(send, 401, b"no", b"text/plain")
            return
        if scope["path"] == "/wait":
            await self.go.wait()
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await asgi.send_bytes(send, 200, body, b"text/plain")


@contextlib.asynccontextmanager
async def front(
    *, head_timeout: float = NEVER, leftover_timeout: float = NEVER, keep_alive: int = 3600
) -> AsyncIterator[tuple[Echo, int]]:
    class Protocol(HttpProtocol):
        head_timeout_seconds = head_timeout
        leftover_timeout_seconds = leftover_timeout

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    echo = Echo()
    config = uvicorn.Config(
        echo,
        http=Protocol,
        ws=WebSocketProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield echo, listener.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, PATIENCE_SECONDS)
        listener.close()


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def write_until_closed(writer: asyncio.StreamWriter, piece: bytes, bytes_max: int = 1 << 30) -> int:
    """How much was taken before the far end closed."""
    written = 0
    with contextlib.suppress(ConnectionError):
        while written < bytes_max:
            writer.write(piece)
            await writer.drain()
            written += len(piece)
            await asyncio.sleep(0)
    return written


@pytest.mark.parametrize(
    ("start", "more"),
    [
        pytest.param(b"GET /", b"a" * 4096, id="an endless URL"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\nX-A: ", b"a" * 4096, id="an endless header"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\n", b"a:\r\n" * 1024, id="headers without end"),
        pytest.param(b"GET / HTTP/1.1\r\n" + WEBSOCKET + b"X-A: ", b"a" * 4096, id="an endless upgrade"),
        pytest.param(b"\r\n", b"\r\n" * 2048, id="empty lines without end"),
    ],
)
def test_a_head_over_the_limit_is_refused_in_openais_shape_however_it_is_cut(start: bytes, more: bytes) -> None:
    async def body() -> None:
        async with front() as (echo, port):
            for piece in (more, more * 64):
                async with connection(port) as (reader, writer):
                    writer.write(start)
                    for _ in range(HEAD_BYTES_MAX // len(piece) + 1):
                        writer.write(piece)
                        await asyncio.sleep(0)
                    status, said = await answer(reader)
                    assert (status, json.loads(said)["error"]["code"]) == (431, "head_too_large")
                    assert await reader.read() == b"", "the connection is over"
            assert echo.heads == []

    asyncio.run(body())


def test_a_large_head_below_the_limit_and_a_body_above_it_are_served() -> None:
    async def body() -> None:
        async with front() as (echo, port), connection(port) as (reader, writer):
            data = b"b" * (5 * HEAD_BYTES_MAX)
            for _ in range(2):  # the second head follows a body at once
                filler = b"a" * (HEAD_BYTES_MAX - 200)
                writer.write(b"POST / HTTP/1.1\r\nX-A: %s\r\nContent-Length: %d\r\n\r\n%s" % (filler, len(data), data))
            for _ in range(2):
                assert await answer(reader) == (200, data)
            assert [len(head[b"x-a"]) for head in echo.heads] == [HEAD_BYTES_MAX - 200] * 2

    asyncio.run(body())


@pytest.mark.parametrize("start", [b"1;", b"1\r\n{\r\n0\r\nX-A: "], ids=["chunk extension", "trailer"])
def test_chunk_extensions_and_trailers_without_end_close_the_connection(start: bytes) -> None:
    async def body() -> None:
        async with front() as (_, port), connection(port) as (_, writer):
            writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + start)
            assert await write_until_closed(writer, b"a" * 65536) < 1 << 25

    asyncio.run(body())


def test_trailers_do_not_become_headers() -> None:
    async def body() -> None:
        async with front() as (echo, port), connection(port) as (reader, writer):
            writer.write(b"POST /wait HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Late: 1\r\n\r\n")
            echo.go.set()
            assert await answer(reader) == (200, b"{")
            assert b"x-late" not in echo.heads[0]

    asyncio.run(body())


def test_a_head_that_does_not_end_is_told_so_and_a_silent_connection_is_closed() -> None:
    async def body() -> None:
        async with front(head_timeout=0.2) as (_, port):
            async with connection(port) as (reader, _):
                assert await reader.read() == b""
            for before in (b"", b"GET / HTTP/1.1\r\n\r\n"):
                async with connection(port) as (reader, writer):
                    if before:
                        writer.write(before)
                        assert (await answer(reader))[0] == 200
                    dripping = asyncio.create_task(_drip(writer, b"POST / HTTP/1.1\r\n", b"a: b\r\n"))
                    status, said = await answer(reader)
                    assert (status, json.loads(said)["error"]["code"]) == (408, "head_timeout")
                    assert await reader.read() == b""
                    dripping.cancel()

    asyncio.run(body())


def test_a_head_that_was_complete_in_time_does_not_limit_what_follows() -> None:
    async def body() -> None:
        async with front(head_timeout=0.5) as (echo, port), connection(port) as (reader, writer):
            writer.write(b"POST /wait HTTP/1.1\r\nContent-Length: 2\r\n\r\n1")
            await asyncio.sleep(0.7)
            writer.write(b"2GET / HT")  # a next head, begun while the answer is being made
            await asyncio.sleep(0.7)
            echo.go.set()
            assert await answer(reader) == (200, b"12")
            writer.write(b"TP/1.1\r\n\r\n")
            assert await answer(reader) == (200, b"")

    asyncio.run(body())


async def _drip(writer: asyncio.StreamWriter, head: bytes, piece: bytes) -> None:
    writer.write(head)
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)


def test_what_follows_an_early_answer_is_taken_for_a_while_only() -> None:
    async def body() -> None:
        head = b"POST /refuse HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n"
        async with front(leftover_timeout=0.2) as (_, port), connection(port) as (reader, writer):
            dripping = asyncio.create_task(_drip(writer, head, b"x"))
            assert await answer(reader) == (401, b"no")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            dripping.cancel()

    asyncio.run(body())


def test_what_follows_an_early_answer_is_taken_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "LEFTOVER_BYTES_MAX", 1 << 20)

    async def body() -> None:
        async with front() as (_, port), connection(port) as (reader, writer):
            writer.write(b"POST /refuse HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n")
            assert await answer(reader) == (401, b"no")
            assert await write_until_closed(writer, b"x" * 65536) < 1 << 25

    asyncio.run(body())


def test_a_connection_whose_early_refused_body_came_whole_serves_on_and_then_idles_out() -> None:
    async def body() -> None:
        async with front(leftover_timeout=0.3, keep_alive=1) as (_, port), connection(port) as (reader, writer):
            writer.write(b"POST /refuse HTTP/1.1\r\nContent-Length: 4\r\n\r\n12")
            assert await answer(reader) == (401, b"no")
            writer.write(b"34")
            await asyncio.sleep(0.5)
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi")
            assert await answer(reader) == (200, b"hi")
            writer.write(b"POST /refuse HTTP/1.1\r\nContent-Length: 4\r\n\r\n12")
            assert await answer(reader) == (401, b"no")
            writer.write(b"34")
            assert await reader.read() == b"", "nothing closed a connection that fell idle with the end of a body"

    asyncio.run(body())


def test_requests_sent_ahead_are_answered_in_order_and_too_many_end_the_connection() -> None:
    async def body() -> None:
        async with front() as (echo, port):
            async with connection(port) as (reader, writer):
                for number in range(PIPELINED_REQUESTS_MAX + 1):
                    writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n%02d" % number)
                for number in range(PIPELINED_REQUESTS_MAX + 1):
                    assert await answer(reader) == (200, b"%02d" % number)
            async with connection(port) as (reader, writer):
                before = len(echo.heads)
                writer.write(b"GET /wait HTTP/1.1\r\n\r\n" * 2000)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                assert len(echo.heads) <= before + 1

    asyncio.run(body())


def test_nothing_more_is_read_from_a_caller_that_does_not_take_its_answers() -> None:
    async def body() -> None:
        async with front() as (echo, port), connection(port) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            data = b"x" * (1 << 20)
            request = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(data) + data

            async def send() -> None:
                for _ in range(100):
                    writer.write(request)
                    await writer.drain()

            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await send()
            assert 0 < len(echo.heads) < 50

    asyncio.run(body())


@pytest.mark.parametrize("method", [b"POST", b"PUT"])
@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", id="h2c"),
        pytest.param(WEBSOCKET, id="websocket"),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_an_upgrade_that_does_not_happen_leaves_the_request_its_body(method: bytes, offer: bytes, cut: int) -> None:
    async def body() -> None:
        async with front() as (echo, port), connection(port) as (reader, writer):
            for number in range(2):
                head = method + b" /?%d HTTP/1.1\r\nX-Own: 1\r\n" % number + offer + b"Content-Length: 5\r\n\r\n"
                writer.write(head + b"hello"[:cut])
                await asyncio.sleep(0.05)
                writer.write(b"hello"[cut:])
                assert await answer(reader) == (200, b"hello")
            writer.write(
                method + b" / HTTP/1.1\r\n" + offer + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
            )
            assert await answer(reader) == (200, b"hi")
            assert echo.heads[0][b"x-own"] == b"1"

    asyncio.run(body())


def test_a_get_offers_a_websocket_still_and_connect_is_refused() -> None:
    async def body() -> None:
        async with front() as (_, port):
            async with connection(port) as (reader, writer):
                writer.write(b"GET /link HTTP/1.1\r\nHost: x\r\n" + WEBSOCKET + b"\r\n")
                assert (await reader.readline()).startswith(b"HTTP/1.1 403")
            async with connection(port) as (reader, writer):
                writer.write(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await answer(reader))[0] == 405
            async with connection(port) as (reader, writer):
                writer.write(b"nonsense\r\n\r\n")
                status, said = await answer(reader)
                assert (status, json.loads(said)["error"]["code"]) == (400, "invalid_http")

    asyncio.run(body())
