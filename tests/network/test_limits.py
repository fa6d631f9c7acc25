"""A key's limits per minute hold on average, a minute's worth may come at once, and a wait that was told is enough."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.network import limits as limits_module
from gridmill.network.accounts import Account, AccountId, KeyId
from gridmill.network.limits import Limits

A_LITTLE = 1e-6  # seconds: what float seconds may lose of a nanosecond


def key(name: str = "a", *, requests: int | None = None, cost: int | None = None) -> Account:
    return Account(AccountId("account"), KeyId(f"key-{name}"), name, frozenset({"inference"}), requests, cost)


def test_a_key_without_limits_is_never_refused_nor_remembered() -> None:
    limits = Limits()
    for _ in range(1000):
        assert limits.admit(key(), 5.0) is None
        assert limits.reserve_cost(key(), 1 << 62, 5.0) is None
        limits.settle_cost(key(), 1 << 62, 0, 5.0)
    assert len(limits) == 0


def test_a_minutes_worth_passes_at_once_and_then_one_every_so_often() -> None:
    limits, three = Limits(), key(requests=3)
    assert [limits.admit(three, 100.0) for _ in range(4)] == [None, None, None, 20.0]
    assert limits.admit(three, 119.0) == 1.0
    assert limits.admit(three, 120.0) is None
    assert limits.admit(three, 120.0) == 20.0


def test_keys_do_not_share_a_limit() -> None:
    limits = Limits()
    assert limits.admit(key("a", requests=1), 0.0) is None
    assert limits.admit(key("b", requests=1), 0.0) is None
    assert limits.admit(key("a", requests=1), 0.0) == 60.0


def test_what_a_work_did_not_cost_can_be_spent_again() -> None:
    limits, ten = Limits(), key(cost=10)
    assert limits.reserve_cost(ten, 10, 0.0) is None
    assert limits.reserve_cost(ten, 5, 0.0) == 30.0
    limits.settle_cost(ten, 10, 4, 0.0)
    assert limits.reserve_cost(ten, 6, 0.0) is None
    assert limits.reserve_cost(ten, 1, 0.0) == 6.0


def test_a_work_over_a_whole_minutes_worth_passes_a_full_bucket_and_is_paid_off() -> None:
    limits, ten = Limits(), key(cost=10)
    assert limits.reserve_cost(ten, 25, 0.0) is None
    assert limits.reserve_cost(ten, 1, 0.0) == 96.0, "15 of debt and one more, at ten a minute"
    limits.settle_cost(ten, 25, 25, 1.0)
    assert limits.reserve_cost(ten, 25, 149.0) == 1.0


def test_a_limit_that_was_lowered_counts_at_once() -> None:
    limits = Limits()
    assert limits.admit(key(requests=100), 0.0) is None
    assert limits.admit(key(requests=2), 0.0) is None
    assert limits.admit(key(requests=2), 0.0) is None
    assert limits.admit(key(requests=2), 0.0) == 30.0


def test_full_buckets_are_forgotten_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "BUCKETS_BEFORE_TIDYING", 8)
    limits = Limits()
    assert limits.reserve_cost(key("busy", cost=10), 1000, 0.0) is None
    for number in range(1000):
        assert limits.admit(key(str(number), requests=60), float(number)) is None
    assert len(limits) <= 16
    assert limits.reserve_cost(key("busy", cost=10), 1, 1000.0) is not None


@settings(max_examples=200, deadline=None)
@given(
    per_minute=st.integers(1, 10**12),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**12), st.floats(0, 1)), max_size=30),
)
def test_what_is_let_through_never_exceeds_a_burst_and_the_flow(
    per_minute: int, steps: list[tuple[float, int, float]]
) -> None:
    limits, account = Limits(), key(cost=per_minute)
    now, spent = 1000.0, 0
    for pause, amount, part in steps:
        now += pause
        amount = min(amount, per_minute)
        wait = limits.reserve_cost(account, amount, now)
        if wait is not None:
            assert 0 < wait <= 60.0 + A_LITTLE
            now += wait + A_LITTLE
            assert limits.reserve_cost(account, amount, now) is None, "the wait that was told is enough"
        charged = int(amount * part)
        limits.settle_cost(account, amount, charged, now)
        spent += charged
        assert spent * 60 <= per_minute * (60 + (now - 1000.0) + A_LITTLE) + 60
