"""One answer for all requests that carry the same Idempotency-Key: a table of keys, and the answers being made now.

1. A key belongs to an account, for a day. Whoever inserts its row runs the request; everybody else reads what comes of
   it. On one gateway that is a Recording in memory, across gateways and restarts it is what the books kept
   (`work_answers`, written with the very transaction that charges the ids).
2. A run that broke off leaves its row, when anything was delivered or charged, and the next retry takes it over: same
   request id and so the same seed, the delivered ids given to the next node, only new ids held for and charged.
3. A row is taken over only when its run cannot charge any more: it said so itself, or its gateway is dead and the books
   have settled what it left. Each run counts epochs from a number of its own, so that none can meet another's.

Ids are kept, never text; keys and bodies are kept as hashes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from gridmill.network.journey import Outcome
from gridmill.network.store import Store, StoreUnusable, Transaction
from gridmill.wire.messages import Emission
from gridmill.wire.sampling import TokenLogprob, unpack_ids

log = logging.getLogger("gridmill.network.idempotency")

IDEMPOTENT_SECONDS = 24 * 3600  # how long a key means its first request; as long as its ids are kept
KEY_CHARACTERS_MAX = 255
LEASE_SECONDS = 20.0  # a gateway that says nothing for so long no longer runs what it began
TIDY_SECONDS = 60.0
TIDY_ROWS = 500  # deleted in one transaction
EPOCHS_PER_RUN = 16  # more than the nodes that one run tries

MIGRATION = """
CREATE TABLE idempotent_requests (
    account_id TEXT NOT NULL,
    key_hash BLOB NOT NULL,
    body_hash BLOB NOT NULL,
    request_id TEXT NOT NULL,
    model TEXT NOT NULL,
    class_id TEXT NOT NULL,
    created_seconds BIGINT NOT NULL,
    choices BIGINT NOT NULL,
    holder TEXT NOT NULL,
    run BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    ending TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (account_id, key_hash)
);
CREATE INDEX idempotent_requests_by_age ON idempotent_requests (at_ms);
"""

_COLUMNS = (
    *("account_id", "key_hash", "body_hash", "request_id", "model", "class_id", "created_seconds", "choices"),
    *("holder", "run", "expires_ms", "ending", "at_ms"),
)


class KeyReused(Exception):
    """The key was sent before, with another body."""


class Asked(msgspec.Struct, frozen=True):
    """A request as its row has it. `choices` counts works: n times the prompts."""

    account_id: str
    key_hash: bytes
    body_hash: bytes
    request_id: str
    model: str
    class_id: str
    created_seconds: int
    choices: int

    @property
    def work_ids(self) -> list[str]:
        return [f"{self.request_id}-{index}" for index in range(self.choices)]


class Ending(msgspec.Struct, frozen=True):
    """What the books do not keep of an answer that is whole: why each choice ended, on which nodes, how long prompts
    were."""

    kinds: tuple[str, ...]
    nodes: tuple[str, ...]
    prompt_tokens: int


class Part(msgspec.Struct, frozen=True):
    """What was delivered of one choice so far, over all its runs. `scores` is None where they are not all there.

    `kind` says why it ended, when it did.
    """

    ids: tuple[int, ...] = ()
    scores: tuple[TokenLogprob, ...] | None = ()
    kind: str = ""
    prompt_charged: bool = False
    cached_tokens: int = 0
    charge_nanocredits: int = 0
    epoch_next: int = 0
    nodes: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        return not (self.ids or self.prompt_charged or self.charge_nanocredits)


class Mine(msgspec.Struct, frozen=True):
    """This gateway is to run it: from the beginning, or on from `parts`."""

    asked: Asked
    run: int
    parts: tuple[Part, ...]


class Whole(msgspec.Struct, frozen=True):
    """It was answered before."""

    asked: Asked
    ending: Ending
    parts: tuple[Part, ...]


class Elsewhere(msgspec.Struct, frozen=True):
    """Somebody runs it, or its last run is not settled yet: look again when something is heard."""

    request_id: str
    holder: str


Claim = Mine | Whole | Elsewhere


class Idempotency:
    """The table of keys, as one gateway sees it. `holder` is the gateway's name in the books."""

    def __init__(self, store: Store, *, holder: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self.holder = holder
        self.recordings: dict[tuple[str, bytes], Recording] = {}  # what runs or is being looked up here now
        self._running: dict[str, tuple[Asked, int]] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}

    # ------------------------------------------------------------ the life of a row

    async def claim(self, asked: Asked, *, take_own: bool = False) -> Claim:
        """Inserts the row, or tells what there is already. Raises KeyReused.

        A row that this gateway holds without running it is left from an earlier life, or from a run whose end could
        not be written. `take_own` says that everything of that run is in the books.
        """

        async def action(transaction: Transaction) -> Claim:
            now_ms = await transaction.now_ms()
            oldest_ms = now_ms - IDEMPOTENT_SECONDS * 1000
            expires_ms = now_ms + int(self._lease_seconds * 1000)
            await transaction.do(
                "DELETE FROM idempotent_requests WHERE account_id = ? AND key_hash = ? AND at_ms < ?",
                asked.account_id,
                asked.key_hash,
                oldest_ms,
            )
            inserted = await transaction.do(
                f"INSERT INTO idempotent_requests ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
                " ON CONFLICT DO NOTHING",
                *msgspec.structs.astuple(asked),
                *(self.holder, 0, expires_ms, "", now_ms),
            )
            if inserted:
                return Mine(asked, 0, (Part(),) * asked.choices)
            row = await transaction.one(
                f"SELECT {', '.join(_COLUMNS)} FROM idempotent_requests WHERE account_id = ? AND key_hash = ?",
                asked.account_id,
                asked.key_hash,
            )
            if row is None:
                return Elsewhere("", "")  # It came to nothing between the insert that met it and this look.
            found = Asked(row[0], bytes(row[1]), bytes(row[2]), *row[3:8])
            holder, run, expired_ms, ending = row[8:12]
            if found.body_hash != asked.body_hash:
                raise KeyReused
            if ending:
                parts = await _parts(transaction, found, EPOCHS_PER_RUN * (run + 1))
                return Whole(found, msgspec.json.decode(ending, type=Ending), parts)
            if not (take_own if holder == self.holder else expired_ms <= now_ms):
                return Elsewhere(found.request_id, holder)
            if await transaction.among("SELECT work_id FROM open_works WHERE work_id IN (??)", sorted(found.work_ids)):
                return Elsewhere(found.request_id, holder)
            taken = await transaction.do(
                "UPDATE idempotent_requests SET holder = ?, run = run + 1, expires_ms = ?"
                " WHERE account_id = ? AND key_hash = ? AND run = ? AND ending = ''",
                *(self.holder, expires_ms, found.account_id, found.key_hash, run),
            )
            if not taken:
                return Elsewhere(found.request_id, holder)
            return Mine(found, run + 1, await _parts(transaction, found, EPOCHS_PER_RUN * (run + 1)))

        claim = await self._store.run(action)
        if isinstance(claim, Mine):
            self._running[claim.asked.request_id] = claim.asked, claim.run
        return claim

    async def finish(self, mine: Mine, ending: Ending) -> None:
        """The answer is whole, and all of it is in the books."""

        async def action(transaction: Transaction) -> None:
            await self._change(transaction, mine, "UPDATE idempotent_requests SET ending = ?", _text(ending))

        await self._store.run(action)

    async def give_up(self, mine: Mine) -> None:
        """The run broke off, and all of it is in the books. What came to nothing is as if it had never been asked."""

        async def action(transaction: Transaction) -> None:
            parts = await _parts(transaction, mine.asked, 0)
            if all(part.nothing for part in parts):
                await self._change(transaction, mine, "DELETE FROM idempotent_requests")
            else:
                # Free for whoever asks next, at whichever gateway.
                await self._change(transaction, mine, "UPDATE idempotent_requests SET holder = '', expires_ms = ?", 0)

        await self._store.run(action)

    def over(self, mine: Mine) -> None:
        """The run has ended here, whether or not that could be written."""
        self._running.pop(mine.asked.request_id, None)

    async def _change(self, transaction: Transaction, mine: Mine, sql: str, *values: Any) -> None:
        asked = mine.asked
        await transaction.do(
            f"{sql} WHERE account_id = ? AND key_hash = ? AND request_id = ? AND holder = ? AND run = ?",
            *values,
            *(asked.account_id, asked.key_hash, asked.request_id, self.holder, mine.run),
        )
        await transaction.announce("idempotent", asked.request_id)

    # ------------------------------------------------------------ other gateways

    def heard(self, topic: str, subject: str) -> None:
        """What the store announces."""
        if topic == "idempotent":
            for event in self._waiting.get(subject, ()):
                event.set()
        elif topic == "*":
            for events in self._waiting.values():
                for event in events:
                    event.set()

    async def changed(self, request_id: str, timeout_seconds: float) -> None:
        """Returns when the row of this request may have changed, at the latest after the timeout."""
        event = asyncio.Event()
        self._waiting.setdefault(request_id, set()).add(event)
        try:
            async with asyncio.timeout(timeout_seconds):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting[request_id].discard(event)
            if not self._waiting[request_id]:
                del self._waiting[request_id]

    # ------------------------------------------------------------ housekeeping

    async def keep(self) -> None:
        """Says which runs live, and forgets what is older than a day. Until cancelled; a line in the task group."""
        since_tidy_seconds = TIDY_SECONDS
        while True:
            try:
                await self.renew()
                if since_tidy_seconds >= TIDY_SECONDS:
                    since_tidy_seconds = 0.0
                    await self.tidy()
            except StoreUnusable as problem:
                log.warning("idempotency keys could not be kept", extra={"reason": str(problem)})
            await asyncio.sleep(self._lease_seconds / 4)
            since_tidy_seconds += self._lease_seconds / 4

    async def renew(self) -> None:
        if not self._running:
            return
        live = [(asked.account_id, asked.key_hash, self.holder, run) for asked, run in self._running.values()]

        async def action(transaction: Transaction) -> None:
            expires_ms = await transaction.now_ms() + int(self._lease_seconds * 1000)
            await transaction.do_many(
                "UPDATE idempotent_requests SET expires_ms = ?"
                " WHERE account_id = ? AND key_hash = ? AND holder = ? AND run = ?",
                [(expires_ms, *row) for row in sorted(live)],
            )

        await self._store.run(action)

    async def tidy(self) -> None:
        """Deletes rows and answers older than a day, a bounded number in each transaction."""

        async def action(transaction: Transaction) -> bool:
            oldest_ms = await transaction.now_ms() - IDEMPOTENT_SECONDS * 1000
            full = False
            for table, columns in (
                ("idempotent_requests", ("account_id", "key_hash")),
                ("work_answers", ("work_id", "epoch")),
            ):
                rows = await transaction.all(
                    f"SELECT {', '.join(columns)} FROM {table} WHERE at_ms < ? ORDER BY at_ms, {', '.join(columns)}"
                    " LIMIT ?",
                    oldest_ms,
                    TIDY_ROWS,
                )
                where = " AND ".join(f"{column} = ?" for column in columns)
                await transaction.do_many(f"DELETE FROM {table} WHERE {where}", rows)
                full = full or len(rows) == TIDY_ROWS
            return full

        while await self._store.run(action):
            pass


