"""The canonical sampler, version 1: logits in, one id per row out, the same on every machine that runs it.

Three rules. A row is computed as if it were alone: no reduction runs across rows, so batching cannot change an id.
Estimates only ever shorten the list of candidates; whoever wins was compared in exactly the arithmetic of the page.
What comes from the parameters alone (T, r, p + f·count, ln min_p) is computed in float64 and rounded to float32 once,
when it meets a logit.

On a CPU the rows go through numpy one after the other (its sort, argmax and integer loops are 2 to 30 times faster than
torch's there). On an accelerator they go through torch together, because there the launches are what costs.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gridmill.wire.sampling import Sampling, TokenLogprob

GUMBEL_MAX = 22.88  # -ln(-ln u) for the largest u, (2³² - 0.5)/2³², is 22.8738
WORD_MASK = 0xFFFFFFFF
CEILING = np.array([-math.inf, math.inf], np.float32)
BLOCKS_AT_ONCE = 16_384  # Philox counters: its seven arrays of 128 kB stay in a core's cache and off mmap

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
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
        return [_choose_alone(row, state, margins) for row, state in zip(rows, states, strict=True)]
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
        self.key: tuple[int, int] = struct.unpack("<II", sampling.seed[:8])

        bias = dict(sampling.logit_bias)  # a map, as in the API: of a repeated id the last entry counts
        _check_ids(bias, vocab_size)
        if any(not math.isfinite(_float32(value)) for value in bias.values()):
            raise ValueError("logit_bias holds a number that float32 cannot")
        self._bias = _Amounts(self.device, bias)
        self._temperature = self._scalar(sampling.temperature)
        self._repetition = self._scalar(sampling.repetition_penalty)
        self._penalises_repetition = sampling.repetition_penalty != 1.0
        self._penalises_counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._seen = _Amounts(
            self.device, dict.fromkeys([*prompt_ids, *delivered_ids], 0.0) if self._penalises_repetition else {}
        )
        self._counts = Counter(delivered_ids) if self._penalises_counts else Counter()
        self._penalties = _Amounts(self.device, {v: self._penalty(n) for v, n in self._counts.items()})
        self._never = self._index(eos_ids if sampling.ignore_eos else ())
        self._too_early = self._index((*eos_ids, *sampling.stop_token_ids))

    def accept(self, token_id: int) -> None:
        """Append an output id. Raises ValueError when it lies outside the vocabulary."""
        _check_ids((token_id,), self.vocab_size)
        self.position += 1
        if self._penalises_repetition:
            self._seen.put(token_id, 0.0)
        if self._penalises_counts:
            self._counts[token_id] += 1
            self._penalties.put(token_id, self._penalty(self._counts[token_id]))

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Steps 1 to 5 on one float32 row: a new row, or the same one when no step applies. Touches few ids only."""
        early = self.position < self.sampling.min_tokens
        banned = [ids for ids, applies in ((self._never, True), (self._too_early, early)) if applies and len(ids)]
        changes = len(self._bias) or len(self._seen) or len(self._penalties) or banned or self.mask is not None
        if not changes:
            return logits
        z = logits.clone()
        if len(self._bias):
            z.index_copy_(0, self._bias.ids, z[self._bias.ids] + self._bias.amounts)
        if len(self._seen):
            old = z[self._seen.ids]
            z.index_copy_(0, self._seen.ids, torch.where(old > 0, old / self._repetition, old * self._repetition))
        if len(self._penalties):
            z.index_copy_(0, self._penalties.ids, z[self._penalties.ids] - self._penalties.amounts)
        for ids in banned:
            z.index_fill_(0, ids, -math.inf)
        return z if self.mask is None else z.masked_fill_(~self.mask, -math.inf)

    def heated(self, z: torch.Tensor) -> torch.Tensor:
        """Step 6: x = z / T. Divided by a tensor: by a number, CUDA kernels multiply with the rounded reciprocal."""
        return z if self.sampling.temperature == 1.0 else z / self._temperature

    def _penalty(self, count: int) -> float:
        return self.sampling.presence_penalty + self.sampling.frequency_penalty * count

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float32, device=self.device)

    def _index(self, ids: Iterable[int]) -> torch.Tensor:
        return torch.tensor(sorted(set(ids)), dtype=torch.int64, device=self.device)


