"""Rows in, logits out: one forward pass over the new tokens of any number of sessions.

1. All new tokens of all rows are one flat sequence with its own positions, so nothing is padded and rows of any length,
   prefill or decode, mix freely. Only attention knows where one row ends (pool.py).
2. The runner keeps no sessions. What a row's past is, its page table says; who owns pages, the engine says.
3. Nothing is trusted at load: a probe of one token finds the shapes and shows whether the model gives finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch.nn import functional

from gridmill.node.engines.native.experts import EXPERTS
from gridmill.node.engines.native.packing import pack_linears
from gridmill.node.engines.native.pool import ATTENTION, LayerShape, Pool, Recipe, choose_recipe
from gridmill.node.engines.native.slice import ModelUnsupported, Progress, Slice, Stub, load_slice, read_config

FLOAT32_BYTES_MAX = 2 << 30  # `auto` on a CPU computes models up to this size in float32, larger ones as stored
KV_FRACTION_CPU, KV_FRACTION_CUDA = 0.25, 0.85  # of what is free once the weights are loaded
KV_BYTES_MAX_CPU = 4 << 30  # 64 long conversations of a small model; a CPU serves no more at a useful speed
TILES = (4, 8, 16, 32, 64, 128)  # exact mode: batch sizes to try; all that agree bit by bit on this machine are used
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Row:
    """One session's contribution to a forward pass."""

    position: int  # sequence position of the first new token
    pages: Sequence[int]  # page table of the sequence; covers position + new tokens
    ids: Sequence[int] | None  # new token ids (first stage) …
    hidden: torch.Tensor | None = None  # … or hidden states [n, hidden_size] (later stages)
    logits: int = 0  # for how many of the LAST new positions logits are wanted


