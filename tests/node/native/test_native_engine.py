"""The native engine as its node sees it: `run`, back-pressure, cancelling, closing, and what it says of itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from fake_runner import EOS_ID, FACTS, FAKE_CLASS, VOCAB_SIZE, FakeRunner, expected, work
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.node.engines.base import Event, Failed, Finished, Paused, Refused, Served, Tokens
from gridmill.node.engines.check import check_engine
from gridmill.node.engines.native.engine import NativeEngine, load_native
from gridmill.node.engines.native.families import Findings
from gridmill.node.engines.native.runner import Row
from gridmill.node.engines.native.slice import ModelUnsupported
from gridmill.node.engines.native.step import AHEAD_TOKENS_MAX
from gridmill.wire.classes import ModelClass, TextFacts
from gridmill.wire.messages import Generate

SERVED = Served("fake", FAKE_CLASS, FACTS, {})
TINY_VOCAB_SIZE = 300


@asynccontextmanager
async def engine_over(runner: FakeRunner, **options: Any) -> AsyncIterator[NativeEngine]:
    engine = NativeEngine(SERVED, runner, **options)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.close()


async def heard(engine: NativeEngine, generate: Generate) -> list[Event]:
    events: list[Event] = []

    async def emit(event: Event) -> None:
        events.append(event)

    await engine.run(generate, emit)
    return events


def ids_of(events: Sequence[Event]) -> list[int]:
    return [token_id for event in events if isinstance(event, Tokens) for token_id in event.ids]


class Reader:
    """An emit that blocks while its gate is shut."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.gate = asyncio.Event()
        self.first = asyncio.Event()

    async def emit(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        await self.gate.wait()


async def settled(engine: NativeEngine, *, held: int = 0) -> None:
    """Waits until the compute thread has let go of everything but `held` pages."""
    async with asyncio.timeout(30):
        while engine.telemetry().kv_pages_used != held or engine.telemetry().running or engine.telemetry().waiting:
            await asyncio.sleep(0.001)


def check(body: Coroutine[Any, Any, None]) -> None:
    """Runs a test body; afterwards no thread of ours may be left."""
    asyncio.run(body)
    assert not [thread for thread in threading.enumerate() if thread.name == "gridmill-compute"]


def test_a_work_gives_its_ids_and_one_end() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner()) as engine:
            events = await heard(engine, work(1))
            assert ids_of(events) == expected(work(1))
            assert events[-1] == Finished("length", 0)
            assert all(isinstance(event, Tokens) and event.logprobs is None for event in events[:-1])

    check(body())


def test_many_works_at_once_give_the_ids_of_each_alone() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner(), slots=64) as engine:
            works = [work(number, prompt=[number % 30] * (1 + number), max_tokens=40) for number in range(64)]
            for generate, events in zip(works, await asyncio.gather(*(heard(engine, w) for w in works)), strict=True):
                assert ids_of(events) == expected(generate)
            await settled(engine)

    check(body())


def test_delivered_ids_are_continued_and_a_complete_work_finishes_at_once() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner()) as engine:
            whole = expected(work(1))
            assert ids_of(await heard(engine, work(1, delivered=whole[:7]))) == whole[7:]
            assert await heard(engine, work(1, delivered=whole)) == [Finished("length")]
            ended = work(1, delivered=[3, EOS_ID], ignore_eos=False)
            assert await heard(engine, ended) == [Finished("stop")]
            assert await heard(engine, work(1, delivered=[3, 9], stop_token_ids=(9,))) == [Finished("stop")]

    check(body())


def test_logprobs_come_with_their_ids_when_asked_for() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner()) as engine:
            events = await heard(engine, work(1, top_logprobs=3))
            tokens = [event for event in events if isinstance(event, Tokens)]
            assert all(event.logprobs and len(event.logprobs) == len(event.ids) for event in tokens)
            assert all(len(entry.top) == 3 for event in tokens for entry in event.logprobs or ())

    check(body())


def test_the_context_ends_a_work_with_length() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner()) as engine:
            events = await heard(engine, work(1, prompt=[1] * 500, max_tokens=100))
            assert len(ids_of(events)) == FACTS.context_tokens - 500
            assert isinstance(end := events[-1], Finished) and end.reason == "length"

    check(body())


def test_a_work_that_cannot_be_served_here_is_refused_with_whose_fault_it_is() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner(pages=16, page_tokens=4)) as engine:
            table = [
                (work(class_id="f" * 64), "node", "wrong_class"),
                (work(prompt=[]), "caller", "empty_prompt"),
                (work(prompt=[VOCAB_SIZE]), "caller", "invalid_ids"),
                (work(temperature=float("nan")), "caller", "invalid_parameter"),
                (work(prompt=[1] * FACTS.context_tokens), "caller", "context_length_exceeded"),
                (work(prompt=[1] * 46, max_tokens=20), "node", "kv_too_small"),
            ]
            for generate, fault, code in table:
                (refused,) = await heard(engine, generate)
                assert isinstance(refused, Refused) and (refused.fault, refused.code) == (fault, code)
                assert refused.detail
            fits = work(prompt=[1] * 45, max_tokens=20)  # 16 pages of 4: the last id needs no page
            assert ids_of(await heard(engine, fits)) == expected(fits)

    check(body())


