"""What the network remembers of what it sent, and to whom."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.network import prefixes
from gridmill.network.prefixes import BLOCK_TOKENS, REMEMBERED_SECONDS, STRIDE_TOKENS, Holders, SentPrefixes, Text
from gridmill.wire.messages import NodeId
from gridmill.wire.sampling import pack_ids


def ids(count: int, seed: int = 0) -> bytes:
    random = Random(seed)
    return pack_ids(tuple(random.randrange(1 << 17) for _ in range(count)))


@settings(max_examples=60, deadline=None)
@given(sent=st.integers(0, 1200), asked=st.integers(1, 1200))
def test_what_was_sent_is_found_to_the_block_and_never_the_last_id(sent: int, asked: int) -> None:
    """The search by strides finds the same as one by blocks would."""
    record, text = SentPrefixes(), ids(1200)
    record.remember("c", b"", text[: 4 * sent], 0.0)
    common = min(sent, asked) // BLOCK_TOKENS * BLOCK_TOKENS
    assert record.cached_tokens("c", b"", text[: 4 * asked], 0.0) == min(common, asked - 1)


def test_texts_that_part_ways_share_what_is_before() -> None:
    record, head = SentPrefixes(), ids(700)
    record.remember("c", b"", head + ids(500, seed=1), 0.0)
    assert record.cached_tokens("c", b"", head + ids(500, seed=2), 0.0) == 700 // BLOCK_TOKENS * BLOCK_TOKENS


def test_another_account_and_another_class_find_nothing() -> None:
    record, text = SentPrefixes(), ids(600)
    record.remember("c", b"mine", text, 0.0)
    assert record.cached_tokens("c", b"mine", text, 0.0) == 592
    assert record.cached_tokens("c", b"yours", text, 0.0) == record.cached_tokens("d", b"mine", text, 0.0) == 0


def test_everything_is_forgotten_after_a_while() -> None:
    record, text = SentPrefixes(), ids(600)
    record.remember("c", b"", text, 0.0)
    assert record.cached_tokens("c", b"", text, REMEMBERED_SECONDS) == 592
    assert record.cached_tokens("c", b"", text, REMEMBERED_SECONDS + 1) == 0


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    record, text = SentPrefixes(), ids(1600)
    before, prefixes.BLOCKS_REMEMBERED_MAX = prefixes.BLOCKS_REMEMBERED_MAX, 50
    try:
        record.remember("c", b"", text, 0.0)
        assert record.cached_tokens("c", b"", text, 0.0) == 50 * BLOCK_TOKENS
    finally:
        prefixes.BLOCKS_REMEMBERED_MAX = before


def test_the_holders_of_the_longest_known_part_are_found_the_newest_first() -> None:
    holders = Holders()
    nodes = [SentPrefixes(holders, NodeId(f"n{n}")) for n in range(5)]
    text = ids(4 * STRIDE_TOKENS)
    for node in nodes:
        node.remember("c", b"", text[: 4 * STRIDE_TOKENS], 0.0)
    assert holders.of(Text("c", b"", text)) == ("n4", "n3", "n2")
    nodes[0].remember("c", b"", text, 1.0)
    assert holders.of(Text("c", b"", text)) == ("n0",)
    assert holders.of(Text("c", b"", ids(2000, seed=9))) == ()
    assert holders.of(Text("c", b"", text[:100])) == ()


def test_the_index_of_holders_is_bounded() -> None:
    holders = Holders()
    before, prefixes.INDEXED_MAX = prefixes.INDEXED_MAX, 10
    try:
        for seed in range(30):
            SentPrefixes(holders, NodeId("n")).remember("c", b"", ids(STRIDE_TOKENS, seed=seed), 0.0)
        known = [seed for seed in range(30) if holders.of(Text("c", b"", ids(STRIDE_TOKENS, seed=seed)))]
        assert known == list(range(20, 30))
    finally:
        prefixes.INDEXED_MAX = before


def test_a_prompt_is_hashed_only_as_far_as_it_is_known() -> None:
    text = Text("c", b"", ids(60_000))
    assert SentPrefixes().cached(text, 0.0) == 0
    assert len(text._strides) == 1
