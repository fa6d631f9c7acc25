"""Killed at every commit and every await, and started again: nobody pays twice, nothing stays held, receipts match.

One scenario runs in a forked child: works that are short, long, free, cancelled, moved to another node, with a key's
budget, while leases are renewed and receipts are countersigned. Each time a coroutine of the books or of the receipts'
desk waits, and around each commit, is a point; the child is killed at the first, at the second, and so on to the last.
Then somebody recovers what is left, the same gateway at once or another one after the leases have ended, and the books
are audited. The clock is a fixed number, so a busy machine ends no lease.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

import pytest

from databases import Database
from gridmill.network import books as books_module
from gridmill.network import ledger, receipts
from gridmill.network.books import Books, GatewayId, Order, Payer, Server, Unavailable
from gridmill.network.metering import FREE, FeePolicy, PriceRow, Usage, most
from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import Action, Changed, Migration, Store, StoreUnusable, Transaction
from gridmill.wire import receipts as rules
from gridmill.wire.identity import Identity, node_id_of
from gridmill.wire.messages import AnyMessage, Countersignature, Countersigned, Leaf, NodeId, Price, Receipts
from postgres_server import Server as PostgresServer

T = TypeVar("T")
Fault = Literal["none", "kill", "kept but said to have failed", "disk full", "no room in the file system"]

NOW = 1_700_000_000.0  # all clocks of a child
LEASE_SECONDS = 0.06  # of that clock, which stands still; the books look after their leases four times in it
AFTER_LEASES = NOW + 10.0
CREDIT, BUDGET = 300_000, 20_000
NETWORK = Identity(b"n" * 32)
NODE_KEYS = [Identity(bytes([n]) * 32) for n in (1, 2)]
NODE_IDS = [node_id_of(key.public) for key in NODE_KEYS]
ROW = PriceRow("price-1", Price(50, 10, 400), FeePolicy())
CHEAPER = PriceRow("price-2", Price(20, 5, 100), FeePolicy())  # of a node that goes on with what another left
ALICE, BOB = Payer("alice", "key-1"), Payer("alice", "key-2", has_budget=True)
INPUT_TOKENS, MAX_TOKENS = 10, 8
POSTGRES_EVERY = 53  # of the points: a database of its own for each takes a while


# ---------------------------------------------------------------- the child: a scenario with points


class Points:
    """Counts where the program could die, and lets it die at one of them. What the caller knows goes to `diary`."""

    def __init__(self, fault: Fault, at: int, diary: Path, *, until: tuple[str, str] | None = None) -> None:
        self.fault = fault
        self.at = at
        self.count = 0
        self._until = until  # it is also killed when it writes this
        self._diary = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._unwritten = b""

    def reach(self) -> None:
        self.count += 1
        if self.fault == "kill" and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, *what: Any) -> None:
        self._unwritten += json.dumps(what).encode() + b"\n"
        if self.fault == "kill":
            self.write_up()  # before it happens; the others live on, and may have no room in the file system
        if what[:2] == self._until:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_up(self) -> None:
        os.write(self._diary, self._unwritten)
        self._unwritten = b""

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it with a point at each of its awaits, before and after."""
        return await _Watched(work, self)


class _Watched:
    def __init__(self, work: Coroutine[Any, Any, Any], points: Points) -> None:
        self._work = work
        self._points = points

    def __await__(self) -> Generator[Any, Any, Any]:
        running = self._work.__await__()
        failure: BaseException | None = None
        while True:
            try:
                waits_for = running.send(None) if failure is None else running.throw(failure)
            except StopIteration as ended:
                return ended.value
            failure = None
            self._points.reach()
            try:
                yield waits_for
            except BaseException as error:  # noqa: BLE001 - it is thrown where it belongs
                failure = error
            self._points.reach()


