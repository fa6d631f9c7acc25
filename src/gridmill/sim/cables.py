"""A TCP connection made of memory, and everything that can happen to one.

Bytes arrive after a delay, in order and once, unless somebody told the line otherwise. A reader who stops fills the
window and then stops the writer, as on a real line. The world carries the bytes: they arrive though their sender died.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from random import Random
from typing import Literal

from gridmill.sim.clock import VirtualLoop

WINDOW_BYTES = 256 << 10  # what lies in both kernels' buffers before a writer waits
SWAP_SECONDS_MAX = 2.0  # a piece that is to change places with the next waits so long for one

Mischief = Literal["repeat", "swap", "corrupt", "lose", "split"]


class Line:
    """One connection. `node` and `network` are its ends, each a Socket for a Conversation."""

    def __init__(self, loop: VirtualLoop, random: Random, delay_seconds: float, jitter: float = 0.1) -> None:
        self.delay_seconds = delay_seconds
        self.jitter = jitter
        self.node = End(self, loop, random)
        self.network = End(self, loop, random)
        self.node.other, self.network.other = self.network, self.node
        self.broken = False

    def cut(self) -> None:
        """The connection is reset: both ends see it at their next move."""
        if not self.broken:
            self.broken = True
            self.node.reset()
            self.network.reset()

    def block(self, *, to_node: bool = True, to_network: bool = True) -> None:
        """A partition: nothing arrives any more until `unblock`, and nobody is told."""
        self.node.blocked |= to_node
        self.network.blocked |= to_network

    def unblock(self) -> None:
        """What was sent meanwhile is sent again, in order."""
        self.node.unblock()
        self.network.unblock()


class End:
    """What arrives here is what the other end sent."""

    def __init__(self, line: Line, loop: VirtualLoop, random: Random) -> None:
        self.other: End
        self.blocked = False
        self.mischief: Mischief | None = None  # what happens to the next piece that is sent to here
        self._line = line
        self._loop = loop
        self._random = random
        self._inbox: deque[bytes] = deque()
        self._ended = False
        self._closed = False
        self._on_the_way = 0  # bytes sent and not read
        self._arrives_last = 0.0
        self._held: list[bytes] = []
        self._swapping: bytes | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None  # of the other end

    # ------------------------------------------------------------ for a Conversation

    async def send_bytes(self, data: bytes) -> None:
        there = self.other
        while there._on_the_way > WINDOW_BYTES and not self._dead():
            there._writer = self._loop.create_future()
            await there._writer
        if self._dead():
            raise ConnectionResetError("the line is cut")
        there._on_the_way += len(data)
        there._post(data)

    async def receive_bytes(self) -> bytes | None:
        while not self._inbox:
            if self._ended or self._dead():
                return None
            self._reader = self._loop.create_future()
            await self._reader
        data = self._inbox.popleft()
        self._on_the_way -= len(data)
        if self._writer is not None and self._on_the_way <= WINDOW_BYTES:
            _rouse(self._writer)
        return data

    async def close(self) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        """The program closed its socket, or is gone: the other end reads what is on its way, and then the end."""
        if not self._closed:
            self._closed = True
            self.other._post(None)
            self.reset()

    # ------------------------------------------------------------ the line's

    def _dead(self) -> bool:
        return self._line.broken or self._closed

    def reset(self) -> None:
        if self._reader is not None:
            _rouse(self._reader)
        for end in (self, self.other):
            if end._writer is not None:
                _rouse(end._writer)

    def unblock(self) -> None:
        self.blocked = False
        held, self._held = self._held, []
        for data in held:
            self._carry(data or None)

    def _post(self, data: bytes | None) -> None:
        if data is not None and self.mischief is not None:
            mischief, self.mischief = self.mischief, None
            for piece in self._mangle(data, mischief):
                self._post(piece)
        elif self.blocked:
            self._held.append(data or b"")
        else:
            self._carry(data)

    def _mangle(self, data: bytes, mischief: Mischief) -> list[bytes]:
        at = self._random.randrange(len(data))
        match mischief:
            case "repeat":
                self._on_the_way += len(data)
                return [data, data]
            case "corrupt":
                return [data[:at] + bytes((data[at] ^ 1 << self._random.randrange(8),)) + data[at + 1 :]]
            case "split":
                return [piece for piece in (data[:at], data[at:]) if piece]
            case "lose":
                self._on_the_way -= len(data)
                return []
            case "swap":
                self._swapping = data
                self._loop.call_later(SWAP_SECONDS_MAX, self._swapped, context=self._loop.world)
                return []

    def _swapped(self) -> None:
        data, self._swapping = self._swapping, None
        if data is not None:
            self._post(data)

    def _carry(self, data: bytes | None) -> None:
        line, now = self._line, self._loop.time()
        delay = line.delay_seconds * (1.0 + line.jitter * self._random.random())
        # Never at the same moment: timers of one moment have no order.
        self._arrives_last = max(math.nextafter(self._arrives_last, math.inf), now + delay)
        self._loop.call_at(self._arrives_last, self._arrived, data, context=self._loop.world)
        if self._swapping is not None:
            self._swapped()

    def _arrived(self, data: bytes | None) -> None:
        if self._dead():
            return
        if data is None:
            self._ended = True
        else:
            self._inbox.append(data)
        if self._reader is not None:
            _rouse(self._reader)


def _rouse(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
