"""One honest message of every kind, for tests that go through all of them."""

from __future__ import annotations

from gridmill.wire.classes import FileDigest, ModelClass
from gridmill.wire.messages import (
    Accept,
    Acknowledged,
    AnyMessage,
    Cancel,
    Chunk,
    ClassOffer,
    Countersignature,
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
from gridmill.wire.sampling import Sampling, TokenLogprob, pack_ids

CLASS = ModelClass(
    weights=(FileDigest("config.json", "a" * 64, 700), FileDigest("model.safetensors", "b" * 64, 5_000_000)),
    arithmetic="float32-exact",
    kv_dtype="float32",
    sampler_version=1,
    tokenizer_sha256="c" * 64,
    text_facts_sha256="d" * 64,
)
PRICE = Price(50, 10, 400)
CLASS_OFFER = ClassOffer("gridmill-demo", CLASS, 64, "native", 120.5, 900.0, PRICE)
LEAF = Leaf(
    work_id="work-1",
    epoch=1,
    start=2,
    prompt_hash=bytes(range(32)),
    output_hash=bytes(range(32, 64)),
    input_tokens=100,
    cached_tokens=40,
    output_tokens=7,
    price_id="price-3",
    price=PRICE,
    pay_nanocredits=60 * 50 + 40 * 10 + 7 * 400,
    charge_nanocredits=6510,
    started_ms=1_700_000_000_000,
    ended_ms=1_700_000_001_500,
    finish="stop",
    commit_root=b"",
    claim=bytes(64),
)
STATEMENT = Statement(bytes(32), bytes([1]) * 32, "e" * 64, 1_699_920_000, 86_400, 1, 100, 40, 7, 6200, bytes(32))


def work(max_tokens: int = 100, prompt: list[int] | None = None, delivered: list[int] | None = None) -> Generate:
    return Generate(
        work_id="work-1",
        class_id="e" * 64,
        prompt=pack_ids(prompt if prompt is not None else [1, 2, 3]),
        sampling=Sampling(bytes(32), max_tokens),
        delivered=pack_ids(delivered or []),
    )


SAMPLES: tuple[AnyMessage, ...] = (
    Hello((1,), bytes(32), bytes(range(32)), "grid.example:8443", "gridmill/0.1.0"),
    Welcome(1, (1,), bytes(32), bytes(range(32)), bytes(64)),
    Proof(bytes(64), bytes(32), bytes(64), "gm-join-abc"),
    Ready("node-0123456789abcdef0123", 5.0),
    Offers((CLASS_OFFER,)),
    Fetch(1, "c" * 64),
    Chunk(1, 0, 5, b"hello"),
    Listed((Listing("demo", "d" * 64, True), Listing("other", "e" * 64, False, "the operator must approve it"))),
    Offer(1, work(delivered=[7, 8]), 64),
    Accept(1),
    Refuse(1, "node", "busy", "all 64 slots are taken"),
    Step(
        (Emission(1, 2, (70_000, 5), (TokenLogprob(-0.5, ((70_000, -0.5), (3, -1.25))), TokenLogprob(-2.0))),),
        (End(1, "stop", 2, 3), End(2, "failed", 0, 0, "out_of_memory", "no room for one more page")),
    ),
    Credit(((1, 64), (2, 1))),
    Cancel(1, 17),
    Receipts((SignedStatement(STATEMENT, (LEAF,), bytes(64)), SignedStatement(STATEMENT, (), bytes([3]) * 64))),
    Countersigned(
        (
            Countersignature("e" * 64, 1_699_920_000, 1, bytes(64)),
            Countersignature("e" * 64, 1_699_920_000, 2, b"", "leaf 2 counts more output than this node sent"),
        )
    ),
    Acknowledged((("e" * 64, 1_699_920_000, 1),)),
    Heartbeat(3, 2, Telemetry(1_700_000_000.0, 2, 1, 10, 100, 55.5, 1 << 30)),
    Drain(30.0),
    Goodbye("stopping", "the program is stopping"),
)
