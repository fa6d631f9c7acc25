"""One road for every work: the real dispatcher, links and registry, over real links on sockets made of memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gridmill.network.accounts import Accounts
from gridmill.network.admission import Admission
from gridmill.network.books import Books, GatewayId, Order, Payer
from gridmill.network.dispatch import Dispatcher
from gridmill.network.faults import CallerFault, Enough, NodeFault, NoRoom
from gridmill.network.journey import Outcome, Patience
from gridmill.network.links import STREAM_CREDIT_IDS, Links
from gridmill.network.operator import MIGRATIONS
from gridmill.network.registry import Registry
from gridmill.network.store import SqliteStore, Store
from gridmill.wire.classes import ModelClass, TextFacts, facts_bytes
from gridmill.wire.codec import STREAMS_OPEN_MAX
from gridmill.wire.identity import Identity
from gridmill.wire.link import Arrived, Event, Link, NetworkSide, NodeSide, Opened, Reason
from gridmill.wire.messages import (
    Accept,
    Cancel,
    Chunk,
    ClassOffer,
    Credit,
    Emission,
    End,
    Fetch,
    Generate,
    Offer,
    Offers,
    Price,
    Refuse,
    Step,
)
from gridmill.wire.sampling import Sampling, pack_ids
from gridmill.wire.transport import Conversation

FACTS = TextFacts(chat_template="x", special_tokens={}, eos_token_ids=(299,), context_tokens=4096, vocab_size=300)
TOKENIZER = b"a tokenizer that nobody reads in this test"
CLASS = ModelClass(
    weights=(),
    arithmetic="echo",
    kv_dtype="none",
    sampler_version=1,
    tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
    text_facts_sha256=hashlib.sha256(facts_bytes(FACTS)).hexdigest(),
)
PAYER = Payer("a", "k")
EOS = FACTS.eos_token_ids[0]


class MemorySocket:
    """One end of a wire in memory: bounded, so that a reader who stops is felt by the writer."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=64)
        self.other: MemorySocket | None = None
        self.cut = False

    async def send_bytes(self, data: bytes) -> None:
        assert self.other is not None
        if self.cut:
            raise ConnectionResetError("cut")
        await self.other.inbox.put(data)

    async def receive_bytes(self) -> bytes | None:
        return None if self.cut else await self.inbox.get()

    async def close(self) -> None:
        assert self.other is not None
        if not self.other.inbox.full():
            self.other.inbox.put_nowait(None)


