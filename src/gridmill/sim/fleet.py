"""What a fleet would do: so many nodes, so many requests, so much churn, in virtual time (`gridmill sim`).

The same programs and lines as in the seeds, with a load that looks like chats: sessions whose prompts grow, machines of
four speeds, arrivals as they come (Poisson). Nobody pays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from random import Random

import msgspec

from gridmill.network.settlement import Payer
from gridmill.sim.callers import Call
from gridmill.sim.clock import VirtualLoop, run_virtually
from gridmill.sim.model import CLASS_ID, ORDINARY
from gridmill.sim.nodes import Build, SimNode
from gridmill.sim.world import World
from gridmill.wire.identity import Identity
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import Sampling, pack_ids

SPEEDS = (1.0, 1.0, 2.0, 4.0)  # of machines, against the slowest
IDS_PER_STEP = 8  # a real engine makes one; eight at a time cost an eighth to simulate
OUTPUT_TOKENS = (32, 64, 128, 256)
TURNS_MAX = 8  # of a chat
DEFAULT_LOAD = 0.6  # of what the fleet can decode, where no rate is given
SETTLING_SECONDS = 120.0  # for what still runs when the last request has come


class Plan(msgspec.Struct, frozen=True):
    """`churn` is the share of the nodes to which something happens each minute; `rate` is requests a second."""

    nodes: int
    churn: float
    seconds: float = 60.0
    rate: float = 0.0
    seed: int = 0
    slots: int = 4
    tokens_per_second: float = 20.0


class Fleet(msgspec.Struct, frozen=True):
    """What came of a plan. Times to the first token are those that callers saw, the queue included."""

    plan: Plan
    rate: float
    requests: int
    answered: int
    refused: int
    failed: int
    moved: int
    moves: int
    incidents: int
    ttft_p50_seconds: float
    ttft_p95_seconds: float
    ttft_p99_seconds: float
    longest_pause_of_moved_p95_seconds: float
    tokens_per_second: float
    utilisation: float
    virtual_seconds: float
    real_seconds: float
    ends: dict[str, int]

    def sentences(self) -> list[str]:
        """For people."""
        share = 100.0 / max(1, self.requests)
        return [
            f"{self.requests} requests at {self.rate:.2f} a second on {self.plan.nodes} nodes, "
            f"{self.incidents} incidents among them",
            f"  answered          {self.answered} ({share * self.answered:.1f} %), of which {self.moved} moved to "
            f"another node ({self.moves} moves)",
            f"  refused           {self.refused} ({share * self.refused:.1f} %)",
            f"  failed            {self.failed} ({share * self.failed:.1f} %)",
            f"  first token       p50 {self.ttft_p50_seconds:.2f} s   p95 {self.ttft_p95_seconds:.2f} s   "
            f"p99 {self.ttft_p99_seconds:.2f} s",
            f"  pause of a move   p95 {self.longest_pause_of_moved_p95_seconds:.2f} s",
            f"  throughput        {self.tokens_per_second:.0f} tokens a second, {100 * self.utilisation:.0f} % of all "
            "places taken",
            f"{self.virtual_seconds:.0f} seconds simulated in {self.real_seconds:.1f} s; ends: "
            + ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items(), key=lambda item: -item[1])),
        ]


def simulate(plan: Plan, progress: Callable[[str], None] = lambda line: None) -> Fleet:
    """Runs a plan to its end. `progress` gets a line now and then."""
    return run_virtually(lambda loop: _Run(loop, plan, progress).play())


class _Run:
    def __init__(self, loop: VirtualLoop, plan: Plan, progress: Callable[[str], None]) -> None:
        self._loop = loop
        self._plan = plan
        self._progress = progress
        self._random = Random(f"fleet {plan.seed}")
        self._world = World(loop, f"fleet {plan.seed}", receipts=False)
        self._rate = plan.rate or self._affordable_rate()
        self._sessions: list[list[int]] = []
        self._incidents = 0
        self._taken: list[float] = []

    def _affordable_rate(self) -> float:
        plan = self._plan
        speed = plan.tokens_per_second * sum(SPEEDS) / len(SPEEDS)
        tokens = sum(OUTPUT_TOKENS) / len(OUTPUT_TOKENS)
        return DEFAULT_LOAD * plan.nodes * plan.slots * speed / tokens

    async def play(self) -> Fleet:
        loop, plan, world, random = self._loop, self._plan, self._world, self._random
        began_real, began = time.perf_counter(), loop.time()
        network = world.start_network()
        for number in range(plan.nodes):
            world.add_node(self._build(number), Identity(random.randbytes(32)))
        await network.ready.wait()
        for node in world.nodes:
            node.start()
        await asyncio.sleep(2.0)
        tasks = [loop.create_task(body) for body in (self._churn(), self._watch(began_real))]
        start = loop.time()
        number = 0
        while (now := loop.time()) < start + plan.seconds:
            world.ask(self._call(number))
            number += 1
            await asyncio.sleep(random.expovariate(self._rate))
        try:
            async with asyncio.timeout(SETTLING_SECONDS):
                for call in world.calls:
                    await call.done.wait()
        except TimeoutError:
            pass  # whoever still waits counts as failed
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if loop.problems:
            raise RuntimeError(f"the simulation itself failed: {loop.problems[0]}")
        fleet = self._fleet(now - start, loop.time() - began, began_real)
        await world.bury()
        return fleet

    def _build(self, number: int) -> Build:
        plan, random = self._plan, self._random
        factor = SPEEDS[number % len(SPEEDS)]
        return Build(
            f"node-{number}",
            slots=plan.slots,
            tokens_per_second=plan.tokens_per_second * factor,
            first_token_seconds=0.05 / factor,
            prefill_tokens_per_second=500.0 * factor,
            ids_per_step=IDS_PER_STEP,
            delay_seconds=random.uniform(0.005, 0.08),
        )

    def _call(self, number: int) -> Call:
        random = self._random
        if self._sessions and random.random() < 0.6:
            prompt = self._sessions.pop(random.randrange(len(self._sessions)))
        else:
            prompt = random.choices(ORDINARY, k=random.randint(100, 600))
        prompt = prompt + random.choices(ORDINARY, k=random.randint(10, 60))
        sampling = Sampling(random.randbytes(32), random.choice(OUTPUT_TOKENS))
        work = Generate(f"work-{number}", CLASS_ID, pack_ids(prompt), sampling)
        call = Call(work, Payer("somebody", "key"))
        self._loop.create_task(self._goes_on(call, prompt))
        return call

    async def _goes_on(self, call: Call, prompt: list[int]) -> None:
        """A chat whose answer was read may be continued."""
        await call.done.wait()
        if call.received and len(prompt) < 3000 and self._random.random() < 1 - 1 / TURNS_MAX:
            self._sessions.append(prompt + call.received)

    # ------------------------------------------------------------ what happens to nodes

    async def _churn(self) -> None:
        if not self._plan.churn:
            return
        async with asyncio.TaskGroup() as incidents:
            while True:
                await asyncio.sleep(self._random.expovariate(self._plan.churn * self._plan.nodes / 60.0))
                node = self._random.choice(self._world.nodes)
                if node.alive:
                    self._incidents += 1
                    incidents.create_task(self._incident(node))

    async def _incident(self, node: SimNode) -> None:
        random = self._random
        away = random.uniform(5.0, 60.0)
        match random.choices(("kill", "power", "drain", "cut", "hang", "slow"), (3, 1, 3, 2, 1, 1))[0]:
            case "kill" | "power" as kind:
                node.kill(silently=kind == "power")
                await asyncio.sleep(away)
            case "drain":
                node.leave(5.0)
                await node.over.wait()
                await asyncio.sleep(away)
            case "cut" if node.line is not None:
                node.line.cut()
            case "hang" if node.program is not None:
                node.program.stop()
                await asyncio.sleep(away / 4)
                node.program.go_on()
            case "slow" if node.engine is not None:
                engine = node.engine
                engine.slow_down(10.0)
                await asyncio.sleep(away)
                engine.slow_down(1.0)
        if not node.alive:
            node.start()

    async def _watch(self, began_real: float) -> None:
        world, start = self._world, self._loop.time()
        while True:
            await asyncio.sleep(1.0)
            records = world.network.parts.registry.nodes()
            places = sum(offer.slots for record in records for offer in record.offers.values())
            taken = sum(sum(record.in_flight.values()) for record in records)
            self._taken.append(taken / places if places else 0.0)
            passed = self._loop.time() - start
            if round(passed) % 10 == 0:
                over = sum(1 for call in world.calls if call.over)
                self._progress(
                    f"{passed:.0f} s: {len(records)} nodes here, {taken} of {places} places taken, {over} of "
                    f"{len(world.calls)} requests over, {time.perf_counter() - began_real:.0f} s of yours"
                )

    # ------------------------------------------------------------ the sum of it

    def _fleet(self, seconds: float, virtual_seconds: float, began_real: float) -> Fleet:
        calls = self._world.calls
        ends: dict[str, int] = {}
        for call in calls:
            ends[call.end or "unfinished"] = ends.get(call.end or "unfinished", 0) + 1
        answered = [call for call in calls if call.end in ("stop", "length")]
        refused = [call for call in calls if call.end in ("overloaded", "no_node", "stopping", "unreachable")]
        moved = [call for call in answered if len(call.node_ids) > 1]
        waits = sorted(call.first_at - call.asked_at for call in calls if call.received)
        return Fleet(
            plan=self._plan,
            rate=self._rate,
            requests=len(calls),
            answered=len(answered),
            refused=len(refused),
            failed=len(calls) - len(answered) - len(refused),
            moved=len(moved),
            moves=sum(len(call.node_ids) - 1 for call in calls if call.node_ids),
            incidents=self._incidents,
            ttft_p50_seconds=_quantile(waits, 0.5),
            ttft_p95_seconds=_quantile(waits, 0.95),
            ttft_p99_seconds=_quantile(waits, 0.99),
            longest_pause_of_moved_p95_seconds=_quantile(sorted(call.longest_gap_seconds for call in moved), 0.95),
            tokens_per_second=sum(len(call.received) for call in calls) / max(seconds, 1e-9),
            utilisation=sum(self._taken) / max(1, len(self._taken)),
            virtual_seconds=virtual_seconds,
            real_seconds=time.perf_counter() - began_real,
            ends=ends,
        )


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))] if ascending else 0.0
