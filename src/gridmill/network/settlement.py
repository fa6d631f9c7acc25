"""What one transaction of the books carries: settlements of works, commands to the ledger, and the journal's rows.

Posts, receipts, usage and kept answers of a work are written together or not at all. A journalled work belongs to
whoever finds its row in open_works: it is deleted in the transaction that settles it, so that nobody settles twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NewType

import msgspec

from gridmill.network import ledger, receipts, usage
from gridmill.network.ledger import Command, Pend, Refused, Result, Transfer
from gridmill.network.metering import Charge, PriceRow, Usage, share
from gridmill.network.store import Transaction
from gridmill.wire.messages import Leaf

GatewayId = NewType("GatewayId", str)
Finish = Literal["stop", "length", "cancelled", "failed", "lost", "moved"]

MIGRATION = """
CREATE TABLE open_works (
    work_id TEXT PRIMARY KEY,
    epoch BIGINT NOT NULL,
    holder TEXT NOT NULL,
    hold_id TEXT NOT NULL,
    account_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    node_id TEXT NOT NULL,
    node_key BLOB NOT NULL,
    owner_id TEXT NOT NULL,
    class_id TEXT NOT NULL,
    price TEXT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    prompt_hash BLOB NOT NULL,
    output_hash BLOB NOT NULL,
    salt BLOB NOT NULL,
    start BIGINT NOT NULL,
    started_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    kept_ids BLOB
);
CREATE INDEX open_works_by_holder ON open_works (holder);
CREATE INDEX open_works_by_expiry ON open_works (expires_ms);
CREATE TABLE work_answers (
    work_id TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    start BIGINT NOT NULL,
    ids BLOB NOT NULL,
    scores BLOB,
    finish TEXT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    charge_nanocredits BIGINT NOT NULL,
    node_id TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (work_id, epoch)
);
CREATE INDEX work_answers_by_age ON work_answers (at_ms);
CREATE TABLE network_key (
    one BIGINT PRIMARY KEY CHECK (one = 1),
    key BLOB NOT NULL
);
CREATE TABLE book_batches (
    holder TEXT PRIMARY KEY,
    batch_id TEXT NOT NULL
);
CREATE TABLE lease_fences (
    source TEXT PRIMARY KEY,
    fence BIGINT NOT NULL
);
"""

PARTS_MIGRATION = """
ALTER TABLE open_works ADD COLUMN journal BLOB;
"""

COLUMNS = (
    *("work_id", "epoch", "holder", "hold_id", "account_id", "key_id", "model", "node_id", "node_key", "owner_id"),
    *("class_id", "price", "input_tokens", "cached_tokens", "output_tokens", "prompt_hash", "output_hash", "salt"),
    *("start", "started_ms", "expires_ms", "kept_ids", "journal"),
)


class Payer(msgspec.Struct, frozen=True):
    """Who pays. `key_id` decides which slice is used only when that key has a budget of its own."""

    account_id: str
    key_id: str
    has_budget: bool = False


class Server(msgspec.Struct, frozen=True):
    """Who serves a work, and at which price."""

    node_id: str
    node_key: bytes
    owner_id: str
    row: PriceRow


class Gateway(msgspec.Struct, frozen=True):
    """Who writes. `holder` is this gateway's name in the journal and on its leases."""

    holder: GatewayId
    network_key: bytes
    period_seconds: int
    lease_seconds: float


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one node did of a work: `start` is the output position of its first id, `used` what the user pays for.

    `replayed_tokens` are ids that it had to read again, promised out of the failover reserve.
    """

    epoch: int
    start: int
    server: Server
    used: Usage
    replayed_tokens: int
    output_hash: bytes
    started_ms: int
    ended_ms: int
    finish: Finish
    commit_root: bytes = b""
    claim: bytes = b""


class Journal(msgspec.Struct, frozen=True, array_like=True):
    """What a row in open_works says besides the node that serves it now: the user's price, and the parts before.

    `pays_input`: the part that is under way is the one that reads the prompt for the user's money.
    """

    terms: PriceRow
    parts: tuple[Part, ...]
    pays_input: bool
    replayed_tokens: int
    run_start: int


class Job(msgspec.Struct, frozen=True):
    """What all parts of a work have in common. `hold_id`: what a journalled work is paid from, if it costs anything."""

    work_id: str
    payer: Payer
    model: str
    class_id: str
    salt: bytes
    prompt_hash: bytes
    lease_id: str
    hold_id: str
    journalled: bool
    run_start: int


class Settlement(msgspec.Struct, frozen=True):
    """What one part of a work came to. `journalled`: there is a row in open_works, and who finds it settles.

    The last part `closes` the hold and counts as the request, unless nothing was used at all.
    """

    work_id: str
    epoch: int
    journalled: bool
    lease_id: str
    hold_id: str
    closes: bool
    requests: int
    payer: Payer
    model: str
    class_id: str
    server: Server
    salt: bytes
    leaf: Leaf
    cost: Charge
    kept_ids: bytes | None = None
    scores: bytes | None = None


class Written(msgspec.Struct):
    """What came of a batch: results in the order of its commands, receipts to sign, works whose hold was refused."""

    results: list[Result] = []
    unsigned: list[receipts.Unsigned] = []
    unbacked: list[str] = []
    lost_nanocredits: int = 0


class Batch:
    """What one transaction carries: commands in order, journal rows, then settlements. May be written again."""

    def __init__(
        self,
        gateway: Gateway,
        batch_id: str,
        commands: Sequence[Command],
        settlements: Sequence[Callable[[], Sequence[Settlement]]],
        opened: Sequence[tuple[Any, ...]],
        holds: Sequence[tuple[int, str]],
        counted: Sequence[tuple[int, bytes, bytes | None, str]],
        moved: Sequence[tuple[Any, ...]],
        announcements: Sequence[tuple[str, str]],
    ) -> None:
        self._batch_id = batch_id
        self._gateway = gateway
        self._commands = commands
        self._entries = settlements
        self._opened = opened
        self._holds = holds
        self._counted = counted
        self._moved = moved
        self._announcements = announcements

    async def write(self, transaction: Transaction) -> Written:
        gateway = self._gateway
        written = Written([], [], [])
        commands = self._commands
        fresh = await transaction.do(
            "INSERT INTO book_batches (holder, batch_id) VALUES (?, ?)"
            " ON CONFLICT (holder) DO UPDATE SET batch_id = excluded.batch_id WHERE book_batches.batch_id <> ?",
            gateway.holder,
            self._batch_id,
            self._batch_id,
        )
        if not fresh:
            # This very batch was kept although its commit seemed to fail; the ledger tells again what came of it.
            written.results = await ledger.apply(transaction, commands)
            for node_id in sorted({s.server.node_id for entry in self._entries for s in entry()}):
                await transaction.announce("receipts", node_id)
            return written
        # Settlements first: what they return to a lease may be what the commands and the new holds take from it.
        settlements = [settlement for entry in self._entries for settlement in entry()]
        settled = await settle(
            transaction, gateway.network_key, gateway.period_seconds, settlements, holder=gateway.holder
        )
        written.unsigned, written.lost_nanocredits = settled.unsigned, settled.lost_nanocredits
        if commands:
            written.results = await ledger.apply(transaction, commands)
        if self._opened:
            await self._open(transaction, written)
        if self._counted:
            await transaction.do_many(
                "UPDATE open_works SET output_tokens = ?, output_hash = ?, kept_ids = ?"
                " WHERE work_id = ? AND holder = ?",
                [(*row, gateway.holder) for row in self._counted],
            )
        if self._moved:
            assignments = ", ".join(f"{column} = ?" for column in MOVED_COLUMNS)
            await transaction.do_many(
                f"UPDATE open_works SET {assignments} WHERE work_id = ? AND holder = ?",
                [(*row, gateway.holder) for row in self._moved],
            )
        for topic, subject in self._announcements:
            await transaction.announce(topic, subject)
        return written

    async def _open(self, transaction: Transaction, written: Written) -> None:
        expires_ms = await transaction.now_ms() + int(self._gateway.lease_seconds * 1000)
        pends: list[Command] = []
        rows: list[tuple[Any, ...]] = []
        known = await transaction.among(
            "SELECT work_id FROM open_works WHERE work_id IN (??)", sorted(row[0] for row in self._opened)
        )
        taken = {row[0] for row in known}
        for row, (amount, lease_id) in zip(self._opened, self._holds, strict=True):
            if row[0] in taken:
                continue  # Another gateway thought this one dead and has taken the work over: it settles it.
            rows.append((*row[:-3], expires_ms, *row[-2:]))
            if amount:
                hold = ledger.user_hold(row[4])
                pends.append(
                    Pend(row[3], "hold", hold, "escrow:request", amount, expires_ms, parent=lease_id, holder=row[2])
                )
        results = await ledger.apply(transaction, pends) if pends else []
        for pend, result in zip(pends, results, strict=True):
            if isinstance(result, Refused):
                written.unbacked.append(pend.transfer_id)  # type: ignore[union-attr]
        await transaction.append("open_works", COLUMNS, rows)


async def settle(
    transaction: Transaction,
    network_key: bytes,
    period_seconds: int,
    settlements: Sequence[Settlement],
    *,
    holder: str = "",
) -> Written:
    """Posts, receipts and usage of ended works, together. A journalled work whose row is gone was settled by others."""
    written = Written([], [], [])
    if not settlements:
        return written
    journalled = sorted(s.work_id for s in settlements if s.journalled)
    if journalled:
        rows = await transaction.among(
            "SELECT work_id, holder FROM open_works WHERE work_id IN (??)", journalled, lock=True
        )
        ours = {row[0] for row in rows if not holder or row[1] == holder}
        settlements = [s for s in settlements if not s.journalled or s.work_id in ours]
        await transaction.do_many("DELETE FROM open_works WHERE work_id = ?", [(work_id,) for work_id in sorted(ours)])
    paid = [s for s in settlements if s.leaf.charge_nanocredits or (s.closes and s.hold_id)]
    results = await ledger.apply(transaction, [_post(s) for s in paid])
    late: list[Settlement] = []
    for settlement, result in zip(paid, results, strict=True):
        # A conflict is none of ours: this part of this work was paid before, with another count.
        if isinstance(result, Refused) and result.reason != "conflict":
            late.append(settlement)
    if late:
        # The lease ended while its gateway stood still. The user keeps the money, the node gets its pay all the same.
        await ledger.apply(transaction, [_write_off(s) for s in late if s.cost.node])
        written.lost_nanocredits = sum(s.cost.node for s in late)
        lost = {(s.work_id, s.epoch) for s in late}
        unpaid = {"charge_nanocredits": 0}
        settlements = [
            msgspec.structs.replace(s, leaf=msgspec.structs.replace(s.leaf, **unpaid))
            if (s.work_id, s.epoch) in lost
            else s
            for s in settlements
        ]
    subsidised = [s for s in settlements if s.cost.subsidy]
    if subsidised:
        # The reserve of this very moment; it has its share of the works above.
        granted = await ledger.apply(transaction, [_subsidy(s, "failover:reserve") for s in subsidised])
        unfunded = [s for s, result in zip(subsidised, granted, strict=True) if _lacks(result)]
        if unfunded:
            # Two gateways promised the same money at once. A promise to a node is kept.
            await ledger.apply(transaction, [_subsidy(s, "loss") for s in unfunded])
            written.lost_nanocredits += sum(s.cost.subsidy for s in unfunded)
    await usage.add(
        transaction,
        [
            usage.UsageRow(
                s.payer.account_id,
                s.payer.key_id,
                s.model,
                s.leaf.ended_ms // 86_400_000,
                s.requests,
                s.leaf.input_tokens,
                s.leaf.cached_tokens,
                s.leaf.output_tokens,
                s.leaf.charge_nanocredits,
            )
            for s in settlements
        ],
    )
    at_ms = await transaction.now_ms()
    answers = [
        (
            *(s.work_id, s.epoch, s.leaf.start, s.kept_ids, s.scores, s.leaf.finish, s.leaf.input_tokens),
            *(s.leaf.cached_tokens, s.leaf.charge_nanocredits, s.server.node_id, at_ms),
        )
        for s in settlements
        if s.kept_ids is not None
    ]
    if answers:
        await transaction.do_many(
            "INSERT INTO work_answers (work_id, epoch, start, ids, scores, finish, input_tokens, cached_tokens,"
            " charge_nanocredits, node_id, at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            answers,
        )
    written.unsigned = await receipts.settle(
        transaction,
        network_key,
        [
            receipts.Segment(
                s.server.node_id,
                s.server.node_key,
                s.class_id,
                s.leaf,
                s.salt,
                s.payer.account_id,
                s.payer.key_id,
                s.model,
            )
            for s in settlements
            if s.leaf.input_tokens or s.leaf.output_tokens or s.leaf.pay_nanocredits
        ],
        at_ms,
        period_seconds,
    )
    return written


def _post(settlement: Settlement) -> Command:
    return ledger.settlement(
        settlement.work_id,
        settlement.epoch,
        settlement.hold_id if settlement.journalled else settlement.lease_id,
        settlement.cost,
        settlement.server.owner_id,
        close=settlement.journalled and settlement.closes,
    )


def _write_off(settlement: Settlement) -> Command:
    pay = settlement.cost.node
    return Transfer(
        ledger.settlement_id(settlement.work_id, settlement.epoch) + ledger.LOSS_SUFFIX,
        "loss",
        (("loss", -pay), (ledger.provider_held(settlement.server.owner_id), pay)),
        memo="settled after its lease had ended",
    )


def _subsidy(settlement: Settlement, source: str) -> Command:
    amount = settlement.cost.subsidy
    return Transfer(
        ledger.settlement_id(settlement.work_id, settlement.epoch) + ledger.RESERVE_SUFFIX,
        "reserve",
        ((source, -amount), (ledger.provider_held(settlement.server.owner_id), amount)),
        memo="for going on with what another node had left",
    )


def _lacks(result: Result) -> bool:
    return isinstance(result, Refused) and result.reason != "conflict"


def hold_id_of(work_id: str, epoch: int) -> str:
    return f"hold:{work_id}:{epoch}"


def encode_row(row: PriceRow) -> str:
    return msgspec.json.encode(row).decode()


MOVED_COLUMNS = (
    *("epoch", "node_id", "node_key", "owner_id", "price", "cached_tokens", "output_tokens", "output_hash"),
    *("start", "started_ms", "kept_ids", "journal"),
)
_ENCODER = msgspec.msgpack.Encoder()
_JOURNALS = msgspec.msgpack.Decoder(Journal)


def encode_journal(journal: Journal) -> bytes:
    return _ENCODER.encode(journal)


def costs_of(terms: PriceRow, parts: Sequence[Part]) -> list[Charge]:
    """What each part comes to; their totals are what the whole would have cost in one piece."""
    costs: list[Charge] = []
    before = Usage()
    for part in parts:
        used = part.used
        costs.append(share(terms, part.server.row, before, used, part.replayed_tokens))
        before = Usage(
            before.input_tokens + used.input_tokens,
            before.cached_tokens + used.cached_tokens,
            before.output_tokens + used.output_tokens,
        )
    return costs


def settlements_of(
    job: Job,
    parts: Sequence[Part],
    costs: Sequence[Charge],
    kept: Callable[[int, int], tuple[bytes, bytes | None]] | None = None,
) -> list[Settlement]:
    """One for each part. `kept(first, count)` are the packed ids of the run, and their scores, where they are kept."""
    used = any(part.used.input_tokens or part.used.output_tokens for part in parts)
    made: list[Settlement] = []
    for number, (part, cost) in enumerate(zip(parts, costs, strict=True)):
        leaf = Leaf(
            work_id=job.work_id,
            epoch=part.epoch,
            start=part.start,
            prompt_hash=job.prompt_hash,
            output_hash=part.output_hash,
            input_tokens=part.used.input_tokens,
            cached_tokens=part.used.cached_tokens,
            output_tokens=part.used.output_tokens,
            price_id=part.server.row.price_id,
            price=part.server.row.price,
            pay_nanocredits=cost.node + cost.subsidy,
            charge_nanocredits=cost.total,
            started_ms=part.started_ms,
            ended_ms=max(part.ended_ms, part.started_ms),
            finish=part.finish,
            commit_root=part.commit_root,
            claim=part.claim,
            replayed_tokens=part.replayed_tokens,
        )
        ids, scores = kept(part.start - job.run_start, part.used.output_tokens) if kept is not None else (None, None)
        last = number == len(parts) - 1
        made.append(
            Settlement(
                work_id=job.work_id,
                epoch=part.epoch,
                journalled=job.journalled,
                lease_id=job.lease_id,
                hold_id=job.hold_id,
                closes=last,
                requests=1 if last and used else 0,
                payer=job.payer,
                model=job.model,
                class_id=job.class_id,
                server=part.server,
                salt=job.salt,
                leaf=leaf,
                cost=cost,
                kept_ids=ids,
                scores=scores,
            )
        )
    return made


def from_row(row: dict[str, Any], ended_ms: int) -> list[Settlement]:
    """What a journalled work came to: its prompt counts once an id was delivered, as for a caller who leaves."""
    price_row = msgspec.json.decode(row["price"], type=PriceRow)
    if row["journal"] is None:
        journal = Journal(price_row, (), True, 0, row["start"])  # from before works could move
    else:
        journal = _JOURNALS.decode(bytes(row["journal"]))
    delivered = row["output_tokens"] + sum(part.used.output_tokens for part in journal.parts)
    pays_input = journal.pays_input and delivered > 0
    last = Part(
        epoch=row["epoch"],
        start=row["start"],
        server=Server(row["node_id"], bytes(row["node_key"]), row["owner_id"], price_row),
        used=Usage(
            row["input_tokens"] if pays_input else 0, row["cached_tokens"] if pays_input else 0, row["output_tokens"]
        ),
        replayed_tokens=journal.replayed_tokens if row["output_tokens"] else 0,
        output_hash=bytes(row["output_hash"]),
        started_ms=row["started_ms"],
        ended_ms=ended_ms,
        finish="lost",
    )
    job = Job(
        work_id=row["work_id"],
        payer=Payer(row["account_id"], row["key_id"]),
        model=row["model"],
        class_id=row["class_id"],
        salt=bytes(row["salt"]),
        prompt_hash=bytes(row["prompt_hash"]),
        lease_id="",
        hold_id=row["hold_id"],
        journalled=True,
        run_start=journal.run_start,
    )
    parts = (*journal.parts, last)
    kept_ids = row["kept_ids"]

    def kept(first: int, count: int) -> tuple[bytes, bytes | None]:
        return bytes(kept_ids)[4 * first : 4 * (first + count)], None

    return settlements_of(job, parts, costs_of(journal.terms, parts), kept if kept_ids is not None else None)
