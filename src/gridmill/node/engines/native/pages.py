"""KV pages: which session holds which, which may be shared, and which may be taken back.

Every page is in exactly one state: *free*, *spare* (free, but kept next to a session that will probably grow into it),
*held* (referenced by at least one page table), or *cached* (referenced by none, and remembered for its contents).
Only full pages whose keys and values are computed are remembered, and nobody writes to them again.
Pages are handed out in contiguous runs where possible, because attention reads a contiguous run without copying it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gridmill.wire.sampling import pack_ids

GROWTH_PAGES = 16  # how much room a session that outgrew its first run asks for, so that growing stays contiguous


@dataclass(slots=True, eq=False)
class PageTable:
    """The pages of one session in order of position. Only `Pages` edits it; the engine reads `pages`."""

    pages: list[int]
    parent: int | bytes  # names the page before the next one to be remembered; the session's salt before the first
    remembered: int = 0  # how many leading pages have been offered to the prefix index
    spare_start: int = 0
    spare_end: int = 0
    shared: int = field(default=0)  # how many leading pages came from the prefix index

    @property
    def spare(self) -> int:
        return self.spare_end - self.spare_start


@dataclass(slots=True, frozen=True)
class _Remembered:
    """One entry of the prefix index. `key` holds the ids themselves, so that no collision can mix two prompts."""

    page: int
    serial: int  # never used again, so that a child of a forgotten page can never be found through its successor
    key: tuple[int | bytes, bytes]


class Pages:
    """A fixed number of pages. Not thread-safe: the engine's compute thread owns it."""

    def __init__(self, total: int, page_tokens: int) -> None:
        if total < 1 or page_tokens < 1:
            raise ValueError(f"a KV pool needs at least one page of one token, not {total} of {page_tokens}")
        self.total = total
        self.page_tokens = page_tokens
        self.held = 0
        self._references = [0] * total
        self._run_length: dict[int, int] = {0: total}  # free runs, by first page
        self._run_start: dict[int, int] = {total: 0}  # the same runs, by the page after their last
        self._with_spare: set[PageTable] = set()
        self._index: dict[tuple[int | bytes, bytes], _Remembered] = {}
        self._remembered: dict[int, _Remembered] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._serial = 0

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that somebody could have now: free, spare and cached ones."""
        return self.total - self.held

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def open(self, salt: bytes, ids: Sequence[int], *, expected_tokens: int, leaving: int = 0) -> PageTable | None:
        """A table with room for all of `ids`, starting with every remembered page of the same salt and ids.

        At least the last id is left to compute. `expected_tokens` more are kept spare behind the run where that costs
        nobody anything. None, and nothing changed, when fewer than `leaving` pages would stay available.
        """
        match = self._match(salt, ids)
        if not self._fits(match, len(ids), leaving):
            return None
        table = PageTable([entry.page for entry in match], match[-1].serial if match else salt, len(match))
        table.shared = len(match)
        for page in table.pages:
            self._hold(page)
        needed = self.pages_for(len(ids)) - len(match)
        self._extend(table, needed, needed + self.pages_for(expected_tokens))
        return table

    def grow(self, table: PageTable, tokens: int) -> bool:
        """Makes room for `tokens` in all. False, and nothing changed, when there are not enough pages."""
        missing = self.pages_for(tokens) - len(table.pages)
        if missing > self.available:
            return False
        while missing > 0 and self._take_next(table):
            missing -= 1
        if missing > 0:
            self._extend(table, missing, max(missing, GROWTH_PAGES))
        return True

    def remember(self, table: PageTable, ids: Sequence[int], computed: int) -> None:
        """Offers the table's full pages, of which `ids[:computed]` are computed, to sessions of the same salt."""
        size = self.page_tokens
        for number in range(table.remembered, computed // size):
            key = (table.parent, pack_ids(list(ids[number * size : (number + 1) * size])))
            entry = self._index.get(key)
            if entry is None:
                self._serial += 1
                entry = _Remembered(table.pages[number], self._serial, key)
                self._index[key] = entry
                self._remembered[entry.page] = entry
            table.parent = entry.serial
            table.remembered = number + 1

    def close(self, table: PageTable) -> None:
        """Gives everything back. The last pages become the first to be evicted, so that prefixes outlive their ends."""
        for page in reversed(table.pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            self.held -= 1
            if page in self._remembered:
                self._cached[page] = None
            else:
                self._free(page, 1)
        self._drop_spare(table)
        table.pages = []

    # ------------------------------------------------------------ prefix index

    def _match(self, salt: bytes, ids: Sequence[int]) -> list[_Remembered]:
        found: list[_Remembered] = []
        parent: int | bytes = salt
        size = self.page_tokens
        for start in range(0, (len(ids) - 1) // size * size, size):
            entry = self._index.get((parent, pack_ids(list(ids[start : start + size]))))
            if entry is None:
                break
            found.append(entry)
            parent = entry.serial
        return found

    def _fits(self, match: list[_Remembered], tokens: int, leaving: int) -> bool:
        revived = sum(not self._references[entry.page] for entry in match)
        return self.pages_for(tokens) - len(match) + revived + leaving <= self.available

    def _hold(self, page: int) -> None:
        if not self._references[page]:
            self.held += 1
            self._cached.pop(page, None)
        self._references[page] += 1

    def _evict(self, count: int) -> None:
        for _ in range(min(count, len(self._cached))):
            page, _ = self._cached.popitem(last=False)
            entry = self._remembered.pop(page)
            del self._index[entry.key]
            self._free(page, 1)

    # ------------------------------------------------------------ runs

    def _take_next(self, table: PageTable) -> bool:
        """One page right behind the last one, when it is spare or free."""
        if table.spare_start < table.spare_end:
            page = table.spare_start
            table.spare_start += 1
            if not table.spare:
                self._with_spare.discard(table)
        elif table.pages and table.pages[-1] + 1 in self._run_length:
            page = table.pages[-1] + 1
            self._cut(page, 1)
        else:
            return False
        self._hold(page)
        table.pages.append(page)
        return True

    def _extend(self, table: PageTable, needed: int, wanted: int) -> None:
        """Appends `needed` pages, and keeps up to `wanted` in all when a free run is that long."""
        if needed <= 0:
            return
        self._drop_spare(table)
        start, length = self._best_run(wanted)
        if length < needed:
            # A session's pages were cached together, so evicting as many as are needed tends to free them in one run.
            self._evict(needed)
        while needed > 0:
            start, length = self._best_run(wanted)
            assert length, "more pages were asked for than are available"
            taken = min(length, wanted)
            used = min(taken, needed)
            self._cut(start, taken)
            for page in range(start, start + used):
                self._hold(page)
                table.pages.append(page)
            if taken > used:
                table.spare_start, table.spare_end = start + used, start + taken
                self._with_spare.add(table)
            needed -= used
            wanted -= used

    def _best_run(self, wanted: int) -> tuple[int, int]:
        """(first page, length) of the shortest free run that holds `wanted`, else of the longest; (0, 0) when none."""
        start, length = 0, 0
        for first, size in self._run_length.items():
            if (wanted <= size < length) or (length < size and length < wanted):
                start, length = first, size
        donor = max(self._with_spare, key=lambda table: table.spare, default=None)
        half = (donor.spare + 1) // 2 if donor is not None else 0
        if donor is None or length >= min(wanted, half):
            return start, length
        # No free run is as long as the far half of what another session was going to grow into.
        donor.spare_end -= half
        self._free(donor.spare_end, half)
        start = donor.spare_end
        if not donor.spare:
            self._with_spare.discard(donor)
        return start, self._run_length[start]

    def _drop_spare(self, table: PageTable) -> None:
        if table.spare:
            self._free(table.spare_start, table.spare)
        table.spare_start = table.spare_end = 0
        self._with_spare.discard(table)

    def _free(self, start: int, length: int) -> None:
        """Puts a run back, joined with its free neighbours."""
        end = start + length
        after = self._run_length.pop(end, 0)
        if after:
            end += after
        if start in self._run_start:
            start = self._run_start.pop(start)
        self._run_length[start] = end - start
        self._run_start[end] = start

    def _cut(self, start: int, length: int) -> None:
        """Takes the first `length` pages out of the free run that begins at `start`."""
        end = start + self._run_length.pop(start)
        if start + length < end:
            self._run_length[start + length] = end - start - length
            self._run_start[end] = start + length
        else:
            del self._run_start[end]
