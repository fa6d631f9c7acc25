"""What every engine checks before it begins a Work, said once.

Bytes from a network are from outside, so the gateway's own checks are repeated here with the same sentences.
An engine calls this before its first `await`, so that the agent can answer Refuse instead of Accept.
"""

from __future__ import annotations

from gridmill.node.engines.base import Refused, Served
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import problem_with, unpack_ids

CACHE_SALT_BYTES_MAX = 64  # a salt only separates callers; a SHA-512 fits


def refusal(work: Generate, served: Served) -> Refused | None:
    """Why `work` cannot be begun by an engine that serves `served`; None when it can."""
    facts = served.facts
    if work.class_id != served.model_class.class_id:
        return Refused("node", "wrong_class", f"this node does not serve class {work.class_id[:16]}")
    problem = problem_with(work.sampling, facts.vocab_size)
    if problem is not None:
        return Refused("caller", "invalid_parameter", problem)
    if len(work.cache_salt) > CACHE_SALT_BYTES_MAX:
        return Refused("caller", "invalid_parameter", f"cache_salt is over {CACHE_SALT_BYTES_MAX} bytes")
    try:
        prompt, delivered = unpack_ids(work.prompt), unpack_ids(work.delivered)
    except ValueError as error:
        return Refused("caller", "invalid_ids", str(error))
    if not prompt:
        return Refused("caller", "empty_prompt", "the prompt holds no token ids")
    if max(prompt) >= facts.vocab_size or (delivered and max(delivered) >= facts.vocab_size):
        return Refused("caller", "invalid_ids", f"token ids must lie below the vocabulary size, {facts.vocab_size}")
    if len(prompt) >= facts.context_tokens:
        sentence = f"the prompt is {len(prompt)} tokens; this model holds {facts.context_tokens}, the answer included"
        return Refused("caller", "context_length_exceeded", sentence)
    if len(delivered) > output_limit(work, served, len(prompt)):
        return Refused("caller", "invalid_ids", "more ids were delivered than the work allows")
    return None


def output_limit(work: Generate, served: Served, prompt_length: int) -> int:
    """How many output ids this work may have, delivered ones included: max_tokens, or what the context leaves."""
    return min(work.sampling.max_tokens, served.facts.context_tokens - prompt_length)


def already_ended(work: Generate, served: Served, prompt_length: int, delivered: list[int]) -> str | None:
    """`stop` or `length` when the delivered ids already end the work, so that nothing is left to produce."""
    sampling = work.sampling
    if delivered and len(delivered) > sampling.min_tokens:
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends.update(served.facts.eos_token_ids)
        if delivered[-1] in ends:
            return "stop"
    return "length" if len(delivered) >= output_limit(work, served, prompt_length) else None
