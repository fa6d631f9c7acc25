"""The link in pairs: every script runs through both ends over a fake cable, and every break has its name on both.

A hostile peer is a real link whose `_queue` is called directly: its frames are authentic, only its manners are bad.
A hostile cable is a function over the bytes that pass.
"""

from __future__ import annotations

import dataclasses
import struct
import typing
from collections.abc import Callable, Iterator

import pytest
from cable import HOST, Cable, LinkPair, Mangle, entropy_from, split_every
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import CLASS_OFFER, SAMPLES, work

from gridmill.wire import codec, link
from gridmill.wire.identity import Identity, certify, node_id_of, owner_id_of
from gridmill.wire.link import (
    HEADER,
    NEXT,
    PERMANENT,
    SENDERS,
    SENTENCES,
    STREAM_NEXT,
    Arrived,
    Closed,
    Event,
    Link,
    NetworkSide,
    NodeSide,
    Opened,
    Proven,
    Reason,
    State,
)
from gridmill.wire.messages import (
    Accept,
    AnyMessage,
    Cancel,
    Chunk,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Offer,
    Offers,
    Proof,
    Ready,
    Refuse,
    Step,
    Telemetry,
    Welcome,
)

KEYS = [Identity(bytes([number]) * 32) for number in range(6)]
NODE, NETWORK, OWNER, MALLORY = KEYS[:4]


def node_side(**changes: typing.Any) -> NodeSide:
    return dataclasses.replace(NodeSide(NODE, HOST, "test node"), **changes)


def network_side(**changes: typing.Any) -> NetworkSide:
    return dataclasses.replace(NetworkSide(NETWORK, frozenset({HOST}), "test network", 5.0), **changes)


def pair(**options: typing.Any) -> LinkPair:
    options.setdefault("node_side", node_side())
    options.setdefault("network_side", network_side())
    return LinkPair(**options)


def opened(**options: typing.Any) -> LinkPair:
    return pair(**options).open()


def running(streams: int = 1, credit: int = 1000, max_tokens: int = 1000, **options: typing.Any) -> LinkPair:
    """A pair with that many accepted streams, whatever was heard so far forgotten."""
    both = opened(**options)
    for stream in range(1, streams + 1):
        both.network.send(Offer(stream, work(max_tokens), credit))
    both.settle()
    for stream in range(1, streams + 1):
        both.node.send(Accept(stream))
    both.settle()
    both.node_events.clear()
    both.network_events.clear()
    return both


def frames_of(data: bytes) -> list[tuple[int, int, bytes]]:
    """(sequence, flags, payload) of each frame."""
    frames = []
    while data:
        length, sequence, flags, _ = HEADER.unpack_from(data)
        frames.append((sequence, flags, data[HEADER.size : HEADER.size + length]))
        data = data[HEADER.size + length :]
    return frames


def plain_frame(message: AnyMessage, sequence: int = 0, mac: bytes = bytes(16)) -> bytes:
    payload = codec.encode(message)
    return HEADER.pack(len(payload), sequence, 0, mac) + payload


def assert_closed(both: LinkPair, reason: Reason, by: str) -> None:
    """Both sides closed for the same reason, which `by` ("node" or "network") found and the other heard of."""
    both.settle()
    assert both.reasons() == (reason, reason)
    assert both.node.closed is not None and both.network.closed is not None
    assert both.node.closed.by_peer == (by == "network")
    assert both.network.closed.by_peer == (by == "node")
    assert sum(isinstance(event, Closed) for event in both.node_events) == 1
    assert sum(isinstance(event, Closed) for event in both.network_events) == 1
    assert SENTENCES[reason] in str(both.node.closed) and "\n" not in str(both.node.closed)


# ---------------------------------------------------------------- the tables


def test_the_tables_cover_every_message_and_every_reason() -> None:
    kinds = set(typing.get_args(AnyMessage))
    assert set(SENDERS) == kinds == {kind for _, kind in NEXT}
    assert set(SENTENCES) == set(Reason) and set(Reason) >= PERMANENT
    assert all(state is not State.CLOSED for state, _ in NEXT)
    assert {kind for _, kind in STREAM_NEXT} == {Accept, Refuse, Emission, End, Credit, Cancel}


def test_every_state_is_reached_and_can_be_left_by_goodbye() -> None:
    reached = {State.DIALLED}
    while more := {after for (before, _), after in NEXT.items() if before in reached} - reached:
        reached |= more
    assert reached == set(State)


# ---------------------------------------------------------------- the greeting


def test_two_honest_sides_open() -> None:
    both = pair(node_side=node_side(join_token="gm-join-1"), network_side=network_side(heartbeat_seconds=7.0)).open()
    proven, network_opened = both.network_events
    assert proven == Proven(
        node_id_of(NODE.public), NODE.public, owner_id_of(NODE.public), NODE.public, "gm-join-1", "test node", 1
    )
    assert both.node_events == [network_opened]
    assert network_opened == Opened(
        node_id_of(NODE.public), NODE.public, NETWORK.public, owner_id_of(NODE.public), "test node", 1, 7.0
    )
    assert both.node.state is both.network.state is State.READY


def test_an_owner_certifies_the_node() -> None:
    both = opened(node_side=node_side(owner_key=OWNER.public, owner_signature=certify(OWNER, NODE.public)))
    assert both.network.opened is not None and both.network.opened.owner_id == owner_id_of(OWNER.public)
    assert both.node.opened == both.network.opened


@pytest.mark.parametrize("signature", [certify(OWNER, MALLORY.public), certify(MALLORY, NODE.public), bytes(64)])
def test_a_certificate_that_is_not_the_owners_over_this_node_is_refused(signature: bytes) -> None:
    both = pair(node_side=node_side(owner_key=OWNER.public, owner_signature=signature))
    assert_closed(both, Reason.BAD_OWNER_CERTIFICATE, by="network")
    assert both.node.closed is not None and both.node.closed.permanent
    assert not any(isinstance(event, Proven) for event in both.network_events)


def test_a_network_that_refuses_is_heard_and_final() -> None:
    both = pair(admit=False)
    both.settle()
    both.network.refuse(Reason.JOIN_REFUSED, "the join token is unknown")
    assert_closed(both, Reason.JOIN_REFUSED, by="network")
    assert both.node.closed == Closed(Reason.JOIN_REFUSED, "the join token is unknown", True, True)


