"""The pump over real loopback sockets: uvicorn on one side, aiohttp on the other."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket as socket_module
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gridmill.wire.identity import Identity
from gridmill.wire.link import Arrived, Closed, Event, Link, NetworkSide, NodeSide, Opened, Proven, Reason, State
from gridmill.wire.messages import (
    Accept,
    Chunk,
    Emission,
    End,
    Fetch,
    Generate,
    Heartbeat,
    Offer,
    Step,
)
from gridmill.wire.sampling import Sampling
from gridmill.wire.transport import (
    Conversation,
    DialError,
    dial,
    is_loopback,
    keep_dialled,
    link_address,
    serve_asgi_websocket,
)

NETWORK_KEY = Identity(bytes(range(32)))
NODE_KEY = Identity(bytes(range(32, 64)))
Handler = Callable[[Conversation, Event], None]


def node_side(**changes: Any) -> NodeSide:
    return NodeSide(NODE_KEY, "", "test node", **changes)


def work(max_tokens: int = 100_000) -> Generate:
    return Generate("work-1", "c" * 64, b"\1\0\0\0", Sampling(bytes(32), max_tokens))


def admit_all(conversation: Conversation, event: Event) -> None:
    if isinstance(event, Proven):
        conversation.admit()


class Network:
    """A uvicorn server whose only path is the link. It keeps every conversation and event it has seen."""

    def __init__(self, on_event: Handler = admit_all, heartbeat_seconds: float = 5.0) -> None:
        self.on_event = on_event
        self.conversations: list[Conversation] = []
        self.events: list[Event] = []
        self.side = NetworkSide(NETWORK_KEY, lambda host: True, "test network", heartbeat_seconds)
        self.port = 0

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket" and scope["path"].endswith("/link"), scope["path"]
        await serve_asgi_websocket(scope, receive, send, self.make_link, self.talk)

    def make_link(self) -> Link:
        return Link(self.side, entropy=os.urandom, now=time.monotonic())

    async def talk(self, conversation: Conversation) -> None:
        self.conversations.append(conversation)

        def on_event(event: Event) -> None:
            self.events.append(event)
            self.on_event(conversation, event)

        await conversation.run(on_event)

    @asynccontextmanager
    async def serving(self, **options: Any) -> AsyncIterator[int]:
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=self.port,
            lifespan="off",
            log_config=None,
            interface="asgi3",
            ws="websockets-sansio",
            ws_per_message_deflate=False,
            **options,
        )
        server = uvicorn.Server(config)
        listener = socket_module.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.005)
            try:
                yield self.port
            finally:
                for conversation in self.conversations:
                    conversation.close(Reason.STOPPING)
                server.should_exit = True
                await serving


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def talking(url: str, on_event: Handler = lambda conversation, event: None, **options: Any) -> AsyncIterator[Any]:
    """A dialled conversation that runs in the background, with the list of its events."""
    side = options.pop("side", None) or node_side()
    async with dial(url, side, **options) as conversation, asyncio.TaskGroup() as group:
        events: list[Event] = []

        def note(event: Event) -> None:
            events.append(event)
            on_event(conversation, event)

        running = group.create_task(conversation.run(note))
        yield conversation, events
        conversation.close(Reason.STOPPING)
        await running


def test_a_work_travels_both_ways_over_a_real_socket() -> None:
    async def body() -> None:
        def node(conversation: Conversation, event: Event) -> None:
            if isinstance(event, Arrived) and isinstance(event.message, Offer):
                conversation.send(Accept(event.message.stream))
                for position in range(100):
                    conversation.send(Step((Emission(1, position, (position,)),)))
                conversation.send(Step((), (End(1, "stop", 100),)))

        network = Network()
        async with network.serving() as port, talking(f"http://127.0.0.1:{port}/v1", node) as (conversation, events):
            await until(lambda: network.conversations and network.conversations[0].link.opened)
            network.conversations[0].send(Offer(1, work(), 1000))
            await until(lambda: any(_ends(event) for event in network.events))
            steps = [e.message for e in network.events if isinstance(e, Arrived) and isinstance(e.message, Step)]
            assert [i for step in steps for emission in step.emissions for i in emission.ids] == list(range(100))
        assert isinstance(events[0], Opened) and isinstance(events[-1], Closed)
        assert isinstance(network.events[-1], Closed) and network.events[-1].reason is Reason.STOPPING

    asyncio.run(body())


def _ends(event: Event) -> bool:
    return isinstance(event, Arrived) and isinstance(event.message, Step) and bool(event.message.ends)
