"""Nodes that break on purpose: cables that are cut or frozen, programs that are killed or stand still, and what their
callers saw of it.

- Every node dials through a `Cable`, a TCP proxy of its own. A node signs the host that it dialled, so a cable listens
  at the network's port on another loopback address.
- Cables live on a thread of their own: they carry on while a test waits for a program.
- An `Asked` is one request and all that came back, with the moment of each event, so that a fault can strike after any
  number of tokens and the pause can be measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import aiohttp
from programs import Place, Program, gridmill, place, until

from gridmill.network.control import call

QUIET = ["--log-level", "warning"]
LOGPROBS_DIFFER_MAX = 1e-4
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset and nothing else

FaultKind = Literal["kill", "stop", "cut", "freeze", "drain"]
FAULTS: tuple[FaultKind, ...] = ("kill", "stop", "cut", "freeze", "drain")


# ---------------------------------------------------------------- cables


class Cables:
    """The thread on which all cables of a test run."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._cables: list[Cable] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="cables", daemon=True)
        self._thread.start()

    def lay(self, port: int) -> Cable:
        """A cable to the network at 127.0.0.1:port, from the next loopback address that is free."""
        cable = Cable(self._loop, f"127.0.0.{len(self._cables) + 2}", port)
        self._cables.append(cable)
        return cable

    def close(self) -> None:
        for cable in self._cables:
            cable.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Cable:
    """A line between one node and the network that can be cut and frozen. Every method returns when it is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.bytes_to_network = 0
        self.bytes_to_node = 0
        self._loop = loop
        self._ends: set[_End] = set()
        self._frozen = False
        self._unplugged = False
        self._server: asyncio.Server = self._do(self._listen)

    @property
    def address(self) -> str:
        """What the node dials."""
        return f"http://{self.host}:{self.port}"

    def cut(self) -> None:
        """Resets what is connected; whoever dials again gets through."""
        self._do(self._cut)

    def unplug(self) -> None:
        """Resets what is connected, and whoever dials, until `plug`."""
        self._unplugged = True
        self._do(self._cut)

    def plug(self) -> None:
        self._unplugged = False

    def freeze(self) -> None:
        """Nothing passes any more, in either direction, and nobody is told."""
        self._do(self._freeze)

    def thaw(self) -> None:
        """What was held up passes now, in order."""
        self._do(self._thaw)

    def close(self) -> None:
        self._unplugged = True
        self._do(self._close)

    def _do(self, action: Callable[[], Any]) -> Any:
        async def run() -> Any:
            done = action()
            return await done if asyncio.iscoroutine(done) else done

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await self._loop.create_server(lambda: _End(self), self.host, self.port)

    def _cut(self) -> None:
        for end in tuple(self._ends):
            end.abort()

    def _freeze(self) -> None:
        self._frozen = True
        for end in self._ends:
            end.hold("frozen")

    def _thaw(self) -> None:
        self._frozen = False
        for end in tuple(self._ends):
            end.let_go("frozen")

    def _close(self) -> None:
        self._server.close()
        self._cut()

    # ------------------------------------------------------------ for its ends

    def joined(self, end: _End) -> None:
        self._ends.add(end)
        if self._unplugged:
            end.abort()
            return
        if self._frozen:
            end.hold("frozen")
        if end.other is None:  # a node dialled: nothing of it is read until the network has answered
            end.hold("dialling")
            end.dialling = self._loop.create_task(self._dial(end))

    async def _dial(self, end: _End) -> None:
        try:
            await self._loop.create_connection(lambda: _End(self, end), "127.0.0.1", self.port)
        except OSError:
            end.abort()  # the network is not there: neither is the cable
        else:
            end.let_go("dialling")

    def left(self, end: _End) -> None:
        self._ends.discard(end)
        if end.dialling is not None:
            end.dialling.cancel()


class _End(asyncio.Protocol):
    """One of the two sockets of a connection. What it reads, the other one writes."""

    def __init__(self, cable: Cable, other: _End | None = None) -> None:
        self.other = other
        self.dialling: asyncio.Task[None] | None = None
        self._from_node = other is None
        self._cable = cable
        self._held: set[str] = set()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self.other is not None:
            self.other.other = self
        self._cable.joined(self)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        if self._from_node:
            self._cable.bytes_to_network += len(data)
        else:
            self._cable.bytes_to_node += len(data)
        self.other._transport.write(data)

    def eof_received(self) -> None:
        if self.other is not None:
            self.other._transport.close()

    def connection_lost(self, problem: Exception | None) -> None:
        self._cable.left(self)
        if self.other is not None and not self.other._transport.is_closing():
            self.other._transport.close()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.hold("full")

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.let_go("full")

    def hold(self, why: str) -> None:
        if not self._held and not self._transport.is_closing():
            self._transport.pause_reading()
        self._held.add(why)

    def let_go(self, why: str) -> None:
        self._held.discard(why)
        if not self._held and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        found = self._transport.get_extra_info("socket")
        if found is not None and not self._transport.is_closing():
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        self._transport.abort()


# ---------------------------------------------------------------- nodes


class Node:
    """One node's program, its cable, and everything that can happen to it. Started again, it is the same node."""

    def __init__(self, here: Place, name: str, cable: Cable, arguments: Sequence[str]) -> None:
        self.name = name
        self.cable = cable
        self.data = here.folder / name
        self.node_id = ""
        self.model = ""
        self.program: Program
        self._here = here
        self._arguments = arguments
        self._leaving = False

    def launch(self) -> None:
        """Starts the program; `ready` waits for it, so that several can start at the same time."""
        dialled = ("--network", self.cable.address, "--data", self.data)
        self._leaving = False
        self.program = self._here.start("node", *dialled, *QUIET, *self._arguments, name=self.name)

    def ready(self) -> Node:
        self.program.ready()
        self.node_id = str(self.program.facts["node_id"])
        self.model = str(self.program.facts["model"])
        return self

    def start(self) -> Node:
        self.launch()
        return self.ready()

    @property
    def alive(self) -> bool:
        """Whether the program runs and was not told to leave."""
        return not self._leaving and self.program.process.poll() is None

    def suffer(self, fault: FaultKind) -> None:
        match fault:
            case "kill":
                self.program.kill()
            case "stop":
                os.kill(self.program.process.pid, signal.SIGSTOP)
            case "cut":
                self.cable.cut()
            case "freeze":
                self.cable.freeze()
            case "drain":
                self._leaving = True
                self.program.process.send_signal(signal.SIGTERM)

    def revive(self) -> None:
        """Lets a program that stands still go on, and a frozen cable thaw; what was on its way arrives now."""
        if self.alive:
            os.kill(self.program.process.pid, signal.SIGCONT)
        self.cable.thaw()
        self.cable.plug()


