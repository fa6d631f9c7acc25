"""What this node is owed, in DATA/receipts.sqlite: works until they are receipted, and receipts signed by both sides.

1. A work is written down as it ends, before anybody asks. The file never raises a claim; it proves a settlement.
2. Nothing is countersigned that this file does not bear out, and nothing is sent that it does not hold: the answer to
   receipts leaves after the commit. What was not acknowledged is sent again after the next join.
3. One thread owns the file. The event loop hands things in and never waits for the disk; kill -9 loses what was not
   yet committed, for which the network's word is taken (`no_record`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from gridmill.wire import receipts as rules
from gridmill.wire import receipts_file
from gridmill.wire.codec import STATEMENTS_MAX
from gridmill.wire.identity import Identity
from gridmill.wire.messages import (
    Acknowledged,
    Countersignature,
    Countersigned,
    Leaf,
    Price,
    Receipts,
    SignedStatement,
    Statement,
)

log = logging.getLogger("gridmill.node.receipts")

SCHEMA = """
CREATE TABLE IF NOT EXISTS works (
    network_key BLOB NOT NULL,
    work_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    class_id TEXT NOT NULL,
    price BLOB NOT NULL,
    salt BLOB NOT NULL,
    prompt_hash BLOB NOT NULL,
    input_tokens INTEGER NOT NULL,
    start INTEGER NOT NULL,
    ids BLOB NOT NULL,
    kept INTEGER NOT NULL,
    claim BLOB NOT NULL,
    ended_seconds INTEGER NOT NULL,
    PRIMARY KEY (network_key, work_id, epoch)
);
CREATE TABLE IF NOT EXISTS chains (
    chain BLOB NOT NULL PRIMARY KEY,
    network_key BLOB NOT NULL,
    class_id TEXT NOT NULL,
    period_start_seconds INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    acknowledged_seq INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS statements (
    chain BLOB NOT NULL,
    seq INTEGER NOT NULL,
    first_seq INTEGER NOT NULL,
    statement BLOB NOT NULL,
    network_signature BLOB NOT NULL,
    node_signature BLOB NOT NULL,
    remark TEXT NOT NULL,
    PRIMARY KEY (chain, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leaves (
    chain BLOB NOT NULL,
    seq INTEGER NOT NULL,
    network_key BLOB NOT NULL,
    work_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    leaf BLOB NOT NULL,
    salt BLOB NOT NULL,
    PRIMARY KEY (chain, seq)
);
CREATE INDEX IF NOT EXISTS leaves_by_work ON leaves (work_id, epoch);
"""

SCHEMA_VERSION = 1
WAITING_MAX = 256  # groups of works, and answers, that wait for a disk that hangs
GROUP_MAX = 256  # in one commit
RECORD_SECONDS = 0.05  # what kill -9 may take; the network's journal is as old
WORKS_KEPT_SECONDS = 30 * 86_400  # a network that has not settled a work by then never will
NO_RECORD, MISSING = "no_record", "missing"  # the remarks that have a meaning for the network
DISPUTES_REMEMBERED = 1000


class OutboxUnusable(Exception):
    """The file cannot be used; the sentence says what to do."""


class Ended(msgspec.Struct, frozen=True):
    """A work as this node saw it. `ids` are all that were sent, packed; the first `kept` of them count.

    `input_tokens` is how many the node was given to read: the prompt and what was delivered before.
    """

    network_key: bytes
    work_id: str
    epoch: int
    class_id: str
    price: Price
    salt: bytes
    prompt: bytes
    input_tokens: int
    start: int
    ids: bytes
    kept: int
    claim: bytes


_Task = tuple[Callable[[sqlite3.Connection], Any], Future[Any] | None]


class Outbox:
    """One file, one thread. `identity` is the node's; `wall_clock` is Unix seconds."""

    def __init__(self, path: Path, identity: Identity, *, wall_clock: Callable[[], float]) -> None:
        self._path = path
        self._identity = identity
        self._wall_clock = wall_clock
        self._inbox: queue.Queue[_Task | None] = queue.Queue(maxsize=WAITING_MAX)
        self._thread: threading.Thread | None = None
        self._ended: list[Ended] = []  # works that wait to be written down together
        self._writing_soon: asyncio.TimerHandle | None = None
        self._disputed: set[bytes] = set()  # statements that were logged
        self.records_lost = 0

    def open(self) -> None:
        """Raises OutboxUnusable."""
        try:
            connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA busy_timeout = 5000")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version > SCHEMA_VERSION:
                    raise OutboxUnusable(f"{self._path} was written by a newer Gridmill: upgrade this one")
                connection.executescript(SCHEMA)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute(
                    "DELETE FROM works WHERE ended_seconds < ?", (int(self._wall_clock()) - WORKS_KEPT_SECONDS,)
                )
            except BaseException:
                connection.close()
                raise
        except sqlite3.Error as problem:
            raise OutboxUnusable(
                f"{self._path} cannot be used ({problem}): it holds what networks owe this node, so keep a copy, then "
                "move it away"
            ) from problem
        self._path.chmod(0o600)
        self._thread = threading.Thread(target=self._run, args=(connection,), name="gridmill-receipts", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Writes what was handed in, then closes. Safe to call twice."""
        self._write_works()
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(self._inbox.put, None)
            await asyncio.to_thread(thread.join)

    def claim(self, work_id: str, epoch: int, class_id: str, output_hash: bytes) -> bytes:
        """This node's signature over an output. Engines commit to nothing yet."""
        return self._identity.sign(rules.claim_bytes(work_id, epoch, class_id, output_hash, b""))

    def record(self, ended: Ended) -> None:
        """Has a work written down, with those that end within the same moment: each commit costs a flush of the disk
        and a hand-over between threads. Never waits: under a disk that hangs the record is lost, and counted."""
        self._ended.append(ended)
        if len(self._ended) >= GROUP_MAX:
            self._write_works()
        elif self._writing_soon is None:
            self._writing_soon = asyncio.get_running_loop().call_later(RECORD_SECONDS, self._write_works)

    def _write_works(self) -> None:
        if self._writing_soon is not None:
            self._writing_soon.cancel()
            self._writing_soon = None
        ended, self._ended = self._ended, []
        if ended and not self._hand_in(lambda connection: self._record(connection, ended), None):
            self.records_lost += len(ended)
            log.warning("%d works could not be recorded: over %d wait for the disk", len(ended), WAITING_MAX)

    async def answer(self, network_key: bytes, receipts: Receipts) -> Countersigned | None:
        """What this node says to receipts, after that is on disk. None when the disk does not keep up: they come again
        after the next join."""
        self._write_works()  # what is being receipted may have ended just now
        said: tuple[Countersignature, ...] | None = await self._ask(
            lambda connection: tuple(self._judge(connection, network_key, signed) for signed in receipts.statements)
        )
        return Countersigned(said) if said else None

    async def unacknowledged(self, network_key: bytes) -> list[Countersigned]:
        """The last countersignature of each chain that the network has not said to have."""
        self._write_works()
        found: list[Countersignature] | None = await self._ask(
            lambda connection: _unacknowledged(connection, network_key)
        )
        entries = tuple(found or ())
        return [Countersigned(entries[at : at + STATEMENTS_MAX]) for at in range(0, len(entries), STATEMENTS_MAX)]

    def acknowledged(self, network_key: bytes, message: Acknowledged) -> None:
        """The network has these. A note that is lost only makes for one more repetition."""
        self._hand_in(lambda connection: _acknowledge(connection, network_key, message), None)

    # ------------------------------------------------------------ the thread

    def _hand_in(self, task: Callable[[sqlite3.Connection], Any], future: Future[Any] | None) -> bool:
        try:
            self._inbox.put_nowait((task, future))
        except queue.Full:
            return False
        return True

    async def _ask(self, task: Callable[[sqlite3.Connection], Any]) -> Any:
        future: Future[Any] = Future()
        return await asyncio.wrap_future(future) if self._hand_in(task, future) else None

    def _run(self, connection: sqlite3.Connection) -> None:
        try:
            ended = False
            while not ended:
                group = [self._inbox.get()]
                while len(group) < GROUP_MAX and group[-1] is not None:
                    try:
                        group.append(self._inbox.get_nowait())
                    except queue.Empty:
                        break
                if group[-1] is None:
                    ended = True
                self._commit(connection, [entry for entry in group if entry is not None])
        finally:
            connection.close()

    def _commit(self, connection: sqlite3.Connection, group: Sequence[_Task]) -> None:
        """Every future ends here, whatever the disk does: None says that nothing of this was kept."""
        done: list[tuple[Future[Any], Any]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for task, future in group:
                connection.execute("SAVEPOINT one")
                try:
                    result = task(connection)
                except sqlite3.Error:
                    raise
                except Exception:  # a bug of ours undoes its own task alone: a thread that died would hold up all
                    log.exception("a receipt could not be dealt with")
                    connection.execute("ROLLBACK TO one")
                    result = None
                connection.execute("RELEASE one")
                if future is not None:
                    done.append((future, result))
            connection.execute("COMMIT")
        except sqlite3.Error as problem:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            log.error("%s could not be written (%s): receipts wait until it can", self._path, problem)
            done = [(future, None) for _, future in group if future is not None]
        for future, result in done:
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    # ------------------------------------------------------------ works

    def _record(self, connection: sqlite3.Connection, ended: Sequence[Ended]) -> None:
        moment = int(self._wall_clock())
        connection.executemany(
            "INSERT OR REPLACE INTO works VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    *(work.network_key, work.work_id, work.epoch, work.class_id, msgspec.msgpack.encode(work.price)),
                    *(work.salt, rules.ids_hash(work.salt, work.prompt), work.input_tokens, work.start, work.ids),
                    *(work.kept, work.claim, moment),
                )
                for work in ended
            ],
        )

    # ------------------------------------------------------------ statements

    def _judge(self, connection: sqlite3.Connection, network_key: bytes, signed: SignedStatement) -> Countersignature:
        """Checks one statement against everything this node knows, and signs it or says why not."""
        said = signed.statement
        name = (said.class_id, said.period_start_seconds, said.seq)
        problem = self._foreign(network_key, signed)
        if problem is not None:
            return self._disputes(None, signed, problem)
        chain = rules.opening_of(said).head
        packed = rules.statement_bytes(said)
        known = connection.execute(
            "SELECT statement, node_signature, remark FROM statements WHERE chain = ? AND seq = ?", (chain, said.seq)
        ).fetchone()
        if known is not None and known[1]:
            if known[0] == packed:
                return Countersignature(*name, known[1], known[2])
            return self._disputes(None, signed, f"this node has signed another statement with seq {said.seq}")
        before = _statement_before(connection, chain, signed)
        if (
            before is None
            and connection.execute("SELECT 1 FROM statements WHERE chain = ? LIMIT 1", (chain,)).fetchone()
        ):
            return Countersignature(*name, b"", MISSING)  # also after a dispute: what follows it stands on it
        problem = _totals_problem(before, signed)
        unrecorded: list[str] = []
        salts: list[bytes] = []
        first_seq = said.seq - len(signed.leaves) + 1
        seen: set[tuple[str, int]] = set()
        for seq, leaf in enumerate(signed.leaves, first_seq):
            if problem is None and (leaf.work_id, leaf.epoch) in seen:
                problem = f"work {leaf.work_id} is in it twice"
            seen.add((leaf.work_id, leaf.epoch))
            if problem is None:
                problem = self._leaf_problem(connection, said, chain, seq, leaf, unrecorded, salts)
        if problem is not None:
            return self._disputes(connection, signed, problem)
        remark = NO_RECORD if unrecorded or before is None else ""
        if remark:
            log.warning(
                "the network's word is taken for what this node has no record of",
                extra={"class": said.class_id[:8], "seq": said.seq, "works": ", ".join(unrecorded[:5])},
            )
        signature = rules.sign_as_node(self._identity, said)
        connection.execute(
            "INSERT OR REPLACE INTO statements VALUES (?, ?, ?, ?, ?, ?, ?)",
            (chain, said.seq, first_seq, packed, signed.signature, signature, remark),
        )
        connection.executemany(
            "INSERT OR REPLACE INTO leaves VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (chain, seq, network_key, leaf.work_id, leaf.epoch, rules.leaf_bytes(leaf), salt)
                for (seq, leaf), salt in zip(enumerate(signed.leaves, first_seq), salts, strict=True)
            ],
        )
        connection.executemany(
            "DELETE FROM works WHERE network_key = ? AND work_id = ? AND epoch = ?",
            [(network_key, leaf.work_id, leaf.epoch) for leaf in signed.leaves],
        )
        connection.execute(
            "INSERT INTO chains VALUES (?, ?, ?, ?, ?, 0) "
            "ON CONFLICT (chain) DO UPDATE SET seq = max(seq, excluded.seq)",
            (chain, network_key, said.class_id, said.period_start_seconds, said.seq),
        )
        return Countersignature(*name, signature, remark)

    def _foreign(self, network_key: bytes, signed: SignedStatement) -> str | None:
        if signed.statement.network_key != network_key:
            return "it is in the name of another network"
        if signed.statement.node_key != self._identity.public:
            return "it is about another node"
        if not rules.signed_by_network(signed.statement, signed.signature):
            return "the network's signature is not over it"
        return None

    def _leaf_problem(
        self,
        connection: sqlite3.Connection,
        said: Statement,
        chain: bytes,
        seq: int,
        leaf: Leaf,
        unrecorded: list[str],
        salts: list[bytes],
    ) -> str | None:
        """What is wrong with one leaf. Adds its salt to `salts`, and its work to `unrecorded` where there is none."""
        for other_chain, other_seq, packed, salt in connection.execute(
            "SELECT chain, seq, leaf, salt FROM leaves WHERE work_id = ? AND epoch = ? AND network_key = ?",
            (leaf.work_id, leaf.epoch, said.network_key),
        ):
            if (other_chain, other_seq) != (chain, seq) or packed != rules.leaf_bytes(leaf):
                return f"work {leaf.work_id} was receipted before, as leaf {other_seq}"
            salts.append(salt)
            return None
        work = connection.execute(
            "SELECT class_id, price, salt, prompt_hash, input_tokens, start, ids, claim FROM works "
            "WHERE network_key = ? AND work_id = ? AND epoch = ?",
            (said.network_key, leaf.work_id, leaf.epoch),
        ).fetchone()
        if work is None:
            unrecorded.append(leaf.work_id)
            salts.append(b"")
            problem = rules.leaf_problem(leaf)
        else:
            salts.append(work[2])
            problem = _work_problem(work, said.class_id, leaf)
        return f"leaf {seq} (work {leaf.work_id}) {problem}" if problem is not None else None

    def _disputes(
        self, connection: sqlite3.Connection | None, signed: SignedStatement, problem: str
    ) -> Countersignature:
        """Says no, once in the log; what this node may have to show later it keeps."""
        said = signed.statement
        if signed.signature not in self._disputed and len(self._disputed) < DISPUTES_REMEMBERED:
            self._disputed.add(signed.signature)
            log.warning(
                "this node disputes a receipt: %s",
                problem,
                extra={"class": said.class_id[:8], "seq": said.seq, "network": said.network_key.hex()[:16]},
            )
        if connection is not None:
            connection.execute(
                "INSERT OR REPLACE INTO statements VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(rules.opening_of(said).head, said.seq, said.seq - len(signed.leaves) + 1),
                    *(rules.statement_bytes(said), signed.signature, b"", problem),
                ),
            )
        return Countersignature(said.class_id, said.period_start_seconds, said.seq, b"", problem)


# ---------------------------------------------------------------- what a statement must be


def _statement_before(connection: sqlite3.Connection, chain: bytes, signed: SignedStatement) -> Statement | None:
    """What this node signed just before these leaves; the opening before the first; None when it does not know."""
    seq = signed.statement.seq - len(signed.leaves)
    if seq <= 0:
        return rules.opening_of(signed.statement)
    row = connection.execute(
        "SELECT statement FROM statements WHERE chain = ? AND seq = ? AND length(node_signature) > 0", (chain, seq)
    ).fetchone()
    return rules.statement_from(row[0]) if row is not None else None


def _totals_problem(before: Statement | None, signed: SignedStatement) -> str | None:
    if not signed.leaves or signed.statement.seq < len(signed.leaves):
        return "its leaves are not those up to its seq"
    if before is not None:
        return rules.difference(rules.advance(before, signed.leaves), signed.statement)
    # This node lost what it had signed of this chain, so it can only see that the totals hold at least these leaves.
    least = rules.advance(rules.opening_of(signed.statement), signed.leaves)
    for name in ("input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits"):
        if getattr(signed.statement, name) < getattr(least, name):
            return f"its {name} are less than those of its leaves"
    return None


def _work_problem(work: tuple[Any, ...], class_id: str, leaf: Leaf) -> str | None:
    """Where a leaf differs from what this node wrote down of the work."""
    work_class, packed_price, salt, prompt_hash, input_tokens, start, ids, claim = work
    price = msgspec.msgpack.decode(packed_price, type=Price)
    if work_class != class_id:
        return "is in the books of another class"
    if leaf.price != price:
        return f"has a price that this node did not work for: {_shown(leaf.price)} instead of {_shown(price)}"
    if leaf.prompt_hash != prompt_hash:
        return "has another prompt"
    if leaf.start != start:
        return f"begins at position {leaf.start} instead of {start}"
    if leaf.input_tokens > input_tokens:
        return f"counts {leaf.input_tokens} input tokens, but this node was given {input_tokens}"
    if leaf.cached_tokens > leaf.input_tokens:
        return f"counts {leaf.cached_tokens} cached of {leaf.input_tokens} input tokens"
    if leaf.output_tokens > len(ids) // 4:
        return f"counts {leaf.output_tokens} output tokens, but this node sent {len(ids) // 4}"
    if leaf.output_hash != rules.ids_hash(salt, ids[: 4 * leaf.output_tokens]):
        return f"is not over the first {leaf.output_tokens} ids that this node sent"
    if leaf.claim and (leaf.claim != claim or leaf.commit_root):
        return "carries a claim that this node did not make"
    if leaf.replayed_tokens > input_tokens:
        return f"counts {leaf.replayed_tokens} tokens read again, but this node was given {input_tokens}"
    pay = rules.pay_of(price, leaf.input_tokens, leaf.cached_tokens, leaf.output_tokens, leaf.replayed_tokens)
    if leaf.pay_nanocredits != pay:
        return f"pays {leaf.pay_nanocredits} nanocredits, but its tokens at its price make {pay}"
    return None


def _shown(price: Price) -> str:
    return f"{price.input_nanocredits}/{price.cached_input_nanocredits}/{price.output_nanocredits}"


# ---------------------------------------------------------------- what the network has


def _unacknowledged(connection: sqlite3.Connection, network_key: bytes) -> list[Countersignature]:
    rows = connection.execute(
        "SELECT c.class_id, c.period_start_seconds, c.seq, s.node_signature, s.remark FROM chains c "
        "JOIN statements s ON s.chain = c.chain AND s.seq = c.seq "
        "WHERE c.network_key = ? AND c.acknowledged_seq < c.seq ORDER BY c.period_start_seconds, c.class_id",
        (network_key,),
    )
    return [Countersignature(*row) for row in rows]


def _acknowledge(connection: sqlite3.Connection, network_key: bytes, message: Acknowledged) -> None:
    connection.executemany(
        "UPDATE chains SET acknowledged_seq = ? "
        "WHERE network_key = ? AND class_id = ? AND period_start_seconds = ? AND acknowledged_seq < ?",
        [(seq, network_key, class_id, start, seq) for class_id, start, seq in message.statements],
    )


# ---------------------------------------------------------------- reading, also while the node runs


def export(path: Path, *, period: int = receipts_file.EVERY_PERIOD, with_salts: bool = False) -> Iterator[Any]:
    """The lines of a file of all that both sides have signed, and of what this node disputes. Raises OutboxUnusable."""
    with _reading(path) as connection:
        chains = connection.execute(
            "SELECT DISTINCT chain FROM statements ORDER BY chain",
        ).fetchall()
        openings = []
        for (chain,) in chains:
            (packed,) = connection.execute(
                "SELECT statement FROM statements WHERE chain = ? LIMIT 1", (chain,)
            ).fetchone()
            openings.append((rules.opening_of(rules.statement_from(packed)), chain))
        networks = {opening.network_key for opening, _ in openings}
        yield receipts_file.header(
            by="node",
            network_key=networks.pop() if len(networks) == 1 else b"",
            node_key=openings[0][0].node_key if openings else b"",
            period=period,
        )
        for opening, chain in sorted(openings, key=lambda pair: (pair[0].period_start_seconds, pair[0].class_id)):
            if period in (receipts_file.EVERY_PERIOD, opening.period_start_seconds):
                yield receipts_file.chain_line(opening)
                yield from _chain_lines(connection, chain, with_salts)


def _chain_lines(connection: sqlite3.Connection, chain: bytes, with_salts: bool) -> Iterator[Any]:
    for seq, first_seq, packed, network_signature, node_signature, remark in connection.execute(
        "SELECT seq, first_seq, statement, network_signature, node_signature, remark FROM statements "
        "WHERE chain = ? ORDER BY seq",
        (chain,),
    ):
        statement = rules.statement_from(packed)
        if not node_signature:
            yield receipts_file.dispute_line(statement, network_signature, remark)
            continue
        for number, leaf, salt in connection.execute(
            "SELECT seq, leaf, salt FROM leaves WHERE chain = ? AND seq >= ? AND seq <= ? ORDER BY seq",
            (chain, first_seq, seq),
        ):
            yield receipts_file.leaf_line(number, rules.leaf_from(leaf), salt if with_salts else None)
        yield receipts_file.statement_line(statement, network_signature, node_signature, remark)


def show(path: Path, work_id: str) -> list[dict[str, Any]]:
    """All leaves of a work, or of an answer's works, with the statements that cover them, and what waits for a receipt.

    Raises OutboxUnusable."""
    shown: list[dict[str, Any]] = []
    with _reading(path) as connection:
        for chain, seq, packed, salt in connection.execute(
            "SELECT chain, seq, leaf, salt FROM leaves WHERE work_id = ? OR (work_id > ? AND work_id < ?) "
            "ORDER BY work_id, epoch",
            rules.works_of(work_id),
        ).fetchall():
            row = connection.execute(
                "SELECT statement, network_signature, node_signature, remark FROM statements "
                "WHERE chain = ? AND seq >= ? AND length(node_signature) > 0 ORDER BY seq LIMIT 1",
                (chain, seq),
            ).fetchone()
            statement = rules.statement_from(row[0])
            shown.append(
                {
                    **receipts_file.chain_line(rules.opening_of(statement)),
                    **receipts_file.leaf_line(seq, rules.leaf_from(packed), salt),
                    "statement": receipts_file.statement_line(statement, *row[1:]),
                }
            )
        for name, epoch, class_id, input_tokens, sent, kept in connection.execute(
            "SELECT work_id, epoch, class_id, input_tokens, length(ids) / 4, kept FROM works "
            "WHERE work_id = ? OR (work_id > ? AND work_id < ?) ORDER BY work_id, epoch",
            rules.works_of(work_id),
        ):
            shown.append(
                {
                    "kind": "waiting",
                    "work_id": name,
                    "epoch": epoch,
                    "class_id": class_id,
                    "input_tokens": input_tokens,
                    "sent_tokens": sent,
                    "claimed_tokens": kept,
                }
            )
    return shown


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            connection.execute("PRAGMA busy_timeout = 5000")
            connection.execute("BEGIN")  # one view of it all, whatever the node writes meanwhile
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as problem:
        raise OutboxUnusable(f"{path} cannot be read: {problem}") from problem