def test_a_host_that_is_not_the_networks_is_refused() -> None:
    both = pair(node_side=node_side(host="evil.example"))
    assert_closed(both, Reason.WRONG_HOST, by="network")
    # It came before frames are authenticated, so anyone could have said it.
    assert both.node.closed is not None and not both.node.closed.permanent


def test_hosts_may_be_a_function() -> None:
    assert opened(network_side=network_side(hosts=lambda host: host.endswith(":8443"))).reasons() == (None, None)


def test_another_key_than_the_pinned_one_is_refused() -> None:
    both = pair(node_side=node_side(pinned_network_key=MALLORY.public))
    assert_closed(both, Reason.WRONG_NETWORK_KEY, by="node")
    assert both.node.closed is not None and both.node.closed.permanent
    assert opened(node_side=node_side(pinned_network_key=NETWORK.public)).reasons() == (None, None)


def test_the_highest_common_version_is_chosen() -> None:
    both = opened(node_versions=(1, 2, 4), network_versions=(3, 2, 1))
    assert both.node.opened is not None and both.node.opened.version == 2


def test_no_common_version_is_said_so() -> None:
    assert_closed(pair(node_versions=(1,), network_versions=(2,)), Reason.VERSION_UNSUPPORTED, by="network")


def test_nobody_speaks_for_longer_than_the_greeting_may_take() -> None:
    for cut in ("to_network", "to_node"):
        both = pair()
        getattr(both, cut).cut = True
        both.run_for(9.9)
        assert both.reasons() == (None, None)
        both.run_for(0.2)
        reasons = both.reasons()
        assert Reason.GREETING_TIMEOUT in reasons and None not in reasons
    both = pair(admit=False)
    both.run_for(11)
    assert both.network.closed is not None and both.network.closed.reason is Reason.GREETING_TIMEOUT


def test_a_late_admission_of_a_closed_link_does_nothing() -> None:
    both = pair(admit=False)
    both.settle()
    both.break_off()
    both.network.admit(both.now)
    assert both.network.opened is None and not both.network.has_bytes


def test_the_same_greeting_comes_out_wherever_the_cable_splits() -> None:
    def conversation(to_network: Mangle, to_node: Mangle) -> tuple[list[Event], list[Event], LinkPair]:
        both = pair()
        both.to_network.mangle, both.to_node.mangle = to_network, to_node
        both.open()
        both.network.send(Offer(1, work(), 5))
        both.settle()
        both.node.send(Accept(1))
        both.node.send(Step((Emission(1, 0, (1, 2)),), (End(1, "stop", 2),)))
        both.settle()
        both.node.close(Reason.DRAINED)
        both.settle()
        return both.node_events, both.network_events, both

    whole = conversation(split_every(1 << 20), split_every(1 << 20))[:2]
    for size in (1, 2, 3, 7, 8, 9, 24, 25, 26, 100):
        assert conversation(split_every(size), split_every(size))[:2] == whole
    # And once at every single border: the byte streams are the same every time, since the entropy is.
    for border in range(1, 700):
        assert conversation(split_once(border), split_once(border))[:2] == whole


def split_once(border: int) -> Mangle:
    """Splits the stream, not the chunk, at one place."""
    seen = 0

    def mangle(chunk: bytes) -> list[bytes]:
        nonlocal seen
        at = border - seen
        seen += len(chunk)
        return [chunk[:at], chunk[at:]] if 0 < at < len(chunk) else [chunk]

    return mangle


# ---------------------------------------------------------------- what a man in the middle can try


def alter(change: Callable[[AnyMessage], AnyMessage | None], kind: type) -> Mangle:
    """Replaces the (unauthenticated) greeting message of this kind."""

    def mangle(chunk: bytes) -> list[bytes]:
        out = []
        for sequence, flags, payload in frames_of(chunk):
            if sequence > 0 or flags:
                return [chunk]
            message = codec.decode(payload)
            new = change(message) if type(message) is kind else message
            out.append(plain_frame(new, sequence) if new is not None else b"")
        return out

    return mangle


def replaced(**fields: typing.Any) -> Callable[[AnyMessage], AnyMessage]:
    return lambda message: typing.cast(AnyMessage, link.msgspec.structs.replace(message, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"versions": (1,)},
        {"versions": (1, 2, 3)},
        {"host": "other.example"},
        {"node_key": MALLORY.public},
        {"challenge": bytes(31) + b"\x09"},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_hello_altered_on_the_way_does_not_fit_the_networks_signature(fields: dict[str, typing.Any]) -> None:
    both = pair(node_versions=(1, 2), network_versions=(1, 2), network_side=network_side(hosts={HOST, "other.example"}))
    both.to_network.mangle = alter(replaced(**fields), Hello)
    assert_closed(both, Reason.BAD_SIGNATURE, by="node")
    assert both.network.closed is not None and not both.network.closed.permanent


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 1},
        {"versions": (1,)},
        {"network_key": MALLORY.public},
        {"challenge": bytes(31) + b"\x09"},
        {"signature": bytes(64)},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_welcome_altered_on_the_way_does_not_fit_its_signature(fields: dict[str, typing.Any]) -> None:
    both = pair(node_versions=(1, 2), network_versions=(1, 2))
    both.to_node.mangle = alter(replaced(**fields), Welcome)
    assert_closed(both, Reason.BAD_SIGNATURE, by="node")


def signed_welcome(network: Link, **fields: typing.Any) -> Welcome:
    """A Welcome that the network really signed, with fields it should not have chosen."""
    assert network._hello is not None and network._welcome is not None
    welcome = link.msgspec.structs.replace(network._welcome, **fields)
    signature = NETWORK.sign(link._transcript("network", network._hello, welcome))
    return link.msgspec.structs.replace(welcome, signature=signature)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 1}, Reason.DOWNGRADED),
        ({"version": 3, "versions": (1, 2, 3)}, Reason.VERSION_UNSUPPORTED),
        ({"version": 3}, Reason.VERSION_UNSUPPORTED),
        ({"challenge": bytes(32)}, Reason.MALFORMED),  # a low-order point: the shared secret would be known to all
    ],
)
def test_a_network_that_signs_a_bad_choice_is_left(fields: dict[str, typing.Any], reason: Reason) -> None:
    both = pair(node_versions=(1, 2), network_versions=(1, 2))
    both.to_node.mangle = alter(lambda message: signed_welcome(both.network, **fields), Welcome)
    assert_closed(both, reason, by="node")


