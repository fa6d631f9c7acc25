"""What was told to those who were turned away: come again then, and you go first.

- Each account's promises lie one after the other, as far apart as its share of the class allows: they can be kept, and
  an account that asks a thousand times has only put its own far into the future.
- Who comes back is known by its account and its prompt. Coming early neither helps nor costs the promise.
- Many never come back. How many do is counted: for one account to lay its promises closer, for all of them to know how
  many places to keep free for those who are about to come.

Pure over `now`, monotonic seconds.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_left, bisect_right, insort

import msgspec

PROMISES_MAX = 4096  # open ones of a class; each takes 500 bytes
PROMISE_SECONDS_MAX = 300.0  # nobody knows what will be further ahead
MOMENTS_TRIED = 60  # each a second after the one before
EARLY_SECONDS = 0.05  # clocks and timers may differ by this
LATE_SECONDS = 0.3  # and who comes back needs this long to do so
VALID_SECONDS = 30.0  # who comes later than this after its moment is a newcomer
AHEAD_SECONDS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)  # how far ahead places are kept free
KEPT_MEMORY = 0.1  # weight of the newest one in the share that come back
KEPT_LEAST = 0.1
AT_ONCE_SHARE = 0.6  # of the places that become free while those wait who come at one moment
LUCKLESS_ROOTS = 1.5  # it is counted on fewer free places than usual, by this many roots of their number


class Pace(msgspec.Struct, frozen=True):
    """How fast a class serves: places that become free in a second, and how long whoever comes waits for one."""

    per_second: float
    patience_seconds: float


class Promise:
    """A request was told to come again at `due`: with one work, or several that have the same prompt."""

    def __init__(self, key: tuple[str, bytes], account: _Account, made: float) -> None:
        self.key = key
        self.account = account
        self.made = made
        self.due = made
        self.works = 0
        self.awaited = False  # its moment is among the `dues`
        self.came = False


class _Account:
    def __init__(self) -> None:
        self.weight = 1
        self.open = 0
        self.dues: list[float] = []  # of the works that are to come, sorted
        self.kept = 1.0  # the share of its promises for which somebody came


class Promises:
    """Those of one class."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, bytes], Promise] = {}
        self._dues: list[float] = []  # of the works that are to come, sorted
        self._lapses: list[tuple[float, int, Promise]] = []  # a heap: when which one may be forgotten
        self._number = 0
        self._accounts: dict[str, _Account] = {}
        self._kept = 0.5  # as that of an account

    def __len__(self) -> int:
        return len(self._open)

    def due(self, account_id: str, prompt: bytes, now: float) -> Promise | None:
        """The promise that a request comes back for, if its moment has come."""
        if not self._open or not prompt:
            return None
        self._forget(now)
        promise = self._open.get(_key(account_id, prompt))
        if promise is None or now < promise.due - EARLY_SECONDS:
            return None
        if promise.awaited:
            self._await_no_more(promise)
        if not promise.came:
            self._count(promise, 1.0)
        return promise

    def make(
        self,
        account_id: str,
        prompt: bytes,
        *,
        asked: float,
        now: float,
        earliest: float,
        apart: float,
        weight: int,
        pace: Pace,
    ) -> float | None:
        """When a work that asked at `asked` and gets no place now is to come again; None: no promise is made.

        `earliest` is when it could have a place at best, and `apart` the seconds from one work of its account to the
        next if the class were all its own.
        """
        if not prompt:
            return None
        self._forget(now)
        key = _key(account_id, prompt)
        promise = self._open.get(key)
        if promise is not None and asked > promise.made:
            return max(promise.due, now)  # it came early
        account = self._accounts.get(account_id)
        if account is None:
            account = self._accounts[account_id] = _Account()
        account.weight = weight
        weights = sum([each.weight for each in self._accounts.values() if each.open or each is account])
        spacing = apart * weights / weight * max(KEPT_LEAST, account.kept)
        # Those that were promised to it before come first. As works, not as seconds: the class may become faster.
        before = len(account.dues) - bisect_left(account.dues, now)
        due = self._moment(now, earliest + (before + 1) * spacing, pace)
        if due - now > PROMISE_SECONDS_MAX or len(self._open) >= PROMISES_MAX:
            return None
        if promise is None:
            promise = self._open[key] = Promise(key, account, now)
            account.open += 1
        elif promise.awaited:
            self._await_no_more(promise)
        promise.works += 1
        self._await(promise, due)
        return due

    def keep(self, promise: Promise) -> None:
        """One of its works has its place."""
        promise.works -= 1
        if promise.works <= 0 and self._open.get(promise.key) is promise:
            self._close(promise)

    def put_off(self, promise: Promise, *, now: float, earliest: float, pace: Pace) -> float:
        """It could not be kept: the next free moment is its own, before all others of its account."""
        due = self._moment(now, earliest, pace)
        if self._open.get(promise.key) is promise:
            if promise.awaited:
                self._await_no_more(promise)
            self._await(promise, due)
        return due

    def claim(self, now: float, pace: Pace) -> int:
        """How many places are to be kept free for those who are about to come."""
        if not self._dues:
            return 0
        self._forget(now)
        before = bisect_left(self._dues, now - LATE_SECONDS)
        most = 0.0
        for ahead in AHEAD_SECONDS:
            coming = (bisect_right(self._dues, now + ahead) - before) * self._kept
            freed = pace.per_second * (ahead + pace.patience_seconds)
            most = max(most, coming - max(0.0, freed - LUCKLESS_ROOTS * math.sqrt(freed)))
        return int(most + 0.3)

    def _moment(self, now: float, earliest: float, pace: Pace) -> float:
        """A whole number of seconds from now, as `Retry-After` is, at which few enough others come too."""
        due = now + max(1, math.ceil(earliest - now))
        # At once no more may come than get a place while they wait, and in a second no more than there are places.
        limits = (
            (0.05, max(1.0, pace.per_second * pace.patience_seconds * AT_ONCE_SHARE)),
            (0.5, max(1.0, pace.per_second)),
        )
        for _ in range(MOMENTS_TRIED):
            if all([self._dues_within(due - width, due + width) < limit for width, limit in limits]):
                break
            due += 1.0
        return due

    def _dues_within(self, start: float, end: float) -> int:
        return bisect_right(self._dues, end) - bisect_left(self._dues, start)

    def _await(self, promise: Promise, due: float) -> None:
        promise.due = due
        promise.awaited = True
        for _ in range(promise.works):
            insort(self._dues, due)
            insort(promise.account.dues, due)
        self._number += 1
        heapq.heappush(self._lapses, (due + VALID_SECONDS, self._number, promise))

    def _await_no_more(self, promise: Promise) -> None:
        promise.awaited = False
        for dues in (self._dues, promise.account.dues):
            first = bisect_left(dues, promise.due)
            del dues[first : first + promise.works]

    def _close(self, promise: Promise) -> None:
        del self._open[promise.key]
        promise.account.open -= 1
        if promise.awaited:
            self._await_no_more(promise)
        if not promise.came:
            self._count(promise, 0.0)

    def _count(self, promise: Promise, kept: float) -> None:
        promise.came = True
        promise.account.kept += KEPT_MEMORY * (kept - promise.account.kept)
        self._kept += KEPT_MEMORY * (kept - self._kept)

    def _forget(self, now: float) -> None:
        while self._lapses and self._lapses[0][0] < now:
            promise = heapq.heappop(self._lapses)[2]
            # It may have been kept, or been put off and lapse later.
            if self._open.get(promise.key) is promise and promise.due + VALID_SECONDS < now:
                self._close(promise)
        if not self._open and self._accounts:
            self._accounts.clear()


def _key(account_id: str, prompt: bytes) -> tuple[str, bytes]:
    return account_id, hashlib.blake2b(prompt, digest_size=16).digest()
