"""What receipts hash and sign: equal for equal facts, different for different ones, and provable by tree."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import LEAF

from gridmill.wire import receipts
from gridmill.wire.identity import Identity

NODE, NETWORK = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)


@given(salt=st.binary(max_size=32), pieces=st.lists(st.binary(max_size=40), max_size=8))
def test_a_running_hash_is_the_hash_of_the_whole_and_its_copy_goes_its_own_way(
    salt: bytes, pieces: list[bytes]
) -> None:
    running = receipts.IdsHash(salt)
    for piece in pieces:
        before = running.copy()
        running.update(piece)
        before.update(b"else")
    assert running.digest() == receipts.ids_hash(salt, b"".join(pieces))


def test_a_salt_is_not_taken_for_ids() -> None:
    assert receipts.ids_hash(b"\1\2", b"\3\4") != receipts.ids_hash(b"\1\2\3", b"\4")


@pytest.mark.parametrize("name", LEAF.__struct_fields__)
def test_every_field_of_a_leaf_changes_its_hash(name: str) -> None:
    value: Any = getattr(LEAF, name)
    match value:
        case int():
            value += 1
        case str():
            value += "x"
        case bytes():
            value = bytes(32) if not value else value[:-1] + bytes([value[-1] ^ 1])
        case _:
            value = msgspec.structs.replace(value, output_nanocredits=value.output_nanocredits + 1)
    other = msgspec.structs.replace(LEAF, **{name: value})
    assert receipts.leaf_hash(other) != receipts.leaf_hash(LEAF)
    assert receipts.leaf_from(receipts.leaf_bytes(other)) == other


def test_a_statement_is_signed_by_each_side_in_its_own_domain() -> None:
    first = receipts.opening(NETWORK.public, NODE.public, "e" * 64, 0, 86_400)
    statement = receipts.advance(first, [LEAF, LEAF])
    assert statement.seq == 2 and statement.pay_nanocredits == 2 * LEAF.pay_nanocredits
    assert receipts.opening_of(statement) == first
    ours, theirs = receipts.sign_as_network(NETWORK, statement), receipts.sign_as_node(NODE, statement)
    assert receipts.signed_by_network(statement, ours) and receipts.signed_by_node(statement, theirs)
    assert not receipts.signed_by_network(statement, theirs) and not receipts.signed_by_node(statement, ours)
    same = Identity(bytes([1]) * 32)
    both = msgspec.structs.replace(statement, network_key=same.public)
    assert not receipts.signed_by_node(both, receipts.sign_as_network(same, both)), "one key, two roles, two domains"


def test_what_is_wrong_with_totals_is_named() -> None:
    first = receipts.opening(NETWORK.public, NODE.public, "e" * 64, 0, 86_400)
    said = receipts.advance(first, [LEAF])
    assert receipts.difference(said, said) is None
    dearer = msgspec.structs.replace(said, pay_nanocredits=said.pay_nanocredits + 1)
    assert "pay_nanocredits" in (receipts.difference(said, dearer) or "")
    assert "hash chain" in (receipts.difference(said, msgspec.structs.replace(said, head=bytes(32))) or "")


def test_what_is_wrong_with_a_leaf_is_named() -> None:
    assert receipts.leaf_problem(LEAF) is None
    for changed, word in (
        ({"pay_nanocredits": LEAF.pay_nanocredits + 1}, "pays"),
        ({"cached_tokens": LEAF.input_tokens + 1}, "cached"),
    ):
        problem = receipts.leaf_problem(msgspec.structs.replace(LEAF, **changed))
        assert problem is not None and word in problem


def test_a_claim_is_over_one_output_of_one_work_in_one_class() -> None:
    claim = NODE.sign(receipts.claim_bytes(LEAF.work_id, LEAF.epoch, "e" * 64, LEAF.output_hash, LEAF.commit_root))
    fine = msgspec.structs.replace(LEAF, claim=claim)
    assert receipts.claim_holds(fine, NODE.public, "e" * 64)
    assert not receipts.claim_holds(fine, NODE.public, "f" * 64)
    assert not receipts.claim_holds(fine, NETWORK.public, "e" * 64)
    for changed in ({"claim": bytes(64)}, {"output_hash": bytes(32)}, {"work_id": "work-2"}, {"epoch": 2}):
        assert not receipts.claim_holds(msgspec.structs.replace(fine, **changed), NODE.public, "e" * 64)


def reference_root(entries: list[bytes]) -> bytes:
    """RFC 6962 §2.1 as written: split at the largest power of two below n."""
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return entries[0]
    split = 1
    while split * 2 < len(entries):
        split *= 2
    return hashlib.sha256(b"\1" + reference_root(entries[:split]) + reference_root(entries[split:])).digest()


@settings(max_examples=60)
@given(size=st.integers(0, 70))
def test_the_tree_is_that_of_rfc_6962_and_proves_each_entry_at_its_place_alone(size: int) -> None:
    entries = [receipts.merkle_entry(NODE.public, "e" * 64, n, bytes(32)) for n in range(size)]
    tree = receipts.MerkleTree(entries)
    assert tree.root == receipts.merkle_root(entries) == reference_root(entries)
    for index, entry in enumerate(entries):
        path = tree.proof(index)
        assert receipts.merkle_included(entry, index, size, path, tree.root)
        assert not receipts.merkle_included(entry, index, size, (*path, bytes(32)), tree.root)
        assert not receipts.merkle_included(bytes(32), index, size, path, tree.root)
        if path:
            assert not receipts.merkle_included(entry, index, size, path[:-1], tree.root)
            assert not receipts.merkle_included(entry, index ^ 1, size, path, tree.root)
        assert not receipts.merkle_included(entry, index + size, size, path, tree.root)
