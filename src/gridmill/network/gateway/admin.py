"""The operator's API, under /admin/v1: the same commands as `gridmill accounts`, `keys`, `credit`, `ledger`, `classes`.

A key with the scope `operator` opens it and nothing else does: no cookie, no network address. A browser is let in from
the network's own pages alone: there are no CORS headers, and a request that another site's page made is refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

import msgspec

from gridmill.network.accounts import Account
from gridmill.network.credits import parse_credits
from gridmill.network.gateway.asgi import ApiError, Receive, Scope, Send, header
from gridmill.network.gateway.callers import method_not_allowed
from gridmill.network.gateway.plain import Asked, Plain
from gridmill.network.operator import Operations

PREFIX = "/admin/v1/"


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


class NewAccount(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """As `gridmill keys create`. `scopes` are words; `budget` and `cost_per_minute` are credits in decimal text."""

    name: str
    account: str | None = None
    scopes: list[str] = msgspec.field(default_factory=lambda: ["inference"])
    budget: str | None = None
    budget_nanocredits: int | None = None
    requests_per_minute: int | None = None
    cost_per_minute: str | None = None
    cost_per_minute_nanocredits: int | None = None
    expires: str | None = None
    weight: int = 1


class Credit(msgspec.Struct, forbid_unknown_fields=True):
    """`id` is the caller's own: sending the same again changes nothing. One of the amounts; text, never a float."""

    id: str
    amount: str | None = None
    amount_nanocredits: int | None = None
    memo: str = ""


