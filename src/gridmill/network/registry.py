"""Who is here and what each can serve, and which class a model name means.

Names belong to the operator: a table name → ordered class ids. What a node calls its model is only a proposal. Readers
get immutable views (`snapshot`), so that a placement is decided on one consistent picture; only the methods here change
anything.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from random import Random
from typing import Literal

import msgspec

from gridmill.network import scheduler
from gridmill.network.detokenise import ClassText
from gridmill.network.fleet import Member, Roster, Snapshot, Standing, Sticky
from gridmill.network.health import Health
from gridmill.network.metering import FREE, FeePolicy, PriceRow
from gridmill.network.pace import TOKENS_FOR_A_SPEED, UNMEASURED_FIRST_TOKEN_SECONDS, Pace
from gridmill.network.prefixes import Holders, SentPrefixes
from gridmill.network.scheduler import Full, Placement, Request
from gridmill.network.store import Row, Store, StoreUnusable, Transaction
from gridmill.wire.classes import CLASS_ID_SHORT, ClassId, ModelClass, TextFacts, facts_bytes, parse_facts
from gridmill.wire.messages import ClassOffer, NodeId, OwnerId, Price, Telemetry

log = logging.getLogger("gridmill.network.registry")

MIGRATION = """
CREATE TABLE classes (
    class_id TEXT PRIMARY KEY,
    model_class TEXT NOT NULL,
    facts TEXT NOT NULL,
    first_seen_seconds BIGINT NOT NULL
);
CREATE TABLE class_names (
    name TEXT NOT NULL,
    class_id TEXT NOT NULL,
    place BIGINT NOT NULL,
    approved_by TEXT NOT NULL,
    approved_seconds BIGINT NOT NULL,
    PRIMARY KEY (name, class_id)
);
"""

PRICES_MIGRATION = """
CREATE TABLE prices (
    price_id TEXT PRIMARY KEY,
    node_id TEXT NOT NULL,
    class_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    input_nanocredits BIGINT NOT NULL,
    cached_input_nanocredits BIGINT NOT NULL,
    output_nanocredits BIGINT NOT NULL,
    fee_basis_points BIGINT NOT NULL,
    audit_share_basis_points BIGINT NOT NULL,
    reserve_share_basis_points BIGINT NOT NULL,
    since_seconds BIGINT NOT NULL,
    UNIQUE (node_id, class_id, version)
);
"""

SPEED_MEMORY = 0.2  # weight of the newest observation in the averages that money is worked out by
STANDINGS_MAX = 1 << 15  # nodes and classes that are remembered, those that left included, about 2 KiB each
ROSTERS_MAX = 1024  # classes that nobody serves now are remembered up to so many
OTHERS_BELIEVED_MAX = 4  # times its slots: what a node says of its load only costs it work, but not without end
TIER_OWN = 2  # trust tiers: the operator's own nodes, those that came with an invitation, all others
TIER_INVITED = 1
NAME_CHARACTERS_MAX = 200
NEAREST_NAMES = 3

ApproveMode = Literal["open", "operator"]


class ModelCard(msgspec.Struct, frozen=True):
    """One name as the API shows it, with the class that a request for it gets now."""

    name: str
    class_id: ClassId
    facts: TextFacts
    owner: str
    created: int
    toy: bool


class UnknownModel(Exception):
    """No such name. `nearest` are names that look alike; `reason` is one sentence for the caller."""

    def __init__(self, name: str, nearest: list[str], reason: str) -> None:
        super().__init__(reason)
        self.name = name
        self.nearest = nearest
        self.reason = reason


class PendingOffer(msgspec.Struct, frozen=True):
    """An offer whose class the operator has not approved under that name: listed as `owner/name`, never served."""

    name: str
    class_id: ClassId
    node_id: NodeId
    owner_id: OwnerId


class NodeRecord:
    """What is known of one connected node. Only the Registry changes it."""

    def __init__(
        self, node_id: NodeId, owner_id: OwnerId, software: str, joined_seconds: float, node_key: bytes = b""
    ) -> None:
        self.node_id = node_id
        self.node_key = node_key
        self.owner_id = owner_id
        self.software = software
        self.joined_seconds = joined_seconds
        self.draining = False
        self._telemetry = Telemetry()
        self._round_trip_seconds = 0.0
        self.offers: dict[ClassId, ClassOffer] = {}
        self.prices: dict[ClassId, PriceRow] = {}
        self.tier = 0
        self.sent = SentPrefixes()
        self.members: dict[ClassId, Member] = {}
        self.in_flight: dict[ClassId, int] = {}
        self.decode_speed: dict[ClassId, float] = {}
        self.prefill_speed: dict[ClassId, float] = {}

    @property
    def telemetry(self) -> Telemetry:
        return self._telemetry

    @telemetry.setter
    def telemetry(self, telemetry: Telemetry) -> None:
        """What the node says of its load, less what this gateway knows of, others must have given it: a hint."""
        self._telemetry = telemetry
        others = max(0, telemetry.running + telemetry.waiting - sum(self.in_flight.values()))
        for member in self.members.values():
            member.others = min(others, OTHERS_BELIEVED_MAX * member.slots)

    @property
    def round_trip_seconds(self) -> float:
        return self._round_trip_seconds

    @round_trip_seconds.setter
    def round_trip_seconds(self, seconds: float) -> None:
        self._round_trip_seconds = seconds
        for member in self.members.values():
            member.round_trip_seconds = seconds


class Registry:
    """`changed` is called after every change that can make room for somebody who waits.

    `now` is Unix time, `clock` monotonic seconds (`now` when none is given), `random` what placements are drawn with.
    """

    def __init__(
        self,
        store: Store,
        *,
        approve: ApproveMode,
        own_nodes: Collection[NodeId] = (),
        fees: FeePolicy | None = None,
        now: Callable[[], float],
        clock: Callable[[], float] | None = None,
        random: Random | None = None,
        changed: Callable[[ClassId], None] = lambda class_id: None,
    ) -> None:
        self._store = store
        self._approve = approve
        self._own_nodes = frozenset(own_nodes)
        self._fees = fees or FeePolicy()
        self._now = now
        self._clock = self.clock = clock or now
        self._random = random or Random()
        self.changed = changed
        self._nodes: dict[NodeId, NodeRecord] = {}
        self._classes: dict[ClassId, tuple[ModelClass, TextFacts, int]] = {}
        self._names: dict[str, list[ClassId]] = {}
        self._texts: dict[ClassId, ClassText] = {}
        self._pending: dict[tuple[NodeId, str], PendingOffer] = {}
        self._rosters: dict[str, Roster] = {}
        self._standings: OrderedDict[tuple[NodeId, ClassId], Standing] = OrderedDict()
        self._sticky = Sticky()
        self._holders = Holders()
        self._snapshot = Snapshot(self._rosters, self._sticky, self._holders)
        self._outdated = asyncio.Event()

    # ------------------------------------------------------------ names and classes

    async def load(self) -> None:
        """Names and classes survive a restart; nodes and texts come back by themselves."""

        async def read(transaction: Transaction) -> tuple[list[Row], list[Row]]:
            classes = await transaction.all("SELECT class_id, model_class, facts, first_seen_seconds FROM classes")
            names = await transaction.all("SELECT name, class_id FROM class_names ORDER BY name, place")
            return classes, names

        classes, names = await self._store.run(read)
        self._names = {}
        for class_id, model_class, facts, first_seen in classes:
            self._classes[ClassId(class_id)] = (
                msgspec.json.decode(model_class, type=ModelClass),
                parse_facts(facts.encode()),
                first_seen,
            )
        for name, class_id in names:
            self._names.setdefault(name, []).append(ClassId(class_id))

    def heard(self, topic: str, subject: str) -> None:
        """What the store announces: another gateway may have approved a name or withdrawn one."""
        if topic in ("names", "*"):
            self._outdated.set()

    async def watch(self) -> None:
        """Reloads names after announcements, for as long as the program runs."""
        while True:
            await self._outdated.wait()
            self._outdated.clear()
            try:
                await self.load()
            except StoreUnusable as problem:
                log.warning("names could not be read again", extra={"reason": str(problem)})

    def resolve(self, name: str) -> ModelCard:
        """The card of NAME or NAME@CLASS8. A known name without a live node resolves too: dispatch says that.

        Raises UnknownModel.
        """
        plain, _, wanted = name.rpartition("@") if "@" in name else (name, "", "")
        class_ids = self._names.get(plain)
        if class_ids is None:
            raise self._unknown(plain)
        if wanted:
            matching = [c for c in class_ids if len(wanted) >= CLASS_ID_SHORT and c.startswith(wanted.lower())]
            if not matching:
                known = ", ".join(f"{plain}@{c[:CLASS_ID_SHORT]}" for c in class_ids)
                raise UnknownModel(name, [known], f"{plain} has no class {wanted!r} here; it has {known}")
            return self._card(plain, matching[0])
        # The operator's order decides; a class that somebody serves now goes before one that nobody does.
        ready = [c for c in class_ids if c in self._texts]
        served = [c for c in ready if self.room(c)] or [c for c in ready if self._roster(c) is not None]
        return self._card(plain, (served or ready or class_ids)[0])

    def model_cards(self) -> list[ModelCard]:
        """All names that have at least one class whose text is here, in alphabetical order."""
        return [self.resolve(name) for name in sorted(self._names) if any(c in self._texts for c in self._names[name])]

    def class_text(self, class_id: str) -> ClassText:
        """Raises KeyError while the class's tokenizer has not been fetched yet."""
        return self._texts[ClassId(class_id)]

    def text_facts(self, class_id: ClassId) -> TextFacts | None:
        """What is known of a class's vocabulary; None of a class that nobody ever offered."""
        known = self._classes.get(class_id)
        return known[1] if known is not None else None

    def has_text(self, class_id: str) -> bool:
        return class_id in self._texts

    def pending(self) -> list[PendingOffer]:
        return sorted(self._pending.values(), key=lambda offer: (offer.owner_id, offer.name))

    def names(self) -> dict[str, list[ClassId]]:
        return {name: list(class_ids) for name, class_ids in sorted(self._names.items())}

    def may_serve(self, offer: ClassOffer, node_id: NodeId) -> bool:
        """Whether this offer's class is approved under any name, or may name itself."""
        class_id = offer.model_class.class_id
        return self.may_name(node_id) or any(class_id in class_ids for class_ids in self._names.values())

    def may_name(self, node_id: NodeId) -> bool:
        """Whether what this node calls its models becomes their name here without asking the operator."""
        return self._approve == "open" or node_id in self._own_nodes

    async def approve(self, name: str, class_id: ClassId, *, by: str) -> None:
        """Adds the class to the end of the name's list. Harmless when it is there already."""
        if not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable() or "@" in name or " " in name:
            raise ValueError(f"a model name is 1 to {NAME_CHARACTERS_MAX} printable characters without '@' and spaces")
        if class_id in self._names.get(name, ()):
            return
        place = len(self._names.get(name, ()))
        moment = int(self._now())

        async def insert(transaction: Transaction) -> None:
            await transaction.do(
                "INSERT INTO class_names (name, class_id, place, approved_by, approved_seconds)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                name,
                class_id,
                place,
                by,
                moment,
            )
            await transaction.announce("names", name)

        await self._store.run(insert)
        self._names.setdefault(name, []).append(class_id)

    async def withdraw(self, name: str, class_id: ClassId) -> None:
        """Takes a class from a name. Raises UnknownModel when it is not there."""
        if class_id not in self._names.get(name, ()):
            raise self._unknown(name)

        async def delete(transaction: Transaction) -> None:
            await transaction.do("DELETE FROM class_names WHERE name = ? AND class_id = ?", name, class_id)
            await transaction.announce("names", name)

        await self._store.run(delete)
        self._names[name].remove(class_id)
        if not self._names[name]:
            del self._names[name]

    def full_class_id(self, prefix: str) -> ClassId:
        """The one known or offered class that begins with `prefix`. Raises ValueError otherwise."""
        known = set(self._classes) | {offer.class_id for offer in self._pending.values()}
        matching = sorted(c for c in known if c.startswith(prefix.lower()))
        if len(matching) != 1 or len(prefix) < CLASS_ID_SHORT:
            raise ValueError(
                f"{prefix!r} names {len(matching)} known classes; give at least {CLASS_ID_SHORT} characters of one"
            )
        return matching[0]

    async def learn_class(self, model_class: ModelClass, facts: TextFacts, text: ClassText) -> None:
        """A class whose text files are here and checked."""
        class_id = model_class.class_id
        if hashlib.sha256(facts_bytes(facts)).hexdigest() != model_class.text_facts_sha256:
            raise ValueError("these text facts do not belong to this class")
        if class_id not in self._classes:
            moment = int(self._now())

            async def insert(transaction: Transaction) -> None:
                await transaction.do(
                    "INSERT INTO classes (class_id, model_class, facts, first_seen_seconds) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT DO NOTHING",
                    class_id,
                    msgspec.json.encode(model_class).decode(),
                    facts_bytes(facts).decode(),
                    moment,
                )
                await transaction.announce("names")

            await self._store.run(insert)
            self._classes[class_id] = (model_class, facts, moment)
        self._texts[class_id] = text

    def known_classes(self) -> Mapping[ClassId, tuple[ModelClass, TextFacts, int]]:
        return self._classes

    # ------------------------------------------------------------ nodes

    async def price_row(self, node_id: NodeId, class_id: ClassId, price: Price) -> PriceRow:
        """The row of this price at today's fee: the node's latest if nothing has changed, else a new version."""
        if price == Price():
            return FREE
        fees, moment = self._fees, int(self._now())

        async def find_or_insert(transaction: Transaction) -> PriceRow:
            latest = await transaction.one(
                "SELECT version, price_id, input_nanocredits, cached_input_nanocredits, output_nanocredits,"
                " fee_basis_points, audit_share_basis_points, reserve_share_basis_points"
                " FROM prices WHERE node_id = ? AND class_id = ? ORDER BY version DESC LIMIT 1",
                node_id,
                class_id,
            )
            numbers = (
                *(price.input_nanocredits, price.cached_input_nanocredits, price.output_nanocredits),
                *(fees.fee_basis_points, fees.audit_share_basis_points, fees.reserve_share_basis_points),
            )
            if latest is not None and tuple(latest[2:]) == numbers:
                return PriceRow(latest[1], price, fees)
            version = 1 if latest is None else latest[0] + 1
            words = "\0".join(map(str, (node_id, class_id, version, *numbers)))
            price_id = "price-" + hashlib.sha256(words.encode()).hexdigest()[:20]
            await transaction.append(
                "prices",
                (
                    *("price_id", "node_id", "class_id", "version"),
                    *("input_nanocredits", "cached_input_nanocredits", "output_nanocredits"),
                    *("fee_basis_points", "audit_share_basis_points", "reserve_share_basis_points", "since_seconds"),
                ),
                [(price_id, node_id, class_id, version, *numbers, moment)],
            )
            return PriceRow(price_id, price, fees)

        return await self._store.run(find_or_insert)

    def price_rows(self, class_id: str) -> list[PriceRow]:
        """What the nodes that serve this class now ask, one row for each node; empty when nobody does."""
        roster = self._roster(class_id)
        return roster.price_rows() if roster is not None else []

    def prices(self, class_id: str) -> list[PriceRow]:
        """A row for each different price of this class: what a request could cost, however many nodes there are."""
        roster = self._roster(class_id)
        return roster.prices() if roster is not None else []

    def join(self, node_id: NodeId, owner_id: OwnerId, software: str, node_key: bytes = b"") -> NodeRecord:
        """A new conversation of this node. What an older one offered is gone from this moment."""
        older = self._nodes.get(node_id)
        record = NodeRecord(node_id, owner_id, software, self._now(), node_key)
        record.tier = TIER_OWN if node_id in self._own_nodes else 0
        record.sent = SentPrefixes(self._holders, node_id)
        self._nodes[node_id] = record
        if older is not None:
            self._drop_pending(node_id)
            self._withdraw_members(older)
        return record

    def leave(self, record: NodeRecord) -> None:
        """Forgets this conversation's record; a newer one of the same node stays."""
        if self._nodes.get(record.node_id) is record:
            del self._nodes[record.node_id]
            self._drop_pending(record.node_id)
            self._withdraw_members(record)

    def offer(
        self, record: NodeRecord, offers: Iterable[ClassOffer], prices: Mapping[ClassId, PriceRow] | None = None
    ) -> None:
        """Replaces what this node serves, and for how much. Only offers whose class text is here are served."""
        if self._nodes.get(record.node_id) is not record:
            return  # The node has joined again since; that conversation's offers count.
        gone = self._take_members(record)
        record.offers = {offer.model_class.class_id: offer for offer in offers}
        record.prices = dict(prices or {})
        moment = self._clock()
        for class_id, offer in record.offers.items():
            member = Member(
                record.node_id,
                record.owner_id,
                offer.slots,
                self._standing(record.node_id, offer, moment),
                price=record.prices.get(class_id, FREE),
                sent=record.sent,
                region=offer.region,
                tier=record.tier,
                in_flight=record.in_flight.setdefault(class_id, 0),
                draining=record.draining,
                round_trip_seconds=record.round_trip_seconds,
            )
            record.members[class_id] = member
            self._rosters.setdefault(class_id, Roster()).add(member, moment)
        for class_id in gone | set(record.offers):
            self.changed(class_id)

    def hold_back(self, record: NodeRecord, offers: Iterable[ClassOffer]) -> None:
        """Offers that wait for the operator's approval."""
        self._drop_pending(record.node_id)
        for offer in offers:
            pending = PendingOffer(offer.name, offer.model_class.class_id, record.node_id, record.owner_id)
            self._pending[record.node_id, offer.name] = pending

    def drain(self, record: NodeRecord) -> None:
        record.draining = True
        moment = self._clock()
        for class_id, member in record.members.items():
            self._rosters[class_id].drain(member, moment)
        for class_id in tuple(record.members):
            self.changed(class_id)

    # ------------------------------------------------------------ works

    def place(self, request: Request) -> Placement | Full:
        """Decides where a work goes, and remembers that it did."""
        found = self.look(request)
        self.decided(request, found)
        return found

    def look(self, request: Request) -> Placement | Full:
        """Where this would go now. Remembers nothing."""
        return scheduler.place(request, self.snapshot(), now=self._clock(), random=self._random)

    def decided(self, request: Request, found: Placement | Full) -> None:
        """A decision that was acted upon: for sticky keys, and so that owners can see why work went elsewhere."""
        roster = self._rosters.get(request.class_id)
        if roster is None:
            return
        for node_id, reason in found.considered:
            member = roster.get(node_id)
            if member is not None:
                member.standing.lost[reason] += 1
        if isinstance(found, Placement):
            roster.decisions += 1
            member = roster.get(found.node_id)
            if member is not None:
                member.standing.won += 1
            if request.sticky:
                self._sticky.remember(request.class_id, request.sticky, found.node_id, self._clock())

    def begin(self, record: NodeRecord, class_id: ClassId) -> None:
        """One more work on this node."""
        self._load(record, class_id, record.in_flight.get(class_id, 0) + 1)

    def end(self, record: NodeRecord, class_id: ClassId) -> None:
        """One work fewer: somebody who waits may have its place."""
        assert record.in_flight[class_id] > 0, "a work ended twice"
        self._load(record, class_id, record.in_flight[class_id] - 1)
        self.changed(class_id)

    def observe(
        self,
        record: NodeRecord,
        class_id: ClassId,
        *,
        prefill_tokens: int,
        ttft_seconds: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """What the network's own clock saw of one work: `tokens` ids in `seconds` after the first.

        Either half may come by itself, the other as zeros: the first id as soon as it is there, the rest at the end.
        """
        if ttft_seconds > 0:
            speed = prefill_tokens / ttft_seconds
            old = record.prefill_speed.get(class_id, speed)
            record.prefill_speed[class_id] = old + SPEED_MEMORY * (speed - old)
        if tokens >= TOKENS_FOR_A_SPEED and seconds > 0:
            speed = tokens / seconds
            old = record.decode_speed.get(class_id, speed)
            record.decode_speed[class_id] = old + SPEED_MEMORY * (speed - old)
        member, roster = record.members.get(class_id), self._rosters.get(class_id)
        if member is None or roster is None:
            return  # It no longer offers this class.
        moment = self._clock()
        if seconds > 0:
            roster.tokens(member, moment, tokens, seconds)
        if ttft_seconds > 0:
            roster.first_token(member, moment, prefill_tokens, ttft_seconds)

    def ended(self, record: NodeRecord, class_id: ClassId, *, fault: str | None) -> None:
        """One placement's end: None is a good one, else the code of what the node did wrong."""
        moment = self._clock()
        roster = self._rosters.get(class_id)
        member = roster.get(record.node_id) if roster is not None else None
        if roster is not None and member is not None:  # of this conversation or, if it is back already, of a newer one
            roster.ended(member, fault, moment)
            return
        standing = self._standings.get((record.node_id, class_id))
        if standing is not None:
            standing.health.ended(moment, fault)
            if standing.health.tripped:
                standing.health.open(moment)

    def queued(self, record: NodeRecord, class_id: ClassId, seconds: float) -> None:
        """A work waited on the node for so long before it began."""
        member = record.members.get(class_id)
        if member is not None:
            member.pace.waited(self._clock(), seconds)

    def first_token_seconds(self, record: NodeRecord, class_id: ClassId, read_tokens: int) -> float:
        """What queue and prefill of so many uncached ids are expected to take on this node, in seconds."""
        pace = self._pace_of(record, class_id)
        if pace is None:
            return UNMEASURED_FIRST_TOKEN_SECONDS
        return pace.first_token_seconds(self._clock(), read_tokens)

    def token_gap_seconds(self, record: NodeRecord, class_id: ClassId) -> float:
        """The usual time between two ids of one stream on this node now; 0.0 when nobody has measured it."""
        pace = self._pace_of(record, class_id)
        if pace is None or not pace.gap_works:
            return 0.0
        return pace.token_seconds(max(0, record.in_flight.get(class_id, 0) - 1))

    def usual_ttft_seconds(self, class_id: ClassId) -> float:
        """From the offer to the first id in this class when nothing is in the way; 0.0 when nobody has measured it."""
        roster = self._rosters.get(class_id)
        return roster.usual_ttft_seconds if roster is not None else 0.0

    def places(self, class_id: ClassId) -> int:
        """How many works this class's nodes may hold together; those that drain hold none."""
        roster = self._current(class_id)
        return roster.places if roster is not None else 0

    def room(self, class_id: ClassId) -> int:
        """How many more they may be given now."""
        roster = self._current(class_id)
        return roster.room if roster is not None else 0

    def nodes(self) -> list[NodeRecord]:
        return list(self._nodes.values())

    def record_of(self, node_id: NodeId) -> NodeRecord | None:
        return self._nodes.get(node_id)

    def snapshot(self) -> Snapshot:
        """The picture that a placement is decided on."""
        moment = self._clock()
        for roster in self._rosters.values():
            roster.advance(moment)
        return self._snapshot

    def roster(self, class_id: str) -> Roster | None:
        """Who serves this class now; None when nobody does."""
        return self._roster(class_id)

    # ------------------------------------------------------------ inside

    def _roster(self, class_id: str) -> Roster | None:
        roster = self._rosters.get(class_id)
        return roster if roster is not None and len(roster) else None

    def _current(self, class_id: ClassId) -> Roster | None:
        roster = self._rosters.get(class_id)
        if roster is not None:
            roster.advance(self._clock())
        return roster

    def _standing(self, node_id: NodeId, offer: ClassOffer, moment: float) -> Standing:
        key = node_id, offer.model_class.class_id
        standing = self._standings.pop(key, None)
        if standing is None or not standing.pace.measured:  # then the newest hints are all there is
            pace = Pace(
                decode_hint=offer.decode_tokens_per_second,
                prefill_hint=offer.prefill_tokens_per_second,
                slots=offer.slots,
            )
            if standing is None:
                standing = Standing(Health(moment), pace)
            else:
                standing.pace = pace
        self._standings[key] = standing
        if len(self._standings) > STANDINGS_MAX:
            self._standings.popitem(last=False)  # a live node has its own hold on what it needs
        return standing

    def _pace_of(self, record: NodeRecord, class_id: ClassId) -> Pace | None:
        member = record.members.get(class_id)
        if member is not None:
            return member.pace
        standing = self._standings.get((record.node_id, class_id))
        return standing.pace if standing is not None else None

    def _load(self, record: NodeRecord, class_id: ClassId, in_flight: int) -> None:
        record.in_flight[class_id] = in_flight
        member = record.members.get(class_id)
        if member is not None:
            self._rosters[class_id].load(member, in_flight, self._clock())

    def _take_members(self, record: NodeRecord) -> set[ClassId]:
        moment = self._clock()
        gone = set(record.members)
        for class_id, member in record.members.items():
            self._rosters[class_id].remove(member, moment)
            if not len(self._rosters[class_id]) and len(self._rosters) > ROSTERS_MAX:
                del self._rosters[class_id]
        record.members = {}
        return gone

    def _withdraw_members(self, record: NodeRecord) -> None:
        for class_id in self._take_members(record):
            self.changed(class_id)

    def _drop_pending(self, node_id: NodeId) -> None:
        for key in [key for key in self._pending if key[0] == node_id]:
            del self._pending[key]

    def _card(self, name: str, class_id: ClassId) -> ModelCard:
        known = self._classes.get(class_id)
        if known is None:
            raise UnknownModel(name, [], f"{name} is approved, but no node has offered its class yet")
        _, facts, first_seen = known
        roster = self._roster(class_id)
        owner = (roster.only_owner if roster is not None else None) or "gridmill"
        return ModelCard(name, class_id, facts, owner, first_seen, facts.toy)

    def _unknown(self, name: str) -> UnknownModel:
        for offer in self._pending.values():
            if name in (offer.name, f"{offer.owner_id}/{offer.name}"):
                reason = (
                    f"{offer.owner_id}/{offer.name} is offered but not approved by this network's operator "
                    f"(`gridmill classes approve {offer.name} {offer.class_id[:CLASS_ID_SHORT]}`)"
                )
                return UnknownModel(name, [], reason)
        lowered = {known.lower(): known for known in self._names}
        close = difflib.get_close_matches(name.lower()[:NAME_CHARACTERS_MAX], lowered, NEAREST_NAMES, cutoff=0.4)
        nearest = [lowered[match] for match in close] or sorted(self._names)[:NEAREST_NAMES]
        shown = name if len(name) <= NAME_CHARACTERS_MAX else name[:NAME_CHARACTERS_MAX] + "…"
        offered = f" Did you mean {', '.join(nearest)}?" if nearest else " No model is served yet."
        return UnknownModel(name, nearest, f"The model '{shown}' does not exist here.{offered}")
