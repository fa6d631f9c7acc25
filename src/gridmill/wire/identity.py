"""Ed25519 keys: who signs, what exactly is signed, and what a key is called.

Every signature covers bytes that start with their own domain, so that none can be mistaken for another kind.
Public keys are 32 raw bytes and signatures 64; whatever does not verify is False, never an exception.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from nacl.bindings import crypto_sign, crypto_sign_open, crypto_sign_seed_keypair
from nacl.exceptions import CryptoError

from gridmill.wire.messages import PROTOCOL, NodeId, OwnerId

KEY_BYTES = 32
SIGNATURE_BYTES = 64
ID_HEX_DIGITS = 20  # 80 bits: a second key with a given id costs 2^80 tries, and the id still fits a table's column
KEY_FILE_HEADER = "gridmill-ed25519-seed-v1"
KEY_FILE_BYTES_MAX = 4096  # ours has under 100; more is some other file

GREETING_DOMAIN = b"gridmill link greeting v1"
CERTIFICATE_DOMAIN = b"gridmill owner certificate v1"

log = logging.getLogger("gridmill.identity")


class IdentityError(Exception):
    """A key file that cannot be used; the sentence says which and what to do."""


class Identity:
    """One Ed25519 key pair, made from its 32-byte seed. Never prints its secret."""

    __slots__ = ("_secret", "public")

    def __init__(self, seed: bytes) -> None:
        assert len(seed) == KEY_BYTES, f"an Ed25519 seed is {KEY_BYTES} bytes, not {len(seed)}"
        self.public, self._secret = crypto_sign_seed_keypair(seed)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature; deterministic, so that signing twice gives a grinder nothing to choose from."""
        return crypto_sign(message, self._secret)[:SIGNATURE_BYTES]

    @classmethod
    def load_or_create(cls, path: Path | str, entropy: Callable[[int], bytes] = os.urandom) -> Identity:
        """Reads the key at `path`, or makes one there with mode 0600. Raises IdentityError on a file that is no key.

        Two programs that start at once end up with the same key: the file appears whole and is never replaced.
        """
        path = Path(path)
        if not path.exists():
            _create_key_file(path, entropy(KEY_BYTES))
        return cls(_read_key_file(path))

    def __repr__(self) -> str:
        return f"Identity({node_id_of(self.public)})"


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        crypto_sign_open(signature + message, public)
    except (CryptoError, ValueError):
        return False
    return True


def node_id_of(public: bytes) -> NodeId:
    return NodeId("node-" + hashlib.sha256(public).hexdigest()[:ID_HEX_DIGITS])


def owner_id_of(public: bytes) -> OwnerId:
    return OwnerId("owner-" + hashlib.sha256(public).hexdigest()[:ID_HEX_DIGITS])


def certify(owner: Identity, node_key: bytes) -> bytes:
    """The owner's signature that this node is theirs. It has no end date: taking it back is the network's affair."""
    return owner.sign(_certificate_bytes(node_key))


def check_certificate(owner_key: bytes, node_key: bytes, signature: bytes) -> bool:
    return verify(owner_key, _certificate_bytes(node_key), signature)


def greeting_transcript(
    role: str,
    *,
    node_key: bytes,
    network_key: bytes,
    node_challenge: bytes,
    network_challenge: bytes,
    node_versions: Sequence[int],
    network_versions: Sequence[int],
    version: int,
    host: str,
) -> bytes:
    """What both sides sign (`role` is the signer: "node" or "network") and, with role "keys", derive frame keys from.

    Eleven fields, each as uint32 little-endian length and then the bytes; versions are uint32 little-endian each.
    """
    fields = (
        GREETING_DOMAIN,
        PROTOCOL.encode(),
        role.encode(),
        node_key,
        network_key,
        node_challenge,
        network_challenge,
        struct.pack(f"<{len(node_versions)}I", *node_versions),
        struct.pack(f"<{len(network_versions)}I", *network_versions),
        struct.pack("<I", version),
        host.encode(),
    )
    return b"".join(struct.pack("<I", len(field)) + field for field in fields)


def _certificate_bytes(node_key: bytes) -> bytes:
    return CERTIFICATE_DOMAIN + b"\0" + node_key


def _read_key_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(KEY_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise IdentityError(f"cannot read the key file {path}: {error.strerror or error}") from error
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        # Not refused: copied data folders would stop working, and the harm, if any, is already done.
        log.warning("the key file %s can be read by other users; run: chmod 600 %s", path, path)
    words = raw.decode("ascii", "replace").split()
    if len(words) == 2 and words[0] == KEY_FILE_HEADER and len(words[1]) == 2 * KEY_BYTES:
        try:
            return bytes.fromhex(words[1])
        except ValueError:
            pass  # falls through to the one sentence below
    raise IdentityError(f"{path} is not a Gridmill key file; move it away to have a new key made")


def _create_key_file(path: Path, seed: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{KEY_FILE_HEADER} {seed.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, path)  # fails where a key already exists, unlike rename, which would replace it
        except FileExistsError:
            pass  # another program was faster; its key is the one that counts
    finally:
        unfinished.unlink(missing_ok=True)
