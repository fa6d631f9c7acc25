"""Who asks: a request, and everything that its caller saw of it. Callers stand outside of all programs."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

from gridmill.network.settlement import Payer
from gridmill.sim.clock import VirtualLoop
from gridmill.wire.messages import Generate, Price


class Call:
    """One request. `streaming`: ids are shown as they come, else all at the end.

    `pause_seconds` is how long its reader takes over `pause_ids` ids; `enough` ids are all that it wants of a longer
    answer, as a stop string would have it; after `patience_seconds` it leaves. It waits for a place at most
    `wait_seconds`, if it says so.
    """

    def __init__(
        self,
        work: Generate,
        payer: Payer,
        *,
        streaming: bool = True,
        pause_ids: int = 0,
        pause_seconds: float = 0.0,
        enough: int = 0,
        patience_seconds: float | None = None,
        max_price: Price | None = None,
        weight: int = 1,
        flexible: bool = False,
        wait_seconds: float | None = None,
        keyed: bool = False,
    ) -> None:
        self.work = work
        self.payer = payer
        self.streaming = streaming
        self.pause_ids = pause_ids
        self.pause_seconds = pause_seconds
        self.enough = enough
        self.patience_seconds = patience_seconds
        self.max_price = max_price
        self.weight = weight
        self.flexible = flexible
        self.wait_seconds = wait_seconds
        self.keyed = keyed  # it has an Idempotency-Key: its caller comes back for the answer
        self.attempt = 0
        self.lane = 0  # which gateway it asks

        self.received: list[int] = []
        self.asked_at = 0.0
        self.first_at = 0.0
        self.last_at = 0.0
        self.longest_gap_seconds = 0.0
        self.ended_at = 0.0
        self.arrivals: list[tuple[float, int]] = []  # when, and how many ids
        self.end = ""  # stop, length, cancelled; left; lost; or the code of an honest error
        self.detail = ""
        self.ends = 0
        self.done = asyncio.Event()
        self.node_ids: list[str] = []
        self.told_nanocredits = -1  # what the answer said that it cost
        self.settled_nanocredits: list[int] = []  # what the books said, each time they did
        self.cached_tokens = 0
        self.served_by: object = None  # the life of a network
        self.handler: asyncio.Task[None] | None = None
        self._pause: asyncio.Future[None] | None = None
        self._unread = 0

    def again(self, lane: int) -> Call:
        """The same request with the same key, by a caller who is patient now."""
        call = Call(self.work, self.payer, streaming=self.streaming, keyed=True)
        call.attempt = self.attempt + 1
        call.lane = lane
        return call

    @property
    def name(self) -> str:
        return self.work.work_id

    @property
    def over(self) -> bool:
        return self.ends > 0

    def take(self, ids: Sequence[int], loop: VirtualLoop) -> asyncio.Future[None] | None:
        """Ids reach the caller's socket. A future to wait for, when that is full for now."""
        now = loop.time()
        if not self.received:
            self.first_at = now
        else:
            self.longest_gap_seconds = max(self.longest_gap_seconds, now - self.last_at)
        self.last_at = now
        self.received += ids
        self.arrivals.append((now, len(ids)))
        if not self.pause_ids:
            return None
        self._unread += len(ids)
        if self._unread < self.pause_ids:
            return None
        self._unread = 0
        self._pause = pause = loop.create_future()
        loop.call_later(self.pause_seconds, _over, pause, context=contextvars.Context())
        return pause

    def finish(self, end: str, now: float, detail: str = "") -> None:
        self.ends += 1
        if self.ends == 1:
            self.end, self.detail, self.ended_at = end, detail, now
            self.done.set()


def _over(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)