class ScriptedNode:
    """A node whose answers the test writes: `script(node, offer)` runs for each offer."""

    def __init__(
        self, script: Callable[[ScriptedNode, Offer], Awaitable[None]], slots: int, price: Price | None = None
    ) -> None:
        self.script = script
        self.slots = slots
        self.price = price or Price()
        self.heard: list[object] = []
        self.news = asyncio.Event()
        self.identity = Identity(os.urandom(32))
        self.socket = MemorySocket()
        self.tasks: asyncio.TaskGroup | None = None
        self.tokenizer = TOKENIZER

    def send(self, message: Any) -> None:
        self.conversation.send(message)

    def say(self, stream: int, position: int, *ids: int) -> None:
        self.send(Step((Emission(stream, position, ids),)))

    def end(self, stream: int, count: int, kind: Any = "length", **facts: Any) -> None:
        self.send(Step((), (End(stream, kind, count, **facts),)))

    async def until(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not wanted():
                self.news.clear()
                await self.news.wait()

    def heard_of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def on_event(self, event: Event) -> None:
        match event:
            case Opened():
                self.send(Offers((ClassOffer("demo", CLASS, self.slots, "echo", price=self.price),)))
            case Arrived(message=Fetch(transfer=number, sha256=sha256)):
                data = {CLASS.tokenizer_sha256: self.tokenizer, CLASS.text_facts_sha256: facts_bytes(FACTS)}[sha256]
                self.send(Chunk(number, 0, len(data), data))
            case Arrived(message=message):
                self.heard.append(message)
                if isinstance(message, Offer):
                    assert self.tasks is not None
                    self.tasks.create_task(self._perform(message))
        self.news.set()

    async def _perform(self, offer: Offer) -> None:
        await self.script(self, offer)

    def cut(self) -> None:
        """The cable breaks: both ends see the end of the stream."""
        assert self.socket.other is not None
        self.socket.cut = self.socket.other.cut = True
        self.socket.inbox.put_nowait(None)
        self.socket.other.inbox.put_nowait(None)


class NoTexts:
    """The class texts are somebody else's test."""

    async def register(self, class_id: str, path: Path, facts: TextFacts) -> object:
        assert path.read_bytes() == TOKENIZER
        return object()


class Observations:
    def __init__(self) -> None:
        self.tokens = 0
        self.first_tokens = 0
        self.moves: list[str] = []

    def first_token(self, seconds: float) -> None:
        self.first_tokens += 1

    def tokens_delivered(self, count: int) -> None:
        self.tokens += count

    def queue_length(self, count: int) -> None:
        pass

    def moved(self, code: str) -> None:
        self.moves.append(code)

    def admission_waited(self, seconds: float) -> None:
        pass

    def admission_refused(self, reason: str) -> None:
        pass


class World:
    """A network without sockets or a gateway."""

    def __init__(self, folder: Path, tasks: asyncio.TaskGroup, store: Store, **options: Any) -> None:
        self.tasks = tasks
        self.identity = Identity(os.urandom(32))
        self.accounts = Accounts(store, now=lambda: 0.0, entropy=os.urandom)
        clock = asyncio.get_running_loop().time
        self.registry = Registry(store, approve="open", now=lambda: 0.0, clock=clock)
        self.observer = Observations()
        self.links = Links(
            registry=self.registry,
            accounts=self.accounts,
            texts=NoTexts(),  # type: ignore[arg-type]
            text_folder=folder / "text",
            invite_only=options.pop("invite_only", False),
            spawn=lambda work: void(tasks.create_task(work)),
            clock=clock,
        )
        self.books = Books(
            store,
            holder=GatewayId("gateway-1"),
            network_key=self.identity.public,
            clock=clock,
            wall_ms=lambda: int(clock() * 1000),
            entropy=os.urandom,
        )
        self.admission = Admission(
            fleet=self.registry,
            clock=clock,
            observer=self.observer,
            queue_timeout_seconds=options.pop("queue_timeout_seconds", 30.0),
            resume_timeout_seconds=options.pop("resume_timeout_seconds", 0.0),
        )
        self.dispatcher = Dispatcher(
            registry=self.registry,
            links=self.links,
            books=self.books,
            observer=self.observer,
            clock=clock,
            admission=self.admission,
            **options,
        )

    async def join(self, node: ScriptedNode, *, join_token: str = "", served: bool = True) -> None:
        """Connects the node and waits until its class is served."""
        there = MemorySocket()
        node.socket.other, there.other = there, node.socket
        node.tasks = self.tasks
        now = asyncio.get_running_loop().time
        node_side = NodeSide(node.identity, "here:1", "test", join_token=join_token)
        node.conversation = Conversation(Link(node_side, entropy=os.urandom, now=now()), node.socket, now)
        side = NetworkSide(self.identity, frozenset({"here:1"}), "test", heartbeat_seconds=1.0)
        here = Conversation(Link(side, entropy=os.urandom, now=now()), there, now)
        self.tasks.create_task(self.links.converse(here))
        self.tasks.create_task(void_later(node.conversation.run(node.on_event)))
        async with asyncio.timeout(5):
            while served and not self.registry.snapshot().by_class.get(CLASS.class_id):
                await asyncio.sleep(0)

    def order(self, wanted: Generate, amount: int = 0) -> Order:
        return self.books.order(PAYER, wanted.work_id, wanted.class_id, "demo", len(wanted.prompt) // 4, amount)

    @property
    def in_flight(self) -> int:
        return sum(view.in_flight for views in self.registry.snapshot().by_class.values() for view in views)

    async def idle(self) -> None:
        async with asyncio.timeout(5):
            await self.links.idle()


def void(_: object) -> None:
    """create_task's result is the group's to keep."""


async def void_later(work: Awaitable[object]) -> None:
    await work


def play(tmp_path: Path, body: Callable[[World], Awaitable[None]], **options: Any) -> None:
    @asynccontextmanager
    async def world() -> Any:
        store = SqliteStore(tmp_path / "a.sqlite", wall_clock=lambda: 1000.0)
        await store.open(MIGRATIONS)
        try:
            async with asyncio.TaskGroup() as tasks:
                made = World(tmp_path, tasks, store, **options)
                books = asyncio.create_task(made.books.run())
                yield made
                made.links.say_goodbye(Reason.STOPPING, "the test is over")
                await made.books.close()
                books.cancel()
        finally:
            await store.close()

    async def run() -> None:
        async with asyncio.timeout(30), world() as made:
            await body(made)

    asyncio.run(run())


def work(max_tokens: int = 10, name: str = "w") -> Generate:
    return Generate(name, CLASS.class_id, pack_ids([5, 6, 7]), Sampling(bytes(32), max_tokens))


async def count_up(node: ScriptedNode, offer: Offer) -> None:
    """Accepts and emits max_tokens ids one by one, as fast as credit allows."""
    node.send(Accept(offer.stream))
    for position in range(offer.work.sampling.max_tokens):
        await node.until(lambda: node.conversation.link.credit_left(offer.stream) > 0)
        node.say(offer.stream, position, 100 + position % 100)
        await asyncio.sleep(0)
    node.end(offer.stream, offer.work.sampling.max_tokens, cached_tokens=2)


class Reader:
    """What a gateway would do with the ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.nodes: list[str] = []

    async def emit(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            self.ids.extend(emission.ids)

    async def serve(self, world: World, wanted: Generate) -> Outcome:
        return await world.dispatcher.serve(wanted, world.order(wanted), self.emit, placed=self.nodes.append)


def test_a_work_is_placed_answered_and_its_place_freed(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        await world.join(node := ScriptedNode(count_up, slots=2))
        reader = Reader()
        outcome = await reader.serve(world, work(600))  # more than the first credit: grants must flow
        assert reader.ids == [100 + n % 100 for n in range(600)]
        assert outcome == Outcome(
            "length", 600, 0, tuple(reader.nodes)
        )  # the node claims 2 cached: only our record counts
        assert len(reader.nodes) == 1 and len(node.heard_of(Credit)) >= (600 - STREAM_CREDIT_IDS) // STREAM_CREDIT_IDS
        await world.idle()
        assert world.in_flight == 0 and world.observer.tokens == 600

    play(tmp_path, body)


def test_a_reader_who_stops_reading_stops_the_node_at_its_credit(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        await world.join(node := ScriptedNode(count_up, slots=2))
        gate = asyncio.Event()
        slow = Reader()

        async def held(emissions: list[Emission]) -> None:
            await gate.wait()
            await slow.emit(emissions)

        task = asyncio.create_task(world.dispatcher.serve(work(2000), world.order(work(2000)), held))
        fast = Reader()
        await fast.serve(world, work(2000, "fast"))  # the other stream is not held up
        stream = next(offer.stream for offer in node.heard_of(Offer) if offer.work.work_id == "w")
        assert node.conversation.link.credit_left(stream) == 0
        assert node.conversation.link.position_of(stream) == STREAM_CREDIT_IDS
        gate.set()
        await task
        assert len(slow.ids) == len(fast.ids) == 2000

    play(tmp_path, body)


def test_enough_cancels_the_node_and_counts_what_is_kept(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def script(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            node.say(offer.stream, 0, 1, 2, 3, 4, 5)
            await node.until(lambda: bool(node.heard_of(Cancel)))
            node.end(offer.stream, 5, "cancelled", cached_tokens=3)

        await world.join(node := ScriptedNode(script, slots=1))

        async def emit(emissions: list[Emission]) -> None:
            raise Enough(keep=3)

        outcome = await world.dispatcher.serve(work(), world.order(work()), emit)
        assert (outcome.kind, outcome.output_tokens, outcome.cached_tokens) == ("stop", 3, 0)
        assert node.heard_of(Cancel)[0].keep == 3

    play(tmp_path, body)


def test_a_caller_who_leaves_cancels_the_work_and_the_place_is_free_after_the_nodes_last_word(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        answered = asyncio.Event()

        async def script(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            node.say(offer.stream, 0, 1)
            await node.until(lambda: bool(node.heard_of(Cancel)))
            answered.set()
            node.say(offer.stream, 1, 2)  # late words before the last one are no offence
            node.end(offer.stream, 2, "cancelled")

        await world.join(ScriptedNode(script, slots=1))
        reader = Reader()
        task = asyncio.create_task(reader.serve(world, work()))
        while not reader.ids:
            await asyncio.sleep(0)
        assert world.in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await answered.wait()
        await world.idle()
        assert world.in_flight == 0 and reader.ids == [1]

    play(tmp_path, body)


def test_a_refusal_before_the_first_id_goes_to_another_node(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def busy(node: ScriptedNode, offer: Offer) -> None:
            node.send(Refuse(offer.stream, "node", "busy", "no room"))

        async def dies(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            await asyncio.sleep(0)
            node.cut()

        for script in (busy, dies, count_up):
            await world.join(ScriptedNode(script, slots=4))
        async with asyncio.timeout(5):
            while len(world.registry.snapshot().by_class[CLASS.class_id]) < 3:
                await asyncio.sleep(0)
        for _ in range(3):  # whichever is tried first, the work arrives
            reader = Reader()
            await reader.serve(world, work())
            assert len(reader.ids) == 10

    play(tmp_path, body)


def test_what_no_node_can_run_is_told_to_the_caller_at_once(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def picky(node: ScriptedNode, offer: Offer) -> None:
            node.send(Refuse(offer.stream, "caller", "context_too_long", "the prompt is too long"))

        await world.join(node := ScriptedNode(picky, slots=4))
        with pytest.raises(CallerFault, match="refuse") as caught:
            await Reader().serve(world, work())
        assert caught.value.status == 400 and len(node.heard_of(Offer)) == 1

    play(tmp_path, body)


def test_a_node_that_is_lost_after_an_id_ends_the_work_with_its_fault(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def dies(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            node.say(offer.stream, 0, 1, 2)
            await asyncio.sleep(0.01)
            node.cut()

        await world.join(ScriptedNode(dies, slots=4))
        reader = Reader()
        with pytest.raises(NodeFault) as caught:
            await reader.serve(world, work())
        assert caught.value.code == "node_lost" and reader.ids == [1, 2]
        with pytest.raises(NoRoom) as full:
            await Reader().serve(world, work())
        assert full.value.code == "no_node" and full.value.retry_after_seconds > 0

    play(tmp_path, body)


def test_a_node_that_never_answers_an_offer_is_passed_over(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def silent(node: ScriptedNode, offer: Offer) -> None:
            await node.until(lambda: bool(node.heard_of(Cancel)))
            node.send(Accept(offer.stream))
            node.end(offer.stream, 0, "cancelled")

        await world.join(node := ScriptedNode(silent, slots=4))
        with pytest.raises(NodeFault) as caught:
            await Reader().serve(world, work())
        assert caught.value.code == "node_silent"
        await world.idle()
        assert len(node.heard_of(Cancel)) == 1

    play(tmp_path, body, patience=Patience(first_token_seconds=0.05))


def test_a_node_that_falls_silent_after_an_id_is_given_up(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def stalls(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            node.say(offer.stream, 0, 1, 2)
            await node.until(lambda: bool(node.heard_of(Cancel)))
            node.end(offer.stream, 2, "cancelled")

        await world.join(ScriptedNode(stalls, slots=4))
        reader = Reader()
        with pytest.raises(NodeFault) as caught:
            await reader.serve(world, work())
        assert caught.value.code == "node_stalled" and reader.ids == [1, 2]
        await world.idle()

    # The first id's longer patience sets the timer first; the shorter one must move it, or this test never ends.
    play(tmp_path, body, patience=Patience(gap_seconds=0.05, first_token_seconds=3600.0, alone_seconds=0.0))


def test_patience_begins_anew_with_every_word_of_the_node(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def slow(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            for position in range(4):  # the timer of the first word fires while the next ones are awaited
                await asyncio.sleep(0.2)
                node.say(offer.stream, position, 5 + position)
            node.say(offer.stream, 4, EOS)
            node.end(offer.stream, 5, "stop")

        await world.join(ScriptedNode(slow, slots=4))
        reader = Reader()
        outcome = await reader.serve(world, work())
        assert outcome.kind == "stop" and reader.ids == [5, 6, 7, 8, EOS]

    play(tmp_path, body, patience=Patience(gap_seconds=0.6, gap_factor=0.0, first_token_seconds=0.6))


@pytest.mark.parametrize(
    ("kind", "facts", "code"),
    [("failed", {"code": "out_of_memory", "detail": "no pages"}, "node_failed"), ("cancelled", {}, "node_cancelled")],
)
def test_an_end_that_is_no_finish_is_the_nodes_fault(
    tmp_path: Path, kind: str, facts: dict[str, str], code: str
) -> None:
    async def body(world: World) -> None:
        async def script(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            node.say(offer.stream, 0, 1)
            node.end(offer.stream, 1, kind, **facts)

        await world.join(ScriptedNode(script, slots=1))
        with pytest.raises(NodeFault) as caught:
            await Reader().serve(world, work())
        assert caught.value.code == code

    play(tmp_path, body)


def test_as_many_wait_as_there_are_places_and_the_next_is_refused_at_once(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        release = asyncio.Event()

        async def script(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))
            node.say(offer.stream, 0, 1)
            await release.wait()
            node.say(offer.stream, 1, EOS)
            node.end(offer.stream, 2, "stop")

        await world.join(ScriptedNode(script, slots=3))
        readers = [Reader() for _ in range(6)]
        tasks = [asyncio.create_task(reader.serve(world, work())) for reader in readers]
        while sum(len(reader.ids) for reader in readers) < 3 or world.dispatcher.waiting < 3:
            await asyncio.sleep(0)
        with pytest.raises(NoRoom) as full:
            await Reader().serve(world, work())
        assert full.value.code == "overloaded"
        assert [len(reader.ids) for reader in readers] == [1, 1, 1, 0, 0, 0]
        tasks[3].cancel()  # somebody who waits may leave
        release.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, Outcome) for result in results] == [True, True, True, False, True, True]
        assert world.dispatcher.waiting == 0 and world.in_flight == 0

    play(tmp_path, body)


def test_waiting_has_an_end(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def silent(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))

        await world.join(node := ScriptedNode(silent, slots=1))
        holder = asyncio.create_task(Reader().serve(world, work()))
        await node.until(lambda: bool(node.heard_of(Offer)))
        with pytest.raises(NoRoom, match="waited"):
            await Reader().serve(world, work())
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)

    play(tmp_path, body, queue_timeout_seconds=0.05)


def test_whoever_waits_is_told_when_the_last_node_goes(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def silent(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))

        await world.join(node := ScriptedNode(silent, slots=1))
        tasks = [asyncio.create_task(Reader().serve(world, work())) for _ in range(2)]
        while world.dispatcher.waiting < 1:
            await asyncio.sleep(0)
        node.cut()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], NodeFault) and isinstance(results[1], NoRoom)

    play(tmp_path, body)


def test_a_network_that_stops_admits_nothing_and_lets_the_running_finish(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        await world.join(ScriptedNode(count_up, slots=1))
        reader = Reader()
        task = asyncio.create_task(reader.serve(world, work(500)))
        while not reader.ids:
            await asyncio.sleep(0)
        world.dispatcher.stop_admitting()
        with pytest.raises(NoRoom, match="shutting down"):
            await Reader().serve(world, work())
        assert (await task).output_tokens == 500

    play(tmp_path, body)


def test_by_invitation_only_a_live_node_token_lets_a_node_in(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        _, inference = await world.accounts.create("user", "inference")
        _, invitation = await world.accounts.create("friend", "node")
        for token in ("", "gm-wrong", inference):
            stranger = ScriptedNode(count_up, slots=1)
            await world.join(stranger, join_token=token, served=False)
            await stranger.until(lambda node=stranger: node.conversation.link.closed is not None)  # type: ignore[misc]
            closed = stranger.conversation.link.closed
            assert closed is not None and closed.reason is Reason.JOIN_REFUSED and closed.permanent
            assert "keys create" in closed.detail
        await world.join(ScriptedNode(count_up, slots=1), join_token=invitation)
        assert (await Reader().serve(world, work())).output_tokens == 10

    play(tmp_path, body, invite_only=True)


def test_a_node_that_joins_again_takes_over_from_its_older_self(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        older = ScriptedNode(count_up, slots=1)
        newer = ScriptedNode(count_up, slots=1)
        newer.identity = older.identity
        await world.join(older)
        await world.join(newer)
        await older.until(lambda: older.conversation.link.closed is not None)
        closed = older.conversation.link.closed
        assert closed is not None and closed.reason is Reason.SUPERSEDED
        async with asyncio.timeout(5):
            while not world.registry.snapshot().by_class.get(CLASS.class_id):
                await asyncio.sleep(0)
        assert (await Reader().serve(world, work())).output_tokens == 10
        assert newer.heard_of(Offer) and not older.heard_of(Offer)

    play(tmp_path, body)


def test_a_tokenizer_that_does_not_match_its_class_is_not_served(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        liar = ScriptedNode(count_up, slots=1)
        liar.tokenizer = b"something else entirely"
        await world.join(liar, served=False)
        async with asyncio.timeout(5):
            while world.links.count < 1:
                await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert not world.registry.snapshot().by_class.get(CLASS.class_id)
        await world.join(ScriptedNode(count_up, slots=1))  # an honest node of the same class is not harmed
        assert (await Reader().serve(world, work())).output_tokens == 10

    play(tmp_path, body)


def test_a_node_that_offers_and_offers_and_sends_no_files_harms_nobody(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        def other(number: int) -> ModelClass:
            return msgspec.structs.replace(CLASS, tokenizer_sha256=f"{number:064x}")

        class Silent(ScriptedNode):
            def on_event(self, event: Event) -> None:
                if isinstance(event, Opened):
                    for number in range(20):
                        self.send(Offers((ClassOffer("demo", other(number), 1, "echo"),)))
                self.news.set()

        await world.join(Silent(count_up, slots=1), served=False)
        await asyncio.sleep(0.05)
        await world.join(ScriptedNode(count_up, slots=1))
        assert (await Reader().serve(world, work())).output_tokens == 10

    play(tmp_path, body)


def test_a_node_may_promise_more_places_than_its_link_has_streams(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async def silent(node: ScriptedNode, offer: Offer) -> None:
            node.send(Accept(offer.stream))

        await world.join(node := ScriptedNode(silent, slots=60_000))
        tasks = [asyncio.create_task(Reader().serve(world, work(name=f"w{n}"))) for n in range(STREAMS_OPEN_MAX + 3)]
        await node.until(lambda: len(node.heard_of(Offer)) == STREAMS_OPEN_MAX)
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert all(isinstance(task.exception(), NodeFault) for task in done)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    play(tmp_path, body)


def test_a_key_that_joins_twice_and_offers_nothing_the_second_time_leaves_no_ghost(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        class Quiet(ScriptedNode):
            def on_event(self, event: Event) -> None:
                self.news.set()

        first = ScriptedNode(count_up, slots=64)
        await world.join(first)
        second = Quiet(count_up, slots=1)
        second.identity = first.identity
        await world.join(second, served=False)
        await second.until(lambda: second.conversation.link.opened is not None)
        assert not world.registry.snapshot().by_class.get(CLASS.class_id)
        with pytest.raises(NoRoom):
            await Reader().serve(world, work())
        await world.join(ScriptedNode(count_up, slots=1))
        assert (await Reader().serve(world, work())).output_tokens == 10

    play(tmp_path, body)


@pytest.mark.parametrize("fault", ["caller", "node"])
def test_a_nodes_words_are_never_taken_for_the_networks(tmp_path: Path, fault: Any) -> None:
    async def body(world: World) -> None:
        async def liar(node: ScriptedNode, offer: Offer) -> None:
            node.send(Refuse(offer.stream, fault, "invalid_api_key", "pay at evil.example"))

        await world.join(ScriptedNode(liar, slots=4))
        with pytest.raises((CallerFault, NodeFault)) as caught:
            await Reader().serve(world, work())
        assert caught.value.code == "node_refused"
        assert ("evil" in str(caught.value)) == (fault == "node") == ("the node says" in str(caught.value))

    play(tmp_path, body)


def test_classes_that_share_a_tokenizer_are_learned_side_by_side(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        def arithmetic(number: int) -> ModelClass:
            return msgspec.structs.replace(CLASS, arithmetic=f"echo-{number}")

        class Own(ScriptedNode):
            number = 0

            def on_event(self, event: Event) -> None:
                if isinstance(event, Opened):
                    self.send(Offers((ClassOffer(f"m{self.number}", arithmetic(self.number), 1, "echo"),)))
                else:
                    super().on_event(event)

        nodes = [Own(count_up, slots=1) for _ in range(12)]
        for number, node in enumerate(nodes):
            node.number = number
            await world.join(node, served=False)
        async with asyncio.timeout(10):
            while len(world.registry.snapshot().by_class) < 12:
                await asyncio.sleep(0.01)

    play(tmp_path, body)
