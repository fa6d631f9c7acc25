"""The canonical sampler, version 1: logits in, one id per row out, the same on every machine that runs it.

Three rules. A row is computed as if it were alone: no reduction runs across rows, so batching cannot change an id.
Estimates only ever shorten the list of candidates; whoever wins was compared in exactly the arithmetic of the page.
What comes from the parameters alone (T, r, p + f·count, ln min_p) is computed in float64 and rounded to float32 once,
when it meets a logit.

On a CPU the rows go through numpy (its sort, argmax and integer loops are 2 to 30 times faster than torch's there), as
many side by side as stay in a core's cache: with a small vocabulary the calls cost more than the numbers. On an
accelerator they all go through torch together, because there the launches are what costs.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gridmill.wire.sampling import Sampling, TokenLogprob

GUMBEL_MAX = 22.88  # -ln(-ln u) for the largest u, (2³² - 0.5)/2³², is 22.8738
WORD_MASK = 0xFFFFFFFF
CEILING = np.array([-math.inf, math.inf], np.float32)
BLOCKS_AT_ONCE = 16_384  # Philox counters: its arrays of 256 kB stay in a core's cache
PRUNE_FROM_VOCABULARY = 8_192  # for fewer ids, noise for all costs less than finding out who needs none
# Arrays of no dimension: numpy takes them twice as fast as numbers.
MULTIPLIER_0, MULTIPLIER_1 = np.array(0xD2511F53, np.uint64), np.array(0xCD9E8D57, np.uint64)
WORD_BITS, WORD_MASK_ARRAY = np.array(32, np.uint64), np.array(WORD_MASK, np.uint64)
# What each of Philox's ten rounds adds to the two halves of a key.
KEY_STEPS = np.array([[(i * 0x9E3779B9) & WORD_MASK, (i * 0xBB67AE85) & WORD_MASK] for i in range(10)], np.uint64)

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Number = TypeVar("Number", bound=np.generic)
Lanes = Any  # a Python int, a numpy uint64 array or a torch int64 tensor: Philox is written in what they share


class Choice(NamedTuple):
    """`margin`: the winner's compared value minus the runner-up's (inf without one); None when it was not asked for."""

    token_id: int
    logprob: TokenLogprob | None = None
    margin: float | None = None


class UnusableLogits(Exception):
    """This row has no id to choose: NaN or +inf among its logits, or every id banned. Other rows are not concerned."""


def choose(
    logits: torch.Tensor, states: Sequence[SamplingState], *, margins: bool = False
) -> list[Choice | UnusableLogits]:
    """The next id of each row. `logits` is [rows, vocabulary], any float dtype, and is not modified.

    Row i belongs to `states[i]`, which is read and not advanced: call its `accept` with the id that was kept. A row
    that cannot be sampled gets an UnusableLogits in its place, not raised. Raises ValueError when shapes disagree.
    """
    if logits.ndim != 2 or logits.shape[0] != len(states):
        raise ValueError(f"{len(states)} sampling states need [{len(states)}, V] logits, not {list(logits.shape)}")
    for state in states:
        if state.vocab_size != logits.shape[1]:
            raise ValueError(f"a state for {state.vocab_size} ids was given a row of {logits.shape[1]} logits")
    rows = logits.detach().to(torch.float32)
    if logits.device.type == "cpu":
        rows_at_once = max(1, 4 * BLOCKS_AT_ONCE // max(1, rows.shape[1]))
        choices: list[Choice | UnusableLogits] = []
        for start in range(0, len(states), rows_at_once):
            end = start + rows_at_once
            choices += _choose_side_by_side(rows[start:end], states[start:end], margins)
        return choices
    return _choose_together(rows, states, margins)


class SamplingState:
    """What the sampler remembers of one session: the output position and the ids that penalties look at.

    `mask` is the grammar's (step 5): bool [vocabulary] on `device`, True where allowed; set it before each `choose`.
    Raises ValueError for ids outside the vocabulary and for biases that float32 cannot hold.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        delivered_ids: Sequence[int],
        eos_ids: Sequence[int],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        for ids in (prompt_ids, delivered_ids, eos_ids, sampling.stop_token_ids):
            _check_ids(ids, vocab_size)
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.position = len(delivered_ids)
        self.mask: torch.Tensor | None = None
        self.greedy = sampling.greedy
        self.filters = 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0
        self.key: tuple[int, int] = struct.unpack("<II", sampling.seed[:8])

        bias = dict(sampling.logit_bias)  # a map, as in the API: of a repeated id the last entry counts
        _check_ids(bias, vocab_size)
        if any(not math.isfinite(_float32(value)) for value in bias.values()):
            raise ValueError("logit_bias holds a number that float32 cannot")
        self._on_cpu = self.device.type == "cpu"
        self._bias = _Amounts(self.device, bias)
        self._temperature = self._scalar(sampling.temperature)
        self._repetition: Any = self._scalar(sampling.repetition_penalty)
        if self._on_cpu:
            self._repetition = self._repetition.numpy()
        self._penalises_repetition = sampling.repetition_penalty != 1.0
        self._penalises_counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._seen = _Amounts(
            self.device, dict.fromkeys([*prompt_ids, *delivered_ids], 0.0) if self._penalises_repetition else {}
        )
        self._counts = Counter(delivered_ids) if self._penalises_counts else Counter()
        self._penalties = _Amounts(self.device, {v: self._penalty(n) for v, n in self._counts.items()})
        self._never = _Amounts(self.device, dict.fromkeys(sorted(eos_ids) if sampling.ignore_eos else (), -math.inf))
        self._too_early = _Amounts(self.device, dict.fromkeys((*eos_ids, *sampling.stop_token_ids), -math.inf))

    def accept(self, token_id: int) -> None:
        """Append an output id. Raises ValueError when it lies outside the vocabulary."""
        _check_ids((token_id,), self.vocab_size)
        self.position += 1
        if self._penalises_repetition:
            self._seen.put(token_id, 0.0)
        if self._penalises_counts:
            self._counts[token_id] += 1
            self._penalties.put(token_id, self._penalty(self._counts[token_id]))

    @property
    def adjusts(self) -> bool:
        """Whether any of steps 1 to 5 applies at this position."""
        return (
            self.mask is not None
            or bool(self._bias or self._seen or self._penalties or self._never)
            or (self.position < self.sampling.min_tokens and bool(self._too_early))
        )

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Steps 1 to 5 on one float32 row: a new row, or the same one when no step applies."""
        return self.adjust(logits.clone()) if self.adjusts else logits

    def adjust(self, row: torch.Tensor) -> torch.Tensor:
        """Steps 1 to 5 on one float32 row, in place. Touches few ids only."""
        z: Any = row.numpy() if self._on_cpu else row  # the same memory, and numpy is three times faster for few ids
        if self._bias:
            z[self._bias.ids] += self._bias.amounts
        if self._seen:
            old = z[self._seen.ids]
            where: Any = np.where if self._on_cpu else torch.where
            z[self._seen.ids] = where(old > 0, old / self._repetition, old * self._repetition)
        if self._penalties:
            z[self._penalties.ids] -= self._penalties.amounts
        if self._never:
            z[self._never.ids] = self._never.amounts
        if self._too_early and self.position < self.sampling.min_tokens:
            z[self._too_early.ids] = self._too_early.amounts
        return row if self.mask is None else row.masked_fill_(~self.mask, -math.inf)

    def heated(self, z: torch.Tensor) -> torch.Tensor:
        """Step 6: x = z / T. Divided by a tensor: by a number, CUDA kernels multiply with the rounded reciprocal."""
        return z if self.sampling.temperature == 1.0 else z / self._temperature

    def _penalty(self, count: int) -> float:
        return self.sampling.presence_penalty + self.sampling.frequency_penalty * count

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float32, device=self.device)


def gumbel(key: tuple[Any, Any], position: Any, ids: Sequence[int] | Ids) -> Floats:
    """Step 10: the float32 noise of these ids at this output position. `key` is the first 8 bytes of the seed.

    `key` and `position` may be uint64 arrays as long as `ids`, for ids of several rows.
    """
    if len(ids) <= 8 and isinstance(position, int):  # a handful is quicker without arrays
        return _noise(np.array([philox4x32(position, int(v) >> 2, 0, 0, *key)[v & 3] for v in ids], dtype=np.uint64))
    lanes = np.asarray(ids, dtype=np.uint64)
    words = philox4x32(position, lanes >> 2, 0, 0, *key)
    return _noise(np.choose((lanes & 3).astype(np.int64), words))


def philox4x32(c0: Lanes, c1: Lanes, c2: Lanes, c3: Lanes, k0: Lanes, k1: Lanes) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Philox4x32-10 (Salmon et al., SC11) over lanes of 64 bits that hold 32-bit words.

    Products wrap at 64 bits, shifts may be arithmetic, and c1 and c3 carry dirt above bit 31 from round to round: every
    word is masked before it is multiplied. Counters that are plain numbers make the first rounds nearly free.
    """
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & WORD_MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & WORD_MASK, p0
        k0, k1 = (k0 + 0x9E3779B9) & WORD_MASK, (k1 + 0xBB67AE85) & WORD_MASK
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


