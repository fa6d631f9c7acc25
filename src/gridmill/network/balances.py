"""What the ledger says of accounts, for people: balances, history, budgets. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gridmill.network import ledger
from gridmill.network.store import Transaction


async def of_users(transaction: Transaction, account_ids: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """Available and held nanocredits, by account id: of those given, or of all that ever had any.

    Held is what gateways lease and what running requests may still cost.
    """
    select = "SELECT account, balance FROM ledger_accounts WHERE account "
    carved = "SELECT source, remaining FROM pendings WHERE state = 'open' AND source "
    if account_ids is None:
        rows = await transaction.all(select + "LIKE 'user:%'")
        rows += await transaction.all(carved + "LIKE 'user:%:hold'")
    else:
        wanted = sorted(account_ids)
        holds = [ledger.user_hold(account_id) for account_id in wanted]
        names = [ledger.user_available(account_id) for account_id in wanted] + holds
        rows = await transaction.among(select + "IN (??)", names) if names else []
        rows += await transaction.among(carved + "IN (??)", holds) if holds else []
    found: dict[str, tuple[int, int]] = {}
    for name, amount in rows:
        _, account_id, part = name.split(":")
        available, held = found.get(account_id, (0, 0))
        found[account_id] = (available + amount, held) if part == "available" else (available, held + amount)
    return found


async def of_user(transaction: Transaction, account_id: str) -> tuple[int, int]:
    """Available and held nanocredits of one account."""
    return (await of_users(transaction, [account_id])).get(account_id, (0, 0))


async def history(transaction: Transaction, account_id: str, limit: int) -> list[dict[str, Any]]:
    """The newest transfers that moved this account's money, the newest first, with what they changed."""
    names = {
        ledger.user_available(account_id): "available_nanocredits",
        ledger.user_hold(account_id): "held_nanocredits",
    }
    found: dict[int, dict[str, Any]] = {}
    for name, part in names.items():
        for entry in await ledger.history(
            transaction, name, 2 * limit
        ):  # a transfer may have two entries of one account
            known = found.setdefault(
                entry.number,
                {
                    "transfer_id": entry.transfer_id,
                    "kind": entry.kind,
                    "at_ms": entry.at_ms,
                    "available_nanocredits": 0,
                    "held_nanocredits": 0,
                    "memo": entry.memo,
                },
            )
            known[part] += entry.amount
    return [found[number] for number in sorted(found, reverse=True)[:limit]]


async def committed(transaction: Transaction, key_ids: Sequence[str]) -> dict[str, int]:
    """What of their budgets these keys have spent or hold, in nanocredits."""
    if not key_ids:
        return {}
    rows = await transaction.among("SELECT key_id, committed FROM key_budgets WHERE key_id IN (??)", sorted(key_ids))
    return {key_id: amount for key_id, amount in rows}


async def counted(transaction: Transaction) -> dict[str, int]:
    """How much there is for `ledger.check` to look at."""
    counts: dict[str, int] = {}
    for name, table in (("accounts", "ledger_accounts"), ("transfers", "transfers"), ("entries", "entries")):
        row = await transaction.one(f"SELECT COUNT(*) FROM {table}")
        counts[name] = int(row[0]) if row else 0
    return counts
