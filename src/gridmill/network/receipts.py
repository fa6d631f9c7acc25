"""Receipts, the network's side: what was settled becomes leaves and totals, which both sides sign.

1. `settle` runs inside the settlement's own transaction: a work is paid exactly when it has its leaf.
2. Signatures are made after the commit, and again whenever they are asked for: Ed25519 gives the same ones.
3. Everything is in the database. A node that is away gets nothing; when it comes back it gets what it has not
   countersigned. Totals only grow, so losing or repeating a message changes nothing.

A chain is the leaves of one node, class and period. A period that is closed never changes: what is settled later
belongs to the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import msgspec

from gridmill.network.store import Row, Store, StoreUnusable, Transaction
from gridmill.wire import receipts as rules
from gridmill.wire.codec import LEAVES_MAX, STATEMENTS_MAX
from gridmill.wire.identity import Identity, node_id_of
from gridmill.wire.messages import (
    Acknowledged,
    AnyMessage,
    Countersignature,
    Countersigned,
    Leaf,
    NodeId,
    Receipts,
    SignedStatement,
    Statement,
)

log = logging.getLogger("gridmill.network.receipts")

MIGRATION = """
CREATE TABLE receipt_counters (
    chain BLOB NOT NULL PRIMARY KEY,
    node_id TEXT NOT NULL,
    class_id TEXT NOT NULL,
    period_start_seconds BIGINT NOT NULL,
    period_seconds BIGINT NOT NULL,
    network_key BLOB NOT NULL,
    node_key BLOB NOT NULL,
    seq BIGINT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    pay_nanocredits BIGINT NOT NULL,
    head BLOB NOT NULL,
    countersigned_seq BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX receipt_counters_by_node ON receipt_counters (node_id, period_start_seconds);
CREATE INDEX receipt_counters_by_period ON receipt_counters (period_start_seconds);
CREATE TABLE receipt_leaves (
    chain BLOB NOT NULL,
    seq BIGINT NOT NULL,
    work_id TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    account_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    period_start_seconds BIGINT NOT NULL,
    leaf BLOB NOT NULL,
    salt BLOB NOT NULL,
    PRIMARY KEY (chain, seq)
);
CREATE UNIQUE INDEX receipt_leaves_by_work ON receipt_leaves (work_id, epoch);
CREATE INDEX receipt_leaves_by_account ON receipt_leaves (account_id, period_start_seconds);
CREATE TABLE receipt_statements (
    chain BLOB NOT NULL,
    seq BIGINT NOT NULL,
    first_seq BIGINT NOT NULL,
    statement BLOB NOT NULL,
    network_signature BLOB NOT NULL,
    node_signature BLOB NOT NULL,
    remark TEXT NOT NULL,
    PRIMARY KEY (chain, seq)
);
CREATE TABLE period_roots (
    period_start_seconds BIGINT NOT NULL,
    period_seconds BIGINT NOT NULL,
    network_key BLOB NOT NULL,
    leaves BIGINT NOT NULL,
    root BLOB NOT NULL,
    signature BLOB NOT NULL,
    PRIMARY KEY (period_start_seconds, period_seconds)
);
"""

CHAIN_BYTES = 16  # of the head before the first leaf: nobody finds two chains that share them
WINDOW_MESSAGES = 2  # Receipts on their way to one node: one being answered, one ready
BACKLOG_LEAVES_MAX = 8 * LEAVES_MAX  # of one node, in memory while it answers; what is over is read again when it has
ANSWERS_WAITING_MAX = 1024  # Countersigned messages before the disk; those over it come again at the next join
ANSWERS_AT_ONCE = 64
CLOSE_GRACE_SECONDS = 300  # a settlement reads the clock first, and waits for no lock nearly as long as this
CLOSE_LOOK_SECONDS = 60.0  # how often to look for a period that is over
RETRY_SECONDS = 5.0  # for a database that did not answer
GATHER_SECONDS = 0.2  # between countersignatures and their commit
VERIFIED_AT_ONCE = 8  # each takes 45 µs; more are left to another thread
LEAVES_PAGE = 2000  # read at once for a root: some milliseconds of the database
MISSING = "missing"  # a node's remark: it lacks leaves before these, and they should come again in order

Send = Callable[[NodeId, AnyMessage], bool]

COUNTER_COLUMNS = (
    "chain, node_id, class_id, period_start_seconds, period_seconds, network_key, node_key, seq, input_tokens, "
    "cached_tokens, output_tokens, pay_nanocredits, head"
)
_LEAF_COLUMNS = (
    *("chain", "seq", "work_id", "epoch", "account_id", "key_id", "model", "period_start_seconds", "leaf", "salt"),
)
_STATEMENT_COLUMNS = ("chain", "seq", "first_seq", "statement", "network_signature", "node_signature", "remark")


class Segment(msgspec.Struct, frozen=True):
    """One work, or one node's part of it, that is being settled. `salt` is the work's."""

    node_id: str
    node_key: bytes
    class_id: str
    leaf: Leaf
    salt: bytes
    account_id: str
    key_id: str
    model: str


class Unsigned(msgspec.Struct, frozen=True):
    """A statement with the leaves since the one before, committed and not signed yet."""

    statement: Statement
    leaves: tuple[Leaf, ...]


# ---------------------------------------------------------------- inside the settlement


async def settle(
    tx: Transaction, network_key: bytes, segments: Sequence[Segment], at_ms: int, period_seconds: int
) -> list[Unsigned]:
    """Gives each segment its leaf and its number; returns what to sign once this transaction is committed.

    A segment (work id, epoch) that has its leaf already is left out, so that settling twice changes nothing. `at_ms`
    is the transaction's own time (`tx.now_ms()`), which decides the period.
    """
    if not segments:
        return []
    period = await _open_period(tx, at_ms, period_seconds)
    openings: dict[tuple[str, str], Statement] = {}
    chains: dict[tuple[str, str], bytes] = {}
    for segment in segments:
        key = (segment.node_id, segment.class_id)
        if key not in openings:
            first = rules.opening(network_key, segment.node_key, segment.class_id, period, period_seconds)
            openings[key] = first
            chains[key] = first.head[:CHAIN_BYTES]
    counters = await _locked_counters(tx, openings, chains)
    work_ids = sorted({segment.leaf.work_id for segment in segments})
    rows = await tx.among("SELECT work_id, epoch FROM receipt_leaves WHERE work_id IN (??)", work_ids)
    known = {(row[0], row[1]) for row in rows}
    leaf_rows: list[tuple[object, ...]] = []
    batches: dict[bytes, list[Leaf]] = {}
    made: list[tuple[bytes, Unsigned]] = []
    for segment in segments:
        leaf = segment.leaf
        if (leaf.work_id, leaf.epoch) in known:
            continue
        known.add((leaf.work_id, leaf.epoch))
        chain = chains[segment.node_id, segment.class_id]
        packed = rules.leaf_bytes(leaf)
        after = counters[chain] = _after(counters[chain], leaf, packed)
        leaf_rows.append(
            (
                *(chain, after.seq, leaf.work_id, leaf.epoch, segment.account_id, segment.key_id, segment.model),
                *(period, packed, segment.salt),
            )
        )
        batch = batches.setdefault(chain, [])
        batch.append(leaf)
        if len(batch) == LEAVES_MAX:
            made.append((chain, Unsigned(after, tuple(batches.pop(chain)))))
    changed = {chain for chain, _ in made} | set(batches)
    made += [(chain, Unsigned(counters[chain], tuple(batch))) for chain, batch in batches.items()]
    if not made:
        return []
    await tx.append("receipt_leaves", _LEAF_COLUMNS, leaf_rows)
    await tx.append(
        "receipt_statements",
        _STATEMENT_COLUMNS,
        [
            (
                *(chain, unsigned.statement.seq, unsigned.statement.seq - len(unsigned.leaves) + 1),
                *(rules.statement_bytes(unsigned.statement), b"", b"", ""),
            )
            for chain, unsigned in made
        ],
    )
    await tx.do_many(
        "UPDATE receipt_counters SET seq = ?, input_tokens = ?, cached_tokens = ?, output_tokens = ?, "
        "pay_nanocredits = ?, head = ? WHERE chain = ?",
        [
            (
                *(after.seq, after.input_tokens, after.cached_tokens, after.output_tokens),
                *(after.pay_nanocredits, after.head, chain),
            )
            for chain in sorted(changed)
            for after in (counters[chain],)
        ],
    )
    return [unsigned for _, unsigned in made]


async def _open_period(tx: Transaction, at_ms: int, period_seconds: int) -> int:
    """Where the period begins that is open at this time: its own, or the first after all that are closed."""
    row = await tx.one(
        "SELECT MAX(period_start_seconds) FROM period_roots WHERE period_seconds = ?",
        period_seconds,
    )
    period = at_ms // 1000 // period_seconds * period_seconds
    return period if row is None or row[0] is None else max(period, int(row[0]) + period_seconds)


async def _locked_counters(
    tx: Transaction, openings: dict[tuple[str, str], Statement], chains: dict[tuple[str, str], bytes]
) -> dict[bytes, Statement]:
    """The totals of these chains, held until the commit, made where there are none yet. Locked in sorted order, so
    that two settlements never wait for each other in a circle."""
    sql = f"SELECT {COUNTER_COLUMNS} FROM receipt_counters WHERE chain IN (??)"
    wanted = sorted(set(chains.values()))
    rows = await tx.among(sql, wanted, lock=True)
    if len(rows) < len(wanted):
        found = {bytes(row[0]) for row in rows}
        missing = sorted((chain, key) for key, chain in chains.items() if chain not in found)
        await tx.do_many(
            f"INSERT INTO receipt_counters ({COUNTER_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0, 0, 0, 0, ?) "
            "ON CONFLICT (chain) DO NOTHING",
            [
                (
                    *(chain, key[0], key[1], first.period_start_seconds, first.period_seconds),
                    *(first.network_key, first.node_key, first.head),
                )
                for chain, key in missing
                for first in (openings[key],)
            ],
        )
        rows = await tx.among(sql, wanted, lock=True)
    return {bytes(row[0]): counter_from(row) for row in rows}


def counter_from(row: Row) -> Statement:
    """The totals in a row of COUNTER_COLUMNS columns."""
    _, _, class_id, start, seconds, network_key, node_key, seq, given, cached, out, pay, head = row
    return Statement(
        *(bytes(network_key), bytes(node_key), class_id, start, seconds, seq, given, cached, out, pay, bytes(head))
    )


def _after(before: Statement, leaf: Leaf, packed: bytes) -> Statement:
    """`rules.advance` by one leaf that is encoded already: this runs for every work of the network."""
    return Statement(
        before.network_key,
        before.node_key,
        before.class_id,
        before.period_start_seconds,
        before.period_seconds,
        before.seq + 1,
        before.input_tokens + leaf.input_tokens,
        before.cached_tokens + leaf.cached_tokens,
        before.output_tokens + leaf.output_tokens,
        before.pay_nanocredits + leaf.pay_nanocredits,
        rules.chain_next(before.head, rules.leaf_hash_of(packed)),
    )


# ---------------------------------------------------------------- with the nodes


class _Peer:
    """What is under way with one node on its present link."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.sent: OrderedDict[tuple[str, int, int], SignedStatement] = OrderedDict()
        self.sent_seq: dict[bytes, int] = {}  # per chain, on this link, with what is in the backlog
        self.backlog: deque[Unsigned] = deque()
        self.backlog_leaves = 0
        self.behind = True  # something may be in the database that is neither sent nor in the backlog
        self.more = False  # something was settled since the database was last read
        self.sent_again: set[tuple[bytes, int]] = set()  # where the node said `missing`, once for each

    def fall_behind(self) -> None:
        """The database takes over from the backlog."""
        for entry in reversed(self.backlog):
            self.sent_seq[_chain_of(entry.statement)] = entry.statement.seq - len(entry.leaves)
        self.backlog.clear()
        self.backlog_leaves = 0
        self.behind = self.more = True


class Desk:
    """Exchanges signatures with the nodes that are here. `run` is its one task.

    `send(node_id, message)` hands a message to the node's live link, and is False when there is none.
    """

    def __init__(self, store: Store, identity: Identity, send: Send) -> None:
        self._store = store
        self._identity = identity
        self._send = send
        self._peers: dict[NodeId, _Peer] = {}
        self._answers: deque[tuple[NodeId, Countersigned]] = deque()
        self._behind: set[NodeId] = set()
        self._wake = asyncio.Event()
        self.answers_lost = 0
        self.signatures_wrong = 0
        self.disputes = 0

    def send(self, unsigned: Sequence[Unsigned]) -> None:
        """After the commit of a settlement: tells the nodes that are here. The rest is in the database."""
        touched: set[NodeId] = set()
        for entry in unsigned:
            node_id = node_id_of(entry.statement.node_key)
            peer = self._peers.get(node_id)
            if peer is None:
                continue
            touched.add(node_id)
            chain = _chain_of(entry.statement)
            before = entry.statement.seq - len(entry.leaves)
            follows = peer.sent_seq.get(chain, 0) == before
            room = peer.backlog_leaves + len(entry.leaves) <= BACKLOG_LEAVES_MAX
            if peer.behind or not follows or not room:
                peer.fall_behind()
            else:
                peer.backlog.append(entry)
                peer.backlog_leaves += len(entry.leaves)
                peer.sent_seq[chain] = entry.statement.seq
        for node_id in touched:
            self._push(node_id)

    def joined(self, node_id: NodeId) -> None:
        """A node is here, for the first time or again: it gets all that it has not countersigned."""
        self._peers[node_id] = _Peer()
        self._push(node_id)

    def left(self, node_id: NodeId) -> None:
        self._peers.pop(node_id, None)
        self._behind.discard(node_id)

    def settled_elsewhere(self, node_id: NodeId) -> None:
        """Another gateway on this database settled works of a node whose link is here."""
        peer = self._peers.get(node_id)
        if peer is not None:
            peer.fall_behind()
            self._push(node_id)

    def heard(self, topic: str, subject: str) -> None:
        """What the store announces: works that another gateway left behind were settled."""
        if topic == "receipts":
            self.settled_elsewhere(NodeId(subject))

    def countersigned(self, node_id: NodeId, message: Countersigned) -> None:
        """What a node said to receipts. Never blocks; `run` checks it and writes it down."""
        peer = self._peers.get(node_id)
        if peer is None:
            return
        peer.in_flight = max(0, peer.in_flight - 1)
        if len(self._answers) < ANSWERS_WAITING_MAX:
            self._answers.append((node_id, message))
            self._wake.set()
        else:
            self.answers_lost += 1
        self._push(node_id)

    async def run(self) -> None:
        """Writes answers down, sends what nodes missed, and closes periods, until it is cancelled."""
        loop = asyncio.get_running_loop()
        look_at = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(look_at):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._answers and not self._behind:
                await asyncio.sleep(GATHER_SECONDS)  # nobody waits for these; together they are one transaction
            try:
                await self._work_off()
                if loop.time() >= look_at:
                    look_at = loop.time() + CLOSE_LOOK_SECONDS
                    await self.close_periods()
            except StoreUnusable as problem:
                log.warning("receipts could not be exchanged; trying again", extra={"reason": str(problem)})
                await asyncio.sleep(RETRY_SECONDS)
                self._wake.set()

    async def _work_off(self) -> None:
        while self._answers:
            batch = [self._answers.popleft() for _ in range(min(len(self._answers), ANSWERS_AT_ONCE))]
            try:
                await self._write_down(batch)
            except StoreUnusable:
                self._answers.extendleft(reversed(batch))
                raise
        for node_id in tuple(self._behind):
            self._behind.discard(node_id)
            try:
                await self._catch_up(node_id)
            except StoreUnusable:
                self._behind.add(node_id)
                raise

    # ------------------------------------------------------------ out

    def _push(self, node_id: NodeId) -> None:
        """Sends as much of the backlog as may be on its way; what lies in the database is for `run`."""
        peer = self._peers.get(node_id)
        if peer is None:
            return
        while peer.backlog and peer.in_flight < WINDOW_MESSAGES:
            batch: list[Unsigned] = []
            leaves = 0
            while peer.backlog and len(batch) < STATEMENTS_MAX and leaves + len(peer.backlog[0].leaves) <= LEAVES_MAX:
                batch.append(peer.backlog.popleft())
                leaves += len(batch[-1].leaves)
            peer.backlog_leaves -= leaves
            self._sign_and_send(node_id, peer, batch)
        if peer.behind and not peer.backlog and peer.in_flight < WINDOW_MESSAGES:
            self._behind.add(node_id)
            self._wake.set()

    def _sign_and_send(self, node_id: NodeId, peer: _Peer, batch: Sequence[Unsigned]) -> None:
        statements = tuple(
            SignedStatement(entry.statement, entry.leaves, rules.sign_as_network(self._identity, entry.statement))
            for entry in batch
        )
        if not self._send(node_id, Receipts(statements)):
            self.left(node_id)
            return
        peer.in_flight += 1
        for signed in statements:
            peer.sent[_name(signed.statement)] = signed
        while len(peer.sent) > 2 * WINDOW_MESSAGES * STATEMENTS_MAX:
            peer.sent.popitem(last=False)  # never answered; should it be after all, the database knows it

    async def _catch_up(self, node_id: NodeId) -> None:
        """The next messages of what the node has not countersigned and was not sent on this link."""
        peer = self._peers.get(node_id)
        while peer is not None and peer.behind and peer.in_flight < WINDOW_MESSAGES:
            peer.more = False
            sent_seq = dict(peer.sent_seq)

            async def read(tx: Transaction, sent_seq: dict[bytes, int] = sent_seq) -> list[Unsigned]:
                return await _uncountersigned(tx, node_id, sent_seq)

            found = await self._store.run(read)
            if self._peers.get(node_id) is not peer:
                return
            if found:
                for entry in found:
                    peer.sent_seq[_chain_of(entry.statement)] = entry.statement.seq
                self._sign_and_send(node_id, peer, found)
            elif not peer.more:
                peer.behind = False

    # ------------------------------------------------------------ in

    async def _write_down(self, answers: Sequence[tuple[NodeId, Countersigned]]) -> None:
        said = [(node_id, entry) for node_id, message in answers for entry in message.signatures]
        statements: list[Statement | None] = []
        for node_id, entry in said:
            peer = self._peers.get(node_id)
            signed = peer.sent.pop(_name(entry), None) if peer is not None else None
            statements.append(signed.statement if signed is not None else None)
        unknown = [i for i, statement in enumerate(statements) if statement is None]
        if unknown:
            asked = [said[i] for i in unknown]

            async def read(tx: Transaction) -> list[Statement | None]:
                return [await _find_statement(tx, node_id, entry) for node_id, entry in asked]

            for i, statement in zip(unknown, await self._store.run(read), strict=True):
                statements[i] = statement

        def verify() -> list[bool]:
            return [
                statement is not None and bool(entry.signature) and rules.signed_by_node(statement, entry.signature)
                for (_, entry), statement in zip(said, statements, strict=True)
            ]

        holds = verify() if len(said) <= VERIFIED_AT_ONCE else await asyncio.to_thread(verify)
        good: list[tuple[NodeId, Countersignature, Statement]] = []
        disputed: list[tuple[Countersignature, Statement]] = []
        for (node_id, entry), statement, fine in zip(said, statements, holds, strict=True):
            if statement is None:
                log.warning("a node signs a statement that nobody made", extra={"node": node_id, "seq": entry.seq})
            elif fine:
                good.append((node_id, entry, statement))
                if entry.remark:
                    log.info("a node countersigns without a record", extra={"node": node_id, "remark": entry.remark})
            elif entry.signature:
                self.signatures_wrong += 1
                log.warning("a node's countersignature is wrong", extra={"node": node_id, "seq": entry.seq})
            elif entry.remark == MISSING:
                self._send_again(node_id, statement)
            else:
                self.disputes += 1
                disputed.append((entry, statement))
                log.warning("a node disputes a receipt", extra={"node": node_id, "remark": entry.remark})
        if not good and not disputed:
            return
        signatures = sorted(
            ((_chain_of(statement), statement.seq, entry, statement) for _, entry, statement in good),
            key=lambda row: row[:2],
        )
        rows = [
            (rules.sign_as_network(self._identity, statement), entry.signature, entry.remark, chain, seq)
            for chain, seq, entry, statement in signatures
        ]
        highest = {chain: seq for chain, seq, _, _ in signatures}  # in order, so the last is the highest

        async def write(tx: Transaction) -> None:
            await tx.do_many(
                "UPDATE receipt_counters SET countersigned_seq = ? WHERE chain = ? AND countersigned_seq < ?",
                [(seq, chain, seq) for chain, seq in highest.items()],
            )
            await tx.do_many(
                "UPDATE receipt_statements SET network_signature = ?, node_signature = ?, remark = ? "
                "WHERE chain = ? AND seq = ?",
                rows,
            )
            await tx.do_many(
                "UPDATE receipt_statements SET remark = ? WHERE chain = ? AND seq = ? AND length(node_signature) = 0",
                [(entry.remark, _chain_of(statement), statement.seq) for entry, statement in disputed],
            )

        await self._store.run(write)
        kept: dict[NodeId, list[tuple[str, int, int]]] = {}
        for node_id, entry, _ in good:
            kept.setdefault(node_id, []).append(_name(entry))
        for node_id, names in kept.items():
            for start in range(0, len(names), STATEMENTS_MAX):
                self._send(node_id, Acknowledged(tuple(names[start : start + STATEMENTS_MAX])))

    def _send_again(self, node_id: NodeId, statement: Statement) -> None:
        """Once for each place: a node that goes on missing it waits for its next join."""
        peer = self._peers.get(node_id)
        place = (_chain_of(statement), statement.seq)
        if peer is not None and place not in peer.sent_again and len(peer.sent_again) < BACKLOG_LEAVES_MAX:
            peer.sent_again.add(place)
            peer.fall_behind()
            peer.sent_seq.pop(place[0], None)
            self._push(node_id)

    # ------------------------------------------------------------ periods

    async def close_periods(self) -> int:
        """Signs the root of every period that is over; returns how many. Repeating it changes nothing."""

        async def due(tx: Transaction) -> list[Row]:
            return await tx.all(
                "SELECT DISTINCT c.period_start_seconds, c.period_seconds FROM receipt_counters c "
                "LEFT JOIN period_roots r ON r.period_start_seconds = c.period_start_seconds "
                "AND r.period_seconds = c.period_seconds WHERE r.root IS NULL AND c.seq > 0 "
                "AND c.period_start_seconds + c.period_seconds <= ? ORDER BY 1, 2",
                await tx.now_ms() // 1000 - CLOSE_GRACE_SECONDS,
            )

        closed = 0
        for start, seconds in await self._store.run(due):
            closed += await self._close(int(start), int(seconds))
        return closed

    async def _close(self, start: int, seconds: int) -> bool:
        entries = await period_entries(self._store, start, seconds)
        root = rules.merkle_root(entries)
        key = self._identity.public
        signature = self._identity.sign(rules.period_root_bytes(key, start, seconds, len(entries), root))

        async def write(tx: Transaction) -> bool:
            row = await tx.one(
                "SELECT SUM(seq) FROM receipt_counters WHERE period_start_seconds = ? AND period_seconds = ?",
                *(start, seconds),
            )
            if row is None or row[0] != len(entries):
                return False  # a clock went back and something was added: the next look takes it in
            await tx.do(
                "INSERT INTO period_roots (period_start_seconds, period_seconds, network_key, leaves, root, signature) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (period_start_seconds, period_seconds) DO NOTHING",
                *(start, seconds, key, len(entries), root, signature),
            )
            return True

        return await self._store.run(write)


async def period_entries(store: Store, start: int, seconds: int) -> list[bytes]:
    """The entries of a period's tree in their order (node id, class id, seq)."""

    async def chains_of(tx: Transaction) -> list[Row]:
        return await tx.all(
            "SELECT node_id, class_id, chain, node_key FROM receipt_counters "
            "WHERE period_start_seconds = ? AND period_seconds = ?",
            *(start, seconds),
        )

    entries: list[bytes] = []
    for _, class_id, chain, node_key in sorted(await store.read(chains_of)):
        seq = 0
        while True:

            async def page(tx: Transaction, chain: bytes = bytes(chain), after: int = seq) -> list[Row]:
                return await tx.all(
                    f"SELECT leaf FROM receipt_leaves WHERE chain = ? AND seq > ? ORDER BY seq LIMIT {LEAVES_PAGE}",
                    *(chain, after),
                )

            rows = await store.read(page)
            key = bytes(node_key)
            for (packed,) in rows:
                seq += 1
                entries.append(rules.merkle_entry(key, class_id, seq, rules.leaf_hash_of(bytes(packed))))
            if len(rows) < LEAVES_PAGE:
                break
    return entries


# ---------------------------------------------------------------- reading


async def _uncountersigned(tx: Transaction, node_id: str, sent_seq: dict[bytes, int]) -> list[Unsigned]:
    """As many statements as one message holds, in order, that the node has neither countersigned nor been sent."""
    chains = await tx.all(
        "SELECT chain, seq, countersigned_seq FROM receipt_counters WHERE node_id = ? AND seq > countersigned_seq "
        "ORDER BY period_start_seconds, chain",
        node_id,
    )
    found: list[Unsigned] = []
    leaves_left = LEAVES_MAX
    for raw, seq, countersigned_seq in chains:
        chain = bytes(raw)
        after = max(countersigned_seq, sent_seq.get(chain, 0))
        if after >= seq:
            continue
        rows = await tx.all(
            f"SELECT seq, first_seq, statement FROM receipt_statements WHERE chain = ? AND seq > ? ORDER BY seq "
            f"LIMIT {STATEMENTS_MAX - len(found)}",
            *(chain, after),
        )
        for last, first, packed in rows:
            if last - first + 1 > leaves_left:
                return found
            leaves_left -= last - first + 1
            leaves = await tx.all(
                "SELECT leaf FROM receipt_leaves WHERE chain = ? AND seq >= ? AND seq <= ? ORDER BY seq",
                *(chain, first, last),
            )
            statement = rules.statement_from(bytes(packed))
            found.append(Unsigned(statement, tuple(rules.leaf_from(bytes(leaf)) for (leaf,) in leaves)))
        if len(found) == STATEMENTS_MAX:
            break
    return found


async def _find_statement(tx: Transaction, node_id: str, entry: Countersignature) -> Statement | None:
    row = await tx.one(
        "SELECT s.statement FROM receipt_counters c JOIN receipt_statements s ON s.chain = c.chain "
        "WHERE c.node_id = ? AND c.class_id = ? AND c.period_start_seconds = ? AND s.seq = ?",
        *(node_id, entry.class_id, entry.period_start_seconds, entry.seq),
    )
    return rules.statement_from(bytes(row[0])) if row is not None else None


def _chain_of(statement: Statement) -> bytes:
    return rules.opening_of(statement).head[:CHAIN_BYTES]


def _name(entry: Statement | Countersignature) -> tuple[str, int, int]:
    """What both sides call a statement on a link."""
    return entry.class_id, entry.period_start_seconds, entry.seq
