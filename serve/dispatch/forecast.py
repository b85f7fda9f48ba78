"""Forecast of how long a call will wait, from the tenants' backlogs and recent arrivals.

The model is a fluid one of the fair queue: the pools do `speed` seconds of work a second, and every
tenant is served in proportion to its weight while it has work. A tenant with backlog B and weight w
is done when it was given x = B ÷ w per weight. By then each other tenant was given the work that it
had or got meanwhile, but no more than its weight · x. So the wait t is the smallest solution of

    speed · t = B + Σ over the others of min(backlog + arriving · t, weight · x)

where `arriving` is the work per second that the other tenant has lately asked for.

Pure: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

RATE_MEMORY_S = 10.0  # time constant of `ArrivalRate`
QUANTILE = 0.99  # of the ratios, that `at_most` follows
MAX_RATIO = 4.0  # how far `ForecastAccuracy` may leave the prediction
MEAN_STEP = 0.05  # how far one ratio moves the mean
QUANTILE_STEP = 0.2  # how far one ratio moves the quantile
FADE_S = 300.0  # time constant with which both return to 1


class TenantDemand(NamedTuple):
    """The work that one tenant asks of the pools in question."""

    weight: float
    backlog_s: float
    arriving: float  # seconds of work per second


@dataclass(slots=True)
class ArrivalRate:
    """The rate of events of different sizes, averaged with exponentially fading memory."""

    _rate: float = 0.0
    at: float = -math.inf  # time of the last event

    def add(self, amount: float, now: float) -> None:
        """Count an event."""
        self._rate = self.per_s(now) + amount / RATE_MEMORY_S
        self.at = now

    def per_s(self, now: float) -> float:
        """The amount per second at `now`."""
        return self._rate * math.exp(-(now - self.at) / RATE_MEMORY_S)


class ForecastAccuracy:
    """How predictions compare with what came of them: the usual ratio, and one seldom exceeded.

    The first is an exponential mean. The second follows the quantile `QUANTILE` by stochastic
    approximation: each ratio above it moves it up, each ratio below it moves it 99 times less down.
    Both fade towards 1, so that a bad past does not refuse requests for ever when none are
    admitted. Times below one second count as one second, because overheads are no error of the
    forecast.
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
        """When a call will be done, in the mean of such predictions."""
        return predicted_s * self._mean

    def at_most(self, predicted_s: float) -> float:
        """When a call will be done in 99 of 100 cases."""
        return predicted_s * self._quantile


def wait_s(backlog_s: float, weight: float, others: Sequence[TenantDemand], speed: float) -> float:
    """Seconds until a tenant's backlog is served, the call that waits included."""
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
