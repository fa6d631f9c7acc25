"""The agent between a real link and real engines, over a cable that is only a function call.

Both links check every rule of the protocol: an End too many, an id beyond credit or an Accept too late ends the test.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from gridmill.node.agent import LOGPROB_MIN, Agent, agent_on
from gridmill.node.engines.base import Emit, Failed, Finished, Refused, Served, Tokens
from gridmill.node.engines.echo import EchoEngine
from gridmill.wire.classes import ModelClass, TextFacts, facts_bytes
from gridmill.wire.identity import Identity
from gridmill.wire.link import Arrived, Closed, Link, NetworkSide, NodeSide, Proven, Reason
from gridmill.wire.messages import (
    Accept,
    Cancel,
    Chunk,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Generate,
    Offer,
    Offers,
    Refuse,
    Step,
    Telemetry,
)
from gridmill.wire.sampling import Sampling, TokenLogprob, pack_ids


def served(name: str = "echo/test", padding: int = 0) -> Served:
    vocabulary = {f"t{number}": number for number in range(300)}
    tokenizer = json.dumps({"model": {"vocab": vocabulary}, "padding": "x" * padding}).encode()
    facts = TextFacts(chat_template=None, special_tokens={}, eos_token_ids=(), context_tokens=100_000, vocab_size=300)
    files = {hashlib.sha256(raw).hexdigest(): raw for raw in (tokenizer, facts_bytes(facts))}
    tokenizer_sha256, facts_sha256 = files
    model_class = ModelClass(
        weights=(),
        arithmetic="echo",
        kv_dtype="none",
        sampler_version=1,
        tokenizer_sha256=tokenizer_sha256,
        text_facts_sha256=facts_sha256,
    )
    return Served(name, model_class, facts, files)


def work(engine: Any, number: int = 1, max_tokens: int = 10, delivered: tuple[int, ...] = (), **more: Any) -> Generate:
    sampling = Sampling(seed=bytes(32), max_tokens=max_tokens, **more)
    class_id = engine.served.model_class.class_id
    return Generate(f"w{number}", class_id, pack_ids([5, number]), sampling, b"", pack_ids(delivered))


class Cable:
    """The node's channel, and the network at the other end of it."""

    def __init__(self, node: Identity | None = None, network: Identity | None = None) -> None:
        node_side = NodeSide(node or Identity(secrets.token_bytes(32)), "mill.example", "test")
        self.node = Link(node_side, entropy=secrets.token_bytes, now=0.0)
        network_side = NetworkSide(network or Identity(secrets.token_bytes(32)), ("mill.example",), "test")
        self.network = Link(network_side, entropy=secrets.token_bytes, now=0.0)
        self.heard: list[Any] = []  # messages that reached the network
        self.frames_due = False
        self.agent: Agent | None = None
        self.bulk_waits = 0
        self._news = asyncio.Event()

    def attach(self, agent: Agent) -> None:
        self.agent = agent
        self.pump()
        assert self.node.opened is not None

    # Channel

    def send(self, message: Any) -> None:
        self.node.send(message)
        if not self.frames_due:
            self.frames_due = True
            asyncio.get_running_loop().call_soon(self.pump)

    async def bulk_below(self, size: int) -> None:
        self.bulk_waits += 1
        while self.node.bulk_bytes >= size:
            await asyncio.sleep(0)

    # the network

    def say(self, message: Any) -> None:
        self.network.send(message)
        self.pump()

    def offer(self, stream: int, generate: Generate, credit: int = 10_000) -> None:
        self.say(Offer(stream, generate, credit))

    def pump(self) -> None:
        """Carries what both ends have to say until neither says more, one small piece of bulk a time."""
        assert self.agent is not None
        self.frames_due = False
        while True:
            out, back = self.node.take_bytes(), self.network.take_bytes()
            if not out and not back:
                break
            for event in self.network.receive(out, 1.0):
                if isinstance(event, Proven):
                    self.network.admit(1.0)
                elif isinstance(event, Arrived):
                    self.heard.append(event.message)
                elif isinstance(event, Closed):
                    raise AssertionError(f"the network closed: {event}")
            for event in self.node.receive(back, 1.0):
                self.agent.on_event(event)
        self._news.set()

    def cut(self) -> None:
        assert self.agent is not None
        for event in self.node.eof(2.0):
            self.agent.on_event(event)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def ends(self, stream: int | None = None) -> list[End]:
        ends = [end for step in self.of(Step) for end in step.ends]
        return [end for end in ends if stream is None or end.stream == stream]

    def emissions(self, stream: int) -> list[Emission]:
        return [emission for step in self.of(Step) for emission in step.emissions if emission.stream == stream]

    def ids(self, stream: int) -> list[int]:
        return [token_id for emission in self.emissions(stream) for token_id in emission.ids]


