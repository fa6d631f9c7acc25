"""The engine's sampler against the plain-Python oracle, against frozen vectors, and against itself in other company."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sampler_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridmill.node.engines.native import sampler
from gridmill.node.engines.native.sampler import Choice, SamplingState, UnusableLogits, choose
from gridmill.wire.sampling import Sampling, TokenLogprob

ROOT = Path(__file__).resolve().parents[3]
VECTORS: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / "sampler-v1.json").read_text())
SEED = hashlib.sha256(b"tests").digest()
INF = math.inf


def together_on_an_accelerator(
    logits: torch.Tensor, states: list[SamplingState], *, margins: bool = False
) -> list[Choice | UnusableLogits]:
    """The road for CUDA rows, which torch walks on a CPU just as well."""
    return sampler._choose_together(logits.to(torch.float32), states, margins)


ROADS = pytest.mark.parametrize("road", [choose, together_on_an_accelerator], ids=["cpu", "accelerator"])


def state_for(
    vocab_size: int, prompt: Any = (), delivered: Any = (), eos: Any = (), **parameters: Any
) -> SamplingState:
    sampling = Sampling(**{"seed": SEED, "max_tokens": 1000} | parameters)
    return SamplingState(sampling, prompt, delivered, eos, vocab_size, "cpu")


def chosen(choice: Choice | UnusableLogits) -> Choice:
    assert isinstance(choice, Choice), choice
    return choice


def state_of_case(case: dict[str, Any]) -> SamplingState:
    parameters = dict(case["parameters"])
    eos = parameters.pop("eos_ids", ())
    modulus = parameters.pop("allowed_modulus", None)
    parameters["logit_bias"] = tuple((int(v), bias) for v, bias in parameters.get("logit_bias", {}).items())
    parameters["stop_token_ids"] = tuple(parameters.get("stop_token_ids", ()))
    state = state_for(
        case["vocab_size"],
        case["prompt_ids"],
        case["delivered_ids"],
        eos,
        **parameters | {"seed": bytes.fromhex(case["seed"])},
    )
    if modulus is not None:
        state.mask = torch.arange(case["vocab_size"]) % modulus[0] < modulus[1]
    return state


def logits_of_case(case: dict[str, Any], step: int) -> torch.Tensor:
    """The oracle's recipe, in numpy."""
    label, vocab_size = f"{case['label']}/{step}", case["vocab_size"]
    digests = b"".join(hashlib.sha256(f"{label}/{quad}".encode()).digest() for quad in range((vocab_size + 3) // 4))
    rows = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 8)[:vocab_size]
    fine = np.ascontiguousarray(rows[:, 4:]).view("<u4")[:, 0].astype(np.int64) % 4096 * (not case["coarse"])
    coarse = rows[:, :4].astype(np.int64).sum(axis=1) - 510
    return torch.from_numpy(((coarse * 4096 + fine) / 2.0 ** (12 + case["shift"])).astype(np.float32))


@lru_cache(maxsize=1)
def vector_script() -> Any:
    spec = importlib.util.spec_from_file_location("make_sampler_vectors", ROOT / "scripts" / "make_sampler_vectors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the vectors


def words_of(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize("row", VECTORS["philox4x32_10"], ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers_on_numbers_arrays_and_tensors(row: dict[str, str]) -> None:
    counter, key, output = words_of(row["counter"]), words_of(row["key"]), words_of(row["output"])
    assert oracle.philox4x32_10(counter, key) == output
    assert sampler.philox4x32(*counter, *key) == output
    arrays = sampler.philox4x32(*(np.full(5, c, dtype=np.uint64) for c in counter), *key)
    assert all((word == expected).all() for word, expected in zip(arrays, output, strict=True))
    tensors = sampler.philox4x32(*(torch.tensor([c]) for c in counter), *(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in tensors) == output


def test_noise_is_within_one_ulp_of_the_vectors() -> None:
    for row in VECTORS["gumbel"]:
        key = struct.unpack("<II", bytes.fromhex(row["seed"])[:8])
        expected = np.array([struct.unpack(">f", bytes.fromhex(bits))[0] for bits in row["g"]], dtype=np.float32)
        for got in (
            sampler.gumbel(key, row["position"], row["ids"]),
            np.concatenate([sampler.gumbel(key, row["position"], [v]) for v in row["ids"]]),
        ):
            assert got.dtype == np.float32
            assert (np.abs(got - expected) <= np.spacing(np.abs(expected))).all()


def test_noise_stays_inside_the_range_that_pruning_relies_on() -> None:
    smallest, largest = sampler._noise(np.array([0, 2**32 - 1], dtype=np.uint64))
    assert -3.14 <= smallest < -3.12
    assert 22.87 < largest <= sampler.GUMBEL_MAX


@ROADS
@pytest.mark.parametrize("vocab_size", [300, 150_000])
def test_every_vector_alone_and_all_together(road: Any, vocab_size: int) -> None:
    cases = [case for case in VECTORS["cases"] if case["vocab_size"] == vocab_size]
    assert len(cases) >= 70
    states = [state_of_case(case) for case in cases]
    for step in range(len(cases[0]["ids"])):
        logits = torch.stack([logits_of_case(case, step) for case in cases])
        expected = [case["ids"][step] for case in cases]
        alone = [road(logits[i : i + 1], [state])[0] for i, state in enumerate(states)]
        assert [chosen(choice).token_id for choice in alone] == expected
        half = len(cases) // 2  # two batches, to keep memory small
        assert road(logits[:half], states[:half]) + road(logits[half:], states[half:]) == alone
        for state, token_id in zip(states, expected, strict=True):
            state.accept(token_id)


def test_the_vectors_are_what_the_oracle_answers_today() -> None:
    script = vector_script()
    frozen = {case["label"]: case for case in VECTORS["cases"]}
    plans = list(script.plans(300, 6, 3))[::4] + list(script.plans(150_000, 2, 1))[45:46]
    assert len(plans) > 50
    for plan in plans:
        solved = script.solve(plan)
        assert json.loads(json.dumps(solved)) == frozen[plan["label"]]
    assert json.loads(json.dumps(script.gumbel_rows())) == VECTORS["gumbel"]


def test_the_test_rebuilds_logits_exactly_as_the_recipe_says() -> None:
    for case in VECTORS["cases"][::40]:
        expected = oracle.recipe_logits(f"{case['label']}/0", case["vocab_size"], case["shift"], case["coarse"])
        assert logits_of_case(case, 0).tolist() == expected


# ---------------------------------------------------------------- any parameters, against the oracle


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    vocab_size = draw(st.integers(1, 70))
    token_ids = st.integers(0, vocab_size - 1)
    return {
        "vocab_size": vocab_size,
        "label": draw(st.text("abcdef", min_size=1, max_size=6)),
        "shift": draw(st.sampled_from([3, 5, 6, 8])),
        "coarse": draw(st.booleans()),
        "prompt": draw(st.lists(token_ids, max_size=8)),
        "output": draw(st.lists(token_ids, max_size=8)),
        "parameters": {
            "seed": draw(st.binary(min_size=32, max_size=32)),
            "temperature": draw(st.sampled_from([0.0, 9e-6, 0.1, 0.7, 1.0, 1.3, 50.0])),
            "top_k": draw(st.integers(0, vocab_size)),
            "top_p": draw(st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01])),
            "min_p": draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
            "repetition_penalty": draw(st.sampled_from([1.0, 1.2, 0.5])),
            "presence_penalty": draw(st.sampled_from([0.0, 0.6, -1.1])),
            "frequency_penalty": draw(st.sampled_from([0.0, 0.3, -0.7])),
            "logit_bias": draw(st.dictionaries(token_ids, st.floats(-100, 100, width=32), max_size=4)),
            "min_tokens": draw(st.integers(0, 9)),
            "ignore_eos": draw(st.booleans()),
            "stop_token_ids": tuple(draw(st.lists(token_ids, max_size=2))),
        },
        "eos": tuple(draw(st.lists(token_ids, max_size=2))),
        "modulus": draw(st.none() | st.tuples(st.integers(2, 9), st.integers(1, 2))),
    }


def test_the_engine_agrees_with_the_oracle_on_any_parameters() -> None:
    compared = skipped = 0

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(situations())
    def check(s: dict[str, Any]) -> None:
        nonlocal compared, skipped
        logits = oracle.recipe_logits(s["label"], s["vocab_size"], s["shift"], s["coarse"])
        parameters = oracle.Parameters(**s["parameters"], eos_ids=s["eos"], allowed_modulus=s["modulus"])
        native = s["parameters"] | {"logit_bias": tuple(s["parameters"]["logit_bias"].items())}
        state = state_for(s["vocab_size"], s["prompt"], s["output"], s["eos"], **native)
        if s["modulus"] is not None:
            state.mask = torch.arange(s["vocab_size"]) % s["modulus"][0] < s["modulus"][1]
        row = torch.tensor([logits])
        answers = [
            road(row, [state], margins=m)[0] for road in (choose, together_on_an_accelerator) for m in (True, False)
        ]
        if max(oracle.adjusted(logits, s["prompt"], s["output"], parameters)) == -INF:
            assert all(isinstance(answer, UnusableLogits) for answer in answers)
            return
        expected = oracle.choose(logits, s["prompt"], s["output"], parameters)
        if not expected.sturdy:
            skipped += 1
            return
        compared += 1
        assert [chosen(answer).token_id for answer in answers] == [expected.token_id] * 4
        for answer in answers[::2]:
            margin = chosen(answer).margin
            assert margin == expected.margin or abs(margin - expected.margin) < 1e-4 * max(1.0, expected.margin)

    check()
    assert compared > 20 * skipped and compared > 200


@pytest.mark.parametrize("scale", [1e4, 1e7, 1e30], ids=str)
@ROADS
def test_logits_so_large_that_noise_drowns_still_follow_the_page(road: Any, scale: float) -> None:
    """Float32 steps are coarser than the noise here, so most compared values are equal and the lowest id decides."""
    logits = (torch.tensor(oracle.recipe_logits("large", 200, 7, coarse=True)).clamp(-9.0, 0.5) * 0.01 + 1.0) * scale
    assert int((logits == logits.max()).sum()) > 20
    for position in range(20):
        state = state_for(200, delivered=[0] * position, seed=hashlib.sha256(bytes([position])).digest())
        expected = oracle.choose(logits.tolist(), [], [0] * position, oracle.Parameters(seed=state.sampling.seed))
        assert chosen(road(logits[None], [state])[0]).token_id == expected.token_id


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "many equals"])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
def test_the_nucleus_of_a_large_vocabulary_is_the_one_that_sorting_finds(p: float, ties: bool, spread: float) -> None:
    x = np.random.default_rng(3).standard_normal(20_001).astype(np.float32) * np.float32(spread)
    if ties:
        x = np.round(x)
    x[::7] = -INF
    order = np.argsort(-x, kind="stable")
    weights = np.exp(x - x.max())
    chances = (weights / np.float32(weights.sum(dtype=np.float64)))[order].astype(np.float64)
    length = int(np.searchsorted(np.cumsum(chances), p)) + 1
    found = np.flatnonzero(sampler._nucleus(x, x.max(), p) & (x > -INF))
    expected = np.sort(order[:length][x[order[:length]] > -INF])
    assert found.tolist() == expected.tolist()
    masked = sampler._masked(torch.from_numpy(x), Sampling(seed=SEED, max_tokens=1, top_p=p))
    differing = (masked > -INF).numpy() ^ np.isin(np.arange(len(x)), expected)
    assert (weights / weights.sum())[differing].sum() < 1e-6  # torch's float32 exp rounds otherwise than numpy's


@ROADS
def test_drawn_frequencies_follow_the_softmax(road: Any) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    draws = 4000
    counts = torch.zeros(5)
    states = [state_for(5, seed=hashlib.sha256(struct.pack("<I", i)).digest()) for i in range(draws)]
    for choice in road(logits.expand(draws, 5), states):
        counts[chosen(choice).token_id] += 1
    expected = torch.softmax(logits, 0) * draws
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 18.5  # 99.9 % point for 4 degrees of freedom; the draws are fixed, so it cannot flake


# ---------------------------------------------------------------- the company a row keeps


def random_states(rng: random.Random, rows: int, vocab_size: int) -> list[SamplingState]:
    states = []
    for _ in range(rows):
        state = state_for(
            vocab_size,
            [rng.randrange(vocab_size) for _ in range(rng.randrange(40))],
            [rng.randrange(vocab_size) for _ in range(rng.randrange(20))],
            (2,),
            seed=rng.randbytes(32),
            temperature=rng.choice([0.0, 0.6, 1.0, 1.0, 1.4]),
            top_k=rng.choice([0, 0, 1, 40, vocab_size // 2]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.4]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            logit_bias=rng.choice([(), ((3, 2.0), (5, -100.0))]),
            min_tokens=rng.choice([0, 30]),
            top_logprobs=rng.choice([None, 0, 3]),
        )
        if rng.random() < 0.2:
            state.mask = torch.arange(vocab_size) % 3 != 0
        states.append(state)
    return states


@ROADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_row_is_the_same_alone_and_among_others(road: Any, dtype: torch.dtype) -> None:
    rng = random.Random(11)
    generator = torch.Generator().manual_seed(11)
    for rows in [*range(1, 17), 16, 13]:
        vocab_size = rng.choice([257, 1003, 20_000])
        logits = (torch.randn(rows, vocab_size, generator=generator) * rng.choice([1.0, 4.0])).to(dtype)
        untouched = logits.clone()
        states = random_states(rng, rows, vocab_size)
        batched = road(logits, states, margins=True)
        alone = [road(logits[i : i + 1], [states[i]], margins=True)[0] for i in range(rows)]
        assert batched == alone
        assert [chosen(c).token_id for c in road(logits, states)] == [chosen(c).token_id for c in batched]
        assert torch.equal(logits, untouched)


@pytest.mark.parametrize("margins", [False, True], ids=["ids only", "margins"])
@pytest.mark.parametrize(("rows", "vocab_size"), [(70, 1536), (70, 1537), (30, 9_001), (3, 40_003), (2, 66_000)])
def test_rows_side_by_side_are_the_rows_one_by_one(rows: int, vocab_size: int, margins: bool) -> None:
    """Over several groups of rows and several chunks of Philox; plain, filtered, greedy and penalised rows mixed."""
    rng = random.Random(rows * vocab_size)
    generator = torch.Generator().manual_seed(rows * vocab_size)
    mixed = random_states(rng, rows, vocab_size)
    plain = [state_for(vocab_size, delivered=[1] * i, seed=rng.randbytes(32), top_logprobs=2) for i in range(rows)]
    for states in (plain, mixed, [state_for(vocab_size, temperature=0.0)] * rows):
        logits = torch.randn(rows, vocab_size, generator=generator) * 3
        logits[1::4] = logits[1::4].round()  # equal values
        logits[rows - 1, 5] = math.nan
        untouched = logits.clone()
        batched = choose(logits, states, margins=margins)
        alone = [choose(logits[i : i + 1], states[i : i + 1], margins=margins)[0] for i in range(rows)]
        assert batched[:-1] == alone[:-1]
        assert isinstance(batched[-1], UnusableLogits) and isinstance(alone[-1], UnusableLogits)
        assert torch.equal(logits.nan_to_num(), untouched.nan_to_num())
        other_way_round = choose(logits.flip(0), states[::-1], margins=margins)
        assert other_way_round[:0:-1] == alone[:-1]
        for i in range(0, rows - 1, 7):
            if states is plain:
                scores = logits[i].numpy() + sampler.gumbel(states[i].key, i, np.arange(vocab_size))
                best, second = np.sort(scores)[:-3:-1]
                margin = float(best) - float(second) if margins else None
                assert (chosen(alone[i]).token_id, chosen(alone[i]).margin) == (int(scores.argmax()), margin)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_noise_words_for_whole_rows_are_those_of_philox(rows: int) -> None:
    rng = np.random.default_rng(rows)
    positions = np.array([0, 2**32 - 1, 7, 8, 9], np.uint64)[:rows]
    keys = rng.integers(0, 2**32, (rows, 2), dtype=np.uint64)
    keys[0] = 2**32 - 1
    words = sampler._words_of_blocks(positions, keys, 3, 20)
    for row in range(rows):
        counters = [(int(positions[row]), block, 0, 0) for block in range(3, 20)]
        key = (int(keys[row, 0]), int(keys[row, 1]))
        assert words[row].tolist() == [word for c in counters for word in oracle.philox4x32_10(c, key)]


def test_descending_order_knows_one_zero_and_takes_equals_by_place() -> None:
    values = np.random.default_rng(8).standard_normal(3_000).astype(np.float32) * np.float32(1e3)
    values[::3] = np.round(values[::3] / 500)
    values[:8] = [0.0, -0.0, -INF, 3e38, -3e38, 1e-45, -1e-45, 0.0]
    assert sampler._descending(values).tolist() == np.argsort(-values, kind="stable").tolist()


def test_both_roads_answer_the_same() -> None:
    rng = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    for vocab_size in (1, 2, 3, 30, 999, 20_001):
        states = random_states(rng, 12, max(vocab_size, 6)) if vocab_size >= 30 else [state_for(vocab_size)] * 12
        logits = torch.randn(12, vocab_size, generator=generator) * 3
        assert choose(logits, states, margins=True) == together_on_an_accelerator(logits, states, margins=True)


def test_choosing_twice_gives_the_same_and_changes_nothing() -> None:
    states = random_states(random.Random(2), 8, 500)
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(2))
    positions = [state.position for state in states]
    assert choose(logits, states, margins=True) == choose(logits, states, margins=True)
    assert [state.position for state in states] == positions


def test_a_resumed_session_continues_exactly_as_the_first_would_have() -> None:
    generator = torch.Generator().manual_seed(9)
    parameters: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "min_tokens": 25,
    }
    logits = torch.randn(60, 90, generator=generator)
    first = state_for(90, [4, 4, 8], (), (2,), **parameters)
    ids: list[int] = []
    for step in range(60):
        resumed = state_for(90, [4, 4, 8], ids, (2,), **parameters)
        assert resumed.position == first.position == step
        row = logits[step : step + 1]
        assert torch.equal(resumed.adjusted(row[0]), first.adjusted(row[0]))
        assert choose(row, [resumed], margins=True) == choose(row, [first], margins=True)
        ids.append(chosen(choose(row, [first])[0]).token_id)
        first.accept(ids[-1])
    assert len(set(ids)) < len(ids)  # ids came back, so counts above one were compared


def test_a_row_that_cannot_be_sampled_hurts_no_other() -> None:
    good = torch.randn(40, generator=torch.Generator().manual_seed(1))
    nan, positive, nothing = good.clone(), good.clone(), torch.full((40,), -INF)
    nan[7], positive[3] = math.nan, INF
    banned = state_for(40)
    banned.mask = torch.zeros(40, dtype=torch.bool)
    overflow = state_for(40, temperature=1e-5, logit_bias=((1, 3e38),))
    greedy = state_for(40, temperature=0.0)
    rows = torch.stack([good, nan, positive, nothing, good, good, nan, good])
    states = [state_for(40), state_for(40), state_for(40), state_for(40), banned, overflow, greedy, state_for(40)]
    for road in (choose, together_on_an_accelerator):
        answers = road(rows, states)
        assert [isinstance(a, UnusableLogits) for a in answers] == [False, True, True, True, True, True, True, False]
        assert answers[0] == answers[7] == road(good[None], [state_for(40)])[0]
        assert "NaN" in str(answers[1]) and "banned" in str(answers[4]) and "float32" in str(answers[5])


# ---------------------------------------------------------------- single steps, by hand


@ROADS
def test_greedy_takes_the_lowest_of_equal_ids_and_says_how_near_the_next_was(road: Any) -> None:
    row = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert road(row, [state_for(4, temperature=0.0)], margins=True) == [Choice(1, None, 0.0)]
    state = state_for(4, temperature=0.0, logit_bias=((2, 0.5),))
    assert road(row, [state], margins=True) == [Choice(2, None, 0.5)]
    assert road(torch.tensor([[1.0]]), [state_for(1, temperature=0.0)], margins=True) == [Choice(0, None, INF)]


def kept_by_both(x: list[float], **parameters: Any) -> list[int]:
    sampling = Sampling(seed=SEED, max_tokens=1, **parameters)
    array = np.array(x, np.float32)
    values, ids = sampler._kept(array, array.max(), sampling)
    places = np.flatnonzero(values > -INF) if ids is None else ids
    masked = sampler._masked(torch.tensor(x), sampling)
    assert places.tolist() == (masked > -INF).nonzero()[:, 0].tolist()
    return [int(v) for v in places]


def test_top_k_keeps_ties_at_the_cut() -> None:
    assert kept_by_both([1.0, 5.0, 3.0, 3.0, 3.0, 0.0], top_k=2) == [1, 2, 3, 4]
    assert kept_by_both([1.0, 5.0, 3.0, 2.0], top_k=1) == [1]
    assert kept_by_both([1.0, 5.0, 3.0, 2.0], top_k=4) == [0, 1, 2, 3]


def test_top_p_includes_the_crossing_id_and_takes_equals_by_lowest_id() -> None:
    quarters = [0.0, 0.0, 0.0, 0.0]
    assert kept_by_both(quarters, top_p=0.5) == [0, 1]  # exactly reached
    assert kept_by_both(quarters, top_p=0.51) == [0, 1, 2]
    assert kept_by_both(quarters, top_p=1e-9) == [0]
    assert kept_by_both([-9.0, 4.0, 9.0, 4.0, 4.0], top_p=0.985) == [1, 2]


def test_top_p_is_measured_on_what_top_k_left_and_min_p_on_what_both_left() -> None:
    x = [math.log(w) for w in (0.4, 0.3, 0.2, 0.1)]
    assert kept_by_both(x, top_p=0.69) == [0, 1]
    assert kept_by_both(x, top_k=3, top_p=0.81) == [0, 1, 2]
    assert kept_by_both(x, top_k=2, top_p=0.55) == [0]  # 0.4 / 0.7 = 0.571
    assert kept_by_both(x, min_p=0.45) == [0, 1, 2]
    assert kept_by_both(x, top_p=0.95, min_p=0.6) == [0, 1]


def test_penalties_touch_each_id_once_and_counts_only_the_output() -> None:
    state = state_for(6, [1, 1, 2], [3, 3], (), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    state.accept(4)
    before = torch.tensor([8.0, 8.0, -8.0, 8.0, -8.0, 8.0])
    assert state.adjusted(before).tolist() == [8.0, 4.0, -16.0, 4.0 - 1.0, -16.0 - 0.75, 8.0]
    assert before.tolist() == [8.0, 8.0, -8.0, 8.0, -8.0, 8.0]


def test_end_and_stop_ids_are_banned_until_the_minimum_and_end_ids_for_ever_on_request() -> None:
    row = torch.zeros(5)
    state = state_for(5, (), (), (1,), min_tokens=2, stop_token_ids=(3,))
    seen = []
    for _ in range(3):
        seen.append((state.adjusted(row) == -INF).nonzero()[:, 0].tolist())
        state.accept(0)
    assert seen == [[1, 3], [1, 3], []]
    assert (state_for(5, (), [0] * 9, (1,), ignore_eos=True).adjusted(row) == -INF).nonzero()[:, 0].tolist() == [1]


def test_a_state_made_or_grown_inside_inference_mode_lives_on_outside_it() -> None:
    with torch.inference_mode():
        state = state_for(100, [1], [2], repetition_penalty=1.5, presence_penalty=0.5)
        row = torch.ones(1, 100)
        choose(row, [state])
        for token_id in range(40):
            state.accept(token_id)
    for token_id in range(90):
        state.accept(token_id)
    assert state.adjusted(row[0]).tolist() == pytest.approx([1 / 1.5 - 0.5] * 90 + [1.0] * 10)
    assert isinstance(choose(row, [state])[0], Choice)


def test_a_row_that_nothing_changes_is_not_copied() -> None:
    row = torch.zeros(5)
    assert state_for(5, [1], [2], (3,)).adjusted(row) is row


@ROADS
def test_logprobs_are_of_the_untouched_logits_and_listed_by_value_then_id(road: Any) -> None:
    row = torch.tensor([[1.0, 2.0, 2.0, 0.0, -INF]])
    state = state_for(5, temperature=0.0, top_logprobs=4, logit_bias=((3, 50.0),))
    expected = torch.log_softmax(row[0], 0).tolist()
    top = tuple((v, expected[v]) for v in (1, 2, 0, 3))
    assert road(row, [state]) == [Choice(3, TokenLogprob(expected[3], top), None)]
    all_of_them = chosen(road(row, [state_for(5, top_logprobs=20)])[0]).logprob
    assert all_of_them is not None and [v for v, _ in all_of_them.top] == [1, 2, 0, 3]  # nothing of probability zero
    bare = chosen(road(row, [state_for(5, top_logprobs=0)])[0]).logprob
    assert bare is not None and bare.top == ()
    assert chosen(road(row, [state_for(5)])[0]).logprob is None
    equals = chosen(road(torch.zeros(1, 50), [state_for(50, top_logprobs=2)])[0]).logprob
    assert equals is not None and [v for v, _ in equals.top] == [0, 1]


def test_the_margin_is_the_lead_over_the_runner_up_among_the_kept() -> None:
    generator = torch.Generator().manual_seed(4)
    for position in range(30):
        row = torch.randn(1, 400, generator=generator)
        state = state_for(400, delivered=[0] * position, top_k=300)
        scores = row[0].numpy() + sampler.gumbel(state.key, position, list(range(400)))
        scores[row[0].numpy() < np.sort(row[0].numpy())[100]] = -INF
        best, second = np.sort(scores)[::-1][:2]
        choice = chosen(choose(row, [state], margins=True)[0])
        assert (choice.token_id, choice.margin) == (int(scores.argmax()), float(best) - float(second))
    assert chosen(choose(row, [state_for(400, top_k=1)], margins=True)[0]).margin == INF


def test_wrong_shapes_and_foreign_ids_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="1 sampling states"):
        choose(torch.zeros(2, 5), [state_for(5)])
    with pytest.raises(ValueError, match="a state for 5 ids"):
        choose(torch.zeros(1, 6), [state_for(5)])
    with pytest.raises(ValueError, match="id 5 lies outside"):
        state_for(5, [5])
    with pytest.raises(ValueError, match="id -1 lies outside"):
        state_for(5, [0], [-1])
    with pytest.raises(ValueError, match="id 9 lies outside"):
        state_for(5, logit_bias=((9, 1.0),))
    with pytest.raises(ValueError, match="float32"):
        state_for(5, logit_bias=((1, 1e39),))
    with pytest.raises(ValueError, match="id 5 lies outside"):
        state_for(5).accept(5)
    assert choose(torch.zeros(0, 5), []) == together_on_an_accelerator(torch.zeros(0, 5), []) == []
