"""Sampling parameters of one Work, and where its seed comes from (shared/sampler-v1: canonical sampler, version 1).

The gateway fixes the seed before dispatch, so that a node has nothing to grind and any other node can continue.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Iterable

import msgspec

SAMPLER_VERSION = 1
SEED_BYTES = 32
TOP_LOGPROBS_MAX = 20  # what OpenAI allows; also bounds what one id may weigh on the link
LOGIT_BIAS_ENTRIES_MAX = 1024  # OpenAI allows 300; room for a client that bans a word in all its spellings
STOP_TOKEN_IDS_MAX = 64  # more is a grammar, which is another parameter
GREEDY_BELOW_TEMPERATURE = 1e-5


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the ids of one Work are chosen. Defaults are 'off'; `seed` is S_i of the sampler page (32 bytes).

    `top_logprobs`: None reports no logprobs, 0 only those of the chosen ids, n the n best beside them.
    """

    seed: bytes
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-softmax of the untouched float32 logits: of the chosen id, and the top list by (logprob desc, id asc)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def problem_with(sampling: Sampling, vocab_size: int) -> str | None:
    """What is wrong with these parameters, in one sentence naming the parameter; None when they are usable.

    Both ends call it: the gateway to answer 400, the node because bytes from a network are outside too.
    """
    # Nearly all are fine, and four times in each request it is asked. What is no number passes no comparison.
    if (
        len(sampling.seed) == SEED_BYTES
        and 0 <= sampling.min_tokens <= sampling.max_tokens >= 1
        and 0.0 <= sampling.temperature <= 100.0
        and 0 <= sampling.top_k <= vocab_size
        and 0.0 < sampling.top_p <= 1.0
        and 0.0 <= sampling.min_p <= 1.0
        and 0.01 <= sampling.repetition_penalty <= 100.0
        and abs(sampling.presence_penalty) <= 100.0
        and abs(sampling.frequency_penalty) <= 100.0
        and not sampling.logit_bias
        and not sampling.stop_token_ids
        and (sampling.top_logprobs is None or 0 <= sampling.top_logprobs <= TOP_LOGPROBS_MAX)
    ):
        return None
    finite = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    for name, value in finite.items():
        if not math.isfinite(value):
            return f"{name} must be a finite number"
    checks = [
        (len(sampling.seed) == SEED_BYTES, f"seed must be {SEED_BYTES} bytes"),
        (sampling.max_tokens >= 1, "max_tokens must be at least 1"),
        (0.0 <= sampling.temperature <= 100.0, "temperature must be between 0 and 100"),
        (0 <= sampling.top_k <= vocab_size, f"top_k must be between 0 (off) and the vocabulary size, {vocab_size}"),
        (0.0 < sampling.top_p <= 1.0, "top_p must be above 0 and at most 1"),
        (0.0 <= sampling.min_p <= 1.0, "min_p must be between 0 and 1"),
        (0.01 <= sampling.repetition_penalty <= 100.0, "repetition_penalty must be between 0.01 and 100"),
        (abs(sampling.presence_penalty) <= 100.0, "presence_penalty must be between -100 and 100"),
        (abs(sampling.frequency_penalty) <= 100.0, "frequency_penalty must be between -100 and 100"),
        (0 <= sampling.min_tokens <= sampling.max_tokens, "min_tokens must be between 0 and max_tokens"),
        (len(sampling.logit_bias) <= LOGIT_BIAS_ENTRIES_MAX, f"logit_bias holds over {LOGIT_BIAS_ENTRIES_MAX} entries"),
        (len(sampling.stop_token_ids) <= STOP_TOKEN_IDS_MAX, f"stop_token_ids holds over {STOP_TOKEN_IDS_MAX} ids"),
        (
            all(0 <= token_id < vocab_size and abs(bias) <= 1e30 for token_id, bias in sampling.logit_bias),
            f"logit_bias needs token ids below {vocab_size} and finite numbers",
        ),
        (
            all(0 <= token_id < vocab_size for token_id in sampling.stop_token_ids),
            f"stop_token_ids must lie below the vocabulary size, {vocab_size}",
        ),
        (
            sampling.top_logprobs is None or 0 <= sampling.top_logprobs <= TOP_LOGPROBS_MAX,
            f"top_logprobs must be between 0 and {TOP_LOGPROBS_MAX}",
        ),
    ]
    return next((sentence for fine, sentence in checks if not fine), None)


def base_seed(client_seed: int | None, gateway_secret: bytes, request_id: str) -> bytes:
    """S of the sampler page: from the client's `seed` (int64) when given, else private to this gateway."""
    if client_seed is not None:
        return hashlib.sha256(b"gridmill-seed-v1" + struct.pack("<q", client_seed)).digest()
    return hmac.new(gateway_secret, request_id.encode(), hashlib.sha256).digest()


def choice_seed(base: bytes, choice: int) -> bytes:
    """S_i of the sampler page, for choice `i` of `n` (also for n = 1)."""
    return hashlib.sha256(base + struct.pack("<I", choice)).digest()


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as they travel and are hashed: uint32 little-endian, no header."""
    values = ids if isinstance(ids, (list, tuple)) else list(ids)
    return struct.pack(f"<{len(values)}I", *values)


def unpack_ids(packed: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises ValueError when the length is no multiple of four."""
    if len(packed) % 4:
        raise ValueError(f"packed ids must be a multiple of 4 bytes, not {len(packed)}")
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))
