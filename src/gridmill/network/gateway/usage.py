"""What a key used and earned (`GET /v1/usage`), and what a request would cost (`/v1/quote`). Amounts in nanocredits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from gridmill.network import balances, ledger, usage
from gridmill.network.accounts import Account, Accounts
from gridmill.network.gateway.asgi import ApiError, Receive, Scope, Send
from gridmill.network.gateway.callers import method_not_allowed
from gridmill.network.gateway.plain import Asked, Plain, only
from gridmill.network.metering import DEFAULT_MAX_TOKENS, PriceRow, most, within
from gridmill.network.registry import ModelCard, Registry
from gridmill.network.store import Store, Transaction
from gridmill.network.text import TextService
from gridmill.wire.codec import PRICE_NANOCREDITS_MAX
from gridmill.wire.messages import Price

_TOTAL_OF_NOTHING = {
    "requests": 0,
    "input_tokens": 0,
    "cached_tokens": 0,
    "output_tokens": 0,
    "charge_nanocredits": 0,
}


class UsageQuery(msgspec.Struct, forbid_unknown_fields=True, rename={"since": "from", "until": "to"}):
    """`from` and `to` are days, both included; `group` is a comma list of day, model, key."""

    since: str | None = None
    until: str | None = None
    group: str = "day,model"


class QuoteAsked(msgspec.Struct, forbid_unknown_fields=True):
    """`prompt` is counted as one chat message, or as it is where the model has no chat template. Prices are per token,
    in nanocredits, the network's fee included."""

    model: str
    input_tokens: int | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    max_price_input: int | None = None
    max_price_output: int | None = None


