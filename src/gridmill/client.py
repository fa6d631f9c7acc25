"""The terminal's side of the API: `gridmill chat` and `gridmill models`, over the same HTTP that every user has."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from gridmill.settings_loader import SettingsError, load, setting

DEFAULT_DATA = Path("~/.gridmill").expanduser()
CREDENTIALS_FILE = "client.json"
EVENT_BYTES_MAX = 1 << 20  # one SSE event; a final chunk with top logprobs is a few kilobytes


@dataclass(frozen=True)
class ClientSettings:
    """Where to ask and with which key. `gridmill up` leaves both in DATA/client.json for this user alone."""

    data: Path = setting(DEFAULT_DATA, help="folder whose client.json holds the URL and key that `gridmill up` made")
    base_url: str | None = setting(None, help="the network's URL, with or without /v1")
    api_key: str | None = setting(
        None, help="API key (better in GRIDMILL_API_KEY than on the command line)", secret=True
    )
    model: str | None = setting(None, help="model name (default: the first that the network serves)")
    system: str | None = setting(None, help="system message")
    temperature: float | None = setting(None, help="0 for the likeliest answer")
    max_tokens: int | None = setting(None, help="longest answer, in tokens")
    min_tokens: int | None = setting(None, help="shortest answer, in tokens: it goes on where the model would end")
    seed: int | None = setting(None, help="the same seed gives the same answer")
    ca_file: Path | None = setting(None, help="PEM file with the authority that signed the network's certificate")
    json: bool = setting(False, help="print JSON instead of text")


class ClientError(Exception):
    """The request failed; the message says what to do."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer, with what the user felt: time to first token, and the rate after it."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float
    tokens_per_second: float
    finish_reason: str
    request_id: str
    nodes: tuple[str, ...]


def load_client_settings(
    flags: Mapping[str, object], environ: Mapping[str, str], known_elsewhere: frozenset[str]
) -> ClientSettings:
    settings = load(
        ClientSettings, flags=flags, environ=environ, toml_path=None, table="client", known_elsewhere=known_elsewhere
    )
    if settings.api_key and not (settings.api_key.isascii() and settings.api_key.isprintable()):
        raise SettingsError("the API key holds characters that no key has: is there more than the key in it?")
    if settings.base_url and "://" not in settings.base_url:
        raise SettingsError(f"--base-url {settings.base_url} must begin with http:// or https://")
    if settings.base_url and settings.api_key:
        return settings
    saved = read_credentials(settings.data)
    base_url, api_key = settings.base_url or saved.get("base_url"), settings.api_key or saved.get("api_key")
    if not base_url or not api_key:
        raise SettingsError(
            f"no network to talk to: start one with `gridmill up`, or give --base-url and GRIDMILL_API_KEY "
            f"({settings.data / CREDENTIALS_FILE} holds neither)"
        )
    return ClientSettings(**{**settings.__dict__, "base_url": base_url, "api_key": api_key})


