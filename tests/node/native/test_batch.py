"""Planning one step: decoding first, prompts share what is left, nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridmill.node.engines.native.batch import plan

TABLE = [
    # pending ids, budget, ceiling, together → ids in the next step
    ([], 8, None, True, []),
    ([1, 1, 1], 8, None, True, [1, 1, 1]),
    ([100], 8, None, True, [8]),
    ([5], 8, None, True, [5]),
    ([1, 100, 1], 8, None, True, [1, 6, 1]),  # decoding first, the prompt takes the rest
    ([100, 100], 8, None, True, [4, 4]),  # half for the oldest, half for the others
    ([100, 3, 2], 8, None, True, [4, 2, 2]),  # short prompts do not queue behind a long one
    ([100, 2], 8, None, True, [6, 2]),  # what nobody else needs goes back to the oldest
    ([1] * 8 + [50], 8, None, True, [1] * 8 + [2]),  # a quarter of the budget, however many decode
    ([0, 1, 0, 9], 8, None, True, [0, 1, 0, 7]),
    ([1, 1, 1, 9], 8, 2, True, [1, 1, 0, 0]),  # after memory ran out
    ([9, 1], 8, 4, True, [3, 1]),
    ([0, 9, 1], 8, None, False, [0, 8, 0]),  # one request at a time
    ([1, 1], 8, None, False, [1, 0]),
]


@pytest.mark.parametrize(("pending", "budget", "ceiling", "together", "expected"), TABLE)
def test_the_table_of_plans(
    pending: list[int], budget: int, ceiling: int | None, together: bool, expected: list[int]
) -> None:
    assert plan(pending, token_budget=budget, tokens_max=ceiling, together=together) == expected


@given(
    pending=st.lists(st.integers(0, 200), max_size=40),
    budget=st.integers(1, 64),
    ceiling=st.none() | st.integers(1, 64),
    together=st.booleans(),
)
def test_any_plan_keeps_its_limits_and_lets_the_oldest_progress(
    pending: list[int], budget: int, ceiling: int | None, together: bool
) -> None:
    grants = plan(pending, token_budget=budget, tokens_max=ceiling, together=together)
    assert all(0 <= grant <= count for grant, count in zip(grants, pending, strict=True))
    assert ceiling is None or sum(grants) <= ceiling
    assert any(grants) == any(pending)
    prefill = sum(grant for grant, count in zip(grants, pending, strict=True) if count > 1)
    assert prefill <= budget
    if ceiling is None and together:
        assert all(grant == 1 for grant, count in zip(grants, pending, strict=True) if count == 1)
        oldest_prompt = next((grant for grant, count in zip(grants, pending, strict=True) if count > 1), 1)
        assert oldest_prompt > 0
    if not together:
        assert sum(grant > 0 for grant in grants) <= 1
