"""API keys: who may call, and who may join.

A key is 32 random bytes shown once; the database and the memory hold only its SHA-256, which is enough because the key
itself has the entropy that a password lacks. Look-ups happen in memory: the request path never waits for the database.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import Literal, NewType

import msgspec

from gridmill.network.store import Row, Store, Transaction

AccountId = NewType("AccountId", str)
KeyId = NewType("KeyId", str)
Scope = Literal["inference", "node", "operator"]

KEY_PREFIX = "gm-"
NAME_CHARACTERS_MAX = 100  # long enough for an e-mail address and a purpose; it is shown in tables

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


class Account(msgspec.Struct, frozen=True):
    """Who a request belongs to, as far as the gateway needs to know."""

    account_id: AccountId
    key_id: KeyId
    name: str
    scopes: frozenset[str]


class KeyRow(msgspec.Struct, frozen=True):
    """A key as it may be listed: never the key itself."""

    key_id: KeyId
    name: str
    scope: str
    created_seconds: int
    revoked_seconds: int | None


class UnknownKey(Exception):
    """No key with that id or name."""


class Accounts:
    """All keys in memory, changed only through the store first."""

    def __init__(self, store: Store, *, now: Callable[[], float], entropy: Callable[[int], bytes]) -> None:
        self._store = store
        self._now = now
        self._entropy = entropy
        self._by_digest: dict[bytes, Account] = {}
        self._rows: dict[KeyId, KeyRow] = {}

    async def load(self) -> None:
        async def read(transaction: Transaction) -> list[Row]:
            return await transaction.all(
                "SELECT key_id, account_id, name, scope, key_sha256, created_seconds, revoked_seconds FROM api_keys"
            )

        for key_id, account_id, name, scope, digest, created, revoked in await self._store.run(read):
            self._rows[KeyId(key_id)] = KeyRow(KeyId(key_id), name, scope, created, revoked)
            if revoked is None:
                self._by_digest[digest] = Account(AccountId(account_id), KeyId(key_id), name, frozenset({scope}))

    def authenticate(self, api_key: str) -> Account | None:
        """The account of a key that exists and is not revoked. Comparing digests leaks nothing about the key."""
        return self._by_digest.get(hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).digest())

    async def create(self, name: str, scope: Scope = "inference") -> tuple[KeyRow, str]:
        """A new key and its secret, which cannot be shown again. Raises ValueError on an unusable name."""
        name = name.strip() if isinstance(name, str) else ""
        if not name or len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
            raise ValueError(f"a key needs a printable name of 1 to {NAME_CHARACTERS_MAX} characters")
        if scope not in ("inference", "node", "operator"):
            raise ValueError(f"unknown scope {scope!r}: use inference, node or operator")
        secret = KEY_PREFIX + secrets_text(self._entropy(32))
        key_id = KeyId("key-" + self._entropy(6).hex())
        # Accounts proper come with the ledger; until then every key is an account of its own.
        account = Account(AccountId("account-" + key_id.removeprefix("key-")), key_id, name, frozenset({scope}))
        digest = hashlib.sha256(secret.encode()).digest()
        row = KeyRow(key_id, name, scope, int(self._now()), None)

        async def insert(transaction: Transaction) -> None:
            await transaction.do(
                "INSERT INTO api_keys (key_id, account_id, name, scope, key_sha256, created_seconds)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                row.key_id,
                account.account_id,
                row.name,
                row.scope,
                digest,
                row.created_seconds,
            )

        await self._store.run(insert)
        self._rows[key_id] = row
        self._by_digest[digest] = account
        return row, secret

    async def revoke(self, key_id_or_name: str) -> list[KeyRow]:
        """Revokes the key with that id, or every live key with that name. Raises UnknownKey when there is none."""
        chosen = [
            row
            for row in self._rows.values()
            if row.revoked_seconds is None and key_id_or_name in (row.key_id, row.name)
        ]
        if not chosen:
            raise UnknownKey(f"no live key is called {key_id_or_name!r}: `gridmill keys list` shows them")
        moment = int(self._now())

        async def update(transaction: Transaction) -> None:
            await transaction.do_many(
                "UPDATE api_keys SET revoked_seconds = ? WHERE key_id = ?", [(moment, row.key_id) for row in chosen]
            )

        await self._store.run(update)
        revoked = [msgspec.structs.replace(row, revoked_seconds=moment) for row in chosen]
        gone = {row.key_id for row in revoked}
        self._rows.update((row.key_id, row) for row in revoked)
        self._by_digest = {d: account for d, account in self._by_digest.items() if account.key_id not in gone}
        return revoked

    def rows(self) -> Iterable[KeyRow]:
        return sorted(self._rows.values(), key=lambda row: (row.created_seconds, row.key_id))


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
