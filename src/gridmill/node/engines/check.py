"""The promise of `base.Engine` as one public suite, the same for every engine, ours or a stranger's.

`check_engine(make)` returns when the engine keeps it and raises AssertionError with one sentence when not. It asks
nothing about quality or speed; it needs an engine of at least 2 slots whose context holds some 80 tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from gridmill.node.engines.base import Artifact, Engine, Event, Failed, Finished, Log, Paused, Refused, Tokens
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import Sampling, pack_ids, unpack_ids

Make = Callable[[], Awaitable[Engine]]
PATIENCE_SECONDS = 60.0  # only so that a broken engine fails instead of hanging; a good one never meets it


async def check_engine(make: Make) -> None:
    """Runs every check on fresh engines from `make`. Raises AssertionError."""
    for check in (
        _ends_exactly_once,
        _same_work_same_ids_alone_and_in_company,
        _another_seed_gives_other_ids,
        _resumes_from_delivered_ids,
        _reports_logprobs_when_asked,
        _refuses_what_it_cannot_serve,
        _keeps_to_its_slots_and_frees_them_on_cancel,
        _a_blocked_reader_blocks_nobody_else,
    ):
        threads_before = set(threading.enumerate())
        tasks_before = asyncio.all_tasks()
        engine = await make()
        try:
            await check(engine)
        finally:
            await _within(engine.close(), "close() does not return")
            await _within(engine.close(), "a second close() does not return")
        await _nothing_is_left(tasks_before, threads_before, check.__name__)
    engine = await make()
    await engine.close()
    heard = await _heard(engine, _work(engine))
    assert isinstance(heard[-1], Refused | Failed), "a closed engine must refuse or fail what it is given"


# ---------------------------------------------------------------- the checks


async def _ends_exactly_once(engine: Engine) -> None:
    for max_tokens in (1, 2, 17):
        heard = await _heard(engine, _work(engine, max_tokens=max_tokens))
        end, ids = heard[-1], _ids(heard)
        assert isinstance(end, Finished), f"a good work must finish, not {end}"
        assert 1 <= len(ids) <= max_tokens, f"{len(ids)} ids came for max_tokens {max_tokens}"
        vocab_size = engine.served.facts.vocab_size
        assert all(0 <= token_id < vocab_size for token_id in ids), "an id lies outside the vocabulary"
        assert end.reason == "stop" or len(ids) == max_tokens, "`length` was said before max_tokens was reached"
        assert 0 <= end.cached_tokens <= len(unpack_ids(_work(engine).prompt)), "cached_tokens exceeds the prompt"
    patient = await _heard(engine, _work(engine, max_tokens=24, ignore_eos=True))
    assert len(_ids(patient)) == 24, "with ignore_eos exactly max_tokens ids must come"
    eos = set(engine.served.facts.eos_token_ids)
    assert not eos & set(_ids(patient)), "with ignore_eos no end-of-sequence id may come"
    patient = await _heard(engine, _work(engine, max_tokens=24, min_tokens=12))
    assert len(_ids(patient)) >= 12, "min_tokens was not honoured"
    chosen = _ids(await _heard(engine, _work(engine, max_tokens=8, ignore_eos=True)))
    stopped = await _heard(engine, _work(engine, max_tokens=8, ignore_eos=True, stop_token_ids=(chosen[3],)))
    expected = chosen[: chosen.index(chosen[3]) + 1]
    assert _ids(stopped) == expected, "a stop id must be the last id, and change none before it"
    assert isinstance(stopped[-1], Finished) and stopped[-1].reason == "stop", "a stop id must end with `stop`"


async def _same_work_same_ids_alone_and_in_company(engine: Engine) -> None:
    """Exactness is promised by exact classes alone; every engine must at least repeat itself in the same company."""
    count = min(engine.slots, 4)
    works = [_work(engine, index=index, max_tokens=16) for index in range(count)]
    alone = [_ids(await _heard(engine, work)) for work in works]
    again = [_ids(await _heard(engine, work)) for work in works]
    assert alone == again, "the same work gave other ids the second time"
    together = [_ids(heard) for heard in await asyncio.gather(*(_heard(engine, work) for work in works))]
    assert all(together), "a work in company produced nothing"
    if engine.served.model_class.arithmetic in ("float32-exact", "echo"):
        assert together == alone, "a work in company gave other ids than alone"
    assert len({tuple(ids) for ids in alone}) > 1 or count == 1, "different prompts all gave the same ids"


async def _another_seed_gives_other_ids(engine: Engine) -> None:
    seeds = [bytes([number]) * 32 for number in range(1, 5)]
    outputs = {
        tuple(_ids(await _heard(engine, _work(engine, seed=seed, max_tokens=24, ignore_eos=True, temperature=1.5))))
        for seed in seeds
    }
    assert len(outputs) > 1, "four seeds at temperature 1.5 all gave the same ids"
    greedy = {
        tuple(_ids(await _heard(engine, _work(engine, seed=seed, max_tokens=8, temperature=0.0)))) for seed in seeds
    }
    assert len(greedy) == 1, "at temperature 0 the seed must not matter"


async def _resumes_from_delivered_ids(engine: Engine) -> None:
    work = _work(engine, max_tokens=20, ignore_eos=True)
    whole = _ids(await _heard(engine, work))
    for cut in (1, 7, 19):
        resumed = _ids(await _heard(engine, msgspec.structs.replace(work, delivered=pack_ids(whole[:cut]), epoch=1)))
        assert len(resumed) == 20 - cut, "max_tokens must count the delivered ids"
        if engine.served.model_class.arithmetic in ("float32-exact", "echo"):
            assert whole[:cut] + resumed == whole, f"a resume after {cut} ids went on differently"
    heard = await _heard(engine, msgspec.structs.replace(work, delivered=pack_ids(whole)))
    complete = len(heard) == 1 and isinstance(heard[0], Finished) and heard[0].reason == "length"
    assert complete, "a work that is already complete must end with `length` and no ids"


async def _reports_logprobs_when_asked(engine: Engine) -> None:
    for event in await _heard(engine, _work(engine, max_tokens=5)):
        assert not isinstance(event, Tokens) or event.logprobs is None, "logprobs came unasked"
    for wanted in (0, 3):
        for event in await _heard(engine, _work(engine, max_tokens=5, top_logprobs=wanted)):
            if not isinstance(event, Tokens):
                continue
            assert event.logprobs is not None, "logprobs were asked for and did not come"
            assert len(event.logprobs) == len(event.ids), "logprobs must be parallel to the ids"
            for entry in event.logprobs:
                assert entry.logprob <= 1e-6 and not math.isnan(entry.logprob), "a logprob must be at most 0"
                assert len(entry.top) == wanted, f"{len(entry.top)} top logprobs came where {wanted} were asked for"
                ranked = sorted(entry.top, key=lambda pair: (-pair[1], pair[0]))
                assert list(entry.top) == ranked, "top logprobs must be ordered by (logprob descending, id ascending)"


async def _refuses_what_it_cannot_serve(engine: Engine) -> None:
    good = _work(engine)
    facts = engine.served.facts
    replace = msgspec.structs.replace
    bad: list[tuple[str, Generate, str]] = [
        ("another class", replace(good, class_id="0" * 64), "node"),
        ("an id outside the vocabulary", replace(good, prompt=pack_ids([facts.vocab_size])), "caller"),
        ("a delivered id outside the vocabulary", replace(good, delivered=pack_ids([facts.vocab_size])), "caller"),
        ("an empty prompt", replace(good, prompt=b""), "caller"),
        ("a torn prompt", replace(good, prompt=good.prompt + b"x"), "caller"),
        ("a prompt as long as the context", replace(good, prompt=good.prompt[:4] * facts.context_tokens), "caller"),
        ("a short seed", _work(engine, seed=b"short"), "caller"),
        ("a temperature that is no number", _work(engine, temperature=math.nan), "caller"),
        ("max_tokens 0", _work(engine, max_tokens=0), "caller"),
    ]
    for what, work, fault in bad:
        heard = await _heard(engine, work)
        assert len(heard) == 1 and isinstance(heard[0], Refused), f"{what} must be refused, not {heard[:1]}"
        assert heard[0].fault == fault, f"{what} is the {fault}'s fault, not the {heard[0].fault}'s"
        assert heard[0].code and heard[0].detail, f"refusing {what} must name a code and a sentence"
    assert isinstance((await _heard(engine, good))[-1], Finished), "a good work must be served after refusals"


async def _keeps_to_its_slots_and_frees_them_on_cancel(engine: Engine) -> None:
    gates = [_Gate() for _ in range(engine.slots)]
    works = [_work(engine, index=index, max_tokens=64, ignore_eos=True) for index in range(engine.slots)]
    async with _running(*(engine.run(work, gate.emit) for work, gate in zip(works, gates, strict=True))) as runs:
        for gate in gates[:2]:  # how many compute at once is the engine's affair; two are the least we ask
            await _within(gate.began.wait(), "a work in a free slot never produced an id")
        late = _work(engine, index=len(gates))
        heard = await _heard(engine, late)
        assert len(heard) == 1, "with all slots taken the next work must be refused"
        assert isinstance(heard[0], Refused), "with all slots taken the next work must be refused"
        assert (heard[0].fault, heard[0].code) == ("node", "busy"), "a full engine refuses as (node, busy)"
        runs[0].cancel()
        await _within(asyncio.wait([runs[0]]), "a cancelled run does not stop")
        assert runs[0].cancelled(), "cancelling run must let CancelledError through"
        count = len(gates[0].events)
        heard = await _heard(engine, late)
        assert isinstance(heard[-1], Finished), f"a cancelled run's slot must be free at once, not {heard[-1]}"
        assert len(gates[0].events) == count, "a cancelled run emitted something afterwards"


async def _a_blocked_reader_blocks_nobody_else(engine: Engine) -> None:
    gate = _Gate()
    async with _running(engine.run(_work(engine, max_tokens=64, ignore_eos=True), gate.emit)) as (blocked,):
        await _within(gate.began.wait(), "the first id never came")
        for index in range(1, 4):
            heard = await _heard(engine, _work(engine, index=index, max_tokens=48, ignore_eos=True))
            assert len(_ids(heard)) == 48, "a work beside a blocked one did not run to its end"
        assert len(gate.events) == 1, "emit was called again before it had returned"
        gate.opened.set()
        await _within(asyncio.wait([blocked]), "a run whose reader came back does not end")
    assert len(_ids(gate.events)) == 64, "ids were lost while the reader was away"


# ---------------------------------------------------------------- what the checks are made of


def _work(
    engine: Engine, *, index: int = 0, seed: bytes = b"\x07" * 32, max_tokens: int = 8, **more: object
) -> Generate:
    facts = engine.served.facts
    prompt = [(17 * position + 5 * index) % facts.vocab_size for position in range(3 + index % 3)]
    sampling = Sampling(seed=seed, max_tokens=max_tokens, **more)  # type: ignore[arg-type]
    return Generate(f"check-{index}", engine.served.model_class.class_id, pack_ids(prompt), sampling)


async def _heard(engine: Engine, work: Generate) -> list[Event]:
    """All events of one run, after checking their grammar: any Tokens, Paused, Log, Artifact, then exactly one end."""
    events: list[Event] = []

    async def emit(event: Event) -> None:
        events.append(event)

    await _within(engine.run(work, emit), "a run does not end")
    assert events, "run returned without any event"
    assert isinstance(events[-1], Finished | Failed | Refused), f"the last event must be an end, not {events[-1]}"
    for event in events[:-1]:
        assert isinstance(event, Tokens | Paused | Log | Artifact), f"{event} came before the end"
        assert not isinstance(event, Tokens) or event.ids, "a Tokens event must hold at least one id"
    assert not isinstance(events[-1], Refused) or len(events) == 1, "a refused work must do nothing before"
    return events


def _ids(events: list[Event]) -> list[int]:
    return [token_id for event in events if isinstance(event, Tokens) for token_id in event.ids]


@contextlib.asynccontextmanager
async def _running(*runs: Coroutine[Any, Any, None]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Tasks of these runs, cancelled and awaited at the end. (A TaskGroup would wrap our AssertionError in a group.)"""
    tasks = [asyncio.create_task(run) for run in runs]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await _within(asyncio.wait(tasks), "cancelled runs do not stop")


