"""Live conversations with nodes: authenticate, learn what they offer, carry works.

Nothing a node says is believed: text files are checked against the class id before anybody reads them, the link
refuses ids beyond the credit given, and a work's place on a node is free only when the node said its last word on it or
is gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, Protocol

from gridmill.network.accounts import Accounts, KeyId
from gridmill.network.metering import PriceRow
from gridmill.network.registry import TIER_INVITED, NodeRecord, Registry
from gridmill.network.store import StoreUnusable
from gridmill.network.text import TextError, TextService
from gridmill.wire.classes import TEXT_FACTS_BYTES_MAX, TOKENIZER_BYTES_MAX, ClassId, parse_facts
from gridmill.wire.codec import clip
from gridmill.wire.link import Arrived, Closed, Opened, Proven, Reason
from gridmill.wire.messages import (
    Accept,
    AnyMessage,
    Cancel,
    Chunk,
    ClassOffer,
    Countersigned,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Generate,
    Heartbeat,
    Listed,
    Listing,
    NodeId,
    Offer,
    Offers,
    Refuse,
    Step,
)
from gridmill.wire.transport import Conversation

log = logging.getLogger("gridmill.network.links")

STREAM_CREDIT_IDS = 256  # what one slow reader can make a node run ahead; a second or two of fast decoding
CREDIT_GRANT_IDS_MIN = 64  # granting in quarters keeps Credit frames rare without ever starving a stream
GAP_MEMORY = 0.2  # weight of the newest gap between the pieces of a stream
PAUSES_MAX = 4  # in a row: a node that says nothing else is as good as silent
STOOD_STILL_SECONDS = 0.5  # a timer that is this late says something about this program, not about a node
FETCH_TIMEOUT_SECONDS = 120.0  # 64 MiB at 5 Mbit/s; slower nodes try again at their next join
OFFERS_PER_NODE_MAX = 64
OFFERS_PAUSE_SECONDS = 1.0  # each change of a price is a row for ever, so a node gets one look a second
CANCEL_ANSWER_SECONDS = 30.0  # a live node answers a Cancel at once; one that never does would keep the place for ever
DATABASE_PAUSE_SECONDS = 2.0  # before offers are looked at again that the database kept from being served
OFFERS_AT_ONCE = 8  # of which so many may come together: models that load one after the other


class Receipts(Protocol):
    """What a desk for receipts wants to hear of nodes (`receipts.Desk`). None of it blocks."""

    def joined(self, node_id: NodeId) -> None: ...

    def left(self, node_id: NodeId) -> None: ...

    def countersigned(self, node_id: NodeId, message: Countersigned) -> None: ...


class NoReceipts:
    """For a network that keeps none, such as a test's."""

    def joined(self, node_id: NodeId) -> None: ...

    def left(self, node_id: NodeId) -> None: ...

    def countersigned(self, node_id: NodeId, message: Countersigned) -> None: ...


class LinkLost(Exception):
    """The conversation ended while a work or a transfer was on it. `stopping`: because this network stops."""

    def __init__(self, why: str, *, stopping: bool = False) -> None:
        super().__init__(why)
        self.stopping = stopping


