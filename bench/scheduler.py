"""How long one decision takes, at 10, 1,000 and 10,000 registered nodes, while works begin and end between decisions.

The network's own registry, measured nodes of different speeds and prices, prompts of 2,000 ids of which some are known.
Every decision is timed by itself; between two of them a work begins, is observed and ends, and some nodes join and
leave, as on a busy network. `plain` asks for the best node; `filtered` has price caps, an excluded node and an owner to
avoid, as a work that moves; `full` is a fleet without a free place; `rare` a region that one node in a thousand has.
The reference is the least a scheduler that looks at every node could take: one pass over all for the least number.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from gateway import HERE, processor

from gridmill.network.metering import FeePolicy, PriceRow
from gridmill.network.registry import NodeRecord, Registry
from gridmill.network.scheduler import ANYWHERE, Allowed, Full, Request
from gridmill.network.store import store_at
from gridmill.wire.classes import ModelClass
from gridmill.wire.messages import ClassOffer, NodeId, OwnerId, Price
from gridmill.wire.sampling import pack_ids

CLASS = ModelClass(
    weights=(), arithmetic="bench", kv_dtype="none", sampler_version=1, tokenizer_sha256="", text_facts_sha256=""
)
CLASS_ID = CLASS.class_id
SLOTS = 8
TEXTS = 500
PROMPT_TOKENS = 2000
KINDS = ("plain", "filtered", "rare", "full")


class Fleet:
    """Nodes on a registry, with works that come and go on a virtual clock."""

    def __init__(self, count: int, seed: int) -> None:
        self.random = Random(seed)
        self.now = 1000.0
        store = store_at(Path("never-opened"), wall_clock=time.time)
        clock = lambda: self.now  # noqa: E731
        self.registry = Registry(store, approve="open", now=clock, clock=clock, random=self.random)
        self.records: list[NodeRecord] = []
        self.running: list[NodeRecord] = []
        self.texts = [
            pack_ids(tuple(self.random.randrange(1 << 17) for _ in range(PROMPT_TOKENS))) for _ in range(TEXTS)
        ]
        for number in range(count):
            self.join(number)
        for record in self.records:
            for _ in range(4):
                self.observe(record)
        for _ in range(min(20 * count, 4000)):
            record = self.random.choice(self.records)
            record.sent.remember(CLASS_ID, b"", self.random.choice(self.texts), self.now)

    def join(self, number: int) -> None:
        record = self.registry.join(NodeId(f"node-{number}"), OwnerId(f"owner-{number % 100}"), "bench")
        input_price = self.random.randint(20, 60)
        price = Price(input_price, input_price // 2, self.random.randint(100, 500))
        row = PriceRow(f"price-{number}", price, FeePolicy())
        offer = ClassOffer("bench", CLASS, SLOTS, "bench", price=price, region="rare" if number % 1000 == 7 else "")
        self.registry.offer(record, [offer], {CLASS_ID: row})
        self.records.append(record)

    def observe(self, record: NodeRecord) -> None:
        speed = 1 + hash(record.node_id) % 4
        self.registry.observe(
            record,
            CLASS_ID,
            prefill_tokens=self.random.randint(100, 3000),
            ttft_seconds=self.random.uniform(0.1, 0.4) / speed,
            tokens=200,
            seconds=self.random.uniform(2, 4) / speed,
        )

    def churn(self) -> None:
        """What happens between two decisions."""
        self.now += 0.001
        while len(self.running) > SLOTS * len(self.records) // 2:
            index = self.random.randrange(len(self.running))
            self.running[index], self.running[-1] = self.running[-1], self.running[index]
            record = self.running.pop()
            self.observe(record)
            self.registry.ended(record, CLASS_ID, fault="node_lost" if self.random.random() < 0.01 else None)
            self.registry.end(record, CLASS_ID)
        if self.random.random() < 0.01:  # somebody reconnects
            index = self.random.randrange(len(self.records))
            if not self.records[index].in_flight.get(CLASS_ID):
                number = int(self.records[index].node_id.removeprefix("node-"))
                self.registry.leave(self.records[index])
                del self.records[index]
                self.join(number)

    def fill(self) -> None:
        for record in self.records:
            while record.in_flight.get(CLASS_ID, 0) < SLOTS:
                self.registry.begin(record, CLASS_ID)
                self.running.append(record)

    def request(self, kind: str) -> Request:
        text = self.random.choice(self.texts)
        whole = Request(CLASS_ID, PROMPT_TOKENS, 256, PROMPT_TOKENS, prompt=text, affordable_nanocredits=10**9)
        if kind == "plain" or kind == "full":
            return whole
        return Request(
            CLASS_ID,
            PROMPT_TOKENS,
            256,
            PROMPT_TOKENS,
            prompt=text,
            affordable_nanocredits=10**9,
            max_price=Price(64, 64, 400),
            not_above=Price(60, 30, 300) if kind == "filtered" else None,
            excluded=frozenset({self.random.choice(self.records).node_id}),
            avoid_owners=frozenset({OwnerId(f"owner-{self.random.randrange(100)}")}),
            allowed=Allowed(regions=frozenset({"rare"})) if kind == "rare" else ANYWHERE,
        )

    def decide(self, kind: str) -> tuple[float, float]:
        """One decision, in seconds by the wall's clock and by the processor's; what was placed begins."""
        request = self.request(kind)
        began, began_processor = time.perf_counter(), time.thread_time()
        found = self.registry.place(request)
        processor_time, wall = time.thread_time() - began_processor, time.perf_counter() - began
        if not isinstance(found, Full):
            record = self.registry.record_of(found.node_id)
            assert record is not None
            self.registry.begin(record, CLASS_ID)
            self.running.append(record)
        return wall, processor_time


def measure(count: int, kind: str, decisions: int) -> dict[str, Any]:
    fleet = Fleet(count, seed=1)
    for _ in range(min(SLOTS * count // 2, 5000)):
        fleet.decide("plain")
    if kind == "full":
        fleet.fill()
    gc.collect()
    gc.freeze()  # as the network does when it has started
    walls, processor_times = [], []
    for _ in range(decisions):
        if kind != "full":
            fleet.churn()
        wall, processor_time = fleet.decide(kind)
        walls.append(wall)
        processor_times.append(processor_time)
    walls.sort()
    processor_times.sort()
    gc.unfreeze()
    loads = [float(record.in_flight.get(CLASS_ID, 0)) for record in fleet.records]
    passes = []
    for _ in range(50):
        began = time.perf_counter()
        min(loads)
        passes.append(time.perf_counter() - began)
    return {
        "nodes": count,
        "kind": kind,
        "decisions": decisions,
        "p50_ms": 1000 * walls[decisions // 2],
        "p99_ms": 1000 * walls[int(0.99 * decisions)],
        "max_ms": 1000 * walls[-1],
        "processor_p99_ms": 1000 * processor_times[int(0.99 * decisions)],  # without what others did meanwhile
        "one_pass_over_all_ms": 1000 * sorted(passes)[25],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scheduler.json")
    given = parser.parse_args()
    results = []
    for count in given.nodes:
        for kind in given.kinds:
            row = measure(count, kind, given.decisions)
            results.append(row)
            print(
                f"{count:6d} nodes  {kind:9s} p50 {row['p50_ms']:.3f} ms  p99 {row['p99_ms']:.3f} ms"
                f" (processor time {row['processor_p99_ms']:.3f})"
                f"  max {row['max_ms']:.3f} ms  (one pass over all: {row['one_pass_over_all_ms']:.3f} ms)",
                flush=True,
            )
    machine = {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()}
    given.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
