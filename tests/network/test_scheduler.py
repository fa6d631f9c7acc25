"""Placement is a pure function: the same picture, time and dice give the same node."""

from random import Random

from gridmill.network.fleet import Member, Roster, Snapshot, Standing, Sticky
from gridmill.network.health import Health
from gridmill.network.metering import FREE, FeePolicy, PriceRow
from gridmill.network.pace import Pace
from gridmill.network.scheduler import Allowed, Full, Placement, Reason, Request, place
from gridmill.wire.messages import NodeId, OwnerId, Price
from gridmill.wire.sampling import pack_ids

CLASS = "class"
NOW = 1000.0
PROMPT = pack_ids(tuple(range(1, 1025)))


def node(
    name: str,
    *,
    owner: str = "",
    slots: int = 4,
    busy: int = 0,
    speed: float = 100.0,
    price: Price | None = None,
    draining: bool = False,
    region: str = "",
    tier: int = 0,
    faults: int = 0,
) -> Member:
    """Measured at `speed` ids a second, and reading ten times as fast."""
    pace = Pace(decode_hint=speed, prefill_hint=10 * speed, slots=slots)
    for tokens in (100, 1000, 400):
        pace.saw_first(NOW, tokens, tokens / (10 * speed))
        pace.saw_tokens(NOW, 100, 100 / speed, 0)
    health = Health(NOW - 1000)
    for _ in range(50):
        health.ended(NOW - 500, None)
    for number in range(faults):
        health.ended(NOW + 10 * number, "node_failed")
    row = PriceRow(f"price-{name}", price, FeePolicy()) if price is not None else FREE
    return Member(
        NodeId(name),
        OwnerId(owner or f"owner-{name}"),
        slots,
        Standing(health, pace),
        price=row,
        region=region,
        tier=tier,
        in_flight=busy,
        draining=draining,
    )


def picture(*members: Member) -> Snapshot:
    roster = Roster()
    for member in members:
        roster.add(member, NOW)
    return Snapshot({CLASS: roster} if members else {})


def choose(*members: Member, seed: int = 0, read_tokens: int = 100, **wishes: object) -> Placement | Full:
    request = Request(CLASS, read_tokens, 100, read_tokens, **wishes)  # type: ignore[arg-type]
    return place(request, picture(*members), now=NOW, random=Random(seed))


def chosen(*members: Member, **wishes: object) -> str:
    found = choose(*members, **wishes)  # type: ignore[arg-type]
    assert isinstance(found, Placement), found
    return found.node_id


def reasons(found: Placement | Full) -> dict[str, Reason]:
    return {str(node_id): reason for node_id, reason in found.considered}


def test_the_faster_of_two_idle_nodes_is_chosen() -> None:
    assert chosen(node("slow", speed=10), node("fast", speed=50)) == "fast"


def test_among_equals_the_emptier_is_chosen() -> None:
    assert chosen(node("a", busy=3), node("b", busy=1)) == "b"


def test_a_full_node_is_passed_over_even_if_it_is_the_fastest() -> None:
    found = choose(node("fast", busy=4, speed=1000), node("slow", speed=1))
    assert isinstance(found, Placement) and found.node_id == "slow"
    assert reasons(found) == {"fast": "busy"}


def test_draining_and_excluded_nodes_get_nothing() -> None:
    assert chosen(node("a", draining=True), node("b")) == "b"
    assert chosen(node("a"), node("b"), excluded=frozenset({NodeId("a")})) == "b"


def test_a_class_nobody_serves_is_told_apart_from_one_whose_nodes_are_full() -> None:
    assert choose() == Full("no_node")
    assert choose(node("a"), excluded=frozenset({NodeId("a")})) == Full(
        "no_node", considered=((NodeId("a"), "tried before"),)
    )
    assert choose(node("a", draining=True)) == Full("no_node")
    assert choose(node("a", busy=4)) == Full("busy", considered=((NodeId("a"), "busy"),))


def test_a_class_of_many_full_nodes_is_busy_and_one_of_many_forbidden_nodes_has_no_node() -> None:
    assert choose(*(node(f"n{n}", busy=4) for n in range(40))) == Full("busy")
    many = [node(f"n{n}", price=Price(10, 10, 10)) for n in range(40)]
    found = choose(*many, max_price=Price(1, 1, 1))
    assert isinstance(found, Full) and found.reason == "no_node"


def test_the_one_node_of_many_that_fits_is_found_wherever_it_is() -> None:
    for place_of_it in (0, 17, 39):
        many = [node(f"n{n}", price=Price(10, 10, 10)) for n in range(40)]
        many[place_of_it] = node("it", price=Price(1, 1, 1))
        assert chosen(*many, not_above=Price(1, 1, 1)) == "it"


def test_the_node_that_was_sent_this_text_wins_although_it_is_slower() -> None:
    warm = node("warm", speed=80)
    warm.sent.remember(CLASS, b"salt", PROMPT, NOW)
    seen = picture(warm, node("cold", speed=100))

    def asked(prompt: bytes, salt: bytes) -> Placement | Full:
        request = Request(CLASS, 1024, 100, prompt=prompt, cache_salt=salt)
        return place(request, seen, now=NOW, random=Random(0))

    found = asked(PROMPT, b"salt")
    assert isinstance(found, Placement)
    assert (found.node_id, found.cached_tokens) == ("warm", 1023)
    assert reasons(found) == {"cold": "cache elsewhere"}
    for prompt, salt in ((b"", b"salt"), (PROMPT, b"other")):
        found = asked(prompt, salt)
        assert isinstance(found, Placement) and found.node_id == "cold"