def test_a_hello_with_a_low_order_challenge_is_malformed() -> None:
    both = pair()
    both.to_network.mangle = alter(replaced(challenge=bytes(32)), Hello)
    both.settle()
    assert both.network.closed is not None and both.network.closed.reason is Reason.MALFORMED


def test_a_relay_that_passes_a_conversation_on_is_refused_by_the_network_it_reaches() -> None:
    # The node dials mallory.example; what Mallory's machine passes on names that host.
    both = pair(node_side=node_side(host="mallory.example"))
    assert_closed(both, Reason.WRONG_HOST, by="network")


def test_a_relay_that_rewrites_the_host_is_refused_by_the_node() -> None:
    both = pair(node_side=node_side(host="mallory.example"))
    both.to_network.mangle = alter(replaced(host=HOST), Hello)
    assert_closed(both, Reason.BAD_SIGNATURE, by="node")


@dataclasses.dataclass
class Impostor:
    """Looks like the victim's key, and can only repeat a signature that the victim once made."""

    public: bytes
    signature: bytes

    def sign(self, message: bytes) -> bytes:
        return self.signature


def captured_proof_signature() -> bytes:
    """The victim joins Mallory's own network in good faith; Mallory keeps its signature."""
    to_mallory = opened(network_side=network_side(identity=MALLORY))
    hello, welcome = to_mallory.node._hello, to_mallory.node._welcome
    assert hello is not None and welcome is not None
    return NODE.sign(link._transcript("node", hello, welcome))


def test_a_proof_from_another_conversation_proves_nothing() -> None:
    impostor = typing.cast(Identity, Impostor(NODE.public, captured_proof_signature()))
    both = pair(node_side=node_side(identity=impostor), seed=2)
    assert_closed(both, Reason.BAD_SIGNATURE, by="network")
    assert not any(isinstance(event, Proven) for event in both.network_events)


def test_the_networks_signature_cannot_be_turned_round_into_a_nodes() -> None:
    both = pair(admit=False)
    both.settle()
    hello, welcome = both.network._hello, both.network._welcome
    assert hello is not None and welcome is not None
    assert link._transcript("node", hello, welcome) != link._transcript("network", hello, welcome)
    impostor = typing.cast(Identity, Impostor(NETWORK.public, welcome.signature))
    assert_closed(pair(node_side=node_side(identity=impostor)), Reason.BAD_SIGNATURE, by="network")


def test_a_goodbye_forged_into_the_greeting_never_stops_a_node_for_good() -> None:
    both = pair()
    both.to_node.mangle = lambda chunk: [plain_frame(Goodbye("join_refused", "go away"))]
    both.settle()
    assert both.node.closed == Closed(Reason.JOIN_REFUSED, "go away", by_peer=True, permanent=False)


def test_a_goodbye_forged_into_an_open_link_is_no_goodbye() -> None:
    both = opened()
    events = both.node.receive(plain_frame(Goodbye("join_refused", "go away"), sequence=2), both.now)
    assert isinstance(events[0], Closed) and events[0].reason is Reason.FORGED and not events[0].permanent


def on_next(change: Mangle) -> Mangle:
    """Does it once, then passes everything."""
    done = False

    def mangle(chunk: bytes) -> typing.Iterable[bytes]:
        nonlocal done
        if done:
            return [chunk]
        done = True
        return change(chunk)

    return mangle


