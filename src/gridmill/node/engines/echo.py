"""The smallest real engine: no torch, no weights, ids that give a wrong resume away.

1. Each id is a hash of (prompt ids, seed, all previous ids), mapped onto the ordinary ids of the model's vocabulary; it
   is never an end-of-sequence or special id. At temperature 0 the seed is left out, as it would be by a real model.
2. One turn of the event loop is one step: every active stream gets `ids_per_step` ids, then the next turn begins.
3. It ends by `max_tokens` or the context, or at a stop id that the hash happens to hit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterable
from typing import Literal

from gridmill.node.engines.admission import already_ended, output_limit, refusal
from gridmill.node.engines.base import Emit, Failed, Finished, Refused, Served, Tokens
from gridmill.wire.messages import Generate, Telemetry
from gridmill.wire.sampling import TokenLogprob, unpack_ids

CATCH_UP_SECONDS_MAX = 0.05  # after a stall a stream may hurry this much and no more, as a real engine cannot at all


class EchoEngine:
    """Serves any class from its tokenizer alone.

    `tokens_per_second` (per stream) and `first_token_delay_seconds` imitate a slower machine; without them it runs as
    fast as it can. `now` is a monotonic clock in seconds, for telemetry alone.
    """

    kind = "echo"

    def __init__(
        self,
        served: Served,
        *,
        slots: int = 64,
        tokens_per_second: float | None = None,
        first_token_delay_seconds: float = 0.0,
        ids_per_step: int = 1,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if tokens_per_second is not None and tokens_per_second <= 0:
            raise ValueError("tokens_per_second must be above 0")
        if ids_per_step < 1 or slots < 1 or first_token_delay_seconds < 0:
            raise ValueError("ids_per_step and slots must be at least 1, first_token_delay_seconds at least 0")
        self.slots = slots
        self._served = served
        self._ordinary = ordinary_ids(served.files[served.model_class.tokenizer_sha256], served)
        self._tokens_per_second = tokens_per_second
        self._first_token_delay_seconds = first_token_delay_seconds
        self._ids_per_step = ids_per_step
        self._closing = asyncio.Event()
        self._running = 0
        self._now = now
        self._produced = 0
        self._telemetry_base = (now(), 0)

    @property
    def served(self) -> Served:
        return self._served

    async def run(self, work: Generate, emit: Emit) -> None:
        refused = refusal(work, self._served)
        if refused is None and self._closing.is_set():
            refused = Refused("node", "closed", "this engine is closed")
        if refused is None and self._running >= self.slots:
            refused = Refused("node", "busy", f"all {self.slots} slots are taken")
        if refused is not None:
            await emit(refused)
            return
        self._running += 1
        try:
            await emit(await self._produce(work, emit))
        finally:
            self._running -= 1

    async def _produce(self, work: Generate, emit: Emit) -> Finished | Failed:
        prompt, delivered = unpack_ids(work.prompt), unpack_ids(work.delivered)
        match already_ended(work, self._served, len(prompt), delivered):
            case "stop":
                return Finished("stop")
            case "length":
                return Finished("length")
        stream = _IdStream(work, delivered, self._ordinary)
        limit = output_limit(work, self._served, len(prompt))
        loop = asyncio.get_running_loop()
        due = loop.time() + self._first_token_delay_seconds
        while True:
            wait_seconds = due - loop.time()
            if wait_seconds > 0:
                await self._closing_within(wait_seconds)
            else:
                await asyncio.sleep(0)  # a step is at least one turn of the loop
            if self._closing.is_set():
                return Failed("closed", "the engine was closed while this work ran")
            ids, reason = stream.take(min(self._ids_per_step, limit - stream.position))
            self._produced += len(ids)
            await emit(Tokens(tuple(ids), stream.logprobs_of(ids)))
            if reason == "stop":
                return Finished("stop")
            if stream.position >= limit:
                return Finished("length")
            if self._tokens_per_second is not None:
                due = max(due + len(ids) / self._tokens_per_second, loop.time() - CATCH_UP_SECONDS_MAX)

    async def _closing_within(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            pass  # the usual case: the time has come and nobody closed the engine

    def telemetry(self) -> Telemetry:
        then, before = self._telemetry_base
        now = self._now()
        self._telemetry_base = (now, self._produced)
        rate = (self._produced - before) / (now - then) if now > then else 0.0
        return Telemetry(running=self._running, tokens_per_second=rate)

    async def close(self) -> None:
        """Every run ends with Failed at its next step; nothing else is held."""
        self._closing.set()


class _IdStream:
    """The ids of one work, each in constant time: the state hashes everything before it."""

    def __init__(self, work: Generate, delivered: list[int], ordinary: array[int]) -> None:
        seed = b"" if work.sampling.greedy else work.sampling.seed
        self._state = hashlib.sha256(b"gridmill-echo-v1\0" + seed + b"\0" + work.prompt).digest()
        self._ordinary = ordinary
        self._stops = frozenset(work.sampling.stop_token_ids)
        self._min_tokens = work.sampling.min_tokens
        self._top_logprobs = work.sampling.top_logprobs
        self.position = len(delivered)
        for token_id in delivered:
            self._state = _after(self._state, token_id)

    def take(self, count: int) -> tuple[list[int], Literal["stop"] | None]:
        """Up to `count` more ids; fewer, with "stop", when a stop id is hit."""
        ids = []
        ordinary, stops = self._ordinary, self._stops
        for _ in range(count):
            number = int.from_bytes(self._state[:8], "little")
            token_id = ordinary[number % len(ordinary)]
            if stops and token_id in stops and self.position < self._min_tokens:
                token_id = self._beside_stops(number)
            ids.append(token_id)
            self._state = _after(self._state, token_id)
            self.position += 1
            if stops and token_id in stops:
                return ids, "stop"
        return ids, None

    def _beside_stops(self, number: int) -> int:
        """The next ordinary id that is no stop id (all are only in a vocabulary smaller than the list of stops)."""
        steps = range(len(self._stops) + 1)
        candidates = (self._ordinary[(number + step) % len(self._ordinary)] for step in steps)
        return next((token_id for token_id in candidates if token_id not in self._stops), self._ordinary[0])

    def logprobs_of(self, ids: Iterable[int]) -> tuple[TokenLogprob, ...] | None:
        """Plausible, deterministic and made up: the chosen id is likeliest, the others follow it in the vocabulary."""
        if self._top_logprobs is None:
            return None
        others = self._ordinary[: self._top_logprobs + 1]
        logprobs = []
        for token_id in ids:
            chosen = -(token_id % 64) / 64.0
            ranked = [token_id, *(other for other in others if other != token_id)][: self._top_logprobs]
            top = tuple((other, chosen - rank) for rank, other in enumerate(ranked))
            logprobs.append(TokenLogprob(chosen, top))
        return tuple(logprobs)


def _after(state: bytes, token_id: int) -> bytes:
    return hashlib.sha256(state + token_id.to_bytes(4, "little")).digest()


def ordinary_ids(tokenizer_json: bytes, served: Served) -> array[int]:
    """Vocabulary ids of a tokenizer.json in ascending order, without added, special and end-of-sequence ids.

    Raises ValueError when the file is no tokenizer or leaves no id.
    """
    facts = served.facts
    try:
        document = json.loads(tokenizer_json)
        vocabulary = document["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        outside = {int(added["id"]) for added in document.get("added_tokens", [])} | set(facts.eos_token_ids)
        ordinary = sorted({int(token_id) for token_id in ids} - outside)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer.json holds no vocabulary ({error})") from error
    ordinary = [token_id for token_id in ordinary if 0 <= token_id < facts.vocab_size]
    if not ordinary:
        raise ValueError("tokenizer.json holds no ordinary token ids")
    return array("I", ordinary)
