"""Who pays for what when a work ends, early or not (design §5, Money): nodes are scripted, the ledger is real."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from test_dispatch import CLASS, EOS, PAYER, Reader, ScriptedNode, World, play

from gridmill.network import ledger
from gridmill.network.faults import CallerFault, Enough, NodeFault, NoRoom
from gridmill.network.metering import FeePolicy, PriceRow, Usage, charge, most
from gridmill.network.store import Transaction
from gridmill.wire.messages import Accept, Cancel, Drain, Emission, Generate, Offer, Price
from gridmill.wire.sampling import Sampling, pack_ids

PRICE = Price(50, 10, 400)
ROW = PriceRow("", PRICE, FeePolicy())
INPUT = 40  # tokens: two whole blocks of the prefix record, and a half
MOST = most(ROW, INPUT, 10)


def work(name: str = "w", max_tokens: int = 10) -> Generate:
    return Generate(name, CLASS.class_id, pack_ids(list(range(INPUT))), Sampling(bytes(32), max_tokens), salt=b"salt")


class Till:
    """What alice has and what was charged; opened with enough for ten works."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def open(self) -> None:
        await self.store.run(lambda tx: ledger.apply(tx, [ledger.credit("a", 10 * MOST, "credit-1")]))

    @property
    def store(self) -> Any:
        return self.world.books._store

    async def order(self, wanted: Generate) -> Any:
        return self.world.order(wanted, await self.world.books.admit(PAYER, MOST, MOST))

    async def charged(self) -> int:
        """What alice has paid in all; nothing is held any more and the books add up."""
        await self.world.books.flush()
        problems = await self.store.run(ledger.check)
        assert not problems, problems
        balances = await self.store.run(ledger.balances)
        assert balances.get("escrow:request", 0) == 0
        return sum(amount for name, amount in balances.items() if not name.startswith(("user:", "rail:")))

    async def leaves(self) -> int:
        async def count(transaction: Transaction) -> int:
            row = await transaction.one("SELECT COUNT(*) FROM receipt_leaves")
            assert row is not None
            return int(row[0])

        return int(await self.store.run(count))


Script = Callable[[ScriptedNode, Offer], Awaitable[None]]


def priced(tmp_path: Path, script: Script, body: Callable[[World, Till, ScriptedNode], Awaitable[None]]) -> None:
    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        await world.join(node := ScriptedNode(script, slots=4, price=PRICE))
        await body(world, till, node)

    play(tmp_path, run)


