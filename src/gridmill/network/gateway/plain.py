"""Plain JSON requests: who asks, what with, and one answer. For the APIs here that make no text.

Errors have OpenAI's shape, as everywhere. Requests are logged with who asked and how it ended, never with a body.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from gridmill.network.accounts import Account, Accounts
from gridmill.network.control import ControlError
from gridmill.network.gateway.asgi import JSON, ApiError, Client, ClientGone, Headers, Receive, Scope, Send, header
from gridmill.network.gateway.openai import BODY_TIMEOUT_SECONDS, CLIENT_LEFT_STATUS, GatewayMetrics, NoMetrics
from gridmill.network.limits import Limits
from gridmill.network.operator import Conflict, Unknown
from gridmill.network.registry import UnknownModel
from gridmill.network.store import StoreUnusable
from gridmill.network.text import TextError

log = logging.getLogger("gridmill.network.gateway")

BODY_BYTES_MAX = 64 << 10  # names, amounts, one prompt to be counted
QUERY_FIELDS_MAX = 32
STORE_RETRY_SECONDS = 5

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
        request_id = "req-" + self._request_ids()
        headers: Headers = [(b"x-gridmill-request-id", request_id.encode()), (b"cache-control", b"no-store")]
        started = self._clock()
        account: Account | None = None
        status, code = 200, None
        try:
            try:
                allow(scope)
                account = self._authenticate(scope, scopes)
                body = _encode(await handle(account, Asked(scope, client)))
            except (ApiError, ClientGone):
                raise
            except Exception as error:  # the one place that turns what went wrong into an answer
                raise _as_api_error(error) from error
            with client.present():
                await client.answer(200, body, JSON, headers)
        except ApiError as error:
            status, code = error.status, error.code
            try:
                with client.present():
                    await client.answer(error.status, error.body(), JSON, [*headers, *error.headers])
            except ClientGone:
                pass  # nobody to tell
        except ClientGone as gone:
            status, code = CLIENT_LEFT_STATUS, f"client_{gone}"
        except asyncio.CancelledError:
            status, code = 503, "stopped"
            raise
        finally:
            self._metrics.request_ended(endpoint, status)
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "endpoint": endpoint,
                    "account": account.account_id if account else None,
                    "key": account.key_id if account else None,
                    "status": status,
                    "code": code,
                    "duration_seconds": round(self._clock() - started, 6),
                },
            )

    def _authenticate(self, scope: Scope, scopes: Collection[str]) -> Account:
        challenge: Headers = [(b"www-authenticate", b"Bearer")]
        offered = header(scope, b"authorization")
        if offered is None:
            raise ApiError(
                401,
                "missing_api_key",
                "no API key was sent: put 'Authorization: Bearer KEY' on the request (`gridmill keys create NAME`)",
                headers=challenge,
            )
        scheme, _, key = offered.decode("latin-1").partition(" ")
        account = self._accounts.authenticate(key.strip()) if scheme.lower() == "bearer" else None
        if account is None:
            raise ApiError(401, "invalid_api_key", self._accounts.why_not(key.strip()), headers=challenge)
        if not account.scopes & set(scopes):
            wanted = " (or ".join(scopes) + ")" * (len(scopes) - 1)
            raise ApiError(
                403,
                "insufficient_scope",
                f"this key is not for that: make one with `gridmill keys create NAME --scope {wanted}`",
            )
        retry_after = self._limits.admit(account, self._clock())
        if retry_after is not None:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"this key may ask {account.requests_per_minute} times per minute: ask again when Retry-After says",
                headers=[_retry_after(retry_after)],
            )
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

    def allow(scope: Scope) -> None:
        if scope["method"] != method:
            raise method_not_allowed(scope, [method])

    return allow


def method_not_allowed(scope: Scope, methods: Collection[str]) -> ApiError:
    words = ", ".join(sorted(methods))
    return ApiError(
        405,
        "method_not_allowed",
        f"this path takes {words}, not {scope['method'][:20]}",
        headers=[(b"allow", words.encode())],
    )


def _as_api_error(error: Exception) -> ApiError:
    match error:
        case Unknown():
            return ApiError(404, "not_found", str(error))
        case Conflict():
            return ApiError(409, "conflict", str(error))
        case ControlError():
            return ApiError(400, "invalid_request", str(error))
        case UnknownModel():
            return ApiError(404, "model_not_found", error.reason, param="model")
        case TextError(fault="network"):
            return ApiError(503, error.code, error.detail, headers=[_retry_after(STORE_RETRY_SECONDS)])
        case TextError():
            return ApiError(400, error.code, error.detail, param="prompt")
        case StoreUnusable():
            log.error("the database cannot be used", extra={"reason": str(error)[:300]})
            return ApiError(
                503,
                "store_unusable",
                "the network's database does not answer: try again shortly",
                headers=[_retry_after(STORE_RETRY_SECONDS)],
            )
        case _:
            log.error("a request failed inside the gateway", exc_info=error)
            return ApiError(
                500, "internal_error", "something went wrong on our side; the request id helps us to find it"
            )


def _retry_after(seconds: float) -> tuple[bytes, bytes]:
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()
