"""A work that loses its node goes on at another: nothing lost, nothing twice, each node paid for its part."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_dispatch import CLASS, EOS, FACTS, PAYER, Reader, ScriptedNode, World, play
from test_dispatch_money import INPUT, PRICE, ROW, Till, cost, work

from gridmill.network import ledger
from gridmill.network import links as links_module
from gridmill.network.books import Books, GatewayId, Order
from gridmill.network.faults import Enough, NodeFault
from gridmill.network.journey import Checks, Impossible, Patience
from gridmill.network.metering import FeePolicy, PriceRow, Usage, charge
from gridmill.network.registry import NodeRecord
from gridmill.network.store import Transaction
from gridmill.wire import receipts as rules
from gridmill.wire.link import Reason
from gridmill.wire.messages import Accept, Cancel, Drain, Emission, Generate, Offer, Price, Refuse, Step
from gridmill.wire.sampling import Sampling, TokenLogprob, pack_ids, unpack_ids

QUICK = Patience(gap_seconds=0.05, gap_factor=0.0, first_token_seconds=0.3, first_token_factor=0.0)
Script = Callable[[ScriptedNode, Offer], Awaitable[None]]


def nth(position: int) -> int:
    """The answer that every honest node of these tests gives."""
    return 10 + position % 50


def honest(stop_after: int = 10**6, then: str = "cut", drains: bool = False) -> Script:
    """Goes on where the offer says, for `stop_after` ids of its own; then the cable breaks, or it says no more."""

    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        first, last = len(offer.work.delivered) // 4, offer.work.sampling.max_tokens
        end = min(last, first + stop_after)
        for position in range(first, end):
            await node.until(lambda: node.conversation.link.credit_left(offer.stream) > 0)
            node.say(offer.stream, position, nth(position))
        if end == last and then != "stall":
            node.end(offer.stream, end - first, "length")
            return
        await asyncio.sleep(0.02)  # what was said is on its way
        if drains:
            node.send(Drain(5.0))
        if then == "cut":
            node.cut()
        elif then == "fail":
            node.end(offer.stream, end - first, "failed", code="oom", detail="no memory")
        elif then == "quit":
            node.end(offer.stream, end - first, "length")
        elif then == "rubbish":
            node.say(offer.stream, end, FACTS.vocab_size + 5)
        if then in ("cut", "fail", "quit"):
            return
        await node.until(lambda: any(c.stream == offer.stream for c in node.heard_of(Cancel)))
        if then == "stall":  # late words of a node that was left
            node.say(offer.stream, end, 299)
        node.end(offer.stream, end - first + (then != "drain"), "cancelled")

    return script


async def two(world: World, broken: Script, price: Price = PRICE, other: Price = PRICE) -> list[ScriptedNode]:
    """A node that is certain to be asked first, and one that comes as it is being served."""
    nodes = [ScriptedNode(broken, slots=4, price=price), ScriptedNode(honest(), slots=4, price=other)]
    await world.join(nodes[0])
    return nodes


class Move:
    """Serves one work on the first node, lets the second join when `after` ids are out."""

    def __init__(self, world: World, till: Till, nodes: list[ScriptedNode]) -> None:
        self.world, self.till, self.nodes = world, till, nodes
        self.reader = Reader()
        self.order: Order

    async def run(self, wanted: Generate, after: int, *, shown: bool = True, **options: Any) -> Any:
        self.order = await self.till.order(wanted)
        self.order.shown = shown
        serving = asyncio.create_task(
            self.world.dispatcher.serve(wanted, self.order, options.get("emit", self.reader.emit))
        )
        while len(self.reader.ids) < after and not serving.done():
            await asyncio.sleep(0)
        for node in self.nodes[1:]:
            await self.world.join(node)
        return await serving


def moved(
    tmp_path: Path,
    broken: Script,
    body: Callable[[World, Till, Move], Awaitable[None]],
    *,
    other: Price = PRICE,
    reserve: int = 0,
    patience: Patience = QUICK,
) -> None:
    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        if reserve:
            await grant_reserve(world, reserve)
        await body(world, till, Move(world, till, await two(world, broken, other=other)))

    play(tmp_path, run, resume_timeout_seconds=5.0, patience=patience)


async def grant_reserve(world: World, amount: int) -> None:
    legs = (("rail:operator:external", -amount), ("failover:reserve", amount))
    await world.books._store.run(lambda tx: ledger.apply(tx, [ledger.Transfer("grant", "grant", legs)]))
    world.books._contributed(PAYER.account_id, amount)  # as if its fees had brought it in
    await world.books.keep_once()


async def parts(world: World) -> list[Any]:
    async def read(tx: Transaction) -> list[Any]:
        return [
            rules.leaf_from(bytes(row[0])) for row in await tx.all("SELECT leaf FROM receipt_leaves ORDER BY epoch")
        ]

    await world.books.flush()
    return await world.books._store.run(read)


async def earned(world: World, node: ScriptedNode) -> int:
    record = next(r for r in records(world) if r.node_key == node.identity.public)
    balances = await world.books._store.run(ledger.balances)
    return int(balances.get(ledger.provider_held(record.owner_id), 0))


SEEN: list[NodeRecord] = []


def records(world: World) -> list[NodeRecord]:
    SEEN.extend(world.registry.nodes())
    return SEEN


@pytest.mark.parametrize("then", ["cut", "fail", "quit", "rubbish", "stall", "drain"])
@pytest.mark.parametrize("shown", [True, False])
def test_however_a_node_breaks_off_the_answer_and_its_price_are_those_of_an_unbroken_run(
    tmp_path: Path, then: str, shown: bool
) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        outcome = await move.run(work(max_tokens=10), 4, shown=shown)
        assert move.reader.ids == [nth(n) for n in range(10)]
        assert (outcome.kind, outcome.output_tokens, outcome.cached_tokens) == ("length", 10, 0)
        assert outcome.charge_nanocredits == cost(INPUT, 10) == await till.charged()
        second = move.nodes[1].heard_of(Offer)[0].work
        assert unpack_ids(second.delivered) == [nth(n) for n in range(4)] and second.epoch > 0
        first, last = await parts(world)
        assert (first.start, first.output_tokens, last.start, last.output_tokens) == (0, 4, 4, 6)
        assert first.charge_nanocredits + last.charge_nanocredits == cost(INPUT, 10)
        # Who drains keeps its pay for the prompt; who breaks off leaves it to whoever reads the prompt again.
        assert (first.input_tokens, last.input_tokens) == ((INPUT, 0) if then == "drain" else (0, INPUT))
        assert world.observer.tokens == 10 and world.observer.first_tokens == 1

    moved(tmp_path, honest(4, then, drains=then == "drain"), body)


def test_a_node_that_is_left_is_told_how_many_of_its_ids_count(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        await move.run(work(), 4)
        assert [cancel.keep for cancel in move.nodes[0].heard_of(Cancel)] == [4]

    moved(tmp_path, honest(4, "stall"), body)


def test_an_answer_whose_last_id_was_out_needs_no_other_node(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.say(offer.stream, 0, 7, EOS)
        await asyncio.sleep(0.02)
        node.cut()

    async def body(world: World, till: Till, move: Move) -> None:
        wanted = work()
        outcome = await world.dispatcher.serve(wanted, await till.order(wanted), move.reader.emit)
        assert (outcome.kind, move.reader.ids) == ("stop", [7, EOS])
        assert await till.charged() == cost(INPUT, 2)

    moved(tmp_path, script, body)


def test_three_moves_and_then_an_honest_error_that_charges_what_was_delivered(tmp_path: Path) -> None:
    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        nodes = [ScriptedNode(honest(2), slots=4, price=PRICE) for _ in range(6)]
        for node in nodes:
            await world.join(node)
        while len(world.registry.price_rows(CLASS.class_id)) < 6:
            await asyncio.sleep(0)
        reader, wanted = Reader(), work()
        with pytest.raises(NodeFault, match="4 nodes in turn"):
            await world.dispatcher.serve(wanted, await till.order(wanted), reader.emit)
        assert reader.ids == [nth(n) for n in range(8)]
        assert await till.charged() == cost(0, 8)
        assert [leaf.start for leaf in await parts(world)] == [0, 2, 4, 6]
        assert world.observer.moves == ["node_lost"] * 4

    play(tmp_path, run, resume_timeout_seconds=5.0, patience=QUICK)


def test_an_answer_that_leaves_as_a_whole_and_fails_costs_nothing_whoever_worked_on_it(tmp_path: Path) -> None:
    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        for _ in range(2):
            await world.join(ScriptedNode(honest(3), slots=4, price=PRICE))
        while len(world.registry.price_rows(CLASS.class_id)) < 2:
            await asyncio.sleep(0)
        wanted = work()
        order = await till.order(wanted)
        order.shown = False
        with pytest.raises(NodeFault):
            await world.dispatcher.serve(wanted, order, Reader().emit)
        assert await till.charged() == 0 and await till.leaves() == 0

    play(tmp_path, run, patience=QUICK)


def test_a_work_without_another_node_waits_for_the_one_that_comes_back(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        again = ScriptedNode(honest(), slots=4, price=PRICE)
        again.identity = move.nodes[0].identity  # the same node, restarted
        move.nodes[1] = again
        outcome = await move.run(work(), 4)
        assert move.reader.ids == [nth(n) for n in range(10)] and len(outcome.node_ids) == 1

    moved(tmp_path, honest(4), body)


def test_a_node_that_is_alone_and_wakes_up_again_keeps_its_work(tmp_path: Path) -> None:
    """Leaving it would help nobody; a laptop's lid closes for a moment."""

    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.say(offer.stream, 0, nth(0))
        await asyncio.sleep(1.5)  # far beyond a gap
        for position in range(1, 10):
            node.say(offer.stream, position, nth(position))
        node.end(offer.stream, 10, "length")

    async def body(world: World, till: Till, move: Move) -> None:
        wanted = work()
        await world.dispatcher.serve(wanted, await till.order(wanted), move.reader.emit)
        assert move.reader.ids == [nth(n) for n in range(10)] and not world.observer.moves

    moved(tmp_path, script, body)


