"""OpenAI's API over the network: parse → works → stream or answer. Nothing outside this folder knows that API.

- A choice is a Work of its own; `n` choices of one prompt share its ids, and the prompt is counted once in `usage`.
- The head of a stream leaves when a node has accepted, so that everything which goes wrong before is a plain JSON error
  with its status. After it an error is one `data: {"error": …}` event, and the stream ends without `[DONE]`.
- Tokens cross this file as bytes: a prefix and a suffix are made once per choice, and all that one step brought to a
  caller leaves in one send.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from gridmill.network.accounts import Account, Accounts
from gridmill.network.dispatch import CallerFault, Dispatcher, Enough, NodeFault, NoRoom
from gridmill.network.gateway.asgi import (
    EVENT_STREAM,
    JSON,
    ApiError,
    Client,
    ClientGone,
    Headers,
    Receive,
    Scope,
    Send,
    header,
)
from gridmill.network.gateway.rendering import ChatFormat, Choice, CompletionFormat, Format
from gridmill.network.gateway.requests import ChatRequest, CompletionRequest, RequestError
from gridmill.network.registry import ModelCard, Registry, UnknownModel
from gridmill.network.text import TextError, TextService
from gridmill.wire.classes import TextFacts
from gridmill.wire.messages import Emission, Generate
from gridmill.wire.sampling import base_seed, choice_seed, pack_ids, problem_with

log = logging.getLogger("gridmill.network.gateway")

DEFAULT_MAX_TOKENS = 4096  # design §4, step 2
BODY_TIMEOUT_SECONDS = 30.0
CLIENT_LEFT_STATUS = 499  # only in logs and counters: nobody was there to get an answer
RETRY_AFTER_TEXT_SECONDS = 5

_encode = msgspec.json.Encoder().encode


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
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        request_ids: Callable[[], str],
        gateway_secret: bytes,
        metrics: GatewayMetrics | None = None,
        body_bytes: int = 4 << 20,
        body_timeout_seconds: float = BODY_TIMEOUT_SECONDS,
        client_stall_timeout_seconds: float = 60.0,
    ) -> None:
        self.registry = registry
        self.accounts = accounts
        self.texts = texts
        self.dispatcher = dispatcher
        self.clock = clock
        self.wall_clock = wall_clock
        self.request_ids = request_ids
        self.gateway_secret = gateway_secret
        self.metrics: GatewayMetrics = metrics or NoMetrics()
        self.body_bytes = body_bytes
        self.body_timeout_seconds = body_timeout_seconds
        self.client_stall_timeout_seconds = client_stall_timeout_seconds

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
        self._ended(exchange)

    # ------------------------------------------------------------ one request, from bytes to works

    async def _generate(self, kind: type[Format], scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange(kind.endpoint, kind.id_prefix, scope, receive, send)
        try:
            _allow(scope, "POST")
            account = self._authenticate(scope, exchange)
            body = await exchange.client.read_body(self.body_bytes, self.body_timeout_seconds)
            request = kind.parse(body)
            exchange.model = request.model
            card = self.registry.resolve(request.model)
            answer = await self._prepare(kind, request, card, exchange)
            await answer.run(self.dispatcher, account)
        except ClientGone as gone:
            exchange.status, exchange.code = CLIENT_LEFT_STATUS, f"client_{gone}"
        except asyncio.CancelledError:
            exchange.status, exchange.code = 503, "stopped"
            raise
        except Exception as error:  # noqa: BLE001 - the one place that turns what went wrong into an answer
            await exchange.refuse(_as_api_error(error, kind.prompt_param))
        finally:
            self._ended(exchange)

    async def _prepare(
        self, kind: type[Format], request: ChatRequest | CompletionRequest, card: ModelCard, exchange: _Exchange
    ) -> _Answer:
        """Everything that can be refused before a node is asked, in the order in which it gets dearer."""
        exchange.class_id = card.class_id
        facts = card.facts
        try:
            text = self.registry.class_text(card.class_id)
        except KeyError:
            raise ApiError(
                503,
                "no_node",
                f"no node that serves {card.name} is here at the moment: try again shortly",
                headers=[_retry_after(RETRY_AFTER_TEXT_SECONDS)],
            ) from None
        if request.max_tokens is not None and request.max_tokens > facts.context_tokens:
            raise RequestError(
                f"max_tokens must be between 1 and {facts.context_tokens}, this model's context, "
                f"not {request.max_tokens}",
                "max_tokens",
            )
        base = base_seed(request.seed, self.gateway_secret, exchange.request_id)
        problem = problem_with(request.sampling(base, request.max_tokens or facts.context_tokens), facts.vocab_size)
        if problem is not None:
            raise RequestError(problem, problem.partition(" ")[0])
        salt = self._cache_salt(exchange.account_id or "", request.cache_salt or "")
        hidden = frozenset(facts.eos_token_ids) | frozenset(request.stop_token_ids)
        form = kind(exchange.request_id, int(self.wall_clock()), card, request, text)
        answer = _Answer(exchange, form, request)
        for ids in await kind.encode(self.texts, card.class_id, request):
            max_tokens = min(_room(ids, facts, kind.prompt_param), request.max_tokens or DEFAULT_MAX_TOKENS)
            if request.min_tokens > max_tokens:
                raise RequestError(f"min_tokens must be between 0 and {max_tokens}, all that fits here", "min_tokens")
            packed = pack_ids(ids)
            exchange.prompt_tokens += len(ids)
            for _ in range(request.n):
                index = len(answer.choices)
                sampling = request.sampling(choice_seed(base, index), max_tokens)
                work_id = f"{exchange.request_id}-{index}"
                answer.add(Generate(work_id, card.class_id, packed, sampling, cache_salt=salt), hidden)
        self.metrics.prompt_accepted(exchange.prompt_tokens)
        return answer

    def _cache_salt(self, account_id: str, client_salt: str) -> bytes:
        """Prompts share cached work within an account only: `cached_tokens` would answer guesses at a prompt."""
        message = account_id.encode() + b"\0" + client_salt.encode()
        return hmac.digest(self.gateway_secret, b"gridmill-cache-salt-v1\0" + message, "sha256")

    def _authenticate(self, scope: Scope, exchange: _Exchange) -> Account:
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
        account = self.accounts.authenticate(key.strip()) if scheme.lower() == "bearer" else None
        if account is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "this API key is not known here, or was revoked (`gridmill keys create NAME` makes one)",
                headers=challenge,
            )
        exchange.account_id, exchange.key_id = account.account_id, account.key_id
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
            _allow(scope, "GET")
            self._authenticate(scope, exchange)
            await exchange.answer(200, _encode(find()))
        except ClientGone as gone:
            exchange.status, exchange.code = CLIENT_LEFT_STATUS, f"client_{gone}"
        except Exception as error:  # noqa: BLE001 - as in `_generate`
            await exchange.refuse(_as_api_error(error, "model"))
        finally:
            self._ended(exchange)

    def _exchange(self, endpoint: str, id_prefix: str, scope: Scope, receive: Receive, send: Send) -> _Exchange:
        client = Client(scope, receive, send, clock=self.clock, stall_timeout_seconds=self.client_stall_timeout_seconds)
        return _Exchange(client, endpoint, id_prefix + self.request_ids(), self.clock)

    def _ended(self, exchange: _Exchange) -> None:
        self.metrics.request_ended(exchange.endpoint, exchange.status)
        if log.isEnabledFor(logging.INFO):
            log.info("request", extra=exchange.log_fields())


class _Exchange:
    """One HTTP exchange: who, what, how it ended. Knows neither prompt nor text, so that a log line cannot either."""

    def __init__(self, client: Client, endpoint: str, request_id: str, clock: Callable[[], float]) -> None:
        self.client = client
        self.endpoint = endpoint
        self.request_id = request_id
        self.clock = clock
        self.started = clock()
        self.first_token_at: float | None = None
        self.head_sent = False
        self.status = 200  # what the caller was told, or would have been had the head not left already
        self.code: str | None = None
        self.account_id: str | None = None
        self.key_id: str | None = None
        self.model: str | None = None
        self.class_id: str | None = None
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.nodes: list[str] = []

    def headers(self) -> Headers:
        request_id = self.request_id.encode()
        headers = [(b"x-gridmill-request-id", request_id), (b"x-request-id", request_id)]
        if self.nodes:
            headers.append((b"x-gridmill-node", self.nodes[0].encode("ascii", "replace")))
        return headers

    async def answer(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.head_sent = True
        await self.client.answer(status, body, JSON, [*self.headers(), *headers])

    async def refuse(self, error: ApiError) -> None:
        """Says what went wrong, as an answer or, when the head of a stream has left, as its last event."""
        self.status, self.code = error.status, error.code
        try:
            with self.client.present():
                if self.head_sent:
                    await self.client.send_body(_error_event(error), more=False)
                else:
                    await self.answer(error.status, error.body(), error.headers)
        except ClientGone:
            pass  # Nobody to tell; the status stays that of the error.

    def log_fields(self) -> dict[str, Any]:
        now = self.clock()
        first = self.first_token_at
        return {
            "request_id": self.request_id,
            "endpoint": self.endpoint,
            "account": self.account_id,
            "key": self.key_id,
            "model": self.model,
            "class_id": self.class_id,
            "status": self.status,
            "code": self.code,
            "nodes": self.nodes,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ttft_seconds": None if first is None else round(first - self.started, 6),
            "duration_seconds": round(now - self.started, 6),
        }


# ---------------------------------------------------------------- from works to bytes


class _Answer:
    """One request's works, run together, and their way to the caller."""

    def __init__(self, exchange: _Exchange, form: Format, request: ChatRequest | CompletionRequest) -> None:
        self.choices: list[Choice] = []
        self._exchange = exchange
        self._client = exchange.client
        self._form = form
        self._request = request
        self._opening = False
        self._opened = asyncio.Event()
        self._unfinished = 0
        self._group: asyncio.TaskGroup

    def add(self, work: Generate, hidden: frozenset[int]) -> None:
        self.choices.append(self._form.choice(len(self.choices), work, hidden))

    async def run(self, dispatcher: Dispatcher, account: Account) -> None:
        """Serves all choices. Raises ClientGone or the first fault; the works that still ran are cancelled by then."""
        self._unfinished = len(self.choices)
        try:
            with self._client.present():
                if len(self.choices) == 1 and not self._request.stream:
                    await self._serve(self.choices[0], dispatcher, account)
                else:
                    await self._serve_together(dispatcher, account)
                if not self._request.stream:
                    await self._exchange.answer(200, self._form.answer(self.choices, self._usage(), self._gridmill()))
        finally:
            self._exchange.output_tokens = sum([choice.tokens for choice in self.choices])

    async def _serve_together(self, dispatcher: Dispatcher, account: Account) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for choice in self.choices[1:]:
                    group.create_task(self._serve(choice, dispatcher, account))
                await self._serve(self.choices[0], dispatcher, account)
        except BaseExceptionGroup as failures:
            raise _first_cause(failures) from failures

    async def _serve(self, choice: Choice, dispatcher: Dispatcher, account: Account) -> None:
        client, exchange = self._client, self._exchange
        streaming = self._request.stream

        async def emit(emissions: list[Emission]) -> None:
            if exchange.first_token_at is None:
                exchange.first_token_at = exchange.clock()
            try:
                pieces = choice.take(emissions)
                data = choice.events(pieces) if streaming and pieces else b""
            except ValueError as problem:
                raise NodeFault("bad_ids", str(problem)) from None
            if not streaming:
                choice.pieces.extend(pieces)
            elif data:
                if not self._opened.is_set():
                    await self._opened.wait()
                await client.send_body(data)
            if choice.complete:
                raise Enough(choice.tokens)

        outcome = await dispatcher.serve(choice.work, account, emit, placed=self._placed)
        tail = choice.finish(outcome)
        self._unfinished -= 1
        if not streaming:
            choice.pieces.extend(tail)
            return
        data = choice.events(tail) + self._form.finish_event(choice.index, choice.finish_reason, self._gridmill())
        await self._opened.wait()
        if self._unfinished:
            await client.send_body(data)
            return
        if self._request.include_usage:
            data += self._form.usage_event(self._usage(), self._gridmill())
        await client.send_body(data + b"data: [DONE]\n\n", more=False)

    def _placed(self, node_id: str) -> None:
        nodes = self._exchange.nodes
        if node_id not in nodes:
            nodes.append(node_id)
        if self._request.stream and not self._opening:
            self._opening = True
            self._group.create_task(self._open())

    async def _open(self) -> None:
        """The head, and the chunk in which OpenAI tells the role: at once, however long the prompt takes."""
        headers = [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._client.send_head(200, [*headers, *self._exchange.headers()])
        self._exchange.head_sent = True
        opening = b"".join([self._form.opening_event(choice.index) for choice in self.choices])
        if opening:
            await self._client.send_body(opening)
        self._opened.set()

    def _gridmill(self) -> dict[str, Any]:
        return {"nodes": self._exchange.nodes, "request_id": self._exchange.request_id}

    def _usage(self) -> dict[str, Any]:
        per_prompt = self._request.n
        prompt_tokens = self._exchange.prompt_tokens
        completion_tokens = sum([choice.output_tokens for choice in self.choices])
        # One prompt is counted once, so what it found cached is what the least lucky of its choices found.
        cached_tokens = sum(
            [
                min([choice.cached_tokens for choice in self.choices[first : first + per_prompt]])
                for first in range(0, len(self.choices), per_prompt)
            ]
        )
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


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


def _error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


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
            status = 429 if error.code == "overloaded" else 503
            return ApiError(status, error.code, error.detail, headers=[_retry_after(error.retry_after_seconds)])
        case NodeFault():
            return ApiError(502, error.code, f"the node that computed this failed: {error.detail}")
        case TextError():
            return _text_error(error, prompt_param)
        case _:
            log.error("a request failed inside the gateway", exc_info=error)
            return ApiError(
                500, "internal_error", "something went wrong on our side; the request id helps us to find it"
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
            return ApiError(status, error.code, error.detail, headers=[_retry_after(RETRY_AFTER_TEXT_SECONDS)])


def _first_cause(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a request: the first thing that went wrong."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _retry_after(seconds: float) -> tuple[bytes, bytes]:
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()


def _allow(scope: Scope, method: str) -> None:
    if scope["method"] != method:
        raise ApiError(
            405,
            "method_not_allowed",
            f"this path takes {method}, not {scope['method'][:20]}",
            headers=[(b"allow", method.encode())],
        )