def test_a_node_that_made_others_wait_is_avoided_until_that_is_forgotten() -> None:
    slow_today = node("a", speed=110)
    slow_today.pace.waited(NOW, 5.0)
    assert chosen(slow_today, node("b")) == "b"
    members = [node("a", speed=110), node("b")]
    members[0].pace.waited(NOW - 100, 5.0)
    assert chosen(*members) == "a"


def test_a_dearer_node_needs_to_be_faster() -> None:
    dear, cheap = Price(100, 100, 20_000), Price(100, 100, 10_000)
    assert chosen(node("dear", price=dear), node("cheap", price=cheap)) == "cheap"
    assert chosen(node("dear", price=dear, speed=1000), node("cheap", price=cheap, speed=1)) == "dear"


def test_a_price_above_what_is_held_or_asked_or_paid_before_is_no_candidate() -> None:
    def dear() -> Member:
        return node("dear", price=Price(10, 5, 20), speed=1000)

    for wishes in (
        {"affordable_nanocredits": 1000},
        {"max_price": Price(9, 9, 30)},
        {"not_above": Price(10, 4, 20)},
    ):
        found = choose(dear(), node("free", speed=1), **wishes)  # type: ignore[arg-type]
        assert isinstance(found, Placement) and found.node_id == "free"
        assert reasons(found) == {"dear": "price cap"}
    assert chosen(dear(), node("free", speed=1), not_above=Price(10, 5, 20), max_price=Price(11, 11, 21)) == "dear"


def test_region_owner_and_tier_are_kept() -> None:
    def here() -> tuple[Member, Member]:
        return node("a", region="eu", owner="x", tier=1, speed=1), node("b", region="us", owner="y")

    assert chosen(*here()) == "b"
    assert chosen(*here(), allowed=Allowed(regions=frozenset({"eu"}))) == "a"
    assert chosen(*here(), allowed=Allowed(owners=frozenset({"x"}))) == "a"
    assert chosen(*here(), allowed=Allowed(tier=1)) == "a"
    found = choose(*here(), allowed=Allowed(regions=frozenset({"mars"})))
    assert isinstance(found, Full) and found.reason == "no_node"
    assert set(reasons(found).values()) == {"region"}


def test_another_owner_is_preferred_and_the_same_one_taken_when_nobody_else_has_room() -> None:
    avoid = frozenset({OwnerId("x")})
    for busy, expected in ((0, "other"), (4, "n")):
        many = [node(f"n{n}", owner="x") for n in range(40)]
        assert chosen(*many, node("other", owner="y", speed=1, busy=busy), avoid_owners=avoid).startswith(expected)


def test_a_sticky_key_brings_its_node_among_the_candidates() -> None:
    sticky, roster = Sticky(), Roster()
    for number in range(200):
        roster.add(node(f"n{number}", speed=10), NOW)
    roster.add(node("mine", speed=1000, slots=1), NOW)
    seen = Snapshot({CLASS: roster}, sticky)
    sticky.remember(CLASS, "me", NodeId("mine"), NOW)
    request = Request(CLASS, 100, 100, sticky="me")
    for seed in range(20):
        found = place(request, seen, now=NOW, random=Random(seed))
        assert isinstance(found, Placement) and found.node_id == "mine"
    later = [place(request, seen, now=NOW + 10_000, random=Random(seed)) for seed in range(20)]
    assert {found.node_id for found in later if isinstance(found, Placement)} > {"mine"}, "forgotten: only drawn"


def test_gateways_that_share_nothing_send_the_same_text_to_the_same_few_nodes() -> None:
    """The ring's owners are the same everywhere, whatever the dice say."""
    seen = [picture(*(node(f"n{n}") for n in order)) for order in (range(200), range(199, -1, -1))]
    for first_id in range(5):
        prompt = pack_ids(tuple(range(first_id, first_id + 600)))
        request = Request(CLASS, 600, 100, prompt=prompt, explain=True)
        owners = []
        for number, each in enumerate(seen):
            found = place(request, each, now=NOW, random=Random(number))
            assert found.why is not None
            owners.append({why.node_id for why in found.why if why.drawn_as == "ring"})
        assert owners[0] == owners[1] and owners[0]


def test_a_decision_in_words_and_numbers_adds_up() -> None:
    found = choose(node("a", busy=2), node("b", speed=10), node("c", busy=4), explain=True)
    assert isinstance(found, Placement) and found.why is not None
    best, other, full = found.why
    assert (best.node_id, best.outcome, other.outcome, full.outcome) == ("a", "chosen", "slower", "busy")
    for why in (best, other):
        parts = (why.wait_seconds, why.prefill_seconds, why.round_trip_seconds)
        parts += (why.decode_seconds, why.price_seconds, why.redo_seconds)
        assert why.cost_seconds is not None and abs(sum(parts) - why.cost_seconds) < 0.001
    assert best.cost_seconds < other.cost_seconds  # type: ignore[operator]
    assert choose(node("a")).why is None


def test_placing_changes_nothing() -> None:
    seen = picture(*(node(f"n{n}") for n in range(50)))
    request = Request(CLASS, 600, 100, prompt=PROMPT, sticky="me")
    assert place(request, seen, now=NOW, random=Random(1)) == place(request, seen, now=NOW, random=Random(1))
    assert seen.sticky_node(CLASS, "me", NOW) is None
