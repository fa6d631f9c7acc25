"""One text worker as seen from the network: a child process that takes one question and gives one answer, or dies.

Its death is an answer too: `ProcessDied` says of what. A worker ends itself when its time is up (`text_worker`); this
side kills only one that cannot, that says more than it was asked, or that closes its pipe.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, cast

import msgspec

from gridmill.network.text_messages import EXIT_MEMORY, REPLY_HEADER, Ready, Reply

START_SECONDS = 20.0  # importing takes 0.2 s; a machine that needs this long is drowning
GRACE_SECONDS = 0.25  # past its limit, before we do for a worker what it could not do itself

Cause = Literal["time", "memory", "crash", "killed", "closed"]


class ProcessDied(Exception):
    """`killed` by someone outside (an operator, the kernel's out-of-memory killer), `closed` by us."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


class StartFailed(Exception):
    """No worker could be started; nothing is left of the attempt."""


class TextProcess(asyncio.SubprocessProtocol):
    """One child process: one question at a time, one answer or its death.

    A raw protocol, because two StreamReader awaits an answer cost more than the answer.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.loaded: OrderedDict[str, None] = OrderedDict()  # class ids, least recently used first
        self.leased_as_slow = False
        self.dead = False
        self.busy = False
        self.on_idle: Callable[[], None] | None = None
        self._loop = loop
        self._ready: asyncio.Future[None] = loop.create_future()
        self._answer: asyncio.Future[Reply] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = bytearray()
        self._reply_bytes_max = 64
        self._kill_cause: Cause | None = None
        self._transport: asyncio.SubprocessTransport | None = None
        self._stdin: asyncio.WriteTransport | None = None

    async def start(self, memory_bytes: int) -> None:
        """Returns when the worker takes questions. Raises StartFailed."""
        try:
            await self._loop.subprocess_exec(
                lambda: self,
                *(sys.executable, "-P", "-s", "-m", "gridmill.network.text_worker", str(memory_bytes)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # what strangers' code writes there is not for our log
                env=_environment(),
            )
        except OSError as error:
            raise StartFailed(f"a text worker cannot be started: {error}") from error
        timer = self._loop.call_later(START_SECONDS, self.kill, "time")
        try:
            await self._ready
        except ProcessDied as death:
            await self.gone
            raise StartFailed(f"a text worker ended while starting ({death.cause})") from death
        finally:
            timer.cancel()

    def ask(self, body: bytes, seconds: float, reply_bytes_max: int) -> asyncio.Future[Reply]:
        """Raises ProcessDied (through the future) when the worker ends instead of answering."""
        assert not self.busy, "a worker takes one question at a time"
        answer: asyncio.Future[Reply] = self._loop.create_future()
        if self.dead:
            answer.set_exception(ProcessDied(self._kill_cause or "killed"))
            return answer
        self.busy = True
        self._answer = answer
        self._reply_bytes_max = reply_bytes_max
        self._timer = self._loop.call_later(seconds + GRACE_SECONDS, self.kill, "time")
        assert self._stdin is not None, "a worker is asked after it has started"
        self._stdin.write(body)
        return answer

    @property
    def pid(self) -> int | None:
        return None if self._transport is None else self._transport.get_pid()

    def kill(self, cause: Cause) -> None:
        if self.dead or self._kill_cause is not None:
            return
        self._kill_cause = cause
        if self._transport is not None:
            _kill(self._transport)

    # ------------------------------------------------------------ what the event loop says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # cast, since uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.SubprocessTransport, transport)
        self._stdin = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))
        if self._kill_cause is not None:
            _kill(self._transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self.dead or self._kill_cause is not None:
            return
        buffer = self._buffer
        buffer += data
        if len(buffer) < REPLY_HEADER.size:
            return
        (length,) = REPLY_HEADER.unpack_from(buffer)
        if length > self._reply_bytes_max or len(buffer) > REPLY_HEADER.size + length:
            self.kill("crash")  # more than was asked for: it is no longer our worker that speaks
            return
        if len(buffer) < REPLY_HEADER.size + length:
            return
        body = bytes(memoryview(buffer)[REPLY_HEADER.size :])
        self._buffer = bytearray()
        try:
            reply = _REPLY_DECODER.decode(body)
        except (ValueError, RecursionError):
            self.kill("crash")
            return
        self._reply_bytes_max = 0  # nothing was asked
        if isinstance(reply, Ready):
            if not self._ready.done():
                self._ready.set_result(None)
            return
        self._finish_question(reply)

    def pipe_connection_lost(self, fd: int, error: Exception | None) -> None:
        # A worker that closed its pipe can never answer again. Mostly it is simply gone, and its exit status follows.
        if fd == 1 and not self.dead:
            self._loop.call_later(GRACE_SECONDS, self.kill, "crash")

    def process_exited(self) -> None:
        assert self._transport is not None, "a process that exits was connected"
        self.dead = True
        death = ProcessDied(self._kill_cause or _cause_of(self._transport.get_returncode()))
        if not self._ready.done():
            self._ready.set_exception(death)
        self._finish_question(death)
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set_result(None)

    def _finish_question(self, outcome: Reply | ProcessDied) -> None:
        answer, self._answer, self.busy = self._answer, None, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if answer is not None and not answer.done():
            if isinstance(outcome, ProcessDied):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        if self.on_idle is not None:
            on_idle, self.on_idle = self.on_idle, None
            on_idle()


_REPLY_DECODER: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def _kill(transport: asyncio.SubprocessTransport) -> None:
    try:
        transport.kill()
    except ProcessLookupError:
        pass  # it ended by itself and the loop has yet to say so


def _cause_of(returncode: int | None) -> Cause:
    match returncode:
        case code if code in (-signal.SIGALRM, -signal.SIGXCPU):
            return "time"
        case code if code in (EXIT_MEMORY, -signal.SIGABRT):  # Rust aborts where Python raises MemoryError
            return "memory"
        case code if code in (-signal.SIGKILL, -signal.SIGTERM):
            return "killed"
        case _:
            return "crash"


def _environment() -> dict[str, str]:
    """Nothing of ours leaks in: only where the code lies, and one thread."""
    return {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }
