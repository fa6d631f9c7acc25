"""The operator's API and /v1/usage and /v1/quote, over real sockets on a real database."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvicorn

from gridmill.network import usage
from gridmill.network.accounts import Accounts
from gridmill.network.gateway.admin import PREFIX, AdminApi
from gridmill.network.gateway.asgi import HttpProtocol
from gridmill.network.gateway.nodes import NodesApi
from gridmill.network.gateway.plain import BODY_BYTES_MAX, Plain
from gridmill.network.gateway.usage import UsageApi
from gridmill.network.limits import Limits
from gridmill.network.metering import FeePolicy, PriceRow
from gridmill.network.operator import MIGRATIONS, Operations
from gridmill.network.registry import ModelCard, Registry, UnknownModel
from gridmill.network.store import SqliteStore
from gridmill.network.text import TextError
from gridmill.wire.classes import ClassId, TextFacts
from gridmill.wire.messages import Price

NOW = 20_778 * 86_400 + 5.0  # on 2026-11-21
FACTS = TextFacts(
    chat_template="x", special_tokens={}, eos_token_ids=(1,), context_tokens=128, vocab_size=300, toy=True
)
CHEAP = PriceRow("price-1", Price(10, 5, 100), FeePolicy(fee_basis_points=1000))
DEAR = PriceRow("price-2", Price(20, 5, 200), FeePolicy(fee_basis_points=1000))


class Offered(Registry):
    """A registry in which one model is served at these prices."""

    rows = (DEAR, CHEAP, CHEAP)

    def resolve(self, name: str) -> ModelCard:
        if name != "demo":
            raise UnknownModel(name, [], f"no model {name}")
        return ModelCard("demo", ClassId("c" * 64), FACTS, "owner", 0, True)

    def prices(self, class_id: str) -> list[PriceRow]:
        return list(self.rows)


class Words:
    """Counts words as tokens, and four more for the template."""

    async def encode_chat(self, class_id: str, messages: Any) -> list[int]:
        if messages[0]["content"] == "busy":
            raise TextError("text_busy", "too much at once")
        return [5] * (4 + len(messages[0]["content"].split()))


class Stage:
    def __init__(self, url: str, http: aiohttp.ClientSession, operations: Operations, store: SqliteStore) -> None:
        self.url = url
        self.http = http
        self.do = operations
        self.store = store
        self.key = ""
        self.registry: Registry
        self.accounts: Accounts

    async def ask(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """`path` is under the operator's API unless it begins with a slash. Returns the status and the JSON."""
        url = self.url + (path if path.startswith("/") else PREFIX + path)
        said = {"authorization": f"Bearer {key or self.key}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        data = body if isinstance(body, bytes) or body is None else msgspec.json.encode(body)
        if method == "POST":
            said.setdefault("content-type", "application/json")
        async with self.http.request(method, url, data=data, headers=said) as response:
            assert not [name for name in response.headers if name.lower().startswith("access-control")]
            assert response.headers["x-gridmill-request-id"].startswith("req-")
            return response.status, await response.json()

    async def code(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, str]:
        """The status and the code of an error."""
        status, said = await self.ask(method, path, body, **more)
        assert said["error"]["message"]
        return status, said["error"]["code"]


@contextlib.asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    store = SqliteStore(folder / "a.sqlite", wall_clock=lambda: NOW)
    await store.open(MIGRATIONS)
    accounts = Accounts(store, now=lambda: NOW, entropy=secrets.token_bytes)
    registry = Offered(store, approve="open", now=lambda: NOW)
    plain = Plain(accounts=accounts, limits=Limits(), clock=time.monotonic, request_ids=lambda: secrets.token_hex(4))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    operations = Operations(accounts, registry, store=store, now=lambda: NOW)
    admin = AdminApi(plain, operations, base_urls=(url + "/v1", "https://gridmill.example:443/v1"))
    api = UsageApi(
        plain,
        accounts=accounts,
        registry=registry,
        texts=Words(),  # type: ignore[arg-type]
        store=store,
        wall_clock=lambda: NOW,
    )
    nodes = NodesApi(plain, registry=registry, store=store, clock=lambda: NOW)

    async def door(scope: Any, receive: Any, send: Any) -> None:
        paths = {"/v1/usage": api.usage, "/v1/quote": api.quote, "/v1/nodes": nodes}
        endpoint = paths.get(scope["path"], admin)
        await endpoint(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(door, http=HttpProtocol, lifespan="off", log_config=None, access_log=False))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
            made = Stage(url, http, operations, store)
            made.registry, made.accounts = registry, accounts
            made.key = (await operations.keys_create("op", "operator"))["api_key"]
            yield made
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, 10)
        listener.close()
        await store.close()


