"""Accounts and their API keys: who may call, who may join, who may operate, and within which limits.

A key is 32 random bytes shown once; the database and the memory hold only its SHA-256, which is enough because the key
itself has the entropy that a password lacks. Look-ups happen in memory: the request path never waits for the database.
What another gateway (or a command) changed is announced by the store; `watch` reads just that again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NewType

import msgspec

from gridmill.network import ledger
from gridmill.network.credits import NANOCREDITS_MAX
from gridmill.network.store import Action, Row, Store, StoreUnusable, Transaction

log = logging.getLogger("gridmill.network.accounts")

AccountId = NewType("AccountId", str)
KeyId = NewType("KeyId", str)

SCOPES = ("inference", "node", "operator")
KEY_PREFIX = "gm-"
NAME_CHARACTERS_MAX = 100  # long enough for an e-mail address and a purpose; it is shown in tables
REQUESTS_PER_MINUTE_MAX = 1_000_000_000  # beyond any gateway, and far below what arithmetic could mind
WEIGHT_MAX = 1000  # a larger share of what is scarce is all of it
CHANGES_REMEMBERED_MAX = 1000  # more at once are quicker to read as a whole
RETRY_SECONDS = 1.0  # between attempts to read changes from a database that does not answer

MIGRATION = """
CREATE TABLE api_keys (
    key_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL,
    name TEXT NOT NULL,
    scope TEXT NOT NULL,
    key_sha256 BLOB NOT NULL UNIQUE,
    created_seconds BIGINT NOT NULL,
    revoked_seconds BIGINT
);
"""

# Accounts proper. Until then each key was an account of its own, under an account id that it keeps.
ACCOUNTS_MIGRATION = """
CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    created_seconds BIGINT NOT NULL,
    frozen_seconds BIGINT
);
INSERT INTO accounts (account_id, name, created_seconds)
    SELECT account_id, MIN(name), MIN(created_seconds) FROM api_keys GROUP BY account_id;
