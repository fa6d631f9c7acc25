"""Nobody spends what is not theirs: slices, holds, the journal and its recovery, on both databases."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from databases import Database
from gridmill.network import ledger
from gridmill.network.books import Books, GatewayId, Insufficient, Order, Payer, Server, Unavailable
from gridmill.network.ledger import Command, Result
from gridmill.network.metering import FREE, FeePolicy, PriceRow, Usage, most
from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import Store, Transaction
from gridmill.wire.messages import Price

ALICE = Payer("alice", "key-1")
ROW = PriceRow("price-1", Price(50, 10, 400), FeePolicy())
SERVER = Server("node-1", b"n" * 32, "owner-1", ROW)
NUMBERS = itertools.count()
LEASE_SECONDS = 4.0


class World:
    """Some gateways on one database. `ahead` is how far each one's own clock has been moved on."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.wall_ahead = 0.0
        self.store: Store

    def wall(self) -> float:
        return time.time() + self.wall_ahead

    @asynccontextmanager
    async def gateway(self, name: str = "gateway-1", *, killed: bool = False) -> AsyncIterator[Books]:
        """Books that run. `killed`: they end without a word, as with kill -9."""
        store = self.database.store(wall_clock=self.wall)
        await store.open(MIGRATIONS)
        books = Books(
            store,
            holder=GatewayId(name),
            network_key=b"k" * 32,
            clock=lambda: time.monotonic() + self.wall_ahead,
            wall_ms=lambda: int(self.wall() * 1000),
            entropy=os.urandom,
            lease_seconds=LEASE_SECONDS,
        )
        store.listen(books.heard)
        running = asyncio.create_task(books.run())
        await books.recover()
        try:
            yield books
            if not killed:
                await books.close()
        finally:
            running.cancel()
            await asyncio.wait([running])
            await store.close()

    async def apply(self, *commands: Command) -> list[Result]:
        return await self.store.run(lambda tx: ledger.apply(tx, commands))

    async def credit(self, amount: int, account: str = "alice") -> None:
        await self.apply(ledger.credit(account, amount, f"credit-{next(NUMBERS)}"))

    async def balance(self, account: str) -> int:
        return await self.store.run(lambda tx: ledger.balance(tx, account))

    async def sound(self) -> None:
        problems = await self.store.run(ledger.check)
        assert not problems, problems

    async def count(self, sql: str) -> int:
        async def action(transaction: Transaction) -> int:
            row = await transaction.one(sql)
            assert row is not None
            return int(row[0])

        return await self.store.run(action)


