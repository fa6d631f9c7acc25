"""The sums that a placement leans on stay true whatever happens to the nodes, in whatever order."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.network.fleet import EJECTED_SHARE_MAX, Member, Roster, Snapshot, Standing, Sticky
from gridmill.network.health import OPEN_SECONDS, SLOW_START_SECONDS, Health
from gridmill.network.metering import FeePolicy, PriceRow
from gridmill.network.pace import Pace
from gridmill.network.scheduler import Full, Placement, Request, place
from gridmill.wire.messages import NodeId, OwnerId, Price


def member(
    name: str, *, slots: int = 4, standing: Standing | None = None, now: float = 0.0, in_flight: int = 0, cost: int = 0
) -> Member:
    kept = standing or Standing(Health(now - 1000), Pace(slots=slots))
    row = PriceRow(f"price-{name}", Price(cost, cost, cost), FeePolicy())
    owner = OwnerId(f"owner-{int(name[1:]) % 3}")
    return Member(
        NodeId(name),
        owner,
        slots,
        kept,
        price=row,
        in_flight=in_flight,
        region=f"r{int(name[1:]) % 2}",
        tier=int(int(name[1:]) % 4 == 0),
    )


def proven(name: str, *, slots: int = 4) -> Member:
    made = member(name, slots=slots)
    made.health.ended(0.0, None)
    return made


def true(roster: Roster, now: float) -> None:
    members = list(roster)
    working = [m for m in members if not m.draining]
    assert roster.here == len(working)
    assert roster.places == sum(m.limit for m in working)
    assert roster.room == sum(m.room for m in members)
    assert roster.in_flight == sum(m.in_flight for m in working)
    assert roster.ejected == sum(m.health.state == "open" for m in members)
    assert roster.weight == sum(m.weight for m in members)
    assert all(bool(m.weight) == bool(m.room) for m in members)
    if roster.here > 1:
        assert roster.ejected <= max(1, EJECTED_SHARE_MAX * roster.here)
    elif roster.here == 1:
        assert roster.ejected == 0
    for m in members:
        assert 0 <= m.limit <= m.slots
    drawn = roster.sample(Random(int(now)))
    assert (drawn is not None) == (roster.room > 0)
    assert drawn is None or (roster.get(drawn.node_id) is drawn and drawn.room > 0)
    assert roster.only_owner == (members[0].owner_id if len({m.owner_id for m in members}) == 1 else None)
    assert {row.price_id for row in roster.price_rows()} == {m.price.price_id for m in working}
    assert set(roster.among(Random(1))) == set(members)
    assert {m.node_id for m in roster.among(Random(1), regions=frozenset({"r0"}))} >= {
        m.node_id for m in members if m.region == "r0"
    }
    assert set(roster.among(Random(1), tier=1)) == {m for m in members if m.tier}
    assert set(roster.among(Random(1), owners=frozenset({"owner-1", "nobody"}))) == {
        m for m in members if m.owner_id == "owner-1"
    }
    assert set(roster.among(Random(1), output_nanocredits_max=2)) >= {
        m for m in members if m.price.price.output_nanocredits <= 2
    }


KINDS = ["join", "leave", "begin", "end", "drain", "good", "bad", "ttft", "wait"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 30)), max_size=120)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1 << 16))
def test_the_sums_hold_after_any_sequence_of_events(steps: list[tuple[str, int]], seed: int) -> None:
    random, roster, now = Random(seed), Roster(), 0.0
    standings: dict[str, Standing] = {}
    for step, number in steps:
        name = f"n{number}"
        there = roster.get(NodeId(name))
        match step:
            case "join" if there is None:
                kept = standings.setdefault(name, Standing(Health(now), Pace()))
                fresh = member(
                    name, slots=random.choice((1, 4, 64)), standing=kept, in_flight=number % 3, cost=number % 5
                )
                roster.add(fresh, now)
            case "leave" if there is not None:
                roster.remove(there, now)
                roster.remove(there, now)  # harmless
            case "begin" if there is not None:
                roster.load(there, there.in_flight + 1, now)
            case "end" if there is not None and there.in_flight:
                roster.load(there, there.in_flight - 1, now)
            case "drain" if there is not None:
                roster.drain(there, now)
            case "good" | "bad" if there is not None:
                now += 2.0 if step == "bad" else 0.0
                roster.ended(there, "node_failed" if step == "bad" else None, now)
            case "ttft" if there is not None:
                roster.first_token(there, now, 100 * number, random.choice((0.05, 20.0)))
                roster.tokens(there, now, 50, random.uniform(0.1, 5))
            case "wait":
                now += number
                roster.advance(now)
        true(roster, now)


def test_nodes_are_drawn_by_capacity_and_full_ones_never() -> None:
    roster = Roster()
    small, large, full = proven("n1", slots=4), proven("n2", slots=16), proven("n3", slots=64)
    for each in (small, large, full):
        roster.add(each, 0.0)
    roster.load(full, 64, 0.0)
    random, drawn = Random(5), Counter[str]()
    for _ in range(2000):
        found = roster.sample(random)
        assert found is not None
        drawn[found.node_id] += 1
    assert drawn["n3"] == 0 and 3 < drawn["n2"] / drawn["n1"] < 5


def test_a_newcomer_beside_proven_nodes_is_given_little_until_it_ends_something_well() -> None:
    roster = Roster()
    fresh = member("n1", slots=64)
    roster.add(fresh, 0.0)
    assert fresh.limit == 64  # there is nobody better known
    roster.add(other := proven("n2", slots=64), 0.0)
    assert (fresh.limit, other.limit) == (8, 64)
    roster.remove(other, 0.0)
    assert fresh.limit == 64
    roster.add(proven("n3", slots=64), 0.0)
    roster.ended(fresh, None, 0.0)
    assert fresh.limit == 64


def test_a_newcomers_chance_grows_with_time() -> None:
    roster, fresh = Roster(), member("n1", standing=Standing(Health(0.0), Pace()))
    roster.add(fresh, 0.0)
    young = fresh.weight
    roster.advance(SLOW_START_SECONDS / 2 + 0.1)
    middle = fresh.weight
    roster.advance(SLOW_START_SECONDS + 0.1)
    assert young < middle < fresh.weight


def test_the_only_node_is_never_taken_out_and_of_ten_three_at_most() -> None:
    for count, most in ((1, 0), (2, 1), (3, 1), (10, 3)):
        roster = Roster()
        members = [member(f"n{number}") for number in range(count)]
        for each in members:
            roster.add(each, 0.0)
        for number in range(4):
            for each in members:
                roster.ended(each, "node_failed", 2.0 * number)
        assert roster.ejected == most
        assert roster.room == 4 * (count - most)


def test_an_opened_breaker_is_tried_with_one_work_after_its_time() -> None:
    roster = Roster()
    bad, good = member("n1"), member("n2")
    roster.add(bad, 0.0)
    roster.add(good, 0.0)
    for number in range(3):
        roster.ended(bad, "node_failed", 10.0 * number)
    assert (bad.limit, roster.room) == (0, 4)
    roster.advance(20.0 + OPEN_SECONDS - 0.1)
    assert bad.limit == 0
    roster.advance(20.0 + OPEN_SECONDS)
    assert (bad.limit, roster.room) == (1, 5)
    roster.load(bad, 1, 26.0)
    assert roster.room == 4
    roster.load(bad, 0, 27.0)
    roster.ended(bad, None, 27.0)
    assert (bad.limit, roster.room) == (4, 8)


def test_a_node_that_was_taken_out_stays_out_when_it_joins_again() -> None:
    roster, kept = Roster(), Standing(Health(0.0), Pace())
    bad = member("n1", standing=kept)
    roster.add(bad, 0.0)
    roster.add(member("n2"), 0.0)
    for number in range(3):
        roster.ended(bad, "node_failed", 10.0 * number)
    roster.remove(bad, 21.0)
    again = member("n1", standing=kept)
    roster.add(again, 22.0)
    assert again.limit == 0
    roster.advance(26.0)
    assert again.limit == 1


def test_a_breaker_that_is_open_when_its_node_joins_is_tried_in_time() -> None:
    kept = Standing(Health(0.0), Pace())
    kept.health.open(0.0)
    roster = Roster()
    roster.add(member("n1"), 1.0)
    roster.add(bad := member("n2", standing=kept), 1.0)
    assert bad.limit == 0
    roster.advance(OPEN_SECONDS)
    assert bad.limit == 1


def test_when_a_node_on_probation_fails_again_another_that_was_taken_out_longer_gets_its_try() -> None:
    roster = Roster()
    first, second = member("n1"), member("n2")
    for each in (first, second):
        roster.add(each, 0.0)
    for moment in (0.0, 1.5, 3.0):
        roster.ended(first, "node_failed", moment)
    roster.advance(3.0 + OPEN_SECONDS)
    assert first.health.state == "half_open"
    for moment in (8.5, 10.0, 11.5):
        roster.ended(second, "node_failed", moment)
    assert (roster.ejected, second.health.state) == (1, "open")
    roster.ended(first, "node_failed", 12.0)
    assert (roster.ejected, first.health.state, second.health.state) == (1, "open", "half_open")


def test_the_owner_of_a_text_is_never_one_without_a_place() -> None:
    roster = Roster()
    members = [proven(f"n{number}") for number in range(6)]
    for each in members:
        roster.add(each, 0.0)
    for each in members[:3]:
        roster.load(each, 4, 0.0)
    for each in members[3:5]:
        roster.drain(each, 0.0)
    found = [roster.owner_of(bytes([key]) * 16) for key in range(0, 256, 8)]
    assert {owner.node_id for owner in found if owner is not None} == {"n5"}


def test_a_burst_of_requests_for_one_text_goes_to_more_nodes_than_its_owner() -> None:
    """Bounded load: the ring's owner is passed over while it carries more than its share."""
    roster = Roster()
    for number in range(10):
        roster.add(proven(f"n{number}", slots=8), 0.0)
    key, owners = b"\x42" * 16, Counter[str]()
    for _ in range(40):
        owner = roster.owner_of(key)
        if owner is None:
            break  # all that stand near carry their share
        roster.load(owner, owner.in_flight + 1, 0.0)
        owners[owner.node_id] += 1
    assert len(owners) >= 5 and max(owners.values()) <= 5


