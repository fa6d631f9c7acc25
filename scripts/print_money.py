"""Writes the tables of docs/money.md by doing what they show on a real ledger.

Each part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. `--check` only says whether they are up to
date (exit code 1 when not); tests/network/test_money_document.py does the same.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from gridmill.network import ledger
from gridmill.network.credits import show_credits
from gridmill.network.ledger import Command, Done, Extend, Grow, Pend, Refused, Result, Return, Transfer, Void
from gridmill.network.metering import FREE, Charge, FeePolicy, PriceRow, Usage, charge, most
from gridmill.network.settlement import Part, Server, costs_of
from gridmill.network.store import SqliteStore, Transaction
from gridmill.wire.messages import Price

PAGE = Path(__file__).parent.parent / "docs" / "money.md"

# 2000 nanocredits for a token in, 8000 for one out: a long answer costs thousandths of a credit.
ROW = PriceRow("example", Price(2000, 500, 8000), FeePolicy())
LEASE_SECONDS = 20
WINDOW_SECONDS = 72 * 3600


class Scene:
    """A ledger with one user and one owner, which writes down what each transfer moved."""

    def __init__(self, store: SqliteStore) -> None:
        self.seconds = 1_000_000
        self.lines: list[str] = []
        self._store = store
        self._seen = 0

    async def run(self, action: Callable[[Transaction], Awaitable[Any]]) -> Any:
        async def whole(transaction: Transaction) -> Any:
            return await action(transaction)

        return await self._store.run(whole)

    async def silently(self, *commands: Command) -> None:
        """What a flow begins with and another part has shown."""
        results: list[Result] = await self.run(lambda transaction: ledger.apply(transaction, commands))
        assert all(isinstance(result, Done) for result in results), results
        self._seen = await self._last()

    async def show(self, caption: str, *commands: Command) -> list[Result]:
        results: list[Result] = await self.run(lambda transaction: ledger.apply(transaction, commands))
        await self.shown(caption, commands, results)
        return results

    async def shown(
        self, caption: str, commands: tuple[Command, ...] = (), results: list[Result] | None = None
    ) -> None:
        """A step in words, the commands and their answers, and a table of all entries that are new."""
        self.lines += [caption, ""]
        for command, result in zip(commands, results or [], strict=True):
            self.lines.append(f"- `{_said(command)}` → {_answer(result)}")
        rows = await self._entries()
        if rows:
            if commands:
                self.lines.append("")
            self.lines += ["| transfer | kind | account | credits |", "|---|---|---|---:|"]
            before = ""
            for transfer_id, kind, account, amount in rows:
                first = f"`{transfer_id}` | {kind}" if transfer_id != before else "|"
                self.lines.append(f"| {first} | `{account}` | {_signed(amount)} |".replace("| | |", "| | |"))
                before = transfer_id
        elif commands:
            self.lines += ["", "No entries: nothing moved."]
        self.lines.append("")

    async def balances(self) -> None:
        found: dict[str, int] = await self.run(ledger.balances)
        lines = [f"`{account}` {show_credits(amount)}" for account, amount in found.items() if amount]
        self.lines += ["Afterwards: " + ", ".join(lines) + ".", ""]

    def say(self, sentence: str) -> None:
        self.lines += [sentence, ""]

    async def _entries(self) -> list[Any]:
        since, self._seen = self._seen, await self._last()
        rows: list[Any] = await self.run(
            lambda transaction: transaction.all(
                "SELECT transfer_id, kind, account, amount FROM"
                " (SELECT transfers.number, n, transfer_id, kind, ledger_accounts.account, entries.amount"
                "  FROM entries JOIN transfers ON transfers.number = transfer_number"
                "  JOIN ledger_accounts ON ledger_accounts.number = account_number) AS lines"
                " WHERE number > ? ORDER BY number, n",
                since,
            )
        )
        return rows

    async def _last(self) -> int:
        rows = await self.run(lambda transaction: transaction.all("SELECT COUNT(*) FROM transfers"))
        return int(rows[0][0])

    # ------------------------------------------------ commands, as a gateway and an operator build them

    @property
    def later_ms(self) -> int:
        return (self.seconds + LEASE_SECONDS) * 1000

    def credit(self, credits: int = 10) -> Command:
        return ledger.credit("ann", credits * 1_000_000_000, "invoice-17", "bank transfer of May 2")

    def lease(self, credits: int = 1, name: str = "lease:ann:1") -> Command:
        source, into = ledger.user_available("ann"), ledger.user_hold("ann")
        return Pend(name, "lease", source, into, credits * 1_000_000_000, self.later_ms, holder="gateway-a")

    def hold(self, work: str, prompt: int, max_tokens: int) -> Command:
        amount = most(ROW, prompt, max_tokens)
        hold = ledger.user_hold("ann")
        return Pend(
            f"hold:{work}:0", "hold", hold, "escrow:request", amount, self.later_ms, parent="lease:ann:1",
            holder="gateway-a",
        )  # fmt: skip

    def settle(self, work: str, usage: Usage, pending_id: str, *, close: bool) -> Command:
        return ledger.settlement(work, 0, pending_id, charge(ROW, usage), "owner-1", close=close)


async def credit(scene: Scene) -> None:
    await scene.show("The operator credits a user who has paid:", scene.credit())
    await scene.show("The same order a second time, because nobody was sure that it had arrived:", scene.credit())
    await scene.balances()


async def lease(scene: Scene) -> None:
    await scene.silently(scene.credit())
    await scene.show("The user's first request reaches a gateway, which leases a slice of the balance:", scene.lease())
    scene.say("From now on this gateway admits the user's requests from memory, as long as the slice has room.")
    grow = Grow("grow:1", "lease:ann:1", 2_000_000_000, at_least=1)
    await scene.show("Busy users get a larger slice, and the lease is renewed while it is used:", grow,
                     Extend("lease:ann:1", scene.later_ms + 10_000))  # fmt: skip
    await scene.balances()


async def short_work(scene: Scene) -> None:
    await scene.silently(scene.credit(), scene.lease())
    scene.say("100 tokens in, 50 out: over before anybody would have journalled it.")
    await scene.show(
        "The gateway pays the node, the fee and its shares straight from the lease:",
        scene.settle("short", Usage(100, 0, 50), "lease:ann:1", close=False),
    )
    await scene.balances()


async def long_work(scene: Scene) -> None:
    await scene.silently(scene.credit(), scene.lease())
    await scene.show(
        "A work that runs on gets a hold of its own, for the most that 1000 tokens in and at most 4000 out can cost:",
        scene.hold("long", 1000, 4000),
    )
    await scene.show(
        "It made 700 tokens, and 600 of its prompt were cached. One transfer pays, and returns the rest to the lease:",
        scene.settle("long", Usage(1000, 600, 700), "hold:long:0", close=True),
    )
    await scene.balances()


async def moved_work(scene: Scene) -> None:
    earlier = scene.settle("earlier", Usage(20_000, 0, 60_000), "lease:ann:1", close=False)
    await scene.silently(scene.credit(), scene.lease(), earlier, scene.hold("long", 1000, 4000))
    scene.say(
        "The node of owner-1 breaks off after 300 tokens, and one of owner-2, at the same price, makes the other 400. "
        "It read the prompt and the 300 again: the prompt is the user's to pay, the 300 the failover reserve's."
    )
    first = Part(0, 0, Server("", b"", "owner-1", ROW), Usage(0, 0, 300), 0, b"", 0, 0, "lost")
    last = Part(1, 300, Server("", b"", "owner-2", ROW), Usage(1000, 0, 400), 300, b"", 0, 0, "stop")
    costs = costs_of(ROW, [first, last])
    await scene.show(
        "Together the two parts cost what 1000 tokens in and 700 out cost:",
        ledger.settlement("long", 0, "hold:long:0", costs[0], "owner-1", close=False),
        ledger.settlement("long", 1, "hold:long:0", costs[1], "owner-2", close=True),
        _from_reserve(costs[1]),
    )
    whole = charge(ROW, Usage(1000, 0, 700)).total
    assert sum(cost.total for cost in costs) == whole
    scene.say(f"The unbroken answer would have cost {show_credits(whole)}.")
    await scene.balances()


def _from_reserve(cost: Charge) -> Command:
    legs = (("failover:reserve", -cost.subsidy), (ledger.provider_held("owner-2"), cost.subsidy))
    return Transfer(ledger.settlement_id("long", 1) + ledger.RESERVE_SUFFIX, "reserve", legs)


async def moved_work_of_a_dearer_node(scene: Scene) -> None:
    earlier = scene.settle("earlier", Usage(20_000, 0, 60_000), "lease:ann:1", close=False)
    await scene.silently(scene.credit(), scene.lease(), earlier, scene.hold("long", 1000, 4000))
    dearer = PriceRow("price-3", Price(2200, 550, 8800), FeePolicy())
    first = Part(0, 0, Server("", b"", "owner-1", ROW), Usage(0, 0, 300), 0, b"", 0, 0, "lost")
    last = Part(1, 300, Server("", b"", "owner-2", dearer), Usage(1000, 0, 400), 300, b"", 0, 0, "stop")
    costs = costs_of(ROW, [first, last])
    await scene.silently(ledger.settlement("long", 0, "hold:long:0", costs[0], "owner-1", close=False))
    await scene.show(
        "Had the second node been a tenth dearer, the reserve would add the difference too:",
        ledger.settlement("long", 1, "hold:long:0", costs[1], "owner-2", close=True),
        _from_reserve(costs[1]),
    )


async def too_poor(scene: Scene) -> None:
    await scene.silently(ledger.credit("ann", 200_000_000, "invoice-17"))
    least = most(ROW, 100_000, 10_000)
    source, into = ledger.user_available("ann"), ledger.user_hold("ann")
    scene.say(f"The user has 0.2 credits; the request can cost up to {show_credits(least)}.")
    await scene.show(
        "The caller reads 402 with what there is and what it takes:",
        Pend("lease:ann:1", "lease", source, into, least, scene.later_ms, holder="gateway-a"),
    )


async def lease_returned(scene: Scene) -> None:
    await scene.silently(
        scene.credit(), scene.lease(), scene.settle("short", Usage(100, 0, 50), "lease:ann:1", close=False)
    )
    await scene.show(
        "Another gateway needs some of it: this one gives back what no work holds, and keeps the lease:",
        Return("return:1", "lease:ann:1", 500_000_000),
    )
    await scene.show("The user has gone quiet, or the gateway stops:", Void("lease:ann:1:idle", "lease:ann:1"))
    await scene.balances()


async def gateway_dead(scene: Scene) -> None:
    await scene.silently(scene.credit(), scene.lease(), scene.hold("long", 1000, 4000))
    scene.say("The gateway dies while a work is running. 300 of its tokens had been journalled when the lease ran out.")
    scene.seconds += LEASE_SECONDS
    await scene.show(
        "Whichever gateway notices charges these 300 and ends the lease. What was held and not used goes home:",
        scene.settle("long", Usage(1000, 0, 300), "hold:long:0", close=True),
        Void("lease:ann:1:expired", "lease:ann:1", expired=True),
    )
    await scene.show(
        "The gateway was only slow, and now wants to charge 420. The work has been charged, so the other 120 are lost:",
        scene.settle("long", Usage(1000, 0, 420), "hold:long:0", close=True),
    )
    await scene.balances()


async def free_work(scene: Scene) -> None:
    cost = charge(FREE, Usage(1000, 0, 500))
    assert cost == Charge() and most(FREE, 1000, 4000) == 0
    scene.say("A node without a price offers 0, the fee on 0 is 0, and the most that a request can cost is 0.")
    scene.say("So nothing is leased, held or posted, no account comes into being, and no balance is needed.")
    assert await scene.run(ledger.balances) == {}
    scene.say("No entries: the ledger never hears of it. The receipt counts the tokens all the same.")


async def released(scene: Scene) -> None:
    work = scene.settle("long", Usage(1000, 0, 300), "lease:ann:1", close=False)
    await scene.silently(scene.credit(), scene.lease(), work, Void("lease:ann:1:idle", "lease:ann:1"))
    scene.seconds += WINDOW_SECONDS + 60
    late = scene.settle("later", Usage(100, 0, 10), "lease:ann:2", close=True)
    await scene.silently(scene.lease(name="lease:ann:2"), late)
    before_ms = (scene.seconds - WINDOW_SECONDS) * 1000
    amount = await scene.run(lambda transaction: ledger.releasable(transaction, "owner-1", before_ms))
    await scene.show(
        "Audits had 72 hours to object. What was earned before that becomes payable; what is younger stays held:",
        ledger.release("owner-1", "2026-05-06", amount),
    )
    await scene.balances()


async def convicted(scene: Scene) -> None:
    await scene.silently(
        scene.credit(),
        scene.lease(),
        scene.settle("w1", Usage(1000, 0, 300), "lease:ann:1", close=False),
        scene.settle("w2", Usage(500, 0, 100), "lease:ann:1", close=False),
        scene.settle("honest", Usage(1000, 0, 200), "lease:ann:1", close=False),
    )

    async def action(transaction: Transaction) -> ledger.Conviction:
        return await ledger.convict(transaction, "owner-1", [("w1", 0), ("w2", 0)], 500_000, "int4 sold as bf16")

    found = await scene.run(action)
    await scene.shown(
        "Two works of an owner were not what had been sold. Their pay goes back to who paid, less the bounty of 0.0005"
        " credits for the audit that found them:"
    )
    scene.say(
        f"Clawed back {show_credits(found.clawed)}, refunded {show_credits(found.refunded)}, bounty"
        f" {show_credits(found.bounty)}. The third work keeps its pay. Convicting again moves nothing:"
    )
    again = await scene.run(action)
    assert again.clawed == 0
    scene.say(f"- already undone: {', '.join(work for work, _ in again.already)}")
    await scene.shown("No entries: nothing moved.")
    await scene.balances()


async def corrected(scene: Scene) -> None:
    await scene.silently(
        scene.credit(), scene.lease(), scene.settle("short", Usage(100, 0, 50), "lease:ann:1", close=False)
    )
    await scene.run(lambda transaction: ledger.correct(transaction, "work:short:0", "the node served another's prompt"))
    await scene.shown("A charge was wrong. Its opposite is booked; what came out of a hold goes to the user:")
    await scene.balances()


FLOWS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "credit": credit,
    "lease": lease,
    "short_work": short_work,
    "long_work": long_work,
    "moved_work": moved_work,
    "moved_work_of_a_dearer_node": moved_work_of_a_dearer_node,
    "too_poor": too_poor,
    "lease_returned": lease_returned,
    "gateway_dead": gateway_dead,
    "free_work": free_work,
    "released": released,
    "convicted": convicted,
    "corrected": corrected,
}


def main() -> int:
    before = PAGE.read_text()
    after = page_with_flows(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    PAGE.write_text(after)
    return 0


def page_with_flows(page: str) -> str:
    """The page with every generated part made anew. Raises KeyError on a part that nobody makes."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n{flow(name).strip()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- generated: (?P<name>\w+) -->.*?<!-- end: (?P=name) -->", part, page, flags=re.S)


