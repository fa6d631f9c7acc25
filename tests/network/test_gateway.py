"""The gateway over a real uvicorn on loopback, with small working fakes where nodes and tokenizers would be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from gridmill.network.accounts import Account, AccountId, KeyId
from gridmill.network.books import Books, GatewayId, Order
from gridmill.network.detokenise import ClassText
from gridmill.network.faults import CallerFault, Enough, NodeFault, NoRoom
from gridmill.network.gateway.asgi import HttpProtocol
from gridmill.network.gateway.openai import OpenAIGateway
from gridmill.network.journey import Outcome
from gridmill.network.limits import Limits
from gridmill.network.metering import FREE, PriceRow
from gridmill.network.registry import TIER_INVITED, ModelCard, UnknownModel
from gridmill.network.scheduler import ANYWHERE, Allowed
from gridmill.network.store import SqliteStore
from gridmill.network.text import TextError
from gridmill.wire.classes import ClassId, TextFacts
from gridmill.wire.messages import Emission, Generate
from gridmill.wire.sampling import TokenLogprob, base_seed, choice_seed, unpack_ids

KEY = "gm-right"
SECRET = b"gateway secret of the tests"
CLASS_ID = ClassId("c1a55" + "0" * 59)
CONTEXT_TOKENS = 100
EOS, EURO_1, EURO_2, LONG, SILENT = 10, 200, 201, 400, 401
LONG_CHARACTERS = 1 << 16
FACTS = TextFacts(
    chat_template="…",
    special_tokens={},
    eos_token_ids=(EOS,),
    context_tokens=CONTEXT_TOKENS,
    vocab_size=512,
)


def class_text() -> ClassText:
    """Printable ASCII ids print themselves; two ids make a euro sign; one prints 64 KiB, one nothing."""
    pieces: list[bytes | None] = [None] * FACTS.vocab_size
    for code in range(32, 127):
        pieces[code] = bytes([code])
    pieces[EOS] = b"<end>"
    pieces[EURO_1], pieces[EURO_2] = b"\xe2\x82", b"\xac"
    pieces[LONG] = b"x" * LONG_CHARACTERS
    pieces[SILENT] = b""
    return ClassText(FACTS, pieces)


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


class FakeRegistry:
    def __init__(self) -> None:
        self.text: ClassText | None = class_text()
        self.cards = {
            name: ModelCard(name, CLASS_ID, FACTS, "owner-1", 1_700_000_000, False) for name in ("toy", "ann/toy")
        }

    def resolve(self, name: str) -> ModelCard:
        plain, _, short = name.partition("@")
        if plain not in self.cards or not CLASS_ID.startswith(short):
            raise UnknownModel(name, ["toy"], f"The model '{name}' does not exist here. Did you mean toy?")
        return self.cards[plain]

    def model_cards(self) -> list[ModelCard]:
        return list(self.cards.values())

    def class_text(self, class_id: str) -> ClassText:
        if self.text is None:
            raise KeyError(class_id)
        return self.text

    def prices(self, class_id: str) -> list[PriceRow]:
        return [FREE]


class FakeAccounts:
    def why_not(self, api_key: str) -> str:
        return "this API key is not known here"

    def authenticate(self, api_key: str) -> Account | None:
        scopes = {KEY: "inference", "gm-node": "node"}
        if api_key not in scopes:
            return None
        return Account(AccountId("account-1"), KeyId("key-1"), "tests", frozenset({scopes[api_key]}))


class FakeTexts:
    """One id a character; a chat is its contents one after the other."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def encode_chat(self, class_id: str, messages: Sequence[dict[str, str]]) -> list[int]:
        return await self.encode(class_id, "".join(message["content"] for message in messages))

    async def encode(self, class_id: str, text: str) -> list[int]:
        if self.error is not None:
            raise self.error
        return ids_of(text)


Script = Callable[["Delivery"], Awaitable[Outcome]]


class FakeDispatcher:
    """Runs a script instead of a node, and keeps the promises of `dispatch.serve` about `Enough` and cancelling."""

    def __init__(self) -> None:
        self.script: Script = saying("Hello")
        self.works: list[Generate] = []
        self.orders: list[Order] = []
        self.running = 0
        self.cancelled = asyncio.Event()

    async def serve(
        self, work: Generate, order: Order, emit: Callable[[list[Emission]], Awaitable[None]], *, placed: Any
    ) -> Outcome:
        assert order.payer.account_id == "account-1"
        self.works.append(work)
        self.orders.append(order)
        self.running += 1
        try:
            return await self.script(Delivery(work, emit, placed, len(self.works) - 1))
        except Enough as enough:
            return Outcome("stop", enough.keep, 0, ("node-1",))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1


