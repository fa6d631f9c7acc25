"""Who goes next when a class has no free place, and who is told to come later, and when.

- One line for each class, bounded. An answer that broke off and looks for another node goes first and is never turned
  away for others; then requests that come back when they were told to (promises.py), then others, then `flex`.
- Between accounts the one goes first that was served the fewest tokens, divided by its weight (the virtual token
  counter of Sheng et al. 2024). Within an account it is whoever came first.
- Nothing waits longer than it may, and what would have to wait longer is refused at once: `default` waits while its
  first token still comes within a factor of the usual time, `flex` and who names a wait of its own wait that long.
- A full line turns away who could not be served in time anyway, and then who is last in order: not the newcomer as
  such, but the newest request of the account that is furthest ahead.

    ticket = admission.ticket(asking)
    try:
        while True:
            await ticket.turn()     # at once when nobody is ahead
            if found := place(...): break
        ticket.took()               # and later served(tokens), freed()
    finally:
        ticket.close()

Nothing here knows nodes: `Fleet` says how many places there are and how many are free, and `wake` that this changed.
"""

from __future__ import annotations

import asyncio
import math
from bisect import insort
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from gridmill.network.promises import Pace, Promise, Promises
from gridmill.wire.classes import ClassId

Service = Literal["default", "flex"]
Reason = Literal["full", "late", "shed"]

WAIT_FLOOR_SECONDS = 0.2  # a burst is smoothed out even where the first token usually takes a hundredth of this
WAIT_SHARE = 0.8  # of the time that the first token may be late; the rest is for all that is slower under load
RATE_MEMORY_SECONDS = 60.0  # how long what was measured about a class counts
RETRY_AFTER_SECONDS_MIN = 1.0
RETRY_AFTER_SECONDS_MAX = 300.0  # a prediction further ahead than this says nothing
RETRY_AFTER_SECONDS_UNKNOWN = 2.0  # nothing was measured yet
PROMISED_SHARE = 0.8  # of the rate at which places become free; the rest is for whoever comes
CATCHING_UP_WORKS = 5  # an account that is so many works behind is promised places twice as often
KEPT_FREE_SECONDS = 0.25  # after it is looked whether a place is still kept free for somebody
BEHIND_WORKS = 2  # an account that got this much less than others, though it asked, goes before promises
UNMET_SECONDS = 10.0  # how long an account that was turned away counts as still asking
TOKENS_MEMORY = 0.1  # weight of an account's latest work in what its works are thought to take
ACCOUNTS_BEFORE_TIDYING = 1024

_FIRST, _DEFAULT, _FLEX = range(3)  # tiers


class Asking(msgspec.Struct, frozen=True):
    """One work that wants a place.

    `max_wait_seconds` is the caller's own limit, from when its ticket was made; it replaces the limit by the time to
    the first token. `prompt` is what a repetition of the same request has in common with it.
    """

    class_id: ClassId
    account_id: str
    weight: int = 1
    service: Service = "default"
    max_wait_seconds: float | None = None
    prompt: bytes = b""


class Overloaded(Exception):
    """Not now. `full`: as many wait as may; `late`: it would wait, or has waited, too long; `shed`: others go first."""

    def __init__(self, reason: Reason, detail: str, retry_after_seconds: float) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class Fleet(Protocol):
    """What the line must know about the nodes of a class. All calls are cheap."""

    def places(self, class_id: ClassId) -> int:
        """How many works its nodes take at once; 0 when there is none."""

    def room(self, class_id: ClassId) -> int:
        """How many more they would take now."""

    def usual_ttft_seconds(self, class_id: ClassId) -> float:
        """The time to the first token without a wait; 0.0 while unknown."""


class Observer(Protocol):
    """What the counters want to know. All calls are cheap and never fail."""

    def queue_length(self, count: int) -> None: ...
    def admission_waited(self, seconds: float) -> None: ...
    def admission_refused(self, reason: str) -> None: ...


