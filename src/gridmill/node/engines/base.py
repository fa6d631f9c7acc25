"""The promise of an engine: one method that turns one Work into events.

Exactly one of Finished, Failed or Refused is the last event of a `run` that returns. A `run` that is cancelled from
outside stops the work within one step, frees what it held, and emits nothing more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

import msgspec

from gridmill.wire.classes import ModelClass, TextFacts
from gridmill.wire.messages import Generate, Telemetry
from gridmill.wire.sampling import TokenLogprob


class Tokens(msgspec.Struct, frozen=True):
    """Output ids in order, the end-of-sequence or stop id included. `logprobs` is parallel to `ids` when asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


class Log(msgspec.Struct, frozen=True):
    """A line for the node's own log. Never holds prompt or output text."""

    line: str


class Artifact(msgspec.Struct, frozen=True):
    """A file that a job produced; chat works have none."""

    name: str
    sha256: str
    size_bytes: int


class Paused(msgspec.Struct, frozen=True):
    """This work lost its place to others and goes on later: its next id may take as long as a first one does."""


class Finished(msgspec.Struct, frozen=True):
    """`stop`: an end-of-sequence or stop id was produced; `length`: `max_tokens` or the context was reached."""

    reason: Literal["stop", "length"]
    cached_tokens: int = 0


class Failed(msgspec.Struct, frozen=True):
    """The engine's fault after it began."""

    code: str
    detail: str


class Refused(msgspec.Struct, frozen=True):
    """Not begun. `caller`: this Work can run nowhere in this class; `node`: try another node."""

    fault: Literal["caller", "node"]
    code: str
    detail: str


Event = Tokens | Paused | Log | Artifact | Finished | Failed | Refused
Emit = Callable[[Event], Awaitable[None]]


class Served(msgspec.Struct, frozen=True):
    """One class that an engine serves, with the bytes of the two text files the network will ask for."""

    name: str
    model_class: ModelClass
    facts: TextFacts
    files: dict[str, bytes]  # sha256 → content (tokenizer.json, text facts)


class Engine(Protocol):
    """Turns one Work into events. Calling `emit` may wait; cancelling `run` must stop the work."""

    kind: str  # "native", "echo", …
    slots: int  # how many `run` calls it serves at once; more are Refused(node, busy)

    @property
    def served(self) -> Served: ...

    async def run(self, work: Generate, emit: Emit) -> None: ...

    def telemetry(self) -> Telemetry: ...

    async def close(self) -> None:
        """Stops every run and frees threads and memory. Safe to call twice."""
        ...
