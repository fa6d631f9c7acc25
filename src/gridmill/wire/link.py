"""The conversation between a node and the network, without I/O: bytes in, events out; messages in, bytes out.

Everything that decides which message is legal when is in this file: NEXT for the link, STREAM_NEXT for each Work on it.
One class plays both roles and applies the same rules to what it hears and to what it says: a peer that breaks one is
closed with a named Reason, a caller of ours that breaks one gets an AssertionError.
No clock and no randomness here: `now` is any monotonic time in seconds and `entropy(n)` returns n random bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from enum import StrEnum

import msgspec
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError

from gridmill.wire import codec
from gridmill.wire.codec import Malformed, clip
from gridmill.wire.identity import Identity, check_certificate, greeting_transcript, node_id_of, owner_id_of, verify
from gridmill.wire.messages import (
    VERSIONS,
    Accept,
    Acknowledged,
    AnyMessage,
    Cancel,
    Chunk,
    Countersigned,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Listed,
    NodeId,
    Offer,
    Offers,
    OwnerId,
    Proof,
    Ready,
    Receipts,
    Refuse,
    Step,
    Telemetry,
    Welcome,
)

GREETING_SECONDS_MAX = 10.0  # three flights over a slow line; longer and idle sockets could pile up
HEARTBEATS_MISSED_MAX = 3  # one lost Wi-Fi second must not end fifty streams
SEND_BYTES_MAX = 256 << 10  # one socket send: more saves nothing, and receivers can bound a WebSocket message
QUEUE_BYTES_MAX = 96 << 20  # one whole tokenizer plus work; past it the other side has stopped reading
HEARTBEATS_UNHEARD_MAX = 12  # a slow line's own buffers may hold half a minute of a tokenizer; past it nobody reads
HEARTBEATS_REMEMBERED = 16  # whose sending times are kept for round trips; more than may go unheard
SEQUENCE_LIMIT = 1 << 32
SEQUENCES_RESERVED = 1 << 16  # what may still be queued when a worn-out link says goodbye

MAC_BYTES = 16
HEADER = struct.Struct("<IIB16s")  # payload length, sequence, flags, MAC
AUTHENTICATED_HEADER = struct.Struct("<IIB")  # the part of it that the MAC covers, before the payload
NO_MAC = bytes(MAC_BYTES)
WHOLE, MORE, LAST = 0, 1, 2  # flags: a whole message, a fragment with more to come, the last fragment


class Role(StrEnum):
    NODE = "node"
    NETWORK = "network"


class State(StrEnum):
    """Where the conversation stands; both ends walk the same states."""

    DIALLED = "dialled"
    GREETED = "greeted"
    WELCOMED = "welcomed"
    PROVEN = "proven"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class StreamState(StrEnum):
    """Where one Work on the link stands."""

    OFFERED = "offered"
    WITHDRAWN = "withdrawn"  # cancelled before it was answered; an answer may be on its way
    RUNNING = "running"
    CANCELLING = "cancelling"  # ids may still be on their way, then the End
    ENDED = "ended"  # forgotten; a number no greater than the last one offered means this


_AT_WORK: tuple[type, ...] = (
    *(Offers, Fetch, Chunk, Listed, Offer, Accept, Refuse, Step, Credit, Cancel),
    *(Receipts, Countersigned, Acknowledged, Heartbeat),
)

NEXT: dict[tuple[State, type], State] = {
    (State.DIALLED, Hello): State.GREETED,
    (State.GREETED, Welcome): State.WELCOMED,
    (State.WELCOMED, Proof): State.PROVEN,
    (State.PROVEN, Ready): State.READY,
    **{(State.READY, kind): State.READY for kind in _AT_WORK},
    (State.READY, Drain): State.DRAINING,
    # Both may drain, and an Offer may cross the node's Drain on the way: the node refuses it.
    **{(State.DRAINING, kind): State.DRAINING for kind in (*_AT_WORK, Drain)},
    **{(state, Goodbye): State.CLOSED for state in State if state is not State.CLOSED},
}

SENDERS: dict[type, tuple[Role, ...]] = {
    Hello: (Role.NODE,),
    Welcome: (Role.NETWORK,),
    Proof: (Role.NODE,),
    Ready: (Role.NETWORK,),
    Offers: (Role.NODE,),
    Fetch: (Role.NETWORK,),
    Chunk: (Role.NODE,),
    Listed: (Role.NETWORK,),
    Offer: (Role.NETWORK,),
    Accept: (Role.NODE,),
    Refuse: (Role.NODE,),
    Step: (Role.NODE,),
    Credit: (Role.NETWORK,),
    Cancel: (Role.NETWORK,),
    Receipts: (Role.NETWORK,),
    Countersigned: (Role.NODE,),
    Acknowledged: (Role.NETWORK,),
    Heartbeat: (Role.NODE, Role.NETWORK),
    Drain: (Role.NODE, Role.NETWORK),
    Goodbye: (Role.NODE, Role.NETWORK),
}

STREAM_NEXT: dict[tuple[StreamState, type], StreamState] = {
    (StreamState.OFFERED, Accept): StreamState.RUNNING,
    (StreamState.OFFERED, Refuse): StreamState.ENDED,
    (StreamState.OFFERED, Credit): StreamState.OFFERED,
    (StreamState.OFFERED, Cancel): StreamState.WITHDRAWN,
    (StreamState.WITHDRAWN, Accept): StreamState.CANCELLING,
    (StreamState.WITHDRAWN, Refuse): StreamState.ENDED,
    (StreamState.WITHDRAWN, Credit): StreamState.WITHDRAWN,
    (StreamState.RUNNING, Emission): StreamState.RUNNING,
    (StreamState.RUNNING, Credit): StreamState.RUNNING,
    (StreamState.RUNNING, Cancel): StreamState.CANCELLING,
    (StreamState.RUNNING, End): StreamState.ENDED,
    (StreamState.CANCELLING, Emission): StreamState.CANCELLING,
    (StreamState.CANCELLING, Credit): StreamState.CANCELLING,
    (StreamState.CANCELLING, End): StreamState.ENDED,
}
_OF_THE_PROGRAM = frozenset({*_AT_WORK, Drain} - {Heartbeat})
_SENT_BY = {role: frozenset(kind for kind, roles in SENDERS.items() if role in roles) for role in Role}
_MAY_EMIT = frozenset(state for state, kind in STREAM_NEXT if kind is Emission)


class Reason(StrEnum):
    """Why a link closed: what Goodbye carries and what both logs say. Sentences are in SENTENCES."""

    BAD_SIGNATURE = "bad_signature"
    FORGED = "forged"
    REPLAYED = "replayed"
    GAP = "gap"
    MALFORMED = "malformed"
    OVERSIZED = "oversized"
    OUT_OF_STATE = "out_of_state"
    WRONG_ROLE = "wrong_role"
    VERSION_UNSUPPORTED = "version_unsupported"
    DOWNGRADED = "downgraded"
    WRONG_HOST = "wrong_host"
    WRONG_NETWORK_KEY = "wrong_network_key"
    BAD_OWNER_CERTIFICATE = "bad_owner_certificate"
    JOIN_REFUSED = "join_refused"
    GREETING_TIMEOUT = "greeting_timeout"
    HEARTBEAT_LOST = "heartbeat_lost"
    CANCEL_UNANSWERED = "cancel_unanswered"
    UNKNOWN_STREAM = "unknown_stream"
    STREAM_REUSED = "stream_reused"
    DOUBLE_END = "double_end"
    BAD_POSITION = "bad_position"
    MISCOUNTED = "miscounted"
    CREDIT_EXCEEDED = "credit_exceeded"
    UNKNOWN_TRANSFER = "unknown_transfer"
    TOO_MANY = "too_many"
    BACKLOGGED = "backlogged"
    WORN_OUT = "worn_out"
    SUPERSEDED = "superseded"
    DRAINED = "drained"
    STOPPING = "stopping"
    CUT = "cut"
    UNNAMED = "unnamed"


SENTENCES: dict[Reason, str] = {
    Reason.BAD_SIGNATURE: "the greeting was not signed by the key it names, for this connection",
    Reason.FORGED: "a frame does not carry the code that only the other side can make",
    Reason.REPLAYED: "a frame came again",
    Reason.GAP: "a frame is missing",
    Reason.MALFORMED: "a frame or message breaks the format or a limit",
    Reason.OVERSIZED: "a frame or message is larger than allowed",
    Reason.OUT_OF_STATE: "a message came at a point where it has no meaning",
    Reason.WRONG_ROLE: "a message came that only the other role may send",
    Reason.VERSION_UNSUPPORTED: "the two sides have no protocol version in common; the older one needs an upgrade",
    Reason.DOWNGRADED: "a lower protocol version was chosen than both sides speak",
    Reason.WRONG_HOST: "the node dialled a name that this network does not answer to",
    Reason.WRONG_NETWORK_KEY: "the network's key is not the pinned one; if its operator changed it, pin the new key",
    Reason.BAD_OWNER_CERTIFICATE: "the owner's certificate is not over this node's key",
    Reason.JOIN_REFUSED: "the network does not let this node in",
    Reason.GREETING_TIMEOUT: f"the greeting took longer than {GREETING_SECONDS_MAX:.0f} seconds",
    Reason.HEARTBEAT_LOST: f"nothing was heard for {HEARTBEATS_MISSED_MAX} heartbeats, or none of ours was read",
    Reason.CANCEL_UNANSWERED: "the node said no last word on a work that was cancelled long ago",
    Reason.UNKNOWN_STREAM: "a message names a stream that was never offered",
    Reason.STREAM_REUSED: "an offer's stream number is not above all before it",
    Reason.DOUBLE_END: "a stream went on after it had ended",
    Reason.BAD_POSITION: "ids or bytes are not at the next position, or lie past the agreed end",
    Reason.MISCOUNTED: "a stream's End does not count the ids that were sent",
    Reason.CREDIT_EXCEEDED: "more ids were sent than credit was given for",
    Reason.UNKNOWN_TRANSFER: "a chunk belongs to no open transfer",
    Reason.TOO_MANY: "too many streams or transfers are open at once",
    Reason.BACKLOGGED: f"the other side reads too slowly: over {QUEUE_BYTES_MAX >> 20} MiB are waiting",
    Reason.WORN_OUT: "the connection has used up its sequence numbers; a new one continues",
    Reason.SUPERSEDED: "the same node key has connected again; two programs may be using one key file",
    Reason.DRAINED: "everything that ran has finished, as agreed",
    Reason.STOPPING: "the program is stopping",
    Reason.CUT: "the connection broke",
    Reason.UNNAMED: "the other side gave a reason that this version does not know",
}

# Redialling cannot help: a person has to change something first.
PERMANENT = frozenset(
    {
        Reason.VERSION_UNSUPPORTED,
        Reason.WRONG_HOST,
        Reason.WRONG_NETWORK_KEY,
        Reason.BAD_OWNER_CERTIFICATE,
        Reason.JOIN_REFUSED,
        Reason.SUPERSEDED,
    }
)


@dataclass(frozen=True, slots=True)
class NodeSide:
    """What a node brings to the greeting. `host` is the host[:port] it dialled; empty owner fields: its own owner."""

    identity: Identity
    host: str
    software: str
    owner_key: bytes = b""
    owner_signature: bytes = b""
    join_token: str = ""
    pinned_network_key: bytes | None = None


@dataclass(frozen=True, slots=True)
class NetworkSide:
    """What the network brings. `hosts` says which host[:port] values are names of this network."""

    identity: Identity
    hosts: Callable[[str], bool] | Container[str]
    software: str
    heartbeat_seconds: float = 5.0

    def answers_to(self, host: str) -> bool:
        return self.hosts(host) if callable(self.hosts) else host in self.hosts


class Proven(msgspec.Struct, frozen=True):
    """Network only: the node has proved its key; the program answers with `admit` or `refuse`."""

    node_id: NodeId
    node_key: bytes
    owner_id: OwnerId
    owner_key: bytes
    join_token: str
    software: str
    version: int


class Opened(msgspec.Struct, frozen=True):
    """Both sides: the greeting is done and work may begin. `software` is the node's."""

    node_id: NodeId
    node_key: bytes
    network_key: bytes
    owner_id: OwnerId
    software: str
    version: int
    heartbeat_seconds: float


