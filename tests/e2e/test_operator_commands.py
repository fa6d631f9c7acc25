"""Accounts, keys, credit and the ledger from the command line: on a running network and on a stopped one."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import Place, Stream, gridmill, place, run, until

from databases import Database


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


class Desk:
    """Commands on one data folder."""

    def __init__(self, data: Path, **environment: str) -> None:
        self.data = data
        self.environment = environment

    def text(self, *arguments: str) -> str:
        return gridmill(*arguments, "--data", self.data, **self.environment)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.text(*arguments, "--json"))

    def refused(self, code: int, *arguments: str) -> str:
        done = run(*arguments, "--data", self.data, **self.environment)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1, "one sentence"
        return done.stderr


def test_books_are_kept_while_no_network_runs(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    account = desk.json("accounts", "create", "acme")["account_id"]
    assert account in desk.text("accounts", "list")
    key = desk.json("keys", "create", "ci", "--account", "acme", "--budget", "1.5", "--expires", "30d")
    assert (key["account_id"], key["budget_nanocredits"]) == (account, 1_500_000_000)
    assert desk.text("credit", "ci", "2.5", "--id", "a") == "acme has 2.5 credits.\n"
    assert desk.text("credit", "ci", "2.5", "--id", "a") == "That was done before. acme has 2.5 credits.\n"
    assert "'a'" in desk.refused(1, "credit", "ci", "3", "--id", "a")
    assert desk.text("credit", "acme", "-0.000000001") == "acme has 2.499999999 credits.\n"
    assert "cannot be taken back" in desk.refused(1, "credit", "acme", "-3")
    assert "no amount" in desk.refused(2, "credit", "acme", "1e3")
    assert "0 of 1.5" in desk.text("keys", "list", "--account", "acme")
    assert "2.499999999 credits" in desk.text("accounts", "show", "acme")
    assert "+2.5" in desk.text("ledger", "history", "acme")
    assert "rail:operator:external" in desk.text("ledger", "balance")
    assert desk.text("ledger", "check") == "The books add up: 2 transfers with 4 entries, 2 accounts.\n"


def test_with_postgresql_no_data_folder_is_needed(tmp_path: Path, postgres_database: Database) -> None:
    desk = Desk(tmp_path / "nowhere", GRIDMILL_DATABASE=postgres_database.url)
    desk.text("keys", "create", "ci", "--budget", "1.5")
    assert desk.text("credit", "ci", "2.5") == "ci has 2.5 credits.\n"
    assert "0 of 1.5" in desk.text("keys", "list")
    assert desk.text("ledger", "check").startswith("The books add up: 1 transfers")
    assert not desk.data.exists()
    desk.environment.clear()
    assert "does not exist" in desk.refused(2, "accounts", "list")


def test_a_ledger_that_does_not_add_up_is_exit_code_1(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.text("accounts", "create", "acme")
    desk.text("credit", "acme", "1")
    with contextlib.closing(sqlite3.connect(tmp_path / "network.sqlite")) as database, database:
        database.execute("UPDATE entries SET amount = amount + 1 WHERE amount > 0")
    done = run("ledger", "check", "--data", tmp_path)
    assert done.returncode == 1
    assert "problems in 1 transfers" in done.stdout


def test_a_running_network_hears_of_it_at_once_and_tells_what_a_request_costs(here: Place) -> None:
    network = here.network()
    here.node(network, "--engine", "echo", "--model", "gridmill/demo", "--price", "50/10/400")
    desk = Desk(here.folder / "network")
    key = desk.json("keys", "create", "alice", "--scope", "inference,node", "--scope", "operator")
    assert key["scope"] == "inference,node,operator"
    assert desk.text("credit", "alice", "1") == "alice has 1 credits.\n"
    asking = {"GRIDMILL_BASE_URL": network.facts["base_url"], "GRIDMILL_API_KEY": key["api_key"]}
    quote = ("quote", "gridmill/demo", "--max-tokens", "10")
    made = json.loads(gridmill(*quote, "--input-tokens", "100", "--json", **asking))
    assert (made["hold_nanocredits"], made["available_nanocredits"]) == ((100 * 50 + 10 * 400) * 105 // 100, 10**9)
    shown = gridmill(*quote, "--prompt", "What is Gridmill?", **asking)
    assert "held when it begins" in shown and "50" in shown
    answer = json.loads(gridmill("chat", "hello", "--model", "gridmill/demo", "--max-tokens", "5", "--json", **asking))
    assert answer["completion_tokens"] == 5
    desk.text("accounts", "freeze", "alice")
    frozen = run("chat", "hello", "--model", "gridmill/demo", **asking)
    assert frozen.returncode == 1 and "frozen" in frozen.stderr
    assert network.interrupt() == 0
    # What was used is in the books of the stopped network, to the nanocredit.
    assert desk.text("ledger", "check").startswith("The books add up")
    shown = desk.json("ledger", "balance", "alice")
    fee_payer = 10**9 - shown["available_nanocredits"]
    earned = [
        row["balance_nanocredits"]
        for row in desk.json("ledger", "balance")
        if row["ledger_account"].startswith("provider:")
    ]
    assert sum(earned) < fee_payer <= made["hold_nanocredits"] and sum(earned) >= 5 * 400


def test_freezing_an_account_ends_what_runs_with_its_keys(here: Place) -> None:
    network = here.network()
    here.node(network, "--engine", "echo", "--model", "gridmill/demo", "--echo-tokens-per-second", "20")
    desk = Desk(here.folder / "network")
    key, other = here.key("alice"), here.key("bob")
    asked = {"model": "gridmill/demo", "prompt": "Hi", "max_tokens": 1000, "ignore_eos": True}
    streams = [Stream(network.facts["base_url"], each, **asked) for each in (key, other)]
    for stream in streams:
        assert stream.event()
    desk.text("accounts", "freeze", "alice")
    (*_, last) = streams[0].events()
    assert last["error"]["message"], "the last event says why"
    until(lambda: desk.json("status")["works_running"] == 1)
    assert streams[1].event(), "others go on"
    for stream in streams:
        stream.close()
