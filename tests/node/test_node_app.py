"""The node program on real sockets: it joins, serves, redials, leaves, and says why when it cannot."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gridmill.node.app import run_node
from gridmill.node.settings import load_node_settings
from gridmill.wire.identity import Identity, owner_id_of
from gridmill.wire.link import Arrived, Closed, Event, Link, NetworkSide, Proven, Reason
from gridmill.wire.messages import Accept, Credit, Drain, Generate, Listed, Listing, Offer, Offers, Step
from gridmill.wire.sampling import Sampling, pack_ids
from gridmill.wire.transport import WEBSOCKET_MESSAGE_BYTES_MAX, Conversation, serve_asgi_websocket


class Network:
    """The other end: lets everybody in (or nobody), and remembers what it heard."""

    def __init__(self, identity: Identity | None = None, admit: bool = True) -> None:
        self.identity = identity or Identity(secrets.token_bytes(32))
        self.admit = admit
        self.heard: list[Any] = []
        self.closed: list[Closed] = []
        self.proven: list[Proven] = []
        self.conversations: list[Conversation] = []
        self.port = 0
        self._news = asyncio.Event()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        side = NetworkSide(self.identity, lambda host: True, "test", heartbeat_seconds=1.0)

        def make_link() -> Link:
            return Link(side, entropy=secrets.token_bytes, now=time.monotonic())

        await serve_asgi_websocket(scope, receive, send, make_link, self.converse)

    async def converse(self, conversation: Conversation) -> None:
        self.conversations.append(conversation)

        def on_event(event: Event) -> None:
            if isinstance(event, Proven):
                self.proven.append(event)
                if self.admit:
                    conversation.admit()
                else:
                    conversation.refuse(Reason.JOIN_REFUSED, "not you")
            elif isinstance(event, Arrived):
                self.heard.append(event.message)
                if isinstance(event.message, Offers):
                    listings = [Listing(o.name, o.model_class.class_id, True) for o in event.message.offers]
                    conversation.send(Listed(tuple(listings)))
            elif isinstance(event, Closed):
                self.closed.append(event)
            self._news.set()

        await conversation.run(on_event)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[Network]:
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=port,
            log_level="error",
            lifespan="off",
            interface="asgi3",
            ws="websockets-sansio",
            ws_max_size=WEBSOCKET_MESSAGE_BYTES_MAX,
            ws_ping_interval=None,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        server.capture_signals = _no_signals  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self.port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            for conversation in self.conversations:
                conversation.close(Reason.STOPPING)
            server.should_exit = True
            await task


@contextmanager
def _no_signals() -> Iterator[None]:
    yield


def tokenizer_folder(data: Path) -> Path:
    """All that echo needs of a model."""
    folder = data / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"t{number}": number for number in range(100)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


class Node:
    """`run_node` as a task."""

    def __init__(self, data: Path, url: str, **flags: Any) -> None:
        model = str(tokenizer_folder(data))
        flags = {"engine": "echo", "model": model, "name": "any/name", "data": str(data), "network": url} | flags
        self.settings = load_node_settings(flags, {}, ())
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(run_node(self.settings, ready=self.ready.set_result, stop=self.stop))

    async def stopped(self) -> int:
        self.stop.set()
        return await self.code()

    async def code(self) -> int:
        return await asyncio.wait_for(self.task, 30)


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def work_for(offers: Offers, max_tokens: int) -> Generate:
    class_id = offers.offers[0].model_class.class_id
    return Generate("w1", class_id, pack_ids([5, 6]), Sampling(seed=bytes(32), max_tokens=max_tokens))


def test_a_node_joins_serves_and_leaves_politely(tmp_path: Path) -> None:
    async def body() -> None:
        async with Network().listening() as network:
            node = Node(tmp_path, f"http://127.0.0.1:{network.port}/v1")
            ready = await asyncio.wait_for(node.ready, 30)
            await network.until(lambda: network.of(Offers))
            (offers,) = network.of(Offers)
            node_id = network.proven[0].node_id
            base_url = f"http://127.0.0.1:{network.port}/v1"
            assert ready == {"base_url": base_url, "model": "any/name", "node_id": node_id}
            assert (offers.offers[0].name, offers.offers[0].slots, offers.offers[0].engine) == ("any/name", 64, "echo")
            network.conversations[0].send(Offer(1, work_for(offers, 20), 5))
            await network.until(lambda: network.of(Step))
            node.stop.set()
            await network.until(lambda: network.of(Drain))
            assert network.of(Accept) and not node.task.done()
            network.conversations[0].send(Credit(((1, 100),)))
            assert await node.code() == 0
            await network.until(lambda: network.closed)
            assert network.closed[0].reason is Reason.DRAINED and network.closed[0].by_peer
            ids = [i for step in network.of(Step) for emission in step.emissions for i in emission.ids]
            assert len(ids) == 20 and [end.kind for step in network.of(Step) for end in step.ends] == ["length"]

    run(body)


def test_a_node_comes_back_when_its_network_does(tmp_path: Path) -> None:
    async def body() -> None:
        identity = Identity(secrets.token_bytes(32))
        async with Network(identity).listening() as first:
            port = first.port
            node = Node(tmp_path, f"127.0.0.1:{port}")
            await asyncio.wait_for(node.ready, 30)
        async with Network(identity).listening(port) as second:
            await second.until(lambda: second.of(Offers))
            assert second.proven[0].node_id == first.proven[0].node_id
            assert await node.stopped() == 0

    run(body)


def test_a_node_waits_for_a_network_that_is_not_there_yet_and_can_be_stopped_meanwhile(tmp_path: Path) -> None:
    async def body() -> None:
        node = Node(tmp_path, "http://127.0.0.1:1")
        await asyncio.sleep(0.2)
        assert not node.task.done()
        assert await node.stopped() == 0

    run(body)


def test_another_key_at_the_same_address_is_refused_with_a_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with Network().listening() as first:
            port = first.port
            node = Node(tmp_path, f"http://127.0.0.1:{port}")
            await asyncio.wait_for(node.ready, 30)
            assert await node.stopped() == 0
        pinned = json.loads((tmp_path / "networks.json").read_text())
        assert pinned == {f"ws://127.0.0.1:{port}/link": first.identity.public.hex()}
        async with Network().listening(port) as second:
            assert await Node(tmp_path, f"http://127.0.0.1:{port}").code() == 3
            assert "networks.json" in caplog.text and "--network-key" in caplog.text
            key = second.identity.public.hex()
            node = Node(tmp_path, f"http://127.0.0.1:{port}", network_key=key)
            await asyncio.wait_for(node.ready, 30)
            assert await node.stopped() == 0

    run(body)


def test_a_network_that_does_not_take_the_node_ends_it_with_the_networks_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with Network(admit=False).listening() as network:
            node = Node(tmp_path, f"http://127.0.0.1:{network.port}", join_token="gm-token")
            assert await node.code() == 3
            assert network.proven[0].join_token == "gm-token"
            assert "does not take this node" in caplog.text and "not you" in caplog.text
            assert "gm-token" not in caplog.text

    run(body)


def test_an_owners_key_certifies_the_node(tmp_path: Path) -> None:
    async def body() -> None:
        owner = Identity.load_or_create(tmp_path / "owner.key")
        async with Network().listening() as network:
            node = Node(tmp_path / "node", f"http://127.0.0.1:{network.port}", owner=str(tmp_path / "owner.key"))
            await asyncio.wait_for(node.ready, 30)
            assert network.proven[0].owner_id == owner_id_of(owner.public)
            assert await node.stopped() == 0

    run(body)


def test_two_nodes_cannot_share_a_data_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        first = Node(tmp_path, "http://127.0.0.1:1")
        await asyncio.sleep(0.05)
        assert await Node(tmp_path, "http://127.0.0.1:1").code() == 2
        assert f"another node (process {os.getpid()}) runs on {tmp_path}" in caplog.text
        assert await first.stopped() == 0
        again = Node(tmp_path, "http://127.0.0.1:1")
        await asyncio.sleep(0.05)
        assert await again.stopped() == 0

    run(body)


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        ({"network": "http://mill.example"}, 2, "without TLS others can read prompts"),
        ({"network": "ftp://127.0.0.1"}, 2, "is no network address"),
        ({"engine": "native", "device": "cpu", "model": "./absent"}, 4, "the folder ./absent does not exist"),
        ({"engine": "native", "device": "cuda:99", "model": "gridmill/demo"}, 4, "--device cuda:99 is not here"),
        ({"model": "./absent"}, 4, "the folder ./absent does not exist"),
    ],
)
def test_what_can_never_work_ends_at_once_with_one_sentence_and_a_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: dict[str, Any], code: int, sentence: str
) -> None:
    async def body() -> None:
        with caplog.at_level(logging.ERROR):
            assert await Node(tmp_path, "http://127.0.0.1:1", **flags).code() == code
        (record,) = [record for record in caplog.records if record.name == "gridmill.node"]
        assert sentence in record.getMessage()

    run(body)


def test_a_damaged_file_of_pinned_keys_is_not_taken_for_an_empty_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "networks.json").write_text('{"ws://127.0.0.1:1/link": "zz"}')

    async def body() -> None:
        assert await Node(tmp_path, "http://127.0.0.1:1").code() == 2
        assert "repair or remove it" in caplog.text

    run(body)


def test_cancelling_the_program_leaves_no_task_behind(tmp_path: Path) -> None:
    async def body() -> None:
        async with Network().listening() as network:
            before = asyncio.all_tasks()
            node = Node(tmp_path, f"http://127.0.0.1:{network.port}")
            await asyncio.wait_for(node.ready, 30)
            await network.until(lambda: network.of(Offers))
            network.conversations[0].send(Offer(1, work_for(network.of(Offers)[0], 1000), 5))
            await network.until(lambda: network.of(Step))
            node.task.cancel()
            await asyncio.wait([node.task])
            assert node.task.cancelled()
            await network.until(lambda: network.closed)
            names = {task.get_name() for task in asyncio.all_tasks() - before}
            assert not [name for name in names if name.startswith(("work", "link", "leave"))]

    run(body)


def test_the_demo_is_served_natively_in_exact_mode(tmp_path: Path) -> None:
    async def body() -> None:
        async with Network().listening() as network:
            node = Node(
                tmp_path,
                f"http://127.0.0.1:{network.port}",
                engine="native",
                model="gridmill/demo",
                name=None,
                device="cpu",
                threads=1,
                kv_memory="64MiB",
            )
            assert (await asyncio.wait_for(node.ready, 120))["model"] == "gridmill/demo"
            await network.until(lambda: network.of(Offers))
            (offer,) = network.of(Offers)[0].offers
            assert (offer.engine, offer.model_class.arithmetic) == ("native", "float32-exact")
            assert offer.decode_tokens_per_second > 0 and offer.prefill_tokens_per_second > 0
            network.conversations[0].send(Offer(1, work_for(network.of(Offers)[0], 8), 100))
            await network.until(lambda: [end for step in network.of(Step) for end in step.ends])
            assert network.of(Step)[-1].ends[0].kind in ("stop", "length")
            assert await node.stopped() == 0

    run(body)


def test_what_the_twin_showed_is_remembered_with_its_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    folder = tokenizer_folder(tmp_path)
    LlamaForCausalLM(config).save_pretrained(folder)

    async def body() -> None:
        async with Network().listening() as network:
            for tests in (1, 1):
                node = Node(
                    tmp_path,
                    f"http://127.0.0.1:{network.port}",
                    engine="native",
                    device="cpu",
                    threads=1,
                    kv_memory="16MiB",
                )
                await asyncio.wait_for(node.ready, 120)
                assert await node.stopped() == 0
                assert caplog.text.count("testing a tiny twin") == tests
        (kept,) = json.loads((tmp_path / "admission.json").read_text()).values()
        assert kept["faithful"] and kept["batches"]

    with caplog.at_level(logging.INFO, logger="gridmill.node"):
        run(body)


@pytest.mark.parametrize("how", ["stdin", "signal"])
def test_the_program_prints_one_json_line_and_ends_with_its_parent_or_a_signal(tmp_path: Path, how: str) -> None:
    async def body() -> None:
        async with Network().listening() as network:
            command = [sys.executable, "-m", "gridmill", "node", "--network", f"http://127.0.0.1:{network.port}"]
            command += [
                "--engine",
                "echo",
                "--model",
                str(tokenizer_folder(tmp_path)),
                "--json",
                "--data",
                str(tmp_path),
            ]
            process = await asyncio.create_subprocess_exec(
                *command,
                *(["--exit-with-parent"] if how == "stdin" else []),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert process.stdout is not None and process.stdin is not None
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            assert json.loads(line)["model"] == "tiny"
            if how == "stdin":
                process.stdin.close()
            else:
                process.send_signal(signal.SIGTERM)
            rest, errors = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 0, errors.decode()
            assert rest == b""
            await network.until(lambda: network.closed)
            assert network.closed[0].reason is Reason.DRAINED

    run(body)


def test_where_exact_mode_does_not_hold_the_demo_is_served_as_another_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gridmill.node.engines.native.runner import Runner

    never = property(lambda runner: False, lambda runner, found: None)
    monkeypatch.setattr(Runner, "exact_holds", never, raising=False)

    async def body() -> None:
        async with Network().listening() as network:
            node = Node(tmp_path, f"http://127.0.0.1:{network.port}", engine="native", model="gridmill/demo")
            await asyncio.wait_for(node.ready, 120)
            (offer,) = network.of(Offers)[0].offers
            assert offer.model_class.arithmetic == "float32"
            assert await node.stopped() == 0

    run(body)
    assert "exact mode does not hold" in caplog.text
