"""What receipts sign and hash, byte by byte, so that anyone can check one with public keys alone. No I/O.

Every hash and signature covers bytes that begin with a domain of its own. Structs are hashed as the MessagePack arrays
that travel on the link, in their shortest form: there is exactly one such encoding of each.

    leaf      one work, or one node's segment of it: hashes of its ids, counts, price, pay
    chain     head_n = H(head_{n-1}, leaf_n), from a head that names network, node, class and period
    statement running totals and the head after leaf `seq`; signed by both sides, each in a domain of its own
    root      a Merkle tree (RFC 6962) over all leaves of a period, signed by the network
    claim     the node's signature over work, class, output and commitment, made before the network adds anything
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from gridmill.wire.identity import Identity, verify
from gridmill.wire.messages import Leaf, Price, Statement

HASH_BYTES = 32

IDS_DOMAIN = b"gridmill receipt ids v1\0"
LEAF_DOMAIN = b"gridmill receipt leaf v1\0"
START_DOMAIN = b"gridmill receipt chain start v1\0"
CHAIN_DOMAIN = b"gridmill receipt chain v1\0"
NETWORK_DOMAIN = b"gridmill receipt statement by network v1\0"
NODE_DOMAIN = b"gridmill receipt statement by node v1\0"
CLAIM_DOMAIN = b"gridmill receipt claim v1\0"
ROOT_DOMAIN = b"gridmill receipt period root v1\0"

_ENCODER = msgspec.msgpack.Encoder()
_LEAF_DECODER = msgspec.msgpack.Decoder(Leaf)
_LEAF_HEAD = b"\xdc\x00" + bytes([len(Leaf.__struct_fields__)])  # MessagePack: an array of so many, 16 bits
_SHORTER_HEAD = b"\xdc\x00" + bytes([len(Leaf.__struct_fields__) - 1])
_STATEMENT_DECODER = msgspec.msgpack.Decoder(Statement)


# ---------------------------------------------------------------- ids


class IdsHash:
    """A running hash over packed ids (`sampling.pack_ids`): feed it as they come, copy it to go on from here.

    The salt, known to the parties alone, keeps others from guessing at short texts.
    """

    __slots__ = ("_hash",)

    def __init__(self, salt: bytes) -> None:
        assert len(salt) < 256
        self._hash = hashlib.sha256(IDS_DOMAIN + bytes((len(salt),)) + salt)

    def update(self, packed_ids: bytes) -> None:
        self._hash.update(packed_ids)

    def copy(self) -> IdsHash:
        twin = IdsHash.__new__(IdsHash)
        twin._hash = self._hash.copy()
        return twin

    def digest(self) -> bytes:
        """The hash of what came so far; more may follow."""
        return self._hash.digest()


def ids_hash(salt: bytes, packed_ids: bytes) -> bytes:
    running = IdsHash(salt)
    running.update(packed_ids)
    return running.digest()


# ---------------------------------------------------------------- leaves and their chain


def leaf_bytes(leaf: Leaf) -> bytes:
    """What is hashed. `replayed_tokens` is left out when it is 0: leaves were hashed before it existed."""
    packed = _ENCODER.encode(leaf)
    if leaf.replayed_tokens:
        return packed
    assert packed[:3] == _LEAF_HEAD and packed[-1] == 0, "an array of all fields, the last of which is a 0"
    return _SHORTER_HEAD + packed[3:-1]


def leaf_from(packed: bytes) -> Leaf:
    """The inverse of `leaf_bytes`. Raises msgspec.MsgspecError."""
    return _LEAF_DECODER.decode(packed)


def leaf_hash(leaf: Leaf) -> bytes:
    return leaf_hash_of(leaf_bytes(leaf))


def leaf_hash_of(packed: bytes) -> bytes:
    """The hash of a leaf that is encoded already."""
    return hashlib.sha256(LEAF_DOMAIN + packed).digest()


def chain_start(
    network_key: bytes, node_key: bytes, class_id: str, period_start_seconds: int, period_seconds: int
) -> bytes:
    """The head before the first leaf."""
    named = _ENCODER.encode((network_key, node_key, class_id, period_start_seconds, period_seconds))
    return hashlib.sha256(START_DOMAIN + named).digest()


def chain_next(head: bytes, hash_of_leaf: bytes) -> bytes:
    return hashlib.sha256(CHAIN_DOMAIN + head + hash_of_leaf).digest()


def works_of(name: str) -> tuple[str, str, str]:
    """A work's id, and the bounds between which those of an answer's choices lie: `NAME-0`, `NAME-1`, …"""
    return name, name + "-", name + "."


def pay_of(price: Price, input_tokens: int, cached_tokens: int, output_tokens: int, replayed_tokens: int = 0) -> int:
    """What a node earns, in nanocredits. `cached_tokens` is part of `input_tokens`, `replayed_tokens` is not."""
    return (
        (input_tokens - cached_tokens + replayed_tokens) * price.input_nanocredits
        + cached_tokens * price.cached_input_nanocredits
        + output_tokens * price.output_nanocredits
    )


def opening(
    network_key: bytes, node_key: bytes, class_id: str, period_start_seconds: int, period_seconds: int
) -> Statement:
    """The statement before the first leaf: no totals. It is never sent."""
    head = chain_start(network_key, node_key, class_id, period_start_seconds, period_seconds)
    return Statement(network_key, node_key, class_id, period_start_seconds, period_seconds, 0, 0, 0, 0, 0, head)


def opening_of(statement: Statement) -> Statement:
    """The opening of the chain that `statement` belongs to."""
    return opening(
        statement.network_key,
        statement.node_key,
        statement.class_id,
        statement.period_start_seconds,
        statement.period_seconds,
    )


def advance(before: Statement, leaves: Sequence[Leaf]) -> Statement:
    """The statement after `leaves`, which follow `before`."""
    head = before.head
    for leaf in leaves:
        head = chain_next(head, leaf_hash(leaf))
    return Statement(
        before.network_key,
        before.node_key,
        before.class_id,
        before.period_start_seconds,
        before.period_seconds,
        before.seq + len(leaves),
        before.input_tokens + sum(leaf.input_tokens for leaf in leaves),
        before.cached_tokens + sum(leaf.cached_tokens for leaf in leaves),
        before.output_tokens + sum(leaf.output_tokens for leaf in leaves),
        before.pay_nanocredits + sum(leaf.pay_nanocredits for leaf in leaves),
        head,
    )


def difference(expected: Statement, said: Statement) -> str | None:
    """In one sentence, what of `said` is not as the leaves make it; None when nothing is."""
    for name in ("input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits"):
        if getattr(expected, name) != getattr(said, name):
            return (
                f"its {name} are {getattr(said, name)}, but its leaves and the totals before make "
                f"{getattr(expected, name)}"
            )
    if expected != said:
        return f"its hash chain does not lead to its head at seq {said.seq}"
    return None


def leaf_problem(leaf: Leaf) -> str | None:
    """In one sentence, what is wrong with a leaf by itself: whether its pay is what its tokens make."""
    if leaf.cached_tokens > leaf.input_tokens:
        return f"counts {leaf.cached_tokens} cached of {leaf.input_tokens} input tokens"
    pay = pay_of(leaf.price, leaf.input_tokens, leaf.cached_tokens, leaf.output_tokens, leaf.replayed_tokens)
    if leaf.pay_nanocredits != pay:
        return f"pays {leaf.pay_nanocredits} nanocredits, but its tokens at its price make {pay}"
    return None


# ---------------------------------------------------------------- what is signed


def statement_bytes(statement: Statement) -> bytes:
    """The encoding that both domains cover, and that databases keep."""
    return _ENCODER.encode(statement)


def statement_from(packed: bytes) -> Statement:
    """The inverse of `statement_bytes`. Raises msgspec.MsgspecError."""
    return _STATEMENT_DECODER.decode(packed)


def sign_as_network(identity: Identity, statement: Statement) -> bytes:
    return identity.sign(NETWORK_DOMAIN + statement_bytes(statement))


def sign_as_node(identity: Identity, statement: Statement) -> bytes:
    return identity.sign(NODE_DOMAIN + statement_bytes(statement))


def signed_by_network(statement: Statement, signature: bytes) -> bool:
    return verify(statement.network_key, NETWORK_DOMAIN + statement_bytes(statement), signature)


def signed_by_node(statement: Statement, signature: bytes) -> bool:
    return verify(statement.node_key, NODE_DOMAIN + statement_bytes(statement), signature)


def claim_bytes(work_id: str, epoch: int, class_id: str, output_hash: bytes, commit_root: bytes) -> bytes:
    """What a node signs at the end of each work. `commit_root` is empty where the engine commits to nothing."""
    return CLAIM_DOMAIN + _ENCODER.encode((work_id, epoch, class_id, output_hash, commit_root))


def claim_holds(leaf: Leaf, node_key: bytes, class_id: str) -> bool:
    """Whether the leaf's claim is the node's, over just the output that the leaf names. It is not where the network
    counted fewer ids than the node did, such as those that reached a reader who left."""
    claimed = claim_bytes(leaf.work_id, leaf.epoch, class_id, leaf.output_hash, leaf.commit_root)
    return verify(node_key, claimed, leaf.claim)


def period_root_bytes(
    network_key: bytes, period_start_seconds: int, period_seconds: int, leaves: int, root: bytes
) -> bytes:
    """What the network signs when a period is over. `leaves` is how many the tree has."""
    return ROOT_DOMAIN + _ENCODER.encode((network_key, period_start_seconds, period_seconds, leaves, root))


# ---------------------------------------------------------------- the tree of a period (RFC 6962, section 2.1)


def merkle_entry(node_key: bytes, class_id: str, seq: int, hash_of_leaf: bytes) -> bytes:
    """The tree's leaf hash of one receipt. Entries are ordered by (node id, class id, seq)."""
    return hashlib.sha256(b"\0" + _ENCODER.encode((node_key, class_id, seq, hash_of_leaf))).digest()


