"""The network's composition root: the only place that constructs, and that looks at clocks and sockets.

Every background loop is a line in `run_network`'s task group; nothing else starts tasks that outlive a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from gridmill import __version__
from gridmill.network.accounts import Accounts, KeyId
from gridmill.network.admission import Admission
from gridmill.network.books import Books
from gridmill.network.control import ControlError, ControlServer, FolderLock
from gridmill.network.dispatch import Dispatcher
from gridmill.network.gateway.admin import PREFIX as ADMIN_PREFIX
from gridmill.network.gateway.admin import AdminApi
from gridmill.network.gateway.asgi import HttpProtocol, Receive, Scope, Send, WebSocketProtocol, send_bytes
from gridmill.network.gateway.idempotent import SharedAnswers
from gridmill.network.gateway.nodes import NodesApi
from gridmill.network.gateway.openai import OpenAIGateway
from gridmill.network.gateway.plain import Plain
from gridmill.network.gateway.usage import UsageApi
from gridmill.network.idempotency import Idempotency
from gridmill.network.journey import Patience
from gridmill.network.limits import Limits
from gridmill.network.links import Links
from gridmill.network.metering import FeePolicy
from gridmill.network.metrics import Metrics
from gridmill.network.operator import MIGRATIONS, Operations
from gridmill.network.receipts import Desk
from gridmill.network.registry import Registry
from gridmill.network.settings import NetworkSettings, is_loopback
from gridmill.network.settlement import GatewayId
from gridmill.network.store import Store, Transaction, store_at
from gridmill.network.text import TextService
from gridmill.wire.identity import Identity
from gridmill.wire.link import Link, NetworkSide, Reason
from gridmill.wire.messages import NodeId
from gridmill.wire.transport import WEBSOCKET_MESSAGE_BYTES_MAX, serve_asgi_websocket

log = logging.getLogger("gridmill.network")

GATEWAY_SECRET_BYTES = 32
CONNECTIONS_MAX = 4096  # beyond it newcomers get 503 at once rather than everybody a slow answer


async def run_network(
    settings: NetworkSettings,
    *,
    ready: Callable[[dict[str, Any], Operations], Awaitable[None]],
    stop: asyncio.Event,
    own_nodes: Collection[NodeId] = (),
) -> int:
    """Serves until `stop` is set, then drains. Raises ControlError, StoreUnusable or OSError when it cannot start."""
    _check_certificate(settings)
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FolderLock(settings.data / "network.lock", "gridmill network")
    store = store_at(settings.database or settings.data / "network.sqlite", wall_clock=time.time)
    texts = TextService(workers=settings.text_workers)
    try:
        await store.open(MIGRATIONS)
        with _listening(settings.host, settings.port) as listener:
            await texts.start()
            return await _serve(settings, listener, store, texts, ready, stop, own_nodes)
    finally:
        await texts.close()
        await store.close()
        lock.release()


async def _serve(
    settings: NetworkSettings,
    listener: socket.socket,
    store: Store,
    texts: TextService,
    ready: Callable[[dict[str, Any], Operations], Awaitable[None]],
    stop: asyncio.Event,
    own_nodes: Collection[NodeId],
) -> int:
    identity = Identity.load_or_create(settings.data / "network.key")
    gateway_secret = _gateway_secret(settings.data / "gateway.secret")
    base_url = _base_url(settings, listener)
    await _one_network(store, identity.public)
    accounts = Accounts(store, now=time.time, entropy=secrets.token_bytes)
    registry = Registry(
        store,
        approve=settings.approve_mode,
        own_nodes=own_nodes,
        fees=FeePolicy(fee_basis_points=settings.fee_basis_points),
        now=time.time,
        clock=time.monotonic,
        random=random.Random(secrets.randbits(64)),
    )
    holder = _gateway_id(settings.data / "gateway.id")
    books = Books(
        store,
        holder=holder,
        network_key=identity.public,
        clock=_unstoppable_clock,
        wall_ms=lambda: int(time.time() * 1000),
        entropy=secrets.token_bytes,
        period_seconds=settings.receipt_period_seconds,
        lease_seconds=settings.lease_seconds,
    )
    idempotency = Idempotency(store, holder=holder, lease_seconds=settings.lease_seconds)
    for heard in (accounts.changed, registry.heard, books.heard, idempotency.heard):
        store.listen(heard)
    await accounts.load()
    await registry.load()
    async with asyncio.TaskGroup() as tasks:
        links = Links(
            registry=registry,
            accounts=accounts,
            texts=texts,
            text_folder=settings.data / "text",
            invite_only=settings.invite_only,
            own_nodes=own_nodes,
            spawn=lambda work: void(tasks.create_task(work)),
            clock=time.monotonic,
        )
        desk = Desk(store, identity, links.send)
        links.receipts = desk
        books.send_receipts = desk.send
        store.listen(desk.heard)
        metrics = Metrics(links=lambda: links.count, works=lambda: links.works)
        admission = Admission(
            fleet=registry,
            clock=time.monotonic,
            observer=metrics,
            queue_timeout_seconds=settings.queue_timeout_seconds,
            resume_timeout_seconds=settings.resume_timeout_seconds,
            ttft_factor=settings.queue_ttft_factor,
            queue_places_factor=settings.queue_places_factor,
        )
        dispatcher = Dispatcher(
            registry=registry,
            links=links,
            books=books,
            observer=metrics,
            clock=time.monotonic,
            admission=admission,
            patience=Patience(
                gap_seconds=settings.stall_gap_seconds,
                gap_factor=settings.stall_gap_factor,
                first_token_seconds=settings.stall_first_token_seconds,
                first_token_factor=settings.stall_first_token_factor,
                alone_seconds=settings.resume_timeout_seconds,
            ),
        )
        shared = SharedAnswers(
            idempotency,
            books=books,
            dispatcher=dispatcher,
            spawn=lambda work: void(tasks.create_task(work)),
            clock=time.monotonic,
        )
        gateway = OpenAIGateway(
            registry=registry,
            accounts=accounts,
            texts=texts,
            dispatcher=dispatcher,
            books=books,
            limits=Limits(),
            metrics=metrics,
            shared=shared,
            body_bytes=settings.body_bytes,
            client_stall_timeout_seconds=settings.client_stall_timeout_seconds,
            clock=time.monotonic,
            wall_clock=time.time,
            request_ids=lambda: secrets.token_hex(12),
            gateway_secret=gateway_secret,
        )
        side = NetworkSide(
            identity=identity,
            hosts=_answers_to(settings, listener),
            software=f"gridmill/{__version__}",
            heartbeat_seconds=settings.heartbeat_seconds,
        )

        def revoked(key_ids: Collection[KeyId]) -> None:
            dispatcher.revoke(key_ids)
            links.revoke(key_ids)

        accounts.revoked = revoked
        operations = Operations(
            accounts,
            registry,
            store=store,
            links=links,
            dispatcher=dispatcher,
            base_url=base_url,
            local_url=_local_url(settings, listener),
            network_key=identity.public.hex(),
            identity=identity,
        )
        plain = Plain(
            accounts=accounts,
            limits=gateway.limits,
            clock=time.monotonic,
            request_ids=gateway.request_ids,
            metrics=metrics,
            client_stall_timeout_seconds=settings.client_stall_timeout_seconds,
        )
        usage = UsageApi(plain, accounts=accounts, registry=registry, texts=texts, store=store, wall_clock=time.time)
        nodes = NodesApi(plain, registry=registry, store=store, clock=time.monotonic)
        admin = AdminApi(plain, operations, base_urls=(base_url, operations.local_url))
        control = ControlServer(settings.data, operations.commands())
        server = _Server(
            uvicorn.Config(
                Door(gateway=gateway, usage=usage, nodes=nodes, admin=admin, links=links, side=side, metrics=metrics),
                http=HttpProtocol,
                ws=WebSocketProtocol,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # the link has its own heartbeat
                ws_max_size=WEBSOCKET_MESSAGE_BYTES_MAX,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
                limit_concurrency=CONNECTIONS_MAX,
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
            )
        )
        loops = [
            tasks.create_task(loop, name=name)
            for name, loop in (
                ("books", books.run()),
                ("leases", books.keep()),
                ("receipts", desk.run()),
                ("accounts", accounts.watch()),
                ("names", registry.watch()),
                ("idempotency", idempotency.keep()),
            )
        ]
        await books.recover()
        await links.relearn()
        serving = tasks.create_task(server.serve(sockets=[listener]), name="http")
        await control.start()
        try:
            gc.collect()
            gc.freeze()  # what the program is made of is never garbage: a full collection need not look at it
            await ready({"base_url": base_url, "model": None}, operations)
            log.info(
                "network ready", extra={"base_url": base_url, "join": "invite" if settings.invite_only else "open"}
            )
            await _either(stop, serving)
            await _drain(dispatcher, links, settings.drain_timeout_seconds)
        finally:
            await shared.close()  # while nodes are here: it is not they who break off
            links.say_goodbye(Reason.STOPPING, "the network is shutting down")
            server.should_exit = True
            await control.stop()
            await books.close()
            for loop in loops:
                loop.cancel()
    return 0


async def _one_network(store: Store, network_key: bytes) -> None:
    """All gateways of one database are one network: receipts are signed with its key. Raises ControlError."""

    async def first_or_same(transaction: Transaction) -> bytes:
        await transaction.do("INSERT INTO network_key (one, key) VALUES (1, ?) ON CONFLICT DO NOTHING", network_key)
        row = await transaction.one("SELECT key FROM network_key")
        assert row is not None
        return bytes(row[0])

    known = await store.run(first_or_same)
    if known != network_key:
        raise ControlError(
            f"this database belongs to the network with key {known.hex()}, not {network_key.hex()}: copy network.key "
            "and gateway.secret from a data folder of that network, or use another --database"
        )


def _unstoppable_clock() -> float:
    """Monotonic seconds that go on while the machine sleeps: a lease must not outlive a closed lid."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _gateway_id(path: Path) -> GatewayId:
    """Who this gateway is in the books: what it left behind when it was killed is found under the same name."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(f"gateway-{secrets.token_hex(8)}\n")
        part.replace(path)
    return GatewayId(path.read_text().strip())


class Door:
    """The one ASGI application: paths to endpoints. The two hot ones are looked up first."""

    def __init__(
        self,
        *,
        gateway: OpenAIGateway,
        usage: UsageApi,
        nodes: NodesApi,
        admin: AdminApi,
        links: Links,
        side: NetworkSide,
        metrics: Metrics,
    ) -> None:
        self._gateway = gateway
        self._usage = usage
        self._nodes = nodes
        self._admin = admin
        self._links = links
        self._side = side
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"], scope["path"]:
            case "http", "/v1/chat/completions":
                await self._gateway.chat_completions(scope, receive, send)
            case "http", "/v1/completions":
                await self._gateway.completions(scope, receive, send)
            case "http", "/v1/models":
                await self._gateway.models(scope, receive, send)
            case "http", str(path) if path.startswith("/v1/models/"):
                await self._gateway.model(scope, receive, send)
            case "http", "/v1/usage":
                await self._usage.usage(scope, receive, send)
            case "http", "/v1/nodes":
                await self._nodes(scope, receive, send)
            case "http", "/v1/quote":
                await self._usage.quote(scope, receive, send)
            case "http", str(path) if path.startswith(ADMIN_PREFIX):
                await self._admin(scope, receive, send)
            case "http", "/healthz":
                await send_bytes(send, 200, b'{"status":"ok"}\n', b"application/json", _request_id())
            case "http", "/metrics":
                body, kind = self._metrics.exposition(), self._metrics.content_type.encode()
                await send_bytes(send, 200, body, kind, _request_id())
            case "websocket", "/link":
                await serve_asgi_websocket(scope, receive, send, self._make_link, self._links.converse)
            case "websocket", _:
                await receive()
                await send({"type": "websocket.close", "code": 4404})
            case _:
                await self._gateway.unknown_path(scope, receive, send)

    def _make_link(self) -> Link:
        return Link(self._side, entropy=secrets.token_bytes, now=time.monotonic())


def _request_id() -> list[tuple[bytes, bytes]]:
    return [(b"x-gridmill-request-id", f"req-{secrets.token_hex(12)}".encode())]


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: `stop` is the one way to end the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _drain(dispatcher: Dispatcher, links: Links, timeout_seconds: float) -> None:
    dispatcher.stop_admitting()
    if links.works:
        log.warning("draining", extra={"works": links.works, "timeout_seconds": timeout_seconds})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await links.idle()


async def _either(stop: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """Waits for the wish to stop, or for the server to end by itself (its error is raised by the task group)."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((bare, port))
        except OSError as problem:
            raise OSError(
                f"cannot listen on {host}:{port} ({problem.strerror}): choose another --port (0 takes any free one)"
            ) from problem
        listener.listen(1024)
        yield listener
    finally:
        listener.close()


