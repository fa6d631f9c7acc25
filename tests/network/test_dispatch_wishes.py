"""A work goes only where its caller allows, and back to the node that had its conversation."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_dispatch import CLASS, Reader, ScriptedNode, World, count_up, play, work

from gridmill.network.faults import NoRoom
from gridmill.network.registry import TIER_INVITED
from gridmill.network.scheduler import Allowed
from gridmill.wire.identity import node_id_of


async def fleet(world: World, count: int) -> list[ScriptedNode]:
    nodes = [ScriptedNode(count_up, slots=4) for _ in range(count)]
    for node in nodes:
        await world.join(node)
    async with asyncio.timeout(5):
        while world.registry.places(CLASS.class_id) < 4 * count:
            await asyncio.sleep(0)
    return nodes


def test_no_other_node_is_asked_than_the_caller_allows(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        nodes = await fleet(world, 3)
        wanted = node_id_of(nodes[1].identity.public)
        record = world.registry.record_of(wanted)
        assert record is not None
        for number in range(5):
            reader, one = Reader(), work(name=f"w{number}")
            order = world.order(one)
            order.allowed = Allowed(owners=frozenset({record.owner_id}))
            await world.dispatcher.serve(one, order, reader.emit, placed=reader.nodes.append)
            assert reader.nodes == [wanted]
        for nowhere in (Allowed(regions=frozenset({"mars"})), Allowed(tier=TIER_INVITED)):
            one = work(name="w9")
            order = world.order(one)
            order.allowed = nowhere
            with pytest.raises(NoRoom, match="routing") as refused:
                await world.dispatcher.serve(one, order, Reader().emit)
            assert refused.value.code == "no_node"

    play(tmp_path, body)


def test_a_named_conversation_stays_with_its_node_among_many(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        await fleet(world, 8)
        last, chosen = "", set[str]()
        for number in range(12):
            reader, one = Reader(), work(name=f"w{number}")
            order = world.order(one)
            order.sticky = "me"
            order.whys = []
            await world.dispatcher.serve(one, order, reader.emit, placed=reader.nodes.append)
            if number:
                looked_at = [why.node_id for why in order.whys[0] if why.drawn_as == "sticky"]
                assert looked_at == [last], "the node that had it last is always looked at"
            last = reader.nodes[0]
            chosen.add(last)
        assert len(chosen) < 6

    play(tmp_path, body)
