"""Bytes ↔ messages, and every limit on a message with the reason for its size.

`decode` either returns a message whose every field is within its bounds or raises Malformed with one sentence.
What needs more than one message to judge (positions, credit, order) is the link's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from gridmill.wire.classes import TOKENIZER_BYTES_MAX, ModelClass
from gridmill.wire.identity import KEY_BYTES, SIGNATURE_BYTES
from gridmill.wire.messages import (
    Accept,
    Acknowledged,
    AnyMessage,
    Cancel,
    Chunk,
    ClassOffer,
    Countersigned,
    Credit,
    Drain,
    Emission,
    End,
    Fetch,
    Generate,
    Goodbye,
    Heartbeat,
    Hello,
    Leaf,
    Listed,
    Offer,
    Offers,
    Price,
    Proof,
    Ready,
    Receipts,
    Refuse,
    Statement,
    Step,
    Telemetry,
    Welcome,
)
from gridmill.wire.sampling import TOP_LOGPROBS_MAX, TokenLogprob, problem_with

# ---------------------------------------------------------------- sizes in bytes

CHUNK_BYTES_MAX = 64 << 10  # file data of one Chunk: 5 ms of a 100 Mbit/s line, which is how long it delays a token
FRAGMENT_BYTES_MAX = 64 << 10  # the same bound for one piece of a large message
FRAME_BYTES_MAX = FRAGMENT_BYTES_MAX + 256  # payload of one frame: a full Chunk with its fields needs no fragments
GREETING_FRAME_BYTES_MAX = 8 << 10  # before Ready; the longest honest frame until then is under 4 KiB
MESSAGE_BYTES_MAX = 4 << 20  # an Offer of a million ids: the longest context that public models claim
STEP_BYTES_MAX = 1 << 20  # 64 streams × 20 top logprobs × 40 positions that piled up behind a slow socket
LISTED_BYTES_MAX = 256 << 10  # as many listings as offers, each with the longest name and sentence
RECEIPTS_BYTES_MAX = 256 << 10  # LEAVES_MAX leaves of at most 1 KiB each
IDS_BYTES_MAX = MESSAGE_BYTES_MAX - (64 << 10)  # prompt and delivered ids together; the rest is room for Sampling
TRANSFER_BYTES_MAX = TOKENIZER_BYTES_MAX  # one file: nothing else that is fetched comes near a tokenizer

# Messages that may travel in fragments; all others must fit one frame.
BYTES_MAX: dict[type, int] = {
    Offer: MESSAGE_BYTES_MAX,
    Offers: MESSAGE_BYTES_MAX,
    Step: STEP_BYTES_MAX,
    Listed: LISTED_BYTES_MAX,
    Receipts: RECEIPTS_BYTES_MAX,
}

# ---------------------------------------------------------------- counts, lengths and ranges

UINT32_LIMIT = 1 << 32  # token ids are packed as uint32, and streams and positions share the width
INT63_LIMIT = 1 << 63  # what SQLite and every other language's signed integer can hold
VERSIONS_MAX = 16  # a node that speaks more versions than this is not one of ours
VERSION_LIMIT = 1 << 16
HOST_CHARS_MAX = 262  # a DNS name (255), a colon and a port
SOFTWARE_CHARS_MAX = 100  # "gridmill/1.2.3 (linux; cuda 12.8)" with room
TOKEN_CHARS_MAX = 256  # join tokens are about 50 characters
NAME_CHARS_MAX = 200  # model names: the longest on the Hugging Face hub are under 100
ID_CHARS_MAX = 128  # work ids (26) and node ids (25) with room
CODE_CHARS_MAX = 64  # machine-readable words such as "out_of_memory"
DETAIL_CHARS_MAX = 500  # one sentence for a person
CACHE_SALT_BYTES_MAX = 64  # a hash
OFFERS_MAX = 64  # classes per node: weights for more do not fit one machine, and `echo` needs few
LEAVES_MAX = 128  # leaves in one Receipts message, over all its statements
STATEMENTS_MAX = 64  # as many as classes per node
SALT_BYTES_MAX = 32  # what no one can guess takes 16
HASH_BYTES = 32
PRICE_NANOCREDITS_MAX = 10**9  # one credit per token; with the longest context a sum stays far below 63 bits
WEIGHT_FILES_MAX = 2048  # the largest public checkpoints have under 300 files
FILE_NAME_CHARS_MAX = 255  # what file systems allow
REGION_CHARS_MAX = 32  # eu-west, us-east-1, de: a place, not an address
SLOTS_MAX = 1 << 16  # a node that claims more works at once is mistaken
STREAMS_OPEN_MAX = 4096  # 64 times the default of concurrent works per node
TRANSFERS_OPEN_MAX = 4  # tokenizer and text facts of two classes at once
CREDIT_MAX = 1 << 24  # ids; more than any context
HEARTBEAT_SECONDS_MIN = 0.05  # tests; quicker would be a flood
HEARTBEAT_SECONDS_MAX = 300.0  # routers forget idle connections after 5 minutes
DRAIN_SECONDS_MAX = 86_400.0  # a day: longer than any Work may run

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyMessage)


class Malformed(Exception):
    """The bytes are no message of ours, or one with a field out of bounds. The text names the field."""


def encode(message: AnyMessage) -> bytes:
    return _ENCODER.encode(message)


def decode(payload: bytes) -> AnyMessage:
    """Raises Malformed, and nothing else, on bytes that are not exactly one message within all limits."""
    if len(payload) > FRAME_BYTES_MAX:
        _check_large(payload)
    try:
        message: AnyMessage = _DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(clip(str(error))) from None
    check(message)
    return message


def check(message: AnyMessage) -> None:
    """The bounds that MessagePack types cannot express. Raises Malformed."""
    _CHECKS[type(message)](message)


def bytes_max(message_type: type) -> int:
    return BYTES_MAX.get(message_type, FRAME_BYTES_MAX)


def clip(text: str, chars_max: int = DETAIL_CHARS_MAX) -> str:
    """Text fit to be sent and logged: one line, no control characters, no half surrogates, bounded."""
    line = "".join(char if char.isprintable() else " " for char in text[:chars_max])
    return line.encode("utf-8", "replace").decode()


def _check_large(payload: bytes) -> None:
    """Before decoding: few kinds of message may be large, since a decoded one weighs up to thirty times its bytes."""
    tag_end = 2 + (payload[1] & 0x1F)
    limit = _LARGE_TAGS.get(payload[1:tag_end])
    if limit is None:
        raise Malformed(f"a message of {len(payload)} bytes is of a kind that must fit one frame")
    if len(payload) > limit:
        raise Malformed(f"a message of {len(payload)} bytes is over the {limit} for its kind")


_LARGE_TAGS = {_ENCODER.encode(kind.__struct_config__.tag): limit for kind, limit in BYTES_MAX.items()}  # type: ignore[attr-defined]

# ---------------------------------------------------------------- one function per message


def _require(fine: bool, sentence: str) -> None:
    if not fine:
        raise Malformed(sentence)


def _check_text(text: str, chars_max: int, name: str, chars_min: int = 0) -> None:
    if not chars_min <= len(text) <= chars_max:
        raise Malformed(f"{name} has {len(text)} characters, allowed are {chars_min} to {chars_max}")


def _check_line(text: str, chars_max: int, name: str, chars_min: int = 0) -> None:
    """Lines reach logs and terminals, so they hold no line breaks and no control characters."""
    _check_text(text, chars_max, name, chars_min)
    _require(text.isprintable(), f"{name} must be printable")


def _check_word(text: str, chars_max: int, name: str, chars_min: int = 1) -> None:
    """Words become ids, labels and log fields, so they are printable ASCII without spaces."""
    _check_text(text, chars_max, name, chars_min)
    _require(text.isascii() and text.isprintable() and " " not in text, f"{name} must be printable ASCII, no spaces")


def _check_key(key: bytes, name: str) -> None:
    _require(len(key) == KEY_BYTES, f"{name} must be {KEY_BYTES} bytes")


def _check_signature(signature: bytes, name: str) -> None:
    _require(len(signature) == SIGNATURE_BYTES, f"{name} must be {SIGNATURE_BYTES} bytes")


def _check_range(value: int, limit: int, name: str, least: int = 0) -> None:
    if not least <= value < limit:
        raise Malformed(f"{name} is {value}, allowed are {least} to {limit - 1}")


def _check_hint(value: float, name: str) -> None:
    _require(math.isfinite(value) and value >= 0.0, f"{name} must be a finite number, not negative")


def _check_versions(versions: tuple[int, ...]) -> None:
    _require(1 <= len(versions) <= VERSIONS_MAX, f"versions must list 1 to {VERSIONS_MAX} versions")
    for version in versions:
        _check_range(version, VERSION_LIMIT, "a version", least=1)


_HEX_DIGITS = frozenset("0123456789abcdef")


def _check_sha256(text: str, name: str) -> None:
    _require(len(text) == 64 and _HEX_DIGITS.issuperset(text), f"{name} must be 64 lower-case hexadecimal digits")


def _check_hello(message: Hello) -> None:
    _check_versions(message.versions)
    _check_key(message.node_key, "node_key")
    _check_key(message.challenge, "challenge")
    _check_word(message.host, HOST_CHARS_MAX, "host")
    _check_line(message.software, SOFTWARE_CHARS_MAX, "software")


def _check_welcome(message: Welcome) -> None:
    _check_range(message.version, VERSION_LIMIT, "version", least=1)
    _check_versions(message.versions)
    _check_key(message.network_key, "network_key")
    _check_key(message.challenge, "challenge")
    _check_signature(message.signature, "signature")


def _check_proof(message: Proof) -> None:
    _check_signature(message.signature, "signature")
    if message.owner_key or message.owner_signature:
        _check_key(message.owner_key, "owner_key")
        _check_signature(message.owner_signature, "owner_signature")
    _check_word(message.join_token, TOKEN_CHARS_MAX, "join_token", chars_min=0)


def _check_ready(message: Ready) -> None:
    _check_word(message.node_id, ID_CHARS_MAX, "node_id")
    _require(
        HEARTBEAT_SECONDS_MIN <= message.heartbeat_seconds <= HEARTBEAT_SECONDS_MAX,
        f"heartbeat_seconds must be {HEARTBEAT_SECONDS_MIN} to {HEARTBEAT_SECONDS_MAX}",
    )


def _check_offers(message: Offers) -> None:
    _require(len(message.offers) <= OFFERS_MAX, f"offers holds over {OFFERS_MAX} classes")
    for offer in message.offers:
        _check_class_offer(offer)


def _check_listed(message: Listed) -> None:
    _require(len(message.listings) <= OFFERS_MAX, f"listings holds over {OFFERS_MAX} classes")
    for listing in message.listings:
        _check_line(listing.name, NAME_CHARS_MAX, "name", chars_min=1)
        _check_sha256(listing.class_id, "class_id")
        _check_line(listing.detail, DETAIL_CHARS_MAX, "detail")


def _check_class_offer(offer: ClassOffer) -> None:
    _check_line(offer.name, NAME_CHARS_MAX, "name", chars_min=1)
    _check_model_class(offer.model_class)
    _check_range(offer.slots, SLOTS_MAX, "slots")
    _check_word(offer.engine, CODE_CHARS_MAX, "engine")
    _check_hint(offer.decode_tokens_per_second, "decode_tokens_per_second")
    _check_hint(offer.prefill_tokens_per_second, "prefill_tokens_per_second")
    _check_price(offer.price)
    _check_word(offer.region, REGION_CHARS_MAX, "region", chars_min=0)


def _check_price(price: Price) -> None:
    for name in ("input_nanocredits", "cached_input_nanocredits", "output_nanocredits"):
        _check_range(getattr(price, name), PRICE_NANOCREDITS_MAX + 1, name)
    _require(price.cached_input_nanocredits <= price.input_nanocredits, "cached input must not cost more than other")


def _check_model_class(model_class: ModelClass) -> None:
    weights = model_class.weights
    _require(len(weights) <= WEIGHT_FILES_MAX, f"weights lists over {WEIGHT_FILES_MAX} files")
    for file in weights:
        _check_line(file.name, FILE_NAME_CHARS_MAX, "a weight file's name", chars_min=1)
        _check_sha256(file.sha256, "a weight file's sha256")
        _check_range(file.size_bytes, INT63_LIMIT, "size_bytes")
    _require(list(weights) == sorted(weights), "weights must be sorted by file name")
    _check_word(model_class.arithmetic, CODE_CHARS_MAX, "arithmetic")
    _check_word(model_class.kv_dtype, CODE_CHARS_MAX, "kv_dtype")
    _check_range(model_class.sampler_version, VERSION_LIMIT, "sampler_version")
    # A black-box engine has neither file; its class says so in `blackbox`.
    if model_class.tokenizer_sha256 or not model_class.blackbox:
        _check_sha256(model_class.tokenizer_sha256, "tokenizer_sha256")
    if model_class.text_facts_sha256 or not model_class.blackbox:
        _check_sha256(model_class.text_facts_sha256, "text_facts_sha256")
    _check_line(model_class.blackbox, NAME_CHARS_MAX, "blackbox")


def _check_fetch(message: Fetch) -> None:
    _check_range(message.transfer, UINT32_LIMIT, "transfer", least=1)
    _check_sha256(message.sha256, "sha256")


def _check_chunk(message: Chunk) -> None:
    _check_range(message.transfer, UINT32_LIMIT, "transfer", least=1)
    _check_range(message.total_bytes, TRANSFER_BYTES_MAX + 1, "total_bytes", least=-1)
    _check_range(message.offset, TRANSFER_BYTES_MAX + 1, "offset")
    _require(len(message.data) <= CHUNK_BYTES_MAX, f"data is over {CHUNK_BYTES_MAX} bytes")
    if message.total_bytes <= 0:
        _require(not message.data and message.offset == 0, "a file that is absent or empty has no data")
    else:
        _require(len(message.data) > 0, "data is empty")
        _require(message.offset + len(message.data) <= message.total_bytes, "data runs past total_bytes")


def _check_offer(message: Offer) -> None:
    _check_range(message.stream, UINT32_LIMIT, "stream", least=1)
    _check_range(message.credit, CREDIT_MAX + 1, "credit")
    _check_generate(message.work)


def _check_generate(work: Generate) -> None:
    _check_word(work.work_id, ID_CHARS_MAX, "work_id")
    _check_word(work.class_id, ID_CHARS_MAX, "class_id")
    _require(len(work.prompt) % 4 == 0 and len(work.delivered) % 4 == 0, "packed ids must be a multiple of 4 bytes")
    _require(len(work.prompt) + len(work.delivered) <= IDS_BYTES_MAX, f"ids are over {IDS_BYTES_MAX} bytes")
    problem = problem_with(work.sampling, UINT32_LIMIT)
    if problem is not None:
        raise Malformed(problem)
    _check_range(work.sampling.max_tokens, CREDIT_MAX + 1, "max_tokens", least=1)
    _require(len(work.delivered) // 4 <= work.sampling.max_tokens, "delivered holds more ids than max_tokens")
    _require(len(work.cache_salt) <= CACHE_SALT_BYTES_MAX, f"cache_salt is over {CACHE_SALT_BYTES_MAX} bytes")
    _check_range(work.epoch, UINT32_LIMIT, "epoch")
    _check_price(work.price)
    _require(len(work.salt) <= SALT_BYTES_MAX, f"salt is over {SALT_BYTES_MAX} bytes")


def _check_accept(message: Accept) -> None:
    _check_range(message.stream, UINT32_LIMIT, "stream", least=1)


def _check_refuse(message: Refuse) -> None:
    _check_range(message.stream, UINT32_LIMIT, "stream", least=1)
    _check_line(message.code, CODE_CHARS_MAX, "code")
    _check_line(message.detail, DETAIL_CHARS_MAX, "detail")


def _check_step(message: Step) -> None:
    # The hot path: one per engine step with an emission per running stream, so calls are spelled out.
    if max(len(message.emissions), len(message.ends), len(message.paused)) > STREAMS_OPEN_MAX:
        raise Malformed(f"a step holds over {STREAMS_OPEN_MAX} emissions, ends or pauses")
    for emission in message.emissions:
        ids = emission.ids
        if not ids:
            raise Malformed("an emission holds no ids")
        if not 0 < emission.stream < UINT32_LIMIT or not 0 <= emission.position < UINT32_LIMIT:
            raise Malformed("an emission's stream or position is out of range")
        if min(ids) < 0 or max(ids) >= UINT32_LIMIT:
            raise Malformed("an emission holds an id outside 0 to 2^32 - 1")
        if emission.logprobs is not None:
            _check_logprobs(emission, emission.logprobs)
    for end in message.ends:
        _check_end(end)


def _check_logprobs(emission: Emission, logprobs: tuple[TokenLogprob, ...]) -> None:
    _require(len(logprobs) == len(emission.ids), "logprobs must be as many as ids")
    for entry in logprobs:
        _require(math.isfinite(entry.logprob), "logprob must be a finite number")
        _require(len(entry.top) <= TOP_LOGPROBS_MAX, f"top holds over {TOP_LOGPROBS_MAX} entries")
        for token_id, logprob in entry.top:
            if not 0 <= token_id < UINT32_LIMIT or not math.isfinite(logprob):
                raise Malformed("top needs ids of 32 bits and finite numbers")


def _check_end(end: End) -> None:
    _check_range(end.stream, UINT32_LIMIT, "stream", least=1)
    _check_range(end.count, UINT32_LIMIT, "count")
    _check_range(end.cached_tokens, UINT32_LIMIT, "cached_tokens")
    _check_line(end.code, CODE_CHARS_MAX, "code")
    _check_line(end.detail, DETAIL_CHARS_MAX, "detail")
    if end.signature:
        _check_signature(end.signature, "signature")
    if end.commit_root:
        _require(len(end.commit_root) == HASH_BYTES, f"commit_root must be {HASH_BYTES} bytes")


def _check_credit(message: Credit) -> None:
    _require(1 <= len(message.grants) <= STREAMS_OPEN_MAX, f"grants must be 1 to {STREAMS_OPEN_MAX}")
    for stream, ids in message.grants:
        _check_range(stream, UINT32_LIMIT, "stream", least=1)
        _check_range(ids, CREDIT_MAX + 1, "a grant", least=1)


def _check_cancel(message: Cancel) -> None:
    _check_range(message.stream, UINT32_LIMIT, "stream", least=1)
    _check_range(message.keep, UINT32_LIMIT, "keep", least=-1)


def _check_receipts(message: Receipts) -> None:
    _require(1 <= len(message.statements) <= STATEMENTS_MAX, f"statements must be 1 to {STATEMENTS_MAX}")
    _require(sum(len(s.leaves) for s in message.statements) <= LEAVES_MAX, f"leaves are over {LEAVES_MAX}")
    for signed in message.statements:
        _check_statement(signed.statement)
        _check_signature(signed.signature, "signature")
        for leaf in signed.leaves:
            _check_leaf(leaf)


def _check_statement(statement: Statement) -> None:
    _check_key(statement.network_key, "network_key")
    _check_key(statement.node_key, "node_key")
    _check_sha256(statement.class_id, "class_id")
    _require(len(statement.head) == HASH_BYTES, f"head must be {HASH_BYTES} bytes")
    _check_range(statement.period_seconds, UINT32_LIMIT, "period_seconds", least=1)
    for name in ("period_start_seconds", "seq", "input_tokens", "cached_tokens", "output_tokens", "pay_nanocredits"):
        _check_range(getattr(statement, name), INT63_LIMIT, name)


def _check_leaf(leaf: Leaf) -> None:
    _check_word(leaf.work_id, ID_CHARS_MAX, "work_id")
    _check_word(leaf.price_id, ID_CHARS_MAX, "price_id", chars_min=0)
    _check_word(leaf.finish, CODE_CHARS_MAX, "finish")
    _check_price(leaf.price)
    for name in ("prompt_hash", "output_hash"):
        _require(len(getattr(leaf, name)) == HASH_BYTES, f"{name} must be {HASH_BYTES} bytes")
    _require(len(leaf.commit_root) in (0, HASH_BYTES), f"commit_root must be {HASH_BYTES} bytes or none")
    _require(len(leaf.claim) in (0, SIGNATURE_BYTES), f"claim must be {SIGNATURE_BYTES} bytes or none")
    _check_range(leaf.epoch, UINT32_LIMIT, "epoch")
    for name in (
        *("start", "input_tokens", "cached_tokens", "output_tokens"),
        *("pay_nanocredits", "charge_nanocredits", "started_ms", "ended_ms", "replayed_tokens"),
    ):
        _check_range(getattr(leaf, name), INT63_LIMIT, name)


def _check_countersigned(message: Countersigned) -> None:
    _require(1 <= len(message.signatures) <= STATEMENTS_MAX, f"signatures must be 1 to {STATEMENTS_MAX}")
    for entry in message.signatures:
        _check_sha256(entry.class_id, "class_id")
        _check_range(entry.period_start_seconds, INT63_LIMIT, "period_start_seconds")
        _check_range(entry.seq, INT63_LIMIT, "seq")
        if entry.signature:
            _check_signature(entry.signature, "signature")
        _check_line(entry.remark, DETAIL_CHARS_MAX, "remark")
        _require(bool(entry.signature or entry.remark), "neither a signature nor a reason why there is none")


def _check_acknowledged(message: Acknowledged) -> None:
    _require(1 <= len(message.statements) <= STATEMENTS_MAX, f"statements must be 1 to {STATEMENTS_MAX}")
    for class_id, period_start_seconds, seq in message.statements:
        _check_sha256(class_id, "class_id")
        _check_range(period_start_seconds, INT63_LIMIT, "period_start_seconds")
        _check_range(seq, INT63_LIMIT, "seq")


def _check_heartbeat(message: Heartbeat) -> None:
    _check_range(message.number, UINT32_LIMIT, "number", least=1)
    _check_range(message.echo, UINT32_LIMIT, "echo")
    if message.telemetry is not None:
        _check_telemetry(message.telemetry)


def _check_telemetry(telemetry: Telemetry) -> None:
    _check_hint(telemetry.clock_seconds, "clock_seconds")
    _check_hint(telemetry.tokens_per_second, "tokens_per_second")
    for name in ("running", "waiting", "kv_pages_used", "kv_pages_total", "memory_bytes"):
        _check_range(getattr(telemetry, name), INT63_LIMIT, name)


def _check_drain(message: Drain) -> None:
    _require(0.0 <= message.deadline_seconds <= DRAIN_SECONDS_MAX, f"deadline_seconds must be 0 to {DRAIN_SECONDS_MAX}")


def _check_goodbye(message: Goodbye) -> None:
    _check_word(message.reason, CODE_CHARS_MAX, "reason")
    _check_line(message.detail, DETAIL_CHARS_MAX, "detail")


_CHECKS: dict[type, Callable[[Any], None]] = {
    Hello: _check_hello,
    Welcome: _check_welcome,
    Proof: _check_proof,
    Ready: _check_ready,
    Offers: _check_offers,
    Fetch: _check_fetch,
    Chunk: _check_chunk,
    Listed: _check_listed,
    Offer: _check_offer,
    Accept: _check_accept,
    Refuse: _check_refuse,
    Step: _check_step,
    Credit: _check_credit,
    Cancel: _check_cancel,
    Receipts: _check_receipts,
    Countersigned: _check_countersigned,
    Acknowledged: _check_acknowledged,
    Heartbeat: _check_heartbeat,
    Drain: _check_drain,
    Goodbye: _check_goodbye,
}