def test_a_full_engine_refuses_as_busy_and_a_cancelled_run_frees_its_slot_at_once() -> None:
    async def body() -> None:
        async with engine_over(FakeRunner(), slots=2) as engine, asyncio.TaskGroup() as group:
            readers = [Reader(), Reader()]
            runs = [
                group.create_task(engine.run(work(number, max_tokens=100), reader.emit))
                for number, reader in enumerate(readers)
            ]
            await readers[0].first.wait()
            (refused,) = await heard(engine, work(3))
            assert isinstance(refused, Refused) and (refused.fault, refused.code) == ("node", "busy")
            runs[0].cancel()
            await asyncio.wait([runs[0]])
            count = len(readers[0].events)
            assert ids_of(await heard(engine, work(3))) == expected(work(3))
            assert len(readers[0].events) == count, "something was emitted after the run was cancelled"
            readers[1].gate.set()
            await runs[1]
            assert ids_of(readers[1].events) == expected(work(1, max_tokens=100))
            await settled(engine)

    check(body())


def test_cancelling_frees_pages_within_one_step() -> None:
    async def body() -> None:
        runner = FakeRunner()
        async with engine_over(runner) as engine, asyncio.TaskGroup() as group:
            reader = Reader()
            reader.gate.set()
            run = group.create_task(engine.run(work(1, max_tokens=400), reader.emit))
            await reader.first.wait()
            runner.gate.clear()  # at most one forward pass is under way from here on
            steps = len(runner.batches)
            run.cancel()
            await asyncio.wait([run])
            runner.gate.set()
            await settled(engine)
            assert len(runner.batches) <= steps + 1

    check(body())


def test_a_blocked_reader_is_a_bounded_number_of_ids_behind_and_blocks_nobody() -> None:
    async def body() -> None:
        runner = FakeRunner()
        async with engine_over(runner) as engine, asyncio.TaskGroup() as group:
            got: list[int] = []
            letters = asyncio.Semaphore(0)  # how many more events the reader will take
            waiting = asyncio.Event()

            async def emit(event: Event) -> None:
                if isinstance(event, Tokens):
                    assert len(event.ids) <= AHEAD_TOKENS_MAX
                    waiting.set()
                    await letters.acquire()
                    got.extend(event.ids)

            blocked = group.create_task(engine.run(work(1, max_tokens=200), emit))
            others = 0
            for number in range(2, 6):
                await waiting.wait()
                generate = work(number, max_tokens=60)
                assert ids_of(await heard(engine, generate)) == expected(generate)
                others += 3 + 59
                computed = sum(sum(batch) for batch in runner.batches) - others
                assert computed <= 3 + len(got) + AHEAD_TOKENS_MAX
                waiting.clear()
                letters.release()
            for _ in range(200):
                letters.release()
            await blocked
            assert got == expected(work(1, max_tokens=200))

    check(body())


def test_an_idle_engine_computes_nothing_and_wakes_for_the_next_work() -> None:
    async def body() -> None:
        runner = FakeRunner()
        async with engine_over(runner) as engine:
            await heard(engine, work(1))
            steps = len(runner.batches)
            await asyncio.sleep(0.05)
            assert len(runner.batches) == steps
            assert engine._sleeping
            assert ids_of(await heard(engine, work(2))) == expected(work(2))

    check(body())


def test_a_failing_emit_frees_the_slot_and_the_error_comes_out() -> None:
    async def body() -> None:
        async def emit(event: Event) -> None:
            raise ConnectionResetError("the link is gone")

        async with engine_over(FakeRunner(), slots=1) as engine:
            with pytest.raises(ConnectionResetError):
                await engine.run(work(1, max_tokens=300), emit)
            assert ids_of(await heard(engine, work(2))) == expected(work(2))
            await settled(engine)

    check(body())


def test_a_bad_row_fails_its_own_run_and_the_engine_goes_on() -> None:
    async def body() -> None:
        def fail(rows: Sequence[Row]) -> None:
            if any(row.position == 0 and (row.ids or (0,))[0] == 7 for row in rows):
                raise RuntimeError("no sevens here")

        runner = FakeRunner()
        runner.fail = fail
        async with engine_over(runner) as engine:
            works = [work(0), work(1, prompt=[7, 7]), work(2)]
            outcomes = await asyncio.gather(*(heard(engine, generate) for generate in works))
            assert outcomes[1] == [Failed("compute_error", "RuntimeError: no sevens here")]
            assert [ids_of(outcomes[0]), ids_of(outcomes[2])] == [expected(works[0]), expected(works[2])]

    check(body())