class NodeSilent(Exception):
    """Nothing came from a node for as long as it was given."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class NodeLeaves(Exception):
    """The node drains: whoever reads this stream may look for another. All that it sent before has been taken."""


class NodeStream:
    """One Work on one node. The link's reader pushes, one task waits; what is pushed is bounded by the credit given."""

    def __init__(self, number: int, on_end: Callable[[], None]) -> None:
        self.number = number
        self.reply: Accept | Refuse | None = None
        self.end: End | None = None
        self.lost: LinkLost | None = None
        self._emissions: list[Emission] = []
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.Future[None] | None = None
        self._patience_seconds = 0.0
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.gap_seconds = 0.0  # the usual time between two pieces of this stream
        self.pause_patience_seconds = 0.0  # how long after an announced pause
        self._pauses_left = PAUSES_MAX  # until it sends something again
        self._paused = False
        self._paused_until = 0.0  # counted from the announcement, however often somebody looks in between
        self._pushed_at = 0.0
        self._nudged = False
        self._nudge_timer: asyncio.TimerHandle | None = None
        self._last_timer: asyncio.TimerHandle | None = None
        self._on_end = on_end
        self._ended = False
        self._over: Callable[[], object] | None = None

    def when_over(self, callback: Callable[[], object]) -> None:
        """Calls back once, when the node has said its last word or is gone; at once if that was before."""
        if self._ended:
            callback()
        else:
            self._over = callback

    async def answer(self, patience_seconds: float) -> Accept | Refuse:
        """What the node said to the offer. Raises LinkLost, or NodeSilent when it says nothing for that long."""
        while self.reply is None:
            if self.lost is not None:
                raise self.lost
            await self._roused_within(patience_seconds)
        return self.reply

    async def take(self, patience_seconds: float) -> list[Emission]:
        """All emissions since the last call; empty only when the node has nothing more to say.

        Raises LinkLost, NodeSilent when nothing comes for that long, or NodeLeaves once after each `nudge`.
        """
        while not self._emissions:
            if self.end is not None:
                return []
            if self.lost is not None:
                raise self.lost
            if self._nudged:
                self._nudged = False
                raise NodeLeaves
            paused_seconds = self._paused_until - self._loop.time() if self._paused else 0.0
            await self._roused_within(max(patience_seconds, paused_seconds))
        taken, self._emissions = self._emissions, []
        return taken

    def nudge(self) -> None:
        """Makes `take` raise NodeLeaves when it has nothing else to give."""
        self._nudged = True
        self._rouse()

    def nudge_later(self, seconds: float) -> None:
        if not self._ended:
            self._nudge_timer = self._loop.call_later(seconds, self.nudge)

    @property
    def paused(self) -> bool:
        """Whether the node said that this work waits for a place, and has sent nothing of it since."""
        return self._paused

    def last_word_within(self, seconds: float, otherwise: Callable[[], None]) -> None:
        """Calls `otherwise` when the node has not ended this stream by then."""
        if not self._ended and self._last_timer is None:
            self._last_timer = self._loop.call_later(seconds, otherwise)

    def pause(self) -> None:
        """The node says that this work lost its place for a while. Not often: it must send something in between."""
        if self._pauses_left:
            self._pauses_left -= 1
            self._paused = True
            self._paused_until = self._loop.time() + self.pause_patience_seconds
            self._rouse()  # whoever waits goes on to wait, for longer

    async def _roused_within(self, seconds: float) -> None:
        """One timer for all waits of a stream, moved on only when it fires: there is a wait for each engine step."""
        self._wake = self._loop.create_future()
        self._patience_seconds = seconds
        self._deadline = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._time_passed)
        elif self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._time_passed)
        await self._wake

    def _time_passed(self) -> None:
        self._timer = None
        if self._ended or self._wake is None or self._wake.done():
            return  # nobody waits; the next wait sets the timer
        seconds_left = self._deadline - self._loop.time()
        if seconds_left < -STOOD_STILL_SECONDS:
            # The timer itself came late: this program stood still, and what the node sent may wait to be read.
            seconds_left = self._patience_seconds
            self._deadline = self._loop.time() + seconds_left
        if seconds_left > 0:
            self._timer = self._loop.call_later(seconds_left, self._time_passed)
        else:
            self._wake.set_exception(NodeSilent(self._patience_seconds))

    def push(self, emission: Emission) -> None:
        self._emissions.append(emission)
        now = self._loop.time()
        if self._pushed_at:
            # A gap that a slow reader made is no news of the node: no more of it counts than a node would be given.
            gap = min(now - self._pushed_at, self._patience_seconds)
            self.gap_seconds += GAP_MEMORY * (gap - self.gap_seconds)
        self._pushed_at = now
        if self._paused:
            self._paused = False
            self._pauses_left = PAUSES_MAX
        wake = self._wake
        if wake is not None and not wake.done():
            wake.set_result(None)

    def accept(self, acceptance: Accept) -> None:
        if self.reply is None:
            self.reply = acceptance
            self._rouse()

    def finish(self, end: End) -> None:
        self.end = end
        self._close()

    def refuse(self, refusal: Refuse) -> None:
        if self.reply is None:
            self.reply = refusal
        self._close()

    def lose(self, lost: LinkLost) -> None:
        self.lost = lost
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            for timer in (self._timer, self._nudge_timer, self._last_timer):
                if timer is not None:
                    timer.cancel()
            self._timer = self._nudge_timer = self._last_timer = None
            self._on_end()
            if self._over is not None:
                self._over()
        self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class _Wanted:
    """One Offers message, told apart from an equal one that came later."""

    def __init__(self, offers: tuple[ClassOffer, ...]) -> None:
        self.offers = offers


