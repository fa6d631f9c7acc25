"""The same key gets the same answer, and pays for it once: real gateways over real books, links and scripted nodes.

The node's ids depend on all ids before them, so that an answer continued at a wrong place has another text.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dispatch import CLASS, FACTS, MemorySocket, ScriptedNode

from databases import Database
from gridmill.network import idempotency, ledger
from gridmill.network.accounts import Account, AccountId, Accounts, KeyId
from gridmill.network.admission import Admission
from gridmill.network.books import Books, GatewayId, Unavailable
from gridmill.network.detokenise import ClassText
from gridmill.network.dispatch import Dispatcher
from gridmill.network.gateway.asgi import CONNECTION_EXTENSION
from gridmill.network.gateway.idempotent import SharedAnswers
from gridmill.network.gateway.openai import OpenAIGateway
from gridmill.network.idempotency import Asked, Elsewhere, Idempotency, KeyReused, Mine, hash_of_body, hash_of_key
from gridmill.network.limits import Limits
from gridmill.network.links import Links
from gridmill.network.metering import FeePolicy, PriceRow, most
from gridmill.network.operator import MIGRATIONS
from gridmill.network.registry import Registry
from gridmill.network.store import Store, Transaction
from gridmill.wire.identity import Identity
from gridmill.wire.link import Event, Link, NetworkSide, NodeSide, Opened
from gridmill.wire.messages import Accept, Cancel, ClassOffer, Emission, End, Offer, Offers, Price, Step
from gridmill.wire.sampling import TokenLogprob, unpack_ids
from gridmill.wire.transport import Conversation

PRICE = Price(50, 50, 400)
ROW = PriceRow("p", PRICE, FeePolicy())
SECRET = b"gateway secret of the tests"
IDENTITY = Identity(bytes(range(32)))
CREDIT = 10_000_000
PROMPT = "Hello"
LEASE_SECONDS = 2.0


class Texts:
    """One id a character, and back."""

    async def register(self, class_id: str, path: Path, facts: Any) -> ClassText:
        return ClassText(FACTS, [bytes([i]) if 32 <= i < 127 else None for i in range(FACTS.vocab_size)])

    async def encode(self, class_id: str, text: str) -> list[int]:
        return [ord(character) for character in text]


class Keys:
    """`poor` belongs to an account without credit."""

    def why_not(self, api_key: str) -> str:
        return "unknown"

    def authenticate(self, api_key: str) -> Account | None:
        return Account(AccountId(api_key), KeyId(f"key-{api_key}"), "tests", frozenset({"inference"}))


class PacedNode(ScriptedNode):
    """Makes an id for each that the world allows."""

    def __init__(self, world: World) -> None:
        super().__init__(pace, slots=8)
        self.world = world

    def on_event(self, event: Event) -> None:
        if isinstance(event, Opened):
            self.send(Offers((ClassOffer("demo", CLASS, self.slots, "echo", price=PRICE),)))
            return
        super().on_event(event)

    def cut(self) -> None:
        super().cut()
        self.news.set()

    def cancelled(self, stream: int) -> bool:
        return self.socket.cut or any(cancel.stream == stream for cancel in self.heard_of(Cancel))


async def pace(node: ScriptedNode, offer: Offer) -> None:
    assert isinstance(node, PacedNode)
    world, work = node.world, offer.work
    node.send(Accept(offer.stream))
    ids = unpack_ids(work.delivered)
    first = len(ids)
    kind = "length"
    while len(ids) < work.sampling.max_tokens and kind == "length":
        while not world.permits and not node.cancelled(offer.stream):
            node.news.clear()
            await node.news.wait()
        if node.cancelled(offer.stream):
            kind = "cancelled"
            break  # the last word of a node that is lost reaches nobody
        made: list[int] = []
        for _ in range(min(world.ids_per_step, world.permits, work.sampling.max_tokens - len(ids))):
            made.append(next_id(work.sampling.seed, work.prompt, [*ids, *made]))
        world.permits -= len(made)
        scores = tuple([TokenLogprob(-token_id / 64, ((token_id, -1.0),)) for token_id in made])
        wanted = None if work.sampling.top_logprobs is None else scores
        node.send(Step((Emission(offer.stream, len(ids), tuple(made), wanted),)))
        ids += made
        await asyncio.sleep(0)
    node.send(Step((), (End(offer.stream, kind, len(ids) - first),)))  # type: ignore[arg-type]


def next_id(seed: bytes, prompt: bytes, ids: Sequence[int]) -> int:
    return 65 + hashlib.sha256(seed + prompt + repr(list(ids)).encode()).digest()[0] % 26


class Call:
    """One HTTP exchange, without the sockets."""

    def __init__(self, gateway: Gateway, key: str | None, account: str, body: dict[str, Any]) -> None:
        self.body = json.dumps({"model": "demo", "prompt": PROMPT, **body}).encode()
        headers = [(b"authorization", f"Bearer {account}".encode())]
        if key is not None:
            headers.append((b"idempotency-key", key.encode()))
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": headers,
            "extensions": {CONNECTION_EXTENSION: self},
        }
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.data = b""
        self._watchers: set[Callable[[], None]] = set()
        self.gone = False
        self.task = gateway.tasks.create_task(gateway.api.completions(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self.body}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.data += message["body"]

    def watch(self, watcher: Callable[[], None]) -> bool:
        self._watchers.add(watcher)
        return not self.gone

    def unwatch(self, watcher: Callable[[], None]) -> None:
        self._watchers.discard(watcher)

    def leave(self) -> None:
        self.gone = True
        for watcher in tuple(self._watchers):
            watcher()

    async def json(self) -> Any:
        await self.task
        return json.loads(self.data)

    def events(self) -> list[Any]:
        return [json.loads(part[6:]) for part in self.data.split(b"\n\n") if part[6:7] == b"{"]

    def texts(self) -> dict[int, str]:
        """Of a stream or of a plain answer, so far."""
        found: dict[int, str] = {}
        told = self.events() if self.headers.get(b"content-type", b"").startswith(b"text/event") else []
        for event in told or ([json.loads(self.data)] if self.data and not told else []):
            for choice in event.get("choices", ()):
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        return found

    @property
    def error(self) -> str | None:
        for event in self.events() if self.data.startswith(b"data:") else [json.loads(self.data or b"{}")]:
            if "error" in event:
                return str(event["error"]["code"])
        return None


class Gateway:
    """One gateway program, without its sockets."""

    def __init__(self, world: World, name: str, store: Store, tasks: asyncio.TaskGroup) -> None:
        self.world = world
        self.name = name
        self.tasks = tasks
        self.nodes: list[PacedNode] = []
        self.registry = Registry(store, approve="open", now=time.time)
        self.links = Links(
            registry=self.registry,
            accounts=Accounts(store, now=time.time, entropy=os.urandom),
            texts=Texts(),  # type: ignore[arg-type]
            text_folder=world.folder / name,
            invite_only=False,
            spawn=self.spawn,
            clock=time.monotonic,
        )
        self.books = Books(
            store,
            holder=GatewayId(name),
            network_key=IDENTITY.public,
            clock=time.monotonic,
            wall_ms=lambda: int(world.wall() * 1000),
            entropy=os.urandom,
            lease_seconds=LEASE_SECONDS,
        )
        self.table = Idempotency(store, holder=name, lease_seconds=LEASE_SECONDS)
        self.dispatcher = Dispatcher(
            registry=self.registry,
            links=self.links,
            books=self.books,
            observer=Quiet(),
            clock=time.monotonic,
            admission=Admission(
                fleet=self.registry, clock=time.monotonic, observer=Quiet(), resume_timeout_seconds=0.0
            ),
        )
        self.shared = SharedAnswers(
            self.table, books=self.books, dispatcher=self.dispatcher, spawn=self.spawn, clock=time.monotonic
        )
        self.api = OpenAIGateway(
            registry=self.registry,
            accounts=Keys(),  # type: ignore[arg-type]
            texts=Texts(),  # type: ignore[arg-type]
            dispatcher=self.dispatcher,
            books=self.books,
            limits=Limits(),
            shared=self.shared,
            clock=time.monotonic,
            wall_clock=world.wall,
            request_ids=lambda: f"{next(world.numbers):06d}",
            gateway_secret=SECRET,
        )
        store.listen(self.books.heard)
        store.listen(self.table.heard)
        self.store = store

    def spawn(self, work: Any) -> None:
        self.tasks.create_task(work)

    async def join(self) -> PacedNode:
        node = PacedNode(self.world)
        there = MemorySocket()
        node.socket.other, there.other = there, node.socket
        node.tasks = self.tasks
        now = asyncio.get_running_loop().time
        node_side = NodeSide(node.identity, "here:1", "test")
        node.conversation = Conversation(Link(node_side, entropy=os.urandom, now=now()), node.socket, now)
        side = NetworkSide(IDENTITY, frozenset({"here:1"}), "test", heartbeat_seconds=5.0)
        self.spawn(self.links.converse(Conversation(Link(side, entropy=os.urandom, now=now()), there, now)))

        async def converse() -> None:
            await node.conversation.run(node.on_event)

        self.spawn(converse())
        while not any(view.node_id == node.identity.public.hex() for view in self.views()) and not self.views():
            await asyncio.sleep(0)
        self.nodes.append(node)
        return node

    def views(self) -> Sequence[Any]:
        return self.registry.snapshot().by_class.get(CLASS.class_id, ())

    async def break_node(self) -> None:
        """The node is lost, and another one comes."""
        self.nodes.pop().cut()
        while self.views():
            await asyncio.sleep(0)
        await self.join()

    def ask(self, key: str | None = "k", account: str = "rich", **body: Any) -> Call:
        return Call(self, key, account, {"max_tokens": 6, "seed": 1, **body})


class Quiet:
    def first_token(self, seconds: float) -> None: ...
    def tokens_delivered(self, count: int) -> None: ...
    def queue_length(self, count: int) -> None: ...
    def moved(self, code: str) -> None: ...
    def admission_waited(self, seconds: float) -> None: ...
    def admission_refused(self, reason: str) -> None: ...


class World:
    """Gateways on one database."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder
        self.database = database
        self.wall_ahead = 0.0
        self.numbers = itertools.count(1)
        self.store: Store
        self._permits = 0
        self.ids_per_step = 1
        self.gateways: list[Gateway] = []

    def wall(self) -> float:
        return time.time() + self.wall_ahead

    @property
    def permits(self) -> int:
        return self._permits

    @permits.setter
    def permits(self, count: int) -> None:
        self._permits = count
        for gateway in self.gateways:
            for node in gateway.nodes:
                node.news.set()

    @contextlib.asynccontextmanager
    async def gateway(self, name: str = "gateway-1") -> AsyncIterator[Gateway]:
        """Serves until the end of the block; `Killed` raised in it ends everything without a word."""
        store = self.database.store(wall_clock=self.wall)
        await store.open(MIGRATIONS)
        try:
            async with asyncio.TaskGroup() as tasks:
                made = Gateway(self, name, store, tasks)
                await made.registry.load()
                loops = [tasks.create_task(loop) for loop in (made.books.run(), made.books.keep(), made.table.keep())]
                await made.books.recover()
                await made.join()
                self.gateways.append(made)
                try:
                    yield made
                finally:
                    self.gateways.remove(made)
                for node in made.nodes:
                    node.cut()
                await made.shared.close()
                await made.books.close()
                for loop in loops:
                    loop.cancel()
        except* Killed:
            pass
        finally:
            await store.close()

    async def sql(self, text: str) -> list[Any]:
        async def action(transaction: Transaction) -> list[Any]:
            return await transaction.all(text)

        return await self.store.run(action)

    async def spent(self) -> int:
        """Of all accounts together, what is neither theirs nor held for them."""
        rows = await self.sql("SELECT account, balance FROM ledger_accounts")
        return CREDIT - sum(int(balance) for name, balance in rows if name.startswith(("user:", "escrow:")))

    async def settled(self, gateway: Gateway) -> int:
        while gateway.table.recordings or await self.sql("SELECT 1 FROM open_works"):
            await asyncio.sleep(0.005)
        await gateway.books.flush()
        return await self.spent()


