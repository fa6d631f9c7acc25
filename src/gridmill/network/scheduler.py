"""Where one Work goes: a pure function of the work and a snapshot.

This first rule is short on purpose: among the nodes of the class with a free slot, the least expected time to the last
token, by speeds that the network measured itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from gridmill.network.metering import most, within
from gridmill.network.registry import NodeView, Snapshot
from gridmill.wire.messages import NodeId, Price

OUTPUT_TOKENS_EXPECTED_MAX = 256  # most answers end long before `max_tokens`; beyond this the guess only adds noise


class Placement(msgspec.Struct, frozen=True):
    """One node serves the whole work."""

    node_id: NodeId


class Full(msgspec.Struct, frozen=True):
    """No node can take it now. `no_node`: nobody serves the class; `busy`: all that do are full."""

    reason: Literal["no_node", "busy"]


def place(
    class_id: str,
    prompt_tokens: int,
    max_tokens: int,
    snapshot: Snapshot,
    *,
    excluded: Collection[NodeId] = (),
    affordable_nanocredits: int | None = None,
    max_price: Price | None = None,
) -> Placement | Full:
    """The node with the least expected time among those with room; `excluded` already failed this work.

    A node that could cost more than `affordable_nanocredits`, which is what is held for this work, is no candidate, and
    none that asks more per token than the caller's `max_price`.
    """
    candidates = [
        view
        for view in snapshot.by_class.get(class_id, ())
        if view.node_id not in excluded
        and within(view.price, max_price)
        and (
            affordable_nanocredits is None
            or view.price.free
            or most(view.price, prompt_tokens, max_tokens) <= affordable_nanocredits
        )
    ]
    if not any(not view.draining for view in candidates):
        return Full("no_node")
    free = [view for view in candidates if view.free_slots > 0]
    if not free:
        return Full("busy")
    best = min(free, key=lambda view: (expected_seconds(view, prompt_tokens, max_tokens), view.node_id))
    return Placement(best.node_id)


def expected_seconds(view: NodeView, prompt_tokens: int, max_tokens: int) -> float:
    """Prefill plus decode, both slowed by the share of the node that is already taken."""
    output_tokens = min(max_tokens, OUTPUT_TOKENS_EXPECTED_MAX)
    crowding = 1.0 + view.in_flight / max(1, view.slots)
    alone = prompt_tokens / view.prefill_tokens_per_second + output_tokens / view.decode_tokens_per_second
    return alone * crowding
