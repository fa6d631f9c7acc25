"""Receipts from settlement to countersignature: a real store, desk and outbox; only the link is a list."""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from databases import Database
from gridmill.network import receipts
from gridmill.network.receipts import Desk, Segment, Unsigned
from gridmill.network.store import SqliteStore, Store, Transaction
from gridmill.node.outbox import GROUP_MAX, WAITING_MAX, Ended, Outbox
from gridmill.wire import receipts as rules
from gridmill.wire.codec import LEAVES_MAX, check
from gridmill.wire.identity import Identity, node_id_of
from gridmill.wire.messages import Acknowledged, Countersignature, Countersigned, Leaf, Price, Receipts, Statement
from gridmill.wire.sampling import pack_ids

NETWORK = Identity(b"n" * 32)
NODE = Identity(b"o" * 32)
NODE_ID = node_id_of(NODE.public)
CLASS = "ab" * 32
PRICE = Price(50, 10, 400)
SALT = b"salt-of-this-work"
DAY = 86_400
NOON = 1_700_000_000 * 1000  # ms
PROMPT = pack_ids([1, 2, 3, 4])


def ended(number: int, tokens: int = 5, keep: int = -1, epoch: int = 0) -> Ended:
    """A work as the node saw it, of which the first `keep` ids count."""
    ids = pack_ids([number % 1000] * tokens)
    kept = tokens if keep < 0 else keep
    output_hash = rules.ids_hash(SALT, ids[: 4 * kept])
    return Ended(
        network_key=NETWORK.public,
        work_id=f"work-{number}",
        epoch=epoch,
        class_id=CLASS,
        price=PRICE,
        salt=SALT,
        prompt=PROMPT,
        input_tokens=4,
        start=0,
        ids=ids,
        kept=kept,
        claim=NODE.sign(rules.claim_bytes(f"work-{number}", epoch, CLASS, output_hash, b"")),
    )


def segment(work: Ended, tokens: int | None = None, account: str = "account-1", **changed: Any) -> Segment:
    """The same work as the network settles it, with `tokens` delivered."""
    count = work.kept if tokens is None else tokens
    leaf = Leaf(
        work_id=work.work_id,
        epoch=work.epoch,
        start=work.start,
        prompt_hash=rules.ids_hash(work.salt, work.prompt),
        output_hash=rules.ids_hash(work.salt, work.ids[: 4 * count]),
        input_tokens=4,
        cached_tokens=1,
        output_tokens=count,
        price_id="price-1",
        price=PRICE,
        pay_nanocredits=rules.pay_of(PRICE, 4, 1, count),
        charge_nanocredits=9999,
        started_ms=NOON,
        ended_ms=NOON + 5,
        finish="stop",
        commit_root=b"",
        claim=work.claim if count == work.kept else b"",
    )
    leaf = msgspec.structs.replace(leaf, **changed)
    return Segment(NODE_ID, NODE.public, work.class_id, leaf, work.salt, account, "key-1", "demo")


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(bounded())


