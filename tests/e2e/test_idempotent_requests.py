"""Idempotency-Key between real programs: retries, joins, callers who leave, and a network killed in mid-answer.

Echo's ids depend on all ids before them: an answer continued at a wrong place cannot have the right text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import Place, Program, gridmill, place, until

DEMO = "gridmill/demo"
HELLO = [{"role": "user", "content": "hello there"}]
CREDITS = 1_000_000_000
SOON = ("--drain-timeout-seconds", "0.2", "--resume-timeout-seconds", "2")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


class Shop:
    """A network whose one node asks 50/400, and somebody with a credit."""

    def __init__(self, here: Place, *, speed: int = 100, credit: str = "1") -> None:
        self.here = here
        self.data = here.folder / "network"
        self.network: Program = here.network(*SOON)
        self.node = self.start_node(speed)
        self.key = here.key("tester")
        if credit:
            self.text("credit", "tester", credit)

    def start_node(self, speed: int) -> Program:
        rate = str(speed)
        return self.here.node(self.network, "--engine", "echo", "--price", "50/400", "--echo-tokens-per-second", rate)

    def text(self, *arguments: str) -> str:
        return gridmill(*arguments, "--data", self.data)

    def kill(self) -> None:
        self.network.kill()

    def stop(self) -> None:
        assert self.network.interrupt() == 0

    def start_again(self) -> None:
        port = int(self.network.facts["base_url"].rsplit(":", 1)[1].split("/")[0])
        self.network = self.here.network(*SOON, port=port)
        until(lambda: any(model["nodes"] for model in self.here.status()["models"]), seconds=60)

    def ask(self, idempotency_key: str | None = None, **body: Any) -> Asked:
        asked = {"model": DEMO, "messages": HELLO, "max_tokens": 60, **body}
        return Asked(self.network.facts["base_url"], self.key, idempotency_key, asked)

    def count(self, sql: str) -> int:
        with contextlib.closing(sqlite3.connect(f"file:{self.data / 'network.sqlite'}?mode=ro", uri=True)) as database:
            return int(database.execute(sql).fetchone()[0])

    def running(self) -> int:
        return self.count("SELECT count(*) FROM open_works")

    def journalled(self) -> int:
        """How many delivered ids the running works have in the books."""
        return self.count("SELECT coalesce(sum(output_tokens), 0) FROM open_works")

    def spent(self) -> int:
        """Nanocredits; what running works hold is not spent."""
        kept = "SELECT sum(balance) FROM ledger_accounts WHERE account LIKE 'user:%' OR account LIKE 'escrow:%'"
        return CREDITS - self.count(kept)

    def spends(self, amount: int) -> bool:
        until(lambda: self.spent() >= amount and not self.running())
        assert self.text("ledger", "check").startswith("The books add up")
        assert self.spent() == amount
        return True


class Asked:
    """A request on a connection of its own, read as slowly as the test likes."""

    def __init__(self, base_url: str, api_key: str, idempotency_key: str | None, body: dict[str, Any]) -> None:
        self.connection = http.client.HTTPConnection(base_url.split("://")[1].split("/")[0], timeout=60)
        headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
        if idempotency_key is not None:
            headers["idempotency-key"] = idempotency_key
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        self.connection.request("POST", path, json.dumps(body), headers)
        self.texts: dict[int, str] = {}
        self.usage: dict[str, Any] = {}
        self.ended: set[int] = set()

    def response(self) -> http.client.HTTPResponse:
        self._response = self.connection.getresponse()
        return self._response

    def answer(self) -> tuple[int, dict[str, Any]]:
        response = self.response()
        return response.status, json.loads(response.read())

    def event(self) -> bool:
        """Reads one event; False at the end."""
        if not hasattr(self, "_response"):
            assert self.response().status == 200
        while line := self._response.readline():
            if line.startswith(b"data: [DONE]"):
                return False
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                self.usage = event.get("usage") or self.usage
                for choice in event["choices"]:
                    index = choice["index"]
                    self.texts[index] = self.texts.get(index, "") + (choice["delta"].get("content") or "")
                    if choice["finish_reason"]:
                        self.ended.add(index)
                return True
        raise AssertionError("the stream broke off")

    def whole(self) -> dict[int, str]:
        while self.event():
            pass
        return self.texts

    def leave(self) -> None:
        self.connection.close()


STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def test_a_retry_gets_the_same_bytes_and_is_not_charged(here: Place) -> None:
    shop = Shop(here, speed=500)
    first = shop.ask("again", n=2, seed=1)
    response = first.response()
    assert response.status == 200 and response.headers["x-gridmill-replayed"] is None
    body = response.read()
    cost = json.loads(body)["usage"]["cost_nanocredits"]
    assert cost > 0
    retry = shop.ask("again", n=2, seed=1).response()
    assert retry.read() == body and retry.headers["x-gridmill-replayed"] == "true"
    assert retry.headers["x-gridmill-request-id"] == response.headers["x-gridmill-request-id"]

    streamed = shop.ask("streamed", n=2, seed=1, **STREAMED)
    texts = streamed.whole()
    again = shop.ask("streamed", n=2, seed=1, **STREAMED)
    assert again.whole() == texts and again.usage == streamed.usage
    assert [choice["message"]["content"] for choice in json.loads(body)["choices"]] == [texts[0], texts[1]]

    status, error = shop.ask("again", n=1, seed=1).answer()
    assert (status, error["error"]["code"]) == (422, "idempotency_key_reused")
    status, error = shop.ask("é", seed=1).answer()
    assert (status, error["error"]["code"]) == (400, "invalid_idempotency_key")
    shop.network.kill()
    shop.start_again()
    assert shop.ask("again", n=2, seed=1).response().read() == body, "not after a restart"
    assert shop.spends(2 * cost)


def test_a_retry_joins_the_answer_while_it_streams_and_one_that_left_comes_back_to_it(here: Place) -> None:
    shop = Shop(here)
    asked = {"seed": 5, "n": 2, **STREAMED}
    alone = shop.ask(**asked)
    texts = alone.whole()
    cost = alone.usage["cost_nanocredits"]
    first = shop.ask("joined", **asked)
    for _ in range(10):
        first.event()
    second = shop.ask("joined", **asked)
    second.event()
    assert not first.ended
    first.leave()
    third = shop.ask("joined", **asked)
    assert second.whole() == third.whole() == texts
    assert second.usage == third.usage == alone.usage
    # Nobody listens at all, and it is made to its end all the same.
    left = shop.ask("left", **asked)
    left.event()
    left.leave()
    assert shop.spends(3 * cost)
    assert shop.ask("left", **asked).whole() == texts
    plain = {"seed": 5, "n": 2}
    lost = shop.ask("plain", **plain)
    until(lambda: shop.running() == 2)
    lost.leave()
    status, answer = shop.ask("plain", **plain).answer()
    assert status == 200 and [choice["message"]["content"] for choice in answer["choices"]] == [texts[0], texts[1]]
    assert shop.spends(4 * cost)


def test_a_network_killed_or_stopped_in_mid_answer_goes_on_where_its_books_end(here: Place) -> None:
    shop = Shop(here)
    asked: dict[str, Any] = {"seed": 3, "n": 2, "max_tokens": 100}
    alone = shop.ask(**asked, **STREAMED)
    texts = alone.whole()
    cost = alone.usage["cost_nanocredits"]
    until(lambda: shop.spent() == cost and not shop.running())
    for number, (streamed, end) in enumerate(((True, shop.kill), (False, shop.kill), (True, shop.stop)), 1):
        body = {**asked, **(STREAMED if streamed else {})}
        broken = shop.ask(f"key {number}", **body)
        until(lambda: shop.journalled() >= 20)
        end()
        shop.start_again()
        assert number * cost < shop.spent() < (number + 1) * cost, "the first run was not broken off: nothing is shown"
        for _ in range(2):
            again = shop.ask(f"key {number}", **body)
            if streamed:
                assert again.whole() == texts and again.usage == alone.usage
            else:
                told = json.loads(again.response().read())
                assert {choice["index"]: choice["message"]["content"] for choice in told["choices"]} == texts
                assert told["usage"] == alone.usage
        assert shop.spends((number + 1) * cost)
        broken.leave()


def test_a_killed_node_ends_the_stream_and_a_retry_finishes_it_on_another(here: Place) -> None:
    shop = Shop(here)
    asked = {"seed": 9, "max_tokens": 80, **STREAMED}
    alone = shop.ask(**asked)
    texts = alone.whole()
    broken = shop.ask("node", **asked)
    for _ in range(20):
        broken.event()
    shop.node.kill()
    with pytest.raises(AssertionError, match="node_lost"):
        broken.whole()
    shop.start_node(500)
    again = shop.ask("node", **asked)
    assert again.whole() == texts and len(texts[0]) > len(broken.texts[0])
    # The node forfeited its pay for the prompt; whoever goes on reads it again and is paid: once for each answer.
    assert abs(alone.usage["cost_nanocredits"] - again.usage["cost_nanocredits"]) <= 2
    assert shop.spends(alone.usage["cost_nanocredits"] + again.usage["cost_nanocredits"])


def test_what_came_to_nothing_is_tried_again_under_the_same_key(here: Place) -> None:
    shop = Shop(here, speed=500, credit="")
    status, error = shop.ask("poor", seed=1).answer()
    assert (status, error["error"]["code"]) == (402, "insufficient_balance")
    shop.text("credit", "tester", "1")
    status, answer = shop.ask("poor", seed=1).answer()
    assert status == 200 and shop.spends(answer["usage"]["cost_nanocredits"])