def test_a_work_that_waits_its_turn_on_a_node_which_serves_others_is_left_there(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        if offer.work.work_id == "first":
            for position in range(10):
                await asyncio.sleep(0.1)
                node.say(offer.stream, position, nth(position))
            node.end(offer.stream, 10, "length")
            return
        await asyncio.sleep(1.2)
        for position in range(10):
            node.say(offer.stream, position, nth(position))
        node.end(offer.stream, 10, "length")

    async def body(world: World, till: Till, move: Move) -> None:
        first, second = Reader(), Reader()
        serving = []
        for name, reader in (("first", first), ("second", second)):
            wanted = work(name)
            order = await till.order(wanted)
            serving.append(asyncio.create_task(world.dispatcher.serve(wanted, order, reader.emit)))
        await move.nodes[0].until(lambda: len(move.nodes[0].heard_of(Offer)) == 2)
        await world.join(move.nodes[1])  # which has room, and is not needed
        await asyncio.gather(*serving)
        assert len(first.ids) == len(second.ids) == 10 and not world.observer.moves

    moved(tmp_path, script, body, patience=Patience(gap_seconds=0.5, first_token_seconds=0.3, first_token_factor=0.0))


def test_a_node_that_was_silent_and_spoke_again_is_better_than_none(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        first = len(offer.work.delivered) // 4
        if first:
            for position in range(first, 10):
                node.say(offer.stream, position, nth(position))
            node.end(offer.stream, 10 - first, "length")
            return
        node.say(offer.stream, 0, nth(0))
        await node.until(lambda: bool(node.heard_of(Cancel)))
        await asyncio.sleep(0.2)
        node.end(offer.stream, 1, "cancelled")

    async def body(world: World, till: Till, move: Move) -> None:
        wanted = work()
        await world.dispatcher.serve(wanted, await till.order(wanted), move.reader.emit)
        assert move.reader.ids == [nth(n) for n in range(10)] and world.observer.moves == ["node_stalled"]

    moved(tmp_path, script, body, patience=Patience(gap_seconds=0.05, gap_factor=0.0, alone_seconds=0.2))


def test_the_reserve_pays_once_for_what_had_to_be_read_again(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        outcome = await move.run(work(), 4)
        assert outcome.charge_nanocredits == cost(INPUT, 10)
        first, last = await parts(world)
        # The prompt is paid by the user, since the first node forfeited it; the four ids by the reserve.
        assert (last.input_tokens, last.replayed_tokens) == (INPUT, 4)
        assert last.pay_nanocredits == (INPUT + 4) * 50 + 6 * 400
        assert rules.leaf_problem(last) is None and rules.leaf_problem(first) is None
        balances = await world.books._store.run(ledger.balances)
        assert balances["failover:reserve"] == 10**6 - 4 * 50 + charge(ROW, Usage(INPUT, 0, 10)).reserve
        assert not await world.books._store.run(ledger.check)

    moved(tmp_path, honest(4), body, reserve=10**6)


def test_a_reserve_that_is_empty_stays_so_and_the_work_goes_on(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        await move.run(work(), 4)
        assert (await parts(world))[1].replayed_tokens == 0
        balances = await world.books._store.run(ledger.balances)
        assert balances["failover:reserve"] >= 0

    moved(tmp_path, honest(4), body)


def test_a_cheaper_second_node_earns_its_price_and_the_rest_goes_to_the_reserve(tmp_path: Path) -> None:
    cheap = Price(20, 5, 100)

    async def body(world: World, till: Till, move: Move) -> None:
        outcome = await move.run(work(), 4)
        assert outcome.charge_nanocredits == cost(INPUT, 10) == await till.charged()
        last = (await parts(world))[1]
        assert last.pay_nanocredits == INPUT * 20 + 6 * 100 and last.price == cheap
        balances = await world.books._store.run(ledger.balances)
        assert balances["failover:reserve"] >= INPUT * 30 + 6 * 300

    moved(tmp_path, honest(4), body, other=cheap)


@pytest.mark.parametrize("reserve", [0, 10**6])
def test_a_dearer_second_node_is_asked_only_where_the_reserve_pays_the_difference(tmp_path: Path, reserve: int) -> None:
    dear = Price(60, 10, 500)  # a quarter more at most

    async def body(world: World, till: Till, move: Move) -> None:
        if not reserve:
            with pytest.raises(NodeFault):
                await move.run(work(), 4)
            assert not move.nodes[1].heard_of(Offer)
            assert await till.charged() == cost(0, 4)
            return
        outcome = await move.run(work(), 4)
        assert outcome.charge_nanocredits == cost(INPUT, 10)
        last = (await parts(world))[1]
        assert last.pay_nanocredits == (INPUT + 4) * 60 + 6 * 500
        balances = await world.books._store.run(ledger.balances)
        share = charge(ROW, Usage(INPUT, 0, 10)).reserve
        assert balances["failover:reserve"] == reserve - INPUT * 10 - 4 * 60 - 6 * 100 + share
        assert not await world.books._store.run(ledger.check)

    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        if reserve:
            await grant_reserve(world, reserve)
        await body(world, till, Move(world, till, await two(world, honest(4), other=dear)))

    play(tmp_path, run, resume_timeout_seconds=0.5, patience=QUICK)


def test_a_stop_string_after_a_move_charges_up_to_the_id_that_completes_it(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        async def emit(emissions: list[Emission]) -> None:
            await move.reader.emit(emissions)
            if len(move.reader.ids) >= 6:
                raise Enough(keep=6)

        outcome = await move.run(work(), 4, emit=emit)
        assert (outcome.kind, outcome.output_tokens) == ("stop", 6)
        assert await till.charged() == cost(INPUT, 6)
        assert [leaf.output_tokens for leaf in await parts(world)] == [4, 2]

    moved(tmp_path, honest(4), body)


def test_a_caller_who_leaves_after_a_move_pays_what_both_delivered(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        second = ScriptedNode(honest(3, "stall"), slots=4, price=PRICE)
        move.nodes[1] = second
        serving = asyncio.create_task(move.run(work(), 4))
        while len(move.reader.ids) < 7:
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        while world.books._live:
            await asyncio.sleep(0.01)
        assert await till.charged() == cost(INPUT, 7)

    moved(tmp_path, honest(4), body, patience=Patience(first_token_seconds=5.0))


def test_a_caller_of_a_whole_answer_who_leaves_after_a_move_pays_the_prompt_alone(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        move.nodes[1] = ScriptedNode(honest(3, "stall"), slots=4, price=PRICE)
        serving = asyncio.create_task(move.run(work(), 4, shown=False))
        while len(move.reader.ids) < 7:
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        while world.books._live:
            await asyncio.sleep(0.01)
        assert await till.charged() == cost(INPUT, 0)

    moved(tmp_path, honest(4), body, patience=Patience(first_token_seconds=5.0))


def test_a_caller_who_leaves_while_the_last_word_is_awaited_pays_for_the_answer_and_no_more(tmp_path: Path) -> None:
    async def body(world: World, till: Till, move: Move) -> None:
        reached = asyncio.Event()

        async def emit(emissions: list[Emission]) -> None:
            reached.set()
            raise Enough(keep=2)

        wanted = work()
        serving = asyncio.create_task(world.dispatcher.serve(wanted, await till.order(wanted), emit))
        await reached.wait()
        await asyncio.sleep(0.02)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert await till.charged() == cost(INPUT, 2)

    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.say(offer.stream, 0, 11, 12, 13, 14, 15)

    moved(tmp_path, script, body)


def test_a_node_that_never_says_its_last_word_is_cut_and_its_place_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "CANCEL_ANSWER_SECONDS", 0.2)

    async def body(world: World, till: Till, move: Move) -> None:
        await move.run(work(), 4)
        await world.idle()
        assert world.links.works == 0
        first = move.nodes[0]
        await first.until(lambda: first.conversation.link.closed is not None)
        closed = first.conversation.link.closed
        assert closed is not None and closed.reason is Reason.CANCEL_UNANSWERED and not closed.permanent

    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        for position in range(4):
            node.say(offer.stream, position, nth(position))

    moved(tmp_path, script, body)


def test_a_reader_who_pauses_moves_nothing(tmp_path: Path) -> None:
    """The clock of a stall runs only while the node owes something."""

    async def body(world: World, till: Till, move: Move) -> None:
        async def emit(emissions: list[Emission]) -> None:
            await move.reader.emit(emissions)
            if len(move.reader.ids) in (1, 256):  # as soon as there is something, and when the credit is used up
                await asyncio.sleep(0.4)

        wanted = Generate("w", CLASS.class_id, pack_ids(list(range(INPUT))), Sampling(bytes(32), 600), salt=b"salt")
        await move.nodes[0].until(lambda: True)
        order = world.order(wanted, await world.books.admit(PAYER, cost(INPUT, 600), cost(INPUT, 600)))
        await world.dispatcher.serve(wanted, order, emit)
        assert len(move.reader.ids) == 600 and not world.observer.moves

    async def run(world: World) -> None:
        till = Till(world)
        await world.books._store.run(lambda tx: ledger.apply(tx, [ledger.credit("a", 10**9, "much")]))
        await body(world, till, Move(world, till, await two(world, honest())))

    play(tmp_path, run, patience=Patience(gap_seconds=0.2, first_token_seconds=0.3))


def test_an_announced_pause_gives_the_node_the_time_of_a_first_token_but_not_for_ever(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.say(offer.stream, 0, nth(0))
        node.send(Step(paused=(offer.stream,)))
        await asyncio.sleep(0.3)  # several times what a gap may be
        node.say(offer.stream, 1, nth(1))
        for _ in range(50):
            if node.heard_of(Cancel):
                break
            node.send(Step(paused=(offer.stream,)))
            await asyncio.sleep(0.2)
        node.end(offer.stream, 2, "cancelled")

    async def body(world: World, till: Till, move: Move) -> None:
        await move.run(work(), 2)
        assert move.reader.ids == [nth(n) for n in range(10)]
        assert world.observer.moves == ["node_stalled"]

    moved(
        tmp_path,
        script,
        body,
        patience=Patience(gap_seconds=0.05, gap_factor=0.0, first_token_seconds=0.6, first_token_factor=0.0),
    )


def test_a_node_that_blames_the_caller_is_not_believed_alone(tmp_path: Path) -> None:
    async def blames(node: ScriptedNode, offer: Offer) -> None:
        node.send(Refuse(offer.stream, "caller", "no", "your prompt is wrong"))

    async def run(world: World) -> None:
        till = Till(world)
        await till.open()
        await world.join(ScriptedNode(blames, slots=4, price=PRICE))
        await world.join(ScriptedNode(honest(), slots=4, price=PRICE))
        while len(world.registry.price_rows(CLASS.class_id)) < 2:
            await asyncio.sleep(0)
        for n in range(4):
            wanted, reader = work(f"w-{n}"), Reader()
            await world.dispatcher.serve(wanted, await till.order(wanted), reader.emit)
            assert len(reader.ids) == 10

    play(tmp_path, run)


def test_a_gateway_killed_between_two_nodes_settles_both_parts(tmp_path: Path) -> None:
    """The journal knows who did what, and at which price."""

    async def body(world: World, till: Till, move: Move) -> None:
        move.nodes[1] = ScriptedNode(honest(3, "stall"), slots=4, price=PRICE)
        serving = asyncio.create_task(move.run(work(), 4))
        while len(move.reader.ids) < 7:
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)  # some ticks of the journal

        async def heir() -> None:
            clock = asyncio.get_running_loop().time
            books = Books(
                world.books._store,
                holder=GatewayId("gateway-1"),
                network_key=world.identity.public,
                clock=clock,
                wall_ms=lambda: int(clock() * 1000),
                entropy=lambda size: bytes(range(size)),
            )
            assert await books.recover() == 1

        await heir()
        leaves = await parts(world)
        assert [(leaf.start, leaf.output_tokens, leaf.input_tokens) for leaf in leaves] == [(0, 4, 0), (4, 3, INPUT)]
        assert sum(leaf.charge_nanocredits for leaf in leaves) == cost(INPUT, 7)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert await till.charged() == cost(INPUT, 7)  # who comes late settles nothing

    moved(tmp_path, honest(4), body, patience=Patience(first_token_seconds=5.0, gap_seconds=5.0))


def test_who_paid_no_fees_gets_nothing_out_of_the_reserve(tmp_path: Path) -> None:
    """A user with nodes of its own would have the reserve pay them for reading its own prompts."""

    async def body(world: World, till: Till, move: Move) -> None:
        world.books._contributions.clear()
        await move.run(work(), 4)
        assert (await parts(world))[1].replayed_tokens == 0

    moved(tmp_path, honest(4), body, reserve=10**6)


def test_what_a_liar_said_is_not_held_against_the_next_node(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.send(Step((Emission(offer.stream, 0, (EOS,)), Emission(offer.stream, 1, (5,)))))
        await node.until(lambda: bool(node.heard_of(Cancel)))
        node.end(offer.stream, 2, "cancelled")

    async def body(world: World, till: Till, move: Move) -> None:
        await move.run(work(), 0)
        assert move.reader.ids == [nth(n) for n in range(10)] and world.observer.moves == ["bad_ids"]

    moved(tmp_path, script, body)


def test_a_node_that_drains_and_says_nothing_more_is_left_in_its_time(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        node.send(Drain(60.0))

    async def body(world: World, till: Till, move: Move) -> None:
        async with asyncio.timeout(4):
            await move.run(work(), 0)
        assert len(move.reader.ids) == 10

    moved(tmp_path, script, body, patience=Patience(first_token_seconds=1.5, first_token_factor=0.0))


def test_a_pause_that_was_announced_is_no_longer_for_a_node_that_drains(tmp_path: Path) -> None:
    async def script(node: ScriptedNode, offer: Offer) -> None:
        node.send(Accept(offer.stream))
        await asyncio.sleep(0.05)
        node.send(Step(paused=(offer.stream,)))
        node.send(Drain(60.0))

    async def body(world: World, till: Till, move: Move) -> None:
        async with asyncio.timeout(10):
            await move.run(work(), 0)
        assert len(move.reader.ids) == 10

    # Its drain is looked at each second, which is less than the pause may take.
    moved(tmp_path, script, body, patience=Patience(first_token_seconds=1.5, first_token_factor=0.0, alone_seconds=1.0))


# ---------------------------------------------------------------- what no honest engine says


def checks(**options: Any) -> Checks:
    return Checks(Generate("w", CLASS.class_id, b"", Sampling(bytes(32), 10, **options)), FACTS)


@pytest.mark.parametrize(
    "entry",
    [
        TokenLogprob(-1.0, ((FACTS.vocab_size, -1.0),)),
        TokenLogprob(-1.0, ((4_000_000_000, -1.0),)),
        TokenLogprob(0.5, ((97, -1.0),)),
        TokenLogprob(-1.0, ((97, 0.5),)),
    ],
)
def test_log_probabilities_that_nobody_can_have_computed_are_impossible(entry: TokenLogprob) -> None:
    with pytest.raises(Impossible):
        checks(top_logprobs=1).see([Emission(1, 0, (97,), (entry,))], 0)


def test_scores_that_were_asked_for_and_are_missing_are_impossible() -> None:
    with pytest.raises(Impossible, match="log probabilities"):
        checks(top_logprobs=1).see([Emission(1, 0, (97,), None)], 0)


@pytest.mark.parametrize("ids", [(EOS, 5), (5, EOS, EOS)])
def test_nobody_goes_on_after_an_id_that_ends_the_answer(ids: tuple[int, ...]) -> None:
    with pytest.raises(Impossible):
        checks().see([Emission(1, 0, ids)], 0)
    check = checks()
    check.see([Emission(1, 0, (5, EOS))], 0)
    assert check.complete(2) == "stop"
    with pytest.raises(Impossible):
        check.see([Emission(1, 2, (6,))], 2)
    checks(ignore_eos=True).see([Emission(1, 0, ids)], 0)
    checks(min_tokens=9).see([Emission(1, 0, ids)], 0)


def test_parts_of_any_prices_add_up_to_what_the_whole_would_have_cost() -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    from gridmill.network.metering import share

    prices = st.builds(
        PriceRow,
        st.just("p"),
        st.builds(Price, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)),
        st.builds(FeePolicy, st.integers(0, 10_000)),
    )

    @given(prices, st.lists(st.tuples(prices, st.integers(0, 500), st.integers(0, 300)), min_size=1, max_size=5))
    def check(terms: PriceRow, moves: list[tuple[PriceRow, int, int]]) -> None:
        before, total = Usage(), 0
        for number, (own, tokens, replayed) in enumerate(moves):
            used = Usage(100, 30, tokens) if number == len(moves) - 1 else Usage(0, 0, tokens)
            own = msgspec.structs.replace(own, fees=terms.fees)
            part = share(terms, own, before, used, replayed)
            assert min(part.node, part.network, part.audit, part.reserve, part.subsidy) >= 0
            assert part.total == part.node + part.network + part.audit + part.reserve
            earned = rules.pay_of(own.price, used.input_tokens, used.cached_tokens, used.output_tokens, replayed)
            assert part.node + part.subsidy == earned
            before = Usage(used.input_tokens, used.cached_tokens, before.output_tokens + tokens)
            total += part.total
        whole = charge(terms, Usage(100, 30, before.output_tokens)).total
        assert total == whole

    check()
