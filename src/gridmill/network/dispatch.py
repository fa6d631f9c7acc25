"""The one road of a Work: `serve` → place → link → the node's engine, and back through `emit`, then the bill.

A work that loses its node goes on at another one (journey.py); this file finds the node, and keeps whoever has to wait
for one in order. Delivered ids are charged and paid however the work ends; ids that nobody was given cost nothing. A
caller who leaves pays the prompt once an id was made, and before that as much of it as the node can have computed. A
node that breaks off without having said that it drains forfeits its prefill.

Cancelling the task that runs `serve` cancels the work on the node. Raising `Enough` from `emit` ends it on purpose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

import msgspec

from gridmill.network.accounts import KeyId
from gridmill.network.admission import Admission, Asking, Overloaded, Ticket
from gridmill.network.books import Books, Order
from gridmill.network.faults import CallerFault, NodeFault, NoRoom, stopping
from gridmill.network.journey import Emit, Journey, Left, Observer, Outcome, Patience, Placed, Unwanted
from gridmill.network.links import Links, NodeLink
from gridmill.network.metering import FREE, subsidy_most
from gridmill.network.registry import Registry
from gridmill.network.scheduler import ANYWHERE, Full, Placement, Request
from gridmill.wire.classes import ClassId
from gridmill.wire.messages import Generate, Price

log = logging.getLogger("gridmill.network.dispatch")

DEARER_PERCENT_MAX = 25  # how much more a next node may ask: else a cheap node that dies would make the reserve pay
MOVES_MAX = 3  # nodes that may fail a work after they took it; another one would hide a real problem
OFFERS_MAX = 12  # nodes that are asked at all, those that decline included
RETRY_AFTER_NO_NODE_SECONDS = 10


class Dispatcher:
    """Drives each work to its one end."""

    def __init__(
        self,
        *,
        registry: Registry,
        links: Links,
        books: Books,
        observer: Observer,
        clock: Callable[[], float],
        admission: Admission,
        patience: Patience | None = None,
    ) -> None:
        self._registry = registry
        self._links = links
        self._books = books
        self._observer = observer
        self._clock = clock
        self._admission = admission
        self._serving: dict[KeyId, set[_Serving]] = {}
        self._patience = patience or Patience()
        self._stopping = False
        registry.changed = admission.wake

    async def serve(
        self, work: Generate, order: Order, emit: Emit, *, placed: Placed = lambda node_id: None
    ) -> Outcome:
        """Runs one work to its end. Raises CallerFault, NodeFault or NoRoom; the caller's own errors pass through.

        `order` is what the books hold for it, and is settled or released however this ends. `placed(node_id)` is called
        whenever a node has accepted. Each id reaches `emit` exactly once, in order.
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
        ticket = self._admission.ticket(
            Asking(
                ClassId(work.class_id),
                order.payer.account_id,
                order.account_weight,
                "flex" if order.flexible else "default",
                order.max_wait_seconds,
                work.prompt,
            )
        )
        try:
            return await self._travel(work, order, emit, placed, ticket)
        finally:
            ticket.close()

    async def _travel(self, work: Generate, order: Order, emit: Emit, placed: Placed, ticket: Ticket) -> Outcome:
        journey = Journey(
            work,
            order,
            registry=self._registry,
            books=self._books,
            observer=self._observer,
            clock=self._clock,
            patience=self._patience,
            served=ticket.served,
            elsewhere=self._has_room_elsewhere,
        )
        failure: Left | None = None
        moves = 0
        for _ in range(OFFERS_MAX):
            node_link = await self._place(journey, ticket, failure)
            try:
                return await journey.on(node_link, emit, placed)
            except Left as left:
                ticket.freed()
                log.info(
                    "a work leaves a node",
                    extra={
                        "work": work.work_id,
                        "node": journey.node_ids[-1],
                        "code": left.code,
                        "detail": left.detail,
                        "delivered": journey.delivered,
                    },
                )
                if isinstance(left, Unwanted) and isinstance(failure, Unwanted) and left.owner_id != failure.owner_id:
                    raise _unwanted(left) from None
                failure = left
                moves += left.accepted
                if moves > MOVES_MAX:
                    break
        assert failure is not None
        raise NodeFault(
            failure.code, f"{len(set(journey.node_ids))} nodes in turn could not run this: {failure.detail}"
        )

    def stop_admitting(self) -> None:
        """From now on every new work is refused; what runs goes on."""
        self._stopping = True
        self._admission.stop()

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    # ------------------------------------------------------------ placement

    async def _place(self, journey: Journey, ticket: Ticket, failure: Left | None) -> NodeLink:
        """A node for the work, or for what is left of it. Raises NoRoom, or what became of an earlier `failure`."""
        class_id = ClassId(journey.work.class_id)
        waits_for_a_node = journey.begun and self._admission.resume_timeout_seconds > 0
        while True:
            if self._stopping and not journey.begun:
                raise stopping()
            try:
                # Who reads an answer already goes first; and where there is no node at all there is nobody to pass.
                urgent = journey.begun and (journey.order.count > 0 or not self._registry.places(class_id))
                await ticket.turn(urgent=urgent, begun=journey.begun)
            except Overloaded as overloaded:
                if urgent:
                    raise self._nobody(failure, waited=True) from None
                raise NoRoom("overloaded", overloaded.detail, overloaded.retry_after_seconds) from None
            while True:
                request, found = self._look(journey)
                if not isinstance(found, Placement):
                    break
                node_link = self._links.find(found.node_id)
                if node_link is not None:
                    self._registry.decided(request, found)
                    ticket.took()
                    if journey.order.whys is not None and found.why is not None:
                        journey.order.whys.append(found.why)
                    return node_link
                journey.exclude(found.node_id)  # It left in this very moment.
            if self._stopping or (found.reason == "no_node" and not waits_for_a_node):
                raise self._nobody(failure, only_some=journey.order.allowed != ANYWHERE)

    def _nobody(self, failure: Left | None, *, only_some: bool = False, waited: bool = False) -> Exception:
        match failure:
            case None if only_some:
                return NoRoom(
                    "no_node",
                    "no node that serves this model now is of the owners, regions and trust that `routing` asks for",
                    RETRY_AFTER_NO_NODE_SECONDS,
                )
            case None:
                return NoRoom(
                    "no_node",
                    "no node serves this model at the moment: try again shortly, or start one with `gridmill node`",
                    RETRY_AFTER_NO_NODE_SECONDS,
                )
            case Unwanted():
                return _unwanted(failure)
            case _ if waited:
                seconds = self._admission.resume_timeout_seconds
                return NodeFault(
                    failure.code, f"no other node could go on with it within {seconds:.0f} s: {failure.detail}"
                )
            case _:
                return NodeFault(failure.code, f"no other node can run this: {failure.detail}")

    def _look(self, journey: Journey) -> tuple[Request, Placement | Full]:
        """Where it could go now. A node dearer than the first is paid the difference from the reserve, if there is."""
        request = self._request(journey)
        terms = journey.order.terms
        if terms is None:
            return request, self._registry.look(request)
        cheap = msgspec.structs.replace(request, not_above=terms.price)
        found = self._registry.look(cheap)
        if isinstance(found, Placement):
            return cheap, found
        dearer = self._registry.look(msgspec.structs.replace(request, not_above=_somewhat_dearer(terms.price)))
        if isinstance(dearer, Placement):
            record = self._registry.record_of(dearer.node_id)
            row = record.prices.get(ClassId(request.class_id), FREE) if record is not None else FREE
            paid_input = 0 if journey.order.input_paid else journey.order.input_tokens
            if self._books.can_promise(journey.order, subsidy_most(terms, row, paid_input, request.output_tokens, 0)):
                return request, dearer
        return cheap, found

    def _request(self, journey: Journey) -> Request:
        work, order = journey.work, journey.order
        # What the user pays is fixed once somebody has made an id for it.
        fixed = order.terms is not None
        return Request(
            class_id=work.class_id,
            read_tokens=journey.read_tokens,
            output_tokens=work.sampling.max_tokens - journey.delivered,
            input_tokens=order.input_tokens,
            prompt=journey.ids_so_far(),
            cache_salt=work.cache_salt,
            affordable_nanocredits=None if fixed else order.amount,
            max_price=None if fixed else order.max_price,
            excluded=journey.excluded(),
            sticky=order.sticky,
            allowed=order.allowed,
            explain=order.whys is not None,
            avoid_owners=frozenset(journey.left_owners),
        )

    def _has_room_elsewhere(self, journey: Journey) -> bool:
        return isinstance(self._look(journey)[1], Placement)


def _unwanted(left: Unwanted) -> CallerFault:
    """Without the nodes' own words, which the log has: a stranger's sentence is not the network's to repeat."""
    return CallerFault(400, left.code, "the nodes that serve this model refuse this request's parameters")


def _somewhat_dearer(price: Price) -> Price:
    return Price(
        *[
            part + part * DEARER_PERCENT_MAX // 100
            for part in (price.input_nanocredits, price.cached_input_nanocredits, price.output_nanocredits)
        ]
    )


class _Serving:
    """One call of `serve`, so that a revoked key can end it."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.revoked = False
