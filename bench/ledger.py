"""What money costs: settled requests per second through the books, and what holding and settling adds to a request.

Settled requests: admit, order, serve, deliver, settle through `Books`, with ledger, receipts, usage and journal as a
gateway writes them, in the same transactions. A request counts when its settlement is on disk. Beside it, from the same
run, what the database does with nothing of ours on top: one row per commit. Afterwards the ledger is checked.

Latency: one request at a time against a running network, to a node that asks a price and to one that asks none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
from gateway import HERE, ROOT, Target, processor, running, sequential, wait_for_model

from gridmill.network import ledger
from gridmill.network.books import Books, GatewayId, Payer, Server, Unavailable
from gridmill.network.metering import FeePolicy, PriceRow, Usage, most
from gridmill.network.operator import MIGRATIONS
from gridmill.network.store import Store, Transaction, store_at
from gridmill.wire.messages import Price

sys.path.insert(0, str(ROOT / "tests"))
from postgres_server import NoPostgres, postgres_server

ROW = PriceRow("price-1", Price(50, 10, 400), FeePolicy())
INPUT_TOKENS, OUTPUT_TOKENS = 20, 8
PROMPT = b"\1\0\0\0" * INPUT_TOKENS
IDS = tuple(range(OUTPUT_TOKENS))
WANT = most(ROW, INPUT_TOKENS, OUTPUT_TOKENS)
NODES = [Server(f"node-{n}", bytes([n]) * 32, f"owner-{n}", ROW) for n in range(8)]
CALLERS = 32
WORKS_BETWEEN_LOOKS = 256  # of one caller: then it waits until what it settled is on disk
MANY_ACCOUNTS = 500
CREDIT = 10**15
COMMIT_CALLERS = 64


# ---------------------------------------------------------------- settled requests


async def settled_per_second(store: Store, *, count: int, seconds: float, journalled: bool = False) -> float:
    """How many requests of `count` accounts were held for, settled and on disk. `journalled`: all outlive a tick."""
    books = Books(
        store,
        holder=GatewayId("bench"),
        network_key=b"k" * 32,
        clock=time.monotonic,
        wall_ms=lambda: int(time.time() * 1000),
        entropy=os.urandom,
    )
    running_books = asyncio.create_task(books.run())
    payers = [Payer(f"user-{n}", f"key-{n}") for n in range(count)]
    credits = [ledger.credit(payer.account_id, CREDIT, f"credit:{payer.account_id}") for payer in payers]
    await store.run(functools.partial(ledger.apply, commands=credits))
    work_ids = (f"chatcmpl-{os.urandom(12).hex()}-{n}" for n in itertools.count())
    settled = 0

    async def caller(number: int, until: float) -> None:
        nonlocal settled
        mine = itertools.cycle(payers[number::CALLERS] or payers)
        nodes = itertools.cycle(NODES)
        while time.perf_counter() < until:
            orders = []
            for _ in range(WORKS_BETWEEN_LOOKS):
                payer = next(mine)
                amount = await books.admit(payer, WANT, WANT)
                order = books.order(payer, next(work_ids), "c" * 64, "bench/model", INPUT_TOKENS, amount)
                books.serve(order, next(nodes), PROMPT, b"0123456789abcdef", 0)
                order.deliver(IDS)
                if journalled:
                    orders.append(order)
                else:
                    books.settle(order, Usage(INPUT_TOKENS, 0, OUTPUT_TOKENS), "length")
            if journalled:
                await on_disk(books)
                while not all(order.journalled for order in orders):
                    await asyncio.sleep(0.001)
                for order in orders:
                    books.settle(order, Usage(INPUT_TOKENS, 0, OUTPUT_TOKENS), "length")
            await on_disk(books)
            settled += WORKS_BETWEEN_LOOKS

    async def all_callers(for_seconds: float) -> float:
        nonlocal settled
        settled = 0
        began = time.perf_counter()
        await asyncio.gather(*(caller(number, began + for_seconds) for number in range(CALLERS)))
        return settled / (time.perf_counter() - began)

    await all_callers(0.5)  # slices, accounts and chains are made
    rate = await all_callers(seconds)
    await books.close()
    running_books.cancel()
    await asyncio.wait([running_books])
    problems = await store.run(ledger.check)
    assert not problems, problems
    held = await store.run(functools.partial(_total, sql="SELECT COUNT(*) FROM pendings WHERE state = 'open'"))
    rows = await store.run(functools.partial(_total, sql="SELECT COUNT(*) FROM open_works"))
    assert held == rows == 0, (held, rows)
    return rate


async def on_disk(books: Books) -> None:
    """A queue that is long on purpose may take longer than a gateway would wait."""
    while True:
        try:
            return await books.flush()
        except Unavailable:
            continue


async def _total(transaction: Transaction, sql: str) -> int:
    row = await transaction.one(sql)
    assert row is not None
    return int(row[0])


async def commits_per_second(store: Store, seconds: float) -> float:
    """The reference on SQLite: one new row for each commit, many callers in one group commit."""
    numbers = itertools.count()
    done = 0
    began = time.perf_counter()

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            number = next(numbers)

            async def insert(transaction: Transaction, number: int = number) -> None:
                await transaction.do("INSERT INTO bare (number, body) VALUES (?, ?)", number, "one row")

            await store.run(insert)
            done += 1

    await asyncio.gather(*(caller() for _ in range(COMMIT_CALLERS)))
    return done / (time.perf_counter() - began)


async def one_by_one(url: str, seconds: float) -> float:
    """The reference on PostgreSQL: one new row for each commit, one after the other on one connection."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE TABLE bare_rows (number BIGINT PRIMARY KEY, body TEXT)")
        done = 0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            await connection.execute("INSERT INTO bare_rows (number, body) VALUES ($1, $2)", done, "one row")
            done += 1
        return done / (time.perf_counter() - began)
    finally:
        await connection.close()


