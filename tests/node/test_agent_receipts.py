"""The agent as a bookkeeper: what it claims, what it refuses, what it writes down, over a real link and a real file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from test_agent import Cable, Scripted, run, served, work

from gridmill.node import outbox as outbox_module
from gridmill.node.agent import agent_on
from gridmill.node.engines.base import Emit, Finished, Tokens
from gridmill.node.engines.echo import EchoEngine
from gridmill.node.outbox import Outbox
from gridmill.wire import receipts as rules
from gridmill.wire.identity import Identity, verify
from gridmill.wire.messages import (
    Acknowledged,
    Cancel,
    Countersigned,
    End,
    Generate,
    Leaf,
    Offers,
    Price,
    Receipts,
    Refuse,
    SignedStatement,
    Statement,
    Step,
)
from gridmill.wire.sampling import pack_ids

PRICE = Price(50, 10, 400)
SALT = b"salt"
START, DAY = 1_699_920_000, 86_400
NODE, NETWORK = Identity(b"i" * 32), Identity(b"n" * 32)


class Mill(Cable):
    """The cable, the node's outbox, and a network that settles."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(NODE, NETWORK)
        self.outbox = outbox

    def receipts(self, *leaves: Leaf, class_id: str, before: Statement | None = None) -> Statement:
        opening = rules.opening(NETWORK.public, NODE.public, class_id, START, DAY)
        statement = rules.advance(before or opening, leaves)
        self.say(Receipts((SignedStatement(statement, leaves, rules.sign_as_network(NETWORK, statement)),)))
        return statement


@asynccontextmanager
async def mill(folder: Path, *engines: Any) -> AsyncIterator[Mill]:
    outbox = Outbox(folder / "receipts.sqlite", NODE, wall_clock=lambda: 0.0)
    outbox.open()
    cable = Mill(outbox)
    async with agent_on(engines, cable, outbox=outbox, price=PRICE) as agent:
        cable.attach(agent)
        yield cable
    await outbox.close()


def priced(generate: Generate, price: Price = PRICE) -> Generate:
    return msgspec.structs.replace(generate, price=price, salt=SALT)


def claim_over(end: End, asked: Generate, ids: list[int]) -> bool:
    output_hash = rules.ids_hash(SALT, pack_ids(ids))
    return verify(
        NODE.public, rules.claim_bytes(asked.work_id, asked.epoch, asked.class_id, output_hash, b""), end.signature
    )


def leaf_of(asked: Generate, ids: list[int], claim: bytes) -> Leaf:
    given = (len(asked.prompt) + len(asked.delivered)) // 4
    return Leaf(
        work_id=asked.work_id,
        epoch=asked.epoch,
        start=len(asked.delivered) // 4,
        prompt_hash=rules.ids_hash(SALT, asked.prompt),
        output_hash=rules.ids_hash(SALT, pack_ids(ids)),
        input_tokens=given,
        cached_tokens=0,
        output_tokens=len(ids),
        price_id="price-1",
        price=PRICE,
        pay_nanocredits=rules.pay_of(PRICE, given, 0, len(ids)),
        charge_nanocredits=1,
        started_ms=0,
        ended_ms=0,
        finish="stop",
        commit_root=b"",
        claim=claim,
    )


def test_an_offer_carries_the_price_and_a_work_at_another_price_is_refused_as_the_nodes_fault(tmp_path: Path) -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(tmp_path, engine) as cable:
            (offers,) = cable.of(Offers)
            assert offers.offers[0].price == PRICE
            cable.offer(1, priced(work(engine), Price(50, 10, 399)))
            (refusal,) = cable.of(Refuse)
            assert (refusal.fault, refusal.code) == ("node", "wrong_price")
            cable.offer(2, priced(work(engine)))
            await cable.until(lambda: cable.ends(2))
            assert cable.ends(2)[0].kind == "length"

    run(body)


def test_an_end_claims_all_that_was_sent_and_the_network_can_check_it(tmp_path: Path) -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(tmp_path, engine) as cable:
            for stream, asked in ((1, work(engine, 1, 700)), (2, work(engine, 2, 12, delivered=(1, 2)))):
                cable.offer(stream, priced(asked))
                await cable.until(lambda stream=stream: cable.ends(stream))
                ids = cable.ids(stream)
                assert len(ids) in (700, 10)
                assert claim_over(cable.ends(stream)[0], asked, ids)
                assert not claim_over(cable.ends(stream)[0], asked, ids[:-1])

    run(body)