def flip(index: int) -> Mangle:
    def mangle(chunk: bytes) -> list[bytes]:
        altered = bytearray(chunk)
        altered[index] ^= 1
        return [bytes(altered)]

    return mangle


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip(-1), Reason.FORGED),
        (flip(HEADER.size), Reason.FORGED),
        (flip(9), Reason.FORGED),  # the first byte of the code
        (flip(8), Reason.FORGED),  # the flags: a whole message made a fragment
        (flip(7), Reason.GAP),  # the sequence
        (flip(3), Reason.OVERSIZED),  # the length
        (lambda chunk: [chunk, chunk], Reason.REPLAYED),
        (lambda chunk: [], Reason.GAP),
        (lambda chunk: [chunk[: len(chunk) // 2]], Reason.FORGED),  # half a frame swallowed
        (lambda chunk: [HEADER.pack(70_000, 3, 0, bytes(16))], Reason.OVERSIZED),
        (lambda chunk: [chunk[:8] + b"\x03" + chunk[9:]], Reason.MALFORMED),
    ],
)
@pytest.mark.parametrize("direction", ["to_network", "to_node"])
def test_what_a_cable_does_to_a_frame_has_a_name_on_both_sides(change: Mangle, reason: Reason, direction: str) -> None:
    both = running()
    getattr(both, direction).mangle = on_next(change)
    if direction == "to_network":
        both.node.send(Step((Emission(1, 0, (1, 2, 3)),)))
        both.settle()
        both.node.send(Step((Emission(1, 3, (4, 5, 6) * 30),)))
        assert_closed(both, reason, by="network")
        assert not both.network_heard() or reason is Reason.REPLAYED
    else:
        both.network.send(Cancel(1))
        both.settle()
        both.network.send(Offer(2, work(prompt=[9] * 200), 1))
        assert_closed(both, reason, by="node")


def test_frames_that_change_places_are_a_gap() -> None:
    both = running()
    held: list[bytes] = []

    def swap(chunk: bytes) -> list[bytes]:
        if not held:
            held.append(chunk)
            return []
        return [chunk, held.pop()]

    both.to_network.mangle = swap
    both.node.send(Step((Emission(1, 0, (1,)),)))
    both.settle()
    both.node.send(Step((Emission(1, 1, (2,)),)))
    both.to_network.mangle = lambda chunk, swap=swap: swap(chunk)  # type: ignore[misc]
    assert_closed(both, Reason.GAP, by="network")


def test_a_frame_of_one_direction_does_not_fit_the_other() -> None:
    both = opened()
    both.node._queue(Heartbeat(1, 0))
    own = both.node.take_bytes()
    sequence = struct.pack("<I", both.network._sequence_out)
    events = both.node.receive(own[:4] + sequence + own[8:], both.now)
    assert isinstance(events[0], Closed) and events[0].reason is Reason.FORGED


def test_recorded_frames_of_another_connection_are_forged() -> None:
    first, second = running(seed=3), running(seed=4)
    first.node.send(Step((Emission(1, 0, (1,)),)))
    recorded = first.node.take_bytes()
    second.network.receive(recorded, second.now)
    assert second.network.closed is not None and second.network.closed.reason is Reason.FORGED


# ---------------------------------------------------------------- what a peer with bad manners can try


def forced(both: LinkPair, sender: str, *messages: AnyMessage) -> LinkPair:
    peer = both.node if sender == "node" else both.network
    for message in messages:
        peer._queue(message)
    both.settle()
    return both


ACCEPT, END = Accept(1), End(1, "stop", 0)
BREACHES: list[tuple[str, str, tuple[AnyMessage, ...], Reason]] = [
    ("a node offers work", "node", (Offer(2, work(), 1),), Reason.WRONG_ROLE),
    ("a node grants credit", "node", (Credit(((1, 1),)),), Reason.WRONG_ROLE),
    ("a node welcomes", "node", (SAMPLES[1],), Reason.WRONG_ROLE),
    ("a network emits", "network", (Step((Emission(1, 0, (1,)),)),), Reason.WRONG_ROLE),
    ("a network greets like a node", "network", (SAMPLES[0],), Reason.WRONG_ROLE),
    ("a second proof", "node", (Proof(bytes(64), b"", b"", ""),), Reason.OUT_OF_STATE),
    ("a second hello", "node", (SAMPLES[0],), Reason.OUT_OF_STATE),
    ("a second ready", "network", (SAMPLES[3],), Reason.OUT_OF_STATE),
    ("a second accept", "node", (ACCEPT,), Reason.OUT_OF_STATE),
    ("a refusal after the accept", "node", (Refuse(1, "node", "busy", ""),), Reason.OUT_OF_STATE),
    ("ids of an unknown stream", "node", (Step((Emission(9, 0, (1,)),)),), Reason.UNKNOWN_STREAM),
    ("the end of an unknown stream", "node", (Step((), (End(9, "stop", 0),)),), Reason.UNKNOWN_STREAM),
    ("an answer to no offer", "node", (Accept(9),), Reason.UNKNOWN_STREAM),
    ("credit for an unknown stream", "network", (Credit(((9, 1),)),), Reason.UNKNOWN_STREAM),
    ("cancelling an unknown stream", "network", (Cancel(9),), Reason.UNKNOWN_STREAM),
    ("a stream number again", "network", (Offer(1, work(), 1),), Reason.STREAM_REUSED),
    ("two ends", "node", (Step((), (END, END)),), Reason.DOUBLE_END),
    ("two ends in two steps", "node", (Step((), (END,)), Step((), (END,))), Reason.DOUBLE_END),
    ("ids after the end", "node", (Step((), (END,)), Step((Emission(1, 0, (1,)),))), Reason.DOUBLE_END),
    ("an accept after the end", "node", (Step((), (END,)), ACCEPT), Reason.DOUBLE_END),
    ("a repeated position", "node", (Step((Emission(1, 0, (1,)), Emission(1, 0, (1,)))),), Reason.BAD_POSITION),
    ("a skipped position", "node", (Step((Emission(1, 1, (1,)),)),), Reason.BAD_POSITION),
    ("more than max_tokens", "node", (Step((Emission(1, 0, (1,) * 1001),)),), Reason.CREDIT_EXCEEDED),
    ("an end that counts wrong", "node", (Step((Emission(1, 0, (1,)),), (END,)),), Reason.MISCOUNTED),
    ("credit without bound", "network", (Credit(((1, 1 << 24),)),), Reason.MALFORMED),
    ("a chunk nobody fetched", "node", (Chunk(1, 0, 5, b"hello"),), Reason.UNKNOWN_TRANSFER),
    ("a transfer number again", "network", (Fetch(1, "a" * 64), Fetch(1, "a" * 64)), Reason.STREAM_REUSED),
    ("five transfers", "network", tuple(Fetch(n, "a" * 64) for n in range(1, 6)), Reason.TOO_MANY),
    ("a heartbeat number again", "node", (Heartbeat(1, 0), Heartbeat(1, 0)), Reason.OUT_OF_STATE),
    ("an echo of the future", "node", (Heartbeat(1, 7),), Reason.OUT_OF_STATE),
    ("offers after the own drain", "network", (Drain(1.0), Offer(2, work(), 1)), Reason.OUT_OF_STATE),
    ("an emission of nothing", "node", (Step((Emission(1, 0, ()),)),), Reason.MALFORMED),
    ("a reason in capitals", "node", (Goodbye("", ""),), Reason.MALFORMED),
]


@pytest.mark.parametrize(("sender", "messages", "reason"), [b[1:] for b in BREACHES], ids=[b[0] for b in BREACHES])
def test_a_breach_closes_with_its_reason_on_both_sides(
    sender: str, messages: tuple[AnyMessage, ...], reason: Reason
) -> None:
    both = forced(running(), sender, *messages)
    assert_closed(both, reason, by="network" if sender == "node" else "node")


@pytest.mark.parametrize("kind", [type(message) for message in SAMPLES], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_only_hello_may_be_first_and_a_code_is_needed_at_once(kind: type, moment: str) -> None:
    message = next(message for message in SAMPLES if type(message) is kind)
    entropy = entropy_from(5)
    network = Link(network_side(), entropy=entropy, now=0.0)
    if moment == "after":
        hello = Hello((1,), NODE.public, link.crypto_scalarmult_base(entropy(32)), HOST, "x")
        assert network.receive(plain_frame(hello), 0.0) == []
    closed = network.receive(plain_frame(message, sequence=int(moment == "after")), 0.0)[-1:]
    if kind is Hello and moment == "before":
        assert closed == [] and network.state is State.WELCOMED
        return
    assert isinstance(closed[0], Closed)
    if kind is Goodbye:
        assert closed[0] == Closed(Reason.STOPPING, "the program is stopping", True, False)
    elif moment == "after":
        assert closed[0].reason is Reason.FORGED  # from here on a code is needed
    else:
        assert closed[0].reason in (Reason.WRONG_ROLE, Reason.OUT_OF_STATE)


def test_nothing_large_is_taken_before_ready() -> None:
    network = Link(network_side(), entropy=entropy_from(1), now=0.0)
    closed = network.receive(HEADER.pack(codec.GREETING_FRAME_BYTES_MAX + 1, 0, 0, bytes(16)), 0.0)[0]
    assert isinstance(closed, Closed) and closed.reason is Reason.OVERSIZED
    network = Link(network_side(), entropy=entropy_from(1), now=0.0)
    closed = network.receive(HEADER.pack(5, 0, link.MORE, bytes(16)) + b"hello", 0.0)[0]
    assert isinstance(closed, Closed) and closed.reason is Reason.OUT_OF_STATE


def test_an_unknown_reason_is_passed_on_as_text() -> None:
    both = forced(opened(), "network", Goodbye("from_the_future", "a new reason"))
    assert both.node.closed is not None and both.node.closed.reason is Reason.UNNAMED
    assert "from_the_future: a new reason" in str(both.node.closed)


# ---------------------------------------------------------------- our own mistakes are ours


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        ("node", Offer(1, work(), 1)),
        ("network", Accept(1)),
        ("node", Accept(9)),
        ("node", Step((Emission(1, 5, (1,)),))),
        ("node", Step((Emission(1, 0, (1,) * 11),))),
        ("node", Step((Emission(1, 0, (-1,)),))),
        ("node", Step((), (End(1, "stop", 3),))),
        ("network", Offer(1, work(), 1)),
        ("network", Cancel(9)),
        ("network", Hello((1,), b"", b"", "", "")),
        ("node", Goodbye("stopping", "")),
        ("node", Chunk(1, 0, 5, b"hello")),
        ("node", Heartbeat(1, 0)),  # the link's own affair
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_a_message_that_breaks_the_rules_is_not_sent(sender: str, message: AnyMessage) -> None:
    both = running(credit=10)
    peer = both.node if sender == "node" else both.network
    with pytest.raises(AssertionError):
        peer.send(message)
    both.settle()
    assert both.reasons() == (None, None)


def test_nothing_is_sent_on_a_closed_link() -> None:
    both = running()
    both.node.close(Reason.STOPPING)
    both.settle()
    both.node.send(Step((Emission(1, 0, (1,)),)))
    both.network.send(Offer(2, work(), 1))
    both.network.close(Reason.CUT)
    assert not both.node.has_bytes and not both.network.has_bytes
    assert both.network.receive(b"more", both.now) == [] and both.network.tick(1e9) == []


# ---------------------------------------------------------------- work


def test_a_stream_runs_to_its_end_and_is_forgotten() -> None:
    both = running(credit=3)
    both.node.send(Step((Emission(1, 0, (11, 12, 13)),)))
    both.settle()
    assert both.node.credit_left(1) == both.network.credit_left(1) == 0
    both.network.send(Credit(((1, 5),)))
    both.settle()
    assert both.node.credit_left(1) == both.network.credit_left(1) == 5
    both.node.send(Step((Emission(1, 3, (14,)),), (End(1, "stop", 4, cached_tokens=2),)))
    both.settle()
    assert both.network_heard()[-1] == Step((Emission(1, 3, (14,)),), (End(1, "stop", 4, cached_tokens=2),))
    assert both.node.open_streams == both.network.open_streams == 0
    assert both.node.credit_left(1) == 0


def test_positions_go_on_where_another_node_stopped() -> None:
    both = opened()
    both.network.send(Offer(1, work(max_tokens=5, delivered=[7, 8, 9]), 10))
    both.settle()
    both.node.send(Accept(1))
    assert both.node.position_of(1) == 3
    both.node.send(Step((Emission(1, 3, (10, 11)),), (End(1, "length", 2),)))
    both.settle()
    assert both.reasons() == (None, None) and both.network.open_streams == 0


def test_ids_past_max_tokens_are_out_of_position() -> None:
    both = running(max_tokens=3)
    assert_closed(forced(both, "node", Step((Emission(1, 0, (1, 2, 3, 4)),))), Reason.BAD_POSITION, by="network")


def test_a_refused_stream_is_over() -> None:
    both = opened()
    both.network.send(Offer(1, work(), 1))
    both.settle()
    both.node.send(Refuse(1, "node", "busy\n" + "x" * 100, "no\x1b[31m room\n" * 200))
    both.settle()
    refusal = both.network_heard()[-1]
    assert isinstance(refusal, Refuse) and refusal.detail.startswith("no [31m room no") and len(refusal.code) == 64
    assert both.network.open_streams == both.node.open_streams == 0


def test_ids_that_cross_a_cancel_are_tolerated_until_the_end() -> None:
    both = running()
    both.to_network.delay_seconds = both.to_node.delay_seconds = 1.0
    both.node.send(Step((Emission(1, 0, (1, 2)),)))
    both.network.send(Cancel(1, keep=0))
    both.settle()
    both.node.send(Step((Emission(1, 2, (3,)),)))
    both.run_for(1.0)
    assert both.node_heard() == [Cancel(1, keep=0)]
    both.node.send(Step((), (End(1, "cancelled", 3),)))
    both.run_for(2.5)
    assert [type(m) for m in both.network_heard() if type(m) is not Heartbeat] == [Step, Step, Step]
    assert both.reasons() == (None, None) and both.network.open_streams == 0


@pytest.mark.parametrize("answer", ["accept", "refuse"])
def test_a_cancel_that_crosses_the_answer_finds_its_end(answer: str) -> None:
    both = opened()
    both.network.send(Offer(1, work(), 10))
    both.network.send(Cancel(1))
    both.settle()
    if answer == "accept":
        both.node.send(Accept(1))
        both.node.send(Step((), (End(1, "cancelled", 0),)))
    else:
        both.node.send(Refuse(1, "node", "cancelled", ""))
    both.settle()
    assert both.reasons() == (None, None) and both.network.open_streams == both.node.open_streams == 0


def test_credit_and_cancel_that_cross_the_end_are_harmless() -> None:
    both = running(streams=2)
    both.to_network.delay_seconds = both.to_node.delay_seconds = 1.0
    both.node.send(Step((), (End(1, "stop", 0),)))
    both.network.send(Credit(((1, 5), (2, 5))))
    both.network.send(Cancel(1))
    both.run_for(1.5)
    assert both.node_heard() == [Credit(((1, 5), (2, 5)))], "the late Cancel is not even delivered"
    both.network.send(Cancel(1))
    both.network.send(Credit(((1, 5),)))
    assert not both.network.has_bytes and both.reasons() == (None, None)
    both.network.send(Cancel(2))
    both.network.send(Cancel(2))
    both.run_for(1.5)
    assert [m for m in both.node_heard() if isinstance(m, Cancel)] == [Cancel(2)]


def test_an_offer_that_crosses_the_nodes_drain_is_refused_not_a_breach() -> None:
    both = running()
    both.to_network.delay_seconds = both.to_node.delay_seconds = 1.0
    both.node.send(Drain(30.0))
    both.network.send(Offer(2, work(), 1))
    both.run_for(1.5)
    assert both.node.state is both.network.state is State.DRAINING
    assert both.network.drain_received and not both.network.can_offer
    both.node.send(Refuse(2, "node", "draining", ""))
    both.node.send(Step((Emission(1, 0, (5,)),), (End(1, "stop", 1),)))
    both.run_for(1.5)
    assert both.network.open_streams == 0
    both.node.close(Reason.DRAINED)
    both.run_for(1.5)
    assert both.reasons() == (Reason.DRAINED, Reason.DRAINED)


def test_both_may_drain() -> None:
    both = opened()
    both.node.send(Drain(1.0))
    both.network.send(Drain(2.0))
    both.settle()
    assert both.node.drain_sent and both.node.drain_received and both.reasons() == (None, None)


def test_a_file_travels_in_chunks_and_heartbeats_go_between() -> None:
    both = opened()
    content = bytes(range(256)) * 4096
    both.network.send(Fetch(both.network.next_transfer(), "c" * 64))
    both.settle()
    for offset in range(0, len(content), codec.CHUNK_BYTES_MAX):
        both.node.send(Chunk(1, offset, len(content), content[offset : offset + codec.CHUNK_BYTES_MAX]))
    assert both.node.bulk_bytes > len(content)
    frames = []
    for number in range(1, 100):
        both.node._queue(Heartbeat(number, 0))
        took = frames_of(both.node.take_bytes())
        assert isinstance(codec.decode(took[0][2]), Heartbeat), "a heartbeat goes before bulk"
        assert len(took) <= 2, "and at most one piece of bulk goes with it"
        frames += took[1:]
    assert b"".join(typing.cast(Chunk, codec.decode(f[2])).data for f in frames) == content
    assert both.node.bulk_bytes == both.node.queued_bytes == 0


def test_files_that_are_absent_or_empty_end_at_once() -> None:
    both = opened()
    for total in (-1, 0):
        both.network.send(Fetch(both.network.next_transfer(), "c" * 64))
        both.settle()
        both.node.send(Chunk(both.network._transfer_last, 0, total, b""))
        both.settle()
    assert both.reasons() == (None, None) and not both.network._transfers and not both.node._transfers


def test_a_network_can_ask_whether_it_may_fetch() -> None:
    both = pair(admit=False)
    assert not both.network.can_fetch
    both = opened()
    while both.network.can_fetch:
        both.network.send(Fetch(both.network.next_transfer(), "c" * 64))
    assert len(both.network._transfers) == codec.TRANSFERS_OPEN_MAX
    with pytest.raises(AssertionError):
        both.network.send(Fetch(both.network.next_transfer(), "c" * 64))
    both.settle()
    both.node.send(Chunk(1, 0, -1, b""))
    both.settle()
    assert both.network.can_fetch
    both.break_off()
    assert not both.network.can_fetch


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ((Chunk(1, 0, 10, b"hello"), Chunk(1, 4, 10, b"o")), Reason.BAD_POSITION),
        ((Chunk(1, 0, 10, b"hello"), Chunk(1, 6, 10, b"o")), Reason.BAD_POSITION),
        ((Chunk(1, 0, 10, b"hello"), Chunk(1, 5, 11, b"o")), Reason.MALFORMED),
        ((Chunk(1, 0, 5, b"hello"), Chunk(1, 5, 6, b"o")), Reason.UNKNOWN_TRANSFER),
        ((Chunk(1, 0, 4, b"hello"),), Reason.MALFORMED),
        ((Chunk(1, 0, 10, b""),), Reason.MALFORMED),
    ],
)
def test_a_file_that_does_not_come_in_order_closes(chunks: tuple[Chunk, ...], reason: Reason) -> None:
    both = opened()
    both.network.send(Fetch(1, "c" * 64))
    both.settle()
    assert_closed(forced(both, "node", *chunks), reason, by="network")