class Fleet:
    """A network with an API key, and nodes of different owners, each on its cable."""

    def __init__(self, here: Place, cables: Cables, arguments: Sequence[str], price: str | None, credit: int) -> None:
        self.here = here
        self.nodes: list[Node] = []
        self._price = ["--price", price] if price else []
        self._cables = cables
        self.network = here.network("--log-level", "info", *arguments)
        self.url: str = self.network.facts["base_url"]
        self.key = here.key()
        if credit:
            gridmill("credit", "tester", str(credit), "--data", self.folder)

    @property
    def folder(self) -> Path:
        return self.here.folder / "network"

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].split("/")[0])

    @property
    def model(self) -> str:
        return self.nodes[0].model

    def add(self, count: int, *arguments: str) -> list[Node]:
        """`count` more nodes, each its own owner, started at the same time."""
        added = []
        for _ in range(count):
            name = f"node {len(self.nodes) + 1}"
            node = Node(self.here, name, self._cables.lay(self.port), [*self._price, *arguments])
            node.launch()
            self.nodes.append(node)
            added.append(node)
        for node in added:
            node.ready()
        return added

    def node(self, node_id: str) -> Node:
        return next(node for node in self.nodes if node.node_id == node_id)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = call(self.folder, "status")
        return found

    def busiest(self) -> Node:
        """The node with the most works."""
        return self.node(max(self.status()["nodes"], key=lambda node: node["running"])["node_id"])

    def moves(self) -> list[dict[str, Any]]:
        """What the network's log says of works that left a node before their end: when, which, why, after how much."""
        lines = self.network.log.read_text().splitlines()
        return [json.loads(line) for line in lines if '"a work leaves a node"' in line]

    def serving(self) -> set[str]:
        """Ids of the nodes that may be given work now."""
        return {node["node_id"] for node in self.status()["nodes"] if node["models"] and not node["draining"]}

    def heal(self, seconds: float = 60.0) -> None:
        """Everything back as it was: every node here, nothing on any of them."""
        self.calm(seconds)
        absent = [node for node in self.nodes if not node.alive]
        for node in absent:
            node.program.process.wait(seconds)  # one that was told to leave may still be at it
            node.launch()
        for node in absent:
            node.ready()
        self.calm(seconds)

    def calm(self, seconds: float = 60.0) -> None:
        """Stopped programs go on and frozen cables thaw; returns when all nodes that live serve, and nothing runs."""
        for node in self.nodes:
            node.revive()
        wanted = {node.node_id for node in self.nodes if node.alive}
        until(lambda: self.serving() >= wanted, seconds)
        self.until_idle()

    def until_idle(self, seconds: float = 30.0) -> None:
        until(lambda: not self.status()["works_running"], seconds)

    def ask(self, asked: Iterable[Asked], strike: Callable[[], Any] | None = None) -> list[Asked]:
        """Sends all at once and returns when all are answered. `strike` runs beside them and may wait for them."""
        return asyncio.run(self.asking(list(asked), strike))

    async def asking(self, asked: list[Asked], strike: Callable[[], Any] | None = None) -> list[Asked]:
        timeout = aiohttp.ClientTimeout(total=300)
        headers = {"authorization": f"Bearer {self.key}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
            asyncio.TaskGroup() as group,
        ):
            for one in asked:
                group.create_task(one.run(session, self.url, self.model))
            if strike is not None:
                await strike()
        return asked

    def close(self) -> None:
        for node in self.nodes:
            if node.alive:
                node.revive()
        self.here.close()


