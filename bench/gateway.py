"""What the gateway costs: added latency, loaded throughput, tokens relayed. Ours, LiteLLM and a plain proxy, one run.

The proxies stand before a mock upstream that answers at once; ours stands before a real node with the echo engine, over
a real link, with keys, metering, chat template, tokenizer and detokeniser on. All on this machine's cores together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
ANSWER_TOKENS = 8
STREAM_TOKENS = 256
STREAMS = 16
MESSAGES = [{"role": "user", "content": "What is Gridmill, and how do I join with my GPU?"}]


class Target:
    """One thing to ask: where, with which key and model, and which processes are its gateway."""

    def __init__(self, name: str, port: int, key: str, model: str, pids: list[int]) -> None:
        self.name = name
        self.port = port
        self.key = key
        self.model = model
        self.pids = pids

    def body(self, *, stream: bool, tokens: int) -> bytes:
        request: dict[str, Any] = {"model": self.model, "messages": MESSAGES, "max_tokens": tokens}
        return json.dumps({**request, "stream": True} if stream else request).encode()

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}", "content-type": "application/json"}

    def cpu_seconds(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(t.user + t.system for t in times)


# ---------------------------------------------------------------- the three measurements


def sequential(targets: list[Target], rounds: int, each: int) -> dict[str, dict[str, float]]:
    """One request at a time on a kept connection, the targets interleaved so that drift hits all alike."""
    seen: dict[str, list[float]] = {target.name: [] for target in targets}
    connections = {target.name: http.client.HTTPConnection("127.0.0.1", target.port) for target in targets}
    for round_number in range(rounds + 1):
        for target in targets:
            connection = connections[target.name]
            for _ in range(each):
                began = time.perf_counter()
                connection.request(
                    "POST", "/v1/chat/completions", target.body(stream=False, tokens=ANSWER_TOKENS), target.headers
                )
                answer = connection.getresponse()
                body = answer.read()
                took = time.perf_counter() - began
                assert answer.status == 200, (target.name, answer.status, body[:200])
                if round_number:  # the first round warms up
                    seen[target.name].append(took)
    for connection in connections.values():
        connection.close()
    return {name: spread(values) for name, values in seen.items()}


def loaded(target: Target, seconds: int) -> dict[str, float]:
    """wrk, one thread, 32 connections."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write('wrk.method = "POST"\n')
        script.write(f"wrk.body = [==[{target.body(stream=False, tokens=ANSWER_TOKENS).decode()}]==]\n")
        for name, value in target.headers.items():
            script.write(f'wrk.headers["{name}"] = "{value}"\n')
        script.flush()
        command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "--latency", "--timeout", "30s", "-s", script.name]
        printed = subprocess.run(
            [*command, f"http://127.0.0.1:{target.port}/v1/chat/completions"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)", printed)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    assert rate and p50 and p99, printed
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", printed)
    unit = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    return {
        "requests_per_second": float(rate[1]),
        "p50_ms": float(p50[1]) * unit[p50[2]],
        "p99_ms": float(p99[1]) * unit[p99[2]],
        "failed": float(bad[1]) if bad else 0.0,
    }


async def streaming(target: Target, seconds: float) -> dict[str, float]:
    """16 streams at once, one token per event, started again and again until the time is over."""
    events = 0
    body = target.body(stream=True, tokens=STREAM_TOKENS)
    deadline = time.perf_counter() + seconds

    async def reader(session: aiohttp.ClientSession) -> None:
        nonlocal events
        while time.perf_counter() < deadline:
            mine = 0
            tail = b""
            async with session.post(
                f"http://127.0.0.1:{target.port}/v1/chat/completions", data=body, headers=target.headers
            ) as answer:
                assert answer.status == 200, (target.name, answer.status, await answer.text())
                async for piece in answer.content.iter_any():
                    whole = tail + piece
                    mine += whole.count(b'"content":')
                    tail = whole[-9:]  # one byte short of what is counted, so nothing counts twice
            events += mine

    cpu = target.cpu_seconds()
    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(reader(session) for _ in range(STREAMS)))
    took = time.perf_counter() - began
    cpu = target.cpu_seconds() - cpu
    return {
        "events_per_second": events / took,
        "gateway_cpu_seconds": cpu,
        "events_per_core_second": events / cpu if cpu else 0.0,
    }


def spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {
        "count": float(len(values)),
        "p50_ms": cuts[49] * 1000,
        "p95_ms": cuts[94] * 1000,
        "p99_ms": cuts[98] * 1000,
    }


# ---------------------------------------------------------------- the processes


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, path: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            connection.getresponse().read()
            return
        time.sleep(0.2)
    raise SystemExit(f"nothing answers on port {port}")


@contextlib.contextmanager
def all_targets(peers: Path | None, folder: Path) -> Iterator[list[Target]]:
    with contextlib.ExitStack() as stack:
        upstream = free_port()
        stack.enter_context(running([sys.executable, str(HERE / "mock_upstream.py"), str(upstream)]))
        wait_for(upstream, "/")
        targets = [Target("mock upstream, asked directly", upstream, "none", "mock", [])]
        targets.append(ours(stack, folder / "priced", "gridmill", "50/400"))
        targets.append(ours(stack, folder / "free", "gridmill, without prices", None))
        if peers is not None:
            targets.append(plain(stack, peers, upstream, "aiohttp"))
            targets.append(plain(stack, peers, upstream, "httpx"))
            targets.append(litellm(stack, peers, upstream, folder))
        yield targets


