"""Which node gets a request, and what that does to the time until the first token: our scheduler beside five others.

A simulation in virtual time: 16 nodes of four speeds, chats of several turns whose prompts grow, a prefix cache on each
node that forgets the least recently used chat. Sessions come at two rates. Every policy sees the same arrivals on the
same nodes, for each seed.

Ours is the network's own code: a real Registry, told what a gateway sees (begin, end, observe) and asked where to
place; it gets no hints about speeds, and what it cannot place waits in the gateway, as requests do there. Once as one
gateway that has all the traffic, once as four that each know of their own works alone. The others know each node's
slots and how many works are on it or wait for it, and queue at the node they chose: `0.5 s old`, with their own choices
since, or `exact`.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import os
import platform
import statistics
import sys
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from gateway import HERE, processor

from gridmill.network.registry import NodeRecord, Registry
from gridmill.network.scheduler import Placement, Request
from gridmill.network.store import store_at
from gridmill.wire.classes import ModelClass
from gridmill.wire.messages import ClassOffer, NodeId, OwnerId, Telemetry
from gridmill.wire.sampling import pack_ids

NODES = 16
SPEEDS = (1, 1, 2, 4)
PREFILL_TOKENS_PER_SECOND = 2500.0  # at speed 1
DECODE_TOKENS_PER_SECOND = 40.0  # times the square root of the speed
SLOTS = 4
CACHE_TOKENS = 40_000
CROWDING = 0.15  # a full node decodes that much slower
RING_POINTS = 64
STALE_SECONDS = 0.5
HEARTBEAT_SECONDS = 1.0
OURS = "gridmill"
STALE, EXACT = "0.5 s old", "exact"
GATEWAYS = {"one gateway": 1, "four gateways": 4}  # each knows its own works alone, and the nodes may queue
CLASS = ModelClass(
    weights=(), arithmetic="bench", kv_dtype="none", sampler_version=1, tokenizer_sha256="", text_facts_sha256=""
)


class Chat:
    """One conversation. Each turn sends all before it again."""

    def __init__(self, number: int, random: Random) -> None:
        self.number = number
        self.random = Random(random.random())  # the same turns under every policy
        self.length = self.random.choice((300, 800, 3000))
        self.output = self.random.randint(80, 300)
        self.turns = self.random.randint(1, 8)
        self.ids = [self.random.randrange(1 << 17) for _ in range(self.length)]

    def answered(self) -> None:
        self.turns -= 1
        self._grow(self.output)

    def next_turn(self) -> float:
        """What the user says next, and the seconds until then."""
        self._grow(self.random.randint(50, 400))
        self.output = self.random.randint(80, 300)
        return self.random.expovariate(1 / 8)

    def _grow(self, tokens: int) -> None:
        self.length += tokens
        self.ids.extend(self.random.randrange(1 << 17) for _ in range(tokens))


class Node:
    """A machine that answers, with a cache of what it read."""

    def __init__(self, number: int, speed: int) -> None:
        self.number = number
        self.prefill = PREFILL_TOKENS_PER_SECOND * speed
        self.decode = DECODE_TOKENS_PER_SECOND * speed**0.5
        self.slots = SLOTS * speed
        self.cache_tokens = CACHE_TOKENS * speed
        self.cache: OrderedDict[int, int] = OrderedDict()
        self.cached = 0
        self.running = 0
        self.queue: deque[Work] = deque()

    @property
    def load(self) -> int:
        return self.running + len(self.queue)

    def read(self, chat: Chat) -> int:
        """Tokens of this chat that were cached; from now on all of it is."""
        before = self.cache.pop(chat.number, 0)
        whole = chat.length + chat.output
        self.cache[chat.number] = whole
        self.cached += whole - before
        while self.cached > self.cache_tokens and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1]
        return min(before, chat.length)


class Policy:
    """Chooses a node at once; it queues there."""

    def __init__(self, nodes: list[Node], random: Random, stale_seconds: float) -> None:
        self.nodes = nodes
        self.random = random
        self.stale_seconds = stale_seconds
        self.looked = -1e9
        self.loads = [0] * len(nodes)
        self.ring = sorted(
            (_hash(f"{node.number}-{point}"), node.number) for node in nodes for point in range(RING_POINTS)
        )

    def load(self, node: Node) -> float:
        """Works per slot, as old as this gateway's news, with its own choices since."""
        return (self.loads[node.number] if self.stale_seconds else node.load) / node.slots

    def choose(self, chat: Chat, now: float) -> Node:
        if self.stale_seconds and now - self.looked > self.stale_seconds:
            self.looked, self.loads = now, [node.load for node in self.nodes]
        node = self.pick(chat)
        self.loads[node.number] += 1
        return node

    def pick(self, chat: Chat) -> Node:
        raise NotImplementedError

    def around(self, chat: Chat) -> Iterator[Node]:
        """The ring from this chat's place on; a node comes again and again."""
        at = bisect_left(self.ring, (_hash(str(chat.number)), -1))
        for step in range(len(self.ring)):
            yield self.nodes[self.ring[(at + step) % len(self.ring)][1]]


