"""The request parser's fuzz target for a bounded time, under a fixed seed."""

from __future__ import annotations

import random

from fuzz_requests import SEEDS, fuzz_requests, mutated

from gridmill.network.gateway.requests import parse_chat, parse_completion


def test_mutated_bodies_find_nothing() -> None:
    chance = random.Random(2024)
    for _ in range(8000):
        fuzz_requests(mutated(chance))


def test_the_bodies_that_are_mutated_are_good_ones() -> None:
    for body, parse in zip(SEEDS, (parse_chat, parse_chat, parse_completion, parse_completion), strict=True):
        parse(body)
