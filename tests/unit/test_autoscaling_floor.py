"""The learnt floor: what jumps of the rate make replicas stay ready."""

from __future__ import annotations

import json
import math

import pytest

from autoscaling.floor import FADE_S, LEVELS, Floor, JumpMemory, LateWork, hour_of

HOUR_S, DAY_S = 3600.0, 86400.0
SATURDAY_S = 2 * DAY_S  # 1970 began on a Thursday


class Model:
    """Work that arrives for a model of which replicas start in `start_s`, and its floor."""

    def __init__(self, start_s: float = 60.0, step_s: float = 1.0, unix_s: float | None = 0.0):
        self.floor, self.start_s, self.step_s = Floor(), start_s, step_s
        self.arrived_s, self.now, self.begins = 0.0, 0.0, unix_s
        self.count(0.0)

    @property
    def unix_s(self) -> float | None:
        return None if self.begins is None else self.begins + self.now

    def count(self, ordered: float) -> None:
        self.floor = self.floor.updated(
            self.arrived_s, 0.0, ordered, self.start_s, 2.0, self.now, self.unix_s
        )

    def run(self, seconds: float, rate: float) -> None:
        """Let work arrive; capacity is ordered at once, as soon as the rate is known."""
        for _ in range(round(seconds / self.step_s)):
            self.now += self.step_s
            self.arrived_s += rate * self.step_s
            self.count(rate)

    def level(self, late_part: float = 0.01, keep_s: float = HOUR_S) -> float:
        return self.floor.level(late_part, keep_s, self.start_s, self.now, self.unix_s)


def at_least(rate: float) -> float:
    """The lowest level that serves work of this rate."""
    return next(level for level in LEVELS if level >= rate)


def test_before_anything_has_come_there_is_no_floor() -> None:
    assert Model().level() == 0.0
    assert LateWork().floor(0.0) == 0.0


def test_jumps_that_bring_much_of_the_work_keep_their_height() -> None:
    model = Model()
    for _ in range(3):
        model.run(1800, 1.0)
        model.run(300, 10.0)
    model.run(600, 1.0)
    assert at_least(7.0) <= model.level() <= at_least(10.0)
    # 3 · 60 s of 9 too much are 1620 of 15,000 s of work: with more late than that, no floor.
    assert model.level(late_part=0.2) == 0.0
    assert model.level(late_part=0.0) >= 9.0


def test_a_rate_that_rises_slowly_needs_no_floor() -> None:
    model = Model()
    for rate in range(1, 200):
        model.run(60, rate / 10)
    assert model.level() <= 0.2


def test_work_that_may_wait_needs_less() -> None:
    """Bursts of 20 s of work every 100 s: with 20 s to wait, a capacity of 1 is enough."""

    def level(slack_s: float) -> float:
        late = LateWork()
        for second in range(10_000):
            late = late.counted(20.0 * (second % 100 == 0), 0.0, 1.0, slack_s)
        return late.floor(0.001)

    assert level(slack_s=20.0) == at_least(20 / 21)
    assert level(slack_s=1.0) == at_least(20 / 2)
    assert level(slack_s=0.0) == at_least(20.0)


def test_what_was_ready_without_a_floor_is_not_late() -> None:
    late = LateWork()
    for _ in range(100):
        late = late.counted(8.0, 10.0, 1.0, 0.0)
    assert late.floor(0.0) == 0.0
    late = late.counted(30.0, 10.0, 1.0, 0.0)
    assert late.floor(0.0) == at_least(30.0)
    assert late.late_s[0] == pytest.approx(20.0, rel=1e-3)


def test_old_jumps_lose_their_weight() -> None:
    model = Model(step_s=60.0, unix_s=None)
    for _ in range(3):
        model.run(1800, 1.0)
        model.run(300, 10.0)
    assert model.level() > 5.0
    model.run(10 * DAY_S, 1.0)
    assert model.level() <= 1.5
    weight = model.floor.memory.always.weight
    assert weight == pytest.approx(math.exp(model.now / FADE_S), rel=1e-3)


def test_a_weight_that_grows_for_years_stays_finite() -> None:
    late = LateWork()
    for _ in range(1000):
        late = late.counted(10.0, 0.0, DAY_S, 0.0)
    assert late.weight < 1e9
    assert math.isfinite(late.all_s)
    assert late.floor(0.01) > 0


def test_without_work_for_long_the_floor_is_given_up() -> None:
    model = Model(unix_s=None)
    for _ in range(3):
        model.run(600, 0.0)
        model.run(300, 10.0)
    model.run(HOUR_S - 10, 0.0)
    assert model.level() > 5.0
    model.run(20, 0.0)
    assert model.level() == 0.0
    model.run(1, 1.0)
    assert model.level() > 5.0


def test_a_crowd_that_comes_daily_has_its_floor_in_that_hour_only() -> None:
    model = Model(start_s=120.0, step_s=10.0)
    for _ in range(3):  # Thursday, Friday, and Saturday, on which nobody comes
        model.run(9 * HOUR_S, 1.0)
        model.run(HOUR_S, 20.0 if model.now < SATURDAY_S else 1.0)
        model.run(14 * HOUR_S, 1.0)
    model.run(DAY_S, 1.0)  # Sunday
    model.run(9 * HOUR_S, 1.0)  # Monday, before nine
    model.now -= 60.0
    assert model.level() >= at_least(15.0)  # the crowd comes within the time of a start
    model.now -= HOUR_S
    assert model.level() <= 1.5
    model.now -= DAY_S - HOUR_S  # Sunday, nine
    assert model.level() <= 1.5


def test_hours_are_those_of_workdays_or_of_weekends() -> None:
    assert hour_of(0.0) == (0, 0)  # Thursday
    assert hour_of(DAY_S + 9.5 * HOUR_S) == (0, 9)
    assert hour_of(SATURDAY_S + HOUR_S) == (1, 1)
    assert hour_of(4 * DAY_S) == (0, 0)


def test_what_was_learnt_survives_as_plain_data() -> None:
    model = Model(step_s=10.0)
    for _ in range(3):
        model.run(1800, 1.0)
        model.run(300, 10.0)
    found = JumpMemory.from_json(json.loads(json.dumps(model.floor.memory.as_json())))
    assert found.floor(0.01, model.unix_s, 0.0) == model.floor.memory.floor(0.01, model.unix_s, 0.0)
    assert found.hours.keys() == model.floor.memory.hours.keys()
    again = found.counted(1.0, 1.0, 1.0, 0.0, model.unix_s)  # a restart is no new day
    assert [days for _, days in again.hours.values()] == [days for _, days in found.hours.values()]
    with pytest.raises(ValueError, match="levels"):
        JumpMemory.from_json({"seen": [-1, None], "always": [1.0, [0.0]], "hours": []})


def test_a_restart_counts_what_is_ready_and_not_the_pause() -> None:
    model = Model()
    model.run(600, 5.0)
    memory = model.floor.memory
    again = Floor(memory).updated(0.0, 5.0, 5.0, 60.0, 2.0, 1e6, None)
    again = again.updated(5.0, 5.0, 5.0, 60.0, 2.0, 1e6 + 1, None)
    assert again.memory.always.late_s == memory.always.late_s
