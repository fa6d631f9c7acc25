"""Every message on a link, in the order in which a conversation meets them.

All are frozen and tagged; on the wire each is a MessagePack array [tag, field, field, …] in the order written here.
Numbers called `stream` name one Work on one link: chosen by the network, counted up from 1, never used again.
"""

from __future__ import annotations

from typing import Literal, NewType

import msgspec

from gridmill.wire.classes import ModelClass
from gridmill.wire.sampling import Sampling, TokenLogprob

NodeId = NewType("NodeId", str)
OwnerId = NewType("OwnerId", str)
WorkId = NewType("WorkId", str)

PROTOCOL = "gridmill-link"
VERSIONS = (1,)


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages; never sent itself."""


# ---------------------------------------------------------------- greeting, in this order


class Hello(Message, frozen=True, array_like=True, tag="hello"):
    """Node, first. `challenge` is a fresh X25519 public key: it is the freshness and half of the frame key.

    `host` is the host[:port] that the node dialled, so that a relay in between cannot pass a conversation on.
    """

    versions: tuple[int, ...]
    node_key: bytes
    challenge: bytes
    host: str
    software: str


class Welcome(Message, frozen=True, array_like=True, tag="welcome"):
    """Network. `versions` is all it speaks, `version` the highest in common; the signature covers both lists."""

    version: int
    versions: tuple[int, ...]
    network_key: bytes
    challenge: bytes
    signature: bytes


class Proof(Message, frozen=True, array_like=True, tag="proof"):
    """Node. Its signature over the same facts, who owns it, and the join token where the network asks for one.

    `owner_key` with `owner_signature` certify the node key; both empty means that the node is its own owner.
    """

    signature: bytes
    owner_key: bytes
    owner_signature: bytes
    join_token: str


class Ready(Message, frozen=True, array_like=True, tag="ready"):
    """Network. The node is in. Both sides heartbeat at this interval and give up after three missed ones."""

    node_id: str
    heartbeat_seconds: float


# ---------------------------------------------------------------- what a node can serve


class Price(msgspec.Struct, frozen=True, array_like=True):
    """What a node asks, in nanocredits (10^-9 credit) per token. All zero: it serves for nothing.

    Input found cached by the network's own record costs `cached_input_nanocredits`, never more than other input.
    """

    input_nanocredits: int = 0
    cached_input_nanocredits: int = 0
    output_nanocredits: int = 0


class ClassOffer(msgspec.Struct, frozen=True, array_like=True):
    """One class that a node serves under a name. Speeds are hints; the network believes its own clock.

    `region` is the owner's own word for where the node stands, such as eu-west; empty when it says nothing.
    """

    name: str
    model_class: ModelClass
    slots: int
    engine: str
    decode_tokens_per_second: float = 0.0
    prefill_tokens_per_second: float = 0.0
    price: Price = Price()
    region: str = ""


class Offers(Message, frozen=True, array_like=True, tag="offers"):
    """Node. All that it serves now; replaces what it offered before."""

    offers: tuple[ClassOffer, ...]


class Fetch(Message, frozen=True, array_like=True, tag="fetch"):
    """Network asks for a text file of an offered class by digest (tokenizer.json or the text facts)."""

    transfer: int
    sha256: str


class Chunk(Message, frozen=True, array_like=True, tag="chunk"):
    """Node, at most 64 KiB of a file at a time. `total_bytes` < 0 means that it does not have the file."""

    transfer: int
    offset: int
    total_bytes: int
    data: bytes


class Listing(msgspec.Struct, frozen=True, array_like=True):
    """What became of one offer. When it is not served, `detail` says in one sentence what would change that."""

    name: str
    class_id: str
    served: bool
    detail: str = ""


class Listed(Message, frozen=True, array_like=True, tag="listed"):
    """Network, after each Offers and whenever that changes: which of the node's offers users can ask for now."""

    listings: tuple[Listing, ...]


# ---------------------------------------------------------------- work


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="generate"):
    """One Work: token ids in, token ids out.

    `prompt` and `delivered` are packed uint32 little-endian (`sampling.pack_ids`). `delivered` are output ids that
    another node already produced: the engine treats them as output (penalties, positions) and continues after them.
    `sampling.max_tokens` counts the delivered ids too. `price` is the node's own, as the network understood it; a node
    refuses one that it never offered. `salt` goes into the receipt's hashes, so that nobody else can guess at texts.
    """

    work_id: str
    class_id: str
    prompt: bytes
    sampling: Sampling
    cache_salt: bytes = b""
    delivered: bytes = b""
    epoch: int = 0
    price: Price = Price()
    salt: bytes = b""


class Offer(Message, frozen=True, array_like=True, tag="offer"):
    """Network. `credit` is how many ids the node may send before it must wait for more."""

    stream: int
    work: Generate
    credit: int


class Accept(Message, frozen=True, array_like=True, tag="accept"):
    stream: int


class Refuse(Message, frozen=True, array_like=True, tag="refuse"):
    """Node, instead of Accept: nothing was done and nothing is owed. `fault` is whose: caller or node."""

    stream: int
    fault: Literal["caller", "node"]
    code: str
    detail: str


class Emission(msgspec.Struct, frozen=True, array_like=True):
    """Ids of one stream. `position` is the output position of the first, so that a gap or a repeat shows."""

    stream: int
    position: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