async def _parts(transaction: Transaction, asked: Asked, epoch_first: int) -> tuple[Part, ...]:
    """What the books kept of each choice, put together in the order of epochs, which is that of positions."""
    rows = await transaction.among(
        "SELECT work_id, epoch, start, ids, scores, finish, input_tokens, cached_tokens, charge_nanocredits, node_id"
        " FROM work_answers WHERE work_id IN (??)",
        sorted(asked.work_ids),
    )
    kept: dict[str, list[Any]] = {work_id: [] for work_id in asked.work_ids}
    for row in sorted(set(rows), key=lambda row: row[1]):
        kept[row[0]].append(row)
    return tuple(_part(rows, epoch_first) for rows in kept.values())


def _part(rows: Sequence[Any], epoch_first: int) -> Part:
    kept: list[_Segment] = []
    for _, epoch, start, packed, scores, finish, input_tokens, cached_tokens, charge, node_id in rows:
        segment = _Segment(
            *(epoch, start, unpack_ids(bytes(packed)), None if scores is None else bytes(scores), finish),
            *(input_tokens, cached_tokens, charge, node_id),
        )
        # What a later run did not go on from was never charged: a gateway that was thought dead wrote it too late.
        while kept and kept[-1].start + len(kept[-1].ids) > start:
            kept.pop()
        kept.append(segment)
    ids = [token_id for segment in kept for token_id in segment.ids]
    return Part(
        tuple(ids),
        _scores(kept),
        kept[-1].finish if kept and kept[-1].finish in ("stop", "length") else "",
        any(segment.input_tokens for segment in kept),
        max((segment.cached_tokens for segment in kept), default=0),
        sum(segment.charge_nanocredits for segment in kept),
        max(epoch_first, 1 + max((row[1] for row in rows), default=-1)),
        tuple(dict.fromkeys(segment.node_id for segment in kept)),
    )


