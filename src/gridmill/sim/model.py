"""The one model of the simulation, and what an uninterrupted answer of it is.

`ids_of` says again, in a few lines of its own, what the echo engine does: an oracle must not ask whom it judges.
"""

from __future__ import annotations

import hashlib
import json

from gridmill.node.engines.base import Served
from gridmill.wire.classes import ModelClass, TextFacts, facts_bytes
from gridmill.wire.messages import Generate

VOCABULARY = 512
END_ID = 1
FACTS = TextFacts(
    chat_template=None,
    special_tokens={},
    eos_token_ids=(END_ID,),
    context_tokens=4096,
    vocab_size=VOCABULARY,
    toy=True,
)
TOKENIZER = json.dumps({"model": {"vocab": {str(n): n for n in range(VOCABULARY)}}}).encode()
MODEL_CLASS = ModelClass(
    weights=(),
    arithmetic="echo",
    kv_dtype="none",
    sampler_version=1,
    tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
    text_facts_sha256=hashlib.sha256(facts_bytes(FACTS)).hexdigest(),
)
CLASS_ID = MODEL_CLASS.class_id
MODEL_NAME = "simulated"
SERVED = Served(
    MODEL_NAME,
    MODEL_CLASS,
    FACTS,
    {MODEL_CLASS.tokenizer_sha256: TOKENIZER, MODEL_CLASS.text_facts_sha256: facts_bytes(FACTS)},
)
ORDINARY = [n for n in range(VOCABULARY) if n != END_ID]


def ids_of(work: Generate) -> tuple[list[int], str]:
    """All ids of an answer that nothing interrupts, and how it ends. `min_tokens` is not part of the simulation."""
    sampling = work.sampling
    seed = b"" if sampling.greedy else sampling.seed
    state = hashlib.sha256(b"gridmill-echo-v1\0" + seed + b"\0" + work.prompt).digest()
    ids: list[int] = []
    while len(ids) < min(sampling.max_tokens, FACTS.context_tokens - len(work.prompt) // 4):
        token_id = ORDINARY[int.from_bytes(state[:8], "little") % len(ORDINARY)]
        ids.append(token_id)
        if token_id in sampling.stop_token_ids:
            return ids, "stop"
        state = hashlib.sha256(state + token_id.to_bytes(4, "little")).digest()
    return ids, "length"