class UsageApi:
    """The endpoints, each an ASGI application. `wall_clock` is Unix seconds."""

    def __init__(
        self,
        plain: Plain,
        *,
        accounts: Accounts,
        registry: Registry,
        texts: TextService,
        store: Store,
        wall_clock: Callable[[], float],
    ) -> None:
        self._plain = plain
        self._accounts = accounts
        self._registry = registry
        self._texts = texts
        self._store = store
        self._wall_clock = wall_clock

    async def usage(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/usage"""
        await self._plain.serve(
            "usage", scope, receive, send, scopes=("inference", "node"), handle=self._usage, allow=only("GET")
        )

    async def quote(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/quote, or POST with a prompt to be counted, which has no business in a URL"""

        def allow(scope: Scope) -> None:
            if scope["method"] not in ("GET", "POST"):
                raise method_not_allowed(scope, ("GET", "POST"))

        await self._plain.serve("quote", scope, receive, send, scopes=("inference",), handle=self._quote, allow=allow)

    async def _usage(self, account: Account, asked: Asked) -> dict[str, Any]:
        query = asked.query(UsageQuery)
        try:
            span = usage.Span.parse(query.since, query.until, self._wall_clock())
            group = usage.parse_group(query.group)
        except ValueError as problem:
            raise ApiError(400, "invalid_query", str(problem)) from problem
        asks, serves = "inference" in account.scopes, "node" in account.scopes

        async def read(transaction: Transaction) -> tuple[Any, ...]:
            return (
                await balances.of_user(transaction, account.account_id),
                await ledger.key_budget(transaction, account.key_id),
                await usage.read(transaction, account.account_id, span) if asks else [],
                await usage.earned(transaction, account.account_id, span) if serves else [],
            )

        (available, held), budget, used, earned = await self._store.read(read)
        answer: dict[str, Any] = {
            "object": "usage",
            "from": usage.day_text(span.since),
            "to": usage.day_text(span.until),
            "account": {
                "account_id": account.account_id,
                "name": self._accounts.account(account.account_id).name,
                "available_nanocredits": available,
                "held_nanocredits": held,
            },
            "key": {
                "key_id": account.key_id,
                "name": account.name,
                "scopes": sorted(account.scopes),
                "requests_per_minute": account.requests_per_minute,
                "cost_per_minute_nanocredits": account.cost_per_minute_nanocredits,
                "expires_seconds": account.expires_seconds,
                "budget_nanocredits": budget.budget,
                "budget_left_nanocredits": None if budget.budget is None else max(0, budget.budget - budget.committed),
            },
        }
        if asks:
            totals = usage.grouped(used, ())
            answer |= {"usage": usage.grouped(used, group), "total": totals[0] if totals else _TOTAL_OF_NOTHING}
        if serves:
            answer |= {"nodes": earned, "earned_nanocredits": sum(row.pay_nanocredits for row in earned)}
        return answer

    async def _quote(self, account: Account, asked: Asked) -> dict[str, Any]:
        wanted = asked.query(QuoteAsked) if asked.method == "GET" else await asked.body(QuoteAsked)
        card = self._registry.resolve(wanted.model)
        input_tokens = await self._input_tokens(card, wanted)
        room = card.facts.context_tokens - input_tokens
        if room < 1:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"this model's context is {card.facts.context_tokens} tokens, too few for a prompt of {input_tokens}",
                param="input_tokens",
            )
        max_tokens = min(room, DEFAULT_MAX_TOKENS) if wanted.max_tokens is None else wanted.max_tokens
        if not 1 <= max_tokens <= card.facts.context_tokens:
            raise ApiError(
                400,
                "invalid_value",
                f"max_tokens must be between 1 and {card.facts.context_tokens}, this model's context, not {max_tokens}",
                param="max_tokens",
            )
        max_tokens = min(max_tokens, room)  # as the request itself would be cut
        rows = self._registry.prices(card.class_id)
        cap = _cap(wanted)
        costs = [most(row, input_tokens, max_tokens) for row in rows if within(row, cap)]
        available, _ = await self._store.read(lambda tx: balances.of_user(tx, account.account_id))
        return {
            "object": "quote",
            "model": card.name,
            "class_id": card.class_id,
            "input_tokens": input_tokens,
            "max_tokens": max_tokens,
            # What is held when the request begins: the most that it can cost at the dearest node that may get it.
            "hold_nanocredits": max(costs, default=None),
            # What all of these tokens cost at the cheapest. Fewer tokens, and cached ones, cost less.
            "least_nanocredits": min(costs, default=None),
            "available_nanocredits": available,
            "offers": _offers(rows, cap, input_tokens, max_tokens),
        }

    async def _input_tokens(self, card: ModelCard, wanted: QuoteAsked) -> int:
        if (wanted.input_tokens is None) == (wanted.prompt is None):
            raise ApiError(400, "invalid_value", "give either input_tokens or, in a POST, prompt", param="input_tokens")
        if wanted.input_tokens is not None:
            if wanted.input_tokens < 1:
                raise ApiError(400, "invalid_value", "input_tokens must be at least 1", param="input_tokens")
            return wanted.input_tokens
        assert wanted.prompt is not None
        if card.facts.chat_template:
            return len(await self._texts.encode_chat(card.class_id, [{"role": "user", "content": wanted.prompt}]))
        return len(await self._texts.encode(card.class_id, wanted.prompt))


def _cap(wanted: QuoteAsked) -> Price | None:
    if wanted.max_price_input is None and wanted.max_price_output is None:
        return None
    given = (wanted.max_price_input, wanted.max_price_output)
    into, out = (PRICE_NANOCREDITS_MAX if price is None else price for price in given)
    return Price(into, into, out)


def _offers(rows: list[PriceRow], cap: Price | None, input_tokens: int, max_tokens: int) -> list[dict[str, Any]]:
    """Each price that nodes ask now, the cheapest first."""
    nodes: dict[PriceRow, int] = {}
    for row in rows:
        nodes[row] = nodes.get(row, 0) + 1
    return [
        {
            "price_id": row.price_id,
            "nodes": count,
            "input_nanocredits": row.price.input_nanocredits,
            "cached_input_nanocredits": row.price.cached_input_nanocredits,
            "output_nanocredits": row.price.output_nanocredits,
            "fee_basis_points": row.fees.fee_basis_points,
            "most_nanocredits": most(row, input_tokens, max_tokens),
            "within_max_price": within(row, cap),
        }
        for row, count in sorted(nodes.items(), key=lambda item: most(item[0], input_tokens, max_tokens))
    ]
