"""Networks, nodes and callers on one clock, and the lines between them."""

from __future__ import annotations

from random import Random

from gridmill.network import ledger
from gridmill.network.metering import FeePolicy, PriceRow
from gridmill.network.operator import MIGRATIONS
from gridmill.network.settlement import Payer
from gridmill.sim.cables import Line
from gridmill.sim.callers import Call
from gridmill.sim.clock import Program, VirtualLoop
from gridmill.sim.disk import Disk
from gridmill.sim.network import Network
from gridmill.sim.nodes import UNIX_EPOCH_SECONDS, Build, SimNode
from gridmill.wire.identity import Identity


class World:
    """`seed` names every random choice that programs make; what happens to them is decided elsewhere."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: str,
        *,
        heartbeat_seconds: float = 5.0,
        receipts: bool = True,
        gateways: int = 1,
    ) -> None:
        self.loop = loop
        self.seed = seed
        self.random = Random(f"{seed}/world")
        self.nodes: list[SimNode] = []
        self.calls: list[Call] = []
        self.networks: list[Network] = []  # all lives of all gateways
        self.gateways = gateways
        self._now: dict[int, Network] = {}
        self.lines: list[Line] = []
        # Which of the faults happened after which leases may have ended, or something may not be on disk.
        self.network_hung = False
        self.clock_jumped = False
        self.disk_failed = False
        self.partitioned: dict[SimNode, tuple[bool, bool]] = {}
        self._heartbeat_seconds = heartbeat_seconds
        self._receipts = receipts
        self._key_seed = Random(f"{seed}/network key").randbytes(32)
        # SQLite reads the clock of its one gateway; several gateways have a database with a clock of its own.
        self.disk = Disk(MIGRATIONS, self.network_wall if gateways == 1 else self.world_wall)

    def network_wall(self) -> float:
        return self.network.wall()

    def world_wall(self) -> float:
        return UNIX_EPOCH_SECONDS + self.loop.time()

    # ------------------------------------------------------------ gateways

    @property
    def network(self) -> Network:
        """The first gateway."""
        return self._now[0]

    def lane(self, number: int) -> Network:
        """The life that this gateway leads now, or the last one that it led."""
        return self._now[number % self.gateways]

    @property
    def lanes(self) -> list[Network]:
        return [self._now[lane] for lane in range(self.gateways)]

    def start_network(self, lane: int = 0) -> Network:
        """A gateway begins a life, its first or another."""
        number = len(self.networks)
        network = Network(
            self.loop,
            self.disk,
            Random(f"{self.seed}/network/{number}"),
            name=f"network-{number}",
            holder=f"gateway-{lane + 1}",
            key_seed=self._key_seed,
            heartbeat_seconds=self._heartbeat_seconds,
            receipts=self._receipts,
        )
        if lane in self._now:
            network.wall_ahead_seconds = self._now[lane].wall_ahead_seconds
        self._now[lane] = network
        self.networks.append(network)
        network.start()
        return network

    def give(self, payer: Payer, amount: int, budget: int | None = None) -> None:
        """Credit, and what the payer's key may spend of it, before anything else happens."""
        credit = ledger.credit(payer.account_id, amount, f"credit-{payer.account_id}")
        self.disk.write(lambda transaction: ledger.apply(transaction, [credit]))
        if payer.has_budget:
            self.disk.write(lambda transaction: ledger.set_budget(transaction, payer.key_id, budget))

    # ------------------------------------------------------------ nodes

    def add_node(self, build: Build, owner: Identity) -> SimNode:
        node = SimNode(build, self.loop, self.seed, self, owner)
        node.lane = len(self.nodes) % self.gateways
        self.nodes.append(node)
        return node

    def prices_of(self, node_id: str) -> list[PriceRow]:
        """What a node has asked in its lives, with the fee of the simulated networks."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        return [PriceRow("", price, FeePolicy()) for price in node.asked_prices]

    def connect(self, node: SimNode) -> Line | None:
        network = self.lane(node.lane)
        if not network.listening:
            return None
        line = Line(self.loop, node.random, node.build.delay_seconds)
        to_node, to_network = self.partitioned.get(node, (False, False))
        line.block(to_node=to_node, to_network=to_network)
        self.lines.append(line)
        network.accept(line.network)
        return line

    def partition(self, node: SimNode, *, to_node: bool, to_network: bool) -> None:
        self.partitioned[node] = (to_node, to_network)
        if node.line is not None:
            node.line.block(to_node=to_node, to_network=to_network)

    def heal(self, node: SimNode) -> None:
        self.partitioned.pop(node, None)
        if node.line is not None:
            node.line.unblock()

    # ------------------------------------------------------------ callers

    def ask(self, call: Call) -> None:
        """A request arrives; where nobody listens it is turned away at the door."""
        call.asked_at = self.loop.time()
        self.calls.append(call)
        network = self.lane(call.lane)
        if not network.listening:
            call.finish("unreachable", self.loop.time())
            return
        call.served_by = network
        network.request(call)
        if call.patience_seconds is not None:
            self.loop.call_later(call.patience_seconds, self._leave, call, network.program, context=self.loop.world)

    def _leave(self, call: Call, program: Program) -> None:
        if not call.over and call.handler is not None and not program.killed:
            program.run(call.handler.cancel)

    # ------------------------------------------------------------ the end

    async def bury(self) -> None:
        """Ends whatever is left of all programs, dead or alive."""
        for network in self.networks:
            for end in list(network.lines):
                end.hang_up()
            await network.program.bury()
        for node in self.nodes:
            if node.line is not None:
                node.line.cut()
            for program in node.programs:
                await program.bury()
            node.close()
        self.disk.close()