class FaultyStore:
    """A real store whose every commit can be the last thing that happened, or fail, or seem to fail."""

    def __init__(self, inner: Store, points: Points, wal: Path) -> None:
        self._inner = inner
        self._points = points
        self._wal = wal
        self.commits = 0

    async def open(self, migrations: Sequence[Migration]) -> None:
        await self._inner.open(migrations)

    def listen(self, changed: Changed) -> None:
        self._inner.listen(changed)

    async def close(self) -> None:
        await self._inner.close()

    async def read(self, action: Action[T]) -> T:
        return await self._inner.read(action)

    async def run(self, action: Action[T]) -> T:
        points = self._points
        self.commits += 1
        chosen = self.commits == points.at
        points.reach()
        if chosen and points.fault == "disk full":
            raise StoreUnusable("the disk is full: nothing of this was kept")
        full = chosen and points.fault == "no room in the file system"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full:
            size = self._wal.stat().st_size if self._wal.exists() else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

        async def and_a_point(transaction: Transaction) -> T:
            result = await action(transaction)
            points.reach()  # written and not committed
            return result

        try:
            result = await self._inner.run(and_a_point)
        finally:
            if full:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        points.reach()
        if chosen and points.fault == "kept but said to have failed":
            raise StoreUnusable("lost during a commit: whether it was kept is unknown")
        return result


def books_on(store: Store, holder: str, now: float = NOW) -> Books:
    return Books(
        store,
        holder=GatewayId(holder),
        network_key=NETWORK.public,
        clock=lambda: now,
        wall_ms=lambda: int(now * 1000),
        entropy=os.urandom,
        lease_seconds=LEASE_SECONDS,
    )


class Scenario:
    def __init__(self, books: Books, points: Points) -> None:
        self.books = books
        self.points = points

    async def begin(self, name: str, payer: Payer = ALICE, row: PriceRow = ROW, node: int = 0) -> Order:
        order = await self.admitted(name, payer, row)
        self.serve(order, row, node)
        return order

    async def admitted(self, name: str, payer: Payer = ALICE, row: PriceRow = ROW) -> Order:
        want = most(row, INPUT_TOKENS, MAX_TOKENS)
        self.points.note("held", name, want)
        for attempt in range(3):
            try:
                assert await self.points.watch(self.books.admit(payer, want, want)) == want
                break
            except Unavailable:  # as a caller who is told 503 asks again
                assert attempt < 2
        return self.books.order(payer, name, "c" * 64, "toy", INPUT_TOKENS, want)

    def serve(self, order: Order, row: PriceRow, node: int) -> None:
        server = Server(NODE_IDS[node], NODE_KEYS[node].public, f"owner-{node}", row)
        self.books.serve(order, server, b"\0\0\0\0" * INPUT_TOKENS, b"0123456789abcdef", 0)

    def deliver(self, order: Order, count: int) -> None:
        self.points.note("delivered", order.work_id, order.count + count)
        order.deliver(tuple(range(count)))

    def settle(self, order: Order, finish: Literal["stop", "cancelled"] = "stop", keep: int | None = None) -> None:
        used = Usage(INPUT_TOKENS, 0, order.count if keep is None else keep)
        self.points.note("settled", order.work_id, self.books.settle(order, used, finish), used.output_tokens)

    async def on_disk(self) -> None:
        await self.points.watch(self.books.flush())
        self.points.note("on disk")

    async def run(self) -> None:
        long = await self.begin("long")
        free = await self.begin("free", row=FREE)
        moved = await self.begin("moved")
        handed = await self.begin("handed")
        short = await self.begin("short")
        self.deliver(short, 5)
        self.deliver(handed, 3)
        self.settle(short)
        await self.on_disk()
        self.deliver(long, 2)
        self.deliver(free, 3)
        self.books.unserve(moved)  # its first node failed; another goes on with what is held
        self.serve(moved, ROW, 1)
        self.books.unserve(handed)  # its node broke off after three ids; a cheaper one goes on, later
        budget = await self.begin("budget", payer=BOB, node=1)
        nobody = await self.admitted("nobody")
        self.books.release(nobody)
        await self.on_disk()
        self.points.note("journalled", "handed", 3)
        self.serve(handed, CHEAPER, 1)
        self.deliver(moved, 1)
        self.deliver(handed, 2)
        self.deliver(long, 4)
        cut = await self.begin("cut")
        self.deliver(cut, 6)
        await self.on_disk()
        self.settle(cut, keep=4)  # a stop string was found
        self.books.unserve(handed, forfeits=False)  # it drains, and keeps its pay for the prompt
        self.serve(handed, ROW, 0)
        self.settle(long)
        left = await self.begin("left", node=1)
        self.settle(left, "cancelled")
        self.deliver(budget, 8)
        await asyncio.sleep(LEASE_SECONDS / 3)  # the leases are renewed
        self.settle(budget)
        self.settle(free)
        self.deliver(handed, 1)
        self.settle(handed)
        await self.on_disk()
        last = await self.begin("last")
        self.deliver(last, 1)
        self.settle(last)
        self.settle(moved)
        await self.on_disk()