def read_credentials(data: Path) -> dict[str, str]:
    try:
        saved = json.loads((data / CREDENTIALS_FILE).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(saved, dict):
        return {}
    return {name: value for name, value in saved.items() if isinstance(value, str)}


def save_credentials(data: Path, base_url: str, api_key: str) -> None:
    """For this user alone: whoever reads it can spend the key."""
    path = data / CREDENTIALS_FILE
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_text(json.dumps({"base_url": base_url, "api_key": api_key}))
    part.replace(path)


class Client:
    """One HTTP session to one network."""

    def __init__(self, settings: ClientSettings, clock: Callable[[], float] = time.perf_counter) -> None:
        assert settings.base_url is not None
        base = settings.base_url.rstrip("/")
        self._base = base if base.endswith("/v1") else base + "/v1"
        self._settings = settings
        self._clock = clock

    async def __aenter__(self) -> Client:
        trust = ssl.create_default_context(cafile=str(self._settings.ca_file)) if self._settings.ca_file else True
        self._http = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {self._settings.api_key}"},
            connector=aiohttp.TCPConnector(ssl=trust),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300),
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.close()

    async def models(self) -> list[dict[str, Any]]:
        async with self._request("GET", "/models") as response:
            await _checked(response)
            return list((await response.json())["data"])

    async def quote(self, **asked: Any) -> dict[str, Any]:
        """What a request would hold and cost, in nanocredits. Raises ClientError."""
        async with self._request("POST", "/quote", json=asked) as response:
            await _checked(response)
            return dict(await response.json())

    async def chat(self, messages: list[dict[str, str]], model: str, show: Callable[[str], None]) -> Answer:
        """Streams one answer; `show` gets each piece of text as it comes. Raises ClientError."""
        settings = self._settings
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for name in ("temperature", "max_tokens", "min_tokens", "seed"):
            if getattr(settings, name) is not None:
                body[name] = getattr(settings, name)
        began = self._clock()
        first = last = 0.0
        text: list[str] = []
        usage: dict[str, int] = {}
        ending: dict[str, Any] = {}
        finish_reason = ""
        async with self._request("POST", "/chat/completions", json=body) as response:
            await _checked(response)
            async for event in _events(response):
                if "error" in event:
                    raise ClientError(f"the answer broke off: {event['error'].get('message', 'unknown error')}")
                usage = event.get("usage") or usage
                ending = event.get("gridmill") or ending
                for choice in event["choices"]:
                    piece = choice["delta"].get("content")
                    if piece:
                        last = self._clock()
                        first = first or last
                        text.append(piece)
                        show(piece)
                    finish_reason = choice["finish_reason"] or finish_reason
        if not finish_reason:
            raise ClientError("the answer broke off: the connection ended before its last event")
        tokens = usage.get("completion_tokens", 0)
        return Answer(
            text="".join(text),
            model=model,
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=tokens,
            ttft_seconds=(first or self._clock()) - began,
            tokens_per_second=(tokens - 1) / (last - first) if tokens > 1 and last > first else 0.0,
            finish_reason=finish_reason,
            request_id=ending.get("request_id", ""),
            nodes=tuple(ending.get("nodes", ())),
        )

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        return self._http.request(method, self._base + path, **arguments)


async def run_models(settings: ClientSettings, out: TextIO) -> int:
    async with Client(settings) as client:
        cards = await client.models()
    if settings.json:
        print(json.dumps(cards), file=out)
        return 0
    print(
        table(
            ("MODEL", "CLASS", "CONTEXT", "OWNER", ""),
            [
                (
                    card["id"],
                    str(card.get("gridmill", {}).get("class_id", ""))[:8],
                    str(card.get("gridmill", {}).get("context_tokens", "")),
                    card["owned_by"],
                    "toy" if card.get("gridmill", {}).get("toy") else "",
                )
                for card in cards
            ],
        )
        if cards
        else "No model is served yet: start a node with `gridmill node --network URL --model NAME`.",
        file=out,
    )
    return 0


async def run_quote(
    settings: ClientSettings, counted: Mapping[str, Any], show_credits: Callable[[int], str], out: TextIO
) -> int:
    """`counted` is input_tokens or prompt."""
    async with Client(settings) as client:
        quote = await client.quote(model=settings.model, max_tokens=settings.max_tokens, **counted)
    if settings.json:
        print(json.dumps(quote), file=out)
        return 0
    print(f"{quote['input_tokens']} tokens in, at most {quote['max_tokens']} out, for {quote['model']}", file=out)
    if not quote["offers"]:
        print("No node serves it at the moment.", file=out)
    elif not quote["hold_nanocredits"]:
        print("It costs nothing.", file=out)
    else:
        print(
            f"held when it begins: {show_credits(quote['hold_nanocredits'])} credits; with all tokens used at the "
            f"cheapest node it costs {show_credits(quote['least_nanocredits'])}. "
            f"Your account has {show_credits(quote['available_nanocredits'])}.\n\n"
            + table(
                ("NODES", "INPUT", "CACHED", "OUTPUT", "FEE", "AT MOST"),
                [
                    (
                        str(offer["nodes"]),
                        *(str(offer[f"{kind}_nanocredits"]) for kind in ("input", "cached_input", "output")),
                        f"{offer['fee_basis_points'] / 100:g} %",
                        show_credits(offer["most_nanocredits"]),
                    )
                    for offer in quote["offers"]
                ],
            )
            + "\n(nanocredits per token; credits at most)",
            file=out,
        )
    return 0