@asynccontextmanager
async def mill(*engines: Any) -> AsyncIterator[Cable]:
    cable = Cable()
    async with agent_on(engines, cable) as agent:
        cable.attach(agent)
        yield cable
    assert agent.running == 0


class Scripted:
    """An engine whose runs are written in the test: `script(work, emit)`."""

    kind = "scripted"
    slots = 8

    def __init__(self, script: Callable[[Generate, Emit], Awaitable[None]]) -> None:
        self.served = served()
        self._script = script
        self.cancelled = 0

    async def run(self, work: Generate, emit: Emit) -> None:
        try:
            await self._script(work, emit)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def telemetry(self) -> Telemetry:
        return Telemetry(running=1, tokens_per_second=2.0, kv_pages_used=3, kv_pages_total=4, memory_bytes=5)

    def speeds(self) -> tuple[float, float]:
        return 20.0, 300.0

    async def close(self) -> None: ...


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


async def never(work: Generate, emit: Emit) -> None:
    await asyncio.Event().wait()


def test_an_opened_link_hears_what_the_node_serves() -> None:
    async def body() -> None:
        echo, scripted = EchoEngine(served("a", padding=1), slots=7), Scripted(never)
        async with mill(echo, scripted) as cable:
            await cable.until(lambda: cable.of(Offers))
            (offers,) = cable.of(Offers)
            assert [(o.name, o.slots, o.engine) for o in offers.offers] == [
                ("a", 7, "echo"),
                ("echo/test", 8, "scripted"),
            ]
            assert offers.offers[1].decode_tokens_per_second == 20.0
            assert offers.offers[1].prefill_tokens_per_second == 300.0
            assert offers.offers[0].model_class == echo.served.model_class

    run(body)


def test_a_work_is_accepted_streamed_and_ended_once_with_its_count() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=10))
            cable.offer(2, work(engine, max_tokens=10, delivered=(7, 8, 9)))
            await cable.until(lambda: len(cable.ends()) == 2)
            kinds = [type(message) for message in cable.heard]
            assert kinds.index(Accept) < kinds.index(Step)
            assert cable.of(Accept) == [Accept(1), Accept(2)]
            assert cable.ends(1) == [End(1, "length", 10)]
            assert cable.ends(2) == [End(2, "length", 7)]
            assert cable.emissions(2)[0].position == 3
            assert len(cable.ids(1)) == 10 and len(cable.ids(2)) == 7

    run(body)


def test_all_streams_of_one_engine_step_share_a_frame() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), slots=64)
        async with mill(engine) as cable:
            for stream in range(1, 65):
                cable.offer(stream, work(engine, stream, max_tokens=50))
            await cable.until(lambda: len(cable.ends()) == 64)
            steps = cable.of(Step)
            assert len(steps) <= 60, "64 streams of 50 ids are about 50 steps, not 3200"
            assert max(len(step.emissions) for step in steps) == 64
            for stream in range(1, 65):
                assert len(cable.ids(stream)) == 50

    run(body)


def test_ids_wait_for_credit_and_go_on_when_it_comes() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), ids_per_step=8)
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=30), credit=3)
            cable.offer(2, work(engine, max_tokens=30))
            await cable.until(lambda: cable.ends(2))
            assert len(cable.ids(1)) == 3, "a stream without credit holds, the other one does not"
            cable.say(Credit(((1, 2),)))
            await cable.until(lambda: len(cable.ids(1)) == 5)
            assert not cable.ends(1)
            cable.say(Credit(((1, 1000),)))
            await cable.until(lambda: cable.ends(1))
            assert cable.ends(1) == [End(1, "length", 30)]
            positions = [emission.position for emission in cable.emissions(1)]
            assert positions[:2] == [0, 3] and positions == sorted(positions)

    run(body)