class Nodes:
    """Both nodes, who countersign what they are sent."""

    def __init__(self, points: Points) -> None:
        self.desk: receipts.Desk
        self._points = points

    def send(self, node_id: NodeId, message: AnyMessage) -> bool:
        self._points.reach()
        if isinstance(message, Receipts):
            key = NODE_KEYS[NODE_IDS.index(node_id)]
            signatures = []
            for signed in message.statements:
                said = signed.statement
                assert rules.signed_by_network(said, signed.signature)
                signature = rules.sign_as_node(key, said)
                signatures.append(Countersignature(said.class_id, said.period_start_seconds, said.seq, signature))
            asyncio.get_running_loop().call_soon(self.desk.countersigned, node_id, Countersigned(tuple(signatures)))
        return True


async def live(database: Database, points: Points) -> int:
    """A gateway's life from its start to its end; returns how many commits there were."""
    store = FaultyStore(database.store(wall_clock=lambda: NOW), points, Path(database.url + "-wal"))
    await store.open(MIGRATIONS)
    books = books_on(store, "gateway-1")
    nodes = Nodes(points)
    desk = nodes.desk = receipts.Desk(store, NETWORK, nodes.send)
    books.send_receipts = desk.send
    store.listen(books.heard)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        tasks = [group.create_task(points.watch(work)) for work in (books.run(), books.keep(), desk.run())]
        for node_id in NODE_IDS:
            desk.joined(node_id)
        for attempt in range(3):
            try:
                await points.watch(books.recover())
                break
            except StoreUnusable:  # the program ends with a sentence and is started again
                assert attempt < 2
        await Scenario(books, points).run()
        await points.watch(books.close())
        points.note("closed")
        for task in tasks:
            task.cancel()
    await store.close()
    return store.commits


async def recover(database: Database, points: Points, who: str) -> int:
    """The same gateway starts again; or another one finds, after a while, what was left."""
    now = NOW if who == "gateway-1" else AFTER_LEASES
    store = FaultyStore(database.store(wall_clock=lambda: now), points, Path(database.url + "-wal"))
    await store.open(MIGRATIONS)
    books = books_on(store, who, now)
    async with asyncio.timeout(60):
        await points.watch(books.recover())
        if who != "gateway-1":
            await points.watch(books._clean_up())
    await store.close()
    return store.commits


