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
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import msgspec

from gridmill.network.detokenise import ClassText
from gridmill.network.metering import FREE, FeePolicy, PriceRow
from gridmill.network.prefixes import SentPrefixes
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

SPEED_MEMORY = 0.2  # weight of the newest observation in the moving averages
DECODE_TOKENS_PER_SECOND_UNKNOWN = 20.0  # a node nobody has measured: neither flattering nor hopeless
PREFILL_TOKENS_PER_SECOND_UNKNOWN = 500.0
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


class NodeView(msgspec.Struct, frozen=True):
    """One node's offer of one class, as the scheduler sees it. Speeds are the network's own measurements, or hints."""

    node_id: NodeId
    owner_id: OwnerId
    slots: int
    in_flight: int
    draining: bool
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    price: PriceRow = FREE

    @property
    def free_slots(self) -> int:
        return 0 if self.draining else max(0, self.slots - self.in_flight)


class Snapshot(msgspec.Struct, frozen=True):
    """All live offers by class. A class without a live node is absent."""

    by_class: Mapping[str, tuple[NodeView, ...]]


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
        self.telemetry = Telemetry()
        self.round_trip_seconds = 0.0
        self.offers: dict[ClassId, ClassOffer] = {}
        self.prices: dict[ClassId, PriceRow] = {}
        self.sent = SentPrefixes()
        self.in_flight: dict[ClassId, int] = {}
        self.decode_speed: dict[ClassId, float] = {}
        self.prefill_speed: dict[ClassId, float] = {}


