"""Every message survives the trip, every limit is a limit, and nothing but Malformed comes out of hostile bytes."""

from __future__ import annotations

import math
import tracemalloc
import typing

import msgspec
import pytest
from wire_samples import CLASS, CLASS_OFFER, LEAF, SAMPLES, STATEMENT, work

from gridmill.wire import codec
from gridmill.wire.classes import FileDigest
from gridmill.wire.codec import Malformed, bytes_max, clip, decode, encode
from gridmill.wire.messages import (
    Accept,
    Acknowledged,
    AnyMessage,
    Cancel,
    Chunk,
    Countersignature,
    Countersigned,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Leaf,
    Listed,
    Listing,
    Offer,
    Offers,
    Price,
    Proof,
    Ready,
    Receipts,
    Refuse,
    SignedStatement,
    Statement,
    Step,
    Telemetry,
    Welcome,
)
from gridmill.wire.sampling import Sampling, TokenLogprob


def changed(message: typing.Any, **fields: typing.Any) -> typing.Any:
    return msgspec.structs.replace(message, **fields)


def sample(kind: type) -> typing.Any:
    return next(message for message in SAMPLES if type(message) is kind)


def test_there_is_a_sample_of_every_message() -> None:
    assert {type(message) for message in SAMPLES} == set(typing.get_args(AnyMessage))


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: AnyMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_every_truncation_is_malformed(message: AnyMessage) -> None:
    whole = encode(message)
    for length in range(len(whole)):
        with pytest.raises(Malformed):
            decode(whole[:length])
    with pytest.raises(Malformed):
        decode(whole + b"\0")


def test_further_fields_of_a_later_version_are_ignored() -> None:
    raw = msgspec.msgpack.decode(encode(Accept(7)))
    assert decode(msgspec.msgpack.encode([*raw, {"something": "new"}])) == Accept(7)


HELLO, WELCOME, PROOF, READY = sample(Hello), sample(Welcome), sample(Proof), sample(Ready)
OFFER, STEP, BEAT, CHUNK = sample(Offer), sample(Step), sample(Heartbeat), sample(Chunk)


def offers_with(**class_fields: typing.Any) -> Offers:
    return Offers((changed(CLASS_OFFER, model_class=changed(CLASS, **class_fields)),))


def offer_with(**sampling_fields: typing.Any) -> Offer:
    return Offer(1, changed(work(), sampling=changed(work().sampling, **sampling_fields)), 1)


