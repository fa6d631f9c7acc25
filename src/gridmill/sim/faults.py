"""What can happen to a fleet, and when: drawn from a seed, and then simply done.

Every fault ends: after its seconds the machine is back, the line heals, the disk writes again. So that afterwards
everything must be as if nothing had happened, except for what was honestly lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import get_args

import msgspec

from gridmill.network.accounts import KeyId
from gridmill.sim.cables import Mischief
from gridmill.sim.nodes import Bug, Lie, SimNode
from gridmill.sim.world import World
from gridmill.wire.messages import Price

# How often each is drawn. Those of a node come first.
NODE_FAULTS: dict[str, int] = {
    "kill": 4,  # kill -9; the machine closes its sockets
    "power": 2,  # the machine is gone, and nobody is told
    "hang": 4,  # SIGSTOP, then SIGCONT
    "slow": 2,
    "wedge": 3,  # the engine makes nothing any more; the program says that all is well
    "bug": 3,  # the engine breaks, or says something that cannot be
    "lie": 3,  # the whole program does
    "cut": 3,
    "flap": 1,
    "partition": 3,
    "deaf": 1,  # nothing reaches the node
    "mute": 1,  # nothing comes from it
    "lag": 1,
    "mischief": 4,
    "drain": 4,
}
NETWORK_FAULTS: dict[str, int] = {
    "network_kill": 3,
    "network_hang": 1,
    "network_stop": 1,
    "disk": 2,
    "clock": 1,
    "everybody": 1,  # all nodes are partitioned at once
    "revoke": 1,  # a key, while its requests run
}
MISCHIEFS: Sequence[Mischief] = get_args(Mischief)
BUGS: Sequence[Bug] = get_args(Bug)
LIES: Sequence[Lie] = get_args(Lie)


class Fault(msgspec.Struct, frozen=True):
    """`kind` happens to node number `node` for some seconds. `choice` decides what is left open."""

    at_seconds: float
    kind: str
    node: int
    seconds: float
    choice: int

    def __str__(self) -> str:
        return f"{self.at_seconds:.2f}s {self.kind} node-{self.node} for {self.seconds:.2f}s ({self.choice})"

    async def happen(self, world: World) -> None:
        if self.kind in NETWORK_FAULTS:
            await self._to_network(world)
            return
        node = world.nodes[self.node]
        if node.alive:
            await self._to_node(world, node)

    async def _to_node(self, world: World, node: SimNode) -> None:
        seconds, line, program = self.seconds, node.line, node.program
        assert program is not None
        match self.kind:
            case "kill" | "power":
                node.kill(silently=self.kind == "power")
                await asyncio.sleep(seconds)
                if self.choice % 8 == 0 and len({each.build.price for each in world.nodes}) > 1:
                    node.ask_for(Price(60, 20, self.choice % 700))
                if not node.alive:
                    node.start()
            case "drain":
                node.leave(drain_seconds=(0.0, 0.5, 5.0)[self.choice % 3])
                await node.over.wait()
                await asyncio.sleep(seconds)
                if not node.alive:
                    node.start()
            case "hang":
                program.stop()
                await asyncio.sleep(seconds)
                program.go_on()
            case "slow" if node.engine is not None:
                engine = node.engine
                engine.slow_down(5.0 + self.choice % 30)
                await asyncio.sleep(seconds)
                engine.slow_down(1.0)
            case "wedge" if node.engine is not None:
                engine = node.engine
                engine.wedge()
                await asyncio.sleep(seconds)
                engine.unwedge()
            case "bug" if node.engine is not None:
                node.engine.bug = BUGS[self.choice % len(BUGS)]
            case "lie":
                node.lie = LIES[self.choice % len(LIES)]
            case "cut" if line is not None:
                line.cut()
            case "flap":
                for _ in range(2 + self.choice % 4):
                    if node.line is not None:
                        node.line.cut()
                    await asyncio.sleep(0.2 + seconds / 10)
            case "partition" | "deaf" | "mute":
                world.partition(node, to_node=self.kind != "mute", to_network=self.kind != "deaf")
                await asyncio.sleep(seconds)
                world.heal(node)
            case "lag" if line is not None:
                line.delay_seconds += min(seconds, 3.0)
                await asyncio.sleep(seconds)
                line.delay_seconds = node.build.delay_seconds
            case "mischief" if line is not None:
                end = line.node if self.choice & 1 else line.network
                end.mischief = MISCHIEFS[self.choice // 2 % len(MISCHIEFS)]

    async def _to_network(self, world: World) -> None:
        lane = self.choice // 64 % world.gateways
        seconds, network = self.seconds, world.lane(lane)
        if not network.listening:
            return
        match self.kind:
            case "network_kill":
                network.kill()
                # Where there is another gateway it has time to find what this one left.
                await asyncio.sleep(min(seconds, 5.0) if world.gateways == 1 else 2 * seconds)
                world.start_network(lane)
            case "network_stop":
                network.stop(drain_seconds=(0.0, 1.0, 5.0)[self.choice % 3])
                await network.over.wait()
                await asyncio.sleep(min(seconds, 5.0))
                if world.lane(lane) is network and network.stopped.is_set():
                    world.start_network(lane)
            case "network_hang":
                world.network_hung = True
                network.program.stop()
                await asyncio.sleep(seconds)
                network.program.go_on()
            case "disk":
                world.disk_failed = True
                random = Random(self.choice)
                network.store.trouble = lambda: random.choice((None, "undone", "kept"))
                await asyncio.sleep(min(seconds, 4.0))
                network.store.trouble = lambda: None
            case "clock":
                world.clock_jumped = True
                network.wall_ahead_seconds += (-5.0, 3.0, 12.0)[self.choice % 3]
            case "revoke":
                network.program.run(lambda: network.parts.dispatcher.revoke([KeyId("key-b")]))
            case "everybody":
                for node in world.nodes:
                    world.partition(node, to_node=True, to_network=True)
                await asyncio.sleep(seconds)
                for node in world.nodes:
                    world.heal(node)


def draw(random: Random, seconds: float, nodes: int) -> list[Fault]:
    """None to twelve faults within so many seconds; in a third of all seeds only to nodes, and one node is spared."""
    weights = {**NODE_FAULTS, **NETWORK_FAULTS}
    if spared := random.random() < 0.33:
        weights = NODE_FAULTS
    kinds = random.choices(list(weights), list(weights.values()), k=random.choice((0, 1, 1, 2, 2, 3, 5, 8, 12)))
    return [
        Fault(
            at_seconds=random.uniform(0.0, seconds),
            kind=kind,
            node=random.randrange(nodes - 1 if spared else nodes),
            seconds=random.choice((0.05, 0.5, 2.0, 2.0, 6.0, 6.0, 16.0, 30.0)) * random.uniform(0.8, 1.2),
            choice=random.randrange(1 << 16),
        )
        for kind in kinds
    ]
