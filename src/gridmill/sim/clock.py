"""An event loop whose time is a number, and programs in it that can be stopped and killed.

1. Time stands still while anything can run and then jumps to the next timer, so a quiet hour costs nothing and every
   run of a seed is the same run.
2. Each program (`Program`) is a context that its tasks and timers inherit. SIGSTOP keeps what is due for later; kill -9
   drops it: no `finally` of a killed program ever runs in the world it has left.
3. No threads: whoever asks for one is told so at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TURNS_WITHOUT_TIME_MAX = 200_000  # a loop that turns so often in one moment spins for ever
PURE = ("Desk._write_down.<locals>.verify",)  # computes and touches nothing: a thread and a moment are the same
TIMERS_CANCELLED_MAX = 500  # more are swept out, if they are the greater part


class Standstill(Exception):
    """Nothing can run and no timer is set, or everything runs and time does not pass."""


class NoThreads(Exception):
    """Somebody wanted a thread, whose turns no seed decides."""


class Program:
    """What one operating-system process would be. `spawn` starts its tasks; all that they start belongs to it."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.stopped = False
        self.killed = False
        self._loop = loop
        self._deferred: list[asyncio.Handle] = []
        self._remains: list[object] = []  # what must not be collected, and so run its `finally`, while the seed runs
        self.context = contextvars.Context()
        self.context.run(_PROGRAM.set, self)

    def spawn(self, body: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        task = self._loop.create_task(body, name=name or self.name, context=self.context.copy())
        task.add_done_callback(self._loop.note_failure)
        return task

    @staticmethod
    def of(handle: asyncio.Handle) -> Program | None:
        """Whose something is that waits to be run."""
        return handle._context.get(_PROGRAM)  # type: ignore[attr-defined, no-any-return]

    def run(self, action: Callable[[], T]) -> T:
        """Calls a function as this program would."""
        return self.context.copy().run(action)

    def stop(self) -> None:
        """SIGSTOP: nothing of it runs until `go_on`."""
        if not self.killed:
            self.stopped = True
            self._loop.halted.add(self)

    def go_on(self) -> None:
        """SIGCONT: what was due meanwhile is done now, in its order."""
        if self.stopped and not self.killed:
            self.stopped = False
            self._loop.halted.discard(self)
            self._loop.run_late(self._deferred)
            self._deferred = []

    def kill(self) -> None:
        """kill -9: nothing of it ever runs again."""
        self.killed = True
        self.stopped = False
        self._loop.halted.add(self)
        self._remains += self._deferred
        self._remains += self.tasks()
        self._deferred.clear()

    def keep(self, handle: asyncio.Handle) -> None:
        """Something of it is due while it cannot run."""
        (self._remains if self.killed else self._deferred).append(handle)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """All that are not done, the oldest first."""
        every = [task for task in asyncio.all_tasks(self._loop) if getattr(task, "program", None) is self]
        return sorted(every, key=hash)

    async def bury(self) -> None:
        """After the run, from outside: its tasks end like those of a program whose world is gone."""
        self.go_on()
        self.killed = False
        self._loop.halted.discard(self)
        # A task that was about to be woken when the program died can only be cancelled by waking it.
        self._loop.run_late([h for h in self._remains if type(h) is asyncio.Handle])
        tasks = self.tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=60.0)
            for task in tasks:
                assert task.done(), f"{task} does not end"
                task.cancelled() or task.exception()
        self._remains.clear()


_PROGRAM: contextvars.ContextVar[Program | None] = contextvars.ContextVar("program", default=None)


def current_program() -> Program | None:
    """Whose turn it is; None for the world itself."""
    return _PROGRAM.get()