class End(msgspec.Struct, frozen=True, array_like=True):
    """The last word on a stream. `count` is how many output ids the node says it sent in all, `delivered` excluded.

    kind: stop | length | cancelled (finished), failed (the node's fault). `cached_tokens`: prompt ids not recomputed.
    `signature` is the node's claim (`receipts.claim_bytes`) over work, class, output hash and `commit_root`, made
    before the network adds anything: what the audit lottery draws from. Empty from a node that keeps no receipts.
    """

    stream: int
    kind: Literal["stop", "length", "cancelled", "failed"]
    count: int
    cached_tokens: int = 0
    code: str = ""
    detail: str = ""
    commit_root: bytes = b""
    signature: bytes = b""


class Step(Message, frozen=True, array_like=True, tag="step"):
    """Node. Everything that one engine step produced, for all streams at once; ends come after ids.

    `paused` are streams that lost their place to others and will go on later: their next id may take as long as a
    first one does.
    """

    emissions: tuple[Emission, ...] = ()
    ends: tuple[End, ...] = ()
    paused: tuple[int, ...] = ()


class Credit(Message, frozen=True, array_like=True, tag="credit"):
    """Network. (stream, ids) pairs: that many more ids may be sent. Late grants for ended streams are ignored."""

    grants: tuple[tuple[int, int], ...]


class Cancel(Message, frozen=True, array_like=True, tag="cancel"):
    """Network. Stop within one step and answer with an End. `keep` is how many output ids count; -1 = all sent.

    `keep` counts from output position 0, delivered ids included. The node's claim covers those that count.
    """

    stream: int
    keep: int = -1


# ---------------------------------------------------------------- receipts


class Leaf(msgspec.Struct, frozen=True, array_like=True):
    """One work, or one node's segment of it, as both sides sign for it. Hashes are SHA-256 (`receipts.ids_hash`).

    `start` is the output position of the segment's first id; `output_tokens` counts this segment's ids alone, delivered
    ones. `cached_tokens` is part of `input_tokens`. `pay_nanocredits` is what the node earns, `charge_nanocredits` what
    the user pays for this segment, the network's fee included. `finish`: stop, length, cancelled, failed, lost, moved.
    `prompt_hash` covers the prompt alone in every segment, `output_hash` the ids that `output_tokens` counts. `claim`
    is the signature of the node's End, as it came; empty when there was none. `replayed_tokens` are ids that this node
    had to read again because another had left; the network's reserve pays them at the price of input.
    """

    work_id: str
    epoch: int
    start: int
    prompt_hash: bytes
    output_hash: bytes
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    price_id: str
    price: Price
    pay_nanocredits: int
    charge_nanocredits: int
    started_ms: int
    ended_ms: int
    finish: str
    commit_root: bytes
    claim: bytes
    replayed_tokens: int = 0


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """The running totals of one node, class and period after `seq` leaves, and the hash chain over those leaves.

    Totals only grow, so the statement with the highest `seq` says all that earlier ones did: losing or repeating one
    is harmless. `period_start_seconds` is Unix time, a multiple of `period_seconds`.
    """

    network_key: bytes
    node_key: bytes
    class_id: str
    period_start_seconds: int
    period_seconds: int
    seq: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    pay_nanocredits: int
    head: bytes


class SignedStatement(msgspec.Struct, frozen=True, array_like=True):
    """A statement, the network's signature, and the leaves since the statement before: the last has number `seq`."""

    statement: Statement
    leaves: tuple[Leaf, ...]
    signature: bytes


class Receipts(Message, frozen=True, array_like=True, tag="receipts"):
    """Network. What it has settled, and again after each join whatever the node has not countersigned yet."""

    statements: tuple[SignedStatement, ...]


class Countersignature(msgspec.Struct, frozen=True, array_like=True):
    """The node's signature over a statement's own bytes, or none and the reason why it disputes it.

    `remark` is empty when the node's own record agrees, `no_record` when it lost that record (a crash) and takes the
    network's word, `missing` when it lacks leaves before these and wants them again in order, else one sentence.
    """

    class_id: str
    period_start_seconds: int
    seq: int
    signature: bytes
    remark: str = ""


class Countersigned(Message, frozen=True, array_like=True, tag="countersigned"):
    """Node, in answer to Receipts."""

    signatures: tuple[Countersignature, ...]


class Acknowledged(Message, frozen=True, array_like=True, tag="acknowledged"):
    """Network. It has these countersignatures on disk: (class id, period, seq). The node need not send them again."""

    statements: tuple[tuple[str, int, int], ...]


# ---------------------------------------------------------------- keeping in touch, and leaving


class Telemetry(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself with each heartbeat: hints for people and for the scheduler, never for money."""

    clock_seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    tokens_per_second: float = 0.0
    memory_bytes: int = 0


class Heartbeat(Message, frozen=True, array_like=True, tag="beat"):
    """Both, at the interval of Ready. `echo` repeats the number of the last heartbeat heard: round trips."""

    number: int
    echo: int
    telemetry: Telemetry | None = None


class Drain(Message, frozen=True, array_like=True, tag="drain"):
    """Either side: finish what runs, start nothing new. The node refuses offers that crossed this on the way."""

    deadline_seconds: float


class Goodbye(Message, frozen=True, array_like=True, tag="bye"):
    """Either side, the last message. `reason` is one of `link.Reason`."""

    reason: str
    detail: str


AnyMessage = (
    Hello
    | Welcome
    | Proof
    | Ready
    | Offers
    | Fetch
    | Chunk
    | Listed
    | Offer
    | Accept
    | Refuse
    | Step
    | Credit
    | Cancel
    | Receipts
    | Countersigned
    | Acknowledged
    | Heartbeat
    | Drain
    | Goodbye
)