def test_no_credit_at_all_holds_the_first_id() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=2), credit=0)
            await cable.until(lambda: cable.of(Accept))
            assert not cable.of(Step)
            cable.say(Credit(((1, 2),)))
            await cable.until(lambda: cable.ends(1))
            assert len(cable.ids(1)) == 2

    run(body)


def test_a_refused_work_gets_a_refuse_and_nothing_else() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), slots=1)
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=50), credit=1)
            cable.offer(2, work(engine))
            cable.offer(3, msgspec.structs.replace(work(engine), class_id="0" * 64))
            cable.offer(4, msgspec.structs.replace(work(engine), prompt=pack_ids([300])))
            await cable.until(lambda: len(cable.of(Refuse)) == 3)
            refused = {refuse.stream: (refuse.fault, refuse.code) for refuse in cable.of(Refuse)}
            assert refused == {2: ("node", "busy"), 3: ("node", "wrong_class"), 4: ("caller", "invalid_ids")}
            assert cable.of(Accept) == [Accept(1)]
            cable.say(Cancel(1))
            await cable.until(lambda: cable.ends(1))
            assert [end.stream for end in cable.ends()] == [1]

    run(body)


def test_a_cancelled_work_frees_its_slot_and_counts_what_was_sent() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), slots=1)
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=90), credit=20)
            await cable.until(lambda: len(cable.ids(1)) == 20)
            cable.say(Cancel(1, keep=5))
            await cable.until(lambda: cable.ends(1))
            assert cable.ends(1) == [End(1, "cancelled", 20)]
            cable.offer(2, work(engine))
            await cable.until(lambda: cable.ends(2))
            assert cable.ends(2)[0].kind == "length"

    run(body)


def test_a_work_that_is_cancelled_before_it_began_is_still_accepted_and_ended() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(engine) as cable:
            cable.offer(1, work(engine))
            cable.say(Cancel(1))
            await cable.until(lambda: cable.ends(1))
            assert cable.of(Accept) == [Accept(1)]
            assert cable.ends(1) == [End(1, "cancelled", 0)]

    run(body)


def test_a_cancel_that_crosses_the_end_changes_nothing() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=1))
            await cable.until(lambda: cable.ends(1))
            cable.say(Cancel(1))
            cable.offer(2, work(engine, max_tokens=1))
            await cable.until(lambda: cable.ends(2))
            assert len(cable.ends(1)) == 1

    run(body)


@pytest.mark.parametrize(
    ("events", "count", "detail"),
    [
        ([], 0, "returned without an end"),
        ([ValueError("the prompt said: secret")], 0, "ValueError"),
        ([Tokens((5,)), KeyError("secret")], 1, "KeyError"),
        ([Tokens((300,))], 0, "outside the vocabulary"),
        ([Tokens((-1,))], 0, "outside the vocabulary"),
        ([Tokens(())], 0, "no ids"),
        ([Tokens((5,) * 11)], 0, "more ids than max_tokens"),
        ([Tokens((5,), (TokenLogprob(0.0),))], 0, "nobody asked for"),
        ([Finished("stop"), Tokens((5,))], 0, "ids came after the end"),
        ([Tokens((5,)), Failed("out_of_memory", "no page")], 1, "no page"),
    ],
)
def test_an_engine_that_breaks_becomes_one_failed_end_without_its_secrets(
    events: list[Any], count: int, detail: str
) -> None:
    async def script(generate: Generate, emit: Emit) -> None:
        for event in events:
            if isinstance(event, Exception):
                raise event
            await emit(event)

    async def body() -> None:
        engine = Scripted(script)
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=10))
            await cable.until(lambda: cable.ends(1))
            (end,) = cable.ends(1)
            assert (end.kind, end.count) == ("failed", count)
            assert detail in end.detail and "secret" not in end.detail
            cable.offer(2, work(engine, 2))
            await cable.until(lambda: cable.ends(2))

    run(body)