def play(database: Database, body: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        world = World(database)
        world.store = database.store(wall_clock=world.wall)
        await world.store.open(MIGRATIONS)
        try:
            async with asyncio.timeout(60):
                await body(world)
            await world.sound()
        finally:
            await world.store.close()

    asyncio.run(run())


async def admitted(books: Books, input_tokens: int = 10, max_tokens: int = 5, row: PriceRow = ROW) -> Order:
    amount = most(row, input_tokens, max_tokens)
    assert await books.admit(ALICE, amount, amount) == amount
    return books.order(ALICE, f"work-{next(NUMBERS)}", "c" * 64, "toy", input_tokens, amount)


def begin(books: Books, order: Order, row: PriceRow = ROW) -> None:
    books.serve(order, Server("node-1", b"n" * 32, "owner-1", row), b"\0\0\0\0" * order.input_tokens, b"salt", 0)


async def one_work(books: Books, tokens: int = 5, **options: int) -> int:
    order = await admitted(books, **options)
    begin(books, order)
    order.deliver(tuple(range(tokens)))
    return books.settle(order, Usage(order.input_tokens, 0, tokens), "stop")


COST = most(ROW, 10, 5)


def test_a_short_work_is_paid_from_the_slice_and_the_rest_comes_back(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        async with world.gateway() as books:
            assert await one_work(books, tokens=3) == most(ROW, 10, 3)
            await books.flush()
            assert await world.balance("provider:owner-1:earned_held") == 10 * 50 + 3 * 400
        assert await world.balance("user:alice:available") == 10 * COST - most(ROW, 10, 3)
        assert await world.balance("user:alice:hold") == 0
        assert await world.count("SELECT COUNT(*) FROM receipt_leaves") == 1

    play(database, body)


def test_who_cannot_pay_is_told_how_much_is_missing_and_nothing_is_held(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(COST - 1)
        async with world.gateway() as books:
            with pytest.raises(Insufficient) as caught:
                await books.admit(ALICE, COST, COST)
            assert (caught.value.missing, caught.value.limited_by) == (1, "balance")
            assert await books.admit(ALICE, COST, COST - 5) == COST - 1  # what there is, where less will do
            books.give_back(ALICE, COST - 1)
        assert await world.balance("user:alice:available") == COST - 1

    play(database, body)


def test_what_is_free_needs_no_balance_and_still_has_a_receipt(database: Database) -> None:
    async def body(world: World) -> None:
        async with world.gateway() as books:
            order = books.order(ALICE, "w", "c" * 64, "toy", 10, await books.admit(ALICE, 0, 0))
            begin(books, order, FREE)
            order.deliver((1, 2))
            assert books.settle(order, Usage(10, 0, 2), "stop") == 0
        assert await world.count("SELECT COUNT(*) FROM receipt_leaves") == 1
        assert await world.count("SELECT COUNT(*) FROM transfers") == 0
        assert await world.count("SELECT SUM(output_tokens) FROM usage_days") == 2

    play(database, body)


def test_a_long_work_is_journalled_and_its_hold_ends_with_it(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        async with world.gateway() as books:
            order = await admitted(books)
            begin(books, order)
            order.deliver((7,))
            await journalled(world, 1)
            assert await world.balance("escrow:request") == COST
            await asyncio.sleep(0.1)  # some ticks with nothing to write must not be the last
            order.deliver((8,))
            await journalled(world, 2)
            books.settle(order, Usage(10, 0, 2), "cancelled")
            await books.flush()
            assert await world.balance("escrow:request") == 0
            assert await world.count("SELECT COUNT(*) FROM open_works") == 0
            order = await admitted(books)  # the rest is in the slice again
            books.release(order)
        assert await world.balance("user:alice:available") == 10 * COST - most(ROW, 10, 2)

    play(database, body)


async def journalled(world: World, tokens: int) -> None:
    while True:
        if await world.count(f"SELECT COUNT(*) FROM open_works WHERE output_tokens = {tokens}") == 1:
            return
        await asyncio.sleep(0.01)


def test_a_killed_gateway_charges_what_it_had_journalled_when_it_comes_back(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        async with world.gateway(killed=True) as books:
            order = await admitted(books)
            begin(books, order)
            order.deliver((7, 8, 9))
            await journalled(world, 3)
            await one_work(books)  # held in memory alone when the end comes, or settled: both must come out even
        async with world.gateway():
            assert await world.count("SELECT COUNT(*) FROM open_works") == 0
            spent = await world.balance("provider:owner-1:earned_held")
            assert spent in (10 * 50 + 3 * 400, 2 * 10 * 50 + 8 * 400)
        assert await world.balance("user:alice:hold") == 0
        assert await world.balance("escrow:request") == 0

    play(database, body)


def test_a_node_that_fails_before_its_first_id_costs_nothing_and_another_may_serve(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        async with world.gateway() as books:
            order = await admitted(books)
            begin(books, order)
            await journalled(world, 0)
            books.unserve(order)
            begin(books, order)
            order.deliver((1,))
            await journalled(world, 1)
            assert books.settle(order, Usage(10, 0, 1), "stop") == most(ROW, 10, 1)
        assert await world.balance("user:alice:available") == 10 * COST - most(ROW, 10, 1)
        assert await world.count("SELECT COUNT(*) FROM receipt_leaves") == 1

    play(database, body)


def test_of_five_hundred_at_once_exactly_those_who_can_pay_are_admitted(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(100 * COST + COST - 1)
        async with world.gateway() as books:
            results = await asyncio.gather(*(one_work(books) for _ in range(500)), return_exceptions=True)
        assert [r for r in results if not isinstance(r, Insufficient)] == [COST] * 100
        assert await world.balance("user:alice:available") == COST - 1

    play(database, body)


def test_two_gateways_share_a_balance_to_the_last_work(postgres_database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(100 * COST)
        async with world.gateway("gateway-1") as one, world.gateway("gateway-2") as two:
            works = [one_work(one if n % 2 else two) for n in range(500)]
            results = await asyncio.gather(*works, return_exceptions=True)
        paid = [r for r in results if isinstance(r, int)]
        assert {type(r) for r in results if not isinstance(r, int)} == {Insufficient}
        assert paid == [COST] * 100
        assert await world.balance("user:alice:available") == 0

    play(postgres_database, body)


def test_a_slice_that_another_gateway_does_not_use_is_given_back_before_anybody_is_refused(
    postgres_database: Database,
) -> None:
    async def body(world: World) -> None:
        await world.credit(3 * COST)
        async with world.gateway("gateway-1") as one, world.gateway("gateway-2") as two:
            await one_work(one)  # leases all there is
            assert await world.balance("user:alice:available") == 0
            await one_work(two)
            await one_work(two)
            with pytest.raises(Insufficient):
                await one_work(one)

    play(postgres_database, body)


def test_a_gateway_that_stood_still_past_its_lease_spends_nothing_of_it(postgres_database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(2 * COST)
        async with world.gateway("gateway-1") as stopped, world.gateway("gateway-2") as other:
            late = await admitted(stopped)
            begin(stopped, late)
            late.deliver((1, 2, 3, 4, 5))
            stopped_run = stopped.heard
            stopped.heard = lambda topic, subject: None  # type: ignore[method-assign]
            # The server's clock cannot be moved: what has passed is the lease's own time.
            await asyncio.sleep(LEASE_SECONDS + 0.5)
            await other.keep_once()
            await one_work(other)
            stopped.heard = stopped_run  # type: ignore[method-assign]
            with pytest.raises((Insufficient, Unavailable)):
                for _ in range(3):
                    await one_work(stopped)
            stopped.settle(late, Usage(10, 0, 5), "stop")
        credited, spent = 2 * COST, await world.balance("user:alice:available")
        assert 0 <= spent <= credited

    play(postgres_database, body)


def test_a_gateway_that_never_comes_back_is_cleaned_up_after_by_another(postgres_database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        async with world.gateway("gateway-1", killed=True) as dead:
            order = await admitted(dead)
            begin(dead, order)
            order.deliver((1, 2))
            await journalled(world, 2)
        async with world.gateway("gateway-2") as other:
            await asyncio.sleep(LEASE_SECONDS + 0.5)
            await other.keep_once()
            assert await world.count("SELECT COUNT(*) FROM open_works") == 0
            assert await world.balance("user:alice:available") == 10 * COST - most(ROW, 10, 2)

    play(postgres_database, body)


def test_a_keys_budget_limits_its_slice_and_not_the_account(database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        limited = Payer("alice", "key-2", has_budget=True)
        await world.store.run(lambda tx: ledger.set_budget(tx, "key-2", 2 * COST))
        async with world.gateway() as books:
            for _ in range(2):
                assert await books.admit(limited, COST, COST) == COST
                books.release(books.order(limited, f"w-{next(NUMBERS)}", "c" * 64, "toy", 10, COST))
            held = [await books.admit(limited, COST, COST) for _ in range(2)]
            with pytest.raises(Insufficient) as caught:
                await books.admit(limited, COST, COST)
            assert caught.value.limited_by == "budget"
            assert await one_work(books) == COST
            books.give_back(limited, sum(held))
        assert await world.balance("user:alice:available") == 9 * COST

    play(database, body)


def test_a_work_that_another_gateway_has_settled_is_not_settled_again(postgres_database: Database) -> None:
    async def body(world: World) -> None:
        await world.credit(10 * COST)
        async with world.gateway("gateway-1") as slow, world.gateway("gateway-2") as other:
            order = await admitted(slow)
            begin(slow, order)
            order.deliver((1, 2))
            await journalled(world, 2)
            await asyncio.sleep(LEASE_SECONDS + 0.5)  # nobody renews: `keep` does not run here
            await other.keep_once()
            order.deliver((3,))
            slow.settle(order, Usage(10, 0, 3), "stop")
        assert await world.balance("user:alice:available") == 10 * COST - most(ROW, 10, 2)
        assert await world.balance("provider:owner-1:earned_held") == 10 * 50 + 2 * 400
        assert await world.count("SELECT SUM(requests) FROM usage_days") == 1
        assert await world.count("SELECT COUNT(*) FROM receipt_leaves") == 1

    play(postgres_database, body)
