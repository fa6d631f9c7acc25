"""What a key's own nodes are doing, and why work went elsewhere (`GET /v1/nodes`). For keys with the scope `node`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from gridmill.network import demand
from gridmill.network.accounts import Account, nodes_of
from gridmill.network.gateway.asgi import Receive, Scope, Send
from gridmill.network.gateway.plain import Asked, Plain, only
from gridmill.network.registry import Registry
from gridmill.network.store import Store
from gridmill.wire.messages import NodeId

NODES_MAX = 1000  # of one account; whoever has more asks the operator


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


class NodesApi:
    """`clock` is the registry's: monotonic seconds."""

    def __init__(self, plain: Plain, *, registry: Registry, store: Store, clock: Callable[[], float]) -> None:
        self._plain = plain
        self._registry = registry
        self._store = store
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._plain.serve("nodes", scope, receive, send, scopes=("node",), handle=self._nodes, allow=only("GET"))

    async def _nodes(self, account: Account, asked: Asked) -> dict[str, Any]:
        asked.query(Nothing)
        known = await self._store.read(lambda tx: nodes_of(tx, account.account_id))
        found = []
        for row in known[:NODES_MAX]:
            node_id = NodeId(str(row["node_id"]))
            record = self._registry.record_of(node_id)
            shown = demand.report(self._registry, record, self._clock()) if record is not None else demand.gone(node_id)
            found.append({**shown, "last_seen_seconds": row["last_seen_seconds"]})
        return {"object": "list", "data": found, "has_more": len(known) > NODES_MAX}