# ---------------------------------------------------------------- large messages


def test_a_large_offer_goes_in_fragments_that_small_messages_overtake() -> None:
    both = running(streams=2)
    both.network.send(Offer(3, work(prompt=[5] * 500_000), 1))
    takes = [frames_of(both.network.take_bytes())]
    both.network.send(Cancel(1))
    takes.append(frames_of(both.network.take_bytes()))
    assert [flags for _, flags, _ in takes[0]] == [link.MORE]
    assert [flags for _, flags, _ in takes[1]] == [link.WHOLE, link.MORE], "the Cancel goes first, then one fragment"
    both2 = running(streams=2)
    both2.network.send(Offer(3, work(prompt=[5] * 500_000), 1))
    both2.network.send(Credit(((1, 5),)))
    both2.network.send(Offer(4, work(), 1))
    both2.network.send(Cancel(3))
    both2.network.send(Cancel(4))
    both2.settle()
    assert [type(message) for message in both2.node_heard()] == [Credit, Offer, Offer, Cancel, Cancel]
    assert both2.reasons() == (None, None)
    assert typing.cast(Offer, both2.node_heard()[1]).work.prompt == work(prompt=[5] * 500_000).prompt


def test_steps_keep_their_order_when_one_is_large() -> None:
    both = running(streams=2, credit=100_000, max_tokens=100_000)
    both.node.send(Step((Emission(1, 0, (99_999,) * 30_000),)))
    both.node.send(Step((Emission(1, 30_000, (1,)), Emission(2, 0, (2,)))))
    both.settle()
    assert both.network.position_of(1) == 30_001 and both.reasons() == (None, None)


