"""The one road of a Work: `serve` → place → link → the node's engine, and back through `emit`, then the bill.

Delivered ids are charged and paid however the work ends; ids that nobody was given cost nothing. A caller who leaves
pays the prompt once an id was made, and before that as much of it as the node can have computed. A node that breaks off
without having said that it drains forfeits its prefill.

Whose fault an ending was:

    Fault
    ├── CallerFault   4xx: the request can run nowhere; say which parameter and what to do
    ├── NodeFault     a node broke its promise after ids were delivered (before that, another node is tried)
    └── NoRoom        429/503 with Retry-After: nobody serves this class now, or all queues are full

Cancelling the task that runs `serve` cancels the work on the node. Raising `Enough` from `emit` ends it on purpose.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from typing import Literal, Protocol

import msgspec

from gridmill.network import scheduler
from gridmill.network.accounts import KeyId
from gridmill.network.books import Books, Order
from gridmill.network.links import LinkLost, Links, NodeLink, NodeSilent, NodeStream
from gridmill.network.metering import FREE, Usage
from gridmill.network.registry import NodeRecord, Registry
from gridmill.network.settlement import Finish, Server
from gridmill.wire.classes import ClassId
from gridmill.wire.messages import Emission, End, Generate, NodeId, Refuse
from gridmill.wire.sampling import pack_ids

log = logging.getLogger("gridmill.network.dispatch")

Emit = Callable[[list[Emission]], Awaitable[None]]
Placed = Callable[[str], None]

PLACEMENTS_MAX = 3  # nodes that are tried before the caller is told; a fourth would hide a real problem
ACCEPT_TIMEOUT_SECONDS = 10.0  # a node answers an offer at once; this only catches one whose program hangs
STALL_TIMEOUT_SECONDS = 120.0  # a node that owes ids and sends none, generous to a long prefill on a slow machine
LAST_WORD_TIMEOUT_SECONDS = 2.0  # a cancelled engine answers within one step
RETRY_AFTER_NO_NODE_SECONDS = 10
RETRY_AFTER_QUEUE_SECONDS = 2


class Fault(Exception):
    """Base of all endings that are somebody's fault."""


