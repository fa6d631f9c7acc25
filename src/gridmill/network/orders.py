"""One admitted work as the books see it: what is held for it, which nodes served which part, what was delivered.

A work that moves from node to node has several parts, each with an epoch, a leaf and a pay of its own. The user pays by
the first node's price and the first node's count of cached tokens, whoever serves the rest: all parts together cost
what the whole would have cost unbroken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from gridmill.network.metering import Charge, PriceRow, Usage
from gridmill.network.scheduler import ANYWHERE, Allowed, Why
from gridmill.network.settlement import (
    Finish,
    Job,
    Journal,
    Part,
    Payer,
    Server,
    Settlement,
    hold_id_of,
    settlements_of,
)
from gridmill.wire.messages import Price
from gridmill.wire.receipts import IdsHash, ids_hash
from gridmill.wire.sampling import pack_ids


class Purse(Protocol):
    """What an order is paid from."""

    lease_id: str
    free: int
    live: int


class Journalled(msgspec.Struct, frozen=True):
    """The part of a work that its row in the journal is about, and what came before."""

    epoch: int
    server: Server
    start: int
    started_ms: int
    count: int
    output_hash: bytes
    journal: Journal


class Order:
    """Belongs to one task. The Books make it, and end it with `settle` or `release`."""

    __slots__ = (
        "_hash_count",
        "_hasher",
        "_ids",
        "_part_first",
        "account_weight",
        "allowed",
        "amount",
        "cached_tokens",
        "charge_nanocredits",
        "charged",
        "class_id",
        "count",
        "deferred",
        "epoch",
        "flexible",
        "forgiven",
        "hold_epoch",
        "input_paid",
        "input_tokens",
        "journalled",
        "journalled_count",
        "journalled_epoch",
        "keeps_ids",
        "last_server",
        "lease_id",
        "max_price",
        "max_wait_seconds",
        "model",
        "parts",
        "payer",
        "promised_nanocredits",
        "prompt_hash",
        "purse",
        "replay_paid",
        "replayed_tokens",
        "salt",
        "scores",
        "server",
        "settled",
        "settles_later",
        "shown",
        "start",
        "started_ms",
        "sticky",
        "terms",
        "whys",
        "work_id",
    )

    def __init__(
        self,
        payer: Payer,
        work_id: str,
        class_id: str,
        model: str,
        input_tokens: int,
        purse: Purse | None,
        amount: int,
    ) -> None:
        self.payer = payer
        self.work_id = work_id
        self.class_id = class_id
        self.model = model
        self.input_tokens = input_tokens
        self.purse = purse
        self.lease_id = purse.lease_id if purse is not None else ""
        self.amount = amount
        self.epoch = 0
        self.start = 0  # output position of this run's first id: an earlier run delivered what is before
        self.salt = b""
        self.prompt_hash = bytes(32)
        self.max_price: Price | None = None  # the caller's: a dearer node is not asked
        self.max_wait_seconds: float | None = None  # the caller's: a longer wait for a place is not wanted
        self.allowed: Allowed = ANYWHERE  # the caller's: other nodes are not asked
        self.sticky = ""  # what the caller names its conversation, for its cache's sake
        self.account_weight = 1
        self.whys: list[tuple[Why, ...]] | None = None  # filled when the caller asks why its nodes were chosen
        self.flexible = False  # of the tier that waits, and is sent away first
        self.count = 0
        # Who serves now, and what came before.
        self.server: Server | None = None
        self.last_server: Server | None = None
        self.terms: PriceRow | None = None  # the first node's price, which is the user's
        self.cached_tokens = 0  # the first node's, too
        self.started_ms = 0
        self.parts: list[Part] = []
        self.input_paid = False  # an earlier part has read the prompt for the user's money
        self.replayed_tokens = 0  # promised to the node that serves now
        self.replay_paid = False  # the reserve pays for reading again once for each work
        self.promised_nanocredits = 0  # of the failover reserve, for all parts
        self._part_first = 0
        # The journal.
        self.journalled = False
        self.journalled_count = -1
        self.journalled_epoch = -1
        self.hold_epoch = 0
        self.settled = False
        self.charge_nanocredits = 0  # once it is settled
        self.settles_later = False  # `deferred` is called when all choices of the same answer are whole
        # Whether the caller has what was delivered: while an answer that leaves as a whole is not out, nothing is owed.
        self.shown = True
        self.forgiven = False  # another choice of the same answer failed: the caller gets nothing of this one either
        self.keeps_ids = (
            False  # whether the answer itself goes into the database (work_answers), for idempotent requests
        )
        self.scores: Callable[[int, int], bytes] | None = None  # kept beside `count` ids from `first` on: logprobs
        self.charged: Callable[[int, int], None] | None = None  # told what was held and what it came to
        self.deferred: Callable[[], object] | None = None  # settles it; set when that waits for a node's last word
        self._ids: list[int] = []
        self._hasher: IdsHash | None = None
        self._hash_count = 0

    def deliver(self, ids: tuple[int, ...]) -> None:
        """These ids were handed to the caller. Cheap: they are hashed when somebody asks."""
        self._ids.extend(ids)
        self.count += len(ids)

    def cut(self, keep: int) -> None:
        """Only the first `keep` ids count: what came after them in the same moment was given to nobody."""
        del self._ids[keep:]
        self.count = len(self._ids)

    def ids(self) -> list[int]:
        """All that was delivered in this run; not to be changed."""
        return self._ids

    @property
    def owed_count(self) -> int:
        """How many of the ids delivered count, should it end here."""
        return self.count if self.shown else 0

    @property
    def part_count(self) -> int:
        """How many of them the node that serves now has made."""
        return self.count - self._part_first

    @property
    def part_owed_count(self) -> int:
        return self.count - self._part_first if self.shown else 0

    def begin_part(
        self, server: Server, prompt: bytes, salt: bytes, cached_tokens: int, replayed_tokens: int, now_ms: int
    ) -> None:
        """A node has taken the work, or what is left of it."""
        self.server = self.last_server = server
        if self.terms is None:
            self.terms = server.row
            self.cached_tokens = cached_tokens
            self.salt = salt
            self.prompt_hash = ids_hash(salt, prompt)
        self.replayed_tokens = replayed_tokens
        self.started_ms = now_ms

    def end_part(self, *, forfeits: bool, now_ms: int) -> None:
        """The node has left the work, with or without a fault of its own; the next one has a higher epoch.

        What it made was delivered and is paid; it keeps the pay for the prompt unless it `forfeits` that.
        """
        server = self.server
        assert server is not None
        if self.part_count:
            self.parts.append(self._part(server, self.part_count, "lost" if forfeits else "moved", now_ms, forfeits))
        elif not self.parts:
            self.terms = None  # nobody was given anything: the next node begins afresh, at its own price
        self.epoch += 1
        self.server = None
        self._part_first = self.count
        self._hasher, self._hash_count = None, 0

    def _part(
        self,
        server: Server,
        count: int,
        finish: Finish,
        now_ms: int,
        forfeits: bool,
        commit_root: bytes = b"",
        claim: bytes = b"",
    ) -> Part:
        pays_input = not (self.input_paid or forfeits)
        used = Usage(self.input_tokens if pays_input else 0, self.cached_tokens if pays_input else 0, count)
        self.input_paid = self.input_paid or pays_input
        return Part(
            epoch=self.epoch,
            start=self.start + self._part_first,
            server=server,
            used=used,
            replayed_tokens=self.replayed_tokens,
            output_hash=self.output_hash(count),
            started_ms=self.started_ms,
            ended_ms=now_ms,
            finish=finish,
            commit_root=commit_root,
            claim=claim,
        )

    def all_parts(self, used: Usage, finish: Finish, commit_root: bytes, claim: bytes, now_ms: int) -> list[Part]:
        """The parts of a work that ends now, having used so much in all."""
        # Who leaves before a whole answer is out was shown nothing of the earlier parts either.
        parts = self.parts if used.output_tokens >= self._part_first else []
        server = self.server
        if server is None:
            return parts
        count = max(0, used.output_tokens - self._part_first)
        pays_input = used.input_tokens > 0 and not any(part.used.input_tokens for part in parts)
        last = Part(
            epoch=self.epoch,
            start=self.start + self._part_first,
            server=server,
            used=Usage(used.input_tokens, used.cached_tokens, count) if pays_input else Usage(0, 0, count),
            replayed_tokens=self.replayed_tokens if count else 0,
            output_hash=self.output_hash(count),
            started_ms=self.started_ms,
            ended_ms=now_ms,
            finish=finish,
            commit_root=commit_root,
            claim=claim,
        )
        return [*parts, last]

    def output_hash(self, keep: int) -> bytes:
        """Over the first `keep` ids of the part that is under way."""
        if self._hasher is None or keep < self._hash_count:
            self._hasher, self._hash_count = IdsHash(self.salt), 0
        if keep > self._hash_count:
            first = self._part_first
            self._hasher.update(pack_ids(self._ids[first + self._hash_count : first + keep]))
            self._hash_count = keep
        return self._hasher.digest()

    # ------------------------------------------------------------ for the books

    @property
    def hold_id(self) -> str:
        return hold_id_of(self.work_id, self.hold_epoch) if self.amount and self.journalled else ""

    def to_journal(self) -> Journalled | None:
        """What a row in open_works should say now; None when nothing can have changed it."""
        if self.server is not None:
            assert self.terms is not None
            parts = tuple(self.parts) if self.shown else ()
            count = self.part_owed_count
            return Journalled(
                epoch=self.epoch,
                server=self.server,
                start=self.start + self._part_first,
                started_ms=self.started_ms,
                count=count,
                output_hash=self.output_hash(count),
                journal=Journal(self.terms, parts, not self.input_paid, self.replayed_tokens, self.start),
            )
        if not self.parts or not self.shown:
            return None
        # Between two nodes: what the last one made is as much to be charged as if it were still there.
        assert self.terms is not None
        last = self.parts[-1]
        return Journalled(
            epoch=last.epoch,
            server=last.server,
            start=last.start,
            started_ms=last.started_ms,
            count=last.used.output_tokens,
            output_hash=last.output_hash,
            journal=Journal(
                self.terms, tuple(self.parts[:-1]), last.used.input_tokens > 0, last.replayed_tokens, self.start
            ),
        )

    @property
    def journal_state(self) -> tuple[int, int]:
        """Epoch and count that a row should have: cheap, to see whether it has to be written."""
        if self.server is not None:
            return self.epoch, self.part_owed_count
        if self.parts and self.shown:
            return self.parts[-1].epoch, self.parts[-1].used.output_tokens
        return self.journalled_epoch, self.journalled_count

    def job(self) -> Job:
        return Job(
            *(self.work_id, self.payer, self.model, self.class_id, self.salt, self.prompt_hash),
            *(self.lease_id, self.hold_id, self.journalled, self.start),
        )

    def settlements(self, job: Job, parts: list[Part], costs: list[Charge]) -> list[Settlement]:
        """What these parts of it came to, for the ledger and the receipts."""
        return settlements_of(job, parts, costs, self._kept if self.keeps_ids else None)

    def _kept(self, first: int, count: int) -> tuple[bytes, bytes | None]:
        scores = self.scores(first, count) if self.scores is not None else None
        return pack_ids(self._ids[first : first + count]), scores
