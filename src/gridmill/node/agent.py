"""The node's end of one link: offers become runs of an engine, and what the runs emit becomes Step messages.

1. Every accepted Work gets exactly one End, whatever becomes of its engine; a refused one gets a Refuse and no more.
2. Ids leave only against credit. Awaiting credit is what makes an engine wait for a slow reader.
3. Every work that was accepted is in the outbox before its End leaves, and the End carries the node's claim.
4. All that is emitted in one turn of the event loop, which is one engine step, leaves as one Step. Steps that follow at
   once, as only a toy engine's can, share frames: a frame costs both ends more than the ids in it.

An engine refuses before it first waits (admission.py), so whether to accept is known one turn after a run began.
No socket and no clock here: a link and a fake cable look the same from this file.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec

from gridmill.node.engines.base import Artifact, Engine, Event, Failed, Finished, Log, Paused, Refused, Tokens
from gridmill.node.outbox import Ended, Outbox
from gridmill.wire import receipts as rules
from gridmill.wire.codec import CHUNK_BYTES_MAX
from gridmill.wire.link import Arrived, Closed, Opened
from gridmill.wire.link import Event as LinkEvent
from gridmill.wire.messages import (
    Accept,
    Acknowledged,
    AnyMessage,
    Cancel,
    Chunk,
    ClassOffer,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Listed,
    Offer,
    Offers,
    Price,
    Receipts,
    Refuse,
    Step,
    Telemetry,
)
from gridmill.wire.sampling import TokenLogprob, pack_ids

log = logging.getLogger("gridmill.node")

EMISSION_IDS_MAX = 1024  # with 20 top logprobs each this is 300 kB, a third of what one Step may weigh
STEP_BYTES_SOFT_MAX = 256 << 10  # a Step that reaches it leaves before the turn of the loop ends
ID_BYTES, LOGPROB_BYTES = 5, 15  # most that an id, and an (id, logprob) pair, take as MessagePack
STEP_TURNS = 16  # from one Step to the next, unless nothing runs any more; turns of an idle loop take microseconds
CHUNKS_AHEAD = 2  # file chunks that wait in the link: one leaving, one ready
PIECES_UNPACKED_MAX = 256  # emissions of a work kept as they came; packing them is 10 times smaller, and not free
RECEIPTS_WAITING_MAX = 8  # messages; the network has two on the way at most, and what is dropped comes again
LOGPROB_MIN = -9999.0  # what OpenAI reports for "as good as impossible"; minus infinity has no place in JSON
FREE = Price()


class Channel(Protocol):
    """What an agent needs of a Conversation."""

    def send(self, message: AnyMessage) -> None: ...

    async def bulk_below(self, size: int) -> None: ...


@asynccontextmanager
async def agent_on(
    engines: Iterable[Engine], channel: Channel, *, outbox: Outbox | None = None, price: Price = FREE, region: str = ""
) -> AsyncIterator[Agent]:
    """An Agent whose works all live inside this context: leaving it cancels what still runs and waits for it.

    `price` is asked for every class. Without an outbox the node keeps no receipts and signs none.
    """
    async with asyncio.TaskGroup() as group:
        agent = Agent(engines, channel, group, outbox, price, region)
        try:
            yield agent
        finally:
            agent.abandon()


class Agent:
    """Feed it the link's events with `on_event`; it answers on the channel. Made by `agent_on`."""

    def __init__(
        self,
        engines: Iterable[Engine],
        channel: Channel,
        group: asyncio.TaskGroup,
        outbox: Outbox | None,
        price: Price,
        region: str = "",
    ) -> None:
        self._engines = {engine.served.model_class.class_id: engine for engine in engines}
        self._channel = channel
        self._group = group
        self._outbox = outbox
        self._price = price
        self._region = region
        self._network_key = b""
        self._receipts: deque[Receipts] = deque()
        self._answering = False
        self._works: dict[int, _Work] = {}
        self._emissions: dict[int, Emission] = {}
        self._ends: list[End] = []
        self._paused: set[int] = set()
        self._step_bytes = 0
        self._flush_due = False
        self.step_turns = STEP_TURNS  # fewer where turns cost more than frames, as in a simulation
        self._turns_to_wait = 0
        self._open = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        return len(self._works)

    def on_event(self, event: LinkEvent) -> None:
        """One event of the link. Never blocks; a closed link cancels everything that ran on it."""
        match event:
            case Opened(network_key=network_key):
                self._open = True
                self._network_key = network_key
                offers = (offer_of(engine, self._price, self._region) for engine in self._engines.values())
                self._channel.send(Offers(tuple(offers)))
                if self._outbox is not None:
                    self._spawn(self._sign_again(self._outbox), "countersignatures")
            case Arrived(message=message):
                self._heard(message)
            case Closed():
                self.abandon()

    def telemetry(self) -> Telemetry:
        """All engines together."""
        parts = [engine.telemetry() for engine in self._engines.values()]
        return Telemetry(
            running=sum(part.running for part in parts),
            waiting=sum(part.waiting for part in parts),
            kv_pages_used=sum(part.kv_pages_used for part in parts),
            kv_pages_total=sum(part.kv_pages_total for part in parts),
            tokens_per_second=sum(part.tokens_per_second for part in parts),
            memory_bytes=max((part.memory_bytes for part in parts), default=0),
        )

    async def drain(self, deadline_seconds: float) -> None:
        """Says that this node leaves, refuses what is new, lets works finish, and fails those that do not in time."""
        self._draining = True
        if self._open:
            self._channel.send(Drain(deadline_seconds))
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d works did not finish within %.0f s and are given up", len(self._works), deadline_seconds)
            for work in self._works.values():
                work.end = work.end or Failed("node_leaving", "the node left before this work had finished")
                work.task.cancel()
            await self._idle.wait()
        self._flush()

    def abandon(self) -> None:
        """The link is gone: nobody is left to hear of these works."""
        self._open = False
        self._draining = True
        self._emissions.clear()
        self._ends.clear()
        self._paused.clear()
        for work in self._works.values():
            work.task.cancel()

    # ------------------------------------------------------------ what the network says

    def _heard(self, message: AnyMessage) -> None:
        match message:
            case Offer():
                self._offered(message)
            case Credit(grants=grants):
                for stream, ids in grants:
                    if stream in self._works:
                        self._works[stream].grant(ids)
            case Cancel(stream=stream, keep=keep):
                # An End counts what was sent, which both ends can check; `keep` says how much of it the claim covers.
                if stream in self._works:
                    self._works[stream].keep = keep
                    self._works[stream].task.cancel()
            case Fetch(transfer=transfer, sha256=sha256):
                self._spawn(self._send_file(transfer, sha256), f"transfer {transfer}")
            case Listed(listings=listings):
                for listing in listings:
                    if listing.served:
                        log.info("the network serves %s", listing.name, extra={"class": listing.class_id[:8]})
                    else:
                        log.warning("the network does not serve %s yet: %s", listing.name, listing.detail)
            case Receipts() if self._outbox is not None and len(self._receipts) < RECEIPTS_WAITING_MAX:
                self._receipts.append(message)
                if not self._answering:
                    self._answering = True
                    self._spawn(self._countersign(self._outbox), "receipts")
            case Acknowledged() if self._outbox is not None:
                self._outbox.acknowledged(self._network_key, message)
            case Drain(deadline_seconds=seconds):
                log.info("the network is stopping within %.0f s; nothing new will come from it", seconds)
            case _:
                pass  # heartbeats are the link's own business

    def _offered(self, offer: Offer) -> None:
        engine = self._engines.get(offer.work.class_id)  # type: ignore[call-overload]
        if self._draining:
            self._refuse(offer.stream, Refused("node", "draining", "this node is leaving"))
        elif engine is None:
            self._refuse(offer.stream, Refused("node", "wrong_class", "this node does not serve that class"))
        elif offer.work.price != self._price:
            # It never changes while this program runs; the network's record of the price is older than this program.
            self._refuse(offer.stream, Refused("node", "wrong_price", "this node does not work for that price"))
        else:
            work = _Work(offer, engine.served.facts.vocab_size)
            self._works[offer.stream] = work
            self._idle.clear()
            work.task = self._spawn(self._run(engine, work), f"work {offer.work.work_id}")
            work.task.add_done_callback(lambda task: self._ended(work))
            asyncio.get_running_loop().call_soon(self._answer_next_turn, work)

    def _spawn(self, body: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return self._group.create_task(body, name=name)

    async def _send_file(self, transfer: int, sha256: str) -> None:
        """A text file of a class that we serve, in chunks; the next is read only when the line has taken the last."""
        data = next((e.served.files[sha256] for e in self._engines.values() if sha256 in e.served.files), None)
        if not data:
            self._send(Chunk(transfer, 0, -1 if data is None else 0, b""))
            return
        for offset in range(0, len(data), CHUNK_BYTES_MAX):
            await self._channel.bulk_below(CHUNKS_AHEAD * CHUNK_BYTES_MAX)
            if not self._open:
                return
            self._send(Chunk(transfer, offset, len(data), data[offset : offset + CHUNK_BYTES_MAX]))

    # ------------------------------------------------------------ receipts

    async def _countersign(self, outbox: Outbox) -> None:
        while self._receipts:
            answer = await outbox.answer(self._network_key, self._receipts.popleft())
            if answer is not None:
                self._send(answer)
        self._answering = False

    async def _sign_again(self, outbox: Outbox) -> None:
        """What the network has not said to have."""
        for message in await outbox.unacknowledged(self._network_key):
            self._send(message)

    def _claim(self, outbox: Outbox, work: _Work) -> bytes:
        """Writes the work down as this node saw it, and returns its claim on the output that counts."""
        asked = work.offer.work
        ids = work.sent()
        most = len(ids) // 4
        kept = most if work.keep < 0 else min(most, max(0, work.keep - work.first))
        claim = outbox.claim(asked.work_id, asked.epoch, asked.class_id, rules.ids_hash(asked.salt, ids[: 4 * kept]))
        given = (len(asked.prompt) + len(asked.delivered)) // 4
        outbox.record(
            Ended(
                network_key=self._network_key,
                work_id=asked.work_id,
                epoch=asked.epoch,
                class_id=asked.class_id,
                price=asked.price,
                salt=asked.salt,
                prompt=asked.prompt,
                input_tokens=given,
                start=work.first,
                ids=ids,
                kept=kept,
                claim=claim,
            )
        )
        return claim

    # ------------------------------------------------------------ one work

    async def _run(self, engine: Engine, work: _Work) -> None:
        async def emit(event: Event) -> None:
            match event:
                case Tokens(ids=ids, logprobs=logprobs):
                    work.check(ids, logprobs)
                    if logprobs is None and len(ids) <= work.credit and len(ids) <= EMISSION_IDS_MAX:
                        self._queue(work, ids, None)  # by far the most: nothing to wait for, nothing to repair
                    else:
                        await self._take(work, ids, logprobs)
                case Finished() | Failed() | Refused():
                    work.end = event
                case Paused():
                    if work.answered:  # before the Accept nobody counts the seconds between ids
                        self._paused.add(work.offer.stream)
                        self._flush_soon()
                case Log(line=line):
                    log.info("work %s: %s", work.offer.work.work_id, line)
                case Artifact():
                    raise BrokenEngine("it made an artifact, which works of this kind do not have")

        try:
            await engine.run(work.offer.work, emit)
        except Exception as error:  # the one place that turns an engine's bug into an End
            log.exception("the %s engine broke on work %s", engine.kind, work.offer.work.work_id)
            # The text of a stranger's exception may hold a prompt, so only its kind goes out.
            detail = str(error) if isinstance(error, BrokenEngine) else type(error).__name__
            work.end = Failed("engine_error", f"the node's engine broke: {detail}")

    async def _take(self, work: _Work, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> None:
        """Queues ids for the next Step as far as credit reaches, waits for more, and so on."""
        start = 0
        while start < len(ids):
            while work.credit <= 0:
                await work.more_credit()
            end = min(len(ids), start + work.credit, start + EMISSION_IDS_MAX)
            whole = start == 0 and end == len(ids)
            part = logprobs if whole or logprobs is None else logprobs[start:end]
            self._queue(work, ids if whole else ids[start:end], _finite(part))
            start = end

    def _queue(self, work: _Work, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> None:
        if not self._open:
            return
        work.note(ids)
        stream = work.offer.stream
        waiting = self._emissions.get(stream)
        if waiting is None:
            self._emissions[stream] = Emission(stream, work.position, ids, logprobs)
        else:
            both = waiting.logprobs + logprobs if waiting.logprobs is not None and logprobs is not None else None
            self._emissions[stream] = Emission(stream, waiting.position, waiting.ids + ids, both)
        count = len(ids)
        work.position += count
        work.credit -= count
        self._step_bytes += count * ID_BYTES
        if logprobs is not None:
            self._step_bytes += sum((len(entry.top) + 1) * LOGPROB_BYTES for entry in logprobs)
        if self._step_bytes >= STEP_BYTES_SOFT_MAX:
            self._flush()
        elif not self._flush_due:
            self._flush_soon()

    def _answer_next_turn(self, work: _Work) -> None:
        """Ids that an engine has at once go first and take the Accept along: one frame less to send and to read."""
        asyncio.get_running_loop().call_soon(self._answer, work)

    def _answer(self, work: _Work) -> None:
        """After the run began: what it refused was refused by now."""
        if work.answered or not self._open:
            return
        work.answered = True
        if isinstance(work.end, Refused):
            self._refuse(work.offer.stream, work.end)
            work.refused = True
        else:
            self._send(Accept(work.offer.stream))

    def _ended(self, work: _Work) -> None:
        """The task is over, in whatever way: the engine holds nothing of it any more."""
        self._answer(work)
        self._works.pop(work.offer.stream, None)
        self._paused.discard(work.offer.stream)
        claim = b""
        if self._outbox is not None and work.answered and not work.refused:
            claim = self._claim(self._outbox, work)  # also when the link is gone: the network pays what reached it
        if self._open and not work.refused:
            self._ends.append(_end_of(work, claim))
            if self._works:
                self._flush_soon()
            else:
                self._flush()
        if not self._works:
            self._idle.set()

    # ------------------------------------------------------------ out

    def _refuse(self, stream: int, refused: Refused) -> None:
        self._send(Refuse(stream, refused.fault, refused.code, refused.detail))

    def _flush_soon(self) -> None:
        """Whoever else emits in this turn of the loop shares the Step."""
        if not self._flush_due:
            self._flush_due = True
            if not self._turns_to_wait:
                asyncio.get_running_loop().call_soon(self._flush)

    def _turn_passed(self) -> None:
        self._turns_to_wait -= 1
        if self._turns_to_wait:
            asyncio.get_running_loop().call_soon(self._turn_passed)
        elif self._flush_due:
            self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        self._step_bytes = 0
        if not self._open or not (self._emissions or self._ends or self._paused):
            return
        for stream in self._emissions:
            work = self._works.get(stream)
            if work is not None and not work.answered:
                self._answer(work)  # an Accept must not come after the first ids, however the loop orders its turns
        step = Step(tuple(self._emissions.values()), tuple(self._ends), tuple(self._paused))
        self._emissions.clear()
        self._ends.clear()
        self._paused.clear()
        self._send(step)
        if not self._turns_to_wait:
            asyncio.get_running_loop().call_soon(self._turn_passed)
        self._turns_to_wait = self.step_turns

    def _send(self, message: AnyMessage) -> None:
        """Breaking the protocol ourselves is a bug that ends the program: a stream that hangs would hide it."""
        if not self._open:
            return
        try:
            self._channel.send(message)
        except AssertionError as bug:
            self._open = False
            self._spawn(_raised(bug), "bug")  # callbacks of the loop cannot raise to anybody; a task of the group can


async def _raised(bug: AssertionError) -> None:
    raise bug


class BrokenEngine(Exception):
    """An engine did what no engine may. The text is ours, holds nothing of a work, and may go to the network."""


class _Work:
    """What the agent knows of one stream. `position` counts delivered ids too, as on the wire."""

    def __init__(self, offer: Offer, vocab_size: int) -> None:
        self.offer = offer
        self.credit = offer.credit
        self.first = len(offer.work.delivered) // 4
        self.position = self.first
        self.end: Finished | Failed | Refused | None = None
        self.answered = False
        self.refused = False
        self.keep = -1  # of a Cancel
        self._packed = bytearray()
        self._pieces: list[tuple[int, ...]] = []
        self.task: asyncio.Task[None]
        self._vocab_size = vocab_size
        self._credit_came: asyncio.Future[None] | None = None

    def note(self, ids: tuple[int, ...]) -> None:
        """These ids go out. Remembering is cheap, packing waits until there are many, or the end."""
        self._pieces.append(ids)
        if len(self._pieces) >= PIECES_UNPACKED_MAX:
            self._pack()

    def sent(self) -> bytes:
        """All ids that went out on this stream, packed."""
        self._pack()
        return bytes(self._packed)

    def _pack(self) -> None:
        self._packed += pack_ids([token_id for piece in self._pieces for token_id in piece])
        self._pieces.clear()

    def grant(self, ids: int) -> None:
        self.credit += ids
        if self._credit_came is not None and not self._credit_came.done():
            self._credit_came.set_result(None)

    async def more_credit(self) -> None:
        self._credit_came = asyncio.get_running_loop().create_future()
        await self._credit_came

    def check(self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> None:
        """Engines may be a stranger's: what would break the link's rules is stopped here. Raises BrokenEngine."""
        if self.end is not None:
            raise BrokenEngine("ids came after the end")
        if not ids or min(ids) < 0 or max(ids) >= self._vocab_size:
            raise BrokenEngine("no ids, or an id outside the vocabulary")
        if self.position + len(ids) > self.offer.work.sampling.max_tokens:
            raise BrokenEngine("more ids than max_tokens")
        if (logprobs is None) != (self.offer.work.sampling.top_logprobs is None):
            raise BrokenEngine("logprobs that nobody asked for, or none where they were asked for")
        if logprobs is not None and len(logprobs) != len(ids):
            raise BrokenEngine("logprobs that are not parallel to the ids")


def offer_of(engine: Engine, price: Price = FREE, region: str = "") -> ClassOffer:
    """What a node says of an engine. Speeds are given by engines that have measured themselves (`speeds()`)."""
    speeds = getattr(engine, "speeds", None)
    decode, prefill = speeds() if speeds is not None else (0.0, 0.0)
    served = engine.served
    return ClassOffer(served.name, served.model_class, engine.slots, engine.kind, decode, prefill, price, region)


def _end_of(work: _Work, claim: bytes) -> End:
    stream, count = work.offer.stream, work.position - work.first
    match work.end:
        case Finished(reason=reason, cached_tokens=cached_tokens):
            return End(stream, reason, count, cached_tokens, signature=claim)
        case Failed(code=code, detail=detail):
            return End(stream, "failed", count, 0, code, detail, signature=claim)
        case Refused(code=code, detail=detail):
            return End(stream, "failed", count, 0, code, detail, signature=claim)
    if work.task.cancelled():
        return End(stream, "cancelled", count, signature=claim)
    sentence = "the node's engine returned without an end"
    return End(stream, "failed", count, 0, "engine_error", sentence, signature=claim)


def _finite(logprobs: tuple[TokenLogprob, ...] | None) -> tuple[TokenLogprob, ...] | None:
    """Minus infinity, which an honest engine can compute, becomes LOGPROB_MIN."""
    if logprobs is None or all(
        math.isfinite(entry.logprob) and all(math.isfinite(logprob) for _, logprob in entry.top) for entry in logprobs
    ):
        return logprobs
    return tuple(
        msgspec.structs.replace(
            entry,
            logprob=_at_least(entry.logprob),
            top=tuple((token_id, _at_least(logprob)) for token_id, logprob in entry.top),
        )
        for entry in logprobs
    )


def _at_least(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOGPROB_MIN
