"""Receipts as a file that anyone can check offline: JSON lines, written by a network or a node.

    header     who wrote it, about what
    root       a closed period: the signed root of the tree over all its leaves
    chain      from here on: one node, class and period
    leaf       the chain's next leaf
    statement  totals and head after the leaves so far, with the signatures of both sides
    dispute    in a node's file: a statement that the network signed and the node does not accept
    entry      in an account's file: one leaf of any chain, with its way to the root
    end        how many lines came before, and their SHA-256

Bytes are lower-case hexadecimal. There is one way to write each line, so that no flipped bit can hide in one.
`check` names what is wrong in one sentence each, with the line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gridmill.wire import codec
from gridmill.wire import receipts as rules
from gridmill.wire.identity import node_id_of, verify
from gridmill.wire.messages import Leaf, Price, Receipts, SignedStatement, Statement

FORMAT = 1
LINE_BYTES_MAX = 64 << 10  # an entry with the longest names and a proof of 63 steps has under 8 KiB
PROBLEMS_MAX = 1000  # a file with more is not worth reading on
EVERY_PERIOD = -1
NO_RECORD = "no_record"

Line = dict[str, Any]

# ---------------------------------------------------------------- writing


def header(
    *, by: str, network_key: bytes, node_key: bytes = b"", account: str = "", period: int = EVERY_PERIOD
) -> Line:
    """`by` is network or node. `period` is where the one period begins that the file is about."""
    return {
        "kind": "header",
        "format": FORMAT,
        "by": by,
        "network_key": network_key.hex(),
        "node_key": node_key.hex(),
        "account": account,
        "period_start_seconds": period,
    }


def chain_line(opening: Statement) -> Line:
    return {"kind": "chain", **_chain_facts(opening)}


def leaf_line(seq: int, leaf: Leaf, salt: bytes | None = None) -> Line:
    line = {"kind": "leaf", "seq": seq, "leaf": leaf_object(leaf)}
    return line if salt is None else {**line, "salt": salt.hex()}


def statement_line(statement: Statement, network_signature: bytes, node_signature: bytes, remark: str) -> Line:
    return {
        "kind": "statement",
        **{name: _plain(getattr(statement, name)) for name in _STATEMENT_TOTALS},
        "network_signature": network_signature.hex(),
        "node_signature": node_signature.hex(),
        "remark": remark,
    }


def dispute_line(statement: Statement, network_signature: bytes, remark: str) -> Line:
    return {
        "kind": "dispute",
        **{name: _plain(getattr(statement, name)) for name in _STATEMENT_TOTALS},
        "network_signature": network_signature.hex(),
        "remark": remark,
    }


def root_line(network_key: bytes, start: int, seconds: int, leaves: int, root: bytes, signature: bytes) -> Line:
    return {
        "kind": "root",
        "network_key": network_key.hex(),
        "period_start_seconds": start,
        "period_seconds": seconds,
        "leaves": leaves,
        "root": root.hex(),
        "signature": signature.hex(),
    }


def entry_line(
    opening: Statement, seq: int, leaf: Leaf, index: int, path: Sequence[bytes], salt: bytes | None = None
) -> Line:
    """`index` is the leaf's place in its period's tree, -1 while the period is open."""
    line = {
        "kind": "entry",
        **_chain_facts(opening),
        "seq": seq,
        "leaf": leaf_object(leaf),
        "index": index,
        "path": [step.hex() for step in path],
    }
    return line if salt is None else {**line, "salt": salt.hex()}


def leaf_object(leaf: Leaf) -> Line:
    names = Leaf.__struct_fields__ if leaf.replayed_tokens else _LEAF_FIELDS
    return {name: _plain(getattr(leaf, name)) for name in names}


def written(lines: Iterable[Line]) -> Iterator[bytes]:
    """The bytes of a file of these lines, its end included."""
    count, digest = 0, hashlib.sha256()
    for line in lines:
        raw = _encoded(line)
        count += 1
        digest.update(raw)
        yield raw
    yield _encoded({"kind": "end", "lines": count, "sha256": digest.hexdigest()})


_CHAIN_FACTS = ("network_key", "node_key", "class_id", "period_start_seconds", "period_seconds")
_STATEMENT_TOTALS = ("seq", "input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits", "head")


def _chain_facts(opening: Statement) -> Line:
    return {name: _plain(getattr(opening, name)) for name in _CHAIN_FACTS}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Price):
        return {name: getattr(value, name) for name in Price.__struct_fields__}
    return value


def _encoded(line: Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"


# ---------------------------------------------------------------- what a check found


class Problem(msgspec.Struct, frozen=True):
    """What is wrong, in one sentence. `line` counts from 1; 0 is the whole file."""

    file: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.sentence}" if self.line else f"{self.file}: {self.sentence}"


@dataclass
class Chain:
    """One chain as a file has it."""

    opening: Statement
    leaves: dict[int, tuple[bytes, int]] = field(default_factory=dict)  # seq → leaf as MessagePack, line
    last: Statement | None = None
    countersigned_seq: int = 0

    @property
    def name(self) -> str:
        start = self.opening.period_start_seconds
        return f"{node_id_of(self.opening.node_key)}, class {self.opening.class_id[:8]}, period {start}"


@dataclass
class Found:
    """All that a file says, and all that is wrong with it."""

    file: str
    by: str = ""
    account: str = ""
    node_key: bytes = b""
    period: int = EVERY_PERIOD
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chains: dict[bytes, Chain] = field(default_factory=dict)
    leaves: int = 0
    pay_nanocredits: int = 0
    charge_nanocredits: int = 0
    disputed: int = 0
    unproven: int = 0  # entries whose period is open
    unchained: int = 0  # leaves after a gap: the totals over them are signed, and what they say is not
    roots: int = 0
    claims_wrong: int = 0  # not over the output that was counted, which is no matter of money

    @property
    def leaves_not_countersigned(self) -> int:
        return sum(sum(seq > chain.countersigned_seq for seq in chain.leaves) for chain in self.chains.values())


class _Wrong(Exception):
    """One sentence about the line that is being read."""


# ---------------------------------------------------------------- checking


def check(
    name: str,
    lines: Iterable[bytes],
    *,
    network_key: bytes | None = None,
    node_key: bytes | None = None,
    strict: bool = False,
) -> Found:
    """Reads a file from its first line to its last and checks all that its keys can prove.

    `network_key` and `node_key` are those that the file should be about; without them, those that its header names.
    `strict` makes leaves without a countersignature or after a gap, entries without a root, and claims over another
    output problems too.
    """
    reader = _Reader(Found(name), network_key, node_key)
    for number, raw in enumerate(lines, 1):
        reader.line = number
        try:
            reader.read(raw)
        except _Wrong as wrong:
            reader.say(str(wrong))
        if len(reader.found.problems) >= PROBLEMS_MAX:
            reader.say("there are more problems than are worth listing")
            return reader.found
    reader.finish()
    found = reader.found
    if strict and found.leaves_not_countersigned:
        reader.say(f"{found.leaves_not_countersigned} leaves are not countersigned by their node", whole=True)
    if strict and found.claims_wrong:
        reader.say(f"{found.claims_wrong} leaves carry a claim that is not over their output", whole=True)
    if strict and found.unchained:
        reader.say(f"{found.unchained} leaves follow a gap, so that no hash chain covers them", whole=True)
    if strict and found.unproven:
        reader.say(f"{found.unproven} leaves are of periods that have no root yet", whole=True)
    return found


class _Reader:
    def __init__(self, found: Found, network_key: bytes | None, node_key: bytes | None) -> None:
        self.found = found
        self.line = 0
        self._network_key = network_key
        self._node_key = node_key
        self._digest = hashlib.sha256()
        self._ended = False
        self._chain: Chain | None = None
        self._before: Statement | None = None  # None after a gap, until the next statement
        self._since: list[Leaf] = []
        self._next_seq = 1
        self._works: dict[tuple[bytes, str, int], int] = {}
        self._roots: dict[tuple[bytes, int, int], tuple[int, bytes, int]] = {}
        self._unread = False  # a line of this chain could not be read
        self._refused = False  # the chain's own line was wrong, which was said: its other lines need no sentence each

    def say(self, sentence: str, *, whole: bool = False) -> None:
        self.found.problems.append(Problem(self.found.file, 0 if whole else self.line, sentence))

    def read(self, raw: bytes) -> None:
        if self._ended:
            raise _Wrong("it comes after the end of the file")
        line = _decoded(raw)
        kind = line.get("kind") if line is not None else None
        if kind != "end":
            self._digest.update(raw)
        if line is None or _encoded(line) != raw:
            self._unread = True
            raise _Wrong("it is not as Gridmill writes it: the file was changed or damaged here")
        if (kind == "header") != (self.line == 1):
            raise _Wrong("a header is the first line, and nothing else is")
        if self._refused and kind in ("leaf", "statement", "dispute"):
            return
        match kind:
            case "header":
                self._header(line)
            case "root":
                self._root(line)
            case "chain":
                self._begin(line)
            case "leaf":
                self._leaf(line)
            case "statement":
                self._statement(line)
            case "dispute":
                self._dispute(line)
            case "entry":
                self._entry(line)
            case "end":
                self._end(line)
            case _:
                self._unread = True
                raise _Wrong(f"no line of this format is of kind {kind!r}")

    def finish(self) -> None:
        self._close_chain()
        if not self._ended:
            self.say("the file is cut off: its last line is missing", whole=True)
        if self.found.by == "network" and not self.found.account and not self.found.node_key:
            self._check_roots()

    # ------------------------------------------------------------ lines

    def _header(self, line: Line) -> None:
        _keys(line, "kind", "format", "by", "network_key", "node_key", "account", "period_start_seconds")
        if line["format"] != FORMAT:
            raise _Wrong(f"this Gridmill reads format {FORMAT}, and the file is of format {line['format']!r}")
        self.found.by, self.found.account = _text(line, "by"), _text(line, "account")
        self.found.node_key = _bytes(line, "node_key")
        self.found.period = _int(line, "period_start_seconds", least=EVERY_PERIOD)
        if self.found.by not in ("network", "node"):
            raise _Wrong("it does not say whether a network or a node wrote it")
        if line["network_key"]:
            network_key = _bytes(line, "network_key")
            self._ours(network_key, self._network_key, "network")
            self._network_key = network_key  # nothing of another network may stand under its name
        if self.found.node_key:
            self._ours(self.found.node_key, self._node_key, "node")

    def _root(self, line: Line) -> None:
        _keys(line, *root_line(b"", 0, 0, 0, b"", b""))
        start, seconds = _int(line, "period_start_seconds"), _int(line, "period_seconds", least=1)
        leaves, root, network_key = _int(line, "leaves"), _bytes(line, "root"), _bytes(line, "network_key")
        self._ours(network_key, self._network_key, "network")
        self._in_period(start)
        if (network_key, start, seconds) in self._roots:
            raise _Wrong(f"period {start} had its root before: a network signs one")
        signed = rules.period_root_bytes(network_key, start, seconds, leaves, root)
        self.found.roots += 1
        self._roots[network_key, start, seconds] = (leaves, root, self.line)
        if not verify(network_key, signed, _bytes(line, "signature")):
            raise _Wrong(f"the network's signature is not over this root of period {start}")

    def _begin(self, line: Line) -> None:
        self._close_chain()
        self._refused = True
        _keys(line, "kind", *_CHAIN_FACTS)
        opening = self._opening(line)
        if opening.head in self.found.chains:
            raise _Wrong("this chain was in the file before")
        self._refused = False
        self._chain = self.found.chains[opening.head] = Chain(opening)
        self._before, self._since, self._next_seq, self._unread = opening, [], 1, False

    def _leaf(self, line: Line) -> None:
        _keys(line, "kind", "seq", "leaf", optional=("salt",))
        chain = self._in_chain()
        seq, leaf = _int(line, "seq", least=1), _leaf_of(line["leaf"])
        _bytes(line, "salt") if "salt" in line else b""
        _checked(chain.opening, (leaf,))
        if seq in chain.leaves:
            raise _Wrong(f"leaf {seq} is in the file twice")
        if seq != self._next_seq:
            self._gap(seq)
        self._next_seq = max(self._next_seq, seq) + 1 if seq >= self._next_seq else self._next_seq
        chain.leaves[seq] = (rules.leaf_bytes(leaf), self.line)
        self._since.append(leaf)
        self._count(leaf, chain.opening, seq)

    def _gap(self, seq: int) -> None:
        """Says which leaves are not where they belong, and goes on from the next statement."""
        first_of_node = self._next_seq == 1 and self.found.by == "node" and not self._unread
        self._before = None
        if seq < self._next_seq:
            self.say(f"leaf {seq} comes after leaf {self._next_seq - 1}: leaves are not in their order")
        elif first_of_node:
            assert self._chain is not None
            self.found.notes.append(
                f"leaves before {seq} of {self._chain.name} are not here: the node lost its record and took the "
                "network's word"
            )
        else:
            missing = f"leaf {seq - 1} is" if seq == self._next_seq + 1 else f"leaves {self._next_seq} to {seq - 1} are"
            self.say(f"{missing} missing before leaf {seq}")

    def _after_gap(self, statement: Statement, leaves: Sequence[Leaf]) -> None:
        """Nothing but their sums can be held against leaves whose chain begins before them."""
        self.found.unchained += len(leaves)
        least = rules.advance(rules.opening_of(statement), leaves)
        for name in ("seq", "input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits"):
            if getattr(statement, name) < getattr(least, name):
                self.say(
                    f"the statement at seq {statement.seq} is wrong: its {name} are {getattr(statement, name)}, "
                    f"and its leaves alone make {getattr(least, name)}"
                )
                return

    def _statement(self, line: Line) -> None:
        _keys(line, "kind", *_STATEMENT_TOTALS, "network_signature", "node_signature", "remark")
        chain = self._in_chain()
        statement = self._said(chain, line)
        before, since = self._before, self._since
        self._before, self._since = statement, []
        if before is None:
            self._after_gap(statement, since)
        if statement.seq >= self._next_seq:
            if self._next_seq <= statement.seq and not self._unread:
                self.say(f"leaf {statement.seq} is missing: the statement after it is here")
            before = None
            self._next_seq = statement.seq + 1
        elif before is not None:
            problem = rules.difference(rules.advance(before, since), statement)
            if problem is not None:
                self.say(f"the statement at seq {statement.seq} is wrong: {problem}")
        self._unread = False
        chain.last = statement
        if not rules.signed_by_network(statement, _bytes(line, "network_signature")):
            self.say(f"the network's signature is not over the statement at seq {statement.seq}")
        remark, signature = _text(line, "remark"), _bytes(line, "node_signature")
        if signature:
            if rules.signed_by_node(statement, signature):
                chain.countersigned_seq = max(chain.countersigned_seq, statement.seq)
            else:
                self.say(f"the node's signature is not over the statement at seq {statement.seq}")
        elif remark:
            self.found.disputed += 1
            self.say(f"the node disputes the statement at seq {statement.seq}: {remark}")

    def _dispute(self, line: Line) -> None:
        _keys(line, "kind", *_STATEMENT_TOTALS, "network_signature", "remark")
        statement = self._said(self._in_chain(), line)
        if not rules.signed_by_network(statement, _bytes(line, "network_signature")):
            self.say(f"the network's signature is not over the disputed statement at seq {statement.seq}")
        self.found.disputed += 1
        self.say(f"the node disputes the statement at seq {statement.seq}: {_text(line, 'remark')}")

    def _said(self, chain: Chain, line: Line) -> Statement:
        totals = {name: _int(line, name) for name in _STATEMENT_TOTALS[:-1]}
        statement = msgspec.structs.replace(chain.opening, **totals, head=_bytes(line, "head"))
        _checked(statement, ())
        return statement

    def _entry(self, line: Line) -> None:
        _keys(line, "kind", *_CHAIN_FACTS, "seq", "leaf", "index", "path", optional=("salt",))
        opening = self._opening(line)
        seq, leaf, index = _int(line, "seq", least=1), _leaf_of(line["leaf"]), _int(line, "index", least=-1)
        _bytes(line, "salt") if "salt" in line else b""
        _checked(opening, (leaf,))
        if not isinstance(line["path"], list) or len(line["path"]) > 63:
            raise _Wrong("its path is none")
        path = [_hex(step, "path") for step in line["path"]]
        self._count(leaf, opening, seq)
        root = self._roots.get((opening.network_key, opening.period_start_seconds, opening.period_seconds))
        if index < 0:
            self.found.unproven += 1
            if path or root is not None:
                raise _Wrong(f"work {leaf.work_id} has no proof, though its period has a root")
            return
        if root is None:
            raise _Wrong(f"work {leaf.work_id} has a proof, but the root of its period is not in the file")
        entry = rules.merkle_entry(opening.node_key, opening.class_id, seq, rules.leaf_hash(leaf))
        if not rules.merkle_included(entry, index, root[0], path, root[1]):
            raise _Wrong(f"work {leaf.work_id} is not in the tree of its period: its proof does not lead to the root")

    def _end(self, line: Line) -> None:
        self._ended = True
        _keys(line, "kind", "lines", "sha256")
        if line["lines"] != self.line - 1:
            self.say(f"{line['lines']!r} lines were written, and {self.line - 1} are here")
        if line["sha256"] != self._digest.hexdigest():
            self.say("the file is not as it was written: its SHA-256 is another")

    # ------------------------------------------------------------ what lines have in common

    def _opening(self, line: Line) -> Statement:
        network_key, node_key = _bytes(line, "network_key"), _bytes(line, "node_key")
        opening = rules.opening(
            network_key,
            node_key,
            _text(line, "class_id"),
            _int(line, "period_start_seconds"),
            _int(line, "period_seconds", least=1),
        )
        _checked(opening, ())
        self._ours(network_key, self._network_key, "network")
        self._ours(node_key, self._node_key or self.found.node_key or None, "node")
        self._in_period(opening.period_start_seconds)
        return opening

    def _ours(self, key: bytes, expected: bytes | None, whose: str) -> None:
        if expected is not None and key != expected:
            raise _Wrong(f"it is about another {whose}, with the key {key.hex()[:16]}…")

    def _in_period(self, start: int) -> None:
        """What a file says that it is about decides what another file is held against."""
        if self.found.period not in (EVERY_PERIOD, start):
            raise _Wrong(f"it is of period {start}, and the file is about period {self.found.period}")

    def _in_chain(self) -> Chain:
        if self._chain is None:
            raise _Wrong("it belongs to no chain")
        return self._chain

    def _count(self, leaf: Leaf, opening: Statement, seq: int) -> None:
        self.found.leaves += 1
        self.found.pay_nanocredits += leaf.pay_nanocredits
        self.found.charge_nanocredits += leaf.charge_nanocredits
        earlier = self._works.setdefault((opening.network_key, leaf.work_id, leaf.epoch), self.line)
        if earlier != self.line:
            self.say(f"work {leaf.work_id} is receipted twice: also in line {earlier}")
        if leaf.claim and not rules.claim_holds(leaf, opening.node_key, opening.class_id):
            self.found.claims_wrong += 1
        problem = rules.leaf_problem(leaf)
        if problem is not None:
            self.say(f"leaf {seq} (work {leaf.work_id}) {problem}")

    def _close_chain(self) -> None:
        chain, self._chain = self._chain, None
        if chain is not None and self._since:
            after = chain.last.seq if chain.last is not None else 0
            self.say(f"leaves after {after} of {chain.name} are covered by no statement", whole=True)

    def _check_roots(self) -> None:
        """In a file of a whole network the roots can be made again from the leaves."""
        periods: dict[tuple[bytes, int, int], list[Chain]] = {}
        for chain in self.found.chains.values():
            opening = chain.opening
            period = (opening.network_key, opening.period_start_seconds, opening.period_seconds)
            periods.setdefault(period, []).append(chain)
        for period, (leaves, root, line) in self._roots.items():
            chains = sorted(
                periods.get(period, ()), key=lambda chain: (node_id_of(chain.opening.node_key), chain.opening.class_id)
            )
            entries = [
                rules.merkle_entry(
                    chain.opening.node_key, chain.opening.class_id, seq, rules.leaf_hash_of(chain.leaves[seq][0])
                )
                for chain in chains
                for seq in sorted(chain.leaves)
            ]
            if len(entries) != leaves or rules.merkle_root(entries) != root:
                self.line = line
                self.say(
                    f"the root of period {period[1]} is not that of its {len(entries)} leaves ({leaves} were signed)"
                )


# ---------------------------------------------------------------- one line


def _decoded(raw: bytes) -> Line | None:
    if len(raw) > LINE_BYTES_MAX:
        return None
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _keys(line: Mapping[str, Any], *names: str, optional: Sequence[str] = ()) -> None:
    if set(line) - set(optional) != set(names):
        raise _Wrong("it lacks a field, or has one too many")


def _int(line: Mapping[str, Any], name: str, least: int = 0) -> int:
    value = line[name]
    if type(value) is not int or not least <= value < codec.INT63_LIMIT:
        raise _Wrong(f"{name} is not a number that fits")
    return value


def _text(line: Mapping[str, Any], name: str) -> str:
    value = line[name]
    if not isinstance(value, str) or not value.isprintable():
        raise _Wrong(f"{name} is no text")
    return value


def _bytes(line: Mapping[str, Any], name: str) -> bytes:
    return _hex(line[name], name)


def _hex(value: object, name: str) -> bytes:
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.hex() != value:
        raise _Wrong(f"{name} is not lower-case hexadecimal")
    return found


_LEAF_FIELDS = Leaf.__struct_fields__[:-1]  # `replayed_tokens` is written where there are any
_BYTES_OF_LEAF = {item.name for item in msgspec.structs.fields(Leaf) if item.type is bytes}


def _leaf_of(value: object) -> Leaf:
    if not isinstance(value, dict) or list(value) not in (list(_LEAF_FIELDS), list(Leaf.__struct_fields__)):
        raise _Wrong("its leaf lacks a field, or has one too many")
    price = value["price"]
    if not isinstance(price, dict) or list(price) != list(Price.__struct_fields__):
        raise _Wrong("its leaf has no price")
    fields = {name: _hex(value[name], name) if name in _BYTES_OF_LEAF else value[name] for name in value}
    fields["price"] = list(price.values())
    try:
        leaf = msgspec.convert(list(fields.values()), Leaf)
    except msgspec.ValidationError as problem:
        raise _Wrong(f"its leaf is none: {codec.clip(str(problem))}") from None
    return leaf


def _checked(statement: Statement, leaves: tuple[Leaf, ...]) -> None:
    """The bounds of a statement on the link hold in a file too."""
    try:
        codec.check(Receipts((SignedStatement(statement, leaves, bytes(64)),)))
    except codec.Malformed as problem:
        raise _Wrong(str(problem)) from None


# ---------------------------------------------------------------- two files against each other


def compare(one: Found, other: Found) -> list[Problem]:
    """Where two files, each checked by itself, disagree on what both are about, leaf by leaf and total by total."""
    problems: list[Problem] = []
    for start in sorted(_common(one, other), key=lambda head: (one.chains.get(head) or other.chains[head]).name):
        first, second = one.chains.get(start), other.chains.get(start)
        if first is None or second is None:
            chain, lacking = (second, one) if first is None else (first, other)
            assert chain is not None
            problems.append(Problem(lacking.file, 0, f"nothing is here of {chain.name}, which the other file has"))
            continue
        problems += _compare_chain(one.file, first, other.file, second)
        if len(problems) >= PROBLEMS_MAX:
            break
    return problems


def _common(one: Found, other: Found) -> set[bytes]:
    """The chains that both files should have: those about a node that both are about, in periods that both cover."""

    def about(found: Found, chain: Chain) -> bool:
        return (not found.node_key or chain.opening.node_key == found.node_key) and (
            found.period in (EVERY_PERIOD, chain.opening.period_start_seconds)
        )

    networks = [{chain.opening.network_key for chain in found.chains.values()} for found in (one, other)]
    return {
        head
        for found, rest, theirs in ((one, other, networks[1]), (other, one, networks[0]))
        for head, chain in found.chains.items()
        # A node's file may hold receipts of several networks.
        if about(rest, chain) and (rest.by != "network" or chain.opening.network_key in theirs or not theirs)
    }


def _compare_chain(one: str, first: Chain, other: str, second: Chain) -> list[Problem]:
    problems = []
    ends = [max(chain.leaves, default=0) for chain in (first, second)]
    for seq in sorted(first.leaves.keys() & second.leaves.keys()):
        (packed, line), (other_packed, other_line) = first.leaves[seq], second.leaves[seq]
        if packed != other_packed:
            a, b = rules.leaf_from(packed), rules.leaf_from(other_packed)
            names = [name for name in Leaf.__struct_fields__ if getattr(a, name) != getattr(b, name)]
            problems.append(Problem(one, line, f"leaf {seq} differs from {other}:{other_line} in {', '.join(names)}"))
    if ends[0] != ends[1]:
        problems.append(
            Problem(
                one if ends[0] < ends[1] else other,
                0,
                f"{first.name} ends with leaf {min(ends)} here and with leaf {max(ends)} in the other file",
            )
        )
    elif first.last is not None and second.last is not None and first.last != second.last:
        for name in _STATEMENT_TOTALS:
            a, b = getattr(first.last, name), getattr(second.last, name)
            if a != b:
                sentence = f"the last {name} of {first.name} is {_plain(a)} here and {_plain(b)} in {other}"
                problems.append(Problem(one, 0, sentence))
    return problems