async def with_store(url: str | Path, body: Callable[[Store], Awaitable[float]], *more: str) -> float:
    store = store_at(url, wall_clock=time.time)
    await store.open((*MIGRATIONS, *more))
    try:
        return await body(store)
    finally:
        await store.close()


def rates(fresh: Callable[[], str | Path], seconds: float) -> dict[str, float]:
    """Three shapes of load, each on a fresh database."""
    return {
        name: asyncio.run(
            with_store(fresh(), functools.partial(settled_per_second, count=n, seconds=seconds, journalled=journalled))
        )
        for name, n, journalled in (
            ("many accounts", MANY_ACCOUNTS, False),
            ("one account", 1, False),
            ("many accounts, every work journalled", MANY_ACCOUNTS, True),
        )
    }


def on_sqlite(folder: Path, seconds: float) -> dict[str, Any]:
    """WAL and synchronous = FULL, as a network has it."""
    numbers = itertools.count()
    bare = "CREATE TABLE bare (number BIGINT PRIMARY KEY, body TEXT NOT NULL);\n"
    reference = functools.partial(commits_per_second, seconds=seconds)
    return {
        "reference": "group commit of single rows",
        "commits_per_second": asyncio.run(with_store(folder / "bare.sqlite", reference, bare)),
        "settled_per_second": rates(lambda: folder / f"{next(numbers)}.sqlite", seconds),
    }


def on_postgres(seconds: float) -> dict[str, Any] | None:
    try:
        with postgres_server() as server:
            return {
                "reference": "asyncpg, one by one",
                "commits_per_second": asyncio.run(one_by_one(server.create_database(), seconds)),
                "settled_per_second": rates(server.create_database, seconds),
                "version": server.execute("SHOW server_version")[0][0],
            }
    except NoPostgres as absent:
        print(absent, file=sys.stderr)
        return None


# ---------------------------------------------------------------- added latency


@contextlib.contextmanager
def two_networks(folder: Path) -> Iterator[list[Target]]:
    """The same programs twice: one node asks nothing, the other a price, and its user has credit."""
    with contextlib.ExitStack() as stack:
        yield [
            network(stack, folder / "free", "free node", ["--engine", "echo"]),
            network(stack, folder / "priced", "priced node", ["--engine", "echo", "--price", "50/400"]),
        ]


def network(stack: contextlib.ExitStack, data: Path, name: str, node_options: list[str]) -> Target:
    gridmill = [sys.executable, "-m", "gridmill"]
    quiet = ["--log-level", "error", "--json"]
    program = stack.enter_context(
        running([*gridmill, "network", "--port", "0", "--data", str(data / "network"), *quiet], stdout=subprocess.PIPE)
    )
    assert program.stdout is not None
    base_url = json.loads(program.stdout.readline())["base_url"]
    made = operate(data, "keys", "create", "bench")
    if "--price" in node_options:
        operate(data, "credit", made["account_id"], "1000")
    node = stack.enter_context(
        running(
            [*gridmill, "node", "--network", base_url, "--data", str(data / "node"), *node_options, *quiet],
            stdout=subprocess.PIPE,
        )
    )
    assert node.stdout is not None
    model = json.loads(node.stdout.readline())["model"]
    port = int(base_url.rsplit(":", 1)[1].split("/")[0])
    wait_for_model(port, made["api_key"], model)
    return Target(name, port, made["api_key"], model, [program.pid])


def operate(data: Path, *command: str) -> Any:
    printed = subprocess.run(
        [sys.executable, "-m", "gridmill", *command, "--json", "--data", str(data / "network")],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(printed.stdout)


def latency(folder: Path, rounds: int) -> dict[str, Any]:
    with two_networks(folder) as targets:
        seen: dict[str, Any] = sequential(targets, rounds, 25)
        charged = operate(folder / "priced", "ledger", "balance")
        assert not operate(folder / "priced", "ledger", "check").get("problems"), "the ledger does not add up"
    assert charged, "nothing was charged"
    return {
        **seen,
        "added_p50_ms": seen["priced node"]["p50_ms"] - seen["free node"]["p50_ms"],
        "added_p99_ms": seen["priced node"]["p99_ms"] - seen["free node"]["p99_ms"],
    }


# ---------------------------------------------------------------- the report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ledger.json")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each measurement of a rate")
    parser.add_argument("--rounds", type=int, default=24, help="of 25 requests to each network")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    with tempfile.TemporaryDirectory() as folder:
        result["sqlite"] = on_sqlite(Path(folder), arguments.seconds)
        result["postgresql"] = on_postgres(arguments.seconds)
        result["latency"] = latency(Path(folder), arguments.rounds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0


def show(result: dict[str, Any]) -> None:
    for kind in ("sqlite", "postgresql"):
        measured = result[kind]
        if measured is not None:
            print(f"{kind}: {measured['reference']} {measured['commits_per_second']:,.0f} per second")
            for name, rate in measured["settled_per_second"].items():
                share = rate / measured["commits_per_second"]
                print(f"  {name:38} {rate:10,.0f} settled per second  {share:6.2f} of that")
    timed = result["latency"]
    for name in ("free node", "priced node"):
        print(f"{name:40} p50 {timed[name]['p50_ms']:.2f} ms   p99 {timed[name]['p99_ms']:.2f} ms")
    print(f"added by holding and settling: p50 {timed['added_p50_ms']:.2f} ms, p99 {timed['added_p99_ms']:.2f} ms")


if __name__ == "__main__":
    raise SystemExit(main())
