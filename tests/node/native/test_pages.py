"""KV pages: every page is in one place, sharing is by equal ids and salt alone, and runs stay together."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridmill.node.engines.native.pages import Pages, PageTable


def assert_sound(pages: Pages, tables: list[PageTable]) -> None:
    """Every page is exactly one of free, spare, cached or held, and held as often as tables name it."""
    free = [page for start, length in pages._run_length.items() for page in range(start, start + length)]
    spare = [page for table in tables for page in range(table.spare_start, table.spare_end)]
    references = Counter(page for table in tables for page in table.pages)
    assert all(len(set(table.pages)) == len(table.pages) for table in tables)
    assert sorted([*free, *spare, *pages._cached, *references]) == list(range(pages.total))
    assert {page: count for page, count in enumerate(pages._references) if count} == references
    assert pages.held == len(references)
    assert pages.available == pages.total - len(references)
    assert set(pages._cached) <= set(pages._remembered)
    assert {entry.page for entry in pages._index.values()} == set(pages._remembered)
    assert len(pages._index) == len(pages._remembered)
    assert {start + length: start for start, length in pages._run_length.items()} == pages._run_start
    assert not any(start in pages._run_start for start in pages._run_length), "two free runs touch"
    assert {table for table in tables if table.spare} == pages._with_spare


def contiguous(table: PageTable) -> bool:
    return table.pages == list(range(table.pages[0], table.pages[0] + len(table.pages)))


def filled(pages: Pages, salt: bytes, ids: list[int]) -> PageTable:
    """A session that has computed all of `ids`."""
    table = pages.open(salt, ids, expected_tokens=0)
    assert table is not None
    pages.remember(table, ids, len(ids))
    return table


PROMPT = list(range(100, 140))


def test_a_session_reads_one_contiguous_run_and_grows_inside_it() -> None:
    pages = Pages(64, 4)
    tables = [pages.open(b"", [number] * 10, expected_tokens=20) for number in range(6)]
    for tokens in range(10, 31):
        for table in tables:
            assert table is not None and pages.grow(table, tokens)
    assert all(table is not None and contiguous(table) for table in tables)


def test_spare_pages_behind_a_session_are_given_to_others_before_anything_is_evicted() -> None:
    pages = Pages(16, 4)
    pages.close(filled(pages, b"", PROMPT[:8]))
    greedy = pages.open(b"", [1], expected_tokens=1000)
    assert greedy is not None and greedy.spare == 13
    other = pages.open(b"", [2] * 20, expected_tokens=0)
    assert other is not None and contiguous(other)
    assert pages.cached == 2
    assert_sound(pages, [greedy, other])


def test_every_last_page_can_be_had_whatever_was_reserved_or_remembered() -> None:
    pages = Pages(16, 4)
    pages.close(filled(pages, b"", PROMPT[:20]))
    greedy = pages.open(b"", [1], expected_tokens=1000)
    rest = pages.open(b"", [2] * 60, expected_tokens=0)
    assert greedy is not None and rest is not None
    assert (pages.available, pages.cached) == (0, 0)
    assert not pages.grow(greedy, 5)
    assert pages.open(b"", [3], expected_tokens=0) is None
    assert_sound(pages, [greedy, rest])


def test_equal_ids_under_one_salt_share_full_pages_and_leave_one_id_to_compute() -> None:
    pages = Pages(64, 4)
    first = filled(pages, b"salt", PROMPT)
    again = pages.open(b"salt", PROMPT, expected_tokens=0)
    longer = pages.open(b"salt", [*PROMPT, 1, 2], expected_tokens=0)
    assert again is not None and longer is not None
    assert (again.shared, longer.shared) == (9, 10)  # of 10 full pages
    assert again.pages[:9] == first.pages[:9] and again.pages[9] != first.pages[9]
    assert_sound(pages, [first, again, longer])


def test_another_salt_or_another_beginning_shares_nothing() -> None:
    pages = Pages(64, 4)
    filled(pages, b"salt", PROMPT)
    for salt, ids in [(b"tlas", PROMPT), (b"", PROMPT), (b"salt", [0, *PROMPT[1:]]), (b"salt", PROMPT[4:])]:
        table = pages.open(salt, ids, expected_tokens=0)
        assert table is not None and table.shared == 0


def test_a_salt_cannot_be_mistaken_for_the_inside_of_another_prompt() -> None:
    pages = Pages(256, 4)
    filled(pages, b"", PROMPT)
    for serial in range(12):  # the names of pages inside a prompt are integers, those of salts are bytes
        table = pages.open(bytes([serial]), PROMPT[4:], expected_tokens=0)
        assert table is not None and table.shared == 0


def test_a_prefix_survives_its_session_and_the_longest_unused_goes_first() -> None:
    pages = Pages(10, 4)
    pages.close(filled(pages, b"", PROMPT[:16]))
    pages.close(filled(pages, b"", [7] * 16))
    assert (pages.held, pages.cached) == (0, 8)
    table = pages.open(b"", [8] * 10, expected_tokens=0)  # no free run is that long: three are evicted
    assert table is not None
    pages.close(table)
    assert len(pages._match(b"", [*PROMPT[:16], 0])) == 1, "the end of a prefix is forgotten before its beginning"
    assert len(pages._match(b"", [*[7] * 16, 0])) == 4
    assert_sound(pages, [])


def test_opening_without_room_changes_nothing() -> None:
    pages = Pages(8, 4)
    held = filled(pages, b"", PROMPT[:16])
    pages.close(filled(pages, b"x", PROMPT[:8]))
    assert pages.open(b"x", PROMPT[:20], expected_tokens=0) is None
    assert pages.open(b"x", PROMPT[:8], expected_tokens=0, leaving=3) is None
    assert (pages.held, pages.cached) == (4, 2)
    assert_sound(pages, [held])


def test_pages_computed_twice_are_remembered_once() -> None:
    pages = Pages(16, 4)
    first = pages.open(b"", PROMPT[:8], expected_tokens=0)
    second = pages.open(b"", PROMPT[:8], expected_tokens=0)
    assert first is not None and second is not None
    pages.remember(first, PROMPT[:8], 8)
    pages.remember(second, PROMPT[:8], 8)
    pages.close(second)
    assert pages.cached == 0
    pages.close(first)
    assert pages.cached == 2
    assert_sound(pages, [])


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        Pages(0, 16)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["open", "grow", "remember", "close"]), st.integers(0, 7), st.integers(1, 40)),
    max_size=60,
)


@given(total=st.integers(1, 24), page_tokens=st.integers(1, 5), operations=OPERATIONS)
def test_every_page_is_in_one_place_after_any_operations(
    total: int, page_tokens: int, operations: list[tuple[str, int, int]]
) -> None:
    pages = Pages(total, page_tokens)
    sessions: list[tuple[PageTable, list[int]]] = []
    for name, which, amount in operations:
        if name == "open":
            ids = [which % 2] * (amount // 2) + [which] * (amount - amount // 2)
            available = pages.available
            table = pages.open(bytes([which % 2]), ids, expected_tokens=amount * 3 % 17, leaving=which % 3)
            if table is not None:
                assert len(table.pages) == pages.pages_for(len(ids))
                assert table.shared * page_tokens < len(ids)
                assert pages.available >= which % 3
                sessions.append((table, ids))
            else:
                assert pages.available == available < pages.pages_for(len(ids)) + which % 3
        elif sessions:
            table, ids = sessions[which % len(sessions)]
            if name == "grow":
                room = len(table.pages) * page_tokens
                fits = pages.pages_for(room + amount) - len(table.pages) <= pages.available
                assert pages.grow(table, room + amount) == fits
                assert len(table.pages) == (pages.pages_for(room + amount) if fits else room // page_tokens)
            elif name == "remember":
                pages.remember(table, ids, min(amount, len(ids)))
            else:
                pages.close(table)
                sessions.remove((table, ids))
        assert_sound(pages, [table for table, _ in sessions])
    for table, _ in sessions:
        pages.close(table)
    assert_sound(pages, [])
    assert pages.held == 0