ALTER TABLE api_keys ADD COLUMN requests_per_minute BIGINT;
ALTER TABLE api_keys ADD COLUMN cost_per_minute_nanocredits BIGINT;
ALTER TABLE api_keys ADD COLUMN expires_seconds BIGINT;
CREATE INDEX api_keys_of_account ON api_keys (account_id);
CREATE TABLE node_keys (
    node_id TEXT NOT NULL,
    account_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    last_seen_seconds BIGINT NOT NULL,
    PRIMARY KEY (account_id, node_id)
);
"""

# How large a share of what is scarce a key gets, beside others that ask for more than there is.
WEIGHTS_MIGRATION = """
ALTER TABLE api_keys ADD COLUMN weight BIGINT NOT NULL DEFAULT 1;
"""


class Account(msgspec.Struct, frozen=True):
    """Who a request belongs to, as far as the gateway needs to know: the account and the key that it came with."""

    account_id: AccountId
    key_id: KeyId
    name: str
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    cost_per_minute_nanocredits: int | None = None
    expires_seconds: int | None = None
    has_budget: bool = False
    weight: int = 1


class AccountRow(msgspec.Struct, frozen=True):
    """An account as it may be listed."""

    account_id: AccountId
    name: str
    created_seconds: int
    frozen_seconds: int | None = None


class KeyRow(msgspec.Struct, frozen=True):
    """A key as it may be listed: never the key itself. `scope` is a comma list; amounts are nanocredits."""

    key_id: KeyId
    account_id: AccountId
    name: str
    scope: str
    created_seconds: int
    revoked_seconds: int | None = None
    requests_per_minute: int | None = None
    cost_per_minute_nanocredits: int | None = None
    expires_seconds: int | None = None
    budget_nanocredits: int | None = None
    weight: int = 1


class UnknownKey(Exception):
    """No key with that id or name."""


class UnknownAccount(Exception):
    """No account, or more than one, is called so."""


class Accounts:
    """All accounts and keys in memory, changed only through the store first.

    `revoked` is called with the ids of keys that stopped working, whoever did it, on every gateway: what still runs
    with them is to be ended. A key that only expires is not among them: what it began may end.
    """

    def __init__(
        self,
        store: Store,
        *,
        now: Callable[[], float],
        entropy: Callable[[int], bytes],
        revoked: Callable[[Collection[KeyId]], None] = lambda key_ids: None,
    ) -> None:
        self.revoked = revoked
        self._store = store
        self._now = now
        self._entropy = entropy
        self._usable: dict[bytes, Account] = {}  # by digest: not revoked, in an account that is not frozen
        self._keys_by_digest: dict[bytes, KeyId] = {}
        self._digests: dict[KeyId, bytes] = {}
        self._rows: dict[KeyId, KeyRow] = {}
        self._accounts: dict[AccountId, AccountRow] = {}
        self._keys_of: dict[AccountId, set[KeyId]] = {}
        # A reload that read before a commit must not be remembered after it.
        self._one_change = asyncio.Lock()
        self._stale_keys: set[str] = set()
        self._stale_accounts: set[str] = set()
        self._all_stale = False
        self._something_stale = asyncio.Event()

    async def load(self) -> None:
        async with self._one_change:
            self._remember(*await self._store.run(_read_all))

    # ------------------------------------------------------------ for the gateway

    def authenticate(self, api_key: str) -> Account | None:
        """Whose key this is, when it may be used now. Comparing digests leaks nothing about the key."""
        account = self._usable.get(_digest(api_key))
        if account is None or (account.expires_seconds is not None and account.expires_seconds <= self._now()):
            return None
        return account

    def why_not(self, api_key: str) -> str:
        """Why `authenticate` said None, in one sentence for whoever holds that key."""
        key_id = self._keys_by_digest.get(_digest(api_key))
        if key_id is None:
            return "this API key is not known here (`gridmill keys create NAME` makes one)"
        row = self._rows[key_id]
        if row.revoked_seconds is not None:
            return "this API key was revoked (`gridmill keys create NAME` makes another)"
        if row.expires_seconds is not None and row.expires_seconds <= self._now():
            return "this API key has expired (`gridmill keys create NAME` makes another)"
        return "the account of this API key is frozen: ask the operator of this network"

    async def note_node(self, node_id: str, key_id: KeyId) -> None:
        """A node joined with this key: its account may see what the node earns."""
        row = self._rows.get(key_id)
        if row is None:
            return
        moment = int(self._now())

        async def upsert(transaction: Transaction) -> None:
            await transaction.do(
                "INSERT INTO node_keys (node_id, account_id, key_id, last_seen_seconds) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (account_id, node_id) DO UPDATE SET"
                " key_id = excluded.key_id, last_seen_seconds = excluded.last_seen_seconds",
                node_id,
                row.account_id,
                key_id,
                moment,
            )

        await self._store.run(upsert)

    # ------------------------------------------------------------ what an operator does

    async def create(
        self,
        name: str,
        scopes: str | Iterable[str] = "inference",
        *,
        account: str | None = None,
        budget_nanocredits: int | None = None,
        requests_per_minute: int | None = None,
        cost_per_minute_nanocredits: int | None = None,
        expires_seconds: int | None = None,
        weight: int = 1,
    ) -> tuple[KeyRow, str]:
        """A new key and its secret, which cannot be shown again; without `account` in a new account of that name.

        `scopes` are words or one comma list; `account` is an id or name. Raises ValueError on what cannot be, and
        UnknownAccount.
        """
        name = _checked_name(name, "key")
        scope = _checked_scopes(scopes)
        _check_number("the budget", budget_nanocredits, 0, NANOCREDITS_MAX)
        _check_number("requests per minute", requests_per_minute, 1, REQUESTS_PER_MINUTE_MAX)
        _check_number("the cost per minute", cost_per_minute_nanocredits, 1, NANOCREDITS_MAX)
        _check_number("the expiry", expires_seconds, 1, NANOCREDITS_MAX)
        _check_number("the weight", weight, 1, WEIGHT_MAX)
        if expires_seconds is not None and expires_seconds <= self._now():
            raise ValueError("the key would have expired already: give a moment in the future")
        owner = None if account is None else await self.find(account)
        moment = int(self._now())
        secret = KEY_PREFIX + secrets_text(self._entropy(32))
        digest = hashlib.sha256(secret.encode()).digest()
        made = owner or AccountRow(self._new_account_id(), name, moment)
        row = KeyRow(
            KeyId("key-" + self._entropy(6).hex()),
            made.account_id,
            name,
            scope,
            moment,
            None,
            requests_per_minute,
            cost_per_minute_nanocredits,
            expires_seconds,
            budget_nanocredits,
            weight,
        )

        async def insert(transaction: Transaction) -> None:
            if owner is None:
                await _insert_account(transaction, made)
            await transaction.do(
                "INSERT INTO api_keys (key_id, account_id, name, scope, key_sha256, created_seconds,"
                " requests_per_minute, cost_per_minute_nanocredits, expires_seconds, weight)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row.key_id,
                row.account_id,
                row.name,
                row.scope,
                digest,
                row.created_seconds,
                row.requests_per_minute,
                row.cost_per_minute_nanocredits,
                row.expires_seconds,
                row.weight,
            )
            if row.budget_nanocredits is not None:
                await ledger.set_budget(transaction, row.key_id, row.budget_nanocredits)
            await transaction.announce("keys", row.key_id)

        async with self._one_change:
            await self._store.run(insert)
            self._remember([] if owner else [made], [(row, digest)])
        return row, secret

    async def revoke(self, key_id_or_name: str) -> list[KeyRow]:
        """Revokes the key with that id, or every live key with that name. Raises UnknownKey when there is none."""
        moment = int(self._now())

        async def update(transaction: Transaction) -> list[str]:
            rows = await transaction.all(
                "UPDATE api_keys SET revoked_seconds = ? WHERE (key_id = ? OR name = ?) AND revoked_seconds IS NULL"
                " RETURNING key_id",
                moment,
                key_id_or_name,
                key_id_or_name,
            )
            for (key_id,) in rows:
                await transaction.announce("keys", key_id)
            return [key_id for (key_id,) in rows]

        async with self._one_change:
            chosen = await self._store.run(update)
            if not chosen:
                raise UnknownKey(f"no live key is called {key_id_or_name!r}: `gridmill keys list` shows them")
            self._remember(*await self._store.run(_reader(chosen, ())))
        return [self._rows[KeyId(key_id)] for key_id in sorted(chosen)]

    async def create_account(self, name: str) -> AccountRow:
        """A new account without keys. Raises ValueError on an unusable name."""
        row = AccountRow(self._new_account_id(), _checked_name(name, "account"), int(self._now()))

        async def insert(transaction: Transaction) -> None:
            await _insert_account(transaction, row)

        async with self._one_change:
            await self._store.run(insert)
            self._remember([row], [])
        return row

    async def freeze(self, account: str) -> AccountRow:
        """None of its keys works until `unfreeze`, and what runs with them ends. Raises UnknownAccount."""
        return await self._set_frozen(account, int(self._now()))

    async def unfreeze(self, account: str) -> AccountRow:
        return await self._set_frozen(account, None)

    async def _set_frozen(self, account: str, moment: int | None) -> AccountRow:
        account_id = (await self.find(account)).account_id

        async def update(transaction: Transaction) -> None:
            # Freezing what is frozen keeps the moment since when it is.
            condition = "frozen_seconds IS NOT NULL" if moment is None else "frozen_seconds IS NULL"
            await transaction.do(
                f"UPDATE accounts SET frozen_seconds = ? WHERE account_id = ? AND {condition}", moment, account_id
            )
            await transaction.announce("accounts", account_id)

        async with self._one_change:
            await self._store.run(update)
            self._remember(*await self._store.run(_reader((), [account_id])))
        return self._accounts[account_id]

    async def find(self, id_or_name: str) -> AccountRow:
        """The account with that id or name, or that of the key with that id or name.

        Raises UnknownAccount when there is none, or when the name could mean several.
        """
        found = self._called(id_or_name)
        if not found:
            await self.load()  # it may have been made a moment ago, by another gateway
            found = self._called(id_or_name)
        if not found:
            raise UnknownAccount(
                f"no account and no live key is called {id_or_name[:100]!r}: `gridmill accounts list` shows them"
            )
        if len(found) > 1:
            raise UnknownAccount(f"{id_or_name!r} could mean {' or '.join(sorted(found))}: give the id")
        return self._accounts[found.pop()]

    def _called(self, id_or_name: str) -> set[AccountId]:
        if id_or_name in self._accounts:
            return {AccountId(id_or_name)}
        if id_or_name in self._rows:
            return {self._rows[KeyId(id_or_name)].account_id}
        by_account = {row.account_id for row in self._accounts.values() if row.name == id_or_name}
        by_key = {
            row.account_id for row in self._rows.values() if row.name == id_or_name and row.revoked_seconds is None
        }
        return by_account | by_key

    def rows(self, account_id: AccountId | None = None) -> list[KeyRow]:
        """Keys, revoked ones too, the oldest first."""
        chosen = self._rows.values() if account_id is None else map(self._rows.__getitem__, self._its_keys(account_id))
        return sorted(chosen, key=lambda row: (row.created_seconds, row.key_id))

    def accounts(self) -> list[AccountRow]:
        return sorted(self._accounts.values(), key=lambda row: (row.created_seconds, row.account_id))

    def account(self, account_id: AccountId) -> AccountRow:
        return self._accounts[account_id]

    # ------------------------------------------------------------ what others changed

    def changed(self, topic: str, subject: str) -> None:
        """For `Store.listen`: an announcement. Many are read at once, by `watch`."""
        match topic:
            case "keys":
                self._stale_keys.add(subject)
            case "accounts":
                self._stale_accounts.add(subject)
            case "*":
                self._all_stale = True
            case _:
                return
        if len(self._stale_keys) + len(self._stale_accounts) > CHANGES_REMEMBERED_MAX:
            self._all_stale = True
        if self._all_stale:
            self._stale_keys.clear()
            self._stale_accounts.clear()
        self._something_stale.set()

    async def reload(self) -> None:
        """Reads what was announced since the last time, and ends what was revoked."""
        self._something_stale.clear()
        everything, self._all_stale = self._all_stale, False
        keys, self._stale_keys = self._stale_keys, set()
        accounts, self._stale_accounts = self._stale_accounts, set()
        try:
            async with self._one_change:
                read = _read_all if everything else _reader(sorted(keys), sorted(accounts))
                self._remember(*await self._store.run(read))
        except BaseException:
            self._all_stale = self._all_stale or everything
            self._stale_keys |= keys
            self._stale_accounts |= accounts
            self._something_stale.set()
            raise

    async def watch(self) -> None:
        """For ever: one task of the program's group."""
        while True:
            await self._something_stale.wait()
            try:
                await self.reload()
            except StoreUnusable as problem:
                log.warning("changed keys cannot be read; trying again", extra={"reason": str(problem)[:300]})
                await asyncio.sleep(RETRY_SECONDS)

    def _remember(self, accounts: Sequence[AccountRow], keys: Sequence[tuple[KeyRow, bytes]]) -> None:
        """The one place that changes what is in memory."""
        touched: set[KeyId] = set()
        for account in accounts:
            self._accounts[account.account_id] = account
            touched |= self._its_keys(account.account_id)
        for row, digest in keys:
            self._rows[row.key_id] = row
            self._digests[row.key_id] = digest
            self._keys_by_digest[digest] = row.key_id
            self._keys_of.setdefault(row.account_id, set()).add(row.key_id)
            touched.add(row.key_id)
        gone: set[KeyId] = set()
        for key_id in touched:
            row, digest = self._rows[key_id], self._digests[key_id]
            if row.revoked_seconds is None and self._accounts[row.account_id].frozen_seconds is None:
                self._usable[digest] = _as_account(row)
            elif self._usable.pop(digest, None) is not None:
                gone.add(key_id)
        if gone:
            self.revoked(gone)

    def _its_keys(self, account_id: AccountId) -> set[KeyId]:
        return self._keys_of.get(account_id, set())

    def _new_account_id(self) -> AccountId:
        return AccountId("account-" + self._entropy(6).hex())