class ClassOfName(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    class_id: str


class OfAccount(msgspec.Struct, forbid_unknown_fields=True):
    account: str | None = None


class History(msgspec.Struct, forbid_unknown_fields=True):
    account: str
    limit: int = 50


class UsageAsked(msgspec.Struct, forbid_unknown_fields=True, rename={"since": "from", "until": "to"}):
    account: str | None = None
    since: str | None = None
    until: str | None = None
    group: str = ""


Endpoint = Callable[[Asked, str], Awaitable[Any]]


class AdminApi:
    """One ASGI application for everything under PREFIX. `base_urls` are the network's own."""

    def __init__(self, plain: Plain, operations: Operations, *, base_urls: Collection[str]) -> None:
        self._plain = plain
        self._do = operations
        self._origins = {_origin(url) for url in base_urls}
        # `*` stands for an id, which the endpoint gets as its second argument.
        self._routes: dict[str, dict[str, Endpoint]] = {
            "accounts": {"GET": self._accounts, "POST": self._new_account},
            "accounts/*": {"GET": self._account},
            "accounts/*/credit": {"POST": self._credit},
            "accounts/*/freeze": {"POST": self._freeze},
            "accounts/*/unfreeze": {"POST": self._unfreeze},
            "keys": {"GET": self._keys, "POST": self._new_key},
            "keys/*": {"DELETE": self._revoke},
            "ledger/balance": {"GET": self._balance},
            "ledger/history": {"GET": self._history},
            "ledger/check": {"POST": self._check},
            "classes": {"GET": self._classes},
            "classes/approve": {"POST": self._approve},
            "classes/withdraw": {"POST": self._withdraw},
            "nodes": {"GET": self._nodes},
            "nodes/*": {"GET": self._node},
            "status": {"GET": self._status},
            "usage": {"GET": self._usage},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._plain.serve(
            "admin", scope, receive, send, scopes=("operator",), handle=self._answer, allow=self._own_pages_only
        )

    def _own_pages_only(self, scope: Scope) -> None:
        origin = header(scope, b"origin")
        site = header(scope, b"sec-fetch-site")
        if (origin is not None and origin.decode("latin-1").lower() not in self._origins) or (
            site is not None and site not in (b"same-origin", b"none")
        ):
            raise ApiError(403, "cross_origin", "the operator's API takes no requests that another site's page makes")

    async def _answer(self, account: Account, asked: Asked) -> Any:
        parts = asked.path.removeprefix(PREFIX).split("/")
        path = "/".join(parts)
        given = ""
        if path not in self._routes and len(parts) > 1:
            given, parts[1] = parts[1], "*"
            path = "/".join(parts)
        methods = self._routes.get(path)
        if methods is None or (path.endswith("*") and not given):
            known = ", ".join(sorted({route.partition("/")[0] for route in self._routes}))
            raise ApiError(404, "unknown_url", f"there is no such path under {PREFIX}: it has {known}")
        endpoint = methods.get(asked.method)
        if endpoint is None:
            raise method_not_allowed({"method": asked.method}, methods)
        found = await endpoint(asked, given)
        return {"object": "list", "data": found} if isinstance(found, list) else found

    # ------------------------------------------------------------ accounts and keys

    async def _accounts(self, asked: Asked, _: str) -> Any:
        asked.query(Nothing)
        return await self._do.accounts_list()

    async def _new_account(self, asked: Asked, _: str) -> Any:
        return await self._do.accounts_create((await asked.body(NewAccount)).name)

    async def _account(self, asked: Asked, account: str) -> Any:
        asked.query(Nothing)
        return await self._do.accounts_show(account)

    async def _freeze(self, asked: Asked, account: str) -> Any:
        await asked.body(Nothing)
        return await self._do.accounts_freeze(account)

    async def _unfreeze(self, asked: Asked, account: str) -> Any:
        await asked.body(Nothing)
        return await self._do.accounts_unfreeze(account)

    async def _keys(self, asked: Asked, _: str) -> Any:
        return await self._do.keys_list(asked.query(OfAccount).account)

    async def _new_key(self, asked: Asked, _: str) -> Any:
        wanted = await asked.body(NewKey)
        return await self._do.keys_create(
            wanted.name,
            ",".join(wanted.scopes),
            account=wanted.account,
            budget_nanocredits=_amount("budget", wanted.budget, wanted.budget_nanocredits),
            requests_per_minute=wanted.requests_per_minute,
            cost_per_minute_nanocredits=_amount(
                "cost_per_minute", wanted.cost_per_minute, wanted.cost_per_minute_nanocredits
            ),
            expires=wanted.expires,
            weight=wanted.weight,
        )

    async def _revoke(self, asked: Asked, key: str) -> Any:
        asked.query(Nothing)
        return await self._do.keys_revoke(key)

    # ------------------------------------------------------------ money

    async def _credit(self, asked: Asked, account: str) -> Any:
        wanted = await asked.body(Credit)
        amount = _amount("amount", wanted.amount, wanted.amount_nanocredits)
        if amount is None:
            raise ApiError(400, "missing_amount", "give amount, credits as text, or amount_nanocredits", param="amount")
        return await self._do.credit(account, amount, wanted.id, wanted.memo)

    async def _balance(self, asked: Asked, _: str) -> Any:
        return await self._do.ledger_balance(asked.query(OfAccount).account)

    async def _history(self, asked: Asked, _: str) -> Any:
        wanted = asked.query(History)
        return await self._do.ledger_history(wanted.account, wanted.limit)

    async def _check(self, asked: Asked, _: str) -> Any:
        await asked.body(Nothing)
        return await self._do.ledger_check()

    async def _usage(self, asked: Asked, _: str) -> Any:
        wanted = asked.query(UsageAsked)
        return await self._do.usage(wanted.account, wanted.since, wanted.until, wanted.group)

    # ------------------------------------------------------------ classes and status

    async def _classes(self, asked: Asked, _: str) -> Any:
        asked.query(Nothing)
        return await self._do.classes_list()

    async def _approve(self, asked: Asked, _: str) -> Any:
        wanted = await asked.body(ClassOfName)
        return await self._do.classes_approve(wanted.name, wanted.class_id)

    async def _withdraw(self, asked: Asked, _: str) -> Any:
        wanted = await asked.body(ClassOfName)
        return await self._do.classes_withdraw(wanted.name, wanted.class_id)

    async def _nodes(self, asked: Asked, _: str) -> Any:
        asked.query(Nothing)
        return await self._do.nodes()

    async def _node(self, asked: Asked, node_id: str) -> Any:
        asked.query(Nothing)
        return (await self._do.nodes(node_id))[0]

    async def _status(self, asked: Asked, _: str) -> Any:
        asked.query(Nothing)
        return await self._do.status()


def _amount(name: str, text: str | None, nanocredits: int | None) -> int | None:
    if text is not None and nanocredits is not None:
        raise ApiError(400, "invalid_value", f"give {name} or {name}_nanocredits, not both", param=name)
    if text is None:
        return nanocredits
    try:
        return parse_credits(text)
    except ValueError as problem:
        raise ApiError(400, "invalid_value", str(problem), param=name) from problem


def _origin(url: str) -> str:
    """As a browser writes it: scheme and host, and the port where it is not the scheme's own."""
    parts = urlsplit(url.lower())
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{parts.netloc.removesuffix(f':{usual}')}"
