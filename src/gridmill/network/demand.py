"""What a node's owner may see of it: how it stands, what was measured, and why work went elsewhere.

Only the owner's own nodes are told of: of whoever won instead it says neither name nor price. Counts are this
gateway's own since it started; a node that joins again goes on counting where it was.
"""

from __future__ import annotations

from typing import Any

from gridmill.network.fleet import Member, Roster
from gridmill.network.registry import NodeRecord, Registry
from gridmill.wire.classes import ClassId

NOT_DRAWN = "not drawn"

# What each reason means to the owner, and what would change it.
REMEDIES = {
    "not drawn": "other nodes were looked at: a decision compares a few, drawn by capacity and by what is cached",
    "busy": "all places were taken: more slots, if first tokens stay quick, bring more work",
    "waiting there": "works waited on the node before their first token lately: fewer slots may bring more work",
    "cache elsewhere": "another node had computed the beginning of the prompt already",
    "slower": "another node was expected to answer sooner",
    "farther": "the way to another node was shorter",
    "dearer": "another node asked less, by more than this one is quicker",
    "less reliable": "works failed here, or too few have ended well yet",
    "breaker": "it failed several works in a row or a fifth of them, and is tried with one at a time",
    "draining": "the node said that it leaves",
    "region": "the caller asked for another region (--region says where a node stands)",
    "owner": "the caller asked for other owners, or the work had left another node of the same owner",
    "tier": "the caller asked for nodes that are trusted more",
    "price cap": "the price was above what the caller allows or has set aside, or above that of the node it left",
    "tried before": "this very work had already failed here",
    "turn of another": "another was as good, or a node of which little is known had its turn",
}


def report(registry: Registry, record: NodeRecord, now: float) -> dict[str, Any]:
    """One live node. Seconds are measured by the network's clock; null where nothing was."""
    names: dict[str, list[str]] = {}
    for name, class_ids in registry.names().items():
        for class_id in class_ids:
            names.setdefault(class_id, []).append(name)
    return {
        "node_id": record.node_id,
        "owner_id": record.owner_id,
        "connected": True,
        "software": record.software,
        "draining": record.draining,
        "round_trip_seconds": round(record.round_trip_seconds, 4),
        "classes": [
            _of_class(member, roster, class_id, names.get(class_id, []), now)
            for class_id, member in record.members.items()
            if (roster := registry.roster(class_id)) is not None
        ],
    }


def _of_class(member: Member, roster: Roster, class_id: ClassId, names: list[str], now: float) -> dict[str, Any]:
    pace, health, standing = member.pace, member.health, member.standing
    decisions = roster.decisions_with(member)
    lost = standing.lost.copy()
    lost[NOT_DRAWN] += max(0, decisions - standing.won - sum(lost.values()))
    price = member.price.price
    return {
        "class_id": class_id,
        "names": names,
        "state": state_of(member),
        "region": member.region,
        "price_nanocredits": [price.input_nanocredits, price.cached_input_nanocredits, price.output_nanocredits],
        "slots": member.slots,
        "limit": member.limit,
        "in_flight": member.in_flight,
        "availability": round(health.availability, 4),
        "faults_in_a_row": health.faults_in_a_row,
        "fault_share": round(health.fault_share, 4),
        "breaker_open_seconds": round(max(0.0, health.open_until - now), 1) if health.state == "open" else 0.0,
        "measured": {
            "works": pace.first_works,
            "first_token_seconds": round(pace.read_seconds(0), 4) if pace.measured else None,
            "prefill_tokens_per_second": _rounded(pace.prefill_tokens_per_second),
            "decode_tokens_per_second": _rounded(1.0 / max(1e-6, pace.token_seconds(0))) if pace.gap_works else None,
            "wait_seconds": round(pace.wait_seconds(now), 4),
        },
        "demand": {
            "decisions": decisions,
            "won": standing.won,
            "won_share": round(standing.won / decisions, 4) if decisions else None,
            "lost": [
                {"reason": reason, "count": count, "meaning": REMEDIES[reason]}
                for reason, count in lost.most_common()
                if count
            ],
        },
    }


def gone(node_id: str) -> dict[str, Any]:
    """A node of the owner's that is not here now, as far as this gateway sees."""
    return {"node_id": node_id, "connected": False, "classes": []}


def state_of(member: Member) -> str:
    if member.draining:
        return "draining"
    if member.health.state == "open":
        return "breaker open"
    if member.health.state == "half_open":
        return "on probation"
    if member.limit < member.slots:
        return "limited" if member.proven else "starting"
    return "serving"


def _rounded(speed: float | None) -> float | None:
    return round(speed, 1) if speed is not None else None