class _Segment(msgspec.Struct, frozen=True):
    """A row of work_answers."""

    epoch: int
    start: int
    ids: list[int]
    scores: bytes | None
    finish: str
    input_tokens: int
    cached_tokens: int
    charge_nanocredits: int
    node_id: str


def _scores(segments: Sequence[_Segment]) -> tuple[TokenLogprob, ...] | None:
    found: list[TokenLogprob] = []
    for segment in segments:
        scores = () if segment.scores is None else unpack_scores(segment.scores)
        if len(scores) != len(segment.ids):
            return None
        found += scores
    return tuple(found)


def pack_scores(scores: Sequence[TokenLogprob]) -> bytes:
    """Log probabilities as the books keep them; MessagePack, because JSON has no infinity."""
    return msgspec.msgpack.encode(scores)


def unpack_scores(packed: bytes) -> tuple[TokenLogprob, ...]:
    return msgspec.msgpack.decode(packed, type=tuple[TokenLogprob, ...])


def _text(ending: Ending) -> str:
    return msgspec.json.encode(ending).decode()


def hash_of_key(key: bytes) -> bytes | None:
    """What is kept of a key; None when it is not 1 to 255 printable ASCII characters."""
    if not 1 <= len(key) <= KEY_CHARACTERS_MAX or not all(0x20 <= byte < 0x7F for byte in key):
        return None
    return hashlib.sha256(b"gridmill-idempotency-key-v1\0" + key).digest()


