"""Where one Work goes: a pure function of the request, a picture of the fleet, the time and a source of chance.

A few candidates are compared, never the whole fleet: the node that served this caller last, those that were sent this
text, the owners of its beginning on a consistent-hash ring, and some drawn by capacity. Looking at all of them for the
least cost makes every gateway run to the same node on the same old news; a few are also enough for ten thousand.
The least cost wins, in seconds:

    wait + prefill of what is not cached + round trip      until the first id, as measured
    + DECODE_WEIGHT · expected output · time per id        so that quick nodes are preferred, but not at any wait
    + price · SECONDS_PER_NANOCREDIT
    + (1 - availability) · what it costs to begin again elsewhere
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal

import msgspec

from gridmill.network.fleet import Member, Roster, Snapshot
from gridmill.network.metering import most
from gridmill.network.prefixes import Text
from gridmill.wire.messages import NodeId, OwnerId, Price

SAMPLED = 3
EXPLORED_SHARE = 0.02  # of decisions give a node of which little is known its chance
RING_STRIDES = (1, 4)  # blocks of 256 ids whose owner on the ring is asked: what many share, and what one chat has
DECODE_WEIGHT = 0.1
SECONDS_PER_NANOCREDIT = 2e-6  # half a thousandth of a credit is worth one second
DETECTION_SECONDS = 2.0  # until it shows that a node is gone
OTHER_OWNER_LOOKS = 4  # more draws for a node of another owner before all are looked at

Reason = Literal[
    "busy",
    "dearer",
    "slower",
    "farther",
    "cache elsewhere",
    "waiting there",
    "less reliable",
    "breaker",
    "draining",
    "region",
    "owner",
    "tier",
    "price cap",
    "tried before",
    "turn of another",
]


class Allowed(msgspec.Struct, frozen=True):
    """Which nodes a caller wants at all. None means any; `tier` is the least (`registry.TIER_…`)."""

    owners: frozenset[str] | None = None
    regions: frozenset[str] | None = None
    tier: int = 0


ANYWHERE = Allowed()


class Request(msgspec.Struct, frozen=True):
    """What has to be placed. Prices are per token; `prompt` is packed uint32, what was delivered included.

    `read_tokens` have to be prefilled where nothing is cached; `output_tokens` is the most that may still be made;
    `input_tokens` is what of the prompt still has to be paid. A node that could cost more than `affordable_nanocredits`
    is no candidate, nor one above the caller's `max_price` (fee included), nor one that asks more than `not_above` in
    any part. Owners in `avoid_owners` get it only if nobody else has room.
    """

    class_id: str
    read_tokens: int
    output_tokens: int
    input_tokens: int = 0
    prompt: bytes = b""
    cache_salt: bytes = b""
    affordable_nanocredits: int | None = None
    max_price: Price | None = None
    not_above: Price | None = None
    excluded: frozenset[NodeId] = frozenset()
    avoid_owners: frozenset[OwnerId] = frozenset()
    sticky: str = ""
    allowed: Allowed = ANYWHERE
    explain: bool = False


class Why(msgspec.Struct, frozen=True, omit_defaults=True):
    """One candidate's account of itself, in seconds; `outcome` is "chosen" or the reason why not."""

    node_id: NodeId
    owner_id: OwnerId
    drawn_as: str
    outcome: str
    cost_seconds: float | None = None
    wait_seconds: float = 0.0
    prefill_seconds: float = 0.0
    round_trip_seconds: float = 0.0
    decode_seconds: float = 0.0
    price_seconds: float = 0.0
    redo_seconds: float = 0.0
    cached_tokens: int = 0
    in_flight: int = 0
    limit: int = 0
    availability: float = 0.0


class Placement(msgspec.Struct, frozen=True):
    """One node serves the whole work. `considered` are the others that were looked at, with the reason they lost."""

    node_id: NodeId
    expected_first_token_seconds: float = 0.0
    cached_tokens: int = 0
    why: tuple[Why, ...] | None = None
    considered: tuple[tuple[NodeId, Reason], ...] = ()


class Full(msgspec.Struct, frozen=True):
    """No node can take it now. `no_node`: nobody who may serve it is here; `busy`: all who may are full."""

    reason: Literal["no_node", "busy"]
    why: tuple[Why, ...] | None = None
    considered: tuple[tuple[NodeId, Reason], ...] = ()


