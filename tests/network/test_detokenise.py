"""The incremental detokeniser against the tokenizers' own decoders, and stop strings against a naive reference."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    CORPUS,
    STREAMABLE,
    UNSTREAMABLE,
    byte_level,
    gemma_like,
    llama2_like,
    metaspace,
    text_of,
    wordpiece,
)
from tokenizers import Tokenizer

from gridmill.network.detokenise import ClassText, TextStream
from gridmill.network.text_worker import Refused
from gridmill.wire.classes import TextFacts

BOUNDED = settings(max_examples=150, deadline=None)


def streamed(text: ClassText, ids: list[int], **options: object) -> str:
    stream = TextStream(text, **options)  # type: ignore[arg-type]
    return "".join([*map(stream.push, ids), stream.finish()])


def table(*pieces: bytes | None, special_ids: tuple[int, ...] = (), **options: object) -> ClassText:
    return ClassText(facts_of(len(pieces)), list(pieces), special_ids=special_ids, **options)  # type: ignore[arg-type]


def facts_of(vocab_size: int) -> TextFacts:
    return TextFacts(
        chat_template=None, special_tokens={}, eos_token_ids=(), context_tokens=4096, vocab_size=vocab_size
    )


BYTES = table(*(bytes([value]) for value in range(256)))


@functools.cache
def described(make: object) -> tuple[Tokenizer, ClassText]:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    return tokenizer, text_of(tokenizer)


# ---------------------------------------------------------------- equal to the real decoders


@pytest.mark.parametrize("make", STREAMABLE)
@given(data=st.data())
@BOUNDED
def test_any_ids_stream_to_what_the_tokenizer_itself_decodes(make: object, data: st.DataObject) -> None:
    tokenizer, text = described(make)
    ids = data.draw(st.lists(st.integers(0, text.facts.vocab_size - 1), max_size=40))
    try:
        b"".join(map(text.token_bytes, ids)).decode()
    except UnicodeDecodeError:
        return  # what becomes of broken bytes is ours to define; see below
    assert streamed(text, ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_level, llama2_like, gemma_like])
@given(written=st.text(max_size=60))
@BOUNDED
def test_no_written_text_is_ever_shown_broken(make: object, written: str) -> None:
    tokenizer, text = described(make)
    ids = tokenizer.encode(written, add_special_tokens=False).ids
    stream = TextStream(text)
    shown = [*map(stream.push, ids), stream.finish()]
    assert "".join(shown) == tokenizer.decode(ids)
    if "�" not in written:
        assert not any("�" in piece for piece in shown)


@pytest.mark.parametrize("make", STREAMABLE)
def test_whole_sentences_come_back_as_the_tokenizer_decodes_them(make: object) -> None:
    tokenizer, text = described(make)
    for line in CORPUS[:5]:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        assert streamed(text, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, llama2_like, wordpiece])
@given(data=st.data())
@BOUNDED
def test_special_tokens_can_be_shown(make: object, data: st.DataObject) -> None:
    tokenizer, text = described(make)
    known = [i for i in range(text.facts.vocab_size) if i in text.special_ids or text.token_bytes(i).isascii()]
    ids = data.draw(st.lists(st.sampled_from(known), max_size=20))
    assert streamed(text, ids, skip_special=False) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("make", UNSTREAMABLE)
def test_a_decoder_that_no_table_can_reproduce_is_refused_by_name(make: object) -> None:
    with pytest.raises(Refused) as refused:
        text_of(make())  # type: ignore[operator]
    assert refused.value.code == "tokenizer_unsupported"


def test_a_byte_level_character_split_over_four_ids_is_shown_once_whole() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(value) for value in "🙂!".encode()] == ["", "", "", "🙂", "!"]


def test_the_leading_space_is_taken_off_the_output_once_and_only_by_decoders_that_do_so() -> None:
    for make, expected in ((llama2_like, "hello there"), (gemma_like, " hello there"), (metaspace, "hello there")):
        tokenizer, text = described(make)
        assert streamed(text, tokenizer.encode("hello there").ids) == expected
    _, text = described(llama2_like)
    assert streamed(text, [3 + 0x20, 3 + 0x20, 3 + 0x41]) == " A"


def test_a_special_token_in_front_does_not_use_up_the_leading_space() -> None:
    tokenizer, text = described(llama2_like)
    ids = tokenizer.encode("hello").ids
    assert streamed(text, [1, *ids]) == streamed(text, [text.facts.vocab_size - 1, *ids]) == "hello"


# ---------------------------------------------------------------- broken bytes


@given(st.binary(max_size=40))
@BOUNDED
def test_broken_bytes_become_the_same_replacement_characters_streamed_or_not(raw: bytes) -> None:
    assert streamed(BYTES, list(raw)) == raw.decode("utf-8", "replace")


@given(pieces=st.lists(st.binary(max_size=4), max_size=12), strip=st.integers(0, 2))
@BOUNDED
def test_the_total_does_not_depend_on_how_bytes_are_split_into_ids(pieces: list[bytes], strip: int) -> None:
    whole = b"".join(pieces)
    options = {"strip_character": " ", "strip_count": strip}
    expected = whole.decode("utf-8", "replace")
    for _ in range(strip):
        expected = expected.removeprefix(" ")
    for split in (pieces, [whole], [bytes([value]) for value in whole]):
        text = table(b"", *split, **options)
        assert streamed(text, list(range(len(split) + 1))) == expected


@given(st.lists(st.integers(0, 255), max_size=30))
@BOUNDED
def test_what_is_shown_is_never_taken_back_and_at_most_three_bytes_wait(ids: list[int]) -> None:
    stream, shown = TextStream(BYTES), ""
    for count, token_id in enumerate(ids, 1):
        shown += stream.push(token_id)
        now = bytes(ids[:count]).decode("utf-8", "replace")
        assert now.startswith(shown)
        assert len(now) - len(shown) <= 1  # an unfinished character, at most
    assert shown + stream.finish() == bytes(ids).decode("utf-8", "replace")


def test_an_unfinished_character_is_a_replacement_character_at_the_end_and_finish_says_it_once() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(0xE2), stream.push(0x82)] == ["", ""]
    assert [stream.finish(), stream.finish()] == ["�", ""]


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("token_id", [-1, -256, 256, 2**32 - 1])
def test_an_id_outside_the_vocabulary_is_an_error(token_id: int) -> None:
    with pytest.raises(ValueError, match=str(token_id)):
        TextStream(BYTES).push(token_id)
    with pytest.raises(ValueError, match=str(token_id)):
        BYTES.token_bytes(token_id)
    with pytest.raises(ValueError, match=str(token_id)):
        BYTES.token_text(token_id)


def test_ids_that_only_pad_the_embedding_print_nothing() -> None:
    tokenizer, text = described(byte_level)
    assert streamed(text, [text.facts.vocab_size - 1]) == ""
    assert text.token_bytes(tokenizer.get_vocab_size()) == b""


def test_hidden_ids_print_nothing_even_inside_a_character() -> None:
    ids = [0x41, 0xC3, 0x42, 0xA9, 0x42]
    assert streamed(BYTES, ids, hidden_ids={0x42}) == "Aé"


def test_logprobs_get_bytes_and_text_of_single_ids() -> None:
    text = table(b"a", "é".encode()[:1], b"<|end|>", None, special_ids=(2,))
    assert [text.token_bytes(i) for i in range(4)] == [b"a", b"\xc3", b"", b""]
    assert [text.token_text(i) for i in range(4)] == ["a", "�", "<|end|>", ""]
    assert text.special_ids == {2}


def test_a_table_that_does_not_fit_its_class_is_refused() -> None:
    with pytest.raises(ValueError, match="ids and the class"):
        ClassText(facts_of(3), [b"a"])
    with pytest.raises(ValueError, match="outside"):
        table(b"a", special_ids=(1,))
    with pytest.raises(ValueError, match="outside"):
        table(b"a", first={7: b"x"})
    with pytest.raises(ValueError, match="stripped"):
        table(b"a", strip_character="ab", strip_count=1)


# ---------------------------------------------------------------- stop strings

LETTERS = "abc"
SPELLED = table(*(piece.encode() for piece in ("", "a", "b", "c", "ab", "ba", "aab", "abcabc", "cc")))
SPELLINGS = [SPELLED.token_text(i) for i in range(SPELLED.facts.vocab_size)]


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first moment at which a stop is complete, and the longest one complete then."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def held_back(text: str, stops: list[str]) -> int:
    """How many characters at the end could still become a stop."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