class Grid:
    """A network and a node. What they say to each other lies in two lists until a test lets it pass."""

    def __init__(self, store: Store, folder: Path, network: Identity = NETWORK) -> None:
        self.store = store
        self.key = network.public
        self.folder = folder
        self.now_ms = NOON
        self.desk = Desk(store, network, self._send)
        self.outbox = self.new_outbox()
        self.to_node: list[Any] = []
        self.to_network: list[Countersigned] = []
        self.linked = False
        self.numbers = itertools.count(1)
        self.segments: list[Segment] = []

    def new_outbox(self) -> Outbox:
        return Outbox(self.folder / "receipts.sqlite", NODE, wall_clock=lambda: NOON / 1000)

    def _send(self, node_id: str, message: Any) -> bool:
        assert node_id == NODE_ID
        if self.linked:
            check(message)
            self.to_node.append(message)
        return self.linked

    def work(self, tokens: int = 5, recorded: bool = True, **more: Any) -> Segment:
        made = msgspec.structs.replace(ended(next(self.numbers), tokens), network_key=self.key)
        if recorded:
            self.outbox.record(made)
        self.segments.append(segment(made, **more))
        return self.segments[-1]

    async def settle(self, segments: Sequence[Segment], tell: bool = True) -> list[Unsigned]:
        async def action(tx: Transaction) -> list[Unsigned]:
            return await receipts.settle(tx, self.key, segments, self.now_ms, DAY)

        made = await self.store.run(action)
        if tell:
            self.desk.send(made)
        return made

    def join(self) -> None:
        self.linked = True
        self.to_node.clear()
        self.to_network.clear()
        self.desk.joined(NODE_ID)

    def cut(self) -> None:
        self.linked = False
        self.to_node.clear()
        self.to_network.clear()
        self.desk.left(NODE_ID)

    async def node_hears(self) -> bool:
        """The first message to the node arrives."""
        if not self.to_node:
            return False
        message = self.to_node.pop(0)
        if isinstance(message, Receipts):
            answer = await self.outbox.answer(self.key, message)
            assert answer is not None
            check(answer)
            self.to_network.append(answer)
        else:
            self.outbox.acknowledged(self.key, message)
        return True

    async def network_hears(self) -> bool:
        if not self.to_network:
            return False
        self.desk.countersigned(NODE_ID, self.to_network.pop(0))
        return True

    async def sign_again(self) -> None:
        self.to_network += await self.outbox.unacknowledged(self.key)

    async def rest(self) -> None:
        """Until nobody has anything to say."""
        for _ in range(10_000):
            await self.desk._work_off()
            moved = await self.node_hears() or await self.network_hears()
            if not moved and not self.desk._behind and not self.desk._answers:
                return
        raise AssertionError("they never come to rest")

    async def totals(self) -> tuple[Any, ...]:
        """What the network has countersigned: seq, countersigned seq, pay of the last countersigned statement."""

        async def action(tx: Transaction) -> Any:
            counter = await tx.one("SELECT chain, seq, countersigned_seq FROM receipt_counters")
            if counter is None:
                return 0, 0, None
            row = await tx.one(
                "SELECT statement, node_signature FROM receipt_statements WHERE chain = ? AND seq = ?",
                *(counter[0], counter[2]),
            )
            if row is None:
                return counter[1], counter[2], None
            statement = rules.statement_from(bytes(row[0]))
            assert rules.signed_by_node(statement, bytes(row[1]))
            return counter[1], counter[2], statement

        return await self.store.run(action)  # type: ignore[no-any-return]


def with_grid(
    tmp_path: Path, body: Callable[[Grid], Awaitable[None]], store: Callable[[], Store] | None = None
) -> None:
    async def whole() -> None:
        opened = (store or (lambda: SqliteStore(tmp_path / "network.sqlite", wall_clock=lambda: NOON / 1000)))()
        async with AsyncExitStack() as stack:
            await opened.open((receipts.MIGRATION,))
            stack.push_async_callback(opened.close)
            grid = Grid(opened, tmp_path)
            grid.outbox.open()
            await body(grid)
            await grid.outbox.close()

    run(whole)


# ---------------------------------------------------------------- settling


def test_leaves_are_numbered_and_totalled_and_a_second_settlement_changes_nothing(database: Database) -> None:
    async def body() -> None:
        store = database.store(wall_clock=lambda: NOON / 1000)
        await store.open((receipts.MIGRATION,))
        try:
            segments = [segment(ended(n, tokens=n)) for n in range(1, 6)]

            async def settle(tx: Transaction) -> list[Unsigned]:
                return await receipts.settle(tx, NETWORK.public, segments, NOON, DAY)

            (first,) = await store.run(settle)
            assert await store.run(settle) == []
            statement = first.statement
            assert statement.seq == 5 and statement.output_tokens == 15 and statement.input_tokens == 20
            assert statement.pay_nanocredits == sum(s.leaf.pay_nanocredits for s in segments)
            assert statement == rules.advance(rules.opening_of(statement), [s.leaf for s in segments])
            segments += [segments[0], segment(ended(6)), segment(ended(1, epoch=1)), segment(ended(6))]
            (second,) = await store.run(settle)
            assert second.statement == rules.advance(statement, second.leaves)
            assert [leaf.work_id for leaf in second.leaves] == ["work-6", "work-1"]

            async def rows(tx: Transaction) -> list[Any]:
                return await tx.all("SELECT seq, work_id, epoch, account_id, leaf, salt FROM receipt_leaves ORDER BY 1")

            kept = await store.run(rows)
            assert [row[0] for row in kept] == list(range(1, 8))
            assert rules.leaf_from(bytes(kept[6][4])) == second.leaves[1] and bytes(kept[6][5]) == SALT
        finally:
            await store.close()

    run(body)


