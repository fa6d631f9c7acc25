"""How far one node is trusted with one class: circuit breaker, availability, slow start, adaptive concurrency.

Pure: times are arguments, in monotonic seconds, and nothing here decides about another node. Whether a tripped breaker
may open is the class's business (`fleet.Roster`), because at most a part of a class is ever taken out.
"""

from __future__ import annotations

import math
from typing import Literal

State = Literal["closed", "open", "half_open"]

CONSECUTIVE_FAULTS = 3
FAULT_SHARE_MAX = 0.2
FAULT_MEMORY = 0.1  # weight of the newest ending: about the last ten count
ENDINGS_FOR_A_SHARE = 5  # fewer say nothing about a share
OPEN_SECONDS = 5.0  # doubled each time in a row
OPENINGS_MAX = 6  # five minutes
GOOD_TO_FORGET = 10  # good endings in a row after which the next opening is a first one again
ONE_EVENT_SECONDS = 1.0  # a lost link breaks all its works at once: that is one fault, not sixteen
# Endings that say nothing against the node: it said beforehand that it leaves, or the network's own choice ended it.
NEUTRAL = frozenset({"draining", "superseded", "link_full", "cancelled"})
# A refusal costs a round trip, and may be the caller's doing, or another gateway's who filled the node meanwhile.
SOFT = frozenset({"node_refused"})
SOFT_WEIGHT = 0.25
CONSECUTIVE_REFUSALS = 12

AVAILABLE_PRIOR, UNAVAILABLE_PRIOR = (
    20.0,
    0.5,
)  # what a newcomer is believed to be: nearly as good as those who are known
ENDING_MEMORY = 0.995  # per ending: about the last two hundred count
REDO_DEVIATIONS = 1.0  # how far below the mean the bound lies, in standard deviations

SLOW_START_SECONDS = 30.0
SLOW_START_SHARE = 0.1  # of its capacity, at first

LIMIT_SHARE_MIN = 8  # an eighth of the advertised slots is never taken away
TTFT_TOLERANCE = 2.0  # times its unloaded time to the first token: batching costs something, and that is no queue
TTFT_NOISE_SECONDS = 0.25  # less than this above it is noise, however many times it is
TTFT_MEMORY = 0.2
SHRINK_MIN = 0.8  # at most a fifth is cut at once
CUT_PAUSE_SECONDS = 1.0
STARTING_WORKS = 4  # at once on a node that has ended nothing well yet, where others have
STARTING_SHARE = 8  # or an eighth of its slots, where that is more
STARTING_WORKS_MAX = 16  # however many it says that it has


