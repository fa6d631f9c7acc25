"""Fuzz target of the request parser: bytes in, a request or a RequestError that can be sent back out.

`python tests/fuzz/fuzz_requests.py [corpus folder]` runs it for as long as you like: coverage-guided where atheris is
installed, by mutation of honest bodies otherwise. `test_fuzz_requests.py` runs it for a bounded time with the tests.
"""

from __future__ import annotations

import itertools
import json
import random
import sys

from gridmill.network.gateway.requests import RequestError, parse_chat, parse_completion
from gridmill.wire.sampling import problem_with

BODIES = (
    {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    {
        "model": "m@12345678",
        "messages": [
            {"role": "developer", "content": "ö", "name": "ann"},
            {"role": "user", "content": [{"type": "text", "text": "\U0001f980"}]},
            {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"50256": -100, "7": 1.5},
        "stop": ["a", "\n\n"],
        "logprobs": True,
        "top_logprobs": 5,
        "n": 3,
        "temperature": 0.5,
        "seed": -(2**63),
        "metadata": {"a": "b"},
    },
    {"model": "m", "prompt": ["a", "b"], "logprobs": 5, "max_tokens": 4096, "stop_token_ids": [1, 2], "top_k": 40},
    {"model": "m", "prompt": [[1, 2], [3]], "min_p": 0.1, "repetition_penalty": 1.1, "cache_salt": "s"},
)
SEEDS = tuple(json.dumps(body).encode() for body in BODIES)
SPICES = (
    *(b"1e999", b"-0", b"NaN", b"9" * 5000, b"1e-400", b"true", b"null", b'"\\ud800"', b"\xff", b"\xed\xa0\x80"),
    *(b"[" * 3000, b'{"a":' * 3000, b'"' + b"x" * 3000 + b'"', b"[]", b"{}", b"18446744073709551616", b"\x00"),
)


def fuzz_requests(data: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            request = parse(data)
        except RequestError as error:
            json.dumps([error.message, error.param, error.code]).encode()
            error.message.encode()
            (error.param or "").encode()
            assert 0 < len(error.message) < 1000
            continue
        # What the parser lets through, only the class can still object to.
        problem = problem_with(request.sampling(bytes(32), request.max_tokens or 1 << 24), 1 << 32)
        assert problem is None, problem


def mutated(chance: random.Random) -> bytes:
    """An honest body with a few bytes changed, removed or repeated, or with something odd in the place of a value."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.randrange(1, 9)]
            case 2:
                data[at:at] = data[at : at + chance.randrange(1, 9)] * chance.randrange(1, 50)
            case 3:
                data[at:] = chance.choice(SEEDS)[at:]
            case 4:
                colon = data.find(b": ", at)
                end = min((i for i in (data.find(b",", colon), data.find(b"}", colon)) if i >= 0), default=-1)
                if 0 <= colon < end:
                    data[colon + 2 : end] = chance.choice(SPICES)
    return bytes(data)


def main() -> None:
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"atheris is not installed: mutating honest bodies, seed {seed}; Ctrl-C stops")
        chance = random.Random(seed)
        for count in itertools.count(1):
            fuzz_requests(mutated(chance))
            if count % 10_000 == 0:
                print(f"{count} inputs", flush=True)
    else:
        atheris.instrument_all()
        atheris.Setup(sys.argv, fuzz_requests)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