# ---------------------------------------------------------------- on a CPU: rows side by side, in numpy


def _choose_side_by_side(
    raw: torch.Tensor, states: Sequence[SamplingState], margins: bool
) -> list[Choice | UnusableLogits]:
    """The page for a few rows. What spans them is elementwise, a maximum or integer, so a row cannot see the others."""
    problems: dict[int, UnusableLogits] = {}
    leaders, tops = _first_of_the_largest(raw.numpy())
    _note_problems(problems, tops, _problem_with_logits, range(len(states)))
    values = raw
    changed = [i for i, state in enumerate(states) if state.adjusts]
    if changed:
        values = raw.clone()
        for i in changed:
            states[i].adjust(values[i])
        leaders, tops = _first_of_the_largest(values.numpy())
    z: Floats = values.numpy()

    found: list[tuple[int, float | None]] = [(0, None)] * len(states)
    greedy = [i for i, state in enumerate(states) if state.greedy]
    if greedy:
        _note_problems(problems, tops, _problem_with_adjusted, greedy)
        leads = _leads(_rows_of(z, greedy), [leaders[i] for i in greedy]) if margins else [None] * len(greedy)
        for i, lead in zip(greedy, leads, strict=True):
            found[i] = leaders[i], lead
    noisy = [i for i, state in enumerate(states) if not state.greedy]
    if noisy:
        x, x_tops = _rows_of(z, noisy), np.array([tops[i] for i in noisy], np.float32)
        if any(states[i].sampling.temperature != 1.0 for i in noisy):
            heats = np.array([states[i].sampling.temperature for i in noisy], np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # of rows that are unusable
                x, x_tops = x / heats[:, None], x_tops / heats  # dividing keeps the order, so these are the largest
            for i, top in zip(noisy, x_tops.tolist(), strict=True):
                tops[i] = top
        _note_problems(problems, tops, _problem_with_adjusted, noisy)
        if problems:
            usable = [place for place, i in enumerate(noisy) if i not in problems]
            noisy, x, x_tops = [noisy[place] for place in usable], _rows_of(x, usable), _rows_of(x_tops, usable)
        for i, answer in zip(noisy, _race(x, x_tops, [states[i] for i in noisy], margins), strict=True):
            found[i] = answer
    return [
        problems[i]
        if i in problems
        else Choice(token_id, _logprob(raw, i, token_id, state.sampling.top_logprobs), lead)
        for i, (state, (token_id, lead)) in enumerate(zip(states, found, strict=True))
    ]


def _first_of_the_largest(z: Floats) -> tuple[list[int], list[float]]:
    """Per row the lowest id of the largest value, and that value; NaN counts as the largest."""
    leaders = z.argmax(1).tolist()
    return leaders, [z.item(i, leader) for i, leader in enumerate(leaders)]


def _rows_of(z: npt.NDArray[Number], places: list[int]) -> npt.NDArray[Number]:
    return z if len(places) == len(z) else z[places]


def _note_problems(
    problems: dict[int, UnusableLogits],
    tops: list[float],
    problem_with: Callable[[float], UnusableLogits | None],
    rows: Iterable[int],
) -> None:
    """The first problem of a row is the one that is told."""
    for i in rows:
        if not math.isfinite(tops[i]):
            problem = problem_with(tops[i])
            if problem is not None:
                problems.setdefault(i, problem)


def _leads(z: Floats, leaders: list[int]) -> list[float]:
    """How far each row's leader is ahead of its next; inf without one."""
    rows = np.arange(len(z))
    others = z.copy()
    others[rows, leaders] = -math.inf
    with np.errstate(invalid="ignore"):  # of rows that are unusable
        leads: list[float] = (z[rows, leaders].astype(np.float64) - others.max(1)).tolist()
    return leads


def _kept(x: Floats, top: np.float32, sampling: Sampling) -> tuple[Floats, Ids | None]:
    """Steps 7 to 9: the kept values and their ids, ascending; or the whole vocabulary (None), -inf where not kept."""
    ids: Ids | None = None
    if 0 < sampling.top_k < len(x):
        cut = np.partition(x, len(x) - sampling.top_k)[len(x) - sampling.top_k]
        x, ids = _keep(x, ids, x >= cut)
    if sampling.top_p < 1.0:
        x, ids = _keep(x, ids, _nucleus(x, top, sampling.top_p))
    if sampling.min_p > 0.0:
        x, ids = _keep(x, ids, x >= top + np.float32(math.log(sampling.min_p)))
    return x, ids


def _keep(x: Floats, ids: Ids | None, kept: npt.NDArray[np.bool_]) -> tuple[Floats, Ids | None]:
    if ids is None and not _is_few(kept):
        return np.minimum(x, CEILING[kept.view(np.int8)]), None  # np.where is four times slower on a random mask
    places = np.flatnonzero(kept)
    return x[places], places if ids is None else ids[places]


def _is_few(kept: npt.NDArray[np.bool_]) -> bool:
    """Whether noise for these one by one is cheaper than for all: four neighbouring ids share one counter."""
    return bool(np.count_nonzero(kept) <= len(kept) // 6)


def _nucleus(x: Floats, top: np.float32, p: float) -> npt.NDArray[np.bool_]:
    """Step 8: the shortest prefix, by (x descending, place ascending), whose probabilities sum to p."""
    chances = _weights(x, top)
    chances /= np.float32(chances.sum(dtype=np.float64))
    low, high = _bracket(x, chances, top, p)
    kept = x >= high
    undecided = np.flatnonzero((x >= low) & ~kept)
    undecided = undecided[_descending(x[undecided])]
    reached = (chances * kept).sum(dtype=np.float64) + np.cumsum(chances[undecided], dtype=np.float64)
    last = np.searchsorted(reached, p)  # past the end when rounding leaves the whole sum just below p
    kept[undecided[: last + 1]] = True
    return kept


def _descending(x: Floats) -> Ids:
    """Places by (value descending, place ascending): an argsort as fast as a sort, both being in one integer."""
    bits = (np.float32(0.0) - x).view(np.int32)  # 0 - x, unlike -x, knows one zero only
    bits ^= (bits >> 31) & 0x7FFFFFFF  # from here they compare as the floats do
    keys = (bits.astype(np.int64) << 32) | np.arange(len(x))
    keys.sort()
    return keys & WORD_MASK


def _bracket(x: Floats, chances: Floats, top: np.float32, p: float) -> tuple[np.float32, np.float32]:
    """Limits (low, high): values from `high` on lie in the nucleus, those below `low` do not, few are in between.

    Halving costs a few passes where sorting 150 000 values would cost far more. The estimated sums keep their distance
    from p, so that what is left between, and summed exactly, decides.
    """
    low, high = np.float32(-math.inf), np.float32(math.inf)
    below, above = len(x), 0  # how many values are >= low, >= high
    shallow, deep = 0.0, 32.0
    scratch = np.empty_like(chances)
    while below - above > 2048 and deep - shallow > 1e-3:
        depth = (shallow + deep) / 2
        limit = top - np.float32(depth)
        inside = x >= limit
        mass = float(np.multiply(chances, inside, out=scratch).sum())
        if mass > p * (1 + 1e-4):
            low, deep, below = limit, depth, int(np.count_nonzero(inside))
        elif mass < p * (1 - 1e-4):
            high, shallow, above = limit, depth, int(np.count_nonzero(inside))
        else:
            break
    return low, high


def _race(x: Floats, tops: Floats, states: Sequence[SamplingState], margins: bool) -> list[tuple[int, float | None]]:
    """Steps 7 to 11 for rows of heated values: the winning ids, and their leads when wanted."""
    keys = np.array([state.key for state in states], np.uint64).reshape(-1, 2)
    positions = np.array([state.position for state in states], np.uint64)
    few: dict[int, tuple[Floats, Ids]] = {}  # rows where noise for some ids is enough
    whole: dict[int, Floats] = {}
    for i, state in enumerate(states):
        values, ids = _kept(x[i], tops[i], state.sampling) if state.filters else (x[i], None)
        if ids is None and not margins and len(values) >= PRUNE_FROM_VOCABULARY:
            values, ids = _pruned(values, state.key, state.position)
        if ids is None:
            whole[i] = values
        else:
            few[i] = values, ids
    found: dict[int, tuple[int, float | None]] = {}
    if whole:
        places = list(whole)
        x = np.stack(list(whole.values())) if any(states[i].filters for i in places) else _rows_of(x, places)
        answers = _race_of_all(x, _rows_of(tops, places), _rows_of(positions, places), _rows_of(keys, places), margins)
        found.update(zip(places, answers, strict=True))
    if few:
        places = list(few)
        lanes = np.repeat(np.arange(len(few)), [len(ids) for _, ids in few.values()])
        candidates = np.concatenate([ids for _, ids in few.values()])
        if len(few) == 1:
            noise = gumbel(states[places[0]].key, states[places[0]].position, candidates)
        else:
            rows = np.array(places)[lanes]
            noise = gumbel((keys[rows, 0], keys[rows, 1]), positions[rows], candidates)
        scores = np.concatenate([values for values, _ in few.values()]) + noise
        found.update(zip(places, _winners(lanes, candidates, scores, margins), strict=True))
    return [found[i] for i in range(len(states))]


def _pruned(x: Floats, key: tuple[int, int], position: int) -> tuple[Floats, Ids | None]:
    """Leaves out ids that no noise can lift over what the largest value already reaches, where that pays."""
    leader = int(x.argmax())
    reached = float(x[leader] + gumbel(key, position, [leader])[0])
    if abs(reached) >= 1 << 16:  # float32 is so coarse here that the bound's 0.006 of slack could round away
        return x, None
    possible = x >= reached - GUMBEL_MAX
    return _keep(x, None, possible) if _is_few(possible) else (x, None)


def _race_of_all(
    x: Floats, tops: Floats, positions: Words, keys: Words, margins: bool
) -> list[tuple[int, float | None]]:
    """Finds the few ids of a row that may have the highest score (with `margins`, the two highest) without a logarithm.

    1 - u <= -ln u, so exp(x - top) / (1 - u) bounds exp(x + g - top) from above. The id with the highest bound is
    scored exactly; whoever's bound lies below that score is out.
    """
    rows, vocab_size = x.shape
    blocks = (vocab_size + 3) // 4
    words = np.empty((rows, blocks * 4), np.uint32)
    bounds = np.empty((rows, vocab_size), np.float32)
    _weights(x, tops[:, None], out=bounds)
    for start in range(0, blocks, BLOCKS_AT_ONCE):
        span = slice(4 * start, 4 * min(start + BLOCKS_AT_ONCE, blocks))
        words[:, span] = _words_of_blocks(positions, keys, start, span.stop // 4)
        part = bounds[:, span]
        part /= _distance_to_one(words[:, span])[:, : part.shape[1]]
    every_row = np.arange(rows)
    leaders = bounds.argmax(1)[:, None]
    if margins and vocab_size > 1:
        held = bounds[every_row, leaders[:, 0]]
        bounds[every_row, leaders[:, 0]] = -1.0
        leaders = np.stack([leaders[:, 0], bounds.argmax(1)], axis=1)
        bounds[every_row, leaders[:, 0]] = held
    reached = (x[every_row[:, None], leaders] + _noise(words[every_row[:, None], leaders])).min(1)
    row, ids = np.divmod(np.flatnonzero(bounds >= _limits(reached, tops)[:, None]), vocab_size)
    return _winners(row, ids, x[row, ids] + _noise(words[row, ids]), margins)


def _words_of_blocks(positions: Words, keys: Words, start: int, stop: int) -> npt.NDArray[np.uint32]:
    """philox4x32 for counters (position, start..stop-1, 0, 0) of several rows: uint32 [rows, 4 * blocks].

    `keys` is [rows, 2]. What can be done to both halves of the state in one call is. Two rounds are written out because
    most of their words are the same in the whole row.
    """
    alone = len(positions) == 1
    column = () if alone else (len(positions), 1)
    row = (stop - start,) if alone else (len(positions), stop - start)
    key = ((keys.T + KEY_STEPS[:, :, None]) & WORD_MASK_ARRAY).reshape(10, 2, *column)
    even, odd, product = (np.empty((2, *row), np.uint64) for _ in range(3))
    c0, c2, c1, c3, next_c1, next_c3 = even[0], even[1], odd[0], odd[1], product[0], product[1]
    by_position = positions.reshape(column) * MULTIPLIER_0
    np.multiply(np.arange(start, stop, dtype=np.uint64) ^ key[0, 0], MULTIPLIER_0, c3)
    c1[...] = ((by_position >> WORD_BITS) ^ key[0, 1]) * MULTIPLIER_1
    c0[...] = (c1 >> WORD_BITS) ^ key[1, 0]
    np.bitwise_xor(c3 >> WORD_BITS, (by_position & WORD_MASK_ARRAY) ^ key[1, 1], c2)
    for i in range(2, 10):
        np.multiply(c0, MULTIPLIER_0, next_c3)
        np.multiply(c2, MULTIPLIER_1, next_c1)
        np.right_shift(product, WORD_BITS, even)
        np.bitwise_xor(even, odd, even)
        np.bitwise_xor(c0, key[i, 0, ...], c0)
        np.bitwise_xor(c2, key[i, 1, ...], c2)
        np.bitwise_and(even, WORD_MASK_ARRAY, even)
        odd, product, c1, c3, next_c1, next_c3 = product, odd, next_c1, next_c3, c1, c3
    words = np.empty((*row, 4), np.uint32)  # which cuts off the dirt above bit 31
    words[..., 0], words[..., 1], words[..., 2], words[..., 3] = c0, c1, c2, c3
    return words.reshape(len(positions), -1)


def _weights(x: Floats, top: np.float32 | Floats, out: Floats | None = None) -> Floats:
    shifted = np.subtract(x, top, out=out)
    return np.exp(shifted, out=shifted)


# ---------------------------------------------------------------- on an accelerator: rows together, in torch


def _choose_together(
    raw: torch.Tensor, states: Sequence[SamplingState], margins: bool
) -> list[Choice | UnusableLogits]:
    """The same page for rows that sit on an accelerator. The host waits a handful of times per step, not per row."""
    if not states:
        return []
    adjusted = [state.adjusted(row) for row, state in zip(raw, states, strict=True)]
    values = torch.stack(
        [
            z if state.sampling.greedy else _masked(state.heated(z), state.sampling)
            for z, state in zip(adjusted, states, strict=True)
        ]
    )
    raw_tops, tops = torch.stack([raw.amax(-1), values.amax(-1)]).tolist()
    problems = [_problem_with_logits(a) or _problem_with_adjusted(b) for a, b in zip(raw_tops, tops, strict=True)]
    found: dict[int, tuple[int, float | None]] = {}
    usable = [i for i, problem in enumerate(problems) if problem is None]
    greedy = [i for i in usable if states[i].sampling.greedy]
    if greedy:
        found.update(zip(greedy, _greedy_together(values[greedy], margins), strict=True))
    noisy = [i for i in usable if not states[i].sampling.greedy]
    if noisy:
        drawn = _race_together(values[noisy], [tops[i] for i in noisy], [states[i] for i in noisy], margins)
        found.update(zip(noisy, drawn, strict=True))
    choices: list[Choice | UnusableLogits] = []
    for i, (problem, state) in enumerate(zip(problems, states, strict=True)):
        if problem is not None:
            choices.append(problem)
        else:
            token_id, margin = found[i]
            choices.append(Choice(token_id, _logprob(raw, i, token_id, state.sampling.top_logprobs), margin))
    return choices


def _masked(x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Steps 7 to 9 without waiting for the device: values that are not kept become -inf."""
    if 0 < sampling.top_k < len(x):
        x = x.masked_fill(x < torch.topk(x, sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1.0:
        descending, ids = torch.sort(x, descending=True, stable=True)
        weights = torch.exp(descending - descending[0])
        # Sums run in fixed point: a device adds in any order, and only integers do not care.
        total = (weights.double() * 2.0**40).long().sum().double().mul(2.0**-40).float()
        reached = ((weights / total).double() * 2.0**50).long().cumsum(0)
        before = torch.cat([reached.new_zeros(1), reached[:-1]])
        kept = torch.where(before.double() < sampling.top_p * 2.0**50, descending, -math.inf)
        x = torch.empty_like(x).scatter_(0, ids, kept)
    if sampling.min_p > 0.0:
        ln_min_p = torch.tensor(math.log(sampling.min_p), dtype=torch.float32, device=x.device)
        x = x.masked_fill(x < x.amax() + ln_min_p, -math.inf)
    return x


def _greedy_together(values: torch.Tensor, margins: bool) -> list[tuple[int, float | None]]:
    token_ids = values.argmax(-1).tolist()  # documented to return the first of equals
    if not margins:
        return [(token_id, None) for token_id in token_ids]
    two = torch.topk(values, min(2, values.shape[1]), dim=-1).values.double().tolist()
    return [(i, best[0] - best[1] if len(best) == 2 else math.inf) for i, best in zip(token_ids, two, strict=True)]


def _race_together(
    values: torch.Tensor, tops: Sequence[float], states: Sequence[SamplingState], margins: bool
) -> list[tuple[int, float | None]]:
    rows, vocab_size = values.shape
    device = values.device

    def column(numbers: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=device)[:, None]

    blocks = torch.arange((vocab_size + 3) // 4, device=device)[None, :]
    keys = (column(s.key[0] for s in states), column(s.key[1] for s in states))
    words = torch.stack(philox4x32(column(s.position for s in states), blocks, 0, 0, *keys), dim=-1).reshape(rows, -1)
    words = words[:, :vocab_size]
    weights = torch.exp(values - torch.tensor(tops, dtype=torch.float32, device=device)[:, None])
    bounds = weights / ((words ^ WORD_MASK).float() + 0.5)
    leaders = torch.topk(bounds, min(2 if margins else 1, vocab_size), dim=-1).indices
    known = [t.cpu().numpy() for t in (values.gather(1, leaders), words.gather(1, leaders))]
    limits = _limits((known[0] + _noise(known[1])).min(1), np.array(tops, np.float32))
    floors = torch.from_numpy(limits).to(device)
    row, ids = (bounds >= floors[:, None]).nonzero(as_tuple=True)
    row_of, id_of, x_of, word_of = (t.cpu().numpy() for t in (row, ids, values[row, ids], words[row, ids]))
    return _winners(row_of, id_of, x_of + _noise(word_of), margins)


# ---------------------------------------------------------------- what both share


def _noise(words: npt.NDArray[Any]) -> Floats:
    u = (words.astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log(u))).astype(np.float32)


def _distance_to_one(words: npt.NDArray[np.uint32]) -> Floats:
    """2³²·(1 - u) in float32."""
    distance = (~words).astype(np.float32)
    distance += np.float32(0.5)
    return distance


def _limits(reached: Floats, tops: Floats) -> Floats:
    """Per row the bound (in units of 2⁻³²) below which nobody can reach a score of `reached`; 0 lets everybody through.

    1e-4 covers what float32 loses in the bounds, two steps of float32 what the compared sums lose. Where those steps
    are so wide that bounds could underflow, or where there is no runner-up to name, everybody is scored.
    """
    reached_exactly = reached.astype(np.float64)
    exponents = reached_exactly - tops - 1e-4 - np.abs(reached_exactly) * 2.0**-22
    return np.where(exponents > -40.0, np.exp(exponents) * 2.0**-32, 0.0).astype(np.float32)


def _winners(rows: Ids, ids: Ids, scores: Floats, margins: bool) -> list[tuple[int, float | None]]:
    """Who has the highest score in each row, the lowest id among equals. `rows` counts up from 0, `ids` in each row."""
    if rows[-1] == 0 and not margins:
        return [(int(ids[scores.argmax()]), None)]
    counts = np.bincount(rows)
    starts = counts.cumsum() - counts
    best = np.maximum.reduceat(scores, starts)
    highest = np.flatnonzero(scores == best[rows])
    places = highest[highest.searchsorted(starts)]
    if not margins:
        return [(token_id, None) for token_id in ids[places].tolist()]
    others = scores.copy()
    others[places] = -math.inf
    leads = best.astype(np.float64) - np.maximum.reduceat(others, starts)
    return list(zip(ids[places].tolist(), leads.tolist(), strict=True))


def _logprob(rows: torch.Tensor, i: int, token_id: int, top_logprobs: int | None) -> TokenLogprob | None:
    """Log-softmax of the untouched row; ids of probability zero are not listed."""
    if top_logprobs is None:
        return None
    logprobs: Floats = torch.log_softmax(rows[i], 0).cpu().numpy()
    if top_logprobs == 0:
        return TokenLogprob(float(logprobs[token_id]))
    rank = max(len(logprobs) - top_logprobs, 0)
    ids = np.flatnonzero(logprobs >= np.partition(logprobs, rank)[rank])
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:top_logprobs]
    top = tuple((int(v), float(logprobs[v])) for v in ids if logprobs[v] > -math.inf)
    return TokenLogprob(float(logprobs[token_id]), top)


def _problem_with_logits(top: float) -> UnusableLogits | None:
    if math.isnan(top) or top == math.inf:
        return UnusableLogits("the logits hold NaN or +inf")
    return UnusableLogits("every logit is -inf") if top == -math.inf else None


def _problem_with_adjusted(top: float) -> UnusableLogits | None:
    if top == -math.inf:
        return UnusableLogits("every id is banned by the parameters")
    return None if math.isfinite(top) else UnusableLogits("the parameters push a logit beyond float32")


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _check_ids(ids: Collection[int], vocab_size: int) -> None:
    for extreme in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= extreme < vocab_size:
            raise ValueError(f"id {extreme} lies outside the vocabulary of {vocab_size}")


class _Amounts:
    """Distinct ids and a float32 for each, in arrays that grow by doubling: numpy's on a CPU, else torch's.

    Tensors are made outside inference mode even when called inside it: one born there cannot be written to elsewhere.
    """

    def __init__(self, device: torch.device, amounts: dict[int, float]) -> None:
        self._places = {token_id: place for place, token_id in enumerate(amounts)}
        with torch.inference_mode(False):
            ids = torch.tensor(list(amounts), dtype=torch.int64, device=device)
            values = torch.tensor(list(amounts.values()), dtype=torch.float32, device=device)
        self._ids: Any = ids.numpy() if device.type == "cpu" else ids
        self._amounts: Any = values.numpy() if device.type == "cpu" else values

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> Any:
        return self._ids[: len(self)]

    @property
    def amounts(self) -> Any:
        return self._amounts[: len(self)]

    def put(self, token_id: int, amount: float) -> None:
        place = self._places.setdefault(token_id, len(self))
        if place == len(self._ids):
            self._ids, self._amounts = self._roomier(self._ids), self._roomier(self._amounts)
        self._ids[place] = token_id
        self._amounts[place] = amount

    @staticmethod
    def _roomier(values: Any) -> Any:
        room = max(16, len(values))
        if isinstance(values, np.ndarray):
            return np.concatenate([values, np.zeros(room, values.dtype)])
        with torch.inference_mode(False):
            return torch.cat([values, values.new_zeros(room)])
