"""Three times more asked than two nodes can do: how quick are those who get a place, and is what others are told true?

    python bench/overload.py                     # about four minutes; mostly waiting, but leave the machine in peace

A network and two echo nodes in processes of their own, over real sockets, with the speed of a real model: 0.4 s to the
first token, then 25 tokens a second. Two accounts of equal weight ask over HTTP, streaming:

- unloaded: one request at a time. Its p95 is the reference for all others.
- patient: three times as many clients as there are places. Who is refused waits as `Retry-After` says and asks again.
- flood: requests come at three times the rate that the places can serve, whatever happens to them. Of those who are
  refused each tenth comes back as it was told; the others are gone.
- afterwards: one request at a time again.

`kept` is the share of requests that got a place when they came back as they were told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from gateway import HERE, processor, running, wait_for_model

NODES, SLOTS = 2, 16
FIRST_TOKEN_SECONDS, TOKENS_PER_SECOND = 0.4, 25.0
ANSWER_TOKENS = (20, 60)
OVERLOAD = 3
ACCOUNTS = ("acme", "zenith")
COME_BACK = 0.1  # of those who are refused in the flood


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=75.0, help="length of each loaded phase, after its warm-up")
    parser.add_argument("--warm-up", type=float, default=20.0)
    parser.add_argument("--unloaded", type=int, default=40, help="requests one at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overload.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, network(Path(folder)) as (base_url, model, keys):
        phases = asyncio.run(Load(base_url, model, keys, options).phases())
    document = {
        "machine": {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
        "nodes": NODES,
        "slots": SLOTS,
        "first_token_seconds": FIRST_TOKEN_SECONDS,
        "tokens_per_second": TOKENS_PER_SECOND,
        "answer_tokens": ANSWER_TOKENS,
        "overload": OVERLOAD,
        "seconds": options.seconds,
        "seed": options.seed,
        "phases": phases,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.out}")
    reference = phases["unloaded"]["ttft_p95_seconds"]
    for name, phase in phases.items():
        print(f"{name:10s} p95 {phase['ttft_p95_seconds'] / reference:.2f} x unloaded, {json.dumps(phase)}")
    return 0


@contextlib.contextmanager
def network(folder: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Its base URL, the model's name, and a key of each account."""
    gridmill = [sys.executable, "-m", "gridmill"]
    quiet = ["--log-level", "error", "--json"]
    data = str(folder / "network")
    with contextlib.ExitStack() as stack:
        command = [*gridmill, "network", "--port", "0", "--data", data, *quiet]
        started = stack.enter_context(running(command, stdout=subprocess.PIPE))
        assert started.stdout is not None
        base_url = json.loads(started.stdout.readline())["base_url"]
        model = ""
        for number in range(NODES):
            echo = ["--engine", "echo", "--slots", str(SLOTS), "--echo-delay-seconds", str(FIRST_TOKEN_SECONDS)]
            echo += ["--echo-tokens-per-second", str(TOKENS_PER_SECOND), "--data", str(folder / f"node-{number}")]
            node = stack.enter_context(
                running([*gridmill, "node", "--network", base_url, *echo, *quiet], stdout=subprocess.PIPE)
            )
            assert node.stdout is not None
            model = json.loads(node.stdout.readline())["model"]
        keys = {}
        for account in ACCOUNTS:
            create = [*gridmill, "keys", "create", account, "--json", "--data", data]
            made = subprocess.run(create, capture_output=True, text=True, check=True)
            keys[account] = json.loads(made.stdout)["api_key"]
        wait_for_model(int(base_url.rsplit(":", 1)[1].split("/")[0]), keys[ACCOUNTS[0]], model)
        yield base_url, model, keys


class Phase:
    """What clients saw between `start` and `end`, both moments of `time.monotonic`."""

    def __init__(self, start: float, end: float) -> None:
        self.start = start
        self.end = end
        self.ttft_seconds: list[float] = []
        self.asked: Counter[str] = Counter()  # by account
        self.refused: Counter[str] = Counter()  # by status and code
        self.told_seconds: list[float] = []
        self.tokens: Counter[str] = Counter()  # by account, of answers that ended
        self.answers = 0
        self.came_back: Counter[bool] = Counter()  # whether there was a place

    @property
    def open(self) -> bool:
        return self.start <= time.monotonic() < self.end

    def facts(self) -> dict[str, Any]:
        asked = self.asked.total()
        first, second = (self.tokens[account] for account in ACCOUNTS)
        back = self.came_back.total()
        return {
            "seconds": round(self.end - self.start, 1),
            "asked": asked,
            "refused": dict(self.refused),
            "refused_share": share(self.refused.total(), asked),
            "answers": self.answers,
            "ttft_p50_seconds": quantile(self.ttft_seconds, 0.5),
            "ttft_p95_seconds": quantile(self.ttft_seconds, 0.95),
            "ttft_p99_seconds": quantile(self.ttft_seconds, 0.99),
            "ttft_seconds": [round(each, 4) for each in self.ttft_seconds],
            "retry_after_p50_seconds": quantile(self.told_seconds, 0.5),
            "retry_after_most_seconds": max(self.told_seconds, default=0.0),
            "came_back": back,
            "kept": share(self.came_back[True], back),
            "tokens": dict(self.tokens),
            "tokens_ratio": round(first / second, 4) if second else None,
        }


