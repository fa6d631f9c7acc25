"""`gridmill nodes`: what an operator reads of the nodes."""

from __future__ import annotations

import json

import pytest
from test_demand import CLASS_ID, fleet, join

from gridmill import operator_cli
from gridmill.cli import build_parser
from gridmill.network import demand
from gridmill.network.scheduler import Request


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = fleet()
    quick, slow = join(registry, "quick"), join(registry, "slow", ttft_seconds=1.0)
    for _ in range(3):
        registry.place(Request(CLASS_ID, 1000, 10))

    def operate(arguments: object, environ: object, command: str, **values: str) -> object:
        assert command == "nodes"
        return [
            demand.report(registry, record, 100.0) for record in (quick, slow) if values["node"] in ("", record.node_id)
        ]

    monkeypatch.setattr(operator_cli, "operate_on", operate)  # the way to the running network has tests of its own


def run(*words: str) -> int:
    arguments = build_parser().parse_args(["nodes", *words])
    code: int = arguments.run(arguments, {})
    return code


@pytest.mark.usefixtures("shown")
def test_a_line_for_each_node_says_how_it_stands_and_why_it_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    heads, quick, slow = capsys.readouterr().out.strip().splitlines()
    assert heads.startswith("NODE") and "LOST MOSTLY" in heads
    assert "100.0%" in quick and "slower" not in quick
    assert "0.0%" in slow and slow.rstrip().endswith("slower")


@pytest.mark.usefixtures("shown")
def test_one_node_is_shown_with_every_reason_and_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("slow") == 0
    said = capsys.readouterr().out
    assert "won 0 of 3 decisions" in said and demand.REMEDIES["slower"] in said and "quick" not in said


@pytest.mark.usefixtures("shown")
def test_a_program_reads_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    assert [each["node_id"] for each in json.loads(capsys.readouterr().out)] == ["quick", "slow"]
