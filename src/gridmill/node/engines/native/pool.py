"""KV pages of all sessions, and the attention that reads them: one flat sequence of new tokens, no padding anywhere.

1. A layer's keys lie head-major, [kv_heads, slots, head_dim]; slot = page * page_tokens + offset. A session whose pages
   are neighbours is read in place, without a copy; any other layout is gathered.
2. All indices of a forward pass are computed once, in a Plan, not once per layer.
3. The model's own layers call us through transformers' attention interface; they never learn that pages exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION = "gridmill_paged"


@dataclass(slots=True)
class Span:
    """The new tokens of one row: where they are in the flat batch, in their sequence, and where its slots lie."""

    start: int  # index of the first new token in the flat batch
    length: int
    position: int  # of the first new token
    base: int  # slot of position 0 when `slots` is None: the pages are neighbours
    slots: torch.Tensor | None  # [position + length], the slot of every position


@dataclass(slots=True)
class Plan:
    """What every layer of one forward pass needs to know."""

    spans: list[Span]
    new_slots: torch.Tensor  # [N], where the new keys and values go
    new_run: int  # the first of them when they are consecutive, else -1
    masks: dict[tuple[int, int, int], torch.Tensor]  # (length, keys, window) → additive mask, shared by the layers


class Pool:
    """Keys and values of the layers of one slice. `shapes` has (kv_heads, key_dim, value_dim) per layer."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        *,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.device = device
        slots = pages * page_tokens
        # Zeros, not garbage: a NaN left behind in memory would survive a multiplication by a zero weight.
        self.keys = [torch.zeros(heads, slots, dim, dtype=dtype, device=device) for heads, dim, _ in shapes]
        self.values = [torch.zeros(heads, slots, dim, dtype=dtype, device=device) for heads, _, dim in shapes]
        self.plan: Plan | None = None

    def layout(self, positions: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> Plan:
        """Turns page tables into a Plan. Raises ValueError for a table that does not cover its row or the pool."""
        size = self.page_tokens
        spans: list[Span] = []
        new_slots: list[torch.Tensor] = []
        run_ends: int | None = None
        first_slot = -1
        for position, length, table in zip(positions, lengths, tables, strict=True):
            end = position + length
            needed = -(-end // size)
            if position < 0 or length < 1 or needed > len(table):
                raise ValueError(f"a page table of {len(table)} pages does not cover positions {position}:{end}")
            used = list(table[:needed])
            if min(used) < 0 or max(used) >= self.pages:
                raise ValueError(f"a page table names a page outside 0:{self.pages}")
            start = spans[-1].start + spans[-1].length if spans else 0
            if used[-1] - used[0] == needed - 1 and used == list(range(used[0], used[0] + needed)):
                base, slots = used[0] * size, None
                fresh = torch.arange(base + position, base + end)
            else:
                pages = torch.tensor(used)
                base = -1
                slots = (pages[:, None] * size + torch.arange(size)).view(-1)[:end]
                fresh = slots[position:]
                slots = slots.to(self.device)
            spans.append(Span(start, length, position, base, slots))
            new_slots.append(fresh)
            if slots is None and (run_ends is None and len(spans) == 1):
                first_slot, run_ends = base + position, base + end
            else:
                first_slot = -1
        flat = new_slots[0] if len(new_slots) == 1 else torch.cat(new_slots)
        return Plan(spans, flat.to(self.device), first_slot, {})

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
        count = query.shape[2]
        if plan.new_run >= 0:
            keys[:, plan.new_run : plan.new_run + count] = key[0]
            values[:, plan.new_run : plan.new_run + count] = value[0]
        else:
            keys.index_copy_(1, plan.new_slots, key[0])
            values.index_copy_(1, plan.new_slots, value[0])
        kv_heads = keys.shape[0]
        group = query.shape[1] // kv_heads
        grouped = query.view(kv_heads, group, count, query.shape[3])
        out = query.new_empty(count, kv_heads, group, values.shape[2])
        for span in plan.spans:
            first = 0 if window is None else max(0, span.position - window + 1)
            end = span.position + span.length
            if span.slots is None:
                k = keys[:, span.base + first : span.base + end]
                v = values[:, span.base + first : span.base + end]
            else:
                slots = span.slots[first:end]
                k, v = keys.index_select(1, slots), values.index_select(1, slots)
            stop = span.start + span.length
            q = grouped[:, :, span.start : stop].reshape(kv_heads, group * span.length, -1)
            mask = None if span.length == 1 else self._mask(plan, span, first, window, group, query.dtype)
            if softcap is None and sinks is None and span.length > 1:
                result = functional.scaled_dot_product_attention(
                    q[None], k[None], v[None], attn_mask=mask, scale=scaling
                )[0]
            else:
                result = _plain(q, k, v, mask, scaling, softcap, sinks, group)
            out[span.start : stop] = result.view(kv_heads, group, span.length, -1).permute(2, 0, 1, 3)
        return out.view(1, count, kv_heads * group, -1)

    def _mask(
        self, plan: Plan, span: Span, first: int, window: int | None, group: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Additive, [group * length, keys]: causal, and inside the window where there is one."""
        name = (span.position - first, span.length, -1 if window is None else window)
        mask = plan.masks.get(name)
        if mask is None:
            here = torch.arange(span.position, span.position + span.length, device=self.device)[:, None]
            there = torch.arange(first, span.position + span.length, device=self.device)
            hidden = there > here
            if window is not None:
                hidden = hidden | (there <= here - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))
            mask = mask.repeat(group, 1)
            plan.masks[name] = mask
        return mask


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """q [kv_heads, group * n, d], k and v [kv_heads, L, d]: three matrix steps, cheaper than SDPA for one token."""
    scores = torch.bmm(q * scaling, k.transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        # A sink is one more score per head that takes weight away and has no value.
        column = sinks.view(k.shape[0], group, 1, 1).expand(-1, -1, q.shape[1] // group, 1)
        column = column.reshape(k.shape[0], q.shape[1], 1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return torch.bmm(weights.to(v.dtype), v)


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