@pytest.mark.parametrize("others", [2, 20])
def test_a_node_of_which_little_is_known_gets_its_chance_now_and_then(others: int) -> None:
    roster = Roster()
    for number in range(others):
        known = proven(f"n{number}")
        for tokens in (100, 500, 900):
            known.pace.saw_first(0.0, tokens, tokens / 100_000)
            known.pace.saw_tokens(0.0, 100, 0.1, 0)
        roster.add(known, 0.0)
    roster.add(member("n99"), 0.0)
    random, chosen = Random(11), Counter[str]()
    for _ in range(2000):
        found = place(Request("c", 100, 100), Snapshot({"c": roster}), now=1.0, random=random)
        assert isinstance(found, Placement)
        chosen[found.node_id] += 1
    assert 10 < chosen["n99"] < 90  # about one in fifty
    assert isinstance(place(Request("d", 1, 1), Snapshot({"c": roster}), now=1.0, random=random), Full)


def test_a_node_that_promises_more_places_than_it_can_work_on_is_given_as_many_as_it_can() -> None:
    """It reads four prompts at once; beyond that they queue inside it. 64 places is what it says."""
    roster, boaster = Roster(), proven("n1", slots=64)
    roster.add(boaster, 0.0)
    random, now = Random(4), 0.0

    def first_tokens(works: int) -> None:
        nonlocal now
        for _ in range(works):
            now += 0.5
            seconds = 0.1 * max(1.0, boaster.in_flight / 4) * random.uniform(0.8, 1.2)
            roster.first_token(boaster, now, 100, seconds)
            roster.load(boaster, min(boaster.in_flight, boaster.limit), now)

    roster.load(boaster, 2, now)
    first_tokens(20)
    assert boaster.limit == 64
    for _ in range(100):
        roster.load(boaster, boaster.limit, now)
        first_tokens(3)
    assert 8 <= boaster.limit <= 24
    assert boaster.pace.read_seconds(100) < 0.25, "the queue is not mistaken for the machine"
    assert boaster.pace.wait_seconds(now) > 0.0
    roster.load(boaster, 0, now)
    roster.advance(now + 100.0)
    assert boaster.limit == 64, "what was is forgotten when nothing was heard for a minute"


def test_the_usual_time_to_a_first_token_ignores_what_a_busy_hour_adds() -> None:
    roster, busy = Roster(), member("n1", slots=4)
    roster.add(busy, 0.0)
    random = Random(2)
    for number in range(200):
        roster.first_token(busy, float(number), 100, random.uniform(0.3, 0.5))
    usual = roster.usual_ttft_seconds
    assert 0.28 < usual < 0.42
    roster.load(busy, 4, 200.0)
    for number in range(200):
        roster.first_token(busy, 200.0 + number, 100, random.uniform(2.0, 4.0))
    assert roster.usual_ttft_seconds < 2 * usual


def test_a_key_is_not_tied_to_a_node_for_ever() -> None:
    sticky = Sticky()
    for _ in range(200):
        sticky.remember("c", "me", NodeId("n1"), 0.0)
    assert sticky.node_of("c", "me", 0.0) is None
    sticky.remember("c", "me", NodeId("n1"), 0.0)
    assert sticky.node_of("c", "me", 1.0) == "n1"
    assert sticky.node_of("d", "me", 1.0) is None and sticky.node_of("c", "you", 1.0) is None
    assert sticky.node_of("c", "me", 10_000.0) is None