def test_a_broken_device_fails_every_run_and_refuses_what_comes_after() -> None:
    async def body() -> None:
        runner = FakeRunner()
        async with engine_over(runner) as engine, asyncio.TaskGroup() as group:
            readers = [Reader() for _ in range(3)]
            for number, reader in enumerate(readers):
                reader.gate.set()
                group.create_task(engine.run(work(number, max_tokens=400), reader.emit))
            await readers[2].first.wait()

            def fail(rows: Sequence[Row]) -> None:
                raise RuntimeError("device-side assert triggered")

            runner.fail = fail
            async with asyncio.timeout(30):
                while not all(isinstance(reader.events[-1], Failed) for reader in readers):
                    await asyncio.sleep(0.001)
            for reader in readers:
                assert isinstance(reader.events[-1], Failed)
                assert not any(isinstance(event, Failed) for event in reader.events[:-1])
            (refused,) = await heard(engine, work(4))
            assert isinstance(refused, Refused) and (refused.fault, refused.code) == ("node", "engine_down")
            assert "device-side assert" in refused.detail
            assert runner.closed

    check(body())


def test_closing_fails_what_runs_and_refuses_what_comes_after() -> None:
    async def body() -> None:
        runner = FakeRunner()
        engine = NativeEngine(SERVED, runner)  # type: ignore[arg-type]
        reader = Reader()
        reader.gate.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(engine.run(work(1, max_tokens=400), reader.emit))
            await reader.first.wait()
            await engine.close()
        assert isinstance(end := reader.events[-1], Failed) and end.code == "engine_closed"
        assert runner.closed
        await engine.close()
        (refused,) = await heard(engine, work(2))
        assert isinstance(refused, Refused) and refused.fault == "node"

    check(body())


def test_an_event_loop_that_ends_takes_its_works_along_and_another_may_follow() -> None:
    engine: list[NativeEngine] = []

    async def first() -> None:
        engine.append(NativeEngine(SERVED, FakeRunner()))  # type: ignore[arg-type]
        reader = Reader()
        task = asyncio.create_task(engine[0].run(work(1, max_tokens=400), reader.emit))
        await reader.first.wait()
        assert not task.done()  # asyncio.run cancels it

    async def second() -> None:
        assert ids_of(await heard(engine[0], work(2))) == expected(work(2))
        await settled(engine[0])
        await engine[0].close()

    asyncio.run(first())
    check(second())


def test_telemetry_counts_what_runs_and_how_fast() -> None:
    async def body() -> None:
        now = [100.0]
        runner = FakeRunner(pages=100, page_tokens=4)
        async with engine_over(runner, clock=lambda: now[0]) as engine, asyncio.TaskGroup() as group:
            assert engine.telemetry().tokens_per_second == 0
            reader = Reader()
            blocked = group.create_task(engine.run(work(1, prompt=[1] * 17, max_tokens=100), reader.emit))
            await reader.first.wait()
            said = engine.telemetry()
            assert (said.running, said.waiting, said.kv_pages_total) == (1, 0, 100)
            assert 5 <= said.kv_pages_used <= 9
            reader.gate.set()
            await blocked
            await settled(engine)
            fast = engine.telemetry().tokens_per_second
            assert fast == pytest.approx(100 / 5.0)
            now[0] += 5.0
            assert engine.telemetry().tokens_per_second == pytest.approx(fast / 2.718281828)
            assert engine.telemetry().memory_bytes > 1 << 20
            assert engine.speeds() == (0.0, 0.0)

    check(body())