@given(
    ids=st.lists(st.integers(0, len(SPELLINGS) - 1), max_size=16),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4),
)
@settings(max_examples=600, deadline=None)
def test_stops_cut_where_a_naive_search_cuts_and_hold_back_only_what_they_must(
    ids: list[int], stops: list[str]
) -> None:
    stream, shown, whole = TextStream(SPELLED, stop=stops), "", ""
    for token_id in ids:
        shown += stream.push(token_id)
        whole += SPELLINGS[token_id]
        expected, stopped = naive(whole, stops)
        assert stream.stopped == stopped
        assert shown == (expected if stopped else whole[: len(whole) - held_back(whole, stops)])
    assert shown + stream.finish() == naive(whole, stops)[0]


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["Hello", " wor", "ld</", "s> more"], ["</s>"], "Hello world"),
        (["aaaa", "aaab"], ["aaab"], "aaaa"),  # the held-back start slides along
        (["one\n\nUs", "er: two"], ["\n\nUser:"], "one"),
        (["one\n\nUs", "age"], ["\n\nUser:"], "one\n\nUsage"),
        (["xabcd"], ["abcd", "bc"], "xa"),  # the stop that completes first wins
        (["xabc"], ["bc", "abc"], "x"),  # of two that complete together, the longer
        (["stop"], ["stop"], ""),
        (["ab", "ab", "abc"], ["ababc"], "ab"),
    ],
)
def test_stops_across_token_borders(pieces: list[str], stops: list[str], shown: str) -> None:
    text = table(*(piece.encode() for piece in pieces))
    assert streamed(text, list(range(len(pieces))), stop=stops) == shown