def over_a_socket(body: Callable[[Stage], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    async def run(folder: Path) -> None:
        async with stage(folder) as made:
            await body(made)

    def test(tmp_path: Path) -> None:
        asyncio.run(run(tmp_path))

    test.__name__ = body.__name__
    return test


# ---------------------------------------------------------------- the operator's API


@over_a_socket
async def test_an_operator_makes_an_account_a_key_and_credit_over_http(made: Stage) -> None:
    status, account = await made.ask("POST", "accounts", {"name": "acme"})
    assert status == 200
    path = f"accounts/{account['account_id']}"
    status, key = await made.ask(
        "POST",
        "keys",
        {"name": "ci", "account": "acme", "scopes": ["inference", "node"], "budget": "1.5", "expires": "30d"},
    )
    assert (status, key["scope"], key["budget_nanocredits"]) == (200, "inference,node", 1_500_000_000)
    for repeated in (False, True):
        status, done = await made.ask("POST", f"{path}/credit", {"id": "invoice-1", "amount": "2.5"})
        assert (status, done["available_nanocredits"], done["repeated"]) == (200, 2_500_000_000, repeated)
    status, done = await made.ask("POST", f"{path}/credit", {"id": "back", "amount_nanocredits": -500_000_000})
    assert (status, done["available_nanocredits"]) == (200, 2_000_000_000)
    status, shown = await made.ask("GET", path)
    assert (shown["name"], shown["available_nanocredits"], len(shown["keys"])) == ("acme", 2_000_000_000, 1)
    assert {row["name"] for row in (await made.ask("GET", "accounts"))[1]["data"]} == {"acme", "op"}
    assert len((await made.ask("GET", "keys?account=acme"))[1]["data"]) == 1
    assert (await made.ask("GET", "ledger/balance?account=acme"))[1]["available_nanocredits"] == 2_000_000_000
    assert len((await made.ask("GET", "ledger/balance"))[1]["data"]) == 2
    assert len((await made.ask("GET", "ledger/history?account=acme&limit=1"))[1]["data"]) == 1
    assert (await made.ask("POST", "ledger/check"))[1]["problems"] == []
    assert (await made.ask("GET", "status"))[1]["running"] is False
    assert (await made.ask("GET", "classes"))[1] == {"object": "list", "data": []}
    assert (await made.ask("GET", "usage"))[1] == {"object": "list", "data": []}
    assert (await made.ask("GET", "/v1/usage", key=key["api_key"]))[0] == 200
    assert (await made.ask("POST", f"{path}/freeze"))[1]["frozen_seconds"] == int(NOW)
    assert await made.code("GET", "/v1/usage", key=key["api_key"]) == (401, "invalid_api_key")
    assert (await made.ask("POST", f"{path}/unfreeze", {}))[1]["frozen_seconds"] is None
    assert (await made.ask("DELETE", f"keys/{key['key_id']}"))[0] == 200
    assert await made.code("GET", "/v1/usage", key=key["api_key"]) == (401, "invalid_api_key")


@over_a_socket
async def test_only_a_key_for_operators_opens_it(made: Stage) -> None:
    other = (await made.do.keys_create("user", "inference,node"))["api_key"]
    for path in ("accounts", "status", "nothing-here"):
        assert await made.code("GET", path, key=other) == (403, "insufficient_scope")
        assert await made.code("GET", path, key="gm-guess") == (401, "invalid_api_key")
    async with made.http.get(made.url + PREFIX + "status") as response:
        assert (response.status, response.headers["www-authenticate"]) == (401, "Bearer")
    assert await made.code("GET", "/v1/usage") == (403, "insufficient_scope")


@over_a_socket
async def test_a_page_of_another_site_is_refused_before_its_key_is_looked_at(made: Stage) -> None:
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": made.url + ".evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        for key in (made.key, "gm-guess"):
            assert await made.code("POST", "accounts", {"name": "x"}, key=key, **headers) == (403, "cross_origin")
    for headers in ({"origin": made.url, "sec_fetch_site": "same-origin"}, {"origin": "https://gridmill.example"}):
        assert (await made.ask("GET", "status", **headers))[0] == 200
    assert (await made.ask("OPTIONS", "accounts", origin=made.url))[0] == 405
    assert len((await made.ask("GET", "accounts"))[1]["data"]) == 1, "nothing was made"


@over_a_socket
async def test_what_cannot_be_is_refused_with_a_status_that_says_whose_fault(made: Stage) -> None:
    await made.do.accounts_create("acme")
    assert await made.code("GET", "nothing-here") == (404, "unknown_url")
    assert await made.code("GET", "keys/") == (404, "unknown_url")
    assert await made.code("DELETE", "accounts") == (405, "method_not_allowed")
    assert await made.code("GET", "accounts/nobody") == (404, "not_found")
    assert await made.code("DELETE", "keys/nobody") == (404, "not_found")
    assert await made.code("GET", "keys?colour=red") == (400, "invalid_query")
    assert await made.code("GET", "keys?account=a&account=b") == (400, "invalid_query")
    assert await made.code("GET", "ledger/history?account=acme&limit=0") == (400, "invalid_request")
    assert await made.code("POST", "accounts", {"name": ""}) == (400, "invalid_request")
    for body in ({"name": 5}, {}, {"name": "a", "colour": "red"}, b"{", b"\xff", b"[" * 60_000):
        assert await made.code("POST", "accounts", body) == (400, "invalid_body")
    big = b'{"name": "' + b"a" * BODY_BYTES_MAX + b'"}'
    assert await made.code("POST", "accounts", big) == (413, "body_too_large")
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert await made.code("POST", "accounts", {"name": "x"}, content_type=kind) == (415, "not_json")
    credit = "accounts/acme/credit"
    assert await made.code("POST", credit, {"id": "a"}) == (400, "missing_amount")
    assert await made.code("POST", credit, {"amount": "1"}) == (400, "invalid_body")
    assert await made.code("POST", credit, {"id": "a", "amount": 2.5}) == (400, "invalid_body")
    assert await made.code("POST", credit, {"id": "a", "amount_nanocredits": 2.5}) == (400, "invalid_body")
    assert await made.code("POST", credit, {"id": "a", "amount": "1e3"}) == (400, "invalid_value")
    assert await made.code("POST", credit, {"id": "a", "amount": "1", "amount_nanocredits": 5}) == (
        400,
        "invalid_value",
    )
    assert await made.code("POST", credit, {"id": "a", "amount": "-1"}) == (409, "conflict")
    assert (await made.ask("POST", credit, {"id": "a", "amount": "1"}))[0] == 200
    assert await made.code("POST", credit, {"id": "a", "amount": "2"}) == (409, "conflict")
    assert len((await made.ask("GET", "accounts"))[1]["data"]) == 2, "nothing else was made"


@over_a_socket
async def test_what_breaks_on_our_side_is_a_500_without_details(made: Stage) -> None:
    await made.store.run(lambda tx: tx.do("DROP TABLE usage_days"))
    status, said = await made.ask("GET", "usage")
    assert (status, said["error"]["code"]) == (500, "internal_error")
    assert "usage_days" not in said["error"]["message"]


# ---------------------------------------------------------------- usage and quotes


@over_a_socket
async def test_a_key_sees_what_its_account_used_and_has_left(made: Stage) -> None:
    key = await made.do.keys_create("ci", budget_nanocredits=100)
    other = await made.do.keys_create("web", account="ci")
    stranger = await made.do.keys_create("stranger")
    await made.do.credit("ci", 5_000)
    rows = [
        usage.UsageRow(key["account_id"], key["key_id"], "demo", 20_778, 1, 10, 3, 5, 70),
        usage.UsageRow(key["account_id"], other["key_id"], "demo", 20_777, 2, 20, 0, 5, 30),
        usage.UsageRow(stranger["account_id"], stranger["key_id"], "demo", 20_778, 9, 9, 9, 9, 9),
    ]
    await made.store.run(lambda tx: usage.add(tx, rows))
    status, said = await made.ask("GET", "/v1/usage", key=key["api_key"])
    assert status == 200
    assert said["account"] == {
        "account_id": key["account_id"],
        "name": "ci",
        "available_nanocredits": 5_000,
        "held_nanocredits": 0,
    }
    assert (said["key"]["budget_nanocredits"], said["key"]["budget_left_nanocredits"]) == (100, 100)
    assert [(row["day"], row["requests"]) for row in said["usage"]] == [("2026-11-20", 2), ("2026-11-21", 1)]
    assert said["total"] == {
        "requests": 3,
        "input_tokens": 30,
        "cached_tokens": 3,
        "output_tokens": 10,
        "charge_nanocredits": 100,
    }
    assert "nodes" not in said
    _, said = await made.ask("GET", "/v1/usage?from=2026-11-21&to=2026-11-21&group=key", key=key["api_key"])
    assert [(row["key"], row["charge_nanocredits"]) for row in said["usage"]] == [(key["key_id"], 70)]
    for query in ("from=today", "group=colour", "colour=red", "from=2026-11-21&to=2026-11-20", "from", "%ff=1"):
        assert await made.code("GET", f"/v1/usage?{query}", key=key["api_key"]) == (400, "invalid_query")
    _, said = await made.ask("GET", "/v1/usage?from=2026-01-01&to=2026-01-02", key=key["api_key"])
    assert (said["usage"], said["total"]["requests"]) == ([], 0)


@over_a_socket
async def test_a_key_for_nodes_sees_earnings_and_no_usage(made: Stage) -> None:
    key = await made.do.keys_create("farm", "node")
    status, said = await made.ask("GET", "/v1/usage", key=key["api_key"])
    assert (status, said["nodes"], said["earned_nanocredits"]) == (200, [], 0)
    assert "usage" not in said


@over_a_socket
async def test_a_quote_says_what_is_held_and_what_all_tokens_cost(made: Stage) -> None:
    key = (await made.do.keys_create("ci"))["api_key"]
    await made.do.credit("ci", 5_000)
    status, said = await made.ask("GET", "/v1/quote?model=demo&input_tokens=10&max_tokens=4", key=key)
    assert status == 200
    cheap, dear = (10 * 10 + 4 * 100) * 11 // 10, (10 * 20 + 4 * 200) * 11 // 10
    assert (said["hold_nanocredits"], said["least_nanocredits"]) == (dear, cheap)
    assert said["available_nanocredits"] == 5_000
    assert [(offer["price_id"], offer["nodes"], offer["most_nanocredits"]) for offer in said["offers"]] == [
        ("price-1", 2, cheap),
        ("price-2", 1, dear),
    ]
    _, said = await made.ask("GET", "/v1/quote?model=demo&input_tokens=10&max_tokens=4&max_price_output=110", key=key)
    assert (said["hold_nanocredits"], [o["within_max_price"] for o in said["offers"]]) == (cheap, [True, False])
    _, said = await made.ask("GET", "/v1/quote?model=demo&input_tokens=10&max_price_input=1", key=key)
    assert (said["hold_nanocredits"], said["max_tokens"]) == (None, 118)
    _, said = await made.ask("GET", "/v1/quote?model=demo&input_tokens=100&max_tokens=128", key=key)
    assert said["max_tokens"] == 28, "cut to what fits, as the request would be"
    _, said = await made.ask("POST", "/v1/quote", {"model": "demo", "prompt": "one two three"}, key=key)
    assert said["input_tokens"] == 7


@over_a_socket
async def test_a_quote_that_cannot_be_made_names_the_parameter(made: Stage) -> None:
    key = (await made.do.keys_create("ci"))["api_key"]
    for query, code in (
        ("input_tokens=1", "invalid_query"),
        ("model=nothing&input_tokens=1", "model_not_found"),
        ("model=demo", "invalid_value"),
        ("model=demo&input_tokens=0", "invalid_value"),
        ("model=demo&input_tokens=-5", "invalid_value"),
        ("model=demo&input_tokens=128", "context_length_exceeded"),
        ("model=demo&input_tokens=100&max_tokens=129", "invalid_value"),
        ("model=demo&input_tokens=100&max_tokens=0", "invalid_value"),
        ("model=demo&input_tokens=many", "invalid_query"),
    ):
        status, found = await made.code("GET", f"/v1/quote?{query}", key=key)
        assert (found, status) == (code, 404 if code == "model_not_found" else 400), query
    assert await made.code("POST", "/v1/quote", {"model": "demo", "prompt": "busy"}, key=key) == (503, "text_busy")
    assert await made.code("DELETE", "/v1/quote", key=key) == (405, "method_not_allowed")
    assert await made.code("POST", "/v1/usage", {}, key=key) == (405, "method_not_allowed")


@over_a_socket
async def test_a_keys_limit_counts_here_too(made: Stage) -> None:
    key = (await made.do.keys_create("ci", requests_per_minute=2))["api_key"]
    assert [(await made.ask("GET", "/v1/usage", key=key))[0] for _ in range(3)] == [200, 200, 429]
