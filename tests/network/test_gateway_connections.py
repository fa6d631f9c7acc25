"""What the gateway adds to uvicorn's connections, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from websockets.client import ClientProtocol
from websockets.uri import parse_uri

from gridmill.network.gateway.asgi import HttpProtocol, WebSocketProtocol


class Recorder:
    """An ASGI application that notes what a WebSocket says, to its end."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.over = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            self.heard.append(message.get("bytes") or message.get("text"))
        self.over.set()


@contextlib.asynccontextmanager
async def serving(application: Any) -> AsyncIterator[int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    config = uvicorn.Config(
        application, http=HttpProtocol, ws=WebSocketProtocol, lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, 10)
        listener.close()


def test_messages_of_one_read_arrive_together_and_before_what_ends_them() -> None:
    async def body() -> None:
        recorder = Recorder()
        async with serving(recorder) as port, asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            client = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/"))
            client.send_request(client.connect())
            writer.write(b"".join(client.data_to_send()))
            client.receive_data(await reader.readuntil(b"\r\n\r\n"))
            for piece in (b"one ", b"two ", b"three"):
                client.send_binary(piece)
            client.send_text(b"a text")
            client.send_binary(b"last ", fin=False)
            client.send_continuation(b"words", fin=True)
            client.send_close(1000)
            writer.write(b"".join(client.data_to_send()))
            await recorder.over.wait()
            writer.close()
        assert recorder.heard == [b"one two three", "a text", b"last words"]

    asyncio.run(body())