def test_a_large_settlement_becomes_statements_that_fit_a_message(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        made = await grid.settle([segment(ended(n)) for n in range(300)])
        assert [len(entry.leaves) for entry in made] == [LEAVES_MAX, LEAVES_MAX, 300 - 2 * LEAVES_MAX]
        before = rules.opening_of(made[0].statement)
        for entry in made:
            before = rules.advance(before, entry.leaves)
            assert entry.statement == before

    with_grid(tmp_path, body)


def test_settlements_at_once_by_several_gateways_make_one_chain(postgres_database: Database) -> None:
    async def body() -> None:
        stores = [postgres_database.store() for _ in range(3)]
        for store in stores:
            await store.open((receipts.MIGRATION,))
        try:
            batches = [[segment(ended(10 * n + i)) for i in range(10)] for n in range(12)]

            def settle(batch: list[Segment]) -> Any:
                async def action(tx: Transaction) -> list[Unsigned]:
                    return await receipts.settle(tx, NETWORK.public, batch, NOON, DAY)

                return action

            # Each batch is settled by two gateways, as after a crash of one of them.
            made = await asyncio.gather(
                *(stores[i % 3].run(settle(batch)) for i, batch in enumerate(batches)),
                *(stores[(i + 1) % 3].run(settle(batch)) for i, batch in enumerate(batches)),
            )
            entries = sorted((entry for some in made for entry in some), key=lambda entry: entry.statement.seq)
            before = rules.opening_of(entries[0].statement)
            for entry in entries:
                before = rules.advance(before, entry.leaves)
                assert entry.statement == before
            assert before.seq == 120
        finally:
            for store in stores:
                await store.close()

    run(body)


def test_a_closed_period_never_changes_and_late_works_go_to_the_next(database: Database) -> None:
    async def body() -> None:
        now = [NOON / 1000]
        store = database.store(wall_clock=lambda: now[0])
        await store.open((receipts.MIGRATION,))
        try:
            desk = Desk(store, NETWORK, lambda node_id, message: False)

            async def settle(segments: Sequence[Segment], at_ms: int) -> Statement:
                async def action(tx: Transaction) -> list[Unsigned]:
                    return await receipts.settle(tx, NETWORK.public, segments, at_ms, DAY)

                return (await store.run(action))[-1].statement

            async def roots(tx: Transaction) -> list[Any]:
                return await tx.all("SELECT period_start_seconds, leaves, root, signature FROM period_roots")

            first = await settle([segment(ended(n)) for n in range(3)], NOON)
            assert await desk.close_periods() == 0
            now[0] = first.period_start_seconds + DAY + receipts.CLOSE_GRACE_SECONDS
            assert await desk.close_periods() == 1
            assert await desk.close_periods() == 0
            ((start, leaves, root, signature),) = await store.run(roots)
            assert (start, leaves) == (first.period_start_seconds, 3)
            hashes = [rules.leaf_hash(segment(ended(n)).leaf) for n in range(3)]
            entries = [rules.merkle_entry(NODE.public, CLASS, seq, h) for seq, h in enumerate(hashes, 1)]
            assert bytes(root) == rules.merkle_root(entries)
            signed = rules.period_root_bytes(NETWORK.public, start, DAY, 3, bytes(root))
            assert NETWORK.sign(signed) == bytes(signature)
            late = await settle([segment(ended(7))], NOON)  # the clock went back
            assert late.period_start_seconds == start + DAY and late.seq == 1
            assert await desk.close_periods() == 0
        finally:
            await store.close()

    run(body)


# ---------------------------------------------------------------- exchanging signatures


def test_both_sides_hold_both_signatures_of_the_same_totals(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.rest()
        for _ in range(3):
            await grid.settle([grid.work(), grid.work(tokens=9)])
            await grid.rest()
        seq, countersigned, statement = await grid.totals()
        assert (seq, countersigned) == (6, 6)
        assert statement.pay_nanocredits == sum(s.leaf.pay_nanocredits for s in grid.segments)
        assert await grid.outbox.unacknowledged(NETWORK.public) == []
        assert grid.desk.disputes == grid.desk.signatures_wrong == 0

    with_grid(tmp_path, body)


def test_a_node_that_was_away_gets_all_it_missed_in_bounded_messages(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        await grid.settle([grid.work() for _ in range(700)])
        for _ in range(70):
            await grid.settle([grid.work()])
        assert grid.to_node == []
        grid.join()
        await grid.desk._work_off()
        assert len(grid.to_node) == receipts.WINDOW_MESSAGES
        await grid.settle([grid.work()])
        await grid.rest()
        assert (await grid.totals())[:2] == (771, 771)
        assert grid.desk.disputes == 0

    with_grid(tmp_path, body)


def test_a_node_that_is_slow_to_answer_falls_behind_and_catches_up(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.rest()
        for _ in range(30):
            await grid.settle([grid.work() for _ in range(100)])
            assert len(grid.to_node) <= receipts.WINDOW_MESSAGES
        peer = grid.desk._peers[NODE_ID]
        assert peer.behind and not peer.backlog, "over the backlog the database takes over"
        await grid.rest()
        assert (await grid.totals())[:2] == (3000, 3000)
        assert not peer.behind and not peer.sent_again, "nothing was left out on the way"
        await grid.settle([grid.work()])
        await grid.rest()
        assert (await grid.totals())[:2] == (3001, 3001)

    with_grid(tmp_path, body)


def test_what_a_node_misses_on_a_live_link_is_sent_again_once(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.settle([grid.work()])
        await grid.rest()
        await grid.settle([grid.work()])
        await grid.desk._work_off()
        assert isinstance(grid.to_node.pop(), Receipts)  # lost, which a link does not do
        await grid.settle([grid.work()])
        await grid.rest()
        assert (await grid.totals())[:2] == (3, 3)
        assert len(grid.desk._peers[NODE_ID].sent_again) == 1
        # A node that goes on saying so is not sent the same for ever.
        await grid.settle([grid.work()])
        await grid.desk._work_off()
        (signed,) = grid.to_node.pop().statements
        for times in (1, 0, 0):
            missing = Countersignature(
                CLASS, signed.statement.period_start_seconds, signed.statement.seq, b"", "missing"
            )
            grid.desk.countersigned(NODE_ID, Countersigned((missing,)))
            await grid.desk._work_off()
            assert len(grid.to_node) == times
            grid.to_node.clear()

    with_grid(tmp_path, body)


def test_a_wrong_signature_is_counted_and_never_kept(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.settle([grid.work()])
        await grid.desk._work_off()
        while not grid.to_network:
            assert await grid.node_hears()
        (message,) = grid.to_network
        (entry,) = message.signatures
        forged = msgspec.structs.replace(entry, signature=bytes(64))
        stray = msgspec.structs.replace(entry, seq=99)
        for wrong in (forged, stray):
            grid.desk.countersigned(NODE_ID, Countersigned((wrong,)))
            await grid.desk._work_off()
        assert grid.desk.signatures_wrong == 1
        assert (await grid.totals())[:2] == (1, 0)
        grid.desk.countersigned(NODE_ID, message)
        await grid.rest()
        assert (await grid.totals())[:2] == (1, 1)

    with_grid(tmp_path, body)


DISPUTES = {
    "another price": ({"price": Price(50, 10, 399)}, "price"),
    "too little pay": ({"pay_nanocredits": 1}, "pays 1 nanocredits"),
    "more than was sent": ({"output_tokens": 6, "pay_nanocredits": rules.pay_of(PRICE, 4, 1, 6)}, "sent 5"),
    "more than was given": ({"input_tokens": 5, "pay_nanocredits": rules.pay_of(PRICE, 5, 1, 5)}, "was given 4"),
    "another output": ({"output_hash": bytes(32), "claim": b""}, "first 5 ids"),
    "another prompt": ({"prompt_hash": bytes(32)}, "another prompt"),
    "another position": ({"start": 3}, "position 3"),
    "a claim of somebody else": ({"claim": bytes(64)}, "claim"),
}


@pytest.mark.parametrize("name", DISPUTES)
def test_a_node_signs_nothing_that_its_record_does_not_bear_out(name: str, tmp_path: Path) -> None:
    changed, sentence = DISPUTES[name]

    async def body(grid: Grid) -> None:
        grid.join()
        await grid.settle([grid.work(), grid.work(**changed)])
        await grid.rest()
        assert (await grid.totals())[:2] == (2, 0)
        assert grid.desk.disputes == 1

        async def remark(tx: Transaction) -> Any:
            return await tx.one("SELECT remark, node_signature FROM receipt_statements")

        said, signature = await grid.store.run(remark)
        assert sentence in said and bytes(signature) == b""
        # What follows stands on the disputed totals, so it is not signed either, and nobody loops over it.
        await grid.settle([grid.work()])
        await grid.rest()
        assert (await grid.totals())[:2] == (3, 0)

    with_grid(tmp_path, body)


def test_a_network_that_counts_less_than_was_sent_is_taken_at_its_word(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        made = ended(1, tokens=5)
        grid.outbox.record(made)
        await grid.settle([segment(made, tokens=3, claim=made.claim)])
        await grid.rest()
        assert (await grid.totals())[:2] == (1, 1)

    with_grid(tmp_path, body)


def test_the_same_work_is_not_receipted_twice_under_two_numbers(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.settle([grid.work()])
        await grid.rest()
        _, _, before = await grid.totals()
        twice = (grid.segments[0].leaf,)
        statement = rules.advance(before, twice)
        signed = receipts.SignedStatement(statement, twice, rules.sign_as_network(NETWORK, statement))
        answer = await grid.outbox.answer(NETWORK.public, Receipts((signed,)))
        assert answer is not None and "receipted before" in answer.signatures[0].remark
        assert not answer.signatures[0].signature

    with_grid(tmp_path, body)


def test_a_network_that_says_two_things_under_one_number_gets_one_signature(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.settle([grid.work()])
        await grid.rest()
        leaf = grid.work().leaf
        statement = rules.advance(rules.opening_of((await grid.totals())[2]), (leaf,))
        signed = receipts.SignedStatement(statement, (leaf,), rules.sign_as_network(NETWORK, statement))
        answer = await grid.outbox.answer(NETWORK.public, Receipts((signed,)))
        assert answer is not None and "another statement" in answer.signatures[0].remark

    with_grid(tmp_path, body)


def test_statements_of_others_are_not_signed(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        made = await grid.settle([grid.work()], tell=False)
        stranger = Identity(b"s" * 32)
        statement = made[0].statement
        signature = rules.sign_as_network(NETWORK, statement)
        other_node = rules.advance(
            rules.opening(NETWORK.public, stranger.public, CLASS, statement.period_start_seconds, DAY), made[0].leaves
        )
        for said, by, key, word in (
            (statement, rules.sign_as_network(stranger, statement), NETWORK.public, "signature"),
            (statement, signature, stranger.public, "another network"),
            (other_node, rules.sign_as_network(NETWORK, other_node), NETWORK.public, "another node"),
        ):
            answer = await grid.outbox.answer(key, Receipts((receipts.SignedStatement(said, made[0].leaves, by),)))
            assert answer is not None and word in answer.signatures[0].remark and not answer.signatures[0].signature

    with_grid(tmp_path, body)


def test_a_node_that_lost_everything_takes_the_networks_word_and_says_so(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        grid.join()
        await grid.settle([grid.work() for _ in range(3)])
        await grid.rest()
        await grid.outbox.close()
        for file in tmp_path.glob("receipts.sqlite*"):
            file.unlink()
        grid.outbox = grid.new_outbox()
        grid.outbox.open()
        grid.join()
        await grid.settle([grid.work(recorded=False)])
        await grid.rest()
        await grid.settle([grid.work()])
        await grid.rest()
        assert (await grid.totals())[:2] == (5, 5)

        async def remarks(tx: Transaction) -> Any:
            return await tx.all("SELECT remark FROM receipt_statements ORDER BY seq")

        assert [row[0] for row in await grid.store.run(remarks)] == ["", "no_record", ""]

    with_grid(tmp_path, body)


# ---------------------------------------------------------------- loss, repetition, order, and kill -9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_whatever_becomes_of_messages_both_sides_end_with_the_same_totals(seed: int, sizes: list[int]) -> None:
    """Receipts and answers are lost, repeated and swapped as the seed says; the node is killed; then one quiet join."""
    chance = random.Random(seed)

    async def body(grid: Grid) -> None:
        grid.join()
        history: list[Any] = []
        for size in sizes:
            await grid.settle([grid.work(recorded=chance.random() < 0.9) for _ in range(size)])
            await grid.desk._work_off()
            for _ in range(chance.randrange(4)):
                history += grid.to_node
                chance.shuffle(grid.to_node)
                match chance.randrange(5):
                    case 0 if grid.to_node:
                        grid.to_node.pop()
                    case 1 if history:
                        grid.to_node.append(chance.choice(history))
                    case 2 if grid.to_network:
                        grid.to_network.append(chance.choice(grid.to_network))
                    case 3 if grid.to_network:
                        grid.to_network.pop()
                    case 4 if chance.random() < 0.5:
                        grid.cut()
                        await grid.outbox.close()
                        grid.outbox = grid.new_outbox()
                        grid.outbox.open()
                        grid.join()
                        await grid.sign_again()
                await grid.node_hears()
                await grid.network_hears()
                await grid.desk._work_off()
        grid.cut()
        grid.join()
        await grid.sign_again()
        await grid.rest()
        seq, countersigned, statement = await grid.totals()
        assert seq == countersigned == sum(sizes)
        assert statement.pay_nanocredits == sum(s.leaf.pay_nanocredits for s in grid.segments)
        assert statement.output_tokens == sum(s.leaf.output_tokens for s in grid.segments)
        assert await grid.outbox.unacknowledged(NETWORK.public) == []
        assert grid.desk.disputes == 0

    with tempfile.TemporaryDirectory() as folder:
        with_grid(Path(folder), body)


def test_a_node_killed_at_any_step_signs_the_same_totals(tmp_path: Path) -> None:
    """A copy of its file after each step is what a killed node finds when it starts again."""
    for step in range(4):
        folder = tmp_path / str(step)
        folder.mkdir()

        async def body(grid: Grid, step: int = step) -> None:
            async def killed() -> None:
                await grid.outbox.unacknowledged(NETWORK.public)  # what was handed in before is on disk by then
                copies = {p.name: p.read_bytes() for p in grid.folder.glob("receipts.sqlite*") if "shm" not in p.name}
                await grid.outbox.close()
                for path in grid.folder.glob("receipts.sqlite*"):
                    path.unlink()
                for name, data in copies.items():
                    (grid.folder / name).write_bytes(data)
                grid.outbox = grid.new_outbox()
                grid.outbox.open()
                grid.cut()
                grid.join()
                await grid.sign_again()

            grid.join()
            await grid.rest()
            works = [grid.work(), grid.work()]
            if step == 0:
                await killed()
            await grid.settle(works)
            await grid.desk._work_off()
            if step == 1:
                await killed()
            while not grid.to_network:
                if not await grid.node_hears():
                    await grid.desk._work_off()
            if step == 2:
                await killed()
            await grid.network_hears()
            await grid.desk._work_off()
            if step == 3:
                await killed()
            await grid.rest()
            assert (await grid.totals())[:2] == (2, 2)
            assert await grid.outbox.unacknowledged(NETWORK.public) == []

        with_grid(folder, body)


def test_a_disk_that_hangs_costs_records_and_not_memory(tmp_path: Path) -> None:
    async def body() -> None:
        outbox = Outbox(tmp_path / "receipts.sqlite", NODE, wall_clock=lambda: 0.0)  # not open: nobody takes things out
        for number in range((WAITING_MAX + 2) * GROUP_MAX):
            outbox.record(ended(number))
        assert outbox.records_lost == 2 * GROUP_MAX

    asyncio.run(body())


def test_the_desk_does_its_work_in_one_task_that_ends_when_cancelled(tmp_path: Path) -> None:
    async def body(grid: Grid) -> None:
        task = asyncio.create_task(grid.desk.run())
        grid.join()
        await grid.settle([grid.work() for _ in range(200)])
        while not any(isinstance(message, Acknowledged) for message in grid.to_node):
            while await grid.node_hears() or await grid.network_hears():
                pass
            await asyncio.sleep(0.001)
            if (await grid.totals())[1] == 200:
                break
        assert (await grid.totals())[:2] == (200, 200)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with_grid(tmp_path, body)
