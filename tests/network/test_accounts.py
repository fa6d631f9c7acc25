"""Keys work until they are revoked, and nothing that is stored gives one away."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gridmill.network import accounts
from gridmill.network.accounts import Accounts, UnknownKey
from gridmill.network.store import SqliteStore


def with_accounts(path: Path, body: Callable[[Accounts], Awaitable[None]]) -> None:
    async def run() -> None:
        store = SqliteStore(path, wall_clock=lambda: 1000.0)
        await store.open((accounts.MIGRATION,))
        try:
            made = Accounts(store, now=lambda: 1000.0, entropy=secrets.token_bytes)
            await made.load()
            await body(made)
        finally:
            await store.close()

    asyncio.run(run())


def test_a_created_key_authenticates_now_and_after_a_restart(tmp_path: Path) -> None:
    kept: list[str] = []

    async def create(made: Accounts) -> None:
        row, secret = await made.create("alice", "inference")
        kept.append(secret)
        account = made.authenticate(secret)
        assert account is not None
        assert (account.name, account.scopes, account.key_id) == ("alice", frozenset({"inference"}), row.key_id)

    async def again(made: Accounts) -> None:
        account = made.authenticate(kept[0])
        assert account is not None and account.name == "alice"

    with_accounts(tmp_path / "a.sqlite", create)
    with_accounts(tmp_path / "a.sqlite", again)


def test_a_revoked_key_is_refused_at_once_and_stays_refused(tmp_path: Path) -> None:
    kept: list[str] = []

    async def revoke(made: Accounts) -> None:
        _, first = await made.create("bob")
        _, second = await made.create("carol")
        kept.extend([first, second])
        assert [row.name for row in await made.revoke("bob")] == ["bob"]
        assert made.authenticate(first) is None
        assert made.authenticate(second) is not None
        with pytest.raises(UnknownKey):
            await made.revoke("bob")

    async def again(made: Accounts) -> None:
        assert made.authenticate(kept[0]) is None
        assert made.authenticate(kept[1]) is not None

    with_accounts(tmp_path / "a.sqlite", revoke)
    with_accounts(tmp_path / "a.sqlite", again)


def test_the_files_on_disk_do_not_hold_the_key(tmp_path: Path) -> None:
    async def create(made: Accounts) -> None:
        _, secret = await made.create("alice")
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"alice" in held  # the test can see what is there
        assert secret.encode() not in held
        assert secret.removeprefix(accounts.KEY_PREFIX).encode() not in held

    with_accounts(tmp_path / "a.sqlite", create)


@pytest.mark.parametrize("wrong", ["", "gm-", "gm-" + "a" * 43, "Bearer", "\ud800", "x" * 100_000])
def test_keys_that_were_never_made_are_refused(tmp_path: Path, wrong: str) -> None:
    async def body(made: Accounts) -> None:
        await made.create("alice")
        assert made.authenticate(wrong) is None

    with_accounts(tmp_path / "a.sqlite", body)


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "x" * 101])
def test_unusable_names_are_refused(tmp_path: Path, name: str) -> None:
    async def body(made: Accounts) -> None:
        with pytest.raises(ValueError, match="name"):
            await made.create(name)

    with_accounts(tmp_path / "a.sqlite", body)