class Admission:
    """The lines of all classes. `clock` is monotonic seconds, the same time that the loop's timers keep."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        clock: Callable[[], float],
        observer: Observer,
        queue_timeout_seconds: float = 30.0,
        resume_timeout_seconds: float = 30.0,
        ttft_factor: float = 2.0,
        queue_places_factor: float = 1.0,
    ) -> None:
        self.fleet = fleet
        self.clock = clock
        self.observer = observer
        self.queue_timeout_seconds = queue_timeout_seconds
        self.resume_timeout_seconds = resume_timeout_seconds
        self.ttft_factor = ttft_factor
        self.queue_places_factor = queue_places_factor
        self.waiting = 0
        self.stopped = False
        self._lines: dict[ClassId, _Line] = {}

    def ticket(self, asking: Asking) -> Ticket:
        """To be closed when the work is over, however it ended."""
        line = self._lines.get(asking.class_id)
        if line is None:
            line = self._lines[asking.class_id] = _Line(self, asking.class_id)
        return Ticket(self, line, asking)

    def wake(self, class_id: ClassId) -> None:
        """Places may be free, or the last node may be gone: as many as there is room for get their turn, in order."""
        line = self._lines.get(class_id)
        if line is not None:
            line.wake()

    def retry_after_seconds(self, class_id: ClassId) -> float:
        """When whoever joined the end of the line now would get a place."""
        line = self._lines.get(class_id)
        return RETRY_AFTER_SECONDS_UNKNOWN if line is None else line.retry_after(line.length)

    def stop(self) -> None:
        """Everybody gets a turn at once, now and from now on: there is nothing left to wait for."""
        self.stopped = True
        for line in self._lines.values():
            line.wake()

    def counted(self, change: int) -> None:
        self.waiting += change
        self.observer.queue_length(self.waiting)


class Ticket:
    """One work's standing in the line, over all its moves: a work that took a place and lost it stands afresh."""

    def __init__(self, admission: Admission, line: _Line, asking: Asking) -> None:
        self.asking = asking
        self.urgent = False
        self.tier = _FLEX if asking.service == "flex" else _DEFAULT
        self.number = 0  # its place by arrival; 0 while it does not stand
        self.deadline = math.inf
        self.round = 0  # the latest round in which it had its turn
        self.share = line.share(asking)
        self.share.tickets += 1
        line.siblings[id(asking.prompt)] = line.siblings.get(id(asking.prompt), 0) + 1
        self._admission = admission
        self._line = line
        self._clock = admission.clock
        self._made = admission.clock()
        self._promise: Promise | None = None
        self._standings = 0
        self._tokens = 0
        self._future: asyncio.Future[None] | None = None
        self._called = False  # it has a turn that it has not used yet
        self._looked = False
        self._last_turn = False
        self._holds = False
        self._closed = False

    async def turn(self, *, urgent: bool = False, begun: bool = False) -> None:
        """Returns when it may look for a place; asked again, it found none. Raises Overloaded.

        `urgent`: ids of it were delivered already. `begun`: a node had taken it and broke off, so that it may wait as
        long, though not before others. Cancelling is safe: a turn that was not used goes on to the next.
        """
        line, admission = self._line, self._admission
        assert not self._holds and not self._closed
        if self._called:
            self._give_back()
        if admission.stopped:
            return
        if not self.number:
            self._stand(urgent, begun)
        if self._last_turn:
            raise self._late()
        if not self._looked and not line.anybody_ahead(self):
            self._looked = True
            self.round = line.round
            return
        self._looked = True
        self._join()
        began = self._clock()
        assert self._future is not None
        try:
            async with asyncio.timeout(max(0.0, self.deadline - began)):
                await self._future
        except TimeoutError:
            self._last_turn = True
            # Nobody is told that there is no place before having looked at the end of its wait.
            if not self._called and line.room() <= (line.expected() if line.tier_now(self) else 0):
                raise self._late() from None
        finally:
            self._leave()
            admission.observer.admission_waited(self._clock() - began)

    def took(self) -> None:
        """It looked and found a place."""
        assert not self._holds
        self._line.took(self.share)
        if self._called:
            self._called = False
            self._line.called_back(self.share)
        if self._promise is not None:
            self._line.promises.keep(self._promise)
            self._promise = None
        self.number, self._looked, self._last_turn = 0, False, False
        self._holds, self._tokens = True, 0

    def served(self, tokens: int) -> None:
        """Tokens, read or written, that its account got."""
        self._tokens += tokens
        self.share.counter += tokens / self.asking.weight

    def freed(self) -> None:
        """The place that it took is free again."""
        if self._holds:
            self._holds = False
            self._line.freed(self.share, self._tokens)

    def close(self) -> None:
        """It is over: what it still has of a turn or a place goes on to others."""
        if self._closed:
            return
        self._closed = True
        self.freed()
        if self._called:
            self._give_back()
        self.share.tickets -= 1
        self._line.leave_siblings(self.asking.prompt)
        self._line.tidy()

    # ------------------------------------------------------------ for the line

    def call(self, round_number: int) -> None:
        """Its turn."""
        assert self._future is not None
        self._called = True
        self.round = round_number
        if not self._future.done():
            self._future.set_result(None)

    def shed(self, overloaded: Overloaded) -> None:
        """Somebody with more right needs its place in the line, which it has left."""
        assert self._future is not None
        if not self._future.done():
            self._future.set_exception(overloaded)

    # ------------------------------------------------------------ its own

    def _stand(self, urgent: bool, begun: bool = False) -> None:
        admission, now = self._admission, self._clock()
        self.urgent = urgent
        self.number = self._line.next_number()
        self.round = 0
        self._standings += 1
        if urgent or begun:
            self.deadline = now + admission.resume_timeout_seconds
            return
        if self.tier != _FLEX:
            if self._promise is None:
                self._promise = self._line.promises.due(self.asking.account_id, self.asking.prompt, now)
            self.tier = _DEFAULT if self._promise is None else _FIRST
        start = self._made if self._standings == 1 else now
        self.deadline = start + admission.queue_timeout_seconds
        if self.asking.max_wait_seconds is not None:
            self.deadline = min(self.deadline, self._made + self.asking.max_wait_seconds)
        elif self.asking.service == "default":
            self.deadline = min(self.deadline, start + self._line.patience())

    def _join(self) -> None:
        line, now = self._line, self._clock()
        self._future = asyncio.get_running_loop().create_future()
        if not self.urgent:
            ahead = line.ahead(self) + (line.expected() if line.tier_now(self) else 0)
            if now + line.wait_behind(ahead) > self.deadline:
                self._future = None
                raise self._late(ahead)
        line.add(self)
        if not self.urgent:
            line.make_room(self, self._admission.queue_places_factor)
            if self._future.done():
                self._future.result()  # it was the one with the least right
        # Those before it may have looked already, and wait for something else than what is free.
        while line.pass_on():
            pass

    def _leave(self) -> None:
        self._line.remove(self)
        self._future = None

    def _give_back(self) -> None:
        self._called = False
        self._line.called_back(self.share)
        self._line.pass_on()

    def _late(self, ahead: int | None = None) -> Overloaded:
        line, waited = self._line, self._clock() - self._made
        if self.urgent:
            detail = f"no place was found for {self._admission.resume_timeout_seconds:.0f} s after its node was lost"
        elif waited >= 0.1 or ahead is None:
            detail = f"waited {waited:.1f} s for one of {line.places()} places"
        else:
            detail = f"all {line.places()} places for this model are taken, and the wait for one would be too long"
        return self.refused("late", detail, line.length if ahead is None else ahead)

    def refused(self, reason: Reason, detail: str, ahead: int) -> Overloaded:
        """It gets no place: when it is to come again, counted and promised."""
        line, asking = self._line, self.asking
        self._admission.observer.admission_refused(reason)
        if self.urgent or asking.service == "flex":
            return Overloaded(reason, detail, line.retry_after(ahead))
        seconds = line.promise(asking, self._promise, ahead)
        if asking.max_wait_seconds is None:
            line.refused(self.share, seconds)
        return Overloaded(reason, detail, seconds)