OUT_OF_BOUNDS: list[tuple[str, typing.Any]] = [
    ("no versions", changed(HELLO, versions=())),
    ("too many versions", changed(HELLO, versions=tuple(range(1, 18)))),
    ("version 0", changed(HELLO, versions=(0,))),
    ("huge version", changed(HELLO, versions=(1 << 16,))),
    ("short node key", changed(HELLO, node_key=bytes(31))),
    ("long challenge", changed(HELLO, challenge=bytes(33))),
    ("no host", changed(HELLO, host="")),
    ("long host", changed(HELLO, host="h" * 263)),
    ("host with a space", changed(HELLO, host="a b")),
    ("host that is not ASCII", changed(HELLO, host="gríd")),
    ("software with a line break", changed(HELLO, software="a\nb")),
    ("software with a terminal escape", changed(HELLO, software="\x1b[2J")),
    ("short signature", changed(WELCOME, signature=bytes(63))),
    ("short network key", changed(WELCOME, network_key=b"")),
    ("owner key without a signature", changed(PROOF, owner_signature=b"")),
    ("owner signature without a key", changed(PROOF, owner_key=b"")),
    ("long join token", changed(PROOF, join_token="t" * 257)),
    ("heartbeat 0", changed(READY, heartbeat_seconds=0.0)),
    ("heartbeat nan", changed(READY, heartbeat_seconds=math.nan)),
    ("heartbeat infinite", changed(READY, heartbeat_seconds=math.inf)),
    ("no node id", changed(READY, node_id="")),
    ("too many classes", Offers((CLASS_OFFER,) * 65)),
    ("unnamed class", Offers((changed(CLASS_OFFER, name=""),))),
    ("class name with a line break", Offers((changed(CLASS_OFFER, name="a\nb"),))),
    ("negative slots", Offers((changed(CLASS_OFFER, slots=-1),))),
    ("speed nan", Offers((changed(CLASS_OFFER, decode_tokens_per_second=math.nan),))),
    ("negative speed", Offers((changed(CLASS_OFFER, prefill_tokens_per_second=-1.0),))),
    ("unsorted weights", offers_with(weights=tuple(reversed(CLASS.weights)))),
    ("weights with a bad digest", offers_with(weights=(FileDigest("a", "A" * 64, 1),))),
    ("weights of negative size", offers_with(weights=(FileDigest("a", "a" * 64, -1),))),
    ("tokenizer digest missing", offers_with(tokenizer_sha256="")),
    ("sampler version negative", offers_with(sampler_version=-1)),
    ("fetch of no digest", Fetch(1, "xyz")),
    ("fetch 0", Fetch(0, "c" * 64)),
    ("chunk too large", Chunk(1, 0, 1 << 20, bytes(codec.CHUNK_BYTES_MAX + 1))),
    ("chunk of nothing", changed(CHUNK, data=b"")),
    ("chunk past the end", changed(CHUNK, total_bytes=4)),
    ("chunk of an absent file with data", changed(CHUNK, total_bytes=-1)),
    ("file over the limit", changed(CHUNK, total_bytes=codec.TRANSFER_BYTES_MAX + 1)),
    ("stream 0", changed(OFFER, stream=0)),
    ("stream over 32 bits", changed(OFFER, stream=1 << 32)),
    ("negative credit", changed(OFFER, credit=-1)),
    ("credit beyond any context", changed(OFFER, credit=codec.CREDIT_MAX + 1)),
    ("half an id", changed(OFFER, work=changed(work(), prompt=b"\1\2\3"))),
    ("half a delivered id", changed(OFFER, work=changed(work(), delivered=b"\1"))),
    ("more delivered than max_tokens", Offer(1, work(max_tokens=1, delivered=[1, 2]), 1)),
    ("long salt", changed(OFFER, work=changed(work(), cache_salt=bytes(65)))),
    ("negative epoch", changed(OFFER, work=changed(work(), epoch=-1))),
    ("work id with a space", changed(OFFER, work=changed(work(), work_id="a b"))),
    ("short seed", Offer(1, changed(work(), sampling=Sampling(b"", 10)), 1)),
    ("temperature nan", offer_with(temperature=math.nan)),
    ("no tokens", offer_with(max_tokens=0)),
    ("absurd max_tokens", offer_with(max_tokens=1 << 40)),
    ("too many biases", offer_with(logit_bias=((1, 0.0),) * 1025)),
    ("bias infinite", offer_with(logit_bias=((1, math.inf),))),
    ("accept 0", Accept(0)),
    ("long code", Refuse(1, "node", "c" * 65, "")),
    ("detail with a line break", Refuse(1, "node", "", "a\nb")),
    ("long detail", Refuse(1, "node", "", "d" * 501)),
    ("emission without ids", Step((Emission(1, 0, ()),))),
    ("negative id", Step((Emission(1, 0, (-1,)),))),
    ("id over 32 bits", Step((Emission(1, 0, (1 << 32,)),))),
    ("negative position", Step((Emission(1, -1, (1,)),))),
    ("stream 0 in a step", Step((Emission(0, 0, (1,)),))),
    ("fewer logprobs than ids", Step((Emission(1, 0, (1, 2), (TokenLogprob(-1.0),)),))),
    ("logprob nan", Step((Emission(1, 0, (1,), (TokenLogprob(math.nan),)),))),
    ("logprob infinite", Step((Emission(1, 0, (1,), (TokenLogprob(-math.inf),)),))),
    ("21 top logprobs", Step((Emission(1, 0, (1,), (TokenLogprob(-1.0, ((1, -1.0),) * 21),)),))),
    ("top id negative", Step((Emission(1, 0, (1,), (TokenLogprob(-1.0, ((-1, -1.0),)),)),))),
    ("negative count", Step((), (End(1, "stop", -1),))),
    ("negative cached tokens", Step((), (End(1, "stop", 0, -1),))),
    ("no grants", Credit(())),
    ("grant of nothing", Credit(((1, 0),))),
    ("negative grant", Credit(((1, -5),))),
    ("keep below -1", Cancel(1, -2)),
    ("heartbeat number 0", changed(BEAT, number=0)),
    ("negative echo", changed(BEAT, echo=-1)),
    ("telemetry nan", changed(BEAT, telemetry=Telemetry(clock_seconds=math.nan))),
    ("telemetry negative", changed(BEAT, telemetry=Telemetry(running=-1))),
    ("telemetry beyond int64", changed(BEAT, telemetry=Telemetry(memory_bytes=1 << 63))),
    ("no receipts", Receipts(())),
    ("too many leaves", Receipts((SignedStatement(STATEMENT, (LEAF,) * 129, bytes(64)),))),
    ("short signature", Receipts((SignedStatement(STATEMENT, (LEAF,), bytes(63)),))),
    ("short head", Receipts((SignedStatement(changed(STATEMENT, head=b""), (), bytes(64)),))),
    ("seq beyond int64", Receipts((SignedStatement(changed(STATEMENT, seq=1 << 63), (), bytes(64)),))),
    ("negative pay", Receipts((SignedStatement(STATEMENT, (changed(LEAF, pay_nanocredits=-1),), bytes(64)),))),
    ("short claim", Receipts((SignedStatement(STATEMENT, (changed(LEAF, claim=b"x"),), bytes(64)),))),
    ("neither signed nor disputed", Countersigned((Countersignature("e" * 64, 0, 1, b""),))),
    ("remark with a line break", Countersigned((Countersignature("e" * 64, 0, 1, b"", "a\nb"),))),
    ("nothing acknowledged", Acknowledged(())),
    ("acknowledged class", Acknowledged((("class", 0, 1),))),
    ("cached dearer than other input", changed(OFFER, work=changed(work(), price=Price(1, 2, 3)))),
    ("absurd price", changed(OFFER, work=changed(work(), price=Price(10**9 + 1)))),
    ("long receipt salt", changed(OFFER, work=changed(work(), salt=bytes(33)))),
    ("short end signature", Step((), (End(1, "stop", 0, signature=b"x"),))),
    ("negative drain", Drain(-1.0)),
    ("drain nan", Drain(math.nan)),
    ("drain for ever", Drain(math.inf)),
    ("goodbye without a reason", Goodbye("", "")),
    ("goodbye with a terminal escape", Goodbye("stopping", "\x1b[31m")),
]