def cost(input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> int:
    return charge(ROW, Usage(input_tokens, cached_tokens, output_tokens)).total


def says(*ids: int, then: str | None = None, drained: bool = False) -> Script:
    """Accepts, emits these ids one by one, and ends so; without an end it waits for ever. A stop ends with its id."""
    ids = (*ids[:-1], EOS) if ids and then == "stop" else ids

    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        for position, token in enumerate(ids):
            node.say(offer.stream, position, token)
        if drained:
            node.send(Drain(5.0))
        if then == "cut":
            await asyncio.sleep(0.05)  # what was said is on its way
            node.cut()
        elif then is not None:
            node.end(offer.stream, len(ids), then)
        else:
            await node.until(lambda: any(c.stream == offer.stream for c in node.heard_of(Cancel)))
            node.end(offer.stream, len(ids), "cancelled")

    return script


def test_a_whole_answer_costs_its_prompt_and_its_ids(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        outcome = await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
        assert outcome.charge_nanocredits == await till.charged() == cost(INPUT, 3)
        assert node.heard_of(Offer)[0].work.price == PRICE

    priced(tmp_path, says(1, 2, 3, then="stop"), body)


def test_a_prompt_that_was_sent_before_costs_its_cached_price_whatever_the_node_says(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        for name in ("first", "second"):
            wanted = work(name)
            outcome = await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
            await asyncio.sleep(0)  # what was sent is noted once the answer is out
        assert outcome.cached_tokens == 32
        assert await till.charged() == cost(INPUT, 2) + cost(INPUT, 2, cached_tokens=32)

    priced(tmp_path, says(1, 2, then="stop"), body)


def test_a_stop_string_charges_what_is_kept(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()

        async def emit(emissions: list[Emission]) -> None:
            raise Enough(keep=1)

        await world.dispatcher.serve(wanted, await till.order(wanted), emit)
        assert await till.charged() == cost(INPUT, 1)
        assert node.heard_of(Cancel)[0].keep == 1

    priced(tmp_path, says(1, 2), body)


def test_a_caller_who_leaves_after_the_first_id_pays_the_prompt_and_what_was_delivered(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted, reader = work(), Reader()
        task = asyncio.create_task(world.dispatcher.serve(wanted, await till.order(wanted), reader.emit))
        while len(reader.ids) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await world.idle()
        assert await till.charged() == cost(INPUT, 2)
        assert node.heard_of(Cancel)[0].keep == 2

    priced(tmp_path, says(1, 2), body)


def test_a_caller_who_leaves_before_the_first_id_pays_at_most_what_can_have_been_computed(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        record = world.registry.nodes()[0]
        record.prefill_speed[CLASS.class_id] = 10.0  # measured: ten ids a second
        wanted, placed = work(), asyncio.Event()
        serving = world.dispatcher.serve(
            wanted, await till.order(wanted), Reader().emit, placed=lambda node_id: placed.set()
        )
        task = asyncio.create_task(serving)
        await placed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await world.idle()
        assert await till.charged() < cost(INPUT // 2, 0)

    priced(tmp_path, says(), body)


def test_a_node_that_breaks_off_forfeits_its_prefill_and_is_paid_what_was_delivered(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        with pytest.raises(NodeFault):
            await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
        assert await till.charged() == cost(0, 3)
        assert await till.leaves() == 1

    priced(tmp_path, says(1, 2, 3, then="cut"), body)


def test_a_node_that_said_that_it_drains_keeps_its_prefill(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        with pytest.raises(NodeFault):
            await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
        assert await till.charged() == cost(INPUT, 2)

    priced(tmp_path, says(1, 2, then="cut", drained=True), body)


def test_a_node_that_fails_before_its_first_id_costs_nothing_and_the_next_is_paid(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        await world.join(other := ScriptedNode(says(7, 8, then="stop"), slots=4, price=PRICE))
        while len(world.registry.price_rows(CLASS.class_id)) < 2:
            await asyncio.sleep(0)
        for n in range(4):  # whichever is asked first
            wanted, reader = work(f"w-{n}"), Reader()
            await world.dispatcher.serve(wanted, await till.order(wanted), reader.emit)
            assert reader.ids == [7, EOS]
            await asyncio.sleep(0)
        paid = await till.charged()
        cached = [cost(INPUT, 2, cached_tokens=32)] * 3
        assert paid == cost(INPUT, 2) + sum(cached)
        assert other.heard_of(Offer)

    priced(tmp_path, says(then="failed"), body)


def test_what_nobody_was_given_costs_nothing(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        with pytest.raises(NodeFault):
            await world.dispatcher.serve(wanted, await till.order(wanted), Reader().emit)
        assert await till.charged() == 0
        assert await till.leaves() == 0

    priced(tmp_path, says(then="failed"), body)


def test_a_revoked_key_ends_what_runs_and_pays_what_it_was_given(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted, reader = work(), Reader()
        task = asyncio.create_task(world.dispatcher.serve(wanted, await till.order(wanted), reader.emit))
        while len(reader.ids) < 2:
            await asyncio.sleep(0)
        world.dispatcher.revoke({PAYER.key_id})  # type: ignore[arg-type]
        with pytest.raises(CallerFault) as caught:
            await task
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        await world.idle()
        assert await till.charged() == cost(INPUT, 2)

    priced(tmp_path, says(1, 2), body)


def test_a_node_that_costs_more_than_is_held_is_not_asked(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        order = world.order(wanted, await world.books.admit(PAYER, MOST - 1, MOST - 1))
        with pytest.raises(NoRoom):
            await world.dispatcher.serve(wanted, order, Reader().emit)
        assert await till.charged() == 0
        assert not node.heard_of(Offer)

    priced(tmp_path, says(1, then="stop"), body)


def test_an_answer_that_leaves_as_a_whole_costs_nothing_when_its_node_breaks_off(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted = work()
        order = await till.order(wanted)
        order.shown = False
        with pytest.raises(NodeFault):
            await world.dispatcher.serve(wanted, order, Reader().emit)
        assert await till.charged() == 0

    priced(tmp_path, says(1, 2, 3, then="cut"), body)


def test_a_caller_of_a_whole_answer_who_leaves_pays_the_prompt_alone(tmp_path: Path) -> None:
    async def body(world: World, till: Till, node: ScriptedNode) -> None:
        wanted, reader = work(), Reader()
        order = await till.order(wanted)
        order.shown = False
        task = asyncio.create_task(world.dispatcher.serve(wanted, order, reader.emit))
        while len(reader.ids) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await world.idle()
        assert await till.charged() == cost(INPUT, 0)

    priced(tmp_path, says(1, 2), body)
