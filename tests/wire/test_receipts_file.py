"""A file of receipts is checked by public keys alone, and whatever was done to one is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.wire import receipts as rules
from gridmill.wire import receipts_file
from gridmill.wire.identity import Identity, node_id_of
from gridmill.wire.messages import Leaf, Price, Statement
from gridmill.wire.receipts_file import Found, Line, check, compare, written

NETWORK = Identity(b"n" * 32)
NODES = (Identity(b"o" * 32), Identity(b"p" * 32))
CLASSES = ("ab" * 32, "cd" * 32)
START, SECONDS = 1_699_920_000, 86_400
PRICE = Price(50, 10, 400)


def leaf(number: int, node: Identity, class_id: str, **changed: Any) -> Leaf:
    output_hash = rules.ids_hash(b"salt", bytes([number, 0, 0, 0]))
    made = Leaf(
        work_id=f"work-{number}",
        epoch=0,
        start=0,
        prompt_hash=rules.ids_hash(b"salt", b""),
        output_hash=output_hash,
        input_tokens=10 + number,
        cached_tokens=number % 3,
        output_tokens=1,
        price_id="price-1",
        price=PRICE,
        pay_nanocredits=rules.pay_of(PRICE, 10 + number, number % 3, 1),
        charge_nanocredits=5000 + number,
        started_ms=START * 1000,
        ended_ms=START * 1000 + number,
        finish="stop",
        commit_root=b"",
        claim=node.sign(rules.claim_bytes(f"work-{number}", 0, class_id, output_hash, b"")),
    )
    return msgspec.structs.replace(made, **changed)


class Books:
    """Leaves of two nodes and two classes, in statements of up to three leaves."""

    def __init__(self, leaves: int = 20, change: Callable[[Leaf], Leaf] = lambda leaf: leaf) -> None:
        self.chains: dict[tuple[int, int], list[tuple[Statement, list[Leaf]]]] = {}
        number = 0
        while number < leaves:
            key = number % 2, number // 2 % 2
            batch = []
            for _ in range(1 + number % 3):
                if number < leaves:
                    batch.append(change(leaf(number, NODES[key[0]], CLASSES[key[1]])))
                    number += 1
            chain = self.chains.setdefault(key, [])
            before = (
                chain[-1][0]
                if chain
                else rules.opening(NETWORK.public, NODES[key[0]].public, CLASSES[key[1]], START, SECONDS)
            )
            chain.append((rules.advance(before, batch), batch))

    def ordered(self) -> list[tuple[int, int]]:
        return sorted(self.chains, key=lambda key: (node_id_of(NODES[key[0]].public), CLASSES[key[1]]))

    def entries(self) -> list[tuple[Statement, int, Leaf]]:
        return [
            (rules.opening_of(self.chains[key][0][0]), seq, made)
            for key in self.ordered()
            for seq, made in enumerate((one for _, batch in self.chains[key] for one in batch), 1)
        ]

    def tree(self) -> rules.MerkleTree:
        return rules.MerkleTree(
            [
                rules.merkle_entry(opening.node_key, opening.class_id, seq, rules.leaf_hash(made))
                for opening, seq, made in self.entries()
            ]
        )

    def root(self) -> Line:
        tree, count = self.tree(), len(self.entries())
        signature = NETWORK.sign(rules.period_root_bytes(NETWORK.public, START, SECONDS, count, tree.root))
        return receipts_file.root_line(NETWORK.public, START, SECONDS, count, tree.root, signature)

    def lines(self, by: str = "network", node: int | None = None, signed: bool = True) -> list[Line]:
        key = NODES[node].public if node is not None else b""
        lines = [receipts_file.header(by=by, network_key=NETWORK.public, node_key=key)]
        if node is None:
            lines.append(self.root())
        for chain_key in self.ordered():
            if node not in (None, chain_key[0]):
                continue
            chain = self.chains[chain_key]
            lines.append(receipts_file.chain_line(rules.opening_of(chain[0][0])))
            seq = 0
            for statement, batch in chain:
                for made in batch:
                    seq += 1
                    lines.append(receipts_file.leaf_line(seq, made, b"salt"))
                node_key = NODES[chain_key[0]]
                lines.append(
                    receipts_file.statement_line(
                        statement,
                        rules.sign_as_network(NETWORK, statement),
                        rules.sign_as_node(node_key, statement) if signed else b"",
                        "",
                    )
                )
        return lines

    def account(self, closed: bool = True) -> list[Line]:
        tree = self.tree()
        return [
            receipts_file.header(by="network", network_key=NETWORK.public, account="account-1"),
            *([self.root()] if closed else []),
            *(
                receipts_file.entry_line(opening, seq, made, i if closed else -1, tree.proof(i) if closed else ())
                for i, (opening, seq, made) in enumerate(self.entries())
                if i % 3 == 0
            ),
        ]


def checked(lines: list[Line], **how: Any) -> Found:
    return check("a.jsonl", list(written(lines)), **how)


def sentences(found: Found) -> str:
    return "\n".join(str(problem) for problem in found.problems)


def leaves_of(lines: list[Line]) -> list[int]:
    return [i for i, line in enumerate(lines) if line["kind"] == "leaf"]


# ---------------------------------------------------------------- sound files


@pytest.mark.parametrize("lines", [Books().lines(), Books().lines(by="node", node=1), Books().account()])
def test_an_honest_file_is_sound(lines: list[Line]) -> None:
    found = checked(lines, network_key=NETWORK.public, strict=True)
    assert not found.problems, sentences(found)
    assert found.leaves > 5 and found.pay_nanocredits > 0


def test_what_is_not_countersigned_is_counted_and_wrong_only_when_strict() -> None:
    lines = Books().lines(signed=False)
    found = checked(lines)
    assert not found.problems and found.leaves_not_countersigned == found.leaves == 20
    assert "not countersigned" in sentences(checked(lines, strict=True))
    last_signed = Books().lines()
    for line in [line for line in last_signed if line["kind"] == "statement"][:1]:
        line["node_signature"] = ""  # a later one covers it
    assert checked(last_signed).leaves_not_countersigned == 0


def test_an_open_period_is_counted_and_wrong_only_when_strict() -> None:
    lines = Books().account(closed=False)
    found = checked(lines)
    assert not found.problems and found.unproven == found.leaves
    assert "no root" in sentences(checked(lines, strict=True))


def test_a_node_that_lost_its_record_has_a_file_that_says_so() -> None:
    lines = Books().lines(by="node", node=0)
    first = leaves_of(lines)[0]
    statement = next(i for i, line in enumerate(lines) if line["kind"] == "statement")
    found = checked(lines[:first] + lines[statement + 1 :])
    assert not found.problems, sentences(found)
    assert "lost its record" in found.notes[0]


# ---------------------------------------------------------------- files that somebody changed


FILE = b"".join(written(Books(12).lines()))
ACCOUNT_FILE = b"".join(written(Books(12).account()))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), whole=st.sampled_from([FILE, ACCOUNT_FILE]))
def test_every_flipped_bit_is_named(data: st.DataObject, whole: bytes) -> None:
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    found = check("a.jsonl", bytes(flipped).splitlines(keepends=True))
    assert found.problems
    line = whole[: bit // 8].count(b"\n") + 1
    if flipped.count(b"\n") == whole.count(b"\n"):
        assert any(problem.line == line for problem in found.problems) or "SHA-256" in sentences(found)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_a_flipped_bit_in_what_is_signed_is_named_also_when_the_file_is_written_anew(seed: int) -> None:
    """Whoever changes a file can also repair its end; what remains are signatures and hashes."""
    chance = random.Random(seed)
    lines = json.loads(json.dumps(Books(12).lines()))
    line = lines[chance.choice(range(1, len(lines)))]
    holder = line["leaf"] if line["kind"] == "leaf" and chance.random() < 0.8 else line
    name = chance.choice([name for name in holder if name not in ("kind", "leaf", "salt", "remark")])
    value = holder[name]
    if isinstance(value, int):
        holder[name] = value ^ 1 << chance.randrange(20)
    elif isinstance(value, dict):
        inner = chance.choice(list(value))
        value[inner] ^= 1 << chance.randrange(20)
    elif value:
        at = chance.randrange(len(value))
        holder[name] = value[:at] + ("0" if value[at] != "0" else "1") + value[at + 1 :]
    else:
        holder[name] = "00"
    found = checked(lines)
    assert found.problems, (line["kind"], name)
    assert "SHA-256" not in sentences(found)


def test_a_missing_leaf_is_named_by_its_number() -> None:
    lines = Books().lines()
    gone = leaves_of(lines)[3]
    seq = lines[gone]["seq"]
    assert f"leaf {seq} is missing" in sentences(checked(lines[:gone] + lines[gone + 1 :]))


def test_a_missing_statement_is_not_missed_but_missing_leaves_at_the_end_are() -> None:
    lines = Books().lines(by="node", node=0)
    statements = [i for i, line in enumerate(lines) if line["kind"] == "statement"]
    assert not checked(lines[: statements[0]] + lines[statements[0] + 1 :]).problems, "the next one covers its leaves"
    assert "covered by no statement" in sentences(checked(lines[: statements[-1]]))


def test_swapped_leaves_are_named() -> None:
    lines = Books().lines()
    chain = next(i for i in leaves_of(lines) if lines[i + 1]["kind"] == "leaf")
    swapped = list(lines)
    swapped[chain], swapped[chain + 1] = lines[chain + 1], lines[chain]
    assert "missing before leaf" in sentences(checked(swapped))
    assert "not in their order" in sentences(checked(swapped))
    renumbered = json.loads(json.dumps(swapped))
    renumbered[chain]["seq"], renumbered[chain + 1]["seq"] = lines[chain]["seq"], lines[chain + 1]["seq"]
    found = sentences(checked(renumbered))
    assert "hash chain does not lead to its head at seq" in found and "root of period" in found


def test_a_repeated_leaf_is_named() -> None:
    lines = Books().lines()
    at = leaves_of(lines)[2]
    assert "twice" in sentences(checked([*lines[: at + 1], lines[at], *lines[at + 1 :]]))


def test_a_work_that_is_receipted_twice_is_named_though_both_sides_signed() -> None:
    lines = Books(change=lambda one: msgspec.structs.replace(one, work_id="work-1", claim=b"")).lines()
    assert "receipted twice" in sentences(checked(lines))


def test_pay_that_is_not_what_the_price_makes_is_named_though_both_sides_signed() -> None:
    books = Books(change=lambda one: msgspec.structs.replace(one, pay_nanocredits=one.pay_nanocredits + 1))
    found = checked(books.lines())
    assert "at its price make" in sentences(found)
    assert len(found.problems) == 20, "each leaf once, and nothing else: totals and signatures agree"


def test_a_claim_over_another_output_is_counted_and_wrong_only_when_strict() -> None:
    lines = Books(change=lambda one: msgspec.structs.replace(one, claim=bytes(64))).lines()
    found = checked(lines)
    assert not found.problems and found.claims_wrong == 20
    assert "claim that is not over" in sentences(checked(lines, strict=True))


def test_a_root_that_leaves_out_a_leaf_is_named() -> None:
    books, short = Books(), Books(19)
    lines = [short.root() if line["kind"] == "root" else line for line in books.lines()]
    assert "root of period" in sentences(checked(lines))


def test_a_proof_of_another_leaf_is_named() -> None:
    lines = Books().account()
    lines[2]["path"], lines[3]["path"] = lines[3]["path"], lines[2]["path"]
    assert sentences(checked(lines)).count("not in the tree") == 2


def test_a_dispute_is_a_problem() -> None:
    lines = Books().lines()
    statement = next(line for line in lines if line["kind"] == "statement")
    statement["node_signature"], statement["remark"] = "", "leaf 1 pays too little"
    found = checked(lines)
    assert found.disputed == 1 and "disputes the statement" in sentences(found)
    books = Books()
    mine = books.lines(by="node", node=0)
    last = [key for key in books.ordered() if key[0] == 0][-1]
    disputed = rules.advance(books.chains[last][-1][0], [leaf(99, NODES[0], CLASSES[last[1]])])
    mine.append(receipts_file.dispute_line(disputed, rules.sign_as_network(NETWORK, disputed), "not mine"))
    assert [problem.sentence for problem in checked(mine).problems] == [
        f"the node disputes the statement at seq {disputed.seq}: not mine"
    ]


def test_a_file_of_somebody_else_is_named() -> None:
    stranger = Identity(b"s" * 32).public
    assert "another network" in sentences(checked(Books().lines(), network_key=stranger))
    assert "another node" in sentences(checked(Books().lines(by="node", node=0), node_key=NODES[1].public))


@pytest.mark.parametrize("cut", [1, 2, 500, 5000])
def test_a_file_that_was_cut_is_named(cut: int) -> None:
    assert check("a.jsonl", FILE[:-cut].splitlines(keepends=True)).problems


def test_an_empty_file_and_a_wrong_file_are_named() -> None:
    assert "cut off" in sentences(check("a.jsonl", []))
    assert "not as Gridmill writes it" in sentences(check("a.jsonl", [b"\xff\xfe", b"{" * 100_000, b"[1]\n"]))


STRANGER = Identity(b"s" * 32)


def forged(output_tokens: int, name: str = "forged") -> Leaf:
    """A leaf that nobody has signed; its pay is what its tokens make."""
    pay = rules.pay_of(PRICE, 10, 0, output_tokens)
    return leaf(*(0, NODES[0], CLASSES[0]), work_id=name, output_tokens=output_tokens, pay_nanocredits=pay, claim=b"")


def chain_of_one(network: Identity, *leaves: Leaf) -> list[Line]:
    before = rules.opening(network.public, NODES[0].public, CLASSES[0], START, SECONDS)
    after = rules.advance(before, leaves)
    return [
        receipts_file.chain_line(before),
        *(receipts_file.leaf_line(seq, made) for seq, made in enumerate(leaves, 1)),
        receipts_file.statement_line(after, rules.sign_as_network(network, after), b"", ""),
    ]


def test_a_strangers_receipts_under_the_name_of_a_network_are_named() -> None:
    lines = [receipts_file.header(by="network", network_key=NETWORK.public), *chain_of_one(STRANGER, forged(10**9))]
    assert "another network" in sentences(checked(lines))


def test_a_proof_against_another_networks_root_is_named() -> None:
    opening = rules.opening(NETWORK.public, NODES[0].public, CLASSES[0], START, SECONDS)
    root = rules.merkle_root([rules.merkle_entry(NODES[0].public, CLASSES[0], 1, rules.leaf_hash(forged(1)))])
    signature = STRANGER.sign(rules.period_root_bytes(STRANGER.public, START, SECONDS, 1, root))
    for name in (NETWORK.public, b""):  # also where the header names no network
        lines = [
            receipts_file.header(by="network", network_key=name, account="account-1"),
            receipts_file.root_line(STRANGER.public, START, SECONDS, 1, root, signature),
            receipts_file.entry_line(opening, 1, forged(1), 0, ()),
        ]
        assert "the root of its period is not in the file" in sentences(checked(lines))


def test_a_second_root_of_a_period_is_named_though_the_network_signed_it() -> None:
    lines = Books().lines()
    assert "had its root before" in sentences(checked([lines[0], Books(19).root(), *lines[1:]]))


def test_a_forged_leaf_after_a_gap_cannot_say_more_than_the_signed_totals_and_is_counted() -> None:
    lines = json.loads(json.dumps(Books().lines(by="node", node=0)))
    first = leaves_of(lines)[0]
    statement = next(i for i, line in enumerate(lines) if line["kind"] == "statement")
    lines = lines[:first] + lines[statement + 1 :]
    lines[first]["leaf"] = receipts_file.leaf_object(forged(10**9))
    assert "its leaves alone make" in sentences(checked(lines))
    lines[first]["leaf"] = receipts_file.leaf_object(forged(0))
    found = checked(lines)
    assert not found.problems and found.unchained > 0
    assert "no hash chain covers them" in sentences(checked(lines, strict=True))


def test_a_leaf_below_zero_that_lowers_the_totals_is_named_though_the_network_signed_it() -> None:
    lines = [
        receipts_file.header(by="network", network_key=NETWORK.public, node_key=NODES[0].public),
        *chain_of_one(NETWORK, forged(100), forged(-5, "negative")),
    ]
    assert "output_tokens" in sentences(checked(lines))


def test_a_file_that_says_it_is_about_another_period_than_its_lines_is_named() -> None:
    for lines in (Books().lines(), Books().lines(by="node", node=0), Books().account()):
        lines[0]["period_start_seconds"] = START + SECONDS
        assert "the file is about period" in sentences(checked(lines))


# ---------------------------------------------------------------- two files


def test_the_files_of_both_sides_agree() -> None:
    books = Books()
    network, node = checked(books.lines()), checked(books.lines(by="node", node=1))
    assert compare(network, node) == compare(node, network) == []


def test_where_two_files_differ_is_named_leaf_by_leaf_and_total_by_total() -> None:
    def dearer(one: Leaf) -> Leaf:
        return msgspec.structs.replace(one, charge_nanocredits=7) if one.work_id == "work-0" else one

    def longer(one: Leaf) -> Leaf:
        if one.work_id != "work-0":
            return one
        pay = rules.pay_of(PRICE, one.input_tokens + 1, one.cached_tokens, one.output_tokens)
        return msgspec.structs.replace(one, input_tokens=one.input_tokens + 1, pay_nanocredits=pay)

    mine = checked(Books().lines(by="node", node=0))
    (other,) = [p for p in compare(mine, checked(Books(change=dearer).lines())) if "head" not in p.sentence]
    assert "leaf 1 differs" in other.sentence and "in charge_nanocredits" in other.sentence
    found = "\n".join(map(str, compare(mine, checked(Books(change=longer).lines()))))
    assert "in input_tokens, pay_nanocredits" in found and "the last pay_nanocredits" in found


def test_leaves_that_one_side_lacks_are_named() -> None:
    longer, shorter = checked(Books(20).lines(by="node", node=0)), checked(Books(15).lines())
    assert any("ends with leaf" in problem.sentence for problem in compare(longer, shorter))
    nothing = checked([receipts_file.header(by="node", network_key=NETWORK.public, node_key=NODES[0].public)])
    assert any("nothing is here" in problem.sentence for problem in compare(nothing, shorter))
