"""How long a call will wait, from what tenants have waiting and have lately been asking for.

A fluid model of the fair queue: pools do `speed` seconds of work a second, and every tenant is
served in proportion to its weight while it has work. A tenant with backlog B and weight w is done
when it has been given x = B ÷ w per weight, and by then another one has been given the work that it
had or got meanwhile, but no more than its weight · x. So the wait t is the smallest solution of

    speed · t = B + Σ over the others of min(backlog + arriving · t, weight · x)

where `arriving` is the work that a tenant has been asking for, per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MEMORY_S = 10.0  # how far back `ArrivalRate` looks
MET = 0.99
BOUND = 4.0  # how far `ForecastAccuracy` may leave what was predicted
LEARN = 0.05
MOVE = 0.2
FADE_S = 300.0


class TenantDemand(NamedTuple):
    """Of one tenant for the pools in question."""

    weight: float
    backlog_s: float
    arriving: float  # work a second


@dataclass(slots=True)
class ArrivalRate:
    """Of events of different sizes, fading exponentially."""

    _rate: float = 0.0
    at: float = -math.inf  # the last one

    def add(self, amount: float, now: float) -> None:
        self._rate = self.per_s(now) + amount / MEMORY_S
        self.at = now

    def per_s(self, now: float) -> float:
        return self._rate * math.exp(-(now - self.at) / MEMORY_S)


class ForecastAccuracy:
    """How predictions and what came of them compare: their usual ratio, and one seldom exceeded.

    The first is an exponential mean; the second follows the quantile `MET` by stochastic
    approximation: each ratio above it moves it up, each below it 99 times less down. Both fade
    towards 1, so that what refuses requests does not last when none are admitted. Of what takes
    less than a second, overheads are no matter of the forecast.
    """

    def __init__(self) -> None:
        self._usual = self._most = 1.0

    def learn(self, predicted_s: float, took_s: float) -> None:
        ratio = min(max(took_s, 1.0) / max(predicted_s, 1.0), BOUND)
        self._usual += LEARN * (ratio - self._usual)
        self._most += MOVE * (MET if ratio > self._most else MET - 1)
        self._most = min(max(self._most, self._usual, 1.0), BOUND)

    def fade(self, seconds: float) -> None:
        """Time has passed."""
        part = math.exp(-seconds / FADE_S)
        self._usual = 1 + (self._usual - 1) * part
        self._most = 1 + (self._most - 1) * part

    def expected(self, predicted_s: float) -> float:
        """When it will be done, as such predictions go."""
        return predicted_s * self._usual

    def at_most(self, predicted_s: float) -> float:
        """When it will be done but for one time in a hundred."""
        return predicted_s * self._most


def wait_s(backlog_s: float, weight: float, others: Sequence[TenantDemand], speed: float) -> float:
    """Seconds until a tenant's backlog is served, what it waits for itself included."""
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
    while latest - soonest > 0.01 * latest:  # what is served grows ever more slowly: one crossing
        t = (soonest + latest) / 2
        if served_by(t) > speed * t:
            soonest = t
        else:
            latest = t
    return latest