class _Cost:
    """J of one candidate, in its parts."""

    __slots__ = ("cached", "decode", "first", "member", "price", "read", "redo", "round_trip", "total", "wait")

    def __init__(self, member: Member, request: Request, roster: Roster, text: Text, now: float) -> None:
        self.member = member
        pace = member.pace
        self.cached = cached = min(member.sent.cached(text, now), max(0, request.read_tokens - 1))
        output_tokens = min(request.output_tokens, roster.output_tokens)
        gap = pace.token_seconds(min(member.in_flight + member.others, member.slots))
        # The node says that others fill it: then a place is free when the next of all those works ends.
        ahead = member.in_flight + member.others - member.slots + 1
        queued = ahead * roster.output_tokens * gap / member.slots if member.others and ahead > 0 else 0.0
        self.wait = max(pace.wait_seconds(now), queued)
        self.read = pace.read_seconds(request.read_tokens - cached)
        # What was measured was measured from here: the way is in it already.
        self.round_trip = 0.0 if pace.measured else member.round_trip_seconds
        self.decode = DECODE_WEIGHT * output_tokens * gap
        self.price = 0.0
        if not member.price.free:
            spent = most(member.price, request.read_tokens - cached, int(output_tokens))
            self.price = SECONDS_PER_NANOCREDIT * spent
        again = DETECTION_SECONDS + pace.read_seconds(request.read_tokens)
        self.redo = (1.0 - member.health.availability) * again
        self.first = self.wait + self.read + self.round_trip
        self.total = self.first + self.decode + self.price + self.redo


def place(request: Request, snapshot: Snapshot, *, now: float, random: Random) -> Placement | Full:
    """The candidate of least cost, or why there is none. Changes nothing."""
    roster = snapshot.roster(request.class_id)
    if roster is None or not roster.here:
        return Full("no_node")
    refused: dict[Member, tuple[str, Reason]] = {}
    fit: dict[Member, str] = {}
    text = Text(request.class_id, request.cache_salt, request.prompt)
    for member, drawn_as in _candidates(request, snapshot, roster, text, now, random):
        if member not in fit and member not in refused:
            reason = refusal(member, request)
            if reason is None:
                fit[member] = drawn_as
            else:
                refused[member] = drawn_as, reason
    if not fit or (request.avoid_owners and all(member.owner_id in request.avoid_owners for member in fit)):
        _search(request, roster, fit, refused, random)
    if not fit:
        return _full(request, roster, refused, random)
    if any(member.owner_id not in request.avoid_owners for member in fit):
        for member in [member for member in fit if member.owner_id in request.avoid_owners]:
            refused[member] = fit.pop(member), "owner"
    costs = [_Cost(member, request, roster, text, now) for member in fit]
    best = min(costs, key=lambda cost: cost.total)
    explored = next((cost for cost in costs if fit[cost.member] == "explored"), None)
    if explored is not None:
        best = explored
    considered = [(cost.member.node_id, _lost(cost, best)) for cost in costs if cost is not best]
    considered += [(member.node_id, reason) for member, (_, reason) in refused.items()]
    why = None
    if request.explain:
        why = (
            _account(best, fit[best.member], "chosen"),
            *(
                _account(cost, fit[cost.member], _lost(cost, best))
                for cost in sorted(costs, key=lambda cost: cost.total)
                if cost is not best
            ),
            *_accounts(refused),
        )
    return Placement(best.member.node_id, best.first, best.cached, why, tuple(considered))


def _candidates(
    request: Request, snapshot: Snapshot, roster: Roster, text: Text, now: float, random: Random
) -> Iterator[tuple[Member, str]]:
    """Who is looked at, each with the reason. One may come twice: then the first reason counts."""
    if random.random() < EXPLORED_SHARE and (unsure := roster.unsure(random)) is not None:
        yield unsure, "explored"
    if len(roster) <= SAMPLED + 1:
        for member in roster:
            yield member, "all"
        return
    if request.sticky:
        last = roster.get(snapshot.sticky_node(request.class_id, request.sticky, now))
        if last is not None:
            yield last, "sticky"
    for node_id in snapshot.holders(text):
        holder = roster.get(node_id)
        if holder is not None:
            yield holder, "cached"
    for strides in RING_STRIDES:
        key = text.head(strides)
        if key is not None and (owner := roster.owner_of(key)) is not None:
            yield owner, "ring"
    for _ in range(SAMPLED):
        drawn = roster.sample(random)
        if drawn is not None:
            yield drawn, "drawn"


def refusal(member: Member, request: Request) -> Reason | None:
    """Why this node cannot have it, whatever it would cost; None when it can."""
    if member.node_id in request.excluded:
        return "tried before"
    if member.draining:
        return "draining"
    allowed = request.allowed
    if allowed.regions is not None and member.region not in allowed.regions:
        return "region"
    if allowed.owners is not None and member.owner_id not in allowed.owners:
        return "owner"
    if member.tier < allowed.tier:
        return "tier"
    if not _within_prices(member, request):
        return "price cap"
    if member.limit <= 0:
        return "breaker"
    if member.in_flight >= member.limit:
        return "busy"
    return None


def _within_prices(member: Member, request: Request) -> bool:
    if member.price.free:
        return True
    cap, above = request.max_price, request.not_above
    if cap is not None and (member.input_price > cap.input_nanocredits or member.output_price > cap.output_nanocredits):
        return False
    if above is not None:
        price = member.price.price
        if (
            price.input_nanocredits > above.input_nanocredits
            or price.cached_input_nanocredits > above.cached_input_nanocredits
            or price.output_nanocredits > above.output_nanocredits
        ):
            return False
    affordable = request.affordable_nanocredits
    return affordable is None or most(member.price, request.input_tokens, request.output_tokens) <= affordable


