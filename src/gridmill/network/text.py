"""Text on the network side: chat template and tokeniser in worker processes, and the table that turns ids into text.

Three rules. What strangers wrote (tokenizer.json, chat templates) runs only in `text_worker` processes, never here. A
breach of their limits is a named error for the one call that caused it; every other call goes on with a fresh worker.
One class that is slow or breaches again and again cannot keep the others waiting.
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from gridmill.network.detokenise import ClassText, TextStream
from gridmill.network.text_messages import (
    DETAIL_CHARACTERS_MAX,
    Encode,
    EncodeChat,
    Ids,
    Load,
    Loaded,
    Problem,
    Reply,
    Table,
    request_frame,
)
from gridmill.network.text_process import ProcessDied, StartFailed, TextProcess
from gridmill.wire.classes import TOKENIZER_BYTES_MAX, TextFacts, facts_bytes

__all__ = ["ClassText", "TextBreach", "TextError", "TextService", "TextStream"]

# Four classes with the largest public vocabularies (262 000 entries, 190 MB each when measured), the peak of loading a
# fifth, and 300 MB for encoding a 2 MB prompt.
MEMORY_BYTES = 2 << 30
CLASSES_PER_WORKER = 4
LOAD_SECONDS = 30.0  # 262 000 ids load and are described in 1.5 s of processor time; this is for a machine that drowns
PROMPT_BYTES_MAX = 8 << 20  # two million tokens of English
REPLY_BYTES_MAX = 64 << 20  # ids of the longest text a worker may render, one each four bytes, with room
TABLE_BYTES_MAX = 192 << 20  # every token of the largest tokenizer.json three times over
WAITING_CALLS_MAX = 1024  # at 0.2 ms a call, a fifth of a second of work; more means that something is wrong
WAITING_CALLS_PER_CLASS_MAX = 256
WAITING_SECONDS_MAX = 10.0
SLOW_SECONDS = 0.1  # a class whose last call took this long may not occupy the last worker
BREACHES_MAX = 3
CONDUCTS_MAX = 1024  # classes whose breaches are remembered
BREACH_WINDOW_SECONDS = 600.0
BLAMELESS_PROMPT_BYTES = 64 << 10  # a longer prompt that breaches is its caller's doing, and does not count
RESPAWN_DELAY_SECONDS_MAX = 5.0

_T = TypeVar("_T")
_Expected = TypeVar("_Expected", Ids, Loaded, Table)
Fault = Literal["caller", "class", "network"]
Pace = Literal["unknown", "fast", "slow"]  # of a class's last call; an unknown one runs one call at a time


class TextError(Exception):
    """Why a call has no answer: `code` for programs, `detail` one bounded sentence for people, and whose `fault`.

    caller:  template_missing, template_refused (the template's own raise_exception), template_error, encode_failed,
             messages_invalid, prompt_too_long, id_outside_vocabulary
    class:   tokenizer_missing, tokenizer_invalid, tokenizer_unsupported, template_invalid, facts_invalid,
             template_output, and every TextBreach
    network: class_unknown, text_busy (try again), text_closed, text_unavailable
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail

    @property
    def fault(self) -> Fault:
        return _FAULTS.get(self.code, "class")


class TextBreach(TextError):
    """A limit was broken and a worker died of it: text_time, text_memory, text_crash; or class_quarantined."""


_FAULTS: dict[str, Fault] = {
    "template_missing": "caller",
    "template_refused": "caller",
    "template_error": "caller",
    "encode_failed": "caller",
    "messages_invalid": "caller",
    "prompt_too_long": "caller",
    "id_outside_vocabulary": "caller",
    "class_unknown": "network",
    "text_busy": "network",
    "text_closed": "network",
    "text_unavailable": "network",
}


class TextService:
    """A small pool of text workers. `start` before use; `close` leaves no process, task or file descriptor behind.

    `call_timeout_seconds` is the wall limit of one call, `memory_bytes` the address space of one worker. After three
    breaches within ten minutes a class is refused for `quarantine_seconds`. `now_seconds` is what templates see as now.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        call_timeout_seconds: float = 2.0,
        memory_bytes: int = MEMORY_BYTES,
        classes_per_worker: int = CLASSES_PER_WORKER,
        quarantine_seconds: float = 60.0,
        now_seconds: Callable[[], float] = time.time,
    ) -> None:
        if workers < 1 or classes_per_worker < 1:
            raise ValueError("a text service needs at least one worker that holds at least one class")
        self._worker_count = workers
        self._call_seconds = call_timeout_seconds
        self._memory_bytes = memory_bytes
        self._classes_per_worker = classes_per_worker
        self._quarantine_seconds = quarantine_seconds
        self._now_seconds = now_seconds
        self._classes: dict[str, _Class] = {}
        self._conduct: OrderedDict[str, _Conduct] = OrderedDict()  # outlives a `register` that fails, and `forget`
        self._workers: set[TextProcess] = set()
        self._free: list[TextProcess] = []
        self._waiting: deque[_Waiting] = deque()
        self._slow_leases = 0
        self._keepers: list[asyncio.Task[None]] = []
        self._closing = asyncio.Event()

    async def start(self) -> None:
        """Returns when every worker is ready. Raises TextError(text_unavailable) when one cannot start."""
        assert not self._keepers, "started twice"
        loop = asyncio.get_running_loop()
        firsts: list[asyncio.Future[None]] = [loop.create_future() for _ in range(self._worker_count)]
        self._keepers = [asyncio.create_task(self._keep_worker(first), name="text-worker") for first in firsts]
        try:
            outcomes = await asyncio.gather(*firsts, return_exceptions=True)
        except asyncio.CancelledError:
            await self.close()
            raise
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                await self.close()
                raise outcome

    async def close(self) -> None:
        """Ends calls in flight with TextError(text_closed). Safe to call twice."""
        self._closing.set()
        for waiting in self._waiting:
            waiting.refuse(_closed())
        self._waiting.clear()
        for worker in list(self._workers):
            worker.kill("closed")
        await asyncio.gather(*self._keepers)
        self._keepers = []

    async def register(self, class_id: str, tokenizer_path: Path, facts: TextFacts) -> ClassText:
        """Loads a class in every worker and returns what each of its ids prints. Raises TextError on nonsense files.

        The file stays where it is: a worker that starts later reads it again. A class id names its content, so that
        registering one again changes nothing.
        """
        record = _Class(class_id, tokenizer_path, facts, facts_bytes(facts), self._conduct_of(class_id))
        reply = await self._run(record, 0, lambda worker: self._load(worker, record, describe=True))
        text = await asyncio.to_thread(class_text, facts, _expect(reply, Table))
        # No prompt that fits the context can be longer than this, whatever it says.
        record.prompt_bytes_max = min(
            PROMPT_BYTES_MAX, (64 << 10) + facts.context_tokens * max(16, text.longest_token_bytes)
        )
        self._classes[class_id] = record
        for worker in list(self._workers):
            await self._warm(record, worker)
        return text

    def forget(self, class_id: str) -> None:
        """No node offers this class any more. Calls that run finish; workers drop it when they need the room."""
        self._classes.pop(class_id, None)

    async def encode_chat(
        self,
        class_id: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt ids of a conversation: template applied, then encoded as `apply_chat_template(tokenize=True)`."""
        record = self._class(class_id)
        if not record.facts.chat_template:
            raise TextError(
                "template_missing", "this model has no chat template; it completes plain text at /v1/completions"
            )
        request = EncodeChat(
            class_id,
            [dict(message) for message in messages],
            None if tools is None else [dict(tool) for tool in tools],
            add_generation_prompt,
            self._now_seconds(),
        )
        return await self._encode(record, request)

    async def encode(self, class_id: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a plain text."""
        return await self._encode(self._class(class_id), Encode(class_id, text, add_special_tokens))

    # ------------------------------------------------------------ one call

    async def _encode(self, record: _Class, request: EncodeChat | Encode) -> list[int]:
        try:
            body = request_frame(request, self._call_seconds)
        except (UnicodeEncodeError, TypeError, OverflowError, RecursionError, ValueError) as error:
            # Lone surrogates, integers over 64 bits, things that are not JSON: all can only come from the caller.
            raise TextError("messages_invalid", _bounded(f"the text cannot be encoded: {error}")) from error
        if len(body) > record.prompt_bytes_max:
            raise TextError(
                "prompt_too_long", f"the prompt has {len(body)} bytes; this model takes {record.prompt_bytes_max}"
            )
        reply = await self._run(record, len(body), lambda worker: self._ask(worker, record, body))
        return _ids_of(reply, record.facts.vocab_size)

    async def _run(self, record: _Class, prompt_bytes: int, job: Callable[[TextProcess], Awaitable[_T]]) -> _T:
        """Leases a worker for the job and settles what its death means.

        A worker that died of something else than this call is forgiven once: encoding changes nothing, so that asking
        again is harmless.
        """
        loop = asyncio.get_running_loop()
        forgiven = False
        while True:
            record.conduct.raise_if_quarantined(loop.time())
            worker = await self._lease(record)
            try:
                return await job(worker)
            except ProcessDied as death:
                if self._closing.is_set():
                    raise _closed() from death
                alone = worker.loaded.keys() <= {record.class_id}
                if not forgiven and (death.cause == "killed" or (death.cause == "memory" and not alone)):
                    forgiven = True
                    continue
                if prompt_bytes <= BLAMELESS_PROMPT_BYTES:
                    record.conduct.note_breach(loop.time(), self._quarantine_seconds)
                record.pace = "slow"
                raise _breach(death, self._memory_bytes) from death
            finally:
                self._give_back(record, worker)

    async def _ask(self, worker: TextProcess, record: _Class, body: bytes) -> Ids:
        if record.class_id not in worker.loaded:
            _expect(await self._load(worker, record), Loaded)
        worker.loaded.move_to_end(record.class_id)
        loop = asyncio.get_running_loop()
        started = loop.time()
        reply = await worker.ask(body, self._call_seconds, REPLY_BYTES_MAX)
        record.pace = "slow" if loop.time() - started > SLOW_SECONDS else "fast"
        return _expect(reply, Ids)

    async def _load(self, worker: TextProcess, record: _Class, *, describe: bool = False) -> Reply:
        """Answered by Loaded, or by Table when asked to describe. The worker forgets what it used least recently."""
        tokenizer = await asyncio.to_thread(_read_tokenizer, record.tokenizer_path)
        worker.loaded.pop(record.class_id, None)
        while len(worker.loaded) >= self._classes_per_worker:
            worker.loaded.popitem(last=False)
        load = Load(record.class_id, tokenizer, record.facts_bytes, tuple(worker.loaded), describe)
        reply = await worker.ask(request_frame(load, LOAD_SECONDS), LOAD_SECONDS, TABLE_BYTES_MAX)
        if isinstance(reply, Loaded | Table):
            worker.loaded[record.class_id] = None
        return reply

    async def _warm(self, record: _Class, worker: TextProcess) -> None:
        """A kindness to the first caller; where it cannot be done now, that caller's call loads the class."""
        if record.class_id in worker.loaded or worker not in self._workers:
            return
        try:
            await self._lease(record, worker)
        except ProcessDied:
            return  # its successor has nothing loaded either
        except TextError as error:
            if error.code == "text_busy":
                return
            raise
        try:
            _expect(await self._load(worker, record), Loaded)
        except ProcessDied:
            return  # the same
        finally:
            self._give_back(record, worker)

    def _conduct_of(self, class_id: str) -> _Conduct:
        conduct = self._conduct.setdefault(class_id, _Conduct())
        self._conduct.move_to_end(class_id)
        if len(self._conduct) > CONDUCTS_MAX:
            self._conduct.popitem(last=False)
        return conduct

    def _class(self, class_id: str) -> _Class:
        if self._closing.is_set():
            raise _closed()
        record = self._classes.get(class_id)
        if record is None:
            raise TextError("class_unknown", f"no tokenizer is registered for class {class_id[:16]}")
        return record

    # ------------------------------------------------------------ whose turn it is

    async def _lease(self, record: _Class, only: TextProcess | None = None) -> TextProcess:
        """A worker for one call, now or in turn; `only` this one for warming it, which ProcessDied ends."""
        if self._closing.is_set():
            raise _closed()
        worker = self._try_lease(record, only)
        if worker is not None:
            return worker
        if len(self._waiting) >= WAITING_CALLS_MAX or record.waiting >= WAITING_CALLS_PER_CLASS_MAX:
            raise TextError("text_busy", "too many prompts wait to be tokenised; try again in a moment")
        waiting = _Waiting(record, only)
        self._waiting.append(waiting)
        record.waiting += 1
        timer = asyncio.get_running_loop().call_later(
            WAITING_SECONDS_MAX,
            waiting.refuse,
            TextError("text_busy", f"no worker was free for {WAITING_SECONDS_MAX:g} s; try again in a moment"),
        )
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self._give_back(record, waiting.turn.result())
            raise
        finally:
            timer.cancel()
            record.waiting -= 1
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _try_lease(self, record: _Class, only: TextProcess | None = None) -> TextProcess | None:
        candidates = [worker for worker in self._free if not worker.dead and only in (None, worker)]
        if not candidates:
            return None
        worker = next((worker for worker in candidates if record.class_id in worker.loaded), candidates[0])
        slow = record.pace == "slow" or record.class_id not in worker.loaded
        if slow and self._slow_leases >= max(1, self._worker_count - 1):
            return None
        if record.pace == "unknown" and record.running > 0:
            return None
        self._free.remove(worker)
        worker.leased_as_slow = slow
        self._slow_leases += slow
        record.running += 1
        return worker

    def _give_back(self, record: _Class, worker: TextProcess) -> None:
        """Ends a lease. A worker still at work for a caller who left comes back when it has answered."""
        if worker.busy and not worker.dead:
            worker.on_idle = lambda: self._give_back(record, worker)
            return
        self._slow_leases -= worker.leased_as_slow
        worker.leased_as_slow = False
        record.running -= 1
        if not worker.dead:
            self._free.append(worker)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        """First come, first served, except that slow classes leave one worker to the others."""
        if not self._free:
            return
        for waiting in list(self._waiting):
            if waiting.turn.done():
                continue
            worker = self._try_lease(waiting.record, waiting.only)
            if worker is not None:
                self._waiting.remove(waiting)
                waiting.turn.set_result(worker)
                if not self._free:
                    return

    # ------------------------------------------------------------ processes

    async def _keep_worker(self, first: asyncio.Future[None]) -> None:
        """One place in the pool: always a worker in it, until the service closes."""
        delay_seconds = 0.0
        try:
            while not self._closing.is_set():
                worker = TextProcess()
                self._workers.add(worker)
                try:
                    await worker.start(self._memory_bytes)
                    if not first.done():
                        first.set_result(None)
                    delay_seconds = 0.0
                    self._free.append(worker)
                    self._serve_waiting()
                    await worker.gone
                except StartFailed as failure:
                    if not first.done():
                        first.set_exception(TextError("text_unavailable", _bounded(str(failure))))
                        return
                    delay_seconds = min(RESPAWN_DELAY_SECONDS_MAX, 2 * delay_seconds + 0.1)
                finally:
                    self._discard(worker)
                if delay_seconds:
                    await self._closing_within(delay_seconds)
        finally:
            if not first.done():
                first.set_exception(TextError("text_unavailable", "a text worker could not be kept; this is our bug"))

    async def _closing_within(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            pass  # time to try again

    def _discard(self, worker: TextProcess) -> None:
        self._workers.discard(worker)
        if worker in self._free:
            self._free.remove(worker)
        for waiting in self._waiting:
            if waiting.only is worker:
                waiting.refuse(ProcessDied("closed"))


class _Class:
    """What is known of one registered class."""

    def __init__(
        self, class_id: str, tokenizer_path: Path, facts: TextFacts, facts_bytes: bytes, conduct: _Conduct
    ) -> None:
        self.class_id = class_id
        self.tokenizer_path = tokenizer_path
        self.facts = facts
        self.facts_bytes = facts_bytes
        self.prompt_bytes_max = PROMPT_BYTES_MAX
        self.pace: Pace = "unknown"
        self.waiting = 0
        self.running = 0
        self.conduct = conduct


class _Conduct:
    """How often a class broke its limits, and until when it is refused for that."""

    def __init__(self) -> None:
        self.breaches_seconds: deque[float] = deque(maxlen=BREACHES_MAX)
        self.quarantined_until_seconds = 0.0

    def note_breach(self, now: float, quarantine_seconds: float) -> None:
        self.breaches_seconds.append(now)
        if len(self.breaches_seconds) == BREACHES_MAX and now - self.breaches_seconds[0] <= BREACH_WINDOW_SECONDS:
            self.quarantined_until_seconds = now + quarantine_seconds

    def raise_if_quarantined(self, now: float) -> None:
        left = self.quarantined_until_seconds - now
        if left > 0:
            raise TextBreach(
                "class_quarantined",
                f"this model's tokenizer or template broke its limits {BREACHES_MAX} times; try again in {left:.0f} s",
            )


class _Waiting:
    """A call in the queue."""

    def __init__(self, record: _Class, only: TextProcess | None) -> None:
        self.record = record
        self.only = only
        self.turn: asyncio.Future[TextProcess] = asyncio.get_running_loop().create_future()

    def refuse(self, error: Exception) -> None:
        if not self.turn.done():
            self.turn.set_exception(error)


_PAGE_DECODER = msgspec.msgpack.Decoder(list[bytes | None])
_FIRST_DECODER = msgspec.msgpack.Decoder(dict[int, bytes])


def class_text(facts: TextFacts, table: Table) -> ClassText:
    """Takes 0.2 s for the largest vocabularies, page by page, so that other threads get their turns in between."""
    pieces: list[bytes | None] = []
    first: dict[int, bytes] = {}
    try:
        for page in table.pages:
            pieces += _PAGE_DECODER.decode(page)
        for part in table.first:
            first |= _FIRST_DECODER.decode(part)
        return ClassText(
            facts,
            pieces,
            special_ids=table.special_ids,
            first=first,
            strip_character=table.strip_character,
            strip_count=table.strip_count,
        )
    except ValueError as error:
        raise TextError("tokenizer_invalid", _bounded(f"the worker described nonsense: {error}")) from error


def _read_tokenizer(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(TOKENIZER_BYTES_MAX + 1)
    except OSError as error:
        raise TextError("tokenizer_missing", f"the tokenizer file cannot be read: {error.strerror}") from error
    if len(content) > TOKENIZER_BYTES_MAX:
        raise TextError("tokenizer_invalid", f"tokenizer.json is over {TOKENIZER_BYTES_MAX} bytes")
    return content


def _expect(reply: Reply, kind: type[_Expected]) -> _Expected:
    if isinstance(reply, Problem):
        raise TextError(_bounded(reply.code), _bounded(reply.detail))
    if not isinstance(reply, kind):
        raise TextError("tokenizer_invalid", "the worker answered another question")
    return reply


def _ids_of(reply: Ids, vocab_size: int) -> list[int]:
    ids = array("I")
    try:
        ids.frombytes(reply.packed)
    except ValueError as error:
        raise TextError("tokenizer_invalid", "the worker answered with a broken list of ids") from error
    if sys.byteorder == "big":
        ids.byteswap()
    if ids and max(ids) >= vocab_size:
        raise TextError("id_outside_vocabulary", "the text holds a token that this model has no embedding for")
    return ids.tolist()


def _bounded(sentence: str) -> str:
    return sentence[:DETAIL_CHARACTERS_MAX]


def _breach(death: ProcessDied, memory_bytes: int) -> TextBreach:
    match death.cause:
        case "time":
            return TextBreach("text_time", "this model's tokenizer or template broke its time limit")
        case "memory":
            return TextBreach("text_memory", f"this model's tokenizer or template needed over {memory_bytes >> 20} MiB")
        case _:
            return TextBreach("text_crash", "this model's tokenizer or template crashed its worker")


def _closed() -> TextError:
    return TextError("text_closed", "the network is shutting down")