def hash_of_body(path: str, body: bytes) -> bytes:
    return hashlib.sha256(b"gridmill-idempotent-body-v1\0" + path.encode() + b"\0" + body).digest()


# ---------------------------------------------------------------- an answer while it is made


class Track:
    """One choice of a Recording: its ids so far, with their log probabilities where they were asked for."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.scores: list[TokenLogprob] | None = None
        self.outcome: Outcome | None = None  # of the whole choice

    def begin(self, part: Part, scored: bool) -> None:
        self.ids = list(part.ids)
        self.scores = list(part.scores or ()) if scored else None

    def add(self, emissions: Sequence[Emission], count: int) -> None:
        """The first `count` ids of these emissions."""
        for emission in emissions:
            ids = emission.ids[:count]
            self.ids += ids
            if self.scores is not None:
                self.scores += (emission.logprobs or ())[: len(ids)]
            count -= len(ids)

    def since(self, position: int) -> Emission:
        scores = None if self.scores is None else tuple(self.scores[position:])
        return Emission(0, position, tuple(self.ids[position:]), scores)


class Recording:
    """An answer in memory: one task writes, any number of HTTP exchanges read from the first id on.

    It is bounded by the answer's max_tokens, and garbage when nobody writes or reads it.
    """

    def __init__(self, body_hash: bytes) -> None:
        self.body_hash = body_hash
        self.asked: Asked | None = None
        self.prompt_tokens = 0
        self.tracks: list[Track] = []
        self.nodes: list[str] = []
        self.charge_nanocredits = 0
        self.begun = False  # a node has accepted, or there was an answer before: the head of a stream may leave
        self.whole = False
        self.replayed = False  # all of it was made and charged before this gateway was asked
        self.failure: Exception | None = None
        self.readers = 0
        self._news = asyncio.Event()

    def begin(self, asked: Asked, parts: Sequence[Part], scored: bool) -> None:
        self.asked = asked
        self.tracks = [Track() for _ in parts]
        for track, part in zip(self.tracks, parts, strict=True):
            track.begin(part, scored)
            for node_id in part.nodes:
                self.placed(node_id)
        self.charge_nanocredits = sum(part.charge_nanocredits for part in parts)

    def placed(self, node_id: str) -> None:
        if node_id not in self.nodes:
            self.nodes.append(node_id)

    def changed(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def fail(self, failure: Exception) -> None:
        self.failure = failure
        self.changed()

    @property
    def news(self) -> asyncio.Event:
        """Take it, look at everything, then wait for it: nothing is missed."""
        return self._news
