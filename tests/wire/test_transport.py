"""The pump over real loopback sockets: uvicorn on one side, aiohttp on the other."""

from __future__ import annotations

import asyncio
import logging
import os
import socket as socket_module
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gridmill.wire.identity import Identity
from gridmill.wire.link import Arrived, Closed, Event, Link, NetworkSide, NodeSide, Opened, Proven, Reason
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
        async with network.serving() as port, talking(f"http://127.0.0.1:{port}/v1", node) as (_, events):
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


def test_a_file_larger_than_any_queue_is_paced_by_the_reader_and_arrives_whole() -> None:
    content = os.urandom(1 << 20) * 8
    gate = asyncio.Event()

    class SlowNetwork(Network):
        async def app(self, scope: Any, receive: Any, send: Any) -> None:
            async def gated() -> Any:
                if self.conversations and self.conversations[0].link.opened:
                    await gate.wait()
                return await receive()

            await serve_asgi_websocket(scope, gated, send, self.make_link, self.talk)

    async def body() -> None:
        queued_most = 0

        async def hand_out(conversation: Conversation) -> None:
            nonlocal queued_most
            for offset in range(0, len(content), 65536):
                await conversation.bulk_below(256 << 10)
                conversation.send(Chunk(1, offset, len(content), content[offset : offset + 65536]))
                queued_most = max(queued_most, conversation.link.queued_bytes)

        network = SlowNetwork()
        async with network.serving() as port, talking(f"ws://127.0.0.1:{port}") as (conversation, events):
            await until(lambda: network.conversations and network.conversations[0].link.opened)
            network.conversations[0].send(Fetch(1, "c" * 64))
            await until(lambda: len(events) >= 2)
            async with asyncio.TaskGroup() as group:
                handing = group.create_task(hand_out(conversation))
                # Eight MiB do not fit into the buffers between two processes: it must come to a stand.
                last, still = -1, 0
                async with asyncio.timeout(30):
                    while still < 20:
                        await asyncio.sleep(0.01)
                        still = still + 1 if conversation.link.queued_bytes == last else 0
                        last = conversation.link.queued_bytes
                assert not handing.done()
                gate.set()
            await until(lambda: _received(network) == len(content))
        assert queued_most <= (256 << 10) + 70_000
        chunks = [e.message for e in network.events if isinstance(e, Arrived) and isinstance(e.message, Chunk)]
        assert b"".join(chunk.data for chunk in chunks) == content

    asyncio.run(body())


def _received(network: Network) -> int:
    return sum(len(e.message.data) for e in network.events if isinstance(e, Arrived) and isinstance(e.message, Chunk))


def test_a_sender_of_files_is_released_when_the_link_closes() -> None:
    async def body() -> None:
        network = Network()
        async with network.serving() as port, talking(f"ws://127.0.0.1:{port}") as (conversation, _):
            await until(lambda: conversation.link.opened)
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(conversation.bulk_below(0))
                await asyncio.sleep(0)
                assert not waiting.done()
                conversation.close(Reason.STOPPING)

    asyncio.run(body())


def test_heartbeats_run_by_themselves() -> None:
    async def body() -> None:
        network = Network(heartbeat_seconds=0.05)
        async with network.serving() as port, talking(f"ws://127.0.0.1:{port}") as (conversation, events):
            await until(lambda: sum(isinstance(e, Arrived) for e in events) >= 5)
            assert all(isinstance(e.message, Heartbeat) for e in events if isinstance(e, Arrived))
            assert network.conversations[0].link.round_trip_seconds is not None
            assert conversation.link.closed is None

    asyncio.run(body())


