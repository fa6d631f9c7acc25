"""How far a node is trusted: what opens its breaker, what closes it, and how much it is given at once."""

from gridmill.network.health import OPEN_SECONDS, Health


def old(good: int = 0) -> Health:
    health = Health(0.0)
    for number in range(good):
        health.ended(float(number), None)
    return health


def test_three_faults_in_a_row_trip_the_breaker_and_two_do_not() -> None:
    health = old(good=50)
    health.ended(100, "node_failed")
    health.ended(110, "node_lost")
    assert not health.tripped
    health.ended(120, "node_failed")
    assert health.tripped


def test_one_lost_link_with_sixteen_works_is_one_fault() -> None:
    health = old(good=50)
    for _ in range(16):
        health.ended(100, "node_lost")
    assert not health.tripped and health.faults_in_a_row == 1


def test_a_node_that_fails_every_third_time_trips_although_never_three_in_a_row() -> None:
    health = old()
    for number in range(60):
        health.ended(10.0 * number, "node_failed" if number % 3 == 0 else None)
        if health.tripped:
            return
    raise AssertionError("a third of all endings were faults")


def test_one_fault_in_ten_is_borne() -> None:
    health = old()
    for number in range(300):
        health.ended(10.0 * number, "node_failed" if number % 10 == 5 else None)
        assert not health.tripped
    assert 0.7 < health.availability < 0.95


def test_each_opening_lasts_twice_as_long_until_ten_works_in_a_row_went_well() -> None:
    health = old()
    lengths = []
    for _ in range(3):
        health.open(0.0)
        lengths.append(health.open_until)
    assert lengths == [OPEN_SECONDS, 2 * OPEN_SECONDS, 4 * OPEN_SECONDS]
    health.half_open()
    for _ in range(10):
        health.ended(1.0, None)
    health.open(0.0)
    assert health.open_until == OPEN_SECONDS
    for _ in range(100):
        health.open(0.0)
    assert health.open_until < 600


def test_half_open_lets_one_work_through_and_what_becomes_of_it_decides() -> None:
    for fault in (None, "node_failed"):
        health = old()
        health.open(0.0)
        assert health.limit(8) == 0
        health.half_open()
        assert health.limit(8) == 1
        health.ended(10.0, fault)
        assert (health.state == "closed", health.tripped) == (fault is None, fault is not None)
    assert health.state == "half_open"


def test_endings_that_the_node_announced_are_not_held_against_it() -> None:
    health = old(good=10)
    before = health.availability
    for number in range(20):
        health.ended(20.0 + number, "draining")
    assert not health.tripped and health.availability == before


def test_a_few_refusals_are_no_fault_and_nothing_but_refusals_is_one() -> None:
    """Another gateway may have filled the node, or the caller asked for what it cannot do."""
    health = old(good=50)
    for number in range(40):
        health.ended(100.0 + number, None if number % 8 == 7 else "node_refused")
        assert not health.tripped
    assert health.availability > 0.75
    for number in range(12):
        health.ended(200.0 + number, "node_refused")
    assert health.tripped
    health.open(300.0)
    health.half_open()
    health.ended(310.0, "node_refused")
    assert health.tripped


def test_a_newcomer_is_believed_less_than_one_that_proved_itself_and_more_than_one_that_fails() -> None:
    failing = old()
    for number in range(5):
        failing.ended(10.0 * number, "node_failed")
    assert failing.availability < old().availability < old(good=200).availability < 1.0


def test_a_newcomer_is_drawn_less_often_at_first() -> None:
    health = Health(100.0)
    assert health.warmth(100.0) == 0.1
    assert 0.4 < health.warmth(115.0) < 0.7
    assert health.warmth(130.0) == health.warmth(1e9) == 1.0


def test_a_queue_on_the_node_cuts_what_it_is_given_and_its_end_gives_it_back() -> None:
    health = old()
    now = 0.0
    for _ in range(40):
        now += 5.0
        health.first_token(now, 2.0, 0.2, health.limit(32) - 1, 32)
    assert health.limit(32) == 4  # an eighth stays whatever is measured
    for _ in range(200):
        now += 1.0
        health.first_token(now, 0.2, 0.2, health.limit(32) - 1, 32)
    assert health.limit(32) == 32


def test_works_that_began_before_a_cut_do_not_cut_again() -> None:
    health = old()
    for _ in range(100):
        health.first_token(10.0, 3.0, 0.2, 31, 32)
    assert health.limit(32) == round(32 * 0.8)


def test_first_tokens_that_are_quick_and_noisy_take_nothing_away() -> None:
    health = old()
    for number in range(500):
        health.first_token(10.0 * number, (0.01, 0.02, 0.2)[number % 3], 0.01, 7, 8)
        assert health.limit(8) == 8
    for number in range(500, 1000):
        health.first_token(10.0 * number, 0.255, 0.01, 7, 8)  # a quarter of a second, however many times it is
        assert health.limit(8) == 8


def test_a_node_that_is_slow_with_little_to_do_keeps_its_limit() -> None:
    health = old()
    for number in range(100):
        health.first_token(10.0 * number, 5.0, 0.2, 1, 32)
    assert health.limit(32) == 32


def test_the_limit_never_exceeds_the_advertised_slots() -> None:
    health = old()
    for number in range(1000):
        health.first_token(float(number), 0.1, 0.1, 3, 4)
    assert health.limit(4) == 4
    assert health.limit(1) == 1 and health.limit(0) == 0


def test_failing_all_the_time_is_more_than_one_event() -> None:
    health = Health(0.0)
    for n in range(40):
        health.ended(n * 0.2, "node_failed")
    assert health.tripped
