"""Keys work until they are revoked, expire or their account is frozen, and nothing that is stored gives one away."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import pytest

from databases import Database
from gridmill.network import accounts, registry
from gridmill.network.accounts import Account, Accounts, KeyId, UnknownAccount, UnknownKey
from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import Store, StoreUnusable

NOW = 1000.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


def sqlite(folder: Path) -> Database:
    """Where what is tested is not in SQL."""
    return Database("sqlite", str(folder / "a.sqlite"))


def with_accounts(database: Database, body: Callable[[Accounts], Awaitable[None]]) -> None:
    async def with_store(store: Store) -> None:
        await body(await loaded(store))

    with_store_at(database, with_store)


def with_store_at(database: Database, body: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        store = database.store(wall_clock=lambda: NOW)
        await store.open(MIGRATIONS)
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(run())


async def loaded(
    store: Store,
    now: Callable[[], float] = lambda: NOW,
    revoked: Callable[[Collection[KeyId]], None] = lambda key_ids: None,
) -> Accounts:
    made = Accounts(store, now=now, entropy=secrets.token_bytes, revoked=revoked)
    store.listen(made.changed)
    await made.load()
    return made


def test_a_created_key_authenticates_now_and_after_a_restart(database: Database) -> None:
    kept: list[tuple[Account, str]] = []

    async def create(made: Accounts) -> None:
        row, secret = await made.create("alice", "inference")
        account = made.authenticate(secret)
        assert account is not None
        assert (account.name, account.scopes, account.key_id) == ("alice", frozenset({"inference"}), row.key_id)
        assert account.account_id == row.account_id
        kept.append((account, secret))

    async def again(made: Accounts) -> None:
        account, secret = kept[0]
        assert made.authenticate(secret) == account

    with_accounts(database, create)
    with_accounts(database, again)


def test_a_revoked_key_is_refused_at_once_and_stays_refused(database: Database) -> None:
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

    with_accounts(database, revoke)
    with_accounts(database, again)


def test_the_files_on_disk_do_not_hold_the_key(tmp_path: Path) -> None:
    async def create(made: Accounts) -> None:
        _, secret = await made.create("alice")
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"alice" in held  # the test can see what is there
        assert secret.encode() not in held
        assert secret.removeprefix(accounts.KEY_PREFIX).encode() not in held

    with_accounts(sqlite(tmp_path), create)


@pytest.mark.parametrize("wrong", ["", "gm-", "gm-" + "a" * 43, "Bearer", "\ud800", "x" * 100_000])
def test_keys_that_were_never_made_are_refused(tmp_path: Path, wrong: str) -> None:
    async def body(made: Accounts) -> None:
        await made.create("alice")
        assert made.authenticate(wrong) is None
        assert "not known" in made.why_not(wrong)

    with_accounts(sqlite(tmp_path), body)


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "x" * 101])
def test_unusable_names_are_refused(tmp_path: Path, name: str) -> None:
    async def body(made: Accounts) -> None:
        with pytest.raises(ValueError, match="name"):
            await made.create(name)
        with pytest.raises(ValueError, match="name"):
            await made.create_account(name)

    with_accounts(sqlite(tmp_path), body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": "admin"},
        {"scopes": ""},
        {"scopes": ("inference", "root")},
        {"requests_per_minute": 0},
        {"requests_per_minute": 1.5},
        {"cost_per_minute_nanocredits": -1},
        {"budget_nanocredits": -1},
        {"budget_nanocredits": 1 << 63},
        {"budget_nanocredits": True},
        {"expires_seconds": int(NOW)},
        {"weight": 0},
        {"weight": 1001},
        {"weight": 1.5},
    ],
    ids=str,
)
def test_limits_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    async def body(made: Accounts) -> None:
        with pytest.raises(ValueError):
            await made.create("alice", **wrong)  # type: ignore[arg-type]
        assert made.rows() == []

    with_accounts(sqlite(tmp_path), body)


def test_a_key_carries_its_limits_and_several_scopes_in_one_order(database: Database) -> None:
    async def body(made: Accounts) -> None:
        row, secret = await made.create(
            "ci",
            ["operator,node", "inference"],
            requests_per_minute=60,
            cost_per_minute_nanocredits=7,
            expires_seconds=int(NOW) + 1,
            weight=3,
        )
        assert row.scope == "inference,node,operator"
        account = made.authenticate(secret)
        assert account is not None
        assert account.scopes == frozenset({"inference", "node", "operator"})
        assert (account.requests_per_minute, account.cost_per_minute_nanocredits) == (60, 7)
        assert not account.has_budget and account.weight == 3
        await made.load()
        assert made.authenticate(secret) == account, "from the database as from memory"

    with_accounts(database, body)


def test_a_budget_is_a_row_that_the_ledger_counts_in(database: Database) -> None:
    async def body(store: Store) -> None:
        made = await loaded(store)
        row, secret = await made.create("ci", budget_nanocredits=5)
        account = made.authenticate(secret)
        assert account is not None and account.has_budget
        rows = await store.run(lambda tx: tx.all("SELECT key_id, budget, committed FROM key_budgets"))
        assert rows == [(row.key_id, 5, 0)]
        again = (await loaded(store)).authenticate(secret)
        assert again == account

    with_store_at(database, body)


def test_why_a_key_does_not_work_is_said_in_one_sentence(database: Database) -> None:
    async def body(store: Store) -> None:
        clock = Clock()
        made = await loaded(store, clock)
        _, revoked = await made.create("revoked")
        _, expiring = await made.create("expiring", expires_seconds=int(NOW) + 10)
        _, frozen = await made.create("frozen")
        assert made.authenticate(expiring) is not None
        await made.revoke("revoked")
        await made.freeze("frozen")
        clock.now = NOW + 10
        for secret, word in ((revoked, "revoked"), (expiring, "expired"), (frozen, "frozen"), ("gm-x", "not known")):
            assert made.authenticate(secret) is None
            assert word in made.why_not(secret)
        await made.unfreeze("frozen")
        assert made.authenticate(frozen) is not None

    with_store_at(database, body)


def test_keys_of_one_account_are_frozen_together_and_others_are_not(database: Database) -> None:
    async def body(store: Store) -> None:
        gone: list[KeyId] = []
        made = await loaded(store, revoked=gone.extend)
        account = await made.create_account("acme")
        first, secret = await made.create("laptop", account=account.account_id)
        second, _ = await made.create("server", account="acme")
        _, other = await made.create("other")
        assert first.account_id == second.account_id == account.account_id
        await made.freeze("acme")
        assert set(gone) == {first.key_id, second.key_id}
        assert made.authenticate(secret) is None and made.authenticate(other) is not None
        frozen = (await made.freeze("laptop")).frozen_seconds  # again, by the name of a key
        assert frozen == NOW

    with_store_at(database, body)


def test_an_account_is_found_by_what_names_it_alone(database: Database) -> None:
    async def body(made: Accounts) -> None:
        acme = await made.create_account("acme")
        key, _ = await made.create("laptop", account="acme")
        await made.create("twin")
        await made.create("twin")
        for name in (acme.account_id, "acme", key.key_id, "laptop"):
            assert (await made.find(name)).account_id == acme.account_id
        with pytest.raises(UnknownAccount, match="could mean"):
            await made.find("twin")
        with pytest.raises(UnknownAccount, match="no account"):
            await made.find("nobody")
        with pytest.raises(UnknownAccount):
            await made.create("key", account="nobody")

    with_accounts(database, body)


def test_keys_from_before_accounts_become_members_of_accounts(database: Database) -> None:
    async def before() -> None:
        store = database.store()
        await store.open((accounts.MIGRATION, registry.MIGRATION))
        digest = accounts.hashlib.sha256(b"gm-old").digest()

        async def insert(tx: accounts.Transaction) -> None:
            await tx.do(
                "INSERT INTO api_keys (key_id, account_id, name, scope, key_sha256, created_seconds)"
                " VALUES ('key-1', 'account-1', 'old', 'inference', ?, 900)",
                digest,
            )

        await store.run(insert)
        await store.close()

    async def after(made: Accounts) -> None:
        account = made.authenticate("gm-old")
        assert account is not None
        assert (account.account_id, account.key_id, account.scopes) == ("account-1", "key-1", frozenset({"inference"}))
        assert account.weight == 1
        assert [(row.account_id, row.name, row.created_seconds) for row in made.accounts()] == [
            ("account-1", "old", 900)
        ]

    asyncio.run(before())
    with_accounts(database, after)


# ---------------------------------------------------------------- several gateways on one database


def test_what_one_gateway_changed_reaches_another_without_a_restart(database: Database) -> None:
    async def body(store: Store) -> None:
        elsewhere = database.store() if database.shared else store
        if database.shared:
            await elsewhere.open(MIGRATIONS)
        here = await loaded(elsewhere)
        gone: asyncio.Queue[Collection[KeyId]] = asyncio.Queue(10)
        there = await loaded(store, revoked=gone.put_nowait)
        watching = asyncio.create_task(there.watch())
        try:
            async with asyncio.timeout(10):
                row, secret = await here.create("alice")
                other, _ = await here.create("bob", account="alice")
                while there.authenticate(secret) is None:
                    await asyncio.sleep(0.001)
                await here.revoke("alice")
                assert set(await gone.get()) == {row.key_id}
                assert there.authenticate(secret) is None
                await here.freeze("bob")
                assert set(await gone.get()) == {other.key_id}
                await here.revoke("bob")
                await here.unfreeze("alice")
                while there.account(row.account_id).frozen_seconds is not None:
                    await asyncio.sleep(0.001)
                assert gone.empty(), "a key that did not work is not revoked twice"
        finally:
            watching.cancel()
            if database.shared:
                await elsewhere.close()

    with_store_at(database, body)


def test_after_missed_announcements_everything_is_read_again(database: Database) -> None:
    async def body(store: Store) -> None:
        here = await loaded(store)
        _, secret = await here.create("alice")

        class Deaf:  # announcements do not come through
            run = store.run

            def listen(self, changed: object) -> None:
                pass

        there = await loaded(Deaf())  # type: ignore[arg-type]
        await here.revoke("alice")
        await there.reload()
        assert there.authenticate(secret) is not None, "nothing told it"
        there.changed("*", "")
        await there.reload()
        assert there.authenticate(secret) is None

    with_store_at(database, body)


def test_changes_are_not_forgotten_when_the_database_fails_once(database: Database) -> None:
    async def body(store: Store) -> None:
        here = await loaded(store)
        _, secret = await here.create("alice")

        class Failing:
            fails = False

            async def run(self, action: object) -> object:
                if self.fails:
                    raise StoreUnusable("gone")
                return await store.run(action)  # type: ignore[arg-type]

            def listen(self, changed: object) -> None:
                pass

        failing = Failing()
        there = await loaded(failing)  # type: ignore[arg-type]
        row = (await here.revoke("alice"))[0]
        failing.fails = True
        there.changed("keys", row.key_id)
        with pytest.raises(StoreUnusable):
            await there.reload()
        failing.fails = False
        await there.reload()
        assert there.authenticate(secret) is None

    with_store_at(database, body)


def test_a_node_is_noted_once_for_each_account_that_it_came_with(database: Database) -> None:
    async def body(store: Store) -> None:
        made = await loaded(store)
        first, _ = await made.create("first", "node")
        second, _ = await made.create("second", "node", account="first")
        third, _ = await made.create("third", "node")
        for key in (first, second, third):
            await made.note_node("node-1", key.key_id)
        await made.note_node("node-1", KeyId("key-unknown"))
        rows = await store.run(lambda tx: tx.all("SELECT account_id, node_id, key_id FROM node_keys"))
        assert set(rows) == {
            (first.account_id, "node-1", second.key_id),
            (third.account_id, "node-1", third.key_id),
        }

    with_store_at(database, body)