def test_a_refused_node_learns_why_and_is_not_dialled_again(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(conversation: Conversation, event: Event) -> None:
        if isinstance(event, Proven):
            conversation.refuse(Reason.JOIN_REFUSED, "the join token is unknown")

    async def body() -> Closed:
        network = Network(refuse)
        async with network.serving() as port:
            return await keep_dialled(f"http://127.0.0.1:{port}", node_side(), lambda c: c.run(lambda event: None))

    with caplog.at_level(logging.INFO, "gridmill.link"):
        closed = asyncio.run(body())
    assert closed == Closed(Reason.JOIN_REFUSED, "the join token is unknown", by_peer=True, permanent=True)
    lines = [record.message for record in caplog.records if record.name == "gridmill.link"]
    assert len(lines) == 2, "one line on each side"
    assert any("join_refused by the other side" in line and "not dialling again" in line for line in lines)
    assert any("a node at 127.0.0.1" in line and "join_refused by this side" in line for line in lines)


def test_a_node_dials_again_after_the_network_restarts_and_pins_its_key(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        network = Network()
        opened: list[Opened] = []
        draws: list[float] = []

        def random() -> float:
            draws.append(0.01)
            return 0.01

        async def talk(conversation: Conversation) -> Closed:
            return await conversation.run(lambda event: opened.append(event) if isinstance(event, Opened) else None)

        async def keep() -> Closed:
            return await keep_dialled(f"http://127.0.0.1:{network.port}", node_side(), talk, random=random)

        async with asyncio.TaskGroup() as group:
            async with network.serving():
                keeping = group.create_task(keep())
                await until(lambda: len(opened) == 1)
            before = len(opened)  # it may have come back while the server was on its way out
            await until(lambda: len(draws) >= 5)  # nobody listens meanwhile
            async with network.serving():
                await until(lambda: len(opened) > before)
            # A network with another key takes the port: the node stops rather than join a stranger.
            network.side = NetworkSide(NODE_KEY, lambda host: True, "stranger", 5.0)
            async with network.serving():
                closed = await asyncio.wait_for(keeping, 10)
            assert closed.reason is Reason.WRONG_NETWORK_KEY
            assert {event.network_key for event in opened} == {NETWORK_KEY.public}

    with caplog.at_level(logging.INFO, "gridmill.link"):
        asyncio.run(body())
    lines = [record.message for record in caplog.records if "dialling again" in record.message]
    assert sum("cannot reach" in line for line in lines) <= 2, "one line per change, not one per attempt"


def test_a_program_that_stops_says_so() -> None:
    async def body() -> None:
        network = Network()
        async with network.serving() as port, dial(f"ws://127.0.0.1:{port}", node_side()) as conversation:
            events: list[Event] = []
            running = asyncio.create_task(conversation.run(events.append))
            await until(lambda: conversation.link.opened)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await until(lambda: isinstance(network.events[-1], Closed))
            assert network.events[-1] == Closed(Reason.STOPPING, "", by_peer=True, permanent=False)
            assert isinstance(events[-1], Closed) and not events[-1].by_peer

    asyncio.run(body())


def test_what_the_program_raises_ends_the_conversation_and_comes_out() -> None:
    class Bug(Exception):
        pass

    def fail(event: Event) -> None:
        if isinstance(event, Opened):
            raise Bug

    async def body() -> None:
        network = Network()
        async with network.serving() as port, dial(f"ws://127.0.0.1:{port}", node_side()) as conversation:
            with pytest.raises(ExceptionGroup) as caught:
                await conversation.run(fail)
            assert caught.group_contains(Bug)
            await until(lambda: isinstance(network.events[-1], Closed))

    asyncio.run(body())


def test_a_connection_that_breaks_is_a_cut_on_both_sides() -> None:
    async def body() -> None:
        network = Network()
        async with network.serving() as port, dial(f"ws://127.0.0.1:{port}", node_side()) as conversation:
            running = asyncio.create_task(conversation.run(lambda event: None))
            await until(lambda: conversation.link.opened)
            websocket = conversation._socket._websocket  # type: ignore[attr-defined]
            websocket._response.connection.transport.abort()
            closed = await running
            assert closed.reason is Reason.CUT
            await until(lambda: isinstance(network.events[-1], Closed))
            assert isinstance(network.events[-1], Closed) and network.events[-1].reason is Reason.CUT

    asyncio.run(body())


def test_no_task_outlives_a_conversation() -> None:
    async def body() -> None:
        network = Network()
        async with network.serving() as port:
            before = len(asyncio.all_tasks())
            for _ in range(3):
                async with talking(f"ws://127.0.0.1:{port}") as (conversation, _events):
                    await until(lambda conversation=conversation: conversation.link.opened)
            await until(lambda: len(asyncio.all_tasks()) <= before)

    asyncio.run(body())


class PipeSocket:
    """A Socket in memory that counts its sends and can refuse to take any."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.incoming: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.open = asyncio.Event()
        self.open.set()
        self.closed = False

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)
        await self.open.wait()

    async def receive_bytes(self) -> bytes | None:
        return await self.incoming.get()

    async def close(self) -> None:
        self.closed = True


async def _opened_over_pipe() -> tuple[Conversation, PipeSocket, Link]:
    socket = PipeSocket()
    network = Network()
    link = network.make_link()
    node = Conversation(Link(NodeSide(NODE_KEY, "h", "t"), entropy=os.urandom, now=time.monotonic()), socket)

    def answer() -> None:
        while socket.sent:
            for event in link.receive(socket.sent.pop(0), time.monotonic()):
                if isinstance(event, Proven):
                    link.admit(time.monotonic())
        while data := link.take_bytes():
            socket.incoming.put_nowait(data)

    async with asyncio.timeout(5):
        running = asyncio.create_task(node.run(lambda event: None))
        node.running = running  # type: ignore[attr-defined]
        while node.link.opened is None:
            answer()
            await asyncio.sleep(0)
    link.send(Offer(1, work(), 100_000))
    answer()
    while not node.link.open_streams:
        await asyncio.sleep(0)
    return node, socket, link


def test_everything_queued_goes_out_in_one_socket_send() -> None:
    async def body() -> None:
        node, socket, _ = await _opened_over_pipe()
        before = len(socket.sent)
        node.send(Accept(1))
        for position in range(500):
            node.send(Step((Emission(1, position, (position,)),)))
        await until(lambda: not node.link.has_bytes)
        assert len(socket.sent) == before + 1
        node.close(Reason.STOPPING)
        await node.running  # type: ignore[attr-defined]
        assert socket.closed

    asyncio.run(body())


def test_a_socket_that_takes_nothing_cannot_hold_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridmill.wire.transport.FAREWELL_SECONDS_MAX", 0.05)

    async def body() -> None:
        node, socket, _ = await _opened_over_pipe()
        socket.open.clear()
        sent = len(socket.sent)
        node.send(Accept(1))
        for position in range(500):
            node.send(Step((Emission(1, position, (position,)),)))
            await asyncio.sleep(0)
        assert len(socket.sent) == sent + 1 and node.link.queued_bytes > 500
        node.close(Reason.STOPPING)
        async with asyncio.timeout(5):
            closed = await node.running  # type: ignore[attr-defined]
        assert closed.reason is Reason.STOPPING and socket.closed

    asyncio.run(body())


# ---------------------------------------------------------------- addresses and certificates


@pytest.mark.parametrize(
    ("url", "address", "host"),
    [
        ("http://127.0.0.1:8080/v1", "ws://127.0.0.1:8080/link", "127.0.0.1:8080"),
        ("http://localhost:80", "ws://localhost/link", "localhost"),
        ("127.0.0.1:9000", "ws://127.0.0.1:9000/link", "127.0.0.1:9000"),
        ("ws://[::1]:9000/", "ws://[::1]:9000/link", "[::1]:9000"),
        ("https://Grid.Example", "wss://grid.example/link", "grid.example"),
        ("https://grid.example:443/v1/", "wss://grid.example/link", "grid.example"),
        ("wss://grid.example:8443/pool/link", "wss://grid.example:8443/pool/link", "grid.example:8443"),
        ("https://grid.example/pool/v1", "wss://grid.example/pool/link", "grid.example"),
    ],
)
def test_an_address_is_understood_however_it_is_written(url: str, address: str, host: str) -> None:
    assert link_address(url) == (address, host)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://grid.example", "must begin with"),
        ("http://", "names no host"),
        ("https://grid.example:http", "Port could not be cast"),
        ("https://grid.example:70000", "Port out of range"),
        ("https://me:secret@grid.example", "no user"),
        ("https://grid.example/?x=1", "no user, query"),
        ("http://grid.example", "without TLS"),
        ("ws://10.0.0.1:8080", "without TLS"),
        ("http://0.0.0.0:8080", "without TLS"),
        ("http://localhost.evil.example", "without TLS"),
    ],
)
def test_an_address_that_cannot_work_is_refused_before_connecting(url: str, sentence: str) -> None:
    async def body() -> None:
        with pytest.raises(DialError, match=sentence) as caught:
            async with dial(url, node_side()):
                raise AssertionError("connected")
        assert caught.value.permanent

    asyncio.run(body())


def test_plain_text_to_another_machine_needs_a_word() -> None:
    assert link_address("http://10.0.0.1:8080", insecure=True) == ("ws://10.0.0.1:8080/link", "10.0.0.1:8080")
    assert is_loopback("127.8.9.1") and is_loopback("::1") and is_loopback("app.localhost")
    assert not is_loopback("10.0.0.1") and not is_loopback("localhost.example")


def test_what_does_not_answer_like_a_network_is_said_so() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.close"})

    async def body() -> None:
        network = Network()
        network.app = refuse  # type: ignore[method-assign]
        async with network.serving() as port:
            with pytest.raises(DialError, match="answers 403 instead of a link"):
                async with dial(f"http://127.0.0.1:{port}", node_side()):
                    pass
        with pytest.raises(DialError, match="cannot reach") as caught:
            async with dial(f"http://127.0.0.1:{port}", node_side()):
                pass
        assert not caught.value.permanent

    asyncio.run(body())


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority of our own and a certificate for localhost, made by the openssl program."""
    folder = tmp_path_factory.mktemp("certificates")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(folder, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA")
    openssl(folder, "req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl(
        folder,
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "server.pem", "-days", "2", "-extfile", "names"),
    )
    return folder


def test_tls_with_a_ca_of_our_own(certificates: Path) -> None:
    async def body() -> None:
        network = Network()
        tls = {"ssl_keyfile": str(certificates / "server.key"), "ssl_certfile": str(certificates / "server.pem")}
        async with network.serving(**tls) as port:
            url = f"https://localhost:{port}/v1"
            async with talking(url, ca_file=certificates / "ca.pem") as (conversation, _):
                await until(lambda: conversation.link.opened)
                assert conversation.link._hello.host == f"localhost:{port}"
            with pytest.raises(DialError, match="is not trusted") as caught:
                async with dial(url, node_side()):
                    pass
            assert caught.value.permanent
            # The right CA, but the certificate is for another name.
            with pytest.raises(DialError, match="is not trusted"):
                async with dial(f"https://127.0.0.1:{port}", node_side(), ca_file=certificates / "ca.pem"):
                    pass
            with pytest.raises(DialError, match="is not trusted"):
                await keep_dialled(url, node_side(), lambda conversation: conversation.run(lambda event: None))
        with pytest.raises(DialError, match="cannot read the CA file"):
            async with dial(url, node_side(), ca_file=certificates / "absent.pem"):
                pass

    asyncio.run(body())