class Runner:
    """Layers [first, stop) of the model in `folder`, with the KV pages of every session that runs on them."""

    def __init__(
        self,
        folder: Path,
        *,
        layers: tuple[int, int] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        exact: bool = False,
        kv_bytes: int | None = None,
        kv_pages: int | None = None,
        kv_tokens_useful: int | None = None,
        page_tokens: int = 16,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Raises ModelUnsupported. `kv_pages` wins over `kv_bytes`; without either, a part of the free memory, but no
        more than holds `kv_tokens_useful` tokens: what all sessions together can ever fill.
        """
        config = read_config(folder, trust_remote_code=trust_remote_code)
        self.device = _device(device)
        self.dtype = _dtype(dtype, config, folder, self.device, exact=exact)
        self.exact = exact
        self._slice = load_slice(
            folder,
            config=config,
            layers=layers or (0, config.num_hidden_layers),
            dtype=self.dtype,
            attention=ATTENTION,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        self._prepare(kv_bytes, kv_pages, page_tokens, kv_tokens_useful)

    @classmethod
    def from_slice(
        cls, part: Slice, *, dtype: torch.dtype, device: torch.device, exact: bool, kv_pages: int, page_tokens: int
    ) -> Runner:
        """A runner over a slice built in memory: the twin of the admission test."""
        runner = cls.__new__(cls)
        runner.device, runner.dtype, runner.exact, runner._slice = device, dtype, exact, part
        runner._prepare(None, kv_pages, page_tokens)
        return runner

    def _prepare(
        self, kv_bytes: int | None, kv_pages: int | None, page_tokens: int, kv_tokens_useful: int | None = None
    ) -> None:
        part = self._slice
        part.causal.to(self.device)
        part.core.to(self.device)
        self.layers = part.layers
        self.num_layers_total = part.num_layers_total
        self.is_first, self.is_last = part.is_first, part.is_last
        self.vocab_size: int = part.config.vocab_size
        self.hidden_size: int = part.config.hidden_size
        self.page_tokens = page_tokens
        self.arithmetic = "float32-exact" if self.exact else str(self.dtype).removeprefix("torch.")
        self._threads = torch.get_num_threads()
        self._stub = next((child for child in part.causal.children() if isinstance(child, Stub)), None)
        self._given: torch.Tensor | None = None  # the hidden states that replace the embeddings of a later stage
        if not self.is_first:
            part.core.layers[0].register_forward_pre_hook(self._hand_over, with_kwargs=True)
        modules = [*part.core.modules(), *part.causal.modules()]
        if self.device.type == "cpu":
            pack_linears(modules, exact=self.exact)
        if self.exact:
            torch.backends.cuda.matmul.allow_tf32 = False
            for module in modules:
                if hasattr(module, "is_concatenated") and hasattr(module, "has_post_expert_norm"):
                    module.config._experts_implementation = EXPERTS
        shapes = self._probe()
        element_bytes = torch.empty(0, dtype=self.dtype).element_size()
        self.kv_bytes_per_page = (
            page_tokens * element_bytes * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes)
        )
        if kv_pages is None:
            if kv_bytes is None:
                kv_bytes = _free_bytes(self.device)
                if kv_tokens_useful is not None:
                    kv_bytes = min(kv_bytes, -(-kv_tokens_useful // page_tokens) * self.kv_bytes_per_page)
            kv_pages = kv_bytes // self.kv_bytes_per_page
        if kv_pages < 1:
            raise ModelUnsupported(
                f"the memory given to the KV cache holds no page of {self.kv_bytes_per_page} bytes: give it more."
            )
        self.pages = kv_pages
        recipe = choose_recipe(shapes, self.device) if self.exact else Recipe.FAST
        self._use(
            Pool(
                shapes,
                pages=kv_pages,
                page_tokens=page_tokens,
                dtype=self.dtype,
                device=self.device,
                recipe=recipe,
            )
        )
        self._tiles: tuple[int, ...] = ()
        self.exact_holds = False
        if self.exact:
            self._choose_tiles(shapes)

    def _use(self, pool: Pool) -> None:
        self._pool = pool
        for number, layer in enumerate(self._slice.core.layers):
            for module in layer.modules():
                if hasattr(module, "gridmill_attend"):
                    module.gridmill_attend = _Attend(pool, number)

    def _choose_tiles(self, shapes: list[LayerShape]) -> None:
        """Keeps the batch sizes that give the same bits at every place, and says in `exact_holds` whether any does.

        The real weights see one random sequence token by token, then four copies of it at once, so that the largest
        batch holds it at every place. Kernels are chosen by shape and not by content, so agreement over thousands of
        numbers leaves little room for chance.
        """
        real, copies = self._pool, 4
        count, generator = max(TILES) // copies, torch.Generator().manual_seed(0)
        held = -(-count // self.page_tokens)
        tables = [list(range(copy * held, (copy + 1) * held)) for copy in range(copies)]
        if self.is_first:
            ids = torch.randint(self.vocab_size, (count,), generator=generator).tolist()
            rows = [Row(0, table, ids, logits=count) for table in tables]
        else:
            states = torch.randn(count, self.hidden_size, generator=generator)
            rows = [Row(0, table, None, hidden=states, logits=count) for table in tables]
        self._use(
            Pool(
                shapes,
                pages=copies * held,
                page_tokens=self.page_tokens,
                dtype=self.dtype,
                device=self.device,
                recipe=real.recipe,
            )
        )
        try:
            kept: list[int] = []
            for size in TILES:
                self._tiles = (size,)
                if not kept:
                    reference = torch.cat([self.forward([_cut_row(rows[0], i, 1)]) for i in range(count)])
                together = self.forward(rows)
                if all(torch.equal(part, reference) for part in together.split(count)):
                    kept.append(size)
            self.exact_holds = bool(kept)
            self._tiles = tuple(kept) or (max(TILES),)
        finally:
            self._use(real)

    def _hand_over(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the first layer of a later stage exactly the states that came in.

        Some families scale or normalise embeddings inside their forward; that happened on the first stage already.
        """
        if args:
            return (self._given, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._given}

    def _probe(self) -> list[LayerShape]:
        """The shape of every layer's attention, found by letting one token through."""
        found: dict[int, LayerShape] = {}

        def record(number: int) -> Any:
            def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
                found[number] = LayerShape(query.shape[1], key.shape[1], key.shape[3], value.shape[3])
                return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)

            return attend

        core, kind = self._slice.core, self._slice.config.model_type
        for number, layer in enumerate(core.layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx") and hasattr(module, "config"):
                    module.gridmill_attend = record(number)
        hidden = torch.ones(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        try:
            with torch.inference_mode():
                out = self._core(torch.zeros(1, 1, dtype=torch.long, device=self.device), hidden, [0])
                if self._stub is not None:
                    self._stub.output_type = self._output_type
                if self.is_last:
                    out = self._head(out[0])
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            raise ModelUnsupported(
                f"{kind} does not run token by token here ({type(error).__name__}: {error})."
            ) from error
        if len(found) != len(core.layers):
            raise ModelUnsupported(f"{kind} has layers without plain attention, which cannot be paged yet.")
        if not bool(torch.isfinite(out).all()):
            raise ModelUnsupported("the model answers with NaN or infinity: its weights or its config are damaged.")
        return [found[number] for number in range(len(core.layers))]

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Last stage: float32 logits [sum(row.logits), vocab_size] in row order; else hidden states [sum(n), hidden].

        Raises ValueError for rows that contradict themselves, their page table or this stage.
        """
        if not rows:
            raise ValueError("a forward pass needs at least one row")
        lengths = [self._length(row) for row in rows]
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # exact mode was checked with this number
        with torch.inference_mode():
            if self.exact:
                return self._forward_in_tiles(rows, lengths)
            out = self._forward_flat(rows, lengths, sum(lengths))
            if not self.is_last:
                return out
            wanted: list[int] = []
            stop = 0
            for row, length in zip(rows, lengths, strict=True):
                stop += length
                wanted.extend(range(stop - row.logits, stop))
            if not wanted:
                return torch.empty(0, self.vocab_size)
            if len(wanted) < len(out):
                out = out.index_select(0, torch.tensor(wanted, device=self.device))
            return self._head(out)

    def _forward_in_tiles(self, rows: Sequence[Row], lengths: list[int]) -> torch.Tensor:
        """The new tokens in batches of sizes known to give the same bits, each through all layers before the next.

        A row that spans two batches finds its earlier tokens in the pages, as in any chunked prefill.
        """
        largest = self._tiles[-1]
        pieces: list[torch.Tensor] = []
        wanted: list[torch.Tensor] = []
        batch: list[Row] = []
        sizes: list[int] = []
        room = largest
        last = len(rows) - 1
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            done = 0
            while done < length:
                size = min(room, length - done)
                batch.append(row if size == length else _cut_row(row, done, size))
                sizes.append(size)
                room -= size
                done += size
                if room and not (number == last and done == length):
                    continue
                total = largest - room
                out = self._forward_flat(batch, sizes, self._tile(total))
                pieces.append(out[:total])
                batch, sizes, room = [], [], largest
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if not self.is_last:
            return out
        stop = 0
        for row, length in zip(rows, lengths, strict=True):
            stop += length
            if row.logits:
                wanted.append(out[stop - row.logits : stop])
        if not wanted:
            return torch.empty(0, self.vocab_size)
        states = torch.cat(wanted)
        heads: list[torch.Tensor] = []
        for low in range(0, len(states), largest):
            some = states[low : low + largest]
            tile = self._tile(len(some))
            if tile > len(some):
                padded = functional.pad(some, (0, 0, 0, tile - len(some)))
                heads.append(self._head(padded)[: len(some)])
            else:
                heads.append(self._head(some))
        return heads[0] if len(heads) == 1 else torch.cat(heads)

    def _tile(self, count: int) -> int:
        return next(size for size in self._tiles if size >= count)

    def _forward_flat(self, rows: Sequence[Row], lengths: list[int], tile: int) -> torch.Tensor:
        """One pass of the core over all new tokens, padded to `tile` of them → [tile, hidden_size]."""
        padding = tile - sum(lengths)
        positions: list[int] = []
        for row, length in zip(rows, lengths, strict=True):
            positions.extend(range(row.position, row.position + length))
        positions.extend([0] * padding)
        ids = hidden = None
        if self.is_first:
            flat: list[int] = []
            for row in rows:
                flat.extend(cast(Sequence[int], row.ids))
            if min(flat) < 0 or max(flat) >= self.vocab_size:
                raise ValueError(f"a token id lies outside 0:{self.vocab_size}")
            flat.extend([0] * padding)
            ids = torch.tensor([flat], device=self.device)
        else:
            given = [cast(torch.Tensor, row.hidden).to(self.device, self.dtype) for row in rows]
            hidden = given[0] if len(given) == 1 else torch.cat(given)
            hidden = functional.pad(hidden, (0, 0, 0, padding))[None]
        self._pool.plan = self._pool.layout([row.position for row in rows], lengths, [row.pages for row in rows])
        try:
            return self._core(ids, hidden, positions)[0]
        finally:
            self._pool.plan = None

    def _core(self, ids: torch.Tensor | None, hidden: torch.Tensor | None, positions: list[int]) -> torch.Tensor:
        """[1, N, hidden_size]"""
        where = torch.tensor([positions], device=self.device)
        self._given = hidden
        try:
            what = {"input_ids": ids} if self.is_first else {"inputs_embeds": hidden}
            out = self._slice.core(**what, position_ids=where, use_cache=False)
        finally:
            self._given = None
        self._output_type = type(out)
        return cast(torch.Tensor, out.last_hidden_state)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] → float32 [n, vocab_size], through the model's own CausalLM.forward."""
        assert self._stub is not None
        self._stub.hidden = hidden[None]
        try:
            return cast(torch.Tensor, self._slice.causal(inputs_embeds=hidden[None], use_cache=False).logits[0].float())
        finally:
            self._stub.hidden = None

    def _length(self, row: Row) -> int:
        """How many new tokens a row brings. Raises ValueError when it brings the wrong thing."""
        if self.is_first:
            if row.ids is None:
                raise ValueError("the first stage needs token ids")
            length = len(row.ids)
        else:
            if row.hidden is None or row.hidden.dim() != 2 or row.hidden.shape[1] != self.hidden_size:
                raise ValueError(f"this stage needs hidden states of shape [n, {self.hidden_size}]")
            length = row.hidden.shape[0]
        if length < 1 or not 0 <= row.logits <= length:
            raise ValueError(f"a row of {length} new tokens cannot give {row.logits} logits")
        return length

    def close(self) -> None:
        """Frees weights and pages. Safe to call twice."""
        for name in ("_slice", "_pool", "_stub"):
            if hasattr(self, name):
                delattr(self, name)


def _cut_row(row: Row, start: int, size: int) -> Row:
    """Part of a row's new tokens. All of them get logits if the whole row's do; else the caller picks them."""
    return replace(
        row,
        logits=min(row.logits, size),
        position=row.position + start,
        ids=None if row.ids is None else row.ids[start : start + size],
        hidden=None if row.hidden is None else row.hidden[start : start + size],
    )


class _Attend:
    """What an attention module holds of us: not a closure, so that a profile names it."""

    __slots__ = ("layer", "pool")

    def __init__(self, pool: Pool, layer: int) -> None:
        self.pool = pool
        self.layer = layer

    def __call__(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.pool.attend(self.layer, *tensors, **options)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")  # AMD's ROCm build answers to the same name
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    return torch.device(name)


def _dtype(name: str, config: Any, folder: Path, device: torch.device, *, exact: bool) -> torch.dtype:
    if exact:
        if name not in ("auto", "float32"):
            raise ModelUnsupported(f"exact mode computes in float32: leave dtype at auto instead of {name}.")
        return torch.float32
    if name != "auto":
        if name not in DTYPES:
            raise ModelUnsupported(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}.")
        return DTYPES[name]
    stored = getattr(config, "dtype", None)
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if stored is torch.float32 and torch.cuda.is_bf16_supported() else stored
    stored_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    per_parameter = torch.empty(0, dtype=stored).element_size()
    return torch.float32 if stored_bytes // per_parameter * 4 < FLOAT32_BYTES_MAX else stored


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * KV_FRACTION_CUDA)
    return min(int(psutil.virtual_memory().available * KV_FRACTION_CPU), KV_BYTES_MAX_CPU)
