"""The replay of the measurements: traces with known answers, and queueing theory."""

import random
import statistics
from dataclasses import replace

import pytest

from bench.replay import (
    Costs,
    RequestedImage,
    between_steps,
    one_at_a_time,
    percentile,
    poisson,
    slowdowns,
    static_batches,
)

# A step takes 1 s for up to two rows and half a second more for each further two.
STEP_S = {rows: 1 + max(0, rows - 2) / 4 for rows in (1, 2, 4, 8, 16)}


def bucket(rows: int) -> int:
    return next(size for size in STEP_S if size >= rows)


COSTS = Costs({64: STEP_S, 128: {r: 4 * s for r, s in STEP_S.items()}}, {64: 0.5, 128: 2.0}, bucket)


def all_that_fit(trace: list[RequestedImage], slots: int) -> list[float]:
    return between_steps(trace, COSTS, slots, 8, all_that_fit=True)


def test_an_image_alone_takes_its_own_time_in_every_way() -> None:
    trace = [RequestedImage(10, 64, 2, 6)]
    assert one_at_a_time(trace, COSTS) == [16.5]
    assert between_steps(trace, COSTS, 8, 16) == [16.5]
    assert static_batches(trace, COSTS, 8) == [16.55]  # after 0.05 s of waiting for more images
    assert slowdowns(trace, [16.5], COSTS) == [1]


def test_an_edit_is_encoded_before_its_first_step_while_the_others_wait() -> None:
    costs = replace(COSTS, encode_s={64: 0.25})
    edit, other = RequestedImage(0, 64, 2, 6, edit=True), RequestedImage(0, 64, 2, 6)
    assert costs.alone(edit) == 6.75
    assert one_at_a_time([edit], costs) == between_steps([edit], costs, 8, 16) == [6.75]
    together = between_steps([edit, other], costs, 8, 8, all_that_fit=True)
    assert max(together) == max(all_that_fit([other, other], 8)) + 0.25


def test_equal_images_share_their_steps() -> None:
    trace = [RequestedImage(0, 64, 2, 6)] * 4
    together = 6 * STEP_S[8]
    assert static_batches(trace, COSTS, 4) == [together + 4 * 0.5] * 4
    assert all_that_fit(trace, 4) == [together + i * 0.5 for i in (1, 2, 3, 4)]
    assert max(one_at_a_time(trace, COSTS)) == 4 * 6.5


def test_unequal_images_share_steps_only_when_batched_between_steps() -> None:
    trace = [RequestedImage(0, 64, 2, 6), RequestedImage(0, 64, 2, 2)]
    long, short = all_that_fit(trace, 4)
    assert short == 2 * STEP_S[4] + 0.5
    assert long == short + 4 * STEP_S[2] + 0.5
    assert static_batches(trace, COSTS, 8) == [6.55, 9.05]


@pytest.mark.parametrize(("gain", "faster"), [(1.02, 1.3), (2.0, 1.0)])
def test_batches_that_gain_little_are_small(gain: float, faster: float) -> None:
    """`gain`: rows per second in a large batch ÷ those of one image."""
    step_s = {rows: rows * (1 if rows <= 2 else 1 / gain) for rows in (1, 2, 4, 8, 16)}
    costs = Costs({64: step_s}, {64: 0.0}, bucket)
    rng = random.Random(7)
    trace = poisson(rng, 2000, 0.8 * gain / (2 * 20), lambda: (64, 2, rng.choice((10, 20, 30))))
    mean_s = [
        statistics.mean(
            done - image.arrives_s
            for image, done in zip(
                trace, between_steps(trace, costs, 8, 16, all_that_fit=all_), strict=True
            )
        )
        for all_ in (True, False)
    ]
    assert mean_s[0] / mean_s[1] > faster


def test_slots_bound_the_images_that_run_together() -> None:
    trace = [RequestedImage(0, 64, 2, 4)] * 3
    finished = all_that_fit(trace, 2)
    assert finished[2] == pytest.approx(finished[1] + 4.5)


def test_rows_between_measured_ones_are_interpolated() -> None:
    assert COSTS.step(64, 6) == 2.0


def test_one_at_a_time_is_an_m_d_1_queue() -> None:
    """The mean wait is load ÷ (2 · (1 − load)) of the service time."""
    rng = random.Random(5)
    trace = poisson(rng, 20_000, 0.7 / 6.5, lambda: (64, 2, 6))
    finished = one_at_a_time(trace, COSTS)
    waits = [f - asked.arrives_s - 6.5 for asked, f in zip(trace, finished, strict=True)]
    assert statistics.mean(waits) == pytest.approx(6.5 * 0.7 / (2 * 0.3), rel=0.05)


def test_no_image_finishes_before_its_time_alone() -> None:
    rng = random.Random(6)
    mix = [(size, rows, steps) for size in (64, 128) for rows in (1, 2) for steps in (2, 9)]
    trace = poisson(rng, 500, 0.1, lambda: rng.choice(mix))
    for finished in (
        one_at_a_time(trace, COSTS),
        between_steps(trace, COSTS, 8, 16),
        static_batches(trace, COSTS, 8),
    ):
        ordered = slowdowns(trace, finished, COSTS)
        assert ordered[0] > 0.999
        assert percentile(ordered, 0.5) < percentile(ordered, 0.99)