class Arrived(msgspec.Struct, frozen=True):
    """A message of the work phase, already checked against every rule of this file."""

    message: AnyMessage


class Closed(msgspec.Struct, frozen=True):
    """The last event. `by_peer`: the other side said so, or went away. `permanent`: redialling cannot help.

    A Goodbye that came before frames are authenticated is never permanent: anyone on the path could have written it.
    """

    reason: Reason
    detail: str
    by_peer: bool
    permanent: bool

    def __str__(self) -> str:
        who = "the other side" if self.by_peer else "this side"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.reason} by {who}: {SENTENCES[self.reason]}{detail}"


Event = Proven | Opened | Arrived | Closed


class Violation(Exception):
    """Someone broke a rule. Never leaves this file: it becomes a Closed, or an AssertionError if it was us."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class _Stream:
    """What both ends know of one Work. Positions count output ids, those delivered before the Offer included."""

    __slots__ = ("credit", "first", "position", "position_end", "state")

    def __init__(self, offer: Offer) -> None:
        self.state = StreamState.OFFERED
        self.first = len(offer.work.delivered) // 4
        self.position = self.first
        self.position_end = offer.work.sampling.max_tokens
        self.credit = offer.credit


class _Transfer:
    __slots__ = ("offset", "total_bytes")

    def __init__(self) -> None:
        self.offset = 0
        self.total_bytes: int | None = None


class Link:
    """One end of one connection.

    The owner feeds `receive`, `eof` and `tick`, hands what `take_bytes` returns to the socket, and acts on the events.
    `wake` is called whenever bytes or events were queued by something other than those, so that a pump can sleep.
    """

    def __init__(
        self,
        side: NodeSide | NetworkSide,
        *,
        entropy: Callable[[int], bytes],
        now: float,
        versions: tuple[int, ...] = VERSIONS,
    ) -> None:
        self.role = Role.NODE if isinstance(side, NodeSide) else Role.NETWORK
        self.state = State.DIALLED
        self.closed: Closed | None = None
        self.opened: Opened | None = None
        self.telemetry: Callable[[], Telemetry] | None = None  # a node sets it; called for each heartbeat
        self.peer_telemetry: Telemetry | None = None
        self.round_trip_seconds: float | None = None  # network only, smoothed; it trusts no clock of the node
        self.clock_offset_seconds: float | None = None  # network only: how far the node's wall clock is ahead of ours
        self.wall_minus_now = 0.0  # set by the owner, so that clocks can be compared: wall clock minus `now`
        self.wake: Callable[[], None] = _nobody
        self.drain_sent = False
        self.drain_received = False

        self._side = side
        self._versions = tuple(sorted(set(versions)))
        self._events: list[Event] = []
        self._may_hear = _SENT_BY[_other(self.role)]

        # The greeting
        self._began = now
        self._secret = entropy(32)
        self._challenge = crypto_scalarmult_base(self._secret)
        self._hello: Hello | None = None
        self._welcome: Welcome | None = None
        self._proven: Proven | None = None

        # Frames out: greetings and goodbyes are framed at once, the rest when taken, by lane.
        self._mac_out: hashlib.blake2b | None = None
        self._sequence_out = 0
        self._framed: list[bytes] = []
        self._urgent: deque[_Queued] = deque()  # overtakes everything: heartbeats, credit, cancel
        self._work: deque[_Queued] = deque()  # in order: offers, answers, steps
        self._bulk: deque[_Queued] = deque()  # in order, one frame per take: class offers, file chunks
        self._fragmented: deque[_Queued] | None = None  # the lane whose head is being sent in fragments
        self._fragment_offset = 0
        self._farewell: bytes | None = None
        self._offers_waiting: set[int] = set()  # streams whose Offer is still in the work lane
        self.queued_bytes = 0
        self.bulk_bytes = 0

        # Frames in
        self._mac_in: hashlib.blake2b | None = None
        self._sequence_in = 0
        self._buffer = bytearray()
        self._assembly: bytearray | None = None
        self._heard_authenticated = False

        # Heartbeats
        self._last_heard = now
        self._last_tick = now
        self._next_beat = math.inf
        self._beats_sent = 0
        self._beats_heard = 0
        self._echo_heard = 0
        self._beat_times: dict[int, float] = {}

        # Work
        self._streams: dict[int, _Stream] = {}
        self._stream_last = 0
        self._transfers: dict[int, _Transfer] = {}
        self._transfer_last = 0

        if isinstance(side, NodeSide):
            self._hello = Hello(
                self._versions, side.identity.public, self._challenge, side.host, clip(side.software, 100)
            )
            self._greet(self._hello)

    # ------------------------------------------------------------ what the program does

    def send(self, message: AnyMessage) -> None:
        """Queues a message of the work phase. Raises AssertionError when our own side breaks a rule.

        On a closed link, and for Credit or Cancel of a stream that has ended, it does nothing: those are races.
        """
        if self.state is State.CLOSED:
            return
        kind = type(message)
        assert self.role in SENDERS[kind], f"a {self.role} does not send {kind.__name__}"
        assert kind in _OF_THE_PROGRAM, f"{kind.__name__} is sent by the link itself"
        following = NEXT.get((self.state, kind))
        assert following is not None, f"{kind.__name__} has no meaning while {self.state}"
        message = _clipped(message)
        try:
            codec.check(message)
            if not self._apply(message, ours=True):
                return
        except (Violation, Malformed) as error:
            raise AssertionError(f"our own {kind.__name__} breaks the protocol: {error}") from error
        self.state = following
        self._queue(message)

    def admit(self, now: float) -> None:
        """Network, after Proven: lets the node in."""
        if self.state is State.CLOSED:
            return
        side = self._side
        assert isinstance(side, NetworkSide) and self.state is State.PROVEN and self._proven, "nobody to admit"
        self._greet(Ready(self._proven.node_id, side.heartbeat_seconds))
        self._open(side.heartbeat_seconds, now)
        self.wake()

    def refuse(self, reason: Reason, detail: str = "") -> None:
        """Network, after Proven: sends the node away."""
        self.close(reason, detail)

    def close(self, reason: Reason, detail: str = "") -> None:
        """Says goodbye after what is already queued, file chunks excepted. Closing twice does nothing."""
        if self.state is State.CLOSED:
            return
        self._drop_bulk()
        self._end(reason, detail)
        self._farewell = codec.encode(Goodbye(reason, clip(detail)))
        self.wake()

    # ------------------------------------------------------------ what the pump does

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Takes any piece of the byte stream. Never raises because of what is in it."""
        if self.state is not State.CLOSED:
            try:
                self._take_in(data, now)
            except Violation as violation:
                self._violated(violation.reason, violation.detail)
            except Malformed as error:
                self._violated(Reason.MALFORMED, str(error))
        return self.take_events()

    def eof(self, now: float) -> list[Event]:
        """The byte stream ended. After a Goodbye that is how it should be; otherwise the connection was cut."""
        if self.state is not State.CLOSED:
            self._end(Reason.CUT, "", by_peer=True)
        self._drop_all()
        return self.take_events()

    def tick(self, now: float) -> list[Event]:
        """Call at or after `next_deadline`. Calling it more often is harmless."""
        if self.state is State.CLOSED:
            return self.take_events()
        if self.opened is None:
            if now >= self._began + GREETING_SECONDS_MAX:
                self._violated(Reason.GREETING_TIMEOUT, f"while {self.state}")
            return self.take_events()
        interval = self.opened.heartbeat_seconds
        if now - self._last_tick > 2 * interval:
            # We ourselves were stopped or starved, and what the other side said meanwhile waits in the socket.
            self._last_heard = max(self._last_heard, now - (HEARTBEATS_MISSED_MAX - 1) * interval)
        self._last_tick = now
        if now >= self._last_heard + HEARTBEATS_MISSED_MAX * interval:
            self._violated(Reason.HEARTBEAT_LOST, f"silent for {now - self._last_heard:.1f} seconds")
        elif self._beats_sent - self._echo_heard > HEARTBEATS_UNHEARD_MAX:
            self._violated(Reason.HEARTBEAT_LOST, f"{HEARTBEATS_UNHEARD_MAX} of ours were not read")
        elif now >= self._next_beat:
            self._beat(now)
        return self.take_events()

    def next_deadline(self, now: float) -> float:
        """When `tick` must be called at the latest; infinity once closed."""
        if self.state is State.CLOSED:
            return math.inf
        if self.opened is None:
            return self._began + GREETING_SECONDS_MAX
        return min(self._next_beat, self._last_heard + HEARTBEATS_MISSED_MAX * self.opened.heartbeat_seconds)

    @property
    def has_bytes(self) -> bool:
        return bool(self._framed or self._urgent or self._work or self._bulk) or self._farewell is not None

    def take_bytes(self) -> bytes:
        """What to send next, b"" when nothing: small frames up to SEND_BYTES_MAX and at most one frame of bulk."""
        frames = self._framed
        self._framed = []
        size = 0
        while self._urgent and size < SEND_BYTES_MAX:
            size += self._take_whole(self._urgent, frames)
        while self._work and size < SEND_BYTES_MAX and len(self._work[0][0]) <= codec.FRAME_BYTES_MAX:
            size += self._take_whole(self._work, frames)
        if size < SEND_BYTES_MAX:
            self._take_one_of_bulk(frames)
        if self._farewell is not None and not (self._urgent or self._work or self._bulk):
            frames.append(self._frame(self._farewell))
            self._farewell = None
        if len(frames) == 1:
            return frames[0]
        return b"".join(frames)

    def take_events(self) -> list[Event]:
        """Events that were caused by `admit` or `close`; the pump's own calls return these too."""
        events = self._events
        self._events = []
        return events

    # ------------------------------------------------------------ what the program asks

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def can_offer(self) -> bool:
        """Network: whether an Offer may be sent at all. A node that drains would refuse it."""
        return self.state is State.READY and len(self._streams) < codec.STREAMS_OPEN_MAX

    @property
    def at_work(self) -> bool:
        """Whether messages of the work phase may be sent: after the greeting, and until the link closes."""
        return self.state in (State.READY, State.DRAINING)

    @property
    def can_fetch(self) -> bool:
        """Network: whether a Fetch may be sent now. One that is never answered stays open as long as the link."""
        return self.at_work and len(self._transfers) < codec.TRANSFERS_OPEN_MAX

    def next_stream(self) -> int:
        """Network: the number for the next Offer."""
        return self._stream_last + 1

    def next_transfer(self) -> int:
        """Network: the number for the next Fetch."""
        return self._transfer_last + 1

    def credit_left(self, stream: int) -> int:
        """How many more ids the node may send on this stream; 0 when it is not open."""
        record = self._streams.get(stream)
        return record.credit if record is not None else 0

    def position_of(self, stream: int) -> int:
        """The output position that the next id of this stream takes; 0 when it is not open."""
        record = self._streams.get(stream)
        return record.position if record is not None else 0

    # ------------------------------------------------------------ frames in

    def _take_in(self, data: bytes, now: float) -> None:
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        offset = 0
        available = len(source)
        while available - offset >= HEADER.size:
            length, sequence, flags, mac = HEADER.unpack_from(source, offset)
            limit = codec.FRAME_BYTES_MAX if self.opened is not None else codec.GREETING_FRAME_BYTES_MAX
            if length > limit:
                raise Violation(Reason.OVERSIZED, f"a frame of {length} bytes, {limit} allowed while {self.state}")
            if flags > LAST:
                raise Violation(Reason.MALFORMED, f"frame flags {flags}")
            # The sequence comes first, so that a repeated frame is called that even where frames carry no MAC.
            if sequence != self._sequence_in:
                reason = Reason.REPLAYED if sequence < self._sequence_in else Reason.GAP
                raise Violation(reason, f"frame {sequence} where {self._sequence_in} was next")
            start = offset + HEADER.size
            end = start + length
            if end > available:
                break
            payload = bytes(source[start:end])
            authenticated = self._check_mac(source[offset : offset + AUTHENTICATED_HEADER.size], payload, mac)
            self._sequence_in += 1
            offset = end
            self._last_heard = now
            if flags == WHOLE:
                self._heard(codec.decode(payload), authenticated, now)
            else:
                self._reassemble(payload, flags, authenticated, now)
            if self.state is State.CLOSED:
                return
        if source is self._buffer:
            del self._buffer[:offset]
        else:
            self._buffer += data[offset:] if offset else data

    def _check_mac(self, header: bytes | bytearray, payload: bytes, mac: bytes) -> bool:
        """Whether the frame is authenticated; raises unless that was not yet to be expected."""
        if self._mac_in is not None:
            code = self._mac_in.copy()
            code.update(header)
            code.update(payload)
            if hmac.compare_digest(code.digest(), mac):
                self._heard_authenticated = True
                return True
            # A node that rejects our Welcome has no keys yet, but its Goodbye says why.
            if self._heard_authenticated or mac != NO_MAC or not _is_goodbye(payload):
                raise Violation(Reason.FORGED, f"frame {self._sequence_in}")
        elif mac != NO_MAC:
            raise Violation(Reason.FORGED, f"frame {self._sequence_in} has a code before there are keys")
        return False

    def _reassemble(self, payload: bytes, flags: int, authenticated: bool, now: float) -> None:
        if self.opened is None:
            raise Violation(Reason.OUT_OF_STATE, f"a fragment while {self.state}")
        if not payload:
            raise Violation(Reason.MALFORMED, "an empty fragment")
        if self._assembly is None:
            self._assembly = bytearray()
        if len(self._assembly) + len(payload) > codec.MESSAGE_BYTES_MAX:
            raise Violation(Reason.OVERSIZED, f"fragments of one message pass {codec.MESSAGE_BYTES_MAX} bytes")
        self._assembly += payload
        if flags == LAST:
            whole = bytes(self._assembly)
            self._assembly = None
            self._heard(codec.decode(whole), authenticated, now)

    def _heard(self, message: AnyMessage, authenticated: bool, now: float) -> None:
        """One whole message: is it this role's, at this point, within the rules of what came before?"""
        kind = type(message)
        if kind not in self._may_hear:
            raise Violation(Reason.WRONG_ROLE, f"{kind.__name__} from the {_other(self.role)}")
        following = NEXT.get((self.state, kind))
        if following is None:
            raise Violation(Reason.OUT_OF_STATE, f"{kind.__name__} while {self.state}")
        if kind in _OF_THE_PROGRAM:
            if self._apply(message, ours=False):
                self.state = following
                self._events.append(Arrived(message))
            return
        match message:
            case Goodbye():
                self._goodbye_heard(message, authenticated)
            case Hello():
                self.state = following
                self._hello_heard(message)
            case Welcome():
                self.state = following
                self._welcome_heard(message)
            case Proof():
                self.state = following
                self._proof_heard(message)
            case Ready():
                self._ready_heard(message, now)
            case Heartbeat():
                self._heartbeat_heard(message, now)
                self._events.append(Arrived(message))
                self._answer_heartbeat(now)

    def _goodbye_heard(self, message: Goodbye, authenticated: bool) -> None:
        detail = clip(message.detail)
        try:
            reason = Reason(message.reason)
        except ValueError:
            reason, detail = Reason.UNNAMED, clip(f"{message.reason}: {detail}")
        self._end(reason, detail, by_peer=True, permanent=authenticated and reason in PERMANENT)
        self._drop_all()

    # ------------------------------------------------------------ the greeting

    def _hello_heard(self, hello: Hello) -> None:
        side = self._side
        assert isinstance(side, NetworkSide)
        if not side.answers_to(hello.host):
            raise Violation(Reason.WRONG_HOST, hello.host)
        common = set(self._versions) & set(hello.versions)
        if not common:
            raise Violation(Reason.VERSION_UNSUPPORTED, f"{list(self._versions)} here, {list(hello.versions)} there")
        self._hello = hello
        unsigned = Welcome(max(common), self._versions, side.identity.public, self._challenge, bytes(64))
        signature = side.identity.sign(_transcript("network", hello, unsigned))
        self._welcome = Welcome(
            unsigned.version, unsigned.versions, unsigned.network_key, unsigned.challenge, signature
        )
        self._greet(self._welcome)  # framed before there are keys: it carries no MAC, its signature covers it
        self._derive_keys(hello, self._welcome, hello.challenge)

    def _welcome_heard(self, welcome: Welcome) -> None:
        side, hello = self._side, self._hello
        assert isinstance(side, NodeSide) and hello is not None
        if side.pinned_network_key is not None and welcome.network_key != side.pinned_network_key:
            raise Violation(Reason.WRONG_NETWORK_KEY, f"{welcome.network_key.hex()} answered")
        if not verify(welcome.network_key, _transcript("network", hello, welcome), welcome.signature):
            raise Violation(Reason.BAD_SIGNATURE, "the network's Welcome")
        common = set(hello.versions) & set(welcome.versions)
        if welcome.version not in common:
            raise Violation(Reason.VERSION_UNSUPPORTED, f"version {welcome.version} was chosen")
        if welcome.version != max(common):
            raise Violation(Reason.DOWNGRADED, f"version {welcome.version} although both speak {max(common)}")
        self._welcome = welcome
        self._derive_keys(hello, welcome, welcome.challenge)
        signature = side.identity.sign(_transcript("node", hello, welcome))
        self._greet(Proof(signature, side.owner_key, side.owner_signature, side.join_token))

    def _proof_heard(self, proof: Proof) -> None:
        hello, welcome = self._hello, self._welcome
        assert hello is not None and welcome is not None
        if not verify(hello.node_key, _transcript("node", hello, welcome), proof.signature):
            raise Violation(Reason.BAD_SIGNATURE, "the node's Proof")
        owner_key = proof.owner_key or hello.node_key
        if proof.owner_key and not check_certificate(proof.owner_key, hello.node_key, proof.owner_signature):
            raise Violation(Reason.BAD_OWNER_CERTIFICATE, "")
        self._proven = Proven(
            node_id=node_id_of(hello.node_key),
            node_key=hello.node_key,
            owner_id=owner_id_of(owner_key),
            owner_key=owner_key,
            join_token=proof.join_token,
            software=hello.software,
            version=welcome.version,
        )
        self._events.append(self._proven)

    def _ready_heard(self, ready: Ready, now: float) -> None:
        side = self._side
        if ready.node_id != node_id_of(side.identity.public):
            raise Violation(Reason.MALFORMED, "Ready names another node")
        self.state = State.READY
        self._open(ready.heartbeat_seconds, now)

    def _open(self, heartbeat_seconds: float, now: float) -> None:
        hello, welcome, side = self._hello, self._welcome, self._side
        assert hello is not None and welcome is not None and self.state is State.READY
        owner_key = side.owner_key if isinstance(side, NodeSide) else self._proven.owner_key if self._proven else b""
        self.opened = Opened(
            node_id=node_id_of(hello.node_key),
            node_key=hello.node_key,
            network_key=welcome.network_key,
            owner_id=owner_id_of(owner_key or hello.node_key),
            software=hello.software,
            version=welcome.version,
            heartbeat_seconds=heartbeat_seconds,
        )
        self._last_heard = now
        self._last_tick = now
        # The node answers each heartbeat of the network, and speaks of its own accord only when none comes.
        self._next_beat = now + (heartbeat_seconds if self.role is Role.NETWORK else 1.25 * heartbeat_seconds)
        self._events.append(self.opened)

    def _derive_keys(self, hello: Hello, welcome: Welcome, challenge: bytes) -> None:
        try:
            shared = crypto_scalarmult(self._secret, challenge)
        except CryptoError:
            raise Violation(Reason.MALFORMED, "the challenge is no usable X25519 key") from None
        transcript = _transcript("keys", hello, welcome)
        to_network = _frame_key(shared, b"to-network", transcript)
        to_node = _frame_key(shared, b"to-node", transcript)
        ours, theirs = (to_network, to_node) if self.role is Role.NODE else (to_node, to_network)
        self._mac_out = hashlib.blake2b(key=ours, digest_size=MAC_BYTES)
        self._mac_in = hashlib.blake2b(key=theirs, digest_size=MAC_BYTES)
        self._secret = b""

    def _greet(self, message: Hello | Welcome | Proof | Ready) -> None:
        self.state = NEXT[self.state, type(message)]
        codec.check(message)
        self._framed.append(self._frame(codec.encode(message)))

    # ------------------------------------------------------------ work: the same rules for both directions

    def _apply(self, message: AnyMessage, ours: bool) -> bool:
        """Moves streams and transfers on; False when the message is a harmless latecomer. Raises Violation."""
        match message:
            case Step():
                self._apply_step(message)
            case Offer():
                self._apply_offer(message)
            case Accept() | Refuse():
                self._advance(message.stream, type(message))
            case Credit():
                return self._apply_credit(message)
            case Cancel():
                return self._apply_cancel(message)
            case Fetch():
                self._apply_fetch(message)
            case Chunk():
                self._apply_chunk(message)
            case Drain():
                if ours:
                    self.drain_sent = True
                else:
                    self.drain_received = True
            case _:
                pass
        return True

    def _apply_step(self, step: Step) -> None:
        streams = self._streams
        for emission in step.emissions:
            stream = streams.get(emission.stream)
            if stream is None:
                raise self._no_stream(emission.stream)
            if stream.state not in _MAY_EMIT:
                raise Violation(Reason.OUT_OF_STATE, f"ids of stream {emission.stream} while {stream.state}")
            if emission.position != stream.position:
                raise Violation(
                    Reason.BAD_POSITION,
                    f"stream {emission.stream} at {emission.position} where {stream.position} was next",
                )
            count = len(emission.ids)
            stream.position += count
            stream.credit -= count
            if stream.credit < 0:
                raise Violation(Reason.CREDIT_EXCEEDED, f"stream {emission.stream} by {-stream.credit} ids")
            if stream.position > stream.position_end:
                raise Violation(
                    Reason.BAD_POSITION, f"stream {emission.stream} passes its max_tokens of {stream.position_end}"
                )
        for number in step.paused:
            if number not in streams:
                raise self._no_stream(number)
        for end in step.ends:
            stream = self._advance(end.stream, End)
            if end.count != stream.position - stream.first:
                raise Violation(
                    Reason.MISCOUNTED,
                    f"stream {end.stream} counts {end.count}, sent were {stream.position - stream.first}",
                )

    def _apply_offer(self, offer: Offer) -> None:
        if self.drain_sent if self.role is Role.NETWORK else self.drain_received:
            raise Violation(Reason.OUT_OF_STATE, "an Offer after the network's own Drain")
        if offer.stream <= self._stream_last:
            raise Violation(Reason.STREAM_REUSED, f"stream {offer.stream} after {self._stream_last}")
        if len(self._streams) >= codec.STREAMS_OPEN_MAX:
            raise Violation(Reason.TOO_MANY, f"over {codec.STREAMS_OPEN_MAX} streams")
        self._stream_last = offer.stream
        self._streams[offer.stream] = _Stream(offer)

    def _apply_credit(self, credit: Credit) -> bool:
        live = False
        for number, ids in credit.grants:
            stream = self._streams.get(number)
            if stream is None:
                if number > self._stream_last:
                    raise self._no_stream(number)
                continue  # it ended while the grant was on its way
            stream.credit += ids
            if stream.credit > codec.CREDIT_MAX:
                raise Violation(Reason.MALFORMED, f"stream {number} holds credit over {codec.CREDIT_MAX} ids")
            live = True
        return live

    def _apply_cancel(self, cancel: Cancel) -> bool:
        stream = self._streams.get(cancel.stream)
        if stream is None and cancel.stream > self._stream_last:
            raise self._no_stream(cancel.stream)
        if stream is None or (stream.state, Cancel) not in STREAM_NEXT:
            return False  # it ended while the Cancel was on its way, or was cancelled before
        self._advance(cancel.stream, Cancel)
        return True

    def _apply_fetch(self, fetch: Fetch) -> None:
        if fetch.transfer <= self._transfer_last:
            raise Violation(Reason.STREAM_REUSED, f"transfer {fetch.transfer} after {self._transfer_last}")
        if len(self._transfers) >= codec.TRANSFERS_OPEN_MAX:
            raise Violation(Reason.TOO_MANY, f"over {codec.TRANSFERS_OPEN_MAX} transfers")
        self._transfer_last = fetch.transfer
        self._transfers[fetch.transfer] = _Transfer()

    def _apply_chunk(self, chunk: Chunk) -> None:
        transfer = self._transfers.get(chunk.transfer)
        if transfer is None:
            raise Violation(Reason.UNKNOWN_TRANSFER, f"transfer {chunk.transfer}")
        if transfer.total_bytes is None:
            transfer.total_bytes = chunk.total_bytes
        if chunk.total_bytes != transfer.total_bytes:
            raise Violation(Reason.MALFORMED, f"transfer {chunk.transfer} changed its total_bytes")
        if chunk.offset != transfer.offset:
            raise Violation(
                Reason.BAD_POSITION, f"transfer {chunk.transfer} at {chunk.offset} where {transfer.offset} was next"
            )
        transfer.offset += len(chunk.data)
        if transfer.offset >= transfer.total_bytes:  # also when the file is empty (0) or absent (-1)
            del self._transfers[chunk.transfer]

    def _advance(self, number: int, kind: type) -> _Stream:
        stream = self._streams.get(number)
        if stream is None:
            raise self._no_stream(number)
        following = STREAM_NEXT.get((stream.state, kind))
        if following is None:
            raise Violation(Reason.OUT_OF_STATE, f"{kind.__name__} of stream {number} while {stream.state}")
        stream.state = following
        if following is StreamState.ENDED:
            del self._streams[number]
        return stream

    def _no_stream(self, number: int) -> Violation:
        if number > self._stream_last:
            return Violation(Reason.UNKNOWN_STREAM, f"stream {number}, the last one offered is {self._stream_last}")
        return Violation(Reason.DOUBLE_END, f"stream {number}")

    # ------------------------------------------------------------ heartbeats

    def _beat(self, now: float) -> None:
        assert self.opened is not None
        self._beats_sent += 1
        self._beat_times[self._beats_sent] = now
        self._beat_times.pop(self._beats_sent - HEARTBEATS_REMEMBERED, None)
        interval = self.opened.heartbeat_seconds
        self._next_beat = now + (interval if self.role is Role.NETWORK else 1.25 * interval)
        telemetry = self.telemetry() if self.telemetry is not None else None
        if telemetry is not None and telemetry.clock_seconds == 0.0:
            telemetry = msgspec.structs.replace(telemetry, clock_seconds=max(0.0, now + self.wall_minus_now))
        self._queue(Heartbeat(self._beats_sent, self._beats_heard, telemetry))

    def _heartbeat_heard(self, beat: Heartbeat, now: float) -> None:
        if beat.number != self._beats_heard + 1:
            raise Violation(Reason.OUT_OF_STATE, f"heartbeat {beat.number} after {self._beats_heard}")
        if not self._echo_heard <= beat.echo <= self._beats_sent:
            raise Violation(Reason.OUT_OF_STATE, f"heartbeat {beat.number} echoes {beat.echo}")
        self._beats_heard = beat.number
        if self.role is Role.NETWORK and beat.echo > self._echo_heard and beat.echo in self._beat_times:
            sample = max(0.0, now - self._beat_times[beat.echo])
            before = self.round_trip_seconds
            self.round_trip_seconds = sample if before is None else before + (sample - before) / 8
        self._echo_heard = beat.echo
        if self.role is Role.NETWORK and beat.telemetry is not None:
            self.peer_telemetry = beat.telemetry
            if beat.telemetry.clock_seconds > 0.0:
                sent_at = now + self.wall_minus_now - (self.round_trip_seconds or 0.0) / 2
                self.clock_offset_seconds = beat.telemetry.clock_seconds - sent_at

    def _answer_heartbeat(self, now: float) -> None:
        """The node answers at once, so that the network's clock alone measures the round trip."""
        if self.role is Role.NODE:
            self._beat(now)

    # ------------------------------------------------------------ frames out

    def _queue(self, message: AnyMessage) -> None:
        payload = codec.encode(message)
        limit = codec.bytes_max(type(message))
        assert len(payload) <= limit, f"our own {type(message).__name__} has {len(payload)} bytes, {limit} are allowed"
        match message:
            case Step():
                self._work.append((payload, 0))  # as below, and by far the most
            case Heartbeat():
                self._urgent.append((payload, 0))
            case Cancel():
                self._lane_after_offers((message.stream,)).append((payload, 0))
            case Credit():
                self._lane_after_offers([stream for stream, _ in message.grants]).append((payload, 0))
            case Offers() | Chunk():
                self._bulk.append((payload, 0))
                self.bulk_bytes += len(payload)
            case Offer():
                self._work.append((payload, message.stream))
                self._offers_waiting.add(message.stream)
            case _:
                self._work.append((payload, 0))
        self.queued_bytes += len(payload)
        if self.queued_bytes > QUEUE_BYTES_MAX:
            self._violated(Reason.BACKLOGGED, f"{self.queued_bytes} bytes")
        elif self._sequence_out > SEQUENCE_LIMIT - SEQUENCES_RESERVED:
            self.close(Reason.WORN_OUT)
        self.wake()

    def _lane_after_offers(self, streams: Iterable[int]) -> deque[_Queued]:
        """Credit and Cancel overtake all but the very Offer they speak of."""
        return self._work if self._offers_waiting and not self._offers_waiting.isdisjoint(streams) else self._urgent

    def _take_whole(self, lane: deque[_Queued], frames: list[bytes]) -> int:
        payload, offered = lane.popleft()
        self._taken(lane, payload, offered)
        frames.append(self._frame(payload))
        return len(payload)

    def _take_one_of_bulk(self, frames: list[bytes]) -> None:
        """One fragment or one whole bulk message. Only one message is in fragments at a time."""
        lane = self._fragmented
        if lane is None:
            # A large Offer or Step blocks its lane, so it goes before bulk that nothing waits for.
            lane = self._work or self._bulk
            if not lane:
                return
            if len(lane[0][0]) <= codec.FRAME_BYTES_MAX:
                self._take_whole(lane, frames)  # of the bulk lane: small work was taken before
                return
            self._fragmented, self._fragment_offset = lane, 0
        payload, offered = lane[0]
        end = self._fragment_offset + codec.FRAGMENT_BYTES_MAX
        last = end >= len(payload)
        frames.append(self._frame(payload[self._fragment_offset : end], LAST if last else MORE))
        self._fragment_offset = end
        if last:
            lane.popleft()
            self._taken(lane, payload, offered)
            self._fragmented = None

    def _taken(self, lane: deque[_Queued], payload: bytes, offered: int) -> None:
        self.queued_bytes -= len(payload)
        if lane is self._bulk:
            self.bulk_bytes -= len(payload)
        if offered:
            self._offers_waiting.discard(offered)

    def _frame(self, payload: bytes, flags: int = WHOLE) -> bytes:
        sequence = self._sequence_out
        self._sequence_out += 1
        covered = AUTHENTICATED_HEADER.pack(len(payload), sequence, flags)
        if self._mac_out is None:
            return covered + NO_MAC + payload
        code = self._mac_out.copy()
        code.update(covered)
        code.update(payload)
        return b"".join((covered, code.digest(), payload))

    # ------------------------------------------------------------ ends

    def _violated(self, reason: Reason, detail: str) -> None:
        """Closes at once: nothing that was queued is sent any more, only why."""
        self._drop_all()
        self._end(reason, detail)
        self._framed.append(self._frame(codec.encode(Goodbye(reason, clip(detail)))))

    def _end(self, reason: Reason, detail: str, by_peer: bool = False, permanent: bool | None = None) -> None:
        """The one place where a link becomes closed."""
        assert self.state is not State.CLOSED
        self.state = State.CLOSED
        self.closed = Closed(reason, clip(detail), by_peer, reason in PERMANENT if permanent is None else permanent)
        self._events.append(self.closed)
        self._streams.clear()
        self._transfers.clear()
        self._buffer.clear()
        self._assembly = None

    def _drop_bulk(self) -> None:
        self.queued_bytes -= self.bulk_bytes
        self.bulk_bytes = 0
        self._bulk.clear()
        if self._fragmented is self._bulk:
            self._fragmented = None

    def _drop_all(self) -> None:
        self._drop_bulk()
        self._urgent.clear()
        self._work.clear()
        self._offers_waiting.clear()
        self._fragmented = None
        self._farewell = None
        self.queued_bytes = 0