class CallerFault(Fault):
    """The request can run nowhere. Becomes the given 4xx."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


class NodeFault(Fault):
    """A node failed a work that had already begun to answer."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class NoRoom(Fault):
    """Not now. `no_node`: nobody serves the class; `overloaded`: nodes and queue are full, or the wait was too long."""

    def __init__(
        self, code: Literal["no_node", "overloaded", "stopping"], detail: str, retry_after_seconds: int
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class Enough(Exception):
    """Raised by `emit`: the answer is complete after `keep` of the ids emitted (a stop string was found)."""

    def __init__(self, keep: int) -> None:
        super().__init__(keep)
        self.keep = keep


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


class _Refused(Exception):
    """One placement came to nothing before any id was delivered: try another node."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Dispatcher:
    """Owns the queue in front of the nodes and drives each work to its one end."""

    def __init__(
        self,
        *,
        registry: Registry,
        links: Links,
        books: Books,
        observer: Observer,
        clock: Callable[[], float],
        queue_timeout_seconds: float = 30.0,
    ) -> None:
        self._registry = registry
        self._links = links
        self._books = books
        self._observer = observer
        self._clock = clock
        self._serving: dict[KeyId, set[_Serving]] = {}
        self._queue_timeout_seconds = queue_timeout_seconds
        self._waiting: dict[ClassId, deque[asyncio.Future[None]]] = {}
        self._waiting_count = 0
        self._stopping = False
        registry.changed = self._wake

    async def serve(
        self, work: Generate, order: Order, emit: Emit, *, placed: Placed = lambda node_id: None
    ) -> Outcome:
        """Runs one work to its end. Raises CallerFault, NodeFault or NoRoom; the caller's own errors pass through.

        `order` is what the books hold for it, and is settled or released however this ends. `placed(node_id)` is called
        when a node has accepted. Each id reaches `emit` exactly once, in order.
        """
        key_id = KeyId(order.payer.key_id)
        task = asyncio.current_task()
        assert task is not None
        serving = _Serving(task)
        self._serving.setdefault(key_id, set()).add(serving)
        try:
            return await self._serve(work, order, emit, placed)
        except asyncio.CancelledError:
            if serving.revoked and not task.uncancel():
                raise CallerFault(
                    401, "invalid_api_key", "this API key was revoked, or its account frozen, while its request ran"
                ) from None
            raise
        finally:
            self._books.release(order)
            self._serving[key_id].discard(serving)
            if not self._serving[key_id]:
                del self._serving[key_id]

    def revoke(self, key_ids: Collection[KeyId]) -> None:
        """Cancels all that runs or waits with these keys."""
        for key_id in key_ids:
            for serving in tuple(self._serving.get(key_id, ())):
                if not serving.revoked:
                    serving.revoked = True
                    serving.task.cancel()

    async def _serve(self, work: Generate, order: Order, emit: Emit, placed: Placed) -> Outcome:
        run = _Run(work, order, self._registry, self._books, self._observer, self._clock)
        failure: _Refused | None = None
        for _ in range(PLACEMENTS_MAX):
            node_link = await self._place(work, order, run.excluded, failure)
            try:
                return await run.on(node_link, emit, placed)
            except _Refused as refused:
                failure = refused
                log.info(
                    "a node did not take a work",
                    extra={
                        "work": work.work_id,
                        "node": run.node_ids[-1],
                        "code": refused.code,
                        "detail": refused.detail,
                    },
                )
        assert failure is not None
        raise NodeFault(failure.code, f"{PLACEMENTS_MAX} nodes in turn could not run this: {failure.detail}")

    def stop_admitting(self) -> None:
        """From now on every new work is refused; what runs goes on."""
        self._stopping = True
        for waiters in self._waiting.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    @property
    def waiting(self) -> int:
        return self._waiting_count

    # ------------------------------------------------------------ placement and the queue before it

    async def _place(self, work: Generate, order: Order, excluded: set[NodeId], failure: _Refused | None) -> NodeLink:
        class_id = ClassId(work.class_id)
        start = len(work.delivered) // 4
        deadline = self._clock() + self._queue_timeout_seconds
        first_look = True
        while True:
            if self._stopping:
                raise NoRoom(
                    "stopping", "this network is shutting down: try again shortly", RETRY_AFTER_NO_NODE_SECONDS
                )
            # Whoever came first goes first: a newcomer does not take the place that was freed for somebody waiting.
            ahead = first_look and bool(self._waiting.get(class_id))
            found = self._registry.place(
                scheduler.Request(
                    class_id,
                    len(work.prompt) // 4 + start,
                    work.sampling.max_tokens - start,
                    order.input_tokens,
                    prompt=work.prompt + work.delivered,
                    cache_salt=work.cache_salt,
                    affordable_nanocredits=order.amount,
                    max_price=order.max_price,
                    excluded=frozenset(excluded),
                )
            )
            if isinstance(found, scheduler.Placement) and not ahead:
                node_link = self._links.find(found.node_id)
                if node_link is None:
                    excluded.add(found.node_id)  # It left in this very moment.
                    continue
                if self._waiting.get(class_id):
                    # The caller takes its place before the loop turns; whoever is behind it looks again after that.
                    asyncio.get_running_loop().call_soon(self._wake, class_id)
                return node_link
            if isinstance(found, scheduler.Full) and found.reason == "no_node":
                if failure is not None:
                    raise NodeFault(failure.code, f"no other node can run this: {failure.detail}")
                raise NoRoom(
                    "no_node",
                    "no node serves this model at the moment: try again shortly, or start one with `gridmill node`",
                    RETRY_AFTER_NO_NODE_SECONDS,
                )
            await self._wait_for_room(class_id, deadline)
            first_look = False

    async def _wait_for_room(self, class_id: ClassId, deadline: float) -> None:
        slots = sum(view.slots for view in self._registry.snapshot().by_class.get(class_id, ()))
        waiters = self._waiting.setdefault(class_id, deque())
        if len(waiters) >= slots:
            raise NoRoom(
                "overloaded",
                f"all {slots} places for this model are taken and as many requests wait: try again shortly",
                RETRY_AFTER_QUEUE_SECONDS,
            )
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        self._waiting_count += 1
        self._observer.queue_length(self._waiting_count)
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                await waiter
        except TimeoutError:
            raise NoRoom(
                "overloaded",
                f"waited {self._queue_timeout_seconds:.0f} s for a free place: try again shortly",
                RETRY_AFTER_QUEUE_SECONDS,
            ) from None
        except asyncio.CancelledError:
            # The place that this waiter was given, if any, belongs to the next one.
            if waiter.done() and not waiter.cancelled():
                self._wake(class_id)
            raise
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters:
                self._waiting.pop(class_id, None)
            self._waiting_count -= 1
            self._observer.queue_length(self._waiting_count)

    def _wake(self, class_id: ClassId) -> None:
        """One place may be free, or the last node may be gone: the first that still waits looks again."""
        waiters = self._waiting.get(class_id)
        if not waiters:
            return
        views = self._registry.snapshot().by_class.get(class_id, ())
        room = sum(view.free_slots for view in views) if views else len(waiters)
        for waiter in waiters:
            if room <= 0:
                return
            room -= 1
            if not waiter.done():
                waiter.set_result(None)


class _Serving:
    """One call of `serve`, so that a revoked key can end it."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.revoked = False


class _Run:
    """One work's way over one or more nodes, until its first id is out."""

    def __init__(
        self,
        work: Generate,
        order: Order,
        registry: Registry,
        books: Books,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._work = work
        self._order = order
        self._registry = registry
        self._books = books
        self._observer = observer
        self._clock = clock
        # What an earlier run of the same answer delivered was charged then, its prompt with it: `input_tokens` of the
        # order are those that this run still has to pay.
        self._start = order.start = len(work.delivered) // 4
        self._input_tokens = order.input_tokens
        self._tokens_read = len(work.prompt) // 4 + self._start
        order.epoch = work.epoch
        self.excluded: set[NodeId] = set()
        self.node_ids: list[NodeId] = []

    async def on(self, node_link: NodeLink, emit: Emit, placed: Placed) -> Outcome:
        record = node_link.record
        assert record is not None
        order = self._order
        class_id = ClassId(self._work.class_id)
        self.excluded.add(record.node_id)
        self.node_ids.append(record.node_id)
        offered = self._clock()
        if not node_link.can_open:
            raise _Refused("link_full", "the node's link carries as many works as it can")
        row = record.prices.get(class_id, FREE)
        work = self._work
        if not row.free or work.epoch != order.epoch:
            work = msgspec.structs.replace(work, price=row.price, epoch=order.epoch)
        cached_tokens = record.sent.cached_tokens(class_id, work.cache_salt, work.prompt, offered)
        stream = node_link.open(work, class_id)
        try:
            await self._accepted(stream)
            accepted = self._clock()
            server = Server(record.node_id, record.node_key, record.owner_id, row)
            self._books.serve(order, server, work.prompt, work.salt, min(cached_tokens, self._input_tokens))
            placed(record.node_id)
            first_token = 0.0
            before = 0
            while True:
                emissions = await stream.take(STALL_TIMEOUT_SECONDS)
                if not emissions:
                    break
                if not first_token:
                    first_token = self._clock()
                    self._observer.first_token(first_token - offered)
                before = order.count
                for emission in emissions:
                    # Before `emit`: what was handed to the caller's socket is delivered, even if it then leaves.
                    order.deliver(emission.ids)
                count = order.count - before
                self._observer.tokens_delivered(count)
                await emit(emissions)
                node_link.grant(stream, count)
        except Enough as enough:
            keep = min(enough.keep, order.count)
            node_link.cancel(stream, self._start + keep)
            await self._last_word(stream)
            return self._settled("stop", keep, stream, record)
        except LinkLost as lost:
            raise self._failure("node_lost", f"the node was lost ({lost})", forfeits=not record.draining) from None
        except NodeSilent:
            node_link.cancel(stream, self._start + order.owed_count)
            raise self._failure("node_stalled", f"the node sent nothing for {STALL_TIMEOUT_SECONDS:.0f} s") from None
        except (_Refused, CallerFault):
            node_link.cancel(stream)
            raise
        except NodeFault:
            node_link.cancel(stream, self._start + before)  # `emit` could not read the last ids: nobody was given them
            self._settle(Usage(0, 0, before if order.shown else 0), "failed", None)
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
                prefill_tokens=self._tokens_read - max(cached_tokens, self._claimed_cached(stream.end)),
                ttft_seconds=first_token - offered,
                tokens=order.count - 1,
                seconds=self._clock() - first_token,
            )
        return self._judge(stream, record)

    async def _accepted(self, stream: NodeStream) -> None:
        try:
            reply = await stream.answer(ACCEPT_TIMEOUT_SECONDS)
        except NodeSilent:
            raise _Refused("node_silent", f"no answer to an offer within {ACCEPT_TIMEOUT_SECONDS:.0f} s") from None
        if isinstance(reply, Refuse):
            # The code is ours to choose: a node's own words must not be mistaken for the network's.
            detail = f"the node says: {reply.detail}"
            if reply.fault == "caller":
                raise CallerFault(400, "node_refused", detail)
            raise _Refused("node_refused", detail)

    def _claimed_cached(self, end: End | None) -> int:
        """A hint for the speed of prefill, never for money."""
        return min(end.cached_tokens, self._tokens_read) if end is not None else 0

    async def _last_word(self, stream: NodeStream) -> None:
        """After a cancel the node's End brings its signature; a slow node is not awaited."""
        try:
            async with asyncio.timeout(LAST_WORD_TIMEOUT_SECONDS):
                while await stream.take(LAST_WORD_TIMEOUT_SECONDS):
                    pass  # Ids that were on their way when the answer was already complete.
        except (TimeoutError, NodeSilent, LinkLost):
            pass

    def _judge(self, stream: NodeStream, record: NodeRecord) -> Outcome:
        work, end, delivered = self._work, stream.end, self._order.count
        assert end is not None
        if end.kind == "failed":
            raise self._failure("node_failed", f"the node says: {end.detail or 'its engine failed'}")
        if end.kind == "cancelled":
            raise self._failure("node_cancelled", "the node stopped by itself", forfeits=not record.draining)
        if end.kind == "stop" and not delivered:
            raise self._failure("empty_answer", "the node called the answer complete before its first id")
        if end.count != delivered:
            raise self._failure("count_disagrees", f"the node says {end.count} ids, {delivered} arrived")
        if end.kind == "length" and self._start + delivered != work.sampling.max_tokens:
            raise self._failure("ended_early", "the node called the answer complete before it had its length")
        return self._settled(end.kind, delivered, stream, record)

    # ------------------------------------------------------------ the bill

    def _settled(
        self, kind: Literal["stop", "length", "cancelled"], keep: int, stream: NodeStream, record: NodeRecord
    ) -> Outcome:
        order = self._order
        used = Usage(self._input_tokens, order.cached_tokens, keep)
        charged = self._settle(used, kind, stream.end)
        # The answer's last bytes go first.
        asyncio.get_running_loop().call_soon(self._remember, record, keep)
        return Outcome(kind, keep, order.cached_tokens, tuple(self.node_ids), charged)

    def _remember(self, record: NodeRecord, keep: int) -> None:
        work = self._work
        ids = work.prompt + work.delivered + pack_ids(self._order.ids()[:keep])
        record.sent.remember(work.class_id, work.cache_salt, ids, self._clock())

    def _settle(self, used: Usage, finish: Finish, end: End | None) -> int:
        if end is None:
            return self._books.settle(self._order, used, finish)
        return self._books.settle(self._order, used, finish, commit_root=end.commit_root, claim=end.signature)

    def _settle_when_claimed(self, used: Usage, stream: NodeStream) -> None:
        """The caller left. The node's End brings its signature for the receipt within a step, unless it is slow."""

        def settle() -> None:
            timer.cancel()
            self._settle(used, "cancelled", stream.end)

        self._order.deferred = settle
        timer = asyncio.get_running_loop().call_later(LAST_WORD_TIMEOUT_SECONDS, settle)
        stream.when_over(settle)

    def _left_after(self, seconds: float, record: NodeRecord, class_id: ClassId) -> Usage:
        """A caller who leaves pays the prompt once an id was made, before that what can have been computed of it."""
        order = self._order
        if order.forgiven and not order.shown:
            return Usage()
        if order.count:
            return Usage(self._input_tokens, order.cached_tokens, order.owed_count)
        rate = record.prefill_speed.get(class_id, 0.0)
        computed = min(self._input_tokens, order.cached_tokens + int(seconds * rate))
        return Usage(computed, min(order.cached_tokens, computed), 0)

    def _failure(self, code: str, detail: str, *, forfeits: bool = True) -> Exception:
        """Before the first id another node can begin afresh; after it the caller has to know, and pays what it got."""
        order = self._order
        if not order.count:
            self._books.unserve(order)
            return _Refused(code, detail)
        if order.server is not None:
            if forfeits or not order.shown:
                used = Usage(0, 0, order.owed_count)
            else:
                used = Usage(self._input_tokens, order.cached_tokens, order.count)
            self._settle(used, "failed", None)
        return NodeFault(code, detail)