class _Transfer:
    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.data = bytearray()
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()


class NodeLink:
    """The network's end of one node's conversation."""

    def __init__(self, conversation: Conversation, links: Links) -> None:
        self._conversation = conversation
        self._links = links
        self.record: NodeRecord | None = None
        self.key_id: KeyId | None = None  # of the invitation it came with
        self.progressed_at = links.clock()  # when it last sent ids, of whichever work
        self._streams: dict[int, NodeStream] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._grants: dict[int, int] = {}
        self._granting = False
        self._one_fetch = asyncio.Lock()
        self.offers_due = 0.0  # by the loop's clock: when the looks at its offers so far were due, one a pause

    # ------------------------------------------------------------ for dispatch

    @property
    def can_open(self) -> bool:
        """Whether the link can carry one more work: a node may promise more places than a link has streams."""
        return self._conversation.link.can_offer

    def open(self, work: Generate, class_id: ClassId) -> NodeStream:
        """Offers the work; the node answers on the stream."""
        record = self.record
        assert record is not None, "only joined nodes are offered work"
        number = self._conversation.link.next_stream()

        def ended() -> None:
            self._streams.pop(number, None)
            self._grants.pop(number, None)
            self._links.registry.end(record, class_id)
            self._links.work_ended()

        stream = NodeStream(number, ended)
        self._streams[number] = stream
        self._links.registry.begin(record, class_id)
        self._conversation.send(Offer(number, work, STREAM_CREDIT_IDS))
        return stream

    def grant(self, stream: NodeStream, ids: int) -> None:
        """The reader took that many ids. Grants of one turn of the loop leave in one frame."""
        if stream.number not in self._streams:
            return
        owed = self._grants.get(stream.number, 0) + ids
        self._grants[stream.number] = owed
        if owed >= CREDIT_GRANT_IDS_MIN and not self._granting:
            self._granting = True
            asyncio.get_running_loop().call_soon(self._send_grants)

    def cancel(self, stream: NodeStream, keep: int = -1) -> None:
        """Asks the node to stop; its place is free when it says so, or has said nothing for so long that it is cut."""
        if stream.number in self._streams:
            self._conversation.send(Cancel(stream.number, keep))
            stream.last_word_within(CANCEL_ANSWER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._conversation.close(Reason.CANCEL_UNANSWERED, "join again: this link is full of works that never end")

    def _send_grants(self) -> None:
        self._granting = False
        due = {number: ids for number, ids in self._grants.items() if ids >= CREDIT_GRANT_IDS_MIN}
        for number in due:
            del self._grants[number]
        if due:
            self._conversation.send(Credit(tuple(due.items())))

    # ------------------------------------------------------------ files

    async def fetch(self, sha256: str, bytes_max: int) -> bytes:
        """A file by digest, checked. Raises LinkLost, or ValueError when the node lied. One at a time on each link."""
        async with self._one_fetch:
            link = self._conversation.link
            if not link.can_fetch:
                raise LinkLost("the link is closing")
            number = link.next_transfer()
            transfer = self._transfers[number] = _Transfer(bytes_max)
            self._conversation.send(Fetch(number, sha256))
            try:
                async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
                    data = await transfer.done
            except TimeoutError:
                # A transfer cannot be withdrawn, and a node that does not hand out its files serves nobody.
                self._conversation.close(Reason.STOPPING, f"a text file took over {FETCH_TIMEOUT_SECONDS:.0f} s")
                raise LinkLost("the node did not send its text files in time") from None
            finally:
                self._transfers.pop(number, None)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"sent a file whose digest is not {sha256[:12]}…")
        return data

    def _chunk(self, chunk: Chunk) -> None:
        transfer = self._transfers.get(chunk.transfer)
        if transfer is None or transfer.done.done():
            return
        if chunk.total_bytes < 0:
            transfer.done.set_exception(ValueError("does not have a text file of the class it offers"))
        elif chunk.total_bytes > transfer.bytes_max:
            transfer.done.set_exception(ValueError(f"a text file has {chunk.total_bytes} bytes, over the limit"))
        else:
            transfer.data += chunk.data
            if len(transfer.data) == chunk.total_bytes:
                transfer.done.set_result(bytes(transfer.data))

    # ------------------------------------------------------------ events of the link

    def handle(self, event: object) -> None:
        match event:
            case Arrived(message=Step(emissions=emissions, ends=ends, paused=paused)):
                streams = self._streams
                if emissions:
                    self.progressed_at = self._links.clock()
                for number in paused:
                    if number in streams:
                        streams[number].pause()
                for emission in emissions:
                    stream = streams.get(emission.stream)
                    if stream is not None:
                        stream.push(emission)
                for end in ends:
                    stream = streams.get(end.stream)
                    if stream is not None:
                        stream.finish(end)
            case Arrived(message=Accept(stream=number) as accept):
                if number in self._streams:
                    self._streams[number].accept(accept)
            case Arrived(message=Refuse(stream=number) as refusal):
                if number in self._streams:
                    self._streams[number].refuse(refusal)
            case Arrived(message=Heartbeat(telemetry=telemetry)):
                if self.record is not None and telemetry is not None:
                    self.record.telemetry = telemetry
                    self.record.round_trip_seconds = self._conversation.link.round_trip_seconds or 0.0
            case Arrived(message=Offers(offers=offers)):
                self._links.consider(self, offers)
            case Arrived(message=Chunk() as chunk):
                self._chunk(chunk)
            case Arrived(message=Drain()):
                if self.record is not None:
                    self._links.registry.drain(self.record)
                    log.info("node drains", extra={"node": self.record.node_id})
                    for stream in tuple(self._streams.values()):
                        stream.nudge()
            case Arrived(message=Countersigned() as said):
                if self.record is not None and self._links.find(self.record.node_id) is self:
                    self._links.receipts.countersigned(self.record.node_id, said)
            case Proven() as proven:
                self._links.judge(self, proven)
            case Opened():
                self._links.opened(self)
            case Closed() as closed:
                self._lose(closed)
            case _:
                pass  # Everything else is the link's own business, already checked against its table.

    def _lose(self, closed: Closed) -> None:
        why = str(closed)
        for stream in tuple(self._streams.values()):
            stream.lose(LinkLost(why, stopping=self._links.stopping))
        for transfer in self._transfers.values():
            if not transfer.done.done():
                transfer.done.set_exception(LinkLost(why))
        self._links.closed(self, closed)

    # ------------------------------------------------------------ for Links

    @property
    def conversation(self) -> Conversation:
        return self._conversation

    @property
    def works(self) -> int:
        return len(self._streams)


