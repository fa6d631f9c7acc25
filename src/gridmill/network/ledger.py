"""The ledger: double entry, append-only, integer nanocredits, two-phase, with ids chosen by the caller.

Every movement of money is one transfer whose legs add up to zero. A pending (TigerBeetle's two-phase transfer) takes
money out of an account into a holding account at once; posts pay it out in parts, and it ends exactly once: by a post
that closes it, a void or its expiry, when the rest goes back where it came from. Nothing is ever changed or removed: a
correction is another transfer.

    user:ACCOUNT:available      what the user can spend
    user:ACCOUNT:hold           leased to a gateway, which holds works against it
    escrow:request              held for works that are running, by the gateways' journal
    provider:OWNER:earned_held  earned, in the window in which audits may still convict
    provider:OWNER:available    earned, ready to be paid out
    provider:OWNER:payout_inflight
    network:fees  audit:pool  failover:reserve
    rail:CHAIN:hot  rail:CHAIN:fees
    rail:CHAIN:external  loss  fx:A/B       the outside: may be negative, so that the sum of all accounts is zero

Commands are decided over a Book (a snapshot of the rows they touch) by pure functions and written in one go, so that
one database transaction carries hundreds of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

import msgspec

from gridmill.network.metering import Charge, split
from gridmill.network.store import Row, Transaction

COMMAND_NANOCREDITS_MAX = 10**18  # a billion credits
BALANCE_NANOCREDITS_MAX = 4 * 10**18  # what comes in stops here, so that no sum of balances leaves a BIGINT
ID_CHARACTERS_MAX = 250  # a work's id with a prefix and an epoch; ids are primary keys and must stay short
MEMO_CHARACTERS_MAX = 500  # a sentence for a person
OVERDUE_MS = 3_600_000  # gateways end what has expired within seconds; an hour means that none does
PROBLEMS_SHOWN_MAX = 20  # of each kind: a damaged database must not become a report without end

MIGRATION = """
CREATE TABLE ledger_accounts (
    account TEXT PRIMARY KEY,
    number BIGINT NOT NULL UNIQUE,
    currency TEXT NOT NULL,
    outside BIGINT NOT NULL,
    balance BIGINT NOT NULL,
    version BIGINT NOT NULL,
    CHECK (outside = 1 OR balance >= 0)
);
CREATE TABLE transfers (
    number BIGINT PRIMARY KEY,
    transfer_id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    body_sha256 BLOB NOT NULL,
    pending_id TEXT NOT NULL,
    amount BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    memo TEXT NOT NULL
);
CREATE TABLE entries (
    transfer_number BIGINT NOT NULL,
    n BIGINT NOT NULL,
    account_number BIGINT NOT NULL,
    amount BIGINT NOT NULL,
    PRIMARY KEY (transfer_number, n)
);
CREATE INDEX entries_of_account ON entries (account_number, transfer_number);
CREATE TABLE pendings (
    pending_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    into_account TEXT NOT NULL,
    home TEXT NOT NULL,
    amount BIGINT NOT NULL,
    remaining BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    state TEXT NOT NULL,
    holder TEXT NOT NULL,
    key_id TEXT NOT NULL,
    parent TEXT NOT NULL,
    opened_ms BIGINT NOT NULL,
    CHECK (remaining >= 0 AND (state = 'open' OR remaining = 0))
);
CREATE INDEX pendings_open_by_expiry ON pendings (expires_ms) WHERE state = 'open';
CREATE INDEX pendings_open_by_holder ON pendings (holder) WHERE state = 'open';
CREATE INDEX pendings_open_by_source ON pendings (source) WHERE state = 'open';
CREATE TABLE key_budgets (
    key_id TEXT PRIMARY KEY,
    budget BIGINT,
    committed BIGINT NOT NULL
);
CREATE TABLE ledger_counters (
    name TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO ledger_counters (name, value) VALUES ('account', 0), ('transfer', 0);
"""

Leg = tuple[str, int]  # account, nanocredits: negative pays, positive receives


class Body(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all commands; never one itself. The encoding is what an id stands for: a field that is added later with
    a default changes no body that was written before."""


class Transfer(Body, frozen=True):
    """Moves money at once. `legs` add up to zero; without any it only records that something was decided."""

    transfer_id: str
    kind: str
    legs: tuple[Leg, ...]
    memo: str = ""


class Pend(Body, frozen=True):
    """Takes `amount`, or as much of it as there is down to `at_least`, from `source` into the account `into`.

    With `parent`, another open pending, `source` must be that one's `into`: the money is taken out of its remainder (a
    work's hold carved out of a gateway's lease) and the rest of this one goes back to it while it is open. `key_id` is
    an API key whose budget limits the amount. `holder` is the gateway. The pending's id is the transfer's.
    """

    transfer_id: str
    kind: str
    source: str
    into: str
    amount: int
    expires_ms: int
    at_least: int = -1  # -1: all of `amount` or nothing
    parent: str = ""
    key_id: str = ""
    holder: str = ""


class Grow(Body, frozen=True):
    """Adds to an open pending that has no parent, from its own source; `amount`, `at_least` and budget as in Pend."""

    transfer_id: str
    pending_id: str
    amount: int
    at_least: int = -1


class Post(Body, frozen=True):
    """Pays `legs` (all positive) out of an open pending; `close` ends it and returns the rest."""

    transfer_id: str
    pending_id: str
    kind: str
    legs: tuple[Leg, ...]
    close: bool
    memo: str = ""


class Return(Body, frozen=True):
    """Gives up to `amount` of an open pending back to where it came from; the pending stays open."""

    transfer_id: str
    pending_id: str
    amount: int


class Void(Body, frozen=True):
    """Ends an open pending and returns all that is left. With `expired`, only when its time is over."""

    transfer_id: str
    pending_id: str
    expired: bool = False


class Extend(Body, frozen=True):
    """Moves the expiry of an open pending; no money moves, so it has no id and may be repeated."""

    pending_id: str
    expires_ms: int


Command = Transfer | Pend | Grow | Post | Return | Void | Extend


class Done(msgspec.Struct, frozen=True):
    """It happened; `amount` is what was taken, paid or returned. `repeated`: an earlier call had done it already."""

    amount: int
    repeated: bool = False


class Refused(msgspec.Struct, frozen=True):
    """Nothing happened.

    conflict: the id exists with another body. insufficient: `available` is all that could be had, limited by the
    `balance` of an account or the `budget` of a key. closed: the pending has ended (or expired, for an Extend, a Grow
    or a carving from one past its time). too_much: a post over what remains, or a transfer over what an account can
    have (`available` is what there is room for). unknown: no such pending. not_expired: a Void with `expired` came too
    early.
    """

    reason: Literal["conflict", "insufficient", "closed", "too_much", "unknown", "not_expired"]
    available: int = 0
    limited_by: Literal["", "balance", "budget"] = ""


Result = Done | Refused


async def apply(transaction: Transaction, commands: Sequence[Command]) -> list[Result]:
    """Decides and writes the commands in order, each by itself: one that is refused changes nothing.

    Raises ValueError on a command that no caller may build (legs that do not add up, an unknown kind of account).
    """
    if not commands:
        return []
    for command in commands:
        check_form(command)
    book = await _load(transaction, commands)
    now_ms = await transaction.now_ms()  # after the locks: what waited for them must not think that it is earlier
    results = [book.decide(command, now_ms) for command in commands]
    await _write(transaction, book, now_ms)
    return results


# ---------------------------------------------------------------- the chart of accounts


class Chart(msgspec.Struct, frozen=True):
    """What the name of an account says about it. Money enters and leaves a `holding` account by pendings alone."""

    currency: str
    outside: bool
    holding: bool


_NAME = r"[^:\s]{1,150}"
_INSIDE = re.compile(
    rf"user:{_NAME}:(available|hold)|escrow:request|provider:{_NAME}:(earned_held|available|payout_inflight)"
    rf"|network:fees|audit:pool|failover:reserve|rail:{_NAME}:(hot|fees)"
)
_OUTSIDE = re.compile(rf"rail:{_NAME}:external|loss|fx:{_NAME}/{_NAME}")
_HOLDING = re.compile(rf"user:{_NAME}:hold|escrow:request")


@lru_cache(maxsize=50_000)
def chart(account: str) -> Chart:
    """Raises ValueError on a name that is none of ours."""
    outside = _OUTSIDE.fullmatch(account) is not None
    if not outside and not _INSIDE.fullmatch(account):
        raise ValueError(f"{account!r} is no account of the ledger")
    # One currency so far; the column and the rule that each currency adds up to zero are there for the second one.
    return Chart("credit", outside, _HOLDING.fullmatch(account) is not None)


def user_available(account_id: str) -> str:
    return f"user:{account_id}:available"


def user_hold(account_id: str) -> str:
    return f"user:{account_id}:hold"


def provider_held(owner_id: str) -> str:
    return f"provider:{owner_id}:earned_held"


def provider_available(owner_id: str) -> str:
    return f"provider:{owner_id}:available"


def check_form(command: Command) -> None:
    """What can be said about a command without looking at any account. Raises ValueError."""
    match command:
        case Post(legs=legs):
            if any(amount <= 0 or chart(account).holding for account, amount in legs):
                raise ValueError(
                    f"{command.transfer_id}: a post pays positive amounts, and none into a holding account"
                )
            _check_currencies(command.transfer_id, legs)
        case Transfer(legs=legs):
            if any(not amount or chart(account).holding for account, amount in legs):
                raise ValueError(f"{command.transfer_id}: a leg moves money, and never that of a holding account")
            _check_sums(command.transfer_id, legs)
        case Pend():
            if command.source == command.into or not (
                chart(command.into).holding or command.into.endswith(":payout_inflight")
            ):
                raise ValueError(f"{command.transfer_id}: {command.into} holds nothing that is pending")
            if chart(command.source).holding != bool(command.parent):
                raise ValueError(f"{command.transfer_id}: only what has a parent comes out of a holding account")
            _check_currencies(command.transfer_id, ((command.source, 0), (command.into, 0)))
            _check_amount(command.transfer_id, command.amount, command.at_least)
        case Grow():
            _check_amount(command.transfer_id, command.amount, command.at_least)
        case Return():
            _check_amount(command.transfer_id, command.amount, 0)
        case Extend():
            return
    if not 0 < len(command.transfer_id) <= ID_CHARACTERS_MAX or not command.transfer_id.isprintable():
        raise ValueError(f"a transfer's id has 1 to {ID_CHARACTERS_MAX} printable characters")
    memo = command.memo if isinstance(command, (Post, Transfer)) else ""
    if memo and (len(memo) > MEMO_CHARACTERS_MAX or not memo.isprintable()):
        raise ValueError(f"{command.transfer_id}: a memo has at most {MEMO_CHARACTERS_MAX} printable characters")


def _check_amount(transfer_id: str, amount: int, at_least: int) -> None:
    if not 0 <= amount <= COMMAND_NANOCREDITS_MAX or not -1 <= at_least <= amount:
        raise ValueError(f"{transfer_id}: {amount} nanocredits, at least {at_least}, is no amount")


def _check_currencies(transfer_id: str, legs: Sequence[Leg]) -> None:
    if len({chart(account).currency for account, _ in legs}) > 1:
        raise ValueError(f"{transfer_id}: a pending has one currency")
    if sum(amount for _, amount in legs) > COMMAND_NANOCREDITS_MAX:
        raise ValueError(f"{transfer_id}: over {COMMAND_NANOCREDITS_MAX} nanocredits")


def _check_sums(transfer_id: str, legs: Sequence[Leg]) -> None:
    sums: dict[str, int] = {}
    for account, amount in legs:
        currency = chart(account).currency
        sums[currency] = sums.get(currency, 0) + amount
    if any(sums.values()):
        raise ValueError(f"{transfer_id}: the legs do not add up to zero")
    if sum(abs(amount) for _, amount in legs) > 2 * COMMAND_NANOCREDITS_MAX:
        raise ValueError(f"{transfer_id}: over {COMMAND_NANOCREDITS_MAX} nanocredits")


# ---------------------------------------------------------------- the book: rows in memory and decisions over them


class AccountRow(msgspec.Struct):
    account: str
    number: int
    outside: bool
    balance: int = 0
    changed: bool = False


class PendingRow(msgspec.Struct):
    """`home` is where money goes that cannot go back to a parent: the source of the oldest ancestor."""

    pending_id: str
    kind: str
    source: str
    into: str
    home: str
    amount: int
    remaining: int
    expires_ms: int
    state: Literal["open", "posted", "voided", "expired"]
    holder: str
    key_id: str
    parent: str
    opened_ms: int
    new: bool = False
    changed: bool = False


class KeyBudget(msgspec.Struct):
    """`committed` is what is leased in the name of a key and what it spent; `budget` None is no limit."""

    key_id: str
    budget: int | None = None
    committed: int = 0
    changed: bool = False


class Known(msgspec.Struct, frozen=True):
    """A transfer that exists."""

    body_sha256: bytes
    amount: int


class Written(msgspec.Struct, frozen=True):
    """A transfer that the book decided and the database has yet to get."""

    transfer_id: str
    kind: str
    body_sha256: bytes
    pending_id: str
    amount: int
    memo: str
    entries: tuple[tuple[AccountRow, int], ...]


class Book:
    """The rows that some commands touch. `decide` changes them, and no database hears of it before `_write`."""

    def __init__(self) -> None:
        self.accounts: dict[str, AccountRow] = {}
        self.pendings: dict[str, PendingRow] = {}
        self.keys: dict[str, KeyBudget] = {}
        self.known: dict[str, Known] = {}
        self.written: list[Written] = []

    def decide(self, command: Command, now_ms: int) -> Result:
        """What becomes of one command; its id is looked at before anything else."""
        if isinstance(command, Extend):
            return self._extend(command, now_ms)
        body = _digest(command)
        known = self.known.get(command.transfer_id)
        if known is not None:
            return Done(known.amount, repeated=True) if known.body_sha256 == body else Refused("conflict")
        match command:
            case Post():
                return self._post(command, body)
            case Pend():
                return self._pend(command, body, now_ms)
            case Transfer():
                return self._transfer(command, body)
            case Grow():
                return self._grow(command, body, now_ms)
            case Return():
                return self._return(command, body)
            case Void():
                return self._void(command, body, now_ms)

    def _transfer(self, command: Transfer, body: bytes) -> Result:
        nets: dict[str, int] = {}
        for account, amount in command.legs:
            nets[account] = nets.get(account, 0) + amount
        for account, amount in nets.items():
            row = self.accounts[account]
            if row.balance + amount < 0 and not row.outside:
                return Refused("insufficient", row.balance, "balance")
            if abs(row.balance + amount) > BALANCE_NANOCREDITS_MAX:
                return Refused("too_much", BALANCE_NANOCREDITS_MAX - abs(row.balance))
        moved = sum(amount for _, amount in command.legs if amount > 0)
        return self._record(command.transfer_id, command.kind, body, "", moved, command.legs, command.memo)

    def _pend(self, command: Pend, body: bytes, now_ms: int) -> Result:
        home, key_id, parent = command.source, command.key_id, None
        if command.parent:
            parent = self.pendings.get(command.parent)
            if parent is None:
                return Refused("unknown")
            if parent.into != command.source or parent.parent or command.key_id not in ("", parent.key_id):
                raise ValueError(f"{command.transfer_id}: not to be carved out of {command.parent}")
            if parent.state != "open" or parent.expires_ms <= now_ms:
                return Refused("closed")
            home, key_id = parent.home, parent.key_id
        taken = self._take(command, command.source, "" if parent else key_id, parent)
        if isinstance(taken, Refused):
            return taken
        self.pendings[command.transfer_id] = PendingRow(
            command.transfer_id,
            command.kind,
            command.source,
            command.into,
            home,
            taken,
            taken,
            command.expires_ms,
            "open",
            command.holder,
            key_id,
            command.parent,
            now_ms,
            new=True,
        )
        legs = ((command.source, -taken), (command.into, taken))
        return self._record(command.transfer_id, command.kind, body, command.transfer_id, taken, legs)

    def _grow(self, command: Grow, body: bytes, now_ms: int) -> Result:
        pending = self.pendings.get(command.pending_id)
        if pending is None:
            return Refused("unknown")
        if pending.parent:
            raise ValueError(f"{command.transfer_id}: {command.pending_id} has a parent and cannot grow")
        if pending.state != "open" or pending.expires_ms <= now_ms:
            return Refused("closed")
        taken = self._take(command, pending.source, pending.key_id, None)
        if isinstance(taken, Refused):
            return taken
        pending.amount += taken
        pending.remaining += taken
        pending.changed = True
        legs = ((pending.source, -taken), (pending.into, taken))
        return self._record(command.transfer_id, "grow", body, command.pending_id, taken, legs)

    def _take(self, command: Pend | Grow, source: str, key_id: str, parent: PendingRow | None) -> int | Refused:
        """How much of the amount can be had; the parent's remainder and the key's budget are lowered by it."""
        row = self.accounts[source]
        room, limited_by = command.amount, "balance"
        if parent is not None:
            room = parent.remaining
        elif not row.outside:
            room = row.balance
        key = self.keys[key_id] if key_id else None
        if key is not None and key.budget is not None:
            left = max(key.budget - key.committed, 0)  # a budget may be lowered below what is out already
            if left < room:
                room, limited_by = left, "budget"
        taken = min(command.amount, room)
        if taken < (command.amount if command.at_least < 0 else command.at_least):
            return Refused("insufficient", room, "budget" if limited_by == "budget" else "balance")
        if parent is not None:
            parent.remaining -= taken
            parent.changed = True
        if key is not None:
            key.committed += taken
            key.changed = True
        return taken

    def _post(self, command: Post, body: bytes) -> Result:
        pending = self.pendings.get(command.pending_id)
        if pending is None:
            return Refused("unknown")
        if pending.state != "open":
            return Refused("closed")
        paid = sum(amount for _, amount in command.legs)
        if paid > pending.remaining:
            return Refused("too_much", pending.remaining)
        pending.remaining -= paid
        pending.changed = True
        out, legs = paid, command.legs
        if command.close:
            pending.state = "posted"
            out += pending.remaining
            legs += (self._give_back(pending, pending.remaining),)
        return self._record(
            command.transfer_id,
            command.kind,
            body,
            command.pending_id,
            paid,
            ((pending.into, -out), *legs),
            command.memo,
        )

    def _return(self, command: Return, body: bytes) -> Result:
        pending = self.pendings.get(command.pending_id)
        if pending is None:
            return Refused("unknown")
        if pending.state != "open":
            return Refused("closed")
        returned = min(command.amount, pending.remaining)
        legs = ((pending.into, -returned), self._give_back(pending, returned))
        return self._record(command.transfer_id, "return", body, command.pending_id, returned, legs)

    def _void(self, command: Void, body: bytes, now_ms: int) -> Result:
        pending = self.pendings.get(command.pending_id)
        if pending is None:
            return Refused("unknown")
        if pending.state != "open":
            return Refused("closed")
        if command.expired and now_ms < pending.expires_ms:
            return Refused("not_expired")
        pending.state = "expired" if command.expired else "voided"
        returned = pending.remaining
        legs = ((pending.into, -returned), self._give_back(pending, returned))
        kind = "expire" if command.expired else "void"
        return self._record(command.transfer_id, kind, body, command.pending_id, returned, legs)

    def _extend(self, command: Extend, now_ms: int) -> Result:
        pending = self.pendings.get(command.pending_id)
        if pending is None:
            return Refused("unknown")
        if pending.state != "open" or pending.expires_ms <= now_ms:
            return Refused("closed")
        if command.expires_ms > pending.expires_ms:
            pending.expires_ms = command.expires_ms
            pending.changed = True
        return Done(0)

    def _give_back(self, pending: PendingRow, amount: int) -> Leg:
        """Takes it out of what remains; to the parent while that is open, otherwise home and off the key's account."""
        pending.remaining -= amount
        pending.changed = True
        parent = self.pendings[pending.parent] if pending.parent else None
        if parent is not None and parent.state == "open":
            parent.remaining += amount
            parent.changed = True
            return pending.source, amount
        if pending.key_id:
            key = self.keys[pending.key_id]
            key.committed -= amount
            key.changed = True
        return pending.home, amount

    def _record(
        self,
        transfer_id: str,
        kind: str,
        body: bytes,
        pending_id: str,
        amount: int,
        legs: tuple[Leg, ...],
        memo: str = "",
    ) -> Done:
        entries = []
        for account, moved in legs:
            if moved:
                row = self.accounts[account]
                row.balance += moved
                row.changed = True
                entries.append((row, moved))
        self.known[transfer_id] = Known(body, amount)
        self.written.append(Written(transfer_id, kind, body, pending_id, amount, memo, tuple(entries)))
        return Done(amount)


_encoder = msgspec.msgpack.Encoder()


def _digest(command: Command) -> bytes:
    return hashlib.sha256(_encoder.encode(command)).digest()


def accounts_of(commands: Iterable[Command], pendings: dict[str, PendingRow]) -> set[str]:
    """Every account that these commands may move money of; `pendings` are those that exist already."""
    names: set[str] = set()
    for command in commands:
        match command:
            case Post():
                names.update(account for account, _ in command.legs)
            case Transfer():
                names.update(account for account, _ in command.legs)
            case Pend():
                names.add(command.source)
                names.add(command.into)
                if command.parent in pendings:
                    names.add(pendings[command.parent].home)
            case Extend():
                continue
        if not isinstance(command, (Transfer, Pend)) and (pending := pendings.get(command.pending_id)) is not None:
            names.add(pending.into)
            if not isinstance(command, Post) or command.close:
                names.add(pending.source)
                names.add(pending.home)
    return names


# ---------------------------------------------------------------- rows in, rows out


_PENDING_COLUMNS = (
    "pending_id",
    "kind",
    "source",
    "into_account",
    "home",
    "amount",
    "remaining",
    "expires_ms",
    "state",
    "holder",
    "key_id",
    "parent",
    "opened_ms",
)
_SELECT_PENDINGS = f"SELECT {', '.join(_PENDING_COLUMNS)} FROM pendings"


async def _load(transaction: Transaction, commands: Sequence[Command]) -> Book:
    """Locks, always in this order: accounts, pendings, keys; each sorted. New accounts and keys come before all locks,
    so that whoever waits for somebody else's new row holds nothing that the other needs."""
    book = Book()
    named = _sorted(
        command.parent if isinstance(command, Pend) else command.pending_id
        for command in commands
        if not isinstance(command, Transfer)
    )
    # What decides which accounts are touched never changes, so it may be read before they are locked.
    pendings = {row[0]: PendingRow(*row) for row in await _among(transaction, _SELECT_PENDINGS, "pending_id", named)}
    keys = _sorted(
        [command.key_id for command in commands if isinstance(command, Pend)]
        + [pending.key_id for pending in pendings.values()]
    )
    names = sorted(accounts_of(commands, pendings))
    await _open_keys(transaction, keys)
    await _open_accounts(transaction, names)
    for account, number, outside, balance in await _among(
        transaction, "SELECT account, number, outside, balance FROM ledger_accounts", "account", names, lock=True
    ):
        book.accounts[account] = AccountRow(account, number, bool(outside), balance)
    # A pending of this batch may have come into being meanwhile, by another run of the same commands.
    ours = (command.transfer_id for command in commands if isinstance(command, Pend))
    family = _sorted([*pendings, *(pending.parent for pending in pendings.values()), *ours])
    for row in await _among(transaction, _SELECT_PENDINGS, "pending_id", family, lock=True):
        book.pendings[row[0]] = PendingRow(*row)
    for key_id, budget, committed in await _among(
        transaction, "SELECT key_id, budget, committed FROM key_budgets", "key_id", keys, lock=True
    ):
        book.keys[key_id] = KeyBudget(key_id, budget, committed)
    # Last, because a call with the same ids may have been ahead of this one at the locks.
    ids = _sorted(command.transfer_id for command in commands if not isinstance(command, Extend))
    for transfer_id, body, amount in await _among(
        transaction, "SELECT transfer_id, body_sha256, amount FROM transfers", "transfer_id", ids
    ):
        book.known[transfer_id] = Known(bytes(body), amount)
    return book


async def _among(
    transaction: Transaction, select: str, column: str, values: Sequence[str], lock: bool = False
) -> list[Row]:
    return await transaction.among(f"{select} WHERE {column} IN (??)", values, lock=lock) if values else []


def _sorted(ids: Iterable[str]) -> list[str]:
    return sorted({given for given in ids if given})


async def _open_accounts(transaction: Transaction, names: Sequence[str]) -> None:
    """Accounts begin to exist when they are first used. Numbers are given under one lock, so none is lost or shared."""
    if not await _missing(transaction, names):
        return
    await transaction.among("SELECT name FROM ledger_counters WHERE name IN (??)", ["account"], lock=True)
    missing = await _missing(transaction, names)
    if not missing:
        return
    last = await _count(transaction, "account", len(missing))
    await transaction.append(
        "ledger_accounts",
        ("account", "number", "currency", "outside", "balance", "version"),
        [
            (name, last - len(missing) + place, chart(name).currency, int(chart(name).outside), 0, 0)
            for place, name in enumerate(missing, 1)
        ],
    )


async def _missing(transaction: Transaction, names: Sequence[str]) -> list[str]:
    found = {row[0] for row in await _among(transaction, "SELECT account FROM ledger_accounts", "account", names)}
    return [name for name in names if name not in found]


async def _open_keys(transaction: Transaction, keys: Sequence[str]) -> None:
    found = {row[0] for row in await _among(transaction, "SELECT key_id FROM key_budgets", "key_id", keys)}
    await transaction.do_many(
        "INSERT INTO key_budgets (key_id, budget, committed) VALUES (?, NULL, 0) ON CONFLICT (key_id) DO NOTHING",
        [(key_id,) for key_id in keys if key_id not in found],
    )


async def _count(transaction: Transaction, counter: str, by: int) -> int:
    row = await transaction.one(
        "UPDATE ledger_counters SET value = value + ? WHERE name = ? RETURNING value", by, counter
    )
    assert row is not None, f"the migration made the counter {counter}"
    return int(row[0])


async def _write(transaction: Transaction, book: Book, now_ms: int) -> None:
    new = [pending for pending in book.pendings.values() if pending.new]
    old = [pending for pending in book.pendings.values() if pending.changed and not pending.new]
    if new:
        await transaction.append(
            "pendings", _PENDING_COLUMNS, [msgspec.structs.astuple(row)[: len(_PENDING_COLUMNS)] for row in new]
        )
    if old:
        await transaction.do_many(
            "UPDATE pendings SET amount = ?, remaining = ?, expires_ms = ?, state = ? WHERE pending_id = ?",
            [(row.amount, row.remaining, row.expires_ms, row.state, row.pending_id) for row in old],
        )
    keys = [key for key in book.keys.values() if key.changed]
    if keys:
        await transaction.do_many(
            "UPDATE key_budgets SET committed = ? WHERE key_id = ?", [(key.committed, key.key_id) for key in keys]
        )
    accounts = [row for row in book.accounts.values() if row.changed]
    if accounts:
        await transaction.do_many(
            "UPDATE ledger_accounts SET balance = ?, version = version + 1 WHERE account = ?",
            [(row.balance, row.account) for row in accounts],
        )
    if not book.written:
        return
    # The counter comes last: from here to the commit all transfers of all gateways are one after the other.
    first = await _count(transaction, "transfer", len(book.written)) - len(book.written) + 1
    await transaction.append(
        "transfers",
        ("number", "transfer_id", "kind", "body_sha256", "pending_id", "amount", "at_ms", "memo"),
        [
            (number, made.transfer_id, made.kind, made.body_sha256, made.pending_id, made.amount, now_ms, made.memo)
            for number, made in enumerate(book.written, first)
        ],
    )
    await transaction.append(
        "entries",
        ("transfer_number", "n", "account_number", "amount"),
        [
            (number, n, row.number, amount)
            for number, made in enumerate(book.written, first)
            for n, (row, amount) in enumerate(made.entries)
        ],
    )


# ---------------------------------------------------------------- flows: what the network says with commands


def credit(account_id: str, amount: int, transfer_id: str, memo: str = "") -> Transfer:
    """The operator gives a user `amount` nanocredits; the id is the operator's, so that giving twice gives once."""
    legs = (("rail:operator:external", -amount), (user_available(account_id), amount))
    return Transfer(transfer_id, "credit", legs, memo)


def settlement_id(work_id: str, epoch: int) -> str:
    """One node's part of a work is paid once, whoever says so: the gateway that ran it or the one that found it."""
    return f"work:{work_id}:{epoch}"


def settlement(work_id: str, epoch: int, pending_id: str, charge: Charge, owner_id: str, *, close: bool) -> Post:
    """Pays the charge of one node's part of a work out of its hold (`close`) or out of the gateway's lease."""
    legs = (
        (provider_held(owner_id), charge.node),
        ("network:fees", charge.network),
        ("audit:pool", charge.audit),
        ("failover:reserve", charge.reserve),
    )
    return Post(settlement_id(work_id, epoch), pending_id, "work", tuple(leg for leg in legs if leg[1]), close)


def release(owner_id: str, period: str, amount: int) -> Transfer:
    """What an owner earned becomes payable, once for each period; `releasable` says how much."""
    legs = ((provider_held(owner_id), -amount), (provider_available(owner_id), amount)) if amount else ()
    return Transfer(f"release:{owner_id}:{period}", "release", legs)


async def releasable(transaction: Transaction, owner_id: str, earned_before_ms: int) -> int:
    """What an owner holds beyond the pay of works that were settled since, convicted and corrected ones left out."""
    row = await transaction.one(
        "SELECT number, balance FROM ledger_accounts WHERE account = ?", provider_held(owner_id)
    )
    if row is None:
        return 0
    number, balance = row
    since = await _first_transfer_since(transaction, earned_before_ms)
    recent = await transaction.one(
        "SELECT CAST(COALESCE(SUM(entries.amount), 0) AS BIGINT) FROM entries"
        " JOIN transfers ON transfers.number = entries.transfer_number"
        " LEFT JOIN transfers undone ON undone.transfer_id = 'undo:' || transfers.transfer_id"
        " WHERE entries.account_number = ? AND entries.transfer_number >= ? AND entries.amount > 0"
        " AND transfers.kind NOT IN ('conviction', 'correction') AND undone.number IS NULL",
        number,
        since,
    )
    assert recent is not None
    return int(max(balance - recent[0], 0))


async def _first_transfer_since(transaction: Transaction, at_ms: int) -> int:
    """Numbers have no gaps and rise with time, so that a few look-ups find the place without an index on time."""
    row = await transaction.one("SELECT value FROM ledger_counters WHERE name = 'transfer'")
    low, high = 1, (row[0] if row else 0) + 1  # everything below `low` is older; `high` and above is not
    while low < high:
        middle = (low + high) // 2
        row = await transaction.one("SELECT at_ms FROM transfers WHERE number = ?", middle)
        if row is not None and row[0] < at_ms:
            low = middle + 1
        else:
            high = middle
    return low


LOSS_SUFFIX = ":loss"  # of a settlement's id: its pay came too late for its hold, and from the network's own pocket
RESERVE_SUFFIX = ":reserve"  # what the failover reserve added to a node's pay


def undo_id(transfer_id: str) -> str:
    """A transfer is undone once: by a correction or by a conviction, never by both."""
    return f"undo:{transfer_id}"


class Conviction(msgspec.Struct, frozen=True):
    """What came of one, in nanocredits. `already` are parts of works that had been undone before."""

    clawed: int
    refunded: int
    bounty: int
    already: tuple[tuple[str, int], ...] = ()


async def convict(
    transaction: Transaction, owner_id: str, parts: Sequence[tuple[str, int]], bounty: int, memo: str = ""
) -> Conviction:
    """Takes back what an owner earned with these parts (work id, epoch), refunds who paid, and pays the `bounty`.

    The money comes from what the owner has in earned_held, then in available: never more than the parts earned, never
    more than there is. Each part is undone once, for good, even when nothing was there to take.
    """
    earned = await _earned(transaction, owner_id, parts)
    held, available = provider_held(owner_id), provider_available(owner_id)
    names = sorted({held, available, "audit:pool", *(payer for _, payer, _ in earned.values())})
    await _open_accounts(transaction, names)
    there: dict[str, int] = dict(
        await _among(transaction, "SELECT account, balance FROM ledger_accounts", "account", names, lock=True)
    )
    undone = await _among(
        transaction, "SELECT transfer_id FROM transfers", "transfer_id", sorted(undo_id(paid) for paid in earned)
    )
    before = {row[0] for row in undone}
    fresh = [transfer_id for transfer_id in sorted(earned) if undo_id(transfer_id) not in before]
    pays = [earned[transfer_id][2] for transfer_id in fresh]
    clawed = min(sum(pays), there[held] + there[available])
    bounty = min(bounty, clawed)
    claws = split(clawed, pays) if clawed else (0,) * len(fresh)
    bounties = split(bounty, claws) if bounty else (0,) * len(fresh)
    commands: list[Command] = []
    in_held = there[held]
    for transfer_id, claw, reward in zip(fresh, claws, bounties, strict=True):
        from_held = min(claw, in_held)
        in_held -= from_held
        legs = (
            (held, -from_held),
            (available, from_held - claw),
            (earned[transfer_id][1], claw - reward),
            ("audit:pool", reward),
        )
        commands.append(Transfer(undo_id(transfer_id), "conviction", tuple(leg for leg in legs if leg[1]), memo))
    for result in await apply(transaction, commands):
        assert isinstance(result, Done), "the accounts were locked before the amounts were chosen"
    already = tuple(sorted({earned[paid][0] for paid in earned if paid not in fresh}))
    return Conviction(clawed, clawed - bounty, bounty, already)


async def _earned(
    transaction: Transaction, owner_id: str, parts: Sequence[tuple[str, int]]
) -> dict[str, tuple[tuple[str, int], str, int]]:
    """Per transfer that paid this owner for one of the parts: the part, who paid, how much the owner got.

    A part that was settled too late for its hold was paid by `loss`, and what the failover reserve added goes back
    there, under ids of their own.
    """
    plain = {settlement_id(*part): part for part in parts}
    by_id = {
        transfer_id + end: part for transfer_id, part in plain.items() for end in ("", LOSS_SUFFIX, RESERVE_SUFFIX)
    }
    rows = await _among(
        transaction,
        "SELECT transfers.transfer_id, COALESCE(pendings.home, 'loss'), entries.amount, ledger_accounts.account"
        " FROM transfers JOIN entries ON entries.transfer_number = transfers.number"
        " JOIN ledger_accounts ON ledger_accounts.number = entries.account_number"
        " LEFT JOIN pendings ON pendings.pending_id = transfers.pending_id",
        "transfers.transfer_id",
        sorted(by_id),
    )
    found: dict[str, tuple[tuple[str, int], str, int]] = {}
    for transfer_id, payer, amount, account in rows:
        if account == provider_held(owner_id):
            payer = "failover:reserve" if transfer_id.endswith(RESERVE_SUFFIX) else payer
            found[transfer_id] = (by_id[transfer_id], payer, amount)
    return found


async def correct(transaction: Transaction, transfer_id: str, memo: str) -> Result:
    """Undoes a transfer as a whole by its opposite; what was paid out of a hold goes back to whose hold it was.

    Refused as insufficient when somebody has spent it already, and as a conflict when it was undone otherwise.
    """
    rows = await transaction.all(
        "SELECT ledger_accounts.account, entries.amount, pendings.home FROM transfers"
        " JOIN entries ON entries.transfer_number = transfers.number"
        " JOIN ledger_accounts ON ledger_accounts.number = entries.account_number"
        " LEFT JOIN pendings ON pendings.pending_id = transfers.pending_id"
        " WHERE transfers.transfer_id = ? ORDER BY entries.n",
        transfer_id,
    )
    legs: dict[str, int] = {}
    for account, amount, home in rows:
        place = home if chart(account).holding else account
        legs[place] = legs.get(place, 0) - amount
    moved = tuple((account, amount) for account, amount in legs.items() if amount)
    if not moved:
        return Refused("unknown")  # no such transfer, or one that paid nobody
    return (await apply(transaction, [Transfer(undo_id(transfer_id), "correction", moved, memo)]))[0]


async def set_budget(transaction: Transaction, key_id: str, budget: int | None) -> None:
    """Nanocredits that a key may spend in all; None for no limit. What it has spent already counts."""
    await transaction.do(
        "INSERT INTO key_budgets (key_id, budget, committed) VALUES (?, ?, 0)"
        " ON CONFLICT (key_id) DO UPDATE SET budget = excluded.budget",
        key_id,
        budget,
    )


# ---------------------------------------------------------------- reading


class Entry(msgspec.Struct, frozen=True):
    """One line of an account's statement. `number` orders all transfers of the network."""

    number: int
    transfer_id: str
    kind: str
    amount: int
    at_ms: int
    memo: str


async def balance(transaction: Transaction, account: str) -> int:
    """An account that nobody used has nothing."""
    row = await transaction.one("SELECT balance FROM ledger_accounts WHERE account = ?", account)
    return int(row[0]) if row else 0


async def balances(transaction: Transaction) -> dict[str, int]:
    return dict(await transaction.all("SELECT account, balance FROM ledger_accounts ORDER BY account"))


async def key_budget(transaction: Transaction, key_id: str) -> KeyBudget:
    row = await transaction.one("SELECT key_id, budget, committed FROM key_budgets WHERE key_id = ?", key_id)
    return KeyBudget(*row) if row else KeyBudget(key_id)


async def history(transaction: Transaction, account: str, limit: int = 100, before: int | None = None) -> list[Entry]:
    """Newest first. `before` is the number of the oldest line that is already known."""
    rows = await transaction.all(
        "SELECT transfers.number, transfer_id, kind, entries.amount, at_ms, memo FROM entries"
        " JOIN transfers ON transfers.number = entries.transfer_number"
        " WHERE entries.account_number = (SELECT number FROM ledger_accounts WHERE account = ?)"
        " AND entries.transfer_number < ? ORDER BY entries.transfer_number DESC, entries.n LIMIT ?",
        account,
        before if before is not None else (1 << 63) - 1,
        limit,
    )
    return [Entry(*row) for row in rows]


async def expired(transaction: Transaction, now_ms: int, limit: int) -> list[str]:
    """Ids of open pendings whose time is over, the oldest first: to be ended by a Void with `expired`."""
    rows = await transaction.all(
        "SELECT pending_id FROM pendings WHERE state = 'open' AND expires_ms <= ? ORDER BY expires_ms, pending_id"
        " LIMIT ?",
        now_ms,
        limit,
    )
    return [row[0] for row in rows]


async def pending(transaction: Transaction, pending_id: str) -> PendingRow | None:
    row = await transaction.one(f"{_SELECT_PENDINGS} WHERE pending_id = ?", pending_id)
    return PendingRow(*row) if row else None


async def open_pendings(transaction: Transaction, holder: str) -> list[PendingRow]:
    """What a gateway holds, as the ledger knows it."""
    rows = await transaction.all(f"{_SELECT_PENDINGS} WHERE state = 'open' AND holder = ? ORDER BY pending_id", holder)
    return [PendingRow(*row) for row in rows]


# Each finds what must not be: a SELECT whose rows fill the sentence. The entries are believed, everything else is
# compared with them. All sums are CAST, because PostgreSQL adds BIGINTs up to a NUMERIC.
_CHECKS = (
    (
        "SELECT transfers.transfer_id, ledger_accounts.currency, CAST(SUM(entries.amount) AS BIGINT) FROM entries"
        " LEFT JOIN transfers ON transfers.number = entries.transfer_number"
        " LEFT JOIN ledger_accounts ON ledger_accounts.number = entries.account_number"
        " GROUP BY entries.transfer_number, transfers.transfer_id, ledger_accounts.currency"
        " HAVING SUM(entries.amount) <> 0 OR transfers.transfer_id IS NULL OR ledger_accounts.currency IS NULL",
        "the entries of transfer {} in {} add up to {}, not to 0",
    ),
    (
        "SELECT currency, CAST(SUM(balance) AS BIGINT) FROM ledger_accounts GROUP BY currency HAVING SUM(balance) <> 0",
        "all balances in {} add up to {}, not to 0",
    ),
    (
        "SELECT account, balance, CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM ledger_accounts"
        " LEFT JOIN entries ON account_number = number"
        " GROUP BY account, balance HAVING balance <> COALESCE(SUM(amount), 0)",
        "{} says {}, its entries say {}",
    ),
    (
        "SELECT account, balance FROM ledger_accounts WHERE outside = 0 AND balance < 0",
        "{} has {}, less than nothing",
    ),
    (
        "SELECT account, balance, CAST(COALESCE(SUM(remaining), 0) AS BIGINT) FROM ledger_accounts"
        " LEFT JOIN pendings ON into_account = account AND state = 'open'"
        " WHERE account = 'escrow:request' OR account LIKE 'user:%:hold'"
        " GROUP BY account, balance HAVING balance <> COALESCE(SUM(remaining), 0)",
        "{} has {}, its open pendings hold {}",
    ),
    (
        # What went into its account in its name, less what came out, less what was carved out of it for others.
        "SELECT pending_id, remaining, taken, left_over, amount FROM ("
        " SELECT pendings.pending_id, pendings.remaining, pendings.amount,"
        "  CAST(COALESCE(SUM(CASE WHEN entries.amount > 0 AND transfers.pending_id = pendings.pending_id"
        "   THEN entries.amount END), 0) AS BIGINT) AS taken,"
        "  CAST(COALESCE(SUM(entries.amount), 0) AS BIGINT) AS left_over"
        " FROM pendings"
        " LEFT JOIN (SELECT pending_id AS member, pending_id AS root FROM pendings"
        "  UNION ALL SELECT pending_id, parent FROM pendings WHERE parent <> '') families"
        "  ON families.root = pendings.pending_id"
        " LEFT JOIN transfers ON transfers.pending_id = families.member"
        " LEFT JOIN ledger_accounts ON ledger_accounts.account = pendings.into_account"
        " LEFT JOIN entries ON entries.transfer_number = transfers.number"
        "  AND entries.account_number = ledger_accounts.number"
        " GROUP BY pendings.pending_id, pendings.remaining, pendings.amount) AS sums"
        " WHERE taken <> amount OR left_over <> remaining",
        "pending {0} says that {1} of {4} remain, its entries say {3} of {2}",
    ),
    (
        # All that was taken in a key's name, less what came home: legs of a post never go there.
        "SELECT key_budgets.key_id, committed, CAST(COALESCE(SUM(meant), 0) AS BIGINT) FROM key_budgets"
        " LEFT JOIN (SELECT key_id, amount AS meant FROM pendings WHERE key_id <> '' AND parent = ''"
        "  UNION ALL SELECT pendings.key_id, -entries.amount FROM pendings"
        "  JOIN transfers ON transfers.pending_id = pendings.pending_id"
        "  JOIN ledger_accounts ON ledger_accounts.account = pendings.home"
        "  JOIN entries ON entries.transfer_number = transfers.number"
        "   AND entries.account_number = ledger_accounts.number AND entries.amount > 0"
        "  WHERE pendings.key_id <> '') moves ON moves.key_id = key_budgets.key_id"
        " GROUP BY key_budgets.key_id, committed HAVING committed <> COALESCE(SUM(meant), 0)",
        "key {} has committed {}, its pendings say {}",
    ),
    (
        "SELECT value, count, last FROM ledger_counters,"
        " (SELECT COUNT(*) AS count, COALESCE(MAX(number), 0) AS last FROM transfers) AS numbers"
        " WHERE name = 'transfer' AND (value <> count OR value <> last)",
        "{} transfers were numbered, {} are there, the last is number {}",
    ),
)


async def check(transaction: Transaction) -> list[str]:
    """What is wrong with the ledger, in sentences; none when it is sound. Reads every entry."""
    problems: list[str] = []
    await transaction.reads_everything()
    for sql, sentence in _CHECKS:
        # MATERIALIZED, or PostgreSQL plans for twenty rows that it will soon have found, where there are none at all.
        rows = await transaction.all(
            f"WITH found AS MATERIALIZED ({sql}) SELECT * FROM found LIMIT {PROBLEMS_SHOWN_MAX}"
        )
        problems += [sentence.format(*row) for row in rows]
    overdue = await expired(transaction, await transaction.now_ms() - OVERDUE_MS, PROBLEMS_SHOWN_MAX)
    problems += [f"pending {pending_id} is still open an hour after its time" for pending_id in overdue]
    return problems