class Registry:
    """`changed` is called after every change that can make room for somebody who waits."""

    def __init__(
        self,
        store: Store,
        *,
        approve: ApproveMode,
        own_nodes: Collection[NodeId] = (),
        fees: FeePolicy | None = None,
        now: Callable[[], float],
        changed: Callable[[ClassId], None] = lambda class_id: None,
    ) -> None:
        self._store = store
        self._approve = approve
        self._own_nodes = frozenset(own_nodes)
        self._fees = fees or FeePolicy()
        self._now = now
        self.changed = changed
        self._nodes: dict[NodeId, NodeRecord] = {}
        self._classes: dict[ClassId, tuple[ModelClass, TextFacts, int]] = {}
        self._names: dict[str, list[ClassId]] = {}
        self._texts: dict[ClassId, ClassText] = {}
        self._pending: dict[tuple[NodeId, str], PendingOffer] = {}
        self._views: dict[str, tuple[NodeView, ...]] = {}
        self._stale: set[ClassId] = set()
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
        served = [c for c in ready if any(view.free_slots for view in self._view(c))] or [
            c for c in ready if self._view(c)
        ]
        return self._card(plain, (served or ready or class_ids)[0])

    def model_cards(self) -> list[ModelCard]:
        """All names that have at least one class whose text is here, in alphabetical order."""
        return [self.resolve(name) for name in sorted(self._names) if any(c in self._texts for c in self._names[name])]

    def class_text(self, class_id: str) -> ClassText:
        """Raises KeyError while the class's tokenizer has not been fetched yet."""
        return self._texts[ClassId(class_id)]

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
        """What the nodes that serve this class now ask; empty when nobody does."""
        return [view.price for view in self._view(ClassId(class_id)) if not view.draining]

    def join(self, node_id: NodeId, owner_id: OwnerId, software: str, node_key: bytes = b"") -> NodeRecord:
        """A new conversation of this node. What an older one offered is gone from this moment."""
        older = self._nodes.get(node_id)
        record = NodeRecord(node_id, owner_id, software, self._now(), node_key)
        self._nodes[node_id] = record
        if older is not None:
            self._drop_pending(node_id)
            self._refresh(older, older.offers)
        return record

    def leave(self, record: NodeRecord) -> None:
        """Forgets this conversation's record; a newer one of the same node stays."""
        if self._nodes.get(record.node_id) is record:
            del self._nodes[record.node_id]
            self._drop_pending(record.node_id)
            self._refresh(record, record.offers)

    def offer(
        self, record: NodeRecord, offers: Iterable[ClassOffer], prices: Mapping[ClassId, PriceRow] | None = None
    ) -> None:
        """Replaces what this node serves, and for how much. Only offers whose class text is here are served."""
        if self._nodes.get(record.node_id) is not record:
            return  # The node has joined again since; that conversation's offers count.
        before = set(record.offers)
        record.offers = {offer.model_class.class_id: offer for offer in offers}
        record.prices = dict(prices or {})
        for class_id in record.offers:
            record.in_flight.setdefault(class_id, 0)
        self._refresh(record, before | set(record.offers))

    def hold_back(self, record: NodeRecord, offers: Iterable[ClassOffer]) -> None:
        """Offers that wait for the operator's approval."""
        self._drop_pending(record.node_id)
        for offer in offers:
            pending = PendingOffer(offer.name, offer.model_class.class_id, record.node_id, record.owner_id)
            self._pending[record.node_id, offer.name] = pending

    def drain(self, record: NodeRecord) -> None:
        record.draining = True
        self._refresh(record, record.offers)

    def begin(self, record: NodeRecord, class_id: ClassId) -> None:
        """One more work on this node."""
        record.in_flight[class_id] = record.in_flight.get(class_id, 0) + 1
        self._stale.add(class_id)

    def end(self, record: NodeRecord, class_id: ClassId) -> None:
        """One work fewer: somebody who waits may have its place."""
        record.in_flight[class_id] -= 1
        assert record.in_flight[class_id] >= 0, "a work ended twice"
        self._refresh(record, (class_id,))

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
        """What the network's own clock saw of one work: `tokens` ids in `seconds` after the first."""
        if ttft_seconds > 0:
            speed = prefill_tokens / ttft_seconds
            old = record.prefill_speed.get(class_id, speed)
            record.prefill_speed[class_id] = old + SPEED_MEMORY * (speed - old)
        if tokens >= 8 and seconds > 0:
            speed = tokens / seconds
            old = record.decode_speed.get(class_id, speed)
            record.decode_speed[class_id] = old + SPEED_MEMORY * (speed - old)
        self._stale.add(class_id)

    def nodes(self) -> list[NodeRecord]:
        return list(self._nodes.values())

    def record_of(self, node_id: NodeId) -> NodeRecord | None:
        return self._nodes.get(node_id)

    def snapshot(self) -> Snapshot:
        """The picture that a placement is decided on. Rebuilds only the classes that changed."""
        for class_id in self._stale:
            self._rebuild(class_id)
        self._stale.clear()
        return Snapshot(self._views)

    # ------------------------------------------------------------ inside

    def _view(self, class_id: ClassId) -> tuple[NodeView, ...]:
        return self.snapshot().by_class.get(class_id, ())

    def _rebuild(self, class_id: ClassId) -> None:
        views = tuple(
            NodeView(
                node_id=record.node_id,
                owner_id=record.owner_id,
                slots=offer.slots,
                in_flight=record.in_flight.get(class_id, 0),
                draining=record.draining,
                decode_tokens_per_second=record.decode_speed.get(class_id)
                or offer.decode_tokens_per_second
                or DECODE_TOKENS_PER_SECOND_UNKNOWN,
                prefill_tokens_per_second=record.prefill_speed.get(class_id)
                or offer.prefill_tokens_per_second
                or PREFILL_TOKENS_PER_SECOND_UNKNOWN,
                price=record.prices.get(class_id, FREE),
            )
            for record in self._nodes.values()
            if (offer := record.offers.get(class_id)) is not None
        )
        # A fresh mapping, so that a snapshot in somebody's hands never changes under them.
        fresh = dict(self._views)
        if views:
            fresh[class_id] = views
        else:
            fresh.pop(class_id, None)
        self._views = fresh

    def _refresh(self, record: NodeRecord, class_ids: Iterable[ClassId]) -> None:
        for class_id in tuple(class_ids):
            self._stale.add(class_id)
            self.changed(class_id)

    def _drop_pending(self, node_id: NodeId) -> None:
        for key in [key for key in self._pending if key[0] == node_id]:
            del self._pending[key]

    def _card(self, name: str, class_id: ClassId) -> ModelCard:
        known = self._classes.get(class_id)
        if known is None:
            raise UnknownModel(name, [], f"{name} is approved, but no node has offered its class yet")
        _, facts, first_seen = known
        views = self._view(class_id)
        owner = views[0].owner_id if len({view.owner_id for view in views}) == 1 else "gridmill"
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
