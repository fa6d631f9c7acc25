"""The fuzz targets for a bounded time: mutated honest messages under fixed seeds, and what Hypothesis thinks of."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from fuzz_codec import SEEDS, TARGETS, mutated
from hypothesis import example, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_mutated_messages_find_nothing(target: Callable[[bytes], None]) -> None:
    chance = random.Random(2024)
    for _ in range(3000):
        target(mutated(chance))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=2000))
@example(data=b"")
@example(data=SEEDS[0])
def test_arbitrary_bytes_find_nothing(target: Callable[[bytes], None], data: bytes) -> None:
    target(data)