class Delivery:
    def __init__(
        self, work: Generate, emit: Callable[[list[Emission]], Awaitable[None]], placed: Any, number: int
    ) -> None:
        self.work = work
        self.placed = placed
        self.number = number  # how many works the dispatcher had seen before this one
        self.sent = 0
        self._emit = emit

    async def ids(self, *ids: int) -> None:
        """One emission, with logprobs where they are asked for: the n-th output id has -n/8."""
        logprobs = None
        if self.work.sampling.top_logprobs is not None:
            logprobs = tuple(
                TokenLogprob(
                    -(self.sent + i) / 8,
                    tuple((token_id + k, -(self.sent + i) / 8 - k) for k in range(self.work.sampling.top_logprobs)),
                )
                for i, token_id in enumerate(ids)
            )
        position = self.sent
        self.sent += len(ids)
        await self._emit([Emission(1, position, ids, logprobs)])

    def ended(self, kind: Any = "stop", cached_tokens: int = 0) -> Outcome:
        return Outcome(kind, self.sent, cached_tokens, ("node-1",))


def saying(text: str, *, node_id: str = "node-1") -> Script:
    """A node that says this, one id at a time, and ends with the end-of-sequence id."""

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed(node_id)
        for token_id in [*ids_of(text), EOS]:
            await delivery.ids(token_id)
        return delivery.ended()

    return script


class Scene:
    """A running server and a client in front of it."""

    def __init__(self, server: uvicorn.Server, port: int, http: aiohttp.ClientSession, gateway: OpenAIGateway) -> None:
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = http
        self.gateway = gateway
        self.dispatcher: FakeDispatcher = gateway.dispatcher  # type: ignore[assignment]
        self.registry: FakeRegistry = gateway.registry  # type: ignore[assignment]
        self.texts: FakeTexts = gateway.texts  # type: ignore[assignment]

    def chat(self, **parameters: Any) -> Any:
        body = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], **parameters}
        return self.http.post(f"{self.url}/v1/chat/completions", json=body)

    def complete(self, **parameters: Any) -> Any:
        return self.http.post(f"{self.url}/v1/completions", json={"model": "toy", "prompt": "Hi", **parameters})

    async def answer(self, **parameters: Any) -> dict[str, Any]:
        async with self.chat(**parameters) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def events(self, **parameters: Any) -> list[Any]:
        """All events of a streamed chat; `[DONE]` is the string."""
        async with self.chat(stream=True, **parameters) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            return parse_events(await response.read())

    async def error(self, **parameters: Any) -> tuple[int, dict[str, Any]]:
        async with self.chat(**parameters) as response:
            assert response.headers["x-gridmill-request-id"]
            return response.status, (await response.json())["error"]


def parse_events(raw: bytes) -> list[Any]:
    events = raw.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return [event if event == "data: [DONE]" else json.loads(event[6:]) for event in events]


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for event in events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["index"] == index
    )


@contextlib.asynccontextmanager
async def scene(**limits: Any) -> AsyncIterator[Scene]:
    numbers = iter(range(1, 1_000_000))
    gateway = OpenAIGateway(
        registry=FakeRegistry(),  # type: ignore[arg-type]
        accounts=FakeAccounts(),  # type: ignore[arg-type]
        texts=FakeTexts(),  # type: ignore[arg-type]
        dispatcher=FakeDispatcher(),  # type: ignore[arg-type]
        books=Books(  # what is free needs no database
            SqliteStore(Path("nowhere"), wall_clock=time.time),
            holder=GatewayId("gateway-1"),
            network_key=bytes(32),
            clock=time.monotonic,
            wall_ms=lambda: 0,
            entropy=os.urandom,
        ),
        limits=Limits(),
        clock=time.monotonic,
        wall_clock=lambda: 1_800_000_000.5,
        request_ids=lambda: f"{next(numbers):06d}",
        gateway_secret=SECRET,
        **limits,
    )

    async def door(scope: Any, receive: Any, send: Any) -> None:
        endpoints = {
            "/v1/chat/completions": gateway.chat_completions,
            "/v1/completions": gateway.completions,
            "/v1/models": gateway.models,
        }
        one_model = gateway.model if scope["path"].startswith("/v1/models/") else gateway.unknown_path
        await endpoints.get(scope["path"], one_model)(scope, receive, send)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(door, http=HttpProtocol, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    timeout = aiohttp.ClientTimeout(total=30)
    headers = {"authorization": f"Bearer {KEY}"}
    try:
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:
            yield Scene(server, listener.getsockname()[1], http, gateway)
            here = {asyncio.current_task(), serving}
        tasks = {task for task in asyncio.all_tasks() - here if "uvicorn" in repr(task.get_coro())}
        for task in tasks:  # what the connections still do; the gateway's own tasks end with them
            await asyncio.wait_for(task, 10)
        assert gateway.dispatcher.running == 0, "a work outlived its request"  # type: ignore[attr-defined]
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, 10)
        listener.close()