class Killed(Exception):
    pass


def play(database: Database, tmp_path: Path, body: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        world = World(tmp_path, database)
        world.store = database.store(wall_clock=world.wall)
        await world.store.open(MIGRATIONS)
        try:
            await world.store.run(lambda tx: ledger.apply(tx, [ledger.credit("rich", CREDIT, "credit-1")]))
            async with asyncio.timeout(30):
                await body(world)
            assert not await world.store.run(ledger.check)
        finally:
            await world.store.close()

    asyncio.run(run())


async def until(wanted: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not wanted():
            await asyncio.sleep(0.002)


COST = most(ROW, len(PROMPT), 6)


# ---------------------------------------------------------------- the life of a key


def test_a_retry_of_a_finished_request_has_the_same_bytes_and_one_charge(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 1000
            for stream in (False, True):
                asked = {"n": 2, "stream": stream, "logprobs": 1}
                first = gateway.ask(f"key {stream}", **asked)
                await first.task
                assert first.status == 200 and b"x-gridmill-replayed" not in first.headers
                spent = await world.settled(gateway)
                assert spent == 2 * COST * (1 + stream)
                retry = gateway.ask(f"key {stream}", **asked)
                await retry.task
                assert retry.headers.pop(b"x-gridmill-replayed") == b"true"
                if stream:  # replayed in fewer events, with the same text
                    assert retry.texts() == first.texts() and retry.data.endswith(b"data: [DONE]\n\n")
                else:
                    assert (retry.data, retry.headers) == (first.data, first.headers)
                    assert (await retry.json())["usage"]["cost_nanocredits"] == 2 * COST
                assert await world.settled(gateway) == spent
            assert not await world.sql("SELECT 1 FROM idempotent_requests WHERE ending = ''")

    play(database, tmp_path, body)


def test_the_same_key_with_another_body_or_path_is_refused_and_other_accounts_have_keys_of_their_own(
    database: Database, tmp_path: Path
) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            running = gateway.ask()
            await until(lambda: gateway.links.works)
            for moment in ("while it runs", "when it is done"):
                other = gateway.ask(max_tokens=7)
                await other.task
                assert (other.status, other.error) == (422, "idempotency_key_reused"), moment
                world.permits = 100
                await running.task
                await world.settled(gateway)
            poor = gateway.ask(account="poor")
            await poor.task
            assert poor.status == 402
            for wrong in ("", "x" * 256, "tab\t"):
                refused = gateway.ask(wrong)
                await refused.task
                assert (refused.status, refused.error) == (400, "invalid_idempotency_key")

    play(database, tmp_path, body)


def test_what_came_to_nothing_leaves_no_row(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 100
            poor = gateway.ask(account="poor")
            await poor.task
            assert poor.status == 402 and not await world.sql("SELECT 1 FROM idempotent_requests")
            await world.store.run(lambda tx: ledger.apply(tx, [ledger.credit("poor", CREDIT, "credit-2")]))
            again = gateway.ask(account="poor")
            await again.task
            assert again.status == 200
            too_much = gateway.ask("k2", max_tokens=5000)
            await too_much.task
            assert too_much.status == 400
            gateway.nodes.pop().cut()
            await until(lambda: not gateway.views())
            nobody = gateway.ask("k2")
            await nobody.task
            assert (nobody.status, nobody.error) == (503, "no_node")
            assert len(await world.sql("SELECT 1 FROM idempotent_requests")) == 1

    play(database, tmp_path, body)


def test_a_retry_joins_what_runs_and_a_caller_who_leaves_stops_nothing(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            first = gateway.ask(stream=True)
            world.permits = 2
            await until(lambda: len(first.texts().get(0, "")) == 2)
            second = gateway.ask(stream=True)
            await until(lambda: second.texts() == first.texts())  # from the first id, while it runs
            first.leave()
            second.leave()
            await asyncio.wait([first.task, second.task])
            assert gateway.links.works == 1
            world.permits = 100
            assert await world.settled(gateway) == COST
            third = gateway.ask(stream=True)
            await third.task
            assert len(third.texts()[0]) == 6 and third.texts()[0].startswith(first.texts()[0])
            assert len(gateway.nodes[0].heard_of(Offer)) == 1 and await world.settled(gateway) == COST

    play(database, tmp_path, body)


def test_a_run_that_broke_off_goes_on_with_new_ids_only(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 100
            await (alone := gateway.ask("alone", n=2)).task
            spent = await world.settled(gateway)
            world.permits = 5
            first = gateway.ask(n=2)
            await until(lambda: world.permits == 0)
            await gateway.break_node()
            await first.task
            assert (first.status, first.error) == (502, "node_lost")
            offers = len(gateway.nodes[0].heard_of(Offer))
            world.permits = 100
            again = gateway.ask(n=2)
            await again.task
            assert again.texts() == alone.texts() and (await again.json())["id"] != (await alone.json())["id"]
            assert again.headers[b"x-gridmill-request-id"] == first.headers[b"x-gridmill-request-id"]
            works = [offer.work for offer in gateway.nodes[0].heard_of(Offer)[offers:]]
            # What was on its way when the cable broke may not have arrived.
            assert 3 <= sum(len(work.delivered) // 4 for work in works) <= 5 and all(work.epoch for work in works)
            cost = (await again.json())["usage"]["cost_nanocredits"]
            assert await world.settled(gateway) - spent == cost <= 2 * COST
            await once_each(world)

    play(database, tmp_path, body)


def test_a_revoked_key_stops_the_run_and_another_key_of_the_account_goes_on(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 3
            first = gateway.ask(stream=True)
            await until(lambda: len(first.texts().get(0, "")) == 3)
            gateway.dispatcher.revoke([KeyId("key-rich")])
            await first.task
            assert first.error == "invalid_api_key"
            world.permits = 100
            again = gateway.ask(stream=True)
            await again.task
            assert len(again.texts()[0]) == 6 and await world.settled(gateway) == COST
            await once_each(world)

    play(database, tmp_path, body)


def test_a_killed_gateway_comes_back_and_goes_on(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        with contextlib.suppress(Killed):
            async with world.gateway() as gateway:
                world.permits = 3
                gateway.ask(stop="~")
                await journalled(world, 3)
                raise Killed
        async with world.gateway() as gateway:
            assert await world.spent() == most(ROW, len(PROMPT), 3)
            world.permits = 100
            again = gateway.ask(stop="~")
            assert len((await again.json())["choices"][0]["text"]) == 6
            assert gateway.nodes[0].heard_of(Offer)[0].work.epoch > 0
            assert await world.settled(gateway) == (await again.json())["usage"]["cost_nanocredits"] == COST
            await once_each(world)

    play(database, tmp_path, body)


def test_a_stop_string_across_the_break_is_found_and_counted_from_the_first_id(
    database: Database, tmp_path: Path
) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 100
            whole = (await gateway.ask("whole", max_tokens=50).json())["choices"][0]["text"]
            spent = await world.settled(gateway)
            world.permits = 3
            gateway.ask("broken", max_tokens=50, stop=whole[2:5])
            await journalled(world, 3)
            raise Killed
        async with world.gateway() as gateway:
            world.permits = 100
            world.ids_per_step = 4  # more than are wanted come in one step
            again = await gateway.ask("broken", max_tokens=50, stop=whole[2:5]).json()
            assert again["choices"][0]["text"] == whole[:2] and again["choices"][0]["finish_reason"] == "stop"
            assert gateway.nodes[0].heard_of(Cancel)[0].keep == 5 == again["usage"]["completion_tokens"]
            assert await world.settled(gateway) - spent == most(ROW, len(PROMPT), 5)
            await once_each(world)

    play(database, tmp_path, body)


def test_log_probabilities_that_a_crash_lost_are_not_made_up(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 3
            gateway.ask(logprobs=1)
            await journalled(world, 3)
            raise Killed
        async with world.gateway() as gateway:
            world.permits = 100
            for _ in range(2):
                again = gateway.ask(logprobs=1)
                await again.task
                assert (again.status, again.error) == (409, "idempotent_answer_incomplete")
            assert not gateway.nodes[0].heard_of(Offer)

    play(database, tmp_path, body)


def test_an_end_that_could_not_be_written_is_found_in_the_books(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:

            async def no_answer() -> None:
                raise Unavailable("the database does not answer", 5)

            with monkeypatch.context() as patch:
                patch.setattr(gateway.books, "flush", no_answer)
                world.permits = 3
                first = gateway.ask()
                await until(lambda: world.permits == 0)
                await gateway.break_node()
                await first.task
                assert first.error == "node_lost"
            world.permits = 100
            again = gateway.ask()
            assert len((await again.json())["choices"][0]["text"]) == 6
            with monkeypatch.context() as patch:
                patch.setattr(gateway.books, "flush", no_answer)
                second = gateway.ask("whole")
                await second.task
                await until(lambda: not gateway.table.recordings)
            retry = gateway.ask("whole")
            await retry.task
            assert retry.data == second.data and len(gateway.nodes[0].heard_of(Offer)) == 2
            await world.settled(gateway)
            await once_each(world)

    play(database, tmp_path, body)


def test_a_network_that_stops_leaves_its_answers_to_be_continued(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 2
            first = gateway.ask()
            await until(lambda: world.permits == 0)
            await gateway.shared.close()
            await first.task
            assert (first.status, first.error) == (503, "stopping")
            refused = gateway.ask("other")
            await refused.task
            assert refused.error == "stopping"
        async with world.gateway("gateway-2") as gateway:  # at once: the row says that nobody runs it
            world.permits = 100
            again = gateway.ask()
            assert len((await again.json())["choices"][0]["text"]) == 6
            assert await world.settled(gateway) == COST

    play(database, tmp_path, body)


def test_another_gateway_waits_for_the_one_that_runs_it(postgres_database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway("gateway-1") as one, world.gateway("gateway-2") as two:
            calls = [gateway.ask(n=2) for gateway in (one, two) for _ in range(2)]
            world.permits = 100
            for call in calls:
                await call.task
            assert len({call.data for call in calls}) == 1 and calls[0].status == 200
            assert await world.settled(one) == await world.settled(two) == 2 * COST
            assert len(one.nodes[0].heard_of(Offer) + two.nodes[0].heard_of(Offer)) == 2

    play(postgres_database, tmp_path, body)


def test_another_gateway_takes_over_from_a_dead_one(postgres_database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.gateway("gateway-2") as two:
            async with world.gateway("gateway-1") as one:
                world.permits = 3
                one.ask()
                await journalled(world, 3)
                waiting = two.ask()
                raise Killed
            world.permits = 100
            world.wall_ahead = 3 * LEASE_SECONDS  # its lease ends, then the books settle what it left
            assert len((await waiting.json())["choices"][0]["text"]) == 6
            assert await world.settled(two) == COST
            await once_each(world)

    play(postgres_database, tmp_path, body)


# ---------------------------------------------------------------- the table


ASKED = Asked("a", hash_of_key(b"k") or b"", hash_of_body("/v1/completions", b"{}"), "cmpl-1", "demo", "c", 7, 2)


def test_one_of_many_inserts_wins(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        tables = [Idempotency(world.store, holder=f"gateway-{i}") for i in range(8)]
        claims = await asyncio.gather(*[table.claim(ASKED) for table in tables])
        assert sorted(type(claim).__name__ for claim in claims) == ["Elsewhere"] * 7 + ["Mine"]
        (mine,) = [claim for claim in claims if isinstance(claim, Mine)]
        winner = tables[claims.index(mine)]
        await winner.give_up(mine)
        assert not await world.sql("SELECT 1 FROM idempotent_requests")

    play(database, tmp_path, body)


def test_a_dead_run_is_taken_over_by_one_and_says_nothing_any_more(database: Database, tmp_path: Path) -> None:
    async def body(world: World) -> None:
        dead = Idempotency(world.store, holder="dead")
        late = await dead.claim(ASKED)
        assert isinstance(late, Mine)
        world.wall_ahead = 19
        await dead.renew()
        world.wall_ahead = 38
        tables = [Idempotency(world.store, holder=f"gateway-{i}") for i in range(4)]
        assert all([isinstance(await table.claim(ASKED), Elsewhere) for table in tables])
        world.wall_ahead = 40
        claims = await asyncio.gather(*[table.claim(ASKED) for table in tables])
        (mine,) = [claim for claim in claims if isinstance(claim, Mine)]
        assert mine.run == 1 and mine.parts[0].epoch_next == idempotency.EPOCHS_PER_RUN
        await dead.give_up(late)
        assert len(await world.sql("SELECT 1 FROM idempotent_requests")) == 1
        with pytest.raises(KeyReused):
            await dead.claim(Asked("a", ASKED.key_hash, b"other", "cmpl-2", "demo", "c", 8, 1))

    play(database, tmp_path, body)


def test_a_day_later_keys_and_ids_are_gone(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "TIDY_ROWS", 2)

    async def body(world: World) -> None:
        async with world.gateway() as gateway:
            world.permits = 1000
            for number in range(3):
                await gateway.ask(f"k{number}", n=2).task
            await world.settled(gateway)
            world.wall_ahead = idempotency.IDEMPOTENT_SECONDS - 60
            await gateway.table.tidy()
            assert len(await world.sql("SELECT 1 FROM work_answers")) == 6
            world.wall_ahead = idempotency.IDEMPOTENT_SECONDS + 60
            fresh = gateway.ask("k0", max_tokens=1)  # before anybody tidied: the key is free all the same
            await fresh.task
            assert fresh.status == 200
            await world.settled(gateway)
            await gateway.table.tidy()
            assert len(await world.sql("SELECT 1 FROM work_answers")) == 1
            assert len(await world.sql("SELECT 1 FROM idempotent_requests")) == 1

    play(database, tmp_path, body)


# ---------------------------------------------------------------- whatever happens


async def journalled(world: World, tokens: int) -> None:
    async with asyncio.timeout(10):
        while not await world.sql(f"SELECT 1 FROM open_works WHERE output_tokens = {tokens}"):
            await asyncio.sleep(0.005)


async def once_each(world: World) -> None:
    """No position is charged twice and none is left out; a prompt is charged at most once."""
    rows = await world.sql("SELECT work_id, start, ids, input_tokens FROM work_answers ORDER BY work_id, epoch")
    for _, of_work in itertools.groupby(rows, key=lambda row: row[0]):
        position = prompts = 0
        for _, start, packed, input_tokens in of_work:
            assert start == position, "a position was charged twice, or never"
            position += len(packed) // 4
            prompts += input_tokens > 0
        assert prompts <= 1, "a prompt was charged twice"


STEPS = st.lists(
    st.one_of(
        st.just(("ask", 0)),
        st.just(("leave", 0)),
        st.tuples(st.just("ids"), st.integers(1, 3)),
        st.just(("node fails", 0)),
        st.just(("kill", 0)),
        st.just(("journal", 0)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, choices=st.integers(1, 2), stream=st.booleans())
def test_no_schedule_charges_a_position_twice(steps: list[tuple[str, int]], choices: int, stream: bool) -> None:
    asked = {"n": choices, "stream": stream}

    async def body(world: World) -> None:
        left = list(steps)
        while left:
            async with world.gateway() as gateway:
                calls: list[Call] = []
                while left:
                    match left.pop(0):
                        case "ask", _:
                            calls.append(gateway.ask(**asked))
                        case "leave", _ if calls:
                            calls.pop().leave()
                        case "ids", count:
                            world.permits += count
                        case "node fails", _:
                            await gateway.break_node()
                        case "journal", _:
                            await asyncio.sleep(0.06)
                        case "kill", _:
                            raise Killed
                        case _:
                            pass
                    for _ in range(20):
                        await asyncio.sleep(0)
        async with world.gateway() as gateway:
            world.permits = 1000
            for attempt in range(3):  # it may join a run whose node has just failed
                last = gateway.ask(**asked)
                await last.task
                if last.error is None:
                    break
                assert attempt < 2, last.error
            spent = await world.settled(gateway)
            await once_each(world)
            alone = gateway.ask("alone", **asked)
            await alone.task
            assert last.texts() == alone.texts()
            charged = await world.settled(gateway)
            assert await world.sql("SELECT sum(charge_nanocredits) FROM work_answers") == [(charged,)]
            assert spent <= choices * (COST + 2 * len(steps))  # each run may round its fee up

    with TemporaryDirectory() as folder:
        play(Database("sqlite", f"{folder}/network.sqlite"), Path(folder), body)
