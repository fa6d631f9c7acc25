"""The simulation behind the published routing figures, small: a change that makes placement worse is seen here.

Virtual time and seeded, so it is the same on every machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("routing")


@pytest.mark.parametrize(("rate", "seconds"), [(4.0, 30.0), (6.0, 20.0)])
def test_first_tokens_come_sooner_than_under_any_other_policy(routing: ModuleType, rate: float, seconds: float) -> None:
    def p95(policy: str, view: str) -> float:
        found: float = routing.simulate(policy, rate, 3, seconds=seconds, view=view)["p95_seconds"]
        return found

    ours = p95(routing.OURS, "one gateway")
    others = {policy: p95(policy, routing.EXACT) for policy in routing.POLICIES}
    assert ours < 0.7 * min(others.values()), others
    # Four gateways that share nothing but what nodes say are behind one, and not by a disaster.
    assert p95(routing.OURS, "four gateways") < 1.2 * min(others.values())


def test_conversations_keep_their_caches_while_load_is_spread(routing: ModuleType) -> None:
    ours = routing.simulate(routing.OURS, 4.0, 3, seconds=30.0, view="one gateway")
    spread = routing.simulate("least loaded", 4.0, 3, seconds=30.0, view=routing.EXACT)
    hashed = routing.simulate("session hash", 4.0, 3, seconds=30.0, view=routing.EXACT)
    assert ours["prefix_hit_share"] > 3 * spread["prefix_hit_share"]
    assert ours["p99_seconds"] < 0.2 * hashed["p99_seconds"]
