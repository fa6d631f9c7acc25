"""Seeds of the whole network: real programs, fake lines and clocks, faults at any moment, and then every check.

`make sim SEEDS=1000 FROM=0` plays more of them. A seed that fails says how to see it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gridmill.sim.__main__ import complaint, play_many, shrink
from gridmill.sim.faults import Fault
from gridmill.sim.nodes import SimNode
from gridmill.sim.seed import _Scene, play
from gridmill.sim.world import World

NAMED = sorted((Path(__file__).parent / "seeds").glob("*.txt"))
SEEDS_QUICK = 100
SEEDS_SOAK = 10_000


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_wrong_after_any_of_many_seeds(part: int) -> None:
    reports = [play(seed) for seed in range(part, SEEDS_QUICK, 4)]
    wrong = [complaint(report) for report in reports if report.problems]
    assert not wrong, "\n".join(wrong)
    # A simulation in which nothing happens proves nothing.
    assert sum(report.moves for report in reports) >= 1
    assert {"stop", "length", "left", "overloaded"} <= {end for report in reports for end in report.ends}


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.stem)
def test_what_was_found_once_stays_away(path: Path) -> None:
    report = play(int(path.read_text().split()[0]))
    assert not report.problems, complaint(report)


def test_a_quiet_fleet_answers_everything_at_the_price_that_it_named() -> None:
    for seed in range(12):
        report = play(seed, with_faults=False)
        assert not report.problems, complaint(report)
        assert set(report.ends) <= {"stop", "length", "left", "overloaded", "insufficient"} and report.moves == 0


def test_a_seed_is_the_same_run_every_time_and_everywhere() -> None:
    program = "import logging; logging.disable(50)\nfrom gridmill.sim.seed import play\nprint(play(2).digest)"
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        told = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
        digests.add(told.stdout.decode().strip())
    assert digests == {play(2).digest}


@pytest.mark.soak
def test_nothing_is_wrong_after_ten_thousand_seeds() -> None:
    assert play_many(range(SEEDS_SOAK)) == 0


def test_a_failing_seed_is_shrunk_to_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def to_node(self: Fault, world: World, node: SimNode) -> None:
        if self.kind in ("kill", "cut", "hang"):
            world.loop.problems.append("a bug that only these show")

    monkeypatch.setattr(Fault, "_to_node", to_node)
    monkeypatch.setattr(_Scene, "_arrivals", lambda self: [0.5, 1.0, 2.0])
    reports = (play(seed) for seed in range(100))
    found = next(report for report in reports if report.problems and len(report.faults) > 1)
    assert shrink(found.seed) == 1
    told = capsys.readouterr().out
    assert told.count("fault at") == 1 and "asked" not in told and "WRONG: a bug that only these show" in told