class _Share:
    """What one account got of a class, and who waits for it there."""

    def __init__(self, counter: float) -> None:
        self.counter = counter  # tokens served, divided by weight
        self.weight = 1
        self.waiting: tuple[list[Ticket], ...] = ([], [], [])  # by tier, each by arrival
        self.tokens_per_work = 0.0  # of the latest, more or less; 0.0 before the first
        self.called = 0  # turns given that were not used yet
        self.tickets = 0
        self.asks_until = -math.inf  # it was turned away, and may come again until then


class _Line:
    """One class: who waits for it, what was measured about it, and what each account got of it."""

    def __init__(self, admission: Admission, class_id: ClassId) -> None:
        self._admission = admission
        self._class_id = class_id
        self._shares: dict[str, _Share] = {}
        self._tidy_at = ACCOUNTS_BEFORE_TIDYING
        self._waiting: dict[_Share, None] = {}  # those of whom anybody waits
        self._urgent: list[Ticket] = []
        self._counts = [0, 0, 0]  # of those who are not urgent, by tier
        self._called = 0
        self.round = 1
        self._number = 0
        self._asked_until = -math.inf
        # What accounts had got when they were served last, the furthest of them: newcomers begin there.
        self._floor = 0.0
        self._rate = _Rate(admission.clock())
        self.promises = Promises()
        self.siblings: dict[int, int] = {}  # tickets by their very prompt: the works of one request share it
        self._timer: asyncio.Handle | None = None
        self._wakes_at = 0.0

    # ------------------------------------------------------------ what is known

    def places(self) -> int:
        return self._admission.fleet.places(self._class_id)

    def room(self) -> int:
        """Free places that nobody was called to yet."""
        return self._admission.fleet.room(self._class_id) - self._called

    @property
    def length(self) -> int:
        return len(self._urgent) + sum(self._counts)

    def anybody_ahead(self, newcomer: Ticket) -> bool:
        """Or called, or expected."""
        if newcomer.urgent or self._urgent:
            return bool(self._urgent)
        tier = self.tier_now(newcomer)
        if any(self._counts[: tier + 1]):
            return True
        expected = self.expected() if tier else 0
        return (self._called > 0 or expected > 0) and self.room() <= expected

    def expected(self) -> int:
        """Places that are kept for those who were told to come about now."""
        return self.promises.claim(self._admission.clock(), self._pace()) if self.promises else 0

    def patience(self) -> float:
        """How long a request without a word of its own waits, in seconds."""
        admission = self._admission
        usual = admission.fleet.usual_ttft_seconds(self._class_id)
        if not usual or not admission.ttft_factor:
            return admission.queue_timeout_seconds
        return min(
            admission.queue_timeout_seconds, max(WAIT_FLOOR_SECONDS, (admission.ttft_factor - 1.0) * usual * WAIT_SHARE)
        )

    def tier_now(self, ticket: Ticket) -> int:
        """Nobody's promise may keep an account behind for long."""
        share = ticket.share
        if ticket.tier == _DEFAULT and share.counter + BEHIND_WORKS * self._per_turn(share) < self._floor:
            return _FIRST
        return ticket.tier

    def _per_turn(self, share: _Share) -> float:
        """By how much one work would bring this account forward."""
        return (share.tokens_per_work or self._rate.tokens_per_work) / share.weight

    def ahead(self, newcomer: Ticket) -> int:
        """How many would have their turn before a ticket that is not in the line."""
        share, tier = newcomer.share, newcomer.tier
        behind = sum([len(share.waiting[each]) for each in range(tier + 1)])
        mark = share.counter + (share.called + behind) * self._per_turn(share)
        count = len(self._urgent) + behind
        for other in self._waiting:
            if other is share:
                continue
            before = sum([len(other.waiting[each]) for each in range(tier)])
            count += before
            waiting = len(other.waiting[tier])
            if waiting:
                per_turn = self._per_turn(other)
                first = other.counter + (other.called + before) * per_turn
                if mark >= first:
                    count += min(waiting, 1 + int((mark - first) / per_turn))
        return count

    def wait_behind(self, ahead: int) -> float:
        """Seconds until somebody with so many ahead of it may have a place. 0.0 while nothing was measured."""
        per_second = self._rate.per_second(self._admission.clock(), self.places())
        free = max(0, self.room())
        return max(0, ahead + 1 - free) / per_second if per_second else 0.0

    def retry_after(self, ahead: int) -> float:
        seconds = self.wait_behind(ahead) or RETRY_AFTER_SECONDS_UNKNOWN
        return min(max(seconds, RETRY_AFTER_SECONDS_MIN), RETRY_AFTER_SECONDS_MAX)

    def promise(self, asking: Asking, kept_not: Promise | None, ahead: int) -> float:
        """Seconds after which this work is to come again, and then goes before newcomers."""
        now, seconds = self._admission.clock(), self.retry_after(ahead)
        pace = self._pace()
        if not pace.per_second or not asking.prompt:
            return seconds
        earliest = now + self.wait_behind(ahead)
        if kept_not is not None:
            return round(self.promises.put_off(kept_not, now=now, earliest=earliest, pace=pace) - now, 3)
        share = self._shares[asking.account_id]
        due = self.promises.make(
            asking.account_id,
            asking.prompt,
            now=now,
            earliest=earliest,
            apart=self._apart(share) / pace.per_second,
            weight=asking.weight,
            works=self.siblings[id(asking.prompt)],
            pace=pace,
        )
        return RETRY_AFTER_SECONDS_MAX if due is None else max(RETRY_AFTER_SECONDS_MIN, round(due - now, 3))

    def _apart(self, share: _Share) -> float:
        """By how many of the class's works those of this account lie apart, were it alone: closer when it is behind."""
        per_turn = self._per_turn(share)
        behind = max(0.0, (self._floor - share.counter) / per_turn - 1.0)
        return per_turn * share.weight / self._rate.tokens_per_work / (1.0 + behind / CATCHING_UP_WORKS)

    def _pace(self) -> Pace:
        """What may be promised."""
        per_second = self._rate.per_second(self._admission.clock(), self.places())
        return Pace(per_second * PROMISED_SHARE, self.patience())

    # ------------------------------------------------------------ who waits

    def share(self, asking: Asking) -> _Share:
        share = self._shares.get(asking.account_id)
        if share is None:
            share = self._shares[asking.account_id] = _Share(self._floor)
        elif not (share.called or share in self._waiting or share.asks_until > self._admission.clock()):
            # Nobody saves up by not asking. Who was turned away was asking.
            share.counter = max(share.counter, self._floor)
        share.weight = asking.weight
        return share

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def add(self, ticket: Ticket) -> None:
        if ticket.urgent:
            insort(self._urgent, ticket, key=_number)
        else:
            insort(ticket.share.waiting[ticket.tier], ticket, key=_number)
            self._waiting[ticket.share] = None
            self._counts[ticket.tier] += 1
        self._admission.counted(1)

    def remove(self, ticket: Ticket) -> None:
        """Does nothing when it is not in the line."""
        its_list = self._urgent if ticket.urgent else ticket.share.waiting[ticket.tier]
        if ticket not in its_list:
            return
        its_list.remove(ticket)
        if not any(ticket.share.waiting):
            self._waiting.pop(ticket.share, None)
        if not ticket.urgent:
            self._counts[ticket.tier] -= 1
        self._admission.counted(-1)

    def make_room(self, newcomer: Ticket, places_factor: float) -> None:
        """Somebody joined: if that is one too many, the one with the least right leaves."""
        limit = max(1, math.ceil(self.places() * places_factor))
        if sum(self._counts) <= limit:
            return
        order = self._order()
        now = self._admission.clock()
        victim = order[-1]
        reason: Reason = "full" if victim is newcomer else "shed"
        for index in range(len(order) - 1, -1, -1):
            if now + self.wait_behind(len(self._urgent) + index) > order[index].deadline:
                victim, reason = order[index], "late"
                break
        self.remove(victim)
        detail = f"all {self.places()} places for this model are taken, and {limit} requests wait that go first"
        victim.shed(victim.refused(reason, detail, self.length))

    def _order(self) -> list[Ticket]:
        """All who are not urgent, in the order in which they would have their turn."""
        marked = []
        for share in self._waiting:
            turns = share.called
            for tier, tickets in enumerate(share.waiting):
                for ticket in tickets:
                    mark = share.counter + turns * self._per_turn(share)
                    marked.append((tier, mark, ticket.number, ticket))
                    turns += 1
        marked.sort(key=lambda each: each[:3])
        return [each[3] for each in marked]

    # ------------------------------------------------------------ whose turn it is

    def wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.length:
            return
        self.round += 1
        if self._admission.stopped or not self.places():
            while (ticket := self._next()) is not None:
                self._call(ticket)
        else:
            while self.pass_on():
                pass

    def pass_on(self) -> bool:
        """Gives the next turn, if there is room for it: a turn was not used, or places are free."""
        room = self.room()
        ticket = self._next() if room > 0 else None
        if ticket is None:
            return False
        if self.tier_now(ticket) and not ticket.urgent and room <= self.expected():
            self._wake_later()
            return False
        self._call(ticket)
        return True

    def called_back(self, share: _Share) -> None:
        self._called -= 1
        share.called -= 1

    def _wake_later(self, seconds: float = KEPT_FREE_SECONDS) -> None:
        moment = self._admission.clock() + seconds
        if self._timer is None or self._wakes_at > moment:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(seconds, self.wake)
            self._wakes_at = moment

    def _call(self, ticket: Ticket) -> None:
        self.remove(ticket)
        self._called += 1
        ticket.share.called += 1
        ticket.call(self.round)

    def _next(self) -> Ticket | None:
        """The first in order that had no turn in this round."""
        for ticket in self._urgent:
            if ticket.round < self.round:
                return ticket
        best: Ticket | None = None
        best_mark = (0, 0.0, 0)
        for share in self._waiting:
            mark = share.counter + share.called * self._per_turn(share)
            for tickets in share.waiting:
                first = next((each for each in tickets if each.round < self.round), None)
                if first is not None:
                    key = (self.tier_now(first), mark, first.number)
                    if best is None or key < best_mark:
                        best, best_mark = first, key
                    break
        return best

    # ------------------------------------------------------------ what happened

    def took(self, share: _Share) -> None:
        self._floor = max(self._floor, share.counter)
        self._rate.took(self._admission.clock())
        if self.length:
            # It takes its place before the loop turns; whoever is behind it may find another.
            self._wake_later(0.0)

    def freed(self, share: _Share, tokens: int) -> None:
        self._rate.freed(self._admission.clock(), tokens)
        if tokens:
            known = share.tokens_per_work
            share.tokens_per_work = known + TOKENS_MEMORY * (tokens - known) if known else float(tokens)

    def refused(self, share: _Share, seconds: float) -> None:
        share.asks_until = max(share.asks_until, self._admission.clock() + seconds + UNMET_SECONDS)
        self._asked_until = max(self._asked_until, share.asks_until)

    def leave_siblings(self, prompt: bytes) -> None:
        left = self.siblings[id(prompt)] - 1
        if left:
            self.siblings[id(prompt)] = left
        else:
            del self.siblings[id(prompt)]

    def tidy(self) -> None:
        """Forgets accounts that a newcomer would equal; all of them when the class is at rest: nobody was put off."""
        now = self._admission.clock()
        if self._rate.running == 0 and not self.length and not self._called and self._asked_until < now:
            self._floor = 0.0
            if any([share.tickets for share in self._shares.values()]):
                for share in self._shares.values():
                    share.counter = 0.0
            else:
                self._shares.clear()
        elif len(self._shares) >= self._tidy_at:
            self._shares = {
                account_id: share
                for account_id, share in self._shares.items()
                if share.tickets or share.counter > self._floor or share.asks_until > now
            }
            self._tidy_at = max(ACCOUNTS_BEFORE_TIDYING, 2 * len(self._shares))