@contextlib.contextmanager
def fleet(folder: Path, *arguments: str, price: str | None = None, credit: int = 0) -> Iterator[Fleet]:
    """A network of these arguments in a folder of its own; `credit` is what its one account has."""
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(place(folder))
        cables = Cables()
        stack.callback(cables.close)
        made = Fleet(here, cables, arguments, price, credit)
        stack.callback(made.close)
        yield made


def random_model(folder: Path, *, layers: int = 3, width: int = 64) -> Path:
    """A tiny Llama with the demo's tokenizer and weights so wide that every earlier id changes the next one.

    Written without torch, which takes longer to import than all the rest of this.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from gridmill.demo import demo_model_folder

    demo = demo_model_folder()
    vocab_size = json.loads((demo / "config.json").read_text())["vocab_size"]
    heads, key_heads, head = 4, 2, width // 4
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab_size, width),
    }
    for layer in range(layers):
        rest: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (heads * head, width),
            "self_attn.k_proj": (key_heads * head, width),
            "self_attn.v_proj": (key_heads * head, width),
            "self_attn.o_proj": (width, heads * head),
            "mlp.gate_proj": (2 * width, width),
            "mlp.up_proj": (2 * width, width),
            "mlp.down_proj": (width, 2 * width),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in rest.items()}
    chance = np.random.default_rng(1)
    weights = {
        name: (chance.normal(0.0, 0.15, shape) if len(shape) > 1 else chance.normal(1.0, 0.1, shape)).astype("float32")
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    return folder


# ---------------------------------------------------------------- requests and what came of them


class Asked:
    """One request. `events` counts what a streamed answer brought so far; the rest is there when it is answered."""

    def __init__(self, **body: Any) -> None:
        self.body = body
        self.status = 0
        self.first_node = ""  # as the head says
        self.request_id = ""
        self.moments: list[float] = []  # of each event of a stream that showed a text, by time.monotonic()
        self.began = 0.0
        self.ended = 0.0
        self.error: dict[str, Any] | None = None
        self.done = False  # a stream said [DONE], or a plain answer came whole
        self.nodes: list[str] = []
        self.usage: dict[str, Any] = {}
        self.texts: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.tokens: dict[int, list[str]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.reads = True  # set to False, it leaves what comes in the socket
        self._changed = asyncio.Event()

    def again(self) -> Asked:
        """The same request under another cache salt, so that no node has seen its prompt."""
        return Asked(**{**self.body, "cache_salt": f"{random.getrandbits(64):x}"})

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    async def reached(self, events: int) -> Asked:
        """Returns when so many events have come, or the answer has ended."""
        while len(self.moments) < events and not self.ended:
            self._changed.clear()
            await self._changed.wait()
        return self

    async def run(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        chat = "messages" in self.body
        body = {"model": model, **self.body}
        if self.streamed:
            body["stream_options"] = {"include_usage": True}
        self.began = time.monotonic()
        try:
            async with session.post(f"{url}/{'chat/completions' if chat else 'completions'}", json=body) as answer:
                self.status = answer.status
                self.first_node = answer.headers.get("x-gridmill-node", "")
                self.request_id = answer.headers.get("x-gridmill-request-id", "")
                if self.streamed and answer.status == 200:
                    await self._read(answer.content)
                else:
                    self._take(await answer.json())
                    self.done = answer.status == 200
        finally:
            self.ended = time.monotonic()
            self._changed.set()

    async def _read(self, content: aiohttp.StreamReader) -> None:
        async for line in content:
            while not self.reads:
                await asyncio.sleep(0.05)
            if line == b"data: [DONE]\n":
                self.done = True
            elif line.startswith(b"data: "):
                self._take(json.loads(line[6:]))

    def _take(self, part: dict[str, Any]) -> None:
        if "error" in part:
            self.error = part["error"]
            return
        for choice in part["choices"]:
            index = choice["index"]
            said = choice.get("delta") or choice.get("message") or {}
            text = choice.get("text") or said.get("content") or ""
            self.texts[index] = self.texts.get(index, "") + text
            if choice["finish_reason"] is not None:
                self.reasons[index] = choice["finish_reason"]
            self._score(index, choice.get("logprobs") or {})
            if text:
                self.moments.append(time.monotonic())
                self._changed.set()
        if part.get("usage"):
            self.usage = part["usage"]
        if "gridmill" in part:
            self.nodes = part["gridmill"]["nodes"]

    def _score(self, index: int, scored: dict[str, Any]) -> None:
        tokens, logprobs = self.tokens.setdefault(index, []), self.logprobs.setdefault(index, [])
        for entry in scored.get("content") or ():  # chat: the bytes tell ids apart that look alike
            for one in (entry, *entry["top_logprobs"]):
                tokens.append(f"{one['token']} {one['bytes']}")
                logprobs.append(one["logprob"])
        for token, logprob, top in zip(
            scored.get("tokens") or (),
            scored.get("token_logprobs") or (),
            scored.get("top_logprobs") or (),
            strict=True,
        ):
            # Two likely ids can lie closer together than float32 tells: which of them comes first says nothing.
            tokens.append(token)
            logprobs += [logprob, *sorted(top.values())]

    def differs(self, other: Asked) -> list[str]:
        """What a caller could tell apart, in sentences: ids as far as the API shows them, text, usage and price."""
        found = []
        for one in (self, other):
            if one.error is not None or not one.done:
                found.append(f"ended with status {one.status} and {one.error}")
        for name in ("texts", "reasons", "tokens", "usage"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                found.append(f"{name}: {_first_difference(mine, its)}")
        if self.tokens == other.tokens:
            for index, logprobs in self.logprobs.items():
                pairs = zip(logprobs, other.logprobs[index], strict=True)
                worst = max((abs(a - b) for a, b in pairs), default=0.0)
                if worst > LOGPROBS_DIFFER_MAX:
                    found.append(f"log probabilities of choice {index} are up to {worst} apart")
        return found

    def pause(self) -> tuple[float, float]:
        """(longest gap between two events, usual gap) of a stream, in seconds."""
        gaps = sorted(b - a for a, b in zip(self.moments, self.moments[1:], strict=False))
        return gaps[-1], gaps[len(gaps) // 2]


def _first_difference(mine: Any, its: Any) -> str:
    if isinstance(mine, dict) and isinstance(its, dict):
        for key in {**mine, **its}:
            if mine.get(key) != its.get(key):
                return f"{key}: {_first_difference(mine.get(key), its.get(key))}"
    if isinstance(mine, str | list) and isinstance(its, str | list):
        same = next((i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its)))
        near = slice(max(0, same - 8), same + 24)
        return f"{len(mine)} and {len(its)} long, different at {same}: {mine[near]!r} and {its[near]!r}"
    return f"{mine!r} and {its!r}"