def secrets_text(raw: bytes) -> str:
    """Random bytes as characters that survive a double click, a URL and a shell."""
    alphabet = "0123456789abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ"
    number = int.from_bytes(raw, "big")
    text = ""
    while number:
        number, digit = divmod(number, len(alphabet))
        text = alphabet[digit] + text
    return text


def system_entropy(count: int) -> bytes:
    return secrets.token_bytes(count)


def _digest(api_key: str) -> bytes:
    return hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).digest()


def _as_account(row: KeyRow) -> Account:
    return Account(
        row.account_id,
        row.key_id,
        row.name,
        frozenset(row.scope.split(",")),
        row.requests_per_minute,
        row.cost_per_minute_nanocredits,
        row.expires_seconds,
        row.budget_nanocredits is not None,
        row.weight,
    )


def _checked_name(name: str, what: str) -> str:
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        raise ValueError(f"a name of this {what} is needed: 1 to {NAME_CHARACTERS_MAX} printable characters")
    return name


def _checked_scopes(scopes: str | Iterable[str]) -> str:
    """A comma list in the order of SCOPES."""
    words = scopes.split(",") if isinstance(scopes, str) else [word for part in scopes for word in part.split(",")]
    wanted = {word.strip() for word in words}
    unknown = wanted - set(SCOPES)
    if unknown or not wanted:
        raise ValueError(f"unknown scope {', '.join(sorted(unknown))[:40]!r}: use {', '.join(SCOPES)}")
    return ",".join(scope for scope in SCOPES if scope in wanted)


