"""Who serves a class now, in the shape in which a placement asks: by sample, by prompt, by sticky key, one by one.

A change of one node costs the logarithm of the number of nodes, never their number. Only the registry changes anything
here; `scheduler.place` reads. All times are monotonic seconds.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import TypeVar

import msgspec

from gridmill.network.health import SLOW_START_SECONDS, Health, State
from gridmill.network.metering import FREE, PriceRow, Usage, charge
from gridmill.network.pace import SILENT_SECONDS, Pace
from gridmill.network.prefixes import Holders, SentPrefixes, Text
from gridmill.wire.messages import NodeId, OwnerId

RING_POINTS = 16  # per node: evens out to about a quarter, and bounded load does the rest
RING_SHIFT = 20  # the low bits of a ring position say whose it is: a million nodes
RING_WALK_MAX = 8  # nodes that are passed over because they carry too much
RING_LOAD_FACTOR = 1.25  # times the class's mean load
RING_LOAD_MIN = 0.25  # of a node's places: so much is never too much
WEIGHT_SCALE = 16  # of sampling weights, which are whole numbers so that sums stay exact
WEIGHT_MAX = 1 << 24
EJECTED_SHARE_MAX = 0.3  # of a class: when more look ill it is probably not they
STICKY_KEYS_MAX = 1 << 16
STICKY_SECONDS = 1800.0
STICKY_WORKS_MAX = 200  # then the key looks around once, so that nothing is tied for ever
TTFT_QUANTILE = 0.25
TTFT_STEP = 0.1  # in the logarithm, per work
TTFT_STEP_LOADED = 0.01  # upwards, from works on a node that was more than half full
LOADED_SHARE = 0.25  # of its limit: with more the time to a first token says less about the node than about its load
OUTPUT_TOKENS_UNKNOWN = 256.0
OUTPUT_MEMORY = 0.05

K = TypeVar("K", str, int)


class NodeView(msgspec.Struct, frozen=True):
    """One node's offer of one class, as it was when somebody looked. Speeds are the network's own, or hints."""

    node_id: NodeId
    owner_id: OwnerId
    slots: int
    in_flight: int
    draining: bool
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    price: PriceRow = FREE
    limit: int = -1
    state: State = "closed"
    availability: float = 1.0
    region: str = ""

    @property
    def free_slots(self) -> int:
        limit = self.slots if self.limit < 0 else self.limit
        return 0 if self.draining else max(0, limit - self.in_flight)


class Standing:
    """What is remembered of one node and class beyond its conversation."""

    __slots__ = ("decisions", "health", "lost", "pace", "won")

    def __init__(self, health: Health, pace: Pace) -> None:
        self.health = health
        self.pace = pace
        self.decisions = 0  # placements in its class during its earlier conversations
        self.won = 0  # of all that fell while it was here
        self.lost: Counter[str] = Counter()  # decisions in which it was looked at, by the reason it lost


class Member:
    """One live node in one class. Changed through `Roster` only."""

    __slots__ = (
        "counted",
        "decided_before",
        "draining",
        "health",
        "in_flight",
        "input_price",
        "joined",
        "limit",
        "node_id",
        "others",
        "output_price",
        "owner_id",
        "pace",
        "place",
        "price",
        "proven",
        "region",
        "round_trip_seconds",
        "sent",
        "slots",
        "standing",
        "tier",
        "unsure_at",
        "weight",
    )

    def __init__(
        self,
        node_id: NodeId,
        owner_id: OwnerId,
        slots: int,
        standing: Standing,
        *,
        price: PriceRow = FREE,
        sent: SentPrefixes | None = None,
        region: str = "",
        tier: int = 0,
        in_flight: int = 0,
        draining: bool = False,
        round_trip_seconds: float = 0.0,
    ) -> None:
        self.node_id = node_id
        self.owner_id = owner_id
        self.slots = slots
        self.standing = standing
        self.health = standing.health
        self.pace = standing.pace
        self.price = price
        # What a user pays per token, the fee included: what a price cap is compared with.
        self.input_price = charge(price, Usage(1, 0, 0)).total
        self.output_price = charge(price, Usage(0, 0, 1)).total
        self.sent = sent if sent is not None else SentPrefixes()
        self.region = region
        self.tier = tier
        self.in_flight = in_flight
        self.others = 0  # works that other gateways gave it, by the node's own word
        self.draining = draining
        self.round_trip_seconds = round_trip_seconds
        self.limit = slots
        self.proven = False  # as the roster has counted it
        self.place = -1  # where in the roster
        self.counted = 0  # its part of the roster's room
        self.weight = 0  # its part of the roster's sampling weights
        self.unsure_at = -1  # where among the unsure
        self.decided_before = 0  # the roster's decisions when it came

    @property
    def room(self) -> int:
        return 0 if self.draining else max(0, self.limit - self.in_flight)

    def view(self) -> NodeView:
        token_seconds = self.pace.token_seconds(0)
        read = self.pace.read_seconds(1000) - self.pace.read_seconds(0)
        return NodeView(
            self.node_id,
            self.owner_id,
            self.slots,
            self.in_flight,
            self.draining,
            1.0 / token_seconds if token_seconds > 0 else 0.0,
            1000.0 / read if read > 0 else 0.0,
            self.price,
            self.limit,
            self.health.state,
            self.health.availability,
            self.region,
        )


class Roster:
    """All live nodes of one class."""

    def __init__(self) -> None:
        self._members: list[Member | None] = []
        self._free_places: list[int] = []
        self._by_id: dict[NodeId, Member] = {}
        self._owners: dict[str, dict[NodeId, Member]] = {}
        self._regions: dict[str, dict[NodeId, Member]] = {}
        self._tiers: dict[int, dict[NodeId, Member]] = {}
        self._by_price: list[tuple[int, NodeId]] = []  # by what an output token costs
        self._tree: list[int] = [0]  # Fenwick sums of the sampling weights
        self._ring: array[int] = array("Q")
        self._unsure: list[Member] = []  # new, half-open, or silent for long: some chance comes their way
        self._due: list[tuple[float, int, NodeId]] = []
        self._due_count = 0
        self._views: tuple[NodeView, ...] | None = None
        self._rows: list[PriceRow] | None = None
        self._prices: list[PriceRow] = []
        self.weight = 0
        self.here = 0  # members that do not drain
        self.ejected = 0
        self._proven = 0  # members that have ended something well: beside them others are given little at first
        self.in_flight = 0  # on members that do not drain
        self.places = 0  # sum of their limits
        self.room = 0
        self.decisions = 0
        self.usual_ttft_seconds = 0.0
        self.output_tokens = OUTPUT_TOKENS_UNKNOWN  # of an answer, as they are lately

    # ------------------------------------------------------------ who is here

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._by_id.values())

    def get(self, node_id: NodeId | None) -> Member | None:
        return self._by_id.get(node_id) if node_id is not None else None

    def decisions_with(self, member: Member) -> int:
        """How many placements fell while this node was here, its earlier conversations included."""
        return member.standing.decisions + self.decisions - member.decided_before

    @property
    def only_owner(self) -> OwnerId | None:
        return OwnerId(next(iter(self._owners))) if len(self._owners) == 1 else None

    def add(self, member: Member, now: float) -> None:
        assert member.place < 0 and member.node_id not in self._by_id, "a member joined twice"
        if self._free_places:
            member.place = self._free_places.pop()
            self._members[member.place] = member
        else:
            member.place = len(self._members)
            self._members.append(member)
            if len(self._tree) <= len(self._members):
                self._regrow()
        self._by_id[member.node_id] = member
        self._owners.setdefault(member.owner_id, {})[member.node_id] = member
        self._regions.setdefault(member.region, {})[member.node_id] = member
        self._tiers.setdefault(member.tier, {})[member.node_id] = member
        insort(self._by_price, (member.price.price.output_nanocredits, member.node_id))
        self._rows = None
        for position in _positions(member.node_id):
            point = position << RING_SHIFT | member.place
            self._ring.insert(bisect_left(self._ring, point), point)
        member.decided_before = self.decisions
        self._count(member, +1)
        self.touch(member, now)
        if member.health.state == "open":
            self._schedule(member.health.open_until, member)
        if member.health.warmth(now) < 1.0:
            self._schedule(now + SLOW_START_SECONDS / 2, member)
            self._schedule(now + SLOW_START_SECONDS, member)
        if member.unsure_at < 0:
            self._schedule(now + SILENT_SECONDS + 1.0, member)
        self._settle_ejections(now)

    def remove(self, member: Member, now: float) -> None:
        if self._by_id.get(member.node_id) is not member:
            return
        del self._by_id[member.node_id]
        _forget(self._owners, member.owner_id, member)
        _forget(self._regions, member.region, member)
        _forget(self._tiers, member.tier, member)
        del self._by_price[bisect_left(self._by_price, (member.price.price.output_nanocredits, member.node_id))]
        for position in _positions(member.node_id):
            self._ring.pop(bisect_left(self._ring, position << RING_SHIFT | member.place))
        member.standing.decisions = self.decisions_with(member)
        self._weigh(member, 0)
        self._certain(member)
        self._count(member, -1)
        if member.proven:
            self._prove(member, False, now)
        self._members[member.place] = None
        self._free_places.append(member.place)
        member.place = -1
        self._views = self._rows = None
        self._settle_ejections(now)

    def _count(self, member: Member, sign: int) -> None:
        """Takes a member into the sums, or out of them."""
        if sign > 0:
            member.limit = self._limit(member)
            member.counted = member.room
        if not member.draining:
            self.here += sign
            self.in_flight += sign * member.in_flight
            self.places += sign * member.limit
        self.room += sign * member.counted
        self.ejected += sign * (member.health.state == "open")

    # ------------------------------------------------------------ what happens to them

    def load(self, member: Member, in_flight: int, now: float) -> None:
        """So many works are on it now."""
        if member.place >= 0 and not member.draining:
            self.in_flight += in_flight - member.in_flight
        member.in_flight = in_flight
        if member.place >= 0:
            self.touch(member, now)

    def drain(self, member: Member, now: float) -> None:
        if member.draining or member.place < 0:
            member.draining = True
            return
        self._count(member, -1)
        member.draining = True
        self._count(member, +1)
        self._rows = None
        self.touch(member, now)
        self._settle_ejections(now)

    def ended(self, member: Member, fault: str | None, now: float) -> None:
        health = member.health
        before = health.state
        health.ended(now, fault)
        if member.place < 0:
            if health.tripped:
                health.open(now)  # it left with its fault; the cap is looked at when it comes back
            return
        self.ejected -= (before == "open") - (health.state == "open")
        if health.tripped and (before == "half_open" or self.ejected + 1 <= self._ejected_max()):
            health.open(now)
            self.ejected += 1
            self._schedule(health.open_until, member)
            self._settle_ejections(now)
        self.touch(member, now)

    def first_token(self, member: Member, now: float, read_tokens: int, ttft_seconds: float) -> None:
        unloaded = member.pace.read_seconds(read_tokens)
        if member.pace.first_works >= 3:
            member.health.first_token(now, ttft_seconds, unloaded, member.in_flight, member.slots)
        loaded = member.in_flight > max(2, LOADED_SHARE * member.limit)
        member.pace.saw_first(now, read_tokens, ttft_seconds, loaded=loaded)
        self._note_ttft(ttft_seconds, loaded=2 * member.in_flight > member.slots)
        if member.place >= 0:
            self.touch(member, now)

    def tokens(self, member: Member, now: float, tokens: int, seconds: float) -> None:
        member.pace.saw_tokens(now, tokens, seconds, max(0, member.in_flight - 1))
        self.output_tokens += OUTPUT_MEMORY * (tokens + 1 - self.output_tokens)

    def _note_ttft(self, seconds: float, *, loaded: bool) -> None:
        """A low quantile, followed by small steps: what the class takes when nobody is in the way."""
        if seconds <= 0.0:
            return
        if not self.usual_ttft_seconds:
            self.usual_ttft_seconds = seconds
        elif seconds < self.usual_ttft_seconds:
            self.usual_ttft_seconds *= math.exp(-TTFT_STEP * (1.0 - TTFT_QUANTILE))
        else:
            self.usual_ttft_seconds *= math.exp((TTFT_STEP_LOADED if loaded else TTFT_STEP) * TTFT_QUANTILE)

    def touch(self, member: Member, now: float) -> None:
        """Brings what is derived from a member up to date."""
        self._views = None
        health = member.health
        if health.proven != member.proven:
            self._prove(member, health.proven, now)
        limit = self._limit(member)
        if limit != member.limit:
            if not member.draining:
                self.places += limit - member.limit
            member.limit = limit
        room = member.room
        if room != member.counted:
            self.room += room - member.counted
            member.counted = room
        self._weigh(member, self._weight_of(member, now) if room else 0)
        if health.state == "half_open" or not member.pace.measured or member.pace.silent(now):
            if member.unsure_at < 0:
                member.unsure_at = len(self._unsure)
                self._unsure.append(member)
        elif member.unsure_at >= 0:
            self._certain(member)
            self._schedule(now + SILENT_SECONDS + 1.0, member)

    def _limit(self, member: Member) -> int:
        return member.health.limit(member.slots, starting=not member.proven and self._proven > 0)

    def _prove(self, member: Member, proven: bool, now: float) -> None:
        """The first one that has shown itself makes beginners of the others; when the last one goes, nobody is."""
        member.proven = proven
        before = self._proven > 0
        self._proven += 1 if proven else -1
        if before != (self._proven > 0):
            for other in self:
                if not other.proven and other is not member:
                    self.touch(other, now)

    def _weight_of(self, member: Member, now: float) -> int:
        health = member.health
        rate = member.limit / max(1e-4, member.pace.token_seconds(0))
        return max(1, min(WEIGHT_MAX, int(WEIGHT_SCALE * rate * health.availability * health.warmth(now))))

    def _certain(self, member: Member) -> None:
        at = member.unsure_at
        if at >= 0:
            last = self._unsure.pop()
            if last is not member:
                self._unsure[at] = last
                last.unsure_at = at
            member.unsure_at = -1

    # ------------------------------------------------------------ time

    def advance(self, now: float) -> None:
        """What time alone changes: breakers that may be tried again, nodes that nobody has heard of for a while."""
        due = self._due
        while due and due[0][0] <= now:
            _, _, node_id = heapq.heappop(due)
            member = self._by_id.get(node_id)
            if member is None:
                continue
            health = member.health
            if health.state == "open":
                if now < health.open_until:
                    self._schedule(health.open_until, member)
                    continue
                self._try_again(member)
            elif member.pace.silent(now):
                health.rested()
            elif member.unsure_at < 0:
                self._schedule(member.pace.seen + SILENT_SECONDS + 1.0, member)
            self.touch(member, now)

    def _schedule(self, when: float, member: Member) -> None:
        self._due_count += 1
        heapq.heappush(self._due, (when, self._due_count, member.node_id))

    def _try_again(self, member: Member) -> None:
        member.health.half_open()
        self.ejected -= 1

    def _ejected_max(self) -> int:
        """The only node of a class is never taken out; of two or three, one."""
        return max(1, int(EJECTED_SHARE_MAX * self.here)) if self.here > 1 else 0

    def _settle_ejections(self, now: float) -> None:
        """When others leave, those that were taken out are tried sooner."""
        while self.ejected > self._ejected_max():
            member = min((m for m in self if m.health.state == "open"), key=lambda m: m.health.open_until)
            self._try_again(member)
            self.touch(member, now)

    # ------------------------------------------------------------ asking

    def sample(self, random: Random) -> Member | None:
        """One with room, in proportion to capacity and availability."""
        if self.weight <= 0:
            return None
        left = random.randrange(self.weight)
        tree, place, size = self._tree, 0, len(self._tree) - 1
        step = 1 << (size.bit_length() - 1) if size else 0
        while step:
            following = place + step
            if following <= size and tree[following] <= left:
                place = following
                left -= tree[following]
            step >>= 1
        return self._members[place]

    def unsure(self, random: Random) -> Member | None:
        """One of which little is known."""
        return self._unsure[random.randrange(len(self._unsure))] if self._unsure else None

    def owner_of(self, key: bytes) -> Member | None:
        """The node that this key belongs to on the ring, or the next that does not carry more than its share."""
        ring = self._ring
        if not ring:
            return None
        bound = max(RING_LOAD_MIN, RING_LOAD_FACTOR * (self.in_flight + 1) / max(1, self.places))
        at = bisect_left(ring, int.from_bytes(key[:4], "big") << RING_SHIFT)
        passed: set[int] = set()
        mask = (1 << RING_SHIFT) - 1
        while len(passed) < RING_WALK_MAX and len(passed) < len(self._by_id):
            place = ring[at % len(ring)] & mask
            at += 1
            if place in passed:
                continue
            member = self._members[place]
            assert member is not None
            if member.room and (member.in_flight + 1 <= max(1.0, bound * member.limit)):
                return member
            passed.add(place)
        return None

    def among(
        self,
        random: Random,
        *,
        owners: frozenset[str] | None = None,
        regions: frozenset[str] | None = None,
        tier: int = 0,
        output_nanocredits_max: int | None = None,
    ) -> Iterator[Member]:
        """All of which these may be true, beginning anywhere: by the index that leaves the fewest to look at."""
        fewest = len(self._members)
        chosen: list[dict[NodeId, Member]] | None = None
        indexed = []
        if owners is not None:
            indexed.append(_parts(self._owners, owners))
        if regions is not None:
            indexed.append(_parts(self._regions, regions))
        if tier:
            indexed.append(_parts(self._tiers, [each for each in self._tiers if each >= tier]))
        for parts in indexed:
            if (count := sum(map(len, parts))) < fewest:
                fewest, chosen = count, parts
        cheap = None
        if output_nanocredits_max is not None:
            cheap = bisect_left(self._by_price, (output_nanocredits_max + 1, NodeId("")))
            if cheap < fewest:
                fewest, chosen = cheap, None
            else:
                cheap = None
        if not fewest:
            return
        start = random.randrange(fewest)
        some = [member for part in chosen for member in part.values()] if chosen is not None else None
        for position in range(start - fewest, start):
            if some is not None:
                yield some[position]
            elif cheap is not None:
                yield self._by_id[self._by_price[position % fewest][1]]
            elif (member := self._members[position]) is not None:
                yield member

    def views(self) -> tuple[NodeView, ...]:
        if self._views is None:
            self._views = tuple(member.view() for member in self)
        return self._views

    def price_rows(self) -> list[PriceRow]:
        """What those that take work ask, one for each of them."""
        if self._rows is None:
            self._rows = [member.price for member in self if not member.draining]
            self._prices = list({(row.price, row.fees): row for row in self._rows}.values())
        return self._rows

    def prices(self) -> list[PriceRow]:
        """A row for each price that is asked at all."""
        self.price_rows()
        return self._prices

    # ------------------------------------------------------------ inside

    def _weigh(self, member: Member, weight: int) -> None:
        change = weight - member.weight
        if change:
            member.weight = weight
            self.weight += change
            tree, at = self._tree, member.place + 1
            while at < len(tree):
                tree[at] += change
                at += at & -at

    def _regrow(self) -> None:
        size = 16
        while size < len(self._members):
            size *= 2
        tree = [0] * (size + 1)
        for place, member in enumerate(self._members):
            if member is not None:
                tree[place + 1] += member.weight
        for at in range(1, size + 1):
            above = at + (at & -at)
            if above <= size:
                tree[above] += tree[at]
        self._tree = tree


class Sticky:
    """Which node served a key last. Bounded in keys, time and works, so that nothing is tied for ever."""

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, tuple[NodeId, float, int]] = OrderedDict()

    def node_of(self, class_id: str, key: str, now: float) -> NodeId | None:
        found = self._last.get(_sticky_key(class_id, key))
        if found is None or now - found[1] > STICKY_SECONDS or found[2] >= STICKY_WORKS_MAX:
            return None
        return found[0]

    def remember(self, class_id: str, key: str, node_id: NodeId, now: float) -> None:
        hashed = _sticky_key(class_id, key)
        before = self._last.pop(hashed, None)
        works = before[2] + 1 if before is not None and before[0] == node_id and before[2] < STICKY_WORKS_MAX else 1
        self._last[hashed] = (node_id, now, works)
        if len(self._last) > STICKY_KEYS_MAX:
            self._last.popitem(last=False)


class Snapshot:
    """The picture on which a placement is decided: a window onto the fleet, good until the event loop turns.

    `by_class` copies a class's nodes out of it, for those who look at all of them; `scheduler.place` never does.
    """

    def __init__(
        self, rosters: Mapping[str, Roster], sticky: Sticky | None = None, holders: Holders | None = None
    ) -> None:
        self._rosters = rosters
        self._sticky = sticky
        self._holders = holders
        self.by_class: Mapping[str, tuple[NodeView, ...]] = _Views(rosters)

    def roster(self, class_id: str) -> Roster | None:
        return self._rosters.get(class_id)

    def sticky_node(self, class_id: str, key: str, now: float) -> NodeId | None:
        return self._sticky.node_of(class_id, key, now) if self._sticky is not None else None

    def holders(self, text: Text) -> tuple[NodeId, ...]:
        """Who was sent this text, as far as it is known."""
        return self._holders.of(text) if self._holders is not None else ()


class _Views(Mapping[str, tuple[NodeView, ...]]):
    """Copies a class's nodes when somebody looks at them; a class without a node is absent."""

    def __init__(self, rosters: Mapping[str, Roster]) -> None:
        self._rosters = rosters

    def __getitem__(self, class_id: str) -> tuple[NodeView, ...]:
        roster = self._rosters[class_id]
        if not len(roster):
            raise KeyError(class_id)
        return roster.views()

    def __iter__(self) -> Iterator[str]:
        return (class_id for class_id, roster in self._rosters.items() if len(roster))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _parts(index: dict[K, dict[NodeId, Member]], wanted: Iterable[K]) -> list[dict[NodeId, Member]]:
    return [index[key] for key in sorted(wanted) if key in index]


def _forget(index: dict[K, dict[NodeId, Member]], key: K, member: Member) -> None:
    del index[key][member.node_id]
    if not index[key]:
        del index[key]


def _positions(node_id: NodeId) -> list[int]:
    """Where a node stands on the ring of its class: the same for every gateway."""
    words = hashlib.blake2b(node_id.encode(), digest_size=4 * RING_POINTS, person=b"gridmill-ring").digest()
    return [int.from_bytes(words[at : at + 4], "big") for at in range(0, len(words), 4)]


def _sticky_key(class_id: str, key: str) -> bytes:
    return hashlib.blake2b(f"{class_id}\0{key}".encode(), digest_size=16).digest()
