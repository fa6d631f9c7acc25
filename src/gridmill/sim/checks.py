"""What must hold after a run, whatever happened in it."""

from __future__ import annotations

from collections.abc import Mapping

from gridmill.sim.clock import VirtualLoop
from gridmill.sim.world import World


async def after(world: World, balances: Mapping[str, int], uniform: bool) -> list[str]:
    return []


def leftovers(loop: VirtualLoop) -> list[str]:
    return []