def _check_number(what: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not (type(value) is int and low <= value <= high):
        raise ValueError(f"{what} must be a whole number between {low} and {high}")


# ---------------------------------------------------------------- SQL

_ACCOUNTS_SQL = "SELECT account_id, name, created_seconds, frozen_seconds FROM accounts"
_KEYS_SQL = (
    "SELECT k.key_id, k.account_id, k.name, k.scope, k.created_seconds, k.revoked_seconds, k.requests_per_minute,"
    " k.cost_per_minute_nanocredits, k.expires_seconds, b.budget, k.weight, k.key_sha256"
    " FROM api_keys k LEFT JOIN key_budgets b ON b.key_id = k.key_id"
)
_Read = tuple[list[AccountRow], list[tuple[KeyRow, bytes]]]


async def _read_all(transaction: Transaction) -> _Read:
    return _read(await transaction.all(_ACCOUNTS_SQL), await transaction.all(_KEYS_SQL))


def _reader(key_ids: Sequence[str], account_ids: Sequence[str]) -> Action[_Read]:
    """An action that reads these keys with their accounts, and these accounts."""

    async def read(transaction: Transaction) -> _Read:
        keys = await transaction.among(_KEYS_SQL + " WHERE k.key_id IN (??)", key_ids) if key_ids else []
        wanted = sorted({*account_ids, *(row[1] for row in keys)})
        accounts = await transaction.among(_ACCOUNTS_SQL + " WHERE account_id IN (??)", wanted) if wanted else []
        return _read(accounts, keys)

    return read


def _read(accounts: list[Row], keys: list[Row]) -> _Read:
    return (
        [AccountRow(AccountId(row[0]), *row[1:]) for row in accounts],
        [(KeyRow(KeyId(row[0]), AccountId(row[1]), *row[2:-1]), bytes(row[-1])) for row in keys],
    )


async def nodes_of(transaction: Transaction, account_id: str) -> list[dict[str, object]]:
    """The nodes that joined with keys of this account, the latest first, as JSON objects."""
    names = ("node_id", "key_id", "last_seen_seconds")
    rows = await transaction.all(
        f"SELECT {', '.join(names)} FROM node_keys WHERE account_id = ? ORDER BY last_seen_seconds DESC, node_id",
        account_id,
    )
    return [dict(zip(names, row, strict=True)) for row in rows]


async def _insert_account(transaction: Transaction, row: AccountRow) -> None:
    await transaction.do(
        "INSERT INTO accounts (account_id, name, created_seconds) VALUES (?, ?, ?)",
        row.account_id,
        row.name,
        row.created_seconds,
    )
    await transaction.announce("accounts", row.account_id)
