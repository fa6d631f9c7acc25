"""Receipts, the network's side: what was settled becomes leaves and totals, which both sides sign.

1. `settle` runs inside the settlement's own transaction: a work is paid exactly when it has its leaf.
2. Signatures are made after the commit, and again whenever they are asked for: Ed25519 gives the same ones.
3. Everything is in the database. A node that is away gets nothing; when it comes back it gets what it has not
   countersigned. Totals only grow, so losing or repeating a message changes nothing.

A chain is the leaves of one node, class and period. A period that is closed never changes: what is settled later
belongs to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from gridmill.network.store import Row, Transaction
from gridmill.wire import receipts as rules
from gridmill.wire.codec import LEAVES_MAX, STATEMENTS_MAX
from gridmill.wire.messages import (
    Leaf,
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
    period_start_seconds BIGINT NOT NULL PRIMARY KEY,
    period_seconds BIGINT NOT NULL,
    network_key BLOB NOT NULL,
    leaves BIGINT NOT NULL,
    root BLOB NOT NULL,
    signature BLOB NOT NULL
);
"""

CHAIN_BYTES = 16  # of the head before the first leaf: nobody finds two chains that share them
WINDOW_MESSAGES = 2  # Receipts on their way to one node: one being answered, one ready
PEERS_COUNTERSIGNED_MAX = 1024  # answers that wait for the database; what is over is asked for again at the next join
STATEMENTS_REMEMBERED = 2 * STATEMENTS_MAX * WINDOW_MESSAGES  # per node: all that it may still answer, with room
CLOSE_GRACE_SECONDS = 300  # a settlement reads the clock first, and waits for no lock nearly as long as this
MISSING = "missing"  # a node's remark: it lacks leaves before these, and they should come again in order

_COUNTER = (
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
    period = at_ms // 1000 // period_seconds * period_seconds
    row = await tx.one(
        "SELECT period_start_seconds + period_seconds FROM period_roots ORDER BY period_start_seconds DESC LIMIT 1"
    )
    closed_until = int(row[0]) if row is not None else 0
    return max(period, -(-closed_until // period_seconds) * period_seconds)


async def _locked_counters(
    tx: Transaction, openings: dict[tuple[str, str], Statement], chains: dict[tuple[str, str], bytes]
) -> dict[bytes, Statement]:
    """The totals of these chains, held until the commit, made where there are none yet. Locked in sorted order, so
    that two settlements never wait for each other in a circle."""
    sql = f"SELECT {_COUNTER} FROM receipt_counters WHERE chain IN (??)"
    wanted = sorted(set(chains.values()))
    rows = await tx.among(sql, wanted, lock=True)
    if len(rows) < len(wanted):
        found = {bytes(row[0]) for row in rows}
        missing = sorted((chain, key) for key, chain in chains.items() if chain not in found)
        await tx.do_many(
            f"INSERT INTO receipt_counters ({_COUNTER}) VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0, 0, 0, 0, ?) "
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
    return {bytes(row[0]): _counter(row) for row in rows}


def _counter(row: Row) -> Statement:
    """The totals in a row of _COUNTER columns."""
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
