"""Progress is a bar for people and a few lines for logs."""

from __future__ import annotations

import io
import logging

import pytest

from gridmill.node.progress import ProgressBar


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_terminal_gets_a_bar_that_ends_full_and_leaves_its_line() -> None:
    out, clock = io.StringIO(), Clock()
    bar = ProgressBar(out, bar=True, now=clock)
    for done in range(101):
        bar("downloading x", done * 10**7, 10**9)
        clock.seconds += 0.05
    bar.close()
    frames = out.getvalue().split("\r")
    assert 30 <= len(frames) <= 60, "redrawn about ten times a second, not at every call"
    assert frames[-1].startswith("[########################] downloading x: 100%  1.00 of 1.00 GB")
    assert out.getvalue().endswith("\n") and "200 MB/s" in frames[-1]


def test_a_log_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    out, clock = io.StringIO(), Clock()
    bar = ProgressBar(out, bar=False, now=clock)
    with caplog.at_level(logging.INFO, logger="gridmill.node"):
        for done in range(101):
            bar("checking files", done * 10**7, 10**9)
            clock.seconds += 1
    assert out.getvalue() == ""
    assert 5 <= len(caplog.records) <= 7


def test_what_is_over_in_a_moment_is_not_shown() -> None:
    out = io.StringIO()
    bar = ProgressBar(out, bar=True, now=Clock())
    bar("checking files", 4_000_000, 4_000_000)
    bar.close()
    assert out.getvalue() == ""


def test_two_things_have_a_line_each() -> None:
    out, clock = io.StringIO(), Clock()
    bar = ProgressBar(out, bar=True, now=clock)
    bar("checking files", 10**9, 10**9)
    bar.fraction("loading", 1.0)
    bar.close()
    first, second, end = out.getvalue().split("\n")
    assert "checking files" in first and "loading: 100%" in second and end == ""
