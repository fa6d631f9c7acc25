"""One work's way over one or more nodes: offer, take, count, and leave a node that does not keep its promise.

1. Ids count in the order in which they were accepted here. A node that is left is owed what it delivered, and told how
   much that is (`Cancel.keep`); what it says afterwards reaches nobody, because its stream has no reader any more.
2. The next node gets the prompt, all ids delivered so far, the same seed and a higher epoch. The sampler keeps no
   state, so it goes on where the last one stopped.
3. A clock runs only while the node owes something: ids that wait here to be read, and a caller who does not read, are
   not its fault. A link on which nothing moves at all is the heartbeat's business (wire/link.py).
4. What no honest engine can say (an id outside the vocabulary, a stop without a stop id) is a reason to leave as well.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

import msgspec

from gridmill.network.books import Books, Order
from gridmill.network.faults import Enough, NodeFault, stopping
from gridmill.network.links import LinkLost, NodeLeaves, NodeLink, NodeSilent, NodeStream
from gridmill.network.metering import FREE, PriceRow, Usage, subsidy_most
from gridmill.network.registry import NodeRecord, Registry
from gridmill.network.settlement import Finish, Server
from gridmill.wire.classes import ClassId, TextFacts
from gridmill.wire.messages import Emission, End, Generate, NodeId, OwnerId, Refuse
from gridmill.wire.sampling import TokenLogprob, pack_ids, unpack_ids

Emit = Callable[[list[Emission]], Awaitable[None]]
Placed = Callable[[str], None]

LAST_WORD_TIMEOUT_SECONDS = 2.0  # a cancelled engine answers within one step
STOP_WORD_SECONDS = 0.5  # as long as an answer that is complete may wait for a signature, and the way there and back
# However slow a node has shown itself, or says that it is, to be waited for.
GAP_PATIENCE_SECONDS_MAX, FIRST_TOKEN_PATIENCE_SECONDS_MAX = 10.0, 120.0
LOOK_ELSEWHERE_SECONDS = 1.0  # how often a work on a node that drains asks whether there is room elsewhere
LOGPROB_ROUNDING_MAX = 1e-3  # above zero: 16-bit arithmetic gets there, a probability does not


FAULTS = {"node_draining": None, "node_queued": "cancelled"}  # what these reasons say of the node: nothing against it


class Patience(msgspec.Struct, frozen=True):
    """How long a node may owe something, in seconds: the larger of a plain time and a multiple of what is usual.

    A node that is silent for longer is left for one that has room. Where there is none it is given `alone_seconds`,
    counted from when it last sent an id of any work: leaving it would help nobody.
    """

    gap_seconds: float = 1.0
    gap_factor: float = 5.0
    first_token_seconds: float = 5.0
    first_token_factor: float = 3.0
    alone_seconds: float = 30.0


class Outcome(msgspec.Struct, frozen=True):
    """How a work ended well, with what was delivered as the network counted it, and what it cost the caller."""

    kind: Literal["stop", "length", "cancelled"]
    output_tokens: int
    cached_tokens: int
    node_ids: tuple[str, ...]
    charge_nanocredits: int = 0


class Observer(Protocol):
    """What the counters want to know. All calls are cheap and never fail."""

    def first_token(self, seconds: float) -> None: ...
    def tokens_delivered(self, count: int) -> None: ...
    def queue_length(self, count: int) -> None: ...
    def moved(self, code: str) -> None: ...


class Left(Exception):
    """A node was left; another may go on. `accepted`: it had taken the work, so that this counts as a move."""

    def __init__(self, code: str, detail: str, *, accepted: bool = True, owner_id: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.accepted = accepted
        self.owner_id = owner_id


class Unwanted(Left):
    """A node says that the caller's own parameters are at fault. Believed when one of another owner says so too, or
    when there is none."""


class Impossible(Exception):
    """What no honest engine can have said."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Journey:
    """One work, from its first offer to its bill. Belongs to one task."""

    def __init__(
        self,
        work: Generate,
        order: Order,
        *,
        registry: Registry,
        books: Books,
        observer: Observer,
        clock: Callable[[], float],
        patience: Patience,
        served: Callable[[int], None],
        elsewhere: Callable[[Journey], bool],
    ) -> None:
        """`elsewhere` says whether another node could take this work at once; `served` counts tokens read and made."""
        self.work = work
        self.order = order
        self._registry = registry
        self._books = books
        self._observer = observer
        self._clock = clock
        self._patience = patience
        self._served = served
        self._elsewhere = elsewhere
        # What an earlier run of the same answer delivered was charged then, its prompt with it: `input_tokens` of the
        # order are those that this run still has to pay.
        self._start = order.start = len(work.delivered) // 4
        order.epoch = work.epoch
        self._checks = Checks(work, registry.text_facts(ClassId(work.class_id)))
        self._left: dict[NodeId, NodeRecord] = {}
        self.left_owners: set[OwnerId] = set()
        self.node_ids: list[NodeId] = []

    # ------------------------------------------------------------ for the one who places it

    @property
    def begun(self) -> bool:
        """Whether some node has accepted it: from then on it is worth waiting for another one."""
        return self.order.last_server is not None

    @property
    def delivered(self) -> int:
        """Ids that the caller has, those of earlier runs included."""
        return self._start + self.order.count

    @property
    def read_tokens(self) -> int:
        """What the next node has to read before it can make an id."""
        return len(self.work.prompt) // 4 + self.delivered

    def ids_so_far(self) -> bytes:
        """Prompt and answer as the next node gets them, packed."""
        return self.work.prompt + self.work.delivered + pack_ids(self.order.ids())

    def excluded(self) -> frozenset[NodeId]:
        """Nodes that were tried. Who has joined again since is another node."""
        return frozenset(
            node_id for node_id, record in self._left.items() if self._registry.record_of(node_id) is record
        )

    def exclude(self, node_id: NodeId) -> None:
        record = self._registry.record_of(node_id)
        if record is not None:
            self._left[node_id] = record

    # ------------------------------------------------------------ on one node

    async def on(self, node_link: NodeLink, emit: Emit, placed: Placed) -> Outcome:
        """Runs what is left of the work on this node. Raises Left when another node should go on."""
        record = node_link.record
        assert record is not None
        order, class_id = self.order, ClassId(self.work.class_id)
        self._left[record.node_id] = record
        self.node_ids.append(record.node_id)
        offered = self._clock()
        if not node_link.can_open:
            raise Left("link_full", "the node's link carries as many works as it can", accepted=False)
        row = record.prices.get(class_id, FREE)
        work = self._what_is_left(row)
        read = self.ids_so_far()
        cached_tokens = record.sent.cached_tokens(class_id, work.cache_salt, read, offered)
        predicted = self._registry.first_token_seconds(record, class_id, len(read) // 4)
        first_token_patience = max(
            self._patience.first_token_seconds,
            min(self._patience.first_token_factor * predicted, FIRST_TOKEN_PATIENCE_SECONDS_MAX),
        )
        stream = node_link.open(work, class_id)
        stream.pause_patience_seconds = first_token_patience
        try:
            await self._accepted(stream, record)
            accepted = self._clock()
            self._begin(record, row, cached_tokens, len(read) // 4)
            placed(record.node_id)
            self._served(len(read) // 4 - cached_tokens)
            first_token = 0.0
            before = order.count
            waits_since = offered
            deadline = accepted + first_token_patience
            while True:
                try:
                    emissions = await stream.take(max(0.0, deadline - self._clock()))
                except NodeLeaves:
                    if order.part_count and self._elsewhere(self):
                        node_link.cancel(stream, self.delivered)
                        raise self._leave(record, "node_draining", "the node drains", forfeits=False) from None
                    stream.nudge_later(LOOK_ELSEWHERE_SECONDS)
                    continue
                except NodeSilent:
                    now = self._clock()
                    quiet = now - node_link.progressed_at
                    if (not order.part_count or stream.paused) and quiet < first_token_patience:
                        # It works for others: a queue, which the network's own choice has made, and no fault.
                        waited = now - waits_since
                        self._registry.queued(record, class_id, waited)
                        if waited >= first_token_patience + self._patience.alone_seconds:
                            node_link.cancel(stream, self.delivered)
                            detail = f"the node had no time for it in {waited:.1f} s"
                            raise self._leave(record, "node_queued", detail) from None
                    elif quiet >= self._patience.alone_seconds or self._elsewhere(self):
                        raise
                    deadline = now + LOOK_ELSEWHERE_SECONDS
                    continue
                if not emissions:
                    break
                before = order.count
                self._checks.see(emissions, self.delivered)
                for emission in emissions:
                    # Before `emit`: what was handed to the caller's socket is delivered, even if it then leaves.
                    order.deliver(emission.ids)
                if not first_token:
                    first_token = self._clock()
                    if not before:
                        self._observer.first_token(first_token - offered)
                    self._registry.observe(
                        record,
                        class_id,
                        prefill_tokens=max(1, len(read) // 4 - cached_tokens),
                        ttft_seconds=first_token - offered,
                        tokens=0,
                        seconds=0.0,
                    )
                count = order.count - before
                self._observer.tokens_delivered(count)
                self._served(count)
                await emit(emissions)
                node_link.grant(stream, count)
                waits_since = self._clock()
                gap = min(self._patience.gap_factor * stream.gap_seconds, GAP_PATIENCE_SECONDS_MAX)
                deadline = waits_since + max(self._patience.gap_seconds, gap) + record.round_trip_seconds
        except Enough as enough:
            keep = min(enough.keep, order.count)
            order.cut(keep)
            node_link.cancel(stream, self._start + keep)
            try:
                await self._last_word(stream, STOP_WORD_SECONDS + record.round_trip_seconds)
            except asyncio.CancelledError:
                # The caller leaves in the meantime. What it has been shown is paid, as always.
                self._settle(
                    self._left_after(0.0, record, class_id), "stop" if order.shown else "cancelled", stream.end
                )
                raise
            return self._settled("stop", keep, stream, record)
        except Impossible as lie:
            # Nothing of what came with it was shown: the part ends before it.
            node_link.cancel(stream, self.delivered)
            raise self._leave(record, lie.code, lie.detail) from None
        except LinkLost as lost:
            if lost.stopping:
                # It is the network that leaves: the node did nothing wrong, and is paid for all that it did.
                self._books.unserve(order, forfeits=False)
                raise stopping() from None
            return self._broken(stream, record, "node_lost", f"the node was lost ({lost})")
        except NodeSilent as silence:
            node_link.cancel(stream, self.delivered)
            # Once it says its last word it is awake again, and better than no node at all.
            stream.when_over(functools.partial(self._left.pop, record.node_id, None))
            return self._broken(stream, record, "node_stalled", f"the node sent nothing for {silence.seconds:.1f} s")
        except Left:
            node_link.cancel(stream)
            raise
        except NodeFault:
            # `emit` could not read the last ids, which nobody was given: that is beyond repair.
            node_link.cancel(stream, self._start + before)
            if order.server is not None:
                self._settle(Usage(0, 0, before if order.shown else 0), "failed", None)
            self._ended(record, "bad_ids")
            raise
        except BaseException:
            node_link.cancel(stream, self._start + order.owed_count)
            if order.server is not None:
                self._settle_when_claimed(self._left_after(self._clock() - accepted, record, class_id), stream)
            raise
        if first_token:
            self._registry.observe(
                record,
                class_id,
                prefill_tokens=0,
                ttft_seconds=0.0,
                tokens=order.part_count - 1,
                seconds=self._clock() - first_token,
            )
        return self._judge(stream, record)

    def _what_is_left(self, row: PriceRow) -> Generate:
        work, order = self.work, self.order
        if row.free and work.epoch == order.epoch and not order.count:
            return work
        delivered = work.delivered + pack_ids(order.ids()) if order.count else work.delivered
        return msgspec.structs.replace(work, price=row.price, epoch=order.epoch, delivered=delivered)

    async def _accepted(self, stream: NodeStream, record: NodeRecord) -> None:
        seconds = self._patience.first_token_seconds + record.round_trip_seconds
        try:
            reply = await stream.answer(seconds)
        except NodeSilent:
            raise self._turned_away(
                record, Left("node_silent", f"no answer to an offer within {seconds:.1f} s", accepted=False)
            ) from None
        except LinkLost as lost:
            raise self._turned_away(record, Left("node_lost", f"the node was lost ({lost})", accepted=False)) from None
        if isinstance(reply, Refuse):
            # The code is ours to choose: a node's own words must not be mistaken for the network's.
            kind = Unwanted if reply.fault == "caller" else Left
            raise self._turned_away(
                record,
                kind("node_refused", f"the node says: {reply.detail}", accepted=False, owner_id=record.owner_id),
            ) from None

    def _turned_away(self, record: NodeRecord, left: Left) -> Left:
        self.left_owners.add(record.owner_id)
        self.order.epoch += 1  # each offer has its own: what this node may yet do of it is nobody's
        self._ended(record, left.code)
        return left

    def _begin(self, record: NodeRecord, row: PriceRow, cached_tokens: int, read_tokens: int) -> None:
        """The node has accepted. Whoever goes on for another has to read more than the user pays for."""
        order, books = self.order, self._books
        server = Server(record.node_id, record.node_key, record.owner_id, row)
        replayed_tokens = 0
        if order.terms is not None:
            paid_input = 0 if order.input_paid else order.input_tokens
            left = self.work.sampling.max_tokens - self.delivered
            dearer = subsidy_most(order.terms, row, paid_input, left, 0)
            if dearer and not books.promise(order, dearer):
                order.epoch += 1
                raise Left("reserve_short", "the failover reserve has been promised to others since", accepted=False)
            extra = read_tokens - cached_tokens - (paid_input - order.cached_tokens if paid_input else 0)
            if not order.replay_paid and extra > 0:
                cost = subsidy_most(order.terms, row, 0, 0, extra)
                if cost and books.promise(order, cost):
                    replayed_tokens = extra
                    order.replay_paid = True
        known = min(cached_tokens, order.input_tokens)
        books.serve(order, server, self.work.prompt, self.work.salt, known, replayed_tokens)

    # ------------------------------------------------------------ leaving a node

    def _broken(self, stream: NodeStream, record: NodeRecord, code: str, detail: str) -> Outcome:
        """The node broke off. When its last id had ended the answer, nothing is missing but its signature."""
        kind = self._checks.complete(self.delivered)
        if kind is not None and self.order.server is not None:
            self._ended(record, code)
            return self._settled(kind, self.order.count, stream, record, fault=code)
        raise self._leave(record, code, detail)

    def _leave(self, record: NodeRecord, code: str, detail: str, *, forfeits: bool | None = None) -> Left:
        if forfeits is None:
            forfeits = not record.draining
        self._books.unserve(self.order, forfeits=forfeits)
        self.left_owners.add(record.owner_id)
        self._ended(record, FAULTS.get(code, code))
        self._observer.moved(code)
        # A node that drains has not failed: a work with no move left may leave it all the same.
        return Left(code, detail, accepted=code != "node_draining")

    def _ended(self, record: NodeRecord, fault: str | None) -> None:
        self._registry.ended(record, ClassId(self.work.class_id), fault=fault)

    async def _last_word(self, stream: NodeStream, seconds: float) -> None:
        """After a cancel the node's End brings its signature; a slow node is not awaited."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        if not await stream.take(seconds):
                            return
                    except NodeLeaves:
                        pass  # it may, after this
        except (TimeoutError, NodeSilent, LinkLost):
            pass

    def _judge(self, stream: NodeStream, record: NodeRecord) -> Outcome:
        """The node has said its last word: is it one that ends the answer?"""
        end, made = stream.end, self.order.part_count
        assert end is not None
        if end.kind == "failed":
            return self._broken(stream, record, "node_failed", f"the node says: {end.detail or 'its engine failed'}")
        if end.kind == "cancelled":
            return self._broken(stream, record, "node_cancelled", "the node stopped by itself")
        if end.count != made:
            return self._broken(stream, record, "count_disagrees", f"the node says {end.count} ids, {made} arrived")
        if end.kind == "stop" and not self.order.count and not self._start:
            raise self._leave(record, "empty_answer", "the node called the answer complete before its first id")
        if self._checks.complete(self.delivered) != end.kind:
            raise self._leave(record, "ended_early", "the node called the answer complete before it was")
        return self._settled(end.kind, self.order.count, stream, record)

    # ------------------------------------------------------------ the bill

    def _settled(
        self,
        kind: Literal["stop", "length", "cancelled"],
        keep: int,
        stream: NodeStream,
        record: NodeRecord,
        fault: str | None = None,
    ) -> Outcome:
        order = self.order
        used = Usage(order.input_tokens, order.cached_tokens, keep)
        charged = 0
        if order.settles_later:
            # With the other choices of the same answer: if one of them fails, nothing of this one is owed either.
            order.deferred = functools.partial(self._settle, used, kind, stream.end)
        else:
            charged = self._settle(used, kind, stream.end)
        if fault is None:
            self._ended(record, None)
        # The answer's last bytes go first.
        asyncio.get_running_loop().call_soon(self._remember, record, keep)
        return Outcome(kind, keep, order.cached_tokens, tuple(dict.fromkeys(self.node_ids)), charged)

    def _remember(self, record: NodeRecord, keep: int) -> None:
        work = self.work
        ids = work.prompt + work.delivered + pack_ids(self.order.ids()[:keep])
        record.sent.remember(work.class_id, work.cache_salt, ids, self._clock())

    def _settle(self, used: Usage, finish: Finish, end: End | None) -> int:
        if end is None:
            return self._books.settle(self.order, used, finish)
        return self._books.settle(self.order, used, finish, commit_root=end.commit_root, claim=end.signature)

    def _settle_when_claimed(self, used: Usage, stream: NodeStream) -> None:
        """The caller left. The node's End brings its signature for the receipt within a step, unless it is slow."""

        def settle() -> None:
            timer.cancel()
            self._settle(used, "cancelled", stream.end)

        self.order.deferred = settle
        timer = asyncio.get_running_loop().call_later(LAST_WORD_TIMEOUT_SECONDS, settle)
        stream.when_over(settle)

    def _left_after(self, seconds: float, record: NodeRecord, class_id: ClassId) -> Usage:
        """A caller who leaves pays the prompt once an id was made, before that what can have been computed of it."""
        order = self.order
        if order.forgiven and not order.shown:
            return Usage()
        if order.count:
            return Usage(order.input_tokens, order.cached_tokens, order.owed_count)
        rate = record.prefill_speed.get(class_id, 0.0)
        computed = min(order.input_tokens, order.cached_tokens + int(seconds * rate))
        return Usage(computed, min(order.cached_tokens, computed), 0)


class Checks:
    """What every honest engine's words have in common, for one work. What is wrong is found before anybody is told."""

    def __init__(self, work: Generate, facts: TextFacts | None) -> None:
        sampling = work.sampling
        self._vocab_size = facts.vocab_size if facts is not None else 1 << 32
        ends = set(sampling.stop_token_ids)
        if facts is not None and not sampling.ignore_eos:
            ends.update(facts.eos_token_ids)
        self._ends = frozenset(ends)
        self._min_tokens = sampling.min_tokens
        self._max_tokens = sampling.max_tokens
        self._scored = sampling.top_logprobs is not None
        delivered = unpack_ids(work.delivered)
        self._stopped = bool(delivered) and self._stops(delivered[-1], len(delivered))

    def _stops(self, token_id: int, count: int) -> bool:
        """Whether the answer ends with this id, the `count`th."""
        return token_id in self._ends and count > self._min_tokens

    def see(self, emissions: list[Emission], delivered: int) -> None:
        """These come after `delivered` ids. Raises Impossible; then none of them counts, or has left a trace here."""
        stopped = self._stopped
        for emission in emissions:
            ids = emission.ids
            if stopped:
                raise Impossible("bad_ids", "the node went on after an id that ends the answer")
            if max(ids) >= self._vocab_size:
                raise Impossible("bad_ids", f"the node sent an id outside the vocabulary of {self._vocab_size}")
            if self._ends and not self._ends.isdisjoint(ids):
                for place, token_id in enumerate(ids, 1):
                    if self._stops(token_id, delivered + place):
                        if place < len(ids):
                            raise Impossible("bad_ids", "the node went on after an id that ends the answer")
                        stopped = True
            if self._scored:
                self._see_scores(emission)
            delivered += len(ids)
        self._stopped = stopped

    def _see_scores(self, emission: Emission) -> None:
        if emission.logprobs is None or len(emission.logprobs) != len(emission.ids):
            raise Impossible("logprobs_missing", "the node did not send the log probabilities that were asked for")
        for entry in emission.logprobs:
            self._see_score(entry)

    def _see_score(self, entry: TokenLogprob) -> None:
        worst = max([entry.logprob, *[logprob for _, logprob in entry.top]])
        if worst > LOGPROB_ROUNDING_MAX:
            raise Impossible("bad_logprobs", f"a log probability of {worst:g} is above 0")
        if entry.top and max(token_id for token_id, _ in entry.top) >= self._vocab_size:
            raise Impossible("bad_logprobs", f"a top id is outside the vocabulary of {self._vocab_size}")

    def complete(self, delivered: int) -> Literal["stop", "length"] | None:
        """Whether the ids seen so far are a whole answer."""
        if self._stopped:
            return "stop"
        return "length" if delivered >= self._max_tokens else None
