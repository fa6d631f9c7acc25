"""Fuzz targets: bytes in, nothing but the promised outcome out.

`python tests/fuzz/fuzz_codec.py [corpus folder]` runs them for as long as you like: coverage-guided where atheris is
installed, by mutation of honest messages otherwise. `test_fuzz_codec.py` runs them for a bounded time with the tests.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "wire"))

from wire_samples import SAMPLES, work

from gridmill.wire import codec
from gridmill.wire.identity import Identity
from gridmill.wire.link import Closed, Link, NetworkSide, NodeSide, Proven, State
from gridmill.wire.messages import Accept, Offer

NODE = NodeSide(Identity(bytes(32)), "grid.example", "fuzz")
NETWORK = NetworkSide(Identity(bytes([1]) * 32), frozenset({"grid.example"}), "fuzz")
SEEDS = tuple(codec.encode(message) for message in SAMPLES)


def fuzz_codec(data: bytes) -> None:
    """Malformed, or a message that is encoded and decoded again to itself."""
    try:
        message = codec.decode(data)
    except codec.Malformed as error:
        assert str(error).isprintable() and len(str(error)) <= codec.DETAIL_CHARS_MAX
        return
    again = codec.encode(message)
    assert codec.decode(again) == message
    assert len(again) <= max(codec.bytes_max(type(message)), len(data))


def fuzz_stream(data: bytes) -> None:
    """Bytes of a stranger, cut in two anywhere: the link says why it closes and keeps nothing."""
    cut = data[0] if data else 0
    for side in (NODE, NETWORK):
        link = Link(side, entropy=random.Random(1).randbytes, now=0.0)
        events = link.receive(data[1:cut], 0.0) + link.receive(data[max(1, cut) :], 1.0) + link.eof(2.0)
        assert isinstance(events[-1], Closed) and link.state is State.CLOSED
        assert not link._buffer and not link.queued_bytes


def fuzz_authentic(data: bytes) -> None:
    """The same bytes as messages of a peer that holds the keys: on a link at work, each in a frame of its own."""
    node, network = _at_work()
    for sender, receiver in ((node, network), (network, node)):
        for piece in data.split(b"\xc1"):  # the one byte that MessagePack never uses
            if receiver.closed is None:
                receiver.receive(sender._frame(piece), 1.0)
        if receiver.closed is not None and not receiver.closed.by_peer:
            sender.receive(receiver.take_bytes(), 1.0)
            assert sender.closed is not None and sender.closed.reason is receiver.closed.reason
        assert len(receiver._streams) <= 2 + data.count(b"offer")
        if sender.closed is not None:
            break


def mutated(chance: random.Random) -> bytes:
    """An honest message with a few bytes changed, removed, repeated, or another message's tail."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(5)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.randrange(1, 9)]
            case 2:
                data[at:at] = data[at : at + chance.randrange(1, 9)] * chance.randrange(1, 50)
            case 3:
                data[at:] = chance.choice(SEEDS)[at:]
            case 4:
                data[at:at] = chance.choice(
                    [b"\xdd\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\xcb\x7f\xf8" + bytes(6)]
                )
    return bytes(data)


TARGETS = (fuzz_codec, fuzz_stream, fuzz_authentic)


def _at_work() -> tuple[Link, Link]:
    entropy = random.Random(1).randbytes
    node, network = Link(NODE, entropy=entropy, now=0.0), Link(NETWORK, entropy=entropy, now=0.0)
    network.receive(node.take_bytes(), 0.0)
    node.receive(network.take_bytes(), 0.0)
    assert isinstance(network.receive(node.take_bytes(), 0.0)[0], Proven)
    network.admit(0.0)
    network.send(Offer(1, work(), 10))
    network.send(Offer(2, work(), 10))
    node.receive(network.take_bytes(), 0.0)
    node.send(Accept(1))
    network.receive(node.take_bytes(), 0.0)
    return node, network


def fuzz_all(data: bytes) -> None:
    for target in TARGETS:
        target(data)


def main() -> None:
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"atheris is not installed: mutating honest messages, seed {seed}; Ctrl-C stops")
        chance = random.Random(seed)
        for count in itertools.count(1):
            fuzz_all(mutated(chance))
            if count % 10_000 == 0:
                print(f"{count} inputs", flush=True)
    else:
        atheris.instrument_all()
        atheris.Setup(sys.argv, fuzz_all)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
