"""OpenAI's API over the network: parse → works → stream or answer. Nothing outside this folder knows that API.

- A choice is a Work of its own; `n` choices of one prompt share its ids, and the prompt is counted once in `usage`.
- The head of a stream leaves when a node has accepted, so that everything which goes wrong before is a plain JSON error
  with its status. After it an error is one `data: {"error": …}` event, and the stream ends without `[DONE]`.
- Tokens cross this file as bytes: a prefix and a suffix are made once per choice, and all that one step brought to a
  caller leaves in one send.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gridmill.network.accounts import Account, Accounts
from gridmill.network.books import Books, Insufficient, Order, Unavailable
from gridmill.network.credits import show_credits
from gridmill.network.detokenise import ClassText
from gridmill.network.dispatch import Dispatcher
from gridmill.network.faults import CallerFault, Enough, NodeFault, NoRoom
from gridmill.network.gateway.asgi import (
    ApiError,
    Client,
    ClientGone,
    Receive,
    Scope,
    Send,
    header,
)
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
    retry_after_exactly,
    within_rate,
)
from gridmill.network.gateway.exchange import Exchange
from gridmill.network.gateway.idempotent import (
    Incomplete,
    Making,
    Plan,
    RunsElsewhere,
    SharedAnswers,
    first_cause,
    show,
)
from gridmill.network.gateway.rendering import ChatFormat, Choice, CompletionFormat, Format
from gridmill.network.gateway.requests import (
    MAX_WAIT_HEADER,
    ChatRequest,
    CompletionRequest,
    RequestError,
    parse_max_wait,
)
from gridmill.network.gateway.showing import Showing
from gridmill.network.idempotency import KEY_CHARACTERS_MAX, Asked, KeyReused, Part, hash_of_body, hash_of_key
from gridmill.network.limits import Limits
from gridmill.network.metering import DEFAULT_MAX_TOKENS, PriceRow, cheapest, most, within
from gridmill.network.registry import ModelCard, Registry, UnknownModel
from gridmill.network.scheduler import explained
from gridmill.network.settlement import Payer
from gridmill.network.store import StoreUnusable
from gridmill.network.text import TextError, TextService
from gridmill.wire.classes import TextFacts
from gridmill.wire.messages import Emission, Generate
from gridmill.wire.sampling import base_seed, choice_seed, pack_ids, problem_with

log = logging.getLogger("gridmill.network.gateway")

RETRY_AFTER_TEXT_SECONDS = 5
CACHE_SALTS_REMEMBERED = 4096  # accounts that ask at about the same time; each takes 200 bytes
RETRY_AFTER_RUNNING_SECONDS = 5
WHY_HEADER = b"x-gridmill-why"

_encode = msgspec.json.Encoder().encode


class OpenAIGateway:
    """The endpoints, each an ASGI application: chat_completions, completions, models, model, unknown_path.

    `clock` is monotonic seconds, `wall_clock` Unix seconds; `request_ids` makes a new unguessable word each time.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        accounts: Accounts,
        texts: TextService,
        dispatcher: Dispatcher,
        books: Books,
        limits: Limits,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        request_ids: Callable[[], str],
        gateway_secret: bytes,
        metrics: GatewayMetrics | None = None,
        shared: SharedAnswers | None = None,
        body_bytes: int = 4 << 20,
        body_timeout_seconds: float = BODY_TIMEOUT_SECONDS,
        client_stall_timeout_seconds: float = 60.0,
    ) -> None:
        self.registry = registry
        self.accounts = accounts
        self.texts = texts
        self.dispatcher = dispatcher
        self.books = books
        self.limits = limits
        self.clock = clock
        self.wall_clock = wall_clock
        self.request_ids = request_ids
        self.gateway_secret = gateway_secret
        self.metrics: GatewayMetrics = metrics or NoMetrics()
        self.shared = shared
        self.body_bytes = body_bytes
        self.body_timeout_seconds = body_timeout_seconds
        self.client_stall_timeout_seconds = client_stall_timeout_seconds
        self._cache_salts: dict[tuple[str, str], bytes] = {}

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions"""
        await self._generate(ChatFormat, scope, receive, send)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions"""
        await self._generate(CompletionFormat, scope, receive, send)

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models"""

        def listing() -> dict[str, Any]:
            return {"object": "list", "data": [_model_object(card) for card in self.registry.model_cards()]}

        await self._look_up("models", listing, scope, receive, send)

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models/{name}; a name may hold slashes."""

        def one() -> dict[str, Any]:
            return _model_object(self.registry.resolve(scope["path"].partition("/v1/models/")[2]))

        await self._look_up("models", one, scope, receive, send)

    async def unknown_path(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whatever is not here (404)."""
        exchange = self._exchange("unknown", "req-", scope, receive, send)
        path = scope["path"] if len(scope["path"]) <= 100 else scope["path"][:100] + "…"
        await exchange.refuse(
            ApiError(404, "unknown_url", f"there is no {path} here: the API is under /v1, for example /v1/models")
        )
        ended(exchange, self.metrics)

    # ------------------------------------------------------------ one request, from bytes to works

    async def _generate(self, kind: type[Format], scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange(kind.endpoint, kind.id_prefix, scope, receive, send)
        answer: _Answer | None = None
        try:
            allow_only(scope, "POST")
            account = self._authenticate(scope, exchange)
            within_rate(self.limits, account, self.clock())
            body = await exchange.client.read_body(self.body_bytes, self.body_timeout_seconds)
            request = kind.parse(body)
            wishes = _wishes(scope)
            exchange.model = request.model
            card = self.registry.resolve(request.model)
            exchange.class_id = card.class_id
            idempotency_key = header(scope, b"idempotency-key")
            if idempotency_key is not None:
                body_hash = hash_of_body(scope["path"], body)
                await self._answer_once(kind, request, card, account, wishes, idempotency_key, body_hash, exchange)
                return
            answer = await self._prepare(kind, request, card, account, wishes, exchange)
            await answer.run(self.dispatcher)
        except ClientGone as gone:
            exchange.status, exchange.code = CLIENT_LEFT_STATUS, f"client_{gone}"
        except asyncio.CancelledError:
            exchange.status, exchange.code = 503, "stopped"
            raise
        except Exception as error:  # noqa: BLE001 - the one place that turns what went wrong into an answer
            await exchange.refuse(_as_api_error(error, kind.prompt_param))
        finally:
            if answer is not None:
                answer.release(self.books)
            ended(exchange, self.metrics)

    async def _prepare(
        self,
        kind: type[Format],
        request: ChatRequest | CompletionRequest,
        card: ModelCard,
        account: Account,
        wishes: _Wishes,
        exchange: Exchange,
    ) -> _Answer:
        form = kind(exchange.request_id, int(self.wall_clock()), card, request, self._class_text(card))
        exchange.prompt_tokens, planned = await self._plan(kind, request, card, account, wishes, exchange.request_id)
        answer = _Answer(exchange, form, request)
        hidden = _hidden(request, card)
        for each in planned:
            each.order.settles_later = len(planned) > 1 and not request.stream
            answer.add(each, hidden)
        return answer

    async def _plan(
        self,
        kind: type[Format],
        request: ChatRequest | CompletionRequest,
        card: ModelCard,
        account: Account,
        wishes: _Wishes,
        request_id: str,
        parts: Sequence[Part] = (),
    ) -> tuple[int, list[_Planned]]:
        """Everything that can be refused before a node is asked, in the order in which it gets dearer.

        Returns how many ids all prompts have, and the works with what is held for them. `parts` is what earlier runs
        of the same request delivered of each choice: choices that ended need no work.
        """
        facts = card.facts
        if request.max_tokens is not None and request.max_tokens > facts.context_tokens:
            raise RequestError(
                f"max_tokens must be between 1 and {facts.context_tokens}, this model's context, "
                f"not {request.max_tokens}",
                "max_tokens",
            )
        base = base_seed(request.seed, self.gateway_secret, request_id)
        problem = problem_with(request.sampling(base, request.max_tokens or facts.context_tokens), facts.vocab_size)
        if problem is not None:
            raise RequestError(problem, problem.partition(" ")[0])
        salt = self._cache_salt(account.account_id, request.cache_salt or "")
        wanted: list[_Wanted] = []
        prompt_tokens = 0
        for ids in await kind.encode(self.texts, card.class_id, request):
            max_tokens = min(_room(ids, facts, kind.prompt_param), request.max_tokens or DEFAULT_MAX_TOKENS)
            if request.min_tokens > max_tokens:
                raise RequestError(f"min_tokens must be between 0 and {max_tokens}, all that fits here", "min_tokens")
            prompt_tokens += len(ids)
            prompt = pack_ids(ids)
            wanted += [_Wanted(len(wanted) + i, prompt, len(ids), max_tokens) for i in range(request.n)]
        if parts:
            wanted = [_rest(each, parts[each.index]) for each in wanted if not parts[each.index].kind]
        payer = Payer(account.account_id, account.key_id, account.has_budget)
        held = await self._hold(request, card.class_id, account, payer, wanted) if wanted else []
        planned: list[_Planned] = []
        for want, (max_tokens, amount) in zip(wanted, held, strict=True):
            work_id = f"{request_id}-{want.index}"
            order = self.books.order(payer, work_id, card.class_id, card.name, want.input_tokens, amount)
            order.max_price = request.max_price
            order.allowed = request.routing
            if request.prompt_cache_key:
                order.sticky = f"{account.account_id}\0{request.prompt_cache_key}"
            order.shown = request.stream  # else the caller has nothing until it has all
            order.account_weight = account.weight
            order.flexible = request.service_tier == "flex"
            order.max_wait_seconds = wishes.max_wait_seconds
            order.whys = [] if wishes.why else None
            if amount and account.cost_per_minute_nanocredits is not None:
                order.charged = self._correct_rate(account)
            sampling = request.sampling(choice_seed(base, want.index), len(want.delivered) // 4 + max_tokens)
            # Salted per work, with what no one else can know: hashes in receipts answer no guesses at a text.
            work_salt = hashlib.blake2b(
                work_id.encode(), digest_size=16, key=self.gateway_secret, person=b"receipt-salt-v1"
            ).digest()
            work = Generate(
                work_id, card.class_id, want.prompt, sampling, salt, want.delivered, want.epoch, salt=work_salt
            )
            planned.append(_Planned(want.index, work, order))
        self.metrics.prompt_accepted(prompt_tokens)
        return prompt_tokens, planned

    def _class_text(self, card: ModelCard) -> ClassText:
        try:
            return self.registry.class_text(card.class_id)
        except KeyError:
            raise ApiError(
                503,
                "no_node",
                f"no node that serves {card.name} is here at the moment: try again shortly",
                headers=[retry_after(RETRY_AFTER_TEXT_SECONDS)],
            ) from None

    # ------------------------------------------------------------ one answer for all requests with the same key

    async def _answer_once(
        self,
        kind: type[Format],
        request: ChatRequest | CompletionRequest,
        card: ModelCard,
        account: Account,
        wishes: _Wishes,
        key: bytes,
        body_hash: bytes,
        exchange: Exchange,
    ) -> None:
        """Runs the request detached from its connection, or joins what an earlier one with this key began."""
        key_hash = hash_of_key(key)
        if key_hash is None:
            raise ApiError(
                400,
                "invalid_idempotency_key",
                f"an Idempotency-Key has 1 to {KEY_CHARACTERS_MAX} printable ASCII characters",
            )
        if self.shared is None:
            raise ApiError(400, "idempotency_key_unsupported", "this network keeps no Idempotency-Keys: leave it out")
        prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        asked = Asked(
            account.account_id,
            key_hash,
            body_hash,
            exchange.request_id,
            card.name,
            card.class_id,
            int(self.wall_clock()),
            request.n * prompts,
        )

        def shape(found: Asked) -> tuple[Format, frozenset[int]]:
            # A retry keeps its class, whatever the name means by now.
            its_card = self._card_of(found, card)
            form = kind(found.request_id, found.created_seconds, its_card, request, self._class_text(its_card))
            return form, _hidden(request, its_card)

        async def plan(found: Asked, parts: Sequence[Part]) -> Plan:
            its_card = self._card_of(found, card)
            prompt_tokens, planned = await self._plan(kind, request, its_card, account, wishes, found.request_id, parts)
            return Plan(prompt_tokens, {each.index: (each.work, each.order) for each in planned})

        def explain(error: Exception) -> ApiError:
            return _as_api_error(error, kind.prompt_param)

        scored = request.top_logprobs is not None
        recording = self.shared.join(asked, Making(shape, plan, explain, scored))
        await show(recording, exchange, request, shape)

    def _card_of(self, asked: Asked, card: ModelCard) -> ModelCard:
        if asked.class_id == card.class_id:
            return card
        return self.registry.resolve(f"{asked.model}@{asked.class_id}")

    # ------------------------------------------------------------ money

    async def _hold(
        self,
        request: ChatRequest | CompletionRequest,
        class_id: str,
        account: Account,
        payer: Payer,
        wanted: Sequence[_Wanted],
    ) -> list[tuple[int, int]]:
        """(max_tokens, nanocredits held) of each work: all of them, or an error before any work starts.

        What is held is the dearest eligible offer's most, or as much of it as there is, down to the cheapest's. Where
        the caller left max_tokens to us, fewer tokens are an answer too.
        """
        rows = self.registry.prices(class_id)
        if request.max_price is not None and rows:
            eligible = [row for row in rows if within(row, request.max_price)]
            if not eligible:
                least = cheapest(rows, 1, 1)
                raise ApiError(
                    402,
                    "max_price_too_low",
                    "no node serves this model within max_price now: with the network's fee the cheapest costs "
                    f"{most(least, 1, 0)} nanocredits per input token and {most(least, 0, 1)} per output token",
                    param="max_price",
                )
            rows = eligible
        if all([row.free for row in rows]):
            return [(want.max_tokens, 0) for want in wanted]
        shares = [_dearest(rows, each, each.max_tokens) for each in wanted]
        want = sum(shares)
        if self.books.admit_at_once(payer, want):
            amount = want
        else:
            fewest = request.max_tokens or max(1, request.min_tokens)
            amount = await self.books.admit(payer, want, sum([_cheapest(rows, each, fewest) for each in wanted]))
        if amount == want:
            held = [(each.max_tokens, share) for each, share in zip(wanted, shares, strict=True)]
        else:
            held = _affordable(amount, rows, request.max_tokens or max(1, request.min_tokens), wanted)
        rest = amount - sum([share for _, share in held])
        self.books.give_back(payer, rest)
        seconds = self.limits.reserve_cost(account, amount - rest, self.clock())
        if seconds is not None:
            self.books.give_back(payer, amount - rest)
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"this key may spend {show_credits(account.cost_per_minute_nanocredits or 0)} credits per minute: "
                f"try again in {math.ceil(seconds)} s, or ask the operator for another limit",
                headers=[retry_after(seconds)],
            )
        return held

    def _correct_rate(self, account: Account) -> Callable[[int, int], None]:
        return lambda held, charged: self.limits.settle_cost(account, held, charged, self.clock())

    def _cache_salt(self, account_id: str, client_salt: str) -> bytes:
        """Prompts share cached work within an account only: `cached_tokens` would answer guesses at a prompt."""
        salt = self._cache_salts.get((account_id, client_salt))
        if salt is None:
            if len(self._cache_salts) >= CACHE_SALTS_REMEMBERED:
                self._cache_salts.clear()
            message = account_id.encode() + b"\0" + client_salt.encode()
            salt = hmac.digest(self.gateway_secret, b"gridmill-cache-salt-v1\0" + message, "sha256")
            self._cache_salts[account_id, client_salt] = salt
        return salt

    def _authenticate(self, scope: Scope, exchange: Exchange) -> Account:
        account = authenticate(self.accounts, exchange, scope)
        if "inference" not in account.scopes:
            raise ApiError(
                403, "insufficient_scope", "this key is not for inference: make one with `gridmill keys create NAME`"
            )
        return account

    # ------------------------------------------------------------ the rest

    async def _look_up(
        self, endpoint: str, find: Callable[[], dict[str, Any]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        exchange = self._exchange(endpoint, "req-", scope, receive, send)
        try:
            allow_only(scope, "GET")
            self._authenticate(scope, exchange)
            await exchange.answer(200, _encode(find()))
        except ClientGone as gone:
            exchange.status, exchange.code = CLIENT_LEFT_STATUS, f"client_{gone}"
        except Exception as error:  # noqa: BLE001 - as in `_generate`
            await exchange.refuse(_as_api_error(error, "model"))
        finally:
            ended(exchange, self.metrics)

    def _exchange(self, endpoint: str, id_prefix: str, scope: Scope, receive: Receive, send: Send) -> Exchange:
        client = Client(scope, receive, send, clock=self.clock, stall_timeout_seconds=self.client_stall_timeout_seconds)
        return Exchange(client, endpoint, id_prefix + self.request_ids(), self.clock)


# ---------------------------------------------------------------- what is held for each work


class _Wishes(msgspec.Struct, frozen=True):
    """What a request's own headers ask for besides its body."""

    why: bool
    max_wait_seconds: float | None


def _wishes(scope: Scope) -> _Wishes:
    """Raises RequestError."""
    return _Wishes(header(scope, WHY_HEADER) == b"1", parse_max_wait(header(scope, MAX_WAIT_HEADER)))


class _Wanted(msgspec.Struct, frozen=True):
    """One work before it is known what can be held for it. `input_tokens` and `max_tokens` are still to be paid."""

    index: int
    prompt: bytes
    input_tokens: int
    max_tokens: int
    delivered: bytes = b""
    epoch: int = 0


class _Planned(msgspec.Struct, frozen=True):
    """One work, and what is held for it."""

    index: int
    work: Generate
    order: Order


def _rest(wanted: _Wanted, part: Part) -> _Wanted:
    """What is left to do of a choice: its prompt was paid by the run that delivered, and so were its ids."""
    return _Wanted(
        wanted.index,
        wanted.prompt,
        0 if part.prompt_charged else wanted.input_tokens,
        wanted.max_tokens - len(part.ids),
        pack_ids(part.ids),
        part.epoch_next,
    )


def _hidden(request: ChatRequest | CompletionRequest, card: ModelCard) -> frozenset[int]:
    return frozenset(card.facts.eos_token_ids) | frozenset(request.stop_token_ids)


def _dearest(rows: Sequence[PriceRow], wanted: _Wanted, tokens: int) -> int:
    return max([most(row, wanted.input_tokens, min(tokens, wanted.max_tokens)) for row in rows])


def _cheapest(rows: Sequence[PriceRow], wanted: _Wanted, tokens: int) -> int:
    return min([most(row, wanted.input_tokens, min(tokens, wanted.max_tokens)) for row in rows])


def _affordable(amount: int, rows: Sequence[PriceRow], fewest: int, wanted: Sequence[_Wanted]) -> list[tuple[int, int]]:
    """(max_tokens, nanocredits) of each work at the cheapest offer: as many tokens as `amount` buys, the same for all.

    It buys at least `fewest`.
    """
    low, high = fewest, max(fewest + 1, 1 + max([each.max_tokens for each in wanted]))
    while high - low > 1:
        middle = (low + high) // 2
        if sum([_cheapest(rows, each, middle) for each in wanted]) <= amount:
            low = middle
        else:
            high = middle
    return [(min(low, each.max_tokens), _cheapest(rows, each, low)) for each in wanted]


# ---------------------------------------------------------------- from works to bytes


class _Answer(Showing):
    """One request's works, run together, and their way to the caller."""

    def __init__(self, exchange: Exchange, form: Format, request: ChatRequest | CompletionRequest) -> None:
        super().__init__(exchange, form, request)
        self._planned: list[_Planned] = []
        self._charge_nanocredits = 0
        self._opening = False
        self._opened = asyncio.Event()
        self._unfinished = 0
        self._group: asyncio.TaskGroup

    def add(self, planned: _Planned, hidden: frozenset[int]) -> None:
        self.choices.append(self.form.choice(planned.index, hidden))
        self._planned.append(planned)

    def gridmill(self) -> dict[str, Any]:
        """With `x-gridmill-why: 1`, also why each node was chosen: a decision for each placement of each choice."""
        facts = super().gridmill()
        if any(planned.order.whys is not None for planned in self._planned):
            facts["why"] = [
                {"choice": planned.index, **explained(why)}
                for planned in self._planned
                for why in planned.order.whys or ()
            ]
        return facts

    def release(self, books: Books) -> None:
        """Whatever was held for works that never began is free again."""
        self._settle()  # for a caller who left while others were at work
        for planned in self._planned:
            books.release(planned.order)

    def _settle(self) -> None:
        """Choices of one plain answer are settled when all of them are whole."""
        for planned in self._planned:
            if planned.order.settles_later and planned.order.deferred is not None:
                planned.order.deferred()

    async def run(self, dispatcher: Dispatcher) -> None:
        """Serves all choices. Raises ClientGone or the first fault; the works that still ran are cancelled by then."""
        self._unfinished = len(self.choices)
        try:
            with self.client.present():
                if len(self.choices) == 1 and not self.request.stream:
                    await self._serve(self.choices[0], dispatcher)
                else:
                    await self._serve_together(dispatcher)
                if not self.request.stream:
                    self._settle()
                    charge = sum([planned.order.charge_nanocredits for planned in self._planned])
                    await self.exchange.answer(200, self.form.answer(self.choices, self.usage(charge), self.gridmill()))
        finally:
            self.exchange.output_tokens = sum([choice.tokens for choice in self.choices])

    async def _serve_together(self, dispatcher: Dispatcher) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for choice in self.choices[1:]:
                    group.create_task(self._serve(choice, dispatcher))
                await self._serve(self.choices[0], dispatcher)
        except BaseExceptionGroup as failures:
            raise first_cause(failures) from failures

    async def _serve(self, choice: Choice, dispatcher: Dispatcher) -> None:
        client, exchange = self.client, self.exchange
        streaming = self.request.stream
        planned = self._planned[choice.index]

        async def emit(emissions: list[Emission]) -> None:
            if exchange.first_token_at is None:
                exchange.first_token_at = exchange.clock()
            try:
                pieces = choice.take(emissions)
                data = choice.events(pieces) if streaming and pieces else b""
            except ValueError as problem:
                raise NodeFault("bad_ids", str(problem)) from None
            if choice.complete:
                planned.order.cut(choice.tokens)  # before the socket is awaited: who leaves there pays no more either
            if not streaming:
                choice.pieces.extend(pieces)
            elif data:
                if not self._opened.is_set():
                    await self._opened.wait()
                await client.send_body(data)
            if choice.complete:
                raise Enough(choice.tokens)

        try:
            outcome = await dispatcher.serve(planned.work, planned.order, emit, placed=self._placed)
        except (NodeFault, NoRoom):
            for other in self._planned:
                other.order.forgiven = True  # the caller leaves with nothing of them, and not by choice
                if other.order.settles_later:
                    other.order.deferred = None
            raise
        self._charge_nanocredits += outcome.charge_nanocredits
        tail = choice.finish(outcome)
        if not streaming:
            choice.pieces.extend(tail)
            return
        data = choice.events(tail) + self.form.finish_event(choice.index, choice.finish_reason, self.gridmill())
        await self._opened.wait()
        self._unfinished -= 1  # here, and not before another choice may have finished: the last one ends the stream
        if self._unfinished:
            await client.send_body(data)
            return
        if self.request.include_usage:
            data += self.form.usage_event(self.usage(self._charge_nanocredits), self.gridmill())
        await client.send_body(data + b"data: [DONE]\n\n", more=False)

    def _placed(self, node_id: str) -> None:
        nodes = self.exchange.nodes
        if node_id not in nodes:
            nodes.append(node_id)
        if self.request.stream and not self._opening:
            self._opening = True
            self._group.create_task(self._open())

    async def _open(self) -> None:
        """At once, however long the prompt takes."""
        await self.open()
        self._opened.set()


def _room(ids: Sequence[int], facts: TextFacts, param: str) -> int:
    """How many tokens fit after this prompt. Raises RequestError on one that is empty, too long or foreign."""
    if not ids:
        raise RequestError(f"{param} must hold at least one token", param)
    if max(ids) >= facts.vocab_size:
        raise RequestError(f"{param} must hold token ids below the vocabulary size, {facts.vocab_size}", param)
    room = facts.context_tokens - len(ids)
    if room < 1:
        raise RequestError(
            f"this model's context is {facts.context_tokens} tokens and the prompt has {len(ids)}: "
            f"shorten it to at most {facts.context_tokens - 1}",
            param,
            "context_length_exceeded",
        )
    return room


def _model_object(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": card.owner,
        "gridmill": {
            "class_id": card.class_id,
            "context_tokens": card.facts.context_tokens,
            "vocab_size": card.facts.vocab_size,
            "toy": card.toy,
        },
    }


# ---------------------------------------------------------------- whose fault, and what to say


def _as_api_error(error: Exception, prompt_param: str) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, error.code, error.message, param=error.param)
        case UnknownModel():
            return ApiError(404, "model_not_found", error.reason, param="model")
        case CallerFault():
            return ApiError(error.status, error.code, error.message, param=error.param)
        case NoRoom():
            detail = error.detail
            if error.code == "overloaded":
                detail += (
                    f": try again in {math.ceil(error.retry_after_seconds)} s, or wait longer with service_tier flex"
                )
            status = 429 if error.code == "overloaded" else 503
            return ApiError(status, error.code, detail, headers=retry_after_exactly(error.retry_after_seconds))
        case NodeFault():
            return ApiError(502, error.code, f"the node that computed this failed: {error.detail}")
        case Insufficient():
            return _insufficient(error)
        case KeyReused():
            return ApiError(
                422,
                "idempotency_key_reused",
                "this Idempotency-Key was sent with another request: the same key must mean the same body; "
                "use a new key for a new request",
            )
        case RunsElsewhere():
            return ApiError(
                409,
                "idempotent_request_running",
                "the first request with this Idempotency-Key still runs: try again shortly",
                headers=[retry_after(RETRY_AFTER_RUNNING_SECONDS)],
            )
        case Incomplete():
            return ApiError(
                409,
                "idempotent_answer_incomplete",
                "the first request with this Idempotency-Key broke off, and the log probabilities of what it delivered "
                "were lost: ask again with a new key",
            )
        case StoreUnusable():
            log.error("the database cannot be used", extra={"reason": str(error)})
            detail = "the network's database does not answer: try again shortly"
            return ApiError(503, "ledger_unavailable", detail, headers=[retry_after(RETRY_AFTER_TEXT_SECONDS)])
        case Unavailable():
            return ApiError(503, "ledger_unavailable", error.detail, headers=[retry_after(error.retry_after_seconds)])
        case TextError():
            return _text_error(error, prompt_param)
        case _:
            return our_fault(error)


