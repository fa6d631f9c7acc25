"""The ledger as tables: one command a line with what becomes of it, on a Book alone and on both databases.

Accounts: `alice` is what she can spend, `alice/hold` her holding account, `escrow`; `node` is what the owner `node`
has in its earned_held, `node/available`; `fees audit reserve loss rail`. Times are seconds.

    now 100                                 the clock
    budget k 300                            the budget of the key k; `none` takes it away
    transfer T rail-5 alice+5 -> ok 5       legs with their signs
    pend P alice>alice/hold 500 until=900 at_least=0 parent=L key=k holder=g -> ok 500
    grow G P 100 at_least=0 -> ok 100
    post T P node+30 close -> ok 30
    return T P 5 -> ok 5
    void T P -> ok 5                        and `expire`, which waits for the pending's time
    extend P 1000 -> ok 0
    have alice=5 escrow=0                   balances
    open P 500                              what remains of a pending that is open
    ended P posted                          or voided, or expired
    committed k 300                         what a key has leased and spent
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from pure_ledger import AnyLedger, Clock, PureLedger, StoredLedger

from databases import Database
from gridmill.network import ledger
from gridmill.network.ledger import (
    Command,
    Done,
    Extend,
    Grow,
    Pend,
    Post,
    Refused,
    Result,
    Return,
    Transfer,
    Void,
    apply,
    check,
    convict,
    correct,
    credit,
    releasable,
    release,
    settlement,
)
from gridmill.network.metering import Charge
from gridmill.network.store import Transaction

TABLES = {
    "a lease pays short works and what is left goes back": """
        transfer c1 rail-1000 alice+1000 -> ok 1000
        pend L alice>alice/hold 600 until=900 holder=gw -> ok 600
        have rail=-1000 alice=400 alice/hold=600
        post w1 L node+90 fees+10 -> ok 100
        post w2 L node+45 fees+3 audit+1 reserve+1 -> ok 50
        open L 450
        have node=135 fees=13 audit=1 reserve=1 alice/hold=450
        void v1 L -> ok 450
        ended L voided
        have alice=850 alice/hold=0
        """,
    "an id stands for one body, whatever state the world is in": """
        transfer c1 rail-100 alice+100 -> ok 100
        transfer c1 rail-100 alice+100 -> again 100
        transfer c1 rail-101 alice+101 -> conflict
        pend L alice>alice/hold 60 until=900 -> ok 60
        pend L alice>alice/hold 60 until=900 -> again 60
        pend L alice>alice/hold 60 until=901 -> conflict
        post w1 L node+60 close -> ok 60
        post w1 L node+60 close -> again 60
        post w1 L node+60 -> conflict
        post w2 L node+1 -> closed
        pend L alice>alice/hold 60 until=900 -> again 60
        void w1 L -> conflict
        have alice=40 node=60
        """,
    "a refusal is not remembered": """
        transfer t1 alice-5 bob+5 -> insufficient 0 balance
        transfer c1 rail-5 alice+5 -> ok 5
        transfer t1 alice-5 bob+5 -> ok 5
        have alice=0 bob=5
        """,
    "the outside has no bottom and the inside has one": """
        transfer t1 alice-1 bob+1 -> insufficient 0 balance
        transfer t2 loss-7 node+7 -> ok 7
        transfer t3 node-8 loss+8 -> insufficient 7 balance
        transfer t4 node-7 loss+7 -> ok 7
        transfer t5 rail-3 alice+1 bob+2 -> ok 3
        transfer t6 alice-1 bob-2 alice-1 rail+4 -> insufficient 1 balance
        transfer t7 -> ok 0
        have alice=1 bob=2 loss=0 rail=-3
        """,
    "as much as there is, down to a least": """
        transfer c1 rail-100 alice+100 -> ok 100
        pend P1 alice>alice/hold 101 until=900 -> insufficient 100 balance
        pend P2 alice>alice/hold 101 until=900 at_least=101 -> insufficient 100 balance
        pend P3 alice>alice/hold 101 until=900 at_least=100 -> ok 100
        pend P4 alice>alice/hold 10 until=900 at_least=0 -> ok 0
        open P4 0
        void v4 P4 -> ok 0
        return r1 P3 30 -> ok 30
        grow g1 P3 50 -> insufficient 30 balance
        grow g2 P3 50 at_least=10 -> ok 30
        grow g2 P3 50 at_least=10 -> again 30
        open P3 100
        return r2 P3 1000 -> ok 100
        open P3 0
        """,
    "a post never pays more than what remains": """
        transfer c1 rail-100 alice+100 -> ok 100
        pend L alice>alice/hold 100 until=900 -> ok 100
        post w1 L node+101 -> too_much 100
        post w1 L node+70 -> ok 70
        post w2 L node+31 close -> too_much 30
        post w2 L node+29 close -> ok 29
        ended L posted
        have alice=1 node=99 alice/hold=0
        """,
    "a pending ends exactly once": """
        transfer c1 rail-300 alice+300 -> ok 300
        pend A alice>alice/hold 100 until=900 -> ok 100
        pend B alice>alice/hold 100 until=900 -> ok 100
        pend C alice>alice/hold 100 until=900 -> ok 100
        post a1 A close -> ok 0
        void b1 B -> ok 100
        expire c1x C -> not_expired
        now 899
        expire c1x C -> not_expired
        now 900
        expire c1x C -> ok 100
        ended A posted
        ended B voided
        ended C expired
        post a2 A node+1 -> closed
        void a3 A -> closed
        expire b2 B -> closed
        return b3 B 1 -> closed
        grow c2 C 1 -> closed
        extend C 5000 -> closed
        void b1 B -> again 100
        have alice=300 alice/hold=0
        """,
    "what does not exist is unknown": """
        post w1 X node+1 -> unknown
        return r1 X 1 -> unknown
        void v1 X -> unknown
        grow g1 X 1 -> unknown
        extend X 100 -> unknown
        pend P alice/hold>escrow 5 until=900 parent=X -> unknown
        """,
    "past its time a pending can be paid out and given back, but not grown, extended or carved": """
        now 100
        transfer c1 rail-100 alice+100 -> ok 100
        pend L alice>alice/hold 90 until=200 -> ok 90
        extend L 150 -> ok 0
        extend L 300 -> ok 0
        extend L 200 -> ok 0
        now 299
        pend C alice/hold>escrow 20 until=900 parent=L -> ok 20
        now 300
        grow g1 L 5 -> closed
        extend L 900 -> closed
        pend D alice/hold>escrow 20 until=900 parent=L -> closed
        post w1 L node+10 -> ok 10
        return r1 L 10 -> ok 10
        post w2 C node+5 close -> ok 5
        open L 65
        expire x L -> ok 65
        have alice=85 node=15 alice/hold=0 escrow=0
        """,
    "a hold is carved out of a lease and its rest goes back there": """
        transfer c1 rail-100 alice+100 -> ok 100
        pend L alice>alice/hold 80 until=900 -> ok 80
        pend H alice/hold>escrow 81 until=900 parent=L -> insufficient 80 balance
        pend H alice/hold>escrow 50 until=900 parent=L -> ok 50
        open L 30
        have alice=20 alice/hold=30 escrow=50
        post w1 L node+31 -> too_much 30
        post w2 H node+20 -> ok 20
        return r1 H 10 -> ok 10
        open H 20
        open L 40
        post w3 H node+5 close -> ok 5
        open L 55
        have alice=20 alice/hold=55 escrow=0 node=25
        """,
    "a lease that ends leaves its holds alone, and their rest goes to the user": """
        transfer c1 rail-100 alice+100 -> ok 100
        pend L alice>alice/hold 80 until=200 -> ok 80
        pend H alice/hold>escrow 50 until=900 parent=L -> ok 50
        pend I alice/hold>escrow 10 until=900 parent=L -> ok 10
        now 200
        expire x L -> ok 20
        have alice=40 alice/hold=0 escrow=60
        post w1 H node+20 close -> ok 20
        void v1 I -> ok 10
        have alice=80 alice/hold=0 escrow=0 node=20
        """,
    "a key's budget limits what is leased in its name, and what comes home is free again": """
        transfer c1 rail-1000 alice+1000 -> ok 1000
        budget k 300
        pend L alice>alice/hold 400 until=900 key=k -> insufficient 300 budget
        pend L alice>alice/hold 400 until=900 key=k at_least=1 -> ok 300
        committed k 300
        grow g1 L 1 -> insufficient 0 budget
        grow g0 L 1 at_least=0 -> ok 0
        return r1 L 100 -> ok 100
        committed k 200
        grow g2 L 60 -> ok 60
        committed k 260
        pend H alice/hold>escrow 50 until=900 parent=L -> ok 50
        committed k 260
        post w1 H node+10 close -> ok 10
        committed k 260
        pend I alice/hold>escrow 50 until=900 parent=L -> ok 50
        void v1 L -> ok 200
        committed k 60
        post w2 I node+20 close -> ok 20
        committed k 30
        have alice=970 node=30
        budget k 20
        pend M alice>alice/hold 1 until=900 key=k -> insufficient 0 budget
        budget k none
        pend M alice>alice/hold 970 until=900 key=k -> ok 970
        committed k 1000
        pend N alice>alice/hold 1 until=900 key=k -> insufficient 0 balance
        budget k 10
        pend N alice>alice/hold 1 until=900 key=k -> insufficient 0 balance
        """,
    "a key without a budget is counted all the same": """
        transfer c1 rail-100 alice+100 -> ok 100
        pend L alice>alice/hold 60 until=900 key=k -> ok 60
        post w1 L node+10 close -> ok 10
        committed k 10
        budget k 15
        pend M alice>alice/hold 6 until=900 key=k -> insufficient 5 budget
        """,
    "a payout is pending in its own account until it is final": """
        transfer c1 loss-90 node/available+90 -> ok 90
        pend P node/available>node/inflight 80 until=900 -> ok 80
        have node/available=10 node/inflight=80
        post f P rail+80 close -> ok 80
        have node/available=10 node/inflight=0 rail=80
        """,
    "what no caller may build is an error": """
        transfer t1 alice-5 bob+6 -> error add up
        transfer t2 alice-0 bob+0 -> error a leg moves money
        transfer t3 rail-5 alice/hold+5 -> error holding account
        transfer t4 rail-5 user:al:savings+5 -> error no account
        transfer t5 rail-5 user:a.b@c.de:available+5 -> ok 5
        pend P1 alice>alice/hold -5 until=900 -> error no amount
        pend P2 alice>alice/hold 5 until=900 at_least=6 -> error no amount
        pend P3 alice>bob 5 until=900 -> error holds nothing
        pend P4 alice/hold>escrow 5 until=900 -> error a parent
        pend P5 alice>escrow 5 until=900 parent=L -> error a parent
        transfer c1 rail-100 alice+100 bob-0 -> error a leg
        transfer c1 rail-200 alice+100 bob+100 -> ok 200
        pend L alice>alice/hold 90 until=900 key=k -> ok 90
        pend M bob>bob/hold 90 until=900 -> ok 90
        pend H bob/hold>escrow 5 until=900 parent=L -> error carved
        pend H alice/hold>escrow 5 until=900 parent=L key=other -> error carved
        pend H alice/hold>escrow 5 until=900 parent=L key=k -> ok 5
        grow g1 H 5 -> error cannot grow
        pend J escrow>alice/hold 5 until=900 parent=H -> error carved
        post w1 L node-5 -> error positive
        post w2 L alice/hold+5 -> error holding account
        return r1 L -5 -> error no amount
        """,
}

ACCOUNTS = {
    "escrow": "escrow:request",
    "fees": "network:fees",
    "audit": "audit:pool",
    "reserve": "failover:reserve",
    "loss": "loss",
    "rail": "rail:operator:external",
    "node": "provider:node:earned_held",
    "node/available": "provider:node:available",
    "node/inflight": "provider:node:payout_inflight",
}


def account(short: str) -> str:
    if ":" in short:
        return short
    return ACCOUNTS.get(short) or (
        f"user:{short.removesuffix('/hold')}:{'hold' if short.endswith('/hold') else 'available'}"
    )


def command_of(words: list[str]) -> Command:
    verb, first, *rest = words
    options = dict(word.split("=") for word in rest if "=" in word)
    plain = [word for word in rest if "=" not in word and word != "close"]
    at_least = int(options.get("at_least", -1))
    match verb:
        case "transfer":
            return Transfer(first, "test", legs_of(plain))
        case "pend":
            source, into = plain[0].split(">")
            return Pend(
                first,
                "test",
                account(source),
                account(into),
                int(plain[1]),
                int(options["until"]) * 1000,
                at_least,
                options.get("parent", ""),
                options.get("key", ""),
                options.get("holder", ""),
            )
        case "grow":
            return Grow(first, plain[0], int(plain[1]), at_least)
        case "post":
            return Post(first, plain[0], "test", legs_of(plain[1:]), "close" in rest)
        case "return":
            return Return(first, plain[0], int(plain[1]))
        case "void" | "expire":
            return Void(first, plain[0], expired=verb == "expire")
        case "extend":
            return Extend(first, int(plain[0]) * 1000)
    raise AssertionError(f"no such line: {words}")


def legs_of(words: list[str]) -> tuple[tuple[str, int], ...]:
    found = [re.fullmatch(r"(.+?)([+-]\d+)", word) for word in words]
    return tuple((account(leg[1]), int(leg[2])) for leg in found if leg is not None)


def outcome_of(result: Result) -> str:
    if isinstance(result, Done):
        return f"{'again' if result.repeated else 'ok'} {result.amount}"
    more = f" {result.available}" if result.reason in ("insufficient", "too_much") else ""
    return result.reason + more + (f" {result.limited_by}" if result.limited_by else "")


def run_table(books: AnyLedger, table: str, *, together: bool) -> None:
    """Every line must come true. `together` puts commands that follow each other into one call."""
    waiting: list[tuple[str, Command, str]] = []
    done: list[tuple[Command, Result]] = []

    def flush() -> None:
        results = books.apply([command for _, command, _ in waiting])
        for (line, command, expected), result in zip(waiting, results, strict=True):
            assert outcome_of(result) == expected, line
            if isinstance(result, Done):
                done.append((command, result))
        waiting.clear()

    for line in filter(None, map(str.strip, table.splitlines())):
        order, _, expected = line.partition(" -> ")
        words = order.split()
        if expected.startswith("error"):
            flush()
            with pytest.raises(ValueError, match=expected.removeprefix("error ")):
                books.apply([command_of(words)])
        elif expected:
            waiting.append((line, command_of(words), expected))
            if not together:
                flush()
        else:
            flush()
            hold_true(books, line, words)
    flush()
    assert books.check() == []
    before = books.balances()
    replayed = books.apply([command for command, _ in done if not isinstance(command, Extend)])
    first = [result for command, result in done if not isinstance(command, Extend)]
    assert replayed == [Done(result.amount, repeated=True) for result in first if isinstance(result, Done)]
    assert books.balances() == before and books.check() == []


def hold_true(books: AnyLedger, line: str, words: list[str]) -> None:
    match words:
        case ["now", seconds]:
            books.clock.seconds = int(seconds)
        case ["budget", key, amount]:
            books.set_budget(key, None if amount == "none" else int(amount))
        case ["have", *pairs]:
            balances = books.balances()
            expected = {account(short): int(amount) for short, amount in (pair.split("=") for pair in pairs)}
            assert {name: balances.get(name, 0) for name in expected} == expected, line
        case ["open", pending_id, amount]:
            pending = books.pending(pending_id)
            assert (pending.state, pending.remaining) == ("open", int(amount)), line
        case ["ended", pending_id, state]:
            assert books.pending(pending_id).state == state, line
        case ["committed", key, amount]:
            assert books.committed(key) == int(amount), line
        case _:
            raise AssertionError(f"no such line: {line}")


@pytest.fixture
def stored(database: Database) -> Iterator[StoredLedger]:
    clock = Clock()
    store = database.store(wall_clock=clock)
    with asyncio.Runner() as runner:
        runner.run(store.open([ledger.MIGRATION]))
        yield StoredLedger(store, clock, runner)
        runner.run(store.close())


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("name", TABLES)
def test_the_book_alone_follows_the_table(name: str, together: bool) -> None:
    run_table(PureLedger(Clock()), TABLES[name], together=together)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("name", TABLES)
def test_a_database_follows_the_table(name: str, together: bool, stored: StoredLedger) -> None:
    run_table(stored, TABLES[name], together=together)


# ---------------------------------------------------------------- flows


def give(books: StoredLedger, *amounts: tuple[str, int]) -> None:
    books.apply([credit(user, amount, f"credit:{user}") for user, amount in amounts])


def work(books: StoredLedger, work_id: str, user: str, charge: Charge, owner: str = "o", epoch: int = 0) -> None:
    """A work that was leased for and settled."""
    source, into = ledger.user_available(user), ledger.user_hold(user)
    pend = Pend(f"lease:{work_id}:{epoch}", "lease", source, into, charge.total, 10**15)
    results = books.apply([pend, settlement(work_id, epoch, pend.transfer_id, charge, owner, close=True)])
    assert results == [Done(charge.total), Done(charge.total)]


def some(books: StoredLedger, *names: str) -> list[int]:
    balances = books.balances()
    return [balances.get(name, 0) for name in names]


HELD, AVAILABLE = "provider:o:earned_held", "provider:o:available"


def test_a_conviction_refunds_who_paid_and_pays_the_bounty_once(stored: StoredLedger) -> None:
    give(stored, ("a", 1000), ("b", 1000))
    work(stored, "w1", "a", Charge(105, 100, 4, 1, 0))
    work(stored, "w2", "b", Charge(210, 200, 8, 1, 1))
    work(stored, "honest", "b", Charge(300, 300, 0, 0, 0))
    found = stored.run(lambda tx: convict(tx, "o", [("w1", 0), ("w2", 0)], 31, "int4 instead of bf16"))
    assert (found.clawed, found.refunded, found.bounty, found.already) == (300, 269, 31, ())
    # A tenth of each, to the nanocredit: 10.33 and 20.67.
    assert some(stored, "user:a:available", "user:b:available", HELD, "audit:pool") == [985, 669, 300, 33]
    for parts in ([("w1", 0), ("w2", 0)], [("w2", 0)]):
        again = stored.run(lambda tx, parts=parts: convict(tx, "o", parts, 31))
        assert (again.clawed, again.bounty, again.already) == (0, 0, tuple(parts))
    assert some(stored, HELD, "audit:pool") == [300, 33] and stored.check() == []


def test_a_conviction_takes_what_is_held_first_and_no_more_than_there_is(stored: StoredLedger) -> None:
    give(stored, ("a", 1000))
    for work_id in ("w1", "w2", "w3"):
        work(stored, work_id, "a", Charge(100, 100, 0, 0, 0))
    stored.apply([release("o", "2026-01", 250)])
    stored.apply([Transfer("paid out", "payout", ((AVAILABLE, -200), ("rail:operator:external", 200)))])
    found = stored.run(lambda tx: convict(tx, "o", [("w1", 0), ("w2", 0)], 0))
    assert (found.clawed, some(stored, HELD, AVAILABLE)) == (100, [0, 0])
    assert stored.balances()["user:a:available"] == 800
    work(stored, "w4", "a", Charge(100, 100, 0, 0, 0))
    assert stored.run(lambda tx: convict(tx, "o", [("w1", 0), ("w2", 0)], 0)).clawed == 0, "convicted once, for good"
    assert stored.run(lambda tx: convict(tx, "o", [("w4", 0), ("w2", 0)], 0)).clawed == 100
    assert stored.check() == []


def test_a_conviction_touches_nobody_elses_part_of_a_work(stored: StoredLedger) -> None:
    give(stored, ("a", 1000))
    work(stored, "w", "a", Charge(100, 100, 0, 0, 0), owner="o", epoch=0)
    work(stored, "w", "a", Charge(50, 50, 0, 0, 0), owner="other", epoch=1)
    found = stored.run(lambda tx: convict(tx, "o", [("w", 0), ("w", 1), ("never", 0)], 0))
    assert found.clawed == 100
    assert some(stored, HELD, "provider:other:earned_held", "user:a:available") == [0, 50, 950]


def test_pay_that_the_network_lost_goes_back_to_the_loss(stored: StoredLedger) -> None:
    stored.apply([Transfer("work:w:0:loss", "loss", (("loss", -70), (HELD, 70)))])
    assert stored.run(lambda tx: convict(tx, "o", [("w", 0)], 7)).refunded == 63
    assert some(stored, "loss", "audit:pool", HELD) == [-7, 7, 0]


def test_a_correction_is_the_opposite_transfer_once(stored: StoredLedger) -> None:
    give(stored, ("a", 1000))
    stored.apply([Pend("L", "lease", "user:a:available", "user:a:hold", 500, 10**15)])
    stored.apply([Pend("H", "hold", "user:a:hold", "escrow:request", 200, 10**15, parent="L")])
    stored.apply([settlement("w", 0, "H", Charge(105, 100, 4, 1, 0), "o", close=True)])
    first = stored.run(lambda tx: correct(tx, "work:w:0", "charged twice by mistake"))
    assert first == Done(105)
    assert some(stored, "user:a:available", "user:a:hold", HELD, "network:fees", "audit:pool") == [605, 395, 0, 0, 0]
    assert stored.run(lambda tx: correct(tx, "work:w:0", "charged twice by mistake")) == Done(105, repeated=True)
    assert stored.run(lambda tx: correct(tx, "work:w:0", "another reason")) == Refused("conflict")
    assert stored.run(lambda tx: convict(tx, "o", [("w", 0)], 0)).already == (("w", 0),)
    assert stored.run(lambda tx: correct(tx, "L", "a lease paid nobody")) == Refused("unknown")
    assert stored.run(lambda tx: correct(tx, "nothing", "")) == Refused("unknown")
    assert stored.run(lambda tx: correct(tx, "credit:a", "the wrong account")) == Refused(
        "insufficient", 605, "balance"
    )
    assert stored.check() == []


def test_a_convicted_work_is_not_corrected_too(stored: StoredLedger) -> None:
    give(stored, ("a", 1000))
    work(stored, "w", "a", Charge(100, 100, 0, 0, 0))
    stored.run(lambda tx: convict(tx, "o", [("w", 0)], 0))
    assert stored.run(lambda tx: correct(tx, "work:w:0", "")) == Refused("conflict")
    assert some(stored, "user:a:available", HELD) == [1000, 0]


def test_what_was_earned_before_the_window_can_be_released(stored: StoredLedger) -> None:
    give(stored, ("a", 1000))
    assert stored.run(lambda tx: releasable(tx, "o", 10**15)) == 0
    for second, work_id in enumerate(("w1", "w2", "w3", "w4"), 10):
        stored.clock.seconds = second
        work(stored, work_id, "a", Charge(100, 100, 0, 0, 0))
    amounts = [stored.run(lambda tx, at=at: releasable(tx, "o", at)) for at in (0, 10_000, 10_001, 12_000, 99_000)]
    assert amounts == [0, 0, 100, 200, 400]
    stored.run(lambda tx: convict(tx, "o", [("w4", 0)], 0))
    assert stored.run(lambda tx: releasable(tx, "o", 12_000)) == 200, "what was convicted is neither here nor there"
    assert stored.apply([release("o", "p1", 200), release("o", "p1", 200), release("o", "p1", 201)]) == [
        Done(200),
        Done(200, repeated=True),
        Refused("conflict"),
    ]
    assert stored.run(lambda tx: releasable(tx, "o", 12_000)) == 0
    assert stored.run(lambda tx: releasable(tx, "o", 99_000)) == 100
    assert some(stored, HELD, AVAILABLE) == [100, 200]


# ---------------------------------------------------------------- reading, and many at once


def test_a_statement_is_read_page_by_page_newest_first(stored: StoredLedger) -> None:
    for number in range(1, 6):
        stored.apply([credit("a", number, f"c{number}", f"note {number}")])
    newest = stored.run(lambda tx: ledger.history(tx, "user:a:available", 2))
    assert [(entry.transfer_id, entry.amount, entry.memo) for entry in newest] == [
        ("c5", 5, "note 5"),
        ("c4", 4, "note 4"),
    ]
    older = stored.run(lambda tx: ledger.history(tx, "user:a:available", 9, newest[-1].number))
    assert [entry.transfer_id for entry in older] == ["c3", "c2", "c1"]
    assert stored.run(lambda tx: ledger.history(tx, "user:nobody:available", 9)) == []
    assert stored.run(lambda tx: ledger.balance(tx, "user:nobody:available")) == 0


def test_expired_pendings_and_those_of_a_gateway_are_found(stored: StoredLedger) -> None:
    give(stored, ("a", 100))
    lease = ("lease", "user:a:available", "user:a:hold", 10)
    stored.apply([Pend(f"P{at}", *lease, at * 1000, holder=f"g{at % 2}") for at in (3, 1, 2, 4)])
    stored.apply([Void("v1", "P1")])
    assert stored.run(lambda tx: ledger.expired(tx, 3000, 9)) == ["P2", "P3"]
    assert stored.run(lambda tx: ledger.expired(tx, 3000, 1)) == ["P2"]
    mine = stored.run(lambda tx: ledger.open_pendings(tx, "g0"))
    assert [(pending.pending_id, pending.remaining) for pending in mine] == [("P2", 10), ("P4", 10)]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("UPDATE entries SET amount = amount + 1 WHERE transfer_number = 1 AND n = 0", "add up to 1, not to 0"),
        ("UPDATE entries SET account_number = 99 WHERE transfer_number = 1 AND n = 0", "add up to"),
        ("UPDATE ledger_accounts SET balance = balance + 1 WHERE account = 'user:a:available'", "all balances"),
        ("UPDATE ledger_accounts SET balance = balance + 1 WHERE account = 'network:fees'", "network:fees says 1"),
        ("UPDATE pendings SET remaining = remaining + 1 WHERE pending_id = 'L'", "its open pendings hold"),
        ("UPDATE pendings SET remaining = remaining + 1 WHERE pending_id = 'L'", "pending L says"),
        ("UPDATE pendings SET amount = amount + 1 WHERE pending_id = 'H'", "pending H says"),
        ("UPDATE key_budgets SET committed = committed + 1", "key k has committed 501"),
        ("DELETE FROM transfers WHERE number = 2", "transfers were numbered"),
        ("UPDATE pendings SET expires_ms = -3600001 WHERE pending_id = 'L'", "still open an hour after its time"),
    ],
)
def test_the_check_finds_damage(stored: StoredLedger, damage: str, sentence: str) -> None:
    give(stored, ("a", 1000), ("b", 5))
    stored.apply([Pend("L", "lease", "user:a:available", "user:a:hold", 500, 10**15, key_id="k")])
    stored.apply([Pend("H", "hold", "user:a:hold", "escrow:request", 200, 10**15, parent="L")])
    stored.apply([settlement("w", 0, "L", Charge(1, 0, 1, 0, 0), "o", close=False)])
    stored.apply([ledger.Transfer("back", "test", (("network:fees", -1), ("loss", 1)))])
    assert stored.check() == []
    stored.run(lambda tx: tx.do(damage))
    assert any(sentence in problem for problem in stored.check()), stored.check()


def test_the_database_itself_refuses_a_negative_balance(stored: StoredLedger) -> None:
    give(stored, ("a", 1))
    with pytest.raises(Exception, match=r"(?i)check constraint"):
        stored.run(lambda tx: tx.do("UPDATE ledger_accounts SET balance = -1 WHERE outside = 0"))


def test_gateways_at_the_same_time_spend_nothing_twice(database: Database) -> None:
    """Several stores at once: the same leases, the same settlements, every one in an order of its own."""
    gateways, rounds, users = (4 if database.shared else 1), 12, 3

    async def body() -> None:
        stores = [database.store(wall_clock=Clock()) for _ in range(gateways)]
        for store in stores:
            await store.open([ledger.MIGRATION])

        async def gateway(number: int) -> int:
            taken = 0
            for turn in range(rounds):
                order = list(range(users)) if (number + turn) % 2 else list(range(users))[::-1]
                mine: list[Command] = [credit(f"u{user}", 40, f"credit:{turn}:{user}") for user in order]
                for user in order:
                    source, into = f"user:u{user}:available", f"user:u{user}:hold"
                    lease = f"lease:{number}:{turn}:{user}"
                    mine.append(Pend(lease, "lease", source, into, 15, 10**15, at_least=1, key_id=f"k{user}"))
                    mine.append(settlement(f"w{turn}:{user}", 0, lease, Charge(5, 3, 2, 0, 0), "o", close=True))

                async def action(transaction: Transaction, mine: list[Command] = mine) -> list[Result]:
                    return await apply(transaction, mine)

                results = await stores[number].run(action)
                posts = [result for command, result in zip(mine, results, strict=True) if isinstance(command, Post)]
                taken += sum(isinstance(result, Done) and not result.repeated for result in posts)
            return taken

        won = await asyncio.gather(*(gateway(number) for number in range(gateways)))
        # Each work was paid by exactly one gateway; the others' posts name another lease and are conflicts.
        assert sum(won) == rounds * users
        assert await stores[0].run(check) == []
        balances = await stores[0].run(ledger.balances)
        assert balances["rail:operator:external"] == -40 * rounds * users
        assert balances["provider:o:earned_held"] == 3 * rounds * users
        versions = await stores[0].run(lambda tx: tx.all("SELECT number FROM transfers ORDER BY number"))
        assert all(later[0] - earlier[0] == 1 for earlier, later in pairwise(versions))
        for store in stores:
            await store.close()

    asyncio.run(body())


def test_a_retry_that_overtakes_the_first_call_sees_what_that_one_did(postgres_database: Database) -> None:
    """The second call reads its pendings before the first commits, and its transfers after: it must see both."""

    async def body() -> None:
        store = postgres_database.store(wall_clock=Clock())
        await store.open([ledger.MIGRATION])
        lease = Pend("L", "lease", "user:a:available", "user:a:hold", 50, 10**15, key_id="k")
        hold = Pend("H", "hold", "user:a:hold", "escrow:request", 20, 10**15, parent="L")

        async def prepare(transaction: Transaction) -> list[Result]:
            return await apply(transaction, [credit("a", 100, "c"), lease])

        async def first(transaction: Transaction) -> list[Result]:
            results = await apply(transaction, [hold, Void("v", "L")])
            began.set()
            while not await transaction.one("SELECT 1 FROM pg_locks WHERE NOT granted"):
                pass  # each look is a round trip to a server that has something else to do meanwhile
            return results

        async def second(transaction: Transaction) -> list[Result]:
            return await apply(transaction, [hold, Post("p", "H", "work", (), close=True)])

        began = asyncio.Event()
        await store.run(prepare)
        slow = asyncio.create_task(store.run(first))
        await began.wait()
        assert await store.run(second) == [Done(20, repeated=True), Done(0)]
        assert await slow == [Done(20), Done(30)]
        assert await store.run(lambda tx: ledger.balance(tx, "user:a:available")) == 100
        assert await store.run(check) == []
        await store.close()

    asyncio.run(body())


def test_one_command_sent_many_times_at_once_happens_once(database: Database) -> None:
    async def body() -> None:
        store = database.store(wall_clock=Clock())
        await store.open([ledger.MIGRATION])
        commands: list[Command] = [
            credit("a", 100, "c"),
            Pend("L", "lease", "user:a:available", "user:a:hold", 50, 10**15, key_id="k"),
            settlement("w", 0, "L", Charge(10, 10, 0, 0, 0), "o", close=True),
        ]

        async def action(transaction: Transaction) -> list[Result]:
            return await apply(transaction, commands)

        results: list[Any] = await asyncio.gather(*(store.run(action) for _ in range(20)))
        assert sorted(result[2].repeated for result in results) == [False] + [True] * 19
        assert all([done.amount for done in result] == [100, 50, 10] for result in results)
        assert await store.run(check) == []
        await store.close()

    asyncio.run(body())