class Links:
    """All live conversations, by node id."""

    def __init__(
        self,
        *,
        registry: Registry,
        accounts: Accounts,
        texts: TextService,
        text_folder: Path,
        invite_only: bool,
        own_nodes: Collection[NodeId] = (),
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        clock: Callable[[], float],
        receipts: Receipts | None = None,
    ) -> None:
        """`clock` is monotonic seconds."""
        self.registry = registry
        self.clock = clock
        self.receipts: Receipts = receipts or NoReceipts()
        self._accounts = accounts
        self._texts = texts
        self._text_folder = text_folder
        self._invite_only = invite_only
        self._own_nodes = frozenset(own_nodes)
        self._spawn = spawn
        self._by_node: dict[NodeId, NodeLink] = {}
        self._all: set[NodeLink] = set()
        self._learning: dict[ClassId, asyncio.Lock] = {}
        self._latest_offers: dict[NodeLink, _Wanted] = {}
        self._considering: set[NodeLink] = set()
        self._idle_waiters: list[asyncio.Future[None]] = []
        self.stopping = False

    async def idle(self) -> None:
        """Returns when no work is on any node."""
        while self.works:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def work_ended(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def find(self, node_id: NodeId) -> NodeLink | None:
        return self._by_node.get(node_id)

    def send(self, node_id: NodeId, message: AnyMessage) -> bool:
        """Hands a message to a node that is here; False when it is not."""
        node_link = self._by_node.get(node_id)
        if node_link is None or not node_link.conversation.link.at_work:
            return False
        node_link.conversation.send(message)
        return True

    async def converse(self, conversation: Conversation) -> None:
        """Runs one node's conversation to its end."""
        node_link = NodeLink(conversation, self)
        self._all.add(node_link)
        await conversation.run(node_link.handle)

    @property
    def count(self) -> int:
        return len(self._by_node)

    def judge(self, node_link: NodeLink, proven: Proven) -> None:
        """A node has proven its key. May it join?"""
        if self._invite_only and proven.node_id not in self._own_nodes:
            account = self._accounts.authenticate(proven.join_token)
            if account is None or "node" not in account.scopes:
                node_link.conversation.refuse(
                    Reason.JOIN_REFUSED,
                    "this network takes nodes by invitation: ask its operator for a token from "
                    "`gridmill keys create NAME --scope node` and pass it as --join-token",
                )
                return
            node_link.key_id = account.key_id
        elif (account := self._accounts.authenticate(proven.join_token)) is not None and "node" in account.scopes:
            node_link.key_id = account.key_id  # nobody asked for it; its account sees what the node earns all the same
        older = self._by_node.pop(proven.node_id, None)
        if older is not None:
            older.conversation.close(Reason.SUPERSEDED, "the same node joined again")
        node_link.record = self.registry.join(proven.node_id, proven.owner_id, proven.software, proven.node_key)
        if node_link.key_id is not None:
            node_link.record.tier = max(node_link.record.tier, TIER_INVITED)
        self._by_node[proven.node_id] = node_link
        node_link.conversation.admit()

    def opened(self, node_link: NodeLink) -> None:
        assert node_link.record is not None
        log.info("node joined", extra={"node": node_link.record.node_id, "owner": node_link.record.owner_id})
        self.receipts.joined(node_link.record.node_id)
        if node_link.key_id is not None:
            self._spawn(self._note(node_link.record.node_id, node_link.key_id))

    async def _note(self, node_id: NodeId, key_id: KeyId) -> None:
        try:
            await self._accounts.note_node(node_id, key_id)
        except StoreUnusable as problem:
            log.warning("who owns a node could not be noted", extra={"node": node_id, "reason": str(problem)})

    def closed(self, node_link: NodeLink, closed: Closed) -> None:
        self._all.discard(node_link)
        self._latest_offers.pop(node_link, None)
        record = node_link.record
        if record is not None:
            if self._by_node.get(record.node_id) is node_link:
                del self._by_node[record.node_id]
                self.receipts.left(record.node_id)
            self.registry.leave(record)
        log.info(
            "node left",
            extra={
                "node": record.node_id if record else None,
                "reason": str(closed.reason),
                "sentence": str(closed),
            },
        )

    def consider(self, node_link: NodeLink, offers: tuple[ClassOffer, ...]) -> None:
        """New offers: learn classes that are not known yet, then serve them. One task per link, however many come."""
        self._latest_offers[node_link] = _Wanted(offers[:OFFERS_PER_NODE_MAX])
        if node_link not in self._considering:
            self._considering.add(node_link)
            self._spawn(self._consider_latest(node_link))

    def reconsider(self) -> None:
        """The names changed: everybody's offers are looked at again."""
        for node_link, wanted in list(self._latest_offers.items()):
            self.consider(node_link, wanted.offers)

    async def _consider_latest(self, node_link: NodeLink) -> None:
        done: _Wanted | None = None
        try:
            while (wanted := self._latest_offers.get(node_link)) is not None and wanted is not done:
                now = asyncio.get_running_loop().time()
                early = node_link.offers_due - now - OFFERS_AT_ONCE * OFFERS_PAUSE_SECONDS
                if early > 0:
                    await asyncio.sleep(early)
                    continue  # with whatever the node said last
                node_link.offers_due = max(now, node_link.offers_due) + OFFERS_PAUSE_SECONDS
                if await self._learn_and_serve(node_link, wanted):
                    done = wanted
                else:
                    await asyncio.sleep(DATABASE_PAUSE_SECONDS)
        finally:
            self._considering.discard(node_link)

    async def _learn_and_serve(self, node_link: NodeLink, wanted: _Wanted) -> bool:
        """False when the database did not answer, and it is to be tried again."""
        record = node_link.record
        assert record is not None
        served: list[ClassOffer] = []
        prices: dict[ClassId, PriceRow] = {}
        held_back: list[ClassOffer] = []
        listings: list[Listing] = []
        # A class has one price on a node: of several offers of one, the last counts.
        for offer in {offer.model_class.class_id: offer for offer in wanted.offers}.values():
            if not self.registry.may_serve(offer, record.node_id):
                held_back.append(offer)
                listings.append(_not_served(offer, "its class waits for the operator: `gridmill classes approve`"))
                log.warning(
                    "an offer waits for `gridmill classes approve`",
                    extra={"node": record.node_id, "offer": offer.name, "class": offer.model_class.class_id[:8]},
                )
                continue
            try:
                await self._learn(node_link, offer)
                class_id = offer.model_class.class_id
                prices[class_id] = await self.registry.price_row(record.node_id, class_id, offer.price)
                if self.registry.may_name(record.node_id):
                    await self.registry.approve(offer.name, class_id, by=record.node_id)
            except LinkLost:
                return True
            except StoreUnusable as problem:
                log.warning(
                    "an offer waits for the database",
                    extra={"node": record.node_id, "offer": offer.name, "reason": str(problem)[:300]},
                )
                return False
            except (ValueError, RecursionError, TextError, OSError) as problem:
                # The node's files, or our own disk: either way this offer alone is not served, and the log says why.
                log.warning(
                    "an offer cannot be served",
                    extra={"node": record.node_id, "offer": offer.name, "reason": str(problem)[:300]},
                )
                listings.append(_not_served(offer, f"the network could not use its text files: {problem}"))
                continue
            served.append(offer)
            listings.append(Listing(offer.name, offer.model_class.class_id, True))
        if self._latest_offers.get(node_link) is not wanted:
            return True  # The node said something newer, or left, while its files were on the way.
        self.registry.hold_back(record, held_back)
        self.registry.offer(record, served, prices)
        node_link.conversation.send(Listed(tuple(listings)))
        log.info("node serves", extra={"node": record.node_id, "models": [offer.name for offer in served]})
        return True

    async def _learn(self, node_link: NodeLink, offer: ClassOffer) -> None:
        class_id = offer.model_class.class_id
        async with self._learning.setdefault(class_id, asyncio.Lock()):
            if self.registry.has_text(class_id):
                return
            model_class = offer.model_class
            facts = parse_facts(await self._file(node_link, model_class.text_facts_sha256, TEXT_FACTS_BYTES_MAX))
            await self._file(node_link, model_class.tokenizer_sha256, TOKENIZER_BYTES_MAX)
            text = await self._texts.register(class_id, self._text_folder / model_class.tokenizer_sha256, facts)
            await self.registry.learn_class(model_class, facts, text)

    async def _file(self, node_link: NodeLink, sha256: str, bytes_max: int) -> bytes:
        """From our own folder when its digest still holds, else from the node."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError("offers a class whose digests are not SHA-256")
        path = self._text_folder / sha256
        if path.exists():
            data = await asyncio.to_thread(path.read_bytes)
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        data = await node_link.fetch(sha256, bytes_max)
        await asyncio.to_thread(_write_whole, path, data)
        return data

    async def relearn(self) -> None:
        """After a restart: classes whose files are still here need no node to come back first."""
        for class_id, (model_class, facts, _) in list(self.registry.known_classes().items()):
            path = self._text_folder / model_class.tokenizer_sha256
            if not path.exists() or self.registry.has_text(class_id):
                continue
            data = await asyncio.to_thread(path.read_bytes)
            if hashlib.sha256(data).hexdigest() != model_class.tokenizer_sha256:
                continue  # A half-written file from before: the next node that offers the class brings it again.
            try:
                text = await self._texts.register(class_id, path, facts)
            except TextError as problem:
                log.warning("a class cannot be read again", extra={"class": class_id[:8], "reason": str(problem)[:300]})
                continue
            await self.registry.learn_class(model_class, facts, text)

    def revoke(self, key_ids: Collection[KeyId]) -> None:
        """Whoever came with one of these invitations leaves now."""
        for node_link in tuple(self._all):
            if node_link.key_id in key_ids:
                node_link.conversation.close(Reason.JOIN_REFUSED, "the token that this node came with was revoked")

    def say_goodbye(self, reason: Reason, detail: str) -> None:
        self.stopping = True
        for node_link in tuple(self._all):
            node_link.conversation.close(reason, detail)

    @property
    def works(self) -> int:
        return sum(node_link.works for node_link in self._by_node.values())


def _not_served(offer: ClassOffer, detail: str) -> Listing:
    return Listing(offer.name, offer.model_class.class_id, False, clip(detail))


def _write_whole(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two classes may share a tokenizer and be learned at once: each writer has a part of its own.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name[:16], suffix=".part", delete=False) as part:
        part.write(data)
    Path(part.name).replace(path)
