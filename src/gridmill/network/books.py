"""Holding and settling at memory speed: leased slices of balances, a journal of running works, settlements in batches.

A request never waits for the database when its account's slice has room. What makes that safe:

1. A slice is a lease in the ledger: money taken out of the user's balance into a pending that only this gateway spends.
   Whatever is held in memory is therefore held in the database, and two gateways can never spend the same nanocredit.
2. Each lease has a fence, a number that is never used again, and a life. A gateway spends from one for half its life by
   its own monotonic clock, counted from before it asked; renewing asks the ledger, which refuses once the lease has
   ended. A gateway that was stopped past its lease therefore spends nothing that it no longer has.
3. All that touches a lease goes through one queue in order, and leaves in one transaction at a time.
4. A work that lives longer than a tick is journalled: its hold becomes a pending of its own, beside a row that says who
   serves it and how many ids were delivered. After a crash that count is charged. Whoever finds the row settles it;
   a gateway that comes late finds none and settles nothing.

When a slice is too small, more is leased; when the balance is too small, other gateways give back what they do not use,
and only then is anybody told 402.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from gridmill.network import ledger, receipts
from gridmill.network.ledger import Command, Done, Extend, Grow, Pend, Refused, Result, Return, Void
from gridmill.network.metering import Charge, Usage
from gridmill.network.orders import Order
from gridmill.network.settlement import (
    COLUMNS,
    Batch,
    Finish,
    Gateway,
    GatewayId,
    Part,
    Payer,
    Server,
    Settlement,
    Written,
    costs_of,
    encode_journal,
    encode_row,
    from_row,
    settle,
)
from gridmill.network.store import Action, Store, StoreUnusable, Transaction
from gridmill.wire.sampling import pack_ids

__all__ = ["Books", "GatewayId", "Insufficient", "Order", "Payer", "Unavailable"]

log = logging.getLogger("gridmill.network.books")

T = TypeVar("T")

TICK_SECONDS = 0.04  # so that settlements and delivered counts are on disk within 50 ms; larger batches cost less each
BATCH_SOON = 256  # that many settlements do not wait for the tick
BATCH_MAX = 4096  # beyond this a batch would delay whoever waits for a lease
QUEUE_MAX = 50_000  # settlements that wait for a database that does not answer; then nothing new is admitted
LEASE_SECONDS = 20.0  # a gateway that dies leaves its users without this money for so long
IDLE_SECONDS = 60.0  # an account that asks nothing for so long gets its slice back
SLICE_WORKS_MIN, SLICE_WORKS_MAX = 8, 1024  # a slice is for so many works like the one that needs it
REFILL_ATTEMPTS = 5  # a slice can be asked back while more is being leased; then it starts again
RECLAIM_SECONDS = 3.0  # what another gateway may take to give back what it does not use
RETRY_SECONDS_MAX = 5.0
CONTRIBUTORS_MAX = 100_000  # accounts; who is forgotten begins anew, at nothing
RECOVER_WORKS = 200  # works settled in one transaction after a crash


class Insufficient(Exception):
    """The balance, or the key's budget, does not cover a request. Amounts in nanocredits."""

    def __init__(self, needed: int, available: int, limited_by: str) -> None:
        super().__init__(f"{needed} needed, {available} available")
        self.needed = needed
        self.available = available
        self.limited_by = limited_by

    @property
    def missing(self) -> int:
        return self.needed - self.available


class Unavailable(Exception):
    """The books cannot say now whether there is money. The message is for the caller; try again after so long."""

    def __init__(self, detail: str, retry_after_seconds: float) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class _Purse:
    """This gateway's slice of one account, or of one key's budget. `free` is what no work holds."""

    def __init__(self, payer: Payer) -> None:
        self.payer = payer
        self.source = ledger.user_available(payer.account_id)
        self.into = ledger.user_hold(payer.account_id)
        self.key_id = payer.key_id if payer.has_budget else ""
        self.lease_id = ""
        self.free = 0
        self.live = 0  # orders that hold something
        self.waiting = 0  # requests for which more is being leased: until then the purse must not be forgotten
        self.usable_until = 0.0
        self.used_at = 0.0
        self.works_per_slice = SLICE_WORKS_MIN
        self.growing = False
        self.one_refill = asyncio.Lock()
        self.dry_since = -1.0  # when the last attempt began that found too little
        self.limited_by = "balance"  # by what
        self.grow_after = 0.0

    def take(self, amount: int, now: float) -> bool:
        if amount > self.free or now >= self.usable_until:
            return False
        self.free -= amount
        self.used_at = now
        return True


