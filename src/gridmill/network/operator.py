"""What an operator can do to a network: the same commands, running (through its socket) or not (on its database).

The methods of Operations are what the command line, the control socket and the operator's API (gateway/admin.py) call.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from gridmill.network import accounts as accounts_module
from gridmill.network import balances, demand, idempotency, ledger, receipts, settlement, usage
from gridmill.network import registry as registry_module
from gridmill.network.accounts import AccountId, AccountRow, Accounts, KeyRow, UnknownAccount, UnknownKey
from gridmill.network.control import Command, ControlError, FolderLock, NotRunning, call
from gridmill.network.credits import show_credits
from gridmill.network.dispatch import Dispatcher
from gridmill.network.links import Links
from gridmill.network.receipts_export import Exporter
from gridmill.network.registry import Registry, UnknownModel
from gridmill.network.store import Store, Transaction, store_at
from gridmill.network.usage import DAY_SECONDS
from gridmill.wire.identity import Identity

# Append-only, in this order: databases remember how many of them they have.
MIGRATIONS = (
    accounts_module.MIGRATION,
    registry_module.MIGRATION,
    accounts_module.ACCOUNTS_MIGRATION,
    registry_module.PRICES_MIGRATION,
    usage.MIGRATION,
    ledger.MIGRATION,
    settlement.MIGRATION,
    receipts.MIGRATION,
    idempotency.MIGRATION,
    settlement.PARTS_MIGRATION,
    accounts_module.WEIGHTS_MIGRATION,
)

OPERATOR_RAIL = "rail:operator:external"  # where credit comes from that an operator gives, and goes that is taken back
HISTORY_ROWS_MAX = 1000
CREDIT_ID_CHARACTERS_MAX = 200


class Unknown(ControlError):
    """What a command names does not exist."""


class Conflict(ControlError):
    """A command contradicts what has happened already, or what there is."""


class Operations:
    """Methods named as their commands. Arguments and results are plain JSON values, amounts whole nanocredits."""

    def __init__(
        self,
        accounts: Accounts,
        registry: Registry,
        *,
        store: Store,
        links: Links | None = None,
        dispatcher: Dispatcher | None = None,
        base_url: str = "",
        local_url: str = "",
        network_key: str = "",
        identity: Identity | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._registry = registry
        self._store = store
        self._links = links
        self._dispatcher = dispatcher
        self._base_url = base_url
        self.local_url = local_url
        self._network_key = network_key
        self._exporter = Exporter(store, identity)
        self._now = now

    def commands(self) -> dict[str, Command]:
        return {
            "accounts.create": self.accounts_create,
            "accounts.list": self.accounts_list,
            "accounts.show": self.accounts_show,
            "accounts.freeze": self.accounts_freeze,
            "accounts.unfreeze": self.accounts_unfreeze,
            "keys.create": self.keys_create,
            "keys.list": self.keys_list,
            "keys.revoke": self.keys_revoke,
            "credit": self.credit,
            "ledger.balance": self.ledger_balance,
            "ledger.history": self.ledger_history,
            "ledger.check": self.ledger_check,
            "usage": self.usage,
            "classes.list": self.classes_list,
            "classes.approve": self.classes_approve,
            "classes.withdraw": self.classes_withdraw,
            "receipts.export": self.receipts_export,
            "receipts.show": self.receipts_show,
            "nodes": self.nodes,
            "status": self.status,
        }

    def knows(self, api_key: str) -> bool:
        """Whether this key works here now."""
        return self._accounts.authenticate(api_key) is not None

    # ------------------------------------------------------------ accounts and keys

    async def accounts_create(self, name: str) -> dict[str, Any]:
        try:
            return _account(await self._accounts.create_account(name))
        except ValueError as problem:
            raise ControlError(str(problem)) from problem

    async def accounts_list(self) -> list[dict[str, Any]]:
        money = await self._store.read(lambda tx: balances.of_users(tx))
        return [
            {
                **_account(row),
                **_balance(*money.get(row.account_id, (0, 0))),
                "keys": sum(key.revoked_seconds is None for key in self._accounts.rows(row.account_id)),
            }
            for row in self._accounts.accounts()
        ]

    async def accounts_show(self, account: str) -> dict[str, Any]:
        row = await self._find(account)

        async def read(transaction: Transaction) -> tuple[list[dict[str, object]], list[usage.Earned]]:
            nodes = await accounts_module.nodes_of(transaction, row.account_id)
            return nodes, await usage.earned(transaction, row.account_id, usage.EVERY_DAY)

        nodes, earned = await self._store.read(read)
        for node in nodes:
            node["earned_nanocredits"] = sum(one.pay_nanocredits for one in earned if one.node_id == node["node_id"])
        return {
            **_account(row),
            **await self._balance(row.account_id),
            "keys": await self._keys(self._accounts.rows(row.account_id)),
            "nodes": nodes,
        }

    async def accounts_freeze(self, account: str) -> dict[str, Any]:
        return _account(await self._accounts.freeze((await self._find(account)).account_id))

    async def accounts_unfreeze(self, account: str) -> dict[str, Any]:
        return _account(await self._accounts.unfreeze((await self._find(account)).account_id))

    async def keys_create(
        self,
        name: str,
        scope: str = "inference",
        account: str | None = None,
        budget_nanocredits: int | None = None,
        requests_per_minute: int | None = None,
        cost_per_minute_nanocredits: int | None = None,
        expires: str | None = None,
        weight: int = 1,
    ) -> dict[str, Any]:
        """`expires` is a time from now ("30d", "12h") or the last day, in UTC, on which the key works."""
        try:
            row, secret = await self._accounts.create(
                name,
                scope,
                account=account,
                budget_nanocredits=budget_nanocredits,
                requests_per_minute=requests_per_minute,
                cost_per_minute_nanocredits=cost_per_minute_nanocredits,
                expires_seconds=None if expires is None else parse_expiry(expires, self._now()),
                weight=weight,
            )
        except ValueError as problem:
            raise ControlError(str(problem)) from problem
        except UnknownAccount as problem:
            raise Unknown(str(problem)) from problem
        return {"api_key": secret, **(await self._keys([row]))[0]}

    async def keys_list(self, account: str | None = None) -> list[dict[str, Any]]:
        return await self._keys(
            self._accounts.rows(None if account is None else (await self._find(account)).account_id)
        )

    async def keys_revoke(self, key: str) -> list[dict[str, Any]]:
        try:
            revoked = await self._accounts.revoke(key)
        except UnknownKey as problem:
            raise Unknown(str(problem)) from problem
        return await self._keys(revoked)

    async def _find(self, account: str) -> AccountRow:
        try:
            return await self._accounts.find(account)
        except UnknownAccount as problem:
            raise Unknown(str(problem)) from problem

    async def _balance(self, account_id: AccountId) -> dict[str, int]:
        return _balance(*await self._store.read(lambda tx: balances.of_user(tx, account_id)))

    async def _keys(self, rows: Iterable[KeyRow]) -> list[dict[str, Any]]:
        """Keys as they are listed, with what is left of their budgets."""
        rows = list(rows)
        limited = sorted(row.key_id for row in rows if row.budget_nanocredits is not None)
        spent = await self._store.read(lambda tx: balances.committed(tx, limited)) if limited else {}
        return [
            {
                **msgspec.structs.asdict(row),
                "account_name": self._accounts.account(row.account_id).name,
                "committed_nanocredits": spent.get(row.key_id, 0) if row.budget_nanocredits is not None else None,
            }
            for row in rows
        ]

    # ------------------------------------------------------------ money

    async def credit(
        self, account: str, amount_nanocredits: int, id: str | None = None, memo: str = ""
    ) -> dict[str, Any]:
        """Gives credit to an account, or takes back what it has when the amount is negative.

        The caller's `id` makes repeating harmless: the same id with another account, amount or memo is refused.
        """
        row = await self._find(account)
        if type(amount_nanocredits) is not int or not amount_nanocredits:
            raise ControlError("an amount of credit is a whole number of nanocredits, and not 0")
        if id is not None and not (0 < len(id) <= CREDIT_ID_CHARACTERS_MAX and id.isprintable() and id.strip() == id):
            raise ControlError(f"an id of a credit has 1 to {CREDIT_ID_CHARACTERS_MAX} printable characters")
        transfer = ledger.Transfer(
            # A word of its own before it: no id of another kind can be taken by choosing it here.
            "credit:" + (secrets.token_hex(12) if id is None else id),
            "credit" if amount_nanocredits > 0 else "withdrawal",
            ((OPERATOR_RAIL, -amount_nanocredits), (ledger.user_available(row.account_id), amount_nanocredits)),
            memo,
        )

        async def apply(transaction: Transaction) -> tuple[ledger.Result, tuple[int, int]]:
            (result,) = await ledger.apply(transaction, [transfer])
            return result, await balances.of_user(transaction, row.account_id)

        try:
            result, left = await self._store.run(apply)
        except ValueError as problem:
            raise ControlError(str(problem)) from problem
        if isinstance(result, ledger.Refused):
            if result.reason == "conflict":
                raise Conflict(f"the id {id!r} was used for another credit: the same id must mean the same credit")
            if result.reason == "too_much":
                raise Conflict(
                    f"there is room for {show_credits(result.available)} more credits: an account, and all that the "
                    f"operator gives, may come to {show_credits(ledger.BALANCE_NANOCREDITS_MAX)}"
                )
            raise Conflict(
                f"{row.name} has {show_credits(result.available)} credits that are not held for running requests: "
                f"{show_credits(-amount_nanocredits)} cannot be taken back"
            )
        return {
            "transfer_id": transfer.transfer_id,
            "account_id": row.account_id,
            "name": row.name,
            "amount_nanocredits": amount_nanocredits,
            "repeated": result.repeated,
            **_balance(*left),
        }

    async def ledger_balance(self, account: str | None = None) -> dict[str, Any] | list[dict[str, Any]]:
        """What an account has; without one, all balances of the ledger."""
        if account is not None:
            row = await self._find(account)
            return {**_account(row), **await self._balance(row.account_id)}
        rows = sorted((await self._store.read(ledger.balances)).items())
        return [{"ledger_account": name, "balance_nanocredits": balance} for name, balance in rows]

    async def ledger_history(self, account: str, limit: int = 50) -> list[dict[str, Any]]:
        """The newest transfers that moved an account's money, the newest first."""
        if type(limit) is not int or not 1 <= limit <= HISTORY_ROWS_MAX:
            raise ControlError(f"a history shows 1 to {HISTORY_ROWS_MAX} transfers")
        row = await self._find(account)
        return await self._store.read(lambda tx: balances.history(tx, row.account_id, limit))

    async def ledger_check(self) -> dict[str, Any]:
        """Proves the books: every transfer adds up to zero, and every balance is the sum of its entries."""

        async def check(transaction: Transaction) -> dict[str, Any]:
            return {"problems": await ledger.check(transaction), **await balances.counted(transaction)}

        return await self._store.read(check)

    async def usage(
        self, account: str | None = None, since: str | None = None, until: str | None = None, group: str = ""
    ) -> list[dict[str, Any]]:
        """Requests, tokens and charges: of an account, or of all."""
        try:
            span = usage.Span.parse(since, until, self._now())
            parts = usage.parse_group(group or ("account,day,model" if account is None else "day,model"))
        except ValueError as problem:
            raise ControlError(str(problem)) from problem
        account_id: AccountId | None = None if account is None else (await self._find(account)).account_id
        return usage.grouped(await self._store.read(lambda tx: usage.read(tx, account_id, span)), parts)

    # ------------------------------------------------------------ classes and status

    async def classes_list(self) -> list[dict[str, Any]]:
        approved = [
            {"name": name, "class_id": class_id, "place": place, "approved": True, "owner": ""}
            for name, class_ids in self._registry.names().items()
            for place, class_id in enumerate(class_ids)
        ]
        waiting = [
            {"name": offer.name, "class_id": offer.class_id, "place": None, "approved": False, "owner": offer.owner_id}
            for offer in self._registry.pending()
        ]
        return approved + waiting

    async def classes_approve(self, name: str, class_id: str) -> dict[str, Any]:
        try:
            full = self._registry.full_class_id(class_id)
            await self._registry.approve(name, full, by="operator")
        except ValueError as problem:
            raise ControlError(str(problem)) from problem
        if self._links is not None:
            self._links.reconsider()
        return {"name": name, "class_id": full}

    async def classes_withdraw(self, name: str, class_id: str) -> dict[str, Any]:
        try:
            full = self._registry.full_class_id(class_id)
            await self._registry.withdraw(name, full)
        except ValueError as problem:
            raise ControlError(str(problem)) from problem
        except UnknownModel as problem:
            raise ControlError(
                f"{name} does not have that class: `gridmill classes list` shows what it has"
            ) from problem
        return {"name": name, "class_id": full}

    # ------------------------------------------------------------ receipts

    async def receipts_export(
        self,
        node: str = "",
        account: str = "",
        period: int = -1,
        with_salts: bool = False,
        cursor: list[Any] | None = None,
    ) -> dict[str, Any]:
        """One page of lines for a file, and where the next begins (null after the last)."""
        account_id = (await self._find(account)).account_id if account else ""
        lines, following = await self._exporter.page(
            node_id=node, account_id=account_id, period=period, with_salts=with_salts, cursor=cursor
        )
        return {"lines": lines, "cursor": following}

    async def receipts_show(self, work_id: str) -> list[dict[str, Any]]:
        return await self._exporter.show(work_id)

    async def nodes(self, node: str = "") -> list[dict[str, Any]]:
        """All nodes that are here, or the one: how each stands and why work went elsewhere."""
        records = [record for record in self._registry.nodes() if node in ("", record.node_id)]
        if node and not records:
            raise Unknown(f"no node {node!r} is here now: `gridmill nodes` lists those that are")
        return [demand.report(self._registry, record, self._registry.clock()) for record in records]

    async def status(self) -> dict[str, Any]:
        snapshot = self._registry.snapshot()
        names: dict[str, list[str]] = {}
        for name, class_ids in self._registry.names().items():
            for class_id in class_ids:
                names.setdefault(class_id, []).append(name)
        return {
            "running": self._links is not None,
            "base_url": self._base_url,
            "network_key": self._network_key,
            "works_running": self._links.works if self._links else 0,
            "requests_waiting": self._dispatcher.waiting if self._dispatcher else 0,
            "models": [
                {
                    "name": name,
                    "class_id": class_id,
                    "nodes": len(snapshot.by_class.get(class_id, ())),
                    "slots": sum(view.slots for view in snapshot.by_class.get(class_id, ())),
                    "in_flight": sum(view.in_flight for view in snapshot.by_class.get(class_id, ())),
                }
                for class_id, its_names in names.items()
                for name in its_names
            ],
            "nodes": [
                {
                    "node_id": record.node_id,
                    "owner_id": record.owner_id,
                    "software": record.software,
                    "models": [offer.name for offer in record.offers.values()],
                    "prices_nanocredits": [msgspec.to_builtins(offer.price) for offer in record.offers.values()],
                    "connected_seconds": round(self._now() - record.joined_seconds, 1),
                    "draining": record.draining,
                    "running": sum(record.in_flight.values()),
                    "slots": max((offer.slots for offer in record.offers.values()), default=0),
                    "tokens_per_second": round(record.telemetry.tokens_per_second, 1),
                    "kv_pages_used": record.telemetry.kv_pages_used,
                    "kv_pages_total": record.telemetry.kv_pages_total,
                    "round_trip_seconds": round(record.round_trip_seconds, 4),
                }
                for record in self._registry.nodes()
            ],
        }


