"""What a node's owner is told: its own nodes, what was measured of them, and why work went elsewhere."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from test_plain_api import Stage, over_a_socket

from gridmill.network import demand
from gridmill.network.control import ControlError
from gridmill.network.registry import NodeRecord, Registry
from gridmill.network.scheduler import Allowed, Placement, Reason, Request
from gridmill.wire.classes import ClassId, ModelClass
from gridmill.wire.messages import ClassOffer, NodeId, OwnerId, Telemetry

CLASS = ModelClass(
    weights=(), arithmetic="echo", kv_dtype="none", sampler_version=1, tokenizer_sha256="a", text_facts_sha256="b"
)
CLASS_ID = CLASS.class_id


def fleet() -> Registry:
    return Registry(None, approve="open", now=lambda: 100.0, random=Random(1))  # type: ignore[arg-type]


def join(registry: Registry, name: str, *, ttft_seconds: float = 0.1, slots: int = 4, region: str = "") -> NodeRecord:
    record = registry.join(NodeId(name), OwnerId(f"owner-{name}"), "test")
    registry.offer(record, [ClassOffer("demo", CLASS, slots, "echo", region=region)])
    for tokens in (100, 200, 1000):
        registry.observe(
            record, CLASS_ID, prefill_tokens=tokens, ttft_seconds=ttft_seconds * tokens / 100, tokens=100, seconds=1.0
        )
    return record


def of_class(registry: Registry, record: NodeRecord) -> dict[str, Any]:
    found: dict[str, Any] = demand.report(registry, record, 100.0)["classes"][0]
    return found


def lost(registry: Registry, record: NodeRecord) -> dict[str, int]:
    return {each["reason"]: each["count"] for each in of_class(registry, record)["demand"]["lost"]}


def test_every_reason_to_lose_is_explained() -> None:
    assert set(demand.REMEDIES) == {*Reason.__args__, demand.NOT_DRAWN}


def test_won_and_lost_decisions_add_up_to_those_that_fell_while_it_was_here() -> None:
    registry = fleet()
    quick = join(registry, "quick")
    registry.place(Request(CLASS_ID, 1000, 10))
    slow = join(registry, "slow", ttft_seconds=1.0)
    for _ in range(6):
        found = registry.place(Request(CLASS_ID, 1000, 10))
        assert isinstance(found, Placement) and found.node_id == "quick"
        registry.begin(quick, CLASS_ID) if registry.room(CLASS_ID) > 6 else None
    assert of_class(registry, quick)["demand"]["won"] == 7
    shown = of_class(registry, slow)["demand"]
    assert (shown["decisions"], shown["won"], shown["won_share"]) == (6, 0, 0.0)
    assert lost(registry, slow) == {"slower": 6}


def test_a_node_that_is_never_looked_at_is_told_so() -> None:
    registry = fleet()
    records = [join(registry, f"n{number}") for number in range(40)]
    for _ in range(30):
        registry.place(Request(CLASS_ID, 1000, 10))
    totals = [of_class(registry, record)["demand"] for record in records]
    assert sum(each["won"] for each in totals) == 30
    for each, record in zip(totals, records, strict=True):
        assert each["won"] + sum(lost(registry, record).values()) == 30
        assert lost(registry, record).get("not drawn", 0) > 10


def test_filters_and_full_places_are_reasons_of_their_own() -> None:
    registry = fleet()
    here, there = join(registry, "here", region="eu"), join(registry, "there", region="us", slots=1)
    registry.place(Request(CLASS_ID, 10, 10, allowed=Allowed(regions=frozenset({"eu"}))))
    registry.begin(there, CLASS_ID)
    registry.place(Request(CLASS_ID, 10, 10))
    assert lost(registry, there) == {"region": 1, "busy": 1}
    assert lost(registry, here) == {}


def test_counts_go_on_when_a_node_joins_again_and_stand_still_while_it_is_gone() -> None:
    registry = fleet()
    join(registry, "quick")
    slow = join(registry, "slow", ttft_seconds=1.0)
    registry.place(Request(CLASS_ID, 1000, 10))
    registry.leave(slow)
    registry.place(Request(CLASS_ID, 1000, 10))
    again = registry.join(NodeId("slow"), OwnerId("owner-slow"), "test")
    registry.offer(again, [ClassOffer("demo", CLASS, 4, "echo")])
    registry.place(Request(CLASS_ID, 1000, 10))
    assert of_class(registry, again)["demand"]["decisions"] == 2
    assert lost(registry, again) == {"slower": 2}
    assert of_class(registry, again)["measured"]["works"] == 3


def test_what_a_node_won_before_it_was_measured_is_kept_too() -> None:
    registry = fleet()
    record = registry.join(NodeId("a"), OwnerId("o"), "test")
    registry.offer(record, [ClassOffer("demo", CLASS, 4, "echo")])
    registry.place(Request(CLASS_ID, 10, 10))
    registry.offer(record, [ClassOffer("demo", CLASS, 8, "echo", decode_tokens_per_second=50)])
    assert of_class(registry, record)["demand"]["won"] == 1
    view = registry.snapshot().by_class[CLASS_ID][0]
    assert (view.slots, view.decode_tokens_per_second) == (8, 50)  # the newest hint, while there is nothing better


def test_a_node_that_took_its_works_along_again_and_again_is_taken_out_when_it_returns() -> None:
    registry = fleet()
    join(registry, "other")
    for fault in ("node_lost", "node_stalled", "node_failed"):
        record = join(registry, "flapping")
        registry.leave(record)
        registry.ended(record, CLASS_ID, fault=fault)
    again = join(registry, "flapping")
    assert of_class(registry, again)["state"] == "breaker open"
    registry.ended(record, CLASS_ID, fault=None)  # a late good word of an earlier conversation changes nothing
    assert of_class(registry, again)["state"] == "breaker open"


def test_a_node_that_others_fill_is_avoided_by_its_own_word_and_its_own_works_are_not_counted_twice() -> None:
    registry = fleet()
    full, slower = join(registry, "full"), join(registry, "slower", ttft_seconds=0.15)

    def chosen() -> str:
        found = registry.look(Request(CLASS_ID, 1000, 100))
        assert isinstance(found, Placement)
        return found.node_id

    assert chosen() == "full"
    full.telemetry = Telemetry(running=4, waiting=8)
    assert chosen() == "slower"
    for _ in range(2):
        registry.begin(full, CLASS_ID)
        registry.begin(slower, CLASS_ID)
    full.telemetry = Telemetry(running=2)
    assert chosen() == "full"
    slower.telemetry = Telemetry()  # saying less than it has been given does not help it
    assert chosen() == "full"


def test_the_first_id_of_a_work_says_nothing_about_how_long_answers_are() -> None:
    registry = fleet()
    record = join(registry, "a")
    roster = registry.roster(CLASS_ID)
    assert roster is not None
    usual = roster.output_tokens
    registry.observe(record, CLASS_ID, prefill_tokens=100, ttft_seconds=0.1, tokens=0, seconds=0.0)
    assert roster.output_tokens == usual
    registry.observe(record, CLASS_ID, prefill_tokens=0, ttft_seconds=0.0, tokens=9, seconds=0.1)
    assert roster.output_tokens < usual


def test_a_node_sees_in_which_state_it_is() -> None:
    registry = fleet()
    record, other = join(registry, "a", slots=64), join(registry, "b")
    assert of_class(registry, record)["state"] == "serving"
    registry.ended(other, CLASS_ID, fault=None)
    assert of_class(registry, record)["state"] == "starting"
    registry.ended(record, CLASS_ID, fault=None)
    for fault in ("node_failed", "bad_ids", "node_stalled"):
        registry.ended(record, CLASS_ID, fault=fault)
    shown = of_class(registry, record)
    assert (shown["state"], shown["limit"], shown["breaker_open_seconds"]) == ("breaker open", 0, 5.0)
    registry.drain(record)
    assert of_class(registry, record)["state"] == "draining"


def test_what_was_never_measured_is_null() -> None:
    registry = fleet()
    record = registry.join(NodeId("a"), OwnerId("o"), "test")
    registry.offer(record, [ClassOffer("demo", CLASS, 4, "echo", decode_tokens_per_second=1e9)])
    shown = of_class(registry, record)
    assert {shown["measured"][name] for name in shown["measured"] if name.endswith("per_second")} == {None}
    assert shown["demand"]["won_share"] is None


@over_a_socket
async def test_a_key_for_nodes_sees_its_accounts_nodes_and_no_others(made: Stage) -> None:
    mine, its_ordinary_key = [
        await made.do.keys_create("mine", scope, account=account)
        for scope, account in (("node", None), ("inference", "mine"))
    ]
    record = join(made.registry, "my-node")
    join(made.registry, "another")
    for node_id in ("my-node", "asleep"):
        await made.accounts.note_node(node_id, mine["key_id"])
    status, said = await made.ask("GET", "/v1/nodes", key=mine["api_key"])
    assert status == 200
    assert [(each["node_id"], each["connected"]) for each in said["data"]] == [("asleep", False), ("my-node", True)]
    assert (
        said["data"][1]["classes"][0]["demand"] == demand.report(made.registry, record, 100.0)["classes"][0]["demand"]
    )
    assert await made.code("GET", "/v1/nodes", key=its_ordinary_key["api_key"]) == (403, "insufficient_scope")
    assert await made.code("POST", "/v1/nodes", {}, key=mine["api_key"]) == (405, "method_not_allowed")
    assert await made.code("GET", "/v1/nodes?all=1", key=mine["api_key"]) == (400, "invalid_query")


@over_a_socket
async def test_an_operator_sees_all_nodes(made: Stage) -> None:
    join(made.registry, "one")
    join(made.registry, "two")
    status, said = await made.ask("GET", "nodes")
    assert (status, {each["node_id"] for each in said["data"]}) == (200, {"one", "two"})
    status, said = await made.ask("GET", "nodes/two")
    assert (status, said["node_id"]) == (200, "two")
    assert await made.code("GET", "nodes/three") == (404, "not_found")
    with pytest.raises(ControlError):
        await made.do.nodes("three")


def test_the_registry_answers_what_dispatch_asks_of_a_node() -> None:
    registry = fleet()
    class_id = ClassId(CLASS_ID)
    fresh = registry.join(NodeId("fresh"), OwnerId("o"), "test")
    registry.offer(fresh, [ClassOffer("demo", CLASS, 4, "echo", prefill_tokens_per_second=1e9)])
    assert registry.first_token_seconds(fresh, class_id, 10) >= 5.0
    assert registry.token_gap_seconds(fresh, class_id) == registry.usual_ttft_seconds(class_id) == 0.0
    assert (registry.places(class_id), registry.room(class_id)) == (4, 4)
    known = join(registry, "known")
    assert 0.9 < registry.first_token_seconds(known, class_id, 1000) < 1.1
    assert 0.009 < registry.token_gap_seconds(known, class_id) < 0.02
    assert registry.usual_ttft_seconds(class_id) > 0
    registry.queued(known, class_id, 3.0)
    assert registry.first_token_seconds(known, class_id, 1000) > 3.9
    registry.begin(known, class_id)
    assert (registry.places(class_id), registry.room(class_id)) == (8, 7)
    registry.drain(known)
    assert (registry.places(class_id), registry.room(class_id)) == (4, 4)
    registry.end(known, class_id)
    registry.leave(known)
    registry.observe(known, class_id, prefill_tokens=1, ttft_seconds=1.0, tokens=9, seconds=1.0)
    registry.ended(known, class_id, fault="node_lost")  # the last words of works that it took along
    assert registry.first_token_seconds(known, class_id, 1000) > 0.9
