"""More asked than there are places, over real programs: who waits, who is refused, and what they are told."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import Place, Program, Stream, gridmill, place, until

MODEL = "gridmill/demo"
ECHO = ["--engine", "echo", "--slots", "1", "--echo-delay-seconds", "0.3", "--echo-tokens-per-second", "20"]
MAX_WAIT = "x-gridmill-max-wait-seconds"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def ask(network: Program, key: str, headers: dict[str, str] | None = None, **body: Any) -> Answer:
    connection = http.client.HTTPConnection(network.facts["base_url"].split("://")[1].split("/")[0], timeout=60)
    asked = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "ignore_eos": True, **body}
    sent = {"authorization": f"Bearer {key}", "content-type": "application/json", **(headers or {})}
    connection.request("POST", "/v1/completions", json.dumps(asked), sent)
    response = connection.getresponse()
    answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(response.read()))
    connection.close()
    return answer


def counted(network: Program, line: str) -> float:
    root = network.facts["base_url"].removesuffix("/v1")
    with urllib.request.urlopen(f"{root}/metrics") as response:
        found = [each for each in response.read().decode().splitlines() if each.startswith(line + " ")]
    return float(found[0].split()[1]) if found else 0.0


def test_who_will_not_wait_is_refused_with_a_time_and_who_will_is_served_in_order(here: Place) -> None:
    network = here.network("--queue-places-factor", "8", "--approve", "open")
    here.node(network, *ECHO)
    key = here.key()
    until(lambda: ask(network, key).status == 200)
    assert ask(network, key).body.get("service_tier") is None

    hog = Stream(network.facts["base_url"], key, model=MODEL, prompt="Hello", max_tokens=900, ignore_eos=True)
    hog.event()
    refused = ask(network, key)
    assert (refused.status, refused.body["error"]["code"]) == (429, "overloaded")
    told = int(refused.headers["retry-after"])
    assert told >= 1 and int(refused.headers["retry-after-ms"]) <= 1000 * told
    for wrong in ("soon", "-1", "1e3"):
        answer = ask(network, key, {MAX_WAIT: wrong})
        assert answer.status == 400 and MAX_WAIT in answer.body["error"]["message"]
    assert ask(network, key, {MAX_WAIT: "0"}, service_tier="flex").status == 429
    assert ask(network, key, service_tier="priority").status == 400

    ended: list[str] = []

    def wait(name: str, **how: Any) -> Answer:
        answer = ask(network, key, **how)
        ended.append(name)
        return answer

    with ThreadPoolExecutor() as callers:
        flexible = callers.submit(wait, "flex", service_tier="flex")
        until(lambda: counted(network, "gridmill_queue_length") == 1)
        patient = callers.submit(wait, "patient", headers={MAX_WAIT: "25"}, service_tier="auto")
        until(lambda: counted(network, "gridmill_queue_length") == 2)
        assert here.status()["requests_waiting"] == 2
        hog.close()  # and its place is free
        assert (patient.result().status, flexible.result().status) == (200, 200)
    assert ended == ["patient", "flex"]
    assert patient.result().body["service_tier"] == "default" and flexible.result().body["service_tier"] == "flex"
    assert counted(network, 'gridmill_requests_refused_total{reason="late"}') == 2
    assert counted(network, "gridmill_queue_seconds_count") >= 2
    assert counted(network, "gridmill_queue_length") == 0


def test_a_key_has_a_weight(here: Place) -> None:
    network = here.network("--approve", "open")
    data = here.folder / "network"
    made = json.loads(gridmill("keys", "create", "heavy", "--weight", "3", "--json", "--data", data))
    assert made["weight"] == 3
    assert "weight 3" in gridmill("keys", "list", "--data", data)
    assert network.interrupt() == 0
