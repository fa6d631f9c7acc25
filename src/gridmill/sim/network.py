"""The network of the simulation: dispatcher, links, registry, books and receipts as they are, wired as app.py does.

Left out are HTTP, text and the operator: a handler here does what the gateway does for one choice of one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from pathlib import Path
from random import Random
from typing import Any

from gridmill.network.accounts import Accounts
from gridmill.network.admission import Admission
from gridmill.network.books import Books, Insufficient, Unavailable
from gridmill.network.dispatch import Dispatcher
from gridmill.network.faults import CallerFault, Enough, NodeFault, NoRoom
from gridmill.network.gateway.asgi import ApiError
from gridmill.network.gateway.idempotent import SharedAnswers
from gridmill.network.idempotency import Idempotency, KeyReused
from gridmill.network.journey import Patience
from gridmill.network.links import Links
from gridmill.network.metering import FeePolicy, most
from gridmill.network.receipts import Desk
from gridmill.network.registry import Registry
from gridmill.network.settlement import GatewayId
from gridmill.sim.cables import End
from gridmill.sim.callers import Call
from gridmill.sim.clock import Program, VirtualLoop
from gridmill.sim.disk import Disk, MemoryStore
from gridmill.sim.keyed import KeyedCalls
from gridmill.sim.model import CLASS_ID, FACTS, MODEL_CLASS, MODEL_NAME
from gridmill.sim.nodes import HOST, UNIX_EPOCH_SECONDS
from gridmill.wire.identity import Identity
from gridmill.wire.link import Link, NetworkSide, Reason
from gridmill.wire.messages import Emission
from gridmill.wire.transport import Conversation


class Silent:
    """An observer that does not look."""

    def first_token(self, seconds: float) -> None: ...
    def tokens_delivered(self, count: int) -> None: ...
    def moved(self, code: str) -> None: ...
    def queue_length(self, count: int) -> None: ...
    def admission_waited(self, seconds: float) -> None: ...
    def admission_refused(self, reason: str) -> None: ...


class Parts:
    """Everything that a network program is made of."""

    accounts: Accounts
    registry: Registry
    books: Books
    links: Links
    desk: Desk
    dispatcher: Dispatcher
    keyed: KeyedCalls


class Network:
    """One life of the network's program; after a kill the next life is another object on the same disk."""

    def __init__(
        self,
        loop: VirtualLoop,
        disk: Disk,
        random: Random,
        *,
        name: str = "network",
        holder: str = "gateway-1",
        key_seed: bytes = bytes(32),
        heartbeat_seconds: float = 5.0,
        receipts: bool = True,
    ) -> None:
        self.program = Program(loop, name)
        self.holder = GatewayId(holder)
        self.identity = Identity(key_seed)
        self.store = MemoryStore(disk, loop, random, program=self.program)
        self.parts = Parts()
        self.ready = asyncio.Event()
        self.stopped = asyncio.Event()
        self.over = asyncio.Event()  # stopped or killed
        self.lines: list[End] = []
        self.calls: set[Call] = set()
        self.wall_ahead_seconds = 0.0
        self.killed_at = math.inf
        self.leaving = False
        self.recovered = 0  # works that an earlier life had left
        self._loop = loop
        self._random = random
        self._receipts = receipts
        self._stop = asyncio.Event()
        self._drain_seconds = 5.0
        self._side = NetworkSide(self.identity, frozenset({HOST}), "simulated network", heartbeat_seconds)
        self._conversing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.program.spawn(self._live())

    def stop(self, drain_seconds: float) -> None:
        """SIGTERM: drains and ends."""
        self._drain_seconds = drain_seconds
        self._stop.set()

    def kill(self) -> None:
        """kill -9: the machine closes its sockets, and callers see their connections end."""
        self.killed_at = self._loop.time()
        self.over.set()
        self.program.kill()
        for end in self.lines:
            end.hang_up()
        for call in sorted(self.calls, key=lambda call: call.name):
            call.finish("lost", self._loop.time())
        self.calls.clear()

    @property
    def listening(self) -> bool:
        return self.ready.is_set() and not self.program.killed and not self.leaving

    def wall(self) -> float:
        return UNIX_EPOCH_SECONDS + self._loop.time() + self.wall_ahead_seconds

    # ------------------------------------------------------------ who comes in

    def accept(self, end: End) -> None:
        """A node has dialled."""
        self.lines.append(end)
        conversing = self.program.spawn(self._converse(end), "link")
        self._conversing.add(conversing)
        conversing.add_done_callback(self._conversing.discard)

    async def _converse(self, end: End) -> None:
        now = self._loop.time()
        conversation = Conversation(Link(self._side, entropy=self._random.randbytes, now=now), end, self._loop.time)
        conversation.link.wall_minus_now = self.wall() - now
        try:
            await self.parts.links.converse(conversation)
        finally:
            await end.close()
            if end in self.lines:
                self.lines.remove(end)

    def request(self, call: Call) -> None:
        """A caller has asked."""
        self.calls.add(call)
        call.handler = self.program.spawn(self._handle(call), call.name)
        call.handler.add_done_callback(lambda task: self._handled(call))

    def _handled(self, call: Call) -> None:
        if not call.over:  # cancelled before it began
            call.finish("left", self._loop.time())
        self.calls.discard(call)

    async def _handle(self, call: Call) -> None:
        try:
            if call.keyed:
                await self.parts.keyed.answer(call, self.wall())
            else:
                await self._answer(call)
        except ApiError as problem:
            call.finish(str(problem.code), self._loop.time(), problem.message)
        except (NodeFault, NoRoom, CallerFault) as fault:
            call.finish(fault.code, self._loop.time(), str(fault))
        except Insufficient as problem:
            call.finish("insufficient", self._loop.time(), str(problem))
        except Unavailable as problem:
            call.finish("unavailable", self._loop.time(), problem.detail)
        except KeyReused:
            call.finish("key_reused", self._loop.time())
        except asyncio.CancelledError:
            call.finish("left", self._loop.time())
            raise

    async def _answer(self, call: Call) -> None:
        loop, parts, work = self._loop, self.parts, call.work
        whole: list[int] = []

        async def emit(emissions: list[Emission]) -> None:
            ids = [token_id for emission in emissions for token_id in emission.ids]
            if call.enough:
                ids = ids[: max(0, call.enough - len(whole))]
            whole.extend(ids)
            if call.enough and len(whole) >= call.enough:
                order.cut(call.enough)
            if call.streaming and ids and (pause := call.take(ids, loop)) is not None:
                await pause
            if call.enough and len(whole) >= call.enough:
                raise Enough(call.enough)

        rows = [view.price for view in parts.registry.snapshot().by_class.get(CLASS_ID, ())]
        input_tokens = len(work.prompt) // 4
        want = max([most(row, input_tokens, work.sampling.max_tokens) for row in rows], default=0)
        least = min([most(row, input_tokens, work.sampling.max_tokens) for row in rows], default=0)
        amount = await parts.books.admit(call.payer, want, least)
        order = parts.books.order(call.payer, work.work_id, CLASS_ID, MODEL_NAME, input_tokens, amount)
        order.max_price = call.max_price
        order.shown = call.streaming
        order.account_weight = call.weight
        order.flexible = call.flexible
        order.max_wait_seconds = call.wait_seconds
        order.charged = lambda held, cost: call.settled_nanocredits.append(cost)
        outcome = await parts.dispatcher.serve(work, order, emit, placed=call.node_ids.append)
        if not call.streaming:
            call.take(whole, loop)
        call.told_nanocredits = outcome.charge_nanocredits
        call.cached_tokens = outcome.cached_tokens
        call.finish(outcome.kind, loop.time())

    # ------------------------------------------------------------ the program

    async def _live(self) -> None:
        loop, store, parts = self._loop, self.store, self.parts
        accounts = parts.accounts = Accounts(store, now=self.wall, entropy=self._random.randbytes)
        registry = parts.registry = Registry(
            store, approve="open", fees=FeePolicy(), now=self.wall, clock=loop.time, random=self._random
        )
        books = parts.books = Books(
            store,
            holder=self.holder,
            network_key=self.identity.public,
            clock=loop.time,
            wall_ms=lambda: int(self.wall() * 1000),
            entropy=self._random.randbytes,
        )
        idempotency = Idempotency(store, holder=self.holder)
        for heard in (accounts.changed, registry.heard, books.heard, idempotency.heard):
            store.listen(heard)
        await accounts.load()
        await registry.load()
        await registry.learn_class(MODEL_CLASS, FACTS, _NO_TEXT)
        await registry.approve(MODEL_NAME, CLASS_ID, by="the simulation")
        async with asyncio.TaskGroup() as tasks:
            links = parts.links = Links(
                registry=registry,
                accounts=accounts,
                texts=_NO_TEXT,
                text_folder=Path("no folder"),
                invite_only=False,
                spawn=lambda body: _void(tasks.create_task(body)),
                clock=loop.time,
            )
            desk = parts.desk = Desk(store, self.identity, links.send)
            if self._receipts:
                links.receipts = desk
                books.send_receipts = desk.send
                store.listen(desk.heard)
            silent = Silent()
            parts.dispatcher = Dispatcher(
                registry=registry,
                links=links,
                books=books,
                observer=silent,
                clock=loop.time,
                admission=Admission(fleet=registry, clock=loop.time, observer=silent),
                patience=Patience(),
            )
            shared = SharedAnswers(
                idempotency,
                books=books,
                dispatcher=parts.dispatcher,
                spawn=lambda body: _void(tasks.create_task(body)),
                clock=loop.time,
            )
            parts.keyed = KeyedCalls(loop, shared, books, registry)
            loops = [
                tasks.create_task(body, name=name)
                for name, body in (
                    ("books", books.run()),
                    ("leases", books.keep()),
                    ("receipts", desk.run()),
                    ("accounts", accounts.watch()),
                    ("names", registry.watch()),
                    ("idempotency", idempotency.keep()),
                )
            ]
            self.recovered = await books.recover()
            self.ready.set()
            await self._stop.wait()
            parts.dispatcher.stop_admitting()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drain_seconds):
                    await links.idle()
            await shared.close()
            links.say_goodbye(Reason.STOPPING, "the network is shutting down")
            self.leaving = True
            if self._conversing:
                await asyncio.wait(self._conversing, timeout=5.0)
            for conversing in self._conversing:
                conversing.cancel()
            # What an HTTP server does with connections that are still open.
            handlers = [call.handler for call in sorted(self.calls, key=lambda call: call.name) if call.handler]
            for handler in handlers:
                handler.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)
            await books.close()
            for each in loops:
                each.cancel()
        self.stopped.set()
        self.over.set()


class _NoText:
    """Texts are somebody else's test: here a class is known from the beginning."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the simulation has no texts, and somebody wants {name} of them")


_NO_TEXT: Any = _NoText()


def _void(_: object) -> None:
    """create_task's result is the group's to keep."""
