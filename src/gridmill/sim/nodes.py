"""A node of the simulation: the real agent, engine, link and outbox, in a program that can die at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

import msgspec

from gridmill.network.prefixes import SentPrefixes
from gridmill.node.agent import Agent, agent_on
from gridmill.node.engines.base import Emit, Event, Finished, Tokens
from gridmill.node.engines.echo import EchoEngine
from gridmill.node.outbox import SCHEMA, Outbox
from gridmill.sim.cables import Line
from gridmill.sim.clock import Program, VirtualLoop
from gridmill.sim.model import SERVED, VOCABULARY
from gridmill.wire.identity import Identity, certify, node_id_of
from gridmill.wire.link import Arrived, Closed, Link, NodeSide, Reason
from gridmill.wire.link import Event as LinkEvent
from gridmill.wire.messages import AnyMessage, Generate, Offer, Price, Step
from gridmill.wire.transport import REDIAL_SECONDS_FIRST, REDIAL_SECONDS_MAX, STABLE_SECONDS, Conversation

HOST = "grid.example"
UNIX_EPOCH_SECONDS = 1_800_000_000.0  # what wall clocks add to the loop's time
DISK_SECONDS = 0.002

Bug = Literal["raise", "early_length", "early_stop"]  # of an engine
Lie = Literal["foreign_id", "no_end", "no_answer", "high_score"]  # of a whole program


class Lines(Protocol):
    """Where a node dials."""

    def connect(self, node: SimNode) -> Line | None:
        """A line to whoever listens there; None when nobody does."""
        ...


@dataclass(frozen=True, slots=True)
class Build:
    """What a node is made of; it stays the same over restarts."""

    name: str
    slots: int = 4
    tokens_per_second: float = 50.0
    first_token_seconds: float = 0.1
    prefill_tokens_per_second: float = 0.0  # 0: a prompt takes no time, however long
    ids_per_step: int = 1
    price: Price = Price()
    delay_seconds: float = 0.02  # one way
    clock_ahead_seconds: float = 0.0


class SimNode:
    """One machine. `start` and `kill` it as often as you like; its keys and its receipts stay."""

    def __init__(self, build: Build, loop: VirtualLoop, seed: str, lines: Lines, owner: Identity) -> None:
        self.build = build
        self.identity = Identity(Random(f"{seed}/{build.name}/key").randbytes(32))
        self.lane = 0  # which gateway it dials
        self.node_id = node_id_of(self.identity.public)
        self.owner = owner
        self.random = Random(f"{seed}/{build.name}")
        self.line: Line | None = None
        self.engine: SimEngine | None = None
        self.agent: Agent | None = None
        self.program: Program | None = None
        self.programs: list[Program] = []
        self.links_made = 0
        self.over = asyncio.Event()  # its program has ended, by itself or not
        self.lie: Lie | None = None  # what it does at its next occasion
        self.withheld = False  # a last word: its place is then never free again on this link
        self.asked_prices = [build.price]
        self._loop = loop
        self._lines = lines
        self._leave = asyncio.Event()
        self._drain_seconds = 5.0
        self._receipts = sqlite3.connect(":memory:", isolation_level=None)
        self._receipts.executescript(SCHEMA)

    @property
    def alive(self) -> bool:
        return self.program is not None and not self.program.killed and not self.over.is_set()

    def start(self) -> None:
        assert not self.alive
        self._leave = asyncio.Event()
        self.over = asyncio.Event()
        self.program = Program(self._loop, self.build.name)
        self.programs.append(self.program)
        self.program.spawn(self._live(), self.build.name)

    def kill(self, *, silently: bool = False) -> None:
        """kill -9, after which the machine closes its sockets; `silently`: the machine lost its power."""
        if not self.alive:
            return
        assert self.program is not None
        self.program.kill()
        self.over.set()
        if self.line is not None:
            self.line.block() if silently else self.line.node.hang_up()
        self.line = self.agent = self.engine = None

    def leave(self, drain_seconds: float) -> None:
        """Drains and ends, as on a SIGTERM."""
        self._drain_seconds = drain_seconds
        self._leave.set()

    def close(self) -> None:
        self._receipts.close()

    # ------------------------------------------------------------ the program

    async def _live(self) -> None:
        loop, build = self._loop, self.build
        outbox = MemoryOutbox(self._receipts, self.identity, wall_clock=self.wall)
        engine = self.engine = SimEngine(build, now=loop.time)
        side = NodeSide(
            self.identity,
            HOST,
            "simulated node",
            owner_key=self.owner.public,
            owner_signature=certify(self.owner, self.identity.public),
        )
        attempts = 0
        while not self._leave.is_set():
            began = loop.time()
            line = self.line = self._lines.connect(self)
            if line is not None:
                conversation = Conversation(
                    Link(side, entropy=self.random.randbytes, now=loop.time()), line.node, loop.time
                )
                conversation.link.wall_minus_now = self.wall() - loop.time()
                closed = await self._talk(conversation, engine, outbox)
                self.line = None
                if conversation.link.opened is not None:
                    self.links_made += 1
                    side = replace(side, pinned_network_key=conversation.link.opened.network_key)
                if closed.permanent:
                    break
                if conversation.link.opened is not None and loop.time() - began >= STABLE_SECONDS:
                    attempts = 0
            if self._leave.is_set():
                break
            delay = self.random.random() * min(REDIAL_SECONDS_MAX, REDIAL_SECONDS_FIRST * 2.0 ** min(attempts, 30))
            attempts += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._leave.wait()
        await engine.close()
        await outbox.close()
        self.engine = None
        self.over.set()

    async def _talk(self, conversation: Conversation, engine: SimEngine, outbox: Outbox) -> Closed:
        try:
            async with (
                agent_on([engine], _Mouth(self, conversation), outbox=outbox, price=self.build.price) as agent,
                asyncio.TaskGroup() as group,
            ):
                self.agent = agent
                agent.step_turns = 1
                conversation.link.telemetry = agent.telemetry

                async def leave() -> None:
                    await self._leave.wait()
                    await agent.drain(self._drain_seconds)
                    conversation.close(Reason.DRAINED)

                leaving = group.create_task(leave(), name="leave")

                def on_event(event: LinkEvent) -> None:
                    if self.lie == "no_answer" and isinstance(event, Arrived) and isinstance(event.message, Offer):
                        self.has_lied()
                    else:
                        agent.on_event(event)

                closed = await conversation.run(on_event)
                leaving.cancel()
            return closed
        finally:
            self.agent = None
            await conversation_over(conversation)

    def wall(self) -> float:
        return UNIX_EPOCH_SECONDS + self._loop.time() + self.build.clock_ahead_seconds

    def has_lied(self) -> None:
        self.withheld |= self.lie in ("no_end", "no_answer")
        self.lie = None

    def ask_for(self, price: Price) -> None:
        """From its next start on."""
        self.build = replace(self.build, price=price)
        self.asked_prices.append(price)


class _Mouth:
    """What an agent says goes out through here, and may be turned into a lie that the link's rules let pass."""

    def __init__(self, node: SimNode, conversation: Conversation) -> None:
        self._node = node
        self._conversation = conversation

    async def bulk_below(self, size: int) -> None:
        await self._conversation.bulk_below(size)

    def send(self, message: AnyMessage) -> None:
        if self._node.lie is not None:
            told, message = message, self._instead_of(message, self._node.lie)
            if message is not told:
                self._node.has_lied()
        self._conversation.send(message)

    def _instead_of(self, message: AnyMessage, lie: Lie) -> AnyMessage:
        match lie, message:
            case "foreign_id", Step(emissions=(first, *others)):
                wrong = msgspec.structs.replace(first, ids=(*first.ids[:-1], VOCABULARY + 7))
                return msgspec.structs.replace(message, emissions=(wrong, *others))
            case "no_end", Step(ends=(_, *others)):
                return msgspec.structs.replace(message, ends=tuple(others))
            case "high_score", Step(emissions=(first, *others)) if first.logprobs is not None:
                scores = tuple(msgspec.structs.replace(entry, logprob=3.0) for entry in first.logprobs)
                wrong = msgspec.structs.replace(first, logprobs=scores)
                return msgspec.structs.replace(message, emissions=(wrong, *others))
            case _:
                return message


