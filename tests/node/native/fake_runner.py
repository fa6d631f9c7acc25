"""A runner that works without a model: logits are a hash of the ids that it reads back from its own pages.

A wrong page table, a page written by somebody else or a stale prefix therefore changes every id that follows.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from gridmill.node.engines.native.runner import Row
from gridmill.node.engines.native.sampler import SamplingState, choose
from gridmill.wire.classes import ModelClass, TextFacts, facts_bytes
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import Sampling, pack_ids, unpack_ids

VOCAB_SIZE = 32  # one 16-bit word of a BLAKE2b digest per id
EOS_ID = 31


def logits_after(ids: Sequence[int]) -> torch.Tensor:
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes()).digest()
    return torch.from_numpy(np.frombuffer(digest, dtype=np.uint16).astype(np.float32) / 16384.0)


class FakeRunner:
    """Stands where a Runner does. `fail` may raise for a batch; `gate` holds every forward pass back while cleared."""

    device = torch.device("cpu")
    vocab_size = VOCAB_SIZE

    def __init__(self, pages: int = 512, page_tokens: int = 4) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.fail: Callable[[Sequence[Row]], None] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []  # new ids per row of every forward pass
        self.closed = False
        self._stored = np.full(pages * page_tokens, -1, dtype=np.int64)

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        self.gate.wait()
        assert rows and not self.closed
        if self.fail is not None:
            self.fail(rows)
        size = self.page_tokens
        tables = []
        written: dict[int, int] = {}
        for number, row in enumerate(rows):
            assert row.ids and 0 <= row.logits <= len(row.ids)
            table = np.asarray(row.pages)
            slots = (table[:, None] * size + np.arange(size)).ravel()
            assert len(slots) >= row.position + len(row.ids), "the page table does not cover the row"
            tables.append(slots)
            for slot in slots[row.position : row.position + len(row.ids)]:
                assert written.setdefault(int(slot) // size, number) == number, "two rows write to one page"
        for number, slots in enumerate(tables):
            shared = set((slots // size).tolist()) & set(written)
            assert all(written[page] == number for page in shared), "a row writes to a page that another one reads"
        for row, slots in zip(rows, tables, strict=True):
            assert row.ids
            self._stored[slots[row.position : row.position + len(row.ids)]] = row.ids
        self.batches.append([len(row.ids or ()) for row in rows])
        logits = []
        for row, slots in zip(rows, tables, strict=True):
            end = row.position + len(row.ids or ())
            logits += [logits_after(self._stored[slots[:stop]]) for stop in range(end - row.logits + 1, end + 1)]
        return torch.stack(logits) if logits else torch.empty(0, VOCAB_SIZE)

    def close(self) -> None:
        self.closed = True


FACTS = TextFacts(
    chat_template=None, special_tokens={}, eos_token_ids=(EOS_ID,), context_tokens=512, vocab_size=VOCAB_SIZE
)
FAKE_CLASS = ModelClass(
    weights=(),
    arithmetic="float32-exact",
    kv_dtype="float32",
    sampler_version=1,
    tokenizer_sha256="0" * 64,
    text_facts_sha256=hashlib.sha256(facts_bytes(FACTS)).hexdigest(),
)


def work(
    number: int = 0,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 20,
    delivered: Sequence[int] = (),
    salt: bytes = b"",
    class_id: str = FAKE_CLASS.class_id,
    **sampling: object,
) -> Generate:
    """A Work of its own seed per number, that stops at no end-of-sequence id unless told so."""
    sampling.setdefault("ignore_eos", True)
    parameters = Sampling(seed=number.to_bytes(32, "little"), max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Generate(f"w{number}", class_id, pack_ids(prompt), parameters, salt, pack_ids(delivered))


def expected(generate: Generate) -> list[int]:
    """The output ids of this work, computed without pages, batches or engine; those already delivered left out."""
    prompt, delivered = unpack_ids(generate.prompt), unpack_ids(generate.delivered)
    sampling = generate.sampling
    state = SamplingState(sampling, prompt, delivered, (EOS_ID,), VOCAB_SIZE, "cpu")
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS_ID,))}
    ids = [*prompt, *delivered]
    while len(ids) - len(prompt) < min(sampling.max_tokens, FACTS.context_tokens - len(prompt)):
        (choice,) = choose(logits_after(ids)[None], [state])
        ids.append(choice.token_id)  # type: ignore[union-attr]
        state.accept(ids[-1])
        if ids[-1] in ends:
            break
    return ids[len(prompt) + len(delivered) :]