def merkle_root(entries: Sequence[bytes]) -> bytes:
    """The root over entries made by `merkle_entry`; of none, the hash of nothing."""
    if not entries:
        return hashlib.sha256().digest()
    level = list(entries)
    while len(level) > 1:
        level = _level_above(level)
    return level[0]


class MerkleTree:
    """All levels of a tree, for many proofs."""

    def __init__(self, entries: Sequence[bytes]) -> None:
        self._levels = [list(entries)]
        while len(self._levels[-1]) > 1:
            self._levels.append(_level_above(self._levels[-1]))

    @property
    def root(self) -> bytes:
        return self._levels[-1][0] if self._levels[0] else merkle_root(())

    def proof(self, index: int) -> tuple[bytes, ...]:
        """The neighbours on the way from entry `index` to the root, lowest first."""
        assert 0 <= index < len(self._levels[0])
        path = []
        for level in self._levels[:-1]:
            neighbour = index ^ 1
            if neighbour < len(level):
                path.append(level[neighbour])
            index >>= 1
        return tuple(path)


def merkle_included(entry: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether `entry` stands at `index` in the tree of `size` entries with this root."""
    if not 0 <= index < size:
        return False
    steps = list(path)
    found, last = entry, size - 1
    while last:
        if index & 1 or index < last:
            if not steps:
                return False
            neighbour = steps.pop(0)
            found = _inner(neighbour, found) if index & 1 else _inner(found, neighbour)
        index, last = index >> 1, last >> 1
    return not steps and found == root


def _level_above(level: Sequence[bytes]) -> list[bytes]:
    """Pairs joined; an odd last one moves up as it is, which is the shape that RFC 6962 defines."""
    above = [_inner(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    if len(level) % 2:
        above.append(level[-1])
    return above


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