def gumbel(key: tuple[int, int], position: int, ids: Sequence[int] | Ids) -> Floats:
    """Step 10: the float32 noise of these ids at this output position. `key` is the first 8 bytes of the seed."""
    if len(ids) <= 8:  # a handful is quicker without arrays
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


# ---------------------------------------------------------------- on a CPU: one row after the other, in numpy


def _choose_alone(raw: torch.Tensor, state: SamplingState, margins: bool) -> Choice | UnusableLogits:
    problem = _problem_with_logits(float(raw.amax()))
    if problem is not None:
        return problem
    z = state.adjusted(raw)
    x: Floats = (z if state.sampling.greedy else state.heated(z)).numpy()
    top = x.max()
    problem = _problem_with_adjusted(float(top))
    if problem is not None:
        return problem
    if state.sampling.greedy:
        token_id = int(x.argmax())
        margin = float(top) - float(np.delete(x, token_id).max(initial=-math.inf)) if margins else None
    else:
        token_id, margin = _race(*_kept(x, top, state.sampling), state.key, state.position, margins)
    return Choice(token_id, _logprob(raw, token_id, state.sampling.top_logprobs), margin)


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
    undecided = undecided[np.argsort(-x[undecided], kind="stable")]
    reached = (chances * kept).sum(dtype=np.float64) + np.cumsum(chances[undecided], dtype=np.float64)
    last = np.searchsorted(reached, p)  # past the end when rounding leaves the whole sum just below p
    kept[undecided[: last + 1]] = True
    return kept


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


def _race(x: Floats, ids: Ids | None, key: tuple[int, int], position: int, margins: bool) -> tuple[int, float | None]:
    """Steps 10 and 11 over the kept values: the winning id, and its lead when wanted."""
    if ids is None and not margins:
        x, ids = _pruned(x, key, position)
    if ids is None:
        ids = _contenders(x, key, position, margins)
        x = x[ids]
    return _best_of(ids, x + gumbel(key, position, ids), margins)


def _pruned(x: Floats, key: tuple[int, int], position: int) -> tuple[Floats, Ids | None]:
    """Leaves out ids that no noise can lift over what the largest value already reaches, where that pays."""
    leader = int(x.argmax())
    reached = float(x[leader] + gumbel(key, position, [leader])[0])
    if abs(reached) >= 1 << 16:  # float32 is so coarse here that the bound's 0.006 of slack could round away
        return x, None
    possible = x >= reached - GUMBEL_MAX
    return _keep(x, None, possible) if _is_few(possible) else (x, None)


