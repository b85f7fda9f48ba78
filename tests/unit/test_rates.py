"""Rates of arriving work."""

import random

import pytest

from autoscaling.rates import Sample, Samples, rates, with_sample

MEAN_S = 120.0


def poisson(per_s: float, seconds: int, seed: int = 0, work_s: float = 1.0) -> Samples:
    samples: Samples = ()
    chance, work, at = random.Random(seed), 0.0, 0.0
    arrivals = []
    while (at := at + chance.expovariate(per_s)) < seconds:
        arrivals.append(at)
    for second in range(seconds + 1):
        while arrivals and arrivals[0] <= second:
            arrivals.pop(0)
            work += work_s
        samples = with_sample(samples, Sample(second, work, work * work_s), MEAN_S)
    return samples


def test_an_even_stream_has_its_rate() -> None:
    samples: Samples = ()
    for second in range(300):
        samples = with_sample(samples, Sample(second, 5.0 * second, 0.0), MEAN_S)
    assert rates([samples], MEAN_S) == pytest.approx([5.0])
    assert len(samples) <= 123


def test_chance_is_not_taken_for_a_rise() -> None:
    found = [sum(rates([poisson(2.0, 400, seed)], MEAN_S)) for seed in range(40)]
    assert sum(found) / 40 == pytest.approx(2.0, rel=0.15)
    assert max(found) < 3.2


def test_a_jump_is_seen_within_seconds_where_there_are_many_requests() -> None:
    samples = poisson(10.0, 300)
    last = samples[-1]
    for second in range(1, 6):
        work = last.work_s + 100.0 * second
        samples = with_sample(samples, Sample(last.at + second, work, work), MEAN_S)
    assert sum(rates([samples], MEAN_S)) > 80


def test_one_large_request_proves_nothing() -> None:
    samples = poisson(1.0, 300)
    last = samples[-1]
    jumped = with_sample(
        samples, Sample(last.at + 1, last.work_s + 60, last.squares + 3600), MEAN_S
    )
    assert sum(rates([jumped], MEAN_S)) == pytest.approx(
        sum(rates([samples], MEAN_S)) + 60 / 120, rel=0.1
    )


def test_demands_are_raised_together() -> None:
    steady, jumping = poisson(10.0, 300), poisson(10.0, 300, seed=1)
    last = jumping[-1]
    for second in range(1, 6):
        work = last.work_s + 100.0 * second
        steady = with_sample(
            steady,
            Sample(last.at + second, steady[-1].work_s + 10, steady[-1].squares + 10),
            MEAN_S,
        )
        jumping = with_sample(jumping, Sample(last.at + second, work, work), MEAN_S)
    one, other = rates([steady, jumping], MEAN_S)
    assert other > 7 * one


def test_a_restarted_counter_or_clock_begins_new_samples() -> None:
    samples = poisson(10.0, 300)
    assert with_sample(samples, Sample(301, 1.0, 1.0), MEAN_S) == (Sample(301, 1.0, 1.0),)
    assert with_sample(samples, Sample(5, 1e6, 1e6), MEAN_S) == (Sample(5, 1e6, 1e6),)


def test_a_gap_is_filled_by_the_counter() -> None:
    samples = with_sample((Sample(0, 0.0, 0.0),), Sample(1000, 3000.0, 0.0), MEAN_S)
    assert rates([samples], MEAN_S) == [3.0]