class AtRandom(Policy):
    def pick(self, chat: Chat) -> Node:
        return self.random.choice(self.nodes)


class LeastLoaded(Policy):
    def pick(self, chat: Chat) -> Node:
        return min(self.nodes, key=lambda node: (self.load(node), self.random.random()))


class PowerOfTwo(Policy):
    def pick(self, chat: Chat) -> Node:
        return min(self.random.sample(self.nodes, 2), key=self.load)


class SessionHash(Policy):
    def pick(self, chat: Chat) -> Node:
        return next(self.around(chat))


class BoundedLoadHash(Policy):
    def pick(self, chat: Chat) -> Node:
        mean = sum(self.load(node) * node.slots for node in self.nodes) / sum(node.slots for node in self.nodes)
        for node in self.around(chat):
            if self.load(node) <= max(1.25 * mean, 1 / node.slots, 0.25):
                return node
        return min(self.nodes, key=self.load)


POLICIES: dict[str, type[Policy]] = {
    "random": AtRandom,
    "least loaded": LeastLoaded,
    "power of two choices": PowerOfTwo,
    "session hash": SessionHash,
    "bounded-load hash": BoundedLoadHash,
}
BLIND = ("random", "session hash")


class Gateway:
    """The network's registry and scheduler, told what one gateway sees. Affinity comes from the text itself."""

    def __init__(self, nodes: list[Node], random: Random, now: Callable[[], float]) -> None:
        store = store_at(Path("never-opened"), wall_clock=time.time)
        self.registry = Registry(store, approve="open", now=now, clock=now, random=random)
        self.class_id = CLASS.class_id
        self.records: dict[NodeId, tuple[NodeRecord, Node]] = {}
        self.waiting: deque[tuple[Chat, float]] = deque()
        for node in nodes:
            record = self.registry.join(NodeId(f"node-{node.number}"), OwnerId(f"owner-{node.number}"), "bench")
            self.registry.offer(record, [ClassOffer("bench", CLASS, node.slots, "bench")])
            self.records[record.node_id] = record, node

    def heartbeats(self) -> None:
        for record, node in self.records.values():
            record.telemetry = Telemetry(running=node.running, waiting=len(node.queue))

    def choose(self, chat: Chat) -> tuple[NodeRecord, Node] | None:
        prompt = pack_ids(tuple(chat.ids))
        found = self.registry.place(Request(self.class_id, chat.length, chat.output, chat.length, prompt=prompt))
        if not isinstance(found, Placement):
            return None
        record, node = self.records[found.node_id]
        self.registry.begin(record, self.class_id)
        return record, node

    def ended(self, record: NodeRecord, work: Work, now: float) -> None:
        self.registry.observe(
            record,
            self.class_id,
            prefill_tokens=work.missed,
            ttft_seconds=max(work.first_token_at - work.placed, 1e-6),
            tokens=work.output,
            seconds=now - work.first_token_at,
        )
        self.registry.ended(record, self.class_id, fault=None)
        self.registry.end(record, self.class_id)
        record.sent.remember(self.class_id, b"", pack_ids(tuple(work.chat.ids)), now)


class Work:
    """One turn of one chat on its way."""

    def __init__(self, chat: Chat, node: Node, came: float, placed: float) -> None:
        self.chat = chat
        self.node = node
        self.came = came  # to the gateway
        self.placed = placed
        self.output = chat.output
        self.missed = 0
        self.first_token_at = 0.0
        self.gateway: Gateway | None = None
        self.record: NodeRecord | None = None


