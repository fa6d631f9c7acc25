"""Whatever gateways do, in whatever order, and whenever they are killed: the money comes out even.

The invariants of the ledger's specification as far as books touch them: balances are their entries and add up to zero
(1–3, by `ledger.check`), no work is charged beyond its hold (6), pay, fees and reserves are the charge (7, by
`ledger.check` over transfers), delivered ids are charged once and never beyond what was delivered (8), and nothing is
held once every gateway has ended or been recovered.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from databases import Database
from gridmill.network import ledger
from gridmill.network.books import Books, GatewayId, Insufficient, Order, Payer, Server, Unavailable
from gridmill.network.metering import FREE, FeePolicy, PriceRow, Usage, charge, most
from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import Store, Transaction
from gridmill.wire.messages import Price
from postgres_server import Server as PostgresServer

ROWS = (PriceRow("price-1", Price(50, 10, 400), FeePolicy()), PriceRow("price-2", Price(3, 3, 7), FeePolicy(333)), FREE)
ACCOUNTS = ("alice", "bob")
CREDIT = 60_000  # enough for some dozen works, so that the end of the money is met often

steps = st.lists(
    st.tuples(
        st.sampled_from(("admit", "admit", "serve", "serve", "deliver", "deliver", "settle", "settle", "leave"))
        | st.sampled_from(("unserve", "release", "wait", "kill", "reclaim")),
        st.integers(0, 1 << 16),
    ),
    min_size=5,
    max_size=60,
)


class Schedule:
    """Plays steps on some gateways, and remembers what each work may have cost."""

    def __init__(self, database: Database, gateways: int) -> None:
        self.database = database
        self.names = [GatewayId(f"gateway-{n}") for n in range(gateways)]
        self.books: list[Books] = []
        self.stores: list[Store] = []
        self.running: list[asyncio.Task[None]] = []
        self.orders: list[list[Order]] = [[] for _ in self.names]
        self.most: dict[str, int] = {}  # nanocredits that a work may cost at most, by what was delivered
        self.asked: dict[str, tuple[PriceRow, int]] = {}  # price and max_tokens
        self.count = 0

    async def play(self, script: list[tuple[str, int]]) -> None:
        for n in range(len(self.names)):
            await self.start(n)
        for account in ACCOUNTS:
            await self.stores[0].run(
                functools.partial(ledger.apply, commands=[ledger.credit(account, CREDIT, f"credit-{account}")])
            )
        for verb, number in script:
            n = number % len(self.names)
            await getattr(self, verb)(n, number // len(self.names))
        for n in range(len(self.names)):
            await self.books[n].close()
            await self.stop(n)
        for n in range(len(self.names)):  # a second look finds nothing left to do
            await self.start(n)
            await self.books[n].close()
            await self.stop(n)

    async def start(self, n: int) -> None:
        store = self.database.store(wall_clock=time.time)
        await store.open(MIGRATIONS)
        books = Books(
            store,
            holder=self.names[n],
            network_key=b"k" * 32,
            clock=time.monotonic,
            wall_ms=lambda: int(time.time() * 1000),
            entropy=os.urandom,
        )
        store.listen(books.heard)
        running = asyncio.create_task(books.run())
        await books.recover()
        if n == len(self.books):
            self.books.append(books)
            self.stores.append(store)
            self.running.append(running)
        else:
            self.books[n], self.stores[n], self.running[n] = books, store, running

    async def stop(self, n: int) -> None:
        self.running[n].cancel()
        await asyncio.wait([self.running[n]])
        await self.stores[n].close()

    # ------------------------------------------------------------ steps

    async def admit(self, n: int, number: int) -> None:
        row = ROWS[number % 3]
        payer = Payer(ACCOUNTS[number // 3 % 2], "key-1")
        tokens = 1 + number // 6 % 20
        amount = most(row, 10, tokens)
        with contextlib.suppress(Insufficient, Unavailable):
            await self.books[n].admit(payer, amount, amount)
            self.count += 1
            order = self.books[n].order(payer, f"work-{self.count}", "c" * 64, "toy", 10, amount)
            self.asked[order.work_id] = (row, tokens)
            self.orders[n].append(order)

    def _pick(self, n: int, number: int, *, served: bool) -> Order | None:
        found = [o for o in self.orders[n] if (o.server is not None) == served and not o.settled]
        return found[number % len(found)] if found else None

    async def serve(self, n: int, number: int) -> None:
        order = self._pick(n, number, served=False)
        if order is not None:
            row, _ = self.asked[order.work_id]
            server = Server("node-1", b"n" * 32, f"owner-{number % 2}", row)
            self.books[n].serve(order, server, b"\0\0\0\0" * 10, b"salt", 0)

    async def deliver(self, n: int, number: int) -> None:
        order = self._pick(n, number, served=True)
        if order is not None and order.count < self.asked[order.work_id][1]:
            order.deliver((number % 1000,))
            row, _ = self.asked[order.work_id]
            self.most[order.work_id] = charge(row, Usage(10, 0, order.count)).total

    async def settle(self, n: int, number: int) -> None:
        order = self._pick(n, number, served=True)
        if order is not None:
            self.books[n].settle(order, Usage(10, number % 11, order.count) if order.count else Usage(), "stop")

    async def leave(self, n: int, number: int) -> None:
        order = self._pick(n, number, served=True)
        if order is not None:
            keep = number % (order.count + 1)
            self.books[n].settle(order, Usage(10, 0, keep) if keep else Usage(4, 0, 0), "cancelled")
            self.most[order.work_id] = max(
                self.most.get(order.work_id, 0),
                charge(order.server.row, Usage(10, 0, order.count)).total,  # type: ignore[union-attr]
            )

    async def unserve(self, n: int, number: int) -> None:
        order = self._pick(n, number, served=True)
        if order is not None and not order.count:
            self.books[n].unserve(order)

    async def release(self, n: int, number: int) -> None:
        order = self._pick(n, number, served=False)
        if order is not None:
            self.books[n].release(order)

    async def wait(self, n: int, number: int) -> None:
        """Long enough for the journal to be written, or not quite."""
        await asyncio.sleep((number % 4) * 0.01)

    async def reclaim(self, n: int, number: int) -> None:
        self.books[n].heard("reclaim", f'["call-{number}", "somebody", "{ACCOUNTS[number % 2]}"]')

    async def kill(self, n: int, number: int) -> None:
        await self.stop(n)
        self.orders[n] = []
        await self.start(n)

    # ------------------------------------------------------------ afterwards

    async def verdict(self) -> None:
        store = self.database.store(wall_clock=time.time)
        await store.open(MIGRATIONS)
        try:
            problems = await store.run(ledger.check)
            assert not problems, problems
            balances = await store.run(ledger.balances)
            for account in ACCOUNTS:
                assert balances.get(ledger.user_hold(account), 0) == 0
                assert 0 <= balances[ledger.user_available(account)] <= CREDIT
            assert balances.get("escrow:request", 0) == 0
            assert balances.get("loss", 0) == 0  # no lease ever ended before its works here
            charged = sum(CREDIT - balances[ledger.user_available(account)] for account in ACCOUNTS)
            assert charged == sum(amount for name, amount in balances.items() if _earns(name))

            async def leaves(transaction: Transaction) -> list[tuple[Any, ...]]:
                return await transaction.all(
                    "SELECT transfer_id, amount FROM transfers WHERE kind = 'work' AND amount > 0"
                )

            paid = {row[0].split(":")[1]: row[1] for row in await store.run(leaves)}
            for work_id, amount in paid.items():
                assert amount <= self.most[work_id], (work_id, amount)
            assert sum(paid.values()) == charged
        finally:
            await store.close()


def _earns(account: str) -> bool:
    return account.startswith(("provider:", "network:", "audit:", "failover:"))


def play(database: Database, gateways: int, script: list[tuple[str, int]]) -> None:
    async def body() -> None:
        schedule = Schedule(database, gateways)
        async with asyncio.timeout(60):
            await schedule.play(script)
            await schedule.verdict()

    asyncio.run(body())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=steps)
def test_one_gateway_on_sqlite(script: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        play(Database("sqlite", str(Path(folder) / "network.sqlite")), 1, script)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=steps)
def test_three_gateways_on_postgresql(postgres: PostgresServer, script: list[tuple[str, int]]) -> None:
    url = postgres.create_database()
    try:
        play(Database("postgres", url), 3, script)
    finally:
        postgres.drop_database(url)
