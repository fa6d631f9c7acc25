"""Money over real programs: who can pay is served, who cannot is told so, and no kill or pause loses a nanocredit.

Prompts are ten ids and answers eight unless a test says otherwise, at 50/400 nanocredits a token and a fee of 5 %.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from programs import Place, Program, Stream, gridmill, place, until

from databases import Database

MODEL = "gridmill/demo"
PROMPT = list(range(10, 20))
ANSWER = 8
PRICE = ["--price", "50/400"]
PAY = 10 * 50 + ANSWER * 400  # of a node for one work
COST = PAY + 185
ECHO = ["--engine", "echo", "--slots", "128", "--log-level", "warning"]
QUIET = ["--approve", "open", "--log-level", "warning"]
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": ANSWER, "ignore_eos": True}


class Money:
    """Gateways on one database, their nodes, and what the operator asks of them."""

    def __init__(self, here: Place, database: str | None = None) -> None:
        self.here = here
        self._options = ["--database", database] if database else []

    def gateway(self, name: str = "network", *more: str, port: int = 0) -> Program:
        """All gateways of a test are one network: they share its key and the secret of its salts."""
        data, first = self.here.folder / name, self.here.folder / "network"
        if data != first and not data.exists():
            data.mkdir(mode=0o700)
            for shared in ("network.key", "gateway.secret"):
                shutil.copy(first / shared, data)
        arguments = ["network", "--port", str(port), "--data", data, *self._options, *QUIET, *more]
        return self.here.start(*arguments, name=name).ready()

    def node(self, network: Program, name: str = "node", *more: str) -> Program:
        return self.here.node(network, *ECHO, *more, name=name)

    def operate(self, *command: str, data: str = "network") -> Any:
        """Through the gateway when it runs, on the database when not."""
        return json.loads(gridmill(*command, "--json", "--data", self.here.folder / data, *self._options))

    def user(self, works: float, *more: str, name: str = "alice") -> dict[str, Any]:
        """A key of an account that can pay for so many works."""
        made: dict[str, Any] = self.operate("keys", "create", name, *more)
        nanocredits = int(works * COST)
        if nanocredits:
            self.operate("credit", made["account_id"], f"{nanocredits // 10**9}.{nanocredits % 10**9:09d}")
        return made

    def balances(self) -> dict[str, int]:
        return {row["ledger_account"]: row["balance_nanocredits"] for row in self.operate("ledger", "balance")}

    def settled(self, seconds: float = 30.0) -> dict[str, int]:
        """The balances once nothing is held any more; the ledger must be sound then."""

        def held() -> list[str]:
            return [account for account, amount in self.balances().items() if amount and _holds(account)]

        until(lambda: not held(), seconds)
        found = self.balances()
        checked = self.operate("ledger", "check")
        assert checked["problems"] == [] and sum(found.values()) == 0
        return found


def _holds(account: str) -> bool:
    return account == "escrow:request" or account.endswith(":hold")


def knows_its_node(network: Program, key: str) -> bool:
    """Whether a gateway has a node for the model: asked with a price cap that nothing is within, so that none runs."""
    body = BODY | {"max_price": 0}
    return ask_all([(network, key, body)])[0][0] == 402


def ask_all(asked: list[tuple[Program, str, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """All at once; status and body of each."""

    async def run() -> list[tuple[int, dict[str, Any]]]:
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

            async def one(network: Program, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
                url = network.facts["base_url"] + "/completions"
                async with session.post(url, json=body, headers={"authorization": f"Bearer {key}"}) as answer:
                    return answer.status, await answer.json()

            return await asyncio.gather(*(one(*each) for each in asked))

    return asyncio.run(run())


def exported(here: Place, data: str, of: str, *more: str) -> Path:
    path = here.folder / f"{of}-{data}.receipts"
    gridmill("receipts", "export", "--data", here.folder / data, "--of", of, "-o", path, *more)
    return path


def countersigned(money: Money) -> bool:
    """Whether the nodes have signed all that was settled."""
    path = exported(money.here, "network", "network")
    said = json.loads(gridmill("receipts", "verify", path, "--json"))
    return not said["files"][0]["not_countersigned"]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


# ---------------------------------------------------------------- five hundred at once


def test_of_five_hundred_at_once_exactly_the_hundred_that_are_paid_for_are_served(here: Place) -> None:
    money = Money(here)
    network = money.gateway()
    money.node(network, "node", *PRICE)
    alice = money.user(100)
    answers = ask_all([(network, alice["api_key"], BODY)] * 500)
    assert Counter(status for status, _ in answers) == {200: 100, 402: 400}
    for status, body in answers:
        if status == 200:
            assert body["usage"]["completion_tokens"] == ANSWER
        else:
            facts = body["error"]["gridmill"]
            assert body["error"]["code"] == "insufficient_balance" and facts["needed_nanocredits"] == COST
            assert facts["missing_nanocredits"] == COST - facts["available_nanocredits"] > 0
    assert network.interrupt() == 0
    balances = money.settled()
    assert balances[f"user:{alice['account_id']}:available"] == 0
    assert sum(amount for account, amount in balances.items() if account.startswith("provider:")) == 100 * PAY


def test_two_gateways_serve_together_exactly_what_the_account_can_pay_for(
    here: Place, postgres_database: Database
) -> None:
    money = Money(here, postgres_database.url)
    networks = [money.gateway(), money.gateway("second")]
    alice = money.user(100)
    for name, network in zip(("node", "other node"), networks, strict=True):
        money.node(network, name, *PRICE)
    for network in networks:
        until(lambda network=network: knows_its_node(network, alice["api_key"]))
    answers = ask_all([(networks[n % 2], alice["api_key"], BODY) for n in range(500)])
    assert Counter(status for status, _ in answers) == {200: 100, 402: 400}
    for network in networks:
        assert network.interrupt() == 0
    assert money.settled()[f"user:{alice['account_id']}:available"] == 0


# ---------------------------------------------------------------- gateways that stand still, keys that end


def test_a_gateway_stopped_past_its_lease_and_resumed_spends_nothing_it_no_longer_has(
    here: Place, postgres_database: Database
) -> None:
    money = Money(here, postgres_database.url)
    first = money.gateway("network", "--lease-seconds", "2")
    second = money.gateway("second", "--lease-seconds", "2")
    alice = money.user(20)
    key = alice["api_key"]
    money.node(first, "slow node", *PRICE, "--echo-tokens-per-second", "4")
    money.node(second, "node", *PRICE)
    for network in (first, second):
        until(lambda network=network: knows_its_node(network, key))
    stream = Stream(first.facts["base_url"], key, **BODY)
    assert stream.event() and stream.event()
    os.kill(first.process.pid, signal.SIGSTOP)
    served = 0

    def all_but_one_are_served() -> bool:
        nonlocal served
        answers = ask_all([(second, key, BODY)] * (19 - served))
        assert {status for status, _ in answers} <= {200, 402, 503}, answers
        served += sum(status == 200 for status, _ in answers)
        return served == 19

    until(all_but_one_are_served)
    os.kill(first.process.pid, signal.SIGCONT)

    def told_so() -> bool:
        answers = ask_all([(first, key, BODY)] * 5)
        assert 200 not in {status for status, _ in answers}
        return {status for status, _ in answers} == {402}

    until(told_so)
    stream.close()
    for network in (first, second):
        assert network.interrupt() == 0
    balances = money.settled()
    assert 0 <= balances[f"user:{alice['account_id']}:available"] < COST
    assert balances["rail:operator:external"] == -20 * COST


def test_a_revoked_key_is_refused_and_what_it_runs_ends_on_every_gateway(
    here: Place, postgres_database: Database
) -> None:
    money = Money(here, postgres_database.url)
    networks = [money.gateway(), money.gateway("second")]
    alice = money.user(1000)
    key = alice["api_key"]
    for name, network in zip(("node", "other node"), networks, strict=True):
        money.node(network, name, *PRICE, "--echo-tokens-per-second", "20")
    for network in networks:
        until(lambda network=network: knows_its_node(network, key))
    streams = [Stream(network.facts["base_url"], key, **BODY | {"max_tokens": 900}) for network in networks]
    for stream in streams:
        assert stream.event()
    money.operate("keys", "revoke", alice["key_id"])
    for network, stream in zip(networks, streams, strict=True):
        until(lambda network=network: ask_all([(network, key, BODY)])[0][0] == 401, seconds=10)
        last = stream.events()[-1]  # most of a minute would pass if it ran to its end, and nothing would be said
        assert last["error"]["code"] == "invalid_api_key"
        stream.close()
    for network in networks:
        assert network.interrupt() == 0
    charged = 1000 * COST - money.settled()[f"user:{alice['account_id']}:available"]
    assert 0 < charged < 2 * 600 * 420


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize("killed", ["network", "node", "both"])
def test_after_a_kill_during_fifty_streams_both_sides_agree_to_the_nanocredit(here: Place, killed: str) -> None:
    money = Money(here)
    network = money.gateway("network", "--lease-seconds", "2")
    port = int(network.facts["base_url"].rsplit(":", 1)[1].split("/")[0])
    slow = [*PRICE, "--echo-tokens-per-second", "20"]
    node = money.node(network, "node", *slow)
    alice = money.user(10_000)

    def stream_until_it_breaks(number: int) -> int:
        body = BODY | {"max_tokens": 60 + number, "seed": number}
        stream = Stream(network.facts["base_url"], alice["api_key"], **body)
        assert stream.response.status == 200
        seen = 0
        try:
            while (event := stream.event()) is not None and "error" not in event:
                seen += 1
                if seen == 5:
                    begun[number] = True
        except OSError:  # cut off in the middle of a line
            pass
        stream.close()
        return seen

    begun = [False] * 50
    with ThreadPoolExecutor(50) as threads:
        running = [threads.submit(stream_until_it_breaks, number) for number in range(50)]
        until(lambda: all(begun))
        for program, name in ((network, "network"), (node, "node")):
            if killed in (name, "both"):
                program.kill()
        assert all(stream.result() < 60 for stream in running)
    if killed != "node":
        network = money.gateway("network", "--lease-seconds", "2", port=port)
    if killed != "network":
        node = money.node(network, "node", *slow)
    until(lambda: ask_all([(network, alice["api_key"], BODY)])[0][0] == 200)
    until(lambda: countersigned(money))
    assert node.interrupt() == 0 and network.interrupt() == 0
    balances = money.settled()
    files = [exported(here, "network", "network"), exported(here, "node", "node")]
    verified = json.loads(gridmill("receipts", "verify", *files, "--json"))
    assert verified["sound"] and not verified["problems"]
    spent = 10_000 * COST - balances[f"user:{alice['account_id']}:available"]
    pay = sum(amount for account, amount in balances.items() if account.startswith("provider:"))
    assert "loss" not in balances
    for side in verified["files"]:
        assert side["leaves"] > 25 and side["not_countersigned"] == side["disputed_statements"] == 0
        assert (side["pay_nanocredits"], side["charge_nanocredits"]) == (pay, spent)
    # Of what the callers saw, all but what came in the last moment is paid for, and nothing twice.
    seen = sum(stream.result() for stream in running)
    assert 3 * 50 * 400 < pay - PAY < 50 * 500 + (seen + 50 * 20) * 400


# ---------------------------------------------------------------- limits, and no money at all


def test_caps_budgets_and_rates_are_kept_and_said(here: Place) -> None:
    money = Money(here)
    network = money.gateway()
    money.node(network, "node", *PRICE)
    alice = money.user(100)
    capped = ask_all([(network, alice["api_key"], BODY | {"max_price": {"output": 419}})])[0]
    assert capped[0] == 402 and capped[1]["error"]["code"] == "max_price_too_low"
    assert ask_all([(network, alice["api_key"], BODY | {"max_price": {"input": 53, "output": 420}})])[0][0] == 200

    budget = money.user(0, "--account", alice["account_id"], "--budget", f"0.{3 * COST:09d}", name="three works")
    answers = ask_all([(network, budget["api_key"], BODY)] * 10)
    assert Counter(status for status, _ in answers) == {200: 3, 402: 7}
    assert {body["error"]["code"] for status, body in answers if status == 402} == {"key_budget_exhausted"}

    slow = money.user(0, "--account", alice["account_id"], "--requests-per-minute", "2", name="twice a minute")
    answers = ask_all([(network, slow["api_key"], BODY)] * 5)
    assert Counter(status for status, _ in answers) == {200: 2, 429: 3}
    assert network.interrupt() == 0
    assert money.settled()[f"user:{alice['account_id']}:available"] == (100 - 1 - 3 - 2) * COST


def test_what_costs_nothing_needs_no_balance_and_is_counted_and_receipted_all_the_same(here: Place) -> None:
    money = Money(here)
    network = money.gateway()
    node = money.node(network)
    alice = money.user(0)
    answers = ask_all([(network, alice["api_key"], BODY)] * 20)
    assert Counter(status for status, _ in answers) == {200: 20}
    until(lambda: countersigned(money) and receipts_in(exported(here, "network", "network")) == 20)
    used = usage_of(network, alice["api_key"])["total"]
    assert (used["requests"], used["output_tokens"], used["charge_nanocredits"]) == (20, 20 * ANSWER, 0)
    assert node.interrupt() == 0 and network.interrupt() == 0
    assert not any(money.settled().values())
    files = [exported(here, "network", "network"), exported(here, "node", "node")]
    verified = json.loads(gridmill("receipts", "verify", *files, "--json"))
    assert verified["sound"] and {side["leaves"] for side in verified["files"]} == {20}
    assert {side["pay_nanocredits"] for side in verified["files"]} == {0}


def usage_of(network: Program, key: str) -> Any:
    request = urllib.request.Request(network.facts["base_url"] + "/usage", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def receipts_in(path: Path) -> int:
    return int(json.loads(gridmill("receipts", "verify", path, "--json"))["files"][0]["leaves"])
