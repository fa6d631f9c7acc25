"""What `Retry-After` told is true: who comes back then has a place, and nobody else pays for those who do not come."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_admission import CLASS, World, outcome, play, settle

from gridmill.network.admission import Asking, Overloaded
from gridmill.network.promises import PROMISES_MAX, VALID_SECONDS, Pace, Promises

PACE = Pace(per_second=1.0, patience_seconds=0.5)


def make(promises: Promises, account: str, prompt: bytes, now: float, **other: Any) -> float | None:
    given = {"now": now, "earliest": now, "apart": 1.0, "weight": 1, "pace": PACE, **other}
    return promises.make(account, prompt, **given)


def test_promises_of_one_account_lie_apart_by_its_share() -> None:
    promises = Promises()
    assert [make(promises, "a", bytes([n]), 0.0) for n in range(1, 5)] == [1.0, 2.0, 3.0, 4.0]
    first = [make(promises, "b", bytes([n]), 0.0) for n in range(1, 4)]
    assert first == [2.0, 4.0, 6.0], "of two accounts each gets half, however much the other has asked"
    assert make(promises, "c", b"1", 0.0, weight=2) == 2.0, "and by weight"


def test_a_promise_is_a_whole_number_of_seconds_away() -> None:
    promises = Promises()
    for now in (10.25, 11.5, 12.75):
        due = make(promises, "a", str(now).encode(), now, apart=0.3)
        assert due is not None and (due - now) == int(due - now) >= 1


def test_coming_early_neither_helps_nor_costs_the_promise() -> None:
    promises = Promises()
    make(promises, "a", b"other", 0.0)
    assert make(promises, "a", b"mine", 0.0) == 2.0
    assert promises.due("a", b"mine", 1.5) is None
    assert make(promises, "a", b"mine", 1.5) == 2.0
    assert promises.due("a", b"mine", 2.0) is not None
    assert promises.due("b", b"mine", 2.0) is None, "it is the account's"


def test_the_works_of_one_request_come_together() -> None:
    promises = Promises()
    for _ in range(3):  # each of them may be refused
        assert make(promises, "a", b"n=3", 0.0, works=3) == 3.0
    assert len(promises) == 1
    promise = promises.due("a", b"n=3", 3.0)
    assert promise is not None and promise.works == 3
    for left in (1, 1, 0):
        promises.keep(promise)
        assert len(promises) == left


def test_places_are_claimed_for_those_who_are_about_to_come_and_not_for_long() -> None:
    promises = Promises()
    assert promises.claim(0.0, PACE) == 0
    make(promises, "a", b"1", 0.0, earliest=9.0)
    assert promises.claim(1.0, PACE) == 0, "not ten seconds ahead"
    assert promises.claim(9.9, PACE) == 1
    promise = promises.due("a", b"1", 10.0)
    assert promise is not None
    assert promises.claim(10.1, PACE) == 0, "it has come, and stands in the line by itself"
    make(promises, "a", b"2", 20.0)
    assert promises.claim(21.0, PACE) == 1
    assert promises.claim(22.0, PACE) == 0, "it did not come"


def test_who_never_comes_back_is_not_waited_for_and_others_are() -> None:
    promises = Promises()
    now = 0.0
    for number in range(60):
        now = 4.0 * number
        for account in ("true", "false"):
            make(promises, account, str(number).encode(), now, earliest=now + 1)
        promise = promises.due("true", str(number).encode(), now + 3.5)
        assert promise is not None
        promises.keep(promise)
    make(promises, "false", b"last", now)
    assert promises.claim(now + 2.0, PACE) == 0
    make(promises, "true", b"last", now)
    assert promises.claim(now + 2.0, PACE) == 1
    assert len(promises) <= 2 + VALID_SECONDS, "what lapsed is forgotten"
    for number in range(30):
        now += 40.0
        due = make(promises, "false", str(number).encode(), now)
        assert due is not None
        assert promises.due("false", str(number).encode(), due) is not None, "from now on it comes"
    now += 40.0
    due = make(promises, "false", b"again", now)
    assert due is not None and promises.claim(due, PACE) == 1


def test_one_account_cannot_use_up_the_promises_of_others() -> None:
    promises = Promises()
    for number in range(3 * PROMISES_MAX):
        make(promises, "greedy", number.to_bytes(4, "big"), 0.0, apart=1e-6)
    assert len(promises) <= PROMISES_MAX
    assert make(promises, "modest", b"1", 0.0) == 2.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from("ab"), st.integers(0, 5), st.sampled_from(["make", "come", "off"])),
        max_size=60,
    )
)
def test_whatever_happens_what_is_forgotten_leaves_nothing(steps: list[tuple[float, str, int, str]]) -> None:
    promises = Promises()
    now = 0.0
    for pause, account, number, step in steps:
        now += pause
        prompt = bytes([number + 1])
        promise = promises.due(account, prompt, now)
        if step == "make" and promise is None:
            due = make(promises, account, prompt, now)
            assert due is not None and due >= now
        elif promise is not None and step == "come":
            promises.keep(promise)
        elif promise is not None:
            assert promises.put_off(promise, now=now, earliest=now, pace=PACE) >= now + 1
        assert 0 <= promises.claim(now, PACE) <= 12
    now += 1000
    assert promises.claim(now, PACE) == 0
    assert promises.due("a", b"x", now) is None
    make(promises, "c", b"x", now)
    assert len(promises) == 1


# ---------------------------------------------------------------- with the line


def test_who_comes_back_when_it_was_told_goes_before_newcomers() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=2.0)
        world.usual = 1.0
        hog = asyncio.ensure_future(world.work(seconds=4.5))
        await settle()
        refused = await outcome(world.work(prompt=b"mine"))
        assert isinstance(refused, Overloaded)
        await asyncio.sleep(refused.retry_after_seconds)
        newcomer = asyncio.ensure_future(outcome(world.work(prompt=b"newcomer", max_wait_seconds=20)))
        await settle()
        again = asyncio.ensure_future(outcome(world.work(prompt=b"mine", max_wait_seconds=20)))
        await settle()
        both = await asyncio.gather(again, newcomer)
        assert isinstance(both[0], float) and isinstance(both[1], float) and both[0] < both[1]
        await hog

    play(body, places=1, queue_places_factor=4)


def test_a_place_is_kept_free_for_who_is_about_to_come_back() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=4.0)
        world.usual = 0.5
        hog = asyncio.ensure_future(world.work(seconds=3.5))
        await settle()
        refused = await outcome(world.work("b", prompt=b"mine"))
        assert isinstance(refused, Overloaded)
        due = world.loop.time() + math.ceil(refused.retry_after_seconds)
        await hog
        await asyncio.sleep(due - 0.2 - world.loop.time())
        newcomer = await outcome(world.work("a", prompt=b"newcomer"))
        assert isinstance(newcomer, Overloaded), "the only place is spoken for"
        await asyncio.sleep(max(0.0, due - world.loop.time()))
        assert isinstance(await outcome(world.work("b", prompt=b"mine")), float)

    play(body, places=1)


def test_all_works_of_a_request_are_promised_when_one_is_refused() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=2.0)
        world.usual = 1.0
        hogs = [asyncio.ensure_future(world.work(seconds=2.5)) for _ in range(4)]
        await settle()
        prompt = bytes([7] * 20)
        with world.ticket(prompt=prompt), world.ticket(prompt=prompt), world.ticket(prompt=prompt) as last:
            await last.turn()
            refused = await outcome(last.turn())  # type: ignore[arg-type]
        assert isinstance(refused, Overloaded)
        await asyncio.sleep(refused.retry_after_seconds)
        tickets = [world.admission.ticket(Asking(CLASS, "a", prompt=prompt)) for _ in range(4)]
        for ticket in tickets:
            ticket._stand(False)
            ticket.took()
        assert [ticket.tier for ticket in tickets] == [0, 0, 0, 1], "three were promised"
        for ticket in tickets:
            ticket.close()
        await asyncio.gather(*hogs)

    play(body, places=4, ttft_factor=1.5)


class Crowd:
    """Clients that always want something: two accounts, three times as many as there are places."""

    def __init__(self, *, places: int, obedient: tuple[bool, bool] = (True, True), seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.places = places
        self.obedient = obedient
        self.tokens: Counter[int] = Counter()
        self.waits: list[float] = []
        self.true: Counter[bool] = Counter()
        self.busy_seconds = 0.0

    async def client(self, world: World, account: int) -> None:
        while world.loop.time() < 1100:
            prompt = self.random.randbytes(8)
            told = False
            while True:
                count = world.loop.time() > 1040  # from then on it goes its way
                try:
                    waited = await self.work(world, account, prompt)
                    if count:
                        self.waits.append(waited)
                        self.true[True] += told
                    break
                except Overloaded as overloaded:
                    self.true[False] += told and count
                    if not self.obedient[account]:
                        await asyncio.sleep(self.random.uniform(0.05, 0.2))
                        break
                    told = True
                    await asyncio.sleep(math.ceil(overloaded.retry_after_seconds) + self.random.uniform(0, 0.03))
                    if world.loop.time() > 1100:
                        return

    async def work(self, world: World, account: int, prompt: bytes) -> float:
        began = world.loop.time()
        with world.ticket(str(account), prompt=prompt) as ticket:
            await world.find(ticket)
            waited = world.loop.time() - began
            seconds = self.random.uniform(1.5, 2.5)
            try:
                for _ in range(10):
                    await asyncio.sleep(seconds / 10)
                    ticket.served(10)
                    if 1040 < world.loop.time() < 1100:
                        self.tokens[account] += 10
                        self.busy_seconds += seconds / 10
            finally:
                world.leave(ticket)
        return waited

    def run(self) -> None:
        async def body(world: World) -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(3 * self.places):
                    group.create_task(self.client(world, number % 2))

        play(body, places=self.places, usual=0.4)
        self.waits.sort()


@pytest.mark.parametrize("seed", range(2))
def test_three_times_what_there_is_stays_quick_fair_and_true(seed: int) -> None:
    crowd = Crowd(places=32, seed=seed)
    crowd.run()
    assert crowd.waits[-1] <= 0.4 + 1e-6, "the first token comes within twice the usual time"
    assert crowd.tokens[0] / crowd.tokens[1] == pytest.approx(1.0, abs=0.06)
    assert crowd.true[True] / crowd.true.total() > 0.9, "who waited as it was told has a place"
    assert crowd.busy_seconds > 0.9 * 32 * 60, "and that keeps hardly any place empty"


def test_who_does_not_wait_as_told_gets_no_more_than_who_does() -> None:
    crowd = Crowd(places=32, obedient=(True, False))
    crowd.run()
    assert crowd.tokens[0] / crowd.tokens[1] > 0.85
    assert crowd.true[True] / crowd.true.total() > 0.85
    assert crowd.busy_seconds > 0.9 * 32 * 60