def test_a_refusal_after_the_accept_is_a_failure_of_the_node() -> None:
    async def script(generate: Generate, emit: Emit) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await emit(Refused("node", "kv_too_small", "no room"))

    async def body() -> None:
        engine = Scripted(script)
        async with mill(engine) as cable:
            cable.offer(1, work(engine))
            await cable.until(lambda: cable.ends(1))
            assert cable.ends(1) == [End(1, "failed", 0, 0, "kv_too_small", "no room")]
            assert not cable.of(Refuse)

    run(body)


def test_ids_emitted_before_the_first_wait_still_come_after_the_accept() -> None:
    async def script(generate: Generate, emit: Emit) -> None:
        await emit(Tokens((5, 6)))
        await emit(Tokens((7,)))
        await emit(Finished("stop", cached_tokens=1))

    async def body() -> None:
        engine = Scripted(script)
        async with mill(engine) as cable:
            cable.offer(1, work(engine))
            await cable.until(lambda: cable.ends(1))
            assert cable.heard[1:] == [Accept(1), *cable.of(Step)]
            assert cable.emissions(1) == [Emission(1, 0, (5, 6, 7))]
            assert cable.ends(1) == [End(1, "stop", 3, 1)]

    run(body)


def test_logprobs_travel_split_by_credit_and_without_infinities() -> None:
    async def script(generate: Generate, emit: Emit) -> None:
        logprobs = tuple(TokenLogprob(-float(n), ((n, -math.inf),)) for n in range(5))
        await emit(Tokens(tuple(range(5)), logprobs))
        await emit(Finished("length"))

    async def body() -> None:
        engine = Scripted(script)
        async with mill(engine) as cable:
            cable.offer(1, work(engine, top_logprobs=1), credit=2)
            await cable.until(lambda: cable.emissions(1))
            cable.say(Credit(((1, 3),)))
            await cable.until(lambda: cable.ends(1))
            first, second = cable.emissions(1)
            assert first.logprobs == (TokenLogprob(0.0, ((0, LOGPROB_MIN),)), TokenLogprob(-1.0, ((1, LOGPROB_MIN),)))
            assert second.position == 2 and len(second.logprobs or ()) == 3

    run(body)


def test_a_flood_of_logprobs_is_cut_into_steps_that_the_link_takes() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), slots=64, ids_per_step=1000)
        async with mill(engine) as cable:
            for stream in range(1, 33):
                cable.offer(stream, work(engine, stream, max_tokens=1000, top_logprobs=20))
            await cable.until(lambda: len(cable.ends()) == 32)
            assert all(len(cable.ids(stream)) == 1000 for stream in range(1, 33))

    run(body)


def test_a_step_that_is_full_at_once_still_comes_after_the_accept() -> None:
    async def script(generate: Generate, emit: Emit) -> None:
        entry = TokenLogprob(-1.0, tuple((n, -1.0 - n) for n in range(20)))
        await emit(Tokens((5,) * 1000, (entry,) * 1000))
        await emit(Finished("length"))

    async def body() -> None:
        engine = Scripted(script)
        async with mill(engine) as cable:
            cable.offer(1, work(engine, max_tokens=1000, top_logprobs=20))
            await cable.until(lambda: cable.ends(1))
            assert len(cable.of(Step)) > 1 and len(cable.ids(1)) == 1000

    run(body)


def test_files_are_fetched_in_paced_chunks_and_absent_ones_said_to_be() -> None:
    async def body() -> None:
        engine = EchoEngine(served(padding=300_000))
        tokenizer = engine.served.model_class.tokenizer_sha256
        async with mill(engine) as cable:
            cable.say(Fetch(1, tokenizer))
            cable.say(Fetch(2, engine.served.model_class.text_facts_sha256))
            cable.say(Fetch(3, "0" * 64))

            def got(transfer: int) -> bytes:
                return b"".join(chunk.data for chunk in cable.of(Chunk) if chunk.transfer == transfer)

            await cable.until(lambda: len(got(1)) == len(engine.served.files[tokenizer]))
            assert engine.served.files == {hashlib.sha256(got(n)).hexdigest(): got(n) for n in (1, 2)}
            assert [chunk for chunk in cable.of(Chunk) if chunk.transfer == 3] == [Chunk(3, 0, -1, b"")]
            assert cable.bulk_waits >= 6

    run(body)


