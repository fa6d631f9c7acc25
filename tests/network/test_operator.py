"""What an operator does to accounts and money, as commands, on both databases."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from databases import Database
from gridmill.network import ledger
from gridmill.network.accounts import Accounts
from gridmill.network.control import ControlError
from gridmill.network.operator import MIGRATIONS, Conflict, Operations, Unknown, parse_expiry
from gridmill.network.registry import Registry
from gridmill.network.store import Store, Transaction

NOW = 1_800_000_000.0


def with_operations(database: Database, body: Callable[[Operations, Store], Awaitable[None]]) -> None:
    async def run() -> None:
        store = database.store(wall_clock=lambda: NOW)
        await store.open(MIGRATIONS)
        try:
            accounts = Accounts(store, now=lambda: NOW, entropy=secrets.token_bytes)
            registry = Registry(store, approve="open", now=lambda: NOW)
            await body(Operations(accounts, registry, store=store, now=lambda: NOW), store)
        finally:
            await store.close()

    asyncio.run(run())


def test_credit_is_given_once_for_each_id_and_taken_back_only_where_there_is_some(database: Database) -> None:
    async def body(do: Operations, store: Store) -> None:
        account = (await do.accounts_create("acme"))["account_id"]
        first = await do.credit("acme", 500, "invoice 7", "thank you")
        assert (first["available_nanocredits"], first["repeated"]) == (500, False)
        again = await do.credit(account, 500, "invoice 7", "thank you")
        assert (again["available_nanocredits"], again["repeated"]) == (500, True)
        with pytest.raises(Conflict, match="invoice 7"):
            await do.credit("acme", 501, "invoice 7", "thank you")
        with pytest.raises(Conflict, match=r"0\.0000005 credits"):
            await do.credit("acme", -501)
        assert (await do.credit("acme", -200))["available_nanocredits"] == 300
        assert await do.ledger_balance() == [
            {"ledger_account": "rail:operator:external", "balance_nanocredits": -300},
            {"ledger_account": f"user:{account}:available", "balance_nanocredits": 300},
        ]
        rows = await do.ledger_history("acme")
        assert [(row["kind"], row["available_nanocredits"], row["memo"]) for row in rows] == [
            ("withdrawal", -200, ""),
            ("credit", 500, "thank you"),
        ]
        assert [row["kind"] for row in await do.ledger_history("acme", 1)] == ["withdrawal"]
        assert await do.ledger_check() == {"problems": [], "accounts": 2, "transfers": 2, "entries": 4}

    with_operations(database, body)


def test_credit_stops_before_a_sum_that_no_database_holds(database: Database) -> None:
    async def body(do: Operations, store: Store) -> None:
        await do.accounts_create("acme")
        for _ in range(4):
            await do.credit("acme", 10**18)
        with pytest.raises(Conflict, match="there is room for 0 more"):
            await do.credit("acme", 1)
        await do.credit("acme", -(10**18))  # and is not stuck there
        assert (await do.ledger_check())["problems"] == []

    with_operations(database, body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount_nanocredits": 0},
        {"amount_nanocredits": 1.5},
        {"amount_nanocredits": "5"},
        {"amount_nanocredits": 10**18 + 1},
        {"amount_nanocredits": 5, "id": ""},
        {"amount_nanocredits": 5, "id": "x" * 201},
        {"amount_nanocredits": 5, "id": "a\nb"},
        {"amount_nanocredits": 5, "memo": "a\nb"},
    ],
    ids=str,
)
def test_credit_that_cannot_be_is_refused(tmp_path: Any, wrong: dict[str, Any]) -> None:
    async def body(do: Operations, store: Store) -> None:
        await do.accounts_create("acme")
        with pytest.raises(ControlError):
            await do.credit("acme", **wrong)
        assert await do.ledger_balance() == []

    with_operations(Database("sqlite", str(tmp_path / "a.sqlite")), body)


def test_what_gateways_lease_and_works_hold_is_shown_as_held(database: Database) -> None:
    async def body(do: Operations, store: Store) -> None:
        account = (await do.accounts_create("acme"))["account_id"]
        await do.credit("acme", 1000)
        available, hold = ledger.user_available(account), ledger.user_hold(account)
        later = int(NOW * 1000) + 60_000

        async def lease_and_carve(tx: Transaction) -> list[ledger.Result]:
            return await ledger.apply(
                tx,
                [
                    ledger.Pend("lease", "lease", available, hold, 600, later, holder="g"),
                    ledger.Pend("work", "hold", hold, "escrow:request", 250, later, parent="lease", holder="g"),
                ],
            )

        assert await store.run(lease_and_carve) == [ledger.Done(600), ledger.Done(250)]
        shown = await do.accounts_show("acme")
        assert (shown["available_nanocredits"], shown["held_nanocredits"]) == (400, 600)
        assert [(r["available_nanocredits"], r["held_nanocredits"]) for r in await do.accounts_list()] == [(400, 600)]
        moves = [(row["available_nanocredits"], row["held_nanocredits"]) for row in await do.ledger_history("acme")]
        assert moves == [(0, -250), (-600, 600), (1000, 0)]
        with pytest.raises(Conflict, match="not held"):
            await do.credit("acme", -500)

    with_operations(database, body)


def test_an_account_is_shown_with_what_each_of_its_nodes_earned_in_all(database: Database) -> None:
    async def body(do: Operations, store: Store) -> None:
        account = (await do.accounts_create("farm"))["account_id"]

        async def serve(tx: Transaction) -> None:
            columns = (
                *("chain", "node_id", "class_id", "period_start_seconds", "period_seconds", "network_key", "node_key"),
                *("seq", "input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits", "head"),
                "countersigned_seq",
            )
            rows = [
                (bytes([day]), "node-1", "c", day * 86_400, 86_400, b"", b"", 1, 9, 0, 9, 10**day, b"", 1)
                for day in (1, 2)
            ]
            await tx.append("receipt_counters", columns, rows)
            for node in ("node-1", "node-2"):
                await tx.do("INSERT INTO node_keys VALUES (?, ?, 'key-1', 5)", node, account)

        await store.run(serve)
        nodes = (await do.accounts_show("farm"))["nodes"]
        assert [(node["node_id"], node["earned_nanocredits"]) for node in nodes] == [("node-1", 110), ("node-2", 0)]

    with_operations(database, body)


def test_a_key_is_listed_with_its_account_its_limits_and_what_it_spent(database: Database) -> None:
    async def body(do: Operations, store: Store) -> None:
        await do.accounts_create("acme")
        made = await do.keys_create(
            "ci",
            "inference,node",
            account="acme",
            budget_nanocredits=100,
            requests_per_minute=5,
            expires="30d",
            weight=2,
        )
        await do.credit("ci", 1000)
        available = ledger.user_available(made["account_id"])
        hold = ledger.user_hold(made["account_id"])
        pend = ledger.Pend("l", "lease", available, hold, 60, int(NOW * 1000) + 1, key_id=made["key_id"])
        await store.run(lambda tx: ledger.apply(tx, [pend]))
        (row,) = await do.keys_list("acme")
        assert (row["account_name"], row["scope"], row["requests_per_minute"]) == ("acme", "inference,node", 5)
        assert row["weight"] == 2
        assert (row["budget_nanocredits"], row["committed_nanocredits"]) == (100, 60)
        assert row["expires_seconds"] == NOW + 30 * 86_400
        assert "api_key" not in row and made["api_key"].startswith("gm-")
        with pytest.raises(Unknown):
            await do.keys_create("x", account="nobody")
        with pytest.raises(ControlError, match="no expiry"):
            await do.keys_create("x", expires="soon")

    with_operations(database, body)


def test_a_damaged_ledger_is_told_in_sentences(database: Database) -> None:
    async def body(do: Operations, store: Store) -> None:
        await do.accounts_create("acme")
        await do.credit("acme", 7)
        await store.run(lambda tx: tx.do("UPDATE ledger_accounts SET balance = 8 WHERE balance = 7"))
        found = await do.ledger_check()
        assert found["transfers"] == 1
        assert any("its entries say 7" in problem for problem in found["problems"])

    with_operations(database, body)


def test_an_expiry_is_a_time_from_now_or_a_last_day() -> None:
    assert parse_expiry("2d", 1000.9) == 1000 + 2 * 86_400
    assert parse_expiry("12h", 0) == 12 * 3600
    assert parse_expiry("1970-01-01", 0) == 86_400
    for wrong in ("", "d", "1.5d", "-1d", "1w", "2026-13-01", "999999d"):
        with pytest.raises(ValueError, match="no expiry"):
            parse_expiry(wrong, 0)
