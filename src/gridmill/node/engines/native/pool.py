"""KV pages of all sessions, and the attention that reads them: one flat sequence of new tokens, no padding anywhere.

1. A layer's keys lie head-major, [kv_heads, slots, head_dim]; slot = page * page_tokens + offset. A session whose pages
   are neighbours is read in place, without a copy; any other layout is gathered.
2. All indices of a forward pass are computed once, in a Plan, not once per layer.
3. The model's own layers call us through transformers' attention interface; they never learn that pages exist.
4. In exact mode a query's result depends on its own keys alone, bit by bit: see `Pool._lean`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION = "gridmill_paged"
LANE = 16  # exact mode reads keys in multiples of this: the widest vector unit holds 16 float32
BLOCK = 128  # exact mode: values summed in one matrix product; MKL splits sums longer than 192 in two
ROWS_MIN = 4  # LEAN: MKL has kernels of their own for one, two and three rows
ROWS_FIXED = 16  # FIXED: query rows in every call
MINUS_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's attention looks like from outside."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Recipe(Enum):
    """How attention is computed."""

    FAST = "fast"  # whatever is quickest; bits may depend on the batch
    LEAN = "lean"  # exact, resting on facts about a kernel library that `choose_recipe` checks on this machine
    FIXED = "fixed"  # exact, every kernel call has the same shape; slow, and what a GPU gets


@dataclass(slots=True)
class Span:
    """The new tokens of one row: where they are in the flat batch, in their sequence, and where its slots lie."""

    start: int  # index of the first new token in the flat batch
    length: int
    position: int  # of the first new token
    base: int  # slot of position 0 when `slots` is None: the pages are neighbours
    slots: torch.Tensor | None  # the slot of every position up to the end of the last page


@dataclass(slots=True)
class Plan:
    """What every layer of one forward pass needs to know. Tokens of the batch behind the last span are padding."""

    spans: list[Span]
    new_slots: torch.Tensor  # [sum of lengths], where the new keys and values go
    new_run: int  # the first of them when they are consecutive, else -1
    stale_slots: torch.Tensor | None  # exact mode: slots behind the first token of a page, still another session's
    hidden: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)  # masks, shared by the layers


class Pool:
    """Keys and values of the layers of one slice, and the attention over them."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        recipe: Recipe = Recipe.FAST,
    ) -> None:
        if recipe is not Recipe.FAST and page_tokens % LANE:
            raise ValueError(f"exact mode needs pages of a multiple of {LANE} tokens, not {page_tokens}")
        self.pages = pages
        self.page_tokens = page_tokens
        self.device = device
        self.recipe = recipe
        slots = pages * page_tokens
        # Zeros, not garbage: a NaN left behind in memory would survive a multiplication by a zero weight.
        self.keys = [torch.zeros(s.kv_heads, slots, s.key_dim, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.zeros(s.kv_heads, slots, s.value_dim, dtype=dtype, device=device) for s in shapes]
        self.plan: Plan | None = None

    def layout(self, positions: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> Plan:
        """Turns page tables into a Plan. Raises ValueError for a table that does not cover its row or the pool."""
        size = self.page_tokens
        spans: list[Span] = []
        new_slots: list[torch.Tensor] = []
        stale: list[int] = []
        single: list[int] = []  # slots of one-token rows, the common case, kept out of tensors until the end
        new_run = -1
        start = 0
        for position, length, table in zip(positions, lengths, tables, strict=True):
            end = position + length
            needed = -(-end // size)
            if position < 0 or length < 1 or needed > len(table):
                raise ValueError(f"a page table of {len(table)} pages does not cover positions {position}:{end}")
            used = list(table[:needed])
            if min(used) < 0 or max(used) >= self.pages:
                raise ValueError(f"a page table names a page outside 0:{self.pages}")
            slots = None
            base = used[0] * size
            if used[-1] - used[0] != needed - 1 or used != list(range(used[0], used[0] + needed)):
                base = -1
                slots = (torch.tensor(used)[:, None] * size + torch.arange(size)).view(-1)
            if length == 1:
                single.append(used[-1] * size + position % size)
            else:
                if single:
                    new_slots.append(torch.tensor(single))
                    single = []
                fresh = torch.arange(base + position, base + end) if slots is None else slots[position:end]
                new_slots.append(fresh)
            new_run = base + position if slots is None and start == 0 else -1
            if self.recipe is Recipe.LEAN and end % size and position <= end - end % size:
                stale.extend(range(used[-1] * size + end % size, (used[-1] + 1) * size))
            spans.append(Span(start, length, position, base, None if slots is None else slots.to(self.device)))
            start += length
        if single:
            new_slots.append(torch.tensor(single))
        flat = new_slots[0] if len(new_slots) == 1 else torch.cat(new_slots)
        stale_slots = torch.tensor(stale, device=self.device) if stale else None
        return Plan(spans, flat.to(self.device), new_run, stale_slots)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [1, heads, N, key_dim], key and value [1, kv_heads, N, …] → [1, N, heads, value_dim]."""
        plan = self.plan
        assert plan is not None, "attention outside Runner.forward"
        keys, values = self.keys[layer], self.values[layer]
        heads, count = query.shape[1], query.shape[2]
        kv_heads = keys.shape[0]
        real = plan.new_slots.shape[0]
        key, value = key[0], value[0]
        if real < count:
            key, value = key[:, :real], value[:, :real]
        if plan.new_run >= 0:
            keys[:, plan.new_run : plan.new_run + real] = key
            values[:, plan.new_run : plan.new_run + real] = value
        else:
            keys.index_copy_(1, plan.new_slots, key)
            values.index_copy_(1, plan.new_slots, value)
        if plan.stale_slots is not None:
            values.index_fill_(1, plan.stale_slots, 0.0)
        # Token-major, which is how projections leave them, so one token's heads are a view.
        group = heads // kv_heads
        queries = query[0].transpose(0, 1).reshape(count, kv_heads, group, -1) * scaling
        out = queries.new_zeros(count, kv_heads, group, values.shape[2])
        if self.recipe is Recipe.FAST:
            plain = softcap is None and sinks is None and queries.dtype is torch.float32
            tokens, results = queries.unbind(0), out.unbind(0)
            for span in plan.spans:
                first = 0 if window is None else max(0, span.position - window + 1)
                if plain and span.length == 1:
                    k, v = _read(span, keys, values, first, span.position + 1)
                    torch.bmm(torch.bmm(tokens[span.start], k.mT).softmax(-1), v, out=results[span.start])
                else:
                    self._fast(plan, span, first, queries, keys, values, out, window, softcap, sinks)
            return out.view(1, count, heads, -1)
        exact, rows = (self._lean, ROWS_MIN) if self.recipe is Recipe.LEAN else (self._fixed, group)
        # Padded once for all tokens that decode, not once for each.
        single = queries if group >= rows else functional.pad(queries, (0, 0, 0, rows - group))
        for span in plan.spans:
            first = 0 if window is None else max(0, span.position - window + 1)
            if span.length == 1:
                result = exact(plan, span, first, single[span.start], keys, values, window, softcap, sinks)
                out[span.start] = result[:, :group]
                continue
            stop = span.start + span.length
            q = queries[span.start : stop].transpose(0, 1).reshape(kv_heads, span.length * group, -1)
            result = exact(plan, span, first, q, keys, values, window, softcap, sinks)
            out[span.start : stop] = result.view(kv_heads, span.length, group, -1).transpose(0, 1)
        return out.view(1, count, heads, -1)

    def _fast(
        self,
        plan: Plan,
        span: Span,
        first: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        end = span.position + span.length
        k, v = _read(span, keys, values, first, end)
        if span.length == 1:
            scores = torch.bmm(queries[span.start], k.transpose(1, 2))
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            torch.bmm(_softmax(scores, sinks).to(v.dtype), v, out=out[span.start])
            return
        kv_heads, group = keys.shape[0], queries.shape[2]
        stop = span.start + span.length
        q = queries[span.start : stop].transpose(0, 1).reshape(kv_heads, span.length * group, -1)
        hidden = self._hidden(plan, span, first, end, window, group)
        if softcap is None and sinks is None:
            result = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=~hidden, scale=1.0)
        else:
            scores = torch.bmm(q, k.transpose(1, 2))
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            result = torch.bmm(_softmax(scores.masked_fill_(hidden, MINUS_INFINITY), sinks).to(v.dtype), v)
        out[span.start : stop] = result.view(kv_heads, span.length, group, -1).transpose(0, 1)

    def _lean(
        self,
        plan: Plan,
        span: Span,
        first: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same sum in the same order for a query, whatever is computed beside it. q [kv_heads, rows, dim], scaled.

        Keys are read from one multiple of LANE to another, so key i always falls on vector lane i % LANE of the
        softmax. Hidden keys weigh exactly zero, and adding zero changes no bit. Values are summed in blocks that start
        at absolute multiples of BLOCK, one block after the other.
        """
        end = span.position + span.length
        low = first - first % LANE
        high = -(-end // LANE) * LANE
        k, v = _read(span, keys, values, low, high)
        rows = q.shape[1]
        if rows < ROWS_MIN:
            q = functional.pad(q, (0, 0, 0, ROWS_MIN - rows))
        scores = torch.bmm(q, k.transpose(1, 2))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        # Filled, not added to: what stands in slots behind the end may be anything.
        if span.length == 1:
            if high > end:
                scores[:, :, end - low :] = MINUS_INFINITY
            if first > low:
                scores[:, :, : first - low] = MINUS_INFINITY
        else:
            hidden = self._hidden(plan, span, low, high, window, rows // span.length)
            if rows < ROWS_MIN:
                hidden = functional.pad(hidden, (0, 0, 0, ROWS_MIN - rows))
            scores.masked_fill_(hidden, MINUS_INFINITY)
        weights = _softmax(scores, sinks)
        total = None
        for start, stop in _blocks(low, high):
            part = torch.bmm(weights[:, :, start - low : stop - low], v[:, start - low : stop - low])
            total = part if total is None else total + part
        assert total is not None
        return total[:, :rows]

    def _fixed(
        self,
        plan: Plan,
        span: Span,
        first: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `_lean`, in calls of ROWS_FIXED query rows and BLOCK keys, whatever the work is."""
        end = span.position + span.length
        low = first - first % BLOCK
        high = -(-end // BLOCK) * BLOCK
        slots = self._slots(span)
        slots = functional.pad(slots[low:end], (0, high - end))
        k, v = keys.index_select(1, slots), values.index_select(1, slots)
        v[:, end - low :] = 0.0
        group = q.shape[1] // span.length
        hidden = self._hidden(plan, span, low, high, window, group)
        pieces: list[torch.Tensor] = []
        for row in range(0, q.shape[1], ROWS_FIXED):
            rows = min(ROWS_FIXED, q.shape[1] - row)
            piece = functional.pad(q[:, row : row + rows], (0, 0, 0, ROWS_FIXED - rows))
            veil = functional.pad(hidden[row : row + rows], (0, 0, 0, ROWS_FIXED - rows))
            parts = []
            for start, stop in _blocks(low, high):
                scores = torch.bmm(piece, k[:, start - low : stop - low].transpose(1, 2))
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                parts.append(scores.masked_fill_(veil[:, start - low : stop - low], MINUS_INFINITY))
            highest = parts[0].amax(-1, keepdim=True)
            for scores in parts[1:]:
                highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
            column = None
            if sinks is not None:
                column = _sink_column(sinks, keys.shape[0], q.shape[1])[:, row : row + rows]
                column = functional.pad(column, (0, 0, 0, ROWS_FIXED - rows))
                highest = torch.maximum(highest, column)
            total = mass = None
            for scores, (start, stop) in zip(parts, _blocks(low, high), strict=True):
                weights = (scores - highest).exp_()
                part, share = torch.bmm(weights, v[:, start - low : stop - low]), weights.sum(-1, keepdim=True)
                total = part if total is None else total + part
                mass = share if mass is None else mass + share
            assert total is not None and mass is not None
            if column is not None:
                mass = mass + (column - highest).exp_()
            pieces.append((total / mass)[:, :rows])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _slots(self, span: Span) -> torch.Tensor:
        if span.slots is not None:
            return span.slots
        return torch.arange(span.base, span.base + span.position + span.length, device=self.device)

    def _hidden(self, plan: Plan, span: Span, low: int, high: int, window: int | None, group: int) -> torch.Tensor:
        """[length * group, high - low], true where a query must not look: later keys, and those before its window."""
        name = (span.position - low, span.length, high - low, -1 if window is None else window, group)
        hidden = plan.hidden.get(name)
        if hidden is None:
            here = torch.arange(span.position, span.position + span.length, device=self.device)[:, None]
            there = torch.arange(low, high, device=self.device)
            hidden = there > here
            if window is not None:
                hidden = hidden | (there <= here - window)
            if group > 1:
                hidden = hidden.repeat_interleave(group, 0)
            plan.hidden[name] = hidden
        return hidden


def _read(
    span: Span, keys: torch.Tensor, values: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [low, high), [kv_heads, high - low, dim]; a view when the pages are neighbours."""
    if span.slots is None:
        return keys.narrow(1, span.base + low, high - low), values.narrow(1, span.base + low, high - low)
    slots = span.slots[low:high]
    return keys.index_select(1, slots), values.index_select(1, slots)


def _blocks(low: int, high: int) -> list[tuple[int, int]]:
    """[low, high) cut at the absolute multiples of BLOCK."""
    edges = [low, *range((low // BLOCK + 1) * BLOCK, high, BLOCK), high]
    return list(pairwise(edges))


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension of [kv_heads, rows, keys], in float32."""
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    # A sink is one more score per head: it takes weight away and has no value. It comes first and takes a whole lane
    # group, so that key i stays on its vector lane.
    lead = scores.new_full((scores.shape[0], scores.shape[1], LANE), MINUS_INFINITY)
    column = _sink_column(sinks, scores.shape[0], scores.shape[1])
    lead[:, : column.shape[1], :1] = column
    return torch.softmax(torch.cat([lead, scores], dim=-1), dim=-1, dtype=torch.float32)[:, :, LANE:]


def _sink_column(sinks: torch.Tensor, kv_heads: int, rows: int) -> torch.Tensor:
    """[kv_heads, rows, 1] from one sink per head; rows are token-major, a group of heads per token."""
    group = sinks.shape[0] // kv_heads
    return sinks.view(kv_heads, group, 1).repeat(1, max(1, rows // group), 1)


def choose_recipe(shapes: Sequence[LayerShape], device: torch.device) -> Recipe:
    """LEAN when its assumptions hold for these shapes on this machine with this number of threads, else FIXED.

    Random keys under every way a token can be computed: alone, in chunks, in place, gathered, with a window. Kernels
    are chosen by shape and not by content, so a few hundred outputs that all agree leave little room for chance.
    """
    if device.type != "cpu":
        return Recipe.FIXED
    generator = torch.Generator().manual_seed(0)
    pages, count = 24, 2 * BLOCK + 48
    neighbours = list(range(2, 2 + -(-count // LANE)))
    scattered = torch.randperm(pages, generator=generator)[: len(neighbours)].tolist()
    for shape in sorted(set(shapes), key=repr):
        pool = Pool([shape], pages=pages, page_tokens=LANE, dtype=torch.float32, device=device, recipe=Recipe.LEAN)
        tensors = [
            torch.randn(1, heads, count, dim, generator=generator)
            for heads, dim in (
                (shape.heads, shape.key_dim),
                (shape.kv_heads, shape.key_dim),
                (shape.kv_heads, shape.value_dim),
            )
        ]
        for window in (None, BLOCK // 3):
            reference = _in_chunks(pool, tensors, 1, neighbours, window)
            for size, table in ((count, neighbours), (count, scattered), (7, scattered), (64, neighbours)):
                if not torch.equal(_in_chunks(pool, tensors, size, table, window), reference):
                    return Recipe.FIXED
    return Recipe.LEAN


def _in_chunks(
    pool: Pool, tensors: list[torch.Tensor], size: int, table: list[int], window: int | None
) -> torch.Tensor:
    """Attention over one sequence whose tokens arrive `size` at a time. `tensors`: its queries, keys and values."""
    count = tensors[0].shape[2]
    out: list[torch.Tensor] = []
    for low in range(0, count, size):
        high = min(count, low + size)
        pool.plan = pool.layout([low], [high - low], [table])
        query, key, value = (tensor[:, :, low:high] for tensor in tensors)
        out.append(pool.attend(0, query, key, value, scaling=0.125, window=window, softcap=None, sinks=None)[0])
    return torch.cat(out)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. `module.gridmill_attend` was put there by the Runner and knows pool and layer."""
    out = module.gridmill_attend(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out, None


AttentionInterface.register(ATTENTION, attention)
