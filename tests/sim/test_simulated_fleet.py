"""`gridmill sim`: what an operator is told about a fleet, in people's words and as JSON."""

from __future__ import annotations

import json

import pytest

from gridmill.cli import main
from gridmill.sim.fleet import Plan, simulate

SMALL = Plan(nodes=6, churn=2.0, seconds=20.0, rate=2.0, seed=3)


def test_a_fleet_under_churn_answers_nearly_everything_and_says_how() -> None:
    told: list[str] = []
    fleet = simulate(SMALL, told.append)
    assert fleet.requests == fleet.answered + fleet.refused + fleet.failed == sum(fleet.ends.values())
    assert fleet.incidents > 0 and fleet.answered > 0.8 * fleet.requests
    assert 0.0 < fleet.ttft_p50_seconds <= fleet.ttft_p95_seconds <= fleet.ttft_p99_seconds
    assert 0.0 < fleet.utilisation < 1.0 and fleet.tokens_per_second > 0.0
    assert len(told) >= 2 and "nodes here" in told[0]
    assert f"{fleet.requests} requests" in fleet.sentences()[0]


def test_another_run_of_the_same_seed_says_the_same_and_another_seed_does_not() -> None:
    first, again = (simulate(SMALL) for _ in range(2))
    assert (first.ends, first.ttft_p95_seconds) == (again.ends, again.ttft_p95_seconds)
    other = simulate(Plan(nodes=6, churn=2.0, seconds=20.0, rate=2.0, seed=4))
    assert first.ttft_p95_seconds != other.ttft_p95_seconds


def test_more_nodes_than_needed_make_no_queue_and_too_few_refuse() -> None:
    idle = simulate(Plan(nodes=12, churn=0.0, seconds=10.0, rate=1.0))
    assert idle.refused == idle.failed == idle.incidents == 0 and idle.utilisation < 0.3
    full = simulate(Plan(nodes=1, churn=0.0, seconds=20.0, rate=6.0, slots=2))
    assert full.refused > 0 and full.failed == 0


def test_the_command_prints_json_or_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--nodes", "2", "--churn", "0", "--seconds", "5", "--rate", "1", "--json"]) == 0
    fleet = json.loads(capsys.readouterr().out)
    assert fleet["plan"]["nodes"] == 2 and fleet["answered"] == fleet["requests"]
    assert main(["sim", "--nodes", "2", "--churn", "0", "--seconds", "5", "--rate", "1"]) == 0
    assert "first token" in capsys.readouterr().out
    assert main(["sim", "--nodes", "0"]) == 2
