"""How far a download, a check or a load has come, on stderr: a bar for people, a few log lines for files."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

log = logging.getLogger("gridmill.node")

BAR_CHARS = 24
REFRESH_SECONDS = 0.1
LOG_EVERY_SECONDS = 15.0  # where nobody watches: often enough to see that it is alive, seldom enough to read
QUIET_BYTES = 32 << 20  # less than this is over before a line about it could be read


class ProgressBar:
    """Call it with (what, bytes done, bytes in all), from any one thread at a time; `close` before printing else.

    `now` is a monotonic clock in seconds.
    """

    def __init__(
        self, out: TextIO = sys.stderr, *, bar: bool | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out
        self._bar = out.isatty() if bar is None else bar
        self._now = now
        self._what = ""
        self._began = (0.0, 0)
        self._shown_at = 0.0
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._now()
        if what != self._what:
            self.close()
            self._what, self._began, self._shown_at = what, (now, done), now
        finished = done >= total
        interval = REFRESH_SECONDS if self._bar else LOG_EVERY_SECONDS
        if total < QUIET_BYTES or (now - self._shown_at < interval and not (finished and self._bar)):
            return
        self._shown_at = now
        then, before = self._began
        rate = (done - before) / (now - then) if now > then else 0.0
        share = min(1.0, done / total)
        line = f"{what}: {share:4.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
        if not self._bar:
            log.info("%s", line)
            return
        full = round(BAR_CHARS * share)
        text = f"[{'#' * full}{'.' * (BAR_CHARS - full)}] {line}"
        self._out.write("\r" + text.ljust(self._width))
        self._out.flush()
        self._width = len(text)

    def fraction(self, what: str, share: float) -> None:
        """For work that knows only how much of it is done, such as loading: a bar without bytes."""
        now = self._now()
        if not self._bar or (now - self._shown_at < REFRESH_SECONDS and share < 1.0):
            return
        if what != self._what:
            self.close()
            self._what = what
        self._shown_at = now
        full = round(BAR_CHARS * min(1.0, share))
        text = f"[{'#' * full}{'.' * (BAR_CHARS - full)}] {what}: {share:4.0%}"
        self._out.write("\r" + text.ljust(self._width))
        self._out.flush()
        self._width = len(text)

    def close(self) -> None:
        """Leaves the line, so that whatever is printed next begins its own."""
        if self._width:
            self._out.write("\n")
            self._out.flush()
            self._width = 0
