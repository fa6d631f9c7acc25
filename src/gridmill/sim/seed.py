"""One seed: a fleet, callers, faults and money, all drawn from one number; then everything is checked.

`play(seed)` is the same run every time. It draws who is there and who asks what (`_Scene`), lets the faults happen
(`faults.py`), waits until all is quiet, and returns what was wrong (`checks.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
from random import Random

import msgspec

from gridmill.network.settlement import Payer
from gridmill.sim import checks, faults
from gridmill.sim.callers import Call
from gridmill.sim.clock import Standstill, VirtualLoop, run_virtually
from gridmill.sim.model import CLASS_ID, ORDINARY
from gridmill.sim.nodes import Build
from gridmill.sim.world import World
from gridmill.wire.identity import Identity
from gridmill.wire.messages import Generate, Price
from gridmill.wire.sampling import Sampling, pack_ids

CREDIT = 10**12  # nanocredits: a thousand credits, more than any seed spends
POOR_CREDIT = 40_000  # a few works
ATTEMPTS_MAX = 20  # of a caller with a key; by then everything is well again
BUDGET = 90_000  # of a key that has one
ARRIVALS_SECONDS = 12.0
QUIET_SECONDS_MAX = 400.0  # the longest that anything may take to end once nobody asks any more
PRICE = Price(50, 10, 400)


class Without(msgspec.Struct, frozen=True):
    """What of a seed is left out, by number: to find out what a failure needs."""

    faults: frozenset[int] = frozenset()
    calls: frozenset[int] = frozenset()


class Report(msgspec.Struct):
    """What came of one seed."""

    seed: int
    problems: list[str]
    ends: dict[str, int]
    faults: list[str]
    moves: int
    tokens: int
    virtual_seconds: float
    digest: str
    trace: list[str]


def play(seed: int, *, with_faults: bool = True, without: Without | None = None) -> Report:
    """Plays one seed from beginning to end."""
    report = Report(seed, [], {}, [], 0, 0, 0.0, "", [])

    async def body(loop: VirtualLoop) -> None:
        began = loop.time()
        scene = _Scene(loop, seed, with_faults, without or Without())
        try:
            async with asyncio.timeout(3600.0):
                await scene.play()
                report.problems += await checks.after(scene.world, scene.balances, scene.healthy, scene.lingers)
        except TimeoutError:
            waiting = [call.name for call in scene.world.calls if not call.over]
            report.problems.append(f"it does not come to an end; these wait: {', '.join(waiting) or 'only faults'}")
        finally:
            report.problems += loop.problems
            loop.problems.clear()
            _tell(scene, report)
            report.virtual_seconds = loop.time() - began
            await scene.world.bury()
        report.problems += checks.leftovers(loop)

    try:
        run_virtually(body)
    except Standstill as problem:
        report.problems.append(str(problem))
    return report


class _Scene:
    """Who is there, and what they do."""

    def __init__(self, loop: VirtualLoop, seed: int, with_faults: bool, without: Without) -> None:
        self.loop = loop
        self.random = Random(f"scene {seed}")
        # Most seeds ask every node for the same price, so that a charge says at once what it should have been.
        self.uniform = self.random.random() < 0.7
        gateways = 2 if self.random.random() < 0.2 else 1
        self.world = World(loop, str(seed), heartbeat_seconds=self.random.choice((1.0, 5.0)), gateways=gateways)
        self.builds = self._builds()
        drawn = faults.draw(self.random, ARRIVALS_SECONDS, len(self.builds)) if with_faults else []
        self.faults = [fault for number, fault in enumerate(drawn) if number not in without.faults]
        self.without = without
        limited = self.random.random() < 0.3
        self.lingers = self.random.random() < 0.1
        self.payers = [Payer("alice", "key-a", limited), Payer("bob", "key-b"), Payer("carol", "key-c")]
        self.balances = {"alice": CREDIT, "bob": CREDIT, "carol": CREDIT}
        if self.random.random() < 0.2:
            self.balances["carol"] = POOR_CREDIT

    @property
    def healthy(self) -> bool:
        """Whether no fault came near the network and one of the nodes. A dearer node may not be one for every work."""
        to_nodes = {fault.node for fault in self.faults if fault.kind in faults.NODE_FAULTS}
        to_network = any(fault.kind in faults.NETWORK_FAULTS for fault in self.faults)
        spared = len(to_nodes) < len(self.builds)
        return self.uniform and not to_network and spared and self.world.gateways == 1

    async def play(self) -> None:
        loop, world = self.loop, self.world
        for lane in range(world.gateways):
            world.start_network(lane)
        for payer in self.payers:
            world.give(payer, self.balances[payer.account_id], BUDGET)
        for build, owner in self.builds:
            world.add_node(build, owner)
        for network in world.lanes:
            await network.ready.wait()
        for node in world.nodes:
            node.start()
        await asyncio.sleep(1.0)
        began = loop.time()
        plan: list[tuple[float, faults.Fault | Call]] = [(fault.at_seconds, fault) for fault in self.faults]
        calls = [(at, self._call(number)) for number, at in enumerate(self._arrivals())]
        plan += [entry for number, entry in enumerate(calls) if number not in self.without.calls]
        plan.sort(key=lambda entry: entry[0])
        async with asyncio.timeout(QUIET_SECONDS_MAX), asyncio.TaskGroup() as going_on:
            for at, event in plan:
                await asyncio.sleep(max(0.0, began + at - loop.time()))
                if isinstance(event, faults.Fault):
                    going_on.create_task(event.happen(world))
                elif event.keyed:
                    going_on.create_task(self._errand(event))
                else:
                    world.ask(event)
            await asyncio.sleep(0)
        async with asyncio.timeout(QUIET_SECONDS_MAX):
            for call in world.calls:
                await call.done.wait()

    async def _errand(self, call: Call) -> None:
        """A caller with a key comes back until it has its answer, to whichever gateway."""
        random = Random(f"{call.name} {self.world.seed}")
        for _ in range(ATTEMPTS_MAX):
            self.world.ask(call)
            await call.done.wait()
            if call.end in checks.FINISHED:
                return
            await asyncio.sleep(random.uniform(0.2, 6.0))
            call = call.again(random.randrange(self.world.gateways))

    def _builds(self) -> list[tuple[Build, Identity]]:
        random = self.random
        owners = [Identity(random.randbytes(32)) for _ in range(random.randint(1, 3))]
        builds = []
        shared = PRICE if random.random() < 0.8 else Price()
        for number in range(random.randint(2, 6)):
            price = shared
            if not self.uniform:
                price = random.choice((Price(), PRICE, Price(40, 10, 300), Price(50, 50, 500), Price(7, 7, 7)))
            build = Build(
                f"node-{number}",
                slots=random.choice((1, 2, 4, 8)),
                tokens_per_second=random.choice((10.0, 25.0, 60.0)),
                first_token_seconds=random.choice((0.02, 0.2, 0.8)),
                prefill_tokens_per_second=random.choice((0.0, 200.0, 2000.0)),
                ids_per_step=random.choice((1, 1, 1, 4)),
                price=price,
                delay_seconds=random.choice((0.001, 0.02, 0.12)),
                clock_ahead_seconds=random.choice((0.0, 0.0, -3600.0, 86_400.0)),
            )
            builds.append((build, random.choice(owners)))
        return builds

    def _arrivals(self) -> list[float]:
        random = self.random
        count = random.randint(5, 24)
        if random.random() < 0.3:  # all at once
            return sorted(random.uniform(0.0, 1.0) for _ in range(count))
        return sorted(random.uniform(0.0, ARRIVALS_SECONDS) for _ in range(count))

    def _call(self, number: int) -> Call:
        random = self.random
        length = random.choice((1, 5, 17, 40, 40, 130))
        shared = [ORDINARY[n % len(ORDINARY)] for n in range(length)]
        prompt = shared if random.random() < 0.3 else [random.choice(ORDINARY) for _ in range(length)]
        stops = tuple(sorted(random.sample(ORDINARY, 24))) if random.random() < 0.25 else ()
        max_tokens = random.choice((1, 2, 8, 20, 20, 40, 70, 70, 320 if random.random() < 0.2 else 20))
        sampling = Sampling(
            random.randbytes(32),
            max_tokens,
            temperature=random.choice((0.0, 1.0)),
            stop_token_ids=stops,
            top_logprobs=random.choice((0, 2)) if random.random() < 0.1 else None,
        )
        keyed = random.random() < 0.15
        work = Generate(f"work-{number}", CLASS_ID, pack_ids(prompt), sampling, salt=random.randbytes(16))
        slow = random.random() < 0.15
        call = Call(
            work,
            random.choice(self.payers),
            streaming=random.random() < 0.7,
            pause_ids=random.choice((1, 5, 20)) if slow else 0,
            pause_seconds=random.choice((0.05, 0.5, 3.0)),
            enough=random.randint(1, max_tokens) if random.random() < 0.1 and not keyed else 0,
            patience_seconds=random.uniform(0.0, 4.0) if random.random() < 0.15 else None,
            weight=random.choice((1, 1, 3)),
            flexible=random.random() < 0.15,
            wait_seconds=random.choice((0.0, 0.3, 3.0)) if random.random() < 0.1 and not keyed else None,
            keyed=keyed,
        )
        call.lane = random.randrange(self.world.gateways)
        return call


def _tell(scene: _Scene, report: Report) -> None:
    """What happened, in an order that does not depend on anything but the seed."""
    report.faults = [str(fault) for fault in scene.faults]
    for call in scene.world.calls:
        report.ends[call.end] = report.ends.get(call.end, 0) + 1
        report.moves += max(0, len(call.node_ids) - 1)
        report.tokens += len(call.received)
        report.trace.append(
            f"{call.name} asked {call.asked_at:.4f} first {call.first_at:.4f} ended {call.ended_at:.4f} {call.end}"
            f" {len(call.received)}/{call.work.sampling.max_tokens} on {','.join(n[5:9] for n in call.node_ids)}"
            f" for {call.settled_nanocredits} {call.detail}"
        )
    report.digest = hashlib.sha256("\n".join(report.trace).encode()).hexdigest()[:16]
