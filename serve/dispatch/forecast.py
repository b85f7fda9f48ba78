"""Forecast of how long a call will wait, from the tenants' backlogs and recent arrivals.

The model treats the work in the fair queue as a fluid. The pools do `speed` seconds of work in a
second, and every tenant that has work is served in proportion to its weight. Let B be the
backlog of the tenant that asks, with the new call in it, and w its weight. The call is done when
this tenant has been given x = B ÷ w of work per weight. In the same time each other tenant is given
its backlog and the work that arrives, but at most x times its own weight. So the wait t is the
smallest solution of

    speed · t = B + Σ over the other tenants of min(backlog + arriving · t, weight · x)

where `arriving` is the work per second that the other tenant has lately asked for.

Pure: standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

RATE_MEMORY_S = 10.0  # time constant of `ArrivalRate`
QUANTILE = 0.99  # the quantile of the ratios that `at_most` uses
MAX_RATIO = 4.0  # the largest ratio real ÷ predicted that `ForecastAccuracy` counts
MEAN_STEP = 0.05  # how far one ratio moves the mean
QUANTILE_STEP = 0.2  # how far one ratio moves the quantile
FADE_S = 300.0  # time constant with which mean and quantile return to 1
# The times at which `CrowdForecast` knows the work that is served: from 0.1 s to over an hour.
CROWD_TIMES_S = (0.0, *(0.1 * 1.25**i for i in range(48)))


class TenantDemand(NamedTuple):
    """The work that one tenant has waiting for some pools, and that arrives for them."""

    weight: float
    backlog_s: float
    arriving: float  # seconds of work per second


@dataclass(slots=True)
class ArrivalRate:
    """An exponential moving average of the amount that arrives per second."""

    _rate: float = 0.0
    at: float = -math.inf  # time of the last event

    def add(self, amount: float, now: float) -> None:
        """Count an arrival of `amount` at the time `now`."""
        self._rate = self.per_s(now) + amount / RATE_MEMORY_S
        self.at = now

    def per_s(self, now: float) -> float:
        """The mean of the recorded amounts per second, as it is at `now`."""
        return self._rate * math.exp(-(now - self.at) / RATE_MEMORY_S)


class ForecastAccuracy:
    """How the real durations of calls compare with their forecasts.

    Two numbers are learned from the ratios real ÷ predicted. The first is their exponential mean.
    The second is their quantile `QUANTILE`, which only 1 of 100 ratios exceeds. The quantile is
    learned by stochastic approximation: a ratio above the quantile moves it up by 99 times as much
    as a ratio below the quantile moves it down.

    Both numbers fade towards 1. Otherwise bad forecasts could cause every request to be refused,
    and then no call would ever correct them. Times below one second count as one second, because
    overheads are no error of the forecast.
    """

    def __init__(self) -> None:
        self._mean = self._quantile = 1.0

    def learn(self, predicted_s: float, took_s: float) -> None:
        """Learn from a call: its real ÷ its predicted time until it was done, both in seconds."""
        ratio = min(max(took_s, 1.0) / max(predicted_s, 1.0), MAX_RATIO)
        self._mean += MEAN_STEP * (ratio - self._mean)
        self._quantile += QUANTILE_STEP * (QUANTILE if ratio > self._quantile else QUANTILE - 1)
        self._quantile = min(max(self._quantile, self._mean, 1.0), MAX_RATIO)

    def fade(self, seconds: float) -> None:
        """Let both ratios return towards 1 for the time that has passed."""
        part = math.exp(-seconds / FADE_S)
        self._mean = 1 + (self._mean - 1) * part
        self._quantile = 1 + (self._quantile - 1) * part

    def expected(self, predicted_s: float) -> float:
        """The mean time in seconds after which a call with this prediction is done."""
        return predicted_s * self._mean

    def at_most(self, predicted_s: float) -> float:
        """The seconds within which 99 of 100 calls with this prediction are done."""
        return predicted_s * self._quantile


def wait_s(backlog_s: float, weight: float, others: Sequence[TenantDemand], speed: float) -> float:
    """Seconds until a tenant's whole backlog is served, infinite if `speed` is 0.

    `backlog_s`: the tenant's waiting work, including the call for which the forecast is made.
    `speed`: seconds of work that the pools do in a second.
    """
    if not speed:
        return math.inf
    per_weight = backlog_s / weight

    def served_by(t: float) -> float:
        served = backlog_s
        for other_weight, other_backlog_s, arriving in others:
            served += min(other_backlog_s + arriving * t, other_weight * per_weight)
        return served

    soonest = served_by(0.0) / speed
    latest = (backlog_s + sum(other.weight for other in others) * per_weight) / speed
    # `served_by` is concave, so it crosses speed · t once: bisect to one per cent.
    while latest - soonest > 0.01 * latest:
        t = (soonest + latest) / 2
        if served_by(t) > speed * t:
            soonest = t
        else:
            latest = t
    return latest


class _ServedBy:
    """The work that is served by one time, as a function of the work per weight.

    Each tenant is served min(its work by then, weight · x). With the tenants in order of work ÷
    weight, this sum takes one bisection: those before x are served whole, the others weight · x.
    """

    def __init__(self, demands: Sequence[TenantDemand], t: float) -> None:
        works = sorted(
            ((work := backlog_s + arriving * t) / weight, work, weight)
            for weight, backlog_s, arriving in demands
        )
        self._ratios = [ratio for ratio, _, _ in works]
        self._works = [0.0, *accumulate(work for _, work, _ in works)]
        self._weights = [0.0, *accumulate(weight for _, _, weight in works)]

    def at(self, per_weight: float) -> float:
        whole = bisect_left(self._ratios, per_weight)
        return self._works[whole] + (self._weights[-1] - self._weights[whole]) * per_weight


@dataclass(frozen=True)
class CrowdForecast:
    """The forecast `wait_s` for many calls, from one reading of many tenants.

    A forecast costs O(log tenants) after the first ones, and is exact at `CROWD_TIMES_S`; between
    two of these times the served work is taken as linear. `read_at`: the time of the reading.
    """

    demands: Mapping[str, TenantDemand]
    read_at: float
    _tables: dict[float, _ServedBy] = field(default_factory=dict)

    def wait_s(self, tenant: str, backlog_s: float, weight: float, speed: float) -> float:
        """Seconds until the tenant's `backlog_s` is served; see the function `wait_s`."""
        if not speed:
            return math.inf
        per_weight = backlog_s / weight

        def missing(t: float) -> float:
            """The work that would have to be served by `t`, less what can be."""
            if (table := self._tables.get(t)) is None:
                table = self._tables[t] = _ServedBy(self._all, t)
            others = table.at(per_weight)
            if own := self.demands.get(tenant):
                others -= min(own.backlog_s + own.arriving * t, own.weight * per_weight)
            return backlog_s + others - speed * t

        later = bisect_left(CROWD_TIMES_S, True, key=lambda t: missing(t) <= 0)
        if later == len(CROWD_TIMES_S):
            all_weights = sum(demand.weight for demand in self._all)
            return (backlog_s + all_weights * per_weight) / speed
        if not later:
            return 0.0
        t, before = CROWD_TIMES_S[later], CROWD_TIMES_S[later - 1]
        too_early = missing(before)
        return before + (t - before) * too_early / (too_early - missing(t))

    @cached_property
    def _all(self) -> list[TenantDemand]:
        return list(self.demands.values())
