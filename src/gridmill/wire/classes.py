"""Model classes: two nodes are interchangeable only within one class.

class_id = SHA-256 over the canonical JSON of everything that decides which ids come out: the digests of the weights,
the arithmetic, the KV dtype, the sampler version, and the hashes of the two text files the gateway itself uses. A node
cannot lie about a class without changing its id, and the network can check the files it is sent against the id alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any, NewType

import msgspec

ClassId = NewType("ClassId", str)
CLASS_ID_SHORT = 8  # `NAME@CLASS8` in requests, and what people read in tables

ARITHMETICS = ("float32-exact", "float32", "bfloat16", "float16", "echo")
TOKENIZER_BYTES_MAX = 64 << 20  # the largest public tokenizer.json (262 000 entries) is 33 MB
TEXT_FACTS_BYTES_MAX = 1 << 20  # the longest public chat template is under 60 kB


class FileDigest(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One file of the weights manifest, by name relative to the model's folder. `sha256` is lower-case hex."""

    name: str
    sha256: str
    size_bytes: int


class ModelClass(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the ids. `weights` is sorted by name and holds *.safetensors, their index and the config files."""

    weights: tuple[FileDigest, ...]
    arithmetic: str
    kv_dtype: str
    sampler_version: int
    tokenizer_sha256: str
    text_facts_sha256: str
    blackbox: str = ""

    @property
    def class_id(self) -> ClassId:
        return class_id_of(self)


class TextFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway must know beside tokenizer.json; its canonical JSON is a file that a node hands out.

    Design §5 calls its digest the template hash. End ids and context length are inside so that nobody can vary them
    within a class. `special_tokens` are what a template may name: bos_token, eos_token, pad_token, unk_token.
    """

    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    context_tokens: int
    vocab_size: int
    toy: bool = False


def canonical_json(value: Any) -> bytes:
    """One byte string per value: keys sorted, no spaces, UTF-8, no NaN."""
    plain = msgspec.to_builtins(value)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@functools.lru_cache(maxsize=256)  # engines ask it for every work
def class_id_of(model_class: ModelClass) -> ClassId:
    if list(model_class.weights) != sorted(model_class.weights):
        raise ValueError("the weights manifest must be sorted by file name")
    return ClassId(hashlib.sha256(b"gridmill-class-v1\0" + canonical_json(model_class)).hexdigest())


def facts_bytes(facts: TextFacts) -> bytes:
    return canonical_json(facts)


def parse_facts(raw: bytes) -> TextFacts:
    """Raises ValueError (msgspec.ValidationError) on anything that is not exactly a TextFacts."""
    if len(raw) > TEXT_FACTS_BYTES_MAX:
        raise ValueError(f"text facts are over {TEXT_FACTS_BYTES_MAX} bytes")
    facts = msgspec.json.decode(raw, type=TextFacts)
    if not 1 <= facts.context_tokens <= 1 << 24 or not 1 <= facts.vocab_size <= 1 << 22:
        raise ValueError("text facts hold an absurd context length or vocabulary size")
    if any(not 0 <= token_id < facts.vocab_size for token_id in facts.eos_token_ids):
        raise ValueError("an end-of-sequence id lies outside the vocabulary")
    return facts
