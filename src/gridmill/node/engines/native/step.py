"""One step of continuous batching: give pages, plan, compute, choose, say what came out.

1. Sessions are kept oldest first. The oldest that can run always progresses, so nothing ever waits in a circle.
2. When pages run out, the youngest session loses its pages and computes them again later; the sampler keeps no state,
   so it goes on with the same ids.
3. An exception is pinned on the sessions that cause it alone; everybody else goes on.

No threads and no clock here: the engine calls `step` from its compute thread, tests call it by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from gridmill.node.engines.base import Failed, Finished
from gridmill.node.engines.native.batch import plan
from gridmill.node.engines.native.pages import Pages, PageTable
from gridmill.node.engines.native.runner import Row
from gridmill.node.engines.native.sampler import Choice, SamplingState, UnusableLogits, choose
from gridmill.wire.sampling import TokenLogprob

AHEAD_TOKENS_MAX = (
    16  # how far a session computes ahead of its reader: enough to hide a busy event loop, little to lose
)
IDLE_STEPS_MAX = 64  # a session whose reader took nothing for so many steps may lose its pages to a younger one
GOOD_STEPS = 64  # after so many steps without running out of memory, a step may be twice as large again
DETAIL_CHARACTERS_MAX = 200


class Forward(Protocol):
    """What a step needs of a Runner."""

    @property
    def page_tokens(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def forward(self, rows: Sequence[Row]) -> Any: ...


@dataclass(slots=True, eq=False)
class Session:
    """One work in the engine. The compute thread owns it; `accepted` alone is written by the reader's side."""

    salt: bytes
    known: list[int]  # prompt ids, then output ids
    prompt_tokens: int
    output_tokens_max: int  # delivered ones included
    end_ids: frozenset[int]
    make_state: Callable[[], SamplingState]
    state: SamplingState | None = None
    table: PageTable | None = None
    computed: int = 0  # how many of `known` have their keys and values in the table's pages
    cached_tokens: int = -1  # prompt ids that were not computed, set when it first gets pages
    made: int = 0  # ids produced here
    accepted: int = 0  # ids that the reader has taken
    idle_steps: int = 0
    starved: bool = False  # its table could not grow in the latest step
    paused: bool = False  # waits for pages, and its reader was told
    row: Row = field(default_factory=lambda: Row(0, (), ()))

    @property
    def waits_for_reader(self) -> bool:
        return self.made - self.accepted >= AHEAD_TOKENS_MAX


class Made(NamedTuple):
    """What one step did for one session: an id, an end, or both; or it took its pages away (`paused`)."""

    session: Session
    token_id: int | None
    logprob: TokenLogprob | None
    end: Finished | Failed | None
    paused: bool = False


class EngineBroken(RuntimeError):
    """Not even a single known id can be computed any more."""


