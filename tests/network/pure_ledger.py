"""Three ledgers for tests that do the same to each: the Book alone, and a database of either kind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from gridmill.network import ledger
from gridmill.network.ledger import Command, PendingRow, Result
from gridmill.network.store import Action, Store


class Clock:
    """Seconds, as a store's `wall_clock`."""

    def __init__(self, seconds: int = 0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


class AnyLedger(Protocol):
    clock: Clock

    def apply(self, commands: Sequence[Command]) -> list[Result]: ...

    def balances(self) -> dict[str, int]: ...

    def pending(self, pending_id: str) -> PendingRow: ...

    def set_budget(self, key_id: str, budget: int | None) -> None: ...

    def committed(self, key_id: str) -> int: ...

    def check(self) -> list[str]: ...


class PureLedger:
    """A Book that is kept, with the rows that `apply` would have found or made."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.book = ledger.Book()

    def apply(self, commands: Sequence[Command]) -> list[Result]:
        results = []
        for command in commands:
            ledger.check_form(command)
            for account in ledger.accounts_of([command], self.book.pendings):
                number = len(self.book.accounts) + 1
                self.book.accounts.setdefault(
                    account, ledger.AccountRow(account, number, ledger.chart(account).outside)
                )
            if isinstance(command, ledger.Pend) and command.key_id:
                self.book.keys.setdefault(command.key_id, ledger.KeyBudget(command.key_id))
            results.append(self.book.decide(command, self.clock.seconds * 1000))
        return results

    def balances(self) -> dict[str, int]:
        return {row.account: row.balance for row in self.book.accounts.values()}

    def pending(self, pending_id: str) -> PendingRow:
        return self.book.pendings[pending_id]

    def set_budget(self, key_id: str, budget: int | None) -> None:
        self.book.keys.setdefault(key_id, ledger.KeyBudget(key_id)).budget = budget

    def committed(self, key_id: str) -> int:
        return self.book.keys[key_id].committed

    def check(self) -> list[str]:
        """What can be said without a database: every transfer adds up, and its entries are the balances."""
        sums = dict.fromkeys(self.book.accounts, 0)
        for written in self.book.written:
            assert sum(amount for _, amount in written.entries) == 0
            for row, amount in written.entries:
                sums[row.account] += amount
        return [] if sums == self.balances() else ["balances are not what the entries say"]


class StoredLedger:
    """A database, driven from a test that is not asynchronous itself."""

    def __init__(self, store: Store, clock: Clock, runner: asyncio.Runner) -> None:
        self.clock = clock
        self._store = store
        self._runner = runner

    def run(self, action: Action[Any]) -> Any:
        return self._runner.run(self._store.run(action))

    def apply(self, commands: Sequence[Command]) -> list[Result]:
        results: list[Result] = self.run(lambda transaction: ledger.apply(transaction, commands))
        return results

    def balances(self) -> dict[str, int]:
        found: dict[str, int] = self.run(ledger.balances)
        return found

    def pending(self, pending_id: str) -> PendingRow:
        found: PendingRow | None = self.run(lambda transaction: ledger.pending(transaction, pending_id))
        assert found is not None
        return found

    def set_budget(self, key_id: str, budget: int | None) -> None:
        self.run(lambda transaction: ledger.set_budget(transaction, key_id, budget))

    def committed(self, key_id: str) -> int:
        committed: int = self.run(lambda transaction: ledger.key_budget(transaction, key_id)).committed
        return committed

    def check(self) -> list[str]:
        problems: list[str] = self.run(ledger.check)
        return problems