def test_a_runner_with_another_vocabulary_than_the_facts_is_refused() -> None:
    runner = FakeRunner()
    runner.vocab_size = 33
    with pytest.raises(ValueError, match="the facts say 32 ids, the model has 33"):
        NativeEngine(SERVED, runner)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(
    plans=st.lists(
        st.tuples(
            st.integers(0, 4), st.integers(1, 40), st.integers(0, 12), st.sampled_from(["read", "slow", "leave"])
        ),
        min_size=1,
        max_size=12,
    ),
    pages=st.integers(16, 64),
)
def test_readers_that_come_wait_and_leave_get_the_ids_of_a_run_alone(
    plans: list[tuple[int, int, int, str]], pages: int
) -> None:
    async def body() -> None:
        async def reader(number: int, prompt: int, tokens: int, pause: int, manner: str) -> None:
            generate = work(number % 3, prompt=[prompt] * (1 + 5 * prompt), max_tokens=tokens, salt=bytes([prompt % 2]))
            got: list[int] = []
            ends: list[Event] = []

            async def emit(event: Event) -> None:
                if isinstance(event, Paused):
                    return
                if not isinstance(event, Tokens):
                    ends.append(event)
                    return
                got.extend(event.ids)
                for _ in range(pause if manner == "slow" else 0):
                    await asyncio.sleep(0)
                if manner == "leave" and len(got) > pause:
                    raise ConnectionResetError

            for _ in range(pause):
                await asyncio.sleep(0)
            try:
                await engine.run(generate, emit)
            except ConnectionResetError:
                assert got == expected(generate)[: len(got)] and not ends
                return
            assert got == expected(generate)
            assert len(ends) == 1 and isinstance(ends[0], Finished)

        async with engine_over(FakeRunner(pages, 4), token_budget=16) as engine:
            async with asyncio.TaskGroup() as group:
                for number, plan in enumerate(plans):
                    group.create_task(reader(number, *plan))
            await settled(engine)

    check(body())


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_engine(folder: Path, **options: Any) -> NativeEngine:
    facts = TextFacts(
        chat_template=None, special_tokens={}, eos_token_ids=(2,), context_tokens=512, vocab_size=TINY_VOCAB_SIZE
    )
    options = {"device": "cpu", "exact": True, "kv_bytes": 8 << 20, "findings": GOOD, **options}
    return load_native(folder, "tiny", TINY_CLASS, facts, {}, **options)


GOOD = Findings(faithful=True, batches=True, cuts=True, exact=True)


TINY_CLASS = ModelClass(
    weights=(),
    arithmetic="float32-exact",
    kv_dtype="float32",
    sampler_version=1,
    tokenizer_sha256="1" * 64,
    text_facts_sha256="1" * 64,
)


def test_the_native_engine_keeps_the_promise_of_an_engine_over_a_real_model(tiny_llama: Path) -> None:
    async def body() -> None:
        async def make() -> NativeEngine:
            return tiny_engine(tiny_llama, slots=4)

        await check_engine(make)

    check(body())


def test_loading_tests_the_family_and_tells_the_owner_what_does_not_work(tiny_llama: Path) -> None:
    async def body() -> None:
        tested = tiny_engine(tiny_llama, findings=None)
        assert tested.notes == ()
        await tested.close()
        told = tiny_engine(tiny_llama, findings=Findings(faithful=True, exact=True), kv_bytes=1 << 15)
        assert "one request at a time" in told.notes[0] and "The KV memory holds 80 tokens" in told.notes[1]
        await told.close()
        with pytest.raises(ModelUnsupported, match=r"as transformers does\. It rhymes\."):
            tiny_engine(tiny_llama, findings=Findings(details=["It rhymes."]))

    check(body())


def test_the_compute_thread_uses_as_many_torch_threads_as_its_maker() -> None:
    async def body() -> None:
        class Counting(FakeRunner):
            asked = False
            threads = 0

            def forward(self, rows: Sequence[Row]) -> torch.Tensor:
                if self.asked:  # not before: asking once would settle it
                    self.threads = torch.get_num_threads()
                return super().forward(rows)

        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            runner = Counting()
            async with engine_over(runner) as engine:
                await heard(engine, work(1))
                torch.set_num_threads(before)
                runner.asked = True
                await heard(engine, work(2))
        finally:
            torch.set_num_threads(before)
        assert runner.threads == 3

    check(body())


def test_it_keeps_the_promise_when_rows_must_not_share_a_forward_pass() -> None:
    async def body() -> None:
        async def make() -> NativeEngine:
            return NativeEngine(SERVED, FakeRunner(), slots=4, batches=False)  # type: ignore[arg-type]

        await check_engine(make)

    check(body())


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_sixty_four_streams_at_once_equal_each_alone_in_exact_mode_and_nothing_is_left(
    tiny_llama: Path, every: int
) -> None:
    async def body() -> None:
        tasks_before, threads_before = len(asyncio.all_tasks()), threading.active_count()
        engine = tiny_engine(tiny_llama, slots=64)
        works = [
            work(
                number,
                prompt=[(7 * number + 3 * position) % TINY_VOCAB_SIZE for position in range(1 + number % 23)],
                max_tokens=200,
                class_id=TINY_CLASS.class_id,
            )
            for number in range(64)
        ]
        together = [ids_of(events) for events in await asyncio.gather(*(heard(engine, w) for w in works))]
        assert all(len(ids) == 200 for ids in together)
        await settled(engine)
        for generate, ids in list(zip(works, together, strict=True))[::every]:
            alone = msgspec.structs.replace(generate, cache_salt=b"alone")  # so that it reads nobody's pages
            assert ids_of(await heard(engine, alone)) == ids
        await settled(engine)
        decode, prefill = engine.speeds()
        assert 0 < decode < prefill
        await engine.close()
        assert (len(asyncio.all_tasks()), threading.active_count()) == (tasks_before, threads_before)

    check(body())
