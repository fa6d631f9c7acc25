"""How a work ends otherwise than well, and whose fault that was.

    Fault
    ├── CallerFault   4xx: the request can run nowhere; say which parameter and what to do
    ├── NodeFault     nodes broke their promise, and no other could go on
    └── NoRoom        429/503 with Retry-After: nobody serves this class now, or all queues are full

`Enough` is no fault: `emit` raises it when the answer is complete.
"""

from __future__ import annotations

from typing import Literal

RETRY_AFTER_STOPPING_SECONDS = 10.0  # a network that restarts is back by then


class Fault(Exception):
    """Base of all endings that are somebody's fault."""


class CallerFault(Fault):
    """The request can run nowhere. Becomes the given 4xx."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


class NodeFault(Fault):
    """A node failed a work, and no other could go on with it."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class NoRoom(Fault):
    """Not now. `no_node`: nobody serves the class; `overloaded`: nodes and queue are full, or the wait was too long."""

    def __init__(
        self, code: Literal["no_node", "overloaded", "stopping"], detail: str, retry_after_seconds: float
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


def stopping() -> NoRoom:
    return NoRoom("stopping", "this network is shutting down: try again shortly", RETRY_AFTER_STOPPING_SECONDS)


class Enough(Exception):
    """Raised by `emit`: the answer is complete after `keep` of the ids emitted (a stop string was found)."""

    def __init__(self, keep: int) -> None:
        super().__init__(keep)
        self.keep = keep
