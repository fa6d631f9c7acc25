"""The native engine: one compute thread that runs steps, and an event loop that reads what they produce.

1. The thread owns sessions, pages and the model (step.py). The event loop sends it joins and departures through an
   inbox, and gets everything that a step produced in one call.
2. A session computes at most AHEAD_TOKENS_MAX ids ahead of what its reader's `emit` has taken; a slow reader therefore
   costs a bounded buffer, and nobody else waits.
3. When the thread ends, for whatever reason, every run hears of it and every later work is refused.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from gridmill.node.engines.admission import already_ended, output_limit, refusal
from gridmill.node.engines.base import Emit, Failed, Finished, Paused, Refused, Served, Tokens
from gridmill.node.engines.native.families import Findings, admission_test
from gridmill.node.engines.native.runner import Row, Runner
from gridmill.node.engines.native.sampler import SamplingState
from gridmill.node.engines.native.slice import ModelUnsupported, read_config
from gridmill.node.engines.native.step import Made, Session, Stepper, describe
from gridmill.wire.classes import ModelClass, TextFacts
from gridmill.wire.messages import Generate, Telemetry
from gridmill.wire.sampling import TokenLogprob, unpack_ids

SLOTS = 64  # what a node takes at once unless its owner says otherwise
TOKEN_BUDGET_CPU, TOKEN_BUDGET_GPU = 256, 2048  # ids per step: about where a longer step stops being more efficient
RATE_SECONDS = 5.0  # how far back the reported tokens per second look
WARM_UP_DECODE_STEPS = 12


@dataclass(slots=True, frozen=True)
class Speeds:
    """Of one stream alone on this machine: hints for a scheduler, never for money."""

    decode_tokens_per_second: float
    prefill_tokens_per_second: float


@dataclass(slots=True, eq=False)
class _Stream:
    """What the event loop knows of one session: ids that wait for `emit`, and whom to wake."""

    session: Session
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Finished | Failed | None = None
    paused: bool = False
    wake: asyncio.Future[None] | None = None


class ExactNotHeld(ModelUnsupported):
    """This machine cannot keep the promise of an exact class; without exact mode the model can be served."""


class NativeEngine:
    """An Engine (base.py) over a Runner of the whole model. Starts its compute thread at once; `close` ends it."""

    kind = "native"

    def __init__(
        self,
        served: Served,
        runner: Runner,
        *,
        slots: int = SLOTS,
        token_budget: int | None = None,
        batches: bool = True,
        speeds: Speeds | None = None,
        notes: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`batches` false keeps the rows of different sessions out of each other's forward passes.

        Raises ValueError when runner and facts disagree about the vocabulary.
        """
        if served.facts.vocab_size != runner.vocab_size:
            raise ValueError(f"the facts say {served.facts.vocab_size} ids, the model has {runner.vocab_size}")
        self.slots = slots
        self.notes = tuple(notes)  # sentences for the owner: what this model cannot do here
        self._served = served
        self._runner = runner
        self._device = torch.device(runner.device)
        budget = token_budget or (TOKEN_BUDGET_CPU if self._device.type == "cpu" else TOKEN_BUDGET_GPU)
        self._stepper = Stepper(runner, token_budget=budget, together=batches)
        self._speeds = speeds or Speeds(0.0, 0.0)
        self._torch_threads = torch.get_num_threads()
        self._rate = _Rate(clock)
        self._streams: dict[Session, _Stream] = {}  # of the runs in progress; the event loop's alone
        self._loop: Any = None  # the one event loop that all runs in progress share
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Literal["join", "leave"], Session]] = deque()
        self._sleeping = False
        self._closing = False
        self._down = ""  # why the thread ended, once it has
        self._closers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._thread = threading.Thread(target=self._work, name="gridmill-compute", daemon=True)
        self._thread.start()

    @property
    def served(self) -> Served:
        return self._served

    async def run(self, work: Generate, emit: Emit) -> None:
        """See base.Engine. A Refused or an already complete work is answered before the first wait."""
        admitted = self._admit(work)
        if not isinstance(admitted, _Stream):
            await emit(admitted)
            return
        stream, session = admitted, admitted.session
        try:
            while True:
                if not stream.ids and stream.end is None and not stream.paused:
                    stream.wake = self._loop.create_future()
                    await stream.wake
                if stream.ids:
                    ids, stream.ids = stream.ids, []
                    logprobs, stream.logprobs = stream.logprobs, []
                    await emit(Tokens(tuple(ids), tuple(logprobs) if logprobs else None))
                    session.accepted += len(ids)
                    if self._sleeping:  # it may be this reader that the thread waits for
                        self._wake_thread()
                elif stream.end is not None:
                    await emit(stream.end)
                    return
                if stream.paused:  # after the ids that came before
                    stream.paused = False
                    await emit(Paused())
        finally:
            del self._streams[session]
            if stream.end is None:
                self._send("leave", session)

    def speeds(self) -> tuple[float, float]:
        """(decode, prefill) tokens per second of one stream alone, measured at load; zeros when they were not."""
        return self._speeds.decode_tokens_per_second, self._speeds.prefill_tokens_per_second

    def telemetry(self) -> Telemetry:
        sessions = tuple(self._stepper.sessions)
        running = sum(session.table is not None for session in sessions)
        return Telemetry(
            running=running,
            waiting=len(sessions) - running + sum(kind == "join" for kind, _ in tuple(self._inbox)),
            kv_pages_used=self._stepper.pages.held,
            kv_pages_total=self._stepper.pages.total,
            tokens_per_second=self._rate.per_second(),
            memory_bytes=_memory_bytes(self._device),
        )

    async def close(self) -> None:
        with self._changed:
            self._closing = True
            ended = asyncio.get_running_loop().create_future()
            if self._down:
                ended.set_result(None)
            else:
                self._closers.append((asyncio.get_running_loop(), ended))
            self._changed.notify()
        await ended
        self._thread.join()  # it has said its last word, so this waits for no computation

    # ------------------------------------------------------------ the event loop's side

    def _admit(self, work: Generate) -> _Stream | Finished | Refused:
        if self._down or self._closing:
            return Refused("node", "engine_down", self._down or "the engine is closing")
        refused = refusal(work, self._served)
        if refused is not None:
            return refused
        prompt, delivered = unpack_ids(work.prompt), unpack_ids(work.delivered)
        reason = already_ended(work, self._served, len(prompt), delivered)
        if reason is not None:
            return Finished("stop" if reason == "stop" else "length")
        output_tokens_max = output_limit(work, self._served, len(prompt))
        pages = self._stepper.pages
        if pages.pages_for(len(prompt) + output_tokens_max - 1) > pages.total:
            # Cutting the answer short here would make its ids depend on this machine's memory, so another one must try.
            room = pages.total * pages.page_tokens
            sentence = (
                f"prompt and answer may be {len(prompt) + output_tokens_max} tokens; this node has room for {room}"
            )
            return Refused("node", "kv_too_small", sentence)
        if len(self._streams) >= self.slots:
            return Refused("node", "busy", f"all {self.slots} slots of this node are taken")
        loop = asyncio.get_running_loop()
        if self._streams and loop is not self._loop:
            raise RuntimeError("the runs of one engine must share an event loop")
        self._loop = loop
        stream = _Stream(self._session(work, prompt, delivered, output_tokens_max))
        self._streams[stream.session] = stream
        self._send("join", stream.session)
        return stream

    def _session(self, work: Generate, prompt: list[int], delivered: list[int], output_tokens_max: int) -> Session:
        facts = self._served.facts
        end_ids = set(work.sampling.stop_token_ids)
        if not work.sampling.ignore_eos:
            end_ids.update(facts.eos_token_ids)

        def make_state() -> SamplingState:  # by the compute thread: on a GPU it allocates there
            return SamplingState(
                work.sampling, prompt, delivered, facts.eos_token_ids, self._runner.vocab_size, self._device
            )

        return Session(
            salt=work.cache_salt,
            known=prompt + delivered,
            prompt_tokens=len(prompt),
            output_tokens_max=output_tokens_max,
            end_ids=frozenset(end_ids),
            make_state=make_state,
        )

    def _deliver(self, batch: list[Made]) -> None:
        """On the event loop: hands what a step produced to the runs. Runs that were cancelled meanwhile are gone."""
        for session, token_id, logprob, end, paused in batch:
            stream = self._streams.get(session)
            if stream is None:
                continue
            stream.paused = stream.paused or paused
            if token_id is not None:
                stream.ids.append(token_id)
                if logprob is not None:
                    stream.logprobs.append(logprob)
            if end is not None:
                stream.end = end
            if stream.wake is not None and not stream.wake.done():
                stream.wake.set_result(None)

    def _send(self, kind: Literal["join", "leave"], session: Session) -> None:
        with self._changed:
            self._inbox.append((kind, session))
            self._changed.notify()

    def _wake_thread(self) -> None:
        with self._changed:
            self._changed.notify()

    # ------------------------------------------------------------ the compute thread's side

    def _work(self) -> None:
        failure = Failed("engine_closed", "the engine was closed while this work ran")
        try:
            # OpenMP keeps this per thread: without it, a new thread computes with every core there is, and 40 times
            # slower where others use them too. torch takes the number over when it is first asked for it.
            torch.set_num_threads(self._torch_threads)
            torch.get_num_threads()
            while self._take_inbox():
                made = self._stepper.step()
                if made:
                    self._rate.add(sum(one.token_id is not None for one in made))
                    self._post(made)
        except BaseException as error:  # noqa: BLE001 - nobody waits for this thread: each run hears of it instead
            failure = Failed("engine_down", f"the engine stopped: {describe(error)}")
        with self._changed:  # from here on nothing can join
            self._down = failure.detail
            strangers = [session for kind, session in self._inbox if kind == "join"]
            self._inbox.clear()
            closers = self._closers
        self._post([*self._stepper.end_all(failure), *(Made(session, None, None, failure) for session in strangers)])
        self._runner.close()
        for loop, ended in closers:
            _call(loop, _resolve, ended)

    def _take_inbox(self) -> bool:
        """Waits until there is something to compute, lets sessions in and out. False when the engine closes."""
        stepper = self._stepper
        with self._changed:
            # Set before the last look at the readers, who look at it after they have taken something.
            self._sleeping = True
            while not (self._inbox or self._closing or stepper.can_run()):
                self._changed.wait()
            self._sleeping = False
            inbox = list(self._inbox)
            self._inbox.clear()
        for kind, session in inbox:
            if kind == "join":
                stepper.join(session)
            else:
                stepper.leave(session)
        return not self._closing

    def _post(self, made: list[Made]) -> None:
        if made and not _call(self._loop, self._deliver, made):
            for session, *_ in made:
                self._stepper.leave(session)