def test_a_cancelled_work_claims_what_the_network_keeps(tmp_path: Path) -> None:
    async def body() -> None:
        stuck = asyncio.Event()

        async def script(asked: Generate, emit: Emit) -> None:
            await emit(Tokens((3, 4, 5)))
            await stuck.wait()

        engine = Scripted(script)
        async with mill(tmp_path, engine) as cable:
            cases: list[tuple[tuple[int, ...], int, int]]
            cases = [((), 2, 2), ((), -1, 3), ((8, 9), 3, 1), ((), 0, 0), ((), 9, 3)]
            for stream, (delivered, keep, kept) in enumerate(cases, 1):
                asked = work(engine, stream, delivered=delivered)
                cable.offer(stream, priced(asked))
                await cable.until(lambda stream=stream: cable.emissions(stream))
                cable.say(Cancel(stream, keep))
                await cable.until(lambda stream=stream: cable.ends(stream))
                (end,) = cable.ends(stream)
                assert end.count == 3 and claim_over(end, asked, [3, 4, 5][:kept])

    run(body)


def test_receipts_of_finished_works_are_countersigned_and_then_not_sent_again(tmp_path: Path) -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(tmp_path, engine) as cable:
            asked = work(engine)
            cable.offer(1, priced(asked))
            await cable.until(lambda: cable.ends(1))
            leaf = leaf_of(asked, cable.ids(1), cable.ends(1)[0].signature)
            statement = cable.receipts(leaf, class_id=asked.class_id)
            await cable.until(lambda: cable.of(Countersigned))
            (entry,) = cable.of(Countersigned)[0].signatures
            assert entry.remark == "" and rules.signed_by_node(statement, entry.signature)
            assert len(await cable.outbox.unacknowledged(NETWORK.public)) == 1
            cable.say(Acknowledged(((asked.class_id, START, 1),)))
            assert await cable.outbox.unacknowledged(NETWORK.public) == []
            # The same again gets the same answer; what the network changes gets none.
            cable.receipts(leaf, class_id=asked.class_id)
            await cable.until(lambda: len(cable.of(Countersigned)) == 2)
            assert cable.of(Countersigned)[1] == cable.of(Countersigned)[0]
            again = msgspec.structs.replace(leaf, work_id="w9", pay_nanocredits=1, claim=b"")
            cable.receipts(again, class_id=asked.class_id, before=statement)
            await cable.until(lambda: len(cable.of(Countersigned)) == 3)
            (dispute,) = cable.of(Countersigned)[2].signatures
            assert not dispute.signature and "pays 1 nanocredits" in dispute.remark

    run(body)


def test_a_work_that_was_cut_off_is_written_down_and_its_receipt_signed_after_the_next_join(tmp_path: Path) -> None:
    async def body() -> None:
        stuck = asyncio.Event()

        async def script(asked: Generate, emit: Emit) -> None:
            await emit(Tokens((3, 4, 5)))
            await stuck.wait()

        engine = Scripted(script)
        async with mill(tmp_path, engine) as cable:
            asked = work(engine)
            cable.offer(1, priced(asked))
            await cable.until(lambda: cable.emissions(1))
            cable.cut()
        async with mill(tmp_path, engine) as cable:
            leaf = leaf_of(asked, [3, 4], b"")
            cable.receipts(msgspec.structs.replace(leaf, finish="lost"), class_id=asked.class_id)
            await cable.until(lambda: cable.of(Countersigned))
            assert cable.of(Countersigned)[0].signatures[0].remark == ""

    run(body)


def test_what_was_not_acknowledged_is_sent_again_at_the_next_join(tmp_path: Path) -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(tmp_path, engine) as cable:
            asked = work(engine)
            cable.offer(1, priced(asked))
            await cable.until(lambda: cable.ends(1))
            cable.receipts(leaf_of(asked, cable.ids(1), b""), class_id=asked.class_id)
            await cable.until(lambda: cable.of(Countersigned))
            said = cable.of(Countersigned)[0]
        async with mill(tmp_path, engine) as cable:
            await cable.until(lambda: cable.of(Countersigned))
            assert cable.of(Countersigned)[0] == said

    run(body)


def test_a_node_without_an_outbox_claims_nothing_and_answers_nothing() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        cable = Cable()
        async with agent_on([engine], cable) as agent:
            cable.attach(agent)
            cable.offer(1, work(engine))
            await cable.until(lambda: cable.ends(1))
            assert cable.ends(1)[0].signature == b""

    run(body)


def test_many_emissions_are_packed_as_they_were_sent(tmp_path: Path) -> None:
    async def body() -> None:
        sent = [number % 300 for number in range(1000)]

        async def script(asked: Generate, emit: Emit) -> None:
            for number in sent:
                await emit(Tokens((number,)))
            await emit(Finished("stop"))

        engine = Scripted(script)
        async with mill(tmp_path, engine) as cable:
            asked = work(engine, max_tokens=1000)
            cable.offer(1, priced(asked))
            await cable.until(lambda: cable.ends(1))
            assert cable.ids(1) == sent and claim_over(cable.ends(1)[0], asked, sent)
            await cable.outbox.unacknowledged(b"")
            (shown,) = outbox_module.show(tmp_path / "receipts.sqlite", asked.work_id)
            assert shown["sent_tokens"] == shown["claimed_tokens"] == 1000
            assert sum(len(step.ends) for step in cable.of(Step)) == 1

    run(body)