def in_a_child(points: Points, body: Callable[[Points], Awaitable[int]]) -> tuple[int, int] | None:
    """Points and commits that there were; None when it was killed. What it raises is raised here, as text."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there)
        try:
            books_module.TICK_SECONDS = 0.001
            commits = asyncio.run(body(points))  # type: ignore[arg-type]
            points.write_up()
            os.write(here, json.dumps([points.count, commits]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a fork must never go on as a second run of the tests
            os.write(here, traceback.format_exc()[-8000:].encode())
        finally:
            os._exit(1)
    os.close(here)
    with os.fdopen(there, "rb") as reader:
        said = reader.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL and points.fault == "kill"
        return None
    assert os.WEXITSTATUS(status) == 0, said.decode()
    count, commits = json.loads(said)
    return count, commits


# ---------------------------------------------------------------- the audit


def diary_of(path: Path) -> dict[str, dict[str, int]]:
    """What the caller knew of each work: `held`, `delivered`, `charge` and `kept` once settled, `durable`."""
    works: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        match json.loads(line):
            case ["held", name, amount]:
                works[name] = {"held": amount, "delivered": 0}
            case ["delivered", name, count]:
                works[name]["delivered"] = count
            case ["journalled", name, count]:
                works[name]["journalled"] = count
            case ["settled", name, amount, kept]:
                works[name] |= {"charge": amount, "kept": kept}
            case ["on disk"] | ["closed"]:
                for work in works.values():
                    work["durable"] = int("charge" in work)
    return works


async def everything(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of all tables that money and receipts are in."""
    tables = "ledger_accounts transfers entries pendings key_budgets open_works work_answers usage_days"
    store = database.store(wall_clock=lambda: AFTER_LEASES)
    await store.open(MIGRATIONS)

    async def read(tx: Transaction) -> dict[str, list[tuple[Any, ...]]]:
        found = {"problems": [(problem,) for problem in await ledger.check(tx)]}
        for table in (tables + " receipt_counters receipt_leaves receipt_statements").split():
            found[table] = sorted(await tx.all(f"SELECT * FROM {table}"), key=repr)
        found["chains"] = [
            (*row, *await tx.all("SELECT leaf FROM receipt_leaves WHERE chain = ? ORDER BY seq", row[0]))
            for row in await tx.all(
                "SELECT chain, node_key, class_id, period_start_seconds, period_seconds, seq, pay_nanocredits, head"
                " FROM receipt_counters ORDER BY chain"
            )
        ]
        found["charges"] = await tx.all("SELECT transfer_id, amount FROM transfers WHERE kind = 'work'")
        found["leaves"] = await tx.all("SELECT node_id, leaf FROM receipt_leaves JOIN receipt_counters USING (chain)")
        found["journal"] = await tx.all("SELECT work_id, output_tokens FROM open_works")
        found["open"] = await tx.all("SELECT pending_id FROM pendings WHERE state = 'open'")
        found["balances"] = await tx.all("SELECT account, balance FROM ledger_accounts")
        found["usage"] = await tx.all("SELECT charge_nanocredits, output_tokens FROM usage_days")
        return found

    try:
        return await store.run(read)
    finally:
        await store.close()


def audit(
    after: dict[str, list[tuple[Any, ...]]], journal: Sequence[tuple[Any, ...]], works: dict[str, dict[str, int]]
) -> None:
    """What must hold whatever happened. `journal` is what open_works said when the gateway died."""
    assert not after["problems"], after["problems"]
    assert not after["open"] and not after["open_works"]
    leaves: list[Leaf] = [rules.leaf_from(bytes(leaf)) for _, leaf in after["leaves"]]
    charged = {transfer_id: amount for transfer_id, amount in after["charges"] if amount}
    assert charged == {
        f"work:{leaf.work_id}:{leaf.epoch}": leaf.charge_nanocredits for leaf in leaves if leaf.price_id != "free"
    }
    by_work: dict[str, list[Leaf]] = {}
    for leaf in sorted(leaves, key=lambda leaf: leaf.epoch):
        before = by_work.setdefault(leaf.work_id, [])
        assert leaf.start == sum(part.output_tokens for part in before), "a part overlaps another, or leaves a gap"
        assert sum(part.input_tokens for part in before) == 0 or not leaf.input_tokens, "a prompt was paid twice"
        before.append(leaf)
    for name, parts in by_work.items():
        known = works[name]
        assert len(parts) == 1 or name == "handed", "a work was charged twice"
        assert sum(part.charge_nanocredits for part in parts) <= known["held"]
        assert sum(part.output_tokens for part in parts) <= known["delivered"]
    for work_id, output_tokens in journal:
        assert not output_tokens or by_work[work_id][-1].output_tokens == output_tokens
    for name, known in works.items():
        charged_ids = sum(part.output_tokens for part in by_work.get(name, ()))
        assert charged_ids >= known.get("journalled", 0), "what was in the journal was not charged"
        if known.get("durable"):
            paid = sum(part.charge_nanocredits for part in by_work.get(name, ()))
            assert paid == known["charge"], f"{name} was settled and on disk"
    for _, node_key, class_id, start, seconds, seq, pay, head, *packed in after["chains"]:
        first = rules.opening(NETWORK.public, bytes(node_key), class_id, start, seconds)
        last = rules.advance(first, [rules.leaf_from(bytes(leaf)) for (leaf,) in packed])
        assert (last.seq, last.pay_nanocredits, last.head) == (seq, pay, bytes(head))
    balances = dict(after["balances"])
    for n, node_id in enumerate(NODE_IDS):
        pay = sum(rules.leaf_from(bytes(leaf)).pay_nanocredits for node, leaf in after["leaves"] if node == node_id)
        assert balances.get(f"provider:owner-{n}:earned_held", 0) == pay
    assert balances.get("user:alice:available", 0) == CREDIT - sum(charged.values())
    assert balances.get("loss", 0) == 0 and balances.get("escrow:request", 0) == 0
    assert balances.get("user:alice:hold", 0) == 0
    assert sum(row[0] for row in after["usage"]) == sum(charged.values())
    assert sum(row[1] for row in after["usage"]) == sum(leaf.output_tokens for leaf in leaves)


