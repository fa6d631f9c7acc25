"""Requests with an Idempotency-Key: one task makes the answer, and every exchange that carries the key reads it.

The task belongs to the program, not to a connection: a caller who leaves comes back for the answer, so it is made to
its end. It stops early only when the payer's key is revoked or the network stops; the next retry goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from gridmill.network.books import Books, Order, Unavailable
from gridmill.network.dispatch import Dispatcher
from gridmill.network.faults import Enough, NodeFault, stopping
from gridmill.network.gateway.asgi import ApiError
from gridmill.network.gateway.exchange import Exchange
from gridmill.network.gateway.rendering import Choice, Format
from gridmill.network.gateway.requests import ChatRequest, CompletionRequest
from gridmill.network.gateway.showing import Showing
from gridmill.network.idempotency import (
    Asked,
    Claim,
    Elsewhere,
    Ending,
    Idempotency,
    KeyReused,
    Mine,
    Part,
    Recording,
    Whole,
    pack_scores,
)
from gridmill.network.journey import Outcome
from gridmill.network.store import StoreUnusable
from gridmill.wire.messages import Emission, Generate

log = logging.getLogger("gridmill.network.gateway")

ELSEWHERE_SECONDS_MAX = 600.0  # how long a retry waits for an answer that another gateway makes
LOOK_AGAIN_SECONDS = 1.0  # what is announced comes at once; a gateway that died announces nothing


class RunsElsewhere(Exception):
    """Another gateway makes this answer, and the wait for it was too long."""


class Incomplete(Exception):
    """Log probabilities are asked for, and those of ids that were delivered are lost."""


class Plan(msgspec.Struct, frozen=True):
    """What a run has to do: works and orders by choice. Choices that have ended are not among them."""

    prompt_tokens: int
    works: Mapping[int, tuple[Generate, Order]]


Shape = Callable[[Asked], tuple[Format, frozenset[int]]]


class Making(msgspec.Struct, frozen=True):
    """What the API knows of a request: `shape` is the JSON around its choices and the ids that are not shown, `plan`
    holds for all works that are not done, `explain` says what went wrong. `scored`: logprobs are asked for."""

    shape: Shape
    plan: Callable[[Asked, Sequence[Part]], Awaitable[Plan]]
    explain: Callable[[Exception], ApiError]
    scored: bool


class SharedAnswers:
    """This gateway's answers that may have several readers. `spawn` starts a task of the program's own group."""

    def __init__(
        self,
        table: Idempotency,
        *,
        books: Books,
        dispatcher: Dispatcher,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        clock: Callable[[], float],
    ) -> None:
        self._table = table
        self._books = books
        self._dispatcher = dispatcher
        self._spawn = spawn
        self._clock = clock
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()  # they only write down what came of them
        self._closing = False

    def join(self, asked: Asked, making: Making) -> Recording:
        """The answer to this key, which begins to be made if nobody makes it here. Raises KeyReused or NoRoom."""
        slot = (asked.account_id, asked.key_hash)
        recording = self._table.recordings.get(slot)
        if recording is not None:
            if recording.body_hash != asked.body_hash:
                raise KeyReused
            return recording
        if self._closing:
            raise stopping()
        recording = Recording(asked.body_hash)
        self._spawn(self._make(slot, recording, asked, making))
        self._table.recordings[slot] = recording
        return recording

    async def close(self) -> None:
        """Ends what runs, after its time to drain; what was delivered is settled, for a retry to go on from."""
        self._closing = True
        for task in self._tasks - self._ending:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ------------------------------------------------------------ the task

    async def _make(self, slot: tuple[str, bytes], recording: Recording, asked: Asked, making: Making) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._closing:
                raise stopping()  # asked for in the moment before, and begun after it
            await self._fill(recording, asked, making)
        except asyncio.CancelledError:
            recording.fail(making.explain(stopping()))
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong is for the readers to tell
            recording.fail(making.explain(error))
        finally:
            del self._table.recordings[slot]
            self._tasks.discard(task)
            self._ending.discard(task)

    async def _fill(self, recording: Recording, asked: Asked, making: Making) -> None:
        claim = await self._claim(recording, asked)
        if isinstance(claim, Whole):
            _replay(recording, claim, making.scored)
            return
        assert isinstance(claim, Mine)
        try:
            try:
                await self._run(recording, claim, making)
            except BaseException as error:
                if isinstance(error, Exception) or self._closing:
                    await self._write_down(claim, None)
                raise
            tracks = recording.tracks
            kinds = tuple([track.outcome.kind for track in tracks if track.outcome is not None])
            await self._write_down(claim, Ending(kinds, tuple(recording.nodes), recording.prompt_tokens))
        finally:
            self._table.over(claim)

    async def _write_down(self, mine: Mine, ending: Ending | None) -> None:
        """After the books have it: what is said here must hold after any crash. None: the run broke off."""
        task = asyncio.current_task()
        assert task is not None
        self._ending.add(task)
        try:
            await self._books.flush()
            if ending is None:
                await self._table.give_up(mine)
            else:
                await self._table.finish(mine, ending)
        except (Unavailable, StoreUnusable) as problem:
            # The row stays as that of a run whose gateway died: a retry looks for itself what the books have.
            log.warning("the end of a request with an idempotency key was not written", extra={"reason": str(problem)})

    async def _claim(self, recording: Recording, asked: Asked) -> Claim:
        deadline = self._clock() + ELSEWHERE_SECONDS_MAX
        take_own = False
        while True:
            claim = await self._table.claim(asked, take_own=take_own)
            if not isinstance(claim, Elsewhere):
                return claim
            if claim.holder == self._table.holder and not take_own:
                # Nobody runs it here: it is from an earlier life, or its end could not be written.
                await self._books.flush()
                take_own = True
                continue
            if not recording.readers or self._clock() >= deadline:
                raise RunsElsewhere
            await self._table.changed(claim.request_id, LOOK_AGAIN_SECONDS)

    async def _run(self, recording: Recording, mine: Mine, making: Making) -> None:
        form, hidden = making.shape(mine.asked)
        recording.begin(mine.asked, mine.parts, making.scored)
        recording.changed()
        if making.scored and any(part.scores is None for part in mine.parts):
            raise Incomplete
        choices = [form.choice(index, hidden) for index in range(len(mine.parts))]
        parts = [
            _ended(choice, part, track.since(0))
            for choice, part, track in zip(choices, mine.parts, recording.tracks, strict=True)
        ]
        plan = await making.plan(mine.asked, parts)
        recording.prompt_tokens = plan.prompt_tokens
        for part, track in zip(parts, recording.tracks, strict=True):
            if part.kind:
                track.outcome = _outcome(part, part.kind)
        try:
            async with asyncio.TaskGroup() as group:
                for index, (work, order) in plan.works.items():
                    group.create_task(self._serve(recording, choices[index], parts[index], work, order))
        except BaseExceptionGroup as failures:
            raise first_cause(failures) from failures
        finally:
            for _, order in plan.works.values():
                if order.deferred is not None:
                    order.deferred()  # The next run may not begin before this one is settled.
                self._books.release(order)
        recording.begun = recording.whole = True
        recording.changed()

    async def _serve(self, recording: Recording, choice: Choice, part: Part, work: Generate, order: Order) -> None:
        track = recording.tracks[choice.index]
        start = len(part.ids)

        async def emit(emissions: list[Emission]) -> None:
            before = choice.tokens
            try:
                choice.take(emissions)
            except ValueError as problem:
                raise NodeFault("bad_ids", str(problem)) from None
            track.add(emissions, choice.tokens - before)
            recording.changed()
            if choice.complete:
                raise Enough(choice.tokens - start)

        def placed(node_id: str) -> None:
            recording.placed(node_id)
            recording.begun = True
            recording.changed()

        order.keeps_ids = True
        order.shown = True  # a retry gets what was delivered
        if track.scores is not None:
            scores = track.scores
            order.scores = lambda first, count: pack_scores(scores[start + first : start + first + count])
        outcome = await self._dispatcher.serve(work, order, emit, placed=placed)
        recording.charge_nanocredits += outcome.charge_nanocredits
        track.outcome = msgspec.structs.replace(
            outcome,
            output_tokens=start + outcome.output_tokens,
            cached_tokens=max(part.cached_tokens, outcome.cached_tokens),
        )
        recording.changed()


def _ended(choice: Choice, part: Part, stored: Emission) -> Part:
    """The part, with why it ended where that shows in its ids: a crash came between the last id and the bill."""
    if part.ids and not part.kind:
        choice.take([stored])
        if choice.complete:
            return msgspec.structs.replace(part, kind="stop")
    return part


def _outcome(part: Part, kind: str) -> Outcome:
    return Outcome("length" if kind == "length" else "stop", len(part.ids), part.cached_tokens, part.nodes)


def _replay(recording: Recording, whole: Whole, scored: bool) -> None:
    recording.replayed = True
    recording.nodes += whole.ending.nodes
    recording.begin(whole.asked, whole.parts, scored)
    recording.prompt_tokens = whole.ending.prompt_tokens
    if scored and any(part.scores is None for part in whole.parts):
        raise Incomplete
    for track, part, kind in zip(recording.tracks, whole.parts, whole.ending.kinds, strict=True):
        track.outcome = _outcome(part, kind)
    recording.begun = recording.whole = True
    recording.changed()


def first_cause(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a request: the first thing that went wrong."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


# ---------------------------------------------------------------- readers


async def show(
    recording: Recording, exchange: Exchange, request: ChatRequest | CompletionRequest, shape: Shape
) -> None:
    """Tells one caller the whole answer, from its first id. Raises ClientGone, or what ended the run."""
    recording.readers += 1
    was_whole = recording.whole
    try:
        with exchange.client.present():
            while recording.asked is None:
                news = recording.news
                if recording.failure is not None:
                    raise recording.failure
                await news.wait()
            exchange.request_id = recording.asked.request_id
            exchange.class_id = recording.asked.class_id
            exchange.nodes = recording.nodes
            exchange.replayed = was_whole or recording.replayed
            form, hidden = shape(recording.asked)
            reader = _Reader(exchange, form, request, recording, hidden)
            try:
                await (reader.stream() if request.stream else reader.answer())
            finally:
                exchange.prompt_tokens = recording.prompt_tokens
                exchange.output_tokens = sum([choice.tokens for choice in reader.choices])
    finally:
        recording.readers -= 1


class _Reader(Showing):
    """One caller's rendering of a Recording."""

    def __init__(
        self,
        exchange: Exchange,
        form: Format,
        request: ChatRequest | CompletionRequest,
        recording: Recording,
        hidden: frozenset[int],
    ) -> None:
        super().__init__(exchange, form, request)
        self.choices = [form.choice(index, hidden) for index in range(len(recording.tracks))]
        self._recording = recording
        self._seen = [0] * len(self.choices)
        self._finished = [False] * len(self.choices)

    async def stream(self) -> None:
        recording = self._recording
        while True:
            news, failure = recording.news, recording.failure
            if recording.begun:
                if not self.exchange.head_sent:
                    await self.open()
                if data := b"".join([self._take(choice) for choice in self.choices]):
                    whole = all(self._finished)
                    await self.client.send_body(data + (self._last() if whole else b""), more=not whole)
                    if whole:
                        return
            if failure is not None:
                raise failure
            await news.wait()

    async def answer(self) -> None:
        recording = self._recording
        while not recording.whole:
            news = recording.news
            if recording.failure is not None:
                raise recording.failure
            self._note_first_id()
            await news.wait()
        self.exchange.prompt_tokens = recording.prompt_tokens
        for choice in self.choices:
            self._take(choice)
        usage = self.usage(recording.charge_nanocredits)
        await self.exchange.answer(200, self.form.answer(self.choices, usage, self.gridmill()))

    def _take(self, choice: Choice) -> bytes:
        """The events of what is new of a choice; when the answer is not streamed, its pieces are kept instead."""
        track = self._recording.tracks[choice.index]
        if self._finished[choice.index]:
            return b""
        self._note_first_id()
        pieces = []
        if len(track.ids) > self._seen[choice.index] and not choice.complete:
            pieces = choice.take([track.since(self._seen[choice.index])])
            self._seen[choice.index] = len(track.ids)
        if track.outcome is not None:
            self._finished[choice.index] = True
            pieces += choice.finish(track.outcome)
        if not self.request.stream:
            choice.pieces += pieces
            return b""
        data = choice.events(pieces) if pieces else b""
        if self._finished[choice.index]:
            data += self.form.finish_event(choice.index, choice.finish_reason, self.gridmill())
        return data

    def _last(self) -> bytes:
        data = b"data: [DONE]\n\n"
        if self.request.include_usage:
            self.exchange.prompt_tokens = self._recording.prompt_tokens
            usage = self.usage(self._recording.charge_nanocredits)
            data = self.form.usage_event(usage, self.gridmill()) + data
        return data

    def _note_first_id(self) -> None:
        exchange = self.exchange
        if exchange.first_token_at is None and any([track.ids for track in self._recording.tracks]):
            exchange.first_token_at = exchange.clock()
