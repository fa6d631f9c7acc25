"""The echo engine keeps the promise of every engine, and its ids give a wrong resume away."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from gridmill.node.engines.base import Engine, Event, Failed, Finished, Refused, Served, Tokens
from gridmill.node.engines.check import check_engine
from gridmill.node.engines.echo import EchoEngine, ordinary_ids
from gridmill.wire.classes import ModelClass, TextFacts, facts_bytes
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import Sampling, TokenLogprob, pack_ids

SPECIAL = (0, 1, 2)


def served(vocab_size: int = 300, context_tokens: int = 512) -> Served:
    vocabulary = {f"t{number}": number for number in range(vocab_size)}
    added = [{"id": number, "content": f"t{number}", "special": True} for number in SPECIAL]
    tokenizer = json.dumps(
        {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": added}
    ).encode()
    facts = TextFacts(
        chat_template=None,
        special_tokens={},
        eos_token_ids=(2,),
        context_tokens=context_tokens,
        vocab_size=vocab_size,
    )
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
    return Served("echo/test", model_class, facts, files)


def work(engine: Engine, prompt: list[int], seed: int = 1, max_tokens: int = 10, **more: object) -> Generate:
    sampling = Sampling(seed=bytes([seed]) * 32, max_tokens=max_tokens, **more)  # type: ignore[arg-type]
    return Generate("w", engine.served.model_class.class_id, pack_ids(prompt), sampling)


async def heard(engine: Engine, generate: Generate) -> list[Event]:
    events: list[Event] = []

    async def emit(event: Event) -> None:
        events.append(event)

    await engine.run(generate, emit)
    return events


async def ids_of(engine: Engine, generate: Generate) -> list[int]:
    return [token_id for event in await heard(engine, generate) if isinstance(event, Tokens) for token_id in event.ids]


@pytest.mark.parametrize("ids_per_step", [1, 5])
def test_echo_passes_the_public_suite(ids_per_step: int) -> None:
    async def make() -> Engine:
        return EchoEngine(served(), slots=3, ids_per_step=ids_per_step)

    # The suite counts events at a blocked reader, which is one step whatever its size.
    asyncio.run(check_engine(make))


def test_echo_at_a_rate_passes_the_public_suite_too() -> None:
    async def make() -> Engine:
        return EchoEngine(served(), slots=2, tokens_per_second=20_000, first_token_delay_seconds=0.001)

    asyncio.run(check_engine(make))


def test_every_id_depends_on_prompt_seed_and_all_ids_before() -> None:
    async def body() -> None:
        engine = EchoEngine(served())
        whole = await ids_of(engine, work(engine, [5, 6, 7]))
        assert whole != await ids_of(engine, work(engine, [5, 6, 8]))
        assert whole != await ids_of(engine, work(engine, [5, 6, 7], seed=2))
        wrong = [*whole[:3], (whole[3] + 1) % 300]
        resumed = await ids_of(engine, msgspec.structs.replace(work(engine, [5, 6, 7]), delivered=pack_ids(wrong)))
        assert resumed[:2] != whole[4:6]

    asyncio.run(body())


def test_special_and_end_of_sequence_ids_never_come() -> None:
    async def body() -> None:
        engine = EchoEngine(served(vocab_size=8))
        ids = await ids_of(engine, work(engine, [5], max_tokens=500))
        assert set(ids) == set(range(8)) - set(SPECIAL)

    asyncio.run(body())


def test_the_context_ends_an_answer_that_max_tokens_does_not() -> None:
    async def body() -> None:
        engine = EchoEngine(served(context_tokens=20))
        events = await heard(engine, work(engine, [5] * 15, max_tokens=100))
        assert events[-1] == Finished("length") and len(events) == 6
        assert (await heard(engine, work(engine, [5] * 20)))[0] == Refused(
            "caller", "context_length_exceeded", "the prompt is 20 tokens; this model holds 20, the answer included"
        )

    asyncio.run(body())


def test_no_stop_id_comes_before_min_tokens() -> None:
    async def body() -> None:
        engine = EchoEngine(served(vocab_size=8))
        stops = (3, 4, 5)
        for seed in range(1, 20):
            ids = await ids_of(engine, work(engine, [5], seed=seed, max_tokens=40, min_tokens=15, stop_token_ids=stops))
            assert not set(ids[:15]) & set(stops)
            assert ids[-1] in stops and not set(ids[:-1]) & set(stops)
        everything = tuple(range(3, 8))
        ids = await ids_of(engine, work(engine, [5], max_tokens=40, min_tokens=5, stop_token_ids=everything))
        assert len(ids) == 1, "in a vocabulary of nothing but stop ids there is no other end"

    asyncio.run(body())


def test_streams_advance_in_step_with_each_other() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), slots=8)
        order: list[int] = []

        def emit_to(stream: int) -> Callable[[Event], Awaitable[None]]:
            async def emit(event: Event) -> None:
                if isinstance(event, Tokens):
                    order.append(stream)

            return emit

        runs = [engine.run(work(engine, [5, stream], max_tokens=20), emit_to(stream)) for stream in range(8)]
        await asyncio.gather(*runs)
        assert order == list(range(8)) * 20

    asyncio.run(body())


def test_a_rate_and_a_delay_are_kept_on_the_loops_own_clock() -> None:
    loop = asyncio.new_event_loop()
    clock = [0.0]
    loop.time = lambda: clock[0]  # type: ignore[method-assign]
    select = loop._selector.select  # type: ignore[attr-defined]

    def jump(timeout: float | None) -> object:
        clock[0] += timeout or 0.0
        return select(0)

    loop._selector.select = jump  # type: ignore[attr-defined]

    async def body() -> float:
        engine = EchoEngine(served(), tokens_per_second=10, first_token_delay_seconds=2)
        await heard(engine, work(engine, [5], max_tokens=21))
        return clock[0]

    try:
        assert loop.run_until_complete(body()) == pytest.approx(2 + 20 / 10, abs=0.01)
    finally:
        loop.close()


def test_closing_fails_what_runs_even_while_it_waits_for_its_first_id() -> None:
    async def body() -> None:
        engine = EchoEngine(served(), first_token_delay_seconds=3600)
        task = asyncio.create_task(heard(engine, work(engine, [5])))
        await asyncio.sleep(0)
        assert engine.telemetry().running == 1
        await engine.close()
        (end,) = await task
        assert isinstance(end, Failed) and end.code == "closed"
        assert engine.telemetry().running == 0

    asyncio.run(body())


def test_a_file_that_is_no_tokenizer_is_a_clear_error() -> None:
    for raw in (b"{}", b"[]", b"\xff", b'{"model": {"vocab": {}}}', b'{"model": {"vocab": {"a": "b"}}}'):
        with pytest.raises(ValueError, match=r"tokenizer\.json holds no"):
            ordinary_ids(raw, served())


# ---------------------------------------------------------------- the suite can fail: one broken promise each


class Broken(EchoEngine):
    """Echo with one flaw, put between it and its reader."""

    def __init__(self, flaw: str) -> None:
        super().__init__(served(), slots=2)
        self.flaw = flaw
        self.runs = 0

    async def run(self, work: Generate, emit: Callable[[Event], Awaitable[None]]) -> None:
        self.runs += 1
        first = True

        async def flawed(event: Event) -> None:
            nonlocal first
            match self.flaw, event:
                case "two ends", Finished():
                    await emit(event)
                case "no end", Finished():
                    return
                case "outside", Tokens():
                    event = Tokens((300,) * len(event.ids), event.logprobs)
                case "forgetful", Tokens() if work.delivered and first:
                    event = Tokens(tuple((token_id + 1) % 300 for token_id in event.ids), event.logprobs)
                case "moody", Tokens() if self.runs % 2:
                    event = Tokens(tuple(3 + (token_id + 1) % 290 for token_id in event.ids), event.logprobs)
                case "mute logprobs", Tokens():
                    event = Tokens(event.ids)
                case "unranked", Tokens() if event.logprobs:
                    entries = tuple(TokenLogprob(entry.logprob, entry.top[::-1]) for entry in event.logprobs)
                    event = Tokens(event.ids, entries)
                case "wrong fault", Refused():
                    event = Refused("node" if event.fault == "caller" else "caller", event.code, event.detail)
                case "impatient", Tokens():
                    self.waiting = asyncio.ensure_future(emit(event))
                    await asyncio.sleep(0)
                    return
            first = False
            await emit(event)

        if self.flaw == "seedless":
            work = msgspec.structs.replace(work, sampling=msgspec.structs.replace(work.sampling, seed=bytes(32)))
        if self.flaw == "swallows":
            try:
                return await super().run(work, flawed)
            except asyncio.CancelledError:
                return None
        if self.flaw == "leaks":
            self._running += 1
        return await super().run(work, flawed)


@pytest.mark.parametrize(
    ("flaw", "complaint"),
    [
        ("two ends", "came before the end"),
        ("no end", "the last event must be an end"),
        ("outside", "outside the vocabulary"),
        ("forgetful", "went on differently"),
        ("moody", "a stop id must be the last|gave other ids"),
        ("mute logprobs", "did not come"),
        ("unranked", "must be ordered"),
        ("wrong fault", "fault"),
        ("impatient", "emit was called again|left tasks"),
        ("seedless", "four seeds"),
        ("swallows", "CancelledError"),
        ("leaks", "must finish|busy"),
    ],
)
def test_the_suite_names_the_promise_that_an_engine_breaks(flaw: str, complaint: str) -> None:
    async def make() -> Engine:
        return Broken(flaw)

    with pytest.raises(AssertionError, match=complaint):
        asyncio.run(check_engine(make))
