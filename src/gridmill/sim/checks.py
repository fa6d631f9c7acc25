"""What must hold after a run, whatever happened in it: answers, money, receipts, and that nothing is left over.

`after` waits until the fleet has come to rest, looks at the living programs, ends them, and then reads the books.
Each function returns sentences; none means that all is well.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from gridmill.network import ledger
from gridmill.network.links import CANCEL_ANSWER_SECONDS
from gridmill.network.metering import FeePolicy, PriceRow, Usage, charge
from gridmill.network.store import Row, Transaction
from gridmill.sim.callers import Call
from gridmill.sim.clock import Program, VirtualLoop
from gridmill.sim.model import ids_of
from gridmill.sim.network import Network
from gridmill.sim.nodes import SimNode
from gridmill.sim.world import World
from gridmill.wire import receipts as rules
from gridmill.wire.identity import node_id_of
from gridmill.wire.messages import Leaf
from gridmill.wire.sampling import pack_ids

FINISHED = ("stop", "length", "cancelled")
NODE_FAULTS = frozenset(
    {
        *("node_lost", "node_stalled", "node_silent", "node_failed", "node_cancelled", "node_refused", "link_full"),
        *("empty_answer", "count_disagrees", "ended_early", "bad_ids", "bad_logprobs"),
    }
)
# Errors that a caller may honestly get. Everything else is a bug.
HONEST = frozenset(
    {
        *FINISHED,
        *("left", "lost", "unreachable", "insufficient", "unavailable", "invalid_api_key", "runs_elsewhere"),
        *("no_node", "overloaded", "stopping"),
        *NODE_FAULTS,
    }
)
REST_SECONDS = 5.0  # the last words of nodes, and settlements that wait for them
LINGER_SECONDS = 95.0  # a purse is idle after a minute; then a round of the keeper, and a lease's life
RECONNECT_SECONDS_MAX = 120.0  # a node's pauses between dials grow to half a minute
JOURNAL_SECONDS = 0.3  # what a kill may cost of delivered counts: 50 ms are promised, and disks are slow
WAIT_SECONDS_OVER = 11.0  # money may be waited for besides, and a node that does not answer its offer
GIVEN_AWAY_SECONDS = 4.0  # a node's last word may take two seconds, and the disk its time
GIVEN_AWAY_DISK_SECONDS = 20.0  # a disk that fails again and again is tried again, with pauses


class Paid(msgspec.Struct):
    """What the books say of one call."""

    leaves: list[Leaf]
    charged: int
    tokens: int


async def after(world: World, balances: Mapping[str, int], healthy: bool, lingers: bool) -> list[str]:
    """All checks, in the order in which the world ends. `lingers`: after a while in which nobody asks anything.

    `healthy`: the network and at least one node that any work may go to were well all the time, so that no node's
    fault may reach a caller.
    """
    problems = await _at_rest(world)
    problems += _answers(world)
    if healthy:
        problems += [
            f"{call.name} ended as {call.end} although a node was well all the time: {call.detail}"
            for call in world.calls
            if call.end in NODE_FAULTS and "in turn" not in call.detail  # four nodes failed it: that is told
        ]
    problems += _idle(world)
    if lingers:
        problems += await _lingering(world)
    problems += await _ended(world)
    problems += _books(world, balances)
    return problems


# ---------------------------------------------------------------- the living


async def _at_rest(world: World) -> list[str]:
    """Waits until every living node is back and has countersigned what it was sent."""
    loop = world.loop
    for network in world.lanes:
        await network.ready.wait()
    deadline = loop.time() + RECONNECT_SECONDS_MAX
    missing: list[SimNode] = []
    while loop.time() < deadline:
        # Who kept a last word to itself is cut after a while, and its places are free again.
        withheld = any(node.withheld for node in world.nodes)
        await asyncio.sleep(REST_SECONDS + (CANCEL_ANSWER_SECONDS if withheld else 0.0))
        served = {
            view.node_id
            for network in world.lanes
            for views in network.parts.registry.snapshot().by_class.values()
            for view in views
        }
        missing = [node for node in world.nodes if node.alive and node.node_id not in served]
        if not missing and (world.disk_failed or not world.disk.read(_uncountersigned)):
            break
    problems = [f"{node.build.name} does not come back" for node in missing]
    if world.disk_failed:
        return problems  # what could not be written down is asked for again at a node's next join
    living = {node.identity.public: node.build.name for node in world.nodes if node.alive}
    problems += [
        f"{living[bytes(key)]} has countersigned {signed} of {seq} leaves"
        for key, signed, seq in world.disk.read(_uncountersigned)
        if bytes(key) in living
    ]
    return problems


async def _uncountersigned(transaction: Transaction) -> list[Row]:
    return await transaction.all(
        "SELECT node_key, countersigned_seq, seq FROM receipt_counters WHERE countersigned_seq < seq"
    )


def _idle(world: World) -> list[str]:
    """Nobody asks anything, so nobody may hold anything."""
    problems = [problem for network in world.lanes for problem in _idle_network(world, network)]
    for node in world.nodes:
        if node.agent is not None and node.agent.running:
            problems.append(f"at rest {node.build.name} runs {node.agent.running} works")
        if node.engine is not None and node.engine.telemetry().running:
            problems.append(f"at rest the engine of {node.build.name} runs something")
    return problems


def _idle_network(world: World, network: Network) -> list[str]:
    parts = network.parts
    numbers = {
        "works on links": sum(node_link.works for node_link in parts.links._by_node.values()),
        "works in the registry": sum(sum(record.in_flight.values()) for record in parts.registry.nodes()),
        "requests in the queue": parts.dispatcher.waiting,
        "orders in the books": len(parts.books._live),
        "orders in purses": sum(purse.live + purse.waiting for purse in parts.books._purses.values()),
        "keys that are being served": len(parts.dispatcher._serving),
        "handlers": len(network.calls),
        "disputed receipts": parts.desk.disputes,
        "wrong countersignatures": parts.desk.signatures_wrong,
    }
    return [f"at rest there are {count} {what} of {network.program.name}" for what, count in numbers.items() if count]


async def _lingering(world: World) -> list[str]:
    """Money that nobody uses goes home while everything runs, and holds end at their time."""
    await asyncio.sleep(LINGER_SECONDS)
    problems = [f"pending {row[0]} is open although nobody asks anything" for row in world.disk.read(_open_pendings)]
    for network in world.lanes:
        if network.parts.books._purses:
            problems.append(f"{network.program.name} keeps {len(network.parts.books._purses)} purses that nobody uses")
    return problems


async def _ended(world: World) -> list[str]:
    """All programs end when they are asked to, and leave no task and no timer behind."""
    problems = []
    living = [node for node in world.nodes if node.alive]
    for node in living:
        node.leave(drain_seconds=5.0)
    try:
        async with asyncio.timeout(60.0):
            for node in living:
                await node.over.wait()
            for network in world.lanes:
                network.stop(drain_seconds=5.0)
            for network in world.lanes:
                await network.stopped.wait()
            await asyncio.sleep(3.0)
    except TimeoutError:
        problems.append(f"not all programs end: {[node.build.name for node in living if node.alive]}")
    programs = [
        *(network.program for network in world.lanes),
        *(node.program for node in living if node.program is not None),
    ]
    for program in programs:
        problems += [f"{program.name} left a task: {task!r}" for task in program.tasks()]
        problems += [f"{program.name} left a timer: {timer!r}" for timer in _timers_of(world.loop, program)]
    return problems + await _started_again(world)


async def _started_again(world: World) -> list[str]:
    """Another life of the network finds no work to settle. It ends leases that a failing disk had made unknown."""
    problems = []
    for lane in range(world.gateways):
        network = world.start_network(lane)
        await network.ready.wait()
        if network.recovered:
            problems.append(f"a network that ended well left {network.recovered} works to settle")
        network.stop(drain_seconds=0.0)
        await network.stopped.wait()
    return problems


def _timers_of(loop: VirtualLoop, program: Program) -> list[Any]:
    return [timer for timer in loop.timers() if Program.of(timer) is program]


def leftovers(loop: VirtualLoop) -> list[str]:
    """After everything was buried only whoever asks may still run."""
    return [f"a task is left: {task!r}" for task in asyncio.all_tasks(loop) if task is not asyncio.current_task(loop)]


# ---------------------------------------------------------------- answers


def _answers(world: World) -> list[str]:
    """Every call ended once; what it got is the beginning of the answer, and all of it if it was told so."""
    problems = []
    for call in world.calls:
        ids, end = ids_of(call.work)
        got = call.received
        if call.ends != 1:
            problems.append(f"{call.name} ended {call.ends} times")
        if call.end not in HONEST:
            problems.append(f"{call.name} ended as {call.end!r}: {call.detail}")
        if got != ids[: len(got)]:
            place = next((n for n, (one, other) in enumerate(zip(got, ids, strict=False)) if one != other), len(ids))
            problems.append(f"{call.name} got {len(got)} ids, and other ones from position {place} on")
        wanted = min(len(ids), call.enough) if call.enough else len(ids)
        if call.end in FINISHED and len(got) != wanted:
            problems.append(f"{call.name} ended as {call.end} with {len(got)} of {wanted} ids")
        if call.end in FINISHED and not call.enough and call.end != end:
            problems.append(f"{call.name} ended as {call.end} instead of {end}")
        waited = call.ended_at - call.asked_at
        most = call.wait_seconds + WAIT_SECONDS_OVER if call.wait_seconds is not None else math.inf
        if call.end == "overloaded" and waited > most and not world.network_hung:
            problems.append(f"{call.name} waited {waited:.2f} s, and wanted to wait {call.wait_seconds:.2f} s at most")
        if len(call.settled_nanocredits) > 1:
            problems.append(f"{call.name} was settled {len(call.settled_nanocredits)} times")
        if not (call.streaming or call.keyed) and got and call.end not in FINISHED:
            problems.append(f"{call.name} got ids although it asked for all or nothing")
    return problems


# ---------------------------------------------------------------- money


def _books(world: World, balances: Mapping[str, int]) -> list[str]:
    """The ledger is sound, nothing is held, and every call was charged what it got and no more."""
    disk = world.disk
    problems = disk.read(ledger.check)
    names = disk.read(ledger.balances)
    problems += [
        f"{name} still has {amount}"
        for name, amount in names.items()
        if amount and (name == "escrow:request" or (name.startswith("user:") and name.endswith(":hold")))
    ]
    problems += [f"pending {row[0]} is still open" for row in disk.read(_open_pendings)]
    problems += [f"{row[0]} is still in the journal" for row in disk.read(_open_works)]
    leaves = [rules.leaf_from(bytes(row[0])) for row in disk.read(_leaves)]
    by_work: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_work.setdefault(leaf.work_id.partition(".")[0], []).append(leaf)  # all attempts of one caller
    unknown = set(by_work) - {call.name for call in world.calls}
    problems += [f"{work_id} has receipts, and nobody asked for it" for work_id in sorted(unknown)]
    lost = sum(network.parts.books.lost_nanocredits for network in world.networks if network.ready.is_set())
    if lost and not (world.network_hung or world.clock_jumped):
        problems.append(f"{lost} nanocredits were lost to leases that had ended")
    spent: dict[str, int] = dict.fromkeys(balances, 0)
    attempts: dict[str, list[Call]] = {}
    for call in world.calls:
        attempts.setdefault(call.name, []).append(call)
    for call, *more in attempts.values():
        mine = sorted(by_work.get(call.name, []), key=lambda leaf: leaf.start)
        paid = Paid(mine, sum(leaf.charge_nanocredits for leaf in mine), sum(leaf.output_tokens for leaf in mine))
        spent[call.payer.account_id] += paid.charged
        problems += _leaves_of_a_work(call, paid)
        problems += _errand(world, [call, *more], paid) if call.keyed else _bill(world, call, paid, lost > 0)
    for account_id, amount in balances.items():
        left = names.get(ledger.user_available(account_id), 0)
        if left != amount - spent[account_id]:
            problems.append(f"{account_id} has {left}, but of {amount} only {spent[account_id]} were charged")
    problems += _pay(world, names, leaves)
    problems += _chains(world)
    return problems


def _leaves_of_a_work(call: Call, paid: Paid) -> list[str]:
    """They join without a gap, over the ids of the unbroken answer, and nothing is in two of them."""
    problems = []
    ids, _ = ids_of(call.work)
    name = call.name
    position = 0
    for leaf in paid.leaves:
        if not leaf.output_tokens:
            continue  # it read the prompt for a caller who left before it made an id
        if leaf.start != position:
            problems.append(f"{name} has a leaf at {leaf.start} where {position} was next")
        position = leaf.start + leaf.output_tokens
        if leaf.output_hash != rules.ids_hash(call.work.salt, pack_ids(ids[leaf.start : position])):
            problems.append(f"{name} has a leaf over other ids than those from {leaf.start} to {position}")
    if sum(1 for leaf in paid.leaves if leaf.finish in ("stop", "length")) > 1:
        problems.append(f"{name} ended twice: {[leaf.finish for leaf in paid.leaves]}")
    if len({(leaf.work_id, leaf.epoch) for leaf in paid.leaves}) != len(paid.leaves):
        problems.append(f"{name} has two leaves of one epoch")
    if sum(1 for leaf in paid.leaves if leaf.input_tokens) > 1:
        problems.append(f"{name} paid its prompt twice")
    return problems


def _errand(world: World, attempts: list[Call], paid: Paid) -> list[str]:
    """However often a caller came back with its key: the answer is whole, and was paid once."""
    problems = []
    last, name = attempts[-1], attempts[-1].name
    ids, _ = ids_of(last.work)
    input_tokens = len(last.work.prompt) // 4
    if last.end in FINISHED and paid.tokens != len(ids) and not _given_away(world, last):
        problems.append(f"{name} has its answer after {len(attempts)} attempts, and was billed {paid.tokens}")
    rows = [row for node in world.nodes for row in world.prices_of(node.node_id)]
    most = max(_cost(row, input_tokens, 0, paid.tokens) for row in rows) + len(paid.leaves)
    if paid.charged > most:
        problems.append(f"{name} was charged {paid.charged} over {len(attempts)} attempts, at most {most} are due")
    return problems


def _given_away(world: World, call: Call) -> bool:
    """The answer goes first, the entry after: a network that is killed in between may have given it away."""
    life = call.served_by
    late = GIVEN_AWAY_DISK_SECONDS if world.disk_failed else GIVEN_AWAY_SECONDS
    return isinstance(life, Network) and abs(life.killed_at - call.ended_at) <= late


def _bill(world: World, call: Call, paid: Paid, some_were_lost: bool) -> list[str]:
    problems = []
    got, name = len(call.received), call.name
    if paid.tokens > got:
        problems.append(f"{name} was billed {paid.tokens} ids and got {got} ({call.end})")
    given_away = _given_away(world, call)
    if not given_away and (call.end in FINISHED or (call.streaming and call.end != "lost")):
        if paid.tokens != got:
            problems.append(f"{name} ended as {call.end} with {got} ids and was billed {paid.tokens}")
        if not some_were_lost and paid.charged != sum(call.settled_nanocredits):
            problems.append(f"{name} was charged {paid.charged}; the books said {call.settled_nanocredits}")
    if call.end == "lost" and call.streaming and not world.disk_failed and not world.network_hung:
        due = sum(count for at, count in call.arrivals if at < call.ended_at - JOURNAL_SECONDS)
        if paid.tokens < due:
            problems.append(f"{name} was billed {paid.tokens} of {due} ids that had long been delivered at the kill")
    if paid.leaves and call.node_ids and not given_away:
        # The user pays by the price of the first node that made something of what it was given.
        terms = PriceRow("", paid.leaves[0].price, FeePolicy())
        asked = [row for node_id in call.node_ids for row in world.prices_of(node_id)]
        possible = [terms] if paid.tokens else asked
        most = max(_cost(row, len(call.work.prompt) // 4, 0, paid.tokens) for row in possible)
        if paid.charged > most:
            problems.append(f"{name} was charged {paid.charged}, its {paid.tokens} ids cost at most {most}")
        if call.end in FINISHED:
            exact = _cost(terms, len(call.work.prompt) // 4, call.cached_tokens, paid.tokens)
            if call.told_nanocredits != exact:
                problems.append(f"{name} was told {call.told_nanocredits}, unbroken it would have cost {exact}")
            if paid.charged != exact and not some_were_lost:
                problems.append(f"{name} was charged {paid.charged}, unbroken it would have cost {exact}")
    return problems


def _cost(terms: PriceRow, input_tokens: int, cached_tokens: int, output_tokens: int) -> int:
    return charge(terms, Usage(input_tokens, cached_tokens, output_tokens)).total


def _pay(world: World, names: Mapping[str, int], leaves: list[Leaf]) -> list[str]:
    """What owners have earned is what the leaves of their nodes pay."""
    held = sum(amount for name, amount in names.items() if name.startswith("provider:"))
    pay = sum(leaf.pay_nanocredits for leaf in leaves)
    return [] if held == pay else [f"owners have {held}, their leaves pay {pay}"]


# ---------------------------------------------------------------- receipts


def _chains(world: World) -> list[str]:
    """Each chain's totals and head are what its leaves make, and its node agrees as far as it signed."""
    problems = []
    for row in world.disk.read(_counters):
        chain, class_id, start, seconds, network_key, node_key, seq, head, pay = row
        statement = rules.opening(bytes(network_key), bytes(node_key), class_id, start, seconds)
        leaves = [rules.leaf_from(bytes(r[0])) for r in world.disk.read(functools.partial(_leaves_of, chain=chain))]
        statement = rules.advance(statement, leaves) if leaves else statement
        name = node_id_of(bytes(node_key))
        if (statement.seq, statement.head, statement.pay_nanocredits) != (seq, bytes(head), pay):
            problems.append(f"the chain of {name} does not follow from its {len(leaves)} leaves")
    return problems


async def _open_pendings(transaction: Transaction) -> list[Row]:
    return await transaction.all("SELECT pending_id FROM pendings WHERE state = 'open' ORDER BY pending_id")


async def _open_works(transaction: Transaction) -> list[Row]:
    return await transaction.all("SELECT work_id FROM open_works ORDER BY work_id")


async def _leaves(transaction: Transaction) -> list[Row]:
    return await transaction.all("SELECT leaf FROM receipt_leaves ORDER BY work_id, epoch")


async def _leaves_of(transaction: Transaction, chain: bytes) -> list[Row]:
    return await transaction.all("SELECT leaf FROM receipt_leaves WHERE chain = ? ORDER BY seq", chain)


async def _counters(transaction: Transaction) -> list[Row]:
    return await transaction.all(
        "SELECT chain, class_id, period_start_seconds, period_seconds, network_key, node_key, seq, head,"
        " pay_nanocredits FROM receipt_counters ORDER BY node_key, period_start_seconds"
    )
