"""The one road of a Work: `serve` → place → link → the node's engine, and back through `emit`.

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
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

import msgspec

from gridmill.network import scheduler
from gridmill.network.accounts import Account
from gridmill.network.links import LinkLost, Links, NodeLink, NodeSilent, NodeStream
from gridmill.network.registry import Registry
from gridmill.wire.classes import ClassId
from gridmill.wire.messages import Emission, End, Generate, NodeId, Refuse

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
    """Raised by `emit`: the answer is complete after `keep` output ids (a stop string was found)."""

    def __init__(self, keep: int) -> None:
        super().__init__(keep)
        self.keep = keep


class Outcome(msgspec.Struct, frozen=True):
    """How a work ended well, with what was delivered as the network counted it."""

    kind: Literal["stop", "length", "cancelled"]
    output_tokens: int
    cached_tokens: int
    node_ids: tuple[str, ...]


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
        observer: Observer,
        clock: Callable[[], float],
        queue_timeout_seconds: float = 30.0,
    ) -> None:
        self._registry = registry
        self._links = links
        self._observer = observer
        self._clock = clock
        self._queue_timeout_seconds = queue_timeout_seconds
        self._waiting: dict[ClassId, deque[asyncio.Future[None]]] = {}
        self._waiting_count = 0
        self._stopping = False
        registry.changed = self._wake

    async def serve(
        self, work: Generate, account: Account, emit: Emit, *, placed: Placed = lambda node_id: None
    ) -> Outcome:
        """Runs one work to its end. Raises CallerFault, NodeFault or NoRoom; the caller's own errors pass through.

        `placed(node_id)` is called when a node has accepted. Each id reaches `emit` exactly once, in order.
        """
        run = _Run(work, self._registry, self._observer, self._clock)
        failure: _Refused | None = None
        for _ in range(PLACEMENTS_MAX):
            node_link = await self._place(work, run.excluded, failure)
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

    async def _place(self, work: Generate, excluded: set[NodeId], failure: _Refused | None) -> NodeLink:
        class_id = ClassId(work.class_id)
        prompt_tokens = len(work.prompt) // 4
        deadline = self._clock() + self._queue_timeout_seconds
        first_look = True
        while True:
            if self._stopping:
                raise NoRoom(
                    "stopping", "this network is shutting down: try again shortly", RETRY_AFTER_NO_NODE_SECONDS
                )
            # Whoever came first goes first: a newcomer does not take the place that was freed for somebody waiting.
            ahead = first_look and bool(self._waiting.get(class_id))
            found = scheduler.place(
                class_id, prompt_tokens, work.sampling.max_tokens, self._registry.snapshot(), excluded=excluded
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


class _Run:
    """One work's way over one or more nodes, until its first id is out."""

    def __init__(self, work: Generate, registry: Registry, observer: Observer, clock: Callable[[], float]) -> None:
        self._work = work
        self._registry = registry
        self._observer = observer
        self._clock = clock
        self._delivered = 0
        self.excluded: set[NodeId] = set()
        self.node_ids: list[NodeId] = []

    async def on(self, node_link: NodeLink, emit: Emit, placed: Placed) -> Outcome:
        record = node_link.record
        assert record is not None
        class_id = ClassId(self._work.class_id)
        self.excluded.add(record.node_id)
        self.node_ids.append(record.node_id)
        offered = self._clock()
        if not node_link.can_open:
            raise _Refused("link_full", "the node's link carries as many works as it can")
        stream = node_link.open(self._work, class_id)
        try:
            await self._accepted(stream)
            placed(record.node_id)
            first_token = 0.0
            while True:
                emissions = await stream.take(STALL_TIMEOUT_SECONDS)
                if not emissions:
                    break
                if not first_token:
                    first_token = self._clock()
                    self._observer.first_token(first_token - offered)
                count = 0
                for emission in emissions:
                    count += len(emission.ids)
                # Counted before `emit`: what was handed to the caller's socket is delivered, even if it then leaves.
                self._delivered += count
                self._observer.tokens_delivered(count)
                await emit(emissions)
                node_link.grant(stream, count)
        except Enough as enough:
            node_link.cancel(stream, enough.keep)
            cached_tokens = await self._last_word(stream)
            return self._outcome("stop", min(enough.keep, self._delivered), cached_tokens)
        except LinkLost as lost:
            raise self._failure("node_lost", f"the node was lost ({lost})") from None
        except NodeSilent:
            node_link.cancel(stream)
            raise self._failure("node_stalled", f"the node sent nothing for {STALL_TIMEOUT_SECONDS:.0f} s") from None
        except BaseException:
            node_link.cancel(stream)
            raise
        end = stream.end
        assert end is not None
        prompt_tokens = len(self._work.prompt) // 4
        cached_tokens = self._cached_tokens(end)
        if first_token:
            self._registry.observe(
                record,
                class_id,
                prefill_tokens=prompt_tokens - cached_tokens,
                ttft_seconds=first_token - offered,
                tokens=self._delivered - 1,
                seconds=self._clock() - first_token,
            )
        return self._judge(end, cached_tokens)

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

    async def _last_word(self, stream: NodeStream) -> int:
        """The node's End after a cancel tells how much of the prompt it had cached; a slow node is not awaited."""
        try:
            async with asyncio.timeout(LAST_WORD_TIMEOUT_SECONDS):
                while await stream.take(LAST_WORD_TIMEOUT_SECONDS):
                    pass  # Ids that were on their way when the answer was already complete.
        except (TimeoutError, NodeSilent, LinkLost):
            return 0
        return self._cached_tokens(stream.end)

    def _cached_tokens(self, end: End | None) -> int:
        return max(0, min(end.cached_tokens, len(self._work.prompt) // 4)) if end is not None else 0

    def _judge(self, end: End, cached_tokens: int) -> Outcome:
        work = self._work
        if end.kind == "failed":
            raise self._failure("node_failed", f"the node says: {end.detail or 'its engine failed'}")
        if end.kind == "cancelled":
            raise self._failure("node_cancelled", "the node stopped by itself")
        if end.count != self._delivered:
            raise self._failure("count_disagrees", f"the node says {end.count} ids, {self._delivered} arrived")
        if end.kind == "length" and self._delivered + len(work.delivered) // 4 != work.sampling.max_tokens:
            raise self._failure("ended_early", "the node called the answer complete before it had its length")
        return self._outcome(end.kind, self._delivered, cached_tokens)

    def _outcome(self, kind: Literal["stop", "length", "cancelled"], output_tokens: int, cached_tokens: int) -> Outcome:
        return Outcome(kind, output_tokens, cached_tokens, tuple(self.node_ids))

    def _failure(self, code: str, detail: str) -> Exception:
        """Before the first id another node can begin afresh; after it the caller has to know."""
        return NodeFault(code, detail) if self._delivered else _Refused(code, detail)
