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
from bisect import bisect_left, bisect_right

import msgspec

PROMISES_MAX = 4096  # open ones of a class, divided among its accounts; each takes 500 bytes
ACCOUNTS_REMEMBERED = 1024  # without a promise: how many of theirs were taken up
ACCOUNT_PROMISES_MIN = 16  # for each account, however many there are
PROMISE_SECONDS_MAX = 300.0  # nobody knows what will be further ahead
MOMENTS_TRIED = 60  # each a second after the one before
EARLY_SECONDS = 0.05  # clocks and timers may differ by this
LATE_SECONDS = 0.3  # and who comes back needs this long to do so
MISSED_SECONDS = 2.0  # who has not come by then is counted as not coming
VALID_SECONDS = 30.0  # who comes later than this after its moment is a newcomer
CLAIM_SECONDS = 0.01  # what was counted holds for
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

    def __init__(self, key: tuple[str, bytes], account: _Account, works: int) -> None:
        self.key = key
        self.account = account
        self.due = 0.0
        self.works = works
        self.awaited = False  # its moment is among the account's `dues`
        self.missed: bool | None = None  # None: its moment has not passed


class _Account:
    def __init__(self, kept: float) -> None:
        self.weight = 1
        self.open = 0
        self.dues: list[float] = []  # of the works that are to come, sorted
        self.kept = kept  # the share of its promises for which somebody came


