"""Writes the generated parts of docs/protocol.md: tables, limits, reasons and the worked example, from the code itself.

Each part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. `--check` only says whether they are up to
date (exit code 1 when not); tests/wire/test_protocol_document.py does the same.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import msgspec

from gridmill.wire import classes, codec, link, messages, receipts, sampling, transport
from gridmill.wire.identity import Identity, certify, greeting_transcript, node_id_of
from gridmill.wire.link import NEXT, PERMANENT, SENDERS, SENTENCES, STREAM_NEXT, Link, NetworkSide, NodeSide, Reason

PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"

U32 = "0 … 2³² − 1"
NUMBER = "1 … 2³² − 1"
U63 = "0 … 2⁶³ − 1"

# What the types do not say. A field that is missing here, or a line here without a field, fails the test.
BOUNDS: dict[tuple[str, str], str] = {
    ("Hello", "versions"): f"1 to {codec.VERSIONS_MAX} of 1 … {codec.VERSION_LIMIT - 1}",
    ("Hello", "node_key"): "32 bytes, Ed25519",
    ("Hello", "challenge"): "32 bytes, X25519, fresh",
    ("Hello", "host"): f"word, 1 to {codec.HOST_CHARS_MAX}; lower case, the port left out when it is the scheme's own",
    ("Hello", "software"): f"line, at most {codec.SOFTWARE_CHARS_MAX}",
    ("Welcome", "version"): f"1 … {codec.VERSION_LIMIT - 1}; the highest in both lists",
    ("Welcome", "versions"): f"1 to {codec.VERSIONS_MAX} of 1 … {codec.VERSION_LIMIT - 1}",
    ("Welcome", "network_key"): "32 bytes, Ed25519",
    ("Welcome", "challenge"): "32 bytes, X25519, fresh",
    ("Welcome", "signature"): "64 bytes, over the transcript with role `network`",
    ("Proof", "signature"): "64 bytes, over the transcript with role `node`",
    ("Proof", "owner_key"): "32 bytes, Ed25519; or empty",
    ("Proof", "owner_signature"): "64 bytes, the owner's certificate; empty exactly when `owner_key` is",
    ("Proof", "join_token"): f"word, at most {codec.TOKEN_CHARS_MAX}; empty for none",
    ("Ready", "node_id"): "the id that follows from `node_key`",
    ("Ready", "heartbeat_seconds"): f"{codec.HEARTBEAT_SECONDS_MIN} … {codec.HEARTBEAT_SECONDS_MAX:.0f}",
    ("Offers", "offers"): f"at most {codec.OFFERS_MAX}",
    ("Fetch", "transfer"): f"{NUMBER}, rising",
    ("Fetch", "sha256"): "64 lower-case hexadecimal digits",
    ("Chunk", "transfer"): "of an open Fetch",
    ("Chunk", "offset"): "how many bytes came before; 0 first",
    ("Chunk", "total_bytes"): f"−1 (absent), 0 (empty) … {codec.TRANSFER_BYTES_MAX}; the same in all chunks",
    ("Chunk", "data"): f"1 to {codec.CHUNK_BYTES_MAX} bytes, none past `total_bytes`; empty when that is ≤ 0",
    ("Listed", "listings"): f"at most {codec.OFFERS_MAX}; one for each offer",
    ("Listing", "name"): f"line, 1 to {codec.NAME_CHARS_MAX}: as offered",
    ("Listing", "class_id"): "64 lower-case hexadecimal digits",
    ("Listing", "served"): "",
    ("Listing", "detail"): f"line, at most {codec.DETAIL_CHARS_MAX}",
    ("Offer", "stream"): f"{NUMBER}, above all before it",
    ("Offer", "work"): "see Generate",
    ("Offer", "credit"): f"0 … {codec.CREDIT_MAX} ids",
    ("Accept", "stream"): "offered, not yet answered",
    ("Refuse", "stream"): "offered, not yet answered",
    ("Refuse", "fault"): "`caller` (no node can do this) or `node` (try another)",
    ("Refuse", "code"): f"line, at most {codec.CODE_CHARS_MAX}",
    ("Refuse", "detail"): f"line, at most {codec.DETAIL_CHARS_MAX}",
    ("Step", "emissions"): f"at most {codec.STREAMS_OPEN_MAX}; applied in order, before the ends",
    ("Step", "ends"): f"at most {codec.STREAMS_OPEN_MAX}",
    ("Step", "paused"): f"at most {codec.STREAMS_OPEN_MAX} open streams",
    ("Credit", "grants"): f"1 to {codec.STREAMS_OPEN_MAX} pairs (stream, 1 … {codec.CREDIT_MAX} ids)",
    ("Cancel", "stream"): "offered once; latecomers are ignored",
    ("Cancel", "keep"): "−1 … 2³² − 1",
    ("Receipts", "statements"): f"1 to {codec.STATEMENTS_MAX}; at most {codec.LEAVES_MAX} leaves in all of them",
    ("Countersigned", "signatures"): f"1 to {codec.STATEMENTS_MAX}",
    ("Acknowledged", "statements"): f"1 to {codec.STATEMENTS_MAX}: (class id, `period_start_seconds`, `seq`)",
    ("Heartbeat", "number"): "1, 2, 3, … per direction",
    ("Heartbeat", "echo"): "the last number heard, 0 for none; never falls, never names one not sent",
    ("Heartbeat", "telemetry"): "the node's; nil from the network",
    ("Drain", "deadline_seconds"): f"0 … {codec.DRAIN_SECONDS_MAX:.0f}, from now",
    ("Goodbye", "reason"): f"word, 1 to {codec.CODE_CHARS_MAX}: a name from the table of reasons",
    ("Goodbye", "detail"): f"line, at most {codec.DETAIL_CHARS_MAX}",
    ("ClassOffer", "name"): f"line, 1 to {codec.NAME_CHARS_MAX}",
    ("ClassOffer", "model_class"): "see ModelClass",
    ("ClassOffer", "slots"): f"0 … {codec.SLOTS_MAX - 1} works at once",
    ("ClassOffer", "engine"): f"word, 1 to {codec.CODE_CHARS_MAX}",
    ("ClassOffer", "decode_tokens_per_second"): "finite, ≥ 0",
    ("ClassOffer", "prefill_tokens_per_second"): "finite, ≥ 0",
    ("ClassOffer", "price"): "see Price",
    ("ClassOffer", "region"): f"word, at most {codec.REGION_CHARS_MAX}",
    **{
        ("Price", name): f"0 … {codec.PRICE_NANOCREDITS_MAX}"
        for name in ("input_nanocredits", "cached_input_nanocredits", "output_nanocredits")
    },
    ("ModelClass", "weights"): f"at most {codec.WEIGHT_FILES_MAX}, sorted by (name, sha256, size_bytes)",
    ("ModelClass", "arithmetic"): f"word, 1 to {codec.CODE_CHARS_MAX}: {', '.join(classes.ARITHMETICS)}, …",
    ("ModelClass", "kv_dtype"): f"word, 1 to {codec.CODE_CHARS_MAX}",
    ("ModelClass", "sampler_version"): f"0 … {codec.VERSION_LIMIT - 1}; now {sampling.SAMPLER_VERSION}",
    ("ModelClass", "tokenizer_sha256"): "64 lower-case hexadecimal digits; may be empty when `blackbox` is not",
    ("ModelClass", "text_facts_sha256"): "64 lower-case hexadecimal digits; may be empty when `blackbox` is not",
    ("ModelClass", "blackbox"): f"line, at most {codec.NAME_CHARS_MAX}; empty for a native class",
    ("FileDigest", "name"): f"line, 1 to {codec.FILE_NAME_CHARS_MAX}",
    ("FileDigest", "sha256"): "64 lower-case hexadecimal digits",
    ("FileDigest", "size_bytes"): U63,
    ("Generate", "work_id"): f"word, 1 to {codec.ID_CHARS_MAX}",
    ("Generate", "class_id"): f"word, 1 to {codec.ID_CHARS_MAX}",
    ("Generate", "prompt"): f"uint32 little-endian each; with `delivered` at most {codec.IDS_BYTES_MAX} bytes",
    ("Generate", "sampling"): "see Sampling",
    ("Generate", "cache_salt"): f"at most {codec.CACHE_SALT_BYTES_MAX} bytes",
    ("Generate", "delivered"): "uint32 little-endian each; at most `max_tokens` ids",
    ("Generate", "epoch"): U32,
    ("Generate", "price"): "see Price; one that the node offered for this class",
    ("Generate", "salt"): f"at most {codec.SALT_BYTES_MAX} bytes",
    ("Sampling", "seed"): f"{sampling.SEED_BYTES} bytes",
    ("Sampling", "max_tokens"): f"1 … {codec.CREDIT_MAX}",
    ("Sampling", "temperature"): "0 … 100",
    ("Sampling", "top_k"): "0 (off) … the vocabulary's size",
    ("Sampling", "top_p"): "above 0, at most 1 (off)",
    ("Sampling", "min_p"): "0 (off) … 1",
    ("Sampling", "repetition_penalty"): "0.01 … 100; 1 is off",
    ("Sampling", "presence_penalty"): "−100 … 100",
    ("Sampling", "frequency_penalty"): "−100 … 100",
    ("Sampling", "logit_bias"): f"at most {sampling.LOGIT_BIAS_ENTRIES_MAX} pairs (id, finite number)",
    ("Sampling", "min_tokens"): "0 … `max_tokens`",
    ("Sampling", "ignore_eos"): "",
    ("Sampling", "stop_token_ids"): f"at most {sampling.STOP_TOKEN_IDS_MAX} ids",
    ("Sampling", "top_logprobs"): f"nil or 0 … {sampling.TOP_LOGPROBS_MAX}",
    ("Emission", "stream"): "running or being cancelled",
    ("Emission", "position"): "the output position of the first id: the next one of this stream",
    ("Emission", "ids"): f"at least 1; each {U32}; no more than credit and `max_tokens` allow",
    ("Emission", "logprobs"): "nil, or as many as `ids`",
    ("TokenLogprob", "logprob"): "finite",
    ("TokenLogprob", "top"): f"at most {sampling.TOP_LOGPROBS_MAX} pairs (id, finite number)",
    ("End", "stream"): "running or being cancelled",
    ("End", "kind"): "`stop`, `length`, `cancelled` or `failed`",
    ("End", "count"): "exactly the number of ids sent on this stream",
    ("End", "cached_tokens"): U32,
    ("End", "code"): f"line, at most {codec.CODE_CHARS_MAX}",
    ("End", "detail"): f"line, at most {codec.DETAIL_CHARS_MAX}",
    ("End", "commit_root"): f"{codec.HASH_BYTES} bytes or empty",
    ("End", "signature"): "64 bytes over `claim_bytes`, or empty",
    ("SignedStatement", "statement"): "see Statement",
    ("SignedStatement", "leaves"): "those since the statement before, in order; see Leaf",
    ("SignedStatement", "signature"): "64 bytes, the network's",
    ("Statement", "network_key"): "32 bytes, Ed25519",
    ("Statement", "node_key"): "32 bytes, Ed25519",
    ("Statement", "class_id"): "64 lower-case hexadecimal digits",
    ("Statement", "period_seconds"): NUMBER,
    ("Statement", "head"): f"{codec.HASH_BYTES} bytes",
    **{
        ("Statement", name): U63
        for name in (
            *("period_start_seconds", "seq", "input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits"),
        )
    },
    ("Leaf", "work_id"): f"word, 1 to {codec.ID_CHARS_MAX}",
    ("Leaf", "epoch"): U32,
    ("Leaf", "prompt_hash"): f"{codec.HASH_BYTES} bytes",
    ("Leaf", "output_hash"): f"{codec.HASH_BYTES} bytes",
    ("Leaf", "price_id"): f"word, at most {codec.ID_CHARS_MAX}",
    ("Leaf", "price"): "see Price",
    ("Leaf", "finish"): f"word, 1 to {codec.CODE_CHARS_MAX}",
    ("Leaf", "commit_root"): f"{codec.HASH_BYTES} bytes or empty",
    ("Leaf", "claim"): "64 bytes or empty",
    **{
        ("Leaf", name): U63
        for name in (
            *("start", "input_tokens", "cached_tokens", "output_tokens"),
            *("pay_nanocredits", "charge_nanocredits", "started_ms", "ended_ms", "replayed_tokens"),
        )
    },
    ("Countersignature", "class_id"): "64 lower-case hexadecimal digits",
    ("Countersignature", "period_start_seconds"): U63,
    ("Countersignature", "seq"): U63,
    ("Countersignature", "signature"): "64 bytes, the node's; or empty, and then there is a remark",
    ("Countersignature", "remark"): f"line, at most {codec.DETAIL_CHARS_MAX}",
    **{("Telemetry", name): "finite, ≥ 0" for name in ("clock_seconds", "tokens_per_second")},
    **{("Telemetry", name): U63 for name in ("running", "waiting", "kv_pages_used", "kv_pages_total", "memory_bytes")},
}

PLAIN = {
    repr(messages.Price()): "all zero",
    "()": "empty",
    "''": "empty",
    "b''": "empty",
    "None": "nil",
    "False": "false",
}  # defaults in words

INNER: tuple[type, ...] = (
    messages.ClassOffer,
    messages.Price,
    messages.Listing,
    classes.ModelClass,
    classes.FileDigest,
    messages.Generate,
    sampling.Sampling,
    messages.Emission,
    sampling.TokenLogprob,
    messages.End,
    messages.SignedStatement,
    messages.Statement,
    messages.Leaf,
    messages.Countersignature,
    messages.Telemetry,
)


def main() -> int:
    before = PAGE.read_text()
    after = page_with_tables(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    PAGE.write_text(after)
    return 0


def page_with_tables(page: str) -> str:
    """The page with every generated part made anew. Raises KeyError on a part that nobody makes."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n{PARTS[name]().strip()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- generated: (?P<name>\w+) -->.*?<!-- end: (?P=name) -->", part, page, flags=re.S)