async def run_chat(settings: ClientSettings, question: str | None, out: TextIO) -> int:
    """One question, or a conversation when none is given. Ctrl-D ends it."""
    async with Client(settings) as client:
        model = settings.model
        if model is None:
            cards = await client.models()
            if not cards:
                raise ClientError("the network serves no model yet: start a node with `gridmill node`")
            model = str(cards[0]["id"])
        messages = [{"role": "system", "content": settings.system}] if settings.system else []
        interactive = question is None and sys.stdin.isatty()
        if interactive:
            print(f"Chatting with {model}. Ctrl-D ends.", file=sys.stderr)
        while True:
            line = question if question is not None else await _ask(interactive)
            if line is None:
                return 0
            if not line.strip():
                if question is not None:
                    raise ClientError("the question is empty")
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = await client.chat(messages, model, _shower(out, quiet=settings.json))
            except ClientError as problem:
                if not interactive:
                    raise
                print(f"\n{problem}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer.text})
            if settings.json:
                print(json.dumps(answer.__dict__), file=out, flush=True)
            else:
                print(file=out)
                rate = f", then {answer.tokens_per_second:.0f} tokens/s" if answer.completion_tokens > 10 else ""
                print(
                    f"[{answer.completion_tokens} tokens, first after {answer.ttft_seconds * 1000:.0f} ms{rate}"
                    f"{_who(answer.nodes)}]",
                    file=sys.stderr,
                )
            if question is not None:
                return 0


def _who(nodes: Sequence[str]) -> str:
    """Worth a word when an answer went from node to node."""
    return f"; begun by {nodes[0]}, finished by {nodes[-1]}" if len(nodes) > 1 else ""


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as what stands in them."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _shower(out: TextIO, *, quiet: bool) -> Callable[[str], None]:
    def show(piece: str) -> None:
        if not quiet:
            # A model's text is a stranger's: control characters could rewrite the terminal.
            out.write("".join(c for c in piece if c.isprintable() or c in "\n\t"))
            out.flush()

    return show


async def _ask(interactive: bool) -> str | None:
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    # A thread of its own that nobody waits for at the end: a read of the terminal cannot be cancelled.
    loop = asyncio.get_running_loop()
    read: asyncio.Future[str] = loop.create_future()

    def answered(line: str) -> None:
        if not read.done():
            read.set_result(line)

    def body() -> None:
        line = sys.stdin.readline()
        with contextlib.suppress(RuntimeError):  # the loop is closed: Ctrl-C came first
            loop.call_soon_threadsafe(answered, line)

    threading.Thread(target=body, name="gridmill-stdin", daemon=True).start()
    line = await read
    return line.rstrip("\n") if line else None


async def _checked(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    raw = await response.text()
    try:
        message = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = raw[:300] or response.reason
    raise ClientError(f"{response.status}: {message}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    held = b""
    async for data in response.content.iter_any():
        held += data
        *events, held = held.split(b"\n\n")
        if len(held) > EVENT_BYTES_MAX:
            raise ClientError("the network sent an endless event")
        for event in events:
            payload = event.removeprefix(b"data: ")
            if payload == b"[DONE]":
                return
            yield json.loads(payload)