# ---------------------------------------------------------------- databases, one for each point


class Databases:
    """Copies of one database in which alice has credit. `fresh` makes the next."""

    def __init__(self, folder: Path, postgres: PostgresServer | None = None) -> None:
        self._folder = folder
        self._postgres = postgres
        self._count = 0
        self.kind = "sqlite" if postgres is None else "postgres"
        self.original = self._new("original")
        if postgres is not None:
            self.original = Database("postgres", postgres.create_database())
        asyncio.run(_credit(self.original))

    def fresh(self, of: Database | None = None) -> Database:
        of = of or self.original
        self._count += 1
        if self._postgres is not None:
            name = f"{urlsplit(self.original.url).path[1:]}_{self._count}"
            self._postgres.execute(f"CREATE DATABASE {name} TEMPLATE {urlsplit(of.url).path[1:]}")
            return Database("postgres", urlunsplit(urlsplit(of.url)._replace(path=f"/{name}")))
        copy = self._new(str(self._count))
        for suffix in ("", "-wal"):
            if os.path.exists(of.url + suffix):
                shutil.copyfile(of.url + suffix, copy.url + suffix)
        return copy

    def drop(self, database: Database) -> None:
        if self._postgres is not None:
            self._postgres.drop_database(database.url)
        else:
            for suffix in ("", "-wal", "-shm"):
                Path(database.url + suffix).unlink(missing_ok=True)

    def _new(self, name: str) -> Database:
        return Database("sqlite", str(self._folder / f"{name}.sqlite"))


async def _credit(database: Database) -> None:
    store = database.store(wall_clock=lambda: NOW)
    await store.open(MIGRATIONS)

    async def give(transaction: Transaction) -> None:
        await ledger.apply(transaction, [ledger.credit("alice", CREDIT, "credit-1")])
        await ledger.set_budget(transaction, BOB.key_id, BUDGET)

    await store.run(give)
    await store.close()