_Queued = tuple[bytes, int]  # an encoded message, and the stream that it offers (0: none)


def _nobody() -> None:
    """The `wake` of a link whose owner polls it."""


def _other(role: Role) -> Role:
    return Role.NETWORK if role is Role.NODE else Role.NODE


def _transcript(role: str, hello: Hello, welcome: Welcome) -> bytes:
    return greeting_transcript(
        role,
        node_key=hello.node_key,
        network_key=welcome.network_key,
        node_challenge=hello.challenge,
        network_challenge=welcome.challenge,
        node_versions=hello.versions,
        network_versions=welcome.versions,
        version=welcome.version,
        host=hello.host,
    )


def _frame_key(shared: bytes, direction: bytes, transcript: bytes) -> bytes:
    """32 bytes per direction; both X25519 keys are in the transcript, as RFC 7748 §6.1 asks."""
    return hashlib.blake2b(transcript, key=shared, person=b"gm1 " + direction, digest_size=32).digest()


def _is_goodbye(payload: bytes) -> bool:
    try:
        return isinstance(codec.decode(payload), Goodbye)
    except Malformed:
        return False


def _clipped(message: AnyMessage) -> AnyMessage:
    """Details come from exceptions and may hold anything; they are made sendable rather than refused."""
    match message:
        case Refuse():
            return msgspec.structs.replace(message, code=clip(message.code, 64), detail=clip(message.detail))
        case Step() if any(end.detail or end.code for end in message.ends):
            ends = tuple(
                msgspec.structs.replace(end, code=clip(end.code, 64), detail=clip(end.detail)) for end in message.ends
            )
            return Step(message.emissions, ends, message.paused)
        case _:
            return message