def simulate(policy: str, rate: float, seed: int, *, seconds: float, view: str) -> dict[str, Any]:
    random = Random(seed)
    nodes = [Node(number, random.choice(SPEEDS)) for number in range(NODES)]
    clock = [0.0]
    dice = Random(seed + 1)
    gateways = [Gateway(nodes, dice, lambda: clock[0]) for _ in range(GATEWAYS[view])] if policy == OURS else []
    theirs = None if gateways else POLICIES[policy](nodes, dice, STALE_SECONDS if view == STALE else 0.0)
    counter = itertools.count()
    events: list[tuple[float, int, Chat | Work | None]] = [(HEARTBEAT_SECONDS, next(counter), None)]
    arrival = 0.0
    while arrival < seconds:
        arrival += random.expovariate(rate)
        heapq.heappush(events, (arrival, next(counter), Chat(next(counter), random)))
    first_tokens: list[float] = []
    whole: list[float] = []
    hit = read = 0
    busy = 0.0

    def start(work: Work) -> None:
        nonlocal hit, read, busy
        node, chat, now = work.node, work.chat, clock[0]
        node.running += 1
        cached = node.read(chat)
        hit, read = hit + cached, read + chat.length
        work.missed = chat.length - cached
        work.first_token_at = now + work.missed / node.prefill
        decode = chat.output / node.decode * (1 + CROWDING * (node.running - 1) / node.slots)
        end = work.first_token_at + decode
        first_tokens.append(work.first_token_at - work.came)
        whole.append(end - work.came)
        busy += end - now
        heapq.heappush(events, (end, next(counter), work))

    def offer(work: Work) -> None:
        if work.node.running < work.node.slots:
            start(work)
        else:
            work.node.queue.append(work)

    def place_waiting(gateway: Gateway) -> None:
        while gateway.waiting:
            chat, came = gateway.waiting[0]
            found = gateway.choose(chat)
            if found is None:
                return
            gateway.waiting.popleft()
            work = Work(chat, found[1], came, clock[0])
            work.gateway, work.record = gateway, found[0]
            offer(work)

    while events:
        clock[0], _, what = heapq.heappop(events)
        if what is None:
            for gateway in gateways:
                gateway.heartbeats()
            if events:
                heapq.heappush(events, (clock[0] + HEARTBEAT_SECONDS, next(counter), None))
            continue
        if isinstance(what, Chat):
            if theirs is not None:
                offer(Work(what, theirs.choose(what, clock[0]), clock[0], clock[0]))
            else:
                gateway = dice.choice(gateways)
                gateway.waiting.append((what, clock[0]))
                place_waiting(gateway)
            continue
        what.node.running -= 1
        if what.node.queue:
            start(what.node.queue.popleft())
        chat = what.chat
        chat.answered()
        if what.gateway is not None and what.record is not None:
            what.gateway.ended(what.record, what, clock[0])
            place_waiting(what.gateway)
        if chat.turns > 0:
            later = clock[0] + chat.next_turn()
            heapq.heappush(events, (later, next(counter), chat))
    first_tokens.sort()
    return {
        "seed": seed,
        "requests": len(first_tokens),
        "p50_seconds": quantile(first_tokens, 0.5),
        "p95_seconds": quantile(first_tokens, 0.95),
        "p99_seconds": quantile(first_tokens, 0.99),
        "mean_seconds": statistics.fmean(first_tokens),
        "whole_answer_p50_seconds": statistics.median(whole),
        "prefix_hit_share": hit / read,
        "busy_share": busy / (seconds * sum(node.slots for node in nodes)),
    }


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _hash(words: str) -> int:
    return int.from_bytes(hashlib.md5(words.encode()).digest(), "big")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 6.0], help="chats begun per second")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=600.0, help="virtual time in which chats begin")
    parser.add_argument("--only", nargs="+", help="policies by name")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "routing.json")
    given = parser.parse_args()
    # Random and session hash look at no load.
    shown = [(name, view) for name in POLICIES for view in ((STALE, EXACT) if name not in BLIND else (EXACT,))]
    shown += [(OURS, view) for view in GATEWAYS]
    results = []
    for rate in given.rates:
        for name, view in shown:
            if given.only and name not in given.only:
                continue
            runs = [simulate(name, rate, seed, seconds=given.seconds, view=view) for seed in given.seeds]
            mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0] if key != "seed"}
            results.append({"rate": rate, "policy": name, "view": view, "mean": mean, "runs": runs})
            print(
                f"rate {rate:g} {name:21s} {view:13s} TTFT p50 {mean['p50_seconds']:7.3f}"
                f" p95 {mean['p95_seconds']:7.2f} p99 {mean['p99_seconds']:7.2f} s"
                f"  prefix hits {mean['prefix_hit_share']:.2f}"
                f"  answer p50 {mean['whole_answer_p50_seconds']:6.2f} s"
                f"  busy {mean['busy_share']:.2f}  n {runs[0]['requests']}",
                flush=True,
            )
    if not given.only:
        machine = {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()}
        written = {"machine": machine, "nodes": NODES, "seconds": given.seconds, "results": results}
        given.out.write_text(json.dumps(written, indent=1) + "\n")
        print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