class _Rate:
    """How fast places become free: works completed per second of a taken place, of the last minute or so.

    Unlike works completed per second it says what a full class does also while it is not full.
    """

    def __init__(self, now: float) -> None:
        self.running = 0
        self.tokens_per_work = 1.0
        self._ever = 0  # works that were completed
        self._completed = 0.0
        self._place_seconds = 0.0
        self._tokens = 0.0
        self._moment = now

    def per_second(self, now: float, places: int) -> float:
        """0.0 while unknown. Until as many are over as run, it is as if those that run were half done."""
        self._flow(now)
        if self._place_seconds < 1e-6:
            return 0.0
        completed = self._completed if self._ever > self.running else max(self._completed, self.running / 2)
        return max(1, places) * max(0.5, completed) / self._place_seconds

    def took(self, now: float) -> None:
        self._flow(now)
        self.running += 1

    def freed(self, now: float, tokens: int) -> None:
        """A place that was given back with nothing served does not count as a work that is over."""
        self._flow(now)
        self.running -= 1
        if tokens:
            self._ever += 1
            self._completed += 1.0
            self._tokens += tokens
            self.tokens_per_work = self._tokens / self._completed

    def _flow(self, now: float) -> None:
        """What was measured fades, and the places that are taken count for the time that passed."""
        elapsed, self._moment = now - self._moment, now
        if not self.running:
            return  # idle minutes say nothing
        kept = math.exp(-elapsed / RATE_MEMORY_SECONDS)
        self._completed *= kept
        self._tokens *= kept
        self._place_seconds = self._place_seconds * kept + self.running * RATE_MEMORY_SECONDS * (1.0 - kept)


def _number(ticket: Ticket) -> int:
    return ticket.number
