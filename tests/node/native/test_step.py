"""Steps by hand, without threads: whoever joins, leaves, stalls or is preempted, the ids stay those of a run alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from fake_runner import EOS_ID, VOCAB_SIZE, FakeRunner, expected, work
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.node.engines.base import Failed, Finished
from gridmill.node.engines.native.runner import Row
from gridmill.node.engines.native.sampler import SamplingState
from gridmill.node.engines.native.step import AHEAD_TOKENS_MAX, EngineBroken, Made, Session, Stepper
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import unpack_ids


class Bench:
    """A Stepper with the outputs of everything that was put on it."""

    def __init__(self, pages: int = 512, page_tokens: int = 4, token_budget: int = 16, together: bool = True) -> None:
        self.runner = FakeRunner(pages, page_tokens)
        self.stepper = Stepper(self.runner, token_budget=token_budget, together=together)
        self.works: dict[Session, Generate] = {}
        self.ids: dict[Session, list[int]] = {}
        self.ends: dict[Session, Finished | Failed] = {}
        self.paused = 0

    def join(self, generate: Generate) -> Session:
        prompt, delivered = unpack_ids(generate.prompt), unpack_ids(generate.delivered)
        sampling = generate.sampling
        session = Session(
            salt=generate.cache_salt,
            known=prompt + delivered,
            prompt_tokens=len(prompt),
            output_tokens_max=sampling.max_tokens,
            end_ids=frozenset(sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, EOS_ID)),
            make_state=lambda: SamplingState(sampling, prompt, delivered, (EOS_ID,), VOCAB_SIZE, "cpu"),
        )
        self.works[session] = generate
        self.ids[session] = []
        self.stepper.join(session)
        return session

    def step(self, count: int = 1, *, reading: bool = True) -> list[Made]:
        made: list[Made] = []
        for _ in range(count):
            made = self.stepper.step()
            for session, token_id, _, end, paused in made:
                assert not (paused and (token_id is not None or end is not None)), "a pause is a word of its own"
                self.paused += paused
                assert session not in self.ends, "something came after the end"
                if token_id is not None:
                    self.ids[session].append(token_id)
                if end is not None:
                    self.ends[session] = end
            if reading:
                for session in self.ids:
                    session.accepted = session.made
            self.assert_sound()
        return made

    def finish(self) -> None:
        for _ in range(100_000):
            if not self.stepper.sessions:
                return
            self.step()
        raise AssertionError("the sessions do not come to an end")

    def assert_sound(self) -> None:
        tables = [session.table for session in self.stepper.sessions if session.table is not None]
        references = Counter(page for table in tables for page in table.pages)
        assert self.stepper.pages.held == len(references)
        for table in tables:
            for page in table.pages[table.remembered :]:
                assert references[page] == 1, "two sessions hold a page that one of them still writes to"

    def assert_all_as_alone(self) -> None:
        for session, generate in self.works.items():
            assert self.ids[session] == expected(generate)
            assert isinstance(self.ends[session], Finished)
        assert self.stepper.pages.held == 0


def test_sessions_that_join_at_different_steps_get_the_ids_of_a_run_alone() -> None:
    bench = Bench()
    for number in range(12):
        bench.join(work(number, prompt=range(1, 2 + 2 * number), max_tokens=30 - number))
        bench.step()
    bench.finish()
    bench.assert_all_as_alone()
    assert any(len(batch) > 8 for batch in bench.runner.batches), "they did not share forward passes"
    assert bench.stepper.preemptions == 0


def test_decoding_goes_on_while_a_long_prompt_comes_in_chunks() -> None:
    bench = Bench(token_budget=8)
    reader = bench.join(work(1))
    bench.step()
    bench.join(work(2, prompt=[5] * 100))
    for _ in range(13):
        before = len(bench.ids[reader])
        bench.step()
        assert len(bench.ids[reader]) == before + 1
        assert sum(bench.runner.batches[-1]) <= 8
    bench.finish()
    bench.assert_all_as_alone()


def test_an_eos_id_ends_with_stop_unless_ignored_and_is_delivered() -> None:
    bench = Bench()
    ends = [bench.join(work(number, max_tokens=400, ignore_eos=False)) for number in range(8)]
    goes_on = bench.join(work(0, max_tokens=400))
    stops = bench.join(work(3, stop_token_ids=(expected(work(3))[5],)))
    bench.finish()
    bench.assert_all_as_alone()
    for session in ends:
        assert bench.ends[session] == Finished("stop", 0)
        assert bench.ids[session][-1] == EOS_ID and EOS_ID not in bench.ids[session][:-1]
    assert len(bench.ids[goes_on]) == 400 and bench.ends[goes_on] == Finished("length", 0)
    assert isinstance(end := bench.ends[stops], Finished) and end.reason == "stop" and len(bench.ids[stops]) <= 6


def test_cached_prompt_ids_are_counted_and_shared_within_a_salt_alone() -> None:
    bench = Bench(page_tokens=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]

    def cached(salt: bytes, ids: Sequence[int], **more: object) -> int:
        session = bench.join(work(1, prompt=ids, salt=salt, **more))  # type: ignore[arg-type]
        bench.finish()
        end = bench.ends[session]
        assert isinstance(end, Finished)
        return end.cached_tokens

    assert cached(b"a", prompt) == 0
    assert cached(b"a", prompt) == 8  # the last id is always computed, and with it its page
    assert cached(b"b", prompt) == 0
    assert cached(b"", prompt) == 0
    assert cached(b"a", [*prompt, 13]) == 12
    assert cached(b"a", [2, *prompt]) == 0
    output = expected(work(1, prompt=prompt, salt=b"a"))
    assert cached(b"a", [*prompt, *output, 1]) == 28  # a conversation goes on: the answer is remembered too
    assert cached(b"a", prompt, delivered=output[:9]) == 12  # of the prompt; delivered ids are not prompt ids
    bench.assert_all_as_alone()


def test_a_pool_too_small_for_all_preempts_and_the_ids_stay_the_same() -> None:
    bench = Bench(pages=14, page_tokens=4)
    for number in range(8):
        bench.join(work(number, prompt=[number] * 6, max_tokens=50))
    bench.finish()
    bench.assert_all_as_alone()
    assert bench.stepper.preemptions > 4 and bench.paused > 4


def test_the_oldest_session_is_never_preempted_by_others_that_run() -> None:
    bench = Bench(pages=14, page_tokens=4)
    oldest = bench.join(work(0, max_tokens=50))
    for number in range(1, 8):
        bench.join(work(number, max_tokens=50))
    for done in range(1, 51):
        bench.step()
        assert len(bench.ids[oldest]) == done
    bench.finish()
    bench.assert_all_as_alone()


def test_a_session_whose_reader_is_away_stops_ahead_of_it_and_goes_on_later() -> None:
    bench = Bench()
    away = bench.join(work(1, max_tokens=60))
    bench.step(100, reading=False)
    assert len(bench.ids[away]) == AHEAD_TOKENS_MAX
    assert not bench.stepper.can_run() and bench.step() == []
    bench.finish()
    bench.assert_all_as_alone()


def test_readers_who_are_away_lose_their_pages_when_nobody_else_can_run() -> None:
    bench = Bench(pages=14, page_tokens=4)
    away = [bench.join(work(number, prompt=[number], max_tokens=50)) for number in range(2)]
    bench.step(40, reading=False)
    reader = bench.join(work(9, max_tokens=50))
    while reader not in bench.ends:
        made = bench.step(reading=False)
        assert [one.session for one in made if not one.paused] == [reader]
        reader.accepted = reader.made
    assert bench.stepper.preemptions > 0
    assert all(len(bench.ids[session]) == AHEAD_TOKENS_MAX for session in away)
    bench.finish()
    bench.assert_all_as_alone()


def test_rows_that_must_not_share_a_forward_pass_come_one_by_one() -> None:
    bench = Bench(together=False)
    for number in range(5):
        bench.join(work(number))
    bench.finish()
    bench.assert_all_as_alone()
    assert all(len(batch) == 1 for batch in bench.runner.batches)


def test_one_row_that_fails_ends_its_own_session_alone() -> None:
    def fail(rows: Sequence[Row]) -> None:
        if any(7 in (row.ids or ()) and row.position == 0 for row in rows):
            raise RuntimeError("no sevens here")

    bench = Bench()
    bench.runner.fail = fail
    good = [bench.join(work(number)) for number in range(3)]
    bad = bench.join(work(4, prompt=[7, 7]))
    bench.finish()
    assert bench.ends[bad] == Failed("compute_error", "RuntimeError: no sevens here")
    assert not bench.ids[bad]
    del bench.works[bad]
    assert len(good) == 3
    bench.assert_all_as_alone()


def test_a_session_that_fails_alone_does_not_take_the_engine_with_it() -> None:
    bench = Bench()

    def fail(rows: Sequence[Row]) -> None:
        if 7 in (rows[0].ids or ()) and rows[0].position == 0:
            raise RuntimeError("no sevens here")

    bench.runner.fail = fail
    bad = bench.join(work(4, prompt=[7, 7]))
    bench.finish()
    assert isinstance(bench.ends[bad], Failed)
    bench.works.clear()
    bench.join(work(1))
    bench.finish()
    bench.assert_all_as_alone()


def test_a_runner_that_fails_whatever_it_is_given_breaks_the_engine_and_every_session_hears_of_it() -> None:
    bench = Bench()
    sessions = [bench.join(work(number)) for number in range(3)]
    bench.step(3)

    def fail(rows: Sequence[Row]) -> None:
        raise RuntimeError("device-side assert triggered")

    bench.runner.fail = fail
    try:
        bench.step()
        raise AssertionError("a broken device went unnoticed")
    except EngineBroken as error:
        assert "device-side assert" in str(error)
    made = bench.stepper.end_all(Failed("engine_down", "broken"))
    assert {item.session for item in made} == set(sessions)
    assert all(isinstance(item.end, Failed) for item in made)


def test_running_out_of_memory_makes_steps_smaller_and_loses_nothing() -> None:
    bench = Bench(token_budget=64)

    def fail(rows: Sequence[Row]) -> None:
        if sum(len(row.ids or ()) for row in rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench.runner.fail = fail
    for number in range(10):
        bench.join(work(number, prompt=[number] * 20))
    bench.finish()
    bench.assert_all_as_alone()


def test_memory_that_does_not_suffice_for_one_id_fails_that_session() -> None:
    bench = Bench()

    def fail(rows: Sequence[Row]) -> None:
        if any((row.ids or (0,))[-1] == 7 for row in rows):
            raise MemoryError

    bench.runner.fail = fail
    bad = bench.join(work(0, prompt=[7]))
    bench.join(work(1))
    bench.step(8)
    assert isinstance(end := bench.ends[bad], Failed) and end.code == "out_of_memory"


def test_logits_that_cannot_be_sampled_fail_their_own_session() -> None:
    bench = Bench()
    banned = tuple((token_id, -3.0e38) for token_id in range(VOCAB_SIZE))
    honest = bench.join(work(1))
    forward = bench.runner.forward

    def poisoned(rows: Sequence[Row]) -> torch.Tensor:
        logits = forward(rows)
        for number, row in enumerate(rows):
            if row.pages == list(bad.table.pages if bad.table else ()):
                logits[number] = float("nan")
        return logits

    bad = bench.join(work(2, logit_bias=banned))
    bench.runner.forward = poisoned  # type: ignore[method-assign]
    bench.finish()
    assert isinstance(end := bench.ends[bad], Failed) and end.code == "unusable_logits"
    del bench.works[bad]
    assert honest in bench.works
    bench.assert_all_as_alone()


PROMPTS = [[1], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [4] * 17, [1, 2, 3, 4, 5, 6, 7, 8]]
SCRIPT = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(0, 4), st.integers(1, 30)),
        st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 20), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=100)
@given(
    script=SCRIPT,
    pages=st.integers(12, 40),
    page_tokens=st.sampled_from([4, 5]),
    token_budget=st.integers(1, 40),
    together=st.booleans(),
)
def test_whatever_happens_to_the_others_a_session_gets_the_ids_of_a_run_alone(
    script: list[tuple[str, int, int]], pages: int, page_tokens: int, token_budget: int, together: bool
) -> None:
    bench = Bench(pages, page_tokens, token_budget, together)
    joined: list[Session] = []
    left: set[Session] = set()
    for action, first, second in script:
        if action == "join":
            salt = bytes([first % 2])
            prompt = PROMPTS[first]
            joined.append(bench.join(work(len(joined) % 3, prompt=prompt, max_tokens=second, salt=salt)))
        elif action == "step":
            bench.step(first, reading=False)
        elif joined and action == "leave":
            session = joined[first % len(joined)]
            bench.stepper.leave(session)
            left.add(session)
        elif joined:
            session = joined[first % len(joined)]
            session.accepted = session.made
        bench.assert_sound()
    bench.finish()
    for session in left - set(bench.ends):
        alone = expected(bench.works.pop(session))
        assert bench.ids[session] == alone[: len(bench.ids[session])]
    bench.assert_all_as_alone()
