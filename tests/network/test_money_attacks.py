"""What a hostile node or user tries on the money (docs/attacks.md, Money): nodes are scripted, the ledger is real."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_dispatch import CLASS, EOS, PAYER, ScriptedNode, World, play
from test_dispatch_money import INPUT, MOST, PRICE, Reader, Script, Till, cost, priced, says, work

from gridmill.network.books import Insufficient
from gridmill.network.faults import NodeFault, NoRoom
from gridmill.network.links import OFFERS_AT_ONCE
from gridmill.network.store import Transaction
from gridmill.wire.messages import Accept, ClassOffer, Offer, Offers, Price


def asks(*prices: Price, slots: int = 4) -> Offers:
    return Offers(tuple(ClassOffer("demo", CLASS, slots, "echo", price=price) for price in prices))


async def price_rows(world: World) -> int:
    async def count(transaction: Transaction) -> int:
        row = await transaction.one("SELECT COUNT(*) FROM prices")
        assert row is not None
        return int(row[0])

    return await world.books._store.run(count)


def test_a_price_that_rises_under_a_running_work_changes_nothing_of_its_bill(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.say(offer.stream, 0, 5)
        before = len(node.heard)
        node.send(asks(Price(10**9, 10**9, 10**9)))
        await node.until(lambda: len(node.heard) > before)  # the network has listed it
        node.say(offer.stream, 1, EOS)
        node.end(offer.stream, 2, "stop")

    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        outcome = await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
        assert outcome.charge_nanocredits == await till.charged() == cost(INPUT, 2)

    priced(tmp_path, script, body)


def test_a_work_that_waits_is_not_served_at_a_price_over_what_is_held_for_it(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        before = len(node.heard)
        node.send(asks(Price(10**8, 10, 10**8), slots=1))
        await node.until(lambda: len(node.heard) > before)
        node.say(offer.stream, 0, EOS)
        node.end(offer.stream, 1, "stop")

    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        await world.join(ScriptedNode(script, slots=1, price=PRICE))
        first, second = work("first"), work("second")
        serving = asyncio.create_task(world.dispatcher.serve(first, await till.order(first), Reader().emit))
        await asyncio.sleep(0)
        with pytest.raises(NoRoom, match="no node serves"):
            await world.dispatcher.serve(second, await till.order(second), Reader().emit)
        await serving
        assert await till.charged() == cost(INPUT, 1)

    play(tmp_path, run)


def test_a_node_that_stops_before_its_first_id_earns_nothing(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        with pytest.raises(NodeFault, match="before its first id"):
            await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
        assert await till.charged() == 0

    priced(tmp_path, says(then="stop"), body)


def test_a_node_dearer_than_the_callers_cap_is_not_asked_though_what_is_held_would_pay_it(tmp_path: Path) -> None:
    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        await world.join(dear := ScriptedNode(says(1, then="stop"), slots=4, price=Price(190, 0, 0)))
        held = await world.books.admit(PAYER, MOST, MOST)
        order = world.order(work(), held)
        order.max_price = Price(100, 10**9, 500)
        with pytest.raises(NoRoom, match="no node serves"):
            await world.dispatcher.serve(work(), order, Reader().emit)
        assert not dear.heard_of(Offer)
        assert await till.charged() == 0

    play(tmp_path, run)


@pytest.mark.parametrize("want", [2 * 10**17, 2 * 10**18])
def test_a_request_dearer_than_all_money_is_refused_and_the_books_go_on(tmp_path: Path, want: int) -> None:
    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        with pytest.raises(Insufficient):
            await world.books.admit(PAYER, want, want)
        world.books.give_back(PAYER, await world.books.admit(PAYER, MOST, MOST))
        assert await till.charged() == 0

    play(tmp_path, run)


def test_a_flood_of_prices_does_not_fill_the_disk(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        for number in range(200):
            node.send(asks(*(Price(50 + number, 0, 400 + of_one_class) for of_one_class in range(64))))
            await asyncio.sleep(0.001)
        assert await price_rows(world) <= OFFERS_AT_ONCE + 2

    nobody_asks: Script = says()
    priced(tmp_path, nobody_asks, body)