def flow(name: str) -> str:
    """Runs it in a ledger of its own, which must be sound afterwards."""

    async def body(folder: str) -> list[str]:
        store = SqliteStore(Path(folder) / "network.sqlite", wall_clock=lambda: scene.seconds)
        scene = Scene(store)
        await store.open([ledger.MIGRATION])
        try:
            await FLOWS[name](scene)
            problems = await scene.run(ledger.check)
            assert not problems, f"{name}: {problems}"
        finally:
            await store.close()
        return scene.lines

    with tempfile.TemporaryDirectory() as folder:
        return "\n".join(asyncio.run(body(folder)))


def _said(command: Command) -> str:
    match command:
        case Transfer():
            return f"Transfer {command.transfer_id}"
        case Pend():
            least = f", at least {show_credits(command.at_least)}" if command.at_least >= 0 else ""
            out_of = f" out of {command.parent}" if command.parent else ""
            return f"Pend {command.transfer_id}: {show_credits(command.amount)}{least}{out_of}"
        case Grow():
            return f"Grow {command.pending_id} by up to {show_credits(command.amount)}"
        case Return():
            return f"Return {show_credits(command.amount)} of {command.pending_id}"
        case Void():
            return f"Void {command.pending_id}{', expired' if command.expired else ''}"
        case Extend():
            return f"Extend {command.pending_id}"
        case ledger.Post():
            return f"Post {command.transfer_id} from {command.pending_id}{', close' if command.close else ''}"


def _answer(result: Result) -> str:
    if isinstance(result, Refused):
        more = f", {show_credits(result.available)} is there" if result.reason == "insufficient" else ""
        return f"refused: {result.reason}{more}"
    return f"done, {show_credits(result.amount)}{', as before' if result.repeated else ''}"


def _signed(nanocredits: int) -> str:
    return ("+" if nanocredits > 0 else "−") + show_credits(abs(nanocredits))


if __name__ == "__main__":
    sys.exit(main())