def load_native(
    folder: Path,
    name: str,
    model_class: ModelClass,
    facts: TextFacts,
    files: Mapping[str, bytes],
    *,
    dtype: str = "auto",
    device: str = "auto",
    exact: bool = False,
    kv_bytes: int | None = None,
    slots: int = SLOTS,
    token_budget: int | None = None,
    trust_remote_code: bool = False,
    findings: Findings | None = None,
    progress: Callable[[str, float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> NativeEngine:
    """Tests the family on a tiny twin, loads the model, measures its speed, and starts serving it.

    Blocks for seconds to minutes: call it from a thread. The number of torch's threads in that thread is the engine's.
    `findings` saves the test where its result is known. Raises slice.ModelUnsupported.
    """
    if findings is None:
        findings = admission_test(read_config(folder, trust_remote_code=trust_remote_code), exact=exact)
    if not findings.faithful:
        reasons = " ".join(findings.details)
        raise ModelUnsupported(f"the native engine does not compute this family as transformers does. {reasons}")
    notes = list(findings.details)
    if not findings.batches:
        notes.append("This model is served one request at a time: its rows do not compute together as they do alone.")
    runner = Runner(
        folder,
        dtype=dtype,
        device=device,
        exact=exact,
        kv_bytes=kv_bytes,
        kv_tokens_useful=slots * facts.context_tokens,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if exact and not (findings.exact and runner.exact_holds):
        # The class would promise what this machine does not keep.
        runner.close()
        raise ExactNotHeld("exact mode does not hold on this machine: batched and alone differ in their last bits")
    if runner.pages * runner.page_tokens < facts.context_tokens:
        room = runner.pages * runner.page_tokens
        notes.append(f"The KV memory holds {room} tokens, less than the context of {facts.context_tokens}.")
    speeds = measure_speeds(runner, context_tokens=facts.context_tokens, clock=clock)
    return NativeEngine(
        Served(name, model_class, facts, dict(files)),
        runner,
        slots=slots,
        token_budget=token_budget,
        batches=findings.batches,
        speeds=speeds,
        notes=notes,
        clock=clock,
    )


def measure_speeds(
    runner: Runner, *, context_tokens: int, clock: Callable[[], float], prefill_tokens: int = 128
) -> Speeds:
    """Warms the kernels up and times one prompt and a few ids of one stream. Writes to the first pages of the pool."""
    room = min(runner.pages * runner.page_tokens, context_tokens)
    tokens = max(1, min(prefill_tokens, room - WARM_UP_DECODE_STEPS))
    steps = min(WARM_UP_DECODE_STEPS, room - tokens)
    pages = list(range(-(-(tokens + steps) // runner.page_tokens)))
    ids = [index % runner.vocab_size for index in range(tokens)]
    best_prefill = best_decode = math.inf
    for _ in range(2):  # the first time includes whatever the kernels prepare once
        start = clock()
        runner.forward([Row(0, pages, ids, None, 1)]).argmax().item()  # .item() waits for the device
        best_prefill = min(best_prefill, clock() - start)
    for step in range(steps):
        start = clock()
        runner.forward([Row(tokens + step, pages, [0], None, 1)]).argmax().item()
        best_decode = min(best_decode, clock() - start)
    return Speeds(1.0 / best_decode if best_decode > 0 else 0.0, tokens / best_prefill if best_prefill > 0 else 0.0)


class _Rate:
    """Ids per second over about the last RATE_SECONDS, idle time included. One writer; readers may be elsewhere."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._state = (clock(), 0.0)

    def add(self, count: int) -> None:
        now = self._clock()
        self._state = (now, self.per_second(now) + count / RATE_SECONDS)

    def per_second(self, now: float | None = None) -> float:
        then, rate = self._state
        return rate * math.exp((then - (self._clock() if now is None else now)) / RATE_SECONDS)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: Any) -> bool:
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        return False  # the loop was closed, and with it went everybody who waited
    return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