def _check_certificate(settings: NetworkSettings) -> None:
    """Before anything is opened: a file that cannot be used is one sentence. Raises ControlError."""
    if settings.tls_certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ssl.SSLError) as problem:
        raise ControlError(
            f"--tls-certificate {settings.tls_certificate} and --tls-key {settings.tls_key} cannot be used: {problem}"
        ) from problem


def _base_url(settings: NetworkSettings, listener: socket.socket) -> str:
    if settings.public_url:
        return settings.public_url.rstrip("/").removesuffix("/v1") + "/v1"
    return _local_url(settings, listener)


def _local_url(settings: NetworkSettings, listener: socket.socket) -> str:
    """How a program on this machine reaches the network."""
    port = listener.getsockname()[1]
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'https' if settings.tls_certificate else 'http'}://{shown}:{port}/v1"


def _answers_to(settings: NetworkSettings, listener: socket.socket) -> Callable[[str], bool]:
    """Which hosts a node may say it dialled. A relay would have to make it say one of these (docs/attacks.md)."""
    port = str(listener.getsockname()[1])
    public = urlsplit(settings.public_url).netloc.lower() if settings.public_url else ""
    anywhere = settings.host in ("0.0.0.0", "::")
    own_names = {settings.host.strip("[]").lower()}
    if anywhere:
        own_names |= {socket.gethostname().lower(), socket.getfqdn().lower(), *_own_addresses()}

    def answers(host: str) -> bool:
        host = host.lower()
        if public and host == public:
            return True
        name, _, dialled_port = host.rpartition(":") if ":" in host.rpartition("]")[2] else (host, "", "")
        bare = name.strip("[]")
        local = is_loopback(bare) and (anywhere or is_loopback(settings.host))
        return (local or bare in own_names) and dialled_port == port

    return answers


def _own_addresses() -> set[str]:
    import psutil  # late: only a network that listens on every interface needs to know them

    return {
        address.address.partition("%")[0].lower()
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def _gateway_secret(path: Path) -> bytes:
    """The key of seeds that clients did not choose; kept so that a restart does not change running audits."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.touch(mode=0o600)
        part.write_bytes(secrets.token_bytes(GATEWAY_SECRET_BYTES))
        part.replace(path)
    secret = path.read_bytes()
    if len(secret) != GATEWAY_SECRET_BYTES:
        raise ControlError(f"{path} is damaged ({len(secret)} bytes): remove it, and a new one is made")
    return secret


def void(_: object) -> None:
    """For callbacks that must return nothing."""
