"""Lines and disks of the simulation do what theirs do in the world: no more order, and no less, than TCP and SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import StoreUnusable, Transaction
from gridmill.sim.cables import WINDOW_BYTES, Line
from gridmill.sim.clock import Program, VirtualLoop, run_virtually
from gridmill.sim.disk import Disk, MemoryStore


def on_a_line(body: Callable[[VirtualLoop, Line], Awaitable[None]], delay_seconds: float = 0.05) -> None:
    run_virtually(lambda loop: body(loop, Line(loop, Random(1), delay_seconds)))  # type: ignore[arg-type, return-value]


def test_bytes_arrive_later_in_order_and_then_the_end() -> None:
    async def body(loop: VirtualLoop, line: Line) -> None:
        for number in range(100):
            await line.node.send_bytes(bytes((number,)))
        await line.node.close()
        arrived = b""
        while (piece := await line.network.receive_bytes()) is not None:
            arrived += piece
        assert arrived == bytes(range(100))
        assert 1000.05 <= loop.time() <= 1000.06
        with pytest.raises(ConnectionError):
            await line.node.send_bytes(b"too late")

    on_a_line(body)


def test_a_reader_who_stops_stops_the_writer() -> None:
    async def body(loop: VirtualLoop, line: Line) -> None:
        piece = bytes(64 << 10)
        sent = 0

        async def write() -> None:
            nonlocal sent
            while True:
                await line.node.send_bytes(piece)
                sent += len(piece)

        writing = asyncio.ensure_future(write())
        await asyncio.sleep(10.0)
        assert WINDOW_BYTES < sent <= WINDOW_BYTES + len(piece)
        for _ in range(3):
            await line.network.receive_bytes()
        await asyncio.sleep(1.0)
        assert sent > WINDOW_BYTES + len(piece)
        line.cut()
        with pytest.raises(ConnectionError):
            await writing

    on_a_line(body)


def test_a_partition_holds_bytes_back_and_a_healed_one_brings_them() -> None:
    async def body(loop: VirtualLoop, line: Line) -> None:
        line.block(to_network=True, to_node=False)
        await line.node.send_bytes(b"up")
        await line.network.send_bytes(b"down")
        assert await line.node.receive_bytes() == b"down"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await line.network.receive_bytes()
        line.unblock()
        assert await line.network.receive_bytes() == b"up"

    on_a_line(body)


@pytest.mark.parametrize(
    ("mischief", "arrives"),
    [
        ("repeat", [b"one", b"one", b"two"]),
        ("swap", [b"two", b"one"]),
        ("lose", [b"two"]),
    ],
)
def test_mischief_happens_once_and_to_the_next_piece(mischief: str, arrives: list[bytes]) -> None:
    async def body(loop: VirtualLoop, line: Line) -> None:
        line.network.mischief = mischief  # type: ignore[assignment]
        await line.node.send_bytes(b"one")
        await line.node.send_bytes(b"two")
        assert [await line.network.receive_bytes() for _ in arrives] == arrives

    on_a_line(body)


def test_a_corrupt_piece_differs_in_one_bit_and_a_split_one_not_at_all() -> None:
    async def body(loop: VirtualLoop, line: Line) -> None:
        line.network.mischief = "corrupt"
        await line.node.send_bytes(bytes(20))
        piece = await line.network.receive_bytes()
        assert piece is not None and sum(byte.bit_count() for byte in piece) == 1
        line.network.mischief = "split"
        await line.node.send_bytes(b"whole piece")
        first, second = await line.network.receive_bytes(), await line.network.receive_bytes()
        assert (first or b"") + (second or b"") == b"whole piece"

    on_a_line(body)


# ---------------------------------------------------------------- the disk


async def add(transaction: Transaction, moment: int) -> int:
    await transaction.do("INSERT INTO lease_fences (source, fence) VALUES (?, 1)", f"source {moment}")
    return moment


async def count(transaction: Transaction) -> int:
    row = await transaction.one("SELECT COUNT(*) FROM lease_fences")
    assert row is not None
    return int(row[0])


def test_a_write_is_there_after_its_commit_and_an_error_undoes_it_alone() -> None:
    async def body(loop: VirtualLoop) -> None:
        disk = Disk(MIGRATIONS, loop.time)
        store = MemoryStore(disk, loop, Random(1))

        async def breaks(transaction: Transaction) -> None:
            await add(transaction, 2)
            raise ValueError("a bug")

        one, two, three = await asyncio.gather(
            store.run(lambda tx: add(tx, 1)),
            store.run(breaks),
            store.run(lambda tx: add(tx, 3)),
            return_exceptions=True,
        )
        assert (one, three) == (1, 3) and isinstance(two, ValueError)
        assert await store.read(count) == 2 and disk.commits == 1 and loop.time() > 1000.0
        disk.close()

    run_virtually(body)


def test_a_failing_disk_keeps_nothing_or_everything_and_says_the_same() -> None:
    async def body(loop: VirtualLoop) -> None:
        disk = Disk(MIGRATIONS, loop.time)
        store = MemoryStore(disk, loop, Random(1))
        for trouble, kept in (("undone", 0), ("kept", 1)):
            store.trouble = lambda trouble=trouble: trouble  # type: ignore[misc, return-value]
            with pytest.raises(StoreUnusable):
                await store.run(lambda tx: add(tx, 1))
            assert disk.read(count) == kept
        disk.close()

    run_virtually(body)


def test_a_program_that_is_killed_takes_along_what_it_had_not_committed() -> None:
    async def body(loop: VirtualLoop) -> None:
        disk = Disk(MIGRATIONS, loop.time)
        program = Program(loop, "network")
        store = MemoryStore(disk, loop, Random(1), delay_seconds=1.0)
        program.spawn(store.run(lambda tx: add(tx, 1)))
        await asyncio.sleep(2.6)
        assert disk.read(count) == 1
        program.spawn(store.run(lambda tx: add(tx, 2)))
        await asyncio.sleep(0.1)
        program.kill()
        await asyncio.sleep(10.0)
        assert disk.read(count) == 1
        await program.bury()
        disk.close()

    run_virtually(body)
