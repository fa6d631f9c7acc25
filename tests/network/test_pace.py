"""What the network measures of a node, and what it believes until it has."""

from random import Random

from gridmill.network.pace import UNMEASURED_FIRST_TOKEN_SECONDS, Line, Pace


def measured(*, base: float, per_token: float, noise: float = 0.0, seed: int = 0, works: int = 40) -> Pace:
    random, pace = Random(seed), Pace()
    for number in range(works):
        tokens = random.randint(50, 4000)
        seconds = (base + per_token * tokens) * (1 + noise * (random.random() - 0.5))
        pace.saw_first(float(number), tokens, seconds)
    return pace


def test_latency_and_speed_of_prefill_are_told_apart() -> None:
    pace = measured(base=0.3, per_token=0.001)
    assert abs(pace.read_seconds(0) - 0.3) < 0.03
    assert abs(pace.read_seconds(4000) - 4.3) < 0.2
    assert pace.prefill_tokens_per_second is not None and 900 < pace.prefill_tokens_per_second < 1100


def test_noise_does_not_carry_the_line_away() -> None:
    for seed in range(10):
        pace = measured(base=0.2, per_token=0.0005, noise=0.3, seed=seed, works=200)
        assert 0.7 < pace.read_seconds(2000) / 1.2 < 1.3


def test_prompts_of_one_length_lean_on_the_hint_for_all_others() -> None:
    pace = Pace(prefill_hint=1000)
    for number in range(20):
        pace.saw_first(float(number), 500, 0.6)
    assert abs(pace.read_seconds(500) - 0.6) < 0.01
    assert 1.0 < pace.read_seconds(1000) < 1.2
    assert pace.prefill_tokens_per_second is None


def test_a_hint_that_is_too_slow_gives_way_to_what_was_measured() -> None:
    pace = Pace(prefill_hint=10)
    for number in range(20):
        pace.saw_first(float(number), 100, 0.05)
    assert abs(pace.read_seconds(100) - 0.05) < 0.01 and pace.read_seconds(0) >= 0.0


def test_a_wait_counts_at_once_and_is_forgotten_over_ten_seconds() -> None:
    pace = measured(base=0.1, per_token=0.0001)
    pace.saw_first(100.0, 100, 8.0)
    assert pace.wait_seconds(100.0) > 6
    assert 2 < pace.wait_seconds(110.0) < 4
    assert pace.wait_seconds(200.0) < 0.01
    assert pace.read_seconds(100) < 0.5  # it was a wait, not a speed


def test_a_short_wait_does_not_wipe_out_a_long_one_of_a_moment_ago() -> None:
    pace = measured(base=0.1, per_token=0.0001)
    pace.waited(100.0, 8.0)
    pace.waited(101.0, 0.0)
    assert pace.wait_seconds(101.0) > 6


def test_a_node_that_nobody_measured_gets_patience_and_a_hint_does_not_shorten_it() -> None:
    for pace in (Pace(), Pace(prefill_hint=1e12, decode_hint=1e12)):
        assert not pace.measured
        assert pace.first_token_seconds(0.0, 10) >= UNMEASURED_FIRST_TOKEN_SECONDS
    assert Pace(prefill_hint=10).first_token_seconds(0.0, 1000) >= 100
    assert measured(base=0.1, per_token=0.0001).first_token_seconds(50.0, 10) < 1


def test_tokens_take_longer_on_a_crowded_node_as_far_as_that_was_measured() -> None:
    pace, random = Pace(slots=16), Random(1)
    for number in range(200):
        beside = random.randrange(16)
        pace.saw_tokens(float(number), 100, 100 * (0.02 + 0.001 * beside), beside)
    assert abs(pace.token_seconds(0) - 0.02) < 0.004
    assert abs(pace.token_seconds(15) - 0.035) < 0.004


def test_a_few_tokens_are_no_speed() -> None:
    pace = Pace()
    pace.saw_tokens(0.0, 3, 9.0, 0)
    assert not pace.gap_works


def test_silence_of_a_minute_makes_a_node_unsure_again() -> None:
    pace = measured(base=0.1, per_token=0.0001, works=3)
    assert not pace.silent(60.0) and pace.silent(63.0) and Pace().silent(0.0)


def test_a_line_never_falls_and_never_begins_below_zero() -> None:
    random = Random(3)
    for _ in range(200):
        line = Line(0.0, random.random(), 10.0)
        for _ in range(30):
            line.saw(random.uniform(0, 1000), random.uniform(0, 10))
            assert line.base >= 0 and line.slope >= 0
