"""What can happen to a fleet, and when: drawn from a seed, and then simply done."""

from __future__ import annotations

import asyncio
from random import Random

import msgspec

from gridmill.sim.world import World


class Fault(msgspec.Struct, frozen=True):
    """`kind` happens to node number `node` (modulo the fleet) for some seconds."""

    at_seconds: float
    kind: str
    node: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.at_seconds:.2f} {self.kind} {self.node} {self.seconds:.2f}"

    async def happen(self, world: World) -> None:
        await asyncio.sleep(0)


def draw(random: Random, seconds: float) -> list[Fault]:
    return []
