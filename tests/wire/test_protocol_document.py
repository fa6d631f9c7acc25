"""docs/protocol.md says what the code does: its tables are generated, its worked example is replayed here by hand."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import struct
from pathlib import Path
from types import ModuleType

import msgspec
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.signing import SigningKey, VerifyKey

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "protocol.md"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("print_link_table", ROOT / "scripts" / "print_link_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_parts_are_up_to_date() -> None:
    assert PAGE.read_text() == script().page_with_tables(PAGE.read_text()), "run scripts/print_link_table.py"


def test_every_part_is_on_the_page_and_every_field_has_its_bounds() -> None:
    parts = script()
    assert set(re.findall(r"<!-- generated: (\w+) -->", PAGE.read_text())) == set(parts.PARTS)
    assert parts.fields_without_bounds() == set()


def example(part: str = "example") -> dict[str, bytes]:
    block = script().PARTS[part]().split("```")[1]
    rows: dict[str, bytes] = {}
    name = ""
    for line in block.strip().splitlines():
        if line.startswith("    "):
            rows[name] += bytes.fromhex(line)
        else:
            name = line.rsplit(" (", 1)[0]
            rows[name] = b""
    return rows


def test_a_second_implementation_written_from_the_page_agrees_with_the_example() -> None:
    # Nothing of gridmill is used from here on: only what the page says.
    rows = example()
    node, network, owner = (SigningKey(rows[f"{who}'s Ed25519 seed"]) for who in ("node", "network", "owner"))
    assert bytes(node.verify_key) == rows["node_key"] and bytes(network.verify_key) == rows["network_key"]
    for who in ("node", "network"):
        assert crypto_scalarmult_base(rows[f"{who}'s X25519 secret"]) == rows[f"{who}'s challenge"]
    shared = crypto_scalarmult(rows["network's X25519 secret"], rows["node's challenge"])
    assert shared == rows["X25519 shared secret"]

    def transcript(role: bytes) -> bytes:
        fields = [
            b"gridmill link greeting v1",
            b"gridmill-link",
            role,
            rows["node_key"],
            rows["network_key"],
            rows["node's challenge"],
            rows["network's challenge"],
            struct.pack("<I", 1),
            struct.pack("<I", 1),
            struct.pack("<I", 1),
            b"grid.example:8443",
        ]
        return b"".join(struct.pack("<I", len(field)) + field for field in fields)

    assert transcript(b"network") == rows["transcript, role network"]
    assert network.sign(transcript(b"network")).signature == rows["Welcome.signature"]
    VerifyKey(rows["node_key"]).verify(transcript(b"node"), rows["Proof.signature"])
    certificate = b"gridmill owner certificate v1\0" + rows["node_key"]
    assert owner.sign(certificate).signature == rows["owner_signature"]

    def frame_key(person: bytes) -> bytes:
        return hashlib.blake2b(transcript(b"keys"), key=shared, person=person, digest_size=32).digest()

    keys = {"network": frame_key(b"gm1 to-network"), "node": frame_key(b"gm1 to-node")}
    assert keys["network"] == rows["frame key, to the network"] and keys["node"] == rows["frame key, to the node"]

    def payload_of(frame: bytes, sequence: int, key: bytes | None) -> list[object]:
        length, number, flags = struct.unpack("<IIB", frame[:9])
        payload = frame[25:]
        assert (length, number, flags) == (len(payload), sequence, 0)
        code = hashlib.blake2b(frame[:9] + payload, key=key, digest_size=16).digest() if key else bytes(16)
        assert frame[9:25] == code
        decoded = msgspec.msgpack.decode(payload)
        assert isinstance(decoded, list)
        return decoded

    assert payload_of(rows["frame: Hello"], 0, None) == [
        *("hello", [1], rows["node_key"], rows["node's challenge"], "grid.example:8443", "example/1")
    ]
    assert payload_of(rows["frame: Welcome"], 0, None) == [
        *("welcome", 1, [1], rows["network_key"], rows["network's challenge"], rows["Welcome.signature"])
    ]
    assert payload_of(rows["frame: Proof"], 1, keys["network"]) == [
        *("proof", rows["Proof.signature"], rows["owner_key"], rows["owner_signature"], "gm-join-example")
    ]
    node_id = "node-" + hashlib.sha256(rows["node_key"]).hexdigest()[:20]
    assert payload_of(rows["frame: Ready"], 1, keys["node"]) == ["ready", node_id, 5.0]
    assert payload_of(rows["frame: Heartbeat (network)"], 2, keys["node"]) == ["beat", 1, 0, None]


def test_a_second_implementation_of_receipts_agrees_with_the_example() -> None:
    # Nothing of gridmill is used from here on: only what §14 says.
    keys, rows = example(), example("receipts")
    node, network = (SigningKey(keys[f"{who}'s Ed25519 seed"]) for who in ("node", "network"))
    packed = msgspec.msgpack.encode

    def digest(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    def ids(*numbers: int) -> bytes:
        return digest(b"gridmill receipt ids v1\0", b"\x10", rows["salt"], struct.pack(f"<{len(numbers)}I", *numbers))

    class_id = "ab" * 32
    output_hash = ids(7, 70_000, 9)
    claim = b"gridmill receipt claim v1\0" + packed(["work-1", 0, class_id, output_hash, b""])
    assert node.sign(claim).signature == rows["claim"]
    pay = 1 * 50 + 1 * 10 + 3 * 400
    times = [1_700_000_000_000, 1_700_000_001_500]
    leaf = packed(
        [
            *("work-1", 0, 0, ids(5, 1), output_hash, 2, 1, 3, "price-1", [50, 10, 400], pay, 1323),
            *(*times, "stop", b"", rows["claim"]),
        ]
    )
    assert leaf == rows["leaf"]
    hash_of_leaf = digest(b"gridmill receipt leaf v1\0", leaf)
    chain = [keys["network_key"], keys["node_key"], class_id, 1_699_920_000, 86_400]
    start = digest(b"gridmill receipt chain start v1\0", packed(chain))
    head = digest(b"gridmill receipt chain v1\0", start, hash_of_leaf)
    statement = packed([*chain, 1, 2, 1, 3, pay, head])
    assert (
        network.sign(b"gridmill receipt statement by network v1\0" + statement).signature
        == (rows["network's signature"])
    )
    assert node.sign(b"gridmill receipt statement by node v1\0" + statement).signature == rows["node's signature"]
    entry = digest(b"\0", packed([keys["node_key"], class_id, 1, hash_of_leaf]))
    root = b"gridmill receipt period root v1\0" + packed([keys["network_key"], 1_699_920_000, 86_400, 1, entry])
    assert network.sign(root).signature == rows["root's signature"]