def ours(stack: contextlib.ExitStack, data: Path, name: str, price: str | None) -> Target:
    """A network and an echo node. With a price every request is held for, settled and receipted; without one all but
    the ledger's entries is written just the same."""
    gridmill = [sys.executable, "-m", "gridmill"]
    quiet = ["--log-level", "error", "--json"]
    network = stack.enter_context(
        running([*gridmill, "network", "--port", "0", "--data", str(data / "network"), *quiet], stdout=subprocess.PIPE)
    )
    assert network.stdout is not None
    base_url = json.loads(network.stdout.readline())["base_url"]
    made = subprocess.run(
        [*gridmill, "keys", "create", "bench", "--json", "--data", str(data / "network")],
        capture_output=True,
        text=True,
        check=True,
    )
    credit = [*gridmill, "credit", "bench", "1000000", "--data", str(data / "network")]
    subprocess.run(credit, check=True, stdout=subprocess.DEVNULL)
    prices = ["--price", price] if price else []
    node = stack.enter_context(
        running(
            [
                *gridmill,
                "node",
                "--network",
                base_url,
                "--engine",
                "echo",
                "--data",
                str(data / "node"),
                *prices,
                *quiet,
            ],
            stdout=subprocess.PIPE,
        )
    )
    assert node.stdout is not None
    model = json.loads(node.stdout.readline())["model"]
    port = int(base_url.rsplit(":", 1)[1].split("/")[0])
    wait_for_model(port, json.loads(made.stdout)["api_key"], model)
    workers = [child.pid for child in psutil.Process(network.pid).children()]
    return Target(name, port, json.loads(made.stdout)["api_key"], model, [network.pid, *workers])


def wait_for_model(port: int, key: str, model: str) -> None:
    for _ in range(100):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        if model in connection.getresponse().read().decode():
            return
        time.sleep(0.1)
    raise SystemExit(f"{model} never appeared")


def plain(stack: contextlib.ExitStack, peers: Path, upstream: int, client: str) -> Target:
    port = free_port()
    environment = {**os.environ, "UPSTREAM": f"http://127.0.0.1:{upstream}/v1/chat/completions"}
    process = stack.enter_context(
        running([str(peers / "bin/python"), str(HERE / "plain_proxy.py"), str(port), client], env=environment)
    )
    wait_for(port, "/")
    return Target(f"plain Starlette + {client} proxy", port, "sk-bench", "mock", [process.pid])


def litellm(stack: contextlib.ExitStack, peers: Path, upstream: int, folder: Path) -> Target:
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: mock\n    litellm_params:\n      model: openai/mock\n"
        f"      api_base: http://127.0.0.1:{upstream}/v1\n      api_key: none\n"
        "general_settings:\n  master_key: sk-bench\nlitellm_settings:\n  telemetry: false\n"
    )
    environment = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "DISABLE_ADMIN_UI": "True",
        "NO_DOCS": "True",
    }
    command = [str(peers / "bin/litellm"), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    process = stack.enter_context(
        running(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    )
    wait_for(port, "/health/liveliness")
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    return Target("LiteLLM proxy", port, "sk-bench", "mock", [process.pid, *children])


# ---------------------------------------------------------------- the report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, default=ROOT / ".bench-venv", help="environment with litellm[proxy]")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gateway.json")
    parser.add_argument("--seconds", type=int, default=10, help="length of each loaded and streaming run")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    peers = arguments.peers if (arguments.peers / "bin/litellm").exists() else None
    if peers is None:
        print("no LiteLLM installed (`make bench` does that): ours alone", file=sys.stderr)
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed (on Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory() as folder, all_targets(peers, Path(folder)) as targets:
        result: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
            "answer_tokens": ANSWER_TOKENS,
            "sequential": sequential(targets, arguments.rounds, 25),
            "loaded_32_connections": {},
            "streaming_16": {},
        }
        for target in targets:
            result["loaded_32_connections"][target.name] = loaded(target, arguments.seconds)
        for target in targets:
            result["streaming_16"][target.name] = asyncio.run(streaming(target, arguments.seconds))
    direct = result["sequential"]["mock upstream, asked directly"]["p50_ms"]
    for measured in result["sequential"].values():
        measured["added_p50_ms"] = measured["p50_ms"] - direct
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor()


def show(result: dict[str, Any]) -> None:
    print(f"{'':34} added p50   loaded req/s   p50      stream events/s   per core-second")
    for name, measured in result["sequential"].items():
        load, stream = result["loaded_32_connections"][name], result["streaming_16"][name]
        print(
            f"{name:34} {measured['added_p50_ms']:6.2f} ms   {load['requests_per_second']:10.0f}   "
            f"{load['p50_ms']:6.1f} ms   {stream['events_per_second']:12.0f}   {stream['events_per_core_second']:12.0f}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
