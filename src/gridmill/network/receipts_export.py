"""Receipts as lines of a file (`wire/receipts_file.py`), a page at a time: by node, by account, or all.

A page is a few database actions, so that an export of a year neither holds the writer nor fills the memory. Chains only
grow, so pages fit together whatever is settled in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gridmill.network.control import ControlError
from gridmill.network.receipts import COUNTER_COLUMNS, counter_from, period_entries
from gridmill.network.store import Row, Store, Transaction
from gridmill.wire import receipts as rules
from gridmill.wire import receipts_file
from gridmill.wire.identity import Identity
from gridmill.wire.messages import Statement
from gridmill.wire.receipts_file import EVERY_PERIOD, Line

PAGE_LEAVES = 256  # a leaf is about 1 kB of JSON, and a page must fit one answer of the control socket
PAGE_ROOTS = 500

Cursor = list[Any]


class Exporter:
    """Reads receipts of one network. `identity`, the network's, signs statements that no node has answered yet."""

    def __init__(self, store: Store, identity: Identity | None) -> None:
        self._store = store
        self._identity = identity
        self._tree: tuple[tuple[int, int], rules.MerkleTree] | None = None  # of the period that was asked for last

    async def page(
        self,
        *,
        node_id: str = "",
        account_id: str = "",
        period: int = EVERY_PERIOD,
        with_salts: bool = False,
        cursor: Cursor | None = None,
    ) -> tuple[list[Line], Cursor | None]:
        """Some lines and where to go on; the first call has no cursor, and after the last page there is none."""
        if cursor is None:
            head = receipts_file.header(
                by="network",
                network_key=self._identity.public if self._identity is not None else b"",
                node_key=await self._store.run(lambda tx: _key_of(tx, node_id)) if node_id else b"",
                account=account_id,
                period=period,
            )
            # One node's leaves cannot make a root again, so its file has none.
            return [head], (["chains", "", 0] if node_id else ["roots", -1, 0])
        match cursor[0]:
            case "roots":
                following: Cursor = ["entries", -1, 0, "", 0] if account_id else ["chains", "", 0]
                return await self._roots(period, cursor, following)
            case "chains":
                return await self._chains(node_id, period, with_salts, cursor)
            case _:
                return await self._entries(account_id, period, with_salts, cursor)

    async def _roots(self, period: int, cursor: Cursor, following: Cursor) -> tuple[list[Line], Cursor]:
        _, start, seconds = cursor

        async def read(tx: Transaction) -> list[Row]:
            return await tx.all(
                "SELECT network_key, period_start_seconds, period_seconds, leaves, root, signature FROM period_roots "
                "WHERE (period_start_seconds > ? OR (period_start_seconds = ? AND period_seconds > ?)) "
                f"ORDER BY period_start_seconds, period_seconds LIMIT {PAGE_ROOTS}",
                *(start, start, seconds),
            )

        rows = await self._store.run(read)
        lines = [
            receipts_file.root_line(bytes(row[0]), row[1], row[2], row[3], bytes(row[4]), bytes(row[5]))
            for row in rows
            if period in (EVERY_PERIOD, row[1])
        ]
        return lines, ["roots", rows[-1][1], rows[-1][2]] if len(rows) == PAGE_ROOTS else following

    async def _chains(
        self, node_id: str, period: int, with_salts: bool, cursor: Cursor
    ) -> tuple[list[Line], Cursor | None]:
        _, at, seq = cursor

        async def read(tx: Transaction) -> tuple[list[Line], Cursor | None]:
            where, values = ("WHERE node_id = ?", [node_id]) if node_id else ("", [])
            rows = await tx.all(f"SELECT {COUNTER_COLUMNS} FROM receipt_counters {where}", *values)
            chains = sorted(
                (row[3], row[4], row[1], row[2], bytes(row[0]), row)
                for row in rows
                if row[7] and period in (EVERY_PERIOD, row[3])
            )
            first = next((i for i, chain in enumerate(chains) if chain[4].hex() == at), 0)
            lines: list[Line] = []
            for chain, row in (entry[4:] for entry in chains[first:]):
                after = seq if chain.hex() == at else 0
                if not after:
                    if len(lines) >= PAGE_LEAVES:
                        return lines, ["chains", chain.hex(), 0]
                    lines.append(receipts_file.chain_line(rules.opening_of(counter_from(row))))
                while after < row[7]:
                    if after and len(lines) >= PAGE_LEAVES:
                        return lines, ["chains", chain.hex(), after]
                    after = await self._statements(tx, chain, after, with_salts, lines)
            return lines, None

        return await self._store.run(read)

    async def _statements(self, tx: Transaction, chain: bytes, after: int, with_salts: bool, lines: list[Line]) -> int:
        """Adds the next statement and its leaves; returns its seq."""
        row = await tx.one(
            "SELECT seq, statement, network_signature, node_signature, remark FROM receipt_statements "
            "WHERE chain = ? AND seq > ? ORDER BY seq LIMIT 1",
            *(chain, after),
        )
        assert row is not None, "every leaf is covered by a statement of its own settlement"
        leaves = await tx.all(
            "SELECT seq, leaf, salt FROM receipt_leaves WHERE chain = ? AND seq > ? AND seq <= ? ORDER BY seq",
            *(chain, after, row[0]),
        )
        for seq, leaf, salt in leaves:
            lines.append(
                receipts_file.leaf_line(seq, rules.leaf_from(bytes(leaf)), bytes(salt) if with_salts else None)
            )
        statement = rules.statement_from(bytes(row[1]))
        lines.append(
            receipts_file.statement_line(statement, self._signature(statement, bytes(row[2])), bytes(row[3]), row[4])
        )
        return int(row[0])

    def _signature(self, statement: Statement, kept: bytes) -> bytes:
        """Ours over a statement; made now where no node was sent it yet."""
        if kept or self._identity is None or self._identity.public != statement.network_key:
            return kept
        return rules.sign_as_network(self._identity, statement)

    # ------------------------------------------------------------ an account's leaves, with their proofs

    async def _entries(
        self, account_id: str, period: int, with_salts: bool, cursor: Cursor
    ) -> tuple[list[Line], Cursor | None]:
        _, start, seconds, chain, seq = cursor

        async def read(tx: Transaction) -> tuple[Row | None, list[Row]]:
            if start < 0 or not chain:
                row = await tx.one(
                    "SELECT c.period_start_seconds, c.period_seconds FROM receipt_leaves l "
                    "JOIN receipt_counters c ON c.chain = l.chain WHERE l.account_id = ? AND "
                    "(l.period_start_seconds > ? OR (l.period_start_seconds = ? AND c.period_seconds > ?)) "
                    "ORDER BY l.period_start_seconds, c.period_seconds LIMIT 1",
                    *(account_id, start, start, seconds),
                )
                if row is None:
                    return None, []
                its_start, its_seconds, after, after_seq = row[0], row[1], b"", 0
            else:
                its_start, its_seconds, after, after_seq = start, seconds, bytes.fromhex(chain), seq
            return (its_start, its_seconds), await tx.all(
                f"SELECT l.seq, l.leaf, l.salt, {_of_counter('c')} FROM receipt_leaves l "
                "JOIN receipt_counters c ON c.chain = l.chain "
                "WHERE l.account_id = ? AND l.period_start_seconds = ? AND c.period_seconds = ? "
                f"AND (l.chain > ? OR (l.chain = ? AND l.seq > ?)) ORDER BY l.chain, l.seq LIMIT {PAGE_LEAVES}",
                *(account_id, its_start, its_seconds, after, after, after_seq),
            )

        its, rows = await self._store.run(read)
        if its is None:
            return [], None
        lines: list[Line] = []
        if period in (EVERY_PERIOD, its[0]):
            places = await self._places(its[0], its[1])
            for row in rows:
                opening = rules.opening_of(counter_from(row[3:]))
                index = -1
                path: Sequence[bytes] = ()
                if places is not None:
                    index = places[bytes(row[3])] + row[0] - 1
                    assert self._tree is not None
                    path = self._tree[1].proof(index)
                leaf = rules.leaf_from(bytes(row[1]))
                lines.append(
                    receipts_file.entry_line(opening, row[0], leaf, index, path, bytes(row[2]) if with_salts else None)
                )
        if len(rows) == PAGE_LEAVES:
            return lines, ["entries", its[0], its[1], bytes(rows[-1][3]).hex(), rows[-1][0]]
        return lines, ["entries", its[0], its[1], "", 0]

    async def _places(self, start: int, seconds: int) -> dict[bytes, int] | None:
        """Where each chain of a closed period begins in its tree; None while the period is open."""

        async def read(tx: Transaction) -> tuple[bool, list[Row]]:
            closed = await tx.one(
                "SELECT leaves FROM period_roots WHERE period_start_seconds = ? AND period_seconds = ?",
                *(start, seconds),
            )
            return closed is not None, await tx.all(
                "SELECT node_id, class_id, chain, seq FROM receipt_counters "
                "WHERE period_start_seconds = ? AND period_seconds = ?",
                *(start, seconds),
            )

        closed, rows = await self._store.run(read)
        if not closed:
            return None
        if self._tree is None or self._tree[0] != (start, seconds):
            self._tree = (start, seconds), rules.MerkleTree(await period_entries(self._store, start, seconds))
        places, place = {}, 0
        for _, _, chain, count in sorted((row[0], row[1], bytes(row[2]), row[3]) for row in rows):
            places[chain] = place
            place += count
        return places

    # ------------------------------------------------------------ one work

    async def show(self, work_id: str) -> list[Line]:
        """All leaves of a work, or of an answer's works, each with the statement that covers it: plain JSON values."""

        async def read(tx: Transaction) -> list[Line]:
            shown: list[Line] = []
            for seq, leaf, salt, account_id, key_id, model, chain in await tx.all(
                "SELECT seq, leaf, salt, account_id, key_id, model, chain FROM receipt_leaves "
                "WHERE work_id = ? OR (work_id > ? AND work_id < ?) ORDER BY work_id, epoch",
                *rules.works_of(work_id),
            ):
                row = await tx.one(
                    "SELECT statement, network_signature, node_signature, remark FROM receipt_statements "
                    "WHERE chain = ? AND seq >= ? ORDER BY seq LIMIT 1",
                    *(bytes(chain), seq),
                )
                assert row is not None
                statement = rules.statement_from(bytes(row[0]))
                signature = self._signature(statement, bytes(row[1]))
                shown.append(
                    {
                        **receipts_file.chain_line(rules.opening_of(statement)),
                        **receipts_file.leaf_line(seq, rules.leaf_from(bytes(leaf)), bytes(salt)),
                        "account_id": account_id,
                        "key_id": key_id,
                        "model": model,
                        "statement": receipts_file.statement_line(statement, signature, bytes(row[2]), row[3]),
                    }
                )
            return shown

        return await self._store.run(read)


async def _key_of(tx: Transaction, node_id: str) -> bytes:
    """The key of a node that has receipts. Raises ControlError."""
    row = await tx.one("SELECT node_key FROM receipt_counters WHERE node_id = ? LIMIT 1", node_id)
    if row is None:
        raise ControlError(f"no node {node_id[:64]!r} has receipts here: `gridmill status` shows the nodes")
    return bytes(row[0])


def _of_counter(name: str) -> str:
    return ", ".join(f"{name}.{column}" for column in COUNTER_COLUMNS.split(", "))
