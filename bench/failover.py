"""A thousand broken streams: are they what they would have been, and how long is the pause that a caller sees?

    python bench/failover.py                     # 1000 streams, about a quarter of an hour on two cores
    python bench/failover.py --streams 60        # a small sample, written to build/ and not to bench/results/

Two native nodes of different owners serve a small model of random weights in exact mode. Rounds of requests run over
both; after a random number of tokens one node is killed (SIGKILL) or stopped (SIGSTOP), its cable is cut or frozen by a
proxy, or it is told to leave. What that broke is asked again in peace, under a fresh cache salt, and compared: ids as
far as the API shows them, text, usage and price.

The pause is the longest gap of a stream after the fault, less its usual gap. It is what the network needed to notice,
by its own log, and then what the next node needed for its first token. Beside it stands, from the same run, the first
token of new requests of the same length: sent at once, as many as one fault broke, to a node as busy as the one that
took over. Rounds that are done are kept in a file: stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from gateway import HERE, ROOT, processor

sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from faults import Asked, FaultKind, Fleet, Node, fleet, random_model

PRICE = "50/400"
PROMPT_IDS = (20, 160)
DRAINS = 0.1  # of a drain, as many as this share of all the others
SHARES: dict[FaultKind, float] = {"kill": 0.3, "stop": 0.25, "cut": 0.25, "freeze": 0.2, "drain": DRAINS}


class Broken(msgspec.Struct, frozen=True):
    """One request that a fault moved to another node. Seconds; None where it was not streamed."""

    streamed: bool
    temperature: float
    prompt_ids: int
    seen_ids: int | None  # when the fault struck
    added_pause_seconds: float | None
    noticed_seconds: float | None  # from its last event before the pause until the network gave the node up
    resumed_seconds: float | None  # from then to its next event
    usual_gap_seconds: float | None
    differs: list[str]


class Round(msgspec.Struct, frozen=True):
    """One fault. `first_token_seconds`: of new requests like the broken ones, where that was measured."""

    kind: FaultKind
    asked: int
    failed: list[str]
    broken: list[Broken]
    first_token_seconds: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=1000, help="broken streams, drains not counted")
    parser.add_argument(
        "--at-once", type=int, default=8, help="requests per node: a fault breaks as many, or both nodes'"
    )
    parser.add_argument("--tokens", type=int, default=200, help="ids of each answer")
    parser.add_argument("--kinds", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "failover.jsonl", help="rounds that are done")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds that are done")
    parser.add_argument("--out", type=Path, help="default: bench/results/failover.json for 1000 streams and more")
    options = parser.parse_args()
    out = options.out or (
        HERE / "results" / "failover.json" if options.streams >= 1000 else ROOT / "build" / "failover.json"
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the rounds that are done are kept"))
    began = time.monotonic()
    rounds = played(options)
    document = summary(rounds, options, time.monotonic() - began)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    options.state.unlink()
    print(f"wrote {out}")
    show(document)
    return 0 if document["identical"] == document["broken"] and not document["failed"] else 1


# ---------------------------------------------------------------- the rounds


def played(options: argparse.Namespace) -> list[Round]:
    """All rounds, those of an earlier run included."""
    state: Path = options.state
    state.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        state.unlink(missing_ok=True)
    rounds = (
        [msgspec.json.decode(line, type=Round) for line in state.read_bytes().splitlines()] if state.exists() else []
    )
    wanted = {kind: round(SHARES[kind] * options.streams) for kind in options.kinds}
    if missing(wanted, rounds) is None:
        return rounds
    with (
        tempfile.TemporaryDirectory(prefix="gridmill bench ") as folder,
        # Who comes while all places are taken waits here, and is not told to come again: that is not what is measured.
        fleet(Path(folder), "--queue-ttft-factor", "0", price=PRICE, credit=1000) as broken,
        state.open("ab") as file,
    ):
        model = random_model(broken.here.folder / "random", layers=4, width=128)
        broken.add(2, "--model", str(model), "--exact", "--kv-memory", "256MiB", "--threads", "1")
        play = Play(broken, options, len(rounds))
        broken.ask(play.requests(options.at_once))  # what is made once and kept is made now
        while (kind := missing(wanted, rounds)) is not None:
            rounds.append(play.round(kind))
            file.write(msgspec.json.encode(rounds[-1]) + b"\n")
            file.flush()
            show_progress(rounds, sum(wanted.values()))
    return rounds


def missing(wanted: dict[FaultKind, int], rounds: list[Round]) -> FaultKind | None:
    """The kind of fault of which the largest share is still to be done."""
    left = {kind: 1 - count_of(rounds, kind) / max(1, count) for kind, count in wanted.items()}
    kind = max(left, key=lambda kind: left[kind])
    return kind if left[kind] > 0 else None


def count_of(rounds: list[Round], kind: FaultKind) -> int:
    return sum(len(one.broken) for one in rounds if one.kind == kind)


def show_progress(rounds: list[Round], wanted: int) -> None:
    last = rounds[-1]
    pauses = [one.added_pause_seconds for one in last.broken if one.added_pause_seconds is not None]
    done = sum(len(one.broken) for one in rounds)
    different = sum(bool(one.differs) for each in rounds for one in each.broken)
    print(
        f"{done:5} of {wanted} broken, {different} different, {sum(len(one.failed) for one in rounds)} failed; "
        f"{last.kind} broke {len(last.broken)}, pauses {', '.join(f'{p * 1000:.0f}' for p in sorted(pauses))} ms",
        flush=True,
    )


class Play:
    """The rounds of one fleet."""

    def __init__(self, broken: Fleet, options: argparse.Namespace, rounds_before: int) -> None:
        self._fleet = broken
        self._options = options
        self._random = random.Random(f"{options.seed}-{rounds_before}")
        self._numbers = itertools.count(rounds_before << 16)
        self._wall_minus_monotonic = time.time() - time.monotonic()

    def requests(self, count: int) -> list[Asked]:
        """Half of them streamed, half greedy, half with log probabilities, in all combinations."""
        return [self._request(number) for number in itertools.islice(self._numbers, count)]

    def _request(self, number: int) -> Asked:
        body: dict[str, Any] = {
            "prompt": self._prompt(self._random.randint(*PROMPT_IDS)),
            "max_tokens": self._options.tokens,
            "ignore_eos": True,
            "seed": number,
            "stream": number % 2 == 0,
            "temperature": number // 2 % 2,
        }
        if number // 4 % 2:
            body["logprobs"] = 1
        return Asked(**body).again()

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(10, 1400) for _ in range(length)]

    def round(self, kind: FaultKind) -> Round:
        nodes = self._fleet
        nodes.heal()
        asked = self.requests(2 * self._options.at_once)
        streamed = [one for one in asked if one.streamed]
        after = self._random.randint(1, 4 * self._options.tokens // 5)
        seen: dict[int, int] = {}
        struck = 0.0

        async def strike() -> None:
            nonlocal struck
            first = await streamed[0].reached(after)
            node = nodes.node(first.first_node)
            seen.update({i: len(one.moments) for i, one in enumerate(asked)})
            struck = time.monotonic()
            await asyncio.to_thread(node.suffer, kind)

        nodes.ask(asked, strike)
        failed = [f"{one.status} {one.error}" for one in asked if not one.done]
        moved = [i for i, one in enumerate(asked) if one.done and len(one.nodes) > 1]
        first_token = self._first_tokens([asked[i] for i in moved], after) if kind == "kill" else []
        peace = self._in_peace([asked[i] for i in moved])
        left = {said["work"].rpartition("-")[0]: float(said["time_seconds"]) for said in nodes.moves()}
        found = []
        for i, whole in zip(moved, peace, strict=True):
            one = asked[i]
            departure = left[one.request_id] - self._wall_minus_monotonic
            # On a busy machine a node may stand still by itself, before the fault: a move, but no pause of this kind.
            gap = longest_gap(one.moments, struck) if one.streamed and departure >= struck else None
            found.append(
                Broken(
                    streamed=one.streamed,
                    temperature=one.body["temperature"],
                    prompt_ids=len(one.body["prompt"]),
                    seen_ids=seen[i] if one.streamed else None,
                    added_pause_seconds=gap.added if gap else None,
                    noticed_seconds=departure - gap.begin if gap else None,
                    resumed_seconds=gap.end - departure if gap else None,
                    usual_gap_seconds=gap.usual if gap else None,
                    differs=one.differs(whole),
                )
            )
        return Round(kind, len(asked), failed, found, first_token)

    def _in_peace(self, asked: list[Asked]) -> list[Asked]:
        """The same again, unbroken. A node that was killed starts meanwhile: nothing is timed here."""
        fleet = self._fleet
        fleet.calm()
        absent: list[Node] = [node for node in fleet.nodes if not node.alive]
        for node in absent:
            node.program.process.wait(60)
            node.launch()
        moves = fleet.moves()
        whole = fleet.ask([one.again() for one in asked])
        assert fleet.moves() == moves, "what was meant to be unbroken was not"
        for node in absent:
            node.ready()
        return whole

    def _first_tokens(self, moved: list[Asked], seen: int) -> list[float]:
        """What requests of the length that the broken ones had wait for their first token, all sent at once, on the
        one node that is left, beside as many streams as it had of its own."""
        own = 2 * self._options.at_once - len(moved)
        background = [one for one in self.requests(4 * own) if one.streamed][:own]
        left = max(2, self._options.tokens - seen)
        fresh = [
            Asked(
                prompt=self._prompt(len(one.body["prompt"]) + seen), max_tokens=left, ignore_eos=True, stream=True
            ).again()
            for one in moved
        ]

        async def measure() -> None:
            if background:
                await background[0].reached(20)
            await self._fleet.asking(fresh)

        self._fleet.ask(background, measure)
        return [one.moments[0] - one.began for one in fresh if one.moments]


class Gap(msgspec.Struct, frozen=True):
    """The longest gap between two events of a stream that ends after its fault, by time.monotonic; the usual one."""

    begin: float
    end: float
    usual: float

    @property
    def added(self) -> float:
        return self.end - self.begin - self.usual


def longest_gap(moments: list[float], struck: float) -> Gap | None:
    """None for a stream that was almost over."""
    pairs = list(itertools.pairwise(moments))
    after = [(end - begin, begin, end) for begin, end in pairs if end > struck]
    if not after:
        return None
    _, begin, end = max(after)
    return Gap(begin, end, statistics.median(b - a for a, b in pairs))


# ---------------------------------------------------------------- what is published


def summary(rounds: list[Round], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    counted = [one for each in rounds for one in each.broken if each.kind != "drain"]
    first_token = [seconds for each in rounds for seconds in each.first_token_seconds]
    by_kind: dict[str, Any] = {}
    for kind in SHARES:
        of_kind = [one for each in rounds if each.kind == kind for one in each.broken]
        if not of_kind:
            continue
        by_kind[kind] = {
            "faults": sum(each.kind == kind for each in rounds),
            "broken": len(of_kind),
            "identical": sum(not one.differs for one in of_kind),
            "streamed": sum(one.streamed for one in of_kind),
            "greedy": sum(one.temperature == 0 for one in of_kind),
            "usual_gap": spread(known(one.usual_gap_seconds for one in of_kind)),
            "noticed": spread(known(one.noticed_seconds for one in of_kind)),
            "resumed": spread(known(one.resumed_seconds for one in of_kind)),
            "added_pause": spread(known(one.added_pause_seconds for one in of_kind)),
            "added_pause_ms": [round(1000 * pause, 1) for pause in known(one.added_pause_seconds for one in of_kind)],
        }
    return {
        "what": "streams that lost their node and went on at another, compared with the same request unbroken",
        "machine": {
            "cores": os.cpu_count(),
            "processor": processor(),
            "python": platform.python_version(),
            "commit": commit(),
        },
        "settings": {"tokens": options.tokens, "at_once_per_node": options.at_once, "seconds": round(seconds)},
        "broken": len(counted),
        "identical": sum(not one.differs for one in counted),
        "failed": [sentence for each in rounds for sentence in each.failed],
        "different": [sentence for each in rounds for one in each.broken for sentence in one.differs],
        "broken_by_one_fault": spread_of_counts([len(each.broken) for each in rounds]),
        "first_token_of_a_new_request": spread(first_token),
        "first_token_ms": [round(1000 * seconds, 1) for seconds in first_token],
        "faults": by_kind,
    }


def show(document: dict[str, Any]) -> None:
    """p50 / p95 / p99 in milliseconds."""

    def cell(found: dict[str, float] | None) -> str:
        return " / ".join(f"{found[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")) if found else "-"

    print(f"{document['identical']} of {document['broken']} identical, {len(document['failed'])} failed, drains apart")
    for kind, facts in document["faults"].items():
        print(
            f"{kind:7} {facts['identical']:4} of {facts['broken']:4}   noticed {cell(facts['noticed']):20} "
            f"resumed {cell(facts['resumed']):20} added pause {cell(facts['added_pause'])}"
        )
    print(f"first token of a new request {cell(document['first_token_of_a_new_request'])}")
    for sentence in (document["failed"] + document["different"])[:20]:
        print(sentence)


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def spread(seconds: list[float]) -> dict[str, float] | None:
    """In milliseconds."""
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    picked = {"p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98], "max_ms": max(seconds)}
    return {"count": float(len(seconds)), **{name: round(1000 * value, 2) for name, value in picked.items()}}


def spread_of_counts(counts: list[int]) -> dict[str, float]:
    return {"least": min(counts), "median": statistics.median(counts), "most": max(counts)}


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