@pytest.fixture(params=["sqlite", "postgres"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Databases]:
    postgres = request.getfixturevalue("postgres") if request.param == "postgres" else None
    made = Databases(tmp_path, postgres)
    yield made
    if postgres is not None:
        made.drop(made.original)


def recovered(databases: Databases, database: Database, diary: Path, who: str) -> None:
    """Somebody recovers a copy of what is left; all must be well then, and recovering again changes nothing."""
    copy = databases.fresh(of=database)
    quiet = Points("none", 0, diary)

    async def twice() -> None:
        journal = (await everything(copy))["journal"]
        await recover(copy, quiet, who)
        after = await everything(copy)
        audit(after, journal, diary_of(diary))
        await recover(copy, quiet, who)
        await recover(copy, quiet, "gateway-3")
        assert await everything(copy) == after

    asyncio.run(twice())
    databases.drop(copy)


# ---------------------------------------------------------------- the tests


def killed_in_the_middle(databases: Databases, diary: Path) -> Database:
    """What a gateway leaves that dies with several works in its journal and settlements in its queue."""
    left = databases.fresh()
    points = Points("kill", 0, diary, until=("delivered", "budget"))
    assert in_a_child(points, lambda points: live(left, points)) is None
    assert len(asyncio.run(everything(left))["journal"]) >= 3
    return left


def test_killed_at_any_commit_or_await_of_its_life_the_books_are_right_again(
    databases: Databases, tmp_path: Path
) -> None:
    kill_at_every_point(databases, tmp_path, 1 if databases.kind == "sqlite" else POSTGRES_EVERY)


@pytest.mark.soak
def test_killed_at_any_commit_or_await_the_books_are_right_again_on_postgres_too(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    """Every point, which takes minutes there."""
    databases = Databases(tmp_path, postgres)
    kill_at_every_point(databases, tmp_path, 1)
    databases.drop(databases.original)


def kill_at_every_point(databases: Databases, tmp_path: Path, step: int) -> None:
    at, killed = 1, True
    while killed:
        diary = tmp_path / f"diary-{at}"
        database = databases.fresh()
        killed = in_a_child(Points("kill", at, diary), lambda points: live(database, points)) is None  # noqa: B023
        try:
            recovered(databases, database, diary, "gateway-1" if at // step % 2 else "gateway-2")
        except AssertionError as problem:
            raise AssertionError(f"killed at point {at}") from problem
        databases.drop(database)
        at += step
    assert at > 150, "the scenario reaches fewer points than it should"


@pytest.mark.parametrize("who", ["gateway-1", "gateway-2"])
def test_a_recovery_that_is_killed_at_any_point_can_be_done_again(
    databases: Databases, tmp_path: Path, who: str
) -> None:
    diary = tmp_path / "diary"
    left = killed_in_the_middle(databases, diary)
    at, killed = 1, True
    while killed:
        database = databases.fresh(of=left)
        points = Points("kill", at, diary)
        killed = in_a_child(points, lambda points: recover(database, points, who)) is None  # noqa: B023
        recovered(databases, database, diary, who)
        databases.drop(database)
        at += 1 if databases.kind == "sqlite" else 19
    assert at > 10
    databases.drop(left)


@pytest.mark.parametrize(
    ("fault", "every"),
    [("kept but said to have failed", 1), ("disk full", 2), ("no room in the file system", 3)],
)
def test_a_commit_that_fails_or_seems_to_is_made_good_by_the_same_program(
    databases: Databases, tmp_path: Path, fault: Fault, every: int
) -> None:
    if databases.kind == "postgres":
        if fault == "no room in the file system":
            pytest.skip("a server's disk is not ours to fill")
        every = 11
    at, commits = 1, 1
    while at <= commits:
        database, diary = databases.fresh(), tmp_path / f"diary-{at}"
        ended = in_a_child(Points(fault, at, diary), lambda points: live(database, points))  # noqa: B023
        assert ended is not None
        commits = ended[1]
        try:
            after = asyncio.run(everything(database))
            audit(after, after["journal"], diary_of(diary))
        except AssertionError as problem:
            raise AssertionError(f"{fault} at commit {at}") from problem
        databases.drop(database)
        at += every


def test_two_that_recover_at_the_same_moment_settle_once(postgres: PostgresServer, tmp_path: Path) -> None:
    databases, diary = Databases(tmp_path, postgres), tmp_path / "diary"
    left = killed_in_the_middle(databases, diary)
    journal = asyncio.run(everything(left))["journal"]

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            for who in ("gateway-1", "gateway-2", "gateway-3", "gateway-1"):
                group.create_task(recover(left, Points("none", 0, diary), who))

    asyncio.run(together())
    audit(asyncio.run(everything(left)), journal, diary_of(diary))
    databases.drop(left)
    databases.drop(databases.original)


def test_more_settlements_than_one_batch_takes_let_nothing_past_them(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work that moved to another node while its first row was still there ended the whole gateway."""
    monkeypatch.setattr(books_module, "BATCH_MAX", 4)
    database, diary = databases.fresh(), tmp_path / "diary"
    points = Points("none", 0, diary)

    async def body() -> None:
        store = database.store(wall_clock=lambda: NOW)
        await store.open(MIGRATIONS)
        books = books_on(store, "gateway-1")
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            writing = group.create_task(books.run())
            scenario = Scenario(books, points)
            orders = [await scenario.begin(f"work-{n}") for n in range(9)]
            while not all(order.journalled for order in orders):
                await asyncio.sleep(0.01)
            await books.flush()
            for order in orders[:-1]:
                scenario.deliver(order, 1)
                scenario.settle(order)
            books.unserve(orders[-1])
            scenario.serve(orders[-1], ROW, 1)
            await scenario.on_disk()
            scenario.deliver(orders[-1], 2)
            scenario.settle(orders[-1])
            await books.close()
            points.note("closed")
            writing.cancel()
        await store.close()
        points.write_up()

    asyncio.run(body())
    after = asyncio.run(everything(database))
    audit(after, (), diary_of(diary))
    databases.drop(database)


class SlowStore(FaultyStore):
    """Says when a commit begins, and begins it when it is told to."""

    def __init__(self, inner: Store, points: Points, wal: Path) -> None:
        super().__init__(inner, points, wal)
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def run(self, action: Action[T]) -> T:
        self.began.set()
        await self.go_on.wait()
        return await super().run(action)


def test_a_flush_waits_for_a_batch_that_is_on_its_way_to_the_disk(databases: Databases, tmp_path: Path) -> None:
    database, points = databases.fresh(), Points("none", 0, tmp_path / "diary")

    async def body() -> None:
        store = SlowStore(database.store(wall_clock=lambda: NOW), points, Path(database.url + "-wal"))
        await store.open(MIGRATIONS)
        books = books_on(store, "gateway-1")
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            writing = group.create_task(books.run())
            scenario = Scenario(books, points)
            order = await scenario.begin("short")
            scenario.deliver(order, 3)
            scenario.settle(order)
            store.began.clear()
            store.go_on.clear()
            await store.began.wait()  # the settlement is in no queue any more, and not on disk
            flushing = group.create_task(books.flush())
            await asyncio.sleep(0.05)
            assert not flushing.done()
            store.go_on.set()
            await flushing
            charged = await store.run(lambda tx: tx.one("SELECT amount FROM transfers WHERE kind = 'work'"))
            assert charged == (most(ROW, INPUT_TOKENS, 3),)
            await books.close()
            writing.cancel()
        await store.close()

    asyncio.run(body())
    databases.drop(database)


def test_a_server_that_refuses_for_a_while_ends_no_gateway(postgres: PostgresServer, tmp_path: Path) -> None:
    """One that became a replica, or whose disk was full: the settlements wait, and go through when it takes them."""
    databases, diary = Databases(tmp_path, postgres), tmp_path / "diary"
    url, points = databases.original.url, Points("none", 0, diary)
    name = urlsplit(url).path[1:]

    def read_only(switch: str) -> None:
        postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {switch}")
        postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    async def body() -> None:
        store = FaultyStore(databases.original.store(wall_clock=lambda: NOW), points, tmp_path)
        await store.open(MIGRATIONS)
        books = books_on(store, "gateway-1")
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            writing = group.create_task(books.run())
            scenario = Scenario(books, points)
            order = await scenario.begin("short")
            await books.flush()
            read_only("on")
            scenario.deliver(order, 3)
            scenario.settle(order)
            before = store.commits
            while store.commits < before + 2:
                await asyncio.sleep(0.01)
            read_only("off")
            await scenario.on_disk()
            await books.close()
            writing.cancel()
        await store.close()
        points.write_up()

    asyncio.run(body())
    audit(asyncio.run(everything(databases.original)), (), diary_of(diary))
    databases.drop(databases.original)