class Load:
    """The clients of both accounts."""

    def __init__(self, base_url: str, model: str, keys: dict[str, str], options: argparse.Namespace) -> None:
        self.url = base_url + "/completions"
        self.model = model
        self.keys = keys
        self.options = options
        self.random = random.Random(options.seed)
        self.session: aiohttp.ClientSession

    async def phases(self) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as self.session:
            facts = {}
            for name, run in (
                ("unloaded", self.one_at_a_time),
                ("patient", self.patient),
                ("flood", self.flood),
                ("afterwards", self.one_at_a_time),
            ):
                print(f"{name} …", flush=True)
                facts[name] = (await run()).facts()
                await asyncio.sleep(5)
        return facts

    async def one_at_a_time(self) -> Phase:
        phase = Phase(time.monotonic(), math.inf)
        for number in range(self.options.unloaded):
            await self.ask(phase, ACCOUNTS[number % 2], self.request(), told=False)
        phase.end = time.monotonic()
        return phase

    async def patient(self) -> Phase:
        phase = self._loaded()
        async with asyncio.TaskGroup() as clients:
            for number in range(OVERLOAD * NODES * SLOTS):
                clients.create_task(self.client(phase, ACCOUNTS[number % 2]))
        return phase

    async def client(self, phase: Phase, account: str) -> None:
        while time.monotonic() < phase.end:
            request, told = self.request(), False
            while (seconds := await self.ask(phase, account, request, told=told)) is not None:
                told = True
                if time.monotonic() + seconds > phase.end:
                    return
                await asyncio.sleep(seconds)

    async def flood(self) -> Phase:
        phase = self._loaded()
        usual = FIRST_TOKEN_SECONDS + sum(ANSWER_TOKENS) / 2 / TOKENS_PER_SECOND
        per_second = OVERLOAD * NODES * SLOTS / usual
        async with asyncio.TaskGroup() as requests:
            while time.monotonic() < phase.end:
                await asyncio.sleep(self.random.expovariate(per_second))
                requests.create_task(self.passer_by(phase, self.random.choice(ACCOUNTS)))
        return phase

    async def passer_by(self, phase: Phase, account: str) -> None:
        comes_back = self.random.random() < COME_BACK
        request, told = self.request(), False
        while (seconds := await self.ask(phase, account, request, told=told)) is not None:
            told = True
            if not comes_back or time.monotonic() + seconds > phase.end:
                return
            await asyncio.sleep(seconds)

    def _loaded(self) -> Phase:
        start = time.monotonic() + self.options.warm_up
        return Phase(start, start + self.options.seconds)

    def request(self) -> bytes:
        prompt = " ".join([f"{self.random.randrange(1 << 32):08x}" for _ in range(8)])
        tokens = self.random.randint(*ANSWER_TOKENS)
        asked = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        return json.dumps({**asked, "stream_options": {"include_usage": True}}).encode()

    async def ask(self, phase: Phase, account: str, request: bytes, *, told: bool) -> float | None:
        """None when it was answered, else the seconds after which it is to come again."""
        began, counted = time.monotonic(), phase.open
        headers = {"authorization": f"Bearer {self.keys[account]}", "content-type": "application/json"}
        async with self.session.post(self.url, data=request, headers=headers) as response:
            if counted:
                phase.asked[account] += 1
                if told:
                    phase.came_back[response.status == 200] += 1
            if response.status != 200:
                body = await response.json()
                if response.status not in (429, 503):
                    raise SystemExit(f"{response.status}: {body}")
                seconds = float(response.headers["retry-after"])
                if counted:
                    phase.refused[f"{response.status} {body['error']['code']}"] += 1
                    phase.told_seconds.append(seconds)
                return seconds
            first = True
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if first and event["choices"] and event["choices"][0]["text"]:
                    first = False
                    if counted:
                        phase.ttft_seconds.append(time.monotonic() - began)
                if event.get("usage") and phase.open:
                    phase.answers += 1
                    phase.tokens[account] += event["usage"]["total_tokens"]
                if "error" in event:
                    raise SystemExit(str(event))
        return None


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else 0.0


def share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


if __name__ == "__main__":
    raise SystemExit(main())
