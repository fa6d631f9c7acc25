"""Answers whose nodes break, over real programs and sockets: nobody can tell them from answers whose nodes do not.

Every request is asked twice, each time under a fresh cache salt: once in peace, and once while something breaks.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Asked, FaultKind, Fleet, Node, fleet, random_model
from programs import Stream, gridmill, until

TOKENS = 200
SLOW = ["--engine", "echo", "--echo-tokens-per-second", "150"]
PRICE = "50/400"
CLOCK_SECONDS = 1.5  # how long a node may owe an id: a little more than usual, because test machines are busy
CLOCK = ["--stall-gap-seconds", str(CLOCK_SECONDS)]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two native nodes with a model of random weights in exact mode."""
    with fleet(tmp_path_factory.mktemp("exact"), *CLOCK, price=PRICE, credit=10) as made:
        model = random_model(made.here.folder / "random")
        made.add(2, "--model", str(model), "--exact", "--kv-memory", "16MiB")
        yield made


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two slow echo nodes, whose ids give a wrong resume away."""
    with fleet(tmp_path_factory.mktemp("echo"), *CLOCK, price=PRICE, credit=10) as made:
        made.add(2, *SLOW)
        yield made


@pytest.fixture(scope="module")
def unbroken(echo: Fleet) -> list[Asked]:
    return echo.ask([stream(i, max_tokens=600, stream=i != 2) for i in range(4)])


def prompt(number: int, length: int = 20) -> list[int]:
    return [10 + (number * 37 + place * (number + 3)) % 1400 for place in range(length)]


def stream(number: int = 0, **more: Any) -> Asked:
    """A streamed answer of 200 tokens that nothing but their number ends."""
    body = {"prompt": prompt(number), "max_tokens": TOKENS, "ignore_eos": True, "seed": number, "stream": True}
    return Asked(**body | more).again()


async def struck(node: Node, fault: FaultKind) -> None:
    await asyncio.to_thread(node.suffer, fault)


def same(broken: list[Asked], whole: list[Asked]) -> None:
    found = {f"request {i}": b.differs(w) for i, (b, w) in enumerate(zip(broken, whole, strict=True)) if b.differs(w)}
    assert not found, found


# ---------------------------------------------------------------- every option, every fault, exactly


def requests_of_every_kind() -> list[Asked]:
    """Streamed and not, greedy and not; several choices, log probabilities, penalties, filters, stop strings."""
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "temperature": 1}
    filters = {"temperature": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "logit_bias": {"77": 3, "78": -100}}
    options: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 3},
        {"temperature": 1, "logprobs": 0},
        {"temperature": 0, "stream": False, "logprobs": 5},
        {"temperature": 1, "stream": False},
        {"temperature": 1, "n": 3},
        {"temperature": 1, "n": 2, "stream": False},
        penalties,
        {**penalties, "stream": False},
        filters,
        {"temperature": 1, "stop": ["\u0000 never said"]},
    ]
    asked = [stream(i, **{"prompt": prompt(i, 5 + 23 * i), **each}) for i, each in enumerate(options)]
    chat = {"messages": [{"role": "user", "content": "What breaks, and what does not?"}], "logprobs": True}
    for i, temperature in enumerate((0, 1)):
        body = {"max_tokens": TOKENS, "ignore_eos": True, "seed": i, "stream": True, "temperature": temperature}
        asked.append(Asked(**body, **chat, top_logprobs=2).again())
    return asked


def with_a_stop_string(whole: Asked) -> Asked:
    """The same request, made to end on a string that its answer holds three quarters of the way in."""
    text = whole.texts[0]
    middle = 3 * len(text) // 4
    while "�" in text[middle : middle + 12] or text.index(text[middle : middle + 12]) != middle:
        middle += 1
    return Asked(**{**whole.body, "stop": [text[middle : middle + 12], "another"]}).again()


@pytest.fixture(scope="module")
def in_peace(exact: Fleet) -> list[Asked]:
    asked = exact.ask(requests_of_every_kind())
    stopping = [with_a_stop_string(asked[i]) for i in (0, 3)]
    asked += exact.ask(stopping)
    assert [one.reasons[0] for one in stopping] == ["stop", "stop"]
    for one in asked:
        assert one.done and not one.error, one.error
        assert one in stopping or one.usage["completion_tokens"] == TOKENS * one.body.get("n", 1)
    return asked


def test_in_peace_an_answer_is_the_same_twice(exact: Fleet, in_peace: list[Asked]) -> None:
    same(exact.ask([one.again() for one in in_peace]), in_peace)


@pytest.mark.parametrize("fault", ["stop", "cut", "freeze", "kill"])
def test_no_fault_changes_ids_text_log_probabilities_usage_or_price(
    exact: Fleet, in_peace: list[Asked], fault: FaultKind
) -> None:
    exact.heal()
    after = random.randrange(2, 3 * TOKENS // 4)
    broken = [one.again() for one in in_peace]

    async def strike() -> None:
        first = await broken[0].reached(after)
        await struck(exact.node(first.first_node), fault)

    exact.ask(broken, strike)
    assert len(broken[0].nodes) == 2, f"{fault} after {after} ids"
    same(broken, in_peace)


# ---------------------------------------------------------------- what is no fault


def test_a_reader_who_pauses_and_a_prefill_of_five_seconds_are_no_reasons_to_move(tmp_path: Path) -> None:
    with fleet(tmp_path, *CLOCK) as patient:
        patient.add(2, "--engine", "echo", "--echo-delay-seconds", "5", "--echo-tokens-per-second", "2000")
        chat = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 20}
        # Of more bytes than fit into all the sockets on their way.
        slow = Stream(patient.url, patient.key, model=patient.model, max_tokens=900, n=8, seed=7, **chat)
        others = patient.ask([stream(1), stream(2, stream=False)])
        assert all(one.done and len(one.nodes) == 1 for one in others)
        assert slow.event()
        time.sleep(3 * CLOCK_SECONDS)
        assert patient.status()["works_running"] == 8
        events = slow.events()
        assert "error" not in events[-1] and patient.moves() == []
        assert [choice["finish_reason"] for e in events for choice in e["choices"]].count("length") == 8


@pytest.mark.soak
def test_sessions_that_wait_for_memory_say_so_and_stay_where_they_are(tmp_path: Path) -> None:
    """Several times what both nodes can remember at once: sessions lose their pages, for longer than the clock.

    It takes a machine with nothing else to do: a node that gets no processor for that long is left, and rightly."""
    with fleet(tmp_path, *CLOCK) as crowded:
        model = random_model(crowded.here.folder / "random")
        crowded.add(2, "--model", str(model), "--exact", "--kv-memory", "2MiB")
        asked = crowded.ask([stream(i, max_tokens=400, temperature=1) for i in range(40)])
        assert max(one.pause()[0] for one in asked) > CLOCK_SECONDS, "nobody had to wait, so this shows nothing"
        assert crowded.moves() == []
        some = asked[::8]
        same(some, crowded.ask([one.again() for one in some]))


# ---------------------------------------------------------------- moving, and moving again


@pytest.mark.parametrize("fault", ["stop", "freeze"])
def test_what_a_node_says_after_its_work_moved_changes_nothing(
    echo: Fleet, unbroken: list[Asked], fault: FaultKind
) -> None:
    echo.heal()
    broken = [one.again() for one in unbroken]

    async def strike() -> None:
        await broken[0].reached(20)
        node = echo.node(broken[0].first_node)
        await struck(node, fault)
        seen = len(broken[0].moments)
        await broken[0].reached(seen + 30)  # more than what was on its way: another node goes on
        await asyncio.to_thread(node.revive)

    echo.ask(broken, strike)
    assert len(broken[0].nodes) == 2
    same(broken, unbroken)


def test_sixteen_streams_that_one_kill_breaks_cost_what_they_cost_and_both_sides_sign_it(tmp_path: Path) -> None:
    with fleet(tmp_path, *CLOCK, price=PRICE, credit=10) as priced:
        priced.add(2, *SLOW)
        whole = priced.ask([stream(i, stream=i % 4 > 0) for i in range(16)])
        broken = [one.again() for one in whole]

        async def strike() -> None:
            await asyncio.gather(*(one.reached(20) for one in broken if one.streamed))
            await struck(priced.busiest(), "kill")

        priced.ask(broken, strike)
        assert sum(len(one.nodes) == 2 for one in broken) >= 8
        same(broken, whole)
        priced.heal()
        spent = sum(one.usage["cost_nanocredits"] for one in (*whole, *broken))
        assert spent == 32 * (20 * 50 + TOKENS * 400) * 105 // 100
        sound_books(priced, spent)


def sound_books(ended: Fleet, spent: int) -> None:
    """Every node has signed for what the network owes it, nothing is held, and the ledger adds up. Ends the fleet."""

    def operate(*command: str) -> Any:
        return json.loads(gridmill(*command, "--json", "--data", ended.folder))

    def exported(of: str, data: Path) -> Path:
        path = ended.here.folder / f"{data.name}.receipts"
        gridmill("receipts", "export", "--data", data, "--of", of, "-o", path)
        return path

    until(lambda: not verified([exported("network", ended.folder)])["files"][0]["not_countersigned"])
    for program in (*(node.program for node in ended.nodes), ended.network):
        assert program.interrupt() == 0
    said = verified([exported("network", ended.folder), *(exported("node", node.data) for node in ended.nodes)])
    assert said["sound"] and not said["problems"]
    found = {row["ledger_account"]: row["balance_nanocredits"] for row in operate("ledger", "balance")}
    assert operate("ledger", "check")["problems"] == [] and sum(found.values()) == 0
    assert not any(n for account, n in found.items() if account == "escrow:request" or account.endswith(":hold"))
    [left] = [n for account, n in found.items() if account.startswith("user:") and account.endswith(":available")]
    assert left == 10 * 10**9 - spent
    pay = sum(n for account, n in found.items() if account.startswith("provider:"))
    assert pay == sum(side["pay_nanocredits"] for side in said["files"][1:]) == said["files"][0]["pay_nanocredits"]


def verified(files: list[Path]) -> Any:
    return json.loads(gridmill("receipts", "verify", *files, "--json"))


def test_a_node_that_is_told_to_leave_hands_its_streams_over_and_is_gone_at_once(
    echo: Fleet, unbroken: list[Asked]
) -> None:
    echo.heal()
    broken = [one.again() for one in unbroken]
    left: list[bool] = []

    async def strike() -> None:
        await broken[0].reached(20)
        node = echo.node(broken[0].first_node)
        await struck(node, "drain")
        assert await asyncio.to_thread(node.program.process.wait, 20) == 0
        left.append(not broken[0].ended)

    echo.ask(broken, strike)
    assert left == [True] and len(broken[0].nodes) == 2
    same(broken, unbroken)


def test_where_there_is_but_one_node_a_stream_waits_for_it_to_wake_up_and_to_come_back(tmp_path: Path) -> None:
    with fleet(tmp_path, *CLOCK, price=PRICE, credit=10) as lonely:
        [node] = lonely.add(1, *SLOW)
        whole = lonely.ask([stream(1, max_tokens=300), stream(2, max_tokens=300, stream=False)])
        broken = [one.again() for one in whole]

        async def strike() -> None:
            await broken[0].reached(20)
            await struck(node, "stop")
            await asyncio.sleep(2 * CLOCK_SECONDS)
            await asyncio.to_thread(node.revive)
            await broken[0].reached(len(broken[0].moments) + 20)
            await struck(node, "kill")
            await asyncio.to_thread(node.start)

        lonely.ask(broken, strike)
        same(broken, whole)


def test_after_three_moves_the_caller_is_told_and_pays_for_what_came(echo: Fleet, unbroken: list[Asked]) -> None:
    echo.heal()
    asked, plain = unbroken[0].again(), unbroken[2].again()

    async def strike() -> None:
        while True:
            await asked.reached(len(asked.moments) + 15)
            if asked.ended:
                return
            for node in echo.nodes:
                node.cable.cut()

    echo.ask([asked, plain], strike)
    left = [move["code"] for move in echo.moves() if move["work"].startswith(asked.request_id)]
    assert len(left) >= 4 and set(left) == {"node_lost"}  # an offer that the cut came before is no move
    assert asked.status == 200 and not asked.done and asked.error is not None
    assert asked.error["code"] == "node_lost"
    if plain.status == 200:  # the cuts are timed by the other one: this one may have been struck less often
        same(plain, unbroken[2])
    else:
        assert plain.status == 502 and plain.error is not None and plain.error["code"] == "node_lost"
    text = asked.texts[0]
    assert 20 < len(text) < len(unbroken[0].texts[0]) and unbroken[0].texts[0].startswith(text)