def _contenders(x: Floats, key: tuple[int, int], position: int, margins: bool) -> Ids:
    """The few ids that may have the highest score (with `margins`, the two highest), found without a logarithm.

    1 - u <= -ln u, so exp(x - top) / (1 - u) bounds exp(x + g - top) from above. The id with the highest bound is
    scored exactly; whoever's bound lies below that score is out.
    """
    top = x.max()
    bounds = np.zeros((len(x) + 3) // 4 * 4, np.float32)
    _weights(x, top, out=bounds[: len(x)])
    by_lane = bounds.reshape(-1, 4)
    for start in range(0, len(by_lane), BLOCKS_AT_ONCE):
        part = by_lane[start : start + BLOCKS_AT_ONCE]
        blocks = np.arange(start, start + len(part), dtype=np.uint64)
        for lane, words in enumerate(philox4x32(position, blocks, 0, 0, *key)):
            part[:, lane] /= _distance_to_one(words)
    bounds = bounds[: len(x)]
    leaders = [int(bounds.argmax())]
    if margins and len(x) > 1:
        held, bounds[leaders[0]] = bounds[leaders[0]], -1.0
        leaders.append(int(bounds.argmax()))
        bounds[leaders[0]] = held
    limit = _limit(float((x[leaders] + gumbel(key, position, leaders)).min()), float(top))
    return np.flatnonzero(bounds >= limit)


def _weights(x: Floats, top: np.float32, out: Floats | None = None) -> Floats:
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
            choices.append(Choice(token_id, _logprob(raw[i], token_id, state.sampling.top_logprobs), margin))
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
    known = [t.cpu().numpy() for t in (leaders, values.gather(1, leaders), words.gather(1, leaders))]
    limits = [_limit(float((x + _noise(w)).min()), top) for _, x, w, top in zip(*known, tops, strict=True)]
    floors = torch.tensor(limits, dtype=torch.float32, device=device)
    row, ids = (bounds >= floors[:, None]).nonzero(as_tuple=True)
    row_of, id_of, x_of, word_of = (t.cpu().numpy() for t in (row, ids, values[row, ids], words[row, ids]))
    scores = x_of + _noise(word_of)
    return [_best_of(id_of[row_of == i], scores[row_of == i], margins) for i in range(rows)]


# ---------------------------------------------------------------- what both share


def _noise(words: npt.NDArray[Any]) -> Floats:
    u = (words.astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log(u))).astype(np.float32)


def _distance_to_one(words: npt.NDArray[np.uint64]) -> Floats:
    """2³²·(1 - u) in float32."""
    return (words.astype(np.uint32) ^ np.uint32(WORD_MASK)).astype(np.float32) + np.float32(0.5)


def _limit(reached: float, top: float) -> float:
    """The bound (in units of 2⁻³²) below which nobody can reach a score of `reached`; 0 lets everybody through.

    1e-4 covers what float32 loses in the bounds, two steps of float32 what the compared sums lose. Where those steps
    are so wide that bounds could underflow, or where there is no runner-up to name, everybody is scored.
    """
    if reached == -math.inf:
        return 0.0
    exponent = reached - top - 1e-4 - 2.0 * float(np.spacing(np.float32(abs(reached))))
    return math.exp(exponent) * 2.0**-32 if exponent > -40.0 else 0.0


def _best_of(ids: Ids, scores: Floats, margins: bool) -> tuple[int, float | None]:
    best = scores.max()
    token_id = int(ids[scores == best].min())
    if not margins:
        return token_id, None
    second = scores[ids != token_id].max(initial=np.float32(-math.inf))
    return token_id, float(best) - float(second)


def _logprob(raw: torch.Tensor, token_id: int, top_logprobs: int | None) -> TokenLogprob | None:
    """Log-softmax of the untouched row; ids of probability zero are not listed."""
    if top_logprobs is None:
        return None
    logprobs: Floats = torch.log_softmax(raw, 0).cpu().numpy()
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
    """Distinct ids and a float32 for each, on a device, in arrays that grow by doubling.

    Made outside inference mode even when called inside it: a tensor born there cannot be written to anywhere else.
    """

    def __init__(self, device: torch.device, amounts: dict[int, float]) -> None:
        self._places = {token_id: place for place, token_id in enumerate(amounts)}
        with torch.inference_mode(False):
            self._ids = torch.tensor(list(amounts), dtype=torch.int64, device=device)
            self._amounts = torch.tensor(list(amounts.values()), dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> torch.Tensor:
        return self._ids[: len(self)]

    @property
    def amounts(self) -> torch.Tensor:
        return self._amounts[: len(self)]

    def put(self, token_id: int, amount: float) -> None:
        place = self._places.setdefault(token_id, len(self))
        if place == len(self._ids):
            with torch.inference_mode(False):
                room = torch.zeros(max(16, place), dtype=torch.int64, device=self._ids.device)
                self._ids = torch.cat([self._ids, room])
                self._amounts = torch.cat([self._amounts, room.float()])
        self._ids[place] = token_id
        self._amounts[place] = amount