def operate(folder: Path, command: str, *, database: Callable[[], str | None] = lambda: None, **arguments: Any) -> Any:
    """Runs a command on the network of this data folder, running or not. Raises ControlError.

    `database` reads the network's setting when no network runs here: with PostgreSQL the command reaches every gateway
    on that database.
    """
    try:
        return call(folder, command, **arguments)
    except NotRunning:
        return asyncio.run(_operate_offline(folder, database(), command, arguments))


async def _operate_offline(folder: Path, database: str | None, command: str, arguments: dict[str, Any]) -> Any:
    with contextlib.ExitStack() as held:
        if database is None:
            # PostgreSQL needs no lock: gateways elsewhere may run, and hear of what is changed.
            held.callback(FolderLock(folder / "network.lock", "gridmill network").release)
            if (folder / "network.key").exists() and not (folder / "network.sqlite").exists():
                raise ControlError(
                    f"{folder} has no database: give the --database that its network runs with, or start that network"
                )
        store = store_at(database or folder / "network.sqlite", wall_clock=time.time)
        try:
            await store.open(MIGRATIONS)
            accounts = Accounts(store, now=time.time, entropy=secrets.token_bytes)
            registry = Registry(store, approve="operator", now=time.time)
            await accounts.load()
            await registry.load()
            key = folder / "network.key"
            identity = Identity.load_or_create(key) if key.exists() else None
            operations = Operations(accounts, registry, store=store, identity=identity)
            return await operations.commands()[command](**arguments)
        finally:
            await store.close()


_PERIOD = re.compile(r"([0-9]{1,5})([dh])")


def parse_expiry(text: str, now: float) -> int:
    """The Unix second at which a key stops working. Raises ValueError with a sentence."""
    period = _PERIOD.fullmatch(text)
    if period is not None:
        return int(now) + int(period[1]) * (DAY_SECONDS if period[2] == "d" else 3600)
    try:
        return (usage.parse_day(text) + 1) * DAY_SECONDS
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no expiry: write it like 30d, 12h or 2026-12-31") from None


def _account(row: AccountRow) -> dict[str, Any]:
    return msgspec.structs.asdict(row)


def _balance(available: int, held: int) -> dict[str, int]:
    return {"available_nanocredits": available, "held_nanocredits": held}
