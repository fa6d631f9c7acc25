"""Who asks, and whether they may: keys, rate limits, methods, with the same sentences for all APIs of the gateway."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Protocol

from gridmill.network.accounts import Account, Accounts
from gridmill.network.gateway.asgi import ApiError, Headers, Scope, header
from gridmill.network.gateway.exchange import Exchange
from gridmill.network.limits import Limits

log = logging.getLogger("gridmill.network.gateway")

BODY_TIMEOUT_SECONDS = 30.0
CLIENT_LEFT_STATUS = 499  # only in logs and counters: nobody was there to get an answer


class GatewayMetrics(Protocol):
    """What the gateway counts. Calls are cheap and never fail."""

    def request_ended(self, endpoint: str, status: int) -> None: ...
    def prompt_accepted(self, tokens: int) -> None: ...


class NoMetrics:
    """Counts nothing."""

    def request_ended(self, endpoint: str, status: int) -> None:
        pass

    def prompt_accepted(self, tokens: int) -> None:
        pass


def authenticate(accounts: Accounts, exchange: Exchange, scope: Scope) -> Account:
    """The account of the request's key, noted in the exchange for its log line. Raises ApiError (401)."""
    offered = header(scope, b"authorization")
    challenge: Headers = [(b"www-authenticate", b"Bearer")]
    if offered is None:
        raise ApiError(
            401,
            "missing_api_key",
            "no API key was sent: put 'Authorization: Bearer KEY' on the request (`gridmill keys create NAME`)",
            headers=challenge,
        )
    scheme, _, key = offered.decode("latin-1").partition(" ")
    account = accounts.authenticate(key.strip()) if scheme.lower() == "bearer" else None
    if account is None:
        raise ApiError(401, "invalid_api_key", accounts.why_not(key.strip()), headers=challenge)
    exchange.account_id, exchange.key_id = account.account_id, account.key_id
    return account


def within_rate(limits: Limits, account: Account, now: float) -> None:
    """Counts one request of this key. Raises ApiError (429)."""
    seconds = limits.admit(account, now)
    if seconds is not None:
        raise ApiError(
            429,
            "rate_limit_exceeded",
            f"this key may ask {account.requests_per_minute} times per minute: try again in {math.ceil(seconds)} s",
            headers=[retry_after(seconds)],
        )


def allow_only(scope: Scope, *methods: str) -> None:
    """Raises ApiError (405) for every other method."""
    if scope["method"] not in methods:
        raise method_not_allowed(scope, methods)


def method_not_allowed(scope: Scope, methods: Collection[str]) -> ApiError:
    words = ", ".join(sorted(methods))
    return ApiError(
        405,
        "method_not_allowed",
        f"this path takes {words}, not {scope['method'][:20]}",
        headers=[(b"allow", words.encode())],
    )


def our_fault(error: Exception) -> ApiError:
    """What nobody foresaw: the log has all of it, the caller a way to ask about it."""
    log.error("a request failed inside the gateway", exc_info=error)
    return ApiError(500, "internal_error", "something went wrong on our side; the request id helps us to find it")


def retry_after_exactly(seconds: float) -> Headers:
    """For predictions: OpenAI's own clients read the milliseconds."""
    return [retry_after(seconds), (b"retry-after-ms", str(max(1, math.ceil(seconds * 1000))).encode())]


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()


def ended(exchange: Exchange, metrics: GatewayMetrics) -> None:
    """One exchange is over: it is counted, and written to the log without a body."""
    metrics.request_ended(exchange.endpoint, exchange.status)
    if log.isEnabledFor(logging.INFO):
        log.info("request", extra=exchange.log_fields())
