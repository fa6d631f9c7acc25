"""How fast one node serves one class, measured by the network's own clock; what the node says of itself is a hint.

The time to a first token is a line over the prompt tokens that had to be computed, plus a wait that jumps up at once
and decays; the time between tokens is a line over how many works ran beside. Pure: times are arguments, in monotonic
seconds.
"""

from __future__ import annotations

import math

DECODE_TOKENS_PER_SECOND_UNKNOWN = 20.0  # a node nobody has measured: neither flattering nor hopeless
PREFILL_TOKENS_PER_SECOND_UNKNOWN = 500.0
HINT_TOKENS_PER_SECOND_MIN = 0.1  # and nobody waits for what is slower
HINT_TOKENS_PER_SECOND_MAX = 1e6  # nothing is faster; a hint beyond this is a slip or a lie
UNMEASURED_FIRST_TOKEN_SECONDS = 5.0  # how patient to be with a node of which nothing is known
SILENT_SECONDS = 60.0  # what was measured before this is the past
WAIT_DECAY_SECONDS = 10.0
MEMORY = 0.95  # per work: about the last twenty count
READ_TOKENS_SURE = 300.0  # a spread of prompt lengths that says more than the hint does
WORKS_BESIDE_SURE = 2.0
LOADED_WEIGHT = 0.01  # of a first token that came late on a loaded node: a machine that has become slower shows in time
OUTLIER = 3.0  # times the prediction: what is above was a wait, not a speed
WAIT_NOTICED_SHARE, WAIT_NOTICED_SECONDS = 0.25, 0.02  # less above the prediction is noise
CROWDING_UNKNOWN = 0.5  # a full node is believed to need half as long again for each token
TOKENS_FOR_A_SPEED = 8


class Line:
    """y = base + slope · x by least squares over recent points; few or equal points lean on the prior slope."""

    __slots__ = ("_prior", "_sure", "_w", "_wx", "_wxx", "_wxy", "_wy", "base", "known", "slope")

    def __init__(self, base: float, slope: float, sure: float) -> None:
        self.base = base
        self.slope = slope
        self.known = False  # whether the points say more about the slope than the prior does
        self._prior = slope
        self._sure = sure * sure
        self._w = self._wx = self._wy = self._wxx = self._wxy = 0.0

    def at(self, x: float) -> float:
        return self.base + self.slope * x

    def saw(self, x: float, y: float, weight: float = 1.0) -> None:
        kept = MEMORY**weight
        self._w = self._w * kept + weight
        self._wx = self._wx * kept + weight * x
        self._wy = self._wy * kept + weight * y
        self._wxx = self._wxx * kept + weight * x * x
        self._wxy = self._wxy * kept + weight * x * y
        mean_x, mean_y = self._wx / self._w, self._wy / self._w
        spread = max(0.0, self._wxx - self._wx * mean_x)
        self.known = spread > self._sure
        self.slope = max(0.0, (self._wxy - self._wx * mean_y + self._sure * self._prior) / (spread + self._sure))
        self.base = mean_y - self.slope * mean_x
        if self.base < 0.0:  # The prior was too slow: then nothing but the slope explains the points.
            self.base = 0.0
            self.slope = self._wxy / self._wxx if self._wxx > 0.0 else self.slope


class Pace:
    """One node and class. Survives the node's conversations."""

    __slots__ = ("_first", "_gap", "_last", "_wait", "_wait_at", "first_works", "gap_works")

    def __init__(self, *, decode_hint: float = 0.0, prefill_hint: float = 0.0, slots: int = 1) -> None:
        decode = _hint(decode_hint) or DECODE_TOKENS_PER_SECOND_UNKNOWN
        prefill = _hint(prefill_hint) or PREFILL_TOKENS_PER_SECOND_UNKNOWN
        self._first = Line(0.0, 1.0 / prefill, READ_TOKENS_SURE)
        self._gap = Line(1.0 / decode, CROWDING_UNKNOWN / decode / max(1, slots), WORKS_BESIDE_SURE)
        self._wait = 0.0
        self._wait_at = -math.inf
        self._last = -math.inf
        self.first_works = 0  # how many works these lines rest on
        self.gap_works = 0

    # ------------------------------------------------------------ what was seen

    def saw_first(self, now: float, read_tokens: int, ttft_seconds: float, *, loaded: bool = False) -> None:
        """A first id came `ttft_seconds` after the offer, and `read_tokens` had to be computed for it.

        The line is what an unloaded node takes: while it is `loaded`, what is above the line is a wait.
        """
        expected = self._first.at(read_tokens)
        if self.first_works >= 3:
            over = ttft_seconds - expected
            noticed = over > WAIT_NOTICED_SHARE * expected + WAIT_NOTICED_SECONDS
            self.waited(now, over if noticed else 0.0)
            ttft_seconds = min(ttft_seconds, OUTLIER * expected + WAIT_NOTICED_SECONDS)
        queued = loaded and self.first_works >= 3 and ttft_seconds > expected
        self._first.saw(read_tokens, ttft_seconds, LOADED_WEIGHT if queued else 1.0)
        self.first_works += 1
        self._last = now

    def saw_tokens(self, now: float, tokens: int, seconds: float, beside: int) -> None:
        """`tokens` ids in `seconds` after the first, while `beside` other works ran."""
        if tokens >= TOKENS_FOR_A_SPEED and seconds > 0.0:
            self._gap.saw(beside, seconds / tokens)
            self.gap_works += 1
            self._last = now

    def waited(self, now: float, seconds: float) -> None:
        """Peak-EWMA: a longer wait counts at once, a shorter one as the longer is forgotten."""
        current = self.wait_seconds(now)
        if seconds >= current:
            self._wait = seconds
        else:
            kept = math.exp(-(now - self._wait_at) / WAIT_DECAY_SECONDS)
            self._wait = self._wait * kept + seconds * (1.0 - kept)
        self._wait_at = now

    # ------------------------------------------------------------ what is expected

    def wait_seconds(self, now: float) -> float:
        if self._wait <= 0.0:
            return 0.0
        return self._wait * math.exp(-max(0.0, now - self._wait_at) / WAIT_DECAY_SECONDS)

    def read_seconds(self, read_tokens: int) -> float:
        """From the offer to the first id on an idle node that has to compute this many prompt ids."""
        return self._first.at(read_tokens)

    def first_token_seconds(self, now: float, read_tokens: int) -> float:
        """Queue and prefill. For a clock that judges the node, so one that is not measured gets patience."""
        expected = self.wait_seconds(now) + self._first.at(read_tokens)
        return expected if self.first_works else max(UNMEASURED_FIRST_TOKEN_SECONDS, expected)

    def token_seconds(self, beside: int) -> float:
        """Between two ids of one stream while `beside` other works run."""
        return self._gap.at(beside)

    @property
    def measured(self) -> bool:
        return self.first_works > 0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """None while prompts were too short or too much alike to tell it from the latency."""
        return 1.0 / self._first.slope if self._first.known and self._first.slope > 0.0 else None

    def silent(self, now: float) -> bool:
        """Nothing was seen for so long that it may be another node by now."""
        return now - self._last > SILENT_SECONDS

    @property
    def seen(self) -> float:
        """When something was measured last."""
        return self._last


def _hint(tokens_per_second: float) -> float:
    """A node's own word within bounds; 0.0 when it says nothing."""
    if tokens_per_second <= 0.0:
        return 0.0
    return min(max(tokens_per_second, HINT_TOKENS_PER_SECOND_MIN), HINT_TOKENS_PER_SECOND_MAX)