class Health:
    """One node and class. Survives the node's conversations, so that joining again clears nothing."""

    __slots__ = (
        "_bad",
        "_endings",
        "_excess",
        "_good",
        "_good_in_a_row",
        "_last_cut",
        "_last_fault",
        "_last_fault_at",
        "_limit_share",
        "availability",
        "fault_share",
        "faults_in_a_row",
        "first_seen",
        "open_until",
        "openings",
        "refusals_in_a_row",
        "state",
    )

    def __init__(self, now: float) -> None:
        self.state: State = "closed"
        self.first_seen = now
        self.open_until = 0.0
        self.openings = 0
        self.faults_in_a_row = 0
        self.refusals_in_a_row = 0
        self.fault_share = 0.0
        self.availability = 0.0
        self._endings = 0
        self._good_in_a_row = 0
        self._good = 0.0
        self._bad = 0.0
        self._last_fault = ""
        self._last_fault_at = -math.inf
        self._last_cut = -math.inf
        self._limit_share = 1.0  # of the advertised slots
        self._excess = 1.0  # how many times its unloaded time a first token takes lately
        self._believe()

    # ------------------------------------------------------------ endings

    def ended(self, now: float, fault: str | None) -> None:
        """One placement's end: None is a good one, else the code of what the node did."""
        if fault in NEUTRAL:
            return
        if fault is None:
            self._endings += 1
            self.faults_in_a_row = 0
            self.refusals_in_a_row = 0
            self._good_in_a_row += 1
            self._good = self._good * ENDING_MEMORY + 1.0
            self._bad *= ENDING_MEMORY
            self.fault_share *= 1.0 - FAULT_MEMORY
            if self.state == "half_open":
                self.state = "closed"
                self.fault_share = 0.0  # it was judged for those
            if self._good_in_a_row >= GOOD_TO_FORGET:
                self.openings = 0
        elif fault in SOFT and self.state != "half_open":
            self.refusals_in_a_row += 1
            self._bad = self._bad * ENDING_MEMORY + SOFT_WEIGHT
        else:
            same = fault == self._last_fault and now - self._last_fault_at < ONE_EVENT_SECONDS
            if same:
                return  # counted with the first, whose moment stays: who fails all the time is not one event
            self._last_fault, self._last_fault_at = fault, now
            self._endings += 1
            self.faults_in_a_row += 1
            self._good_in_a_row = 0
            self._good *= ENDING_MEMORY
            self._bad = self._bad * ENDING_MEMORY + 1.0
            self.fault_share += FAULT_MEMORY * (1.0 - self.fault_share)
        self._believe()

    @property
    def tripped(self) -> bool:
        """Whether the breaker should open now."""
        if self.state == "half_open":
            return self.faults_in_a_row > 0
        return self.state == "closed" and (
            self.faults_in_a_row >= CONSECUTIVE_FAULTS
            or self.refusals_in_a_row >= CONSECUTIVE_REFUSALS
            or (
                self._endings >= ENDINGS_FOR_A_SHARE and self.fault_share > FAULT_SHARE_MAX and self.faults_in_a_row > 0
            )
        )

    def open(self, now: float) -> None:
        self.state = "open"
        self.open_until = now + OPEN_SECONDS * 2 ** min(self.openings, OPENINGS_MAX)
        self.openings += 1

    def half_open(self) -> None:
        """One work at a time shows whether it has recovered."""
        self.state = "half_open"
        self.faults_in_a_row = 0
        self.refusals_in_a_row = 0

    # ------------------------------------------------------------ availability

    def _believe(self) -> None:
        """A lower bound of the chance that a work ends well: Beta posterior, mean less one deviation."""
        good, bad = AVAILABLE_PRIOR + self._good, UNAVAILABLE_PRIOR + self._bad
        whole = good + bad
        mean = good / whole
        deviation = math.sqrt(mean * (1.0 - mean) / (whole + 1.0))
        self.availability = max(0.01, mean - REDO_DEVIATIONS * deviation)

    @property
    def proven(self) -> bool:
        """Whether it has ended anything well yet."""
        return self._good >= 1.0

    # ------------------------------------------------------------ how much at once

    def warmth(self, now: float) -> float:
        """Slow start: the share of its capacity by which a newcomer is sampled."""
        age = (now - self.first_seen) / SLOW_START_SECONDS
        return min(1.0, SLOW_START_SHARE + (1.0 - SLOW_START_SHARE) * max(0.0, age))

    def first_token(self, now: float, ttft_seconds: float, unloaded_seconds: float, in_flight: int, slots: int) -> None:
        """Adapts how many works it is given at once, by how much longer than unloaded a first token takes.

        As gradient2 (Netflix concurrency-limits): cut by the ratio when it is above the tolerance, else grow by the
        square root; only while the limit is felt, and one cut at a time: what began before a cut knows nothing of it.
        """
        if ttft_seconds - unloaded_seconds <= TTFT_NOISE_SECONDS:
            excess = 1.0
        else:
            excess = ttft_seconds / max(unloaded_seconds, TTFT_NOISE_SECONDS / TTFT_TOLERANCE)
        self._excess += TTFT_MEMORY * (min(excess, 10.0) - self._excess)
        limit = self._limit_share * slots
        if slots <= 0 or in_flight + 1 < limit / 2:
            return  # A node that is slow while it has little to do is not slow because of us.
        gradient = max(SHRINK_MIN, min(1.0, TTFT_TOLERANCE / self._excess))
        if gradient == 1.0:
            limit += max(1.0, math.sqrt(limit)) / 4
        elif now - self._last_cut > max(CUT_PAUSE_SECONDS, 2.0 * ttft_seconds):
            limit *= gradient
            self._last_cut = now
        self._limit_share = min(1.0, max(limit / slots, 1.0 / LIMIT_SHARE_MIN))

    def rested(self) -> None:
        """Nothing was heard of it for a while: the queue that cut its limit is gone."""
        self._limit_share = 1.0
        self._excess = 1.0

    def limit(self, slots: int, *, starting: bool = False) -> int:
        """How many works it is given at once: never more than it advertises. `starting`: it has yet to show itself."""
        if self.state == "open":
            return 0
        if self.state == "half_open":
            return min(1, slots)
        share = min(slots // STARTING_SHARE, STARTING_WORKS_MAX) if starting else slots
        return min(slots, max(STARTING_WORKS if starting else 1, round(self._limit_share * share)))
