"""Plain JSON requests: who asks, what with, and one answer. For the APIs here that make no text.

Errors have OpenAI's shape, as everywhere. Requests are logged with who asked and how it ended, never with a body.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from gridmill.network.accounts import Account, Accounts
from gridmill.network.control import ControlError
from gridmill.network.gateway.asgi import JSON, ApiError, Client, ClientGone, Receive, Scope, Send, header
from gridmill.network.gateway.callers import (
    BODY_TIMEOUT_SECONDS,
    CLIENT_LEFT_STATUS,
    GatewayMetrics,
    NoMetrics,
    allow_only,
    authenticate,
    ended,
    our_fault,
    retry_after,
    within_rate,
)
from gridmill.network.gateway.exchange import Exchange
from gridmill.network.limits import Limits
from gridmill.network.operator import Conflict, Unknown
from gridmill.network.registry import UnknownModel
from gridmill.network.store import StoreUnusable
from gridmill.network.text import TextError

log = logging.getLogger("gridmill.network.gateway")

BODY_BYTES_MAX = 64 << 10  # names, amounts, one prompt to be counted
QUERY_FIELDS_MAX = 32
STORE_RETRY_SECONDS = 5
NO_STORE = (b"cache-control", b"no-store")  # balances and keys are nobody else's to keep

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class Plain:
    """What all plain endpoints of a network share. `clock` is monotonic seconds."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        limits: Limits,
        clock: Callable[[], float],
        request_ids: Callable[[], str],
        metrics: GatewayMetrics | None = None,
        client_stall_timeout_seconds: float = 60.0,
    ) -> None:
        self._accounts = accounts
        self._limits = limits
        self._clock = clock
        self._request_ids = request_ids
        self._metrics: GatewayMetrics = metrics or NoMetrics()
        self._stall_timeout_seconds = client_stall_timeout_seconds

    async def serve(
        self,
        endpoint: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        scopes: Collection[str],
        handle: Callable[[Account, Asked], Awaitable[Any]],
        allow: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        """One exchange. The key must have one of `scopes`; `allow` may refuse before anything is looked at."""
        client = Client(scope, receive, send, clock=self._clock, stall_timeout_seconds=self._stall_timeout_seconds)
        exchange = Exchange(client, endpoint, "req-" + self._request_ids(), self._clock)
        try:
            allow(scope)
            account = self._authenticate(scope, exchange, scopes)
            body = _encode(await handle(account, Asked(scope, client)))
            with client.present():
                await exchange.answer(200, body, [NO_STORE])
        except ClientGone as gone:
            exchange.status, exchange.code = CLIENT_LEFT_STATUS, f"client_{gone}"
        except asyncio.CancelledError:
            exchange.status, exchange.code = 503, "stopped"
            raise
        except Exception as error:  # noqa: BLE001 - the one place that turns what went wrong into an answer
            refusal = _as_api_error(error)
            refusal.headers = [*refusal.headers, NO_STORE]
            await exchange.refuse(refusal)
        finally:
            ended(exchange, self._metrics)

    def _authenticate(self, scope: Scope, exchange: Exchange, scopes: Collection[str]) -> Account:
        account = authenticate(self._accounts, exchange, scope)
        if not account.scopes & set(scopes):
            wanted = " (or ".join(scopes) + ")" * (len(scopes) - 1)
            raise ApiError(
                403,
                "insufficient_scope",
                f"this key is not for that: make one with `gridmill keys create NAME --scope {wanted}`",
            )
        within_rate(self._limits, account, self._clock())
        return account


class Asked:
    """What one caller sent."""

    def __init__(self, scope: Scope, client: Client) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._scope = scope
        self._client = client

    def query(self, kind: type[T]) -> T:
        """The query string as this struct. Raises ApiError."""
        try:
            pairs = parse_qsl(
                self._scope["query_string"].decode("ascii"),
                keep_blank_values=True,
                strict_parsing=bool(self._scope["query_string"]),
                errors="strict",
                max_num_fields=QUERY_FIELDS_MAX,
            )
            values = dict(pairs)
            if len(values) < len(pairs):
                raise ApiError(400, "invalid_query", "each parameter of the query may be given once")
            return msgspec.convert(values, kind, strict=False)
        except ValueError as problem:  # msgspec's own is one
            raise ApiError(400, "invalid_query", f"the query cannot be used: {problem}") from problem

    async def body(self, kind: type[T]) -> T:
        """The JSON body as this struct; an empty one is an empty object. Raises ApiError."""
        content_type = (header(self._scope, b"content-type") or b"").partition(b";")[0].strip().lower()
        if content_type != JSON:
            raise ApiError(415, "not_json", "send 'content-type: application/json' with the request")
        raw = await self._client.read_body(BODY_BYTES_MAX, BODY_TIMEOUT_SECONDS)
        try:
            return msgspec.json.decode(raw or b"{}", type=kind)
        except (ValueError, RecursionError) as problem:
            raise ApiError(400, "invalid_body", f"the request body cannot be used: {problem}") from problem


def only(method: str) -> Callable[[Scope], None]:
    """For `serve`: refuses every other method."""
    return lambda scope: allow_only(scope, method)


def _as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case Unknown():
            return ApiError(404, "not_found", str(error))
        case Conflict():
            return ApiError(409, "conflict", str(error))
        case ControlError():
            return ApiError(400, "invalid_request", str(error))
        case UnknownModel():
            return ApiError(404, "model_not_found", error.reason, param="model")
        case TextError(fault="network"):
            return ApiError(503, error.code, error.detail, headers=[retry_after(STORE_RETRY_SECONDS)])
        case TextError():
            return ApiError(400, error.code, error.detail, param="prompt")
        case StoreUnusable():
            log.error("the database cannot be used", extra={"reason": str(error)[:300]})
            return ApiError(
                503,
                "store_unusable",
                "the network's database does not answer: try again shortly",
                headers=[retry_after(STORE_RETRY_SECONDS)],
            )
        case _:
            return our_fault(error)
