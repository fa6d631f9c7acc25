"""Who goes first, who waits and how long, who is turned away: the real lines, on a loop whose time only jumps."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.network.admission import Admission, Asking, Overloaded, Service, Ticket
from gridmill.wire.classes import ClassId

CLASS = ClassId("a-class")


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where others would wait for the next timer, its time is already there."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.moment = 1000.0
        inner = self._selector  # type: ignore[attr-defined]
        wait = inner.select

        def select(timeout: float | None = None) -> Any:
            if timeout:
                self.moment += timeout
            return wait(0)

        inner.select = select

    def time(self) -> float:
        return self.moment


def play(body: Callable[[World], Awaitable[None]], **options: Any) -> World:
    loop = JumpingLoop()
    world = World(loop, **options)

    async def bounded() -> None:
        async with asyncio.timeout(100_000):
            await body(world)

    try:
        loop.run_until_complete(bounded())
    finally:
        loop.close()
    return world


class World:
    """Some places, and whoever holds them. It is fleet and observer of the admission under test."""

    def __init__(self, loop: JumpingLoop, *, places: int = 1, usual: float = 0.0, **options: Any) -> None:
        self.loop = loop
        self.number_of_places = places
        self.free = places
        self.usual = usual
        self.refused: Counter[str] = Counter()
        self.lengths: list[int] = []
        self.admission = Admission(fleet=self, clock=loop.time, observer=self, **options)

    def places(self, class_id: ClassId) -> int:
        return self.number_of_places

    def room(self, class_id: ClassId) -> int:
        return self.free

    def usual_ttft_seconds(self, class_id: ClassId) -> float:
        return self.usual

    def queue_length(self, count: int) -> None:
        self.lengths.append(count)

    def admission_waited(self, seconds: float) -> None:
        assert seconds >= 0

    def admission_refused(self, reason: str) -> None:
        self.refused[reason] += 1

    # ------------------------------------------------------------ what works do

    @contextmanager
    def ticket(self, account: str = "a", **asking: Any) -> Iterator[Ticket]:
        ticket = self.admission.ticket(Asking(CLASS, account, **asking))
        try:
            yield ticket
        finally:
            ticket.close()

    async def find(self, ticket: Ticket, *, urgent: bool = False) -> None:
        """As the dispatcher does it."""
        while True:
            await ticket.turn(urgent=urgent)
            if self.free > 0:
                self.free -= 1
                ticket.took()
                return

    def leave(self, ticket: Ticket) -> None:
        ticket.freed()
        self.free += 1
        self.admission.wake(CLASS)

    async def work(self, account: str = "a", *, seconds: float = 1.0, tokens: int = 10, **asking: Any) -> float:
        """How long it waited. Raises Overloaded."""
        began = self.loop.time()
        with self.ticket(account, **asking) as ticket:
            await self.find(ticket)
            waited = self.loop.time() - began
            try:
                await asyncio.sleep(seconds)
                ticket.served(tokens)
            finally:
                self.leave(ticket)
        return waited

    async def measured(self, seconds: float = 1.0) -> None:
        """So many works of this length that the rate is known."""
        for _ in range(8):
            async with asyncio.TaskGroup() as group:
                for _ in range(self.number_of_places):
                    group.create_task(self.work("measured", seconds=seconds))
        await asyncio.sleep(100)

    def at_rest(self) -> bool:
        return self.free == self.number_of_places and self.admission.waiting == 0


async def settle() -> None:
    """Everything that can happen without time has happened."""
    for _ in range(20):
        await asyncio.sleep(0)


async def outcome(work: Awaitable[float]) -> float | Overloaded:
    try:
        return await work
    except Overloaded as overloaded:
        return overloaded


def test_whoever_comes_while_there_is_room_does_not_wait() -> None:
    async def body(world: World) -> None:
        async with asyncio.TaskGroup() as group:
            works = [group.create_task(world.work()) for _ in range(4)]
        assert [work.result() for work in works] == [0.0] * 4

    world = play(body, places=4)
    assert world.at_rest() and not world.lengths, "nobody stood in the line"


def test_who_came_first_goes_first() -> None:
    ended: list[int] = []

    async def body(world: World) -> None:
        async def one(number: int) -> None:
            await world.work()
            ended.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(one(number))
                await settle()

    world = play(body, places=1, queue_places_factor=10)
    assert ended == list(range(6)) and world.at_rest() and world.lengths[-1] == 0


def test_nothing_waits_longer_than_the_queue_allows() -> None:
    async def body(world: World) -> None:
        hog = asyncio.ensure_future(world.work(seconds=1000))
        await settle()
        began = world.loop.time()
        with pytest.raises(Overloaded) as refused:
            await world.work()
        assert refused.value.reason == "late" and world.loop.time() - began == pytest.approx(30)
        assert refused.value.retry_after_seconds >= 1
        hog.cancel()

    world = play(body)
    assert world.refused == {"late": 1} and world.admission.waiting == 0


def test_a_place_that_is_free_unannounced_is_seen_at_the_end_of_a_wait() -> None:
    async def body(world: World) -> None:
        with world.ticket() as hog, world.ticket() as other:
            await world.find(hog)
            finding = asyncio.ensure_future(world.find(other))
            await asyncio.sleep(10)
            world.free += 1
            await finding
            assert world.loop.time() == pytest.approx(1030)

    play(body)


def test_the_first_token_comes_within_a_factor_of_the_usual_or_the_answer_is_no_at_once() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=4.0)
        world.usual = 0.5
        hogs = [asyncio.ensure_future(world.work(seconds=4.0)) for _ in range(4)]
        await settle()
        began = world.loop.time()
        results = await asyncio.gather(*[outcome(world.work(seconds=4.0)) for _ in range(4)])
        assert [type(one) for one in results] == [Overloaded] * 4, "one place a second is free, half a second is left"
        assert world.loop.time() == began, "at once"
        await asyncio.gather(*hogs)
        world.usual = 3.0
        hogs = [asyncio.ensure_future(world.work(seconds=seconds)) for seconds in (2.0, 4.0, 4.0, 4.0)]
        await settle()
        assert await world.work(seconds=4.0) == pytest.approx(2.0), "three seconds may pass"
        await asyncio.gather(*hogs)

    play(body, places=4, ttft_factor=2.0)


def test_a_burst_waits_a_moment_where_first_tokens_are_very_fast() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=0.05)
        world.usual = 0.005
        results = await asyncio.gather(*[outcome(world.work(seconds=0.05)) for _ in range(4)])
        assert results == pytest.approx([0.0, 0.0, 0.05, 0.05])

    play(body, places=2)


@pytest.mark.parametrize("asking", [{"service": "flex"}, {"max_wait_seconds": 20.0}])
def test_who_says_that_it_waits_may_wait_longer_than_the_usual_first_token(asking: dict[str, Any]) -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=4.0)
        world.usual = 0.1
        hog = asyncio.ensure_future(world.work(seconds=4.0))
        await settle()
        assert await world.work(**asking) == pytest.approx(4.0)
        await hog

    play(body)


def test_a_caller_with_little_time_is_told_at_once_when_its_time_cannot_be_enough() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=4.0)
        hog = asyncio.ensure_future(world.work(seconds=4.0))
        await settle()
        began = world.loop.time()
        with pytest.raises(Overloaded) as refused:
            await world.work(max_wait_seconds=1.0)
        assert world.loop.time() == began and refused.value.reason == "late"
        assert 3.0 <= refused.value.retry_after_seconds <= 5.0, "when the place is free"
        await hog

    play(body)


def test_a_caller_who_waits_no_longer_than_it_said_looks_no_later() -> None:
    async def body(world: World) -> None:
        hog = asyncio.ensure_future(world.work(seconds=50))
        await settle()
        began = world.loop.time()
        assert type(await outcome(world.work(max_wait_seconds=0.25))) is Overloaded
        assert world.loop.time() - began <= 0.25
        hog.cancel()

    play(body)


def test_flex_goes_after_all_others_and_is_the_first_to_be_turned_away() -> None:
    ended: list[str] = []

    async def body(world: World) -> None:
        async def one(service: Service, account: str) -> None:
            try:
                await world.work(account, service=service)
                ended.append(service)
            except Overloaded as overloaded:
                ended.append(f"{service} {overloaded.reason}")

        async with asyncio.TaskGroup() as group:
            for service, account in (
                ("default", "a"),
                ("flex", "b"),
                ("flex", "b"),
                ("default", "a"),
                ("default", "a"),
            ):
                group.create_task(one(service, account))  # type: ignore[arg-type]
                await settle()

    play(body, places=1, queue_places_factor=3)
    assert ended == ["flex shed", "default", "default", "default", "flex"]


def test_a_broken_answer_goes_before_all_others_and_is_never_shed() -> None:
    ended: list[str] = []

    async def body(world: World) -> None:
        async def moved() -> None:
            with world.ticket("greedy") as ticket:
                await world.find(ticket)
                ticket.served(1_000_000)
                await asyncio.sleep(1)
                ticket.freed()  # its node is gone, and took the place with it
                await world.find(ticket, urgent=True)
                ended.append("moved")
                world.leave(ticket)

        async def other() -> None:
            await world.work("modest")
            ended.append("other")

        async with asyncio.TaskGroup() as group:
            group.create_task(world.work(seconds=2))
            group.create_task(moved())
            await settle()
            for _ in range(2):
                group.create_task(other())

    world = play(body, places=2)
    assert ended == ["moved", "other", "other"] and not world.refused


def test_a_broken_answer_that_finds_nothing_is_told_so_in_the_end() -> None:
    async def body(world: World) -> None:
        with world.ticket() as ticket:
            await world.find(ticket)
            ticket.freed()
            with pytest.raises(Overloaded):
                await world.find(ticket, urgent=True)
            assert world.loop.time() == pytest.approx(1007)

    play(body, resume_timeout_seconds=7.0)


def test_a_full_line_turns_away_the_account_that_is_ahead_and_not_the_newcomer() -> None:
    async def body(world: World) -> None:
        hog = asyncio.ensure_future(world.work("greedy", tokens=5000))
        await settle()
        waiting = [asyncio.ensure_future(outcome(world.work("greedy"))) for _ in range(2)]
        await settle()
        newcomer = asyncio.ensure_future(outcome(world.work("modest")))
        await settle()
        assert not newcomer.done() and not waiting[0].done()
        shed = await waiting[1]
        assert isinstance(shed, Overloaded) and shed.reason == "shed"
        await asyncio.gather(hog, newcomer, waiting[0])
        assert newcomer.result() == pytest.approx(1.0), "and it goes first"

    world = play(body, places=1, queue_places_factor=2)
    assert world.refused == {"shed": 1}


def test_a_full_line_drops_first_whom_it_could_not_serve_in_time() -> None:
    async def body(world: World) -> None:
        await world.measured(seconds=1.0)
        hog = asyncio.ensure_future(world.work("a", seconds=5.0))
        await settle()
        hurried = asyncio.ensure_future(outcome(world.work("a", max_wait_seconds=2.5)))
        patient = asyncio.ensure_future(outcome(world.work("a")))
        await asyncio.sleep(2)  # by now the first of them has less time than one more work takes
        newcomer = asyncio.ensure_future(outcome(world.work("b")))
        await settle()
        dropped = await hurried
        assert isinstance(dropped, Overloaded) and dropped.reason == "late"
        assert not isinstance(await patient, Overloaded) and not isinstance(await newcomer, Overloaded)
        await hog

    play(body, places=1, queue_places_factor=2)


def test_a_request_alone_in_a_full_line_is_told_that_it_is_full() -> None:
    async def body(world: World) -> None:
        hogs = [asyncio.ensure_future(world.work()) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded) as refused:
            await world.work()
        assert refused.value.reason == "full"
        await asyncio.gather(*hogs)

    play(body, places=1)


def test_the_line_moves_on_the_loop_that_networks_run_on() -> None:
    """uvloop's timers are not asyncio's in everything."""
    uvloop = pytest.importorskip("uvloop")

    async def body() -> None:
        world = World(asyncio.get_running_loop(), places=2, queue_places_factor=10)  # type: ignore[arg-type]
        async with asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(world.work(seconds=0.001))
        assert world.at_rest()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


def test_a_turn_that_one_does_not_use_goes_on_to_the_next() -> None:
    async def body(world: World) -> None:
        with world.ticket() as hog, world.ticket() as picky:
            await world.find(hog)

            async def look_in_vain() -> None:
                while True:
                    await picky.turn()

            looking = asyncio.ensure_future(look_in_vain())
            await settle()
            other = asyncio.ensure_future(world.work())
            await settle()
            world.leave(hog)
            assert await other == 0.0
            looking.cancel()

    world = play(body, places=1, queue_places_factor=2)
    assert world.at_rest()


@pytest.mark.parametrize("urgent", [False, True])
def test_one_that_finds_nothing_to_its_liking_keeps_nobody_else_waiting(urgent: bool) -> None:
    async def body(world: World) -> None:
        with world.ticket() as picky:

            async def look_in_vain() -> None:
                while True:
                    await picky.turn(urgent=urgent)

            looking = asyncio.ensure_future(look_in_vain())
            await settle()
            assert world.admission.waiting == 1
            works = [asyncio.ensure_future(world.work()) for _ in range(3)]
            await settle()
            assert [await work for work in works] == [0.0, 0.0, pytest.approx(1.0)]
            looking.cancel()
        await settle()

    world = play(body, places=2, queue_places_factor=2)
    assert world.at_rest()


def test_a_turn_given_to_one_that_leaves_in_that_moment_goes_on_to_the_next() -> None:
    async def body(world: World) -> None:
        with world.ticket() as hog:
            await world.find(hog)
            leaving = asyncio.ensure_future(world.work())
            await settle()
            other = asyncio.ensure_future(world.work())
            await settle()
            world.leave(hog)
            leaving.cancel()  # it was called, and never ran
            assert await other == 0.0

    world = play(body, places=1, queue_places_factor=2)
    assert world.at_rest()


def test_newcomers_do_not_take_the_place_that_somebody_was_called_to() -> None:
    async def body(world: World) -> None:
        with world.ticket() as hog:
            await world.find(hog)
            first = asyncio.ensure_future(world.work())
            await settle()
            world.leave(hog)
            assert await world.work() == pytest.approx(1.0)
            assert await first == 0.0

    play(body, places=1, queue_places_factor=2)


def test_all_look_when_the_last_node_has_left_and_when_the_network_stops() -> None:
    async def body(world: World) -> None:
        for change in ("left", "stops"):
            world.number_of_places, world.free = 1, 0
            tickets = [world.admission.ticket(Asking(CLASS, "a")) for _ in range(4)]
            for ticket in tickets:
                await ticket.turn()
            looks = [asyncio.ensure_future(ticket.turn()) for ticket in tickets]
            await settle()
            assert not any(look.done() for look in looks)
            if change == "left":
                world.number_of_places = 0
                world.admission.wake(CLASS)
            else:
                world.admission.stop()
            await asyncio.gather(*looks)
            for ticket in tickets:
                ticket.close()

    world = play(body, queue_places_factor=10)
    assert world.admission.waiting == 0


def test_a_prediction_is_the_line_ahead_over_the_rate_at_which_places_became_free() -> None:
    async def body(world: World) -> None:
        assert world.admission.retry_after_seconds(CLASS) > 0, "also before anything was measured"
        await world.measured(seconds=6.0)
        hogs = [asyncio.ensure_future(world.work(seconds=6.0)) for _ in range(3)]
        await settle()
        assert world.admission.retry_after_seconds(CLASS) == pytest.approx(2.0, rel=0.1)
        waiting = [asyncio.ensure_future(world.work(seconds=6.0)) for _ in range(2)]
        await settle()
        assert world.admission.retry_after_seconds(CLASS) == pytest.approx(6.0, rel=0.1)
        await asyncio.gather(*hogs, *waiting)
        await asyncio.sleep(600)
        hogs = [asyncio.ensure_future(world.work(seconds=6.0)) for _ in range(3)]
        await settle()
        assert world.admission.retry_after_seconds(CLASS) == pytest.approx(2.0, rel=0.1), "idle minutes say nothing"
        await asyncio.gather(*hogs, *waiting)

    play(body, places=3)


@pytest.mark.parametrize("known", [False, True])
def test_an_account_does_not_save_up_by_not_asking(known: bool) -> None:
    """The rare one goes first when it comes, and then they alternate: it does not make up for the time before."""
    order: list[str] = []

    async def body(world: World) -> None:
        async def one(account: str) -> None:
            await world.work(account, tokens=100)
            order.append(account)

        async with asyncio.TaskGroup() as group:
            if known:
                group.create_task(one("rare"))
            for _ in range(30):
                group.create_task(one("always"))
            await asyncio.sleep(20)
            order.clear()
            for _ in range(10):
                group.create_task(one("rare"))

    play(body, places=1, queue_places_factor=100, queue_timeout_seconds=1000)
    assert 4 <= Counter(order[:10])["rare"] <= 6


def test_an_account_that_was_turned_away_keeps_what_it_is_behind() -> None:
    order: list[str] = []

    async def body(world: World) -> None:
        async def one(account: str) -> None:
            await world.work(account, tokens=100)
            order.append(account)

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(one("known"))
                await settle()
            for _ in range(30):
                group.create_task(one("always"))
            await asyncio.sleep(4.5)
            assert type(await outcome(world.work("known", max_wait_seconds=0.0))) is Overloaded
            world.usual = 0.01  # its place in the line would be too far behind
            assert type(await outcome(world.work("known"))) is Overloaded
            world.usual = 0.0
            await asyncio.sleep(5)
            order.clear()
            for _ in range(10):
                group.create_task(one("known"))

    play(body, places=1, queue_places_factor=100, queue_timeout_seconds=1000)
    assert order[:4] == ["always"] + ["known"] * 3, "those that it could not have, and then they take turns"
    assert Counter(order[4:12])["known"] <= 5


def test_an_account_does_not_pay_for_what_nobody_else_wanted() -> None:
    order: list[str] = []

    async def body(world: World) -> None:
        async def one(account: str) -> None:
            await world.work(account, tokens=100)
            order.append(account)

        for _ in range(50):
            await one("early")
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(one("late"))
                group.create_task(one("early"))

    play(body, places=1, queue_places_factor=100, queue_timeout_seconds=1000)
    assert Counter(order[50:54])["early"] == 2


@pytest.mark.parametrize("weights", [(1, 1), (3, 1)])
def test_accounts_that_ask_more_than_there_is_get_tokens_by_weight_whatever_they_ask(weights: tuple[int, int]) -> None:
    """One asks often for little, the other rarely for much, and both have always more to ask."""
    got: Counter[str] = Counter()

    async def body(world: World) -> None:
        async def ask(account: str, weight: int, seconds: float) -> None:
            while world.loop.time() < 1600:
                try:
                    with world.ticket(account, weight=weight) as ticket:
                        await world.find(ticket)
                        try:
                            for _ in range(int(seconds * 10)):
                                await asyncio.sleep(0.1)
                                ticket.served(5)
                                got[account] += 5
                        finally:
                            world.leave(ticket)
                except Overloaded as overloaded:
                    await asyncio.sleep(overloaded.retry_after_seconds)

        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(ask("short", weights[0], 0.5))
                group.create_task(ask("long", weights[1], 2.0))

    play(body, places=4, queue_places_factor=10)
    assert got["short"] / got["long"] == pytest.approx(weights[0] / weights[1], rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    places=st.integers(1, 4),
    accounts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 300), st.floats(0.5, 3.0)), min_size=2, max_size=4),
)
def test_no_backlogged_account_falls_behind_another_by_more_than_what_runs(
    places: int, accounts: list[tuple[int, int, float]]
) -> None:
    """The bound of the virtual token counter: it holds at every moment while both have requests waiting."""
    most = max([tokens / weight for weight, tokens, _ in accounts])

    async def body(world: World) -> None:
        got = [0.0] * len(accounts)
        world.free = 0  # until all of them wait

        async def one(index: int) -> None:
            weight, tokens, seconds = accounts[index]
            with world.ticket(str(index), weight=weight) as ticket:
                await world.find(ticket)
                ticket.served(tokens)
                got[index] += tokens / weight
                if world.loop.time() < 1010:
                    assert max(got) - min(got) <= most * (places + 1) + 1e-6
                await asyncio.sleep(seconds)
                world.leave(ticket)

        async with asyncio.TaskGroup() as group:
            for index in range(len(accounts)):
                for _ in range(90):
                    group.create_task(one(index))
            await settle()
            world.free = places
            world.admission.wake(CLASS)
            await asyncio.sleep(10)
            group.create_task(end())

    async def end() -> None:
        raise Done

    class Done(Exception):
        pass

    with pytest.raises(BaseExceptionGroup) as over:
        play(body, places=places, queue_places_factor=10_000, queue_timeout_seconds=10_000)
    assert over.group_contains(Done) and not over.group_contains(AssertionError)


@settings(max_examples=100, deadline=None)
@given(
    places=st.integers(0, 3),
    usual=st.sampled_from([0.0, 0.3, 2.0]),
    works=st.lists(
        st.tuples(
            st.floats(0, 5),  # when it comes
            st.sampled_from(["a", "b", "c"]),
            st.floats(0.01, 4),  # how long it runs
            st.sampled_from(["default", "flex"]),
            st.sampled_from([None, 0.0, 0.5, 60.0]),
            st.sampled_from([None, None, 0.1, 1.0]),  # when it is cancelled
            st.booleans(),  # whether it moves once
        ),
        max_size=40,
    ),
)
def test_whatever_comes_and_leaves_every_work_ends_and_no_turn_or_place_is_lost(
    places: int, usual: float, works: list[tuple[Any, ...]]
) -> None:
    async def body(world: World) -> None:
        async def one(
            start: float, account: str, seconds: float, service: Service, most: float | None, leaves: Any, moves: bool
        ) -> None:
            await asyncio.sleep(start)
            began = world.loop.time()
            try:
                async with asyncio.timeout(leaves):
                    with world.ticket(account, service=service, max_wait_seconds=most) as ticket:
                        try:
                            await world.find(ticket)
                        finally:
                            waited = world.loop.time() - began
                            assert waited <= min(30.0, 60.0 if most is None else most) + 1e-6
                            if usual and most is None and service == "default":
                                assert waited <= usual + 1e-6
                        try:
                            await asyncio.sleep(seconds)
                            ticket.served(7)
                        finally:
                            world.leave(ticket)
                        if moves:
                            await world.find(ticket, urgent=True)
                            world.leave(ticket)
            except (TimeoutError, Overloaded):
                pass

        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(one(*work))
        assert world.at_rest()
        # And whoever comes afterwards is served at once.
        await asyncio.sleep(100)
        if places:
            assert await world.work() == 0.0

    play(body, places=places, usual=usual)