def test_a_stop_is_matched_on_characters_that_were_split_over_ids() -> None:
    stream = TextStream(BYTES, stop=["é!"])
    assert [stream.push(value) for value in "aé!b".encode()] == ["a", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_nothing_is_shown_after_a_stop() -> None:
    stream = TextStream(SPELLED, stop=["b"])
    assert [stream.push(1), stream.push(2), stream.push(1), stream.finish()] == ["a", "", "", ""]


def test_a_stop_of_a_replacement_character_can_complete_at_the_end() -> None:
    stream = TextStream(BYTES, stop=["�"])
    assert stream.push(0xC3) == ""
    assert stream.finish() == ""
    assert stream.stopped


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(BYTES, stop=["x", ""])


def test_long_repetitive_stops_cost_time_linear_in_the_text() -> None:
    """Would take minutes if every id were compared against every prefix of the stop."""
    text = table(b"a" * 1000, b"b")
    stream = TextStream(text, stop=["a" * 20_000 + "b", "a" * 30_000 + "c"])
    shown = "".join(stream.push(0) for _ in range(100))
    assert len(shown) == 70_000
    assert stream.push(1) == "a" * 10_000  # the longer stop had held them; the shorter one took its 20 000
    assert stream.stopped


@given(
    pieces=st.lists(st.binary(max_size=5), min_size=1, max_size=8),
    ids=st.lists(st.integers(0, 7), max_size=20),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=3),
    hidden=st.sets(st.integers(0, 7), max_size=2),
    special=st.sets(st.integers(0, 7), max_size=2),
    skip_special=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_fuzzed_tables_stops_and_hidden_ids_agree_with_one_decode_of_everything(
    pieces: list[bytes],
    ids: list[int],
    stops: list[str],
    hidden: set[int],
    special: set[int],
    skip_special: bool,
) -> None:
    text = table(*pieces, special_ids=tuple(i for i in special if i < len(pieces)))
    ids = [i % len(pieces) for i in ids]
    visible = [i for i in ids if i not in hidden and not (skip_special and i in text.special_ids)]
    whole = b"".join(pieces[i] for i in visible).decode("utf-8", "replace")
    shown = streamed(text, ids, stop=stops, hidden_ids=hidden, skip_special=skip_special)
    assert shown == (naive(whole, stops)[0] if stops else whole)