def _search(
    request: Request,
    roster: Roster,
    fit: dict[Member, str],
    refused: dict[Member, tuple[str, Reason]],
    random: Random,
) -> None:
    """Nobody who was drawn fits: looks at all, from anywhere, until there are some to choose from."""
    if not roster.room:
        return
    found = 0
    for member in _might(request, roster, random):
        if member.in_flight >= member.limit or member.owner_id in request.avoid_owners or member in fit:
            continue
        if refusal(member, request) is None:
            fit[member] = "searched"
            found += 1
            if found == SAMPLED:
                return
    if not fit and request.avoid_owners:
        fit.update((member, "searched") for member in _might(request, roster, random) if not refusal(member, request))


def _might(request: Request, roster: Roster, random: Random) -> Iterator[Member]:
    """Whom its filters may leave."""
    most_for_output = []
    if request.max_price is not None:
        most_for_output.append(request.max_price.output_nanocredits)
    if request.not_above is not None:
        most_for_output.append(request.not_above.output_nanocredits)
    if request.affordable_nanocredits is not None and request.output_tokens > 0:
        most_for_output.append(request.affordable_nanocredits // request.output_tokens)
    return roster.among(
        random,
        owners=request.allowed.owners,
        regions=request.allowed.regions,
        tier=request.allowed.tier,
        output_nanocredits_max=min(most_for_output, default=None),
    )


def _full(request: Request, roster: Roster, refused: dict[Member, tuple[str, Reason]], random: Random) -> Full:
    """Busy, if anybody could take it once there is room."""
    waits: tuple[Reason, ...] = ("busy", "breaker")
    busy = any(reason in waits for _, reason in refused.values()) or any(
        refusal(member, request) in waits for member in _might(request, roster, random)
    )
    why = tuple(_accounts(refused)) if request.explain else None
    considered = tuple((member.node_id, reason) for member, (_, reason) in refused.items())
    return Full("busy" if busy else "no_node", why, considered)


def _lost(cost: _Cost, best: _Cost) -> Reason:
    """What weighed most against this one."""
    more: dict[Reason, float] = {
        "waiting there": cost.wait - best.wait,
        "cache elsewhere" if cost.cached < best.cached else "slower": cost.read - best.read,
        "farther": cost.round_trip - best.round_trip,
        "dearer": cost.price - best.price,
        "less reliable": cost.redo - best.redo,
    }
    slower = cost.decode - best.decode + max(0.0, more.get("slower", 0.0))
    more["slower"] = slower
    heaviest = max(more, key=lambda reason: more[reason])
    return heaviest if more[heaviest] > 0 else "turn of another"


def _account(cost: _Cost, drawn_as: str, outcome: str) -> Why:
    member = cost.member
    return Why(
        node_id=member.node_id,
        owner_id=member.owner_id,
        drawn_as=drawn_as,
        outcome=outcome,
        cost_seconds=round(cost.total, 4),
        wait_seconds=round(cost.wait, 4),
        prefill_seconds=round(cost.read, 4),
        round_trip_seconds=round(cost.round_trip, 4),
        decode_seconds=round(cost.decode, 4),
        price_seconds=round(cost.price, 4),
        redo_seconds=round(cost.redo, 4),
        cached_tokens=cost.cached,
        in_flight=member.in_flight,
        limit=member.limit,
        availability=round(member.health.availability, 4),
    )


def _accounts(refused: dict[Member, tuple[str, Reason]]) -> Iterator[Why]:
    for member, (drawn_as, reason) in refused.items():
        yield Why(
            member.node_id,
            member.owner_id,
            drawn_as,
            reason,
            in_flight=member.in_flight,
            limit=member.limit,
            availability=round(member.health.availability, 4),
        )


def as_json(why: tuple[Why, ...] | None) -> list[dict[str, Any]]:
    """For the caller who asked, in words and numbers."""
    found: list[dict[str, Any]] = msgspec.to_builtins(why or ())
    return found


def explained(why: tuple[Why, ...]) -> dict[str, Any]:
    """One decision for the caller who asked: a sentence, and each candidate's numbers."""
    chosen = next((one for one in why if one.outcome == "chosen"), None)
    if chosen is None:
        sentence = f"none of {len(why)} nodes could take it"
    else:
        first = chosen.wait_seconds + chosen.prefill_seconds + chosen.round_trip_seconds
        sentence = (
            f"{chosen.node_id} was chosen of {len(why)}: its first token is expected after {first:.3f} s, with "
            f"{chosen.cached_tokens} tokens of the prompt cached and {chosen.in_flight} of {chosen.limit} places taken"
        )
    return {"decision": sentence, "candidates": as_json(why)}