def _insufficient(error: Insufficient) -> ApiError:
    facts = {
        "needed_nanocredits": error.needed,
        "available_nanocredits": error.available,
        "missing_nanocredits": error.missing,
    }
    missing = f"{show_credits(error.missing)} credits are missing"
    if error.limited_by == "budget":
        return ApiError(
            402,
            "key_budget_exhausted",
            f"{missing}: this request may cost {show_credits(error.needed)} and this key's budget has "
            f"{show_credits(error.available)} left; ask for fewer max_tokens, or for a larger budget",
            facts=facts,
        )
    return ApiError(
        402,
        "insufficient_balance",
        f"{missing}: this request may cost {show_credits(error.needed)} and "
        f"{show_credits(error.available)} can be held for it; ask for fewer max_tokens, or have the account credited "
        "(`gridmill credit ACCOUNT AMOUNT`)",
        facts=facts,
    )


def _text_error(error: TextError, prompt_param: str) -> ApiError:
    if error.code == "prompt_too_long":
        return ApiError(400, "context_length_exceeded", error.detail, param=prompt_param)
    match error.fault:
        case "caller":
            return ApiError(400, error.code, error.detail, param=prompt_param)
        case "class":
            return ApiError(502, error.code, f"this model's own tokenizer or template failed: {error.detail}")
        case "network":
            status = 429 if error.code == "text_busy" else 503
            return ApiError(status, error.code, error.detail, headers=[retry_after(RETRY_AFTER_TEXT_SECONDS)])