class Promises:
    """Those of one class."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, bytes], Promise] = {}
        self._lapses: list[tuple[float, int, Promise]] = []  # a heap: when which one is missed, and when forgotten
        self._number = 0
        self._accounts: dict[str, _Account] = {}
        self._kept = 1.0  # what an account begins with
        self._claimed = 0
        self._claimed_until = -math.inf

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
        if promise.missed is None:
            self._count(promise, missed=False)
        return promise

    def make(
        self,
        account_id: str,
        prompt: bytes,
        *,
        now: float,
        earliest: float,
        apart: float,
        weight: int,
        works: int = 1,
        pace: Pace,
    ) -> float | None:
        """When a request that gets no place now is to come again; None: no promise is made.

        `earliest` is when it could have a place at best, and `apart` the seconds from one work of its account to the
        next if the class were all its own. Each of its `works` may be refused: they are promised together, once.
        """
        if not prompt:
            return None
        self._forget(now)
        key = _key(account_id, prompt)
        promise = self._open.get(key)
        if promise is not None:
            return max(promise.due, now)  # it came early, or another of its works was refused before
        account = self._accounts.get(account_id)
        if account is None:
            if len(self._accounts) >= ACCOUNTS_REMEMBERED:
                self._accounts = {name: each for name, each in self._accounts.items() if each.open}
            account = self._accounts[account_id] = _Account(self._kept)
        account.weight = weight
        holders = [each for each in self._accounts.values() if each.open or each is account]
        weights = sum([each.weight for each in holders])
        spacing = apart * weights / weight * max(KEPT_LEAST, account.kept)
        share = msgspec.structs.replace(pace, per_second=pace.per_second * weight / weights)
        # Those that were promised to it before come first. As works, not as seconds: the class may become faster.
        before = len(account.dues) - bisect_left(account.dues, now)
        due = _moment(account, now, earliest + (before + works) * spacing, share)
        limit = max(ACCOUNT_PROMISES_MIN, PROMISES_MAX // len(holders))
        if due - now > PROMISE_SECONDS_MAX or account.open >= limit:
            return None
        promise = self._open[key] = Promise(key, account, works)
        account.open += 1
        self._await(promise, due)
        return due

    def keep(self, promise: Promise) -> None:
        """One of its works has its place."""
        promise.works -= 1
        if promise.works <= 0 and self._open.get(promise.key) is promise:
            self._close(promise)

    def put_off(self, promise: Promise, *, now: float, earliest: float, pace: Pace) -> float:
        """It could not be kept: the next free moment is its own, before all others of its account."""
        due = _moment(promise.account, now, earliest, pace)
        if self._open.get(promise.key) is promise:
            if promise.awaited:
                self._await_no_more(promise)
            self._await(promise, due)
        return due

    def claim(self, now: float, pace: Pace) -> int:
        """How many places are to be kept free for those who are about to come."""
        if not self._open:
            return 0
        self._forget(now)
        if self._claimed_until > now:
            return self._claimed
        accounts = [each for each in self._accounts.values() if each.dues and each.dues[0] <= now + AHEAD_SECONDS[-1]]
        most = 0.0
        for ahead in AHEAD_SECONDS if accounts else ():
            coming = sum([each.kept * _within(each.dues, now - LATE_SECONDS, now + ahead) for each in accounts])
            freed = pace.per_second * (ahead + pace.patience_seconds)
            most = max(most, coming - max(0.0, freed - LUCKLESS_ROOTS * math.sqrt(freed)))
        self._claimed, self._claimed_until = int(most + 0.3), now + CLAIM_SECONDS
        return self._claimed

    def _await(self, promise: Promise, due: float) -> None:
        promise.due = due
        promise.awaited = True
        dues = promise.account.dues
        first = bisect_left(dues, due)
        dues[first:first] = [due] * promise.works
        self._claimed_until = -math.inf
        self._look_again(promise, due + MISSED_SECONDS)

    def _await_no_more(self, promise: Promise) -> None:
        promise.awaited = False
        dues = promise.account.dues
        first = bisect_left(dues, promise.due)
        del dues[first : first + promise.works]
        self._claimed_until = -math.inf

    def _look_again(self, promise: Promise, moment: float) -> None:
        self._number += 1
        heapq.heappush(self._lapses, (moment, self._number, promise))

    def _close(self, promise: Promise) -> None:
        del self._open[promise.key]
        promise.account.open -= 1
        if promise.awaited:
            self._await_no_more(promise)

    def _count(self, promise: Promise, *, missed: bool) -> None:
        promise.missed = missed
        kept = 0.0 if missed else 1.0
        promise.account.kept += KEPT_MEMORY * (kept - promise.account.kept)
        self._kept += KEPT_MEMORY * (kept - self._kept)

    def _forget(self, now: float) -> None:
        while self._lapses and self._lapses[0][0] < now:
            promise = heapq.heappop(self._lapses)[2]
            if self._open.get(promise.key) is not promise or now < promise.due + MISSED_SECONDS:
                continue  # it was kept, or put off: then it is looked at again
            if now >= promise.due + VALID_SECONDS:
                self._close(promise)
                continue
            if promise.missed is None:
                self._count(promise, missed=True)
            if promise.awaited:
                self._await_no_more(promise)
            self._look_again(promise, promise.due + VALID_SECONDS)


def _moment(account: _Account, now: float, earliest: float, pace: Pace) -> float:
    """A whole number of seconds from now, as `Retry-After` is, at which few enough others of this account come too."""
    due = now + max(1, math.ceil(earliest - now))
    # At once no more may come than get a place while they wait, and in a second no more than there are places.
    kept = max(KEPT_LEAST, account.kept)
    limits = (
        (0.05, max(1.0, pace.per_second * pace.patience_seconds * AT_ONCE_SHARE / kept)),
        (0.5, max(1.0, pace.per_second / kept)),
    )
    for _ in range(MOMENTS_TRIED):
        if all([_within(account.dues, due - width, due + width) < limit for width, limit in limits]):
            break
        due += 1.0
    return due


def _within(sorted_moments: list[float], start: float, end: float) -> int:
    return bisect_right(sorted_moments, end) - bisect_left(sorted_moments, start)


def _key(account_id: str, prompt: bytes) -> tuple[str, bytes]:
    return account_id, hashlib.blake2b(prompt, digest_size=16).digest()
