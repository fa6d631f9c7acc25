"""Which sessions compute how many ids in the next step. Pure: numbers in, numbers out.

Sessions that decode come first, because somebody reads along; what the budget leaves goes to prompts in chunks, so that
a long prompt delays nobody's next id by more than one step. Sessions are always given oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan(
    pending: Sequence[int], *, token_budget: int, tokens_max: int | None = None, together: bool = True
) -> list[int]:
    """How many ids each session computes in the next step, parallel to `pending`.

    `pending`: ids that a session knows and has not computed, oldest session first; 1 is a session that decodes, 0 one
    that cannot run. `token_budget` is what a step should cost: decoding sessions may exceed it, and prompts get a
    quarter of it even then, so that neither waits for ever. `tokens_max` is never exceeded (memory ran out above it).
    With `together` false only the oldest session that can run gets anything.
    """
    grants = [0] * len(pending)
    ceiling = tokens_max if tokens_max is not None else sum(pending)
    if not together:
        for index, count in enumerate(pending):
            if count:
                grants[index] = min(count, token_budget, ceiling)
                break
        return grants
    prompts: list[int] = []
    decoding = 0
    for index, count in enumerate(pending):
        if count == 1 and decoding < ceiling:
            grants[index] = 1
            decoding += 1
        elif count > 1:
            prompts.append(index)
    room = min(max(token_budget - decoding, token_budget // 4, 1), ceiling - decoding)
    if prompts and room > 0:
        _share(grants, prompts, pending, room)
    return grants


def _share(grants: list[int], prompts: list[int], pending: Sequence[int], room: int) -> None:
    """Half of the room to the oldest prompt; the rest to the shortest ones, so that they do not queue behind it."""
    oldest = prompts[0]
    grants[oldest] = min(pending[oldest], room if len(prompts) == 1 else (room + 1) // 2)
    room -= grants[oldest]
    for index in sorted(prompts[1:], key=lambda index: pending[index]):
        grants[index] = min(pending[index], room)
        room -= grants[index]
    grants[oldest] += min(pending[oldest] - grants[oldest], room)
