"""Whatever is asked of the ledger in whatever order, the invariants of money hold.

A state machine says the same commands to a ledger and to a model that is too simple to be wrong, several at a time in
one transaction, and compares every answer and every balance. What it holds:

1 transfers and all balances add up to zero · 2 balances are what the entries say · 3 nothing inside is negative ·
4 an id is one transfer with one answer · 5 a pending pays at most what it has and ends once · 6 a charge is at most its
hold · 7 the parts of a charge are the charge · 8 a work is charged once, whoever settles it · 13 a conviction takes at
most what was earned, from its owner alone · 14 saying everything again changes nothing
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pure_ledger import AnyLedger, Clock, PureLedger, StoredLedger

from databases import Database
from gridmill.network import ledger
from gridmill.network.ledger import Command, Done, Extend, Grow, Pend, Post, Refused, Result, Return, Transfer, Void
from gridmill.network.metering import FeePolicy, PriceRow, Usage, charge
from gridmill.wire.messages import Price

USERS, OWNERS, KEYS, WORKS = ("ann", "bob"), ("o1", "o2"), ("", "k1", "k2"), tuple(f"w{n}" for n in range(6))
ROW = PriceRow("row", Price(3, 1, 7), FeePolicy(1234, 1111, 2345))

amounts = st.integers(0, 60)
choices = st.integers(0, 1 << 20)


class Slot:
    """A pending of the model: money in a drawer."""

    def __init__(self, command: Pend, left: int, home: str, key: str) -> None:
        self.source, self.into, self.parent = command.source, command.into, command.parent
        self.until_ms, self.left, self.home, self.key = command.expires_ms, left, home, key
        self.taken, self.gone, self.open = left, 0, True


class Model:
    """The ledger in dictionaries: no tables, no numbers, no batches, the whole command instead of a digest."""

    def __init__(self) -> None:
        self.balances: Counter[str] = Counter()
        self.slots: dict[str, Slot] = {}
        self.budgets: dict[str, int | None] = {}
        self.committed: Counter[str] = Counter()
        self.done: dict[str, tuple[Command, int]] = {}

    def say(self, command: Command, now_ms: int) -> Result:
        if not isinstance(command, Extend) and command.transfer_id in self.done:
            before, amount = self.done[command.transfer_id]
            return Done(amount, repeated=True) if before == command else Refused("conflict")
        result = self._say(command, now_ms)
        if isinstance(result, Done) and not isinstance(command, Extend):
            self.done[command.transfer_id] = (command, result.amount)
        return result

    def _say(self, command: Command, now_ms: int) -> Result:
        if isinstance(command, Transfer):
            short = [a for a, n in command.legs if n < 0 and "external" not in a and self.balances[a] < -n]
            if short:
                return Refused("insufficient", self.balances[short[0]], "balance")
            self.balances.update(dict(command.legs))
            return Done(sum(n for _, n in command.legs if n > 0))
        slot = self.slots.get(command.parent if isinstance(command, Pend) else command.pending_id)
        if slot is None and not (isinstance(command, Pend) and not command.parent):
            return Refused("unknown")
        if slot is not None:
            over = slot.until_ms <= now_ms and isinstance(command, (Pend, Grow, Extend))
            if not slot.open or over:
                return Refused("closed")
        match command:
            case Pend() if slot is None:
                taken = self._take(command, self.balances[command.source], command.key_id)
                if isinstance(taken, int):
                    self.slots[command.transfer_id] = Slot(command, taken, command.source, command.key_id)
                    self._move(command.source, command.into, taken)
            case Pend():
                assert slot is not None
                taken = self._take(command, slot.left, "")
                if isinstance(taken, int):
                    slot.left -= taken
                    self.slots[command.transfer_id] = Slot(command, taken, slot.home, slot.key)
                    self._move(command.source, command.into, taken)
            case Grow():
                assert slot is not None
                taken = self._take(command, self.balances[slot.source], slot.key)
                if isinstance(taken, int):
                    slot.left += taken
                    slot.taken += taken
                    self._move(slot.source, slot.into, taken)
            case Post():
                assert slot is not None
                taken = sum(n for _, n in command.legs)
                if taken > slot.left:
                    return Refused("too_much", slot.left)
                for account, n in command.legs:
                    self._move(slot.into, account, n)
                slot.left -= taken
                slot.gone += taken
                if command.close:
                    self._back(slot, slot.left)
                    slot.open = False
            case Return():
                assert slot is not None
                taken = self._back(slot, min(command.amount, slot.left))
            case Void():
                assert slot is not None
                if command.expired and now_ms < slot.until_ms:
                    return Refused("not_expired")
                taken = self._back(slot, slot.left)
                slot.open = False
            case Extend():
                assert slot is not None
                slot.until_ms = max(slot.until_ms, command.expires_ms)
                return Done(0)
        return Done(taken) if isinstance(taken, int) else taken

    def _take(self, command: Pend | Grow, there: int, key: str) -> int | Refused:
        budget = self.budgets.get(key)
        left = there if budget is None else max(budget - self.committed[key], 0)
        taken = min(command.amount, there, left)
        if taken < (command.amount if command.at_least == -1 else command.at_least):
            return Refused("insufficient", min(there, left), "budget" if left < there else "balance")
        if key:
            self.committed[key] += taken
        return taken

    def _back(self, slot: Slot, amount: int) -> int:
        parent = self.slots.get(slot.parent)
        if parent is not None and parent.open:
            parent.left += amount
            self._move(slot.into, slot.source, amount)
        else:
            self.committed[slot.key] -= amount if slot.key else 0
            self._move(slot.into, slot.home, amount)
        slot.left -= amount
        slot.gone += amount
        return amount

    def _move(self, source: str, into: str, amount: int) -> None:
        self.balances[source] -= amount
        self.balances[into] += amount


class Money(RuleBasedStateMachine):
    make: ClassVar[Any]  # () -> a ledger in which nothing has happened

    def __init__(self) -> None:
        super().__init__()
        self.books: AnyLedger = type(self).make()
        self.model = Model()
        self.waiting: list[tuple[Command, Result]] = []
        self.said: list[Command] = []
        self.settled: dict[str, tuple[str, str, int]] = {}  # work: owner, who paid, the owner's pay
        self.convicted: set[str] = set()
        self.count = 0

    # ------------------------------------------------ saying

    def say(self, command: Command) -> Result:
        expected = self.model.say(command, self.books.clock.seconds * 1000)
        self.waiting.append((command, expected))
        self.said.append(command)
        return expected

    def flush(self) -> None:
        results = self.books.apply([command for command, _ in self.waiting])
        for (command, expected), result in zip(self.waiting, results, strict=True):
            assert result == expected, command
        self.waiting.clear()

    def new_id(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def slot(self, choice: int) -> str:
        return list(self.model.slots)[choice % len(self.model.slots)]

    # ------------------------------------------------ rules

    @initialize()
    def begin(self) -> None:
        for user in USERS:
            self.say(ledger.credit(user, 100, f"credit:{user}"))
            source, into = ledger.user_available(user), ledger.user_hold(user)
            self.say(Pend(f"first:{user}", "lease", source, into, 50, 8000))

    @rule(user=st.sampled_from(USERS), amount=st.integers(1, 100))
    def credit(self, user: str, amount: int) -> None:
        self.say(ledger.credit(user, amount, self.new_id()))

    @rule(amount=st.integers(1, 60))
    def pay_back(self, amount: int) -> None:
        legs = (("user:ann:available", -amount), ("user:bob:available", amount))
        self.say(Transfer(self.new_id(), "gift", legs))

    @rule(user=st.sampled_from(USERS), key=st.sampled_from(KEYS), amount=amounts, least=amounts, life=st.integers(0, 9))
    def lease(self, user: str, key: str, amount: int, least: int, life: int) -> None:
        source, into = ledger.user_available(user), ledger.user_hold(user)
        until = (self.books.clock.seconds + life) * 1000
        least = -1 if least > amount else least
        self.say(Pend(self.new_id(), "lease", source, into, amount, until, least, key_id=key, holder="g"))

    @rule(choice=choices, amount=amounts, life=st.integers(0, 9))
    def carve(self, choice: int, amount: int, life: int) -> None:
        leases = [name for name, slot in self.model.slots.items() if not slot.parent]
        parent = leases[choice % len(leases)]
        until = (self.books.clock.seconds + life) * 1000
        source = self.model.slots[parent].into
        self.say(Pend(self.new_id(), "hold", source, "escrow:request", amount, until, parent=parent))

    @rule(choice=choices, amount=amounts, least=amounts)
    def grow(self, choice: int, amount: int, least: int) -> None:
        leases = [name for name, slot in self.model.slots.items() if not slot.parent]
        self.say(Grow(self.new_id(), leases[choice % len(leases)], amount, -1 if least > amount else least))

    @rule(
        choice=choices,
        work=st.sampled_from(WORKS),
        owner=st.sampled_from(OWNERS),
        tokens=st.integers(0, 4),
        close=st.booleans(),
    )
    def settle(self, choice: int, work: str, owner: str, tokens: int, close: bool) -> None:
        cost = charge(ROW, Usage(2 * tokens, tokens // 2, tokens))
        assert cost.total == cost.node + cost.network + cost.audit + cost.reserve
        name = self.slot(choice)
        result = self.say(ledger.settlement(work, 0, name, cost, owner, close=close))
        if isinstance(result, Done) and not result.repeated:
            assert work not in self.settled, "charged twice"
            self.settled[work] = (owner, self.model.slots[name].home, cost.node)

    @rule(choice=choices, amount=amounts)
    def give_back(self, choice: int, amount: int) -> None:
        self.say(Return(self.new_id(), self.slot(choice), amount))

    @rule(choice=choices, expired=st.booleans())
    def end(self, choice: int, expired: bool) -> None:
        self.say(Void(self.new_id(), self.slot(choice), expired))

    @rule(choice=choices, seconds=st.integers(0, 30))
    def extend(self, choice: int, seconds: int) -> None:
        self.say(Extend(self.slot(choice), seconds * 1000))

    @rule(choice=choices)
    def say_again(self, choice: int) -> None:
        self.say(self.said[choice % len(self.said)])

    @rule(choice=choices, amount=st.integers(1, 60))
    def say_something_else_with_the_same_id(self, choice: int, amount: int) -> None:
        before = list(self.model.done)[choice % len(self.model.done)]
        legs = (("rail:operator:external", -amount), ("user:ann:available", amount))
        assert self.say(Transfer(before, "another", legs)) == Refused("conflict")

    @rule(owner=st.sampled_from(OWNERS), period=st.sampled_from("abcdef"), amount=st.integers(1, 20))
    def release(self, owner: str, period: str, amount: int) -> None:
        self.say(ledger.release(owner, period, amount))

    @rule(seconds=st.integers(1, 5))
    def time_passes(self, seconds: int) -> None:
        self.flush()
        self.books.clock.seconds += seconds

    @rule(key=st.sampled_from(KEYS[1:]), budget=st.none() | st.integers(0, 100))
    def budget(self, key: str, budget: int | None) -> None:
        self.flush()
        self.books.set_budget(key, budget)
        self.model.budgets[key] = budget

    @precondition(lambda self: isinstance(self.books, StoredLedger))
    @rule(owner=st.sampled_from(OWNERS), works=st.sets(st.sampled_from(WORKS), min_size=1), bounty=amounts)
    def convict(self, owner: str, works: set[str], bounty: int) -> None:
        self.flush()
        assert isinstance(self.books, StoredLedger)
        held, available = ledger.provider_held(owner), ledger.provider_available(owner)
        before = Counter(self.books.balances())
        parts = [(work, 0) for work in sorted(works)]
        found = self.books.run(lambda transaction: ledger.convict(transaction, owner, parts, bounty))
        after = Counter(self.books.balances())
        guilty = {w for w in works if w in self.settled and self.settled[w][0] == owner and self.settled[w][2]}
        fresh = guilty - self.convicted
        self.convicted |= fresh
        assert {work for work, _ in found.already} == guilty - fresh
        assert found.clawed == min(sum(self.settled[work][2] for work in fresh), before[held] + before[available])
        assert before[held] - after[held] == min(found.clawed, before[held])
        assert before[held] + before[available] - after[held] - after[available] == found.clawed
        assert found.bounty == min(bounty, found.clawed) == after["audit:pool"] - before["audit:pool"]
        for user in map(ledger.user_available, USERS):
            paid = sum(self.settled[work][2] for work in fresh if self.settled[work][1] == user)
            assert 0 <= after[user] - before[user] <= paid
        touched = {held, available, "audit:pool", *map(ledger.user_available, USERS)}
        assert all(before[name] == after[name] for name in before if name not in touched)
        self.model.balances.update({name: after[name] - before[name] for name in touched})

    @rule()
    def everything_is_said_again(self) -> None:
        self.flush()
        done = list(self.model.done.values())
        results = self.books.apply([command for command, _ in done])
        assert results == [Done(amount, repeated=True) for _, amount in done]

    @rule()
    def commit(self) -> None:
        self.flush()

    # ------------------------------------------------ what always holds

    @invariant()
    def the_ledger_is_sound(self) -> None:
        for slot in self.model.slots.values():
            assert slot.left >= 0 and (slot.open or not slot.left)
        if self.waiting:
            return
        balances = self.books.balances()
        assert {name: n for name, n in balances.items() if n} == {n: v for n, v in self.model.balances.items() if v}
        assert sum(balances.values()) == 0
        assert all(n >= 0 or name == "rail:operator:external" for name, n in balances.items())
        for key, committed in self.model.committed.items():
            assert not key or self.books.committed(key) == committed
        assert self.books.check() == []

    def teardown(self) -> None:
        self.flush()
        self.the_ledger_is_sound()
        for name, slot in self.model.slots.items():
            pending = self.books.pending(name)
            assert (pending.state == "open", pending.remaining, pending.amount) == (slot.open, slot.left, slot.taken)


def run(make: Any, examples: int, steps: int) -> None:
    machine = type("Money", (Money,), {"make": staticmethod(make)})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def empty(database: Database) -> Iterator[Any]:
    """Makes ledgers in which nothing has happened, out of one database."""
    with asyncio.Runner() as runner:
        clock = Clock()
        store = database.store(wall_clock=clock)
        runner.run(store.open([ledger.MIGRATION]))

        def make() -> StoredLedger:
            clock.seconds = 0
            books = StoredLedger(store, clock, runner)

            async def wipe(transaction: Any) -> None:
                for table in ("ledger_accounts", "transfers", "entries", "pendings", "key_budgets"):
                    await transaction.do(f"DELETE FROM {table}")
                await transaction.do("UPDATE ledger_counters SET value = 0")

            books.run(wipe)
            return books

        yield make
        runner.run(store.close())


def test_money_is_sound_in_the_book_alone() -> None:
    run(lambda: PureLedger(Clock()), 200, 40)


def test_money_is_sound_in_a_database(empty: Any, database: Database) -> None:
    run(empty, *((15, 20) if database.shared else (50, 40)))