class Stepper:
    """The sessions of one engine and the pages they share."""

    def __init__(self, runner: Forward, *, token_budget: int, together: bool = True) -> None:
        self.sessions: list[Session] = []
        self.pages = Pages(runner.pages, runner.page_tokens)
        self.preemptions = 0
        self._runner = runner
        self._token_budget = token_budget
        self._together = together
        self._tokens_max: int | None = None  # set after memory ran out
        self._good_steps = 0
        self._stillborn: list[Made] = []
        self._paused: list[Made] = []

    def join(self, session: Session) -> None:
        """Takes part from the next step on, as the youngest."""
        try:
            session.state = session.make_state()
        except Exception as error:  # noqa: BLE001 - reported as this session's end, nobody else's
            self._stillborn.append(Made(session, None, None, _failure("sampling_error", error)))
            return
        self.sessions.append(session)

    def leave(self, session: Session) -> None:
        """Frees what it holds. Harmless for a session that has ended."""
        if session in self.sessions:
            self._remove(session)

    def can_run(self) -> bool:
        return bool(self._stillborn) or any(not session.waits_for_reader for session in self.sessions)

    def step(self) -> list[Made]:
        """Computes one batch. Empty when nothing was chosen, which is no reason to stop: prompts come in chunks.

        Raises EngineBroken when the runner fails whatever it is given.
        """
        if self._stillborn:
            made, self._stillborn = self._stillborn, []
            return made
        runnable = self._runnable()
        if not runnable:
            return []
        self._give_pages(runnable)
        pending = [len(session.known) - session.computed if session.table else 0 for session in runnable]
        grants = plan(pending, token_budget=self._token_budget, tokens_max=self._tokens_max, together=self._together)
        batch = self._secure(runnable, grants)
        assert batch, "the oldest session that can run must progress"
        self._tell_who_waits(runnable, batch)
        made = self._compute(batch)
        if self._paused:
            # After the ids of this very step: nobody is in both.
            made = [*made, *self._paused]
            self._paused = []
        return made

    def _tell_who_waits(self, runnable: list[Session], batch: list[tuple[Session, int]]) -> None:
        """A word to the readers of those who wait for pages: those who lost theirs, and those who got none."""
        for session, _ in batch:
            session.paused = False
        for session in runnable:
            if not session.paused and (session.table is None or session.starved):
                session.paused = True
                self._paused.append(Made(session, None, None, None, paused=True))

    # ------------------------------------------------------------ who takes part

    def _runnable(self) -> list[Session]:
        runnable = []
        for session in self.sessions:
            if session.made - session.accepted < AHEAD_TOKENS_MAX:
                session.idle_steps = 0
                runnable.append(session)
            else:
                session.idle_steps += 1
        return runnable if self._together else runnable[:1]

    def _give_pages(self, runnable: list[Session]) -> None:
        """Page tables for sessions without one, oldest first; who does not fit lets nobody younger pass."""
        for session in runnable:
            while session.table is None:
                # One page is left for every older session that holds some, since each will need its next one soon.
                older = sum(other.table is not None for other in self._older_than(session))
                expected = session.prompt_tokens + session.output_tokens_max - len(session.known)
                table = self.pages.open(session.salt, session.known, expected_tokens=expected, leaving=older)
                if table is not None:
                    session.table = table
                    session.computed = table.shared * self.pages.page_tokens
                    if session.cached_tokens < 0:
                        session.cached_tokens = min(session.computed, session.prompt_tokens)
                elif not self._preempt_for(session, first=session is runnable[0]):
                    return

    def _secure(self, runnable: list[Session], grants: list[int]) -> list[tuple[Session, int]]:
        """The sessions whose pages hold what they were granted; younger ones may lose theirs on the way.

        Who has been secured keeps its pages: it is older than whoever is asked next, and its reader is not away.
        """
        batch = []
        for session, grant in zip(runnable, grants, strict=True):
            table = session.table
            if not grant or table is None:
                continue
            needed = session.computed + grant
            if len(table.pages) * self.pages.page_tokens < needed:
                secured = self.pages.grow(table, needed)
                while not secured and self._preempt_for(session, first=session is runnable[0]):
                    secured = self.pages.grow(table, needed)
                if not secured:
                    session.starved = True
                    continue
            session.starved = False
            batch.append((session, grant))
        return batch

    def _preempt_for(self, session: Session, *, first: bool) -> bool:
        """Takes the pages of one other session: of a reader who is away if possible, else of the youngest.

        Only younger sessions lose theirs, and older ones that their reader has left waiting: for long, or while
        `session` is the first that can run at all.
        """
        older = set(self._older_than(session))
        victim: Session | None = None
        for other in self.sessions:
            if other is session or other.table is None:
                continue
            if other in older and not (other.idle_steps > IDLE_STEPS_MAX or (first and other.idle_steps)):
                continue
            if victim is None or other.idle_steps or not victim.idle_steps:
                victim = other  # they come oldest first, so the last one wins among equals
        if victim is None:
            return False
        assert victim.table is not None
        self.pages.close(victim.table)
        victim.table = None
        self.preemptions += 1
        return True

    def _older_than(self, session: Session) -> list[Session]:
        return self.sessions[: self.sessions.index(session)]

    # ------------------------------------------------------------ computing

    def _compute(self, batch: list[tuple[Session, int]]) -> list[Made]:
        try:
            made = self._forward(batch)
        except Exception as error:  # noqa: BLE001 - handled by kind below, and re-raised as EngineBroken if general
            return self._recover(batch, error)
        if self._tokens_max is not None:
            self._good_steps += 1
            if self._good_steps >= GOOD_STEPS:
                self._good_steps = 0
                self._tokens_max *= 2
                if self._tokens_max >= self._token_budget + len(self.sessions):
                    self._tokens_max = None
        return made

    def _forward(self, batch: list[tuple[Session, int]]) -> list[Made]:
        rows = []
        choosing = []
        states: list[SamplingState] = []
        for session, grant in batch:
            table, row, computed = session.table, session.row, session.computed
            assert table is not None
            end = computed + grant
            row.position = computed
            row.pages = table.pages
            row.ids = session.known[computed:end]
            if end == len(session.known):
                row.logits = 1
                assert session.state is not None
                choosing.append(session)
                states.append(session.state)
            else:
                row.logits = 0
            rows.append(row)
        logits = self._runner.forward(rows)
        choices = choose(logits, states) if choosing else []
        for session, grant in batch:
            session.computed += grant
            assert session.table is not None
            if session.computed // self.pages.page_tokens > session.table.remembered:
                self.pages.remember(session.table, session.known, session.computed)
        return [self._take(session, choice) for session, choice in zip(choosing, choices, strict=True)]

    def _take(self, session: Session, choice: Choice | UnusableLogits) -> Made:
        """Appends the chosen id and says whether it is the last."""
        if isinstance(choice, UnusableLogits):
            self._remove(session)
            return Made(session, None, None, Failed("unusable_logits", str(choice)[:DETAIL_CHARACTERS_MAX]))
        token_id = choice.token_id
        session.known.append(token_id)
        session.made += 1
        assert session.state is not None
        try:
            session.state.accept(token_id)
        except Exception as error:  # noqa: BLE001 - reported as this session's end, nobody else's
            self._remove(session)
            return Made(session, None, None, _failure("sampling_error", error))
        end: Finished | None = None
        if token_id in session.end_ids:
            end = Finished("stop", session.cached_tokens)
        elif len(session.known) - session.prompt_tokens >= session.output_tokens_max:
            end = Finished("length", session.cached_tokens)
        if end is not None:
            self._remove(session)
        return Made(session, token_id, choice.logprob, end)

    def _recover(self, batch: list[tuple[Session, int]], error: Exception) -> list[Made]:
        tokens = sum(grant for _, grant in batch)
        if out_of_memory(error) and tokens > 1:
            self._tokens_max = max(1, tokens // 2)
            self._good_steps = 0
            return []
        made: list[Made] = []
        failed = 0
        for session, grant in batch:
            try:
                # Computing the same positions again writes the same keys and values to the same pages.
                made += self._forward([(session, grant)])
            except Exception as alone:  # noqa: BLE001 - reported as this session's end, nobody else's
                failed += 1
                self._remove(session)
                code = "out_of_memory" if out_of_memory(alone) else "compute_error"
                made.append(Made(session, None, None, _failure(code, alone)))
        if failed == len(batch):
            self._probe(made)
        return made

    def _probe(self, made: list[Made]) -> None:
        """Tells works that nobody can compute from a device that computes nothing any more."""
        table = self.pages.open(b"", [0], expected_tokens=0)
        if table is None:
            return  # the others hold all pages; their own failures will bring us here again
        try:
            self._runner.forward([Row(0, table.pages, [0], None, 1)])
        except Exception as error:
            self._stillborn = made
            raise EngineBroken(f"the runner fails whatever it is given: {describe(error)}") from error
        finally:
            self.pages.close(table)

    def _remove(self, session: Session) -> None:
        self.sessions.remove(session)
        if session.table is not None:
            self.pages.close(session.table)
            session.table = None

    def end_all(self, failure: Failed) -> list[Made]:
        """Ends every session, for an engine that closes or broke."""
        made = [*self._stillborn, *(Made(session, None, None, failure) for session in self.sessions)]
        self._stillborn = []
        for session in list(self.sessions):
            self._remove(session)
        return made


def out_of_memory(error: BaseException) -> bool:
    """torch names it differently per device, and on a CPU it is a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "not enough memory" in text)


def describe(error: BaseException) -> str:
    """Kind and first words; the messages of torch and of ourselves hold shapes, never prompts."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:DETAIL_CHARACTERS_MAX]


def _failure(code: str, error: BaseException) -> Failed:
    return Failed(code, describe(error))
