"""The canonical sampler, version 1, a second time: plain Python, written from the page, slow, sharing no code.

Rules: nothing but struct, math and hashlib; float32 is a Python float that went through `f32`. For + - * / of two
float32 that is exact (a float64 result rounds to the same float32). A float32 softmax is exact only up to the order of
its sum, so `choose` also says whether its answer would survive a slightly different rounding; vectors keep what does.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field

# How far another correct implementation may be off: its float32 sums over 150 000 ids, its exp, 1 ulp of its noise.
TOP_P_SLACK = 1e-4
MIN_P_SLACK = 1e-5
SCORE_SLACK = 2e-5


@dataclass(frozen=True)
class Parameters:
    seed: bytes
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    allowed_modulus: tuple[int, int] | None = None  # a toy grammar: (m, r) allows the ids v with v % m < r


@dataclass(frozen=True)
class Answer:
    token_id: int
    margin: float
    sturdy: bool  # the same id within the slacks above


def f32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c, k = list(counter), list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high_0, low_0 = divmod(0xD2511F53 * c[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
    return tuple(c)


class Noise:
    """g of one (seed, position); remembers the last Philox block, which four neighbouring ids share."""

    def __init__(self, seed: bytes, position: int) -> None:
        self.key = (int.from_bytes(seed[0:4], "little"), int.from_bytes(seed[4:8], "little"))
        self.position = position
        self.block: tuple[int, tuple[int, ...]] = (-1, ())

    def of(self, token_id: int) -> float:
        number = token_id >> 2
        if self.block[0] != number:
            self.block = (number, philox4x32_10((self.position, number, 0, 0), self.key))
        u = (self.block[1][token_id & 3] + 0.5) / 2**32
        return f32(-math.log(-math.log(u)))


def adjusted(z: list[float], prompt_ids: list[int], output_ids: list[int], p: Parameters) -> list[float]:
    """Steps 1 to 5."""
    z = list(z)
    for v, bias in p.logit_bias.items():
        z[v] = f32(z[v] + f32(bias))
    if p.repetition_penalty != 1.0:
        r = f32(p.repetition_penalty)
        for v in set(prompt_ids) | set(output_ids):
            z[v] = f32(z[v] / r) if z[v] > 0 else f32(z[v] * r)
    if p.presence_penalty or p.frequency_penalty:
        for v in set(output_ids):
            z[v] = f32(z[v] - f32(p.presence_penalty + p.frequency_penalty * output_ids.count(v)))
    banned: set[int] = set(p.eos_ids) if p.ignore_eos else set()
    if len(output_ids) < p.min_tokens:
        banned |= set(p.eos_ids) | set(p.stop_token_ids)
    for v in banned:
        z[v] = -math.inf
    if p.allowed_modulus is not None:
        m, r_allowed = p.allowed_modulus
        z = [value if v % m < r_allowed else -math.inf for v, value in enumerate(z)]
    return z


def kept_ids(x: list[float], p: Parameters, top_p_shift: float = 0.0, min_p_shift: float = 0.0) -> list[int]:
    """Steps 7 to 9. Shifting both limits a little shows whether the answer hangs on a rounding."""
    kept = [v for v in range(len(x)) if x[v] > -math.inf]
    top = max(x)
    if 0 < p.top_k < len(kept):
        cut = sorted((x[v] for v in kept), reverse=True)[p.top_k - 1]
        kept = [v for v in kept if x[v] >= cut]
    if p.top_p < 1.0:
        weights = {v: f32(math.exp(f32(x[v] - top))) for v in kept}
        total = f32(math.fsum(weights.values()))
        prefix, reached = [], 0.0
        for v in sorted(kept, key=lambda v: (-x[v], v)):
            prefix.append(v)
            reached += f32(weights[v] / total)
            if reached >= p.top_p + top_p_shift:
                break
        kept = prefix
    if p.min_p > 0.0:
        floor = f32(top + f32(math.log(p.min_p)))
        floor += min_p_shift if p.min_p < 1.0 else 0.0  # ln 1 leaves nothing to round
        kept = [v for v in kept if x[v] >= floor]
    return sorted(kept)


def choose(z: list[float], prompt_ids: list[int], output_ids: list[int], p: Parameters) -> Answer:
    """`z` holds float32 values. The position is the number of output ids."""
    z = adjusted(z, prompt_ids, output_ids, p)
    if p.temperature < 1e-5:
        best = max(z)
        rest = sorted(z, reverse=True)[1:2] or [-math.inf]
        return Answer(z.index(best), best - rest[0], sturdy=True)
    t = f32(p.temperature)
    x = [f32(value / t) for value in z]
    noise = Noise(p.seed, len(output_ids))

    def outcome(ids: list[int]) -> tuple[int, float]:
        scores = sorted(((-f32(x[v] + noise.of(v)), v) for v in ids), key=lambda pair: pair)[:2]
        return scores[0][1], scores[1][0] - scores[0][0] if len(scores) == 2 else math.inf

    kept = kept_ids(x, p)
    token_id, margin = outcome(kept)
    sturdy = margin > SCORE_SLACK
    if sturdy and (p.top_p < 1.0 or p.min_p > 0.0):
        for sign in (-1.0, 1.0):
            others = kept_ids(x, p, sign * TOP_P_SLACK, sign * MIN_P_SLACK)
            sturdy = sturdy and (others == kept or (bool(others) and outcome(others)[0] == token_id))
    return Answer(token_id, margin, sturdy)


def recipe_logits(label: str, vocab_size: int, shift: int, coarse: bool = False) -> list[float]:
    """Logits that anybody can rebuild: id v takes the 8 bytes at 8·(v % 4) of SHA-256("label/" ‖ v // 4 in decimal).

    The sum of the first four bytes makes it bell-shaped (standard deviation 148 / 2**shift), the low 12 bits of the
    last four (little-endian) break ties unless `coarse`. Exact in float32.
    """
    logits: list[float] = []
    for quad in range((vocab_size + 3) // 4):
        digest = hashlib.sha256(f"{label}/{quad}".encode()).digest()
        for at in range(0, 32, 8):
            fine = 0 if coarse else int.from_bytes(digest[at + 4 : at + 8], "little") % 4096
            logits.append(((sum(digest[at : at + 4]) - 510) * 4096 + fine) / 2.0 ** (12 + shift))
    return logits[:vocab_size]