def over_a_socket(**limits: Any) -> Callable[[Callable[[Scene], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Makes an ordinary test of a coroutine function that takes a Scene."""

    def decorate(body: Callable[[Scene], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def run() -> None:
            async with scene(**limits) as stage:
                await body(stage)

        def test() -> None:
            asyncio.run(run())

        test.__name__ = body.__name__
        return test

    return decorate


# ---------------------------------------------------------------- answers


@over_a_socket()
async def test_a_plain_answer_has_openais_shape_and_ours(stage: Scene) -> None:
    async with stage.chat() as response:
        assert response.status == 200
        assert response.headers["x-gridmill-request-id"] == "chatcmpl-000001"
        assert response.headers["x-gridmill-node"] == "node-1"
        answer = await response.json()
    assert answer == {
        "id": "chatcmpl-000001",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "toy",
        "system_fingerprint": CLASS_ID[:16],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 6,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "cost_nanocredits": 0,
        },
        "gridmill": {"nodes": ["node-1"], "request_id": "chatcmpl-000001"},
    }


@over_a_socket()
async def test_a_stream_is_role_then_text_then_reason_then_usage_then_done(stage: Scene) -> None:
    events = await stage.events(stream_options={"include_usage": True})
    *chunks, done = events
    assert done == "data: [DONE]"
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-000001"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["system_fingerprint"] for chunk in chunks} == {CLASS_ID[:16]}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-2]] == list("Hello")
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert chunks[-2]["gridmill"] == {"nodes": ["node-1"], "request_id": "chatcmpl-000001"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])


@over_a_socket()
async def test_choices_that_end_before_the_head_is_out_all_end_in_the_stream(stage: Scene) -> None:
    """Their text is held back, as it may begin a stop string: none of them has waited for the head yet."""

    async def short(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(ord("H"))
        return delivery.ended("length")

    stage.dispatcher.script = short
    *chunks, done = await stage.events(n=4, max_tokens=1, stop=["Ho"])
    assert done == "data: [DONE]"
    ended = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert sorted(choice["index"] for choice in ended) == [0, 1, 2, 3]


@over_a_socket()
async def test_without_include_usage_no_chunk_speaks_of_it(stage: Scene) -> None:
    assert all("usage" not in event for event in (await stage.events())[:-1])


@over_a_socket()
async def test_completions_stream_and_answer_in_their_own_shape(stage: Scene) -> None:
    async with stage.complete() as response:
        answer = await response.json()
    assert (answer["object"], answer["id"]) == ("text_completion", "cmpl-000001")
    assert answer["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    async with stage.complete(stream=True) as response:
        *chunks, done = parse_events(await response.read())
    assert done == "data: [DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@over_a_socket()
async def test_tokens_arrive_while_the_node_still_works(stage: Scene) -> None:
    read = asyncio.Event()

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(ord("a"))
        await read.wait()  # the test hangs here if the first token is kept back
        await delivery.ids(ord("b"))
        return delivery.ended("length")

    stage.dispatcher.script = script
    async with stage.chat(stream=True) as response:
        received = b""
        while b'"a"' not in received:
            received += await response.content.readany()
        assert b'"b"' not in received
        read.set()
        events = parse_events(received + await response.read())
    assert text_of(events) == "ab"
    assert events[-2]["choices"][0]["finish_reason"] == "length"


@over_a_socket()
async def test_the_head_leaves_when_a_node_accepts_however_long_the_first_token_takes(stage: Scene) -> None:
    answered = asyncio.Event()

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-7")
        await answered.wait()
        return await saying("x", node_id="node-7")(delivery)

    stage.dispatcher.script = script
    async with stage.chat(stream=True) as response:
        assert response.headers["x-gridmill-node"] == "node-7"
        assert b'"role":"assistant"' in await response.content.readany()
        answered.set()
        await response.read()


@over_a_socket()
async def test_ids_of_one_step_become_one_event_each(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(*ids_of("one step"))
        return delivery.ended("length")

    stage.dispatcher.script = script
    events = await stage.events()
    assert [event["choices"][0]["delta"].get("content") for event in events[1:-2]] == list("one step")


@over_a_socket()
async def test_a_character_split_over_ids_is_never_shown_broken_and_half_of_one_is_replaced(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        for token_id in (ord("a"), EURO_1, EURO_2, EURO_1):
            await delivery.ids(token_id)
        return delivery.ended("length")

    stage.dispatcher.script = script
    events = await stage.events()
    assert [event["choices"][0]["delta"].get("content") for event in events[1:-2]] == ["a", "€", "\ufffd"]
    assert (await stage.answer())["choices"][0]["message"]["content"] == "a€\ufffd"


@over_a_socket()
async def test_text_that_json_or_events_could_trip_over_arrives_whole(stage: Scene) -> None:
    nasty = '"\n\ndata: [DONE]\n\n\\\u2028\r\0'
    stage.registry.text = ClassText(
        FACTS, [None] * 40 + [nasty.encode(), "😀".encode()] + [None] * (FACTS.vocab_size - 42)
    )

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(40, 41)
        return delivery.ended("length")

    stage.dispatcher.script = script
    assert text_of(await stage.events()) == nasty + "😀"


# ---------------------------------------------------------------- several choices


@over_a_socket()
async def test_n_choices_are_n_works_and_the_prompt_counts_once(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed(f"node-{delivery.number % 2}")
        await delivery.ids(ord("a") + delivery.number)
        return delivery.ended("length", cached_tokens=2 - delivery.number % 2)

    stage.dispatcher.script = script
    answer = await stage.answer(n=3, seed=5)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b", "c"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 3)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert answer["gridmill"]["nodes"] == ["node-0", "node-1"]
    base = base_seed(5, SECRET, "whatever")
    assert [work.sampling.seed for work in stage.dispatcher.works] == [choice_seed(base, i) for i in range(3)]
    assert len({work.work_id for work in stage.dispatcher.works}) == 3


@over_a_socket()
async def test_choices_of_a_stream_interleave_and_end_each_on_its_own(stage: Scene) -> None:
    turn = [asyncio.Event() for _ in range(7)]
    turn[0].set()

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        for step in range(3):
            await turn[step * 2 + delivery.number].wait()
            await delivery.ids(ord("a") + 3 * delivery.number + step)
            turn[step * 2 + delivery.number + 1].set()
        return delivery.ended("length")

    stage.dispatcher.script = script
    events = await stage.events(n=2, stream_options={"include_usage": True})
    assert (text_of(events, 0), text_of(events, 1)) == ("abc", "def")
    order = [c["index"] for event in events[:-2] for c in event["choices"] if c["delta"].get("content")]
    assert order == [0, 1, 0, 1, 0, 1]
    roles = [c["index"] for event in events[:-2] for c in event["choices"] if "role" in c["delta"]]
    assert roles == [0, 1]
    assert sorted(c["index"] for event in events[:-2] for c in event["choices"] if c["finish_reason"]) == [0, 1]
    assert events[-2]["usage"]["completion_tokens"] == 6
    assert events[-1] == "data: [DONE]"


@over_a_socket()
async def test_each_prompt_of_a_list_gets_its_own_choices(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(*unpack_ids(delivery.work.prompt))
        return delivery.ended("length")

    stage.dispatcher.script = script
    async with stage.complete(prompt=["one", "three"], n=2) as response:
        answer = await response.json()
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "three", "three"]
    assert answer["usage"]["prompt_tokens"] == 8
    async with stage.complete(prompt=[[65, 66], [67]]) as response:
        assert [choice["text"] for choice in (await response.json())["choices"]] == ["AB", "C"]


@over_a_socket()
async def test_one_failing_choice_ends_the_stream_and_cancels_its_siblings(stage: Scene) -> None:
    streaming = asyncio.Event()

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        if delivery.number == 0:
            await delivery.ids(ord("a"))
            streaming.set()
            await asyncio.Event().wait()
        await streaming.wait()
        raise NodeFault("node_lost", "it went away")

    stage.dispatcher.script = script
    events = await stage.events(n=2)
    assert events[-1]["error"]["code"] == "node_lost"
    assert stage.dispatcher.cancelled.is_set()


# ---------------------------------------------------------------- where an answer ends


@over_a_socket()
async def test_what_a_caller_asks_of_nodes_and_its_name_for_a_chat_reach_the_placement(stage: Scene) -> None:
    await stage.answer(routing={"regions": ["eu"], "trust": "invited"}, prompt_cache_key="chat-1")
    await stage.answer()
    first, second = stage.dispatcher.orders
    assert first.allowed == Allowed(regions=frozenset({"eu"}), tier=TIER_INVITED)
    assert first.sticky == "account-1\0chat-1"  # two accounts may use the same name
    assert (second.allowed, second.sticky) == (ANYWHERE, "")


@over_a_socket()
async def test_a_stop_string_over_token_borders_ends_the_answer_and_is_not_shown(stage: Scene) -> None:
    stage.dispatcher.script = saying("one END two")
    answer = await stage.answer(stop=["END"])
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len("one END")
    assert text_of(await stage.events(stop="END")) == "one "


@over_a_socket()
async def test_a_stop_string_inside_one_step_counts_no_id_after_it(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(*ids_of("ab.cdef"))
        raise AssertionError("emit must end this work")

    stage.dispatcher.script = script
    answer = await stage.answer(stop=".")
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert answer["usage"]["completion_tokens"] == 3


@over_a_socket()
async def test_text_held_back_for_a_stop_string_is_shown_when_none_comes(stage: Scene) -> None:
    stage.dispatcher.script = saying("over EN")
    assert text_of(await stage.events(stop="END")) == "over EN"
    assert (await stage.answer(stop="END"))["choices"][0]["message"]["content"] == "over EN"


@over_a_socket()
async def test_stop_ids_end_ids_and_limits_reach_the_node_and_are_not_shown(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(ord("a"), ord("b"))
        return delivery.ended()

    stage.dispatcher.script = script
    answer = await stage.answer(stop_token_ids=[ord("b")], max_tokens=9, min_tokens=1)
    assert answer["choices"][0]["message"]["content"] == "a"
    sampling = stage.dispatcher.works[0].sampling
    assert (sampling.stop_token_ids, sampling.max_tokens, sampling.min_tokens) == ((ord("b"),), 9, 1)


@over_a_socket()
async def test_max_tokens_defaults_to_what_the_context_leaves_and_is_cut_to_it(stage: Scene) -> None:
    await stage.answer()
    await stage.answer(max_tokens=CONTEXT_TOKENS)
    assert [work.sampling.max_tokens for work in stage.dispatcher.works] == [CONTEXT_TOKENS - 2] * 2


@over_a_socket()
async def test_seeds_and_salts_are_fixed_before_dispatch(stage: Scene) -> None:
    await stage.answer(seed=-3, cache_salt="mine")
    await stage.answer()
    await stage.answer(cache_salt="mine")
    first, second, third = stage.dispatcher.works
    assert first.sampling.seed == choice_seed(base_seed(-3, SECRET, ""), 0)
    assert first.cache_salt == third.cache_salt != second.cache_salt
    assert second.sampling.seed == choice_seed(base_seed(None, SECRET, "chatcmpl-000002"), 0)
    assert len(second.cache_salt) == 32 and b"mine" not in first.cache_salt


# ---------------------------------------------------------------- log probabilities


@over_a_socket()
async def test_chat_logprobs_name_every_shown_id_and_its_rivals(stage: Scene) -> None:
    stage.dispatcher.script = saying("ab")
    choice = (await stage.answer(logprobs=True, top_logprobs=2))["choices"][0]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": 0.0,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": 0.0, "bytes": [97]},
                    {"token": "b", "logprob": -1.0, "bytes": [98]},
                ],
            },
            {
                "token": "b",
                "logprob": -0.125,
                "bytes": [98],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.125, "bytes": [98]},
                    {"token": "c", "logprob": -1.125, "bytes": [99]},
                ],
            },
        ],
        "refusal": None,
    }


def streamed_logprobs(events: list[Any]) -> list[tuple[str, list[str]]]:
    """(text, tokens with logprobs) of each chunk that has either."""
    found = []
    for event in events[1:-1]:
        for choice in event["choices"]:
            tokens = [entry["token"] for entry in (choice["logprobs"] or {"content": []})["content"]]
            if choice["delta"].get("content") or tokens:
                found.append((choice["delta"].get("content", ""), tokens))
    return found


@over_a_socket()
async def test_an_ids_logprobs_leave_with_the_chunk_that_shows_it(stage: Scene) -> None:
    stage.dispatcher.script = saying("aENbEND")
    shown = streamed_logprobs(await stage.events(stop="END", logprobs=True))
    assert shown == [("a", ["a"]), ("ENb", ["E", "N", "b"])]


@over_a_socket()
async def test_streamed_and_plain_logprobs_are_the_same_list(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        for token_id in (ord("a"), EURO_1, EURO_2, SILENT, ord("E"), ord("x"), EURO_1, SILENT):
            await delivery.ids(token_id)
        return delivery.ended("length")

    stage.dispatcher.script = script
    plain = (await stage.answer(logprobs=True, stop="EN"))["choices"][0]
    streamed = await stage.events(logprobs=True, stop="EN")
    entries = [
        entry
        for event in streamed[1:-1]
        for c in event["choices"]
        for entry in (c["logprobs"] or {"content": []})["content"]
    ]
    assert entries == plain["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-i / 8 for i in range(8)]
    assert text_of(streamed) == plain["message"]["content"] == "a€Ex\ufffd"


@over_a_socket()
async def test_an_id_without_text_at_the_very_end_has_its_entry_too(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(ord("a"), SILENT)
        return delivery.ended("length")

    stage.dispatcher.script = script
    assert streamed_logprobs(await stage.events(logprobs=True)) == [("a", ["a"]), ("", [""])]
    assert len((await stage.answer(logprobs=True))["choices"][0]["logprobs"]["content"]) == 2


@over_a_socket()
async def test_completion_logprobs_are_parallel_lists_with_offsets(stage: Scene) -> None:
    stage.dispatcher.script = saying("abc")
    async with stage.complete(logprobs=1) as response:
        logprobs = (await response.json())["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [0.0, -0.125, -0.25],
        "top_logprobs": [{"a": 0.0}, {"b": -0.125}, {"c": -0.25}],
        "text_offset": [0, 1, 2],
    }


@over_a_socket()
async def test_infinite_logprobs_become_a_number_that_json_has(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery._emit([Emission(1, 0, (97,), (TokenLogprob(float("-inf"), ((98, float("nan")),)),))])
        delivery.sent = 1
        return delivery.ended("length")

    stage.dispatcher.script = script
    entry = (await stage.answer(logprobs=True, top_logprobs=1))["choices"][0]["logprobs"]["content"][0]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


@over_a_socket()
async def test_a_node_that_keeps_the_logprobs_to_itself_or_invents_ids_is_at_fault(stage: Scene) -> None:
    async def silent(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery._emit([Emission(1, 0, (97,))])
        return delivery.ended()

    async def inventive(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery._emit([Emission(1, 0, (FACTS.vocab_size,))])
        return delivery.ended()

    stage.dispatcher.script = silent
    assert await stage.error(logprobs=True) == (
        502,
        {
            "message": "the node that computed this failed: "
            "the node did not send the log probabilities that were asked for",
            "type": "server_error",
            "param": None,
            "code": "logprobs_missing",
        },
    )
    stage.dispatcher.script = inventive
    status, error = await stage.error()
    assert (status, error["code"]) == (502, "bad_ids")


@over_a_socket()
async def test_a_log_probability_that_rounding_put_above_zero_is_shown_as_zero(stage: Scene) -> None:
    async def rounded(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery._emit([Emission(1, 0, (97,), (TokenLogprob(1e-5, ((97, 1e-5),)),))])
        return Outcome("stop", 1, 0, ("node-1",))

    stage.dispatcher.script = rounded
    entry = (await stage.answer(logprobs=True, top_logprobs=1))["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_body_in_another_encoding_is_told_so(encoding: str) -> None:
    async def body() -> None:
        async with scene() as stage:
            data = json.dumps({"model": "toy", "prompt": "Hi"}).encode(encoding)
            async with stage.http.post(f"{stage.url}/v1/completions", data=data) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (400, "invalid_utf8")
                assert error["message"].startswith("the body is not UTF-8 JSON")

    asyncio.run(body())


# ---------------------------------------------------------------- callers that leave, stall or dawdle


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_cancels_the_work(stream: bool) -> None:
    async def body() -> None:
        async with scene() as stage:
            started = asyncio.Event()

            async def script(delivery: Delivery) -> Outcome:
                delivery.placed("node-1")
                await delivery.ids(ord("a"))
                started.set()
                await asyncio.Event().wait()
                raise AssertionError

            stage.dispatcher.script = script
            async with contextlib.AsyncExitStack() as stack:
                request = stack.enter_async_context(stage.chat(stream=stream))
                waiting = asyncio.ensure_future(request)
                await started.wait()
                if stream:
                    (await waiting).close()
                else:
                    waiting.cancel()
                    await asyncio.wait([waiting])
                await asyncio.wait_for(stage.dispatcher.cancelled.wait(), 10)

    asyncio.run(body())


@over_a_socket()
async def test_a_caller_that_leaves_during_a_queue_wait_is_not_served(stage: Scene) -> None:
    queued = asyncio.Event()

    async def script(delivery: Delivery) -> Outcome:
        queued.set()
        await asyncio.Event().wait()
        raise AssertionError

    stage.dispatcher.script = script
    waiting = asyncio.ensure_future(stage.chat(stream=True).__aenter__())
    await queued.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    await asyncio.wait_for(stage.dispatcher.cancelled.wait(), 10)


async def slow_reader(stage: Scene) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Asks for a stream and then does not read, behind a receive buffer that is soon full."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", stage.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=4096)
    body = json.dumps({"model": "toy", "messages": [{"role": "user", "content": "slow"}], "stream": True}).encode()
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    return reader, writer


@over_a_socket()
async def test_a_slow_reader_slows_its_own_stream_only(stage: Scene) -> None:
    sent = {"slow": 0, "fast": 0}
    steps = 400  # of 64 KiB each: far more than what sockets buffer

    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        slow = unpack_ids(delivery.work.prompt) == ids_of("slow")
        for _ in range(steps):
            await delivery.ids(LONG if slow else ord("f"))
            sent["slow" if slow else "fast"] += 1
            await asyncio.sleep(0)
        return delivery.ended("length")

    stage.dispatcher.script = script
    reader, writer = await slow_reader(stage)
    for _ in range(10):
        assert text_of(await stage.events()) == "f" * steps
    assert sent["fast"] == 10 * steps
    assert 0 < sent["slow"] < steps
    received = 0
    tail = b""
    while not tail.endswith(b"0\r\n\r\n"):
        piece = await reader.read(1 << 20)
        assert piece, "the slow stream was cut off"
        received += len(piece)
        tail = (tail + piece)[-64:]
    assert sent["slow"] == steps
    assert received > steps * LONG_CHARACTERS
    writer.close()


@over_a_socket(client_stall_timeout_seconds=0.3)
async def test_a_reader_that_takes_nothing_is_cut_off(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        while True:
            await delivery.ids(LONG)
            await asyncio.sleep(0)

    stage.dispatcher.script = script
    reader, writer = await slow_reader(stage)
    await asyncio.wait_for(stage.dispatcher.cancelled.wait(), 20)
    # Nothing was read, so that a polite close would still wait for its buffer to empty.
    async with asyncio.timeout(20):
        while stage.server.server_state.connections:
            await asyncio.sleep(0.01)
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(1 << 20), 20):
            pass
    writer.close()


@over_a_socket(client_stall_timeout_seconds=0.05)
async def test_waiting_for_a_node_is_no_stall_of_the_reader(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await asyncio.sleep(0.3)
        return await saying("late")(delivery)

    stage.dispatcher.script = script
    assert text_of(await stage.events()) == "late"


@over_a_socket(body_timeout_seconds=0.2)
async def test_a_body_that_does_not_come_is_told_so(stage: Scene) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Length: 100\r\n\r\n{".encode()
    )
    answer = await asyncio.wait_for(reader.read(), 10)
    assert b" 408 " in answer.splitlines()[0]
    assert b'"code":"body_timeout"' in answer
    writer.close()


@over_a_socket(body_bytes=2000)
async def test_a_body_over_the_limit_is_refused_declared_or_not(stage: Scene) -> None:
    async def dribble() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 100

    for data in (b" " * 2001, dribble()):
        async with stage.http.post(f"{stage.url}/v1/chat/completions", data=data) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"
            assert response.headers["x-gridmill-request-id"]
    assert (await stage.answer())["choices"]


@over_a_socket(body_bytes=2000)
async def test_a_body_over_the_limit_is_refused_before_it_is_sent(stage: Scene) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Length: 2001\r\n\r\n".encode()
    )
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


@over_a_socket()
async def test_one_connection_serves_many_requests(stage: Scene) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector, headers={"authorization": f"Bearer {KEY}"}) as http:
        one = Scene(stage.server, stage.port, http, stage.gateway)
        for stream in (True, False, True):
            async with one.chat(stream=stream) as response:
                assert b"H" in await response.read()
            assert (await one.error(n=99))[0] == 400


@over_a_socket()
async def test_many_streams_at_once_do_not_mix(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        for token_id in unpack_ids(delivery.work.prompt) * 10:
            await delivery.ids(token_id)
            await asyncio.sleep(0)
        return delivery.ended("length")

    stage.dispatcher.script = script
    words = [f"word{number}" for number in range(64)]
    answers = await asyncio.gather(*[stage.events(messages=[{"role": "user", "content": word}]) for word in words])
    assert [text_of(events) for events in answers] == [word * 10 for word in words]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fault", "status", "code", "retry_after"),
    [
        (NoRoom("no_node", "nobody", 10), 503, "no_node", "10"),
        (NoRoom("overloaded", "full", 2), 429, "overloaded", "2"),
        (NoRoom("stopping", "bye", 10), 503, "stopping", "10"),
        (CallerFault(400, "bad_thing", "no", "top_k"), 400, "bad_thing", None),
        (NodeFault("node_failed", "out of memory"), 502, "node_failed", None),
        (RuntimeError("a bug"), 500, "internal_error", None),
    ],
)
def test_what_fails_before_a_node_accepts_is_a_plain_error(
    stream: bool, fault: Exception, status: int, code: str, retry_after: str | None
) -> None:
    async def script(delivery: Delivery) -> Outcome:
        raise fault

    async def body() -> None:
        async with scene() as stage:
            stage.dispatcher.script = script
            async with stage.chat(stream=stream) as response:
                assert response.status == status
                assert response.headers.get("retry-after") == retry_after
                assert "x-gridmill-node" not in response.headers
                assert response.headers["x-gridmill-request-id"] == "chatcmpl-000001"
                error = (await response.json())["error"]
            assert error["code"] == code
            assert set(error) == {"message", "type", "param", "code"}
            assert "a bug" not in error["message"]

    asyncio.run(body())


@over_a_socket()
async def test_a_node_lost_in_mid_stream_is_one_error_event_and_the_end(stage: Scene) -> None:
    async def script(delivery: Delivery) -> Outcome:
        delivery.placed("node-1")
        await delivery.ids(ord("a"))
        raise NodeFault("node_lost", "the link broke")

    stage.dispatcher.script = script
    events = await stage.events()
    assert text_of(events[:-1]) == "a"
    assert events[-1] == {
        "error": {
            "message": "the node that computed this failed: the link broke",
            "type": "server_error",
            "param": None,
            "code": "node_lost",
        }
    }
    async with stage.chat() as response:
        assert response.status == 502
        assert response.headers["x-gridmill-node"] == "node-1"


@over_a_socket()
async def test_keys_are_checked_before_anything_else(stage: Scene) -> None:
    url = f"{stage.url}/v1/chat/completions"
    for headers, status, code in (
        ({}, 401, "missing_api_key"),
        ({"authorization": "Bearer gm-wrong"}, 401, "invalid_api_key"),
        ({"authorization": f"Basic {KEY}"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer \xe9\xff"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer gm-node"}, 403, "insufficient_scope"),
    ):
        async with aiohttp.ClientSession() as http, http.post(url, data=b"not json", headers=headers) as response:
            assert response.status == status
            assert (await response.json())["error"]["code"] == code
            assert response.headers["x-gridmill-request-id"]
            assert ("www-authenticate" in response.headers) == (status == 401)
    assert stage.dispatcher.works == []


@over_a_socket()
async def test_an_unknown_model_is_404_with_a_suggestion(stage: Scene) -> None:
    status, error = await stage.error(model="toi")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "toy" in error["message"]


@over_a_socket()
async def test_name_at_class_selects_the_class(stage: Scene) -> None:
    assert (await stage.answer(model=f"toy@{CLASS_ID[:8]}"))["system_fingerprint"] == CLASS_ID[:16]
    assert (await stage.error(model="toy@ffffffff"))[0] == 404


@over_a_socket()
async def test_a_model_whose_text_is_not_here_yet_is_503(stage: Scene) -> None:
    stage.registry.text = None
    status, error = await stage.error()
    assert (status, error["code"]) == (503, "no_node")


@over_a_socket()
async def test_a_prompt_too_long_is_refused_with_numbers(stage: Scene) -> None:
    status, error = await stage.error(messages=[{"role": "user", "content": "x" * CONTEXT_TOKENS}])
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert error["message"].count(str(CONTEXT_TOKENS)) == 2
    async with stage.complete(prompt="x" * (CONTEXT_TOKENS - 1)) as response:
        assert response.status == 200
    assert stage.dispatcher.works[-1].sampling.max_tokens == 1


@over_a_socket()
async def test_what_depends_on_the_model_is_checked_with_the_parameters_name(stage: Scene) -> None:
    for parameters, param in (
        ({"top_k": FACTS.vocab_size + 1}, "top_k"),
        ({"logit_bias": {str(FACTS.vocab_size): 1}}, "logit_bias"),
        ({"stop_token_ids": [FACTS.vocab_size]}, "stop_token_ids"),
        ({"max_tokens": CONTEXT_TOKENS + 1}, "max_tokens"),
        ({"min_tokens": CONTEXT_TOKENS - 1}, "min_tokens"),
    ):
        status, error = await stage.error(**parameters)
        assert (status, error["param"]) == (400, param)
    for prompt in ([FACTS.vocab_size], ""):
        async with stage.complete(prompt=prompt) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, "prompt")
    assert stage.dispatcher.works == []


@over_a_socket()
async def test_the_text_services_errors_keep_their_fault(stage: Scene) -> None:
    for code, status, told in (
        ("template_refused", 400, "template_refused"),
        ("prompt_too_long", 400, "context_length_exceeded"),
        ("text_time", 502, "text_time"),
        ("text_busy", 429, "text_busy"),
        ("text_closed", 503, "text_closed"),
    ):
        stage.texts.error = TextError(code, "a sentence")
        assert (await stage.error())[0] == status
        assert (await stage.error())[1]["code"] == told


@over_a_socket()
async def test_unknown_paths_and_wrong_methods_have_openais_shape(stage: Scene) -> None:
    async with stage.http.get(f"{stage.url}/v1/nothing") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "unknown_url")
        assert response.headers["x-gridmill-request-id"]
    async with stage.http.get(f"{stage.url}/v1/chat/completions") as response:
        assert (response.status, response.headers["allow"]) == (405, "POST")
    async with stage.http.post(f"{stage.url}/v1/models") as response:
        assert (response.status, response.headers["allow"]) == (405, "GET")


@over_a_socket()
async def test_models_are_listed_and_found_by_name_slashes_included(stage: Scene) -> None:
    async with stage.http.get(f"{stage.url}/v1/models") as response:
        listing = await response.json()
        assert response.headers["x-gridmill-request-id"]
    assert [model["id"] for model in listing["data"]] == ["toy", "ann/toy"]
    assert listing["data"][0] == {
        "id": "toy",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "owner-1",
        "gridmill": {"class_id": CLASS_ID, "context_tokens": CONTEXT_TOKENS, "vocab_size": 512, "toy": False},
    }
    async with stage.http.get(f"{stage.url}/v1/models/ann/toy") as response:
        assert (await response.json())["id"] == "ann/toy"
    async with stage.http.get(f"{stage.url}/v1/models/nope") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")


# ---------------------------------------------------------------- what is written down


class Counting:
    def __init__(self) -> None:
        self.ended: list[tuple[str, int]] = []
        self.prompt_tokens = 0

    def request_ended(self, endpoint: str, status: int) -> None:
        self.ended.append((endpoint, status))

    def prompt_accepted(self, tokens: int) -> None:
        self.prompt_tokens += tokens


def test_every_request_is_counted_once_and_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting()

    async def body() -> None:
        async with scene(metrics=counting) as stage:
            stage.dispatcher.script = saying("secretanswer")
            await stage.answer(messages=[{"role": "user", "content": "secretquestion"}])
            await stage.events(messages=[{"role": "user", "content": "secretquestion"}], n=2)
            await stage.error(temperature="secretvalue")
            async with stage.http.get(f"{stage.url}/v1/models") as response:
                await response.read()

    with caplog.at_level(logging.INFO, logger="gridmill"):
        asyncio.run(body())
    assert counting.ended == [
        ("chat_completions", 200),
        ("chat_completions", 200),
        ("chat_completions", 400),
        ("models", 200),
    ]
    assert counting.prompt_tokens == 2 * len("secretquestion")
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    assert [line.status for line in lines] == [200, 200, 400, 200]  # type: ignore[attr-defined]
    fields = lines[1].__dict__
    assert (fields["prompt_tokens"], fields["output_tokens"]) == (14, 26)
    assert (fields["request_id"], fields["account"], fields["model"]) == ("chatcmpl-000002", "account-1", "toy")
    assert fields["class_id"] == CLASS_ID
    assert 0 <= fields["ttft_seconds"] <= fields["duration_seconds"]
    assert "secret" not in repr([record.__dict__ for record in caplog.records if record.name.startswith("gridmill")])


def test_a_caller_that_left_is_counted_as_such() -> None:
    counting = Counting()

    async def body() -> None:
        async with scene(metrics=counting) as stage:

            async def script(delivery: Delivery) -> Outcome:
                delivery.placed("node-1")
                await delivery.ids(ord("a"))
                await asyncio.Event().wait()
                raise AssertionError

            stage.dispatcher.script = script
            async with stage.chat(stream=True) as response:
                await response.content.readany()
                response.close()
            await asyncio.wait_for(stage.dispatcher.cancelled.wait(), 10)

    asyncio.run(body())
    assert counting.ended == [("chat_completions", 499)]
