"""What an operator can do to a network: the same commands, running (through its socket) or not (on its files)."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any

from gridmill.network import accounts as accounts_module
from gridmill.network import registry as registry_module
from gridmill.network.accounts import Accounts, KeyRow, UnknownKey
from gridmill.network.control import Command, ControlError, FolderLock, NotRunning, call
from gridmill.network.dispatch import Dispatcher
from gridmill.network.links import Links
from gridmill.network.registry import Registry, UnknownModel
from gridmill.network.store import SqliteStore

# Append-only, in this order: databases remember how many of them they have.
MIGRATIONS = (accounts_module.MIGRATION, registry_module.MIGRATION, accounts_module.ACCOUNTS_MIGRATION)


class Operations:
    """Methods named as their commands. Arguments and results are plain JSON values."""

    def __init__(
        self,
        accounts: Accounts,
        registry: Registry,
        *,
        links: Links | None = None,
        dispatcher: Dispatcher | None = None,
        base_url: str = "",
        local_url: str = "",
        network_key: str = "",
        now: Any = time.time,
    ) -> None:
        self._accounts = accounts
        self._registry = registry
        self._links = links
        self._dispatcher = dispatcher
        self._base_url = base_url
        self.local_url = local_url
        self._network_key = network_key
        self._now = now

    def commands(self) -> dict[str, Command]:
        return {
            "keys.create": self.keys_create,
            "keys.list": self.keys_list,
            "keys.revoke": self.keys_revoke,
            "classes.list": self.classes_list,
            "classes.approve": self.classes_approve,
            "classes.withdraw": self.classes_withdraw,
            "status": self.status,
        }

    def knows(self, api_key: str) -> bool:
        """Whether this key works here now."""
        return self._accounts.authenticate(api_key) is not None

    async def keys_create(self, name: str, scope: str = "inference") -> dict[str, Any]:
        try:
            row, secret = await self._accounts.create(name, scope)
        except ValueError as problem:
            raise ControlError(str(problem)) from problem
        return {"api_key": secret, **_key(row)}

    async def keys_list(self) -> list[dict[str, Any]]:
        return [_key(row) for row in self._accounts.rows()]

    async def keys_revoke(self, key: str) -> list[dict[str, Any]]:
        try:
            revoked = await self._accounts.revoke(key)
        except UnknownKey as problem:
            raise ControlError(str(problem)) from problem
        if self._links is not None:
            self._links.revoke({row.key_id for row in revoked})
        return [_key(row) for row in revoked]

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


def operate(folder: Path, command: str, **arguments: Any) -> Any:
    """Runs a command on the network of this data folder, running or not. Raises ControlError."""
    try:
        return call(folder, command, **arguments)
    except NotRunning:
        return asyncio.run(_operate_offline(folder, command, arguments))


async def _operate_offline(folder: Path, command: str, arguments: dict[str, Any]) -> Any:
    lock = FolderLock(folder / "network.lock", "gridmill network")
    store = SqliteStore(folder / "network.sqlite", wall_clock=time.time)
    try:
        await store.open(MIGRATIONS)
        accounts = Accounts(store, now=time.time, entropy=secrets.token_bytes)
        registry = Registry(store, approve="operator", now=time.time)
        await accounts.load()
        await registry.load()
        return await Operations(accounts, registry).commands()[command](**arguments)
    finally:
        await store.close()
        lock.release()


def _key(row: KeyRow) -> dict[str, Any]:
    return {
        "key_id": row.key_id,
        "name": row.name,
        "scope": row.scope,
        "created_seconds": row.created_seconds,
        "revoked_seconds": row.revoked_seconds,
    }