def test_a_lost_link_cancels_every_work_on_it() -> None:
    async def body() -> None:
        engine = Scripted(never)
        async with mill(engine) as cable:
            for stream in (1, 2, 3):
                cable.offer(stream, work(engine, stream))
            await cable.until(lambda: len(cable.of(Accept)) == 3)
            assert cable.agent is not None and cable.agent.running == 3
            cable.cut()
            while cable.agent.running:
                await asyncio.sleep(0)
            assert engine.cancelled == 3
            assert not cable.ends()

    run(body)


def test_leaving_the_context_waits_for_every_work_to_stop() -> None:
    stopped: list[str] = []

    async def script(generate: Generate, emit: Emit) -> None:
        try:
            await never(generate, emit)
        finally:
            await asyncio.sleep(0)
            stopped.append(generate.work_id)

    async def body() -> None:
        engine = Scripted(script)
        async with mill(engine) as cable:
            cable.offer(1, work(engine))
            await cable.until(lambda: cable.of(Accept))
        assert stopped == ["w1"]

    run(body)


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(engine) as cable:
            assert cable.agent is not None
            cable.offer(1, work(engine, max_tokens=10), credit=2)
            await cable.until(lambda: len(cable.ids(1)) == 2)
            draining = asyncio.create_task(cable.agent.drain(30.0))
            await asyncio.sleep(0)
            # An offer that crossed the Drain on its way.
            cable.network.send(Offer(2, work(engine, 2), 100))
            cable.pump()
            await cable.until(lambda: cable.of(Refuse))
            assert cable.of(Refuse)[0].code == "draining"
            assert cable.of(Drain) == [Drain(30.0)]
            assert not draining.done()
            cable.say(Credit(((1, 100),)))
            await draining
            cable.pump()
            assert cable.ends() == [End(1, "length", 10)]

    run(body)


def test_what_does_not_finish_before_the_deadline_is_failed_not_forgotten() -> None:
    async def body() -> None:
        engine = Scripted(never)
        async with mill(engine) as cable:
            assert cable.agent is not None
            cable.offer(1, work(engine))
            await cable.until(lambda: cable.of(Accept))
            await cable.agent.drain(0.01)
            cable.pump()
            (end,) = cable.ends()
            assert (end.kind, end.code, engine.cancelled) == ("failed", "node_leaving", 1)

    run(body)


def test_draining_before_the_link_ever_opened_ends_at_once() -> None:
    async def body() -> None:
        engine = Scripted(never)
        async with agent_on([engine], Cable()) as agent:
            await agent.drain(30.0)

    run(body)


def test_telemetry_is_the_sum_over_engines() -> None:
    async def body() -> None:
        async with mill(Scripted(never), EchoEngine(served("b", padding=2))) as cable:
            assert cable.agent is not None
            telemetry = cable.agent.telemetry()
            assert (telemetry.running, telemetry.kv_pages_total, telemetry.memory_bytes) == (1, 4, 5)
            cable.node.telemetry = cable.agent.telemetry
            cable.network.tick(6.0)
            cable.pump()
            assert cable.network.peer_telemetry is not None and cable.network.peer_telemetry.kv_pages_used == 3

    run(body)


def test_a_link_that_this_side_closed_cancels_its_works_too() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        async with mill(engine) as cable:
            assert cable.agent is not None
            cable.offer(1, work(engine, max_tokens=10_000))
            await cable.until(lambda: cable.emissions(1))
            cable.node.close(Reason.STOPPING)
            for event in cable.node.take_events():
                cable.agent.on_event(event)
            while cable.agent.running:
                await asyncio.sleep(0)
            assert not cable.ends()

    run(body)


def test_a_bug_of_our_own_ends_the_program_instead_of_hanging_a_stream() -> None:
    class Strict(Cable):
        def send(self, message: Any) -> None:
            assert not isinstance(message, Step), "our own Step breaks the protocol"
            super().send(message)

    async def body() -> None:
        engine = EchoEngine(served())
        cable = Strict()
        with pytest.raises(ExceptionGroup) as group:
            async with agent_on([engine], cable) as agent:
                cable.attach(agent)
                cable.offer(1, work(engine))
                await asyncio.Event().wait()
        assert group.value.subgroup(AssertionError) is not None
        assert engine.telemetry().running == 0

    run(body)
