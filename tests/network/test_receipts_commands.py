"""`gridmill receipts`, on data folders that a network and a node left behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from test_receipts import CLASS, DAY, NETWORK, NODE, NODE_ID, NOON, Grid, ended, segment

from databases import Database
from gridmill.cli import main
from gridmill.network import receipts
from gridmill.network.accounts import Accounts
from gridmill.network.operator import MIGRATIONS
from gridmill.network.receipts import Segment
from gridmill.network.receipts_export import PAGE_LEAVES, Exporter
from gridmill.network.store import SqliteStore
from gridmill.node.outbox import Outbox
from gridmill.wire import receipts_file
from gridmill.wire.identity import Identity, node_id_of

OTHER = Identity(b"q" * 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One closed period and an open one: two accounts, two nodes of which one is away."""
    where = tmp_path_factory.mktemp("grid")
    asyncio.run(_fill(where))
    return where


async def _fill(where: Path) -> None:
    identity = Identity.load_or_create(where / "network.key")
    now = [NOON / 1000]
    store = SqliteStore(where / "network.sqlite", wall_clock=lambda: now[0])
    await store.open(MIGRATIONS)
    accounts = Accounts(store, now=time.time, entropy=lambda size: b"a" * size)
    await accounts.load()
    account = await accounts.create_account("alice")
    grid = Grid(store, where, identity)
    grid.outbox.open()
    grid.join()
    for at in (0, DAY):
        grid.now_ms = NOON + 1000 * at
        works = [grid.work(account=account.account_id if n % 2 else "account-bob") for n in range(PAGE_LEAVES + 50)]
        await grid.settle(works)
        await grid.rest()
        away = ended(5000 + at)
        strange = segment(away, account=account.account_id, claim=b"")
        await grid.settle([Segment(node_id_of(OTHER.public), OTHER.public, CLASS, strange.leaf, b"", "x", "k", "m")])
        if not at:
            now[0] += DAY + receipts.CLOSE_GRACE_SECONDS + DAY / 2
            assert await grid.desk.close_periods() == 1
    await grid.outbox.close()
    await store.close()


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main(["receipts", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out + said.err


def exported(capsys: pytest.CaptureFixture[str], folder: Path, file: Path, *words: object) -> Path:
    code, said = run(capsys, "export", "--data", folder, "-o", file, *words)
    assert code == 0, said
    assert file.stat().st_mode & 0o777 == 0o600
    return file


def test_the_files_of_network_node_and_account_are_sound_and_agree(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = exported(capsys, folder, tmp_path / "network.jsonl")
    node = exported(capsys, folder, tmp_path / "node.jsonl", "--of", "node", "--with-salts")
    of_node = exported(capsys, folder, tmp_path / "of-node.jsonl", "--node", NODE_ID)
    account = exported(capsys, folder, tmp_path / "account.jsonl", "--account", "alice")
    key = Identity.load_or_create(folder / "network.key").public.hex()
    for file in (network, node, of_node, account):
        code, said = run(capsys, "verify", file, "--network-key", key)
        assert code == 0 and "Sound." in said, said
    code, said = run(capsys, "verify", node, network, "--json")
    facts = json.loads(said)
    assert code == 0 and facts["sound"]
    assert [one["leaves"] for one in facts["files"]] == [2 * (PAGE_LEAVES + 50), 2 * (PAGE_LEAVES + 51)]
    assert facts["files"][1]["not_countersigned"] == 2, "of the node that is away"
    assert run(capsys, "verify", node, of_node)[0] == 0
    code, said = run(capsys, "verify", account, "--json")
    (facts,) = json.loads(said)["files"]
    assert facts["leaves"] == PAGE_LEAVES + 50 and facts["without_root"] == facts["leaves"] // 2
    assert run(capsys, "verify", "--strict", account)[0] == 1
    code, said = run(capsys, "verify", "--network-key", "00" * 32, network)
    assert code == 1 and "another network" in said and "belongs to no chain" not in said, "one sentence for each chain"


def test_the_node_of_gridmill_up_is_found_in_the_folder_of_both(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "node").mkdir()
    shutil.copy(folder / "receipts.sqlite", tmp_path / "node")
    node = exported(capsys, tmp_path, tmp_path / "node.jsonl", "--of", "node")
    code, said = run(capsys, "verify", node, "--json")
    assert code == 0 and json.loads(said)["files"][0]["leaves"] > 0


def test_one_period_alone_can_be_exported_and_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = NOON // 1000 // DAY * DAY
    network = exported(capsys, folder, tmp_path / "network.jsonl", "--period", start)
    node = exported(capsys, folder, tmp_path / "node.jsonl", "--of", "node")
    same = exported(capsys, folder, tmp_path / "same.jsonl", "--period", "2023-11-14")
    assert network.read_bytes() == same.read_bytes()
    code, said = run(capsys, "verify", network, node, "--json")
    facts = json.loads(said)
    assert code == 0, said
    assert facts["files"][0]["leaves"] == PAGE_LEAVES + 51 and facts["files"][0]["roots"] == 1


def test_a_tampered_file_is_refused_with_its_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported(capsys, folder, tmp_path / "network.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[10] = lines[10].replace(b'"output_tokens":5', b'"output_tokens":6')
    file.write_bytes(b"".join(lines))
    code, said = run(capsys, "verify", file)
    assert code == 1 and "network.jsonl:11: leaf" in said and "NOT SOUND" in said


def test_one_work_is_shown_by_both_sides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "show", "--data", folder, "work-2")
    assert code == 0 and "network and node" in said and NODE_ID in said
    code, said = run(capsys, "show", "--data", folder, "--of", "node", "--json", "work-2")
    (entry,) = json.loads(said)
    assert code == 0 and entry["leaf"]["work_id"] == "work-2" and entry["statement"]["node_signature"]
    code, said = run(capsys, "show", "--data", folder, "work-5000")
    assert code == 0 and "not countersigned" in said
    code, said = run(capsys, "show", "--data", folder, "--json", "work")
    assert code == 0 and len(json.loads(said)) == 2 * (PAGE_LEAVES + 51), "all works whose ids begin so"
    code, said = run(capsys, "show", "--data", folder, "nothing")
    assert code == 1 and "no receipt" in said


@pytest.mark.parametrize(
    "words",
    [
        ("export", "--node", "node-00000000000000000000"),
        ("export", "--account", "nobody"),
        ("export", "--of", "node", "--account", "alice"),
        ("export", "--period", "yesterday"),
        ("verify", "--network-key", "abc", "file"),
        ("verify", "no-such-file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, said = run(capsys, *words, *(("--data", folder) if words[0] == "export" else ()))
    assert code in (1, 2) and said.startswith("gridmill: ") and said.count("\n") == 1


def test_a_nodes_file_is_read_while_the_node_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        outbox = Outbox(tmp_path / "receipts.sqlite", NODE, wall_clock=lambda: 0.0)
        outbox.open()
        outbox.record(ended(1))
        await outbox.unacknowledged(b"")
        shown = await asyncio.to_thread(run, capsys, "show", "--data", tmp_path, "--json", "work-1")
        assert shown[0] == 0 and json.loads(shown[1])[0]["sent_tokens"] == 5
        assert (await asyncio.to_thread(run, capsys, "export", "--data", tmp_path))[0] == 0
        await outbox.close()

    asyncio.run(body())


def test_an_export_reads_pages_on_both_databases(database: Database, tmp_path: Path) -> None:
    async def body() -> None:
        now = [NOON / 1000]
        store = database.store(wall_clock=lambda: now[0])
        await store.open((receipts.MIGRATION,))
        try:
            grid = Grid(store, tmp_path)
            grid.outbox.open()
            grid.join()
            for _ in range(5):
                await grid.settle([grid.work() for _ in range(100)])
            await grid.rest()
            now[0] += 2 * DAY
            assert await grid.desk.close_periods() == 1
            for about in ({}, {"node_id": NODE_ID}, {"account_id": "account-1"}):
                lines: list[Any] = []
                cursor: list[Any] | None = None
                pages = 0
                exporter = Exporter(store, NETWORK)
                while cursor is not None or not pages:
                    part, cursor = await exporter.page(cursor=cursor, **about)  # type: ignore[arg-type]
                    lines += part
                    pages += 1
                    assert len(json.dumps(part)) < 1 << 20, "a page fits an answer of the control socket"
                found = receipts_file.check("x", receipts_file.written(lines), strict=True)
                assert not found.problems and found.leaves == 500 and pages > 2
            assert len(await exporter.show("work-1")) == 1
            await grid.outbox.close()
        finally:
            await store.close()

    asyncio.run(body())
