"""Requests with an Idempotency-Key in the simulation: the gateway's shared answers, without HTTP and text.

The task that makes an answer is the real one (`gateway/idempotent.py`), and so are its table and its books. A caller
reads it from the first id on, and comes back with the same key after whatever happened, perhaps to another gateway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from gridmill.network.books import Books, Insufficient, Unavailable
from gridmill.network.faults import CallerFault, NodeFault, NoRoom
from gridmill.network.gateway.asgi import ApiError
from gridmill.network.gateway.idempotent import Making, Plan, RunsElsewhere, SharedAnswers
from gridmill.network.idempotency import Asked, Part
from gridmill.network.metering import most
from gridmill.network.registry import Registry
from gridmill.network.store import StoreUnusable
from gridmill.sim.callers import Call
from gridmill.sim.clock import VirtualLoop
from gridmill.sim.model import CLASS_ID, MODEL_NAME
from gridmill.wire.messages import Emission
from gridmill.wire.sampling import pack_ids


class KeyedCalls:
    """What the gateway does for a request with a key, for one choice."""

    def __init__(self, loop: VirtualLoop, shared: SharedAnswers, books: Books, registry: Registry) -> None:
        self._loop = loop
        self._shared = shared
        self._books = books
        self._registry = registry

    async def answer(self, call: Call, wall_seconds: float) -> None:
        """Reads the answer to its end, as it is made or as it was made. Raises ApiError."""
        digest = hashlib.sha256(call.name.encode()).digest()
        # As from a gateway each attempt has an id of its own; that of the one which began counts.
        request_id = f"{call.name}.{call.attempt}"
        asked = Asked(call.payer.account_id, digest, digest, request_id, MODEL_NAME, CLASS_ID, int(wall_seconds), 1)

        async def plan(asked: Asked, parts: Sequence[Part]) -> Plan:
            return await self._plan(call, asked, parts[0])

        making = Making(lambda asked: (_FORM, frozenset()), plan, _explain, False)
        recording = self._shared.join(asked, making)
        recording.readers += 1
        try:
            seen = 0
            while True:
                news, failure = recording.news, recording.failure
                track = recording.tracks[0] if recording.tracks else None
                if track is not None and len(track.ids) > seen and (call.streaming or recording.whole):
                    ids, seen = track.ids[seen:], len(track.ids)
                    if (pause := call.take(ids, self._loop)) is not None:
                        await pause
                    continue
                if recording.whole and track is not None and track.outcome is not None:
                    call.told_nanocredits = recording.charge_nanocredits
                    call.finish(track.outcome.kind, self._loop.time())
                    return
                if failure is not None:
                    raise failure
                await news.wait()
        finally:
            recording.readers -= 1

    async def _plan(self, call: Call, asked: Asked, part: Part) -> Plan:
        """As OpenAIGateway._plan: what an earlier run delivered was paid then, its prompt with it."""
        work, payer = call.work, call.payer
        prompt_tokens = len(work.prompt) // 4
        if part.kind:
            return Plan(prompt_tokens, {})
        input_tokens = 0 if part.prompt_charged else prompt_tokens
        left = work.sampling.max_tokens - len(part.ids)
        rows = [view.price for view in self._registry.snapshot().by_class.get(CLASS_ID, ())]
        want = max([most(row, input_tokens, left) for row in rows], default=0)
        least = min([most(row, input_tokens, left) for row in rows], default=0)
        amount = await self._books.admit(payer, want, least)
        work_id = asked.work_ids[0]
        order = self._books.order(payer, work_id, CLASS_ID, MODEL_NAME, input_tokens, amount)
        rest = msgspec.structs.replace(work, work_id=work_id, delivered=pack_ids(part.ids), epoch=part.epoch_next)
        return Plan(prompt_tokens, {0: (rest, order)})


def _explain(error: Exception) -> ApiError:
    match error:
        case NodeFault() | NoRoom() | CallerFault():
            return ApiError(500, error.code, str(error))
        case Insufficient():
            return ApiError(402, "insufficient", str(error))
        case Unavailable() | StoreUnusable():
            return ApiError(503, "unavailable", str(error))
        case RunsElsewhere():
            return ApiError(409, "runs_elsewhere", "another gateway makes it")
    return ApiError(500, "bug", repr(error))


class _Choice:
    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens = 0
        self.complete = False

    def take(self, emissions: list[Emission]) -> list[Any]:
        self.tokens += sum(len(emission.ids) for emission in emissions)
        return []


class _Form:
    """Ids are all that is shown."""

    def choice(self, index: int, hidden: frozenset[int]) -> _Choice:
        return _Choice(index)


_FORM: Any = _Form()