def test_a_large_catalogue_does_not_hold_up_ids() -> None:
    both = running()
    both.node.send(Offers((CLASS_OFFER,) * 64))
    many = link.msgspec.structs.replace(
        CLASS_OFFER,
        model_class=link.msgspec.structs.replace(
            CLASS_OFFER.model_class,
            weights=tuple(
                link.msgspec.structs.replace(CLASS_OFFER.model_class.weights[0], name=f"{n:05}") for n in range(2000)
            ),
        ),
    )
    both.node.send(Offers((many,)))
    both.node.take_bytes()
    both.node.take_bytes()
    both.node.send(Step((Emission(1, 0, (1,)),)))
    first = frames_of(both.node.take_bytes())
    assert isinstance(codec.decode(first[0][2]), Step) and [flags for _, flags, _ in first[1:]] == [link.MORE]


def test_fragments_without_end_are_oversized() -> None:
    both = opened()
    piece = bytes(codec.FRAGMENT_BYTES_MAX)
    for _ in range(codec.MESSAGE_BYTES_MAX // codec.FRAGMENT_BYTES_MAX + 1):
        assert both.node.closed is None
        both.node.receive(both.network._frame(piece, link.MORE), both.now)
    assert both.node.closed is not None and both.node.closed.reason is Reason.OVERSIZED
    assert both.node._assembly is None


def test_empty_fragments_are_malformed() -> None:
    both = opened()
    both.node.receive(both.network._frame(b"", link.MORE), both.now)
    assert both.node.closed is not None and both.node.closed.reason is Reason.MALFORMED


def test_memory_stays_bounded() -> None:
    both = running(streams=1)
    # Part of a frame, in pieces of one byte, is all that is ever kept.
    half = both.node._frame(bytes(codec.FRAME_BYTES_MAX))[: codec.FRAME_BYTES_MAX // 2]
    for start in range(0, len(half), 1024):
        both.network.receive(half[start : start + 1024], both.now)
    assert len(both.network._buffer) == len(half)
    # Many streams leave nothing behind.
    both = opened()
    for stream in range(1, 500):
        both.network.send(Offer(stream, work(), 1))
        both.settle()
        both.node.send(Accept(stream))
        both.node.send(Step((), (End(stream, "stop", 0),)))
    both.settle()
    for end in (both.node, both.network):
        assert not end._streams and not end._offers_waiting and end.queued_bytes == 0 and not end._buffer
    # Heartbeats remember a few times only.
    both.run_for(5.0 * 100)
    assert both.reasons() == (None, None)
    assert len(both.node._beat_times) <= link.HEARTBEATS_REMEMBERED


def test_too_many_streams_are_refused() -> None:
    both = opened()
    for stream in range(1, codec.STREAMS_OPEN_MAX + 1):
        both.network.send(Offer(stream, work(), 1))
    assert not both.network.can_offer
    with pytest.raises(AssertionError):
        both.network.send(Offer(codec.STREAMS_OPEN_MAX + 1, work(), 1))
    both.settle()
    both.network._queue(Offer(codec.STREAMS_OPEN_MAX + 2, work(), 1))
    assert_closed(both, Reason.TOO_MANY, by="node")


def test_a_peer_that_stops_reading_is_left_before_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "QUEUE_BYTES_MAX", 1 << 20)
    both = opened()
    for stream in range(1, 30):
        both.network.send(Offer(stream, work(prompt=[5] * 10_000), 1))
    assert both.network.closed is not None and both.network.closed.reason is Reason.BACKLOGGED
    assert both.network.queued_bytes == 0 and not both.network._work


def test_a_link_is_replaced_before_its_sequence_numbers_run_out() -> None:
    both = running()
    both.node._sequence_out = both.network._sequence_in = link.SEQUENCE_LIMIT - link.SEQUENCES_RESERVED + 1
    both.node.send(Step((Emission(1, 0, (1,)),)))
    both.settle()
    assert both.network_heard(), "what was sent still arrives"
    assert both.reasons() == (Reason.WORN_OUT, Reason.WORN_OUT)


# ---------------------------------------------------------------- time


def test_heartbeats_measure_the_round_trip_and_the_clocks() -> None:
    both = opened()
    both.node.telemetry = lambda: Telemetry(running=3)
    both.node.wall_minus_now, both.network.wall_minus_now = 5007.0, 5000.0
    both.to_network.delay_seconds, both.to_node.delay_seconds = 0.2, 0.2
    both.run_for(30.0)
    assert both.network.round_trip_seconds == pytest.approx(0.4)
    assert both.network.clock_offset_seconds == pytest.approx(7.0)
    assert both.network.peer_telemetry is not None and both.network.peer_telemetry.running == 3
    heard = [message for message in both.network_heard() if isinstance(message, Heartbeat)]
    assert 5 <= len(heard) <= 7 and both.node.peer_telemetry is None


@pytest.mark.parametrize("silent", ["to_network", "to_node"])
def test_a_half_open_link_is_noticed_on_both_sides(silent: str) -> None:
    both = opened()
    both.run_for(12.0)
    getattr(both, silent).cut = True
    both.run_for(15.5)
    assert Reason.HEARTBEAT_LOST in both.reasons()
    both.run_for(20.0)
    assert None not in both.reasons()


def test_any_frame_counts_as_a_sign_of_life() -> None:
    both = running(credit=100_000, max_tokens=100_000)
    both.to_node.cut = True  # no heartbeat reaches the node, so none is answered
    for position in range(14):
        both.node.send(Step((Emission(1, position, (1,)),)))
        both.run_for(1.0)
    assert both.reasons() == (None, None)
    both.run_for(14.0)
    assert both.node.closed is not None and both.node.closed.reason is Reason.HEARTBEAT_LOST


def test_a_node_that_talks_but_does_not_read_is_left() -> None:
    both = running(credit=100_000, max_tokens=100_000)
    network, now = both.network, both.now
    for position in range(100):
        now += 1.0
        both.node.send(Step((Emission(1, position, (1,)),)))
        network.receive(both.node.take_bytes(), now)
        network.tick(now)
        network.take_bytes()
        if network.closed is not None:
            break
    assert network.closed is not None and network.closed.reason is Reason.HEARTBEAT_LOST
    assert "were not read" in network.closed.detail and 55 <= now - both.now <= 75


def test_a_network_that_floods_heartbeats_is_left() -> None:
    both = opened()
    both.network._beats_sent = 29  # so that its own link lets the answers pass
    forced(both, "network", *(Heartbeat(number, 0) for number in range(1, 30)))
    assert both.node.closed is None and both.node._beats_sent == 29
    both.run_for(0.0)
    assert_closed(both, Reason.HEARTBEAT_LOST, by="node")


def test_a_side_that_slept_does_not_blame_the_other() -> None:
    both = opened()
    both.run_for(7.0)
    woken = both.now + 3600.0
    assert both.node.tick(woken) == [], "the lid was closed for an hour; what was said meanwhile waits in the socket"
    assert both.node.closed is None and both.node.next_deadline(woken) <= woken + 5.0
    for later in (4.0, 8.0, 12.0, 16.0):
        both.node.tick(woken + later)
    assert both.node.closed is not None and both.node.closed.reason is Reason.HEARTBEAT_LOST


def test_deadlines_are_kept_by_calling_tick_only_when_asked() -> None:
    both = opened()
    both.run_for(1000.0)
    assert both.reasons() == (None, None)
    beats = sum(isinstance(message, Heartbeat) for message in both.node_heard())
    assert 195 <= beats <= 200


def test_the_end_of_the_bytes_is_a_cut_unless_goodbye_was_said() -> None:
    both = running()
    both.break_off()
    assert both.reasons() == (Reason.CUT, Reason.CUT)
    assert both.node.closed is not None and both.node.closed.by_peer and not both.node.closed.permanent
    both = running()
    both.node.close(Reason.DRAINED)
    both.settle()
    both.break_off()
    assert both.reasons() == (Reason.DRAINED, Reason.DRAINED)
    assert sum(isinstance(event, Closed) for event in both.network_events) == 1


def test_what_was_queued_before_a_goodbye_arrives_first() -> None:
    both = running()
    both.node.send(Step((Emission(1, 0, (1,)),), (End(1, "stop", 1),)))
    both.node.close(Reason.STOPPING, "good night")
    both.settle()
    assert isinstance(both.network_events[0], Arrived)
    assert both.network_events[1] == Closed(Reason.STOPPING, "good night", True, False)


# ---------------------------------------------------------------- whatever arrives


@st.composite
def bytes_off_a_wire(draw: st.DrawFn) -> bytes:
    """Noise, or an unauthenticated frame around a message that was tampered with."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    payload = bytearray(codec.encode(draw(st.sampled_from(SAMPLES))))
    for _ in range(draw(st.integers(0, 3))):
        payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    return HEADER.pack(len(payload), draw(st.integers(0, 2)), 0, bytes(16)) + payload


@settings(max_examples=300, deadline=None)
@given(data=st.lists(bytes_off_a_wire(), max_size=6), side=st.sampled_from(["network", "node", "open"]))
def test_no_bytes_make_a_link_raise(data: list[bytes], side: str) -> None:
    if side == "open":
        end = opened().network
    elif side == "network":
        end = Link(network_side(hosts=lambda host: True), entropy=entropy_from(1), now=1000.0)
    else:
        end = Link(node_side(), entropy=entropy_from(1), now=1000.0)
    for chunk in data:
        for event in end.receive(chunk, 1000.0):
            assert isinstance(event, Closed) and event.reason in Reason
    for later in range(0, 20, 4):
        end.tick(1000.0 + later)
    assert end.closed is not None and len(end._buffer) == 0


@settings(max_examples=300, deadline=None)
@given(data=st.data(), flags=st.integers(0, 3))
def test_no_authentic_frame_makes_a_link_raise(data: st.DataObject, flags: int) -> None:
    both = running(streams=2)
    sample = data.draw(st.sampled_from(SAMPLES))
    payload = bytearray(codec.encode(sample))
    for _ in range(data.draw(st.integers(0, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    sender, receiver = data.draw(st.sampled_from([(both.node, both.network), (both.network, both.node)]))
    frame = sender._frame(bytes(payload), flags)
    receiver.receive(frame, both.now)
    if receiver.closed is None:
        return
    assert receiver.closed.reason in Reason
    if not receiver.closed.by_peer:
        sender.receive(receiver.take_bytes(), both.now)
        assert sender.closed is not None and sender.closed.reason is receiver.closed.reason and sender.closed.by_peer


def legal_scripts() -> st.SearchStrategy[list[tuple[str, int, int]]]:
    actions = ["offer", "accept", "refuse", "emit", "end", "cancel", "credit", "beat", "wait", "drain", "bulk"]
    return st.lists(st.tuples(st.sampled_from(actions), st.integers(1, 4), st.integers(1, 5)), max_size=60)


def play(both: LinkPair, script: list[tuple[str, int, int]]) -> Iterator[None]:
    """Honest programs on both sides: each looks at what its own link says and does something legal."""
    sent = {}
    for action, stream, number in script:
        node, network = both.node, both.network
        state = node._streams[stream].state if stream in node._streams else None
        match action:
            case "offer" if network.can_offer:
                prompt = [number] * (20_000 if number == 5 else 5)
                network.send(Offer(network.next_stream(), work(50, prompt), number))
            case "accept" if state in ("offered", "withdrawn"):
                node.send(Accept(stream))
                sent[stream] = 0
            case "refuse" if state in ("offered", "withdrawn"):
                node.send(Refuse(stream, "node", "busy", ""))
            case "emit" if state in ("running", "cancelling"):
                count = min(number, node.credit_left(stream), 50 - node.position_of(stream))
                if count > 0:
                    node.send(Step((Emission(stream, node.position_of(stream), (stream,) * count),)))
                    sent[stream] += count
            case "end" if state in ("running", "cancelling"):
                node.send(Step((), (End(stream, "stop", sent[stream]),)))
            case "cancel" if stream <= network._stream_last:
                network.send(Cancel(stream))
            case "credit" if stream <= network._stream_last:
                network.send(Credit(((stream, number),)))
            case "bulk":
                node.send(Offers((CLASS_OFFER,) * number))
            case "wait":
                both.run_for(number * 0.7)
            case "drain" if number == 5:
                node.send(Drain(1.0))
            case _:
                pass
        yield


@settings(max_examples=150, deadline=None)
@given(script=legal_scripts(), delay=st.sampled_from([0.0, 0.3, 2.0]), size=st.sampled_from([1 << 20, 1000, 37]))
def test_honest_programs_never_break_a_rule_however_their_messages_cross(
    script: list[tuple[str, int, int]], delay: float, size: int
) -> None:
    both = opened()
    both.to_network = Cable(delay, split_every(size))
    both.to_node = Cable(delay, split_every(size))
    for _ in play(both, script):
        both.settle()
    both.run_for(5.0)
    assert both.reasons() == (None, None)
    assert {n: s.position for n, s in both.node._streams.items()} == {
        n: s.position for n, s in both.network._streams.items()
    }
    assert {n: s.credit for n, s in both.node._streams.items()} == {
        n: s.credit for n, s in both.network._streams.items()
    }


def test_a_ready_for_another_node_is_malformed() -> None:
    both = pair(admit=False)
    both.settle()
    both.network._framed.append(both.network._frame(codec.encode(Ready(node_id_of(MALLORY.public), 5.0))))
    both.network.state = State.READY
    both.network._open(5.0, both.now)
    assert_closed(both, Reason.MALFORMED, by="node")