class _NumberedTask(asyncio.Task[T]):
    """Sets of tasks are iterated in the order of their hashes, which must not be where they lie in memory."""

    def __init__(self, body: Any, *, loop: VirtualLoop, context: contextvars.Context | None = None, **options: Any):
        self.number = loop.next_number()  # first: the loop's own list of tasks asks for the hash
        self.program = _PROGRAM.get() if context is None else context.get(_PROGRAM)
        super().__init__(body, loop=loop, context=context, **options)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """One thread, no sockets, virtual time that begins at `start` seconds."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[Any]
    _timer_cancelled_count: int

    def __init__(self, start: float = 1000.0) -> None:
        super().__init__()
        self._now = start
        self._turns = 0
        self._tasks_made = 0
        self.halted: set[Program] = set()
        self.world = contextvars.Context()  # of whatever belongs to no program, such as bytes on their way
        self.problems: list[str] = []  # what nobody caught
        self.set_task_factory(_numbered)
        self.set_exception_handler(_note_problem)

    def time(self) -> float:
        return self._now

    def next_number(self) -> int:
        self._tasks_made += 1
        return self._tasks_made

    def note_failure(self, task: asyncio.Task[Any]) -> None:
        """A program's own task ended: no exception may come out of it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.problems.append(f"{task.get_name()} failed: {_first(error)!r}")

    def run_late(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        if self._timer_cancelled_count > TIMERS_CANCELLED_MAX and 2 * self._timer_cancelled_count > len(scheduled):
            self._sweep()
            scheduled = self._scheduled
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False
        if ready:
            self._turns += 1
            if self._turns > TURNS_WITHOUT_TIME_MAX:
                raise Standstill(f"the loop turns without end at {self._now:.6f}: {list(ready)[:3]}")
        elif scheduled:
            self._now = max(self._now, scheduled[0]._when)
            self._turns = 0
        else:
            raise Standstill(f"nothing can run any more at {self._now:.6f}")
        now = self._now
        while scheduled and scheduled[0]._when <= now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if timer._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(timer)
        # This is where a simulation spends its time, so what Handle._run and a look at the program do is written out.
        halted = self.halted
        for _ in range(len(ready)):
            handle: Any = ready.popleft()
            if handle._cancelled:
                continue
            if halted:
                program = handle._context.get(_PROGRAM)
                if program in halted:
                    program.keep(handle)
                    continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - it came out of a callback: nobody else can hear of it
                self.call_exception_handler({"message": f"in {handle!r}", "exception": error})

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _sweep(self) -> None:
        kept = []
        for timer in self._scheduled:
            if timer._cancelled:
                timer._scheduled = False
            else:
                kept.append(timer)
        heapq.heapify(kept)
        self._scheduled = kept
        self._timer_cancelled_count = 0

    def timers(self) -> list[asyncio.TimerHandle]:
        """All that are set and not cancelled."""
        return [timer for timer in self._scheduled if not timer._cancelled]

    # ------------------------------------------------------------ what a loop without threads and sockets refuses

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        inner = func.args[0] if isinstance(func, functools.partial) and func.args else func  # what to_thread was given
        name = getattr(inner, "__qualname__", str(inner))
        if name not in PURE:
            raise NoThreads(f"{name} wants to run in a thread")
        done = self.create_future()
        done.set_result(func(*args))
        return done

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        raise NoThreads("somebody calls from another thread")

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""


def _numbered(loop: asyncio.AbstractEventLoop, body: Any, **options: Any) -> Any:
    assert isinstance(loop, VirtualLoop)
    return _NumberedTask(body, loop=loop, **options)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _note_problem(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    error = context.get("exception")
    loop.problems.append(f"{context.get('message')}: {error!r}" if error is not None else str(context.get("message")))


def run_virtually(body: Callable[[VirtualLoop], Coroutine[Any, Any, T]], *, start: float = 1000.0) -> T:
    """Runs `body(loop)` to its end in virtual time. Raises Standstill, and whatever it raises."""
    loop = VirtualLoop(start)
    threads = threading.active_count()
    try:
        return loop.run_until_complete(body(loop))
    finally:
        assert threading.active_count() == threads, "a thread was started inside the simulation"
        loop.close()