class _Asked(msgspec.Struct, frozen=True):
    """A command whose result somebody waits for, or that does not matter (`done` is None)."""

    command: Command
    done: Callable[[Result], None] | None = None


class Books:
    """One gateway's money. `clock` is monotonic seconds (the kind that counts sleep), `wall_ms` Unix milliseconds."""

    def __init__(
        self,
        store: Store,
        *,
        holder: GatewayId,
        network_key: bytes,
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
        entropy: Callable[[int], bytes],
        period_seconds: int = 86_400,
        lease_seconds: float = LEASE_SECONDS,
        send_receipts: Callable[[Sequence[receipts.Unsigned]], None] = lambda unsigned: None,
    ) -> None:
        self._store = store
        self._holder = holder
        self._clock = clock
        self._wall_ms = wall_ms
        self._entropy = entropy
        self._lease_seconds = lease_seconds
        self._gateway = Gateway(holder, network_key, period_seconds, lease_seconds)
        self.send_receipts = send_receipts
        self._purses: dict[tuple[str, str], _Purse] = {}
        self._live: dict[str, Order] = {}
        self._asked: list[_Asked] = []
        self._settlements: list[Callable[[], Sequence[Settlement]]] = []
        self._contributions: dict[str, int] = {}  # fees that accounts paid here, less what the reserve did for them
        self._reserve_nanocredits = 0  # of the failover reserve, as last read, less what was promised since
        self._announcements: list[tuple[str, str]] = []
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._reclaims: dict[str, tuple[set[str], asyncio.Event]] = {}
        self.lost_nanocredits = 0  # what users were not charged because their lease had ended first

    # ------------------------------------------------------------ for the gateway: before and after a work

    async def admit(self, payer: Payer, want: int, least: int) -> int:
        """Holds `want` nanocredits, or what there is of it down to `least`, and returns how much.

        Waits for the database only when the slice in memory is too small. Raises Insufficient or Unavailable; then
        nothing is held. Pass the amount on to `order`, or give it back with `give_back`.
        """
        if len(self._settlements) + len(self._asked) > QUEUE_MAX:
            raise Unavailable("the ledger's database does not answer: try again shortly", RETRY_SECONDS_MAX)
        if want == 0 or self.admit_at_once(payer, want):
            return want
        return await self._refill_and_take(self._purse(payer), want, least, arrived=self._clock())

    def admit_at_once(self, payer: Payer, want: int) -> bool:
        """Holds `want` when the slice in memory has it; otherwise nothing is held, and `admit` may get more."""
        purse = self._purse(payer)
        if len(self._settlements) > QUEUE_MAX or not purse.take(want, self._clock()):
            return False
        if purse.free < want * SLICE_WORKS_MIN // 2:
            self._grow_ahead(purse, want)
        return True

    def give_back(self, payer: Payer, amount: int) -> None:
        """What `admit` held and no order took."""
        if amount:
            self._purse(payer).free += amount

    def order(self, payer: Payer, work_id: str, class_id: str, model: str, input_tokens: int, amount: int) -> Order:
        """The work that `amount` of what was admitted is for. It ends with `settle` or `release`."""
        purse = self._purse(payer) if amount else None
        if purse is not None:
            purse.live += 1
        return Order(payer, work_id, class_id, model, input_tokens, purse, amount)

    def serve(
        self, order: Order, server: Server, prompt: bytes, salt: bytes, cached_tokens: int, replayed_tokens: int = 0
    ) -> None:
        """A node has taken the work, or what is left of it: that is journalled with the next tick."""
        order.begin_part(server, prompt, salt, cached_tokens, replayed_tokens, self._wall_ms())
        self._live[order.work_id] = order
        self._flush_soon()

    def can_promise(self, order: Order, amount: int) -> bool:
        """Whether there is so much in the reserve, and this account's fees have brought in as much: whoever is user and
        nodes at once gets out of the reserve what it paid into fees, and no more."""
        return amount <= min(self._reserve_nanocredits, self._contributions.get(order.payer.account_id, 0))

    def _contributed(self, account_id: str, fees: int) -> None:
        if account_id not in self._contributions and len(self._contributions) >= CONTRIBUTORS_MAX:
            del self._contributions[next(iter(self._contributions))]
        self._contributions[account_id] = self._contributions.get(account_id, 0) + fees

    def promise(self, order: Order, amount: int) -> bool:
        """Whether the failover reserve adds so much to what this order's next node earns. It never goes below zero."""
        if not self.can_promise(order, amount):
            return False
        self._reserve_nanocredits -= amount
        self._contributed(order.payer.account_id, -amount)
        order.promised_nanocredits += amount
        return True

    def unserve(self, order: Order, *, forfeits: bool = True) -> None:
        """The node has left: what it delivered stays its own, and another may go on with what is still held."""
        if not order.settled and order.server is not None:
            order.end_part(forfeits=forfeits, now_ms=self._wall_ms())

    def release(self, order: Order) -> None:
        """Nobody goes on with it. What was not delivered is free again. Harmless when it is or will be settled."""
        if order.settled or order.deferred is not None:
            return
        if order.parts or order.journalled:
            # A row says that somebody serves it: only a settlement takes that away.
            count = order.owed_count
            self.settle(order, Usage(order.input_tokens if order.input_paid and count else 0, 0, count), "failed")
            return
        order.settled = True
        self._live.pop(order.work_id, None)
        self._free(order, order.amount, 0)

    def settle(self, order: Order, used: Usage, finish: Finish, *, commit_root: bytes = b"", claim: bytes = b"") -> int:
        """Ends an order: charges what was used by all its parts, returns the rest. Synchronous, so that a cancelled
        request cannot be cancelled half-way through its own bill. Returns the charge; the ledger has it within two
        ticks."""
        if order.settled:
            return 0
        order.settled = True
        self._live.pop(order.work_id, None)
        parts = order.all_parts(used, finish, commit_root, claim, self._wall_ms()) if _anything(used) else []
        if not parts and order.journalled:
            parts = [_nothing(order, finish, self._wall_ms())]
        assert order.last_server is not None, "a work that no node served is released"
        costs = costs_of(order.terms or order.last_server.row, parts)
        total = order.charge_nanocredits = sum([cost.total for cost in costs])
        assert total <= order.amount, "a work used more than was held for it"
        if parts:
            self._queue_settlements(order, parts, costs)
        subsidy = sum([cost.subsidy for cost in costs])
        self._reserve_nanocredits += order.promised_nanocredits - subsidy
        if total or order.promised_nanocredits:
            fees = total - sum([cost.node for cost in costs])
            self._contributed(order.payer.account_id, fees + order.promised_nanocredits - subsidy)
        self._free(order, order.amount, total)
        self._flush_soon()
        return total

    def _queue_settlements(self, order: Order, parts: list[Part], costs: list[Charge]) -> None:
        """The entries themselves are made with their batch: nobody's answer waits for them."""
        make = functools.partial(order.settlements, order.job(), parts, costs)
        if order.keeps_ids:
            made = make()  # its scores are the gateway's, which goes on
            self._settlements.append(lambda: made)
        else:
            self._settlements.append(make)

    @property
    def held_nanocredits(self) -> int:
        return sum(order.amount for order in self._live.values())

    # ------------------------------------------------------------ slices

    def _purse(self, payer: Payer) -> _Purse:
        key = (payer.account_id, payer.key_id if payer.has_budget else "")
        purse = self._purses.get(key)
        if purse is None:
            purse = self._purses[key] = _Purse(payer)
        return purse

    def _free(self, order: Order, amount: int, cost: int) -> None:
        if order.charged is not None:
            order.charged(amount, cost)
        purse = order.purse
        if purse is None:
            return
        purse.live -= 1
        if order.lease_id == purse.lease_id:
            purse.free += amount - cost  # else that lease has ended, and its money with it

    async def _refill_and_take(self, purse: _Purse, want: int, least: int, *, arrived: float) -> int:
        purse.waiting += 1
        try:
            return await self._refill_in_turn(purse, want, least, arrived=arrived)
        finally:
            purse.waiting -= 1

    async def _refill_in_turn(self, purse: _Purse, want: int, least: int, *, arrived: float) -> int:
        async with purse.one_refill:
            silent = False
            for attempt in range(REFILL_ATTEMPTS):
                now = self._clock()
                if purse.take(want, now):
                    return want
                if purse.lease_id and now >= purse.usable_until:
                    await self._renew(purse)
                    continue
                if purse.dry_since >= arrived:
                    break  # An attempt that began after this request came has already asked everybody.
                refused = await self._lease(purse, want * purse.works_per_slice, want - purse.free)
                if refused is None:
                    purse.works_per_slice = min(purse.works_per_slice * 2, SLICE_WORKS_MAX)
                    continue
                purse.limited_by = refused.limited_by or "balance"
                if attempt == 0:
                    others, silent = await self._take_back(purse)
                    if others:
                        continue
                if refused.available > 0 and await self._lease(purse, refused.available, 1) is None:
                    continue  # All that there was; whether it is enough shows at the next look.
                purse.dry_since = now
            amount = min(want, purse.free)
            if amount >= least and purse.take(amount, self._clock()):
                return amount
            if silent:
                raise Unavailable(
                    "another gateway holds part of this balance and does not answer: its share comes back shortly",
                    self._lease_seconds / 2,
                )
            raise Insufficient(least, purse.free, purse.limited_by)

    async def _lease(self, purse: _Purse, amount: int, at_least: int) -> Refused | None:
        """Makes the slice larger by at least `at_least`. None when it did. Raises Unavailable."""
        if at_least > ledger.COMMAND_NANOCREDITS_MAX:
            return Refused("insufficient", 0, "balance")  # more than any command may move
        amount = min(max(amount, at_least), ledger.COMMAND_NANOCREDITS_MAX)
        asked = self._clock()
        if purse.lease_id:
            result = await self._ask(Grow(self._new_id("grow"), purse.lease_id, amount, at_least))
            if isinstance(result, Refused) and result.reason in ("closed", "unknown"):
                self._forget(purse)
                return await self._lease(purse, amount, at_least)
        else:
            fence, now_ms = await self._fence(purse.source)
            lease_id = f"lease:{purse.payer.account_id}:{fence}"
            expires_ms = now_ms + int(self._lease_seconds * 1000)
            result = await self._ask(
                Pend(
                    lease_id,
                    "lease",
                    purse.source,
                    purse.into,
                    amount,
                    expires_ms,
                    at_least=at_least,
                    key_id=purse.key_id,
                    holder=self._holder,
                )
            )
            if isinstance(result, Done):
                purse.lease_id = lease_id
                purse.usable_until = asked + self._lease_seconds / 2
                purse.used_at = asked
        if isinstance(result, Done):
            purse.free += result.amount
            return None
        assert result.reason == "insufficient", f"leasing from {purse.source}: {result}"
        return result

    def _grow_ahead(self, purse: _Purse, want: int) -> None:
        """Asks for more before it is needed, so that nobody waits for it."""
        if purse.growing or not purse.lease_id or self._clock() < purse.grow_after:
            return
        purse.growing = True
        lease_id = purse.lease_id

        def grown(result: Result) -> None:
            purse.growing = False
            if isinstance(result, Done) and purse.lease_id == lease_id:
                purse.free += result.amount
                purse.works_per_slice = min(purse.works_per_slice * 2, SLICE_WORKS_MAX)
            else:
                purse.grow_after = self._clock() + 1.0  # not again at once

        amount = min(want * purse.works_per_slice, ledger.COMMAND_NANOCREDITS_MAX)
        self._asked.append(_Asked(Grow(self._new_id("grow"), lease_id, amount, 1), grown))
        self._flush_soon()

    async def _renew(self, purse: _Purse) -> None:
        """Afterwards the lease lives on from now, or is forgotten because it has ended."""
        asked = self._clock()
        lease_id = purse.lease_id
        expires_ms = await self._now_ms() + int(self._lease_seconds * 1000)
        self._renewed(purse, lease_id, asked, await self._ask(Extend(lease_id, expires_ms)))

    def _renewed(self, purse: _Purse, lease_id: str, asked: float, result: Result) -> None:
        if purse.lease_id != lease_id:
            return
        if isinstance(result, Done):
            purse.usable_until = asked + self._lease_seconds / 2
        else:
            self._forget(purse)

    def _forget(self, purse: _Purse) -> None:
        """The lease has ended without us: what was free is with its owner again."""
        if purse.lease_id:
            log.warning("a lease ended before it was given back", extra={"lease": purse.lease_id})
        purse.lease_id = ""
        purse.free = 0
        purse.usable_until = 0.0

    # ------------------------------------------------------------ other gateways

    async def _take_back(self, purse: _Purse) -> tuple[bool, bool]:
        """Asks all other gateways for what they do not use of this account.

        Returns whether any had something, and whether one that may still hold money stayed silent.
        """
        source = purse.source
        gave = self._give_up_unused(purse.payer.account_id, keep=purse)

        async def others(transaction: Transaction) -> tuple[list[tuple[str, str]], int]:
            rows = await transaction.all(
                "SELECT pending_id, holder, expires_ms FROM pendings"
                " WHERE source = ? AND kind = 'lease' AND state = 'open' AND holder <> ? AND remaining > 0",
                source,
                self._holder,
            )
            now_ms = await transaction.now_ms()
            over = [(row[0], row[1]) for row in rows if row[2] <= now_ms]
            for lease_id, _ in over:
                await ledger.apply(transaction, [Void(f"{lease_id}:expired", lease_id, expired=True)])
            return [(row[0], row[1]) for row in rows if row[2] > now_ms], len(over)

        alive, ended = await self._run(others)
        if not alive:
            return gave or ended > 0, False
        call = self._new_id("reclaim")
        waiting = {holder for _, holder in alive}
        answered = asyncio.Event()
        self._reclaims[call] = (waiting, answered)
        try:
            self._announcements.append(("reclaim", json.dumps([call, self._holder, purse.payer.account_id])))
            self._wake.set()
            async with asyncio.timeout(RECLAIM_SECONDS):
                await answered.wait()
        except TimeoutError:
            return True, True
        finally:
            del self._reclaims[call]
        return True, False

    def heard(self, topic: str, subject: str) -> None:
        """What the store announces."""
        if topic == "reclaim":
            call, holder, account_id = json.loads(subject)
            if holder != self._holder:
                self._give_up_unused(account_id)
                self._announcements.append(("reclaimed", json.dumps([call, self._holder])))
                self._wake.set()
        elif topic == "reclaimed":
            call, holder = json.loads(subject)
            if call in self._reclaims:
                waiting, answered = self._reclaims[call]
                waiting.discard(holder)
                if not waiting:
                    answered.set()

    def _give_up_unused(self, account_id: str, keep: _Purse | None = None) -> bool:
        """All that no work holds goes back, in the same transaction as the answer. Whether there was any."""
        gave = False
        for (owner, _), purse in self._purses.items():
            if owner == account_id and purse.lease_id and purse is not keep:
                purse.works_per_slice = SLICE_WORKS_MIN
                if purse.free > 0:
                    self._asked.append(_Asked(Return(self._new_id("return"), purse.lease_id, purse.free)))
                    purse.free = 0
                    gave = True
        return gave

    # ------------------------------------------------------------ the queue and its transactions

    def _flush_soon(self) -> None:
        if len(self._asked) + len(self._settlements) >= BATCH_SOON:
            self._wake.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._wake.set()

    async def _ask(self, command: Command) -> Result:
        """Runs a command with the next batch, which starts at once. Raises Unavailable."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def done(result: Result) -> None:
            if not answer.done():
                answer.set_result(result)

        self._asked.append(_Asked(command, done))
        self._wake.set()
        try:
            async with asyncio.timeout(RETRY_SECONDS_MAX):
                return await answer
        except TimeoutError:
            raise Unavailable("the ledger's database does not answer: try again shortly", RETRY_SECONDS_MAX) from None

    async def run(self) -> None:
        """Writes what is queued, one transaction at a time, until cancelled. A line in the program's task group."""
        pause = 0.1
        while True:
            await self._wake.wait()
            self._wake.clear()
            collected = self._collect()
            if collected is None:
                if self._live:
                    self._flush_soon()  # what they are given shows at the next tick
                continue
            batch, asked = collected
            while True:
                try:
                    written = await self._store.run(batch.write)
                except StoreUnusable as problem:
                    # The same commands with the same ids again: whatever was kept is not done twice.
                    log.error("the books cannot be written; trying again", extra={"reason": str(problem)})
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, RETRY_SECONDS_MAX)
                else:
                    pause = 0.1
                    break
            self._written(asked, written)
            if self._asked or self._settlements or self._announcements:
                if len(self._asked) + len(self._settlements) >= BATCH_SOON or self._announcements:
                    self._wake.set()
                else:
                    self._flush_soon()
            elif self._live:
                self._flush_soon()

    def _collect(self) -> tuple[Batch, list[_Asked]] | None:
        """Takes what is queued, and what the journal needs to know of running works."""
        settlements, self._settlements = self._settlements[:BATCH_MAX], self._settlements[BATCH_MAX:]
        asked: list[_Asked] = []
        announcements: list[tuple[str, str]] = []
        if not self._settlements:
            # What a settlement returns to a lease may be in a command that was queued after it.
            asked, self._asked = self._asked, []
            announcements, self._announcements = self._announcements, []
        opened: list[Order] = []
        counted: list[tuple[int, bytes, bytes | None, str]] = []
        moved: list[tuple[Any, ...]] = []
        for order in self._live.values():
            epoch, count = order.journal_state
            if not order.journalled:
                # So may what a new hold is taken from.
                if order.server is not None and not self._settlements and len(opened) < BATCH_MAX:
                    order.journalled = True
                    order.hold_epoch = order.journalled_epoch = epoch
                    order.journalled_count = count
                    opened.append(order)
            elif epoch != order.journalled_epoch:
                order.journalled_epoch, order.journalled_count = epoch, count
                moved.append(self._moved_row(order))
            elif count != order.journalled_count:
                order.journalled_count = count
                now = order.to_journal()
                assert now is not None
                kept = pack_ids(order.ids()) if order.keeps_ids else None
                counted.append((count, now.output_hash, kept, order.work_id))
        if not (asked or settlements or announcements or opened or counted or moved):
            return None
        rows = [self._row(order) for order in opened]
        holds = [(order.amount, order.lease_id) for order in opened]
        commands = [each.command for each in asked]
        batch = Batch(
            *(self._gateway, self._new_id("batch"), commands, settlements, rows, holds, counted, moved, announcements)
        )
        return batch, asked

    def _row(self, order: Order) -> tuple[Any, ...]:
        now = order.to_journal()
        assert now is not None
        server = now.server
        return (
            *(order.work_id, now.epoch, self._holder, order.hold_id),
            *(order.payer.account_id, order.payer.key_id, order.model),
            *(server.node_id, server.node_key, server.owner_id, order.class_id, encode_row(server.row)),
            *(order.input_tokens, order.cached_tokens, now.count),
            *(order.prompt_hash, now.output_hash, order.salt, now.start, now.started_ms, 0),
            pack_ids(order.ids()) if order.keeps_ids else None,
            encode_journal(now.journal),
        )

    def _moved_row(self, order: Order) -> tuple[Any, ...]:
        """In the order of settlement.MOVED_COLUMNS."""
        now = order.to_journal()
        assert now is not None
        server = now.server
        return (
            *(now.epoch, server.node_id, server.node_key, server.owner_id, encode_row(server.row)),
            *(order.cached_tokens, now.count, now.output_hash, now.start, now.started_ms),
            pack_ids(order.ids()) if order.keeps_ids else None,
            encode_journal(now.journal),
            order.work_id,
        )

    def _written(self, commands: Sequence[_Asked], written: Written) -> None:
        for asked, result in zip(commands, written.results, strict=True):
            if asked.done is not None:
                asked.done(result)
        for work_id in written.unbacked:
            # The lease ended before this work was journalled: it goes on, at the network's cost.
            log.warning("a work runs without a hold", extra={"work": work_id})
        self.lost_nanocredits += written.lost_nanocredits
        if written.unsigned:
            self.send_receipts(written.unsigned)

    async def flush(self) -> None:
        """Returns when all that was settled before is in the ledger: what is on its way there at this moment, too."""
        await self._ask_nothing()

    async def _ask_nothing(self) -> None:
        # An Extend of nothing is refused by the ledger, after everything before it was written.
        await self._ask(Extend("", 0))

    # ------------------------------------------------------------ keeping leases, and cleaning up after the dead

    async def keep(self) -> None:
        """Renews what is in use, gives back what is idle, ends what other gateways left. Until cancelled."""
        while True:
            await asyncio.sleep(self._lease_seconds / 4)
            try:
                await self.keep_once()
            except (StoreUnusable, Unavailable) as problem:
                log.warning("leases could not be renewed", extra={"reason": str(problem)})

    async def keep_once(self) -> None:
        """One round of `keep`. Raises StoreUnusable or Unavailable."""
        await self._read_reserve()
        await self._renew_all()
        await self._clean_up()

    async def _renew_all(self) -> None:
        asked = self._clock()
        expires_ms = await self._now_ms() + int(self._lease_seconds * 1000)
        for key, purse in list(self._purses.items()):
            used = purse.live or purse.waiting or (purse.lease_id and asked - purse.used_at <= IDLE_SECONDS)
            if not used:
                del self._purses[key]
                if purse.lease_id:
                    self._asked.append(_Asked(Void(f"{purse.lease_id}:idle", purse.lease_id)))
            elif purse.lease_id:
                renewed = functools.partial(self._renewed, purse, purse.lease_id, asked)
                self._asked.append(_Asked(Extend(purse.lease_id, expires_ms), renewed))
        journalled = [order for order in self._live.values() if order.journalled]
        for order in journalled:
            if order.amount:
                self._asked.append(_Asked(Extend(order.hold_id, expires_ms)))
        self._wake.set()
        work_ids = sorted(order.work_id for order in journalled)

        async def extend(transaction: Transaction) -> None:
            await transaction.do_many(
                "UPDATE open_works SET expires_ms = ? WHERE work_id = ? AND holder = ?",
                [(expires_ms, work_id, self._holder) for work_id in work_ids],
            )

        if work_ids:
            await self._store.run(extend)

    async def _read_reserve(self) -> None:
        """What other gateways and settlements made of the failover reserve. Promises that are open still count."""

        async def balance(transaction: Transaction) -> int:
            row = await transaction.one("SELECT balance FROM ledger_accounts WHERE account = 'failover:reserve'")
            return int(row[0]) if row is not None else 0

        found = await self._store.run(balance)
        self._reserve_nanocredits = found - sum([order.promised_nanocredits for order in self._live.values()])

    async def _clean_up(self) -> None:
        """What a gateway that is gone has left, once its time is over."""

        async def abandoned(transaction: Transaction) -> list[str]:
            now_ms = await transaction.now_ms()
            rows = await transaction.all(
                "SELECT work_id FROM open_works WHERE expires_ms < ? AND holder <> ? ORDER BY work_id LIMIT ?",
                now_ms,
                self._holder,
                RECOVER_WORKS,
            )
            return [row[0] for row in rows]

        while work_ids := await self._store.run(abandoned):
            await self._settle_journalled(work_ids, overdue=True)

        async def expire(transaction: Transaction) -> int:
            # Leases only: a hold ends with the work whose row in the journal it belongs to.
            rows = await transaction.all(
                "SELECT pending_id FROM pendings WHERE state = 'open' AND kind = 'lease' AND expires_ms < ?"
                " ORDER BY pending_id LIMIT ?",
                await transaction.now_ms(),
                RECOVER_WORKS,
            )
            voids: list[Command] = [Void(f"{row[0]}:expired", row[0], expired=True) for row in rows]
            if voids:
                await ledger.apply(transaction, voids)
            return len(voids)

        while await self._store.run(expire) == RECOVER_WORKS:
            pass

    async def recover(self) -> int:
        """Before anything is admitted: settles what this gateway's last life left, at the last journalled count.

        Returns how many works that were.
        """

        async def own(transaction: Transaction) -> list[str]:
            rows = await transaction.all(
                "SELECT work_id FROM open_works WHERE holder = ? ORDER BY work_id LIMIT ?", self._holder, RECOVER_WORKS
            )
            return [row[0] for row in rows]

        count = 0
        while work_ids := await self._store.run(own):
            count += len(work_ids)
            await self._settle_journalled(work_ids)

        async def end_leases(transaction: Transaction) -> None:
            rows = await transaction.all(
                "SELECT pending_id FROM pendings WHERE holder = ? AND state = 'open' AND kind = 'lease'"
                " ORDER BY pending_id",
                self._holder,
            )
            await ledger.apply(transaction, [Void(f"{row[0]}:restart", row[0]) for row in rows])

        await self._store.run(end_leases)
        await self._read_reserve()
        if count:
            log.warning("works of an earlier run were settled at their last journalled count", extra={"works": count})
        return count

    async def _settle_journalled(self, work_ids: Sequence[str], *, overdue: bool = False) -> None:
        """Works whose gateway is gone: what it had journalled is what was delivered.

        `overdue`: only those whose time is over still; their gateway may just have come back.
        """
        ended_ms = self._wall_ms()

        async def settle_them(transaction: Transaction) -> None:
            rows = await transaction.among(
                f"SELECT {', '.join(COLUMNS)} FROM open_works WHERE work_id IN (??)", sorted(work_ids), lock=True
            )
            journal = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
            if overdue:
                now_ms = await transaction.now_ms()
                journal = [row for row in journal if row["expires_ms"] < now_ms]
            found = [settlement for row in journal for settlement in from_row(row, ended_ms)]
            await settle(transaction, self._gateway.network_key, self._gateway.period_seconds, found)
            # The node's link may be at any gateway, which sends it what it has not countersigned.
            for node_id in sorted({settlement.server.node_id for settlement in found}):
                await transaction.announce("receipts", node_id)

        await self._store.run(settle_them)

    async def close(self) -> None:
        """After the last work: writes everything and gives all slices back. `run` must still be running."""
        for order in list(self._live.values()):
            if order.deferred is not None:
                order.deferred()
            else:
                self.release(order)
        try:
            for purse in self._purses.values():
                if purse.lease_id:
                    self._asked.append(_Asked(Void(f"{purse.lease_id}:closed", purse.lease_id)))
            await self._ask_nothing()
            await self.flush()
        except Unavailable:
            log.error("the books could not be closed in time; the next start settles what is left")

    # ------------------------------------------------------------ small things

    async def _fence(self, source: str) -> tuple[int, int]:
        """A number that no lease of this account ever had, and the time."""

        async def advance(transaction: Transaction) -> tuple[int, int]:
            row = await transaction.one(
                "INSERT INTO lease_fences (source, fence) VALUES (?, 1)"
                " ON CONFLICT (source) DO UPDATE SET fence = lease_fences.fence + 1 RETURNING fence",
                source,
            )
            assert row is not None
            return int(row[0]), await transaction.now_ms()

        return await self._run(advance)

    async def _now_ms(self) -> int:
        async def ask(transaction: Transaction) -> int:
            return await transaction.now_ms()

        return await self._run(ask)

    async def _run(self, action: Action[T]) -> T:
        try:
            async with asyncio.timeout(RETRY_SECONDS_MAX):
                return await self._store.run(action)
        except (StoreUnusable, TimeoutError):
            raise Unavailable("the ledger's database does not answer: try again shortly", RETRY_SECONDS_MAX) from None

    def _new_id(self, kind: str) -> str:
        return f"{kind}:{self._entropy(12).hex()}"


def _anything(used: Usage) -> bool:
    return used.input_tokens > 0 or used.output_tokens > 0


def _nothing(order: Order, finish: Finish, now_ms: int) -> Part:
    """For a work that nobody owes anything for, whose row in the journal has to go all the same."""
    assert order.last_server is not None
    return Part(order.epoch, order.start, order.last_server, Usage(), 0, bytes(32), order.started_ms, now_ms, finish)