# ---------------------------------------------------------------- messages


def message_tables() -> str:
    return "\n\n".join(_struct_table(kind) for kind in typing.get_args(messages.AnyMessage))


def inner_tables() -> str:
    return "\n\n".join(_struct_table(kind) for kind in INNER)


def fields_without_bounds() -> set[tuple[str, str]]:
    """Fields that BOUNDS forgot, and entries of BOUNDS that are no field."""
    kinds = (*typing.get_args(messages.AnyMessage), *INNER)
    fields = {(kind.__name__, name) for kind in kinds for name in kind.__struct_fields__}
    return fields ^ set(BOUNDS)


def _struct_table(kind: typing.Any) -> str:
    configuration = kind.__struct_config__
    title = f"### {kind.__name__}"
    if kind in SENDERS:
        title += f" — {' and '.join(SENDERS[kind])}"
    shape = "array" if configuration.array_like else "map"
    elements = list(kind.__struct_fields__)
    tag = ""
    if configuration.tag is not None:
        elements.insert(0, f'"{configuration.tag}"')
        tag = f"Tag `{configuration.tag}`. "
    lines = [title, "", f"{tag}MessagePack {shape}: `[{', '.join(elements)}]`"]
    if shape == "map":
        lines[-1] = f"MessagePack map with the keys {', '.join(f'`{name}`' for name in elements)}."
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):
        lines += ["", inspect.cleandoc(kind.__doc__).replace("\n\n", "\n").replace("\n", " ")]
    lines += ["", "| field | type | bounds | default |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        default = "" if field.required else PLAIN.get(repr(field.default), repr(field.default))
        annotation = _annotation(kind, field.name).replace("|", "or")
        lines.append(f"| `{field.name}` | {annotation} | {BOUNDS[kind.__name__, field.name]} | {default} |")
    return "\n".join(lines)


def _annotation(kind: typing.Any, name: str) -> str:
    text = str(kind.__annotations__[name])
    for python, plain in (
        ("tuple[tuple[int, float], ...]", "array of [int, float]"),
        ("tuple[tuple[int, int], ...]", "array of [int, int]"),
        ("tuple[tuple[str, int, int], ...]", "array of [str, int, int]"),
        (", ...]", ""),
        ("tuple[", "array of "),
        ("None", "nil"),
    ):
        text = text.replace(python, plain)
    return re.sub(r"Literal\[[^\]]*\]", "str", text)


# ---------------------------------------------------------------- states, limits, reasons


def state_table() -> str:
    lines = ["| state | message | sent by | next state |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for (state, kind), following in NEXT.items():
        rows.setdefault((state, " or ".join(SENDERS[kind]), following), []).append(kind.__name__)
    lines += [f"| {state} | {', '.join(kinds)} | {who} | {after} |" for (state, who, after), kinds in rows.items()]
    return "\n".join(lines)


def stream_table() -> str:
    lines = ["| state | event | next state |", "|---|---|---|"]
    lines += [f"| {state} | {kind.__name__} | {following} |" for (state, kind), following in STREAM_NEXT.items()]
    return "\n".join(lines)


def limit_table() -> str:
    """Every constant of codec, link and transport that has a reason written behind it."""
    lines = ["| limit | value | why |", "|---|---|---|"]
    for module in (codec, link, transport):
        for line in inspect.getsource(module).splitlines():
            match = re.match(r"([A-Z][A-Z0-9_]+) = .+?  # (.+)", line)
            if match and isinstance(getattr(module, match[1]), (int, float)):
                value = f"{getattr(module, match[1]):,}".replace(",", " ")
                lines.append(f"| `{match[1]}` | {value} | {match[2]} |")
    return "\n".join(lines)


def reason_table() -> str:
    lines = ["| reason | meaning | redialling |", "|---|---|---|"]
    lines += [
        f"| `{reason}` | {SENTENCES[reason]} | {'cannot help' if reason in PERMANENT else 'with back-off'} |"
        for reason in Reason
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- the worked example


def example() -> str:
    """One greeting from fixed keys, byte by byte."""
    node_key, network_key = Identity(bytes(range(32))), Identity(bytes(range(32, 64)))
    owner_key = Identity(bytes(range(64, 96)))
    node_secret, network_secret = bytes(range(96, 128)), bytes(range(128, 160))
    host = "grid.example:8443"
    certificate = certify(owner_key, node_key.public)
    node_side = NodeSide(node_key, host, "example/1", owner_key.public, certificate, "gm-join-example")
    network_side = NetworkSide(network_key, frozenset({host}), "example/1", 5.0)
    node = Link(node_side, entropy=lambda size: node_secret, now=0.0)
    network = Link(network_side, entropy=lambda size: network_secret, now=0.0)
    hello = node.take_bytes()
    network.receive(hello, 0.0)
    welcome = network.take_bytes()
    node.receive(welcome, 0.0)
    proof = node.take_bytes()
    network.receive(proof, 0.0)
    network.admit(0.0)
    ready = network.take_bytes()
    node.receive(ready, 0.0)
    network.tick(5.0)
    beat = network.take_bytes()
    assert node.opened is not None and network.opened == node.opened
    said_hello, said_welcome = network._hello, network._welcome
    assert said_hello is not None and said_welcome is not None

    def transcript(role: str) -> bytes:
        return greeting_transcript(
            role,
            node_key=node_key.public,
            network_key=network_key.public,
            node_challenge=said_hello.challenge,
            network_challenge=said_welcome.challenge,
            node_versions=said_hello.versions,
            network_versions=said_welcome.versions,
            version=said_welcome.version,
            host=host,
        )

    shared = link.crypto_scalarmult(node_secret, said_welcome.challenge)
    rows = {
        "node's Ed25519 seed": bytes(range(32)),
        "node_key": node_key.public,
        "network's Ed25519 seed": bytes(range(32, 64)),
        "network_key": network_key.public,
        "owner's Ed25519 seed": bytes(range(64, 96)),
        "owner_key": owner_key.public,
        "owner_signature": certificate,
        "node's X25519 secret": node_secret,
        "node's challenge": said_hello.challenge,
        "network's X25519 secret": network_secret,
        "network's challenge": said_welcome.challenge,
        "X25519 shared secret": shared,
        "transcript, role network": transcript("network"),
        "Welcome.signature": said_welcome.signature,
        "Proof.signature": node_key.sign(transcript("node")),
        "frame key, to the network": link._frame_key(shared, b"to-network", transcript("keys")),
        "frame key, to the node": link._frame_key(shared, b"to-node", transcript("keys")),
        "frame: Hello": hello,
        "frame: Welcome": welcome,
        "frame: Proof": proof,
        "frame: Ready": ready,
        "frame: Heartbeat (network)": beat,
    }
    return f"host `{host}`, versions (1), node id `{node_id_of(node_key.public)}`.\n\n{_hex_block(rows)}"


def receipts_example() -> str:
    """One work from its ids to a root, from fixed keys, byte by byte."""
    node_key, network_key = Identity(bytes(range(32))), Identity(bytes(range(32, 64)))
    salt, class_id, prompt, output = bytes(range(16)), "ab" * 32, [5, 1], [7, 70_000, 9]
    output_hash = receipts.ids_hash(salt, sampling.pack_ids(output))
    claimed = receipts.claim_bytes("work-1", 0, class_id, output_hash, b"")
    price = messages.Price(50, 10, 400)
    leaf = messages.Leaf(
        work_id="work-1",
        epoch=0,
        start=0,
        prompt_hash=receipts.ids_hash(salt, sampling.pack_ids(prompt)),
        output_hash=output_hash,
        input_tokens=2,
        cached_tokens=1,
        output_tokens=3,
        price_id="price-1",
        price=price,
        pay_nanocredits=receipts.pay_of(price, 2, 1, 3),
        charge_nanocredits=1323,
        started_ms=1_700_000_000_000,
        ended_ms=1_700_000_001_500,
        finish="stop",
        commit_root=b"",
        claim=node_key.sign(claimed),
    )
    first = receipts.opening(network_key.public, node_key.public, class_id, 1_699_920_000, 86_400)
    statement = receipts.advance(first, [leaf])
    entry = receipts.merkle_entry(node_key.public, class_id, 1, receipts.leaf_hash(leaf))
    root = receipts.merkle_root([entry])
    signed_root = receipts.period_root_bytes(network_key.public, 1_699_920_000, 86_400, 1, root)
    return _hex_block(
        {
            "salt": salt,
            "prompt, packed": sampling.pack_ids(prompt),
            "prompt_hash": leaf.prompt_hash,
            "output, packed": sampling.pack_ids(output),
            "output_hash": output_hash,
            "claim bytes": claimed,
            "claim": leaf.claim,
            "leaf": receipts.leaf_bytes(leaf),
            "leaf hash": receipts.leaf_hash(leaf),
            "head before leaf 1": first.head,
            "head after leaf 1": statement.head,
            "statement": receipts.statement_bytes(statement),
            "network's signature": receipts.sign_as_network(network_key, statement),
            "node's signature": receipts.sign_as_node(node_key, statement),
            "entry of the tree": entry,
            "root bytes": signed_root,
            "root's signature": network_key.sign(signed_root),
        }
    )


def _hex_block(rows: dict[str, bytes]) -> str:
    lines = ["```"]
    for name, value in rows.items():
        lines.append(f"{name} ({len(value)} bytes)")
        text = value.hex()
        lines += [f"    {text[start : start + 100]}" for start in range(0, len(text), 100)]
    return "\n".join([*lines, "```"])


PARTS: dict[str, Callable[[], str]] = {
    "messages": message_tables,
    "inner": inner_tables,
    "states": state_table,
    "streams": stream_table,
    "limits": limit_table,
    "reasons": reason_table,
    "example": example,
    "receipts": receipts_example,
}


if __name__ == "__main__":
    sys.exit(main())
