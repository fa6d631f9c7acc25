"""Keys on disk, signatures that hold only for what was signed, and ids that follow from keys."""

from __future__ import annotations

import logging
import multiprocessing
import stat
from pathlib import Path

import pytest

from gridmill.wire.identity import (
    Identity,
    IdentityError,
    _create_key_file,
    certify,
    check_certificate,
    greeting_transcript,
    node_id_of,
    owner_id_of,
    verify,
)

ALICE = Identity(bytes(32))
BOB = Identity(bytes([1]) * 32)


def test_it_is_the_ed25519_of_rfc_8032() -> None:
    # Section 7.1, test 2.
    identity = Identity(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert identity.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert identity.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_a_signature_holds_for_its_message_and_key_only() -> None:
    signature = ALICE.sign(b"a message")
    assert verify(ALICE.public, b"a message", signature)
    assert not verify(ALICE.public, b"a massage", signature)
    assert not verify(BOB.public, b"a message", signature)
    for bit in range(512):
        altered = bytearray(signature)
        altered[bit // 8] ^= 1 << bit % 8
        assert not verify(ALICE.public, b"a message", bytes(altered))


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), bytes(33), b"\xff" * 32])
def test_keys_that_are_none_verify_nothing_and_raise_nothing(public: bytes) -> None:
    assert not verify(public, b"", ALICE.sign(b""))
    assert not verify(public, b"", bytes(64))
    assert not verify(ALICE.public, b"", public)


def test_ids_are_eighty_bits_of_the_key() -> None:
    assert node_id_of(ALICE.public) == "node-139e3940e64b5491722088d9"[:25]
    assert owner_id_of(ALICE.public) == "owner-" + node_id_of(ALICE.public).removeprefix("node-")
    assert node_id_of(ALICE.public) != node_id_of(BOB.public)


def test_a_certificate_is_for_one_node_by_one_owner() -> None:
    certificate = certify(ALICE, BOB.public)
    assert check_certificate(ALICE.public, BOB.public, certificate)
    assert not check_certificate(BOB.public, BOB.public, certificate)
    assert not check_certificate(ALICE.public, ALICE.public, certificate)
    assert not verify(ALICE.public, BOB.public, certificate), "the domain is part of what is signed"


def test_no_two_greetings_have_the_same_transcript() -> None:
    facts = {
        "node_key": b"a" * 32,
        "network_key": b"b" * 32,
        "node_challenge": b"c" * 32,
        "network_challenge": b"d" * 32,
        "node_versions": (1, 2),
        "network_versions": (1, 2),
        "version": 2,
        "host": "grid.example",
    }
    seen = {greeting_transcript(role, **facts) for role in ("node", "network", "keys")}  # type: ignore[arg-type]
    for name, other in {
        "node_key": b"x" * 32,
        "network_key": b"x" * 32,
        "node_challenge": b"x" * 32,
        "network_challenge": b"x" * 32,
        "node_versions": (1,),
        "network_versions": (1,),
        "version": 1,
        "host": "grid.example:1",
    }.items():
        seen.add(greeting_transcript("node", **{**facts, name: other}))  # type: ignore[arg-type]
    # Moving a byte from one field to its neighbour changes the bytes too.
    seen.add(greeting_transcript("node", **{**facts, "node_versions": (1, 2, 1), "network_versions": (2,)}))  # type: ignore[arg-type]
    assert len(seen) == 12


def test_a_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).public == made.public
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]
    assert repr(made) == f"Identity({node_id_of(made.public)})"


def _public_of(path: str) -> bytes:
    return Identity.load_or_create(path).public


def test_programs_that_start_together_get_the_same_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        publics = pool.map(_public_of, [str(tmp_path / "node.key")] * 16, chunksize=1)
    assert len(set(publics)) == 1


def test_a_key_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    _create_key_file(path, bytes(32))
    _create_key_file(path, bytes([1]) * 32)
    assert Identity.load_or_create(path).public == ALICE.public
    assert [file.name for file in tmp_path.iterdir()] == ["node.key"]


def test_a_key_file_that_others_can_read_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Identity.load_or_create(path)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("content", [b"", b"hello", b"gridmill-ed25519-seed-v1 " + b"z" * 64, b"\xff" * 10_000])
def test_a_file_that_is_no_key_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not a Gridmill key file"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_key_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot read"):
        Identity.load_or_create(tmp_path)