class _Gate:
    """A reader that takes the first event and then waits until it is opened."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.began = asyncio.Event()
        self.opened = asyncio.Event()

    async def emit(self, event: Event) -> None:
        self.events.append(event)
        self.began.set()
        await self.opened.wait()


async def _within(awaitable: Awaitable[object], complaint: str) -> None:
    try:
        await asyncio.wait_for(awaitable, PATIENCE_SECONDS)
    except TimeoutError:
        raise AssertionError(f"{complaint} (waited {PATIENCE_SECONDS:.0f} s)") from None


async def _nothing_is_left(
    tasks_before: set[asyncio.Task[object]], threads_before: set[threading.Thread], after: str
) -> None:
    for _ in range(3):  # tasks that were told to stop get the turns they need for it
        await asyncio.sleep(0)
    tasks = {task for task in asyncio.all_tasks() - tasks_before if not task.done()}
    assert not tasks, f"close() left tasks behind after {after}: {sorted(task.get_name() for task in tasks)}"
    # The loop's own default executor is shared by everyone and belongs to nobody.
    threads = {
        thread.name
        for thread in set(threading.enumerate()) - threads_before
        if thread.is_alive() and not thread.name.startswith("asyncio_")
    }
    assert not threads, f"close() left threads behind after {after}: {sorted(threads)}"
