"""The clock that everything else in the simulation stands on: time that jumps, programs that stop and die."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from gridmill.sim.clock import NoThreads, Program, Standstill, VirtualLoop, run_virtually


def test_an_hour_takes_no_time_and_timers_come_in_their_order() -> None:
    heard: list[tuple[str, float]] = []

    async def body(loop: VirtualLoop) -> None:
        async def after(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            heard.append((name, loop.time() - 1000.0))

        async with asyncio.TaskGroup() as group:
            group.create_task(after(3600.0, "late"))
            group.create_task(after(0.5, "early"))

    began = time.perf_counter()
    run_virtually(body)
    assert heard == [("early", 0.5), ("late", 3600.0)]
    assert time.perf_counter() - began < 60.0


def test_a_stopped_program_does_late_what_was_due_and_all_of_it() -> None:
    async def body(loop: VirtualLoop) -> list[float]:
        program, ticks = Program(loop, "clock"), []

        async def tick() -> None:
            for _ in range(4):
                await asyncio.sleep(1.0)
                ticks.append(loop.time() - 1000.0)

        ticking = program.spawn(tick())
        await asyncio.sleep(1.5)
        program.stop()
        await asyncio.sleep(5.0)
        assert ticks == [1.0]
        program.go_on()
        await ticking
        return ticks

    assert run_virtually(body) == [1.0, 6.5, 7.5, 8.5]


def test_nothing_of_a_killed_program_runs_again_not_even_its_finally() -> None:
    async def body(loop: VirtualLoop) -> None:
        program, heard = Program(loop, "victim"), []

        async def child() -> None:
            try:
                await asyncio.sleep(1.0)
                heard.append("slept")
            finally:
                heard.append("finally")

        async def parent() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())  # what it starts belongs to it

        program.spawn(parent())
        await asyncio.sleep(0.5)
        program.kill()
        await asyncio.sleep(10.0)
        assert heard == []
        await program.bury()
        assert heard == ["finally"] and program.tasks() == []

    run_virtually(body)


def test_a_task_that_was_being_woken_at_the_kill_can_be_buried() -> None:
    async def body(loop: VirtualLoop) -> None:
        program = Program(loop, "victim")
        bell = loop.create_future()

        async def wait() -> None:
            await bell

        program.spawn(wait())
        await asyncio.sleep(0.1)
        bell.set_result(None)
        program.kill()
        await asyncio.sleep(1.0)
        await program.bury()
        assert program.tasks() == []

    run_virtually(body)


def test_whoever_wants_a_thread_is_told_so() -> None:
    async def body(loop: VirtualLoop) -> None:
        with pytest.raises(NoThreads, match="sleep"):
            await asyncio.to_thread(time.sleep, 0.0)

    run_virtually(body)
    assert threading.active_count() >= 1


def test_a_wait_that_nobody_can_end_is_an_error_and_so_is_a_loop_that_spins() -> None:
    async def waits(loop: VirtualLoop) -> None:
        await loop.create_future()

    async def spins(loop: VirtualLoop) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Standstill, match="nothing can run"):
        run_virtually(waits)
    with pytest.raises(Standstill, match="turns without end"):
        run_virtually(spins)


def test_what_a_program_raises_is_not_lost() -> None:
    async def body(loop: VirtualLoop) -> list[str]:
        async def breaks() -> None:
            raise ValueError("a bug")

        Program(loop, "buggy").spawn(breaks(), "task of it")
        await asyncio.sleep(0.1)
        return loop.problems

    assert run_virtually(body) == ["task of it failed: ValueError('a bug')"]