async def conversation_over(conversation: Conversation) -> None:
    """What `dial` does when its block is left."""
    await conversation._socket.close()


class SimEngine(EchoEngine):
    """The echo engine, which can be slowed, wedged, and made to do what no engine should."""

    def __init__(self, build: Build, *, now: Callable[[], float]) -> None:
        super().__init__(
            SERVED,
            slots=build.slots,
            tokens_per_second=build.tokens_per_second,
            first_token_delay_seconds=build.first_token_seconds,
            ids_per_step=build.ids_per_step,
            now=now,
        )
        self.bug: Bug | None = None  # what its next step does
        self._factor = 1.0
        self._cache = SentPrefixes()  # what an engine with a prefix cache would still hold
        self._build = build
        self._free = asyncio.Event()
        self._free.set()

    def slow_down(self, factor: float) -> None:
        self._factor = factor
        self._tokens_per_second = self._build.tokens_per_second / factor

    def wedge(self) -> None:
        """It makes nothing any more, while the program goes on and says that all is well."""
        self._free.clear()

    def unwedge(self) -> None:
        self._free.set()

    def speeds(self) -> tuple[float, float]:
        """What it would tell after measuring itself."""
        return self._build.tokens_per_second, self._build.prefill_tokens_per_second

    def _first_token_seconds(self, work: Generate) -> float:
        seconds, rate = self._build.first_token_seconds, self._build.prefill_tokens_per_second
        if rate:
            given, now = work.prompt + work.delivered, self._now()
            cached = self._cache.cached_tokens(work.class_id, work.cache_salt, given, now)
            self._cache.remember(work.class_id, work.cache_salt, given, now)
            seconds += (len(given) // 4 - cached) / rate
        return seconds * self._factor

    async def run(self, work: Generate, emit: Emit) -> None:
        over = False
        self._first_token_delay_seconds = self._first_token_seconds(work)  # it is read before the first wait

        async def gated(event: Event) -> None:
            nonlocal over
            if not self._free.is_set() and isinstance(event, Tokens | Finished):
                await self._free.wait()
            if over:
                return
            if self.bug is not None and isinstance(event, Tokens):
                bug, self.bug = self.bug, None
                over = True
                match bug:
                    case "raise":
                        raise RuntimeError("a simulated bug of an engine")
                    case "early_length":
                        await emit(Finished("length"))
                    case "early_stop":
                        await emit(Finished("stop"))
                raise _Ended
            await emit(event)

        with contextlib.suppress(_Ended):
            await super().run(work, gated)


class _Ended(Exception):
    """The engine said what its bug made it say."""


class MemoryOutbox(Outbox):
    """The real outbox on a database in memory, which a kill of the program does not harm, and without a thread."""

    def __init__(self, connection: sqlite3.Connection, identity: Identity, *, wall_clock: Callable[[], float]) -> None:
        super().__init__(Path("memory"), identity, wall_clock=wall_clock)
        self._connection = connection

    def _hand_in(self, task: Callable[[sqlite3.Connection], Any], future: Any) -> bool:
        assert future is None
        self._commit(self._connection, [(task, None)])
        return True

    async def _ask(self, task: Callable[[sqlite3.Connection], Any]) -> Any:
        await asyncio.sleep(DISK_SECONDS)
        result: list[Any] = [None]

        def keep(connection: sqlite3.Connection) -> None:
            result[0] = task(connection)

        self._commit(self._connection, [(keep, None)])
        return result[0]