@pytest.mark.parametrize("message", [m for _, m in OUT_OF_BOUNDS], ids=[name for name, _ in OUT_OF_BOUNDS])
def test_a_field_out_of_bounds_is_malformed(message: AnyMessage) -> None:
    with pytest.raises(Malformed) as caught:
        decode(encode(message))
    assert str(caught.value)


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x93",
    "no tag": msgspec.msgpack.encode([1, 2, 3]),
    "unknown tag": msgspec.msgpack.encode(["shout", 1]),
    "a map": msgspec.msgpack.encode({"accept": 1}),
    "bool for int": b"\x92\xa6accept\xc3",
    "float for int": msgspec.msgpack.encode(["accept", 1.5]),
    "invalid UTF-8": b"\x93\xa5ready\xa2\xff\xfe\x01",
    "an array of 2^32 claimed": b"\x93\xa4step\xdd\xff\xff\xff\xff",
    "ids of 2^32 claimed": b"\x93\xa4step\x91\x93\x01\x00\xdd\xff\xff\xff\xff",
    "2^32 bytes claimed": b"\x95\xa5chunk\x01\x00\x00\xc6\xff\xff\xff\xff",
    "a map of 2^32 claimed in an unknown field": b"\x94\xa4step\x90\x90\xdf\xff\xff\xff\xff",
    "60 000 levels deep in an unknown field": b"\x94\xa4step\x90\x90" + b"\x91" * 60_000,
    "a million levels deep": b"\x94\xa5offer\x90" + b"\x91" * 1_000_000,
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_malformed_and_cost_little_memory(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_only_offers_works_and_steps_may_be_larger_than_a_frame() -> None:
    large = encode(Offer(1, work(prompt=[5] * 100_000), 1))
    assert len(large) > codec.FRAME_BYTES_MAX
    assert isinstance(decode(large), Offer)
    credit = Credit(tuple((stream, 1 << 24) for stream in range(1 << 31, (1 << 31) + 12_000)))
    with pytest.raises(Malformed, match="must fit one frame"):
        decode(encode(credit))
    step = Step(tuple(Emission(1, position, (1 << 31,) * 10) for position in range(20_000)))
    with pytest.raises(Malformed, match="over the 1048576 for its kind"):
        decode(encode(step))


def test_the_longest_listing_can_be_sent() -> None:
    listing = Listing("\U0001f600" * codec.NAME_CHARS_MAX, "d" * 64, False, "\U0001f600" * codec.DETAIL_CHARS_MAX)
    listed = Listed((listing,) * codec.OFFERS_MAX)
    assert codec.FRAME_BYTES_MAX < len(encode(listed)) <= bytes_max(Listed)
    assert decode(encode(listed)) == listed


def test_the_fullest_receipts_can_be_sent() -> None:
    largest = (1 << 63) - 1
    leaf = Leaf(
        *("w" * 128, (1 << 32) - 1, largest, bytes(32), bytes(32), largest, largest, largest, "p" * 128),
        *(Price(10**9, 10**9, 10**9), largest, largest, largest, largest, "f" * 64, bytes(32), bytes(64)),
    )
    full = Statement(bytes(32), bytes(32), "e" * 64, largest, (1 << 32) - 1, *(largest,) * 5, bytes(32))
    statements = (SignedStatement(full, (leaf,) * 2, bytes(64)),) * codec.STATEMENTS_MAX
    receipts = Receipts(statements)
    assert codec.FRAME_BYTES_MAX < len(encode(receipts)) <= bytes_max(Receipts)
    assert decode(encode(receipts)) == receipts


def test_a_full_chunk_fits_one_frame() -> None:
    chunk = Chunk(
        (1 << 32) - 1, codec.TRANSFER_BYTES_MAX - codec.CHUNK_BYTES_MAX, codec.TRANSFER_BYTES_MAX, bytes(65536)
    )
    assert len(encode(chunk)) <= codec.FRAME_BYTES_MAX
    assert decode(encode(chunk)) == chunk


def test_the_longest_honest_greeting_fits_the_small_frames_before_ready() -> None:
    hello = Hello(tuple(range(65520, 65536)), bytes(32), bytes(32), "h" * 262, "s" * 100)
    welcome = Welcome(65535, hello.versions, bytes(32), bytes(32), bytes(64))
    proof = Proof(bytes(64), bytes(32), bytes(64), "t" * 256)
    goodbye = Goodbye("r" * 64, "\U0001f600" * 500)
    for message in (hello, welcome, proof, goodbye):
        assert decode(encode(message)) == message
        assert len(encode(message)) < codec.GREETING_FRAME_BYTES_MAX / 2


def test_the_longest_context_fits_one_message() -> None:
    ids = [(1 << 32) - 1] * (codec.IDS_BYTES_MAX // 4)
    offer = Offer(1, work(prompt=ids), 1)
    assert len(encode(offer)) <= bytes_max(Offer)
    assert decode(encode(offer)) == offer


def test_clipped_text_is_one_printable_line_that_can_be_sent() -> None:
    text = clip("first\nsecond\x1b[31m \udcff" + "x" * 1000)
    assert text.isprintable() and len(text) == codec.DETAIL_CHARS_MAX and text.startswith("first second [31m ")
    assert decode(encode(Goodbye("cut", text))) == Goodbye("cut", text)
