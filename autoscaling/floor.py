"""The learnt floor: capacity that stays ready because work has come faster than replicas start.

A replica that is ordered now is ready only after the time of a start. Work that comes meanwhile,
and is more than the ready replicas do before it has waited for too long, is *late*. `LateWork`
counts for each of `LEVELS` how much work would have been late if at least that capacity had always
been ready. The floor is the lowest level at which no more than a given fraction of all work would
have been late.

So a rate that rises slowly asks for no floor, because replicas can be ordered in time. A rate that
jumps asks for the height of its jumps, if these bring more than that fraction of the work.

Each hour of the day is counted by itself too, apart for workdays and weekends. Once an hour has
been seen on `DAYS` days, its own counts decide. So a crowd that comes every day at nine keeps
replicas ready at nine only. The memory is bounded: old counts lose weight.

Pure: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

LEVELS = (0.0, *(0.05 * 1.15**i for i in range(80)))  # seconds of work per second, to over 3000
FADE_S = 14 * 86400.0  # counts lose two thirds of their weight in this time
MOST_WEIGHT = 1e9  # of a new count, before all counts are divided by it
DAYS = 2  # on which an hour was seen before its own counts decide
WORKDAY, WEEKEND = 0, 1

NOTHING_LATE_S = (0.0,) * len(LEVELS)

Hour = tuple[int, int]  # WORKDAY or WEEKEND, and the hour of the day in UTC


class LateWork(NamedTuple):
    """Weighted seconds of work that would have been late, for each of `LEVELS`; `all_s`: all work.

    `waiting_s`: for each level, the seconds of work that would wait now. `weight`: of counts at the
    present, which grows because old counts lose weight.
    """

    all_s: float = 0.0
    late_s: tuple[float, ...] = NOTHING_LATE_S
    waiting_s: tuple[float, ...] = NOTHING_LATE_S
    weight: float = 1.0

    def counted(self, work_s: float, provided: float, seconds: float, slack_s: float) -> LateWork:
        """Count `work_s` that has arrived within the last `seconds`.

        `provided`: the capacity that was ready without a floor, in seconds of work per second.
        `slack_s`: how long work may wait before it is late.
        """
        weight = self.weight * math.exp(seconds / FADE_S)
        all_s = self.all_s + work_s * weight
        if work_s <= provided * seconds and not any(self.waiting_s):
            return LateWork(all_s, self.late_s, self.waiting_s, weight)._scaled()
        late, waiting = [], []
        for level, late_s, waiting_s in zip(LEVELS, self.late_s, self.waiting_s, strict=True):
            capacity = max(level, provided)
            left_s = waiting_s + work_s - capacity * seconds
            over_s = left_s - slack_s * capacity
            late.append(late_s + max(over_s, 0.0) * weight)
            waiting.append(max(min(left_s, left_s - over_s), 0.0))
        return LateWork(all_s, tuple(late), tuple(waiting), weight)._scaled()

    def floor(self, late_part: float) -> float:
        """The lowest level with at most the fraction `late_part` of all work late; 0 if none is."""
        allowed_s = late_part * self.all_s
        levels = zip(LEVELS, self.late_s, strict=True)
        return next((level for level, late_s in levels if late_s <= allowed_s), LEVELS[-1])

    def _scaled(self) -> LateWork:
        if self.weight < MOST_WEIGHT:
            return self
        late_s = tuple(late_s / self.weight for late_s in self.late_s)
        return LateWork(self.all_s / self.weight, late_s, self.waiting_s)


class JumpMemory(NamedTuple):
    """The late work of one demand.

    `always`: of all hours. `hours`: of each hour, with the number of days on which it was seen.
    `day`, `hour`: the day since 1970 and the hour in which work was counted last.
    """

    always: LateWork = LateWork()
    hours: Mapping[Hour, tuple[LateWork, int]] = MappingProxyType({})
    day: int = -1
    hour: Hour | None = None

    def counted(
        self, work_s: float, provided: float, seconds: float, slack_s: float, unix_s: float | None
    ) -> JumpMemory:
        """Count work as `LateWork.counted` does; `unix_s`: the time of day, None if unknown."""
        always = self.always.counted(work_s, provided, seconds, slack_s)
        if unix_s is None:
            return self._replace(always=always)
        hour, day = hour_of(unix_s), int(unix_s // 86400)
        known, days = self.hours.get(hour, (LateWork(), 0))
        if hour != self.hour:  # what waited at the end of the hour before waits still
            known = known._replace(waiting_s=self.always.waiting_s)
        days += (hour, day) != (self.hour, self.day)
        counted = known.counted(work_s, provided, seconds, slack_s)
        return JumpMemory(always, {**self.hours, hour: (counted, days)}, day, hour)

    def floor(self, late_part: float, unix_s: float | None, ahead_s: float) -> float:
        """The floor for now and for `ahead_s` seconds later, whichever is higher."""
        times = (unix_s, unix_s + ahead_s) if unix_s is not None else (None,)
        return max(self._floor_at(late_part, at) for at in times)

    def _floor_at(self, late_part: float, unix_s: float | None) -> float:
        if unix_s is not None:
            known, days = self.hours.get(hour_of(unix_s), (LateWork(), 0))
            if days > DAYS:  # the present one is not over yet
                return known.floor(late_part)
        return self.always.floor(late_part)

    def as_json(self) -> dict[str, Any]:
        """The memory as plain data, without what waits now."""
        return {
            "seen": [self.day, self.hour],
            "always": _plain(self.always),
            "hours": [[*hour, days, _plain(late)] for hour, (late, days) in self.hours.items()],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> JumpMemory:
        """Read what `as_json` has made. Raises `LookupError`, `TypeError` or `ValueError`."""
        hours = {
            (int(kind), int(hour)): (_late_work(late), int(days))
            for kind, hour, days, late in found["hours"]
        }
        day, hour = found["seen"]
        last = (int(hour[0]), int(hour[1])) if hour else None
        return cls(_late_work(found["always"]), hours, int(day), last)


class Floor(NamedTuple):
    """The memory of one demand's jumps, and what is needed to count the next ones.

    `counted_at`, `arrived_s`: the time up to which work is counted, and all work by then. `worked`:
    the last time at which work arrived. `ordered`: pairs of a time and the capacity that was
    ordered then, without the floor; the first one is that which is ready now.
    """

    memory: JumpMemory = JumpMemory()
    counted_at: float | None = None
    arrived_s: float = 0.0
    worked: float = -math.inf
    ordered: tuple[tuple[float, float], ...] = ()

    def updated(
        self,
        arrived_s: float,
        ready: float,
        ordered: float,
        start_s: float,
        slack_s: float,
        now: float,
        unix_s: float | None,
    ) -> Floor:
        """Count what has arrived since the last time.

        `arrived_s`: all work that has arrived so far. `ready`, `ordered`: the capacity that is
        ready and that is ordered now, without the floor. `start_s`: seconds of a start. `slack_s`:
        how long work may wait. `now`: seconds on a steady clock. `unix_s`: the time of day.
        """
        if self.counted_at is None or now < self.counted_at or arrived_s < self.arrived_s:
            return Floor(self.memory, now, arrived_s, self.worked, ((-math.inf, ready),))
        seconds, work_s = now - self.counted_at, arrived_s - self.arrived_s
        if seconds <= 0:
            return self
        history = self.ordered
        if history[-1][1] != ordered:
            history = (*history, (now, ordered))
        while len(history) > 1 and now - history[1][0] >= start_s:
            history = history[1:]
        memory = self.memory.counted(work_s, history[0][1], seconds, slack_s, unix_s)
        worked = now if work_s else self.worked
        return Floor(memory, now, arrived_s, worked, history)

    def level(
        self, late_part: float, keep_s: float, start_s: float, now: float, unix_s: float | None
    ) -> float:
        """The floor, in seconds of work per second.

        0 if no work has come for `keep_s`, unless the hours that begin within `start_s` ask for
        one by their own counts.
        """
        level = self.memory.floor(late_part, unix_s, start_s)
        if now - self.worked > keep_s and not self._expected(unix_s, start_s):
            return 0.0
        return level

    def _expected(self, unix_s: float | None, start_s: float) -> bool:
        if unix_s is None:
            return False
        hours = {hour_of(unix_s), hour_of(unix_s + start_s)}
        return any(self.memory.hours.get(hour, (None, 0))[1] > DAYS for hour in hours)


def hour_of(unix_s: float) -> Hour:
    """The hour of a time, in UTC."""
    day = int(unix_s // 86400)
    weekday = (day + 3) % 7  # 1970 began on a Thursday; 0 is Monday
    return WEEKEND if weekday >= 5 else WORKDAY, int(unix_s % 86400 // 3600)


def _plain(late: LateWork) -> list[Any]:
    """All counts in units of the present weight."""
    return [late.all_s / late.weight, [late_s / late.weight for late_s in late.late_s]]


def _late_work(found: Any) -> LateWork:
    all_s, late_s = found
    if len(late_s) != len(LEVELS):
        raise ValueError(f"{len(late_s)} levels: this version counts {len(LEVELS)}")
    return LateWork(float(all_s), tuple(map(float, late_s)))
